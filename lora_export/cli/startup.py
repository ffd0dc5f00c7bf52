"""How a short command starts sooner, in a process that is its own and ends behind it.

A merge of half a gigabyte takes less time than importing what it needs, if all of it were imported. Measured by the
processor's time, on a quiet machine: sympy 200 ms, which onnx_ir imports for sums of symbolic dimensions, and no merge
makes one; the garbage collector 60 ms, which looks again and again through what has come to stay; OpenBLAS's threads
20 ms, which a merge does not use, as it has its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The second is onnx_ir's own user of the first. Whoever asks one of them for anything has it loaded at that moment.
DEFERRED = frozenset({"sympy", "onnx_ir._symbolic_shapes"})

_process_is_ours = False


def take_process() -> None:
    """Say that this process is the command line's alone. Without it, `brisk` changes nothing of the caller's."""
    global _process_is_ours  # noqa: PLW0603 - a process is one
    _process_is_ours = True


@contextlib.contextmanager
def brisk() -> Iterator[None]:
    """Import packages and read headers in less time.

    What was made inside is never looked through for garbage, not at the process's end either: it is there to stay.
    """
    if not _process_is_ours:
        yield
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read once, when numpy is imported
    finder = _Deferring()
    sys.meta_path.insert(0, finder)
    gc.disable()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        gc.freeze()
        gc.enable()


class _Deferring(MetaPathFinder):
    """Finds the deferred modules as the standard library's LazyLoader has them: loaded when they are first used."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec
