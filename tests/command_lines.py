"""Command lines at random: real keys and options, changed as by mistakes in typing."""

import random
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from split_lightning.typed_words import key_value

CONF = Path(__file__).parent.parent / "conf"
# What is typed in place of a value, whatever the key.
VALUES = [
    "null", "", "0", "-1", "1", "2", "3.5", "1e400", "nan", "-inf", "true", "abc",
    "'a b'", "[]", "[1,2]", "[a", "{}", "{a:1}", "{a:1", "${seed}", "${nowhere}",
    "${seed", "${data}", "${.}", "${oc.env:NOWHERE}", "${nosuch:1}", "???", "=", "a=b",
    "1,2", "range(1,3)", "glob(*)", "choice(1,2)", "/nowhere", "~", "é", "\\", "\"",
    "999999999999999999999", "99999", "torch.nn.Linear", "os.system", "builtins.print",
]  # fmt: skip
TARGETS = [
    "torch.nn.Linear", "torch.nn.Lineal", "torch", "nowhere.Thing", "os.getcwd", "",
    "torch.optim.SGD", "split_lightning.models.DigitsCNN", "torch.nn.ReLU",
    "split_lightning.data.RoundRobinSchedule", "pytorch_lightning.Callback", "null",
    "builtins.dict", "3",
    "flwr_datasets.partitioner.DirichletPartitioner", "torch.nn..ReLU", ".", "torch:nn",
]  # fmt: skip
# Of tests/own_parts.py.
OWN = [
    "Right", "ReturnsTuple", "ReturnsDict", "Raises", "NeedsMore", "WrongShape",
    "number", "NotThere", "Branches", "Source", "SourceWithoutClasses",
    "SourceOfLists", "SourceThatRaises", "SourceOfOtherLengths",
]  # fmt: skip
FOLDERS = [
    "ünï", "x,y", "lr=0.1", "it's", "p(1)", "r[2]", "a b", 'say "hi"', "{b}", "$x",
    "#3", "back\\slash", "star*", "~t", "-x", "tail ", "/proc/nowhere",
]  # fmt: skip
FLAGS = ["--cfg", "--multirun", "-m", "--info", "--resolve", "--package", "--nosuch",
         "-x", "--config-name", "--config-name=nowhere", "--config-dir=/nowhere",
         "--hydra-help=1"]  # fmt: skip


@cache
def composed():
    """Returns all keys of the composed configuration, and all groups with options."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["output_dir=x"])
    plain = OmegaConf.to_container(cfg, resolve=False)
    groups = {}
    for file in CONF.rglob("*.yaml"):
        group = str(file.parent.relative_to(CONF))
        if group != ".":
            groups.setdefault(group, []).append(file.stem)
    return list(keys_with_values(plain)), groups


def keys_with_values(node, prefix=""):
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from keys_with_values(value, f"{prefix}{key}.")


class Typist:
    """Types command lines of one or two overrides, some right and most wrong."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.keys, self.groups = composed()

    def line(self):
        count = self.random.choice([1, 1, 1, 2])
        makers = [
            self.value, self.value, self.value, self.target, self.near_number,
            self.misspelled, self.group, self.group, self.deleted, self.added,
            self.broken, self.twice, self.inside, self.flag, self.own, self.folder,
        ]  # fmt: skip
        typed = []
        for _ in range(count):
            word = self.random.choice(makers)()
            typed += word if isinstance(word, list) else [word]
        return typed

    def key(self):
        return self.random.choice(self.keys)[0]

    def value(self):
        return f"{self.key()}={self.random.choice(VALUES)}"

    def near_number(self):
        numbers = [(k, v) for k, v in self.keys if isinstance(v, int | float)]
        key, value = self.random.choice(numbers)
        change = self.random.choice(["-{}", "{}1", "{}.5", "{}e3", "{}x", " {}", "0{}"])
        return f"{key}={change.format(value)}"

    def target(self):
        targets = [key for key, _ in self.keys if key.endswith("_target_")]
        return f"{self.random.choice(targets)}={self.random.choice(TARGETS)}"

    def misspelled(self):
        key, at = self.key(), self.random
        i = at.randrange(len(key))
        j = at.randrange(len(key))
        changed = at.choice([
            key[:i] + key[i + 1 :], key[:i] + key[i] + key[i:], key.upper(),
            key.replace(".", "/"), key.replace("_", "-"), key + ".", "." + key,
            key[:i] + "." + key[i:], key[:min(i, j)] + key[max(i, j):], key + "." + key,
        ])  # fmt: skip
        return f"{changed}={at.choice(['1', 'abc', 'null', *VALUES])}"

    def group(self):
        group = self.random.choice(
            [*self.groups, *self.groups, "modle", "data/x", "hydra"]
        )
        others = [option for options in self.groups.values() for option in options]
        options = self.groups.get(group, others)
        option = self.random.choice(
            [
                *options,
                self.random.choice(others),
                "nosuch",
                "null",
                "",
                "[]",
                "a,b",
                "../x",
            ]
        )
        mark = self.random.choice(["", "", "+", "++", "~"])
        return f"{mark}{group}={option}"

    def deleted(self):
        key = self.random.choice([self.key(), self.random.choice([*self.groups])])
        return f"~{key}" + self.random.choice(["", "", "=1", "=null"])

    def added(self):
        key, _ = self.random.choice(self.keys)
        name = self.random.choice(
            ["new", "_target_", "_args_", "_partial_", "_convert_"]
        )
        mark = self.random.choice(["+", "++"])
        where = self.random.choice([f"{key}.{name}", name, key, f"{key}@{name}"])
        return f"{mark}{where}={self.random.choice(VALUES)}"

    def broken(self):
        key, value = self.key(), self.random.choice(VALUES)
        forms = [
            "{k}", "{k}:{v}", "={v}", "{k}=={v}", "{k} = {v}", "+{k}", "+", "~", "=",
            "", "{k}={v}={v}", "'{k}={v}", "{k}=[{v}", "{k}={{{v}", "{k}[0]={v}",
            "{k}=${{{v}}}", "@{k}={v}", "{k}@={v}", "{k}={v} #", "{k}=({v})",
        ]  # fmt: skip
        return self.random.choice(forms).format(k=key, v=value)

    def twice(self):
        key = self.key()
        return [
            f"{key}={self.random.choice(VALUES)}",
            f"{key}={self.random.choice(VALUES)}",
        ]

    def inside(self):
        """A key below a plain value, or in a list."""
        tail = self.random.choice(
            [".a", "[0]", "[9]", ".0", ".a.b", "._target_", "[-1]"]
        )
        return f"{self.key()}{tail}={self.random.choice(VALUES)}"

    def own(self):
        """A network or a source of the user's own, most of them wrong."""
        key = self.random.choice(["model.network", "data.source"])
        name = self.random.choice(OWN)
        option = self.random.choice(["", "", ",size: 3", ",nosuch: 1", ",size: abc"])
        typed = [f"{key}={{_target_: own_parts.{name}{option}}}"]
        return typed + self.random.choice([[], ["model.cut_layer=0"], ["data.root=x"]])

    def folder(self):
        key = self.random.choice(
            ["hydra.run.dir", "ckpt_path", "spill_to", "data.root"]
        )
        name = self.random.choice(FOLDERS)
        return self.random.choice([f"{key}={name}", key_value(key, name)])

    def flag(self):
        return self.random.choice(FLAGS)
