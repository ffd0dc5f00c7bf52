"""What a merge into an .onnx costs beside the copy of its files, and beside merging in PyTorch and exporting again.

The graph is a Llama of 138 million parameters in fp32 (tied embeddings, random weights), exported once; the adapter
has rank 16 on every linear layer.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.goals import goal
from benchmarks.llama_graph import MAKE
from benchmarks.measure import COMPILED, Run, keep, machine, ratio, run, settle, side_by_side, table
from support.handmade import peft_adapter

RUNS, RUNS_OF_PEERS = 5, 2
COPY, OURS = "`cp -r` and `sync`", "lora-export merge"
PEER = "PEFT merge_and_unload and transformers' OnnxExporter"
EXPORT = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
model, adapter, out = sys.argv[1:]
merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload().eval()
ids = torch.ones(2, 16, dtype=torch.long)
exported = OnnxExporter().export(merged, {"input_ids": ids, "attention_mask": ids}, OnnxConfig(dynamic=True))
Path(out).mkdir()
OnnxExporter.save_program(exported.program, Path(out) / "model.onnx")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    run([sys.executable, "-c", MAKE, folder])
    return folder


@pytest.mark.parametrize("which", ["inside", "beside"])
def test_a_merge_into_a_graph_beside_the_copy_and_exporting_again(place: Path, which: str) -> None:
    graph, out = place / which, place / "out"
    size = sum(path.stat().st_size for path in graph.iterdir())

    def settled() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settle(place, size, "*")

    def ours(**variables: str) -> Run:
        out.mkdir()
        line = [sys.executable, "-m", "lora_export", "merge", graph / "model.onnx", place / "adapter"]
        return run([*line, "-o", out / "model.onnx"], **variables)

    def again() -> Run:
        return run([sys.executable, "-c", EXPORT, place / "model", place / "adapter", out])

    rivals = {COPY: lambda: run(["cp", "-r", graph, out], ["sync"]), OURS: ours}
    results = side_by_side(rivals | {f"{OURS}, compiled": lambda: ours(**COMPILED)}, settled, RUNS)
    beside = side_by_side({OURS: ours, PEER: again}, settled, RUNS_OF_PEERS)
    told = f"{RUNS} rounds beside the copy, {RUNS_OF_PEERS} beside the peer. {machine()}"
    keep(f"merge into a graph, weights {which}", f"{table(results, COPY)}\n\n{table(beside, OURS)}\n\n{told}")
    goal(f"merge, graph, weights {which}, compiled", results, f"{OURS}, compiled", COPY, 1.6)
    assert max(there.peak for there in results[OURS]) <= 200
    assert ratio(beside, PEER, OURS) >= 15


WIDTH, LAYERS, GROUP = 4096, 16, 32
STRENGTHS = {"kept": 0.4, "to 8 bits": 0.05, "to floats": 1e-3}  # of ΔW beside W


def quantised_graph(place: Path) -> Path:
    """0.16 GB of layers in 4 bits with random integers and half-precision scales, weights beside the graph."""
    rng, path = np.random.default_rng(0), place / "q" / "model.onnx"
    path.parent.mkdir()
    nodes, tensors, start = [], [], 0
    with (path.parent / "model.data").open("wb") as data:
        for name in (f"layers.{number}.fc" for number in range(LAYERS)):
            own = {
                f"{name}.weight_Q4": rng.integers(0, 256, (WIDTH, WIDTH // GROUP, GROUP // 2), np.uint8),
                f"{name}.weight_scales": rng.uniform(0.004, 0.006, (WIDTH, WIDTH // GROUP)).astype(np.float16),
                f"{name}.weight_zp": np.full((WIDTH, WIDTH // GROUP // 2), 0x87, np.uint8),
            }
            for key, array in own.items():
                kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                tensor = onnx.TensorProto(name=key, data_type=kind, dims=array.shape)
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for entry, value in {"location": "model.data", "offset": start, "length": array.nbytes}.items():
                    tensor.external_data.add(key=entry, value=str(value))
                start += data.write(array.tobytes())
                tensors.append(tensor)
            settings = {"K": WIDTH, "N": WIDTH, "bits": 4, "block_size": GROUP, "domain": "com.microsoft"}
            nodes.append(onnx.helper.make_node("MatMulNBits", ["x", *own], [f"{name}.y"], name=name, **settings))
    x, *ys = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["n", WIDTH])
        for name in ("x", *(node.output[0] for node in nodes))
    )
    graph = onnx.helper.make_graph(nodes, "g", [x], ys, tensors)
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def test_a_merge_into_quantised_weights_of_a_graph(tmp_path: Path) -> None:
    graph, out, rng = quantised_graph(tmp_path), tmp_path / "out", np.random.default_rng(1)
    a = rng.normal(size=(8, WIDTH)) / WIDTH**0.5
    b = rng.normal(size=(WIDTH, 8)) * 0.023 * (WIDTH / 8) ** 0.5  # of the size of W
    rows = [f"| {COPY} | {run(['cp', '-r', graph.parent, out], ['sync']).seconds:.1f} s | – | 1.00 |"]
    size = sum(path.stat().st_size for path in graph.parent.iterdir())
    for what, strength in STRENGTHS.items():
        pairs = {f"layers.{number}.fc": (a, b * strength) for number in range(LAYERS)}
        adapter = peft_adapter(tmp_path / what, pairs)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        command = [sys.executable, "-m", "lora_export", "merge", graph, adapter, "-o", out / "m.onnx", "--requantize"]
        took = run([*command, "--min-retention", "0.5"])
        written = sum(path.stat().st_size for path in out.iterdir()) / size
        rows.append(
            f"| {what} | {took.seconds:.1f} s, {took.used:.1f} of the processor | {took.peak:.0f} MiB | {written:.2f} |"
        )
        assert took.peak <= 300
    head = "| every layer | time | peak memory | size beside the base's |\n|---|---|---|---|"
    text = "\n".join([head, *rows])
    keep("merge into a quantised graph", f"{text}\n\n{size / 1e9:.2f} GB in 4 bits, {LAYERS} layers. {machine()}")
