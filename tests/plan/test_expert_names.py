"""Stacked pairs of one projection, under the names of the experts."""

from __future__ import annotations

import numpy as np

from lora_export.lora import Adapter, ExpertAxes, LoraPair
from lora_export.plan.expert_names import per_expert


def stacked(*parameters: str, axes: ExpertAxes = ExpertAxes.OUT_IN) -> Adapter:
    pair = LoraPair(a=np.ones((1, 2)), b=np.ones((3, 1)), scale=1.0, as_stored=True)
    pairs = {f"{parameter}[{expert}]": pair for parameter in parameters for expert in range(2)}
    return Adapter(
        "ad", "peft", {**pairs, "fc": pair}, experts=dict.fromkeys(parameters, axes), spelling={parameters[0]: "key"}
    )


def test_each_family_of_names_is_tried():
    mixtral, others = per_expert(stacked("m.experts.w1", "m.experts.down_proj"))
    assert list(mixtral.pairs) == ["m.experts.0.w1", "m.experts.1.w1", "m.experts.0.w2", "m.experts.1.w2", "fc"]
    assert list(others.pairs)[1:3] == ["m.experts.1.gate_proj", "m.experts.0.down_proj"]
    assert not mixtral.pairs["m.experts.0.w1"].as_stored and mixtral.pairs["fc"].as_stored
    assert mixtral.spelled("m.experts.1.w1") == "key" and not mixtral.experts


def test_a_stacked_parameter_is_no_projection():
    assert not list(per_expert(stacked("m.experts.gate_up_proj")))
    assert not list(per_expert(stacked("m.experts.down_proj", axes=ExpertAxes.BY_CLASS)))
    (kept, _) = per_expert(stacked("m.experts.w3", "m.experts.gate_up_proj"))
    assert list(kept.experts) == ["m.experts.gate_up_proj"] and "m.experts.gate_up_proj[0]" in kept.pairs
