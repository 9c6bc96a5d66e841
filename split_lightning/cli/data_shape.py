"""The shape of the data: configured, and that of the source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from split_lightning.cli.config_keys import options_of, used_keys

if TYPE_CHECKING:
    from split_lightning.data.datamodule import SplitDataModule

# null: as the source has them.
SHAPE_KEYS = ("data.num_classes", "data.in_channels", "data.image_size")
# What functions with `**options` (torchvision's) take.
_ALWAYS = ("num_classes",)


def leave_out_shape(cfg: DictConfig) -> None:
    """Leaves keys of the shape out of the network's options if it takes no such option.

    A function with `**options` gets `num_classes` alone. An option that is null
    (`model.network.num_classes=null`) is left out, too.

    Args:
        cfg: The composed configuration; changed in place.

    Raises:
        ValueError: If the network's `_target_` cannot be imported.
    """
    network = cfg.model.network
    target = network.get("_target_") if OmegaConf.is_dict(network) else None
    if not isinstance(target, str) or OmegaConf.is_missing(network, "_target_"):
        return
    try:
        taken = options_of(target)
    except (AttributeError, ImportError, ValueError):
        return  # `check` says so
    plain: Any = OmegaConf.to_container(network, resolve=False)
    with open_dict(network):
        for key in SHAPE_KEYS:
            name = key.rpartition(".")[2]
            given = plain.get(name, "")
            is_passed_on = given == f"${{{key}}}"
            is_taken = name in (_ALWAYS if taken is None else taken)
            if given is None or (is_passed_on and not is_taken):
                del network[name]


def is_open(cfg: DictConfig) -> bool:
    """Returns whether a configuration leaves the shape to the source."""
    return any(OmegaConf.select(cfg, key) is None for key in SHAPE_KEYS)


def fill_in(cfg: DictConfig, data: SplitDataModule) -> None:
    """Fills the shape in where a configuration leaves it open.

    Args:
        cfg: The composed configuration; changed in place.
        data: The data, set up.

    Raises:
        ValueError: If a key is not as the source has it, or images that are to have one
            size are not square.
    """
    shape = tuple(data.example().shape[1:])
    sizes = set(shape[1:]) or {1}  # a row of a table is a pixel of many channels
    found = {
        "data.num_classes": len(data.classes),
        "data.in_channels": shape[0],
        "data.image_size": sizes.pop() if len(sizes) == 1 else None,
    }
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    used = used_keys(plain)
    for key, value in found.items():
        given = OmegaConf.select(cfg, key)
        if given is None and value is None and key in used:
            raise ValueError(
                f"Expected `data.source` to have samples whose sides are of one length,"
                f" since `{key}` is used, but got shape {shape}. Use a network and an "
                f"augmentation without it (`model.network.image_size=null`)."
            )
        if given is None:
            OmegaConf.update(cfg, key, value)
        elif value is not None and given != value:
            raise ValueError(
                f"Expected `{key}` to be {value}, as `data.source` has it, but got "
                f"{given}. Set it to null, or use data=custom, to take it from the "
                "source."
            )
