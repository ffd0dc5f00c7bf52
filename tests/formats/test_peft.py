"""PEFT's adapters, compared with PEFT itself. What is not supported is refused by name."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export import formats
from lora_export.formats import WriteOptions
from lora_export.formats import peft as reader
from lora_export.formats import peft as writer
from lora_export.formats.adapter_files import by_headers
from lora_export.options.reading import ReadOptions
from support.handmade import peft_adapter
from support.peft_folders import A_KEY, B_KEY, refusal, simple, with_tensors
from support.peft_models import Mlp, agrees, read_back, trained, whole_tensors
from support.tiny_models import tiny_bert, tiny_llama

# --- Real adapters ---


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.mark.parametrize(
    "config",
    [
        {"r": 3, "lora_alpha": 7, "target_modules": ["first", "last"], "use_rslora": True},
        {"lora_alpha": -7, "target_modules": ["first", "last"], "alpha_pattern": {"last": -2}},
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["first", "up", "down", "last"],
            "rank_pattern": {r"blocks\.\d\.up": 3, "first": 4},
            "alpha_pattern": {"blocks.1.up": 5, "irst": 9},  # the second is no module's name
            "use_rslora": True,
        },
    ],
)
@pytest.mark.fault(18)
def test_pairs_and_scales_are_those_that_peft_uses(mlp, tmp_path, config):
    """Every other field: `test_lora_config`."""
    model = trained(mlp, **config)
    adapter = read_back(model, tmp_path)
    assert agrees(adapter, model)
    assert len({pair.scale for pair in adapter.pairs.values()}) > 1 or "rank_pattern" not in config
    assert not adapter.replaced and not adapter.biases and not adapter.notes


def test_low_precision_adapters_are_read_exactly(mlp, tmp_path):
    model = trained(mlp, r=2, target_modules=["first"])
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        rounded = {name: tensor.astype(dtype) for name, tensor in stored.items()}
        save_file(rounded, tmp_path / "adapter_model.safetensors")
        pair = formats.load(tmp_path).pairs["first"]
        assert np.array_equal(pair.a, rounded["base_model.model.first.lora_A.weight"].astype(np.float32))
        assert pair.a.dtype == np.float32


@pytest.mark.parametrize(("bias", "saved"), [("lora_only", ["last"]), ("all", ["first", "last"])])
@pytest.mark.fault(18)
def test_trained_biases_replace_those_of_the_base(mlp, tmp_path, bias, saved):
    model = trained(mlp, r=2, target_modules=["last"], bias=bias)
    adapter = read_back(model, tmp_path)
    merged = model.merge_and_unload().state_dict()
    names = [f"{name}.bias" for name in saved]
    assert agrees(adapter, trained(mlp, r=2, target_modules=["last"], bias=bias))
    if bias == "all":
        names += [f"blocks.{block}.{layer}.bias" for block in range(2) for layer in ("up", "down")]
    assert whole_tensors(adapter) == {name: merged[name].tolist() for name in names}
    assert not adapter.notes  # declared in the config: nothing to wonder about


@pytest.mark.fault(18)
def test_the_bias_of_b_is_added_times_the_scale(mlp, tmp_path):
    model = trained(mlp, r=2, lora_alpha=8, target_modules=["last"], lora_bias=True)
    adapter = read_back(model, tmp_path)
    assert adapter.biases.keys() == {"last"}
    shift = 4 * model.base_model.model.last.lora_B["default"].bias.detach().numpy()
    assert np.array_equal(adapter.biases["last"], shift)
    assert adapter.spelled("last.bias") == "base_model.model.last.lora_B.bias"


@pytest.mark.fault(18)
def test_fully_trained_modules_replace_those_of_the_base(mlp, tmp_path):
    model = trained(mlp, r=2, target_modules=["first"], modules_to_save=["last"])
    adapter = read_back(model, tmp_path)
    merged = model.merge_and_unload().state_dict()
    assert whole_tensors(adapter) == {name: merged[name].tolist() for name in ("last.weight", "last.bias")}
    assert adapter.spelled("last.weight") == "base_model.model.last.weight"
    assert not adapter.notes


def test_a_bert_with_a_trained_head_is_read_whole(tmp_path):
    base = tiny_bert(num_hidden_layers=2)
    model = trained(base, r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapter = read_back(model, tmp_path)
    assert agrees(adapter, model)
    assert "bert.encoder.layer.1.attention.self.value" in adapter.pairs
    merged = model.merge_and_unload().state_dict()
    names = ("classifier.weight", "classifier.bias")  # PEFT adds the head of a classification task by itself
    assert whole_tensors(adapter) == {name: merged[name].tolist() for name in names}
    assert not adapter.notes
    assert adapter.metadata["task_type"] == "SEQ_CLS"
    assert (adapter.metadata["r"], adapter.metadata["lora_alpha"]) == (4, 8)
    assert adapter.metadata["peft_version"] == peft.__version__


class Mixed(nn.Module):
    """A layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.h, self.words = nn.Linear(3, 4), Conv1D(4, 3), nn.Embedding(7, 3, padding_idx=0)
        self.one, self.two, self.three = nn.Conv1d(3, 4, 2), nn.Conv2d(3, 4, (2, 1)), nn.Conv3d(3, 4, 2)


KINDS = {"fc": (4, 3), "h": (4, 3), "words": (3, 7), "one": (4, 3, 2), "two": (4, 3, 2, 1), "three": (4, 3, 2, 2, 2)}


@pytest.mark.parametrize("dora", [False, True])
def test_every_kind_of_layer_is_read_as_peft_means_it(tmp_path, dora):
    model = trained(Mixed(), r=2, lora_alpha=4, target_modules=[*KINDS], rank_pattern={"two": 3}, use_dora=dora)
    adapter = read_back(model, tmp_path)
    assert agrees(adapter, model)
    assert {name: pair.shape for name, pair in adapter.pairs.items()} == KINDS
    assert [name for name, pair in adapter.pairs.items() if pair.embedding] == ["words"]
    assert all((pair.magnitude is not None) is dora for pair in adapter.pairs.values())
    assert adapter.spelled("words") == "base_model.model.words.lora_embedding_A"
    assert not adapter.notes and not adapter.replaced


def test_older_keys_of_doras_magnitudes_are_read_alike(tmp_path):
    model = trained(Mixed(), r=2, target_modules=["fc", "words"], use_dora=True)
    read_back(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for ending in (".weight", ".default", ".default.weight"):
        spelled = {re.sub(r"(?<=magnitude_vector)$", ending, name): tensor for name, tensor in stored.items()}
        if "default" in ending:
            spelled = {re.sub(r"(lora_(embedding_)?[AB])", r"\1.default", name): spelled[name] for name in spelled}
        save_file(spelled, tmp_path / "adapter_model.safetensors")
        assert agrees(formats.load(tmp_path), model)


def test_fused_projections_and_attention_biases_are_read(tmp_path):
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "qkv": nn.Linear(4, 12)})
    model = trained(net, r=2, target_modules=["attn", "qkv"], bias="all")
    adapter = read_back(model, tmp_path)
    shapes = {name: pair.shape for name, pair in adapter.pairs.items()}
    assert shapes == {"attn": (12, 4), "attn.out_proj": (4, 4), "qkv": (12, 4)}
    assert adapter.replaced.keys() == {"attn.out_proj.bias", "qkv.bias"}  # PEFT itself forgets in_proj_bias


def test_the_output_projection_of_packed_attention_is_added_once(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2)

    adapter = read_back(trained(Net(), r=2, target_modules=["attn"]), tmp_path)
    assert {name: pair.shape for name, pair in adapter.pairs.items()} == {"attn": (12, 4), "attn.out_proj": (4, 4)}
    assert len(adapter.notes) == 1
    assert adapter.notes[0].startswith("attn.out_proj: PEFT up to 0.21 adds the output projection's change twice")


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
def test_patterns_of_an_attention_apply_to_its_output_projection(tmp_path: Path) -> None:
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    patterns = {"rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 5, "out_proj": 7}}
    model = trained(net, target_modules=["attn"], r=2, lora_alpha=4, **patterns)
    adapter = read_back(model, tmp_path)
    theirs = model.base_model.model["attn"]
    layers = {"attn": theirs, "attn.out_proj": theirs.base_layer.out_proj}
    assert {name: pair.scale for name, pair in adapter.pairs.items()} == dict.fromkeys(layers, 5 / 3)
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == dict.fromkeys(layers, 5 / 3)
    assert len(adapter.notes) == 1


def test_keys_without_prefix_or_with_adapter_names_are_read_alike(mlp, tmp_path):
    model = trained(mlp, r=2, target_modules=["first"], modules_to_save=["last"])
    adapter = read_back(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    spellings: list[Callable[[str], str]] = [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda name: name.replace("model.last.", "model.last.modules_to_save."),
    ]
    for spelling in spellings:
        save_file({spelling(name): tensor for name, tensor in stored.items()}, tmp_path / "adapter_model.safetensors")
        other = formats.load(tmp_path)
        assert {name: pair.delta().tolist() for name, pair in other.pairs.items()} == {
            name: pair.delta().tolist() for name, pair in adapter.pairs.items()
        }
        assert whole_tensors(other).keys() >= {"last.bias"}


@pytest.mark.parametrize("name", ["default", "second"])
def test_of_several_adapters_in_a_file_the_chosen_one_is_read(mlp, tmp_path, name):
    settings: dict[str, Any] = {"r": 2, "target_modules": ["first"], "modules_to_save": ["last"], "use_dora": True}
    model = trained(mlp, **settings)
    model.add_adapter("second", peft.LoraConfig(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    own = ("lora_", "modules_to_save")
    state = {key: value.clone() for key, value in model.state_dict().items() if any(part in key for part in own)}
    torch.save(state, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    adapter = formats.load(tmp_path, options=ReadOptions(stored_adapter=name, allow_pickle=True))
    first, last = (model.base_model.model.get_submodule(module) for module in ("first", "last"))
    pair = adapter.pairs["first"]
    assert np.array_equal(pair.a, first.lora_A[name].weight.detach()) and pair.magnitude is not None
    assert np.array_equal(pair.b, first.lora_B[name].weight.detach())
    assert np.array_equal(pair.magnitude, first.lora_magnitude_vector[name].weight.detach())
    assert whole_tensors(adapter) == {
        f"last.{what}": value.tolist() for what, value in last.modules_to_save[name].state_dict().items()
    }


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors", "renamed.safetensors"])
@pytest.mark.parametrize("dora", [False, True])
def test_weights_without_a_config_are_read_by_what_is_stated(mlp, tmp_path, file, dora):
    model = trained(mlp, r=2, lora_alpha=6, target_modules=["first", "up"], use_dora=dora)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    if file:
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / file)
    assert agrees(formats.load(tmp_path / file, options=ReadOptions(lora_rank=2, lora_alpha=6)), model)
    assert re.search(
        r'has no adapter_config.json beside it, .* lora_rank="R" lora_alpha="ALPHA"$', refusal(tmp_path / file)
    )
    assert "disagree with the config's rank 3" in refusal(tmp_path / file, lora_rank=3, lora_alpha=6)


def test_shards_are_one_adapter(mlp, tmp_path):
    model = trained(mlp, r=2, target_modules=["first", "up"])
    adapter = read_back(model, tmp_path)
    stored = sorted(load_file(tmp_path / "adapter_model.safetensors").items())
    (tmp_path / "adapter_model.safetensors").unlink()
    parts = [tmp_path / f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for part, tensors in zip(parts, (stored[:3], stored[3:]), strict=True):
        save_file(dict(tensors), part)
    for path in (tmp_path, *parts):
        found = formats.load(path)
        assert agrees(found, model) and found.sha256 != adapter.sha256 and found.name == adapter.name
    save_file(dict(stored), parts[1])
    assert "has tensors that another shard has too:" in refusal(tmp_path)
    parts[1].unlink()
    assert refusal(tmp_path).endswith(f"lacks others:\n  {parts[1].name}")
    parts[0].rename(huge := tmp_path / "adapter_model-1-of-99999.safetensors")
    assert refusal(huge) == "ADAPTER is one of 99999 shards, and an adapter has 1 to 1000"


def test_the_hash_covers_config_and_weights(tmp_path):
    def sha256_of(b: int, alpha: int) -> str:
        return formats.load(peft_adapter(tmp_path, {"fc": ([[1]], [[b]])}, lora_alpha=alpha)).sha256

    assert sha256_of(1, 1) == sha256_of(1, 1)
    assert len({sha256_of(1, 1), sha256_of(1, 2), sha256_of(2, 1)}) == 3


@pytest.mark.parametrize(
    ("indices", "tensors"),
    [
        ([3, 1], ["model.embed_tokens.weight"]),
        ({"embed_tokens": [3, 1], "lm_head": [0, 2, 5]}, ["lm_head.weight", "model.embed_tokens.weight"]),
    ],
)
def test_token_rows_are_read_with_their_indices(tmp_path, indices, tensors):
    model = trained(tiny_llama(), r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    adapter = read_back(model, tmp_path)
    assert sorted(adapter.token_rows) == tensors and not adapter.is_identity
    merged = model.merge_and_unload().state_dict()
    for name, rows in adapter.token_rows.items():
        expected = indices if isinstance(indices, list) else indices[name.split(".")[-2]]
        assert rows.indices.tolist() == expected
        assert rows.values.tolist() == merged[name][expected].tolist()
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert adapter.spelled("model.embed_tokens.weight") == key


@pytest.mark.parametrize("indices", [{"emb": 128, "head": 128}, {"emb": 128}], ids=["both", "one"])
def test_rows_of_two_tables_are_compared_where_headers_are_read(tmp_path, indices):
    rows = np.arange(128 * 128, dtype=np.float32).reshape(128, 128)  # as large as what headers leave out
    indices = {name: [*range(count)] for name, count in indices.items()}
    for name, head in (("tied", rows), ("apart", rows + 1)):
        adapter = with_tensors(
            tmp_path / name, {ROWS: rows, ROWS.replace("emb", "head"): head}, trainable_token_indices=indices
        )
        with by_headers():
            if name == "apart" and "head" not in indices:
                assert "head.weight: the config does not record which rows these are" in refusal(adapter)
            else:
                found = formats.load(adapter).token_rows
                assert len(found) == (1 if name == "tied" else 2)
                assert np.array_equal(found["emb.weight"].values, rows)


# --- Writing ---


def test_peft_loads_what_is_written_and_computes_the_same(mlp, tmp_path):
    model = trained(mlp, r=2, lora_alpha=8, target_modules=["first", "up"], modules_to_save=["last"])
    adapter = read_back(model, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    writer.write(adapter, tmp_path / "ours", WriteOptions())
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path / "ours").eval()
    x = torch.randn(5, 3)
    assert torch.equal(reloaded(x), model(x))
    assert not torch.allclose(reloaded(x), mlp(x), atol=0.1)
    again = formats.load(tmp_path / "ours")
    assert agrees(again, model)
    assert whole_tensors(again) == whole_tensors(adapter)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_every_kind_of_written_layer(tmp_path, dora):
    base = Mixed()
    model = trained(base, r=2, lora_alpha=8, target_modules=[*KINDS], use_dora=dora)
    (tmp_path / "ours").mkdir()
    writer.write(read_back(model, tmp_path / "theirs"), tmp_path / "ours", WriteOptions())
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)  # array_equal compares shapes too
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert agrees(formats.load(tmp_path / "ours"), reloaded) and agrees(formats.load(tmp_path / "theirs"), reloaded)


# --- Refusals ---


MAGNITUDES = "base_model.model.fc.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"base_model.model.fc.lora_B.bias": [np.nan, 1, 2]}, {"lora_bias": True}, "the bias of B holds 1 value that"),
        ({MAGNITUDES: [1, 2, 3]}, {}, "lora_magnitude_vector is present, but the config does not set use_dora"),
        ({}, {"use_dora": True}, "lora_magnitude_vector is missing: PEFT leaves it out where it converts PiSSA"),
        ({MAGNITUDES: [1, 2]}, {"use_dora": True}, "the magnitude is (2,), B (3, 1) needs (3,)"),
        ({MAGNITUDES: [1, np.nan, 3]}, {"use_dora": True}, "MAGNITUDE holds 1 value that is not finite"),
        (
            {MAGNITUDES: [1, 2, 3], A_KEY: np.ones((1, 2, 3)), B_KEY: np.ones((3, 1, 1))},
            {"use_dora": True},
            "the magnitude is (3,), B (3, 1, 1) needs (1, 3, 1)",
        ),
        ({A_KEY: np.ones((1, 2, 3))}, {}, "A (1, 2, 3), B (3, 1): no linear layer, convolution or embedding"),
        (
            {A_KEY: np.ones(0)},
            {},
            "A (0,), B (3, 1): it has no values. DeepSpeed's ZeRO-3 saves those of other processes",
        ),
        (
            {A_KEY: np.ones((1, 2, 1, 1, 1, 1)), B_KEY: np.ones((3, 1, 1, 1, 1, 1))},
            {},
            "no linear layer, convolution or embedding has such shapes",
        ),
        ({A_KEY: np.ones((1, 2, 3)), B_KEY: np.ones((3, 1, 3))}, {}, "B is (3, 1, 3); every dimension after"),
        (
            {A_KEY: None, "base_model.model.fc.lora_embedding_A": [[1, 2]]},
            {},
            "one of lora_A and lora_B is an embedding",
        ),
        ({B_KEY: None, "base_model.model.fc.lora_embedding_B": [[1]]}, {}, "one of lora_A and lora_B is an embedding"),
        (
            {A_KEY: np.ones((1, 2, 3)), B_KEY: np.ones((3, 1, 1))},
            {"alora_invocation_tokens": [1]},
            "an activated LoRA (alora_invocation_tokens) acts on linear layers alone",
        ),
    ],
)
@pytest.mark.fault(18)
def test_tensors_that_do_not_fit_together_are_refused_by_module(tmp_path, tensors, config, message):
    text = refusal(with_tensors(tmp_path, tensors, **config))
    assert text.splitlines()[1].startswith("  fc: ") and message in text


ROWS = "base_model.model.emb.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("tensors", "indices", "message"),
    [
        ({ROWS: [[1, 2]]}, None, "  emb.weight: the config does not record which rows these are"),
        (
            {ROWS: [[1, 2]]},
            {"other": [1]},
            "  trainable_token_indices names other, and the file contains rows for emb.weight",
        ),
        ({}, [1], "  trainable_token_indices is a list, and the file contains rows for no module"),
        (
            {ROWS: [[1, 2]], ROWS.replace("emb", "head"): [[1, 2]]},
            [1],
            "  trainable_token_indices is a list, and the file contains rows for emb.weight, head.weight",
        ),
        ({ROWS: [[1, 2]]}, [1, 2], "  emb.weight: there are 2 row indices, and the values are (1, 2)"),
        ({ROWS: [[1, 2], [3, 4]]}, [1, 1], "  emb.weight: row indices must be different and not negative: [1, 1]"),
        ({ROWS: [[1, 2]]}, [-1], "  emb.weight: row indices must be different and not negative: [-1]"),
        ({ROWS: [[1, 2]]}, ["1"], "  emb.weight: its trainable_token_indices are not a list of integers"),
        ({ROWS: [[1, 2]]}, [2**70], "  emb.weight: its trainable_token_indices are not a list of integers"),
        ({ROWS: [[1, 2]]}, {"emb": 1}, "  emb.weight: its trainable_token_indices are not a list of integers"),
        ({ROWS: [[1, np.inf]]}, [1], "  emb.weight: the rows hold 1 value that is not finite (NaN or infinity)"),
    ],
)
@pytest.mark.fault(12, 18)
def test_token_rows_with_unclear_indices_are_refused(tmp_path, tensors, indices, message):
    text = refusal(with_tensors(tmp_path, tensors, trainable_token_indices=indices))
    assert message in text.splitlines()


@pytest.mark.fault(18)
def test_a_grouped_convolution_is_refused_by_name(tmp_path):
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    trained(net, r=4, target_modules=["conv"]).save_pretrained(tmp_path)
    assert refusal(tmp_path).endswith(
        "  conv: A (4, 4, 3, 3), B (6, 2, 1, 1): the convolution has 2 groups. PEFT's A mixes the channels of all "
        "groups, which no weight of a grouped convolution can do: it cannot be merged"
    )


def test_an_adapter_without_tensors_is_refused(tmp_path):
    assert refusal(with_tensors(tmp_path, {A_KEY: None, B_KEY: None})).endswith("it contains no tensor")


def test_a_file_of_pickled_tensors_is_read_where_that_is_allowed(tmp_path):
    adapter = simple(tmp_path / "adapter")
    stored = formats.load(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    for path in (adapter, adapter / "adapter_model.bin"):
        pickled = formats.load(path, options=ReadOptions(allow_pickle=True))
        assert pickled.pairs["fc"].delta().tolist() == stored.pairs["fc"].delta().tolist()
        assert pickled.sha256 != stored.sha256


def test_missing_and_damaged_files_are_refused(tmp_path):
    adapter = simple(tmp_path / "adapter")
    os.truncate(adapter / "adapter_model.safetensors", 100)
    assert "ADAPTER/adapter_model.safetensors is not a safetensors file, or it was cut short" in refusal(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert refusal(adapter) == "ADAPTER has no adapter_model.safetensors"
    (adapter / "adapter_config.json").write_text("{")
    assert "ADAPTER/adapter_config.json is not JSON" in refusal(adapter)
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").mkdir()
    assert refusal(adapter) == "ADAPTER/adapter_config.json is not a regular file"


def test_mlx_configs_of_the_same_name_are_not_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    assert not reader.recognises(tmp_path)
