"""`Calls`: what the calls to a site must look like."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from split_lightning.engines.expected import require_like, require_optimizer_state
from split_lightning.engines.remote import Kept, SampleRef
from split_lightning.engines.site import Site
from split_lightning.engines.wire import FrameError
from split_lightning.message import role_of
from split_lightning.store import PARTS

# The arguments of each call, by kind.
_ARGUMENTS = {
    "forward": ("computing", "key", "values", "flag", "random"),
    "begin": ("computing", "key", "values"),
    "take_back": ("begun",),
    "labels": ("samples",),
    "loss": ("computing", "key", "targets", "weight", "scale"),
    "backward": ("computing", "key", "values"),
    "step": ("stepping", "options"),
    "discard": ("stepping",),
    "is_sound": ("stepping",),
    "read": ("party", "segment", "part"),
    "write": ("party", "segment", "part", "state"),
    "share": ("segment", "role", "part", "common"),
    "adopt": ("party", "segment", "part"),
    "evaluate": ("segment", "party", "values", "flag"),
    "score": ("last", "party", "values", "evaluated"),
    "keep": ("barrier",),
}
_PARTY = re.compile(r"(client|server)/\d{1,9}(\.\d{1,9})?")
_BARRIER = re.compile(r"\w[\w-]{0,99}")
_SETS = ("train", "val", "test")


class Calls:
    """Checks calls before a site carries them out.

    Args:
        site: The site.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._is: dict[str, Callable[[Any], bool]] = {
            "computing": self._is_computing,
            "key": _is_key,
            "values": self._are_values,
            "flag": lambda value: type(value) is bool,
            "random": lambda value: value is None or _is_random_state(value),
            "samples": _is_samples,
            "evaluated": lambda value: _is_samples(value) and value.part != "train",
            "targets": lambda value: isinstance(value, (SampleRef, Tensor)),
            "weight": lambda value: value is None or isinstance(value, Tensor),
            "scale": lambda value: type(value) in (int, float),
            "begun": self.site.has_begun,
            "stepping": self._are_stepping,
            "options": self._are_options,
            "party": _is_party,
            "segment": self._is_segment,
            "last": lambda value: self._is_segment(value) and self.site.is_last(value),
            "part": lambda value: value in PARTS,
            "role": lambda value: value in ("client", "server"),
            "state": lambda value: isinstance(value, dict),
            "common": lambda value: value is None or isinstance(value, dict),
            "barrier": is_barrier,
        }

    def check(self, method: Any, arguments: Any) -> None:
        """Stops where a call is none that a site carries out.

        Raises:
            FrameError: Says why.
        """
        if not isinstance(method, str) or method not in _ARGUMENTS:
            raise FrameError(f"there is no call {method!r:.80}")
        kinds = _ARGUMENTS[method]
        if not isinstance(arguments, tuple) or len(arguments) != len(kinds):
            raise FrameError(f"expected `{method}` to have {len(kinds)} arguments")
        for kind, value in zip(kinds, arguments, strict=True):
            if not self._is[kind](value):
                raise FrameError(
                    f"expected `{method}` to have an argument `{kind}`, but got "
                    f"{value!r:.80}"
                )
        if method in ("write", "share"):
            self._require_fit(*arguments)

    def names_segment(self, segment: Any = None, party: Any = None) -> bool:
        """Returns whether values name a segment that is here, and a party."""
        return self._is_segment(segment) and _is_party(party)

    def _require_fit(self, *arguments: Any) -> None:
        """Stops where a state is not that of its segment."""
        segment = next(value for value in arguments if type(value) is int)
        *_, part, state = arguments
        like = self.site.shapes.state(segment, part)
        if part == "optimizer" and state is not None:
            require_optimizer_state(state, like)
        elif state is not None:
            require_like(state, like, "the state")

    def _is_computing(self, value: Any) -> bool:
        placement = self.site.engine.placement
        if not _is_party(value) or role_of(value) != "client":
            return False
        clients = range(placement.num_clients)
        return any(value in placement.of(client) for client in clients)

    def _are_values(self, values: Any) -> bool:
        plain = (Tensor, SampleRef, bool, int, float, type(None))
        return isinstance(values, tuple) and all(
            self.site.has_kept(value.number)
            if isinstance(value, Kept)
            else isinstance(value, plain)
            for value in values
        )

    def _are_stepping(self, names: Any) -> bool:
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            return False
        return set(names) <= set(self.site.parties) and len(set(names)) == len(names)

    def _are_options(self, options: Any) -> bool:
        raw = self.site.engine.raw
        return isinstance(options, dict) and all(
            role in raw
            and isinstance(groups, list)
            and len(groups) == len(raw[role].param_groups)
            and all(
                isinstance(group, dict) and "params" not in group for group in groups
            )
            for role, groups in options.items()
        )

    def _is_segment(self, value: Any) -> bool:
        return type(value) is int and 0 <= value < len(self.site.engine.stores)


def is_barrier(value: Any) -> bool:
    """Returns whether a value names a barrier, and so a file."""
    return isinstance(value, str) and _BARRIER.fullmatch(value) is not None


def _is_party(value: Any) -> bool:
    return isinstance(value, str) and _PARTY.fullmatch(value) is not None


def _is_key(value: Any) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2
    return is_pair and all(type(n) is int and n >= 0 for n in value)


def _is_samples(value: Any) -> bool:
    return isinstance(value, SampleRef) and value.part in _SETS


def _is_random_state(value: Any) -> bool:
    own = torch.get_rng_state()
    if not isinstance(value, Tensor):
        return False
    return (value.dtype, value.shape) == (own.dtype, own.shape)
