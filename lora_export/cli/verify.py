"""`lora-export verify`: prove that a file computes what the PyTorch model computes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_export.cli.arguments import (
    adapter_weights,
    adapters_option,
    inputs_option,
    json_option,
    load_adapters,
    provider_option,
    say,
)
from lora_export.errors import InputRefused

if TYPE_CHECKING:
    from lora_export.model import Model
    from lora_export.runtime import Runner


@click.command()
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="MODEL", help="The PyTorch model that CANDIDATE was made from.")
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
    help="Run CANDIDATE, a graph made by `onnx --lora rows`, with this adapter in all rows (0: the base).",
)
@provider_option
@inputs_option
@click.option("--atol", type=click.FloatRange(min=0), help="Demand |candidate - referee| <= atol + rtol·|referee| too.")
@click.option("--rtol", type=click.FloatRange(min=0), help="See --atol.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs.")
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.json|.xml",
    help="Write the verdict as JSON or JUnit XML; may be repeated.",
)
@json_option
def command(
    candidate: Path,
    model: str,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    onnx_adapter: Path | None,
    adapter_id: int | None,
    provider: str,
    inputs_file: Path | None,
    atol: float | None,
    rtol: float | None,
    seed: int,
    reports: tuple[Path, ...],
    as_json: bool,
) -> int:
    """Prove that CANDIDATE computes what MODEL with its adapters attached computes.

    CANDIDATE is an .onnx file, a TorchScript .pt, a merged Hugging Face folder, or a merged
    .safetensors file of MODEL's weights. The verdict is `same` (exit 0), `different` (4) or
    `undecided` (5); 6 means that the asked provider did not do the work.
    """
    from lora_export import proof, report
    from lora_export.cli import proving
    from lora_export.cli.progress import stages
    from lora_export.model import load as load_model

    begun = time.perf_counter()
    for path in reports:
        report.check_path(path)
    if not candidate.exists():
        raise InputRefused(f"there is no candidate at {candidate}")
    if provider != "cpu" and candidate.suffix != ".onnx":
        raise click.UsageError(f"--provider {provider} is for .onnx files; PyTorch files are judged on the CPU")
    if candidate.suffix != ".onnx" and (onnx_adapter, adapter_id) != (None, None):
        raise click.UsageError("--onnx-adapter and --adapter-id are for .onnx files")
    proving.require(provider)
    loaded = load_adapters(adapters)
    for note in (note for adapter in loaded for note in adapter.notes):
        say(f"note: {note}")
    with stages() as stage:
        stage("loading the model")
        base = load_model(model, loaded)
        stage("loading the candidate")
        runner = _runner(candidate, base, provider, onnx_adapter, adapter_id)
        result = proof.prove(
            runner,
            base,
            loaded,
            strengths=weights,
            seed=seed,
            user_inputs=inputs_file,
            device=provider,
            atol=atol,
            rtol=rtol,
            step=lambda what: stage(f"verifying, {what}"),
        )
    seconds = time.perf_counter() - begun
    for path in reports:
        report.write(path, result.verdict, placement=result.placement, about=result.about, seconds=seconds)
    if as_json:
        click.echo(json.dumps(proving.document(result)))
    else:
        proving.show(result)
    return result.exit_code


def _runner(path: Path, base: Model, provider: str, onnx_adapter: Path | None, adapter_id: int | None) -> Runner:
    """Whatever runs a file of this kind."""
    from lora_export import files
    from lora_export.decoding import with_cache
    from lora_export.formats.onnx_adapter import IDS
    from lora_export.runtime import ModuleRunner, OnnxRunner, ScriptRunner

    if not path.is_dir():
        files.must_be_regular(path)
    if path.suffix == ".onnx":
        runner = OnnxRunner(path, provider)
        runner = runner if onnx_adapter is None else runner.with_adapter(onnx_adapter)
        if adapter_id is None and IDS in runner.axes:
            raise click.UsageError(f"{path} was made with --lora rows: say --adapter-id N, 0 for the base")
        return with_cache(runner if adapter_id is None else runner.with_rows([adapter_id]))
    if path.is_dir():
        from lora_export.model import load as load_model

        return ModuleRunner(load_model(str(path)).module, stored=_stored(path))
    if path.suffix == ".safetensors":
        from lora_export.model import with_weights

        return ModuleRunner(with_weights(base, path), stored=_stored(path))
    if path.suffix in (".pt", ".ts", ".pth"):
        return ScriptRunner(path, base.input_names)
    raise InputRefused(f"{path}: a candidate is an .onnx, .pt or .safetensors file, or a Hugging Face folder")


def _stored(path: Path) -> dict[str, str]:
    """The dtypes in which a checkpoint keeps its tensors."""
    from lora_export.checkpoint import open_checkpoint

    return {spec.name: spec.dtype for spec in open_checkpoint(path).specs}
