"""`Hello`: what a site says first, before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

# What clients whose data go together have, where the name of a field does not say it.
_EXPECTED = {
    "partition": "the same data set with the same `data/partitioner`, `num_clients` "
    "and `data.val_share` (`partition` is a checksum of these)",
    "train": "the holders of a client to train on the same samples",
    "val": "the holders of a client to validate on the same samples",
    "test": "tests on the same number of samples",
}
_COUNTS = ["train", "val", "test"]
_MOST = 10**8  # samples of a client: the server needs memory for each


class ClientData(NamedTuple):
    """What a client says about its samples, without showing any.

    Attributes:
        client_id: The client.
        train: Number of samples that it trains on.
        val: Number of samples that it validates on.
        test: Number of samples that it tests on.
        is_own: Whether its source is its own; otherwise it has a part of a data set
            that all have, and the test set is that of all.
        shape: The shape of a sample as the network gets it, such as `(C, H, W)`.
        is_floating: Whether a sample is of floating-point numbers; otherwise of ids.
        classes: Names of the classes.
        partition: A checksum of how the data set is partitioned; 0 for an own source.
    """

    client_id: int
    train: int
    val: int
    test: int
    is_own: bool
    shape: tuple[int, ...]
    is_floating: bool
    classes: tuple[str, ...]
    partition: int

    @classmethod
    def of(cls, plain: Any) -> ClientData:
        """Returns what plain values from a site say.

        Raises:
            ValueError: If they are not what they should be.
        """
        hints = get_type_hints(cls)
        if not isinstance(plain, Mapping) or plain.keys() != hints.keys():
            raise ValueError("a client's data are described by other words")
        for name in ("client_id", *_COUNTS, "partition"):
            own = plain[name]
            is_whole = type(own) is int and own >= 0
            if not is_whole or (name in _COUNTS and own > _MOST):
                raise ValueError(f"`{name}` of a client's data is no count")
        for name in ("is_own", "is_floating"):
            if type(plain[name]) is not bool:
                raise ValueError(f"`{name}` of a client's data is not true or false")
        for name, kind in (("shape", int), ("classes", str)):
            own = plain[name]
            if not isinstance(own, tuple) or any(type(n) is not kind for n in own):
                raise ValueError(f"`{name}` of a client's data is no tuple of {kind}")
        return cls(**plain)


class Hello(NamedTuple):
    """What a site says first.

    Attributes:
        agreed: Digests of what all have to agree on, by key.
        data: What its clients say about their samples.
    """

    agreed: Mapping[str, str]
    data: Sequence[ClientData]

    def plain(self) -> dict[str, Any]:
        """Returns it in plain containers."""
        data = [own._asdict() for own in self.data]
        return {"agreed": dict(self.agreed), "data": data}

    @classmethod
    def of(cls, plain: Any, agreed: Mapping[str, str]) -> Hello:
        """Returns the hello that plain values from a site are.

        Args:
            plain: What `plain` returned at the site.
            agreed: What the process with the Trainer has.

        Raises:
            ValueError: If they are no hello, or something differs; says what.
        """
        theirs, data = plain.get("agreed"), plain.get("data")
        if not isinstance(theirs, dict) or not isinstance(data, list):
            raise ValueError("expected a hello with digests and data")
        for key, value in agreed.items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"its `{key}` differs from the server's; use the same in both "
                    "configurations"
                )
        return cls(agreed, [ClientData.of(own) for own in data])


def require_alike(several: Sequence[ClientData]) -> None:
    """Stops where clients' data do not go together.

    Raises:
        ValueError: Names what differs, and the clients.
    """
    first = several[0]
    by_client: dict[int, ClientData] = {}
    for own in several:
        names = ["shape", "is_floating", "classes", "is_own"]
        if not own.is_own:
            names += ["partition", "test"]
        _require_equal(first, own, names)
        holder = by_client.setdefault(own.client_id, own)
        _require_equal(holder, own, _COUNTS)


def _require_equal(first: ClientData, own: ClientData, names: Sequence[str]) -> None:
    for name in names:
        if getattr(own, name) != getattr(first, name):
            raise ValueError(
                f"Expected {_EXPECTED.get(name, f'the same `{name}`')}, but client "
                f"{first.client_id} has {getattr(first, name)}, and client "
                f"{own.client_id} has {getattr(own, name)}."
            )
