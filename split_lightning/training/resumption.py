"""`Resumption`: saves the state of a run in checkpoints, and restores it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pytorch_lightning.trainer.states import TrainerFn
from torch.optim import Optimizer

from split_lightning.processes import gathered, processes_of
from split_lightning.random_state import random_state, set_random_state
from split_lightning.training.loading import CONFIGURATION, OBJECTS
from split_lightning.training.resumed_options import (
    Options,
    StateFitter,
    describe,
    go_on,
    require_rounds,
)

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule

FORMAT = 2  # of the checkpoints
_logger = logging.getLogger(__name__)


class Resumption:
    """Puts what a run needs to continue exactly into checkpoints, and restores it."""

    def __init__(self) -> None:
        self._waiting: dict[str, Any] | None = None  # until training starts
        self._checkpoint: dict[str, Any] | None = None  # until there are optimizers
        self._options: Options = {}  # of optimizers and schedulers, when they were new

    def save(self, module: SplitLightningModule, checkpoint: dict[str, Any]) -> None:
        """Fills a checkpoint."""
        waiting = module.named_parameters() if module.is_accumulating() else ()
        if module.configuration is not None:
            checkpoint[CONFIGURATION] = module.configuration
        checkpoint[OBJECTS] = list(module.objects)
        checkpoint["format"] = FORMAT
        checkpoint["options"] = self._options
        checkpoint["engine"] = module.engine.state_dict()
        checkpoint["entries"] = list(module.engine.placement.entries)
        checkpoint["traffic"] = module.totals()
        checkpoint["round"] = {
            "skipped_batches": module.skipped_batches,
            "processes": gathered(
                module.trainer,
                {"losses": module.clients.losses.sums, "random_state": random_state()},
            ),
            "gradients": {n: p.grad for n, p in waiting if p.grad is not None},
        }

    def load(self, module: SplitLightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores what does not wait until training starts.

        Raises:
            ValueError: If the checkpoint is of another version, network or protocol.
        """
        require_format(checkpoint)
        live = num_live(checkpoint)
        trainer = module._trainer
        if trainer is None:
            module.engine.restore_placement(checkpoint["engine"])
        module.engine.make_room(live)  # where it is no fit: there is none yet
        if module.engine.num_live > live:
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of a run in which as many "
                f"clients train together ({module.engine.num_live}), but there were "
                f"{live}: continue with the protocol that the run began with."
            )
        if checkpoint["state_dict"].keys() != module.state_dict().keys():
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of the same network, cut "
                f"after the same layer ({module.hparams['cut_layer']!r}), but its "
                "layers differ."
            )
        entries = list(module.engine.placement.entries)
        if checkpoint["entries"] != entries:
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of a run with the same "
                f"entries of `{module.engine.placement.argument}` for its clients, but "
                f"they were {checkpoint['entries']}, and now are {entries}."
            )
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            require_rounds(checkpoint, trainer.max_epochs)
            self._checkpoint = checkpoint
        self._waiting = checkpoint["round"]
        device = next(module.parameters()).device
        module.engine.load_state_dict(checkpoint["engine"], device)
        # Sums over all processes are the first one's to keep.
        if trainer is None or trainer.is_global_zero:
            module.traffic.counts = dict(checkpoint["traffic"])
        losses = [process["losses"] for process in checkpoint["round"]["processes"]]
        process = processes_of(trainer)
        module.clients.losses.take_over(losses, process.rank, process.world_size)
        module.skipped_batches = checkpoint["round"]["skipped_batches"]

    def take_over_optimizers(
        self, module: SplitLightningModule, optimizers: dict[str, Optimizer]
    ) -> None:
        """Lets a resumed run use the new options of its optimizers."""
        configs: list[Any] = module.trainer.lr_scheduler_configs
        schedulers = [config.scheduler for config in configs]
        self._options = describe(optimizers, schedulers, module.scheduler_interval)
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            self._waiting = None if module.trainer.ckpt_path is None else self._waiting
            return
        differ = go_on(checkpoint, self._options, optimizers, schedulers)
        if differ:
            fitter = StateFitter(optimizers)
            for store in module.engine.stores:
                store.fit_optimizer_states(fitter.fitted)
            for number, mean in module.engine.means.items():
                store = module.engine.stores[number]
                store.fit_mean(mean.optimizer, fitter.fitted)
            if module.trainer.is_global_zero:
                _logger.warning(
                    "The run continues with other options: %s.", ", ".join(differ)
                )

    def restore(self, module: SplitLightningModule) -> None:
        """Restores random numbers and gradients, when training starts.

        By then nothing more draws random numbers, or clears gradients, before training.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        states = waiting["processes"]
        own = states[module.trainer.global_rank % len(states)]
        set_random_state(own["random_state"])
        parameters = dict(module.named_parameters())
        for name, gradient in waiting["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)


def num_live(checkpoint: dict[str, Any]) -> int:
    """Returns how many clients' segments are live at once in a checkpoint."""
    count: int = checkpoint["engine"]["num_live"]
    return count


def require_format(checkpoint: dict[str, Any]) -> None:
    """Stops where a checkpoint is not of this version's format.

    Raises:
        ValueError: Says what to do.
    """
    if checkpoint.get("format") != FORMAT:
        raise ValueError(
            f"Expected a checkpoint of format {FORMAT}, which this version writes, but "
            f"got {checkpoint.get('format', 1)}: another version of split_lightning "
            "wrote it. Resume with that version, or begin anew from its weights "
            "(`model.weights=FOLDER`)."
        )
