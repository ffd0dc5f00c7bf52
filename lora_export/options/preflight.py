"""The options of `check`, and the runtimes that it knows: those that have a file of rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import WrongUsage
from lora_export.options.combining import AdapterSource
from lora_export.options.common import Download
from lora_export.options.declaring import Option, Positional, declares, nested, option, table_of
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named

RUNTIMES = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "preflight" / "runtimes").glob("*.toml")))


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Download):
    """What `check` takes."""

    adapter: AdapterSource = field(
        kw_only=False, metadata=declares(Positional(metavar="[NAME=]ADAPTER", kind="source", multiple=False))
    )
    runtimes: Sequence[str] = option(
        (), "Runtime that is to run the adapter. May be repeated.", flags=("--for",), choices=RUNTIMES
    )
    base: str | Path | None = option(
        None,
        "Model that the adapter was trained on. Without it, only what the adapter itself shows is checked.",
        metavar="CHECKPOINT",
    )
    settings: Mapping[str, float] = field(
        default_factory=dict,
        metadata=declares(
            Option(
                "What the runtime is started with, where a rule depends on it: max-lora-rank=64.",
                flags=("--with",),
                metavar="NAME=NUMBER",
                read=table_of("NAME=NUMBER", float),
            )
        ),
    )
    reading: ReadOptions = nested(ReadOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runtimes:
            raise WrongUsage(f"{named('runtimes')} has to name a runtime: {', '.join(RUNTIMES)}")
