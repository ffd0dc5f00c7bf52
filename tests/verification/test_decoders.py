"""Decoders with a key/value cache: each row of a batch, and each run, has its adapter at every step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import plan
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import contract_dora_factors, insert_inputs
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.models import model
from lora_export.models.load import load_model
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.weights.checkpoint import open_checkpoint
from support import FACTORIES
from support.decoders import FEATURES, WORDS
from support.decoders import a_graph as a_decoder
from support.exported_models import attached, eager, with_changes
from support.graphs import Arrays, an_adapter, quantised, run
from support.handmade import base_file
from support.tiny_models import tiny_llama

RNG = np.random.default_rng(0)


def a_pair(out: int, into: int, *, rank: int = 2, dora: bool = False, embedding: bool = False) -> LoraPair:
    return LoraPair(
        a=RNG.normal(size=(rank, into)),
        b=RNG.normal(size=(out, rank)),
        scale=0.5,
        magnitude=RNG.uniform(1, 3, out) if dora else None,
        embedding=embedding,
    )


# --- a decoder by hand ---

TWO = (
    an_adapter({"dense": a_pair(3, FEATURES, dora=True), "table": a_pair(FEATURES, WORDS, embedding=True)}, name="one"),
    an_adapter(
        {"dense": a_pair(3, FEATURES), "table": a_pair(FEATURES, WORDS, rank=3, dora=True, embedding=True)}, name="two"
    ),
)
IDS = RNG.integers(0, WORDS, (4, 7))
FEEDS = {"input_ids": IDS, "attention_mask": np.array([[1] * 7, [1] * 7, [1, 1, 1, 1, 1, 0, 0], [1] * 7])}


@pytest.fixture
def base() -> model.Model:
    return load_model(f"{FACTORIES}:sums")


def sums(folder: Path, base: model.Model) -> tuple[ir.Model, Sites]:
    graph = load_graph(a_decoder(folder / "base.onnx", base))
    # As an exporter states it: shape inference cannot find it behind a Slice.
    next(node for node in graph.graph if node.op_type == "Squeeze").outputs[0].shape = ir.Shape(["batch", "tokens", 4])
    named = {name: value.numpy() for name, value in base.module.state_dict().items()}
    return graph, find_sites(graph, open_checkpoint(base_file(folder / "base.safetensors", named)))


def alone(module: nn.Module, adapter: Adapter | None) -> NDArray[Any]:
    adapted = module if adapter is None else attached(module, adapter)
    return eager(adapted, {name: torch.from_numpy(value) for name, value in FEEDS.items()})["logits"]


def test_each_row_has_its_adapter_at_every_step(tmp_path: Path, base: model.Model) -> None:
    graph, found = sums(tmp_path, base)
    insert_rows(graph, found, plan.make(TWO, found.specs, one_at_a_time=True))
    save_graph(graph, tmp_path, "rows.onnx")
    which = [2, 0, 1, 1]
    runner = with_cache(OnnxRunner(tmp_path / "rows.onnx").with_rows(which))
    logits = runner.run(FEEDS)["logits"]
    # The CPU provider has no settings of its own.
    assert runner.with_provider_defaults().run(FEEDS)["logits"].tobytes() == logits.tobytes()
    expected = [alone(base.module, adapter) for adapter in (None, *TWO)]
    for row, number in enumerate(which):
        np.testing.assert_allclose(logits[row], expected[number][row], rtol=1e-4, atol=1e-5)
    assert min(np.abs(expected[one] - expected[two]).max() for one, two in [(0, 1), (0, 2), (1, 2)]) > 0.1
    without = with_cache(OnnxRunner(tmp_path / "base.onnx")).run(FEEDS)["logits"]
    off = with_cache(OnnxRunner(tmp_path / "rows.onnx").with_rows([0])).run(FEEDS)["logits"]
    assert off.tobytes() == without.tobytes()


def test_each_run_has_its_adapter_at_every_step(tmp_path: Path, base: model.Model) -> None:
    graph, found = sums(tmp_path, base)
    steps = plan.make(TWO, found.specs, one_at_a_time=True)
    weights = [step.weight for step in steps.steps]
    contract = insert_inputs(graph, found, weights, dora=weights)
    save_graph(graph, tmp_path, "inputs.onnx")
    runner = OnnxRunner(tmp_path / "inputs.onnx")
    for adapter in TWO:
        factors = contract_dora_factors(graph, contract, steps, adapter.name)
        given = onnx_adapter.input_values(contract, steps, adapter.name, factors)
        onnx_adapter.write(tmp_path / adapter.name, given, contract, sha256="1")
        with_it = with_cache(runner.with_adapter(tmp_path / adapter.name))
        logits = with_it.run(FEEDS)["logits"]
        assert with_it.with_provider_defaults().run(FEEDS)["logits"].tobytes() == logits.tobytes()
        np.testing.assert_allclose(logits, alone(base.module, adapter), rtol=1e-4, atol=1e-5)
    without = with_cache(OnnxRunner(tmp_path / "base.onnx")).run(FEEDS)["logits"]
    assert with_cache(runner).run(FEEDS)["logits"].tobytes() == without.tobytes()


# --- what transformers exports ---


@functools.cache
def exported() -> tuple[nn.Module, ir.Model, ir.Model]:
    """A Llama, its graph for the prompt, and the one for each token that follows."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    module = tiny_llama(vocab_size=50, hidden_size=16, num_attention_heads=4, intermediate_size=32)
    ids = torch.randint(0, 50, (2, 5))
    parts = OnnxExporter().export_for_generation(module, {"input_ids": ids}, OnnxConfig(dynamic=True)).components
    return module, parts["prefill"].program, parts["decode"].program


def decoded(prompt: ir.Model, step: ir.Model, ids: NDArray[Any], *, start: int, **given: Any) -> NDArray[Any]:
    """Logits of every place of the sequences: those up to `start` in one run, each later one in a run of its own."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    outputs = run(prompt, input_ids=ids[:, :start], position_ids=positions[:, :start], **given)
    logits = [outputs["logits"]]
    for place in range(start, ids.shape[1]):
        now = slice(place, place + 1)
        cache = {f"input.{name.removeprefix('output.')}": value for name, value in outputs.items() if "cache" in name}
        outputs = run(step, input_ids=ids[:, now], position_ids=positions[:, now], **cache, **given)
        logits.append(outputs["logits"])
    return np.concatenate(logits, axis=1)


def everywhere(found: Sites, name: str, *, rank: int) -> Adapter:
    """A pair for every linear layer but the head, and DoRA for each second."""
    pairs = {}
    for number, site in enumerate(site for site in found.linear if "layers" in site.name):
        pair = a_pair(*site.matrix.shape, rank=rank, dora=number % 2 == rank % 2)
        pairs[site.name.removesuffix(".weight")] = pair
    assert len(pairs) == 7
    return an_adapter(pairs, name=name)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A module and its two graphs, of 32 bits or of four; what else they compute with is the same."""

    module: nn.Module
    graphs: tuple[ir.Model, ir.Model]
    found: tuple[Sites, Sites]


def a_llama_of(folder: Path, *, four_bits: bool) -> Decoder:
    module, *graphs = exported()
    named = {name: value.detach().numpy() for name, value in module.named_parameters()}
    checkpoint = open_checkpoint(base_file(folder / "base.safetensors", named))
    graphs = [quantised(graph, block=16) if four_bits else graph.clone() for graph in graphs]
    prompt, step = (find_sites(graph, checkpoint) for graph in graphs)
    changes = {
        name: sites[0].matrix.astype(np.float64) - named[name]
        for name, sites in prompt.by_name.items()
        if sites[0].quantised is not None
    }
    assert len(changes) == (8 if four_bits else 0)  # the head's too
    return Decoder(with_changes(module, changes), (graphs[0], graphs[1]), (prompt, step))


@pytest.mark.slow
@pytest.mark.parametrize("four_bits", [False, True])
def test_exported_decoder_mixes_adapters_by_row(tmp_path: Path, four_bits: bool) -> None:
    decoder = a_llama_of(tmp_path, four_bits=four_bits)
    bases = [graph.clone() for graph in decoder.graphs]
    two = everywhere(decoder.found[0], "one", rank=2), everywhere(decoder.found[0], "two", rank=3)
    for graph, found in zip(decoder.graphs, decoder.found, strict=True):
        insert_rows(graph, found, plan.make(two, found.specs, one_at_a_time=True))
    ids, which = np.random.default_rng(1).integers(0, 50, (5, 9)), np.array([1, 0, 2, 2, 1])
    logits = decoded(*decoder.graphs, ids, start=5, adapter_ids=which)
    feeds, module = {"input_ids": torch.from_numpy(ids)}, decoder.module
    expected = [eager(adapted, feeds)["logits"] for adapted in (module, *(attached(module, one) for one in two))]
    for row, number in enumerate(which):
        np.testing.assert_allclose(logits[row], expected[number][row], rtol=1e-3, atol=1e-4)
        assert number == 0 or np.abs(expected[number][row] - expected[0][row]).max() > 0.1
    off = decoded(*decoder.graphs, ids, start=5, adapter_ids=0 * which)
    assert off.tobytes() == decoded(*bases, ids, start=5).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("four_bits", [False, True])
def test_exported_decoder_takes_one_adapter_after_another(tmp_path: Path, four_bits: bool) -> None:
    decoder = a_llama_of(tmp_path, four_bits=four_bits)
    bases = [graph.clone() for graph in decoder.graphs]
    two = everywhere(decoder.found[0], "one", rank=2), everywhere(decoder.found[0], "two", rank=3)
    given: list[dict[str, Arrays]] = []  # of each graph, by adapter
    for graph, found in zip(decoder.graphs, decoder.found, strict=True):
        steps = plan.make(two, found.specs, one_at_a_time=True)
        weights = [step.weight for step in steps.steps]
        contract = insert_inputs(graph, found, weights, dora=weights)
        names = [adapter.name for adapter in two]
        factors = {name: contract_dora_factors(graph, contract, steps, name) for name in names}
        given.append({name: onnx_adapter.input_values(contract, steps, name, factors[name]) for name in names})
    ids = np.random.default_rng(1).integers(0, 50, (3, 9))
    for adapter in two:
        # One adapter's file serves both graphs.
        assert {key: array.tobytes() for key, array in given[0][adapter.name].items()} == {
            key: array.tobytes() for key, array in given[1][adapter.name].items()
        }
        expected = eager(attached(decoder.module, adapter), {"input_ids": torch.from_numpy(ids)})["logits"]
        logits = decoded(*decoder.graphs, ids, start=5, **given[0][adapter.name])
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    assert decoded(*decoder.graphs, ids, start=5).tobytes() == decoded(*bases, ids, start=5).tobytes()
