"""Messages of other packages that do not concern users."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    ".*LeafSpec.* is deprecated",  # Lightning 2.6 with the newest torch
    "Total length of `list` across ranks is zero",  # data.val_share=0
    "It is recommended to use `self.log.*sync_dist",  # logged values are of all ranks
)
# Parts of Lightning's log lines: advertisements, and what this package does itself.
_LOG_LINES = (
    "Tip: For seamless",
    "TPU available: False",
    "callbacks returned in `LightningModule.configure_callbacks` will override",
    "Trainer already configured with model summary callbacks",
)


def silence_known_messages() -> None:
    """Silences known warnings and Lightning's advertisements in this process."""
    for known in _WARNINGS:
        warnings.filterwarnings("ignore", known)
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    if _is_useful not in logger.filters:
        logger.addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(line in message for line in _LOG_LINES)
