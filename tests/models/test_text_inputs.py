"""The generated texts: special tokens, padding, ends, boxes, what is left out, and their lengths."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_export.models import text_inputs
from lora_export.models.load import load_model
from lora_export.models.text_inputs import LONG, PAST_WINDOW, padding_mask, placeholders, text_part
from support.small_models import MODELS, TEXT, small_model


def test_boxes_have_their_corners_in_order(tmp_path: Path) -> None:
    boxes = load_model(str(small_model("layoutlm", tmp_path))).example_inputs()["bbox"]
    assert (boxes[..., :2] <= boxes[..., 2:]).all()
    assert boxes.min() >= 0 and 50 < boxes.max() < 100


def test_a_text_of_clip_ends_where_its_padding_begins(tmp_path: Path) -> None:
    base = small_model("clip", tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (base / "config.json").write_text(json.dumps(config))
    inputs = load_model(str(base)).inputs({"batch": 3, "sequence": 9}, seed=2)
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        assert [position for position, token in enumerate(ids) if token == 7] == [
            max(position for position, seen in enumerate(mask) if seen)
        ]


def test_a_classifier_of_an_encoder_decoder_gets_texts_with_one_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BartForSequenceClassification(MODELS["bart"][1]()).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.input_names == ("input_ids", "attention_mask")
    inputs = model.inputs({"batch": 5, "sequence": 29}, seed=0)
    assert (inputs["input_ids"] == 2).sum(1).tolist() == [1] * 5
    with torch.no_grad():
        assert model.module(**inputs).logits.shape == (5, 3)


@pytest.mark.parametrize(("image", "video"), [(2, 3), (3, 2)])
def test_a_text_without_images_has_no_placeholder(tmp_path: Path, image: int, video: int) -> None:
    """The token after the video's may be the image's, as in Muse Glimmer and LLaVA-NeXT-Video."""
    config = SimpleNamespace(vocab_size=5, image_token_id=image, video_token_id=video)
    config.get_text_config = lambda: config
    part = text_part(SimpleNamespace(config=config), ["input_ids"], tmp_path)
    assert part is not None
    ids = part.make({"batch": 8, "sequence": 16}, torch.Generator().manual_seed(0))["input_ids"]
    assert set(ids.unique().tolist()) == {0, 1, 2, 3, 4} - {image, video}


def test_special_tokens_are_drawn_and_padding_holds_its_token(tmp_path: Path) -> None:
    """A fault in the row of [MASK] or [PAD] could not show: in a large vocabulary they would never be drawn."""
    config = transformers.BertConfig(
        vocab_size=30_000,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        pad_token_id=3,
        bos_token_id=11,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokens = [{"id": 101, "content": "[CLS]", "special": True}, {"id": 103, "content": "[MASK]", "special": True}]
    tokens += [{"id": 500, "content": "word", "special": False}, {"id": 10**6, "content": "far", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    model = load_model(str(tmp_path))
    cases = [model.inputs(sizes, seed=seed) for seed, sizes in enumerate(model.checked_sizes({}))]
    drawn = {token for case in cases for token in case["input_ids"][case["attention_mask"] == 1].tolist()}
    assert {3, 11, 101, 103} <= drawn and 500 not in drawn and max(drawn) < 30_000
    assert {token for case in cases for token in case["input_ids"][case["attention_mask"] == 0].tolist()} == {3}


def test_sounds_among_tokens_are_left_out_and_listed(tmp_path: Path) -> None:
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = transformers.Qwen2AudioConfig(
        audio_config={**audio, "num_mel_bins": 8, "max_source_positions": 20},
        text_config=transformers.Qwen2Config(**TEXT, num_key_value_heads=2),
        audio_token_index=5,
    )
    transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.input_names == ("input_ids", "attention_mask") and model.text_only is None
    assert not any((model.inputs({"batch": 9, "sequence": 50}, seed=seed)["input_ids"] == 5).any() for seed in range(3))
    assert model.not_judged == (
        "Qwen2AudioForConditionalGeneration with sounds among its tokens. They are no part of the generated inputs: "
        "give them by inputs=",
    )


def test_images_of_an_unknown_form_are_left_out_with_the_reason(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "image_size": 16, "patch_size": 4, "image_token_id": 5}
    config = transformers.FuyuConfig(text_config={**TEXT, "model_type": "persimmon"}, **sizes)
    transformers.FuyuForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.input_names == ("input_ids", "attention_mask")
    (left_out,) = model.not_judged
    assert left_out.startswith("FuyuForCausalLM with images among its tokens (it has no get_image_features)")


def test_videos_are_listed_where_images_are_drawn(tmp_path: Path) -> None:
    model = load_model(str(small_model("qwen2_vl", tmp_path)))
    assert "pixel_values" in model.input_names
    assert [text.partition(" among")[0] for text in model.not_judged] == ["Qwen2VLForConditionalGeneration with videos"]


TAPAS = {**TEXT, "max_position_embeddings": 64, "type_vocab_sizes": [3, 16, 16, 2, 16, 16, 10]}
XLNET = {"vocab_size": 60, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "d_head": 8}


@pytest.mark.parametrize(
    ("name", "fields", "most"), [("Tapas", TAPAS, [2, 15, 15, 1, 15, 15, 9]), ("XLNet", XLNET, [2])]
)
def test_token_types_that_no_single_size_describes_are_drawn(
    name: str, fields: dict[str, Any], most: list[int], tmp_path: Path
) -> None:
    """Their graphs had no input for them: the columns and rows of a table's cells, and which of two texts it is."""
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    types = model.inputs({"batch": 9, "sequence": 29}, seed=1)["token_type_ids"].reshape(9, 29, -1)
    assert types.amax((0, 1)).tolist() == most and not types.amin()
    assert model.axes["token_type_ids"] == {0: "batch", 1: "sequence"}
    with torch.no_grad():
        model.module(**model.example_inputs())


def test_of_two_configs_of_texts_the_encoder_has_the_tokens(tmp_path: Path) -> None:
    """MusicGen's: `get_text_config` fails on it."""
    texts = transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    sounds = transformers.EncodecConfig(
        num_filters=4, upsampling_ratios=[2, 2], hidden_size=8, codebook_size=64, codebook_dim=8, num_lstm_layers=1
    )
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=64, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, hidden_size=16, num_codebooks=2
    )
    parts = {"text_encoder": texts, "audio_encoder": sounds, "decoder": decoder}
    config = transformers.MusicgenConfig(**{name: part.to_dict() for name, part in parts.items()})
    transformers.MusicgenForConditionalGeneration(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).example_inputs()["input_ids"].max() < 60


@pytest.mark.parametrize("value", [10**30, -1, True, "a", None])
def test_a_placeholder_that_is_no_token_is_left_out(value: Any) -> None:
    assert placeholders(SimpleNamespace(image_token_id=value, video_token_id=7)) == [7]


def test_every_row_but_the_first_has_padding_at_one_end() -> None:
    for seed in range(20):
        mask = padding_mask((5, 9), torch.Generator().manual_seed(seed))
        assert mask.shape == (5, 9) and set(mask.unique().tolist()) == {0, 1}
        assert (mask[1:].sum(1) < 9).all() and (mask.sum(1) >= 3).all()
        assert (mask[[1, 3], -1] == 0).all() and (mask[[2, 4], 0] == 0).all()
        assert mask[3, :4].tolist() == [1, 1, 0, 1], "a hole"


def test_a_text_alone_has_no_padding_unless_it_is_long() -> None:
    for shape, padding in (((1, 5), 0), ((1, 29), 0), ((1, 96), 3), ((2, 1), 0)):
        mask = padding_mask(shape, torch.Generator().manual_seed(0))
        assert (mask == 0).sum() == padding and mask[:, 0].all()


def test_one_text_has_token_types_of_zero(tmp_path: Path) -> None:
    model = load_model(str(small_model("bert", tmp_path)))
    types = [model.inputs(sizes, seed=3)["token_type_ids"].unique().tolist() for sizes in model.checked_sizes({})]
    assert types[0] == [0] and [0, 1] in types


TEXTS, BOTH = {"batch", "sequence"}, {"batch", "sequence", "target"}


def lengths_of(config: Any, symbols: set[str] = TEXTS, architecture: str = "") -> text_inputs.TextLengths:
    cls = getattr(transformers, architecture) if architecture else transformers.AutoModel
    module = cls(config) if architecture else cls.from_config(config)
    return text_inputs.text_lengths(module, symbols)


def mistral(window: int | None, **fields: Any) -> Any:
    return transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=window, **fields)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("bert", 64),
        ("roberta", 64),  # 66 rows, of which two are before the first token
        ("gpt2", 64),
        ("opt", 2048),  # 2050 rows
        ("clip", 40),
        ("t5", None),
    ],
)
def test_position_tables_limit_the_length(name: str, most: int | None) -> None:
    architecture, config = MODELS[name]
    found = lengths_of(config(), TEXTS, architecture)
    assert found.limits["sequence"] == (0, most)
    assert found.long == {"sequence": min(LONG, most or LONG)}


def test_mpt_has_as_many_positions_as_its_alibi() -> None:
    found = lengths_of(transformers.MptConfig(vocab_size=60, d_model=16, n_layers=1, n_heads=2, max_seq_len=40))
    assert (found.most("sequence"), found.long) == (40, {"sequence": 40})


def test_encoder_and_decoder_have_limits_of_their_own() -> None:
    architecture, config = MODELS["bart"]
    made = config()
    module = getattr(transformers, architecture)(made)
    module.model.decoder.embed_positions = nn.Embedding(30, 16)
    found = text_inputs.text_lengths(module, BOTH)
    assert (found.most("sequence"), found.most("target")) == (64, 30)
    assert found.long == {"sequence": 64, "target": 30}


def test_the_decoder_of_prophetnet_looks_up_the_position_of_the_next_token() -> None:
    sizes = {"hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    module = transformers.ProphetNetModel(transformers.ProphetNetConfig(vocab_size=60, **sizes, **heads, **layers))
    found = text_inputs.text_lengths(module, BOTH)
    assert (found.most("sequence"), found.most("target")) == (31, 30)
    texts, targets = torch.ones(1, 31, dtype=torch.long), torch.ones(1, 31, dtype=torch.long)
    module(input_ids=texts, decoder_input_ids=targets[:, :30])
    with pytest.raises(IndexError):
        module(input_ids=texts, decoder_input_ids=targets)


@pytest.mark.parametrize(("window", "length"), [(None, LONG), (32, LONG), (200, 200 + PAST_WINDOW)])
def test_long_text_passes_the_sliding_window(window: int | None, length: int) -> None:
    found = lengths_of(mistral(window, max_position_embeddings=512))
    assert (found.long, found.not_judged) == ({"sequence": length}, "")


def test_long_text_passes_the_longest_window_of_layers_that_differ() -> None:
    windows = {0: {"sliding_window": 120}, 1: {"sliding_window": None}}
    found = lengths_of(mistral(8, max_position_embeddings=512, per_layer_config=windows))
    assert found.long == {"sequence": 120 + PAST_WINDOW}


def test_window_too_long_for_a_mask_is_noted() -> None:
    found = lengths_of(mistral(100_000, max_position_embeddings=200_000))
    assert found.long == {"sequence": LONG}
    assert found.not_judged.startswith(
        "what the model leaves out, or computes in another way, beyond 100,000 tokens. Generated texts have up to 96"
    )


def test_large_models_get_shorter_texts_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mistral(200, max_position_embeddings=512)
    parameters = sum(each.numel() for each in transformers.AutoModel.from_config(config).parameters())
    monkeypatch.setattr(text_inputs, "MOST_WORK", 100.0 * parameters)
    found = lengths_of(config)
    assert found.long == {"sequence": LONG}
    assert found.not_judged == (
        "what the model leaves out, or computes in another way, beyond 200 tokens. Generated texts have up to 96 "
        "tokens. Give a longer one by inputs="
    )
    monkeypatch.setattr(text_inputs, "MOST_WORK", 10.0 * parameters)
    found = lengths_of(mistral(None, max_position_embeddings=512))
    assert not found.long and found.not_judged.startswith("texts of more than 29 tokens")


def test_window_beyond_the_position_table_is_not_noted() -> None:
    found = lengths_of(mistral(200, max_position_embeddings=100))
    assert (found.long, found.not_judged) == ({"sequence": 100}, "")


def test_models_without_texts_have_no_long_text() -> None:
    found = lengths_of(MODELS["vit"][1](), {"batch"}, MODELS["vit"][0])
    assert found == text_inputs.TextLengths({}, {})
