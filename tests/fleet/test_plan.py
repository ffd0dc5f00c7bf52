"""A plan reads headers, tells everything that does not fit, and writes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_export as le
from lora_export.api.memory_needs import PROGRAM
from lora_export.fleet.description import read_fleet
from lora_export.fleet.needs import NeedsOfJobs
from lora_export.fleet.plan import FleetPlan
from lora_export.formats import adapter_files
from lora_export.storage.safetensors_file import TensorFile
from support.fleets import BASES, FLEET, MERGE, VERIFY, Here, run_here
from support.handmade import base_file, peft_adapter
from support.hub_server import ask, hub_server

ONNX = '[[steps]]\nstep = "onnx"\noutput = "graphs/{adapter}.onnx"\n[[steps]]\nstep = "verify"\n'


def planned() -> FleetPlan:
    plan = le.run_fleet("plan", "fleet.toml")
    assert isinstance(plan, FleetPlan)
    return plan


@pytest.mark.parametrize("text", [FLEET, BASES + ONNX])
def test_all_misfits_of_all_adapters_are_told_at_once(text: str, place: Path) -> None:
    (place / "fleet.toml").write_text(text)
    peft_adapter(place / "adapters" / "wide", {"up": ([[1, 2, 3, 4]], [[1], [10]])})
    peft_adapter(place / "adapters" / "lost", {"down": ([[1, 2, 3]], [[1], [10]])})
    (place / "adapters" / "notes.txt").write_text("no adapter")
    before = sorted(place.rglob("*"))
    plan = planned()
    assert [problem.adapter for problem in plan.problems] == ["lost", "notes", "wide"] and plan.exit_code == 3
    assert "down" in plan.problems[0].text and "not an adapter in a known format" in plan.problems[1].text
    assert "(2, 3), the adapter was trained on (2, 4)" in plan.problems[2].text
    assert (plan.adapters, [step.jobs for step in plan.steps]) == (5, [5, 5])
    assert sorted(place.rglob("*")) == before


def test_an_option_is_named_as_the_file_has_it(place: Path) -> None:
    (place / "fleet.toml").write_text(BASES + MERGE + "only-head = true\n")
    assert planned().problems[0].text == "de saves no tensor whole: it has no head to merge (`only-head = true`)"


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("dora = true", '`dora = true` is for `lora = "inputs"` and slots: other graphs contain the adapters'),
        ('lora = "slots"\ncombine = "linear"\n', '`combine` is for `lora = "merged"` and nodes'),
    ],
)
def test_options_that_the_mode_of_a_graph_does_not_take_are_problems(option: str, problem: str, place: Path) -> None:
    (place / "fleet.toml").write_text(BASES + ONNX.partition('[[steps]]\nstep = "verify"')[0] + option)
    assert [one.text[: len(problem)] for one in planned().problems] == [problem] * 2


@pytest.mark.parametrize("text", [MERGE + VERIFY, ONNX])
def test_a_base_that_is_nowhere_is_a_problem_of_its_jobs(text: str, place: Path) -> None:
    """It has the form of a name on the Hub."""
    there = BASES.replace("path", 'name = "there"\npath')
    (place / "fleet.toml").write_text(
        BASES.replace('"base"', '"org/missing"') + there + text.replace("/{", "/{base}-{")
    )
    plan = planned()
    assert [(one.base, one.adapter) for one in plan.problems] == [("missing", "de"), ("missing", "fr")]
    assert all("no file or folder org/missing" in one.text for one in plan.problems)


def test_base_and_adapters_are_addresses_of_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"org/base": place / "base", "org/fr": place / "adapters/fr", "org/de": place / "adapters/de"}
    repositories = {name: {file.name: file.read_bytes() for file in at.iterdir()} for name, at in folders.items()}
    text = FLEET.replace('"base"', '"hf://org/base"').replace('"adapters/*"', '"hf://org/de", "hf://org/fr"')
    (place / "fleet.toml").write_text(text + '[[steps]]\nstep = "convert"\nto = "mlx"\noutput = "mlx/{adapter}"\n')
    with hub_server(repositories) as server:
        ask(server, place / "hub", monkeypatch)
        assert planned().problems == ()
        status, ran = run_here(monkeypatch, Here(workers=1))
        assert run_here(monkeypatch)[1] == []
    assert status.counts == {"done": 4, "same": 2} and len(ran) == 6


def test_what_is_done_is_not_planned_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fleet.toml").write_text(FLEET + '[[steps]]\nstep = "convert"\nto = "kohya"\noutput = "kohya/{adapter}"\n')
    run_here(monkeypatch)
    peft_adapter(place / "adapters" / "it", {"up": ([[1, 1, 1]], [[1], [1]])})
    plan = planned()
    assert [(step.jobs, step.done) for step in plan.steps] == [(3, 2), (3, 2), (3, 2)] and plan.exit_code == 0
    assert plan.unread == 2  # the files of the new adapter
    os.utime(place / "base" / "model.safetensors")
    assert planned().unread == 3 and [step.done for step in planned().steps] == [0, 0, 2]


def test_large_tensors_are_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the base nor of an adapter; the shapes decide alone."""
    size = adapter_files.LEAST_LEFT_OUT // 4
    base_file(place / "base" / "model.safetensors", {"up.weight": np.ones((2, size))}, metadata={"format": "pt"})
    for name, inner in (("de", size), ("fr", size + 1)):
        peft_adapter(place / "adapters" / name, {"up": (np.ones((1, inner)), [[1], [10]])})
    read: list[int] = []

    def counting(file: TensorFile, name: str, real: Any = TensorFile.read) -> Any:
        read.append(file.entries[name].nbytes)
        return real(file, name)

    monkeypatch.setattr(TensorFile, "read", counting)
    plan = planned()
    assert [problem.adapter for problem in plan.problems] == ["fr"] and sum(read) < 100
    assert le.load_adapter("adapters/de").pairs["up"].rank == 1 and sum(read) > 4 * size  # as ever


def test_needs_follow_from_headers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fleet.toml").write_text(FLEET + ONNX)
    merge, audit, onnx, verify = planned().steps
    base = sum(path.stat().st_size for path in (place / "base").iterdir())
    adapters = sum(path.stat().st_size for path in place.glob("adapters/*/*"))
    assert (merge.needs.read, merge.needs.written, audit.needs.read) == (
        2 * base + adapters,
        2 * base,
        4 * base + adapters,
    )
    assert merge.needs.memory == audit.needs.memory == 300 << 20
    assert PROGRAM < onnx.needs.memory == verify.needs.memory < PROGRAM + 6 * 32 + 1 and onnx.needs.written == 2 * 4 * 6
    assert 0 < merge.needs.seconds < onnx.needs.seconds


def test_a_job_after_a_proof_has_the_memory_of_its_model_too(place: Path) -> None:
    (place / "fleet.toml").write_text(FLEET + ONNX)
    jobs = {job.step: job for job in read_fleet(place / "fleet.toml").jobs}
    merge, onnx = jobs["merge"], jobs["onnx"]
    alone = NeedsOfJobs([merge])
    both = NeedsOfJobs([merge, onnx])
    assert alone.memory_of([merge]) == alone.of(merge).memory
    assert both.memory_of([merge]) == alone.of(merge).memory + PROGRAM + 6 * 4  # of six numbers in fp32
    assert both.memory_of([onnx]) == both.of(onnx).memory


def test_times_are_those_of_earlier_jobs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _ = run_here(monkeypatch)
    taken = [job.seconds or 0 for job in status.jobs if job.step == "merge"]
    peft_adapter(place / "adapters" / "it", {"up": ([[1, 1, 1]], [[1], [1]])})
    assert planned().steps[0].needs.seconds == pytest.approx(sum(taken) / 2)


def test_a_taken_place_is_told_unless_it_may_be_replaced(place: Path) -> None:
    (place / "release" / "fr").mkdir(parents=True)
    (place / "release" / "fr" / "x").write_text("mine")
    (problem,) = planned().problems
    assert problem.text == "release/fr exists, and this fleet did not write it. Remove it, or state `overwrite = true`"
    (place / "fleet.toml").write_text(BASES + MERGE + "overwrite = true\n")
    assert planned().problems == ()
