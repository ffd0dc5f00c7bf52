"""Operators that ONNX lacks are exchanged without a second trace, and the numbers stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.export import ExportedProgram

from lora_export.errors import RuntimeRefused
from lora_export.models import decompositions, export
from support.exported_models import LLAMA, exported, inputs
from support.factories import Computed
from support.graphs import run

pytestmark = pytest.mark.exports


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that are traced a second time."""
    found, original = [], ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *args: Any, **kwargs: Any) -> ExportedProgram:
        found.append(program)
        return original(program, *args, **kwargs)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return found


def graph_of(function: Callable[[Tensor], Tensor], *, axes: int = 1) -> ir.Model:
    symbols = {axis: f"size{axis}" for axis in range(axes)}
    return export.to_onnx(Computed(function).eval(), {"x": torch.rand(3, 2, 4)}, axes={"x": symbols})


def written_after_a_view(x: Tensor) -> Tensor:
    doubled = x * 2
    view = doubled[:, 0]
    doubled += x
    return view


def read_again(x: Tensor) -> Tensor:
    doubled = x * 2
    return doubled.add_(x) * doubled


def added(x: Tensor) -> Tensor:
    doubled = x * 2
    tripled = doubled + x
    doubled += x
    return doubled * tripled


def whole(x: Tensor) -> Tensor:
    """Whole numbers, whose sums are exact."""
    return (x * 8).floor()


def enlarged(x: Tensor) -> Tensor:
    image = whole(x)[:, None]
    return F.interpolate(image, size=(4, 8)) * F.interpolate(image, scale_factor=2.0, mode="bilinear")


def subtracted(x: Tensor) -> Tensor:
    product = whole(x).transpose(1, 2) @ whole(x)
    product -= x.new_ones(4)
    return product


def divided(x: Tensor) -> Tensor:
    values, places = x.topk(2)
    values /= values.sum(-1, keepdim=True)
    return values * places


def divided_as_read(x: Tensor) -> Tensor:
    values, places = x.topk(2)
    other = values.view(-1, 4)
    values /= values.sum(-1, keepdim=True)
    return values * places + other.view(-1, 2, 2)


def normalised(x: Tensor) -> Tensor:
    mean, variance, factor = torch.arange(2.0), torch.full((2,), 3.75), torch.arange(1.0, 3.0)
    return F.batch_norm(whole(x), mean, variance, factor, mean, eps=0.25)


def with_normalised_weights(x: Tensor) -> Tensor:
    return F.linear(whole(x), torch._weight_norm(torch.full((3, 4), 2.0), torch.arange(8.0, 11.0)[:, None]))


def written_into_parts(x: Tensor) -> Tensor:
    parts = x.new_empty(x.shape[0], 3, 4)
    parts[:, :2] = x
    parts[:, 2] = x[:, 0] - x[:, 1]
    read = parts[:, 0] * 2
    parts[..., 1::2][:, 1] = read[:, ::2]
    return parts + 1


def written_at_open_places(x: Tensor) -> Tensor:
    parts = torch.cat((x, x.new_ones(3, 2, 4)))
    parts[x.shape[0] // 2, :, 1:] = x.new_ones(1, 1, 1, 3)  # more axes than the part
    parts[-x.shape[0] // 2, ..., 2] += 5
    parts[None, x.shape[0] // 2 + 1, ..., 3] = 0.1
    return parts * 1


def copied_into_parts(x: Tensor) -> Tensor:
    doubled = x * 2
    doubled[:, :, 1:].copy_(x[:, :1, 1:])
    doubled[:, 1].copy_(x[0, 0, :1])
    return doubled


def sorted_bools(x: Tensor) -> Tensor:
    values, places = (x > 0.5).sort(2, descending=True)
    return values * places + (x > 0.2).argsort(dim=2, stable=True)


def written_under_a_view(x: Tensor) -> Tensor:
    doubled = x * 2
    view = doubled[:, 0]
    doubled[:, :1] = x[:, 1:]
    return doubled + view[:, None]


def written_into_the_result(x: Tensor) -> Tensor:
    doubled = x * 2
    doubled[:, :1] = x[:, 1:]
    return doubled


def converted_into_a_part(x: Tensor) -> Tensor:
    tens = (x * 10).long()
    tens[:, :1] = x[:, 1:] * 100
    return tens


def repeated_into_a_part(x: Tensor) -> Tensor:
    doubled = x * 2
    doubled[:, :, :2] = x[:, :1, 2:]
    return doubled


def grids(x: Tensor) -> Tensor:
    one, other = torch.meshgrid(x[:, 0, 0], torch.arange(4.0), indexing="xy")
    first, second, third = torch.meshgrid(x[:, 1, 1], torch.arange(2.0), torch.arange(4.0))
    return (one - other).T[:, None] + first * second - third


def indexed_as_masks_are(x: Tensor) -> Tensor:
    with TransformGetItemToIndex():
        return whole(x)[torch.arange(x.shape[0])[:, None], 1 - torch.arange(2)]


def checked(x: Tensor) -> Tensor:
    torch._check((x.shape[0] % 2 == 0) | (x.shape[0] % 2 == 1))
    return x * 2


def operators(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(graph.graph))


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False) * 2,
    "a result": lambda x: F.dropout(x * 2, 0.5, training=False),
    "to its own dtype": lambda x: x.to(torch.float32) * 2,
    "to another dtype": lambda x: (x * 3).to(torch.int32).to(torch.float64),
    "to that of another": lambda x: (x > 0.5).to(x),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], 2, 4),
    "reshape": lambda x: x.transpose(1, 2).reshape(x.shape[0], 8),
    "reshape to an open size": lambda x: x.transpose(0, 1).reshape(2, -1),
    "flatten": lambda x: x.transpose(1, 2).flatten(1),
    "expanded": lambda x: x[:, :1].expand_as(x) * x[0:0].new_ones(4).expand_as(torch.zeros(2, 4)) + x,
    "pooled": lambda x: F.adaptive_avg_pool1d(whole(x), 1) + F.adaptive_avg_pool2d(whole(x), 1) * 3,
    "differences": lambda x: torch.cat((x.diff(), x.diff(dim=1, prepend=x[:, :1]).diff(append=x[:, :, 1:2])), 2),
    "enlarged": enlarged,
    "convolved": lambda x: F.conv1d(whole(x), torch.ones(1, 2, 2), padding="valid", stride=2),
    "convolved in two axes": lambda x: F.conv2d(whole(x)[:, None], torch.ones(1, 1, 1, 2), padding="valid"),
    "weights of known length": with_normalised_weights,
    "normalised": normalised,
    "unflatten": lambda x: x.unflatten(2, (2, -1)).transpose(2, 3),
    "transposed, from a number": lambda x: x.transpose(1, 2) * (1 - torch.arange(8.0).reshape(2, 4).T),
    "whole numbers, from a number": lambda x: 1.5 - (x * 9).long(),
    "chunk": lambda x: torch.cat(x.chunk(3, -1)[::-1], -1),
    "chunks of an open axis": lambda x: torch.cat(torch.cat((x, x, x)).chunk(2)[::-1]),
    "parts of an open size": lambda x: torch.cat(torch.cat((x, x, x)).split(x.shape[0] * 2)[::-1]),
    "added in place": added,
    "added in place and read again": read_again,
    "clamped in place": lambda x: (x * 2).clamp_(0.5, 1.5),
    "clamped in place after a cast": lambda x: (x * 9).to(torch.int64).clamp_(0, 3),
    "scattered in place": lambda x: (x * 2).scatter_add_(2, (x > 0.5).long(), x),
    "subtracted in place": subtracted,
    "multiplied in place": lambda x: F.linear(whole(x), torch.ones(4, 4)).mul_(x),
    "divided in place": divided,
    "relu in place": lambda x: (x - 0.5).relu_(),
    "checked": checked,
    "written into parts": written_into_parts,
    "grids": grids,
    "indexed as masks are": indexed_as_masks_are,
    "a number scattered in place": lambda x: torch.zeros_like(x).scatter_(2, x.argsort(2)[..., :1], 1),
    "a value as a number": lambda x: x * (x > 0.5).sum().item(),
    "convolved, transposed": lambda x: F.conv_transpose2d(whole(x)[:, None], torch.ones(1, 1, 2, 2), stride=(1, 2)),
    "minimum": lambda x: torch.min(x, -x) - torch.max(x, x * x),
    "and, or": lambda x: (((x > 0.2) & (x < 0.4)) | (x > 0.8)) * x,
    "equal parts of an open axis": lambda x: torch.cat(torch.tensor_split(x, 3)[::-1]),
    "equal parts by keywords": lambda x: torch.cat(x.tensor_split(dim=0, sections=3)[::-1]),
    "a repeated part of an open axis": lambda x: torch.cat((x, x)).tensor_split(3)[0].repeat(2, 1, 1),
    "the size of an equal part": lambda x: x * x.tensor_split(3)[1].shape[0],
    "sorted bools": sorted_bools,
    "bools of a sort": lambda x: (x > 0.5).sort(dim=2, stable=True)[0],
    "sorted stably": lambda x: whole(x).sort(dim=2, stable=True)[1],
    "quotients of negative sizes": lambda x: (
        x * (-x.shape[0] // 2) - ((3 - x.shape[0]) // 2) + (x.shape[0] // -3) + (-7 // (x.shape[0] + 2))
    ),
}
TRACED_AGAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "written at open places": written_at_open_places,
    "repeated into a part by copy_": copied_into_parts,
    "equal parts by the operator": lambda x: torch.cat(torch.ops.aten.tensor_split.sections(x, 3)[::-1]),
    "a view of what is written": written_after_a_view,
    "a view of what a part is written into": written_under_a_view,
    "written into a part of the result": written_into_the_result,
    "converted into a part": converted_into_a_part,
    "repeated into a part": repeated_into_a_part,
    "another operator": lambda x: x.narrow(1, 0, 1) * 2,
    "clamped in place after no cast": lambda x: (y := x * 2).to(torch.float32).clamp_(0.5, 1.5) * y,
    "expanded to an open size": lambda x: x.new_ones(1, 2, 4).expand_as(x) + x,
    "chunks of an axis of size 0": lambda x: torch.cat((*x[:, :0].chunk(3, 1), x), 1),
    "divided in place, with a view": divided_as_read,
    "chunks of an open axis": lambda x: torch.cat(x.diff(n=2).chunk(2)[::-1]),
    "second differences": lambda x: x.diff(n=2),
    "differences of bools": lambda x: (x > 0.5).diff(),
    "convolved to the same size": lambda x: F.conv1d(whole(x), torch.ones(1, 2, 2), padding="same"),
    "convolved without a batch": lambda x: F.conv1d(whole(x)[0], torch.ones(1, 2, 2), padding="valid"),
    "lengths by an axis from the end": lambda x: F.linear(
        whole(x), torch._weight_norm(torch.ones(3, 4), torch.ones(3, 1), -2)
    ),
    "pooled to two": lambda x: F.adaptive_avg_pool1d(whole(x), 2),
    "pooled to a plane of 2 by 1": lambda x: F.adaptive_avg_pool2d(whole(x), (2, 1)),
    "normalised by itself": lambda x: F.batch_norm(x * 0, None, None, training=True) + x,
    "quotients of negative sizes": lambda x: x.diff(n=2) * -(-x.shape[0] // 2),
    "another dtype in place": lambda x: (x > 0.5).int().add_((x > 0.2).long()),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_operators_are_exchanged_in_place(name: str, traces: list[ExportedProgram]) -> None:
    function = IN_PLACE[name]
    graph = graph_of(function)
    assert not traces
    for batch in (1, 5, 0):
        x = torch.rand(batch, 2, 4)
        (value,) = run(graph, x=x.numpy()).values()
        expected = function(x).numpy()
        assert value.dtype == expected.dtype and value.tolist() == expected.tolist()


@pytest.mark.parametrize("name", TRACED_AGAIN)
def test_what_is_not_exchanged_is_traced_again(name: str, traces: list[ExportedProgram]) -> None:
    function = TRACED_AGAIN[name]
    graph = graph_of(function)
    assert len(traces) == 1
    x = torch.rand(5, 2, 4)
    (value,) = run(graph, x=x.numpy()).values()
    assert value.tolist() == function(x).tolist()


ICDF = torch.distributions.Normal(0, 1).icdf


@pytest.mark.parametrize("inverse", [torch.erfinv, torch.special.erfinv, ICDF])
def test_the_inverse_of_erf_is_made_of_operators_of_onnx(inverse: Any, traces: list[ExportedProgram]) -> None:
    """Gemma 3n leaves out neurons by the quantile of a normal distribution."""
    graph = graph_of(inverse)
    assert len(traces) == 1
    last = 1 - torch.arange(1.0, 1025.0).reshape(-1, 2, 4) * 2.0**-24  # the last floats before 1
    x = torch.cat((torch.rand(5, 2, 4), torch.tensor([0.95, 0.5, 0.0, 1.0]).expand(1, 2, 4), last))
    (value,) = run(graph, x=x.numpy()).values()
    found, expected = torch.from_numpy(value).double(), inverse(x.double())
    assert torch.equal(found.isinf(), expected.isinf()) and not found.isnan().any()
    is_rounded = inverse is ICDF  # before and behind the operator
    inner = (x < (0.99 if is_rounded else 1)).nonzero(as_tuple=True)
    rtol, atol = (2e-6, 2e-6) if is_rounded else (6e-7, 0)  # 5 units in the last place
    torch.testing.assert_close(found[inner], expected[inner], rtol=rtol, atol=atol)


def test_chunks_whose_number_varies_are_refused() -> None:
    """PyTorch takes three for that of all sizes. A graph that computes so is wrong where x has 4 or 5 rows."""
    with pytest.raises(RuntimeRefused, match="the exporter refused"):
        graph_of(lambda x: torch.cat(x.chunk(5)[::-1]))


def test_a_node_of_which_nothing_is_known_is_traced_again(traces: list[ExportedProgram]) -> None:
    program = torch.export.export(Computed(lambda x: x.contiguous() * 2), (torch.ones(2, 2, 4),))
    with decompositions.decomposed_in_place():
        assert program.run_decompositions({}) is program and not traces
        del next(node for node in program.graph.nodes if node.op == "call_function").meta["val"]
        program.run_decompositions({})
    assert traces == [program]


def test_programs_of_other_threads_are_traced_again(traces: list[ExportedProgram]) -> None:
    program = torch.export.export(Computed(lambda x: x.contiguous() * 2), (torch.ones(2, 2, 4),))
    with decompositions.decomposed_in_place(), ThreadPoolExecutor(1) as threads:
        assert threads.submit(program.run_decompositions, {}).result() is not program
    assert traces == [program]


def test_what_transformers_puts_into_a_program_is_known(traces: list[ExportedProgram]) -> None:
    program = torch.export.export(Computed(lambda x: (x * 2).detach() + 1), (torch.ones(2, 2, 4),))
    added = next(node for node in program.graph.nodes if "detach" in str(node.target))
    del added.meta["val"]
    with decompositions.decomposed_in_place():
        assert program.run_decompositions({}) is program and not traces
    assert added.meta["val"].shape == (2, 2, 4)


@pytest.mark.parametrize("axes", [2, 3])
def test_open_sizes_that_are_known_stay_in_place(axes: int, traces: list[ExportedProgram]) -> None:
    graph = graph_of(lambda x: (x * 2).unsqueeze(-1).flatten(2), axes=axes)
    assert not traces
    for shape in [(2, 5, 4), (0, 3, 4), (3, 0, 4)]:
        assert run(graph, x=torch.ones(shape).numpy())["output_0"].shape == shape


def test_open_sizes_that_are_computed_are_traced_again(traces: list[ExportedProgram]) -> None:
    graph = graph_of(lambda x: x.transpose(1, 2).flatten(1), axes=3)
    assert len(traces) == 1
    for shape in [(2, 5, 4), (0, 3, 4), (3, 0, 4)]:
        assert run(graph, x=torch.ones(shape).numpy())["output_0"].shape == (shape[0], shape[1] * 4)


@pytest.mark.parametrize("name", ["bert", LLAMA])
def test_a_second_trace_makes_the_same_graph(name: str, traces: list[ExportedProgram]) -> None:
    in_place = exported(name)
    module, feeds = in_place.module, inputs(name)
    assert not traces
    with mock.patch.dict(decompositions.EXCHANGES, clear=True):
        traced_again = export.to_onnx(module, feeds, axes=in_place.axes)
    assert len(traces) == 1
    assert operators(in_place.graph) == operators(traced_again)
