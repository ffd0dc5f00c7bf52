"""The `config.json` of a model whose adapter has a task head.

Dictionaries in, dictionaries out: neither transformers nor weights are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
DEFAULT_LABELS = 2  # of transformers, where a config names none
# Names of the matrix with one row per label in classifiers of transformers
LABEL_ROWS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def config_with_heads(config: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The config of the base with the head class and labels of the adapters; an equal copy where they have no head."""
    result = dict(config)
    for adapter in adapters:
        if adapter.replaced and config:
            result |= _architecture(result, adapter) | _labels(result, adapter)
            result |= _padding(result, adapter)
    return result


@dataclass(frozen=True)
class TaskHead:
    """A head to be trained: the ending of its class in transformers, and what it predicts."""

    ending: str
    labels: tuple[str, ...]
    problem_type: str = ""  # of transformers, such as "regression"; empty for one class of several


def config_for_head(config: Mapping[str, Any], head: TaskHead) -> dict[str, Any]:
    """The config of the base with the class and the labels of a head."""
    kind = {"problem_type": head.problem_type} if head.problem_type else {}
    return {**config, **_class_ending_with(config, head.ending), **_label_fields(head.labels), **kind}


def number_of_labels(config: Mapping[str, Any], ending: str = CLASS_ENDINGS["SEQ_CLS"]) -> int | None:
    """How many labels the classifier of a config has; None where its class has another ending."""
    match config.get("architectures"):
        case [str(name), *_] if name.endswith(ending):
            named = config.get("id2label")
            return len(named) if isinstance(named, Mapping) else int(config.get("num_labels") or DEFAULT_LABELS)
    return None


def label_names(config: Mapping[str, Any], ending: str) -> tuple[str, ...]:
    """The names of the labels of a config's classifier, in their order; empty where it has none with this ending."""
    table = config.get("id2label")
    if number_of_labels(config, ending) is None or not isinstance(table, Mapping):
        return ()
    names = [table.get(str(number)) for number in range(len(table))]
    return tuple(map(str, names)) if None not in names else ()


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


def _padding(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The padding token that a text classifier was trained with, where the base names none."""
    recorded = adapter.metadata.get("model_config", {}).get("pad_token_id")
    if recorded is None or config.get("pad_token_id") is not None or number_of_labels(config) is None:
        return {}
    return {"pad_token_id": recorded}


def _label_fields(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
