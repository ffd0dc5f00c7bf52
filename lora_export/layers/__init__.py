"""A plan over an nn.Module: attach its adapters as branches, or fold them into the weights."""

from lora_export.layers.attaching import Stored, attach, detach, settle, strength
from lora_export.layers.folding import fold, refuse_tied
from lora_export.layers.module_tensors import CONVOLUTIONS, specs
from lora_export.layers.new_adapter import ParameterCount, fresh_adapter, read_back, trainable
from lora_export.layers.products import Plain, plain

__all__ = [
    "CONVOLUTIONS",
    "ParameterCount",
    "Plain",
    "Stored",
    "attach",
    "detach",
    "fold",
    "fresh_adapter",
    "plain",
    "read_back",
    "refuse_tied",
    "settle",
    "specs",
    "strength",
    "trainable",
]
