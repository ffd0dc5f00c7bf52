"""What tests compare of the weights that are found in a graph."""

from __future__ import annotations

from lora_export.graph.find_sites import Sites
from lora_export.graph.site import NameSource
from lora_export.plan import Layout, TensorSpec


def specs(found: Sites) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in found.specs}


def named_by(found: Sites) -> dict[str, NameSource]:
    return {site.name: site.named_by for site in found.linear}


def layouts(found: Sites) -> dict[str, tuple[tuple[int, ...], Layout]]:
    return {name: (spec.shape, spec.layout) for name, spec in specs(found).items()}
