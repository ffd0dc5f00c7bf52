"""A merge on a GPU, by PyTorch: the same as by NumPy, and exit code 6 where there is no GPU.

All of the code but the CUDA runtime runs here on the processor, which is a device of PyTorch too.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

from lora_export import cli, formats, sums
from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.storage import block_copy
from lora_export.storage.manifest import read_manifest
from lora_export.weights import apply_step
from lora_export.weights import cuda as device
from lora_export.weights.apply_step import Backend, StepRows
from lora_export.weights.merge_report import Statistics, StepResult
from support.handmade import base_file, graph_file, peft_adapter
from support.merges import (
    Convolutions,
    Net,
    dora,
    merged,
    merged_by_both,
    nearly_the_same_bits,
    same_bits,
    sixty_fourths,
    trained,
)
from support.tiny_models import tiny_gpt2

CPU = torch.device("cpu")
A, B = [[1, 2, 3]], [[1], [10]]


def by_torch(**parts: Any) -> Backend:
    """What `--device cuda` computes with, on the processor."""
    return device.backend(CPU, name="the processor, by PyTorch", **parts)


@pytest.fixture
def numpy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy changes no weight, so that only the device can have made the output."""

    def fail(_: StepRows) -> Any:
        raise AssertionError("the device should have changed these rows")

    monkeypatch.setattr(apply_step, "apply_by_numpy", fail)


def assert_same_figures(one: StepResult, other: StepResult) -> None:
    assert (one.weight, one.changed, one.elements) == (other.weight, other.changed, other.elements)
    for figure in ("relative_change", "retention", "noise"):
        assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=1e-5, abs=1e-7), figure


# --- the same as NumPy and PEFT ---


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, {"r": 16, "lora_alpha": 8}),
        (torch.bfloat16, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
        (torch.float16, {"r": 2, "lora_alpha": 1, "rank_pattern": {"square": 8}, "alpha_pattern": {"square": 3}}),
        (torch.bfloat16, {"r": 4, "lora_alpha": 4, "target_modules": ["up", "square"], "lora_bias": True}),
        (
            torch.float16,
            {"r": 4, "lora_alpha": 4, "target_modules": ["square"], "bias": "lora_only", "modules_to_save": ["down"]},
        ),
    ],
)
def test_exact_sums_equal_pefts_bit_for_bit(tmp_path, dtype, config):
    torch.manual_seed(0)
    net = Net().to(dtype)
    save_tensors(net.state_dict(), tmp_path / "base.safetensors")
    model = trained(net, sixty_fourths, **{"target_modules": ["up", "square", "down"], **config})
    model.save_pretrained(tmp_path / "adapter")
    inputs = tmp_path / "base.safetensors", tmp_path / "adapter"
    layout = {"*": "out_in"}
    theirs = merged(*inputs, tmp_path / "numpy", layout=layout)
    ours = merged(*inputs, tmp_path / "out", backend=by_torch(), layout=layout)
    assert same_bits(load_tensors(tmp_path / "out/model.safetensors"), model.merge_and_unload().state_dict())
    assert len(ours.results) == len(theirs.results) > 0
    for one, other in zip(ours.results, theirs.results, strict=True):
        assert_same_figures(one, other)


@pytest.mark.parametrize(
    ("what", "use_dora", "block"),
    [
        *(
            (what, use_dora, 100)
            for what in ("linear layers", "convolutions", "matrices stored (in, out) and embeddings")
            for use_dora in (False, True)
        ),
        ("linear layers", True, block_copy.BLOCK),
        ("convolutions", False, block_copy.BLOCK),
    ],
)
def test_every_weight_with_a_pair_is_changed_on_the_device(tmp_path, monkeypatch, numpy_fails, what, use_dora, block):
    monkeypatch.setattr(block_copy, "BLOCK", block)
    torch.manual_seed(0)
    net: nn.Module
    if what == "convolutions":
        net, targets = Convolutions(), ["one", "two", "three", "point"]
    elif what == "linear layers":
        net, targets = Net(), ["up", "down"]
    else:
        net, targets = tiny_gpt2(tie_word_embeddings=False), ["c_attn", "c_proj", "wte", "wpe"]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    model = dora(net, **options) if use_dora else trained(net, sixty_fourths, **options)
    report, ours, theirs = merged_by_both(tmp_path, net, model, backend=by_torch())
    changed = nearly_the_same_bits(ours, theirs, net.state_dict())
    assert changed == {result.weight for result in report.results}
    assert use_dora or same_bits(ours, theirs)
    assert all(result.retention == pytest.approx(1, abs=1e-4) for result in report.results)


def test_two_adapters_are_summed_before_the_one_rounding(tmp_path, numpy_fails):
    # In bf16 256 + 1 is 256, twice; 256 + 2 is 258.
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": [[256.0]]}, ml_dtypes.bfloat16)
    adapters = [
        peft_adapter(tmp_path / "one", {"fc": ([[1]], [[1]])}),
        peft_adapter(tmp_path / "two", {"fc": ([[2]], [[1]])}),
    ]
    merged(base, adapters, tmp_path / "out", strengths=(1, 0.5), backend=by_torch())
    assert load_file(tmp_path / "out/model.safetensors")["fc.weight"].tolist() == [[258]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_sum_is_rounded_once_to_the_requested_dtype(tmp_path, stored, dtype):
    rng = np.random.default_rng(0)
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": rng.standard_normal((50, 40))}, stored)
    exact = rng.integers(-63, 64, (2, 4, 50)) / 64
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (exact[0][:, :40], exact[1].T)})
    merged(base, adapter, tmp_path / "out", dtype=dtype, backend=by_torch(), min_retention=0)
    weight = load_file(base)["fc.weight"].astype(np.float32)
    expected = (weight + np.float32(exact[1].T @ exact[0][:, :40])).astype(dtype)
    assert load_file(tmp_path / "out/model.safetensors")["fc.weight"].tobytes() == expected.tobytes()


def ulp(values: NDArray[Any]) -> NDArray[np.float64]:
    """The step of the type at each value, away from zero."""
    sizes = np.abs(values)
    return np.nextafter(sizes, np.array(math.inf, values.dtype)).astype(np.float64) - sizes.astype(np.float64)


def assert_within_bound(tmp_path: Path, backend: Backend, dtype: Any, *, cancel: bool) -> None:
    """See the docstring of `cuda.py`. With `cancel`, W is -ΔW, rounded, so that only rounding is left."""
    rng, rank, scale = np.random.default_rng(1), 32, 3.0
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((rank, 300), (200, rank)))
    change = scale * (b.astype(np.float64) @ a)
    weight = -change if cancel else 20 * rng.standard_normal((200, 300))
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": weight}, dtype)
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (a, b)}, lora_alpha=scale * rank)
    for name, options in (("numpy", {}), ("device", {"backend": backend})):
        merged(base, adapter, tmp_path / name, min_retention=0, **options)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors")["fc.weight"] for name in ("numpy", "device"))
    before = load_file(base)["fc.weight"].astype(np.float64)
    sums = np.abs(before) + scale * (np.abs(b).astype(np.float64) @ np.abs(a))
    order = 2 * (rank + 1) * 2.0**-24 * sums
    apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    assert (apart <= order + np.maximum(ulp(ours), ulp(theirs)) * (apart > 0)).all()
    assert (np.abs(ours.astype(np.float64) - (before + change)) <= order + ulp(ours) / 2).all()
    if not cancel and dtype != np.float32:
        assert (ours == theirs).mean() > 0.99


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_arbitrary_values_equal_numpys_within_the_documented_bound(tmp_path, dtype, cancel):
    assert_within_bound(tmp_path, by_torch(), dtype, cancel=cancel)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_merge_on_the_device_passes_verify(tmp_path, dtype):
    rng = np.random.default_rng(2)
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": rng.standard_normal((200, 300))}, dtype)
    pair = 0.1 * rng.standard_normal((8, 300)), rng.standard_normal((200, 8))
    adapter = peft_adapter(tmp_path / "adapter", {"fc": pair}, lora_alpha=3)
    merged(base, adapter, tmp_path / "out", backend=by_torch())
    assert cli.run(["verify", str(tmp_path / "out/model.safetensors"), "--base", str(base), "-a", str(adapter)]) == 0


# --- what the device does not do ---


def test_numpy_changes_what_the_device_does_not(tmp_path, monkeypatch):
    done: list[str] = []
    apply_by_numpy = apply_step.apply_by_numpy

    def recorded(part: StepRows) -> Statistics | None:
        done.append(part.step.weight)
        return apply_by_numpy(part)

    monkeypatch.setattr(apply_step, "apply_by_numpy", recorded)
    tensors = {"fc.weight": np.ones((2, 3)), "head.weight": np.ones((4, 3)), "both.weight": np.ones((2, 3))}
    wide = {"wide.weight": np.ones((2, 3), np.float64)}
    base = tmp_path / "base.safetensors"
    save_file({name: value.astype(np.float32) for name, value in tensors.items()} | wide, base)
    pairs = dict.fromkeys(("fc", "wide", "both"), (A, B))
    replaced = {"head.weight": np.full((4, 3), 2.0), "both.weight": np.full((2, 3), 5.0)}
    report = merged(base, peft_adapter(tmp_path / "adapter", pairs, replaced), tmp_path / "out", backend=by_torch())
    assert sorted(done) == ["both.weight", "head.weight", "wide.weight"]
    ours = load_file(tmp_path / "out/model.safetensors")
    assert {name: (value.tolist(), value.dtype) for name, value in ours.items()} == {
        "fc.weight": ([[2, 3, 4], [11, 21, 31]], np.float32),
        "wide.weight": ([[2, 3, 4], [11, 21, 31]], np.float64),
        "both.weight": ([[6, 7, 8], [15, 25, 35]], np.float32),
        "head.weight": ([[2] * 3] * 4, np.float32),
    }
    assert {result.weight for result in report.results} == {f"{name}.weight" for name in pairs}


# --- refusals have the text of NumPy's ---


@pytest.mark.parametrize(
    ("weight", "dtype", "options"),
    [
        ([[60000.0, 1.0]], np.float16, {}),  # a sum that the type cannot hold
        ([[math.nan, 1.0]], np.float32, {}),
        ([[256.0, 1024.0]], ml_dtypes.bfloat16, {"min_retention": 0.9}),
        ([[-10000.0, -10000.0]], np.float32, {"use_dora": True}),  # an output of DoRA's without a direction
    ],
)
def test_refusals_have_the_same_text_as_by_numpy(tmp_path, weight, dtype, options):
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": weight}, dtype)
    small = dtype == ml_dtypes.bfloat16
    config = {"use_dora": True} if options.pop("use_dora", False) else {}
    adapter = peft_adapter(tmp_path / "adapter", {"fc": ([[1, 1]], [[0.9 if small else 10000]])}, **config)
    if config:
        file = adapter / "adapter_model.safetensors"
        lengths = {"base_model.model.fc.lora_magnitude_vector": np.ones(1, np.float32)}
        save_file(load_file(file) | lengths, file)
    messages = []
    for name, backend in (("numpy", None), ("device", by_torch())):
        with pytest.raises(InputRefused) as refusal:
            merged(base, adapter, tmp_path / name, backend=backend, **options)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1] and "fc.weight" in messages[0]


def test_errors_of_cuda_are_environment_errors(tmp_path, monkeypatch):
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": np.ones((2, 3))})
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (A, B)})

    def broken(error: Exception) -> Any:
        def fail(*_: Any) -> Any:
            raise error

        return fail

    monkeypatch.setattr(torch, "mm", broken(RuntimeError("CUDA error: an illegal memory access\nsee CUDA_LAUNCH")))
    with pytest.raises(EnvironmentLacking, match=r"^fc\.weight: CUDA error: an illegal memory access\. `lora-"):
        merged(base, adapter, tmp_path / "one", backend=by_torch())
    monkeypatch.setattr(torch, "mm", broken(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):  # which the command line knows
        merged(base, adapter, tmp_path / "two", backend=by_torch())
    monkeypatch.setattr(torch, "mm", broken(RuntimeError("a bug of ours")))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        merged(base, adapter, tmp_path / "three", backend=by_torch())


# --- memory, streams and factors ---


class Queue:
    """A stream that records its thread and how often it was waited for."""

    made: list[Queue]

    def __init__(self) -> None:
        self.thread, self.waited = threading.get_ident(), 0
        Queue.made.append(self)

    def synchronize(self) -> None:
        assert self.thread == threading.get_ident() and Queue.inside[self.thread] is self
        self.waited += 1

    inside: dict[int, Queue | None]

    @staticmethod
    @contextlib.contextmanager
    def entered(queue: Queue) -> Iterator[None]:
        thread = threading.get_ident()
        assert queue.thread == thread and Queue.inside.get(thread) is None
        Queue.inside[thread] = queue
        yield
        Queue.inside[thread] = None


def test_each_thread_has_its_own_stream(tmp_path, monkeypatch):
    Queue.made, Queue.inside = [], {}
    buffers: list[int] = []

    def memory(count: int) -> NDArray[np.uint8]:
        buffers.append(count)
        return np.empty(count, np.uint8)

    monkeypatch.setattr(block_copy, "BLOCK", 400)
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": np.ones((300, 50))})
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (np.ones((2, 50)), np.ones((300, 2)))})
    backend = by_torch(streams=Queue, inside=Queue.entered, memory=memory)
    assert backend.threads == block_copy.default_threads() + device.WAITING
    merged(base, adapter, tmp_path / "out", backend=backend)
    assert len({queue.thread for queue in Queue.made}) == len(Queue.made) <= backend.threads
    assert sum(queue.waited for queue in Queue.made) == 150  # two rows of 50 a block
    assert buffers == [800] * (backend.threads + block_copy.AHEAD)
    assert load_file(tmp_path / "out/model.safetensors")["fc.weight"].tolist() == [[3] * 50] * 300


def test_factors_are_copied_once_and_only_the_latest_cached(tmp_path, monkeypatch):
    copied: list[str] = []
    make = device.Arithmetic._factors
    monkeypatch.setattr(
        device.Arithmetic, "_factors", lambda self, step: (copied.append(step.weight), make(self, step))[1]
    )
    monkeypatch.setattr(block_copy, "BLOCK", 400)
    names = [f"fc{number}" for number in range(3 * device.CACHED_STEPS)]
    base = base_file(tmp_path / "base.safetensors", {f"{name}.weight": np.ones((20, 50)) for name in names})
    pairs = {name: (np.ones((2, 50)), np.ones((20, 2))) for name in names}
    arithmetic = device.Arithmetic(CPU)
    merged(
        base, peft_adapter(tmp_path / "adapter", pairs), tmp_path / "out", backend=Backend(arithmetic.apply, threads=1)
    )
    assert sorted(copied) == sorted(f"{name}.weight" for name in names)
    assert arithmetic.factors.cache_info().currsize == device.CACHED_STEPS


def test_cuda_uses_pinned_memory_and_streams_without_tf32(monkeypatch):
    wanted: dict[str, Any] = {}
    monkeypatch.setattr(device, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"number {gpu.index}")
    monkeypatch.setattr(torch.cuda, "Stream", lambda gpu: wanted.setdefault("stream", gpu))
    monkeypatch.setattr(torch, "empty", lambda count, **options: (wanted.update(options), torch.zeros(count))[1])
    torch.backends.cuda.matmul.allow_tf32 = True  # monkeypatch cannot take it back
    with device.cuda() as backend:
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert backend.device == "cuda (number 3)" and len(backend.memory(16)) == 16
        arithmetic = backend.apply.__self__
        assert arithmetic.stream == arithmetic.device == torch.device("cuda", 3)
        assert arithmetic.inside is torch.cuda.stream
    was, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    assert was is True
    assert wanted == {"stream": torch.device("cuda", 3), "dtype": torch.uint8, "pin_memory": True}


# --- the command ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a base as a folder and as a graph, and an adapter."""
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"fc.weight": np.arange(6).reshape(2, 3), "norm.weight": [1, 1]})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    graph_file(tmp_path / "base.onnx", {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T.copy()})
    peft_adapter(tmp_path / "adapter", {"fc": (A, B)})
    return tmp_path


def merge(folder: Path, base: str, out: str, *options: str) -> int:
    return cli.run(["merge", str(folder / base), str(folder / "adapter"), "-o", str(folder / out), *options])


@pytest.mark.fault(43)
@pytest.mark.parametrize("base", ["base", "base.onnx"])
@pytest.mark.parametrize(
    ("cuda", "is_available", "override", "message"),
    [
        (None, False, "", f"this PyTorch ({torch.__version__}) is built without CUDA. Install one"),
        ("13.0", False, "", "PyTorch (for CUDA 13.0) finds no GPU. `lora-export doctor --provider cuda` reports"),
        ("13.0", True, "1", "NVIDIA_TF32_OVERRIDE=1 turns TF32 on in every CUDA library"),
    ],
)
def test_a_missing_gpu_is_exit_6_before_reading(
    folder, capsys, monkeypatch, base, cuda, is_available, override, message
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    monkeypatch.setattr(formats, "load", lambda *_, **__: pytest.fail("it read the adapter"))
    for options in ((), ("--dry-run",)):
        assert merge(folder, base, "out", "--device", "cuda", *options) == 6
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith(f"Error: {message}") and printed.err.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {"base", "base.onnx", "adapter"}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor used as a GPU."""
    monkeypatch.setattr(device, "require_cuda", lambda: None)
    monkeypatch.setattr(device, "cuda", lambda: contextlib.nullcontext(by_torch()))


@pytest.mark.usefixtures("a_gpu", "numpy_fails")
def test_a_folder_merged_on_the_device_records_it(folder):
    assert merge(folder, "base", "out", "--device", "cuda") == 0
    assert load_file(folder / "out/model.safetensors")["fc.weight"].tolist() == [[1, 3, 5], [13, 24, 35]]
    assert read_manifest(folder / "out")["settings"]["device"] == "the processor, by PyTorch"


def test_the_processor_is_not_recorded(folder):
    assert merge(folder, "base", "out", "--device", "cpu") == 0
    assert "device" not in read_manifest(folder / "out")["settings"]


@pytest.mark.usefixtures("a_gpu", "numpy_fails")
def test_a_graph_merged_on_the_device_records_it(folder):
    assert merge(folder, "base.onnx", "out.onnx", "--device", "cuda") == 0
    after = load_graph(folder / "out.onnx")
    assert after.graph.initializers["fc.weight"].const_value.numpy().T.tolist() == [[1, 3, 5], [13, 24, 35]]
    assert json.loads(after.metadata_props["lora_export"])["settings"]["device"] == "the processor, by PyTorch"


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_block_of_a_packed_matrix_is_changed_on_the_device(tmp_path, monkeypatch, use_dora):
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-9, 10, (size, 40)).astype(np.float32) for size in (30, 20))  # (out, in)
    graph = graph_file(tmp_path / "m.onnx", {"packed_1": np.concatenate([q, k]).T}, data="all.data")
    base = base_file(tmp_path / "base.safetensors", {"attn.q.weight": q, "attn.k.weight": k})
    pair = rng.integers(-3, 4, (2, 40)), rng.integers(-3, 4, (30, 2))
    adapter = peft_adapter(tmp_path / "adapter", {"attn.q": pair}, use_dora=use_dora)
    if use_dora:
        file = adapter / "adapter_model.safetensors"
        lengths = {"base_model.model.attn.q.lora_magnitude_vector": rng.uniform(5, 9, 30).astype(np.float32)}
        save_file(load_file(file) | lengths, file)
    monkeypatch.setattr(block_copy, "BLOCK", 1000)

    def packed(name: str, *options: str) -> NDArray[np.float32]:
        line = ["merge", graph, adapter, "-o", tmp_path / name, "--base", base, *options]
        assert cli.run(list(map(str, line))) == 0
        value = load_graph(tmp_path / name).graph.initializers["packed_1"].const_value
        return value.numpy().copy()

    by_numpy = packed("numpy.onnx")
    monkeypatch.setattr(device, "require_cuda", lambda: None)
    monkeypatch.setattr(device, "cuda", lambda: contextlib.nullcontext(by_torch()))
    monkeypatch.setattr(sums, "sum_rows", lambda *_, **__: pytest.fail("NumPy changed a weight"))
    ours = packed("device.onnx", "--device", "cuda")
    assert ours[:, 30:].tobytes() == k.T.tobytes()
    if use_dora:
        np.testing.assert_allclose(ours, by_numpy, rtol=1e-6)
    else:
        assert np.array_equal(ours[:, :30], (q + pair[1] @ pair[0]).T)
        assert np.array_equal(ours, by_numpy)


def test_torch_is_not_loaded_without_a_device(folder):
    line = ["merge", str(folder / "base"), str(folder / "adapter"), "-o", str(folder / "out")]
    code = f"import sys; from lora_export import cli; print(cli.run({line}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


# --- a real GPU ---


@pytest.mark.cuda
@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_real_gpu_is_within_the_documented_bound(tmp_path, dtype, cancel):
    if not torch.cuda.is_available():
        pytest.skip("onnxruntime's CUDA provider runs here, but this PyTorch sees no GPU")
    with device.cuda() as backend:
        assert_within_bound(tmp_path, backend, dtype, cancel=cancel)
        assert backend.device.startswith("cuda (")
        assert torch.from_numpy(backend.memory(1 << 20)).is_pinned()


@pytest.mark.cuda
def test_a_whole_model_merged_on_a_real_gpu_equals_pefts(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("onnxruntime's CUDA provider runs here, but this PyTorch sees no GPU")
    monkeypatch.setattr(block_copy, "BLOCK", 1 << 16)  # many blocks under way at once
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(40))).bfloat16()
    save_tensors(net.state_dict(), tmp_path / "base.safetensors")
    model = trained(net, sixty_fourths, r=8, lora_alpha=8, target_modules=[str(number) for number in range(40)])
    model.save_pretrained(tmp_path / "adapter")
    with device.cuda() as backend:
        merged(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out", backend=backend)
    ours = load_tensors(tmp_path / "out/model.safetensors")
    assert same_bits(ours, model.merge_and_unload().state_dict())
