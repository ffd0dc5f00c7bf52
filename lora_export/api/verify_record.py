"""What a candidate records about itself, where its verdict needs an explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.record import WrittenRecord
from lora_export.errors import InputRefused
from lora_export.runtime.runner import TIMEOUT
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.recorded_origin import ComparedWith, explain_by_record

if TYPE_CHECKING:
    from lora_export.lora import Adapter
    from lora_export.verification.parity import Verdict


@dataclass(frozen=True)
class HowToRun:
    """How the candidate is run, and how its outputs are judged."""

    provider: str = "cpu"
    dtype: str = "float32"
    onnx_adapter: Path | None = None
    adapter_id: int | None = None
    inputs: Path | None = None
    atol: float | None = None
    rtol: float | None = None
    seed: int | None = None
    cache: Path | None = None
    trace: bool = False
    timeout: float = TIMEOUT
    fixed: Mapping[str, int] = field(default_factory=dict)


def recorded_explanation(
    verdict: Verdict | Audit,
    candidate: Path,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    base: Path | None,
    how: HowToRun,
    *,
    fingerprint: str = "",
) -> tuple[str, ...]:
    """What the candidate records about its adapters and base, where the verdict needs an explanation.

    A damaged record explains nothing, and the verdict stands without it.
    """
    if verdict:
        return ()
    try:
        record = open_artifact(candidate).record
        base_record = open_artifact(base).record if base is not None and base.exists() else WrittenRecord()
    except InputRefused:
        return ()
    file = None
    if how.onnx_adapter is not None:
        from lora_export.formats import onnx_adapter

        file = onnx_adapter.read(how.onnx_adapter)
    given = ComparedWith(
        adapters=adapters,
        weights=weights or (1.0,) * len(adapters),
        base=base,
        base_record=base_record,
        fingerprint=fingerprint,
        dtype=how.dtype,
        adapter_file=how.onnx_adapter,
        adapter_version=None if file is None else file.adapter_version,
        adapter_id=how.adapter_id,
    )
    return explain_by_record(record, given)
