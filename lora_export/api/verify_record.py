"""What a candidate records about how it was made, beside what it was compared with.

A record explains a verdict and never changes it: anybody can write one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.artifacts.artifact import Artifact, WrittenRecord
from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter, program_adapter
from lora_export.formats.contract import version_of
from lora_export.lora import Adapter
from lora_export.options.combining import AdapterSource
from lora_export.options.spelling import named
from lora_export.options.verify import VerifyOptions
from lora_export.storage.artifact_kinds import ArtifactKind, claimed_kind
from lora_export.storage.hashes import ALGORITHMS, SHORT_HASH, file_hash
from lora_export.verification.against_checkpoint import Audit

if TYPE_CHECKING:
    from lora_export.verification.against_checkpoint.in_step import AuditInStep
    from lora_export.verification.parity import Verdict
    from lora_export.verification.proof_session import ProofSession

SHA256 = re.compile(r"[0-9a-f]{64}")
SHOWN_ADAPTERS = 8  # adapters that a sentence names

Record = Mapping[str, Any]  # of one adapter: name, sha256, weight


@dataclass(frozen=True, eq=False, kw_only=True)
class VerifyRequest(VerifyOptions):
    """The options of `verify`, with everything found that they name. Only the candidate is opened: it is passed on."""

    base: Path | None = None
    origin: Artifact | None = None  # the base, or the model's folder, with whose weights those of the candidate compare
    onnx_adapter: Path | None = None
    inputs: Path | None = None
    other: Sequence[AdapterSource] = ()
    cache: Path | None = None
    calibration: Path | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    session: ProofSession | None = None
    in_step: AuditInStep[Any] | None = None  # this audit among others of the same base

    @property
    def checkpoint(self) -> Artifact:
        """What the candidate's weights were merged into."""
        assert self.origin is not None
        return self.origin


def recorded_explanation(
    verdict: Verdict | Audit,
    candidate: Artifact,
    request: VerifyRequest,
    adapters: Sequence[Adapter],
    *,
    fingerprint: str = "",
) -> tuple[str, ...]:
    """What the candidate records about its adapters and base, where the verdict needs an explanation.

    A damaged record explains nothing, and the verdict stands without it.
    """
    if verdict:
        return ()
    origin = request.origin
    try:
        record = candidate.record
        base_record = WrittenRecord() if origin is None or not origin.path.exists() else origin.record
    except InputRefused:
        return ()
    given = ComparedWith(
        adapters=adapters,
        weights=request.weights or (1.0,) * len(adapters),
        base=None if origin is None else origin.path,
        base_record=base_record,
        fingerprint=fingerprint,
        dtype=request.dtype,
        adapter_file=request.onnx_adapter,
        adapter_version=None if request.onnx_adapter is None else _version_in(request.onnx_adapter, candidate),
        fills_inputs=candidate.kind is ArtifactKind.EXECUTORCH,
        adapter_id=request.adapter_id,
    )
    return explain_by_record(record, given)


@dataclass(frozen=True, eq=False)
class ComparedWith:
    """What `verify` was given to compare the candidate with."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]  # one for each adapter
    base: Path | None = None  # the folder or file of the base's weights
    base_record: WrittenRecord = field(default_factory=WrittenRecord)  # what that base records itself
    fingerprint: str = ""  # SHA-256 of the PyTorch model's weights
    dtype: str = "float32"  # of the PyTorch model
    adapter_file: Path | None = None  # `onnx_adapter`
    adapter_version: int | None = None  # 31 bits of the hash of the adapter in that file
    adapter_id: int | None = None
    fills_inputs: bool = False  # whether the candidate's inputs get the adapters, where there is no such file

    @property
    def records(self) -> list[Record]:
        pairs = zip(self.adapters, self.weights, strict=True)
        return [{"name": adapter.name, "sha256": adapter.sha256, "weight": weight} for adapter, weight in pairs]


def explain_by_record(record: WrittenRecord, given: ComparedWith) -> tuple[str, ...]:
    """Sentences on where the record of a candidate and what it was compared with disagree; none where they agree."""
    in_base = {adapter.get("sha256") for adapter in given.base_record.adapters}
    if twice := [adapter for adapter in given.records if adapter["sha256"] in in_base - {None, ""}]:
        return (f"The model that it was compared with contains {_names(twice)} already. Did you swap the two?",)
    if not record:
        return ()
    contained = active_adapters(record, given)
    if contained is None:
        option = named("onnx_adapter")
        return (f"This file takes adapters as inputs. You gave no {option}, so it was run as the base.",)
    lines = [*_adapter_lines(given.records, contained, in_order=record.mode == "rows")]
    return (*lines, *_base_lines(record, given, adapters_agree=not lines))


def active_adapters(record: WrittenRecord, given: ComparedWith) -> Sequence[Record] | None:
    """The adapters that should have had an effect, the base's own left out; None: the file of one was needed."""
    in_base = {adapter.get("sha256") for adapter in given.base_record.adapters}
    own = [adapter for adapter in record.adapters if adapter.get("sha256") not in in_base]
    if record.by_row is not None:
        own = own[-len(record.by_row) :] if record.by_row else []
        ids = given.adapter_id
        return own if ids is None else own[ids - 1 : ids] if ids else []
    if record.mode not in ("inputs", "slots"):
        return own
    if record.mode == "slots" or (given.fills_inputs and given.adapter_file is None):  # whatever was put into them
        return given.records
    if given.adapter_file is None:
        return None if given.adapters else []
    fitting = [adapter for adapter in own if _version(adapter) == given.adapter_version]
    return fitting or [{"name": given.adapter_file.name}]


def _version_in(file: Path, candidate: Artifact) -> int | None:
    if candidate.kind is ArtifactKind.EXECUTORCH:
        return _version({"sha256": program_adapter.adapter_sha256(file)})
    return onnx_adapter.read(file).adapter_version


def _version(adapter: Record) -> int | None:
    """What an adapter's file holds of its hash."""
    digest = str(adapter.get("sha256", ""))
    return version_of(digest) if SHA256.fullmatch(digest) else None


def _adapter_lines(given: Sequence[Record], contained: Sequence[Record], *, in_order: bool) -> Iterator[str]:
    if not given and contained:
        yield f"You gave no {named('adapters')}; this file contains {_names(contained)}."
        return
    by_key = {_key(adapter): adapter for adapter in contained}
    if by_key.keys() != {_key(adapter) for adapter in given}:
        hashes = {str(adapter.get("name")): adapter.get("sha256") for adapter in contained}
        unlike = [
            adapter["name"] for adapter in given if hashes.get(adapter["name"], adapter["sha256"]) != adapter["sha256"]
        ]
        yield f"You gave {_names(given, unlike)}; this file contains {_names(contained, unlike)}."
        return
    if in_order and [_key(adapter) for adapter in given] != list(by_key):
        yield f"You gave {_names(given)}; this file contains them in the order {_names(contained)}."
    for adapter in given:
        recorded, weight = by_key[_key(adapter)].get("weight"), adapter["weight"]
        if isinstance(recorded, int | float) and recorded != weight:
            yield (
                f"You gave {_names([adapter])} the weight {weight:g}; this file contains it with the weight "
                f"{recorded:g} ({named('weights', f'{recorded:g}')})."
            )


def _key(adapter: Record) -> str:
    return str(adapter.get("sha256") or adapter.get("name"))


def _names(adapters: Sequence[Record], with_hash: Collection[Any] = ()) -> str:
    """`fr` and `de`; with the first characters of the hash of those whose names do not distinguish them."""
    names = []
    for adapter in adapters[:SHOWN_ADAPTERS]:
        digest = f" (SHA-256 {str(adapter.get('sha256'))[:SHORT_HASH]}…)" if adapter.get("name") in with_hash else ""
        names.append(f"`{adapter.get('name')}`{digest}")
    if len(names) < 2:
        return names[0] if names else "no adapter"
    if more := len(adapters) - len(names):
        names.append(f"{more} more")
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _base_lines(record: WrittenRecord, given: ComparedWith, *, adapters_agree: bool) -> Iterator[str]:
    digest = record.base.get("sha256")
    if isinstance(digest, str):
        # An adapter's head gives the model new weights of its own, whose values are random.
        has_head = any(adapter.replaced for adapter in given.adapters)
        same_precision = record.settings.get("dtype", given.dtype) == given.dtype
        if given.fingerprint and adapters_agree and not has_head and same_precision and digest != given.fingerprint:
            yield (
                f"This file was made from another base: its weights have the SHA-256 {digest[:SHORT_HASH]}…, those of "
                f"the model that you gave {given.fingerprint[:SHORT_HASH]}…."
            )
        return
    for name, recorded, path in _files_to_compare(record, given):
        algorithm = next((key for key in ALGORITHMS if key in recorded), None)
        if algorithm and file_hash(path, algorithm) != recorded[algorithm]:
            yield (
                f"This file was made from another base: its {name} has the {algorithm} "
                f"{str(recorded[algorithm])[:SHORT_HASH]}…, {path} has another."
            )
            return


def _files_to_compare(record: WrittenRecord, given: ComparedWith) -> Iterator[tuple[str, Mapping[str, Any], Path]]:
    """Files of the base that the record has hashes of: its name, the hashes, and the file to compare it with."""
    # A record is not trusted: its names must not lead to other files.
    recorded = {
        name: hashes for name, hashes in record.base.items() if isinstance(hashes, Mapping) and Path(name).name == name
    }
    if given.base is None or not given.base.exists():
        return
    for name, hashes in recorded.items():
        path = given.base / name if given.base.is_dir() else given.base
        # One file is compared whatever its name: copies are renamed.
        if path.is_file() and (
            given.base.is_dir() or (len(recorded) == 1 and claimed_kind(path) is claimed_kind(name))
        ):
            yield name, hashes, path
