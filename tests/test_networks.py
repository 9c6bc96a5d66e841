"""Clients that end with networks of their own: on disk, tested again, exported."""

import csv
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_evaluate import refused, trained  # noqa: F401  # a fixture

from split_lightning import DigitsImages, evaluate, export
from split_lightning.models import DigitsCNN, load_weights
from split_lightning.runs import load_run
from split_lightning.runs.run_files import read_results

# Few batches; of all clients.
SHORT = ["batch_size=120", "trainer.limit_train_batches=null"]
EACH = ["0", "1", "2", "3"]

# The overrides; whose networks there are; which segments are their own.
CASES = {
    "splitfed_v3": (["protocol=splitfed_v3"], EACH, ["client"]),
    "local": (["protocol=local"], EACH, ["network"]),
    "parallel": (["protocol=parallel", "batch_size=64"], EACH, ["client"]),
    "no passing": (
        ["protocol.enabled=false"],
        EACH,
        ["client"],
    ),
    "several servers, not averaged": (
        ["protocol=multi_server", "protocol.every=2", "protocol.servers_every=2"],
        ["0", "2"],
        ["client", "server"],
    ),
    "several servers, clients averaged": (
        ["protocol=multi_server", "protocol.servers_every=null"],
        ["0", "2"],
        ["server"],
    ),
    "buffers": (["protocol=splitfed_v2", "buffers=keep"], EACH, ["client"]),
    "some clients": (
        ["protocol=local", "clients_per_round=2", "seed=2"],
        ["0", "3"],
        ["network"],
    ),
    "averaged": (["protocol=splitfed_v1"], [], []),
    "U": (["protocol=splitfed_v3", "topology=u_shaped"], EACH, ["client"]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    overrides, clients, own = CASES[request.param]
    folder = trained(tmp_path_factory.mktemp("runs") / "run", *SHORT, *overrides)
    return folder, clients, own


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))


def accuracy_of(folder, client):
    """The reference: the unsplit network, put together from the files."""
    network, images = DigitsCNN().eval(), DigitsImages().load(train=False)
    state = {}
    for file in [*folder.glob("*.safetensors"), *folder.glob(f"networks/{client}/*")]:
        state |= load_file(file)
    network.load_state_dict(state)
    with torch.no_grad():
        told = network((images.inputs.float() / 255 - 0.5) / 0.5).argmax(1)
    return (told == images.targets).float().mean().item()


def test_results_say_of_how_many_networks_an_accuracy_is_the_mean(case):
    folder, clients, _ = case
    assert read_results(folder)["networks"] == max(len(clients), 1)


def test_each_network_is_on_disk_once(case):
    folder, clients, own = case
    segments = ["network"] if "network" in own else ["client", "server"]
    common = [f"{name}.safetensors" for name in segments if name not in own]
    theirs = [f"networks/{k}/{name}.safetensors" for k in clients for name in own]
    assert files_of(folder) == sorted([*common, *theirs])


@pytest.mark.parametrize("checkpoint", [None, "last"])
def test_the_mean_is_that_of_training_bit_for_bit(case, tmp_path, capsys, checkpoint):
    folder, clients, _ = case
    expected = read_results(folder)
    words = [f"run={folder}", f"output_dir={tmp_path}"]
    evaluate.main(words + ([f"checkpoint={checkpoint}"] if checkpoint else []))
    results, printed = read_results(tmp_path), capsys.readouterr().out
    assert (f"{len(clients)} networks" in printed) == bool(clients)
    for key in ("test_accuracy", "test_loss"):
        assert results[key] == expected[key]
        assert f"{expected[key]:.4f}" in printed
    assert results["images"] == 360
    assert results["networks"] == max(len(clients), 1)
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["images"]) for row in rows) == 360
    recall = sum(float(row["accuracy"]) * int(row["images"]) for row in rows) / 360
    assert recall == pytest.approx(expected["test_accuracy"])


def test_each_clients_network_is_as_on_disk(case):
    folder, clients, _ = case
    images = DigitsImages().load(train=False)
    inputs = (images.inputs.float() / 255 - 0.5) / 0.5
    expected = [accuracy_of(folder, client) for client in clients]
    for checkpoint in (None, "last"):
        modules = [load_run(folder, checkpoint, int(client)) for client in clients]
        with torch.no_grad():
            told = [module(inputs).argmax(1) for module in modules]
        right = [(t == images.targets).float().mean().item() for t in told]
        assert right == pytest.approx(expected)
    if clients:
        mean = read_results(folder)["test_accuracy"]
        assert sum(expected) / len(clients) == pytest.approx(mean)
        with pytest.raises(ValueError, match=f"one of {', '.join(clients)}.*got none"):
            load_run(folder)
    else:
        with pytest.raises(ValueError, match="`client=0` would change nothing"):
            load_run(folder, client=0)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "local"
    return trained(folder, *SHORT, "protocol=local")


def test_exported_by_client(local, tmp_path):
    export.main([f"run={local}", f"output_dir={tmp_path}", "client=2"])
    network = DigitsCNN()
    load_weights(network, tmp_path / "network.safetensors")
    expected = load_file(local / "networks" / "2" / "network.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("checkpoint", ["", "checkpoint=best"])
def test_one_clients_network(local, checkpoint):
    """One round: the best checkpoint is the last."""
    evaluate.main([f"run={local}", "client=1", *[checkpoint] * bool(checkpoint)])
    found = "evaluation_best_client_1" if checkpoint else "evaluation_client_1"
    results = read_results(local / found)
    assert results["test_accuracy"] == pytest.approx(accuracy_of(local, 1))
    assert results["test_accuracy"] != read_results(local)["test_accuracy"]
    assert (results["images"], results["networks"]) == (360, 1)
    assert results["client"] == "1"


def test_a_mistake_gets_one_message(refused, local, capsys):  # noqa: F811
    message = refused(f"run={local}", "client=9")
    assert "`client` to be one of 0, 1, 2, 3" in message
    with pytest.raises(SystemExit):
        export.main([f"run={local}"])
    message = capsys.readouterr().err
    assert "`client` to be one of 0, 1, 2, 3" in message
    assert "got none" in message
    with pytest.raises(ValueError, match=r"`weights`.*export run=.* client=ID"):
        load_weights(DigitsCNN(), local)


def test_a_file_that_is_missing_is_named(refused, local, tmp_path):  # noqa: F811
    torn = shutil.copytree(local, tmp_path / "torn")
    (torn / "networks" / "2" / "network.safetensors").unlink()
    message = refused(f"run={torn}")
    assert "networks/2 has no network.safetensors" in message
    assert "checkpoint=last" in message


def test_a_run_that_goes_on_leaves_no_network_of_before(tmp_path):
    """After one round the servers' segments differ; after two they are averaged."""
    words = [*SHORT, *CASES["several servers, not averaged"][0]]
    trained(tmp_path, *words)
    assert (tmp_path / "networks").is_dir()
    trained(tmp_path, *words, "rounds=2", f"ckpt_path={tmp_path}")
    assert files_of(tmp_path) == ["client.safetensors", "server.safetensors"]
    trained(tmp_path, *words, "rounds=3", f"ckpt_path={tmp_path}")
    assert len(files_of(tmp_path)) == 4
    evaluate.main([f"run={tmp_path}"])
    evaluated = read_results(tmp_path / "evaluation")
    assert evaluated["test_loss"] == read_results(tmp_path)["test_loss"]
