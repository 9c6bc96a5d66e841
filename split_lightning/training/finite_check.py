"""`FiniteCheck`: looks for a NaN or an infinity before any optimizer steps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from split_lightning.finite import NonFiniteError, NotFinite, are_finite
from split_lightning.message import role_of
from split_lightning.processes import all_agree
from split_lightning.protocols.plan import Step
from split_lightning.step import StepLosses

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule

NonFinitePolicy: TypeAlias = Literal["stop", "skip"]
_logger = logging.getLogger(__name__)


class FiniteCheck:
    """Checks the results of a training step before any optimizer steps.

    Args:
        policy: Whether such a batch stops the run, or is left out.

    Attributes:
        every: After how many batches, and at the end of a round, numbers are looked at
            where the run would stop. More than 1 on a GPU, so that no step waits for
            it: some steps are then taken with numbers that are not finite.
    """

    def __init__(self, policy: NonFinitePolicy) -> None:
        self.policy = policy
        self.every = 1
        self._norm: Tensor | None = None  # the largest that was not looked at yet

    def accepts(
        self,
        module: SplitLightningModule,
        step: Step,
        batch_idx: int,
        losses: StepLosses | NotFinite,
    ) -> bool:
        """Returns whether a step's numbers are finite; if not, it is undone.

        Args:
            module: The module.
            step: The step.
            batch_idx: Its index in the round.
            losses: The losses, or the result that is not finite.

        Raises:
            NonFiniteError: Names what is not finite and where, if a run is to stop.
        """
        if isinstance(losses, StepLosses) and not losses.are_here:
            return True  # the site looks, before it steps
        is_sound = self._is_sound(module, batch_idx, losses)
        if is_sound is None:
            return True  # until then
        if module.trainer.world_size > 1:
            is_sound = all_agree(module.trainer, is_sound)
        if not is_sound:
            self._refuse(module, step, batch_idx, losses)
        module.channel.recent.clear()  # nothing is to be found in it
        return is_sound

    def _is_sound(
        self,
        module: SplitLightningModule,
        batch_idx: int,
        losses: StepLosses | NotFinite,
    ) -> bool | None:
        """Returns whether a step's numbers are finite; `None`: a later look tells."""
        if isinstance(losses, NotFinite):
            return False
        values = [losses.total, *losses.own, *module.engine.gradients()]
        norm = get_total_norm(values)
        if self.every > 1 and self.policy == "stop":
            if self._norm is not None:  # the largest; NaN if one is
                norm = torch.stack([self._norm, norm]).max()
            is_due = (batch_idx + 1) % self.every == 0 or module.trainer.is_last_batch
            self._norm = None if is_due else norm
            if not is_due:
                return None
        is_sound = bool(norm.isfinite()) or are_finite(values)
        if self.policy == "skip":
            is_sound = module.engine.are_sound() and is_sound
        return is_sound

    def _refuse(
        self,
        module: SplitLightningModule,
        step: Step,
        batch_idx: int,
        losses: StepLosses | NotFinite,
    ) -> None:
        """Undoes a step, or stops the run."""
        what = str(losses)
        if isinstance(losses, StepLosses):
            what = _first_unsound(module, losses)
        clients = ", ".join(map(str, step.client_ids))
        where = (
            f"round {module.trainer.current_epoch + 1}, client {clients}, "
            f"batch {batch_idx + 1} of the round"
        )
        if self.policy == "stop":
            raise NonFiniteError(_message(where, what))
        _logger.warning("Skipped %s: %s is not finite.", where, what)
        module.engine.discard()

    def settle(self, module: SplitLightningModule) -> None:
        """Waits for what parties at other sites have found.

        Raises:
            NonFiniteError: If a number is not finite; the party has not stepped.
        """
        try:
            module.engine.settle()
        except NotFinite as found:
            where = f"round {module.trainer.current_epoch + 1}"
            raise NonFiniteError(_message(where, str(found))) from found


def _message(where: str, what: str) -> str:
    return (
        f"Not finite in {where}: {what}. Lower the learning rate, limit the gradient "
        "(`gradient_clip_val`), look at the client's data, or skip such batches "
        "(`non_finite=skip`; `model.` before both in a configuration)."
    )


def _first_unsound(module: SplitLightningModule, losses: StepLosses) -> str:
    """Names what is not finite, in the order of a step."""
    sent: dict[str, list[Any]] = {"smashed": [], "gradient": []}
    for message in module.channel.recent:
        sent.setdefault(message.kind, []).extend(message.payload)
    gradients: dict[str, list[Any]] = {"client": [], "server": []}
    for party in module.engine.parties():
        gradients[role_of(party.name)] += [p.grad for p in party.parameters()]
    is_split = module.topology.is_split
    named = [
        ("the smashed data", sent["smashed"]),
        ("the loss", [losses.total, *losses.own]),
        ("the gradient of the smashed data", sent["gradient"]),
        ("the server's gradient" if is_split else "the gradient", gradients["server"]),
        ("the client's gradient" if is_split else "the gradient", gradients["client"]),
    ]
    found = (name for name, values in named if not are_finite(values))
    return next(found, "what another process computed")
