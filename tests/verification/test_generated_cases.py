"""What the generated inputs reach: exports that are wrong only at some sizes or for some values are not `same`."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from defects import subjects
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models.cached_decoder import export_decoder
from lora_export.models.export import to_onnx
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove
from support.generators import small_decoder
from support.graphs import a_graph
from support.slow import slow
from support.small_models import small_model

pytestmark = pytest.mark.usefixtures("undiagnosed")


def proof_of(graph: ir.Model, model: Model, folder: Path) -> Proof:
    folder.mkdir()
    save_graph(graph, folder, "m.onnx")
    return prove(with_cache(OnnxRunner(folder / "m.onnx")), PyTorchReferences(model))


def verdict_of(graph: ir.Model, model: Model, folder: Path) -> parity.Verdict:
    return proof_of(graph, model, folder).verdict


def exported(model: Model) -> ir.Model:
    return to_onnx(model.module, model.example_inputs(), axes=model.axes)


@functools.cache
def subject(name: str) -> tuple[Model, ir.Model]:
    """A model and its export, which no test changes."""
    if name == "llama":
        return subjects.loaded(name), subjects._exported(name)  # which other tests need, too
    model = load_model(str(small_model(name, Path(tempfile.mkdtemp()) / "base")))
    return model, exported(model)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_a_right_export_is_same(name: str, tmp_path: Path) -> None:
    model, graph = subject(name)
    assert verdict_of(graph.clone(), model, tmp_path / "right").same


# --- values --------------------------------------------------------------------------------------


def with_clip(graph: ir.Model, name: str, limit: float) -> ir.Model:
    """The graph with an input that is clipped to [-limit, limit]."""
    (value,) = (value for value in graph.graph.inputs if value.name == name)
    bounds = []
    for bound in (-limit, limit):
        tensor = ir.Tensor(np.array(bound, np.float32), name=f"bound{bound}")
        type_ = ir.TensorType(tensor.dtype)
        bounds.append(ir.Value(name=tensor.name, const_value=tensor, type=type_, shape=tensor.shape))
        graph.graph.initializers[f"bound{bound}"] = bounds[-1]
    readers = list(value.uses())
    clip = ir.node("Clip", [value, *bounds])
    clip.outputs[0].name, clip.outputs[0].type, clip.outputs[0].shape = f"{name}.clipped", value.type, value.shape
    for node, index in readers:
        node.replace_input_with(index, clip.outputs[0])
    graph.graph.insert_before(graph.graph[0], clip)
    return graph


@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_clipped_pixels_are_different(limit: float, tmp_path: Path) -> None:
    model, graph = subject("vit")
    clipped = with_clip(graph.clone(), "pixel_values", limit)
    assert verdict_of(clipped, model, tmp_path / "wrong").outcome is parity.Outcome.DIFFERENT


def test_few_clipped_pixels_are_found_before_the_first_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # `undiagnosed`
    model, graph = subject("vit")
    proof = proof_of(with_clip(graph.clone(), "pixel_values", 3.0), model, tmp_path / "wrong")
    assert proof.verdict.outcome is parity.Outcome.DIFFERENT and proof.diagnosis is not None
    assert proof.diagnosis.first == "vit.embeddings.patch_embeddings.projection"
    assert proof.diagnosis.why.startswith("its input differs already")


# --- sizes ---------------------------------------------------------------------------------------


# What a graph is wrong for: ONNX nodes that compute it from the inputs, as a number or a boolean named `is_wrong`
ROWS, TOKENS = (f"size = Shape <start = {axis}, end = {axis + 1}> (input_ids)" for axis in (0, 1))
PAST = "past = Shape <start = 2, end = 3> (past_key_values.0.key) zero = Constant <value = int64[1] {0}> ()"
ONE = "one = Constant <value = int64[1] {1}> ()"
WRONG = {
    "batches of four": f"{ROWS} four = Constant <value = int64[1] {{4}}> () is_wrong = Equal (size, four)",
    "more than 50 tokens": f"{TOKENS} many = Constant <value = int64[1] {{50}}> () is_wrong = Greater (size, many)",
    "one token": f"{TOKENS} {ONE} is_wrong = Equal (size, one)",
    "fewer than 6 tokens": f"""{TOKENS} {ONE} six = Constant <value = int64[1] {{6}}> ()
        few = Less (size, six) some = Greater (size, one) is_wrong = And (few, some)""",
    "no padding": "is_wrong = ReduceMin <keepdims = 0> (attention_mask)",
    "padding of one row": f"""{ROWS} {ONE} alone = Equal (size, one) all = ReduceMin <keepdims = 0> (attention_mask)
        every = Cast <to = 9> (all) some = Not (every) is_wrong = And (alone, some)""",
    "a hole in the mask": f"""{ONE} before = CumSum (attention_mask, one)
        after = CumSum <reverse = 1> (attention_mask, one)
        both = Mul (before, after) among = Sign (both) hidden = Sub (one, attention_mask) holes = Mul (among, hidden)
        is_wrong = ReduceMax <keepdims = 0> (holes)""",
    "token types of zero": """most = ReduceMax <keepdims = 0> (token_type_ids)
        none = Constant <value = int64 {0}> () is_wrong = Equal (most, none)""",
    "a second turn": f"""{TOKENS} {PAST} {ONE} several = Greater (size, one) after = Greater (past, zero)
        is_wrong = And (several, after)""",
    "a prompt of one token": f"""{TOKENS} {PAST} {ONE} single = Equal (size, one) first = Equal (past, zero)
        is_wrong = And (single, first)""",
    "a cache of 31 to 47": f"""{PAST} low = Constant <value = int64[1] {{31}}> ()
        high = Constant <value = int64[1] {{47}}> ()
        above = GreaterOrEqual (past, low) below = LessOrEqual (past, high) is_wrong = And (above, below)""",
}


def wrong_for(graph: ir.Model, what: str) -> ir.Model:
    """The graph whose first output is 1 greater for some inputs."""
    own = {str(value.name): value for value in graph.graph.inputs}
    declared = ", ".join(f"int64[a, b] {name}" for name in own)
    part = a_graph(f"wrong ({declared}) => (float error) {{ {WRONG[what]} error = Cast <to = 1> (is_wrong) }}")
    (error,) = part.graph.outputs
    for value, name in zip(part.graph.inputs, own, strict=True):
        for node, index in list(value.uses()):
            node.replace_input_with(index, own[name])
    nodes = list(part.graph)
    part.graph.outputs.clear()
    part.graph.remove(nodes)
    for number, made in enumerate(value for node in nodes for value in node.outputs):
        made.name = f"wrong.{number}"
    output = graph.graph.outputs[0]
    total = ir.node("Add", [output, error])
    total.outputs[0].name, output.name = output.name, f"{output.name}.right"
    total.outputs[0].type, total.outputs[0].shape = output.type, output.shape
    graph.graph.extend([*nodes, total])
    graph.graph.outputs[0] = total.outputs[0]
    return graph


OF_CACHES = ("a second turn", "a prompt of one token", "a cache of 31 to 47")
OF_TEXTS = sorted(WRONG.keys() - {*OF_CACHES, "token types of zero"})


OF_DECODERS = ("a hole in the mask", "one token", "padding of one row")  # whose positions depend on the mask


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("bert", what) for what in (*OF_TEXTS, "token types of zero")),
        *(("llama", what) if what in OF_DECODERS else slow("llama", what) for what in OF_TEXTS),
    ],
)
def test_graph_that_is_wrong_for_some_inputs_is_different(name: str, what: str, tmp_path: Path) -> None:
    model, graph = subject(name)
    wrong = verdict_of(wrong_for(graph.clone(), what), model, tmp_path / "wrong")
    assert wrong.outcome is parity.Outcome.DIFFERENT


# --- decoders with a cache ---


@functools.cache
def cached_subject(name: str) -> tuple[Model, ir.Model]:
    """A model and its export with a cache, which no test changes."""
    model = load_model(str(small_decoder(name, Path(tempfile.mkdtemp()) / "base")))
    return model, export_decoder(model.module)


def without_positions(graph: ir.Model) -> ir.Model:
    """The graph with a cache that counts all positions, and reads `position_ids` no more."""
    own = {str(value.name): value for value in graph.graph.inputs}
    bounds = [
        ir.node("Shape", [own[name]], {"start": axis, "end": axis + 1})
        for name, axis in (("past_key_values.0.key", 2), ("attention_mask", 1))
    ]
    axis = ir.node("Constant", [], {"value": ir.tensor([0], ir.DataType.INT64)})
    ends = [ir.node("Squeeze", [bound.outputs[0], axis.outputs[0]]) for bound in bounds]
    step = ir.node("Constant", [], {"value": ir.tensor(1, ir.DataType.INT64)})
    count = ir.node("Range", [ends[0].outputs[0], ends[1].outputs[0], step.outputs[0]])
    row = ir.node("Unsqueeze", [count.outputs[0], axis.outputs[0]])
    for node, index in list(own["position_ids"].uses()):
        node.replace_input_with(index, row.outputs[0])
    nodes = [*bounds, axis, *ends, step, count, row]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"counted.{number}"
    graph.graph.insert_before(graph.graph[0], nodes)
    return graph


@pytest.mark.parametrize("name", ["gpt2", slow("llama")])
def test_right_export_with_a_cache_is_same(name: str, tmp_path: Path) -> None:
    model, graph = cached_subject(name)
    assert verdict_of(graph.clone(), model, tmp_path / "right").same


@pytest.mark.parametrize("what", [*OF_CACHES, "a hole in the mask", "more than 50 tokens"])
def test_graph_with_a_cache_that_is_wrong_for_some_inputs_is_different(what: str, tmp_path: Path) -> None:
    model, graph = cached_subject("gpt2")
    wrong = verdict_of(wrong_for(graph.clone(), what), model, tmp_path / "wrong")
    assert wrong.outcome is parity.Outcome.DIFFERENT


@pytest.mark.parametrize("name", ["gpt2", slow("llama")])
def test_graph_that_ignores_its_positions_is_different(name: str, tmp_path: Path) -> None:
    model, graph = cached_subject(name)
    wrong = verdict_of(without_positions(graph.clone()), model, tmp_path / "wrong")
    assert wrong.outcome is parity.Outcome.DIFFERENT and "changing the input position_ids" in str(wrong)
    assert "error" in {reason.gate for reason in wrong.reasons}, "its outputs are wrong, too"


@pytest.mark.slow
@pytest.mark.parametrize("window", [32, 150])
def test_export_without_its_sliding_window_is_different(window: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=window,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    assert verdict_of(exported(model), model, tmp_path / "right").same
    without = load_model(str(tmp_path / "base"))
    without.module.config.sliding_window = None
    wrong = verdict_of(exported(without), model, tmp_path / "wrong")
    assert wrong.outcome is parity.Outcome.DIFFERENT
    assert {reason.case for reason in wrong.reasons} == {f"batch 1 x sequence {max(96, window + 32)}"}
