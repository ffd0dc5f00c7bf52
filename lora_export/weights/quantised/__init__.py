"""What configs and files state of quantised weights. `reading.py` reads these as the floats that their library makes.

A scheme is added as one file, and one entry in `SCHEMES`. `stored_parts.py` has what the schemes share.

Each library has a list of its own of the layers that are floats. A list that a loader has by default is replaced by one
in the config: the float layers of the base are then listed, too. Source: transformers 5.24, compressed-tensors 0.20 and
gptqmodel 7.7.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from lora_export.options.spelling import command
from lora_export.weights.quantised.comfyui_files import COMFYUI, MARKER
from lora_export.weights.quantised.packed_numbers import FINE_BITS

if TYPE_CHECKING:
    from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts

Stated = Mapping[str, Any]  # a quantization_config


# (what is stated, modules that are floats now, those that were floats before, those of 8 bits now) -> what it is then
class Exclude(Protocol):
    def __call__(
        self, stated: Stated, modules: Sequence[str], floats: Iterable[str], finer: Sequence[str] = (), /
    ) -> dict[str, Any]: ...


OUTPUT_EMBEDDINGS = "lm_head"  # of a tied model it is no tensor of the checkpoint


def excluded_by(*keys: str, replaces_default: bool = False) -> Exclude:
    """A list of modules under one of these keys, the first where the config has none."""

    def exclude(
        stated: Stated, modules: Sequence[str], floats: Iterable[str], _finer: Sequence[str] = ()
    ) -> dict[str, Any]:
        key = next((key for key in keys if stated.get(key)), keys[0])
        before = stated.get(key) or ([*floats, OUTPUT_EMBEDDINGS] if replaces_default else [])
        if not modules:
            return dict(stated)
        return {**stated, key: list(dict.fromkeys([*before, *modules]))}

    return exclude


def excluded_by_patterns(
    stated: Stated, modules: Sequence[str], _: Iterable[str], finer: Sequence[str] = ()
) -> dict[str, Any]:
    """gptqmodel's `dynamic`: patterns of names, of which the first that fits decides."""
    exclusions: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in modules}
    exclusions |= {f"+:^{re.escape(module)}$": {"bits": FINE_BITS} for module in finer}
    return {**stated, "dynamic": exclusions | dict(stated.get("dynamic") or {})}


def excluded_of_compressed(
    stated: Stated, modules: Sequence[str], floats: Iterable[str], finer: Sequence[str] = ()
) -> dict[str, Any]:
    """`ignore`, and a group of 8 bits as the one group of fewer; the library prefers names to classes."""
    found, groups = excluded_by("ignore")(stated, modules, floats), dict(stated.get("config_groups") or {})
    own = [group for group in groups.values() if finer and 0 < _bits(group) < FINE_BITS]
    if len(own) == 1:
        weights = {**own[0]["weights"], "num_bits": FINE_BITS}
        name = next(name for number in itertools.count() if (name := f"group_{number}") not in groups)
        found["config_groups"] = groups | {name: {**own[0], "weights": weights, "targets": list(finer)}}
    return found


def _bits(group: Any) -> int:
    """How many bits the integers of a group have; 0 for other groups."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("type", "int") != "int":
        return 0
    return int(weights.get("num_bits") or 0)


def excluded_of_modelopt(
    stated: Stated, modules: Sequence[str], floats: Iterable[str], _finer: Sequence[str] = ()
) -> dict[str, Any]:
    """`ignore` in config.json, `exclude_modules` in modelopt's own file, where it is a part of it."""
    own = stated.get("quantization")
    if isinstance(own, dict):
        return {**stated, "quantization": excluded_by("exclude_modules")(own, modules, floats)}
    return excluded_by("ignore", "exclude_modules")(stated, modules, floats)


QUANTIZATION = "quantization_config"  # of a config
# Files in which quantisers repeat it, or state it alone: the method, and how the names of its tensors end. Beside float
# weights such a file would make a loader read these as quantised.
QUANTIZATION_FILES = {
    "quantize_config.json": ("gptq", ".qweight"),
    "quant_config.json": ("awq", ".qweight"),
    "hf_quant_config.json": ("modelopt", ".weight_scale_2"),
}

CACHE_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")
CACHE_SCALES = tuple(f"{what}_{kind}" for what in "qkv" for kind in ("scale", "zero_point"))

ReadWeights: TypeAlias = "Callable[[StoredParts, Mapping[str, Any], str], dict[str, QuantisedTensor]]"
OF_AWQ = (
    "AWQ scales weights and the inputs of their layers: an adapter fits only the model beside which it was trained, "
    "this one or the original"
)


NOT_CONVERTED = excluded_by("modules_to_not_convert", replaces_default=True)
OF_AWQ_LAYERS = excluded_by("modules_to_not_convert")  # servers look for parts of names: `gate` is in `gate_proj`


@dataclass(frozen=True)
class _Scheme:
    reader: str  # the module that reads its weights, and its function
    description: str
    parts: Sequence[str]  # endings of the names of parts: one that belongs to no weight is refused
    exclude: Exclude  # how its config states that a layer is a float
    conv1d_as_linear: bool = False  # the library stores a weight of a Conv1D as (outputs, inputs)
    caution: str = ""  # what a user must know of adapters beside such weights

    @property
    def read(self) -> ReadWeights:
        """The reader. Its module is imported for a base of this scheme alone."""
        module, _, function = self.reader.partition(".")
        return cast("ReadWeights", getattr(importlib.import_module(f"{__name__}.{module}"), function))


# `quant_method` of a config -> how its weights are read
SCHEMES: dict[str, _Scheme] = {
    "bitsandbytes": _Scheme(
        "bitsandbytes.bitsandbytes_weights",
        "bitsandbytes (nf4, fp4, int8)",
        (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB"),
        excluded_by("llm_int8_skip_modules", replaces_default=True),
        conv1d_as_linear=True,
    ),
    "fp8": _Scheme("block_fp8.block_fp8_weights", "fp8 in blocks", (".weight_scale_inv",), NOT_CONVERTED),
    "mxfp4": _Scheme("mxfp4.mxfp4_weights", "mxfp4", ("_blocks", "_scales"), NOT_CONVERTED),
    "compressed-tensors": _Scheme(
        "compressed_tensors.compressed_weights",
        "compressed-tensors",
        (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_global_scale"),
        excluded_of_compressed,
    ),
    "modelopt": _Scheme(
        "modelopt.modelopt_weights", "modelopt (NVFP4)", (".weight_scale", ".weight_scale_2"), excluded_of_modelopt
    ),
    "gptq": _Scheme(
        "gptq.gptq_weights",
        "GPTQ",
        (".qweight", ".qzeros", ".scales", ".g_idx"),
        excluded_by_patterns,
        conv1d_as_linear=True,
    ),
    "awq": _Scheme("awq.awq_weights", "AWQ (gemm)", (".qweight", ".qzeros", ".scales"), OF_AWQ_LAYERS, caution=OF_AWQ),
    # All scales that are known: of none is it known that a float8 beside it is its own value.
    COMFYUI: _Scheme(
        "comfyui.comfyui_weights",
        "8 and 4 bits in files for ComfyUI",
        (".scale_weight", ".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_s_rel", ".weight_zeros"),
        lambda stated, *_: dict(stated),
    ),
}


def method_of(quantization: Any) -> str:
    """The `quant_method` of a config's `quantization_config`.

    Configs of bitsandbytes from before 2023 have none, and are recognised by `load_in_4bit` or `load_in_8bit`.
    """
    if not isinstance(quantization, dict):
        return str(quantization)
    if "quant_method" not in quantization and any(quantization.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return "bitsandbytes"
    return str(quantization.get("quant_method", "unknown"))


def remedy_for(quantization: Any) -> str:
    """How a quantised base becomes a float model, as the end of a message."""
    scheme = SCHEMES.get(method_of(quantization))
    if scheme is not None:
        way = f"make this one a float model: {command('merge', dequantize=True)}"
        return f"{way}. {scheme.caution}" if scheme.caution else way
    return "dequantise this one first, with its own library"


def caution_for(tensor: QuantisedTensor) -> str:
    """What a user must know of adapters beside such a weight; empty where there is nothing."""
    scheme = SCHEMES.get(tensor.scheme.partition(" ")[0])
    return "" if scheme is None else scheme.caution


def needs_no_statement(tensor: QuantisedTensor) -> bool:
    """Whether a float layer beside such a weight is one that nothing names."""
    return tensor.scheme.partition(" ")[0] == COMFYUI


def stated_beside(name: str, stated: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Any] | None:
    """What a file of `QUANTIZATION_FILES` states, as a `quantization_config`; None where no tensor is stored so."""
    method, ending = QUANTIZATION_FILES[name]
    if not any(tensor.endswith(ending) for tensor in tensors):
        return None
    own = stated.get("quantization", stated)
    return {"quant_method": method} | (own if isinstance(own, dict) else {})


def without_shared_parts(found: Mapping[str, QuantisedTensor]) -> dict[str, QuantisedTensor]:
    """The weights without the scales of a quantised cache and what marks a whole file.

    These are tensors of their own in a model that stays quantised.
    """
    shared = (*CACHE_SCALES, MARKER)
    return {
        name: replace(tensor, parts=tuple(part for part in tensor.parts if part.rpartition(".")[2] not in shared))
        for name, tensor in found.items()
    }


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a dequantised model: no part of it has a `quantization_config`."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != QUANTIZATION
    }


def with_floats(
    config: Mapping[str, Any], modules: Sequence[str], floats: Sequence[str], finer: Sequence[str] = ()
) -> dict[str, Any]:
    """The config of a quantised model in which more `modules` are floats; `floats` were before. `finer` have 8 bits.

    What each part of it states as `quantization_config` excludes them, as the library of the scheme reads it.
    """
    found = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            is_stated = key == QUANTIZATION and method_of(value) in SCHEMES
            found[key] = (SCHEMES[method_of(value)].exclude if is_stated else with_floats)(
                value, modules, floats, finer
            )
    return found


def file_with_floats(
    name: str, stated: Mapping[str, Any], modules: Sequence[str], floats: Sequence[str], finer: Sequence[str] = ()
) -> Any:
    """As `with_floats`, for a file of `QUANTIZATION_FILES`."""
    method, _ = QUANTIZATION_FILES[name]
    return SCHEMES[method].exclude(stated, modules, floats, finer)
