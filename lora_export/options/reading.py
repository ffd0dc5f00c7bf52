"""What a user states about the files of adapters, where these do not record it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.declaring import Only, Option, Options, Section, declares, option, table_of
from lora_export.options.spelling import command, named

PipelineComponent = Literal["unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"]
ColumnOrder = Literal["rank_major", "grouped_by_expert"]


def _parts(digits: str) -> tuple[bool, ...]:
    return tuple({"0": False, "1": True}[digit] for digit in digits.split(","))


@dataclass(frozen=True, kw_only=True)
class AllowPickle(Options):
    """Whether a command reads pickles."""

    allow_pickle: bool = option(
        False,
        "Also read pickles of PyTorch (.bin, .pt, .pth), by torch.load with weights_only=True.",
        section=Section.READING,
    )


@dataclass(frozen=True, kw_only=True)
class ReadOptions(AllowPickle):
    """Statements about adapters that a command reads. Raises WrongUsage for a value that does not exist."""

    SECTION: ClassVar[Section] = Section.READING

    format: str = option(
        "",
        "Format of the adapters, where several formats fit. `lora-export guide adapters` lists them.",
        metavar="NAME",
    )
    lora_rank: int | None = option(None, "Rank, for formats that do not record it.", metavar="R", at_least=1)
    lora_alpha: float | None = option(None, "Alpha, for formats that do not record it.", metavar="ALPHA", above=0)
    enable_lora: Mapping[str, tuple[bool, ...]] = field(
        default_factory=dict,
        metadata=declares(
            Option(
                "Parts of a fused layer that have a pair, for loralib's MergedLinear. NAME ends the layer's name.",
                metavar="NAME=1,0,1",
                read=table_of("NAME=1,0,1", _parts, at_last=True),
                only=(Only("loralib", ("some",), words="adapters of loralib, and none here is one"),),
            )
        ),
    )
    base_config: Path | None = option(
        None,
        "config.json of the model that the adapters were trained on, or its folder, for formats that need it. Not "
        "needed where the command has the base, or the adapter a config.json beside it.",
        metavar="PATH",
    )
    component: PipelineComponent | Literal[""] = option(
        "", "Use only the changes of this model, of an adapter for several models of a diffusion pipeline."
    )
    stored_adapter: str = option(
        "",
        "Name of the adapter that is read of a file with several, or of a model with one for each task.",
        metavar="ADAPTER",
    )
    moe_b_layout: ColumnOrder | Literal[""] = option(
        "",
        "Order of the columns of B in an adapter of experts, where the adapter does not record it. Unsloth before "
        "2026.9.6 wrote grouped_by_expert, PEFT writes rank_major.",
        only=(Only("experts", ("some",), words="experts in one parameter, and no adapter here has them"),),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, parts in self.enable_lora.items():
            if len(parts) < 2 or not any(parts):
                raise WrongUsage(
                    f"{named('enable_lora', name)}: a fused layer has two parts or more, and one is enabled"
                )

    def for_base(self, base: object) -> "ReadOptions":
        """The same, with the base that a command has, where it is a path and none is stated."""
        if self.base_config is not None or not isinstance(base, str | Path):
            return self
        return replace(self, base_config=base if isinstance(base, Path) else Path(base))

    @property
    def recorded(self) -> dict[str, Any]:
        """What decides how a file is read, for a record. Whether pickles are read is left to each command."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in ("allow_pickle", "base_config")}

    def enabled_parts_of(self, module: str) -> tuple[bool, ...]:
        """The parts of a fused layer that have a pair; empty where nothing is stated about the module."""
        return next((parts for name, parts in self.enable_lora.items() if f".{module}".endswith(f".{name}")), ())

    def refuse_rank_and_alpha(self, recorded_in: str) -> None:
        """Raise InputRefused where rank or alpha are stated for an adapter that records them."""
        for name in ("lora_rank", "lora_alpha"):
            if getattr(self, name) is not None:
                raise InputRefused(
                    f"{named(name)} is for adapters that do not record it; this one does, in {recorded_in}. Where "
                    f"another one needs it, convert that one first: {command('convert', to='peft')}"
                )


DEFAULTS = ReadOptions()
