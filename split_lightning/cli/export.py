"""Exports a trained network: `python -m split_lightning.export run=FOLDER`.

Writes the unsplit network's weights as safetensors, and each segment by torch.export or
as ONNX; reads each back, and compares its logits on test images with the run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from split_lightning.cli.run_command import (
    Command,
    compose_run,
    ending_with_one_line,
    typed_words,
    with_run_key,
)

FORMATS = ("safetensors", "torch", "onnx")

COMMAND = Command(
    name="export",
    folder="export",
    keys={"checkpoint": None, "client": None, "format": ["safetensors"]},
    reads=(
        *(f"datamodule.{key}" for key in ("source", "mean", "std")),
        *(f"module.{key}" for key in ("network", "cut_layer", "num_classes")),
    ),
    help=f"""Writes a run's trained network in formats that need no split_lightning.

FOLDER              the run's folder, as the first word; or run=FOLDER, anywhere
format=FORMAT       safetensors: the unsplit network's weights (the default)
                    torch: each segment by torch.export, for any batch size
                    onnx: each segment as ONNX, for any batch size
                    several: format=[{",".join(FORMATS)}]
checkpoint=best     best, last, or a checkpoint's file, instead of the final weights
client=ID           the client whose network is written; needed where clients have
                    different networks
output_dir=FOLDER   where to write; default: export, in the run's folder
KEY=VALUE           changes the run's configuration: data.root=...""",
)


def main(words: Sequence[str] | None = None) -> None:
    """Exports a run, and prints the differences of the logits.

    Args:
        words: The typed words, such as `["run=runs/digits/...", "format=onnx"]`;
            `None`: from the command line.
    """
    words = with_run_key(typed_words(COMMAND) if words is None else words)
    with ending_with_one_line(words):
        cfg = compose_run(COMMAND, words)
        formats = _formats(cfg.format)
        from split_lightning.cli.rebuilding import export_run  # these are slow
        from split_lightning.runs.run_export import print_export

        found = export_run(cfg, cfg.run, formats, cfg.checkpoint, cfg.client)
        print_export(found, Path(cfg.output_dir))


def _formats(chosen: Any) -> list[str]:
    formats = [chosen] if isinstance(chosen, str) else list(chosen or [])
    if not formats or not set(formats) <= set(FORMATS):
        raise ValueError(
            f"Expected `format` to be of {', '.join(FORMATS)}, one or several as in "
            f"format=[torch,onnx], but got {chosen}."
        )
    return formats
