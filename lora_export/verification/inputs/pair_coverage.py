"""Whether the inputs reach every pair of the adapters: a fault in a pair that no input reaches cannot show."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lora_export import layers
from lora_export.layers.adapted_layers import Branch, attachment_of, is_attached
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import ModuleRunner

SHOWN_PAIRS = 5


def doubts_on_pairs(attached: nn.Module, cases: Mapping[str, Arrays], computed: Collection[Branch]) -> list[str]:
    """One message where pairs were computed in no case: those of an image tower without images, or of a rare expert.

    `attached` is the module with its adapters. `computed` are the branches that a run of it computed. Where it is
    empty (PyTorch ran with merged weights), `attached` itself runs all cases.
    """
    every = [branch for owner in attached.modules() if is_attached(owner) for branch in attachment_of(owner).branches]
    if every and not computed:
        with layers.recorded_branches() as found:
            for arrays in cases.values():
                ModuleRunner(attached).run(arrays)
        computed = found
    unreached = [branch.module for branch in every if branch not in computed]
    if not unreached:
        return []
    more = f" and {len(unreached) - SHOWN_PAIRS} more" if len(unreached) > SHOWN_PAIRS else ""
    return [
        f"no input reaches {', '.join(unreached[:SHOWN_PAIRS])}{more}: {len(unreached)} of the {len(every)} pairs of "
        "the adapters were not computed. Give inputs that reach them (--inputs)"
    ]
