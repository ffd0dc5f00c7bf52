"""Which pair of an adapter changes which weight of a base.

A plan is a value. It is made from adapters and from the names and shapes of a base, and does not know what holds the
weights: a checkpoint, a module and a graph each offer `TensorSpec`s and carry out the plan (see `lora_export.sums`).

    types.py               Layout, LayoutSource, TensorSpec, Term, Step, Plan
    build.py               make: adapters and specs in, a Plan out, or one error with every misfit
    spelling.py            in which generation of names an adapter is spelled, and the base's names of its tensors
    attempts.py            the ways to read its names
    converted_attempts.py  those in which it has the names of another layout, or of the loaded model
    placing.py             where the entries of its tensors are in the base
    experts.py             the pairs of experts, as the base has these
    stored_region.py       a part of a stored tensor
    match_names.py         the names of an adapter and of a base: prefixes, nearest names, layers without tensors
    layouts.py             how a matrix is stored where the base does not state it: by option, adapter or shape
    match_tensors.py       shapes and dtypes: why a tensor of an adapter does not fit the base's, or two conflict on it
    own_heads.py           whole layers that adapters bring, where rows of a batch choose them
    ties.py                tied tensors of which an adapter changes one: untied, or changed together
"""

from lora_export.plan.build import make
from lora_export.plan.stored_region import StoredRegion
from lora_export.plan.ties import Tied, Ties
from lora_export.plan.types import FLOATS, Layout, LayoutSource, Plan, Step, TensorSpec, Term, are_same_change

__all__ = [
    "FLOATS",
    "Layout",
    "LayoutSource",
    "Plan",
    "Step",
    "StoredRegion",
    "TensorSpec",
    "Term",
    "Tied",
    "Ties",
    "are_same_change",
    "make",
]
