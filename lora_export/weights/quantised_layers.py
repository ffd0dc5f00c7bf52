"""What becomes of quantised weights that adapters change, layer by layer: kept in their scheme, or promoted.

A layer is kept where its scheme can hold the change: enough of the change arrives, and the rounding adds less noise
than the change itself is large. Both have to be measured. Stochastic rounding has a retention of 1 and a noise of
several times the change. Any other layer is promoted: stored in a wider type, where the format can state that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lora_export.errors import InputRefused, listed
from lora_export.options.spelling import named
from lora_export.weights.merge_report import QuantisedLayer, StepResult

MOST_NOISE = 1.0  # ‖(W'-W) - ΔW‖ / ‖ΔW‖

# Layers that servers fuse (`packed_modules_mapping` of vLLM): all parts of one need one type.
FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wq", "wk", "wv")),
    *(("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q_a_proj", "kv_a_proj_with_mqa")),
    *(("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")),
)
FUSED_WITH = {part: parts for parts in FUSED for part in parts}
EXPERTS = re.compile(r"(.*\bexperts)\.")  # all experts of a layer are one


def why_promoted(result: StepResult, min_retention: float) -> str:
    """Why a scheme cannot hold the change of a layer; empty where it can. `result` was measured in that scheme."""
    if not result.retention >= min_retention:  # NaN too
        return f"{max(result.retention, 0):.1%} of its change would be left"
    if result.noise > MOST_NOISE:
        return f"the noise would be {result.noise:.2g} times its change"
    return ""


def with_fused_parts(promoted: Mapping[str, str], weights: Iterable[str]) -> dict[str, str]:
    """The promoted weights and why, with all other quantised `weights` that servers fuse with one of them."""
    first: dict[str, str] = {}
    for name in promoted:
        first.setdefault(_fused_module(name), name)
    others = {name: first[_fused_module(name)] for name in weights if _fused_module(name) in first}
    return {**{name: f"fused with {other}" for name, other in others.items() if name != other}, **promoted}


def _fused_module(weight: str) -> str:
    """A name for the module that servers make of a layer and those that are fused with it."""
    module = weight.removesuffix(".weight")
    if experts := EXPERTS.match(module):
        return experts[1]
    parent, _, own = module.rpartition(".")
    return f"{parent}.{'|'.join(FUSED_WITH.get(own, (own,)))}"


def refuse_promotion(layers: Sequence[QuantisedLayer], because: str) -> None:
    """Raise InputRefused where layers would have to be promoted, and the format cannot state that."""
    lost = [layer for layer in layers if not layer.is_kept]
    if lost:
        raise InputRefused(
            f"{len(lost)} of {len(layers)} quantised weights cannot hold their change, and {because}:",
            listed([f"{layer.weight} ({layer.scheme}): {layer.why}" for layer in lost]),
            f"Make the base a float model ({named('dequantize', True)}), keep the adapter beside it, or accept the "
            f"loss ({named('min_retention', 0)}). Nothing was written.",
        )
