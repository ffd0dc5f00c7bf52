"""Reports of a training: the table of ways to train one model (text, image of the losses, page), and the model card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.extras import optional_package
from lora_export.report.files.page import render
from lora_export.storage.atomic_output import byte_size

TITLES = (
    "strategy", "rank", "trained", "share", "weights", "gradients", "optimiser", "activations", "step",
    "final loss", "best loss", "held out",
)  # fmt: skip
# Colours that colour-blind readers tell apart (Okabe and Ito)
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES = ("-", "--", "-.", ":")
SMOOTHED_STEPS = 40  # with twice as many steps or more, the lines are smoothed


def comparison_rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table, by TITLES, from the documents of the runs."""
    return [_cells(run) for run in runs]


def _cells(run: Mapping[str, Any]) -> tuple[str, ...]:
    memory, held_out = run["memory"], run["held_out"]
    parts = (byte_size(memory[name]) for name in ("weights", "gradients", "optimizer", "activations"))
    measured = "" if held_out is None else f"{held_out['loss']:.4g}"
    if held_out is not None and held_out["accuracy"] is not None:
        measured = f"{100 * held_out['accuracy']:.1f} % ({measured})"
    share = 100 * run["trained_parameters"] / run["all_parameters"]
    return (
        run["label"].partition(",")[0],
        "" if run["rank"] is None else str(run["rank"]),
        f"{run['trained_parameters']:,}",
        f"{share:.3g} %",
        *(parts if run["losses"] else ("", "", "", "")),
        "" if run["step_seconds"] is None else _milliseconds(1e3 * run["step_seconds"]),
        *("" if run[name] is None else f"{run[name]:.4g}" for name in ("final_loss", "best_loss")),
        measured,
    )


def _milliseconds(figure: float) -> str:
    return f"{figure:,.0f} ms" if figure >= 1000 else f"{figure:.3g} ms"


def draw_losses(
    losses: Mapping[str, Sequence[float]], path: Path, *, held_out: Mapping[int, float] | None = None
) -> None:
    """Draw the loss of each step as a PNG: label -> losses. Raises EnvironmentLacking without matplotlib.

    Of many steps, the line is the mean of the last few, and the single losses are thin lines behind it. `held_out` are
    losses on held-out examples: step -> loss.
    """
    figure = optional_package("matplotlib.figure", "a plot needs", "plot").Figure(
        figsize=(8, 4.5), layout="constrained"
    )
    axes = figure.subplots()
    for number, (label, values) in enumerate(losses.items()):
        style = {"color": LINE_COLOURS[number % len(LINE_COLOURS)], "linestyle": LINES[number % len(LINES)]}
        steps, window = range(1, len(values) + 1), max(1, len(values) // SMOOTHED_STEPS)
        if window > 1:  # each step as a thin line behind the mean
            axes.plot(steps, values, linewidth=0.8, alpha=0.25, color=style["color"])
        axes.plot(steps, running_means(values, window), label=label, linewidth=1.8, **style)
    if held_out:
        colour, line = LINE_COLOURS[1], LINES[1]
        axes.plot(list(held_out), list(held_out.values()), label="held out", color=colour, linestyle=line, marker=".")
    axes.set(xlabel="step", ylabel="loss" if held_out else "training loss")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def running_means(values: Sequence[float], window: int) -> list[float]:
    """For each value the mean of it and those before it, `window` of them at most."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = (max(0, end - window) for end in range(1, len(sums)))
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def comparison_page(document: Mapping[str, Any], picture: str) -> str:
    """The page of a comparison. `picture` is the name of a PNG beside it, or "".

    Raises EnvironmentLacking without jinja2.
    """
    rows = comparison_rows(document["runs"])
    return render("comparison.html.j2", document=document, titles=TITLES, rows=rows, picture=picture)


MODEL_CARD = "README.md"


def model_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown. `facts` has base, base_sha256, data, data_sha256, examples, adapter, settings, figures,
    versions; base_quantization, or ""; and plot: the name of an image, or "". Tables are by name; names from outside
    are written as JSON strings in the header, and as code below.
    """
    header = ["---", f"base_model: {json.dumps(facts['base'])}", "library_name: peft", "tags: [lora]", "---"]
    made_from = {
        "base": facts["base"],
        "SHA-256 of all weights before training": facts["base_sha256"],
        **({"quantisation of the base": quantised} if (quantised := facts["base_quantization"]) else {}),
        "data": facts["data"],
        "SHA-256 of the data": facts["data_sha256"],
        "examples": facts["examples"],
    }
    sections = [("Made from", made_from), ("Adapter", facts["adapter"]), ("Training", facts["settings"])]
    sections += [("Figures", facts["figures"]), ("Versions", facts["versions"])]
    lines = [*header, "", "# A LoRA adapter", "", "Trained by `lora-export train`; PEFT loads this folder."]
    for title, table in sections:
        rows = [f"| {name} | {_code(value)} |" for name, value in table.items()]
        lines += ["", f"## {title}", "", "| | |", "|---|---|", *rows]
        if title == "Figures" and facts["plot"]:
            lines += ["", f"![The loss of each step]({facts['plot']})"]
    return "\n".join(lines) + "\n"


def _code(value: Any) -> str:
    """A value as code in a cell. A pipe would end the cell, a backtick the code, a line break the row."""
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""
