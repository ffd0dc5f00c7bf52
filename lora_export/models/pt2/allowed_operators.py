"""Which operators of an exported program are run, and by what: a closed list, since its file is nobody's promise.

PyTorch's operators are looked up by these names alone. What is not among them is refused by name: operators that
open files (`aten::from_file`), that put a tensor on another's memory (`set_`, `resize_`), draw random numbers, or
trust the sizes that they are told; every other namespace; everything of Python's. Some that exported programs have
are run by the public function that checks what they do not.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from lora_export.errors import InputRefused

Function = Callable[..., Any]

LARGEST = 1 << 62  # a number that sizes are made of; beyond it, Python would compute on where torch cannot
NAME = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
HIGHER_ORDER = "torch.ops.higher_order."

ARITHMETIC = """
    abs acos acosh add addcdiv addcmul amax amin argmax argmin argsort asin asinh atan atan2 atanh bitwise_and
    bitwise_not bitwise_or bitwise_xor ceil clamp clamp_max clamp_min copysign cos cosh count_nonzero cumprod cumsum
    deg2rad diff div eq erf erfc erfinv exp exp2 expm1 floor floor_divide fmax fmin fmod frac ge gt hypot isfinite
    isinf isnan isneginf isposinf le lerp lgamma log log10 log1p log2 logaddexp logical_and logical_not logical_or
    logical_xor logit logsumexp lt max maximum mean median min minimum mul nan_to_num nanmean nansum ne neg norm pow
    prod rad2deg reciprocal remainder round rsqrt rsub sgn sign signbit sin sinc sinh sort sqrt square std std_mean
    sub sum tan tanh topk true_divide trunc var var_mean xlogy all any kthvalue __and__ __or__ __xor__ linalg_norm
    linalg_vector_norm
"""
PRODUCTS = """
    addbmm addmm addmv baddbmm bilinear bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution dot einsum embedding inner linear matmul mm mv outer scaled_dot_product_attention tensordot
    cosine_similarity cdist
"""
LAYERS = """
    _log_softmax _softmax adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d batch_norm celu dropout elu feature_dropout gelu glu
    group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm layer_norm leaky_relu log_sigmoid log_softmax
    max_pool1d max_pool2d max_pool2d_with_indices max_pool3d mish native_dropout native_layer_norm prelu relu relu6
    rms_norm selu sigmoid silu softmax softplus softshrink threshold upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d _adaptive_avg_pool2d _adaptive_avg_pool3d
"""
SHAPES = """
    _to_copy alias arange as_strided broadcast_tensors broadcast_to bucketize cat chunk clone column_stack concat
    constant_pad_nd contiguous copy detach diag diag_embed diagonal dstack expand expand_as eye fill flatten flip
    full full_like gather hstack im2col index index_add index_copy index_fill index_put index_select item lift_fresh
    lift_fresh_copy linspace _local_scalar_dense masked_fill masked_scatter masked_select meshgrid movedim narrow
    new_full new_ones new_zeros nonzero numpy_T one_hot ones ones_like pad permute pixel_shuffle pixel_unshuffle
    reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d reshape reshape_as roll rot90 scalar_tensor scatter scatter_add scatter_reduce select
    select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims sym_numel sym_size
    sym_storage_offset sym_stride t take take_along_dim tensor_split tile to transpose tril tril_indices triu
    triu_indices type_as unbind unflatten unfold unsqueeze view view_as vstack where zero zeros zeros_like
"""
CHECKS = ("_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")
# Reads a tensor's bytes as another type: not what it says of a tensor that was widened.
REFUSED = {"view.dtype"}


def _assert(self: Any, assert_msg: str = "") -> None:
    if not bool(self):
        raise RuntimeError(assert_msg or "an assertion of the program's own fails")


def _checked_range(size: Any, min: Any = None, max: Any = None) -> None:
    if (min is not None and size < min) or (max is not None and size > max):
        raise RuntimeError(f"a size is {size}, and has to lie between {min} and {max}")


def _attention(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> tuple[Tensor, None]:
    named = {name: more[name] for name in ("attn_mask", "dropout_p", "is_causal", "scale") if name in more}
    return F.scaled_dot_product_attention(query, key, value, **named), None


def _group_norm(input: Tensor, weight: Any, bias: Any, *, group: int, eps: float, **_: int) -> tuple[Any, ...]:
    return F.group_norm(input, group, weight, bias, eps), None, None


def _batch_norm(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    **_: float,
) -> tuple[Any, ...]:
    return F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=eps), None, None


def _zeros(size: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


def _zeros_like(self: Tensor, dtype: Any = None, **_: Any) -> Tensor:
    return torch.zeros_like(self, dtype=dtype)


def _new_zeros(self: Tensor, size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return self.new_zeros(size, dtype=dtype)


# In the place of operators that trust what they are told, or hand out memory as they find it. What is None in their
# answer is a by-product for gradients; a program that reads it fails.
INSTEAD: dict[str, Function] = {
    "_assert_scalar.default": _assert,
    "_assert_async.default": _assert,
    "_assert_async.msg": _assert,
    "_assert_tensor_metadata.default": lambda **_: None,  # of types that a reference widens
    "sym_constrain_range.default": _checked_range,
    "sym_constrain_range_for_size.default": _checked_range,
    "_scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "native_group_norm.default": _group_norm,
    "_native_batch_norm_legit_no_training.default": _batch_norm,
    "_unsafe_view.default": lambda self, size: self.reshape(size),
    "empty.memory_format": _zeros,
    "empty_like.default": _zeros_like,
    "new_empty.default": _new_zeros,
    "empty_permuted.default": _zeros,
}
OPERATORS = frozenset(" ".join((ARITHMETIC, PRODUCTS, LAYERS, SHAPES)).split())


def _within(function: Function) -> Function:
    def computed(*numbers: Any) -> Any:
        result = function(*numbers)
        if not -LARGEST <= result <= LARGEST:
            raise ValueError(f"a size of {numbers} would be beyond number")
        return result

    return computed


def _power(base: Any, exponent: Any) -> Any:
    if not -64 <= exponent <= 64:
        raise ValueError(f"a size to the power of {exponent} is beyond number")
    return base**exponent


# What sizes are computed with; torch has the names of Python's own functions for it.
NUMBERS: dict[str, Function] = {
    **{f"_operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{
        f"_operator.{name}": _within(getattr(operator, name))
        for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "neg", "pos")
    },
    "_operator.and_": operator.and_,
    "_operator.or_": operator.or_,
    "_operator.pow": _within(_power),
    "math.trunc": math.trunc,
    "torch.sym_not": operator.not_,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_sum": _within(sum),
    "torch.sym_ite": lambda condition, yes, no: yes if condition else no,
    "torch.sym_sqrt": math.sqrt,
}
NUMBERS["torch._sym_sqrt"] = math.sqrt


class Operator(NamedTuple):
    """What a node runs. `names` are those of its arguments, None where they are told by their order alone."""

    run: Function
    names: Collection[str] | None
    writes: bool  # into one of its arguments


def resolve(target: str, place: str) -> Operator:
    """The operator of this name. Raises InputRefused for all but those of the lists."""
    if target in NUMBERS:
        return Operator(NUMBERS[target], None, writes=False)
    match = NAME.fullmatch(target)
    name, overload = match.groups() if match else ("", "")
    spelled = f"{name}.{overload}"
    known = name in OPERATORS or (name.endswith("_") and not name.endswith("__") and name[:-1] in OPERATORS)
    if not match or spelled in REFUSED or not (known or spelled in INSTEAD):
        raise InputRefused(f"{place}: {target[:80]!r} is not among the operators that are run from a file")
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or overload not in packet.overloads():
        raise InputRefused(f"{place}: this PyTorch ({torch.__version__}) has no operator {target[:80]!r}")
    found = getattr(packet, overload)
    arguments = found._schema.arguments
    # Those of TorchScript's texts and lists have the same names, and can make a list of any length.
    on_tensors = any("Tensor" in str(there.type) for there in (*arguments, *found._schema.returns))
    if any(argument.is_out for argument in arguments) or not (on_tensors or spelled in INSTEAD):
        raise InputRefused(f"{place}: {target[:80]!r} is not among the operators that are run from a file")
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
    return Operator(INSTEAD.get(spelled, found), [argument.name for argument in arguments], writes)
