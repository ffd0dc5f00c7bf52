"""Merged GGUF files judged by their base: right ones are the same, each defect is detected and named."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_export
from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.storage.gguf_blocks import CODECS
from lora_export.storage.gguf_file import GgufTensor, gguf_layout, open_gguf
from lora_export.verification.against_checkpoint.block_scales import beside_codes
from support.gguf_files import Kind, calibration_of, llama, runnable, write_llama
from support.peft_models import trained
from support.slow import slow

Q, DOWN, UP = "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.ffn_up.weight"
WITH_SCALES = {kind.name: codec for kind, codec in CODECS.items()}
KINDS = sorted({*WITH_SCALES} - {"IQ4_XS"} | {"F32", "F16", "BF16"})


def an_adapter(folder: Path, size: float = 1.0, **config: Any) -> Path:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 0.1 * size, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    adapted(json.dumps(options | config)).save_pretrained(folder)
    return folder


@functools.cache
def adapted(options: str) -> Any:
    return trained(llama(), **json.loads(options))


def merged(folder: Path, kind: Kind = Kind.Q8_0, size: float = 1.0, **config: Any) -> tuple[Path, Path, Path]:
    """A base, an adapter, and both merged."""
    base, adapter = write_llama(folder / "base.gguf", kind), an_adapter(folder / "a", size, **config)
    out = lora_export.merge(base, [adapter], output=folder / "out.gguf", min_retention=0.3).output
    return base, adapter, out


def judged(base: Path, adapter: Path, out: Path) -> Any:
    return lora_export.verify(out, base=base, adapters=[adapter])


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, size) for number, kind in enumerate(KINDS) for size in (0.01, 1.0 if number % 2 else 0.1)]
)
def test_a_right_merge_is_the_same(tmp_path: Path, kind: str, size: float) -> None:
    proof = judged(*merged(tmp_path, Kind[kind], size))
    changed = [weight for weight in proof.verdict.weights if weight.fate == "changed"]
    assert (proof.verdict.outcome, len(changed)) == ("same", 3), str(proof)
    assert all(weight.controls and all(weight.controls.values()) for weight in changed)
    assert all(0 < weight.error <= 1 and weight.retention > 0.3 for weight in changed)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 9]},
        {"use_rslora": True, "lora_alpha": 0.05},
    ],
    ids=str,
)
def test_other_changes_are_judged_too(tmp_path: Path, config: dict[str, Any]) -> None:
    proof = judged(*merged(tmp_path, Kind.Q8_0, **config))
    assert (proof.verdict.outcome, len([one for one in proof.verdict.weights if one.fate != "kept"]) >= 2) == (
        "same",
        True,
    )


def tensor_of(path: Path, name: str) -> GgufTensor:
    return next(one for one in open_gguf(path).tensors if one.name == name)


def other_bytes(path: Path, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change the blocks (blocks, bytes) of a tensor in its file."""
    tensor = tensor_of(path, name)
    data = np.fromfile(path, np.uint8)
    change(data[tensor.start : tensor.stop].reshape(-1, tensor.type.nbytes))
    data.tofile(path)


def next_code(blocks: np.ndarray[Any, Any]) -> None:
    blocks[5, 7] += 1


def all_scales(blocks: np.ndarray[Any, Any]) -> None:
    blocks[:, 0] += 1


def swapped_rows(blocks: np.ndarray[Any, Any]) -> None:
    blocks[:] = np.roll(blocks.reshape(256, -1), 1, axis=0).reshape(blocks.shape)


def rewritten(path: Path, texts: dict[str, str], keep: Callable[[GgufTensor], bool] = lambda _: True) -> None:
    """The same file with other fields, or with fewer tensors."""
    file, data = open_gguf(path), path.read_bytes()
    kept = [one for one in file.tensors if keep(one)]
    head, tensors = gguf_layout(file, [(one.name, one.type, one.shape) for one in kept], texts)
    out = bytearray(head + bytes(tensors[-1].stop - len(head)))
    for one, target in zip(kept, tensors, strict=True):
        out[target.start : target.stop] = data[one.start : one.stop]
    path.write_bytes(out)


def other_record(path: Path) -> None:
    record = json.loads(open_gguf(path).value(provenance.KEY))
    record["settings"]["types"] = {Q: "F16"}
    rewritten(path, {provenance.KEY: json.dumps(record)})


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a code": (lambda out: other_bytes(out, Q, next_code), "1 of 65,536 entries are not W + s·BA"),
    "scales": (lambda out: other_bytes(out, DOWN, all_scales), "2,048 of its blocks have other scales"),
    "rows of a kept tensor": (lambda out: other_bytes(out, UP, swapped_rows), "has other bytes than the base's"),
    "rows of a changed tensor": (lambda out: other_bytes(out, Q, swapped_rows), "have other scales than the base's"),
    "a field": (lambda out: rewritten(out, {"general.architecture": "qwen2"}), "the field general.architecture is not"),
    "another name": (lambda out: rewritten(out, {"general.name": "x"}), "the field general.name is new"),
    "a missing tensor": (
        lambda out: rewritten(out, {}, lambda one: one.name != UP),
        "up_proj.weight: different, is missing",
    ),
    "a type that is not recorded": (other_record, "is stored as Q8_0, and should be as F16"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_different_and_named(tmp_path: Path, name: str) -> None:
    base, adapter, out = merged(tmp_path)
    make, message = DEFECTS[name]
    make(out)
    proof = judged(base, adapter, out)
    assert proof.verdict.outcome == "different" and message in str(proof)


def test_no_merge_and_other_strengths_are_different(tmp_path: Path) -> None:
    base, adapter, out = merged(tmp_path)
    proof = lora_export.verify(out, base=base, adapters=[adapter], weights=[1.1])
    assert "contains it with the weight 1 " in str(proof) and proof.verdict.outcome == "different"
    (tmp_path / "copy.gguf").write_bytes(base.read_bytes())
    assert judged(base, adapter, tmp_path / "copy.gguf").verdict.outcome == "different"
    with pytest.raises(InputRefused) as refused:
        judged(base, adapter, base)
    assert "is the base itself" in str(refused.value)


def test_rows_in_the_order_of_transformers_are_different(tmp_path: Path) -> None:
    """A merge that does not know llama.cpp's order: BA added as it is."""
    base, adapter, out = merged(tmp_path, Kind.F32)
    order = np.arange(256).reshape(4, 32, 2).swapaxes(1, 2).reshape(-1)
    before = np.fromfile(base, np.float32, 1 << 16, offset=tensor_of(base, Q).start).reshape(256, 256)
    place = tensor_of(out, Q)
    right = np.fromfile(out, np.float32, 1 << 16, offset=place.start).reshape(256, 256)
    wrong = before + (right - before)[order]
    data = bytearray(out.read_bytes())
    data[place.start : place.stop] = wrong.tobytes()
    out.write_bytes(data)
    proof = judged(base, adapter, out)
    assert proof.verdict.outcome == "different" and "q_proj.weight: different" in str(proof)


def promoted(folder: Path) -> tuple[Path, Path, Path]:
    base, adapter = write_llama(folder / "base.gguf", Kind.Q4_0), an_adapter(folder / "a")
    out = lora_export.merge(base, [adapter], output=folder / "out.gguf", dtype_of={"*": "Q8_0"}).output
    return base, adapter, out


def coarse(blocks: np.ndarray[Any, Any]) -> None:
    """Scales of twice the size, and codes of half."""
    scales = blocks[:, :2].copy().view(np.float16) * 2
    codes = np.rint(blocks[:, 2:].view(np.int8).astype(np.float32) / 2)
    blocks[:, :2], blocks[:, 2:] = scales.view(np.uint8), codes.astype(np.int8).view(np.uint8)


def test_new_scales_are_judged(tmp_path: Path) -> None:
    base, adapter, out = promoted(tmp_path)
    assert judged(base, adapter, out).verdict.outcome == "same"
    other_bytes(out, DOWN, coarse)
    proof = judged(base, adapter, out)
    assert proof.verdict.outcome == "different"
    # Not only those that are off by a step
    assert "down_proj.weight: different, 65,536 of 65,536 entries" in str(proof)


def rescaled(folder: Path, kind: Kind, size: float = 3.0, **config: Any) -> tuple[Path, Path, Path]:
    base, adapter = write_llama(folder / "base.gguf", kind), an_adapter(folder / "a", size, **config)
    options: dict[str, Any] = {"dtype_of": {"*": "keep"}, "min_retention": 0.1, "keep_quantised": True}
    return base, adapter, lora_export.merge(base, [adapter], folder / "out.gguf", rescale=True, **options).output


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, (1.0, 10.0)[number % 2]) for number, kind in enumerate(sorted(WITH_SCALES))]
)
def test_scales_of_the_least_error_are_judged(tmp_path: Path, kind: str, size: float) -> None:
    base, adapter, out = rescaled(tmp_path, Kind[kind], size, target_modules=["down_proj"])
    assert judged(base, adapter, out).verdict.outcome == "same", str(judged(base, adapter, out))
    codec = WITH_SCALES[kind]
    own, old = (blocks_of(path, DOWN) for path in (out, base))
    (is_new,) = np.nonzero((codec.with_codes(own, codec.codes_of(old)) != old).any(axis=1))
    scale = np.flatnonzero(beside_codes(codec))[0]
    assert len(is_new) > 10
    other_bytes(out, DOWN, lambda blocks: blocks.__setitem__((is_new[5], scale), blocks[is_new[5], scale] ^ 1))
    assert judged(base, adapter, out).verdict.outcome == "different"


def blocks_of(path: Path, name: str) -> np.ndarray[Any, Any]:
    tensor = tensor_of(path, name)
    return np.fromfile(path, np.uint8)[tensor.start : tensor.stop].reshape(-1, tensor.type.nbytes)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    ],
    ids=str,
)
def test_other_changes_on_new_scales(tmp_path: Path, config: dict[str, Any]) -> None:
    base, adapter, out = rescaled(tmp_path, Kind.Q4_K, **config)
    proof = judged(base, adapter, out)
    assert proof.verdict.outcome == "same", str(proof)


def test_new_scales_that_are_not_recorded_are_different(tmp_path: Path) -> None:
    base, adapter, out = rescaled(tmp_path, Kind.Q4_0)
    record = json.loads(open_gguf(out).value(provenance.KEY))
    assert sorted(record["settings"]["rescaled"])[-1] == DOWN
    record["settings"]["rescaled"].remove(DOWN)
    rewritten(out, {provenance.KEY: json.dumps(record)})
    proof = judged(base, adapter, out)
    assert proof.verdict.outcome == "different" and "down_proj.weight: different, " in str(proof)
    assert "of its blocks have other scales than the base's" in str(proof)


def test_worse_scales_with_the_nearest_codes_are_different(tmp_path: Path) -> None:
    """Steps by the largest value, as ggml chooses them: each code is the nearest, and other steps are better."""
    base, adapter, out = rescaled(tmp_path, Kind.Q4_0)
    floats = lora_export.merge(base, [adapter], tmp_path / "floats.gguf", dtype_of={"*": "F32"}).output
    place, right = tensor_of(floats, DOWN), blocks_of(out, DOWN)
    values = np.fromfile(floats, np.uint8)[place.start : place.stop].view(np.float32).reshape(-1, 32)
    codec = WITH_SCALES["Q4_0"]
    wrong = right.copy()
    steps = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1) / np.float32(-8)
    codec.scales.step.write(wrong, codec.scales.step.stored(steps))
    wrong = codec.encode(wrong, values)
    assert (wrong != right).any()
    other_bytes(out, DOWN, lambda blocks: blocks.__setitem__(slice(None), wrong))
    proof = judged(base, adapter, out)
    assert proof.verdict.outcome == "different"
    assert "of its blocks have scales that are neither the base's nor those of the least squared error" in str(proof)


@pytest.mark.parametrize("kind", [Kind.Q8_0, slow(Kind.Q4_0), Kind.Q4_K, slow(Kind.MXFP4), Kind.BF16], ids=str)
def test_calibrated_numbers_are_judged_by_the_inputs(tmp_path: Path, kind: Kind) -> None:
    base, adapter = write_llama(tmp_path / "base.gguf", kind, fields=runnable), an_adapter(tmp_path / "a")
    texts, options = calibration_of(tmp_path / "inputs.npz"), {"dtype_of": {"*": "keep"}, "min_retention": 0.1}
    out = lora_export.merge(base, [adapter], tmp_path / "out.gguf", calibration=texts, **options).output
    own = {"base": base, "adapters": [adapter]}
    right = lora_export.verify(out, calibration=texts, **own).verdict
    assert (right.outcome, right.not_judged) == ("same", ())
    assert all(one.output_error < one.nearest_output_error for one in right.weights if one.fate == "changed")
    assert "which of the two values" in lora_export.verify(out, **own).verdict.not_judged[0]
    assert lora_export.verify(out, calibration=texts, weights=[1.1], **own).verdict.outcome == "different"
    nearest = lora_export.merge(base, [adapter], tmp_path / "nearest.gguf", **options).output
    data, place, source = bytearray(out.read_bytes()), tensor_of(out, Q), tensor_of(nearest, Q)
    data[place.start : place.stop] = nearest.read_bytes()[source.start : source.stop]
    out.write_bytes(data)
    broken = lora_export.verify(out, calibration=texts, **own)
    # In BF16, a sum in fp32 may be on the other side of a tie than that in fp64.
    why = "its numbers (are rounded to nearest|were not chosen by the calibration inputs)"
    assert broken.verdict.outcome == "different" and re.search(why, str(broken))


def test_heads_that_are_not_those_of_the_rows_are_refused(tmp_path: Path) -> None:
    _, adapter, out = merged(tmp_path)
    base = write_llama(tmp_path / "other.gguf", Kind.Q8_0, heads=3)
    for call in (lambda: judged(base, adapter, out), lambda: lora_export.merge(base, [adapter], output=tmp_path / "o")):
        with pytest.raises(InputRefused) as refused:
            call()
        assert "heads" in str(refused.value) and "q_proj" in str(refused.value)


def test_the_other_file_must_be_a_gguf_file(tmp_path: Path) -> None:
    base, adapter, out = merged(tmp_path)
    llama().save_pretrained(tmp_path / "hf")
    for candidate, origin in ((out, tmp_path / "hf"), (tmp_path / "hf", base)):
        with pytest.raises(InputRefused) as refused:
            lora_export.verify(candidate, base=origin, adapters=[adapter])
        assert "is not a regular file" in str(refused.value)


def test_rescale_without_blocks_to_rescale_has_a_note(tmp_path: Path) -> None:
    base, adapter = write_llama(tmp_path / "base.gguf", Kind.F16), an_adapter(tmp_path / "a")
    made = lora_export.merge(base, [adapter], tmp_path / "out.gguf", keep_quantised=True, rescale=True)
    assert made.notes[-1].startswith("no weight gets new scales by ")
