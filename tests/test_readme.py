"""The README's Python runs as it stands; its quotations and files are the package's."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
QUOTED = [block for block in BLOCKS if block.startswith("# split_lightning/")]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The names of the first program, run for fewer rounds."""
    block = next(block for block in BLOCKS if "trainer.fit(" in block)
    shortened, rounds = re.subn(r"max_epochs=\d+", "max_epochs=2", block)
    assert rounds == 1
    return run(shortened, {}, tmp_path_factory.mktemp("first"))


def run(block, names, folder):
    """Runs a block of Python in a folder, where the Trainer leaves its files."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        warnings.simplefilter("ignore")
        exec(compile(block, str(README), "exec"), names)
    return names


def test_its_first_program_trains(program):
    counts = program["module"].traffic.counts

    assert program["trainer"].callback_metrics["test/accuracy"] > 0.5
    assert counts["handoffs"] == 2 * program["data"].num_clients - 1


def test_its_own_protocol_and_observer_work(program, tmp_path, capsys):
    protocol, observer = (
        next(block for block in BLOCKS if name in block)
        for name in ("(Protocol):", "class LargestMessage")
    )
    module = program["module"]

    names = run(protocol + observer, dict(program), tmp_path)

    weights = sum(t.nbytes for t in module.client.state_dict().values())
    assert names["observer"].largest == {
        "smashed": 32 * 32 * 4 * 4 * 4,
        "labels": 32 * 8,
        "gradient": 32 * 32 * 4 * 4 * 4,
        "weights": weights,
    }
    turns = 4 * names["data"].num_clients
    assert module.traffic.counts["handoffs"] == turns - 4  # where a round begins
    assert str(names["observer"].largest) in capsys.readouterr().out


@pytest.mark.parametrize("block", QUOTED, ids=[b.splitlines()[0][2:] for b in QUOTED])
def test_its_quotations_are_the_code(block):
    path, *lines = block.splitlines()
    assert "\n".join(lines) in (ROOT / path[2:]).read_text()


def test_its_files_and_tests_exist():
    named = re.findall(r"`(tests/[\w/]*(?:\.py)?)`", TEXT)
    folders = TEXT.split("## Files")[1].split("```")[1]
    inside = re.findall(
        r"^  ((?:[\w/]+\.py|\w+/)(?:, \w+\.py)*)", folders, re.MULTILINE
    )
    named += [f"split_lightning/{own}" for line in inside for own in line.split(", ")]
    named += re.findall(r"^(\w+/) {2,}", folders, re.MULTILINE)

    assert len(named) > 60
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_folder_of_the_package_is_named():
    folders = TEXT.split("## Files")[1].split("```")[1]
    package = ROOT / "split_lightning"
    found = {path.parent.name for path in package.glob("*/__init__.py")}

    assert found == set(re.findall(r"^  (\w+)/ ", folders, re.MULTILINE))


@pytest.mark.parametrize(
    "path", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_to_files_and_headings(path):
    for target, anchor in re.findall(
        r"\]\(([^)#:]*)(?:#([\w-]+))?\)", path.read_text()
    ):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", own).lower() for own in headings]
            assert anchor in [own.replace(" ", "-") for own in anchors], (
                target,
                anchor,
            )
