"""`lora-export guide`: the pages of the guide, which are shipped in the package."""

from __future__ import annotations

import importlib.resources
import re

import click

from lora_export.cli.arguments import cli_command
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import hint_of_name

# Group -> topic -> what its page explains. `release/site` shows the pages in these groups.
GROUPS = {
    "Start": {
        "tasks": "What do you want to do? A command for each job.",
        "install": "Install it, with and without PyTorch; the extras.",
    },
    "Examples": {
        "ollama": "From a language model and its LoRA to Ollama.",
        "sdxl": "Stable Diffusion XL with three LoRA files of kohya's format.",
        "customers": "One BERT, twenty customers: a graph, and an adapter a row.",
        "gate": "A repository of adapters, and the gate that each has to pass.",
        "browser": "A model in the browser, and its adapters as files beside it.",
    },
    "Guide": {
        "training": "Train an adapter: data, targets, held-out accuracy.",
        "qlora": "Train beside a base in 4 bits.",
        "models": "What MODEL can be: a folder, a function of yours, a .pt2, a graph.",
        "adapters": "Which adapters are read, and which are refused.",
        "kinds": "Adapters that are not LoRA: LoHa, VeRA, IA3, OFT and others.",
        "diffusion": "Adapters of diffusion models: names, pipelines, other programs.",
        "runtimes": "What vLLM, llama.cpp and others do with an adapter: check.",
        "changing": "Another format; LoRA of any kind; the adapter of a trained model.",
        "combining": "Several adapters as one: sums, TIES, DARE; combine and resize.",
        "merging": "Merge into a checkpoint or a graph: plan, rounding, provenance.",
        "onnx": "Export to ONNX: the modes merged, nodes, inputs, rows, slots.",
        "torchscript": "Export to TorchScript.",
        "many-adapters": "One graph, many adapters: inputs, rows, convert, Session.",
        "slots": "A thousand adapters: loaded and replaced while a graph runs.",
        "fleet": "Hundreds of adapters by one file, on processes or on Ray.",
        "cost": "Seconds, memory and dollars: one model, and 10,000 adapters.",
        "generation": "Models with a key/value cache: export, generate, fuse.",
        "images": "LLaVA, Gemma 3, Qwen2-VL and others with images, as three graphs.",
        "genai": "Adapters in graphs of onnxruntime-genai.",
        "quantised": "Quantised graphs, and quantised checkpoints as floats.",
        "kept-quantised": "Merge into a quantised checkpoint that stays quantised.",
        "gguf": "GGUF files as bases: merge, promote, calibrate, verify.",
        "verdict": "What `verify` runs, and how it decides.",
        "judged": "Every rule of a verdict, and what it does not judge.",
        "runners": "Prove what OpenVINO, or a function of yours, runs.",
        "endpoints": "Prove what a server answers: vLLM, llama.cpp, mlx-lm.",
        "stores": "Bases, adapters and outputs in S3, Google Cloud or Azure.",
        "ci": "Verify in CI: exit codes, reports, pytest.",
        "python": "All commands as Python functions.",
        "configuration": "Defaults in pyproject.toml and the environment; shell completion.",
        "limits": "What this version does not do.",
    },
}
TOPICS = {name: line for topics in GROUPS.values() for name, line in topics.items()}


@cli_command(None, "guide merging", json=False)
@click.argument("topic", required=False)
def guide_command(topic: str | None) -> None:
    """Show a page of the guide, or the list of its pages."""
    if topic is None:
        width = max(map(len, TOPICS))
        for name, line in TOPICS.items():
            click.echo(name if verbosity() is Verbosity.QUIET else f"{name:{width}}  {line}")
        return
    if topic not in TOPICS:
        raise click.UsageError(
            f"the guide has no page `{topic}`{hint_of_name(topic, TOPICS)}. The pages are: {', '.join(TOPICS)}"
        )
    _show(guide_page(topic))


def guide_page(topic: str) -> str:
    """Return a page as Markdown, without the comments for the tests."""
    file = importlib.resources.files("lora_export") / "guide" / f"{topic}.md"
    return re.sub(r"^<!--.*?-->\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _show(text: str) -> None:
    """Print a page: rendered on a terminal, as it is in a pipe."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        click.echo(text, nl=False)
        return
    from rich.markdown import Markdown

    console.print(Markdown(text))
