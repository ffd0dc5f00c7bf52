"""The commands on each provider: the same proofs on the CPU, and on a GPU where there is one.

`pytest -m cuda` runs the tests that need a GPU, `make test-slow` their pairs on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export import Session
from lora_export.runtime import environment, environment_probes
from lora_export.runtime.environment import Package, Provider, find_problems
from lora_export.runtime.environment_probes import CPU, CUDA, PROVIDERS, ProbeResult
from support import FACTORIES
from support.cli import answer, call
from support.handmade import peft_adapter
from support.machines import HEALTHY, NO_DRIVER

MODEL = f"{FACTORIES}:spotter"
LAYER = "encoder.layers.1"
EACH_PROVIDER = pytest.mark.parametrize(
    "provider", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.cuda)]
)
DEFAULTS = "CUDAExecutionProvider's own settings"  # of a second run, in TF32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, and the same with one layer's scale a tenth too large."""
    folder, rng = tmp_path_factory.mktemp("providers"), np.random.default_rng(0)

    def a_pair(out: int, into: int) -> tuple[Any, Any]:
        return 0.3 * rng.standard_normal((4, into)), 0.3 * rng.standard_normal((out, 4))

    pairs = {f"{LAYER}.linear1": a_pair(32, 16), f"{LAYER}.linear2": a_pair(16, 32), "head": a_pair(3, 16)}
    peft_adapter(folder / "right", pairs)
    peft_adapter(folder / "wrong", {name: (a, 1.1 * b if name == "head" else b) for name, (a, b) in pairs.items()})
    return folder


def proves(result: dict[str, Any], provider: str) -> bool:
    """Whether a verdict is `same`, this provider did the work, and TF32's effect is noted on CUDA."""
    placement = result["placement"]
    return bool(
        result["outcome"] == "same"
        and placement["requested_provider"] == PROVIDERS[provider]
        and not placement["off_provider"]
        and any(text.startswith(DEFAULTS) for text in [*result["notes"], *result["not_judged"]]) is (provider == "cuda")
    )


@EACH_PROVIDER
@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows"])
def test_each_mode_is_same_and_a_wrong_scale_different(
    place: Path, tmp_path: Path, mode: str, provider: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    words = ("onnx", MODEL, "-a", place / "right", "--lora", mode, "-o", out, "--provider", provider)
    code, result = answer(capsys, *words)
    assert code == 0 and out.exists(), result
    given = ("--onnx-adapter", tmp_path / "right.onnx_adapter") if mode == "inputs" else ()
    judged = ("verify", out, "--model", MODEL, *given, "--provider", provider)
    code, result = answer(capsys, *judged, "-a", place / "right")
    assert code == 0 and proves(result, provider), result
    assert answer(capsys, *judged, "-a", place / "wrong")[0] == 4


@EACH_PROVIDER
def test_session_switches_adapters(place: Path, tmp_path: Path, provider: str) -> None:
    out = tmp_path / "graph.onnx"
    words = ("-a", place / "right", "-a", place / "wrong", "--lora", "inputs", "-o", out, "--provider", provider)
    assert call("onnx", MODEL, *words) == 0
    names = ("right", "wrong")
    session = Session(out, {name: tmp_path / f"{name}.onnx_adapter" for name in names}, provider=provider)
    fed = {"signal": np.random.default_rng(1).standard_normal((3, 4, 7)).astype(np.float32)}
    base, *both = (session.run(fed, adapter=name)["output_0"] for name in (None, *names))
    right, wrong = (answer - base for answer in both)
    assert np.abs(right).min() > 1e-3 and np.abs(wrong - right).max() > 1e-2
    assert session.run(fed)["output_0"].tobytes() == base.tobytes()


@EACH_PROVIDER
def test_adapter_trained_on_the_provider_is_merged_and_proven(
    tmp_path: Path, provider: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    signals = rng.standard_normal((64, 4, 9)).astype(np.float32)
    labels = (signals[:, 0].mean(1) > 0).astype(np.int64)
    np.savez(tmp_path / "data.npz", signal=signals, labels=labels)
    words = ("--data", tmp_path / "data.npz", "-o", tmp_path / "made", "--rank", "2", "--target", "linear1,head")
    assert call("train", MODEL, *words, "--epochs", "3", "--device", provider) == 0, capsys.readouterr().err
    assert call("onnx", MODEL, "-a", tmp_path / "made", "-o", tmp_path / "out.onnx", "--provider", provider) == 0


# --- environment probes ---


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
        ("import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 6)", "crashed with signal 40"),
        ("raise SystemExit(3)", "ended with code 3"),
        ("raise SystemExit", "ended with code 0"),
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
    fault = environment.import_package(package).fault
    assert fault == "does not import: did not end within 1 seconds"
    (problem,) = find_problems(replace(HEALTHY, packages=(replace(package, fault=fault),)))
    assert "less busy" in problem.remedy and "'import sleeper'" in problem.remedy and "pip" not in problem.remedy


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
