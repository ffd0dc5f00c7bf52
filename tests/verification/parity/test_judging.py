"""The verdict: right candidates are `same`, and no wrong one is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.errors import InputRefused
from lora_export.verification import parity
from lora_export.verification.parity import Findings, Outcome, judge
from lora_export.verification.parity.figures import Gate
from support.parity_cases import EFFECT, ERROR, OWN, TRIED, failed_gates, make, with_output


def test_candidate_as_close_as_pytorch_is_same() -> None:
    verdict = judge([make()], sensitivity=TRIED)
    assert verdict.outcome is Outcome.SAME
    assert verdict.same and verdict and verdict.exit_code == 0
    assert verdict.reasons == () and verdict.notes == ()


def test_figures_follow_their_definitions() -> None:
    # R = 1 and all errors are multiples of 1/8: exact in fp32.
    case = make(own=0.125 * OWN, error=0.25 * ERROR, effect=4.0 * EFFECT)
    case = replace(case, attached={"y": case.reference["y"] + 2.0})
    figures = judge([case]).comparisons[0].figures
    assert figures is not None
    assert (figures.error, figures.deployed_error, figures.ratio) == (0.25, 0.125, 2.0)
    assert (figures.max_error, figures.deployed_max_error, figures.max_relative_error) == (0.25, 0.125, 0.25)
    assert (figures.effect, figures.relative_to_effect, figures.merge_loss) == (4.0, 0.0625, 0.5)
    assert (figures.worst.index, figures.worst.candidate, figures.worst.reference) == ((0,), 1.25, 1.0)
    # mean(O R) / (rms(O) rms(R)), where O is 1.25 and 0.75 in turn
    assert figures.cosine == pytest.approx(1 / math.sqrt((1.25**2 + 0.75**2) / 2))
    few_eps = 4 * 2.0**-23
    assert figures.gates == (
        Gate("error", 0.25, 0.25, passed=True),
        Gate("tail", 0.25, 0.25 + few_eps, passed=True),
        Gate("effect", 0.25, 0.4, passed=True),
        Gate("loss", 2.0, 4.0, passed=True),
    )
    assert [(control.name, control.detected) for control in figures.controls] == [
        ("adapter_off", True),
        ("scale_1.1", True),
    ]


def test_one_bad_case_makes_the_verdict_different() -> None:
    verdict = judge([make(), make(error=1e-3 * ERROR, name="second"), make(name="third")])
    assert verdict.outcome is Outcome.DIFFERENT
    assert {reason.case for reason in verdict.reasons} == {"second"}
    assert verdict.nearest_to_failing[0].case == "second"


def test_different_outweighs_undecided() -> None:
    weak = make(own=0.105 * OWN, error=0.2 * ERROR)
    bad = make(error=1e-3 * ERROR, name="second")
    assert judge([weak, bad]).outcome is Outcome.DIFFERENT


def test_float32_output_of_half_precision_model_is_judged_in_half_precision() -> None:
    """Logits of a bf16 model are no more precise in fp32."""
    case = make(own=0, error=2.0**-8 * ERROR, effect=EFFECT)
    assert judge([case], dtype="bfloat16").same
    assert judge([case], dtype="float32").outcome is Outcome.DIFFERENT


def test_half_precision_output_of_float32_model_is_judged_in_its_own() -> None:
    case = make(own=0, error=2.0**-8 * ERROR, effect=EFFECT, dtype="bfloat16")
    assert judge([case], dtype="float32").same


def test_single_element_is_measured_by_pytorchs_errors_in_all_cases() -> None:
    """A score per text and a batch of one: an rmse of one element does not show PyTorch's precision."""
    lucky = make(own=[0.0], error=[1e-5], effect=[1.0], name="lucky")
    usual = make(own=[1e-5], error=[1e-5], effect=[1.0], name="usual")
    assert judge([lucky]).outcome is Outcome.DIFFERENT
    assert judge([lucky, usual]).same
    broken = with_output(usual, "deployed", y=np.array([np.nan], np.float32))
    assert failed_gates(usual, broken) == ["structure"], "a case that cannot be measured does not count"


def test_doubt_makes_the_verdict_undecided() -> None:
    verdict = judge([make()], sensitivity=TRIED, findings=Findings(doubts=("no row was looked up",)))
    assert verdict.outcome is Outcome.UNDECIDED and "no row was looked up" in str(verdict)


def test_float64_deployment_is_refused() -> None:
    with pytest.raises(InputRefused, match="parity in float64 cannot be judged"):
        judge([make()], dtype="float64")


def test_output_without_classes_has_no_agreement() -> None:
    figures = judge([make()]).comparisons[0].figures
    assert figures is not None and figures.top1 is None and figures.kl is None


DTYPES = st.sampled_from(parity.DEPLOYED_DTYPES)
SIZES = st.sampled_from([1, 3, 10, 11, 77, 500, 501, 2000])
SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(SEEDS, SIZES, DTYPES, st.floats(0.5, 100), st.floats(-6, 2))
def test_errors_like_pytorchs_are_never_different(
    seed: int, size: int, dtype: str, eps_off: float, log_effect: float
) -> None:
    rng = np.random.default_rng(seed)
    truth, effect = rng.normal(size=size), 10**log_effect * rng.normal(size=size)
    own = eps_off * parity.EPS[dtype] * rng.normal(size=size)
    case = make(own=own, error=-np.roll(own, 1), effect=effect, truth=truth, dtype=dtype)
    assert judge([case], dtype=dtype).outcome is not Outcome.DIFFERENT


@settings(deadline=None, max_examples=150, derandomize=True)
@given(SEEDS, SIZES, DTYPES, st.floats(-9, 1), st.floats(-18, 2), st.sampled_from([-1.0, 0.1]))
def test_candidate_with_missing_or_scaled_adapter_is_never_same(
    seed: int, size: int, dtype: str, log_own: float, log_effect: float, factor: float
) -> None:
    """However weak the adapter is, and however large PyTorch's error."""
    rng = np.random.default_rng(seed)
    truth, effect = rng.normal(size=size), 10**log_effect * rng.normal(size=size)
    own = 10**log_own * rng.normal(size=size)
    case = make(own=own, error=factor * effect, effect=effect, truth=truth, dtype=dtype)
    assert judge([case], dtype=dtype).outcome is not Outcome.SAME


@pytest.mark.parametrize("error", [1e-6, 3e-6, 0.5, 1.0])
def test_gates_alone_find_what_the_whole_verdict_finds(error: float) -> None:
    case = make(error=error * ERROR)
    whole, gates = judge([case]), judge([case], gates_only=True)
    ((_, one),), ((_, other),) = whole.measured, gates.measured
    assert one.gates == other.gates and one.effect == other.effect
    found = [[each.gate for each in one.reasons if each.outcome is Outcome.DIFFERENT] for one in (whole, gates)]
    assert found[0] == found[1] and bool(found[0]) is (error > 2e-6)
    assert one.controls and one.cosine and not other.controls and other.cosine is None
