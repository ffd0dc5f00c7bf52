"""Ways to break a right export. Each is one small function on the adapter, the weights, the graph or the outputs.

A defect makes a candidate for a column (a model in a mode), or None where the column has nothing that it could break.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from defects import subjects
from defects.subjects import ALPHA, GRAPHS, RANK, Column
from lora_export.errors import RuntimeRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime.runner import Arrays, Placement, Runner

Make = Callable[[Column], Runner | None]


@dataclass(frozen=True)
class Defect:
    name: str
    make: Make
    kind: str | None = None  # of the adapter; None for that of the column

    def adapter(self, column: Column) -> Adapter:
        """The right adapter, which the reference gets."""
        return subjects.adapter(column.subject, self.kind or column.kind)


DEFECTS: dict[str, Defect] = {}


def defect(name: str, kind: str | None = None) -> Callable[[Make], Make]:
    """Register a function that makes a wrong candidate."""

    def register(make: Make) -> Make:
        DEFECTS[name] = Defect(name, make, kind)
        return make

    return register


# --- the adapter, as a wrong reader or writer would make it -----------------------------------------

Change = Callable[[Adapter, Column], Adapter | None]


def of_adapter(name: str, kind: str | None = None) -> Callable[[Change], Change]:
    """Register a function that makes the wrong adapter that is exported."""

    def register(change: Change) -> Change:
        def make(column: Column) -> Runner | None:
            # Adapter inputs exist for plain pairs of linear layers alone.
            if kind == "dora" and column.kind == "linear":
                return None
            wrong = change(subjects.adapter(column.subject, kind or column.kind), column)
            return wrong and column.candidate(wrong)

        DEFECTS[name] = Defect(name, make, kind)
        return change

    return register


def each(adapter: Adapter, change: Callable[[LoraPair], LoraPair], only: str = "") -> Adapter:
    """Every pair changed, or `only` the one of this module."""
    pairs = {path: change(pair) if only in ("", path) else pair for path, pair in adapter.pairs.items()}
    return subjects.change(adapter, pairs)


def scaled(pair: LoraPair, factor: float) -> LoraPair:
    return dataclasses.replace(pair, scale=pair.scale * factor)


def with_b(pair: LoraPair, b: NDArray[Any]) -> LoraPair:
    return dataclasses.replace(pair, b=b)


def first(adapter: Adapter) -> str:
    return next(iter(adapter.pairs))


def last(adapter: Adapter) -> str:
    return list(adapter.pairs)[-1]


def without(adapter: Adapter, *endings: str) -> Adapter:
    return subjects.change(adapter, {path: p for path, p in adapter.pairs.items() if not path.endswith(endings)})


def is_linear(pair: LoraPair) -> bool:
    return pair.a.ndim == 2


KIND_OF_LAYER = {"net": "linear2", "gpt2": "c_fc", "bert": "value", "minilm": "value", "moenet": "experts.1"}


for _name, _change in {
    "adapter missing on every layer": lambda adapter, column: subjects.change(adapter, {}, biases={}, replaced={}),
    "adapter missing on the first layer": lambda adapter, column: without(adapter, first(adapter)),
    "adapter missing on the last layer": lambda adapter, column: without(adapter, last(adapter)),
}.items():
    of_adapter(_name)(_change)


@of_adapter("adapter missing on one kind of layer")
def _(adapter: Adapter, column: Column) -> Adapter:
    return without(adapter, KIND_OF_LAYER.get(column.subject, "v_proj"))


def transposed(pair: LoraPair) -> LoraPair:
    return dataclasses.replace(pair, a=pair.b.T, b=pair.a.T)


@of_adapter("B·A transposed on one square weight")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, transposed, next(path for path, pair in adapter.pairs.items() if is_square(pair)))


@of_adapter("B·A transposed on every square weight")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda pair: transposed(pair) if is_square(pair) else pair)


def is_square(pair: LoraPair) -> bool:
    return is_linear(pair) and pair.shape[0] == pair.shape[1]


@of_adapter("ranks of A permuted")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda pair: dataclasses.replace(pair, a=pair.a[::-1]))


@of_adapter("A read in column order")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda p: dataclasses.replace(p, a=p.a.T.reshape(p.a.shape)) if is_linear(p) else p)


for _name, _factor in {
    "α not divided by the rank": RANK,
    "rsLoRA taken for LoRA": RANK**-0.5,
    "LoRA taken for rsLoRA": RANK**0.5,
    "α ignored": RANK / ALPHA,
    "every scale × 1.1": 1.1,
    "every scale × 0.9": 0.9,
    "every scale × 1.01": 1.01,
    "every scale negative": -1.0,
    "merged twice": 2.0,
}.items():
    of_adapter(_name)(lambda adapter, column, factor=_factor: each(adapter, lambda pair: scaled(pair, factor)))


def exchanged(adapter: Adapter, one: str, other: str) -> Adapter:
    return subjects.change(adapter, {**adapter.pairs, one: adapter.pairs[other], other: adapter.pairs[one]})


for _name, _change in {
    "one layer's α ignored (× 2)": lambda adapter, column: each(adapter, lambda pair: scaled(pair, 2), first(adapter)),
    "last layer's scale × 1.1": lambda adapter, column: each(adapter, lambda pair: scaled(pair, 1.1), last(adapter)),
}.items():
    of_adapter(_name)(_change)


@of_adapter("q and k swapped")
def _(adapter: Adapter, column: Column) -> Adapter:
    """Packed projections are rows of one B."""
    query, key = {"bert": ("query", "key"), "minilm": ("query", "key")}.get(column.subject, ("q_proj", "k_proj"))
    apart = [path for path in adapter.pairs if path.endswith(query)]
    for path in apart:
        adapter = exchanged(adapter, path, path.removesuffix(query) + key)
    packed = {path: pair for path, pair in adapter.pairs.items() if path.endswith(("self_attn", "c_attn"))}
    for path, pair in packed.items():
        q, k, v = np.split(pair.b, 3)
        adapter = subjects.change(adapter, {**adapter.pairs, path: with_b(pair, np.concatenate([k, q, v]))})
    return adapter


@of_adapter("two layers' adapters swapped")
def _(adapter: Adapter, column: Column) -> Adapter:
    one = next(path for path in adapter.pairs if ".0." in path)
    return exchanged(adapter, one, one.replace(".0.", ".1.", 1))


@of_adapter("one layer has another layer's B")
def _(adapter: Adapter, column: Column) -> Adapter:
    one = next(path for path in adapter.pairs if ".0." in path)
    return each(adapter, lambda pair: with_b(pair, adapter.pairs[one.replace(".0.", ".1.", 1)].b), one)


@of_adapter("one rank of the adapter dropped")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda p: dataclasses.replace(p, a=p.a[:-1], b=p.b[:, :-1]))


def rows_of_a_head(pair: LoraPair) -> int:
    return max(1, pair.b.shape[0] // (12 if pair.b.shape[0] % 3 == 0 else 4))


@of_adapter("one attention head's rows of B zeroed")
def _(adapter: Adapter, column: Column) -> Adapter:
    def change(pair: LoraPair) -> LoraPair:
        b = pair.b.copy()
        b[-rows_of_a_head(pair) :] = 0  # rows of the value projection, where projections are packed
        return with_b(pair, b)

    names = ("value", "v_proj", "self_attn", "c_attn")
    return each(adapter, change, next(path for path in adapter.pairs if path.endswith(names)))


@of_adapter("attention heads permuted")
def _(adapter: Adapter, column: Column) -> Adapter:
    names = ("value", "v_proj", "self_attn", "c_attn")
    path = next(path for path in adapter.pairs if path.endswith(names))
    return each(adapter, lambda pair: with_b(pair, np.roll(pair.b, rows_of_a_head(pair), axis=0)), path)


@of_adapter("one row of B zeroed")
def _(adapter: Adapter, column: Column) -> Adapter:
    def change(pair: LoraPair) -> LoraPair:
        b = pair.b.copy()
        b[0] = 0
        return with_b(pair, b)

    return each(adapter, change, last(adapter))


@of_adapter("one element of A with the wrong sign")
def _(adapter: Adapter, column: Column) -> Adapter:
    def change(pair: LoraPair) -> LoraPair:
        a = pair.a.copy()
        a[0, 0] *= -1
        return dataclasses.replace(pair, a=a)

    return each(adapter, change, last(adapter))


@of_adapter("one element of A off by a thousandth")
def _(adapter: Adapter, column: Column) -> Adapter:
    def change(pair: LoraPair) -> LoraPair:
        a = pair.a.copy()
        a[0, 0] *= 1.001
        return dataclasses.replace(pair, a=a)

    return each(adapter, change, last(adapter))


@of_adapter("adapter rounded to fp16")
def _(adapter: Adapter, column: Column) -> Adapter:
    half = np.float16
    return each(adapter, lambda p: dataclasses.replace(p, a=p.a.astype(half), b=p.b.astype(half)))


@of_adapter("adapter rounded to bf16")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda p: dataclasses.replace(p, a=bf16(p.a), b=bf16(p.b)))


@of_adapter("adapter rounded to 4 bits")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda p: dataclasses.replace(p, a=in_steps(p.a, 7), b=in_steps(p.b, 7)))


for _name, _change in {
    "another adapter than requested": lambda adapter, column: subjects.adapter(column.subject, column.kind, seed=7),
    "biases dropped": lambda adapter, column: subjects.change(adapter, biases={}) if adapter.biases else None,
}.items():
    of_adapter(_name)(_change)


@of_adapter("modules_to_save dropped")
def _(adapter: Adapter, column: Column) -> Adapter | None:
    return subjects.change(adapter, replaced={}) if adapter.replaced else None


@of_adapter("modules_to_save without its bias")
def _(adapter: Adapter, column: Column) -> Adapter | None:
    weights = {name: array for name, array in adapter.replaced.items() if not name.endswith("bias")}
    return subjects.change(adapter, replaced=weights) if adapter.replaced else None


@of_adapter("DoRA's magnitude dropped", "dora")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda pair: dataclasses.replace(pair, magnitude=None))


@of_adapter("DoRA's magnitude is the norm of W", "dora")
def _(adapter: Adapter, column: Column) -> Adapter:
    return with_magnitudes(adapter, column, lambda before, after, own: before)


@of_adapter("DoRA's norm of W instead of W + ΔW", "dora")
def _(adapter: Adapter, column: Column) -> Adapter:
    return with_magnitudes(adapter, column, lambda before, after, own: own * after / before)


@of_adapter("DoRA's magnitude of one layer permuted", "dora")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda p: dataclasses.replace(p, magnitude=np.roll(p.magnitude, 1)), last(adapter))


def with_magnitudes(adapter: Adapter, column: Column, magnitude: Callable[..., NDArray[Any]]) -> Adapter:
    """Other magnitudes, computed from the norms of W and W + ΔW and the adapter's own magnitude."""

    def change(path: str, pair: LoraPair) -> LoraPair:
        weight = subjects.matrix(column.base.module, path)
        after = subjects.norms(weight + pair.delta().astype(np.float64))
        return dataclasses.replace(pair, magnitude=magnitude(subjects.norms(weight), after, pair.magnitude))

    return subjects.change(adapter, {path: change(path, pair) for path, pair in adapter.pairs.items()})


# Other tools accept these: the effect of the adapter is below their tolerance.


@of_adapter("weak adapter missing on every layer", "weak")
def _(adapter: Adapter, column: Column) -> Adapter:
    return subjects.change(adapter, {})


@of_adapter("weak adapter missing on one kind of layer", "weak")
def _(adapter: Adapter, column: Column) -> Adapter:
    return without(adapter, KIND_OF_LAYER.get(column.subject, "v_proj"))


@of_adapter("weak adapter, every scale × 1.1", "weak")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda pair: scaled(pair, 1.1))


@of_adapter("weak adapter, ranks of A permuted", "weak")
def _(adapter: Adapter, column: Column) -> Adapter:
    return each(adapter, lambda pair: dataclasses.replace(pair, a=pair.a[::-1]))


@defect("weak adapter lost in rounding to bf16", "weak")
def _(column: Column) -> Runner | None:
    if column.mode != "checkpoint":
        return None
    return dataclasses.replace(column, storage="bfloat16").candidate(subjects.adapter(column.subject, "weak"))


# --- weights ---------------------------------------------------------------------------------------

OfArray = Callable[[NDArray[Any]], NDArray[Any]]


def of_weights(name: str, *, every: bool = True) -> Callable[[OfArray], OfArray]:
    """Register a change of weights in the finished file: of `every` matrix, or of one that no adapter changes."""

    def register(change: OfArray) -> OfArray:
        def make(column: Column) -> Runner | None:
            adapter = subjects.adapter(column.subject, column.kind)

            def in_graph(program: ir.Model) -> None:
                values = [value for value in program.graph.initializers.values() if is_matrix(value)]
                for value in values if every else untouched(column, values, lambda value: value.name or ""):
                    changed = change(value.const_value.numpy())  # type: ignore[union-attr]
                    value.const_value = ir.Tensor(changed, name=value.name)

            def in_module(module: nn.Module) -> None:
                weights = [(name, p) for name, p in module.named_parameters() if p.ndim > 1]
                with torch.no_grad():
                    for _, weight in weights if every else untouched(column, weights, lambda pair: pair[0]):
                        weight.copy_(torch.from_numpy(change(weight.numpy().copy())))

            return column.candidate(adapter, graph=in_graph, module=in_module)

        DEFECTS[name] = Defect(name, make)
        return change

    return register


def is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype is ir.DataType.FLOAT and len(tensor.shape) > 1 and tensor.size > 16


UNTOUCHED = {
    "net": ("other.weight",),
    "llama": ("embed_tokens.weight",),
    "bert": ("word_embeddings.weight",),
    "minilm": ("word_embeddings.weight",),
    "gpt2": ("wte.weight", "lm_head.weight"),
    "moenet": ("other.weight",),
    **dict.fromkeys(("mixtral", "llava", "internvl"), ("embed_tokens.weight",)),
}


def untouched(column: Column, items: Any, name: Callable[[Any], str]) -> Any:
    found = [item for item in items if name(item).endswith(UNTOUCHED[column.subject])]
    assert found, f"{column} has no weight called {UNTOUCHED[column.subject]}"
    return found[:1]


@of_weights("a tied or untouched weight changed in one dimension", every=False)
def _(weight: NDArray[Any]) -> NDArray[Any]:
    changed = weight.copy()  # the inputs may not look up a certain token, but they use every dimension
    changed.reshape(len(weight), -1)[:, 0] += 0.02
    return changed


def bf16(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def in_steps(array: NDArray[Any], steps: int) -> NDArray[Any]:
    largest = float(np.abs(array).max()) or 1.0
    return (np.round(array / largest * steps) * (largest / steps)).astype(np.float32)


for _name, _change in {
    "weights rounded to bf16": bf16,
    "weights rounded to fp16": lambda weight: weight.astype(np.float16).astype(np.float32),
    "weights rounded to TF32": lambda weight: (((weight.view(np.uint32) + 0x1000) >> 13) << 13).view(np.float32),
    "weights quantised to 8 bits": lambda weight: in_steps(weight, 127),
    "weights quantised to 16 bits": lambda weight: in_steps(weight, 32767),
}.items():
    of_weights(_name)(_change)


# --- the run ---------------------------------------------------------------------------------------


@dataclass
class Tampered:
    """A right candidate whose inputs or outputs are changed."""

    inner: Any
    tamper: Callable[[Any, Arrays], Arrays]

    @property
    def axes(self) -> Any:
        return self.inner.axes

    @property
    def names_known(self) -> bool:
        known: bool = self.inner.names_known
        return known

    def run(self, inputs: Arrays) -> Arrays:
        return self.tamper(self.inner.run, inputs)


Tamper = Callable[[Callable[[Arrays], Arrays], Arrays], Arrays]


def at_run_time(name: str, *, needs: str = "") -> Callable[[Callable[[], Tamper] | Tamper], Any]:
    """Register a change at run time. A column without the input `needs` is left out."""

    def register(tamper: Tamper) -> Tamper:
        def make(column: Column) -> Runner | None:
            if needs and needs not in column.base.input_names:
                return None
            right: Any = column.candidate(subjects.adapter(column.subject, column.kind))
            if not column.form:
                return Tampered(right, tamper)
            # It stays a graph: what its weights are stored in decides how it is judged.
            right.run = functools.partial(tamper, right.run)
            return right  # type: ignore[no-any-return]

        DEFECTS[name] = Defect(name, make)
        return tamper

    return register


def of_outputs(name: str) -> Callable[[Callable[[Arrays], Arrays]], Any]:
    """Register a change of the outputs."""

    def register(change: Callable[[Arrays], Arrays]) -> Any:
        return at_run_time(name)(lambda run, inputs: change(run(inputs)))

    return register


def of_each_output(name: str) -> Callable[[OfArray], Any]:
    """Register a change of each output."""

    def register(change: OfArray) -> Any:
        return of_outputs(name)(lambda outputs: {key: change(value.copy()) for key, value in outputs.items()})

    return register


@at_run_time("padding mask ignored", needs="attention_mask")
def _(run: Any, inputs: Arrays) -> Arrays:
    return run({**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])})


@at_run_time("padding mask read as a length", needs="attention_mask")
def _(run: Any, inputs: Arrays) -> Arrays:
    """As GroupQueryAttention's `seqlens_k` does: right only where the padding is at the end."""
    mask = inputs["attention_mask"]
    return run({**inputs, "attention_mask": (np.arange(mask.shape[1]) < mask.sum(1, keepdims=True)).astype(mask.dtype)})


@at_run_time("every row has the first row's mask", needs="attention_mask")
def _(run: Any, inputs: Arrays) -> Arrays:
    mask = inputs["attention_mask"]
    return run({**inputs, "attention_mask": np.broadcast_to(mask[:1], mask.shape).copy()})


@at_run_time("token types ignored", needs="token_type_ids")
def _(run: Any, inputs: Arrays) -> Arrays:
    return run({**inputs, "token_type_ids": np.zeros_like(inputs["token_type_ids"])})


@at_run_time("a second input replaced by its example", needs="loudness")
def _(run: Any, inputs: Arrays) -> Arrays:
    return run({**inputs, "loudness": np.full_like(inputs["loudness"], 0.9)})


@at_run_time("the main input ignored")
def _(run: Any, inputs: Arrays) -> Arrays:
    name = next(iter(inputs))
    return run({**inputs, name: np.ones_like(inputs[name])})


@at_run_time("fixed batch: another size is refused")
def _(run: Any, inputs: Arrays) -> Arrays:
    if len(next(iter(inputs.values()))) != 3:
        raise RuntimeRefused("Got invalid dimensions for input")
    return run(inputs)


@at_run_time("fixed batch: every row has the first row's output")
def _(run: Any, inputs: Arrays) -> Arrays:
    return {name: np.broadcast_to(value[:1], value.shape) for name, value in run(inputs).items()}


@at_run_time("fixed batch: rows beyond the traced size are zero")
def _(run: Any, inputs: Arrays) -> Arrays:
    return {name: np.concatenate([value[:2], 0 * value[2:]]) for name, value in run(inputs).items()}


@at_run_time("fixed sequence: another length is refused")
def _(run: Any, inputs: Arrays) -> Arrays:
    if next(iter(inputs.values())).shape[-1] not in (11, 9):
        raise RuntimeRefused("Got invalid dimensions for input")
    return run(inputs)


@at_run_time("fixed sequence: tokens beyond the traced length are cut off")
def _(run: Any, inputs: Arrays) -> Arrays:
    def cut(value: NDArray[Any]) -> NDArray[Any]:
        cut = value.copy()
        cut[..., 11:] = cut[..., :1]
        return cut

    return run({name: cut(value) for name, value in inputs.items()})


@at_run_time("dropout active, p = 0.1")
def _(run: Any, inputs: Arrays) -> Arrays:
    rng = np.random.default_rng(len(next(iter(inputs.values()))))
    return {k: v * (rng.random(v.shape) > 0.1).astype(v.dtype) / np.float32(0.9) for k, v in run(inputs).items()}


@of_each_output("NaN everywhere")
def _(output: NDArray[Any]) -> NDArray[Any]:
    return np.full_like(output, np.nan)


@of_each_output("NaN in one element")
def _(output: NDArray[Any]) -> NDArray[Any]:
    output.flat[output.size // 2] = np.nan
    return output


@of_each_output("fp16 overflow: the largest number is infinite")
def _(output: NDArray[Any]) -> NDArray[Any]:
    output.flat[np.abs(output).argmax()] = np.inf
    return output


for _name, _change in {
    "all-zero output": np.zeros_like,
    "constant output": lambda output: np.full_like(output, output.mean()),
    "outputs rounded to fp16": lambda output: output.astype(np.float16).astype(np.float32),
    "outputs rounded to bf16": bf16,
    "dtype changed to float64": lambda output: output.astype(np.float64),
    "dtype changed to float16": lambda output: output.astype(np.float16),
    "one dimension too many": lambda output: output[None],
    "shifted by one along the last axis": lambda output: np.roll(output, 1, axis=-1),
    "shifted by one along the batch": lambda output: np.roll(output, 1, axis=0),
}.items():
    of_each_output(_name)(_change)


@of_each_output("softmax already applied")
def _(output: NDArray[Any]) -> NDArray[Any]:
    raised = np.exp(output - output.max(-1, keepdims=True))
    return (raised / raised.sum(-1, keepdims=True)).astype(np.float32)


@of_each_output("one element off by a thousandth of the largest")
def _(output: NDArray[Any]) -> NDArray[Any]:
    output.flat[output.size // 2] += 1e-3 * np.abs(output).max()
    return output


for _name, _change in {
    "output missing": lambda outputs: dict(list(outputs.items())[:-1]),
    "extra output": lambda outputs: {**outputs, "present.0": next(iter(outputs.values()))},
}.items():
    of_outputs(_name)(_change)


@defect("output renamed")
def _(column: Column) -> Runner | None:
    if column.mode == "torchscript":
        return None  # its outputs have no names
    right = column.candidate(subjects.adapter(column.subject, column.kind))
    return Tampered(right, lambda run, inputs: {f"{k}_1": v for k, v in run(inputs).items()})


@defect("two outputs swapped")
def _(column: Column) -> Runner | None:
    if column.subject != "net":
        return None
    right = column.candidate(subjects.adapter(column.subject, column.kind))

    def swap(run: Any, inputs: Arrays) -> Arrays:
        outputs = run(inputs)
        return {**outputs, "logits": outputs["other"], "other": outputs["logits"]}

    return Tampered(right, swap)


def repeating(key: Callable[[Arrays], Any]) -> Tamper:
    """Repeat the outputs of the first call with the same key: state that outlives a call."""
    memory: dict[Any, Arrays] = {}

    def tamper(run: Any, inputs: Arrays) -> Arrays:
        return memory.setdefault(key(inputs), run(inputs))

    return tamper


@defect("outputs of the first call with this shape are repeated")
def _(column: Column) -> Runner:
    right = column.candidate(subjects.adapter(column.subject, column.kind))
    return Tampered(right, repeating(lambda inputs: tuple(value.shape for value in inputs.values())))


@defect("right once, then without the adapter")
def _(column: Column) -> Runner:
    """The adapter object was garbage-collected while the session was in use."""
    right = column.candidate(subjects.adapter(column.subject, column.kind))
    wrong = column.candidate(subjects.change(subjects.adapter(column.subject, column.kind), {}, replaced={}, biases={}))
    calls = iter(range(1_000))
    return Tampered(right, lambda run, inputs: run(inputs) if next(calls) < 3 else wrong.run(inputs))


@defect("dropout active, p = 0.001, new on each call")
def _(column: Column) -> Runner:
    right = column.candidate(subjects.adapter(column.subject, column.kind))
    rng = np.random.default_rng(3)
    return Tampered(
        right,
        lambda run, inputs: {
            k: (v * (rng.random(v.shape) > 0.001) / 0.999).astype(v.dtype) for k, v in run(inputs).items()
        },
    )


# --- the graph and its files -----------------------------------------------------------------------


@defect("outdated external data")
def _(column: Column) -> Runner | None:
    """A graph beside the weights of an earlier adapter."""
    if column.mode not in ("merged", "nodes"):
        return None
    folders = []
    for seed in (0, 7):
        folder = subjects.new_folder()
        subjects.save_apart(column.graph(subjects.adapter(column.subject, column.kind, seed=seed)), folder)
        folders.append(folder)
    current, earlier = folders
    (current / "model.onnx.data").write_bytes((earlier / "model.onnx.data").read_bytes())
    return subjects.OnnxRunner(current / "model.onnx")


@defect("CPU instead of the requested provider")
def _(column: Column) -> Runner | None:
    if column.mode not in GRAPHS:
        return None
    runner: Any = column.candidate(subjects.adapter(column.subject, column.kind))
    ran = runner.placement
    runner.placement = Placement("CUDAExecutionProvider", ran.by_provider, ran.options, ran.version)
    return runner  # type: ignore[no-any-return]


@defect("adapter object released")
def _(column: Column) -> Runner | None:
    """onnxruntime then computes the base, without an error. In general it reads freed memory."""
    if column.mode != "inputs":
        return None
    runner: Any = column.candidate(subjects.adapter(column.subject, column.kind))
    runner._adapter, runner._run_options = None, onnxruntime.RunOptions()
    return runner  # type: ignore[no-any-return]


@defect("no adapter loaded")
def _(column: Column) -> Runner | None:
    if column.mode != "inputs":
        return None
    return column.candidate(subjects.change(subjects.adapter(column.subject, column.kind), {}))


@defect("`.onnx_adapter` without one layer's tensors")
def _(column: Column) -> Runner | None:
    return with_file(column, lambda tensors: dict(list(tensors.items())[2:]))


@defect("`.onnx_adapter` without one B")
def _(column: Column) -> Runner | None:
    return with_file(column, lambda tensors: {k: v for k, v in tensors.items() if k != list(tensors)[1]})


def with_file(column: Column, change: Callable[[Arrays], Arrays]) -> Runner | None:
    if column.mode != "inputs":
        return None
    from lora_export.formats import onnx_adapter

    write = onnx_adapter.write

    def write_part(path: Any, tensors: Any, contract: Any, **options: Any) -> None:
        write(path, change(dict(tensors)), contract, **options)

    onnx_adapter.write = write_part
    try:
        return column.candidate(subjects.adapter(column.subject, column.kind))
    finally:
        onnx_adapter.write = write


def with_ids(column: Column, ids: list[int]) -> Runner | None:
    if column.mode != "rows":
        return None
    runner: Any = column.candidate(subjects.adapter(column.subject, column.kind))
    return runner.with_rows(ids)  # type: ignore[no-any-return]


def of_graph(name: str, applies: Callable[[ir.Model], bool] = lambda _: True) -> Any:
    """Register a change of the graph's nodes."""

    def register(change: Callable[[ir.Model], None]) -> Any:
        def make(column: Column) -> Runner | None:
            if column.mode not in GRAPHS:
                return None
            adapter = subjects.adapter(column.subject, column.kind)
            if not applies(column.graph(adapter)):
                return None
            return column.candidate(adapter, graph=change)

        DEFECTS[name] = Defect(name, make)
        return change

    return register


def after(program: ir.Model, output: ir.Value, *chain: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    """Insert nodes between an output and the node that computes it."""
    value: ir.Value = output
    nodes = []
    for op_type, others, attributes in chain:
        inputs = [value, *(constant(program, other) for other in others)]
        nodes.append(ir.node(op_type, inputs, attributes=attributes or None))
        value = nodes[-1].outputs[0]
    position = list(program.graph.outputs).index(output)
    name, output.name = output.name, f"{output.name}_before"
    value.name, value.type, value.shape = name, output.type, output.shape
    program.graph.extend(nodes)
    program.graph.outputs[position] = value


def constant(program: ir.Model, array: Any) -> ir.Value:
    name = f"constant_{len(program.graph.initializers)}"
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    program.graph.register_initializer(value)
    return value


def float_outputs(program: ir.Model) -> Iterator[ir.Value]:
    yield from list(program.graph.outputs)


for _name, _change in {
    "another row's adapter id": lambda column: with_ids(column, [2]),
    "adapter id of the base": lambda column: with_ids(column, [0]),
    "right adapter id on the first row alone": lambda column: with_ids(column, [1, 0, 0, 0, 0]),
}.items():
    defect(_name)(_change)


@of_graph("Dropout in training mode")
def _(program: ir.Model) -> None:
    for output in float_outputs(program):
        after(program, output, ("Dropout", (np.float32(0.1), np.bool_(True)), {"seed": 5}))


@of_graph("Cast to fp16 and back at the end")
def _(program: ir.Model) -> None:
    half, single = ir.DataType.FLOAT16.value, ir.DataType.FLOAT.value
    for output in float_outputs(program):
        after(program, output, ("Cast", (), {"to": half}), ("Cast", (), {"to": single}))


@of_graph("fp16 overflow inside")
def _(program: ir.Model) -> None:
    half, single = ir.DataType.FLOAT16.value, ir.DataType.FLOAT.value
    times = np.float32(1e6)
    chain = (("Mul", (times,), {}), ("Cast", (), {"to": half}), ("Cast", (), {"to": single}), ("Div", (times,), {}))
    for output in float_outputs(program):
        after(program, output, *chain)


@of_graph("square root of negative values")
def _(program: ir.Model) -> None:
    for output in float_outputs(program):
        after(program, output, ("Sqrt", (), {}))


def approximated(program: ir.Model) -> list[ir.Node]:
    return [node for node in program.graph if node.op_type in ("Gelu", "Erf")]


@defect("GELU replaced by its tanh approximation")
def _(column: Column) -> Runner | None:
    adapter = subjects.adapter(column.subject, column.kind)
    if column.mode in GRAPHS:
        found = approximated(column.graph(adapter))
        return column.candidate(adapter, graph=approximate) if found else None
    merged = column.module(adapter)
    exact = [path for path, layer in merged.named_modules() if type(layer).__name__ == "GELUActivation"]
    return column.candidate(adapter, module=by_tanh) if exact and column.mode == "checkpoint" else None


def by_tanh(module: nn.Module) -> None:
    for path, layer in list(module.named_modules()):
        if type(layer).__name__ == "GELUActivation":
            module.set_submodule(path, nn.GELU(approximate="tanh"))


def approximate(program: ir.Model) -> None:
    for node in approximated(program):
        if node.op_type == "Gelu":
            node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
        else:  # erf(x) is about tanh(2/√π (x + 0.0895 x³))
            near(program, node)


def near(program: ir.Model, erf: ir.Node) -> None:
    (x,) = erf.inputs
    cube = ir.node("Pow", [x, constant(program, np.float32(3))])
    part = ir.node("Mul", [cube.outputs[0], constant(program, np.float32(0.08943))])
    inner = ir.node("Add", [x, part.outputs[0]])
    times = ir.node("Mul", [inner.outputs[0], constant(program, np.float32(2 / np.sqrt(np.pi)))])
    tanh = ir.node("Tanh", [times.outputs[0]])
    program.graph.insert_before(erf, [cube, part, inner, times, tanh])
    ir.convenience.replace_all_uses_with(erf.outputs[0], tanh.outputs[0])


def normalisations(program: ir.Model) -> list[ir.Node]:
    return [node for node in program.graph if node.op_type == "LayerNormalization"]


@of_graph("another epsilon in the layer norms", lambda program: bool(normalisations(program)))
def _(program: ir.Model) -> None:
    for node in normalisations(program):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
