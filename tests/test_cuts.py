"""The command that says what each cut costs."""

import csv
import io
import socket
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
from rich.console import Console

from split_lightning import CutCost, cut_costs, cut_layers
from split_lightning.cuts import main
from split_lightning.models import DigitsCNN
from split_lightning.runs.cut_plot import draw_costs
from split_lightning.runs.cut_report import costs_table, layers_down_to, report_costs

FILES = Path(__file__).parents[1].glob("conf/model/*.yaml")
MODELS = sorted({path.stem for path in FILES} - {"custom"})


@pytest.fixture(autouse=True)
def _folder_without_network(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)


def rows_of(file):
    with Path(file).open() as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_without_its_data(model, capsys, tmp_path):
    data = "digits" if model == "digits_cnn" else "cifar10"
    main([f"model={model}", f"data={data}", "depth=1", "data.image_size=32"])
    (folder,) = (tmp_path / "cuts").iterdir()
    assert sorted(f.name for f in folder.iterdir()) == ["cuts.csv", "cuts.png"]
    assert (folder / "cuts.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(folder / "cuts.csv")
    printed = capsys.readouterr().out
    assert f"{Path('cuts', folder.name, 'cuts.csv')}" in printed
    assert f"{Path('cuts', folder.name, 'cuts.png')}" in printed
    assert rows
    assert any(row["dominated"] == "False" for row in rows)
    for row in rows:
        assert int(row["client_forward_flops"]) > 0
        assert "." not in row["cut_layer"]


def test_the_file_holds_what_the_function_returns(tmp_path):
    main(["output_dir=here", "data.num_classes=7"])
    costs = cut_costs(DigitsCNN(num_classes=7), (1, 8, 8))
    rows = rows_of("here/cuts.csv")
    assert [tuple(row.values())[:-1] for row in rows] == [
        tuple(map(str, cost)) for cost in costs
    ]
    assert [row["dominated"] for row in rows] == [
        str(cost.is_dominated(costs)) for cost in costs
    ]
    assert not (tmp_path / "cuts").exists()


def test_an_experiment_names_network_and_images():
    main(["+experiment=rr10", "depth=1"])
    rows = rows_of("cuts/resnet18-3x32x32/cuts.csv")
    (row,) = [row for row in rows if row["cut_layer"] == "maxpool"]
    assert int(row["uplink_bytes"]) == 4 * 64 * 8 * 8 + 8


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rounds=3"], ["`rounds=3` would change nothing", "cuts does not use"]),
        (["data.root=/x"], ["data.root=/x", "would change nothing"]),
        (["optimizer=adam"], ["optimizer=adam", "would change nothing"]),
        (["model.cut_layer=fc1"], ["model.cut_layer=fc1", "would change nothing"]),
        (["model=resnet81"], ["model=resnet81", "resnet18"]),
        (["depht=2"], ["depht=2", "`depth`"]),
        (["depth=0"], ["`depth`", "at least 1, or all", "0"]),
        (["depth=true"], ["`depth`", "at least 1, or all", "True"]),
        (["depth=some"], ["`depth`", "some"]),
        (["data.image_size=0"], ["data.image_size", "at least 1"]),
        (["model=vgg11_bn"], ["images of shape (1, 8, 8)"]),
        (["model.network._target_=torch.nn.Lineal"], ["torch.nn.Lineal"]),
        (["model.network.num_classes=x"], ["model.network.num_classes", "int"]),
        (["output_dir=null"], ["output_dir"]),
        (["output_dir=/proc/x"], ["output_dir", "can be written to"]),
        (["model"], ["model", "KEY=VALUE"]),
    ],
    ids=lambda value: value[0],
)
def test_a_mistake_gets_one_message(words, parts, capsys, caplog, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("split-lightning: error: ")
    assert message.count("\n") == 1
    assert "Traceback" not in caplog.text
    assert all(part in message for part in parts), message
    assert not list(tmp_path.iterdir())


def test_help_names_the_keys(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cuts", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert all(key in printed for key in ("depth=", "output_dir=", "model=", "data="))
    assert "run=FOLDER" not in printed


def made_up(layer, flops, link, memory=1, state=4, sizes=0):
    return CutCost(layer, 1, state, flops, 0, 5, 0, memory, link, 0, sizes)


def printed_report(costs, folder, width=80):
    console = Console(file=io.StringIO(), width=width)
    report_costs(costs, folder, console)
    return console.file.getvalue()


def test_a_table_fits_a_terminal(tmp_path):
    name = "features.17.conv.3.projection.relu"
    costs = [made_up(name, 999_999_999_999, 123_456_789, 123_456_789, 987_654)]
    lines = printed_report(costs, tmp_path).splitlines()
    (row,) = [line for line in lines if "123M" in line]
    assert "1e+03" not in row
    assert "1T" in row
    assert max(len(line) for line in lines if "cuts." not in line) <= 80
    assert name in "".join(line.split()[0] for line in lines if line.strip())


def test_what_others_dominate_is_not_marked(tmp_path):
    costs = [made_up("a", 1, 9), made_up("b", 2, 9), made_up("c", 3, 2)]
    printed = printed_report(costs, tmp_path)
    assert "Cuts marked `*` are Pareto-optimal" in " ".join(printed.split())
    lines = printed.splitlines()
    marks = {
        line.split()[0]: "*" in line for line in lines if line[:2] in ("a ", "b ", "c ")
    }
    assert marks == {"a": True, "b": False, "c": True}


def test_neighbours_that_cost_the_same_are_one_row_and_in_the_file(tmp_path):
    costs = [made_up("a", 1, 9), made_up("a.relu", 1, 9), made_up("b", 2, 3)]
    printed = printed_report(costs, tmp_path)
    assert "a.relu" not in printed
    assert "Left out: 1" in printed
    assert [row["cut_layer"] for row in rows_of(tmp_path / "cuts.csv")] == [
        "a",
        "a.relu",
        "b",
    ]


def test_sizes_that_cross_are_told(tmp_path):
    assert "Each batch" not in printed_report([made_up("a", 1, 9)], tmp_path)
    assert "16 bytes" in printed_report([made_up("a", 1, 9, sizes=16)], tmp_path)


def test_the_plot_names_each_cut_and_places_it():
    costs = cut_costs(DigitsCNN(), (1, 8, 8))
    figure = draw_costs(costs)
    choice, *panels = figure.axes
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == cut_layers(DigitsCNN())
    good = [cost for cost in costs if not cost.is_dominated(costs)]
    places = {text.get_text(): text.xy for text in choice.texts}
    assert places == {c.cut_layer: (c.client_flops, c.link_bytes) for c in good}
    points = sum(len(dots.get_offsets()) for dots in choice.collections)
    assert points == len(costs)
    widths = [[bar.get_width() for bar in axes.patches] for axes in panels]
    assert widths == [
        [cost.client_flops for cost in costs],
        [cost.link_bytes for cost in costs],
        [cost.client_activation_bytes for cost in costs],
        [cost.client_bytes for cost in costs],
    ]


def test_costs_of_nothing_can_be_drawn(tmp_path):
    costs = [made_up("a", 0, 9), made_up("b", 10, 3)]
    draw_costs(costs).savefig(tmp_path / "x.png")
    assert costs_table(costs).row_count == 2


def test_layers_by_depth():
    layers = ["a", *(f"b.{i}" for i in range(7)), "b", *(f"c.{i}.x" for i in range(9))]
    assert layers_down_to(layers, 1) == ["a", "b"]
    assert layers_down_to(layers, None) == layers[:9]  # eight or more
    assert layers_down_to(layers, 5) == layers
    assert layers_down_to(layers[:3], None) == layers[:3]  # there are no eight
    assert layers_down_to([], None) == []
