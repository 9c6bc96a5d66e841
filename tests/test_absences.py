"""Clients that go away: the run goes on, and one process can replay what happened."""

import threading

import pytest
from killing import Killed
from protocols import fit
from pytorch_lightning import Callback
from test_grpc import (
    BUILDING,
    NUM_CLIENTS,
    Run,
    assert_equal_states,
    before,
    states_of,
)

from split_lightning import Engine
from split_lightning.callbacks import ResumeCheckpoint
from split_lightning.engines.grpc_sites import GrpcSites
from split_lightning.engines.remote import SiteAbsent
from split_lightning.system import Availability
from split_lightning.system.absences import Absences

DEADLINE = 1.5  # seconds; an absence by chance is in the record like any other


class Return(Callback):
    """Has a client return before a round, and waits until it is connected."""

    def __init__(self, sites, number, round_index, comes_back):
        self.sites, self.comes_back = sites, comes_back
        self.number, self.round_index = number, round_index

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.round_index - 1:
            self.comes_back()
            while f"client-{self.number}" not in self.sites.connected():
                pass


class RunWithAbsences(Run):
    """A run over gRPC whose clients may go away."""

    def start(self, number, port, failing=()):
        thread = threading.Thread(target=self.serve, args=(number, port, failing))
        thread.start()
        self.threads.append(thread)

    def serve(self, number, port, failing=()):
        """Serves as a client, until it is killed for good."""
        with BUILDING:
            client, answers = self.client(number, port)
        for fail in failing:
            fail(client, answers)
        try:
            client.serve(answers, self.at_end)
        except BaseException:  # killed
            return

    def fit_with_those_there(self, failing, returns_in=None):
        """Trains; a round that a client leaves begins again without it."""
        record = Absences(self.folder / "absences.json")
        certificates = self.folder / "certs" / "server"
        sites = GrpcSites("127.0.0.1:0", certificates, DEADLINE, record)
        self.threads = []

        def start(port):
            self.port = port
            for number in range(NUM_CLIENTS):
                self.start(number, port, failing.get(number, ()))

        sites.start = start
        last = self.folder / "checkpoints" / "last.ckpt"
        try:
            for _ in range(12):
                with BUILDING:
                    _, module, data = self.make(Engine(sites=sites))
                callbacks = [ResumeCheckpoint(last.parent)]
                if returns_in is not None:
                    callbacks.append(Return(sites, *returns_in))
                try:
                    trainer = fit(
                        self.folder,
                        module,
                        data,
                        callbacks,
                        ckpt_path=last if last.exists() else None,
                    )
                    states = states_of(module)
                    module.end()
                except SiteAbsent as gone:
                    number = module.trainer.current_epoch
                    record.note(number, [gone.client_id])
                    continue
                return trainer, states, record
        finally:
            module.engine.close()
            for thread in self.threads:
                thread.join(30)
        raise AssertionError("the run does not end")


def replayed(run, record):
    """Returns the states of one process that replays a record."""
    _, module, data = run.make()
    data.availability = Availability(recorded=record)
    fit(run.folder / "local", module, data)
    return states_of(module)


def behind(method):
    """Kills a client at its first call behind one of a method."""

    def fail(client, answers):
        whole, called = answers._carry_out, []

        def carry_out(name, arguments):
            if method in called:
                raise Killed
            called.append(name)
            return whole(name, arguments)

        answers._carry_out = carry_out

    return fail


@pytest.mark.parametrize("name", ["round robin", "splitfed v1", "u-shaped", "fedavg"])
@pytest.mark.parametrize(
    "point",
    [
        pytest.param(before("step", 2), id="in the first round"),
        pytest.param(before("step", 9), id="at its last step"),
        pytest.param(behind("keep"), id="behind a round"),
    ],
)
def test_a_client_never_returns(tmp_path, name, point):
    """It is absent from the round that it left, and from all that follow.

    Behind a round in turn, only its site has the weights that others continue from.
    """
    run = RunWithAbsences(tmp_path, name)
    failing = {2: [point]}
    _, states, record = run.fit_with_those_there(failing)
    away = [number for number, clients in record.rounds.items() if 2 in clients]
    assert away
    assert away == [*range(away[0], 3)]
    assert_equal_states(states, replayed(run, record.path))


@pytest.mark.parametrize("name", ["round robin", "splitfed v1", "parallel"])
def test_a_client_returns(tmp_path, name):
    run = RunWithAbsences(tmp_path, name)
    failing = {1: [before("step", 1)]}

    def comes_back():
        run.start(1, run.port)

    _, states, record = run.fit_with_those_there(failing, (1, 2, comes_back))
    assert 1 in record.of(0)
    assert 1 in record.of(1)
    assert 1 not in record.of(2)
    assert_equal_states(states, replayed(run, record.path))


@pytest.mark.parametrize("name", ["round robin", "splitfed v1"])
def test_a_silent_client(tmp_path, name):
    """Its connection stays open; it answers long after the deadline."""
    run, goes_on = RunWithAbsences(tmp_path, name), threading.Event()

    def hang(client, answers):
        whole = answers._carry_out

        def carry_out(method, arguments):
            if method == "step" and not goes_on.is_set():
                goes_on.wait()
            return whole(method, arguments)

        answers._carry_out = carry_out

    _, states, record = run.fit_with_those_there({0: [hang]}, (0, 2, goes_on.set))
    assert 0 in record.of(0)
    assert 0 not in record.of(2)
    assert_equal_states(states, replayed(run, record.path))
