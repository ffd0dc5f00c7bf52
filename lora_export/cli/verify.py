"""`lora-export verify`: prove that a file computes what the PyTorch model computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from lora_export.cli.arguments import (
    TakesAdapters,
    adapter_weights,
    adapters_option,
    answer,
    command_line,
    dtype_option,
    inputs_option,
    json_option,
    load_adapters,
    loaded_model,
    provider_option,
    say,
)
from lora_export.errors import Different, EnvironmentLacking, InputRefused, Undecided


@click.command(cls=TakesAdapters)
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="The PyTorch model that CANDIDATE was made from.")
@click.option(
    "--base",
    "origin",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="In place of --model: judge a merged checkpoint weight by weight against this one and the adapters. Beside "
    "--model: the quantised .onnx that CANDIDATE was made of, by `merge --requantize` or by `onnx --lora`.",
)
@adapters_option
@adapter_weights
@click.option(
    "--onnx-adapter",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Run CANDIDATE, a graph made by `onnx --lora inputs`, with this adapter file.",
)
@click.option(
    "--adapter-id",
    type=click.IntRange(min=0),
    metavar="N",
    help="Run CANDIDATE, a graph made by `onnx --lora rows`, with this adapter in all rows (0: the base) and no other; "
    "without it the base, each adapter given by -a in the order of their ids, and batches that mix them are proven.",
)
@provider_option
@dtype_option
@inputs_option
@click.option(
    "--atol", type=click.FloatRange(min=0), help="Require |candidate - reference| <= atol + rtol·|reference|."
)
@click.option("--rtol", type=click.FloatRange(min=0), help="See --atol.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs.")
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.json|.xml|.html",
    help="Write the verdict as JSON (every figure), JUnit XML (for CI) or HTML (to read and show); may be repeated.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Keep there what the fp64 reference says, and ask it only once for the same model, adapters and inputs.",
)
@click.option(
    "--trace", is_flag=True, help="Compare every module, whatever the verdict; `different` is followed without it too."
)
@json_option
def command(
    candidate: Path,
    model: str | None,
    origin: Path | None,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    onnx_adapter: Path | None,
    adapter_id: int | None,
    provider: str,
    dtype: str,
    inputs_file: Path | None,
    atol: float | None,
    rtol: float | None,
    seed: int,
    reports: tuple[Path, ...],
    cache: Path | None,
    trace: bool,
    as_json: bool,
) -> int:
    """Prove that CANDIDATE computes what MODEL with its adapters attached computes.

    CANDIDATE is an .onnx file, a TorchScript .pt, a .pt2 of torch.export, a merged Hugging Face folder,
    or a merged .safetensors file of MODEL's weights. MODEL is a Hugging Face folder,
    `package.module:factory`, `file.py:factory` or a .pt2. The verdict is `same` (exit 0), `different` (4)
    or `undecided` (5); 6 means that the asked provider did not do the work.

    A .pt2 is read without torch.export.load, which would run what stands in it: of its operators, those
    of a closed list are run, and others are refused by name.

    With --base in place of --model nothing is run: every tensor of a merged folder or file is held
    against W + s·BA in fp64, and what no adapter touches against the base's bytes. Needs no PyTorch.
    """
    if model is None and origin is None:
        raise click.UsageError("give --model, to judge what CANDIDATE computes, or --base, to judge its weights")
    if origin is not None and model is not None and {candidate.suffix, origin.suffix} != {".onnx"}:
        raise click.UsageError("--base beside --model is the quantised .onnx that an .onnx was made of")
    if model is None:
        assert origin is not None
        how = provider, dtype, trace
        if {onnx_adapter, adapter_id, inputs_file, atol, rtol, cache} != {None} or how != ("cpu", "float32", False):
            raise click.UsageError("with --base nothing is run: options on how to run CANDIDATE belong to --model")
        from lora_export.cli import auditing

        return auditing.judge(candidate, origin, adapters, weights, reports, as_json=as_json)
    from lora_export import report
    from lora_export.cli import proving
    from lora_export.cli.progress import stages
    from lora_export.formats.onnx_adapter import IDS
    from lora_export.runtime import open_artifact as candidates
    from lora_export.runtime.onnx_runner import OnnxRunner
    from lora_export.storage import input_files
    from lora_export.verification import against_pytorch, proof

    begun = time.perf_counter()
    for path in reports:
        report.check_path(path)
    if not candidate.exists():
        raise InputRefused(f"there is no candidate at {candidate}")
    if origin is not None:
        input_files.must_exist(origin, "base graph")
    if provider != "cpu" and candidate.suffix != ".onnx":
        raise click.UsageError(f"--provider {provider} is for .onnx files; PyTorch files are judged on the CPU")
    if candidate.suffix != ".onnx" and (onnx_adapter, adapter_id, dtype) != (None, None, "float32"):
        raise click.UsageError("--onnx-adapter, --adapter-id and --dtype are for .onnx files")
    runner, refusal = None, None
    given: dict[str, Any] = {}
    try:
        proving.require(provider)
        loaded = load_adapters(adapters)
        for note in (note for adapter in loaded for note in adapter.notes):
            say(f"note: {note}")
        with stages() as stage:
            stage("loading the model")
            base = loaded_model(model, loaded, dtype)
            stage("loading the candidate")
            runner = candidates.open_candidate(
                candidate, base, provider=provider, onnx_adapter=onnx_adapter, adapter_id=adapter_id
            )
            by_row = isinstance(runner, OnnxRunner) and IDS in runner.axes
            prove: Callable[..., proof.Proof] = against_pytorch.prove_rows if by_row else against_pytorch.prove
            result = prove(
                runner,
                base,
                loaded,
                strengths=weights,
                seed=seed,
                user_inputs=inputs_file,
                device=provider,
                atol=atol,
                rtol=rtol,
                cache=cache,
                trace=trace,
                origin=origin,
                step=lambda what: stage(f"verifying, {what}"),
                say=say,
            )
            stage("hashing the candidate")
            digests = candidates.hashes(candidate)
            if origin is not None:
                given["base"] = {"path": str(origin), "sha256": candidates.hashes(origin)}
    except (Different, Undecided, EnvironmentLacking) as error:
        # No figures, but an answer all the same: it is reported as every other, and told on stderr.
        refusal, digests = error, {}
        result = proving.without_figures(error, getattr(runner, "placement", None))
    seconds = time.perf_counter() - begun
    about = {
        "candidate": {"path": str(candidate), "sha256": digests},
        **given,
        **result.about,
        "seconds": round(seconds, 1),
        "created": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command_line(),
    }
    result = replace(result, about=about)
    for path in reports:
        report.write(
            path,
            result.verdict,
            placement=result.placement,
            about=about,
            diagnosis=result.diagnosis,
            exit_code=result.exit_code,
            seconds=seconds,
        )
    if as_json:
        answer(proving.document(result))
    elif refusal is None:
        proving.show(result)
    proving.tell_github(result, f"verify {candidate.name}")
    if refusal is not None:
        raise refusal
    return result.exit_code
