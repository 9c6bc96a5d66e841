"""`Clock`: when things happen, from messages, against times worked out by hand."""

from itertools import count

import pytest
import torch

from split_lightning.message import AGGREGATOR, Computed, Message
from split_lightning.observers import Clock
from split_lightning.system import System, Work

# Client 0 computes 10 operations a second, client 1 twice as fast.
WORK = [Work(10, 20), Work(100, 200), Work(30, 60)]


class TwoSpeeds(System):
    """Client k computes and sends (k + 1) times as fast as client 0 does."""

    def _draw(self, client_id):
        device = super()._draw(client_id)
        return device._replace(
            flops=device.flops * (client_id + 1), uplink=device.uplink * (client_id + 1)
        )


def make(in_flight=1, shares_means=True, **options):
    system = {
        "client_flops": 10,
        "server_flops": 100,
        "uplink": 80,  # ten bytes a second
        "downlink": 160,
        "latency": 0.5,
    }
    return Clock(
        TwoSpeeds(**system | options),
        lambda segment: WORK[segment],
        in_flight=in_flight,
        shares_means=shares_means,
    )


NUMBERS = count()


def send(clock, kind, sender, receiver, num_bytes, step=0, place=0):
    payload = (torch.empty(num_bytes, dtype=torch.uint8),)
    clock(Message(kind, sender, receiver, payload, step, place))


def step(clock, samples, server="server/0", up=40, down=20):
    """The events of a step of some clients, in the order of training.

    Forward 1 s a sample at client 0, up 0.5 + 4, the server 1 + 2, down 0.5 + 1,
    backward 2.
    """
    number = next(NUMBERS)
    clients = {f"client/{k}": n for k, n in samples.items()}
    for name, n in clients.items():
        clock(Computed(name, 0, "forward", n))
    for name, n in clients.items():
        send(clock, "smashed", name, server, n * up, number)
    for direction in ("forward", "backward"):
        for n in clients.values():
            clock(Computed(server, 1, direction, n))
    for name, n in clients.items():
        send(clock, "gradient", server, name, n * down, number)
    for name, n in clients.items():
        clock(Computed(name, 0, "backward", n))


def test_a_step_is_the_sum_of_its_parts():
    """Three samples: forward 3, up 0.5 + 12, server 3 + 6, down 0.5 + 3, backward 6."""
    clock = make()
    step(clock, {0: 3})
    assert clock.now == pytest.approx(3 + 12.5 + 9 + 3.5 + 6)
    step(clock, {0: 3})
    assert clock.now == pytest.approx(2 * 34)


def test_clients_of_one_server_wait_for_it_and_no_longer():
    """Client 1 has its forward pass done (1 + 4.5 for two samples), and waits."""
    clock = make()
    step(clock, {0: 2})
    assert clock.ready["server/0"] == pytest.approx(16.5)
    step(clock, {1: 2})
    assert clock.ready["server/0"] == pytest.approx(22.5)
    assert clock.ready["client/1"] == pytest.approx(22.5 + 2.5 + 2)


def test_clients_of_different_servers_do_not_wait():
    clock = make()
    step(clock, {0: 2})
    step(clock, {1: 2}, "server/1")
    assert clock.ready["client/1"] == pytest.approx(1 + 4.5 + 6 + 2.5 + 2)


def test_a_joint_step_waits_for_the_slowest():
    """One sample each: client 0 is there after 1 + 4.5, client 1 after 0.5 + 2.5."""
    clock = make()
    step(clock, {0: 1, 1: 1})
    end = 5.5 + 2 * 3
    assert clock.ready["server/0"] == pytest.approx(end)
    assert clock.ready["client/0"] == pytest.approx(end + 1.5 + 2)
    assert clock.ready["client/1"] == pytest.approx(end + 1.5 + 1)


def test_a_hand_off_begins_when_the_sender_is_done():
    clock = make()
    step(clock, {0: 1})
    done = clock.ready["client/0"]
    send(clock, "weights", "client/0", "client/1", 100)
    assert clock.ready["client/1"] == pytest.approx(done + 0.5 + 10 + 0.5 + 5)
    assert clock.ready["client/0"] == done


def average(clock, clients, num_bytes):
    for k in clients:
        send(clock, "weights", f"client/{k}", AGGREGATOR, num_bytes)
    for k in clients:
        send(clock, "weights", AGGREGATOR, f"client/{k}", num_bytes)


def test_a_mean_is_made_when_all_are_there_and_others_get_it_when_they_train():
    clock = make()
    step(clock, {0: 1})
    step(clock, {1: 1}, "server/1")
    ends = dict(clock.ready)
    average(clock, (0, 1), 100)
    made = max(ends["client/0"] + 0.5 + 10, ends["client/1"] + 0.5 + 5)
    for name in ("client/0", "client/1"):
        assert clock.ready[name] == pytest.approx(made + 5.5)
    for _ in range(2):  # once alone
        clock(Computed("client/2", 0, "forward", 0))
        assert clock.ready["client/2"] == pytest.approx(made + 5.5)


@pytest.mark.parametrize("is_remote", [True, False])
def test_servers_are_averaged_when_all_are_done(is_remote):
    """A server that trains first later begins with the mean, not before it was made."""
    clock = make(server_link=8, server_latency=1)
    step(clock, {0: 1})
    step(clock, {1: 1}, "server/1")
    ends = [clock.ready[f"server/{number}"] for number in (0, 1)]
    names, size = ("server/0", "server/1"), 10 * is_remote
    for name in names:
        send(clock, "weights", name, AGGREGATOR, size)
    for name in names:
        send(clock, "weights", AGGREGATOR, name, size)
    made = max(ends) + (11 if is_remote else 0)
    expected = made + (11 if is_remote else 0)
    assert [clock.ready[name] for name in names] == [pytest.approx(expected)] * 2
    step(clock, {3: 0}, "server/2", up=0, down=0)
    assert clock.ready["server/2"] >= made


def test_labels_go_straight_to_the_last_server():
    """Which begins when both are there: labels of 4 s, smashed data of 4.5 + 1 + ..."""
    clock = make(server_link=80, server_latency=0.25)
    clock(Computed("client/0", 0, "forward", 1))
    send(clock, "smashed", "client/0", "server/0", 40)
    send(clock, "labels", "client/0", "server/1", 200)
    clock(Computed("server/0", 1, "forward", 1))
    send(clock, "smashed", "server/0", "server/1", 10, place=1)
    clock(Computed("server/1", 2, "forward", 1))
    hop = 1 + 0.5 + 4 + 1 + 0.25 + 1
    labels = 1 + 0.5 + 20
    assert clock.ready["server/1"] == pytest.approx(max(hop, labels) + 0.3)


def test_turns_of_clients_that_train_at_the_same_time():
    """Client 1 begins with what client 0 sent, when that is there."""
    clock = make(shares_means=False)
    send(clock, "weights", AGGREGATOR, "client/0", 100)
    assert clock.ready["client/0"] == pytest.approx(0.5 + 5)
    step(clock, {0: 2})
    there = clock.ready["client/0"] + 0.5 + 10
    send(clock, "weights", "client/0", AGGREGATOR, 100)
    assert clock.ready["client/0"] == pytest.approx(there)
    send(clock, "weights", AGGREGATOR, "client/1", 100)
    assert clock.ready["client/1"] == pytest.approx(there + 5.5)


def test_batches_on_their_way():
    """Samples of one: forward 1, up 4.5, server 3, down 1.5, backward 2.

    The second forward pass ends at 2, its batch is there at 6.5 and waits until 8.5;
    the first gradient is there at 10; the third forward pass comes after its backward.
    """
    clock = make(in_flight=2, shares_means=False)
    for _ in range(3):
        step(clock, {0: 1})
    first = 1 + 4.5 + 3
    third = first + 1.5 + 2 + 1 + 4.5 + 3
    assert clock.ready["server/0"] == pytest.approx(third)
    halfway = make(in_flight=2, shares_means=False)
    halfway.load_state_dict(clock.state_dict())
    for each in (clock, halfway):
        send(each, "weights", "client/0", AGGREGATOR, 0)
        assert each.ready["client/0"] == pytest.approx(third + 1.5 + 2)


def test_its_state_continues():
    clock, other = make(), make()
    step(clock, {0: 2, 1: 1})
    average(clock, (0, 1), 100)
    other.load_state_dict(clock.state_dict())
    for each in (clock, other):
        send(each, "weights", "client/1", "client/2", 10)
        step(each, {2: 1})
    assert other.state_dict() == clock.state_dict()
