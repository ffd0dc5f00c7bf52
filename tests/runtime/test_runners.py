"""Running modules and files, and saying what ran where."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.runtime import onnx_runner, runner, torch_runners

A_MATMUL = """
<ir_version: 8, opset_import: ["" : 17]>
twice (float[batch, 2] x) => (float[batch, 2] y) <float[2, 2] w = {2.0, 0.0, 0.0, 2.0}> { [product] y = MatMul (x, w) }
"""


@pytest.fixture
def a_graph(tmp_path: Path) -> Path:
    path = tmp_path / "twice.onnx"
    onnx.save(onnx.parser.parse_model(A_MATMUL), path)
    return path


class Casting(nn.Module):
    """Like Llama's norms: casts to fp32 inside, three ways."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.to(torch.float32) / 3
        b = x.float() / 7
        c = torch.softmax(x, dim=-1, dtype=torch.float32)
        return a + b + c + x.half() / 5 + x.bfloat16().to(torch.float16) / 9


class Parts(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"last": x, "layers": (x + 1, x + 2), "nothing": None}


def test_the_reference_lifts_casts_to_narrower_floats_and_no_operator_stays_behind() -> None:
    x = np.array([[0.1, 0.2, 0.7]])
    reference = torch_runners.Fp64Runner(Casting().double())
    result = reference.run({"x": x})["output_0"]
    softmax = np.exp(x) / np.exp(x).sum()
    np.testing.assert_allclose(result, x / 3 + x / 7 + x / 5 + x / 9 + softmax, rtol=1e-15)  # fp32: off by 1e-8
    assert reference.stayed == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_values_which_operators_stayed_in_less_than_fp64(dtype: torch.dtype) -> None:
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + ones.exp()

    ones = torch.ones(3, dtype=dtype)
    reference = torch_runners.Fp64Runner(Stubborn().double())
    reference.run({"x": np.zeros((1, 3))})
    assert any("exp" in operator for operator in reference.stayed)


def test_the_reference_computes_products_of_experts_in_fp64_though_pytorch_has_no_kernel() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return nn.functional.grouped_mm(x, self.weights, offs=ends)

    rows, ends = np.random.default_rng(0).normal(size=(5, 16)), np.array([2, 2, 5, 5], np.int32)  # two have no rows
    experts = Experts()
    with pytest.raises(RuntimeError, match="got Double"):
        experts.double()(torch.from_numpy(rows), torch.from_numpy(ends))
    reference = torch_runners.Fp64Runner(experts)
    answer = reference.run({"x": rows, "ends": ends})["output_0"]
    weights = experts.weights.detach().numpy()
    np.testing.assert_allclose(
        answer, np.concatenate([rows[:2] @ weights[0], rows[2:] @ weights[2]]), rtol=1e-14, atol=1e-14
    )
    assert reference.stayed == set()


def test_the_reference_leaves_the_default_dtype_as_it_was() -> None:
    torch_runners.Fp64Runner(nn.Identity().double()).run({"input": np.zeros((1, 3))})
    assert torch.get_default_dtype() == torch.float32


def test_outputs_keep_a_mappings_names_and_number_its_parts() -> None:
    runner = torch_runners.ModuleRunner(Parts())
    result = runner.run({"x": np.array([5.0], np.float32)})
    assert {name: value.tolist() for name, value in result.items()} == {
        "last": [5.0],
        "layers.0": [6.0],
        "layers.1": [7.0],
    }
    assert runner.names_known


def test_unnamed_outputs_are_numbered_and_known_to_be_unnamed() -> None:
    runner = torch_runners.ModuleRunner(nn.Identity())
    assert list(runner.run({"input": np.zeros((1, 2), np.float32)})) == ["output_0"]
    assert not runner.names_known


def test_a_module_in_bf16_answers_in_bf16() -> None:
    module = nn.Linear(2, 1, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
    answer = torch_runners.ModuleRunner(module).run({"input": np.array([[3.0, 4.0]], np.float32)})
    assert answer["output_0"].dtype == ml_dtypes.bfloat16
    assert answer["output_0"].astype(np.float32).tolist() == [[11.0]]


def test_a_module_without_tensors_in_its_answer_is_refused() -> None:
    class Mute(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "nothing"

    with pytest.raises(RuntimeRefused, match="returned str"):
        torch_runners.ModuleRunner(Mute()).run({"x": np.zeros(1, np.float32)})


def test_onnxruntime_runs_a_graph_and_proves_where(a_graph: Path) -> None:
    runner = onnx_runner.OnnxRunner(a_graph, "cpu")
    assert runner.run({"x": np.array([[1, 2]], np.float32)})["y"].tolist() == [[2, 4]]
    assert runner.axes == {"x": (None, 2)}
    assert runner.placement.by_provider == {"CPUExecutionProvider": (("product", "MatMul"),)}
    assert runner.placement.compute == 1
    runner.placement.insist()


def test_a_compute_node_elsewhere_is_named_and_ends_the_proof() -> None:
    placement = runner.Placement(
        requested_provider="CUDAExecutionProvider",
        by_provider={
            "CUDAExecutionProvider": (("/q/MatMul", "MatMul"),),
            "CPUExecutionProvider": (("/shape", "Shape"), ("/k/MatMul", "MatMul")),
        },
        options={},
        version="1",
    )
    assert placement.off_provider == (("CPUExecutionProvider", "/k/MatMul", "MatMul"),)
    with pytest.raises(EnvironmentLacking, match=r"1 of 2 compute nodes ran elsewhere: /k/MatMul"):
        placement.insist()


def test_cuda_that_is_not_there_is_never_a_cpu_result(a_graph: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the refusal cannot be seen here")
    with pytest.raises(EnvironmentLacking, match="CUDAExecutionProvider"):
        onnx_runner.OnnxRunner(a_graph, "cuda")


def test_inputs_that_the_graph_lost_are_named(a_graph: Path) -> None:
    runner = onnx_runner.OnnxRunner(a_graph)
    with pytest.raises(RuntimeRefused, match="the graph has no input mask"):
        runner.run({"x": np.zeros((1, 2), np.float32), "mask": np.zeros(1)})
    with pytest.raises(RuntimeRefused, match="the graph wants x"):
        runner.run({})


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"this is no graph")
    with pytest.raises(RuntimeRefused, match="onnxruntime refused"):
        onnx_runner.OnnxRunner(path)


def test_a_shape_that_the_graph_refuses_is_a_refusal_not_a_crash(a_graph: Path) -> None:
    with pytest.raises(RuntimeRefused, match="onnxruntime"):
        onnx_runner.OnnxRunner(a_graph).run({"x": np.zeros((1, 3), np.float32)})


def test_a_torchscript_file_takes_its_inputs_in_the_order_it_was_traced(tmp_path: Path) -> None:
    class Difference(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left - right

    script = torch.jit.trace(Difference(), (torch.ones(2), torch.ones(2)))
    torch.jit.save(script, tmp_path / "d.pt", _extra_files={"lora_export.json": '{"inputs": ["left", "right"]}'})
    runner = torch_runners.ScriptRunner(tmp_path / "d.pt", ["right", "left"])
    inputs = {"right": np.array([1, 1], np.float32), "left": np.array([5, 7], np.float32)}
    assert runner.run(inputs)["output_0"].tolist() == [4, 6]
    with pytest.raises(RuntimeRefused, match="right"):
        runner.run({"left": inputs["left"]})


def test_what_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(InputRefused, match="no TorchScript"):
        torch_runners.ScriptRunner(tmp_path / "noise.pt", [])


def test_a_provider_of_which_onnxruntime_tells_nothing_did_not_do_the_work() -> None:
    nothing = runner.Placement("CUDAExecutionProvider", {}, {}, "1")
    with pytest.raises(EnvironmentLacking, match="no node that ran on it"):
        nothing.insist()
    elsewhere = runner.Placement("CUDAExecutionProvider", {"CPUExecutionProvider": (("a", "Add"),)}, {}, "1")
    with pytest.raises(EnvironmentLacking, match="no node that ran on it"):
        elsewhere.insist()
    runner.Placement("CPUExecutionProvider", {}, {}, "1").insist()  # a graph of constants runs nothing
