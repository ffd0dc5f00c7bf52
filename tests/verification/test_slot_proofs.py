"""Graphs of slots: proven with adapters that they have never seen, also after these were replaced."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lora_export as le
from lora_export.errors import Different, InputRefused, MatchError, Undecided, WrongUsage
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import read_contract
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.provenance import SLOTS_KEY
from lora_export.runtime.onnx_runner import OnnxRunner
from support.generators import encoder_decoder_adapter, small_encoder_decoder
from support.graphs import an_adapter
from support.insertion import with_other_ids, with_reversed_rows
from support.small_graphs import PAIR

INPUTS = {"input": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2))


def adapter(name: str, scale: float = 1.0, rank: int = 1) -> Adapter:
    pair = LoraPair(a=np.repeat(PAIR.a, rank, axis=0), b=np.repeat(PAIR.b, rank, axis=1), scale=scale)
    return an_adapter({"0": pair}, name=name)


def export(path: Path, adapters: Any = (), **options: Any) -> Any:
    return le.export_onnx((net(), INPUTS), path, adapters=adapters, lora="slots", **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of four slots that was made without an adapter."""
    path = tmp_path_factory.mktemp("slots") / "slots.onnx"
    result = export(path, target="0", slots=4, max_rank=2, dora=True)
    assert list(result.proofs.adapters) == ["generated 1", "generated 2"] and result.proofs.moved.verdict
    assert [file.name for file in result.files] == ["slots.onnx"]
    return path


OTHER_IDS = {
    "the slot beside it": "used = Sign(adapter_ids) next = Add(adapter_ids, used) "
    "last = Constant <value = int64[1] {4}> () other = Min(next, last)",
    "never beyond slot 2": "last = Constant <value = int64[1] {2}> () other = Min(adapter_ids, last)",
    "never the last slot": "last = Constant <value = int64[1] {3}> () other = Min(adapter_ids, last)",
    "the first slot for the base": "one = Constant <value = int64[1] {1}> () other = Max(adapter_ids, one)",
}


@pytest.mark.parametrize("given", [[], ["x"], ["x", "y"], ["x", "y", "z"]])
def test_a_right_graph_is_same_with_adapters_that_it_has_not_seen(exported: Path, given: list[str]) -> None:
    adapters = [adapter(name, scale) for name, scale in zip(given, (1.0, -2.0, 0.5), strict=False)]
    assert le.verify(exported, (net(), INPUTS), adapters=adapters)


@pytest.mark.parametrize("wrong", OTHER_IDS)
def test_a_graph_that_reads_another_slot_is_different(exported: Path, wrong: str, tmp_path: Path) -> None:
    path = with_other_ids(exported, OTHER_IDS[wrong], tmp_path / "wrong.onnx")
    result = le.verify(path, (net(), INPUTS), adapters=[adapter("x"), adapter("y", -2.0)])
    assert result.verdict.outcome == "different"


def test_equal_neighbours_are_undecided(exported: Path) -> None:
    result = le.verify(exported, (net(), INPUTS), adapters=[adapter("x"), replace(adapter("x"), name="y")])
    assert result.verdict.outcome == "undecided"
    assert "x and y in the slot beside it compute nearly the same" in str(result)


def test_a_wrong_graph_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = onnx_adapter.arrays_of
    monkeypatch.setattr(onnx_adapter, "arrays_of", lambda path: {key: 2 * value for key, value in read(path).items()})
    with pytest.raises(Different):
        export(tmp_path / "slots.onnx", [adapter("x"), adapter("y", -2.0)], slots=2)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(Undecided, match="x and y"):
        export(tmp_path / "slots.onnx", [adapter("x"), replace(adapter("x"), name="y")], slots=2)
    assert not list(tmp_path.iterdir())


def test_given_adapters_become_files_of_the_fixed_rank(tmp_path: Path) -> None:
    result = export(tmp_path / "slots.onnx", [adapter("x"), adapter("y", -2.0)], slots=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slots.onnx", "x.onnx_adapter", "y.onnx_adapter"]
    assert result.proofs.mixed.verdict and result.proofs.moved.verdict
    arrays = onnx_adapter.arrays_of(tmp_path / "y.onnx_adapter")
    assert {name: value.shape for name, value in arrays.items()} == {
        "0.lora_A.weight": (3, 16),
        "0.lora_B.weight": (16, 2),
    }
    le.convert(adapter("z", 3.0), tmp_path / "z", graph=tmp_path / "slots.onnx")
    stored = onnx_adapter.arrays_of(tmp_path / "z.onnx_adapter")
    assert np.array_equal((stored["0.lora_A.weight"] @ stored["0.lora_B.weight"]).T, 3 * PAIR.b @ PAIR.a)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([adapter("x", rank=3)], "x, 0.weight: rank 3 > 2"),
        ([an_adapter({"1": PAIR}, name="x")], "the graph takes no adapter at"),
        ([adapter(f"a{number}", number) for number in range(1, 6)], "has 4 slots, for 5 adapters"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    exported: Path, given: list[Adapter], message: str, tmp_path: Path
) -> None:
    if len(given) == 1:
        with pytest.raises(InputRefused, match=message):
            le.convert(given[0], tmp_path / "x.onnx_adapter", graph=exported)
        assert not list(tmp_path.iterdir())
    with pytest.raises((InputRefused, MatchError), match=message if len(given) > 1 else None):
        le.verify(exported, (net(), INPUTS), adapters=given)


def test_one_id_of_a_graph_that_holds_no_adapter_is_refused(exported: Path) -> None:
    with pytest.raises(InputRefused, match="holds no adapters: leave"):
        le.verify(exported, (net(), INPUTS), adapters=[adapter("x")], adapter_id=1)
    with pytest.raises(InputRefused, match="takes adapters already"):
        le.export_onnx(exported, exported.with_name("more.onnx"), adapters=[adapter("x")], lora="rows")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs an adapter"),
        ({"target": "0", "dora": True, "per_row": 2}, "exclude each other"),
        ({"target": "0", "lora": "rows", "slots": 3}, "slots.* is for"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.export_onnx((net(), INPUTS), tmp_path / "slots.onnx", **{"lora": "slots", **options})


def test_several_adapters_on_a_row_are_proven(tmp_path: Path) -> None:
    result = export(tmp_path / "slots.onnx", target="0", slots=3, per_row=2)
    assert result.proofs.several.verdict and result.proofs.moved.verdict
    assert le.verify(tmp_path / "slots.onnx", (net(), INPUTS), adapters=[adapter("x"), adapter("y", -2.0)])


@pytest.mark.parametrize(
    "damage",
    [
        '"slots": 4 -> "slots": 0',
        '"slots": 4 -> "slots": "4"',
        '"heads": [] -> "heads": [{}]',
        '"max_rank": 2 -> "max_rank": 0',
    ],
)
def test_a_damaged_record_is_refused(exported: Path, damage: str) -> None:
    metadata, (old, new) = dict(OnnxRunner(exported).metadata), damage.split(" -> ")
    assert read_contract(metadata, "g").slots == 4 and old in metadata[SLOTS_KEY]
    with pytest.raises(InputRefused, match="is damaged"):
        read_contract({SLOTS_KEY: metadata[SLOTS_KEY].replace(old, new)}, "g")


@pytest.mark.parametrize("runner", [None, "onnx-reference"])
@pytest.mark.parametrize("slots", [5, 10**12])
def test_a_record_of_other_slots_than_the_graph_takes_is_refused(
    exported: Path, slots: int, runner: str | None, tmp_path: Path
) -> None:
    model = load_graph(exported)
    model.metadata_props[SLOTS_KEY] = model.metadata_props[SLOTS_KEY].replace('"slots": 4', f'"slots": {slots}')
    ir.save(model, tmp_path / "claims.onnx")
    with pytest.raises(InputRefused, match=rf"has no input .* of float32 \[{slots + 1}, "):
        le.verify(tmp_path / "claims.onnx", (net(), INPUTS), adapters=[adapter("x")], runner=runner)


# --- The graphs of an encoder-decoder, whose slots each have their part of an adapter ---


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 `base`, its adapters `fr` and `de`, and `served`, made without them."""
    folder = tmp_path_factory.mktemp("t5")
    base = small_encoder_decoder("t5", folder / "base")
    encoder_decoder_adapter(base, folder / "fr")
    encoder_decoder_adapter(base, folder / "de", seed=2, targets=r"decoder\..*\.(q|k|v)")
    shape = {"target": "all-linear", "slots": 3, "max_rank": 4}
    le.export_onnx(base, folder / "served", lora="slots", with_cache=True, verify=False, **shape)  # type: ignore[arg-type]
    return folder


def verdict_of(graphs: Path, folder: Path, *names: str) -> Any:
    return le.verify(graphs, folder / "base", adapters=[folder / name for name in names or ("fr", "de")]).verdict


@pytest.mark.slow
def test_graphs_of_an_encoder_decoder_take_adapters_that_they_have_not_seen(t5: Path) -> None:
    assert verdict_of(t5 / "served", t5)
    assert verdict_of(t5 / "served", t5, "de")
    with pytest.raises(InputRefused, match="holds no adapters: leave"):
        le.verify(t5 / "served", t5 / "base", adapters=[t5 / "fr"], adapter_id=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_slots_of_other_encoder_decoders_are_proven(name: str, tmp_path: Path) -> None:
    base = small_encoder_decoder(name, tmp_path / "base")
    adapters = [encoder_decoder_adapter(base, tmp_path / f"a{seed}", seed=seed) for seed in (1, 2)]
    shape: dict[str, Any] = {"slots": 3, "max_rank": 4, "with_cache": True}
    result = le.export_onnx(base, tmp_path / "served", adapters=adapters, lora="slots", **shape)
    assert result.proof is not None and result.proof.verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "module"),
    [
        ("decoder_model", "decoder.block.1.layer.1.EncDecAttention.k"),  # the cache of the cross attention
        ("decoder_with_past_model", "decoder.block.0.layer.0.SelfAttention.v"),
        ("encoder_model", "encoder.block.0.layer.0.SelfAttention.q"),
    ],
)
def test_a_layer_that_reads_the_slots_of_other_rows_is_different(
    t5: Path, graph: str, module: str, tmp_path: Path
) -> None:
    wrong = shutil.copytree(t5 / "served", tmp_path / "wrong")
    model = load_graph(t5 / "served" / f"{graph}.onnx")
    stack = next(value for value in model.graph.inputs if value.name == f"{module}.lora_A.weight")
    gather = next(node for node, _ in stack.uses())
    with_reversed_rows(model, gather.inputs[1], [(gather, 1)])
    save_graph(model, wrong, f"{graph}.onnx")
    assert verdict_of(wrong, t5).outcome == "different"
