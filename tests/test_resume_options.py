"""A run goes on with the options that are chosen now, for every protocol."""

import math
from functools import partial

import pytest
import torch
from conftest import Recorder, tiny_network
from killing import Kill, Killed
from pytorch_lightning import Callback, Trainer
from test_resume import PASSING, make_data, make_module
from test_resume_protocols import PROTOCOLS, UNSPLIT

from split_lightning import Engine, SplitFedV2, SplitLightningModule
from split_lightning.callbacks import ResumeCheckpoint

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
COSINE = torch.optim.lr_scheduler.CosineAnnealingLR
KEEP, TRAVEL = (
    [partial(SplitFedV2, optimizer_state=policy)] for policy in ("keep", "travel")
)


class Choose(Callback):
    """Sets options by hand at the start of a round: what a resumption is held to."""

    def __init__(self, after, options):
        self.after = after
        self.options = options

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.after:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group.update(self.options)


def train(
    folder, module, data, flow, rounds, *more, ckpt=None, logger=False, every=None
):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=logger,
        callbacks=[
            *(make() for make in flow),
            *more,
            ResumeCheckpoint(folder, every_n_batches=every),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    torch.manual_seed(11)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return torch.load(folder / "last.ckpt", weights_only=True)


def module_of(name, optimizer, client_scheduler=None, server_scheduler=None):
    """A module for a protocol, cut or not."""
    own = {"server_scheduler": server_scheduler}
    if name in UNSPLIT:
        return make_module(optimizer, cut_layer=None, **own)
    return make_module(optimizer, client_scheduler=client_scheduler, **own)


def assert_same_weights(one, other):
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name


@pytest.mark.parametrize("name", PROTOCOLS | UNSPLIT)
def test_options_that_are_typed_hold(tmp_path, name):
    """As if the optimizers had got them by hand, in a run that never stopped."""
    flow, data = [(PROTOCOLS | UNSPLIT)[name]], partial(make_data, batch_size=10)
    now = {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1, "nesterov": True}
    make = partial(module_of, name)
    by_hand = train(tmp_path / "hand", make(SGD), data(), flow, 2, Choose(1, now))
    train(tmp_path / "a", make(SGD), data(), flow, 1)
    typed = make(partial(torch.optim.SGD, **now))
    ckpt = tmp_path / "a" / "last.ckpt"
    end = train(tmp_path / "b", typed, data(), flow, 2, ckpt=ckpt)
    assert_same_weights(end, by_hand)
    for optimizer in end["optimizer_states"]:
        assert optimizer["param_groups"][0].items() >= now.items()


CHANGES = {
    "betas": (ADAM, {"betas": (0.5, 0.9), "eps": 1e-3}),
    "decay": (partial(torch.optim.AdamW, lr=0.01), {"weight_decay": 0.5}),
    "momentum from 0": (partial(torch.optim.SGD, lr=0.05), {"momentum": 0.9}),
    "momentum to 0": (SGD, {"momentum": 0.0}),
    "centered from true": (
        partial(torch.optim.RMSprop, lr=0.01, centered=True),
        {"centered": False, "alpha": 0.5},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("flow", [KEEP, TRAVEL], ids=["keep", "travel"])
def test_options_of_each_kind_of_optimizer(tmp_path, name, flow):
    optimizer, now = CHANGES[name]
    by_hand = train(
        tmp_path / "hand", make_module(optimizer), make_data(), flow, 2,
        Choose(1, now),
    )  # fmt: skip
    train(tmp_path / "a", make_module(optimizer), make_data(), flow, 1)
    typed = make_module(partial(optimizer, **now))
    ckpt = tmp_path / "a" / "last.ckpt"
    end = train(tmp_path / "b", typed, make_data(), flow, 2, ckpt=ckpt)
    assert_same_weights(end, by_hand)


def test_momentum_that_is_gone_travels_no_more(tmp_path):
    """What an optimizer does not use is forgotten, in waiting states too."""
    spill, ckpt = tmp_path / "spill", tmp_path / "a" / "last.ckpt"

    def module(momentum):
        optimizer = partial(SGD, momentum=momentum)
        return make_module(optimizer, engine=Engine(spill_to=spill))

    train(tmp_path / "a", module(0.9), make_data(), KEEP, 1)
    end = train(tmp_path / "b", module(0.0), make_data(), KEEP, 2, ckpt=ckpt)
    at_rest = end["engine"]["stores"][0]["own"]["optimizer"]
    assert at_rest
    assert not any(own for states in at_rest.values() for own in states.values())
    assert not any(own for own in end["optimizer_states"][1]["state"].values())


def test_several_groups_of_parameters(tmp_path):
    """The options of each group hold, as in a network with a frozen layer."""

    def by_group(parameters, lrs):
        first, *others = parameters
        groups = [{"params": [first], "lr": lrs[0]}, {"params": others, "lr": lrs[1]}]
        return torch.optim.SGD([g for g in groups if g["params"]], lr=1.0)

    def make(*lrs):
        module = make_module(partial(by_group, lrs=lrs))
        module.server.get_parameter("6.bias").requires_grad_(False)
        return module

    before, same = make(0.1, 0.2), make(0.1, 0.2)
    frozen = before.server.get_parameter("6.bias").clone()
    train(tmp_path / "a", before, make_data(), PASSING, 1)
    ckpt = tmp_path / "a" / "last.ckpt"
    end = train(tmp_path / "b", make(0.3, 0.4), make_data(), PASSING, 2, ckpt=ckpt)
    rates = [g["lr"] for g in end["optimizer_states"][1]["param_groups"]]
    assert rates == [0.3, 0.4]
    end = train(tmp_path / "c", same, make_data(), PASSING, 2, ckpt=ckpt)
    assert torch.equal(same.server.get_parameter("6.bias"), frozen)
    whole = train(tmp_path / "whole", make(0.1, 0.2), make_data(), PASSING, 2)
    assert_same_weights(end, whole)


def rates(recorder, name="lr/server"):
    return [value for _, key, value in recorder.records if key == name]


@pytest.mark.parametrize("name", ["round_robin", "parallel", "fedavg, travel"])
def test_a_longer_schedule(tmp_path, name):
    """Rounds 3 to 5 are those of a cosine over five rounds."""
    flow = [(PROTOCOLS | UNSPLIT)[name]]

    def module(rounds):
        cosine = partial(COSINE, T_max=rounds)
        return module_of(name, SGD, cosine, cosine)

    train(tmp_path / "a", module(2), make_data(), flow, 2)
    ckpt, recorder = tmp_path / "a" / "last.ckpt", Recorder()
    train(tmp_path / "b", module(5), make_data(), flow, 5, ckpt=ckpt, logger=recorder)
    cosine = [0.05 * (1 + math.cos(math.pi * n / 5)) / 2 for n in (2, 3, 4)]
    assert rates(recorder) == pytest.approx(cosine)


STEP = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
SCHEDULES = {
    "gamma": (STEP, partial(STEP, gamma=0.1), [0.05 * 0.1**n for n in (1, 2)]),
    "milestones": (
        partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 2]),
        partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2], gamma=0.5),
        [0.05, 0.025],
    ),
    "another kind": (STEP, partial(COSINE, T_max=4), [0.05 * 0.8535534, 0.05 * 0.5]),
    "one from now on": (None, STEP, [0.025, 0.0125]),
    "none any more": (STEP, None, [0.05, 0.05]),
    "the same": (STEP, STEP, [0.025, 0.0125]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_schedule_takes_effect_at_its_place(tmp_path, name):
    before, now, expected = SCHEDULES[name]
    first = make_module(SGD, client_scheduler=before, server_scheduler=before)
    train(tmp_path / "a", first, make_data(), PASSING, 1)
    module = make_module(SGD, client_scheduler=now, server_scheduler=now)
    ckpt, recorder = tmp_path / "a" / "last.ckpt", Recorder()
    train(tmp_path / "b", module, make_data(), PASSING, 3, ckpt=ckpt, logger=recorder)
    assert rates(recorder) == pytest.approx(expected)
    assert rates(recorder, "lr/client") == pytest.approx(expected)


def test_a_schedule_of_batches_from_the_middle_of_a_round(tmp_path):
    """After 4 of 9 batches the learning rate is that of the fifth."""

    def module(lr, **options):
        options |= {"client_scheduler": STEP, "server_scheduler": STEP}
        return make_module(partial(SGD, lr=lr), scheduler_interval="batch", **options)

    with pytest.raises(Killed):
        train(tmp_path, module(0.1), make_data(batch_size=6), PASSING, 1,
              Kill(4), every=1)  # fmt: skip
    path = tmp_path / "last.ckpt"
    end = train(tmp_path / "b", module(0.4), make_data(batch_size=6), PASSING, 1,
                ckpt=path)  # fmt: skip
    steps = end["global_step"]
    assert steps > 4
    found = end["optimizer_states"][0]["param_groups"][0]["lr"]
    assert found == pytest.approx(0.4 * 0.5**steps)


def test_a_schedule_that_is_over_is_refused(tmp_path):
    train(tmp_path / "a", make_module(SGD), make_data(), PASSING, 2)
    once = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=1)
    with pytest.raises(ValueError, match="schedule to reach beyond the 2 steps"):
        train(tmp_path / "b", make_module(SGD, client_scheduler=once), make_data(),
              PASSING, 3, ckpt=tmp_path / "a" / "last.ckpt")  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (SGD, ADAM, r"client's optimizer.*SGD, as in.*but got Adam"),
        (ADAM, partial(torch.optim.AdamW, lr=0.1), "Adam, as in.*but got AdamW"),
        (ADAM, partial(ADAM, amsgrad=True), "Adam now needs 'max_exp_avg_sq'"),
    ],
)
@pytest.mark.parametrize("flow", [KEEP, TRAVEL], ids=["keep", "travel"])
def test_what_the_optimizer_could_not_go_on_from_is_refused(
    tmp_path, flow, before, now, words
):
    train(tmp_path / "a", make_module(before), make_data(), flow, 1)
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "b", make_module(now), make_data(), flow, 2,
              ckpt=tmp_path / "a" / "last.ckpt")  # fmt: skip


def test_what_differs_is_named_once(tmp_path, caplog):
    train(tmp_path / "a", make_module(SGD), make_data(), PASSING, 1)
    ckpt = tmp_path / "a" / "last.ckpt"
    train(tmp_path / "b", make_module(SGD), make_data(), PASSING, 2, ckpt=ckpt)
    assert "other options" not in caplog.text
    other = SplitLightningModule(tiny_network(), 1, SGD, partial(SGD, lr=0.2), 3)
    train(tmp_path / "c", other, make_data(), PASSING, 2, ckpt=ckpt)
    assert "continues with other options: server lr 0.05 -> 0.2." in caplog.text


def test_a_checkpoint_that_names_no_options(tmp_path):
    """Those of now hold; a chain of runs goes on from the last one's."""
    end = train(tmp_path / "a", make_module(SGD), make_data(), PASSING, 1)
    del end["options"]
    old = tmp_path / "old.ckpt"
    torch.save(end, old)
    faster = make_module(partial(SGD, lr=0.2))
    train(tmp_path / "b", faster, make_data(), PASSING, 2, ckpt=old)
    end = train(tmp_path / "c", make_module(SGD), make_data(), PASSING, 3,
                ckpt=tmp_path / "b" / "last.ckpt")  # fmt: skip
    assert end["optimizer_states"][0]["param_groups"][0]["lr"] == 0.05
