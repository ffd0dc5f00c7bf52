"""`lora-export doctor`: print what is installed, and which providers really run a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lora_export.cli.arguments import cli_command, print_document
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import EnvironmentLacking
from lora_export.runtime.environment import Facts, examine, find_problems, list_versions
from lora_export.runtime.environment_probes import VARIABLES

if TYPE_CHECKING:
    from rich.console import Console


@cli_command(None, "doctor --provider cpu")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    help="Provider that has to run.  [default: cuda where there is an NVIDIA GPU, else cpu]",
)
def doctor_command(provider: str | None, as_json: bool) -> None:
    """Check the installed packages and the execution providers.

    Every package that lora-export needs is imported, and every execution provider runs a small model, each in a process
    of its own. Ends with exit code 6 where a package is missing, too old or broken, or where the provider does not run
    the model.
    """
    from rich.console import Console

    with Console(stderr=True).status("Trying the packages and providers"):
        facts = examine()
    found = find_problems(facts, provider)
    if as_json:
        document = asdict(facts) | {"problems": [asdict(problem) for problem in found], "ok": not found}
        print_document(document, indent=2)
    else:
        console = Console(highlight=False, markup=False)
        if verbosity() is Verbosity.FULL:
            show_tables(facts, console)
        elif verbosity() is Verbosity.SHORT:
            console.print(*_summary(facts), sep="\n", soft_wrap=True)
        for number, problem in enumerate(found, start=1):
            console.print(f"{number}. {problem.what}\n   -> {problem.remedy}", soft_wrap=True)
        if not found:
            console.print("Nothing is wrong.")
    if found:
        raise EnvironmentLacking("; ".join(problem.what for problem in found))


def show_tables(facts: Facts, console: Console) -> None:
    """Print the facts as tables."""
    from rich.table import Table

    packages = Table("package", "installed", "wanted", "", title="packages")
    for package in facts.packages:
        state = package.fault or ("ok" if package.installed else f"not installed; optional, extra `{package.extra}`")
        packages.add_row(package.name, package.installed or "-", package.wanted, state)
    providers = Table("provider", "runs a model", title=list_versions(facts.onnxruntimes) or "onnxruntime")
    for provider in facts.providers:
        providers.add_row(provider.name, f"no ({provider.fault})" if provider.fault else "yes")
    console.print(packages, providers, sep="\n")
    console.print(*_story(facts), sep="\n", soft_wrap=True)


def _summary(facts: Facts) -> list[str]:
    """The facts in few lines."""
    needed = [package for package in facts.packages if not package.extra]
    right = [package for package in needed if package.installed and not package.fault]
    absent = [f"{package.name} (extra `{package.extra}`)" for package in facts.packages if not package.installed]
    working = [provider.name for provider in facts.providers if not provider.fault]
    return [
        f"packages: {len(right)} of {len(needed)} that are needed are right",
        *([f"not installed, optional: {', '.join(absent)}"] if absent else []),
        f"{list_versions(facts.onnxruntimes) or 'onnxruntime'}: {', '.join(working) or 'no provider'} runs a model",
        *_story(facts),
    ]


def _story(facts: Facts) -> list[str]:
    lines = [f"Python {facts.python} on {facts.platform}"]
    for name, cuda in (("onnxruntime", facts.onnxruntime_cuda), ("torch", facts.torch_cuda)):
        if cuda is not None:
            lines.append(f"{name} is built {f'for CUDA {cuda}' if cuda else 'without CUDA'}")
    lines.append(f"GPUs that torch can use: {', '.join(facts.torch_devices) or 'none'}")
    if facts.driver.fault:
        lines.append(f"GPUs that the driver sees: none ({facts.driver.fault})")
    else:
        lines.append(f"GPUs that the driver sees: {facts.driver.gpus}; it runs CUDA up to {facts.driver.cuda}")
    return lines + [f"{name}={value}: {VARIABLES[name]}" for name, value in facts.settings.items()]
