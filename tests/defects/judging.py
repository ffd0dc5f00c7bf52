"""The verdicts on a candidate: ours, and those of other tools on the same outputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from defects import other_tools, subjects
from defects.seeded_defects import Defect
from defects.subjects import Column
from lora_export.errors import EnvironmentLacking, LoraExportError
from lora_export.lora import Adapter
from lora_export.runtime.runner import Runner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.inputs import Inputs
from lora_export.verification.proof import Proof, prove


@dataclass(frozen=True)
class Judged:
    verdict: str  # same, different, undecided, or `refused` with the exit code
    passed_by: frozenset[str] = frozenset()  # other tools
    proof: Proof | None = field(default=None, repr=False)


class Undiagnosed(PyTorchReferences):
    """Where a difference comes from takes as long to find as the verdict, and other tests read it."""

    def prepare(self, candidate: Runner, inputs: Inputs) -> Any:
        prepared: Any = super().prepare(candidate, inputs)
        object.__setattr__(prepared, "diagnose", lambda *_, **__: (None, []))
        return prepared


def judged(runner: Runner, column: Column, adapter: Adapter, *, seed: int = 0) -> Judged:
    """Our verdict on a candidate, and those of other tools on the same outputs."""
    try:
        result = prove(runner, Undiagnosed(column.base, [adapter], seed=seed, cache=subjects.folder() / "cache"))
    except EnvironmentLacking as refusal:
        others: Any = runner
        others.placement = dataclasses.replace(others.placement, requested_provider="CPUExecutionProvider")
        return Judged(f"refused {refusal.exit_code}", judged(others, column, adapter).passed_by)
    except LoraExportError as refusal:
        return Judged(f"refused {refusal.exit_code}")
    return Judged(str(result.verdict.outcome), _passed_by(result), result)


def judged_defect(defect: Defect, column: Column) -> Judged | None:
    """None where the column has nothing that the defect could break."""
    try:
        runner = defect.make(column)
    except LoraExportError as refusal:
        return Judged(f"refused {refusal.exit_code}")
    return None if runner is None else judged(runner, column, defect.adapter(column))


def _passed_by(result: Proof) -> frozenset[str]:
    cases = [case for case in result.cases if not case.name.endswith("run again")]
    return frozenset(
        name
        for name, accepts in other_tools.present()
        if all(case.candidate and accepts(case.deployed, case.candidate) for case in cases)
    )


def limit_used(result: Proof) -> float:
    """How near to failing the verdict came."""
    return max((figures.limit_used for _, figures in result.verdict.measured), default=0.0)


SAME = str(parity.Outcome.SAME)
