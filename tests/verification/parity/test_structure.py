"""Names, shapes, dtypes and finite values: faults of the candidate, and of the other runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lora_export.verification.parity import (
    Case,
    Outcome,
    judge,
)
from support.parity_cases import everywhere, make, with_output, with_value


@pytest.mark.parametrize("run", ["base", "scaled"])
def test_case_without_a_control_run_is_undecided(run: str) -> None:
    verdict = judge([make(), replace(make(name="second"), **{run: None})])
    assert verdict.outcome is Outcome.UNDECIDED
    assert [(reason.case, reason.gate) for reason in verdict.reasons] == [("second", "structure")]
    assert "a control cannot be checked" in str(verdict)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (with_output(make(), "candidate", y=None), "y in case first: the candidate lacks this output"),
        (with_output(make(), "candidate", z=np.ones(3)), "z in case first: only the candidate has this output"),
        (
            with_output(make(), "candidate", y=np.ones((2, 512), np.float32)),
            "shape is [2, 512], the reference's is [1024]",
        ),
        (with_output(make(), "candidate", y=np.ones(1, np.float32)), "shape is [1], the reference's is [1024]"),
        (
            with_output(make(), "candidate", y=np.ones(1024, np.float64)),
            "the candidate's dtype is float64, PyTorch's is float32",
        ),
        (
            with_output(make(), "candidate", y=np.ones(1024, np.int32)),
            "the candidate's dtype is int32, PyTorch's is float32",
        ),
        (
            with_value(math.nan, "candidate"),
            "the candidate has 1 value not finite, the first at [5]: nan, where the reference has 1",
        ),
        (with_value(-math.inf, "candidate"), "the first at [5]: -inf"),
    ],
)
@pytest.mark.fault(45)
def test_structural_fault_of_the_candidate_is_different(case: Case, text: str) -> None:
    verdict = judge([case])
    assert verdict.outcome is Outcome.DIFFERENT
    assert {reason.gate for reason in verdict.reasons} == {"structure"}
    assert text in str(verdict)


@pytest.mark.fault(45)
def test_renamed_output_is_different_under_both_names() -> None:
    case = make()
    renamed = replace(case, candidate={"z": case.candidate["y"]})
    verdict = judge([renamed])
    assert [(reason.output, reason.outcome) for reason in verdict.reasons] == [
        ("z", Outcome.DIFFERENT),
        ("y", Outcome.DIFFERENT),
    ]


@pytest.mark.parametrize("run", ["reference", "deployed", "base", "scaled"])
@pytest.mark.parametrize("fault", ["nan", "inf", "missing", "shape", "kind"])
def test_fault_of_another_run_is_undecided(run: str, fault: str) -> None:
    """The candidate has no fault here, and the verdict may not be `same`."""
    case = make()
    if fault in ("nan", "inf"):
        case = with_value(float(fault), run)
    elif fault == "missing":
        case = with_output(case, run, y=None)
    elif fault == "kind":
        case = with_output(case, run, y=np.array(["1"] * 1024))
        if run == "deployed":
            case = with_output(case, "candidate", y=case.deployed["y"])
    else:
        case = with_output(case, run, y=np.ones(3, np.float32))
        if run == "reference":
            case = with_output(case, "candidate", y=np.ones(3, np.float32))
    verdict = judge([case])
    assert verdict.outcome is Outcome.UNDECIDED
    assert verdict.reasons


def test_output_of_strings_is_undecided() -> None:
    verdict = judge([everywhere(make(), label=np.array(["cat", "dog"]))])
    assert verdict.outcome is Outcome.UNDECIDED
    assert "not comparable" in str(verdict)


@pytest.mark.parametrize("runs", [("reference",), ("deployed",), ("reference", "deployed", "base", "scaled")])
@pytest.mark.fault(45)
def test_nan_in_several_runs_is_undecided(runs: tuple[str, ...]) -> None:
    verdict = judge([with_value(math.nan, "candidate", *runs)])
    assert verdict.outcome is Outcome.UNDECIDED
    assert "the candidate has 1 value not finite" in str(verdict)


def test_nan_is_different_where_the_reference_is_finite() -> None:
    case = with_value(math.nan, "reference", "deployed")
    verdict = judge([with_output(case, "candidate", y=np.full(1024, math.nan, np.float32))])
    assert verdict.outcome is Outcome.DIFFERENT
    assert "1023 values not finite, the first at [0]" in str(verdict)
