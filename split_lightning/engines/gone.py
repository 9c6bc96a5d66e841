"""`Gone`: says at the server which sites have lost their connection."""

from __future__ import annotations

import logging
from collections.abc import Iterable

_logger = logging.getLogger(__name__)


class Gone:
    """Says once that a site is gone, and once that it is back.

    A site that connects again at once is not gone.
    """

    def __init__(self) -> None:
        self._now: set[str] = set()
        self._told: set[str] = set()

    def note(self, names: Iterable[str]) -> None:
        """Notes which sites have no connection now."""
        before, self._now = self._now, set(names)
        if back := self._told - self._now:
            _logger.info("%s: connected again.", ", ".join(sorted(back)))
        new = (before & self._now) - self._told
        if new:
            _logger.warning("%s: the connection is gone.", ", ".join(sorted(new)))
        self._told = (self._told & self._now) | new
