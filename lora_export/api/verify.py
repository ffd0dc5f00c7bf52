"""`lora_export.verify`: does a file compute what the PyTorch model computes, or contain what a merge should?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.adapters.combination import Combination
from lora_export.api.application import Application
from lora_export.api.callbacks import OnMessage, OnProgress, ignore
from lora_export.api.load import (
    AdapterSources,
    ModelSource,
    adapter_paths,
    load_adapters,
    locate_adapters,
    locate_model,
    model_paths,
    refuse_weights_alone,
)
from lora_export.api.verify_outputs import judge_outputs
from lora_export.api.verify_pipeline import audit_pipeline
from lora_export.api.verify_record import HowToRun
from lora_export.api.verify_weights import judge_weights
from lora_export.errors import LoraExportError, WrongUsage
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.provenance import adapter_records
from lora_export.report.json_document import document_of_proof
from lora_export.report.verdict_screen import screen
from lora_export.report.write import check_report_path, write_report
from lora_export.runtime.encoder_decoder_files import is_encoder_decoder_folder, refuse_missing_graph
from lora_export.runtime.expectations import NOTHING_EXPECTED, Expectations, refuse_unexpected
from lora_export.runtime.runner import TIMEOUT
from lora_export.storage.hashes import file_sha256
from lora_export.storage.hub_cache import locate
from lora_export.verification.against_checkpoint import Audit
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.pipeline import is_pipeline

if TYPE_CHECKING:
    from lora_export.verification.proof import Proof


@dataclass(frozen=True, eq=False)
class Verification:
    """A verdict, and the facts that it takes to trust and to repeat it. True only where the verdict is `same`."""

    proof: Proof | Audit  # of what a model computes; or, against a base checkpoint, of its weights

    @property
    def verdict(self) -> Any:
        """The verdict: `same`, `different` or `undecided` is its `outcome`."""
        return self.proof.verdict

    @property
    def about(self) -> Mapping[str, Any]:
        """Versions, hashes, seed, inputs."""
        return self.proof.about

    @property
    def seconds(self) -> float:
        """How long the whole run took."""
        return self.proof.seconds

    @property
    def error(self) -> LoraExportError | None:
        """What ended the proof before anything was measured."""
        return self.proof.error

    @property
    def exit_code(self) -> int:
        return self.proof.exit_code

    def __bool__(self) -> bool:
        return bool(self.verdict)

    def __str__(self) -> str:
        return screen(self.proof)

    def as_document(self) -> dict[str, Any]:
        """Every figure, as the JSON document that `lora-export verify --json` prints."""
        return document_of_proof(self.proof)

    def write_report(self, path: str | Path) -> None:
        """Write a report: .json (every figure), .xml (JUnit) or .html (to read). An existing file is replaced."""
        write_report(Path(path), self.proof)


def verify(
    candidate: str | Path,
    model: ModelSource | None = None,
    *,
    adapters: AdapterSources = (),
    weights: Sequence[float] = (),
    base: str | Path | None = None,
    layout: Mapping[str, str] | None = None,
    prefixes: Mapping[str, str] | None = None,
    reading: ReadOptions = DEFAULTS,
    combination: str | Combination = "cat",
    tied: str = "error",
    onnx_adapter: str | Path | None = None,
    adapter_id: int | None = None,
    provider: str = "cpu",
    dtype: str = "float32",
    inputs: str | Path | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    seed: int | None = None,
    cache: str | Path | None = None,
    trace: bool = False,
    timeout: float = TIMEOUT,
    fixed: Mapping[str, int] | None = None,
    expected: Expectations = NOTHING_EXPECTED,
    strict: bool = False,
    reports: Sequence[str | Path] = (),
    about: Mapping[str, Any] | None = None,
    download: bool = False,
    on_message: OnMessage = ignore,
    on_progress: OnProgress = ignore,
) -> Verification:
    """Prove that a file computes what a PyTorch model with its adapters attached computes.

    `candidate` is an .onnx, a TorchScript .pt, a .pt2, a merged Hugging Face folder or a merged .safetensors file.
    `model` is a Hugging Face folder, `package.module:factory`, `file.py:factory`, a .pt2, or `(module, inputs)`.
    Without a model, `base` is a checkpoint: nothing is run, and every tensor of a merged folder or file is compared
    with W + s·BA in fp64; PyTorch is not needed. A merged diffusion pipeline is compared with
    the base's folder. `layout` states how its square matrices are stored, as for `merge`; a weight whose layout is
    unknown is `undecided`. Beside a model, `base` is the quantised .onnx that an .onnx candidate
    was made from.

    `weights` has one factor for each adapter. `prefixes` (FROM -> TO) replaces the beginnings of names in the adapters,
    as for `merge`; so are `reading`, `combination` and `tied`. `onnx_adapter` is the adapter file to run a graph of
    `--lora inputs` with; `adapter_id` the adapter of all rows of a graph of `--lora rows` (0: the base), where None
    proves the base, every adapter and mixed batches. `provider` is "cpu" or "cuda". `dtype` is the precision of the
    model, "float32", "float16" or "bfloat16". `inputs` is an .npz of further inputs; `seed` is that of the generated
    ones (default 0). `atol` and `rtol` require |candidate - reference| <= atol + rtol·|reference| besides the gates.
    `cache` is a folder for the outputs of the fp64 reference. `trace` compares every module, whatever the verdict. A
    run of the candidate is stopped after `timeout` seconds. `fixed` has the sizes of axes, such as {"sequence": 128},
    that the file was made for on purpose; another axis that it fixes and the model does not makes the verdict
    `undecided`. With `strict`, a part of the candidate that was not judged does so too. Each path in `reports` gets a
    report (.json, .xml or .html); `about` adds facts.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Returns the verdict, whichever it is. Raises InputRefused for inputs that cannot be used, and WrongUsage for options
    that do not go together.
    """
    begun = time.perf_counter()
    candidate, origin = Path(candidate), None if base is None else locate(base, on_message, download)
    model, adapters = (
        None if model is None else locate_model(model, on_message, download),
        locate_adapters(adapters, on_message, download),
    )
    how = HowToRun(
        provider=provider,
        dtype=dtype,
        onnx_adapter=None if onnx_adapter is None else Path(onnx_adapter),
        adapter_id=adapter_id,
        inputs=None if inputs is None else Path(inputs),
        atol=atol,
        rtol=rtol,
        seed=seed,
        cache=None if cache is None else Path(cache),
        trace=trace,
        timeout=timeout,
        fixed=dict(fixed or {}),
    )
    application = Application.of(combination, tied)
    refuse_weights_alone(adapters, weights)
    _check_usage(candidate, model, origin, how)
    if layout and model is not None:
        raise WrongUsage("--layout is for --base without --model: a model determines the layout of its weights")
    sources = [candidate, origin, how.onnx_adapter, how.inputs, *model_paths(model or ""), *adapter_paths(adapters)]
    for path in reports:
        check_report_path(Path(path), [source for source in sources if source is not None])
    reading = reading.for_base(origin if model is None else model)
    of_pipeline = model is None and origin is not None and is_pipeline(origin)
    if prefixes or reading != DEFAULTS or of_pipeline:
        adapters = load_adapters(adapters, prefixes, reading=reading, of_models=model is None)
    if expected:
        adapters = load_adapters(adapters, of_models=model is None)
        weights_from = origin if model is None else model
        base_hashes = _weight_hashes(weights_from) if expected.base_sha256 else []
        refuse_unexpected(candidate, expected, adapter_records(adapters, weights or [1.0] * len(adapters)), base_hashes)
    proof: Proof | Audit
    if model is None:
        assert origin is not None

        def judge(
            merged: Path, base: Path, adapters: AdapterSources, weights: Sequence[float], together: Sequence[str] = ()
        ) -> Audit:
            return judge_weights(
                merged, base, adapters, weights, layout or {}, application, on_message, on_progress, together
            )

        if of_pipeline:
            proof = audit_pipeline(candidate, origin, load_adapters(adapters, of_models=True), weights, judge)
        else:
            proof = judge(candidate, origin, adapters, weights)
    else:
        proof = judge_outputs(candidate, model, adapters, weights, origin, how, application, on_message, on_progress)
    if strict:
        proof = proof.strictly()
    seconds = time.perf_counter() - begun
    when = {"strict": strict, "seconds": round(seconds, 1), "created": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    result = Verification(replace(proof, about={**proof.about, **when, **(about or {})}, seconds=seconds))
    for path in reports:
        result.write_report(path)
    return result


def _weight_hashes(base: ModelSource | None) -> list[str | None]:
    """The SHA-256 of each file with weights of a base, or of the model's file."""
    if not isinstance(base, str | Path) or not Path(base).exists():
        raise WrongUsage("--expect-base-sha256 is for a base that is a folder or a file")
    if not Path(base).is_dir() and Path(base).suffix != ".safetensors":
        return [file_sha256(Path(base))]
    return [file_sha256(shard.path) for shard in open_checkpoint(Path(base)).shards.values()]


def _check_usage(candidate: Path, model: ModelSource | None, origin: Path | None, how: HowToRun) -> None:
    """Raise WrongUsage for options that do not go together, and InputRefused for a folder that lacks a graph."""
    refuse_missing_graph(candidate)
    is_graph = candidate.suffix == ".onnx" or is_encoder_decoder_folder(candidate)
    if model is None and origin is None:
        raise WrongUsage("give --model, to judge what CANDIDATE computes, or --base, to judge its weights")
    if model is None and how != HowToRun():
        raise WrongUsage("with --base nothing is run: options on how to run CANDIDATE belong to --model")
    if model is None and is_graph:
        raise WrongUsage("--base alone judges checkpoints; what an .onnx computes is judged with --model")
    if model is not None and origin is not None and {candidate.suffix, origin.suffix} != {".onnx"}:
        raise WrongUsage("--base beside --model is the quantised .onnx that an .onnx was made from")
    if how.provider != "cpu" and not is_graph:
        raise WrongUsage(f"--provider {how.provider} is for .onnx files; PyTorch files are judged on the CPU")
    if not is_graph and (how.onnx_adapter, how.adapter_id, how.dtype) != (None, None, "float32"):
        raise WrongUsage("--onnx-adapter, --adapter-id and --dtype are for .onnx files")
