"""`lora-export verify` without a model: a merged checkpoint against its base and adapters, weight by weight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from lora_export.cli.arguments import answer, command_line, load_adapters, say
from lora_export.errors import InputRefused


def judge(
    candidate: Path,
    base: Path,
    adapters: Sequence[str],
    weights: Sequence[float],
    reports: Sequence[Path],
    *,
    as_json: bool,
) -> int:
    """Judge a merged checkpoint and say so; returns the exit code. Needs no PyTorch."""
    import numpy as np

    from lora_export import __version__, plan, report
    from lora_export.cli.progress import byte_progress
    from lora_export.provenance import described
    from lora_export.verification import against_checkpoint
    from lora_export.weights.checkpoint import open_checkpoint

    begun = time.perf_counter()
    if candidate.suffix == ".onnx":
        raise click.UsageError("--base judges checkpoints; what an .onnx computes is judged with --model")
    if not adapters:
        raise click.UsageError("--base needs the adapters that were merged (-a)")
    for path in reports:
        report.check_path(path)
    loaded = load_adapters(adapters)
    origin, merged = open_checkpoint(base), open_checkpoint(candidate)
    if origin.path.resolve() == merged.path.resolve():
        raise InputRefused(f"{candidate} is the base itself")
    steps = plan.make(loaded, origin.specs, strengths=weights, may_add=True)
    for note in [*(note for adapter in loaded for note in adapter.notes), *steps.notes]:
        say(f"note: {note}")
    with byte_progress("judging", merged.nbytes) as progress:
        found = against_checkpoint.audit(steps, origin, merged, progress=progress)
    seconds = time.perf_counter() - begun
    about = {
        "candidate": str(candidate),
        "base": str(base),
        "adapters": described(loaded, weights or (1.0,) * len(loaded)),
        "lora_export": __version__,
        "numpy": np.__version__,
        "seconds": round(seconds, 1),
        "created": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command_line(),
    }
    for path in reports:
        report.write(path, found, about=about, seconds=seconds)
    if as_json:
        answer(report.document(found, about=about))
    else:
        report.print_verdict(report.console(), found)
    return found.exit_code
