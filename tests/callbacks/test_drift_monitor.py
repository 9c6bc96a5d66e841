"""`DriftMonitor` against a plain loop over whole networks."""

import copy
from itertools import pairwise

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from watching import (
    SGD,
    ListLogger,
    SaveAt,
    batches_of,
    fit,
    make_data,
    make_module,
    network,
)

from split_lightning import RoundRobinWeightPassing
from split_lightning.callbacks import DriftMonitor


def flat_gradient(segment):
    return torch.cat([p.grad.flatten() for p in segment.parameters()]).clone()


def plain_turns(policy="keep", passing=True, clip=None, accumulate=1, limit=None):
    """Yields each turn's mean gradients (client, server): no code of the library."""
    whole, data = network(), make_data()
    clients = [copy.deepcopy(whole[:2]) for _ in range(3)]
    server = copy.deepcopy(whole[2:])
    optimizers = [SGD(client.parameters()) for client in clients]
    server_optimizer = SGD(server.parameters())
    last, steps, batches, position = None, [], 0, (None, 0)
    for round_index, (now, inputs, targets, ends_turn, *_) in batches_of(data, 2):
        count = position[1] + 1 if position[0] == round_index else 1
        position = (round_index, count)
        if limit is not None and count > limit:
            continue
        if last not in (None, now) and passing:
            clients[now].load_state_dict(clients[last].state_dict())
            if policy == "travel":
                state = copy.deepcopy(optimizers[last].state_dict())
                optimizers[now].load_state_dict(state)
            if policy == "reset":
                optimizers[now] = SGD(clients[now].parameters())
        last = now
        logits = server(clients[now](inputs))
        (nn.functional.cross_entropy(logits, targets) / accumulate).backward()
        batches += 1
        ends_turn = ends_turn or count == limit
        if batches == accumulate or ends_turn:
            for segment in (clients[now], server):
                if clip:
                    clip(segment.parameters())
            steps.append([flat_gradient(clients[now]), flat_gradient(server)])
            for optimizer in (optimizers[now], server_optimizer):
                optimizer.step()
                optimizer.zero_grad()
            batches = 0
        if ends_turn:
            yield [torch.stack(parts).mean(0) for parts in zip(*steps, strict=True)]
            steps = []


def plain_drift(**options):
    """Returns the cosines of successive turns, of the client and of the server."""
    turns = list(plain_turns(**options))
    return [
        [
            nn.functional.cosine_similarity(one[party], other[party], dim=0).item()
            for one, other in pairwise(turns)
        ]
        for party in (0, 1)
    ]


def by_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.1)


def by_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.01)


CASES = {
    "keep": ({}, {}),
    "travel": ({}, {"policy": "travel"}),
    "reset, accumulated": (
        {"accumulate_grad_batches": 2},
        {"policy": "reset", "accumulate": 2},
    ),
    "clipped by norm": ({"gradient_clip_val": 0.1}, {"clip": by_norm}),
    "clipped by value, accumulated": (
        {
            "gradient_clip_val": 0.01,
            "gradient_clip_algorithm": "value",
            "accumulate_grad_batches": 2,
        },
        {"clip": by_value, "accumulate": 2},
    ),
    "own weights": ({}, {"passing": False}),
    "rounds cut short": ({}, {"limit": 5}),
}


@pytest.mark.parametrize("case", CASES)
def test_drift_is_that_of_a_plain_loop(tmp_path, case):
    options, plain = CASES[case]
    logger, policy = ListLogger(), plain.get("policy", "keep")
    fit(
        tmp_path,
        [DriftMonitor(server=True)],
        make_module(**options),
        passing=RoundRobinWeightPassing(
            plain.get("passing", True), optimizer_state=policy
        ),
        logger=logger,
        limit_train_batches=plain.get("limit"),
    )
    client, server = plain_drift(**plain)
    assert logger.values("drift/client") == pytest.approx(client, abs=1e-5)
    assert logger.values("drift/server") == pytest.approx(server, abs=1e-5)
    assert len(client) == (3 if "limit" in plain else 5)
    if "limit" not in plain:  # at the last batches of the turns, but the first
        assert logger.steps("drift/client") == [5, 8, 11, 14, 17]


def test_clipping_by_value_and_the_policy_do_change_the_expectation():
    """The cases above differ from one another: none stands for all."""
    drifts = [tuple(plain_drift(**plain)[0]) for _, plain in CASES.values()]
    assert len(set(drifts)) == len(CASES)


def test_the_server_is_left_out_unless_asked_for(tmp_path):
    logger, monitor = ListLogger(), DriftMonitor()
    fit(tmp_path, [monitor], logger=logger)
    assert logger.values("drift/client")
    assert "drift/server" not in logger.logged
    assert list(monitor.state_dict()["before"]) == ["client"]


def test_one_client_is_compared_with_its_own_turn_before(tmp_path):
    logger = ListLogger()
    fit(tmp_path, [DriftMonitor()], data=make_data(1), logger=logger, max_epochs=3)
    assert logger.steps("drift/client") == [13, 20]


def test_a_zero_gradient_has_no_direction(tmp_path):
    logger = ListLogger()
    module = make_module()
    nn.init.zeros_(module.server.get_submodule("5").weight)
    module.server.requires_grad_(False)  # nothing reaches the client through zeros
    module.server.get_submodule("5").bias.requires_grad_(True)
    fit(tmp_path, [DriftMonitor()], module, logger=logger)
    assert "drift/client" not in logger.logged


@pytest.mark.parametrize("batch_idx", [2, 4], ids=["end of a turn", "mid-turn"])
def test_a_run_that_goes_on_in_mid_round_logs_the_same(tmp_path, batch_idx):
    whole, resumed = ListLogger(), ListLogger()
    path = tmp_path / "middle.ckpt"
    save = SaveAt(path, 1, batch_idx)
    fit(tmp_path, [DriftMonitor(), save], logger=whole, max_epochs=3)
    assert torch.load(path, weights_only=True)["callbacks"]["DriftMonitor"]["before"]
    fit(tmp_path, [DriftMonitor()], logger=resumed, max_epochs=3, ckpt_path=path)
    tail = whole.logged["drift/client"][-len(resumed.logged["drift/client"]) :]
    assert len(tail) == 5
    assert resumed.logged["drift/client"] == tail


def test_nothing_is_kept_without_a_logger_nor_from_another_run(tmp_path):
    monitor = DriftMonitor()
    fit(tmp_path, [monitor])
    assert monitor.state_dict() == {"now": {}, "before": {}}
    loggers = [ListLogger(), ListLogger()]
    for logger in loggers:
        fit(tmp_path, [monitor], logger=logger)
    assert loggers[0].logged["drift/client"] == loggers[1].logged["drift/client"]


def test_between_turns_a_checkpoint_holds_one_gradient_of_the_client_segment(tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path, filename="last")
    fit(
        tmp_path, [DriftMonitor(), save], logger=ListLogger(), enable_checkpointing=True
    )
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    kept = state["DriftMonitor"]
    tensors = [t for part in kept.values() for g in part.values() for t in g.values()]
    segment = sum(p.numel() for p in network()[:2].parameters())
    assert sum(t.numel() for t in tensors) == segment
