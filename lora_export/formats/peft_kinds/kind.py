"""What `kinds.toml` states of a kind of PEFT's adapters, and what the function of its change gets and returns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import Tensors
from lora_export.formats.peft_config import OF_EVERY_KIND, ConfigFields
from lora_export.lora import LoraPair, TokenRows

Config = Mapping[str, Any]
_SIGNED = frozenset({"alpha", "alpha_pattern", "randlora_alpha"})  # not AdaLoRA's: PEFT takes the rank for it then


@dataclass(frozen=True)
class Stored:
    """What an adapter stores for one module."""

    parts: Tensors  # by what follows the module's name in their keys
    config: Config  # its own rank and alpha, by the patterns, are in the fields of the defaults
    shared: Tensors  # those that belong to no module
    module: str  # its name
    modules: int  # how many the file has
    title: str  # the name of the method

    def part(self, name: str, dimensions: int) -> NDArray[np.float32]:
        """A part in fp32. Raises InputRefused where it has another number of dimensions, or none of some."""
        value = self.parts[name]
        if value.ndim != dimensions or 0 in value.shape:
            raise InputRefused(f"{name} is {value.shape}; {dimensions} dimensions are needed")
        return np.asarray(value, np.float32)


@dataclass(frozen=True)
class ModuleChange:
    """What an adapter does to one module, where that is more, or less, than a pair. Names are those of parameters."""

    pair: LoraPair | None = None
    bias: NDArray[Any] | None = None  # added to the bias
    replaced: Tensors = field(default_factory=dict)  # "weight" or "bias" -> the whole tensor
    rows: TokenRows | None = None  # of the weight


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    `change` names the function that makes the change of one module, and raises InputRefused for what does not fit. A
    part that is not in `needed` may be absent; without `needed` none may.
    """

    title: str  # the name of the method
    change: str  # a module of this folder, and its function
    parts: Sequence[str]  # what follows the module's name in a key
    needed: Sequence[str] | None = None
    shared: Sequence[str] = ()  # names of tensors that belong to no module, up to their first dot
    fields: Sequence[str] = ()  # that it uses, or that do not affect the weights, beside those of every kind
    numbers: Sequence[str] = ()  # of these: the positive numbers that must be stated
    patterns: Mapping[str, str] = field(default_factory=dict)  # a table of patterns -> the field with the default
    refused: Mapping[str, str] = field(default_factory=dict)  # field -> why a true value is refused
    shared_alone: str = "no layer has a change"  # why a file with nothing but shared tensors is refused

    @property
    def config_fields(self) -> ConfigFields:
        supported = OF_EVERY_KIND | {*self.fields, *self.numbers, *self.patterns, *self.patterns.values()}
        return ConfigFields(supported, tuple(self.numbers), tuple(self.patterns), _SIGNED, self.refused)

    @property
    def function(self) -> Callable[[Stored], LoraPair | ModuleChange]:
        """The function that makes the change. Its module is imported then."""
        module, _, name = self.change.partition(".")
        found: Callable[[Stored], LoraPair | ModuleChange] = getattr(
            importlib.import_module(f"{__package__}.{module}"), name
        )
        return found
