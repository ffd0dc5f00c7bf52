"""What several tests share: verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_export.verification.parity import Case, Sensitivity, judge


@dataclass(frozen=True)
class Placed:
    """As `runtime.Placement`, without onnxruntime."""

    requested_provider: str = "CPUExecutionProvider"
    by_provider: Mapping[str, tuple[tuple[str, str], ...]] = field(
        default_factory=lambda: {"CPUExecutionProvider": (("/a", "MatMul"), ("/b", "Shape"))}
    )
    compute_nodes: int = 142
    off_provider: tuple[tuple[str, str, str], ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    version: str = "1.31.1"


STRAYED = Placed("CUDAExecutionProvider", off_provider=(("CPUExecutionProvider", "/layer.3/MatMul", "MatMul"),))

SIGN = np.where(np.arange(600) % 2, 1.0, -1.0)


def case(error: Any = 0.25, *, name: str = "2 x 300", output: str = "logits") -> Case:
    """R is 0, P is off by 1/8, the adapter does 64: a candidate off by 1/4 is at its very limit."""
    zero = np.zeros((2, 300))
    sign = SIGN.reshape(2, 300)
    return Case(
        name,
        "ids int64 [2, 300]",
        reference={output: zero},
        deployed={output: np.full_like(zero, 0.125, np.float32)},
        candidate={output: np.asarray(sign * error, np.float32)},
        base={output: 64 * sign},
        scaled={output: 6.4 * sign},
    )


TRIED = (Sensitivity("ids", True, True),)

SAME = judge([case(), case(name="1 x 600")], sensitivity=TRIED)

DIFFERENT = judge([case(), case(1.0, name="bad")], sensitivity=[*TRIED, Sensitivity("mask", True, False)])

UNDECIDED = judge([case()], atol=65.0)

NOTHING = judge([])


ABOUT = {
    "candidate": {"path": "model.onnx", "sha256": {"model.onnx": "ab" * 32, "model.onnx.data": "cd" * 32}},
    "model": {"source": "models/base", "sha256": "ef" * 32},
    "adapters": [{"name": "english", "format": "peft", "sha256": "12" * 32, "weight": 0.5}],
    "seed": 3,
    "inputs": {"2 x 300": {"ids": [2, 300]}},
    "command": ["lora-export", "verify", "model.onnx", "--report", "a name.html"],
    "created": "2026-01-02 03:04 UTC",
    "torch": "2.13.0",
    "tf32": False,
    "gpu": None,
}

LAYERS = [
    {"name": "encoder.0", "error": 1e-7, "deployed_error": 1e-7, "effect": 0.0},
    {"name": "encoder.1", "error": 0.01, "deployed_error": 1e-7, "effect": 0.1},
    {"name": "head", "error": None, "deployed_error": None, "effect": None},
]

DIAGNOSIS = {"first": "encoder.1", "why": "1.1 times the adapter's change fits\nas a scale would", "layers": LAYERS}
