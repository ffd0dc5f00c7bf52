"""`lora-export doctor`: its exit code, its report and its JSON document."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace

import pytest

from lora_export.cli import doctor, run
from lora_export.runtime import environment
from lora_export.runtime.environment_probes import CUDA
from support.machines import HEALTHY, LIBRARIES, WITHOUT_CUDA, install, installed, this_machine


def pretend(monkeypatch: pytest.MonkeyPatch, facts: environment.Facts) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: facts)


@pytest.mark.slow
def test_doctor_without_problems_exits_0_with_one_json_document(monkeypatch, capsys):
    pretend(monkeypatch, this_machine(imported=True))
    assert run(["doctor", "--provider", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True and document["problems"] == []
    versions = {package["name"]: package["installed"] for package in document["packages"]}
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert {"torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "ml-dtypes", "transformers", "accelerate"} <= set(
        versions
    )


@pytest.mark.slow
@pytest.mark.fault(43)
def test_doctor_for_cuda_exits_0_only_where_cuda_runs(monkeypatch, capsys):
    pretend(monkeypatch, this_machine(imported=True))
    code = run(["doctor", "--provider", "cuda"])
    facts = this_machine(imported=True)
    runs = environment.Provider(CUDA) in facts.providers and bool(facts.torch_devices)
    assert code == (0 if runs else 6)
    assert runs or "CUDA" in capsys.readouterr().err


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
    assert run(["doctor", "-v"]) == 0
    out, err = capsys.readouterr()
    assert LIBRARIES[0] in out and "Nothing is wrong." in out and err == ""


@pytest.mark.fault(44)
def test_environment_variables_that_change_results_are_shown(monkeypatch, capsys):
    pretend(monkeypatch, replace(HEALTHY, settings={"NVIDIA_TF32_OVERRIDE": "1"}))
    assert run(["doctor"]) == 0
    assert "NVIDIA_TF32_OVERRIDE=1" in capsys.readouterr().out


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
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.29'" in out
