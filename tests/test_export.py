"""What is exported gives the logits of the run, without this package."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import tiny_network
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from test_evaluate import CENTRALIZED, trained
from torchvision.models import resnet18

from split_lightning.export import main
from split_lightning.models import DigitsCNN, split
from split_lightning.runs import load_run
from split_lightning.runs.exporting import Exporter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = trained(tmp_path_factory.mktemp("runs") / "split")
    main([f"run={folder}", "format=[safetensors,torch,onnx]"])
    return folder


def pixels_of(count):
    """Real images, as a device has them: uint8 (B, 1, 8, 8)."""
    images = load_digits().images[:count] * (255 / 16)
    return images.round().astype(np.uint8)[:, None]


def logits_of(run, pixels):
    """The reference: the unsplit network, from the run's own files."""
    network = DigitsCNN().eval()
    parts = [load_file(run / f"{side}.safetensors") for side in ("client", "server")]
    network.load_state_dict(parts[0] | parts[1])
    with torch.no_grad():
        return network((torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5).numpy()


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_client_on_a_device_and_server_behind_a_service(run, batch_size):
    """The example of the documentation."""
    export, pixels = run / "export", pixels_of(batch_size)
    about = json.loads((export / "export.json").read_text())

    # On the device: pixels, uint8 of shape (B, C, H, W), to what goes up.
    mean, std = (np.float32(about[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    client = onnxruntime.InferenceSession(export / "client.onnx")
    smashed = client.run(None, {"images": (pixels / np.float32(255) - mean) / std})

    # Behind the service: what came up, to the classes.
    server = onnxruntime.InferenceSession(export / "server.onnx")
    names = [value.name for value in server.get_inputs()]
    (logits,) = server.run(None, dict(zip(names, smashed, strict=True)))
    found = [about["classes"][k] for k in logits.argmax(axis=1)]

    expected = logits_of(run, pixels)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert found == [str(k) for k in expected.argmax(axis=1)]
    assert server.get_modelmeta().custom_metadata_map["classes"] == json.dumps(
        list("0123456789")
    )


@pytest.mark.parametrize("topology", ["u_shaped", "multi_hop"])
def test_each_stretch_of_a_route_is_a_file(tmp_path, topology):
    """Run one after the other, in the order of the route, they give the logits."""
    folder = trained(tmp_path / "run", f"topology={topology}")
    main([f"run={folder}", "format=[safetensors,torch,onnx]"])
    last = "client_2" if topology == "u_shaped" else "server_2"
    names = ["client", "server", last]
    pixels = pixels_of(7)
    values = [(pixels.astype(np.float32) / 255 - 0.5) / 0.5]
    programs = [torch.from_numpy(values[0])]
    for name in names:
        session = onnxruntime.InferenceSession(folder / "export" / f"{name}.onnx")
        taken = [value.name for value in session.get_inputs()]
        values = session.run(None, dict(zip(taken, values, strict=True)))
        program = torch.export.load(folder / "export" / f"{name}.pt2").module()
        programs = [program(*programs)]
    expected = logits_of(folder, pixels)
    np.testing.assert_allclose(values[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(programs[0].detach().numpy(), expected)
    about = json.loads((folder / "export" / "export.json").read_text())
    assert about["cut_layers"][0] == "maxpool"


def test_programs_need_torch_alone(run):
    pixels = pixels_of(7)
    client = torch.export.load(run / "export" / "client.pt2").module()
    server = torch.export.load(run / "export" / "server.pt2").module()
    logits = server(client((torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5))
    np.testing.assert_array_equal(logits.detach().numpy(), logits_of(run, pixels))


def test_the_merged_weights_load_into_the_unsplit_network(run):
    file = run / "export" / "network.safetensors"
    network = DigitsCNN()
    network.load_state_dict(load_file(file))
    parts = load_file(run / "client.safetensors") | load_file(
        run / "server.safetensors"
    )
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, parts[name]), name
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["classes"]) == list("0123456789")
    assert json.loads(metadata["image_shape"]) == [1, 8, 8]
    assert json.loads(metadata["mean"]) == json.loads(metadata["std"]) == [0.5]


def test_the_differences_are_printed(tmp_path, run, capsys):
    main([f"run={run}", "format=[safetensors,torch]", f"output_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert printed.count("0.0e+00") == 2  # the same operations: bit for bit
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"client.pt2", "server.pt2", "network.safetensors", "export.json"}


def test_a_checkpoint_and_the_unsplit_network(tmp_path, capsys):
    trained(tmp_path, *CENTRALIZED)
    main([f"run={tmp_path}", "format=[safetensors,torch]", "checkpoint=best"])
    weights = load_file(tmp_path / "export_best" / "network.safetensors")
    module = load_run(tmp_path, checkpoint="best")
    for name, tensor in module.segments()["network"].state_dict().items():
        assert torch.equal(weights[name], tensor)
    assert (tmp_path / "export_best" / "network.pt2").exists()


def test_several_tensors_cross_inside_a_residual_block(tmp_path):
    torch.manual_seed(0)
    network = resnet18(num_classes=10)
    network(torch.randn(4, 3, 32, 32))  # statistics of BatchNorm that are not 0 and 1
    client, server = split(network, "layer2.0.conv1")
    images = torch.randn(6, 3, 32, 32)
    exporter = Exporter({"client": client, "server": server}, images, {})
    assert exporter.export_programs(tmp_path) == 0
    assert exporter.export_onnx(tmp_path) < 1e-4
    sessions = [
        onnxruntime.InferenceSession(tmp_path / f"{side}.onnx")
        for side in ("client", "server")
    ]
    smashed = sessions[0].run(
        ["smashed_0", "smashed_1"], {"images": images[:2].numpy()}
    )
    assert [value.shape for value in smashed] == [(2, 64, 8, 8), (2, 128, 4, 4)]
    up = {"smashed_0": smashed[0], "smashed_1": smashed[1]}
    (logits,) = sessions[1].run(["logits"], up)
    with torch.no_grad():
        expected = network.eval()(images[:2]).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_off_is_taken_away(tmp_path, monkeypatch):
    segments = dict(zip(("client", "server"), split(tiny_network(), 1), strict=True))
    exporter = Exporter(segments, torch.randn(4, 1, 6, 6), {})
    exporter.expected = exporter.expected + 1
    with pytest.raises(ValueError, match=r"client\.pt2, server\.pt2.*1\.0e\+00 off"):
        exporter.export_programs(tmp_path)
    exporter.expected = exporter.expected * float("nan")
    with pytest.raises(ValueError, match="nan off"):
        exporter.export_weights(tiny_network(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refused(capsys):
    def export(*words):
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return export


def test_a_mistake_gets_one_message(refused, run, tmp_path):
    message = refused(f"run={run}", "format=pickle")
    assert "`format`" in message
    assert "safetensors, torch, onnx" in message
    assert "got pickle" in message
    assert "there is no folder" in refused("/nowhere")
    assert "would change nothing" in refused(f"run={run}", "trainer.accelerator=cpu")
    assert "output_dir" in refused(f"run={run}", f"output_dir={run}/config.yaml")


def test_a_missing_extra_is_named(refused, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    message = refused(f"run={run}", "format=onnx")
    assert "onnxscript" in message
    assert 'pip install "split-lightning[export]"' in message
