"""What is wrong with a machine, and the remedies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_export.runtime.environment import Driver, Provider
from lora_export.runtime.environment_problems import find_problems
from lora_export.runtime.providers import CPU, CUDA
from support.machines import HEALTHY, NO_DRIVER, ONE_GPU, WITHOUT_CUDA


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
