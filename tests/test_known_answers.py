"""Small runs of each protocol and topology end as they did: see known_answers.py."""

import json

import pytest
from known_answers import CASES, FILE, answer, machine

KNOWN = json.loads(FILE.read_text())


def test_all_cases_are_recorded():
    assert list(KNOWN["answers"]) == CASES


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_as_it_did(tmp_path, case):
    expected, found = KNOWN["answers"][case], answer(case, tmp_path)
    assert found["counts"] == expected["counts"]
    assert found["seconds"] == pytest.approx(expected["seconds"])
    assert found["losses"] == pytest.approx(expected["losses"], abs=0.05)
    if machine() == KNOWN["machine"]:
        assert found["weights"] == expected["weights"]
