"""Adapters for llama.cpp: one `.gguf` file.

A file has one alpha, and llama.cpp multiplies B A by alpha / rank; without an alpha it multiplies by nothing. The names
are those of the `gguf` package's own map for the base's architecture, so that the base's config is needed. For Llama's
architecture llama.cpp stores the rows of q and k in Meta's order, and so those of B. Architectures whose weights
llama.cpp rearranges in other ways are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.extras import optional_package
from lora_export.formats import WriteOptions
from lora_export.formats.adapter_files import (
    LARGEST_NUMBER,
    Tensors,
    base_config,
    hash_of_unchanged,
    language_part,
    read_pairs,
    size_in_config,
)
from lora_export.formats.expert_layouts import expert_stacks, stacked_factors
from lora_export.formats.gguf_architecture import is_adapter, names_of
from lora_export.formats.writing import alpha_of, beyond_pairs, refuse_inexpressible, smallest_dtype, why_no_low_rank
from lora_export.lora import Adapter, LoraPair
from lora_export.names.families import EXPERT, FamilyNames, column, model_types
from lora_export.names.llama_cpp import LlamaCppNames
from lora_export.names.row_orders import Heads
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.storage.gguf_file import (
    DEFAULT_ALIGNMENT,
    gguf_field,
    header_of,
    is_gguf,
    next_aligned,
    open_gguf,
)

DESCRIPTION = "a .gguf file for llama.cpp"
SUFFIX = ".gguf"
# The type of a model -> llama.cpp's architecture, where weights keep their rows, or q and k alone change theirs.
GGUF_ROWS = column("gguf")
MOST_LAYERS = 10_000
SHOWN_ALPHAS = 5


_KEY = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<side>[ab])")
ALPHA, ALORA = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
WORDS = "token_embd"


def recognises(path: Path) -> bool:
    """Whether the path is a GGUF file that states that it is an adapter."""
    try:
        return is_gguf(path) and is_adapter(open_gguf(path))
    except InputRefused:
        return False


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter of llama.cpp. Raises InputRefused with everything that is wrong with it."""
    file = open_gguf(path)
    kind, alpha = file.value("adapter.type"), file.value(ALPHA, 0.0)
    if kind != "lora" or ALORA in file.fields:
        raise InputRefused(f"{path} is an adapter of the kind {'aLoRA' if ALORA in file.fields else kind!r}, no LoRA")
    if type(alpha) is not float or not 0 <= alpha <= LARGEST_NUMBER:
        raise InputRefused(f"{path}: {ALPHA} is {alpha!r}; it must be a number")
    options.refuse_rank_and_alpha("the header of a GGUF file")
    from lora_export.storage.gguf_blocks import as_tensor_file  # most adapters are no such file

    names = names_of(file)
    config = language_part(base_config(None, options) or {})
    queries = size_in_config(config, "num_attention_heads") or 0
    heads = Heads(queries, size_in_config(config, "num_key_value_heads") or queries)
    tensors = as_tensor_file(file, {tensor.name: tensor for tensor in file.tensors})
    pairs, spelling = read_pairs(tensors, functools.partial(_pairs_of, names, heads, alpha), _KEY)
    return Adapter(
        name=name,
        format="gguf",
        pairs=pairs,
        spelling=spelling,
        scale_source=f"alpha {alpha:g} in the header / rank" if alpha else "no alpha in the header: 1",
        metadata={"architecture": file.value("general.architecture")},
        sha256=hash_of_unchanged(tensors),
    )


def _pairs_of(names: LlamaCppNames, heads: Heads, alpha: float, module: str, tensors: Tensors) -> dict[str, LoraPair]:
    """The pair of one tensor; of a stack of experts, that of each."""
    a, b, weight = tensors["a"], tensors["b"], names.of_transformers(f"{module}.weight")
    if weight is None:
        raise InputRefused(f"no tensor of this name is known in models of the type {names.model_type}")
    own = weight.removesuffix(".weight")
    if EXPERT in own:
        if not (a.ndim == b.ndim == 3 and len(a) == len(b)):
            raise InputRefused(f"A is {a.shape} and B is {b.shape}, which are no stacks of experts")
        stack = [LoraPair(a=one, b=other, scale=_scale(alpha, a.shape[1])) for one, other in zip(a, b, strict=True)]
        return {own.replace(EXPERT, str(number)): pair for number, pair in enumerate(stack)}
    is_table = module == WORDS
    pair = LoraPair(a=a.T if is_table else a, b=b, scale=_scale(alpha, b.shape[-1]), embedding=is_table)
    order = names.row_order(weight)
    if order is None:
        return {own: pair}
    if not heads.queries:
        raise InputRefused(f"how its rows are ordered depends on the base. State it: {named('base_config', 'BASE')}")
    return {own: pair.part(np.argsort(order.indices(pair.shape[0], heads)), None)}


def _scale(alpha: float, rank: int) -> float:
    return alpha / rank if alpha and rank else 1.0


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write an adapter for llama.cpp. All pairs have one alpha, which is scale x rank."""
    gguf = optional_package("gguf", f"{named('to', 'gguf')} needs", "gguf")
    config = base_config(None, options.reading)
    if config is None:
        raise InputRefused(
            f"llama.cpp's names depend on the base's architecture. State it: {named('base', 'CHECKPOINT')}"
        )
    from lora_export.storage.gguf_blocks import FLAT

    file = _GgufFile(adapter, config, gguf)
    file.add_pairs()
    alpha = file.only_alpha()
    refuse_inexpressible(adapter, "gguf", file.problems)
    texts = {"general.architecture": file.architecture, "general.type": "adapter", "general.name": adapter.name}
    fields = [gguf_field(key, value) for key, value in {**texts, "adapter.type": "lora", ALPHA: alpha}.items()]
    dtype = smallest_dtype(file.tensors.values())
    kind = next(kind for kind, own in FLAT.items() if own == dtype)
    tensors = sorted(file.tensors.items())
    header, _ = header_of(fields, [(name, kind, array.shape) for name, array in tensors])
    with path.open("xb") as writer:
        writer.write(header)
        for _, array in tensors:
            stored = array.astype(dtype).tobytes()
            writer.write(stored + bytes(next_aligned(len(stored), DEFAULT_ALIGNMENT) - len(stored)))
    return ()


class _GgufFile:
    """The tensors of an adapter under llama.cpp's names, and everything that they cannot hold."""

    def __init__(self, adapter: Adapter, config: Mapping[str, Any], gguf: Any):
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in GGUF_ROWS:
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
            if why_no_low_rank(pair):
                continue  # `beyond_pairs` named it
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
