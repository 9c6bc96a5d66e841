"""The README's Python runs as it stands."""

import re
import warnings
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_its_first_program_trains(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    program = next(block for block in blocks if "trainer.fit(" in block)
    shortened, rounds = re.subn(r"max_epochs=\d+", "max_epochs=2", program)
    assert rounds == 1
    monkeypatch.chdir(tmp_path)  # where the Trainer leaves its files
    names = {}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(shortened, str(README), "exec"), names)

    assert names["trainer"].callback_metrics["test/accuracy"] > 0.5
    assert names["module"].traffic.handoffs == 2 * names["data"].num_clients - 1
    assert "test/accuracy" in capsys.readouterr().out
