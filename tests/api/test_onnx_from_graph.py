"""`lora-export onnx MODEL.onnx`: adapters into a graph that was that exists already, proven against that graph."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from lora_export import formats, plan
from lora_export.api import onnx_from_graph, onnx_steps
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import read_contract
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.graph.onnx_file.writing import MIN_EXTERNAL_BYTES, in_memory, save_graph
from lora_export.models import export
from lora_export.models.load import load_model
from lora_export.plan import Plan
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.storage.hashes import file_hash
from lora_export.verification.proof import AGAINST, NODE_BY_NODE, NOT_BY_FP64, UNCHANGED
from support import FACTORIES
from support.cli import Capture, answer, call
from support.exported_models import eager, exported, inputs, with_changes
from support.exporters import EXPORTERS, OPTIMISERS, assert_computes_merged_model, checkpoint_of, save_adapter, stripped
from support.graphs import quantised, record_of, tensor_bytes
from support.handmade import graph_file, peft_adapter
from support.slow import slow

LAYER = "bert.encoder.layer.0"
TARGETS = {
    f"{LAYER}.attention.self.query": (16, 16), f"{LAYER}.attention.output.dense": (16, 16),
    f"{LAYER}.intermediate.dense": (32, 16), "classifier": (3, 16),
}  # fmt: skip
SPOTTER = f"{FACTORIES}:spotter"


def an_adapter_in(folder: Path, *, seed: int = 0, alpha: float = 6) -> Path:
    rng = np.random.default_rng(seed)
    pairs = {
        name: (0.3 * rng.standard_normal((3, inner)), 0.3 * rng.standard_normal((out, 3)))
        for name, (out, inner) in TARGETS.items()
    }
    return peft_adapter(folder, pairs, lora_alpha=alpha)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of a BERT with notes of its maker, the same quantised, and two adapters."""
    folder = tmp_path_factory.mktemp("given")
    graph = exported("bert").graph
    graph.metadata_props["maker"] = "somebody"
    next(iter(graph.graph)).metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/somebody/model.py"'
    ir.save(graph, folder / "base.onnx")
    save_graph(quantised(exported("bert").graph, block=16), folder, "bits.onnx")
    save_graph(quantised(exported("bert").graph, block=16, as_pairs=True), folder, "pairs.onnx")
    save_file(exported("bert").module.state_dict(), folder / "bert.safetensors")
    an_adapter_in(folder / "fr"), an_adapter_in(folder / "de", seed=1)
    return folder


def hash_of(path: Path) -> str:
    return file_hash(path, "xxh3_128")


def feeds(batch: int = 3, length: int = 9) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs("bert", batch, length, seed=5).items()}


def pytorchs(adapter: Path, strength: float = 1.0) -> Any:
    """PyTorch's logits with W + ΔW."""
    changes = {
        f"{name}.weight": strength * pair.scale * pair.b.astype(np.float64) @ pair.a
        for name, pair in formats.load(adapter).pairs.items()
    }
    return eager(with_changes(exported("bert").module, changes), inputs("bert", 3, 9, seed=5))["logits"]


def assert_is_pytorchs(runner: OnnxRunner, adapter: Path, strength: float = 1.0) -> None:
    given = runner.run(feeds())["logits"]
    np.testing.assert_allclose(given, pytorchs(adapter, strength), rtol=1e-4, atol=1e-6)
    assert np.abs(given - eager(exported("bert").module, inputs("bert", 3, 9, seed=5))["logits"]).max() > 1e-2


# --- every mode ---


@pytest.mark.parametrize("mode", ["merged", "nodes"])
def test_adapters_in_a_graph_are_what_pytorch_computes(place: Path, tmp_path: Path, mode: str, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    words = ("-a", place / "fr", "--weight", "0.5", "--lora", mode, "-o", out)
    code, told = answer(capsys, "onnx", place / "base.onnx", *words)
    assert (code, told["proof"]["outcome"]) == (0, "same"), told
    assert any("graph against graph, no PyTorch model was given" in note for note in told["proof"]["notes"])
    assert told["proof"]["about"]["model"]["source"] == str(place / "base.onnx")
    assert "torch" not in told["proof"]["about"]
    assert_is_pytorchs(OnnxRunner(out), place / "fr", 0.5)
    there = record_of(out)
    (adapter,) = there["adapters"]
    assert adapter.items() >= {"name": "fr", "format": "peft", "sha256": formats.load(place / "fr").sha256}.items()
    assert (adapter["weight"], len(adapter["ranks"]), len(adapter["alphas"])) == (0.5, 1, 1)
    assert set(there["base"]) == {"base.onnx"} and there["verdict"]["against"] == "the base graph"
    kept = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert kept["maker"] == "somebody" and b"/home/somebody" not in out.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_adapters_as_inputs_of_a_graph_are_what_pytorch_computes(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    words = ("-a", place / "fr", "-a", place / "de", "--target", "output.dense", "--lora", "inputs", "-o", out)
    code, told = answer(capsys, "onnx", place / "base.onnx", *words)
    assert (code, told["bits_of_base"]) == (0, True)
    assert {name: there["outcome"] for name, there in told["adapters"].items()} == {"fr": "same", "de": "same"}
    runner = OnnxRunner(out)
    for name in ("fr", "de"):
        assert_is_pytorchs(runner.with_adapter(tmp_path / f"{name}.onnx_adapter"), place / name)
    contract = read_contract(runner.session.get_modelmeta().custom_metadata_map, "")
    assert {place.weight.removesuffix(".weight") for place in contract.places} == {*TARGETS, f"{LAYER}.output.dense"}
    # Next week's adapter, and a graph that has places for adapters already.
    later = an_adapter_in(tmp_path / "it", seed=7)
    assert call("convert", later, "--to", "onnx_adapter", "--for", out, "-o", tmp_path / "it.onnx_adapter") == 0
    assert_is_pytorchs(runner.with_adapter(tmp_path / "it.onnx_adapter"), tmp_path / "it")
    assert call("onnx", out, "-a", place / "fr", "-o", tmp_path / "again.onnx") == 3
    assert "takes adapters already. " in capsys.readouterr().err


def test_adapters_by_row_of_a_graph_are_what_pytorch_computes(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    words = ("-a", place / "fr", "-a", place / "de", "--lora", "rows", "-o", out)
    code, told = answer(capsys, "onnx", place / "base.onnx", *words)
    assert (code, told["bits_of_base"], told["mixed"]["outcome"]) == (0, True, "same")
    given = OnnxRunner(out).with_rows([2, 0, 1]).run(feeds())["logits"]
    base = eager(exported("bert").module, inputs("bert", 3, 9, seed=5))["logits"]
    expected = np.stack([pytorchs(place / "de")[0], base[1], pytorchs(place / "fr")[2]])
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bits", slow("pairs")])
def test_an_adapter_stands_beside_four_bits(place: Path, tmp_path: Path, name: str, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    words = ("-a", place / "fr", "--lora", "nodes", "-o", out)
    code, told = answer(capsys, "onnx", place / f"{name}.onnx", *words)
    assert (code, told["proof"]["outcome"]) == (0, "same"), told
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert kinds & {"MatMulNBits", "DequantizeLinear"}
    assert call("onnx", place / f"{name}.onnx", "-a", place / "fr", "-o", tmp_path / "merged.onnx") == 3
    assert "is quantised" in capsys.readouterr().err
    # PyTorch with the weights that the bits stand for.
    found = find_sites(load_graph(place / f"{name}.onnx"))
    pairs = formats.load(place / "fr").pairs
    weights = dict(exported("bert").module.state_dict())
    changes = {
        spec.name: found.by_name[spec.name][0].matrix - weights[spec.name].numpy()
        for spec in found.specs
        if found.by_name[spec.name][0].quantised
    }
    assert changes
    for module, pair in pairs.items():
        change = pair.scale * pair.b.astype(np.float64) @ pair.a
        changes[f"{module}.weight"] = changes.get(f"{module}.weight", 0) + change
    expected = eager(with_changes(exported("bert").module, changes), inputs("bert", 3, 9, seed=5))["logits"]
    given = OnnxRunner(out, optimise=False).run(feeds())["logits"]
    np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-5)
    assert np.abs(given - pytorchs(place / "fr")).max() > 1e-4  # it is the quantised base


# --- against a PyTorch model ---


@pytest.fixture(scope="module")
def spotter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's own model as a graph, an adapter, and one that is another's."""
    folder = tmp_path_factory.mktemp("spotter")
    base = load_model(SPOTTER)
    save_graph(export.to_onnx(base.module, base.example_inputs(), axes=base.axes), folder, "base.onnx")
    rng = np.random.default_rng(0)
    out = "encoder.layers.0.self_attn.out_proj"
    pairs = {out: (0.3 * rng.standard_normal((3, 16)), 0.3 * rng.standard_normal((16, 3)))}
    peft_adapter(folder / "fr", pairs | {"head": (rng.standard_normal((3, 16)), rng.standard_normal((3, 3)))})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", [slow("merged"), slow("nodes"), slow("inputs"), "rows"])
def test_a_graph_is_proven_against_the_model_that_it_was_made_from(
    spotter: Path, tmp_path: Path, mode: str, capsys: Capture
) -> None:
    words = ("-a", spotter / "fr", "--lora", mode, "--model", SPOTTER, "-o", tmp_path / "out.onnx")
    code, told = answer(capsys, "onnx", spotter / "base.onnx", *words)
    assert code == 0
    proofs = [told["proof"], *told.get("adapters", {}).values()]
    assert {proof["outcome"] for proof in proofs} == {"same"}
    assert {proof["about"]["model"]["source"] for proof in proofs} == {SPOTTER}
    assert "against" not in record_of(tmp_path / "out.onnx")["verdict"]


def test_another_model_is_different(spotter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = ir.load(spotter / "base.onnx")
    bias = graph.graph.initializers["head.bias"]
    assert bias.const_value is not None
    bias.const_value = ir.Tensor(bias.const_value.numpy() + 1, name="head.bias")
    ir.save(graph, tmp_path / "other.onnx")
    words = ("onnx", tmp_path / "other.onnx", "-a", spotter / "fr", "-o", tmp_path / "out.onnx")
    assert call(*words, "--model", SPOTTER) == 4
    assert not (tmp_path / "out.onnx").exists()
    assert call(*words) == 0  # it is its own measure


# --- bases that are too coarse for a verdict of their own ---


def in_int8(graph: ir.Model) -> ir.Model:
    """The graph, quantised, as genai's builder makes it: what is multiplied by four bits is rounded to int8 too."""
    nodes = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)
    assert nodes
    return graph


@pytest.fixture(scope="module", params=[pytest.param("stacked", marks=pytest.mark.slow), "stacked_with_biases"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A graph that multiplies in int8, and two adapters; and the module that it was made from."""
    folder, factory = tmp_path_factory.mktemp(request.param), f"{SPOTTER.rpartition(':')[0]}:{request.param}"
    base = load_model(factory)
    graph = export.to_onnx(base.module, base.example_inputs(), axes=base.axes)
    save_graph(in_int8(quantised(graph, block=16)), folder, "base.onnx")
    for seed, name in enumerate(("fr", "de")):
        rng = np.random.default_rng(seed)
        pairs = {
            module: (rng.standard_normal((3, inner)), 0.3 * rng.standard_normal((out, 3)))
            for module, (out, inner) in {"up": (64, 32), "down": (8, 64)}.items()
        }
        peft_adapter(folder / name, pairs)
    return folder, factory


@pytest.mark.parametrize("mode", [slow("inputs"), "rows"])
@pytest.mark.parametrize("with_model", [False, True])
def test_an_int8_base_is_judged_by_its_origin(
    rounded: tuple[Path, str], tmp_path: Path, mode: str, with_model: bool, capsys: Capture
) -> None:
    folder, factory = rounded
    out, reference = tmp_path / "out.onnx", ("--model", factory) if with_model else ()
    words = ("-a", folder / "fr", "-a", folder / "de", "--lora", mode, *reference, "-o", out)
    code, told = answer(capsys, "onnx", folder / "base.onnx", *words)
    assert code == 0, told
    proofs = [told["proof"], *told["adapters"].values(), *([told["mixed"]] if mode == "rows" else [])]
    assert {proof["outcome"] for proof in proofs} == {"same"}
    by_nodes = any(note.startswith(NODE_BY_NODE) for note in told["proof"]["notes"])
    by_bits = UNCHANGED in told["proof"]["notes"]
    assert (by_bits, by_nodes) == (told["bits_of_base"], not told["bits_of_base"])
    assert record_of(out)["verdict"]["against"] == AGAINST
    assert all(("against" in proof["about"]) != with_model for proof in told["adapters"].values())


@pytest.mark.parametrize("mode", [slow("inputs"), "rows"])
def test_verify_judges_such_a_base_by_the_graph_that_it_is_given(
    rounded: tuple[Path, str], tmp_path: Path, mode: str, capsys: Capture
) -> None:
    folder, factory = rounded
    out, adapter = tmp_path / "out.onnx", ("-a", folder / "fr")
    assert call("onnx", folder / "base.onnx", *adapter, "--lora", mode, "-o", out, "--no-verify") == 0
    words = ("verify", out, "--model", factory, *(adapter if mode == "rows" else ()))
    capsys.readouterr()
    code, told = answer(capsys, *words)
    assert code == 5 and any("--base BASE.onnx" in note for note in told["notes"]), told["notes"]
    code, told = answer(capsys, *words, "--base", folder / "base.onnx")
    assert code == 0 and NOT_BY_FP64 in " ".join(told["notes"])
    graph = load_graph(folder / "base.onnx")
    scales = next(value for name, value in graph.graph.initializers.items() if "scales" in name)
    assert scales.const_value is not None
    scales.const_value = ir.Tensor(scales.const_value.numpy() * np.float32(1.0001), name=scales.name)
    save_graph(graph, tmp_path, "other.onnx")
    assert call(*words, "--base", tmp_path / "other.onnx") in (4, 5)


def with_inputs(folder: Path, to: Path) -> Path:
    """The base with inputs for an adapter. A verdict on it is for tests to find."""
    words = ("--target", "up", "--lora", "inputs", "--no-verify")
    assert call("onnx", folder / "base.onnx", *words, "-o", to / "out.onnx") == 0
    return to / "out.onnx"


def test_the_graph_itself_or_other_outputs_are_no_origin(
    rounded: tuple[Path, str], tmp_path: Path, capsys: Capture
) -> None:
    folder, factory = rounded
    code, told = answer(capsys, "verify", folder / "base.onnx", "--model", factory, "--base", folder / "base.onnx")
    assert code == 5 and NOT_BY_FP64 not in told["notes"]
    code, told = answer(capsys, "verify", folder / "base.onnx", "--model", factory)
    assert code == 5 and not any("--base BASE.onnx" in note for note in told["notes"])
    out = with_inputs(folder, tmp_path)
    for name in ("inputs", "outputs"):
        graph = load_graph(folder / "base.onnx")
        getattr(graph.graph, name)[0].name = "another"
        save_graph(graph, tmp_path, f"{name}.onnx")
        capsys.readouterr()
        assert call("verify", out, "--model", factory, "--base", tmp_path / f"{name}.onnx") == 3
        assert f"{name}.onnx is not what the candidate was made from" in capsys.readouterr().err


def test_a_fused_int8_base_must_be_close_to_its_origin(
    rounded: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder, factory = rounded
    out, right = with_inputs(folder, tmp_path), OnnxRunner.run
    words = ("verify", out, "--model", factory, "--base", folder / "base.onnx", "-v")

    def off_by(factor: float) -> int:
        def run(runner: OnnxRunner, *arguments: Any) -> Any:
            plain = runner.session.get_session_options().graph_optimization_level.name == "ORT_DISABLE_ALL"
            wrong = runner.path == out and not plain
            return {
                name: value * np.float32(factor if wrong else 1) for name, value in right(runner, *arguments).items()
            }

        monkeypatch.setattr(OnnxRunner, "run", run)
        return call(*words)

    assert off_by(1 + 1e-6) == 0
    assert NODE_BY_NODE in capsys.readouterr().out
    assert off_by(1.005) in (4, 5)


def test_half_precision_and_int8_in_one_graph(tmp_path: Path, capsys: Capture) -> None:
    factory, rng = f"{SPOTTER.rpartition(':')[0]}:stacked", np.random.default_rng(0)
    base = load_model(factory, dtype=torch.float16)
    graph = export.to_onnx(base.module, base.example_inputs(), axes=base.axes)
    save_graph(in_int8(quantised(graph, block=16)), tmp_path, "base.onnx")
    peft_adapter(tmp_path / "fr", {"up": (rng.standard_normal((3, 32)), 0.3 * rng.standard_normal((64, 3)))})
    words = ("-a", tmp_path / "fr", "--lora", "inputs", "--model", factory, "--dtype", "float16")
    code, told = answer(capsys, "onnx", tmp_path / "base.onnx", *words, "-o", tmp_path / "out.onnx")
    assert (code, {there["outcome"] for there in told["adapters"].values()}) == (0, {"same"}), told


@pytest.mark.parametrize("mode", ["inputs", slow("rows")])
def test_a_base_in_int8_that_was_changed_is_never_published(
    rounded: tuple[Path, str], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder, factory = rounded
    right = onnx_steps.save_graph

    def nudged(program: ir.Model, *where: Any, **how: Any) -> Any:
        """One scale of one block is the next larger number."""
        scales = next(value for name, value in program.graph.initializers.items() if "scales" in name)
        assert scales.const_value is not None
        array = scales.const_value.numpy().copy()
        array.reshape(-1)[3] = np.nextafter(array.reshape(-1)[3], np.float32(np.inf)) * np.float32(1.0001)
        scales.const_value = ir.Tensor(array, name=scales.name)
        return right(program, *where, **how)

    monkeypatch.setattr(onnx_steps, "save_graph", nudged)
    words = ("-a", folder / "fr", "--lora", mode, "--model", factory, "-o", tmp_path / "out.onnx")
    assert call("onnx", folder / "base.onnx", *words) == 5
    assert "the base: undecided" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- in half precision ---


@pytest.mark.slow
def test_a_model_in_half_precision_is_exported_and_judged_in_it(tmp_path: Path, capsys: Capture) -> None:
    factory, rng, out = f"{SPOTTER.rpartition(':')[0]}:stacked", np.random.default_rng(0), tmp_path / "out.onnx"
    sides = rng.standard_normal((3, 32)), 0.3 * rng.standard_normal((64, 3))
    for name, alpha in {"fr": 6, "scaled": 7}.items():
        peft_adapter(tmp_path / name, {"up": sides}, lora_alpha=alpha)
    np.savez(tmp_path / "mine.npz", x=rng.standard_normal((2, 4, 32)))
    words = ("-a", tmp_path / "fr", "--dtype", "float16", "--inputs", tmp_path / "mine.npz")
    code, told = answer(capsys, "onnx", factory, *words, "-o", out)
    assert (code, told["proof"]["outcome"], told["proof"]["dtype"]) == (0, "same", "float16"), told
    assert "the reference ran in fp64 throughout" in told["proof"]["notes"]
    assert {value.dtype for value in load_graph(out).graph.initializers.values() if len(value.shape) == 2} == {
        ir.DataType.FLOAT16
    }
    assert record_of(out)["settings"]["dtype"] == "float16"

    def verified(adapter: str, *more: Any) -> tuple[int, Any]:
        return answer(capsys, "verify", out, "--model", factory, "-a", tmp_path / adapter, *more)

    assert verified("fr", "--dtype", "float16")[0] == 0
    assert verified("scaled", "--dtype", "float16")[0] == 4
    for words in ((), ("--dtype", "bfloat16")):
        assert call("verify", out, "--model", factory, "-a", tmp_path / "fr", *words) == 8
        assert "The candidate is in half precision: --dtype float16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--provider", "cpu", "--timeout", "9", "--memory", "9"), "--timeout and --memory"),
        (("--provider", "cuda"), "--provider"),  # which no machine without a GPU has
        (("--lora", "rows", "--timeout", "9", "--model", SPOTTER), "--model"),  # a run may measure shapes
    ],
)
def test_options_of_a_proof_that_is_left_out_are_named(
    place: Path, words: tuple[str, ...], told: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "x.onnx"
    assert call("onnx", place / "base.onnx", "-a", place / "fr", "-o", out, "--no-verify", *words) == 0
    assert f"note: no effect without a proof (--no-verify): {told}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("onnx", "base.onnx", "-a", "fr", "-o", "x.onnx"), 2, "--dtype is the precision of a PyTorch model"),
        (("verify", "x.pt", "--model", SPOTTER), 2, "--dtype are for .onnx files"),
        (("verify", "base.onnx", "--base", "base.onnx"), 2, "with --base nothing is run"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(
    place: Path, words: tuple[str, ...], code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(place)
    Path("x.pt").touch()
    assert call(*words, "--dtype", "float16") == code
    assert told in capsys.readouterr().err


# --- wrong weaves ---

Fault = Callable[[Plan], Plan]


def scaled(steps: Plan) -> Plan:
    """A scale that is a twentieth too large, in one of the layers."""
    first, *others = steps.steps
    terms = tuple(replace(term, strength=1.05 * term.strength) for term in first.terms)
    return replace(steps, steps=(replace(first, terms=terms), *others))


def forgetful(steps: Plan) -> Plan:
    """One layer is left out."""
    return replace(steps, steps=steps.steps[1:])


def turned(steps: Plan) -> Plan:
    """B of a square layer, the other way round."""

    def swap(step: plan.Step) -> plan.Step:
        if step.spec.name != f"{LAYER}.attention.self.query.weight":
            return step
        (term,) = step.terms
        pair = replace(term.pair, a=term.pair.b.T, b=term.pair.a.T)
        return replace(step, terms=(replace(term, pair=pair),))

    return replace(steps, steps=tuple(map(swap, steps.steps)))


# A graph and a mode -> what weaves, and the fault that is quick
WEAVES: dict[tuple[str, str], tuple[ModuleType, str, Fault]] = {
    ("base", "merged"): (onnx_from_graph, "write_merged", scaled),
    ("base", "nodes"): (onnx_steps, "insert_nodes", turned),
    ("base", "rows"): (onnx_steps, "insert_rows", scaled),
    ("bits", "nodes"): (onnx_steps, "insert_nodes", forgetful),
}
FAULTS = [(weave, fault) for weave in WEAVES for fault in (scaled, forgetful, turned)]


@pytest.mark.parametrize(("weave", "fault"), [one if one[1] is WEAVES[one[0]][2] else slow(*one) for one in FAULTS])
def test_a_wrong_weave_is_different_and_never_published(
    place: Path,
    tmp_path: Path,
    weave: tuple[str, str],
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    (graph, mode), (place_of, name, _) = weave, WEAVES[weave]
    right = getattr(place_of, name)

    def wrong(*arguments: Any, **how: Any) -> Any:
        return right(*(fault(there) if isinstance(there, Plan) else there for there in arguments), **how)

    monkeypatch.setattr(place_of, name, wrong)
    words = ("onnx", place / f"{graph}.onnx", "-a", place / "fr", "--lora", mode, "-o", tmp_path / "out.onnx")
    assert call(*words) == 4
    assert "different" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_adapter_file_is_different_and_never_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    right = onnx_adapter.input_values

    def scaled(*arguments: Any) -> dict[str, Any]:
        return {name: array * 1.05 if "lora_B" in name else array for name, array in right(*arguments).items()}

    monkeypatch.setattr(onnx_adapter, "input_values", scaled)
    words = ("onnx", place / "base.onnx", "-a", place / "fr", "--lora", "inputs", "-o", tmp_path / "out.onnx")
    assert call(*words) == 4
    assert capsys.readouterr().err.splitlines()[0].startswith("Error: fr: different")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["merged", slow("nodes")])
def test_an_adapter_too_faint_to_see_is_undecided(place: Path, tmp_path: Path, mode: str, capsys: Capture) -> None:
    weak = an_adapter_in(tmp_path / "weak", alpha=1e-6)
    words = ("onnx", place / "base.onnx", "-a", weak, "--lora", mode, "-o", tmp_path / "out.onnx")
    assert call(*words) == 5
    told = capsys.readouterr().err
    assert "undecided" in told and "the PyTorch model that the graph was exported from (--model MODEL), or" in told
    assert [path.name for path in tmp_path.iterdir()] == ["weak"]
    assert call(*words, "--no-verify") == 0
    assert record_of(tmp_path / "out.onnx")["verdict"] == {"outcome": "not verified", "why": "--no-verify"}


# --- where adapters to come may stand ---


@pytest.mark.parametrize("mode", ["inputs", "slots"])
def test_all_linear_is_every_linear_layer_but_the_head(place: Path, tmp_path: Path, capsys: Capture, mode: str) -> None:
    out = tmp_path / "out.onnx"
    words = ("--lora", mode, "--target", "all-linear", "--names", "peft", "-o", out)
    code, told = answer(capsys, "onnx", place / "base.onnx", *words)
    assert (code, told["proof"]["outcome"]) == (0, "same")
    assert {name: one["outcome"] for name, one in told["adapters"].items()} == (
        {"generated 1": "same", "generated 2": "same"} if mode == "slots" else {}
    )
    contract = read_contract(OnnxRunner(out).session.get_modelmeta().custom_metadata_map, "")
    linear = {site.name for site in find_sites(load_graph(place / "base.onnx")).linear}
    assert linear - {place.weight for place in contract.places} == {"classifier.weight"}
    assert len(contract.places) == 7


# --- names ---


def test_a_graph_that_lost_its_names_is_named_by_its_checkpoint(place: Path, tmp_path: Path, capsys: Capture) -> None:
    stripped(place / "base.onnx", tmp_path / "bare.onnx")
    words = ("onnx", tmp_path / "bare.onnx", "-a", place / "fr", "--lora", "nodes", "-o", tmp_path / "out.onnx")
    assert call(*words) == 3
    assert "do not fit the base" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bare.onnx"]
    assert call("onnx", tmp_path / "bare.onnx", "--lora", "inputs", "--target", "all-linear", "-o", tmp_path / "x") == 3
    told = capsys.readouterr().err
    assert "have no certain name" in told and "--base CHECKPOINT" in told
    assert call(*words, "--base", place / "bert.safetensors") == 0
    given = OnnxRunner(tmp_path / "out.onnx").run(feeds())
    np.testing.assert_allclose(next(iter(given.values())), pytorchs(place / "fr"), rtol=1e-4, atol=1e-6)


# --- inputs ---


def lengths(place: Path, folder: Path) -> Path:
    """The graph with an input of which nobody can tell what it should hold."""
    graph = ir.load(place / "base.onnx")
    given = ir.Value(name="lengths", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    graph.graph.inputs.append(given)
    kept = ir.node("Identity", [given], name="kept")
    kept.outputs[0].name, kept.outputs[0].type, kept.outputs[0].shape = "kept", given.type, given.shape
    graph.graph.append(kept)
    graph.graph.outputs.append(kept.outputs[0])
    ir.save(graph, folder / "lengths.onnx")
    return folder / "lengths.onnx"


def test_inputs_that_nobody_can_make_are_asked_for(place: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("onnx", lengths(place, tmp_path), "-a", place / "fr", "-o", tmp_path / "out.onnx")
    assert call(*words) == 3
    told = capsys.readouterr().err
    assert "the valid values of lengths (int64 [batch]) are unknown" in told and "--inputs FILE.npz" in told
    assert not (tmp_path / "out.onnx").exists()
    np.savez(tmp_path / "mine.npz", **feeds(), lengths=np.array([9, 8, 7]))
    code, told = answer(capsys, *words, "--inputs", tmp_path / "mine.npz")
    assert code == 0 and {there["case"] for there in told["proof"]["comparisons"]} == {"mine.npz"}
    assert any(" is the only case: " in note for note in told["proof"]["notes"])


def test_the_users_inputs_are_one_more_case(place: Path, tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "mine.npz", **feeds())
    words = ("onnx", place / "base.onnx", "-a", place / "fr", "-o", tmp_path / "out.onnx")
    code, told = answer(capsys, *words, "--inputs", tmp_path / "mine.npz")
    cases = {there["case"] for there in told["proof"]["comparisons"]}
    assert code == 0 and len(cases) == 5 and "mine.npz" in cases
    np.savez(tmp_path / "mine.npz", input_ids=feeds()["input_ids"])
    assert call(*words, "--inputs", tmp_path / "mine.npz", "--overwrite") == 3


# --- what cannot be ---


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{place}/none.onnx", "-a", "{place}/fr"], 3, "none.onnx"),
        (["{place}/fr/adapter_config.json.onnx", "-a", "{place}/fr"], 3, "adapter_config.json.onnx"),
        (["{place}/base.onnx"], 2, "MODEL is a graph already"),
        (["{place}/base.onnx", "-a", "{place}/fr", "--opset", "20"], 2, "--opset is for models that are exported"),
        (["{place}/base.onnx", "-a", "{place}/fr", "--model", "{place}/base.onnx"], 2, "names a PyTorch model"),
        (["x.py:make", "-a", "{place}/fr", "--base", "{place}"], 2, "--base is for an .onnx"),
        (["{place}/base.onnx", "-a", "{place}/odd"], 3, "the base has no weight for no.such"),
        (["{place}/base.onnx", "-a", "{place}/fr", "--base", "{place}/none"], 3, "none"),
        (
            *(["{place}/base.onnx", "--lora", "inputs", "--target", "quary,-"], 3),
            "`quary` matches no linear layer; the nearest: query; "
            "`-` matches no linear layer; the nearest: classifier, dense, key\n",
        ),
    ],
)
def test_what_cannot_be_done_is_told_and_leaves_nothing(
    place: Path, tmp_path: Path, words: list[str], code: int, message: str, capsys: Capture
) -> None:
    rng = np.random.default_rng(0)
    peft_adapter(place / "odd", {"no.such": (rng.standard_normal((2, 16)), rng.standard_normal((16, 2)))})
    assert call("onnx", *(word.format(place=place) for word in words), "-o", tmp_path / "out.onnx") == code
    told = capsys.readouterr()
    assert message in told.err and told.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_adapter_is_inserted_once_and_a_second_is_recorded(place: Path, tmp_path: Path, capsys: Capture) -> None:
    first = tmp_path / "first.onnx"
    assert call("onnx", place / "base.onnx", "-a", place / "fr", "-o", first) == 0
    for mode in ("merged", "nodes", "rows"):
        assert call("onnx", first, "-a", f"x={place / 'fr'}", "-o", tmp_path / "out.onnx", "--lora", mode) == 3
        assert "already contains the adapter x (merged as fr" in capsys.readouterr().err
    assert call("onnx", first, "-a", place / "de", "-o", tmp_path / "second.onnx", "--lora", "nodes") == 0
    assert [adapter["name"] for adapter in record_of(tmp_path / "second.onnx")["adapters"]] == ["fr", "de"]
    assert call("onnx", tmp_path / "second.onnx", "-a", f"x={an_adapter_in(tmp_path / 'it', seed=3)}", "-o",
                tmp_path / "out.onnx", "--lora", "nodes") == 3  # fmt: skip
    assert "start from the graph without it" in capsys.readouterr().err.lower()


def test_other_commands_still_want_a_pytorch_model(place: Path, tmp_path: Path, capsys: Capture) -> None:
    assert call("torchscript", place / "base.onnx", "-a", place / "fr", "-o", tmp_path / "x.pt") == 3
    assert "is no model" in capsys.readouterr().err
    assert call("verify", place / "base.onnx", "--model", place / "base.onnx", "-a", place / "fr") == 3
    assert "is no model" in capsys.readouterr().err


# --- what it takes ---


def test_pytorch_is_not_needed(place: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from lora_export.cli import run\n"
        "for mode in ('merged', 'inputs'): assert run([*sys.argv[1:], mode + '.onnx', '--lora', mode]) == 0"
    )
    words = ["onnx", str(place / "base.onnx"), "-a", str(place / "fr"), "-o"]
    line = [sys.executable, "-c", code, *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    proofs = [line for line in done.stdout.splitlines() if "same: error " in line]
    assert len(proofs) >= 2 and all(", 4 cases, CPU " in proof for proof in proofs), done.stdout


def test_weights_beside_the_graph_are_read_where_they_are(place: Path, tmp_path: Path) -> None:
    ir.save(ir.load(place / "base.onnx"), tmp_path / "apart.onnx", external_data="apart.data", size_threshold_bytes=0)
    opened = open_graph(tmp_path / "apart.onnx")
    _, apart = in_memory(opened.model)
    assert apart and not any(array.flags.owndata for array in apart.values())  # the file's own pages
    out = tmp_path / "out" / "out.onnx"
    out.parent.mkdir()
    words = ("-a", place / "fr", "-o", out, "--lora", "nodes", "--no-verify")
    assert call("onnx", tmp_path / "apart.onnx", *words) == 0
    assert set(record_of(out)["base"]) == {"apart.onnx", "apart.data"}
    assert_is_pytorchs(OnnxRunner(out), place / "fr")


def test_what_is_merged_is_what_merge_writes_and_lies_where_it_lay(place: Path, tmp_path: Path) -> None:
    ir.save(ir.load(place / "base.onnx"), tmp_path / "apart.onnx", external_data="apart.data", size_threshold_bytes=0)
    proven, merged = tmp_path / "proven", tmp_path / "merged"
    proven.mkdir(), merged.mkdir()
    assert call("onnx", tmp_path / "apart.onnx", "-a", place / "fr", "-o", proven / "out.onnx") == 0
    assert call("merge", tmp_path / "apart.onnx", place / "fr", "-o", merged / "out.onnx") == 0
    weights = [ir.load(folder / "out.onnx").graph.initializers for folder in (proven, merged)]
    assert {name: tensor_bytes(value) for name, value in weights[0].items()} == {
        n: tensor_bytes(v) for n, v in weights[1].items()
    }
    large = [value.const_value for value in weights[0].values() if value.const_value.nbytes >= MIN_EXTERNAL_BYTES]
    assert large and all(isinstance(tensor, ir.ExternalTensor) for tensor in large)
    assert record_of(proven / "out.onnx")["base"] == record_of(merged / "out.onnx")["base"]
    assert record_of(proven / "out.onnx")["base"]["apart.data"] == {"xxh3_128": hash_of(tmp_path / "apart.data")}
    properties = [entry.key for entry in onnx.load(proven / "out.onnx").metadata_props]
    assert len(properties) == len(set(properties))
    assert_is_pytorchs(OnnxRunner(proven / "out.onnx"), place / "fr")


# --- weights that are shared ---


@pytest.fixture(scope="module")
def apart(place: Path) -> Path:
    """A graph with an adapter as nodes, whose weights are beside it."""
    words = ("-a", place / "de", "--lora", "nodes", "--external-data", "--no-verify")
    assert call("onnx", place / "base.onnx", *words, "-o", place / "apart" / "de.onnx") == 0
    return place / "apart"


@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows", "slots"])
def test_further_graph_refers_to_all_that_it_does_not_change(
    place: Path, apart: Path, tmp_path: Path, mode: str
) -> None:
    shutil.copytree(apart, tmp_path, dirs_exist_ok=True)
    out, alone = tmp_path / "fr.onnx", tmp_path / "alone" / "fr.onnx"
    words = ("onnx", place / "base.onnx", "-a", place / "fr", "--lora", mode, "--no-verify")
    (data,) = tmp_path.glob("*.data")
    assert call(*words, "-o", out, "--share-with", tmp_path / "de.onnx") == 0
    assert call(*words, "-o", alone) == 0
    changed = {f"{name}.weight" for name in TARGETS} if mode == "merged" else set()
    names = {site.value.name: site.name for site in find_sites(load_graph(place / "base.onnx")).linear}
    base = {
        name: value.const_value.nbytes
        for name, value in load_graph(place / "base.onnx").graph.initializers.items()
        if value.const_value.nbytes > MIN_EXTERNAL_BYTES and names.get(name) not in changed
    }
    tensors = {name: value.const_value for name, value in load_graph(out).graph.initializers.items()}
    shared = {name for name, one in tensors.items() if isinstance(one, ir.ExternalTensor) and Path(one.path) == data}
    assert shared == base.keys() and len(shared) >= 3
    saved = alone.stat().st_size - out.stat().st_size
    assert 0 < sum(base.values()) - saved < 200 * len(shared) + 200  # but for the names of their places
    assert not list(tmp_path.glob("fr*.data"))
    if mode in ("merged", "nodes"):
        assert_is_pytorchs(OnnxRunner(out), place / "fr")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows", "slots"])
def test_a_graph_that_shares_weights_is_proven(
    place: Path, apart: Path, tmp_path: Path, mode: str, capsys: Capture
) -> None:
    shutil.copytree(apart, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "fr.onnx"
    words = ("-a", place / "fr", "--lora", mode, "-o", out, "--share-with", tmp_path / "de.onnx")
    code, told = answer(capsys, "onnx", place / "base.onnx", *words)
    assert (code, told["proof"]["outcome"]) == (0, "same")
    assert mode in ("merged", "nodes") or (told["bits_of_base"], told["adapters"]["fr"]["outcome"]) == (True, "same")
    if mode == "inputs":
        assert_is_pytorchs(OnnxRunner(out).with_adapter(tmp_path / "fr.onnx_adapter"), place / "fr")


# `merge` leaves small tensors where they are, and onnxruntime needs some in the graph.
@pytest.mark.parametrize(("words", "smallest"), [(("onnx", "-a"), 0), (("merge",), MIN_EXTERNAL_BYTES - 1)])
def test_changed_weights_are_beside_a_graph_whose_base_has_them_there(
    place: Path, tmp_path: Path, words: tuple[str, ...], smallest: int
) -> None:
    """A merge writes what changes into a file of its own, and the outputs are those of a merge by itself."""
    base, out = tmp_path / "base.onnx", tmp_path / "fr.onnx"
    ir.save(ir.load(place / "base.onnx"), base, external_data="w.data", size_threshold_bytes=smallest)
    command, *rest = words
    assert call(command, base, *rest, place / "fr", "-o", out, "--share-with", base) == 0
    (own,) = tmp_path.glob("fr.onnx.*.data")
    changed = sum(4 * rows * columns for rows, columns in TARGETS.values() if rows * columns >= 256)
    assert changed <= own.stat().st_size < changed + 4096 * len(TARGETS)  # each keeps its place in a page
    assert record_of(out)["base"]["w.data"] == {"xxh3_128": hash_of(tmp_path / "w.data")}
    assert_is_pytorchs(OnnxRunner(out), place / "fr")
    more = ("-a", place / "de", "-o", tmp_path / "both.onnx", "--no-verify")
    assert call("onnx", out, *more) == 0  # it is a base itself
    assert "lora_export.shared_weights" not in load_graph(tmp_path / "both.onnx").metadata_props


@pytest.mark.parametrize("words", [("onnx", "--no-verify", "-a"), ("merge",)])
def test_merge_takes_weights_out_of_the_graph(place: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    out, (command, *rest) = tmp_path / "fr.onnx", words
    assert call(command, place / "base.onnx", *rest, place / "fr", "-o", out, "--external-data") == 0
    (data,) = tmp_path.glob("fr.onnx.*.data")
    tensors = [value.const_value for value in load_graph(out).graph.initializers.values()]
    large = [tensor for tensor in tensors if tensor.nbytes >= MIN_EXTERNAL_BYTES]
    assert large and {Path(tensor.path) for tensor in large} == {data}
    assert_is_pytorchs(OnnxRunner(out), place / "fr")


def test_shared_file_that_moves_or_changes_is_reported(tmp_path: Path, capsys: Capture) -> None:
    """By `verify` and by `inspect`, in one line; and a new base leaves the weights that a product needs."""
    base, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    rng = np.random.default_rng(0)
    pair = (rng.standard_normal((3, 16)), rng.standard_normal((32, 3)))
    adapter = peft_adapter(tmp_path / "ad", {"encoder.layers.0.linear1": pair})
    words = ("onnx", SPOTTER, "--no-verify", "-o")
    assert call(*words, base, "--external-data") == 0
    assert call(*words, out, "-a", adapter, "--share-with", base) == 0
    verify = ("verify", out, "--model", SPOTTER, "-a", adapter)
    assert (call(*verify), call("inspect", out)) == (0, 0)
    (data,) = tmp_path.glob("base.onnx.*.data")
    assert call(*words, base, "-a", adapter, "--external-data", "--overwrite") == 0
    assert f"left {data.name}: weights that base.onnx does not use, and out.onnx does" in capsys.readouterr().err
    damaged = data.read_bytes()[:-1] + b"\1"
    for change, message in (
        (lambda: data.write_bytes(damaged), "with another graph, and this file has changed: its xxh3_128 is"),
        (data.unlink, "with another graph, and this file is not beside it. Put it back"),
    ):
        change()
        for words in (verify, ("inspect", out)):
            assert call(*words) == 3
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert f"shares the weights in {data.name} {message}" in line


# --- of every maker ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "exporter", "after", "mode"),
    [
        ("bert", "torchscript", "extended", "merged"), slow("bert", "torchscript", "", "inputs"),
        slow("llama", "torchscript", "", "nodes"), slow("llama", "transformers", "", "nodes"),
        slow("llama", "transformers, fused", "", "merged"), slow("gpt2", "dynamo", "", "nodes"),
        slow("gpt2", "torchscript", "stripped", "merged"), slow("llama", "dynamo", "", "rows"),
        slow("bert", "dynamo, not optimised", "basic", "nodes"),
    ],
)  # fmt: skip
def test_graphs_of_every_maker(
    name: str, exporter: str, after: str, mode: str, tmp_path: Path, capsys: Capture
) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    EXPORTERS[exporter](name, path)
    if after:
        OPTIMISERS[after](path, tmp_path / "after.onnx")
        path = tmp_path / "after.onnx"
    adapter = save_adapter(name, tmp_path / "a")
    code, told = answer(capsys, "onnx", path, "-a", adapter, "--lora", mode, "--base", checkpoint_of(name), "-o", out)
    assert code == 0 and told["proof"]["outcome"] == "same"
    if mode in ("merged", "nodes"):
        assert_computes_merged_model(out, name, adapter)
    else:
        assert {proof["outcome"] for proof in told["adapters"].values()} == {"same"}


@pytest.mark.slow
@pytest.mark.parametrize("proof", ["", "--no-verify"])
def test_rows_in_a_fused_graph_that_lost_its_shapes(proof: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    EXPORTERS["dynamo"]("gpt2", tmp_path / "model.onnx")
    OPTIMISERS["extended"](tmp_path / "model.onnx", tmp_path / "fused.onnx")
    graph = onnx.load(tmp_path / "fused.onnx")
    assert "FastGelu" in {node.op_type for node in graph.graph.node}
    del graph.graph.value_info[:]
    onnx.save(graph, tmp_path / "lost.onnx")
    adapter = save_adapter("gpt2", tmp_path / "a")
    words = ["-a", adapter, "--lora", "rows", "--base", checkpoint_of("gpt2"), "-o", out, *([proof] if proof else [])]
    code, told = answer(capsys, "onnx", tmp_path / "lost.onnx", *words)
    assert code == 0 and (bool(proof) or told["mixed"]["outcome"] == "same")
    assert_computes_merged_model(out, "gpt2", adapter, adapter_ids=torch.ones(3, dtype=torch.int64))


def test_what_keeps_a_graph_from_showing_its_shapes_is_told(tmp_path: Path, capsys: Capture) -> None:
    body = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[batch, 3] x, int64[batch] kind) => (float[batch, 2] y)
    <float[3, 2] "fc.weight" = {1, 2, 3, 4, 5, 6}, float[3] none = {0, 0, 0}> {
        k = Cast <to: int = 1> (kind)
        last = Constant <value_ints: ints = [1]> ()
        column = Unsqueeze (k, last)
        f = Add (x, column)
        h = com.microsoft.FastGelu (f, none)
        y = MatMul (h, "fc.weight")
    }"""
    onnx.save(onnx.parser.parse_model(body), tmp_path / "m.onnx")
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    words = ["onnx", tmp_path / "m.onnx", "-a", tmp_path / "adapter", "-o", tmp_path / "o.onnx", "--lora", "rows"]
    assert call(*words, "--no-verify") == 3
    told = capsys.readouterr().err
    assert "note: the graph was not run to find the batch: inputs for" in told
    assert "the valid values of kind (int64 [batch]) are unknown" in told
    assert "fc.weight (MatMul" in told and "the shape of its input is unknown" in told
    assert not list(tmp_path.glob("*o.onnx*"))


@pytest.mark.parametrize("mode", ["merged", slow("nodes")])
def test_a_graph_in_half_precision_is_judged_by_what_it_can_hold(mode: str, tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 40)).half().eval()
    path = tmp_path / "half.onnx"
    torch.onnx.export(
        module, (torch.randn(2, 32).half(),), path, dynamo=False, opset_version=17, input_names=["x"],
        output_names=["y"], dynamic_axes={"x": {0: "batch"}},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    pairs = {"0": (rng.standard_normal((3, 32)), 0.1 * rng.standard_normal((64, 3)))}
    adapter = peft_adapter(tmp_path / "a", pairs)
    code, told = answer(capsys, "onnx", path, "-a", adapter, "--lora", mode, "-o", tmp_path / "out.onnx")
    assert (code, told["proof"]["outcome"], told["proof"]["dtype"]) == (0, "same", "float16")
    losses = [there["figures"]["merge_loss"] for there in told["proof"]["comparisons"]]
    assert all(1e-5 < loss < 1e-2 for loss in losses) if mode == "merged" else losses == [None] * len(losses)


def test_a_merge_that_rounding_takes_away_is_refused(tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    path = graph_file(tmp_path / "half.onnx", {"up.weight": rng.standard_normal((32, 40)).astype(np.float16)})
    pairs = {"up": (1e-3 * rng.standard_normal((2, 32)), 1e-3 * rng.standard_normal((40, 2)))}
    adapter = peft_adapter(tmp_path / "a", pairs)
    assert call("onnx", path, "-a", adapter, "-o", tmp_path / "out.onnx") == 3
    assert "up.weight" in capsys.readouterr().err and not (tmp_path / "out.onnx").exists()


ENDLESS = """
<ir_version: 8, opset_import: ["" : 17]>
endless (float[batch, 3] x) => (float[batch, 2] y)
<float[3, 2] "fc.weight" = {1, 2, 3, 4, 5, 6}, bool true = {1}> {
    most = Constant <value_int: int = 9223372036854775807> ()
    h = MatMul (x, "fc.weight")
    y = Loop <body: graph = once (int64 i, bool go, float[batch, 2] before) => (bool again, float[batch, 2] after) {
        again = Identity (go)
        after = Neg (before)
    }> (most, true, h)
}
"""


@pytest.mark.parametrize("mode", ["merged", "rows"])
def test_loop_without_end_is_stopped_by_the_time_limit(tmp_path: Path, mode: str, capsys: Capture) -> None:
    onnx.save(onnx.parser.parse_model(ENDLESS), tmp_path / "endless.onnx")
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    words = ["onnx", tmp_path / "endless.onnx", "-a", tmp_path / "adapter", "-o", tmp_path / "o.onnx", "--lora", mode]
    assert call(*words, "--timeout", "0.5") == 8
    assert "the base graph did not finish within 0.5 seconds. Allow more with --timeout" in capsys.readouterr().err
    assert not list(tmp_path.glob("*o.onnx*"))
