"""Private names of PyTorch and transformers: an upgrade that removes one fails here, with its name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_export.errors import EnvironmentLacking
from lora_export.models import internals

FUSIONS = "transformers.exporters.onnxruntime_fusions"
NAMES = [
    ("torch", "_grouped_mm"),
    ("torch", "_C", "DisableTorchFunctionSubclass"),
    ("torch", "_C", "PyTorchFileReader"),
    ("torch", "_C", "_jit_get_all_schemas"),
    ("torch._dynamo.exc", "TorchDynamoException"),
    ("torch.utils._python_dispatch", "TorchDispatchMode"),
    ("torch.utils._pytree", "tree_map"),
    ("transformers", "PreTrainedModel", "_is_stateful"),
    (FUSIONS, "_STEPS"),
    (FUSIONS, "_fuse_group_query_attention"),
]
OF_OBJECTS = [
    (nn.Linear(1, 1), ("_parameters", "_buffers", "_modules")),
    (torch.zeros(1), ("_version",)),
    (torch.ops.aten.lstm.input, ("_schema", "_dispatch_cache")),
]


@pytest.mark.parametrize("names", NAMES, ids=".".join)
def test_a_private_name_exists(names: tuple[str, ...]) -> None:
    assert internals.private(*names) is not None


@pytest.mark.parametrize(("owner", "names"), OF_OBJECTS, ids=["module", "tensor", "operator"])
def test_a_private_attribute_exists(owner: object, names: tuple[str, ...]) -> None:
    assert [name for name in names if not hasattr(owner, name)] == []


def test_a_name_that_is_gone_is_named_with_the_release() -> None:
    with pytest.raises(EnvironmentLacking) as refused:
        internals.private("torch", "_C", "_gone")
    assert str(refused.value) == f"torch {torch.__version__} has no torch._C._gone, which is needed"


def test_changes_in_place_are_counted() -> None:
    tensor = torch.zeros(2)
    before = internals.changes_of(tensor)
    tensor.add_(1)
    assert internals.changes_of(tensor) == before + 1


def test_one_fusion_of_the_cpu_makes_attention_over_a_cache() -> None:
    of_cpu = list(internals.fusions_for("cpu"))
    assert sum(is_attention for _, is_attention in of_cpu) == 1
    assert all(callable(step) for step, _ in of_cpu) and len(of_cpu) > 5
    assert not any(is_attention for _, is_attention in internals.fusions_for("no provider"))
