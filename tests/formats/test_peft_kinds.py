"""PEFT's kinds of adapters beside LoRA: merged, verified and in graphs, against PEFT's own merge."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from _pytest.mark import ParameterSet
from peft.tuners.frod import model as peft_frod
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN

import lora_export as le
from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds import reading, subspaces
from lora_export.formats.peft_kinds.low_rank import PEANUT_FUNCTIONS
from lora_export.formats.peft_kinds.reading import kinds
from lora_export.pairs import exact_transforms
from support import ROOT, tables
from support.cli import answer, call
from support.peft_kinds import CASES, LAYOUT, Layers, Trained, differences, graph_of, trained
from support.peft_models import fill
from support.tied import tied_model

README = ROOT / "tests/README.md"
TABLE = "kinds of PEFT's adapters"
NOT_HERE = "not in this test"  # in graphs: layers that are not linear
# PyTorch with the adapter attached is slow: a reference for one case of each way to attach a change to a layer.
JUDGED_BY_PYTORCH = {
    *("LoHa: linear", "LoHa: convolutions", "LoKr: a factor of 2", "IA3: outputs", "OFT: series", "Hira: layers"),
    *("Glora: lora", "LNTuning: norms", "AdaLora: linear", "Vera: saved matrices", "WaveFT: most", "Shira: linear"),
    *("TinyLora: a table", "Beft: biases", "TrainableTokens: rows"),
}


def merge(one: Trained, folder: Path) -> str:
    le.merge(one.base, one.adapter, folder / "out.safetensors", layout=LAYOUT)
    found = differences(one, folder / "out.safetensors")
    assert found
    return "right" if max(found.values()) < 3e-6 else "wrong"


def verify(one: Trained, folder: Path) -> str:
    """The merge is right, and a file with one wrong entry is not."""
    verdict = le.verify(folder / "out.safetensors", base=one.base, adapters=one.adapter, layout=LAYOUT)
    tensors = load_file(folder / "out.safetensors")
    entry = tensors[one.changed[0]].reshape(-1)[:1]
    entry += 0.01 * np.abs(entry) + 0.01
    save_file(tensors, folder / "wrong.safetensors")
    damaged = le.verify(folder / "wrong.safetensors", base=one.base, adapters=one.adapter, layout=LAYOUT)
    return "right" if verdict and not damaged else "wrong"


def verify_model(one: Trained, folder: Path) -> str:
    """PyTorch with the adapter attached, as the reference of the merged file."""
    words = torch.arange(12).reshape(2, 6) % 10
    module = Layers()
    module.load_state_dict(one.before)
    result = le.verify(folder / "out.safetensors", (module, {"words": words}), adapters=one.adapter)
    return "right" if result else "wrong"


def as_lora(one: Trained, folder: Path) -> str:
    """Converted to pairs of LoRA, it merges to the same."""
    options = {"to": "peft", "as_kind": "lora", "rank": 18, "base": one.base, "layout": LAYOUT}
    le.convert(one.adapter, folder / "lora", **options)
    le.merge(one.base, folder / "lora", folder / "of_lora.safetensors", layout=LAYOUT)
    return "right" if max(differences(one, folder / "of_lora.safetensors").values()) < 1e-5 else "wrong"


def in_graph(lora: str, one: Trained, folder: Path) -> str:
    names = [name for name in one.changed if name.removesuffix(".weight") in LAYOUT]
    if names != one.changed:
        return NOT_HERE
    graph = graph_of(folder / "base.onnx", one, names)
    (folder / lora).mkdir()
    options = {"adapters": one.adapter, "lora": lora, "verify": False}  # PEFT's merge judges it
    result = le.export_onnx(graph, folder / lora / "model.onnx", **options)
    session, how = onnxruntime.InferenceSession(str(result.output)), onnxruntime.RunOptions()
    rng, adapter = np.random.default_rng(0), onnxruntime.LoraAdapter()
    weights = {f"x_{name}": one.merged_in_out(name) for name in names}
    inputs = {name: rng.random((2, len(weight)), np.float32) for name, weight in weights.items()}
    expected = [inputs[name] @ weight for name, weight in weights.items()]
    if lora == "inputs":
        adapter.Load(str(next(result.output.parent.glob("*.onnx_adapter"))))
        how.add_active_adapter(adapter)
    if lora == "rows":
        inputs["adapter_ids"] = np.int64([1, 1])
    outputs = zip(session.run(None, inputs, how), expected, strict=True)
    return (
        "right" if all(np.allclose(ours, right, atol=3e-5 * abs(right).max()) for ours, right in outputs) else "wrong"
    )


WAYS = {
    "merge": merge,
    "verify --base": verify,
    "verify --model": verify_model,
    "as LoRA": as_lora,
    **{f"--lora {lora}": functools.partial(in_graph, lora) for lora in ("merged", "nodes", "inputs", "rows")},
}


def outcome(way: str, one: Trained, folder: Path) -> str:
    try:
        return WAYS[way](one, folder)
    except InputRefused:
        return "refused"


def ways() -> Iterator[ParameterSet]:
    """Each case is merged and verified. One of each kind, its layers and its outcomes goes the other ways too."""
    recorded, met = tables.rows(tables.text(README, TABLE)), set()
    for name, case in CASES.items():
        row = recorded.get(name, {})
        alike = (case.config, case.targets, *(value for way, value in row.items() if way != "verify --model"))
        of_few = {"verify --model": name in JUDGED_BY_PYTORCH, "merge": True, "verify --base": True}
        quick = [way for way in WAYS if of_few.get(way, alike not in met)]
        met.add(alike)
        yield pytest.param(name, quick, id=name)
        others = [way for way in WAYS if way == "merge" or way not in quick]  # all judge the merge's output
        yield pytest.param(name, others, id=f"{name}, other ways", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "ways"), ways())
def test_each_way_has_the_outcome_of_the_table(tmp_path, name, ways):
    one = trained(CASES[name], tmp_path)
    found = {way: outcome(way, one, tmp_path) for way in ways}
    if os.environ.get("LORA_EXPORT_TABLES"):
        recorded = tables.rows(tables.text(README, TABLE))
        row = recorded.get(name, dict.fromkeys(WAYS, NOT_HERE)) | found
        tables.put(README, TABLE, tables.table(recorded | {name: row}, "kind"))
    assert "wrong" not in found.values()
    assert found.items() <= tables.rows(tables.text(README, TABLE))[name].items()


def test_the_table_has_each_case_once():
    assert list(tables.rows(tables.text(README, TABLE))) == list(CASES)


def test_every_kind_of_the_installed_peft_is_read_or_refused_by_name(tmp_path):
    tested = {case.saved_as or case.config(**case.options).peft_type.value for case in CASES.values()}
    assert tested >= set(kinds())
    for peft_type in {each.value for each in peft.PeftType} - {"LORA"} - set(kinds()):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
        save_file({"x": np.ones(1)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(
            InputRefused, match=f"peft_type is '{peft_type}', which (cannot be merged|is not supported)"
        ):
            le.load_adapter(tmp_path)
    assert {*reading._rows()["not_weights"], *reading._rows()["not_saved"]} < {each.value for each in peft.PeftType}


# --- What all kinds have in common ---


@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
def test_biases_and_whole_modules_replace_those_of_the_base(tmp_path, bias):
    case = CASES["Vera: saved matrices"]
    one = trained(case, tmp_path, bias=bias, modules_to_save=["norm"])
    assert merge(one, tmp_path) == "right"
    assert ("up.bias" in one.changed, "conv.bias" in one.changed) == (bias != "none", bias == "all")
    assert {"norm.weight", "norm.bias"} < set(one.changed)


@pytest.mark.parametrize(
    "name", ["LoHa: linear", "Vera: drawn matrices", "FourierFT: few", "Shira: linear", "C3A: blocks"]
)
def test_two_adapters_are_added(tmp_path, name):
    (tmp_path / "2").mkdir()
    one, other = trained(CASES[name], tmp_path), trained(CASES["AdaLora: linear"], tmp_path / "2")
    adapters = [one.adapter, other.adapter.rename(tmp_path / "other")]
    le.merge(one.base, adapters, tmp_path / "out.safetensors", layout=LAYOUT, weights=[1, -0.5])
    ours = load_file(tmp_path / "out.safetensors")
    for tensor, before in one.before.items():
        expected = one.merged[tensor] - 0.5 * (other.merged[tensor] - before)
        assert torch.allclose(torch.from_numpy(ours[tensor]), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_tied_table_are_one(tmp_path):
    """PEFT saves them under the name of the head, too, which the base does not store."""
    base = tied_model(tmp_path / "base")
    model = peft.get_peft_model(base.model, peft.TrainableTokensConfig(token_indices=[3, 5]))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == 2
    le.merge(base.base, tmp_path / "adapter", tmp_path / "out")
    ours, theirs = base.reloaded(tmp_path / "out").state_dict(), model.merge_and_unload().state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


DAMAGES = {
    "without its first tensor": lambda tensors: dict(list(tensors.items())[1:]),
    "without its last tensor": lambda tensors: dict(list(tensors.items())[:-1]),
    "with a tensor cut": lambda tensors: tensors | {max(tensors): tensors[max(tensors)][..., :-1]},
    "with a tensor of one more axis": lambda tensors: tensors | {min(tensors): tensors[min(tensors)][None]},
    "with a NaN": lambda tensors: tensors | {max(tensors): tensors[max(tensors)] * np.float32(np.nan)},
    "with another tensor": lambda tensors: tensors | {f"{min(tensors)}.other": np.ones((2, 2), np.float32)},
}


@pytest.mark.parametrize("name", list({name.partition(":")[0]: name for name in CASES}.values()))
def test_a_number_with_a_point_is_the_same_number(tmp_path, name):
    one = trained(CASES[name], tmp_path)
    path = one.adapter / "adapter_config.json"
    path.write_text(re.sub(r"(?<=[ \[])-?\d+(?=[,\n\]])", r"\g<0>.0", path.read_text()))  # 4 becomes 4.0
    le.merge(one.base, one.adapter, tmp_path / "out.safetensors", layout=LAYOUT)
    assert max(differences(one, tmp_path / "out.safetensors").values()) < 3e-6


@pytest.mark.parametrize("name", list({name.partition(":")[0]: name for name in CASES}.values()))
def test_a_damaged_adapter_is_refused(tmp_path, name):
    """Or it is still right: RandLoRA's matrices are there twice. A normalisation layer may lack a bias."""
    one = trained(CASES[name], tmp_path)
    file = one.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for damaged in DAMAGES.values():
        changed = damaged(tensors)
        save_file({key: np.ascontiguousarray(value) for key, value in changed.items()}, file)
        try:
            le.merge(one.base, one.adapter, tmp_path / "out.safetensors", layout=LAYOUT)
        except InputRefused:
            assert not (tmp_path / "out.safetensors").exists()
            continue
        found = differences(one, tmp_path / "out.safetensors")
        assert max(found.values()) < 3e-6 or (name.startswith("LNTuning") and set(found.values()) == {0.0, 1.0})
        (tmp_path / "out.safetensors").unlink()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("LoHa: linear", {"alpha": None}, "alpha is None; it must be a number other than 0"),
        ("Deft: relu", {"alpha": 10**400}, "alpha is 10+$"),
        ("Deft: relu", {"alpha": 10**308}, "which float32 cannot hold"),
        ("AdaLora: linear", {"lora_alpha": 1e300}, "which float32 cannot hold"),
        ("VBLoRA: logits", {"topk": 2.5}, "topk is 2.5, and the bank has"),
        # PEFT takes the rank in its place
        ("AdaLora: linear", {"lora_alpha": -3}, "lora_alpha is -3; it must be a positive number"),
        ("LoHa: linear", {"r": 3}, "up: its tensors have the rank 2, the config's is 3"),
        ("LoHa: linear", {"new_idea": 1}, "unknown fields: new_idea"),
        ("C3A: blocks", {"block_size": 3}, r"up: c3a_kernel is \(3, 2, 6\), the config's block_size is 3"),
        ("Vera: drawn matrices", {"projection_prng_key": None}, "projection_prng_key is None; it must be an integer"),
        ("FourierFT: few", {"n_frequency_pattern": [1]}, "n_frequency_pattern is .*; its type must be dict"),
        ("WaveFT: few", {"wavelet_family": "coif4"}, "wavelet_family is 'coif4'; supported are db1, db2, .* coif3"),
        ("Pvera: saved matrices", {"sample_at_inference": True}, "it draws a change anew for each input"),
        ("Gralora: blocks", {"hybrid_r": 2}, "hybrid_r is 2, and the pair of the whole weight is missing"),
        ("Peanut: layers", {"act_fn": "mish"}, "up: act_fn is 'mish'; supported are relu, tanh"),
        ("Peanut: layers", {"depth": 1}, "up: the config's depth is 1, and it has peanut_A.weight"),
        ("TinyLora: tied vectors", {"projection_seed": 7}, "tinylora_P is that of no layer by projection_seed 7"),
        ("TrainableTokens: rows", {"token_indices": [1, "7"]}, "token_indices of the config is no list of integers"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, name, config, message):
    one = trained(CASES[name], tmp_path)
    path = one.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputRefused, match=message):
        le.merge(one.base, one.adapter, tmp_path / "out.safetensors", layout=LAYOUT)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_layer_of_prime_width_is_not_rotated(tmp_path, is_shared):
    """PEFT makes blocks of one input of it, whatever the size that the config has."""
    net = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 4))
    save_file({name: value.numpy() for name, value in net.state_dict().items()}, tmp_path / "base.safetensors")
    config = peft.OFTConfig(target_modules=["0", "1"], oft_block_size=3, block_share=is_shared)
    model = peft.get_peft_model(net, config)
    fill(model)
    model.save_pretrained(tmp_path / "one")
    le.merge(tmp_path / "base.safetensors", tmp_path / "one", tmp_path / "out.safetensors", layout={"*": "out_in"})
    merged = load_file(tmp_path / "out.safetensors")
    for name, value in model.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-5, atol=1e-6)
    assert np.array_equal(merged["1.weight"], load_file(tmp_path / "base.safetensors")["1.weight"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("RandLora: dense", {"save_projection": False}, "Save the adapter with save_projection=True"),
        ("TinyLora: tied vectors", {"save_projection": False}, "Save the adapter with save_projection=True"),
        ("TinyLora: few numbers", {"r": 1, "projection_seed": 149430}, "tinylora_P is that of several layers by"),
        ("Frod: linear", {"save_projection": False}, "Save the adapter with save_projection=True"),
        ("UniLora: saved indices", {"save_indices": False}, "Save the adapter with save_indices=True"),
        ("HRA: linear", {"r": 6, "apply_GS": True}, r"point: hra_u is \(4, 6\): .* at most the number of inputs"),
    ],
)
def test_options_that_leave_no_matrix_are_named(tmp_path, name, options, message):
    case = replace(CASES[name], options=CASES[name].options | options)
    with pytest.raises(InputRefused, match=message):
        le.load_adapter(trained(case, tmp_path).adapter)


@pytest.mark.parametrize(
    "name",
    [
        *("lin", "layers.0.self_attn.q_proj", "h.3.c_attn", "encoder.layer.1.attention.output.dense"),
        *("encoder.layer.1.output.dense", "blocks.2", "classifier.dense"),
    ],
)
def test_layers_share_a_matrix_by_pefts_names(name):
    assert subspaces._category(name) == peft_frod._category_from_key(name)


@pytest.mark.parametrize("name", PEANUT_FUNCTIONS)
def test_activations_are_those_of_transformers(name):
    x = np.linspace(-6, 6, 99, dtype=np.float32)
    theirs = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(PEANUT_FUNCTIONS[name](x), theirs, atol=2e-6)
    np.testing.assert_allclose(exact_transforms._activated(name, x.astype(np.float64)), theirs, atol=2e-6)


def test_equal_singular_values_are_not_split(tmp_path):
    one = trained(CASES["OSF: half"], tmp_path)
    base = load_file(one.base)
    base["down.weight"] = np.eye(6, 18, dtype=np.float32)
    save_file(base, one.base)
    with pytest.raises(InputRefused, match="singular values 3 and 4 from below are equal: OSF cannot split them"):
        le.merge(one.base, one.adapter, tmp_path / "out.safetensors", layout=LAYOUT)
    assert not (tmp_path / "out.safetensors").exists()


# --- Adapters without the shapes of their weights ---


def test_the_layout_must_be_stated_where_a_shape_shows_nothing(tmp_path):
    one = trained(CASES["FourierFT: few"], tmp_path)
    with pytest.raises(InputRefused, match=r"the layout of 2 matrices is unknown: down.weight, up.weight\. .*layout="):
        le.merge(one.base, one.adapter, tmp_path / "out.safetensors")


def test_the_number_of_outputs_shows_the_layout(tmp_path):
    one = trained(CASES["Vera: drawn matrices"], tmp_path)
    le.merge(one.base, one.adapter, tmp_path / "out.safetensors")
    assert max(differences(one, tmp_path / "out.safetensors").values()) < 3e-6


@pytest.mark.parametrize("name", ["Vera: saved matrices", "Miss: a rest"])
def test_it_is_converted_with_its_base_alone(tmp_path, name):
    one = trained(CASES[name], tmp_path)
    with pytest.raises(InputRefused, match="its file does not record its shape: state its base by base="):
        le.convert(one.adapter, tmp_path / "converted", to="peft")
    assert not (tmp_path / "converted").exists()
    le.convert(one.adapter, tmp_path / "converted", to="peft", base=one.base)
    le.merge(one.base, tmp_path / "converted", tmp_path / "out.safetensors", layout=LAYOUT)
    assert max(differences(one, tmp_path / "out.safetensors").values()) < 1e-5


def test_inspect_shows_that_the_shape_is_that_of_the_base(tmp_path, capsys):
    one = trained(CASES["Vera: saved matrices"], tmp_path)
    for options in ([], ["-v"]):
        assert call("inspect", one.adapter, *options) == 0
        assert "the base's" in capsys.readouterr().out
    code, found = answer(capsys, "inspect", one.adapter)
    assert code == 0 and found
    assert call("combine", one.adapter, "-o", tmp_path / "out") == 3
    assert call("resize", one.adapter, "-o", tmp_path / "out", "--rank", "1") == 3
    assert capsys.readouterr().err.count("does not record the shapes of its weights") == 4
    assert not (tmp_path / "out").exists()
