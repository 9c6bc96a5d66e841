"""Bytes against closed formulas, whatever the sizes, the precision and the cut."""

from functools import partial

import torch
from conftest import RandomImages, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import Trainer

from split_lightning import (
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)
from split_lightning.observers.traffic import NAMES

# `tiny_network` on 1 x 6 x 6 images: by cut layer the values that cross for a sample,
# and the client's parameters, float buffers and counters.
CUTS = {
    0: (4 * 6 * 6, 36, 0, 0),
    1: (4 * 6 * 6, 36 + 8, 8, 1),
    3: (4 * 3 * 3, 36 + 8, 8, 1),
    4: (36, 36 + 8, 8, 1),
}
# Bytes of a value that crosses, of a parameter, and of a float buffer.
PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (2, 4), "bf16-true": (2, 2)}


@settings(max_examples=12 if settings.default.max_examples < 100 else 200)
@given(
    cut_layer=st.sampled_from([*CUTS]),
    precision=st.sampled_from([*PRECISIONS]),
    policy=st.sampled_from(["keep", "travel", "reset"]),
    num_samples=st.integers(8, 40),
    num_clients=st.integers(1, 4),
    batch_size=st.integers(1, 16),
    local_epochs=st.integers(1, 2),
    rounds=st.integers(1, 2),
    enabled=st.booleans(),
)
def test_bytes_equal_the_closed_formula(
    cut_layer,
    precision,
    policy,
    num_samples,
    num_clients,
    batch_size,
    local_epochs,
    rounds,
    enabled,
):
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    module = SplitLightningModule(tiny_network(), cut_layer, sgd, sgd, num_classes=3)
    data = SplitDataModule(
        RandomImages(num_samples),
        num_clients,
        batch_size=batch_size,
        local_epochs=local_epochs,
        val_share=0,
    )
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=rounds,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RoundRobinWeightPassing(
                enabled, optimizer_state=policy if enabled else "keep"
            )
        ],
    )
    trainer.fit(module, datamodule=data)

    values, parameters, buffers, counters = CUTS[cut_layer]
    of_value, of_weight = PRECISIONS[precision]
    samples = num_samples * local_epochs * rounds
    handoffs = (rounds * num_clients - 1) * (num_clients > 1) * enabled
    segment = of_weight * (parameters + buffers) + 8 * counters
    momentum = of_weight * parameters * (policy == "travel")
    assert module.totals() == dict.fromkeys(NAMES, 0) | {
        "uplink_bytes": samples * (values * of_value + 8),  # a label is an int64
        "downlink_bytes": samples * values * of_value,
        "handoff_bytes": handoffs * (segment + momentum),
        "handoffs": handoffs,
    }
