"""The graphs of a base that is exported once for many adapters: the first export is kept in a folder, by hash.

A base has one graph; with a key/value cache, one with an encoder has three. The hash is of all that these depend on:
the weights, the code of the model and of the exporter, the inputs, the opset and the task. What no list would be sure
to name, such as the arguments of a user's factory, is in what the model computes from its example inputs, and in the
attributes of its modules. An adapter that changes the model itself, by a head of its own for instance, has other
graphs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from torch import nn

from lora_export.errors import OutputFailed
from lora_export.models.model import Model
from lora_export.runtime.torch_runners import ModuleRunner, to_numpy
from lora_export.storage import atomic_output
from lora_export.storage.output_lock import output_lock
from lora_export.verification.references.cached_outputs import add_arrays, code_of, hash_of_state

KEPT_GRAPH = "graph{}.onnx"
SECONDS_BETWEEN = 0.2  # seconds between attempts, where another process exports the same base
EXPORTERS = ("onnx", "onnx_ir", "onnxscript", "torch")


def exported_once(
    folder: Path, base: Model, options: Sequence[str | int | None], export: Callable[[], Sequence[ir.Model]]
) -> list[ir.Model]:
    """The graphs of a base: those in the folder, or those that `export` makes, which are then kept there.

    `options` are what `export` depends on besides the base. Several processes export a base once: the others wait.
    Raises what `export` raises.
    """
    own = folder / _key(base, options)
    folder.mkdir(parents=True, exist_ok=True)
    with _waiting_lock(folder / f".{own.name}.export", own):
        if own.is_dir():
            return [ir.load(path) for path in sorted(own.glob(KEPT_GRAPH.format("*")))]
        programs = export()
        with atomic_output.stage_folder(own, inputs=[]) as stage:
            for number, program in enumerate(programs):
                path = stage / KEPT_GRAPH.format(number)
                ir.save(program, path, external_data=f"{path.stem}.data")
        return list(programs)


def _key(base: Model, options: Sequence[str | int | None]) -> str:
    """The hash of all that the graphs depend on. Runs the model once."""
    inputs = {name: to_numpy(value) for name, value in base.example_inputs().items()}
    versions = {name: version(name) for name in EXPORTERS}
    to_dict = getattr(getattr(base.module, "config", None), "to_dict", None)
    settings = to_dict() if callable(to_dict) else None
    facts = [base.axes, *options, code_of(base.module), versions, settings, list(_attributes(base.module))]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    digest.update(hash_of_state(base).encode())
    for run in (inputs, ModuleRunner(base.module).run(inputs)):
        add_arrays(digest, run)
    return digest.hexdigest()[:32]


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Module, name and value of each attribute that is plain data."""
    for part_name, part in module.named_modules():
        for name, value in vars(part).items():
            with contextlib.suppress(TypeError, ValueError):  # tensors and other objects
                yield part_name, name, json.dumps(value)


@contextlib.contextmanager
def _waiting_lock(path: Path, target: Path) -> Iterator[None]:
    """Hold a lock for the block, as soon as no other process holds it."""
    with contextlib.ExitStack() as held:
        while True:
            with contextlib.suppress(OutputFailed):
                held.enter_context(output_lock(path, target))
                break
            time.sleep(SECONDS_BETWEEN)
        yield
