"""Private names of PyTorch and transformers: an upgrade that removes one fails here, with its name."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import sys
from typing import Any

import onnx
import pytest
import torch
from onnx_ir.schemas import OpSignature
from onnxscript.rewriter.rules.common import _basic_rules
from torch import Tensor, nn

from lora_export.errors import EnvironmentLacking
from lora_export.layers import torch_internals
from lora_export.layers.torch_internals import (
    exchange_class,
    exchange_forward,
    own_buffers,
    own_modules,
    own_parameters,
    subclass,
    unsaved_buffers,
)


def test_parameters_buffers_and_children_are_those_of_the_module_itself() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.ones(2), persistent=False)
    module.add_module("child", nn.Linear(2, 2))
    assert own_parameters(module)["weight"] is module.weight and set(own_parameters(module)) == {"weight", "bias"}
    assert set(own_buffers(module)) == {"running_mean", "running_var", "num_batches_tracked", "mask"}
    assert own_modules(module) == {"child": module.child} and unsaved_buffers(module) == {"mask"}
    own_parameters(module)["weight"] = own_buffers(module)["mask"] = None
    unsaved_buffers(module).clear()
    assert module.weight is None and module.mask is None and "mask" not in dict(module.named_buffers())


def test_results_are_plain_without_the_rules_of_a_subclass() -> None:
    class Own(torch.Tensor):
        pass

    tensor = torch.ones(2).as_subclass(Own)
    assert type(tensor.detach()) is Own
    with torch_internals.without_subclass_rules():
        assert type(tensor.detach()) is torch.Tensor


def test_reshaped_values_are_no_view() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    reshaped = torch_internals.reshaped_alone(x * 2, [3, 2])
    assert reshaped.shape == (3, 2) and not reshaped._is_view() and (x * 2).view(3, 2)._is_view()


PROMOTION = "torch.onnx._internal.fx.passes.type_promotion"
FUSIONS = "transformers.exporters.onnxruntime_fusions"
NAMES = [
    ("torch", "_grouped_mm"),
    ("torch", "_C", "DisableTorchFunctionSubclass"),
    ("torch", "ops", "mkldnn", "_linear_pointwise"),
    ("torch", "_C", "PyTorchFileReader"),
    ("torch", "_C", "_jit_get_all_schemas"),
    ("torch._dynamo.exc", "TorchDynamoException"),
    ("torch.utils._python_dispatch", "TorchDispatchMode"),
    ("torch.onnx._internal._lazy_import", "onnxscript_apis", "get_torchlib_ops"),
    ("torch.onnx._internal.exporter._schemas", "op_signature_from_function"),
    ("torch._C", "_dispatch_get_registrations_for_dispatch_key"),
    ("torch._export.utils", "_materialize_cpp_cia_ops"),
    (PROMOTION, "get_type_promotion_rule"),
    (PROMOTION, "_TypePromotionInterpreter", "run_node"),
    (PROMOTION, "_TypePromotionInterpreter", "_maybe_promote_node"),
    (PROMOTION, "_TypePromotionInterpreter", "_set_current_node"),
    ("torch.utils._pytree", "tree_map"),
    ("transformers.exporters.utils", "import_dotted_path"),
    ("transformers", "PreTrainedConfig", "_experts_implementation"),
    ("transformers", "PreTrainedModel", "_is_stateful"),
    ("transformers.conversion_mapping", "_MODEL_TO_CONVERSION_PATTERN"),  # which PEFT reads: a note is about it
    ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLTextModel", "_deepstack_process"),
    (FUSIONS, "_STEPS"),
    (FUSIONS, "_fuse_group_query_attention"),
]
OF_OBJECTS = [
    (nn.Linear(1, 1), ("_parameters", "_buffers", "_modules")),
    (torch.zeros(1), ("_version",)),
    (torch.ops.aten.lstm.input, ("_schema", "_dispatch_cache")),
    (_basic_rules.basic_optimization_rules().rules[0], ("_target_pattern",)),
]


@pytest.mark.parametrize("names", NAMES, ids=".".join)
def test_a_private_name_exists(names: tuple[str, ...]) -> None:
    assert torch_internals.private(*names) is not None


@pytest.mark.parametrize(("owner", "names"), OF_OBJECTS, ids=["module", "tensor", "operator", "rule"])
def test_a_private_attribute_exists(owner: object, names: tuple[str, ...]) -> None:
    assert [name for name in names if not hasattr(owner, name)] == []


def test_a_name_that_is_gone_is_named_with_the_release() -> None:
    with pytest.raises(EnvironmentLacking) as refused:
        torch_internals.private("torch", "_C", "_gone")
    assert str(refused.value) == f"torch {torch.__version__} has no torch._C._gone, which is needed"


def test_changes_in_place_are_counted() -> None:
    tensor = torch.zeros(2)
    before = torch_internals.changes_of(tensor)
    tensor.add_(1)
    assert torch_internals.changes_of(tensor) == before + 1


def test_a_rule_is_tried_where_its_pattern_can_end() -> None:
    possible = [
        (name, operator)
        for rule in _basic_rules.basic_optimization_rules()
        for operator in ("Cast", "Transpose", "Add")
        if (name := str(rule)) in ("CastCast", "TransposeTranspose") and torch_internals.can_match(rule, operator)
    ]
    assert possible == [("CastCast", "Cast"), ("TransposeTranspose", "Transpose")]


def test_only_models_that_are_loaded_are_prepared_for_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = importlib.import_module("transformers.exporters.utils")
    monkeypatch.setattr(utils, "import_dotted_path", lambda path, missing_ok=False: path)
    monkeypatch.setitem(sys.modules, "transformers.models.own.modeling_own", sys)
    loaded, idle = "transformers.models.own.modeling_own.Own", "transformers.models.idle.modeling_idle.Idle"
    with torch_internals.loaded_models_alone():
        found = utils.import_dotted_path
        assert [found(loaded, True), found("torch.Tensor", True), found(idle, True)] == [loaded, "torch.Tensor", None]
        assert found(idle) == idle  # an error, where it is missing
    assert utils.import_dotted_path(idle, True) == idle


def test_the_functions_of_onnxscript_are_read_once() -> None:
    apis = torch_internals.private("torch.onnx._internal._lazy_import", "onnxscript_apis")
    with torch_internals.functions_read_once():
        first = apis.get_torchlib_ops()
        assert apis.get_torchlib_ops() is first
    with torch_internals.functions_read_once():
        assert apis.get_torchlib_ops() is first
    outside = apis.get_torchlib_ops()
    assert outside is not first and len(outside) == len(first) > 400


def test_a_signature_is_made_once() -> None:
    registry = torch_internals.private("torch.onnx._internal.exporter._registration", "ONNXRegistry")
    old, new = (onnx.defs.get_schema("Relu", version) for version in (13, 14))
    with torch_internals.functions_read_once(), torch_internals.signatures_made_once():
        first, second = (registry.from_torchlib().functions["aten::relu"][0].signature for _ in range(2))
        assert second is first
        assert OpSignature.from_op_schema(old) is OpSignature.from_op_schema(old)
        assert (OpSignature.from_op_schema(old).since_version, OpSignature.from_op_schema(new).since_version) == (
            13,
            14,
        )
    with torch_internals.functions_read_once():
        outside = registry.from_torchlib().functions["aten::relu"][0].signature
    assert outside is not first and str(outside) == str(first)
    assert OpSignature.from_op_schema(old) is not OpSignature.from_op_schema(old)


def test_composite_operators_are_looked_up_where_one_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = importlib.import_module("torch._export.utils")
    calls: list[None] = []
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", lambda: calls.append(None))
    with torch_internals.composites_looked_up_once(), torch.library._scoped_library("of_this_test", "DEF") as library:
        for expected in (1, 1):
            utils._materialize_cpp_cia_ops()
            assert len(calls) == expected
        library.define("doubled(Tensor x) -> Tensor")
        library.impl("doubled", lambda x: x * 2, "CompositeImplicitAutograd")
        utils._materialize_cpp_cia_ops()
    assert len(calls) == 2


class Promoting(nn.Module):
    def forward(self, x: Tensor, half: Tensor, numbers: Tensor) -> list[Tensor]:
        positive = x > 0
        several = [x + half, x * positive, numbers + x, numbers / 2, numbers**0.5, positive.sum(), positive + numbers]
        return [*several, torch.where(positive, x, numbers), torch.where(positive, half, 1.5), half * 2, x.mean(0)]


def test_casts_are_found_without_running_the_operators_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    run = torch.fx.Interpreter.call_function
    monkeypatch.setattr(torch.fx.Interpreter, "call_function", lambda *args: ran.append(args[1]) or run(*args))
    inputs = torch.rand(2, 3), torch.rand(2, 3).half(), torch.randint(1, 5, (2, 3))
    graphs = []
    for context in (contextlib.nullcontext(), torch_internals.types_promoted_as_traced()):
        ran.clear()
        with context:
            program = torch.onnx.export(Promoting().eval(), inputs, dynamo=True, optimize=False, verbose=False)
        nodes = [(node.op_type, [str(value.dtype) for value in node.outputs]) for node in program.model.graph]
        graphs.append((nodes, len(ran)))
    (expected, all_run), (found, run_again) = graphs
    assert found == expected and sum(name == "Cast" for name, _ in found) > 8
    assert 0 < run_again < all_run


def test_one_fusion_of_the_cpu_makes_attention_over_a_cache() -> None:
    of_cpu = list(torch_internals.fusions_for("cpu"))
    assert sum(is_attention for _, is_attention in of_cpu) == 1
    assert all(callable(step) for step, _ in of_cpu) and len(of_cpu) > 5
    assert not any(is_attention for _, is_attention in torch_internals.fusions_for("no provider"))


def test_copies_compute_with_the_new_forward_until_the_class_comes_back() -> None:
    module, x = nn.Linear(2, 1), torch.ones(1, 2)
    weight, own = module.weight, module(x)

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, input) + self.shift

    exchange_forward(module, forward, shift=2)
    assert isinstance(module, nn.Linear) and module.weight is weight and list(module.state_dict()) == ["weight", "bias"]
    assert (type(module).__name__, type(module).__module__) == ("Linear", nn.Linear.__module__)
    assert list(inspect.signature(module.forward).parameters) == ["input"]
    for each in (module, copy.deepcopy(module)):
        assert torch.equal(each(x), own + 2)
    exchange_class(module, nn.Linear)
    assert type(module) is nn.Linear and torch.equal(module(x), own)


def test_a_subclass_is_made_once_for_its_bases_and_attributes() -> None:
    made = subclass("Mine", (nn.Linear,))
    assert made is subclass("Mine", (nn.Linear,)) and issubclass(made, nn.Linear)
    others = {subclass("Mine", (nn.Conv1d,)), subclass("Mine", (nn.Linear,), {"a": 1}), subclass("Own", (nn.Linear,))}
    assert len(others | {made}) == 4
