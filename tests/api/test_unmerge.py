"""`merge` with a residual and `unmerge`: every file of the base comes back, bit for bit, or nothing does."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

import lora_export as le
from lora_export.errors import InputRefused, LoraExportError, OutputFailed, WrongUsage
from support import experts
from support.api import Recorder
from support.combined import LAYERS, LAYOUT, adapted
from support.fine_tuned import MODELS, made
from support.folder_contents import folder_contents
from support.handmade import base_file, graph_file, peft_adapter

RNG = np.random.default_rng(12)
W = RNG.normal(size=(40, 30))
BF16 = ml_dtypes.bfloat16


def pair(seed: int, size: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    own = np.random.default_rng(seed)
    return size * own.normal(size=(2, 30)), own.normal(size=(40, 2))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of a base in bfloat16, and adapters for it."""
    (tmp_path / "base").mkdir()
    tensors = {"fc.weight": W, "up.weight": 3 * W, "norm.weight": W[0], "scale": np.array(2.0)}
    base_file(tmp_path / "base/model.safetensors", tensors, BF16, {"format": "pt"})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama",   "dtype": "bfloat16"}')
    (tmp_path / "base/tokenizer").mkdir()
    (tmp_path / "base/tokenizer/words.txt").write_text("a\nb")
    peft_adapter(tmp_path / "one", {"fc": pair(1), "up": pair(2)})
    peft_adapter(tmp_path / "two", {"fc": pair(3)}, lora_alpha=3)
    return tmp_path


def round_trip(
    place: Path, *adapters: str, given: tuple[str, ...] | None = None, **options: Any
) -> le.api.merge.MergeResult:
    """Merge, move the base away, and make it again."""
    paths = [place / name for name in adapters]
    result = le.merge(place / "base", paths, place / "out", keep_residual=place / "residual", **options)
    before = folder_contents(place / "base")
    (place / "base").rename(place / "away")
    restored = [place / name for name in (adapters if given is None else given)]
    le.unmerge(place / "out", restored, place / "again", base_from=place / "residual")
    assert folder_contents(place / "again") == before
    assert folder_contents(place / "out") != before
    return result


@pytest.mark.parametrize("dtype", ["keep", "float32", "float16"])
def test_a_folder_comes_back_with_every_file(place: Path, dtype: str) -> None:
    round_trip(place, "one", dtype=dtype)


def test_several_adapters_are_recognised_in_any_order(place: Path) -> None:
    round_trip(place, "one", "two", given=("two", "one"), weights=[0.5, -1.5])


def test_a_combination_is_made_again(place: Path) -> None:
    combination = le.Combination("dare_ties", 0.5, seed=4)
    round_trip(place, "one", "two", combination=combination)


def test_prefixes_and_layouts_are_remembered(place: Path) -> None:
    peft_adapter(place / "other", {"old_square": (np.eye(30)[:2], 0.01 * np.eye(30)[:, :2] + 0.01)}, layout="")
    base_file(place / "base/model.safetensors", {"square": W[:30], "square.weight": W[:30]}, BF16)
    (place / "base/config.json").write_text("{}")
    round_trip(place, "other", prefixes={"old_": ""}, layout={"square": "in_out"})


def test_an_earlier_merge_and_its_record_come_back(place: Path) -> None:
    le.merge(place / "base", place / "two", place / "first")
    (place / "base").rename(place / "original")
    (place / "first").rename(place / "base")
    round_trip(place, "one", hashing="sha256")


def test_shards_and_their_index_come_back(place: Path) -> None:
    (place / "base/model.safetensors").unlink()
    shards = {"model-1.safetensors": {"fc.weight": W}, "model-2.safetensors": {"up.weight": W, "norm.weight": W[0]}}
    for name, tensors in shards.items():
        base_file(place / "base" / name, tensors, np.float16)
    index = {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (place / "base/model.safetensors.index.json").write_text(json.dumps(index))
    round_trip(place, "one", dtype="bfloat16")


def test_whole_tensors_and_a_new_head_need_no_adapter(place: Path) -> None:
    head = {"fc.weight": W.astype(np.float32), "score.weight": W.astype(np.float32), "norm.weight": W[1]}
    peft_adapter(place / "head", {}, head)
    round_trip(place, "head", given=())


def test_names_with_a_prefix_come_back_without_it(place: Path) -> None:
    peft_adapter(place / "head", {}, {"bert.norm.weight": W[1], "classifier.weight": W.astype(np.float32)})
    result = round_trip(place, "head", given=())
    assert result.plan.name_prefix == "bert."


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"lora_bias": True, "bias": "all"},
        {"use_rslora": True},
    ],
)
def test_all_kinds_of_layers_and_variants_come_back(tmp_path: Path, config: dict[str, Any]) -> None:
    targets = ["linear", "kernel"] if "lora_bias" in config else list(LAYERS)
    adapted(tmp_path, {"target_modules": targets} | config)
    layout = {layer: LAYOUT.get(layer, "out_in") for layer in ("linear", "conv1d")}
    base, out, residual = (tmp_path / name for name in ("base.safetensors", "out.safetensors", "residual"))
    le.merge(base, tmp_path / "one", out, layout=layout, keep_residual=residual)
    le.unmerge(out, tmp_path / "one", tmp_path / "again.safetensors", base_from=residual)
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes() != out.read_bytes()


def test_parts_of_a_stored_tensor_come_back(tmp_path: Path) -> None:
    # The adapter has the names of the loaded model, which renames all of them.
    made("vit").save_pretrained(tmp_path / "base")
    loaded: nn.Module = MODELS["vit"][0].from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(loaded, peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "one")
    result = round_trip(tmp_path, "one")
    assert result.report is not None and len(result.report.results) == 4


@pytest.mark.parametrize("model", sorted(experts.MODELS))
def test_experts_come_back_in_both_spellings(tmp_path: Path, model: str) -> None:
    (tmp_path / model).mkdir()
    saved = experts.save(tmp_path / model, model)
    for spelling in ("old", "new"):
        out, residual, again = (tmp_path / f"{spelling} {name}" for name in ("out", "residual", "again"))
        le.merge(saved[spelling], saved["adapter"], out, keep_residual=residual)
        le.unmerge(out, saved["adapter"], again, base_from=residual)
        assert folder_contents(again) == folder_contents(saved[spelling])
        assert residual.stat().st_size < 0.3 * sum(
            map(len, folder_contents(again).values())
        )  # every change is subtracted


def test_the_residual_is_small_and_its_size_is_reported(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    wide = RNG.normal(size=(512, 300))
    base_file(tmp_path / "base/model.safetensors", {"fc.weight": wide}, BF16)
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    a, b = 0.005 * RNG.normal(size=(4, 300)), RNG.normal(size=(512, 4))  # 1 % of the weight
    peft_adapter(tmp_path / "one", {"fc": (a, b)})
    seen = Recorder()
    result = round_trip(tmp_path, "one", on_message=seen.messages.append)
    size = (tmp_path / "residual").stat().st_size
    assert result.residual_bytes == size < 0.03 * wide.size * 2
    assert any(f"residual has {size:,} bytes" in message for message in seen.messages)
    # Without the adapter: the bits in which the two differ.
    old, new = (load_file(tmp_path / f / "model.safetensors")["fc.weight"].view(np.uint16) for f in ("again", "out"))
    with zipfile.ZipFile(tmp_path / "naive", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("differences", (old ^ new).tobytes())
    assert (tmp_path / "naive").stat().st_size > 10 * size


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([np.float64, np.float32, np.float16, BF16]),
    output=st.sampled_from(["keep", "float32", "bfloat16", "float16"]),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    size=st.sampled_from([1e-4, 1e-2, 1.0, 30.0]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 1 << 16),
)
def test_any_base_and_adapters_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: Any,
    output: str,
    ranks: list[int],
    size: float,
    shape: tuple[int, int],
    seed: int,
) -> None:
    place, rng = tmp_path_factory.mktemp("any"), np.random.default_rng(seed)
    base = base_file(place / "base.safetensors", {"fc.weight": rng.normal(size=shape), "n.weight": [1, 2]}, dtype)
    adapters = [
        peft_adapter(
            place / f"a{number}", {"fc": (size * rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank)))}
        )
        for number, rank in enumerate(ranks)
    ]
    out, residual, again = (place / name for name in ("out.safetensors", "residual", "again.safetensors"))
    try:
        le.merge(base, adapters, out, dtype=output, keep_residual=residual, min_retention=0)
    except InputRefused as refused:  # the change is below the precision of the output
        assert "to rounding" in str(refused) and not residual.exists()
        return
    le.unmerge(out, adapters[::-1], again, base_from=residual)
    assert again.read_bytes() == base.read_bytes()


# --- what is refused ---


@pytest.fixture
def merged(place: Path) -> Path:
    le.merge(place / "base", [place / "one", place / "two"], place / "out", keep_residual=place / "residual")
    return place


def unmerge(place: Path, *adapters: str, merged: str = "out", **options: Any) -> None:
    le.unmerge(
        place / merged, [place / name for name in adapters], place / "again", base_from=place / "residual", **options
    )


def test_other_and_missing_adapters_are_named(merged: Path) -> None:
    peft_adapter(merged / "three", {"fc": pair(9)})
    before = sorted(merged.iterdir())
    with pytest.raises(InputRefused, match=r"needs the adapters of its merge: two \(sha256 \w{12}\) is not given"):
        unmerge(merged, "one")
    with pytest.raises(InputRefused, match="three was not in the merge"):
        unmerge(merged, "one", "two", "three")
    assert sorted(merged.iterdir()) == before


@pytest.mark.parametrize("position", [0.5, 1.0])
def test_one_changed_byte_of_the_merged_weights_is_found(merged: Path, position: float) -> None:
    path = merged / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    before = sorted(merged.iterdir())
    with pytest.raises(InputRefused, match="is not what the merge wrote"):
        unmerge(merged, "one", "two")
    assert sorted(merged.iterdir()) == before


def test_a_changed_file_beside_the_weights_is_found(merged: Path) -> None:
    (merged / "out/tokenizer/words.txt").write_text("a\nc")
    with pytest.raises(InputRefused, match=r"words.txt is not the file that the merge wrote"):
        unmerge(merged, "one", "two")
    (merged / "out/tokenizer/words.txt").unlink()
    with pytest.raises(InputRefused, match=r"has no tokenizer/words.txt, which the base had"):
        unmerge(merged, "one", "two")
    assert not (merged / "again").exists()


def rewritten(path: Path, change: Any) -> None:
    """The residual with other members, or with other facts."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    facts = json.loads(members["residual.json"])
    change(members, facts)
    members["residual.json"] = members["residual.json"] and json.dumps(facts).encode()
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


SHARD = "model.safetensors"
ATTACKS: dict[str, tuple[Any, str]] = {
    "differences cut short": (lambda m, f: m.update({"data/0": m["data/0"][:-9]}), "it ends too early"),
    "no differences": (lambda m, f: m.pop("data/0"), "it has no data/0"),
    "other differences": (
        lambda m, f: m.update({"data/0": m["data/0"][:-1] + bytes([m["data/0"][-1] ^ 1])}),
        "the result would not be the base",
    ),
    "a header of another file": (lambda m, f: m.update({"header/0": b"\xff" * 8 + b"{}"}), "header"),
    "a header cut short": (lambda m, f: m.update({"header/0": m["header/0"][:-3]}), "header"),
    "another format": (lambda m, f: f.update(format=99), "is a residual of format 99"),
    "no hashes": (lambda m, f: f.update(hashing="crc"), "hashes that this version does not know"),
    "a file outside": (lambda m, f: f["files"].update({"../x": {"stored": True, "hash": ""}}), "outside the model"),
    "an absolute file": (lambda m, f: f["files"].update({"/tmp/x": {"stored": True}}), "outside the model"),
    "a weight file outside": (lambda m, f: f["shards"].update({"../w": f["shards"][SHARD]}), "outside the model"),
    "no facts on a file": (lambda m, f: f["shards"].update({SHARD: {"number": 0}}), "are not those of a weight file"),
    "no shards": (lambda m, f: f.pop("shards"), "has no shards"),
    "adapters that are none": (lambda m, f: f.update(adapters=[3]), "are no records of a merge"),
    "an adapter without a weight": (lambda m, f: f["adapters"][0].update(weight=None), "are no records of a merge"),
    "an adapter without a hash": (lambda m, f: f["adapters"][0].update(sha256=[1]), "are no records of a merge"),
    "no way of ties": (lambda m, f: f["settings"].update(tied="much"), "its settings are not those of a merge"),
    "no layout": (lambda m, f: f["settings"].update(layout={"up": "in"}), "its settings are not those of a merge"),
    "no parts": (lambda m, f: f["settings"]["reading"].update(enable_lora=5), "its settings are not those of a merge"),
    "no settings": (lambda m, f: f.update(settings={}), "its settings are not those of a merge"),
    "a tensor more": (lambda m, f: f["shards"][SHARD]["changed"].update({"new.weight": 1}), "which the base has not"),
    "rows that do not divide": (
        lambda m, f: f["shards"][SHARD]["changed"].update({"fc.weight": 7}), "which the base has not"
    ),
    "other weights of the adapters": (
        lambda m, f: f["adapters"][0].update(weight=2.0), "the result would not be the base|it ends too early|damaged"
    ),
    "the hash of another base": (
        lambda m, f: f["shards"][SHARD]["base"].update(hash="0" * 32), "the result would not be the base"
    ),
    "another kind of output": (lambda m, f: f.update(is_folder=False), "is another kind"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_residual_that_was_changed_is_refused(merged: Path, attack: str) -> None:
    change, message = ATTACKS[attack]
    rewritten(merged / "residual", change)
    before = sorted(merged.iterdir())
    with pytest.raises(InputRefused, match=message):
        unmerge(merged, "one", "two")
    assert sorted(merged.iterdir()) == before


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d[:300] + b"\0\0\0" + d[303:]])
def test_a_damaged_file_is_refused(merged: Path, damage: Any) -> None:
    (merged / "residual").write_bytes(damage((merged / "residual").read_bytes()))
    with pytest.raises(InputRefused):
        unmerge(merged, "one", "two")
    assert not (merged / "again").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_residual": "out"}, WrongUsage, "is the output or inside it"),
        ({"keep_residual": "out/residual"}, WrongUsage, "is the output or inside it"),
        ({"keep_residual": "base/residual"}, OutputFailed, "base"),
        ({"keep_residual": "taken"}, OutputFailed, "taken"),
        ({"keep_residual": "r", "dequantize": True}, WrongUsage, "does not go together"),
    ],
)
def test_a_place_where_no_residual_can_be_is_refused(
    place: Path, options: dict[str, Any], error: type[LoraExportError], message: str
) -> None:
    (place / "taken").write_text("mine")
    before, seen = sorted(place.rglob("*")), Recorder()
    options = options | {"keep_residual": place / options["keep_residual"]}
    with pytest.raises(error, match=message):
        le.merge(place / "base", place / "one", place / "out", **options, **seen.callbacks)
    assert seen.events == []  # before the work
    assert sorted(place.rglob("*")) == before


def test_a_graph_and_adapters_in_memory_have_no_residual(place: Path) -> None:
    graph_file(place / "base.onnx", {"fc.weight": np.eye(30, dtype=np.float32)})
    with pytest.raises(WrongUsage, match="keep_residual= is for checkpoints"):
        le.merge(place / "base.onnx", place / "one", place / "out.onnx", keep_residual=place / "r")
    loaded = le.load_adapter(place / "one")
    in_memory, seen = le.Adapter("x", "made", loaded.pairs, layouts=loaded.layouts), Recorder()
    with pytest.raises(InputRefused, match="needs adapters from files: x has no hash"):
        le.merge(place / "base", in_memory, place / "out", keep_residual=place / "r", **seen.callbacks)
    assert seen.events == []  # before the work
    assert not (place / "out").exists() and not (place / "r").exists()


def test_integers_beside_the_weights_come_back(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tensors = {"fc.weight": W.astype(np.float32), "count": np.arange(5), "flags": np.array([True, False])}
    save_file(tensors, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    peft_adapter(tmp_path / "one", {"fc": pair(1)}, {"count": np.arange(5)[::-1].copy()})
    round_trip(tmp_path, "one")
