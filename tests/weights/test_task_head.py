"""The config of a model whose adapter has a head, on configs written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_export.lora import Adapter
from lora_export.weights.task_head import TaskHead, config_for_head, config_with_heads, label_names, number_of_labels

BASE = {"architectures": ["BertModel"], "hidden_size": 4}
LABELS_OF_3 = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
}


def adapter(
    task: str | None = "SEQ_CLS", *, whole: str = "classifier.weight", rows: int = 3, **metadata: Any
) -> Adapter:
    replaced = {whole: np.ones((rows, 4), np.float32)} if whole else {}
    return Adapter("a", "peft", {}, replaced=replaced, metadata={"task_type": task, **metadata})


def test_class_and_labels_follow_the_task_and_the_rows():
    assert config_with_heads(BASE, [adapter()]) == {
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": 4,
        **LABELS_OF_3,
    }


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("SEQ_CLS", "BertForSequenceClassification"),
        ("TOKEN_CLS", "BertForTokenClassification"),
        ("QUESTION_ANS", "BertForQuestionAnswering"),
    ],
)
def test_each_task_has_its_class(task, name):
    assert config_with_heads(BASE, [adapter(task, whole="head.weight")])["architectures"] == [name]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("BertModel", "Bert"),
        ("BertForMaskedLM", "Bert"),
        ("BertLMHeadModel", "Bert"),
        ("GPT2LMHeadModel", "GPT2"),
        ("GPT2DoubleHeadsModel", "GPT2"),
        ("XLMWithLMHeadModel", "XLM"),
        ("T5EncoderModel", "T5"),
        ("LlamaForCausalLM", "Llama"),
        ("BartForConditionalGeneration", "Bart"),
        ("DistilBertForSequenceClassification", "DistilBert"),
    ],
)
def test_the_head_in_the_class_of_the_base_is_replaced(name, stem):
    config = config_with_heads({"architectures": [name]}, [adapter()])
    assert config["architectures"] == [f"{stem}ForSequenceClassification"]


@pytest.mark.parametrize(
    "whole",
    ["score.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight", "x.classifier.weight"],
)
def test_labels_are_counted_in_the_matrix_of_the_classifier(whole):
    assert config_with_heads(BASE, [adapter(whole=whole)])["id2label"] == LABELS_OF_3["id2label"]


def test_a_recorded_class_and_labels_are_used():
    recorded = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "bad", "1": "good", "2": "ugly"},
        "label2id": {"bad": 0, "good": 1, "ugly": 2},
        "problem_type": "single_label_classification",
    }
    assert config_with_heads(BASE, [adapter(None, model_config=recorded)]) == {"hidden_size": 4, **recorded}


def test_recorded_fields_of_other_kinds_are_ignored():
    recorded = {"id2label": {"0": "a"}, "hidden_size": 9}
    assert config_with_heads(BASE, [adapter(None, model_config=recorded)]) == {**BASE, "id2label": {"0": "a"}}


def test_labels_are_counted_in_the_last_layer_of_a_head():
    deeper = adapter(whole="classifier.out_proj.weight", rows=3)
    wholes = {"classifier.dense.weight": np.ones((8, 8), np.float32), **deeper.replaced}
    config = config_with_heads(BASE, [Adapter("a", "peft", {}, replaced=wholes, metadata=deeper.metadata)])
    assert config["id2label"] == LABELS_OF_3["id2label"]


def test_a_base_with_the_same_head_keeps_its_labels():
    named = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    assert config_with_heads(named, [adapter(rows=3)]) == named
    assert config_with_heads(named, [adapter(rows=2)])["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


@pytest.mark.parametrize(
    "adapters",
    [
        [],
        [adapter(whole="")],  # nothing is replaced
        [adapter("CAUSAL_LM", whole="lm_head.weight")],
        [adapter(None)],
    ],
)
def test_without_a_task_head_the_config_is_unchanged(adapters):
    config = config_with_heads(BASE, adapters)
    assert config == BASE and config is not BASE


def test_a_base_without_a_config_gets_none():
    assert config_with_heads({}, [adapter()]) == {}


@pytest.mark.parametrize("architectures", [None, [], "BertModel", [5]])
def test_a_base_of_unknown_class_gets_the_labels_only(architectures):
    config = {"architectures": architectures}
    assert config_with_heads(config, [adapter()]) == config | LABELS_OF_3


def test_the_config_for_a_head_has_its_class_and_labels():
    head = TaskHead("ForSequenceClassification", ("good", "bad"))
    assert config_for_head({**BASE, "id2label": {"0": "old"}}, head) == {
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": 4,
        "id2label": {"0": "good", "1": "bad"},
        "label2id": {"good": 0, "bad": 1},
    }
    tags = config_for_head(BASE, TaskHead("ForTokenClassification", ("x",), "regression"))
    assert (tags["architectures"], tags["problem_type"]) == (["BertForTokenClassification"], "regression")
    assert number_of_labels(tags) is None and number_of_labels(tags, "ForTokenClassification") == 1


@pytest.mark.parametrize("named", [3, "abc", ["a", "b", "c"]])
def test_labels_that_are_not_a_table_are_replaced(named):
    assert config_with_heads({**BASE, "id2label": named}, [adapter(rows=3)])["id2label"] == LABELS_OF_3["id2label"]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"architectures": ["BertModel"], "num_labels": 3}, None),
        ({"architectures": ["BertForTokenClassification"], "num_labels": 3}, None),
        ({"architectures": ["BertForSequenceClassification"]}, 2),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 4}, 4),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
        ({}, None),
    ],
)
def test_number_of_labels_is_that_of_a_text_classifier(config, count):
    assert number_of_labels(config) == count


def test_padding_of_the_head_is_taken_where_the_base_has_none():
    head = adapter(model_config={"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 7})
    base = {"architectures": ["LlamaForCausalLM"], "pad_token_id": None}
    assert config_with_heads(base, [head])["pad_token_id"] == 7
    assert config_with_heads(base | {"pad_token_id": 3}, [head])["pad_token_id"] == 3
    whole = adapter(None, model_config={"architectures": ["LlamaForCausalLM"], "pad_token_id": 7})
    assert config_with_heads(base, [whole])["pad_token_id"] is None


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ({"1": "b", "0": "a"}, ("a", "b")),
        ({"0": "a", "2": "b"}, ()),
        ({"0": None}, ()),
        ({}, ()),
        (["a"], ()),
        (None, ()),
    ],
)
def test_names_of_labels_are_those_of_the_classifier_in_order(table: Any, names: tuple[str, ...]) -> None:
    config = {"architectures": ["BertForTokenClassification"], "num_labels": 1, "id2label": table}
    assert label_names(config, "ForTokenClassification") == names
    assert label_names(config, "ForSequenceClassification") == ()
