"""The names of weights in transformers, as data: which rules rename them, and which modules a model is made of.

`make names` runs this file: it writes `transformers.json` and `modules.json` of `lora_export.names` from the installed
transformers. `tests/names/test_table.py` compares them with `derive_table()` and `derive_modules()`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lora_export.names.table import MODULES, PATH

# Classes that a part of a composite model is built as, by the type in the part's config: one table for each head.
AUTO_TABLES = {
    "model": modeling_auto.MODEL_MAPPING_NAMES,
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq_lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "backbone": modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}
# Renames that are not a substitution by a pattern.
KINDS = {GroupWeightRename: "group", Inkling2IndexOffsetWeightRename: "offset", LayerPairCollapse: "layer pairs"}
_RESNET = {"model_type": "resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_OF_TIMM = {"use_timm_backbone": False, "backbone_config": _RESNET}
_OF_THREE = _OF_TIMM | {"backbone_config": _RESNET | {"out_features": ["stage2", "stage3", "stage4"]}}
# What the config of a type needs besides its defaults, so that its classes can be built without further packages.
NEEDED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "table-transformer"), _OF_TIMM),
    "deformable_detr": _OF_THREE,
    **{name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{name: {"vocabulary_map": {"<image>": 4}} for name in ("chameleon", "emu3")},
    **{name: {"prediction_length": 4} for name in ("informer", "autoformer", "time_series_transformer")},
    **{name: {"vocab_size": 32} for name in ("wav2vec2-bert", "wav2vec2-conformer")},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 48},
    "reformer": {"is_decoder": True},
}
TRANSIENT = {"num_shards_attribute": None, "check_dims": False, "inverse": False, "subconfig_key": None}


def derive_table() -> dict[str, Any]:
    """The table as it would be written from the installed transformers. Builds every model once, without memory."""
    rules = derive_rules()
    classes, unbuilt, ties, by_default, bound = {}, [], {}, [], []
    tied_where: dict[str, list[str]] = {name: [] for name in TIED_WHERE}
    modules: dict[str, dict[str, ClassModules]] = {}
    for cls in model_classes():
        try:
            model = build(cls)
        except Exception:  # noqa: BLE001  a class whose default config cannot be built: its parts are unknown
            unbuilt.append(cls.__name__)
            continue
        found = describe(model, rules)
        if found is not None:
            classes[cls.__name__] = found
        is_default = ties_by_default(model)  # before `tied_names`, which changes the config
        if tied := tied_names(model):
            ties[cls.__name__] = tied
            for name, is_tied in TIED_WHERE.items():
                tied_where[name] += [cls.__name__] if is_tied(model) else []
            by_default += [cls.__name__] if is_default else []
            bound += [cls.__name__] if cannot_untie(model) else []
        modules.setdefault(model.config.model_type, {})[cls.__name__] = modules_of(model)
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
        "tied_by_default": by_default,
        **tied_where,
        "cannot_untie": bound,
        "unbuilt": unbuilt,
        "modules": {kind: found for kind, each in sorted(modules.items()) if (found := own_modules(each))},
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


def ties_by_default(model: PreTrainedModel) -> bool:
    """Whether a model ties its tensors where its config has no `tie_word_embeddings`.

    False where a part that ties tensors has a config of its own: which class that part has is up to the config.
    """
    return not ties_by_part(model) and bool(getattr(model.config, "tie_word_embeddings", False))


def ties_always(model: PreTrainedModel) -> bool:
    """Whether a model ties its tensors even where its config has `tie_word_embeddings` = false."""
    return bool(type(model.config)(tie_word_embeddings=False).tie_word_embeddings)


def ties_by_text(model: PreTrainedModel) -> bool:
    """Whether a model ties its tensors where only the part `text_config` of its config has `tie_word_embeddings`."""
    text = getattr(model.config, "text_config", None)
    if text is None:
        return False
    own = NEEDED.get(model.config.model_type, {})
    text_config = {"model_type": text.model_type, "tie_word_embeddings": True}
    try:
        config = type(model.config)(**own | {"text_config": text_config, "tie_word_embeddings": False})
    except Exception:  # noqa: BLE001  its parts must fit each other
        return False
    return bool(config.tie_word_embeddings)


def ties_by_part(model: PreTrainedModel) -> bool:
    """Whether the configs of its parts decide what a model ties, not its own."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module._tied_weights_keys]
    return any(type(part.config) is not type(model.config) for part in parts)


TIED_WHERE = {"tied_always": ties_always, "tied_by_text": ties_by_text, "tied_by_part": ties_by_part}


def cannot_untie(model: PreTrainedModel) -> bool:
    """Whether a config without `tie_word_embeddings` is another model: T5 and others do not scale their outputs then.

    Some of these ignore the value otherwise: the tensors stay tied.
    """
    parts = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    is_read = any("tie_word_embeddings" in inspect.getsource(part.forward) for part in parts)
    return is_read or ties_always(model)


class ClassModules(NamedTuple):
    """The modules of a class that have weights. `#` stands for a number."""

    own: frozenset[str]  # those outside of its inner model
    inner: frozenset[str]  # those of its inner model, or of a class without one, as the inner model names them
    prefix: str  # of the inner model; empty where the class has none


def modules_of(model: PreTrainedModel) -> ClassModules:
    names = {name.rpartition(".")[0] or name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {re.sub(r"(?<![^.])\d+(?![^.])", "#", name) for name in names}
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or "-") else ""
    inner = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return ClassModules(frozenset(name for name in names if not name.startswith(prefix)), frozenset(inner), prefix)


def own_modules(classes: Mapping[str, ClassModules]) -> dict[str, list[str]]:
    """Class -> the modules that not all classes of its model type have: heads and poolers.

    Numbered modules of an inner model are left out: how many there are is up to a config.
    """
    shared = frozenset.intersection(*(each.inner for each in classes.values()))
    return {
        name: found
        for name, each in classes.items()
        if (found := sorted(each.own | {each.prefix + inner for inner in each.inner - shared if "#" not in inner}))
    }


@functools.cache
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
        return cls(cls.config_class(**NEEDED.get(cls.config_class.model_type, {})) if config is None else config)


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


# --- Modules, from the source of transformers: no model is built ---

MODELS = Path(transformers.__file__).parent / "models"
MODEL_TYPE = re.compile(r'^    model_type\s*(?::[^=]+)?=\s*"([^"]+)"', re.MULTILINE)
EMBEDDINGS = {"nn.Embedding", "torch.nn.Embedding"}
SEVERAL = 3  # folders of transformers
EXPERTS_OF = ("mixtral", "qwen2_moe")  # the types that PEFT knows of those as which transformers converts others
# Names of tables of embeddings in some models, and of linear layers in others, BERT among them.
LINEAR_ELSEWHERE = {"query", "reference_points"}


def derive_modules() -> dict[str, Any]:
    """What `modules.json` has, from the installed transformers."""
    conv1d = with_aliases(conv1d_modules())
    tables, _ = assigned_modules()
    return {
        "transformers": transformers.__version__,
        "model_types": sorted(derived_types()),
        "conv1d": dict(sorted(conv1d.items())),
        "linear_of_these_names": dict(sorted(linear_modules(conv1d).items())),
        "linear": linear_names(),
        "embeddings": sorted(tables - LINEAR_ELSEWHERE),
        "taken_for_experts": {
            name: sorted(each for each, of in conversion_mapping._MODEL_TO_CONVERSION_PATTERN.items() if of == name)
            for name in EXPERTS_OF
        },
    }


def sources(pattern: str) -> Iterator[tuple[str, str]]:
    """The folder and the text of each file of transformers that matches."""
    for path in sorted(MODELS.glob(pattern)):
        yield path.parent.name, path.read_text(encoding="utf-8")


def derived_types() -> set[str]:
    """Every model type of transformers."""
    return declared_types() | set(CONFIG_MAPPING_NAMES)


def declared_types(folder: str = "*") -> set[str]:
    """The types that the configs in a folder of transformers declare."""
    return {name for _, text in sources(f"{folder}/configuration_*.py") for name in MODEL_TYPE.findall(text)}


def conv1d_modules() -> dict[str, list[str]]:
    """Model type -> the attributes to which its source assigns a new `Conv1D(...)`."""
    found: dict[str, set[str]] = {}
    for folder, text in sources("*/modeling_*.py"):
        for node in ast.walk(ast.parse(text)) if "Conv1D" in text else ():
            if _assigned_call(node) == "Conv1D":
                assert isinstance(node, ast.Assign)
                names = {target.attr for target in node.targets if isinstance(target, ast.Attribute)}
                found.setdefault(folder, set()).update(names)
    return {name: sorted(modules) for folder, modules in found.items() for name in declared_types(folder)}


def with_aliases(conv1d: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The same with types that have no class of their own, such as gpt-sw3, which is loaded as GPT-2."""
    classes = {CONFIG_MAPPING_NAMES[name]: name for name in conv1d if name in CONFIG_MAPPING_NAMES}
    return {**conv1d, **{name: conv1d[classes[cls]] for name, cls in CONFIG_MAPPING_NAMES.items() if cls in classes}}


def linear_modules(conv1d: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Model type -> the modules that have a name of a Conv1D, and are linear layers."""
    names = {name for modules in conv1d.values() for name in modules}
    found: dict[str, list[str]] = {}
    for folder, text in sources("*/modeling_*.py"):
        if modules := names & set(re.findall(r"self\.(\w+) = ", text)):
            found |= dict.fromkeys(declared_types(folder) - set(conv1d), sorted(modules))
    return found


def linear_names() -> list[str]:
    """The attributes that are an nn.Linear in SEVERAL folders of transformers, and a Conv1D in none."""
    users: dict[str, set[str]] = {}
    for folder, text in sources("*/modeling_*.py"):
        for name in re.findall(r"self\.(\w+)(?:: [^=\n]+)? = (?:torch\.)?nn\.Linear\(", text):
            users.setdefault(name, set()).add(folder)
    conv1d = {name for modules in conv1d_modules().values() for name in modules}
    return sorted(name for name, folders in users.items() if len(folders) >= SEVERAL and name not in conv1d)


@functools.cache
def assigned_modules() -> tuple[frozenset[str], frozenset[str]]:
    """The attributes to which transformers assigns an nn.Embedding or a class made from it, and a linear layer."""
    tables: set[str] = set()
    linear: set[str] = set()
    for _, text in sources("*/modeling_*.py"):
        nodes = list(ast.walk(ast.parse(text)))
        classes = (node for node in nodes if isinstance(node, ast.ClassDef))
        own = {cls.name for cls in classes if not EMBEDDINGS.isdisjoint(map(ast.unparse, cls.bases))}
        for node in nodes:
            if kind := _assigned_call(node):
                assert isinstance(node, ast.Assign)
                attributes = (target for target in node.targets if isinstance(target, ast.Attribute))
                names = {target.attr for target in attributes if ast.unparse(target.value) == "self"}
                tables |= names if kind in own | EMBEDDINGS else set()
                linear |= names if kind.endswith(("Linear", "Conv1D")) else set()
    return frozenset(tables), frozenset(linear)


def _assigned_call(node: ast.AST) -> str:
    """What a statement calls to assign its result; empty for any other node."""
    is_call = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    return ast.unparse(node.value.func) if is_call else ""


def encoded_modules(modules: Mapping[str, Any]) -> str:
    """The names as paragraphs, so that a new model is a change of a line."""
    parts = []
    for key, value in modules.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + textwrap.indent(_filled(text[1:-1]), "  ") + "\n ]"
        elif isinstance(value, dict):
            text = (
                "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()) + "\n }"
            )
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


# --- The file of rules ---


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
    lines += [f' "{name}": {json.dumps(table[name])},' for name in ("tied_by_default", *TIED_WHERE)]
    lines += [f' "cannot_untie": {json.dumps(table["cannot_untie"])},']
    lines += [f' "unbuilt": {json.dumps(table["unbuilt"])},', ' "modules": {']
    lines += [",\n".join(_encoded_modules(table["modules"])), " }", "}"]
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


def _encoded_modules(modules: Mapping[str, Mapping[str, list[str]]]) -> Iterator[str]:
    """A line for each class, by model type."""
    for model_type, classes in modules.items():
        lines = ",\n   ".join(f"{json.dumps(name)}: {json.dumps(own)}" for name, own in classes.items())
        yield f"  {json.dumps(model_type)}: {{\n   {lines}}}"


def _wrapped(table: Mapping[str, str]) -> str:
    return "{" + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()) + "}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    MODULES.write_text(encoded_modules(derive_modules()), encoding="utf-8")
    PATH.write_text(encoded(derive_table()), encoding="utf-8")
    print(f"wrote {MODULES} and {PATH} from transformers {transformers.__version__}", file=sys.stderr)
