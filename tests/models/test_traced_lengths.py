"""The lengths at which a model's code takes another branch, and graphs that know one of the two."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from lora_export.api.generate import generate
from lora_export.api.onnx import export_onnx
from lora_export.api.verify import verify
from lora_export.errors import Different, InputRefused
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.models.text_inputs import ONE_TOKEN
from lora_export.models.traced_lengths import with_traced_lengths
from lora_export.provenance import LONGEST_KEY
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import prove
from support.factories import Computed
from support.generators import BART_LIKE
from support.small_models import MODELS, TEXT

WIDE = TEXT | {"num_hidden_layers": 1, "max_position_embeddings": 256}


def big_bird(**fields: Any) -> Any:
    """Attends to blocks beyond (5 + 2 · 1) · 16 = 112 tokens."""
    config = transformers.BigBirdConfig(
        **WIDE, block_size=16, num_random_blocks=1, attention_type="block_sparse", **fields
    )
    return transformers.BigBirdModel(config)


def deepseek(topk: int = 24) -> Any:
    """Attends to 24 tokens. Scores of 0 are equal, and PyTorch and onnxruntime choose others of them."""
    config = transformers.DeepseekV32Config(
        **WIDE, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4,
        first_k_dense_replace=1, index_topk=topk, index_head_dim=8, index_n_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.DeepseekV32ForCausalLM(config)


def saved(module: Any, folder: Path) -> str:
    torch.manual_seed(0)
    module.save_pretrained(folder)
    return str(folder)


def of_deepseek(*marks: pytest.MarkDecorator) -> Any:
    is_old = Version(torch.__version__) < Version("2.12")
    skipped = pytest.mark.skipif(is_old, reason="PyTorch 2.11 records no comparison in this model")
    return pytest.param(deepseek, 23, 96, marks=[skipped, *marks])


@pytest.mark.parametrize(("make", "length", "long"), [(big_bird, 112, 144), of_deepseek()])
def test_the_length_at_which_code_changes_its_way_is_found(
    make: Any, length: int, long: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symbolic_shapes, "uninteresting_files", None)  # it imports more than a proof does
    model = with_traced_lengths(load_model(saved(make(), tmp_path)))
    assert model.traced["sequence"][1] == length
    assert max(sizes["sequence"] for sizes in model.further) == long
    assert with_traced_lengths(model) is model


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_that_compute_all_lengths_alike_have_none(name: str, tmp_path: Path) -> None:
    architecture, config = MODELS[name]
    made = config()
    made.max_position_embeddings = 256
    module = getattr(transformers, architecture)(made)
    model = load_model(saved(module, tmp_path))
    assert with_traced_lengths(model) is model


def test_too_long_a_way_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_export.models.traced_lengths.MOST_WORK", 0.0)
    model = with_traced_lengths(load_model(saved(big_bird(), tmp_path)))
    assert model.further == (ONE_TOKEN, {"sequence": 96})
    assert model.not_judged[-1].startswith(
        "texts of more than 112 tokens, which BigBirdModel computes in another way. Generated texts have up to 96"
    )


def test_long_texts_are_computed_alike_after_short_ones(tmp_path: Path, logged: list[logging.LogRecord]) -> None:
    model = load_model(saved(big_bird(), tmp_path))
    long, short = (
        {name: value.numpy() for name, value in model.inputs({"batch": 1, "sequence": size}, seed=1).items()}
        for size in (144, 7)
    )
    for runner in (ModuleRunner(model.module), Fp64Runner(model.module)):
        before = runner.run(long)
        runner.run(short)
        after = runner.run(long)
        assert all((before[name] == value).all() for name, value in after.items())
    assert model.module.attention_type == "block_sparse"
    assert not [text for record in logged if "attention type" in (text := record.getMessage())]


def verdict_of(path: Path, model: Model) -> parity.Verdict:
    return prove(OnnxRunner(path), PyTorchReferences(model)).verdict


@pytest.mark.parametrize(("make", "length", "long"), [(big_bird, 112, 144), of_deepseek(pytest.mark.slow)])
def test_a_graph_is_proven_up_to_the_length_it_states(make: Any, length: int, long: int, tmp_path: Path) -> None:
    base, path = saved(make(), tmp_path / "base"), tmp_path / "m.onnx"
    proof = export_onnx(base, path).proof
    assert proof is not None and any(f"up to {length}" in note for note in proof.verdict.notes)
    assert any(case.name.endswith(f"sequence {length}") for case in proof.cases)
    graph = onnx.load(path)
    properties = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(properties[LONGEST_KEY]) == {"sequence": length}
    del graph.metadata_props[list(properties).index(LONGEST_KEY)]
    onnx.save(graph, tmp_path / "other.onnx")
    other = verdict_of(tmp_path / "other.onnx", load_model(base))
    assert other.outcome is parity.Outcome.DIFFERENT
    assert f"batch 1 x sequence {long}" in {reason.case for reason in other.reasons}


@pytest.mark.slow
def test_graphs_of_an_encoder_decoder_state_their_length(tmp_path: Path) -> None:
    config = transformers.BigBirdPegasusConfig(
        **BART_LIKE, attention_type="block_sparse", block_size=8, num_random_blocks=1, max_position_embeddings=256,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    base = saved(transformers.BigBirdPegasusForConditionalGeneration(config), tmp_path / "base")
    proof = export_onnx(base, tmp_path / "served", with_cache=True).proof
    assert proof is not None and any("sequence sizes of up to 56" in note for note in proof.verdict.notes)
    assert generate(tmp_path / "served", [[3] * 56], max_new_tokens=2)
    with pytest.raises(InputRefused, match="up to 56 in sequence, and this run has 57"):
        generate(tmp_path / "served", [[3] * 57], max_new_tokens=2)


def own(function: Callable[[Tensor], Tensor]) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A layer, and a function of its outputs [batch, input_axis1, 4]."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), Computed(function)).eval(), {"input": torch.rand(2, 7, 4)}


def failing(x: Tensor) -> Tensor:
    if x.shape[1] > 100:
        raise ValueError("too long")
    return x


# Their branches, and the greatest sizes of each symbol for which a graph has the traced one.
BRANCHES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, int]]] = {
    "a length": (lambda x: x * 3 if x.shape[1] > 100 else x, {"input_axis1": 100}),
    "half a length": (lambda x: x * 3 if x.shape[1] // 2 > 50 else x, {"input_axis1": 101}),
    "rows": (lambda x: x * 3 if x.shape[0] > 9 else x, {"batch": 9}),
    "both": (
        lambda x: x * (2 if x.shape[0] > 9 else 1) * (3 if x.shape[1] > 20 else 1),
        {"batch": 9, "input_axis1": 20},
    ),
    "of two sizes": (lambda x: x * 3 if x.shape[1] > x.shape[0] else x, {}),
    "of the range of integers": (lambda x: x.contiguous() if x.numel() * 4 > 2**31 else x, {}),
    "none": (lambda x: x * 3, {}),
    "the larger of two": (lambda x: x * max(x.shape[1], 9), {}),
    "a length that is refused": (failing, {}),
    "of oneDNN": (lambda x: torch.nn.functional.conv1d(x.mT, torch.ones(4, 4, 3)), {}),
    "the first ones": (lambda x: x[:, :64], {}),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_graphs_of_own_modules_state_the_sizes_of_their_branch(name: str, tmp_path: Path) -> None:
    function, longest = BRANCHES[name]
    proof = export_onnx(own(function), tmp_path / "m.onnx").proof
    assert proof is not None
    assert OnnxRunner(tmp_path / "m.onnx").longest == longest
    noted = "computes in another way" in " ".join(proof.verdict.not_judged)
    assert not noted


def padded(x: Tensor) -> Tensor:
    missing = (8 - x.shape[1] % 8) % 8
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x


@pytest.mark.parametrize("function", [lambda x: x * 3 if x.shape[1] > 8 else x, padded])
def test_a_branch_within_the_usual_sizes_is_different(function: Any, tmp_path: Path) -> None:
    module, _ = own(function)
    with pytest.raises(Different):
        export_onnx((module, {"input": torch.rand(2, 8, 4)}), tmp_path / "m.onnx")


def test_a_graph_that_states_no_size_differs_beyond_it(tmp_path: Path) -> None:
    export_onnx(own(BRANCHES["a length"][0]), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    del graph.metadata_props[[entry.key for entry in graph.metadata_props].index(LONGEST_KEY)]
    onnx.save(graph, tmp_path / "other.onnx")
    verdict = verify(tmp_path / "other.onnx", model=own(BRANCHES["a length"][0])).proof.verdict
    assert {reason.case for reason in verdict.reasons} == {"batch 2 x input_axis1 101"}


@pytest.mark.parametrize(
    ("function", "work", "text"),
    [
        (
            lambda x: x * 3 if x.shape[1] < 5 else x,
            None,
            "sizes of input_axis1 below 5, which Sequential computes in another way",
        ),
        (BRANCHES["a length"][0], 0.0, "sizes of input_axis1 above 100, which Sequential"),
    ],
)
def test_sizes_that_no_case_has_are_not_judged(
    function: Any, work: float | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if work is not None:
        monkeypatch.setattr("lora_export.models.traced_lengths.MOST_WORK", work)
    proof = export_onnx(own(function), tmp_path / "m.onnx").proof
    assert proof is not None
    (found,) = proof.verdict.not_judged
    assert found.startswith(text)
    assert not OnnxRunner(tmp_path / "m.onnx").longest


def test_a_number_may_be_an_input(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale if x.shape[1] > 50 else x * scale * 2

    inputs = {"x": torch.rand(2, 7, 4), "scale": torch.tensor(0.5)}
    assert export_onnx((Scaled(), inputs), tmp_path / "m.onnx").proof
    assert OnnxRunner(tmp_path / "m.onnx").longest == {"x_axis1": 50}
