"""A merge's arithmetic in one pass over the weight, by the optional distribution `lora-export-kernel` (folder kernel).

It widens, sums, rounds and measures a block of the weight while it is in the processor's registers. NumPy passes over
the block once for each of these. What this module does not do, `apply_step.apply_by_numpy` does: fp64, changes that
follow from the weight or are no plain A and B, replacements, and DoRA's norms where outputs are columns of the stored
weight. In the blocks of GGUF it also decodes and encodes: all types whose codes are consecutive numbers, without DoRA.

Accuracy: an entry is W + ΔW with ΔW and the sum in fp32, rounded once to nearest even, as NumPy's. The scale multiplies
B, and the products are added in the order of the ranks without rounding them. NumPy's library sums in another order.
So an entry is NumPy's, or differs by what that order may cost: see `cuda.py`, whose bound holds here too.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_export import sums
from lora_export.lora import LoraPair
from lora_export.plan import Step, Term
from lora_export.storage.block_copy import Bytes
from lora_export.weights.merge_report import is_in_range

if TYPE_CHECKING:
    from lora_export.storage.gguf_blocks import BlockCodec


@functools.cache
def kernel() -> ModuleType | None:
    """The compiled arithmetic; None where it is not installed, and on a processor for which it has no code."""
    try:
        import lora_export_kernel
    except ImportError:
        return None
    return lora_export_kernel if lora_export_kernel.INSTRUCTIONS else None


def name() -> str:
    """What a record of provenance calls the arithmetic; empty where NumPy does it."""
    found = kernel()
    return "" if found is None else f"lora-export-kernel {found.__version__} ({found.INSTRUCTIONS})"


def merged_rows(
    step: Step, rows: slice, weight: NDArray[Any], output: NDArray[Any], *, measured: bool
) -> NDArray[np.float64] | None:
    """Fill `output` with W + ΔW of these stored rows; None where this module does not do it, or a sum leaves fp32.

    Returns the sums of `merge_report.Statistics`, zeros where they are not measured.
    """
    found = kernel()
    if found is None or not _is_plain(step):
        return None
    before, after = _matrix(weight), _matrix(output)
    if before is None or after is None or not found.takes(before, after):
        return None
    a, b = _joined_a(step), _joined_b(step, rows)
    factors = None
    if step.magnitude is not None:
        squares = found.squared_norms(before, b, a)
        if not is_in_range(squares):  # also where it is zero, which NumPy's path refuses
            return None
        factors = sums.dora_factors(step, squares, rows).astype(np.float32)
    figures = np.zeros(5)
    is_finite = found.merge_rows(before, after, b, a, factors=factors, figures=figures if measured else None)
    return figures if is_finite else None


def merged_blocks(
    step: Step, rows: slice, codec: BlockCodec, blocks: Bytes, output: Bytes, *, measured: bool
) -> NDArray[np.float64] | None:
    """Fill `output` with the codes nearest to W + ΔW of these rows, whose blocks of GGUF keep their scales.

    `blocks` and `output` are (blocks, bytes). Returns as `merged_rows`; None for blocks that are damaged, too.
    """
    found = kernel()
    if found is None or not hasattr(found, "merge_blocks") or not _is_plain(step) or len(step.spec.shape) != 2:
        return None  # the first version of the distribution has no such function
    stored = found.Planes(codec.planes, int(codec.numbers[0]), len(codec.numbers))
    steps, offsets = codec.scales(blocks)
    is_plain = codec.is_ladder and step.replace is None and step.magnitude is None
    if not (is_plain and stored.are_known and np.isfinite(codec.largest(steps, offsets)).all()):
        return None
    a, b = _joined_a(step), _joined_b(step, rows)
    own = (len(b), len(blocks) // len(b), -1)
    scales = (
        np.ascontiguousarray(each).reshape(own)
        for each in (steps, np.zeros_like(steps) if offsets is None else offsets)
    )
    figures = np.zeros(5)
    pieces = (each.reshape(own) for each in (blocks, output))
    is_finite = found.merge_blocks(*pieces, *scales, b, a, stored, figures=figures if measured else None)
    return figures if is_finite else None


def _is_plain(step: Step) -> bool:
    return bool(step.terms) and all(type(term.pair) is LoraPair for term in step.terms)


def _matrix(array: NDArray[Any]) -> NDArray[Any] | None:
    """The memory of an array as a matrix of its rows; None where that has no such form."""
    if array.ndim == 2:
        return array
    return array.reshape(len(array), -1) if array.ndim > 2 and array.flags.c_contiguous else None


@functools.lru_cache(16)  # of the weights that are changed at present, by one merge or by several at once
def _joined_a(step: Step) -> NDArray[np.float32]:
    """The A of all terms, (all ranks, columns)."""
    return np.concatenate([term.pair.a.reshape(term.pair.rank, -1) for term in step.stored_terms])


def _joined_b(step: Step, rows: slice) -> NDArray[np.float32]:
    """These rows of the B of all terms with their scales, (rows, all ranks)."""
    first, *others = (_scaled_b(term, rows) for term in step.stored_terms)
    return np.concatenate([first, *others], axis=1) if others else first


def _scaled_b(term: Term, rows: slice) -> NDArray[np.float32]:
    """These rows of B with the scale of the term, (rows, rank)."""
    scaled: NDArray[np.float32] = term.pair.b[rows].reshape(-1, term.pair.rank) * np.float32(term.scale)
    return scaled
