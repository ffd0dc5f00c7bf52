"""What a candidate computes, against PyTorch with the adapter attached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from torch import nn

import lora_export as le
from lora_export.api.verify_outputs import _seconds
from lora_export.api.verify_record import VerifyRequest
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused, RuntimeRefused, WrongUsage
from lora_export.models.load import from_module
from lora_export.runtime.memory import AVAILABLE
from support import RUNNERS
from support.api import MODEL
from support.endpoints import reply, running
from support.exporters import checkpoint_of, torchscript


def test_another_adapter_is_different_and_returned(place: Path) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    assert not result and result.verdict.outcome == "different" and result.exit_code == 4


def test_modules_are_not_compared_where_memory_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    monkeypatch.setenv(AVAILABLE, "1")
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    assert compared.exit_code == result.exit_code == 4
    note = "modules were not compared: this needs 0.0 GiB of memory, and 0.0 GiB are available"
    assert note in result.verdict.notes and note not in compared.verdict.notes


def test_a_graph_of_bert_without_token_types_is_judged_with_zeros(tmp_path: Path) -> None:
    base = checkpoint_of("bert")
    torchscript("bert", tmp_path / "right.onnx")
    result = le.verify(tmp_path / "right.onnx", base)
    text = "token_type_ids: the candidate does not take them; all are 0"
    assert result.exit_code == 0 and result.verdict.not_judged == (text,)
    assert le.verify(tmp_path / "right.onnx", base, strict=True).verdict.outcome == "undecided"
    graph = onnx.load(tmp_path / "right.onnx")
    table = next(one for one in graph.graph.initializer if "token_type_embeddings" in one.name)
    table.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(table)[::-1].copy(), table.name))
    onnx.save(graph, tmp_path / "others.onnx")
    assert le.verify(tmp_path / "others.onnx", base).exit_code == 4
    mask = graph.graph.input[1]
    assert mask.name == "attention_mask"
    mask.name = "mask"
    for node in graph.graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]
    onnx.save(graph, tmp_path / "renamed.onnx")
    with pytest.raises(RuntimeRefused, match="has no input attention_mask; the graph has no input token_type_ids"):
        le.verify(tmp_path / "renamed.onnx", base)


@pytest.mark.parametrize(
    ("runner", "outcome", "says"),
    [
        ("Stating", "same", "run on a toaster; the candidate gives no scores of all tokens"),
        ("cache_by_shape", "different", "changing the input rows changes PyTorch's outputs and not the candidate's"),
        ("rounds", "different", "allowed is"),
    ],
)
def test_what_a_runner_returns_is_judged(runner: str, outcome: str, says: str, place: Path) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "adapter", runner=f"{RUNNERS}:{runner}")
    verdict = result.verdict
    assert verdict.outcome == outcome
    assert says in "; ".join([*map(str, verdict.reasons), *verdict.notes])


def test_another_adapter_is_different_by_any_runner(place: Path) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger", runner="onnx-reference")
    note = "modules could not be compared: what runs the candidate gives its outputs alone"
    assert result.exit_code == 4 and note in result.verdict.notes


def test_any_file_is_a_candidate_of_a_runner(place: Path, tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes((place / "m.onnx").read_bytes())
    result = le.verify(engine, MODEL, adapters=place / "adapter", runner=f"{RUNNERS}:by_name")
    assert result and list(result.about["candidate"]["sha256"]) == ["m.engine"]
    assert result.about["runner"] == f"{RUNNERS}:by_name"
    with pytest.raises(InputRefused, match=r"m\.engine: a candidate is .*, or what your own runner= runs"):
        le.verify(engine, MODEL, adapters=place / "adapter")
    with pytest.raises(WrongUsage, match="a runner chooses its own"):
        le.verify(place / "m.onnx", MODEL, adapters=place / "adapter", runner="openvino", provider="cuda")


@pytest.mark.parametrize(
    ("adapter", "takes", "outcome"),
    [("adapter", "FP32", "same"), ("stronger", "FP32", "different"), ("adapter", "FP16", "same")],
)
def test_a_server_of_tensors_is_judged(adapter: str, takes: str, outcome: str, place: Path) -> None:
    session = InferenceSession(place / "m.onnx")
    inputs, outputs = (
        [{"name": one.name, "datatype": datatype, "shape": [-1] * len(one.shape)} for one in values]
        for values, datatype in ((session.get_inputs(), takes), (session.get_outputs(), "FP32"))
    )

    def handle(request: Any) -> None:
        if request.command == "GET":
            extensions = ["binary_tensor_data"] if takes == "FP16" else []
            described = {"name": "m", "platform": "onnx", "extensions": extensions}
            return reply(request, {**described, "inputs": inputs, "outputs": outputs})
        end = int(request.headers.get("Inference-Header-Content-Length", len(request.body)))
        sent, content, arrays = json.loads(request.body[:end])["inputs"], request.body[end:], {}
        for one in sent:
            size = one.get("parameters", {}).get("binary_data_size", 0)
            numbers = np.frombuffer(content[:size], "<f2") if size else np.array(one["data"])
            arrays[one["name"]], content = numbers.astype(np.float32).reshape(one["shape"]), content[size:]
        found = zip(outputs, session.run(None, arrays), strict=True)
        entries = [{**one, "shape": list(array.shape), "data": array.ravel().tolist()} for one, array in found]
        return reply(request, {"model_name": "m", "outputs": entries})

    with running(handle) as address:
        root = address.removesuffix("/v1")
        result = le.verify(f"{root}/v2/models/m", MODEL, adapters=place / adapter)
        assert (result.verdict.outcome, result.about["endpoint"]["platform"]) == (outcome, "onnx"), str(result)
        with pytest.raises(WrongUsage, match="other= is for servers that give log-probabilities"):
            le.verify(f"{root}/v2/models/m", MODEL, adapters=place / adapter, other=place / "stronger")


def test_a_watch_ends_with_the_first_verdict_that_is_not_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, pauses, messages = tmp_path / "m.onnx", [], []
    served.write_bytes((place / "m.onnx").read_bytes())

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:  # another adapter is deployed
            le.export_onnx(MODEL, served, adapters=place / "stronger", overwrite=True)

    monkeypatch.setattr("lora_export.api.verify.time.sleep", pause)
    watched: dict[str, Any] = {"adapters": place / "adapter", "input_seed": 5, "on_message": messages.append}
    result = le.verify(served, MODEL, watch="10m", **watched)
    assert (result.exit_code, pauses, result.about["seed"]) == (4, [600, 600], 7)
    assert [line.rpartition("(")[2] for line in messages if "again in" in line] == [
        "inputs of seed 5); again in 10m",
        "inputs of seed 6); again in 10m",
    ]
    with pytest.raises(WrongUsage, match='watch="soon" is no duration: give one such as 90s, 10m or 2h'):
        le.verify(served, MODEL, watch="soon", **watched)


ENDLESS = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 3] input) => (float[N, 2] y)
<int64 most = {9223372036854775807}, bool on = {1}, float[3, 2] w = {1, 2, 3, 4, 5, 6}>
{ z = Loop(most, on, input) <body = b (int64 i, bool c, float[N, 3] v) => (bool d, float[N, 3] u)
  { d = Identity(c)
    u = Relu(v) }>
  y = MatMul(z, w) }"""


@pytest.mark.parametrize("stated", [None, 0.2])
def test_a_run_ends_in_proportion_to_pytorchs(
    stated: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(onnx.parser.parse_model(ENDLESS), tmp_path / "m.onnx")
    made = "torch.nn.Linear(3, 2, bias=False), torch.ones(4, 3)"
    (tmp_path / "f.py").write_text(f"import torch\ndef make():\n    return {made}\n")
    monkeypatch.setattr("lora_export.api.verify_outputs.LEAST_TIMEOUT", 0.3)
    monkeypatch.setattr("lora_export.api.verify_outputs.TIMES_PYTORCH", 0)
    message = rf"did not finish within {stated or 0.3} seconds. Allow more with timeout="
    with pytest.raises(RuntimeRefused, match=message):
        le.verify(tmp_path / "m.onnx", f"{tmp_path / 'f.py'}:make", timeout=stated)


def test_what_is_not_timed_has_the_longer_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    base = from_module(nn.Linear(3, 2), {"input": torch.ones(4, 3)})
    timed: dict[str, Any] = {"candidate": "m.onnx", "model": "m"}
    graph = open_artifact("m.onnx")
    assert _seconds(VerifyRequest(**timed), base, graph) == 60
    for options in ({"inputs": Path("x.npz")}, {"dtype": "bfloat16"}):
        assert _seconds(VerifyRequest(**timed, **options), base, graph) == 600
    monkeypatch.setattr("lora_export.verification.module_copies.is_large", lambda _: True)
    assert _seconds(VerifyRequest(**timed), base, graph) == 600
