"""The image and the services in `docker/`: their commands and keys are the package's.

No container is started here: what is in the files is parsed, and run in this process.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from split_lightning.cli.client import main as client
from split_lightning.cli.main import COMMANDS
from split_lightning.cli.server import main as server
from split_lightning.credentials import read_credentials

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
PARTIES = [name for name in SERVICES if name != "certificates"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDER = "/certs"


def instructions():
    """Returns the instructions of the Dockerfile and their arguments, in order."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in lines.splitlines() if line]


def the_only(values):
    (value,) = values
    return value


def test_there_are_a_server_and_three_clients():
    assert PARTIES == ["server", "client-0", "client-1", "client-2"]
    words = SERVICES["server"]["command"]
    assert f"num_clients={len(PARTIES) - 1}" in words
    port = the_only(w for w in words if w.startswith("engine.listen=")).split(":")[1]
    for number, name in enumerate(PARTIES[1:]):
        words = SERVICES[name]["command"]
        assert words[:3] == ["client", "--id", str(number)]
        assert f"engine.server=server:{port}" in words


@pytest.mark.parametrize("name", PARTIES)
def test_each_party_sees_its_own_certificates_alone(name):
    seen = [own for own in SERVICES[name]["volumes"] if "certificates" in str(own)]
    mounted = the_only(seen)
    assert (mounted["source"], mounted["target"]) == ("certificates", FOLDER)
    assert mounted["volume"] == {"subpath": name}
    assert mounted["read_only"]
    begins = SERVICES[name]["depends_on"]["certificates"]["condition"]
    assert begins == "service_completed_successfully"


def test_what_a_party_writes_is_in_a_volume_of_its_own():
    """In the folder of runs, which is below that in which the commands run."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    runs = f"{dict(instructions())['WORKDIR']}/runs"
    assert runs in text.split("USER")[0]  # made for the user, as new volumes are
    own = [SERVICES[name]["volumes"][-1].partition(":") for name in PARTIES]
    assert {folder for _, _, folder in own} == {runs}
    assert len({volume for volume, _, _ in own}) == len(PARTIES)
    assert {"certificates", *(volume for volume, _, _ in own)} == set(
        COMPOSE["volumes"]
    )
    for name in PARTIES:
        words = " ".join(SERVICES[name]["command"])
        assert "engine.folder" not in words
        assert "hydra.run.dir" not in words


@pytest.mark.parametrize("name", PARTIES)
def test_each_command_is_one_of_the_package_with_its_keys(
    monkeypatch, tmp_path, capsys, name
):
    """All is right but for the certificates, which are not there."""
    command, *words = SERVICES[name]["command"]
    assert command in COMMANDS
    words = [word.replace(FOLDER, "none") for word in words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["split-lightning", *words])
    with pytest.raises(SystemExit) as stopped:
        {"server": server, "client": client}[command]()
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"the certificate and the key of {name}, but none is no folder" in message


def test_certificates_are_written_once(tmp_path):
    service = SERVICES["certificates"]
    assert service["volumes"] == [f"certificates:{FOLDER}"]
    script = the_only(service["command"]).replace(FOLDER, str(tmp_path / "certs"))
    python = f"{shlex.quote(sys.executable)} -m split_lightning.certificates"
    script = script.replace("split-lightning certificates", python)
    written = []
    for _ in range(2):
        subprocess.run([*service["entrypoint"], script], check=True, env=os.environ)
        files = sorted(tmp_path.rglob("*.*"))
        written.append({file: file.read_bytes() for file in files})
    assert written[0] == written[1]
    for name in PARTIES:
        credentials = read_credentials(tmp_path / "certs" / name, name)
        if name == "server":
            own = x509.load_pem_x509_certificate(credentials.certificate)
            kind = x509.SubjectAlternativeName
            names = own.extensions.get_extension_for_class(kind).value
            assert names.get_values_for_type(x509.DNSName) == ["server"]


def test_the_image_runs_the_command_of_the_package_as_a_user_of_its_own():
    found = dict(instructions())  # the last ones, which count
    assert json.loads(found["ENTRYPOINT"]) == list(PROJECT["scripts"])
    assert int(found["USER"]) > 0
    assert {SERVICES[name]["image"] for name in SERVICES} == {"split-lightning"}
    build = SERVICES["certificates"]["build"]
    context = ROOT / "docker" / build["context"]
    assert (context / build["dockerfile"]).samefile(ROOT / "docker" / "Dockerfile")


def test_the_image_is_built_from_what_there_is():
    copied = [words.split()[:-1] for name, words in instructions() if name == "COPY"]
    sources = {
        own for words in copied for own in words if not words[0].startswith("--")
    }
    let_in = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert sources == {line[1:] for line in let_in if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_installs_the_ranges_and_an_extra_of_the_package():
    runs = " ".join(words for name, words in instructions() if name == "RUN")
    ranges = re.findall(r'"(torch\w*[^"]+)"', runs)
    assert len(ranges) == 2
    assert set(ranges) <= set(PROJECT["dependencies"])
    extras = re.findall(r'"\.\[(\w+)\]"', runs)
    assert extras == ["grpc"]
    assert set(extras) <= set(PROJECT["optional-dependencies"])
