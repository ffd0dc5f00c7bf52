"""Numbers that a model's code makes of sizes that vary, while it is traced.

PyTorch 2.13 refuses an axis whose own size becomes a number. Of what is computed from it, as `x.shape[1] // 2` is, it
takes the number of the trace for those of all inputs, without a warning.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from unittest import mock

from torch import nn

from lora_export.errors import RuntimeRefused
from lora_export.layers.torch_internals import private
from lora_export.models.refusals import CHANGE_THE_LINE, code_files, innermost_line
from lora_export.models.shared_context import SharedContext

LARGE = range(64, 128)  # sizes: `chunk` and `tensor_split` may make fewer parts of smaller ones
OTHER_SIZES = 2, 3  # times as large as those of the trace, which keeps them multiples of what a module asks for


@contextlib.contextmanager
def refused_numbers(module: nn.Module, graph_at: Callable[[int], object] | None = None) -> Iterator[None]:
    """Raise RuntimeRefused, with the line, where the module's code made a number of an open size, in this thread.

    Numbers are compared at the sizes of LARGE. One that is the same there is not refused: the parts of `chunk(2)` are
    two. So a number that changes at other sizes alone is left to the proof.

    `graph_at(factor)` exports once more, with open sizes as many times as large. A number of which the graph does not
    depend is not refused then. Without it each is: a program of PyTorch asks for the trace's number at each call.
    """
    with _noted(module) as found:
        yield
    if found and (graph_at is None or _depends(module, graph_at, found)):
        (line, (number, *_)), *_ = found.items()
        raise RuntimeRefused(
            f"the exporter refused {type(module).__name__}: its code makes a number of a size that varies. The graph "
            f"would have {number}, that of the trace, for all sizes{line}",
            CHANGE_THE_LINE,
        )


def _depends(module: nn.Module, graph_at: Callable[[int], object], found: Mapping[str, list[int]]) -> bool:
    """Whether the graph is another at other sizes, or a line makes the same numbers at them, so that nobody knows."""
    graph, unchanged = graph_at(1), set(found)
    for factor in OTHER_SIZES:
        with _noted(module) as others:
            try:
                if graph_at(factor) != graph:
                    return True
            except RuntimeRefused:  # the module may not take such sizes
                return True
        unchanged -= {line for line in unchanged if others.get(line) != found[line]}
    return bool(unchanged)


@contextlib.contextmanager
def _noted(module: nn.Module) -> Iterator[dict[str, list[int]]]:
    """The numbers that the module's code makes of open sizes, by line. The dictionary is filled meanwhile."""
    files, found = code_files(module), dict[str, list[int]]()

    def note(number: int) -> None:
        if line := innermost_line(traceback.extract_stack(), files):
            found.setdefault(line, []).append(number)

    before = _NOTE.set(note)
    try:
        with _PATCHED:
            yield found
    finally:
        _NOTE.reset(before)


_NOTE: ContextVar[Callable[[int], None] | None] = ContextVar("_NOTE", default=None)


def _patched() -> contextlib.AbstractContextManager[Any]:
    node = private("torch.fx.experimental.sym_node", "SymNode")
    number_of: Any = node.guard_int

    def guard_int(self: Any, file: str, line: int) -> int:
        size, note = self.expr, _NOTE.get()
        number: int = number_of(self, file, line)
        if note is not None and size.free_symbols and _varies(size, self.shape_env.var_to_range, number):
            note(number)
        return number

    # PyTorch names the last line outside of its own files that fixes a size: it is not to be that of this function.
    guard_int.__code__ = guard_int.__code__.replace(co_filename=number_of.__code__.co_filename)
    return mock.patch.object(node, "guard_int", guard_int)


_PATCHED = SharedContext(_patched)


def _varies(size: Any, ranges: Mapping[Any, Any], number: int) -> bool:
    """Whether an expression of open sizes is another number for some large sizes than in the trace."""
    symbols = sorted(size.free_symbols, key=str)
    for large in LARGE:
        wanted = ((each, large + 7 * place) for place, each in enumerate(symbols))  # not equal
        sizes = {each: max(int(ranges[each].lower), min(number, ranges[each].upper)) for each, number in wanted}
        if size.subs(sizes) != number:
            return True
    return False
