"""How a training runs, whatever it trains."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from lora_export.errors import InputRefused
from lora_export.training.schedule import SCHEDULES

Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of the loop and of its optimiser, AdamW. Raises InputRefused for impossible ones."""

    epochs: int
    learning_rate: float  # the highest of all steps
    batch_size: int  # examples of one step, of all processes together
    seed: int
    accumulate: int = 1  # parts of a step's examples that a process computes one after the other
    schedule: str = "linear"
    warmup: float = 0.1  # part of all steps, from 0 to below 1
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0  # gradients are clipped to it
    b_ratio: float = 1.0  # the learning rate of B divided by that of A (LoRA+, Hayou et al. 2024)
    precision: Precision = "no"  # of autocast
    gradient_checkpointing: bool = False  # compute activations again in the backward pass, and do not store them
    compile: bool = False  # compute the steps with torch.compile
    evaluate_every: int = 0  # steps; 0: at the end of each epoch, where an evaluation is needed
    patience: int = 0  # evaluations without a lower loss, after which training stops; 0: never
    keep_best: bool = False  # end with the parameters of the lowest held-out loss
    save_every: int = 100  # steps between checkpoints

    def __post_init__(self) -> None:
        problems = [
            f"{name.replace('_', ' ')} {getattr(self, name)}"
            for name in ("epochs", "learning_rate", "batch_size", "accumulate", "max_gradient_norm", "b_ratio")
            if not 0 < getattr(self, name) < math.inf
        ]
        problems += [f"warm-up {self.warmup}"] if not 0 <= self.warmup < 1 else []
        problems += [f"weight decay {self.weight_decay}"] if not 0 <= self.weight_decay < math.inf else []
        problems += [f"schedule {self.schedule}"] if self.schedule not in SCHEDULES else []
        if problems:
            raise InputRefused(
                f"{', '.join(problems)}: rates and counts must be positive, and a warm-up from 0 to below 1"
            )

    @property
    def evaluates(self) -> bool:
        """Whether held-out examples are measured during training."""
        return bool(self.evaluate_every or self.patience or self.keep_best)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a manifest contains. How often a checkpoint is written changes no result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "save_every"}
