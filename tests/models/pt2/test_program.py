"""A program that runs node by node computes what its module computes.

The module that torch.export.load makes of the same file is the oracle, bit for bit. It is trusted here, since the file
has just been written.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fuzz.targets import bounded
from lora_export import layers, plan
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import RuntimeRefused
from lora_export.models.load import load_model
from lora_export.models.outputs import named_outputs
from lora_export.models.pt2 import program, reader
from lora_export.runtime.open_artifact import HowToOpen, open_candidate
from lora_export.runtime.torch_runners import Fp64Runner
from support.factories import Spotter
from support.hostile_programs import changed, nodes
from support.programs import ProgramFiles, export, graph_of, noise, rewritten

SMALL = ("mlp", "cnn", "words")


EVERY = [*SMALL, "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gpt2"))]


def drawn(path: Path, **sizes: int) -> dict[str, Tensor]:
    return load_model(str(path)).inputs(sizes, seed=3)


@pytest.mark.parametrize("name", EVERY)
def test_a_program_computes_the_bits_of_torch_export_load(programs: ProgramFiles, name: str) -> None:
    path = programs.merged(name)
    ours, torchs = program.load_program(path), torch.export.load(path).module()
    for batch, length in ((1, 4), (5, 13)):
        inputs = drawn(path, batch=batch, sequence=length, rows_axis1=length)
        with torch.no_grad():
            own, theirs = named_outputs(ours(**inputs)), named_outputs(torchs(**inputs))
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) and own[key].dtype == theirs[key].dtype for key in theirs)


class Switches(nn.Module):
    """Blocks under a switch, which are graphs of their own in a program, and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            y = torch.cos(x) * self.table
            z = y.sum(-1)
        with torch.autocast("cpu", enabled=False):
            w = self.first(x) + y
        half = torch.full((x.shape[0] * 2 + x.shape[1] // 2,), 1.5) + x.mean()
        return {"sum": self.second(w) + z[..., None], "parts": (half, list(x.split(2, -1)))}


class Changes(nn.Module):
    """Operators that write into what they are given, all of it values of the program's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(inplace=True)
        self.norm, self.groups = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.groups(self.relu(self.norm(self.conv(x))))
        y[:, 0] = 0
        kept = y > 0.5
        kept |= y[:, :1] < 1
        kept &= y < 2
        kept ^= y[:1] > 1.5
        y[kept] = 3
        return nn.functional.interpolate(y.add_(1), scale_factor=2, mode="bilinear")


@pytest.mark.parametrize(
    ("module", "shape", "decomposed"),
    [
        *((Switches, (2, 4), decomposed) for decomposed in (False, True)),
        *((Changes, (2, 3, 6, 6), decomposed) for decomposed in (False, True)),
        (Spotter, (2, 4, 9), False),
        pytest.param(Spotter, (2, 4, 9), True, marks=pytest.mark.slow),
    ],
)
def test_blocks_and_in_place_operators_compute_as_in_the_module(
    tmp_path: Path, module: Callable[[], nn.Module], shape: tuple[int, ...], decomposed: bool
) -> None:
    torch.manual_seed(0)
    eager = module().eval()
    (name,) = {"x": 0} if module is not Spotter else {"signal": 0}
    path = export(eager, {name: noise(*shape)}, tmp_path / "odd.pt2", decomposed=decomposed)
    targets = {node.target for node in reader.read(path).graph.nodes}
    if module is Switches and not decomposed:
        blocks = {target.rpartition(".")[2] for target in targets if "higher_order" in target}
        assert blocks == {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
    if module is Changes and not decomposed:
        assert any(re.fullmatch(r"torch\.ops\.aten\.\w*[a-z]_\.\w+", target) for target in targets)
    given = {name: torch.randn(5, *shape[1:])}
    before = given[name].clone()
    with torch.no_grad():
        own, theirs = named_outputs(program.load_program(path)(**given)), named_outputs(eager(**given))
    assert torch.equal(given[name], before)
    assert own.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(own[key], value, rtol=1e-5, atol=2e-6)


def test_outputs_have_the_modules_names(tmp_path: Path) -> None:
    path = export(Switches(), {"x": noise(2, 4)}, tmp_path / "named.pt2")
    runner = open_candidate(open_artifact(path), HowToOpen(None))  # type: ignore[arg-type]
    answer = runner.run({"x": np.ones((3, 4), np.float32)})
    assert list(answer) == ["sum", "parts.0", "parts.1.0", "parts.1.1"]
    assert [value.shape for value in answer.values()] == [(3, 4), (8,), (3, 2), (3, 2)]


def test_an_attached_layer_multiplies_by_a_and_b_separately(programs: ProgramFiles) -> None:
    module = program.load_program(programs.base("mlp"))
    layers.attach(module, plan.make([programs.adapter("mlp")], layers.specs(module)))
    assert isinstance(module.up, nn.Linear) and module.unobserved_weights == ()
    seen: list[tuple[int, ...]] = []
    module.up.register_forward_hook(lambda _, given, y: seen.append(tuple(given[0].shape)))
    original = module.up.lora_B["mlp_adapter"].clone()
    with torch.no_grad():
        module.up.lora_B["mlp_adapter"].zero_()
        off = module(rows=noise(2, 5, 64))
        module.up.lora_B["mlp_adapter"].copy_(original)
        on = module(rows=noise(2, 5, 64))
    assert len(seen) == 2 and (on - off).abs().max() > 0.1


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"ids": (2, 5, torch.int64)}, "the program's input mask is missing"),
        ({"ids": (2, 5, torch.int64), "mask": (2, 5, torch.int64), "more": (2, 5, torch.int64)}, "has no input more"),
        ({"ids": (2, 5, torch.int32), "mask": (2, 5, torch.int64)}, "ids is int32, and the program takes int64"),
        ({"ids": (2, 5, torch.float32), "mask": (2, 5, torch.int64)}, "ids is float32"),
        ({"ids": (2, 5, torch.int64), "mask": (2, 4, torch.int64)}, "another axis that must have the same size is 5"),
        ({"ids": (2, 5, 1, torch.int64), "mask": (2, torch.int64)}, "ids has 3 axes.*; mask has 1 axes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(programs: ProgramFiles, inputs: dict[str, Any], problem: str) -> None:
    module = program.load_program(programs.base("words"))
    given = {name: torch.zeros(shape, dtype=dtype) for name, (*shape, dtype) in inputs.items()}
    with pytest.raises(RuntimeRefused, match=problem):
        module(**given)


def test_a_failing_operator_is_named(programs: ProgramFiles) -> None:
    module = program.load_program(programs.base("words"))
    with pytest.raises(RuntimeRefused, match=r"node embedding \(aten\.embedding\.default\): index out of range"):
        module(ids=torch.full((2, 5), 10), mask=torch.ones(2, 5).long())


class Upcast(nn.Module):
    """Computes its norm in fp32, as Llama does, and hands out the dtype that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.up(rows)
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.down(normed.to(x.dtype))


def test_casts_in_the_graph_follow_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Upcast().to(torch.bfloat16)
    path = export(eager, {"rows": noise(2, 5, 64).bfloat16()}, tmp_path / "half.pt2", dynamic=2)
    module = program.load_program(path)
    rows = noise(3, 4, 64)
    with torch.no_grad():
        assert torch.equal(module(rows=rows.bfloat16()), eager(rows.bfloat16()))
        assert torch.equal(module.float()(rows=rows), copy.deepcopy(eager).float()(rows))
    reference, theirs = Fp64Runner(copy.deepcopy(module).double()), Fp64Runner(copy.deepcopy(eager).double())
    own, wanted = (each.run({"rows": rows.numpy()})["output_0"] for each in (reference, theirs))
    np.testing.assert_allclose(own, wanted, rtol=1e-12)
    assert own.dtype == np.float64 and reference.narrow_operators == set()


def tensor(argument: str, value: str) -> dict[str, Any]:
    return {"name": argument, "arg": {"as_tensor": {"name": value}}, "kind": 1}


def test_a_weight_changed_through_a_view_is_refused(programs: ProgramFiles, tmp_path: Path) -> None:
    name, graph = graph_of(programs.base("mlp"))
    nodes = graph["graph_module"]["graph"]["nodes"]
    weight = graph["graph_module"]["signature"]["input_specs"][0]["parameter"]["arg"]["name"]
    detach = {"target": "torch.ops.aten.detach.default", "metadata": {}, "name": "d"}
    detach |= {"inputs": [tensor("self", weight)], "outputs": [{"as_tensor": {"name": "view_of_it"}}]}
    write = {"target": "torch.ops.aten.zero_.default", "metadata": {}, "name": "z"}
    write |= {"inputs": [tensor("self", "view_of_it")], "outputs": [{"as_tensor": {"name": "zeroed"}}]}
    nodes += [detach, write]
    path = rewritten(programs.base("mlp"), tmp_path / "sly.pt2", {name: json.dumps(graph).encode()})
    module = program.load_program(path)
    with torch.no_grad(), pytest.raises(RuntimeRefused, match="changes its own weights"):
        module(rows=noise(2, 5, 64))


def test_a_size_that_grows_without_bound_stops_the_run(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() + torch.ones(x.shape[0] * 2 + 1)

    good = export(Sizes(), {"x": noise(2, 4)}, tmp_path / "sizes.pt2")

    def change(graph: dict[str, Any]) -> None:
        for node in nodes(graph):
            if node["target"] == "_operator.mul":
                node["target"] = "_operator.pow"
                node["inputs"][-1]["arg"] = {"as_int": 1 << 40}

    module = program.load_program(changed(good, tmp_path, change))
    with bounded(), pytest.raises(Exception, match="to the power of 1099511627776 is too large"):
        module(x=torch.ones(3, 4))


def test_infinities_are_read_as_torch_spells_them(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 0, float("-inf")).masked_fill(x == 0, float("inf"))

    path = export(Masked(), {"x": noise(2, 4)}, tmp_path / "masked.pt2")
    given = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    assert program.load_program(path)(x=given).tolist() == [[-np.inf, np.inf, -1.0, -np.inf]]
