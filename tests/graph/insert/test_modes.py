"""Every kind of layer in every mode: adapters as nodes, as inputs, and per row."""

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
import peft
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import formats, plan
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import Contract, read_contract
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import contract_dora_factors, insert_inputs
from lora_export.graph.insert.adapter_names import module_of
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.insert.adapter_slots import insert_slots
from lora_export.graph.insert.branches import branch_obstacle
from lora_export.graph.site import find_readers
from lora_export.lora import Adapter, LoraPair
from lora_export.weights.checkpoint import open_checkpoint
from support.exported_models import EVERY_MODEL, attached, eager, exported, inputs
from support.graphs import Arrays, an_adapter, contents, quantised, run
from support.handmade import base_file
from support.small_graphs import filled

MODES = pytest.mark.parametrize("mode", ["nodes", "inputs", "rows", "slots"])
# Which weights have DoRA then is said by what makes a test's adapters: `two_adapters` or `adapter_for_all`.
MODES_AND_DORA = pytest.mark.parametrize(
    ("mode", "dora"),
    [*((mode, dora) for mode in ("nodes", "inputs", "rows") for dora in (False, True)), ("slots", True)],
)
BY_ROW = ("rows", "slots")
SLOT_OF = np.array([0, 3, 1])  # the base, and the two adapters; slot 2 has another


RNG = np.random.default_rng(0)


BATCH, LENGTH = 3, 4


class InsertedAdapters:
    """A graph with adapters in one of the modes. Each adapter can be run by its number; 0 is the base."""

    def __init__(self, mode: str, model: ir.Model, found: Sites, *adapters: Adapter, batch: str = "N"):
        self.mode, self.adapters, self.batch = mode, adapters, batch
        steps = plan.make(adapters, found.specs, one_at_a_time=True)
        self.base, self.graphs = model, {0: model}
        before = contents(model)
        if mode == "nodes":
            for number, adapter in enumerate(adapters, 1):
                self.graphs[number], own = self._clone(found)
                insert_nodes(self.graphs[number], own, plan.make([adapter], own.specs))
        else:
            graph, own = self._clone(found)
            self.graphs = dict.fromkeys(range(len(adapters) + 1), graph)
            if mode == "rows":
                insert_rows(graph, own, steps, batch=batch)
            else:
                dora = {step.weight for step in steps.steps if step.has_dora}
                weights = [step.weight for step in steps.steps]
                if mode == "slots":
                    insert_slots(graph, own, weights, slots=3, max_rank=4, dora=dora, batch=batch)
                else:
                    insert_inputs(graph, own, weights, dora=dora)
                contract = read_contract(graph.metadata_props, "")
                names = [adapter.name for adapter in adapters]
                self.input_values = [
                    onnx_adapter.input_values(
                        contract, steps, name, contract_dora_factors(graph, contract, steps, name)
                    )
                    for name in names
                ]
                if mode == "slots":
                    self.stacks = contract.stacks()
                    self.replace(contract, {1: self.input_values[0]})  # of another adapter before
                    other = {name: 7 * value for name, value in self.input_values[-1].items()}
                    self.replace(contract, dict(zip(SLOT_OF[1:], self.input_values, strict=False)) | {2: other})
        for graph in self.graphs.values():
            assert before.items() <= contents(graph).items()

    def _clone(self, found: Sites) -> tuple[ir.Model, Sites]:
        """Another graph with the same sites."""
        model = self.base.clone()
        theirs = {node.name: node for node in ir.traversal.RecursiveGraphIterator(model.graph)}
        values = model.graph.initializers
        by_name = {}
        for name, sites in found.by_name.items():
            moved = []
            for site in sites:
                again = next(
                    other for other in find_readers(values[site.value.name]) if other.node is theirs[site.node.name]
                )
                moved.append(dataclasses.replace(again, name=name, block=site.block, named_by=site.named_by))
            by_name[name] = tuple(moved)
        return model, Sites(by_name, (), ())

    def replace(self, contract: Contract, adapters: Mapping[int, Arrays]) -> None:
        for slot, values in adapters.items():
            contract.fill(self.stacks, slot, values)

    def feeds_for(self, number: int | Sequence[int], feeds: Mapping[str, Any]) -> Arrays:
        fed = dict(feeds)
        if self.mode in BY_ROW:
            rows = len(next(iter(feeds.values())))
            ids = np.array(number, np.int64)
            fed["adapter_ids"] = np.resize(SLOT_OF[ids] if self.mode == "slots" else ids, rows)
            fed |= self.stacks if self.mode == "slots" else {}
        elif self.mode == "inputs" and number:
            assert isinstance(number, int)
            fed |= self.input_values[number - 1]
        return fed

    def output(self, number: int | Sequence[int], **feeds: Any) -> NDArray[Any]:
        graph = self.graphs[number if isinstance(number, int) else 0]
        return run(graph, **self.feeds_for(number, feeds))["y"]

    def by_reference_evaluator(self, number: int, **feeds: Any) -> NDArray[Any]:
        """The output of ONNX's reference evaluator."""
        evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(self.graphs[number]))
        fed = self.feeds_for(number, feeds)
        if self.mode == "inputs" and not number:  # the evaluator has no optional inputs
            fed |= {name: self.graphs[0].graph.initializers[name].const_value.numpy() for name in self.input_values[0]}
        (output,) = evaluator.run(None, fed)
        return output


@dataclass(frozen=True, eq=False)
class Layer:
    """A graph of one layer, its inputs, and its weights in the (out, in, ...) view."""

    graph: ir.Model
    feeds: Arrays
    base: Mapping[str, NDArray[Any]]  # module -> weight (out, in, ...)
    embedding: bool = False
    bias: NDArray[Any] | float = 0.0
    standard: bool = True  # whether all operators are those of ONNX

    @property
    def is_convolution(self) -> bool:
        return next(iter(self.base.values())).ndim > 2

    def found(self, folder: Path) -> Sites:
        named = {f"{name}.weight": weight for name, weight in self.base.items()}
        if self.embedding:
            named = {name: weight.T for name, weight in named.items()}
        checkpoint = open_checkpoint(base_file(folder / "base.safetensors", named))
        found = find_sites(self.graph, checkpoint)
        assert list(found.by_name) == list(named)
        return found


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
    """Two adapters. The second has another rank and one module only, and DoRA where the first has none."""
    rng, modules = np.random.default_rng(7), list(layer.base)
    one = {module: a_pair(layer, module, rng, rank=2, dora=dora) for module in modules}
    two = {modules[-1]: a_pair(layer, modules[-1], rng, rank=3, dora=not dora)}
    return an_adapter(one, name="one"), an_adapter(two, name="two")


def expected_output(layer: Layer, found: Sites, adapter: Adapter, base: NDArray[Any]) -> NDArray[np.float64]:
    """The output of the layer with an adapter, by NumPy in fp64, from the base output of onnxruntime.

    The base output is that of onnxruntime, which rounds x too for some quantised weights.
    """
    output = base.astype(np.float64) - layer.bias
    first = 0
    for module, weight in layer.base.items():
        (site,) = found.by_name[f"{module}.weight"]
        outputs = slice(first, first := first + len(weight))
        pair = adapter.pairs.get(module)
        if pair is None:
            continue
        stored = site.array.T if layer.embedding else site.matrix  # dequantised, where it is quantised
        total = stored.astype(np.float64) + pair.delta()
        factor = 1.0
        if pair.magnitude is not None:
            norms = np.sqrt(np.square(total).sum(axis=tuple(range(1, total.ndim))))
            factor = (pair.magnitude / norms).reshape(-1, *[1] * (total.ndim - 2))
        own = (slice(None), outputs) if layer.is_convolution else (..., outputs)
        output[own] = (output[own] + layer_output(layer, pair.delta())) * factor
    return output + layer.bias


def layer_output(layer: Layer, weight: NDArray[Any]) -> NDArray[np.float64]:
    """The output of the layer with this weight and without its bias."""
    x = layer.feeds["x"]
    if layer.embedding:
        return weight.T.astype(np.float64)[x]
    if not layer.is_convolution:
        rows = x.reshape(-1, 32) if "flat" in layer.graph.graph.initializers else x
        return rows.astype(np.float64) @ weight.T
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=2)[:, :, ::2]  # (N, in, M, kernel)
    return np.einsum("nimk,oik->nom", windows, weight)


def by_rows(layer: Layer, outputs: Sequence[NDArray[Any]], number: Sequence[int]) -> NDArray[Any]:
    """Each row of the batch from the output of its own adapter."""
    split = [output.reshape(BATCH, -1, *output.shape[1:]) for output in outputs]
    mixed = np.stack([split[number][row] for row, number in enumerate(number)])
    return mixed.reshape(outputs[0].shape)


@MODES_AND_DORA
@LAYERS
def test_adapter_equals_numpy_and_base_is_unchanged(tmp_path: Path, name: str, mode: str, dora: bool) -> None:
    layer = layers()[name]
    found, adapters = layer.found(tmp_path), two_adapters(layer, dora=dora)
    base = run(layer.graph, **layer.feeds)["y"]
    inserted = InsertedAdapters(mode, layer.graph, found, *adapters)
    expected = [base, *(expected_output(layer, found, adapter, base) for adapter in adapters)]
    assert min(np.abs(output - base).max() for output in expected[1:]) > 0.5
    for number, output in enumerate(expected):
        np.testing.assert_allclose(inserted.output(number, **layer.feeds), output, rtol=1e-4, atol=1e-4)
    assert inserted.output(0, **layer.feeds).tobytes() == base.tobytes()
    if mode in BY_ROW:
        number = [2, 0, 1]
        output = inserted.output(number, **layer.feeds)
        np.testing.assert_allclose(output, by_rows(layer, expected, number), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["nodes", "inputs"])
@LAYERS
def test_each_run_chooses_strengths(tmp_path: Path, name: str, mode: str) -> None:
    layer = dataclasses.replace(layers()[name], graph=layers()[name].graph.clone())
    found, adapters = layer.found(tmp_path), two_adapters(layer, dora=False)
    adapters = adapters[0], dataclasses.replace(adapters[1], pairs=undirected(adapters[1].pairs))
    base = run(layer.graph, **layer.feeds)["y"]
    changes = [expected_output(layer, found, adapter, base) - base for adapter in adapters]
    feeds = dict(layer.feeds)
    if mode == "nodes":
        insert_nodes(layer.graph, found, plan.make(adapters, found.specs), strength_input=True)
    else:
        steps = plan.make(adapters[:1], found.specs)
        contract = insert_inputs(layer.graph, found, [step.weight for step in steps.steps], strength_input=True)
        feeds |= onnx_adapter.input_values(contract, steps, adapters[0].name, {})
        changes = changes[:1]
    onnx.checker.check_model(ir.to_proto(layer.graph), full_check=layer.standard)
    assert min(np.abs(change).max() for change in changes) > 0.5
    ones = [1.0] * len(changes)
    for strengths in (None, ones, [0.5, -2.0], [0.0, 0.7], [0.0, 0.0]):
        given = {} if strengths is None else {"adapter_strengths": np.float32(strengths[: len(changes)])}
        expected = base + sum(each * change for each, change in zip(strengths or ones, changes, strict=False))
        np.testing.assert_allclose(run(layer.graph, **feeds, **given)["y"], expected, rtol=1e-4, atol=2e-4)


def undirected(pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """The pairs without DoRA."""
    return {module: dataclasses.replace(pair, magnitude=None) for module, pair in pairs.items()}


@MODES
@pytest.mark.parametrize("name", [name for name, layer in layers().items() if layer.standard])
def test_adapter_equals_numpy_under_reference_evaluator(tmp_path: Path, name: str, mode: str) -> None:
    layer = layers()[name]
    found, adapters = layer.found(tmp_path), two_adapters(layer, dora=True)
    inserted = InsertedAdapters(mode, layer.graph, found, *adapters)
    base = inserted.by_reference_evaluator(0, **layer.feeds)
    for number, adapter in enumerate(adapters, 1):
        onnx.checker.check_model(ir.to_proto(inserted.graphs[number]), full_check=True)
        expected = expected_output(layer, found, adapter, base)
        np.testing.assert_allclose(
            inserted.by_reference_evaluator(number, **layer.feeds), expected, rtol=1e-4, atol=1e-4
        )


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def qlora(folder: Path, *, as_pairs: bool) -> tuple[ir.Model, Sites, nn.Module]:
    """A graph of four bits, and a module with its dequantised weights."""
    torch.manual_seed(0)
    module = Two()
    named = {name: value.detach().numpy() for name, value in module.named_parameters()}
    graph = filled(
        """g (float[N,S,32] x) => (float[N,S,8] y)
        <float[1,1] U = {0}, float[1,1] D = {0}, float[1] u = {0}, float[1] d = {0}>
        { [up] a = MatMul(x, U)
          b = Add(a, u)
          c = Tanh(b)
          [down] e = MatMul(c, D)
          y = Add(e, d) }""",
        U=named["up.weight"].T, D=named["down.weight"].T, u=named["up.bias"], d=named["down.bias"],
    )  # fmt: skip
    graph = quantised(graph, as_pairs=as_pairs)
    for number, node in enumerate(graph.graph):
        node.name = node.name or f"node_{number}"  # InsertedAdapters finds nodes by name
    found = find_sites(graph, open_checkpoint(base_file(folder / "base.safetensors", named)))
    with torch.no_grad():
        for name in ("up.weight", "down.weight"):
            (site,) = found.by_name[name]
            assert site.quantised is not None
            module.get_parameter(name).copy_(torch.from_numpy(np.array(site.matrix)))
    return graph, found, module


@MODES
@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_qlora_adapter_equals_peft_on_dequantised_weights(
    tmp_path: Path, mode: str, dora: bool, as_pairs: bool
) -> None:
    graph, found, module = qlora(tmp_path, as_pairs=as_pairs)
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["up", "down"], use_dora=dora)
    model = peft.get_peft_model(module, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    inserted, x = InsertedAdapters(mode, graph, found, formats.load(tmp_path / "adapter")), normal(3, 4, 32)
    with torch.no_grad():
        on = model(torch.from_numpy(x)).numpy()
        with model.disable_adapter():
            off = model(torch.from_numpy(x)).numpy()
    # onnxruntime rounds the input of a MatMulNBits to 8 bits where it made it of a DequantizeLinear.
    close = {"rtol": 1e-4, "atol": 0.03 if as_pairs else 1e-5}
    np.testing.assert_allclose(inserted.output(1, x=x), on, **close)
    np.testing.assert_allclose(inserted.output(0, x=x), off, **close)
    assert np.abs(on - off).mean() > 0.2


def adapter_for_all(found: Sites, name: str, *, rank: int, dora: bool, by_row: bool) -> Adapter:
    """A pair wherever a branch can be inserted, every second one with DoRA; by row, where the batch is known."""
    rng, pairs = np.random.default_rng(rank), {}
    for number, spec in enumerate(found.specs):
        embedding = spec.layout is plan.Layout.EMBEDDING
        obstacles = [branch_obstacle(site, is_embedding=embedding) for site in found.by_name[spec.name]]
        if any(obstacles) or (by_row and "position_embeddings" in spec.name):
            continue
        out, *inner = spec.matrix
        pairs[module_of(spec.name)] = LoraPair(
            a=normal(rank, *inner, rng=rng),
            b=normal(out, rank, *[1] * (len(inner) - 1), rng=rng),
            scale=0.3,
            magnitude=rng.uniform(0.5, 1.5, out) if dora and number % 2 == rank % 2 else None,
            embedding=embedding,
        )
    return an_adapter(pairs, name=name)


@MODES_AND_DORA
@EVERY_MODEL
def test_export_with_all_kinds_of_adapters_equals_pytorch(name: str, mode: str, dora: bool) -> None:
    made = exported(name)
    found, base = find_sites(made.graph), made.graph.clone()
    two = [
        adapter_for_all(found, adapter, rank=rank, dora=dora, by_row=mode in BY_ROW)
        for rank, adapter in enumerate(("one", "two"), 2)
    ]
    assert {"encoder": {"conv"}, "bert": {"bert.embeddings.word_embeddings"}}.get(name, set()) <= two[0].pairs.keys()
    inserted = InsertedAdapters(mode, made.graph, found, *two, batch="batch")
    modules = [made.module, *(attached(made.module, adapter) for adapter in two)]
    close = {"rtol": 1e-4, "atol": 2e-5 if dora and mode != "nodes" else 1e-5}
    if name == "llama":
        close["atol"] = 1e-4  # with these adapters, PyTorch in fp32 is off by 5e-5 itself
    for batch, length in [(3, 12), (1, 5)]:
        feeds = inputs(name, batch, length, seed=2)
        arrays = {key: value.numpy() for key, value in feeds.items()}
        before, alone = run(base, **arrays), [eager(module, feeds) for module in modules]
        for number in (0, 1, 2):
            output = run(inserted.graphs[number], **inserted.feeds_for(number, arrays))
            for key, value in alone[number].items():
                np.testing.assert_allclose(output[key], value, **close)
                if number:
                    assert np.abs(value - before[key]).max() > 1e-2
                elif not dora:
                    assert output[key].tobytes() == before[key].tobytes()
        if mode in BY_ROW:
            chosen = [2, 0, 1][:batch]
            output = run(inserted.graphs[0], **inserted.feeds_for(chosen, arrays))
            for key in before:
                expected = np.stack([alone[number][key][row] for row, number in enumerate(chosen)])
                np.testing.assert_allclose(output[key], expected, **close)
