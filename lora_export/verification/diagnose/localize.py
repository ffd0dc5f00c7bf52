"""Follow one case through candidate and PyTorch, module by module, to where they part.

The candidate's inner values are made outputs of a graph that exists in memory alone; PyTorch's are seen by
hooks. Both run whole, and a module at a time is compared. What a module made of its *own* input is then held
against what its weights and adapters should have made of it (`diagnosis`), whatever was wrong before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from lora_export import layers
from lora_export.errors import InputRefused
from lora_export.graph.insert.inserter import module_of
from lora_export.layers import MatrixWeight
from lora_export.plan import Layout
from lora_export.runtime.kv_cache import IDS, CacheRunner
from lora_export.verification import parity
from lora_export.verification.diagnose.root_cause import (
    NOT_EXPLAINED,
    Cause,
    Diagnosis,
    LayerError,
    Neighbours,
    Observed,
    explain,
)
from lora_export.verification.diagnose.watch_candidate import (
    Followed,
    Suspect,
    _FollowedGraph,
    follow,
    matrix_of,
    named_alike,
    renamed,
)
from lora_export.verification.diagnose.watch_modules import Array, Key, Values, to_numpy, watching

AT_ONCE = 1 << 25  # numbers, of what enters and leaves modules, that are held of each side at a time
# How many times a verdict's own k a module may be off by. In the middle of a model, a few outliers make an rmse a
# matter of chance: in right graphs of MiniLM, modules were off by up to 6.5 times PyTorch's own error.
STANDS_OUT = 8.0
INTEGERS = "iub"


# --- what PyTorch computes ----------------------------------------------------------------------


# --- what the candidate computes ----------------------------------------------------------------


# --- where they part ----------------------------------------------------------------------------


class _Compared(NamedTuple):
    """One call of one module: how far candidate and PyTorch are from the reference."""

    layer: LayerError
    allowed: float
    entering: float | None  # rmse of what enters; None where it could not be seen
    entering_own: float  # PyTorch's
    entering_allowed: float

    @property
    def input_agrees(self) -> bool:
        return self.entering is None or self.entering <= self.entering_allowed

    @property
    def output_agrees(self) -> bool:
        return self.layer.error <= self.allowed


def diagnose(suspect: Suspect, *, every: bool = False) -> Diagnosis:
    """Find the first module of a candidate whose output differs in this case, and why.

    Runs the candidate, PyTorch, base and reference once more, or more often where what is to be compared
    is too much to be held at once; stops at the first difference then, unless `every` is said.
    A decoder with a cache is followed through the prompt of the case, before it reads what it kept.
    Raises InputRefused and RuntimeRefused where nothing can be compared.
    """
    if isinstance(suspect.candidate, CacheRunner):
        at_prompt = _at_prompt(suspect, suspect.candidate)
        found = _followed(at_prompt, every=every)
        length = at_prompt.inputs[IDS].shape[1]
        told = f"seen at the prompt, {length} tokens, with nothing in the cache"
        if found.first is None and _differs(suspect.case) and not _differs(at_prompt.case):
            told += ": what goes wrong does so where the cache is written, or read again"
        return replace(found, why=f"{found.why}\n{told}")
    return _followed(suspect, every=every)


def _at_prompt(suspect: Suspect, candidate: CacheRunner) -> Suspect:
    """The first run of a case that was run token by token, as a case of its own."""
    inputs = candidate.prompt(suspect.inputs)
    if not inputs[IDS].size:
        raise InputRefused("every row of the case begins with padding")
    reference = suspect.reference.run(inputs)
    case = replace(
        suspect.case,
        reference=reference,
        deployed=suspect.deployed.run(inputs),
        candidate=renamed(candidate.run_prompt(inputs), reference),
        base=None,
        scaled=None,
        attached=None,
    )
    return replace(suspect, inputs=inputs, case=case)


def _differs(case: parity.Case) -> bool:
    return parity.judge([case]).outcome is parity.Outcome.DIFFERENT


def _followed(suspect: Suspect, *, every: bool) -> Diagnosis:
    followed = follow(suspect)
    sizes = _sizes(suspect)
    keys = [key for key in sizes if not followed.keys or key in set(followed.keys)]
    calls: dict[str, int] = {}
    for key in followed.keys:
        calls[key.weight] = calls.get(key.weight, 0) + 1
    # A module that the graph reads in more or fewer places than PyTorch calls it cannot be told call by call.
    for weight in {key.weight for key in keys} if calls else ():
        if calls[weight] != sum(key.weight == weight for key in sizes):
            keys = [key for key in keys if key.weight != weight]
    if not keys:
        raise InputRefused("no module is called in PyTorch that could be found in the candidate")
    compared: dict[Key, _Compared] = {}
    told: _Told | None = None
    for group in _groups(keys, sizes):
        values = followed.run(suspect.inputs, group)
        compared |= _compare(suspect, followed, values)
        if told is None:
            told = _first(suspect, followed, compared, values)
        if told is not None and not every:
            break
    layers_told = tuple(there.layer for there in compared.values())
    seen = f"{len({key.weight for key in compared})} of {len(suspect.places)} modules were compared"
    if told is None:
        return Diagnosis(None, f"{_behind_all(suspect, followed, keys)}; {seen}", layers_told)
    return Diagnosis(str(told.key), f"{told.why}; {seen}", layers_told)


def _sizes(suspect: Suspect) -> dict[Key, int]:
    """How many numbers enter and leave each module, in the order in which PyTorch calls them."""
    found: dict[Key, int] = {}

    def seen(key: Key, x: Tensor | None, y: Tensor) -> None:
        found[key] = y.numel() + (0 if x is None else x.numel())

    with watching(suspect.deployed.module, suspect.places, seen):
        suspect.deployed.run(suspect.inputs)
    return found


def _groups(keys: Sequence[Key], sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    group: list[Key] = []
    held = 0
    for key in keys:
        if group and held + sizes[key] > AT_ONCE:
            yield group
            group, held = [], 0
        group.append(key)
        held += sizes[key]
    yield group


def _compare(suspect: Suspect, followed: Followed, values: Mapping[Key, Values]) -> dict[Key, _Compared]:
    """Each module of the group, in the order in which they run. The reference's values are never held together."""
    deployed, base = suspect.deployed_values(values), suspect.base_values(values)
    found: dict[Key, _Compared] = {}

    def seen(key: Key, x: Tensor | None, y: Tensor) -> None:
        if key not in values or key not in deployed:
            return
        given, own = values[key]
        if not followed.has_bias(key):
            bias = _bias((suspect.settled_places or suspect.attached_places)[key.weight])
            own = own if bias is None else own + bias.astype(own.dtype)
        error, own_error, allowed = _apart(own, to_numpy(y), deployed[key].y)
        effect = parity.rms(to_numpy(y) - base[key].y) if key in base else None
        x_deployed = deployed[key].x
        enters = (
            (None, 0.0, 0.0)
            if x is None or given is None or x_deployed is None or given.size != x.numel()
            else _apart(given, to_numpy(x), x_deployed)
        )
        found[key] = _Compared(LayerError(str(key), error, own_error, effect), allowed, *enters)

    with watching(suspect.reference.module, {key.weight for key in values}, seen):
        suspect.reference.run(suspect.inputs)
    return found


def _apart(own: Array, reference: Array, deployed: Array) -> tuple[float, float, float]:
    """rmse of the candidate and of PyTorch, and how much the gate allows."""
    if reference.dtype.kind in INTEGERS:
        wrong = _in_shape(own, reference) != reference
        return float(np.count_nonzero(wrong)), 0.0, 0.0
    errors = deployed.astype(np.float64) - reference
    allowed = parity.allow(
        reference,
        errors,
        k=STANDS_OUT * parity.slack(reference.size, "float32"),
        eps=parity.FEW_EPS * parity.EPS["float32"],
    )
    difference = _in_shape(own.astype(np.float64), reference) - reference
    error = parity.rms(difference) if np.isfinite(difference).all() else math.inf
    return error, parity.rms(errors), allowed.rmse


def _in_shape(own: Array, reference: Array) -> Array:
    """The candidate's values in the reference's shape, where one of them has batch and length the other way round.

    Of two ways to read them that shapes allow, the nearer: neither makes wrong numbers right.
    """
    if own.shape == reference.shape:
        return own
    if own.size != reference.size:
        return np.full(reference.shape, np.nan)
    ways = [own.reshape(reference.shape)]
    if reference.ndim > 2:
        first, second, *rest = reference.shape
        ways.append(own.reshape(second, first, *rest).swapaxes(0, 1))
    return min(ways, key=lambda way: float(np.sum(np.abs(way.astype(np.float64) - reference))))


# --- why ----------------------------------------------------------------------------------------


class _Told(NamedTuple):
    key: Key
    why: str


def _first(
    suspect: Suspect,
    followed: Followed,
    compared: Mapping[Key, _Compared],
    values: Mapping[Key, Values],
) -> _Told | None:
    before: Key | None = None
    for key, there in compared.items():
        if key in values and not there.input_agrees:
            return _Told(key, _between(suspect, before, key, there, values[key]))
        if key in values and not there.output_agrees:
            return _Told(key, _within(suspect, followed, key, compared, values))
        before = key
    return None


def _times(error: float, own: float) -> str:
    if not own or not math.isfinite(error):
        return f"{error:.3g}, PyTorch's is {own:.3g}"
    return f"{error / own:.3g} x PyTorch's own error"


def _between(suspect: Suspect, before: Key | None, key: Key, there: _Compared, values: Values) -> str:
    place = f"{before}, which runs before it, agrees" if before else "it is the first that was compared"
    entering = _times(there.entering or 0.0, there.entering_own)
    if values.x is not None and values.x.dtype.kind in INTEGERS:
        entering = f"{there.entering:.0f} of {values.x.size} numbers"
    lines = [f"what enters it differs already ({entering}), while {place}"]
    reason = next(_as_if(suspect, key, values.x), "") if values.x is not None else ""
    lines.append(reason or "it happens between the two, in what is no such layer: attention, mask, norm, activation")
    return "\n".join(lines)


def _as_if(suspect: Suspect, key: Key, x: Array) -> Iterator[str]:
    """Which of the model's inputs the candidate seems to take for ones, zeros, or a count."""
    for name, given in suspect.inputs.items():
        if given.dtype.kind not in INTEGERS:
            continue
        for number, told in ((1, "ones"), (0, "zeros")):
            changed = {name: np.full_like(given, number)}
            if np.array_equal(changed[name], given):
                continue
            found, deployed = (
                suspect.reference_values([key], **changed).get(key),
                suspect.deployed_values([key], **changed),
            )
            narrow = deployed[key].x if key in deployed else None
            if found is None or found.x is None or narrow is None or found.x.size != x.size:
                continue
            error, _, allowed = _apart(x, found.x, narrow)
            if error <= allowed:
                yield f"it is as if the input {name} were all {told}"


def _within(
    suspect: Suspect,
    followed: Followed,
    key: Key,
    compared: Mapping[Key, _Compared],
    values: Mapping[Key, Values],
) -> str:
    there = compared[key]
    own = f"its output is off by {_times(there.layer.error, there.layer.deployed_error)}"
    if there.entering is None:
        lines = [f"{own}; whether its input agrees could not be seen"]
    elif values[key].x is not None and _is_whole(values[key].x):
        lines = [f"{own}; its input agrees"]
    else:
        lines = [f"{own}; its input agrees ({_times(there.entering, there.entering_own)})"]
    observed = _observed(suspect, followed, key, values[key], compared[key].allowed, is_first=True)
    if observed is None:
        return "\n".join([*lines, f"{NOT_EXPLAINED}: its kind of layer is not looked into"])
    if observed.agrees:
        return "\n".join([*lines, "it does with its input what it should: the difference has grown before it"])
    cause = explain(observed, _neighbours(suspect, values, key, observed))
    lines.append(str(cause) if cause else f"{NOT_EXPLAINED}")
    if cause and cause.kind == "missing" and isinstance(followed, _FollowedGraph) and followed.lacks_adapter:
        lines.append("the graph takes an adapter's file, and was run without one (--onnx-adapter)")
    lines += _as_with_others(suspect, followed, key)
    lines.append(_others(suspect, followed, key, cause, compared, values))
    return "\n".join(lines)


def _is_whole(array: Array | None) -> bool:
    return array is not None and array.dtype.kind in INTEGERS


def _observed(
    suspect: Suspect, followed: Followed, key: Key, values: Values, gate: float, *, is_first: bool = False
) -> Observed | None:
    """What the candidate's module made of its own input; None where that cannot be laid out as x Wᵀ."""
    attached, base = suspect.attached_places[key.weight], suspect.places[key.weight]
    rows = _rows(values, base)
    if rows is None:
        return None
    step = suspect.plan.by_weight.get(key.weight) if suspect.plan else None
    weight, plain, bias = matrix_of(attached), matrix_of(base), _bias(attached)
    without = _bias(base)
    settled = suspect.settled_places.get(key.weight)
    return Observed(
        name=str(key),
        x=rows[0],
        y=rows[1],
        weight=weight,
        bias=bias if followed.has_bias(key) else None,
        step=step if step and step.terms else None,
        shift=bias - without if bias is not None and without is not None and (bias != without).any() else None,
        before=plain if step is not None and step.replace is not None else None,
        stored=followed.stored(key) if is_first else None,
        gate=gate,
        settled=None if settled is None else matrix_of(settled),
    )


def _bias(place: MatrixWeight) -> NDArray[np.float64] | None:
    """(out,), with what is attached to it."""
    bias = place.bias
    return None if bias is None else bias.detach().double().cpu().numpy()


def _rows(values: Values, place: MatrixWeight) -> tuple[Array, Array] | None:
    """x (n, in), or ids (n,), and y (n, out)."""
    x, y = values
    if x is None:
        return None
    if isinstance(place.owner, layers.CONVOLUTIONS):
        return _patches(x, y, place.owner)
    y = y.reshape(-1, y.shape[-1]).astype(np.float64)
    x = x.reshape(-1) if place.layout is Layout.EMBEDDING else x.reshape(-1, x.shape[-1]).astype(np.float64)
    return (x, y) if len(x) == len(y) else None


def _patches(x: Array, y: Array, owner: Any) -> tuple[Array, Array] | None:
    """A convolution as a matrix product: for each place of its output what its kernel sees."""
    if owner.groups != 1 or owner.padding_mode != "zeros" or x.ndim != owner.weight.ndim:
        return None
    pads = owner._reversed_padding_repeated_twice
    around = [(0, 0), (0, 0), *reversed(list(zip(pads[::2], pads[1::2], strict=True)))]
    padded = np.pad(x.astype(np.float64), around)
    reach = [(size - 1) * step + 1 for size, step in zip(owner.kernel_size, owner.dilation, strict=True)]
    dims = len(reach)
    windows = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + dims)))
    steps = tuple(slice(None, None, step) for step in (*owner.stride, *owner.dilation))
    windows = windows[(slice(None), slice(None), *steps)]  # (n, in, places..., kernel...)
    seen = np.moveaxis(windows, 1, 1 + dims)
    rows = seen.reshape(-1, math.prod(seen.shape[1 + dims :]))
    outputs = np.moveaxis(y, 1, -1).reshape(-1, y.shape[1]).astype(np.float64)
    return (rows, outputs) if len(rows) == len(outputs) else None


def _neighbours(suspect: Suspect, values: Mapping[Key, Values], key: Key, observed: Observed) -> Neighbours:
    """What may have got into a module from elsewhere."""
    places = suspect.places

    def weights(shape: tuple[int, ...]) -> Iterator[tuple[str, NDArray[np.float64]]]:
        for name, place in places.items():
            if name != key.weight and place.matrix_shape == shape:
                yield module_of(name), matrix_of(place)

    steps = {module_of(step.weight): step for step in suspect.plan.low_rank} if suspect.plan else {}
    inputs = {}
    for other, there in values.items():
        rows = _rows(there, places[other.weight]) if other != key else None
        if rows is not None and rows[0].shape == observed.x.shape:
            inputs[str(other)] = rows[0]
    return Neighbours(steps, inputs, weights)


def _as_with_others(suspect: Suspect, followed: Followed, key: Key) -> Iterator[str]:
    """Whether a graph's other adapters are what was expected of this one; or none was given to it."""
    others = dict(followed.others()) if isinstance(followed, _FollowedGraph) else {}
    if not others:
        return
    expected, deployed = suspect.reference_values([key]), suspect.deployed_values([key])
    for told, other in others.items():
        error, _, allowed = _apart(other.run(suspect.inputs, [key])[key].y, expected[key].y, deployed[key].y)
        if error <= allowed:
            yield f"with {told} it would be what it should"


def _others(
    suspect: Suspect,
    followed: Followed,
    first: Key,
    cause: Cause | None,
    compared: Mapping[Key, _Compared],
    values: Mapping[Key, Values],
) -> str:
    """How many more modules go wrong by themselves, and whether in the same way."""
    others = [
        _observed(suspect, followed, key, there, compared[key].allowed)
        for key, there in values.items()
        if key != first and key in compared
    ]
    looked = [there for there in others if there is not None]
    wrong = [there for there in looked if not there.agrees]
    if not wrong:
        return f"of {len(looked)} more, each judged by its own input, none goes wrong"
    causes = [explain(there) for there in wrong]
    alike = sum(other is not None and cause is not None and other.kind == cause.kind for other in causes)
    return f"of {len(looked)} more, each judged by its own input, {len(wrong)} go wrong, {alike} in the same way"


def _behind_all(suspect: Suspect, followed: Followed, keys: Sequence[Key]) -> str:
    """Why a candidate differs none of whose modules does."""
    outputs = followed.outputs(suspect.inputs)
    again = parity.judge([replace(suspect.case, candidate=named_alike(outputs, suspect.case))])
    told = parity.judge([suspect.case])
    if told.outcome is parity.Outcome.DIFFERENT and again.outcome is not parity.Outcome.DIFFERENT:
        return (
            "looked into, it agrees: with its inner values handed out, onnxruntime fuses and orders less, so that the "
            "difference lies in how it optimises the graph"
        )
    strains = [there.figures.limit_used for there in told.comparisons if there.figures]
    if told.outcome is parity.Outcome.DIFFERENT and max(strains, default=math.inf) <= STANDS_OUT:
        return "it is small, and no module stands out: it may grow from one to the next"
    if told.outcome is parity.Outcome.DIFFERENT:
        return f"every module agrees that was compared: it happens after {keys[-1]}, or beside them"
    return "every module that was compared is within its gate"
