"""Names of adapter tensors in a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

LORA_A, LORA_B, DORA_FACTOR = "lora_A", "lora_B", "lora_magnitude_vector"
SCALE = "ia3_l"  # factors of outputs or inputs
LOKR_W1, LOKR_W2 = "lokr_w1", "lokr_w2"

# (module, LORA_A or another part, whether the module is an embedding) -> name
Convention = Callable[[str, str, bool], str]


def module_of(weight: str) -> str:
    """The module of a weight. Empty where the weight belongs to the whole model."""
    return re.sub(r"(^|\.)(in_proj_)?weight$", "", weight)


def dotted(*parts: str) -> str:
    """The parts that are not empty, joined by dots."""
    return ".".join(part for part in parts if part)


def _genai_name(module: str, part: str, _: bool) -> str:
    module = re.sub(r"\bself_attn\b", "attn", module)
    return dotted(module, part, "weight") if part == DORA_FACTOR else dotted(module, part, "MatMul", "weight")


def _peft_name(module: str, part: str, is_embedding: bool) -> str:
    if is_embedding and part != DORA_FACTOR:
        return dotted("base_model.model", module, part.replace("lora_", "lora_embedding_"))
    return dotted("base_model.model", module, part, *([] if part == DORA_FACTOR else ["weight"]))


# Whose convention the names of adapter inputs follow.
CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        # The module's own name, as Olive's `convert-adapters`
        "olive": lambda module, part, _: dotted(module, part, "weight"),
        "genai": _genai_name,  # onnxruntime-genai's model builder, and Olive's `extract-adapters`
        "peft": _peft_name,  # the key in a PEFT adapter's file
    }
)
