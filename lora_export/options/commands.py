"""The record of each command."""

from lora_export.options.adapters import CombineOptions, ConvertOptions, ExtractOptions, InspectOptions, ResizeOptions
from lora_export.options.declaring import Options
from lora_export.options.export import OnnxOptions, TorchScriptOptions
from lora_export.options.generate import GenerateOptions
from lora_export.options.merge import MergeOptions, UnmergeOptions
from lora_export.options.train import TrainOptions
from lora_export.options.verify import VerifyOptions

RECORDS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "inspect": InspectOptions,
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
}
