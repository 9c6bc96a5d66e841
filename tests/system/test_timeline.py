"""When things happen: times worked out by hand."""

import pytest
from split_lightning.route import Stage, route_of

from split_lightning.system import System, Timeline, Work

# Client 0 computes 10 operations a second, client 1 twice as fast: see `System2`.
VANILLA = route_of(1, "server")
WORK = [Work(10, 20), Work(100, 200)]


class TwoSpeeds(System):
    """Client k computes and carries (k + 1) times what client 0 does."""

    def _draw(self, client_id):
        device = super()._draw(client_id)
        return device._replace(
            flops=device.flops * (client_id + 1), uplink=device.uplink * (client_id + 1)
        )


def system(**options):
    return TwoSpeeds(
        **{
            "client_flops": 10,
            "server_flops": 100,
            "uplink": 80,  # ten bytes a second
            "downlink": 160,
            "latency": 0.5,
        }
        | options
    )


def timeline(route=VANILLA, work=WORK, **options):
    return Timeline(system(**options), route, work)


CROSSING = [(40, 20)]  # bytes of a sample, up and down


def test_a_step_is_the_sum_of_its_parts():
    """Three samples: forward 3, up 0.5 + 12, server 3 + 6, down 0.5 + 3, backward 6."""
    line = timeline()
    line.step({0: 3}, 0, CROSSING)
    assert line.now == pytest.approx(3 + 12.5 + 9 + 3.5 + 6)
    line.step({0: 3}, 0, CROSSING)
    assert line.now == pytest.approx(2 * 34)


def test_clients_of_one_server_wait_for_it_and_no_longer():
    """Client 1 has its forward done (1 + 4.5 for two samples), and waits.

    Client 0's step of two samples: the server computes from 2 + 8.5 to 16.5.
    """
    line = timeline()
    line.step({0: 2}, 0, CROSSING)
    assert line.servers == {(0, 0): pytest.approx(16.5)}
    line.step({1: 2}, 0, CROSSING)
    assert line.servers == {(0, 0): pytest.approx(22.5)}
    assert line.clients[1] == pytest.approx(22.5 + 2.5 + 2)


def test_clients_of_different_servers_do_not_wait():
    line = timeline()
    line.step({0: 2}, 0, CROSSING)
    line.step({1: 2}, 1, CROSSING)
    assert line.clients[1] == pytest.approx(1 + 4.5 + 6 + 2.5 + 2)


def test_a_joint_step_waits_for_the_slowest():
    """One sample each: client 0 is there after 1 + 4.5, client 1 after 0.5 + 2.5."""
    line = timeline()
    line.step({0: 1, 1: 1}, 0, CROSSING)
    end = 5.5 + 2 * 3
    assert line.servers == {(0, 0): pytest.approx(end)}
    assert line.clients == {
        0: pytest.approx(end + 1.5 + 2),
        1: pytest.approx(end + 1.5 + 1),
    }


def test_a_hand_off_begins_when_the_sender_is_done():
    line = timeline()
    line.step({0: 1}, 0, CROSSING)
    done = line.clients[0]
    line.hand_over(0, 1, 100)
    assert line.clients[1] == pytest.approx(done + 0.5 + 10 + 0.5 + 5)
    assert line.clients[0] == done


def test_a_mean_is_made_when_all_are_there_and_others_get_it_when_they_act():
    line = timeline()
    line.step({0: 1}, 0, [])
    line.step({1: 1}, 1, [])
    ends = dict(line.clients)
    line.average_clients({0: 100, 1: 100})
    made = max(ends[0] + 0.5 + 10, ends[1] + 0.5 + 5)
    assert line.clients == dict.fromkeys((0, 1), pytest.approx(made + 5.5))
    line.step({2: 0}, 2, [])
    assert line.clients[2] == pytest.approx(made + 5.5)
    line.step({2: 0}, 2, [])  # it has it now
    assert line.clients[2] == pytest.approx(made + 5.5)


@pytest.mark.parametrize("is_remote", [True, False])
def test_servers_are_averaged_when_all_are_done(is_remote):
    line = timeline(server_link=8, server_latency=1)
    line.step({0: 1}, 0, [])
    line.step({1: 1}, 1, [])
    ends = line.servers.copy()
    line.average_servers({0: 10 * is_remote, 1: 10 * is_remote})
    expected = max(ends.values()) + (2 * 11 if is_remote else 0)
    assert list(line.servers.values()) == [pytest.approx(expected)] * 2


def test_a_server_that_acts_first_later_begins_with_the_mean():
    """Not before it was made; nor do others go back to an earlier time."""
    line = timeline()
    line.step({0: 3}, 0, CROSSING)
    line.average_servers({0: 0})
    made = line.servers[0, 0]
    assert made == pytest.approx(3 + 12.5 + 9)
    resumed = timeline()
    resumed.load_state_dict(line.state_dict())
    for each in (line, resumed):
        each.step({1: 1}, 1, CROSSING)  # it is there after 0.5 + 2.5
        assert each.servers[1, 0] == pytest.approx(made + 3)
        each.average_servers({1: 0})
        assert each.servers == dict.fromkeys([(0, 0), (1, 0)], pytest.approx(made + 3))


def test_a_u_shape_crosses_twice_each_way():
    """The head computes at the client; the server is asked twice."""
    work = [Work(10, 20), Work(100, 200), Work(30, 60)]
    line = timeline(route_of(2, "client"), work)
    line.step({0: 1}, 0, [(40, 20), (8, 16)])
    up, back_up = 0.5 + 4, 0.5 + 1.6
    down, features = 0.5 + 1, 0.5 + 0.4
    expected = 1 + up + 1 + features + 3 + 6 + back_up + 2 + down + 2
    assert line.now == pytest.approx(expected)


def test_hops_are_between_servers():
    work = [Work(10, 20), Work(100, 200), Work(30, 60)]
    line = timeline(route_of(2, "server"), work, server_link=80, server_latency=0.25)
    line.step({0: 1}, 0, [(40, 20), (10, 30)])
    expected = 1 + 4.5 + 1 + (0.25 + 1) + 0.3 + 0.6 + (0.25 + 3) + 2 + 1.5 + 2
    assert line.now == pytest.approx(expected)


def test_its_state_goes_on():
    line = timeline()
    line.step({0: 2, 1: 1}, 0, CROSSING)
    line.average_clients({0: 100, 1: 100})
    other = timeline()
    other.load_state_dict(line.state_dict())
    for each in (line, other):
        each.hand_over(1, 2, 10)
        each.step({2: 1}, 0, CROSSING)
    assert other.state_dict() == line.state_dict()


def test_hand_ins_and_begins_of_asynchronous_turns():
    """Client 1 begins with what client 0 handed in, when that is there."""
    line = timeline()
    line.begin_turn(0, 100)
    assert line.clients[0] == pytest.approx(0.5 + 5)
    line.step({0: 2}, 0, CROSSING)
    done = line.clients[0]
    line.hand_in(0, 100)
    there = done + 0.5 + 10
    assert line.clients[0] == pytest.approx(there)
    line.begin_turn(1, 100)
    assert line.clients[1] == pytest.approx(there + 5.5)
    line.hand_in(1, 0)  # nothing to send
    line.begin_turn(0, 0)
    assert line.clients[0] == pytest.approx(there + 5.5)  # nor to get


@pytest.mark.parametrize(
    ("crossing", "expected"), [((40, 0), 3 + 12.5 + 9), ((0, 0), 9)]
)
def test_what_does_not_take_place_takes_no_time(crossing, expected):
    """A client that gets no gradient, and one that sends nothing."""
    line = timeline()
    line.step({0: 3}, 0, [crossing])
    assert line.now == pytest.approx(expected)
    assert line.clients[0] == pytest.approx(expected)


def test_batches_on_their_way():
    """Samples of one: forward 1, up 4.5, server 3, down 1.5, backward 2.

    The second forward ends at 2, its batch is there at 6.5 and waits until 8.5; the
    first gradient is there at 10; the third forward comes after its backward.
    """
    line = timeline()
    for _ in range(3):
        line.step({0: 1}, 0, CROSSING, in_flight=2)
    first = 1 + 4.5 + 3
    assert line.servers[0, 0] == pytest.approx(first + 1.5 + 2 + 1 + 4.5 + 3)
    halfway = timeline()
    halfway.load_state_dict(line.state_dict())
    for each in (line, halfway):
        each.hand_in(0, 0)
        assert each.clients[0] == pytest.approx(first + 1.5 + 2 + 1 + 4.5 + 4.5 + 2)


def test_layers_go_from_a_server_to_a_client_and_back():
    """The receiver goes on when it has them; the sender need not wait."""
    line = timeline()
    line.step({0: 1}, 0, CROSSING)
    served, done = line.servers[0, 0], line.clients[0]
    line.hand_over(None, 1, num_bytes=160)
    assert line.clients[1] == pytest.approx(served + 0.5 + 8)
    line.hand_over(0, None, num_bytes=1000)
    assert line.servers[0, 0] == pytest.approx(done + 0.5 + 100)
    assert line.clients[0] == done


def test_clients_of_different_depth_join_at_the_server():
    """Client 0 leaves the second stretch to the server, client 1 computes it itself."""
    at_client, at_server = Stage("client", 0), Stage("server", 0)
    routes = {
        0: [at_client, at_server._replace(is_cut=False), at_server],
        1: [at_client._replace(is_cut=False), at_client, at_server],
    }
    work = [Work(10, 20), Work(200, 400), Work(100, 200)]
    line = Timeline(system(), routes[0], work, lambda k: (routes[k], work))
    line.step({0: 1, 1: 1}, 0, [(40, 20), (80, 40)])
    shallow = 1 + 0.5 + 4  # its forward, then what it sends
    deep = (10 + 200) / 20 + 0.5 + 4
    joined = max(shallow + 200 / 100, deep)
    back = joined + (2 * 100 + 2 * 200) / 100
    assert line.clients[1] == pytest.approx(back + 0.5 + 2 + (400 + 20) / 20)
    assert line.clients[0] == pytest.approx(back + 400 / 100 + 0.5 + 1 + 2)
    assert line.servers == {(0, 0): pytest.approx(back + 400 / 100)}
