"""Each gate detects what no other gate does. Each control detects gates that are too wide."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.verification import parity
from lora_export.verification.parity import Case, Magnitudes, Outcome, gates, judge, judging
from lora_export.verification.parity.gates import Allowance, Tolerance
from support.parity_cases import (
    COUNT,
    EFFECT,
    ERROR,
    OWN,
    TRIED,
    always_passing,
    failed_gates,
    integers,
    make,
    with_output,
    with_spike,
)


def test_only_error_gate_detects_small_error_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch is far off in one element, so its maximum allows much; its rmse is 1/30.
    case = make(own=with_spike(1.0, 0.01 * OWN), error=0.1 * ERROR, effect=64 * EFFECT)
    verdict = judge([case])
    assert verdict.outcome is Outcome.DIFFERENT and verdict.exit_code == 4 and not verdict
    assert [reason.gate for reason in verdict.reasons] == ["error"]
    assert "y in case first: the error is 0.1, allowed is 0.0656; PyTorch's own error is 0.0328 (× 3.05)" in str(
        verdict
    )
    monkeypatch.setattr(gates, "error_gate", always_passing("error"))
    assert judge([case]).same


def test_twice_pytorchs_error_passes_and_slightly_more_fails() -> None:
    own = 0.125 * OWN
    assert judge([make(own=own, error=0.25 * ERROR, effect=64 * EFFECT)]).same
    more = (0.25 + 2.0**-13) * ERROR
    assert failed_gates(make(own=own, error=more, effect=64 * EFFECT)) == ["error", "tail"]


@pytest.mark.parametrize(
    ("elements", "dtype", "k"),
    [
        (10, "float32", 10.0),
        (11, "float32", 8.0),
        (500, "bfloat16", 8.0),
        (501, "float32", 2.0),
        (501, "float16", 3.0),
        (501, "bfloat16", 3.0),
    ],
)
def test_ratio_limit_depends_on_size_and_precision(elements: int, dtype: str, k: float) -> None:
    assert parity.ratio_limit(elements, dtype) == k
    pattern = np.where(np.arange(elements) % 2, 1.0, -1.0)
    case = make(own=pattern / 16, error=-pattern * k / 16, effect=64 * pattern, dtype=dtype)
    figures = judge([case], dtype=dtype).comparisons[0].figures
    assert figures is not None and figures.ratio_limit == k
    assert judge([case], dtype=dtype).same
    wider = make(own=pattern / 16, error=-pattern * (k + 0.5) / 16, effect=64 * pattern, dtype=dtype)
    assert judge([wider], dtype=dtype).outcome is Outcome.DIFFERENT


def test_infinite_limit_lets_nothing_pass() -> None:
    unbounded = Allowance(ratio_limit=2.0, rmse=math.inf, peak=math.inf)
    assert not parity.gates.error_gate(Magnitudes(np.zeros(3)), unbounded).passed
    assert not parity.gates.tail_gate(Magnitudes(np.zeros(3)), unbounded).passed


def test_one_eps_is_allowed_where_pytorch_is_integers() -> None:
    eps = 2.0**-23
    assert judge([make(own=0, error=eps * (COUNT % 2))]).same  # rmse is eps / sqrt 2
    verdict = judge([make(own=0, error=2 * eps * (COUNT % 2))])
    assert [reason.gate for reason in verdict.reasons] == ["error"]
    assert verdict.comparisons[0].figures is not None and verdict.comparisons[0].figures.ratio is None


def test_floor_is_not_added_to_pytorchs_error() -> None:
    allowed = parity.allowance(Magnitudes(np.ones(1024)), Magnitudes(np.full(1024, 2.0)), ratio_limit=3.0, eps=0.5)
    assert allowed == Allowance(ratio_limit=3.0, rmse=6.0, peak=8.0)


def test_only_tail_gate_detects_one_bad_element_in_a_million(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    size = 1_000_000
    own, error = rng.normal(scale=1e-6, size=(2, size))
    error[123_456] = 1e-4
    case = make(own=own, error=error, effect=rng.normal(size=size))
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT
    assert [reason.gate for reason in verdict.reasons] == ["tail"]
    assert "the element at [123456] is 1.00010002, the reference has 1: off by 0.0001" in str(verdict)
    monkeypatch.setattr(gates, "tail_gate", always_passing("tail"))
    assert judge([case]).same


def test_only_bulk_gate_detects_errors_beside_a_spike_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch is off by 1 in one element of 1024 and by 1e-6 elsewhere. Its rmse, 1/32, allows 1/16 everywhere.
    case = make(own=with_spike(1.0, 1e-6 * OWN), error=0.05 * ERROR, effect=64 * EFFECT)
    assert failed_gates(case) == ["bulk"]
    assert "the median error is 0.05, allowed is 2" in str(judge([case], sensitivity=TRIED))
    monkeypatch.setattr(gates, "bulk_gate", always_passing("bulk"))
    assert judge([case], sensitivity=TRIED).same


def test_bulk_gate_passes_a_candidate_with_the_same_spike() -> None:
    assert judge([make(own=with_spike(1.0, 1e-6 * OWN), error=with_spike(1.5, 1e-6 * ERROR))], sensitivity=TRIED).same


def test_only_effect_gate_detects_error_large_relative_to_weak_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    # The error is 20 % of the effect, allowed are 2 × 10.5 %. The controls are 100 % and 22.4 % away.
    case = make(own=0.105 * OWN, error=0.2 * ERROR, effect=EFFECT)
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.outcome is Outcome.UNDECIDED and verdict.exit_code == 5 and not verdict
    assert [reason.gate for reason in verdict.reasons] == ["effect"]
    assert "the error 0.2 is 20 % of the adapter's effect (1)" in str(verdict)
    monkeypatch.setattr(gates, "effect_gate", always_passing("effect"))
    assert judge([case]).same


def test_one_undecided_output_makes_the_verdict_undecided() -> None:
    weak = make(own=0.105 * OWN, error=0.2 * ERROR)
    case = make()
    for run in ("reference", "deployed", "candidate", "base", "scaled"):
        case = with_output(case, run, weak=getattr(weak, run)["y"])
    verdict = judge([case])
    assert [(reason.output, reason.gate) for reason in verdict.reasons] == [("weak", "effect")]


def test_rounding_larger_than_the_effect_is_undecided() -> None:
    case = make(effect=1e-3 * EFFECT)
    assert judge([replace(case, attached={"y": case.reference["y"] + 0.9e-3})], sensitivity=TRIED).same
    verdict = judge([replace(case, attached={"y": case.reference["y"] + 1.1e-3})], sensitivity=TRIED)
    assert verdict.outcome is Outcome.UNDECIDED
    assert [reason.gate for reason in verdict.reasons] == ["loss"]
    assert "rounding the merged weights costs 110 % of the adapter's effect" in str(verdict)


def test_rounding_where_no_pair_reaches_costs_no_effect() -> None:
    reached, unreached = make(), make(effect=0.0 * EFFECT, name="unreached")
    reached = replace(reached, attached=reached.reference)
    unreached = replace(unreached, attached={"y": unreached.reference["y"] + 1e-3})  # of a head that is rounded
    assert judge([reached, unreached], sensitivity=TRIED).same
    verdict = judge([unreached], sensitivity=TRIED)
    assert verdict.outcome is Outcome.UNDECIDED and "loss" in [reason.gate for reason in verdict.reasons]


def test_integers_must_be_equal() -> None:
    assert judge([integers([1, 2, 3], [1, 2, 3], [1, 2, 3], [9, 9, 9])]).same
    verdict = judge([integers([1, 2, 4], [1, 2, 3], [1, 2, 3], [9, 9, 9])])
    assert [reason.gate for reason in verdict.reasons] == ["exact"]
    assert (
        "1 of 3 values are neither the reference's nor PyTorch's; the element at [2] is 4, the reference has 3"
        in str(verdict)
    )


def test_integers_beyond_float_precision_are_compared_exactly() -> None:
    big = 2**53
    assert judge([integers([big + 1], [big], [big], [7])]).outcome is Outcome.DIFFERENT


def test_integer_may_equal_pytorchs_instead_of_the_references() -> None:
    assert judge([integers([1, 2, 5], [1, 2, 3], [1, 2, 5], [9, 9, 9])]).same


def test_booleans_must_be_equal() -> None:
    assert judge([integers([1, 0, 1], [1, 0, 1], [1, 0, 1], [0, 0, 0], "bool")]).same
    assert judge([integers([1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 0, 0], "bool")]).outcome is Outcome.DIFFERENT


def test_tolerance_is_an_additional_requirement() -> None:
    case = make(own=0.125 * OWN, error=0.25 * ERROR, effect=64 * EFFECT)
    assert judge([case], sensitivity=TRIED, atol=0.25).same
    assert judge([case], sensitivity=TRIED, rtol=0.25).same
    assert failed_gates(case, atol=0.2) == ["tolerance"]
    assert failed_gates(case, atol=0.1, rtol=0.125) == ["tolerance"]
    assert judge([case], sensitivity=TRIED, atol=0.125, rtol=0.125).same
    assert judge([case], atol=0.2).outcome is Outcome.DIFFERENT


def test_tolerance_never_relaxes_a_gate() -> None:
    assert judge([make(error=1e-3 * ERROR)], atol=0.01).outcome is Outcome.DIFFERENT


def test_zero_tolerance_is_applied() -> None:
    assert judge([make(own=0, error=0)], atol=0).same
    assert judge([make()], atol=0).outcome is Outcome.DIFFERENT


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_negative_or_infinite_tolerance_is_refused(bad: float) -> None:
    with pytest.raises(InputRefused, match=r"rtol is .+; a tolerance must be finite and not negative"):
        judge([make()], rtol=bad)
    with pytest.raises(InputRefused, match="atol is"):
        Tolerance(bad, 0.0)


def test_control_detects_gates_wide_enough_for_scaled_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    # The candidate is perfect; PyTorch is so far off (8 % of the effect) that twice that hides 10 %.
    case = make(own=0.08 * OWN, error=0, effect=EFFECT)
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.outcome is Outcome.UNDECIDED
    assert [reason.gate for reason in verdict.reasons] == ["scale_1.1"]
    text = "the model with every adapter scale × 1.1 (off by 0.1; PyTorch's own error is 0.08) passes the gates"
    assert f'y in case first: control "scale × 1.1": {text}' in str(verdict)
    monkeypatch.setattr(gates, "_passes", lambda *_: False)
    assert judge([case]).same


def test_control_detects_gates_wide_enough_for_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(own=0.6 * OWN, error=0, effect=EFFECT, scaled=np.ones(1024) + 5 * EFFECT)
    assert failed_gates(case) == ["adapter_off"]
    monkeypatch.setattr(gates, "_passes", lambda *_: False)
    assert judge([case]).same


def test_control_is_detected_by_one_element() -> None:
    """The control differs in one element: the rmse stays within the allowance, the maximum does not."""
    case = make(own=1e-2 * OWN, error=0, scaled=with_spike(1.1, np.ones(1024)))
    assert judge([case]).same


def test_control_without_adapter_is_values_times_1_01() -> None:
    case = replace(make(), base=None, scaled=None)
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.same
    figures = verdict.comparisons[0].figures
    assert figures is not None
    assert (figures.effect, figures.relative_to_effect) == (None, None)
    assert [(control.name, control.detected, control.required) for control in figures.controls] == [
        ("values_1.01", True, True)
    ]
    assert "there is no adapter" in verdict.notes[0]
    assert failed_gates(replace(make(own=0.006 * OWN, error=0), base=None, scaled=None)) == ["values_1.01"]
    assert failed_gates(replace(make(error=0.01 * ERROR), base=None, scaled=None)) == ["error", "tail"]


def test_unreached_output_has_the_control_of_values() -> None:
    """PyTorch is off by half of the output: anything would pass."""
    case = make()
    truth = np.full(1024, 2.0)
    apart = {"reference": truth, "base": truth, "scaled": truth, "deployed": np.float32(truth + 1.0 * OWN)}
    for run, value in {**apart, "candidate": np.float32(truth + 0.9 * ERROR)}.items():
        case = with_output(case, run, mask=value)
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.outcome is Outcome.UNDECIDED
    assert [(reason.gate, reason.output) for reason in verdict.reasons] == [("values_1.01", "mask")]


# --- small features ---


def uneven(error: float, *, rows: int = 8, scale: float = 1e-4, name: str = "first", own: float = 1e-6) -> Case:
    """[rows, 128] The last two columns are small, and the candidate's relative error in them is `error`."""
    size = np.where(np.arange(128) < 126, 1.0, scale)
    rng = np.random.default_rng(rows)
    truth, effect, noise = (rng.normal(size=(rows, 128)) for _ in range(3))
    errors = np.where(size == 1.0, own * noise, error * scale * noise)
    return make(
        own=own * size * np.roll(noise, 1, 0), error=errors, effect=0.3 * size * effect, truth=size * truth, name=name
    )


def test_only_features_gate_detects_error_in_small_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 % of a column that is 1e-4 of the others: no more than PyTorch's own error in those.
    cases = [uneven(0.01), uneven(0.01, rows=5, name="second")]
    verdict = judge(cases, sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT
    assert [reason.gate for reason in verdict.reasons] == ["features"]
    assert "y: 2 features of 128 along axis 1, small beside the others" in str(verdict)
    monkeypatch.setattr(judging, "small_feature_reasons", lambda *_: ())
    assert judge(cases, sensitivity=TRIED).same


def test_small_features_as_close_as_pytorchs_are_same() -> None:
    assert judge([uneven(2e-6), uneven(2e-6, rows=5, name="second")], sensitivity=TRIED).same


def test_remainder_of_cancellation_is_no_feature() -> None:
    cases = [uneven(1e3, scale=1e-12), uneven(1e3, rows=5, scale=1e-12, name="second")]
    assert judge(cases, sensitivity=TRIED).same


def test_feature_of_few_values_is_not_judged() -> None:
    assert judge([uneven(0.01, rows=4)], sensitivity=TRIED).same


def test_axis_of_varying_size_has_no_features() -> None:
    """Rows of a batch are no features: only the columns have one size in cases of 8 and of 5 rows."""
    rows = [replace(uneven(0.01), name="first"), uneven(0.01, rows=5, name="second")]
    turned = [
        replace(
            case,
            **{s: {"y": getattr(case, s)["y"].T} for s in ("reference", "deployed", "candidate", "base", "scaled")},
        )
        for case in rows
    ]
    assert "along axis 0" in str(judge(turned, sensitivity=TRIED))
    assert "along axis 1" not in str(judge(turned, sensitivity=TRIED))


def test_size_of_each_feature_is_its_rms_over_all_cases() -> None:
    first = np.array([[3.0, 0.0, 3e200, 1.0], [3.0, 0.0, 0.0, np.inf]])  # (values, features)
    second = np.array([[-3.0, 0.0, 4e200, 1.0]])
    cases = [replace(make(own=x, error=x, effect=x), reference={"y": x}) for x in (first, second)]
    sizes = gates._rms_by_feature(cases, 1, lambda case: case.reference["y"])
    np.testing.assert_allclose(sizes, [3.0, 0.0, 5e200 / 3**0.5, np.inf], rtol=1e-15)
