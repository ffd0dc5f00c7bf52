"""A merged checkpoint, judged weight by weight against W + s·BA in fp64. Neither a model nor PyTorch is needed.

Every tensor of base, adapters and candidate is accounted for:

    kept      what no adapter touches has the base's bytes; in a candidate of another dtype, its numbers rounded once
    replaced  what an adapter brings whole, or in rows, is there as it came, rounded once
    changed   |M - V| <= half a step of the stored dtype + what a sum in fp32 may cost, for every entry of
              V = W + Σ s·BA (with DoRA: m/‖V‖·V), which is made here, in fp64; nothing is shared with the merge
    controls  the same question put to V without one adapter, with its scale x 1.1, and with its BA transposed must be
              answered no, or this weight is undecided: it could not have told

What a sum in fp32 may cost is its usual bound, about (rank + 4) · 2⁻²⁴ · |s| ‖b‖ ‖a‖ + 2⁻²² · |V| for an entry made of
the row b of B and the column a of A. The plan (which pair is for which weight) is the one that a merge follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import one_line
from lora_export.lora import LoraPair
from lora_export.plan import FLOATS, Plan, Step
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.verification.parity import Outcome, WorstElement
from lora_export.weights.checkpoint import Checkpoint

PIECE = 1 << 22  # bytes of a tensor that are looked at at once
UNIT = 2.0**-24  # of rounding in fp32
NUDGE = 1.1
CLOSE = 0.05  # ‖what is left‖ / ‖what there is‖ up to which a factor explains a difference
SHOWN = 8  # weights that a verdict prints; it holds all of them

Wide = NDArray[np.float64]


class Fate(StrEnum):
    """What should have become of a tensor."""

    KEPT = "kept"
    CHANGED = "changed"
    REPLACED = "replaced"
    NONE = "none"  # nobody knows it


@dataclass(frozen=True)
class Weight:
    """What was found of one tensor."""

    name: str
    fate: Fate
    outcome: Outcome
    why: str = ""  # empty where it is the same
    elements: int = 0
    off: int = 0  # entries that are not what they should be
    error: float = 0.0  # the largest |M - V|, as a share of what is allowed there
    controls: Mapping[str, bool] = field(default_factory=dict)  # what was done to V -> whether M was told from it
    # Of a changed one, as a merge's ledger has them (see StepResult), but for the sums, which are made in fp64.
    relative_change: float | None = None
    retention: float | None = None
    noise: float | None = None
    worst: WorstElement | None = None  # where M lies farthest from V, as a share of what is allowed there

    def __str__(self) -> str:
        return one_line(f"{self.name}: {self.outcome}{f', {self.why}' if self.why else ''}")


@dataclass(frozen=True)
class Audit:
    """All of them: different where one is, undecided where one is and none is different."""

    outcome: Outcome
    weights: tuple[Weight, ...]

    @property
    def exit_code(self) -> int:
        return self.outcome.exit_code

    def __bool__(self) -> bool:
        return self.outcome is Outcome.SAME

    @property
    def worst(self) -> tuple[Weight, ...]:
        """Those that are not the same, the different ones first, those with most entries off before others."""
        wrong = [weight for weight in self.weights if weight.outcome is not Outcome.SAME]
        return tuple(sorted(wrong, key=lambda there: (there.outcome is Outcome.UNDECIDED, -there.off, -there.error)))

    def __str__(self) -> str:
        fates = [weight.fate for weight in self.weights if weight.outcome is Outcome.SAME]
        told = [f"{fates.count(fate)} {fate}" for fate in Fate if fate in fates]
        lines = [f"{self.outcome}: {len(self.weights)} tensors, of which {', '.join(told) or 'none'} as they should be"]
        lines += [f"  {weight}" for weight in self.worst[:SHOWN]]
        lines += [f"  and {len(self.worst) - SHOWN} more"] if len(self.worst) > SHOWN else []
        changed = [weight for weight in self.weights if weight.fate is Fate.CHANGED]
        if self and changed:
            furthest = max(changed, key=lambda there: there.error)
            lines.append(
                one_line(
                    f"the farthest from W + s·BA in fp64 is {furthest.name}: {furthest.error:.2f} of what is allowed"
                )
            )
            controls = [told for weight in changed for told in weight.controls.values()]
            lines.append(f"{len(controls)} wrong sums (an adapter left out, scaled, transposed) were told from it")
        return "\n".join(lines)


def audit(
    plan: Plan, base: Checkpoint, merged: Checkpoint, *, progress: Callable[[int], None] = lambda _: None
) -> Audit:
    """Judge every tensor of `merged`, which a plan over `base` should have made. Reads both in pieces.

    Raises InputRefused where a file becomes shorter meanwhile.
    """
    before = {entry.name: Stored(shard, entry) for shard in base.shards.values() for entry in shard.entries.values()}
    after = {entry.name: Stored(shard, entry) for shard in merged.shards.values() for entry in shard.entries.values()}
    expected: dict[str, tuple[str, Step | None]] = {plan.output_name(name): (name, None) for name in before}
    expected |= {plan.output_name(step): (step.weight, step) for step in plan.steps}
    one_dtype = _common(after)

    def judged(name: str) -> Weight:
        own, step = expected[name]
        found = after.get(name)
        if found is None:
            return Weight(name, _fate(step), Outcome.DIFFERENT, "is missing")
        weight = _judge(name, step, before.get(own), found, one_dtype)
        progress(found.entry.nbytes)
        return weight

    with ThreadPoolExecutor(block_copy.default_threads()) as pool:
        weights = list(pool.map(judged, expected))
    weights += [
        Weight(name, Fate.NONE, Outcome.DIFFERENT, "is in neither the base nor the adapters")
        for name in after
        if name not in expected
    ]
    outcomes = {weight.outcome for weight in weights}
    worst = next(one for one in (Outcome.DIFFERENT, Outcome.UNDECIDED, Outcome.SAME) if one in outcomes)
    return Audit(worst, tuple(weights))


@dataclass(frozen=True)
class Stored:
    """A tensor in its file."""

    file: TensorFile
    entry: Entry

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Some of the tensor's bytes."""
        found = np.empty(stop - start, np.uint8)
        with self.file.path.open("rb") as file:
            block_copy.read(self.file.path, file.fileno(), found, self.entry.start + start)
        return found

    def rows(self, rows: slice) -> NDArray[Any]:
        """Some rows, as they are stored; a scalar is one row."""
        each = self.entry.row_bytes
        found = self.bytes(rows.start * each, rows.stop * each).view(self.dtype)
        return found.reshape(rows.stop - rows.start, *self.shape[1:])


def _fate(step: Step | None) -> Fate:
    return Fate.KEPT if step is None else Fate.REPLACED if step.is_replacement else Fate.CHANGED


def _common(after: Mapping[str, Stored]) -> np.dtype[Any] | None:
    """The dtype that every float tensor has; None where they have several."""
    kinds = {there.dtype for there in after.values() if str(there.dtype) in FLOATS}
    return kinds.pop() if len(kinds) == 1 else None


def _judge(
    name: str, step: Step | None, before: Stored | None, found: Stored, one_dtype: np.dtype[Any] | None
) -> Weight:
    fate = _fate(step)
    shape = before.shape if before is not None else step.spec.shape if step is not None else ()
    if found.shape != shape:
        return Weight(name, fate, Outcome.DIFFERENT, f"is {list(found.shape)}, and should be {list(shape)}")
    own = before.dtype if before is not None else None
    if (
        own is not None
        and found.dtype != own
        and (str(own) not in FLOATS or one_dtype is None or found.dtype != one_dtype)
    ):
        return Weight(name, fate, Outcome.DIFFERENT, f"is {found.dtype}, the base's is {own}")
    if fate is Fate.CHANGED:
        assert step is not None and before is not None
        return _changed(name, step, before, found)
    return _unsummed(name, step, before, found)


# --- what is only rounded ------------------------------------------------------------------------


def _unsummed(name: str, step: Step | None, before: Stored | None, found: Stored) -> Weight:
    """A tensor that is the base's, or the adapter's."""
    off = elements = 0
    differs = step is None  # whether the adapter's tensor is another than the base's, and could be told from it
    for rows in _pieces(found):
        with np.errstate(over="ignore"):
            old = before.rows(rows).astype(found.dtype, copy=False) if before is not None else None
            expected = old if step is None else _brought(step, rows, old, found.dtype)
        assert expected is not None
        differs = differs or old is None or not _equal(old, expected).all()
        same = _equal(found.rows(rows), expected)
        off += same.size - int(np.count_nonzero(same))
        elements += same.size
    if not off:
        return Weight(
            name, _fate(step), Outcome.SAME, elements=elements, controls={} if step is None else {"base": differs}
        )
    where = f"{off:,} of {elements:,} entries are not the {'base' if step is None else 'adapter'}'s"
    return Weight(name, _fate(step), Outcome.DIFFERENT, where, elements, off)


def _brought(step: Step, rows: slice, old: NDArray[Any] | None, dtype: np.dtype[Any]) -> NDArray[Any]:
    """These rows of what an adapter brings."""
    whole = old if step.replace is None else np.atleast_1d(step.replace)[rows]
    assert whole is not None
    table = whole.astype(dtype)
    if step.token_rows is not None:
        for place, values in zip(step.token_rows.indices.tolist(), step.token_rows.values, strict=True):
            if rows.start <= place < rows.stop:
                table[place - rows.start] = values.astype(dtype)
    return table


def _equal(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Entry by entry, to the last bit; NaN is itself."""
    kind = f"u{one.dtype.itemsize}" if one.dtype.itemsize in (1, 2, 4, 8) else one.dtype
    return np.asarray(np.ascontiguousarray(one).view(kind) == np.ascontiguousarray(other).view(kind))


# --- what is summed ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sum:
    """W and what is added to it, in fp64: the truth, or something that is wrong on purpose."""

    step: Step
    shares: tuple[float, ...]  # of each term
    turned: int = -1  # the term whose BA is transposed
    magnitude: bool = True
    lengths: tuple[Wide, Wide] | None = None  # of DoRA's outputs and their doubts, where each runs through all rows

    def rows(self, rows: slice, weight: Wide) -> tuple[Wide, Wide]:
        """These rows as they are stored, and what fp32 may cost there."""
        step, total = self.step, weight.copy()
        doubt = np.zeros_like(weight)
        for number, (term, share) in enumerate(zip(step.terms, self.shares, strict=step.shift is None)):
            if share:
                scale = term.scale * share
                total += scale * _product(
                    term.pair, rows, turned=step.spec.layout.is_transposed != (number == self.turned)
                )
                doubt += (
                    (term.pair.rank + 4 + len(step.terms))
                    * abs(scale)
                    * _norms(term.pair, rows, turned=step.spec.layout.is_transposed)
                )
        if step.shift is not None:
            shift = self.shares[0] * step.shift[rows].astype(np.float64)
            total += shift
            doubt += np.abs(shift)
        doubt = UNIT * (doubt + 4 * np.abs(total))
        if step.magnitude is None or not self.magnitude:
            return total, doubt
        lengths, slack = self.lengths or tuple(np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (total, doubt))
        outputs = step.magnitude if step.spec.layout.is_transposed else step.magnitude[rows]
        factor, slack = outputs.astype(np.float64) / lengths, slack / lengths
        if not step.spec.layout.is_transposed:
            factor, slack = (each.reshape(-1, *[1] * (total.ndim - 1)) for each in (factor, slack))
        total *= factor
        return total, np.abs(factor) * doubt + np.abs(total) * (slack + 4 * UNIT)


def _product(pair: LoraPair, rows: slice, *, turned: bool) -> Wide:
    """BA of these rows of the weight as it is stored; `turned` where that is (in, out)."""
    left, right = _sides(pair, rows, turned=turned)
    made: Wide = left @ right
    return made if turned else made.reshape(-1, *pair.a.shape[1:])


def _norms(pair: LoraPair, rows: slice, *, turned: bool) -> Wide:
    """‖b‖ ‖a‖ for each entry: no sum of |b| |a| is larger."""
    left, right = _sides(pair, rows, turned=turned)
    made: Wide = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=0))
    return made if turned else made.reshape(-1, *pair.a.shape[1:])


def _sides(pair: LoraPair, rows: slice, *, turned: bool) -> tuple[Wide, Wide]:
    """What stored rows are the product of: (rows, rank), (rank, columns)."""
    a, b = pair.a.reshape(pair.rank, -1), pair.b.reshape(-1, pair.rank)
    left, right = (a.T[rows], b.T) if turned else (b[rows], a)
    return left.astype(np.float64), right.astype(np.float64)


def _half_step(values: Wide, dtype: np.dtype[Any]) -> Wide:
    """Half the distance between the numbers of a dtype, where these lie."""
    kind = ml_dtypes.finfo(dtype)
    _, exponents = np.frexp(np.maximum(values, float(kind.smallest_normal)))
    halves: Wide = np.ldexp(0.5, exponents - 1 - kind.nmant)
    return halves


def _changed(name: str, step: Step, before: Stored, found: Stored) -> Weight:
    """A weight to which something is added."""
    pieces = list(_pieces(found))

    def weight(rows: slice) -> Wide:
        stored = before.rows(rows) if step.replace is None else step.replace[rows]
        return np.asarray(stored, np.float64)

    def measured(one: _Sum) -> _Sum:
        """With the lengths of DoRA's outputs, where a pass over all the rows must tell them."""
        if step.magnitude is None or not one.magnitude or not step.spec.layout.is_transposed:
            return one
        plain = _Sum(step, one.shares, one.turned, magnitude=False)
        squares = np.zeros((2, len(step.magnitude)))
        for rows in pieces:
            squares += [np.square(there).sum(axis=0) for there in plain.rows(rows, weight(rows))]
        lengths, slack = np.sqrt(squares)
        return _Sum(step, one.shares, one.turned, lengths=(lengths, slack))

    truth = measured(_Sum(step, (1.0,) * max(len(step.terms), 1)))
    wrong = {what: measured(one) for what, one in _wrong(step, truth)}
    told, real = dict.fromkeys(wrong, False), dict.fromkeys(wrong, False)
    off = elements = 0
    error, worst = -1.0, None
    sums = np.zeros(4)  # ‖W‖², ‖V − W‖², <M − W, V − W>, ‖M − V‖²
    for rows in pieces:
        held, base = found.rows(rows).astype(np.float64), weight(rows)
        value, doubt = truth.rows(rows, base)
        distance, allowed = np.abs(held - value), _allowed(value, doubt, found.dtype)
        off += distance.size - int(np.count_nonzero(distance <= allowed))  # NaN is off
        elements += distance.size
        shares = np.nan_to_num(distance / allowed, nan=np.inf)
        if shares.max(initial=-1.0) > error:
            error, index = float(shares.max()), np.unravel_index(int(shares.argmax()), shares.shape)
            place = (rows.start + int(index[0]), *map(int, index[1:]))
            worst = WorstElement(place, float(held[index]), float(value[index]))
        change = value - base
        with np.errstate(over="ignore", invalid="ignore"):  # what is off may be anything
            sums += [np.vdot(x, y) for x, y in ((base, base), (change, change), (held - base, change))] + [
                np.square(distance).sum()
            ]
        for what, one in wrong.items():
            if not told[what]:
                other, doubt = one.rows(rows, base)
                real[what] = real[what] or not np.array_equal(other, value)
                told[what] = not (np.abs(held - other) <= _allowed(other, doubt, found.dtype)).all()
    controls = {what: there for what, there in told.items() if real[what]}
    own = _figures(name, sums, max(error, 0.0), worst, elements, off, controls)
    if off:
        why = f"{off:,} of {elements:,} entries are not W + s·BA, by up to {error:.3g} times what is allowed"
        guess = _explained(step, truth, weight, found, pieces, told, off, elements)
        why += f": {guess}" if guess else ""
        return replace(own, outcome=Outcome.DIFFERENT, why=why)
    missed = [what for what, there in controls.items() if not there]
    if missed:
        why = f"it cannot be told from the sum with {' and '.join(missed)}: rounding to {found.dtype} hides it"
        return replace(own, outcome=Outcome.UNDECIDED, why=why)
    return own


def _figures(
    name: str,
    sums: Wide,
    error: float,
    worst: WorstElement | None,
    elements: int,
    off: int,
    controls: Mapping[str, bool],
) -> Weight:
    """A changed weight with what was measured of it, as if it were the same."""
    before, change, kept, noise = map(float, sums)
    return Weight(
        name,
        Fate.CHANGED,
        Outcome.SAME,
        elements=elements,
        off=off,
        error=error,
        controls=controls,
        relative_change=math.sqrt(change / before) if before else None,
        retention=kept / change if change else None,
        noise=math.sqrt(noise / change) if change else None,
        worst=worst,
    )


def _allowed(value: Wide, doubt: Wide, dtype: np.dtype[Any]) -> Wide:
    """How far a stored number may lie from the true one."""
    return _half_step(np.abs(value) + doubt, dtype) + doubt


def _wrong(step: Step, truth: _Sum) -> Iterator[tuple[str, _Sum]]:
    """What the weight must be told from, by name."""
    for number, share in enumerate(truth.shares):
        who = step.terms[number].adapter if step.terms else "the bias's change"
        others = truth.shares[:number], truth.shares[number + 1 :]
        yield f"{who} left out", _Sum(step, (*others[0], 0.0, *others[1]), magnitude=False)
        yield f"{who} x {NUDGE}", _Sum(step, (*others[0], NUDGE * share, *others[1]))
        if step.terms and step.terms[number].pair.a.ndim == 2 and len(set(step.terms[number].pair.shape)) == 1:
            yield f"{who} transposed", _Sum(step, truth.shares, turned=number)


def _explained(
    step: Step,
    truth: _Sum,
    weight: Callable[[slice], Wide],
    found: Stored,
    pieces: Sequence[slice],
    told: Mapping[str, bool],
    off: int,
    elements: int,
) -> str:
    """What may have happened; empty where nothing that is known explains it."""
    for what, was_told in told.items():
        if not was_told:  # the candidate is this wrong sum, to the last bit
            return "it is the sum with " + what
    if off <= elements / 100:
        return "a few entries are damaged"
    shares = len(truth.shares)
    gram, along, left = np.zeros((shares, shares)), np.zeros(shares), 0.0
    is_near = True
    for rows in pieces:
        base, held = weight(rows), found.rows(rows).astype(np.float64)
        if not np.isfinite(held).all():
            return "some are not finite"
        value, doubt = truth.rows(rows, base)
        of_change = 2 * _half_step(np.abs(value - base), found.dtype)
        is_near = is_near and bool((np.abs(held - value) <= _allowed(value, doubt, found.dtype) + of_change).all())
        alone = [
            _Sum(step, _only(number, shares), magnitude=False).rows(rows, base)[0] - base for number in range(shares)
        ]
        flat = np.stack([there.ravel() for there in alone])
        gap = (held - base).ravel()
        gram += flat @ flat.T
        along += flat @ gap
        left += float(gap @ gap)
    if is_near:
        return "the change seems to have been rounded before it was added"
    if step.magnitude is not None or not left:
        return ""
    factors = np.linalg.lstsq(gram, along, rcond=None)[0]
    rest = left - 2 * factors @ along + factors @ gram @ factors
    if rest > CLOSE**2 * left:
        return ""
    who = [term.adapter for term in step.terms] or ["the bias's change"]
    wrong_scales = [f"{name} x {there:.3g}" for name, there in zip(who, factors, strict=True) if abs(there - 1) > 1e-3]
    return f"its scale is off: {', '.join(wrong_scales)}" if wrong_scales else ""


def _only(number: int, shares: int) -> tuple[float, ...]:
    return tuple(float(at == number) for at in range(shares))


def _pieces(there: Stored) -> Iterator[slice]:
    """The rows in pieces."""
    each = max(8 * math.prod(there.shape[1:]), 1)
    count = max(1, PIECE // each)
    for first in range(0, there.entry.rows, count):
        yield slice(first, min(first + count, there.entry.rows))
