"""The three graphs of an encoder-decoder, run as one model: its outputs, adapters by row, graphs that do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers as hf

import lora_export as le
from lora_export.artifacts.files import GRAPH_FILES
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.runtime.runner import Arrays
from lora_export.runtime.three_graphs import EncoderDecoderRunner
from support.generators import VOCABULARY, encoder_decoder_adapter, small_encoder_decoder


class PlainGraph:
    """What is asked of a graph in which no row chooses its adapter."""

    adapters_by_row, takes_rows, lacks_adapter = None, False, False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 `base`, an adapter `all`, one of the `decoder` alone, and `served` with both by row, and in `slots`."""
    folder = tmp_path_factory.mktemp("t5")
    base = small_encoder_decoder("t5 of one layer", folder / "base")
    encoder_decoder_adapter(base, folder / "all")
    encoder_decoder_adapter(base, folder / "decoder", seed=2, targets=r"decoder\..*\.(q|v)")
    adapters = [folder / "all", folder / "decoder"]
    le.export_onnx(base, folder / "served", adapters=adapters, lora="rows", with_cache=True, verify=False)
    shape = {"target": "all-linear", "slots": 3, "max_rank": 4}
    le.export_onnx(base, folder / "slots", lora="slots", with_cache=True, verify=False, **shape)  # type: ignore[arg-type]
    for adapter in adapters:
        le.convert(adapter, folder / "slots" / adapter.name, graph=folder / "slots")
    return folder


@pytest.fixture(scope="module")
def runner(folder: Path) -> EncoderDecoderRunner:
    return EncoderDecoderRunner.open(folder / "served")


def arrays() -> Arrays:
    """Three rows; two of them are padded, one on each side."""
    draw = np.random.default_rng(0)
    mask = np.ones((3, 9), np.int64)
    mask[0, :4], mask[1, 5:] = 0, 0
    return {
        "input_ids": draw.integers(3, VOCABULARY, (3, 9)),
        "attention_mask": mask,
        "decoder_input_ids": draw.integers(3, VOCABULARY, (3, 13)),  # in turns, too
    }


def expected(folder: Path, adapter: str | None) -> dict[str, np.ndarray]:
    module: object = hf.T5ForConditionalGeneration.from_pretrained(folder / "base")
    if adapter is not None:
        module = peft.PeftModel.from_pretrained(module, folder / adapter)
    with torch.no_grad():
        outputs = module(**{name: torch.tensor(value) for name, value in arrays().items()})  # type: ignore[operator]
    return {name: outputs[name].numpy() for name in ("logits", "encoder_last_hidden_state")}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "adapter"), [(0, None), (1, "all"), (2, "decoder")])
def test_outputs_are_those_of_the_model(
    folder: Path, runner: EncoderDecoderRunner, number: int, adapter: str | None
) -> None:
    found = runner.with_rows([number]).run(arrays())
    right = expected(folder, adapter)
    assert found.keys() == right.keys()
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-4 * np.abs(value).max())
    others = expected(folder, "all" if adapter is None else None)
    assert np.abs(found["logits"] - others["logits"]).max() > 0.1


@pytest.mark.slow
def test_each_row_of_a_batch_has_its_adapter(folder: Path, runner: EncoderDecoderRunner) -> None:
    mixed = runner.with_rows([2, 0, 1]).run(arrays())["logits"]
    for row, adapter in enumerate(("decoder", None, "all")):
        right = expected(folder, adapter)["logits"]
        np.testing.assert_allclose(mixed[row], right[row], rtol=0, atol=2e-4 * np.abs(right).max())


def test_each_row_of_a_batch_has_the_adapter_of_its_slot(folder: Path) -> None:
    empty = EncoderDecoderRunner.open(folder / "slots")
    assert empty.has_slots and empty.adapters_by_row == []
    filled = empty.with_slot_files(["all", "decoder"])
    moved, now = filled.with_moved_adapters() or (filled, [])
    assert filled.adapters_by_row == ["all", "decoder"] and now == [2, 0, 1]
    right = {name: expected(folder, name)["logits"] for name in (None, "all", "decoder")}
    for own, ids, names in (
        (filled, [2, 0, 1], ("decoder", None, "all")),
        (filled, [3, 1, 0], (None, "all", None)),
        (moved, [1, 2, 3], ("decoder", None, "all")),
    ):
        mixed = own.with_rows(ids).run(arrays())["logits"]
        for row, name in enumerate(names):
            np.testing.assert_allclose(mixed[row], right[name][row], rtol=0, atol=2e-4 * np.abs(right[name]).max())
    base = EncoderDecoderRunner.open(folder / "served").with_rows([0]).run(arrays())["logits"]
    assert filled.with_rows([0]).run(arrays())["logits"].tobytes() == base.tobytes()
    with pytest.raises(InputRefused, match=r"there is no other\.encoder_model\.onnx_adapter in .*: all, decoder"):
        filled.with_slot_files(["other"])


def test_graphs_tell_what_they_take(runner: EncoderDecoderRunner) -> None:
    assert runner.takes_rows
    assert runner.adapters_by_row == ["all", "decoder"]
    assert set(runner.axes) == {"input_ids", "attention_mask", "decoder_input_ids"}
    own = runner.with_rows([0])
    assert not own.takes_rows
    assert own.axes["decoder_input_ids"] == (None, None)
    counts = [graph.placement.compute_nodes for graph in runner.graphs]
    assert min(counts) > 0
    assert runner.placement.compute_nodes == sum(counts)
    assert runner.notes[0].startswith("run with its cache: encoder, first tokens, then 4 tokens one by one. Longer")
    assert runner.notes[1].startswith("no token of padding among the decoder's")


def test_several_tokens_after_a_cache_are_run_too(
    runner: EncoderDecoderRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, runs = runner.with_rows([0]), []
    right = own.run(arrays())["logits"]
    for graph in (own.decoder, own.with_past):

        def wrong_in_turns(inputs: Arrays, run: Callable[[Arrays], Arrays] = graph.run) -> Arrays:
            runs.append(inputs["input_ids"].shape[1])
            outputs = run(inputs)
            return outputs | {"logits": outputs["logits"] + (len(runs) > 5)}

        monkeypatch.setattr(graph, "run", wrong_in_turns)
    wrong = own.run(arrays())["logits"] - right
    assert runs == [9, 1, 1, 1, 1, 3, 1, 3, 1, 3, 1, 1]
    assert not wrong[:, ::2].any() and np.allclose(wrong[:, 1::2], 1, atol=1e-3)
    by_graph = own.outputs_by_graph(13)
    assert (
        by_graph["decoder_model.onnx"][1] == slice(0, 9, 2) and by_graph["decoder_with_past_model.onnx"][1].start == 1
    )
    assert own.outputs_by_graph(8)["decoder_model.onnx"][1] == slice(0, 4, 1)


def test_padding_of_the_decoder_becomes_another_token() -> None:
    inputs = {"input_ids": np.array([[1, 0]]), "decoder_input_ids": np.array([[3, 1, 0], [1, 5, 6]])}
    found = EncoderDecoderRunner.without_padding(inputs, 1)
    assert found["decoder_input_ids"].tolist() == [[3, 0, 0], [0, 5, 6]]
    assert found["input_ids"] is inputs["input_ids"]
    assert EncoderDecoderRunner.without_padding(inputs, 0)["decoder_input_ids"].tolist() == [[3, 1, 1], [1, 5, 6]]
    assert EncoderDecoderRunner.without_padding(inputs, None) is inputs


def test_sessions_are_opened_again(runner: EncoderDecoderRunner) -> None:
    own = runner.with_rows([1])
    before = own.run(arrays())["logits"]
    own.close()
    np.testing.assert_array_equal(own.run(arrays())["logits"], before)
    np.testing.assert_array_equal(own.with_provider_defaults().run(arrays())["logits"], before)


def test_inputs_without_tokens_of_the_decoder_are_refused(runner: EncoderDecoderRunner) -> None:
    inputs = {name: value for name, value in arrays().items() if name != "decoder_input_ids"}
    with pytest.raises(RuntimeRefused, match="the graphs take decoder_input_ids; the model takes input_ids, attention"):
        runner.with_rows([0]).run(inputs)


def test_graphs_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "served", tmp_path / "copy")
    shutil.copy(copy / GRAPH_FILES[0], copy / GRAPH_FILES[1])
    with pytest.raises(InputRefused, match=r"decoder_model\.onnx does not take input_ids and encoder_hidden_states"):
        EncoderDecoderRunner.open(copy)


def test_graphs_with_other_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "served", tmp_path / "copy")
    graph = onnx.load(copy / GRAPH_FILES[1])
    for entry in graph.metadata_props:
        entry.value = entry.value.replace('"decoder"', '"other"')
    onnx.save(graph, copy / GRAPH_FILES[1])
    with pytest.raises(InputRefused, match="the graphs do not have the same adapters"):
        _ = EncoderDecoderRunner.open(copy).adapters_by_row


def test_graphs_without_adapters_by_row_take_no_ids(runner: EncoderDecoderRunner) -> None:
    merged = replace(runner, graphs=(PlainGraph(), PlainGraph(), PlainGraph()))
    assert not merged.takes_rows
    with pytest.raises(InputRefused, match="no graph has an input adapter_ids"):
        merged.with_rows([1])
    with pytest.raises(InputRefused, match='no graph takes an adapter: they were not made with lora="inputs"'):
        merged.with_adapter("fr")
