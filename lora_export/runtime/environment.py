"""What is installed on this machine, which execution providers really run a model, what is wrong, and how to repair it.

The version floors are those of the installed distribution's metadata; no number is repeated here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import Distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lora_export import extras
from lora_export.errors import EnvironmentLacking
from lora_export.runtime import environment_probes as probes
from lora_export.runtime.environment_probes import CPU, CUDA, DRIVER_LIBRARY, VARIABLES, ProbeResult

MODULES_OF = {
    "pillow": "PIL",
    "pyopenssl": "OpenSSL",
    "pyyaml": "yaml",
}  # a distribution -> the module that it is imported by, where the names differ
DEVELOPMENT_EXTRAS = frozenset({"demo", "dev", "release", "site"})  # no command needs them


@dataclass(frozen=True)
class Package:
    """One package that lora-export requires, and what was found."""

    name: str  # of the distribution
    wanted: str  # version specifier, such as ">=2.10"
    extra: str  # the extra that requires it; empty where every command needs it
    installed: str  # version; empty where it is missing
    fault: str = ""  # why it cannot be used

    @property
    def module(self) -> str:
        """The name by which it is imported."""
        if self.name.startswith("onnxruntime"):
            return "onnxruntime"
        return MODULES_OF.get(self.name, self.name.replace("-", "_"))


@dataclass(frozen=True)
class Provider:
    """An execution provider that onnxruntime was compiled with."""

    name: str
    fault: str = ""  # why it does not run a model
    missing: tuple[str, ...] = ()  # shared libraries


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver."""

    cuda: str = ""  # the newest CUDA version that it runs
    gpus: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Facts:
    """What was found on this machine."""

    python: str
    platform: str
    packages: tuple[Package, ...]
    owners: Mapping[str, str]  # every distribution that contains the package `lora_export` -> its version
    onnxruntimes: Mapping[str, str]  # every distribution that contains the package `onnxruntime` -> its version
    onnxruntime_cuda: str | None  # the CUDA it was built for; empty for a CPU build, None where it does not import
    providers: tuple[Provider, ...]
    torch_cuda: str | None  # likewise
    torch_devices: tuple[str, ...]  # GPUs that torch can use
    driver: Driver
    settings: Mapping[str, str]  # environment variables that change results


def examine() -> Facts:
    """Examine this machine. Takes seconds: it imports every package and starts every provider.

    Raises EnvironmentLacking where lora-export is not installed, so that its requirements are unknown.
    """
    installed = [each for each in importlib.metadata.distributions() if name_of(each)]
    tables = [own.metadata for own in extras.installed()]
    if not tables:
        raise EnvironmentLacking(
            "lora-export is not installed, only found as source, so its requirements are unknown: pip install -e ."
        )
    lines, names = (
        list(dict.fromkeys(line for table in tables for line in table.get_all(key, [])))
        for key in ("Requires-Dist", "Provides-Extra")
    )
    required = required_packages(lines, names, installed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        driver_probe = pool.submit(probes.run_in_child, probes.probe_driver)
        results = dict(zip(required, pool.map(import_package, required), strict=True))
        found = {package.module: result.found for package, result in results.items()}
        torch, onnxruntime = found.get("torch", {}), found.get("onnxruntime", {})
        providers = tuple(pool.map(try_provider, onnxruntime.get("providers", [])))
        driver = Driver(**driver_probe.result().found or {"fault": driver_probe.result().fault})
    return Facts(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=tuple(_with_fault(package, result.fault) for package, result in results.items()),
        owners=distributions_of("lora_export", installed),
        onnxruntimes=distributions_of("onnxruntime", installed),
        onnxruntime_cuda=onnxruntime.get("cuda"),
        providers=providers,
        torch_cuda=torch.get("cuda"),
        torch_devices=tuple(torch.get("devices", ())),
        driver=driver,
        settings={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


# --- packages -----------------------------------------------------------------------------------


def required_packages(
    requirements: Iterable[str], names_of_extras: Iterable[str], installed: Iterable[Distribution]
) -> tuple[Package, ...]:
    """The packages of `Requires-Dist` lines, each with its installed version and what is wrong with that.

    Imports nothing. Any distribution of onnxruntime meets the requirement of another: both contain the same package.
    """
    installed = list(installed)
    versions = {name_of(distribution): distribution.version for distribution in installed}
    onnxruntimes = distributions_of("onnxruntime", installed)
    packages = []
    for line in requirements:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        extra = _extra_of(requirement, names_of_extras)
        if extra is None or extra in DEVELOPMENT_EXTRAS or name in extras.DISTRIBUTIONS:
            continue
        if name.startswith("onnxruntime") and name not in onnxruntimes:
            name = canonicalize_name(next(iter(onnxruntimes), name))
        packages.append(_checked_version(Package(name, str(requirement.specifier), extra, versions.get(name, ""))))
    return tuple(packages)


def distributions_of(package: str, installed: Iterable[Distribution]) -> dict[str, str]:
    """The distributions that contain a top-level package, with their versions. Two of them overwrite each other."""
    return dict(sorted((name_of(each), each.version) for each in installed if _contains(each, package)))


def _contains(distribution: Distribution, package: str) -> bool:
    # To parse the lists of all distributions takes seconds. To search their text does not.
    module, lists = f"{package}/__init__.py", ("RECORD", "installed-files.txt", "SOURCES.txt")
    texts = [text for text in map(distribution.read_text, lists) if text is not None]
    if not texts:  # conda and Linux distributions may have no list of files
        return name_of(distribution) in (package, f"{package}-gpu")
    return any(module in text for text in texts) and module in map(str, distribution.files or ())


def name_of(distribution: Distribution) -> str:
    """The normalised name; empty for the remains that an interrupted pip leaves behind."""
    if distribution.read_text("METADATA") is None and distribution.read_text("PKG-INFO") is None:
        return ""
    return canonicalize_name(distribution.metadata["Name"] or "")


def _extra_of(requirement: Requirement, extras: Iterable[str]) -> str | None:
    """The extra that requires it; "" where every command does, None where it is for another platform."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    return next((extra for extra in extras if requirement.marker.evaluate({"extra": extra})), None)


def _checked_version(package: Package) -> Package:
    if not package.installed:
        return package if package.extra else _with_fault(package, "is not installed")
    if SpecifierSet(package.wanted).contains(package.installed, prereleases=True):
        return package
    return _with_fault(package, f"is {package.installed}, but lora-export needs {package.wanted}")


def _with_fault(package: Package, fault: str) -> Package:
    """The package with a fault, unless it already has one: the first fault explains the others."""
    return replace(package, fault=package.fault or fault)


# --- tried in child processes -------------------------------------------------------------------


def import_package(package: Package) -> ProbeResult:
    """Import a package in a process of its own; an empty result where it is not installed."""
    if not package.installed:
        return ProbeResult({})
    if package.module == "torch":
        result = probes.run_in_child(probes.probe_torch)
    elif package.module == "onnxruntime":
        result = probes.run_in_child(probes.probe_onnxruntime)
    else:
        result = probes.run_in_child(probes.probe_package, package.module)
    return ProbeResult(result.found, result.fault and f"does not import: {result.fault}", result.stderr)


def try_provider(name: str) -> Provider:
    """Run a small model on a provider (onnxruntime's name) in a process of its own."""
    result = probes.run_in_child(probes.probe_provider, name)
    missing = probes.missing_libraries(result.stderr)
    if result.fault:
        return Provider(name, result.fault, missing)
    if name not in result.found["listed"]:
        reason = f"missing: {', '.join(missing)}" if missing else probes.last_error_line(result.stderr)
        return Provider(name, reason, missing)
    if result.found["placed"] != [name]:
        return Provider(name, f"it loads, but the model ran on {', '.join(result.found['placed']) or 'nothing'}")
    if result.found["square"] != [[7, 10], [15, 22]]:
        return Provider(name, f"it computes [[1, 2], [3, 4]]² as {result.found['square']}")
    return Provider(name)


# --- what is wrong, and how to repair it ---

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
    if len(facts.owners) > 1:
        names = " ".join(facts.owners)
        what = f"{list_versions(facts.owners)} are installed over each other: their files are mixed"
        found.append(Problem(what, f"uninstall them all, then install one again: pip uninstall -y {names}"))
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
    requirement = package.name + package.wanted
    if probes.TIMED_OUT in package.fault:
        return f"run it again when the machine is less busy; else: python -X importtime -c 'import {package.module}'"
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
        remedy = "install the driver of this machine's NVIDIA GPU; a container needs all its GPUs passed in"
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
