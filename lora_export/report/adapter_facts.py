"""What the files of an adapter record beside its tensors: where its scales come from, its base, its trigger words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.lora import Adapter
from lora_export.options.spelling import named

_LONGEST = 100  # characters of a value that are shown
_MOST_TAGS = 5
_LONGEST_TABLE = 1_000_000  # characters of a table of tags
# Keys in the headers of image and video models' adapters (sd-scripts, modelspec, ai-toolkit), and what they are.
HEADER_FACTS = {
    "modelspec.title": "title",
    "ss_output_name": "title",
    "modelspec.trigger_phrase": "trigger words",
    "trigger_word": "trigger words",
    "trigger_words": "trigger words",
    "activation_text": "trigger words",
    "modelspec.architecture": "trained for",
    "ss_base_model_version": "trained for",
    "ss_sd_model_name": "trained on",
    "ss_network_module": "trained by",
    "software": "trained by",
    "ss_training_comment": "comment",
}
_TAGS = "ss_tag_frequency"


def adapter_facts(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Facts that a user looks for, as (what, value). Values are texts from the file, shortened."""
    if adapter.scale_source:
        yield "scales", adapter.scale_source
    header = adapter.metadata.get("header")
    for key, value in adapter.metadata.items():
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            yield key, _shortened(str(value))
    if isinstance(header, Mapping):
        yield from _header_facts(header)


def _header_facts(header: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown: set[tuple[str, str]] = set()
    for key, what in HEADER_FACTS.items():
        value = header.get(key)
        if isinstance(value, str) and value.strip() and (what, value) not in shown:
            shown.add((what, value))
            yield what, _shortened(value)
    if tags := _frequent_tags(header.get(_TAGS)):
        yield "most frequent tags", ", ".join(map(_shortened, tags))
    yield "header", f"{len(header)} entries ({named('as_json')} lists them)"


def _frequent_tags(recorded: Any) -> list[str]:
    """The tags of the training images by their number, over all folders of images."""
    if not isinstance(recorded, str) or len(recorded) > _LONGEST_TABLE:
        return []
    try:
        table = json.loads(recorded)
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in table.values() if isinstance(table, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int:
                counts[tag.strip()] += count
    return [tag for tag, _ in counts.most_common(_MOST_TAGS)]


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
