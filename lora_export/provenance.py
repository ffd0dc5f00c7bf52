"""Where an output comes from, as hashes; and a second merge of the same adapter is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.storage import json_files
from lora_export.storage.hashes import ALGORITHMS
from lora_export.storage.hub_cache import hub_source
from lora_export.version import __version__

KEY = "lora_export"  # of the record, in a safetensors header and in a graph's properties
LONGEST_KEY = "lora_export.longest"  # of the greatest sizes for which a graph was made, in its properties
# In a graph's properties: name -> {algorithm: hash} of each file whose weights it shares with another graph
SHARED_KEY = "lora_export.shared_weights"
# Of adapters as inputs (see `formats.contract`): where each is one adapter, a slot for each row, or a row's choice
CONTRACT_KEY, SLOTS_KEY, ROW_ADAPTERS_KEY = "lora_export.inputs", "lora_export.slots", "lora_export.rows"

MOST_IN_RECORD = 1 << 40
History = Sequence[Mapping[str, Any]]  # the adapters of earlier merges, as `adapter_records` describes them


def record(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    base: Mapping[str, Any],
    history: History,
    settings: Mapping[str, Any],
    *,
    base_path: Path | None = None,
) -> dict[str, Any]:
    """Where an output comes from: the base's files, its place on the Hub, and all adapters, earlier ones first."""
    base_hub = {} if base_path is None else hub_source(base_path)
    return {
        "made_by": f"lora-export {__version__}",
        "base": dict(base),
        **({"base_hub": base_hub} if base_hub else {}),
        "adapters": [*history, *adapter_records(adapters, strengths)],
        "settings": dict(settings),
    }


def adapter_records(adapters: Sequence[Adapter], strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Adapters as a record contains them. `refuse_second_merge` compares their hashes."""
    return [
        {
            "name": adapter.name,
            "format": adapter.format,
            "sha256": adapter.sha256,
            **({"file_sha256": adapter.file_sha256} if adapter.file_sha256 else {}),
            "weight": strength,
            **_ranks_and_alphas(adapter),
            **({"hub": dict(adapter.hub)} if adapter.hub else {}),
        }
        for adapter, strength in zip(adapters, strengths, strict=True)
    ]


def _ranks_and_alphas(adapter: Adapter) -> dict[str, list[Any]]:
    """Those of its pairs, without repetitions. Alpha is the scale x the rank, with rsLoRA x its root.

    Other kinds than LoRA mean other things by their ranks and alphas: they have none here.
    """
    if not adapter.pairs or "peft_type" in adapter.metadata:
        return {}
    power = 0.5 if adapter.metadata.get("use_rslora") else 1.0
    alphas = {float(f"{pair.scale * pair.rank**power:.6g}") for pair in adapter.pairs.values()}
    return {"ranks": sorted({pair.rank for pair in adapter.pairs.values()}), "alphas": sorted(alphas)}


def refuse_second_merge(adapters: Sequence[Adapter], base: Path, history: History) -> None:
    """Raise InputRefused where an adapter is already merged in the base."""
    merged = {adapter.get("sha256"): adapter.get("name") for adapter in history}
    for adapter in adapters:
        if adapter.sha256 and adapter.sha256 in merged:
            raise InputRefused(
                f"{base} already contains the adapter {adapter.name} (merged as {merged[adapter.sha256]}, sha256 "
                f"{adapter.sha256[:12]}). Merge into the original base instead"
            )


def read_history(text: str, source: Path) -> History:
    """The adapters in the JSON text of a record. Raises InputRefused where it is damaged."""
    what = f"the record of an earlier merge in {source}"
    return history(json_files.parse_json(text, what), source)


def history(record: Mapping[str, Any], source: Path) -> History:
    """The adapters in a record. Raises InputRefused where it is damaged."""
    adapters = record.get("adapters", [])
    if not isinstance(adapters, list) or not all(
        isinstance(adapter, dict) and isinstance(adapter.get("sha256", ""), str) for adapter in adapters
    ):
        raise InputRefused(f"{source}: the record of an earlier merge is damaged")
    return tuple(adapters)


def read_longest(properties: Mapping[str, Any], source: Path) -> dict[str, int]:
    """The sizes up to which a file was made, by their symbols. Raises InputRefused where the record is damaged."""
    if LONGEST_KEY not in properties:
        return {}
    record = json_files.parse_json(str(properties[LONGEST_KEY]), f"{LONGEST_KEY} in {source}")
    if not all(type(size) is int and 0 < size < MOST_IN_RECORD for size in record.values()):
        raise InputRefused(f"{source}: {LONGEST_KEY} is damaged: its sizes are no numbers above 0")
    return dict(record)


def read_shared(properties: Mapping[str, str], source: Path) -> dict[str, tuple[str, str]]:
    """Name -> algorithm and hash of each file whose weights a graph shares with another, below its folder.

    Raises InputRefused where the record is damaged.
    """
    if SHARED_KEY not in properties:
        return {}
    what = f"{SHARED_KEY} in {source}"
    record = json_files.parse_json(properties[SHARED_KEY], what)
    found = {}
    for name, hashes in record.items():
        parts = Path(name).parts
        known = list(ALGORITHMS.keys() & hashes.keys()) if isinstance(hashes, dict) else []
        if not known or not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise InputRefused(f"{what} is damaged: {name!r} is no file below the graph with its hash")
        found[name] = (known[0], str(hashes[known[0]]))
    return found


def refuse_larger(sizes: Mapping[str, int], longest: Mapping[str, int], source: Path, remedy: str) -> None:
    """Raise InputRefused where a run has a larger size of a symbol than the file was made for (`read_longest`)."""
    for symbol, size in sizes.items():
        if size > longest.get(symbol, size):
            raise InputRefused(
                f"{source} was made for sizes of up to {longest[symbol]:,} in {symbol}, and this run has {size:,}: its "
                f"model computes larger ones in another way. {remedy}"
            )
