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


@contextlib.contextmanager
def refused_numbers(module: nn.Module) -> Iterator[None]:
    """Raise RuntimeRefused, with the line, where the module's code made a number of an open size, in this thread.

    Numbers are compared at the sizes of LARGE. One that is the same there is not refused: the parts of `chunk(2)` are
    two. So a number that changes at other sizes alone is left to the proof. One that nothing uses is refused, too.
    """
    files, found = code_files(module), list[str]()

    def note(number: int) -> None:
        if line := innermost_line(traceback.extract_stack(), files):
            found.append(
                f"its code makes a number of a size that varies. The graph would have {number}, that of the trace, for "
                f"all sizes{line}"
            )

    before = _NOTE.set(note)
    try:
        with _PATCHED:
            yield
    finally:
        _NOTE.reset(before)
    if found:
        raise RuntimeRefused(f"the exporter refused {type(module).__name__}: {found[0]}", CHANGE_THE_LINE)


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
