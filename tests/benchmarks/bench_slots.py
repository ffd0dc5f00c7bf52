"""A thousand adapters of MiniLM in one session, beside the merged model and beside PEFT with a cache of adapters.

The adapters are one adapter of rank 8 on q and v, its ranks rotated at random between A and B, so that each has another
change of the same size. Requests are drawn by Zipf's law. Processor time counts, of one thread. A picture shows the
growth with slots and rank: the same change, spread over more ranks.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel

import lora_export as le
from benchmarks import minilm
from benchmarks.measure import keep, machine
from lora_export import formats
from lora_export.formats import onnx_adapter
from lora_export.lora import Adapter, LoraPair
from lora_export.storage import safetensors_file

ADAPTERS = int(os.environ.get("SLOTS_ADAPTERS", "1000"))
ROWS, TOKENS, BATCHES, BATCHES_OF_PEFT = 32, 32, 60, 3
SLOTS, CACHED = (8, 64, 256), 64
RANKS, BATCHES_OF_GROWTH, ADAPTERS_OF_GROWTH = (8, 16, 64), 15, 300
PLOT = Path(__file__).with_name("slots.svg")
OUTPUT = "last_hidden_state"


class Rotated:
    """Adapters by number, in PEFT's format and as files for slots."""

    def __init__(self, folder: Path, base: Adapter, peft_folder: Path):
        self.folder, self.base, self.peft_folder = folder, base, peft_folder
        folder.mkdir()

    def pair(self, number: int, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A (rank, in) and B (out, rank), without the scale."""
        own = self.base.pairs[name]
        rotation = np.linalg.qr(np.random.default_rng(number).standard_normal((own.rank, own.rank)))[0]
        return own.a, (own.b @ rotation).astype(np.float32)

    def write_slot(self, number: int, contract: Any) -> None:
        values = {}
        for place in contract.places:
            name = place.weight.removesuffix(".weight")
            a, b = self.pair(number, name)
            values |= {
                place.a: np.ascontiguousarray(a.T),
                place.b: np.ascontiguousarray(b.T) * self.base.pairs[name].scale,
            }
        onnx_adapter.write(self.folder / f"{number}.onnx_adapter", values, contract, sha256="0")

    def write_peft(self, number: int) -> Path:
        path = self.folder / f"{number}"
        if not path.exists():
            path.mkdir()
            (path / "adapter_config.json").write_bytes((self.peft_folder / "adapter_config.json").read_bytes())
            tensors = {
                f"base_model.model.{name}.lora_{side}.weight": array
                for name in self.base.pairs
                for side, array in zip("AB", self.pair(number, name), strict=True)
            }
            safetensors_file.write(path / "adapter_model.safetensors", tensors, {"format": "pt"})
        return path


class PeftCache:
    """PEFT with the adapters that were used last: a run for each text, or for all texts of a batch with one adapter."""

    def __init__(self, rotated: Rotated, *, together: bool):
        self.rotated, self.together, self.loaded = rotated, together, OrderedDict[str, None]()
        self.model: Any = peft.PeftModel.from_pretrained(
            AutoModel.from_pretrained(minilm.BASE), rotated.write_peft(0), "0"
        )
        self.model.eval()

    def run(self, feeds: dict[str, NDArray[np.int64]], names: list[str]) -> NDArray[np.float32]:
        output = np.zeros((ROWS, TOKENS, 384), np.float32)
        together = [(name, np.flatnonzero(np.array(names) == name)) for name in dict.fromkeys(names)]
        for name, rows in together if self.together else zip(names, np.arange(ROWS)[:, None], strict=True):
            if name not in self.loaded and name != "0":
                self.model.load_adapter(self.rotated.write_peft(int(name)), name)
            self.loaded[name] = None
            self.loaded.move_to_end(name)
            while len(self.loaded) > CACHED:
                self.model.delete_adapter(self.loaded.popitem(last=False)[0])
            self.model.set_adapter(name)
            with torch.no_grad():
                own = {key: torch.from_numpy(value[rows]) for key, value in feeds.items()}
                output[rows] = self.model(**own).last_hidden_state.numpy()
        return output


def used(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """The processor time of this process, and what the work returns."""
    begun = time.process_time()
    result = work(*given)
    return time.process_time() - begun, result


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options)


def requests(seed: int, adapters: int = ADAPTERS) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, adapters + 1)
    names = [str(1 + number) for number in rng.choice(adapters, ROWS, p=weights / weights.sum())]
    ids = rng.integers(1000, 20000, (ROWS, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}, names


def traffic(
    served: le.AdapterSlots, merged: Any, rivals: dict[str, PeftCache], batches: int = BATCHES, adapters: int = ADAPTERS
) -> tuple[dict[str, float], float]:
    """Texts in a second of processor time by what computes them, and how many adapters a batch loads."""
    slots, loads = served.contract.slots, 0
    seconds: dict[str, list[float]] = {"merged": [], "slots": [], **{name: [] for name in rivals}}
    for seed in range(-5, batches):
        feeds, names = requests(seed + 5, adapters)
        names = [names[row % min(slots, ROWS)] for row in range(ROWS)]  # no more of them than slots
        missing = len(set(names) - set(served.loaded))
        of_merged, _ = used(merged.run, [OUTPUT], feeds)
        of_slots, outputs = used(served.run, feeds, names)
        if seed < 0:  # what is used most is loaded then
            continue
        loads += missing
        seconds["merged"].append(of_merged)
        seconds["slots"].append(of_slots)
        for name, rival in rivals.items() if seed < BATCHES_OF_PEFT else ():
            of_peft, expected = used(rival.run, feeds, names)
            seconds[name].append(of_peft)
            np.testing.assert_allclose(outputs[OUTPUT], expected, rtol=1e-3, atol=1e-4)
    return {what: ROWS / median(own) for what, own in seconds.items() if own}, loads / batches


def time_to_load(served: le.AdapterSlots, adapters: int = ADAPTERS) -> float:
    """The processor time of loading an adapter that is not loaded, in ms."""
    cold = [name for name in map(str, range(adapters, 0, -1)) if name not in served.loaded][:20]

    def load(name: str) -> None:
        served.prefetch(name).result()

    return 1000 * median(used(load, name)[0] for name in cold)


def graphs(folder: Path) -> tuple[Path, Path, Any]:
    """MiniLM without its pooling, an adapter of it, and a session of both merged."""
    torch.set_num_threads(1)
    base, made = folder / "base.onnx", minilm.adapter(folder / "adapter")
    AutoModel.from_pretrained(minilm.BASE).save_pretrained(folder / "model")
    le.export_onnx(folder / "model", base, verify=False)
    le.export_onnx(base, folder / "merged.onnx", adapters=made, verify=False)
    return base, made, session(folder / "merged.onnx")


def slots_of(base: Path, rotated: Rotated, slots: int, rank: int) -> le.AdapterSlots:
    path = base.with_name("slots.onnx")
    shape = {"slots": slots, "max_rank": rank}
    le.export_onnx(base, path, adapters=rotated.peft_folder, lora="slots", verify=False, overwrite=True, **shape)
    return le.AdapterSlots(path, rotated.folder, session=session(path))


def mebibytes(served: le.AdapterSlots) -> float:
    return sum(array.nbytes for array in served.contract.stacks().values()) / 2**20


def test_a_thousand_adapters_in_slots(tmp_path):
    base, made, merged = graphs(tmp_path)
    rotated = Rotated(tmp_path / "files", formats.load(made), made)
    lines = ["| | texts a second | merged = 1 | loads a batch | load one | stacks |", "|---|---|---|---|---|---|"]
    for slots in SLOTS:
        served = slots_of(base, rotated, slots, 8)
        if slots == SLOTS[0]:
            for number in range(1, ADAPTERS + 1):
                rotated.write_slot(number, served.contract)
        ways = {"each text alone": False, "texts of one adapter together": True} if slots == CACHED else {}
        rivals = {f"PEFT, {CACHED} cached, {way}": PeftCache(rotated, together=flag) for way, flag in ways.items()}
        rates, loads = traffic(served, merged, rivals)
        costs = f"{loads:.1f} | {time_to_load(served):.1f} ms | {mebibytes(served):.1f} MiB"
        ratios = {what: rate / rates["merged"] for what, rate in rates.items()}
        lines += [
            f"| merged, beside {slots} slots | {rates['merged']:.0f} | 1 | | | |",
            f"| {slots} slots | {rates['slots']:.0f} | {ratios['slots']:.2f} | {costs} |",
        ]
        lines += [f"| {name} | {rates[name]:.1f} | {ratios[name]:.3f} | | | |" for name in rivals]
    about = f"{ADAPTERS} adapters, Zipf; batches of {ROWS} texts of {TOKENS} tokens; processor time, medians"
    keep("slots", "\n".join([*lines, "", f"{about}. {machine()}"]))


def spread(adapter: Adapter, rank: int) -> Adapter:
    """The same changes by more ranks: the columns of B are halved, or less, and repeated."""

    def wider(pair: LoraPair) -> LoraPair:
        times = rank // pair.rank
        return replace(pair, a=np.tile(pair.a, (times, 1)), b=np.tile(pair.b, (1, times)) / np.float32(times))

    return replace(adapter, pairs={name: wider(pair) for name, pair in adapter.pairs.items()})


def plot(growth: dict[int, dict[int, tuple[float, float, float]]]) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.rcParams["svg.hashsalt"] = "slots"
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    for rank, by_slots in growth.items():
        for each, values in zip(axes, zip(*by_slots.values(), strict=True), strict=True):
            each.plot(list(by_slots), values, "o-", label=f"rank {rank}")
    labels = ("texts a second, merged = 1", "loading an adapter, ms", "stacks, MiB")
    for each, label in zip(axes, labels, strict=True):
        each.set(xlabel="slots", ylabel=label, xscale="log", ylim=(0, None))
        each.set_xticks(list(SLOTS), list(map(str, SLOTS)))
        each.set_xticks([], minor=True)
        each.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def test_growth_with_slots_and_rank(tmp_path):
    base, made, merged = graphs(tmp_path)
    growth: dict[int, dict[int, tuple[float, float, float]]] = {}
    for rank in RANKS:
        rotated = Rotated(tmp_path / f"files-{rank}", spread(formats.load(made), rank), made)
        for slots in SLOTS:
            served = slots_of(base, rotated, slots, rank)
            if slots == SLOTS[0]:
                for number in range(1, ADAPTERS_OF_GROWTH + 1):
                    rotated.write_slot(number, served.contract)
            rates, _ = traffic(served, merged, {}, BATCHES_OF_GROWTH, ADAPTERS_OF_GROWTH)
            found = (rates["slots"] / rates["merged"], time_to_load(served, ADAPTERS_OF_GROWTH), mebibytes(served))
            growth.setdefault(rank, {})[slots] = found
    lines = ["| rank | " + " | ".join(f"{slots} slots" for slots in SLOTS) + " |", "|---" * (len(SLOTS) + 1) + "|"]
    for rank, by_slots in growth.items():
        cells = [f"{ratio:.2f}, {load:.1f} ms, {stacks:.0f} MiB" for ratio, load, stacks in by_slots.values()]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    about = f"Texts a second (merged = 1), loading an adapter, stacks; {ADAPTERS_OF_GROWTH} adapters, Zipf"
    keep("growth of slots", "\n".join([*lines, "", f"{about}; processor time, medians. {machine()}"]))
    plot(growth)
