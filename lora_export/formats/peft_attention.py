"""The output projection of nn.MultiheadAttention as PEFT up to 0.21 trains it: it computes with W + 2·s·BA.

A merge adds the change once, and reports it (see `peft_records`). A training that goes on from such an adapter must
start from what PEFT computed.
"""

from __future__ import annotations

from dataclasses import replace

from packaging.version import InvalidVersion, Version

from lora_export.formats.peft_keys import OUT_PROJ
from lora_export.formats.peft_records import attention_note
from lora_export.lora import Adapter

ADDED_ONCE_SINCE = Version("0.22")  # no version of PEFT before this one adds it once


def as_peft_computes(adapter: Adapter) -> Adapter:
    """The adapter with twice the scale at the output projections that PEFT trained, which become layers of their own.

    A note names them. An adapter without them is returned as it is, as is one of a later PEFT.
    """
    doubled = [name for name in adapter.pairs if OUT_PROJ in adapter.spelled(name)]
    if not doubled or _adds_once(adapter):
        return adapter
    pairs = {
        name: replace(pair, scale=2 * pair.scale) if name in doubled else pair for name, pair in adapter.pairs.items()
    }
    notes = [note for note in adapter.notes if note not in map(attention_note, doubled)]
    notes += [
        f"{name}: PEFT up to 0.21 adds the output projection's change twice when it trains; it goes on with twice the "
        "scale, and is saved as a layer of its own"
        for name in doubled
    ]
    spelling = {name: key for name, key in adapter.spelling.items() if OUT_PROJ not in key}
    return replace(adapter, pairs=pairs, spelling=spelling, notes=tuple(notes))


def _adds_once(adapter: Adapter) -> bool:
    try:
        return Version(str(adapter.metadata.get("peft_version", ""))) >= ADDED_ONCE_SINCE
    except InvalidVersion:  # PEFT before 0.18 recorded none
        return False
