"""A merge into a quantised base that stays quantised: every scheme, kept, promoted and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_export
from lora_export import verify
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Layout, Plan, Step, TensorSpec, Term
from lora_export.plan.stored_region import cut
from lora_export.storage import block_copy
from lora_export.storage.hashes import file_sha256
from lora_export.verification.against_checkpoint import audit
from lora_export.weights import tensor_blocks
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.kept_weights import patch_in_file
from lora_export.weights.merge import merge_checkpoint
from lora_export.weights.quantised.bitsandbytes import _NestedRule
from lora_export.weights.quantised_layers import keep_quantised
from support.cli import answer, call
from support.handmade import add_tensors, peft_adapter
from support.quantised_weights import WEIGHTS, quantised, weights_in

ONE_LAYER = [kind for kind in WEIGHTS if kind != "mxfp4"]
JUDGED_EVERYWHERE = ("compressed int4", "gptq 4", "nf4, double")  # also after promotion, and with new scales


def base_of(folder: Path, kind: str, **fields: Any) -> Path:
    """A base of two layers of this kind, and floats."""
    stored, config = quantised(kind, "a.fc")
    other, _ = quantised(kind, "b.other")
    folder.mkdir()
    floats = {"norm.weight": torch.ones(4), "lm_head.weight": torch.ones(4, 4)}
    save_file(stored | other | floats, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": config} | fields))
    return folder


def floats_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: weight.astype(np.float64) for name, weight in weights_in(folder).items()}


def adapter_of(folder: Path, shape: tuple[int, ...], size: float, *, unchanged: int = 0) -> tuple[Path, np.ndarray]:
    """An adapter of `a.fc`, and its change, which is zero in the first rows."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, shape[1])).astype(np.float32), rng.normal(size=(shape[0], 2)).astype(np.float32) * size
    b[:unchanged] = 0
    return peft_adapter(folder, {"a.fc": (a, b)}), b.astype(np.float64) @ a.astype(np.float64)


def stored_in(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model.safetensors")
    return {name: bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) for name, tensor in tensors.items()}


class KeptMerge:
    """A merge of one adapter into a base of this kind that stays quantised, `layer` as its report has it."""

    def __init__(
        self, folder: Path, kind: str, size: Callable[[np.ndarray], float], *, unchanged: int = 0, **options: Any
    ) -> None:
        self.kind, self.base, self.out = kind, base_of(folder / "base", kind), folder / "merged"
        self.before = floats_of(self.base)
        self.weight = self.before["a.fc.weight"]
        adapter = folder / "adapter"
        self.adapter, self.change = adapter_of(adapter, self.weight.shape, size(self.weight), unchanged=unchanged)
        self.report = lora_export.merge(self.base, [self.adapter], self.out, keep_quantised=True, **options).report
        assert self.report is not None
        (self.layer,) = self.report.layers

    def assert_other_weight_stays(self) -> None:
        assert np.array_equal(floats_of(self.out)["b.other.weight"], self.before["b.other.weight"])

    def assert_judged(self, *, everywhere: bool = False) -> None:
        """The output is the same. With one bit of a part of `a.fc` flipped, or of any tensor, it is different."""
        flipped = "" if everywhere or self.kind in JUDGED_EVERYWHERE else "a.fc."
        assert self.verdict().startswith("same")
        tensors = load_file(self.out / "model.safetensors")
        for name, tensor in tensors.items():
            if not name.startswith(flipped):
                continue
            changed = tensor.clone()
            flat = changed.view(-1).view(torch.uint8)
            middle = tensor.numel() // 2 * tensor.element_size()
            flat[middle + tensor.element_size() - 1 if tensor.is_floating_point() else middle] ^= 1  # its sign's byte
            save_file(tensors | {name: changed}, self.out / "model.safetensors", {"format": "pt"})
            assert self.verdict().startswith("different"), name

    def verdict(self) -> str:
        try:
            return str(verify(self.out, base=self.base, adapters=[self.adapter]))
        except InputRefused as refused:  # it describes no weight any more
            return f"different: {refused}"


def fraction_of_std(part: float) -> Callable[[np.ndarray], float]:
    return lambda weight: weight.std() * part


def fraction_of_largest(part: float) -> Callable[[np.ndarray], float]:
    return lambda weight: np.abs(weight).max() * part


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_large_change_is_kept_in_the_scheme(kind: str, tmp_path: Path) -> None:
    merge = KeptMerge(tmp_path, kind, fraction_of_std(1 / 4))
    base, out, layer, change = merge.base, merge.out, merge.layer, merge.change
    assert layer.is_kept and layer.stored == layer.scheme and layer.weight == "a.fc.weight"
    one, other = stored_in(base), stored_in(out)
    changed = {name for name in one if one[name] != other[name]}
    assert one.keys() == other.keys() and len(changed) == 1
    assert changed <= {"a.fc.weight", "a.fc.weight_packed", "a.fc.qweight"}
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()
    moved = floats_of(out)["a.fc.weight"] - merge.weight
    assert layer.retention == pytest.approx((moved * change).sum() / np.square(change).sum(), rel=2e-3)
    assert layer.noise == pytest.approx(np.linalg.norm(moved - change) / np.linalg.norm(change), rel=5e-3)
    assert layer.retention > 0.5 and layer.noise < 1
    merge.assert_judged(everywhere=True)


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_small_change_is_promoted_to_floats(kind: str, tmp_path: Path) -> None:
    merge = KeptMerge(tmp_path, kind, fraction_of_largest(1 / 1000), min_retention=0.9)
    base, out, layer = merge.base, merge.out, merge.layer
    assert layer.why.endswith("% of its change would be left") and layer.stored in ("float32", "bfloat16", "float16")
    stored = load_file(out / "model.safetensors")["a.fc.weight"]
    assert str(stored.dtype) == f"torch.{layer.stored}"
    after = floats_of(out)["a.fc.weight"]
    np.testing.assert_allclose(after, merge.weight + merge.change, rtol=2.0**-8, atol=1e-6)
    merge.assert_other_weight_stays()
    assert not [name for name in stored_in(out) if name.startswith("a.fc.") and name != "a.fc.weight"]
    merge.assert_judged()
    if json.loads((base / "config.json").read_text())["quantization_config"]:  # files for ComfyUI have no config
        assert states_float(out, "a.fc") and not states_float(out, "b.other") and not states_float(base, "a.fc")


FEWER_BITS = [kind for kind in ONE_LAYER if kind.startswith(("compressed int", "gptq")) and "8" not in kind]


@pytest.mark.parametrize("kind", FEWER_BITS)
def test_change_that_8_bits_hold_is_promoted_to_them(kind: str, tmp_path: Path) -> None:
    """Each step is a sixteenth (or so) of the base's: numbers that do not change keep their values."""
    merge = KeptMerge(tmp_path, kind, fraction_of_largest(1 / 100), unchanged=8, min_retention=0.8)
    out, layer, weight, change = merge.out, merge.layer, merge.weight, merge.change
    assert layer.why and "8-bit" in layer.stored and layer.stored != layer.scheme
    after = floats_of(out)["a.fc.weight"]
    assert np.array_equal(after[:8], weight[:8])
    moved = after - weight
    assert np.linalg.norm(moved - change) < 0.45 * np.linalg.norm(change)  # of 2 bits many numbers are at the end
    merge.assert_other_weight_stays()
    merge.assert_judged()
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    if kind.startswith("gptq"):
        assert quantization["dynamic"] == {r"+:^a\.fc$": {"bits": 8}}
    else:
        first, second = quantization["config_groups"].values()
        assert second == {**first, "targets": ["a.fc"], "weights": {**first["weights"], "num_bits": 8}}
    for key, value in (
        ("dynamic", {}),
        ("config_groups", {"group_0": quantization.get("config_groups", {}).get("group_0")}),
    ):
        if key in quantization:
            fields = {"dtype": "float32", "quantization_config": {**quantization, key: value}}
            (out / "config.json").write_text(json.dumps(fields))
    assert merge.verdict().startswith("different")


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_new_scales_are_those_of_the_rule(kind: str, tmp_path: Path) -> None:
    """Eight rows do not change. A change of twice the weight would be cut off on the scales that it has."""
    merge = KeptMerge(tmp_path, kind, fraction_of_std(2), unchanged=8, rescale=True, min_retention=0)
    layer, change = merge.layer, merge.change
    is_new = layer.stored == f"{layer.scheme}, new scales"
    assert is_new == (kind != "fp8 without scales")
    if is_new and layer.is_kept:
        after = floats_of(merge.out)["a.fc.weight"]
        most = 0.7 if kind == "gptq 2" else 0.45
        assert np.linalg.norm(after - merge.weight - change) < most * np.linalg.norm(change)
        merge.assert_other_weight_stays()
    merge.assert_judged()


@pytest.mark.parametrize(
    ("kind", "name", "numbers", "reach"),
    [
        ("compressed int4", "weight_scale", 32, 7.5),
        ("compressed int8", "weight_scale", 96, 127.5),
        ("fp8_scaled", "scale_weight", 24 * 96, 448),
        ("bitsandbytes int8", "SCB", 96, 1),
        ("fp4", "weight.absmax", 64, 1),
    ],
)
def test_rule_divides_the_largest_number(kind: str, name: str, numbers: int, reach: float, tmp_path: Path) -> None:
    merge = KeptMerge(tmp_path, kind, fraction_of_std(2), rescale=True, min_retention=0)
    base, out = merge.base, merge.out
    flat = np.abs(merge.weight + merge.change).reshape(-1)
    largest = np.maximum.reduceat(flat, np.arange(0, len(flat), numbers))
    found = load_file(out / "model.safetensors")[f"a.fc.{name}"].float().numpy().reshape(-1)
    np.testing.assert_allclose(found, largest / reach, rtol=2**-7)
    sizes = {path.name: path.stat().st_size for path in base.iterdir()}
    assert sizes["model.safetensors"] == pytest.approx((out / "model.safetensors").stat().st_size, abs=4096)
    record = json.loads((out / "lora_export.json").read_text())
    assert '"rescaled": ["a.fc.weight"]' in json.dumps(record)
    (out / "lora_export.json").write_text(json.dumps(record).replace('"rescaled": ["a.fc.weight"]', '"rescaled": []'))
    assert f"a.fc.{name} is not the base's" in merge.verdict()


def test_scales_that_are_quantised_again_are_made_anew(tmp_path: Path) -> None:
    """The outer scale is the largest distance of a scale from the offset, where one is out of its reach."""
    merge = KeptMerge(tmp_path, "nf4, double", fraction_of_std(4), unchanged=8, rescale=True, min_retention=0)
    before, after = (load_file(folder / "model.safetensors") for folder in (merge.base, merge.out))
    state = json.loads(bytes(before["a.fc.weight.quant_state.bitsandbytes__nf4"].tolist()))
    table, offset = before["a.fc.weight.nested_quant_map"].double(), state["nested_offset"]
    flat = np.abs(merge.weight + merge.change).reshape(-1)
    largest = np.maximum.reduceat(flat, np.arange(0, len(flat), 64))
    (old,), (outer,) = (each["a.fc.weight.nested_absmax"].tolist() for each in (before, after))
    assert outer == pytest.approx(np.abs(largest - offset).max(), rel=2**-9) and outer > 2 * old  # W in bf16
    distance = (torch.from_numpy((largest - offset) / outer)[:, None] - table).abs()
    own = distance[torch.arange(len(largest)), after["a.fc.weight.absmax"].long()]
    assert (own <= distance.min(dim=1).values + 2**-9)[12:].all()  # 12 blocks are rows without a change


@pytest.mark.parametrize("extreme", [1.0, 0.99999994, 1.0000001])
def test_an_outer_scale_is_not_raised_by_rounding(tmp_path: Path, extreme: float) -> None:
    """A scale at the end of the reach, that is stored and computed in fp32, and another one that changes."""
    rule = open_checkpoint(base_of(tmp_path / "base", "nf4, double"), dequantise=True).quantised["a.fc.weight"].scaling
    assert isinstance(rule, _NestedRule)
    old = rule.read()
    old["outer"] = old["outer"][0] * np.float32(extreme)
    old["index"][3] = np.abs(rule.table).argmax()
    moved = 0
    for step in range(200):
        old["outer"] = np.nextafter(old["outer"], np.float32(np.inf))
        factors, is_changed = rule.decode(old), np.arange(len(old)) == (5, 3)[step % 2]
        new = rule.renewed(factors, is_changed, old)
        moved += int((new["outer"] != old["outer"]).any() or not np.array_equal(new[~is_changed], old[~is_changed]))
    assert moved == 0


def test_scales_in_reach_keep_the_outer_scale(tmp_path: Path) -> None:
    tensor = open_checkpoint(base_of(tmp_path / "base", "nf4, double"), dequantise=True).quantised["a.fc.weight"]
    rule = tensor.scaling
    assert rule is not None
    old = rule.read()
    factors, is_changed = rule.decode(old) * np.float32(0.9), np.arange(len(old)) % 2 == 0
    new = rule.renewed(factors, is_changed, old)
    assert np.array_equal(new["outer"], old["outer"]) and np.array_equal(new[~is_changed], old[~is_changed])
    assert (np.abs(rule.decode(new) - factors) < 0.02 * old["outer"])[is_changed].all()
    assert (new["index"] != old["index"])[is_changed].mean() > 0.9
    tiny = rule.renewed(np.full_like(factors, 1e-9), is_changed, old)
    assert (rule.decode(tiny) > 0).all()


def test_scales_that_cannot_be_halved_need_floats(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gptq 4")
    tensors = load_file(base / "model.safetensors")
    tensors["a.fc.scales"] *= 1e-3  # in fp16 a sixteenth of it has fewer digits
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter, _ = adapter_of(tmp_path / "adapter", (24, 92), 1e-5)
    result = lora_export.merge(base, [adapter], tmp_path / "out", keep_quantised=True, min_retention=0.9)
    assert result.report is not None and result.report.layers[0].stored == "float16"


def states_float(folder: Path, module: str) -> bool:
    """Whether the config excludes a module from quantisation."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    lists = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
    named = [name for key in lists for name in config.get(key) or ()]
    patterns = [pattern for pattern in config.get("dynamic", {}) if pattern.startswith("-:")]
    return module in named or any(re.match(pattern[2:], module) for pattern in patterns)


def merged(folder: Path, base: Path, pairs: dict[str, Any], **options: Any) -> tuple[Path, Path]:
    """The output and the adapter of a merge that keeps `base` quantised."""
    adapter, out = peft_adapter(folder / "adapter", pairs), folder / "merged"
    lora_export.merge(base, [adapter], out, keep_quantised=True, **options)
    return out, adapter


@pytest.mark.parametrize("kind", ["compressed int4", "gptq 4", "nf4, double", "awq"])
def test_rows_without_a_change_keep_their_bytes(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    weight = floats_of(base)["a.fc.weight"]
    rows, columns = weight.shape
    b = np.zeros((rows, 1), np.float32)
    b[8:16] = weight.std()  # eight outputs: in AWQ all of a word
    out, _ = merged(tmp_path, base, {"a.fc": (np.ones((1, columns)), b)}, min_retention=0)
    before, after = floats_of(base)["a.fc.weight"], floats_of(out)["a.fc.weight"]
    assert {*np.flatnonzero((before != after).any(axis=1))} == set(range(8, 16))
    one, other = stored_in(base), stored_in(out)
    off = sum(a != b for name in one for a, b in zip(one[name], other[name], strict=True))
    assert 0 < off <= 8 * columns


def test_dora_and_several_adapters_are_kept(tmp_path: Path) -> None:
    """DoRA's norms are of outputs, which are rows of one file and columns of the other."""
    rng = np.random.default_rng(0)
    for kind in ("compressed int4", "gptq 4"):
        base = base_of(tmp_path / kind, kind)
        weight = floats_of(base)["a.fc.weight"]
        rows, columns = weight.shape
        a, b = rng.normal(size=(2, columns)), rng.normal(size=(rows, 2)) * weight.std() / 4
        lengths = np.linalg.norm(weight + b @ a, axis=1) * np.linspace(0.8, 1.2, rows)
        one = peft_adapter(tmp_path / f"{kind} dora", {"a.fc": (a, b)}, use_dora=True)
        add_tensors(one, {"base_model.model.a.fc.lora_magnitude_vector.weight": lengths.astype(np.float32)})
        out = tmp_path / f"{kind} out"
        lora_export.merge(base, [one], out, keep_quantised=True)
        expected = (weight + b @ a) * np.linspace(0.8, 1.2, rows)[:, None]
        after = floats_of(out)["a.fc.weight"]
        assert np.linalg.norm(after - expected) < 0.7 * np.linalg.norm(weight - expected)
        assert verify(out, base=base, adapters=[one])
        two = [peft_adapter(tmp_path / f"{kind} {n}", {"a.fc": (a * n, b)}) for n in (1, 2)]
        both = tmp_path / f"{kind} both"
        lora_export.merge(base, two, both, keep_quantised=True, weights=[0.5, 1.5])
        assert verify(both, base=base, adapters=two, weights=[0.5, 1.5])
        assert not verify(both, base=base, adapters=two, weights=[0.5, 1.0])


def test_promotion_needs_a_place_in_the_config(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "awq", quantization_config=None)
    (base / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": "awq"}))
    pairs = {"a.fc": (np.ones((1, 96)), np.full((24, 1), 1e-3))}
    with pytest.raises(InputRefused) as refused:
        merged(tmp_path, base, pairs)
    text = str(refused.value)
    assert "1 of 1 quantised weights cannot hold their change, and the config has no place that states which" in text
    assert "a.fc.weight (awq 4-bit): 0.0% of its change would be left" in text and "min_retention=0" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("kind", ["compressed int4", "gptq 4", "nf4, double", "fp8 without scales"])
def test_change_below_the_floats_of_a_promoted_layer_is_refused(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    weight = floats_of(base)["a.fc.weight"]
    adapter, _ = adapter_of(tmp_path / "adapter", weight.shape, np.abs(weight).max() / 1e9)
    with pytest.raises(InputRefused, match=r"(?s)lose most of their change to rounding.*dtype=\"float32\"\), or keep"):
        lora_export.merge(base, [adapter], tmp_path / "merged", keep_quantised=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_loss_that_is_accepted_stays_in_the_scheme(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gptq 4")
    b = np.full((24, 1), 1e-3)
    b[0] = 1
    adapter, out = peft_adapter(tmp_path / "adapter", {"a.fc": (np.ones((1, 92)), b)}), tmp_path / "out"
    result = lora_export.merge(base, [adapter], out, keep_quantised=True, min_retention=0)
    assert result.report is not None and result.report.layers[0].is_kept
    assert verify(out, base=base, adapters=[adapter])


@pytest.mark.parametrize(
    ("kind", "name", "stated", "key"),
    [
        ("gptq 4", "quantize_config.json", {"bits": 4, "group_size": 32}, "dynamic"),
        ("awq", "quant_config.json", {"w_bit": 4, "version": "GEMM"}, "modules_to_not_convert"),
        ("modelopt nvfp4", "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "exclude_modules"),
    ],
)
def test_file_of_the_quantiser_states_promoted_layers_too(
    kind: str, name: str, stated: dict[str, Any], key: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", kind)
    (base / name).write_text(json.dumps(stated))
    weight = floats_of(base)["a.fc.weight"]
    out, adapter = merged(tmp_path, base, {"a.fc": (np.ones((1, weight.shape[1])), np.full((24, 1), 1e-3))})
    found = json.loads((out / name).read_text())
    excluded = found.get("quantization", found)[key]
    assert list(excluded) == (["-:^a\\.fc$"] if key == "dynamic" else ["a.fc"])
    assert verify(out, base=base, adapters=[adapter])
    (out / name).write_text(json.dumps(stated))
    assert f"{key} does not name the layers that are floats" in str(verify(out, base=base, adapters=[adapter]))


def test_whole_model_of_promoted_layers_is_a_float_model(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gptq 4")
    pairs = {name: (np.ones((1, 92)), np.full((24, 1), 1e-3)) for name in ("a.fc", "b.other")}
    out, adapter = merged(tmp_path, base, pairs)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert verify(out, base=base, adapters=[adapter])


def test_command_reports_layers_and_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = base_of(tmp_path / "base", "gptq 4"), tmp_path / "out"
    adapter = peft_adapter(tmp_path / "adapter", {"a.fc": (np.ones((1, 92)), np.full((24, 1), 1e-3))})
    code, document = answer(capsys, "merge", base, adapter, "-o", out, "--keep-quantised")
    assert code == 0
    (layer,) = document["layers"]
    assert (layer["weight"], layer["scheme"], layer["stored"]) == ("a.fc.weight", "gptq 4-bit", "float16")
    assert layer["why"] == "0.0% of its change would be left" and layer["retention"] == 0 and layer["noise"] == 1
    assert document["base_bytes"] == (base / "model.safetensors").stat().st_size < document["bytes"]
    record = json.loads((out / "lora_export.json").read_text())
    assert '"promoted": ["a.fc.weight"]' in json.dumps(record)
    assert call("merge", base, adapter, "-o", tmp_path / "no", "--keep-quantised", "--dtype", "float32") == 2
    assert "--keep-quantised does not go together with --dtype" in capsys.readouterr().err
    assert call("merge", out, adapter, "-o", tmp_path / "no", "--keep-quantised") == 3
    assert "already" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_float_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"a.fc.weight": torch.ones(4, 4)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(InputRefused, match=r"is not quantised\. Leave keep_quantised= out"):
        merged(tmp_path, tmp_path / "base", {"a.fc": (np.ones((1, 4)), np.ones((4, 1)))})


@pytest.mark.parametrize("kind", ["compressed int4", "gptq 4", "compressed int3"])
def test_parts_of_a_weight_change_alone(kind: str, tmp_path: Path) -> None:
    """Fused q|k|v rows, and some columns of other rows: in the order of the file, whatever that is."""
    base = base_of(tmp_path / "base", kind)
    before = open_checkpoint(base, dequantise=True)
    weight = floats_of(base)["a.fc.weight"]
    regions = [slice(0, 8), slice(0, weight.shape[1])], [slice(8, 24), slice(16, 48)]
    expected, steps = weight.copy(), []
    rng = np.random.default_rng(0)
    for own in regions:
        region = cut("a.fc.weight", weight.shape, own)
        assert region is not None
        out, inputs = region.cut_shape
        pair = LoraPair(a=rng.normal(size=(2, inputs)), b=rng.normal(size=(out, 2)) * weight.std() / 4, scale=1.0)
        spec = TensorSpec(region.name, (out, inputs), "float32", Layout.OUT_IN, region=region)
        steps.append(Step(spec, (Term("mine", "fc", pair),)))
        expected[tuple(own)] += pair.b.astype(np.float64) @ pair.a
    mine = (Adapter("mine", "peft", {}),)
    plan = Plan(mine, (1.0,), tuple(steps), ())
    decided, layers = keep_quantised(plan, before, 0.0)
    assert [layer.weight for layer in layers] == ["a.fc.weight"] and layers[0].is_kept
    (tmp_path / "merged").mkdir()
    merge_checkpoint(plan, decided, tmp_path / "merged", min_retention=0)
    after = floats_of(tmp_path / "merged")["a.fc.weight"]
    is_inside = np.zeros(weight.shape, bool)
    for own in regions:
        is_inside[tuple(own)] = True
    assert np.array_equal(after[~is_inside], weight[~is_inside])
    error = np.linalg.norm((after - expected)[is_inside]) / np.linalg.norm((weight - expected)[is_inside])
    assert error < 0.7
    merged = open_checkpoint(tmp_path / "merged", dequantise=True)
    assert audit(plan, before, merged).outcome == "same"
    assert {weight.name for weight in audit(plan, before, merged).weights if weight.fate == "changed"} == {
        step.weight for step in steps
    }
    wrong = Plan(mine, (1.0,), tuple(steps[:1]), ())
    found = [weight.name for weight in audit(wrong, before, merged).weights if weight.outcome == "different"]
    assert found == ["a.fc.weight (other entries)"]


def test_part_that_is_no_block_of_the_file_is_refused(tmp_path: Path) -> None:
    """Every second row is a part of a matrix of half as many rows."""
    base = base_of(tmp_path / "base", "compressed int4")
    tensor = open_checkpoint(base, dequantise=True).quantised["a.fc.weight"]
    region = cut("a.fc.weight", (24, 96), [slice(0, 24, 2), slice(0, 96)])
    assert region is not None
    step = Step(TensorSpec(region.name, (12, 96), "float32", Layout.OUT_IN, region=region))
    with pytest.raises(InputRefused, match=r"cannot be quantised again. Make the base a float model \(dequantize"):
        patch_in_file(tensor, step)


def test_tied_table_that_gets_a_second_name_is_refused(tmp_path: Path) -> None:
    before = open_checkpoint(base_of(tmp_path / "base", "compressed int4"), dequantise=True)
    plan = Plan((), (), (), (), untied={"head.weight": "a.fc.weight"})
    with pytest.raises(InputRefused, match=r"a\.fc\.weight is quantised, and the output would have it under two names"):
        keep_quantised(plan, before, 0.5)


def test_large_weights_are_measured_in_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows: those that are measured before the merge are those that the report has."""
    monkeypatch.setattr(block_copy, "BLOCK", 1 << 10)
    monkeypatch.setattr(tensor_blocks, "LEAST_MEASURED", 400)
    merge = KeptMerge(tmp_path, "gptq 4", fraction_of_std(1 / 4))
    layer, (written,) = merge.layer, merge.report.results
    assert (layer.retention, layer.noise) == (written.retention, written.noise)
    assert 0 < written.elements < merge.weight.size
    assert merge.verdict().startswith("same")


def test_scales_may_be_in_another_file(tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "base", "gptq 4"), tmp_path / "out"
    stored = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    files = {name: "a.safetensors" if "scales" in name or "norm" in name else "b.safetensors" for name in stored}
    for file in set(files.values()):
        save_file({name: stored[name] for name in stored if files[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    pairs = {"a.fc": (np.ones((1, 92)), np.full((24, 1), 1e-3)), "b.other": (np.ones((1, 92)), np.full((24, 1), 0.1))}
    adapter = peft_adapter(tmp_path / "adapter", pairs)
    result = lora_export.merge(base, [adapter], out, keep_quantised=True, hashing="sha256")
    assert result.report is not None and [layer.is_kept for layer in result.report.layers] == [False, True]
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == files.keys() - {f"a.fc.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} | {
        "a.fc.weight"
    }
    assert verify(out, base=base, adapters=[adapter])
    manifest = (out / "lora_export.json").read_text()
    assert all(file_sha256(path) in manifest for folder in (base, out) for path in folder.glob("*.safetensors"))
    (out / "lora_export.json").write_text(manifest.replace('"a.fc.weight"', '"b.other.weight"'))
    assert "the record names 1 promoted weights" in str(verify(out, base=base, adapters=[adapter]))


@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_scales_of_a_quantised_cache_stay(size: float, tmp_path: Path) -> None:
    """They are read as parts of a weight of the same attention, and stay where that one becomes a float."""
    base = base_of(tmp_path / "base", "compressed int4")
    tensors = load_file(base / "model.safetensors") | {"a.k_scale": torch.ones(1), "a.fc.v_scale": torch.ones(1)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    (base / "config.json").write_text(json.dumps(config))
    out, adapter = merged(tmp_path, base, {"a.fc": (np.ones((1, 96)), np.full((24, 1), size))})
    written = load_file(out / "model.safetensors")
    assert ("a.fc.weight" in written) == (size < 0.1) and {"a.k_scale", "a.fc.v_scale"} <= written.keys()
    assert verify(out, base=base, adapters=[adapter])
    save_file(written | {"a.k_scale": torch.zeros(1)}, out / "model.safetensors", {"format": "pt"})
    assert "a.k_scale: different" in str(verify(out, base=base, adapters=[adapter]))
