"""What a user states about the files of adapters, where these do not record it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats.expert_layouts import BLayout
from lora_export.options.spelling import command, named
from lora_export.plan.diffusion.components import COMPONENT_OPTIONS


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Statements about adapters that a command reads. Raises WrongUsage for a value that does not exist."""

    format: str = ""  # a key of `formats.FORMATS`, where several formats recognise an adapter
    allow_pickle: bool = False  # also read pickles of PyTorch, by `torch.load` with weights_only=True
    lora_rank: int | None = None  # for formats that do not record it
    lora_alpha: float | None = None  # for formats that do not record it
    enable_lora: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)  # end of a module's name -> its parts
    base_config: Path | None = None  # the base's config.json or its folder: it has what some formats do not record
    component: str = ""  # the only model of a diffusion pipeline whose changes are used: a key of COMPONENT_OPTIONS
    moe_b_layout: str = ""  # the order of the columns of B on experts, a `BLayout`; empty: as the adapter records it

    def __post_init__(self) -> None:
        if self.moe_b_layout and self.moe_b_layout not in tuple(BLayout):
            raise WrongUsage(f"{named('moe_b_layout')} is {self.moe_b_layout!r}; it must be {' or '.join(BLayout)}")
        if self.component and self.component not in COMPONENT_OPTIONS:
            raise WrongUsage(
                f"{named('component')} is {self.component!r}; it must be one of {', '.join(COMPONENT_OPTIONS)}"
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise WrongUsage(f"{named('lora_rank')} is {self.lora_rank}; it must be at least 1")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise WrongUsage(f"{named('lora_alpha')} is {self.lora_alpha}; it must be a positive number")

        for name, parts in self.enable_lora.items():
            if len(parts) < 2 or not any(parts):
                raise WrongUsage(
                    f"{named('enable_lora')} {name}: a fused layer has two parts or more, and one is enabled"
                )

    def for_base(self, base: object) -> ReadOptions:
        """The same, with the base that a command has, where it is a path and none is stated."""
        if self.base_config is not None or not isinstance(base, str | Path):
            return self
        return replace(self, base_config=Path(base))

    @property
    def recorded(self) -> dict[str, Any]:
        """What decides how a file is read, for a record. Whether pickles are read is left to each command."""
        return {key: value for key, value in asdict(self).items() if key not in ("allow_pickle", "base_config")}

    def enabled_parts_of(self, module: str) -> tuple[bool, ...]:
        """The parts of a fused layer that have a pair; empty where nothing is stated about the module."""
        return next((parts for name, parts in self.enable_lora.items() if f".{module}".endswith(f".{name}")), ())

    def refuse_rank_and_alpha(self, recorded_in: str) -> None:
        """Raise InputRefused where rank or alpha are stated for an adapter that records them."""
        stated = (("lora_rank", self.lora_rank), ("lora_alpha", self.lora_alpha))
        for option, value in stated:
            if value is not None:
                raise InputRefused(
                    f"{named(option)} is for adapters that do not record it; this one does, in {recorded_in}. Where "
                    f"another one needs it, convert that one first: {command('convert', to='peft')}"
                )


DEFAULTS = ReadOptions()
