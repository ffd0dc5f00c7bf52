"""`merge --calibration` and `verify --calibration`: the model runs, and what cannot run is refused."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

import lora_export
from lora_export.api import calibration
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused, OutputFailed, WrongUsage
from lora_export.models import load
from lora_export.models.load import load_model
from lora_export.storage.atomic_output import refuse_lack_of_space
from lora_export.weights.gguf.base import GgufBase
from lora_export.weights.gguf.floats import write_as_floats
from support.cli import answer, call
from support.folder_contents import folder_contents
from support.gguf_files import Kind, llama, runnable, with_words, write_llama, write_model
from support.peft_models import trained
from support.small_models import WORDS, small_adapter, small_model, words_tokenizer

if TYPE_CHECKING:
    from support.stores import Stored

WEIGHT = 2e-2  # so small that bf16 swallows most of the adapter


def texts_in(path: Path, count: int = 60) -> Path:
    rng = np.random.default_rng(0)
    lines = (" ".join(rng.choice(WORDS[3:], rng.integers(2, 9))) for _ in range(count))
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in bf16 with a tokenizer, an adapter and texts."""
    found = tmp_path_factory.mktemp("calibration")
    base = small_model("llama", found / "base")
    words_tokenizer(base)
    small_adapter("llama", base, found / "adapter")
    tensors = load_file(base / "model.safetensors")
    save_file({name: one.bfloat16() for name, one in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    texts_in(found / "texts.txt")
    return found


def test_small_adapter_keeps_its_effect_in_bf16(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, texts, out = (folder / name for name in ("base", "adapter", "texts.txt", "out"))
    options = ["--calibration", texts, "--weight", str(WEIGHT), "--min-retention", "0"]
    code, found = answer(capsys, "merge", base, adapter, "-o", out, *options)
    assert code == 0, found
    outputs = [one["outputs"] for one in found["results"]]
    assert all(one["is_calibrated"] and one["error"] < one["nearest_error"] for one in outputs)
    settings = open_artifact(out).record.settings
    assert len(settings["calibrated"]) == len(outputs) and len(settings["calibration"]) == 64
    judged = ["verify", out, "--base", base, "-a", adapter, "--weight", str(WEIGHT), "--no-strict"]
    code, verdict = answer(capsys, *judged, "--calibration", texts)
    assert (code, verdict["not_judged"]) == (0, [])
    code, verdict = answer(capsys, *judged)
    assert "which of the two values around W + s·BA" in verdict["not_judged"][0]
    # An unmerged layer, and a file of other texts
    broken = folder / "broken"
    shutil.copytree(out, broken)
    name = settings["calibrated"][0]
    old, new = (load_file(each / "model.safetensors") for each in (base, out))
    save_file(new | {name: old[name]}, broken / "model.safetensors", {"format": "pt"})
    assert call("verify", broken, *judged[2:], "--calibration", texts) == 4
    with pytest.raises(InputRefused, match="names another file"):
        lora_export.verify(out, base=base, adapters=[adapter], calibration=texts_in(folder / "others.txt", 7))


@pytest.mark.parametrize("kind", ["texts.txt", "rows.parquet", "arrays.npz"])
def test_what_calibrates_may_be_in_a_store(folder: Path, tmp_path: Path, stored: Stored, kind: str) -> None:
    lines = texts_in(tmp_path / "texts.txt").read_text().splitlines()
    parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "rows.parquet")
    np.savez(tmp_path / "arrays.npz", input_ids=np.random.default_rng(0).integers(3, 9, (40, 12)))
    stored.put(kind, (tmp_path / kind).read_bytes())
    options: dict[str, Any] = {"weights": [WEIGHT], "min_retention": 0.0}
    for out, file in (("disk", tmp_path / kind), ("store", str(stored / kind))):
        lora_export.merge(folder / "base", folder / "adapter", tmp_path / out, calibration=file, **options)
    assert folder_contents(tmp_path / "store") == folder_contents(tmp_path / "disk")


def test_arrays_calibrate_and_nearest_measures(folder: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 9, (40, 12))
    mask = np.ones_like(ids)
    mask[:, 10:] = 0
    np.savez(folder / "inputs.npz", input_ids=ids, attention_mask=mask)
    found = {}
    for rounding in ("nearest", "calibrated"):
        report = lora_export.merge(
            folder / "base", [folder / "adapter"], folder / rounding, weights=[WEIGHT], min_retention=0.0,
            calibration=folder / "inputs.npz", rounding=rounding,
        ).report  # fmt: skip
        assert report is not None
        found[rounding] = [one.outputs for one in report.results if one.outputs is not None]
    pairs = list(zip(found["nearest"], found["calibrated"], strict=True))
    assert pairs and all(one.error == one.nearest_error > other.error for one, other in pairs)
    assert lora_export.verify(folder / "nearest", base=folder / "base", adapters=[folder / "adapter"], weights=[WEIGHT])


def test_a_gguf_file_has_its_own_config_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_llama(tmp_path / "base.gguf", Kind.Q4_0, fields=with_words)
    trained(llama(), r=4, lora_alpha=0.1, target_modules=["q_proj", "o_proj"]).save_pretrained(tmp_path / "a")
    texts = tmp_path / "texts.txt"
    rng = np.random.default_rng(0)
    texts.write_text("\n".join("".join(rng.choice(list("abcdefghijklmnop"), 16)) for _ in range(60)))
    left: list[Path] = []

    def loaded(path: str, **options: Any) -> Any:
        left.extend(Path(path).parent.rglob("*.gguf"))
        return load_model(path, **options)

    monkeypatch.setattr(load, "load_model", loaded)
    report = lora_export.merge(base, tmp_path / "a", tmp_path / "out", calibration=texts).report
    assert report is not None and report.layers and not left
    assert all(one.outputs and one.outputs.is_calibrated for one in report.layers)
    bare = write_llama(tmp_path / "bare.gguf", Kind.Q4_0, fields=runnable)
    with pytest.raises(InputRefused, match=r"does not read the tokenizer of this GGUF file\. Give arrays"):
        lora_export.merge(bare, tmp_path / "a", tmp_path / "bad", calibration=texts)
    unknown = write_llama(
        tmp_path / "unknown.gguf", Kind.Q4_0, fields=lambda writer: writer.add_string("llama.context_length", "long")
    )
    with pytest.raises(InputRefused, match=r"does not read the config"):
        lora_export.merge(unknown, tmp_path / "a", tmp_path / "bad", calibration=texts)
    assert not (tmp_path / "bad.gguf").exists()


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
# What transformers does not read out of a GGUF file: a model, what llama.cpp adds to norms, and the targets
UNREAD = {
    "BERT": lambda: (BertModel(BertConfig(**SIZES, max_position_embeddings=32)), 0, ["query", "value"]),
    "GEMMA": lambda: (GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=32)), 1, ["q_proj"]),
    "OLMO2": lambda: (Olmo2ForCausalLM(Olmo2Config(**SIZES, eos_token_id=1)), 0, ["down_proj"]),
    "OLMOE": lambda: (OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)), 0, ["q_proj"]),
}


@pytest.mark.parametrize("architecture", UNREAD)
def test_a_config_and_a_tokenizer_beside_the_file(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(0)
    model, norms, targets = UNREAD[architecture]()
    base = write_model(tmp_path / "base.gguf", gguf.MODEL_ARCH[architecture], model, norms=norms)
    trained(model, r=2, target_modules=targets).save_pretrained(tmp_path / "a")

    def merged(name: str, file: Path) -> Any:
        options: dict[str, Any] = {"dtype_of": {"*": "keep"}, "min_retention": 0.0}
        return lora_export.merge(base, tmp_path / "a", tmp_path / name, calibration=file, **options).report

    arrays, texts = tmp_path / "in.npz", texts_in(tmp_path / "texts.txt")
    np.savez(arrays, input_ids=np.random.default_rng(0).integers(3, 32, (60, 12)))
    with pytest.raises(InputRefused, match=r"is not supported yet\. Put the model's config\.json beside it$"):
        merged("bad.gguf", arrays)
    other = copy.deepcopy(model.config)
    other.num_attention_heads, other.num_hidden_layers = 4, 3
    other.save_pretrained(tmp_path)
    with pytest.raises(
        InputRefused, match=r"not that of base\.gguf: it has num_hidden_layers 3, not 1, num_attention_heads 4"
    ):
        merged("bad.gguf", arrays)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputRefused, match=r"or put the model's tokenizer beside it"):
        merged("bad.gguf", texts)
    words_tokenizer(tmp_path)
    for report in (merged("arrays.gguf", arrays), merged("texts.gguf", texts)):
        assert len(report.layers) == len(targets)
        assert all(one.outputs.is_calibrated and one.outputs.error < one.outputs.nearest_error for one in report.layers)
    assert not (tmp_path / "bad.gguf").exists()


def test_a_tokenizer_beside_the_file_has_the_words_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, norms, targets = UNREAD["BERT"]()
    model.config.quantization_config = {"quant_method": "awq"}  # of another file of the model
    model.config.save_pretrained(tmp_path)
    words_tokenizer(tmp_path)
    trained(model, r=2, target_modules=targets).save_pretrained(tmp_path / "a")
    padding = [f"[PAD{number}]" for number in range(len(WORDS), 32)]
    texts = texts_in(tmp_path / "texts.txt")

    def merged(words: list[str]) -> Any:
        base = write_model(tmp_path / "base.gguf", gguf.MODEL_ARCH.BERT, model, norms=norms, words=[*words, *padding])
        options: dict[str, Any] = {"dtype_of": {"*": "keep"}, "min_retention": 0.0, "overwrite": True}
        return lora_export.merge(base, tmp_path / "a", tmp_path / "out.gguf", calibration=texts, **options).report

    with pytest.raises(InputRefused, match=r"the tokenizer in .* is not that of base\.gguf: 8 of its 9 tokens"):
        merged(WORDS[::-1])
    # As llama.cpp writes those of BERT
    assert len(merged([f"\u2581{word}" for word in WORDS]).layers) == len(targets)


def test_what_is_no_text_calibrates_nothing(tmp_path: Path) -> None:
    rows = '{"text": "a b"}\n{"text": null}\n{"text": ["a"]}\n{"text": " "}\n{"label": 1}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    assert calibration._texts(tmp_path / "rows.jsonl", print) == ["a b"]


def test_the_copy_in_floats_has_to_fit_the_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_llama(tmp_path / "base.gguf", Kind.Q4_0, fields=with_words)
    trained(llama(), r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    (tmp_path / "texts.txt").write_text("abc\n")
    needed: list[int] = []
    monkeypatch.setattr(calibration, "refuse_lack_of_space", lambda folder, size: needed.append(size))

    def measured(merged: GgufBase, folder: Path) -> None:
        write_as_floats(merged, folder)
        written = sum(path.stat().st_size for path in [merged.file.path, *folder.glob("*.safetensors")])
        assert 0.9 * written < needed[0] < 1.1 * written
        raise InputRefused("measured")

    monkeypatch.setattr(calibration, "write_as_floats", measured)
    with pytest.raises(InputRefused, match="measured"):
        lora_export.merge(base, tmp_path / "a", tmp_path / "out", calibration=tmp_path / "texts.txt")
    monkeypatch.setattr(calibration, "refuse_lack_of_space", lambda folder, size: refuse_lack_of_space(folder, 10**18))
    for given, adapter in ((base, tmp_path / "a"), (folder / "base", folder / "adapter")):
        with pytest.raises(OutputFailed, match=r" free, .* needed$"):
            lora_export.merge(given, adapter, tmp_path / "out", calibration=tmp_path / "texts.txt", min_retention=0)


def test_what_cannot_calibrate_is_refused(folder: Path, tmp_path: Path) -> None:
    base, adapters, out = folder / "base", [folder / "adapter"], tmp_path / "out"
    with pytest.raises(WrongUsage, match="needs"):
        lora_export.merge(base, adapters, out, rounding="calibrated")
    for missing, what in ((tmp_path / "nowhere.txt", "does not exist"), (tmp_path, "is a folder")):
        message = f"calibration.*{re.escape(str(missing))} {what}. Give a file of texts"
        with pytest.raises(InputRefused, match=message):
            lora_export.merge(base, adapters, out, calibration=missing)
        with pytest.raises(InputRefused, match=message):
            lora_export.verify(base, base=base, adapters=adapters, calibration=missing)
    file = shutil.copy(base / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(InputRefused, match="merge into its Hugging Face folder"):
        lora_export.merge(file, adapters, tmp_path / "out.safetensors", calibration=folder / "texts.txt")
    with pytest.raises(InputRefused, match="too few"):
        lora_export.merge(base, adapters, out, calibration=texts_in(tmp_path / "few.txt", 4))
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    for path in bare.glob("*token*"):
        path.unlink()
    with pytest.raises(InputRefused, match=r"bare has no tokenizer"):
        lora_export.merge(bare, adapters, out, calibration=folder / "texts.txt")
    with pytest.raises(WrongUsage, match="for a checkpoint"):
        lora_export.verify(out, model=base, adapters=adapters, calibration=folder / "texts.txt")
    merged = lora_export.merge(base, adapters, out).output
    with pytest.raises(InputRefused, match="names no calibrated layers"):
        lora_export.verify(merged, base=base, adapters=adapters, calibration=folder / "texts.txt")
