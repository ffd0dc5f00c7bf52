"""Files of Microsoft's loralib: what `torch.save(loralib.lora_state_dict(model))` writes.

They record neither rank nor alpha, and `enable_lora` of a fused layer neither. With the rank r, the shapes show which
layer a pair belongs to:

- Linear and Embedding: A (r, in), B (out, r).
- Conv2d with a kernel of k x k: A (r k, in k), B (out k, r k). B A, read in rows, has the entries of the weight.
- MergedLinear with n of its parts enabled: A (n r, in), B (n part, r), one block of rows for each enabled part. The
  rows of the other parts do not change.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats import adapter_files
from lora_export.formats.adapter_files import unwrapped
from lora_export.formats.lora_changes import is_finite
from lora_export.formats.peft_config import adapter_scale
from lora_export.lora import Adapter, LoraPair
from lora_export.names.families import fuse_outputs
from lora_export.names.table import is_embedding
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named

DESCRIPTION = "a file with the tensors NAME.lora_A and NAME.lora_B of loralib"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])")
_BIAS = re.compile(r".+\.bias")
_OF_LITGPT = "hyperparameters.yaml"  # beside a file of litgpt, which has keys of the same kind
# Of diffusion models, whose trainers also write bare `lora_A`
OTHERS = re.compile(r"(diffusion_model|unet|text_encoder(_\d)?)\.|(lora|lycoris)_")


def recognises(path: Path) -> bool:
    """Whether a file has a pair under loralib's names. A pickle is not unpickled for that."""
    if not path.is_file() or (path.parent / _OF_LITGPT).exists():
        return False
    names = [name for name in adapter_files.names_in(path) if _KEY.fullmatch(name)]
    return bool(names) and not any(OTHERS.match(name) for name in names)


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read a file of loralib. Raises InputRefused with everything that is wrong with it."""
    file = adapter_files.open_tensors(path, options)
    rank, alpha = adapter_files.stated_rank_and_alpha(f"{path}: loralib's files record neither rank nor alpha", options)
    scale = adapter_scale(rank, alpha, {})

    def build(module: str, tensors: adapter_files.Tensors) -> dict[str, LoraPair]:
        return {module: _pair(module, tensors["a"], tensors["b"], rank, scale, options.enabled_parts_of(module))}

    pairs, spelling = adapter_files.read_pairs(file, build, _KEY, others=_BIAS)
    replaced = {unwrapped(key): file.read(key) for key in file.entries if _BIAS.fullmatch(key)}
    if bad := [key for key, value in replaced.items() if not is_finite(value)]:
        raise InputRefused(f"{path}: {', '.join(bad)} holds values that are not finite (NaN or infinity)")
    return Adapter(
        name=name,
        format="loralib",
        pairs=pairs,
        replaced=replaced,
        spelling=spelling,
        scale_source=f"{named('lora_alpha')} / {named('lora_rank')}",
        metadata={"r": rank, "lora_alpha": alpha},
        notes=tuple(f"{key} is saved whole: it replaces the base's tensor" for key in replaced),
        sha256=adapter_files.hash_of_unchanged(file),
    )


def _pair(module: str, a: NDArray[Any], b: NDArray[Any], rank: int, scale: float, parts: tuple[bool, ...]) -> LoraPair:
    if (a.ndim, b.ndim) != (2, 2):
        raise InputRefused(f"A {a.shape} and B {b.shape} are no matrices")
    rows, columns = a.shape[0], b.shape[1]
    if parts or rows != columns:
        return _merged_linear(a, b, rank, scale, parts)
    if rows == rank:
        return LoraPair(a=a, b=b, scale=scale, embedding=is_embedding(module))
    if rows % rank == 0 and a.shape[1] % (rows // rank) == b.shape[0] % (rows // rank) == 0:
        return _convolution(a, b, rows // rank, scale)
    raise InputRefused(f"A {a.shape} and B {b.shape} do not have {named('lora_rank', rank)}")


def _convolution(a: NDArray[Any], b: NDArray[Any], kernel: int, scale: float) -> LoraPair:
    """The pair of a convolution of kernel x kernel.

    Row o k + i of B A holds the i-th k-th part of the weights of output o. So A is repeated k times, once for each part
    of the columns (in k k), and the rows of B are sorted by part.
    """
    inner, outer = a.shape[1] // kernel, b.shape[0] // kernel
    wide = np.zeros((kernel, a.shape[0], kernel, a.shape[1]), a.dtype)
    for part in range(kernel):
        wide[part, :, part] = a
    return LoraPair(
        a=wide.reshape(kernel * a.shape[0], inner, kernel, kernel),
        b=b.reshape(outer, kernel * b.shape[1], 1, 1),
        scale=scale,
    )


def _merged_linear(a: NDArray[Any], b: NDArray[Any], rank: int, scale: float, parts: tuple[bool, ...]) -> LoraPair:
    """The pair of a fused layer, of which `parts` states the enabled ones. Its rank is that of all of them together."""
    enabled, rest = divmod(a.shape[0], rank)
    if b.shape[1] != rank or rest or not enabled:
        raise InputRefused(f"A {a.shape} and B {b.shape} do not have {named('lora_rank', rank)}")
    if not parts:
        raise InputRefused(
            f"A {a.shape} and B {b.shape} belong to {enabled} parts of a fused layer (MergedLinear), and the file does "
            "not record which. State enable_lora as in training, such as "
            f"{named('enable_lora', {'c_attn': (True, False, True)})}"
        )
    if sum(parts) != enabled or b.shape[0] % enabled:
        raise InputRefused(
            f"A {a.shape} and B {b.shape} belong to {enabled} parts, {named('enable_lora')} has {sum(parts)}"
        )
    by_part = zip(np.flatnonzero(parts).tolist(), np.split(a, enabled), np.split(b, enabled), strict=True)
    pairs = {part: LoraPair(a=own_a, b=own_b, scale=scale) for part, own_a, own_b in by_part}
    return fuse_outputs(pairs, [b.shape[0] // enabled] * len(parts))
