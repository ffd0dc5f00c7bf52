"""What the module of a kind of PEFT's adapters provides: the keys of its tensors, its fields, and its change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import Tensors
from lora_export.formats.peft_config import OF_EVERY_KIND, ConfigFields
from lora_export.lora import LoraPair, TokenRows

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """What an adapter stores for one module."""

    parts: Tensors  # by what follows the module's name in their keys
    config: Config  # its own rank and alpha, by the patterns, are in the fields of the defaults
    shared: Tensors  # those that belong to no module
    module: str  # its name
    modules: int  # how many the file has

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

    `change` makes the change of one module, and raises InputRefused for what does not fit. A part that is not in
    `needed` may be absent.
    """

    peft_type: str  # as in the config
    title: str  # the name of the method
    change: Callable[[Stored], LoraPair | ModuleChange]
    parts: tuple[str, ...]  # what follows the module's name in a key
    needed: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()  # names of tensors that belong to no module, up to their first dot
    fields: tuple[str, ...] = ()  # that it uses, or that do not affect the weights, beside those of every kind
    numbers: tuple[str, ...] = ()  # of these: the positive numbers that must be stated
    patterns: Mapping[str, str] = field(default_factory=dict)  # a table of patterns -> the field with the default
    refused: Mapping[str, str] = field(default_factory=dict)  # field -> why a true value is refused
    shared_alone: str = "no layer has a change"  # why a file with nothing but shared tensors is refused

    @property
    def config_fields(self) -> ConfigFields:
        supported = OF_EVERY_KIND | {*self.fields, *self.numbers, *self.patterns, *self.patterns.values()}
        return ConfigFields(supported, self.numbers, tuple(self.patterns), self.refused)
