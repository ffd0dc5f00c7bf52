"""A merge by compiled code: the same as by NumPy and in fp64, by each instruction set that this processor has."""

from __future__ import annotations

import importlib
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from lora_export import merge
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.pairs.structured import KroneckerPair
from lora_export.plan import Layout, Step, TensorSpec, Term
from lora_export.storage.gguf_blocks import CODECS, BlockCodec
from lora_export.storage.gguf_file import BY_NAME
from lora_export.weights import apply_step, compiled
from lora_export.weights.apply_step import StepRows, apply_by_numpy, apply_on_processor
from support.gguf_files import Kind, stacked_experts, values_of, write_llama
from support.handmade import base_file, peft_adapter

HOME = Path(sys.prefix) / "kernel"  # where `make` puts it: other tests merge by NumPy, as most users do
BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
BITS = {4: np.uint32, 2: np.uint16}


@pytest.fixture(params=["neon"] if platform.machine() in ("arm64", "aarch64") else ["v4", "v3"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled arithmetic of one instruction set; NumPy changes no weight."""
    if not HOME.exists():
        pytest.skip("needs the compiled arithmetic: make .venv/kernel.stamp")
    monkeypatch.syspath_prepend(HOME)
    found = importlib.import_module("lora_export_kernel")
    best = found.INSTRUCTIONS
    if request.param != best and (request.param, best) != ("v3", "v4"):
        pytest.skip(f"this processor has {best or 'none of the instruction sets'}, not {request.param}")
    monkeypatch.setattr(found, "INSTRUCTIONS", request.param)
    compiled.kernel.cache_clear()
    yield found
    del sys.modules["lora_export_kernel"]
    compiled.kernel.cache_clear()


@pytest.fixture
def numpy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: StepRows) -> Any:
        raise AssertionError("compiled code should have changed these rows")

    monkeypatch.setattr(apply_step, "apply_by_numpy", fail)


def step_on(
    shape: tuple[int, ...], ranks: tuple[int, ...] = (8,), *, seed: int = 0, layout: Layout = Layout.OUT_IN, **more: Any
) -> Step:
    """A step with normal A and B, a scale that is no power of two, and a strength for each pair."""
    random = np.random.default_rng(seed)
    out, *inputs = shape if layout is Layout.OUT_IN else shape[::-1]
    pairs = [
        LoraPair(
            a=random.normal(size=(rank, *inputs)),
            b=random.normal(size=(out, rank, *[1] * (len(inputs) - 1))) / 100,
            scale=0.7,
            **more,
        )
        for rank in ranks
    ]
    terms = tuple(Term(f"adapter {n}", "fc", pair, strength=1 + n / 3) for n, pair in enumerate(pairs))
    return Step(TensorSpec("fc.weight", shape, "float32", layout), terms)


def part_of(step: Step, stored: NDArray[Any], output: NDArray[Any], rows: slice | None = None) -> StepRows:
    rows = rows or slice(0, len(stored))
    return StepRows(step, "fc.weight", rows, stored, output, np.empty(32 * stored.size + 64, np.uint8))


def exact(step: Step, stored: NDArray[Any]) -> NDArray[np.float64]:
    """W + ΔW in fp64."""
    total = stored.astype(np.float64).reshape(len(stored), -1)
    for term in step.stored_terms:
        rank = term.pair.rank
        b, a = term.pair.b.reshape(-1, rank).astype(np.float64), term.pair.a.reshape(rank, -1).astype(np.float64)
        total = total + float(np.float32(term.scale)) * (b @ a)
    if step.magnitude is not None:
        total *= (step.magnitude / np.sqrt((total**2).sum(1)))[:, None]
    return total.reshape(stored.shape)


def assert_right(step: Step, stored: NDArray[Any], output: NDArray[Any], statistics: Any) -> None:
    """The output is the exact sum, rounded once, and the figures are those of what is stored."""
    want, got = exact(step, stored), output.astype(np.float64)
    slack = 1e-5 * np.abs(want).max()  # of sums in fp32
    step_of_type = np.abs(want) * 2.0 ** -{4: 23, 2: {BF16: 8}.get(output.dtype, 11)}[output.itemsize] + slack
    assert np.all(np.abs(got - want) <= step_of_type)
    before = stored.astype(np.float64)
    change, kept = want - before, got - before
    sums = [(before**2).sum(), (change**2).sum(), (kept * change).sum(), ((kept - change) ** 2).sum()]
    tolerance = [1e-5 * sums[0], 1e-4 * sums[1], 1e-4 * sums[1], 0.01 * sums[3] + 1e-8 * sums[0]]
    assert np.all(np.abs(statistics.sums[:4] - sums) <= tolerance)
    assert statistics.sums[4] == np.count_nonzero(kept) and statistics.elements == stored.size


@pytest.mark.parametrize("columns", [1, 7, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 4, 5, 70])
@pytest.mark.usefixtures("numpy_fails", "kernel")
def test_shapes(rows, columns):
    step = step_on((rows, columns), (3, 9))
    stored = np.random.default_rng(1).normal(size=(rows, columns)).astype(BF16)
    output = np.empty_like(stored)
    assert_right(step, stored, output, apply_on_processor(part_of(step, stored, output)))


@pytest.mark.parametrize("to", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("numpy_fails", "kernel")
def test_types(dtype, to):
    step = step_on((36, 131))
    stored = np.random.default_rng(1).normal(size=(36, 131)).astype(dtype)
    output = np.empty(stored.shape, to)
    assert_right(step, stored, output, apply_on_processor(part_of(step, stored, output)))


@pytest.mark.parametrize(
    ("shape", "layout", "more"),
    [
        ((40, 30), Layout.IN_OUT, {}),
        ((12, 5, 3, 3), Layout.OUT_IN, {}),
        ((40, 130), Layout.OUT_IN, {"magnitude": np.linspace(0.5, 2, 40)}),
        ((12, 5, 3, 3), Layout.OUT_IN, {"magnitude": np.linspace(0.5, 2, 12)}),
    ],
    ids=["transposed", "convolution", "DoRA", "DoRA of a convolution"],
)
@pytest.mark.usefixtures("numpy_fails", "kernel")
def test_layers(shape, layout, more):
    step = step_on(shape, layout=layout, **more)
    stored = np.random.default_rng(1).normal(size=shape).astype(np.float16)
    output = np.empty_like(stored)
    assert_right(step, stored, output, apply_on_processor(part_of(step, stored, output)))


@pytest.mark.usefixtures("numpy_fails", "kernel")
def test_columns_and_rows_of_a_wider_weight():
    wide = np.random.default_rng(1).normal(size=(40, 300)).astype(BF16)
    output, step = wide.copy(), step_on((60, 100))
    here = np.s_[:, 100:200]
    apply_on_processor(part_of(step, wide[here], output[here], slice(10, 50)))
    whole = np.zeros((60, 100), BF16)
    whole[10:50] = wide[here]
    assert np.abs(output[here].astype(float) - exact(step, whole)[10:50]).max() < 0.02
    assert np.array_equal(output[:, :100], wide[:, :100]) and np.array_equal(output[:, 200:], wide[:, 200:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("kernel")
def test_bits_are_those_of_numpy_where_sums_are_exact(dtype):
    """Integers and their quarters: ties between two neighbours, numbers below the normal ones, and both signs."""
    random = np.random.default_rng(2)
    pair = LoraPair(a=random.integers(-3, 4, (4, 500)), b=random.integers(-3, 4, (64, 4)), scale=0.25)
    step = Step(TensorSpec("fc.weight", (64, 500), "float32", Layout.OUT_IN), (Term("mine", "fc", pair),))
    stored = (random.integers(-300, 300, (64, 500)) * random.choice([1, 2.0**-20], (64, 500))).astype(dtype)
    ours, theirs = np.empty_like(stored), np.empty_like(stored)
    found = apply_on_processor(part_of(step, stored, ours))
    want = apply_by_numpy(part_of(step, stored, theirs))
    assert np.array_equal(ours.view(BITS[dtype.itemsize]), theirs.view(BITS[dtype.itemsize]))
    assert not np.array_equal(ours, stored)
    assert found.sums == pytest.approx(want.sums, rel=1e-5, abs=1e-6 * want.sums[0])


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (60000.0, np.float16, "would exceed 65504, the largest float16"),
        (3.38e38, BF16, "the largest bfloat16"),
        (np.nan, np.float32, "the base holds 1 value that is not finite"),
        (np.inf, np.float16, "the base holds 1 value that is not finite"),
    ],
)
@pytest.mark.usefixtures("kernel")
def test_sums_that_are_not_finite_are_refused(value, dtype, message):
    change = value / 10 if np.isfinite(value) else 1.0
    pair = LoraPair(a=np.eye(1, 70, 69) * change, b=np.ones((5, 1)), scale=1.0)
    step = Step(TensorSpec("fc.weight", (5, 70), "float32", Layout.OUT_IN), (Term("mine", "fc", pair),))
    stored = np.zeros((5, 70), dtype)
    stored[4, 69] = value
    with pytest.raises(InputRefused, match=message), np.errstate(over="ignore"):
        apply_on_processor(part_of(step, stored, np.empty_like(stored)))


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("size", [1e20, 1e-25])
@pytest.mark.usefixtures("kernel")
def test_rows_of_dora_whose_squares_leave_fp32(size, measured):
    step = step_on((6, 40), magnitude=np.linspace(0.5, 2, 6))
    stored = (np.random.default_rng(1).normal(size=(6, 40)) * size).astype(np.float32)
    pair = LoraPair(step.terms[0].pair.a * size, step.terms[0].pair.b, 0.7, magnitude=step.magnitude)
    step = Step(step.spec, (Term("mine", "fc", pair),))
    output = np.empty_like(stored)
    apply_on_processor(replace(part_of(step, stored, output), measured=measured))
    np.testing.assert_allclose(output, exact(step, stored), rtol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_numpy_does_the_rest(monkeypatch):
    seen = []
    monkeypatch.setattr(apply_step, "apply_by_numpy", lambda part: seen.append(part) or "by NumPy")
    stored = np.ones((6, 4))
    kronecker = KroneckerPair({"w1": np.ones((2, 2)), "w2": np.ones((3, 2))}, 1.0)
    plain, spec = step_on((6, 4)), TensorSpec("fc.weight", (6, 4), "float32", Layout.OUT_IN)
    parts = {
        "fp64": part_of(plain, stored, np.empty_like(stored)),
        "LoKr": part_of(Step(spec, (Term("mine", "fc", kronecker),)), stored.astype(BF16), stored.astype(BF16)),
        "replaced": part_of(Step(spec, replace=stored), stored.astype(BF16), stored.astype(BF16)),
    }
    for name, part in parts.items():
        assert apply_on_processor(part) == "by NumPy", name
    assert len(seen) == len(parts)


def exact_step(rows: int, columns: int) -> Step:
    """A change that is the same in whatever sequence its products are summed: of integers and their quarters."""
    random = np.random.default_rng(rows)
    pairs = [LoraPair(random.integers(-3, 4, (4, columns)), random.integers(-3, 4, (rows, 4)), 0.25) for _ in range(2)]
    terms = tuple(Term(f"adapter {n}", "fc", pair) for n, pair in enumerate(pairs))
    return Step(TensorSpec("fc.weight", (rows, columns), "float32", Layout.OUT_IN), terms)


def some_blocks(codec: BlockCodec, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random bytes with scales that are numbers. Some have no step, some one that vanishes beside the offset."""
    random = np.random.default_rng(columns)
    found = random.integers(0, 256, (20 * rows * columns // codec.type.elements, codec.type.nbytes), dtype=np.uint8)
    found = found[codec.largest(*codec.scales(found)) < 100][: rows * columns // codec.type.elements]
    found[1::5] = 0
    if codec.type.name in ("Q4_1", "Q5_1"):
        found[2::5, :4] = np.array([6e-8, 2.0], np.float16).view(np.uint8)
    return found


@pytest.mark.parametrize(("rows", "columns"), [(2, 256), (5, 768), (70, 512), (6, 96)])
@pytest.mark.parametrize("codec", [each for each in CODECS.values() if each.is_ladder], ids=lambda each: each.type.name)
@pytest.mark.usefixtures("kernel")
def test_blocks_have_the_bytes_of_numpy_where_sums_are_exact(codec, rows, columns):
    if columns % codec.type.elements:
        pytest.skip("a row has whole blocks")
    step, blocks = exact_step(rows + 3, columns), some_blocks(codec, rows, columns)
    own = slice(2, rows + 2)
    before = codec.decode(blocks)
    total = before + sum(term.pair.delta(own) for term in step.terms).reshape(before.shape)
    ours, want = np.zeros_like(blocks), codec.encode(blocks, total)
    found = compiled.merged_blocks(step, own, codec, blocks, ours, measured=True)
    assert np.array_equal(ours, want) and not np.array_equal(ours, blocks)
    weight, change, kept = (each.astype(np.float64) for each in (before, total - before, codec.decode(want) - before))
    sums = [(weight**2).sum(), (change**2).sum(), (kept * change).sum(), ((kept - change) ** 2).sum()]
    assert found[:4] == pytest.approx(sums, rel=1e-5, abs=1e-6 * sums[0]) and found[4] == np.count_nonzero(kept)
    assert not compiled.merged_blocks(step, own, codec, blocks, ours, measured=False).any()
    assert np.array_equal(ours, want)


def test_numpy_does_the_other_blocks(kernel):
    codec, step = CODECS[BY_NAME["Q8_0"]], step_on((4, 64))
    blocks = some_blocks(codec, 4, 64)
    damaged, other = blocks.copy(), CODECS[BY_NAME["MXFP4"]]
    damaged[3, :2] = 0x7C  # infinity
    dora = step_on((4, 64), magnitude=np.ones(4))
    rows, plain = slice(0, 4), {"measured": True}
    assert compiled.merged_blocks(step, rows, codec, blocks, blocks.copy(), **plain) is not None
    assert compiled.merged_blocks(step, rows, codec, damaged, damaged.copy(), **plain) is None
    assert compiled.merged_blocks(dora, rows, codec, blocks, blocks.copy(), **plain) is None
    packed = some_blocks(other, 4, 64)
    assert compiled.merged_blocks(step, rows, other, packed, packed.copy(), **plain) is None
    del kernel.merge_blocks  # as in its first version
    assert compiled.merged_blocks(step, rows, codec, blocks, blocks.copy(), **plain) is None


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.usefixtures("kernel")
def test_blocks_whose_sums_are_not_finite_are_left_to_numpy(measured):
    codec, blocks = CODECS[BY_NAME["Q8_0"]], np.zeros((1, 34), np.uint8)
    pair = LoraPair(a=np.full((1, 32), 3e38), b=np.full((1, 1), 2.0), scale=1.0)
    step = Step(TensorSpec("fc.weight", (1, 32), "float32", Layout.OUT_IN), (Term("mine", "fc", pair),))
    assert compiled.merged_blocks(step, slice(0, 1), codec, blocks, blocks.copy(), measured=measured) is None


def merged_both_ways(base, adapter, monkeypatch):
    """The reports of a merge into `compiled.gguf` and into `numpy.gguf`, beside the base."""
    options = {"dtype_of": {"*": "keep"}, "min_retention": 0}
    with monkeypatch.context() as without:
        without.setattr(compiled, "kernel", lambda: None)
        want = merge(base, [adapter], output=base.with_name("numpy.gguf"), **options).report
    monkeypatch.delattr(BlockCodec, "encode")
    return merge(base, [adapter], output=base.with_name("compiled.gguf"), **options).report, want


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_0], ids=str)
@pytest.mark.usefixtures("kernel")
def test_a_merge_into_gguf_is_that_of_numpy(tmp_path, monkeypatch, kind):
    base = write_llama(tmp_path / "base.gguf", kind)
    random = np.random.default_rng(0)
    factors = (random.integers(-3, 4, (2, 256)) / 8, random.integers(-3, 4, (256, 2)) / 8)
    adapter = peft_adapter(
        tmp_path / "adapter", {"model.layers.0.mlp.up_proj": factors, "model.layers.0.self_attn.q_proj": factors}
    )
    found, want = merged_both_ways(base, adapter, monkeypatch)
    ours, theirs, before = (values_of(tmp_path / f"{name}.gguf") for name in ("compiled", "numpy", "base"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in before)
    assert sum(not np.array_equal(ours[name], before[name]) for name in before) == 2
    for own, its in zip(found.results, want.results, strict=True):
        assert (own.retention, own.noise, own.changed) == pytest.approx(
            (its.retention, its.noise, its.changed), rel=1e-4
        )


@pytest.mark.parametrize("experts", [(1,), (0, 2)])
@pytest.mark.usefixtures("kernel")
def test_experts_without_an_adapter_keep_their_bytes(tmp_path, monkeypatch, experts):
    base, random = stacked_experts(tmp_path / "base.gguf"), np.random.default_rng(0)
    factors = random.integers(-3, 4, (2, 32)) / 8, random.integers(-3, 4, (64, 2)) / 8
    adapter = peft_adapter(
        tmp_path / "adapter", {f"model.layers.0.mlp.experts.{one}.up_proj": factors for one in experts}
    )
    found, want = merged_both_ways(base, adapter, monkeypatch)
    ours, theirs, before = (values_of(tmp_path / f"{name}.gguf") for name in ("compiled", "numpy", "base"))
    name = "blk.0.ffn_up_exps.weight"
    assert [n for n in range(3) if not np.array_equal(ours[name][n], before[name][n])] == list(experts)
    assert all(np.array_equal(ours[one], theirs[one]) for one in before)
    figures = [(one.relative_change, one.retention, one.noise, one.changed) for one in (*found.results, *want.results)]
    assert len(figures) == 2 and figures[0] == pytest.approx(figures[1], rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"output": np.zeros((2, 2, 34), np.uint8)},
        {"blocks": np.zeros((3, 2, 33), np.uint8), "output": np.zeros((3, 2, 33), np.uint8)},
        {"steps": np.ones((3, 2, 1))},
        {"offsets": np.zeros((2, 2, 1), np.float32)},
        {"b": np.ones((2, 4), np.float32)},
        {"b": np.ones((4, 3), np.float32).T},
        {"a": np.ones((4, 96), np.float32)},
        {"a": np.ones((5, 64), np.float32)},
        {"stored": [(2, 2, 32, 8)]},
        {"stored": [(3, 1, 32, 8)]},
        {"figures": np.zeros(10, np.float32)[:5]},
        {"figures": np.zeros(5)[:2]},
        {"figures": np.zeros((5, 1))},
        {"figures": np.zeros(10)[::2]},
    ],
    ids=" ".join,
)
def test_arrays_that_do_not_fit_are_refused(kernel, wrong):
    """Arrays that are too short are parts of longer ones: C that gets them all the same writes nowhere else."""
    blocks, steps = np.zeros((3, 2, 34), np.uint8), np.ones((3, 2, 1), np.float32)
    given = {"blocks": blocks, "output": blocks.copy(), "steps": steps, "offsets": 0 * steps, "stored": [(2, 1, 32, 8)]}
    given |= {"b": np.ones((3, 4), np.float32), "a": np.ones((4, 64), np.float32), "figures": np.zeros(5)}
    assert kernel.merge_blocks(**given | {"stored": kernel.Planes(given["stored"], -128, 256)})
    given |= wrong
    with pytest.raises(ValueError, match="arrays do not fit each other"):
        kernel.merge_blocks(**given | {"stored": kernel.Planes(given["stored"], -128, 256)})


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: np.ones((5, 5), np.float32)} for name in ("weight", "output", "b", "a")),
        *({name: np.ones((4, 64), np.float32).T} for name in ("weight", "output", "b")),
        *({name: np.ones((64, 8), np.float32)[:, ::2]} for name in ("weight", "output", "b")),
        *({name: np.ones((64, 4))} for name in ("weight", "output", "b")),
        {"weight": np.ones(256, np.float32)},
        {"output": np.ones((64, 4, 1), np.float32)},
        {"a": np.ones((4, 4))},
        {"a": np.ones((4, 4, 2), np.float32)},
        {"factors": np.ones(64)},
        {"factors": np.ones(64, np.float32)[:3]},
        {"factors": np.ones((64, 1), np.float32)},
        {"factors": np.ones(128, np.float32)[::2]},
        {"figures": np.zeros(10, np.float32)[:5]},
        {"figures": np.zeros(5)[:2]},
        {"figures": np.zeros(10, np.float32)[:2]},
        {"figures": np.zeros(10)[::2]},
    ],
    ids=" ".join,
)
def test_matrices_that_do_not_fit_are_refused(kernel, wrong):
    given = {name: np.ones((64, 4), np.float32) for name in ("weight", "output", "b")}
    given |= {"a": np.ones((4, 4), np.float32), "factors": np.ones(64, np.float32), "figures": np.zeros(5)}
    assert kernel.merge_rows(**given)
    with pytest.raises(ValueError, match="arrays do not fit each other"):
        kernel.merge_rows(**given | wrong)


@pytest.mark.parametrize("wrong", [np.ones((4, 64), np.float32).T, np.ones((64, 4))], ids=["columns", "fp64"])
def test_norms_of_a_weight_that_does_not_fit_are_refused(kernel, wrong):
    b, a = np.ones((64, 3), np.float32), np.ones((3, 4), np.float32)
    assert kernel.squared_norms(np.ones((64, 4), np.float32), b, a).tolist() == [64] * 64
    with pytest.raises(ValueError, match="arrays do not fit each other"):
        kernel.squared_norms(wrong, b, a)


@pytest.mark.usefixtures("numpy_fails")
def test_the_record_of_a_merge_names_the_arithmetic(tmp_path, kernel):
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
    adapter = peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    merged = tmp_path / "merged.safetensors"
    merge(base=base, adapters=[adapter], output=merged)
    assert load_file(merged)["fc.weight"].tolist() == [[1, 3, 5], [13, 24, 35]]
    settings = open_artifact(merged).record.settings
    assert settings["arithmetic"] == f"lora-export-kernel {kernel.__version__} ({kernel.INSTRUCTIONS})"
