"""Experts in graphs: a stacked weight that is split into one product for each expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_export
from lora_export.api.convert import convert
from lora_export.errors import InputRefused, MatchError
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import LoraPair, expert_name
from lora_export.plan import Layout
from lora_export.weights.checkpoint import open_checkpoint
from support import experts
from support.graphs import Arrays, a_graph, an_adapter, planned, run, stored
from support.handmade import peft_adapter
from support.insertion import with_reversed_rows
from support.peft_folders import A_KEY, B_KEY, with_tensors

UP = "m.experts.up_proj"
COUNT, OUT, IN = 3, 2, 4
WEIGHT = np.arange(COUNT * OUT * IN, dtype=np.float32).reshape(COUNT, OUT, IN) - 11
X = np.array([[1, -2, 3, 1], [0, 2, -1, 2]], np.float32)


def text(array: Any) -> str:
    return ", ".join(map(str, np.ravel(array).tolist()))


def splitting(axes: str = "0", *, transposed: bool = True) -> ir.Model:
    """x·W[e]ᵀ for each expert e, as transformers' exporter writes it."""
    shape = WEIGHT.shape if transposed else (COUNT, IN, OUT)
    weight = WEIGHT if transposed else WEIGHT.transpose(0, 2, 1)
    first = "t = Transpose <perm = [0, 2, 1]> (m.experts.up_proj)" if transposed else "t = Identity (m.experts.up_proj)"
    body = " ".join(f"w{e} = Squeeze (p{e}, axes) y{e} = MatMul (x, w{e})" for e in range(COUNT))
    outputs = ", ".join(f"float[2, {OUT}] y{e}" for e in range(COUNT))
    return a_graph(
        f"""g (float[2, {IN}] x) => ({outputs})
        <float[{", ".join(map(str, shape))}] m.experts.up_proj = {{{text(weight)}}}, int64[1] axes = {{{axes}}}>
        {{ {first} p0, p1, p2 = Split <axis = 0, num_outputs = 3> (t) {body} }}"""
    )


def pairs_of(*numbers: int, transposed: bool = True) -> dict[str, LoraPair]:
    rng = np.random.default_rng(1)
    found = {}
    for expert in numbers:
        a, b = (rng.integers(-3, 4, size).astype(np.float32) for size in ((1, IN), (OUT, 1)))
        stored_a, stored_b = (a, b) if transposed else (b.T, a.T)
        found[expert_name(UP, expert)] = LoraPair(a=stored_a, b=stored_b, scale=2.0, as_stored=True)
    return found


def expected(pairs: dict[str, LoraPair], *, transposed: bool = True) -> Arrays:
    products = {}
    for expert in range(COUNT):
        weight = WEIGHT[expert].astype(np.float64)
        if (pair := pairs.get(expert_name(UP, expert))) is not None:
            weight = weight + (pair.delta() if transposed else pair.delta().T)
        products[f"y{expert}"] = X @ weight.T
    return products


@pytest.mark.parametrize("transposed", [True, False])
def test_each_expert_is_a_site_of_its_own(transposed):
    found = find_sites(splitting(transposed=transposed))
    assert list(found.by_name) == [expert_name(UP, expert) for expert in range(COUNT)]
    for expert, (site,) in enumerate(found.by_name.values()):
        assert (site.expert, site.node.outputs[0].name, site.is_linear) == (expert, f"y{expert}", True)
        assert site.layout is (Layout.OUT_IN if transposed else Layout.IN_OUT)
        np.testing.assert_array_equal(site.matrix, WEIGHT[expert])


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("change", [fold_graph, insert_nodes])
def test_pairs_of_some_experts_change_their_products_alone(change, transposed):
    model, pairs = splitting(transposed=transposed), pairs_of(0, 2, transposed=transposed)
    change(model, *planned(model, an_adapter(pairs)))
    for name, value in run(model, x=X).items():
        np.testing.assert_array_equal(value, expected(pairs, transposed=transposed)[name])
    kept = stored(model, UP)
    np.testing.assert_array_equal(kept[1], WEIGHT[1] if transposed else WEIGHT[1].T)


def test_a_split_whose_parts_are_not_squeezed_is_no_expert():
    model = splitting()
    for node in list(model.graph):
        if node.op_type == "Squeeze" and node.outputs[0].name == "w1":
            node.replace_input_with(1, None)
    assert expert_name(UP, 1) not in find_sites(model).by_name
    with pytest.raises(MatchError):
        planned(model, an_adapter(pairs_of(0, 1)))


def test_an_expert_that_is_gathered_is_a_site():
    model = a_graph(
        f"""g (float[2, {IN}] x) => (float[2, {OUT}] y)
        <float[{COUNT}, {OUT}, {IN}] m.experts.up_proj = {{{text(WEIGHT)}}}, int64 two = {{2}}>
        {{ w = Gather <axis = 0> (m.experts.up_proj, two) t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }}"""
    )
    pairs = pairs_of(2)
    fold_graph(model, *planned(model, an_adapter(pairs)))
    np.testing.assert_array_equal(run(model, x=X)["y"], expected(pairs)["y2"])


def read_whole(weight: str = UP) -> ir.Model:
    """x·W for all experts in one node, for weights of (experts, in, out)."""
    return a_graph(
        f"""g (float[{COUNT}, 2, {IN}] x) => (float[{COUNT}, 2, {OUT}] y)
        <float[{COUNT}, {IN}, {OUT}] {weight} = {{{text(WEIGHT.transpose(0, 2, 1))}}}>
        {{ y = MatMul (x, {weight}) }}"""
    )


def test_a_weight_read_as_a_whole_is_merged_by_name():
    model, pairs = read_whole(), pairs_of(0, 2, transposed=False)
    fold_graph(model, *planned(model, an_adapter(pairs)))
    found, changes = run(model, x=np.stack([X] * COUNT))["y"], expected(pairs, transposed=False)
    np.testing.assert_array_equal(found, np.stack([changes[f"y{expert}"] for expert in range(COUNT)]))


def test_no_branch_is_inserted_beside_a_weight_read_as_a_whole():
    model = read_whole()
    with pytest.raises(InputRefused, match=f"{UP} is read by MatMul with the weights of all experts"):
        insert_nodes(model, *planned(model, an_adapter(pairs_of(0, transposed=False))))


def test_no_input_is_added_beside_a_weight_read_as_a_whole(tmp_path):
    ir.save(read_whole(), tmp_path / "base.onnx")
    a, b = np.ones((COUNT, OUT)), np.ones((IN, COUNT))  # of rank 1: the product has the shape (in, out) of an expert
    tensors = {"m.experts.lora_A.weight": a, "m.experts.lora_B.weight": b}
    config = {"target_parameters": ["experts.up_proj"], "target_modules": [], "peft_version": "0.21.2", "r": 1}
    adapter = with_tensors(tmp_path / "adapter", {f"base_model.model.{key}": value for key, value in tensors.items()}
                           | {A_KEY: None, B_KEY: None}, **config)  # fmt: skip
    for mode in ("nodes", "inputs", "rows"):
        with pytest.raises(InputRefused, match=f"{UP} is read by MatMul with the weights of all experts"):
            lora_export.export_onnx(tmp_path / "base.onnx", tmp_path / "m.onnx", adapters=[adapter], lora=mode)
    assert not (tmp_path / "m.onnx").exists()


def test_a_weight_that_an_exporter_changed_is_not_merged():
    model = a_graph(
        f"""g (float[{COUNT}, 2, {IN}] x) => (float[{COUNT}, 2, {OUT}] y)
        <float[{COUNT}, {IN}, {OUT}] val_3 = {{{text(WEIGHT)}}}> {{ y = MatMul (x, val_3) }}""",
        val_3=UP,
    )
    with pytest.raises(InputRefused, match=r"up_proj\[0\] is a part of val_3, and the exporter changed it"):
        fold_graph(model, *planned(model, an_adapter(pairs_of(0, transposed=False))))


def test_experts_in_one_operator_are_refused_by_its_name(tmp_path):
    model = read_whole("val_1")
    (node,) = model.graph
    node.op_type, node.domain = "MoE", "com.microsoft"
    model.opset_imports["com.microsoft"] = 1
    ir.save(model, tmp_path / "moe.onnx")
    adapter = peft_adapter(tmp_path / "adapter", {"m.fc": (np.ones((1, 4)), np.ones((4, 1)))})
    with pytest.raises(MatchError, match=r"1 com\.microsoft::MoE nodes .* Merge it into the checkpoint"):
        lora_export.merge(tmp_path / "moe.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


# --- Exported models ---


class Exported:
    """A model with experts, its adapter, and the graph of the model alone."""

    def __init__(self, folder: Path, name: str):
        self.paths = experts.save(folder, name)
        self.graph = folder / "base.onnx"
        lora_export.export_onnx(self.paths["old"], self.graph, verify=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.mark.slow
def test_inputs_of_experts_are_proven_and_take_another_adapter(exported, tmp_path):
    adapter, graph = exported.paths["adapter"], tmp_path / "model.onnx"
    found = lora_export.export_onnx(exported.paths["old"], graph, adapters=[adapter], lora="inputs")
    assert [proof.verdict.outcome for proof in found.proofs.adapters.values()] == ["same"]
    assert convert(adapter, tmp_path / "again.onnx_adapter", graph=graph).weights == 2 * experts.COUNT + 1


@pytest.fixture(scope="module")
def transposed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model whose experts are stored as (in, out)."""
    return Exported(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merged", "nodes"])
def test_experts_that_are_stored_transposed_are_proven(transposed, tmp_path, mode):
    adapter, reference = transposed.paths["adapter"], transposed.paths["old"]
    output = tmp_path / "model.onnx"
    found = lora_export.export_onnx(transposed.graph, output, adapters=[adapter], lora=mode, reference=reference)
    assert found.proof.verdict.outcome == "same"


def of_flattened_batch(model: ir.Model, reader: ir.Node) -> None:
    """The ids of one expert as they are before the tokens are sorted: the first ones, in the order of the batch."""
    flat = reader.inputs[1]
    while (node := flat.producer()).op_type in ("Gather", "GatherND", "Concat"):
        flat = node.inputs[0]
    length = ir.node("Shape", [reader.inputs[1]])
    zero = ir.node("Constant", [], {"value": ir.tensor([0], ir.DataType.INT64)})
    first = ir.node("Slice", [flat, zero.outputs[0], length.outputs[0]])
    model.graph.insert_after(reader.inputs[1].producer(), [length, zero, first])
    reader.replace_input_with(1, first.outputs[0])


def of_other_rows(model: ir.Model, reader: ir.Node) -> None:
    with_reversed_rows(model, reader.inputs[1], [(reader, 1)])


@pytest.mark.slow
def test_tokens_of_experts_have_the_adapters_of_their_rows(exported, tmp_path):
    graph, adapter, reference = tmp_path / "m.onnx", exported.paths["adapter"], exported.paths["old"]
    found = lora_export.export_onnx(
        exported.graph, graph, adapters=[f"x={adapter}"], lora="slots", slots=2, max_rank=2, reference=reference
    )
    proofs = [*found.proofs.adapters.values(), found.proofs.mixed, found.proofs.moved]
    assert [proof.verdict.outcome for proof in proofs] == ["same"] * 3 and found.proofs.unlike_base == []
    for number, fault in enumerate((of_flattened_batch, of_other_rows)):
        model, wrong = load_graph(graph), tmp_path / f"{number}"
        stack = next(value for value in model.graph.inputs if value.name.endswith("experts.down_proj[1].lora_B.weight"))
        fault(model, next(node for node, _ in stack.uses()))
        wrong.mkdir()
        save_graph(model, wrong, "m.onnx")
        verdict = lora_export.verify(wrong / "m.onnx", reference, adapters=[f"x={adapter}"]).verdict
        assert verdict.outcome == "different", fault


@pytest.mark.parametrize("origin", [None, "old", "new"])
@pytest.mark.parametrize("mode", ["merged", "nodes"])
def test_an_existing_graph_takes_experts(exported, tmp_path, mode, origin):
    base = None if origin is None else exported.paths[origin]
    output = tmp_path / "model.onnx"
    found = lora_export.export_onnx(
        exported.graph, output, adapters=[exported.paths["adapter"]], lora=mode, checkpoint=base, verify=origin is None
    )
    assert found.proof is None or found.proof.verdict.outcome == "same"
    has_logits_of(exported.paths["merged_old"], output)


def test_a_router_of_experts_has_its_nodes(tmp_path):
    parameters = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    paths, output = experts.save(tmp_path / "olmoe", "olmoe", target_parameters=parameters), tmp_path / "model.onnx"
    lora_export.export_onnx(paths["old"], output, adapters=[paths["adapter"]], lora="nodes", verify=False)
    has_logits_of(paths["merged_old"], output)


def has_logits_of(merged: Path, graph: Path) -> None:
    ids = np.array([[3, 9, 27], [5, 15, 45]])
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    names = {value.name for value in load_graph(graph).graph.inputs}
    (own, *_) = run(load_graph(graph), **{name: value for name, value in feeds.items() if name in names}).values()
    np.testing.assert_allclose(own, logits, atol=1e-5)


@pytest.mark.parametrize("kept", [("2.w1", "2.w3", "1.w1", "0.w2"), ()], ids=["some", "all"])
def test_pairs_of_single_projections_land_on_experts(exported, tmp_path, kept):
    """The graph has gate and up of an expert as one weight, and the adapter has a pair for each, or for one of them."""
    adapter, output = experts.of_single_experts(exported.paths["adapter"], tmp_path / "a", kept), tmp_path / "m.onnx"
    names_from = exported.paths["new"]
    lora_export.export_onnx(exported.graph, output, adapters=[adapter], checkpoint=names_from, verify=False)
    lora_export.merge(names_from, adapter, tmp_path / "merged")
    before, after = (load_graph(path).graph.initializers for path in (exported.graph, output))
    merged, changed = load_file(tmp_path / "merged" / "model.safetensors"), 0
    for name, value in merged.items():
        if "experts" in name:
            np.testing.assert_allclose(after[name].const_value.numpy(), value, rtol=0, atol=1e-6)
            changed += not np.array_equal(before[name].const_value.numpy(), value)
    assert changed == 2


def test_experts_of_a_checkpoint_are_compared_by_name(exported, tmp_path):
    model = load_graph(exported.graph)
    notes = find_sites(model, open_checkpoint(exported.paths["new"])).notes
    assert not [note for note in notes if "_proj" in note]
    tensors = load_file(exported.paths["new"] / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj"][2] += 1
    (tmp_path / "config.json").write_bytes((exported.paths["new"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRefused, match=r"experts\.down_proj\[2\] by initializer, no tensor by content"):
        find_sites(model, open_checkpoint(tmp_path))


def test_a_streamed_merge_has_the_bits_of_one_in_memory(exported, tmp_path):
    model = load_graph(exported.graph)
    data = tmp_path / "data"
    data.mkdir()
    ir.save(model, data / "base.onnx", external_data="base.onnx.data", size_threshold_bytes=0)
    lora_export.merge(data / "base.onnx", exported.paths["adapter"], tmp_path / "streamed.onnx")
    lora_export.merge(exported.graph, exported.paths["adapter"], tmp_path / "memory.onnx")
    streamed, memory = (load_graph(tmp_path / f"{name}.onnx").graph.initializers for name in ("streamed", "memory"))
    before = load_graph(exported.graph).graph.initializers
    changed = [name for name in before if name.endswith("_proj") and "experts" in name]
    assert len(changed) == 2
    for name in changed:
        values = [table[name].const_value.numpy() for table in (streamed, memory, before)]
        np.testing.assert_array_equal(values[0], values[1])
        assert all((values[0][expert] != values[2][expert]).any() for expert in range(experts.COUNT))
