"""The base of QLoRA (Dettmers et al. 2023): linear layers with frozen weights of 4 bits, through bitsandbytes.

transformers quantises the layers of a folder while it loads them. Embeddings, norms, the head and what is trained as a
whole stay fp32.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.extras import pip_install
from lora_export.layers.frozen_linear import four_bit_linear
from lora_export.options.spelling import named
from lora_export.options.train import BaseQuantization
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.quantised import QUANTIZATION

STORED_SCHEMES = frozenset({"nf4", "fp4"})
SKIPPED = "llm_int8_skip_modules"  # of transformers' config: layers of 4 bits leave these out, too
KERNELS = "kernels"  # the package with which bitsandbytes downloads a kernel when it is imported


@dataclass(frozen=True)
class TrainedBase:
    """How the base of a training is loaded. A folder that bitsandbytes has stored in 4 bits stays so."""

    quantization: BaseQuantization | None = None  # of a folder that is stored as floats
    floats: tuple[str, ...] = ()  # modules that are not quantised, because they are trained as a whole


def require_bitsandbytes() -> None:
    """Import bitsandbytes. Raises EnvironmentLacking where it is missing or fails. Downloads nothing."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns where it has downloaded no kernel
    try:
        with _without(KERNELS):
            importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentLacking(f"a base in 4 bits needs bitsandbytes ({error}): {pip_install('qlora')}") from error
    finally:
        logger.setLevel(level)


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let imports of this package fail."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    for name in before:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(before)


def loading_options(
    transformers: Any, base: TrainedBase, checkpoint: Checkpoint, config: Any, build: Callable[[], Any]
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for this config, to which new modules of a stored base are added as floats.

    `build` makes the model without weights. Raises InputRefused for a folder that is stored in another scheme, and for
    one that is quantised already; EnvironmentLacking without bitsandbytes.
    """
    if not (checkpoint.quantised or base.quantization):
        return {}
    _refuse_other_scheme(checkpoint, base)
    require_bitsandbytes()
    stored = dict(checkpoint.config.get(QUANTIZATION) or {})
    left_out = stored.get(SKIPPED)
    if left_out is None:
        with torch.device("meta"):  # output embeddings, what is tied to them, and the last layer
            left_out = transformers.quantizers.base.get_keys_to_not_convert(build())
    own = [rf"(.*\.)?{re.escape(module)}" for module in base.floats]  # expressions for names, or their endings
    own = [one for one in own if not any(re.match(rf"{one}\.", weight) for weight in checkpoint.quantised)]
    left_out = sorted({*left_out, *own})
    options: dict[str, Any] = {"device_map": {"": "cpu"}}
    if checkpoint.quantised:
        config.quantization_config = {**stored, SKIPPED: left_out}
        return options
    return options | {
        QUANTIZATION: transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=base.quantization, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, **{SKIPPED: left_out},
        )
    }  # fmt: skip


def quantised_modules(module: Any, tensors: Sequence[str]) -> tuple[str, ...]:
    """The modules in 4 bits that own some of these tensors."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return tuple(name for name in owners if isinstance(module.get_submodule(name), four_bit_linear()))


def widen_floats(module: Any, dtype: torch.dtype) -> None:
    """Convert the floats of a base that is stored in 4 bits, in place: transformers leaves them in their own dtype."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _refuse_other_scheme(checkpoint: Checkpoint, base: TrainedBase) -> None:
    """Raise InputRefused for a folder of another scheme, and for one in 4 bits that is to be quantised."""
    schemes = {tensor.scheme for tensor in checkpoint.quantised.values()}
    if other := schemes - STORED_SCHEMES:
        raise InputRefused(
            f"{checkpoint.path} is quantised ({', '.join(sorted(other))}): adapters are trained beside floats, and "
            f"beside nf4 and fp4 of bitsandbytes. Make it a float model: merge {named('dequantize', True)}"
        )
    if schemes and base.quantization:
        raise InputRefused(
            f"{checkpoint.path} is quantised already ({', '.join(sorted(schemes))}): leave out {named('quantize_base')}"
        )
