"""Graphs with a key/value cache: run as a model without one, and compared step by step."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_export import layers, plan
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import RuntimeRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.models import model
from lora_export.models.load import load_model
from lora_export.runtime.kv_cache import DECODE_STEPS, CacheRunner, turns, undivided, with_cache, with_registered_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove
from lora_export.verification.row_proofs import prove_candidate
from lora_export.weights.checkpoint import open_checkpoint
from support import FACTORIES, RUNNERS
from support.decoders import FEATURES, WORDS, a_graph, a_graph_with_a_state, export_with_cache
from support.handmade import base_file
from support.tiny_models import tiny_llama


def an_adapter() -> Adapter:
    rng = np.random.default_rng(0)
    pair = LoraPair(a=rng.standard_normal((2, FEATURES)), b=rng.standard_normal((3, 2)), scale=0.5)
    return Adapter(name="a", format="test", pairs={"dense": pair}, sha256="0a")


@pytest.fixture(scope="module")
def sums() -> model.Model:
    return load_model(f"{FACTORIES}:sums")


def proven(path: Path, base: model.Model) -> Proof:
    return prove(with_cache(OnnxRunner(path)), PyTorchReferences(base, [an_adapter()]))


@pytest.mark.parametrize("batch", ["[batch", "[2"])
def test_each_run_gets_the_cache_of_the_previous_run(batch: str, sums: model.Model, tmp_path: Path) -> None:
    runner = with_cache(OnnxRunner(a_graph(tmp_path / "m.onnx", sums, ("[batch", batch))))
    assert isinstance(runner, CacheRunner)
    ids = np.arange(14).reshape(2, 7) % WORDS
    mask = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    rows = sums.module.table.weight.detach().numpy()[ids] * mask[..., None]
    expected = rows.cumsum(1) @ sums.module.dense.weight.detach().numpy().T
    outputs = runner.run({"input_ids": ids, "attention_mask": mask})
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-6)


def by_name(path: Path, name: str) -> RegisteredRunner | CacheRunner:
    return with_registered_cache(RegisteredRunner(name, open_artifact(path)))


@pytest.mark.parametrize("name", [f"{RUNNERS}:by_name", "onnx-reference", "openvino"])
def test_a_runner_by_name_gets_the_cache_of_its_previous_run(name: str, sums: model.Model, tmp_path: Path) -> None:
    path = a_graph(tmp_path / "m.onnx", sums)
    with contextlib.closing(by_name(path, name)) as runner:
        assert isinstance(runner, CacheRunner) and runner.placement is None
        ids = np.arange(40).reshape(2, 20) % WORDS
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        expected = with_cache(OnnxRunner(path)).run(inputs)["logits"]
        np.testing.assert_allclose(runner.run(inputs)["logits"], expected, rtol=1e-5, atol=1e-6)
        assert "run by " in runner.notes[0] and "run with its cache: a prompt, then 4 tokens" in runner.notes[1]


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_broken_cache_is_different_by_name_too(is_broken: bool, sums: model.Model, tmp_path: Path) -> None:
    order = ("Concat <axis = 2> (past_key, here)", "Concat <axis = 2> (here, past_key)")
    path = a_graph(tmp_path / "m.onnx", sums, *([order] if is_broken else []), adapter=an_adapter())
    with contextlib.closing(by_name(path, f"{RUNNERS}:by_name")) as runner:
        proof = prove(runner, PyTorchReferences(sums, [an_adapter()]), trace=True)
    assert proof.verdict.outcome is (parity.Outcome.DIFFERENT if is_broken else parity.Outcome.SAME), str(proof.verdict)


@pytest.mark.parametrize("name", ["fills_cache", "fills_cache_and_returns_it", "StatesNoCache", "by_order"])
def test_a_runner_that_fills_the_cache_by_itself_is_run_as_before(name: str, sums: model.Model, tmp_path: Path) -> None:
    path = a_graph(tmp_path / "m.onnx", sums)
    ids = np.arange(40).reshape(2, 20) % WORDS
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with contextlib.closing(by_name(path, f"{RUNNERS}:{name}")) as runner:
        assert isinstance(runner, RegisteredRunner)
        if name == "by_order":  # it has no names by which its next run could get the cache
            with pytest.raises(
                RuntimeRefused, match=r"[Rr]equired inputs \(\['past_key_values\.0\.key'\]\) are missing"
            ):
                runner.run(inputs)
            return
        expected = with_cache(OnnxRunner(path)).run(inputs)["logits"]
        np.testing.assert_allclose(runner.run(inputs)["logits"], expected, rtol=1e-5, atol=1e-6)


def test_prompt_is_one_run_and_each_later_token_another(sums: model.Model, tmp_path: Path) -> None:
    inner = OnnxRunner(a_graph(tmp_path / "m.onnx", sums))
    runner, recorded, run = with_cache(inner), [], inner.run
    inner.run = lambda inputs: (recorded.append({name: value.shape for name, value in inputs.items()}), run(inputs))[1]
    runner.run({"input_ids": np.ones((2, 7), np.int64), "attention_mask": np.ones((2, 7), np.int64)})
    assert [shapes["input_ids"] for shapes in recorded] == [(2, 3), *[(2, 1)] * DECODE_STEPS]
    assert [shapes["attention_mask"] for shapes in recorded] == [(2, length) for length in range(3, 8)]
    assert [shapes["past_key_values.0.key"] for shapes in recorded] == [(2, 1, n, FEATURES) for n in (0, 3, 4, 5, 6)]


def test_longer_texts_are_run_in_turns_too(sums: model.Model, tmp_path: Path) -> None:
    inner = OnnxRunner(a_graph(tmp_path / "m.onnx", sums))
    runner, runs, run = with_cache(inner), [], inner.run
    feeds = {"input_ids": np.arange(80).reshape(2, 40) % WORDS, "attention_mask": np.ones((2, 40), np.int64)}
    right = runner.run(feeds)["logits"]

    def wrong_in_turns(inputs: Any) -> Any:
        runs.append((inputs["past_key_values.0.key"].shape[2], inputs["input_ids"].shape[1]))
        outputs = run(inputs)
        return outputs | {"logits": outputs["logits"] + (len(runs) > 1 + DECODE_STEPS)}

    inner.run = wrong_in_turns
    wrong = runner.run(feeds)["logits"] - right
    assert runs[: 1 + DECODE_STEPS] == [(0, 36), *((past, 1) for past in range(36, 40))]
    assert runs[1 + DECODE_STEPS :] == [(0, 15), (15, 1), (16, 15), (31, 1), (32, 8)]
    assert not wrong[:, ::2].any() and np.allclose(wrong[:, 1::2], 1), "every second position is from the turns"


def test_correct_graph_is_same_and_notes_how_it_ran(sums: model.Model, tmp_path: Path) -> None:
    verdict = proven(a_graph(tmp_path / "m.onnx", sums, adapter=an_adapter()), sums).verdict
    assert verdict.same, str(verdict)
    assert f"run with its cache: a prompt, then {DECODE_STEPS} tokens one by one" in verdict.notes
    assert {each.input for each in verdict.sensitivity} == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "change",
    [
        ("kept = Mul (present_key, mask)", "kept = Identity (present_key)"),  # the mask is ignored
        ("Concat <axis = 2> (past_key, here)", "Concat <axis = 2> (here, past_key)"),  # stored in the wrong order
        ("Slice (sums, before, end, two)", "Slice (sums, zero, many, two)"),  # the outputs of other positions
    ],
    ids=["mask", "order", "positions"],
)
def test_graph_with_a_broken_cache_is_different(change: tuple[str, str], sums: model.Model, tmp_path: Path) -> None:
    path = a_graph(tmp_path / "m.onnx", sums, change, adapter=an_adapter())
    verdict = proven(path, sums).verdict
    assert verdict.outcome is parity.Outcome.DIFFERENT, str(verdict)


def test_strengths_are_chosen_behind_the_cache(sums: model.Model, tmp_path: Path) -> None:
    graph = load_graph(a_graph(tmp_path / "m.onnx", sums))
    named = {name: value.detach().numpy() for name, value in sums.module.named_parameters()}
    found = find_sites(graph, open_checkpoint(base_file(tmp_path / "base.safetensors", named)))
    insert_nodes(graph, found, plan.make([an_adapter()], found.specs), strength_input=True)
    ir.save(graph, tmp_path / "nodes.onnx")
    runner = with_cache(OnnxRunner(tmp_path / "nodes.onnx"))
    assert isinstance(runner, CacheRunner) and runner.adapters_with_strength == ["a"]
    verdict = prove_candidate(runner, PyTorchReferences(sums, [an_adapter()])).verdict
    assert verdict.same and any("other strengths" in one.case for one in verdict.comparisons)


def test_graph_without_the_adapter_is_different(sums: model.Model, tmp_path: Path) -> None:
    assert proven(a_graph(tmp_path / "m.onnx", sums), sums).verdict.outcome is parity.Outcome.DIFFERENT


def test_output_for_the_last_token_alone_is_refused(sums: model.Model, tmp_path: Path) -> None:
    last = ("Slice (sums, before, end, two)", "Slice (sums, last, end, two)")
    runner = with_cache(OnnxRunner(a_graph(tmp_path / "m.onnx", sums, last)))
    with pytest.raises(RuntimeRefused, match=r"returns logits \[1, 1, 3\] for 3 tokens"):
        runner.run({"input_ids": np.ones((1, 7), np.int64), "attention_mask": np.ones((1, 7), np.int64)})


def test_model_without_token_ids_is_refused(sums: model.Model, tmp_path: Path) -> None:
    runner = with_cache(OnnxRunner(a_graph(tmp_path / "m.onnx", sums)))
    with pytest.raises(RuntimeRefused, match="the graph takes input_ids; the model takes pixels"):
        runner.run({"pixels": np.ones((1, 7), np.float32)})


def test_graph_with_a_state_runs_token_by_token_without_padding(tmp_path: Path) -> None:
    runner = with_cache(OnnxRunner(a_graph_with_a_state(tmp_path / "m.onnx")))
    assert isinstance(runner, CacheRunner) and not runner.takes_padding and not runner.cache[0].grows
    assert runner.run({"input_ids": np.array([[1, 2, 3, 4]])})["logits"].ravel().tolist() == [1, 3, 6, 10]
    assert runner.notes == [
        "run with its cache: token by token",
        "every token changes the state of the graph, padding too: none was tried",
    ]


def test_graph_without_a_cache_is_returned_unchanged(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[b, 2, 2] x) => (float[b, 2, 2] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    runner = OnnxRunner(tmp_path / "m.onnx")
    assert with_cache(runner) is runner


# --- a graph that an exporter made ---------------------------------------------------------------


@pytest.mark.slow
def test_exported_llama_with_cache_is_same_and_diagnosed(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_key_value_heads=1, intermediate_size=64)
    model.save_pretrained(tmp_path / "llama")
    base = load_model(str(tmp_path / "llama"))
    rng = np.random.default_rng(1)
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj": LoraPair(
            a=rng.standard_normal((2, 32)), b=rng.standard_normal((32, 2)), scale=0.1
        )
        for layer in range(2)
    }
    adapter = Adapter(name="a", format="test", pairs=pairs, sha256="0a")
    module: Any = copy.deepcopy(base.module)
    layers.fold(module, plan.make([adapter], layers.specs(module)))
    export_with_cache(module, tmp_path / "cached.onnx")
    runner = with_cache(OnnxRunner(tmp_path / "cached.onnx"))
    verdict = prove(runner, PyTorchReferences(base, [adapter])).verdict
    assert verdict.same, str(verdict)
    assert prove(runner, PyTorchReferences(base)).verdict.outcome is parity.Outcome.DIFFERENT
    right = prove(runner, PyTorchReferences(base, [adapter]), trace=True).diagnosis
    assert right is not None and right.first is None and len(right.layers) == 16
    assert "compared at the prompt, 12 tokens" in right.why and "fault" not in right.why
    scaled = {name: replace(pair, scale=0.1 * (1 + ("1" in name))) for name, pair in pairs.items()}
    wrong = prove(runner, PyTorchReferences(base, [replace(adapter, pairs=scaled)])).diagnosis
    assert wrong is not None and wrong.first == "model.layers.1.self_attn.q_proj"
    assert "has 0.5 times the correct strength" in wrong.why and "compared at the prompt" in wrong.why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("Concat <axis = 2> (past_key, here)", "Concat <axis = 2> (here, past_key)"), "where the cache is written"),
        (("CumSum (kept, axis)", "Identity (kept)"), "its input differs already"),
    ],
    ids=["in the cache", "at the prompt"],
)
def test_diagnosis_separates_cache_faults_from_prompt_faults(
    change: tuple[str, str], reason: str, sums: model.Model, tmp_path: Path
) -> None:
    graph = onnx.load(a_graph(tmp_path / "m.onnx", sums, change, adapter=an_adapter()))
    names = {"table": "table.weight", "turned": "dense.weight"}
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for tensor in graph.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    onnx.save(graph, tmp_path / "named.onnx")
    found = proven(tmp_path / "named.onnx", sums)
    assert found.verdict.outcome is parity.Outcome.DIFFERENT and found.diagnosis is not None
    assert reason in str(found.diagnosis), str(found.diagnosis)
    if "cache" in reason:
        assert found.diagnosis.first is None


def test_tokens_that_attend_to_each_other_are_of_one_run() -> None:
    none = np.zeros((1, 12), bool)
    steps = [(0, 8), (8, 9), (9, 10), (10, 11), (11, 12)]
    assert list(undivided(steps, none)) == steps
    rows = np.array([[0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0]], bool)
    assert list(undivided(steps, rows)) == [(0, 9), (9, 10), (10, 11), (11, 12)]
    assert list(undivided(turns(12, 4), rows)) == [(0, 4), (4, 7), (7, 11), (11, 12)]
    assert list(undivided(steps, ~none)) == [(0, 12)]
