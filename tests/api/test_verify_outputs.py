"""What a candidate computes, against PyTorch with the adapter attached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from gguf import MODEL_ARCH
from onnxruntime import InferenceSession
from torch import nn
from transformers import BertConfig, BertModel

import lora_export as le
from lora_export.api import verify_quantised
from lora_export.api.verify_outputs import _seconds
from lora_export.api.verify_quantised import RunOutputs, _doubts, _with_runner
from lora_export.api.verify_record import VerifyRequest
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused, RuntimeRefused, WrongUsage
from lora_export.models.load import from_module
from lora_export.runtime.memory import AVAILABLE
from support import RUNNERS
from support.api import MODEL
from support.endpoints import reply, running
from support.exporters import checkpoint_of, torchscript
from support.gguf_files import Kind, llama, runnable, write_llama, write_model
from support.peft_models import trained
from support.slow import slow


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
    with pytest.raises(RuntimeRefused, match="has no input attention_mask; the candidate has no input token_type_ids"):
        le.verify(tmp_path / "renamed.onnx", base)


@pytest.mark.parametrize(
    ("runner", "outcome", "says"),
    [
        ("Stating", "same", "run on a toaster; the candidate gives no scores of all tokens"),
        ("cache_by_shape", "different", "changing the input rows changes PyTorch's outputs and not the candidate's"),
        slow("rounds", "different", "allowed is"),
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


def merged_gguf(folder: Path, kind: Kind, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A GGUF file of a Llama with an adapter merged into it, and what it is verified against."""
    base = write_llama(folder / "base.gguf", kind, fields=runnable)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    trained(llama(), r=4, lora_alpha=0.1, target_modules=names).save_pretrained(folder / "a")
    options = {"dtype_of": {"*": "keep"}, "min_retention": 0.0, **options}
    out = le.merge(base, [folder / "a"], folder / "out.gguf", **options).output
    return Path(out), {"model": base, "adapters": [folder / "a"]}


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [(Kind.F32, 0, 1e-5), slow(Kind.F16, 1e-4, 0.01), slow(Kind.Q8_0, 0.03, 0.5), (Kind.Q4_K, 0.2, 0.8)],
    ids=str,
)
def test_a_merged_gguf_file_runs_beside_its_base(kind: Kind, least: float, most: float, tmp_path: Path) -> None:
    out, beside = merged_gguf(tmp_path, kind)
    result = le.verify(out, strict=True, **beside)
    figures = result.about["quantisation_error"]
    assert result, str(result)
    # transformers' own reader of GGUF files finds the same weights
    assert least <= figures["of_rounding"] <= most and figures["of_library"] < 1e-5
    half, beside = merged_gguf(tmp_path, kind, weights=[0.5], overwrite=True)
    assert le.verify(half, **beside).verdict.outcome == "different"


def test_a_merged_gguf_file_that_shows_nothing_is_undecided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, beside = merged_gguf(tmp_path, Kind.Q4_0)
    assert le.verify(out, **beside)
    monkeypatch.setattr(verify_quantised, "MOST_COST", 0.1)
    result = le.verify(out, **beside)
    assert result.verdict.outcome == "undecided" and "no output shows that they are merged" in str(result)


def test_a_merged_gguf_file_has_the_config_beside_its_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=32, max_position_embeddings=32)).eval()
    base = write_model(tmp_path / "base.gguf", MODEL_ARCH.BERT, model)
    trained(model, r=2, target_modules=["query", "value"]).save_pretrained(tmp_path / "a")
    out = le.merge(base, tmp_path / "a", tmp_path / "elsewhere" / "out.gguf", min_retention=0.9).output
    with pytest.raises(InputRefused, match=r"Put the model's config\.json beside it"):
        le.verify(out, base, adapters=tmp_path / "a")
    model.config.save_pretrained(tmp_path)
    result = le.verify(out, base, adapters=tmp_path / "a", strict=True)
    assert result and list(result.about["quantisation_error"]) == ["of_rounding"]
    assert any("transformers does not read this GGUF file" in line for line in result.verdict.figures)


def test_outputs_of_a_library_are_compared_with_those_of_the_base_too() -> None:
    def run(token: float, padding: float = 0) -> Any:
        return {"case": {"logits": np.array([[[token], [padding]]], np.float32)}}

    padding = {"case": np.array([[False, True]])}
    outputs = RunOutputs(run(1), run(0), run(0.9), run(0.225, 9), "", padding)
    assert outputs.figures == pytest.approx({"of_rounding": 0.1, "of_library": 0.675, "strength": 0.25}, rel=1e-5)
    assert outputs._replace(own=run(0)).figures["strength"] == 1


@pytest.mark.parametrize(
    ("runner", "outcome", "says"),
    [
        slow("gguf_by_transformers", "same", "have 1 of the merged change"),
        slow("base_of_gguf", "undecided", "so the adapters are run at another strength, or not at all"),
        slow("half_of_gguf", "undecided", "have 0.5 of the merged change"),
        ("zeros", "undecided", "so the adapters are run at another strength, or not at all"),  # needs no transformers
    ],
)
def test_a_runner_runs_a_merged_gguf_file(
    runner: str, outcome: str, says: str, small_gguf: tuple[Path, dict[str, Any]]
) -> None:
    out, beside = small_gguf
    result = le.verify(out, runner=f"{RUNNERS}:{runner}", **beside)
    assert result.verdict.outcome == outcome and says in str(result)
    assert f"as {RUNNERS}:{runner} runs it, they are" in str(result)
    assert f"run by the runner {RUNNERS}:{runner}" in result.verdict.notes


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return merged_gguf(tmp_path_factory.mktemp("gguf"), Kind.Q8_0)


class Returns:
    """A runner that returns the same to each case."""

    name, names_known, notes, cannot_give = "mine", True, ("run by mine",), ("states",)

    def __init__(self, **outputs: Any):
        self.outputs = outputs

    def run(self, _: Any) -> Any:
        return self.outputs


LOGITS = np.ones((1, 2), np.float32)


@pytest.mark.parametrize("wrong", [{}, {"logits": LOGITS[:, :1]}, {"logits": LOGITS.astype(np.int64)}, {"x": LOGITS}])
def test_what_is_no_output_of_the_model_is_refused(wrong: dict[str, Any]) -> None:
    own = {"case": {"logits": LOGITS}}
    with pytest.raises(RuntimeRefused, match=r"runner mine returns .*, and the model logits \[1, 2\] float32"):
        _with_runner(RunOutputs(own, own, own, None, "", {}), cast(Any, Returns(**wrong)), {"case": {}})


def test_outputs_that_a_runner_leaves_out_are_not_judged() -> None:
    own = {"case": {"logits": LOGITS, "hidden": LOGITS}}
    outputs = RunOutputs(own, own, own, None, "", {})
    found = _with_runner(outputs, cast(Any, Returns(logits=LOGITS)), {"case": {}}).findings
    assert found.notes == ("run by mine",)
    assert found.not_judged == ("hidden, which the runner leaves out", "the candidate gives no states")


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"of_rounding": 0.5}, ""),
        ({"of_rounding": 0.5, "of_library": 0.5, "strength": 1.09}, ""),
        ({"of_rounding": 0.5, "of_library": 0.05, "strength": 0.89}, "another strength"),
        ({"of_rounding": 0.5, "of_library": 1.1, "strength": 1.0}, "more than the adapters change"),
        ({"of_rounding": 1.1}, "more than the adapters change"),
        ({"of_rounding": 0.5, "of_library": np.nan, "strength": np.nan}, "not all of the outputs are finite"),
    ],
)
def test_what_the_outputs_do_not_show_is_stated(figures: dict[str, float], says: str) -> None:
    doubts = _doubts(figures)
    assert len(doubts) == bool(says) and all(says in doubt for doubt in doubts)


@pytest.mark.parametrize(
    "options",
    [{"atol": 0.1}, {"rtol": 0.0}, {"trace": True}, {"cache": "c"}, {"fixed": {"x": 1}}, {"timeout": 1.0}]
    + [{"runner": "r.py:f", **each} for each in ({"dtype": "float16"}, {"adapter_id": 0}, {"onnx_adapter": "x"})],
    ids=str,
)
def test_options_of_outputs_are_refused_where_weights_decide(
    options: dict[str, Any], small_gguf: tuple[Path, dict[str, Any]]
) -> None:
    out, beside = small_gguf
    name = [*options][-1]
    with pytest.raises(WrongUsage, match=f"^{name}.*: CANDIDATE stayed quantised, and is judged by its weights$"):
        le.verify(out, **beside, **options)


@pytest.mark.slow
def test_calibrated_numbers_are_judged_beside_a_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", input_ids=np.arange(150).reshape(10, 15) % 64)
    out, beside = merged_gguf(tmp_path, Kind.Q4_0, calibration=tmp_path / "c.npz")
    assert le.verify(out, strict=True, **beside).verdict.outcome == "undecided"
    assert le.verify(out, strict=True, calibration=tmp_path / "c.npz", **beside)


def test_an_adapter_beside_a_gguf_file_does_not_disturb(
    small_gguf: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, beside = small_gguf
    other = shutil.copytree(beside["adapters"][0], tmp_path / "a") / "out.gguf"
    other.write_bytes(out.read_bytes())  # transformers would read the base that the adapter names
    assert le.verify(other, **beside).about["quantisation_error"]["of_library"] < 1e-5


def test_a_gguf_file_without_a_whole_config_is_named(
    small_gguf: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, beside = small_gguf

    def fails(*_: object, **__: object) -> None:
        raise InputRefused(f"{tmp_path / 'base'}: transformers cannot load it")

    monkeypatch.setattr(verify_quantised, "resolve_model", fails)
    with pytest.raises(InputRefused, match=r'judge the weights alone: base="BASE\.gguf"$'):
        le.verify(out, **beside)


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
