"""The layers of a model by kind."""

from __future__ import annotations

import pytest

from lora_export.report.layer_kinds import by_kind, kind_of, title


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder.layer.11.attention.query", "encoder.layer.*.attention.query"),
        ("0.weight", "*.weight"),
        ("h.0.1", "h.*.*"),
        ("h.0.experts.up_proj[12]", "h.*.experts.up_proj[*]"),
        ("h.0.experts.up_proj[3, 0:16]", "h.*.experts.up_proj[*, 0:16]"),
        ("layer1.conv2", "layer1.conv2"),
        ("fc", "fc"),
    ],
)
def test_numbers_between_dots_are_those_of_layers(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_items_of_one_kind_and_look_are_a_group() -> None:
    shapes = {"h.0.fc": 3, "h.0.out": 3, "h.1.fc": 3, "h.2.fc": 4}
    groups = by_kind(shapes, str, lambda name: shapes[name])
    assert groups == [["h.0.fc", "h.1.fc"], ["h.0.out"], ["h.2.fc"]]
    assert [title(group) for group in groups] == ["h.*.fc", "h.0.out", "h.2.fc"]


def test_flattened_names_are_grouped_by_the_numbers_between_underscores():
    assert (
        kind_of("denoiser/down_blocks_1_attentions_0_attn1_to_out_0")
        == "denoiser/down_blocks_*_attentions_*_attn1_to_out_0"
    )
    assert kind_of("time_embed.linear_1") == "time_embed.linear_1"
