"""A thousand adapters of MiniLM in one session, beside the merged model and beside PEFT with a cache of adapters.

The adapters are one adapter of rank 8 on q and v, its ranks rotated at random between A and B, so that each has another
change of the same size. Requests are drawn by Zipf's law. Processor time counts, of one thread.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import peft
import torch
from numpy.typing import NDArray
from transformers import AutoModel

import lora_export as le
from benchmarks import minilm
from benchmarks.measure import keep, machine
from lora_export import formats
from lora_export.formats import onnx_adapter
from lora_export.lora import Adapter
from lora_export.storage import safetensors_file

ADAPTERS = int(os.environ.get("SLOTS_ADAPTERS", "1000"))
ROWS, TOKENS, BATCHES, BATCHES_OF_PEFT = 32, 32, 60, 3
SLOTS, CACHED = (8, 64, 256), 64
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


def requests(seed: int) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, ADAPTERS + 1)
    names = [str(1 + number) for number in rng.choice(ADAPTERS, ROWS, p=weights / weights.sum())]
    ids = rng.integers(1000, 20000, (ROWS, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}, names


def traffic(served: le.AdapterSlots, merged: Any, rivals: dict[str, PeftCache]) -> tuple[dict[str, float], float]:
    """Texts in a second of processor time by what computes them, and how many adapters a batch loads."""
    slots, loads = served.contract.slots, 0
    seconds: dict[str, list[float]] = {"merged": [], "slots": [], **{name: [] for name in rivals}}
    for seed in range(-5, BATCHES):
        feeds, names = requests(seed + 5)
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
    return {what: ROWS / median(own) for what, own in seconds.items() if own}, loads / BATCHES


def time_to_load(served: le.AdapterSlots) -> float:
    """The processor time of loading an adapter that is not loaded, in ms."""
    cold = [name for name in map(str, range(ADAPTERS, 0, -1)) if name not in served.loaded][:20]

    def load(name: str) -> None:
        served.prefetch(name).result()

    return 1000 * median(used(load, name)[0] for name in cold)


def test_a_thousand_adapters_in_slots(tmp_path):
    torch.set_num_threads(1)
    base, made = tmp_path / "base.onnx", minilm.adapter(tmp_path / "adapter")
    AutoModel.from_pretrained(minilm.BASE).save_pretrained(tmp_path / "model")  # without the pooling
    le.export_onnx(tmp_path / "model", base, verify=False)
    le.export_onnx(base, tmp_path / "merged.onnx", adapters=made, verify=False)
    rotated, merged = Rotated(tmp_path / "files", formats.load(made), made), session(tmp_path / "merged.onnx")
    lines = ["| | texts a second | merged = 1 | loads a batch | load one | stacks |", "|---|---|---|---|---|---|"]
    for slots in SLOTS:
        path, shape = tmp_path / f"{slots}.onnx", {"slots": slots, "max_rank": 8}
        le.export_onnx(base, path, adapters=made, lora="slots", verify=False, overwrite=True, **shape)
        served = le.AdapterSlots(path, rotated.folder, session=session(path))
        stacks = sum(array.nbytes for array in served.contract.stacks().values()) / 2**20
        if slots == SLOTS[0]:
            for number in range(1, ADAPTERS + 1):
                rotated.write_slot(number, served.contract)
        ways = {"each text alone": False, "texts of one adapter together": True} if slots == CACHED else {}
        rivals = {f"PEFT, {CACHED} cached, {way}": PeftCache(rotated, together=flag) for way, flag in ways.items()}
        rates, loads = traffic(served, merged, rivals)
        costs = f"{loads:.1f} | {time_to_load(served):.1f} ms | {stacks:.1f} MiB"
        ratios = {what: rate / rates["merged"] for what, rate in rates.items()}
        lines += [
            f"| merged, beside {slots} slots | {rates['merged']:.0f} | 1 | | | |",
            f"| {slots} slots | {rates['slots']:.0f} | {ratios['slots']:.2f} | {costs} |",
        ]
        lines += [f"| {name} | {rates[name]:.1f} | {ratios[name]:.3f} | | | |" for name in rivals]
    about = f"{ADAPTERS} adapters, Zipf; batches of {ROWS} texts of {TOKENS} tokens; processor time, medians"
    keep("slots", "\n".join([*lines, "", f"{about}. {machine()}"]))
