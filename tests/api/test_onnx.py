"""`lora_export.export_onnx`: what `lora-export onnx` does, as one call with a result."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from torch import nn

import lora_export as le
from lora_export.api import onnx_steps
from lora_export.errors import Different, InputRefused, WrongUsage
from lora_export.runtime.onnx_runner import OnnxRunner
from support import factories
from support.api import MODEL, A, B, Recorder, an_adapter
from support.handmade import add_tensors
from support.peft_models import fill
from support.slow import slow
from support.tied import WORDS, untied_llama

INPUTS = {
    "rows": np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 3, 8),
    "weights": np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(2, 3),
}


def hidden(path: Path, runner: OnnxRunner | None = None) -> np.ndarray:
    return next(iter((runner or OnnxRunner(path, "cpu")).run(INPUTS).values()))


def expected(module: nn.Module, scale: float = 1.0) -> np.ndarray:
    """tanh((W + s·BA) x + b) times the weights, by NumPy in fp64."""
    weight, bias = (value.detach().numpy().astype(np.float64) for value in (module.dense.weight, module.dense.bias))
    return np.tanh(INPUTS["rows"] @ (weight + scale * B @ A).T + bias) * INPUTS["weights"][..., None]


@pytest.mark.parametrize("lora", ["merged", "nodes"])
def test_a_proven_graph_computes_the_adapted_layer(
    tmp_path: Path, lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Recorder()
    adapter = an_adapter(tmp_path / "adapter")
    result = le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=adapter, lora=lora, **seen.callbacks)
    assert result.files == (tmp_path / "m.onnx",)
    assert result.proof is not None and result.proof.verdict.same
    np.testing.assert_allclose(hidden(result.output), expected(le.load_model(MODEL).module), atol=1e-5)
    assert seen.stages[0] == "loading the model" and any(stage.startswith("verifying") for stage in seen.stages)
    assert capsys.readouterr().out == ""


def test_swapped_adapters_are_files_with_a_proof_each(tmp_path: Path) -> None:
    sources = [f"fr={an_adapter(tmp_path / 'a')}", f"de={an_adapter(tmp_path / 'b', scale=-2.0)}"]
    result = le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=sources, lora="inputs")
    assert [path.name for path in result.files] == ["m.onnx", "fr.onnx_adapter", "de.onnx_adapter"]
    assert result.proofs is not None and list(result.proofs.adapters) == ["fr", "de"]
    assert all(proof.verdict.same for proof in result.proofs.adapters.values())
    module, runner = le.load_model(MODEL).module, OnnxRunner(result.output, "cpu")
    np.testing.assert_allclose(hidden(result.output, runner), expected(module, 0.0), atol=1e-5)
    with_de = runner.with_adapter(tmp_path / "de.onnx_adapter")
    np.testing.assert_allclose(hidden(result.output, with_de), expected(module, -2.0), atol=1e-5)


def test_a_module_in_memory_is_exported(tmp_path: Path) -> None:
    module, examples = factories.scaled()
    adapter = le.load_adapter(an_adapter(tmp_path / "adapter"))
    result = le.export_onnx((module, examples), tmp_path / "m.onnx", adapters=adapter)
    np.testing.assert_allclose(hidden(result.output), expected(module), atol=1e-5)


class Timed(nn.Module):
    """One layer, and a scalar that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dense(x) * step, step + 1


def test_an_input_without_an_axis_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.rand(2, 8), "step": torch.tensor(3.0)}
    result = le.export_onnx((Timed().eval(), inputs), tmp_path / "m.onnx", adapters=an_adapter(tmp_path / "adapter"))
    assert result.proof is not None and result.proof.verdict.same


def test_threads_export_one_after_the_other(tmp_path: Path) -> None:
    adapter = le.load_adapter(an_adapter(tmp_path / "adapter"))
    before = [sys.stdout, sys.stderr, torch.Tensor.reshape, torch.fft.irfft, nn.Module.__setattr__]

    models = {name: factories.scaled() for name in ("one", "other", "alone")}  # here: threads share the random numbers

    def exported(name: str) -> Path:
        return le.export_onnx(models[name], tmp_path / f"{name}.onnx", adapters=adapter).output

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(exported, ["one", "other"])
    assert one.read_bytes() == other.read_bytes() == exported("alone").read_bytes()
    assert [sys.stdout, sys.stderr, torch.Tensor.reshape, torch.fft.irfft, nn.Module.__setattr__] == before


class Words(nn.Module):
    """A table of words, tied to the head."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.words(ids)))


WORD_IDS = torch.arange(6).reshape(2, 3)


def trained_on_words(folder: Path, **config: object) -> peft.PeftModel:
    base = Words(tied=not config.pop("apart", False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("lora", ["merged", "nodes"])
def test_a_saved_head_is_untied_in_a_graph(tmp_path: Path, lora: str) -> None:
    model = trained_on_words(tmp_path / "adapter", target_modules=["inner"], modules_to_save=["head"])
    seen = Recorder()
    source = (Words(), WORD_IDS)
    result = le.export_onnx(source, tmp_path / "m.onnx", adapters=tmp_path / "adapter", lora=lora, **seen.callbacks)
    assert result.proof is not None and result.proof.verdict.same
    (output,) = OnnxRunner(result.output, "cpu").run({"ids": WORD_IDS.numpy()}).values()
    np.testing.assert_allclose(output, model(WORD_IDS).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert "note: head.weight is tied to another tensor in the model, and a tensor of its own here" in seen.messages
    assert source[0].head.weight is source[0].words.weight


@pytest.mark.parametrize("lora", ["merged", "nodes", slow("inputs"), "rows"])
@pytest.mark.parametrize("changed", [False, True])
def test_the_table_that_peft_saves_beside_its_pair_is_compared(tmp_path: Path, lora: str, changed: bool) -> None:
    model = trained_on_words(tmp_path / "adapter", target_modules=["words"], apart=True)
    table = Words().words.weight.detach().numpy() + np.float32(changed)
    add_tensors(tmp_path / "adapter", {"base_model.model.words.base_layer.weight": table})
    with torch.no_grad():
        model.base_model.model.words.base_layer.weight += float(changed)
    source = (Words(tied=False), WORD_IDS)
    if changed and lora in ("inputs", "rows"):
        with pytest.raises(InputRefused, match=r"these tensors would differ from the base's:\n.*words\.weight"):
            le.export_onnx(source, tmp_path / "m.onnx", adapters=tmp_path / "adapter", lora=lora)
        return
    result = le.export_onnx(source, tmp_path / "m.onnx", adapters=tmp_path / "adapter", lora=lora)
    runner, feeds = OnnxRunner(result.output, "cpu"), {"ids": WORD_IDS.numpy()}
    runner = runner.with_adapter(tmp_path / "adapter.onnx_adapter") if lora == "inputs" else runner
    feeds |= {"adapter_ids": np.array([1, 1])} if lora == "rows" else {}
    (output,) = runner.run(feeds).values()
    np.testing.assert_allclose(output, model(WORD_IDS).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_without_verification_there_is_no_proof(tmp_path: Path) -> None:
    result = le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=an_adapter(tmp_path / "adapter"), verify=False)
    assert result.proofs is None and result.proof is None and result.output.is_file()


def test_a_wrong_graph_raises_with_its_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_steps.insert_nodes
    monkeypatch.setattr(
        onnx_steps, "insert_nodes", lambda program, sites, plan, **more: right(program, sites, doubled(plan), **more)
    )
    with pytest.raises(Different, match="different") as refused:
        le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=an_adapter(tmp_path / "adapter"), lora="nodes")
    assert refused.value.proof.verdict.outcome == "different"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def doubled(plan: le.Plan) -> le.Plan:
    """The plan with every adapter twice as strong."""
    from dataclasses import replace

    steps = [
        replace(step, terms=tuple(replace(term, strength=2 * term.strength) for term in step.terms))
        for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": "rows"}, 'lora="rows" needs the adapters'),
        ({"lora": "inputs"}, 'lora="inputs" needs an adapter'),
        ({"target": "all-linear"}, 'target= is for lora="inputs"'),
        ({"dora": True}, 'dora= is for lora="inputs"'),
        ({"names": "genai"}, 'names= is for lora="inputs"'),
        ({"checkpoint": "x"}, "checkpoint= is for an .onnx MODEL"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.export_onnx(MODEL, tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_proof_that_is_left_out_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    le.export_onnx(MODEL, tmp_path / "m.onnx", verify=False, timeout=9, memory=9, on_message=said.append)
    assert "note: no effect without a proof (verify=False): timeout= and memory=" in said
    said.clear()
    le.export_onnx(MODEL, tmp_path / "n.onnx", timeout=90, on_message=said.append)
    assert not any("no effect" in each or "bfloat16" in each for each in said)
    le.export_onnx(MODEL, tmp_path / "b.onnx", verify=False, dtype="bfloat16", on_message=said.append)
    assert "note: onnxruntime's CPU provider has no kernels for bfloat16: it does not load the graph" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse": "cpu"}, "fuse= is for decoders alone, not for image-text-to-text"),
        ({"lora": "nodes", "strength_input": True}, "strength_input= is not for image-text-to-text"),
        ({"lora": "inputs", "target": "all-linear"}, "target= is not for image-text-to-text"),
        ({"lora": "rows"}, 'lora="rows" is not for image-text-to-text'),
        ({"lora": "slots"}, 'lora="slots" is not for image-text-to-text'),
    ],
)
def test_options_of_texts_alone_name_their_task(tmp_path: Path, options: dict[str, object], message: str) -> None:
    given = {"adapters": an_adapter(tmp_path / "adapter"), "with_cache": True, **options}
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(WrongUsage, match=f'^{re.escape(message)}[^\\n]*. Its texts alone: task="text-generation"$'):
        le.export_onnx(tmp_path, tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# --- An adapter that acts from its invocation tokens on ---


@pytest.fixture(scope="module")
def activated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, `base`; PEFT's adapter of it, `alora`; and the proven graph of both, `nodes.onnx`."""
    folder = tmp_path_factory.mktemp("activated")
    module = untied_llama(folder / "base").model
    fields = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(module, peft.LoraConfig(**fields, alora_invocation_tokens=[7, 8, 9]))
    fill(model, "lora_", std=0.4)
    model.save_pretrained(folder / "alora")
    result = le.export_onnx(folder / "base", folder / "nodes.onnx", adapters=folder / "alora", lora="nodes")
    assert result.proof is not None and result.proof.verdict.same
    return folder


def with_tokens(folder: Path, tokens: list[int] | None, to: Path) -> Path:
    """The adapter with other invocation tokens."""
    shutil.copytree(folder / "alora", to)
    config = json.loads((to / "adapter_config.json").read_text()) | {"alora_invocation_tokens": tokens}
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


def test_an_activated_lora_computes_what_peft_computes(activated: Path) -> None:
    ids = np.random.default_rng(0).integers(10, WORDS, (4, 20))
    ids[0, 3:6], ids[1, 2:5], ids[1, 11:14], ids[2, 5:7] = (7, 8, 9), (7, 8, 9), (7, 8, 9), (7, 8)
    base = transformers.AutoModelForCausalLM.from_pretrained(activated / "base").eval()
    before, model = copy.deepcopy(base), peft.PeftModel.from_pretrained(base, activated / "alora").eval()
    with torch.no_grad():
        expected, plain = (one(input_ids=torch.from_numpy(ids)).logits.numpy() for one in (model, before))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = OnnxRunner(activated / "nodes.onnx", "cpu").run(inputs)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    changes = np.abs(found - plain).max(-1) > 1e-2
    assert changes[:2].argmax(1).tolist() == [3, 11] and not changes[2:].any()


@pytest.mark.parametrize("tokens", [slow(None), slow([7, 8]), [8, 9], [7, 8, 10]], ids=str)
def test_a_graph_that_acts_on_other_tokens_is_different(activated: Path, tokens: list[int] | None, tmp_path) -> None:
    other = with_tokens(activated, tokens, tmp_path / "other")
    graph = le.export_onnx(activated / "base", tmp_path / "m.onnx", adapters=other, lora="nodes", verify=False).output
    verdict = le.verify(graph, model=activated / "base", adapters=activated / "alora").verdict
    assert verdict.outcome == "different"


def test_a_graph_that_acts_from_the_first_occurrence_on_is_different(activated: Path, tmp_path: Path) -> None:
    graph = onnx.load(activated / "nodes.onnx")
    (last,) = (node for node in graph.graph.node if node.op_type == "Equal" and "CumSum" in node.input[0])
    (some,) = (node for node in graph.graph.node if node.op_type == "Greater" and "Gather" in node.input[0])
    last.op_type, last.input[1] = "Greater", some.input[1]
    onnx.save(graph, tmp_path / "m.onnx")
    verdict = le.verify(tmp_path / "m.onnx", model=activated / "base", adapters=activated / "alora").verdict
    assert verdict.outcome == "different"


def test_a_graph_needs_the_model_for_the_proof_of_an_activated_lora(activated: Path, tmp_path: Path) -> None:
    base, adapter = activated / "base", activated / "alora"
    plain = le.export_onnx(base, tmp_path / "base.onnx", verify=False).output
    with pytest.raises(InputRefused, match="a graph alone cannot be the reference of an activated LoRA"):
        le.export_onnx(plain, tmp_path / "m.onnx", adapters=adapter, lora="nodes")
    result = le.export_onnx(plain, tmp_path / "m.onnx", adapters=adapter, lora="nodes", reference=base)
    assert result.proof is not None and result.proof.verdict.same


def test_an_activated_lora_is_refused_where_it_would_act_on_all_tokens(activated: Path, tmp_path: Path) -> None:
    base, adapter, out = activated / "base", activated / "alora", tmp_path / "out"
    other = with_tokens(activated, [5], tmp_path / "other")
    read = le.inspect(adapter).adapter
    assert read is not None and read.invocation_tokens == (7, 8, 9)
    doors: list[Callable[[], object]] = [
        *(functools.partial(le.export_onnx, base, out, adapters=one, lora="merged") for one in (adapter, read)),
        *(functools.partial(le.export_onnx, base, out, adapters=one, lora="rows") for one in (adapter, read)),
        *(functools.partial(le.merge, base, one, out) for one in (adapter, read)),
        functools.partial(le.export_torchscript, base, out, adapters=adapter),
        functools.partial(le.convert, adapter, out, to="mlx"),
        functools.partial(le.combine, [adapter, adapter], out),
        functools.partial(le.resize, adapter, out, rank=2),
        functools.partial(le.verify, base, base=base, adapters=read),
        functools.partial(le.load_adapter, adapter),
    ]
    for door in doors:
        with pytest.raises(InputRefused, match=r"is an activated LoRA \(alora_invocation_tokens\)"):
            door()
    with pytest.raises(InputRefused, match="an activated LoRA needs whole texts"):
        le.export_onnx(base, out, adapters=adapter, lora="nodes", with_cache=True)
    with pytest.raises(InputRefused, match="acts on some tokens only"):
        le.export_onnx(base, out, adapters=[adapter, other], lora="nodes", combination="svd")
    assert not out.exists()
