"""`Traffic`: counts bytes, those of all messages between parties."""

from __future__ import annotations

from split_lightning.message import Message, role_of

# The counter of a message, by the roles of sender and receiver.
_BETWEEN_SEGMENTS = {
    ("client", "server"): "uplink_bytes",
    ("server", "client"): "downlink_bytes",
    ("server", "server"): "hop_bytes",
    ("client", "client"): "hop_bytes",
}
_WEIGHTS = {
    ("client", "client"): "handoff_bytes",
    ("client", "server"): "layer_bytes",
    ("server", "client"): "layer_bytes",
    ("server", "server"): "layer_bytes",
    ("client", "aggregator"): "averaging_bytes",
    ("aggregator", "client"): "averaging_bytes",
    ("server", "aggregator"): "server_averaging_bytes",
    ("aggregator", "server"): "server_averaging_bytes",
}
_MOST_LINKS = 10_000  # whose names are kept
NAMES = (
    "uplink_bytes",
    "downlink_bytes",
    "handoff_bytes",
    "handoffs",
    "averaging_bytes",
    "server_averaging_bytes",
    "hop_bytes",
    "layer_bytes",
)


class Traffic:
    """Counts the bytes of messages in training since the start of the run.

    Attributes:
        counts: By name. `uplink_bytes`: what clients send to servers (smashed data and
            labels; in a U-shape gradients, too). `downlink_bytes`: what servers send to
            clients. `hop_bytes`: the same from server to server. `handoff_bytes` and
            `handoffs`: weights from client to client. `averaging_bytes`: what clients
            send to be averaged, and get back. `server_averaging_bytes`: the same for
            servers. `layer_bytes`: layers that go between clients and servers, where
            clients cut after different layers.
        counts_samples: Whether messages of training steps are counted: not where a
            process computes with samples that are another's.
        counts_weights: Whether all other messages are counted: in one of several
            processes that do the same.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(NAMES, 0)
        self.counts_samples = self.counts_weights = True
        self._names: dict[tuple[str, str, str], str] = {}

    def __call__(self, message: Message) -> None:
        """Counts a message."""
        link = message.kind, message.sender, message.receiver
        name = self._names.get(link) or self._name(link)
        if message.kind in ("weights", "statistics"):
            if self.counts_weights:
                self.counts[name] += message.num_bytes
                is_first = message.receiver.partition(".")[2] in ("", "0")  # of holders
                self.counts["handoffs"] += is_first and name == "handoff_bytes"
        elif self.counts_samples:
            self.counts[name] += message.num_bytes

    def _name(self, link: tuple[str, str, str]) -> str:
        """Returns the counter of a message, by its kind, sender and receiver."""
        if len(self._names) > _MOST_LINKS:
            self._names.clear()
        kind, sender, receiver = link
        names = _WEIGHTS if kind in ("weights", "statistics") else _BETWEEN_SEGMENTS
        self._names[link] = names[role_of(sender), role_of(receiver)]
        return self._names[link]

    def forget(self) -> None:
        """Sets all counters to zero."""
        self.counts = dict.fromkeys(NAMES, 0)
