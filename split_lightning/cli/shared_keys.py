"""The keys of a run that its server tells to clients: options and numbers, never code.

So a client need not repeat what was typed for the server. It takes only what it could
have typed itself without harm: options of its own configuration, and plain values of
keys that decide how parties train. No path, no address and no `_target_` is among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

_SHARED = (
    "experiment",
    "name",
    "seed",
    "num_clients",
    "rounds",
    "local_epochs",
    "local_steps",
    "clients_per_round",
    "batch_size",
    "optimizer_state",
    "server_optimizer_state",
    "buffers",
    "data",
    "model",
    "topology",
    "protocol",
    "optimizer",
    "system",
)
_OF_EACH = ("data.root", "model.weights")  # files of a party
_KEY = re.compile(r"\+{0,2}[A-Za-z]\w*([./][A-Za-z]\w*)*")
_TEXT = re.compile(r"[\w-]+([.][\w-]+)*")


def shared_words(words: Iterable[str]) -> list[str]:
    """Returns what of the typed words a server tells its clients.

    >>> shared_words(["+experiment=rr10", "data.root=/data", "engine=grpc", "rounds=3"])
    ['+experiment=rr10', 'rounds=3']
    """
    return [word for word in words if is_shared(word)]


def is_shared(word: str) -> bool:
    """Returns whether a client may take a word from a server.

    >>> [is_shared(w) for w in ("data=digits", "model.cut_layer=[conv1,fc]", "seed=1")]
    [True, True, True]
    >>> [is_shared(w) for w in ("model.network._target_=os.system", "data.root=/etc")]
    [False, False]
    """
    key = key_of(word)
    if not _KEY.fullmatch(word.partition("=")[0]) or key in _OF_EACH:
        return False
    if re.split("[./]", key)[0] not in _SHARED:
        return False
    try:
        (parsed,) = OverridesParser.create().parse_overrides([word])
    except OverrideParseException:
        return False
    return not parsed.is_sweep_override() and _is_plain(parsed.value())


def joined_words(told: Sequence[str], own: Sequence[str]) -> list[str]:
    """Returns the words of a client: those of its server, and its own.

    Args:
        told: What the server says.
        own: What was typed for the client. It is typed for a key in place of the
            server's.

    Raises:
        ValueError: If the server says what a client takes from no server.

    >>> joined_words(["num_clients=3", "rounds=3"], ["rounds=5"])
    ['num_clients=3', 'rounds=5']
    """
    for word in told:
        if not is_shared(word):
            raise ValueError(
                f"The server says `{word}`, which a client takes from no server."
            )
    keys = {key_of(word) for word in own}
    return [*(word for word in told if key_of(word) not in keys), *own]


def key_of(word: str) -> str:
    """Returns the key of a typed word.

    >>> key_of("+experiment=rr10")
    'experiment'
    """
    return word.lstrip("+~").partition("=")[0]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return _TEXT.fullmatch(value) is not None
    return value is None or isinstance(value, bool | int | float)
