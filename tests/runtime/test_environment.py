"""`lora-export doctor`: one real examination of this machine, and invented facts for other machines."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from lora_export.cli import doctor, run
from lora_export.runtime import environment, environment_probes
from lora_export.runtime.environment_probes import ProbeResult
from lora_export.runtime.environment_problems import find_problems
from lora_export.runtime.providers import CPU, CUDA

NO_DRIVER = environment.Driver(fault="there is no NVIDIA driver (libcuda.so.1: cannot open shared object file)")
ONE_GPU = environment.Driver(cuda="13.0", gpus=1)
HEALTHY = environment.Facts(
    python="3.11.7",
    platform="Linux",
    packages=(
        environment.Package("onnxruntime-gpu", ">=1.24", "", "1.31.1"),
        environment.Package("torch", ">=2.10", "", "2.13"),
    ),
    onnxruntimes={"onnxruntime-gpu": "1.31.1"},
    onnxruntime_cuda="13.0",
    providers=(environment.Provider(CUDA), environment.Provider(CPU)),
    torch_cuda="13.0",
    torch_devices=("NVIDIA H100",),
    driver=ONE_GPU,
    settings={},
)
LIBRARIES = ("libcublasLt.so.13", "libcurand.so.10")
WITHOUT_CUDA = replace(
    HEALTHY,
    providers=(
        environment.Provider(CUDA, "missing: " + ", ".join(LIBRARIES), LIBRARIES),
        environment.Provider(CPU),
    ),
    torch_cuda="",
    torch_devices=(),
    driver=NO_DRIVER,
)


@pytest.fixture(scope="module")
def here() -> environment.Facts:
    """This machine, examined once."""
    return environment.examine()


def pretend(monkeypatch: pytest.MonkeyPatch, facts: environment.Facts) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: facts)


def install(site: Path, name: str, version: str, *files: str) -> None:
    """A distribution as pip installs it: metadata and a list of its files."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def installed(site: Path) -> list[Distribution]:
    return list(importlib.metadata.distributions(path=[str(site)]))


# --- this machine ---


def test_doctor_without_problems_exits_0_with_one_json_document(here, monkeypatch, capsys):
    pretend(monkeypatch, here)
    assert run(["doctor", "--provider", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True and document["problems"] == []
    versions = {package["name"]: package["installed"] for package in document["packages"]}
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert {"torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "ml-dtypes", "transformers", "accelerate"} <= set(
        versions
    )


def test_version_floors_come_from_the_installed_metadata(here):
    floors = {package.name: package.wanted for package in here.packages}
    lines = importlib.metadata.requires("lora-export") or []
    assert f"torch{floors['torch']}" in lines and f"onnx{floors['onnx']}" in lines


def test_cpu_provider_runs_the_small_model(here):
    assert environment.Provider(CPU) in here.providers


def test_provider_that_does_not_load_has_a_reason(here):
    assert [each for each in here.providers if each.fault == "no reason was given"] == []


@pytest.mark.fault(43)
def test_doctor_for_cuda_exits_0_only_where_cuda_runs(here, monkeypatch, capsys):
    pretend(monkeypatch, here)
    code = run(["doctor", "--provider", "cuda"])
    runs = environment.Provider(CUDA) in here.providers and bool(here.torch_devices)
    assert code == (0 if runs else 6)
    assert runs or "CUDA" in capsys.readouterr().err


@pytest.mark.cuda
def test_cuda_runs_the_small_model(here):
    assert environment.Provider(CUDA) in here.providers
    assert here.driver.gpus == len(here.torch_devices) > 0


# --- CUDA ---


@pytest.mark.fault(43)
def test_requested_cuda_exits_6_and_names_missing_libraries_and_wheels(monkeypatch, capsys):
    pretend(monkeypatch, WITHOUT_CUDA)
    assert run(["doctor", "--provider", "cuda"]) == 6
    out, err = capsys.readouterr()
    for library in LIBRARIES:
        assert library in out and library in err
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in out and "preload_dlls" in out
    assert "no NVIDIA driver" in out and "torch is built without CUDA" in out


def test_missing_cuda_without_a_gpu_is_no_problem(monkeypatch, capsys):
    pretend(monkeypatch, WITHOUT_CUDA)
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert LIBRARIES[0] in out and "Nothing is wrong." in out and err == ""


def test_cuda_must_load_beside_a_gpu_unless_cpu_is_requested():
    facts = replace(WITHOUT_CUDA, driver=ONE_GPU)
    assert [problem.what.split()[0] for problem in find_problems(facts)] == [CUDA, "torch"]
    assert find_problems(facts, "cpu") == ()
    assert find_problems(HEALTHY) == () == find_problems(HEALTHY, "cuda")


@pytest.mark.fault(43)
def test_cpu_build_of_onnxruntime_is_uninstalled_first():
    facts = replace(
        HEALTHY,
        onnxruntimes={"onnxruntime": "1.31.1"},
        onnxruntime_cuda="",
        providers=(environment.Provider(CPU),),
    )
    (problem,) = find_problems(facts, "cuda")
    assert "built without it" in problem.what
    assert problem.remedy.startswith("pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu")


@pytest.mark.fault(43)
def test_missing_driver_library_does_not_suggest_wheels():
    cuda = environment.Provider(CUDA, "missing: libcuda.so.1", ("libcuda.so.1",))
    facts = replace(HEALTHY, providers=(cuda, environment.Provider(CPU)), torch_devices=(), driver=NO_DRIVER)
    driver, *others = find_problems(facts, "cuda")
    assert "install the driver" in driver.remedy
    assert [problem.remedy for problem in others] == ["repair the driver first, then run doctor again"] * 2


@pytest.mark.fault(43)
def test_old_driver_is_reported_with_both_versions():
    (problem,) = find_problems(replace(HEALTHY, driver=environment.Driver(cuda="12.4", gpus=1)))
    assert "12.4" in problem.what and "13.0" in problem.what and problem.remedy == "update the driver"


@pytest.mark.fault(44)
def test_environment_variables_that_change_results_are_shown(monkeypatch, capsys):
    pretend(monkeypatch, replace(HEALTHY, settings={"NVIDIA_TF32_OVERRIDE": "1"}))
    assert run(["doctor"]) == 0
    assert "NVIDIA_TF32_OVERRIDE=1" in capsys.readouterr().out


# --- packages ---


def test_package_below_its_floor_exits_6_with_a_remedy(tmp_path, monkeypatch, capsys):
    install(tmp_path, "onnx", "1.17.0", "onnx/__init__.py")
    packages = environment.required_packages(["onnx>=1.21"], [], installed(tmp_path))
    pretend(monkeypatch, replace(HEALTHY, packages=packages))
    assert run(["doctor", "--json"]) == 6
    out, err = capsys.readouterr()
    (problem,) = json.loads(out)["problems"]
    assert problem["what"] == "onnx is 1.17.0, but lora-export needs >=1.21"
    assert problem["remedy"] == "pip install --upgrade 'onnx>=1.21'"
    assert problem["what"] in err


def test_local_and_newer_versions_meet_a_floor(tmp_path):
    install(tmp_path, "torch", "2.13.0+cu130", "torch/__init__.py")
    (package,) = environment.required_packages(["torch>=2.10"], [], installed(tmp_path))
    assert package.installed == "2.13.0+cu130" and package.fault == ""


def test_missing_package_of_an_extra_is_no_fault(tmp_path):
    lines = ["numpy>=2.0", "transformers>=5.24; extra == 'hf'", "pytest>=8; extra == 'dev'"]
    numpy, transformers = environment.required_packages(lines, ["hf", "dev"], installed(tmp_path))
    assert numpy.fault == "is not installed"
    assert (transformers.extra, transformers.fault) == ("hf", "")


def test_requirement_of_another_platform_is_ignored(tmp_path):
    assert (
        environment.required_packages(["onnxruntime>=1.24; sys_platform == 'amiga'"], ["hf"], installed(tmp_path)) == ()
    )


@pytest.mark.fault(43)
def test_two_onnxruntimes_are_a_problem_with_a_remedy(tmp_path, monkeypatch, capsys):
    for flavour in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path, flavour, "1.31.1", "onnxruntime/__init__.py")
    install(tmp_path, "onnxruntime-genai", "0.12.0", "onnxruntime_genai/__init__.py")
    both = environment.distributions_of("onnxruntime", installed(tmp_path))
    assert both == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    pretend(monkeypatch, replace(HEALTHY, onnxruntimes=both))
    assert run(["doctor"]) == 6
    out = capsys.readouterr().out
    assert "installed over each other" in out
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.24'" in out


def test_any_onnxruntime_distribution_meets_the_requirement(tmp_path):
    install(tmp_path, "onnxruntime-directml", "1.26.0", "onnxruntime/__init__.py")
    (package,) = environment.required_packages(["onnxruntime-gpu>=1.24"], [], installed(tmp_path))
    assert (package.name, package.installed, package.fault) == ("onnxruntime-directml", "1.26.0", "")
    assert package.module == "onnxruntime"


def test_distribution_without_a_file_list_is_known_by_name(tmp_path):
    install(tmp_path, "onnxruntime", "1.26.0")
    (tmp_path / "onnxruntime-1.26.0.dist-info" / "RECORD").unlink()
    assert environment.distributions_of("onnxruntime", installed(tmp_path)) == {"onnxruntime": "1.26.0"}


def test_remains_of_an_interrupted_pip_are_ignored(tmp_path):
    (tmp_path / "~umpy-2.0.0.dist-info").mkdir()
    (remains,) = installed(tmp_path)
    assert environment.name_of(remains) == ""


# --- tried in child processes ---


def module(site: Path, name: str, source: str) -> environment.Package:
    (site / f"{name}.py").write_text(source)
    return environment.Package(name, ">=1", "", "1.0")


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
    monkeypatch.setattr(environment_probes, "TIMEOUT", 1)
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
    assert environment.try_provider(CPU) == environment.Provider(CPU, "crashed with SIGSEGV")
    facts = replace(HEALTHY, providers=(environment.Provider(CPU, "crashed with SIGSEGV"),), driver=NO_DRIVER)
    (problem,) = find_problems(facts)
    assert problem.what == f"{CPU} does not load (crashed with SIGSEGV)"
