"""Square matrices against a base: read in the wrong layout they are different, of unknown layout undecided."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export import cli, plan
from lora_export.plan import Layout
from lora_export.verification.against_checkpoint import stored_layout
from lora_export.weights import checkpoint
from support.handmade import add_tensors, base_file, peft_adapter
from support.plans import holding, matrix, pair

RNG = np.random.default_rng(0)
W, A, B = (np.float32(RNG.normal(size=size)) for size in ((8, 8), (2, 8), (8, 2)))
NAME = "h.0.attn.c_proj.weight"
GPT2 = {NAME: W, "h.0.mlp.c_proj.weight": np.ones((32, 8)), "h.0.mlp.c_proj.bias": np.ones(8)}
BARE = {name: value for name, value in GPT2.items() if not name.endswith(".bias")}  # nothing shows a layout
TRANSPOSED = "it is the sum with BA transposed, that of a weight stored {}; this one is stored {}"


def files(folder: Path, model_type: str = "", **config: Any) -> tuple[Path, Path, Path]:
    """A base, an adapter that records no layout, and the path of a merge: folders with a type, else bare files."""
    adapter = peft_adapter(folder / "ad", {"h.0.attn.c_proj": (A, B)}, layout="", **config)
    if not model_type:
        return base_file(folder / "base.safetensors", BARE), adapter, folder / "merged.safetensors"
    (folder / "base").mkdir()
    base_file(folder / "base/model.safetensors", BARE if model_type == "jais" else GPT2)
    (folder / "base/config.json").write_text(json.dumps({"model_type": model_type}))
    return folder / "base", adapter, folder / "merged"


def written(base: Path, merged: Path, weight: NDArray[Any]) -> Path:
    """A copy of the base with another weight, as some tool may have merged it."""
    if base.is_dir():
        merged.mkdir()
        (merged / "config.json").write_text((base / "config.json").read_text())
    source, target = (path / "model.safetensors" if base.is_dir() else path for path in (base, merged))
    save_file(load_file(source) | {NAME: np.float32(weight)}, target)
    return merged


def judged(merged: Path, base: Path, *adapters: Path, **options: Any) -> tuple[str, str]:
    """The outcome, and what is reported of the weight."""
    result = le.verify(merged, base=base, adapters=list(adapters), **options)
    (weight,) = (weight for weight in result.proof.weights if weight.name == NAME)
    return str(result.verdict.outcome), weight.why


@pytest.mark.parametrize("model_type", ["", "jais"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_an_unknown_layout_is_undecided_and_a_stated_one_decides(tmp_path, model_type, layout):
    base, adapter, merged = files(tmp_path, model_type)
    other = "in_out" if layout == "out_in" else "out_in"
    written(base, merged, W + (B @ A if layout == "out_in" else (B @ A).T))
    outcome, why = judged(merged, base, adapter)
    assert (outcome, why) == (
        "undecided",
        f"its layout is unknown: it is the sum for a weight stored {layout}. State the layout by "
        'layout="NAME=out_in" or NAME=in_out',
    )
    assert judged(merged, base, adapter, layout={"*.attn.c_proj": layout}) == ("same", "")
    outcome, why = judged(merged, base, adapter, layout={NAME: other})
    assert outcome == "different" and why.endswith(TRANSPOSED.format(layout, other))


def test_a_weight_of_unknown_layout_that_is_neither_sum_is_different(tmp_path):
    base, adapter, merged = files(tmp_path)
    outcome, why = judged(written(base, merged, W + 2 * B @ A), base, adapter)
    assert outcome == "different" and "its layout is unknown: it is not the sum of either layout" in why


def test_a_change_that_is_its_own_transpose_needs_no_layout(tmp_path):
    base, _, merged = files(tmp_path)
    adapter = peft_adapter(tmp_path / "even", {"h.0.attn.c_proj": (A, A.T)}, layout="")
    assert judged(written(base, merged, W + A.T @ A), base, adapter) == ("same", "")


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_type_of_the_model_decides(tmp_path, model_type):
    base, adapter, merged = files(tmp_path, model_type)
    if model_type == "llama":  # without the other c_proj, which a llama does not have
        save_file({NAME: W}, base / "model.safetensors")
    right, wrong = ("in_out", "out_in") if model_type == "gpt2" else ("out_in", "in_out")
    change = (B @ A).T if model_type == "gpt2" else B @ A
    assert judged(written(base, merged, W + change), base, adapter) == ("same", "")
    outcome, why = judged(written(base, tmp_path / "wrong", W + change.T), base, adapter)
    assert outcome == "different" and why.endswith(TRANSPOSED.format(wrong, right))


def test_a_merge_that_guesses_the_layout_is_detected(tmp_path, monkeypatch):
    base, adapter, merged = files(tmp_path, "gpt2")
    guess = {1: Layout.OTHER, 2: Layout.MATRIX}
    monkeypatch.setattr(checkpoint, "_layout", lambda name, dimensions, model_types: guess[dimensions])
    le.merge(base, adapter, merged)
    np.testing.assert_allclose(load_file(merged / "model.safetensors")[NAME], W + B @ A, rtol=1e-5)
    outcome, why = judged(merged, base, adapter)
    assert outcome == "different" and why.endswith(TRANSPOSED.format("out_in", "in_out"))


def test_a_type_that_the_biases_contradict_is_undecided(tmp_path):
    base, adapter, merged = files(tmp_path, "llama")  # its mlp.c_proj is (32, 8) with a bias of 8: stored (in, out)
    le.merge(base, adapter, merged)
    outcome, why = judged(merged, base, adapter)
    assert outcome == "undecided" and why.startswith("its layout is unknown: it is the sum for a weight stored out_in")


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_the_record_of_an_adapter_decides(tmp_path, layout):
    base, _, merged = files(tmp_path)
    adapter = peft_adapter(tmp_path / "recording", {"h.0.attn.c_proj": (A, B)}, layout=layout)
    le.merge(base, adapter, merged)
    assert judged(merged, base, adapter) == ("same", "")
    wrong = written(base, tmp_path / "wrong.safetensors", W + (B @ A if layout == "in_out" else (B @ A).T))
    assert judged(wrong, base, adapter)[0] == "different"


def test_records_that_contradict_a_shape_are_no_evidence(tmp_path):
    base, _, merged = files(tmp_path)
    pairs = {"h.0.attn.c_proj": (A, B), "h.0.mlp.c_proj": (np.ones((2, 32)), np.ones((8, 2)))}  # the latter is in_out
    adapter = peft_adapter(tmp_path / "recording", pairs)
    le.merge(base, adapter, merged, layout={"*.attn.c_proj": "out_in"})
    # The record is none, and the shape of the other c_proj tells that both are stored (in, out).
    assert judged(merged, base, adapter)[0] == "different"
    assert judged(merged, base, adapter, layout={"*.attn.c_proj": "out_in"}) == ("same", "")


@pytest.mark.parametrize(
    ("name", "beside", "right"),
    [
        (NAME, GPT2, "in_out"),  # another c_proj that is not square has a bias
        ("h.0.q_proj.weight", {}, "out_in"),  # a name of nn.Linear in transformers
        ("h.0.q_proj.weight", {"wide.weight": np.ones((32, 8)), "wide.bias": np.ones(8)}, ""),  # beside a Conv1D
        ("q_proj.weight", {}, ""),  # no layer of a stack
        ("pooler.dense.weight", {"h.0.fc.weight": np.ones((2, 3))}, "out_in"),  # beside a stack
        ("net.0.weight", {"net.2.weight": np.ones((32, 8)), "net.2.bias": np.ones(8)}, ""),  # numbers are no names
        ("a.1.0.weight", {"a.2.0.weight": np.ones((32, 8)), "a.2.0.bias": np.ones(8)}, "in_out"),
    ],
)
def test_a_bare_file_shows_layouts(tmp_path, name, beside, right):
    base = base_file(tmp_path / "base.safetensors", {**beside, name: W})
    adapter = peft_adapter(tmp_path / "ad", {name.removesuffix(".weight"): (A, B)}, layout="")
    outcomes = {}
    for layout, change in (("out_in", B @ A), ("in_out", (B @ A).T)):
        merged = tmp_path / f"{layout}.safetensors"
        save_file(load_file(base) | {name: W + change}, merged)
        result = le.verify(merged, base=base, adapters=[adapter])
        outcomes[layout] = str(result.verdict.outcome)
    others = dict.fromkeys(outcomes, "different" if right else "undecided")
    assert outcomes == others | ({right: "same"} if right else {})


@pytest.mark.parametrize("use_dora", [False, True])
def test_two_adapters_and_dora_in_the_wrong_layout_are_named(tmp_path, use_dora):
    base, adapter, merged = files(tmp_path, use_dora=use_dora)
    adapters = [adapter]
    if use_dora:
        add_tensors(adapter, {"base_model.model.h.0.attn.c_proj.lora_magnitude_vector": np.full(8, 2, np.float32)})
    else:
        adapters.append(peft_adapter(tmp_path / "two", {"h.0.attn.c_proj": (B.T, A.T)}, layout="", lora_alpha=1))
    le.merge(base, adapters, merged, layout={"*": "in_out"})
    assert judged(merged, base, *adapters, layout={"*attn*": "in_out"}) == ("same", "")
    outcome, why = judged(merged, base, *adapters, layout={"*attn*": "out_in"})
    assert outcome == "different" and why.endswith(TRANSPOSED.format("in_out", "out_in"))


def test_the_command_takes_layouts(tmp_path, capsys):
    base, adapter, merged = files(tmp_path)
    line = [str(part) for part in ("verify", written(base, merged, W + B @ A), "--base", base, "-a", adapter)]
    assert cli.run(line) == 5
    assert f"{NAME}: undecided, its layout is unknown" in capsys.readouterr().out
    assert cli.run([*line, "--layout", "*.c_proj=out_in"]) == 0
    assert cli.run([*line, "--layout", "*.c_proj=in_out"]) == 4
    capsys.readouterr()
    assert cli.run([*line, "--layout", "*=in_out", "--layout", "h.*=out_in", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["about"]
    assert about["layout"] == {"*": "in_out", "h.*": "out_in"}
    assert "--layout *=in_out --layout h.*=out_in" in " ".join(about["command"])


@pytest.mark.parametrize("config", [{}, {"model_type": "mixtral"}])
def test_all_names_of_a_base_are_read_once_for_many_weights(monkeypatch, config):
    """Qwen3-30B-A3B has 18,432 experts: where each read all names, the layouts of an audit took half an hour."""
    names = [f"model.layers.0.mlp.experts.{number}.w1.weight" for number in range(20)]
    adapter = holding(pairs={name.removesuffix(".weight"): pair(A, B) for name in names})
    steps = plan.make([adapter], [matrix(name, 8, 8) for name in names])
    shapes = {name: Namespace(shape=(8, 8)) for name in names}
    base = Namespace(shards=["file"], entries=lambda _: shapes, config=config)
    read = []
    for function in ("_oblong", "_of_namesakes", "other_layouts"):
        original = getattr(stored_layout, function)
        counted = functools.partial(lambda run, *given: read.append(run) or run(*given), original)
        monkeypatch.setattr(stored_layout, function, counted)
    stored_layout.StoredLayouts.of(steps, base, {})
    assert read and len(read) == len(set(read))
