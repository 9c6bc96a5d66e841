"""The formulas in docs/protocols.md against what runs of the command line count."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from split_lightning.cli.building import build
from split_lightning.cli.config import check_classes, check_values
from split_lightning.data import DigitsImages, Images
from split_lightning.models import DigitsCNN
from split_lightning.protocols import Begin, Mix, Protocol

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
DOCUMENT = (ROOT / "docs" / "protocols.md").read_text()
TIME = (ROOT / "docs" / "time.md").read_text()
TOPOLOGIES = (ROOT / "docs" / "topologies.md").read_text()
RUNS = (ROOT / "docs" / "runs.md").read_text()
README = (ROOT / "README.md").read_text()
PROTOCOLS = {path.stem for path in (CONF / "protocol").glob("*.yaml")}
COUNTS = (
    "uplink_bytes",
    "downlink_bytes",
    "handoff_bytes",
    "averaging_bytes",
    "server_averaging_bytes",
)
# DigitsCNN: what a layer hands on of a sample.
WIDTHS = {"maxpool": 32 * 4 * 4, "relu3": 64, "fc1": 64}
CUTS = {"conv1": 16 * 8 * 8, "relu2": 32 * 8 * 8, "maxpool": 32 * 4 * 4, "fc1": 64}
QUICK = [
    "data.source._target_=test_protocol_docs.FewDigits",
    "data.val_share=0",
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.enable_checkpointing=false",
]
SKEWED = ["data/partitioner=dirichlet", "data.partitioner.alpha=0.3"]
SETTINGS = {
    "all": ["num_clients=4", "rounds=2", "data/partitioner=linear"],
    "two of five": [
        *("num_clients=5", "rounds=3", "clients_per_round=2", *SKEWED),
        "model.cut_layer=conv1",
    ],
    "two passes": [
        *("num_clients=3", "rounds=1", "local_epochs=2", *SKEWED),
        "model.cut_layer=relu2",
    ],
    "short turns": [
        *("num_clients=3", "rounds=2", "local_steps=2", "data/partitioner=linear"),
        "model.cut_layer=fc1",
    ],
}


class FewDigits(DigitsImages):
    """The first 300 of scikit-learn's digits, so that a run takes no second."""

    def load(self, train):
        images = super().load(train)
        return Images(images.inputs[:300], images.targets[:300])


def rows(heading):
    """Returns the rows of the table of formulas under a heading, without its head."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = section[section.index("| protocol |") :].split("\n\n")[0]
    lines = [line.strip("| ").split("|") for line in table.splitlines()[2:]]
    return [[cell.strip(" `") for cell in line] for line in lines]


BYTES, MEMORY = rows("Bytes of a round"), rows("Memory")


@pytest.mark.parametrize("heading", ["Bytes of a round", "Memory"])
def test_each_protocol_has_its_formulas(heading):
    assert {name for name, *_ in rows(heading)} == PROTOCOLS


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_each_protocol_has_a_section(name):
    section = DOCUMENT.split(f"\n### {name}\n")[1].split("\n### ")[0]
    assert section.count("```mermaid") == 1
    (algorithm,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    assert len(algorithm.splitlines()) <= 6
    assert f"[`{name}`](#{name})" in DOCUMENT


@pytest.mark.parametrize("name", sorted(Protocol.__annotations__))
def test_each_attribute_of_a_protocol_is_described(name):
    assert f"\n        {name}: " in Protocol.__doc__
    assert f"\n| `{name}` | `{getattr(Protocol, name)!r}`" in DOCUMENT


COMMANDS = [
    command.split("  #")[0]
    for text in (DOCUMENT, TOPOLOGIES, TIME, README, RUNS)
    for command in re.findall(
        r"^python -m split_lightning\.train (?!-m)(.*)", text, re.MULTILINE
    )
    if not re.search(r"my\.|ckpt_path|model\.weights", command)  # files of a user
]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_of_the_documents_are_right(command):
    composed(shlex.split(command))


def composed(typed, more=()):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*more, *typed, "output_dir=x"])
    check_classes(cfg)
    check_values(
        cfg, typed
    )  # what a protocol does not use is refused only where it is typed
    return cfg


BY_RUN = {}
for name, typed, *formulas in BYTES:
    BY_RUN.setdefault((name, typed), {})["bytes"] = formulas
for name, typed, *formulas in MEMORY:
    BY_RUN.setdefault((name, typed), {})["memory"] = formulas
RUNS = [
    (setting, name, typed)
    for name, typed in BY_RUN
    for setting in (SETTINGS if typed == "" else ["all", "two of five"])
]


@pytest.mark.parametrize(
    ("setting", "name", "typed"), RUNS, ids=[" ".join(run) for run in RUNS]
)
def test_formulas_equal_what_is_counted(setting, name, typed):
    """The plan says which client trains when; the rest is plain arithmetic."""
    cfg = composed([f"protocol={name}", *typed.split()], [*QUICK, *SETTINGS[setting]])
    cfg.callbacks = {}
    run = build(cfg)
    run.trainer.fit(run.module, datamodule=run.data)
    symbols = by_round(cfg, run.data)
    found = BY_RUN[name, typed]
    if "bytes" in found:
        expected = [
            sum(eval(formula, dict(in_round)) for in_round in symbols)
            for formula in found["bytes"]
        ]
        totals = run.module.totals()
        assert dict(zip(COUNTS, expected, strict=True)) == {
            k: totals[k] for k in COUNTS
        }
        assert totals["handoffs"] == sum(in_round["T"] for in_round in symbols) * (
            "T" in found["bytes"][2]
        )
    if "memory" in found:
        live, remembered = (eval(text, symbols[-1]) for text in found["memory"])
        networks = run.module.state_dict().values()
        assert num_bytes(run.module.engine.state_dict()) == remembered
        assert sum(tensor.nbytes for tensor in networks) == live


HEADER, *COUNTED = re.findall(
    r"^\| (`?\w+`? \|.*) \|$", TOPOLOGIES.split("## Bytes")[1], re.MULTILINE
)[:4]


@pytest.mark.parametrize("place", [1, 2, 3])
def test_formulas_of_topologies_equal_what_is_counted(place):
    name = HEADER.split(" | ")[place].partition(",")[0]
    cfg = composed([f"topology={name}"], [*QUICK, *SETTINGS["all"]])
    cfg.callbacks = {}
    run = build(cfg)
    run.trainer.fit(run.module, datamodule=run.data)
    widths = [WIDTHS[cut] for cut in cfg.topology.cut_layers]
    symbols = {f"d_{i}": width for i, width in enumerate(widths, 1)}
    symbols["N"] = cfg.rounds * sum(map(len, run.data.parts))
    for line in COUNTED:
        count, *formulas = [cell.strip("` ") for cell in line.split(" | ")]
        assert run.module.totals()[count] == eval(formulas[place - 1], symbols)


def by_round(cfg, data):
    """Returns what the symbols stand for, in each round."""
    protocol, loader = data.protocol, data.train_dataloader()
    groups = protocol.num_servers or 1
    server_of = [client * groups // data.num_clients for client in range(5)]
    averages_groups = cfg.protocol.get("num_servers") and cfg.protocol.every
    known, last, symbols, mixes = set(), {}, [], 0
    for round_index in range(cfg.rounds):
        loader.set_epoch(round_index)
        steps = list(loader.planned())
        clients = [client for step in steps for client in step.client_ids]
        taking_part = set(clients)
        known |= taking_part
        last = {} if averages_groups else last
        handoffs = 0
        for client in clients:
            handoffs += last.get(server_of[client], client) != client
            last[server_of[client]] = client
        actions = [a for step in steps for a in (*step.before, *step.after)]
        turns = later = 0  # asynchronous: that begin, and after another one ended
        for action in actions:
            turns += isinstance(action, Begin)
            later += isinstance(action, Begin) and mixes > 0
            mixes += isinstance(action, Mix)
        symbols.append(
            sizes_of_segments(cfg.model.cut_layer)
            | {
                "N": cfg.local_epochs * sum(len(data.parts[k]) for k in taking_part),
                "C": len(known),
                "K": len(taking_part),
                "E": len(clients),
                "T": handoffs,
                "R": turns,
                "L": later,
                "G": len({server_of[k] for k in taking_part}),
                "H": len({server_of[k] for k in known}),
            }
        )
    return symbols


def sizes_of_segments(cut_layer):
    """Returns the bytes of the layers before and after the cut, and what crosses."""
    layers = dict(DigitsCNN().named_children())
    before = list(layers)[: list(layers).index(cut_layer) + 1]
    client = [layer for name, layer in layers.items() if name in before]
    server = [layer for name, layer in layers.items() if name not in before]
    channels = [c.num_features for c in client if isinstance(c, torch.nn.BatchNorm2d)]
    sizes = {"d": CUTS[cut_layer], "Y": 2 * 4 * sum(channels)}
    for names, segment in (("WPV", client), ("SQU", server)):
        parameters = sum(p.nbytes for layer in segment for p in layer.parameters())
        buffers = sum(b.nbytes for layer in segment for b in layer.buffers())
        whole = (parameters + buffers, parameters, buffers)
        sizes |= dict(zip(names, whole, strict=True))
    return sizes


def num_bytes(remembered):
    """Returns the bytes of all tensors in nested containers."""
    if isinstance(remembered, torch.Tensor):
        return remembered.nbytes
    if isinstance(remembered, dict):
        remembered = remembered.values()
    elif not isinstance(remembered, list | tuple | set):
        return 0
    return sum(map(num_bytes, remembered))
