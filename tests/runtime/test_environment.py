"""`lora-export doctor`: one real examination of this machine, and invented ones for what is wrong elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from lora_export.cli import doctor, run
from lora_export.runtime import environment

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
    providers=(environment.Provider(environment.CUDA), environment.Provider(environment.CPU)),
    torch_cuda="13.0",
    torch_devices=("NVIDIA H100",),
    driver=ONE_GPU,
    settings={},
)
LIBRARIES = ("libcublasLt.so.13", "libcurand.so.10")
WITHOUT_CUDA = replace(
    HEALTHY,
    providers=(
        environment.Provider(environment.CUDA, "missing: " + ", ".join(LIBRARIES), LIBRARIES),
        environment.Provider(environment.CPU),
    ),
    torch_cuda="",
    torch_devices=(),
    driver=NO_DRIVER,
)


@pytest.fixture(scope="module")
def here() -> environment.Facts:
    """This machine, really examined, once."""
    return environment.examine()


def pretend(monkeypatch: pytest.MonkeyPatch, facts: environment.Facts) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: facts)


def install(site: Path, name: str, version: str, *files: str) -> None:
    """A distribution as pip leaves it: metadata, and a list of the files that it put there."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def installed(site: Path) -> list[Distribution]:
    return list(importlib.metadata.distributions(path=[str(site)]))


# --- this machine ---


def test_a_machine_where_nothing_is_wrong_ends_with_0_and_one_json_document(here, monkeypatch, capsys):
    pretend(monkeypatch, here)
    assert run(["doctor", "--provider", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True and document["problems"] == []
    versions = {package["name"]: package["installed"] for package in document["packages"]}
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert {"torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "ml-dtypes", "transformers", "accelerate"} <= set(
        versions
    )


def test_the_floors_are_those_of_the_installed_metadata(here):
    floors = {package.name: package.wanted for package in here.packages}
    lines = importlib.metadata.requires("lora-export") or []
    assert f"torch{floors['torch']}" in lines and f"onnx{floors['onnx']}" in lines


def test_the_cpu_provider_really_runs_the_small_model(here):
    assert environment.Provider(environment.CPU) in here.providers


def test_a_provider_that_does_not_load_here_says_why(here):
    assert [each for each in here.providers if each.fault == "left out without a word"] == []


@pytest.mark.fault(43)
def test_asking_for_cuda_ends_with_0_exactly_where_cuda_really_runs(here, monkeypatch, capsys):
    pretend(monkeypatch, here)
    code = run(["doctor", "--provider", "cuda"])
    runs = environment.Provider(environment.CUDA) in here.providers and bool(here.torch_devices)
    assert code == (0 if runs else 6)
    assert runs or "CUDA" in capsys.readouterr().err


@pytest.mark.cuda
def test_cuda_runs_the_small_model(here):
    assert environment.Provider(environment.CUDA) in here.providers
    assert here.driver.gpus == len(here.torch_devices) > 0


# --- CUDA ---


@pytest.mark.fault(43)
def test_cuda_that_was_asked_for_ends_with_6_and_names_the_libraries_and_where_they_come_from(monkeypatch, capsys):
    pretend(monkeypatch, WITHOUT_CUDA)
    assert run(["doctor", "--provider", "cuda"]) == 6
    out, err = capsys.readouterr()
    for library in LIBRARIES:
        assert library in out and library in err
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in out and "preload_dlls" in out
    assert "no NVIDIA driver" in out and "torch is built without CUDA" in out


def test_without_a_gpu_missing_cuda_is_information(monkeypatch, capsys):
    pretend(monkeypatch, WITHOUT_CUDA)
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert LIBRARIES[0] in out and "Nothing is wrong." in out and err == ""


def test_with_a_gpu_cuda_must_load_unless_cpu_was_asked_for():
    facts = replace(WITHOUT_CUDA, driver=ONE_GPU)
    assert [problem.what.split()[0] for problem in environment.problems(facts)] == [environment.CUDA, "torch"]
    assert environment.problems(facts, "cpu") == ()
    assert environment.problems(HEALTHY) == () == environment.problems(HEALTHY, "cuda")


@pytest.mark.fault(43)
def test_a_cpu_build_of_onnxruntime_is_to_be_replaced_not_joined():
    facts = replace(
        HEALTHY,
        onnxruntimes={"onnxruntime": "1.31.1"},
        onnxruntime_cuda="",
        providers=(environment.Provider(environment.CPU),),
    )
    (problem,) = environment.problems(facts, "cuda")
    assert "built without it" in problem.what
    assert problem.remedy.startswith("pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu")


@pytest.mark.fault(43)
def test_where_only_the_driver_s_library_is_missing_no_wheels_are_advised():
    cuda = environment.Provider(environment.CUDA, "missing: libcuda.so.1", ("libcuda.so.1",))
    facts = replace(
        HEALTHY, providers=(cuda, environment.Provider(environment.CPU)), torch_devices=(), driver=NO_DRIVER
    )
    driver, *others = environment.problems(facts, "cuda")
    assert "install the driver" in driver.remedy
    assert [problem.remedy for problem in others] == ["solve the driver first, then ask again"] * 2


@pytest.mark.fault(43)
def test_a_driver_too_old_for_the_build_is_named_with_both_versions():
    (problem,) = environment.problems(replace(HEALTHY, driver=environment.Driver(cuda="12.4", gpus=1)))
    assert "12.4" in problem.what and "13.0" in problem.what and problem.remedy == "update the driver"


@pytest.mark.fault(44)
def test_environment_variables_that_change_results_are_shown(monkeypatch, capsys):
    pretend(monkeypatch, replace(HEALTHY, settings={"NVIDIA_TF32_OVERRIDE": "1"}))
    assert run(["doctor"]) == 0
    assert "NVIDIA_TF32_OVERRIDE=1" in capsys.readouterr().out


# --- packages ---


def test_a_package_below_its_floor_ends_with_6_and_says_what_to_install(tmp_path, monkeypatch, capsys):
    install(tmp_path, "onnx", "1.17.0", "onnx/__init__.py")
    packages = environment.compare(["onnx>=1.21"], [], installed(tmp_path))
    pretend(monkeypatch, replace(HEALTHY, packages=packages))
    assert run(["doctor", "--json"]) == 6
    out, err = capsys.readouterr()
    (problem,) = json.loads(out)["problems"]
    assert problem["what"] == "onnx is 1.17.0, and lora-export wants >=1.21"
    assert problem["remedy"] == "pip install --upgrade 'onnx>=1.21'"
    assert problem["what"] in err


def test_local_and_newer_versions_meet_a_floor(tmp_path):
    install(tmp_path, "torch", "2.13.0+cu130", "torch/__init__.py")
    (package,) = environment.compare(["torch>=2.10"], [], installed(tmp_path))
    assert package.installed == "2.13.0+cu130" and package.fault == ""


def test_what_is_missing_is_a_fault_only_where_everybody_needs_it(tmp_path):
    lines = ["numpy>=2.0", "transformers>=5.24; extra == 'hf'", "pytest>=8; extra == 'dev'"]
    numpy, transformers = environment.compare(lines, ["hf", "dev"], installed(tmp_path))
    assert numpy.fault == "is not installed"
    assert (transformers.extra, transformers.fault) == ("hf", "")


def test_a_requirement_of_another_platform_is_left_out(tmp_path):
    assert environment.compare(["onnxruntime>=1.24; sys_platform == 'amiga'"], ["hf"], installed(tmp_path)) == ()


@pytest.mark.fault(43)
def test_two_flavours_of_onnxruntime_are_a_clobber_and_one_is_to_be_reinstalled(tmp_path, monkeypatch, capsys):
    for flavour in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path, flavour, "1.31.1", "onnxruntime/__init__.py")
    install(tmp_path, "onnxruntime-genai", "0.12.0", "onnxruntime_genai/__init__.py")
    both = environment.holders("onnxruntime", installed(tmp_path))
    assert both == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    pretend(monkeypatch, replace(HEALTHY, onnxruntimes=both))
    assert run(["doctor"]) == 6
    out = capsys.readouterr().out
    assert "installed over each other" in out
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.24'" in out


def test_any_flavour_of_onnxruntime_meets_the_requirement(tmp_path):
    install(tmp_path, "onnxruntime-directml", "1.26.0", "onnxruntime/__init__.py")
    (package,) = environment.compare(["onnxruntime-gpu>=1.24"], [], installed(tmp_path))
    assert (package.name, package.installed, package.fault) == ("onnxruntime-directml", "1.26.0", "")
    assert package.module == "onnxruntime"


def test_a_distribution_without_a_list_of_files_is_known_by_its_name(tmp_path):
    install(tmp_path, "onnxruntime", "1.26.0")
    (tmp_path / "onnxruntime-1.26.0.dist-info" / "RECORD").unlink()
    assert environment.holders("onnxruntime", installed(tmp_path)) == {"onnxruntime": "1.26.0"}


def test_the_remains_of_an_interrupted_pip_are_passed_over(tmp_path):
    (tmp_path / "~umpy-2.0.0.dist-info").mkdir()
    (remains,) = installed(tmp_path)
    assert environment.name_of(remains) == ""


# --- trying ---


def module(site: Path, name: str, source: str) -> environment.Package:
    (site / f"{name}.py").write_text(source)
    return environment.Package(name, ">=1", "", "1.0")


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import a_module_that_nobody_has", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("raise RuntimeError('built for another ABI')", "RuntimeError: built for another ABI"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("raise SystemExit(3)", "ended with code 3"),
    ],
)
def test_a_package_that_is_installed_but_broken_is_a_line_of_the_report(source, fault, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = module(tmp_path, "broken", source)
    outcome = environment.try_package(package)
    assert outcome.fault == f"does not import: {fault}"
    (problem,) = environment.problems(replace(HEALTHY, packages=(replace(package, fault=outcome.fault),)))
    assert problem.what == f"broken does not import: {fault}" and "pip check" in problem.remedy


def test_a_package_that_prints_on_import_does_not_garble_the_answer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = module(tmp_path, "chatty", "import os; print('hello'); os.write(1, b'from C\\n')")
    outcome = environment.try_package(package)
    assert outcome.fault == "" and "hello" in outcome.words


def test_a_package_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "PATIENCE", 1)
    package = module(tmp_path, "sleeper", "import time; time.sleep(30)")
    assert environment.try_package(package).fault == "does not import: no answer within 1 seconds"


RIGHT = {"listed": [environment.CUDA, environment.CPU], "placed": [environment.CUDA], "square": [[7, 10], [15, 22]]}
LEFT_OUT = RIGHT | {"listed": [environment.CPU], "placed": [environment.CPU]}
LOADER = (
    "\x1b[1;31m2026 [E:onnxruntime:Default, bridge.cc:1 operator()] FAIL : Failed to load libx_cuda.so with error: "
)


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("answer", "words", "fault"),
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
        (LEFT_OUT, "", "left out without a word"),
        (RIGHT | {"placed": [environment.CPU]}, "", f"it loads, but the model ran on {environment.CPU}"),
        (RIGHT | {"square": [[1, 4], [9, 16]]}, "", "it computes [[1, 2], [3, 4]]² as [[1, 4], [9, 16]]"),
    ],
)
def test_a_provider_loads_only_where_it_is_listed_ran_the_node_and_computed_it(answer, words, fault, monkeypatch):
    monkeypatch.setattr(doctor, "in_child", lambda *_: environment.Outcome(answer, words=words))
    assert environment.try_provider(environment.CUDA).fault == fault


@pytest.mark.fault(43)
def test_a_provider_that_crashes_is_a_line_of_the_report(monkeypatch):
    monkeypatch.setattr(doctor, "in_child", lambda *_: environment.Outcome({}, "crashed with SIGSEGV"))
    assert environment.try_provider(environment.CPU) == environment.Provider(environment.CPU, "crashed with SIGSEGV")
    facts = replace(
        HEALTHY, providers=(environment.Provider(environment.CPU, "crashed with SIGSEGV"),), driver=NO_DRIVER
    )
    (problem,) = environment.problems(facts)
    assert problem.what == f"{environment.CPU} does not load (crashed with SIGSEGV)"
