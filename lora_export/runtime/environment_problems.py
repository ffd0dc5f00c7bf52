"""What is wrong with a machine's environment, and how to repair it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_export.runtime.environment import Facts, Package
from lora_export.runtime.environment_probes import DRIVER_LIBRARY
from lora_export.runtime.providers import CPU, CUDA

DETAILS = "for details run `python -m torch.utils.collect_env` and `nvidia-smi`"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and how to repair it."""

    what: str
    remedy: str


def find_problems(facts: Facts, provider: str | None = None) -> tuple[Problem, ...]:
    """Everything that is wrong.

    `provider` (`cpu` or `cuda`) must run. Where it is None, CUDA must run only if there is a GPU.
    """
    found = [
        Problem(f"{package.name} {package.fault}", _package_remedy(package))
        for package in facts.packages
        if package.fault
    ]
    if len(facts.onnxruntimes) > 1:
        names = " ".join(facts.onnxruntimes)
        found.append(
            Problem(
                f"{list_versions(facts.onnxruntimes)} are installed over each other: their files are mixed",
                "uninstall them all, then install one again: "
                f"pip uninstall -y {names} && pip install {_preferred_onnxruntime(facts)}",
            )
        )
    if facts.providers and _provider_fault(facts, CPU):
        found.append(
            Problem(_does_not_load(facts, CPU), f"pip install --force-reinstall {_preferred_onnxruntime(facts)}")
        )
    if provider == "cuda" or (provider is None and facts.driver.gpus):
        found += _cuda_problems(facts)
    return tuple(found)


def list_versions(versions: Mapping[str, str]) -> str:
    """Such as `onnxruntime 1.26.0 and onnxruntime-gpu 1.26.0`."""
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def _package_remedy(package: Package) -> str:
    requirement = f"lora-export[{package.extra}]" if package.extra else package.name + package.wanted
    if package.fault.startswith("does not import"):
        return f"`pip check` names conflicts; else: pip install --force-reinstall --no-deps '{package.name}'"
    return f"pip install --upgrade '{requirement}'"


def _cuda_problems(facts: Facts) -> list[Problem]:
    """What keeps CUDA from running: driver, onnxruntime, torch."""
    found = _driver_problems(facts)
    otherwise = "repair the driver first, then run doctor again" if found else DETAILS
    if facts.onnxruntime_cuda is not None and _provider_fault(facts, CUDA):
        found.append(Problem(_does_not_load(facts, CUDA), _onnxruntime_remedy(facts) or otherwise))
    if facts.torch_cuda == "":
        remedy = "install a torch that was built for CUDA: https://pytorch.org/get-started/locally gives the command"
        found.append(Problem("torch is built without CUDA", remedy))
    elif facts.torch_cuda and not facts.torch_devices:
        found.append(Problem(f"torch (for CUDA {facts.torch_cuda}) sees no GPU", otherwise))
    return found


def _driver_problems(facts: Facts) -> list[Problem]:
    driver, needed = facts.driver, max(facts.onnxruntime_cuda or "", facts.torch_cuda or "", key=_major)
    if driver.fault:
        remedy = (
            "install the driver of this machine's NVIDIA GPU; a container needs it passed in (docker run --gpus all)"
        )
        return [Problem(f"no GPU is available: {driver.fault}", remedy)]
    if _major(driver.cuda) < _major(needed):
        what = f"the NVIDIA driver runs CUDA up to {driver.cuda}, {needed} is needed"
        return [Problem(what, "update the driver")]
    return []


def _onnxruntime_remedy(facts: Facts) -> str:
    if not facts.onnxruntime_cuda:
        names = " ".join(facts.onnxruntimes)
        return (f"pip uninstall -y {names} && " if names else "") + "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    missing = {library for each in facts.providers if each.name == CUDA for library in each.missing}
    if missing - {DRIVER_LIBRARY}:
        return (
            f"pip install 'onnxruntime-gpu[cuda,cudnn]' installs CUDA {facts.onnxruntime_cuda} and its cuDNN as "
            "nvidia-* wheels. onnxruntime.preload_dlls() looks for them there; it was called here and did not find them"
        )
    return ""


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)


def _provider_fault(facts: Facts, name: str) -> str:
    return next((each.fault for each in facts.providers if each.name == name), "onnxruntime was built without it")


def _does_not_load(facts: Facts, name: str) -> str:
    return f"{name} does not load ({_provider_fault(facts, name)})"


def _preferred_onnxruntime(facts: Facts) -> str:
    """The requirement of the onnxruntime to install: the one with CUDA where it is among the installed."""
    name = next((name for name in facts.onnxruntimes if "gpu" in name), next(iter(facts.onnxruntimes), "onnxruntime"))
    wanted = next((package.wanted for package in facts.packages if package.module == "onnxruntime"), "")
    return f"'{name}{wanted}'"
