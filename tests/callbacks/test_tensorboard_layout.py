"""`TensorBoardLayout`: each of its charts has curves, and all that is wanted is there.

The runs are those of the command line, on digits, cut short.
"""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from watching import events, make_data, make_module, make_trainer

from split_lightning.callbacks import TensorBoardLayout
from split_lightning.train import main

CONF = Path(__file__).parents[2] / "conf"
SHORT = [
    "rounds=1",
    "num_clients=3",
    "batch_size=128",  # 12 batches a round
    "trainer.limit_test_batches=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.enable_checkpointing=false",
    "~callbacks.confusion_picture",  # pictures take time
    "~callbacks.partition_picture",
    "~callbacks.client_picture",
    "~callbacks.history",
]
FIRST = {"Train, validation, test/loss", "Train, validation, test/accuracy"}
CUT = {
    "Cut/bytes of a round",
    "Cut/bytes in total",
    "Cut/norm of the smashed data",
    "Cut/norm of its gradient",
    "Cut/drift: cosine of successive turns",
}
PARTS = ["test", "train", "val"]
MACHINE = {"Machine/images per second", "Machine/memory (MiB)"}


def layouts(written):
    """Returns the layouts that were written: tags by section and title."""
    found = []
    for event in written.Tensors("custom_scalars__config__"):
        layout = Layout.FromString(event.tensor_proto.string_val[0])
        found.append(
            {
                f"{category.title}/{chart.title}": list(chart.multiline.tag)
                for category in layout.category
                for chart in category.chart
            }
        )
    return found


@pytest.mark.parametrize(
    ("overrides", "charts"),
    [
        ([], FIRST | CUT | MACHINE),
        (
            ["protocol=centralized", "num_clients=1"],
            FIRST | MACHINE,
        ),
        (["protocol=fedavg"], FIRST | MACHINE | {t for t in CUT if "bytes" in t}),
        (["data.val_share=0"], FIRST | CUT | MACHINE),
        (
            ["~callbacks.memory", "~callbacks.cut"],
            (FIRST | CUT | MACHINE)
            - {title for title in CUT if "norm" in title}
            - {"Machine/memory (MiB)"},
        ),
    ],
    ids=["split", "unsplit", "averaged", "no validation", "some switched off"],
)
def test_every_chart_has_curves(tmp_path, overrides, charts):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*SHORT, *overrides, f"output_dir={tmp_path}"])
    main(cfg)
    written = events(tmp_path / "tensorboard")
    (layout,) = layouts(written)
    assert set(layout) == charts
    scalars = written.Tags()["scalars"]
    curves = {
        title: [tag for tag in scalars if any(re.match(t, tag) for t in tags)]
        for title, tags in layout.items()
    }
    assert all(curves.values()), curves
    parts = ["test", "train"] if "data.val_share=0" in overrides else PARTS
    loss, accuracy, *_ = curves.values()  # come first
    assert sorted(loss) == [f"{part}/loss" for part in parts]
    assert sorted(accuracy) == [f"{p}/accuracy" for p in parts if p != "train"]
    if charts >= CUT:
        assert len(curves["Cut/bytes of a round"]) == 3
        assert len(curves["Cut/bytes in total"]) == 3
    steps = {
        event.step
        for section, tags in curves.items()
        if section in FIRST
        for tag in tags
        if not tag.startswith("test")
        for event in written.Scalars(tag)
    }
    assert len(steps) == 1  # a round's figures stand at one place


def test_a_writer_gets_one_layout(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="tb")
    layout = TensorBoardLayout()
    for _ in range(2):
        trainer = make_trainer(tmp_path, [layout], logger=logger, max_epochs=1)
        trainer.fit(make_module(), datamodule=make_data())
    assert len(layouts(events(tmp_path / "tb"))) == 1


@pytest.mark.parametrize("logger", [False, None], ids=["no logger", "csv"])
def test_without_tensorboard_it_does_nothing(tmp_path, logger):
    options = {"logger": logger} if logger is not None else {}
    if logger is None:
        from pytorch_lightning.loggers import CSVLogger

        options = {"logger": CSVLogger(tmp_path)}
    trainer = make_trainer(tmp_path, [TensorBoardLayout()], max_epochs=1, **options)
    trainer.fit(make_module(), datamodule=make_data())
    assert not list(tmp_path.rglob("events.*"))
