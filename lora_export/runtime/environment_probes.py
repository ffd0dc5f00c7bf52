"""The execution providers, the variables that change results, and probes of packages, providers and the driver.

Each probe is run in a process of its own. A package that crashes, hangs or writes to stderr from C++ becomes a result
with a fault, and its stderr gives the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_export.isolation.bounds import signal_name

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}  # `provider` -> onnxruntime's name

ARITHMETIC_VARIABLES = {
    "NVIDIA_TF32_OVERRIDE": "0 turns TF32 off and 1 turns it on in every CUDA library, whatever the program asks for",
    "ORT_CUDA_GEMM_OPTIONS": "changes how onnxruntime multiplies matrices on CUDA",
}
VARIABLES = {"CUDA_VISIBLE_DEVICES": "the GPUs that programs may see", **ARITHMETIC_VARIABLES}  # name -> effect


# --- probes ---

DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
PROBE_TIMEOUT = 120  # seconds for one probe
TIMED_OUT = "did not end within"


@dataclass(frozen=True)
class ProbeResult:
    """What a child process found, why it found nothing, and what it wrote to stderr."""

    found: Mapping[str, Any]
    fault: str = ""
    stderr: str = ""


def run_in_child(probe: Callable[..., dict[str, Any]], *arguments: str) -> ProbeResult:
    """Run a function of this file in a new interpreter that imports from the same folders."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from lora_export.runtime import environment_probes as probes; "
        f"probes.print_result(probes.{probe.__name__}, *sys.argv[2:])"
    )
    line = [sys.executable, "-P", "-c", code, json.dumps(sys.path), *arguments]
    try:
        child = subprocess.run(
            line, capture_output=True, text=True, errors="replace", timeout=PROBE_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return ProbeResult({}, f"{TIMED_OUT} {PROBE_TIMEOUT} seconds")
    if child.returncode < 0:
        return ProbeResult({}, f"crashed with {signal_name(-child.returncode)}")
    if child.returncode or not child.stdout:  # a package may end the process when it is imported
        return ProbeResult({}, f"ended with code {child.returncode}", child.stderr)
    fault, found = json.loads(child.stdout.splitlines()[-1])
    return ProbeResult(found, fault, child.stderr)


def print_result(probe: Callable[..., dict[str, Any]], *arguments: str) -> None:
    """Run a probe in the child, and print its fault and what it found as the last line of stdout."""
    fault, found = "", {}
    with contextlib.redirect_stdout(sys.stderr):  # onnxruntime prints why a provider failed
        try:
            found = probe(*arguments)
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything
            fault = f"{type(error).__name__}: {error}"
    print(json.dumps([fault, found]))


# --- run in the child ---------------------------------------------------------------------------


def probe_package(module: str) -> dict[str, Any]:
    """Import a module."""
    importlib.import_module(module)
    return {}


def probe_torch() -> dict[str, Any]:
    """The CUDA that torch was built for, and the GPUs that it can use."""
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {"cuda": torch.version.cuda or "", "devices": [torch.cuda.get_device_name(device) for device in devices]}


def probe_onnxruntime() -> dict[str, Any]:
    """The CUDA that onnxruntime was built for, and its providers."""
    import onnxruntime

    return {"cuda": onnxruntime.cuda_version or "", "providers": onnxruntime.get_available_providers()}


def probe_driver() -> dict[str, Any]:
    """The driver's own CUDA version and GPUs: torch and onnxruntime may both be CPU builds beside a GPU."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        return {"fault": f"there is no NVIDIA driver ({error})"}
    version, gpus = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"  # 13000 is CUDA 13.0
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(gpus))
    if code:
        return {"cuda": cuda, "fault": f"the NVIDIA driver returns error {code}"}
    return {"cuda": cuda, "gpus": gpus.value, "fault": "" if gpus.value else "the NVIDIA driver sees no GPU"}


def probe_provider(provider: str) -> dict[str, Any]:
    """Run one MatMul of integers: the providers of the session, the one that ran the node, and the product."""
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


# --- reasons in stderr --------------------------------------------------------------------------


def missing_libraries(stderr: str) -> tuple[str, ...]:
    """The shared libraries that the loader did not find, each once, in its order."""
    found = re.findall(r'([\w.+-]+\.so[\w.]*): cannot open shared|depends on "([^"]+)" which is missing', stderr)
    return tuple(dict.fromkeys(linux or windows for linux, windows in found))


def last_error_line(stderr: str) -> str:
    """The last line with an error, without colours and onnxruntime's prefix of time and source line."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", stderr).splitlines()
    last = next((line for line in reversed(lines) if re.search("error|fail", line, re.I)), "no reason was given")
    return re.sub(r"^[\d: .-]+\[[EWF]:[^]]*\] ", "", last.strip())
