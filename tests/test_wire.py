"""Frames: what is sent is what arrives, and no bytes from outside do harm."""

import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from split_lightning.engines.remote import Kept, SampleRef
from split_lightning.engines.wire import (
    Frame,
    FrameError,
    decoded,
    encoded,
    most_bytes,
)

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(-1, 1) | st.text("ab/")
TREES = st.recursive(
    PLAIN,
    lambda own: (
        st.lists(own, max_size=3)
        | st.lists(own, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab."), own, max_size=3)
    ),
    max_leaves=8,
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)


@given(TREES, st.integers(0, 2**40))
def test_plain_values_arrive(value, number):
    frame = Frame("call", number, value)
    assert decoded(encoded(frame)) == frame


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3),
    "a slice": lambda t: t[:, :, 1:, ::2],
    "expanded": lambda t: t[:1].expand(3, -1, -1, -1),
    "no dimension": lambda t: t[0, 0, 0, 0],
    "no numbers": lambda t: t[:0],
    "one channel": lambda t: t[:, :1].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_arrive_bit_for_bit_in_their_layout(layout, dtype):
    tensor = LAYOUTS[layout](torch.randn(2, 3, 4, 5).mul(9).to(dtype))
    is_dense = layout not in ("a slice", "expanded")
    tensor.requires_grad_(dtype.is_floating_point)
    arrived = decoded(encoded(Frame("reply", 1, (tensor, {"w": tensor})))).value[0]
    assert arrived.dtype == dtype
    assert torch.equal(arrived, tensor)
    assert arrived.requires_grad == dtype.is_floating_point
    if is_dense:  # the backward pass of some layers rounds by the layout
        assert arrived.stride() == tensor.stride()


def test_what_stands_for_others_arrives():
    value = [SampleRef("train", 1, 2, 3, 4, 5, 6), Kept(3, True)]
    assert decoded(encoded(Frame("call", 1, value))).value == value


def test_a_frame_has_the_bytes_of_its_tensors_and_a_header():
    tensor = torch.zeros(128, 64, 16, 16)
    assert 0 <= len(encoded(Frame("reply", 1, tensor))) - tensor.nbytes < 300


@given(TREES)
def test_a_header_has_a_limit(value):
    tensors = [torch.ones(2, 3, 4, 5), torch.zeros(0, 7), torch.tensor(1)]
    refs = [SampleRef("train", *[2**40] * 6), Kept(2**40, True)]
    frame = Frame("reply", 2**40, {"a" * 50: tensors, "b": [value, refs]})
    assert len(encoded(frame)) <= most_bytes(frame.value)


def test_what_cannot_be_sent_is_named():
    with pytest.raises(TypeError, match="a object cannot be sent"):
        encoded(Frame("call", 1, object()))


GOOD = encoded(Frame("reply", 7, (3, [torch.ones(2, 3), torch.arange(4)])))


@given(st.data())
def test_a_changed_frame_is_another_frame_or_none(data):
    """Bytes that are cut, added or changed: a `FrameError`, or plain values again."""
    at = data.draw(st.integers(0, len(GOOD) - 1))
    new = data.draw(st.binary(min_size=1, max_size=1))
    spoiled = data.draw(
        st.sampled_from(
            [GOOD[:at], GOOD[:at] + new + GOOD[at:], GOOD[:at] + new + GOOD[at + 1 :]]
        )
    )
    try:
        frame = decoded(spoiled)
    except FrameError:
        return
    encoded(frame)  # values that can be sent, and so nothing else


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data):
    with pytest.raises(FrameError):
        decoded(data)


def framed(tree, body=b"", kind="call", number=1):
    header = json.dumps([kind, number, tree]).encode()
    return struct.pack("!4sII", b"SPL1", len(header), len(body)) + header + body


@pytest.mark.parametrize(
    "tree",
    [
        {"tensor": [0, [2], [1], False]},
        {"object": []},
        {"list": 3},
        {"list": [], "tuple": []},
        {"samples": ["train", 1, 2]},
        {"samples": ["train", 1, 2, 3, 4, 5, "6"]},
        {"samples": ["train", 1, 2, 3, 4, 5, -6]},
        {"kept": ["a", 1]},
        {"kept": [math.inf, True]},
        {"kept": [-1, True]},
        {"dict": [[1]]},
        [1],
    ],
)
def test_a_wrong_tree_is_refused(tree):
    with pytest.raises(FrameError, match="cannot be read"):
        decoded(framed(tree))


def test_a_frame_has_no_tensors_beside_its_value():
    body = save({"0": torch.ones(4), "1": torch.ones(4)})
    tree = {"tensor": [0, [4], [1], False]}
    with pytest.raises(FrameError, match="a tensor has no place in the value"):
        decoded(framed(tree, body))
    with pytest.raises(FrameError):  # nor one in two places
        decoded(framed({"list": [tree, tree]}, save({"0": torch.ones(4)})))


def test_lists_in_lists_have_a_limit():
    header = b"[" * 10**6
    start = struct.pack("!4sII", b"SPL1", len(header), 0)
    with pytest.raises(FrameError, match="cannot be read"):
        decoded(start + header)


def test_containers_in_containers_have_a_limit():
    tree = None
    for _ in range(99):
        tree = {"list": [tree]}
    with pytest.raises(FrameError, match="too many"):
        decoded(framed(tree))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ([3], [1]),
        ([2, 2], [9, 1]),
        ([2, 2], [1]),
        ([-1, -4], [1, 1]),
        ([4], [-1]),
        ([2, 2], [1, 1]),  # numbers of one place in memory
        ([2, 2], [0, 0]),
        ([1, 4], [2**70, 1]),
        ([10**12, "a"], [1, 1]),  # not a text of 10**12 letters
        ([4.0], [1]),
        ([True, 4], [4, 1]),
    ],
)
def test_a_tensor_does_not_reach_beyond_its_numbers(shape, strides):
    tree = {"tensor": [0, shape, strides, False]}
    with pytest.raises(FrameError):
        decoded(framed(tree, save({"0": torch.ones(4)})))
