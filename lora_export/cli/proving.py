"""What `onnx`, `torchscript` and `verify` have in common around a proof."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export import report
from lora_export.api.load import split_name
from lora_export.cli.arguments import say
from lora_export.errors import Different, EnvironmentLacking, LoraExportError, Undecided
from lora_export.lora import Adapter
from lora_export.provenance import record
from lora_export.report import github
from lora_export.runtime import environment, providers
from lora_export.runtime.runner import Placement
from lora_export.verification.parity import Outcome, Reason, Verdict
from lora_export.verification.proof import Proof

if TYPE_CHECKING:
    from lora_export.models.model import Model


def inputs_of(model: str, adapters: Sequence[str]) -> list[Path]:
    """The places that an output must keep away from."""
    places = [Path(model)] if Path(model).exists() else []
    if ".py:" in model:
        places.append(Path(model.rpartition(":")[0]))
    return places + [split_name(adapter)[1] for adapter in adapters]


def provenance(
    base: Model, adapters: Sequence[Adapter], strengths: Sequence[float], settings: dict[str, Any]
) -> dict[str, Any]:
    """Where an exported file comes from, by hashes."""
    fingerprint = {"sha256": base.fingerprint()}
    return record(adapters, strengths or (1.0,) * len(adapters), fingerprint, (), settings)


def summary(proof: Proof | None) -> dict[str, Any]:
    """The verdict as it is kept in the file itself."""
    if proof is None:
        return {"outcome": "not verified", "why": "--no-verify"}
    measured = [comparison.figures for comparison in proof.verdict.comparisons if comparison.figures]
    shares = [figures.relative_to_effect for figures in measured if figures.relative_to_effect]
    against = {"against": proof.about["against"]} if "against" in proof.about else {}
    return {
        "outcome": str(proof.verdict.outcome),
        **against,
        "provider": proof.placement.requested_provider if proof.placement else "PyTorch",
        "error_relative_to_effect": max(shares, default=None),
        "versions": {name: proof.about[name] for name in ("torch", "onnxruntime") if name in proof.about},
        "variables": {name: proof.about[name] for name in providers.VARIABLES if name in proof.about},
    }


def require(provider: str) -> None:
    """Raise EnvironmentLacking where the asked provider cannot run as a proof needs it: told before the work."""
    if provider == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise EnvironmentLacking(
            "NVIDIA_TF32_OVERRIDE=1 turns TF32 on in every CUDA library, whatever is asked for, and a proof in float32 "
            "asks for float32; unset it"
        )
    if provider == "cuda" and (fault := environment.try_provider(providers.CUDA).fault):
        raise EnvironmentLacking(
            f"{providers.CUDA} does not run here: {fault}. `lora-export doctor --provider cuda` says how to get it"
        )


def telling(stage: Callable[[str], None], what: str = "") -> Callable[[str], None]:
    """What tells the steps of a proof, of a file or of `what` in it."""
    return lambda step: stage(f"verifying {what}, {step}" if what else f"verifying, {step}")


def demanded(proof: Proof, what: str = "") -> Proof:
    """The proof, if it is one. Raises what its verdict means otherwise."""
    if proof.verdict.same:
        return proof
    kind = Different if proof.verdict.outcome is Outcome.DIFFERENT else Undecided
    told = f"{what}: {proof.verdict}" if what else str(proof.verdict)
    if proof.diagnosis:
        told += f"\n{proof.diagnosis}"
    raise kind(f"{told}\nNothing was written; --no-verify would publish it all the same.")


def without_figures(error: LoraExportError, placement: Placement | None = None) -> Proof:
    """What ended a proof before anything was measured, as a proof that says so."""
    from lora_export.runtime.torch_runners import describe_environment

    outcome = Outcome.DIFFERENT if isinstance(error, Different) else Outcome.UNDECIDED
    gate = "placement" if isinstance(error, EnvironmentLacking) else "structure"
    verdict = Verdict(outcome, (Reason(outcome, gate, str(error)),), comparisons=(), sensitivity=(), dtype="float32")
    return Proof(verdict, placement, describe_environment(), ended_with=error.exit_code)


def document(proof: Proof | None) -> dict[str, Any] | None:
    """The proof as JSON; None where none was asked for."""
    if proof is None:
        return None
    return report.document(
        proof.verdict, proof.placement, proof.about, diagnosis=proof.diagnosis, exit_code=proof.exit_code
    )


def show(proof: Proof | None) -> None:
    """The verdict on stdout, in one screen."""
    if proof is None:
        click.echo("not verified (--no-verify)")
    else:
        report.print_verdict(report.console(), proof.verdict, proof.placement, proof.diagnosis)


def tell_github(proof: Proof, title: str) -> None:
    """Annotations for the runner, and a summary for the run's page, where this is a step of a GitHub workflow."""
    if "GITHUB_ACTIONS" not in os.environ:
        return
    for line in github.workflow_commands(proof.verdict, title, proof.diagnosis):
        click.echo(line, err=True)
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(page).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(github.summary(proof.verdict, proof.placement, proof.about, proof.diagnosis, title=title))
        except OSError as error:
            say(f"the run's page was not written: {error}")
