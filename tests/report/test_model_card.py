"""The README.md of a trained adapter."""

from __future__ import annotations

import json
from typing import Any

import yaml

from lora_export.report.model_card import model_card


def facts(**changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"base": "owner/model", "base_sha256": "ab", "data": "texts.jsonl", "data_sha256": "cd"}
    known |= {
        "base_quantization": "",
        "examples": "9 examples",
        "adapter": {"r": 4},
        "settings": {"learning rate": 0.001},
    }
    return known | {"figures": {"held out": "loss 0.3"}, "versions": {"torch": "2.10"}, "plot": ""} | changes


def test_a_card_has_a_header_for_the_hub_and_every_fact() -> None:
    _, header, text = model_card(facts()).split("---\n", 2)
    assert yaml.safe_load(header) == {"base_model": "owner/model", "library_name": "peft", "tags": ["lora"]}
    for row in ("| SHA-256 of the data | `cd` |", "| r | `4` |", "| learning rate | `0.001` |", "| torch | `2.10` |"):
        assert row in text.splitlines()


def test_a_plot_is_shown_below_the_figures() -> None:
    with_plot, without = model_card(facts(plot="losses.png")), model_card(facts())
    assert "| held out | `loss 0.3` |\n\n![The loss of each step](losses.png)\n\n## Versions" in with_plot
    assert "![" not in without


def test_a_base_in_4_bits_is_named() -> None:
    card = model_card(facts(base_quantization="2 layers in 4 bits"))
    assert "| quantisation of the base | `2 layers in 4 bits` |" in card
    assert "quantisation" not in model_card(facts())


def test_no_name_leaves_its_cell_or_the_header() -> None:
    name = 'x"\n---\n# no | `code`'
    card = model_card(facts(base=name))
    (line,) = card.splitlines()[1:2]
    assert line == f"base_model: {json.dumps(name)}" and yaml.safe_load(line) == {"base_model": name}
    assert "| base | `x\" --- # no \\| 'code'` |" in card
