"""Exported modules compute what the module computes, at other shapes than the traced ones."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import RuntimeRefused
from lora_export.models import export, export_program
from lora_export.models.export import simplify, to_onnx
from lora_export.models.model import Axes
from support.exported_models import EVERY_MODEL, MODEL_BUILDERS, Encoder, Mlp, eager, exported, inputs
from support.graphs import run

pytestmark = pytest.mark.exports
OTHER_SHAPES = [(1, 5), (3, 12), (5, 2)]


class Linear(nn.Module):
    """x W^T + b, W = [[1, 2], [3, 4]], b = [0, 0]; the other modules here add one fault each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


def axes_of(*names: str) -> Axes:
    return {name: {0: "batch"} for name in names}


def ones(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.ones(*shape)}


# --- ONNX ---


@EVERY_MODEL
def test_an_exported_graph_computes_other_shapes_as_the_module_does(name: str) -> None:
    made = exported(name)
    for batch, length in OTHER_SHAPES:
        feeds = inputs(name, batch, length, seed=1)
        expected = eager(made.module, feeds)
        outputs = run(made.graph, **{key: value.numpy() for key, value in feeds.items()})
        assert list(outputs) == list(expected)
        for output, value in expected.items():
            np.testing.assert_allclose(outputs[output], value, rtol=1e-5, atol=1e-6)


@EVERY_MODEL
def test_only_the_listed_axes_vary_under_the_users_names(name: str) -> None:
    made = exported(name)
    for value in made.graph.graph.inputs:
        assert value.shape is not None
        sizes = {axis: size.value for axis, size in enumerate(value.shape) if not isinstance(size, int)}
        assert sizes == made.axes[value.name]
    for output in made.graph.graph.outputs:
        assert output.shape is not None
        assert str(output.shape[0]) == "batch"


@EVERY_MODEL
def test_every_parameter_is_an_initializer_with_its_values(name: str) -> None:
    made = exported(name)
    initializers = made.graph.graph.initializers
    for parameter, tensor in made.module.named_parameters():
        names = [parameter] if parameter in initializers else ["lm_head.weight"]  # tied: one of its two names
        value = initializers[names[0]].const_value.numpy()
        assert np.array_equal(value, tensor.detach()) or np.array_equal(value.T, tensor.detach())


@EVERY_MODEL
def test_every_node_has_its_own_name(name: str) -> None:
    names = [node.name for node in exported(name).graph.graph.all_nodes()]
    assert all(names)
    assert len(set(names)) == len(names)


def test_weights_are_stored_as_a_matmul_reads_them() -> None:
    graph = exported("bert").graph.graph
    weights = {value for value in graph.initializers.values() if value.name.endswith("dense.weight")}
    assert weights
    assert all(node.op_type in ("MatMul", "Gemm") for value in weights for node, _ in value.uses())


def test_zero_biases_and_batch_norms_are_not_folded_away() -> None:
    graph = exported("mlp").graph.graph
    assert [node.op_type for node in graph] == ["Gemm", "BatchNormalization", "Relu", "Gemm"]
    assert not graph.initializers["down.bias"].const_value.numpy().any()


def test_the_modules_mode_is_restored_and_dropout_is_not_exported() -> None:
    module = nn.Sequential(Linear(), nn.Dropout(), nn.Dropout()).train()
    module[2].eval()
    model = export.to_onnx(module, {"input": torch.ones(2, 2)}, axes=axes_of("input"))
    assert [part.training for part in module] == [True, True, False]
    assert module.training
    assert [node.op_type for node in model.graph] == ["Gemm"]


def test_the_opset_is_the_requested_one() -> None:
    model = export.to_onnx(Linear(), ones(2, 2), axes=axes_of("x"), opset=18)
    assert model.opset_imports[""] == 18
    assert np.array_equal(run(model, x=np.ones((3, 2), np.float32))["output_0"], [[3, 7]] * 3)


def test_an_unknown_opset_is_refused() -> None:
    with pytest.raises(RuntimeRefused, match=r"opset|version"):
        export.to_onnx(Linear(), ones(2, 2), axes=axes_of("x"), opset=99)


def test_bfloat16_weights_stay_bfloat16() -> None:
    module = nn.Sequential(nn.Linear(2, 3)).to(torch.bfloat16)
    model = export.to_onnx(module, {"input": torch.ones(2, 4, 2, dtype=torch.bfloat16)}, axes=axes_of("input"))
    weight = model.graph.initializers["0.weight"]
    assert weight.dtype is ir.DataType.BFLOAT16
    assert np.array_equal(weight.const_value.numpy().T.astype(np.float32), module[0].weight.float().detach())


def test_outputs_are_named_by_keys_and_positions() -> None:
    class Several(Linear):
        def forward(self, x: Tensor) -> Any:
            y = self.linear(x)
            return {"last": y, "layers": (y + 1, y + 2), "nothing": None}

    model = export.to_onnx(Several(), ones(2, 2), axes=axes_of("x"))
    outputs = run(model, x=np.ones((1, 2), np.float32))
    assert {name: value.tolist() for name, value in outputs.items()} == {
        "last": [[3, 7]], "layers.0": [[4, 8]], "layers.1": [[5, 9]],
    }  # fmt: skip


def test_nothing_is_printed_warned_or_logged(
    capfd: pytest.CaptureFixture[str], logged: list[logging.LogRecord]
) -> None:
    class Noisy(Linear):
        def forward(self, x: Tensor) -> Any:
            print("to stdout")
            print("to stderr", file=sys.stderr)
            warnings.warn("a warning", stacklevel=1)
            logging.getLogger("torch.onnx").error("an error")
            return self.linear(x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export.to_onnx(Noisy(), ones(2, 2), axes=axes_of("x"))
        export_program.to_torchscript(Noisy(), ones(2, 2))
    assert capfd.readouterr() == ("", "")
    assert not caught
    assert not [record for record in logged if record.levelno >= logging.WARNING]
    assert logging.root.manager.disable == logging.NOTSET


# --- refusals ---


class Recurrent(nn.Module):
    """Outputs at every step, of an LSTM or a GRU."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_network_is_exported_a_second_time_in_one_process(kind: type[nn.RNNBase]) -> None:
    module, axes = Recurrent(kind), {"x": {0: "batch", 1: "steps"}}
    for _ in range(2):
        graph = export.to_onnx(module, {"x": torch.ones(2, 5, 3)}, axes=axes)
    x = torch.randn(3, 9, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(run(graph, x=x.numpy())["output_0"], expected, rtol=0, atol=1e-6)


def test_a_branch_on_values_is_refused_with_its_line() -> None:
    class Branching(Linear):
        def forward(self, x: Tensor) -> Any:
            if x.sum() > 0:
                x = x + 1
            return self.linear(x)

    with pytest.raises(RuntimeRefused, match=r"refused Branching: .*test_export\.py.*`if x.sum\(\) > 0:`"):
        export.to_onnx(Branching(), ones(2, 2), axes=axes_of("x"))


def test_an_operator_missing_in_onnx_is_refused_by_name() -> None:
    class Eigen(Linear):
        def forward(self, x: Tensor) -> Any:
            return torch.linalg.eigvals(self.linear(x)).abs()

    with pytest.raises(RuntimeRefused, match="linalg_eig"):
        export.to_onnx(Eigen(), ones(2, 2, 2), axes=axes_of("x"))


def test_a_failing_module_is_reported_as_such() -> None:
    with pytest.raises(RuntimeRefused, match=r"Linear itself fails on the example inputs \(x\): .*shapes"):
        export.to_onnx(Linear(), ones(2, 3), axes=axes_of("x"))


def test_an_unused_input_is_refused_by_name() -> None:
    class Ignoring(Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.linear(x)

    with pytest.raises(RuntimeRefused, match="does not use the input mask"):
        export.to_onnx(Ignoring(), ones(2, 2) | {"mask": torch.ones(2)}, axes=axes_of("x", "mask"))


def test_inputs_keep_their_upper_case_letters() -> None:
    class Letters(Linear):
        def forward(self, X: Tensor, x: Tensor, pixelValues: Tensor) -> Any:  # noqa: N803 - names that users choose
            return self.linear(X) - 2 * self.linear(x) + pixelValues

    feeds = {name: torch.full((2, 2), value) for name, value in [("X", 1.0), ("x", 3.0), ("pixelValues", 7.0)]}
    graph = export.to_onnx(Letters(), feeds, axes=axes_of(*feeds))
    assert [value.name for value in graph.graph.inputs] == ["X", "x", "pixelValues"]
    (output,) = run(graph, **{name: value.numpy() for name, value in feeds.items()}).values()
    assert output.tolist() == [[3 - 2 * 9 + 7, 7 - 2 * 21 + 7]] * 2


def test_an_input_with_the_name_of_a_weight_is_refused() -> None:
    class Scaled(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, scale: Tensor) -> Any:
            return self.linear(scale) * self.scale

    with pytest.raises(
        RuntimeRefused, match=r"inputs and tensors of one name: scale\. .*Rename the parameters of forwa"
    ):
        export.to_onnx(Scaled(), {"scale": torch.ones(2, 2)}, axes=axes_of("scale"))


def test_an_axis_fixed_by_the_code_is_refused() -> None:
    class Unrolled(Linear):
        def forward(self, x: Tensor) -> Any:
            return torch.stack([self.linear(row) for row in x])

    with pytest.raises(RuntimeRefused, match=r"static shape of 3 .*'x'.*shape\[0\]"):
        export.to_onnx(Unrolled(), ones(3, 2), axes=axes_of("x"))


def test_tied_axes_under_two_names_are_refused() -> None:
    class Square(Linear):
        def forward(self, x: Tensor) -> Any:
            return self.linear(x + x.transpose(0, 1))

    with pytest.raises(RuntimeRefused, match=r"`rows`.*`columns`|`columns`.*`rows`"):
        export.to_onnx(Square(), {"x": torch.ones(3, 3, 2)}, axes={"x": {0: "rows", 1: "columns"}})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"x": {1: "width"}}, r"axis 1 .* input x .* has size 1"),
        ({"x": {2: "depth"}}, r"x has the shape \(3, 1\); it has no axis 2"),
        ({"y": {0: "batch"}}, r"name an input y; the example inputs are x, z"),
        ({"x": {0: "batch"}, "z": {0: "batch"}}, r"`batch` is 3 .* and 2 on axis 0 of z"),
    ],
)
def test_axes_that_do_not_fit_the_example_inputs_are_refused(axes: Axes, message: str) -> None:
    with pytest.raises(RuntimeRefused, match=message):
        export.to_onnx(Linear(), {"x": torch.ones(3, 1), "z": torch.ones(2, 2)}, axes=axes)


# --- TorchScript ---


@EVERY_MODEL
def test_a_traced_module_takes_other_shapes_by_name_and_position(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODEL_BUILDERS[name]().eval()
    export_program.save_torchscript(
        export_program.to_torchscript(module, inputs(name)), tmp_path / "model.pt", extra={}
    )
    script = torch.jit.load(tmp_path / "model.pt")
    for batch, length in OTHER_SHAPES:
        feeds = inputs(name, batch, length, seed=1)
        expected = eager(module, feeds)
        assert {key: value.shape for key, value in eager(script, feeds).items()} == {
            key: value.shape for key, value in expected.items()
        }
        with torch.no_grad():
            by_position = script(*feeds.values())
        for key, value in expected.items():
            np.testing.assert_allclose(eager(script, feeds)[key], value, rtol=1e-5, atol=1e-6)
            output = by_position[key] if isinstance(by_position, dict) else by_position
            np.testing.assert_allclose(output, value, rtol=1e-5, atol=1e-6)


def test_a_trace_has_no_fused_attention_and_no_gradients() -> None:
    module = Encoder().train()
    script = export_program.to_torchscript(module, inputs("encoder"))
    assert "_transformer_encoder_layer_fwd" not in str(script.inlined_graph)
    assert not [name for name, parameter in script.named_parameters() if parameter.requires_grad]
    assert not script.training
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_cannot_be_traced_is_refused() -> None:
    class Wordy(Linear):
        def forward(self, x: Tensor) -> Any:
            return {"scores": self.linear(x), "words": "none"}

    with pytest.raises(RuntimeRefused, match="refused Wordy"):
        export_program.to_torchscript(Wordy(), ones(2, 2))


def test_a_saved_trace_has_extra_files_and_no_paths(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    export_program.save_torchscript(
        export_program.to_torchscript(Mlp(), inputs("mlp")), path, extra={"lora_export.json": '{"a": 1}'}
    )
    extra = {"lora_export.json": ""}
    torch.jit.load(path, _extra_files=extra)
    assert extra["lora_export.json"] == b'{"a": 1}'
    assert list(tmp_path.iterdir()) == [path]
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name) for name in archive.namelist()]
    assert not [text for text in texts if b"site-packages" in text or b"graphs.py" in text]


# Within the optimiser's tolerances of 0 and 1
TINY, NEARLY_ONE = 1e-8, 1 + 2.0**-17


class Norm(nn.Module):
    """x / sqrt(mean(x * x) + 1e-8): zeros where x is 0. Helium and others have such a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + TINY)


class NearlyOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * NEARLY_ONE / NEARLY_ONE * NEARLY_ONE + 0 - TINY


def graph_of(module: nn.Module) -> ir.Model:
    return export.to_onnx(module, {"x": torch.ones(2, 3)}, axes={"x": {0: "batch"}})


def test_a_number_that_is_nearly_zero_is_not_dropped() -> None:
    outputs = run(graph_of(Norm()), x=np.array([[0, 0, 0], [1e-4, -1e-4, 1e-4]], np.float32))["output_0"]
    assert not outputs[0].any()
    np.testing.assert_allclose(np.abs(outputs[1]), 2**-0.5, rtol=1e-5)


def test_a_number_that_is_nearly_one_is_not_dropped() -> None:
    graph = graph_of(NearlyOne())
    assert [node.op_type for node in graph.graph] == ["Mul", "Div", "Mul", "Sub"]  # the + 0 is gone
    assert [float(value.const_value.numpy()) for value in graph.graph.initializers.values()] == [
        np.float32(NEARLY_ONE),
        np.float32(TINY),
    ]  # each once
    assert run(graph, x=np.ones((1, 3), np.float32))["output_0"][0, 0] == np.float32(NEARLY_ONE)


@pytest.mark.parametrize("number", [TINY, 0.0])
def test_numbers_in_functions_are_seen(number: float) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        graph (float[2] x) => (float[2] y) {{ y = local.shift (x) }}
        <domain: "local", opset_import: ["" : 20]>
        shift (x) => (y) {{ c = Constant <value = float {{{number}}}> ()  y = Add (x, c) }}
    """
    model = ir.from_onnx_text(text)
    simplify(model)
    assert not model.functions
    assert [node.op_type for node in model.graph] == (["Add"] if number else ["Identity"])


def test_the_optimiser_still_drops_what_is_hidden_from_it() -> None:
    """When onnxscript no longer does it, this file's `_hidden_numbers` can go."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[2] x) => (float[2] y) { c = Constant <value = float {1e-8}> ()  y = Add (x, c) }
    """
    model = ir.from_onnx_text(text)
    onnxscript.optimizer.optimize_ir(model)
    assert "Add" not in [node.op_type for node in model.graph]


class Squeezed(nn.Module):
    """Squeezes an axis of one element, and one that has more."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x.squeeze(1)).squeeze(1).squeeze(-2)


def test_axis_that_pytorch_does_not_squeeze_stays() -> None:
    module, x = Squeezed().eval(), torch.randn(2, 1, 3, 4)
    graph = export.to_onnx(module, {"x": x}, axes=axes_of("x"))
    other = torch.randn(5, 1, 3, 4)
    with torch.no_grad():
        expected = module(other)
    assert expected.shape == (5, 3, 4)
    np.testing.assert_allclose(run(graph, x=other.numpy())["output_0"], expected, rtol=1e-5, atol=1e-6)


READ_ONCE = {  # what a context exchanges while PyTorch exports
    "torch.onnx._internal._lazy_import": "onnxscript_apis.get_torchlib_ops",
    "torch.onnx._internal.exporter._schemas": "op_signature_from_function",
    "onnx_ir.schemas": "OpSignature.from_op_schema",
    "torch._export.utils": "_materialize_cpp_cia_ops",
    "torch.onnx._internal.fx.passes.type_promotion": "_TypePromotionInterpreter.run_node",
}


def test_an_export_looks_up_once_what_is_the_same_for_all() -> None:
    def current() -> list[Any]:
        found = []
        for name, path in READ_ONCE.items():
            value: Any = functools.reduce(getattr, path.split("."), importlib.import_module(name))
            found.append(getattr(value, "__func__", value))  # of a class method, which is bound anew each time
        return found

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(current())
            return super().forward(x)

    before, seen = current(), list[list[Any]]()
    to_onnx(Looks(2, 2).eval(), {"x": torch.ones(2, 2)}, axes={})
    assert [one is other for one, other in zip(before, seen[-1], strict=True)] == [False] * len(READ_ONCE)
    assert current() == before
