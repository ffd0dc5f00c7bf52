"""onnxruntime-genai: graphs of its builder, and the tokens that genai generates with an adapter in them.

The reference is PEFT's model, with the tokens that transformers generates from it greedily.
"""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from torch import nn

from lora_export import export_onnx, formats, plan
from lora_export.cli import run
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.weights.checkpoint import open_checkpoint
from support.cli import answer
from support.exporters import (
    VOCABULARY_SIZE,
    a_llama,
    assert_computes_merged_model,
    assert_folds_like_pytorch,
    checkpoint_of,
    linear_weights,
    model_of,
    save_adapter,
    save_tokenizer,
)
from support.genai import GENERATED_TOKENS, build_genai_graph
from support.peft_models import fill

genai: Any = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

PROMPT = [5, 9, 11, 30]
slow = pytest.mark.slow
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The builder's graph of the Llama in support.exporters, in this precision."""
    folder = tmp_path_factory.mktemp("genai")
    save_tokenizer(checkpoint_of("llama"))
    return functools.cache(lambda precision: build_genai_graph(checkpoint_of("llama"), folder / precision, precision))


@slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_graph_of_builder_is_named_by_content(precision: str, built: Build) -> None:
    model = load_graph(built(precision))
    assert not find_sites(model).linear
    found = find_sites(model, open_checkpoint(checkpoint_of("llama")))
    weights = linear_weights(model_of("llama"))
    assert {site.name for site in found.linear} == weights.keys()
    assert sum(site.block is not None for site in found.linear) == 6
    for site in found.linear:
        error = np.linalg.norm(site.matrix - weights[site.name]) / np.linalg.norm(weights[site.name])
        assert error == 0 if precision == "fp32" else 0.01 < error < 0.2


@slow
def test_folded_graph_of_builder_equals_pytorch(built: Build, tmp_path: Path) -> None:
    assert_folds_like_pytorch(built("fp32"), "llama", tmp_path / "folded")


# --- generation ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that generates many different tokens."""
    torch.manual_seed(0)
    module, folder = a_llama(), tmp_path_factory.mktemp("base")
    module.config.max_position_embeddings = 2 * GENERATED_TOKENS
    for weight in module.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    module.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def build_graph(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("graphs")
    return functools.cache(
        lambda *options: build_genai_graph(base, folder / "-".join(options).replace("=", "_"), *options)
    )


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[peft.PeftModel, Path]:
    """PEFT's model with an adapter on every linear layer, and the folder of the adapter."""
    folder = tmp_path_factory.mktemp("adapters") / "pirate"
    model = peft.get_peft_model(pytorch(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    generator = torch.Generator().manual_seed(1)
    fill(model, std=0.25, generator=generator)
    model.save_pretrained(folder)
    return model, folder


def pytorch(base: Path) -> Any:
    return type(a_llama()).from_pretrained(base).eval()


def pytorch_tokens(module: Any) -> list[int]:
    """The tokens that PyTorch generates greedily."""
    ids = torch.tensor([PROMPT])
    # A minimum length prevents an early end token.
    tokens = module.generate(
        input_ids=ids, do_sample=False, min_new_tokens=GENERATED_TOKENS, max_new_tokens=GENERATED_TOKENS, pad_token_id=0
    )
    return tokens[0, len(PROMPT) :].tolist()


def generated(folder: Path, adapter: Path | None = None) -> list[int]:
    """The tokens that genai generates greedily, with an .onnx_adapter file."""
    model = genai.Model(str(folder))
    parameters, length = genai.GeneratorParams(model), len(PROMPT) + GENERATED_TOKENS
    parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = genai.Generator(model, parameters)
    if adapter is not None:
        adapters = genai.Adapters(model)
        adapters.load(str(adapter), "pirate")
        generator.set_active_adapter(adapters, "pirate")
    generator.append_tokens(np.array([PROMPT], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]


def genai_folder(graph: Path, folder: Path) -> Path:
    """A copy of the builder's folder without its graph."""
    folder.mkdir()
    for path in graph.parent.iterdir():
        if not path.name.startswith("model.onnx"):
            shutil.copy(path, folder)
    return folder


def load_with_sites(graph: Path, base: Path) -> tuple[ir.Model, Sites]:
    model = load_graph(graph)
    return model, find_sites(model, open_checkpoint(base))


def assert_generates(tokens: list[int], module: Any, other: Any) -> None:
    """The tokens are those of `module`, not those of `other`, and of some variety."""
    expected = pytorch_tokens(module)
    assert tokens == expected
    assert len(set(expected)) > 10
    assert expected != pytorch_tokens(other)


def insert_and_write_adapter(model: ir.Model, found: Sites, adapter: Adapter, folder: Path) -> Path:
    """Insert inputs for adapters into the graph, and write this adapter into the folder."""
    steps = plan.make([adapter], found.specs)
    contract = insert_inputs(model, found, [step.weight for step in steps.steps], names="genai")
    path = folder / "pirate.onnx_adapter"
    onnx_adapter.write(path, onnx_adapter.input_values(contract, steps, adapter.name), contract, sha256=adapter.sha256)
    return path


# The default accuracy_level, 4, rounds the inputs of layers to 8 bits, which changes tokens by itself.
FP32, INT4 = ("fp32",), ("int4", "accuracy_level=1")


@slow
@pytest.mark.parametrize(
    ("precision", "mode"), [(FP32, "merged"), (FP32, "nodes"), (FP32, "inputs"), (INT4, "nodes"), (INT4, "inputs")]
)
def test_genai_generates_the_tokens_of_pytorch_with_the_adapter(
    precision: tuple[str, ...], mode: str, base: Path, build_graph: Build, adapted: tuple[Any, Path], tmp_path: Path
) -> None:
    graph, (module, adapter) = build_graph(*precision), adapted
    folder, file = genai_folder(graph, tmp_path / "out"), None
    reference, other = module, pytorch(base)
    if mode == "merged":
        assert run(["merge", str(graph), str(adapter), "-o", str(folder / "model.onnx"), "--base", str(base)]) == 0
    else:
        model, found = load_with_sites(graph, base)
        if precision == INT4:
            reference, other = with_weights(module, {site.name: site.matrix for site in found.linear}), module
        if mode == "nodes":
            insert_nodes(model, found, plan.make([formats.load(adapter)], found.specs))
        else:
            file = insert_and_write_adapter(model, found, formats.load(adapter), folder)
        save_graph(model, folder, "model.onnx")
    assert_generates(generated(folder, file), reference, other)
    if precision == FP32 and mode != "nodes":
        assert generated(folder if file else graph.parent) == pytorch_tokens(pytorch(base))


@slow
@pytest.mark.parametrize("precision", [FP32, INT4], ids=["fp32", "int4"])
def test_rows_of_builder_graph_decode_with_their_adapters(
    precision: tuple[str, ...], base: Path, build_graph: Build, adapted: tuple[peft.PeftModel, Path], tmp_path: Path
) -> None:
    module, adapter = adapted
    model, found = load_with_sites(build_graph(*precision), base)
    module = with_weights(module, {site.name: site.matrix for site in found.linear})
    insert_rows(model, found, plan.make([formats.load(adapter)], found.specs, one_at_a_time=True))
    head = module.config.hidden_size // module.config.num_attention_heads
    for value in (*model.graph.inputs, *model.graph.outputs):
        if "key_values" in (value.name or "") or "present" in (value.name or ""):
            value.shape = ir.Shape([*value.shape[:3], head])  # which the builder leaves out
    save_graph(model, tmp_path, "rows.onnx")
    ids = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (4, 9))
    runner = with_cache(OnnxRunner(tmp_path / "rows.onnx").with_rows([1, 0, 0, 1]))
    output = runner.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    with torch.no_grad():
        on = module(torch.from_numpy(ids)).logits.numpy()
        with module.disable_adapter():
            off = module(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(output, np.stack([on[0], off[1], off[2], on[3]]), rtol=1e-3, atol=1e-3)
    assert np.abs(on - off).max() > 1


@slow
def test_slots_of_builder_graph_are_inputs_of_genai(
    base: Path, build_graph: Build, adapted: tuple[peft.PeftModel, Path], tmp_path: Path
) -> None:
    module, adapter = adapted
    options: dict[str, Any] = {"lora": "slots", "slots": 2, "max_rank": 8, "checkpoint": base, "verify": False}
    export_onnx(build_graph(*FP32), tmp_path / "m.onnx", adapters=adapter, **options)
    model = genai.Model(str(tmp_path))
    parameters, length = genai.GeneratorParams(model), len(PROMPT) + GENERATED_TOKENS
    parameters.set_search_options(do_sample=False, batch_size=3, min_length=length, max_length=length)
    inputs: dict[str, Any] = {"adapter_ids": np.array([2, 0, 2])}  # genai reads these arrays until the end
    for name, value in onnx_adapter.read(tmp_path / "pirate.onnx_adapter").values.items():
        inputs[name] = np.zeros((3, *value.shape()), np.float32)
        inputs[name][2] = value.numpy()
    generator = genai.Generator(model, parameters)
    for name, array in inputs.items():
        generator.set_model_input(name, array)
    generator.append_tokens(np.array([PROMPT] * 3, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [[int(token) for token in generator.get_sequence(row)][len(PROMPT) :] for row in range(3)]
    assert found == [pytorch_tokens(each) for each in (module, pytorch(base), module)]
    assert found[0] != found[1]


def with_weights(module: peft.PeftModel, weights: dict[str, Any]) -> peft.PeftModel:
    """PEFT's model with other base weights."""
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for name, weight in weights.items():
            layer = changed.base_model.model.get_submodule(name.removesuffix(".weight"))
            getattr(layer, "base_layer", layer).weight.copy_(torch.from_numpy(np.array(weight)))
    return changed


# --- the command, without a PyTorch model ---


@slow
@pytest.mark.parametrize(
    ("precision", "mode"),
    [("fp32", "merged"), ("fp32", "nodes"), ("int4", "nodes"), ("int4", "inputs"), ("int4", "rows")],
)
def test_command_verifies_graph_of_builder_with_cache(
    precision: str, mode: str, built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = save_adapter("llama", tmp_path / "a"), tmp_path / "out.onnx"
    arguments = ("onnx", built(precision), "-a", adapter, "--base", checkpoint_of("llama"), "--lora", mode, "-o", out)
    code, document = answer(capsys, *arguments)
    assert code == 0
    proofs = [document["proof"], *document.get("adapters", {}).values()]
    assert {proof["outcome"] for proof in proofs} == {"same"}
    cases = {comparison["case"] for comparison in document["proof"]["comparisons"]}
    prompts = {"batch 1 x length 5 after 0", "batch 2 x length 1 after 0", "batch 4 x length 29 after 0"}
    assert cases == {*prompts, "batch 3 x length 1 after 5"}
    if precision == "fp32":
        assert_computes_merged_model(out, "llama", adapter)
