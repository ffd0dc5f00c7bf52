"""Encoder-decoders as three graphs: what these take and return, their weights' names, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import peft
import pytest
import torch
import transformers as hf

import lora_export as le
from lora_export import layers
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.models import encoder_decoder
from lora_export.models.encoder_decoder import EncoderDecoderGraphs, export_encoder_decoder, is_encoder_decoder
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.plan import Layout
from support.generators import DECODERS, ENCODER_DECODERS, FRAMES, MELS, small_encoder_decoder
from support.more_models import MORE_MODELS
from support.slow import slow

KINDS = [slow(name) for name in ("t5", "whisper", "bart")]
Exported = Callable[[str], tuple[Model, EncoderDecoderGraphs]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model of each kind, and its graphs. Exported once."""

    @functools.cache
    def export(name: str) -> tuple[Model, EncoderDecoderGraphs]:
        model = load_model(str(small_encoder_decoder(name, tmp_path_factory.mktemp(name))))
        return model, export_encoder_decoder(model)

    return export


def names_of(graph: ir.Model) -> tuple[list[str], list[str]]:
    return [value.name or "" for value in graph.graph.inputs], [value.name or "" for value in graph.graph.outputs]


def cache(begin: str, *parts: str) -> set[str]:
    return {f"{begin}.{layer}.{part}.{half}" for layer in (0, 1) for part in parts for half in ("key", "value")}


@pytest.mark.parametrize("name", KINDS)
def test_graphs_take_and_return_what_optimum_expects(name: str, exported: Exported) -> None:
    encoder, decoder, with_past = map(names_of, exported(name)[1])
    mask = [] if name == "whisper" else ["encoder_attention_mask"]
    reads = ["input_features"] if name == "whisper" else ["input_ids", "attention_mask"]
    assert encoder == (reads, ["last_hidden_state"])
    assert set(decoder[0]) == {"input_ids", "encoder_hidden_states", *mask}
    assert set(decoder[1]) == {"logits"} | cache("present", "decoder", "encoder")
    assert set(with_past[0]) == {"input_ids", *mask} | cache("past_key_values", "decoder", "encoder")
    assert set(with_past[1]) == {"logits"} | cache("present", "decoder")
    past = [name for name in with_past[0] if name.startswith("past")]
    assert past[:5] == [
        *(f"past_key_values.0.{part}.{half}" for part in ("decoder", "encoder") for half in ("key", "value")),
        "past_key_values.1.decoder.key",
    ]


@pytest.mark.slow
def test_axes_vary_and_have_names(exported: Exported) -> None:
    shapes = {value.name: str(value.shape) for graph in exported("t5")[1] for value in graph.graph.inputs}
    assert shapes["encoder_hidden_states"] == "[batch,encoder_sequence,32]"
    assert shapes["past_key_values.0.decoder.key"] == "[batch,4,past,8]"
    assert shapes["past_key_values.0.encoder.key"] == "[batch,4,encoder_sequence,8]"
    shapes = {value.name: str(value.shape) for graph in exported("whisper")[1] for value in graph.graph.inputs}
    assert shapes["input_features"] == f"[batch,{MELS},{FRAMES}]", "a sound of Whisper has one length"
    assert shapes["past_key_values.1.encoder.value"] == f"[batch,4,{FRAMES // 2},8]"


@pytest.mark.parametrize("name", KINDS)
def test_weights_have_the_names_of_the_model(name: str, exported: Exported) -> None:
    model, graphs = exported(name)
    specs = layers.specs(model.module)
    own = {alias for spec in specs for alias in (spec.name, *spec.aliases)}
    found = [set(find_sites(graph).by_name) for graph in graphs]
    assert found[0] | found[1] | found[2] <= own
    read = found[0] | found[1]
    lacking = [
        spec.name for spec in specs if spec.layout is Layout.OUT_IN and read.isdisjoint((spec.name, *spec.aliases))
    ]
    assert not lacking
    linear = [name for name in found[1] - found[2] if name.endswith("weight")]
    assert linear
    assert all(("attn" in name or "EncDecAttention" in name) for name in linear), (
        "k and v of the encoder's output alone"
    )


@pytest.mark.slow
def test_export_leaves_the_model_as_it_was(exported: Exported, tmp_path: Path) -> None:
    model, _ = exported("t5")
    module: Any = model.module
    fresh = load_model(str(small_encoder_decoder("t5", tmp_path))).module.state_dict()
    assert module.config.use_cache is False and "forward" not in vars(module)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in module.state_dict().items())


def test_decoder_that_reads_more_of_its_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(small_encoder_decoder("bart", tmp_path)))
    encoder: Any = model.module.get_encoder()  # type: ignore[operator]
    forward = encoder.forward

    def with_mask(*args: object, **rest: object) -> Any:
        outputs = forward(*args, **rest)
        outputs["mask"] = outputs.last_hidden_state[..., 0]
        return outputs

    monkeypatch.setattr(encoder, "forward", with_mask)
    with pytest.raises(InputRefused, match="its decoder may read mask of its encoder, too"):
        export_encoder_decoder(model)


def test_kinds_of_models_are_told_apart() -> None:
    assert is_encoder_decoder(ENCODER_DECODERS["bart"]())
    assert not is_encoder_decoder(DECODERS["llama"]())
    assert not is_encoder_decoder(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_cache_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(small_encoder_decoder("bart", tmp_path)))
    forward = model.module.forward

    def without_cache(*args: object, **rest: object) -> object:
        outputs = forward(*args, **rest)
        outputs.past_key_values = {}
        return outputs

    monkeypatch.setattr(model.module, "forward", without_cache)
    with pytest.raises(InputRefused, match="BartForConditionalGeneration has a cache of dict: graphs with a cache"):
        export_encoder_decoder(model)


def moonshine() -> Any:
    architecture, config = MORE_MODELS["moonshine"]
    torch.manual_seed(0)
    return getattr(hf, architecture)(config()).eval()


def test_decoder_may_look_for_fields_that_its_encoder_alone_returns() -> None:
    """Moonshine's decoder reads the mask that its encoder returns, which is None here."""
    module = moonshine()
    with torch.no_grad():
        outputs = module.get_encoder()(torch.randn(2, 2000))
    alone = encoder_decoder._hidden_states_alone(outputs)
    assert dict(alone) == {"last_hidden_state": alone.last_hidden_state} and alone.attention_mask is None
    cache = encoder_decoder._DecoderExporter(module, alone, None, True, None).cache()
    assert len(cache.cross_attention_cache.layers) == 2


@pytest.mark.slow
def test_moonshine_with_an_adapter_is_proven(tmp_path: Path) -> None:
    module = moonshine()
    module.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False)
    peft.get_peft_model(module, options).save_pretrained(tmp_path / "adapter")
    result = le.export_onnx(tmp_path / "base", tmp_path / "out", adapters=tmp_path / "adapter", with_cache=True)
    assert result.proof is not None and result.proof.verdict.same
