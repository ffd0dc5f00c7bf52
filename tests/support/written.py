"""What several tests share: adapters of small values in memory, and how a format gives them back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import lora_export
from lora_export import formats
from lora_export.lora import Adapter, LoraPair

# Values that float16, bfloat16 and float32 hold, and which of these holds all values of an adapter.
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def low_rank(out: int, inner: int, rank: int, *, seed: int = 0, dtype: Any = np.float32, **fields: Any) -> LoraPair:
    """A pair of random values of a type."""
    rng = np.random.default_rng(seed + 97 * out + inner)
    a, b = rng.standard_normal((rank, inner)), rng.standard_normal((out, rank))
    return LoraPair(a=a.astype(dtype), b=b.astype(dtype), **{"scale": 2.0, **fields})


def adapter_of(pairs: Mapping[str, LoraPair], **fields: Any) -> Adapter:
    return Adapter("mine", "peft", dict(pairs), **fields)


def converted(adapter: Adapter, folder: Path, to: str, **options: Any) -> Adapter:
    """The adapter as it is read from what `convert` wrote."""
    result = lora_export.convert(adapter, folder / to, to=to, **options)
    return formats.load(result.output)


def assert_same_pairs(one: Adapter, other: Adapter) -> None:
    """The same modules, factors, magnitudes and scales, bit for bit."""
    assert sorted(one.pairs) == sorted(other.pairs)
    for name, pair in one.pairs.items():
        own = other.pairs[name]
        assert np.array_equal(pair.a, own.a) and np.array_equal(pair.b, own.b), name
        assert (pair.scale, pair.embedding, pair.as_stored) == (own.scale, own.embedding, own.as_stored), name
        magnitudes = (pair.magnitude, own.magnitude)
        assert all(each is None for each in magnitudes) or np.array_equal(*magnitudes), name


@st.composite
def drawn_pairs(draw: st.DrawFn, *, one_kind: bool = False) -> dict[str, LoraPair]:
    """Pairs of some linear layers: sizes, types, alphas; of one rank and scale where `one_kind` says so."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    dora = draw(st.booleans())
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4, unique=True))
    kinds = st.tuples(st.integers(1, 7), st.floats(0.01, 100, allow_subnormal=False) | st.integers(1, 64))
    shared = draw(kinds)
    pairs = {}
    for number, name in enumerate(names):
        rank, alpha = shared if one_kind else draw(kinds)
        out, inner = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        magnitude = np.arange(1, out + 1, dtype=dtype) if dora else None
        pair = low_rank(out, inner, rank, seed=number, dtype=dtype, scale=alpha / rank, magnitude=magnitude)
        pairs[f"model.layers.{number}.mlp.{name}"] = pair
    return pairs
