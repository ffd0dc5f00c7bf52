"""The README.md of a trained adapter: what it was made from, how, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MODEL_CARD = "README.md"


def model_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown. `facts` has base, base_sha256, data, data_sha256, examples, adapter, settings, figures,
    versions; base_quantization, or ""; and plot: the name of an image, or "". Tables are by name; names from outside
    are written as JSON strings in the header, and as code below.
    """
    header = ["---", f"base_model: {json.dumps(facts['base'])}", "library_name: peft", "tags: [lora]", "---"]
    made_from = {
        "base": facts["base"],
        "SHA-256 of all weights before training": facts["base_sha256"],
        **({"quantisation of the base": quantised} if (quantised := facts["base_quantization"]) else {}),
        "data": facts["data"],
        "SHA-256 of the data": facts["data_sha256"],
        "examples": facts["examples"],
    }
    sections = [("Made from", made_from), ("Adapter", facts["adapter"]), ("Training", facts["settings"])]
    sections += [("Figures", facts["figures"]), ("Versions", facts["versions"])]
    lines = [*header, "", "# A LoRA adapter", "", "Trained by `lora-export train`; PEFT loads this folder."]
    for title, table in sections:
        rows = [f"| {name} | {_code(value)} |" for name, value in table.items()]
        lines += ["", f"## {title}", "", "| | |", "|---|---|", *rows]
        if title == "Figures" and facts["plot"]:
            lines += ["", f"![The loss of each step]({facts['plot']})"]
    return "\n".join(lines) + "\n"


def _code(value: Any) -> str:
    """A value as code in a cell. A pipe would end the cell, a backtick the code, a line break the row."""
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""
