"""Resumption with other options: new optimizers with the old states."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# By name, such as "client lr": plain values, which checkpoints keep.
Options: TypeAlias = dict[str, Any]
_ABSENT = object()


def describe(
    optimizers: Mapping[str, Optimizer],
    schedulers: Iterable[LRScheduler],
    interval: Literal["batch", "round"],
) -> Options:
    """Returns the classes and options of new optimizers and schedulers.

    Args:
        optimizers: By party.
        schedulers: Their learning-rate schedulers.
        interval: When schedulers step.
    """
    found: Options = {}
    for party, optimizer in optimizers.items():
        found[f"{party} optimizer"] = _plain(type(optimizer))
        for number, group in enumerate(optimizer.param_groups):
            which = f" of group {number}" if number else ""
            options = {k: v for k, v in group.items() if k != "params"}
            options["lr"] = options.pop("initial_lr", options["lr"])
            found |= {f"{party} {k}{which}": _plain(v) for k, v in options.items()}
    for scheduler in schedulers:
        party = next((k for k, o in optimizers.items() if o is scheduler.optimizer), "")
        found[f"{party} scheduler"] = _plain(type(scheduler))
        for name, value in scheduler.state_dict().items():
            found[f"{party} scheduler.{name}"] = _plain(value)
        found["scheduler_interval"] = interval
    return found


def _plain(value: Any) -> Any:
    """Returns a value in plain containers, so that two can be compared later."""
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def go_on(
    checkpoint: dict[str, Any],
    options: Options,
    optimizers: Mapping[str, Optimizer],
    schedulers: Sequence[LRScheduler],
) -> list[str]:
    """Gives a checkpoint the options of the new command.

    Optimizers keep their states. Schedules are the new ones, at the step that the run
    has reached. Where no option differs, nothing is changed.

    Args:
        checkpoint: The checkpoint, before Lightning restores optimizers from it.
        options: What `describe` returned for the optimizers and schedulers.
        optimizers: The new optimizers, by party.
        schedulers: Their new schedulers.

    Returns:
        What differs, in words.

    Raises:
        ValueError: If an optimizer is of another class, or could not continue from what
            the one before remembers, or a schedule is over.
    """
    before: Options = checkpoint.get("options", {})
    _require_same_kinds(before, options)
    if before == options:
        return []
    fitter = StateFitter(optimizers)
    pairs = list(zip(checkpoint["optimizer_states"], optimizers.values(), strict=True))
    for stored, optimizer in pairs:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [n for group in stored["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=False):
            if number in stored["state"]:
                state = fitter.fitted(parameter, stored["state"][number])
                stored["state"][number] = state
    _step(schedulers, _steps_so_far(checkpoint, before, options))
    for stored, optimizer in pairs:
        stored["param_groups"] = optimizer.state_dict()["param_groups"]
    checkpoint["lr_schedulers"] = [s.state_dict() for s in schedulers]
    return _differences(before, options)


def require_rounds(checkpoint: Mapping[str, Any], max_epochs: int | None) -> None:
    """Stops where a run would end before the round of its checkpoint.

    Raises:
        ValueError: Names the least number of rounds.
    """
    begun = int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"])
    if max_epochs not in (None, -1) and begun > max_epochs:
        raise ValueError(
            "Expected `max_epochs` of the Trainer (`rounds` in a configuration) to be "
            f"at least {begun}, as many rounds as the run of `ckpt_path` has begun, "
            f"but got {max_epochs}."
        )


def _require_same_kinds(before: Options, now: Options) -> None:
    for key, kind in now.items():
        party, _, name = key.partition(" ")
        earlier: Any = before.get(key, kind)
        if name == "optimizer" and earlier != kind:
            was, got = (text.rpartition(".")[2] for text in (earlier, kind))
            raise ValueError(
                f"Expected the {party}'s optimizer (`optimizer.{party}` in a "
                f"configuration) to be {was}, as in the run of `ckpt_path`, but got "
                f"{got}, which cannot use what {was} remembers. Choose {was}, or begin "
                "a new run from the weights alone (`model.weights=FOLDER`)."
            )


def _steps_so_far(
    checkpoint: Mapping[str, Any], before: Options, options: Options
) -> int:
    """Returns how often a scheduler has stepped in a run so far."""
    interval = options.get("scheduler_interval")
    stored = [s for s in checkpoint["lr_schedulers"] if "_step_count" in s]
    if stored and before.get("scheduler_interval") == interval:
        return int(stored[0]["_step_count"]) - 1  # the first makes it
    if interval == "batch":
        return int(checkpoint["global_step"])
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    return int(progress["current"]["processed"])


def _step(schedulers: Sequence[LRScheduler], steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer steps in between
        try:
            for _ in range(steps):
                for scheduler in schedulers:
                    scheduler.step()
        except ValueError as error:
            raise ValueError(
                "Expected the learning-rate schedule to reach beyond the "
                f"{steps} steps that the run of `ckpt_path` has made of it, but: "
                f"{error}"
            ) from error


def _differences(before: Options, now: Options) -> list[str]:
    """Returns which options differ, in words: those that can be chosen, if any."""
    keys = [
        key for key in {**before, **now} if before.get(key, _ABSENT) != now.get(key)
    ]
    chosen = [k for k in keys if "._" not in k and not k.endswith(".base_lrs")]
    if not before:
        return ["those of the run before are not known"]
    return [
        f"{key} {before.get(key, 'none')} -> {now.get(key, 'none')}"
        for key in chosen or keys
    ]


class StateFitter:
    """Fits optimizer states to new options.

    State that the optimizer no longer uses (momentum, where that is 0 now) is left
    out. What it can do without begins anew.

    Args:
        optimizers: The optimizers, by party.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._groups = {
            parameter: (party, optimizer, group)
            for party, optimizer in optimizers.items()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._used: dict[nn.Parameter, set[str]] = {}
        self._tried: set[tuple[nn.Parameter, frozenset[str]]] = set()

    def fitted(self, parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the part of a state that a new optimizer uses.

        Args:
            parameter: Of which the state is.
            state: The state of an optimizer of the same class.

        Raises:
            ValueError: If the optimizer needs what the state lacks.
        """
        if not state:
            return state
        if parameter not in self._used:
            self._used[parameter] = set(self._after_step(parameter, {}))
        own = {k: v for k, v in state.items() if k in self._used[parameter]}
        if (parameter, frozenset(own)) not in self._tried:
            self._tried.add((parameter, frozenset(own)))
            self._try(parameter, own)
        return own

    def _try(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        party, optimizer, _ = self._groups[parameter]
        try:
            if state:
                self._after_step(parameter, state)
        except KeyError as error:
            raise ValueError(
                f"Expected the options of the {party}'s optimizer (`optimizer.{party}` "
                "in a configuration) to need no more than what the run of `ckpt_path` "
                f"remembers, but {type(optimizer).__name__} now needs {error}, which "
                "was not kept. Choose the options of that run, or begin a new run from "
                "the weights alone (`model.weights=FOLDER`)."
            ) from error

    def _after_step(
        self, parameter: nn.Parameter, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns what a step on a stand-in for a parameter leaves in a state."""
        _, optimizer, group = self._groups[parameter]
        stand_in = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
        stand_in.grad = torch.zeros_like(stand_in)
        trial = copy.copy(optimizer)
        trial.param_groups = [{**group, "params": [stand_in]}]
        trial.state = defaultdict(dict)
        if state:
            trial.state[stand_in] = {
                k: v.detach().cpu().clone() if isinstance(v, Tensor) else v
                for k, v in state.items()
            }
        trial.step()
        return dict(trial.state.get(stand_in, {}))
