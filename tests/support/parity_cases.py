"""Cases of one output, made by hand: the candidate, the reference and PyTorch differ by known patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lora_export.verification.parity import Case, Sensitivity, judge
from lora_export.verification.parity.figures import Gate

COUNT = np.arange(1024)
# ±1 in three patterns: each has rms 1 and peak 1, and the product of any two has mean 0.
EFFECT, OWN, ERROR = ((-1.0) ** (COUNT // width) for width in (1, 2, 4))
TRIED = (Sensitivity("x", peer_changed=True, candidate_changed=True),)


def make(
    own: Any = 1e-6 * OWN,
    error: Any = 1e-6 * ERROR,
    effect: Any = EFFECT,
    *,
    truth: Any = None,
    scaled: Any = None,
    dtype: str = "float32",
    name: str = "first",
) -> Case:
    """One output `y`: R is 1 throughout, P = R + own, O = R + error, B = R - effect, S = R + effect / 10."""
    r = np.ones_like(np.asarray(effect, np.float64)) if truth is None else np.asarray(truth, np.float64)
    return Case(
        name,
        f"x [{r.size}]",
        reference={"y": r},
        deployed={"y": (r + own).astype(dtype)},
        candidate={"y": (r + error).astype(dtype)},
        base={"y": r - effect},
        scaled={"y": r + 0.1 * np.asarray(effect) if scaled is None else scaled},
    )


def with_output(case: Case, run: str, **outputs: np.ndarray | None) -> Case:
    """The case with outputs of one run replaced, added, or (None) removed."""
    arrays = {**getattr(case, run), **outputs}
    return replace(case, **{run: {name: array for name, array in arrays.items() if array is not None}})


def everywhere(case: Case, **outputs: np.ndarray) -> Case:
    """The case with more outputs, the same in every run."""
    for run in ("reference", "deployed", "candidate", "base", "scaled"):
        case = with_output(case, run, **outputs)
    return case


def with_value(value: float, *runs: str) -> Case:
    """A case in which element 5 of `y` is `value` in these runs."""
    case = make()
    for run in runs:
        array = getattr(case, run)["y"].copy()
        array[5] = value
        case = with_output(case, run, y=array)
    return case


def with_spike(height: float, rest: np.ndarray) -> np.ndarray:
    """The errors `rest`, and one of `height`."""
    errors = rest.copy()
    errors[512] = height
    return errors


def failed_gates(*cases: Case, **options: Any) -> list[str]:
    """The gates and controls that are reasons against the cases."""
    return [reason.gate for reason in judge(cases, sensitivity=TRIED, **options).reasons]


def always_passing(name: str) -> Callable[..., Gate]:
    """A gate of this name that is switched off."""
    return lambda *_: Gate(name, 0.0, 0.0, passed=True)


def integers(o: list[int], r: list[int], p: list[int], b: list[int], dtype: str = "int64") -> Case:
    """One integer output `ids`: of the candidate, the reference, PyTorch, and without the adapter."""
    o_, r_, p_, b_ = ({"ids": np.array(values, dtype)} for values in (o, r, p, b))
    return Case("first", "x [3]", reference=r_, deployed=p_, candidate=o_, base=b_, scaled=b_)
