"""Merges into GGUF files. PyTorch's W + s·BA in fp64, the grids of ggml and the package gguf are the oracles."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lora_export
from lora_export import formats, plan, provenance
from lora_export.errors import InputRefused, MatchError, WrongUsage
from lora_export.storage import block_copy
from lora_export.storage.gguf_blocks import CODECS
from lora_export.storage.gguf_file import BY_NAME, open_gguf
from lora_export.weights.apply_step import Backend
from lora_export.weights.gguf.base import open_base
from lora_export.weights.gguf.merge import merge_gguf
from support.gguf_files import (
    HEADS,
    KEY_HEADS,
    SIZES,
    Kind,
    calibration_of,
    llama,
    llama_rows,
    runnable,
    stacked_experts,
    tensors_of,
    types_of,
    values_of,
    write_llama,
    written,
)
from support.handmade import peft_adapter
from support.peft_models import trained
from support.slow import slow

Array = NDArray[Any]
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
LAYER = "model.layers.0."
STRONG, WEAK = 1.0, 0.01  # changes of a third, and of a few thousandths, of the weights


@functools.cache
def peft_model(alpha: float) -> peft.PeftModel:
    return trained(llama(), r=4, lora_alpha=0.1 * alpha, target_modules=TARGETS).double()


def an_adapter(folder: Path, *, alpha: float = STRONG) -> tuple[Path, Mapping[str, Array]]:
    """PEFT's adapter in a folder, and its s·BA in fp64 by the names of llama.cpp, in llama.cpp's order of rows."""
    model = peft_model(alpha)
    model.save_pretrained(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    changes = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            own = name.removeprefix("base_model.model.")
            change = module.get_delta_weight("default").detach().numpy()
            heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(own.split(".")[-1])
            stored = names.get_name(own)
            changes[f"{stored}.weight"] = change if heads is None else llama_rows(change, heads)
    return folder, changes


def blocks_of(path: Path) -> dict[str, NDArray[np.uint8]]:
    return {tensor.name: np.asarray(tensor.data) for tensor in tensors_of(path)}


def distance_to_grid(path: Path, name: str, value: Array) -> Array:
    """How far the nearest value of the grid of a tensor is, by trying every code in fp64."""
    kind = types_of(path)[name]
    codec = CODECS[BY_NAME[kind]]
    blocks = blocks_of(path)[name].reshape(-1, codec.type.nbytes)
    steps, offsets = codec.scales(blocks)
    wanted = value.reshape(*steps.shape[:1], -1, codec.group)
    best = np.full(wanted.shape, np.inf)
    for number in codec.numbers.astype(np.float64):
        at = number * steps.astype(np.float64)[..., None]
        at = at if offsets is None else at + offsets.astype(np.float64)[..., None]
        np.minimum(best, np.abs(wanted - at), out=best)
    return best.reshape(value.shape)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.name in {one.name for one in CODECS}], ids=str)
def test_blocks_have_the_nearest_codes_on_the_scales_of_the_base(tmp_path: Path, kind: Kind) -> None:
    base, (adapter, changes) = write_llama(tmp_path / "base.gguf", kind), an_adapter(tmp_path / "a")
    types = {"*": "keep"}
    lora_export.merge(base, [adapter], output=tmp_path / "out.gguf", dtype_of=types, min_retention=0.1)
    before, after = values_of(base), values_of(tmp_path / "out.gguf")
    assert types_of(tmp_path / "out.gguf") == types_of(base) and len(changes) == len(TARGETS)
    for name, value in after.items():
        if name not in changes:
            assert np.array_equal(blocks_of(base)[name], blocks_of(tmp_path / "out.gguf")[name])
            continue
        wanted = before[name].astype(np.float64) + changes[name]
        least = distance_to_grid(base, name, wanted)
        assert np.array_equal(least, distance_to_grid(tmp_path / "out.gguf", name, wanted))  # the scales stayed
        assert (np.abs(value - wanted) <= least + 1e-5 * np.abs(wanted).max()).all()
        assert np.abs(value - before[name]).max() > 0


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.name in {one.name for one in CODECS}], ids=str)
def test_new_scales_bring_a_weight_nearer(tmp_path: Path, kind: Kind) -> None:
    """A change as large as the weight is cut off on the scales of the base."""
    base = write_llama(tmp_path / "base.gguf", kind)
    adapter, changes = an_adapter(tmp_path / "a", alpha=3 * STRONG)
    options: dict[str, Any] = {"dtype_of": {"*": "keep"}, "min_retention": 0.1}
    lora_export.merge(base, [adapter], tmp_path / "old.gguf", **options)
    report = lora_export.merge(
        base, [adapter], tmp_path / "new.gguf", keep_quantised=True, rescale=True, **options
    ).report
    assert report is not None and {layer.stored for layer in report.layers} == {f"{kind.name}, new scales"}
    before, old, new = (values_of(tmp_path / f"{name}.gguf") for name in ("base", "old", "new"))
    for name, value in new.items():
        if name not in changes:
            assert np.array_equal(blocks_of(base)[name], blocks_of(tmp_path / "new.gguf")[name])
            continue
        wanted = before[name].astype(np.float64) + changes[name]
        size = CODECS[BY_NAME[kind.name]].type.elements
        one, other = (np.square(each - wanted).reshape(-1, size).sum(axis=1) for each in (value, old[name]))
        assert (one <= other * (1 + 1e-4)).all() and one.sum() < 0.7 * other.sum()
        noise = np.linalg.norm(value - wanted) / np.linalg.norm(changes[name])
        (result,) = (each for each in report.results if types_of(base)[name] and is_of(each.weight, name))
        assert result.noise == pytest.approx(noise, rel=0.01)
    record = json.loads(open_gguf(tmp_path / "new.gguf").value(provenance.KEY))
    assert set(record["settings"]["rescaled"]) == set(changes)


def is_of(weight: str, tensor: str) -> bool:
    """Whether a layer of transformers is a tensor of llama.cpp."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1).get_name(weight, (".weight",)) == tensor


@pytest.mark.parametrize(
    "kind", [Kind.Q4_K, Kind.MXFP4, Kind.F16, *map(slow, (Kind.Q4_0, Kind.Q5_1, Kind.Q6_K))], ids=str
)
def test_calibrated_numbers_are_one_of_two_and_nearer_in_the_outputs(tmp_path: Path, kind: Kind) -> None:
    base, (adapter, changes) = write_llama(tmp_path / "base.gguf", kind, fields=runnable), an_adapter(tmp_path / "a")
    found = {}
    for rounding in ("nearest", "calibrated"):
        report = lora_export.merge(
            base, [adapter], tmp_path / f"{rounding}.gguf", calibration=calibration_of(tmp_path / "inputs.npz"),
            rounding=rounding, dtype_of={"*": "keep"}, min_retention=0.1,
        ).report  # fmt: skip
        assert report is not None
        found[rounding] = {layer.weight: layer.outputs for layer in report.layers}
    for name, own in found["calibrated"].items():
        assert own.is_calibrated and own.error < own.nearest_error == found["nearest"][name].error
    before, near, own = (values_of(tmp_path / f"{name}.gguf") for name in ("base", "nearest", "calibrated"))
    assert types_of(tmp_path / "calibrated.gguf") == types_of(base)
    for name, change in changes.items():
        wanted = before[name].astype(np.float64) + change
        other = own[name] != near[name]
        far_enough = other & (np.abs(near[name] - wanted) > 1e-6 * np.abs(wanted).max())
        on_other_side = np.sign(own[name] - wanted) == -np.sign(near[name] - wanted)
        assert far_enough.any() and on_other_side[far_enough].all()
        if kind.name in {one.name for one in CODECS}:
            assert (distance_to_grid(base, name, own[name]) <= 1e-5 * np.abs(wanted).max()).all()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_floats_are_rounded_once(tmp_path: Path, kind: Kind) -> None:
    base, (adapter, changes) = write_llama(tmp_path / "base.gguf", kind), an_adapter(tmp_path / "a")
    lora_export.merge(base, [adapter], output=tmp_path / "out.gguf")
    before, after = values_of(base), values_of(tmp_path / "out.gguf")
    steps = {Kind.F32: 2.0**-22, Kind.F16: 2.0**-11, Kind.BF16: 2.0**-8}
    for name, change in changes.items():
        wanted = before[name].astype(np.float64) + change
        assert (np.abs(after[name] - wanted) <= steps[kind] * np.abs(wanted) + 1e-6).all()
    assert types_of(tmp_path / "out.gguf") == types_of(base)


def test_fields_sequence_and_alignment_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fields(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(1 << 14)
        writer.add_chat_template("{{ x }}")
        writer.add_array("some.numbers", [1, 2, 3])

    base = write_llama(tmp_path / "base.gguf", Kind.Q4_0, fields=fields)
    opened, adapter = open_base(base), formats.load(an_adapter(tmp_path / "a")[0])
    full = Backend(memory=lambda count: np.full(count, 255, np.uint8))  # as after other blocks
    reserved: list[int] = []
    monkeypatch.setattr(block_copy, "reserve", lambda _, count: reserved.append(count))
    merge_gguf(plan.make([adapter], opened.checkpoint.specs), opened, tmp_path / "out.gguf", backend=full)
    one, other = open_gguf(base), open_gguf(tmp_path / "out.gguf")
    assert list(other.fields) == [*one.fields, provenance.KEY]
    own, theirs = base.read_bytes(), (tmp_path / "out.gguf").read_bytes()
    for key, field in one.fields.items():
        assert theirs[other.fields[key].start : other.fields[key].stop] == own[field.start : field.stop]
    assert [tensor.name for tensor in other.tensors] == [tensor.name for tensor in one.tensors]
    assert (other.alignment, other.data_start % (1 << 14)) == (1 << 14, 0)
    ends = [*(tensor.start for tensor in other.tensors[1:]), len(theirs)]
    between = [theirs[tensor.stop : end] for tensor, end in zip(other.tensors, ends, strict=True)]
    assert any(between) and not any(map(any, between))
    assert reserved == [other.tensors[-1].stop]


@pytest.mark.parametrize(
    ("kind", "alpha", "stored"),
    [(Kind.Q4_0, STRONG, "Q4_0"), (Kind.Q4_0, 0.1, "Q8_0"), (Kind.Q4_K, WEAK, "F16"), (Kind.BF16, 0.002, "F16")],
)
def test_a_weight_that_would_lose_its_change_is_promoted(tmp_path: Path, kind: Kind, alpha: float, stored: str) -> None:
    base, (adapter, changes) = write_llama(tmp_path / "base.gguf", kind), an_adapter(tmp_path / "a", alpha=alpha)
    report = lora_export.merge(base, [adapter], output=tmp_path / "out.gguf").report
    assert report is not None
    before, after, types = values_of(base), values_of(tmp_path / "out.gguf"), types_of(tmp_path / "out.gguf")
    for name, change in changes.items():
        error = np.linalg.norm(after[name] - before[name] - change) / np.linalg.norm(change)
        assert (types[name], error < 1) == (stored, True)
    assert {name: types[name] for name in types if name not in changes} == {
        name: own for name, own in types_of(base).items() if name not in changes
    }
    is_promoted = stored != kind.name
    assert all(
        (layer.scheme, layer.stored, bool(layer.why)) == (kind.name, stored, is_promoted) for layer in report.layers
    )
    assert len(report.layers) == len(changes)
    assert (report.bytes, report.base_bytes) == ((tmp_path / "out.gguf").stat().st_size, base.stat().st_size)
    record = json.loads(open_gguf(tmp_path / "out.gguf").value(provenance.KEY))
    assert record["settings"]["types"] == (dict.fromkeys(changes, stored) if is_promoted else {})
    kept = [layer.retention for layer in report.layers]
    assert all((value is not None and value >= 0.5) or is_promoted for value in kept)
    assert all(result.retention >= 0.5 and result.noise <= 1 for result in report.results)


def test_types_are_chosen_by_layer_or_tensor(tmp_path: Path) -> None:
    base, (adapter, _) = write_llama(tmp_path / "base.gguf", Kind.Q4_0), an_adapter(tmp_path / "a")
    norm = peft_adapter(tmp_path / "norm", {}, {f"{LAYER}input_layernorm.weight": np.full(256, 2, np.float32)})
    types = {"*": "Q8_0", "blk.0.ffn_down.weight": "F32", "*.self_attn.o_proj": "BF16", f"{LAYER}self_attn.k_*": "keep"}
    lora_export.merge(base, [adapter, norm], output=tmp_path / "out.gguf", dtype_of=types)
    found = types_of(tmp_path / "out.gguf")
    assert found["blk.0.attn_norm.weight"] == "F32"  # llama.cpp has no norms in blocks
    assert [found[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_k", "attn_output", "ffn_down", "ffn_up")] == [
        *("Q8_0", "Q4_0", "BF16", "F32", "Q4_0")
    ]


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "sha256-12ab", Kind.Q8_0)
    result = lora_export.merge(base, [an_adapter(tmp_path / "a")[0]], output=tmp_path / "out")
    assert result.output == tmp_path / "out.gguf" and len(values_of(result.output)) == 12
    assert lora_export.verify(result.output, base=base, adapters=[tmp_path / "a"]).verdict.outcome == "same"


@pytest.mark.parametrize("spelling", ["peft", "gguf"])
def test_adapters_of_any_format_make_one_file(tmp_path: Path, spelling: str) -> None:
    base, (adapter, _) = write_llama(tmp_path / "base.gguf", Kind.Q8_0), an_adapter(tmp_path / "a")
    llama().save_pretrained(tmp_path / "hf")
    if spelling == "gguf":
        adapter = lora_export.convert(adapter, tmp_path / "b.gguf", to="gguf", base=tmp_path / "hf").output
    lora_export.merge(base, [adapter], output=tmp_path / "out.gguf")
    lora_export.merge(base, [tmp_path / "a"], output=tmp_path / "again.gguf")
    one, other = blocks_of(tmp_path / "out.gguf"), blocks_of(tmp_path / "again.gguf")
    assert all(np.array_equal(one[name], other[name]) for name in other)


def test_a_second_merge_is_refused_and_another_one_is_not(tmp_path: Path) -> None:
    base, (adapter, _) = write_llama(tmp_path / "base.gguf", Kind.Q8_0), an_adapter(tmp_path / "a")
    other, _ = an_adapter(tmp_path / "b", alpha=2.0)
    lora_export.merge(base, [adapter], output=tmp_path / "one.gguf")
    with pytest.raises(InputRefused) as refused:
        lora_export.merge(tmp_path / "one.gguf", [adapter], output=tmp_path / "two.gguf")
    assert "one.gguf already contains the adapter a" in str(refused.value)
    lora_export.merge(tmp_path / "one.gguf", [other], output=tmp_path / "two.gguf")
    found = lora_export.inspect(tmp_path / "two.gguf")
    assert [one.name for one in found.adapters] == ["a", "b"]
    assert found.checkpoint is not None and found.checkpoint.config["model_type"] == "llama"


def test_tied_embeddings_are_a_decision(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", Kind.Q8_0, model=llama(tied=True))
    model = trained(llama(tied=True), r=2, target_modules=["embed_tokens"])
    model.save_pretrained(adapter := tmp_path / "a", save_embedding_layers=False)
    way = "into the checkpoint of which the file was made"
    own = f'is the output embeddings too.* tied="untie" .*, in a merge {way}; tied='
    for tied, message in (("error", own), ("untie", f"adds no tensors.* Merge {way}")):
        with pytest.raises(InputRefused, match=message):
            lora_export.merge(base, [adapter], output=tmp_path / "out.gguf", tied=tied)
    lora_export.merge(base, [adapter], output=tmp_path / "out.gguf", tied="both")
    change = values_of(tmp_path / "out.gguf")["token_embd.weight"] - values_of(base)["token_embd.weight"]
    wanted = model.base_model.model.model.embed_tokens.get_delta_weight("default").detach().numpy()
    assert np.linalg.norm(change - wanted) < 0.05 * np.linalg.norm(wanted)


def test_rows_of_words_are_replaced(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", Kind.F16)
    model = trained(llama(), r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model.save_pretrained(tmp_path / "a")
    lora_export.merge(base, [tmp_path / "a"], output=tmp_path / "out.gguf")
    table = values_of(tmp_path / "out.gguf")["token_embd.weight"]
    wanted = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert np.array_equal(table[[3, 5]], wanted.detach().numpy().astype(np.float16))
    assert np.array_equal(np.delete(table, [3, 5], 0), np.delete(values_of(base)["token_embd.weight"], [3, 5], 0))


@pytest.mark.parametrize(("types", "stored"), [({}, "Q8_0"), ({"*": "F32"}, "F32")])
def test_one_expert_of_a_stack_changes(tmp_path: Path, types: dict[str, str], stored: str) -> None:
    base, rng = stacked_experts(tmp_path / "base.gguf"), np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((2, 32), (64, 2)))
    adapter = peft_adapter(tmp_path / "a", {f"{LAYER}mlp.experts.1.up_proj": (a, b)})
    lora_export.merge(base, [adapter], output=tmp_path / "out.gguf", dtype_of=types)
    name = "blk.0.ffn_up_exps.weight"
    before, after = values_of(base), values_of(tmp_path / "out.gguf")
    change = after[name] - before[name]
    scale = json.loads((adapter / "adapter_config.json").read_text())
    wanted = scale["lora_alpha"] / scale["r"] * (b @ a)
    assert not change[[0, 2]].any()
    assert np.linalg.norm(change[1] - wanted) < (0.2 if stored == "Q8_0" else 1e-5) * np.linalg.norm(wanted)
    assert types_of(tmp_path / "out.gguf")[name] == stored
    proof = lora_export.verify(tmp_path / "out.gguf", base=base, adapters=[adapter])
    assert proof.verdict.outcome == "same"


def test_stacked_experts_of_transformers_5_change_the_stacks(tmp_path: Path) -> None:
    base, rng = stacked_experts(tmp_path / "base.gguf"), np.random.default_rng(1)
    shapes = {"experts.base_layer": (128, 32), "experts": (32, 64)}  # gate and up, down
    pairs = {
        f"{LAYER}mlp.{name}": [rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((6, columns), (rows, 6))]
        for name, (rows, columns) in shapes.items()
    }
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = peft_adapter(tmp_path / "a", pairs, r=2, lora_alpha=2, target_modules=[], target_parameters=targets)
    lora_export.merge(base, [adapter], output=tmp_path / "out.gguf", dtype_of={"*": "F32"})
    before, after = values_of(base), values_of(tmp_path / "out.gguf")
    gate_up, down = (np.einsum("eri,ore->eoi", a.reshape(3, 2, -1), b.reshape(-1, 2, 3)) for a, b in pairs.values())
    for part, wanted in (("gate", gate_up[:, :64]), ("up", gate_up[:, 64:]), ("down", down)):
        name = f"blk.0.ffn_{part}_exps.weight"
        np.testing.assert_allclose(after[name] - before[name], wanted, atol=1e-6)


def test_bert_and_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=32, max_position_embeddings=16, num_labels=3))
    names, writer = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 1), gguf.GGUFWriter(str(tmp_path / "b.gguf"), "bert")

    def own(name: str) -> str:
        plain = name.removeprefix("bert.").replace("classifier.", "cls.output.")
        return names.get_name(plain, (".weight", ".bias")) or plain  # llama.cpp has no pooler

    for name, value in model.state_dict().items():
        writer.add_tensor(own(name), value.numpy())
    base = written(writer, tmp_path / "b.gguf")
    adapted = trained(model, r=2, target_modules=["query", "dense"], task_type="SEQ_CLS")
    torch.nn.init.normal_(adapted.base_model.model.classifier.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path / "a")
    lora_export.merge(base, [tmp_path / "a"], output=tmp_path / "out.gguf")
    found, changed = values_of(tmp_path / "out.gguf"), 0
    for name, wanted in adapted.merge_and_unload().state_dict().items():
        assert np.allclose(found[own(name)], wanted.numpy(), atol=1e-6), name
        changed += not np.array_equal(found[own(name)], values_of(base)[own(name)])
    assert changed == 7  # five layers, and the classifier with its bias
    assert lora_export.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "a"]).verdict.outcome == "same"


def damage(path: Path, name: str) -> None:
    """Scales of a tensor that are no numbers."""
    tensor = next(one for one in open_gguf(path).tensors if one.name == name)
    data = bytearray(path.read_bytes())
    data[tensor.start : tensor.start + 2] = b"\xff\x7f"
    path.write_bytes(data)


def narrow(folder: Path) -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2})
    write_llama(folder / "base.gguf", Kind.F16, model=LlamaForCausalLM(config))
    peft_adapter(folder / "a", {f"{LAYER}self_attn.o_proj": (np.ones((1, 48)), np.ones((48, 1)))})


def norm_of_gemma(folder: Path) -> None:
    """A base of one norm, and an adapter that replaces it."""
    writer = gguf.GGUFWriter(str(folder / "base.gguf"), "gemma2")
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(8, np.float32))
    written(writer, folder / "base.gguf")
    peft_adapter(folder / "a", {}, {f"{LAYER}input_layernorm.weight": np.full(8, 0.5, np.float32)})


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "types of no changed weight": (
        lambda _: None,
        {"dtype_of": {"blk.9.*": "F16"}},
        "fits no weight that the adapters",
    ),
    "a loss that is chosen": (
        lambda folder: an_adapter(folder / "a", alpha=WEAK),
        {"dtype_of": {"*": "keep"}},
        "4 of 4 weights would lose most of their change",
    ),
    "a loss that is chosen, with what helps": (
        lambda folder: an_adapter(folder / "a", alpha=WEAK),
        {"dtype_of": {"*": "keep"}},
        'Store them in a wider type (dtype_of={"*": "F32"}), or keep the adapter beside the model (convert(to="gguf"))',
    ),
    "rows that end in a block": (
        narrow,
        {"dtype_of": {"*": "Q8_0"}},
        "o_proj.weight has rows of 48 elements, and Q8_0 has blocks of 32: dtype_of=",
    ),
    "damaged scales": (
        lambda folder: damage(folder / "base.gguf", "blk.0.ffn_down.weight"),
        {},
        "blocks have scales that are no finite numbers",
    ),
    "an unsupported type": (
        lambda folder: write_llama(folder / "base.gguf", lambda name: Kind.IQ2_XS if "down" in name else Kind.Q8_0),
        {},
        "down_proj.weight is stored as IQ2_XS, which is not supported",
    ),
    "another model": (
        lambda folder: stacked_experts(folder / "base.gguf"),
        {},
        "e has no weight for model.layers.0.self_attn.q_proj",
    ),
    "a norm of Gemma": (
        norm_of_gemma,
        {},
        "input_layernorm.weight: llama.cpp stores this norm with 1 added, which is not supported",
    ),
    "a new head": (
        lambda folder: peft_adapter(folder / "a", {}, {"score.weight": np.ones((2, 256), np.float32)}),
        {},
        "score.weight",
    ),
    "an adapter": (
        lambda folder: written(adapter_header(folder / "base.gguf"), folder / "base.gguf"),
        {},
        "is an adapter. Name the model that it is for",
    ),
}


def adapter_header(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    return writer


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    prepare, options, message = REFUSED[name]
    write_llama(tmp_path / "base.gguf", Kind.Q8_0)
    an_adapter(tmp_path / "a")
    prepare(tmp_path)
    with pytest.raises((InputRefused, MatchError)) as refused:
        lora_export.merge(tmp_path / "base.gguf", [tmp_path / "a"], output=tmp_path / "out.gguf", **options)
    assert message in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base.gguf"]


def test_a_type_that_is_not_touched_is_copied(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", lambda name: Kind.IQ2_XS if "up_proj" in name else Kind.Q8_0)
    lora_export.merge(base, [an_adapter(tmp_path / "a")[0]], output=tmp_path / "out.gguf")
    one, other = blocks_of(base), blocks_of(tmp_path / "out.gguf")
    assert np.array_equal(one["blk.0.ffn_up.weight"], other["blk.0.ffn_up.weight"])


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"dequantize": True}, {"device": "cuda"}])
def test_options_of_other_bases_are_wrong_usage(tmp_path: Path, options: dict[str, Any]) -> None:
    base, (adapter, _) = write_llama(tmp_path / "base.gguf"), an_adapter(tmp_path / "a")
    with pytest.raises(WrongUsage) as refused:
        lora_export.merge(base, [adapter], output=tmp_path / "out.gguf", **options)
    assert "is not for a GGUF file: its weights keep their types, or get those of dtype_of" in str(refused.value)


def test_a_dry_run_reads_headers_and_writes_nothing(tmp_path: Path) -> None:
    base, (adapter, _) = write_llama(tmp_path / "base.gguf", Kind.Q4_K), an_adapter(tmp_path / "a")
    result = lora_export.merge(base, [adapter], output=tmp_path / "out.gguf", dry_run=True)
    assert len(result.plan.steps) == len(TARGETS) and not (tmp_path / "out.gguf").exists()
