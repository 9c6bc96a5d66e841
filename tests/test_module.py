"""`SplitLightningModule` against plain loops with no code of the library."""

import copy
from functools import partial

import pytest
import torch
from conftest import RandomImages, tiny_network
from flwr_datasets.partitioner import LinearPartitioner
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from split_lightning import (
    Centralized,
    Protocol,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
    merge,
)
from split_lightning.data import Images
from split_lightning.protocols import PassWeights, Train

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


def make_data(num_clients=3, **options):
    options = {"batch_size": 7, "val_share": 0.2, "seed": 3, **options}
    return SplitDataModule(RandomImages(), num_clients, **options)


def make_module(network=None, cut_layer=1, optimizer=SGD, **options):
    network = network or seeded_network()
    options.setdefault("num_classes", 3)
    own = None if cut_layer is None else optimizer
    return SplitLightningModule(network, cut_layer, own, optimizer, **options)


def seeded_network():
    torch.manual_seed(5)
    return tiny_network()


def fit(module, data, tmp_path, callbacks=None, **options):
    options = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
    } | options
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [RoundRobinWeightPassing()] if callbacks is None else callbacks
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **options
    )
    torch.manual_seed(11)
    trainer.fit(module, datamodule=data)
    return trainer


def batches_of(data, rounds):
    """Yields (round, client, inputs, targets, ends_turn) as a plain loop reads them."""
    data.setup("fit")
    loader = data.train_dataloader()
    for round_index in range(rounds):
        loader.set_epoch(round_index)
        for step in loader:
            (part,) = step.parts
            yield part.client_id, part.inputs, part.targets, step.ends_turn


def assert_equal_states(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("cut_layer", [0, 1, 3, 5, None])
def test_one_client_equals_the_unsplit_network(tmp_path, cut_layer, optimizer):
    module = make_module(None, cut_layer, optimizer)
    protocol = RoundRobinWeightPassing() if cut_layer is not None else Centralized()
    trainer = fit(module, make_data(1), tmp_path, [protocol])

    network = seeded_network()
    plain = optimizer(network.parameters())
    torch.manual_seed(11)
    for _, inputs, targets, _ in batches_of(make_data(1), rounds=2):
        plain.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        plain.step()
    assert trainer.global_step == 14  # 48 images in batches of 7, twice
    assert_equal_states(merge(*module.segments().values()), network.state_dict())
    network.eval()
    module.eval()
    assert torch.equal(module(inputs), network(inputs))


def plain_round_robin(policy, optimizer, data, rounds, passing=True):
    """The notebook's loop, mended: whole networks in lists, no code of the library."""
    whole = seeded_network()
    clients = [copy.deepcopy(whole[:2]) for _ in range(data.num_clients)]
    server = copy.deepcopy(whole[2:])
    optimizers = [optimizer(client.parameters()) for client in clients]
    server_optimizer = optimizer(server.parameters())
    last = None
    torch.manual_seed(11)
    for now, inputs, targets, _ in batches_of(data, rounds):
        if last not in (None, now) and passing:
            clients[now].load_state_dict(clients[last].state_dict())
            if policy == "travel":
                state = copy.deepcopy(optimizers[last].state_dict())
                optimizers[now].load_state_dict(state)
            if policy == "reset":
                optimizers[now] = optimizer(clients[now].parameters())
        last = now
        optimizers[now].zero_grad()
        server_optimizer.zero_grad()
        activations = clients[now](inputs)
        smashed = activations.detach().clone().requires_grad_()
        nn.functional.cross_entropy(server(smashed.clone()), targets).backward()
        activations.backward(smashed.grad)
        optimizers[now].step()
        server_optimizer.step()
    return clients, server, last


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_round_robin_equals_a_plain_loop(tmp_path, policy, optimizer):
    module = make_module(optimizer=optimizer)
    protocol = RoundRobinWeightPassing(optimizer_state=policy)
    fit(module, make_data(), tmp_path, [protocol], max_epochs=3)

    clients, server, last = plain_round_robin(policy, optimizer, make_data(), 3)
    assert_equal_states(module.client.state_dict(), clients[last].state_dict())
    assert_equal_states(module.server.state_dict(), server.state_dict())


def test_policies_differ(tmp_path):
    ends = []
    for policy in ("keep", "travel", "reset"):
        module = make_module()
        protocol = RoundRobinWeightPassing(optimizer_state=policy)
        fit(module, make_data(), tmp_path, [protocol])
        ends.append(module.client.state_dict()["0.weight"].clone())
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[0], ends[2])


def test_without_weight_passing_equals_clients_that_never_share(tmp_path):
    module = make_module()
    callbacks = [RoundRobinWeightPassing(enabled=False)]
    fit(module, make_data(), tmp_path, callbacks, max_epochs=3)

    clients, _, _ = plain_round_robin("keep", SGD, make_data(), 3, passing=False)
    for client_id, client in enumerate(clients):
        own = module.segments(client_id)["client"]
        assert_equal_states(own.state_dict(), client.state_dict())
    assert module.totals()["handoff_bytes"] == module.totals()["handoffs"] == 0


@pytest.mark.parametrize(
    ("algorithm", "clip"),
    [("norm", nn.utils.clip_grad_norm_), ("value", nn.utils.clip_grad_value_)],
)
def test_clipping_and_accumulation_equal_a_plain_loop(tmp_path, algorithm, clip):
    module = make_module(
        gradient_clip_val=0.05,
        gradient_clip_algorithm=algorithm,
        accumulate_grad_batches=2,
    )
    trainer = fit(module, make_data(2), tmp_path)

    network = seeded_network()
    client, server = network[:2], network[2:]
    both = [SGD(client.parameters()), SGD(server.parameters())]
    states = {0: copy.deepcopy(both[0].state_dict()), 1: both[0].state_dict()}
    count, steps, last = 0, 0, 0
    torch.manual_seed(11)
    for now, inputs, targets, ends_turn in batches_of(make_data(2), rounds=2):
        if now != last:  # each client has its own momentum
            states[last] = copy.deepcopy(both[0].state_dict())
            both[0].load_state_dict(states[now])
            last = now
        (nn.functional.cross_entropy(network(inputs), targets) / 2).backward()
        count += 1
        if count == 2 or ends_turn:
            clip(client.parameters(), 0.05)
            clip(server.parameters(), 0.05)
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
            count, steps = 0, steps + 1
    # 24 images a client: batches of 7, 7, 7, 3, so two steps a turn.
    assert trainer.global_step == steps == 8
    assert_equal_states(merge(module.client, module.server), network.state_dict())


def test_a_turn_leaves_no_gradient_to_the_next(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.left = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch.ends_turn:
                gradients = [p.grad for p in pl_module.parameters()]
                self.left.append(any(g is not None for g in gradients))

    module = make_module(accumulate_grad_batches=3)
    watch = Watch()
    fit(module, make_data(), tmp_path, [RoundRobinWeightPassing(), watch])
    assert watch.left == [False] * 6


@pytest.mark.parametrize(("interval", "ticks"), [("round", 3), ("batch", 9)])
def test_schedulers_step(tmp_path, interval, ticks):
    module = make_module(
        client_scheduler=partial(
            torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5
        ),
        server_scheduler=partial(
            torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.9
        ),
        scheduler_interval=interval,
    )
    trainer = fit(module, make_data(batch_size=16), tmp_path, max_epochs=3)
    client, server = trainer.optimizers
    assert client.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**ticks)
    assert server.param_groups[0]["lr"] == pytest.approx(0.05 * 0.9**ticks)


def test_a_scheduler_that_needs_a_metric_is_refused(tmp_path):
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        fit(make_module(client_scheduler=plateau), make_data(), tmp_path)


def test_a_frozen_client_sends_up_and_gets_nothing_back(tmp_path):
    network = seeded_network()
    network[:2].requires_grad_(False)
    module = make_module(network)
    fit(module, make_data(1), tmp_path)
    assert torch.equal(module.client.state_dict()["0.weight"], network[0].weight)
    assert module.totals()["uplink_bytes"] > 0
    assert module.totals()["downlink_bytes"] == 0


def test_bf16_mixed_equals_autocast_end_to_end(tmp_path):
    module = make_module()
    fit(module, make_data(1), tmp_path, precision="bf16-mixed", max_epochs=1)

    network = seeded_network()
    plain = SGD(network.parameters())
    torch.manual_seed(11)
    for _, inputs, targets, _ in batches_of(make_data(1), rounds=1):
        plain.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(network(inputs), targets)
        loss.backward()
        plain.step()
    assert_equal_states(merge(module.client, module.server), network.state_dict())
    # Two bytes a value: 48 images of 4 x 6 x 6, and targets of 8 bytes.
    assert module.totals()["uplink_bytes"] == 48 * (4 * 6 * 6 * 2 + 8)


def test_channels_last_gives_the_same_numbers_but_for_rounding(tmp_path):
    ends = []
    for channels_last in (False, True):
        module = make_module(channels_last=channels_last)
        fit(module, make_data(), tmp_path, max_epochs=1)
        ends.append(merge(module.client, module.server))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor)


def test_validation_and_test_are_in_eval_mode_with_the_last_client(tmp_path):
    module, data = make_module(), make_data()
    trainer = fit(module, data, tmp_path)
    metrics = dict(trainer.callback_metrics)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    predicted = torch.cat(trainer.predict(module, datamodule=data))

    network = tiny_network()
    network.load_state_dict(merge(module.client, module.server))
    network.eval()
    train, owned = data._train, torch.cat(data.val_parts)
    val = Images(train.inputs[owned], train.targets[owned])
    for part, images in (("val", val), ("test", data._test)):
        found = metrics if part == "val" else tested
        with torch.no_grad():
            logits = network((images.inputs.float() / 255 - 0.5) / 0.5)
        loss = nn.functional.cross_entropy(logits, images.targets)
        accuracy = (logits.argmax(1) == images.targets).float().mean()
        assert float(found[f"{part}/loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert float(found[f"{part}/accuracy"]) == pytest.approx(float(accuracy))
    torch.testing.assert_close(predicted, logits.softmax(1))


FLAGS = {
    "fast_dev_run": ({"fast_dev_run": 2}, 2),
    "overfit_batches": ({"overfit_batches": 2, "max_epochs": 3}, 6),
    "limit_train_batches": ({"limit_train_batches": 4}, 8),
    "limit_share": ({"limit_train_batches": 0.5}, 10),
    "deterministic": ({"deterministic": True}, 20),
    "max_steps": ({"max_steps": 5, "max_epochs": -1}, 5),
    "max_time": ({"max_time": {"minutes": 5}}, 20),
    "detect_anomaly": ({"detect_anomaly": True}, 20),
    "simple_profiler": ({"profiler": "simple"}, 20),
    "advanced_profiler": ({"profiler": "advanced"}, 20),
    "barebones": ({"barebones": True}, 20),
    "no_validation": ({"limit_val_batches": 0}, 20),
}


@pytest.mark.parametrize(("options", "steps"), FLAGS.values(), ids=FLAGS)
def test_trainer_flags_do_what_lightning_users_expect(tmp_path, options, steps):
    data = make_data(2, batch_size=5)  # 24 images a client: 10 batches a round
    barebones = options.get("barebones", False)
    options = {"accelerator": "cpu", "callbacks": [RoundRobinWeightPassing()]} | options
    if not barebones:
        options |= {"default_root_dir": tmp_path, "enable_progress_bar": False}
    trainer = Trainer(**{"max_epochs": 2} | options)
    module = make_module()
    before = seeded_network()
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps
    client, server = module.client.state_dict(), module.server.state_dict()
    assert not torch.equal(client["0.weight"], before[0].weight)
    assert not torch.equal(server["6.weight"], before[6].weight)


def test_overfit_batches_sees_the_same_batches_each_round(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(batch.parts[0].inputs.sum().item())

    watch = Watch()
    callbacks = [RoundRobinWeightPassing(), watch]
    fit(
        make_module(), make_data(), tmp_path, callbacks, overfit_batches=2, max_epochs=3
    )
    assert watch.seen[:2] == watch.seen[2:4] == watch.seen[4:]


def test_model_summary_has_a_row_for_each_side(tmp_path, capsys):
    fit(make_module(), make_data(), tmp_path)
    Trainer(
        fast_dev_run=1, accelerator="cpu", callbacks=[RoundRobinWeightPassing()]
    ).fit(make_module(), datamodule=make_data())
    printed = capsys.readouterr().out
    for row in (r"client", r"server"):
        assert row in printed
    assert "44" in printed  # conv 36 + BatchNorm 8
    assert "111" in printed  # linear 36 x 3 + 3


REFUSED = {
    "clip": ({"gradient_clip_val": 1.0}, "model.gradient_clip_val"),
    "accumulate": ({"accumulate_grad_batches": 4}, "model.accumulate_grad_batches"),
    "swa": (
        {"callbacks": [RoundRobinWeightPassing(), StochasticWeightAveraging(0.1)]},
        "StochasticWeightAveraging",
    ),
    "16-true": ({"precision": "16-true"}, "bf16-mixed"),
    "16-mixed": (
        {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
        "bf16-mixed",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_train_wrongly_is_refused(tmp_path, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(make_module(), make_data(), tmp_path, **options)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("ddp_find_unused_parameters_true", r"find_unused_parameters.*strategy='ddp'"),
        ("ddp_spawn", r"DDPStrategy\(start_method='spawn'\).*strategy='ddp'"),
    ],
)
def test_strategies_that_would_not_train_as_one_process_are_refused(strategy, message):
    trainer = Trainer(accelerator="cpu", strategy=strategy, devices=2, logger=False)
    with pytest.raises(MisconfigurationException, match=message):
        make_module().verify(trainer, make_data(), RoundRobinWeightPassing())
    with pytest.raises(MisconfigurationException, match=message):
        make_module(cut_layer=None).verify(trainer, make_data(1), Centralized())


@pytest.mark.parametrize("cut_layer", [1, [[0, 1]]])
def test_a_second_fit_starts_anew(tmp_path, cut_layer):
    """Also where clients and servers may have the same layers."""
    module = make_module(cut_layer=cut_layer)
    fit(module, make_data(), tmp_path)
    again = copy.deepcopy(merge(*module.segments().values()))
    fit(module, make_data(), tmp_path)
    fresh = seeded_network()
    fresh.load_state_dict(again)
    other = make_module(fresh, cut_layer)
    fit(other, make_data(), tmp_path)
    assert_equal_states(module.state_dict(), other.state_dict())
    assert module.totals() == other.totals()


@pytest.mark.parametrize("clients_per_round", [None, 2])
def test_a_checkpoint_in_mid_round_loses_no_batch(tmp_path, clients_per_round):
    """Where rounds differ in length, Lightning fetches a batch ahead of training."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def make():
        network = seeded_network()
        network[5].p = 0.0
        protocol = RoundRobinWeightPassing(clients_per_round=clients_per_round)
        data = make_data(partitioner=LinearPartitioner, batch_size=4)
        return make_module(network), data, protocol

    whole, data, protocol = make()
    fit(whole, data, tmp_path, [protocol, Save()], max_epochs=3)
    resumed, data, protocol = make()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[protocol],
        default_root_dir=tmp_path,
    )
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "middle.ckpt")
    assert_equal_states(resumed.state_dict(), whole.state_dict())


def test_an_own_protocol_can_pass_the_weights(tmp_path):
    class Alternating(Protocol):
        def plan(self, round):
            for client, batches in round.turns(round.clients()):
                yield PassWeights(to=client)
                for batch in batches:
                    yield Train((batch,))

    own, ours = make_module(), make_module()
    fit(own, make_data(), tmp_path, [Alternating()])
    fit(ours, make_data(), tmp_path)
    assert_equal_states(own.state_dict(), ours.state_dict())


def test_a_protocol_must_not_be_forgotten(tmp_path):
    with pytest.raises(MisconfigurationException, match="Add RoundRobinWeight"):
        fit(make_module(), make_data(), tmp_path, callbacks=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": -1.0}, "gradient_clip_val.*positive.*-1"),
        ({"gradient_clip_algorithm": "max"}, "gradient_clip_algorithm.*norm.*max"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches.*positive.*0"),
        ({"scheduler_interval": "step"}, "scheduler_interval.*round.*step"),
        ({"cut_layer": "6"}, "cut_layer.*server segment empty"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_module(**options)


def test_optimizer_options_out_of_range_are_refused(tmp_path):
    module = make_module(optimizer=partial(torch.optim.SGD, lr=-1.0))
    with pytest.raises(ValueError, match=r"client's optimizer.*lr.*-1"):
        fit(module, make_data(), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        *({"optimizer_state": p} for p in ("keep", "travel", "reset")),
        {"enabled": False},
    ],
)
def test_a_run_goes_on_from_a_checkpoint(tmp_path, options):
    def make():
        network = seeded_network()
        network[5].p = 0.0  # checkpoints hold no state of random numbers
        return make_module(network)

    def passes():
        return [RoundRobinWeightPassing(**options)]

    whole, half, resumed = make(), make(), make()
    fit(whole, make_data(), tmp_path, passes(), max_epochs=4)
    trainer = fit(half, make_data(), tmp_path, passes(), max_epochs=2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)  # plain containers and tensors
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=passes(),
        default_root_dir=tmp_path,
    )
    trainer.fit(resumed, datamodule=make_data(), ckpt_path=path)
    assert trainer.global_step == 4 * 9
    assert_equal_states(resumed.state_dict(), whole.state_dict())
    assert resumed.totals() == whole.totals()


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_memory_of_waiting_clients(tmp_path, policy):
    """Nothing with `travel` and `reset`; one momentum each with `keep`."""
    remembered = []
    for num_clients in (3, 12):
        module = make_module()
        protocol = RoundRobinWeightPassing(optimizer_state=policy)
        fit(module, make_data(num_clients), tmp_path, [protocol])
        own = module.engine.stores[0].own
        assert not own["parameters"]
        assert not own["buffers"]
        remembered.append(len(own["optimizer"]))
    assert remembered == ([2, 11] if policy == "keep" else [0, 0])
