"""Merges into models with tied embeddings: untied is what PEFT's layers compute, both is what PEFT's merge makes."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.names.table import read_table
from lora_export.plan import Tied
from lora_export.storage.hashes import file_hash
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.tied_tensors import is_tied, tied_head, ties_of, untied_config
from support import transformers_names
from support.slow import slow
from support.tied import ONE_LAYER, TOKENS, WORDS, TiedModel, tied_model

HEAD, TABLE = "lm_head", "embed_tokens"
LLAMA_TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TiedModel:
    return tied_model(tmp_path_factory.mktemp("llama") / "base")


def is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("targets", [(HEAD,), (TABLE,), (HEAD, TABLE)], ids="+".join)
def test_both_options_are_what_peft_computes(llama, targets, tmp_path):
    adapter = llama.adapter(tmp_path / "adapter", *targets)
    peft_model = llama.trained(*targets)
    attached = llama.outputs(peft_model)
    merged = llama.outputs(peft_model.merge_and_unload())
    assert not is_near(attached, merged)
    for tied, expected, names in (("untie", attached, {f"{HEAD}.weight"}), ("both", merged, set())):
        out = tmp_path / tied
        le.merge(llama.base, adapter, out, tied=tied)
        assert is_near(llama.outputs(llama.reloaded(out)), expected)
        weights = load_file(out / "model.safetensors")
        assert weights.keys() - load_file(llama.base / "model.safetensors").keys() == names
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is (tied == "both")
        manifest = json.loads((out / "lora_export.json").read_text())
        assert manifest["settings"]["tied"] == tied
        assert manifest["base"]["model.safetensors"] == {
            "xxh3_128": file_hash(llama.base / "model.safetensors", "xxh3_128")
        }
        assert le.verify(out, base=llama.base, adapters=adapter, tied=tied)


@pytest.mark.parametrize(
    ("architecture", "indices"),
    [
        ("LlamaForCausalLM", {TABLE: [0, 5]}),
        slow("LlamaForCausalLM", {HEAD: [0, 5]}),
        ("LlamaForCausalLM", {TABLE: [0, 5], HEAD: [1, 2]}),
        ("BartForConditionalGeneration", {TABLE: [0, 5]}),  # of the encoder and of the decoder, which are not stored
        ("BartForConditionalGeneration", {"decoder.embed_tokens": [3]}),
        ("BartForConditionalGeneration", {"shared": [0, 5], HEAD: [1, 2]}),  # PEFT ties none of the others
    ],
)
def test_untied_rows_of_tokens_are_what_peft_computes(architecture, indices, tmp_path):
    model = tied_model(tmp_path / "base", architecture)
    adapter = model.adapter(tmp_path / "adapter", "q_proj", trainable_token_indices=indices)
    expected = model.outputs(model.trained("q_proj", trainable_token_indices=indices))
    le.merge(model.base, adapter, tmp_path / "out", tied="untie")
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), expected)
    assert le.verify(tmp_path / "out", base=model.base, adapters=adapter, tied="untie")
    verdict = le.verify(tmp_path / "out", model.base, adapters=adapter, tied="untie").verdict
    assert verdict.outcome == ("undecided" if "shared" in indices else "same")  # the untied parts of BART use their own


@pytest.mark.parametrize(
    ("architecture", "target", "table", "way_out"),
    [
        (
            "LlamaForCausalLM",
            "q_proj",
            TABLE,
            'tied="untie" gives each a tensor of its own, as the adapter was trained',
        ),
        ("T5ForConditionalGeneration", "q", "shared", "No merge changes them apart"),
    ],
)
def test_rows_that_differ_are_not_offered_as_one_change(architecture, target, table, way_out, tmp_path):
    model = tied_model(tmp_path / "base", architecture)
    adapter = model.adapter(tmp_path / "adapter", target, trainable_token_indices={table: [0, 5], HEAD: [1, 2]})
    with pytest.raises(InputRefused, match=rf"is tied to .*\.weight\. {way_out}$"):
        le.merge(model.base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("tied", "saved"), [("error", False), ("both", True), slow("error", True), slow("both", False)]
)
@pytest.mark.parametrize(
    ("architecture", "target", "indices"),
    [
        ("LlamaForCausalLM", "q_proj", {HEAD: [0, 5], TABLE: [0, 5]}),
        ("BertForMaskedLM", "query", {"bert.embeddings.word_embeddings": [0, 5], "cls.predictions.decoder": [0, 5]}),
        ("BartForConditionalGeneration", "q_proj", [0, 5]),  # looked up as the tables of encoder and decoder
        ("T5ForConditionalGeneration", "q", [0, 5]),
        slow("T5ForConditionalGeneration", "q", {"shared": [0, 5], HEAD: [0, 5]}),
    ],
)
def test_rows_of_all_tied_names_need_no_option(tied, architecture, target, indices, saved, tmp_path):
    model = tied_model(tmp_path / "base", architecture)
    trained = model.trained(target, trainable_token_indices=indices)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved)
    le.merge(model.base, tmp_path / "adapter", tmp_path / "out", tied=tied)
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), model.outputs(trained))
    assert le.verify(tmp_path / "out", model.base, adapters=tmp_path / "adapter", tied=tied)


@pytest.mark.parametrize("indices", [[0, 5], {TABLE: [0, 5]}], ids=["list", "table"])
@pytest.mark.parametrize(("is_tied", "options"), [(False, {}), (True, {}), (True, {"tied": "untie"})])
def test_rows_beside_their_saved_tables_are_what_peft_computes(is_tied, options, indices, tmp_path):
    """PEFT saves whole tables beside the rows where words were added to the model, of a tied head both again."""
    model = tied_model(tmp_path / "base", tied=is_tied)
    trained = model.trained("q_proj", trainable_token_indices=indices)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = model.base / "model.safetensors"
    others = {name: value * 2 if value.shape[0] == WORDS else value for name, value in load_file(file).items()}
    save_file(others, file, {"format": "pt"})
    le.merge(model.base, tmp_path / "adapter", tmp_path / "out", **options)
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), model.outputs(trained))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == others.keys()


@pytest.mark.parametrize("targets", [(HEAD,), (TABLE,), (HEAD, TABLE)], ids="+".join)
@pytest.mark.parametrize(
    ("architecture", "factor"),
    [
        ("LlamaForCausalLM", None),
        ("LlamaForCausalLM", 2),
        ("PhiForCausalLM", 1),  # its head has a bias
        slow("LlamaForCausalLM", 1),
        slow("PhiForCausalLM", None),
    ],
)
def test_a_table_saved_beside_a_pair_is_that_of_both_names(factor, targets, architecture, tmp_path):
    """PEFT loads it into the one tensor of the model, as after words were added. The factor is a stored head's."""
    model = tied_model(tmp_path / "base", architecture)
    model.trained(*targets).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = model.base / "model.safetensors"
    weights = {name: value * (2 if name == LLAMA_TABLE else 1) for name, value in load_file(file).items()}
    again = {} if factor is None else {"lm_head.weight": weights[LLAMA_TABLE] * factor}
    save_file(weights | again, file, {"format": "pt"})
    attached = peft.PeftModel.from_pretrained(model.reloaded(model.base), tmp_path / "adapter")
    for tied, expected in (("untie", model.outputs(attached)), ("both", model.outputs(attached.merge_and_unload()))):
        le.merge(model.base, tmp_path / "adapter", tmp_path / tied, tied=tied)
        assert is_near(model.outputs(model.reloaded(tmp_path / tied)), expected)
        assert le.verify(tmp_path / tied, model.base, adapters=tmp_path / "adapter", tied=tied)


@pytest.mark.parametrize(
    ("tied", "saved", "options"), [("both", False, {"bias": "all"}), ("both", True, {}), ("error", True, {})]
)
def test_rows_of_a_bert_with_the_bias_of_its_head(tied, saved, options, tmp_path):
    """The base stores no bias of the decoder. Added, it unties the head, which has the trained rows too."""
    model = tied_model(tmp_path / "base", "BertForMaskedLM")
    trained = model.trained("query", trainable_token_indices=[0, 5], **options)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved)
    le.merge(model.base, tmp_path / "adapter", tmp_path / "out", tied=tied)
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), model.outputs(trained))
    assert le.verify(tmp_path / "out", base=model.base, adapters=tmp_path / "adapter", tied=tied)


@pytest.mark.parametrize("indices", [[0, 5], {TABLE: [0, 5]}, {HEAD: [0, 5]}], ids=["list", "table", "head"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_peft_loads_converted_rows_beside_their_tables(is_tied, indices, tmp_path):
    model = tied_model(tmp_path / "base", tied=is_tied)
    trained = model.trained("q_proj", trainable_token_indices=indices)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    le.convert(tmp_path / "adapter", tmp_path / "out", to="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "out")
    assert is_near(model.outputs(loaded), model.outputs(trained))


def test_a_saved_table_beside_rows_does_not_change_a_tied_head(tmp_path):
    """Of a module in `modules_to_save` and in `trainable_token_indices`, the table is the module's own."""
    model = tied_model(tmp_path / "base")
    adapter = model.adapter(tmp_path / "adapter", "q_proj", trainable_token_indices=[0, 5])
    file = adapter / "adapter_model.safetensors"
    key = f"base_model.model.model.{TABLE}.token_adapter.base_layer.weight"
    save_file({**load_file(file), key: np.ones((WORDS, 8), np.float32)}, file)
    with pytest.raises(InputRefused, match=r"embed_tokens.weight is the output embeddings too"):
        le.merge(model.base, adapter, tmp_path / "out")


def test_a_wrong_untied_head_is_different(llama, tmp_path):
    adapter = llama.adapter(tmp_path / "adapter", TABLE)
    le.merge(llama.base, adapter, tmp_path / "out", tied="untie")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights[LLAMA_TABLE]
    save_file(weights, file, metadata={"format": "pt"})
    verdict = le.verify(tmp_path / "out", base=llama.base, adapters=adapter, tied="untie").verdict
    assert verdict.outcome == "different" and "lm_head.weight" in str(verdict)


@pytest.mark.parametrize("target", [HEAD, TABLE])
def test_without_the_option_the_refusal_names_it(llama, target, tmp_path):
    adapter = llama.adapter(tmp_path / "adapter", target)
    with pytest.raises(InputRefused) as refused:
        le.merge(llama.base, adapter, tmp_path / "out")
    assert 'tied="untie"' in str(refused.value) and 'tied="both"' in str(refused.value)
    assert not (tmp_path / "out").exists()
    for tied in ("untie", "both"):
        le.merge(llama.base, adapter, tmp_path / tied, tied=tied)
        with pytest.raises(InputRefused) as refused:  # a verdict would be about one of the two ways
            le.verify(tmp_path / tied, base=llama.base, adapters=adapter)
        assert 'tied="untie"' in str(refused.value) and 'tied="both"' in str(refused.value)
        assert le.verify(tmp_path / tied, base=llama.base, adapters=adapter, tied=tied)


def test_without_a_way_to_merge_rows_and_a_pair_none_is_named(llama, tmp_path):
    """PEFT trains rows of the table for the tied head too, which has a pair."""
    adapter = llama.adapter(tmp_path / "adapter", HEAD, trainable_token_indices=[0, 5])
    with pytest.raises(InputRefused, match=r"replaces rows of one, and adds to the other: no merge does both$"):
        le.merge(llama.base, adapter, tmp_path / "out")


def test_all_tensors_of_a_bert_are_untied_with_its_head(tmp_path):
    """The config ties the bias of the head too."""
    model = tied_model(tmp_path / "base", "BertForMaskedLM")
    adapter = model.adapter(tmp_path / "adapter", "decoder")
    le.merge(model.base, adapter, tmp_path / "out", tied="untie")
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), model.outputs(model.trained("decoder")))


def test_a_model_that_its_config_cannot_untie_is_refused_by_name(tmp_path):
    model = tied_model(tmp_path / "base", "T5ForConditionalGeneration")
    adapter = model.adapter(tmp_path / "adapter", HEAD)
    for one, why in ((adapter, "is tied to shared.weight."), (model.adapter(tmp_path / "table", "shared"), "change.")):
        with pytest.raises(InputRefused, match=rf'{why} tied="both" changes both$'):
            le.merge(model.base, one, tmp_path / "out")
    with pytest.raises(InputRefused, match="T5ForConditionalGeneration without tie_word_embeddings is another model"):
        le.merge(model.base, adapter, tmp_path / "out", tied="untie")
    le.merge(model.base, adapter, tmp_path / "both", tied="both")
    merged = model.trained(HEAD).merge_and_unload()
    assert is_near(model.outputs(model.reloaded(tmp_path / "both")), model.outputs(merged))


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_a_base_without_the_prefix_of_its_model_is_refused(tied, tmp_path):
    """A file of GPT-2 may have `wte` for `transformer.wte`: beside `lm_head` it would not be found."""
    model = tied_model(tmp_path / "base", "GPT2LMHeadModel")
    file = model.base / "model.safetensors"
    save_file({n.removeprefix("transformer."): v for n, v in load_file(file).items()}, file, metadata={"format": "pt"})
    adapter = model.adapter(tmp_path / "adapter", HEAD)
    with pytest.raises(InputRefused, match=r"lack the prefix `transformer\.` of its model"):
        le.merge(model.base, adapter, tmp_path / "out", tied=tied)


def test_an_untied_head_has_the_generation_of_names_of_its_base(tmp_path):
    (tmp_path / "base").mkdir()
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    config |= {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    for own, head in (
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ):
        save_file({own: table}, tmp_path / "base" / "model.safetensors")
        assert dict(ties_of(open_checkpoint(tmp_path / "base"), "untie").tensors) == {head: own}


def test_names_that_the_header_of_a_file_ties_are_untied(tmp_path):
    base = tmp_path / "base.safetensors"
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    save_file({"embed.weight": table, "b": table[0]}, base, metadata={"head.weight": "embed.weight", "x": "y"})
    pair = LoraPair(np.ones((1, 4)), np.ones((5, 1)), 1.0)
    le.merge(base, Adapter("one", "peft", {"head": pair}), tmp_path / "out.safetensors", tied="untie")
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert "head.weight" not in file.metadata() and file.metadata()["x"] == "y"
        np.testing.assert_array_equal(file.get_tensor("head.weight"), table + 1)
        np.testing.assert_array_equal(file.get_tensor("embed.weight"), table)


@pytest.mark.parametrize(("factor", "tied"), [(1, "error"), (1, "untie"), (2, "both")])
def test_a_class_that_ties_none_by_default_changes_each_table_alone(factor, tied, llama, tmp_path):
    """Without `tie_word_embeddings` in the config."""
    model = stored_twice(tmp_path / "base", "LlamaForCausalLM", factor, None)
    loaded = model.reloaded(model.base)
    for targets, options in (
        (("q_proj",), {"trainable_token_indices": {TABLE: [0, 5]}}),
        (("q_proj",), {"trainable_token_indices": {HEAD: [0, 5]}}),
        ((HEAD,), {}),
        ((TABLE,), {}),
    ):
        adapter, out = tmp_path / f"{targets}{options}", tmp_path / f"out{targets}{options}"
        replace(model, model=loaded).adapter(adapter, *targets, **options)
        le.merge(model.base, adapter, out, tied=tied)
        attached = peft.PeftModel.from_pretrained(model.reloaded(model.base), adapter)
        assert is_near(model.outputs(model.reloaded(out)), model.outputs(attached))


@pytest.mark.parametrize("target", [HEAD, TABLE])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_both_joins_no_tables_of_other_values(architecture, target, tmp_path):
    """transformers does not tie them, and PEFT changes one."""
    target = "shared" if architecture[:2] == "T5" and target == TABLE else target
    model = stored_twice(tmp_path / "base", architecture, 2, True)
    adapter = model.adapter(tmp_path / "adapter", target)
    le.merge(model.base, adapter, tmp_path / "out", tied="both")
    attached = peft.PeftModel.from_pretrained(model.reloaded(model.base), adapter)
    # T5's stacks have embeddings of their own, with the same tensor: a pair on `shared` acts where it is merged.
    expected = model.outputs(attached.merge_and_unload() if target == "shared" else attached)
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), expected)
    stored = [load_file(folder / "model.safetensors").keys() for folder in (model.base, tmp_path / "out")]
    assert stored[0] == stored[1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (architecture[:2] == "T5")  # false makes another model of it


OLD_LLAVA = ("language_model.model.embed_tokens", "language_model.lm_head")
OLD_QWEN, NEW_NAMES = ("model.embed_tokens", "lm_head"), ("model.language_model.embed_tokens", "lm_head")


@pytest.mark.parametrize(
    ("model_type", "stored", "trained"),
    [
        *itertools.product(["llava", "paligemma"], *[(OLD_LLAVA, NEW_NAMES)] * 2),
        *itertools.product(["qwen2_vl"], *[(OLD_QWEN, NEW_NAMES)] * 2),
    ],
)
def test_rows_of_another_generation_miss_no_head_with_other_values(model_type, stored, trained, tmp_path):
    """transformers 5 saves such a head under either names, and PEFT takes rows of the table for it."""
    (tmp_path / "base").mkdir()
    architecture = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    config = {"architectures": [architecture], "model_type": model_type, "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    tensors = {f"{name}.weight": factor * table for factor, name in enumerate(stored, 1)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    rows = TokenRows(np.array([1]), np.ones((1, 3), np.float32))
    of_table, of_head = (Adapter("one", "peft", {}, token_rows={f"{name}.weight": rows}) for name in trained)
    with pytest.raises(InputRefused, match=rf"the base stores other values of {stored[1]}\.weight\. tied=\"untie\""):
        le.merge(tmp_path / "base", of_table, tmp_path / "out")
    with pytest.raises(InputRefused, match=rf"one replaces rows of {stored[1]}\.weight alone"):
        le.merge(tmp_path / "base", of_head, tmp_path / "out", tied="both")
    for tied in ("untie", "both"):
        le.merge(tmp_path / "base", of_table, tmp_path / tied, tied=tied)
        for name, own in load_file(tmp_path / tied / "model.safetensors").items():
            np.testing.assert_array_equal(own, np.where(np.arange(5)[:, None] == 1, 1, tensors[name]))


def test_both_is_refused_for_rows_of_a_head_with_other_values(tmp_path):
    model = stored_twice(tmp_path / "base", "LlamaForCausalLM", 2, True)
    adapter = model.adapter(tmp_path / "adapter", "q_proj", trainable_token_indices={HEAD: [0, 5]})
    with pytest.raises(InputRefused, match=r'tied="both": the base stores other values of lm_head\.weight than of .* '):
        le.merge(model.base, adapter, tmp_path / "out", tied="both")
    assert le.check(adapter, base=model.base, runtimes=["vllm"]).outcomes  # it merges nothing


@pytest.mark.parametrize("tied", ["untie", "both"])
@pytest.mark.parametrize("change", [{}, {"trainable_token_indices": {"shared": [0, 5]}}, HEAD])
def test_flan_t5_takes_either_option(change, tied, tmp_path):
    """Its config states no tie, and has the class T5."""
    model = stored_twice(tmp_path / "base", "T5ForConditionalGeneration", 2, False)
    targets, options = (["q", HEAD], {}) if change == HEAD else (["q"], change)
    adapter = model.adapter(tmp_path / "adapter", *targets, **options)
    le.merge(model.base, adapter, tmp_path / "out", tied=tied)
    expected = model.outputs(peft.PeftModel.from_pretrained(model.reloaded(model.base), adapter))
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), expected)


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("text", [None, True, False])
@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("LlavaForConditionalGeneration", "llava"),
        ("Gemma3ForConditionalGeneration", "gemma3"),
        ("LlamaForCausalLM", "llama"),
        ("GPT2LMHeadModel", "gpt2"),
        ("T5ForConditionalGeneration", "t5"),
    ],
)
def test_the_class_decides_what_its_config_does_not_state(architecture, model_type, text, stated, tmp_path):
    config = {"architectures": [architecture], "model_type": model_type, "tie_word_embeddings": stated}
    if text is not None:
        config["text_config"] = {"model_type": "llama", "tie_word_embeddings": text}
    (tmp_path / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    expected = transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert is_tied(open_checkpoint(tmp_path)) is expected


def stored_twice(folder: Path, architecture: str, factor: float, stated: bool | None) -> TiedModel:
    """A model whose folder has a head of its own: the table times a factor. Its config states a tie, or none."""
    model = tied_model(folder, architecture)
    weights = load_file(folder / "model.safetensors")
    tables = ("embed_tokens.weight", "wte.weight", "shared.weight")
    table = next(value for name, value in weights.items() if name.endswith(tables))
    save_file(weights | {"lm_head.weight": factor * table}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": stated}
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not None}))
    return model


@pytest.mark.parametrize(
    ("architecture", "indices", "factor", "stated", "remain_tied"),
    [
        ("LlamaForCausalLM", {TABLE: [0, 5]}, 1, True, True),
        ("LlamaForCausalLM", {TABLE: [0, 5]}, 2, False, False),
        ("LlamaForCausalLM", {TABLE: [0, 5]}, 1, None, None),  # it ties none by default
        ("LlamaForCausalLM", {TABLE: [0, 5]}, 2, None, None),
        ("LlamaForCausalLM", {HEAD: [0]}, 1, True, False),
        ("LlamaForCausalLM", {TABLE: [0, 5], HEAD: [2]}, 2, True, False),  # no row is lost
        ("GPT2LMHeadModel", {"wte": [0, 5]}, 1, None, None),  # it ties them by default
    ],
)
def test_rows_of_tied_tables_that_are_both_stored(architecture, indices, factor, stated, remain_tied, tmp_path):
    model = stored_twice(tmp_path / "base", architecture, factor, stated)
    target = "q_proj" if architecture == "LlamaForCausalLM" else "c_attn"
    adapter = model.adapter(tmp_path / "adapter", target, trainable_token_indices=indices)
    le.merge(model.base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings") is remain_tied
    loaded = peft.PeftModel.from_pretrained(model.reloaded(model.base), adapter)
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), model.outputs(loaded))


def test_rows_beside_a_saved_head_with_other_values_are_what_peft_computes(tmp_path):
    """No row is lost: the adapter has the head's own values."""
    model = stored_twice(tmp_path / "base", "LlamaForCausalLM", 2, True)
    trained = model.trained("q_proj", trainable_token_indices={TABLE: [0, 5]})
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    le.merge(model.base, tmp_path / "adapter", tmp_path / "out")
    attached = peft.PeftModel.from_pretrained(model.reloaded(model.base), tmp_path / "adapter")
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), model.outputs(attached))


@pytest.mark.parametrize(
    ("architecture", "stated", "target", "table", "ways_out"),
    [
        ("LlamaForCausalLM", True, "q_proj", TABLE, ["untie", "both", "config"]),
        ("GPT2LMHeadModel", None, "c_attn", "wte", ["untie", "both", "config"]),
        ("BartForConditionalGeneration", True, "q_proj", "shared", ["untie", "both"]),  # two tables have no tensor
        ("T5ForConditionalGeneration", True, "q", "shared", ["both"]),
        ("T5ForConditionalGeneration", False, "q", "shared", ["both"]),  # FLAN-T5: the class ties them all the same
    ],
)
def test_rows_of_tables_that_differ_where_the_model_ties_them_are_refused(
    architecture, stated, target, table, ways_out, tmp_path
):
    """transformers does not tie them, and PEFT trains the rows for both."""
    model = stored_twice(tmp_path / "base", architecture, 2, stated)
    adapter = model.adapter(tmp_path / "adapter", target, trainable_token_indices={table: [0, 5]})
    with pytest.raises(InputRefused, match=r"the base stores other values of lm_head\.weight\. ") as refused:
        le.merge(model.base, adapter, tmp_path / "out")
    words = {"untie": 'tied="untie"', "both": 'tied="both"', "config": "tie_word_embeddings = false"}
    assert [way for way, text in words.items() if text in str(refused.value)] == ways_out
    expected = model.outputs(peft.PeftModel.from_pretrained(model.reloaded(model.base), adapter))
    for handling in [way for way in ways_out if way != "config"]:
        le.merge(model.base, adapter, tmp_path / handling, tied=handling)
        assert is_near(model.outputs(model.reloaded(tmp_path / handling)), expected)
    assert le.verify(tmp_path / ways_out[0], model.base, adapters=adapter, tied=ways_out[0])


@pytest.mark.parametrize("stated", [True, False])
def test_a_head_with_other_values_changes_alone_where_no_config_unties_it(stated, tmp_path):
    """FLAN-T5, whose config states that it is tied where transformers 5 saved it."""
    model = stored_twice(tmp_path / "base", "T5ForConditionalGeneration", 2, stated)
    adapter = model.adapter(tmp_path / "adapter", "q", HEAD)
    le.merge(model.base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is stated
    expected = model.outputs(peft.PeftModel.from_pretrained(model.reloaded(model.base), adapter))
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), expected)
    assert le.verify(tmp_path / "out", base=model.base, adapters=adapter).verdict.outcome == "same"


@pytest.mark.parametrize("tied", ["error", "untie"])
def test_a_saved_head_is_added_where_only_the_class_ties_it(tied, tmp_path):
    """A T5 without a head of its own: transformers 5 ties it, and loads one with other values apart."""
    model = tied_model(tmp_path / "base", "T5ForConditionalGeneration")
    config = json.loads((model.base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model.base / "config.json").write_text(json.dumps(config))
    adapter = model.adapter(tmp_path / "adapter", "q", modules_to_save=[HEAD])
    le.merge(model.base, adapter, tmp_path / "out", tied=tied)
    expected = model.outputs(peft.PeftModel.from_pretrained(model.reloaded(model.base), adapter))
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), expected)
    added = load_file(tmp_path / "out" / "model.safetensors").keys() - load_file(model.base / "model.safetensors")
    assert added == {"lm_head.weight"}
    assert le.verify(tmp_path / "out", base=model.base, adapters=adapter, tied=tied).verdict.outcome == "same"
    with_table = model.adapter(tmp_path / "table", "shared", modules_to_save=[HEAD])  # encoder and decoder read it, too
    with pytest.raises(InputRefused, match=r"^the adapter adds lm_head\.weight, which the model ties\. "):
        le.merge(model.base, with_table, tmp_path / "other")


def test_a_conflict_of_adapters_is_not_one_of_ties(llama, tmp_path):
    """No option for tied tensors makes one head of two."""
    adapters = [llama.adapter(tmp_path / n, "q_proj", seed=int(n), modules_to_save=[HEAD]) for n in "12"]
    with pytest.raises(InputRefused, match=r"with other values\. Merge only one of these adapters$"):
        le.merge(llama.base, adapters, tmp_path / "out")


def test_two_tables_that_change_apart_are_not_tied_again(llama, tmp_path):
    """A file may store both tables where the config ties them: transformers ties them if they are equal."""
    base = stored_twice(tmp_path / "base", "LlamaForCausalLM", 1, True).base
    adapter = llama.adapter(tmp_path / "adapter", HEAD)
    le.merge(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert is_near(llama.outputs(llama.reloaded(tmp_path / "out")), llama.outputs(llama.trained(HEAD)))


@pytest.mark.parametrize("tied", ["untie", "both"])
@pytest.mark.parametrize(("factor", "saved"), [(None, True), (None, False), (1, False), (2, False)])
def test_the_base_is_made_again_from_a_residual(llama, factor, saved, tied, tmp_path):
    """The factor is that of a head of the base. Tables that are saved beside pairs take the place of the base's."""
    base = llama.base if factor is None else stored_twice(tmp_path / "base", "LlamaForCausalLM", factor, True).base
    adapter = tmp_path / "adapter"
    llama.trained(HEAD, TABLE).save_pretrained(adapter, save_embedding_layers=saved)
    le.merge(base, adapter, tmp_path / "out", tied=tied, keep_residual=tmp_path / "residual")
    le.unmerge(tmp_path / "out", adapter, tmp_path / "again", base_from=tmp_path / "residual")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(
    "rows", [[{TABLE: [0, 5]}], [{TABLE: [0, 5], HEAD: [2]}], [{TABLE: [0, 5]}, {HEAD: [3]}]], ids=str
)
def test_two_tables_are_made_again_whatever_their_merged_values(llama, rows, tmp_path):
    base = stored_twice(tmp_path / "base", "LlamaForCausalLM", 1, True).base
    adapters = [
        llama.adapter(tmp_path / str(number), "q_proj", seed=number, trainable_token_indices=indices)
        for number, indices in enumerate(rows)
    ]
    le.merge(base, adapters, tmp_path / "out", keep_residual=tmp_path / "residual")
    assert le.verify(tmp_path / "out", base=base, adapters=adapters)
    le.unmerge(tmp_path / "out", adapters, tmp_path / "again", base_from=tmp_path / "residual")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


def test_a_class_whose_ties_are_not_known_is_refused(llama, tmp_path):
    config = json.loads((llama.base / "config.json").read_text()) | {"architectures": ["MyForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputRefused, match="which tensors MyForCausalLM ties is not known"):
        ties_of(open_checkpoint(tmp_path), Tied.BOTH)


def test_a_config_untied_config_has_none(llama, tmp_path):
    config = json.loads((llama.base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(untied_config(config)))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert not ties_of(open_checkpoint(tmp_path), Tied.UNTIE).tensors
    assert untied_config({"a": {"tie_word_embeddings": True, "b": {"c": 1}}})["a"] == {
        "tie_word_embeddings": False,
        "b": {"c": 1},
    }


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "BertForMaskedLM",
        "T5ForConditionalGeneration",
        "MT5Model",
        "LlavaForConditionalGeneration",
        "Blip2ForConditionalGeneration",
    ],
)
def test_the_table_has_the_ties_of_transformers(name):
    table = read_table()
    if transformers.__version__ != table.version:
        pytest.skip("the table is that of another transformers")
    model = transformers_names.build(getattr(transformers, name))
    assert (name in table.tied_by_default) is transformers_names.ties_by_default(model)
    assert dict(table.ties[name]) == transformers_names.tied_names(model)
    assert (name in table.cannot_untie) is transformers_names.cannot_untie(model)
    assert (name in table.tied_by_default) is (name[:5] in ("BertF", "T5For", "MT5Mo"))
    assert [name in each for each in (table.tied_always, table.tied_by_text, table.tied_by_part)] == [
        is_tied_in(model) for is_tied_in in transformers_names.TIED_WHERE.values()
    ]
    assert (name in table.cannot_untie) is ("T5" in name)


def test_a_head_is_known_where_one_weight_is_tied():
    assert tied_head("LlamaForCausalLM") == tied_head("LlavaForConditionalGeneration") == "lm_head"
    assert tied_head("BertLMHeadModel") == "cls.predictions.decoder"
    assert [tied_head(name) for name in ("T5ForConditionalGeneration", "BertModel", "")] == ["", "", ""]


@pytest.mark.parametrize(("target", "is_refused"), [(TABLE, True), ("gate_proj", False)])
def test_a_matrix_of_as_many_rows_is_no_table_of_words(target, is_refused, tmp_path):
    """`gate_proj` has as many rows as there are words: neither is its change one of a table, nor does it hide one."""
    model = tied_model(tmp_path / "base", intermediate_size=WORDS)
    adapter = model.adapter(tmp_path / "adapter", target)
    if is_refused:
        with pytest.raises(InputRefused, match=r"model\.embed_tokens\.weight is the output embeddings too"):
            le.merge(model.base, adapter, tmp_path / "out")
        return
    le.merge(model.base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert is_near(model.outputs(model.reloaded(tmp_path / "out")), model.outputs(model.trained(target)))


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_whose_input_table_has_more_rows_is_not_tied(options, tmp_path):
    """Mllama has rows for images in its input embeddings: nothing can be tied, and its config says nothing of it."""
    text = {**ONE_LAYER, "num_hidden_layers": 2, "num_key_value_heads": 2, **TOKENS}
    text |= {"cross_attention_layers": [1], "vocab_size": WORDS}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 28}
    vision |= {
        "intermediate_size": 12,
        "vision_output_dim": 16,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    vision |= {"intermediate_layers_indices": [0]}
    config = transformers.MllamaConfig(text_config=text, vision_config=vision)
    torch.manual_seed(1)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    tied = TiedModel(model, tmp_path / "base")
    targets = ["q_proj", *options.pop("target_modules", ())]
    trained = tied.trained(*targets, **options)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    le.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = torch.arange(WORDS).reshape(1, -1)
    with torch.no_grad():
        assert is_near(tied.reloaded(tmp_path / "out").eval()(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_a_table_of_words_is_known_by_its_name(tmp_path):
    """A class that transformers does not have: `up` has a row for each word, and is none of its tables."""
    (tmp_path / "base").mkdir()
    config = {"tie_word_embeddings": True, "architectures": ["MyForCausalLM"], "vocab_size": 3}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    weights = {"embed_tokens.weight": np.ones((3, 2), np.float32), "up.weight": np.ones((3, 2), np.float32)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    table = LoraPair(np.ones((1, 3)), np.ones((2, 1)), 1.0, embedding=True)
    with pytest.raises(InputRefused, match=r"embed_tokens\.weight is the output embeddings too"):
        le.merge(tmp_path / "base", Adapter("one", "peft", {"embed_tokens": table}), tmp_path / "out")
    up = LoraPair(np.ones((1, 2)), np.ones((3, 1)), 1.0)
    le.merge(tmp_path / "base", Adapter("one", "peft", {"up": up}), tmp_path / "out", layout={"up": "out_in"})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
