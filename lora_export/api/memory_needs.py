"""What a proof or an export of a model needs in memory, compared with what is available before anything is loaded.

The figures are above the peaks of whole processes, measured on Llama shapes of 0.14 to 1.1 billion parameters with an
adapter on every linear layer (`tests/verification/test_memory.py` holds one). A Hugging Face folder tells its size in
its headers. The size of any other model is known when it is loaded, so that nothing is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

from lora_export.artifacts.artifact import Artifact, open_artifact
from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused
from lora_export.isolation.limits import GIB
from lora_export.options.common import ModelSource
from lora_export.options.proof import Running
from lora_export.options.spelling import command
from lora_export.runtime.memory import available_memory, require_memory
from lora_export.storage.input_files import files_of

PROGRAM = 700 << 20  # bytes: Python, PyTorch and onnxruntime
STREAMED = 300 << 20  # bytes: of what reads weights in blocks
# Bytes for each parameter of the model:
WIDENED = 32  # of a model that is widened to fp64 as a whole
MOST_WIDENED_PARAMETERS = 1 << 27  # of a model that is
VERIFY_CHECKPOINT, VERIFY_FILE, EXPORT = 16.0, 14.0, 20.0
# Where weights are read when something computes with them:
VERIFY_CHECKPOINT_READ, VERIFY_FILE_READ, EXPORT_READ = 2.7, 6.0, 7.5
OF_AUDIT = 56 << 20  # bytes: blocks of a further audit that reads a base in step, and what it reads ahead of an object
OF_OUTPUT = 8 << 20  # bytes: names, plans and headers of a further output that is written in the same pass
MERGE_INSTEAD = (
    "`lora-export merge` puts an adapter into a checkpoint, or into an .onnx, in memory that does not grow with the "
    "model."
)


def require_memory_to_verify(model: ModelSource, candidate: Artifact, dtype: str = Running.dtype) -> None:
    """Raise EnvironmentLacking where the memory for a proof is missing. Reads headers."""
    is_checkpoint = candidate.kind.is_checkpoint
    instead = command("verify", "MERGED", base="BASE")
    ways_out = [f"`{instead}` compares the weights of a merged checkpoint in 300 MiB."] if is_checkpoint else []
    needed = memory_to_verify(model, dtype, is_checkpoint, is_checkpoint and candidate.is_streamable)
    require_memory(needed, f"verify against a model of {_size(count_floats(model))}", *ways_out)


def memory_to_verify(model: ModelSource, dtype: str, of_checkpoint: bool, is_streamable: bool) -> int:
    """Bytes that a proof takes, of a merged checkpoint or of another file; 0 where they are unknown. Reads headers."""
    is_read = is_read_when_needed(model, dtype)
    if of_checkpoint:
        return _needed(count_floats(model), VERIFY_CHECKPOINT_READ if is_read and is_streamable else VERIFY_CHECKPOINT)
    return _needed(count_floats(model), VERIFY_FILE_READ if is_read else VERIFY_FILE)


def require_memory_to_export(model: ModelSource, dtype: str = Running.dtype) -> None:
    """Raise EnvironmentLacking where the memory for an export is missing. Reads headers."""
    purpose = f"exporting a model of {_size(count_floats(model))}"
    require_memory(memory_to_export(model, dtype), purpose, MERGE_INSTEAD)


def memory_to_export(model: ModelSource, dtype: str = Running.dtype) -> int:
    """Bytes that an export with its proof takes; 0 where they are unknown. Reads headers."""
    is_read = is_read_when_needed(model, dtype)
    return _needed(count_floats(model), EXPORT_READ if is_read else EXPORT)


def memory_of_model(model: ModelSource, dtype: str) -> int:
    """Bytes of a model that stays in memory for further proofs; 0 where its weights do not. Reads headers."""
    if is_large_folder(model) and is_read_when_needed(model, dtype):
        return 0
    return count_floats(model) * (4 if dtype == "float32" else 2)


def memory_to_merge(adapters: Iterable[Path]) -> int:
    """Bytes that a merge in blocks takes: the adapters are in memory. Reads no file."""
    files = (file for path in adapters for file in files_of(path))
    return STREAMED + sum(file.stat().st_size for file in files)


def memory_beside(adapters: Iterable[int]) -> int:
    """Bytes that further adapters of these sizes, in bytes, take where one pass over a base merges them too.

    A stored number of 16 bits becomes one of 32.
    """
    return sum(OF_OUTPUT + 2 * size for size in adapters)


def jobs_that_fit(jobs: int, memory: int, on_message: OnMessage) -> int:
    """How many processes work at the same time: those of `jobs` for which there is memory. `memory` is that of one."""
    available = available_memory()
    if available is None or memory * jobs <= available or jobs == 1:
        return jobs
    fitting = max(1, available // memory)
    on_message(
        f"note: jobs at the same time: {fitting}, not {jobs}. A job needs {memory / GIB:.1f} GiB of memory, and "
        f"{available / GIB:.1f} GiB are available"
    )
    return fitting


def is_large_folder(model: ModelSource) -> bool:
    """Whether a model is a Hugging Face folder that a proof does not hold in fp64 as a whole. Reads headers."""
    return count_floats(model) > MOST_WIDENED_PARAMETERS


def _needed(parameters: int, each: float) -> int:
    if not parameters:
        return 0
    return PROGRAM + int(parameters * (WIDENED if parameters <= MOST_WIDENED_PARAMETERS else each))


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion parameters"


def count_floats(model: ModelSource) -> int:
    """The number of floats in a Hugging Face folder; 0 where it is unknown."""
    if isinstance(model, str | Path) and Path(model).is_dir():
        with contextlib.suppress(InputRefused):  # loading it will refuse it with a better message
            return sum(math.prod(spec.shape) for spec in open_artifact(model).checkpoint.specs if spec.is_float)
    return 0


def is_read_when_needed(model: ModelSource, dtype: str) -> bool:
    """Whether a proof against a large folder has no weight of it in memory longer than it computes with it."""
    return dtype == "float32" and isinstance(model, str | Path) and open_artifact(model).is_streamable
