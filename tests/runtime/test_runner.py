"""The record of where a graph's nodes ran."""

from __future__ import annotations

import pytest

from lora_export.errors import EnvironmentLacking
from lora_export.runtime.environment_probes import CPU, CUDA
from lora_export.runtime.runner import Placement


def test_compute_node_on_another_provider_is_named_and_raises() -> None:
    placement = Placement(
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
        placement.require_provider()


@pytest.mark.parametrize(
    "operator", ["QMoE", "MoE", "ConvInteger", "MatMulBnb4", "PagedAttention", "GroupNormalization", "GatedRMSNorm"]
)
def test_what_computes_by_another_name_must_run_there_too(operator: str) -> None:
    nodes = {CUDA: (("a", "Add"),), CPU: (("b", operator), ("c", "StringNormalizer"), ("d", "Shape"))}
    with pytest.raises(EnvironmentLacking, match=rf"1 of 1 compute nodes ran elsewhere: b \({operator}\)"):
        Placement(CUDA, nodes, {}, "1").require_provider()


def test_provider_without_any_node_raises() -> None:
    nothing = Placement("CUDAExecutionProvider", {}, {}, "1")
    with pytest.raises(EnvironmentLacking, match="reports no node that ran on it"):
        nothing.require_provider()
    elsewhere = Placement("CUDAExecutionProvider", {"CPUExecutionProvider": (("a", "Add"),)}, {}, "1")
    with pytest.raises(EnvironmentLacking, match="reports no node that ran on it"):
        elsewhere.require_provider()
    Placement("CPUExecutionProvider", {}, {}, "1").require_provider()  # a graph of constants runs nothing
