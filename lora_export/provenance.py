"""Where an output comes from, by hashes; and what that forbids: the same adapter twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.plan import Plan
from lora_export.storage import json_files

KEY = "lora_export"  # of the record, in a safetensors header and in a graph's properties

History = Sequence[Mapping[str, Any]]  # the adapters that earlier merges put in


def record(
    plan: Plan,
    base: Mapping[str, Mapping[str, str]],
    history: History,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Where an output comes from: the hashes of the base's files, the adapters, an earlier merge's among them."""
    return record_of(plan.adapters, plan.strengths, base, history, settings)


def record_of(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    base: Mapping[str, Any],
    history: History,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """As `record`, where there need not be a plan."""
    return {
        "made_by": f"lora-export {__version__}",
        "base": dict(base),
        "adapters": [*history, *described(adapters, strengths)],
        "settings": dict(settings),
    }


def described(adapters: Sequence[Adapter], strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Adapters as a record names them: what `refuse_second_merge` knows them by."""
    return [
        {"name": adapter.name, "format": adapter.format, "sha256": adapter.sha256, "weight": strength}
        for adapter, strength in zip(adapters, strengths, strict=True)
    ]


def refuse_second_merge(plan: Plan, base: Path, history: History) -> None:
    """Raise InputRefused where one of the plan's adapters is in the base already."""
    merged = {adapter.get("sha256"): adapter.get("name") for adapter in history}
    for adapter in plan.adapters:
        if adapter.sha256 and adapter.sha256 in merged:
            raise InputRefused(
                f"{base} already holds the adapter {adapter.name} (merged as {merged[adapter.sha256]}, sha256 "
                f"{adapter.sha256[:12]}). Merge into the original base, or nothing twice"
            )


def read_history(text: str, source: Path) -> History:
    """The adapters in a record that a file carries along. Raises InputRefused where it is damaged."""
    return history(
        json_files.parse_json(text.encode(errors="surrogatepass"), f"the record of an earlier merge in {source}"),
        source,
    )


def history(record: Mapping[str, Any], source: Path) -> History:
    """The adapters in a record. Raises InputRefused where it is damaged."""
    adapters = record.get("adapters", [])
    if not isinstance(adapters, list) or not all(map(_is_adapter, adapters)):
        raise InputRefused(f"{source}: the record of an earlier merge is damaged")
    return tuple(adapters)


def _is_adapter(adapter: Any) -> bool:
    return isinstance(adapter, dict) and isinstance(adapter.get("sha256", ""), str)
