"""Samples: what a source returns, checked once and turned into tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from split_lightning.data.scaling import stored
from split_lightning.data.sources import Images

_RESERVED = ("label", "index")  # columns that partitioners always get


def classes_of(source: Any) -> tuple[str, ...]:
    """Returns the names of a source's classes.

    Raises:
        ValueError: If there are none, or fewer than two.
    """
    found = getattr(source, "classes", None)
    if found is None or isinstance(found, str) or not hasattr(found, "__iter__"):
        _refuse(
            "have `classes`, a tuple of the classes' names",
            _named(found),
            'Set it in the class, such as `classes = ("cat", "dog")`.',
        )
    names = tuple(map(str, found))
    if len(names) < 2:
        _refuse("have `classes` with at least two names", names)
    return names


def load(source: Any, train: bool) -> Any:
    """Returns what a source loads, unchecked.

    Raises:
        ValueError: If it has no method `load(train)`.
    """
    if not _takes_train(getattr(source, "load", None)):
        _refuse("have a method `load(train)`", _named(source))
    return source.load(train=train)


def read_samples(source: Any, train: bool) -> Images:
    """Loads the training set or the test set of a source, and checks it.

    Args:
        source: An object with `classes` and `load(train)`.
        train: Which set.

    Returns:
        Inputs `(N, ...)` in the type in which they are held, labels (int64, `(N,)`),
        and the columns that partitioners may use, as lists.

    Raises:
        ValueError: Names `data.source`, what it should return and what it did.
    """
    part = "training" if train else "test"
    inputs, targets, columns = _fields(load(source, train), part)
    inputs = _checked_inputs(_tensor(inputs, f"{part} inputs"), part)
    targets = _checked_targets(_tensor(targets, f"{part} labels"), part)
    if len(inputs) != len(targets):
        _refuse(
            f"return as many {part} labels as inputs ({len(inputs):,})",
            f"{len(targets):,}",
        )
    _check_range(targets, len(classes_of(source)), part)
    return Images(stored(inputs), targets, _lists(columns, len(targets), part))


def check_alike(train: Images, test: Images) -> None:
    """Stops where test inputs differ from training inputs in shape or type.

    Raises:
        ValueError: Names `data.source` and both.
    """
    ours, theirs = (
        f"{x.inputs.dtype} of shape {tuple(x.inputs.shape[1:])}" for x in (train, test)
    )
    if ours != theirs:
        _refuse(f"return test inputs like the training inputs ({ours})", theirs)


def _refuse(expected: str, got: object, remedy: str = "") -> NoReturn:
    remedy = f" {remedy}" if remedy else ""
    raise ValueError(f"Expected `data.source` to {expected}, but got {got}.{remedy}")


def _named(value: object) -> str:
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def _takes_train(load: Any) -> bool:
    try:
        inspect.signature(load).bind(train=True)
    except TypeError:
        return False
    except ValueError:  # a builtin
        return True
    return True


def _fields(found: Any, part: str) -> tuple[Any, Any, Any]:
    """Returns the inputs, the labels and the columns of what `load` returned."""
    if isinstance(found, Dataset):
        return (*_pairs(found, part), None)
    if isinstance(found, tuple | list) and len(found) in (2, 3):
        return (*found, None) if len(found) == 2 else tuple(found)
    got = _named(found)
    if isinstance(found, tuple | list):
        got += f" with {len(found)} elements"
    _refuse(
        "return `Images(inputs, targets)` from `load(train)`, or a Dataset of such "
        "pairs",
        got,
    )


def _pairs(dataset: Any, part: str) -> tuple[list[Any], list[Any]]:
    """Returns the inputs and the labels of a map-style data set."""
    if not hasattr(dataset, "__len__"):
        _refuse(f"return a {part} Dataset that has a length", _named(dataset))
    items = [dataset[i] for i in range(len(dataset))]
    for item in items:
        if not (isinstance(item, tuple | list) and len(item) == 2):
            _refuse(f"return a {part} Dataset of pairs (input, label)", _named(item))
    return [x for x, _ in items], [y for _, y in items]


def _tensor(values: Any, what: str) -> Tensor:
    """Returns values as one dense tensor on the CPU."""
    try:
        if isinstance(values, Tensor):
            tensor = values
        elif isinstance(values, list | tuple) and any(
            isinstance(value, Tensor) for value in values
        ):
            tensor = torch.stack([torch.as_tensor(value) for value in values])
        else:
            array = np.asarray(values)
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except (RuntimeError, TypeError, ValueError) as error:
        _refuse(
            f"return {what} that make one tensor",
            f"{_named(values)} ({error})",
            "Give all samples one shape, as numbers.",
        )
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
        kind = f"{tensor.dtype}, {tensor.layout}"
        _refuse(f"return {what} as a dense tensor of real numbers", kind)
    return tensor.detach().cpu()


def _checked_inputs(inputs: Tensor, part: str) -> Tensor:
    shape = tuple(inputs.shape)
    if inputs.ndim < 2:
        _refuse(
            f"return {part} inputs of shape (N, ...): rows (N, D), sequences (N, L), "
            "signals (N, C, L), images (N, C, H, W)",
            f"shape {shape}",
        )
    if inputs.numel() == 0:
        _refuse(f"return {part} samples", f"inputs of shape {shape}")
    if _is_channels_last(shape):
        _refuse(
            f"return {part} images of shape (N, C, H, W)",
            f"shape {shape}",
            "Put the channels first: `inputs.permute(0, 3, 1, 2)`.",
        )
    if inputs.is_floating_point():
        sound = inputs.isfinite().flatten(1).all(dim=1)
        if not sound.all():
            unsound = (~sound).nonzero()[:, 0]
            _refuse(
                f"return finite {part} inputs",
                f"NaN or infinity in {len(unsound):,} of {len(inputs):,} samples (the "
                f"first is sample {int(unsound[0])})",
            )
    return inputs


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Returns whether a shape is that of images whose channels are the last axis."""
    if len(shape) != 4:
        return False
    _, height, width, last = shape
    are_images = min(height, width) >= 8
    return are_images and (last in (3, 4) or (last == 1 and height == width))


def _checked_targets(targets: Tensor, part: str) -> Tensor:
    shape = tuple(targets.shape)
    if targets.ndim != 1:
        remedies = "Use `labels.argmax(dim=1)` for one-hot labels."
        if targets.ndim == 2 and shape[1] == 1:
            remedies = "Use `labels.squeeze(1)`."
        _refuse(f"return {part} labels of shape (N,)", f"shape {shape}", remedies)
    if targets.is_floating_point():
        _refuse(
            f"return {part} labels that are integers",
            str(targets.dtype),
            "Use `labels.long()` if they are whole numbers.",
        )
    return targets.long()


def _check_range(targets: Tensor, num_classes: int, part: str) -> None:
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or most >= num_classes:
        _refuse(
            f"return {part} labels from 0 to {num_classes - 1}, since `classes` has "
            f"{num_classes} names",
            f"labels from {least} to {most}",
            "Subtract 1 from them." if (least, most) == (1, num_classes) else "",
        )


def _lists(columns: Any, count: int, part: str) -> dict[str, list[Any]]:
    """Returns columns as lists of plain values."""
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        _refuse(f"return {part} columns as a dict of lists", _named(columns))
    lists = {}
    for name, values in columns.items():
        plain = values.tolist() if hasattr(values, "tolist") else list(values)
        if name in _RESERVED:
            _refuse(f"return {part} columns other than {_RESERVED}", repr(name))
        if len(plain) != count:
            _refuse(
                f"return a column {name!r} with a value for each of {count:,} {part} "
                "samples",
                f"{len(plain):,}",
            )
        lists[str(name)] = plain
    return lists
