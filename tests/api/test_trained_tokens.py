"""Trained rows of tokens (`trainable_token_indices`) in graphs: what PEFT's model computes, and nothing else passes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.api import merge_graph
from lora_export.errors import Different, InputRefused, MatchError
from lora_export.runtime.onnx_runner import OnnxRunner
from support.slow import slow
from support.tied import WORDS, TiedModel, tied_model, untied_llama

TABLE = {
    "LlamaForCausalLM": "embed_tokens",
    "GPT2LMHeadModel": "wte",
    "BertForMaskedLM": "word_embeddings",
}
TARGET = {"LlamaForCausalLM": "v_proj", "GPT2LMHeadModel": "c_attn", "BertForMaskedLM": "value"}


def trained(folder: Path, architecture: str, *, tied: bool) -> tuple[TiedModel, Path, NDArray[np.float32]]:
    """The model, an adapter with rows of its table, and the logits of PEFT's model with it."""
    model = tied_model(folder / "base", architecture, tied=tied)
    target, options = TARGET[architecture], {"trainable_token_indices": {TABLE[architecture]: [0, 5, 22]}}
    adapter = model.adapter(folder / "adapter", target, **options)
    return model, adapter, model.outputs(model.trained(target, **options)).numpy()


def logits(graph: Path) -> NDArray[np.float32]:
    ids = np.arange(WORDS)[None]
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    names = [value.name for value in onnx.load(graph, load_external_data=False).graph.input]
    return OnnxRunner(graph, "cpu").run({name: every[name] for name in names})["logits"]


def tables(graph: Path) -> int:
    """How many initializers have a number of their own for each word."""
    return sum(WORDS in tensor.dims for tensor in onnx.load(graph).graph.initializer)


@pytest.mark.parametrize("lora", ["merged", slow("nodes")])
@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        ("LlamaForCausalLM", True),
        slow("LlamaForCausalLM", False),
        slow("GPT2LMHeadModel", True),
        slow("BertForMaskedLM", True),
    ],
)
def test_graphs_compute_what_peft_computes(tmp_path: Path, architecture: str, tied: bool, lora: str) -> None:
    model, adapter, expected = trained(tmp_path, architecture, tied=tied)
    result = le.export_onnx(model.base, tmp_path / "m.onnx", adapters=adapter, lora=lora)
    assert result.proof is not None and result.proof.verdict.same
    le.export_onnx(model.base, tmp_path / "base.onnx", verify=False)
    again = le.export_onnx(tmp_path / "base.onnx", tmp_path / "again.onnx", adapters=adapter, lora=lora)
    assert again.proof is not None and again.proof.verdict.same
    le.merge(tmp_path / "base.onnx", adapter, tmp_path / "merged.onnx")
    for name in ("m", "again", "merged"):
        np.testing.assert_allclose(logits(tmp_path / f"{name}.onnx"), expected, rtol=1e-4, atol=1e-5)
        assert tables(tmp_path / f"{name}.onnx") == tables(tmp_path / "base.onnx")  # one for a tied head, too


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[TiedModel, Path]:
    """A tied model with an adapter of rows, and its graph."""
    folder = tmp_path_factory.mktemp("llama")
    model, _, _ = trained(folder, "LlamaForCausalLM", tied=True)
    le.export_onnx(model.base, folder / "base.onnx", verify=False)
    return model, folder


def test_rows_that_the_head_lacks_are_different(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = llama
    monkeypatch.setattr(merge_graph, "with_rows_of_equal_tables", lambda steps, *_: steps)
    le.merge(folder / "base.onnx", folder / "adapter", tmp_path / "m.onnx")
    assert le.verify(tmp_path / "m.onnx", model.base, adapters=folder / "adapter").verdict.outcome == "different"


@pytest.mark.parametrize(
    ("options", "change", "takes_both"),
    [
        ({"modules_to_save": ["lm_head"]}, "the whole", False),
        ({"trainable_token_indices": {"lm_head": [5]}}, "rows of", False),
        ({"trainable_token_indices": {"lm_head": [3]}}, "rows of", True),
    ],
)
def test_rows_do_not_vanish_beside_the_head_of_another_adapter(
    llama, tmp_path: Path, options: dict[str, Any], change: str, takes_both: bool
) -> None:
    model, folder = llama
    adapters = [folder / "adapter", model.adapter(tmp_path / "head", "v_proj", seed=3, **options)]
    why = rf"adapter replaces rows of .*; head replaces {change} lm_head\.weight"
    with pytest.raises(InputRefused, match=why) as refused:
        le.merge(folder / "base.onnx", adapters, tmp_path / "m.onnx")
    assert ('or both into the checkpoint with tied="untie"' in str(refused.value)) is takes_both
    with contextlib.nullcontext() if takes_both else pytest.raises(MatchError, match="Merge only one"):
        le.merge(model.base, adapters, tmp_path / "m", tied="untie")
        head = load_file(tmp_path / "m/model.safetensors")["lm_head.weight"]
        changed = (head != load_file(model.base / "model.safetensors")["model.embed_tokens.weight"]).any(axis=1)
        assert np.flatnonzero(changed).tolist() == [0, 3, 5, 22]


@pytest.mark.parametrize("kind", ["saved head", slow("rows")])
def test_own_values_are_quantised_with_the_graph(tmp_path: Path, kind: str) -> None:
    """The adapter's own values are what is rounded: a head of another training is different."""
    model = untied_llama(tmp_path / "base")
    own = {"modules_to_save": ["lm_head"]} if kind == "saved head" else {"trainable_token_indices": {"lm_head": [3, 9]}}
    adapters = [model.adapter(tmp_path / f"{seed}", "v_proj", seed=seed, **own) for seed in (1, 2)]
    result = le.export_onnx(model.base, tmp_path / "m.onnx", adapters=adapters[0], quantize="int8")
    assert result.proof is not None and result.proof.verdict.same
    only_head = load_file(adapters[0] / "adapter_model.safetensors")
    other = load_file(adapters[1] / "adapter_model.safetensors")
    mixed = {name: other[name] if "lm_head" in name else value for name, value in only_head.items()}
    save_file(mixed, adapters[1] / "adapter_model.safetensors")
    with contextlib.suppress(Different):  # where the weights are compared before the outputs
        assert le.verify(tmp_path / "m.onnx", model.base, adapters=adapters[1]).verdict.outcome == "different"


@pytest.mark.parametrize("lora", ["inputs", "rows", "slots"])
def test_rows_cannot_be_swapped(llama, tmp_path: Path, lora: str) -> None:
    model, folder = llama
    options = {} if lora == "inputs" else {"adapters": [folder / "adapter"]}
    with pytest.raises(InputRefused, match=r"(?s)rows of tokens.*Merge such an adapter into a graph of its own"):
        le.export_onnx(model.base, tmp_path / "m.onnx", lora=lora, **({"adapters": folder / "adapter"} | options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_tables_are_in_graphs_under_the_names_that_are_looked_up(tmp_path: Path, architecture: str) -> None:
    model = tied_model(tmp_path / "base", architecture)
    target = "v" if architecture.startswith("T5") else "v_proj"
    adapter = model.adapter(tmp_path / "adapter", target, trainable_token_indices={"shared": [1, 2]})
    for output in ("m.onnx", "folder"):
        task = {} if output == "m.onnx" else {"task": "text2text-generation"}
        assert le.export_onnx(model.base, tmp_path / output, adapters=adapter, **task).proof
    exported = {"output": tmp_path / "again.onnx", "adapters": adapter}
    with pytest.raises(MatchError, match=r'shared\.weight under another name\. checkpoint="CHECKPOINT" finds a tied'):
        le.export_onnx(tmp_path / "m.onnx", **exported)
    plain = le.export_onnx(model.base, tmp_path / "plain.onnx").output
    assert le.export_onnx(plain, checkpoint=model.base, **exported).proof
