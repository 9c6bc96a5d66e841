"""The notebooks run from a clean kernel, and print what they keep."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TOLERANCE = 0.1  # of accuracies: another processor rounds in another way

CLAIMS = {
    "01_split_learning": [
        "together: 38,378",
        "softmax twice: 1.4612",
        "eval mode:  the same result alone and in a batch? True",
        "the same bits as the unsplit network: True",
        "the same bits as before the training: False",
        "IID: 1437 samples, each at one client: True",
        "Dirichlet(0.3): 1437 samples, each at one client: True",
        "10 clients take turns, and nothing passes the weights on.",
        "ten clients and one unsplit network have the same bits: True",
        "handoffs        counted         79   formula         79",
        "equal: True",
        "the mean is what is logged: True",
        "cut 1: smashed, client to server\ncut 2: gradient, client to server\n",
        "cut 2: smashed, server to client\ntest accuracy",
    ],
    "02_bring_your_own": [
        "what crosses: (5, 16, 16, 16) (5, 16, 16, 16)",
        "cutting after `head` leaves the server segment empty",
        "round 1: 7 6 5 4 3 2 1 0",
        "handoffs                  42",
        "<All keys matched successfully>",
        "the same logits, bit for bit: True",
    ],
    "03_own_protocol": [
        "clients: True",
        "servers: True",
        "turns of the round: 2 5 2 5 2 5 2 3 5 2 3 5 2 4 3 5",
        *(f"client {k}: the same bits as the plain loop's: True" for k in range(6)),
        "server:   the same bits as the plain loop's: True",
        "hand-offs: 35 233",
    ],
}


def printed(cell):
    """What a cell shows, in order: text as it is, of a picture that it is one."""
    shown = []
    for output in cell.outputs:
        if output.output_type == "stream":
            shown.append(f"{output.name}: {output.text}")
        else:
            data = output.get("data", {})
            shown.append("a picture" if "image/png" in data else data["text/plain"])
    return shown


def is_same(new, kept):
    """Returns whether texts agree: all but decimals exactly, those within tolerance."""
    decimal = r"\d+\.\d+"
    if re.sub(decimal, "#", new) != re.sub(decimal, "#", kept):
        return False
    pairs = zip(re.findall(decimal, new), re.findall(decimal, kept), strict=True)
    return all(abs(float(a) - float(b)) <= TOLERANCE for a, b in pairs)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def kept(path):
    return nbformat.read(path, as_version=4)


def test_it_runs_and_prints_what_it_keeps(path, kept):
    execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]
    renewed = execute(path)  # raises where a cell fails

    assert any(printed(cell) for cell in code_cells(kept))
    for cell, old in zip(code_cells(renewed), code_cells(kept), strict=True):
        new_texts, old_texts = printed(cell), printed(old)
        assert len(new_texts) == len(old_texts), cell.source
        for new, text in zip(new_texts, old_texts, strict=True):
            assert is_same(new, text), (
                f"{cell.source}\nprints\n{new}\nand keeps\n{text}"
            )


def test_what_it_keeps_is_what_it_claims(path, kept):
    shown = "\n".join(text for cell in code_cells(kept) for text in printed(cell))

    for claim in CLAIMS[path.stem]:
        assert claim in shown


def test_it_is_tidy(path, kept):
    text = path.read_text()
    outputs = [output for cell in code_cells(kept) for output in cell.outputs]
    counts = [cell.execution_count for cell in code_cells(kept)]
    metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }

    nbformat.validate(kept)
    assert counts == list(range(1, len(counts) + 1))  # from a clean kernel, in order
    assert kept.metadata == metadata
    assert not any(cell.metadata for cell in kept.cells)
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|Users|usr|work)/", text)
    assert len(text) < 200 * 1024


@pytest.mark.parametrize(
    ("new", "kept", "same"),
    [
        ("accuracy 0.91, 79 hand-offs", "accuracy 0.95, 79 hand-offs", True),
        ("accuracy 0.71, 79 hand-offs", "accuracy 0.95, 79 hand-offs", False),
        ("accuracy 0.95, 78 hand-offs", "accuracy 0.95, 79 hand-offs", False),
        ("18,865,856 bytes", "18,865,857 bytes", False),
        ("equal: False", "equal: True", False),
    ],
)
def test_texts_are_compared_as_they_should(new, kept, same):
    assert is_same(new, kept) is same
