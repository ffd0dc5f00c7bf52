"""The adapters that `train` starts from: new ones, and trained ones that are continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lora_export as le
from lora_export import formats
from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.train import AdapterChoice
from lora_export.training.order import ShuffledOrder
from support.peft_models import fill
from support.small_models import small_adapter, small_model, words_tokenizer

LINES = [f"very {'good' if n % 2 else 'bad'} film the {'a' if n % 3 else 'very'} film" for n in range(16)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    words_tokenizer(small_model("llama", tmp_path / "base"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return tmp_path


def pefts_losses(model: Any, base: Path) -> list[float]:
    """A loop written here, in the order that ours has."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    order, found = ShuffledOrder(16, 4, 0), []
    for step in range(8):
        batch = tokenizer([LINES[row] for row in order.rows_of(step)], return_tensors="pt")
        loss = model(**batch, labels=batch["input_ids"]).loss
        found.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.slow
def test_what_peft_trained_is_continued_with_its_losses(texts: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(texts / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"v_proj": 2}
    )
    torch.manual_seed(3)
    start = peft.get_peft_model(base, config)
    fill(start, std=0.1)
    start.save_pretrained(texts / "theirs")
    settings = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2, "warmup": 0.0, "holdout": 0.0}
    settings |= {"schedule": "constant"}
    ours = le.train(texts / "base", texts / "data.jsonl", texts / "ad", continue_from=texts / "theirs", **settings)
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(texts / "base"), texts / "theirs", is_trainable=True
    ).train()
    expected = pefts_losses(model, texts / "base")
    assert ours.history.losses == pytest.approx(expected, abs=1e-5)
    assert {(pair.rank, round(pair.scale, 6)) for pair in ours.adapter.pairs.values()} == {
        (4, 4.0),
        (2, round(8 / 2**0.5, 6)),
    }
    written = json.loads((texts / "ad/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 8, True)
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(texts / "base"), texts / "ad"
    )
    ids = torch.arange(24).reshape(3, 8) % 9
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_any_format_is_continued(texts: Path) -> None:
    """The names of kohya are those of a base without dots, and llama.cpp orders rows by its heads."""
    small_adapter("llama", texts / "base", texts / "peft")
    settings = {"batch_size": 4, "epochs": 1, "learning_rate": 1e-2, "holdout": 0.0}
    losses = {}
    for to, base in (("peft", None), ("kohya", None), ("mlx", None), ("gguf", texts / "base")):
        given = texts / "peft" if to == "peft" else le.convert(texts / "peft", texts / to, to=to, base=base).output
        result = le.train(texts / "base", texts / "data.jsonl", texts / f"{to} ad", continue_from=given, **settings)
        losses[to] = result.history.losses
    assert len(set(losses["peft"])) == 4
    for own in losses.values():
        assert own == pytest.approx(losses["peft"], abs=1e-5)


@pytest.mark.slow
def test_a_continued_classifier_keeps_its_head_and_its_classes(texts: Path) -> None:
    rows = [{"text": line, "label": "xy"[n % 2]} for n, line in enumerate(LINES)]
    (texts / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"epochs": 6, "batch_size": 4, "learning_rate": 3e-2}
    first = le.train(texts / "base", texts / "labelled.jsonl", texts / "first", rank=2, bias="all", **settings)
    second = le.train(
        texts / "base", texts / "labelled.jsonl", texts / "second", continue_from=texts / "first", **settings
    )
    assert second.history.losses[0] < first.history.losses[0] - 0.05
    assert second.adapter.replaced.keys() == first.adapter.replaced.keys()
    assert any(name.endswith("score.weight") for name in second.adapter.replaced)
    other = [{**row, "label": row["label"].replace("y", "z")} for row in rows]
    (texts / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    with pytest.raises(InputRefused, match="was trained on the classes x, y, and the data has x, z"):
        le.train(texts / "base", texts / "other.jsonl", texts / "third", continue_from=texts / "first", **settings)


def test_every_option_of_a_new_adapter_reaches_the_file(texts: Path) -> None:
    result = le.train(
        texts / "base", texts / "data.jsonl", texts / "ad", rank=2, target="q_proj,v_proj", dora=True, dropout=0.1,
        rank_pattern={"v_proj": 1}, alpha_pattern={"v_proj": 3.0}, token_indices=[3, 5], epochs=1, learning_rate=1e-2,
    )  # fmt: skip
    config = json.loads((texts / "ad/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["lora_dropout"]) == (2, 4, True, 0.1)
    assert set(config["rank_pattern"].values()) == {1} and set(config["alpha_pattern"].values()) == {3}
    assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 5]}
    assert {(pair.rank, pair.scale) for pair in result.adapter.pairs.values()} == {(2, 2.0), (1, 3.0)}
    before = transformers.AutoModelForCausalLM.from_pretrained(texts / "base").get_input_embeddings().weight
    (rows,) = result.adapter.token_rows.values()
    assert (rows.values != before[[3, 5]].detach().numpy()).any()
    le.merge(texts / "base", texts / "ad", texts / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(texts / "merged").eval()
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(texts / "base"), texts / "ad"
    ).eval()
    ids = torch.arange(24).reshape(3, 8) % 9
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_is_saved_for_the_unchanged_base(init: Any, texts: Path) -> None:
    files = {path: path.read_bytes() for path in sorted((texts / "base").rglob("*")) if path.is_file()}
    settings = {"rank": 2, "init": init, "rslora": True, "dropout": 0.1, "rank_pattern": {"v_proj": 1}}
    settings |= {"target": "q_proj,v_proj,down_proj", "epochs": 2, "batch_size": 4, "learning_rate": 1e-2}
    result = le.train(texts / "base", texts / "data.jsonl", texts / "ad", **settings)
    assert {path: path.read_bytes() for path in sorted((texts / "base").rglob("*")) if path.is_file()} == files
    assert result.scores["adapter"].loss < result.scores["adapter_off"].loss - 0.01
    config = json.loads((texts / "ad/adapter_config.json").read_text())
    assert (config["r"], set(config["rank_pattern"].values()), config["init_lora_weights"]) == (4, {2}, True)
    assert f"`{init} of rank 2`" in (texts / "ad/README.md").read_text()
    le.merge(texts / "base", texts / "ad", texts / "merged")
    merged, base = (
        transformers.AutoModelForCausalLM.from_pretrained(texts / name).eval() for name in ("merged", "base")
    )
    ids = torch.arange(24).reshape(3, 8) % 9
    with torch.no_grad():
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, texts / "ad").eval()
        assert (merged(ids).logits - before).abs().max() > 1e-2
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_start_from_the_weights_is_resumed_to_the_last_bit(texts: Path) -> None:
    settings = {"rank": 2, "init": "pissa", "epochs": 2, "batch_size": 4, "learning_rate": 1e-2}
    whole = le.train(texts / "base", texts / "data.jsonl", texts / "whole", **settings)

    def interrupt(event: Any) -> None:
        if event.unit == "steps" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        le.train(texts / "base", texts / "data.jsonl", texts / "ad", **settings, on_progress=interrupt)
    with pytest.raises(InputRefused, match="init was pissa, and is olora"):
        le.train(texts / "base", texts / "data.jsonl", texts / "ad", **settings | {"init": "olora"}, resume=True)
    resumed = le.train(texts / "base", texts / "data.jsonl", texts / "ad", **settings, resume=True)
    assert resumed.history.losses == whole.history.losses
    assert resumed.adapter.sha256 == whole.adapter.sha256


@pytest.mark.slow
def test_each_rank_starts_from_the_weights(texts: Path) -> None:
    settings = {"rank": (1, 2), "init": "olora", "target": "q_proj", "epochs": 1}
    result = le.train(texts / "base", texts / "data.jsonl", texts / "ad", **settings)
    assert [{pair.rank for pair in adapter.pairs.values()} for adapter in result.adapters] == [{2}, {4}]
    assert [run.rank for run in result.runs] == [1, 2]
    with pytest.raises(InputRefused, match="the rank is larger than 2 of 14 layers"):
        le.train(texts / "base", texts / "data.jsonl", texts / "no", rank_pattern={"q_proj": 17}, init="pissa")
    assert not (texts / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": (2, 2)}, "each rank= is given once"),
        ({"continue_from": Path("ad"), "rank": (4,), "target": "q"}, "rank=, target= cannot be given beside it"),
        ({"continue_from": Path("ad"), "token_indices": (4,)}, "token_indices= cannot be given beside it"),
        ({"continue_from": Path("ad"), "init": "pissa"}, "init= cannot be given beside it"),
        ({"init": "pissa", "dora": True}, 'init="pissa" trains one pair beside .* not possible with dora='),
        (
            {"init": "olora", "target_parameters": ("down_proj",)},
            'init="olora" trains one pair beside .* not possible with target_parameters=',
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        AdapterChoice(**options)


def test_a_change_of_biases_is_not_continued(texts: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(texts / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(texts / "theirs")
    with pytest.raises(InputRefused, match=r"adds to vectors, which is not trained further: model\.layers\.0"):
        le.train(texts / "base", texts / "data.jsonl", texts / "ad", continue_from=texts / "theirs")
    assert not (texts / "ad").exists()


def test_how_a_continued_adapter_was_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.attn = nn.MultiheadAttention(4, 2)\n\n"
        "    def forward(self, x):\n        return self.attn(x, x, x)[0]\n\n\n"
        "def make():\n    torch.manual_seed(0)\n    return Net(), {'x': torch.randn(3, 2, 4)}\n\n\n"
        "def data():\n    x = torch.randn(4, 3, 2, 4)\n"
        "    return [({'x': rows}, rows) for rows in x], lambda outputs, wanted: (outputs - wanted).square().mean()\n"
    )
    net = le.load_model(f"{tmp_path}/own_net.py:make").module
    options = peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)
    peft.get_peft_model(net, options).save_pretrained(tmp_path / "theirs")
    seen: list[str] = []
    le.train(
        f"{tmp_path}/own_net.py:make",
        f"{tmp_path}/own_net.py:data",
        tmp_path / "ad",
        continue_from=tmp_path / "theirs",
        holdout=0.0,
        on_message=seen.append,
    )
    assert any(line.startswith("note: attn.out_proj: PEFT up to 0.21 adds the output projection's") for line in seen)
    pairs = formats.load(tmp_path / "ad").pairs
    assert pairs["attn.out_proj"].scale == 2 * pairs["attn"].scale
