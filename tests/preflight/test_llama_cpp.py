"""What llama.cpp really does with each adapter is what `check` says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import lora_export
from lora_export.errors import LoraExportError
from support import ROOT
from support.gguf_files import Kind, llama, runnable, write_llama, written
from support.llama_cpp_runs import PYTHON, TOKENS
from support.preflight_adapters import CASES

pytestmark = pytest.mark.skipif(not PYTHON, reason="llama.cpp is in an environment of its own: make test-llama-cpp")
RIGHT = 1e-3  # the largest error of a logit, relative to the adapter's effect
READING = lora_export.ReadOptions(allow_pickle=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Path]]:
    """The bases as a folder and as a GGUF file, with tables of their own and tied."""
    found = {}
    for tied in (False, True):
        folder = tmp_path_factory.mktemp("base")
        llama(tied=tied).save_pretrained(folder / "hf")
        found[tied] = (
            folder / "hf",
            write_llama(folder / "base.gguf", Kind.F32, model=llama(tied=tied), fields=runnable),
        )
    return found


def logits(folder: Path, *runs: object) -> list[Any] | None:
    """The logits of each run; None where llama.cpp ends its process."""
    script = [PYTHON, ROOT / "tests/support/llama_cpp_logits.py", folder / "logits.npz", *map(str, runs)]
    if subprocess.run(script, check=False, capture_output=True).returncode:
        return None
    with np.load(folder / "logits.npz") as found:
        return [found[str(number)] for number in range(len(runs))]


def runs_right(folder: Path, base: Path, adapter: Path, wanted: Any) -> bool:
    found = logits(folder, base, f"{base}+{adapter}")
    if found is None or not found[1].size:
        return False
    without, beside = found
    return bool(np.abs(beside - wanted).max() <= RIGHT * np.abs(without - wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_an_adapter_of_peft(case: str, bases: Mapping[bool, tuple[Path, Path]], tmp_path: Path) -> None:
    model = CASES[case].write(tmp_path / "adapter")
    folder, base = bases[CASES[case].tied]
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = lora_export.check(tmp_path / "adapter", runtimes=["llama.cpp"], base=folder, reading=READING)
    predicted = [repair.name for repair in found.outcomes[0].repairs]
    options: dict[str, Any] = {"to": "gguf", "base": folder, "reading": READING}
    try:
        file = lora_export.convert(tmp_path / "adapter", tmp_path / "a.gguf", **options).output
    except LoraExportError:
        assert predicted != ["gguf"]
    else:
        assert (predicted == ["gguf"]) is runs_right(tmp_path, base, file, wanted)


def gguf_file(
    path: Path,
    names: Mapping[str, tuple[int, int]],
    *,
    architecture: str = "llama",
    alpha: float | None = 8.0,
    rank: int = 4,
    left_out: str = "",
) -> Path:
    """An adapter with pairs of these (out, in) sizes."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(str(path), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (out, inputs) in names.items():
        shapes = {"lora_a": (rank, inputs), "lora_b": (out, rank)}
        for side, shape in shapes.items():
            if f"{name}.weight.{side}" != left_out:
                writer.add_tensor(f"{name}.weight.{side}", rng.normal(0, 0.05, shape).astype(np.float32))
    return written(writer, path)


V = {"blk.0.attn_v": (128, 256)}
DOWN = {"blk.0.ffn_down": (256, 256)}
Q_AND_O = {"blk.0.attn_q": (256, 256), "blk.0.attn_output": (256, 256)}
GATE_AND_UP = {"blk.0.ffn_gate": (256, 256), "blk.0.ffn_up": (256, 256)}
FILES: dict[str, tuple[Callable[[Path], Path], bool]] = {
    "v": (lambda path: gguf_file(path, V), True),
    "v and down": (lambda path: gguf_file(path, V | DOWN), True),
    "no alpha": (lambda path: gguf_file(path, V, alpha=None), True),
    "alpha 1": (lambda path: gguf_file(path, V, alpha=1.0), True),
    "rank 1": (lambda path: gguf_file(path, V, rank=1), True),
    "rank 128": (lambda path: gguf_file(path, V, rank=128), True),
    "the head": (lambda path: gguf_file(path, {"output": (64, 256)}), True),
    "k": (lambda path: gguf_file(path, {"blk.0.attn_k": (128, 256)}), True),
    "q and o": (lambda path: gguf_file(path, Q_AND_O), True),
    "gate and up": (lambda path: gguf_file(path, GATE_AND_UP), True),
    "all layers": (lambda path: gguf_file(path, V | DOWN | Q_AND_O | GATE_AND_UP | {"output": (64, 256)}), True),
    "alpha 64": (lambda path: gguf_file(path, V, alpha=64.0), True),
    "a fraction as alpha": (lambda path: gguf_file(path, V, alpha=0.5), True),
    "rank 256": (lambda path: gguf_file(path, V, rank=256), True),
    "another architecture": (lambda path: gguf_file(path, V, architecture="qwen2"), False),
    "no B": (lambda path: gguf_file(path, V, left_out="blk.0.attn_v.weight.lora_b"), False),
    "no A": (lambda path: gguf_file(path, V, left_out="blk.0.attn_v.weight.lora_a"), False),
    "a head of more words": (lambda path: gguf_file(path, {"output": (65, 256)}), False),
    "an expert": (lambda path: gguf_file(path, {"blk.0.ffn_down_exps": (256, 256)}), False),
    "another width": (lambda path: gguf_file(path, {"blk.0.attn_v": (128, 64)}), False),
    "another height": (lambda path: gguf_file(path, {"blk.0.attn_v": (256, 256)}), False),
    "a layer too many": (lambda path: gguf_file(path, {"blk.1.attn_v": (128, 256)}), False),
    "no such tensor": (lambda path: gguf_file(path, {"blk.0.attn_w": (128, 256)}), False),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_llama_cpps_format(name: str, bases: Mapping[bool, tuple[Path, Path]], tmp_path: Path) -> None:
    make, fits = FILES[name]
    folder, base = bases[False]
    adapter = make(tmp_path / "a.gguf")
    try:
        predicted = bool(lora_export.check(adapter, runtimes=["llama.cpp"], base=folder))
    except LoraExportError:
        predicted = False
    found = logits(tmp_path, base, f"{base}+{adapter}")
    loads = found is not None and bool(found[1].size) and not np.array_equal(*found)
    assert predicted is loads is fits


def test_a_head_of_a_tied_base_is_refused(bases: Mapping[bool, tuple[Path, Path]], tmp_path: Path) -> None:
    adapter = gguf_file(tmp_path / "a.gguf", {"output": (64, 256)})
    found = logits(tmp_path, f"{bases[True][1]}+{adapter}")
    assert not lora_export.check(adapter, runtimes=["llama.cpp"], base=bases[True][0])
    assert found is not None and not found[0].size
