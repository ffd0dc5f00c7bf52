"""The sections of a command's `--help`: options by what they are about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import click

Sections = Mapping[str, Sequence[str]]  # heading -> options, in any order

# Of options that several commands have
SHARED: Sections = {
    "How adapters are read": (
        *("--prefix", "--format", "--allow-pickle", "--lora-rank", "--lora-alpha", "--enable-lora", "--base-config"),
        *("--component", "--moe-b-layout"),
    ),
    "How adapters are combined": (
        *("--weight", "--combine", "--density", "--majority-sign", "--svd-rank", "--combine-seed", "--tied"),
    ),
    "Files and messages": (
        *("--overwrite", "--download", "--report", "--cache", "--json", "--quiet", "--verbose", "--help"),
    ),
}
OF_NO_SECTION = "Options"

# Of options of single commands
OF_TRAIN: Sections = {
    "Data": ("--column", "--task", "--max-length", "--packing", "--holdout"),
    "The adapter": (
        *("--rank", "--alpha", "--rslora", "--dora", "--init", "--target", "--target-pattern", "--target-parameter"),
        *("--rank-pattern", "--alpha-pattern", "--dropout", "--bias", "--token-index", "--head", "--continue-from"),
    ),
    "The frozen base": ("--quantize-base", "--base-dtype", "--shard-base"),
    "The steps": (
        *("--epochs", "--batch-size", "--accumulate", "--learning-rate", "--b-ratio", "--schedule", "--warmup"),
        *("--weight-decay", "--max-gradient-norm", "--precision", "--gradient-checkpointing", "--compile"),
        *("--seed", "--device"),
    ),
    "Measurements and checkpoints": (
        *("--evaluate-every", "--patience", "--keep-best", "--compare", "--tensorboard", "--save-every", "--resume"),
    ),
}
OF_ONNX: Sections = {
    "The graph": (
        *("--lora", "--target", "--dora", "--names", "--max-rank", "--required-inputs", "--adapters-per-row"),
        *("--ignore-head", "--task", "--with-cache", "--fuse", "--quantize", "--opset", "--dtype"),
    ),
    "The proof": ("--inputs", "--no-verify", "--provider", "--timeout"),
}
OF_TORCHSCRIPT: Sections = {"The proof": ("--inputs", "--no-verify")}
OF_VERIFY: Sections = {
    "The comparison": (
        *("--provider", "--dtype", "--inputs", "--fixed", "--seed", "--atol", "--rtol", "--strict", "--trace"),
        *("--layout", "--timeout"),
    ),
    "What the adapter and the base must be": (
        *("--expect-adapter-sha256", "--expect-rank", "--expect-alpha", "--expect-base-sha256"),
    ),
}
OF_MERGE: Sections = {
    "The base": ("--base", "--variant", "--layout", "--dequantize", "--requantize", "--float-base"),
    "The output": (
        *("--dtype", "--only-head", "--min-retention", "--keep-residual", "--hash", "--device", "--dry-run"),
    ),
}


def write_options(
    params: Iterable[click.Parameter], own: Sections, context: click.Context, formatter: click.HelpFormatter
) -> None:
    """Write a command's options: those of no section first, then its own sections, then the shared ones.

    For an option that is in both kinds, the command's own section counts. The order inside of a section is that of the
    command.
    """
    headings = {name: heading for sections in (SHARED, own) for heading in sections for name in sections[heading]}
    rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (OF_NO_SECTION, *own, *SHARED)}
    for param in params:
        if record := param.get_help_record(context):
            heading = next((headings[name] for name in param.opts if name in headings), OF_NO_SECTION)
            rows[heading].append(record)
    for heading, records in rows.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)
