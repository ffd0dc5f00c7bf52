"""Merged checkpoints judged weight by weight: right ones are the same, each defect is detected and named."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export.lora import TokenRows
from lora_export.plan import Step
from lora_export.plan.stored_region import StoredRegion
from lora_export.storage import safetensors_file
from lora_export.verification.against_checkpoint import audit_checkpoint, stored_tensor
from lora_export.verification.against_checkpoint.audit_checkpoint import audit_of, judge_rest, judge_rounded
from lora_export.verification.against_checkpoint.kept_numbers import KeptWeight
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.parity import Outcome
from support import peak
from support.audits import PAIRS, RANK, RNG, WEIGHTS, Tensors, normal, plain, run, the_base, verified
from support.handmade import add_tensors, base_file, peft_adapter
from support.plans import matrix
from support.stored_tensors import stored


def rank_stabilised(folder: Path) -> Path:
    return peft_adapter(folder, PAIRS, use_rslora=True, lora_alpha=3)


def with_dora(folder: Path) -> Path:
    path = peft_adapter(folder, PAIRS, use_dora=True)
    lengths = {
        f"base_model.model.{name}.lora_magnitude_vector": np.float32(RNG.uniform(0.1, 0.3, len(b)))
        for name, (_, b) in PAIRS.items()
    }
    return add_tensors(path, lengths)


def on_embeddings(folder: Path, **config: Any) -> Path:
    path = peft_adapter(folder, {}, target_modules=["embed"], r=RANK, lora_alpha=2 * RANK, **config)
    tensors = {
        "base_model.model.embed.lora_embedding_A": normal(RANK, 50),
        "base_model.model.embed.lora_embedding_B": normal(16, RANK, std=1),
    }
    if config:
        tensors["base_model.model.embed.lora_magnitude_vector"] = np.float32(RNG.uniform(0.1, 0.3, 16))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def on_embeddings_with_dora(folder: Path) -> Path:
    return on_embeddings(folder, use_dora=True)


def on_convolutions(folder: Path) -> Path:
    pair = normal(RANK, 4, 3, 3, std=1), normal(8, RANK, 1, 1)
    return peft_adapter(folder, {"conv": pair})


def with_a_head(folder: Path) -> Path:
    return peft_adapter(folder, PAIRS, {"head.weight": normal(5, 24), "new_head.weight": normal(3, 24)})


def with_biases(folder: Path) -> Path:
    path = peft_adapter(folder, PAIRS, bias="lora_only")
    return add_tensors(path, {"base_model.model.a.base_layer.bias": normal(40)})


def with_shifted_biases(folder: Path) -> Path:
    path = peft_adapter(folder, {"a": PAIRS["a"]}, lora_bias=True)
    return add_tensors(path, {"base_model.model.a.lora_B.bias": normal(40)})


def with_token_rows(folder: Path) -> Path:
    path = peft_adapter(folder, PAIRS, trainable_token_indices={"embed": [3, 41]})
    return add_tensors(path, {"base_model.model.embed.token_adapter.trainable_tokens_delta": normal(2, 16)})


DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}
# Bytes that are read at once: a whole weight, several of its rows, or one row. The last piece of several has fewer.
WHOLE, SEVERAL_ROWS, A_ROW = 1 << 22, 1000, 1
ADAPTERS: list[tuple[Callable[[Path], Path], str, str]] = [  # the dtypes of the base: WHOLE, SEVERAL_ROWS
    (plain, "float32", "bfloat16"),
    (rank_stabilised, "float16", "float64"),
    (with_dora, "float32", "bfloat16"),
    (on_embeddings, "float64", "float32"),
    (on_embeddings_with_dora, "bfloat16", "float16"),
    (on_convolutions, "bfloat16", "float64"),
    (with_a_head, "float16", "float32"),
    (with_biases, "float64", "bfloat16"),
    (with_shifted_biases, "float32", "float64"),
    (with_token_rows, "bfloat16", "float32"),
]


@pytest.fixture(autouse=True)
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensor, "PIECE_BYTES", getattr(request, "param", WHOLE))


class Merge(NamedTuple):
    out: Path
    base: Path
    adapter: Path


def merged(folder: Path, dtype: str = "float32", make: Callable[[Path], Path] = plain, *options: object) -> Merge:
    """A merge beside its base and its adapter."""
    files = Merge(folder / "m.safetensors", the_base(folder / "base.safetensors", DTYPES[dtype]), make(folder / "ad"))
    assert run("merge", files.base, files.adapter, "-o", files.out, *options) == 0
    return files


def spoiled(files: Merge, spoil: Callable[[Tensors], object]) -> Merge:
    tensors = {key: array.copy() for key, array in load_file(files.out).items()}
    spoil(tensors)
    save_file(tensors, files.out)
    return files


def told_different(files: Merge, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run("verify", files.out, "--base", files.base, "-a", files.adapter) == 4
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "dtype", "piece_bytes"),
    [
        *((make, whole, WHOLE) for make, whole, _ in ADAPTERS),
        *((make, several, SEVERAL_ROWS) for make, _, several in ADAPTERS),
    ],
    indirect=["piece_bytes"],
)
def test_a_merge_is_the_same(
    make: Callable[[Path], Path], dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = merged(tmp_path, dtype, make)
    code, document = verified(capsys, *files)
    assert (code, document["outcome"]) == (0, "same"), document
    changed = [weight for weight in document["weights"] if weight["fate"] != "kept"]
    assert changed and all(all(weight["controls"].values()) for weight in changed)
    assert len(document["weights"]) == len(load_file(files.out))
    assert max(weight["error"] for weight in changed) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_converted_merge_of_two_adapters_is_the_same(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, first, second = tmp_path / "base", plain(tmp_path / "one"), rank_stabilised(tmp_path / "two")
    base.mkdir()
    the_base(base / "model.safetensors", np.float32)
    (base / "config.json").write_text('{"model_type": "bert"}')
    out = tmp_path / "out"
    weights = ("--weight", 0.5, "--weight", -2)
    assert run("merge", base, first, second, "-o", out, "--dtype", dtype, *weights) == 0, capsys.readouterr()
    code, document = verified(capsys, out, base, first, second, more=weights)
    assert (code, document["outcome"]) == (0, "same"), document
    (controls,) = (weight["controls"] for weight in document["weights"] if weight["name"] == "a.weight")
    assert list(controls) == [f"{who} {what}" for who in ("one", "two") for what in ("left out", "x 1.1", "transposed")]
    code, document = verified(capsys, out, base, first, second)  # without the weights it is something else
    assert (code, document["outcome"]) == (4, "different")


A, B = (np.float64(factor) for factor in PAIRS["a"])
DELTA = B @ A


def rounded(change: NDArray[Any], dtype: Any) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        base = WEIGHTS["a.weight"].astype(dtype)
        tensors["a.weight"] = (base.astype(np.float64) + change).astype(dtype)

    return spoil


def entry(tensors: Tensors) -> None:
    flat = tensors["a.weight"].view(np.uint16 if tensors["a.weight"].itemsize == 2 else np.uint32)
    flat[17, 5] += 1 + (tensors["a.weight"].itemsize == 4) * 30


def row(tensors: Tensors) -> None:
    tensors["a.weight"][[3, 4]] = tensors["a.weight"][[4, 3]]


def kept(tensors: Tensors) -> None:
    tensors["kept.weight"].view(np.uint8).reshape(-1)[3] ^= 1


def integers(tensors: Tensors) -> None:
    tensors["steps"][2] += 1


def missing(tensors: Tensors) -> None:
    del tensors["kept.bias"]


def extra(tensors: Tensors) -> None:
    tensors["foreign"] = np.zeros(3, np.float32)


def renamed(tensors: Tensors) -> None:
    tensors["c.weight"] = tensors.pop("b.weight")


def transposed(tensors: Tensors) -> None:
    tensors["b.weight"] = np.ascontiguousarray(tensors["b.weight"].T)


def not_a_number(tensors: Tensors) -> None:
    tensors["a.weight"][0, 0] = np.nan


def infinite(tensors: Tensors) -> None:
    tensors["b.weight"][1, 0] = np.inf


def another_dtype(tensors: Tensors) -> None:
    tensors["b.weight"] = tensors["b.weight"].astype(np.float64)


def scalar(tensors: Tensors) -> None:
    tensors["scalar"] = np.asarray(tensors["scalar"] + np.asarray(1, tensors["scalar"].dtype))


def kept_got_the_adapter(tensors: Tensors) -> None:
    tensors["kept.weight"] += tensors["kept.weight"]


def twice(dtype: Any) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        narrow = WEIGHTS["a.weight"].astype(dtype).astype(np.float64) + DELTA.astype(dtype).astype(np.float64)
        tensors["a.weight"] = narrow.astype(dtype)

    return spoil


DEFECTS: dict[str, tuple[Callable[[Any], Callable[[Tensors], None]], str]] = {
    "adapter left out": (lambda dtype: rounded(0 * DELTA, dtype), "it is the sum with ad left out"),
    "scale x 1.1": (lambda dtype: rounded(1.1 * DELTA, dtype), "it is the sum with ad x 1.1"),
    "scale x 2": (lambda dtype: rounded(2 * DELTA, dtype), "its scale is off: ad x 2"),
    "scale x 0.99": (lambda dtype: rounded(0.99 * DELTA, dtype), "a.weight: different"),
    "subtracted": (lambda dtype: rounded(-DELTA, dtype), "its scale is off: ad x -1"),
    "transposed": (lambda dtype: rounded(DELTA.T, dtype),
                   "it is the sum with BA transposed, that of a weight stored in_out; this one is stored out_in"),
    "another's": (lambda dtype: rounded(DELTA[::-1], dtype), "a.weight: different"),
    "one entry": (lambda _: entry, "a.weight: different, 1 of 1,600 entries .* a few entries are damaged"),
    "two rows": (lambda _: row, "a.weight: different"),
    "kept weight": (lambda _: kept, "kept.weight: different, 1 of 384 entries are not the base's"),
    "kept integers": (lambda _: integers, "steps: different, 1 of 7 entries"),
    "missing": (lambda _: missing, "kept.bias: different, is missing"),
    "extra": (lambda _: extra, "foreign: different, is in neither the base nor the adapters"),
    "renamed": (lambda _: renamed, "b.weight: different, is missing"),
    "stored transposed": (lambda _: transposed, r"b.weight: different, is \[24, 64\], and should be \[64, 24\]"),
    "nan": (lambda _: not_a_number, "a.weight: different, 1 of 1,600"),
    "infinity": (lambda _: infinite, "b.weight: different, 1 of 1,536"),
    "one dtype": (lambda _: another_dtype, "b.weight: different, is float64, the base's is"),
    "scalar": (lambda _: scalar, "scalar: different, 1 of 1 entries"),
    "kept was changed": (lambda _: kept_got_the_adapter, "kept.weight: different, 384 of 384"),
}  # fmt: skip


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Merge]:
    return {dtype: merged(tmp_path_factory.mktemp(dtype), dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize(("dtype", "piece_bytes"), [("float32", A_ROW), ("bfloat16", WHOLE)], indirect=["piece_bytes"])
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_detected_and_named(
    name: str, dtype: str, right: dict[str, Merge], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = DEFECTS[name]
    files = right[dtype]._replace(out=shutil.copy(right[dtype].out, tmp_path))
    printed = told_different(spoiled(files, make(DTYPES[dtype])), capsys)
    assert printed.startswith("different: ") and re.search(reason, printed), printed


def test_a_change_rounded_before_the_sum_is_detected_in_bf16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = told_different(spoiled(merged(tmp_path, "bfloat16"), twice(ml_dtypes.bfloat16)), capsys)
    assert "a.weight: different" in printed and "rounded before it was added" in printed


@pytest.mark.parametrize(
    ("make", "name", "wrong"),
    [
        (with_a_head, "new_head.weight", lambda right: right * np.float32(1.0001)),
        (with_token_rows, "embed.weight", lambda _: WEIGHTS["embed.weight"]),
        (with_biases, "a.bias", lambda _: WEIGHTS["a.bias"]),
        (with_shifted_biases, "a.bias", lambda _: WEIGHTS["a.bias"]),
    ],
)
def test_wrong_heads_rows_and_biases_are_detected(
    make: Callable[[Path], Path],
    name: str,
    wrong: Callable[[NDArray[Any]], NDArray[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = merged(tmp_path, make=make)
    spoiled(files, lambda tensors: tensors.update({name: wrong(tensors[name])}))
    assert f"{name}: different" in told_different(files, capsys)


def test_a_change_hidden_by_rounding_is_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"a.weight": np.full((4, 4), 1000, np.float16)}
    base = base_file(tmp_path / "base.safetensors", weights, np.float16)
    adapter = peft_adapter(tmp_path / "ad", {"a": (np.ones((1, 4)), [[1e-3]] * 4)})
    code, document = verified(capsys, base_file(tmp_path / "m.safetensors", weights, np.float16), base, adapter)
    assert (code, document["outcome"], document["exit_code"]) == (5, "undecided", 5)
    assert (
        "it also fits the sum with ad left out and ad x 1.1: rounding to float16 hides" in document["weights"][0]["why"]
    )


def test_controls_without_effect_are_not_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"a.weight": normal(4, 4), "b.weight": normal(4, 4)}
    base, out = base_file(tmp_path / "base.safetensors", weights), tmp_path / "m.safetensors"
    ones = np.ones((1, 4), np.float32)
    adapter = peft_adapter(tmp_path / "ad", {"a": (ones, ones.T), "b": (ones, 0 * ones.T)})
    assert run("merge", base, adapter, "-o", out) == 0
    code, document = verified(capsys, out, base, adapter)
    assert (code, [list(weight["controls"]) for weight in document["weights"]]) == (
        0,
        [["ad left out", "ad x 1.1"], []],
    )


@pytest.mark.parametrize("piece_bytes", [WHOLE, SEVERAL_ROWS], indirect=True)
def test_a_changed_weight_has_the_figures_of_the_merge_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = merged(tmp_path, "bfloat16", plain, "--json")
    results = json.loads(capsys.readouterr().out)["results"]
    _, document = verified(capsys, *files)
    found = {weight["name"]: weight for weight in document["weights"]}
    assert len(results) == len(PAIRS)
    before, after = load_file(files.base), load_file(files.out)
    for step in results:
        weight = found[step["weight"]]
        for figure in ("relative_change", "retention", "noise"):
            assert weight[figure] == pytest.approx(step[figure], rel=1e-3) and weight[figure] > 0
        worst = weight["worst"]
        index = tuple(worst["index"])
        held, start = after[step["weight"]].astype(np.float64), before[step["weight"]].astype(np.float64)
        assert worst["candidate"] == held[index] != start[index]
        assert abs(worst["candidate"] - worst["reference"]) <= weight["error"] * 2**-8 * abs(held[index])
    assert document["about"]["adapters"][0]["sha256"] and document["about"]["command"][:2] == ["lora-export", "verify"]


def test_results_have_the_order_of_the_base_whatever_their_sizes(
    right: dict[str, Merge], capsys: pytest.CaptureFixture[str]
) -> None:
    _, document = verified(capsys, *right["float32"])
    names = list(safetensors_file.open_file(right["float32"].base).entries)
    assert [weight["name"] for weight in document["weights"]] == names


def test_progress_comes_from_one_thread_and_covers_every_byte(right: dict[str, Merge]) -> None:
    out, base, adapter = right["float32"]
    threads, done = set(), []

    def shown(event: lora_export.Progress) -> None:
        threads.add(threading.get_ident())
        done.append(event.done)

    lora_export.verify(out, base=base, adapters=[adapter], on_progress=shown)
    assert threads == {threading.get_ident()}
    assert done[-1] == sum(tensor.nbytes for tensor in safetensors_file.open_file(out).entries.values())


def test_a_file_that_becomes_shorter_ends_the_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base, adapter = merged(tmp_path)
    judged, begun = judge_rounded, []

    def shortened(name: str, *rest: Any) -> AuditedWeight:
        begun.append(name)
        os.truncate(out, safetensors_file.open_file(base).data_start)
        return judged(name, *rest)

    monkeypatch.setattr(audit_checkpoint, "judge_rounded", shortened)
    capsys.readouterr()
    assert run("verify", out, "--base", base, "-a", adapter) == 3
    assert "became shorter while it was being read" in capsys.readouterr().err and begun


@pytest.mark.slow
def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    peaks = []
    for rows in (2_000, 40_000):
        base = base_file(tmp_path / "base.safetensors", {"a.weight": np.ones((rows, 512))})
        adapter, out = (
            peft_adapter(tmp_path / str(rows), {"a": (normal(1, 512), normal(rows, 1))}),
            tmp_path / "m.safetensors",
        )
        assert run("merge", base, adapter, "-o", out, "--overwrite") == 0
        line = [sys.executable, "-m", "lora_export", "verify", out, "--base", base, "-a", adapter]
        found = peak.run(line)
        assert found.code == 0
        peaks.append(found.peak)
    assert peaks[1] - peaks[0] < 30, peaks  # MiB; the larger weight has 78


# --- judge rounded ---

BASE = [[1.5, 2.0, -0.0], [4.0, np.nan, 6.0], [7.0, 8.0, 9.0]]
HEAD = np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9.25]])
ROW = TokenRows(np.array([2]), np.float32([[10, 11, 12]]))
EITHER = pytest.mark.parametrize("piece_bytes", [A_ROW, WHOLE], indirect=True)


def judged(
    folder: Path,
    values: Any,
    step: Step | None = None,
    *,
    dtype: Any = np.float32,
    base: Any = BASE,
    base_dtype: Any = np.float32,
) -> AuditedWeight:
    before = None if base is None else stored(folder / "base.safetensors", base, base_dtype)
    return judge_rounded("fc.weight", step, before, stored(folder / "merged.safetensors", values, dtype))


@EITHER
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_a_kept_tensor_has_the_bits_of_the_base(tmp_path: Path, dtype: Any) -> None:
    found = judged(tmp_path, np.asarray(BASE, np.float32).astype(dtype), dtype=dtype)
    assert (found.fate, found.outcome, found.elements, found.controls) == (Fate.KEPT, Outcome.SAME, 9, {})


@EITHER
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_value_in_fp64_may_have_gone_by_way_of_fp32(tmp_path: Path, dtype: str, bits: int, replaced: bool) -> None:
    """Just above the middle of two numbers of 16 bits: PyTorch makes the lower one of it, NumPy the upper one."""
    ulp = 2.0 ** (1 - bits)
    base = np.full((3, 3), 1 + ulp / 2 + 2.0**-40)
    step = Step(matrix("fc.weight", 3, 3), replace=base) if replaced else None
    before = np.zeros((3, 3)) if replaced else base
    by_torch = torch.tensor(base).to(getattr(torch, dtype)).double().numpy()
    by_numpy = base.astype(DTYPES[dtype]).astype(np.float64)  # as PyTorch in bf16, before ml_dtypes 0.7
    for value in (1 - ulp / 2, 1.0, 1 + ulp, 1 + 2 * ulp):
        values = np.full((3, 3), value, DTYPES[dtype])
        found = judged(tmp_path, values, step, dtype=DTYPES[dtype], base=before, base_dtype=np.float64)
        assert found.outcome is (Outcome.SAME if value in (by_torch[0, 0], by_numpy[0, 0]) else Outcome.DIFFERENT)


@EITHER
@pytest.mark.parametrize(
    ("position", "value"), [((0, 2), 0.0), ((1, 1), -np.nan), ((2, 2), np.nextafter(np.float32(9), 10))]
)
def test_another_bit_is_another_number(tmp_path: Path, position: tuple[int, int], value: float) -> None:
    values = np.float32(BASE)
    values[position] = value
    found = judged(tmp_path, values)
    assert (found.outcome, found.off) == (Outcome.DIFFERENT, 1)
    assert found.why == "1 of 9 entries are not the base's"


@EITHER
def test_a_replaced_tensor_has_the_bits_of_the_adapter(tmp_path: Path) -> None:
    step = Step(matrix("fc.weight", 3, 3), replace=HEAD)
    found = judged(tmp_path, HEAD, step)
    assert (found.fate, found.outcome, found.controls) == (Fate.REPLACED, Outcome.SAME, {"base": True})
    rounded = HEAD.astype(ml_dtypes.bfloat16)
    assert judged(tmp_path, rounded, step, dtype=ml_dtypes.bfloat16).outcome is Outcome.SAME
    wrong = judged(tmp_path, BASE, step)
    assert (wrong.outcome, wrong.why) == (Outcome.DIFFERENT, "4 of 9 entries are not the adapter's")


@EITHER
def test_a_tensor_that_the_base_lacks_is_compared_with_the_adapters(tmp_path: Path) -> None:
    step = Step(matrix("fc.weight", 3, 3), replace=HEAD, added=True)
    assert judged(tmp_path, HEAD, step, base=None).controls == {"base": True}
    assert judged(tmp_path, HEAD + 1, step, base=None).off == 9


@EITHER
def test_replaced_rows_leave_the_others_to_the_base(tmp_path: Path) -> None:
    step, values = Step(matrix("fc.weight", 3, 3), token_rows=ROW), np.float32(BASE)
    values[2] = [10, 11, 12]
    found = judged(tmp_path, values, step)
    assert (found.outcome, found.controls) == (Outcome.SAME, {"base": True})
    first = Step(matrix("fc.weight", 3, 3), token_rows=TokenRows(np.array([0]), np.float32([[10, 11, 12]])))
    assert judged(tmp_path, [[10, 11, 12], *BASE[1:]], first).controls == {"base": True}
    assert judged(tmp_path, BASE, step).off == 3
    values[0, 0] = 99
    assert judged(tmp_path, values, step).off == 1


@EITHER
def test_entries_behind_a_part_that_changes_are_those_of_the_base(tmp_path: Path) -> None:
    values = np.float32(BASE)
    values[0], values[2, 2] = 0, 10
    base, candidate = stored(tmp_path / "base.safetensors", BASE), stored(tmp_path / "merged.safetensors", values)
    found = judge_rest("fc.weight", [StoredRegion("fc.weight", (3, 3), slice(0, 1))], base, candidate)
    assert (found.outcome, found.off, found.elements) == (Outcome.DIFFERENT, 1, 6)


@EITHER
def test_an_adapter_that_replaces_nothing_is_not_detected(tmp_path: Path) -> None:
    found = judged(tmp_path, BASE, Step(matrix("fc.weight", 3, 3), replace=np.float32(BASE)))
    assert (found.outcome, found.controls) == (Outcome.SAME, {"base": False})


def test_an_audit_of_nothing_is_undecided() -> None:
    assert audit_of([]).outcome is Outcome.UNDECIDED


def test_a_quantised_weight_finds_its_file_without_listing_all_tensors():
    """A list of 74,000 names beside each of 18,432 experts took 70 GB."""

    class Entries(dict):
        __iter__ = None

    shards = {file: Namespace(entries=Entries({f"{file}.packed": None})) for file in "ab"}
    checkpoint = Namespace(shards=shards, quantised={"weight": Namespace(packed="b.packed", parts=())})
    assert KeptWeight.of(checkpoint, "weight").file_of("b.packed") is shards["b"]
