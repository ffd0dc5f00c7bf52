"""The record of each command, and what the command line calls their options."""

import functools
from collections.abc import Mapping

from lora_export.options.adapters import (
    CheckOptions,
    CombineOptions,
    ConvertOptions,
    ExtractOptions,
    InspectOptions,
    ResizeOptions,
)
from lora_export.options.declaring import Options, options_of
from lora_export.options.export import GenerateOptions, OnnxOptions, TorchScriptOptions
from lora_export.options.fleet import FleetOptions
from lora_export.options.merge import MergeOptions
from lora_export.options.train import TrainOptions
from lora_export.options.unmerge import UnmergeOptions
from lora_export.options.verify import VerifyOptions

RECORDS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "inspect": InspectOptions,
    "check": CheckOptions,
    "convert": ConvertOptions,
    "combine": CombineOptions,
    "extract": ExtractOptions,
    "resize": ResizeOptions,
    "merge": MergeOptions,
    "unmerge": UnmergeOptions,
    "onnx": OnnxOptions,
    "torchscript": TorchScriptOptions,
    "generate": GenerateOptions,
    "verify": VerifyOptions,
    "fleet": FleetOptions,
}


@functools.cache
def declared_flags() -> Mapping[str, str]:
    """The flags of options by their Python names, where they are not the names with dashes."""
    declared = [one for record in RECORDS.values() for one in options_of(record)]
    return {one.name: one.option.flags[0].partition("/")[0] for one in declared if one.option.flags}
