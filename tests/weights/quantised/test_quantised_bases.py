"""A merge into a quantised base, which becomes a float model; against bitsandbytes' weights, and against PEFT's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lora_export
from lora_export.api.adapter_names import repeated_tables
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.weights.quantised import method_of
from support.cli import answer, call
from support.handmade import peft_adapter
from support.peft_models import fill
from support.quantised import LLAMA_SIZES
from support.quantised_weights import WEIGHTS, quantised


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`float`, the model in bf16; `nf4`, as transformers quantises and saves it; `adapter`, trained beside it."""
    folder = tmp_path_factory.mktemp("qlora")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)).bfloat16().save_pretrained(folder / "float")
    scheme = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantised = LlamaForCausalLM.from_pretrained(folder / "float", quantization_config=scheme, device_map="cpu")
    quantised.save_pretrained(folder / "nf4")
    adapted = peft.get_peft_model(quantised, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    fill(adapted, "lora_B", std=0.05)
    adapted.save_pretrained(folder / "adapter")
    return folder


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder in nf4, as bitsandbytes makes them."""
    stored = load_file(folder / "model.safetensors")
    floats = {name: tensor for name, tensor in stored.items() if name.endswith("weight") and tensor.is_floating_point()}
    for key in [name for name in stored if ".quant_state." in name]:
        name = key.partition(".quant_state.")[0]
        parts = {part.removeprefix(f"{name}."): value for part, value in stored.items() if part.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        floats[name] = functional.dequantize_4bit(stored[name], state)
    return floats


def by_hand(base: torch.Tensor, adapter: Path, module: str) -> torch.Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].float() for factor in "AB")
    return base.float() + 2 * (b @ a)


def test_every_weight_is_the_library_s_plus_the_change(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = lora_export.merge(place / "nf4", [place / "adapter"], out, dequantize=True)
    assert any("14 quantised weights (nf4) are stored as floats" in note for note in result.notes)
    merged, base = load_file(out / "model.safetensors"), dequantised(place / "nf4")
    assert merged.keys() == base.keys() and all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    for name, weight in base.items():
        if "_proj." not in name:
            assert torch.equal(merged[name], weight)
            continue
        expected = by_hand(weight, place / "adapter", name.removesuffix(".weight")).bfloat16()
        off = merged[name].view(torch.int16).int() - expected.view(torch.int16).int()
        assert off.abs().max() <= 1 and (off != 0).float().mean() < 1e-3  # sums in another order, at a tie
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    LlamaForCausalLM.from_pretrained(out)


def test_weights_without_an_adapter_are_the_library_s_bit_for_bit(place: Path, tmp_path: Path) -> None:
    only_q = tmp_path / "q"
    shutil.copytree(place / "adapter", only_q)
    tensors = load_file(only_q / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "q_proj" in name}
    save_file(kept, only_q / "adapter_model.safetensors")
    config = json.loads((only_q / "adapter_config.json").read_text())
    (only_q / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    out = tmp_path / "merged"
    lora_export.merge(place / "nf4", [only_q], out, dequantize=True)
    merged, base = load_file(out / "model.safetensors"), dequantised(place / "nf4")
    unchanged = [name for name in base if "q_proj" not in name]
    assert len(unchanged) == len(base) - 2
    assert all(torch.equal(merged[name].view(torch.int16), base[name].view(torch.int16)) for name in unchanged)


def test_merged_model_computes_what_peft_computes_beside_nf4(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    lora_export.merge(place / "nf4", [place / "adapter"], out, dequantize=True, dtype="float32")
    base = LlamaForCausalLM.from_pretrained(place / "float", dtype=torch.float32)
    base.load_state_dict({name: tensor.float() for name, tensor in dequantised(place / "nf4").items()}, strict=False)
    reference = peft.PeftModel.from_pretrained(base, place / "adapter").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        theirs = reference(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 < 1e-2 < (ours - base(ids).logits).abs().max() + 1


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_audit_judges_such_a_merge(dtype: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert call("merge", place / "nf4", place / "adapter", "-o", out, "--dequantize", "--dtype", dtype) == 0
    line = ("verify", out, "--base", place / "nf4", "-a", place / "adapter", "--strict")
    assert answer(capsys, *line)[0] == 0
    tensors = load_file(out / "model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    weight[3, 5] += weight.abs().max() / 50
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    code, document = answer(capsys, *line)
    assert code == 4
    assert [one["name"] for one in document["weights"] if one["outcome"] == "different"] == [
        "model.layers.0.mlp.up_proj.weight"
    ]


def test_what_reads_names_alone_takes_such_a_base(place: Path, tmp_path: Path) -> None:
    found = lora_export.inspect(place / "nf4").checkpoint
    floats = lora_export.inspect(place / "float").checkpoint
    assert found is not None and floats is not None and len(found.quantised) == 14
    assert {spec.name: spec.shape for spec in found.specs} == {spec.name: spec.shape for spec in floats.specs}
    assert lora_export.check(place / "adapter", runtimes=["vllm"], base=place / "nf4")
    for base in ("nf4", "float"):
        lora_export.convert(place / "adapter", tmp_path / f"{base}.gguf", to="gguf", base=place / base)
    assert (tmp_path / "nf4.gguf").read_bytes() == (tmp_path / "float.gguf").read_bytes()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_table_saved_whole_is_none_of_a_quantised_base(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", *quantised(kind))
    found = lora_export.inspect(base).checkpoint
    assert found is not None
    (name,) = found.quantised
    (shape,) = (spec.shape for spec in found.specs if spec.name == name)
    adapter = Adapter(name="a", format="peft", pairs={}, replaced={name: np.ones(shape, np.float32)})
    assert repeated_tables(adapter, found, {}) == []


def test_a_merge_that_repairs_keeps_the_base_quantised(place: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)), peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    )
    fill(model, "lora_B", std=0.05)
    model.save_pretrained(tmp_path / "dora")
    (outcome,) = lora_export.check(tmp_path / "dora", runtimes=["vllm"], base=place / "nf4").outcomes
    (repair,) = outcome.repairs
    result = lora_export.merge(*repair.arguments, **{**repair.options, "output": tmp_path / "merged"})
    assert result.output == tmp_path / "merged"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("aqlm", r"dequantize=True knows bitsandbytes .* quantised by aqlm"),
        ("fp8", "the config names fp8, and no weight is stored so"),
    ],
)
def test_a_scheme_that_is_not_known_or_not_there_is_refused(method: str, message: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", {"fc.weight": torch.ones(8, 64)}, {"quant_method": method})
    with pytest.raises(InputRefused, match=message):
        lora_export.merge(base, [of_fc(tmp_path / "adapter")], tmp_path / "m", dequantize=True)


def test_parts_in_other_shards_and_hashes_of_whole_files(place: Path, tmp_path: Path) -> None:
    """Scales in a file before that of their weights; the record has the hash of each file of the base."""
    from lora_export.storage.hashes import file_sha256

    base, out = tmp_path / "base", tmp_path / "m"
    shutil.copytree(place / "nf4", base)
    stored = load_file(base / "model.safetensors")
    names = sorted(stored, key=lambda name: (name.count(".weight.") == 0, name))
    files = {"a.safetensors": names[: len(names) // 2 - 1], "b.safetensors": names[len(names) // 2 - 1 :]}
    for file, own in files.items():
        save_file({name: stored[name] for name in own}, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    table = {name: file for file, own in files.items() for name in own}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    lora_export.merge(base, [place / "adapter"], out, dequantize=True, hashing="sha256")
    lora_export.merge(place / "nf4", [place / "adapter"], tmp_path / "one", dequantize=True)
    one = load_file(tmp_path / "one" / "model.safetensors")
    several = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert several.keys() == one.keys() and all(torch.equal(several[name], one[name]) for name in one)
    manifest = (out / "lora_export.json").read_text()
    assert all(file_sha256(base / file) in manifest for file in files)
    assert np.all([file_sha256(file) in manifest for file in out.glob("*.safetensors")])


SCHEMES = ["fp8", "compressed-tensors", "gptq", "awq", "modelopt"]


def of_one_layer(scheme: str) -> tuple[dict[str, torch.Tensor], dict[str, object], torch.Tensor]:
    """The stored tensors of a layer of 8 x 64, its `quantization_config`, and its weight as floats."""
    torch.manual_seed(0)
    scales = torch.rand(8, 1) / 8
    if scheme == "fp8":
        weight = torch.randn(8, 64).to(torch.float8_e4m3fn)
        config = {"quant_method": "fp8", "weight_block_size": [1, 64]}
        return {"fc.weight": weight, "fc.weight_scale_inv": scales}, config, weight.float() * scales
    numbers = torch.randint(-8, 8, (8, 64))
    nibbles = (numbers + 8).to(torch.uint8)
    if scheme == "gptq":
        stored = {
            "fc.qweight": packed(nibbles).T.contiguous(),
            "fc.qzeros": torch.full((1, 1), 0x77777777, dtype=torch.int32),  # version 1 stores 8 - 1
            "fc.scales": scales.T.contiguous(),
            "fc.g_idx": torch.zeros(64, dtype=torch.int32),
        }
        return stored, {"quant_method": "gptq", "bits": 4, "group_size": 64}, numbers * scales
    if scheme == "awq":
        stored = {
            "fc.qweight": packed(nibbles.T[:, [0, 2, 4, 6, 1, 3, 5, 7]]),
            "fc.qzeros": torch.full((1, 1), -0x77777778, dtype=torch.int32),
            "fc.scales": scales.T.contiguous(),
        }
        return stored, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, numbers * scales
    if scheme == "mxfp4":
        codes = torch.zeros(1, 8, 2, 16, dtype=torch.uint8)
        stored = {"fc.weight": torch.ones(8, 64), "x_blocks": codes, "x_scales": torch.zeros(1, 8, 2).to(torch.uint8)}
        return {**stored}, {"quant_method": "mxfp4"}, torch.ones(8, 64)
    if scheme == "nf4":
        weight = torch.randn(8, 64)
        floats, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        parts = {f"fc.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
        scheme_of = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        return {"fc.weight": floats, **parts}, scheme_of, functional.dequantize_4bit(floats, state)
    if scheme == "modelopt":
        stored = {
            "fc.weight": packed(nibbles).view(torch.uint8),
            "fc.weight_scale": torch.full((8, 4), 2.0).to(torch.float8_e4m3fn),
            "fc.weight_scale_2": torch.tensor(0.125),
            "fc.input_scale": torch.tensor(1.0),
        }
        of_code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        weight = of_code[(nibbles & 7).long()] * torch.where(nibbles < 8, 1, -1) / 4
        return stored, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, weight
    stored = {"fc.weight_packed": packed(nibbles), "fc.weight_scale": scales, "fc.weight_shape": torch.tensor([8, 64])}
    return stored, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, numbers * scales


def packed(nibbles: torch.Tensor) -> torch.Tensor:
    """Numbers of 4 bits in words of 32, the first in the lowest bits: (rows, columns) -> (rows, columns / 8)."""
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def saved(folder: Path, stored: dict[str, torch.Tensor], quantization: object = None) -> Path:
    """A base of these tensors. Without a quantization, its config has none."""
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    stated = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps({"dtype": "float32"} | stated))
    return folder


def one_layer(folder: Path, more: dict[str, torch.Tensor], **fields: object) -> Path:
    """A base of one layer in fp8, with more tensors and more fields in its quantization_config."""
    stored, quantization, _ = of_one_layer("fp8")
    return saved(folder, stored | more, quantization | fields)


def of_fc(folder: Path) -> Path:
    return peft_adapter(folder, {"fc": (np.ones((1, 64)), np.arange(8.0)[:, None])})


def test_parts_of_no_weight_are_refused_by_name(tmp_path: Path) -> None:
    base = one_layer(tmp_path / "base", {"gone.weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(
        InputRefused, match=r"parts of weights in fp8 belong to no quantised weight:\n.*gone\.weight_sc"
    ):
        lora_export.merge(base, [of_fc(tmp_path / "adapter")], tmp_path / "m", dequantize=True)


def test_scales_of_a_quantised_cache_are_left_out(tmp_path: Path) -> None:
    more = {"k_scale": torch.ones(1), "fc.v_scale": torch.ones(1), "norm.q_scale": torch.ones(1)}
    base = one_layer(tmp_path / "base", more, kv_cache_scheme={"num_bits": 8})
    lora_export.merge(base, [of_fc(tmp_path / "adapter")], tmp_path / "m", dequantize=True)
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == {"fc.weight", "norm.q_scale"}


def test_files_that_repeat_the_quantisation_are_not_copied(tmp_path: Path) -> None:
    base = one_layer(tmp_path / "base", {})
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "generation_config.json"):
        (base / name).write_text("{}")
    lora_export.merge(base, [of_fc(tmp_path / "adapter")], tmp_path / "m", dequantize=True)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "generation_config.json", "lora_export.json", "model.safetensors"}


def test_config_from_before_methods_had_names_is_read() -> None:
    assert method_of({"load_in_4bit": True}) == method_of({"load_in_8bit": True}) == "bitsandbytes"
    assert method_of({"load_in_4bit": False}) == method_of({}) == "unknown"
    assert (method_of({"quant_method": "fp8", "load_in_4bit": True}), method_of("exl2")) == ("fp8", "exl2")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_schemes_are_merged_and_judged(scheme: str, tmp_path: Path) -> None:
    stored, quantization, weight = of_one_layer(scheme)
    base, out = saved(tmp_path / "base", stored | {"norm.weight": torch.ones(64)}, quantization), tmp_path / "merged"
    adapter = of_fc(tmp_path / "adapter")
    result = lora_export.merge(base, [adapter], out, dequantize=True)
    assert any("AWQ scales weights and the inputs of" in note for note in result.notes) == (scheme == "awq")
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == {"fc.weight", "norm.weight"}
    assert torch.equal(merged["fc.weight"], weight + torch.arange(8.0)[:, None])
    assert lora_export.verify(out, adapters=[adapter], base=base)
    save_file(merged | {"fc.weight": weight}, out / "model.safetensors", {"format": "pt"})
    assert not lora_export.verify(out, adapters=[adapter], base=base)


@pytest.mark.parametrize("scheme", [*SCHEMES, "nf4", "mxfp4"])
def test_each_scheme_is_refused_with_both_ways_out(scheme: str, tmp_path: Path) -> None:
    stored, quantization, _ = of_one_layer(scheme)
    base = saved(tmp_path / "base", stored, quantization)
    with pytest.raises(InputRefused) as refused:
        lora_export.merge(base, [of_fc(tmp_path / "adapter")], tmp_path / "m")
    assert f"is quantised ({quantization['quant_method']})" in str(refused.value)
    assert "Merge into the original float model, or make this one a float model: merge(dequ" in str(refused.value)
    assert ("an adapter fits only the model beside which it was trained" in str(refused.value)) == (scheme == "awq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("scheme", "name", "stated"),
    [
        ("modelopt", "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}),
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_quantiser_may_state_its_scheme_in_its_own_file(
    scheme: str, name: str, stated: dict[str, object], tmp_path: Path
) -> None:
    stored, _, weight = of_one_layer(scheme)
    base, out = saved(tmp_path / "base", stored), tmp_path / "merged"
    (base / name).write_text(json.dumps(stated))
    with pytest.raises(InputRefused, match=rf"is quantised \({scheme}\)"):
        lora_export.merge(base, [of_fc(tmp_path / "adapter")], out)
    result = lora_export.merge(base, [of_fc(tmp_path / "adapter")], out, dequantize=True)
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == {"fc.weight"}
    assert torch.equal(merged["fc.weight"], weight + torch.arange(8.0)[:, None])
    assert not (out / name).exists()
    assert any("AWQ scales" in note for note in result.notes) == (scheme == "awq")


def test_float_weights_beside_such_a_file_are_floats(tmp_path: Path) -> None:
    base, out = saved(tmp_path / "base", {"fc.weight": torch.ones(8, 64)}), tmp_path / "merged"
    (base / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    lora_export.merge(base, [of_fc(tmp_path / "adapter")], out)
    assert (out / "quantize_config.json").exists()


# The one fault that a base survives: the config of GPTQ states the size of a group too.
HARMLESS = {("gptq", "fc.g_idx", "missing")}
# What is reported where the numbers themselves are missing, or what tells that they are quantised.
OF_NUMBERS = (
    "belong to no quantised weight|numbers are missing|no weight is stored so|no weight for fc|which is missing"
)


@pytest.mark.parametrize(
    ("fault", "option"),
    [
        *((fault, "dequantize") for fault in ("missing", "nan", "empty", "huge", "other dtype")),
        *((fault, "keep-quantised") for fault in ("missing", "nan")),
    ],
)
@pytest.mark.parametrize("scheme", [*SCHEMES, "nf4", "mxfp4"])
def test_each_damaged_part_ends_with_exit_3_and_no_output(
    scheme: str, fault: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, quantization, _ = of_one_layer(scheme)
    adapter = of_fc(tmp_path / "adapter")
    for number, name in enumerate(name for name in stored if "input_scale" not in name):
        tensors = damaged(stored, name, fault) | {"norm.weight": torch.ones(64)}
        base, out = saved(tmp_path / f"base{number}", tensors, quantization), tmp_path / f"merged{number}"
        code = call("merge", base, adapter, "-o", out, f"--{option}", "--min-retention", "0")
        error = capsys.readouterr().err
        is_harmless = (scheme, name, fault) in HARMLESS
        assert code == (0 if is_harmless else 3), (name, error)
        assert "Traceback" not in error and out.exists() == is_harmless
        if fault == "missing" and not is_harmless:
            assert f"{name}, which belongs to it, is missing" in error or re.search(OF_NUMBERS, error), error
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(("base", "adapter", "merged"))]


def damaged(stored: dict[str, torch.Tensor], name: str, fault: str) -> dict[str, torch.Tensor]:
    """The tensors, one of which is missing, or has another content, shape or dtype."""
    tensors, own = dict(stored), stored[name]
    if fault == "missing":
        del tensors[name]
    elif fault == "nan":
        is_float = own.dtype.is_floating_point
        tensors[name] = torch.full(own.shape, torch.nan).to(own.dtype if is_float else torch.float64)
    elif fault == "other dtype":
        tensors[name] = own.to(torch.int16)
    else:
        tensors[name] = torch.zeros(0 if fault == "empty" else 1 << 12, *own.shape[1:]).to(own.dtype)
    return tensors
