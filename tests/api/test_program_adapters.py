"""Adapters as inputs of a program, without ExecuTorch: PyTorch runs the program that is lowered for it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from lora_export import layers, plan
from lora_export.api.program_adapters import (
    attach_inputs,
    parameters_by_input,
    refuse_files_beside,
    with_values_of_adapters,
    write_files,
)
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused, OutputFailed
from lora_export.formats import program_adapter
from lora_export.formats.contract import Contract
from lora_export.isolation.process import IsolatedProcess
from lora_export.lora import Adapter, LoraPair
from lora_export.models.export_program import to_program, with_inputs
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.registered.runner import RegisteredRunner


class Net(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.out = nn.Conv1d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.up(self.conv(x).transpose(1, 2)).tanh())
        return result


def drawn(name: str, shapes: dict[str, tuple[int, ...]], rank: int, scale: float, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    pairs = {}
    for module, (out, *inner) in shapes.items():
        a = rng.standard_normal((rank, *inner), np.float32)
        b = rng.standard_normal((out, rank, *[1] * (len(inner) - 1)), np.float32)
        pairs[module] = LoraPair(a, b, scale)
    return Adapter(name, "test", pairs, sha256=f"{seed:064x}")


FR = drawn("fr", {"conv": (4, 3, 3), "up": (6, 4), "out": (2, 6)}, rank=2, scale=2.5, seed=1)
DE = drawn("de", {"up": (6, 4)}, rank=3, scale=-0.5, seed=2)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("max_rank", [None, 5])
def test_a_program_is_each_adapter_by_its_file(net: Net, max_rank: int | None, tmp_path: Path) -> None:
    steps = plan.make([FR, DE], layers.specs(net), strengths=[1.0, 3.0], one_at_a_time=True)
    attached = copy.deepcopy(net)
    contract = replace(attach_inputs(attached, steps, max_rank), base="00ff")
    assert {place.max_rank for place in contract.places} == {max_rank or 3}
    x, names = torch.randn(2, 3, 9), parameters_by_input(attached)
    assert list(names.values()) == list(contract.inputs)
    program = with_inputs(to_program(attached, {"x": x}, axes={"x": {0: "batch"}}), list(names))

    def run(values: Any) -> Any:
        arrays = [torch.from_numpy(values[name]) for name in names.values()]
        inputs = dict(zip(program.graph_signature.user_inputs, [x, *arrays], strict=True))
        return program.module()(**inputs).detach().numpy()

    files = write_files(tmp_path, contract, steps)
    assert [file.name for file in files] == ["fr.safetensors", "de.safetensors"]
    np.testing.assert_allclose(run(contract.without_adapter()), net(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    for adapter, strength, file in zip([FR, DE], [1.0, 3.0], files, strict=True):
        expected = copy.deepcopy(net).double()
        for module, pair in adapter.pairs.items():
            weight = cast(nn.Linear, expected.get_submodule(module)).weight
            change = np.tensordot(pair.b.astype(float).reshape(len(pair.b), -1), pair.a.astype(float), 1)
            weight.data += torch.from_numpy(strength * pair.scale * change)
        found = run(program_adapter.read(file, contract, tmp_path / "m.pte"))
        np.testing.assert_allclose(found, expected(x.double()).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_what_is_no_input_is_refused_before_the_export(net: Net) -> None:
    magnitude = replace(FR.pairs["up"], magnitude=np.ones(6, np.float32))
    steps = plan.make([replace(FR, pairs={"up": magnitude})], layers.specs(net))
    with pytest.raises(InputRefused, match=r"fr, up\.weight: DoRA"):
        attach_inputs(net, steps, None)
    steps = plan.make([FR, DE], layers.specs(net), one_at_a_time=True)
    with pytest.raises(InputRefused, match=r"has a fixed rank .*:\n  de, up\.weight: rank 3 > 2\nExport with a larger"):
        attach_inputs(net, steps, 2)


@pytest.mark.parametrize("name", ["a/b", ".", "..", ".fr"])
def test_a_name_of_a_file_is_needed(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"cannot be the name of a file\. Name the adapter"):
        refuse_files_beside(tmp_path / "m.pte", [replace(DE, name=name)], [], overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_link", [False, True])
def test_an_input_is_never_replaced_by_the_file_of_an_adapter(
    *, overwrite: bool, is_link: bool, tmp_path: Path
) -> None:
    source = tmp_path / "trained" / "fr.safetensors" if is_link else tmp_path / "fr.safetensors"
    source.parent.mkdir(exist_ok=True)
    source.write_bytes(b"trained")
    if is_link:
        (tmp_path / "fr.safetensors").symlink_to(source)
    with pytest.raises(OutputFailed, match=r"fr\.safetensors is an input, .* \(adapters=\"other=fr\.safetensors\"\)"):
        refuse_files_beside(tmp_path / "m.pte", [DE, FR], [tmp_path, source], overwrite=overwrite)
    refuse_files_beside(tmp_path / "m.pte", [DE, replace(FR, name="other")], [tmp_path, source], overwrite=overwrite)


def test_a_file_of_something_else_is_refused_before_the_work(net: Net, tmp_path: Path) -> None:
    steps = plan.make([FR], layers.specs(net))
    (file,) = write_files(tmp_path, replace(attach_inputs(net, steps, None), base="00ff"), steps)
    refuse_files_beside(tmp_path / "m.pte", [FR], [], overwrite=False)  # it may be equal to the new one
    other = replace(FR, sha256=DE.sha256)
    refuse_files_beside(tmp_path / "m.pte", [other], [], overwrite=True)
    for content in (file.read_bytes(), b"no safetensors"):
        file.write_bytes(content)
        with pytest.raises(OutputFailed, match=r"fr\.safetensors exists already, with other contents"):
            refuse_files_beside(tmp_path / "m.pte", [other], [], overwrite=False)


class Process:
    """A process of ExecuTorch that takes x and the inputs of an adapter, and returns what they are."""

    def __init__(self, contract: Contract) -> None:
        sizes = {"x": [2, 3], **{name: list(shape) for name, shape in contract.input_shapes.items()}}
        stated = {"axes": sizes, "limits": {name: [[n, n] for n in own] for name, own in sizes.items()}}
        self.stated = {**stated, "notes": ["run by ExecuTorch"], "cannot_give": [], "plans_memory": True}

    def answer(self, _: float) -> Any:
        return self.stated, {}

    def ask(self, _request: Any, arrays: Any, _timeout: float) -> Any:
        return {"are_named": True}, dict(arrays)


def test_runs_have_an_adapter_by_its_values_or_its_file(net: Net, tmp_path: Path) -> None:
    steps = plan.make([FR, DE], layers.specs(net), one_at_a_time=True)
    contract = replace(attach_inputs(net, steps, None), base="00ff")
    fr, _ = write_files(tmp_path, contract, steps)
    candidate = open_artifact(tmp_path / "m.pte")
    vars(candidate)["record"] = replace(candidate.record, content={CONTRACT_KEY: json.loads(str(contract))})

    def opened(adapter: Path | None = None) -> RegisteredRunner:
        process = cast(IsolatedProcess, Process(contract))
        return RegisteredRunner("executorch", candidate, adapter=adapter, process=process)

    runner = opened()
    assert list(runner.axes) == ["x"] and runner.contract == contract
    x = {"x": np.ones((2, 3), np.float32)}
    zeros = contract.without_adapter()
    of_fr, of_de = (program_adapter.values(contract, steps, name) for name in ("fr", "de"))
    for own, expected in (
        (with_values_of_adapters(runner, [], None), zeros),
        (with_values_of_adapters(runner, [DE], [1.0]), of_de),
        (runner.with_adapter(fr), of_fr),
        (opened(fr), of_fr),
        (runner, zeros),
    ):
        found = own.run(x)
        assert found.keys() == {"x", *expected}
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
    assert "its adapter inputs have de" in with_values_of_adapters(runner, [DE], [1.0]).notes
