"""`lora_export.convert`: next week's adapter for an existing graph."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_export as le
from lora_export.api.programs.pte import save_executorch
from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats.contract import AdapterPlace, Contract
from lora_export.lora import Adapter
from lora_export.pairs.structured import KroneckerPair
from lora_export.provenance import CONTRACT_KEY
from support.api import MODEL, A, B, Recorder, an_adapter
from support.handmade import peft_adapter

if TYPE_CHECKING:
    from support.stores import Stored


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    le.export_onnx(MODEL, path, lora="inputs", target="dense", verify=False)
    return path


def test_a_converted_adapter_runs_in_the_graph(graph: Path, tmp_path: Path) -> None:
    seen = Recorder()
    adapter = an_adapter(tmp_path / "next")
    result = le.convert(adapter, tmp_path / "other", graph=graph, on_message=seen.messages.append)
    assert (result.weights, result.of) == (1, 1) and result.output == tmp_path / "other.onnx_adapter"
    assert le.inspect(result.output).onnx_adapter is not None
    verdict = le.verify(graph, MODEL, adapters=adapter, onnx_adapter=result.output)
    assert verdict.verdict.same


@pytest.mark.parametrize(("stated", "is_taken"), [({}, True), ({"out_in": False}, False), ({"max_rank": 0}, False)])
def test_the_record_of_a_pte_is_not_trusted(*, stated: dict[str, Any], is_taken: bool, tmp_path: Path) -> None:
    names = [f"base_model.model.dense.lora_{side}.weight" for side in "AB"]
    made = AdapterPlace("dense.weight", *names, (8, 8), "float32", "", max_rank=3, out_in=True)
    contract = Contract("ffffffff00", "", (replace(made, **stated),), required=True)
    record = json.dumps({CONTRACT_KEY: json.loads(str(contract))})
    program: Any = SimpleNamespace(write_to_file=lambda file: file.write(b"a program"))
    save_executorch(program, tmp_path / "m.pte", extra={"lora_export.json": record})
    wanted: Any = (an_adapter(tmp_path / "next"), tmp_path / "next.safetensors")
    refused = pytest.raises(InputRefused, match=r"its record of adapter inputs .* is damaged")
    with contextlib.nullcontext() if is_taken else refused:
        le.convert(*wanted, graph=tmp_path / "m.pte")
    assert wanted[1].exists() is is_taken
    if is_taken:
        written = load_file(wanted[1])
        np.testing.assert_allclose(written[names[1]] @ written[names[0]], B @ A, rtol=1e-6)


def test_the_graph_and_the_adapter_for_it_may_be_in_a_store(graph: Path, tmp_path: Path, stored: Stored) -> None:
    for path in graph.parent.iterdir():
        stored.put(f"g/{path.name}", path.read_bytes())
    adapter, name = an_adapter(tmp_path / "next"), "next.onnx_adapter"
    le.convert(adapter, tmp_path / name, graph=graph)
    le.convert(adapter, str(stored / f"out/{name}"), graph=str(stored / "g" / graph.name))
    assert stored.files("out") == {name: (tmp_path / name).read_bytes()}


def test_a_lokr_runs_in_the_graph_as_lora(graph: Path, tmp_path: Path) -> None:
    shape = next(iter(le.load_adapter(an_adapter(tmp_path / "plain")).pairs.values())).shape
    rng = np.random.default_rng(3)
    stored = {"w1": rng.normal(size=(2, 1)), "w2": rng.normal(size=(shape[0] // 2, shape[1]))}
    lokr = Adapter("lokr", "made", {"dense": KroneckerPair(stored, 0.5)})
    result = le.convert(lokr, tmp_path / "lokr.onnx_adapter", graph=graph, as_kind="lora", rank=16)
    assert [(layer.module, layer.share) for layer in result.layers] == [("dense", pytest.approx(1))]
    assert le.verify(graph, MODEL, adapters=lokr, onnx_adapter=result.output).verdict.same


def test_a_layer_without_inputs_is_refused(graph: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "other", {"elsewhere": ([[1.0] * 8], [[1.0]] * 8)})
    with pytest.raises(InputRefused, match="elsewhere"):
        le.convert(adapter, tmp_path / "x.onnx_adapter", graph=graph)
    assert not (tmp_path / "x.onnx_adapter").exists()


def test_a_runtime_is_no_graph(graph: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "a", {"up": (A, B)})
    with pytest.raises(InputRefused, match=r"graph= takes the file of a graph, and vllm is a runtime: `check"):
        le.convert(adapter, output=tmp_path / "o.onnx_adapter", graph="vllm")
    with pytest.raises(InputRefused, match=rf"; a similar name there is {graph.name}$"):
        le.convert(adapter, output=tmp_path / "o.onnx_adapter", graph=graph.with_name(f"my{graph.name}"))


def test_a_weight_is_a_factor_on_pairs_and_biases(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "one", {"fc": ([[1.0, 2.0]], [[1.0], [3.0]])})
    le.convert(adapter, tmp_path / "half", to="peft", weight=0.5)
    (pair,) = le.load_adapter(tmp_path / "half").pairs.values()
    assert pair.delta().tolist() == [[0.5, 1.0], [1.5, 3.0]]
    whole = peft_adapter(tmp_path / "whole", {"fc": ([[1.0]], [[1.0]])}, {"head.weight": [[1.0]]})
    with pytest.raises(InputRefused, match=r"whole saves tensors whole: head\.weight"):
        le.convert(whole, tmp_path / "no", to="peft", weight=0.5)
    for to in ("kohya", "peft"):
        with pytest.raises(InputRefused, match="one has no effect: its weight is 0"):
            le.convert(adapter, tmp_path / "no", to=to, weight=0)
    untrained = peft_adapter(tmp_path / "untrained", {"fc": ([[1.0, 2.0]], [[0.0], [0.0]])})
    assert le.convert(untrained, tmp_path / "twice", to="peft", weight=2).output.is_dir()


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "comfyui", "diffusers", "openvino"])
def test_a_scale_below_zero_can_be_read_again(tmp_path: Path, to: str) -> None:
    adapter = peft_adapter(tmp_path / "one", {"unet.fc": ([[1.0, 2.0]], [[3.0]])})
    before = le.load_adapter(adapter).pairs["unet.fc"]
    result = le.convert(adapter, tmp_path / "turned", to=to, weight=-1)
    (pair,) = le.load_adapter(result.output).pairs.values()
    assert np.array_equal(pair.delta(), -before.delta())


def test_the_models_config_beside_an_adapter_is_kept(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "one", {"fc": ([[1.0]], [[1.0]])}, {"head.weight": [[1.0]]})
    (adapter / "config.json").write_text('{"id2label": {"0": "no"}}')
    le.convert(adapter, tmp_path / "out", to="peft")
    assert (tmp_path / "out/config.json").read_bytes() == (adapter / "config.json").read_bytes()
    assert le.load_adapter(tmp_path / "out").metadata["model_config"] == {"id2label": {"0": "no"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'to="onnx_adapter" needs graph="MODEL.onnx", or a .pte'),
        ({"to": "peft", "graph": "m.onnx"}, 'graph="m.onnx" determines the format of the file, so to="peft" cannot'),
        ({"to": "peft", "ignore_head": True}, 'ignore_head= is for to="onnx_adapter"'),
        ({"to": "peft", "names": "vllm"}, 'names= is for to="peft", and needs base="CHECKPOINT"'),
        ({"to": "peft", "names": "tarot", "base": "b"}, "names= is 'tarot'; it must be transformers4,"),
        ({"to": "peft", "as_kind": "lora"}, 'as_kind="lora" needs rank="R"'),
        ({"to": "peft", "min_kept": 0.5}, 'min_kept= is for as_kind="lora"'),
        ({"to": "peft", "layout": {"*": "out_in"}}, 'layout= is for matrices of base="CHECKPOINT"'),
        ({"to": "tarot"}, "to= is 'tarot'; it must be onnx_adapter, peft,"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    adapter = peft_adapter(tmp_path / "one", {"fc": ([[1.0]], [[1.0]])})
    with pytest.raises(WrongUsage, match=message):
        le.convert(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere", "there is no base model at {}"),
        ("empty", "{} has no safetensors weights"),
        ("text.md", "{} is no checkpoint: "),
        ("pickled", "{} has its weights in pickle files (pytorch_model.bin), which can run code"),
        ("of gguf", "{} has no safetensors weights. Name the GGUF file in it: m.gguf"),
    ],
)
def test_a_base_that_is_no_model_is_refused_by_convert(tmp_path: Path, base: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.md").write_text("a base")
    for folder, file in (("pickled", "pytorch_model.bin"), ("of gguf", "m.gguf")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    adapter = peft_adapter(tmp_path / "one", {"fc": ([[1.0]], [[1.0]])})
    with pytest.raises(InputRefused, match=re.escape(message.format(tmp_path / base))):
        le.convert(adapter, tmp_path / "out", to="peft", base=tmp_path / base)
    assert not (tmp_path / "out").exists()
