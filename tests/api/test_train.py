"""`lora_export.train`: an adapter as a value and as a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import lora_export as le
from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed, WrongUsage
from support.api import MODEL, Recorder, base_weights
from support.slow import slow_but
from support.small_models import small_model, words_tokenizer
from support.sounds import small_ctc, small_whisper, write_sound


def test_training_returns_the_adapter_it_saved(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = Recorder()
    result = le.train(
        MODEL, data, tmp_path / "ad", rank=2, alpha=4.0, epochs=4, batch_size=8, learning_rate=1e-2, **seen.callbacks
    )
    assert list(result.adapter.pairs) == ["dense"] and result.adapter.pairs["dense"].scale == 2.0
    assert result.adapter.sha256 == le.load_adapter(tmp_path / "ad").sha256
    assert result.history.losses[-1] < result.history.losses[0]
    assert result.scores["adapter"].loss < result.scores["adapter_off"].loss
    assert seen.events[-1].unit == "steps" and seen.events[-1].done == seen.events[-1].total
    assert "loss" in seen.events[-1].detail
    assert capsys.readouterr() == ("", "")


def test_the_step_that_is_kept_is_reported(data: Path, tmp_path: Path) -> None:
    seen = Recorder()
    options: dict[str, Any] = {"rank": 2, "epochs": 9, "patience": 1, "learning_rate": 0.5}
    history = le.train(MODEL, data, tmp_path / "ad", **options, **seen.callbacks).history
    assert history.best is not None and history.best.step < len(history.steps)
    kept = f"kept: step {history.best.step}, with the lowest held-out loss ({history.best.held_out_loss:.4g})"
    assert seen.messages.count(kept) == 1
    le.train(MODEL, data, tmp_path / "other", rank=2, epochs=1, **seen.callbacks)
    assert sum("kept:" in message for message in seen.messages) == 1


def test_the_adapter_records_layouts_so_that_a_merge_needs_no_option(data: Path, tmp_path: Path) -> None:
    trained = le.train(MODEL, data, tmp_path / "ad", rank=2, epochs=1).adapter
    assert trained.layouts == {"dense": "out_in"}
    base = base_weights(tmp_path / "base.safetensors")
    made = le.merge(base, tmp_path / "ad", tmp_path / "out.safetensors")
    assert [(step.spec.layout, step.spec.layout_source) for step in made.plan.steps] == [("out_in", "adapter")]
    assert le.verify(tmp_path / "out.safetensors", base=base, adapters=[tmp_path / "ad"])


# --- Tasks: what is trained here loads in PEFT, and merges ---

IDS = torch.arange(24).reshape(3, 8) % 9
WORDS = ["bad", "good", "very", "film", "a", "the"]


def words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def labelled(label: object) -> list[dict[str, object]]:
    return [{"text": words(n, 6), "label": label(n) if callable(label) else label} for n in range(12)]


# name -> the base, the rows, the class of the model that reads the result, and options
TASKS: dict[str, tuple[str, list[dict[str, object]], str, dict[str, object]]] = {
    "packed": ("llama", [{"text": words(n, 5)} for n in range(12)], "ForCausalLM", {"packing": True}),
    "conv1d": ("gpt2", [{"body": words(n, 5)} for n in range(12)], "ForCausalLM", {"columns": {"text": "body"}}),
    "completion": ("llama", [{"prompt": words(n, 3), "completion": "good"} for n in range(12)], "ForCausalLM", {}),
    "conv1d in 4 bits": ("gpt2", [{"text": words(n, 5)} for n in range(12)], "ForCausalLM", {"quantize_base": "nf4"}),
    "seq2seq": ("t5", [{"prompt": words(n, 3), "completion": "good"} for n in range(12)], "ForSeq2SeqLM", {}),
    "several": ("bert", labelled(lambda n: ["x", "y", "z"][: n % 4]), "ForSequenceClassification", {}),
    "values": ("bert", labelled(lambda n: n / 8), "ForSequenceClassification", {}),
    "classes in 4 bits": (
        "bert",
        labelled(lambda n: ["x", "y"][n % 2]),
        "ForSequenceClassification",
        {"quantize_base": "nf4", "init": "pissa"},
    ),
    "classes in bfloat16": (
        "bert",
        labelled(lambda n: ["x", "y"][n % 2]),
        "ForSequenceClassification",
        {"base_dtype": "bfloat16", "precision": "bf16", "bias": "all"},
    ),
    "tags": ("bert", [{"tokens": ["a", "bad"], "tags": ["x", "y"]}] * 8, "ForTokenClassification", {}),
    "pairs": ("bert", [{"sentence1": "a", "sentence2": words(n, 3), "score": n / 9} for n in range(9)], "", {}),
}


@pytest.mark.parametrize("name", slow_but(TASKS.keys() - {"classes in bfloat16"}, TASKS))
def test_what_is_trained_loads_in_peft_and_merges(name: str, tmp_path: Path) -> None:
    architecture, rows, kind, options = TASKS[name]
    base = words_tokenizer(small_model(architecture, tmp_path / "base"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = Recorder()
    options = {"rank": 4, "batch_size": 4, "learning_rate": 1e-2, "epochs": 1, **options}
    result = le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", **options, **seen.callbacks)
    untrained = [layer for layer, pair in result.adapter.pairs.items() if not pair.b.any()]
    assert untrained == (["pooler.dense"] if name == "pairs" else [])  # their vectors are not those of the pooler
    assert any("`pooler.dense` got no gradient" in line for line in seen.messages) is bool(untrained)
    assert {pair.scale for pair in result.adapter.pairs.values()} == {2.0}  # alpha is twice the rank
    assert set(result.adapter.layouts.values()) == {"in_out" if "conv1d" in name else "out_in"}  # of the float base
    le.merge(base, tmp_path / "ad", tmp_path / "merged")
    auto = getattr(transformers, f"AutoModel{kind}")
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    labels = {"num_labels": merged.config.num_labels} if "Classification" in kind else {}
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(base, **labels), tmp_path / "ad").eval()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "seq2seq" else {})
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs)[0], theirs(**inputs)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": [2, 4]}, 'shard_base= trains one adapter'), ({"compile": True}, 'shard_base= trains one adapter'),
     ({}, "this is the only one. Start them with `torchrun")],
)  # fmt: skip
def test_a_base_is_shared_among_several_processes_for_one_adapter(
    options: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.train(MODEL, data, tmp_path / "ad", shard_base=True, **options)
    assert not list(tmp_path.glob("ad*"))


@pytest.mark.slow
def test_a_base_in_half_precision_takes_half_the_memory(tmp_path: Path) -> None:
    base = words_tokenizer(small_model("bert", tmp_path / "base"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled(lambda n: f"{n % 2}")))
    options: dict[str, Any] = {"rank": 1, "target": ["query"], "precision": "bf16", "compare": ["full", "frozen"]}
    with pytest.raises(WrongUsage, match='the steps are computed in bfloat16, too: add precision="bf16"'):
        le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", base_dtype="bfloat16")
    wide = le.train(base, tmp_path / "data.jsonl", tmp_path / "wide", **options)
    narrow = le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", base_dtype="bfloat16", **options)
    shares = [one.memory.weights / two.memory.weights for one, two in zip(narrow.runs, wide.runs, strict=True)]
    assert 0.5 < shares[0] < 0.55 and shares[1] == 1 and 0.5 < shares[2] < 0.55  # "full" trains all, in fp32
    gradients = [run.memory.gradients for run in (*narrow.runs, *wide.runs)]
    assert gradients[:3] == gradients[3:]  # of fp32 parameters
    assert "| base dtype | `bfloat16` |" in (tmp_path / "ad/README.md").read_text()
    assert not (tmp_path / "ad.training").exists()


def test_images_in_folders_train_a_classifier(tmp_path: Path) -> None:
    base = small_model("vit", tmp_path / "base")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(base)
    for number in range(12):
        colour = ("red", "green", "blue")[number % 3]
        (tmp_path / "images" / colour).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), colour).save(tmp_path / "images" / colour / f"{number}.png")
    result = le.train(
        base, tmp_path / "images", tmp_path / "ad", rank=4, epochs=8, batch_size=3, learning_rate=2e-2, holdout=0.25
    )
    assert result.scores["adapter"].accuracy == 1.0
    config = json.loads((tmp_path / "ad/config.json").read_text())
    assert sorted(config["label2id"]) == ["blue", "green", "red"]


# The loss of CTC falls to a fortieth in so few steps that a rounding in the first ones decides about the later ones: in
# bf16 its curve is that of fp32 for some steps, on each processor for another number of them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "texts", "alike", "rounding"),
    [(small_whisper, ["good film", "bad"], 24, 0.03), (small_ctc, ["abba", "cd"], 3, 0.01)],
)
def test_sounds_with_transcripts_train_a_speech_model(
    make: Any, texts: list[str], alike: int, rounding: float, tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    (tmp_path / "sounds").mkdir()
    lines = [f"{write_sound(tmp_path / f'sounds/{n}.wav', seed=n % 2).name},{texts[n % 2]}\n" for n in range(8)]
    (tmp_path / "sounds/metadata.csv").write_text("file_name,transcription\n" + "".join(lines))
    options: dict[str, Any] = {"rank": 4, "epochs": 12, "batch_size": 3, "learning_rate": 2e-2, "holdout": 0.25}
    narrow = le.train(
        base, tmp_path / "sounds", tmp_path / "narrow", **options, base_dtype="bfloat16", precision="bf16"
    )
    np.random.seed(5)
    result = le.train(base, tmp_path / "sounds", tmp_path / "ad", **options)
    drawn = np.random.random()
    np.random.seed(5)
    assert drawn == np.random.random()
    assert result.history.losses[-1] < result.history.losses[0]
    assert result.scores["adapter"].loss < result.scores["adapter_off"].loss
    assert narrow.history.losses[:alike] == pytest.approx(result.history.losses[:alike], rel=rounding)
    assert narrow.scores["adapter"].loss < narrow.scores["adapter_off"].loss
    np.random.seed(6)  # a speech model of transformers masks parts of a sound by NumPy's random numbers
    assert le.train(base, tmp_path / "sounds", tmp_path / "again", **options).history.losses == result.history.losses
    le.merge(base, tmp_path / "ad", tmp_path / "merged")
    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "ad").eval()
    inputs = le.load_model(str(base)).example_inputs()
    with torch.no_grad():
        merged = kind.from_pretrained(tmp_path / "merged").eval()(**inputs).logits
        torch.testing.assert_close(merged, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_batches_and_a_loss_of_the_users_train_any_module(tmp_path: Path) -> None:
    (tmp_path / "mine_batches.py").write_text(
        "import torch\n\n"
        "def make():\n"
        "    rows = torch.linspace(-1, 1, 40).reshape(1, 5, 8)\n"
        "    batches = [({'rows': n * rows, 'weights': torch.ones(1, 5)}, n * rows.flip(-1)) for n in (1, 2, 3, 4)]\n"
        "    return batches, lambda outputs, wanted: (outputs[0] - wanted).abs().mean()\n"
    )
    result = le.train(
        MODEL, f"{tmp_path}/mine_batches.py:make", tmp_path / "ad", rank=2, epochs=20, learning_rate=2e-2, holdout=0.25
    )
    assert len(result.history.losses) == 20 * 3
    assert result.scores["adapter"].loss < result.scores["adapter_off"].loss
    assert result.scores["adapter"].accuracy is None


@pytest.mark.parametrize(
    ("how", "error", "logits_error"),
    [
        ({}, 1e-5, 1e-4),
        ({"quantize_base": "nf4"}, 1e-5, 1e-4),
        ({"base_dtype": "bfloat16", "precision": "bf16"}, 1e-3, 2e-2),
    ],
    ids=["float32", "nf4", "bfloat16"],
)
def test_the_loss_curve_is_pefts_from_the_same_start(
    how: dict[str, str], error: float, logits_error: float, tmp_path: Path
) -> None:
    """transformers' own loss, PEFT's layers and a loop written here, in the order that the loop has."""
    from lora_export.training.order import ShuffledOrder

    base = words_tokenizer(small_model("llama", tmp_path / "base"))
    lines = [words(n, 7) for n in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = {"rank": 4, "batch_size": 4, "epochs": 3, "learning_rate": 1e-2, "warmup": 0.0, "holdout": 0.0}
    result = le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", schedule="constant", **options, **how)
    dtype = getattr(torch, how.get("base_dtype", "float32"))

    def loaded_base() -> Any:
        is_packed = "quantize_base" in how
        return in_4_bits(base) if is_packed else transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)

    model = loaded_base()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(model, config).train()
    start = le.create_adapter(
        le.load_model(str(base)).module, targets="all-linear", rank=4, alpha=8, seed=0
    )  # as `train` makes it
    state = theirs.state_dict()
    for name, pair in start.pairs.items():
        state[f"base_model.model.{name}.lora_A.default.weight"].copy_(torch.from_numpy(pair.a))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    order, expected = ShuffledOrder(16, 4, 0), []
    for step in range(12):
        batch = tokenizer([lines[row] for row in order.rows_of(step)], return_tensors="pt")
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = theirs(**batch, labels=batch["input_ids"]).loss
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert result.history.losses == pytest.approx(expected, abs=error)
    assert expected[0] - expected[-1] > 50 * error  # the curve falls
    loaded = peft.PeftModel.from_pretrained(loaded_base(), tmp_path / "ad")
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        torch.testing.assert_close(loaded.train()(IDS).logits, theirs(IDS).logits, atol=logits_error, rtol=logits_error)


def in_4_bits(base: Path) -> Any:
    """A model with a base in nf4, as QLoRA's authors and PEFT load it."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@pytest.mark.slow
def test_a_base_in_4_bits_is_recorded_and_its_training_continued(tmp_path: Path) -> None:
    base = words_tokenizer(small_model("llama", tmp_path / "base"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": words(n, 7)}) + "\n" for n in range(16)))
    options: dict[str, Any] = {"rank": 2, "batch_size": 4, "quantize_base": "nf4", "bias": "all"}
    seen = Recorder()
    expected = le.train(base, tmp_path / "data.jsonl", tmp_path / "whole", **options, **seen.callbacks)
    described = "14 layers in 4 bits (nf4, double quantisation)"
    assert f"base: {described}" in seen.messages
    assert f"| quantisation of the base | `{described}` |" in (tmp_path / "whole/README.md").read_text()
    assert json.loads((tmp_path / "whole/lora_export.json").read_text())["base_quantization"] == described
    assert "quantization_config" not in (tmp_path / "whole/config.json").read_text()

    def interrupt(event: Any) -> None:
        if event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", **options, on_progress=interrupt)
    with pytest.raises(InputRefused, match="quantize_base was nf4, and is None"):
        le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", **(options | {"quantize_base": None}), resume=True)
    result = le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", **options, resume=True)
    assert result.history.losses == expected.history.losses
    assert result.adapter.sha256 == expected.adapter.sha256
    stored = tmp_path / "stored"
    in_4_bits(base).save_pretrained(stored)
    words_tokenizer(stored)
    again = le.train(stored, tmp_path / "data.jsonl", tmp_path / "of_stored", **(options | {"quantize_base": None}))
    assert again.history.losses == expected.history.losses
    with pytest.raises(WrongUsage, match='compare="full" trains all weights'):
        le.train(stored, tmp_path / "data.jsonl", tmp_path / "no", rank=2, compare=["full"])
    merged = le.merge(base, tmp_path / "ad", tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ad")
    for name, value in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(value, theirs.merge_and_unload().state_dict()[name], atol=1e-7, rtol=1e-6)
    assert len(merged.plan.steps) == 14


@pytest.mark.slow
def test_qlora_goes_beside_a_graph_in_4_bits(tmp_path: Path) -> None:
    base = words_tokenizer(small_model("llama", tmp_path / "base"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": words(n, 7)}) + "\n" for n in range(16)))
    options: dict[str, Any] = {"rank": 2, "batch_size": 4, "learning_rate": 3e-2, "epochs": 8}
    le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", quantize_base="nf4", **options)
    result = le.export_onnx(base, tmp_path / "m.onnx", adapters=tmp_path / "ad", lora="nodes", quantize="int4")
    assert result.proof.verdict.same and result.precision.stored == "4 bits in blocks of 32"
    stored = tmp_path / "nf4"  # which is no graph's quantisation: its weights become floats first
    in_4_bits(base).save_pretrained(stored)
    merged = le.merge(stored, tmp_path / "ad", tmp_path / "merged", dequantize=True)
    assert len(merged.plan.steps) == 14
    made = le.export_onnx(tmp_path / "merged", tmp_path / "merged.onnx", quantize="int4")
    assert made.proof.verdict.same


# --- Interruptions and refusals ---


def test_cuda_that_is_absent_is_missed_before_the_data_are_read(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(EnvironmentLacking, match="no CUDA device"):
        le.train(MODEL, tmp_path / "none.npz", tmp_path / "ad", device="cuda")


@pytest.mark.slow
def test_an_interrupted_training_is_continued(data: Path, tmp_path: Path) -> None:
    options = {"rank": 2, "epochs": 3, "batch_size": 8}
    expected = le.train(MODEL, data, tmp_path / "whole", **options)

    def interrupt(event: object) -> None:
        if getattr(event, "done", 0) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        le.train(MODEL, data, tmp_path / "ad", **options, on_progress=interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz", "whole", "ad.training"}
    with pytest.raises(OutputFailed, match=r"ad\.training has the checkpoint of a training that did not end"):
        le.train(MODEL, data, tmp_path / "ad", **options)
    with pytest.raises(InputRefused, match="rank was 2, and is 4"):
        le.train(MODEL, data, tmp_path / "ad", **(options | {"rank": 4}), resume=True)
    result = le.train(MODEL, data, tmp_path / "ad", **options, resume=True)
    assert result.history.losses == expected.history.losses
    assert result.adapter.sha256 == expected.adapter.sha256
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz", "whole", "ad"}


@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_files_that_are_no_checkpoint_stay_in_its_place(option: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "ad.training").mkdir()
    (tmp_path / "ad.training/notes.txt").write_text("mine")
    with pytest.raises(OutputFailed, match=r"ad\.training is .*, and has files that are none: notes\.txt\. Move them"):
        le.train(MODEL, data, tmp_path / "ad", rank=2, epochs=1, **{option: True})
    assert (tmp_path / "ad.training/notes.txt").read_text() == "mine"


def test_a_checkpoint_of_an_earlier_version_is_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "ad.training").mkdir()
    for name in ("state.safetensors", "best.safetensors"):
        (tmp_path / "ad.training" / name).write_bytes(b"")
    le.train(MODEL, data, tmp_path / "ad", rank=2, epochs=1, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz", "ad"}


@pytest.mark.parametrize("was_begun", [False, True])
def test_a_training_that_was_killed_before_its_first_checkpoint_starts_again(
    was_begun: bool, data: Path, tmp_path: Path
) -> None:
    options = {"rank": 2, "epochs": 1, "batch_size": 8}
    expected = le.train(MODEL, data, tmp_path / "whole", **options)
    if was_begun:
        (tmp_path / "ad.training").mkdir()
        (tmp_path / "ad.training/metrics.jsonl").write_text("{}\n")
    seen = Recorder()
    result = le.train(MODEL, data, tmp_path / "ad", **options, resume=True, **seen.callbacks)
    assert (
        f"note: there is no checkpoint in {tmp_path / 'ad.training'}: training starts from the beginning"
        in seen.messages
    )
    assert result.adapter.sha256 == expected.adapter.sha256
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz", "whole", "ad"}
