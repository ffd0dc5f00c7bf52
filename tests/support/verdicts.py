"""Verdicts, placements and facts of a run, for the tests of reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_export.errors import escaped_lines
from lora_export.runtime.runner import Placement
from lora_export.verification.diagnose.diagnosis import Diagnosis, LayerError
from lora_export.verification.parity import Case, Sensitivity, judge


def a_placement(
    provider: str = "CPUExecutionProvider",
    *,
    compute: int = 142,
    elsewhere: int = 0,
    options: Mapping[str, str] | None = None,
) -> Placement:
    """One shape node and `compute` nodes of matrix products, the last `elsewhere` of them on the CPU instead."""
    nodes = [(f"/layer.{number}/MatMul", "MatMul") for number in range(compute)]
    on_provider = (("/shape", "Shape"), *nodes[: compute - elsewhere])
    by_provider = {provider: on_provider}
    if elsewhere:
        by_provider["CPUExecutionProvider"] = tuple(nodes[compute - elsewhere :])
    return Placement(provider, by_provider, options or {}, "1.31.1")


ON_CPU = a_placement()
STRAYED = a_placement("CUDAExecutionProvider", elsewhere=1)

SIGN = np.where(np.arange(600) % 2, 1.0, -1.0)


def case(error: Any = 0.25, *, name: str = "2 x 300", output: str = "logits") -> Case:
    """R is 0, P is off by 1/8, the adapter's effect is 64. A candidate that is off by 1/4 is exactly at its limit."""
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
    "candidate": {"path": "out/model.onnx", "sha256": {"model.onnx": "ab" * 32, "model.onnx.data": "cd" * 32}},
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
WHY = escaped_lines("its adapter's scale, 2, is applied twice", "3 of 3 modules were compared")
DIAGNOSIS = Diagnosis("encoder.1", WHY, tuple(LayerError(**layer) for layer in LAYERS[:2]))
AS_DOCUMENT: Any = {"first": "encoder.1", "why": WHY, "layers": LAYERS}
