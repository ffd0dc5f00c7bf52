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
# BertModel, BertForMaskedLM, BertLMHeadModel -> Bert
CLASS_ENDING = re.compile(r"(((With)?LMHead|DoubleHeads|Encoder)?Model|For[A-Z]\w*)$")
# Where transformers' classifiers keep the matrix that has one row a label
LABEL_ROWS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def config_with_heads(config: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The base's config, changed to name the head class and labels that the adapters bring; else equal to it."""
    result = dict(config)
    for adapter in adapters:
        if adapter.replaced and config:
            result |= _architecture(result, adapter) | _labels(result, adapter)
    return result


def config_for_labels(config: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The base's config, changed to the class that sorts texts into these labels."""
    return {**config, **_class_ending_with(config, CLASS_ENDINGS["SEQ_CLS"]), **_label_fields(labels)}


def _architecture(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    recorded = adapter.metadata.get("model_config", {}).get("architectures")
    ending = CLASS_ENDINGS.get(str(adapter.metadata.get("task_type")))
    if recorded:
        return {"architectures": recorded}
    return _class_ending_with(config, ending) if ending else {}


def _class_ending_with(config: Mapping[str, Any], ending: str) -> dict[str, Any]:
    match config.get("architectures"):
        case [str(name), *_]:
            return {"architectures": [CLASS_ENDING.sub("", name) + ending]}
    return {}


def _labels(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    recorded = adapter.metadata.get("model_config", {})
    if recorded.get("id2label"):
        return {key: recorded[key] for key in ("id2label", "label2id", "problem_type") if key in recorded}
    rows = next(
        (tensor.shape[0] for end in LABEL_ROWS for name, tensor in adapter.replaced.items() if name.endswith(end)), None
    )
    if rows is None or adapter.metadata.get("task_type") not in CLASS_ENDINGS:
        return {}
    named = config.get("id2label")
    if isinstance(named, Mapping) and len(named) == rows:  # the base has this head already, and its labels have names
        return {}
    return _label_fields([f"LABEL_{number}" for number in range(rows)])  # transformers' names where nobody gave any


def _label_fields(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
