"""The exit code of a fleet, and its documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora_export as le
from lora_export.fleet.status import FleetStatus, JobStatus
from support.fleets import run_here, small_fleet

CODES = {"different": 4, "undecided": 5, "refused": 3, "failed": 7}


def status(*outcomes: str) -> FleetStatus:
    codes = [CODES.get(one, 0) for one in outcomes]
    given = zip(outcomes, codes, strict=True)
    jobs = [JobStatus("base", one, "merge", 1, one, "", code, None, "", "") for one, code in given]
    return FleetStatus("fleet.toml", tuple(jobs))


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (("done", "same"), 0),
        (("refused", "failed", "undecided", "different", "same"), 4),
        (("refused", "failed", "undecided", "not done"), 5),
        (("failed", "refused", "not done"), 3),
        (("done", "failed", "not run", "not done"), 7),
        (("done", "not done"), 5),
    ],
)
def test_the_worst_outcome_is_the_exit_code(outcomes: tuple[str, ...], code: int) -> None:
    assert status(*outcomes).exit_code == code
    assert status(*outcomes).as_document()["counts"] == dict.fromkeys(outcomes, 1)


def test_a_fleet_that_never_ran_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_fleet(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    found = le.run_fleet("status", "fleet.toml")
    assert found.exit_code == 5 and found.counts == {"not done": 4} and sorted(tmp_path.rglob("*")) == before


def test_the_document_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_fleet(tmp_path))
    run_here(monkeypatch)
    document = json.loads(json.dumps(le.run_fleet("status", "fleet.toml").as_document()))
    assert document["schema"] == "lora-export/fleet-status/1" and document["exit_code"] == 0
    assert document["jobs"][2] | {"seconds": 0, "created": ""} == {
        "base": "base", "adapter": "fr", "step": "merge", "number": 1, "outcome": "done", "message": "", "exit_code": 0,
        "seconds": 0, "created": "", "output": "release/fr",
    }  # fmt: skip
