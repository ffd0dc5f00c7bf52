"""Models are exported without their cache, outputs have names, and failures name their cause."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models import export, export_program
from lora_export.models.export import to_onnx
from lora_export.models.export_program import to_program
from lora_export.models.load import from_module, load_model
from lora_export.models.tracing import (
    cache_setting,
    disable_cache,
    exporter_refusals,
    have_names,
    named_failures,
    named_outputs,
    with_dictionaries,
)
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from support.graphs import run
from support.small_models import small_model

pytestmark = pytest.mark.exports

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def encoder_decoder() -> Any:
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**TEXT), transformers.BertConfig(**TEXT)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


@pytest.mark.slow
@pytest.mark.parametrize("build", [qwen2_vl, encoder_decoder])
def test_a_nested_configs_cache_is_no_output(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert model.module(**model.example_inputs()).get("past_key_values") is None
    if model.text_only is not None:  # the exporter refuses the images of Qwen2-VL
        model = model.without_images("this test is about the cache")
    inputs = model.example_inputs()
    graph = export.to_onnx(model.module, inputs, axes=model.axes).graph
    assert [output.name for output in graph.outputs] == list(named_outputs(model.module(**inputs)))


@pytest.mark.slow
def test_a_model_from_a_factory_gets_its_cache_back() -> None:
    torch.manual_seed(0)
    module = qwen2_vl().eval()
    ids = {"input_ids": torch.randint(0, 80, (2, 5))}
    graph = export.to_onnx(module, ids, axes={"input_ids": {0: "batch", 1: "sequence"}}).graph
    assert [output.name for output in graph.outputs] == ["logits"]
    assert module(**ids).past_key_values is not None


def test_every_nested_config_is_restored() -> None:
    module = encoder_decoder()
    assert module.decoder.config.use_cache
    with cache_setting(module, to=False):
        assert not module.decoder.config.use_cache and not module.config.decoder.use_cache
    assert module.decoder.config.use_cache


def test_a_config_is_changed_at_every_depth() -> None:
    config = transformers.Qwen2VLConfig(text_config=dict(TEXT))
    disable_cache(config)
    assert not config.text_config.use_cache
    assert not hasattr(config, "use_cache") or not config.use_cache


def test_the_message_names_model_inputs_and_innermost_cause() -> None:
    with (
        pytest.raises(RuntimeRefused, match=r"^Linear itself fails on the inputs \(x, y\): 7 of 8$"),
        named_failures(nn.Linear(1, 1), ["x", "y"]),
    ):
        raise KeyError("outer") from ValueError("7 of 8\n\nmore")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        InputRefused("an input of ours"),
    ],
)
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, named_failures(nn.Linear(1, 1), ["x"]):
        raise error
    assert raised.value is error


def test_runners_name_the_model_that_fails() -> None:
    x = {"input": torch.ones(2, 3).numpy()}
    runners = {r"input \[2, 3\]": ModuleRunner(nn.Linear(4, 4)), "input": Fp64Runner(nn.Linear(4, 4).double())}
    for given, runner in runners.items():
        with pytest.raises(RuntimeRefused, match=rf"^Linear itself fails on the inputs \({given}\): .*mat1 and mat2"):
            runner.run(x)


def test_hooks_that_a_model_adds_at_a_run_are_not_added_again(tmp_path: Path) -> None:
    """A SegFormer's head gets the hidden states that hooks collect."""
    model = load_model(str(small_model("segformer", tmp_path)))
    inputs = {name: value.numpy() for name, value in model.example_inputs().items()}
    for runner in (ModuleRunner(model.module), Fp64Runner(model.module)):
        first, second = (runner.run(inputs) for _ in range(2))
        assert all((first[name] == value).all() for name, value in second.items())
    assert not [path for path, part in model.module.named_modules() if part._forward_hooks]


class Rotation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), Rotation()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_an_operator_that_onnx_lacks_is_named_with_its_module_and_line() -> None:
    with pytest.raises(RuntimeRefused) as caught:
        to_onnx(Stack().eval(), {"x": torch.ones(4, 4)}, axes={})
    first, remedy = str(caught.value).splitlines()
    assert first.startswith(
        "the exporter refused Stack: ONNX has no operator for aten._linalg_svd (in the module parts.1;"
    )
    line = Rotation.forward.__code__.co_firstlineno + 1
    assert f"test_tracing.py, line {line}, in forward: `return torch.linalg.svdvals(x)`)" in first
    assert remedy.startswith("Compute it there with operators that ONNX has")


class Unexported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return {}[0] if torch.compiler.is_exporting() else x


def test_a_line_is_named_of_which_pytorch_has_none() -> None:
    with pytest.raises(RuntimeRefused) as caught:
        to_onnx(Unexported().eval(), {"x": torch.ones(4, 4)}, axes={})
    line = Unexported.forward.__code__.co_firstlineno + 1
    assert f"refused Unexported: 0 (test_tracing.py, line {line}, in forward: `return " in str(caught.value)


class OfHalf(nn.Linear):
    """As BART's encoder looks for overflow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            x = x.clamp(-1, 1)
        return super().forward(x)


class TooLarge(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if (x.abs() > torch.finfo(torch.float16).max).any():
            x = x.clamp(-1, 1)
        return super().forward(x)


def test_another_precision_is_a_way_out_of_a_line_for_float16() -> None:
    with pytest.raises(RuntimeRefused, match=r"in forward: `if .*`") as caught:
        to_onnx(OfHalf(4, 4).half().eval(), {"x": torch.ones(4, 4, dtype=torch.float16)}, axes={})
    assert 'Where that line is about float16 alone, export in dtype="float32". Change that line' in str(caught.value)
    to_onnx(OfHalf(4, 4).eval(), {"x": torch.ones(4, 4)}, axes={})
    with pytest.raises(RuntimeRefused, match=r"in forward: `if .*float16.*`") as caught:
        to_onnx(TooLarge(4, 4).eval(), {"x": torch.ones(4, 4)}, axes={})
    assert "float32" not in str(caught.value)


class OfTwo(nn.Linear):
    """It has a batch of two."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if len(x) == 2 else y


class Contrary(OfTwo):
    """It raises no AttributeError for what it lacks."""

    def __getattr__(self, name: str) -> Any:
        if name == "shape_env":
            raise KeyError(name)
        return super().__getattr__(name)


@pytest.mark.parametrize(("export", "kind"), [(to_onnx, OfTwo), (to_program, OfTwo), (to_onnx, Contrary)])
def test_a_fixed_size_is_named_with_its_line(export: Callable[..., Any], kind: type[nn.Linear]) -> None:
    line = OfTwo.forward.__code__.co_firstlineno + 2
    why = rf"\(test_tracing\.py, line {line}, in forward: `return 2 \* y if len\(x\) == 2 else y`\)\nChange that line"
    with pytest.raises(RuntimeRefused, match=why):
        export(kind(4, 4).eval(), {"x": torch.ones(2, 4)}, axes={"x": {0: "batch"}})


def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(RuntimeRefused, match="ScriptModule"):
        to_onnx(torch.jit.script(nn.Linear(2, 2)).eval(), {"input": torch.ones(2, 2)}, axes={})


def test_other_refusals_have_their_cause_and_a_way_out() -> None:
    cause = ValueError("no such thing\n\nand much more")
    with pytest.raises(RuntimeRefused) as caught, exporter_refusals(nn.Linear(1, 1)):
        raise RuntimeError("wrapped") from cause
    first, remedy = str(caught.value).splitlines()
    assert first == "the exporter refused Linear: no such thing"
    assert "a graph cannot contain Python code that depends on values" in remedy
    assert caught.value.__cause__ is not None and caught.value.__cause__.__cause__ is cause


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(x.shape[0] // 2, 0)


def test_an_operator_whose_arguments_onnx_lacks_is_named_with_its_line() -> None:
    with pytest.raises(RuntimeRefused) as caught:
        to_onnx(Shifted().eval(), {"x": torch.ones(4, 4)}, axes={"x": {0: "rows"}})
    first, remedy = str(caught.value).splitlines()
    line = Shifted.forward.__code__.co_firstlineno + 1
    assert first.endswith(f"(test_tracing.py, line {line}, in forward: `return x.roll(x.shape[0] // 2, 0)`)")
    assert remedy.startswith("Compute it there with operators that ONNX has")


def test_a_missing_operator_without_a_node_has_no_place() -> None:
    message = "No ONNX function found for <OpOverload(op='aten.strange', overload='default')>."
    with (
        pytest.raises(RuntimeRefused, match=r"refused Linear: ONNX has no operator for aten\.strange\n"),
        exporter_refusals(nn.Linear(1, 1)),
    ):
        raise RuntimeError(message)


ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (ONE, ["output_0"]),
        ((ONE, None, TWO), ["output_0", "output_2"]),
        ({"logits": ONE, "loss": None, "states": (TWO, TWO)}, ["logits", "states.0", "states.1"]),
        ([{"a": ONE}], ["output_0.a"]),
    ],
)
def test_outputs_are_named_by_keys_or_positions(outputs: object, names: list[str]) -> None:
    assert list(named_outputs(outputs)) == names
    assert have_names(named_outputs(outputs)) is (names[0] == "logits")


def test_outputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(RuntimeRefused, match="the model returned dict, which contains no tensors"):
        named_outputs({"loss": None})


@dataclass
class Scores:
    scores: Tensor
    is_large: Tensor
    rest: tuple[Tensor, ...] | None = None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 2.0) -> Any:
        scores = self.linear(x) * scale
        return Scores(scores, scores > 0)


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x), [Scores(x, x > 0, rest=(x + 1,))]


class Mapped(Net):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(y=self.linear(x))


X = torch.tensor([[1.0, 2, 3], [-4, 5, -6]])


def test_a_dataclass_is_a_graph_of_its_fields() -> None:
    model = from_module(Net(), X)
    graph = export.to_onnx(model.module, {"x": X}, axes=model.axes)
    outputs = run(graph, x=X.numpy()[:1])
    expected = Net.forward(model.module, X[:1])
    torch.testing.assert_close(torch.tensor(outputs["scores"]), expected.scores)
    assert outputs["is_large"].tolist() == expected.is_large.tolist()


def test_a_traced_module_returns_the_fields_by_name() -> None:
    script = export_program.to_torchscript(from_module(Net(), X).module, {"x": X})
    assert set(script(X)) == {"scores", "is_large"}


def test_copies_return_dictionaries_and_keep_the_signature() -> None:
    module = with_dictionaries(Net(), {"x": X})
    assert type(module).__name__ == "Net" and isinstance(module, Net)
    assert list(inspect.signature(module.forward).parameters) == ["x", "scale"]
    assert set(copy.deepcopy(module)(X, scale=1.0)) == {"scores", "is_large"}
    assert isinstance(Net()(X), Scores)  # other modules of the class do not change


def test_dataclasses_inside_tuples_are_dictionaries() -> None:
    outputs = with_dictionaries(Pair(), {"x": X})(X)
    assert set(outputs[1][0]) == {"scores", "is_large", "rest"} and outputs[1][0]["rest"][0].equal(X + 1)


def test_other_modules_are_left_as_they_are() -> None:
    for module, inputs in ((Mapped(), {"x": X}), (Net(), {"x": torch.ones(2, 9)}), (nn.Linear(3, 2), {"input": X})):
        assert type(with_dictionaries(module, inputs)) in (Mapped, Net, nn.Linear)
