"""What a user states about the files of adapters, where these do not record it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_export.errors import WrongUsage
from lora_export.formats.expert_layouts import BLayout


@dataclass(frozen=True)
class ReadOptions:
    """Statements about adapters that a command reads. Raises WrongUsage for a value that does not exist."""

    moe_b_layout: str = ""  # the order of the columns of B on experts, a `BLayout`; empty: as the adapter records it

    def __post_init__(self) -> None:
        if self.moe_b_layout and self.moe_b_layout not in tuple(BLayout):
            raise WrongUsage(f"--moe-b-layout is {self.moe_b_layout!r}; it must be {' or '.join(BLayout)}")


DEFAULTS = ReadOptions()
