"""Retired words stay out of the package's prose, its configuration and documents.

Prose is docstrings, comments and messages. Names in code are checked where parties,
states, messages and protocols are: elsewhere the words are ordinary ones.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each with the contexts in which the word is an ordinary one.
RETIRED = {
    r"own(er|ers|s|ed)\b": [],
    r"pieces?\b": [],
    r"bundles?\b": [],
    r"entering\b": [],
    r"spreads?\b": ["SPREAD"],  # a word of Ray
    r"collects?\b": [],
    r"hand(s|ed|ing)? (it |them )?(over|in)\b": [],
    r"hand-ins?\b": [],
    r"crossed\b": ["has crossed one already"],
    r"stops? (on|of|along) (a|the|its) route": [],
    r"kinds? of (client|party|parties|server)": [],
    r"timelines?\b": [],
    r"in the place of\b": [],
    r"tells whether\b": [],
    r"(go|goes|going|went) on\b": [],
    r"who(ever|m)?\b": [],
    r"(no|some)body\b": [],
}
RETIRED_NAMES = re.compile(
    "(owners?|pieces?|bundles?|entering|spread|collect|crossed|places?|hand(ed)?_in)"
)
HEART = ("engines", "observers", "protocols", "system", "topologies", "training")
# Holders are the parties of a vertical partition, and of nothing else.
HOLDERS = re.compile(r"\b[Hh]olders?\b")
ABOUT_HOLDERS = (
    *("README.md", "conf/experiment/", "conf/topology/", "docs/"),
    *(
        f"split_lightning/{path}"
        for path in (
            *("batch_norm.py", "callbacks/virtual_clock.py", "cli/certificates.py"),
            *("cli/client_site.py", "cli/measured_cuts.py", "engines/grpc_sites.py"),
            "engines/hello.py",
            *("data/", "models/", "module.py", "observers/", "placement.py"),
            *("runs/plan_report.py", "step.py", "training/support.py", "topologies/"),
        )
    ),
)


def python_prose(text):
    """Yields the strings and comments of a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def prose(path):
    """Returns the prose of a file, its lines joined."""
    text = path.read_text()
    if path.suffix == ".py":
        texts = list(python_prose(text))
    elif path.suffix == ".ipynb":
        texts = [cell.source for cell in nbformat.reads(text, as_version=4).cells]
    else:
        texts = [text]
    return "\n".join(" ".join(own.split()) for own in texts)


FILES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
    *sorted((ROOT / "conf").rglob("*.yaml")),
    *sorted((ROOT / "split_lightning").rglob("*.py")),
]
PROSE = {path.relative_to(ROOT).as_posix(): prose(path) for path in FILES}


def uses(pattern, allowed, text):
    """Returns the retired uses of a word in a text, each with what is around it."""
    for context in allowed:
        text = text.replace(context, "")
    found = re.finditer(rf"(?i)\b{pattern}", text)
    return [text[max(0, m.start() - 30) : m.end() + 30] for m in found]


@pytest.mark.parametrize("pattern", RETIRED)
def test_retired_words_do_not_come_back(pattern):
    found = {
        name: own
        for name, text in PROSE.items()
        if (own := uses(pattern, RETIRED[pattern], text))
    }
    assert not found


def test_holders_are_those_of_vertical_partitions():
    found = {name for name, text in PROSE.items() if HOLDERS.search(text)}
    assert not [name for name in found if not name.startswith(ABOUT_HOLDERS)]


def retired_names(text):
    """Returns the names in code that have a retired word as one of their words."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        for field in ("name", "id", "attr", "arg"):
            names.add(getattr(node, field, None))
    split = {n: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", n) for n in names if type(n) is str}
    word = rf"(?i)(^|_){RETIRED_NAMES.pattern}(_|$)"
    return {name for name, words in split.items() if re.search(word, words)}


def test_names_in_the_heart_of_the_code_are_the_terms_of_the_field():
    package = ROOT / "split_lightning"
    files = [*package.glob("*.py")]
    files += [path for folder in HEART for path in (package / folder).glob("*.py")]
    found = {path.name: retired_names(path.read_text()) for path in files}
    assert not {name: own for name, own in found.items() if own}
    text = "class HandedIn:\n    def entering_owner(self, place, displaced): self.kind"
    assert retired_names(text) == {"HandedIn", "entering_owner", "place"}


def test_what_is_checked_is_prose():
    text = '"""Module of pieces."""\nowner = 1  # who\nprint(f"goes {owner} on")\n'
    found = "\n".join(python_prose(text))

    assert uses(r"pieces?\b", [], found)
    assert uses(r"who(ever|m)?\b", [], found)
    assert not uses(r"own(er|ers|s|ed)\b", [], found)
    assert not uses(r"crossed\b", ["has crossed"], "it has crossed")
