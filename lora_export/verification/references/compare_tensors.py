"""The weights of a candidate, compared with those of the model, all of them, before anything is run.

Outputs show little of a row of a vocabulary, or of an expert, that the inputs hardly reach. A candidate whose file has
its weights shows it. Its tensors are found by the model's names for them and, where a graph has lost or never had
these, by their content: as they are, transposed, or beside each other in one matrix. A batch norm that an exporter
folded into a named weight is undone first. A tensor that is in no such way one of the model's is not compared: an
exporter may have folded it with others. Outputs alone judge it then.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from lora_export.errors import InputRefused, count, first_of
from lora_export.graph.content_match import Spellings
from lora_export.graph.exporter_names import parameter_of
from lora_export.graph.find_sites import Sites
from lora_export.graph.merge.fold import InitializerChange, isolate_changes, with_readers_alike
from lora_export.graph.onnx_file.reading import moved_to
from lora_export.graph.site import NameSource
from lora_export.graph.values import initializers, stored_dtype, stored_shape, tensor_of
from lora_export.options.spelling import named
from lora_export.plan import FLOATS, Plan, Step, TensorSpec
from lora_export.plan.stored_region import StoredRegion
from lora_export.verification import parity
from lora_export.verification.parity import Array, Findings, Wide
from lora_export.verification.references.expected_weight import AlikeWeights, ExpectedWeight, rounded_to
from lora_export.verification.references.folded_norms import BatchNorm

AGREES = 0.75  # of a sample: more is the same tensor, of which a part may be wrong
RELATED = 0.1  # of a sample: less is another tensor, or one that was changed as a whole
SAME_RATIO = 1e-2  # relative difference of two ratios that count as one
LEAST_CONTENT = 64  # numbers that identify a tensor


class CandidateTensor(NamedTuple):
    """A float tensor of a candidate."""

    name: str  # of the parameter, perhaps with other first parts; empty where it is lost
    source: NameSource | None  # None where the candidate is a module of the model's own class: its names are certain
    shape: tuple[int, ...]
    load: Callable[[], Array]


def tensors_of_graph(graph: ir.Model) -> Iterator[CandidateTensor]:
    """The float tensors that a graph stores. Reads no data."""
    for value in stored_floats(graph):
        name, source = parameter_of(value)
        yield CandidateTensor(name, source, stored_shape(value), value_array(value))


def stored_floats(graph: ir.Model) -> Iterator[ir.Value]:
    """The initializers and constants of a graph that are float tensors."""
    constants = (
        node.outputs[0]
        for node in ir.traversal.RecursiveGraphIterator(graph.graph)
        if node.op_type == "Constant" and len(node.outputs) == 1
    )
    for value in itertools.chain(initializers(graph), constants):
        shape = stored_shape(value)
        if tensor_of(value) is not None and shape and 0 not in shape and stored_dtype(value) in FLOATS:
            yield value


def value_array(value: ir.Value) -> Callable[[], Array]:
    """Reads a stored tensor. The array maps its file; the graph's own tensor would keep the file mapped for longer."""
    tensor = tensor_of(value)
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        return lambda: moved_to(tensor, Path(tensor.path)).numpy()
    return tensor.numpy


def compare_expected(
    tensors: Iterable[CandidateTensor],
    expected: Iterable[tuple[int, ExpectedWeight]],
    elsewhere: Iterable[str] = (),
    owner: str = "the model",
    norms: Iterable[BatchNorm] = (),
) -> Findings:
    """Compare tensors with those expected, each with the identity of its memory. `owner` is what these belong to.

    `norms` are those of the owner, of which a graph may have folded some.
    """
    # The products are small. Between them, further threads of a BLAS would wait at full load.
    with threadpool_limits(1, user_api="blas"):
        return _Comparison(expected, elsewhere, owner, tuple(norms)).run(list(tensors))


# --- the comparison -----------------------------------------------------------------------------


class _Comparison:
    def __init__(
        self,
        expected: Iterable[tuple[int, ExpectedWeight]],
        elsewhere: Iterable[str],
        owner: str,
        norms: tuple[BatchNorm, ...],
    ):
        self.owner = owner
        self.norms = norms
        self.expected: dict[str, ExpectedWeight] = {}
        self.memory: dict[str, int] = {}
        for memory, weight in expected:
            self.expected[weight.spec.name], self.memory[weight.spec.name] = weight, memory
        by_sampling: dict[Hashable, list[ExpectedWeight]] = {}
        for weight in self.expected.values():
            by_sampling.setdefault(weight.sampling, []).append(weight)
        self.by_sizes: dict[tuple[int, ...], list[AlikeWeights]] = {}
        for weights in by_sampling.values():
            self.by_sizes.setdefault(_sizes(weights[0].spec.shape), []).append(AlikeWeights(weights))
        self.compared = {self.memory[name] for name in elsewhere if name in self.memory}
        self.spellings = Spellings(self.expected)
        self.faults: list[str] = []
        self.doubts: list[str] = []

    def run(self, tensors: list[CandidateTensor]) -> Findings:
        names = {self.spellings.of(tensor.name) for tensor in tensors}
        self.norms = tuple(norm for norm in self.norms if norm.variance not in names)  # the others are not folded
        left = [tensor for tensor in tensors if not self._is_found_by_name(tensor)]
        for tensor in left:
            if math.prod(tensor.shape) >= LEAST_CONTENT and len(tensor.shape) > 1:
                self._find_by_content(tensor)
        if more := self.faults[parity.SHOWN :]:
            self.faults[parity.SHOWN :] = [f"numbers of {count(len(more), 'more tensor')} are wrong"]
        return Findings(notes=(self._note(),), doubts=tuple(self.doubts), faults=tuple(self.faults))

    def _is_found_by_name(self, tensor: CandidateTensor) -> bool:
        name = self.spellings.of(tensor.name)
        if not name:
            return False
        weight = self.expected[name]
        views = list(_views(tensor.load(), weight.spec.shape))[: 1 if tensor.source is None else 2]
        if not views or (tensor.source is None and tensor.shape != weight.spec.shape):
            return False
        best = views[0]
        if len(views) > 1:
            best = max(views, key=lambda view: (weight.agreement(view), weight.agreement(view, negated=True)))
        if tensor.source is not None and (before := self._before_a_norm(weight, best, views)) is not None:
            if before.ndim > 1:  # a bias that is the difference of larger numbers has lost its own last digits
                self._compare(weight, before)
            return True
        least = {None: 0.0, NameSource.INITIALIZER: RELATED}.get(tensor.source, AGREES)
        if weight.agreement(best) >= least or not (weight.is_distinct or np.any(best)):
            self._compare(weight, best)
            return True
        if best.ndim > 1 and (reason := _changed_as_a_whole(weight, best)):
            self.faults.append(f"{name}: {reason}")
        elif (
            best.ndim > 1
            and tensor.source is NameSource.INITIALIZER
            and not any(_is_rescaled(ratios) for view in views for ratios in weight.ratios(view))
        ):
            self.doubts.append(
                f"{name}: the candidate has other numbers in the tensor of this name. Where no output differs, give "
                f"inputs that reach it ({named('inputs')})"
            )
        return False

    def _before_a_norm(self, weight: ExpectedWeight, best: Array, views: list[Array]) -> Array | None:
        """The weight before a batch norm was folded into it; None where no norm explains its numbers better."""
        if not self.norms or (least := weight.agreement(best)) == 1:
            return None
        if rounded_to(best).itemsize < 4:  # half precision has lost the last digits
            return None
        # The norm of a layer usually has a name like the layer's.
        for norm in sorted(self.norms, key=lambda each: -_equal_letters(each.variance, weight.spec.name)):
            for before in itertools.chain.from_iterable(map(norm.undone, views)):
                if weight.agreement(before) > max(least, AGREES):
                    return before
        return None

    def _find_by_content(self, tensor: CandidateTensor) -> None:
        array = tensor.load()
        if (own := self._equal_to(array)) is not None:
            self._compare(*own)
            return
        if array.ndim != 2:
            return
        for matrix in (array, array.T):  # (outputs of several layers, in)
            start = 0
            while start < len(matrix) and (own := self._first_block(matrix[start:])) is not None:
                self._compare(*own)
                start += own[1].size // matrix.shape[1]
            if start:
                return

    def _equal_to(self, array: Array) -> tuple[ExpectedWeight, Array] | None:
        found = [
            (weight, view)
            for alike in self.by_sizes.get(_sizes(array.shape), [])
            for view in _views(array, alike.weights[0].spec.shape)
            for weight in alike.agreeing(view, AGREES)
            if weight.is_distinct
        ]
        return min(found, key=lambda own: self._is_compared(own[0].spec.name), default=None)

    def _first_block(self, matrix: Array) -> tuple[ExpectedWeight, Array] | None:
        """The tensor of the model that the first rows of a matrix are, and these rows."""
        rows, inner = matrix.shape
        for low, high in (sizes for sizes in self.by_sizes if len(sizes) == 2):
            size = high if low == inner else low if high == inner else 0
            if 0 < size <= rows and (own := self._equal_to(matrix[:size])) is not None:
                return own
        return None

    def _is_compared(self, name: str) -> bool:
        return self.memory[name] in self.compared

    def _compare(self, weight: ExpectedWeight, view: Array) -> None:
        name = weight.spec.name
        self.compared.add(self.memory[name])
        wrong = weight.wrong_in(view)
        if wrong.numbers:
            where = (
                f"the first in row {wrong.first}"
                if wrong.rows == 1
                else (f"in {wrong.rows:,} rows, the first of them {wrong.first}")
            )
            own = f"{self.owner}'s"
            which = f"neither {own} nor those with its adapters" if weight.steps else f"not {own}"
            self.faults.append(
                f"{name}: {wrong.numbers:,} of {math.prod(weight.spec.shape):,} numbers are {which}, {where}"
            )

    def _note(self) -> str:
        """How many of the tensors were compared."""
        sizes: dict[int, int] = {}
        for name, weight in self.expected.items():
            sizes.setdefault(self.memory[name], math.prod(weight.spec.shape))
        missing = [name for name in self.expected if not self._is_compared(name)]
        share = sum(sizes[memory] for memory in self.compared) / max(1, sum(sizes.values()))
        text = (
            f"{len(self.compared)} of {self.owner}'s {len(sizes)} tensors, {parity.percent(share)} of its numbers, "
            "were compared with the candidate's"
        )
        if missing:
            shown = first_of(missing, parity.SHOWN)
            text += f". The candidate has no tensor like the others: outputs alone judge {shown}"
        return text


def _equal_letters(name: str, other: str) -> int:
    """How many letters two names have in common at their beginning."""
    return next((at for at, (one, two) in enumerate(zip(name, other, strict=False)) if one != two), len(name))


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _views(array: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """The array, and its transpose, in this shape, where they differ from it in axes of size 1 at most."""
    wanted = [size for size in shape if size != 1]
    for view in (array, array.swapaxes(-1, -2)) if array.ndim > 1 else (array,):
        if [size for size in view.shape if size != 1] == wanted:
            yield view.reshape(shape)


def _changed_as_a_whole(weight: ExpectedWeight, view: Array) -> str:
    """What a fault made of a tensor that is another in most of its numbers; empty where nothing known explains it."""
    if weight.agreement(view, negated=True) >= AGREES:
        return "its numbers have the other sign"
    return "all of its numbers are 0" if not np.any(view) else ""


def _is_rescaled(ratios: Wide) -> bool:
    """Whether rows or columns are multiples of the model's, as where a batch norm or a scale was folded into them."""
    if not np.isfinite(ratios).all():
        return False
    spread = (ratios.std(axis=axis) <= SAME_RATIO * np.abs(ratios.mean(axis=axis)) for axis in (0, 1))
    return any(bool(each.all()) for each in spread)


# --- a graph, compared with the graph that it was made from ---


def compare_initializers(
    candidate: ir.Model, base: ir.Model, sites: Sites, changes: Plan | None, *, merged: bool
) -> Findings:
    """Compare each float tensor of a candidate with that of its base, or with its sum with what adapters add to it.

    `base` is changed and of no further use. Without `merged`, pairs are beside the weights. Reads one tensor of each at
    a time.
    """
    by_name: dict[str, list[Step]] = {}
    left_out: set[str] = set()
    steps = changes.steps if changes is not None else ()
    for step, alike in with_readers_alike(sites, steps if merged else _without_pairs(steps)):
        for site in sites.by_name[step.weight]:
            inputs = () if site.quantised is None else site.quantised.node.inputs
            left_out |= {str(value.name) for value in inputs if value is not None}  # outputs judge them
        with contextlib.suppress(InputRefused):
            for change in isolate_changes(base, sites, step, alike):
                if stored_dtype(change.value) in FLOATS:
                    by_name.setdefault(str(change.value.name), []).append(_in_initializer(change))
    values = {str(value.name): value for value in stored_floats(base)}
    expected = {}
    for name, value in values.items():
        if name not in left_out:
            spec = TensorSpec(name, stored_shape(value), stored_dtype(value))
            expected[name] = ExpectedWeight(spec, value_array(value), tuple(by_name.get(name, ())))
    weights = ((id(values[name]), weight) for name, weight in expected.items())
    return compare_expected(_tensors(candidate, set(expected)), weights, owner="the source graph")


def _without_pairs(steps: Iterable[Step]) -> Iterator[Step]:
    """What is merged where pairs are beside the weights: whole tensors, and changes of biases."""
    for step in steps:
        if not step.terms or step.replace is not None:
            yield replace(step, terms=())


def _in_initializer(change: InitializerChange) -> Step:
    """The step on the part of the initializer that is its weight."""
    if not change.is_block:
        return change.step
    name, shape = str(change.value.name), change.cut_shape or stored_shape(change.value)
    rows = change.patch(shape[-2] if change.cut_shape is None else shape[0])
    region = StoredRegion(name, (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape, rows.rows, rows.columns)
    return replace(change.step, spec=replace(change.step.spec, region=region))


def _tensors(candidate: ir.Model, expected: set[str]) -> Iterator[CandidateTensor]:
    """The float tensors of a candidate. Where it has all names of its base, each names the same tensor."""
    values = list(stored_floats(candidate))
    has_all = expected <= {str(value.name) for value in values}
    for value in values:
        name, source = (str(value.name), NameSource.INITIALIZER) if has_all else parameter_of(value)
        yield CandidateTensor(name, source, stored_shape(value), value_array(value))
