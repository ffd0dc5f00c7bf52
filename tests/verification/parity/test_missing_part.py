"""A candidate that lacks a part of the adapters: what the gates detect, and what all errors together show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export.verification.parity import Case, EffectShare, judge_missing_part

ROWS, FEATURES = 200, 32
NOISE = 1e-3  # of PyTorch and the candidate, as in half precision


def noise(seed: int) -> np.ndarray:
    return NOISE * np.random.default_rng(seed).standard_normal((ROWS, FEATURES))


TRUTH = np.random.default_rng(0).standard_normal((ROWS, FEATURES))
DIRECTION = np.random.default_rng(1).standard_normal((ROWS, FEATURES))


def case(lacks: float = 0.0, *, effect: float, name: str = "first") -> Case:
    """R; P and O with noise of their own; O lacks this share of a part that changes the outputs by `effect`."""
    return Case(
        name,
        "",
        reference={"y": TRUTH},
        deployed={"y": (TRUTH + noise(2)).astype(np.float32)},
        candidate={"y": (TRUTH + noise(3) + lacks * effect * DIRECTION).astype(np.float32)},
        base={"y": TRUTH + 1},
        scaled={"y": TRUTH - 0.1},
    )


def judged(given: Case, effect: float):  # type: ignore[no-untyped-def]
    return judge_missing_part([given], given, {"y": TRUTH + effect * DIRECTION}, dtype="float16")


def test_large_effect_is_detected_by_the_gates() -> None:
    found = judged(case(effect=20 * NOISE), 20 * NOISE)
    assert found.is_detected and found.changes_outputs


@pytest.mark.parametrize("lacks", [0.0, 1.0, 0.6, -1.0])
def test_effect_below_rounding_shows_in_all_errors_together(lacks: float) -> None:
    effect = 0.3 * NOISE
    found = judged(case(lacks, effect=effect), effect)
    assert not found.is_detected and found.changes_outputs
    assert found.share.missing == pytest.approx(lacks, abs=0.15)


def test_effect_far_below_rounding_is_not_told() -> None:
    effect = 0.02 * NOISE
    found = judged(case(1.0, effect=effect), effect)
    assert found.changes_outputs and not found.is_detected and found.share.missing is None


def test_several_cases_tell_what_one_does_not() -> None:
    effect = 0.12 * NOISE
    alone = judged(case(1.0, effect=effect), effect).share
    assert alone.missing is None
    assert sum([alone] * 8, start=EffectShare()).missing == pytest.approx(alone.candidate / alone.effect)


def test_few_rows_tell_nothing() -> None:
    share = EffectShare(candidate=10.0, peer=0.0, effect=10.0, variance=0.0, rows=19)
    assert share.missing is None and replace(share, rows=20).missing == 1.0


def test_error_of_pytorch_in_one_direction_tells_nothing() -> None:
    """A systematic error of PyTorch looks as if it lacked a half; the rows seem to say how large it is."""
    assert EffectShare(candidate=6.0, peer=5.0, effect=10.0, variance=0.01, rows=100).missing is None


def test_part_that_changes_nothing_is_told_from_rounding() -> None:
    found = judged(case(effect=0.0), 0.0)
    assert not found.changes_outputs and not found.is_detected and found.share.missing is None


def with_runs(given: Case, **changes: object) -> Case:
    """The case with (1, rows, features) in each run, whose first feature may be a fill value."""
    runs = {
        run: getattr(given, run)["y"].copy()[None] for run in ("reference", "deployed", "candidate", "base", "scaled")
    }
    if changes.pop("filled", False):
        for array in runs.values():
            array[..., 0] = -np.inf
    return replace(given, **{run: {"y": array} for run, array in runs.items()}, **changes)  # type: ignore[arg-type]


def test_positions_that_are_not_judged_are_left_out() -> None:
    effect = 0.3 * NOISE
    padded = np.zeros((1, ROWS), bool)
    padded[0, :50] = True
    given = with_runs(case(1.0, effect=effect), unjudged=padded)
    wrong = TRUTH + effect * DIRECTION
    wrong[:50] += 5
    found = judge_missing_part([given], given, {"y": wrong[None]}, dtype="float16")
    assert not found.is_detected and found.share.missing == pytest.approx(1.0, abs=0.2)


def test_fill_values_are_left_out() -> None:
    effect = 0.3 * NOISE
    given = with_runs(case(1.0, effect=effect), filled=True)
    wrong = (TRUTH + effect * DIRECTION)[None]
    wrong[..., 0] = -np.inf
    found = judge_missing_part([given], given, {"y": wrong}, dtype="float16")
    assert found.changes_outputs and not found.is_detected
    assert found.share.missing == pytest.approx(1.0, abs=0.2)


def test_output_of_few_elements_is_judged_by_every_case() -> None:
    def single(error: float, name: str) -> Case:
        truth = np.ones(2)
        own = np.float32(truth + error)
        return Case(name, "", {"y": truth}, {"y": own}, {"y": own}, {"y": truth + 1}, {"y": truth - 0.1})

    exact, usual = single(1e-7, "exact"), single(1e-3, "usual")
    without = {"y": np.ones(2) + 1e-4}
    assert judge_missing_part([exact], exact, without, dtype="float32").is_detected
    assert not judge_missing_part([exact, usual], exact, without, dtype="float32").is_detected
