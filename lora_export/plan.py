"""Which pair lands on which weight; every misfit at once.

A plan is a value: it is made from adapters and the *names and shapes* of a base, and never knows
what holds the weights. Checkpoint, module and graph each offer `TensorSpec`s and carry it out.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, MatchError, Misfit, one_line
from lora_export.lora import EVERY_ROW, Adapter, LoraPair, Rows, energies, rescale, sums_in

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
NUMBER = re.compile(r"\d+")
DOT = re.compile(r"\.")
MOST_PREFIXES = 100
LONGEST_COMPARED = 120  # characters of a name for which a nearest one is looked for
MOST_COMPARISONS = 5_000  # of names, in search of the nearest ones: some seconds
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
ROWS_AT_ONCE = 4096


class Layout(StrEnum):
    """How a stored weight lies. Stated by the holder, never guessed from a shape."""

    OUT_IN = "out_in"  # nn.Linear, and a convolution's (out, in, kernel)
    IN_OUT = "in_out"  # transformers' Conv1D, and a MatMul's second operand in a graph
    EMBEDDING = "embedding"  # nn.Embedding: a row for each word, which a linear layer of one-hot inputs calls (in, out)
    MATRIX = "matrix"  # OUT_IN or EMBEDDING: names and shapes do not tell, the adapter that was trained on it does
    UNKNOWN = "unknown"  # a matrix that the holder cannot place: only the model's class would tell
    OTHER = "other"  # biases, norms, buffers: nothing low-rank lands here

    @property
    def is_turned(self) -> bool:
        """Whether the weight is stored as the transpose of its (out, in) view."""
        return self in (Layout.IN_OUT, Layout.EMBEDDING)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a base, from headers alone."""

    name: str
    shape: tuple[int, ...]  # as stored
    dtype: str  # NumPy's name, "bfloat16" included
    layout: Layout = Layout.OTHER
    file: str = ""  # within the checkpoint; empty where there are no files
    nbytes: int = 0

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape in the (out, in, ...) view that pairs use."""
        return self.shape[::-1] if self.layout.is_turned else self.shape


@dataclass(frozen=True, eq=False)
class Term:
    """One pair on one weight, at the strength the user gave its adapter."""

    adapter: str
    module: str  # the adapter's own spelling
    pair: LoraPair
    strength: float = 1.0

    @property
    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A (in, rank) and strength * scale * B (rank, out), as matrix products take them, in fp32.

        A convolution's are (rank, in, kernel) and (out, rank, 1...). An overflow is infinite: look for it.
        """
        a, ones = self.pair.a, [1] * (self.pair.a.ndim - 2)
        with np.errstate(over="ignore"):
            b = self.pair.b.reshape(*self.pair.b.shape[:2], *ones) * np.float32(self.strength * self.pair.scale)
        return (a, b) if ones else (a.T, b.T)

    def __str__(self) -> str:
        what = f"{self.strength * self.pair.scale:g} * B A (rank {self.pair.rank}, {self.adapter})"
        what += ", an embedding's" if self.pair.embedding else ""
        return what if self.pair.magnitude is None else f"{what}, each output to DoRA's length"


@dataclass(frozen=True, eq=False)
class Step:
    """All that happens to one weight: `replace` takes its place, `rows` that of its rows, `terms` or `shift` are added.

    A term with DoRA's magnitude is the only one, and rescales the sum; where adapters are planned apart, the only
    one of its adapter.
    """

    spec: TensorSpec
    terms: tuple[Term, ...] = ()
    shift: NDArray[np.float32] | None = None  # a bias's addition
    replace: NDArray[Any] | None = None
    rows: Rows | None = None  # never with terms
    added: bool = False  # the base has no such tensor; `spec` describes the new one

    @property
    def weight(self) -> str:
        return self.spec.name

    @property
    def magnitude(self) -> NDArray[np.float32] | None:
        """The length that DoRA gives each output of W + ΔW (out,); None where W + ΔW is all."""
        return self.terms[0].pair.magnitude if self.terms else None

    @property
    def has_dora(self) -> bool:
        """Whether one of the adapters rescales the sum."""
        return any(term.pair.magnitude is not None for term in self.terms)

    def of(self, adapter: str) -> Step | None:
        """What one adapter alone adds to the weight; None where that is nothing."""
        terms = tuple(term for term in self.terms if term.adapter == adapter)
        return replace(self, terms=terms) if terms else None

    @property
    def is_whole(self) -> bool:
        """Whether other values take the weight's place, and nothing is added to it."""
        return not self.terms and (self.replace is not None or self.rows is not None)

    @property
    def brings_rows(self) -> bool:
        """Whether the base keeps all but some rows."""
        return self.rows is not None and self.replace is None

    def carried_out(self, weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """What a weight in the (out, in, ...) view becomes before it is rounded, and the difference that this makes."""
        total = weight.astype(sums_in(weight.dtype))
        change: NDArray[Any] = self.delta()
        total += change
        if self.magnitude is not None:
            self.rescale(total, energies(total))
            change = total - weight
        return total, change

    def rescale(self, total: NDArray[Any], squares: NDArray[np.float64], outputs: slice = EVERY_ROW) -> None:
        """Rescale these outputs of W + ΔW, in the (out, in, ...) view, as DoRA does, in place. See `lora.rescale`."""
        assert self.magnitude is not None
        try:
            rescale(total, self.magnitude[outputs], squares)
        except InputRefused as refusal:
            raise InputRefused(f"{self.weight}: {refusal}. Nothing was written.") from refusal

    def delta(self) -> NDArray[np.float32]:
        """What is added to the weight, in the (out, in, ...) view, in fp32; before DoRA rescales the sum."""
        return self.shift if self.shift is not None else _sum(self.terms, EVERY_ROW)

    def stored_delta(self, rows: slice, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """What is added to these rows of the weight as it is stored, in fp32, into `out` where that is given."""
        return self.shift[rows] if self.shift is not None else _sum(self.stored_terms, rows, out)

    def row_energies(self) -> NDArray[np.float32]:
        """‖ΔW‖² of each row of the weight as it is stored, without making ΔW: ‖bA‖² = b AAᵀ bᵀ."""
        if self.shift is not None:
            return np.square(self.shift)
        scaled = [(term.pair, np.float32(term.strength * term.pair.scale)) for term in self.stored_terms]
        a = np.concatenate([pair.a.reshape(pair.rank, -1) for pair, _ in scaled])  # (ranks, in * kernel)
        gram, rows = a @ a.T, scaled[0][0].b.shape[0]
        energies = np.empty(rows, np.float32)
        for first in range(0, rows, ROWS_AT_ONCE):  # all at once, three arrays as large as B would stand beside it
            part = slice(first, first + ROWS_AT_ONCE)
            b = np.concatenate([pair.b[part].reshape(-1, pair.rank) * scale for pair, scale in scaled], axis=1)
            np.einsum("or,or->o", b @ gram, b, out=energies[part])
        return energies

    @property
    def stored_terms(self) -> Sequence[Term]:
        """The terms, with pairs of the weight as it is stored."""
        if not self.spec.layout.is_turned:
            return self.terms
        return [replace(term, pair=term.pair.transposed) for term in self.terms]


def _sum(terms: Sequence[Term], rows: slice, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    # The adapters are summed with each other before the base comes in, so that it is rounded once.
    first, *others = terms
    total = first.pair.delta(rows, strength=first.strength, out=out)
    for term in others:
        total += term.pair.delta(rows, strength=term.strength)
    return total


@dataclass(frozen=True)
class Prefix:
    """The model prefix that the adapter's names carry and the base's lack, or the other way round."""

    adapter: str = ""
    base: str = ""

    def __bool__(self) -> bool:
        return bool(self.adapter or self.base)

    def to_base(self, name: str) -> str | None:
        """An adapter's name as the base would spell it; None where it lies outside the prefix."""
        return self.base + name.removeprefix(self.adapter) if name.startswith(self.adapter) else None

    def __str__(self) -> str:
        if self.adapter:
            return f"the adapter's names carry the prefix `{self.adapter}` that the base's lack"
        return f"the base's names carry the prefix `{self.base}` that the adapter's lack"


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be done to a base: pure, complete, and printable (`--dry-run`)."""

    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    steps: tuple[Step, ...]
    kept: tuple[str, ...]  # names of the tensors that nothing touches
    notes: tuple[str, ...] = ()  # what was resolved knowingly
    name_prefix: str = ""  # what every base tensor's name gains in the output, so that an added head finds its model
    by_weight: Mapping[str, Step] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_weight", {step.weight: step for step in self.steps})

    @property
    def low_rank(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.terms)

    def output_name(self, step_or_name: Step | str) -> str:
        """The name that a tensor has in the merged checkpoint."""
        if isinstance(step_or_name, Step):
            return step_or_name.weight if step_or_name.added else self.name_prefix + step_or_name.weight
        return self.name_prefix + step_or_name

    def __str__(self) -> str:
        counts = [
            (len(self.low_rank), "weights changed"),
            (sum(step.shift is not None for step in self.steps), "biases changed"),
            (sum(step.is_whole and not step.added and not step.brings_rows for step in self.steps), "tensors replaced"),
            (sum(step.brings_rows for step in self.steps), "tables of which rows are replaced"),
            (sum(step.added for step in self.steps), "tensors added"),
            (len(self.kept), "kept as they are"),
        ]
        lines = [", ".join(f"{count} {what}" for count, what in counts if count)]
        lines += [one_line(f"note: {note}") for note in self.notes]
        for step in self.steps:
            shape = " x ".join(map(str, step.spec.shape))
            if step.terms:
                done = " + ".join(map(str, step.terms))
                done += ", to the whole tensor that the adapter brings" if step.replace is not None else ""
            elif step.shift is not None:
                done = "bias shifted"
            else:
                done = "added" if step.added else "" if step.brings_rows else "replaced"
                if step.rows is not None:
                    done += f"{', then ' if done else ''}{step.rows.indices.size} rows replaced"
            lines.append(one_line(f"  {self.output_name(step)}  [{shape} {step.spec.dtype}]  {done}"))
        return "\n".join(lines)


def make(
    adapters: Sequence[Adapter],
    specs: Iterable[TensorSpec],
    *,
    strengths: Sequence[float] | None = None,
    may_add: bool = False,
    identity_ok: bool = False,
    apart: bool = False,
) -> Plan:
    """Lay adapters against a base's names and shapes.

    `strengths` multiply each adapter's scales, in order (default 1.0). With `may_add`, a whole
    tensor that the base lacks (a new head) is added; a module or graph cannot take one.
    With `apart`, the adapters are never there at once, so that none is in another's way: see `Step.of`.
    Every adapter tensor is used exactly once, or MatchError lists all misfits.
    Raises InputRefused for an adapter that would change nothing, unless `identity_ok`
    (training starts from one), and for the same adapter given twice.
    """
    strengths = _checked(adapters, strengths, identity_ok=identity_ok)
    base = _Base(specs)
    prefixes = [_find_prefix(adapter, base) for adapter in adapters]
    landings: list[_Landing] = []
    misfits: list[Misfit] = []
    for adapter, strength, prefix in zip(adapters, strengths, prefixes, strict=True):
        landed, unfit = _lay(adapter, strength, prefix, base, may_add=may_add)
        landings += landed
        misfits += [*unfit, *_lost_targets(adapter, prefix, base)]
    targets = len(landings) + len(misfits)
    by_weight: dict[str, list[_Landing]] = {}
    for landing in landings:
        by_weight.setdefault(landing.weight, []).append(landing)
    for there in by_weight.values():
        for together in _by_adapter(there) if apart else [there]:
            misfits += _clashes(together)
    if misfits:
        raise MatchError(misfits, targets=targets)

    name_prefix = _name_prefix(landings, base)
    steps = [_step(there, base) for there in by_weight.values()]
    order = {name: position for position, name in enumerate(base)}
    steps.sort(key=lambda step: order.get(step.weight, len(order)))
    notes = [
        f"{adapter.name}: {prefix}; resolved." for adapter, prefix in zip(adapters, prefixes, strict=True) if prefix
    ]
    notes += [f"the base has no {step.weight}: it is added." for step in steps if step.added]
    if name_prefix:
        notes.append(f"the base's tensors gain the prefix `{name_prefix}`, so that the added head finds its model.")
    return Plan(
        adapters=tuple(adapters),
        strengths=strengths,
        steps=tuple(steps),
        kept=tuple(name for name in base if name not in by_weight),
        notes=tuple(notes),
        name_prefix=name_prefix,
    )


def _checked(adapters: Sequence[Adapter], strengths: Sequence[float] | None, *, identity_ok: bool) -> tuple[float, ...]:
    """The strengths, one an adapter, once adapters and strengths are worth laying against a base."""
    if not adapters:
        raise InputRefused("there is no adapter to apply")
    strengths = tuple(strengths) if strengths else (1.0,) * len(adapters)
    if len(strengths) != len(adapters):
        raise InputRefused(f"{len(adapters)} adapters but {len(strengths)} weights; give one --weight per adapter")
    _refuse_twins(adapters)
    for adapter, strength in zip(adapters, strengths, strict=True):
        if not math.isfinite(strength):
            raise InputRefused(f"the weight of {adapter.name} is {strength}; it must be a finite number")
        if not identity_ok and (why := _idle(adapter, strength)):
            raise InputRefused(f"the adapter {adapter.name} has no effect: {why}. Nothing was written.")
    return strengths


def _idle(adapter: Adapter, strength: float) -> str:
    """Why an adapter changes nothing at this strength; empty where it changes something."""
    if strength == 0:
        return "its weight is 0"
    if adapter.is_identity:
        return "every B (or A, or scale) is zero, as in a fresh adapter"
    scales = [abs(strength * pair.scale) for pair in adapter.pairs.values()]
    if not adapter.replaced and not adapter.rows and max(scales, default=0) < SMALLEST:
        return f"its weight {strength:g} makes every scale zero in float32"
    return ""


def _refuse_twins(adapters: Sequence[Adapter]) -> None:
    seen: dict[str, str] = {}
    for adapter in adapters:
        if adapter.sha256 and seen.setdefault(adapter.sha256, adapter.name) != adapter.name:
            raise InputRefused(
                f"{adapter.name} is the same adapter as {seen[adapter.sha256]} (sha256 {adapter.sha256[:12]})"
            )
    names = Counter(adapter.name for adapter in adapters)
    for name, count in names.items():
        if count > 1:
            raise InputRefused(f"{count} adapters are called {name}; give them different names")


@dataclass(frozen=True, eq=False)
class _Landing:
    """One pair, bias or whole tensor of an adapter, and the base's tensor it lands on."""

    weight: str
    adapter: str
    prefix: Prefix
    term: Term | None = None
    shift: NDArray[np.float32] | None = None
    whole: NDArray[Any] | None = None
    rows: Rows | None = None


def _lay(
    adapter: Adapter, strength: float, prefix: Prefix, base: _Base, *, may_add: bool
) -> tuple[list[_Landing], list[Misfit]]:
    """Every tensor of an adapter, as what lands and what does not."""
    landed: list[_Landing] = []
    unfit: list[Misfit] = []

    def judge(name: str, weight: str | None, problem: str, **what: Any) -> None:
        if weight is None or problem:
            unfit.append(Misfit(adapter.name, adapter.spelled(name), problem))
        else:
            landed.append(_Landing(weight, adapter.name, prefix, **what))

    for module, pair in adapter.pairs.items():
        weight = _weight_of(prefix.to_base(module), base)
        problem = _pair_problem(prefix.to_base(module) or module, weight, pair, base)
        judge(module, weight, problem, term=Term(adapter.name, module, pair, strength))
    for module, change in adapter.biases.items():
        bias = f"{prefix.to_base(module) or module}.bias"
        judge(f"{module}.bias", bias, _bias_problem(bias, change, base), shift=np.float32(strength) * change)
    for tensor, value in adapter.replaced.items():
        there = prefix.to_base(tensor) or tensor
        target = there if there in base else tensor
        judge(tensor, target, _replacement_problem(target, value, base, may_add=may_add), whole=value)
    for tensor, rows in adapter.rows.items():
        there = prefix.to_base(tensor) or tensor
        judge(tensor, there, _rows_problem(there, rows, base), rows=rows)
    return landed, unfit


def _by_adapter(there: Sequence[_Landing]) -> Iterator[list[_Landing]]:
    for adapter in dict.fromkeys(landing.adapter for landing in there):
        yield [landing for landing in there if landing.adapter == adapter]


def _clashes(there: Sequence[_Landing]) -> list[Misfit]:
    """What cannot share one place: whole tensors that differ or are changed by others, DoRA, kinds of layers."""
    pairs = [landing for landing in there if landing.term is not None]
    return [*_clashes_of_wholes(there), *_clashes_of_rows(there), *_clashes_of_pairs(pairs)]


def _clashes_of_wholes(there: Sequence[_Landing]) -> Iterator[Misfit]:
    owner, whole = next(((landing, landing.whole) for landing in there if landing.whole is not None), (None, None))
    if owner is None or whole is None:
        return
    name, first = owner.weight, owner.adapter
    for other in there:
        if other.whole is not None:
            if not np.array_equal(other.whole, whole):
                why = f"{first} replaces {name} too; two whole tensors cannot share one place"
                yield Misfit(other.adapter, name, why)
        elif other.adapter != first or other.shift is not None:
            # Its own pair is another matter: PEFT saves a table of embeddings with the pair that changes it.
            why = f"{first} replaces {name} as a whole, {other.adapter} adds to it; only one can hold"
            yield Misfit(first, name, why)


def _clashes_of_rows(there: Sequence[_Landing]) -> Iterator[Misfit]:
    rows = [(landing, landing.rows) for landing in there if landing.rows is not None]
    taken: dict[int, str] = {}
    for landing, own in rows:
        shared = sorted(set(own.indices.tolist()) & taken.keys())
        if shared:
            why = f"{taken[shared[0]]} replaces rows of {landing.weight} too, row {shared[0]} among them"
            yield Misfit(landing.adapter, landing.weight, why)
        taken |= dict.fromkeys(own.indices.tolist(), landing.adapter)
    if rows:
        owner = rows[0][0]
        for other in there:
            if other.term is not None:
                why = f"{owner.adapter} replaces rows of {owner.weight}, {other.adapter} adds to it; only one can hold"
                yield Misfit(owner.adapter, owner.weight, why)


def _clashes_of_pairs(there: Sequence[_Landing]) -> Iterator[Misfit]:
    terms = [landing.term for landing in there if landing.term is not None]
    for term in terms[1:]:
        name, first = there[0].weight, terms[0]
        if first.pair.embedding is not term.pair.embedding:
            what, other = (
                ("an embedding", "a linear layer") if term.pair.embedding else ("a linear layer", "an embedding")
            )
            yield Misfit(term.adapter, name, f"for {term.adapter} {name} is {what}, for {first.adapter} {other}")
        elif any(one.pair.magnitude is not None for one in (first, term)):
            why = (
                f"{first.adapter} and {term.adapter} both change {name}, and DoRA rescales all that it finds there: "
                "what comes out depends on the order. Merge one, and the other into what comes out, if that is meant"
            )
            yield Misfit(term.adapter, name, why)


def _step(there: Sequence[_Landing], base: Mapping[str, TensorSpec]) -> Step:
    """All that lands on one weight, as one step."""
    weight = there[0].weight
    whole = next((landing.whole for landing in there if landing.whole is not None), None)
    terms = tuple(landing.term for landing in there if landing.term is not None)
    if terms:
        return Step(_resolved(base[weight], terms[0].pair), terms, replace=whole)
    rows = [landing.rows for landing in there if landing.rows is not None]
    if rows:
        every = Rows(np.concatenate([one.indices for one in rows]), np.concatenate([one.values for one in rows]))
        return Step(base[weight], replace=whole, rows=every)
    if whole is not None:
        spec = base.get(weight) or TensorSpec(weight, whole.shape, str(whole.dtype), nbytes=whole.nbytes)
        return Step(spec, replace=whole, added=weight not in base)
    shifts = [landing.shift for landing in there if landing.shift is not None]
    return Step(base[weight], shift=np.sum(shifts, axis=0, dtype=np.float32))


def _resolved(spec: TensorSpec, pair: LoraPair) -> TensorSpec:
    """The spec of a weight that only its pair can tell to be an embedding's or a linear layer's."""
    if spec.layout is not Layout.MATRIX:
        return spec
    return replace(spec, layout=Layout.EMBEDDING if pair.embedding else Layout.OUT_IN)


def _name_prefix(landings: Iterable[_Landing], base: Mapping[str, TensorSpec]) -> str:
    """The prefix that the base's names must gain for the tensors that are added."""
    wanted = {landing.prefix.adapter: landing.adapter for landing in landings if landing.weight not in base}
    if len(wanted) > 1:
        raise InputRefused(
            "the adapters bring tensors that the base lacks, and want its names under different prefixes: "
            + ", ".join(f"`{prefix}` ({adapter})" for prefix, adapter in sorted(wanted.items()))
        )
    return next(iter(wanted), "")


def _weight_of(module: str | None, base: Mapping[str, TensorSpec]) -> str | None:
    """The base's name for the weight of a module: its `.weight`, packed attention's projection, or itself."""
    if module is None:
        return None
    return next((name for name in (f"{module}.weight", f"{module}.in_proj_weight", module) if name in base), None)


def _find_prefix(adapter: Adapter, base: Mapping[str, TensorSpec]) -> Prefix:
    """How the adapter's names differ from the base's: not at all, or by one leading model prefix.

    A prefix is believed only when it makes *every* pair land; two that do are an error.
    """
    modules = list(adapter.pairs) or [name.rpartition(".")[0] for name in (*adapter.replaced, *adapter.rows)]
    if not modules:
        return Prefix()

    def landed(prefix: Prefix) -> int:
        return sum(_weight_of(prefix.to_base(module), base) is not None for module in modules)

    if landed(Prefix()) == len(modules):
        return Prefix()
    parts = modules[0].split(".")
    candidates = [Prefix(adapter=".".join(parts[:count]) + ".") for count in range(1, len(parts))]
    for suffix in (f".{modules[0]}.weight", f".{modules[0]}.in_proj_weight"):
        candidates += [Prefix(base=name.removesuffix(suffix) + ".") for name in base if name.endswith(suffix)]
    fitting = [
        candidate
        for candidate in dict.fromkeys(candidates)
        if all(_weight_of(candidate.to_base(module), base) is not None for module in modules)  # most fail at once
    ]
    if len(fitting) > 1:
        raise InputRefused(
            f"the adapter {adapter.name} fits the base in {len(fitting)} ways, by prefix: "
            + ", ".join(f"`{fit.adapter or fit.base}`" for fit in fitting)
        )
    if fitting:
        return fitting[0]
    # For the sake of the message: fewer, truer misfits.
    best = max(candidates[:MOST_PREFIXES], key=landed, default=Prefix())
    return best if landed(best) > landed(Prefix()) else Prefix()


def _lost_targets(adapter: Adapter, prefix: Prefix, base: Mapping[str, TensorSpec]) -> list[Misfit]:
    """Layers of the base that the adapter's config targets, and for which its file holds nothing.

    A target that other layers of the base were adapted for counts only where the names differ in
    numbers alone: a vision tower's `q_proj` is no sibling of a decoder's, the decoder's next layer is.
    """
    adapted = {prefix.to_base(module) or module for module in adapter.pairs}
    whole = {prefix.to_base(tensor) or tensor for tensor in adapter.replaced}
    siblings = {_without_numbers(module) for module in adapted}
    reached = {ending for module in adapted for ending in _endings(module)}
    targets = set(adapter.targets)
    lost = []
    for spec in base.values():
        module = spec.name.removesuffix(".weight")
        target = next((ending for ending in _endings(module) if ending in targets), None)
        if target is None or module in adapted or spec.name in whole or spec.layout is Layout.OTHER:
            continue
        if _without_numbers(module) in siblings or target not in reached:
            lost.append(
                Misfit(adapter.name, module, "targeted by the adapter's config, but its file has no tensors for it")
            )
    return lost


def _endings(module: str) -> Iterator[str]:
    """The whole name, and what of it stands behind each of its dots."""
    yield module
    for dot in DOT.finditer(module):
        yield module[dot.end() :]


def _without_numbers(name: str) -> str:
    return NUMBER.sub("#", name)


class _Base(dict[str, TensorSpec]):
    """The specs of a base by their names, and the name that a misspelled one may have meant."""

    def __init__(self, specs: Iterable[TensorSpec]):
        super().__init__((spec.name, spec) for spec in specs)
        self.comparisons = 0
        self.known: dict[str, str | None] = {}  # a name without its numbers -> the nearest of the base's

    @functools.cached_property
    def alike(self) -> dict[str, dict[tuple[str, ...], str]]:
        """Names without their numbers -> the numbers -> the name. Layers and experts aside, a base has few names."""
        alike: dict[str, dict[tuple[str, ...], str]] = {}
        for name in self:
            there = alike.setdefault(_without_numbers(name.removesuffix(".weight")), {})
            there.setdefault(tuple(NUMBER.findall(name)), name)
        return alike

    def nearest(self, name: str) -> str:
        """`; the nearest is ...`, or nothing."""
        general = _without_numbers(name.removesuffix(".weight"))
        if general not in self.known:
            self.known[general] = self._close_to(general)
        close = self.known[general]
        if close is None:
            return ""
        found = self.alike[close]
        return f"; the nearest is {found.get(tuple(NUMBER.findall(name)), next(iter(found.values())))}"

    def _close_to(self, general: str) -> str | None:
        # Each comparison is slow, and an adapter of nothing but foreign names would ask for thousands of them.
        self.comparisons += len(self.alike)
        if len(general) > LONGEST_COMPARED or self.comparisons > MOST_COMPARISONS:
            return None
        return next(iter(difflib.get_close_matches(general, self.alike, n=1, cutoff=0.5)), None)


def _pair_problem(module: str, weight: str | None, pair: LoraPair, base: _Base) -> str:
    if weight is None:
        return f"the base has no weight for {module}{base.nearest(module)}"
    spec = base[weight]
    if not spec.is_float:
        return (
            f"{weight} is {spec.dtype}: a quantised weight is never merged silently. Use the original float base, "
            "or dequantise it first"
        )
    if spec.layout is Layout.OTHER:
        return f"{weight} {spec.shape} is not the weight of a linear layer, a convolution or an embedding"
    if spec.layout is Layout.UNKNOWN:
        return f"{weight} may be stored (out, in) or (in, out): give the model's folder, whose config.json tells"
    spec = _resolved(spec, pair)
    if pair.embedding is not (spec.layout is Layout.EMBEDDING):
        return (
            f"{weight} is the weight of a linear layer, the adapter was trained on an embedding"
            if pair.embedding
            else f"{weight} is an embedding's, the adapter was trained on a linear layer"
        )
    if spec.matrix != pair.shape:
        view = "(width, rows)" if pair.embedding else "(out, in)"
        return f"{weight} is {spec.matrix} {view}, the adapter wants {pair.shape}"
    return ""


def _bias_problem(bias: str, change: NDArray[np.float32], base: Mapping[str, TensorSpec]) -> str:
    if bias not in base:
        return f"the base has no {bias} to shift"
    if base[bias].shape != change.shape:
        return f"the base's {bias} has shape {base[bias].shape}, the adapter adds {change.shape}"
    return ""


def _rows_problem(name: str, rows: Rows, base: _Base) -> str:
    if name not in base:
        return f"there is no {name} to replace rows of{base.nearest(name)}"
    shape = base[name].shape
    if not base[name].is_float or len(shape) != 2 or shape[1:] != rows.values.shape[1:]:
        return f"{name} is {shape} {base[name].dtype}, the adapter replaces rows of {rows.values.shape[1]} floats"
    if rows.indices.max() >= shape[0]:
        return f"{name} has {shape[0]} rows, the adapter replaces row {rows.indices.max()}"
    return ""


def _replacement_problem(name: str, value: NDArray[Any], base: _Base, *, may_add: bool) -> str:
    if name not in base:
        return "" if may_add else f"there is no {name} to replace{base.nearest(name)}"
    if base[name].shape != value.shape:
        return f"{name} is {base[name].shape}, the adapter replaces it with {value.shape}"
    return ""
