"""What adapters beside the weights cost while a graph runs, beside the graph in which they are folded in.

A Llama of 138 million parameters in fp32, rank 16 on every linear layer, onnxruntime on the CPU: exported without a
cache, where one token stands for a step of decoding; and as onnxruntime-genai's builder makes it, beside the graph that
the builder makes of the model with the adapter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from benchmarks.llama_graph import MAKE
from benchmarks.measure import keep, machine, run
from lora_export import formats, plan
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.weights.checkpoint import open_checkpoint

ROUNDS = 8
ADAPTERS = 8  # in the graph of rows


class Shape(NamedTuple):
    rows: int
    tokens: int
    past: int = 0  # tokens in the cache

    def __str__(self) -> str:
        return f"{self.rows} x {self.tokens}" + (f" after {self.past}" if self.past else "")


SHAPES = {Shape(8, 64): 1, Shape(8, 1): 6, Shape(1, 1): 10}  # -> runs in each round
BUILT_SHAPES = {Shape(8, 64): 1, Shape(1, 64): 3, Shape(8, 1, 64): 6, Shape(1, 1, 64): 10}
COUNTS = (1, 4, 8)  # adapters beside one base, or merged models
TOLD = f"rows x tokens; {ROUNDS} rounds, 2 threads, onnxruntime {ort.__version__}"
CONTROL = "merged, a second session"  # how far two sessions of one file lie apart: no figure is finer than that
FILE = "model.onnx"
HEADS = 12
LOADED = """
import json, os, sys, time
import onnxruntime as ort
def resident():  # not the peak: a child's begins with its parent's
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
options = ort.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 2
before, begun, kept = resident(), time.perf_counter(), []
for path in sys.argv[1:]:
    if path.endswith(".onnx_adapter"):
        kept.append(ort.LoraAdapter())
        kept[-1].Load(path)
    else:
        kept.append(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
print(json.dumps([time.perf_counter() - begun, resident() - before]))
"""


@dataclass(frozen=True)
class Rival:
    """A graph, and what is fed to it besides tokens."""

    path: Path
    adapter: Path | None = None

    def session(self) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 2
        return ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def feeds(self, shape: Shape, taken: Sequence[Any]) -> dict[str, np.ndarray]:
        """Of these inputs; of whatever is no token, mask or id, a cache is expected."""
        random = np.random.default_rng(0)
        rows, tokens, past = shape
        given = {
            "input_ids": random.integers(0, 32000, (rows, tokens)),
            "attention_mask": np.ones((rows, past + tokens), np.int64),
            "adapter_ids": np.arange(rows) % ADAPTERS + 1,
        }
        cache = random.standard_normal((rows, HEADS, past, 64), np.float32)
        return {value.name: given.get(value.name, cache) for value in taken}

    def options(self) -> tuple[Any, Any]:
        """onnxruntime's RunOptions, and what has to live as long."""
        options = ort.RunOptions()
        if self.adapter is None:
            return options, None
        held = ort.LoraAdapter()
        held.Load(str(self.adapter))
        options.add_active_adapter(held)
        return options, held


Times = dict[tuple[str, Shape], list[float]]  # seconds, one a round


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph in a folder of its own, beside the model and the adapter."""
    folder = tmp_path_factory.mktemp("latency")
    run([sys.executable, "-c", MAKE, folder])
    base, adapter = folder / "inside" / FILE, formats.load(folder / "adapter")
    named = [replace(adapter, name=f"adapter-{number}", sha256=str(number)) for number in range(ADAPTERS)]
    for way in ("merged", "nodes", "inputs", "rows"):
        model = load_graph(base)
        sites = find_sites(model)
        steps = plan.make(named if way == "rows" else [adapter], sites.specs)
        (folder / way).mkdir()
        if way == "inputs":
            contract = insert_inputs(model, sites, [step.weight for step in steps.steps])
            given = onnx_adapter.input_values(contract, steps, adapter.name)
            for each in named:
                onnx_adapter.write(folder / way / f"{each.name}.onnx_adapter", given, contract, sha256=each.sha256)
        else:
            {"merged": fold_graph, "nodes": insert_nodes, "rows": insert_rows}[way](model, sites, steps)
        save_graph(model, folder / way, FILE)
    return folder


def timed(rivals: Mapping[str, Rival], rounds: int, shapes: Mapping[Shape, int] = SHAPES) -> Times:
    """Each in turn with a session of its own, in every round: where a session's memory lies is luck, too."""
    times: Times = {}
    for number in range(rounds):
        names = [*rivals][number % len(rivals) :] + [*rivals][: number % len(rivals)]
        for name in names:
            rival = rivals[name]
            session, (options, held) = rival.session(), rival.options()
            for shape, runs in shapes.items():
                feeds, spent = rival.feeds(shape, session.get_inputs()), []
                for _ in range(runs + 1):  # the first one fetches memory
                    begun = time.perf_counter()
                    session.run(None, feeds, options)
                    spent.append(time.perf_counter() - begun)
                times.setdefault((name, shape), []).append(median(spent[1:]))
            del session, held
    return times


def against(times: Times, name: str, other: str, shape: Shape) -> float:
    """How many times as long as the other one takes: the median over the rounds."""
    return median(a / b for a, b in zip(times[name, shape], times[other, shape], strict=True))


def table(times: Times, limit: str) -> str:
    names, shapes = (list(dict.fromkeys(there)) for there in zip(*times, strict=True))
    head = " | ".join(map(str, shapes))
    lines = [f"| milliseconds (times {limit}) | {head} |", "|---|" + "---|" * len(shapes)]
    for name in names:
        cells = (
            f"{1000 * median(times[name, shape]):.1f} ({against(times, name, limit, shape):.2f})" for shape in shapes
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_a_run_beside_the_merged_graph(place: Path) -> None:
    merged = Rival(place / "merged" / FILE)
    rivals = {
        "merged": merged,
        CONTROL: merged,
        "nodes": Rival(place / "nodes" / FILE),
        "inputs": Rival(place / "inputs" / FILE, place / "inputs/adapter-0.onnx_adapter"),
        f"rows, {ADAPTERS} adapters, mixed": Rival(place / "rows" / FILE),
    }
    times = timed(rivals, ROUNDS)
    keep("latency", f"{table(times, 'merged')}\n\n{TOLD}. {machine()}")
    # Wall time is not asserted; that a insert_nodes is no second model is.
    assert all(against(times, name, "merged", Shape(8, 64)) < 1.5 for name in rivals)


@pytest.fixture(scope="module")
def built(place: Path) -> Path:
    """What genai's builder makes of the model, with our adapters in it; and what it makes of model and adapter."""
    from support.exporters import save_tokenizer
    from support.genai import build_genai_graph

    folder, adapter = place / "genai", formats.load(place / "adapter")
    save_tokenizer(place / "model")
    build_genai_graph(place / "model", folder / "base", "fp32")
    build_genai_graph(place / "model", folder / "genai-nodes", "fp32", f"adapter_path={place / 'adapter'}")
    for way in ("merged", "nodes", "inputs", "genai-inputs"):
        (folder / way).mkdir()
    for way in ("merged", "nodes", "inputs"):
        model = load_graph(folder / "base" / FILE)
        sites = find_sites(model, open_checkpoint(place / "model"))
        steps = plan.make([adapter], sites.specs)
        if way == "inputs":
            contract = insert_inputs(model, sites, [step.weight for step in steps.steps], names="genai")
            given = onnx_adapter.input_values(contract, steps, adapter.name)
            onnx_adapter.write(folder / way / "a.onnx_adapter", given, contract, sha256=adapter.sha256)
        else:
            {"merged": fold_graph, "nodes": insert_nodes}[way](model, sites, steps)
        save_graph(model, folder / way, FILE)
    extract(folder / "genai-nodes" / FILE, folder / "genai-inputs")
    return folder


def extract(graph: Path, folder: Path) -> None:
    """The builder's adapter as inputs of its graph, as Olive's `extract-adapters` makes them of it."""
    model = load_graph(graph)
    parameters = {}
    for name, value in model.graph.initializers.items():
        if ".lora_" in name:
            array = value.const_value.numpy()
            axis = 1 if "lora_A" in name else 0  # the rank's
            parameters[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            value.const_value = ir.Tensor(np.delete(array, slice(None), axis), name=name)
            value.shape = ir.Shape([size if at != axis else "lora_r" for at, size in enumerate(array.shape)])
            model.graph.inputs.append(value)
    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters(parameters)
    form.export_adapter(str(folder / "a.onnx_adapter"))
    save_graph(model, folder, FILE)


def test_a_run_beside_genais_own_lora_graph(built: Path) -> None:
    ways = {
        "merged": "merged",
        CONTROL: "merged",
        "nodes": "nodes",
        "inputs": "inputs",
        "genai's builder, adapter as nodes": "genai-nodes",
        "genai's builder, adapter as inputs": "genai-inputs",
    }
    rivals = {
        name: Rival(built / way / FILE, built / way / "a.onnx_adapter" if way.endswith("inputs") else None)
        for name, way in ways.items()
    }
    answers = {name: logits(rival) for name, rival in rivals.items()}
    for answer in answers.values():  # all hold one adapter, and it does something
        np.testing.assert_allclose(answer, answers["merged"], rtol=1e-3, atol=1e-3)
    assert np.abs(logits(Rival(built / "base" / FILE)) - answers["merged"]).max() > 0.1
    times = timed(rivals, ROUNDS, BUILT_SHAPES)
    keep("latency beside genai", f"{table(times, 'merged')}\n\n{TOLD}, a key/value cache. {machine()}")
    assert all(against(times, name, "merged", Shape(8, 64)) < 1.5 for name in rivals)


def logits(rival: Rival) -> np.ndarray:
    session, (options, _held) = rival.session(), rival.options()
    (answer,) = session.run(["logits"], rival.feeds(Shape(2, 5), session.get_inputs()), options)
    return answer


def loaded(*paths: Path) -> tuple[float, float]:
    """Seconds and MiB of a fresh process to have all these at hand."""
    line = [sys.executable, "-c", LOADED, *map(str, paths)]
    seconds, memory = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return seconds, memory


def test_a_base_and_many_adapters_beside_as_many_merged_models(place: Path) -> None:
    def lines(count: int) -> dict[str, Sequence[Path]]:
        return {
            f"{count} merged": [place / "merged" / FILE] * count,
            f"base and {count} .onnx_adapter": [
                place / "inputs" / FILE,
                *(place / f"inputs/adapter-{number}.onnx_adapter" for number in range(count)),
            ],
        }

    ways = {name: paths for count in COUNTS for name, paths in lines(count).items()}
    ways[f"rows, {ADAPTERS} adapters in it"] = [place / "rows" / FILE]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(3):
        for name, paths in ways.items():
            found[name].append(loaded(*paths))
    cells = {name: tuple(map(median, zip(*runs, strict=True))) for name, runs in found.items()}
    rows = [f"| {name} | {seconds:.2f} s | {memory:.0f} MiB |" for name, (seconds, memory) in cells.items()]
    keep("loading", "\n".join(["| | load_graph | memory |", "|---|---|---|", *rows, "", f"3 rounds. {machine()}"]))
    assert cells["base and 8 .onnx_adapter"][1] < cells["8 merged"][1] / 3
    assert cells[f"rows, {ADAPTERS} adapters in it"][1] < cells["8 merged"][1] / 3
