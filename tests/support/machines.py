"""Environments of machines: this one, and invented ones."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import replace
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from lora_export.runtime import environment
from lora_export.runtime.environment import Driver, Facts, Package, Provider
from lora_export.runtime.environment_probes import CPU, CUDA, ProbeResult

NO_DRIVER = Driver(fault="there is no NVIDIA driver (libcuda.so.1: cannot open shared object file)")
ONE_GPU = Driver(cuda="13.0", gpus=1)
HEALTHY = Facts(
    python="3.11.7",
    platform="Linux",
    packages=(Package("onnxruntime-gpu", ">=1.29", "", "1.31.1"), Package("torch", ">=2.10", "", "2.13")),
    owners={"lora-export-core": "0.1.0"},
    onnxruntimes={"onnxruntime-gpu": "1.31.1"},
    onnxruntime_cuda="13.0",
    providers=(Provider(CUDA), Provider(CPU)),
    torch_cuda="13.0",
    torch_devices=("NVIDIA H100",),
    driver=ONE_GPU,
    settings={},
)
LIBRARIES = ("libcublasLt.so.13", "libcurand.so.10")
WITHOUT_CUDA = replace(
    HEALTHY,
    providers=(Provider(CUDA, "missing: " + ", ".join(LIBRARIES), LIBRARIES), Provider(CPU)),
    torch_cuda="",
    torch_devices=(),
    driver=NO_DRIVER,
)


@functools.cache
def this_machine(*, imported: bool = False) -> Facts:
    """This machine, examined once. Of its packages only onnxruntime and PyTorch are tried, or all where `imported`."""
    with pytest.MonkeyPatch.context() as patch:
        if not imported:
            tried = environment.import_package
            needed = ("onnxruntime", "torch")
            patch.setattr(
                environment, "import_package", lambda each: tried(each) if each.module in needed else ProbeResult({})
            )
        return environment.examine()


def install(site: Path, name: str, version: str, *files: str) -> None:
    """A distribution as pip installs it: metadata, its files, and their list. Python 3.12 leaves missing files out."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()


def installed(site: Path) -> list[Distribution]:
    return list(importlib.metadata.distributions(path=[str(site)]))
