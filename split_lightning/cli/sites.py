"""Client processes on this machine, for a run that needs no others."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from split_lightning.cli.client_keys import KEYS
from split_lightning.cli.config import typed_overrides
from split_lightning.cli.config_keys import as_typed
from split_lightning.cli.shared_keys import shared_words
from split_lightning.engines.remote import NO_SITES, site_of
from split_lightning.module import SplitLightningModule

_SECONDS_TO_END = 20
_STARTS = 10  # of a client's process, before the run gives it up


@contextmanager
def clients_here(cfg: DictConfig, module: SplitLightningModule) -> Iterator[None]:
    """Runs the clients of a run on this machine, where it names no address.

    Certificates are made for this run alone, and removed when it ends. A client that
    ends too early is started again.
    """
    sites: Any = module.engine.sites
    if sites is NO_SITES:
        yield
        return
    if cfg.engine.get("listen") is not None:
        sites.words = shared_words(as_typed(typed_overrides()))
        yield
        return
    folder = Path(cfg.output_dir, "clients").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / KEYS  # no run of its own, which has a config.yaml
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), config)
    if hasattr(sites, "workers"):
        from split_lightning.cli.client_site import worker_answers

        sites.new_answers = partial(worker_answers, str(folder))
        yield
        return
    names = [site_of(party) for party in module.engine.parties_away()]
    with (
        _certificates(folder / "certificates", names) as certificates,
        _processes(sites, names, config, certificates),
    ):
        yield


@contextmanager
def _processes(
    sites: Any, names: Sequence[str], config: Path, certificates: Path
) -> Iterator[None]:
    """Runs a process for each site once the server listens; waits for all of them.

    Args:
        sites: The sites, as the server knows them.
        names: Their names.
        config: The file with the keys of the run. Each process writes beside it.
        certificates: The folder of all certificates.
    """
    sites.listen, sites.certificates = "127.0.0.1:0", certificates / "server"
    folder, started = config.parent, list[_Client]()

    def begin(port: int) -> None:
        for name in names:
            words = [
                *("--id", name.partition("-")[2], "--config", str(config)),
                f"engine.server=127.0.0.1:{port}",
                f"engine.certificates={certificates / name}",
                f"engine.folder={folder / name}",
                "engine.patience=5",  # they end with the process that started them
            ]
            give_up = partial(sites.give_up, name)
            started.append(_Client(words, folder / f"{name}.log", give_up))

    sites.start = begin
    try:
        yield
    except BaseException:
        for client in started:
            client.kill()
        raise
    for client in started:
        client.wait()


@contextmanager
def _certificates(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Writes certificates for a run, and removes them, and all keys, when it ends."""
    from split_lightning.engines.certificates import write_certificates

    try:
        write_certificates(folder, names, ["127.0.0.1"], days=30)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Client:
    """A client's process, which is started again when it is killed.

    Args:
        words: What its command has.
        log: The file for what it prints.
        give_up: Is told why it will not come back.
    """

    def __init__(
        self, words: Sequence[str], log: Path, give_up: Callable[[str], None]
    ) -> None:
        self.words, self.log, self.give_up = list(words), log, give_up
        self._is_over = False
        self._process = self._start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "split_lightning.client", *self.words]
            return subprocess.Popen(command, stdout=log, stderr=log)

    def _watch(self) -> None:
        for _ in range(_STARTS):
            status = self._process.wait()
            if status == 0 or self._is_over:
                return
            if status > 0:  # by itself: it would do so again
                self.give_up(f"ended: {self._last_line()}")
                return
            self._process = self._start()
        self.give_up(f"was killed {_STARTS} times. It printed: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "nothing")

    def wait(self) -> None:
        """Waits for the process to end, which the server has told it to."""
        try:
            self._process.wait(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends the process."""
        self._is_over = True
        self._process.kill()
        self._process.wait()
