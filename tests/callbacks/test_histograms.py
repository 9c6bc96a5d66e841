"""`Histograms`: what is written, and only on request."""

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from watching import events, fit, make_centralized, make_data, make_module, network

from split_lightning.callbacks import Histograms


def tensorboard(tmp_path):
    return TensorBoardLogger(tmp_path, name="", version="tb")


def test_weights_and_smashed_data_each_round(tmp_path):
    module, last = make_module(), []
    module.channel.observers.append(last.append)
    before = len(module.channel.observers)
    fit(tmp_path, [Histograms()], module, logger=tensorboard(tmp_path))
    written = events(tmp_path / "tb")
    names = {f"weights_client/{n}" for n, _ in module.client.named_parameters()}
    names |= {f"weights_server/{n}" for n, _ in module.server.named_parameters()}
    assert set(written.Tags()["histograms"]) == names | {"cut/smashed"}
    weights = written.Histograms("weights_server/5.weight")
    assert len(weights) == 2
    assert weights[-1].histogram_value.num == 3 * 36
    assert weights[-1].histogram_value.sum == pytest.approx(
        module.server.get_parameter("5.weight").double().sum().item(), rel=1e-5
    )
    sent = [m for m in last if getattr(m, "kind", None) == "smashed"]
    (smashed,) = sent[-1].payload
    found = written.Histograms("cut/smashed")[-1].histogram_value
    assert found.num == smashed.numel()
    assert found.sum == pytest.approx(smashed.double().sum().item(), rel=1e-4)
    assert len(module.channel.observers) == before  # its own was taken away


def test_the_unsplit_network_has_weights_alone(tmp_path):
    module, logger = make_centralized(), tensorboard(tmp_path)
    fit(
        tmp_path,
        [Histograms()],
        module,
        make_data(1),
        passing=None,
        logger=logger,
        max_epochs=1,
    )
    names = {f"weights_network/{name}" for name, _ in network().named_parameters()}
    assert set(events(tmp_path / "tb").Tags()["histograms"]) == names


class Break(Callback):
    """Leaves one finite value of three."""

    def on_train_epoch_end(self, trainer, pl_module):
        bias = pl_module.server.get_parameter("5.bias")
        bias.data[:2] = torch.tensor([float("nan"), float("inf")])


def test_values_that_are_not_finite_are_left_out(tmp_path):
    callbacks = [Break(), Histograms()]
    fit(tmp_path, callbacks, logger=tensorboard(tmp_path), max_epochs=1)
    written = events(tmp_path / "tb")
    found = written.Histograms("weights_server/5.bias")[-1].histogram_value
    assert found.num == 1


def test_without_tensorboard_they_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="logger=tensorboard"):
        fit(tmp_path, [Histograms()])
