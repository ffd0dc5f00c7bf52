"""The `config.json` of a model whose adapter has a task head.

Dictionaries in, dictionaries out: neither transformers nor weights are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.lora import Adapter

# task type of PEFT -> ending of the class in transformers
CLASS_ENDINGS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# BertModel, BertForMaskedLM, BertLMHeadModel -> Bert
CLASS_ENDING = re.compile(r"(((With)?LMHead|DoubleHeads|Encoder)?Model|For[A-Z]\w*)$")
# Names of the matrix with one row per label in classifiers of transformers
LABEL_ROWS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def config_with_heads(config: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The config of the base with the head class and labels of the adapters; an equal copy where they have no head."""
    result = dict(config)
    for adapter in adapters:
        if adapter.replaced and config:
            result |= _architecture(result, adapter) | _labels(result, adapter)
    return result


def config_for_labels(config: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The config of the base with the class of a text classifier and these labels."""
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
    if isinstance(named, Mapping) and len(named) == rows:  # the base already has this head, with named labels
        return {}
    return _label_fields([f"LABEL_{number}" for number in range(rows)])  # the names that transformers uses by default


def _label_fields(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
