"""Sites over gRPC: equal weights, also where parties die; strangers are refused."""

import socket
import threading

import pytest
import torch
from killing import Kill, Killed
from protocols import assert_equal, fit, make_data, make_split, make_unsplit
from pytorch_lightning import Callback

from split_lightning import (
    Engine,
    FedAvg,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
)
from split_lightning.callbacks import ResumeCheckpoint
from split_lightning.engines.answers import Answers
from split_lightning.engines.certificates import write_certificates
from split_lightning.engines.grpc_client import GrpcClient
from split_lightning.engines.grpc_sites import GrpcSites
from split_lightning.engines.journal import Journal
from split_lightning.engines.link import Room, SiteError

U_SHAPED = {"cut_layer": [2, 5], "labels": "client"}
RUNS = {
    "round robin": (RoundRobinWeightPassing, {}),
    "splitfed v1": (SplitFedV1, {}),
    "parallel": (ParallelSplitLearning, {}),
    "u-shaped": (RoundRobinWeightPassing, U_SHAPED),
    "u-shaped in parallel": (ParallelSplitLearning, U_SHAPED),
    "fedavg": (FedAvg, {}),
}
NUM_CLIENTS = 3
BUILDING = threading.Lock()  # torch has one seed, and traces in one thread


class Run:
    """What the processes of a run have in common."""

    def __init__(self, folder, name):
        self.folder = folder
        self.make_protocol, self.options = RUNS[name]
        names = [f"client-{client}" for client in range(NUM_CLIENTS)]
        write_certificates(folder / "certs", names, ["127.0.0.1"])

    def make(self, engine=None):
        protocol = self.make_protocol()
        if protocol.unsplit_at:
            module = make_unsplit(engine=engine)
        else:
            module = make_split(**{"cut_layer": 2, **self.options}, engine=engine)
        return protocol, module, make_data(NUM_CLIENTS, protocol)

    def client(self, number, port):
        """Returns the client's end of the stream, and a function that begins it."""
        protocol, module, data = self.make()
        data.prepare_data()
        data.setup("fit")
        site = module.as_site(data, protocol, num_hosted=1)
        name = f"client-{number}"
        answers = Answers(site, Journal(self.folder / name))
        certificates = self.folder / "certs" / name
        server = f"127.0.0.1:{port}"
        return GrpcClient(
            name, server, certificates, module.hello(data, [number]), 30
        ), answers

    def serve(self, number, port, failing=()):
        """Serves as a client; a process that is killed begins again."""
        for fail in [*failing, None]:
            with BUILDING:
                client, answers = self.client(number, port)
            if fail is not None:
                fail(client, answers)
            try:
                client.serve(answers, self.at_end)
            except Killed:
                continue
            except ValueError as error:
                self.lost = str(error)
            return

    def at_end(self, final):
        """Is called at a client, in the end."""

    def begin(self, port, failing=None):
        """Begins the clients, in threads."""
        self.threads = []
        for number in range(NUM_CLIENTS):
            own = (failing or {}).get(number, ())
            thread = threading.Thread(target=self.serve, args=(number, port, own))
            thread.start()
            self.threads.append(thread)

    def fit(self, port=0, failing=None, room=None, **options):
        """Trains with a server here, until the clients have ended."""
        sites = GrpcSites(f"127.0.0.1:{port}", self.folder / "certs" / "server")
        sites.room = Room() if room is None else Room(room)
        if port == 0:
            sites.start = lambda port: self.begin(port, failing)
        with BUILDING:
            _, module, data = self.make(Engine(sites=sites))
        data.source = None  # the server has no data
        try:
            trainer = fit(self.folder, module, data, **options)
            states = states_of(module)
            module.end()
            for thread in self.threads:
                thread.join(30)
                assert not thread.is_alive()
        finally:
            module.engine.close()
        return trainer, states


def states_of(module):
    """Returns the weights of all parties that have some, and the common ones."""
    return [
        {
            own: store.weights_of(own)
            for own in {*store.names(), *(f"{role}/0" for role in store.roles)}
            if own in store.names() or any(store.common.values())
        }
        for store in module.engine.stores
    ]


def assert_equal_states(states, expected):
    for own, other in zip(states, expected, strict=True):
        assert own.keys() == other.keys()
        for name in own:
            assert_equal(own[name], other[name])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The final weights of each run in one process, computed once."""
    found = {}

    def states(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("local")
            _, module, data = Run(folder, name).make()
            trainer = fit(folder, module, data)
            found[name] = states_of(module), trainer.callback_metrics, module.totals()
        return found[name]

    return states


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_one_process(tmp_path, local, name):
    expected, metrics, totals = local(name)
    trainer, states = Run(tmp_path, name).fit()
    assert_equal_states(states, expected)
    assert trainer.lightning_module.totals() == totals
    for key, value in metrics.items():
        torch.testing.assert_close(trainer.callback_metrics[key], value, msg=key)


def before(method, count):
    """Kills a client as it begins a call for the n-th time."""

    def fail(client, answers):
        whole, left = answers._carry_out, [count]

        def carry_out(called, arguments):
            left[0] -= called == method
            if left[0] == 0:
                raise Killed
            return whole(called, arguments)

        answers._carry_out = carry_out

    return fail


def after(method, count):
    """Kills a client when it has carried a call out, and saved nothing of it."""

    def fail(client, answers):
        whole, left = answers._carry_out, [count]

        def carry_out(called, arguments):
            result = whole(called, arguments)
            left[0] -= called == method
            if left[0] == 0:
                raise Killed
            return result

        answers._carry_out = carry_out

    return fail


def journal(count, saves):
    """Kills a client as it saves its journal, or as soon as that is saved."""

    def fail(client, answers):
        whole, left = answers.journal.save, [count]

        def save(name, state):
            left[0] -= name == "journal"
            if left[0] == 0 and not saves:
                raise Killed
            whole(name, state)
            if left[0] == 0:
                raise Killed

        answers.journal.save = save

    return fail


def sent(count):
    """Kills a client when it has sent the n-th reply."""

    def fail(client, answers):
        whole, left = answers.answer, [count]

        def answer(data):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return whole(data)

        answers.answer = answer

    return fail


POINTS = {
    "before a forward pass": before("forward", 3),
    "after a forward pass": after("forward", 4),
    "before a step": before("step", 2),
    "after a step, before it is saved": after("step", 3),
    "as the journal is written": journal(4, saves=False),
    "after it is written": journal(4, saves=True),
    "after a reply": sent(9),
    "at once": sent(0),
    "as weights are asked for": before("read", 1),
}
# Here clients save after each step, else when they have computed for a while.
AS_SAVED = ["as the journal is written", "after it is written", "before a step"]
SOME = ["round robin", "splitfed v1", "parallel", "u-shaped"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", SOME)
def test_a_client_dies_and_comes_back(tmp_path, local, name, point):
    expected, _, totals = local(name)
    failing = {1: [POINTS[point]], 2: [POINTS[point], sent(20)]}
    room = 0 if point in AS_SAVED else None
    trainer, states = Run(tmp_path, name).fit(failing=failing, room=room)
    assert_equal_states(states, expected)
    assert trainer.lightning_module.totals() == totals


@pytest.mark.parametrize("batches", [0, 1, 4, 7])
@pytest.mark.parametrize("name", SOME)
def test_the_server_dies_and_resumes(tmp_path, local, name, batches):
    """All return to the barrier of its last checkpoint; here one in mid-round."""
    expected, _, totals = local(name)
    run, port = Run(tmp_path, name), free_port()
    run.begin(port, failing={1: [before("forward", 5)]})
    last = tmp_path / "checkpoints" / "last.ckpt"
    resume = ResumeCheckpoint(last.parent, every_n_batches=2)
    with pytest.raises(Killed):
        run.fit(port, callbacks=[resume, Kill(batches)])
    assert last.exists() == (batches >= 2)
    resume = ResumeCheckpoint(last.parent, every_n_batches=2)
    ckpt_path = last if last.exists() else None
    trainer, states = run.fit(port, callbacks=[resume], ckpt_path=ckpt_path)
    assert_equal_states(states, expected)
    assert trainer.lightning_module.totals() == totals


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class KillAsKept(Callback):
    """Kills the server when sites have saved barriers, and no checkpoint names one."""

    def __init__(self, after, times):
        self.left, self.times = after, times

    def setup(self, trainer, pl_module, stage):
        whole = pl_module.engine.sites.keep

        def keep():
            self.left -= 1
            if self.left:
                return whole()
            for _ in range(self.times):
                whole()
            raise Killed

        pl_module.engine.sites.keep = keep


def test_the_server_dies_again_before_its_next_checkpoint(tmp_path, local):
    """Clients still have the barrier of the checkpoint that there is."""
    expected, _, totals = local("round robin")
    run, port = Run(tmp_path, "round robin"), free_port()
    run.begin(port)
    last = tmp_path / "checkpoints" / "last.ckpt"
    for after, times in ((3, 1), (1, 4), (1, 4)):
        resume = ResumeCheckpoint(last.parent, every_n_batches=2)
        path = last if last.exists() else None
        with pytest.raises(Killed):
            run.fit(port, callbacks=[resume, KillAsKept(after, times)], ckpt_path=path)
    resume = ResumeCheckpoint(last.parent, every_n_batches=2)
    trainer, states = run.fit(port, callbacks=[resume], ckpt_path=last)
    assert_equal_states(states, expected)
    assert trainer.lightning_module.totals() == totals


def test_a_client_without_the_barrier_ends_the_run(tmp_path):
    run, port = Run(tmp_path, "round robin"), free_port()
    run.begin(port)
    last = tmp_path / "checkpoints" / "last.ckpt"
    resume = ResumeCheckpoint(last.parent, every_n_batches=2)
    with pytest.raises(Killed):
        run.fit(port, callbacks=[resume, Kill(5)])
    for file in (tmp_path / "client-1").glob("barrier-*"):
        file.unlink()
    resume = ResumeCheckpoint(last.parent, every_n_batches=2)
    with pytest.raises(SiteError, match="client-1: Expected the site to have"):
        run.fit(port, callbacks=[resume], ckpt_path=last)
    run.threads[1].join(30)
    assert "has none. Begin the run anew" in run.lost


class DiesAtTheEnd(Run):
    """A client is killed as it takes its part of the network."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.finals = []

    def at_end(self, final):
        self.finals.append(final)
        if len(self.finals) == 1:
            raise Killed


def test_a_client_dies_at_the_end_and_gets_its_part(tmp_path, local):
    expected, _, _ = local("splitfed v1")
    run = DiesAtTheEnd(tmp_path, "splitfed v1")
    again = [lambda client, answers: None]
    _, states = run.fit(failing=dict.fromkeys(range(NUM_CLIENTS), again))
    assert_equal_states(states, expected)
    assert len(run.finals) == NUM_CLIENTS + 1
    assert run.finals.count(run.finals[0]) == 2
