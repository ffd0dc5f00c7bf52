"""What is installed here, and what is required."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace

import pytest

from lora_export.runtime import environment
from lora_export.runtime.environment import Driver, Provider, find_problems
from lora_export.runtime.environment_probes import CPU, CUDA
from support.machines import HEALTHY, NO_DRIVER, ONE_GPU, WITHOUT_CUDA, install, installed, this_machine


def test_version_floors_come_from_the_installed_metadata():
    floors = {package.name: package.wanted for package in this_machine().packages}
    lines = importlib.metadata.requires("lora-export") or []
    assert f"torch{floors['torch']}" in lines and f"onnx{floors['onnx']}" in lines


def test_cpu_provider_runs_the_small_model():
    assert environment.Provider(CPU) in this_machine().providers


def test_provider_that_does_not_load_has_a_reason():
    assert [each for each in this_machine().providers if each.fault == "no reason was given"] == []


@pytest.mark.cuda
def test_cuda_runs_the_small_model():
    assert environment.Provider(CUDA) in this_machine().providers
    assert this_machine().driver.gpus == len(this_machine().torch_devices) > 0


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


def test_any_onnxruntime_distribution_meets_the_requirement(tmp_path):
    install(tmp_path, "onnxruntime-directml", "1.26.0", "onnxruntime/__init__.py")
    (package,) = environment.required_packages(["onnxruntime-gpu>=1.24"], [], installed(tmp_path))
    assert (package.name, package.installed, package.fault) == ("onnxruntime-directml", "1.26.0", "")
    assert package.module == "onnxruntime"
    (package,) = environment.required_packages(["pyyaml>=6.0"], [], installed(tmp_path))
    assert package.module == "yaml"


def test_distribution_without_a_file_list_is_known_by_name(tmp_path):
    install(tmp_path, "onnxruntime", "1.26.0")
    (tmp_path / "onnxruntime-1.26.0.dist-info" / "RECORD").unlink()
    assert environment.distributions_of("onnxruntime", installed(tmp_path)) == {"onnxruntime": "1.26.0"}


def test_remains_of_an_interrupted_pip_are_ignored(tmp_path):
    (tmp_path / "~umpy-2.0.0.dist-info").mkdir()
    (remains,) = installed(tmp_path)
    assert environment.name_of(remains) == ""


def test_module_of_every_installed_package_is_known_by_name():
    packages = [package for package in this_machine().packages if package.installed]
    assert {"pillow", "pyyaml"} <= {package.name for package in packages}
    assert [package.name for package in packages if importlib.util.find_spec(package.module) is None] == []


# --- environment problems ---


def test_cuda_must_load_beside_a_gpu_unless_cpu_is_requested():
    facts = replace(WITHOUT_CUDA, driver=ONE_GPU)
    assert [problem.what.split()[0] for problem in find_problems(facts)] == [CUDA, "torch"]
    assert find_problems(facts, "cpu") == ()
    assert find_problems(HEALTHY) == () == find_problems(HEALTHY, "cuda")


@pytest.mark.fault(43)
def test_cpu_build_of_onnxruntime_is_uninstalled_first():
    facts = replace(
        HEALTHY,
        owners={"lora-export": "0.1.0"},
        onnxruntimes={"onnxruntime": "1.31.1"},
        onnxruntime_cuda="",
        providers=(Provider(CPU),),
    )
    (problem,) = find_problems(facts, "cuda")
    assert "built without it" in problem.what
    assert problem.remedy.startswith("pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu")


@pytest.mark.fault(43)
def test_missing_driver_library_does_not_suggest_wheels():
    cuda = Provider(CUDA, "missing: libcuda.so.1", ("libcuda.so.1",))
    facts = replace(HEALTHY, providers=(cuda, Provider(CPU)), torch_devices=(), driver=NO_DRIVER)
    driver, *others = find_problems(facts, "cuda")
    assert "install the driver" in driver.remedy
    assert [problem.remedy for problem in others] == ["repair the driver first, then run doctor again"] * 2


@pytest.mark.fault(43)
def test_old_driver_is_reported_with_both_versions():
    (problem,) = find_problems(replace(HEALTHY, driver=Driver(cuda="12.4", gpus=1)))
    assert "12.4" in problem.what and "13.0" in problem.what and problem.remedy == "update the driver"
