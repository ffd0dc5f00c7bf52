"""What a candidate records about itself, where its verdict needs an explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.record import WrittenRecord
from lora_export.errors import InputRefused
from lora_export.options.verify import VerifyOptions
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.recorded_origin import ComparedWith, explain_by_record

if TYPE_CHECKING:
    from lora_export.lora import Adapter
    from lora_export.verification.parity import Verdict


@dataclass(frozen=True, eq=False, kw_only=True)
class VerifyRequest(VerifyOptions):
    """The options of `verify`, with everything found that they name."""

    candidate: Path = field(kw_only=False)
    base: Path | None = None
    onnx_adapter: Path | None = None
    inputs: Path | None = None
    cache: Path | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """The base, where nothing is run."""
        assert self.base is not None
        return self.base


def recorded_explanation(
    verdict: Verdict | Audit,
    request: VerifyRequest,
    adapters: Sequence[Adapter],
    base: Path | None,
    *,
    fingerprint: str = "",
) -> tuple[str, ...]:
    """What the candidate records about its adapters and base, where the verdict needs an explanation.

    A damaged record explains nothing, and the verdict stands without it.
    """
    if verdict:
        return ()
    try:
        record = open_artifact(request.candidate).record
        base_record = open_artifact(base).record if base is not None and base.exists() else WrittenRecord()
    except InputRefused:
        return ()
    file = None
    if request.onnx_adapter is not None:
        from lora_export.formats import onnx_adapter

        file = onnx_adapter.read(request.onnx_adapter)
    given = ComparedWith(
        adapters=adapters,
        weights=request.weights or (1.0,) * len(adapters),
        base=base,
        base_record=base_record,
        fingerprint=fingerprint,
        dtype=request.dtype,
        adapter_file=request.onnx_adapter,
        adapter_version=None if file is None else file.adapter_version,
        adapter_id=request.adapter_id,
    )
    return explain_by_record(record, given)
