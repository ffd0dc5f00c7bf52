"""Small files that would become large, and short ones that would take long: refused at little cost."""

from __future__ import annotations

import functools
import io
import json
import pickle
import signal
import struct
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.executorch_file import read_methods
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.isolation.limits import stated_memory
from lora_export.models.processors import read_sound
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.open_artifact import HowToOpen, open_candidate
from lora_export.storage import torch_pickle
from lora_export.storage.json_files import parse_json
from lora_export.storage.npz import read_arrays
from lora_export.storage.torch_pickle import open_pickle, text_in_pickle
from lora_export.training.records.opening import open_records
from lora_export.training.row_forms import form_of, survey
from support.handmade import peft_adapter

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
MIB = 1 << 20


def refused_at_little_cost(read: Callable[[], object], *, seconds: float, memory: int) -> str:
    """Why a reader refuses, within so much processor time and memory of Python's own."""
    begun = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises((InputRefused, RuntimeRefused)) as refused:
            read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory and time.process_time() - begun < seconds
    assert len(str(refused.value)) < 2000
    return str(refused.value)


# --- Rows and JSON ---


def test_a_header_of_many_columns_is_read_at_once(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(150_000)]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join(["1"] * len(names)) + "\n")
    begun = time.process_time()
    assert len(open_records(tmp_path / "a.csv")[0]) == len(names)
    assert time.process_time() - begun < 5
    (tmp_path / "b.csv").write_text(",".join([*names, *names]) + "\n1\n")
    assert "name each column once, not c0, c1, c10" in refused_at_little_cost(
        lambda: open_records(tmp_path / "b.csv"), seconds=10, memory=500 * MIB
    )


@pytest.mark.parametrize("value", [b"[],", b"{},", b"1.5,", b'"aa",', b"[[]],"])
def test_a_row_of_many_values_is_refused(tmp_path: Path, value: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "more": [' + value * (20_000_000 // len(value)) + b"1]}\n")

    def read() -> None:
        records = open_records(tmp_path / "a.jsonl")
        survey(records, form_of(records))

    told = refused_at_little_cost(read, seconds=3, memory=130 * MIB)
    assert "line 1 contains more than" in told


def test_json_of_many_lists_is_refused() -> None:
    text = b'{"a": [' + b"[]," * 20_000_000 + b"[]]}"
    assert "values and lists" in refused_at_little_cost(lambda: parse_json(text, "x"), seconds=5, memory=MIB)


# --- Adapters ---


def test_a_table_of_many_patterns_is_refused(tmp_path: Path) -> None:
    from lora_export.formats.peft_config import checked_config

    patterns = {f"layers.{number}.q_proj": 1 for number in range(20_000)}
    peft_adapter(tmp_path, {"fc": ([[1]], [[1]])}, rank_pattern=patterns)
    told = refused_at_little_cost(
        lambda: checked_config(json.loads((tmp_path / "adapter_config.json").read_text()), "x"),
        seconds=3,
        memory=40 * MIB,
    )
    assert "rank_pattern: 20,000 patterns; at most 10,000 are read" in told


class Called:
    """A pickle that calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def with_pickle(path: Path, content: bytes) -> Path:
    """An archive of `torch.save` with another pickle."""
    buffer = io.BytesIO()
    torch.save({"fc.lora_A": torch.ones(1)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            target.writestr(entry, content if entry.filename.endswith("data.pkl") else source.read(entry))
    return path


def hashed_for_years() -> bytes:
    """A key that is a tuple of twice the same tuple, and so on."""
    content = b"\x80\x02}(K\x01\x85q\x00"
    for number in range(60):
        content += b"0h" + bytes([number]) + b"h" + bytes([number]) + b"\x86q" + bytes([number + 1])
    return content + b"K\x01u."


COSTLY: dict[str, Callable[[], bytes]] = {
    "bytearray": lambda: pickle.dumps({"a": Called(bytearray, 3_400_000_000)}, 2),
    "FloatTensor": lambda: pickle.dumps({"a": Called(torch.FloatTensor, 900_000_000)}, 2),
    "opcodes": lambda: b"\x80\x02" + b"]" * 60_000_000 + b".",
    "tuples": hashed_for_years,
}


@pytest.mark.parametrize("what", COSTLY)
def test_a_costly_pickle_is_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 100_000)
    path = with_pickle(tmp_path / "a.pt", COSTLY[what]())
    begun = time.process_time()
    with pytest.raises(InputRefused, match=r"a\.pt cannot be read with weights_only=True"):
        open_pickle(path)
    text_in_pickle(path)
    assert time.process_time() - begun < 5


# --- Arrays, rows and sounds that are packed ---


@pytest.mark.parametrize("descr", ["|V0", "<U0", "|S0"])
def test_entries_without_a_size_are_no_array(tmp_path: Path, descr: str) -> None:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({1 << 40},), }}".encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    assert "is too short" in refused_at_little_cost(lambda: read_arrays(tmp_path / "a.npz"), seconds=2, memory=MIB)


def test_a_parquet_file_that_inflates_is_refused(tmp_path: Path) -> None:
    text = pa.array(["x" * 100_000]).dictionary_encode()
    indices = pa.array(np.zeros(2_000, np.int32))
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, text.dictionary).cast(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    told = refused_at_little_cost(lambda: open_records(tmp_path / "a.parquet"), seconds=10, memory=50 * MIB)
    assert "inflates from" in told


def test_a_sound_that_states_hours_is_refused(tmp_path: Path) -> None:
    header = b"RIFF" + struct.pack("<I", 0x7FFFFFFF) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    (tmp_path / "a.wav").write_bytes(header + b"data" + struct.pack("<I", 0x7FFFFF00) + bytes(100))
    with (tmp_path / "a.wav").open("r+b") as file:
        file.truncate(0x7FFFFF00)
    assert "too many" in refused_at_little_cost(lambda: read_sound(tmp_path / "a.wav", 8000), seconds=2, memory=MIB)


# --- Graphs ---

TILE = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N] x) => (float[M] y) <int64[1] times = {900000000}> { y = Tile(x, times) }"""
FOLDED = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N] x) => (float[M] y) <float[1] one = {1}, int64[1] times = {900000000}>
{ t = Tile(one, times)
  y = Add(t, x) }"""
ENDLESS = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N] x) => (float[N] y) <int64 most = {9223372036854775807}, bool on = {1}>
{ y = Loop(most, on, x) <body = b (int64 i, bool c, float[N] v) => (bool d, float[N] w)
  { d = Identity(c)
    w = Relu(v) }> }"""


def a_graph(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@LINUX
@pytest.mark.parametrize("text", [TILE, FOLDED])
def test_a_graph_that_takes_gigabytes_is_refused(tmp_path: Path, text: str) -> None:
    runner = OnnxRunner(a_graph(tmp_path / "tile.onnx", text))
    x = {"x": np.ones(1, np.float32)}
    with pytest.raises(RuntimeRefused, match=r"tile\.onnx needs more memory than the 2 GiB that it may take"):
        runner.run(x)
    with pytest.raises(RuntimeRefused, match="needs more memory"):  # and the process goes on
        runner.run(x)


@LINUX
def test_a_run_may_be_allowed_more_memory_or_less(tmp_path: Path) -> None:
    path, x = a_graph(tmp_path / "tile.onnx", TILE.replace("900000000", "30000000")), {"x": np.ones(1, np.float32)}
    assert OnnxRunner(path).run(x)["y"].size == 30_000_000
    with stated_memory(0.05), pytest.raises(RuntimeRefused, match=r"than the 0\.05 GiB .* Allow more with memory="):
        OnnxRunner(path).run(x)
    with stated_memory(0.5):
        assert OnnxRunner(path).run(x)["y"].size == 30_000_000


def test_an_endless_graph_ends_at_ctrl_c(tmp_path: Path) -> None:
    runner, begun = OnnxRunner(a_graph(tmp_path / "loop.onnx", ENDLESS)), time.monotonic()
    press = functools.partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
    threading.Timer(0.3, press).start()
    with pytest.raises(KeyboardInterrupt):
        runner.run({"x": np.ones(1, np.float32)})
    assert time.monotonic() - begun < 60


def test_a_flood_of_names_in_json_rows_is_not_quadratic(tmp_path: Path) -> None:
    row = json.dumps({f"c{number}": 1 for number in range(200_000)} | {"text": "a"})
    (tmp_path / "a.jsonl").write_text(f"{row}\n{row}\n")
    begun = time.process_time()
    records = open_records(tmp_path / "a.jsonl", {"text": "c1"})
    assert len(records[1]) == 200_000 and time.process_time() - begun < 5


@LINUX
def test_a_program_that_takes_gigabytes_is_refused(tmp_path: Path) -> None:
    class Repeating(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1 << 30)

    torch.export.save(torch.export.export(Repeating(), (torch.ones(2),)), tmp_path / "r.pt2")
    runner = open_candidate(open_artifact(tmp_path / "r.pt2"), HowToOpen(base=None))  # type: ignore[arg-type]
    with pytest.raises(RuntimeRefused, match=r"r\.pt2 needs more memory than the 2 GiB that it may take"):
        runner.run({"x": np.ones(2, np.float32)})


# --- Programs of ExecuTorch ---


def a_program_of_one_tensor(path: Path, sizes: int) -> Path:
    """Two methods of 4,096 inputs each, all of which are one tensor of so many sizes."""
    content = bytearray(b"\0\0\0\0ET12")

    def put(kind: str, *numbers: int) -> int:
        content.extend(struct.pack(f"<{kind}", *numbers))
        return len(content) - struct.calcsize(f"<{kind}")

    def table(*fields: tuple[int, int, str]) -> tuple[int, list[int]]:
        """A table of fields: each a number, a value and its kind. Its place, and those of the fields."""
        kinds = "i" + "".join(kind for _, _, kind in fields)
        places = [struct.calcsize(f"<i{kinds[1 : 1 + at]}") for at in range(len(fields))]
        slots = [0] * (1 + max(number for number, _, _ in fields))
        for (number, _, _), place in zip(fields, places, strict=True):
            slots[number] = place
        fields_at = put(f"HH{len(slots)}H", 4 + 2 * len(slots), struct.calcsize(f"<{kinds}"), *slots)
        start = put(kinds, len(content) - fields_at, *(value for _, value, _ in fields))
        return start, [start + place for place in places]

    def point(place: int, target: int) -> None:
        struct.pack_into("<I", content, place, target - place)

    program, (plans,) = table((1, 0, "I"))
    point(0, program)
    point(plans, put("III", 2, 0, 0))
    plan, (values, inputs) = table((2, 0, "I"), (3, 0, "I"))
    first = struct.unpack_from("<I", content, plans)[0] + plans
    point(first + 4, plan)
    point(first + 8, plan)
    point(values, put("II", 1, 0))
    value_list = struct.unpack_from("<I", content, values)[0] + values
    point(inputs, put("4097I", 4096, *[0] * 4096))
    value, (_, tensor_at) = table((0, 5, "B"), (1, 0, "I"))
    point(value_list + 4, value)
    tensor, (sizes_at,) = table((2, 0, "I"))
    point(tensor_at, tensor)
    point(sizes_at, put(f"{sizes + 1}I", sizes, *[1] * sizes))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("sizes", "message"), [(4096, "a list has 4,096 entries"), (64, "")])
def test_tensors_of_a_program_that_share_their_sizes_take_little(sizes: int, message: str, tmp_path: Path) -> None:
    path = a_program_of_one_tensor(tmp_path / "m.pte", sizes)
    assert path.stat().st_size < 40_000
    if message:
        told = refused_at_little_cost(lambda: read_methods(path), seconds=10, memory=20 * MIB)
        assert message in told
    else:
        assert len(read_methods(path)[1].inputs) == 4096
