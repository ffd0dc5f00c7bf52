"""Adapters for llama.cpp: one `.gguf` file, by the `gguf` package.

A file has one alpha, and llama.cpp multiplies B A by alpha / rank. The names are those of the package's own map for the
base's architecture, so that the base's config is needed. For Llama's architecture llama.cpp stores the rows of q and k
in Meta's order, and so those of B. Architectures whose weights llama.cpp rearranges in other ways are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.extras import pip_install
from lora_export.formats import WriteOptions
from lora_export.formats.adapter_files import base_config, size_in_config
from lora_export.formats.expert_layouts import expert_stacks, stacked_factors
from lora_export.formats.writing import alpha_of, beyond_pairs, refuse_inexpressible, smallest_dtype
from lora_export.lora import Adapter, LoraPair
from lora_export.names.families import FamilyNames, column, model_types
from lora_export.names.row_orders import Heads
from lora_export.options.spelling import named

SUFFIX = ".gguf"
# The type of a model -> llama.cpp's architecture, where weights keep their rows, or q and k alone change theirs.
GGUF_ROWS = column("gguf")
MOST_LAYERS = 10_000
SHOWN_ALPHAS = 5


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write an adapter for llama.cpp. All pairs have one alpha, which is scale x rank."""
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentLacking(
            f"{named('to', 'gguf')} needs the package gguf ({error}): {pip_install('gguf')}"
        ) from error
    config = base_config(None, options.reading)
    if config is None:
        raise InputRefused(
            f"llama.cpp's names depend on the base's architecture. State it: {named('base', 'CHECKPOINT')}"
        )
    file = _GgufFile(adapter, config, gguf)
    file.add_pairs()
    alpha = file.only_alpha()
    refuse_inexpressible(adapter, "gguf", file.problems)
    writer = gguf.GGUFWriter(str(path), file.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(adapter.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    dtype = smallest_dtype(file.tensors.values())
    for name, array in sorted(file.tensors.items()):
        stored = np.ascontiguousarray(array.astype(dtype))
        if dtype in (np.float32, np.float16):
            writer.add_tensor(name, stored)
        else:  # GGUF's writer takes other types as bytes
            writer.add_tensor(name, stored.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ()


class _GgufFile:
    """The tensors of an adapter under llama.cpp's names, and everything that they cannot hold."""

    def __init__(self, adapter: Adapter, config: Mapping[str, Any], gguf: Any):
        kind = config.get("model_type")
        if kind not in GGUF_ROWS:
            known = ", ".join(sorted(GGUF_ROWS))
            raise InputRefused(f"a GGUF adapter for models of the type {kind!r} is not supported; supported: {known}")
        layers = size_in_config(config, "num_hidden_layers")
        if layers is None or layers > MOST_LAYERS:
            raise InputRefused("the base's config has no usable num_hidden_layers")
        self.family, self.architecture = FamilyNames.of(GGUF_ROWS[kind]), GGUF_ROWS[kind]["architecture"]
        queries = size_in_config(config, "num_attention_heads") or 0
        self.heads = Heads(queries, size_in_config(config, "num_key_value_heads") or queries)
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self.names = gguf.get_tensor_name_map(numbers[self.architecture], layers)
        self.experts = expert_stacks(adapter, model_types(config))
        self.problems = beyond_pairs(adapter)
        self.tensors: dict[str, NDArray[np.float32]] = {}
        self.alphas: set[float] = set()

    def add_pairs(self) -> None:
        for module, pair in self.experts.plain.items():
            if len(pair.shape) != 2:
                self.problems.append(f"{module}: a convolution")
                continue
            try:
                stored = self.family.reordered(module, pair, self.heads)
            except InputRefused as error:
                raise InputRefused(f"{module}: {error}") from error
            self._add(module, stored.a.T if stored.embedding else stored.a, stored.b, stored)
        for owner, projection, stack in self.experts.whole():
            self._add(f"{owner}.{self.experts.names[owner, projection]}", *stacked_factors(stack), stack[0])
        self.problems += self.experts.problems

    def _add(self, module: str, a: NDArray[np.float32], b: NDArray[np.float32], pair: LoraPair) -> None:
        name = self.names.get_name(module)
        if name is None:
            self.problems.append(f"{module}: llama.cpp has no tensor for it in the architecture {self.architecture}")
            return
        self.alphas.add(alpha_of(pair.scale, pair.rank))
        self.tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}

    def only_alpha(self) -> float:
        """The alpha of all pairs; where there are several or none, that is a problem."""
        if len(self.alphas) > 1:
            shown = ", ".join(f"{alpha:g}" for alpha in sorted(self.alphas)[:SHOWN_ALPHAS])
            self.problems.append(f"several alphas (scale x rank): {shown}; a GGUF adapter has one")
        if not self.tensors:
            self.problems.append("it has no low-rank pair")
        return next(iter(self.alphas), 0.0)
