"""gRPC without trust: strangers, bad frames, and what each party sees."""

import asyncio
import copy
import json
import socket
import ssl
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from time import sleep

import grpc
import pytest
import test_grpc
import torch
from hypothesis import given
from hypothesis import strategies as st
from protocols import ROUNDS, fit, make_data, make_split
from pytorch_lightning import Callback
from test_grpc import BUILDING, NUM_CLIENTS, Run, assert_equal_states, states_of

from split_lightning import AsynchronousWeightPassing, Engine, SplitFedV3
from split_lightning.engines import grpc_client
from split_lightning.engines.answers import Answers
from split_lightning.engines.certificates import Authority
from split_lightning.engines.expected import Expected
from split_lightning.engines.grpc_sites import METHOD, SERVICE, GrpcSites
from split_lightning.engines.grpc_words import words_of_run
from split_lightning.engines.journal import Journal
from split_lightning.engines.link import Link, Room, SiteError
from split_lightning.engines.patience import Patience
from split_lightning.engines.remote import Call, Kept, SampleRef
from split_lightning.engines.wire import (
    Frame,
    FrameError,
    decoded,
    encoded,
    most_bytes,
)
from split_lightning.finite import NonFiniteError

RUNS = {
    **test_grpc.RUNS,
    "splitfed v3": (SplitFedV3, {}),
    "asynchronous": (AsynchronousWeightPassing, {}),
}
PARTS = ("train", "val", "test")
NAMES = [f"client-{client}" for client in range(NUM_CLIENTS)]


class OwnRun(Run):
    """A run whose clients may be changed, and end where the server refuses them.

    Attributes:
        change: Changes a client's end of the stream before it begins.
        ended: Why clients ended.
        says: What clients say first.
        answers: What answers for clients.
    """

    def __init__(self, folder, name, change=None, data=None):
        super().__init__(folder, "round robin")
        self.make_protocol, self.options = RUNS[name]
        self.authority = Authority()
        self.change, self.data = change or {}, data or {}
        self.ended, self.says, self.answers = [], {}, {}
        for party, hosts in [("server", ["127.0.0.1"]), *((n, ()) for n in NAMES)]:
            self.authority.issue(folder / "certs" / party, party, hosts)

    def make(self, engine=None):
        protocol, module, _ = super().make(engine)
        return protocol, module, make_data(NUM_CLIENTS, protocol, **self.data)

    def client(self, number, port):
        client, answers = super().client(number, port)
        client.waiting.seconds = 2
        self.says[number], self.answers[number] = client.says.plain(), answers
        if number in self.change:
            self.change[number](client, answers)
        return client, answers

    def fit(self, after=lambda trainer: None, room=None, **options):
        """Trains, and does more before the clients end."""
        sites = test_grpc.GrpcSites("127.0.0.1:0", self.folder / "certs" / "server")
        sites.room = Room() if room is None else Room(room)
        sites.start = self.begin
        with BUILDING:
            _, module, data = self.make(Engine(sites=sites))
        data.source = None  # the server has no data
        try:
            trainer = fit(self.folder, module, data, **options)
            after(trainer)
            states = states_of(module)
            module.end()
            self.join()
        finally:
            module.engine.close()
        return trainer, states

    def join(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()

    def serve(self, number, port, failing=()):
        """Serves as a client; one that is refused begins again, once."""
        for _ in range(2):
            with suppress(ConnectionError), self.noting():
                super().serve(number, port)
                return

    @contextmanager
    def noting(self):
        """Notes why a client ends."""
        try:
            yield
        except ConnectionError as error:
            self.ended.append(str(error))
            raise


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The final weights of each run in one process, computed once."""
    found = {}

    def states(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("local")
            with BUILDING:
                _, module, data = OwnRun(folder, name).make()
            fit(folder, module, data)
            found[name] = states_of(module)
        return found[name]

    return states


class At(Callback):
    """Does something before a batch, counted from the start."""

    def __init__(self, batch, action):
        self.left, self.action = batch, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left == 0:
            self.action(pl_module)
        self.left -= 1


# Strangers

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # of HTTP/2
# What the line says that gRPC writes for a handshake that fails.
REASONS = {
    "no certificate": "PEER_DID_NOT_RETURN_A_CERTIFICATE",
    "another authority's": "certificate signature failure",
    "an expired one": "certificate has expired",
    "a server's": "unsupported certificate purpose",
    "plaintext": "WRONG_VERSION_NUMBER",
}


def first_bytes(port, run, folder=None, plain=False):
    """Returns what a server sends first; nothing where it refuses the connection."""
    context = ssl.create_default_context(
        cafile=run.folder / "certs/server/authority.crt"
    )
    context.set_alpn_protocols(["h2"])
    if folder is not None:
        (name,) = {path.stem for path in folder.glob("*.key")}
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    stream = socket.create_connection(("127.0.0.1", port), timeout=10)
    with suppress(ConnectionError, ssl.SSLError), ExitStack() as stack:
        stack.enter_context(stream)
        if not plain:
            stream = context.wrap_socket(stream, server_hostname="127.0.0.1")
            stack.enter_context(stream)
        stream.sendall(PREFACE)
        return stream.recv(9)
    return b""


def hello_of(run, **changes):
    hello = {"site": "client-1", **run.says[1], "session": "", "saved": 0}
    return encoded(Frame("hello", 0, {**hello, **changes}))


def refusal(port, run, *frames, name="client-1"):
    """Returns why a server refuses a site that sends some frames first."""
    folder = run.folder / "certs" / name
    files = ("authority.crt", f"{name}.key", f"{name}.crt")
    credentials = [(folder / file).read_bytes() for file in files]
    with grpc.secure_channel(
        f"127.0.0.1:{port}", grpc.ssl_channel_credentials(*credentials)
    ) as channel:
        connect = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        with pytest.raises(grpc.RpcError) as refused:
            list(connect(iter(frames)))
    return refused.value.code(), refused.value.details()


def test_strangers_are_refused_in_the_middle_of_a_run(tmp_path, local, capfd, caplog):
    run = OwnRun(tmp_path, "round robin")
    yesterday = datetime.now(timezone.utc) - timedelta(minutes=1)
    run.authority.issue(tmp_path / "expired", "client-1", ends=yesterday)
    Authority().issue(tmp_path / "other", "client-1")
    certs = tmp_path / "certs"

    def call(module):
        port = module.engine.sites.port
        knock = partial(first_bytes, port, run)
        assert knock(certs / "client-1")  # the only one that is let in
        capfd.readouterr()
        assert knock() == b""
        assert knock(tmp_path / "other") == b""
        assert knock(tmp_path / "expired") == b""
        assert knock(certs / "server") == b""
        assert knock(plain=True) == b""
        hello = hello_of(run, site="client-0")
        code, why = refusal(port, run, hello)
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert why == (
            "it says that it is 'client-0', but its certificate is that of 'client-1'"
        )

    _, states = run.fit(callbacks=[At(4, call)])
    assert_equal_states(states, local("round robin"))
    lines = [
        line for line in capfd.readouterr().err.splitlines() if "Handshake" in line
    ]
    for line, reason in zip(lines, REASONS.values(), strict=True):
        assert reason in line
    (record,) = [r.getMessage() for r in caplog.records if "Refused" in r.message]
    assert record.startswith("Refused client-1 (ipv4:127.0.0.1:")
    assert record.endswith("its certificate is that of 'client-1'.")
    assert "\n" not in record


def of_data(**changes):
    return lambda says: {"data": [{**says["data"][0], **changes}]}


HELLOS = {
    "another name": (lambda says: {"site": "x" * 999}, "it says that it is 'xxx"),
    "no name": (lambda says: {"site": None}, "it says that it is None, but"),
    "other options": (lambda says: {"agreed": {}}, "its `cut_layer` differs"),
    "no options": (lambda says: {"agreed": 1}, "expected a hello with digests"),
    "no data": (lambda says: {"data": None}, "expected a hello with digests"),
    "data of none": (lambda says: {"data": []}, "its hello has the data of other"),
    "no words": (lambda says: {"data": [{}]}, "a client's data are described by"),
    "data of another": (of_data(client_id=0), "its hello has the data of other"),
    "other data": (of_data(train=7), "its data differ from those that it began with"),
    "a negative count": (of_data(val=-1), "`val` of a client's data is no count"),
    "a count of words": (of_data(test="1"), "`test` of a client's data is no count"),
    "a shape of words": (of_data(shape=("1",)), "`shape` of a client's data is no"),
    "calls that never were": (lambda says: {"saved": 10**6}, "the last call that it"),
    "calls before any": (lambda says: {"saved": -1}, "the last call that it has"),
    "calls that are gone": (lambda says: {"saved": 0}, "the last call that it has"),
    "a call of words": (lambda says: {"saved": "1"}, "its hello names no call"),
    "a call that is true": (lambda says: {"saved": True}, "its hello names no call"),
}


def test_a_client_of_another_run_learns_nothing(tmp_path, local, caplog):
    """Its certificate is of the same authority, but the run has no such client."""
    run = OwnRun(tmp_path, "round robin")
    run.authority.issue(tmp_path / "certs" / "client-9", "client-9")
    why = "there is no site 'client-9' in this run (client-0, client-1, client-2)"

    def call(module):
        sites = module.engine.sites
        sites.words = ["rounds=3"]
        hello = hello_of(run, site="client-9")
        assert refusal(sites.port, run, hello, name="client-9")[1] == why
        server = f"127.0.0.1:{sites.port}"
        certs = tmp_path / "certs"
        with pytest.raises(ConnectionError, match="there is no site 'client-9'"):
            words_of_run("client-9", server, certs / "client-9", 5)
        assert words_of_run("client-1", server, certs / "client-1", 5) == ["rounds=3"]

    _, states = run.fit(callbacks=[At(4, call)])
    assert_equal_states(states, local("round robin"))
    refused = [r.getMessage() for r in caplog.records if "Refused" in r.message]
    assert len(refused) == 2
    assert all(line.endswith(f": {why}.") for line in refused)


def test_bad_hellos_are_refused_in_the_middle_of_a_run(tmp_path, local, caplog):
    run = OwnRun(tmp_path, "round robin")

    def call(module):
        sites = module.engine.sites
        check = partial(refusal, sites.port, run)
        for change, message in HELLOS.values():
            own = {"saved": run.answers[1].saved, **change(run.says[1])}
            code, why = check(hello_of(run, session=sites.session, **own))
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            assert why.startswith(message)
        for kind, value in (("reply", {}), ("hello", ["client-1"])):
            assert check(encoded(Frame(kind, 0, value)))[1] == "expected a hello first"
        assert check(b"")[1] == "a frame of 0 bytes is too short"
        assert check(b"\0" * 99)[1] == "a frame begins with other bytes"
        assert check()[1] == "a frame of 0 bytes is too short"

    _, states = run.fit(room=0, callbacks=[At(5, call)])
    assert_equal_states(states, local("round robin"))
    refused = [r.getMessage() for r in caplog.records if "Refused" in r.message]
    assert len(refused) == len(HELLOS) + 5
    assert max(map(len, refused)) < 400


# What a site sends


def spoil(method, change, times=1):
    """Changes the first replies to a method on their way to the server."""
    left = [times]

    def on(client, answers):
        whole = answers.answer

        def answer(data):
            reply = whole(data)
            if reply is None or decoded(data).value[0] != method or left[0] == 0:
                return reply
            left[0] -= 1
            return change(reply)

        answers.answer = answer

    return on


def of_frame(**fields):
    return lambda data: encoded(decoded(data)._replace(**fields))


def of_result(change):
    """Changes the result in a reply."""

    def changed(data):
        frame = decoded(data)
        saved, result = frame.value
        return encoded(frame._replace(value=(saved, change(result))))

    return changed


def of_smashed(change):
    return of_result(lambda result: ((change(result[0][0]),), result[1]))


def of_state(change):
    return of_result(lambda state: {k: change(v) for k, v in state.items()})


def of_loss(number, value):
    return of_result(lambda own: (*own[:number], value, *own[number + 1 :]))


def forged(data):
    """A reply that names another sender, and another call."""
    return encoded(decoded(data)._replace(kind="reply", number=0))


SPOILED = {
    "truncated": ("round robin", "forward", lambda data: data[:-3]),
    "too long": ("round robin", "forward", lambda data: data + b"\0"),
    "no frame": ("round robin", "step", lambda data: b"\0" * 50),
    "empty": ("round robin", "step", lambda data: b""),
    "a call": ("round robin", "forward", of_frame(kind="call")),
    "another hello": ("round robin", "forward", of_frame(kind="hello")),
    "of no call": ("round robin", "forward", of_frame(number=10**6)),
    "no pair": ("round robin", "forward", of_frame(value=1)),
    "of another call": ("round robin", "forward", forged),
    "one sample too few": ("round robin", "forward", of_smashed(lambda t: t[1:])),
    "another shape": ("round robin", "forward", of_smashed(lambda t: t.flatten(1))),
    "another dtype": ("round robin", "forward", of_smashed(torch.Tensor.double)),
    "without a gradient": ("round robin", "forward", of_smashed(torch.Tensor.detach)),
    "no tensor": ("round robin", "forward", of_smashed(lambda t: 3)),
    "kept": ("round robin", "forward", of_smashed(lambda t: Kept(0, True))),
    "two values": ("round robin", "forward", of_result(lambda r: (r[0] * 2, r[1]))),
    "no random state": ("round robin", "forward", of_result(lambda r: (r[0], None))),
    "a random state of zeros": (
        "round robin",
        "forward",
        of_result(lambda r: (r[0], r[1] * 0)),
    ),
    "labels out of range": (
        "round robin",
        "labels",
        of_result(lambda r: (r[0] + 3,)),
    ),
    "negative labels": ("round robin", "labels", of_result(lambda r: (r[0] - 3,))),
    "labels of floats": ("round robin", "labels", of_result(lambda r: (r[0] * 1.0,))),
    "too few labels": ("round robin", "labels", of_result(lambda r: (r[0][1:],))),
    "a gradient of inputs": (
        "round robin",
        "backward",
        of_result(lambda r: (torch.zeros(6, 1, 6, 6),)),
    ),
    "a result of a step": ("round robin", "step", of_result(lambda r: 3)),
    "an error that is no text": ("round robin", "step", of_frame(kind="error")),
    "no state": ("round robin", "read", of_result(lambda r: None)),
    "a state without a tensor": ("round robin", "read", of_result(lambda r: {})),
    "a state of other shapes": ("round robin", "read", of_state(lambda t: t[:1])),
    "a state of another dtype": ("round robin", "read", of_state(torch.Tensor.half)),
    "no loss": ("u-shaped", "loss", of_loss(0, None)),
    "a loss of several numbers": ("u-shaped", "loss", of_loss(1, torch.zeros(2))),
    "a gradient of another shape": (
        "u-shaped",
        "loss",
        of_loss(2, (torch.zeros(1, 1),)),
    ),
    "no gradients": ("u-shaped", "loss", of_loss(2, ())),
    "too many right": ("u-shaped", "score", of_loss(1, 10**6)),
    "fewer right than none": ("u-shaped", "score", of_loss(1, -1)),
    "another number of samples": ("u-shaped", "score", of_loss(2, 1)),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_reply_is_refused_and_the_run_goes_on(tmp_path, local, caplog, case):
    name, method, change = SPOILED[case]
    _, states = OwnRun(tmp_path, name, {1: spoil(method, change)}).fit()
    assert_equal_states(states, local(name))
    (line,) = [r.getMessage() for r in caplog.records if "may not" in r.message]
    assert line.startswith("client-1 sent what it may not: ")
    assert "\n" not in line


def test_replies_that_come_twice_count_once(tmp_path, local, monkeypatch):
    whole = grpc_client._until_none

    def twice(items):
        for number, item in enumerate(whole(items)):
            yield from [item] * (1 if number == 0 else 2)

    monkeypatch.setattr(grpc_client, "_until_none", twice)
    _, states = OwnRun(tmp_path, "splitfed v1").fit()
    assert_equal_states(states, local("splitfed v1"))


def test_a_site_that_always_sends_bad_replies_ends_the_run(tmp_path):
    shorter = spoil("forward", of_smashed(lambda t: t[1:]), times=-1)
    run = OwnRun(tmp_path, "round robin", {1: shorter})
    with pytest.raises(SiteError) as ended:
        run.fit()
    assert "client-1 has sent what it may not, 3 times in a row" in str(ended.value)
    assert "its reply to call " in str(ended.value)
    assert (
        "`forward`, does not fit: expected value 1 of 1 to be torch.float32 of shape "
        "(6, 4, 6, 6) with a gradient, but got torch.float32 of shape (5, 4, 6, 6) with"
        " a gradient."
    ) in str(ended.value)
    assert "\n" not in str(ended.value)
    run.join()


NOT_FINITE = {
    "smashed data": ("round robin", "forward", of_smashed(lambda t: t * torch.nan)),
    "an infinite one": ("round robin", "forward", of_smashed(lambda t: t / 0)),
    "gradients": (
        "u-shaped",
        "loss",
        of_result(lambda r: (r[0], r[1], (r[2][0] * torch.nan,))),
    ),
    "a loss": ("u-shaped", "loss", of_result(lambda r: (r[0] * torch.nan, *r[1:]))),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_numbers_that_are_not_finite_stop_the_run(tmp_path, case):
    """They are legal on the wire; the check of all numbers finds them."""
    name, method, change = NOT_FINITE[case]
    run = OwnRun(tmp_path, name, {1: spoil(method, change)})
    what = {"gradients": "the gradient of the smashed data", "a loss": "the loss"}
    with pytest.raises(NonFiniteError, match=what.get(case, "the smashed data")):
        run.fit()
    run.join()


def test_a_frame_that_is_too_large_is_refused_and_the_run_goes_on(tmp_path, local):
    def add(data):
        return data + bytes(1 << 20)

    run = OwnRun(tmp_path, "round robin", {1: spoil("step", add)})
    _, states = run.fit()
    assert_equal_states(states, local("round robin"))
    (ended,) = run.ended
    assert "Received message larger than max" in ended


@pytest.mark.parametrize("name", RUNS)
def test_no_legal_frame_is_larger_than_the_limits(tmp_path, name, recorded):
    trainer, _ = OwnRun(tmp_path, name).fit()
    limit = trainer.lightning_module.engine.sites.most_bytes
    assert max(len(data) for _, _, data in recorded) <= limit
    largest = max(most_bytes(decoded(data).value) for _, _, data in recorded)
    assert limit - largest < 1 << 17  # so that it is none that means nothing


# What a server sends


def test_a_server_that_sends_too_much_is_refused_and_the_run_goes_on(tmp_path, local):
    def send(module):
        link = module.engine.sites.links["client-1"]
        link._send(encoded(Frame("call", 1, torch.zeros(1 << 18))))

    run = OwnRun(tmp_path, "round robin")
    _, states = run.fit(callbacks=[At(4, send)])
    assert_equal_states(states, local("round robin"))
    (ended,) = run.ended
    assert "Received message larger than max" in ended


BAD_CALLS = {
    "another kind": lambda n: Frame(
        "reply", n, ("read", ("client/1", 0, "buffers"), 0)
    ),
    "no method": lambda n: Frame("call", n, ()),
    "a private method": lambda n: call(n, "_keep", ()),
    "another private one": lambda n: call(n, "_load", (REF,)),
    "a dunder": lambda n: call(n, "__init__", ()),
    "one that is no call": lambda n: call(n, "state_dict", ()),
    "a method that is none": lambda n: call(n, 3, ()),
    "a method that is a tensor": lambda n: call(n, torch.ones(2), ()),
    "arguments in a list": lambda n: call(n, "labels", [REF]),
    "too few arguments": lambda n: call(n, "read", ("client/1", 0)),
    "too many": lambda n: call(n, "labels", (REF, REF)),
    "no last reply": lambda n: Frame("call", n, ("labels", (REF,), None, True)),
    "to save or not": lambda n: Frame("call", n, ("labels", (REF,), n - 1, 2)),
    "a call too early": lambda n: call(n + 1, "labels", (REF,)),
    "a party that is none": lambda n: call(
        n, "forward", ("x", (0, 0), (REF,), False, None)
    ),
    "a party of nobody": lambda n: call(
        n, "forward", ("client/77", (0, 0), (REF,), False, None)
    ),
    "a key of words": lambda n: call(
        n, "forward", ("client/1", ("0", 0), (REF,), False, None)
    ),
    "what is not kept": lambda n: call(
        n, "forward", ("client/1", (0, 0), (Kept(5, True),), False, None)
    ),
    "a random state of floats": lambda n: call(
        n, "forward", ("client/1", (0, 0), (REF,), False, torch.zeros(5056))
    ),
    "a set that is none": lambda n: call(n, "labels", (replace(REF, part="x"),)),
    "a score of what is trained on": lambda n: call(
        n, "score", (1, "client/1", (torch.ones(6, 4, 6, 6),), REF)
    ),
    "a score of what is no output": lambda n: call(
        n, "score", (0, "client/1", (VAL,), VAL)
    ),
    "a segment of nobody": lambda n: call(n, "read", ("client/1", 99, "buffers")),
    "a negative segment": lambda n: call(n, "read", ("client/1", -1, "buffers")),
    "a part of nothing": lambda n: call(n, "read", ("client/1", 0, "own")),
    "a state of nothing": lambda n: call(n, "write", ("client/1", 0, "buffers", {})),
    "a state of other shapes": lambda n: call(
        n, "share", (0, "client", "parameters", {"0.weight": torch.zeros(1)})
    ),
    "an optimizer's state of nothing": lambda n: call(
        n, "write", ("client/1", 0, "optimizer", {"0.weight": {"x": torch.ones(1)}})
    ),
    "a step of a party that waits for nothing": lambda n: call(
        n, "step", (["client/2"], {})
    ),
    "options of nothing": lambda n: call(n, "step", ([], {"client": [{}, {}]})),
    "a path": lambda n: call(n, "keep", ("../../stolen",)),
}


REF = SampleRef("train", 0, 1, 0, 0, 0, 6)
VAL = SampleRef("val", 0, 1, 0, 0, 0, 6)


def call(number, method, arguments):
    saves = method == "step"
    return Frame("call", number, (method, arguments, number - 1, saves))


@pytest.fixture
def answers(tmp_path):
    return new_answers(tmp_path)


def new_answers(folder):
    """A site that has trained a batch, and is in the middle of the next."""
    protocol, module, data = OwnRun(folder, "round robin").make()
    data.prepare_data()
    data.setup("fit")
    answers = Answers(module.as_site(data, protocol, num_hosted=1), Journal(folder))
    answers.begin("session", None)
    for number in (1, 4):
        forward = ("client/1", (number, 0), (REF,), False, None)
        slope = torch.ones(6, 4, 6, 6)
        answers.answer(encoded(call(number, "forward", forward)))
        backward = ("client/1", (number, 0), (slope,))
        answers.answer(encoded(call(number + 1, "backward", backward)))
        if number == 1:
            answers.answer(encoded(call(3, "step", (["client/1"], {}))))
    assert (answers.number, answers.saved) == (5, 3)
    return answers


def all_of(answers):
    """Returns all that a site remembers."""
    site = answers.site
    states = copy.deepcopy(site.state_dict())
    numbers = answers.session, answers.number, answers.saved, dict(answers.replies)
    files = {
        path.name: path.read_bytes() for path in answers.journal.folder.glob("*.pt")
    }
    waiting = {name: list(party.calls) for name, party in site.parties.items()}
    return states, numbers, files, waiting


def same(one, other):
    """Returns whether plain containers are equal, with their tensors."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_changes_nothing(answers, case):
    before = all_of(answers)
    with pytest.raises(FrameError):
        answers.answer(encoded(BAD_CALLS[case](6)))
    assert same(before, all_of(answers))


def test_a_call_that_came_before_changes_nothing(answers):
    before = all_of(answers)
    for number in (1, 3, 5, 0, -1):
        frame = call(number, "step", (["client/1"], {}))
        assert answers.answer(encoded(frame)) is None
    assert same(before, all_of(answers))


FAILING = {
    "samples of nobody": (
        "forward",
        ("client/1", (7, 0), (replace(REF, client_id=9),), False, None),
    ),
    "a shape that fits nowhere": (
        "forward",
        ("client/1", (7, 0), (torch.ones(6, 2, 6, 6),), False, None),
    ),
    "a gradient of another shape": (
        "backward",
        ("client/1", (8, 0), (torch.ones(1, 1),)),
    ),
    "one sample of an evaluation": (
        "evaluate",
        (0, "client/1", (replace(REF, part="val", num_samples=1),), False),
    ),
    "samples across its batches": (
        "evaluate",
        (0, "client/1", (replace(REF, part="test", start=3),), False),
    ),
    "options of another type": ("step", (["client/1"], {"client": [{"lr": "fast"}]})),
    "a segment that another has": (
        "forward",
        ("client/1", (7, 1), (REF,), False, None),
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_call_that_fails_in_the_middle_leaves_the_journal(answers, case):
    """The site returns to its last step, and computes nothing more before that."""
    method, arguments = FAILING[case]
    answers.answer(
        encoded(call(6, "forward", ("client/1", (8, 0), (REF,), False, None)))
    )
    files = all_of(answers)[2]
    reply = decoded(answers.answer(encoded(call(7, method, arguments))))
    assert reply.kind == "error"
    after = all_of(answers)
    assert after[2] == files
    assert after[3] == {}
    saved = answers.journal.load("journal")["site"]
    assert same(after[0], saved)
    again = decoded(answers.answer(encoded(call(8, "step", ([], {})))))
    assert again.kind == "error"
    assert again.value == reply.value
    answers.begin("session", None)
    assert answers.number == answers.saved == 3
    reply = answers.answer(encoded(call(4, "labels", (REF,))))
    assert decoded(reply).kind == "reply"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return new_answers(tmp_path_factory.mktemp("shared"))


def spoiled(draw, frame):
    """Draws a frame with a byte that is cut off, added or changed."""
    at = draw(st.integers(0, len(frame) - 1))
    new = draw(st.binary(min_size=1, max_size=1))
    rest = [
        frame[:at],
        frame[:at] + new + frame[at:],
        frame[:at] + new + frame[at + 1 :],
    ]
    return draw(st.sampled_from(rest))


FORWARD = call(6, "forward", ("client/1", (8, 0), (REF,), False, torch.get_rng_state()))


@given(st.data())
def test_a_spoiled_call_changes_nothing_or_is_a_call(shared, data):
    shared.begin("session", None)
    for number in (4, 5):
        shared.answer(encoded(call(number, "labels", (REF,))))
    before = all_of(shared)
    state = torch.get_rng_state()
    try:
        shared.answer(spoiled(data.draw, encoded(FORWARD)))
    except FrameError:
        assert same(before, all_of(shared))
    torch.set_rng_state(state)
    assert same(before[2], all_of(shared)[2])


@given(st.data())
def test_a_spoiled_reply_changes_nothing_or_fits(shared, data):
    shared.begin("session", None)
    forward = Call("forward", ("client/1", (8, 0), (REF,), False, None))
    send = [].append
    link = Link("client-1", Room())
    link.expected = Expected(shared.site.shapes)
    link.attach(0, send)
    future = link.deliver(forward)
    frame = decoded(shared.answer(encoded(call(4, *forward))))
    reply = encoded(frame._replace(number=1, value=(0, frame.value[1])))
    try:
        link.take(spoiled(data.draw, reply), send)
    except FrameError:
        assert not future.done()
        link.take(reply, send)
        assert same(future.result(), frame.value[1])
    else:  # other numbers, or a message of an error
        assert future.exception() or future.result()[0][0].shape == (6, 4, 6, 6)


def test_replies_out_of_order_go_to_their_calls(shared):
    send = [].append
    link = Link("client-1", Room())
    link.expected = Expected(shared.site.shapes)
    link.attach(0, send)
    refs = [replace(REF, num_samples=number) for number in (6, 5)]
    futures = [link.deliver(Call("labels", (ref,))) for ref in refs]
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(FrameError, match="`labels`, does not fit"):  # of the other call
        link.take(encoded(Frame("reply", 2, (0, (labels,)))), send)
    link.take(encoded(Frame("reply", 2, (0, (labels[:5],)))), send)
    link.take(encoded(Frame("reply", 1, (0, (labels,)))), send)
    assert [len(future.result()[0]) for future in futures] == [6, 5]


def test_a_reply_that_came_before_is_no_sign_of_life(shared, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    send = [].append
    link = Link("client-1", Room())
    link.expected = Expected(shared.site.shapes)
    link.attach(0, send)
    reply = encoded(Frame("reply", 1, (0, (torch.zeros(6, dtype=torch.int64),))))
    link.deliver(Call("labels", (REF,)))
    link.take(reply, send)
    link.deliver(Call("labels", (REF,)))
    now[0] = 9.0
    link.take(reply, send)
    assert link.silent_for() == 9.0


def test_patience_begins_when_a_connection_ends(monkeypatch):
    now, error = [0.0], grpc.RpcError()
    error.code = lambda: grpc.StatusCode.UNAVAILABLE
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    patience = Patience("client-1", "server.example:8443", 5)
    now[0] = 100.0  # the client had nothing to do
    patience.hear()
    patience.begin()
    patience.after(error)
    now[0] = 106.0
    with pytest.raises(ConnectionError, match=r"for 5 s\. It has answered before"):
        patience.after(error)


def test_an_idle_client_outlasts_a_connection(tmp_path, local):
    """Its patience is shorter than the time for which it has nothing to do."""

    def impatient(client, answers):
        client.waiting.seconds = 0.7

    def call(module):
        sites = module.engine.sites
        sites.listen = f"127.0.0.1:{sites.port}"

        async def again():
            await sites._server.stop(grace=0)
            await sites._listen()

        sleep(1)
        asyncio.run_coroutine_threadsafe(again(), sites._loop).result()

    change = dict.fromkeys(range(NUM_CLIENTS), impatient)
    run = OwnRun(tmp_path, "round robin", change)
    _, states = run.fit(callbacks=[At(4, call)])
    assert_equal_states(states, local("round robin"))
    assert run.ended == []


def test_another_process_with_the_same_certificate_takes_over(tmp_path, local):
    run = OwnRun(tmp_path, "round robin")

    def call(module):
        thread = threading.Thread(target=run.serve, args=(1, module.engine.sites.port))
        run.threads.append(thread)
        thread.start()
        for _ in range(3000):  # 30 s
            if run.ended:
                break
            sleep(0.01)

    _, states = run.fit(callbacks=[At(5, call)], room=0)
    assert_equal_states(states, local("round robin"))
    assert "Another process with the certificate of" in run.ended[0]


def test_a_value_that_stays_is_known_by_its_shape(tmp_path):
    """Behind it comes what a segment makes of it."""
    options = {"cut_layer": [[2, 5]]}
    _, module, data = OwnRun(tmp_path, "round robin").make()
    module = make_split(**options)
    data.prepare_data()
    data.setup("fit")
    expected = Expected(module.as_site(data, data.protocol, num_hosted=1).shapes)
    forward = Call("forward", ("client/2", (0, 0), (REF,), True, None))
    expected.reply_to(forward).accept(((Kept(0, True),), None))
    behind = Call("forward", ("client/2", (0, 1), (Kept(0, True),), False, None))
    reply = expected.reply_to(behind)
    reply.accept(((torch.zeros(6, 8, requires_grad=True),), None))
    with pytest.raises(FrameError, match=r"to be .*\(6, 8\).*, but got .*\(6, 7\)"):
        reply.accept(((torch.zeros(6, 7, requires_grad=True),), None))


# What each party sees


class Recording(GrpcSites):
    """Keeps all frames of all streams, in order: the site, the direction, the bytes."""

    frames = []  # noqa: RUF012 (set anew for each test)

    async def _connect(self, frames, context):
        name = context.auth_context()["x509_subject_alternative_name"][0].decode()

        async def coming():
            async for data in frames:
                self.frames.append((name, "received", data))
                yield data

        async for data in super()._connect(coming(), context):
            self.frames.append((name, "sent", data))
            yield data


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(test_grpc, "GrpcSites", Recording)
    monkeypatch.setattr(Recording, "frames", [])
    return Recording.frames


class Private:
    """What no other party may see, as bytes, by client: noted at the sites."""

    def __init__(self):
        self.inputs = {name: set() for name in NAMES}
        self.labels = {(name, part): set() for name in NAMES for part in PARTS}
        self.weights = {name: set() for name in NAMES}
        self.logits = {name: set() for name in NAMES}
        self.control = []  # frames with inputs, such as no party sends

    def note(self, client, answers):
        site, name = answers.site, client.name
        load, step = site.samples, site.step
        (last,) = (
            own for own in site.engine.stores if own.depth == site.engine.num_depths - 1
        )

        def samples(ref):
            inputs, labels = load(ref)
            self.control.append((name, "sent", encoded(Frame("reply", 1, inputs))))
            for row in inputs:
                self.inputs[name].add(bytes_of(row))
                self.inputs[name].add(bytes_of((row * 127.5 + 127.5).round().byte()))
            if len(labels) > 5 and len(labels.unique()) > 1:  # others may be anything
                own = self.labels[name, ref.part]
                for dtype in (torch.int64, torch.float32):
                    own.add(bytes_of(labels.to(dtype)))
                own.add(json.dumps(labels.tolist()).encode()[1:-1])
            return inputs, labels

        def stepped(*arguments):
            step(*arguments)
            party = name.replace("-", "/")
            placed = enumerate(site.engine.placement.of(int(name[-1])))
            weights = site.weights_of([(n, own) for n, own in placed if own == party])
            self.weights[name] |= {
                bytes_of(t) for t in weights.values() if t.numel() > 30
            }

        def hook(module, inputs, outputs):
            self.logits[name].add(bytes_of(outputs.detach()))

        site.samples, site.step = samples, stepped
        for seat in last.seats:
            seat.module.register_forward_hook(hook)


def bytes_of(tensor):
    return tensor.contiguous().numpy().tobytes()


def seen(frames, direction, secrets, names=NAMES):
    """Returns how many secrets are in the frames of some sites."""
    text = b"|".join(
        data for name, way, data in frames if way == direction and name in names
    )
    return sum(secret in text for secret in secrets)


TABLE = {  # labels at the server, weights at the server, at other clients
    "round robin": (True, True, True),
    "splitfed v1": (True, True, False),
    "parallel": (True, False, False),
    "u-shaped": (False, True, True),
    "u-shaped in parallel": (False, False, False),
    "splitfed v3": (True, False, False),
    "asynchronous": (True, True, False),
    "fedavg": (False, True, False),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_party_sees_what_the_table_says(tmp_path, recorded, name):
    labels, at_server, at_clients = TABLE[name]
    private = Private()
    change = dict.fromkeys(range(NUM_CLIENTS), private.note)
    run = OwnRun(tmp_path, name, change, {"val_share": 0.4})
    in_fit = []

    def test(trainer):
        in_fit.extend(recorded)
        trainer.test(trainer.lightning_module, datamodule=trainer.datamodule)

    run.fit(after=test)
    for own in NAMES:
        assert len(private.inputs[own]) >= 40
        assert len(private.weights[own]) >= 6
        inputs = private.inputs[own]
        assert seen(private.control, "sent", inputs, [own]) == len(inputs) // 2
        for direction in ("sent", "received"):
            assert seen(recorded, direction, inputs) == 0
        weights = private.weights[own]
        assert (seen(in_fit, "received", weights, [own]) > 0) == at_server
        others = [other for other in NAMES if other != own]
        assert (seen(recorded, "sent", weights, others) > 0) == at_clients
    for (_, part), secrets in private.labels.items():
        assert secrets or part == "test"  # which one client computes
        expected = len(secrets) // 3 if labels else 0  # as int64 alone
        assert seen(recorded, "received", secrets) == expected
        assert seen(recorded, "sent", secrets) == 0
    assert any(private.labels[own, "test"] for own in NAMES)
    logits = set.union(*private.logits.values())
    assert (len(logits) > 10) != labels  # no client of a vanilla split has them
    for direction in ("sent", "received"):
        assert seen(recorded, direction, logits) == 0


def test_a_site_gives_no_labels_or_logits_away(tmp_path):
    """Where they stay with the client; not even to a server that asks for them."""
    protocol, module, data = OwnRun(tmp_path, "u-shaped").make()
    data.prepare_data()
    data.setup("fit")
    answers = Answers(module.as_site(data, protocol, num_hosted=1), Journal(tmp_path))
    answers.begin("session", None)
    wanted = {
        "labels": ((REF,), "the labels of client/1 to stay there"),
        "evaluate": (
            (2, "client/1", (torch.zeros(6, 36),), False),
            "outputs of the last",
        ),
    }
    for method, (arguments, why) in wanted.items():
        answers.begin("session", None)
        reply = decoded(answers.answer(encoded(call(1, method, arguments))))
        assert reply.kind == "error"
        assert why in reply.value[1]


# Bytes


def crossing(frames):
    """Returns the bytes of tensors by direction and method; checks those of headers.

    The state of the random numbers, which travels with the first forward passes, is
    left out.
    """
    calls, found = {}, Counter()
    for name, direction, data in frames:
        kind, number, value = decoded(data)
        if kind not in ("call", "reply"):
            assert len(data) < 2048
            continue
        if kind == "call":
            calls[name, number] = value[:2]
        tensors = all_tensors(value)
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        assert 0 < len(data) - num_bytes < 1024 + 256 * len(tensors)
        random = sum(t.nbytes for t in tensors if t.dtype == torch.uint8)
        method, arguments = calls[name, number]
        if method == "labels":
            method = f"labels to {arguments[0].part}"
        found[direction, method] += num_bytes - random
    return found


def all_tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for own in value for tensor in all_tensors(own)]
    return []


@pytest.mark.parametrize("val_share", [0, 0.2])
@pytest.mark.parametrize("name", RUNS)
def test_the_bytes_of_frames_are_those_that_are_logged(
    tmp_path, recorded, name, val_share
):
    run, in_fit = OwnRun(tmp_path, name, data={"val_share": val_share}), []
    trainer, _ = run.fit(after=lambda trainer: in_fit.extend(recorded))
    found, totals = crossing(in_fit), trainer.lightning_module.totals()
    steps = trainer.global_step * (NUM_CLIENTS if "parallel" in name else 1)
    losses = found["received", "loss"]
    if losses:
        losses -= 2 * 4 * steps  # the losses, which are logged as numbers
    up = found["received", "forward"] + found["received", "begin"]
    up += found["received", "labels to train"]
    up += losses + found["received", "backward"]
    assert up == totals["uplink_bytes"]
    down = found["sent", "forward"] + found["sent", "backward"]
    assert down == totals["downlink_bytes"]
    if val_share == 0:  # weights travel to be evaluated, too
        passed = totals["handoff_bytes"]  # the server relays what clients pass on
        averaged = totals["averaging_bytes"] // 2
        assert found["received", "read"] == passed + averaged
        if name == "asynchronous":  # each client gets a mean of its own
            assert found["sent", "write"] == averaged > 0
        else:
            assert found["sent", "write"] == passed
            # The last mean is sent when a client trains or is evaluated with it.
            assert found["sent", "share"] == averaged * (ROUNDS - 1) // ROUNDS
