"""The package's modules import in one direction; only the command line knows Hydra.

A class that others inherit from is abstract, and inherits from no other of the package.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "split_lightning"
# From the top: a module imports modules of its own layer and of those below.
LAYERS = [
    {
        "train", "evaluate", "export", "compare", "cuts", "plan", "certificates",
        "server", "client",
    },
    {"cli"},
    {"runs"},
    {"module"},
    {"training"},
    {"callbacks"},
    {"data"},
    {"protocols"},
    {"engines"},
    {"step"},
    {"party", "observers"},
    {"batch_norm", "task", "topologies", "system"},
    {"channel", "coders", "models", "spill", "store"},
    {
        "credentials", "digests", "engine_options", "finite", "losses", "message",
        "paths", "pending", "placement", "processes", "random_state", "running_mean",
        "seeding", "signals", "typed_words", "user_code",
    },
    {"", "quiet"},  # the package itself: its version
]  # fmt: skip
MAY_IMPORT = {"hydra": {"cli"}, "omegaconf": {"cli", "runs"}}
# What imports a module by its name, which these tests do not follow: public names of
# the package and of `runs`, when they are first used; modules of a pickled network.
BY_NAME = {"", "runs", "models.code"}
# A checkpoint of the command line says how Hydra builds its module.
EXCEPTIONS = {("training.loading", "hydra")}


class Imports(ast.NodeVisitor):
    """Collects the modules that a file imports, in functions too, but not for types."""

    def __init__(self, module, modules):
        self.module = module
        self.modules = modules
        self.found = set()

    def visit_If(self, node):
        names = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.test)}
        for child in node.orelse if "TYPE_CHECKING" in names else node.body:
            self.visit(child)
        if "TYPE_CHECKING" not in names:
            for child in node.orelse:
                self.visit(child)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        assert node.level == 0, f"{self.module}: imports name the package"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            self.found.add(full if full in self.modules else node.module)


def imports_of(folder):
    """Returns what each module of a package imports, by full names."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in files.items():
        imports = Imports(module, files)
        imports.visit(ast.parse(path.read_text()))
        graph[module] = imports.found
    return graph


GRAPH = imports_of(ROOT / PACKAGE)


def short(module):
    """Returns a module's name within the package, or that of another package."""
    first, _, rest = module.partition(".")
    return rest if first == PACKAGE else first


def layer_of(name):
    first = name.partition(".")[0]
    (found,) = (i for i, layer in enumerate(LAYERS) if first in layer)
    return found


def breaches(graph):
    """Returns the imports that go up, or that are of a package out of place."""
    found = set()
    for module, imported in graph.items():
        own = short(module)
        for other in imported:
            name = short(other)
            if other.partition(".")[0] == PACKAGE:
                is_wrong = layer_of(name) < layer_of(own)
            else:
                places = MAY_IMPORT.get(name)
                is_wrong = places is not None and own.partition(".")[0] not in places
            if is_wrong:
                found.add((own, name))
    return found


def cycle_in(graph):
    """Returns modules that import each other in a circle; empty where none do."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other():
    assert not cycle_in(GRAPH)


def test_imports_go_down_and_hydra_is_the_command_lines():
    assert sorted(breaches(GRAPH) - EXCEPTIONS) == []


def test_every_exception_is_needed():
    assert sorted(EXCEPTIONS - breaches(GRAPH)) == []


def test_few_modules_import_others_by_name():
    assert {short(m) for m, found in GRAPH.items() if "importlib" in found} == BY_NAME


def test_every_layer_names_what_there_is():
    there = {short(module).partition(".")[0] for module in GRAPH}
    assert set().union(*LAYERS) == there


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"data/a": "import split_lightning.runs.b", "runs/b": ""}, "runs.b"),
        ({"data/a": "from split_lightning.runs import b", "runs/b": ""}, "runs.b"),
        ({"data/a": "def f():\n    from split_lightning import cli", "cli/b": ""}, ""),
        ({"data/a": "from hydra.utils import instantiate"}, "hydra"),
        ({"data/a": "import omegaconf.errors as e"}, "omegaconf"),
        ({"data/a": "if x:\n    pass\nelse:\n    import hydra"}, "hydra"),
        ({"data/a": "if TYPE_CHECKING:\n    import hydra"}, None),
        ({"data/a": "if typing.TYPE_CHECKING:\n    import omegaconf"}, None),
        ({"cli/a": "import hydra\nfrom split_lightning.data import b"}, None),
        ({"runs/a": "import omegaconf"}, None),
    ],
)
def test_what_is_wrong_is_found(tmp_path, files, wrong):
    for name, text in files.items():
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    graph = imports_of(tmp_path / PACKAGE)
    expected = set() if wrong is None else {("data.a", wrong or "cli")}
    assert breaches(graph) == expected


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}}
    assert set(cycle_in(graph)) == {"a", "b", "c"}
    assert not cycle_in({"a": {"b", "c"}, "b": {"c"}})


def classes_of(folder):
    """Returns the classes of a package, by full names: definitions and base names."""
    names, found = {}, {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    own = f"{module}.{alias.asname or alias.name}"
                    names[own] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
                found[f"{module}.{node.name}"] = node, [f"{module}.{b}" for b in bases]

    def origin(name):
        return origin(names[name]) if name in names else name

    return {n: (node, [origin(b) for b in bases]) for n, (node, bases) in found.items()}


def is_abstract(node, bases):
    """Returns whether a class is a typing.Protocol, or an ABC with something to add."""
    marks = (mark for part in node.body for mark in getattr(part, "decorator_list", ()))
    is_abc = "abc.ABC" in bases and "abstractmethod" in map(ast.unparse, marks)
    return is_abc or "typing.Protocol" in bases


def heirs(classes):
    """Returns the classes that inherit from one that is not abstract, or has a base."""
    found = set()
    for name, (_, bases) in classes.items():
        for base in bases:
            if base in classes:
                above = classes[base][1]
                if not is_abstract(*classes[base]) or any(a in classes for a in above):
                    found.add(name)
    return found


def test_classes_inherit_from_abstract_ones_alone():
    assert heirs(classes_of(ROOT / PACKAGE)) == set()


def test_a_class_that_inherits_too_much_is_found(tmp_path):
    """Renamed, from the package itself, or by way of an abstract one."""
    splitfed = f"{PACKAGE}.protocols.splitfed"
    files = {
        "protocols/__init__": f"from {splitfed} import SplitFedV1",
        "protocols/base": (
            "from abc import ABC, abstractmethod\nclass Base(ABC):\n"
            "    @abstractmethod\n    def f(self): ...\n"
        ),
        "protocols/splitfed": (
            f"from {PACKAGE}.protocols.base import Base as B\n"
            "from abc import ABC, abstractmethod\n"
            "class SplitFedV1(B): ...\nclass Plain(ABC): ...\nclass A(Plain): ...\n"
            "class Middle(B, ABC):\n    @abstractmethod\n    def g(self): ...\n"
            "class C(Middle): ...\n"
        ),
        "mine": f"from {PACKAGE}.protocols import SplitFedV1\nclass D(SplitFedV1): ...",
    }
    for name, text in files.items():
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    wrong = {f"{splitfed}.A", f"{splitfed}.C", f"{PACKAGE}.mine.D"}
    assert heirs(classes_of(tmp_path / PACKAGE)) == wrong
