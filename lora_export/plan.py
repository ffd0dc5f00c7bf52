"""Which pair lands on which weight; every misfit at once.

A plan is a value: it is made from adapters and the *names and shapes* of a base, and never knows
what holds the weights. Checkpoint, module and graph each offer `TensorSpec`s and carry it out.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, MatchError, Misfit
from lora_export.lora import EVERY_ROW, Adapter, LoraPair

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


class Layout(StrEnum):
    """How a stored weight lies. Stated by the holder, never guessed from a shape."""

    OUT_IN = "out_in"  # nn.Linear, and a convolution's (out, in, kernel)
    IN_OUT = "in_out"  # transformers' Conv1D, and a MatMul's second operand in a graph
    UNKNOWN = "unknown"  # a matrix that the holder cannot place: only the model's class would tell
    OTHER = "other"  # biases, norms, buffers: nothing low-rank lands here


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
        return self.shape[::-1] if self.layout is Layout.IN_OUT else self.shape


@dataclass(frozen=True, eq=False)
class Term:
    """One pair on one weight, at the strength the user gave its adapter."""

    adapter: str
    module: str  # the adapter's own spelling
    pair: LoraPair
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Step:
    """All that happens to one weight: `terms` and `shift` are added to it, `replace` takes its place."""

    spec: TensorSpec
    terms: tuple[Term, ...] = ()
    shift: NDArray[np.float32] | None = None  # a bias's addition
    replace: NDArray[Any] | None = None
    added: bool = False  # the base has no such tensor; `spec` describes the new one

    @property
    def weight(self) -> str:
        return self.spec.name

    def delta(self) -> NDArray[np.float32]:
        """What is added to the weight, in the (out, in, ...) view, in fp32."""
        return self.shift if self.shift is not None else _sum(self.terms, EVERY_ROW)

    def stored_delta(self, rows: slice) -> NDArray[np.float32]:
        """What is added to these rows of the weight as it is stored, in fp32."""
        if self.shift is not None:
            return self.shift[rows]
        if self.spec.layout is not Layout.IN_OUT:
            return _sum(self.terms, rows)
        return _sum([replace(term, pair=term.pair.transposed) for term in self.terms], rows)


def _sum(terms: Sequence[Term], rows: slice) -> NDArray[np.float32]:
    # The adapters are summed with each other before the base comes in, so that it is rounded once.
    first, *others = terms
    total = first.pair.delta(rows, strength=first.strength)
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
            (sum(step.replace is not None and not step.added for step in self.steps), "tensors replaced"),
            (sum(step.added for step in self.steps), "tensors added"),
            (len(self.kept), "kept as they are"),
        ]
        lines = [", ".join(f"{count} {what}" for count, what in counts if count)]
        lines += [f"note: {note}" for note in self.notes]
        for step in self.steps:
            shape = " x ".join(map(str, step.spec.shape))
            if step.terms:
                done = " + ".join(
                    f"{term.strength * term.pair.scale:g} * B A (rank {term.pair.rank}, {term.adapter})"
                    for term in step.terms
                )
            elif step.shift is not None:
                done = "bias shifted"
            else:
                done = "added" if step.added else "replaced"
            lines.append(f"  {self.output_name(step)}  [{shape} {step.spec.dtype}]  {done}")
        return "\n".join(lines)


def make(
    adapters: Sequence[Adapter],
    specs: Iterable[TensorSpec],
    *,
    strengths: Sequence[float] | None = None,
    may_add: bool = False,
    identity_ok: bool = False,
) -> Plan:
    """Lay adapters against a base's names and shapes.

    `strengths` multiply each adapter's scales, in order (default 1.0). With `may_add`, a whole
    tensor that the base lacks (a new head) is added; a module or graph cannot take one.
    Every adapter tensor is used exactly once, or MatchError lists all misfits.
    Raises InputRefused for an adapter that would change nothing, unless `identity_ok`
    (training starts from one), and for the same adapter given twice.
    """
    if not adapters:
        raise InputRefused("there is no adapter to apply")
    strengths = tuple(strengths) if strengths else (1.0,) * len(adapters)
    if len(strengths) != len(adapters):
        raise InputRefused(f"{len(adapters)} adapters but {len(strengths)} weights; give one --weight per adapter")
    _refuse_twins(adapters)
    if not identity_ok:
        for adapter, strength in zip(adapters, strengths, strict=True):
            if adapter.is_identity or strength == 0:
                why = "its weight is 0" if strength == 0 else "every B (or A, or scale) is zero, as in a fresh adapter"
                raise InputRefused(f"the adapter {adapter.name} has no effect: {why}. Nothing was written.")

    base = {spec.name: spec for spec in specs}
    misfits: list[Misfit] = []
    notes: list[str] = []
    terms: dict[str, list[Term]] = {}
    shifts: dict[str, NDArray[np.float32]] = {}
    replaced: dict[str, tuple[str, NDArray[Any]]] = {}
    name_prefix = ""

    for adapter, strength in zip(adapters, strengths, strict=True):
        prefix = _find_prefix(adapter, base)
        if prefix:
            notes.append(f"{adapter.name}: {prefix}; resolved.")
        for module, pair in adapter.pairs.items():
            weight = _weight_of(prefix.to_base(module), base)
            problem = _pair_problem(prefix.to_base(module) or module, weight, pair, base)
            if weight is None or problem:
                misfits.append(Misfit(adapter.name, adapter.spelled(module), problem))
                continue
            terms.setdefault(weight, []).append(Term(adapter.name, module, pair, strength))
        misfits += _lost_targets(adapter, prefix, base)
        for module, change in adapter.biases.items():
            bias = f"{prefix.to_base(module) or module}.bias"
            if bias not in base or base[bias].shape != change.shape:
                problem = f"has shape {base[bias].shape}, the adapter adds {change.shape}" if bias in base else "absent"
                misfits.append(Misfit(adapter.name, adapter.spelled(f"{module}.bias"), f"the base's {bias}: {problem}"))
                continue
            shifts[bias] = shifts.get(bias, np.zeros_like(change)) + np.float32(strength) * change
        for tensor, value in adapter.replaced.items():
            target = prefix.to_base(tensor)
            target = target if target in base else tensor
            problem = _replacement_problem(target, value, base, may_add=may_add)
            if target in replaced:
                problem = f"{replaced[target][0]} replaces {target} too; two whole tensors cannot share one place"
            if problem:
                misfits.append(Misfit(adapter.name, adapter.spelled(tensor), problem))
                continue
            if target not in base and prefix.adapter:
                name_prefix = prefix.adapter
            replaced[target] = (adapter.name, value)
    for weight in replaced.keys() & (terms.keys() | shifts.keys()):
        owner = replaced[weight][0]
        misfits.append(Misfit(owner, weight, "is replaced as a whole and changed by a pair; only one of them can hold"))
    if misfits:
        targets = sum(len(a.pairs) + len(a.biases) + len(a.replaced) for a in adapters)
        raise MatchError(misfits, targets=targets)

    steps = [Step(base[name], terms=tuple(there)) for name, there in terms.items()]
    steps += [Step(base[name], shift=change) for name, change in shifts.items()]
    for name, (_, value) in replaced.items():
        if name in base:
            steps.append(Step(base[name], replace=value))
        else:
            spec = TensorSpec(name, value.shape, str(value.dtype), nbytes=value.nbytes)
            steps.append(Step(spec, replace=value, added=True))
            notes.append(f"the base has no {name}: it is added.")
    if name_prefix:
        notes.append(f"the base's tensors gain the prefix `{name_prefix}`, so that the added head finds its model.")
    order = {name: position for position, name in enumerate(base)}
    steps.sort(key=lambda step: order.get(step.weight, len(order)))
    touched = {step.weight for step in steps}
    return Plan(
        adapters=tuple(adapters),
        strengths=strengths,
        steps=tuple(steps),
        kept=tuple(name for name in base if name not in touched),
        notes=tuple(notes),
        name_prefix=name_prefix,
    )


def _refuse_twins(adapters: Sequence[Adapter]) -> None:
    hashes = Counter(adapter.sha256 for adapter in adapters if adapter.sha256)
    for adapter in adapters:
        if hashes[adapter.sha256] > 1:
            raise InputRefused(f"the adapter {adapter.name} is given twice (sha256 {adapter.sha256[:12]})")
    names = Counter(adapter.name for adapter in adapters)
    for name, count in names.items():
        if count > 1:
            raise InputRefused(f"{count} adapters are called {name}; give them different names")


def _weight_of(module: str | None, base: Mapping[str, TensorSpec]) -> str | None:
    """The base's name for the weight of a module: its `.weight`, packed attention's projection, or itself."""
    if module is None:
        return None
    return next((name for name in (f"{module}.weight", f"{module}.in_proj_weight", module) if name in base), None)


def _find_prefix(adapter: Adapter, base: Mapping[str, TensorSpec]) -> Prefix:
    """How the adapter's names differ from the base's: not at all, or by one leading model prefix.

    A prefix is believed only when it makes *every* pair land; two that do are an error.
    """
    modules = list(adapter.pairs) or [name.rpartition(".")[0] for name in adapter.replaced]
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
    fitting = [candidate for candidate in candidates if landed(candidate) == len(modules)]
    if len(fitting) > 1:
        raise InputRefused(
            f"the adapter {adapter.name} fits the base in {len(fitting)} ways, by prefix: "
            + ", ".join(f"`{fit.adapter or fit.base}`" for fit in fitting)
        )
    if fitting:
        return fitting[0]
    best = max(candidates, key=landed, default=Prefix())  # for the sake of the message: fewer, truer misfits
    return best if landed(best) > landed(Prefix()) else Prefix()


def _lost_targets(adapter: Adapter, prefix: Prefix, base: Mapping[str, TensorSpec]) -> list[Misfit]:
    """Layers of the base that the adapter's config targets, and for which its file holds nothing.

    A target that other layers of the base were adapted for counts only where the names differ in
    numbers alone: a vision tower's `q_proj` is no sibling of a decoder's, the decoder's next layer is.
    """
    adapted = {prefix.to_base(module) or module for module in adapter.pairs}
    siblings = {_without_numbers(module) for module in adapted}
    lost = []
    for spec in base.values():
        module = spec.name.removesuffix(".weight")
        target = next((target for target in adapter.targets if _ends_with(module, target)), None)
        if target is None or module in adapted or spec.layout is Layout.OTHER:
            continue
        if _without_numbers(module) in siblings or not any(_ends_with(other, target) for other in adapted):
            lost.append(
                Misfit(adapter.name, module, "targeted by the adapter's config, but its file has no tensors for it")
            )
    return lost


def _ends_with(module: str, target: str) -> bool:
    return f".{module}".endswith(f".{target}")


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _nearest(name: str, base: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(base), n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else ""


def _pair_problem(module: str, weight: str | None, pair: LoraPair, base: Mapping[str, TensorSpec]) -> str:
    if weight is None:
        return f"the base has no weight for {module}{_nearest(f'{module}.weight', base)}"
    spec = base[weight]
    if not spec.is_float:
        return (
            f"{weight} is {spec.dtype}: a quantised weight is never merged silently. Use the original float base, "
            "or dequantise it first"
        )
    if spec.layout is Layout.OTHER:
        return f"{weight} {spec.shape} is not the weight of a linear layer"
    if spec.layout is Layout.UNKNOWN:
        return f"{weight} may be stored (out, in) or (in, out): give the model's folder, whose config.json tells"
    if spec.matrix != pair.shape:
        return f"{weight} is {spec.matrix} (out, in), the adapter wants {pair.shape}"
    return ""


def _replacement_problem(name: str, value: NDArray[Any], base: Mapping[str, TensorSpec], *, may_add: bool) -> str:
    if name not in base:
        return "" if may_add else f"there is no {name} to replace{_nearest(name, base)}"
    if base[name].shape != value.shape:
        return f"{name} is {base[name].shape}, the adapter replaces it with {value.shape}"
    return ""
