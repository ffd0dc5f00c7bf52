"""Adapters inside of a model's own weights, against a module with the same parametrizations in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from torch import nn
from torch.nn.utils import parametrize

import lora_export as le
from lora_export import cli, formats
from lora_export.errors import InputRefused
from lora_export.options.reading import ReadOptions

TASKS, RANK, ALPHA = ("retrieval.query", "retrieval.passage", "separation"), 2, 3.0


class Tasks(nn.Module):
    """A weight with the change of the chosen task: W + (B A) alpha / rank, or of a table W + (A B) alpha / rank."""

    def __init__(self, rows: int, columns: int, *, is_table: bool):
        super().__init__()
        one, other = ((rows, RANK), (RANK, columns)) if is_table else ((RANK, columns), (rows, RANK))
        self.lora_A = nn.Parameter(torch.randn(len(TASKS), *one))
        self.lora_B = nn.Parameter(torch.randn(len(TASKS), *other))
        self.is_table, self.task = is_table, 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_A[self.task], self.lora_B[self.task]
        return weight + (a @ b if self.is_table else b @ a) * (ALPHA / RANK)


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"words": nn.Embedding(7, 4), "wide": nn.Linear(4, 6), "square": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    )
    for name in ("words", "wide", "square"):
        rows, columns = net[name].weight.shape
        parametrize.register_parametrization(net[name], "weight", Tasks(rows, columns, is_table=name == "words"))
    return net


def saved(folder: Path, net: nn.Module, **config: Any) -> Path:
    folder.mkdir()
    save_tensors({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "model.safetensors")
    fields = {"lora_adaptations": list(TASKS), "lora_rank": RANK, "lora_alpha": ALPHA, "hidden_size": 4} | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_what_the_parametrization_computes(tmp_path: Path, task: str):
    net = model()
    path = saved(tmp_path / "jina", net)
    result = le.merge(path, path, tmp_path / "out", reading=ReadOptions(stored_adapter=task))
    for module in net.values():
        for part in getattr(module, "parametrizations", {}).values():
            part[0].task = TASKS.index(task)
    expected = {f"{name}.weight": net[name].weight.detach().numpy() for name in net}
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys() | {"wide.bias", "square.bias", "norm.bias"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 4}
    assert any("hold adapters of their own" in note and task in note for note in result.notes)
    with pytest.raises(InputRefused, match=r"cannot restore the adapters in the weights of .*jina"):
        le.merge(path, path, tmp_path / "o", reading=ReadOptions(stored_adapter=task), keep_residual=tmp_path / "r")
    options = {"base": path, "adapters": [path], "reading": ReadOptions(stored_adapter=task)}
    assert str(le.verify(tmp_path / "out", **options).verdict.outcome) == "same"
    other = ReadOptions(stored_adapter=next(each for each in TASKS if each != task))
    assert str(le.verify(tmp_path / "out", **options | {"reading": other}).verdict.outcome) == "different"


def test_a_task_is_converted_and_merged_into_the_plain_model(tmp_path: Path):
    path = saved(tmp_path / "jina", model())
    reading = ReadOptions(stored_adapter="separation")
    le.convert(path, tmp_path / "peft", to="peft", reading=reading)
    le.merge(path, path, tmp_path / "one", reading=reading)
    le.merge(path, tmp_path / "peft", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_inspect_lists_the_tasks_and_reads_the_chosen_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = saved(tmp_path / "jina", model())
    assert cli.run(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"its weights hold adapters for {', '.join(TASKS)}: --stored-adapter NAME reads one" in shown
    assert "parametrizations" not in shown and "  wide.weight  6 x 4 float32" in shown
    assert cli.run(["inspect", str(path), "--stored-adapter", "separation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "task_adapters"


@pytest.mark.parametrize(
    ("chosen", "config", "damage", "message"),
    [
        ("", {}, {}, r"3 adapters: retrieval.query, retrieval.passage, separation; choose one: stored_adapter=\"retr"),
        ("other", {}, {}, "it has no other"),
        ("0", {"lora_adaptations": ["a", "b"]}, {}, "it must have the names of 3 tasks"),
        ("0", {"lora_adaptations": [1, 2, 3]}, {}, "it must have the names of 3 tasks"),
        ("separation", {"lora_rank": 3}, {}, "the rank is 3, and no side of its factors"),
        ("separation", {"lora_alpha": "x"}, {}, "lora_alpha is 'x'; it must be a positive number"),
        ("separation", {"lora_alpha": None}, {}, "has lora_rank and lora_alpha, and B A is multiplied by alpha / rank"),
        ("separation", {}, {"wide.parametrizations.weight.0.lora_B": None}, "wide: lora_B is missing"),
        ("separation", {}, {"wide.parametrizations.weight.0.lora_B": np.ones((3, 6, 3))}, "no linear layer or table"),
        ("separation", {}, {"wide.parametrizations.weight.0.lora_B": np.ones((2, 6, 2))}, "different numbers of tasks"),
        ("separation", {}, {"wide.parametrizations.weight.0.lora_B": np.full((3, 6, 2), np.nan)}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, chosen, config, damage, message):
    path = saved(tmp_path / "jina", model(), **config)
    tensors = load_file(path / "model.safetensors") | damage
    save_file(
        {name: np.float32(value) for name, value in tensors.items() if value is not None}, path / "model.safetensors"
    )
    with pytest.raises(InputRefused, match=message):
        formats.load(path, options=ReadOptions(stored_adapter=chosen))


def test_factors_that_are_no_stacks_are_one_adapter(tmp_path: Path):
    path = saved(tmp_path / "one", model(), lora_adaptations=None)
    tensors = load_file(path / "model.safetensors")
    second = {name: value[1] if ".lora_" in name else value for name, value in tensors.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in second.items()}, path / "model.safetensors")
    one = formats.load(path)
    names = saved(tmp_path / "three", model())
    other = formats.load(names, options=ReadOptions(stored_adapter=TASKS[1]))
    assert one.pairs.keys() == other.pairs.keys()
    assert all(np.array_equal(one.pairs[name].delta(), other.pairs[name].delta()) for name in one.pairs)
    le.merge(path, path, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() >= {"wide.weight", "words.weight"}


def test_other_parametrizations_are_refused(tmp_path: Path):
    path = saved(tmp_path / "jina", model())
    tensors = load_file(path / "model.safetensors") | {
        "wide.parametrizations.weight.0.magnitude": np.ones(6, np.float32)
    }
    save_file(tensors, path / "model.safetensors")
    reading = ReadOptions(stored_adapter="separation")
    for read in (lambda: formats.load(path, options=reading), lambda: le.inspect(path)):
        with pytest.raises(InputRefused, match=r"1 unknown tensors of parametrizations, such as wide\.param"):
            read()


def test_a_weight_that_is_stored_twice_is_refused(tmp_path: Path):
    path = saved(tmp_path / "jina", model())
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "wide.weight": np.ones((6, 4), np.float32)}, path / "model.safetensors")
    with pytest.raises(InputRefused, match="contains a weight as itself, and as that of a parametrization"):
        le.merge(path, path, tmp_path / "out", reading=ReadOptions(stored_adapter="separation"))
    assert not (tmp_path / "out").exists()
