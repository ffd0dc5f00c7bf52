"""Every model × form of the adapter in the graph × kind of adapter, proven against PyTorch; README.md has the table.

PEFT writes the adapters, and computes what they mean; our own export makes the graphs. A proof is the
verdict that `onnx` and `verify` give, and it must not be fooled by an adapter that is wrong in one of its layers.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from lora_export import formats, layers, plan
from lora_export.api import onnx_from_model
from lora_export.api.onnx_request import OnnxRequest, check_adapters
from lora_export.errors import InputRefused, MatchError
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter
from lora_export.models import export
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.compare_outputs import bits_that_differ
from lora_export.verification.inputs.model_inputs import case_inputs
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import prove
from support import FACTORIES
from support.exported_models import eager
from support.exporters import VOCABULARY_SIZE, a_bert, a_gpt2, a_llama
from support.proofs import attached_copy, judge_mixed
from support.small_models import MODELS

pytestmark = pytest.mark.usefixtures("undiagnosed")

SPREAD = 0.15  # of A and B
slow = pytest.mark.slow


# --- models ---


def a_vit() -> nn.Module:
    architecture, config = MODELS["vit"]  # whose graph other tests need, too
    return getattr(transformers, architecture)(config())


def a_t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def a_mixtral() -> nn.Module:
    """A mixture of experts, whose attention is dense."""
    config = MixtralConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=40, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and what of it is adapted."""

    source: str | Callable[[], nn.Module]  # a factory of factories.py, or what is saved as a Hugging Face folder
    targets: Any = "all-linear"
    dora: Any = None  # targets of DoRA, where it cannot have the same
    replaced: tuple[str, ...] = ()  # modules that are trained whole, and replace the base's
    dtype: torch.dtype = torch.float32
    as_peft: bool = True  # PEFT computes what its adapter means

    @property
    def base(self) -> Model:
        return _base(self.source, self.dtype)

    @property
    def graph(self) -> ir.Model:
        """The export, without an adapter; a fresh copy."""
        return _graph(self.source, self.dtype).clone()


LAYERS = ["linear1", "linear2", "out_proj", "head"]
SUBJECTS: Mapping[str, Subject] = {
    "llama": Subject(a_llama),
    "gpt2": Subject(a_gpt2),
    "bert": Subject(a_bert),
    "bert, words": Subject(a_bert, ["word_embeddings", "query"]),
    "bert, half": Subject(a_bert, dtype=torch.float16, as_peft=False),
    "vit": Subject(a_vit),
    "vit, patches": Subject(a_vit, ["projection", "fc1"]),
    "vit, head": Subject(a_vit, ["fc1", "fc2"], replaced=("classifier",)),
    "t5": Subject(a_t5),
    "moe": Subject(a_mixtral, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "cnn": Subject("pictures", ["first", "second", "dense", "head"]),
    # PEFT doubles the change of MultiheadAttention's output, and has no DoRA for it.
    # `nn.TransformerEncoderLayer` reads its layers' weights itself, and never sees what PEFT puts beside them.
    "encoder": Subject("spotter", [*LAYERS[:2], "self_attn", "head"], dora=LAYERS, as_peft=False),
    "attention": Subject("reader", ["attn", "head"], dora=["out_proj", "head"], as_peft=False),
}


@functools.cache
def _base(source: str | Callable[[], nn.Module], dtype: torch.dtype) -> Model:
    if dtype is not torch.float32:
        loaded = _base(source, torch.float32)
        return replace(loaded, module=copy.deepcopy(loaded.module).to(dtype))
    if isinstance(source, str):
        return load_model(f"{FACTORIES}:{source}")
    torch.manual_seed(0)
    module, folder = source().eval(), Path(tempfile.mkdtemp())
    for weight in module.parameters():
        if weight.ndim > 1:  # as large as a trained model's: beside the initial 0.02 an adapter would be everything
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    module.save_pretrained(folder)
    return load_model(str(folder))


@functools.cache
def _graph(source: str | Callable[[], nn.Module], dtype: torch.dtype) -> ir.Model:
    base = _base(source, dtype)
    return export.to_onnx(base.module, base.example_inputs(), axes=base.axes)


# --- adapters ---

VARIANTS: Mapping[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 4},  # and one rank, one alpha of their own
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True},
}


@functools.cache
def trained(name: str, variant: str, seed: int = 0) -> tuple[Adapter, peft.PeftModel]:
    """An adapter as PEFT saves it, read again, and PEFT's own model with it."""
    subject = SUBJECTS[name]
    targets = (subject.dora if variant == "dora" else None) or subject.targets
    config = {"target_modules": targets, "modules_to_save": list(subject.replaced), **VARIANTS[variant]}
    if variant == "patterns":
        names = sorted(adapter_of(name, "lora").pairs)
        config |= {"rank_pattern": {names[0]: 5}, "alpha_pattern": {names[-1]: 3}}
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(copy.deepcopy(subject.base.module), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.normal_(std=SPREAD, generator=generator)
    folder = Path(tempfile.mkdtemp())
    adapted.save_pretrained(folder)
    return formats.load(folder), adapted


def adapter_of(name: str, variant: str, seed: int = 0) -> Adapter:
    return trained(name, variant, seed)[0]


def wrong_in_one_layer(name: str, variant: str) -> Adapter:
    """The adapter, but for a pair out of another training."""
    right, other = adapter_of(name, variant), adapter_of(name, variant, seed=1)
    last = list(right.pairs)[-1]
    return replace(right, pairs={**right.pairs, last: other.pairs[last]})


# --- graphs with adapters ---


@dataclass(frozen=True, eq=False)
class AdaptedGraph:
    """A graph with an adapter, as it runs."""

    on: OnnxRunner
    off: OnnxRunner | None = None  # the same graph without
    mixed: OnnxRunner | None = None  # with and without in one batch
    unchanged: bool = field(default=True)  # whether the base's weights have their bytes


def adapted_graph(mode: str, name: str, variant: str, folder: Path) -> AdaptedGraph:
    """As `lora-export onnx --lora MODE` does it."""
    base, graph, adapter = SUBJECTS[name].base, SUBJECTS[name].graph, adapter_of(name, variant)
    before = weights_of(graph)
    options = OnnxRequest(base, folder / "model.onnx", lora=mode, adapters=[adapter])
    check_adapters(options)
    onnx_from_model.check_fit(base, options, [])
    _, beside = onnx_from_model.write_with_adapters(graph, options, [], folder)
    after = weights_of(graph)
    runner = OnnxRunner(folder / "model.onnx", "cpu")
    unchanged = all(after[key] == value for key, value in before.items())
    if mode == "inputs":
        return AdaptedGraph(runner.with_adapter(folder / beside[0]), runner, unchanged=unchanged)
    if mode == "rows":
        return AdaptedGraph(runner.with_rows([1]), runner.with_rows([0]), runner.with_rows([1, 0]), unchanged)
    return AdaptedGraph(runner, unchanged=unchanged)


def weights_of(graph: ir.Model) -> dict[str, bytes]:
    tensors = {name: value.const_value for name, value in graph.graph.initializers.items()}
    return {name: tensor.tobytes() for name, tensor in tensors.items() if tensor is not None}


def saved(graph: ir.Model, folder: Path) -> OnnxRunner:
    save_graph(graph, folder, "model.onnx")
    return OnnxRunner(folder / "model.onnx", "cpu")


@functools.cache
def base_outputs(source: str | Callable[[], nn.Module], dtype: torch.dtype, *, optimise: bool) -> dict[str, Arrays]:
    """The outputs of the base's graph, by case."""
    runner = saved(_graph(source, dtype).clone(), Path(tempfile.mkdtemp()))
    return outputs_of(_base(source, dtype), runner if optimise else OnnxRunner(runner.path, optimise=False))


def outputs_of(base: Model, runner: OnnxRunner) -> dict[str, Arrays]:
    return {case: runner.run(arrays) for case, arrays in case_inputs(base, runner).items()}


def node_adds_the_bias(name: str, variant: str) -> bool:
    """Whether a Gemm or Conv adds the bias of a layer that the adapter changes."""
    found = find_sites(SUBJECTS[name].graph).by_name
    read = [site.node for module in adapter_of(name, variant).pairs for site in found[f"{module}.weight"]]
    return any(node.op_type in ("Gemm", "Conv") and len(node.inputs) == 3 for node in read)


def is_fused_with_a_norm(name: str, variant: str) -> bool:
    """Whether onnxruntime folds a batch norm into a layer that the adapter changes: not with a branch in between."""
    found = find_sites(SUBJECTS[name].graph).by_name
    weights = [f"{module}.{end}" for module in adapter_of(name, variant).pairs for end in ("weight", "in_proj_weight")]
    read = [site.node for weight in weights for site in found.get(weight, ())]
    behind = [user.op_type for node in read for user, _ in node.outputs[0].uses()]
    return "BatchNormalization" in behind


# --- combinations ---

MODES = ("merged", "nodes", "inputs", "rows")
# What runs with every `make test`: each mode and each variant, on graphs that are quickly made.
QUICK = {("vit", "lora"), ("cnn", "dora"), ("attention", "patterns")}
DIAGNOSED = ("attention", "merged")  # where the wrong layer is named, too
ADAPTED = [
    pytest.param(name, variant, marks=[] if (name, variant) in QUICK else slow)
    for name in SUBJECTS
    for variant in VARIANTS
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "variant"), ADAPTED)
def test_combination_is_proven_or_refused_by_name(
    name: str, mode: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, base, adapter = SUBJECTS[name], SUBJECTS[name].base, adapter_of(name, variant)
    if subject.replaced and mode == "inputs":
        with pytest.raises(InputRefused, match=f"{subject.replaced[0]}.weight: a whole tensor"):
            adapted_graph(mode, name, variant, tmp_path)
        return
    graph = adapted_graph(mode, name, variant, tmp_path)
    proof = prove(graph.on, PyTorchReferences(base, [adapter]))
    assert proof.verdict.same, str(proof.verdict)
    if (name, mode) == DIAGNOSED:
        monkeypatch.undo()  # `undiagnosed`
    wrong = prove(graph.on, PyTorchReferences(base, [wrong_in_one_layer(name, variant)]))
    assert not wrong.verdict.same
    if (name, mode) == DIAGNOSED:
        assert wrong.diagnosis is not None and wrong.diagnosis.first == list(adapter.pairs)[-1]
    assert graph.unchanged == (mode == "rows" or (mode != "merged" and not subject.replaced))
    if graph.off is None:
        return
    # DoRA's factor comes before the bias, which the node then no longer adds: the last bit may differ.
    if variant != "dora" or not node_adds_the_bias(name, variant):
        check_bits_of_the_base(name, variant, graph.off)
    off = prove(graph.off, PyTorchReferences(base))
    # In half precision so small a model cannot be distinguished from itself x 1.01, the only control here.
    is_too_coarse = subject.dtype is torch.float16 and off.verdict.outcome is Outcome.UNDECIDED
    assert off.verdict.same or is_too_coarse, str(off.verdict)
    if graph.mixed is not None:
        mixed = judge_mixed(graph.mixed, [off, proof], [1, 0])
        assert mixed.verdict.same, str(mixed.verdict)
        assert not judge_mixed(graph.mixed, [proof, off], [1, 0]).verdict.same


def check_bits_of_the_base(name: str, variant: str, off: OnnxRunner) -> None:
    """Assert that the graph without its adapter returns the bits of the base; unoptimised, where fusions differ."""
    subject, optimise = SUBJECTS[name], not is_fused_with_a_norm(name, variant)
    if not optimise:
        ids = off.adapter_ids
        off = OnnxRunner(off.path, optimise=False)
        off = off if ids is None else off.with_rows(ids)
    expected = base_outputs(subject.source, subject.dtype, optimise=optimise)
    assert not bits_that_differ(expected, outputs_of(subject.base, off))


@pytest.mark.parametrize(("name", "variant"), [each for each in ADAPTED if SUBJECTS[str(each.values[0])].as_peft])
def test_reference_computes_what_peft_computes(name: str, variant: str) -> None:
    base = SUBJECTS[name].base
    adapter, theirs = trained(name, variant)
    feeds = base.example_inputs()
    ours, expected, without = (eager(one, feeds) for one in (attached_copy(base, [adapter]), theirs, base.module))
    for key, value in expected.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())
        assert np.abs(value - without[key]).max() > 0.02 * np.abs(value).max()


class Reader(nn.Module):
    """Attention of one signal to another."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, signal: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.attn(signal, memory, memory, need_weights=False)[0]


@slow
def test_cross_attention_refuses_adapters_on_its_packed_weight() -> None:
    examples = {"signal": torch.randn(2, 7, 16), "memory": torch.randn(2, 5, 16)}
    graph = export.to_onnx(Reader().eval(), examples, axes={"signal": {0: "batch"}, "memory": {0: "batch"}})
    adapter = layers.create_adapter(Reader(), targets=["attn"], rank=2, alpha=2, seed=0, name="a")
    with pytest.raises(MatchError, match=r"attn\.in_proj_weight \(48, 16\) is not the weight of a linear layer"):
        plan.make([adapter], find_sites(graph).specs, identity_ok=True)
