"""`lora-export verify`: prove that a file computes what the PyTorch model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.cli import help_sections
from lora_export.cli.application_options import combination_options, tied_option
from lora_export.cli.arguments import (
    TakesAdapters,
    adapter_weights,
    adapters_option,
    command_line,
    download_option,
    dtype_option,
    fixed_option,
    inputs_option,
    json_option,
    layout_option,
    prefix_option,
    print_document,
    print_message,
    provider_option,
    runs_in_ci,
    timeout_option,
)
from lora_export.cli.expecting import expectation_options
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.progress import shown
from lora_export.cli.reading import reading_options

EXAMPLE = """\b
Examples:
  lora-export verify model.onnx --model base -a adapter --report verdict.xml
  lora-export verify merged --base base -a adapter"""


@click.command(cls=TakesAdapters, epilog=EXAMPLE, sections=help_sections.OF_VERIFY)
@click.argument("candidate", type=FilePath())
@click.option("--model", type=Source(), metavar="MODEL", help="PyTorch model that CANDIDATE was made from.")
@click.option(
    "--base",
    type=FilePath(),
    metavar="CHECKPOINT",
    help="Without --model: compare a merged checkpoint with this base and the adapters, weight by weight. With "
    "--model: the quantised .onnx that CANDIDATE was made from, by `merge --requantize` or `onnx --lora`.",
)
@layout_option
@adapters_option
@adapter_weights
@prefix_option
@reading_options
@combination_options("--combine", seed=("--combine-seed",))
@tied_option
@click.option(
    "--onnx-adapter",
    type=FilePath(),
    metavar="FILE",
    help="Adapter file to run CANDIDATE with. For a graph made by `onnx --lora inputs`.",
)
@click.option(
    "--adapter-id",
    type=click.IntRange(min=0),
    metavar="N",
    help="Adapter of all rows (0: the base), for a graph made by `onnx --lora rows`. Without it, the base, every "
    "adapter of -a (in the order of the ids) and mixed batches are proven.",
)
@provider_option
@dtype_option
@inputs_option
@click.option(
    "--atol", type=click.FloatRange(min=0), help="Also require |candidate - reference| <= atol + rtol·|reference|."
)
@click.option("--rtol", type=click.FloatRange(min=0), help="See --atol.")
@click.option("--seed", type=int, help="Random seed for the generated inputs.  [default: 0]")
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=FilePath(),
    metavar="FILE.json|.xml|.html",
    help="Write the verdict as JSON (every figure), JUnit XML (for CI) or HTML (to read). May be repeated.",
)
@click.option(
    "--cache",
    type=FilePath(file_okay=False),
    metavar="FOLDER",
    help="Store the outputs of the fp64 reference here, and reuse them for the same model, adapters and inputs.",
)
@click.option("--trace", is_flag=True, help="Compare every module (always done when the verdict is `different`).")
@fixed_option
@expectation_options
@timeout_option
@click.option(
    "--strict/--no-strict",
    default=runs_in_ci,
    help="Call a candidate of which a part was not judged `undecided`.  [default: strict where CI=true]",
)
@download_option
@json_option
def command(
    candidate: Path,
    model: str | None,
    base: Path | None,
    layout: dict[str, str],
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    prefixes: dict[str, str],
    reading: dict[str, Any],
    combination: dict[str, Any],
    tied: str,
    onnx_adapter: Path | None,
    adapter_id: int | None,
    provider: str,
    dtype: str,
    inputs_file: Path | None,
    atol: float | None,
    rtol: float | None,
    seed: int | None,
    reports: tuple[Path, ...],
    cache: Path | None,
    trace: bool,
    fixed: dict[str, int],
    expected: dict[str, Any],
    timeout: float,
    strict: bool,
    download: bool,
    as_json: bool,
) -> int:
    """Prove that CANDIDATE computes what MODEL with its adapters attached computes.

    CANDIDATE is an .onnx, a TorchScript .pt, a .pt2 of torch.export, a merged Hugging Face folder, or a merged
    .safetensors file with MODEL's weights. MODEL is a Hugging Face folder, `package.module:factory`, `file.py:factory`
    or a .pt2. The verdict is `same` (exit code 0), `different` (4) or `undecided` (5). Exit code 6 means that the
    requested provider did not do the work.

    A .pt2 is read without torch.export.load, which could run code from the file. Operators outside a closed list are
    refused by name.

    With --base and without --model, nothing is run: each changed tensor of a merged folder or file is compared with
    W + s·BA in fp64, and every other tensor with the bytes of the base. PyTorch is not needed.

    What was not judged, such as a pair whose effect is smaller than the allowed error, is listed below the verdict.
    With --strict it makes the verdict `undecided`.
    """
    from lora_export.adapters.combination import Combination
    from lora_export.api.verify import verify
    from lora_export.cli.failures import answered
    from lora_export.cli.verdicts import annotate_github, show_proof
    from lora_export.formats.read_options import ReadOptions
    from lora_export.runtime.expectations import Expectations

    with shown() as on_progress:
        result = verify(
            candidate,
            model,
            adapters=adapters,
            weights=weights,
            prefixes=prefixes,
            reading=ReadOptions(**reading),
            combination=Combination(**combination),
            tied=tied,
            base=base,
            layout=layout,
            onnx_adapter=onnx_adapter,
            adapter_id=adapter_id,
            provider=provider,
            dtype=dtype,
            inputs=inputs_file,
            atol=atol,
            rtol=rtol,
            seed=seed,
            cache=cache,
            trace=trace,
            timeout=timeout,
            fixed=fixed,
            expected=Expectations(**expected),
            strict=strict,
            reports=reports,
            about={"command": command_line()},
            download=download,
            on_message=print_message,
            on_progress=on_progress,
        )
    answered()
    if as_json:
        print_document(result.as_document())
    elif result.error is None:
        show_proof(result.proof)
    annotate_github(result, f"verify {candidate.name}")
    if result.error is not None:
        raise result.error
    return result.exit_code
