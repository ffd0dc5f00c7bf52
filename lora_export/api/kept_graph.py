"""The graph of a base that is exported once for many adapters: the first export is kept in a folder, by hash.

The hash is of all that the graph depends on: the weights, the code of the model and of the exporter, the inputs, the
opset. What no list would be sure to name, such as the arguments of a user's factory, is in what the model computes from
its example inputs, and in the attributes of its modules. An adapter that changes the model itself, by a head of its own
for instance, has another graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
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

KEPT_GRAPH, KEPT_WEIGHTS = "graph.onnx", "graph.data"
SECONDS_BETWEEN = 0.2  # seconds between attempts, where another process exports the same base
EXPORTERS = ("onnx", "onnx_ir", "onnxscript", "torch")


def exported_once(folder: Path, base: Model, opset: int | None, export: Callable[[], ir.Model]) -> ir.Model:
    """The graph of a base: that in the folder, or the one that `export` makes, which is then kept there.

    Several processes export a base once: the others wait. Raises what `export` raises.
    """
    own = folder / _key(base, opset)
    folder.mkdir(parents=True, exist_ok=True)
    with _waiting_lock(folder / f".{own.name}.export", own):
        if (own / KEPT_GRAPH).is_file():
            return ir.load(own / KEPT_GRAPH)
        program = export()
        with atomic_output.stage_folder(own, inputs=[]) as stage:
            ir.save(program, stage / KEPT_GRAPH, external_data=KEPT_WEIGHTS)
        return program


def _key(base: Model, opset: int | None) -> str:
    """The hash of all that the graph depends on. Runs the model once."""
    inputs = {name: to_numpy(value) for name, value in base.example_inputs().items()}
    versions = {name: version(name) for name in EXPORTERS}
    facts = [base.axes, opset, code_of(base.module), versions, list(_attributes(base.module))]
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
