"""A trained network in formats that work without this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from split_lightning.message import as_values
from split_lightning.models.logits import logits_in
from split_lightning.models.segment import Segment
from split_lightning.models.stage import Stage
from split_lightning.runs.artifacts import save_tensors
from split_lightning.topologies.client_network import ClientSegment

# The largest difference from the logits of the run, in units of the largest logit
# (or 1): another runtime rounds in another way.
TOLERANCE = 1e-4
_LARGEST_FILE = 2**31 - 2**20  # of the format of ONNX; above, weights lie beside

Runner: TypeAlias = Callable[..., Any]


class Exporter:
    """Writes a network that was cut, and checks what is read back.

    Args:
        stages: What computes, by name, in the order in which it runs.
        images: Normalised samples `(B, C, ...)`, or ids, at least 3, on which to check.
        about: What a user of the files must know; goes into each of them.

    Attributes:
        expected: The logits of the segments, `(B, K)`.
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        images: Tensor,
        about: Mapping[str, Any],
    ) -> None:
        self.stages = {
            name: stage.cpu().float().eval().to(memory_format=torch.contiguous_format)
            for name, stage in stages.items()
        }
        is_float = images.is_floating_point()
        self.images = (images.float() if is_float else images).contiguous()
        self.about = {key: json.dumps(value) for key, value in about.items()}
        self.expected = self._logits(list(self.stages.values()))

    def export_weights(self, network: nn.Module, folder: Path) -> float:
        """Writes the weights of the unsplit network to `network.safetensors`.

        Args:
            network: The unsplit network, which reads them back.
            folder: Where to write.

        Returns:
            The largest difference from the logits of the segments.
        """
        file = folder / "network.safetensors"
        merged: dict[str, Tensor] = {}
        for stage in self.stages.values():
            for segment in getattr(stage, "segments", [stage]):
                merged |= segment.state_dict()
        own = {k: v.clone().contiguous() for k, v in merged.items()}
        save_tensors(own, file, self.about)
        network.load_state_dict(load_file(file))
        return self._check([network.eval()], [file])

    def export_programs(self, folder: Path) -> float:
        """Writes each segment by torch.export, to `client.pt2` and so on.

        Returns:
            The largest difference from the logits of the segments.
        """
        files = [folder / f"{name}.pt2" for name in self.stages]
        for file, program in zip(files, self._programs(), strict=True):
            torch.export.save(
                program, file, extra_files={"about": json.dumps(self.about)}
            )
        return self._check([torch.export.load(file).module() for file in files], files)

    def export_onnx(self, folder: Path) -> float:
        """Writes each segment as ONNX, to `client.onnx` and so on.

        Returns:
            The largest difference from the logits of the segments, in onnxruntime.

        Raises:
            ImportError: If a package that this needs is missing.
            ValueError: If torch cannot express a segment in ONNX.
        """
        require_onnx()
        files = [folder / f"{name}.onnx" for name in self.stages]
        names = [["images"], *self._crossing_names(), ["logits"]]
        for file, program, (inputs, outputs) in zip(
            files, self._programs(), pairwise(names), strict=True
        ):
            self._write_onnx(program, file, inputs, outputs)
        return self._check([_onnx_runner(file) for file in files], files)

    def _write_onnx(
        self,
        program: ExportedProgram,
        file: Path,
        inputs: list[str],
        outputs: list[str],
    ) -> None:
        try:
            written = torch.onnx.export(
                program,
                input_names=inputs,
                output_names=outputs,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # torch's exporter raises almost anything
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(
                f"torch cannot express the {file.stem} segment in ONNX: {reason}. Cut "
                "the network after another layer, or use format=torch."
            ) from error
        assert written is not None
        written.model.metadata_props.update(self.about)
        size = sum(t.nbytes for t in program.state_dict.values())
        written.save(str(file), external_data=size > _LARGEST_FILE)

    def _programs(self) -> list[ExportedProgram]:
        """Returns the segments as programs whose batch size is free.

        What changes with the number of images is found by running two and three.
        """
        programs = []
        two, three = (self.images[:2],), (self.images[:3],)
        for segment in self.stages.values():
            free: Any = tuple(map(_free, two, three))
            if isinstance(segment, ClientSegment | Segment | Stage):
                free = (free,)  # of `*inputs`, which is one argument
            with torch.no_grad():
                programs.append(
                    torch.export.export(segment, two, dynamic_shapes=free, strict=False)
                )
                two, three = as_values(segment(*two)), as_values(segment(*three))
        return programs

    def _crossing_names(self) -> list[list[str]]:
        """Returns the names of what crosses each cut."""
        names: list[list[str]] = []
        values: tuple[Any, ...] = (self.images[:1],)
        for segment in list(self.stages.values())[:-1]:
            with torch.no_grad():
                values = as_values(segment(*values))
            crosses = f"smashed_at_cut_{len(names) + 1}" if names else "smashed"
            several = [f"{crosses}_{i}" for i in range(len(values))]
            names.append(several if len(values) > 1 else [crosses])
        return names

    def _logits(self, runners: Sequence[Runner]) -> Tensor:
        """Returns the logits of the images, in batches of two sizes."""
        with torch.no_grad():
            batches = (self.images[:1], self.images[1:])
            return torch.cat([_run(runners, images) for images in batches])

    def _check(self, runners: Sequence[Runner], files: Sequence[Path]) -> float:
        """Returns the largest difference; takes the files away if it is too large."""
        largest = float((self._logits(runners) - self.expected).abs().max())
        allowed = TOLERANCE * max(1.0, self.expected.abs().max().item())
        if not largest <= allowed:  # nor is NaN
            for file in files:
                file.unlink()
            raise ValueError(
                f"Expected {', '.join(f.name for f in files)} to give the logits of "
                f"the run to within {allowed:.1e}, but they are {largest:.1e} off. "
                "They were taken away again."
            )
        return largest


def require_onnx() -> None:
    """Stops where a package that exporting to ONNX needs is missing.

    Raises:
        ImportError: Names the package, and how to install it.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise ImportError(
                f"format=onnx needs the package {package}, which is not installed: "
                'pip install "split-lightning[export]".'
            )


def _run(runners: Sequence[Runner], images: Tensor) -> Tensor:
    """Returns the logits of segments that run one after the other."""
    values: tuple[Any, ...] = (images,)
    for runner in runners:
        values = as_values(logits_in(runner(*values)))
    logits: Tensor = values[0]
    return logits


def _onnx_runner(file: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        arrays = [value.numpy() for value in values]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return tuple(map(torch.as_tensor, found))

    return run


def _free(two: Any, three: Any) -> Any:
    """Returns the dimensions that depend on the number of images, for torch.export."""
    if isinstance(two, Tensor):
        sizes = zip(two.shape, three.shape, strict=True)
        return {i: torch.export.Dim.AUTO for i, (m, n) in enumerate(sizes) if m != n}
    return torch.export.Dim.AUTO if two != three else None
