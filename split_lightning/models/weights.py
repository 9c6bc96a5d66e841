"""Weights from elsewhere: into the unsplit network, before it is cut."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from split_lightning.paths import path_of
from split_lightning.typed_words import key_value, shell_line

NETWORKS = "networks"  # where a run keeps segments that differ between clients
_EXPORT = ("python", "-m", "split_lightning.export")
_LISTED = 4  # names in a message


def load_weights(
    network: nn.Module, weights: str | Path, weights_exclude: Sequence[str] = ()
) -> None:
    """Starts a network from weights that were saved.

    Nothing is unpickled. Where the weights do not fit, the network stays as it was.

    Args:
        network: The unsplit network.
        weights: A state dict of it as safetensors or from `torch.save`, or the folder
            of a run, whose segments are joined.
        weights_exclude: Layers that keep their random start, by their paths, such as
            `["fc"]` for another number of classes.

    Raises:
        ValueError: If there is no such file, it cannot be read, or keys are missing,
            unexpected or of another shape; names them and says what to do.

    Example::

        network = resnet18(num_classes=10)
        load_weights(network, "resnet18-f37072fd.pth", weights_exclude=["fc"])
        module = SplitLightningModule(network, "layer1", ...)
    """
    state = read_weights(weights)
    keys = [*state, *network.state_dict()]
    for layer in weights_exclude:
        if not any(_is_of(key, [layer]) for key in keys):
            raise ValueError(
                f"Expected argument `weights_exclude` to name layers of "
                f"{type(network).__name__}, but got {layer!r}."
            )
    for key in [key for key in state if _is_of(key, weights_exclude)]:
        del state[key]
    wrong = [
        d for d in differences(network, state) if not _is_of(d[0], weights_exclude)
    ]
    if wrong:
        raise ValueError(
            f"The weights in {weights} do not fit {type(network).__name__}: "
            f"{listed(text for _, text in wrong)}. {_remedy(network, state, wrong)}"
        )
    network.load_state_dict(state, strict=False)


def read_weights(weights: str | Path) -> OrderedDict[str, Tensor]:
    """Returns the state dict in a file, or that of the segments in a run's folder.

    Raises:
        ValueError: If there is no such file, or it cannot be read.
    """
    path = path_of(weights)
    if (path / NETWORKS).is_dir():
        raise ValueError(
            "Expected argument `weights` to have one network, but the clients of "
            f"{path} ended with networks of their own. Write one client's with "
            f"`{shell_line(*_EXPORT, key_value('run', path), 'client=ID')}`, and name "
            "that file."
        )
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            "Expected argument `weights` to be a file of weights (.safetensors, or "
            "saved by torch.save), or the folder of a run, which has such files, but "
            f"got {str(weights)!r}."
        )
    merged = read_state(files[0])
    for file in files[1:]:
        state = read_state(file)
        for key in state.keys() & merged.keys():
            if not torch.equal(state[key], merged[key]):
                raise ValueError(
                    f"Expected the files of weights in {path} to be the segments of "
                    f"one network, but `{key}` differs between {file.name} and the "
                    "others. Name one file."
                )
        merged.update(state)
    return merged


def read_state(file: Path) -> OrderedDict[str, Tensor]:
    """Returns the state dict in a file, on the CPU.

    Raises:
        ValueError: If it is damaged, not a state dict, or needs pickle.
    """
    if file.suffix == ".safetensors":
        try:
            return OrderedDict(load_file(file))
        except SafetensorError as error:
            raise ValueError(
                f"Expected {file} to be a whole safetensors file, but: {error}. It is "
                "torn, or of another kind: write it again."
            ) from error
    state = read_torch(file)
    if not isinstance(state, dict) or not _are_tensors(state):
        found = listed(map(str, state)) if isinstance(state, dict) else type(state)
        raise ValueError(
            f"Expected {file} to hold a state dict, names and tensors, but it holds "
            f"{found}. Save that alone: torch.save(network.state_dict(), FILE)."
        )
    return state if isinstance(state, OrderedDict) else OrderedDict(state)


def read_torch(file: Path) -> object:
    """Returns what `torch.save` wrote to a file, if that is tensors and plain values.

    Raises:
        ValueError: If it is damaged, not a state dict, or needs pickle.
    """
    try:
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"Expected {file} to hold tensors, saved by torch.save, but it cannot be "
            f"read without unpickling foreign objects: {reason}"
        ) from error
    return content


def differences(network: nn.Module, state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Returns the keys in which a state dict does not fit a network, and why not."""
    own = network.state_dict()
    shapes = {
        key: f"`{key}` is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    }
    fitting = copy.copy(state)  # with its layers' versions, an attribute
    for key in shapes:
        fitting[key] = own[key]
    # By torch's own rules, which fill in what older versions of a layer lacked.
    found = copy.deepcopy(network).load_state_dict(fitting, strict=False)
    missing = [(key, f"`{key}` is missing") for key in found.missing_keys]
    extra = [(key, f"`{key}` is not in the network") for key in found.unexpected_keys]
    return [*shapes.items(), *missing, *extra]


def listed(texts: Iterable[str]) -> str:
    """Returns the first few of some texts, and how many more there are.

    >>> listed("abcdef")
    'a, b, c, d and 2 more'
    """
    all_texts = list(texts)
    more = len(all_texts) - _LISTED
    return ", ".join(all_texts[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _remedy(
    network: nn.Module, state: dict[str, Tensor], wrong: list[tuple[str, str]]
) -> str:
    """Says what to do about weights that do not fit."""
    own = network.state_dict().keys()
    prefix = next(iter(state), "").partition(".")[0]
    if prefix and {f"{prefix}.{key}" for key in own} & state.keys():
        return f"Save them without the `{prefix}.` that is in front of each name."
    if not own & state.keys():
        return "These are the weights of another network."
    layers = sorted({key.rpartition(".")[0] or key for key, _ in wrong})
    return (
        "Layers that are to keep their random start are named with "
        f"weights_exclude=[{','.join(layers)}] (`model.weights_exclude` in a "
        "configuration)."
    )


def _is_of(key: str, layers: Sequence[str]) -> bool:
    return any(key == layer or key.startswith(f"{layer}.") for layer in layers)


def _are_tensors(state: dict[object, object]) -> bool:
    return all(isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items())
