"""Parity as a test of your own suite: `assert_parity` raises with the screen that `lora-export verify` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from lora_export.api.adapted_model import adapted_model
from lora_export.api.load import load_adapters, resolve_model
from lora_export.artifacts.artifact import open_artifact
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused
from lora_export.models.model import Model
from lora_export.options.combining import AdapterSources, Applied, Combination, TiedEmbeddings
from lora_export.options.common import ModelSource, Running
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.report.verdict_screen import screen
from lora_export.runtime.open_artifact import HowToOpen, open_candidate
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove

File = str | Path


class ParityFailed(AssertionError):
    """The verdict is `different`, or `undecided`: a test that could not fail did not pass. `proof` has every figure."""

    def __init__(self, proof: Proof):
        self.proof = proof
        super().__init__(screen(proof))


def assert_parity(
    candidate: File | nn.Module | Runner,
    model: ModelSource,
    adapters: AdapterSources = (),
    *,
    strengths: Sequence[float] | None = None,
    prefixes: Mapping[str, str] | None = None,
    reading: ReadOptions = DEFAULTS,
    combination: str | Combination = "cat",
    tied: TiedEmbeddings = Applied.tied,
    provider: str = Running.provider,
    inputs: File | None = None,
    seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    onnx_adapter: File | None = None,
    adapter_id: int | None = None,
    cache: File | None = None,
    fixed: Mapping[str, int] | None = None,
    strict: bool = False,
) -> Proof:
    """Raise ParityFailed unless the candidate computes what the model computes with its adapters attached.

    `candidate` is a file as `lora-export verify` takes it, an nn.Module or a runner. `model` is a Hugging Face folder,
    `file.py:factory`, a .pt2, or `(module, example_inputs)`. `inputs` is an .npz of further inputs. `cache` is a folder
    for the outputs of the fp64 reference. `fixed` are sizes of axes that the candidate was made for on purpose. With
    `strict`, a part of the candidate that was not judged fails too. The other arguments are those of
    `lora_export.verify`, where `strengths` are its `weights`.

    Returns the proof. Raises InputRefused for inputs that cannot be used, and EnvironmentLacking for a provider that
    does not do the work: neither is a verdict on the candidate.
    """
    __tracebackhide__ = True
    loaded = load_adapters(adapters, prefixes, reading=reading.for_base(model))
    base = resolve_model(model, loaded)
    adapted = adapted_model(base, loaded, strengths or (), Applied(combination=combination, tied=tied), ignore)
    base = adapted.model
    references = PyTorchReferences(
        base,
        adapted.adapters,
        adapted.strengths,
        seed=seed,
        user_inputs=None if inputs is None else Path(inputs),
        device=provider,
        cache=None if cache is None else Path(cache),
        fixed=fixed or {},
    )
    runner = _runner(candidate, base, provider, onnx_adapter, adapter_id)
    proof = prove(runner, references, atol=atol, rtol=rtol)
    proof = proof.strictly() if strict else proof
    if not proof.verdict:
        raise ParityFailed(proof)
    return proof


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
    return open_candidate(open_artifact(candidate), HowToOpen(base, provider, own, adapter_id))
