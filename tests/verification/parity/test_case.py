"""Cases: positions that are not judged are left out of every run, and keep their index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_export.verification.parity import Case, Outcome, judge
from support.parity_cases import TRIED

BEFORE = np.array([[True, True, False], [False, False, False]])  # the first row's tokens begin at its third position


def padded(error: np.ndarray, unjudged: np.ndarray | None = BEFORE) -> Case:
    """Logits (2, 3, 40); PyTorch is off by 1e-6 everywhere, and the candidate by `error` (2, 3)."""
    rng = np.random.default_rng(0)
    truth, effect, own = (rng.standard_normal((2, 3, 40)) for _ in range(3))
    candidate = truth + 1e-6 * np.roll(own, 1, -1) + error[..., None]
    return Case(
        "padded",
        "ids int64 [2, 3]",
        reference={"logits": truth},
        deployed={"logits": (truth + 1e-6 * own).astype(np.float32)},
        candidate={"logits": candidate.astype(np.float32)},
        base={"logits": truth - effect},
        scaled={"logits": truth + 0.1 * effect},
        unjudged=unjudged,
    )


def test_positions_are_left_out_of_every_run() -> None:
    case = padded(np.where(BEFORE, 9.0, 0.0)).judged()
    assert {run["logits"].shape for run in case.runs.values()} == {(4, 40)}
    assert case.positions["logits"].tolist() == [[0, 2], [1, 0], [1, 1], [1, 2]]
    assert judge([padded(np.where(BEFORE, 9.0, 0.0))], sensitivity=TRIED).same
    assert judge([padded(np.where(BEFORE, 9.0, 0.0), None)]).outcome is Outcome.DIFFERENT


def test_error_elsewhere_is_reported_where_it_is() -> None:
    error = np.zeros((2, 3))
    error[1, 1] = 0.5
    verdict = judge([padded(error)], sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT
    worst = verdict.comparisons[0].figures.worst.index
    assert worst[:2] == (1, 1)


def test_without_any_judged_position_nothing_is_decided() -> None:
    verdict = judge([padded(np.ones((2, 3)), np.ones((2, 3), bool))], sensitivity=TRIED)
    assert verdict.outcome is Outcome.UNDECIDED and "nothing was compared" in str(verdict)


def test_value_that_is_not_finite_is_not_left_out() -> None:
    case = padded(np.where(BEFORE, np.nan, 0.0))
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT and "the first at [0, 0, 0]" in str(verdict)


def test_output_with_other_axes_is_judged_whole() -> None:
    other = replace(padded(np.zeros((2, 3))), unjudged=np.ones((3, 2), bool))
    assert other.judged().reference["logits"].shape == (2, 3, 40) and not other.judged().positions
