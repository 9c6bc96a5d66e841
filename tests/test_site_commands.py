"""The commands of a run whose parties are apart: certificates, server, client."""

import logging
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_train import command

from split_lightning.cli import engine_keys
from split_lightning.cli.certificates import main as certificates
from split_lightning.cli.client import main as client
from split_lightning.cli.server import main as server
from split_lightning.cli.shared_keys import joined_words, shared_words
from split_lightning.cli.train import main as train
from split_lightning.credentials import read_credentials
from split_lightning.engines.grpc_engine import grpc_engine
from split_lightning.engines.grpc_sites import GrpcSites
from split_lightning.plan import main as plan

PREFIX = "split-lightning: error: "
NUM_CLIENTS = 3
PARTIES = [f"client/{number}" for number in range(NUM_CLIENTS)]


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    """The certificates of a server on this machine and of three clients."""
    folder = tmp_path_factory.mktemp("run") / "certs"
    written = ["--clients", str(NUM_CLIENTS), "--host", "127.0.0.1", "--host", "::1"]
    certificates([*written, "--out", str(folder)])
    return folder


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Runs a command in this process; returns the one line with which it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", [])  # of commands before

    def run(main, *words):
        monkeypatch.setattr("sys.argv", ["split-lightning", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith(PREFIX)
        assert message.count("\n") == 1
        return message.removeprefix(PREFIX)

    return run


# Certificates


def test_each_party_gets_a_folder_that_has_its_key_alone(tmp_path, capsys):
    certificates(["--clients", "2", "--host", "server.example", "--out", str(tmp_path)])
    names = ["server", "client-0", "client-1"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[:-1] == [str(tmp_path / name) for name in names]
    for name in names:
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"authority.crt", f"{name}.crt", f"{name}.key"}
        assert (tmp_path / name / f"{name}.key").stat().st_mode & 0o777 == 0o600
        read_credentials(tmp_path / name, name)
    authorities = {(tmp_path / name / "authority.crt").read_bytes() for name in names}
    assert len(authorities) == 1


def test_parties_of_one_client_have_certificates_of_their_own(tmp_path):
    certificates(["--clients", "2", "--holders", "2", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("server", "client-0.0", "client-0.1", "client-1.0", "client-1.1")
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--clients 0", "Expected --clients to be at least 1, but got 0."),
        ("--clients 2 --holders 0", "Expected --holders to be at least 1"),
        ("--clients 2 --days 0", "Expected --days to be above 0"),
        ("--clients 2 --days nan", "Expected --days to be above 0"),
        ("--clients 2 --days 1e9", "at most 36500"),
        ("--clients 2 --host server.example:8443", "without a port"),
        ("--clients 2 --host 0.0.0.0", "at which clients reach"),
        ("--clients 2 --host a_b..c", "but got 'a_b..c'"),
        ("--cleints 2", "`--cleints`. Did you mean `--clients`?"),
        ("clients=2", "`clients=2`. Did you mean `--clients 2`?"),
        ("--nowhere", "Options: --clients, --host, --out"),
        ("--clients 2 --out file", "Cannot write to file"),
        ("--clients 2 --out full", "was not kept: new ones would go with none"),
    ],
)
def test_what_certificates_cannot_be_written_for(refused, tmp_path, words, said):
    (tmp_path / "file").touch()
    (tmp_path / "full" / "server").mkdir(parents=True)
    (tmp_path / "full" / "server" / "server.key").write_text("a key")
    message = refused(certificates, *words.split())
    assert said in message
    assert len(list(tmp_path.rglob("*"))) == 4  # nothing was written
    assert (tmp_path / "full" / "server" / "server.key").read_text() == "a key"


def test_a_folder_that_waits_for_certificates_is_filled(tmp_path):
    """As a container's volumes are: folders, and no files."""
    (tmp_path / "certs" / "server").mkdir(parents=True)
    certificates(["--clients", "1", "--out", str(tmp_path / "certs")])
    assert (tmp_path / "certs" / "server" / "server.key").is_file()


def damaged(folder):
    (folder / "server.crt").write_text("-----BEGIN CERTIFICATE-----\nabc\n")


def of_another(folder):
    """A key that is not that of the certificate."""
    certificates(["--clients", "1", "--out", str(folder.parent / "other")])
    (folder.parent / "other" / "server" / "server.key").replace(folder / "server.key")


def unreadable(folder):
    (folder / "server.crt").unlink()
    (folder / "server.crt").mkdir()


SPOILED = {
    "no key": (lambda folder: (folder / "server.key").unlink(), "has no server.key"),
    "no authority": (
        lambda folder: (folder / "authority.crt").unlink(),
        "has no authority.crt",
    ),
    "a damaged certificate": (damaged, "is damaged, or not of this party"),
    "the key of another": (of_another, "is damaged, or not of this party"),
    "unreadable": (unreadable, "a server.crt that cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_credentials_that_cannot_be_used_are_named(refused, tmp_path, capsys, name):
    spoil, said = SPOILED[name]
    certificates(["--clients", "1", "--out", str(tmp_path / "certs")])
    spoil(tmp_path / "certs" / "server")
    capsys.readouterr()
    listen = "engine.listen=127.0.0.1:0"
    message = refused(server, listen, "engine.certificates=certs/server")
    assert "`engine.certificates`" in message
    assert said in message
    assert "split-lightning certificates --clients" in message
    assert not (tmp_path / "runs").exists()


# Words that a server, a client and training refuse

LISTEN = "engine.listen=127.0.0.1:0"
SERVER_MISTAKES = {
    "": ["`engine.listen`", "engine.listen=0.0.0.0:8443"],
    "engine.listen=8443": ["`engine.listen` to be HOST:PORT", "but got 8443"],
    "engine.listen=0.0.0.0:port": ["HOST:PORT", "'0.0.0.0:port'"],
    "engine.listen=0.0.0.0:99999": ["HOST:PORT", "'0.0.0.0:99999'"],
    LISTEN: ["`engine.certificates` to have a value", "certs/server"],
    f"{LISTEN} engine.certificates=no": ["no is no folder", "server"],
    f"{LISTEN} engine.deadline=0": ["`engine.deadline`", "above 0, or null", "got 0"],
    f"{LISTEN} engine.server=a:1": ["`engine.server=a:1` would change nothing"],
    f"{LISTEN} engine.patience=3": ["split-lightning client"],
    f"{LISTEN} engine.lisen=1": ["`engine.listen`"],
    "engine=ray": ["`engine=ray`", "split-lightning train engine=ray"],
    f"{LISTEN} -m": ["one run", "split-lightning train -m engine=grpc"],
    "num_client=3": ["`num_client=3`", "Did you mean `num_clients`?"],
    f"{LISTEN} rounds=0": ["`rounds`", "at least 1"],
}


@pytest.mark.parametrize("typed", SERVER_MISTAKES)
def test_a_mistake_of_a_server_gets_one_line(refused, tmp_path, typed):
    message = refused(server, *typed.split())
    for words in SERVER_MISTAKES[typed]:
        assert words in message
    assert not (tmp_path / "runs").exists()


SERVER = "engine.server=127.0.0.1:1"
CLIENT_MISTAKES = {
    "": ["`engine.server` to have a value", "engine.server=server.example:8443"],
    "engine.server=somewhere": ["`engine.server` to be HOST:PORT", "'somewhere'"],
    "engine.server=a:0": ["`engine.server` to be HOST:PORT", "'a:0'"],
    SERVER: ["`engine.certificates`", "engine.certificates=certs/client-0"],
    f"{SERVER} engine.certificates=no": ["no is no folder", "client-0"],
    f"{SERVER} engine.patience=-1": ["`engine.patience`", "at least 0"],
    f"{SERVER} engine.own_data=3": ["`engine.own_data` to be true or false"],
    f"{SERVER} {LISTEN}": ["would change nothing", "split-lightning server"],
    f"{SERVER} engine=local": ["`engine=local`", "split-lightning train"],
    "num_client=3": ["`num_client=3`", "Did you mean `num_clients`?"],
    "engine.serve=a:1": ["Did you mean `engine.server`?"],
}


@pytest.mark.parametrize("typed", CLIENT_MISTAKES)
def test_a_mistake_of_a_client_gets_one_line(refused, tmp_path, typed):
    message = refused(client, "--id", "0", *typed.split())
    for words in CLIENT_MISTAKES[typed]:
        assert words in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], ["--id", "x"], ["--id", "-1"], ["id=3"]])
def test_a_client_says_which_it_is(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        client(words)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: ")
    assert "--id" in message.splitlines()[-1]


def test_the_help_of_a_client_names_its_keys(capsys):
    with pytest.raises(SystemExit) as stopped:
        client(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in engine_keys._OF_CLIENTS:
        assert f"\nengine.{name}=" in shown


TRAIN_MISTAKES = {
    "engine=grpc engine.certificates=x": ["without `engine.listen`"],
    "engine=grpc engine.folder=x": ["would change nothing", "split-lightning client"],
    "engine.workers=2": ["Options with this key: engine=ray"],
    "engine=nowhere": ["Options of `engine`: grpc, local, ray"],
}
RAY_MISTAKES = {
    "engine.workers=0": ["`engine.workers`", "at least 1", "got 0"],
    "engine.workers=1.5": ["`engine.workers`", "an integer", "got 1.5"],
    "engine.num_cpus=abc": ["`engine.num_cpus`", "a number", "'abc'"],
    "engine.num_cpus=nan": ["`engine.num_cpus`", "a number", "nan"],
    "engine.num_cpus=-1": ["`engine.num_cpus`", "at least 0", "-1"],
    "engine.num_gpus=-1": ["`engine.num_gpus`", "at least 0", "-1"],
    "engine.address=3": ["`engine.address`", "auto"],
}


@pytest.mark.parametrize("typed", TRAIN_MISTAKES)
def test_a_mistake_about_an_engine_gets_one_line(refused, typed):
    message = refused(train, *typed.split())
    for words in TRAIN_MISTAKES[typed]:
        assert words in message


def test_a_sweep_has_no_server(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["-m", "engine=grpc", LISTEN, "seed=0,1"]
    monkeypatch.setattr("sys.argv", ["split-lightning", *typed])
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count(f"{PREFIX}Expected `engine.listen` to be null in a sweep") == 2
    assert "Traceback" not in message


@pytest.mark.parametrize("typed", RAY_MISTAKES)
def test_a_mistake_about_ray_gets_one_line(refused, monkeypatch, typed):
    monkeypatch.setattr(engine_keys, "find_spec", lambda name: name)  # as if installed
    message = refused(train, "engine=ray", typed)
    for words in RAY_MISTAKES[typed]:
        assert words in message


@pytest.mark.parametrize(
    ("main", "typed", "package", "extra"),
    [
        (train, ["engine=ray"], "ray", "ray"),
        (train, ["engine=grpc"], "grpc", "grpc"),
        (train, ["engine=grpc"], "cryptography", "grpc"),
        (server, [LISTEN], "grpc", "grpc"),
        (client, ["--id", "0", SERVER], "grpc", "grpc"),
    ],
)
def test_a_missing_package_is_named(refused, monkeypatch, main, typed, package, extra):
    there = {"grpc", "cryptography", "ray"} - {package}
    monkeypatch.setattr(engine_keys, "find_spec", lambda n: n if n in there else None)
    message = refused(main, *typed)
    assert f"needs the package {package}, which is not installed" in message
    assert f'pip install "split-lightning[{extra}]"' in message


def test_certificates_need_a_package(refused, monkeypatch):
    monkeypatch.setattr("split_lightning.cli.certificates.find_spec", lambda name: None)
    message = refused(certificates, "--clients", "2")
    assert 'pip install "split-lightning[grpc]"' in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"listen": "0.0.0.0"}, "`listen` to be HOST:PORT"),
        ({"listen": "a:1"}, "`certificates` to be a folder"),
        ({"deadline": 0}, "`deadline` to be a number of seconds above 0"),
        ({"patience": "long"}, "`patience` to be a number"),
    ],
)
def test_the_engine_itself_names_its_arguments(options, said):
    with pytest.raises(ValueError, match=f"Expected argument {said}"):
        grpc_engine(**options)


def test_a_plan_is_that_of_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    plan(["num_clients=3"])
    expected = capsys.readouterr().out
    plan(["num_clients=3", "engine=grpc"])
    assert capsys.readouterr().out == expected


# What a server tells its clients


@pytest.mark.parametrize(
    "word",
    [
        *("+experiment=rr10", "data=digits", "data/partitioner=dirichlet", "rounds=3"),
        *("model.cut_layer=layer1.0", "topology.cut_layers=[1,4]", "seed=0"),
        *("optimizer.client.lr=1e-3", "protocol.shuffle=true", "local_steps=null"),
        *("+data.partitioner.alpha=0.5", "model.cut_layer='conv1'"),
    ],
)
def test_what_decides_how_all_train_is_shared(word):
    assert shared_words([word]) == [word]
    assert joined_words([word], []) == [word]


@pytest.mark.parametrize(
    "word",
    [
        # code
        *("model.network._target_=os.system", "+model.network={_target_: os.getcwd}"),
        *("+data.source._args_=[ls]", "model/x/_target_=os.system"),
        # files and addresses
        *("data.root=/etc", "model.weights=x", "data.x=../x", "data=../x", "name=a/b"),
        *("engine.folder=/", "engine=ray", "ckpt_path=last", "spill_to=x"),
        *("output_dir=/", "hydra.run.dir=/", "trainer.default_root_dir=x"),
        # what is computed where it is read
        *("seed=${oc.env:SECRET}", "name=${oc.env:SECRET}", "model.x=[${seed}]"),
        # what is not of a run's keys, or no word at all
        *("callbacks=figures", "logger=csv", "threads=8", "-m", "--config-dir=x"),
        *("seed", "seed=1,2", "~data", "=1", "", "data@x=1", "seed=[1"),
    ],
)
def test_the_rest_is_of_each_party(word):
    assert shared_words([word]) == []
    with pytest.raises(ValueError, match="takes from no server"):
        joined_words([word], [])


class Done(Exception):
    """Ends the waiting of a server."""


def as_server_listens(certs, act, words=(), agreed=None, parties=PARTIES):
    """Does something while a server waits for its clients, with what it is told."""
    sites = GrpcSites("127.0.0.1:0", certs / "server")
    sites.words = words

    def start(port):
        act(port)
        raise Done

    sites.start = start
    try:
        with pytest.raises(Done):
            sites.meet(parties, agreed or {})
    finally:
        sites.close()


def as_client(certs, number, port):
    own = f"engine.certificates={certs / f'client-{number}'}"
    return ["--id", str(number), f"engine.server=127.0.0.1:{port}", own]


def test_a_client_takes_no_code_from_a_server(refused, certs):
    said = []

    def act(port):
        said.append(refused(client, *as_client(certs, 1, port)))

    as_server_listens(certs, act, words=["model.network._target_=os.system"])
    assert "`model.network._target_=os.system`" in said[0]
    assert "takes from no server" in said[0]


def test_a_client_that_is_not_in_the_run_prints_the_servers_line(
    refused, tmp_path, capsys
):
    certs, said = tmp_path / "certs", []
    certificates(["--clients", "4", "--host", "127.0.0.1", "--out", str(certs)])
    capsys.readouterr()

    def act(port):
        said.append(refused(client, *as_client(certs, 3, port)))

    as_server_listens(certs, act)
    known = "client-0, client-1, client-2"
    assert (
        f"refuses client-3: there is no site 'client-3' in this run ({known})"
        in (said[0])
    )
    assert not (tmp_path / "runs").exists()  # it has built nothing


def test_a_key_that_differs_is_named(refused, monkeypatch, certs):
    said = []

    def act(port):
        words = as_client(certs, 0, port)
        said.append(refused(client, *words, "seed=5"))

    as_server_listens(certs, act, words=["seed=4"], agreed={"seed": "4"})
    assert "refuses client-0: its `seed` differs from the server's" in said[0]


def test_a_client_without_a_server_gives_up(refused, certs):
    words = as_client(certs, 0, free_port())
    message = refused(client, *words, "engine.patience=0")
    assert "has not answered for 0 s" in message
    assert "split-lightning certificates --host" in message


def test_an_authority_of_another_run_is_none(refused, certs, tmp_path, capsys):
    """The client waits for a server that has a certificate of the same authority."""
    other, said = tmp_path / "other", []
    certificates(["--clients", "1", "--host", "127.0.0.1", "--out", str(other)])
    capsys.readouterr()

    def act(port):
        words = as_client(other, 0, port)
        said.append(refused(client, *words, "engine.patience=0"))

    as_server_listens(certs, act)
    assert "from the same authority as that of client-0" in said[0]


def test_a_port_in_use_is_named(refused, certs, tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        own = f"engine.certificates={certs / 'server'}"
        message = refused(server, f"engine.listen={address}", own, "logger=none")
    assert f"Cannot listen at {address} (`engine.listen`): Address already" in message


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


# Holders

SHAPE = ["data.num_classes=3", "data.in_channels=1", "data.image_size=8"]
VERTICAL = ["num_clients=1", "rounds=1", "topology=vertical", *SHAPE]
HOLDER = """
import torch

class Half:
    classes = ("a", "b", "c")

    def __init__(self, part=None):
        self.part = part

    def load(self, train):
        drawn = torch.Generator().manual_seed(int(train))
        images = torch.rand(60, 1, 8, 8, generator=drawn)
        labels = torch.randint(0, 3, (60,), generator=drawn)
        if self.part is None:
            return images, labels
        if self.part == "right alone":
            return images[..., 4:], labels
        if self.part == "left":  # has the labels
            images[..., 4:] = 0
            return images, labels
        images[..., :4] = 0
        return images, torch.zeros_like(labels)
"""
HALF = ["data=custom", "data.source._target_=half.Half"]


@pytest.fixture(scope="module")
def holders(tmp_path_factory):
    """A folder with a source for each holder, and certificates."""
    folder = tmp_path_factory.mktemp("holders")
    (folder / "half.py").write_text(HOLDER)
    words = "--clients 1 --holders 2 --host 127.0.0.1 --out"
    certificates([*words.split(), str(folder / "certs")])
    return folder


def as_holder(folder, number, port, part):
    own = f"engine.certificates={folder / 'certs' / f'client-0.{number}'}"
    words = ["--id", f"0.{number}", f"engine.server=127.0.0.1:{port}", own, *HALF]
    return [*words, "engine.own_data=true", f"+data.source.part={part}"]


def test_a_source_of_a_part_alone_is_told_the_whole_shape(
    refused, monkeypatch, holders
):
    monkeypatch.syspath_prepend(holders)
    said = []

    def act(port):
        words = as_holder(holders, 1, port, "'right alone'")
        said.append(refused(client, *words))

    parties = ["client/0.0", "client/0.1"]
    as_server_listens(holders / "certs", act, words=VERTICAL, parties=parties)
    assert "whole shape (1, 8, 8), with zeros where this party has no" in said[0]
    assert "but got shape (1, 8, 4)" in said[0]


# Real processes

NUM_PROCESSES = 2
RUN = [f"num_clients={NUM_PROCESSES}", "rounds=2", "batch_size=128"]
QUIET = ["trainer.enable_progress_bar=false", "logger=none"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The folder of the same run in one process."""
    folder = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as monkeypatch:
        (run,) = command(monkeypatch, folder, *RUN, "logger=none")
    return run


def started(folder, *words):
    """Starts a command in a process, which writes to a file; returns it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    module = [sys.executable, "-m", f"split_lightning.{words[0]}", *words[1:]]
    name = "-".join(words[:3]) if words[0] == "client" else words[0]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            module, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def ended(processes, folder):
    """Waits for processes, all of which have to end well."""
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
    assert not any(codes), logs
    return logs


def assert_equal_files(file, expected):
    found, weights = load_file(file), load_file(expected)
    assert found.keys() == weights.keys()
    for name in weights:
        assert torch.equal(found[name], weights[name]), name


def test_a_server_and_its_clients_train_as_one_process_does(tmp_path, local):
    """The words of a client name neither the run's keys nor its engine."""
    words = f"certificates --clients {NUM_PROCESSES} --host 127.0.0.1 --out certs"
    ended([started(tmp_path, *words.split())], tmp_path)
    port = free_port()
    listen = [f"engine.listen=127.0.0.1:{port}", "engine.certificates=certs/server"]
    run = ["hydra.run.dir=server", *RUN, *QUIET]
    parties = [started(tmp_path, "server", *listen, *run)]
    for number in range(NUM_PROCESSES):
        own = [f"engine.server=127.0.0.1:{port}"]
        own += [f"engine.certificates=certs/client-{number}"]
        parties.append(started(tmp_path, "client", "--id", str(number), *own))
    logs = ended(parties, tmp_path)

    assert logs.count("has the server's keys: " + " ".join(RUN)) == NUM_PROCESSES
    server_files = {path.name for path in (tmp_path / "server").glob("*.safetensors")}
    assert server_files == {"server.safetensors"}
    assert_equal_files(
        tmp_path / "server" / "server.safetensors", local / "server.safetensors"
    )
    for number in range(NUM_PROCESSES):
        own = tmp_path / "runs" / "digits" / f"client-{number}" / "client.safetensors"
        assert_equal_files(own, local / "client.safetensors")


def test_holders_with_parts_of_their_own_train_as_one_process_does(
    monkeypatch, holders
):
    """Each has zeros where it has no features; one has the labels."""
    (holders / "local").mkdir()
    monkeypatch.syspath_prepend(holders)
    run = [*VERTICAL, "data=custom", "batch_size=16"]
    words = [*run, *HALF, "logger=none"]
    (local,) = command(monkeypatch, holders / "local", *words)
    port = free_port()
    listen = [f"engine.listen=127.0.0.1:{port}", "engine.certificates=certs/server"]
    parties = [started(holders, "server", *listen, "hydra.run.dir=run", *run, *QUIET)]
    for number, part in enumerate(("left", "right")):
        words = as_holder(holders, number, port, part)
        parties.append(started(holders, "client", *words))
    ended(parties, holders)
    server = "server.safetensors"
    assert_equal_files(holders / "run" / server, local / server)
    whole = load_file(local / "client.safetensors")
    for number in range(2):
        folder = holders / "runs" / "digits" / f"client-0.{number}"
        own = load_file(folder / "client.safetensors")
        assert own
        assert all(torch.equal(own[name], whole[name]) for name in own)


def test_clients_on_this_machine_train_as_one_process_does(tmp_path, local):
    words = ["engine=grpc", "hydra.run.dir=run", *RUN, *QUIET]
    ended([started(tmp_path, "train", *words)], tmp_path)
    for name in ("client.safetensors", "server.safetensors"):
        assert_equal_files(tmp_path / "run" / name, local / name)
    assert not list(tmp_path.rglob("*.key"))
    files = (tmp_path / "run").rglob("config.yaml")  # which tell of a run
    assert {file.parent.name for file in files} == {".hydra", "run"}


def test_a_client_that_cannot_start_ends_the_run(tmp_path):
    broken = (
        "class Broken:\n    def load(self, train):\n        raise OSError('no disk')"
    )
    (tmp_path / "broken.py").write_text(broken)
    words = ["engine=grpc", "num_clients=1", "data=custom", *QUIET]
    words += ["data.source._target_=broken.Broken", "data.num_classes=2"]
    words += ["data.in_channels=1", "data.image_size=8"]
    process = started(tmp_path, "train", *words)
    with pytest.raises(AssertionError, match=r"client-0 ended: .*OSError: no disk"):
        ended([process], tmp_path)
    assert not list(tmp_path.rglob("*.key"))
