"""The plan of a configured round, applied without numbers."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from split_lightning.callbacks.virtual_clock import VirtualClock, new_clock
from split_lightning.cli.building import build
from split_lightning.cli.choices import title_of
from split_lightning.cli.config import check_classes, check_values, conf_folder
from split_lightning.cli.data_shape import leave_out_shape
from split_lightning.cli.run_command import Command, check_used
from split_lightning.protocols.dry_run import DryRun
from split_lightning.runs.plan_report import Plan, row_of

# The Trainer trains nothing: of the configuration it takes the precision.
_TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "barebones": False,
}


def compose_plan(command: Command, words: Sequence[str]) -> DictConfig:
    """Returns the configuration with the command's keys, checked.

    Raises:
        ValueError: If a word would change nothing, or a value is out of range.
    """
    own = [f"+{key}={'null' if v is None else v}" for key, v in command.keys.items()]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        cfg = compose("train", [*own, f"output_dir={command.folder}", *words])
    keys = (word.lstrip("+~").partition("=")[0] for word in words)
    typed = [w for w, k in zip(words, keys, strict=True) if k not in command.keys]
    check_values(cfg, typed)
    check_used(cfg, words, command)
    leave_out_shape(cfg)
    check_classes(cfg)
    if type(cfg.round) is not int or not 1 <= cfg.round <= cfg.rounds:
        raise ValueError(
            f"Expected `round` to be an integer from 1 to `rounds` ({cfg.rounds}), but "
            f"got {cfg.round}."
        )
    if cfg.csv is not None and (not isinstance(cfg.csv, str) or not cfg.csv):
        raise ValueError(f"Expected `csv` to name a file, but got {cfg.csv!r}.")
    return cfg


def planned_round(cfg: DictConfig) -> Plan:
    """Plans the rounds up to the one that is asked for, and carries their plans out.

    Raises:
        ValueError: If what is configured does not go together.
    """
    title = title_of(cfg)
    cfg.callbacks, cfg.logger = {}, None
    shown = {"_target_": cfg.trainer["_target_"], "precision": cfg.trainer.precision}
    cfg.trainer = OmegaConf.create({**shown, **_TRAINER, "max_epochs": cfg.rounds})
    cfg.engine = OmegaConf.create({"_target_": "split_lightning.Engine"})
    run = build(cfg)
    data, module, protocol = run.data, run.module, run.data.protocol
    plugin = run.trainer.precision_plugin
    plugin.convert_module(module)
    channel = module.channel
    channel.observers[:] = [module.traffic]
    callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
    systems = [own.system for own in callbacks if isinstance(own, VirtualClock)]
    example, clock = module.fed(data.example()), None
    if systems:
        clock, seconds = new_clock(systems[0], module, protocol, example)
        data.seconds = seconds or data.seconds
        clock.watch(channel)
    with plugin.forward_context():
        dry = DryRun(module, protocol, example)
    for number in range(cfg.round - 1):
        for _ in dry.carry_out(data.new_round(number)):
            pass
    before = dict(module.traffic.counts)
    begun = 0.0 if clock is None else clock.now
    actions = dry.carry_out(data.new_round(cfg.round - 1))
    rows = [row_of(action, events, clock) for action, events in actions]
    after = module.traffic.counts
    of_round = {name: after[name] - before[name] for name in after}
    seconds_of = None if clock is None else (clock.now - begun, clock.now)
    less = not data.missing_parts.is_trivial
    return Plan(title, cfg.round, rows, of_round, dict(after), seconds_of, less)
