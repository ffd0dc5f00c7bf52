"""What everybody is asked: inputs of several shapes, by what the candidate can take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.models.model import Model, Sizes
from lora_export.models.pt2.example_inputs import Limits
from lora_export.runtime.kv_cache import CacheRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.storage.npz import read_arrays


def case_inputs(
    model: Model,
    candidate: Runner,
    *,
    seed: int = 0,
    user_inputs: Path | None = None,
    adapters: Sequence[Adapter] = (),
) -> dict[str, Arrays]:
    """What a proof gives to everybody, by case: three sets of seeded inputs, and the user's own.

    Tokens whose rows the adapters bring stand among a Hugging Face model's seeded ones.
    """
    rows = [index for adapter in adapters for rows in adapter.rows.values() for index in rows.indices.tolist()]
    tokens = np.array(sorted(set(rows)) if model.is_huggingface else [], np.int64)
    return dict(_inputs(model, candidate, seed, user_inputs, tokens))


def _inputs(
    model: Model, candidate: Runner, seed: int, user_inputs: Path | None, tokens: NDArray[np.int64]
) -> Iterator[tuple[str, Arrays]]:
    for number, sizes in enumerate(model.checked_sizes(_fixed_sizes(candidate, model), _limits(candidate, model))):
        label = " x ".join(f"{symbol} {size}" for symbol, size in sizes.items()) or f"draw {number + 1}"
        arrays = draw(model, candidate, sizes, seed + number + 1)
        yield label, _with_tokens(arrays, tokens) if tokens.size else arrays
    if user_inputs is not None:
        yield user_inputs.name, _read_inputs(user_inputs, model)


def draw(model: Model, candidate: Runner, sizes: Sizes, seed: int) -> Arrays:
    """Seeded inputs as the model takes them, and the candidate can."""
    arrays = {name: value.numpy() for name, value in model.inputs(sizes, seed=seed).items()}
    if isinstance(candidate, CacheRunner) and not candidate.takes_padding:
        return candidate.without_padding(arrays)
    return arrays


def _with_tokens(arrays: Arrays, tokens: NDArray[np.int64]) -> Arrays:
    """These tokens, from the last on, at every second place: a random one of 50,000 would never be among 200."""
    made = {}
    for name, array in arrays.items():
        made[name] = array.copy()
        if name.endswith("input_ids"):
            places = made[name].reshape(-1)[::2]
            places[:] = np.resize(np.roll(tokens, len(places)), len(places))
    return made


def _read_inputs(path: Path, model: Model) -> Arrays:
    arrays = read_arrays(path)
    if set(arrays) != set(model.input_names):
        raise InputRefused(
            f"{path} holds {', '.join(arrays) or 'nothing'}; the model takes {', '.join(model.input_names)}"
        )
    like = {name: value.numpy().dtype for name, value in model.examples().items()}
    halves = {name for name, dtype in like.items() if dtype == np.float16 and arrays[name].dtype.kind == "f"}
    return {name: arrays[name].astype(like[name]) if name in halves else arrays[name] for name in model.input_names}


def _fixed_sizes(candidate: Runner, model: Model) -> Sizes:
    """Sizes that the candidate declares constant. The batch is never excused."""
    fixed: Sizes = {}
    for name, axes in model.axes.items():
        declared = candidate.axes.get(name, ())
        for axis, symbol in axes.items():
            size = declared[axis] if axis < len(declared) else None
            if size is not None and symbol != "batch":
                fixed[symbol] = size
    return fixed


def _limits(candidate: Runner, model: Model) -> Limits:
    """Between which sizes a candidate says that it can be run, where it says so. The batch is never excused."""
    limits: Limits = {}
    told = candidate.limits if isinstance(candidate, ModuleRunner) else {}
    for name, axes in model.axes.items():
        for axis, symbol in axes.items():
            if symbol != "batch" and axis < len(told.get(name, ())):
                limits[symbol] = told[name][axis]
    return limits


def told_of_sizes(candidate: Runner, model: Model) -> list[str]:
    fixed = _fixed_sizes(candidate, model)
    notes = [
        f"the candidate was made for one size of {symbol}, {size}: no other was tried" for symbol, size in fixed.items()
    ]
    for symbol, (low, high) in _limits(candidate, model).items():
        if symbol not in fixed and (low or high is not None):
            bounds = f"{low} and more" if high is None else f"{low} to {high}" if low else f"up to {high}"
            notes.append(f"the candidate takes a {symbol} of {bounds}: what lies beyond was not tried")
    return notes
