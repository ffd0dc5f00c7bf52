"""A decoder's graph, step by step: which graphs are taken, and what each input receives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from lora_export.errors import InputRefused
from lora_export.models.load import load_model
from lora_export.runtime.generation.decoder import Decoder
from support import FACTORIES
from support.decoders import WORDS, a_graph, a_graph_with_a_state


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
