"""Whatever a plan can hold, beside whatever a graph's weights can be, in every mode: as nodes, as inputs, by row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from graphs import Arrays, a_graph, an_adapter, contents, quantised, run
from handmade import base_file
from numpy.typing import NDArray

from lora_export import plan
from lora_export.checkpoint import open_checkpoint
from lora_export.formats import onnx_adapter
from lora_export.graph import branches, sites
from lora_export.graph.inputs import factors_of, open_inputs
from lora_export.graph.rows import choose_by_row
from lora_export.graph.sites import Sites
from lora_export.lora import Adapter, LoraPair

MODES = pytest.mark.parametrize("mode", ["nodes", "inputs", "rows"])
RNG = np.random.default_rng(0)
BATCH, LENGTH = 3, 4


class Woven:
    """A graph with adapters beside its weights, to be asked for one of them; 0 is the base."""

    def __init__(self, mode: str, model: ir.Model, found: Sites, *adapters: Adapter, batch: str = "N"):
        self.mode, self.adapters, self.batch = mode, adapters, batch
        steps = plan.make(adapters, found.specs, apart=True)
        self.base, self.graphs = model, {0: model}
        before = contents(model)
        if mode == "nodes":
            for number, adapter in enumerate(adapters, 1):
                self.graphs[number], own = self._clone(found)
                branches.branch(self.graphs[number], own, plan.make([adapter], own.specs))
        else:
            graph, own = self._clone(found)
            self.graphs = dict.fromkeys(range(len(adapters) + 1), graph)
            if mode == "rows":
                choose_by_row(graph, own, steps, batch=batch)
            else:
                dora = {step.weight for step in steps.steps if step.has_dora}
                open_inputs(graph, own, [step.weight for step in steps.steps], dora=dora)
                contract = onnx_adapter.read_contract(graph.metadata_props, "")
                names = [adapter.name for adapter in adapters]
                self.given = [
                    onnx_adapter.parameters(contract, steps, name, factors_of(graph, contract, steps, name))
                    for name in names
                ]
        for graph in self.graphs.values():
            assert before.items() <= contents(graph).items()

    def _clone(self, found: Sites) -> tuple[ir.Model, Sites]:
        """Another graph with the same sites."""
        model = self.base.clone()
        theirs = {node.name: node for node in ir.traversal.RecursiveGraphIterator(model.graph)}
        values = model.graph.initializers
        by_name = {}
        for name, there in found.by_name.items():
            moved = []
            for site in there:
                again = next(
                    other for other in sites.readers(values[site.value.name]) if other.node is theirs[site.node.name]
                )
                moved.append(dataclasses.replace(again, name=name, block=site.block, how=site.how))
            by_name[name] = tuple(moved)
        return model, Sites(by_name, (), ())

    def fed(self, which: int | Sequence[int], feeds: Mapping[str, Any]) -> Arrays:
        fed = dict(feeds)
        if self.mode == "rows":
            rows = len(next(iter(feeds.values())))
            fed["adapter_ids"] = np.resize(np.array(which, np.int64), rows)
        elif self.mode == "inputs" and which:
            assert isinstance(which, int)
            fed |= self.given[which - 1]
        return fed

    def answer(self, which: int | Sequence[int], **feeds: Any) -> NDArray[Any]:
        graph = self.graphs[which if isinstance(which, int) else 0]
        return run(graph, **self.fed(which, feeds))["y"]

    def by_definition(self, which: int, **feeds: Any) -> NDArray[Any]:
        """What ONNX's reference implementation computes."""
        evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(self.graphs[which]))
        fed = self.fed(which, feeds)
        if self.mode == "inputs" and not which:  # it knows no optional inputs
            fed |= {name: self.graphs[0].graph.initializers[name].const_value.numpy() for name in self.given[0]}
        (answer,) = evaluator.run(None, fed)
        return answer


# --- the layers ---


@dataclass(frozen=True, eq=False)
class Layer:
    """A graph of one layer, and what it computes by NumPy for weights in the (out, in, ...) view."""

    graph: ir.Model
    feeds: Arrays
    base: Mapping[str, NDArray[Any]]  # module -> weight (out, in, ...)
    embedding: bool = False
    bias: NDArray[Any] | float = 0.0
    standard: bool = True  # whether it is all ONNX's own operators

    @property
    def is_convolution(self) -> bool:
        return next(iter(self.base.values())).ndim > 2

    def found(self, folder: Path) -> Sites:
        named = {f"{name}.weight": weight for name, weight in self.base.items()}
        if self.embedding:
            named = {name: weight.T for name, weight in named.items()}
        checkpoint = open_checkpoint(base_file(folder / "base.safetensors", named))
        found = sites.find(self.graph, checkpoint)
        assert list(found.by_name) == list(named)
        return found


def filled(body: str, **arrays: NDArray[Any]) -> ir.Model:
    """A graph whose initializers `NAME = {0}` are these arrays."""
    model = a_graph(body)
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    onnx.checker.check_model(ir.to_proto(model))
    return model


def normal(*shape: int, rng: np.random.Generator = RNG) -> NDArray[np.float32]:
    return rng.normal(size=shape).astype(np.float32)


QKV = {"q": normal(8, 32), "k": normal(4, 32), "v": normal(4, 32)}
PACKED = np.concatenate(list(QKV.values()))  # (out, in)
X = normal(BATCH, LENGTH, 32)
TOKENS = RNG.integers(-9, 9, (BATCH, LENGTH))


def product(weight: NDArray[Any]) -> ir.Model:
    return filled(
        f"""g (float[N,S,32] x) => (float[N,S,{len(weight)}] y) <float[1,1] W = {{0}}>
        {{ [n] y = MatMul(x, W) }}""",
        W=weight.T,
    )


def gemm(weight: NDArray[Any], bias: NDArray[Any]) -> ir.Model:
    return filled(
        f"""g (float[N,32] x) => (float[N,{len(weight)}] y) <float[1,1] W = {{0}}, float[1] b = {{0}}>
        {{ [n] y = Gemm <transB = 1> (x, W, b) }}""",
        W=weight,
        b=bias,
    )


def flattened(weight: NDArray[Any]) -> ir.Model:
    return filled(
        f"""g (float[N,S,32] x) => (float[M,{len(weight)}] y)
        <float[1,1] W = {{0}}, int64[2] flat = {{-1,32}}>
        {{ r = Reshape(x, flat)
           [n] y = MatMul(r, W) }}""",
        W=weight.T,
    )


def looked_up(table: NDArray[Any], kind: str = "int64") -> ir.Model:
    return filled(
        f"""g ({kind}[N,S] x) => (float[N,S,{table.shape[1]}] y) <float[1,1] W = {{0}}>
        {{ [n] y = Gather(W, x) }}""",
        W=table,
    )


def convolved(kernel: NDArray[Any], bias: NDArray[Any]) -> ir.Model:
    return filled(
        f"""g (float[N,2,L] x) => (float[N,{len(kernel)},M] y) <float[1,1,1] W = {{0}}, float[1] b = {{0}}>
        {{ [n] y = Conv <strides = [2], pads = [1, 2]> (x, W, b) }}""",
        W=kernel,
        b=bias,
    )


@functools.cache
def layers() -> dict[str, Layer]:
    x, weight, bias, table, kernel = {"x": X}, normal(6, 32), normal(16), normal(9, 5), normal(4, 2, 3)
    return {
        "linear": Layer(product(weight), x, {"m": weight}),
        "gemm": Layer(gemm(weight, bias[:6]), {"x": X[:, 0]}, {"m": weight}, bias=bias[:6]),
        "flattened": Layer(flattened(weight), x, {"m": weight}),
        "packed": Layer(product(PACKED), x, QKV),
        "packed gemm": Layer(gemm(PACKED, bias), {"x": X[:, 0]}, QKV, bias=bias),
        "packed and flattened": Layer(flattened(PACKED), x, QKV),
        "four bits": Layer(quantised(product(weight)), x, {"m": weight}, standard=False),
        "four bits, zero points": Layer(
            quantised(product(weight), symmetric=False, block=16), x, {"m": weight}, standard=False
        ),
        "dequantised": Layer(quantised(product(weight), as_pairs=True), x, {"m": weight}),
        "packed four bits": Layer(quantised(product(PACKED)), x, QKV, standard=False),
        "packed and dequantised": Layer(quantised(product(PACKED), as_pairs=True), x, QKV),
        "embedding": Layer(looked_up(table), {"x": TOKENS}, {"m": table.T}, embedding=True),
        "embedding of 32 bits": Layer(
            looked_up(table, "int32"), {"x": TOKENS.astype(np.int32)}, {"m": table.T}, embedding=True
        ),
        "convolution": Layer(
            convolved(kernel, bias[:4]), {"x": normal(BATCH, 2, 9)}, {"m": kernel}, bias=bias[:4, None]
        ),
    }


LAYERS = pytest.mark.parametrize("name", list(layers()))


def a_pair(layer: Layer, module: str, rng: np.random.Generator, *, rank: int, dora: bool) -> LoraPair:
    weight = layer.base[module]
    return LoraPair(
        a=normal(rank, *weight.shape[1:], rng=rng),
        b=normal(len(weight), rank, *[1] * (weight.ndim - 2), rng=rng),
        scale=0.5,
        magnitude=rng.uniform(1, 9, len(weight)) * rng.choice([-1, 1], len(weight)) if dora else None,
        embedding=layer.embedding,
    )


def two_adapters(layer: Layer, *, dora: bool) -> tuple[Adapter, Adapter]:
    """The second has another rank, stands at one module only, and has DoRA where the first has none."""
    rng, modules = np.random.default_rng(7), list(layer.base)
    one = {module: a_pair(layer, module, rng, rank=2, dora=dora) for module in modules}
    two = {modules[-1]: a_pair(layer, modules[-1], rng, rank=3, dora=not dora)}
    return an_adapter(one, name="one"), an_adapter(two, name="two")


def meant(layer: Layer, found: Sites, adapter: Adapter, base: NDArray[Any]) -> NDArray[np.float64]:
    """What the layer computes with an adapter, in NumPy's fp64, beside what onnxruntime's base computed.

    The base's own answer is taken as it is: onnxruntime rounds x too beside some quantised weights.
    """
    answer = base.astype(np.float64) - layer.bias
    first = 0
    for module, weight in layer.base.items():
        (site,) = found.by_name[f"{module}.weight"]
        outputs = slice(first, first := first + len(weight))
        pair = adapter.pairs.get(module)
        if pair is None:
            continue
        stored = site.array.T if layer.embedding else site.matrix  # as a quantised one computes
        total = stored.astype(np.float64) + pair.delta()
        factor = 1.0
        if pair.magnitude is not None:
            norms = np.sqrt(np.square(total).sum(axis=tuple(range(1, total.ndim))))
            factor = (pair.magnitude / norms).reshape(-1, *[1] * (total.ndim - 2))
        own = (slice(None), outputs) if layer.is_convolution else (..., outputs)
        answer[own] = (answer[own] + applied(layer, pair.delta())) * factor
    return answer + layer.bias


def applied(layer: Layer, weight: NDArray[Any]) -> NDArray[np.float64]:
    """The layer with other weights, without its bias."""
    x = layer.feeds["x"]
    if layer.embedding:
        return weight.T.astype(np.float64)[x]
    if not layer.is_convolution:
        rows = x.reshape(-1, 32) if "flat" in layer.graph.graph.initializers else x
        return rows.astype(np.float64) @ weight.T
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=2)[:, :, ::2]  # (N, in, M, kernel)
    return np.einsum("nimk,oik->nom", windows, weight)


def by_rows(layer: Layer, answers: Sequence[NDArray[Any]], which: Sequence[int]) -> NDArray[Any]:
    """Each row of the batch out of its own adapter's answer."""
    split = [answer.reshape(BATCH, -1, *answer.shape[1:]) for answer in answers]
    mixed = np.stack([split[number][row] for row, number in enumerate(which)])
    return mixed.reshape(answers[0].shape)


@MODES
@LAYERS
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_does_what_it_means_and_without_it_the_graph_is_the_base(
    tmp_path: Path, name: str, mode: str, dora: bool
) -> None:
    layer = layers()[name]
    found, adapters = layer.found(tmp_path), two_adapters(layer, dora=dora)
    base = run(layer.graph, **layer.feeds)["y"]
    woven = Woven(mode, layer.graph, found, *adapters)
    expected = [base, *(meant(layer, found, adapter, base) for adapter in adapters)]
    assert min(np.abs(answer - base).max() for answer in expected[1:]) > 0.5
    for number, answer in enumerate(expected):
        np.testing.assert_allclose(woven.answer(number, **layer.feeds), answer, rtol=1e-4, atol=1e-4)
    assert woven.answer(0, **layer.feeds).tobytes() == base.tobytes()
    if mode == "rows":
        which = [2, 0, 1]
        answer = woven.answer(which, **layer.feeds)
        np.testing.assert_allclose(answer, by_rows(layer, expected, which), rtol=1e-4, atol=1e-4)


@MODES
@pytest.mark.parametrize("name", [name for name, layer in layers().items() if layer.standard])
def test_it_does_so_by_onnxs_own_definition(tmp_path: Path, name: str, mode: str) -> None:
    layer = layers()[name]
    found, adapters = layer.found(tmp_path), two_adapters(layer, dora=True)
    woven = Woven(mode, layer.graph, found, *adapters)
    base = woven.by_definition(0, **layer.feeds)
    for number, adapter in enumerate(adapters, 1):
        onnx.checker.check_model(ir.to_proto(woven.graphs[number]), full_check=True)
        expected = meant(layer, found, adapter, base)
        np.testing.assert_allclose(woven.by_definition(number, **layer.feeds), expected, rtol=1e-4, atol=1e-4)
