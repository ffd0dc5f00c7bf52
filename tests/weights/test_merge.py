"""Merging into a checkpoint: against PEFT bit for bit, by hand on integers, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from lora_export import formats, plan, provenance, sums
from lora_export import merge as merge_files
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import Adapter, LoraPair
from lora_export.storage import block_copy, safetensors_file
from lora_export.storage.hashes import ALGORITHMS, file_sha256
from lora_export.storage.manifest import MANIFEST, read_manifest
from lora_export.sums import add_into
from lora_export.weights import merge, tensor_blocks
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.merge import merge_checkpoint
from support.handmade import add_tensors, base_file, peft_adapter
from support.merges import (
    Convolutions,
    Net,
    dora,
    merged,
    merged_by_both,
    nearly_the_same_bits,
    same_bits,
    sixty_fourths,
    trained,
)
from support.tiny_models import tiny_bert, tiny_gpt2, tiny_llama

BF16 = np.dtype(ml_dtypes.bfloat16)
LINEAR = {"*": "out_in"}


# --- Against PEFT ---


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, {"r": 16, "lora_alpha": 8}),
        (torch.bfloat16, {"r": 16, "lora_alpha": 8}),
        (torch.float16, {"r": 16, "lora_alpha": 8}),
        (torch.bfloat16, {"r": 4, "lora_alpha": 8, "use_rslora": True}),  # 8 / √4
        (torch.float16, {"r": 2, "lora_alpha": 1, "rank_pattern": {"square": 8}, "alpha_pattern": {"square": 4}}),
        (torch.float32, {"r": 4, "lora_alpha": 4, "target_modules": ["up", "square"], "lora_bias": True}),
        (torch.bfloat16, {"r": 4, "lora_alpha": 4, "target_modules": ["up", "square"], "lora_bias": True}),
        (
            torch.float32,
            {"r": 4, "lora_alpha": 8, "target_modules": ["up", "square"], "lora_bias": True, "bias": "all"},
        ),
        (torch.float16, {"r": 4, "lora_alpha": 4, "target_modules": ["square"], "bias": "all"}),
        (
            torch.bfloat16,
            {"r": 4, "lora_alpha": 4, "target_modules": ["square"], "bias": "lora_only", "modules_to_save": ["down"]},
        ),
    ],
)
def test_merged_weights_equal_pefts_bit_for_bit(tmp_path, dtype, config):
    torch.manual_seed(0)
    net = Net().to(dtype)
    model = trained(net, sixty_fourths, **{"target_modules": ["up", "square", "down"], **config})
    report, ours, theirs = merged_by_both(tmp_path, net, model, layout=LINEAR)
    assert same_bits(ours, theirs)
    assert not torch.equal(ours["square.weight"], net.square.weight)
    assert {result.weight for result in report.results if result.weight.endswith("weight")} == {
        f"{name}.weight" for name in config.get("target_modules", ["up", "square", "down"])
    }


class Named(nn.Module):
    """Modules with names of LoRA's, a Conv1D, an embedding and a bare parameter, all of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.lora_head, self.my_lora_x = (nn.Linear(4, 4) for _ in range(3))
        self.fan, self.words, self.inner = Conv1D(4, 4), nn.Embedding(4, 4), nn.ParameterDict({"kernel": torch.eye(4)})


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lora_head"]},
        {"modules_to_save": ["lora_head"], "bias": "all"},
        {"target_modules": ["lora_head"], "modules_to_save": ["my_lora_x"], "bias": "all"},
        {"velora_config": VeloraConfig(num_groups=2)},
        {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=1)},
        {"target_parameters": ["fan.weight"]},
        {"target_parameters": ["words.weight", "inner.kernel", "my_lora_x.weight"]},
        {"target_parameters": ["kernel"], "alpha_pattern": {"inner.kernel": 3}, "target_modules": []},
    ],
    ids=str,
)
def test_every_tensor_that_peft_saves_is_understood(tmp_path, config):
    torch.manual_seed(0)
    base = Named()
    model = trained(base, sixty_fourths, r=2, **{"target_modules": ["square"], **config})
    _, ours, theirs = merged_by_both(tmp_path, base, model, layout={**LINEAR, "fan.weight": "in_out"})
    assert same_bits(ours, theirs)


def corda(model: nn.Module, config: peft.LoraConfig) -> None:
    preprocess_corda(model, config, run_model=lambda: model.up(torch.eye(24)[:5]))


def lora_ga(model: nn.Module, config: peft.LoraConfig) -> None:
    preprocess_loraga(model, config, lambda: model.up(torch.eye(24)[:5]).square().sum().backward())


@pytest.mark.parametrize("prepare", [corda, lora_ga])
def test_a_converted_adapter_fits_the_original_base(tmp_path, prepare):
    """PEFT leaves the config of the initialisation beside `init_lora_weights: true`."""
    torch.manual_seed(0)
    net = Net()
    save_tensors(net.state_dict(), tmp_path / "base.safetensors")
    config = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=prepare.__name__)
    config.corda_config = CordaConfig(corda_method="kpm") if prepare is corda else None
    config.lora_ga_config = LoraGAConfig() if prepare is lora_ga else None
    prepare(net, config)
    model = peft.get_peft_model(net, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = prepare.__name__
    with torch.no_grad():
        model.base_model.model.up.lora_B["default"].weight += 0.5
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and saved["corda_config" if prepare is corda else "lora_ga_config"]
    merged(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out", layout=LINEAR)
    theirs = model.merge_and_unload().state_dict()["up.weight"]
    ours = load_tensors(tmp_path / "out/model.safetensors")["up.weight"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - load_tensors(tmp_path / "base.safetensors")["up.weight"]).abs().max() > 0.1


def test_a_bias_that_peft_saves_three_times_is_one(tmp_path):
    torch.manual_seed(0)
    base = BertForTokenClassification(tiny_bert().config)
    model = trained(base, sixty_fourths, r=2, task_type="TOKEN_CLS", bias="all", target_modules=["query"])
    _, ours, theirs = merged_by_both(tmp_path, base, model)
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len([key for key in saved if ".classifier." in key and key.endswith(".bias")]) == 3
    assert same_bits(ours, theirs)


def test_arbitrary_values_equal_pefts_within_one_rounding(tmp_path):
    # The last bit of BA depends on the order in which a BLAS adds up; a CPU may show none, or a few per thousand.
    torch.manual_seed(0)
    net = Net()
    model = trained(net, lambda tensor: tensor.normal_(std=0.02), r=16, target_modules=["up", "square", "down"])
    _, ours, theirs = merged_by_both(tmp_path, net, model, layout=LINEAR)
    for name, pair in formats.load(tmp_path / "adapter").pairs.items():
        one, other = (tensors[f"{name}.weight"].numpy() for tensors in (ours, theirs))
        largest_sum = np.abs(other) + pair.scale * (np.abs(pair.b) @ np.abs(pair.a))  # on the way to the result
        assert (np.abs(one - other) <= np.spacing(largest_sum)).all()
        assert (one == other).mean() > 0.9


def test_in_out_matrices_of_gpt2_equal_pefts(tmp_path):
    base = tiny_gpt2()
    targets = ["c_attn", "c_proj", "c_fc"]  # attention's c_proj is square: its shape tells nothing
    model = trained(base, sixty_fourths, r=4, lora_alpha=4, target_modules=targets, fan_in_fan_out=True)
    report, ours, theirs = merged_by_both(tmp_path, base, model)
    assert len(report.results) == 4 and same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "weight"), [(torch.float32, 1.0), (torch.float32, 0.5), (torch.bfloat16, 1.0), (torch.float16, 0.5)]
)
def test_dora_on_linear_layers_equals_pefts(tmp_path, dtype, weight):
    torch.manual_seed(0)
    net = Net().to(dtype)
    model = dora(net, r=4, lora_alpha=2, target_modules=["up", "down"], alpha_pattern={"down": 8})
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(weight)  # in PEFT a weight multiplies the scale, with DoRA too; no file has it
    report, ours, theirs = merged_by_both(tmp_path, net, model, strengths=(weight,))
    assert nearly_the_same_bits(ours, theirs, net.state_dict()) == {"up.weight", "down.weight"}
    assert all(result.retention == pytest.approx(1, abs=2e-3) and result.noise < 0.02 for result in report.results)


def test_dora_on_in_out_matrices_and_embeddings_equals_pefts(tmp_path):
    # Both are stored (in, out): a length runs through all rows.
    base = tiny_gpt2(tie_word_embeddings=False)
    model = dora(base, r=4, lora_alpha=4, target_modules=["c_attn", "c_proj", "wte", "wpe"])
    report, ours, theirs = merged_by_both(tmp_path, base, model)
    assert len(report.results) == 5
    assert nearly_the_same_bits(ours, theirs, base.state_dict()) == {result.weight for result in report.results}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"wpe": 2}}])
def test_lora_on_embeddings_equals_pefts_bit_for_bit(tmp_path, config):
    torch.manual_seed(0)
    base = tiny_bert()
    targets = ["word_embeddings", "position_embeddings", "query"]
    model = trained(base, sixty_fourths, r=4, lora_alpha=8, target_modules=targets, **config)
    report, ours, theirs = merged_by_both(tmp_path, base, model)
    assert same_bits(ours, theirs)
    words = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(ours[words], base.state_dict()[words])
    assert {words, "bert.embeddings.position_embeddings.weight"} < {result.weight for result in report.results}


@pytest.mark.parametrize("config", [{}, {"lora_bias": True, "target_modules": ["one", "two", "three"]}])
def test_lora_on_convolutions_equals_pefts_bit_for_bit(tmp_path, config):
    torch.manual_seed(0)
    net = Convolutions()
    config = {"target_modules": ["one", "two", "three", "point"], **config}
    report, ours, theirs = merged_by_both(tmp_path, net, trained(net, sixty_fourths, r=4, lora_alpha=8, **config))
    assert same_bits(ours, theirs)
    weights = {f"{name}.weight" for name in config["target_modules"]}
    assert weights == {result.weight for result in report.results if result.weight.endswith("weight")}
    assert all(result.changed > 0.9 * result.elements for result in report.results)


def test_dora_on_convolutions_equals_pefts(tmp_path):
    torch.manual_seed(0)
    net, names = Convolutions(), ["one", "two", "three", "point"]
    _, ours, theirs = merged_by_both(tmp_path, net, dora(net, r=4, target_modules=names))
    assert nearly_the_same_bits(ours, theirs, net.state_dict()) == {f"{name}.weight" for name in names}


def test_packed_attention_equals_pefts_except_its_doubled_output(tmp_path):
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "qkv": nn.Linear(4, 12)})
    model = trained(net, sixty_fourths, r=2, lora_alpha=4, target_modules=["attn", "qkv"], bias="lora_only")
    _, ours, theirs = merged_by_both(tmp_path, net, model, layout={"attn.out_proj": "out_in"})
    out, before = "attn.out_proj.weight", net.state_dict()
    assert same_bits({k: v for k, v in ours.items() if k != out}, {k: v for k, v in theirs.items() if k != out})
    once = (theirs[out] - before[out]) / 2
    torch.testing.assert_close(ours[out], before[out] + once, rtol=1e-6, atol=1e-6)
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed == {"attn.in_proj_weight", out, "attn.out_proj.bias", "qkv.weight", "qkv.bias"}


def test_a_headless_base_and_a_head_become_a_loadable_classifier(tmp_path):
    # The adapter's names carry `bert.`, the base's file does not, and has no head at all.
    full = tiny_bert()
    full.bert.save_pretrained(tmp_path / "base")
    (tmp_path / "base/vocab.txt").write_text("[PAD]\n")
    model = trained(full, sixty_fourths, r=4, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    report = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (len(report.results), report.replaced) == (2, 2)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    theirs = model.merge_and_unload()
    assert same_bits(loaded.state_dict(), theirs.state_dict())
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, theirs.eval()(tokens).logits)
    assert (tmp_path / "out/vocab.txt").read_text() == "[PAD]\n"


def test_a_base_with_the_prefix_and_the_head_keeps_its_names(tmp_path):
    full = tiny_bert()
    model = trained(full, sixty_fourths, r=4, target_modules=["query"], task_type="SEQ_CLS")
    theirs = merged_by_both(tmp_path, full, model).theirs
    assert same_bits(load_tensors(tmp_path / "out/model.safetensors"), theirs)


@pytest.fixture(scope="module")
def tied() -> LlamaForCausalLM:
    return tiny_llama(tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("config", "still_tied"),
    [
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
)
def test_embeddings_are_untied_where_they_were_trained_apart(tmp_path, tied, config, still_tied):
    _, ours, theirs = merged_by_both(
        tmp_path, tied, trained(tied, sixty_fourths, r=2, target_modules=["q_proj"], **config)
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is still_tied
    assert same_bits(ours, theirs)


def test_a_change_of_tied_input_embeddings_alone_is_refused(tmp_path, tied):
    tied.save_pretrained(tmp_path / "base")
    model = trained(tied, sixty_fourths, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputRefused, match=r'model\.embed_tokens\.weight is the output embeddings too .*tied="untie"'):
        merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"], "vocab_size": 2},
        {"architectures": ["BertModel"], "vocab_size": 2},
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 3},
    ],
)
def test_untied_embeddings_may_be_replaced(tmp_path, config):
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"embed_tokens.weight": [[1, 2], [3, 4]]})
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    whole = peft_adapter(tmp_path / "adapter", {}, {"embed_tokens.weight": np.ones((2, 2), np.float32)})
    merged(tmp_path / "base", whole, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["embed_tokens.weight"].tolist() == [[1, 1], [1, 1]]
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_a_pair_on_tied_embeddings_is_refused(tmp_path, tied):
    tied.save_pretrained(tmp_path / "base")
    model = trained(tied, sixty_fourths, r=2, target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InputRefused, match=r"model\.embed_tokens\.weight is the output embeddings too"):
        merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_a_pair_is_added_to_the_embedding_saved_with_it(tmp_path, tied, config):
    base = copy.deepcopy(tied)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.model.embed_tokens.weight *= 2  # another base: PEFT takes the rows that were saved
    model = trained(base, sixty_fourths, r=2, target_modules=["embed_tokens"], **config)
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(
        tmp_path / "adapter/adapter_model.safetensors"
    )
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = model.merge_and_unload().state_dict()
    if config:
        assert nearly_the_same_bits(loaded, theirs, base.state_dict()) == {"model.embed_tokens.weight"}
    else:
        assert same_bits(loaded, theirs)


def test_a_base_in_fp64_is_summed_in_fp64(tmp_path):
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[2**40, 1e200]]}, np.float64)
    adapter = peft_adapter(tmp_path / "adapter", {"fc": ([[2**-10, 0]], [[1]])})
    merged(tmp_path / "base.safetensors", adapter, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")["fc.weight"]
    assert (stored.tolist(), stored.dtype) == ([[2**40 + 2**-10, 1e200]], np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_of_tokens_equal_pefts(tmp_path, monkeypatch, tied, is_tied, dtype):
    base = copy.deepcopy(tied).to(dtype)
    if not is_tied:
        base.config.tie_word_embeddings = False
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    indices = [7, 19, 0] if is_tied else {"embed_tokens": [7, 19, 0], "lm_head": [3]}
    model = trained(base, sixty_fourths, r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    monkeypatch.setattr(block_copy, "BLOCK", 100)  # three rows
    report, ours, theirs = merged_by_both(tmp_path, base, model)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is is_tied
    assert same_bits(ours, theirs)
    before = base.state_dict()
    changed = {k: (v != before[k]).any(1).nonzero().ravel().tolist() for k, v in ours.items() if v.ndim > 1}
    assert changed["model.embed_tokens.weight"] == [0, 7, 19]
    assert changed["lm_head.weight"] == ([0, 7, 19] if is_tied else [3])
    assert report.replaced == (1 if is_tied else 2)


@pytest.mark.parametrize("tables", [{"embed_tokens": [7, 2], "lm_head": [7, 2]}, {"lm_head": [7, 2]}])
def test_rows_of_tied_tables_are_one_set_of_rows(tmp_path, tied, tables):
    """PEFT saves them once, under the name of one of the tables."""
    tied.save_pretrained(tmp_path / "base")
    model = trained(tied, sixty_fourths, r=2, target_modules=["q_proj"], trainable_token_indices=tables)
    model.save_pretrained(tmp_path / "adapter")
    if "embed_tokens" not in tables:
        with pytest.raises(MatchError, match=r"the base has no lm_head\.weight, of which the adapter replaces rows"):
            merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(loaded.state_dict(), model.merge_and_unload().state_dict())
    apart = copy.deepcopy(tied)
    apart.config.tie_word_embeddings = False
    apart.lm_head.weight = nn.Parameter(torch.zeros(20, 8))
    apart.save_pretrained(tmp_path / "apart")
    merged(tmp_path / "apart", tmp_path / "adapter", tmp_path / "both")
    stored = load_file(tmp_path / "both/model.safetensors")
    rows = stored["model.embed_tokens.weight"][[7, 2]]
    assert np.array_equal(stored["lm_head.weight"][[7, 2]], rows) and rows.any()
    assert not np.delete(stored["lm_head.weight"], [7, 2], axis=0).any()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("save", [True, False])
def test_one_pair_of_tied_tables_is_added_once(tmp_path, tied, targets, save):
    """`ensure_weight_tying`: PEFT's attached model adds it once to each table, its merge twice to the one tensor."""
    tied.save_pretrained(tmp_path / "base")
    model = trained(tied, sixty_fourths, r=2, target_modules=targets, ensure_weight_tying=True)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    table = model.base_model.model.model.embed_tokens
    before, delta = tied.model.embed_tokens.weight, table.get_delta_weight("default")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded.lm_head.weight, before + delta) and delta.abs().max() > 0.1
    ids = torch.tensor([[1, 5, 7, 19]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    assert any("adds its change twice when it merges" in note for note in formats.load(tmp_path / "adapter").notes)


def test_one_pair_of_tied_tables_has_the_scale_of_each_rank(tmp_path, tied):
    """PEFT divides the head's alpha by the rank that the config states for the head, whatever that of the pair is."""
    tied.save_pretrained(tmp_path / "base")
    of_table = {"rank_pattern": {"embed_tokens": 3}, "ensure_weight_tying": True}
    model = trained(tied, sixty_fourths, r=2, target_modules=["q_proj", "embed_tokens"], **of_table)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied="untie")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 5, 7, 19]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    add_tensors(tmp_path / "adapter", {"base_model.model.lm_head.lora_A.weight": np.ones((3, 8), np.float32)})
    with pytest.raises(InputRefused, match=r"lm_head: A \(3, 8\) and B \(20, 3\) disagree with the config's rank 2"):
        formats.load(tmp_path / "adapter")


def test_a_pair_that_repeats_no_other_is_not_dropped(tmp_path, tied):
    tied.save_pretrained(tmp_path / "base")
    model = trained(tied, sixty_fourths, r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    add_tensors(tmp_path / "adapter", {"base_model.model.lm_head.lora_A.weight": np.ones((2, 8), np.float32)})
    with pytest.raises(MatchError, match="the base has no weight for lm_head"):
        merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_rows_beyond_the_dtype_of_the_base_are_refused(tmp_path):
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[1]], "emb.weight": [[1], [2]]}, np.float16)
    adapter = peft_adapter(tmp_path / "adapter", {"fc": ([[1]], [[1]])}, trainable_token_indices=[1])
    add_tensors(adapter, {"base_model.model.emb.token_adapter.trainable_tokens_delta": np.array([[1e5]], np.float32)})
    with pytest.raises(InputRefused, match=r"^emb\.weight: 1 value would exceed 65504"):
        merged(tmp_path / "base.safetensors", adapter, tmp_path / "out")


def test_a_pair_on_one_of_two_equal_tables_unties_them(tmp_path):
    # The adapter replaces both tables by equal ones and has a pair for one: the results differ.
    (tmp_path / "base").mkdir()
    words = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    base_file(tmp_path / "base/model.safetensors", {"embed_tokens.weight": words})
    config = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "vocab_size": 3}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    adapter = peft_adapter(tmp_path / "adapter", {}, {"embed_tokens.base_layer.weight": words, "lm_head.weight": words})
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.embed_tokens.lora_embedding_A"] = np.array([[0, 0, 1]], np.float32)
    tensors["base_model.model.embed_tokens.lora_embedding_B"] = np.array([[10], [20]], np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    merged(tmp_path / "base", adapter, tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours["embed_tokens.weight"].tolist() == [[1, 2], [3, 4], [15, 26]]
    assert ours["lm_head.weight"].tolist() == words.tolist()
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_pair_on_an_fp64_replacement_is_summed_in_fp64(tmp_path, monkeypatch):
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.ones((30, 20))})
    replaced = 1 + np.arange(600).reshape(30, 20) * 2.0**-40
    pairs = {"fc": (np.full((1, 20), 2.0**-20), np.ones((30, 1)))}
    adapter = peft_adapter(tmp_path / "adapter", pairs, {"fc.weight": replaced})
    monkeypatch.setattr(block_copy, "BLOCK", 256)
    merged(tmp_path / "base.safetensors", adapter, tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")["fc.weight"]
    assert ours.tolist() == (replaced + 2.0**-20).astype(np.float32).tolist()


def test_two_adapters_are_summed_before_the_one_rounding(tmp_path):
    # Around 256 bf16 has every second number: 256 + 1 + 1 is 258, but one after the other 256 + 1 is 256.
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[256]]}, BF16)
    adapters = [peft_adapter(tmp_path / name, {"fc": ([[1]], [[number]])}) for name, number in (("a", 1), ("b", 2))]
    merged(tmp_path / "base.safetensors", adapters, tmp_path / "out", strengths=(1, 0.5))
    assert load_file(tmp_path / "out/model.safetensors")["fc.weight"].tolist() == [[258]]


# --- By hand ---

W = np.arange(12).reshape(4, 3)
A, B = [[1, 2, 3], [0, 1, 0]], [[1, 0], [0, 1], [1, 1], [2, 0]]
BA = np.array([[1, 2, 3], [0, 1, 0], [1, 3, 3], [2, 4, 6]])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards, with other files as in such folders. `fc` changes, the rest stays."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = [
        {"first": np.array([1, 2, 3], np.int64), "fc.weight": W.astype(np.float32), "norm": np.ones(3, np.float16)},
        {"last.weight": np.array([[np.nan, 1]], np.float32), "mask": np.array([True])},
    ]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, shard in zip(names, tensors, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt", "made by": name})
    index = {"metadata": {"total_size": 97}, "weight_map": {key: names[n] for n in (0, 1) for key in tensors[n]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama",  "torch_dtype": "float32"}')
    (folder / "sub").mkdir()
    (folder / "sub/tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("other weights")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return peft_adapter(tmp_path / "adapter", {"fc": (A, B)})


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def stored_bytes(folder: Path, name: str) -> bytes:
    shard = next(shard for shard in open_checkpoint(folder).shards.values() if name in shard.entries)
    return shard.read(name).tobytes()


def test_unchanged_tensors_keep_their_bytes_and_shards(tmp_path, sharded, adapter):
    report = merged(sharded, adapter, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after["fc.weight"].tolist() == (W + BA).tolist()
    kept = ("first", "norm", "last.weight", "mask")
    assert all(stored_bytes(tmp_path / "out", name) == stored_bytes(sharded, name) for name in kept)
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "sub",
        "sub/tokenizer.json",
        MANIFEST,
    }
    assert (tmp_path / "out/config.json").read_bytes() == (sharded / "config.json").read_bytes()
    assert [result.weight for result in report.results] == ["fc.weight"]
    assert report.copied == 3 * 8 + 3 * 2 + 2 * 4 + 1
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_the_index_of_the_output_describes_its_shards(tmp_path, sharded, adapter):
    merged(sharded, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == 3 * 8 + 12 * 4 + 3 * 2 + 2 * 4 + 1


def test_each_shard_keeps_its_metadata(tmp_path, sharded, adapter):
    merged(sharded, adapter, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt", "made by": path.name}


@pytest.mark.usefixtures("by_numpy")
@pytest.mark.parametrize("hashing", ["xxh3_128", "sha256"])
def test_the_manifest_records_base_adapters_settings_and_files(tmp_path, sharded, adapter, hashing):
    def facts(path: Path) -> dict[str, str]:
        weights = path.suffix == ".safetensors"
        return {hashing: ALGORITHMS[hashing](path.read_bytes()).hexdigest()} if weights else sha256(path)

    def sha256(path: Path) -> dict[str, str]:
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    merged(sharded, adapter, tmp_path / "out", strengths=(2,), min_retention=0.25, hashing=hashing)
    manifest = read_manifest(tmp_path / "out")
    (recorded,) = manifest["adapters"]
    assert (recorded["name"], recorded["format"], recorded["weight"]) == ("adapter", "peft", 2)
    assert (recorded["sha256"], len(recorded["ranks"])) == (formats.load(adapter).sha256, 1)
    assert manifest["base"] == {path.name: facts(path) for path in sharded.glob("*.safetensors")}
    assert manifest["settings"] == {"dtype": "keep", "min_retention": 0.25}
    for name, recorded in manifest["files"].items():
        path = tmp_path / "out" / name
        assert recorded == {"bytes": path.stat().st_size, **facts(path)}
    assert "config.json" in manifest["files"] and len(manifest["files"]) == 5


def test_an_added_head_is_stored_in_the_last_shard_in_its_dtype(tmp_path, sharded):
    head = peft_adapter(tmp_path / "head", {"model.fc": (A, B)}, {"score.weight": np.ones((2, 3), np.float16)})
    report = merged(sharded, head, tmp_path / "out")
    assert report.replaced == 1
    after = load_file(tmp_path / "out/model-00002-of-00002.safetensors")
    assert after.keys() == {"model.last.weight", "model.mask", "score.weight"}
    assert after["score.weight"].dtype == np.float16 and after["score.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"
    assert index["weight_map"]["model.fc.weight"] == "model-00001-of-00002.safetensors"


def test_a_replacement_is_stored_in_the_dtype_of_the_base(tmp_path):
    base_file(tmp_path / "base.safetensors", {"head.weight": [[1, 2]], "fc.weight": W}, BF16)
    whole = peft_adapter(tmp_path / "adapter", {"fc": (A, B)}, {"head.weight": np.array([[3, 257]], np.float32)})
    merged(tmp_path / "base.safetensors", whole, tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")["head.weight"]
    assert after.dtype == BF16 and after.astype(float).tolist() == [[3, 256]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_conversion_converts_float_tensors_only(tmp_path, sharded, adapter, dtype):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    rest = {"last.weight": np.array([[257, 1]], np.float32), "mask": np.array([True]), "wide": np.array([1.5])}
    save_file(
        rest | {"empty": np.zeros((2, 0), np.float32), "scalar": np.array(2.5, np.float32)},
        sharded / "rest.safetensors",
    )
    index = dict.fromkeys(("first", "fc.weight", "norm"), "model-00001-of-00002.safetensors")
    index |= dict.fromkeys([*rest, "empty", "scalar"], "rest.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    report = merged(sharded, adapter, tmp_path / "out", dtype=dtype)
    before, after = tensors_of(sharded), tensors_of(tmp_path / "out")
    assert {name: str(tensor.dtype) for name, tensor in after.items()} == {
        name: dtype if name not in ("first", "mask") else str(tensor.dtype) for name, tensor in before.items()
    }
    assert after["fc.weight"].astype(float).tolist() == (W + BA).tolist()
    assert after["last.weight"].astype(float).tolist() == [[256 if dtype == "bfloat16" else 257, 1]]
    assert after["wide"].astype(float).tolist() == [1.5] and after["scalar"].astype(float) == 2.5
    assert after["empty"].shape == (2, 0) and after["first"].tolist() == [1, 2, 3]
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "llama", "dtype": dtype}
    assert report.copied == 3 * 8 + 1 + {"float32": 2 * 4 + 4, "float16": 3 * 2}.get(dtype, 0)


def test_output_size_is_known_before_the_merge(tmp_path, sharded, adapter):
    checkpoint = open_checkpoint(sharded)
    laid = plan.make([formats.load(adapter)], checkpoint.specs)
    assert merge.output_size(laid, checkpoint) == 3 * 8 + 12 * 4 + 3 * 2 + 2 * 4 + 1
    assert merge.output_size(laid, checkpoint, "bfloat16") == 3 * 8 + 12 * 2 + 3 * 2 + 2 * 2 + 1


def test_progress_counts_every_byte(tmp_path, sharded, adapter):
    written: list[int] = []
    report = merged(sharded, adapter, tmp_path / "out", progress=written.append)
    assert sum(written) == report.bytes
    assert 0 < report.seconds < 60


def test_a_bare_file_contains_its_record(tmp_path, adapter):
    base_file(tmp_path / "base.safetensors", {"fc.weight": W})
    merged(tmp_path / "base.safetensors", adapter, tmp_path / "out", file_name="mine.safetensors")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.safetensors"]
    with safe_open(tmp_path / "out/mine.safetensors", framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
        record = json.loads(file.metadata()["lora_export"])
    digest = ALGORITHMS["xxh3_128"]((tmp_path / "base.safetensors").read_bytes()).hexdigest()
    assert record["base"] == {"base.safetensors": {"xxh3_128": digest}}
    assert [merged["name"] for merged in record["adapters"]] == ["adapter"]


def test_symbolic_links_of_a_cache_become_files(tmp_path, sharded, adapter):
    blobs = tmp_path / "blobs"
    sharded.rename(blobs)
    for path in blobs.iterdir():
        if path.is_file():
            sharded.mkdir(exist_ok=True)
            (sharded / path.name).symlink_to(path)
    merged(sharded, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert tensors_of(tmp_path / "out")["fc.weight"].tolist() == (W + BA).tolist()
    assert tensors_of(blobs)["fc.weight"].tolist() == W.tolist()


LONG = {"fc": ([[1, 2, 0]], [[1], [0]])}
WITH_LENGTHS = {"base_model.model.fc.lora_magnitude_vector": np.array([10, 20], np.float32)}


def dora_by_hand(folder: Path, pairs: Any = None, lengths: Any = None, **config: Any) -> Path:
    """An adapter that makes [[1, 0, 0], [0, 0, 5]] + 2 * [[1, 2, 0], [0, 0, 0]], and its rows 10 and 20 long."""
    peft_adapter(folder, pairs or LONG, use_dora=True, lora_alpha=2, **config)
    return add_tensors(folder, lengths or WITH_LENGTHS)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16])
def test_dora_by_hand(tmp_path, dtype):
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[1, 0, 0], [0, 0, 5]]}, dtype)
    (result,) = merged(tmp_path / "base.safetensors", dora_by_hand(tmp_path / "a"), tmp_path / "out").results
    stored = load_file(tmp_path / "out/model.safetensors")["fc.weight"]
    assert (stored.tolist(), stored.dtype) == ([[6, 8, 0], [0, 0, 20]], dtype)
    # Measured against the change of W with its rescaling, not against sBA: [[5, 8, 0], [0, 0, 15]].
    assert (result.retention, result.noise, result.changed, result.elements) == (1, 0, 3, 6)
    assert result.relative_change == pytest.approx(math.sqrt((25 + 64 + 225) / 26))


def test_retention_of_dora_is_measured_on_the_rescaled_weight(tmp_path):
    # In bf16 255 has its neighbours 1 away and 256 the next one 2: 255.5 and 257.5 become 256 and 258.
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[255, 0], [0, 256]]}, BF16)
    lengths = {"base_model.model.fc.lora_magnitude_vector": np.array([255.5, 257.5], np.float32)}
    pairs = {"fc": ([[0, 0]], [[1], [1]])}
    (result,) = merged(
        tmp_path / "base.safetensors", dora_by_hand(tmp_path / "a", pairs, lengths), tmp_path / "out"
    ).results
    assert load_file(tmp_path / "out/model.safetensors")["fc.weight"].tolist() == [[256, 0], [0, 258]]
    assert result.retention == pytest.approx((0.5 * 1 + 1.5 * 2) / (0.25 + 2.25))
    assert result.noise == pytest.approx(math.sqrt((0.25 + 0.25) / (0.25 + 2.25)))


# --- In blocks, and by other ways of copying ---


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("embedding", [False, True])
def test_dora_in_blocks_equals_the_whole_and_reads_at_most_twice(tmp_path, monkeypatch, embedding, threads):
    rng = np.random.default_rng(0)
    base = base_file(tmp_path / "base.safetensors", {"kept": np.ones(3), "fc.weight": rng.standard_normal((20, 12))})
    exact = rng.integers(-63, 64, (2, 4, 20)) / 64
    out, into = (12, 20) if embedding else (20, 12)
    a, b = exact[0][:, :into], exact[1].T[:out]
    lengths = {"base_model.model.fc.lora_magnitude_vector": rng.uniform(1, 2, out).astype(np.float32)}
    adapter = dora_by_hand(tmp_path / "adapter", {"fc": (a, b)}, lengths)
    if embedding:
        stored = load_file(adapter / "adapter_model.safetensors")
        renamed = {re.sub(r"lora_([AB])\.weight", r"lora_embedding_\1", name): stored[name] for name in stored}
        save_file(renamed, adapter / "adapter_model.safetensors")
    whole = merged(base, adapter, tmp_path / "whole")
    reads: list[tuple[int, int]] = []
    read = block_copy.read
    monkeypatch.setattr(block_copy, "read", lambda *args: (reads.append((args[3], args[2].size)), read(*args)))
    monkeypatch.setattr(block_copy, "default_threads", lambda: threads)
    monkeypatch.setattr(block_copy, "BLOCK", 150)
    parts = merged(base, adapter, tmp_path / "parts")
    shards = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    assert whole.results[0].changed == parts.results[0].changed == 240
    entry = safetensors_file.open_file(base).entries["fc.weight"]
    sizes = sorted(size for start, size in reads if entry.start <= start < entry.stop)
    assert sum(sizes) == (2 if embedding else 1) * entry.nbytes and max(sizes) <= 150
    pair, weight = formats.load(adapter).pairs["fc"], load_file(base)["fc.weight"].astype(np.float64)
    total = weight.T + pair.scale * (b @ a) if embedding else weight + pair.scale * (b @ a)
    expected = total * (pair.magnitude / np.linalg.norm(total, axis=1))[:, None]
    ours = load_file(shards[1])["fc.weight"]
    np.testing.assert_allclose(ours.T if embedding else ours, expected, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize(("model_type", "block"), [("llama", 1), ("gpt2", 1), ("llama", 256), ("gpt2", 100)])
def test_blocks_of_rows_give_the_same_bits_as_the_whole(tmp_path, monkeypatch, model_type, block):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": model_type}))
    rng = np.random.default_rng(0)
    tensors = {"c_fc.weight": rng.standard_normal((20, 20)), "bias": rng.standard_normal(1000), "one": np.array(3.0)}
    base_file(tmp_path / "base/model.safetensors", tensors)
    exact = rng.integers(-63, 64, (2, 4, 20)) / 64
    adapter = peft_adapter(tmp_path / "adapter", {"c_fc": (exact[0], exact[1].T)})
    whole = merged(tmp_path / "base", adapter, tmp_path / "whole", dtype="bfloat16")
    monkeypatch.setattr(block_copy, "BLOCK", block)
    parts = merged(tmp_path / "base", adapter, tmp_path / "parts", dtype="bfloat16")
    shards = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    (one,), (other,) = whole.results, parts.results
    assert (one.changed, one.elements) == (other.changed, other.elements)
    assert one.retention == pytest.approx(other.retention, rel=1e-6)


@pytest.mark.usefixtures("by_numpy")
def test_one_block_of_rows_is_summed_at_a_time(tmp_path, monkeypatch):
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.ones((20, 20))}, BF16)
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (np.ones((1, 20)), np.ones((20, 1)))})
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(sums, "add_into", lambda *arrays: (shapes.append(arrays[1].shape), add_into(*arrays)))
    monkeypatch.setattr(block_copy, "BLOCK", 256)  # three rows of 20 in fp32
    merged(tmp_path / "base.safetensors", adapter, tmp_path / "out")
    assert sorted(shapes) == [(2, 20), *[(3, 20)] * 6]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_change_the_output(tmp_path, monkeypatch, sharded, adapter, threads):
    merged(sharded, adapter, tmp_path / "out")
    monkeypatch.setattr(block_copy, "default_threads", lambda: threads)
    monkeypatch.setattr(block_copy, "BLOCK", 16)
    merged(sharded, adapter, tmp_path / "other")
    assert read_manifest(tmp_path / "out") == read_manifest(tmp_path / "other")


@pytest.mark.usefixtures("by_numpy")
def test_blas_computes_in_the_calling_thread(tmp_path, monkeypatch, sharded, adapter):
    # Each of the transfer's threads has a core already; pools of its own would only get in each other's way.
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    inside: list[set[int]] = []
    monkeypatch.setattr(sums, "add_into", lambda *arrays: (inside.append(threads()), add_into(*arrays)))
    with threadpool_limits(2, user_api="blas"):
        merged(sharded, adapter, tmp_path / "out")
        assert inside == [{1}] and threads() == {2}


@pytest.mark.parametrize("strange", [{}, {"odd": "x" * 1000}])
def test_unchanged_tensors_keep_their_offset_within_a_page(tmp_path, adapter, strange):
    kept = np.arange(5000, dtype=np.float32)
    base_file(tmp_path / "base.safetensors", {"fc.weight": W, "kept": kept}, np.float32, strange)
    merged(tmp_path / "base.safetensors", adapter, tmp_path / "out")
    both = [
        safetensors_file.open_file(path) for path in (tmp_path / "base.safetensors", tmp_path / "out/model.safetensors")
    ]
    starts = [file.entries["kept"].start for file in both]
    assert starts[0] != starts[1] and starts[0] % 4096 == starts[1] % 4096
    assert both[1].read("kept").tolist() == kept.tolist()


def test_a_partial_write_is_continued(tmp_path, monkeypatch, sharded, adapter):
    merged(sharded, adapter, tmp_path / "whole")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:7], position))
    merged(sharded, adapter, tmp_path / "parts")
    assert read_manifest(tmp_path / "parts") == read_manifest(tmp_path / "whole")


# --- The report ---


def test_results_equal_what_numpy_finds_in_the_files(tmp_path):
    rng = np.random.default_rng(0)
    weight = (0.02 * rng.standard_normal((64, 48))).astype(BF16)
    a, b = 0.02 * rng.standard_normal((4, 48)), 0.0005 * rng.standard_normal((64, 4))
    base_file(tmp_path / "base.safetensors", {"fc.weight": weight}, BF16)
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (a, b)}, lora_alpha=2)
    (result,) = merged(tmp_path / "base.safetensors", adapter, tmp_path / "out", min_retention=0).results
    before = weight.astype(np.float64)
    after = load_file(tmp_path / "out/model.safetensors")["fc.weight"].astype(np.float64)
    change = 0.5 * b.astype(np.float32).astype(np.float64) @ a.astype(np.float32).astype(np.float64)
    kept = after - before
    assert 0.1 < result.retention < 0.95 and result.noise > 0.1  # else this test would show nothing
    assert result.relative_change == pytest.approx(np.linalg.norm(change) / np.linalg.norm(before), rel=1e-5)
    assert result.retention == pytest.approx((kept * change).sum() / (change**2).sum(), rel=1e-5)
    assert result.noise == pytest.approx(np.linalg.norm(kept - change) / np.linalg.norm(change), rel=1e-5)
    assert (result.changed, result.elements) == (np.count_nonzero(kept), weight.size)


def uneven(tmp_path: Path, rows: slice) -> tuple[Path, Path]:
    """A bf16 base of 40 rows, of which an adapter changes these, and by so little that much of it is lost."""
    rng = np.random.default_rng(0)
    b = np.zeros((40, 1))
    b[rows] = 1 / 8
    base_file(tmp_path / "base.safetensors", {"fc.weight": 1 + rng.random((40, 50)) / 2}, BF16)
    return tmp_path / "base.safetensors", peft_adapter(tmp_path / "adapter", {"fc": (0.036 * rng.random((1, 50)), b)})


@pytest.mark.parametrize(
    ("rows", "measured"),
    [
        (slice(None), 10 * 50),  # two of eight blocks of five rows
        (slice(5, 20), 40 * 50),  # nothing of it in the sample
        (slice(3, 20), 40 * 50),  # too little of it
    ],
)
def test_a_large_weight_is_measured_by_a_representative_sample(tmp_path, monkeypatch, rows, measured):
    base, adapter = uneven(tmp_path, rows)
    (whole,) = merged(base, adapter, tmp_path / "whole", min_retention=0).results
    monkeypatch.setattr(tensor_blocks, "LEAST_MEASURED", 500)
    monkeypatch.setattr(block_copy, "BLOCK", 5 * 50 * 4)
    (result,) = merged(base, adapter, tmp_path / "out", min_retention=0).results
    assert 0.1 < whole.retention < 0.9 and whole.noise > 0.1
    assert result.elements == measured
    assert result.retention == pytest.approx(whole.retention, rel=0.2 if measured < 2000 else 1e-6)
    assert result.noise == pytest.approx(whole.noise, rel=0.2 if measured < 2000 else 1e-6)


def test_a_change_by_dora_is_measured_in_every_row(tmp_path, monkeypatch):
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.eye(40, 50)})
    lengths = {"base_model.model.fc.lora_magnitude_vector": np.linspace(1, 2, 40, dtype=np.float32)}
    adapter = dora_by_hand(tmp_path / "adapter", {"fc": (np.zeros((1, 50)), np.ones((40, 1)))}, lengths)
    monkeypatch.setattr(tensor_blocks, "LEAST_MEASURED", 500)
    monkeypatch.setattr(block_copy, "BLOCK", 5 * 50 * 4)
    (result,) = merged(tmp_path / "base.safetensors", adapter, tmp_path / "out").results
    assert (result.elements, result.changed, result.retention) == (2000, 39, 1)


def below_rounding(tmp_path: Path, size: float) -> tuple[Path, Path]:
    """A bf16 base and an adapter whose change is less than half a step of bf16 for size 1/512 and less."""
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[1, 1]], "ok.weight": [[1, 1]]}, BF16)
    pairs = {"fc": ([[size, size]], [[1]]), "ok": ([[1, 1]], [[1]])}
    return tmp_path / "base.safetensors", peft_adapter(tmp_path / "adapter", pairs)


def test_a_change_below_rounding_is_refused(tmp_path):
    base, adapter = below_rounding(tmp_path, 1 / 1024)
    with pytest.raises(InputRefused) as refused:
        merged(base, adapter, tmp_path / "out")
    assert str(refused.value).splitlines() == [
        "1 of 2 weights would lose most of their change to rounding (min_retention=0.5):",
        "  fc.weight: 0.0% of the change kept, noise 100%",
        'Store the result with dtype="float32", or keep the adapter beside the weights (export_onnx(lora="nodes")). '
        'calibration="TEXTS" rounds it to its type with feedback',
    ]


def test_the_remedies_for_a_change_below_rounding_work(tmp_path):
    base, adapter = below_rounding(tmp_path, 1 / 1024)
    report = merged(base, adapter, tmp_path / "knowingly", min_retention=0)
    assert [result.weight for result in report.below_rounding] == ["fc.weight"]
    report = merged(base, adapter, tmp_path / "wide", dtype="float32")
    assert not report.below_rounding
    assert load_file(tmp_path / "wide/model.safetensors")["fc.weight"].tolist() == [[1 + 1 / 1024] * 2]


# --- What is refused ---


def test_a_sum_beyond_the_dtype_is_refused(tmp_path):
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[60000, 1]]}, np.float16)
    adapter = peft_adapter(tmp_path / "adapter", {"fc": ([[10000, 1]], [[1]])})
    with pytest.raises(InputRefused, match=r"fc\.weight: 1 value would exceed 65504, the largest float16\. Check"):
        merged(tmp_path / "base.safetensors", adapter, tmp_path / "out")
    merged(tmp_path / "base.safetensors", adapter, tmp_path / "wide", dtype="float32")
    assert load_file(tmp_path / "wide/model.safetensors")["fc.weight"].tolist() == [[70000, 2]]


@pytest.mark.parametrize(("kept", "replaced", "culprit"), [(70000, 1, "other"), (1, 1e5, r"head\.weight")])
def test_a_conversion_that_overflows_is_refused(tmp_path, kept, replaced, culprit):
    base_file(tmp_path / "base.safetensors", {"fc.weight": W, "other": [kept]})
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (A, B)}, {"head.weight": np.array([replaced], np.float32)})
    with pytest.raises(InputRefused, match=rf"{culprit}: 1 value would exceed 65504"):
        merged(tmp_path / "base.safetensors", adapter, tmp_path / "out", dtype="float16")


@pytest.mark.filterwarnings("error")
def test_numpy_warnings_are_suppressed(tmp_path, adapter):
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.full((4, 3), 3e38)})
    for dtype in ("float16", "bfloat16", "keep"):
        with pytest.raises(InputRefused):
            merged(
                tmp_path / "base.safetensors",
                peft_adapter(tmp_path / "huge", {"fc": (A, B)}, lora_alpha=1e38),
                tmp_path / dtype,
                dtype=None if dtype == "keep" else dtype,
            )


@pytest.mark.parametrize("bare", [True, False])
def test_a_second_merge_of_the_same_adapter_is_refused(tmp_path, adapter, bare):
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"fc.weight": W})
    once = tmp_path / "once/model.safetensors" if bare else tmp_path / "once"
    merged(tmp_path / "base/model.safetensors" if bare else tmp_path / "base", adapter, tmp_path / "once")
    with pytest.raises(InputRefused) as refused:
        merged(once, adapter.rename(tmp_path / "renamed"), tmp_path / "twice")
    assert re.fullmatch(
        rf"{once} already contains the adapter renamed \(merged as adapter, sha256 [0-9a-f]{{12}}\)\. "
        "Merge into the original base instead",
        str(refused.value),
    )
    other = peft_adapter(tmp_path / "other", {"fc": (A, B)}, lora_alpha=4)
    merged(once, other, tmp_path / "both")
    both = tmp_path / "both/model.safetensors" if bare else tmp_path / "both"
    assert [entry["name"] for entry in open_checkpoint(both).history] == ["adapter", "other"]
    assert tensors_of(tmp_path / "both")["fc.weight"].tolist() == (W + 3 * BA).tolist()
    with pytest.raises(InputRefused, match="already contains the adapter renamed"):
        merged(both, tmp_path / "renamed", tmp_path / "thrice")


def test_adapters_without_a_hash_are_not_confused(tmp_path):
    base_file(tmp_path / "model.safetensors", {"fc.weight": W})
    base = tmp_path / "model.safetensors"
    for name in ("one", "two"):  # made in a program, not read from a file
        made = Adapter(name, "by hand", {"fc": LoraPair(a=np.array(A), b=np.array(B), scale=1)})
        checkpoint = open_checkpoint(base)
        (tmp_path / name).mkdir()
        merge_checkpoint(plan.make([made], checkpoint.specs), checkpoint, tmp_path / name)
        base = tmp_path / name / "model.safetensors"
    assert load_file(base)["fc.weight"].tolist() == (W + 2 * BA).tolist()


def test_a_base_touched_during_the_merge_is_refused(tmp_path, sharded, adapter):
    shard = sharded / "model-00001-of-00002.safetensors"
    with pytest.raises(InputRefused, match=f"{shard} changed while it was being merged"):
        merged(sharded, adapter, tmp_path / "out", progress=lambda _: os.utime(shard))


@pytest.mark.parametrize("left", [0.1, 0.9])
def test_a_base_truncated_during_the_merge_is_refused(tmp_path, sharded, adapter, left):
    shard = sharded / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size
    with pytest.raises(InputRefused, match=f"{shard} (changed while|became shorter while)"):
        merged(sharded, adapter, tmp_path / "out", progress=lambda _: os.truncate(shard, int(left * size)))


def test_empty_tensors_leave_the_hash_of_the_base_right(tmp_path):
    """An empty tensor begins a range that is copied; behind it, each byte of the base is hashed once."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    empty, whole = np.zeros((0, 4), np.float32), np.ones((4, 4), np.float32)
    safetensors_file.write(base, {"a": empty, "b": whole, "fc.weight": whole, "y": empty, "z": whole})
    adapter = peft_adapter(tmp_path / "adapter", {"fc": (np.ones((1, 4)), np.ones((4, 1)))})
    merge_files(base, [adapter], out, hashing="sha256")
    record = safetensors_file.open_file(out).metadata[provenance.KEY]
    assert file_sha256(base) in record
    assert np.array_equal(safetensors_file.open_file(out).read("z"), whole)
