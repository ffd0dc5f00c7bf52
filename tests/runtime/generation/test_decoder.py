"""A decoder's graph, step by step: which graphs are taken, and what each input receives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf

import lora_export as le
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.load import load_model
from lora_export.runtime.generation.decoder import Decoder, EncoderDecoder
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner, token_positions
from support import FACTORIES
from support.decoders import WORDS, a_graph, a_graph_with_a_state
from support.generators import small_encoder_decoder, sounds


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return a_graph(tmp_path / "m.onnx", load_model(f"{FACTORIES}:sums"))


def test_steps_continue_from_the_cache(sums: Path) -> None:
    decoder = Decoder(sums)
    ids = np.arange(12).reshape(2, 6) % WORDS
    whole = decoder.start(2).step(ids, np.ones_like(ids), np.tile(np.arange(6), (2, 1)))
    run = decoder.start(2)
    run.step(ids[:, :4], np.ones((2, 4), np.int64), np.tile(np.arange(4), (2, 1)))
    for end in (5, 6):
        last = run.step(ids[:, end - 1 : end], np.ones((2, end), np.int64), np.full((2, 1), end - 1))
    np.testing.assert_allclose(last, whole, rtol=1e-6)
    assert last.shape == (2, 3)


def test_runs_do_not_share_a_cache(sums: Path) -> None:
    decoder = Decoder(sums)
    ids, mask, positions = np.array([[3, 5]]), np.ones((1, 2), np.int64), np.array([[0, 1]])
    first = decoder.start(1).step(ids, mask, positions)
    np.testing.assert_array_equal(decoder.start(1).step(ids, mask, positions), first)


def test_graph_with_a_state_takes_a_prompt_token_by_token(tmp_path: Path) -> None:
    decoder = Decoder(a_graph_with_a_state(tmp_path / "m.onnx"))
    assert decoder.tokens_at_once == 1 and not decoder.takes_padding
    for _ in range(3):  # with memory that was used before
        run = decoder.start(2)
        last = run.step(np.array([[1, 2, 3], [4, 5, 6]]), np.ones((2, 3), np.int64), np.zeros((2, 3), np.int64))
        assert last.tolist() == [[6], [15]]
        last = run.step(np.array([[7], [8]]), np.ones((2, 4), np.int64), np.zeros((2, 1), np.int64))
        assert last.tolist() == [[13], [23]]


def test_the_number_of_a_position_counts_padding(tmp_path: Path) -> None:
    rows = "  rows = Gather <axis = 0> (table, input_ids)"
    placed = f"""{rows.replace("rows", "words")}
  places = Cast <to = 1> (cache_position)
  column = Unsqueeze (places, one)
  rows = Add (words, column)"""
    graph = onnx.load(a_graph(tmp_path / "m.onnx", load_model(f"{FACTORIES}:sums"), (rows, placed)))
    graph.graph.input.append(onnx.helper.make_tensor_value_info("cache_position", onnx.TensorProto.INT64, ["tokens"]))
    onnx.save(graph, tmp_path / "m.onnx")
    ids, mask = np.array([[0, 0, 3], [1, 2, 3]]), np.array([[0, 0, 1], [1, 1, 1]])
    last = Decoder(tmp_path / "m.onnx").start(2).step(ids, mask, token_positions(mask))
    expected = with_cache(OnnxRunner(tmp_path / "m.onnx")).run({"input_ids": ids, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(last, expected[:, -1], rtol=1e-6)


def with_a_narrow_cache(path: Path) -> Path:
    """The graph with its cache in bfloat16; what it computes it computes as before."""
    graph = onnx.load(path)
    (past,) = (each for each in graph.graph.input if each.name.startswith("past_key_values"))
    (present,) = (each for each in graph.graph.output if each.name.startswith("present"))
    for value in (past, present):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    renamed = {past.name: "past", present.name: "present"}
    for node in graph.graph.node:
        node.input[:], node.output[:] = ([renamed.get(name, name) for name in own] for own in (node.input, node.output))
    graph.graph.node.insert(0, onnx.helper.make_node("Cast", [past.name], ["past"], to=onnx.TensorProto.FLOAT))
    graph.graph.node.append(onnx.helper.make_node("Cast", ["present"], [present.name], to=onnx.TensorProto.BFLOAT16))
    onnx.save(graph, path)
    return path


def test_a_cache_in_bfloat16(sums: Path) -> None:
    ids, ones, positions = np.array([[3, 5, 7]]), np.ones((1, 3), np.int64), np.arange(3)[None]
    expected = Decoder(sums).start(1).step(ids, ones, positions)
    run = Decoder(with_a_narrow_cache(sums)).start(1)
    run.step(ids[:, :2], ones[:, :2], positions[:, :2])
    np.testing.assert_allclose(run.step(ids[:, 2:], ones, positions[:, 2:]), expected, rtol=0.02)


def test_a_graph_that_computes_in_bfloat16_is_refused_on_the_cpu(tmp_path: Path) -> None:
    product = "logits = MatMul (flat, turned)"
    narrow = "half = Cast <to = 16> (flat)  other = Cast <to = 16> (turned)  product = MatMul (half, other)"
    graph = a_graph(
        tmp_path / "m.onnx",
        load_model(f"{FACTORIES}:sums"),
        (product, f"{narrow}  logits = Cast <to = 1> (product)"),
    )
    with pytest.raises(RuntimeRefused, match=r'is in bfloat16, .* Generate on a GPU \(provider="cuda"\), or export'):
        Decoder(with_a_narrow_cache(graph))


def test_graph_without_a_cache_is_refused(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (int64[batch, n] input_ids) => (int64[batch, n] logits)'
    onnx.save(onnx.parser.parse_model(text + " { logits = Identity (input_ids) }"), tmp_path / "m.onnx")
    with pytest.raises(InputRefused, match=r"has no key/value cache.*export_onnx\(with_cache=True\)"):
        Decoder(tmp_path / "m.onnx")


def test_further_input_is_refused_by_name(sums: Path, tmp_path: Path) -> None:
    graph = onnx.load(sums)
    graph.graph.input.append(onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, [1]))
    onnx.save(graph, tmp_path / "more.onnx")
    with pytest.raises(InputRefused, match="also takes pixel_values"):
        Decoder(tmp_path / "more.onnx")


def test_adapter_of_a_graph_that_takes_none_is_refused(sums: Path) -> None:
    with pytest.raises(InputRefused, match='takes no adapter: it was not made with lora="inputs" or rows'):
        Decoder(sums).load("fr")


# --- encoder decoder ---


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    small_encoder_decoder("whisper", folder / "base")
    le.export_onnx(folder / "base", folder / "served", with_cache=True, verify=False)
    return folder


def logits(base: Path, tokens: np.ndarray) -> np.ndarray:
    module: Any = hf.WhisperForConditionalGeneration.from_pretrained(base).eval()
    with torch.no_grad():
        outputs = module(input_features=torch.tensor(np.stack(sounds())), decoder_input_ids=torch.tensor(tokens))
    last: np.ndarray = outputs.logits[:, -1].numpy()
    return last


@pytest.mark.slow
def test_steps_give_the_logits_of_the_model(whisper: Path) -> None:
    model = EncoderDecoder(whisper / "served")
    assert model.takes.keys() == {"input_features"}
    assert not model.takes_mask
    assert model.rows == []
    run = model.start({"input_features": np.stack(sounds())})
    tokens = np.random.default_rng(0).integers(3, 60, (3, 6))
    done = 0
    for stop in (2, 3, 6):
        step = tokens[:, done:stop]
        right = logits(whisper / "base", tokens[:, :stop])
        found = run.step(step, np.ones_like(step), np.zeros_like(step))
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-4 * np.abs(right).max())
        done = stop
    rows, one = [2, 0], np.ones((2, 1), np.int64)
    of_two = run.of_rows(rows)
    right = logits(whisper / "base", tokens[:, :1])
    found = of_two.step(tokens[rows, :1], one, one)
    np.testing.assert_allclose(found, right[rows], rtol=0, atol=2e-4 * np.abs(right).max())
    run.restart()
    again = run.step(tokens[:, :1], np.ones((3, 1), np.int64), np.zeros((3, 1), np.int64))
    np.testing.assert_allclose(again, right, rtol=0, atol=2e-4 * np.abs(right).max())
