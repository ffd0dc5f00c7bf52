"""Any layout of experts, rank, scale and dtype, on bases of both spellings: W + sBA by hand in fp64, rounded once."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export.weights import compiled

HIDDEN = 5
EXPERTS = "model.layers.0.mlp.experts"
WRAPPED = f"base_model.model.{EXPERTS}"
LAYOUTS = ("flat", "swapped", "grouped", "stacked", "single", "shared")
PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Case(NamedTuple):
    count: int
    inner: int
    rank: int
    alpha: float
    rslora: bool
    layout: str
    fused: bool  # the base has stacked tensors
    dtype: str
    seed: int


CASES = st.builds(
    Case,
    count=st.integers(2, 5),
    inner=st.integers(1, 6),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1, 3, 16]),
    rslora=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    fused=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 2**16),
)


def numbers(rng: np.random.Generator, *size: int) -> NDArray[np.float32]:
    """Eighths, whose sums and products are exact in fp32."""
    return (rng.integers(-8, 9, size) / 8).astype(np.float32)


def the_base(case: Case, folder: Path, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """The stacked weights (experts, out, in), which the folder has in one of the two spellings."""
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, None) or case.dtype)
    sizes = {"gate_up_proj": (2 * case.inner, HIDDEN), "down_proj": (HIDDEN, case.inner)}
    stacks = {name: numbers(rng, case.count, *size).astype(dtype) for name, size in sizes.items()}
    folder.mkdir()
    save_file(spelled(case, stacks), folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": case.count}
    (folder / "config.json").write_text(json.dumps(config))
    return stacks


def spelled(case: Case, stacks: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    if case.fused:
        return {f"{EXPERTS}.{name}": value for name, value in stacks.items()}
    return {
        f"{EXPERTS}.{expert}.{part}.weight": np.ascontiguousarray(own)
        for name, value in stacks.items()
        for expert in range(case.count)
        for part, own in zip(PARAMETERS[name], np.split(value[expert], len(PARAMETERS[name])), strict=True)
    }


def the_adapter(case: Case, folder: Path, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """The changes B A of each stacked weight (experts, out, in), which the folder has in one of the layouts."""
    tensors: dict[str, NDArray[Any]] = {}
    changes = {}
    for name, (out, in_) in {"gate_up_proj": (2 * case.inner, HIDDEN), "down_proj": (HIDDEN, case.inner)}.items():
        a, b = numbers(rng, case.count, case.rank, in_), numbers(rng, case.count, out, case.rank)
        if case.layout == "shared":
            a, b = (a[:1], b) if name == "gate_up_proj" else (a, b[:1])
        if case.layout == "single" or case.layout == "shared":
            parts = list(zip(PARAMETERS[name], np.split(b, len(PARAMETERS[name]), axis=1), strict=True))
        changes[name] = np.stack(
            [b[expert % len(b)].astype(np.float64) @ a[expert % len(a)] for expert in range(case.count)]
        )
        owner = f"{WRAPPED}.base_layer" if name == "gate_up_proj" else WRAPPED
        if case.layout == "stacked":
            tensors |= {f"{WRAPPED}.{name}.lora_A.weight": a, f"{WRAPPED}.{name}.lora_B.weight": b}
        elif case.layout == "shared":
            for part, own in parts:
                tensors |= {f"{WRAPPED}.{part}.lora_A.weight": a, f"{WRAPPED}.{part}.lora_B.weight": own.copy()}
        elif case.layout == "single":
            for expert in range(case.count):
                for part, own in parts:
                    module = f"{WRAPPED}.{expert}.{part}"
                    tensors |= {f"{module}.lora_A.weight": a[expert], f"{module}.lora_B.weight": own[expert].copy()}
        else:
            first, last = (np.moveaxis(b, 2, 1), np.moveaxis(a, 2, 1)) if case.layout == "swapped" else (a, b)
            columns = np.moveaxis(last, 0, 1 if case.layout == "grouped" else 2)
            tensors |= {
                f"{owner}.lora_A.weight": first.reshape(-1, first.shape[2]),
                f"{owner}.lora_B.weight": columns.reshape(last.shape[1], -1),
            }
    flat = case.layout in ("flat", "swapped", "grouped")
    config = {
        "peft_type": "LORA",
        "r": case.rank,
        "lora_alpha": case.alpha,
        "use_rslora": case.rslora,
        "peft_version": "0.18.0" if case.layout == "swapped" else "0.21.2",
        "target_modules": ["gate_proj", "up_proj", "down_proj"] if case.layout == "single" else [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"] if flat else None,
        "lora_B_layout": "grouped_by_expert" if case.layout == "grouped" else None,
    }
    folder.mkdir()
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes


@pytest.fixture(scope="module")
def numpy_alone() -> Iterator[None]:
    """NumPy sums, as the sum by hand, also where compiled code is installed, which sums in another sequence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "kernel", lambda: None)
        yield


@pytest.mark.usefixtures("numpy_alone")
@settings(deadline=None, max_examples=60)
@given(CASES)
def test_a_merge_is_the_sum_by_hand(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stacks, changes = the_base(case, folder / "base", rng), the_adapter(case, folder / "adapter", rng)
        lora_export.merge(folder / "base", folder / "adapter", folder / "out", min_retention=0)
        found = load_file(folder / "out" / "model.safetensors")
    scale = np.float32(case.alpha / math.sqrt(case.rank) if case.rslora else case.alpha / case.rank)
    expected = {
        name: (stack.astype(np.float32) + scale * changes[name].astype(np.float32)).astype(stack.dtype)
        for name, stack in stacks.items()
    }
    wanted = spelled(case, expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
