"""Ways of training one model: what each of them trains, and that none changes the base."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

import lora_export as le
from lora_export import layers, plan
from lora_export.api.training_strategies import HEADS, Trainer, losses_of, note_on_uncalled
from lora_export.callbacks import Progress
from lora_export.errors import InputRefused
from lora_export.options.train import Init, TrainingSettings, TrainOptions
from lora_export.training.batches import ArrayData
from lora_export.training.evaluation import evaluate
from support.api import MODEL, Recorder
from support.more_models import MORE_MODELS
from support.slow import slow
from support.small_models import MODELS, small_model, words_tokenizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.body(x)))
        return scores


def some_data(seed: int) -> ArrayData:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(32, 4)).astype(np.float32))
    return ArrayData({"x": x}, (x[:, 0] > x[:, 1]).long())


def trainer(events: list[Progress], heads: tuple[str, ...] = ("head",)) -> Trainer:
    torch.manual_seed(0)
    settings = TrainingSettings(epochs=2, learning_rate=0.05, batch_size=8, seed=0)
    options = TrainOptions("net", "data", "out", on_progress=events.append)
    return Trainer(Net().eval(), some_data(0), some_data(1), settings, heads, options)


def test_each_way_trains_what_its_name_says() -> None:
    events: list[Progress] = []
    work = trainer(events)
    before = copy.deepcopy(work.module.state_dict())
    new = layers.create_adapter(work.module, targets=["body"], rank=2, alpha=4, seed=0, modules_to_save=["head"])
    runs = [work.adapter(new, 2), *work.compared(["full", "frozen"])]
    assert [run.label for run in runs] == ["LoRA, rank 2", "all weights", "head alone"]
    assert [run.parameters.trained for run in runs] == [2 * 12 + 18, 40 + 18, 18]
    assert [run.settings.learning_rate for run in runs] == pytest.approx([0.05, 0.005, 0.05])
    assert all(torch.equal(tensor, before[name]) for name, tensor in work.module.state_dict().items())
    assert len({run.history.losses[0] for run in runs}) == 1  # the same start, and the same examples
    assert len({run.history.losses[-1] for run in runs}) == 3
    assert runs[0].adapter is not None and runs[0].adapter.pairs["body"].b.any()
    assert runs[0].score_without is not None and runs[0].score != runs[0].score_without
    assert set(losses_of(runs)) == {run.label for run in runs}
    assert {event.stage for event in events} == {
        *("training, rank 2", "training all weights", "training the head alone")
    }


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_becomes_a_plain_adapter(init: Init) -> None:
    events: list[Progress] = []
    work = trainer(events)
    before = copy.deepcopy(work.module.state_dict())
    new = layers.create_adapter(work.module, targets=["body"], rank=2, alpha=4, seed=0, modules_to_save=["head"])
    started = replace(work, options=replace(work.options, init=init))
    run, plain = started.adapter(new, 2), work.adapter(new, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in work.module.state_dict().items())
    assert run.parameters.trained == plain.parameters.trained == 2 * 12 + 18
    assert run.history.losses[0] == pytest.approx(plain.history.losses[0], abs=1e-6)
    assert run.history.losses[1:] != pytest.approx(plain.history.losses[1:], abs=1e-4)
    assert run.score_without is not None and run.adapter is not None and run.score is not None
    pair = run.adapter.pairs["body"]
    assert (pair.rank, pair.scale) == (4, 2.0) and run.rank == 2
    changes = plan.make([run.adapter], layers.specs(work.module))
    deployed = copy.deepcopy(work.module)
    layers.attach(deployed, changes)
    assert evaluate(deployed, some_data(1)).loss == pytest.approx(run.score.loss, abs=1e-6)
    assert Progress(f"factors of the weights ({init})", 1, 1, "layers") in events
    assert re.search(r" tokens/s, [1-9][0-9,]* MiB$", events[-1].detail)


def test_without_a_head_the_base_is_measured_as_it_is() -> None:
    (run,) = trainer([], heads=()).compared(["frozen"])
    assert (run.label, run.parameters.trained, run.history.losses) == ("base as it is", 0, ())
    assert run.document["final_loss"] is None and run.document["held_out"]["count"] == 32


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.inner(x)
        return scores


def test_the_head_alone_is_found_by_the_end_of_its_name() -> None:
    (run,) = replace(trainer([]), module=Outer().eval()).compared(["frozen"])
    assert (run.label, run.parameters.trained) == ("head alone", 18)


def test_a_base_that_would_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    work = trainer([], heads=())
    real = layers.attach

    def forgetful(module: nn.Module, plan: object, **options: Any) -> None:
        real(module, plan, **options)  # type: ignore[arg-type]
        module.get_parameter("head.bias").requires_grad_(True)

    monkeypatch.setattr(layers, "attach", forgetful)
    new = layers.create_adapter(work.module, targets=["body"], rank=2, alpha=4, seed=0)
    with pytest.raises(InputRefused, match=r"must be frozen, .*:\n  head\.bias"):
        work.adapter(new, 2)


def test_unknown_layers_are_refused_and_nothing_is_left(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="dens"):
        le.train(MODEL, data, tmp_path / "ad", target="dens")
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


XLM = {"vocab_size": 60, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "pad_index": 0}
WITH_A_SUMMARY = {
    "xlnet": transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=32),
    "xlm": transformers.XLMConfig(**XLM),
    "flaubert": transformers.FlaubertConfig(**XLM),
}


@pytest.mark.parametrize(
    ("name", "has_head", "given", "saved"),
    [
        ("distilbert", False, (), {"classifier", "pre_classifier"}),
        slow("distilbert", True, (), {"classifier", "pre_classifier"}),
        ("distilbert", True, ("classifier",), {"classifier", "pre_classifier"}),  # both end so, for PEFT
        ("distilbert", True, ("pre_classifier",), {"pre_classifier"}),
        ("bert", False, (), {"classifier", "bert.pooler.dense"}),
        ("electra", False, (), {"classifier"}),  # of two layers
        slow("electra", True, (), {"classifier"}),
        ("xlnet", True, (), {"logits_proj", "sequence_summary.summary"}),
        ("xlm", True, (), {"sequence_summary.summary"}),
        slow("flaubert", True, (), {"sequence_summary.summary"}),
    ],
)
def test_peft_reads_the_whole_head_of_a_classifier(
    name: str, has_head: bool, given: tuple[str, ...], saved: set[str], tmp_path: Path
) -> None:
    base, auto = tmp_path / "base", transformers.AutoModelForSequenceClassification
    if name in WITH_A_SUMMARY:
        torch.manual_seed(0)
        transformers.AutoModel.from_config(WITH_A_SUMMARY[name]).save_pretrained(base)
    else:
        small_model(name, base)
    if has_head:
        auto.from_pretrained(base, num_labels=2).save_pretrained(base)
    if name == "bert":  # a model of masked words has no pooler, which a classifier needs
        torch.manual_seed(0)
        transformers.BertForMaskedLM(MODELS["bert"][1]()).save_pretrained(base)
    words_tokenizer(base)
    lines = [{"text": f"very {word} film", "label": word} for word in ("good", "bad") * 10]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = {"target": "q_lin", "bias": "all"} if given else {}  # the bias of a head is not the whole head
    le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", epochs=1, learning_rate=1e-2, heads=given, **more)
    assert set(json.loads((tmp_path / "ad/adapter_config.json").read_text())["modules_to_save"]) == saved
    le.merge(base, tmp_path / "ad", tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=2), tmp_path / "ad").eval()
    ids = torch.arange(24).reshape(3, 8) % 9
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, theirs(ids).logits, atol=1e-6)


def test_a_head_of_an_unknown_name_stays_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, seen = tmp_path / "base", Recorder()
    torch.manual_seed(0)
    transformers.XLMForSequenceClassification(WITH_A_SUMMARY["xlm"]).save_pretrained(base)
    words_tokenizer(base)
    lines = [{"text": f"very {word} film", "label": word} for word in ("good", "bad") * 10]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    note = "note: no module of XLMForSequenceClassification has the name of a head (score), so that its head is not"
    monkeypatch.setattr("lora_export.api.training_strategies.HEADS", ("score",))
    for heads, expected in (((), True), (("sequence_summary",), False)):
        seen.messages.clear()
        le.train(base, tmp_path / "data.jsonl", tmp_path / f"{expected}", epochs=1, heads=heads, **seen.callbacks)
        assert any(message.startswith(note) for message in seen.messages) is expected


@pytest.mark.parametrize(
    ("name", "auto", "is_noted"),
    [
        ("t5", transformers.AutoModelForSequenceClassification, True),
        slow("bart", transformers.AutoModelForSequenceClassification, True),
        ("distilbert", transformers.AutoModelForSequenceClassification, False),  # one module has the table
        ("gpt2", transformers.AutoModelForCausalLM, False),  # its class declares the tie
    ],
)
def test_rows_that_peft_changes_in_one_of_several_modules_get_a_note(
    name: str, auto: Any, is_noted: bool, tmp_path: Path
) -> None:
    base, seen, is_classifier = tmp_path / "base", Recorder(), name != "gpt2"
    torch.manual_seed(0)
    classes = {"num_labels": 2} if is_classifier else {}
    auto.from_config(type(config := MODELS[name][1]()).from_dict({**config.to_dict(), **classes})).save_pretrained(base)
    words_tokenizer(base)
    lines = [
        {"text": f"very {word} film", **({"label": word} if is_classifier else {})} for word in ("good", "bad") * 10
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options: Any = {"epochs": 2, "learning_rate": 5e-2, "rank": 2, "token_indices": [3, 4]}
    le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", **options, **seen.callbacks)
    le.merge(base, tmp_path / "ad", tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(base, **classes), tmp_path / "ad").eval()
    ids = torch.tensor([[3, 4, 5, 2]])
    with torch.no_grad():
        are_same = torch.allclose(merged(ids).logits, theirs(ids).logits, atol=1e-5)
    notes = [message for message in seen.messages if "PEFT will change the rows of" in message]
    assert (not are_same, bool(notes)) == (is_noted, is_noted)
    assert all("encoder.embed_tokens.weight" in note for note in notes)


@pytest.mark.parametrize("task", ["SEQUENCE", "TOKEN"])
def test_the_head_of_every_classifier_of_transformers_has_a_known_name(task: str) -> None:
    """By the text of their classes: to import all of them takes seconds."""
    folder, text_of = Path(transformers.__file__).parent, dict[str, str]()
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING_NAMES")
    modules = {model_type_to_module_name(model_type) for model_type in names}
    files = [path for each in modules for path in folder.glob(f"models/{each}/modeling_*.py")]
    for path in (folder / "modeling_layers.py", *files):
        parts = re.split(r"^class (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        text_of |= dict(zip(parts[1::2], parts[2::2], strict=True))
    known = re.compile(rf"self\.({'|'.join(HEADS)}) = ")

    def is_known(name: str) -> bool:
        first_base = text_of[name].partition("(")[2].partition(")")[0].partition(",")[0]
        return any(known.search(text_of.get(each, "")) for each in (name, first_base))

    assert len(names) > 50
    unknown = {name for name in names.values() if not is_known(name)}
    assert unknown <= {"PerceiverForSequenceClassification"}  # its head is a part of the base model


def test_a_rank_beyond_a_layer_is_refused(data: Path, tmp_path: Path) -> None:
    for target in ("dense", "all-linear"):
        with pytest.raises(InputRefused, match=r"larger than 1 of 1 layers.*\n  `dense` is 8 × 8, its rank 9"):
            le.train(MODEL, data, tmp_path / "ad", rank=9, target=target)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_of_all_linear_layers_some_may_be_smaller_than_the_rank(tmp_path: Path) -> None:
    (tmp_path / "small_head.py").write_text(
        "import torch\n\ndef make():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 2)), torch.ones(2, 8)\n"
    )
    inputs = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", input=inputs, labels=(inputs[:, 0] > 0).astype(np.int64))
    seen, model = Recorder(), f"{tmp_path}/small_head.py:make"
    result = le.train(model, tmp_path / "a.npz", tmp_path / "ad", rank=4, epochs=1, **seen.callbacks)
    assert set(result.adapter.pairs) == {"0", "1"}
    assert "note: the rank is larger than 1 of 2 layers, such as `1` is 2 × 6, its rank 4" in seen.messages
    with pytest.raises(InputRefused, match="larger than 1 of 1 layers"):
        le.train(model, tmp_path / "a.npz", tmp_path / "other", rank=4, epochs=1, target="1")
    with pytest.raises(InputRefused, match=r"larger than 2 of 2 layers.*\n  `0` is 6 × 8, its rank 9\n  `1` is 2 × 6"):
        le.train(model, tmp_path / "a.npz", tmp_path / "other", rank=4, epochs=1, rank_pattern={"0": 9})
    with pytest.raises(InputRefused, match=r"larger than 1 of 2 layers.*\n  `1` is 2 × 6, its rank 3"):
        le.train(model, tmp_path / "a.npz", tmp_path / "other", rank=2, epochs=1, rank_pattern={"1": 3})


class ReadNet(Net):
    """Its forward reads the weight of `read`, as Mamba that of `dt_proj` and WavLM those of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        twin = copy.deepcopy(self)  # as one is made to find out whether a model computes padding
        for _ in range(2):
            twin.body(x)
        scores: Tensor = self.head(torch.tanh(self.body(x)) @ self.read.weight)
        return scores


class AttendingNet(Net):
    """Its attention is PyTorch's own, which reads the weight of its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        words = torch.tanh(self.body(x))[:, None]
        scores: Tensor = self.head(self.attention(words, words, words)[0][:, 0])
        return scores


@pytest.mark.parametrize("is_scored", [True, False])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_output_projection_that_is_named_alone_is_noted(compile: bool, is_scored: bool) -> None:
    work = trainer([], heads=())
    settings = replace(work.settings, compile=compile, epochs=1)
    work = replace(work, module=AttendingNet().eval(), settings=settings, held_out=work.held_out if is_scored else None)
    both = ["attention", "out_proj"]  # has a note of its own
    for targets, uncalled in ((["out_proj"], ("attention.out_proj",)), (both, ())):
        new = layers.create_adapter(work.module, targets=["body", *targets], rank=2, alpha=4, seed=0)
        assert {"attention.out_proj"} <= new.pairs.keys()
        assert work.adapter(new, 2).uncalled == uncalled

    module = AttendingNet().eval()
    theirs = peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(r=2, target_modules=["out_proj"]))
    nn.init.ones_(theirs.base_model.model.get_submodule("attention.out_proj").lora_B["default"].weight)
    x = work.data.inputs["x"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), module(x))


@pytest.mark.slow
def test_a_layer_that_peft_does_not_run_is_noted_after_compiled_steps() -> None:
    work = trainer([], heads=())
    work = replace(work, module=ReadNet().eval(), settings=replace(work.settings, compile=True, epochs=1))
    new = layers.create_adapter(work.module, targets=["body", "read"], rank=2, alpha=4, seed=0)
    assert work.adapter(new, 2).uncalled == ("read",)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_layer_that_peft_does_not_run_is_noted(init: Init) -> None:
    work = trainer([], heads=())
    module = ReadNet().eval()
    work = replace(work, module=module, options=replace(work.options, init=init))
    x, before = work.data.inputs["x"], copy.deepcopy(module)
    targets = ["body", "read", "unused"]
    run = work.adapter(layers.create_adapter(module, targets=targets, rank=2, alpha=4, seed=0), 2)
    assert run.uncalled == ("read",)
    assert "the weights of 1 layer itself, such as read." in note_on_uncalled(run)
    assert note_on_uncalled(replace(run, uncalled=())) == ""

    theirs = peft.get_peft_model(before, peft.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        base = theirs(x)
        for name, changed in (("read", False), ("body", True)):
            nn.init.ones_(theirs.base_model.model.get_submodule(name).lora_B["default"].weight)
            assert bool((theirs(x) != base).any()) == changed


def laguna() -> transformers.LagunaConfig:
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
    return transformers.LagunaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, mlp_layer_types=["dense", "sparse"],
        **sizes, **heads,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["deepseek_v3", "laguna", "qwen3_moe", slow("mixtral"), slow("llama")])
def test_layers_that_peft_does_not_find_are_noted(name: str, tmp_path: Path) -> None:
    base, seen = tmp_path / "base", Recorder()
    architecture, config = {**MORE_MODELS, "laguna": ("LagunaForCausalLM", laguna)}[name]
    getattr(transformers, architecture)(config()).save_pretrained(base)
    words_tokenizer(base)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "very good film"}) + "\n")
    le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", rank=1, epochs=1, holdout=0, **seen.callbacks)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    found = peft.PeftModel.from_pretrained(model, tmp_path / "ad").state_dict()
    saved = load_file(tmp_path / "ad/adapter_model.safetensors")
    places = {key: found.get(key.replace(".weight", ".default.weight")) for key in saved}
    is_lost = any(places[key] is None or not np.array_equal(places[key], value) for key, value in saved.items())
    noted = {"deepseek_v3": "for experts of this model", "laguna": "under names with two dots"}.get(name, "")
    assert is_lost == bool(noted) == ("PEFT up to 0.21" in str(seen.messages)) and noted in str(seen.messages)

    notes = le.convert(tmp_path / "ad", tmp_path / "converted", to="peft", base=base).notes
    le.merge(base, tmp_path / "ad", tmp_path / "merged")
    extracting = Recorder()
    le.extract(base, tmp_path / "merged", tmp_path / "extracted", rank=1, **extracting.callbacks)
    for messages in (notes, extracting.messages):
        assert is_lost == ("PEFT up to 0.21" in str(messages)) and noted in str(messages)
