"""Models and adapters for the tests of `lora_export.api`, and a recorder of its callbacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from lora_export.callbacks import Progress
from lora_export.models.load import load_model
from support import FACTORIES
from support.handmade import peft_adapter

MODEL = f"{FACTORIES}:scaled"  # one linear layer, `dense`, of 8 by 8
A = np.arange(-8, 8).reshape(2, 8) / 16
B = np.arange(-8, 8)[::-1].reshape(8, 2) / 16


@dataclass
class Recorder:
    """Callbacks that record what they receive."""

    messages: list[str] = field(default_factory=list)
    events: list[Progress] = field(default_factory=list)

    @property
    def callbacks(self) -> dict[str, Any]:
        return {"on_message": self.messages.append, "on_progress": self.events.append}

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(event.stage for event in self.events))


def an_adapter(folder: Path, scale: float = 1.0) -> Path:
    """A PEFT folder with one pair for `dense`."""
    return peft_adapter(folder, {"dense": (A, scale * B)})


def base_weights(path: Path) -> Path:
    """The weights of MODEL as a .safetensors file."""
    save_file(load_model(MODEL).module.state_dict(), path)
    return path
