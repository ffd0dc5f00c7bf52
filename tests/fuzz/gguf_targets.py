"""Fuzz targets of GGUF files: a base of a merge and of its proof, and an adapter.

As in `targets`, a target raises where the program did anything but succeed or refuse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from fuzz.targets import Target, a_place, an_adapter, as_json, merged_and_proven, refused, save
from lora_export import formats
from support.gguf_files import Kind, written

MODULE = "base_model.model.model.layers.0.mlp.down_proj"
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
PAIR = {f"{MODULE}.lora_A.weight": (1, 32), f"{MODULE}.lora_B.weight": (32, 1)}


@functools.cache
def a_file(*, is_adapter: bool) -> bytes:
    """A model of two matrices, or an adapter of one pair."""
    with a_place() as place:
        writer = gguf.GGUFWriter(str(place / "a.gguf"), "llama")
        if is_adapter:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2.0)
            for side, shape in (("a", (1, 32)), ("b", (32, 1))):
                writer.add_tensor(f"blk.0.ffn_down.weight.lora_{side}", np.ones(shape, np.float32))
            return written(writer, place / "a.gguf").read_bytes()
        writer.add_block_count(1)
        writer.add_token_list(["a", "b"])
        values = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
        for name, kind in (("ffn_down", Kind.Q8_0), ("ffn_up", Kind.Q4_0)):
            writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        return written(writer, place / "a.gguf").read_bytes()


def gguf_base(data: bytes) -> bool:
    """A base: inspected, merged into, and the result proven."""
    with a_place() as place:
        an_adapter(place, as_json(CONFIG), save({name: np.ones(shape, np.float32) for name, shape in PAIR.items()}))
        (place / "base.gguf").write_bytes(data)
        return merged_and_proven(place / "base.gguf", place / "adapter")


def gguf_adapter(data: bytes) -> bool:
    """An adapter of llama.cpp."""

    def read(path: Path) -> bool:
        path.write_bytes(data)
        return not refused(lambda: formats.load(path))

    with a_place() as place:
        return read(place / "a.gguf")


TARGETS: dict[str, Target] = {"gguf_base": gguf_base, "gguf_adapter": gguf_adapter}
MAKERS: dict[str, Callable[[], bytes]] = {
    "gguf_base": lambda: a_file(is_adapter=False),
    "gguf_adapter": lambda: a_file(is_adapter=True),
}
GOOD = {name: make() for name, make in MAKERS.items()}
