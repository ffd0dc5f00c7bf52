"""The outputs of two runs: by name, by order, by error, and bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.verification import compare_outputs
from lora_export.verification.compare_outputs import notes_on_padding, outputs_beyond_rounding, padding_beyond_rounding
from lora_export.verification.parity import Outcome, Reason, Verdict
from support.parity_cases import EFFECT, ERROR, OWN, make

ONE, TWO = np.float32([1, 2]), np.float32([3, 4])


def test_outputs_get_the_names_of_the_reference() -> None:
    reference = {"a": ONE, "b": TWO}
    by_name = compare_outputs.named_as(reference, {"b": TWO, "more": ONE, "a": ONE})
    by_order = compare_outputs.named_as(reference, {"x": ONE, "y": TWO})
    assert list(by_name) == list(by_order) == ["a", "b"]
    assert by_name["b"] is TWO and by_order["b"] is TWO
    assert compare_outputs.named_as(reference, {"b": TWO}) == {"b": TWO} and not compare_outputs.named_as(reference, {})


def test_names_that_identify_outputs_are_kept() -> None:
    reference, outputs = {"a": ONE}, {"x": TWO}
    assert compare_outputs.aligned(outputs, reference, names_known=True) is outputs
    assert compare_outputs.aligned(outputs, reference, names_known=False) == {"a": TWO}
    several = {"x": ONE, "y": TWO}
    assert compare_outputs.aligned(several, reference, names_known=False) is several


@pytest.mark.parametrize(
    ("gates", "alone"),
    [(["error"], True), (["error", "tail", "bulk", "features"], True), (["error", "exact"], False), ([], False)],
)
def test_a_difference_in_precision_alone_is_recognised(gates: list[str], alone: bool) -> None:
    reasons = tuple(Reason(Outcome.DIFFERENT, gate, "text") for gate in gates)
    doubt = Reason(Outcome.UNDECIDED, "effect", "text")
    verdict = Verdict(Outcome.DIFFERENT, (*reasons, doubt), comparisons=(), sensitivity=(), dtype="float32")
    assert compare_outputs.differs_in_precision_alone(verdict) is alone


def test_each_output_has_the_peer_with_the_larger_error() -> None:
    exact, small, large = (make(own=size * OWN) for size in (0, 0.125, 0.5))
    for cases, others in (([small], [large]), ([large], [small]), ([exact], [large]), ([large], [exact])):
        (case,) = compare_outputs.with_larger_peer_error(cases, others)
        assert case.deployed["y"] is large.deployed["y"] and case.candidate is cases[0].candidate


def test_errors_are_taken_over_all_cases() -> None:
    cases = [make(error=0.5 * ERROR, effect=4.0 * EFFECT), make(error=0 * ERROR, effect=4.0 * EFFECT)]
    ((error, relative),) = compare_outputs.candidate_errors(cases).values()
    assert error == pytest.approx(0.5 / 2**0.5) and relative == pytest.approx(error / 4)
    alone = [dataclasses.replace(case, base=None) for case in cases]
    assert compare_outputs.candidate_errors(alone) == {"y": (error, None)}


def test_positions_before_the_first_token_are_found() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 0, 1, 1]])
    found = compare_outputs.before_first_token({"attention_mask": mask})
    assert found is not None and found.tolist() == [[True, True, False, False], [False] * 4]
    for none in ({}, {"attention_mask": np.ones((2, 3))}, {"attention_mask": np.zeros((2, 3, 4))}):
        assert compare_outputs.before_first_token(none) is None


def test_bits_that_differ_are_listed_with_the_largest_difference() -> None:
    outputs = {"first": {"y": ONE, "z": TWO}, "second": {"y": ONE}}
    assert compare_outputs.bits_that_differ(outputs, {"first": {"y": ONE.copy(), "z": TWO}, "second": {"y": ONE}}) == []
    others = {"first": {"y": ONE + np.float32(0.5), "z": TWO[:1]}, "second": {"y": ONE.astype(np.float64)}}
    assert compare_outputs.bits_that_differ(outputs, others) == [
        "first, y: 0.5",
        "first, z: (2,) and (1,)",
        "second, y: 0",
    ]
    assert compare_outputs.bits_that_differ({"c": {"y": np.float32([0.0])}}, {"c": {"y": np.float32([-0.0])}})
    zeros = {"c": {"y": np.zeros(2, np.float32)}}
    assert compare_outputs.bits_that_differ(zeros, {"c": {"y": np.zeros(2, np.int32)}}) == ["c, y: 0"]
    nan = {"c": {"y": np.float32([np.nan])}}
    assert compare_outputs.bits_that_differ(nan, nan) == []


def test_any_output_may_differ() -> None:
    assert not compare_outputs.differ({"y": ONE, "z": TWO}, {"y": ONE.copy(), "z": TWO})
    assert compare_outputs.differ({"y": ONE, "z": TWO}, {"y": ONE, "z": ONE})


# --- beyond rounding.py ---

MASK = np.array([[1, 1, 0], [1, 1, 1]])
TRUTH = np.array([[[1.0, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]])  # (batch, sequence, features)


def off_at(*positions: tuple[int, int], by: float = 1.0) -> NDArray[np.float32]:
    own = TRUTH.copy()
    for position in positions:
        own[position] += by
    return own.astype(np.float32)


def found(own: NDArray[np.float32], mask: NDArray[np.int64] = MASK) -> dict[str, list[list[int]]]:
    outputs = {"hidden": own, "pooled": own[:, 0]}
    truths = {"hidden": TRUTH, "pooled": TRUTH[:, 0]}
    by_case = padding_beyond_rounding({"a": outputs}, {"a": truths}, {"a": {"attention_mask": mask}}, "float32")
    return {name: np.argwhere(positions).tolist() for name, positions in by_case.get("a", {}).items()}


def test_padding_is_not_judged_where_pytorch_is_off() -> None:
    assert found(off_at((0, 2))) == {"hidden": [[0, 2]]}
    assert found(off_at((0, 2), (1, 1))) == {"hidden": [[0, 2]]}, "a token is judged"
    assert found(off_at((0, 2), by=1e-4)) == {}, "rounding may explain it"
    assert found(off_at((0, 2)), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])) == {}, "the mask is of other positions"
    assert found(off_at((0, 2)), np.zeros_like(MASK)) == {}, "without a token nothing tells the size of the output"
    assert padding_beyond_rounding({"a": {"y": off_at()}}, {"a": {"y": TRUTH}}, {"a": {}}, "float32") == {}


@pytest.mark.parametrize(("position", "doubts"), [((0, 2), 0), ((1, 1), 1)])
def test_an_output_is_undecided_unless_its_error_is_in_padding(position: tuple[int, int], doubts: int) -> None:
    deployed, reference = {"a": {"y": off_at(position)}}, {"a": {"y": TRUTH}}
    unjudged = padding_beyond_rounding(deployed, reference, {"a": {"attention_mask": MASK}}, "float32")
    texts = list(outputs_beyond_rounding(deployed, reference, unjudged, "float32"))
    assert len(texts) == doubts == 1 - len(notes_on_padding(unjudged))
    assert all("y in case a: PyTorch's own error is" in text for text in texts)
    assert len(list(outputs_beyond_rounding(deployed, reference, {}, "float32"))) == 1


def test_an_output_is_named_once_in_the_notes() -> None:
    positions = {"hidden": MASK == 0}
    (note,) = notes_on_padding({"a": positions, "b": positions})
    assert note.startswith("hidden was not judged at positions of padding")
