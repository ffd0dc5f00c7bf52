"""Numbers that a model's code makes of open sizes are refused, with the line; those that no size changes are not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_export.errors import RuntimeRefused
from lora_export.models.export import to_onnx
from lora_export.models.export_program import to_program
from support.factories import Computed
from support.graphs import run

pytestmark = pytest.mark.exports

AXES = {"x": {0: "batch", 1: "sequence"}}
EXAMPLE = {"x": torch.rand(2, 7, 4)}


class OfThisFile(Computed):
    """A refusal names a line of a file that a class of the model is in."""


def repeated(x: Tensor) -> Tensor:
    for _ in range(x.shape[1] // 2):
        x = x * 2
    return x


def written(x: Tensor) -> Tensor:
    doubled = x * 2
    doubled[:, x.shape[1] // 2, [0, 2]] = x[:, 0, :2]
    return doubled


# PyTorch's exporter takes each of these, and computes for all lengths what it computes for 7.
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a loop": repeated,
    "a number of parts": lambda x: torch.cat(x.tensor_split(x.shape[1] // 3, 1)[::-1], 1),
    "a number of parts, by the operator": lambda x: torch.ops.aten.tensor_split.sections(x, x.shape[1] // 3, 1)[0],
    "a number of chunks": lambda x: torch.cat(x.chunk(x.shape[1] // 3, 1)[::-1], 1),
    "parts of one length": lambda x: torch.cat(x.split(3, 1)[::-1], 1),
    "a place beside a list": lambda x: x[:, x.shape[1] // 2, [0, 2]],
    "a write beside a list": written,
    "a constant": lambda x: x * torch.tensor(float(int(x.shape[1] // 3))),
    "places in a constant": lambda x: x[:, torch.tensor(list(range(int(x.shape[1] // 3))))],
    "a remainder": lambda x: x * int(x.shape[1] % 4),
    "a root": lambda x: x * int(x.shape[1] ** 0.5),
    "a size of two": lambda x: x * int(x.shape[1] // x.shape[0]),
}


def asked(x: Tensor) -> Tensor:
    torch._check(int(x.shape[1] // 2) < 100_000)
    return x * 2


def counted(x: Tensor) -> Tensor:
    places = range(x.shape[1] // 3)
    return x * len(x.shape) + (0 if places is None else 1)


SAME_FOR_ALL: dict[str, Callable[[Tensor], Tensor]] = {
    "two chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "three parts": lambda x: torch.cat(x.tensor_split(3, 1)[::-1], 1),
    "a size less itself": lambda x: x * int((x.shape[1] + 2) // (x.shape[1] + 1)),
    "an open place": lambda x: x[:, x.shape[1] // 2],
    "a number that is asked for": asked,
    "a range that nothing walks": counted,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_made_of_an_open_size_is_refused(name: str) -> None:
    with pytest.raises(RuntimeRefused) as refused:
        to_onnx(OfThisFile(NUMBERS[name]).eval(), EXAMPLE, axes=AXES)
    assert "makes a number of a size that varies" in str(refused.value)
    assert re.search(r"\(test_open_sizes.py, line \d+, in \w+", str(refused.value).replace("<lambda>", "function"))


def test_no_program_has_such_a_number() -> None:
    with pytest.raises(RuntimeRefused, match=r"would have 3, that of the trace.*in repeated: `for _ in range"):
        to_program(OfThisFile(repeated).eval(), EXAMPLE, axes=AXES)


@pytest.mark.parametrize("name", SAME_FOR_ALL)
def test_a_number_that_all_sizes_have_is_exported(name: str) -> None:
    function = SAME_FOR_ALL[name]
    graph = to_onnx(OfThisFile(function).eval(), EXAMPLE, axes=AXES)
    for shape in [(1, 5, 4), (3, 12, 4), (5, 31, 4)]:
        x = torch.rand(shape)
        (found,) = run(graph, x=x.numpy()).values()
        assert found.tolist() == function(x).tolist()
