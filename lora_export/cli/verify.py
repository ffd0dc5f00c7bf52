"""`lora-export verify`: prove that a file computes what the PyTorch model computes."""

from __future__ import annotations

from pathlib import Path

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
    provider_option,
    say,
)
from lora_export.cli.progress import shown


@click.command(cls=TakesAdapters)
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="The PyTorch model that CANDIDATE was made from.")
@click.option(
    "--base",
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
    base: Path | None,
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
    from lora_export.api.verify import verify
    from lora_export.cli.verdicts import annotate_github, show_verification

    with shown() as on_progress:
        result = verify(
            candidate,
            model,
            adapters=adapters,
            weights=weights,
            base=base,
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
            reports=reports,
            about={"command": command_line()},
            on_message=say,
            on_progress=on_progress,
        )
    if as_json:
        answer(result.as_document())
    elif result.error is None:
        show_verification(result)
    annotate_github(result, f"verify {candidate.name}")
    if result.error is not None:
        raise result.error
    return result.exit_code
