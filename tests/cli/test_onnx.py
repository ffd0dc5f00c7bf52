"""`lora-export onnx` with adapters that are swapped while the graph runs, and `convert` and `verify` of such graphs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora_export import formats
from lora_export.api import onnx_steps
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import Contract, read_contract
from lora_export.graph.insert import row_branches
from lora_export.graph.insert.row_branches import RowScales
from lora_export.models.load import load_model
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays
from support import FACTORIES
from support.cli import Capture, answer, call
from support.graphs import record_of
from support.handmade import peft_adapter
from support.proofs import attached_copy
from support.small_models import small_adapter, small_model

MODEL = f"{FACTORIES}:spotter"
PACKED, OUT = "encoder.layers.0.self_attn", "encoder.layers.0.self_attn.out_proj"


def a_pair(rng: np.random.Generator, out: int, into: int, rank: int) -> tuple[Any, Any]:
    return 0.3 * rng.standard_normal((rank, into)), 0.3 * rng.standard_normal((out, rank))


def adapters(folder: Path, *, seed: int = 0) -> Path:
    """`fr` (rsLoRA, rank 4, attention and more), `legal` (rank 2 and 3, other layers)."""
    rng = np.random.default_rng(seed)
    pairs = {PACKED: a_pair(rng, 48, 16, 4), OUT: a_pair(rng, 16, 16, 4), "head": a_pair(rng, 3, 16, 4)}
    peft_adapter(folder / "fr", pairs, use_rslora=True, lora_alpha=6)
    pairs = {"encoder.layers.1.linear2": a_pair(rng, 16, 32, 2), "head": a_pair(rng, 3, 16, 3)}
    peft_adapter(folder / "legal", pairs, rank_pattern={"head": 3})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters, a graph with inputs for them, and the base as a graph."""
    folder = adapters(tmp_path_factory.mktemp("swapped"))
    words = ("-a", folder / "fr", "-a", folder / "legal", "--weight", "1", "--weight", "-0.5", "--target", "linear1")
    assert call("onnx", MODEL, *words, "-o", folder / "graph.onnx", "--lora", "inputs") == 0
    assert call("onnx", MODEL, "-o", folder / "base.onnx") == 0
    return folder


def signal(batch: int = 3, length: int = 7) -> dict[str, Any]:
    return {"signal": np.random.default_rng(1).standard_normal((batch, 4, length)).astype(np.float32)}


# --- onnx --lora inputs ---


@pytest.mark.slow
def test_inputs_are_proven_one_adapter_after_the_other_and_the_base(place: Path) -> None:
    verdict = record_of(place / "graph.onnx")["verdict"]
    assert verdict["outcome"] == "same" and verdict["bits_of_base"] is True
    assert {name: told["outcome"] for name, told in verdict["adapters"].items()} == {"fr": "same", "legal": "same"}
    assert {path.name for path in place.iterdir() if path.is_file()} == {
        *("graph.onnx", "base.onnx", "fr.onnx_adapter", "legal.onnx_adapter")
    }


def test_every_target_of_every_adapter_and_of_target_has_its_place(place: Path) -> None:
    contract = read_contract(OnnxRunner(place / "graph.onnx").session.get_modelmeta().custom_metadata_map, "")
    assert [re.sub(r"(\.in_proj_|\.)weight$", "", there.weight) for there in contract.places] == [
        *(PACKED, OUT, "encoder.layers.0.linear1"),
        *("encoder.layers.1.linear1", "encoder.layers.1.linear2", "head"),
    ]


def test_without_an_adapter_the_graph_is_the_base_to_the_bit(place: Path) -> None:
    graph, base = OnnxRunner(place / "graph.onnx"), OnnxRunner(place / "base.onnx")
    for batch, length in [(1, 1), (3, 7), (5, 33)]:
        answers, expected = graph.run(signal(batch, length)), base.run(signal(batch, length))
        assert answers["output_0"].tobytes() == expected["output_0"].tobytes()


def test_onnxruntimes_own_loader_computes_what_pytorch_computes(place: Path) -> None:
    session = onnxruntime.InferenceSession(place / "graph.onnx", providers=["CPUExecutionProvider"])
    loaded = load_model(MODEL)
    for name, strength in (("fr", 1.0), ("legal", -0.5)):
        adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(place / f"{name}.onnx_adapter"))
        options.add_active_adapter(adapter)
        (given,) = session.run(None, signal(), options)
        module = attached_copy(loaded, [formats.load(place / name)], [strength])
        with torch.no_grad():
            expected = module(torch.from_numpy(signal()["signal"])).numpy()
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(given - session.run(None, signal())[0]).max() > 1e-2


@pytest.mark.slow
def test_no_adapter_but_targets_make_a_graph_for_adapters_to_come(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "empty.onnx"
    code, told = answer(
        capsys, "onnx", MODEL, "-o", out, "--lora", "inputs", "--target", "all-linear", "--names", "peft"
    )
    assert (code, told["proof"]["outcome"], told["bits_of_base"], told["adapters"]) == (0, "same", True, {})
    assert [path.name for path in tmp_path.iterdir()] == ["empty.onnx"]
    contract = read_contract(OnnxRunner(out).session.get_modelmeta().custom_metadata_map, "")
    assert len(contract.places) == 9 and contract.places[0].a == f"base_model.model.{PACKED}.lora_A.weight"
    # The base is the same one, whatever the places and names.
    other = read_contract(OnnxRunner(place / "graph.onnx").session.get_modelmeta().custom_metadata_map, "")
    assert contract.base == other.base


@pytest.mark.slow
def test_an_adapter_that_was_written_wrongly_is_never_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    right = onnx_adapter.input_values

    def scaled(*arguments: Any) -> dict[str, Any]:
        return {name: array * 1.05 if "lora_B" in name else array for name, array in right(*arguments).items()}

    monkeypatch.setattr(onnx_adapter, "input_values", scaled)
    assert call("onnx", MODEL, "-a", place / "fr", "-o", tmp_path / "out.onnx", "--lora", "inputs") == 4
    told = capsys.readouterr().err
    assert told.splitlines()[0].startswith("Error: fr: different")
    assert f"first module that differs: {PACKED}\n" in told
    assert "its adapter has 1.05 times the correct strength" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_graph_that_is_not_the_base_to_the_bit_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    right = onnx_steps.insert_inputs

    def in_another_order(program: ir.Model, *arguments: Any, **options: Any) -> Contract:
        """As a fusion might compute it: the last bit of a bias is another."""
        bias = program.graph.initializers["head.bias"]
        assert bias.const_value is not None
        bias.const_value = ir.Tensor(np.nextafter(bias.const_value.numpy(), np.float32(9)), name="head.bias")
        return right(program, *arguments, **options)

    monkeypatch.setattr(onnx_steps, "insert_inputs", in_another_order)
    code, told = answer(capsys, "onnx", MODEL, "-a", place / "fr", "-o", tmp_path / "out.onnx", "--lora", "inputs")
    assert (code, told["bits_of_base"]) == (0, False)
    assert "not to the last bit" in capsys.readouterr().err


@pytest.mark.slow
def test_graphs_in_one_folder_share_an_equal_adapter_file(place: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("onnx", MODEL, "-a", place / "fr", "--lora", "inputs", "--no-verify", "-o")
    assert call(*words, tmp_path / "new/one.onnx") == call(*words, tmp_path / "new/two.onnx") == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["fr.onnx_adapter", "one.onnx", "two.onnx"]
    capsys.readouterr()
    assert call(*words, tmp_path / "new/three", "--weight", "2") == 7
    message = capsys.readouterr().err
    assert "fr.onnx_adapter exists already, with other contents" in message and "(-a NAME=ADAPTER)" in message
    assert call(*words[:2], "-a", f"louder={place / 'fr'}", *words[4:], tmp_path / "new/three", "--weight", "2") == 0
    assert "louder.onnx_adapter" in {path.name for path in (tmp_path / "new").iterdir()}


@pytest.mark.slow
def test_files_of_adapters_that_exist_are_kept_until_overwrite_is_said(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "fr.onnx_adapter").write_text("mine")
    words = ("onnx", MODEL, "-a", place / "fr", "-o", tmp_path / "out.onnx", "--lora", "inputs")
    assert call(*words) == 7
    assert "fr.onnx_adapter exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["fr.onnx_adapter"]
    assert call(*words, "--overwrite", "--no-verify") == 0
    assert record_of(tmp_path / "out.onnx")["verdict"]["outcome"] == "not verified"
    assert onnx_adapter.read(tmp_path / "fr.onnx_adapter").values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "query"], "`query` matches no linear layer"),
        (["-a", "{place}/fr", "-a", "copy={place}/fr"], "copy is the same adapter as fr"),
        (["-a", "x={place}/fr", "-a", "x={place}/legal"], "2 adapters are called x"),
        (["-a", ".x={place}/fr"], "the name '.x' of an adapter cannot be the name of a file"),
    ],
)
def test_what_inputs_cannot_be_made_of_is_told(
    place: Path, tmp_path: Path, words: list[str], message: str, capsys: Capture
) -> None:
    given = [word.format(place=place) for word in words]
    assert call("onnx", MODEL, "-o", tmp_path / "out.onnx", "--lora", "inputs", *given) == 3
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- convert ---


def test_a_later_adapter_is_converted_and_computes_what_pytorch_computes(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    later, out = adapters(tmp_path, seed=7) / "fr", tmp_path / "next.onnx_adapter"
    words = ("convert", later, "--to", "onnx_adapter", "--for", place / "graph.onnx", "-o", out)
    code, told = answer(capsys, *words)
    assert (code, told["weights"], told["of"]) == (0, 3, 6)
    words = ("verify", place / "graph.onnx", "--model", MODEL, "-a")
    assert call(*words, later, "--onnx-adapter", out) == 0
    assert call(*words, place / "fr", "--onnx-adapter", out) == 4
    assert call("verify", place / "graph.onnx", "--model", MODEL) == 0  # nothing given: the base


def test_convert_writes_the_bytes_that_onnx_wrote(place: Path, tmp_path: Path) -> None:
    for name, weight in (("fr", "1"), ("legal", "-0.5")):
        out = tmp_path / f"{name}.onnx_adapter"
        words = ("--to", "onnx_adapter", "--for", place / "graph.onnx", "--weight", weight, "-o", out)
        assert call("convert", place / name, *words) == 0
        there, other = onnx_adapter.read(out), onnx_adapter.read(place / out.name)
        assert (there.model_version, there.adapter_version) == (other.model_version, other.adapter_version)
        for key, value in there.values.items():
            assert np.array_equal(
                onnx_adapter.array_of_ort_value(value), onnx_adapter.array_of_ort_value(other.values[key])
            )


def test_inspect_shows_what_an_adapters_file_holds(place: Path, capsys: Capture) -> None:
    held = onnx_adapter.read(place / "fr.onnx_adapter")
    capsys.readouterr()
    assert call("inspect", place / "fr.onnx_adapter", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["model_version"]) == ("onnx_adapter", held.model_version)
    shapes = {name: there["shape"] for name, there in told["parameters"].items()}
    assert shapes == {name: list(onnx_adapter.array_of_ort_value(value).shape) for name, value in held.values.items()}
    assert call("inspect", place / "fr.onnx_adapter", "--all") == 0
    name = min(shapes)
    shown = " x ".join(map(str, shapes[name]))
    assert f"  {name}  {shown} tensor(float)" in capsys.readouterr().out.splitlines()


def harmed(place: Path, folder: Path, what: str) -> Path:
    """An adapter for `graph.onnx` that does not fit it, in the way that its name tells."""
    rng = np.random.default_rng(0)
    head: dict[str, tuple[Any, Any]] = {"head": a_pair(rng, 3, 16, 2)}
    match what:
        case "misfits":
            pairs = {"head": a_pair(rng, 3, 17, 2), "encoder.layers.1.self_attn": a_pair(rng, 48, 16, 2)}
            return peft_adapter(folder / what, pairs | {OUT: a_pair(rng, 16, 16, 2)})
        case "whole":
            return peft_adapter(
                folder / what, {OUT: a_pair(rng, 16, 16, 2)}, {"head.weight": np.ones((3, 16), np.float32)}
            )
        case "nothing":
            a, b = head["head"]
            return peft_adapter(folder / what, {"head": (a, 0 * b)})
        case _:
            a, b = head["head"]
            return peft_adapter(folder / what, {"head": (a, 9 * b)}, lora_alpha=6e38)


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("misfits", ["2 of 3 targets do not fit", "(out, in), the adapter was trained on", "takes adapters at 6"]),
        ("whole", ["whole, head.weight: a whole tensor", "--lora merged"]),
        ("nothing", ["has no effect"]),
        ("loud", ["head.lora_B.weight would not be finite: the largest float32"]),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_before_writing(
    place: Path, tmp_path: Path, what: str, messages: list[str], capsys: Capture
) -> None:
    wrong = harmed(place, tmp_path, what)
    out = tmp_path / "out.onnx_adapter"
    assert call("convert", wrong, "--to", "onnx_adapter", "--for", place / "graph.onnx", "-o", out) == 3
    told = capsys.readouterr().err
    assert [message for message in messages if message not in told] == []
    assert [path.name for path in tmp_path.iterdir()] == [what]


def test_a_graph_that_is_not_made_for_it_is_refused(place: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("convert", place / "fr", "--to", "onnx_adapter", "-o", tmp_path / "x", "--for")
    assert call(*words, place / "base.onnx") == 3
    assert "does not record where it takes adapters" in capsys.readouterr().err
    assert call(*words, place / "missing.onnx") == 3
    graph = onnx.load(place / "graph.onnx")
    weight = next(value for value in graph.graph.initializer if value.name == "conv.bias")
    weight.float_data.clear()
    weight.raw_data = np.zeros(16, np.float32).tobytes()
    onnx.save(graph, tmp_path / "other.onnx")
    assert call(*words, tmp_path / "other.onnx") == 3
    assert "weights without an adapter differ from those when the inputs were added" in capsys.readouterr().err
    assert call(*words[:-1]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["other.onnx"]


# --- onnx --lora rows ---


@pytest.fixture(scope="module")
def rows(place: Path) -> Path:
    words = ("-a", place / "fr", "-a", place / "legal", "--weight", "1", "--weight", "-0.5")
    assert call("onnx", MODEL, *words, "-o", place / "rows.onnx", "--lora", "rows") == 0
    return place / "rows.onnx"


def test_rows_are_proven_for_every_id_and_mixed(rows: Path) -> None:
    verdict = record_of(rows)["verdict"]
    assert verdict["outcome"] == verdict["mixed"]["outcome"] == "same" and verdict["bits_of_base"] is True
    assert {name: told["outcome"] for name, told in verdict["adapters"].items()} == {"fr": "same", "legal": "same"}


def test_each_row_of_a_mixed_batch_equals_the_inputs_graph(place: Path, rows: Path) -> None:
    ids = np.array([2, 0, 1, 1, 2])
    answer = OnnxRunner(rows).run({**signal(5), "adapter_ids": ids})["output_0"]
    swapped = OnnxRunner(place / "graph.onnx")
    runners = [swapped, *(swapped.with_adapter(place / f"{name}.onnx_adapter") for name in ("fr", "legal"))]
    alone = [runner.run(signal(5))["output_0"] for runner in runners]
    expected = np.stack([alone[adapter][row] for row, adapter in enumerate(ids)])
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-6)
    assert answer[1].tobytes() == alone[0][1].tobytes()
    assert np.abs(expected - alone[0])[[0, 2, 3, 4]].max(1).min() > 1e-2


@pytest.mark.parametrize("runner", [(), ("--runner", "onnx-reference")], ids=["onnxruntime", "registered"])
def test_an_unknown_id_is_refused(place: Path, rows: Path, runner: tuple[str, ...], capsys: Capture) -> None:
    assert call("verify", rows, "--model", MODEL, "-a", place / "legal", "--adapter-id", "3", *runner) == 3
    assert "has no adapter 3 (--adapter-id). Its ids are 0 (the base), 1 (fr), 2 (legal)\n" in capsys.readouterr().err
    assert call("verify", place / "base.onnx", "--model", MODEL, "--adapter-id", "0", *runner) == 3
    assert "has no input adapter_ids" in capsys.readouterr().err


def test_verify_judges_one_id(place: Path, rows: Path) -> None:
    words = ("verify", rows, "--model", MODEL)
    assert call(*words, "-a", place / "legal", "--weight", "-0.5", "--adapter-id", "2") == 0
    assert call(*words, "--adapter-id", "0") == 0


def test_verify_judges_all_ids_and_their_mixtures_at_once(place: Path, rows: Path, capsys: Capture) -> None:
    words = ("verify", rows, "--model", MODEL, "--json")
    fr, legal = ("-a", place / "fr"), ("-a", place / "legal")
    capsys.readouterr()
    assert call(*words, *fr, *legal, "--weight", "1", "--weight", "-0.5") == 0
    told = json.loads(capsys.readouterr().out)
    roles = [case["case"].split(", ")[0] for case in told["comparisons"]]
    assert list(dict.fromkeys(roles)) == ["the base", "fr", "legal", "mixed batches"]
    assert roles == [role for role in dict.fromkeys(roles) for _ in range(3)]
    assert [adapter["name"] for adapter in told["about"]["adapters"]] == ["fr", "legal"]

    assert call(*words, *legal, *fr, "--weight", "-0.5", "--weight", "1") == 4  # another order than the graph's
    wrong = json.loads(capsys.readouterr().out)
    cases = {reason["case"].split(", ")[0] for reason in wrong["reasons"] if reason["gate"] != "weights"}
    assert cases == {"legal", "fr", "mixed batches"}
    assert wrong["diagnosis"]["first"]

    assert call(*words, *legal) == 3
    assert "has 2 adapters (fr, legal), not 1: give them in that order" in capsys.readouterr().err


def test_verify_tells_where_it_goes_wrong_and_why(place: Path, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "verdict.json"
    words = ("verify", rows, "--model", MODEL, "--adapter-id", "1")
    code, told = answer(capsys, *words, "-a", place / "fr", "--weight", "7", "--report", report)
    assert code == 4 and json.loads(report.read_text())["diagnosis"] == told["diagnosis"]
    assert told["diagnosis"]["first"] == PACKED
    assert "its adapter has 0.1429 times the correct strength" in told["diagnosis"]["why"]
    assert "the weight 7; this file contains it with the weight 1" in told["recorded"][0]
    assert "as if" not in told["diagnosis"]["why"]  # the record states the cause
    assert "2 are wrong, 2 in the same way; 10 of 10 modules were compared" in told["diagnosis"]["why"]
    layers = {layer.pop("name"): layer for layer in told["diagnosis"]["layers"]}
    assert list(layers)[:3] == ["conv", PACKED, OUT] and set(layers[OUT]) == {"error", "deployed_error", "effect"}
    assert layers["conv"]["effect"] == 0 and layers[OUT]["error"] > 1e4 * layers[OUT]["deployed_error"]
    assert call(*words, "-a", place / "legal", "--weight", "-0.5") == 4
    assert "with adapter id 2 (legal) its output would be correct" in capsys.readouterr().out


@pytest.mark.slow
def test_verify_compares_every_module_where_it_is_asked_to(place: Path, rows: Path, capsys: Capture) -> None:
    words = ("verify", rows, "--model", MODEL, "--adapter-id", "1", "-a", place / "fr")
    code, told = answer(capsys, *words)
    assert (code, told["diagnosis"]) == (0, None)
    code, told = answer(capsys, *words, "--trace")
    assert (code, told["diagnosis"]["first"], len(told["diagnosis"]["layers"])) == (0, None, 10)
    assert call(*words, "--trace") == 0
    assert "no module differs\n  every module that was compared is within its gate" in capsys.readouterr().out


def test_rows_that_mix_up_adapters_are_never_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Confused(OnnxRunner):
        def run(self, inputs: Arrays) -> Arrays:
            if self._adapter_ids is not None and len(set(self._adapter_ids)) > 1:
                self._adapter_ids = np.roll(self._adapter_ids, 1)
            return super().run(inputs)

    monkeypatch.setattr(onnx_steps, "OnnxRunner", Confused)
    words = ("-a", place / "fr", "-a", place / "legal", "--lora", "rows")
    assert call("onnx", MODEL, *words, "-o", tmp_path / "out.onnx") == 4
    assert capsys.readouterr().err.splitlines()[0].startswith("Error: mixed batches: different")
    assert list(tmp_path.iterdir()) == []


# --- verify ---


def test_verify_refuses_an_adapter_for_another_base(place: Path, tmp_path: Path, capsys: Capture) -> None:
    there = onnx_adapter.read(place / "fr.onnx_adapter")
    given = {name: onnx_adapter.array_of_ort_value(value) for name, value in there.values.items()}
    onnx_adapter.write(tmp_path / "foreign", given, Contract("12345678", "", ()), sha256="0")
    words = ("verify", place / "graph.onnx", "--model", MODEL, "-a", place / "fr", "--onnx-adapter")
    assert call(*words, tmp_path / "foreign") == 3
    assert "it was made for another base" in capsys.readouterr().err
    (tmp_path / "noise").write_bytes(b"noise")
    assert call(*words, tmp_path / "noise") == 3
    shutil.copy(place / "fr.onnx_adapter", tmp_path / "copy")
    words = ("verify", place / "base.onnx", "--model", MODEL, "-a", place / "fr", "--onnx-adapter")
    for runner in ((), ("--runner", "onnx-reference")):  # the evaluator would ignore what the graph does not take
        assert call(*words, tmp_path / "copy", *runner) == 3
        assert "base.onnx takes no adapter from a file: leave --onnx-adapter out" in capsys.readouterr().err


# --- DoRA and convolutions ---


def dora_adapter(folder: Path, *, seed: int) -> Path:
    """DoRA at the convolution, the packed projection, and the head."""
    rng = np.random.default_rng(seed)
    conv = 0.3 * rng.standard_normal((2, 4, 3)), 0.3 * rng.standard_normal((16, 2, 1))
    pairs = {"conv": conv, PACKED: a_pair(rng, 48, 16, 2), "head": a_pair(rng, 3, 16, 2)}
    shapes = {"conv": (1, 16, 1), PACKED: (48,), "head": (3,)}
    magnitudes = {f"{name}.lora_magnitude_vector": rng.uniform(0.5, 1.5, shape) for name, shape in shapes.items()}
    peft_adapter(folder, pairs, use_dora=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{name}": array.astype(np.float32) for name, array in magnitudes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def with_dora(place: Path, folder: Path, *more: str) -> Path:
    """Make a graph that takes DoRA wherever it takes an adapter, and one adapter that has it."""
    adapter, out = dora_adapter(folder / "dora", seed=3), folder / "graph.onnx"
    words = ("-a", adapter, "-a", place / "fr", "--dora", "--lora", "inputs", "-o", out)
    assert call("onnx", MODEL, *words, *more) == 0
    return out


@pytest.mark.slow
def test_dora_and_convolutions_are_proven_as_inputs_beside_plain_lora(place: Path, tmp_path: Path) -> None:
    graph = with_dora(place, tmp_path)
    verdict = record_of(graph)["verdict"]
    assert verdict["outcome"] == "same"
    assert {name: told["outcome"] for name, told in verdict["adapters"].items()} == {"dora": "same", "fr": "same"}
    answers = [OnnxRunner(path).run(signal())["output_0"] for path in (graph, place / "base.onnx")]
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-6)


def test_dora_of_next_week_is_converted_with_the_graphs_own_weights(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    graph = with_dora(place, tmp_path, "--no-verify")
    later, out = dora_adapter(tmp_path / "later", seed=8), tmp_path / "later.onnx_adapter"
    words = ("convert", later, "--to", "onnx_adapter", "-o", out, "--weight", "0.5", "--for")
    code, told = answer(capsys, *words, graph)
    assert (code, told["weights"], told["of"]) == (0, 3, 4)
    assert call("verify", graph, "--model", MODEL, "--onnx-adapter", out, "-a", later, "--weight", "0.5") == 0


def test_dora_for_a_graph_without_dora_is_refused_with_advice(place: Path, tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    later = peft_adapter(tmp_path / "later", {"head": a_pair(rng, 3, 16, 2)}, use_dora=True)
    tensors = load_file(later / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.head.lora_magnitude_vector": np.ones(3, np.float32)},
        later / "adapter_model.safetensors",
    )
    words = ("convert", later, "--to", "onnx_adapter", "--for", place / "graph.onnx", "-o", tmp_path / "x")
    assert call(*words) == 3
    told = capsys.readouterr().err
    assert "later, head.weight\n" in told and "`lora-export onnx --lora inputs --dora`" in told
    assert not (tmp_path / "x").exists()
    assert call("onnx", MODEL, "-a", later, "--lora", "nodes", "--dora", "-o", tmp_path / "x.onnx") == 2


@pytest.mark.slow
def test_rows_with_dora_and_convolutions_are_proven_for_every_id_and_mixed(place: Path, tmp_path: Path) -> None:
    # Both change the head, and would be refused as a sum: DoRA rescales all that it finds there.
    adapter = dora_adapter(tmp_path / "dora", seed=3)
    words = ("-a", adapter, "-a", place / "fr", "--lora", "rows", "-o", tmp_path / "rows.onnx")
    assert call("onnx", MODEL, *words) == 0
    verdict = record_of(tmp_path / "rows.onnx")["verdict"]
    assert verdict["outcome"] == verdict["mixed"]["outcome"] == "same"
    assert {name: told["outcome"] for name, told in verdict["adapters"].items()} == {"dora": "same", "fr": "same"}


# --- a fixed rank ---


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inputs", "rows"])
def test_a_fixed_rank_leaves_no_dynamic_shape_of_an_adapter(
    mode: str, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, words = tmp_path / "fixed.onnx", ("-a", place / "fr", "-a", place / "legal")
    code, found = answer(capsys, "onnx", MODEL, *words, "-o", out, "--lora", mode, "--max-rank", "6")
    assert (code, found["proof"]["outcome"], found["bits_of_base"]) == (0, "same", True)
    assert {name: proof["outcome"] for name, proof in found["adapters"].items()} == {"fr": "same", "legal": "same"}
    assert record_of(out)["settings"]["max_rank"] == 6
    graph = onnx.load(out).graph
    factors = [tensor for tensor in graph.initializer if tensor.name.endswith(("lora_A.weight", "lora_B.weight"))]
    assert factors and all(6 in tensor.dims for tensor in factors)
    inputs = [value for value in graph.input if "lora_" in value.name]
    assert len(inputs) == (len(factors) if mode == "inputs" else 0)
    assert not any(size.dim_param for value in inputs for size in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize("mode", ["inputs", "rows"])
def test_a_rank_above_the_fixed_one_is_refused_with_both(
    mode: str, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ("-o", tmp_path / "out.onnx", "--lora", mode, "--max-rank", "3")
    code, found = answer(capsys, "onnx", place / "base.onnx", "-a", place / "fr", *words)
    assert code == 3 and "fr, head.weight: rank 4 > 3" in found["error"] and not list(tmp_path.iterdir())
    code, found = answer(capsys, "onnx", MODEL, "-a", place / "fr", "-o", tmp_path / "out.onnx", "--max-rank", "4")
    assert code == 2 and "--max-rank is for --lora inputs, rows and slots" in found["error"]


@pytest.mark.slow
def test_convert_pads_to_the_fixed_rank_of_a_graph(place: Path, tmp_path: Path, capsys: Capture) -> None:
    graph = tmp_path / "fixed.onnx"
    words = ("--lora", "inputs", "--target", "linear2", "--max-rank", "3")
    assert call("onnx", MODEL, "-a", place / "legal", *words, "-o", graph) == 0
    rng = np.random.default_rng(3)
    peft_adapter(tmp_path / "small", {"head": a_pair(rng, 3, 16, 1)})
    peft_adapter(tmp_path / "large", {"head": a_pair(rng, 3, 16, 5)})
    made = tmp_path / "small.onnx_adapter"
    assert call("convert", tmp_path / "small", "-o", made, "--for", graph) == 0
    shapes = {name: value.shape() for name, value in onnx_adapter.read(made).values.items()}
    assert shapes == {"head.lora_A.weight": [16, 3], "head.lora_B.weight": [3, 3]}
    capsys.readouterr()
    code, verdict = answer(capsys, "verify", graph, "--model", MODEL, "-a", tmp_path / "small", "--onnx-adapter", made)
    assert (code, verdict["outcome"]) == (0, "same")
    code, found = answer(capsys, "convert", tmp_path / "large", "-o", tmp_path / "large.onnx_adapter", "--for", graph)
    assert code == 3 and "large, head.weight: rank 5 > 3" in found["error"]
    assert not (tmp_path / "large.onnx_adapter").exists()


# --- plain inputs ---


@pytest.mark.slow
def test_a_graph_of_plain_inputs_is_proven_and_takes_other_adapters(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    graph, made = tmp_path / "plain.onnx", tmp_path / "fr.onnx_adapter"
    words = ("-a", place / "legal", "--target", "all-linear", "--required-inputs", "-o", graph)
    code, found = answer(capsys, "onnx", MODEL, *words, "--lora", "inputs")
    assert (code, found["proof"]["outcome"], found["bits_of_base"]) == (0, "same", True)
    model = onnx.load(graph)
    assert not {value.name for value in model.graph.input} & {tensor.name for tensor in model.graph.initializer}
    assert call("convert", place / "fr", "-o", made, "--for", graph) == 0
    capsys.readouterr()
    code, verdict = answer(capsys, "verify", graph, "--model", MODEL, "-a", place / "fr", "--onnx-adapter", made)
    assert (code, verdict["outcome"]) == (0, "same")
    code, verdict = answer(capsys, "verify", graph, "--model", MODEL)
    assert (code, verdict["outcome"]) == (0, "same")
    code, found = answer(capsys, "onnx", MODEL, *words[:2], *words[4:], "--lora", "rows", "--overwrite")
    assert code == 2 and "--required-inputs is for --lora inputs" in found["error"]


# --- several adapters on a row ---


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT, `base`, and two adapters of PEFT."""
    folder = tmp_path_factory.mktemp("berts")
    base = small_model("bert", folder / "base")
    for seed, name in enumerate(("fr", "de"), 1):
        small_adapter("bert", base, folder / name, seed=seed)
    return folder


@pytest.mark.slow
def test_a_row_of_several_adapters_is_what_peft_adds_up(berts: Path, tmp_path: Path, capsys: Capture) -> None:
    graph, words = tmp_path / "rows.onnx", ("-a", berts / "fr", "-a", berts / "de")
    code, found = answer(
        capsys, "onnx", berts / "base", *words, "--lora", "rows", "--adapters-per-row", "2", "-o", graph
    )
    assert (code, found["several"]["outcome"], found["mixed"]["outcome"]) == (0, "same", "same")
    assert record_of(graph)["settings"]["per_row"] == 2 and record_of(graph)["verdict"]["several"]["outcome"] == "same"
    model = peft.PeftModel.from_pretrained(transformers.BertModel.from_pretrained(berts / "base"), berts / "fr", "fr")
    model.load_adapter(berts / "de", "de")
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    chosen, scales = [[1, 2], [2, 0], [2, 1]], [[0.5, -1.5], [2.0, 9.0], [1.0, 1.0]]
    feeds = {name: value.numpy() for name, value in texts.items()}
    feeds |= {"adapter_ids": np.array(chosen), "adapter_scales": np.float32(scales)}
    output = onnxruntime.InferenceSession(graph).run(["last_hidden_state"], feeds)[0]
    names = ["", "fr", "de"]
    for row, (own, factors) in enumerate(zip(chosen, scales, strict=True)):
        used = [(names[one], factor) for one, factor in zip(own, factors, strict=True) if one]
        model.add_weighted_adapter(
            [name for name, _ in used], [factor for _, factor in used], f"sum{row}", combination_type="cat"
        )
        model.set_adapter(f"sum{row}")
        with torch.no_grad():
            expected = model.eval()(**texts).last_hidden_state[row].numpy()
        np.testing.assert_allclose(output[row], expected, rtol=1e-4, atol=1e-5)
    code, verdict = answer(capsys, "verify", graph, "--model", berts / "base", *words)
    assert (code, verdict["outcome"]) == (0, "same")
    code, verdict = answer(capsys, "verify", graph, "--model", berts / "base", *words[:2], "--adapter-id", "1")
    assert (code, verdict["outcome"]) == (0, "same")


@pytest.mark.slow
def test_a_graph_that_adds_up_wrongly_is_never_published(
    berts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    right = RowScales.of_positions
    monkeypatch.setattr(RowScales, "of_positions", lambda self, nodes, x: x)
    words = ("-a", berts / "fr", "--lora", "rows", "--adapters-per-row", "2", "-o", tmp_path / "rows.onnx")
    monkeypatch.setattr(row_branches, "COPY_COST", 0)  # always by copies
    assert call("onnx", berts / "base", *words) == 4
    assert "several adapters on a row: different" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.setattr(RowScales, "of_positions", right)
    code, found = answer(capsys, "onnx", berts / "base", *words[:2], *words[4:])
    assert code == 2 and "--adapters-per-row is for --lora rows" in found["error"]
