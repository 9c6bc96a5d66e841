"""`Traffic`: counts bytes, those of all messages between parties."""

from __future__ import annotations

from split_lightning.message import Computed, Message, role_of

# What counts as what, by the roles of sender and receiver.
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

    def __call__(self, event: Message | Computed) -> None:
        """Counts a message."""
        if not isinstance(event, Message):
            return
        ends = role_of(event.sender), role_of(event.receiver)
        if event.kind in ("weights", "statistics"):
            if self.counts_weights:
                name = _WEIGHTS[ends]
                self.counts[name] += event.num_bytes
                is_first = event.receiver.partition(".")[2] in ("", "0")  # of holders
                self.counts["handoffs"] += is_first and name == "handoff_bytes"
        elif self.counts_samples:
            self.counts[_BETWEEN_SEGMENTS[ends]] += event.num_bytes

    def forget(self) -> None:
        """Begins to count anew."""
        self.counts = dict.fromkeys(NAMES, 0)
