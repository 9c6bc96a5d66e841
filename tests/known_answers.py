"""The answers of small runs, to hold later versions against.

Bytes, counts and virtual seconds are the same everywhere. Weights are held bit for bit
where torch and the processor's instructions are those of the recording; elsewhere the
losses have to be close. `python tests/known_answers.py` records all of them anew.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra

from split_lightning.callbacks.virtual_clock import virtual_seconds
from split_lightning.cli.building import build
from split_lightning.cli.plan import COMMAND
from split_lightning.cli.planned_round import compose_plan

FILE = Path(__file__).with_suffix(".json")
COMMON = [
    "data.source._target_=conftest.RandomImages",
    "+data.source.shape=[1,8,8]",
    "data.num_classes=3",
    "data/partitioner=linear",
    "num_clients=4",
    "batch_size=5",
    "rounds=2",
    "system=heterogeneous",
]
CUTS = "model.cut_layer=[relu3,relu1,relu2,conv2]"  # one for each client
CASES = [
    "protocol=round_robin optimizer_state=travel",
    "protocol=round_robin optimizer=adam optimizer_state=reset",
    "protocol=turns/five_shuffled",
    "protocol=round_robin protocol.enabled=false",
    "protocol=round_robin local_steps=2 system.availability.absent=0.3 "
    "system.availability.dropout=0.3",
    "protocol=round_robin model.gradient_clip_val=0.1",
    "protocol=round_robin model.accumulate_grad_batches=2",
    "protocol=splitfed_v1 optimizer_state=travel server_optimizer_state=travel",
    "protocol=splitfed_v1 buffers=keep",
    "protocol=splitfed_v2 optimizer_state=reset local_steps=1",
    "protocol=splitfed_v3",
    "protocol=multi_server optimizer_state=travel server_optimizer_state=reset",
    "protocol=parallel",
    "protocol=parallel protocol.every=1 optimizer_state=travel",
    "protocol=parallel protocol.every=step",
    "protocol=gpsl",
    "protocol=gpsl protocol.joint_norm=false",
    "protocol=cyclesl protocol.server_passes=2 protocol.server_batch_size=7",
    "protocol=async_round_robin optimizer_state=travel local_steps=1",
    "protocol=async_round_robin protocol.in_flight=2",
    "protocol=centralized optimizer=adam",
    "protocol=fedavg optimizer_state=travel",
    "protocol=fedavg clients_per_round=2 buffers=keep",
    "protocol=local",
    "protocol=round_robin topology=u_shaped optimizer_state=travel",
    "protocol=parallel topology=u_shaped protocol.every=1",
    "protocol=splitfed_v1 topology=multi_hop",
    "protocol=async_round_robin topology=multi_hop local_steps=1",
    "protocol=round_robin topology=vertical topology.missing=zeros "
    "topology.missing_parts.probability=0.2",
    "protocol=gpsl topology=vertical",
    "protocol=splitfed_v1 topology=vertical_u",
    f"protocol=round_robin {CUTS} optimizer_state=travel",
    f"protocol=splitfed_v1 {CUTS}",
]


def machine():
    """What the last bits of a sum depend on."""
    version = torch.__version__.partition("+")[0]
    return {"torch": version, "cpu": torch.backends.cpu.get_cpu_capability()}


def answer(case, folder):
    """Runs a case in this process; returns what it ends with."""
    GlobalHydra.instance().clear()
    cfg = compose_plan(COMMAND, [*COMMON, *case.split()])
    cfg.callbacks, cfg.logger, cfg.output_dir = {}, None, str(folder)
    cfg.trainer.enable_checkpointing = cfg.trainer.enable_progress_bar = False
    cfg.trainer.enable_model_summary, cfg.trainer.accelerator = False, "cpu"
    run = build(cfg)
    run.trainer.fit(run.module, datamodule=run.data)
    metrics = {k: float(v) for k, v in run.trainer.callback_metrics.items()}
    digest = hashlib.sha256()
    for client in range(4):
        for segment in run.module.segments(client).values():
            for name, tensor in sorted(segment.state_dict().items()):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "counts": run.module.totals(),
        "seconds": virtual_seconds(run.trainer),
        "losses": [metrics["train/loss"], metrics["val/loss"]],
        "weights": digest.hexdigest()[:16],
    }


def record():
    with tempfile.TemporaryDirectory() as folder:
        answers = {case: answer(case, folder) for case in CASES}
    content = {"machine": machine(), "answers": answers}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    record()
