"""Runs that are struck down at a chosen moment, or run out of disk: the work of children of the tests.

A moment is a call into the file system that changes something, or makes it last: between two of them nothing does.
The children come from a server that has loaded what they need, so that hundreds of them take seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import multiprocessing
import os
import pkgutil
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import formats

MOMENTS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "truncate")  # of os
# What commands import, some of it late. Whatever is missing each of hundreds of children imports by itself.
LOADED = ["onnx", "onnx_ir", "safetensors.numpy", "filelock", "support.fault_injector"]
LOADED += [f"lora_export.cli.{name}" for name in ("adapters", "export", "merge", "verbosity", "verdicts")]
LOADED += [f"lora_export.api.{name}" for name in ("adapters", "convert", "load", "merge", "merge_checkpoint")]
LOADED += [
    f"lora_export.api.{name}" for name in ("merge_graph", "merge_pipeline", "onnx", "onnx_from_graph", "unmerge")
]
LOADED += [f"lora_export.{name}" for name in ("options.commands", "report.screens", "weights.residuals.writing")]
LOADED += [f"lora_export.formats.{each.name}" for each in pkgutil.iter_modules(formats.__path__)]


@dataclass(frozen=True)
class Ended:
    """How a child ended: the code it exited with, or minus the signal that killed it; and what it said."""

    code: int
    told: str


@functools.cache
def _children() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    return context


def run(work: Callable[..., None], *arguments: object, log: Path, **faults: Any) -> Ended:
    """Let a child do some work. `signals` and `at`: which it sends itself, how often, and before which moment.

    `limit`: the longest file, in bytes, that it may write. `killed_after`: its life in seconds, if it takes longer.
    """
    life = faults.pop("killed_after", None)
    child = _children().Process(target=_with_faults, args=(work, arguments, log, faults))
    child.start()
    child.join(60 if life is None else life)
    if life is not None:
        child.kill()
        child.join()
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"{work.__name__} hangs: {log.read_text()}")
    return Ended(child.exitcode, log.read_text())


def _with_faults(work: Callable[..., None], arguments: tuple[object, ...], log: Path, faults: dict[str, Any]) -> None:
    writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    if "signal" in faults:
        strike_before(faults["at"], faults["signal"], faults.get("times", 1))
    with _no_longer_than(faults.get("limit")):
        work(*arguments)


@contextlib.contextmanager
def _no_longer_than(limit: int | None) -> Iterator[None]:
    """Stands for a disk that is full: no file grows beyond so many bytes. What is said is kept back, it would count."""
    if limit is None:
        yield
        return
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log, said = sys.stderr, io.StringIO()
    sys.stdout = sys.stderr = said
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print(said.getvalue(), end="", file=log)


def strike_before(moment: int, number: int, times: int = 1) -> None:
    """Have this process send itself a signal before its moment of this number, counted from 1."""
    from lora_export.storage import atomic_output

    passed = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == moment:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return function(*arguments, **options)

        return call

    for name in MOMENTS:
        setattr(os, name, watched(getattr(os, name)))
    fcntl.flock = watched(fcntl.flock)
    atomic_output._exchange = watched(atomic_output._exchange)


# --- work ---


def command(*line: str) -> None:
    """A command of the program, as its own process would run it."""
    from lora_export import cli

    cli.main(list(line))


def command_without_exchange(*line: str) -> None:
    """The same on a file system that cannot swap two names."""
    from lora_export.storage import atomic_output

    atomic_output._exchange = lambda *_: False
    command(*line)


def publish_graph(target: str, weight: float) -> None:
    """What `onnx` does at its end: a graph, its weights beside it, a verdict behind it. Without PyTorch."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper
    from onnx_ir import from_proto

    from lora_export import cli
    from lora_export.cli.arguments import print_message
    from lora_export.graph.onnx_file import writing
    from lora_export.graph.onnx_file.writing import append_metadata, save_graph
    from lora_export.storage import atomic_output

    writing.MAX_INLINE_BYTES = 0
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy")
    w = numpy_helper.from_array(np.full((64, 64), weight, np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
    model = from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))

    @cli.cli.command("publish")
    def _() -> None:
        with atomic_output.stage_file(Path(target), inputs=(), overwrite=True, on_message=print_message) as stage:
            save_graph(model, stage, Path(target).name)
            append_metadata(stage / Path(target).name, {"lora_export": f'{{"verdict": {weight}}}'})

    cli.COMMANDS["publish"] = ""
    cli.LazyGroup.get_command = lambda self, ctx, name: self.commands[name]
    cli.main(["publish"])
