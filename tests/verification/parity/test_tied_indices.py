"""Indices whose scores tie within the limits are not wrong; all other wrong indices are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.verification.parity import Case, Outcome, judge
from lora_export.verification.parity.tied_indices import without_ties
from support.parity_cases import TRIED

ROWS, CLASSES = 40, 30
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(ROWS, CLASSES))
SCORES[0, [4, 9]] = 5.0, 5.0 - 1e-7  # a near tie
ORDER = np.argsort(-SCORES, axis=-1)
EFFECT = RNG.normal(size=SCORES.shape)


def a_case(ids: NDArray[np.int64], own: NDArray[np.int64], base: NDArray[np.int64], *, scores: str = "logits") -> Case:
    """The logits, right in every run, and indices of them; without logits for an empty `scores`."""
    noise = 1e-6 * RNG.normal(size=SCORES.shape)
    runs: dict[str, Any] = {
        "reference": {"ids": ids, scores: SCORES},
        "deployed": {"ids": ids, scores: (SCORES + noise).astype(np.float32)},
        "candidate": {"ids": own, scores: (SCORES - noise).astype(np.float32)},
        "base": {"ids": base, scores: SCORES - EFFECT},
        "scaled": {"ids": base, scores: SCORES + 0.1 * EFFECT},
    }
    if not scores:
        runs = {run: {"ids": outputs["ids"], "y": outputs[scores][:, :1]} for run, outputs in runs.items()}
    return Case("first", "x [40]", **runs)


def argmax_case(changes: dict[int, int], *, keep: bool = False, scores: str = "logits") -> Case:
    ids, base = ORDER[:, 0].copy(), (SCORES - EFFECT).argmax(-1)
    own = ids.copy()
    for row, index in changes.items():
        own[row] = index
    if keep:
        ids, own, base = ids[:, None], own[:, None], base[:, None]
    return a_case(ids, own, base, scores=scores)


@pytest.mark.parametrize("keep", [False, True], ids=["argmax", "argmax, keepdims"])
def test_index_of_a_tied_score_is_same_with_a_note(keep: bool) -> None:
    assert ORDER[0, 0] == 4
    verdict = judge([argmax_case({0: 9}, keep=keep)], sensitivity=TRIED)
    assert verdict.same, str(verdict)
    assert any(note.startswith("1 of 40 values of ids in case first are other indices than") for note in verdict.notes)


@pytest.mark.parametrize("changes", [{1: int(ORDER[1, 1])}, {0: 9, 5: int(ORDER[5, -1])}, {0: -1}, {0: CLASSES}])
def test_index_of_another_score_is_different(changes: dict[int, int]) -> None:
    verdict = judge([argmax_case(changes)], sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT
    assert "exact" in {reason.gate for reason in verdict.reasons}


def test_tie_without_its_scores_is_different_and_says_why() -> None:
    verdict = judge([argmax_case({0: 9}, scores="")], sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT
    (text,) = [reason.text for reason in verdict.reasons if reason.gate == "exact"]
    assert text.endswith("If these are indices of scores that tie, only an output with the scores can show it")


def test_top_k_may_change_places_only_where_scores_tie() -> None:
    ids, base = ORDER[:, :5], np.argsort(EFFECT - SCORES, axis=-1)[:, :5]
    swapped = ids.copy()
    swapped[0, :2] = swapped[0, 1::-1]
    assert judge([a_case(ids, swapped, base)], sensitivity=TRIED).same
    swapped[1, :2] = swapped[1, 1::-1]
    assert judge([a_case(ids, swapped, base)], sensitivity=TRIED).outcome is Outcome.DIFFERENT
    repeated = ids.copy()
    repeated[0, 0] = repeated[0, 1]
    assert judge([a_case(ids, repeated, base)], sensitivity=TRIED).outcome is Outcome.DIFFERENT


def test_integers_that_are_no_indices_of_scores_are_exact() -> None:
    case = argmax_case({0: 9})
    shifted = {
        run: {**getattr(case, run), "ids": (getattr(case, run)["ids"] + 1) % CLASSES}
        for run in ("reference", "deployed", "candidate", "base", "scaled")
    }
    other = replace(case, **shifted)
    assert without_ties(other, "float32").case is other
    assert judge([other], sensitivity=TRIED).outcome is Outcome.DIFFERENT
