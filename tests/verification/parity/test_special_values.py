"""Fill values of a mask: compared one by one, and without influence on any limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.verification.parity import Case, Outcome, judge, judging
from lora_export.verification.parity.special_values import Prepared, without_ties
from support.parity_cases import COUNT, EFFECT, ERROR, OWN, TRIED, make

FILLS = [-1e4, -1e9, float(np.finfo(np.float32).min), -np.inf, np.inf]


def masked(fill: float, *, error: float = 1e-6, at_fill: float | None = None, plus: bool = False) -> Case:
    """Scores (8, 256), the last quarter masked. `plus`: the mask is added to the scores, as models do."""
    rng = np.random.default_rng(0)
    truth, effect, own, other = (rng.standard_normal((8, 256)) for _ in range(4))
    mask = np.arange(256) >= 192

    def with_mask(scores: np.ndarray, value: float = fill) -> np.ndarray:
        return np.where(mask, value + (scores if plus else 0), scores)

    candidate = with_mask(truth + error * other, fill if at_fill is None else at_fill)
    return Case(
        "masked",
        "x [8, 256]",
        reference={"scores": with_mask(truth)},
        deployed={"scores": with_mask(truth + 1e-6 * own).astype(np.float32)},
        candidate={"scores": candidate.astype(np.float32)},
        base={"scores": with_mask(truth - effect)},
        scaled={"scores": with_mask(truth + 0.1 * effect)},
    )


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_right_scores_beside_fill_values_are_same(fill: float, plus: bool) -> None:
    verdict = judge([masked(fill, plus=plus)], sensitivity=TRIED)
    assert verdict.same, str(verdict)
    assert "512 values of scores in case masked are fill values of a mask" in str(verdict)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_fill_values_do_not_widen_the_limits_of_the_others(fill: float, plus: bool) -> None:
    case = masked(fill, error=1e-5, plus=plus)
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT
    assert "error" in {reason.gate for reason in verdict.reasons}


def test_without_the_separation_fill_values_would_allow_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "without_fill", lambda case, _: Prepared(case))
    assert judge([masked(-1e9, error=1e-2, plus=True)], sensitivity=TRIED).outcome is not Outcome.DIFFERENT


@pytest.mark.parametrize(("fill", "at_fill"), [(-1e9, -1e8), (-np.inf, -1e9), (-1e9, 0.0), (-1e4, -10001.0)])
def test_other_fill_value_is_different_and_named(fill: float, at_fill: float) -> None:
    verdict = judge([masked(fill, at_fill=at_fill)], sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT and verdict.reasons[0].gate == "fill"
    assert "512 of 512 fill values of a mask are not PyTorch's: the element at [0, 192] is" in str(verdict)


def test_deployed_half_may_have_an_infinity_where_the_reference_has_a_number() -> None:
    case = masked(-1e9, error=2e-3)
    rng = np.random.default_rng(1)
    deployed = case.reference["scores"] + 2e-3 * rng.standard_normal((8, 256))
    with np.errstate(over="ignore"):
        runs = {"deployed": deployed.astype(np.float16), "candidate": case.candidate["scores"].astype(np.float16)}
    half = replace(case, **{run: {"scores": scores} for run, scores in runs.items()})
    assert judge([half], dtype="float16", sensitivity=TRIED).same


def test_large_activations_may_be_as_far_off_as_pytorchs() -> None:
    """A channel of thousands beside values of one, as hidden states have: no mask, and no constant."""
    case = masked(0.0)
    rng = np.random.default_rng(2)
    large = 3000 * (1 + 0.01 * rng.standard_normal(8))
    for run, error in (("reference", 0), ("deployed", 1e-3), ("candidate", 1.4e-3), ("base", 0), ("scaled", 0)):
        getattr(case, run)["scores"][:, 0] = large + error * rng.standard_normal(8)
    assert judge([case], sensitivity=TRIED).same
    case.candidate["scores"][3, 0] += 0.5
    assert judge([case], sensitivity=TRIED).outcome is Outcome.DIFFERENT


def test_large_outputs_without_a_gap_have_no_fill_values() -> None:
    rng = np.random.default_rng(0)
    scores = np.exp(rng.uniform(0, 20, (8, 256)))  # eight decades, evenly
    case = masked(-1e9)
    runs = {run: {"scores": scores.astype(case.runs[name]["scores"].dtype)} for run, name in RUNS.items()}
    assert "fill values" not in str(judge([replace(case, **runs)]))


RUNS = {"reference": "the reference", "deployed": "the deployed model", "candidate": "the candidate"}


@pytest.mark.parametrize(
    ("reference", "half"),
    [
        (np.finfo(np.float64).min, np.finfo(np.float16).min),  # `finfo(dtype).min` is another number in each dtype
        (np.finfo(np.float16).min, np.finfo(np.float16).min),
        (-1e9, -np.inf),  # what fp16 makes of it
        (-1e4, -1e4),
        (-np.inf, -np.inf),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fill_values_of_half_precision_are_compared_by_themselves(reference: float, half: float, dtype: str) -> None:
    """Of a model in fp16, whose outputs a graph may return in fp32."""
    is_masked = COUNT % 7 == 0
    case = make(2**-11 * OWN, 2**-11 * ERROR, np.where(is_masked, 0, EFFECT), dtype="float16")
    case = replace(
        case, candidate={"y": case.candidate["y"].astype(dtype)}, deployed={"y": case.deployed["y"].astype(dtype)}
    )
    for run in ("reference", "base", "scaled"):
        getattr(case, run)["y"][is_masked] = reference
    for run in ("deployed", "candidate"):
        getattr(case, run)["y"][is_masked] = half
    verdict = judge([case], dtype="float16", sensitivity=TRIED)
    assert verdict.same, str(verdict)
    case.candidate["y"][7] = -2000.0
    assert judge([case], dtype="float16", sensitivity=TRIED).outcome is Outcome.DIFFERENT
    case.candidate["y"][7] = half
    case.candidate["y"][1] += 0.1
    assert judge([case], dtype="float16", sensitivity=TRIED).outcome is Outcome.DIFFERENT


# --- tied indices ---

ROWS, CLASSES = 40, 30
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(ROWS, CLASSES))
SCORES[0, [4, 9]] = 5.0, 5.0 - 1e-7  # a near tie
ORDER = np.argsort(-SCORES, axis=-1)
EFFECT_ON_SCORES = RNG.normal(size=SCORES.shape)


def a_case(ids: NDArray[np.int64], own: NDArray[np.int64], base: NDArray[np.int64], *, scores: str = "logits") -> Case:
    """The logits, right in every run, and indices of them; without logits for an empty `scores`."""
    noise = 1e-6 * RNG.normal(size=SCORES.shape)
    runs: dict[str, Any] = {
        "reference": {"ids": ids, scores: SCORES},
        "deployed": {"ids": ids, scores: (SCORES + noise).astype(np.float32)},
        "candidate": {"ids": own, scores: (SCORES - noise).astype(np.float32)},
        "base": {"ids": base, scores: SCORES - EFFECT_ON_SCORES},
        "scaled": {"ids": base, scores: SCORES + 0.1 * EFFECT_ON_SCORES},
    }
    if not scores:
        runs = {run: {"ids": outputs["ids"], "y": outputs[scores][:, :1]} for run, outputs in runs.items()}
    return Case("first", "x [40]", **runs)


def argmax_case(changes: dict[int, int], *, keep: bool = False, scores: str = "logits") -> Case:
    ids, base = ORDER[:, 0].copy(), (SCORES - EFFECT_ON_SCORES).argmax(-1)
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
    ids, base = ORDER[:, :5], np.argsort(EFFECT_ON_SCORES - SCORES, axis=-1)[:, :5]
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
