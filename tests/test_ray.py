"""Sites on a Ray cluster: equal weights, also where workers die."""

import os
import signal
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_vertical as vertical
import torch
from killing import Kill, Killed
from protocols import assert_equal, fit, make_data, make_split
from safetensors.torch import load_file
from test_train import command

from split_lightning import (
    Engine,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
)
from split_lightning.callbacks import ResumeCheckpoint
from split_lightning.engines.answers import Answers
from split_lightning.engines.journal import Journal
from split_lightning.engines.ray_cluster import RayCluster
from split_lightning.engines.ray_engine import ray_engine
from split_lightning.engines.ray_sites import RaySites

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")

U_SHAPED = {"cut_layer": [2, 5], "labels": "client"}
RUNS = {
    "splitfed v1": (SplitFedV1, {}),
    "parallel, u-shaped": (ParallelSplitLearning, U_SHAPED),
    "round robin, vertical": (RoundRobinWeightPassing, None),
}


def make(name, engine=None):
    make_protocol, options = RUNS[name]
    torch.manual_seed(2)
    protocol = make_protocol()
    if options is None:
        return vertical.made(engine=engine), vertical.make_data(protocol=protocol)
    module = make_split(**{"cut_layer": 2, **options}, engine=engine)
    return module, make_data(protocol=protocol)


class Deaths:
    """Kills a worker's process as it begins a call for the n-th time."""

    def __init__(self, worker, method, count, times=1):
        self.worker, self.method, self.count, self.times = worker, method, count, times

    def prepare(self, folder, name, answers):
        left = self.count
        whole = answers._carry_out

        def carry_out(method, arguments):
            nonlocal left
            left -= method == self.method
            if left == 0 and self._may_die(folder):
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(method, arguments)

        if name == self.worker:
            answers._carry_out = carry_out

    def _may_die(self, folder):
        died = len(list(folder.glob("died-*")))
        if died < self.times:
            (folder / f"died-{died}").touch()
        return died < self.times


def new_answers(run, folder, deaths, worker, clients):
    """Builds a site, in a worker's process."""
    module, data = make(run)
    data.prepare_data()
    data.setup("fit")
    site = module.as_site(data, data.protocol, len(clients))
    answers = Answers(site, Journal(folder / worker))
    if deaths is not None:
        deaths.prepare(folder, worker, answers)
    return answers, module.hello(data, range(data.num_clients))


def train(folder, run, deaths=None, built=None, **options):
    """Trains with clients on the cluster; returns what `result` does."""
    sites = RaySites(**{"starts": 3, "num_cpus": 0.5, **options.pop("sites", {})})
    sites.new_answers = partial(new_answers, built or run, folder, deaths)
    module, data = make(run, Engine(sites=sites))
    data.source = None  # the process with the Trainer has no data
    try:
        fit(folder, module, data, **options)
        return result(module)
    finally:
        module.engine.close()


def result(module):
    """Returns the weights of all parties that have some, and the traffic."""
    weights = [
        {
            own: store.weights_of(own)
            for own in {*store.names(), *(f"{role}/0" for role in store.roles)}
            if own in store.names() or any(store.common.values())
        }
        for store in module.engine.stores
    ]
    return weights, module.totals()


def assert_same(found, expected):
    assert found[1] == expected[1]
    for own, other in zip(found[0], expected[0], strict=True):
        assert own.keys() == other.keys()
        for name in own:
            assert_equal(own[name], other[name])


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests, on the loopback address."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
        monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')  # Ray believes it
        started = RayCluster()
        started.open(num_cpus=2)
        yield
        started.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The results of runs in one process, each computed once."""
    found = {}

    def run(name):
        if name not in found:
            module, data = make(name)
            fit(tmp_path_factory.mktemp("local"), module, data)
            found[name] = result(module)
        return found[name]

    return run


# Which worker dies, and before its how-manieth call of which method. NOTE a worker that
# starts imports Lightning, which takes most of the time here.
DEATHS = {
    "splitfed v1": Deaths("worker-0", "forward", 3),
    "parallel, u-shaped": Deaths("worker-1", "backward", 2),
    "round robin, vertical": None,
}


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_one_process(tmp_path, local, name):
    """Also where a worker dies in the middle of a round, and comes back."""
    deaths = DEATHS[name]
    assert_same(train(tmp_path, name, deaths), local(name))
    died = len(list(tmp_path.glob("died-*")))
    assert died == (0 if deaths is None else deaths.times)


def test_a_worker_that_dies_too_often_ends_the_run(tmp_path):
    deaths = Deaths("worker-0", "forward", 1, times=9)
    with pytest.raises(ConnectionError, match=r"worker-0 died 1 times\. .* Resume"):
        train(tmp_path, "splitfed v1", deaths, sites={"starts": 1, "workers": 1})


def test_another_configuration_is_refused(tmp_path):
    expected = r"worker-0 cannot take part: its `cut_layer` differs"
    with pytest.raises(ValueError, match=expected):
        train(tmp_path, "splitfed v1", built="parallel, u-shaped", sites={"workers": 1})


def test_the_process_with_the_trainer_dies_and_resumes(tmp_path, local):
    """The worker returns to the barrier of the checkpoint, in mid-round."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    resume = ResumeCheckpoint(last.parent, every_n_batches=2)
    one = {"sites": {"workers": 1}}
    with pytest.raises(Killed):
        train(tmp_path, "splitfed v1", callbacks=[resume, Kill(5)], **one)
    found = train(tmp_path, "splitfed v1", callbacks=[resume], ckpt_path=last, **one)
    assert_same(found, local("splitfed v1"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, "`workers` to be at least 1, but got 0"),
        ({"workers": 4}, ValueError, r"at most the number of clients \(3\), but got 4"),
        ({"address": "nowhere"}, ValueError, "`address` to be null, auto or HOST:PORT"),
        ({"address": "ray://a:1"}, ValueError, "auto or HOST:PORT"),
        ({"address": "127.0.0.1:1"}, ConnectionError, "none answers at '127.0.0.1:1'"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path, "splitfed v1", sites=options)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "split-lightning\[ray\]"'):
        ray_engine()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_worker_computes_on_the_gpu_that_is_reserved(tmp_path, monkeypatch, capsys):
    """Or says that it finds none."""
    options = ["data=digits", "num_clients=2", "rounds=1", "logger=none", "engine=ray"]
    options += ["engine.num_cpus=0.5", "engine.num_gpus=1", "engine.workers=1"]
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, *options)
    message = capsys.readouterr().err
    assert "worker-0 could not start: ValueError: Expected a GPU" in message
    assert "reserve GPUs with `engine.num_gpus`" in message


def test_the_command_trains_the_networks_of_one_process(tmp_path, monkeypatch):
    options = ["data=digits", "protocol=round_robin", "num_clients=3", "rounds=2"]
    options += ["batch_size=256", "threads=1", "logger=none"]
    for engine in (["engine=local"], ["engine=ray", "engine.num_cpus=0.5"]):
        folder = tmp_path / engine[0]
        folder.mkdir()
        (run,) = command(monkeypatch, folder, *options, *engine)
        networks = {path.name: load_file(path) for path in run.glob("*.safetensors")}
        if engine == ["engine=local"]:
            expected = networks
    assert (
        networks.keys()
        == expected.keys()
        == {"client.safetensors", "server.safetensors"}
    )
    for name, network in networks.items():
        assert_equal(network, expected[name])
