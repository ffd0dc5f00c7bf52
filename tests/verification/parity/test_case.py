"""One case: its runs, its outputs, and the positions that are not judged."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest

from lora_export.verification.parity import Case, Outcome, judge
from support.parity_cases import everywhere, make, with_output, with_value

HIDDEN = np.arange(12.0).reshape(2, 3, 2)  # (batch, sequence, features)
POOLED = np.ones((2, 4))
PADDING = np.array([[True, False, False], [False, False, False]])  # the first row's first position


def a_case(**fields: object) -> Case:
    outputs = {"hidden": HIDDEN, "pooled": POOLED}
    runs = dict.fromkeys(("reference", "deployed", "candidate", "base", "scaled"), outputs)
    return Case("first", "ids [2, 3]", **(runs | {"unjudged": PADDING} | fields))  # type: ignore[arg-type]


def test_runs_are_those_that_exist() -> None:
    assert list(a_case(base=None, scaled=None).runs) == ["the candidate", "the reference", "the deployed model"]
    assert list(a_case(attached={}).runs)[3:] == [
        "the base", "the reference with scale × 1.1", "the attached reference",
    ]  # fmt: skip


def test_an_output_of_any_run_is_compared() -> None:
    case = a_case(candidate={"hidden": HIDDEN, "extra": POOLED}, base=None, scaled=None)
    assert case.outputs == ["hidden", "extra", "pooled"]


def test_positions_that_are_not_judged_are_left_out_of_every_run() -> None:
    judged = a_case().judged()
    for outputs in judged.runs.values():
        assert outputs["hidden"].tolist() == HIDDEN.reshape(6, 2)[1:].tolist()
        assert outputs["pooled"] is POOLED
    assert judged.unjudged is None and judged.judged() is judged


def test_positions_of_one_output_are_left_out_of_it_alone() -> None:
    other = np.array([[False, False, True], [False, False, False]])
    runs = {"hidden": HIDDEN, "logits": HIDDEN}
    every = dict.fromkeys(("reference", "deployed", "candidate", "base", "scaled"), runs)
    judged = a_case(**every, unjudged_by_output={"hidden": other}).judged()
    assert judged.candidate["hidden"].shape == (4, 2) and judged.candidate["logits"].shape == (5, 2)
    assert judged.index("hidden", (1, 0)) == (1, 0, 0) and judged.judged() is judged
    alone = a_case(**every, unjudged=None, unjudged_by_output={"hidden": other}).judged()
    assert alone.reference["hidden"].shape == (5, 2) and alone.reference["logits"] is HIDDEN


def test_an_index_is_that_of_the_output_as_it_was_computed() -> None:
    judged = a_case().judged()
    assert judged.index("hidden", (0, 1)) == (0, 1, 1) and judged.index("hidden", (2, 0)) == (1, 0, 0)
    assert judged.index("pooled", (1, 3)) == (1, 3)


def test_a_value_that_is_not_finite_is_judged_everywhere() -> None:
    broken = HIDDEN.copy()
    broken[0, 0, 1] = np.nan
    assert a_case(candidate={"hidden": broken, "pooled": POOLED}).judged().candidate["hidden"].shape == (6, 2)


def test_outputs_of_other_shapes_are_judged_whole() -> None:
    short = a_case(candidate={"hidden": HIDDEN[:, :2], "pooled": POOLED}).judged()
    assert short.reference["hidden"] is HIDDEN
    matrix = a_case(**{run: {"y": np.ones((2, 3))} for run in ("reference", "deployed", "candidate", "base", "scaled")})
    assert matrix.judged().reference["y"].shape == (2, 3), "an output of two axes has no features"
    assert dataclasses.replace(a_case(), unjudged=None).judged().positions == {}


# --- structure ---


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
    assert "1,023 values not finite, the first at [0]" in str(verdict)
