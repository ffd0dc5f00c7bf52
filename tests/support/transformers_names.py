"""The names of weights in transformers, as data: which rules rename them, and which classes a model is made of.

`make names` runs this file: it writes the table of `lora_export.plan.conversion` from the installed transformers.
`tests/plan/conversion/test_table.py` compares that table with `derive_table()`.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    GroupWeightRename,
    Inkling2IndexOffsetWeightRename,
    LayerPairCollapse,
    WeightConverter,
    WeightTransform,
)
from transformers.models.auto import modeling_auto

from lora_export.plan.conversion.table import PATH

# Classes that a part of a composite model is built as, by the type in the part's config: one table for each head.
AUTO_TABLES = {
    "model": modeling_auto.MODEL_MAPPING_NAMES,
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq_lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "backbone": modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}
# Renames that are not a substitution by a pattern.
KINDS = {
    GroupWeightRename: "group",
    Inkling2IndexOffsetWeightRename: "offset",
    LayerPairCollapse: "layer pairs",
}
TRANSIENT = {"num_shards_attribute": None, "check_dims": False, "inverse": False, "subconfig_key": None}


def derive_table() -> dict[str, Any]:
    """The table as it would be written from the installed transformers. Builds every model once, without memory."""
    rules = derive_rules()
    classes, unbuilt, ties, bound = {}, [], {}, []
    for cls in model_classes():
        try:
            model = build(cls)
        except Exception:  # noqa: BLE001  a class whose default config cannot be built: its parts are unknown
            unbuilt.append(cls.__name__)
            continue
        found = describe(model, rules)
        if found is not None:
            classes[cls.__name__] = found
        if tied := tied_names(model):
            ties[cls.__name__] = tied
            bound += [cls.__name__] if cannot_untie(model) else []
    used = {part["class"] for each in classes.values() for part in each["parts"]} | set(classes)
    auto = {name: {key: _only(value) for key, value in table.items()} for name, table in AUTO_TABLES.items()}
    auto = {
        name: {k: v for k, v in table.items() if v in used or v in rules or k in rules} for name, table in auto.items()
    }
    return {
        "transformers": transformers.__version__,
        "rules": rules,
        "classes": classes,
        "auto": auto,
        "ties": ties,
        "cannot_untie": bound,
        "unbuilt": unbuilt,
    }


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """The tensors of a model that `tie_word_embeddings` ties, each with the one whose values it has.

    Empty where layers are tied too: how many there are is up to a config.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.tie_word_embeddings = True
    try:
        found = model.get_expanded_tied_weights_keys(all_submodels=True)
    except ValueError:  # the class ties what its default config lacks
        return {}
    is_numbered = any(part.isdecimal() for names in found.items() for name in names for part in name.split("."))
    return {} if is_numbered else dict(sorted(found.items()))


def cannot_untie(model: PreTrainedModel) -> bool:
    """Whether a config without `tie_word_embeddings` is another model: T5 and others do not scale their outputs then.

    Some of these ignore the value otherwise: the tensors stay tied.
    """
    parts = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    is_read = any("tie_word_embeddings" in inspect.getsource(part.forward) for part in parts)
    return is_read or type(model.config)(tie_word_embeddings=False).tie_word_embeddings


def derive_rules() -> dict[str, list[dict[str, Any]]]:
    """The rules of the installed transformers, by class name or model type."""
    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    return {key: [_rule(one) for one in transforms] for key, transforms in mapping.items()}


def _only(value: Any) -> str:
    return value if isinstance(value, str) else value[0]


def model_classes() -> Iterator[type[PreTrainedModel]]:
    """Every class of transformers that a config can name as its architecture."""
    for name in sorted(dir(transformers)):
        if not name[0].isupper() or name.endswith("PreTrainedModel"):
            continue
        try:
            found = getattr(transformers, name)
        except Exception:  # noqa: BLE001  what needs a package that is not installed
            continue
        if inspect.isclass(found) and issubclass(found, PreTrainedModel) and found.config_class is not None:
            yield found


def build(cls: type[PreTrainedModel], config: Any = None) -> PreTrainedModel:
    """A model of this class without memory for its weights."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return cls(cls.config_class() if config is None else config)


def describe(model: PreTrainedModel, rules: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parts of a model whose names may be renamed; None where there is none.

    A part is (path of the module, its class, its type, where its config is in that of the model).
    """
    parts = []
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        name, model_type = type(module).__name__, getattr(module.config, "model_type", None) or ""
        where = _config_path(model.config, module.config) if path else ""
        is_open = bool(where) and any(name in map(_only, table.values()) for table in AUTO_TABLES.values())
        if path == "" or name in rules or model_type in rules or is_open:
            parts.append({"path": path, "class": name, "type": model_type, "config": where})
    root, *others = parts
    if not others and root["class"] not in rules and root["type"] not in rules:
        return None
    return {"prefix": model.base_model_prefix, "parts": parts}


def _config_path(whole: Any, part: Any) -> str:
    """The keys of the config of a part in that of the whole, joined by dots; empty where it is none of its own."""
    if part is whole:
        return ""
    level = [("", whole)]
    same_type = ""
    while level:
        deeper = []
        for path, config in level:
            for key, value in vars(config).items():
                if isinstance(value, transformers.PretrainedConfig):
                    name = f"{path}.{key}".lstrip(".")
                    if value is part:
                        return name
                    if not same_type and value.model_type == part.model_type:
                        same_type = name  # a copy of it
                    deeper.append((name, value))
        level = deeper
    return same_type


def _rule(transform: WeightTransform) -> dict[str, Any]:
    rule: dict[str, Any] = {"from": list(transform.source_patterns), "to": list(transform.target_patterns)}
    kind = next((name for cls, name in KINDS.items() if isinstance(transform, cls)), None)
    if kind is not None:
        rule["kind"] = kind
    if isinstance(transform, Inkling2IndexOffsetWeightRename):
        rule["offset"] = transform.offset
    if isinstance(transform, WeightConverter):
        rule["operations"] = [_operation(one) for one in transform.operations]
    return rule


def _operation(operation: Any) -> dict[str, Any]:
    fields = {key: value for key, value in vars(operation).items() if TRANSIENT.get(key, ...) != value}
    return {"name": type(operation).__name__, **fields}


# --- The file ---


def encoded(table: Mapping[str, Any]) -> str:
    """One line for each rule, class and type, so that a change of transformers is a change of some lines."""
    lines = ["{", f' "transformers": {json.dumps(table["transformers"])},', ' "rules": {']
    seen: dict[str, str] = {}
    blocks = []
    for key, rules in table["rules"].items():
        text = ",\n   ".join(_encoded_rule(rule) for rule in rules)
        same = seen.setdefault(text, key)
        block = json.dumps(same) if same != key else "[\n   " + text + "]"
        blocks.append(f"  {json.dumps(key)}: {block}")
    lines += [",\n".join(blocks), " },", ' "classes": {']
    lines += [",\n".join(f"  {json.dumps(name)}: {_encoded_class(value)}" for name, value in table["classes"].items())]
    lines += [" },", ' "auto": {']
    lines += [",\n".join(f"  {json.dumps(name)}: {_wrapped(value)}" for name, value in table["auto"].items())]
    lines += [" },", ' "ties": [', ",\n".join(_encoded_ties(table["ties"])), " ],"]
    lines += [f' "cannot_untie": {json.dumps(table["cannot_untie"])},']
    lines += [f' "unbuilt": {json.dumps(table["unbuilt"])}', "}"]
    return "\n".join(lines) + "\n"


def _encoded_rule(rule: Mapping[str, Any]) -> str:
    if set(rule) == {"from", "to"} and len(rule["from"]) == len(rule["to"]) == 1:
        return json.dumps([rule["from"][0], rule["to"][0]])
    return json.dumps(rule)


def _encoded_class(value: Mapping[str, Any]) -> str:
    parts = [[part["path"], part["class"], part["type"], part["config"]] for part in value["parts"]]
    return json.dumps([value["prefix"], *parts])


def _encoded_ties(ties: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The classes by what they tie."""
    classes: dict[str, list[str]] = {}
    for name, tied in ties.items():
        classes.setdefault(json.dumps(tied), []).append(name)
    for tied, names in classes.items():
        yield f"  [{tied},\n   {json.dumps(names)}]"


def _wrapped(table: Mapping[str, str]) -> str:
    return "{" + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()) + "}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PATH.write_text(encoded(derive_table()), encoding="utf-8")
    print(f"wrote {PATH} from transformers {transformers.__version__}", file=sys.stderr)
