"""`Expected`: what a site's replies must look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from split_lightning.engines.remote import Call, Kept, SampleRef
from split_lightning.engines.shapes import Shapes, without_numbers
from split_lightning.engines.wire import FrameError
from split_lightning.message import Values
from split_lightning.party import Key
from split_lightning.store import Part, State

_LOSS = torch.empty((), device="meta")  # stands for a number of any floating type
_COUNT = int  # stands for a whole number


class Some(NamedTuple):
    """Stands for a tensor with some of the rows of another, or with all of them."""

    like: Tensor


class Reply(NamedTuple):
    """What a reply must look like.

    Attributes:
        like: A value of the same structure, whose tensors have no numbers.
        take: Looks at the numbers of a value with this structure; takes notice of what
            stays at the site. Raises a `FrameError`, and then has changed nothing.
    """

    like: Any
    take: Callable[[Any], Any] = lambda value: None

    def accept(self, value: Any) -> None:
        """Takes a reply.

        Raises:
            FrameError: If it does not fit; says why. Nothing has changed then.
        """
        require_like(value, self.like)
        self.take(value)


class Expected:
    """Knows what one site must reply, from the calls to it.

    Args:
        shapes: What segments return, and their states look like.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._kept: dict[int, Any] = {}  # what stays at the site, by number
        # What came to a segment whose backward pass is still to come, by party.
        self._inputs: dict[tuple[str, Key], Values] = {}
        self._of: dict[str, Callable[..., Reply]] = {
            "forward": self._forward,
            "begin": self._begin,
            "take_back": lambda name: self._step([name]),
            "loss": self._loss,
            "backward": self._backward,
            "step": self._step,
            "discard": self._step,
            "is_sound": lambda names: Reply(bool),
            "labels": self._labels,
            "read": self._read,
            "evaluate": self._evaluate,
            "score": self._score,
        }

    def reply_to(self, call: Call) -> Reply:
        """Returns what the reply to a call must look like."""
        if call.method not in self._of:
            return Reply(None)
        return self._of[call.method](*call.arguments)

    # Training

    def _forward(
        self, name: str, key: Key, values: Values, stays: bool, random: Tensor | None
    ) -> Reply:
        inputs = self._inputs[name, key] = tuple(map(self._like, values))
        segment = self._segment_of(name, key[1])
        outputs: Values = ()  # those of the last segment stay where the loss is
        if key[1] < self.shapes.engine.num_depths - 1:
            outputs = self.shapes.outputs(segment, inputs)
        sent = self._sent(segment, outputs, stays)

        def take(reply: Any) -> None:
            if reply[1] is not None:
                _require_random_state(reply[1])
            sent.take(reply[0])

        return Reply((sent.like, random), take)

    def _begin(self, name: str, key: Key, values: Values) -> Reply:
        sent = self._forward(name, key, values, stays=False, random=None)
        return Reply(sent.like[0], lambda reply: sent.take((reply, None)))

    def _loss(self, name: str, key: Key, *unused: Any) -> Reply:
        gradients = self._gradients(name, key)
        take = gradients.take
        return Reply((_LOSS, _LOSS, gradients.like), lambda reply: take(reply[2]))

    def _backward(self, name: str, key: Key, *unused: Any) -> Reply:
        if key[1] > 0:
            return self._gradients(name, key)
        self._inputs.pop((name, key))
        return Reply(())

    def _gradients(self, name: str, key: Key) -> Reply:
        """Returns what gradients of what came to a segment must look like."""
        inputs = self._inputs.pop((name, key))
        own = tuple(
            v.detach() if isinstance(v, Tensor) and v.requires_grad else None
            for v in inputs
        )
        before = key[1] > 0 and self.shapes.segment_of(name, key[1] - 1) is not None
        return self._kept_or(own) if before else Reply(own)

    def _step(self, names: Sequence[str], options: Any = None) -> Reply:
        """Forgets what came to segments of parties whose step ends."""
        for name, key in list(self._inputs):
            if name in names:
                del self._inputs[name, key]
        return Reply(None)

    def _labels(self, samples: SampleRef) -> Reply:
        num_classes = self.shapes.engine.task.num_classes

        def take(reply: Any) -> None:
            (labels,) = reply
            if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
                raise FrameError(
                    f"expected labels from 0 to {num_classes - 1}, but got some from "
                    f"{labels.min()} to {labels.max()}"
                )

        like = torch.empty(len(samples), dtype=torch.int64, device="meta")
        return Reply((like,), take)

    # States

    def _read(self, party: str, segment: int, part: Part) -> Reply:
        like = self.shapes.state(segment, part)
        if part != "optimizer":
            return Reply(like)
        return Reply(dict, lambda state: require_optimizer_state(state, like))

    # Evaluation

    def _evaluate(self, segment: int, party: str, values: Values, stays: bool) -> Reply:
        inputs = tuple(map(self._like, values))
        outputs = self.shapes.outputs(segment, inputs, training=False)
        return self._sent(segment, outputs, stays)

    def _score(
        self, segment: int, party: str, values: Values, samples: SampleRef
    ) -> Reply:
        total = len(samples)

        def take(reply: Any) -> None:
            if not 0 <= reply[1] <= total:
                raise FrameError(
                    f"expected from 0 to {total} samples to be right, but got "
                    f"{reply[1]}"
                )

        return Reply((_LOSS, _COUNT, total), take)

    # Values

    def _segment_of(self, name: str, depth: int) -> int:
        segment = self.shapes.segment_of(name, depth)
        assert segment is not None
        return segment

    def _like(self, value: Any) -> Any:
        """Returns what stands for others without numbers."""
        if isinstance(value, SampleRef):
            return self.shapes.inputs(len(value))
        if isinstance(value, Kept):
            return self._kept.get(value.number)
        return without_numbers(value)

    def _sent(self, segment: int, outputs: Values, stays: bool) -> Reply:
        """Returns what a segment's outputs must look like."""
        if stays:
            return self._kept_or(outputs)
        if not outputs or not self.shapes.may_lack(segment):
            return Reply(outputs)
        return Reply((Some(outputs[0]), *outputs[1:]), _require_rows)

    def _kept_or(self, values: Values) -> Reply:
        """Returns what stands for values that stay at the site must look like."""

        def take(reply: Any) -> None:
            numbers = (kept.number for kept in reply)
            self._kept |= zip(numbers, values, strict=True)

        return Reply(tuple(Kept for _ in values), take)


def require_like(value: Any, like: Any, where: str = "its value") -> None:
    """Stops where a value has another structure, or tensors of other kinds.

    Args:
        value: The value.
        like: A value of the structure, or a class for any of its objects.
        where: What the value is.

    Raises:
        FrameError: Says what was expected, and what came.
    """
    if isinstance(like, Some):
        _require_some(value, like.like, where)
    elif isinstance(like, Tensor):
        if not _is_like(value, like):
            raise _unfit(where, _described(like), value)
    elif isinstance(like, type):
        if type(value) is not like:
            raise _unfit(where, f"a {like.__name__}", value)
    elif isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            raise _unfit(where, _described(like), value)
        for key, own in like.items():
            require_like(value[key], own, f"`{key}`")
    elif isinstance(like, (list, tuple)):
        kind = list if isinstance(like, list) else tuple
        if type(value) is not kind or len(value) != len(like):
            raise _unfit(where, _described(like), value)
        for number, own in enumerate(like):
            require_like(value[number], own, f"value {number + 1} of {len(like)}")
    elif type(value) is not type(like) or value != like:
        raise _unfit(where, repr(like), value)


def require_optimizer_state(state: Any, like: State) -> None:
    """Stops where an optimizer's state has other entries than after a step.

    A parameter that was never stepped has none.

    Raises:
        FrameError: Says what was expected, and what came.
    """
    if not isinstance(state, dict) or not state.keys() <= like.keys():
        raise _unfit("the state", _described(like), state)
    for name, own in state.items():
        if not isinstance(own, dict) or own.keys() != like[name].keys():
            raise _unfit(f"`{name}`", _described(like[name]), own)
        for key, value in own.items():
            due = like[name][key]
            kind = due if isinstance(due, Tensor) else type(due)
            require_like(value, kind, f"`{name}/{key}`")


def _is_like(value: Any, like: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return False
    if like is _LOSS:
        return value.ndim == 0 and value.is_floating_point()
    kinds = [(t.shape, t.dtype, t.requires_grad) for t in (value, like)]
    return kinds[0] == kinds[1]


def _require_some(value: Any, like: Tensor, where: str) -> None:
    is_like = (
        isinstance(value, Tensor)
        and (value.ndim, value.dtype) == (like.ndim, like.dtype)
        and value.shape[1:] == like.shape[1:]
        and len(value) <= len(like)
    )
    if not is_like:
        raise _unfit(where, f"at most {_described(like)}", value)


def _require_rows(values: Any) -> None:
    """Stops where a party sends other rows than it says that it has."""
    sent, has = values
    if len(sent) != int(has.sum()):
        raise FrameError(
            f"expected a row for each of {int(has.sum())} samples that the party "
            f"has, but got {len(sent)}"
        )


def _require_random_state(state: Tensor) -> None:
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise FrameError(f"its random state cannot be used: {error}") from error


def _unfit(where: str, expected: str, value: Any) -> FrameError:
    return FrameError(f"expected {where} to be {expected}, but got {_described(value)}")


def _described(value: Any) -> str:
    """Returns a value in a few words."""
    if isinstance(value, Tensor):
        grad = " with a gradient" if value.requires_grad else ""
        return f"{value.dtype} of shape {tuple(value.shape)}{grad}"
    if isinstance(value, dict):
        return f"a dict of {len(value)} entries ({', '.join(value)[:200]})"
    if isinstance(value, (list, tuple)) and not isinstance(value, Kept):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.80}"
