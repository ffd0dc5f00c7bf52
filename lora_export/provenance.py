"""Where an output comes from, by hashes; and what that forbids: the same adapter twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.errors import InputRefused
from lora_export.plan import Plan

History = Sequence[Mapping[str, Any]]  # the adapters that earlier merges put in


def record(
    plan: Plan,
    base: Mapping[str, Mapping[str, str]],
    history: History,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Where an output comes from: the hashes of the base's files, the adapters, an earlier merge's among them."""
    adapters = [
        {"name": adapter.name, "format": adapter.format, "sha256": adapter.sha256, "weight": strength}
        for adapter, strength in zip(plan.adapters, plan.strengths, strict=True)
    ]
    return {
        "made_by": f"lora-export {__version__}",
        "base": dict(base),
        "adapters": [*history, *adapters],
        "settings": dict(settings),
    }


def refuse_second_merge(plan: Plan, base: Path, history: History) -> None:
    """Raise InputRefused where one of the plan's adapters is in the base already."""
    merged = {adapter.get("sha256"): adapter.get("name") for adapter in history}
    for adapter in plan.adapters:
        if adapter.sha256 and adapter.sha256 in merged:
            raise InputRefused(
                f"{base} already holds the adapter {adapter.name} (merged as {merged[adapter.sha256]}, sha256 "
                f"{adapter.sha256[:12]}). Merge into the original base, or nothing twice"
            )
