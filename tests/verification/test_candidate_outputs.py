"""A candidate is run on every case, with each input drawn again, and once more at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_export.callbacks import ignore
from lora_export.errors import RuntimeRefused
from lora_export.runtime.runner import Arrays, Placement
from lora_export.verification import candidate_outputs
from lora_export.verification.candidate_outputs import (
    changed_outputs,
    kept,
    run_candidate,
    run_with_provider_defaults,
    sensitivity_of,
)
from lora_export.verification.inputs import Inputs
from lora_export.verification.parity import Case, Findings, Sensitivity
from support.parity_cases import make

X, Z, OTHER = np.float32([1, 2]), np.float32([3, 4]), np.float32([5, 6])
INPUTS = Inputs(
    {"one": {"x": X, "z": Z}, "two": {"x": Z, "z": X}},
    varied={"x": X, "z": Z},
    perturbed={"x": {"x": OTHER, "z": Z}, "z": {"x": X, "z": OTHER}},
)


class FakeRunner:
    """Computes outputs by a function of the inputs and of the number of the run."""

    axes: Mapping[str, tuple[int | None, ...]] = {}
    names_known = True

    def __init__(
        self, compute: Callable[[Arrays, int], Arrays], *, placement: Placement | None = None, shipped: Any = None
    ):
        self.compute, self.runs, self.placement, self.shipped = compute, 0, placement, shipped

    def run(self, inputs: Arrays) -> Arrays:
        self.runs += 1
        return self.compute(inputs, self.runs)

    def with_provider_defaults(self) -> Any:
        return self.shipped


class Together(FakeRunner):
    """Runs all inputs at once, or refuses to."""

    refuses = False

    def run_together(self, cases: Sequence[Arrays], kept: Callable[[Arrays], Arrays]) -> list[Arrays] | None:
        if self.refuses:
            raise RuntimeRefused("one of them")
        return [kept(self.compute(arrays, 1)) for arrays in cases]


@pytest.mark.parametrize("refuses", [False, True])
def test_cases_are_run_together_and_the_first_again(refuses: bool) -> None:
    runner = Together(lambda inputs, _: {"y": inputs["x"] + inputs["z"]})
    runner.refuses = refuses
    found = run_candidate(runner, INPUTS, ignore)
    assert [outputs["y"].tolist() for outputs in found.by_case.values()] == [[4, 6], [4, 6]]
    assert found.changed == {"x": True, "z": True} and found.repeated is None
    assert runner.runs == (6 if refuses else 2), "what is varied is no case here, and the first case runs again"
    runner.runs = 0
    assert all(one.peer_changed for one in sensitivity_of(found, runner, INPUTS, {}))
    assert runner.runs == (3 if refuses else 1), "each draw, after the inputs that are varied"


def sums() -> FakeRunner:
    return FakeRunner(lambda inputs, _: {"y": inputs["x"] + inputs["z"]})


def without_z() -> FakeRunner:
    return FakeRunner(lambda inputs, _: {"y": inputs["x"]})


def test_an_output_that_the_candidate_lacks_shows_no_input() -> None:
    peer = FakeRunner(lambda inputs, _: {"y": inputs["x"], "more": inputs["z"]})
    found = run_candidate(without_z(), INPUTS, ignore)
    assert sensitivity_of(found, peer, INPUTS, {}) == (Sensitivity("x", True, True), Sensitivity("z", False, False))
    renamed = run_candidate(FakeRunner(lambda inputs, _: {"0": inputs["x"]}), INPUTS, ignore)
    assert sensitivity_of(renamed, peer, INPUTS, {}) == (Sensitivity("x", True, True), Sensitivity("z", True, False))


def test_every_case_is_run_and_every_step_named() -> None:
    steps: list[str] = []
    found = run_candidate(sums(), INPUTS, steps.append)
    assert {case: outputs["y"].tolist() for case, outputs in found.by_case.items()} == {"one": [4, 6], "two": [4, 6]}
    assert steps == ["case one", "case two", "inputs, one by one"]
    assert found.changed == {"x": True, "z": True}
    assert (found.refusals, found.notes, found.repeated) == ((), (), None)


def test_an_input_that_changes_nothing_is_found() -> None:
    found = run_candidate(without_z(), INPUTS, ignore)
    assert found.changed == {"x": True, "z": False}
    assert sensitivity_of(found, sums(), INPUTS, {}) == (Sensitivity("x", True, True), Sensitivity("z", True, False))


def test_case_whose_inputs_are_drawn_again_is_run_once() -> None:
    cases = {"one": {"x": X, "z": Z}}
    inputs = Inputs(cases, varied=cases["one"], perturbed={"z": {"x": X, "z": OTHER}})
    candidate, peer = without_z(), sums()
    found = run_candidate(candidate, inputs, ignore)
    assert candidate.runs == 3, "the case, another z, and the case again at the end"
    assert sensitivity_of(found, peer, inputs, {"one": {"y": X + Z}}) == (Sensitivity("z", True, False),)
    assert peer.runs == 1


def test_without_other_draws_no_input_is_judged() -> None:
    alone = Inputs(INPUTS.cases)
    assert changed_outputs(sums().run, alone, {}) == {}
    assert sensitivity_of(run_candidate(sums(), alone, ignore), sums(), alone, {}) == ()


def test_refused_cases_end_the_run_with_their_names() -> None:
    def refuse_two(inputs: Arrays, _: int) -> Arrays:
        if inputs["x"] is Z:
            raise RuntimeRefused("no batch of 2")
        return {"y": inputs["x"]}

    found = run_candidate(FakeRunner(refuse_two), INPUTS, ignore)
    assert list(found.by_case) == ["one"] and found.changed == {}
    assert found.refusals == ("case two, which the candidate refused: no batch of 2",)


@pytest.mark.parametrize("last", [{"y": OTHER}, {"z": X}, {"y": X.astype(np.float64)}])
def test_another_result_of_the_first_case_is_noted(last: Arrays) -> None:
    found = run_candidate(FakeRunner(lambda _, run: last if run == 6 else {"y": X}), INPUTS, ignore)
    assert found.repeated is last
    assert found.notes == ("the candidate returns other bits when it runs one again",)


def placement(**options: str) -> Placement:
    return Placement("CUDAExecutionProvider", {}, options, "1.31")


def with_shipped(shipped: Callable[[Arrays, int], Arrays], case: Case) -> Findings:
    runner = FakeRunner(lambda *_: {}, placement=placement(use_tf32="0"), shipped=FakeRunner(shipped))
    inputs = Inputs({"first": {"x": X}})
    return run_with_provider_defaults(runner, [case], inputs, dtype="float32", names_known=True)


def test_outputs_within_the_limits_with_the_providers_own_settings_are_a_note() -> None:
    case = make()
    found = with_shipped(lambda *_: dict(case.candidate), case)
    assert found.not_judged == ()
    (note,) = found.notes
    assert note.startswith("CUDAExecutionProvider's own settings") and note.endswith("are within the limits, too")


def test_settings_that_are_the_providers_own_need_no_second_run() -> None:
    for runner in (sums(), FakeRunner(lambda *_: {}, placement=placement())):
        found = run_with_provider_defaults(runner, [make()], INPUTS, dtype="float32", names_known=True)
        assert found == Findings()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(candidate_outputs, "LARGEST_IN_MEMORY", 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_large_outputs_are_mapped_with_the_same_values(dtype: type, folder: Path) -> None:
    large, small = np.arange(2000).reshape(20, 100).astype(dtype).T, np.ones(3, dtype)
    found = kept({"large": large, "small": small})
    assert found["small"] is small
    assert (found["large"].dtype, found["large"].shape) == (large.dtype, large.shape)
    assert np.array_equal(found["large"], large)
    assert not np.shares_memory(found["large"], large)
    assert isinstance(found["large"].base, np.memmap)
    assert not list(folder.iterdir())  # the file has no name, so that nothing is left behind


def test_outputs_stay_in_memory_where_no_file_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        raise OSError("no space left on the device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    large = np.ones(1000)
    assert kept({"large": large})["large"] is large
