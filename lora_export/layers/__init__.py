"""A plan over an nn.Module: attach its adapters as branches, or fold them into the weights."""

from lora_export.layers.attaching import attach, detach, scale_adapters, switched_branches, without_branches
from lora_export.layers.attachments import MatrixWeight, find_matrix_weights, recorded_branches
from lora_export.layers.folding import (
    fold,
    has_changed_ties,
    refuse_tied,
    untie,
    with_shared_ties,
    with_tied_rows,
)
from lora_export.layers.frozen_linear import compute_in_input_dtype, four_bit_layers
from lora_export.layers.materialising import (
    ParameterCount,
    Rounding,
    count_parameters,
    materialise,
    read_back,
    refuse_trainable_base,
    widen_trained,
)
from lora_export.layers.module_tensors import CONVOLUTION_TYPES, respelled_for, specs, state_layouts, with_loaded_names
from lora_export.layers.new_adapter import create_adapter, full_rank_layers, tensors_of

__all__ = [
    "CONVOLUTION_TYPES",
    "MatrixWeight",
    "ParameterCount",
    "Rounding",
    "attach",
    "compute_in_input_dtype",
    "count_parameters",
    "create_adapter",
    "detach",
    "find_matrix_weights",
    "fold",
    "four_bit_layers",
    "full_rank_layers",
    "has_changed_ties",
    "materialise",
    "read_back",
    "recorded_branches",
    "refuse_tied",
    "refuse_trainable_base",
    "respelled_for",
    "scale_adapters",
    "specs",
    "state_layouts",
    "switched_branches",
    "tensors_of",
    "untie",
    "widen_trained",
    "with_loaded_names",
    "with_shared_ties",
    "with_tied_rows",
    "without_branches",
]
