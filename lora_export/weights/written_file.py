"""One file of a merge's output, and whether an earlier run has made it already or a store can copy it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.plan import Plan
from lora_export.provenance import adapter_records
from lora_export.storage import safetensors_file
from lora_export.storage.hashes import file_hash
from lora_export.storage.input_files import file_states
from lora_export.storage.safetensors_file import TensorFile
from lora_export.storage.store_path import StorePath, copy_in_store
from lora_export.version import __version__
from lora_export.weights.merge_report import OutputResult, StepResult
from lora_export.weights.tensor_blocks import OutputTensor

if TYPE_CHECKING:
    from lora_export.storage.store_output import Begun


@dataclass(frozen=True)
class WrittenFile:
    """One file of the output."""

    file: TensorFile
    results: tuple[StepResult, ...]
    source_hash: str
    target_hash: str

    @property
    def facts(self) -> dict[str, Any]:
        """All but the file, as JSON has it."""
        return {"results": [asdict(one) for one in self.results], "hashes": [self.source_hash, self.target_hash]}


def recipe_of(plan: Plan, settings: Mapping[str, Any], hashing: str) -> str:
    """What determines the bytes of an output besides the base, as a text; empty for adapters without a hash."""
    if not all(adapter.sha256 for adapter in plan.adapters):
        return ""
    terms = [[step.weight, [[term.module, term.scale] for term in step.terms]] for step in plan.steps]
    return json.dumps([__version__, hashing, dict(settings), adapter_records(plan.adapters, plan.strengths), terms])


def digest_of(source: TensorFile, header: bytes, recipe: str) -> str:
    """The hash of all that determines a file of the output; empty where no later run could use the file."""
    state = source.path.stat()
    identity = [recipe, str(source.path), state.st_ino, state.st_size, state.st_mtime_ns]
    return hashlib.sha256(json.dumps(identity).encode() + header).hexdigest() if recipe else ""


def made_before(path: Path, digest: str) -> WrittenFile | None:
    """The file with this digest, where a stopped run has made it in a store."""
    begun = _begun_at(path)
    facts = None if begun is None or not digest else begun.whole(begun.name_of(path), digest)
    return None if facts is None else written_with(path, facts)


def written_with(path: Path, facts: Mapping[str, Any]) -> WrittenFile:
    """A file that is there, with the facts that were recorded of it."""
    results = (one | {"outputs": one["outputs"] and OutputResult(**one["outputs"])} for one in facts["results"])
    found = tuple(StepResult(**one) for one in results)
    return WrittenFile(safetensors_file.open_file(path), found, *facts["hashes"])


def record_made(path: Path, digest: str, written: WrittenFile) -> WrittenFile:
    """Record in a store that a file is whole."""
    begun = _begun_at(path)
    if begun is not None and digest:
        begun.add(begun.name_of(path), digest, written.facts)
    return written


def _begun_at(path: Path) -> Begun | None:
    """The output in a store to which the file belongs."""
    if not isinstance(path, StorePath):
        return None
    from lora_export.storage.store_output import begun_at

    return begun_at(path)


def copied_whole(
    path: Path, source: TensorFile, tensors: Sequence[OutputTensor], metadata: Mapping[str, str], hashing: str
) -> WrittenFile | None:
    """A file of which nothing changes, copied by the store that has it; None where that cannot be.

    It is read for its hash, and not uploaded.
    """
    own = list(source.entries.values())
    is_same = [tensor.source for tensor in tensors] == own and all(
        tensor.is_copy and tensor.name == tensor.source.name and tensor.output_shape == tensor.source.shape
        for tensor in tensors
    )
    if not is_same or dict(metadata) != dict(source.metadata) or not copy_in_store(source.path, path):
        return None
    digest = hash_of_source(source.path, hashing)
    return WrittenFile(safetensors_file.open_file(path), (), digest, digest)


def hash_of_source(path: Path, hashing: str) -> str:
    """The hash of a file that is read for it alone, once: several merges in one pass need it."""
    return _hash_of(path, hashing, *file_states([path]))


@functools.lru_cache(64)
def _hash_of(path: Path, hashing: str, _state: tuple[int, ...]) -> str:
    return file_hash(path, hashing)
