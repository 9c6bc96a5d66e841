"""Frames: calls and replies as bytes. Nothing is unpickled.

A frame is a header in JSON and a body of tensors in the safetensors format
(https://huggingface.co/docs/safetensors). The header has the kind of the frame, its
number, and its value as a tree, in which tensors stand by their numbers in the body.
"""

from __future__ import annotations

import json
import struct
from math import prod
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from split_lightning.engines.remote import Kept, SampleRef

_START = struct.Struct("!4sII")  # magic, bytes of the header, bytes of the body
_MAGIC = b"SPL1"
MAX_HEADER = 1 << 24  # bytes
_NAMES = (
    "part",
    "round",
    "client_id",
    "number",
    "pass_number",
    "start",
    "num_samples",
)
_MAX_DEPTH = 16  # of containers in containers
# What a frame has beside its tensors, at most: bytes of the frame itself, of a tensor,
# of another value, and of a character (a JSON string escapes some).
_OF_FRAME, _OF_TENSOR, _OF_VALUE, _OF_CHARACTER = 1024, 512, 64, 6


class FrameError(ValueError):
    """Bytes that are no frame."""


class Frame(NamedTuple):
    """What passes between a site and the process with the Trainer.

    Attributes:
        kind: Such as `call` or `reply`.
        number: The number of the call.
        value: Tensors, plain values and what stands for samples, in plain containers.
    """

    kind: str
    number: int
    value: Any


def encoded(frame: Frame) -> bytes:
    """Returns a frame as bytes."""
    tensors: dict[str, Tensor] = {}
    tree = _tree(frame.value, tensors)
    header = json.dumps([frame.kind, frame.number, tree]).encode()
    body = save(tensors) if tensors else b""
    return _START.pack(_MAGIC, len(header), len(body)) + header + body


def decoded(data: bytes) -> Frame:
    """Returns the frame that bytes are.

    Raises:
        FrameError: If they are none; says why.
    """
    if len(data) < _START.size:
        raise FrameError(f"a frame of {len(data)} bytes is too short")
    magic, header_size, body_size = _START.unpack_from(data)
    if magic != _MAGIC:
        raise FrameError("a frame begins with other bytes")
    if header_size > MAX_HEADER or len(data) != _START.size + header_size + body_size:
        raise FrameError("a frame has another size than it says")
    rest = memoryview(data)[_START.size :]
    try:
        kind, number, tree = json.loads(bytes(rest[:header_size]))
        tensors = load(bytes(rest[header_size:])) if body_size else {}
        value = _value(tree, tensors, 0)
        if tensors:
            raise ValueError("a tensor has no place in the value")
    except (
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise FrameError(f"a frame cannot be read: {error}") from error
    if not isinstance(kind, str) or type(number) is not int:
        raise FrameError("a frame has no kind or no number")
    return Frame(kind, number, value)


def most_bytes(value: Any) -> int:
    """Returns how large a frame with a value may be.

    >>> import torch
    >>> most_bytes(torch.zeros(1000))
    5536
    """
    return _OF_FRAME + _most_bytes(value)


def _most_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return _OF_TENSOR + value.numel() * value.element_size()
    if isinstance(value, dict):
        return _OF_VALUE + sum(_most_bytes(own) for own in value.items())
    if isinstance(value, (list, tuple)):
        return _OF_VALUE + sum(map(_most_bytes, value))
    if isinstance(value, str):
        return _OF_VALUE + _OF_CHARACTER * len(value)
    if isinstance(value, SampleRef):
        return (1 + len(_NAMES)) * _OF_VALUE
    return _OF_VALUE


def _tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns a value for JSON, and files its tensors."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _tensor_tree(value, tensors)
    if isinstance(value, SampleRef):
        return {"samples": [getattr(value, name) for name in _NAMES]}
    if isinstance(value, Kept):
        return {"kept": list(value)}
    if isinstance(value, dict):
        items = [[key, _tree(own, tensors)] for key, own in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        name = "list" if isinstance(value, list) else "tuple"
        return {name: [_tree(own, tensors) for own in value]}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _tensor_tree(value: Tensor, tensors: dict[str, Tensor]) -> Any:
    """Files the numbers of a tensor; the format does not keep its strides."""
    own = value.detach().cpu()
    order = sorted(range(own.ndim), key=lambda n: (-own.stride()[n], n))
    if not own.permute(order).is_contiguous():
        own, order = own.contiguous(), list(range(own.ndim))
    number, numbers = len(tensors), own.permute(order).flatten()
    memory = numbers.untyped_storage().data_ptr()
    if any(memory == t.untyped_storage().data_ptr() for t in tensors.values()):
        numbers = numbers.clone()  # the format has no two tensors of one memory
    tensors[str(number)] = numbers
    layout = [list(own.shape), list(own.stride())]
    return {"tensor": [number, *layout, value.requires_grad]}


def _value(tree: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """Returns the value of a tree."""
    if depth > _MAX_DEPTH:
        raise ValueError("too many containers in containers")
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    ((kind, own),) = tree.items()
    if kind == "tensor":
        return _tensor(tensors, *own)
    if kind == "samples":
        part, *numbers = own
        if len(numbers) != 6 or not _are_sizes(numbers):
            raise ValueError("samples are named by six numbers")
        return SampleRef(str(part), *numbers)
    if kind == "kept":
        number, requires_grad = own
        if not _are_sizes([number]):
            raise ValueError("what is kept is named by a number")
        return Kept(number, bool(requires_grad))
    if kind == "dict":
        return {str(k): _value(v, tensors, depth + 1) for k, v in own}
    if kind in ("list", "tuple"):
        values = [_value(v, tensors, depth + 1) for v in own]
        return values if kind == "list" else tuple(values)
    raise ValueError(f"there is no {kind!r}")


def _tensor(
    tensors: dict[str, Tensor], number: Any, shape: Any, strides: Any, grad: Any
) -> Tensor:
    """Takes a tensor, in its layout: dense, so that no two numbers share memory."""
    numbers = tensors.pop(str(number))
    if not _are_sizes(shape) or not _are_sizes(strides) or prod(shape) != len(numbers):
        raise ValueError("a tensor has another size than it says")
    due = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and len(numbers) and stride != due:
            raise ValueError("a tensor has another layout than a dense one")
        due *= size
    return numbers.as_strided(shape, strides).requires_grad_(grad)


def _are_sizes(values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
