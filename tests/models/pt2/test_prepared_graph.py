"""The operators that are run from a file, and graphs prepared with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.models.pt2 import prepared_graph, program, reader
from support.hostile_programs import changed, nodes, refused
from support.programs import export, noise

TARGETS = [
    "os.system", "builtins.eval", "torch.hub.load", "torch.load", "torch.ops.load_library", "torch.ops.aten",
    "torch.ops.aten.linear", "torch.ops.aten.linear.default.__class__", "torch.ops.aten.__class__.default",
    "torch.ops.aten.__getattr__.default", "torch.ops.aten.from_file.default",
    "torch.ops.aten.set_.source_Storage", "torch.ops.aten.resize_.default", "torch.ops.aten.save.default",
    "torch.ops.aten.add.out", "torch.ops.aten.add.str", "torch.ops.aten.mul.left_t",
    "torch.ops.aten.view.dtype", "torch.ops.aten.LINEAR.default", "torch.ops.aten.linear.default ",
    "torch.ops.aten.lіnear.default", "torch.ops.aten.linear.nonexistent", "torch.ops.prim.rpc_async.default",
    "torch.ops.inductor.resize_storage_bytes_.default", "torch.ops.mylib.evil.default",
    "torch.ops.higher_order.cond", "torch.ops.higher_order.flat_apply",
    "torch.ops.higher_order.wrap_with_autocast", "_operator.call", "_operator.methodcaller",
    "_operator.lshift", "math.factorial", "#extension:evil", "",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_an_operator_outside_the_list_is_refused_by_name(good: Path, tmp_path: Path, target: str) -> None:
    def change(graph: dict[str, Any]) -> None:
        nodes(graph)[-1]["target"] = target

    message = refused(changed(good, tmp_path, change))
    assert "node" in message and (
        "not among the operators" in message
        or "supported" in message
        or "no operator" in message
        or "no graph where it should" in message
    )


def test_no_listed_operator_uses_files_or_raw_memory() -> None:
    names = prepared_graph.OPERATORS | {name.partition(".")[0] for name in prepared_graph.REPLACEMENTS}
    touching = ("file", "storage", "set_", "resize", "rand", "normal", "bernoulli", "load", "save", "pin_memory")
    assert not [name for name in names if name != "sym_storage_offset" and any(word in name for word in touching)]
    for name in names:
        for overload in getattr(torch.ops.aten, name).overloads():
            target = f"torch.ops.aten.{name}.{overload}"
            try:
                prepared_graph.resolve(target, "here")
            except InputRefused:
                continue
            kinds = {
                str(argument.type) for argument in getattr(getattr(torch.ops.aten, name), overload)._schema.arguments
            }
            assert not kinds & {"Storage", "Stream", "Any", "__torch__.torch.classes"}, target


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_weight_norm", {"v": torch.arange(24.0).reshape(2, 3, 4) - 7, "g": torch.ones(1, 1, 4) * 3, "dim": 2}),
        ("_is_all_true", {"self": torch.tensor([True, False])}),
        ("_is_all_true", {"self": torch.tensor([True, True])}),
    ],
)
def test_a_replacement_computes_what_the_operator_does(name: str, arguments: dict[str, Any]) -> None:
    found = prepared_graph.resolve(f"torch.ops.aten.{name}.default", "here").run(**arguments)
    torch.testing.assert_close(found, getattr(torch.ops.aten, name)(*arguments.values()))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


@pytest.mark.parametrize(
    ("decomposed", "problem"),
    [(False, "programs that keep state from run to run"), (True, "no pure function of its inputs")],
)
def test_a_program_that_changes_its_buffers_is_refused(tmp_path: Path, decomposed: bool, problem: str) -> None:
    path = export(Counting(), {"x": noise(2, 4)}, tmp_path / "counting.pt2", decomposed=decomposed)
    with pytest.raises(InputRefused, match=problem):
        program.load_program(path)


class Remade(nn.Module):
    """Makes a layer in each run, whose random weights are read or not."""

    def __init__(self, *, reads: bool):
        super().__init__()
        self.own, self.reads = nn.Linear(4, 4), reads

    def forward(self, x: Tensor) -> Tensor:
        made = nn.Linear(4, 4)
        made.weight = self.own.weight
        return nn.functional.linear(x, made.weight, made.bias if self.reads else self.own.bias)


def test_random_weights_that_nothing_reads_are_not_drawn(tmp_path: Path) -> None:
    module, x = Remade(reads=False), noise(2, 4)
    path = export(module, {"x": x}, tmp_path / "m.pt2")
    assert any("uniform_" in node.target for node in reader.read(path).graph.nodes)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(program.load_program(path)(x=x), module(x))
    torch.manual_seed(3)
    program.load_program(path)(x=x)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_that_reach_an_output_are_refused(tmp_path: Path) -> None:
    path = export(Remade(reads=True), {"x": noise(2, 4)}, tmp_path / "m.pt2")
    with pytest.raises(InputRefused, match=r"uniform_.default' is not among the operators"):
        program.load_program(path)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_active_dropout_is_refused(tmp_path: Path, p: float, decomposed: bool) -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(p)), noise(2, 4)
    exported = torch.export.export(module.train(), (x,))
    path = tmp_path / "m.pt2"
    torch.export.save(exported.run_decompositions() if decomposed else exported, path)
    if p:
        with pytest.raises(InputRefused, match="exported in training mode"):
            program.load_program(path)
    else:
        assert torch.equal(program.load_program(path)(input=x), module(x))


def test_active_dropout_of_attention_is_refused(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    path = export(Attention(), {"x": noise(2, 4, 8)}, tmp_path / "m.pt2")
    with pytest.raises(InputRefused, match="exported in training mode"):
        program.load_program(path)
