"""Fuzz targets: bytes become one file of an input, and the program is driven as its command line drives it.

A target raises where the program did anything but succeed or refuse: another exception, an exit code
that means neither, an output where it refused, something left behind, an input touched, a control
character on the terminal, too much memory or too much time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.numpy import save

from lora_export import cli, plan
from lora_export.errors import LoraExportError
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import read_contract
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert import adapter_inputs
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.models.pt2 import program, reader
from lora_export.models.pt2.program import ProgramInputs
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.session import Session
from lora_export.storage import hashes
from lora_export.storage.npz import read_arrays
from lora_export.training.records.opening import open_records, read_labelled_arrays
from lora_export.training.row_forms import form_of, survey
from lora_export.weights.checkpoint import open_checkpoint
from support.distributed import save_whole
from support.folder_contents import folder_contents

Target = Callable[[bytes], bool]  # whether the input was accepted

MEMORY = 512 << 20  # bytes of address space that a target may take; what it reads are kilobytes
SECONDS = 5  # of processor time
ROOM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where flushing to the disk costs nothing
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

W, HEAD = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 2), np.float32)
A, B = np.float32([[1, 2, 3]]), np.float32([[1], [10]])
WRAPPER = "base_model.model."
ADAPTER_TENSORS = {
    f"{WRAPPER}fc.lora_A.weight": A,
    f"{WRAPPER}fc.lora_B.weight": B,
    f"{WRAPPER}classifier.weight": HEAD,
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "r": 1,
    "lora_alpha": 1,
    "target_modules": ["fc"],
    "modules_to_save": ["classifier"],
    "rank_pattern": {"fc": 1},
    "alpha_pattern": {"f.*": 2},
    "bias": "none",
    "init_lora_weights": True,
}
BASE_TENSORS = {
    "fc.weight": W,
    "embed.weight": np.ones((4, 3), np.float32),
    "norm.weight": np.ones(2, np.float32),
    "pooler.dense.weight": np.ones((2, 2), np.float32),  # the class with the adapter's head has it
}
BASE_CONFIG = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 4,
    "tie_word_embeddings": True,
    "text_config": {"model_type": "gpt2", "vocab_size": 4},
    "id2label": {"0": "no", "1": "yes"},
    "torch_dtype": "float32",
}
SHARDS = {
    "model-1.safetensors": ["fc.weight"],
    "model-2.safetensors": ["embed.weight", "norm.weight", "pooler.dense.weight"],
}
INDEX = {
    "metadata": {"total_size": 80},
    "weight_map": {tensor: shard for shard, tensors in SHARDS.items() for tensor in tensors},
}
MANIFEST = {
    "made_by": "lora-export",
    "base": {"model.safetensors": "0"},
    "adapters": [{"name": "other", "format": "peft", "sha256": "0", "weight": 1.0}],
    "settings": {"dtype": "keep"},
    "files": {"model.safetensors": {"bytes": 1, "sha256": "0"}},
}
GRAPH = """<ir_version: 10, opset_import: ["" : 20], metadata_props: ["lora_export": "{}"]>
g (float[N, 3] x) => (float[N, 2] y)
<float[3, 2] "fc.weight" = {1, 2, 3, 4, 5, 6},
 float[2, 3] "up.weight" = {1, 2, 3, 4, 5, 6}, float[2] "fc.bias" = {1, 2}>
{ h = MatMul(x, "fc.weight")
  b = Add(h, "fc.bias")
  t = Transpose<perm = [1, 0]>("up.weight")
  u = MatMul(x, t)
  i = Gemm<transB = 1>(x, "up.weight")
  s = Add(u, i)
  y = Add(b, s) }"""
TENSOR_BYTES = 24  # of one weight of the graph, at the end of weights.data
GRAPH_TENSORS = ("fc.weight", "up.weight")
PAIR, PAIR_SIDES = LoraPair(a=A, b=B, scale=1.0), (("A", A), ("B", B))


class TooSlow(BaseException):
    """More processor time than any input of this size may take. No Exception: nobody may swallow it."""


# --- watching --------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Little memory and time for what runs in here. Raises MemoryError or TooSlow."""

    def stop(signum: int, frame: object) -> None:
        raise TooSlow(f"more than {SECONDS} s of processor time")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if pages.exists():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limits[1]))
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def command(*arguments: object, usage: bool = False) -> int:
    """Run the command line in this process; returns 0, 3 or 7, and raises for whatever else happens.

    `usage`: it may also return 2, for a pyproject.toml that states no right options.
    """
    return run(*arguments, usage=usage)[0]


def run(*arguments: object, usage: bool = False) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that is held to what this module demands."""
    streams = sys.stdout, sys.stderr
    sys.stdout = out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    sys.stderr = err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as Python's own are
    try:
        with bounded():
            code = cli.run([str(argument) for argument in arguments])
        out.flush()
        err.flush()
    finally:
        sys.stdout, sys.stderr = streams
    said, told = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    assert code in (0, 3, 7) or (usage and code == 2), f"exit code {code}: {told}"
    assert code in (0, 2) or told.startswith(("Error: ", "note: ")), f"a refusal without a reason: {told!r}"
    assert not CONTROL.search(said + told), f"control characters on the terminal: {(said + told)!r}"
    return code, said, told


def refused(read: Callable[[], object]) -> bool:
    """Whether a reader that no light command drives refused what it was given."""
    with bounded():
        try:
            read()
        except LoraExportError as error:
            assert str(error)
            return True
    return False


@contextlib.contextmanager
def a_place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir=ROOM))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def merged_and_proven(base: Path, adapter: Path, *options: str) -> bool:
    """Inspect a base of one file, merge into it, and prove the result. Nothing stays beside them."""
    before, out = folder_contents(base.parent), base.with_stem("out")
    command("inspect", base)
    code = command("merge", base, adapter, "-o", out, *options)
    assert out.exists() is (code == 0)
    if code == 0:
        assert command("verify", out, "--base", base, "-a", adapter) == 0
        out.unlink()
    assert folder_contents(base.parent) == before
    return code == 0


def merge_is_all_or_nothing(place: Path, *options: str, adapter: str = "adapter") -> bool:
    """Merge `adapter` into `base`: `out` is whole or as it was, and nothing else changes. Whether it was merged."""
    before = folder_contents(place)
    code = command("merge", place / "base", place / adapter, "-o", place / "out", *options)
    after = folder_contents(place)
    if code == 0:
        assert open_checkpoint(place / "out").specs, "it said that it had succeeded"
        before, after = ({k: v for k, v in there.items() if not k.startswith("out/")} for there in (before, after))
    assert after == before, f"changed or left behind: {sorted(before.items() ^ after.items())}"
    assert code == 0 or (place / "out").exists() == any(name.startswith("out/") for name in before)
    command("merge", place / "base", place / adapter, "-o", place / "dry", "--dry-run", *options)
    assert not (place / "dry").exists()
    return code == 0


def converted(place: Path, adapter: str, *options: str) -> bool:
    """Convert `adapter`: each output is whole or not there. Whether one was written."""
    written = []
    for to in ("peft", "mlx"):
        code = command("convert", place / adapter, "-o", place / f"as-{to}", "--to", to, *options)
        assert (place / f"as-{to}").exists() is (code == 0)
        written.append(code == 0)
    return any(written)


# --- inputs ----------------------------------------------------------------------------------------


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def tensors(header: bytes, whole: bytes) -> bytes:
    """A safetensors file of this header, with the data of a whole one."""
    (length,) = struct.unpack("<Q", whole[:8])
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def header_of(whole: bytes) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    return whole[8 : 8 + length]


GOOD_ADAPTER = save(ADAPTER_TENSORS, {"format": "pt"})
GOOD_BASE = save(BASE_TENSORS, {"format": "pt", "lora_export": json.dumps(MANIFEST)})
GOOD_SHARDS = {shard: save({name: BASE_TENSORS[name] for name in names}) for shard, names in SHARDS.items()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def an_adapter(place: Path, config: bytes = b"", weights: bytes = GOOD_ADAPTER) -> None:
    write(
        place / "adapter",
        {"adapter_config.json": config or as_json(ADAPTER_CONFIG), "adapter_model.safetensors": weights},
    )


def a_base(place: Path, config: bytes = b"", weights: bytes = GOOD_BASE) -> None:
    write(place / "base", {"config.json": config or as_json(BASE_CONFIG), "model.safetensors": weights})


# --- targets ---------------------------------------------------------------------------------------


def beside_an_adapter(name: str) -> Target:
    """A file in the folder of an adapter that is good otherwise."""

    def target(data: bytes) -> bool:
        with a_place() as place:
            a_base(place)
            an_adapter(place)
            (place / "adapter" / name).write_bytes(data)
            command("inspect", place / "adapter")
            return merge_is_all_or_nothing(place)

    return target


def adapter_header(data: bytes) -> bool:
    """The header of an adapter's file."""
    with a_place() as place:
        a_base(place)
        an_adapter(place, weights=tensors(data, GOOD_ADAPTER))
        command("inspect", place / "adapter")
        return merge_is_all_or_nothing(place)


def adapter_keys(data: bytes) -> bool:
    """The keys of an adapter's file, one a line, each with a tensor that its name asks for."""
    entries, content = [], b""
    for line in data.split(b"\n"):
        key = json.dumps(line.decode("utf-8", "replace"))
        tensor = A if b"lora_A" in line else B if b"lora_B" in line else HEAD
        start, content = len(content), content + tensor.tobytes()
        offsets = [start, len(content)]
        entries.append(f'{key}: {{"dtype": "F32", "shape": {list(tensor.shape)}, "data_offsets": {offsets}}}')
    header = ("{" + ", ".join(entries) + "}").encode()
    with a_place() as place:
        a_base(place)
        an_adapter(place, weights=struct.pack("<Q", len(header)) + header + content)
        command("inspect", place / "adapter")
        return merge_is_all_or_nothing(place)


MLX_CONFIG = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 1, "scale": 2.0, "dropout": 0.0}}
MLX_TENSORS = {"fc.lora_a": np.ascontiguousarray(A.T), "fc.lora_b": np.ascontiguousarray(B.T)}
LITGPT = {
    "settings": b"lora_r: 1\nlora_alpha: 2\nlora_query: true\nlora_projection: true\n",
    "config": b"name: Llama-3\nmlp_class_name: LLaMAMLP\nn_head: 1\nn_embd: 2\n",
}
LITGPT_TENSORS = {
    **{f"transformer.h.0.attn.{name}.lora_A": torch.ones(1, 2) for name in ("qkv", "proj")},
    **{f"transformer.h.0.attn.{name}.lora_B": torch.ones(2, 1) for name in ("qkv", "proj")},
}
STATED = ("--allow-pickle", "--lora-rank", "1", "--lora-alpha", "2")


def pickle_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(tensors), file)
    return file.getvalue()


def mlx_config(data: bytes) -> bool:
    """mlx-lm's adapter_config.json beside a good file."""
    with a_place() as place:
        a_base(place)
        write(place / "adapter", {"adapter_config.json": data, "adapters.safetensors": save(MLX_TENSORS)})
        command("inspect", place / "adapter")
        converted(place, "adapter")
        return merge_is_all_or_nothing(place)


def litgpt_settings(data: bytes) -> bool:
    """litgpt's hyperparameters.yaml and model_config.yaml, with a line of three dashes between them."""
    settings, _, config = data.partition(b"\n---\n")
    files = {"hyperparameters.yaml": settings, "model_config.yaml": config}
    with a_place() as place:
        write(place / "adapter", {**files, "lit_model.pth.lora": pickle_of(LITGPT_TENSORS)})
        command("inspect", place / "adapter", "--allow-pickle")
        return converted(place, "adapter", "--allow-pickle")


def pickled_adapter(data: bytes) -> bool:
    """A file of torch.save, where pickles are allowed."""
    with a_place() as place:
        a_base(place)
        (place / "a.pt").write_bytes(data)
        command("inspect", place / "a.pt", *STATED)
        return merge_is_all_or_nothing(place, *STATED, adapter="a.pt")


@functools.cache
def good_shards() -> dict[str, bytes]:
    """The files of a distributed checkpoint with an adapter."""
    with a_place() as place:
        state = {f"{WRAPPER}fc.lora_{side}.default.weight": torch.from_numpy(value) for side, value in PAIR_SIDES}
        return {path.name: path.read_bytes() for path in save_whole(place / "shards", state).iterdir()}


def shards(**replaced: bytes) -> bool:
    with a_place() as place:
        a_base(place)
        names = {"metadata": ".metadata", "shard": "__0_0.distcp"}
        write(place / "adapter", good_shards() | {names[name]: data for name, data in replaced.items()})
        command("inspect", place / "adapter", *STATED)
        return merge_is_all_or_nothing(place, *STATED)


def model_with_tasks(data: bytes) -> bool:
    """A model with an adapter for each task: its config in a line, then a key and a shape in each."""
    config, *lines = data.decode("utf-8", "replace").split("\n")
    with a_place() as place:
        write(place / "base", {"config.json": config.encode(), "model.safetensors": save(tensors_of_shapes(lines))})
        command("inspect", place / "base")
        return merge_is_all_or_nothing(place, "--layout", "*=out_in", "--stored-adapter", "x", adapter="base")


def keys_of_a_file(data: bytes) -> bool:
    """The keys of a file without a config, one a line, each with a tensor that its name asks for."""
    named = {"lora_A": A, "lora_a": A, "lora_down": A, "alpha": np.float32([2]), "magnitude": np.ones(2, np.float32)}
    found = {}
    for line in dict.fromkeys(data.split(b"\n")):
        key = line.decode("utf-8", "replace")
        found[key] = next((tensor for part, tensor in named.items() if part in key), B)
    with a_place() as place:
        a_base(place)
        (place / "a.safetensors").write_bytes(save(found))
        command("inspect", place / "a.safetensors", *STATED[1:])
        for options in ((), STATED[1:]):
            converted(place, "a.safetensors", *options, "--overwrite")
            shutil.rmtree(place / "as-peft", ignore_errors=True)
            shutil.rmtree(place / "as-mlx", ignore_errors=True)
        return merge_is_all_or_nothing(place, *STATED[1:], adapter="a.safetensors")


def tensors_of_shapes(lines: Iterable[str]) -> dict[str, np.ndarray]:
    """A tensor of halves for each line, a key and a shape; of ones where the key asks for indices."""
    found = {}
    for line in dict.fromkeys(lines):
        key, _, sizes = line.rpartition(" ")
        shape = [int(size) for size in sizes.split(",") if size.isdecimal() and len(size) < 3]
        dtype = np.int64 if "indices" in key else np.float32
        found[key] = np.full(shape if math.prod(shape) < 10_000 else [1], 1 if dtype is np.int64 else 0.5, dtype)
    return found


def diffusion_file(data: bytes) -> bool:
    """A file of an image model's adapter: `lora_adapter_metadata` in a line, then a key and a shape in each."""
    recorded, *lines = data.decode("utf-8", "replace").split("\n")
    found = tensors_of_shapes(lines)
    with a_place() as place:
        a_base(place)
        (place / "a.safetensors").write_bytes(save(found, {"lora_adapter_metadata": recorded} if recorded else None))
        command("inspect", place / "a.safetensors")
        for to in ("kohya", "comfyui", "diffusers"):
            base = ["--base", place / "base"] if len(data) % 2 else []
            out = place / f"{to}.safetensors"
            code = command("convert", place / "a.safetensors", "-o", out, "--to", to, *base)
            assert out.exists() is (code == 0)
            out.unlink(missing_ok=True)
        return merge_is_all_or_nothing(place, adapter="a.safetensors")


def peft_kind(data: bytes) -> bool:
    """An adapter of PEFT: its config in a line, then a key and a shape in each."""
    config, *lines = data.decode("utf-8", "replace").split("\n")
    with a_place() as place:
        a_base(place)
        an_adapter(place, config.encode() or b"{}", save(tensors_of_shapes(lines)))
        command("inspect", place / "adapter")
        converted(place, "adapter", *(["--base", str(place / "base")] if len(data) % 2 else []))
        return merge_is_all_or_nothing(place)


def pipeline_index(data: bytes) -> bool:
    """The model_index.json of a pipeline with two models."""
    with a_place() as place:
        write(place / "base", {"model_index.json": data})
        for name in ("unet", "text_encoder"):
            write(place / "base" / name, {"model.safetensors": save(BASE_TENSORS), "config.json": b"{}"})
        pairs = {f"unet.fc.lora_{side}.weight": value for side, value in (("A", A), ("B", B))}
        (place / "a.safetensors").write_bytes(save(pairs))
        before = folder_contents(place)
        code = command("merge", place / "base", place / "a.safetensors", "-o", place / "out")
        after = {name: value for name, value in folder_contents(place).items() if not name.startswith("out/")}
        assert after == before and (place / "out").exists() is (code == 0)
        return code == 0


def base_header(data: bytes) -> bool:
    """The header of a base, in a folder and as a bare file."""
    with a_place() as place:
        a_base(place, weights=tensors(data, GOOD_BASE))
        an_adapter(place)
        command("inspect", place / "base")
        command("merge", place / "base/model.safetensors", place / "adapter", "-o", place / "out.safetensors")
        return merge_is_all_or_nothing(place)


def base_index(data: bytes) -> bool:
    """The index of a base in two files."""
    with a_place() as place:
        write(place / "base", {**GOOD_SHARDS, "config.json": as_json(BASE_CONFIG)})
        (place / "base/model.safetensors.index.json").write_bytes(data)
        an_adapter(place)
        return merge_is_all_or_nothing(place)


def base_config(data: bytes) -> bool:
    """The config.json of a base."""
    with a_place() as place:
        a_base(place)
        (place / "base/config.json").write_bytes(data)
        an_adapter(place)
        return merge_is_all_or_nothing(place, "--dtype", "bfloat16")


def manifest(data: bytes) -> bool:
    """The manifest of an output that is to be replaced, and of a base."""
    with a_place() as place:
        a_base(place)
        an_adapter(place)
        write(place / "out", {"model.safetensors": GOOD_BASE, "foreign.txt": b"mine", "lora_export.json": data})
        merge_is_all_or_nothing(place, "--overwrite")
    with a_place() as place:
        a_base(place)
        an_adapter(place)
        (place / "base/lora_export.json").write_bytes(data)
        return merge_is_all_or_nothing(place)


def graph(data: bytes) -> bool:
    """An .onnx file, its external data beside it."""
    with a_place() as place:
        write(place / "model", {"weights.data": bytes(8 + TENSOR_BYTES)})
        path = place / "model/model.onnx"
        path.write_bytes(data)
        before = folder_contents(place)
        command("inspect", path)
        accepted = not refused(lambda: fold_into(path, place / "out"))
        shutil.rmtree(place / "out", ignore_errors=True)
        assert folder_contents(place) == before
        return accepted


def fold_into(path: Path, out: Path) -> None:
    """What a command does that folds an adapter into a graph."""
    model = load_graph(path)
    found = find_sites(model)
    adapter = Adapter(name="a", format="test", pairs={"fc": PAIR})
    fold_graph(model, found, plan.make([adapter], found.specs))
    out.mkdir()
    save_graph(model, out, "out.onnx")


def good_graph() -> onnx.ModelProto:
    return onnx.parser.parse_model(GRAPH)


def external_data(data: bytes) -> bool:
    """The external-data records of a graph's weights: a line is `key=value`, an empty one begins the next weight."""
    model = good_graph()
    records = data.split(b"\n\n")
    for name, record in zip(GRAPH_TENSORS, itertools.chain(records, itertools.repeat(b"")), strict=False):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for line in record.split(b"\n"):
            key, _, value = line.decode("utf-8", "replace").partition("=")
            tensor.external_data.add(key=key, value=value)
    return graph(model.SerializeToString())


# Quantised weights for an adapter of `fc` and `up`, both 2 x 3 (out, in).
QUANTISED = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[N, 3] x) => (float[N, 2] y)
<uint8[2, 1, 8] "fc.weight_Q4" = {152, 7, 0, 0, 0, 0, 0, 0, 143, 10, 0, 0, 0, 0, 0, 0}, float[2] s = {0.5, -2},
 uint8[2] z = {8, 3},
 int8[2, 3] "up.weight_quantized" = {1, 2, 3, 4, 5, 6}, float[2, 2] t = {1, 2, 3, 4}, int8[2, 2] p = {0, 1, 2, 3}>
{ h = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16> (x, "fc.weight_Q4", s, z)
  w = DequantizeLinear <axis = 1, block_size = 2> ("up.weight_quantized", t, p)
  i = Gemm <transB = 1> (x, w)
  y = Add(h, i) }"""
BOTH = {f"{WRAPPER}{name}.lora_{side}.weight": array for name in ("fc", "up") for side, array in (("A", A), ("B", B))}


def good_quantised() -> onnx.ModelProto:
    model = onnx.parser.parse_model(QUANTISED)
    for tensor in model.graph.initializer:
        raw = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
        tensor.CopyFrom(raw)
    return model


def quantised_graph(data: bytes) -> bool:
    """An .onnx file whose quantised weights are merged into."""
    with a_place() as place:
        write(place / "model", {"base.onnx": data})
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["fc", "up"]}
        an_adapter(place, as_json(config), save(BOTH))
        before = folder_contents(place)
        command("inspect", place / "model/base.onnx")
        out = place / "out.onnx"
        code = command("merge", place / "model/base.onnx", place / "adapter", "-o", out, "--requantize")
        if code == 0:
            assert find_sites(load_graph(out)).by_name, "it said that it had succeeded"
            for path in place.glob("out.onnx*"):
                path.unlink()
        assert folder_contents(place) == before
        return code == 0


def quantised_fields(data: bytes) -> bool:
    """What a graph says of its quantised weights: lines as `0.K=3` (a node's attribute) and `s.dims=2` (a tensor's)."""
    model = good_quantised()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for line in data.decode("utf-8", "replace").split("\n"):
        path, _, value = line.partition("=")
        holder, _, name = path.rpartition(".")
        numbers = [int(part) for part in re.findall(r"-?\d{1,9}", value)]
        if holder in tensors and name == "dims":
            tensors[holder].dims[:] = numbers
        elif holder in tensors and name == "type" and numbers:
            tensors[holder].data_type = numbers[0]
        elif holder in tensors and name == "bytes":
            tensors[holder].raw_data = bytes(number % 256 for number in numbers)
        elif holder in ("0", "1") and numbers:
            node = model.graph.node[int(holder)]
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend(
                [*kept, onnx.helper.make_attribute(name, numbers[0] if len(numbers) == 1 else numbers)]
            )
        elif path == "inputs" and numbers:
            node = model.graph.node[numbers[0] % 2]
            node.input[:] = value.split()[1:]
    return quantised_graph(model.SerializeToString())


# A graph that takes an adapter beside `fc`, 2 x 3 (out, in).
PLACE = {"weight": "fc.weight", "a": "fc.lora_A.weight", "b": "fc.lora_B.weight", "shape": [2, 3], "dtype": "float32"}
OPEN = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 3] x, float[3, r] "fc.lora_A.weight", float[r, 2] "fc.lora_B.weight") => (float[N, 2] y)
<float[3, 2] "fc.weight" = {1, 2, 3, 4, 5, 6}, float[3, 0] "fc.lora_A.weight" = {}, float[0, 2] "fc.lora_B.weight" = {}>
{ h = MatMul(x, "fc.weight")
  d = MatMul(x, "fc.lora_A.weight")
  u = MatMul(d, "fc.lora_B.weight")
  y = Add(h, u) }"""


def open_graph_of(contract: bytes) -> bytes:
    model = onnx.parser.parse_model(OPEN)
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.decode("utf-8", "replace"))
    return model.SerializeToString()


@functools.cache
def good_contract() -> bytes:
    digests = adapter_inputs.weight_digests(find_sites(ir.from_proto(onnx.parser.parse_model(OPEN))))
    digests = {name: digest for name, digest in digests.items() if "lora" not in name}
    places = [{**PLACE, "digest": digests["fc.weight"]}]
    return as_json(
        {"base": adapter_inputs.fingerprint(digests), "names": adapter_inputs.hash_parts(digests), "places": places}
    )


def contract(data: bytes) -> bool:
    """What a graph says of the places where it takes adapters, read by `convert` and by a Session."""
    with a_place() as place:
        write(place / "model", {"base.onnx": open_graph_of(data)})
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["fc"]}
        an_adapter(place, as_json(config), save({name: array for name, array in BOTH.items() if ".fc." in name}))
        before = folder_contents(place)
        out = place / "out.onnx_adapter"
        code = command(
            "convert", place / "adapter", "-o", out, "--to", "onnx_adapter", "--for", place / "model/base.onnx"
        )
        session_refused = refused(lambda: a_session(place / "model/base.onnx", {"a": out} if code == 0 else {}))
        assert code or not session_refused, "what was written for a graph is not taken by it"
        out.unlink(missing_ok=True)
        assert folder_contents(place) == before
        return code == 0


def onnx_adapter_file(data: bytes) -> bool:
    """An .onnx_adapter, shown, and loaded by a Session."""
    with a_place() as place:
        path = place / "a.onnx_adapter"
        path.write_bytes(data)
        command("inspect", path)
        session = the_session()
        accepted = not refused(lambda: session.load("a", path))
        if accepted:
            (answer,) = session.run({"x": np.ones((1, 3), np.float32)}, adapter="a").values()
            assert answer.shape == (1, 2)
            session.unload("a")
        assert path.read_bytes() == data
        return accepted


def a_session(path: Path, adapters: Mapping[str, Path]) -> Session:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return Session(path, adapters, options=options)


@functools.cache
def the_session() -> Session:
    with a_place() as place:
        (place / "base.onnx").write_bytes(open_graph_of(good_contract()))
        return a_session(place / "base.onnx", {})


@functools.cache
def good_onnx_adapter() -> bytes:
    with a_place() as place:
        path = place / "a.onnx_adapter"
        known = read_contract({CONTRACT_KEY: good_contract().decode()}, "a graph")
        given = {PLACE["a"]: np.ascontiguousarray(A.T), PLACE["b"]: np.ascontiguousarray(B.T)}
        onnx_adapter.write(path, given, known, sha256="7" * 64)  # type: ignore[arg-type]
        return path.read_bytes()[: -hashes.ENDING]  # or each change would end at the hash


def _examples(path: Path) -> None:
    if path.suffix == ".npz":
        read_labelled_arrays(path)
        return
    records = open_records(path)
    survey(records, form_of(records))


def examples_reader(suffix: str) -> Target:
    def target(data: bytes) -> bool:
        with a_place() as place:
            (place / f"examples{suffix}").write_bytes(data)
            return not refused(lambda: _examples(place / f"examples{suffix}"))

    return target


def inputs_npz(data: bytes) -> bool:
    """An .npz of a model's inputs."""
    with a_place() as place:
        (place / "inputs.npz").write_bytes(data)
        return not refused(lambda: read_arrays(place / "inputs.npz"))


def named(name: str, **fields: object) -> dict[str, object]:
    return {"name": name, "kind": 1, "arg": fields}


def tensor_of(*sizes: int | str) -> dict[str, object]:
    strides = [
        int(np.prod([size for size in sizes[place + 1 :] if isinstance(size, int)])) for place in range(len(sizes))
    ]
    told = [{"as_int": size} if isinstance(size, int) else {"as_expr": {"expr_str": size}} for size in sizes]
    rest = {"strides": [{"as_int": stride} for stride in strides], "storage_offset": {"as_int": 0}, "layout": 7}
    return {"dtype": 7, "sizes": told, **rest}


LEAF = {"type": None, "context": None, "children_spec": []}
X = {"as_tensor": {"name": "x"}}
# A linear layer and a view of what it makes, as torch.export writes them, without what is only told.
PROGRAM = {
    "graph_module": {
        "graph": {
            "inputs": [{"as_tensor": {"name": "w"}}, X],
            "outputs": [{"as_tensor": {"name": "y"}}],
            "nodes": [
                {
                    "target": "torch.ops.aten.sym_size.int",
                    "inputs": [named("self", **X), named("dim", as_int=0)],
                    "outputs": [{"as_sym_int": {"as_name": "n"}}],
                },
                {
                    "target": "torch.ops.aten.linear.default",
                    "inputs": [named("input", **X), named("weight", as_tensor={"name": "w"})],
                    "outputs": [{"as_tensor": {"name": "h"}}],
                },
                {
                    "target": "torch.ops.aten.view.default",
                    "inputs": [
                        named("self", as_tensor={"name": "h"}),
                        named("size", as_sym_ints=[{"as_name": "n"}, {"as_int": 2}, {"as_int": 1}]),
                    ],
                    "outputs": [{"as_tensor": {"name": "y"}}],
                },
            ],
            "tensor_values": {"x": tensor_of("s0", 3)},
        },
        "signature": {
            "input_specs": [
                {"parameter": {"arg": {"name": "w"}, "parameter_name": "fc.weight"}},
                {"user_input": {"arg": X}},
            ],
            "output_specs": [{"user_output": {"arg": {"as_tensor": {"name": "y"}}}}],
        },
        "module_call_graph": [
            {
                "fqn": "",
                "signature": {
                    "in_spec": json.dumps([1, {**LEAF, "type": "builtins.tuple", "children_spec": [LEAF]}]),
                    "out_spec": json.dumps([1, LEAF]),
                    "forward_arg_names": ["x"],
                },
            }
        ],
    },
    "range_constraints": {"s0": {"min_val": 0, "max_val": 9}},
    "schema_version": {"major": 8, "minor": 20},
}
WEIGHTS = {"config": {"fc.weight": {"path_name": "weight_0", "use_pickle": False, "tensor_meta": tensor_of(2, 3)}}}


def archive_of(graph: bytes, weights: bytes) -> bytes:
    """A .pt2 of this graph and these descriptions of its weights."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {
            "archive_format": b"pt2",
            "archive_version": b"0",
            "models/model.json": graph,
            "data/weights/model_weights_config.json": weights,
            "data/weights/weight_0": W.tobytes(),
            "data/constants/model_constants_config.json": b'{"config": {}}',
        }.items():
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), content)
    return file.getvalue()


def exported_archive(data: bytes) -> bool:
    """A .pt2 file: read, given inputs, and run as verify runs it."""
    with a_place() as place:
        (place / "model.pt2").write_bytes(data)
        accepted = not refused(lambda: run_program(place / "model.pt2"))
        assert folder_contents(place) == {"model.pt2": data}
        return accepted


def run_program(path: Path) -> None:
    module = program.load_program(path)
    inputs = ProgramInputs(reader.read(path))
    with torch.no_grad():
        module(**inputs.make(dict.fromkeys(inputs.traced_sizes, 2), torch.Generator().manual_seed(0)))


NAMED = (
    adapter_header, adapter_keys, mlx_config, litgpt_settings, pickled_adapter, model_with_tasks, keys_of_a_file,
    diffusion_file, peft_kind, pipeline_index, base_header, base_index, base_config, manifest, graph, external_data,
    quantised_graph, quantised_fields, contract, inputs_npz, exported_archive,
)  # fmt: skip
TARGETS: dict[str, Target] = {
    **{target.__name__: target for target in NAMED},
    "adapter_config": beside_an_adapter("adapter_config.json"),
    "adapter_model_config": beside_an_adapter("config.json"),  # the model's, which some trainers put there
    "shard_metadata": lambda data: shards(metadata=data),
    "shard": lambda data: shards(shard=data),
    "onnx_adapter": onnx_adapter_file,
    **{f"examples_{suffix}": examples_reader(f".{suffix}") for suffix in ("jsonl", "csv", "npz")},
    "exported_graph": lambda data: exported_archive(archive_of(data, as_json(WEIGHTS))),
    "exported_weights": lambda data: exported_archive(archive_of(as_json(PROGRAM), data)),
}


TASKS = {"lora_adaptations": ["x", "y"], "lora_rank": 1, "lora_alpha": 2}
TASK_LINES = [
    *(b"fc.parametrizations.weight." + part for part in (b"original 2,3", b"0.lora_A 2,1,3", b"0.lora_B 2,2,1")),
    *(b"embed.parametrizations.weight." + part for part in (b"original 4,3", b"0.lora_A 2,4,1", b"0.lora_B 2,1,3")),
]


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def kind(shapes: str, **config: object) -> bytes:
    """An adapter of one of PEFT's kinds."""
    lines = [f"base_model.{line}" for line in shapes.split("; ")]
    return b"\n".join([as_json({"target_modules": ["fc"], **config}), *(line.encode() for line in lines)])


KINDS = [
    kind("model.fc.ia3_l 2,1", peft_type="IA3", feedforward_modules=[]),
    kind("model.fc.oft_R.weight 1,3", peft_type="OFT", oft_block_size=3, coft=True, eps=0.1),
    kind("model.fc.boft_R 1,3,1,1; model.fc.boft_s 2,1", peft_type="BOFT", boft_block_size=1),
    kind("model.fc.hra_u 3,1", peft_type="HRA", r=1, apply_GS=True),
    kind("model.fc.hira_A 1,3; model.fc.hira_B 2,1", peft_type="HIRA", r=1),
    kind("model.fc.road_theta 1; model.fc.road_alpha 1", peft_type="ROAD", variant="road_1", group_size=2),
    kind(
        "model.fc.delora_A 1,3; model.fc.delora_B 2,1; model.fc.delora_lambda 1; model.fc.delora_w_norm 3",
        peft_type="DELORA", r=1,
    ),
    kind("model.fc.deft_P 2,1; model.fc.deft_R 1,3", peft_type="DEFT", r=1, decomposition_method="qr", alpha=2),
    kind("model.fc.glora_A.X 2,1; model.fc.glora_B.Xd 2,1; model.fc.glora_B.Xu 1,3", peft_type="GLORA", r=1),
    kind("model.fc.miss_block 2,1,1", peft_type="MISS", r=1, init_weights="bat"),
    kind("model.fc.vera_lambda_b 2; model.fc.vera_lambda_d 1", peft_type="VERA", r=1, projection_prng_key=3),
    kind("model.fc.fourierft_spectrum 2", peft_type="FOURIERFT", n_frequency=2, scaling=3, random_loc_seed=7),
    kind("model.fc.waveft_spectrum 2", peft_type="WAVEFT", n_frequency=2, scaling=3, random_loc_seed=7),
    kind("model.fc.shira_weight 1; model.fc.shira_indices 2,1", peft_type="SHIRA", r=1),
    kind("model.fc.miss_block 2,2", peft_type="MISS", r=2, init_weights=True),
    kind("model.fc.c3a_kernel 2,3,1", peft_type="C3A", block_size=1),
    kind("model.fc.lora_A 1,3; model.fc.lora_B 2,1; model.fc.lora_E 1,1", peft_type="ADALORA", init_r=1, lora_alpha=2),
    kind("model.fc.gralora_A 1,3,1; model.fc.gralora_B 1,1,2", peft_type="GRALORA", r=1, alpha=1, gralora_k=1),
    kind(
        "vblora_vector_bank 2,1; model.fc.vblora_logits_A 1,3,2; model.fc.vblora_logits_B 2,1,2",
        peft_type="VBLORA", r=1, topk=1,
    ),
    kind(
        "unilora_theta_d 4; model.fc.unilora_indices_A 1,3; model.fc.unilora_indices_B 2,1; "
        "model.fc.unilora_scales_A 1,3; model.fc.unilora_scales_B 2,1",
        peft_type="UNILORA", r=1,
    ),
    kind(
        "model.fc.randlora_lambda 1,2; model.fc.randlora_gamma 2,2; randlora_A 1,1,2; randlora_B 3,2,1",
        peft_type="RANDLORA", r=1, randlora_alpha=1,
    ),
    kind(
        "tinylora_v.0 1; model.fc.tinylora_A 1,3; model.fc.tinylora_B 2,1; model.fc.tinylora_P 1,1,1",
        peft_type="TINYLORA", projection_seed=1,
    ),
    kind(
        "model.fc.hada_w1_a 2,1; model.fc.hada_w1_b 1,3; model.fc.hada_w2_a 2,1; model.fc.hada_w2_b 1,3",
        peft_type="LOHA", r=1, alpha=1,
    ),
    kind("model.fc.lokr_w1 1,1; model.fc.lokr_w2 2,3", peft_type="LOKR", r=1, alpha=1),
    kind("model.norm.ln_tuning_layers.weight 2", peft_type="LN_TUNING"),
    kind("model.embed.trainable_tokens_delta 1,3", peft_type="TRAINABLE_TOKENS", token_indices=[2]),
]  # fmt: skip
# Inputs that are read to their end: whatever a fuzzer changes, it begins behind the first checks.
GOOD: dict[str, bytes] = {
    "adapter_config": as_json(ADAPTER_CONFIG),
    "adapter_model_config": as_json(BASE_CONFIG | {"architectures": ["BertForSequenceClassification"]}),
    "adapter_header": header_of(GOOD_ADAPTER),
    "adapter_keys": "\n".join(ADAPTER_TENSORS).encode(),
    "mlx_config": as_json(MLX_CONFIG),
    "litgpt_settings": b"\n---\n".join(LITGPT.values()),
    "pickled_adapter": pickle_of({"fc.lora_A": torch.from_numpy(A), "fc.lora_B": torch.from_numpy(B)}),
    "shard_metadata": good_shards()[".metadata"],
    "shard": good_shards()["__0_0.distcp"],
    "model_with_tasks": b"\n".join([as_json(TASKS), *TASK_LINES]),
    "keys_of_a_file": b"fc.lora_A\nfc.lora_B",
    "diffusion_file": b"\nlora_unet_fc.hada_w1_a 2,1\nlora_unet_fc.hada_w1_b 1,3\nlora_unet_fc.hada_w2_a 2,1\n"
    b"lora_unet_fc.hada_w2_b 1,3",
    "peft_kind": KINDS[0],
    "pipeline_index": as_json({"_class_name": "X", "unet": ["diffusers", "X"], "text_encoder": ["transformers", "X"]}),
    "base_header": header_of(GOOD_BASE),
    "base_index": as_json(INDEX),
    "base_config": as_json(BASE_CONFIG),
    "manifest": as_json(MANIFEST),
    "graph": good_graph().SerializeToString(),
    "external_data": b"location=weights.data\noffset=8\nlength=24\n\nlocation=weights.data\noffset=0",
    "quantised_graph": good_quantised().SerializeToString(),
    "quantised_fields": b"0.K=3\ns.dims=2\nt.type=1\nz.bytes=8 3",
    "contract": good_contract(),
    "onnx_adapter": good_onnx_adapter(),
    "examples_jsonl": b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n',
    "examples_csv": b'text,label,more\n"a, b",0,\nc,1,\n',
    "examples_npz": npz(x=W, labels=np.int64([0, 1])),
    "inputs_npz": npz(x=W),
    "exported_archive": archive_of(as_json(PROGRAM), as_json(WEIGHTS)),
    "exported_graph": as_json(PROGRAM),
    "exported_weights": as_json(WEIGHTS),
}
