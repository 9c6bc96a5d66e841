"""What a source may return, and the one line that refuses the rest."""

import numpy as np
import pytest
import torch
from conftest import RandomImages
from torch.utils.data import Dataset, Subset, TensorDataset

from split_lightning.data import Images, SplitDataModule

PIXELS = RandomImages().load(train=True)
LABELS = PIXELS.targets
FLOATS = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(120).view(60, 2)


class Source:
    """Returns what it was given, for both sets or for one."""

    def __init__(self, found, *test, classes=("a", "b", "c")):
        self.found, self.test = found, test[0] if test else found
        if classes is not None:
            self.classes = classes

    def load(self, train):
        return self.found if train else self.test


def inputs_of(found, **options):
    """Returns the test samples of a source in order, as the network gets them."""
    options = {"mean": (0.0,), "std": (1.0,), "batch_size": 60} | options
    data = SplitDataModule(Source(found), 2, **options)
    data.setup("fit")
    ((inputs, targets),) = data.test_dataloader()
    assert targets.dtype == torch.int64
    assert torch.equal(targets, LABELS)
    return inputs


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64"]
)
@pytest.mark.parametrize("shape", [(1, 6, 6), (6, 6), (1, 6, 3, 2)])
def test_integers_are_divided_by_the_largest_value_of_their_type(dtype, shape):
    largest = np.iinfo(dtype).max
    pixels = PIXELS.inputs.numpy().reshape(60, *shape)
    values = (pixels.astype(object) * int(largest) // 255).astype(dtype)
    inputs = inputs_of((values, LABELS), mean=(0.5,), std=(0.25,))
    expected = ((values.astype("float64") / largest) - 0.5) / 0.25
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "bool"])
@pytest.mark.parametrize("shape", [(1, 6, 6), (36,), (4, 9)])
def test_floats_and_booleans_are_taken_as_they_are(dtype, shape):
    values = (FLOATS * 3 - 1).view(60, *shape).to(getattr(torch, dtype))
    inputs = inputs_of((values, LABELS))
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, values.float())


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64"])
def test_integers_of_a_sequence_are_ids(dtype):
    inputs = inputs_of((IDS.to(getattr(torch, dtype)), LABELS), mean=(9.0,))
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs, IDS)


@pytest.mark.parametrize("shape", [(3, 12), (3, 2, 6), (3, 2, 3, 2), (3,)])
def test_means_are_of_the_channel_axis(shape):
    """Twelve samples in a batch or twelve values in a row: never those axes."""
    drawn = torch.Generator().manual_seed(1)
    values = torch.rand(60, *shape, generator=drawn)
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    data = SplitDataModule(Source((values, LABELS)), 5, mean=mean, std=std)
    data.setup("fit")
    inputs = [step.parts[0].inputs for step in data.train_dataloader()]
    rows = {row.numpy().tobytes() for row in torch.cat(inputs)}
    for channel in range(3):
        values[:, channel] = (values[:, channel] - mean[channel]) / std[channel]
    assert {row.numpy().tobytes() for row in values} >= rows
    assert len(rows) == sum(map(len, data.parts))


class Pairs(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        return FLOATS[index].numpy(), int(LABELS[index])


@pytest.mark.parametrize(
    "found",
    [
        Images(FLOATS, LABELS),
        [FLOATS.numpy(), LABELS.numpy()],
        (FLOATS.tolist(), LABELS.tolist()),
        (list(FLOATS), list(LABELS)),
        (FLOATS.numpy().astype(">f4"), LABELS.numpy().astype("uint8")),
        (FLOATS.clone().requires_grad_(), LABELS.to(torch.int32)),
        TensorDataset(FLOATS, LABELS),
        Subset(TensorDataset(FLOATS, LABELS), range(60)),
        Pairs(),
    ],
)
def test_arrays_lists_and_datasets_stand_for_tensors(found):
    torch.testing.assert_close(inputs_of(found), FLOATS)


def spoiled(number):
    values = FLOATS.clone()
    values[7, 0, 1, 2] = number
    return values


WRONG = {
    "no labels": (FLOATS, r"return `Images\(inputs, targets\)`.*of type Tensor"),
    "nothing": (None, r"return `Images\(inputs, targets\)`.*None"),
    "four": ((1, 2, 3, 4), "with 4 elements"),
    "too few labels": (
        (FLOATS, LABELS[:50]),
        r"as many .* labels as inputs \(60\).*50",
    ),
    "no samples": ((FLOATS[:0], LABELS[:0]), r"samples.*\(0, 1, 6, 6\)"),
    "no axis": ((FLOATS[:, 0, 0, 0], LABELS), r"shape \(N, \.\.\.\).*\(60,\)"),
    "NaN": ((spoiled(torch.nan), LABELS), "finite.*1 of 60 samples.*sample 7"),
    "infinity": ((spoiled(torch.inf), LABELS), "finite.*1 of 60 samples.*sample 7"),
    "complex": ((FLOATS.to(torch.complex64), LABELS), "real numbers.*complex64"),
    "sparse": ((FLOATS.to_sparse(), LABELS), "dense.*sparse"),
    "ragged": (([[1.0], [1.0, 2.0]] * 30, LABELS), "make one tensor.*one shape"),
    "words": ((np.array([["a"]] * 60), LABELS), "make one tensor"),
    "channels last": (
        (torch.rand(60, 8, 9, 3), LABELS),
        r"\(60, 8, 9, 3\).*permute\(0, 3, 1, 2\)",
    ),
    "pixels in a wide type": (
        (PIXELS.inputs.int(), LABELS),
        r"int32.*2,147,483,647.*up to 255.*uint8",
    ),
    "negative ids": ((IDS - 1, LABELS), "ids from 0.*-1.*floats"),
    "float labels": ((FLOATS, LABELS.float()), r"integers.*float32.*long\(\)"),
    "one-hot": (
        (FLOATS, torch.eye(3)[LABELS]),
        r"\(N,\).*\(60, 3\).*argmax\(dim=1\)",
    ),
    "a column of labels": ((FLOATS, LABELS[:, None]), r"\(60, 1\).*squeeze\(1\)"),
    "labels from 1": ((FLOATS, LABELS + 1), "from 0 to 2.*from 1 to 3.*Subtract 1"),
    "negative labels": ((FLOATS, LABELS - 1), "from 0 to 2.*from -1 to 1"),
    "a short column": ((FLOATS, LABELS, {"age": [1]}), "'age'.*60 .*1"),
    "a reserved column": ((FLOATS, LABELS, {"label": [1]}), "label.*index"),
    "no dict of columns": ((FLOATS, LABELS, [1]), "dict of lists.*list"),
    "a set of triples": (TensorDataset(FLOATS, LABELS, LABELS), "pairs"),
}


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_refused_at_setup(name, is_train):
    found, message = WRONG[name]
    right = (FLOATS, LABELS)
    source = Source(found, right) if is_train else Source(right, found)
    with pytest.raises(ValueError, match=message) as refused:
        SplitDataModule(source, 2).setup("fit")
    assert "Expected `data.source` to return" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "test", [torch.rand(60, 1, 6, 5), FLOATS.double(), torch.rand(60, 36)]
)
def test_sets_that_differ_are_refused(test):
    source = Source((FLOATS, LABELS), (test, LABELS))
    with pytest.raises(ValueError, match=r"`data.source`.*test inputs like.*1, 6, 6"):
        SplitDataModule(source, 2).setup("fit")


class WithoutArgument:
    classes = ("a", "b")

    def load(self):
        raise AssertionError("not called")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((FLOATS, LABELS), r"method `load\(train\)`.*tuple"),
        (WithoutArgument(), r"method `load\(train\)`.*WithoutArgument"),
        (Source((FLOATS, LABELS), classes=None), "`classes`.*None.*such as"),
        (Source((FLOATS, LABELS), classes="abc"), "`classes`.*'abc'"),
        (Source((FLOATS, LABELS), classes=3), "`classes`.*3"),
        (Source((FLOATS, LABELS * 0), classes=("a",)), "at least two names"),
    ],
)
def test_an_object_that_is_no_source_is_refused(source, message):
    with pytest.raises(
        ValueError, match=rf"Expected `data.source` to have .*{message}"
    ):
        SplitDataModule(source, 2).setup("fit")


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_of_other_channels_are_refused(name):
    data = SplitDataModule(RandomImages(shape=(3, 6, 6)), 2, **{name: (0.5, 0.5)})
    with pytest.raises(ValueError, match=rf"`data.{name}`.*each of 3.*but got 2"):
        data.setup("fit")


@pytest.mark.parametrize("classes", [["a", "b", "c"], range(3), np.array([1, 2, 3])])
def test_names_of_classes_may_be_anything_listed(classes):
    data = SplitDataModule(Source((FLOATS, LABELS), classes=classes), 2)
    data.setup("fit")
    assert data.classes == tuple(map(str, classes))
    assert data.label_counts.shape == (2, 3)


def test_a_class_may_have_no_sample():
    data = SplitDataModule(Source((FLOATS, LABELS), classes=tuple("abcd")), 2)
    data.setup("fit")
    assert data.label_counts[:, 3].tolist() == [0, 0]
