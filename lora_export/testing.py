"""Parity as a test of your own suite: `assert_parity` raises with the screen that `lora-export verify` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from lora_export.api.adapted_model import adapted_model
from lora_export.api.load import load_adapters
from lora_export.api.load_model import resolve_model
from lora_export.api.verify import Verification, verify
from lora_export.callbacks import ignore
from lora_export.errors import WrongUsage
from lora_export.options.combining import AdapterSources, Applied, Combination, TiedEmbeddings
from lora_export.options.common import ModelSource
from lora_export.options.proof import ProviderName, Running
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.options.verify import runs_in_ci
from lora_export.report.verdict_screen import screen
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
    weights: Sequence[float] = (),
    prefixes: Mapping[str, str] | None = None,
    reading: ReadOptions = DEFAULTS,
    combination: str | Combination = "cat",
    tied: TiedEmbeddings = Applied.tied,
    layout: Mapping[str, str] | None = None,
    provider: ProviderName = Running.provider,
    inputs: File | None = None,
    input_seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    onnx_adapter: File | None = None,
    adapter_id: int | None = None,
    cache: File | None = None,
    fixed: Mapping[str, int] | None = None,
    strict: bool | None = None,
) -> Proof:
    """Raise ParityFailed unless the candidate computes what the model computes with its adapters attached.

    `candidate` is a file as `lora-export verify` takes it, an nn.Module or a runner. `model` is a Hugging Face folder,
    `file.py:factory`, a .pt2, or `(module, example_inputs)`. The other arguments are those of `lora_export.verify`,
    which judges files. With `strict`, a part of the candidate that was not judged fails too; the default is that of the
    command line: where CI=true.

    Returns the proof. Raises InputRefused for inputs that cannot be used, EnvironmentLacking for a provider that does
    not do the work, and WrongUsage for arguments that do not go together: none is a verdict on the candidate.
    """
    __tracebackhide__ = True
    of_files = [
        named(name) for name, value in (("onnx_adapter", onnx_adapter), ("adapter_id", adapter_id)) if value is not None
    ]
    if of_files and not isinstance(candidate, str | Path):
        raise WrongUsage(f"{' and '.join(of_files)}: the candidate is no file. Give a runner that has the adapter")
    if isinstance(candidate, str | Path):
        proof = _proof_of_file(
            verify(
                candidate,
                model,
                adapters=adapters,
                weights=weights,
                prefixes=prefixes,
                reading=reading,
                combination=combination,
                tied=tied,
                layout=layout,
                provider=provider,
                inputs=inputs,
                input_seed=input_seed,
                atol=atol,
                rtol=rtol,
                onnx_adapter=onnx_adapter,
                adapter_id=adapter_id,
                cache=cache,
                fixed=fixed,
            )
        )
    else:
        loaded = load_adapters(adapters, prefixes, reading=reading.for_base(model))
        applied = Applied(combination=combination, tied=tied, layout=layout)
        adapted = adapted_model(resolve_model(model, loaded), loaded, weights, applied, ignore)
        references = PyTorchReferences(
            adapted.model,
            adapted.adapters,
            adapted.strengths,
            seed=input_seed,
            user_inputs=None if inputs is None else Path(inputs),
            device=provider,
            cache=None if cache is None else Path(cache),
            fixed=fixed or {},
        )
        runner = ModuleRunner(candidate) if isinstance(candidate, nn.Module) else candidate
        proof = prove(runner, references, atol=atol, rtol=rtol)
    proof = proof.strictly() if (runs_in_ci() if strict is None else strict) else proof
    if not proof.verdict:
        raise ParityFailed(proof)
    return proof


def _proof_of_file(result: Verification) -> Proof:
    if result.error is not None:
        raise result.error
    assert isinstance(result.proof, Proof)
    return result.proof
