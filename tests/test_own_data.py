"""One's own network and data by command line: trained, evaluated, exported, cut."""

import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from own_code import Fixed, Net, Source, Text

from split_lightning import cuts, evaluate, export
from split_lightning.runs import load_run
from split_lightning.train import main

QUICK = [
    "num_clients=2",
    "rounds=1",
    "callbacks=figures",
    "logger=none",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
]
CUSTOM = ["model=custom", "data=custom"]


def words(network, source, cut_layer):
    return [
        *CUSTOM,
        f"model.network._target_=own_code.{network}",
        f"data.source._target_=own_code.{source}",
        f"model.cut_layer={cut_layer}",
    ]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Runs the command line in this process; returns the run's configuration."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides, folder="run"):
        typed = ["split-lightning", *QUICK, f"hydra.run.dir={folder}", *overrides]
        monkeypatch.setattr("sys.argv", typed)
        main()
        return OmegaConf.load(tmp_path / folder / "config.yaml")

    return run


@pytest.fixture
def refused(train, capsys):
    def run(*overrides):
        with pytest.raises(SystemExit) as stopped:
            train(*overrides)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        (line,) = re.findall("split-lightning: error: (.*)", message)
        return line

    return run


def shape_of(cfg):
    return [cfg.data[key] for key in ("num_classes", "in_channels", "image_size")]


@pytest.mark.parametrize(
    ("network", "source", "cut_layer", "shape"),
    [
        ("Net", "Source", 1, [4, 1, 12]),
        ("Fixed", "Source", 1, [4, 1, 12]),
        ("OneSize", "Source", 1, [4, 1, 12]),
        ("made", "Source", 1, [4, 1, 12]),
        ("Text", "Ids", "embedding", [2, 7, 1]),
        ("SignalNet", "Signals", 2, [2, 3, 16]),
        ("VolumeNet", "Volumes", 0, [2, 1, 4]),
    ],
)
def test_network_and_data_take_one_attempt(train, network, source, cut_layer, shape):
    cfg = train(*words(network, source, cut_layer))
    assert shape_of(cfg) == shape


@pytest.mark.parametrize(
    ("network", "overrides"),
    [
        ("strict", ["model.network.num_classes=null"]),
        ("Pooled", ["+data.source.shape=[1,12,14]", "model.network.image_size=null"]),
    ],
)
def test_an_option_of_the_network_that_is_null_is_left_out(train, network, overrides):
    cut = 1 if network == "strict" else 0
    train(*words(network, "Source", cut), *overrides)


def test_a_table_of_rows_goes_with_the_multilayer_perceptron(train):
    cfg = train("model=mlp", "data=custom", "data.source._target_=own_code.Table")
    assert shape_of(cfg) == [2, 5, 1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=digits_cnn"],
        ["model=digits_cnn", "data.in_channels=1", "data/augmentation=crop"],
        ["model.network._target_=own_code.OneSize", "model.cut_layer=1"],
    ],
)
def test_own_data_go_with_other_networks_and_shapes(train, overrides):
    """The options of `digits_cnn` that another network does not take are left out."""
    cfg = train("data=custom", "data.source._target_=own_code.Source", *overrides)
    assert shape_of(cfg) == [4, 1, 12]


@pytest.mark.parametrize(
    ("network", "source", "cut_layer", "made", "inputs"),
    [
        ("Net", "Source", 1, lambda: Net(1, 12, 4), Source().load(False).inputs / 255),
        ("NetOfLogits", "Source", 1, Fixed, Source().load(False).inputs / 255),
        ("Text", "Ids", "embedding", lambda: Text(2), torch.arange(28).view(4, 7)),
    ],
)
def test_a_run_is_evaluated_exported_and_cut(
    train, tmp_path, capsys, network, source, cut_layer, made, inputs
):
    typed = words(network, source, cut_layer)
    train(*typed)
    run = tmp_path / "run"
    evaluate.main([f"run={run}"])
    trained, again = (
        json.loads((run / file).read_text())
        for file in ("results.json", "evaluation/results.json")
    )
    assert trained["test_accuracy"] == again["test_accuracy"]

    export.main([f"run={run}", "format=[safetensors,torch]"])
    about = json.loads((run / "export" / "export.json").read_text())
    assert about["image_shape"] == list(inputs.shape[1:])
    assert ("ids" in about["input"]) == (network == "Text")
    programs = [
        torch.export.load(run / "export" / f"{name}.pt2").module()
        for name in ("client", "server")
    ]
    expected = load_run(run)(inputs)
    torch.testing.assert_close(programs[1](programs[0](inputs)), expected)

    capsys.readouterr()
    cuts.main(typed[:-1])  # before a cut is chosen
    shape = "x".join(map(str, inputs.shape[1:]))
    table = (tmp_path / f"cuts/{network}-{shape}/cuts.csv").read_text()
    assert len(table.splitlines()) > 2


@pytest.mark.parametrize("partitioner", ["natural_id", "grouped_natural_id"])
def test_hospitals_are_clients(train, partitioner):
    options = {
        "natural_id": ["num_clients=3"],
        "grouped_natural_id": ["data.partitioner.group_size=2"],
    }[partitioner]
    train(
        *words("Net", "Source", 1),
        f"data/partitioner={partitioner}",
        "data.partitioner.partition_by=hospital",
        *options,
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["size", "data.partitioner.partition_sizes=[40,20]"],
            [36, 18],
        ),
        (["inner_dirichlet", "data.partitioner.partition_sizes=[40,20]"], [36, 18]),
        (
            ["id_to_size", "data.partitioner.partition_id_to_size_fn.path=numpy.sqrt"],
            None,
        ),
        (["shard"], None),
    ],
)
def test_partitioners_by_name(tmp_path, monkeypatch, overrides, expected):
    monkeypatch.chdir(tmp_path)
    found = []
    fit = "pytorch_lightning.Trainer.fit"
    monkeypatch.setattr(
        fit, lambda self, module, datamodule, **options: found.append(datamodule.parts)
    )
    monkeypatch.setattr("pytorch_lightning.Trainer.test", lambda *args, **options: [])
    monkeypatch.setattr("split_lightning.cli.training._fit_and_test", _fit_alone)
    typed = [*words("Net", "Source", 1), f"data/partitioner={overrides[0]}"]
    typed = [*QUICK, "hydra.run.dir=run", *typed, *overrides[1:]]
    monkeypatch.setattr("sys.argv", ["split-lightning", *typed])
    main()
    (parts,) = found
    sizes = [len(part) for part in parts]
    assert len(sizes) == 2
    if expected:
        assert sizes == expected


def _fit_alone(cfg, run):
    run.trainer.fit(run.module, datamodule=run.data)
    return {}


SOURCE = "data.source._target_=own_code"
NETWORK = "model.network._target_=own_code"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            [f"{SOURCE}.Broken"],
            r"KeyError: 'samples' \(in Broken.load, own_code.py:\d+",
        ),
        (
            [f"{SOURCE}.BrokenAtOnce"],
            r"no nowhere \(in BrokenAtOnce.__init__, own_code",
        ),
        ([f"{SOURCE}.made"], r"OneSize"),
        ([f"{SOURCE}.Samples"], r"`data.source` to have a method `load\(train\)`"),
        ([f"{NETWORK}.NetThatFails"], r"no memory for it \(in NetThatFails.__init__"),
        ([f"{NETWORK}.Nothing"], "`model.network._target_`.*own_code.Nothing"),
        (
            ["+data.source.shape=[3,12,12]", f"{NETWORK}.Fixed"],
            r"\(3, 12, 12\).*3 chan",
        ),
        (["+data.source.shape=[1,12,14]"], r"is used.*\(1, 12, 14\).*image_size=null"),
        (["+data.source.shape=[12,12]", f"{NETWORK}.Fixed"], r"\(12, 12\).*unsqueeze"),
        (["data.num_classes=3"], "`data.num_classes` to be 4.*got 3"),
        (["data.in_channels=3"], "`data.in_channels` to be 1.*got 3"),
        (["data.mean=[0.5,0.5]"], "`data.mean`.*each of 1 .*got 2"),
        (["data=digits"], "`data.num_classes` to be 4.*got 10.*data=custom"),
        (["model=resnet18"], r"shape \(1, 12, 12\).*3 channels"),
        (["data/partitioner=natural_id"], "partition_by"),
        (
            ["protocol=centralized", f"{NETWORK}.NetOfDicts"],
            "dict with the keys scores",
        ),
    ],
)
def test_a_mistake_in_ones_own_code_gets_one_line(refused, overrides, expected):
    typed = words("Net", "Source", 1)
    replaced = [o.partition("=")[0] for o in overrides]
    if "protocol=centralized" in overrides:
        replaced.append("model.cut_layer")
    if "model=resnet18" in overrides:
        replaced += ["model.network._target_", "model.cut_layer"]
    kept = [word for word in typed if word.partition("=")[0] not in replaced]
    assert re.search(expected, refused(*kept, *overrides))


def test_a_client_that_is_too_small_for_batch_norm_is_named(refused):
    message = refused(
        *words("SmallMaps", "Source", 1), "num_clients=60", "data.val_share=0"
    )
    assert "client 0 has 1" in message
    assert "BatchNorm (`4`)" in message
