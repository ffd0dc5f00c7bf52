"""Parity as a test of your own suite: `assert_parity` raises with the screen that `lora-export verify` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import formats, report
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.models.factory import from_module
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.runtime.open_artifact import open_candidate
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove

File = str | Path


class ParityFailed(AssertionError):
    """`different`, or `undecided`: a test that could not have failed has not passed. `proof` holds every figure."""

    def __init__(self, proof: Proof):
        self.proof = proof
        super().__init__(report.screen(proof.verdict, proof.placement, proof.diagnosis))


def assert_parity(
    candidate: File | nn.Module | Runner,
    model: File | Model | tuple[nn.Module, Any],
    adapters: File | Adapter | Sequence[File | Adapter] = (),
    *,
    strengths: Sequence[float] | None = None,
    provider: str = "cpu",
    inputs: File | None = None,
    seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    onnx_adapter: File | None = None,
    adapter_id: int | None = None,
    cache: File | None = None,
) -> Proof:
    """Raise ParityFailed unless the candidate computes what the model computes with its adapters attached.

    `candidate` is a file as `lora-export verify` takes it, or a module in memory; `model` a Hugging Face folder,
    `file.py:factory`, a .pt2, or a module with its example inputs. `inputs` is an .npz to check on too; `cache` a
    folder where the reference's answers are kept from run to run. Everything else is as in the command.
    Returns the proof.
    Raises what the command ends with for inputs that are refused (InputRefused) and for a provider that does not
    do the work (EnvironmentLacking): neither says anything about the candidate.
    """
    __tracebackhide__ = True
    given = [adapters] if isinstance(adapters, str | Path | Adapter) else adapters
    loaded = [each if isinstance(each, Adapter) else formats.load(Path(each)) for each in given]
    base = _model(model, loaded)
    references = PyTorchReferences(
        base,
        loaded,
        strengths,
        seed=seed,
        user_inputs=None if inputs is None else Path(inputs),
        device=provider,
        cache=None if cache is None else Path(cache),
    )
    runner = _runner(candidate, base, provider, onnx_adapter, adapter_id)
    proof = prove(runner, references, atol=atol, rtol=rtol)
    if not proof.verdict:
        raise ParityFailed(proof)
    return proof


def _model(model: File | Model | tuple[nn.Module, Any], adapters: Sequence[Adapter]) -> Model:
    if isinstance(model, Model):
        return model
    if isinstance(model, tuple):
        return from_module(*model)
    return load_model(str(model), adapters)


def _runner(
    candidate: File | nn.Module | Runner, base: Model, provider: str, onnx_adapter: File | None, adapter_id: int | None
) -> Runner:
    if isinstance(candidate, nn.Module):
        return ModuleRunner(candidate)
    if not isinstance(candidate, str | Path):
        return candidate
    if not Path(candidate).exists():
        raise InputRefused(f"there is no candidate at {candidate}")
    own = None if onnx_adapter is None else Path(onnx_adapter)
    return open_candidate(Path(candidate), base, provider=provider, onnx_adapter=own, adapter_id=adapter_id)
