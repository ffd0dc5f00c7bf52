"""An adapter, a plan and a merge report, for the tests of reports."""

from __future__ import annotations

import numpy as np

from lora_export import plan
from lora_export.lora import Adapter, LoraPair
from lora_export.weights.merge_report import MergeReport, StepResult

ADAPTER = Adapter(
    name="english",
    format="peft",
    pairs={
        "q": LoraPair(a=np.array([[3.0, 0.0, 4.0]]), b=np.array([[1.0], [2.0]]), scale=2.0),
        "v": LoraPair(a=np.eye(2), b=np.eye(2), scale=0.5, magnitude=np.ones(2)),
    },
    replaced={"score.weight": np.ones((10, 384), np.float32)},
    biases={"k": np.ones(2, np.float32)},
    notes=("rsLoRA: the scale is alpha/√r",),
)


def a_plan() -> plan.Plan:
    pair = LoraPair(a=np.ones((1, 3)), b=np.ones((2, 1)), scale=2.0)
    spec = plan.TensorSpec("q.weight", (2, 3), "float32", plan.Layout.OUT_IN)
    return plan.make([Adapter("english", "peft", {"q": pair})], [spec])


def a_result(weight: str, retention: float = 1.0, relative_change: float = 0.0123) -> StepResult:
    return StepResult(weight, relative_change, retention, noise=0.02, changed=9, elements=10)


def a_merge_report(*results: StepResult, replaced: tuple[str, ...] = ()) -> MergeReport:
    return MergeReport(results, copied=80_200_000, bytes=88_100_000, replaced_weights=replaced, seconds=0.25)
