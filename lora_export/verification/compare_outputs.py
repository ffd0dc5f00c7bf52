"""What the outputs of two runs have in common, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.runtime.runner import Arrays
from lora_export.verification import parity

PRECISION = {"error", "tail", "bulk", "features"}  # gates that put a candidate's error beside its peer's


def named_as(reference: parity.Arrays, answer: Arrays) -> Arrays:
    """The outputs that the reference has, by its names; in their order where a graph's own names mean nothing."""
    if reference.keys() <= answer.keys():
        return {name: answer[name] for name in reference}
    return dict(zip(reference, answer.values(), strict=True))


def aligned(outputs: Arrays, reference: parity.Arrays, *, names_known: bool) -> Arrays:
    """A candidate's outputs by the reference's names: by order where the names of either mean nothing."""
    if names_known or len(outputs) != len(reference):
        return outputs
    return dict(zip(reference, outputs.values(), strict=True))


def differs_in_precision_alone(verdict: parity.Verdict) -> bool:
    """Whether all that is held against a candidate is to be farther from the reference than its peer is."""
    against = {reason.gate for reason in verdict.reasons if reason.outcome is parity.Outcome.DIFFERENT}
    return bool(against) and against <= PRECISION


def by_the_farther(cases: Sequence[parity.Case], others: Sequence[parity.Case]) -> list[parity.Case]:
    """The cases with, of each output, whichever of both peers' answers lies farther from the reference.

    An adapter that is large beside its weight costs more digits once it is merged, in whoever merges it: a sum of
    large numbers that nearly cancel is what W + ΔW then has to make of x, and A x is not. A right merge may not be
    blamed for that.
    """

    def farther(case: parity.Case, other: parity.Case) -> parity.Case:
        chosen = {
            name: max(
                (value, other.deployed.get(name, value)), key=lambda answer: error_of(case.reference[name], answer)
            )
            for name, value in case.deployed.items()
        }
        return replace(case, deployed=chosen)

    return [farther(case, other) for case, other in zip(cases, others, strict=True)]


def error_of(reference: NDArray[Any], answer: NDArray[Any]) -> float:
    return parity.rms(answer.astype(np.float64) - reference)


def distances(cases: Sequence[parity.Case]) -> dict[str, tuple[float, float | None]]:
    """Output -> rmse(O,R) over all cases together, and as a share of what the adapter does; None without an adapter."""

    def apart(one: Callable[[parity.Case], parity.Arrays], output: str) -> float:
        errors = [one(case)[output].astype(np.float64) - case.reference[output] for case in cases]
        return parity.rms(np.concatenate([error.ravel() for error in errors]))

    found = {}
    for output in cases[0].reference:
        error = apart(lambda case: case.candidate, output)
        effect = None if cases[0].base is None else apart(lambda case: case.base or {}, output)
        found[output] = error, error / effect if effect else None
    return found


def before_first_token(arrays: Arrays) -> NDArray[np.bool_]:
    """Where [batch, sequence] rows are padded at their beginning. Empty where there is no mask."""
    mask = arrays.get("attention_mask", np.ones((0, 0), np.int64))
    return np.cumsum(mask, axis=1) == 0 if mask.ndim == 2 else np.zeros((0, 0), bool)


def from_first_token(case: parity.Case, unjudged: NDArray[np.bool_] | None) -> parity.Case:
    """The case with the reference's numbers in all runs where a row's padding comes before its tokens.

    `unjudged` is what `before_first_token` returns. At these positions a decoder attends to nothing. What it computes
    of that is undefined: with a cache it is something else than without. What is not finite there stays.
    """
    if unjudged is None:
        return case
    runs = ("deployed", "candidate", "base", "scaled", "attached")
    before: dict[str, Arrays | None] = {name: getattr(case, name) for name in runs}
    after: dict[str, Any] = {
        name: _with_reference(outputs, case.reference, unjudged)
        for name, outputs in before.items()
        if outputs is not None
    }
    return replace(case, **after)


def _with_reference(outputs: Arrays, reference: parity.Arrays, unjudged: NDArray[np.bool_]) -> Arrays:
    """The outputs with the reference's numbers at the positions that are not judged."""
    made = dict(outputs)
    for name, truth in reference.items():
        value = outputs.get(name)
        if value is None or truth.ndim <= 2 or value.shape != truth.shape or truth.shape[:2] != unjudged.shape:
            continue
        replaced = unjudged & np.isfinite(value).reshape(*unjudged.shape, -1).all(-1)
        made[name] = value.copy()
        made[name][replaced] = truth[replaced].astype(value.dtype)
    return made


def bits_that_differ(answers: Mapping[str, Arrays], others: Mapping[str, Arrays]) -> list[str]:
    """Where answers, by case, are not the same bit for bit: `case, output: largest difference`."""
    return [
        f"{case}, {name}: {_largest_difference(value, others[case][name])}"
        for case, outputs in answers.items()
        for name, value in outputs.items()
        if bits(value) != bits(others[case][name])
    ]


def bits(array: NDArray[Any]) -> tuple[Any, ...]:
    """What makes two arrays the same to the last bit."""
    return array.dtype, array.shape, array.tobytes()


def _largest_difference(one: NDArray[Any], other: NDArray[Any]) -> str:
    if one.shape != other.shape:
        return f"{one.shape} and {other.shape}"
    return f"{np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0):.3g}"


def differ(one: Arrays, other: Arrays) -> bool:
    """Whether any output is another."""
    return any(not np.array_equal(value, other[name]) for name, value in one.items())
