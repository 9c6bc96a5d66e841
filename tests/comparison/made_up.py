"""Made-up runs' folders, as runs leave them."""

import csv
import json

from omegaconf import OmegaConf

COLUMNS = [
    "round",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "uplink_bytes",
    "downlink_bytes",
    "handoff_bytes",
    "handoffs",
    "images",
    "seconds",
]


def config(folder, lr=0.01, **others):
    """A small configuration that passes its keys on, as `conf` does."""
    return {
        "seed": 0,
        "rounds": 10,
        "ckpt_path": None,
        "output_dir": str(folder),
        "optimizer": {
            "client": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": lr},
            "server": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.01},
        },
        "data": {"partitioner": {"_target_": "flwr.IidPartitioner"}},
        "protocol": {"_target_": "RoundRobin"},
        "module": {"client_optimizer": "${optimizer.client}"},
        "callbacks": {"last": {"dirpath": "${output_dir}/checkpoints"}},
        **others,
    }


def a_run(folder, cfg=None, results=None, history=None, failure=None):
    """Writes a run's folder; `history` is the validation accuracy of each round."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = config(folder) if cfg is None else cfg
    OmegaConf.save(OmegaConf.create(cfg), folder / "config.yaml")
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if failure is not None:
        (folder / "failure.json").write_text(json.dumps(failure))
    if history is not None:
        with (folder / "history.csv").open("w", newline="") as file:
            rows = csv.DictWriter(file, COLUMNS)
            rows.writeheader()
            for i, accuracy in enumerate(history, start=1):
                measured = {"uplink_bytes": 1000 * i, "downlink_bytes": 900 * i}
                measured |= {"round": i, "val_accuracy": accuracy, "seconds": 2.5 * i}
                rows.writerow(measured)
    return folder


def results(accuracy, **others):
    return {
        "test_accuracy": accuracy,
        "test_loss": 1.0 - accuracy,
        "val_accuracy": accuracy,
        "uplink_bytes": 3000,
        "downlink_bytes": 2000,
        "handoff_bytes": 500,
        "seconds": 7.5,
        "rounds": 3,
        **others,
    }
