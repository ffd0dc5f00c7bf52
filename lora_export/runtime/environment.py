"""What is installed here, and which execution providers really run a model.

Each package and each provider is tried in a process of its own: one that crashes, hangs or writes
to stderr from C++ becomes a line of the report, and what it wrote is the reason. The floors are
those of the installed distribution's metadata; no number is repeated here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import Distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lora_export.errors import EnvironmentLacking

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}  # as --provider names them

OUR_OWN_EXTRAS = frozenset({"demo", "dev"})  # nobody needs them to run a command
MORE = "`python -m torch.utils.collect_env` and `nvidia-smi` say more"
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
PATIENCE = 120  # seconds for one package or provider
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "the GPUs that programs may see",
    "NVIDIA_TF32_OVERRIDE": "0 turns TF32 off and 1 turns it on in every CUDA library, whatever was asked for",
    "ORT_CUDA_GEMM_OPTIONS": "changes how onnxruntime multiplies matrices on CUDA",
}


@dataclass(frozen=True)
class Package:
    """One package that lora-export asks for, and what was found."""

    name: str  # of the distribution
    wanted: str  # version specifier, such as ">=2.10"
    extra: str  # the extra that asks for it; empty where everybody needs it
    installed: str  # version; empty where it is missing
    fault: str = ""  # why it cannot be used

    @property
    def module(self) -> str:
        return "onnxruntime" if self.name.startswith("onnxruntime") else self.name.replace("-", "_")


@dataclass(frozen=True)
class Provider:
    """An execution provider that onnxruntime was compiled with."""

    name: str
    fault: str = ""  # why it does not run a model
    missing: tuple[str, ...] = ()  # shared libraries


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: the newest CUDA that it can run, and how many GPUs answer."""

    cuda: str = ""
    gpus: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Facts:
    """What was found on this machine."""

    python: str
    platform: str
    packages: tuple[Package, ...]
    onnxruntimes: Mapping[str, str]  # every distribution that holds the package `onnxruntime` -> its version
    onnxruntime_cuda: str | None  # the CUDA it was built for; empty for a CPU build, None where it does not import
    providers: tuple[Provider, ...]
    torch_cuda: str | None  # likewise
    torch_devices: tuple[str, ...]  # GPUs that torch can use
    driver: Driver
    settings: Mapping[str, str]  # environment variables that change results


@dataclass(frozen=True)
class Problem:
    what: str
    remedy: str


def examine() -> Facts:
    """Look at this machine. Takes seconds: it imports every package and starts every provider."""
    installed = [each for each in importlib.metadata.distributions() if name_of(each)]
    try:
        metadata = importlib.metadata.metadata("lora-export")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentLacking(
            "lora-export is not installed, only found as source, so its floors are unknown: pip install -e ."
        ) from None
    packages = compare(metadata.get_all("Requires-Dist", []), metadata.get_all("Provides-Extra", []), installed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        asked = pool.submit(in_child, look_at_driver)
        outcomes = dict(zip(packages, pool.map(try_package, packages), strict=True))
        answers = {package.module: outcome.answer for package, outcome in outcomes.items()}
        torch, onnxruntime = answers.get("torch", {}), answers.get("onnxruntime", {})
        providers = tuple(pool.map(try_provider, onnxruntime.get("providers", [])))
        driver = Driver(**asked.result().answer or {"fault": asked.result().fault})
    return Facts(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=tuple(_with_fault(package, outcome.fault) for package, outcome in outcomes.items()),
        onnxruntimes=holders("onnxruntime", installed),
        onnxruntime_cuda=onnxruntime.get("cuda"),
        providers=providers,
        torch_cuda=torch.get("cuda"),
        torch_devices=tuple(torch.get("devices", ())),
        driver=driver,
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
    )


def compare(
    requirements: Iterable[str], extras: Iterable[str], installed: Iterable[Distribution]
) -> tuple[Package, ...]:
    """Lay the wanted packages (`Requires-Dist` lines) against the installed ones. Imports nothing.

    Any flavour of onnxruntime meets the requirement of another: they hold the same package.
    """
    installed = list(installed)
    versions = {name_of(distribution): distribution.version for distribution in installed}
    flavours = holders("onnxruntime", installed)
    packages = []
    for line in requirements:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        extra = _extra_of(requirement, extras)
        if extra is None or extra in OUR_OWN_EXTRAS or name == "lora-export":
            continue
        if name.startswith("onnxruntime") and name not in flavours:
            name = canonicalize_name(next(iter(flavours), name))
        packages.append(_judge(Package(name, str(requirement.specifier), extra, versions.get(name, ""))))
    return tuple(packages)


def holders(package: str, installed: Iterable[Distribution]) -> dict[str, str]:
    """The distributions that put a top-level package on the disk, with their versions; more than one is a clobber."""
    return dict(sorted((name_of(each), each.version) for each in installed if _holds(each, package)))


def _holds(distribution: Distribution, package: str) -> bool:
    if distribution.files is None:  # conda and Linux distributions may keep no list
        return name_of(distribution) in (package, f"{package}-gpu")
    return any(file.as_posix() == f"{package}/__init__.py" for file in distribution.files)


def name_of(distribution: Distribution) -> str:
    """The normalised name; empty for the remains that an interrupted pip leaves behind."""
    if distribution.read_text("METADATA") is None and distribution.read_text("PKG-INFO") is None:
        return ""
    return canonicalize_name(distribution.metadata["Name"] or "")


def _extra_of(requirement: Requirement, extras: Iterable[str]) -> str | None:
    """The extra that asks for it, "" where everybody does, None where it is for another platform."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    return next((extra for extra in extras if requirement.marker.evaluate({"extra": extra})), None)


def _judge(package: Package) -> Package:
    if not package.installed:
        return package if package.extra else _with_fault(package, "is not installed")
    if SpecifierSet(package.wanted).contains(package.installed, prereleases=True):
        return package
    return _with_fault(package, f"is {package.installed}, and lora-export wants {package.wanted}")


def _with_fault(package: Package, fault: str) -> Package:
    """The package with a fault, unless it already has one: the first that was seen explains the others."""
    return replace(package, fault=package.fault or fault)


@dataclass(frozen=True)
class Outcome:
    """What a child process answered, why it did not, and everything else that it wrote."""

    answer: Mapping[str, Any]
    fault: str = ""
    words: str = ""


def in_child(probe: Callable[..., dict[str, Any]], *arguments: str) -> Outcome:
    """Run a function of this file in a new interpreter that sees the same packages."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        f"from lora_export.runtime import environment; environment.answer(environment.{probe.__name__}, *sys.argv[2:])"
    )
    line = [sys.executable, "-P", "-c", code, json.dumps(sys.path), *arguments]
    try:
        child = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return Outcome({}, f"no answer within {PATIENCE} seconds")
    if child.returncode < 0:
        return Outcome({}, f"crashed with {signal.Signals(-child.returncode).name}")
    if child.returncode:
        return Outcome({}, f"ended with code {child.returncode}", child.stderr)
    fault, found = json.loads(child.stdout.splitlines()[-1])
    return Outcome(found, fault, child.stderr)


def answer(probe: Callable[..., dict[str, Any]], *arguments: str) -> None:
    """The child's side: run the probe, and print its fault and what it found as the last line of stdout."""
    fault, found = "", {}
    with contextlib.redirect_stdout(sys.stderr):  # onnxruntime prints why a provider failed
        try:
            found = probe(*arguments)
        except Exception as error:  # noqa: BLE001 - a broken package raises anything; the report says what
            fault = f"{type(error).__name__}: {error}"
    print(json.dumps([fault, found]))


def look_at_package(module: str) -> dict[str, Any]:
    importlib.import_module(module)
    return {}


def look_at_torch() -> dict[str, Any]:
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {"cuda": torch.version.cuda or "", "devices": [torch.cuda.get_device_name(device) for device in devices]}


def look_at_onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {"cuda": onnxruntime.cuda_version or "", "providers": onnxruntime.get_available_providers()}


def look_at_driver() -> dict[str, Any]:
    """Ask the driver itself: torch and onnxruntime may both be CPU builds on a machine with a GPU."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return {"fault": f"there is no NVIDIA driver ({error})"}
    version, gpus = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"  # 13000 is CUDA 13.0
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(gpus))
    if code:
        return {"cuda": cuda, "fault": f"the NVIDIA driver answers with error {code}"}
    return {"cuda": cuda, "gpus": gpus.value, "fault": "" if gpus.value else "the NVIDIA driver sees no GPU"}


def run_small_model(provider: str) -> dict[str, Any]:
    """One MatMul of integers on this provider: who was listed, who ran the node, and what came out."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"], name="square")], "square", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=onnx.IR_VERSION_2023_5_5)
    if provider == CUDA:
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    placed = [part.ep_name for part in session.get_provider_graph_assignment_info() for _ in part.get_nodes()]
    (square,) = session.run(None, {"x": np.array([[1, 2], [3, 4]], np.float32)})
    return {"listed": session.get_providers(), "placed": placed, "square": square.tolist()}


def try_package(package: Package) -> Outcome:
    if not package.installed:
        return Outcome({})
    if package.module == "torch":
        outcome = in_child(look_at_torch)
    elif package.module == "onnxruntime":
        outcome = in_child(look_at_onnxruntime)
    else:
        outcome = in_child(look_at_package, package.module)
    return Outcome(outcome.answer, outcome.fault and f"does not import: {outcome.fault}", outcome.words)


def try_provider(name: str) -> Provider:
    outcome = in_child(run_small_model, name)
    missing = missing_libraries(outcome.words)
    if outcome.fault:
        return Provider(name, outcome.fault, missing)
    if name not in outcome.answer["listed"]:
        return Provider(name, f"missing: {', '.join(missing)}" if missing else complaint(outcome.words), missing)
    if outcome.answer["placed"] != [name]:
        return Provider(name, f"it loads, but the model ran on {', '.join(outcome.answer['placed']) or 'nothing'}")
    if outcome.answer["square"] != [[7, 10], [15, 22]]:
        return Provider(name, f"it computes [[1, 2], [3, 4]]² as {outcome.answer['square']}")
    return Provider(name)


def missing_libraries(words: str) -> tuple[str, ...]:
    """The shared libraries that the loader did not find, each once, in its order."""
    found = re.findall(r'([\w.+-]+\.so[\w.]*): cannot open shared|depends on "([^"]+)" which is missing', words)
    return tuple(dict.fromkeys(linux or windows for linux, windows in found))


def complaint(words: str) -> str:
    """The last line that speaks of an error, without colours and onnxruntime's prefix of time and source line."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", words).splitlines()
    last = next((line for line in reversed(lines) if re.search("error|fail", line, re.I)), "left out without a word")
    return re.sub(r"^[\d: .-]+\[[EWF]:[^]]*\] ", "", last.strip())


def problems(facts: Facts, provider: str | None = None) -> tuple[Problem, ...]:
    """Everything that is wrong with these facts. CUDA is missed only where it was asked for or a GPU answers."""
    found = [
        Problem(f"{package.name} {package.fault}", _package_remedy(package))
        for package in facts.packages
        if package.fault
    ]
    if len(facts.onnxruntimes) > 1:
        both = " ".join(facts.onnxruntimes)
        found.append(
            Problem(
                f"{listed(facts.onnxruntimes)} are installed over each other: what runs is a mix of them",
                f"uninstall them all, then install one again: pip uninstall -y {both} && pip install {best(facts)}",
            )
        )
    if facts.providers and _fault(facts, CPU):
        found.append(Problem(_silent(facts, CPU), f"pip install --force-reinstall {best(facts)}"))
    if provider == "cuda" or (provider is None and facts.driver.gpus):
        found += cuda_problems(facts)
    return tuple(found)


def cuda_problems(facts: Facts) -> list[Problem]:
    """Everything that stands between this machine and CUDA: driver, onnxruntime, torch."""
    found = []
    driver, needed = facts.driver, max(facts.onnxruntime_cuda or "", facts.torch_cuda or "", key=_major)
    if driver.fault:
        remedy = (
            "install the driver of this machine's NVIDIA GPU; a container needs it passed in (docker run --gpus all)"
        )
        found.append(Problem(f"no GPU answers: {driver.fault}", remedy))
    elif _major(driver.cuda) < _major(needed):
        found.append(
            Problem(f"the NVIDIA driver runs CUDA up to {driver.cuda}, {needed} is needed", "update the driver")
        )
    otherwise = "solve the driver first, then ask again" if found else MORE
    if facts.onnxruntime_cuda is not None and _fault(facts, CUDA):
        found.append(Problem(_silent(facts, CUDA), _onnxruntime_remedy(facts) or otherwise))
    if facts.torch_cuda == "":
        remedy = "install a torch that was built for CUDA: https://pytorch.org/get-started/locally names the command"
        found.append(Problem("torch is built without CUDA", remedy))
    elif facts.torch_cuda and not facts.torch_devices:
        found.append(Problem(f"torch (for CUDA {facts.torch_cuda}) sees no GPU", otherwise))
    return found


def _onnxruntime_remedy(facts: Facts) -> str:
    if not facts.onnxruntime_cuda:
        flavours = " ".join(facts.onnxruntimes)
        return (f"pip uninstall -y {flavours} && " if flavours else "") + "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    missing = {library for each in facts.providers if each.name == CUDA for library in each.missing}
    if missing - {DRIVER}:
        return (
            f"pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA {facts.onnxruntime_cuda} and its cuDNN as nvidia-* "
            "wheels, where onnxruntime.preload_dlls() finds them (it was called here, and did not)"
        )
    return ""


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)


def _fault(facts: Facts, name: str) -> str:
    return next((each.fault for each in facts.providers if each.name == name), "onnxruntime was built without it")


def _silent(facts: Facts, name: str) -> str:
    return f"{name} does not load ({_fault(facts, name)})"


def _package_remedy(package: Package) -> str:
    source = f"lora-export[{package.extra}]" if package.extra else package.name + package.wanted
    if package.fault.startswith("does not import"):
        return f"`pip check` names conflicts; else: pip install --force-reinstall --no-deps '{package.name}'"
    return f"pip install --upgrade '{source}'"


def best(facts: Facts) -> str:
    """The flavour of onnxruntime to keep: the one with CUDA where it is among the installed."""
    flavour = next(
        (name for name in facts.onnxruntimes if "gpu" in name), next(iter(facts.onnxruntimes), "onnxruntime")
    )
    wanted = next((package.wanted for package in facts.packages if package.module == "onnxruntime"), "")
    return f"'{flavour}{wanted}'"


def listed(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())
