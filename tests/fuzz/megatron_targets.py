"""Fuzz targets of Megatron-Bridge's adapters: what the run and the base state, and the keys and shapes of a checkpoint.

As in `targets`, a target raises where the program did anything but succeed or refuse.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from fuzz.targets import (
    Target,
    a_place,
    as_json,
    command,
    converted,
    merge_is_all_or_nothing,
    save,
    tensors_of_shapes,
    write,
)
from support.distributed import save_whole

EXPERTS, INNER, WIDTH, HEAD = 2, 2, 3, 2
RUN = {"peft": {"dim": 1, "alpha": 2, "normalize_moe_lora": True}}
BASE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": HEAD, "hidden_size": WIDTH, "intermediate_size": INNER,
    "moe_intermediate_size": INNER, "num_experts": EXPERTS,
}  # fmt: skip
LAYER = "decoder.layers.0."
SHAPES = {  # of linear_in and linear_out
    "self_attention.linear_qkv": ("1,3", "6,1"),
    "self_attention.linear_proj": ("1,2", "3,1"),
    "mlp.linear_fc1": ("1,3", "4,1"),
    "mlp.experts.linear_fc1": ("1,1,3", "2,4,1"),
    "mlp.experts.linear_fc2": ("2,1,2", "1,3,1"),
}
LINES = [
    f"{LAYER}{layer}.adapter.linear_{side}.weight {shape}"
    for layer, shapes in SHAPES.items()
    for side, shape in zip(("in", "out"), shapes, strict=True)
]


@functools.cache
def base_weights() -> bytes:
    """The layers of Hugging Face that Megatron's are."""
    into, out = ("gate_proj", "up_proj"), ("down_proj",)
    mlps = ["mlp", *(f"mlp.experts.{number}" for number in range(EXPERTS))]
    shapes = {f"self_attn.{name}_proj": (HEAD, WIDTH) for name in "qkv"} | {"self_attn.o_proj": (WIDTH, HEAD)}
    shapes |= {f"{mlp}.{name}": (INNER, WIDTH) for mlp in mlps for name in into}
    shapes |= {f"{mlp}.{name}": (WIDTH, INNER) for mlp in mlps for name in out}
    return save({f"model.layers.0.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()})


def megatron_adapter(data: bytes) -> bool:
    """The run's config and the base's, each in a line, then a key and a shape in each: read, converted and merged."""
    run, base, *lines = f"{data.decode('utf-8', 'replace')}\n".split("\n")
    state = {name: torch.from_numpy(array) for name, array in tensors_of_shapes(filter(None, lines)).items()}
    with a_place() as place:
        write(place / "base", {"config.json": base.encode(), "model.safetensors": base_weights()})
        (save_whole(place / "adapter", state) / "run_config.yaml").write_text(run, encoding="utf-8")
        stated = "--allow-pickle", "--base-config", str(place / "base")
        command("inspect", place / "adapter", *stated)
        converted(place, "adapter", *stated)
        return merge_is_all_or_nothing(place, "--allow-pickle")


TARGETS: dict[str, Target] = {"megatron_adapter": megatron_adapter}
GOOD = {"megatron_adapter": b"\n".join([as_json(RUN), as_json(BASE), *(line.encode() for line in LINES)])}
