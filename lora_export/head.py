"""What a task head that came with an adapter means for the model's `config.json`.

A dictionary becomes a dictionary: neither transformers nor the weights are touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.lora import Adapter

# PEFT's task types -> the ending of transformers' class
CLASS_ENDINGS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# Where transformers' classifiers keep the matrix that has one row a label
LABEL_ROWS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def config_with_heads(config: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The base's config, changed to name the head class and labels that the adapters bring; else equal to it."""
    result = dict(config)
    for adapter in adapters:
        if adapter.replaced and config:
            result |= _architecture(result, adapter) | _labels(adapter)
    return result


def _architecture(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    recorded = adapter.metadata.get("model_config", {}).get("architectures")
    ending = CLASS_ENDINGS.get(str(adapter.metadata.get("task_type")))
    if recorded:
        return {"architectures": recorded}
    if not ending or not config.get("architectures"):
        return {}
    # BertModel, BertForMaskedLM -> Bert
    stem = re.sub(r"(Model|For[A-Z]\w*)$", "", config["architectures"][0])
    return {"architectures": [stem + ending]}


def _labels(adapter: Adapter) -> dict[str, Any]:
    recorded = adapter.metadata.get("model_config", {})
    if recorded.get("id2label"):
        return {key: recorded[key] for key in ("id2label", "label2id", "problem_type") if key in recorded}
    rows = next(
        (tensor.shape[0] for end in LABEL_ROWS for name, tensor in adapter.replaced.items() if name.endswith(end)), None
    )
    if rows is None or adapter.metadata.get("task_type") not in CLASS_ENDINGS:
        return {}
    # transformers' own names for labels that nobody named
    return {
        "id2label": {str(number): f"LABEL_{number}" for number in range(rows)},
        "label2id": {f"LABEL_{number}": number for number in range(rows)},
    }
