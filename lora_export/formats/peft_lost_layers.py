"""Layers of an adapter that PEFT (up to 0.21) does not find when it loads it into a model of transformers 5.

It renames the targets and the tensors of an adapter by what transformers does to a checkpoint, where experts have
tensors of their own. A dense layer of the same name is taken for an expert, and a name of the loaded model may be
renamed once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lora_export.errors import count
from lora_export.names.architecture import RenameRule
from lora_export.names.table import TAKEN_FOR_EXPERTS, read_table

# The last parts of the names of expert layers, in the models that transformers converts as this type
EXPERT_LAYERS = {"qwen2_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w2", "w3")}
OF_ONE_EXPERT = ".experts."


def notes_on_lost_layers(names: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """A note on each way in which PEFT loses layers with these names in a model of this config."""
    model_type = str(config.get("model_type"))
    kind = next((kind for kind, types in TAKEN_FOR_EXPERTS.items() if model_type in types), "")
    endings = EXPERT_LAYERS.get(kind, ())
    notes = []
    if lost := [name for name in names if name.rpartition(".")[2] in endings and OF_ONE_EXPERT not in name]:
        notes.append(
            f"PEFT up to 0.21 takes {count(len(lost), 'layer')}, such as {lost[0]}, for experts of this model: it "
            "leaves out their A and B, or does not load the adapter. lora-export merges and exports them as they were "
            "trained"
        )
    rules = read_table().rules.get(model_type, ())
    renames = [RenameRule.of(rule, None, "") for rule in rules if not rule.get("operations") and not rule.get("kind")]
    if lost := [name for name in names if any(_gets_two_dots(name, rule) for rule in renames)]:
        notes.append(
            f"PEFT up to 0.21 looks for {count(len(lost), 'layer')}, such as {lost[0]}, under names with two dots, and "
            "leaves out their A and B. lora-export merges and exports them as they were trained"
        )
    return tuple(notes)


def _gets_two_dots(name: str, rule: RenameRule) -> bool:
    """Whether a rule renames the name of a loaded model's layer to one that no model has."""
    renamed = rule.rename(f"{name}.")
    return renamed is not None and ".." in renamed.name
