"""Packages and providers, each tried in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora_export.runtime import environment, environment_probes
from lora_export.runtime.environment import Package, Provider
from lora_export.runtime.environment_probes import ProbeResult
from lora_export.runtime.environment_problems import find_problems
from lora_export.runtime.providers import CPU, CUDA
from support.machines import HEALTHY, NO_DRIVER


def module(site: Path, name: str, source: str) -> Package:
    (site / f"{name}.py").write_text(source)
    return Package(name, ">=1", "", "1.0")


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import a_missing_module", "ModuleNotFoundError: No module named 'a_missing_module'"),
        ("raise RuntimeError('built for another ABI')", "RuntimeError: built for another ABI"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("raise SystemExit(3)", "ended with code 3"),
    ],
)
def test_broken_package_is_a_problem(source, fault, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = module(tmp_path, "broken", source)
    result = environment.import_package(package)
    assert result.fault == f"does not import: {fault}"
    (problem,) = find_problems(replace(HEALTHY, packages=(replace(package, fault=result.fault),)))
    assert problem.what == f"broken does not import: {fault}" and "pip check" in problem.remedy


def test_package_that_prints_on_import_is_still_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = module(tmp_path, "chatty", "import os; print('hello'); os.write(1, b'from C\\n')")
    result = environment.import_package(package)
    assert result.fault == "" and "hello" in result.stderr


def test_package_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment_probes, "PROBE_TIMEOUT", 1)
    package = module(tmp_path, "sleeper", "import time; time.sleep(30)")
    assert environment.import_package(package).fault == "does not import: did not end within 1 seconds"


RIGHT = {"listed": [CUDA, CPU], "placed": [CUDA], "square": [[7, 10], [15, 22]]}
LEFT_OUT = RIGHT | {"listed": [CPU], "placed": [CPU]}
LOADER = (
    "\x1b[1;31m2026 [E:onnxruntime:Default, bridge.cc:1 operator()] FAIL : Failed to load libx_cuda.so with error: "
)


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("found", "stderr", "fault"),
    [
        (RIGHT, "", ""),
        (LEFT_OUT, LOADER + "libcublasLt.so.13: cannot open shared object file\x1b[m\n", "missing: libcublasLt.so.13"),
        (
            LEFT_OUT,
            'Error loading "a.dll" which depends on "cudnn64_9.dll" which is missing.',
            "missing: cudnn64_9.dll",
        ),
        (
            LEFT_OUT,
            LOADER + "wrong ELF class\x1b[m\n\x1b[m",
            "FAIL : Failed to load libx_cuda.so with error: wrong ELF class",
        ),
        (LEFT_OUT, "", "no reason was given"),
        (RIGHT | {"placed": [CPU]}, "", f"it loads, but the model ran on {CPU}"),
        (RIGHT | {"square": [[1, 4], [9, 16]]}, "", "it computes [[1, 2], [3, 4]]² as [[1, 4], [9, 16]]"),
    ],
)
def test_provider_must_be_listed_run_the_node_and_compute_it(found, stderr, fault, monkeypatch):
    monkeypatch.setattr(environment_probes, "run_in_child", lambda *_: ProbeResult(found, stderr=stderr))
    assert environment.try_provider(CUDA).fault == fault


@pytest.mark.fault(43)
def test_provider_that_crashes_is_a_problem(monkeypatch):
    monkeypatch.setattr(environment_probes, "run_in_child", lambda *_: ProbeResult({}, "crashed with SIGSEGV"))
    assert environment.try_provider(CPU) == Provider(CPU, "crashed with SIGSEGV")
    facts = replace(HEALTHY, providers=(Provider(CPU, "crashed with SIGSEGV"),), driver=NO_DRIVER)
    (problem,) = find_problems(facts)
    assert problem.what == f"{CPU} does not load (crashed with SIGSEGV)"
