"""A and B that a candidate stores beside its weights, compared with the adapter's before anything is run.

Outputs show little of a pair that inputs hardly reach. Tools fold the scale into B or leave it beside, and turn A and
B; some choose another A and B of the same product. So the product s·BA is compared: each of its columns, which shows
a column of A, and each of its rows, which shows a row of B. Their lengths follow from the factors, without the product.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lora_export.errors import count
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import read_contract
from lora_export.graph.content_match import Spellings
from lora_export.graph.insert.adapter_names import dotted, module_of
from lora_export.graph.site import NameSource
from lora_export.graph.values import initializers
from lora_export.plan import Plan, Step, TensorSpec
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.runtime.several_graphs import graphs_of
from lora_export.verification.parity import Array, Findings, Wide
from lora_export.verification.references.compare_tensors import AGREES, CandidateTensor
from lora_export.verification.references.expected_weight import rounded_to

FP16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
TensorsOf = Callable[[Runner], Iterable[CandidateTensor]]
# A name in a graph or a module: its layer, A or B, which of several adapters. `lora_embedding_A` is PEFT's
NAME = re.compile(r"(?:(.+)\.)?lora_(?:embedding_)?([AB])(?:\.(.+?))??(?:\.MatMul)?(\.weight)?")


class StoredPair(NamedTuple):
    """A (rank, in) and B (out, rank) beside one weight, either perhaps transposed."""

    a: Array
    b: Array


class StoredPairs(NamedTuple):
    """The pairs that a candidate has beside one layer."""

    module: str
    pairs: Sequence[StoredPair]  # of several adapters
    is_ours: bool  # in the form that lora-export writes: A (in, rank), B (rank, out) with the scale in it


def compare_pairs(
    candidate: Runner, tensors_in: TensorsOf, specs: Sequence[TensorSpec], changes: Plan | None, dtype: str
) -> Findings:
    """What is wrong with the pairs that a candidate stores, and notes on how many were compared.

    `specs` are the tensors of the model, or of the graph that the candidate was made from; `tensors_in` reads those of
    the candidate, or of one of its graphs. `dtype` is that in which the candidate computes.

    Nothing of a layer whose pairs are in a form that is not known, and of pairs without names.
    """
    weights = {module_of(spec.name): spec.name for spec in specs if len(spec.shape) > 1}
    own_steps = changes.low_rank if changes is not None else ()
    steps = {module_of(step.weight): step for step in own_steps if not step.needs_weight}  # those have zeros for a pair
    several = changes is not None and len(changes.adapters) > 1
    faults, compared = [], 0
    own, spellings = {spec.name for spec in specs}, Spellings([dotted(module, "weight") for module in weights])
    for part in graphs_of(candidate) or (candidate,):
        for found in _pairs_of(part, tensors_in, own, spellings, several=several):
            step = steps.get(found.module)
            if step is None and not (found.is_ours and found.module in weights):
                continue
            what = _compared(found, step, dtype)
            compared += what is not None
            faults += [f"{step.weight if step else weights[found.module]}: {what}"] if what else []
    notes = (f"A and B beside {count(compared, 'weight')} were compared with the adapter's",) if compared else ()
    return Findings(notes, faults=tuple(faults))


# --- the pairs of a candidate --------------------------------------------------------------------


def _pairs_of(
    part: Runner, tensors_in: TensorsOf, own: set[str], spellings: Spellings, *, several: bool
) -> Iterator[StoredPairs]:
    """The pairs of a candidate, or of one of its graphs. `own` are the names of the model's own tensors."""
    if isinstance(part, OnnxRunner) and CONTRACT_KEY in part.metadata:
        yield from _of_contract(part, spellings)
        return
    ids = part.adapter_ids if isinstance(part, OnnxRunner) else None
    names = part.adapters_by_row if isinstance(part, OnnxRunner) else None
    if names is not None and len(set(ids or ())) != 1:
        return
    tensors = [tensor for tensor in tensors_in(part) if tensor.name not in own]
    by_module = list(_by_module(tensors, spellings, several=several))
    scaled = set(_not_multiplied(part)) if by_module and isinstance(part, OnnxRunner) else set()
    for module, by_label, is_named_alike in by_module:
        whole = [StoredPair(a.load(), _as_run(part, label, b.load())) for label, (a, b) in by_label.items()]
        if names is None:
            is_ours = is_named_alike and scaled.issuperset(b.name for _, b in by_label.values())
            yield StoredPairs(module, whole, is_ours)
        elif ids and (chosen := _row(whole[0], ids[0], len(names) + 1)):
            yield StoredPairs(module, [chosen], is_ours=True)


def _as_run(part: Runner, adapter: str, b: Array) -> Array:
    """B times the strength with which a run multiplies it."""
    strength = part.strength_of(adapter) if isinstance(part, OnnxRunner) else 1.0
    return b if strength == 1 else b * b.dtype.type(strength)


def _not_multiplied(graph: OnnxRunner) -> Iterator[str]:
    """The B of a graph whose products nothing multiplies: they contain the scale."""
    for value in initializers(graph.file().model) if isinstance(graph.source, Path) else ():
        readers = (reader for node, _ in value.uses() for output in node.outputs for reader, _ in output.uses())
        if "lora_B" in str(value.name) and not any(reader.op_type == "Mul" for reader in readers):
            yield str(value.name)


def _of_contract(graph: OnnxRunner, spellings: Spellings) -> Iterator[StoredPairs]:
    """Those of the adapter's file that is loaded."""
    if graph.adapter_file is None:
        return
    contract = read_contract(graph.metadata, graph.path)
    values = onnx_adapter.arrays_of(graph.adapter_file)
    for place in contract.places:
        module = module_of(spellings.of(dotted(module_of(place.weight), "weight")))
        if place.a in values and place.b in values:
            pair = StoredPair(values[place.a], _as_run(graph, "", values[place.b]))
            yield StoredPairs(module, [pair], is_ours=True)


def _by_module(
    tensors: Iterable[CandidateTensor], spellings: Spellings, *, several: bool
) -> Iterator[tuple[str, Mapping[str, tuple[CandidateTensor, CandidateTensor]], bool]]:
    """Module -> its A and B by their adapter, and whether they are named as lora-export names them."""
    found: dict[str, dict[tuple[str, str], CandidateTensor]] = {}
    named_alike: dict[str, bool] = {}
    for tensor in tensors:
        parsed = NAME.fullmatch(tensor.name)
        module = module_of(spellings.of(dotted(parsed[1] or "", "weight"))) if parsed else ""
        if parsed and dotted(module, "weight") in spellings.names and bool(module) is bool(parsed[1]):
            found.setdefault(module, {})[parsed[3] or "", parsed[2]] = tensor
            alike = tensor.source is NameSource.INITIALIZER and module == (parsed[1] or "") and bool(parsed[4])
            named_alike[module] = named_alike.get(module, True) and alike and bool(parsed[3]) is several
    for module, by_part in found.items():
        labels = sorted({label for label, _ in by_part})
        if all((label, part) in by_part for label in labels for part in "AB"):
            yield module, {label: (by_part[label, "A"], by_part[label, "B"]) for label in labels}, named_alike[module]


def _row(pair: StoredPair, number: int, count: int) -> StoredPair | None:
    """The pair of one adapter in the stacks of `rows`; None for those of a convolution, which have another form."""
    a, b = pair
    if number >= count or b.ndim != 3 or len(b) != count or a.ndim > 3 or len(a) % count:
        return None
    return StoredPair(a.reshape(count, -1, a.shape[-1])[number], b[number])


# --- the comparison ------------------------------------------------------------------------------


class _Factors(NamedTuple):
    """A (ranks, in) and B (out, ranks), whose product is meant."""

    a: Wide
    b: Wide

    @classmethod
    def joined(cls, parts: Iterable[tuple[Wide, Wide]]) -> _Factors:
        a, b = zip(*parts, strict=True)
        return cls(np.concatenate(a), np.concatenate(b, axis=1))

    def lengths(self) -> tuple[Wide, Wide]:
        """The lengths of the columns and of the rows of B·A."""
        of_b: Wide = np.linalg.qr(self.b).R
        of_a: Wide = np.linalg.qr(self.a.T).R
        return np.linalg.norm(of_b @ self.a, axis=0), np.linalg.norm(self.b @ of_a.T, axis=1)

    def bounds(self, dtype: np.dtype) -> tuple[Wide, Wide]:
        """How much longer or shorter these are at most, after A and B are rounded to `dtype`."""
        kind, ranks = ml_dtypes.finfo(dtype), len(self.a)
        eps, least = 2 * float(kind.eps), 2 * float(kind.smallest_subnormal)
        a, b = np.linalg.norm(self.a, axis=0), np.linalg.norm(self.b, axis=1)
        bounds = []
        for each, other, numbers in ((a, b, self.b.size), (b, a, self.a.size)):
            whole = float(np.linalg.norm(other))
            bounds.append(eps * whole * each + least * (np.sqrt(numbers) * each + np.sqrt(ranks) * whole))
        return bounds[0], bounds[1]


def _compared(found: StoredPairs, step: Step | None, computed_in: str) -> str | None:
    """What is wrong with the pairs beside a weight; empty where they are right, None where they are not known."""
    dtype = max((rounded_to(each) for pair in found.pairs for each in pair), key=_eps)
    if step is not None and found.is_ours and computed_in == "float16" and (text := _less_exact(found, step)):
        return text
    wrong = []
    for expected, stored in itertools.product(_expected(step, found), _stored(found, step)):
        if (one := _wrong(expected, stored, dtype)) is None:
            return ""
        wrong.append(one)
    share, text = min(wrong, default=(np.inf, ""))
    return text if text and (found.is_ours or share <= 1 - AGREES) else None


def _less_exact(found: StoredPairs, step: Step) -> str:
    """What was rounded to bf16 on the way into a candidate in fp16, number by number; empty where nothing was.

    The lengths of columns and rows do not show it.
    """
    if len(found.pairs) != 1 or len(step.terms) != 1:
        return ""
    pair, scale = step.terms[0].pair, step.terms[0].scale
    own: tuple[Array, Array] = (pair.a.T, pair.b.T.astype(np.float64) * scale)
    for part, stored, expected in zip("AB", found.pairs[0], own, strict=True):
        if stored.shape == expected.shape and np.array_equal(stored.astype(BF16).astype(stored.dtype), stored):
            limit = _eps(FP16) * np.abs(expected) + float(ml_dtypes.finfo(FP16).smallest_subnormal)
            wrong = np.abs(stored.astype(np.float64) - expected) > limit
            if wrong.any():
                return f"{part} beside it was rounded to bf16: {wrong.sum():,} of {wrong.size:,} numbers are not fp16's"
    return ""


def _eps(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def _expected(step: Step | None, found: StoredPairs) -> Iterator[_Factors | None]:
    """s·BA as factors, and BA where the scale may be elsewhere; None where nothing should be added."""
    if step is None:
        yield None
        return
    pairs = [
        (
            term.pair.a.reshape(term.pair.rank, -1).astype(np.float64),
            term.pair.b.reshape(-1, term.pair.rank),
            term.scale,
        )
        for term in step.terms
    ]
    yield _Factors.joined((a, b.astype(np.float64) * scale) for a, b, scale in pairs)
    if not found.is_ours:
        yield _Factors.joined((a, b.astype(np.float64)) for a, b, _ in pairs)


def _stored(found: StoredPairs, step: Step | None) -> Iterator[_Factors]:
    """The stored pairs as factors, in every way that fits the weight; of other tools, any adapter by itself, too."""
    sizes = None
    if step is not None:
        pair = step.terms[0].pair
        sizes = len(pair.b), pair.a.size // pair.rank
    groups = [found.pairs, *([pair] for pair in found.pairs if len(found.pairs) > 1 and not found.is_ours)]
    is_convolution = any(pair.a.ndim > 2 for pair in found.pairs)
    turns = [(is_convolution, is_convolution)] if found.is_ours else itertools.product((True, False), repeat=2)
    for group, (as_it_is, b_as_it_is) in itertools.product(groups, list(turns)):
        parts = []
        for pair in group:
            a, b = (each.reshape(len(each), -1).astype(np.float64) for each in pair)
            parts.append((a if as_it_is else a.T, b if b_as_it_is else b.T))
        if all(len(a) == b.shape[1] and sizes in (None, (len(b), a.shape[1])) for a, b in parts):
            yield _Factors.joined(parts)


def _wrong(expected: _Factors | None, stored: _Factors, dtype: np.dtype) -> tuple[float, str] | None:
    """How large a part of the product is wrong, at least, and where; None where nothing is."""
    if expected is None:
        is_nothing = not any(lengths.any() for lengths in stored.lengths())
        return None if is_nothing else (1.0, "A and B are beside it, and the adapters do not change it")
    difference = _Factors.joined([(expected.a, expected.b), (stored.a, -stored.b)])
    found = []
    for part, lengths, bounds, others in zip(
        ("inputs (A)", "outputs (B)"), difference.lengths(), expected.bounds(dtype), stored.bounds(dtype), strict=True
    ):
        places = np.flatnonzero(~(lengths <= bounds + others))
        if places.size:
            text = f"A and B beside it are not the adapter's: {places.size:,} of {lengths.size:,} {part} have another "
            found.append((places.size / lengths.size, f"{text}s·BA, the first of them {places[0]:,}"))
    return min(found, default=None)
