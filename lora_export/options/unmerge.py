"""The options of `unmerge`."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_export.options.combining import AdapterSources
from lora_export.options.common import Output, written
from lora_export.options.declaring import Option, argument, declares
from lora_export.options.reading import AllowPickle


@dataclass(frozen=True, kw_only=True)
class UnmergeOptions(AllowPickle, Output):
    """What `unmerge` takes."""

    merged: str | Path = field(kw_only=False, metadata=argument("MERGED", kind="path"))
    adapters: AdapterSources = field(
        kw_only=False,
        metadata=argument(metavar="[ADAPTER]...", kind="source", multiple=True, optional=True),
    )
    output: str | Path = field(kw_only=False, metadata=written("Folder or file for the base."))
    base_from: str | Path = field(
        metadata=declares(Option("File that `merge --keep-residual` wrote.", metavar="RESIDUAL", kind="path"))
    )
