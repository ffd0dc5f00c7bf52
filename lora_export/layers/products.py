"""Products with frozen weights in training, by the library that computes them fastest on this processor.

In fp32, PyTorch calls MKL, which uses AVX-512 on Intel's processors alone. PyTorch also contains oneDNN, which uses it
on every processor. On an AMD EPYC (Zen 5) oneDNN takes 0.45 of MKL's time. Both sum in fp32, in different orders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from lora_export.layers.torch_internals import has_onednn_linear, onednn_linear

LEAST_MULTIPLICATIONS = 1 << 19  # of a product: below, a call of oneDNN takes longer than what it saves
# Rows are padded: oneDNN keeps code for each number of rows that it has met, half a MiB for each matrix.
LEAST_PADDED, PADDED_PARTS = 64, 16


def _is_onednn_faster() -> bool:
    processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_both = torch.backends.mkl.is_available() and has_onednn_linear()
    return has_both and "AMD" in processor.get("cpu_name", "") and bool(processor.get("avx512_f"))


IS_ONEDNN_FASTER = _is_onednn_faster()
_BY_ONEDNN: ContextVar[bool] = ContextVar("_BY_ONEDNN", default=False)


@contextlib.contextmanager
def fastest_products() -> Iterator[None]:
    """Let `product` round differently from F.linear where it is faster. Elsewhere, a pair of B = 0 changes no bit."""
    token = _BY_ONEDNN.set(IS_ONEDNN_FASTER)
    try:
        yield
    finally:
        _BY_ONEDNN.reset(token)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias` for x (rows, in) and W (out, in), as F.linear. No gradient flows through it."""
    is_fp32 = x.dtype is torch.float32 and x.device.type == "cpu"
    # A compiler chooses for itself, and cannot compile oneDNN's operator.
    if not is_fp32 or torch.compiler.is_compiling() or not _BY_ONEDNN.get():
        return F.linear(x, weight, bias)
    if x.numel() * weight.shape[0] < LEAST_MULTIPLICATIONS or (bias is not None and bias.shape != weight.shape[:1]):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its strides
    more = -len(x) % max(LEAST_PADDED, 1 << ((len(x) - 1) // PADDED_PARTS).bit_length())
    return onednn_linear(F.pad(x, (0, 0, 0, more)), weight, bias)[: len(x)] if more else onednn_linear(x, weight, bias)
