"""Operations as Python code, which can be pickled."""

from __future__ import annotations

import importlib
import linecache
from types import ModuleType
from typing import Any

from torch import fx


class Code:
    """The operations of a graph, as a function.

    Args:
        graph: The operations.

    Attributes:
        text: The function, as text.
    """

    def __init__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:  # else the code would ask later traces to wrap it
            node.meta.pop("is_wrapped", None)
        code = graph.python_code("self")
        self.text = str(code.src)
        self._names = dict(code.globals)
        self._function: Any = None

    def __call__(self, network: Any, *inputs: Any) -> Any:
        """Runs the operations with the layers of a network."""
        if self._function is None:
            names, file = dict(self._names), f"<split_lightning {id(self)}>"
            exec(compile(self.text, file, "exec"), names)
            self._function = names["forward"]
            # Error messages show the line; an entry without a time is kept.
            linecache.cache[file] = (
                len(self.text),
                None,
                self.text.splitlines(True),
                file,
            )
        return self._function(network, *inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A module itself cannot be pickled; its name can.
        modules = {k: v for k, v in self._names.items() if isinstance(v, ModuleType)}
        return {
            "text": self.text,
            "names": {k: v for k, v in self._names.items() if k not in modules},
            "modules": {name: module.__name__ for name, module in modules.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.text, self._function = state["text"], None
        imported = {k: importlib.import_module(v) for k, v in state["modules"].items()}
        self._names = {**state["names"], **imported}
