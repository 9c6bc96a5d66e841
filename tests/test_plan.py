"""`split_lightning.plan`: what it says a round sends is what training sends."""

import csv
import io
from collections import Counter

import pytest
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console
from test_protocol_configs import PROTOCOLS

from split_lightning.callbacks.virtual_clock import virtual_seconds
from split_lightning.cli.building import build
from split_lightning.cli.plan import COMMAND
from split_lightning.cli.planned_round import compose_plan, planned_round
from split_lightning.plan import main
from split_lightning.runs.plan_report import KINDS, Plan, Row, report_plan

SMALL = [
    "data.source._target_=conftest.RandomImages",
    "+data.source.shape=[1,8,8]",
    "data.num_classes=3",
    "data/partitioner=linear",
    "data.val_share=0",
    "num_clients=4",
    "batch_size=5",
    "rounds=2",
    "system=heterogeneous",
]
TRAVELS = "optimizer_state=travel"
CUTS = "model.cut_layer=[relu1,relu2]"
RUNS = [
    f"protocol=round_robin {TRAVELS} topology=vertical",
    f"protocol=round_robin {TRAVELS} {CUTS} optimizer=adam local_steps=1 "
    "model.accumulate_grad_batches=2",
    f"protocol=async_round_robin {TRAVELS} local_steps=1 protocol.in_flight=2",
    "protocol=async_round_robin topology=multi_hop buffers=keep system=none",
    "protocol=parallel protocol.every=1 topology=multi_hop",
    "protocol=gpsl topology=vertical_u model.accumulate_grad_batches=2",
    f"protocol=cyclesl {TRAVELS} clients_per_round=3",
    f"protocol=splitfed_v1 {TRAVELS} server_optimizer_state=travel {CUTS}",
    "protocol=splitfed_v2 local_steps=1 system.availability.absent=0.3 "
    "system.availability.dropout=0.3",
    "protocol=splitfed_v3 topology=u_shaped trainer.precision=bf16-mixed",
    f"protocol=multi_server {TRAVELS} server_optimizer_state=travel buffers=keep",
    "protocol=centralized",
    f"protocol=fedavg {TRAVELS} clients_per_round=2 trainer.precision=64-true",
    "protocol=local",
]


def planned(*words):
    GlobalHydra.instance().clear()
    return planned_round(compose_plan(COMMAND, [*SMALL, *words]))


def test_each_protocol_is_here():
    assert {line.split()[0].partition("=")[2] for line in RUNS} == PROTOCOLS


@pytest.mark.parametrize("line", RUNS)
def test_a_plan_sends_what_training_sends(tmp_path, line):
    plan = planned(*line.split(), "round=2")
    cfg = compose_plan(COMMAND, [*SMALL, *line.split()])
    cfg.callbacks, cfg.logger, cfg.output_dir = {}, None, str(tmp_path)
    cfg.trainer.enable_checkpointing = cfg.trainer.enable_progress_bar = False
    cfg.trainer.enable_model_summary, cfg.trainer.accelerator = False, "cpu"
    run = build(cfg)
    run.trainer.fit(run.module, datamodule=run.data)
    assert plan.of_run == run.module.totals()
    seconds = virtual_seconds(run.trainer)
    assert (plan.seconds or [None])[-1] == (seconds and pytest.approx(seconds))
    sent = [sum(row.num_bytes.values()) for row in plan.rows]
    counted = {k: v for k, v in plan.of_round.items() if k != "handoffs"}
    assert sum(sent) == sum(counted.values())


def shown(capsys, *words):
    GlobalHydra.instance().clear()
    main([*SMALL, *words])
    return capsys.readouterr().out.splitlines()


def test_the_terminal_shows_a_turn_in_a_line_and_the_file_each_batch(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    lines = shown(capsys, "round=2", "csv=all.csv")
    turns = [line.split()[:5] for line in lines if line.startswith("Train")]
    batches = [2, 3, 4, 5]  # of 6, 12, 18 and 24 samples
    assert turns == [
        ["Train", "client", f"{k}", "x", f"{batches[k]}"] for k in range(4)
    ]
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["action"] == "Train" for row in rows) == sum(batches)
    assert sum(int(row["samples"]) for row in rows) == 60
    smashed = 32 * 4 * 4 * 4  # of DigitsCNN behind `maxpool`, in float32
    for row in rows:
        assert int(row["smashed"]) == smashed * int(row["samples"])
    total = next(line.split() for line in lines if line.startswith("uplink_bytes"))
    of_round, of_run = (int(word.replace(",", "")) for word in total[1:])
    assert of_round == 60 * (smashed + 8)
    assert of_run == 2 * of_round


def test_a_long_plan_is_shortened(capsys):
    lines = shown(capsys, "num_clients=40", "data/partitioner=iid", "batch_size=1")
    assert len(lines) < 60
    assert any(line.startswith("... 36 more") for line in lines)


def test_no_number_is_cut_off_however_narrow_the_terminal():
    sent = dict.fromkeys(KINDS, 10_300)
    row = Row("Synchronize", (0, 1, 2), "", 1_293, sent, 1234.5678, times=41)
    totals = {"server_averaging_bytes": 9_876_543_210}
    plan = Plan("a plan", 2, [row], totals, totals, (1.0, 2.0))

    def printed(width, is_terminal):
        console = Console(
            file=io.StringIO(),
            width=width,
            force_terminal=is_terminal,
            color_system=None,
        )
        report_plan(plan, None, console)
        return console.file.getvalue().replace("─", "")

    text = printed(30, False)
    (line,) = [line for line in text.splitlines() if "Synchronize" in line]
    assert line.startswith("Synchronize clients 0-2 x 41  ")
    assert line.count(" 10.3 kB ") == len(KINDS)
    for width in (40, 60, 80, 200):
        folded = printed(width, True)
        assert max(map(len, folded.splitlines())) <= width
        assert Counter("".join(folded.split())) == Counter("".join(text.split()))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("round=0", "`round` to be an integer from 1 to `rounds` (2), but got 0"),
        ("round=3", "but got 3"),
        ("csv=", "`csv` to name a file"),
        ("trainer.max_steps=1", "plan does not use `trainer.max_steps`"),
        ("protocol=gpsl local_steps=2", "GPSL does not use `local_steps`"),
        ("protocol=fedavg topology=vanilla", "leave `topology` out"),
        ("num_client=3", "`num_clients`"),
    ],
)
def test_a_mistake_gets_one_line(capsys, typed, words):
    with pytest.raises(SystemExit):
        shown(capsys, *typed.split())
    message = capsys.readouterr().err
    assert message.count("split-lightning: error: ") == 1
    assert words in message
    assert "Traceback" not in message
