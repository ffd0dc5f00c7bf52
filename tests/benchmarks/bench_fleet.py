"""How many adapters an hour a fleet merges and proves, and how often it reads the base.

The base has the shape of a Llama of 138 million parameters in bf16 (276 MB); the adapters have rank 16, on every linear
layer. Two processes of this machine merge and run `verify --base`. `ADAPTERS` in the environment states how many
adapters there are; needs 0.3 GB for each.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.checkpoints import LlamaShape, adapter, llama
from benchmarks.measure import keep, machine, run, settle
from support.peak import Run

ADAPTERS = int(os.environ.get("ADAPTERS", "200"))
SHAPE = LlamaShape(hidden=768, inner=2048, layers=12, heads=12, key_value_heads=12, words=34500)
AN_HOUR = 1500  # adapters, merged and proven, on two cores
FLEET = """
[[bases]]
path = "base"
adapters = ["adapters/*"]

[[steps]]
step = "merge"
output = "release/{adapter}"

[[steps]]
step = "verify --base"
"""
# Counts the bytes of the base's weights that each process reads in blocks
COUNTER = """
import os, pathlib, sys
class Hook:
    def find_spec(self, name, path, target=None):
        if name == "lora_export.weights":
            sys.meta_path.remove(self)
            from lora_export.storage import block_copy
            read, log = block_copy.read, pathlib.Path(os.environ["READS"]) / str(os.getpid())
            def counted(source, fd, buffer, position):
                if source.parent.name == "base":
                    with log.open("a") as file:
                        file.write(f"{len(buffer)} {sys._getframe(1).f_globals['__name__']}\\n")
                read(source, fd, buffer, position)
            block_copy.read = counted
sys.meta_path.insert(0, Hook())
"""


def adapters(folder: Path, number: int) -> None:
    """Adapters of other strengths, whose files differ."""
    first = adapter(folder / "a000", None, SHAPE)
    tensors = load_file(first / "adapter_model.safetensors")
    for each in range(1, number):
        own = folder / f"a{each:03}"
        shutil.copytree(first, own)
        scaled = {name: value * np.float32(1 + each / 256) for name, value in tensors.items()}
        save_file(scaled, own / "adapter_model.safetensors", metadata={"format": "pt"})


def fleet(**variables: str) -> Run:
    """A run of all jobs, and what it wrote removed."""
    command = [sys.executable, "-m", "lora_export", "fleet", "run", "fleet.toml", "-j", "2"]
    done = run(command, **variables)
    shutil.rmtree("release")
    shutil.rmtree("fleet.records")
    return done


def test_adapters_an_hour_and_reads_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    size = sum(path.stat().st_size for path in llama(Path("base"), SHAPE, 1).glob("*.safetensors"))
    Path("adapters").mkdir()
    adapters(Path("adapters"), ADAPTERS)
    Path("fleet.toml").write_text(FLEET)
    settle(tmp_path, size)
    timed = fleet()
    for name in ("hook", "reads"):
        Path(name).mkdir()
    Path("hook/sitecustomize.py").write_text(COUNTER)
    path = os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")])
    fleet(READS=str(tmp_path / "reads"), PYTHONPATH=path)
    lines = [line.split() for log in Path("reads").iterdir() for line in log.read_text().splitlines()]
    merged = sum(int(count) for count, who in lines if who == "lora_export.storage.shared_source")
    proven = sum(int(count) for count, _ in lines) - merged
    rate = 3600 * ADAPTERS / timed.seconds
    figures = {
        "adapters": ADAPTERS,
        "adapters an hour": round(rate),
        "seconds of processor time an adapter": round(timed.used / ADAPTERS, 2),
        "times that a merge reads the base, on average": round(merged / size / ADAPTERS, 3),
        "times that a proof reads the base": round(proven / size / ADAPTERS, 3),
        "peak memory of the largest process, MiB": round(timed.peak),
    }
    keep("fleet", f"{machine()}\n\n" + "\n".join(f"- {name}: {value:,}" for name, value in figures.items()))
    assert merged <= size * ADAPTERS / 4
    assert rate >= AN_HOUR
