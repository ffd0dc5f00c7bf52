"""Changes that follow from the weight, from files to every output: right, or refused by name."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lora_export as le
from lora_export.errors import InputRefused
from lora_export.report.screens import contents_of
from support.small_models import MODELS, small_model

BERT = [f"layer.{number}.attention.{part}" for number in range(2) for part in ("self.query", "output.dense")]
GPT2 = ["attn.c_attn", "mlp.c_proj"]
KINDS = {
    "IA3": ("bert", BERT, peft.IA3Config, {"feedforward_modules": BERT[:1]}),
    "RoAd": ("bert", BERT, peft.RoadConfig, {"group_size": 4}),
    "DEFT": ("gpt2", GPT2, peft.DeftConfig, {"r": 2, "fan_in_fan_out": True}),
}


def an_adapter(name: str, base: Path, folder: Path, config: peft.PeftConfig) -> Path:
    torch.manual_seed(1)
    model = peft.get_peft_model(getattr(hf, MODELS[name][0]).from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def files(request, tmp_path_factory) -> tuple[Path, Path]:
    """A base and an adapter."""
    name, targets, config, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp("files")
    base = small_model(name, folder / "base")
    return base, an_adapter(name, base, folder / "adapter", config(target_modules=targets, **options))


def test_a_merged_folder_is_proven_and_half_of_it_is_different(files, tmp_path):
    base, adapter = files
    le.merge(base, adapter, tmp_path / "whole")
    le.merge(base, adapter, tmp_path / "half", weights=[0.5])
    assert le.verify(tmp_path / "whole", base=base, adapters=adapter)
    for against in ({"model": base}, {"base": base}):
        assert not le.verify(tmp_path / "half", adapters=adapter, **against)
        assert le.verify(tmp_path / "half", adapters=adapter, weights=[0.5], **against)


@pytest.mark.slow
def test_exports_with_the_change_in_the_weights_are_proven(files, tmp_path):
    base, adapter = files
    assert le.export_onnx(base, tmp_path / "merged.onnx", adapters=adapter).proof.verdict
    assert le.export_torchscript(base, tmp_path / "merged.pt", adapters=adapter).proof.verdict
    le.export_onnx(base, tmp_path / "base.onnx")
    result = le.export_onnx(tmp_path / "base.onnx", tmp_path / "from_graph.onnx", adapters=adapter)
    assert result.proof.verdict  # graph against graph, with exact_change in place of a branch
    assert le.verify(tmp_path / "from_graph.onnx", base, adapters=adapter)


@pytest.mark.parametrize("lora", ["nodes", "inputs", "rows"])
def test_a_change_beside_the_weight_is_refused(files, tmp_path, lora):
    base, adapter = files
    if lora == "nodes" and "IA3" in (adapter / "adapter_config.json").read_text():
        return  # a scale can be beside the weight, and the bias is scaled in the graph
    with pytest.raises(InputRefused, match=r"change by|tensors would differ from the base's:\n.*dense.bias"):
        le.export_onnx(base, tmp_path / "out.onnx", adapters=adapter, lora=lora)
    assert not list(tmp_path.iterdir())


IA3 = {  # model -> layers whose outputs are scaled, and layers whose inputs are
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "bert": (["query", "attention.output.dense"], ["intermediate.dense"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
}
MODES = {"llama": ["nodes", "inputs", "rows"], "bert": ["nodes"], "gpt2": ["nodes"], "LoKr": ["nodes"]}


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A base, and an adapter that is beside its weights and no pair: IA3 on this model, or LoKr on a Llama."""

    @functools.cache
    def made(name: str) -> tuple[Path, Path]:
        folder, model = tmp_path_factory.mktemp(name), "llama" if name == "LoKr" else name
        config = peft.LoKrConfig(target_modules=["q_proj", "down_proj"], r=2)
        if name in IA3:
            outputs, inputs = IA3[name]
            config = peft.IA3Config(target_modules=[*outputs, *inputs], feedforward_modules=inputs)
        base = small_model(model, folder / "base")
        return base, an_adapter(model, base, folder / "adapter", config)

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [(name, lora) for name, modes in MODES.items() for lora in modes])
def test_what_is_beside_the_weights_is_proven(beside, tmp_path, name, lora):
    base, adapter = beside(name)
    result = le.export_onnx(base, tmp_path / "out.onnx", adapters=adapter, lora=lora)
    assert result.proof is None or result.proof.verdict
    wrong = load_file(adapter / "adapter_model.safetensors")
    wrong[max(wrong)] = wrong[max(wrong)] * 0.9
    (tmp_path / "other").mkdir()
    save_file(wrong, tmp_path / "other/adapter_model.safetensors")
    shutil.copyfile(adapter / "adapter_config.json", tmp_path / "other/adapter_config.json")
    chosen = {"inputs": {"onnx_adapter": tmp_path / "adapter.onnx_adapter"}, "rows": {"adapter_id": 1}}.get(lora, {})
    assert le.verify(tmp_path / "out.onnx", base, adapters=adapter, **chosen)
    assert not le.verify(tmp_path / "out.onnx", base, adapters=tmp_path / "other", **chosen)


def test_other_ways_out_are_refused_by_name(files, tmp_path):
    base, adapter = files
    for work in (
        lambda: le.export_torchscript(base, tmp_path / "out.pt", adapters=adapter, lora="nodes"),
        lambda: le.convert(adapter, tmp_path / "out.safetensors", to="kohya"),
        lambda: le.convert(adapter, tmp_path / "out", to="peft"),
        lambda: le.resize(adapter, tmp_path / "out", rank=1),
    ):
        with pytest.raises(InputRefused, match="follows from the weight"):
            work()
    assert not list(tmp_path.iterdir())


def test_the_base_comes_back_from_a_residual(files, tmp_path):
    base, adapter = files
    le.merge(base, adapter, tmp_path / "merged", keep_residual=tmp_path / "residual")
    le.unmerge(tmp_path / "merged", adapter, tmp_path / "again", base_from=tmp_path / "residual")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_changes_of_one_weight_are_refused(files, tmp_path):
    base, adapter = files
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value * 1.5 for name, value in tensors.items()}, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(InputRefused, match="the result depends on their order"):
        le.merge(base, [adapter, other], tmp_path / "out")


def test_an_adapter_shows_its_kind(files):
    _, adapter = files
    report = le.inspect(adapter)
    assert {pair.kind for pair in report.adapter.pairs.values()} <= KINDS.keys()
    assert all("WeightTransform(" in repr(pair) for pair in report.adapter.pairs.values())
    assert contents_of(report.adapter) == f"{len(report.adapter.pairs)} weights that are transformed"
