"""`lora-export fleet` on the command line: its screens, its documents, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import Capture, answer, call
from support.fleets import FLEET, run_here, small_fleet, stay_here
from support.handmade import peft_adapter


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return small_fleet(tmp_path)


def test_a_plan_is_a_table_and_what_does_not_fit(place: Path, capsys: Capture) -> None:
    assert call("fleet", "plan", "fleet.toml") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["step", "jobs", "done", "memory", "of", "each", "reads", "writes", "time"]
    assert told[1].startswith("merge             2     0        314.6 MB")
    assert told[-1] == "2 adapters: headers show nothing that would be refused"
    peft_adapter(place / "adapters" / "wide", {"up": ([[1, 2, 3, 4]], [[1], [10]])})
    assert call("fleet", "plan", "fleet.toml") == 3
    told = capsys.readouterr().out
    assert "1 of 3 adapters would be refused:\n  wide, merge: 1 of 1 targets do not fit the base." in told
    code, document = answer(capsys, "fleet", "plan", "fleet.toml")
    assert code == document["exit_code"] == 3 and document["schema"] == "lora-export/fleet-plan/1"


def test_status_ends_with_the_worst(place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fleet.toml").write_text(FLEET + "weight = [0.5]\n")
    run_here(monkeypatch)
    assert call("fleet", "status", "fleet.toml", "--report", "s.xml") == 4
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["adapter  merge  verify --base", "de        done      different"]
    assert told[3].startswith("de, verify --base: different: ") and told[-1] == "2 done, 2 different"
    assert 'failures="2"' in (place / "s.xml").read_text()
    code, document = answer(capsys, "fleet", "status", "fleet.toml")
    assert code == 4 and document["counts"] == {"done": 2, "different": 2}
    assert call("fleet", "status", "fleet.toml", "-q") == 4
    assert capsys.readouterr().out == "2 done, 2 different\n"


def test_options_of_a_run_are_of_a_run(place: Path, capsys: Capture) -> None:
    assert call("fleet", "status", "fleet.toml", "-j", "2") == 2
    assert "-j is for `fleet run`" in capsys.readouterr().err
    assert call("fleet", "plan", "fleet.toml", "--report", "x.xml") == 2
    assert call("fleet", "run", "fleet.toml", "--report", "fleet.toml/x.xml") == 7
    assert call("fleet", "begin", "fleet.toml") == 2
    assert call("fleet", "plan", "nowhere.toml") == 3
    assert not (place / "fleet.records").exists()


def test_messages_of_workers_name_entries_of_the_file(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay_here(monkeypatch)
    (place / "release" / "de").mkdir(parents=True)
    (place / "release" / "de" / "mine").write_text("x")
    code, document = answer(capsys, "fleet", "run", "fleet.toml")
    assert code == 7 and document["jobs"][0]["message"].endswith("add `overwrite = true` to replace it")
    assert [job["outcome"] for job in document["jobs"]] == ["failed", "not run", "done", "same"]
    assert json.loads((place / "fleet.records/base/de/1-merge.json").read_text())["exit"] == 7
