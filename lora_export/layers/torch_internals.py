"""Private names of PyTorch, transformers and onnxscript, each behind a function that states what it is needed for.

No public name does the same. A release may rename any of them: `tests/layers/test_torch_internals.py` then fails with
the name, and a user gets EnvironmentLacking with it.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_map as tree_map

from lora_export.errors import EnvironmentLacking

TORCH = str(Path(torch.__file__).parent)
# Files of PyTorch: of sizes that are symbols, what bool(size) and int(size) call of them, and modules in Python
SIZES, LAYERS = (str(Path(TORCH, "fx", "experimental")), str(Path(TORCH, "__init__.py"))), str(Path(TORCH, "nn"))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module itself, by attribute. Where adapters are attached, `.weight` is W + ΔW instead."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself, by attribute."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module, by attribute."""
    return module._modules


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` returned another for; any other module itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def unsaved_buffers(module: nn.Module) -> set[str]:
    """The attributes of the module's own buffers that its state_dict leaves out."""
    return module._non_persistent_buffers_set


def pre_hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """What is called before a module's `forward`, by key: the hooks, and which of them get keyword arguments."""
    return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs


def without_subclass_rules() -> AbstractContextManager[Any]:
    """A context in which operators treat subclasses of Tensor as tensors: a result is none of a parameter's class."""
    return torch._C.DisableTorchFunctionSubclass()


def reshaped_alone(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The values in another shape, which count as no view. The tensor must not be used afterwards."""
    reshaped: Tensor = torch.ops.aten._unsafe_view(tensor, list(shape))
    return reshaped


def has_onednn_linear() -> bool:
    """Whether this PyTorch has what `onednn_linear` calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in fp32 on the CPU, computed by oneDNN. It has no gradient."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def computes_by_groups(experts: nn.Module) -> bool:
    """Whether transformers computes a module of experts by PyTorch's product of groups of rows."""
    has_ways = hasattr(experts, "is_concatenated")  # as transformers marks experts with several implementations
    return has_ways and getattr(getattr(experts, "config", None), "_experts_implementation", "") == "grouped_mm"


def private(module: str, *names: str) -> Any:
    """An attribute of a module of another library. Raises EnvironmentLacking where this release has none."""
    found = importlib.import_module(module)
    for name in names:
        if not hasattr(found, name):
            library = module.partition(".")[0]
            version = importlib.import_module(library).__version__
            raise EnvironmentLacking(f"{library} {version} has no {'.'.join((module, *names))}, which is needed")
        found = getattr(found, name)
    return found


# --- PyTorch ---


def changes_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place: a program that changes its weights shows by it."""
    return int(tensor._version)


def schema_of(operator: Any) -> Any:
    """An operator's arguments and results, with which of them it writes into; None for another function."""
    return operator._schema if isinstance(operator, torch._ops.OpOverload) else None


def is_composite(operator: Any) -> bool:
    """Whether PyTorch computes an operator by others, for every device and with gradients."""
    return bool(operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def grouped_products() -> Callable[..., Tensor]:
    """What torch.nn.functional.grouped_mm calls: the products of experts, for which PyTorch has no fp64 kernel."""
    return private("torch", "_grouped_mm")  # type: ignore[no-any-return]


def script_archive(path: str) -> Any:
    """The reader of torch.jit.load: what checks a file must find the records that are loaded."""
    return private("torch", "_C", "PyTorchFileReader")(path)


def script_operators() -> set[str]:
    """The names of all operators that TorchScript can call in this PyTorch."""
    return {schema.name.partition("::")[2] for schema in private("torch", "_C", "_jit_get_all_schemas")()}


def compiler_errors() -> type[Exception]:
    """What torch.compile raises where it fails."""
    return private("torch._dynamo.exc", "TorchDynamoException")  # type: ignore[no-any-return]


def forget_kernels(operators: Iterable[Any]) -> None:
    """Let PyTorch look up again what computes these operators."""
    for operator in operators:
        operator._dispatch_cache.clear()


def sizes_of_branches(
    run: Callable[[Mapping[str, Tensor]], object], inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]
) -> dict[str, tuple[int, int]]:
    """The least and the greatest size of each symbol for which `run` takes the branches that it takes for these inputs.

    `axes` has the symbols of the axes that vary, by input; they have different sizes. A branch is a comparison in
    Python code, but for PyTorch's own, of one symbol with numbers. Shapes alone are computed. Where `run` fails, or
    needs values to choose a branch, it is about the branches before that.
    """
    fake, symbolic = "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"
    kinds, made = private(symbolic, "DimDynamic"), {}
    environment = private(symbolic, "ShapeEnv")()
    # Where in the code each branch is: nobody reads it, and to find it, PyTorch imports its exporter and compiler.
    nowhere = private("torch._guards", "SLoc")(None, None), ""
    environment._get_stack_summary = lambda *_, **__: nowhere
    evaluate = environment.evaluate_expr

    def evaluate_expr(expression: Any, hint: Any = None, *others: Any, **options: Any) -> Any:
        is_branch = hint is None or _is_in_python(sys._getframe(1))
        return evaluate(expression, hint, *others, **options) if is_branch else hint

    environment.evaluate_expr = evaluate_expr
    mode = private(fake, "FakeTensorMode")(shape_env=environment, allow_non_fake_inputs=True)
    for name, value in inputs.items():
        sizes = [kinds.DUCK if axis in axes.get(name, ()) else kinds.STATIC for axis in range(value.ndim)]
        how = private(symbolic, "StatelessSymbolicContext")(dynamic_sizes=sizes)
        source = private("torch._dynamo.source", "ConstantSource")(name)
        made[name] = mode.from_tensor(value, source=source, symbolic_context=how)
    traced = {
        symbol: (made[name].shape[axis].node.expr, inputs[name].shape[axis])
        for name, own in axes.items()
        for axis, symbol in own.items()
    }
    with mode, contextlib.suppress(Exception):  # of any code
        run(made)
    ranges = {}
    for symbol, (expression, size) in traced.items():
        low, high = 2, sys.maxsize  # 0 and 1 are constants
        for guard in environment.guards:  # not PyTorch's bounds: `28 * size <= 800` narrows none, `a < b` both
            if guard.expr.free_symbols == {expression}:
                violated = partial(_is_violated, guard.expr, expression)
                low += bisect.bisect_left(range(low, size), True, key=lambda each: not violated(each))
                high = size + bisect.bisect_left(range(size, high + 1), True, key=violated) - 1
        ranges[symbol] = low, high
    return ranges


def _is_violated(comparison: Any, symbol: Any, size: int) -> bool:
    return str(comparison.subs(symbol, size)) == "False"  # SymPy's own False is no bool, and may not come to either


def _is_in_python(frame: Any) -> bool:
    """Whether Python code asks for a bool or a number of a size, and not what PyTorch's operators are made of.

    oneDNN, as an example, computes a convolution of 16 rows in another way.
    """
    is_python = False
    while frame is not None and (file := frame.f_code.co_filename).startswith(SIZES):
        is_python = is_python or file == SIZES[1]
        frame = frame.f_back
    return is_python and frame is not None and (not file.startswith(TORCH) or file.startswith(LAYERS))


# --- transformers ---


def is_stateful(module: object) -> bool:
    """Whether a model of transformers keeps a state, as Mamba and hybrids do. False for other modules."""
    return bool(getattr(module, "_is_stateful", False))


def adding_to_all_tokens(decoder: nn.Module) -> AbstractContextManager[Any]:
    """A context in which Qwen3-VL's decoder adds the features of images to the hidden states of all tokens."""
    name = "_deepstack_process"
    private(type(decoder).__module__, type(decoder).__name__, name)
    return mock.patch.object(decoder, name, lambda hidden, _, features: hidden + features)


def fusions_for(provider: str) -> Iterator[tuple[Callable[[Any], Any], bool]]:
    """The rewrites into onnxruntime's operators for a provider, in order, and whether each makes GroupQueryAttention.

    transformers has one function for all of them, and takes a graph of one row alone for this operator. On the CPU
    (onnxruntime 1.31), the operator ignores the position_ids of a prompt and rotates all rows as the first one: rows
    that are padded by other lengths would be wrong. Its queries and keys are therefore rotated by RotaryEmbedding.
    """
    module = "transformers.exporters.onnxruntime_fusions"
    attention = private(module, "_fuse_group_query_attention")
    for step, providers in private(module, "_STEPS"):
        if providers is None or provider in providers:
            is_attention = getattr(step, "func", step) is attention
            yield (partial(step, rotary=False) if is_attention and provider == "cpu" else step), is_attention


_MADE: dict[tuple[Any, ...], type[nn.Module]] = {}


def subclass(
    name: str, bases: tuple[type[nn.Module], ...], attributes: Mapping[str, object] = MappingProxyType({})
) -> type[nn.Module]:
    """The class of this name, with these bases and attributes. One is made for each name, bases and attributes' names.

    Modules of one class get one class again: code that is compiled or chosen by class is so once.
    """
    key = name, bases, *attributes
    if key not in _MADE:
        _MADE[key] = type(name, bases, dict(attributes))
    return _MADE[key]


def exchange_class(module: nn.Module, other: type[nn.Module]) -> None:
    """Make a module an instance of `other`: a subclass of its class, or the class that it had before."""
    module.__class__ = other


def exchange_forward(module: nn.Module, forward: Callable[..., Any], **attributes: object) -> None:
    """Give a module this `forward`, and these attributes of a class. Its class keeps its name and place."""
    cls = type(module)
    names = {"forward": forward, "__module__": cls.__module__, **attributes}
    exchange_class(module, type(cls.__name__, (cls,), names))


# --- Exporters. Where a release lacks one of these names, an export takes longer ---


def can_match(rule: Any, operator: str) -> bool:
    """Whether the pattern of a rewriting rule can be what ends in a node of this operator."""
    pattern = getattr(rule, "_target_pattern", None)
    return pattern is None or bool(pattern.output_nodes[0].op.matches(operator))


def functions_read_once() -> AbstractContextManager[Any]:
    """A context in which PyTorch's exporter reads the sources of onnxscript's functions in the first export alone."""
    imported: Any = importlib.import_module("torch.onnx._internal._lazy_import")
    apis: Any = getattr(imported, "onnxscript_apis", None)
    if not hasattr(apis, "get_torchlib_ops"):
        return contextlib.nullcontext()
    return mock.patch.object(apis, "get_torchlib_ops", partial(_read_once, apis.get_torchlib_ops))


@cache
def _read_once(read: Callable[[], Any]) -> Any:
    return read()


@contextlib.contextmanager
def signatures_made_once() -> Iterator[None]:
    """A context in which PyTorch's exporter makes the signature of a function or operator of ONNX once.

    It would make those of all functions for each export, and that of an operator for each node.
    """
    schemas: Any = importlib.import_module("torch.onnx._internal.exporter._schemas")
    described: Any = getattr(importlib.import_module("onnx_ir.schemas"), "OpSignature", None)
    make, describe = getattr(schemas, "op_signature_from_function", None), getattr(described, "from_op_schema", None)
    if make is None or describe is None:
        yield
        return
    known: dict[tuple[str, str, int], Any] = {}

    def of_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        made = getattr(function, "_pt_onnx_signature", None)  # where the exporter keeps it
        return make(function, *args, **kwargs) if made is None else made

    def of_operator(schema: Any) -> Any:
        key = schema.domain, schema.name, schema.since_version
        if key not in known:
            known[key] = describe(schema)
        return known[key]

    functions = mock.patch.object(schemas, "op_signature_from_function", of_function)
    with functions, mock.patch.object(described, "from_op_schema", of_operator):
        yield


def composites_looked_up_once() -> AbstractContextManager[Any]:
    """A context in which PyTorch looks up its composite operators again only where one was added.

    An export looks up all of them for each of some 30 namespaces.
    """
    utils: Any = importlib.import_module("torch._export.utils")
    find = getattr(utils, "_materialize_cpp_cia_ops", None)
    list_names = getattr(torch._C, "_dispatch_get_registrations_for_dispatch_key", None)
    if find is None or list_names is None:
        return contextlib.nullcontext()
    found = list[str]()

    def find_new() -> None:
        names = list_names("CompositeImplicitAutograd")
        if names != found:
            find()
            found[:] = names

    return mock.patch.object(utils, "_materialize_cpp_cia_ops", find_new)


def types_promoted_as_traced() -> AbstractContextManager[Any]:
    """A context in which PyTorch's exporter runs no operator again to find where ONNX needs a Cast.

    The trace has recorded what each operator returns. One whose arguments are cast is run, as without this context.
    """
    promotion: Any = importlib.import_module("torch.onnx._internal.fx.passes.type_promotion")
    interpreter: Any = getattr(promotion, "_TypePromotionInterpreter", None)
    names = "run_node", "_maybe_promote_node", "_set_current_node"
    if not (hasattr(promotion, "get_type_promotion_rule") and all(hasattr(interpreter, each) for each in names)):
        return contextlib.nullcontext()
    run = interpreter.run_node

    def run_node(self: Any, node: torch.fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run(self, node)
        rule = promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    return mock.patch.object(interpreter, "run_node", run_node)


def loaded_models_alone() -> AbstractContextManager[Any]:
    """A context in which transformers' exporter imports no models: those that it prepares for an export are loaded.

    It would import some 30, for the sake of one.
    """
    utils: Any = importlib.import_module("transformers.exporters.utils")
    find = getattr(utils, "import_dotted_path", None)
    if find is None:
        return contextlib.nullcontext()

    def find_loaded(path: str, missing_ok: bool = False) -> Any:
        module = ".".join(path.split(".")[:4])  # transformers.models.bert.modeling_bert
        is_idle = missing_ok and module.startswith("transformers.models.") and module not in sys.modules
        return None if is_idle else find(path, missing_ok)

    return mock.patch.object(utils, "import_dotted_path", find_loaded)


def without_stack_traces() -> AbstractContextManager[Any]:
    """A context in which a trace does not record for each node the code that it is from."""
    if not hasattr(torch.fx.config, "do_not_emit_stack_traces"):  # PyTorch 2.11 and older
        return contextlib.nullcontext()
    return mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True)
