"""`lora-export onnx MODEL.onnx --model`: decoders with a key/value cache, proven against PyTorch step by step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from lora_export import formats
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models.load import load_model
from lora_export.runtime.kv_cache import DECODE_STEPS, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from support import FACTORIES
from support.cli import Capture, answer, call
from support.decoders import FEATURES, WORDS, export_with_cache
from support.decoders import a_graph as a_decoder
from support.exporters import checkpoint_of, model_of, save_adapter, save_tokenizer, stripped
from support.genai import build_genai_graph
from support.handmade import base_file, peft_adapter

SUMS = f"{FACTORIES}:sums"
IDS = np.random.default_rng(3).integers(0, WORDS, (3, 8))
MODES = ("merged", "nodes", "inputs", "rows")
BY_STEPS = f"run with its cache: a prompt, then {DECODE_STEPS} tokens one by one"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder by hand, the same with a cache that is kept in the wrong order, its weights, and an adapter."""
    folder, base = tmp_path_factory.mktemp("decoders"), load_model(SUMS)
    swapped = ("Concat <axis = 2> (past_key, here)", "Concat <axis = 2> (here, past_key)")
    for name, change in {"right": ("", ""), "wrong": swapped}.items():
        graph = load_graph(a_decoder(folder / "plain.onnx", base, change))
        # As an exporter tells it; nobody can infer it behind a Slice.
        squeezed = next(node for node in graph.graph if node.op_type == "Squeeze").outputs[0]
        squeezed.shape, squeezed.type = ir.Shape(["batch", "tokens", FEATURES]), ir.TensorType(ir.DataType.FLOAT)
        save_graph(graph, folder, f"{name}.onnx")
    base_file(folder / "base.safetensors", {name: value.numpy() for name, value in base.module.state_dict().items()})
    rng = np.random.default_rng(0)
    peft_adapter(folder / "a", {"dense": (rng.standard_normal((2, FEATURES)), rng.standard_normal((3, 2)))})
    return folder


def words(place: Path, graph: str, mode: str, out: Path) -> list[Any]:
    told = ["--base", place / "base.safetensors", "--model", SUMS, "--lora", mode]
    return ["onnx", place / f"{graph}.onnx", "-a", place / "a", *told, "-o", out]


def expected(place: Path, *, adapted: bool) -> NDArray[Any]:
    weights = {name: value.numpy() for name, value in load_model(SUMS).module.state_dict().items()}
    (pair,) = formats.load(place / "a").pairs.values()
    turn = weights["dense.weight"] + adapted * pair.scale * pair.b @ pair.a
    return weights["table.weight"][IDS].cumsum(1) @ turn.T


def runners(path: Path, mode: str) -> tuple[OnnxRunner | None, OnnxRunner]:
    """The graph without an adapter, where that can be asked for, and with it."""
    runner = OnnxRunner(path)
    if mode == "inputs":
        return runner, runner.with_adapter(path.parent / "a.onnx_adapter")
    return (runner.with_rows([0]), runner.with_rows([1])) if mode == "rows" else (None, runner)


@pytest.mark.parametrize("mode", MODES)
def test_a_decoder_is_proven_against_the_model_that_it_was_made_from(
    place: Path, tmp_path: Path, mode: str, capsys: Capture
) -> None:
    code, told = answer(capsys, *words(place, "right", mode, tmp_path / "out.onnx"))
    assert code == 0
    assert_all_same_by_steps(told, swapped=mode in ("inputs", "rows"))
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    base, with_adapter = runners(tmp_path / "out.onnx", mode)
    np.testing.assert_allclose(
        with_cache(with_adapter).run(feeds)["logits"], expected(place, adapted=True), rtol=1e-4, atol=1e-5
    )
    if base is not None:
        np.testing.assert_allclose(
            with_cache(base).run(feeds)["logits"], expected(place, adapted=False), rtol=1e-4, atol=1e-5
        )
    assert np.abs(expected(place, adapted=True) - expected(place, adapted=False)).max() > 0.1


def assert_all_same_by_steps(told: Any, *, swapped: bool) -> None:
    proofs = [told["proof"], *told.get("adapters", {}).values()]
    assert len(proofs) == 1 + swapped
    every = [*proofs, *([told["mixed"]] if "mixed" in told else [])]
    assert {proof["outcome"] for proof in every} == {"same"} and len({proof["dtype"] for proof in every}) == 1
    assert all(BY_STEPS in proof["notes"] for proof in proofs)
    assert told.get("bits_of_base", True)


def test_the_folder_of_a_decoder_is_its_graph(place: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "genai_config.json").write_text("{}")
    for graph, code in (("right", 0), ("wrong", 4)):
        shutil.copy(place / f"{graph}.onnx", tmp_path / "folder" / "model.onnx")
        found, told = answer(capsys, "verify", tmp_path / "folder", "--model", SUMS, "--no-strict")
        assert found == code and told["about"]["candidate"]["path"].endswith("folder/model.onnx")
    assert call("inspect", tmp_path / "folder") == 0
    assert "past_key" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_a_decoder_that_keeps_its_cache_wrongly_is_never_published(
    place: Path, tmp_path: Path, mode: str, capsys: Capture
) -> None:
    assert call(*words(place, "wrong", mode, tmp_path / "out.onnx")) == 4
    assert "different" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- what exporters make ---


def assert_command_proves(graph: Path, mode: str, folder: Path, capsys: Capture, *, precision: str = "fp32") -> None:
    """In this mode, of a Llama's graph; and `verify` says the same of what it published."""
    adapter, out, base = save_adapter("llama", folder / "a"), folder / "out.onnx", checkpoint_of("llama")
    given = ("-a", adapter, "--model", base, *(("--dtype", "float16") if precision == "fp16" else ()))
    in_int8 = precision == "int4"
    code, told = answer(capsys, "onnx", graph, *given, "--base", base, "--lora", mode, "-o", out)
    assert code == 0, told
    assert_all_same_by_steps(told, swapped=mode in ("inputs", "rows"))
    how = ("--onnx-adapter", folder / "a.onnx_adapter") if mode == "inputs" else ()
    # In int8, a base without an adapter is decided by the graph that it was made from alone.
    assert call("verify", out, *given, *how) == (5 if (mode, in_int8) == ("rows", True) else 0)
    if precision == "fp16":
        code, told = answer(capsys, "verify", out, *given[:4], *how)
        assert code == 4 and any("--dtype float16" in note for note in told["notes"])
    assert call("verify", out, *given, *how, *(("--base", graph) if in_int8 else ())) == 0


@slow
@pytest.mark.parametrize("mode", MODES)
def test_a_decoder_of_the_dynamo_exporter_is_proven(mode: str, tmp_path: Path, capsys: Capture) -> None:
    module: Any = model_of("llama")
    export_with_cache(module, tmp_path / "cached.onnx")
    assert_command_proves(tmp_path / "cached.onnx", mode, tmp_path, capsys)


@slow
@pytest.mark.parametrize(
    ("precision", "mode"),
    [*((precision, mode) for precision in ("fp32", "fp16") for mode in MODES), *(("int4", mode) for mode in MODES[1:])],
)
def test_a_decoder_of_genais_builder_is_proven(precision: str, mode: str, tmp_path: Path, capsys: Capture) -> None:
    save_tokenizer(checkpoint_of("llama"))
    graph = build_genai_graph(checkpoint_of("llama"), tmp_path / "built", precision)
    assert_command_proves(graph, mode, tmp_path, capsys, precision=precision)


@slow
def test_a_builders_graph_that_tells_no_size_of_a_head_decodes(tmp_path: Path) -> None:
    save_tokenizer(checkpoint_of("llama"))
    graph = build_genai_graph(checkpoint_of("llama"), tmp_path / "built", "fp32")
    assert {value.shape[-1] for value in load_graph(graph).graph.inputs[2:]} != {16}
    ids = torch.from_numpy(IDS)
    answered = with_cache(OnnxRunner(graph)).run({"input_ids": IDS, "attention_mask": np.ones_like(IDS)})
    with torch.no_grad():
        truth = model_of("llama")(ids).logits.numpy()
    np.testing.assert_allclose(answered["logits"], truth, rtol=1e-4, atol=1e-5)


@slow
def test_rows_in_a_builders_graph_without_names_and_shapes(tmp_path: Path, capsys: Capture) -> None:
    save_tokenizer(checkpoint_of("llama"))
    graph = build_genai_graph(checkpoint_of("llama"), tmp_path / "built", "fp32")
    bare = graph.with_name("bare.onnx")
    stripped(graph, bare)
    model = ir.load(bare)
    for value in (value for node in model.graph for value in node.outputs if not value.is_graph_output()):
        value.shape = value.type = None
    ir.save(model, bare)
    adapter = save_adapter("llama", tmp_path / "a")
    given = ("-a", adapter, "--lora", "rows", "--base", checkpoint_of("llama"), "-o", tmp_path / "out.onnx")
    code, told = answer(capsys, "onnx", bare, *given)
    assert code == 0 and told["mixed"]["outcome"] == "same"
