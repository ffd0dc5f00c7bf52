"""Every runtime has one file of rules, and one row of this table: what repairs each of the adapters for it."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_export
from lora_export.lora import Adapter, LoraPair
from lora_export.options.adapters import RUNTIMES
from lora_export.preflight.facts import (
    OF_ADAPTER,
    OF_BASE,
    OF_CHANGE,
    Base,
    facts_of_adapter,
    facts_of_base,
    facts_of_changes,
)
from lora_export.preflight.rules import (
    COMPARISONS,
    EFFECTS,
    SETTING,
    RuntimeRule,
    findings_of,
    repairs,
    runtime_named,
    runtimes,
)
from support.gguf_files import llama
from support.preflight_adapters import CASES

FACTS = OF_ADAPTER | OF_CHANGE | OF_BASE
WHOLE = ("head saved whole", "table saved whole", "norm saved whole", "layer norms saved whole", "rows of tokens")
TWO_RANKS = ("rslora of two ranks", "both patterns")


@dataclass(frozen=True)
class Row:
    """The repairs of most adapters, and those of the others."""

    most: tuple[str, ...]
    others: Mapping[tuple[str, ...], tuple[str, ...]]

    def of(self, case: str) -> tuple[str, ...]:
        return next((repairs for repairs, cases in self.others.items() if case in cases), self.most)


TABLE = {
    "comfyui": Row(("comfyui",), {("merge",): ("dora", "rows of tokens", "ia3", "vera")}),
    "diffusers": Row(
        ("diffusers",),
        {("merge",): (*WHOLE, "embedding", "tied embedding", "head", "tied head", "loha", "lokr", "ia3", "vera")},
    ),
    "genai": Row(("graph",), {("export",): (*WHOLE, "ia3"), ("fold", "graph"): ("loha", "lokr")}),
    "llama.cpp": Row(
        ("gguf",),
        {
            ("merge",): (*WHOLE, *TWO_RANKS, "dora", "ia3"),
            ("fold", "gguf"): ("alpha pattern", "loha", "lokr"),
            ("merge-untied",): ("tied embedding", "tied head"),
        },
    ),
    "mlx": Row(
        ("mlx",),
        {
            ("merge",): (*WHOLE, *TWO_RANKS, "rank pattern", "ia3"),
            ("merge-untied",): ("tied embedding", "tied head"),
            ("fold", "mlx"): ("alpha pattern", "loha", "lokr"),
        },
    ),
    "ollama": Row(
        ("gguf",),
        {
            (): ("v alone", "a pattern as targets", "mlp", "up alone"),
            ("merge",): (*WHOLE, *TWO_RANKS, "dora", "ia3"),
            ("fold", "gguf"): ("alpha pattern", "loha", "lokr"),
            ("merge-untied",): ("tied embedding", "tied head"),
        },
    ),
    "openvino": Row(
        (),
        {
            ("openvino",): (
                *("alpha 10", "a fraction as alpha", "mlp", "rslora", "rslora of two ranks", "rank pattern"),
                "alpha pattern",
            ),
            ("fold",): ("loha", "lokr"),
            ("merge",): (*WHOLE[2:], "dora", "embedding", "tied embedding", "ia3", "vera"),
            ("peft",): ("pickle",),
        },
    ),
    "sglang": Row(
        (),
        {
            ("merge",): (
                *(*WHOLE, *TWO_RANKS, "no v", "v alone", "up alone", "rank pattern", "dora", "added token"),
                *("ia3", "vera"),
            ),
            ("fold",): ("rslora", "alpha pattern", "loha", "lokr"),
            ("peft",): ("a pattern as targets",),
        },
    ),
    "tensorrt-llm": Row(
        (),
        {
            ("merge",): (*WHOLE, "both patterns", "embedding", "tied embedding", "head", "tied head", "ia3", "vera"),
            ("fold",): ("alpha pattern", "loha", "lokr"),
            ("setting max-lora-rank",): ("rank 520",),
        },
    ),
    "vllm": Row(
        (),
        {
            ("merge",): (*WHOLE, "dora", "ia3", "vera"),
            ("fold",): ("declared bias", "loha", "lokr"),
            ("names-vllm",): ("other prefix",),
            ("resize-512",): ("rank 520",),
            ("setting max-lora-rank",): ("rank 32",),
        },
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The bases of the adapters, with tables of their own and tied."""
    folders = {tied: tmp_path_factory.mktemp("base") for tied in (False, True)}
    for tied, folder in folders.items():
        llama(tied=tied).save_pretrained(folder)
    return folders


@pytest.mark.parametrize("case", CASES)
def test_what_repairs_an_adapter_for_each_runtime(case: str, bases: Mapping[bool, Path], tmp_path: Path) -> None:
    CASES[case].write(tmp_path / "a")
    reading = lora_export.ReadOptions(allow_pickle=True)
    found = lora_export.check(tmp_path / "a", runtimes=RUNTIMES, base=bases[CASES[case].tied], reading=reading)
    named = {one.runtime: tuple(repair.name for repair in one.repairs) for one in found.outcomes}
    assert named == {runtime: TABLE[runtime].of(case) for runtime in RUNTIMES}
    assert not any(outcome.unknown for outcome in found.outcomes)


def test_each_runtime_has_a_row_of_known_cases() -> None:
    assert tuple(sorted(TABLE)) == RUNTIMES
    assert {case for row in TABLE.values() for cases in row.others.values() for case in cases} <= CASES.keys()


def test_rules_use_known_facts_and_all_of_them() -> None:
    rules = [rule for runtime in runtimes().values() for rule in runtime.rules]
    assert {fact for rule in rules for fact in rule.when} == FACTS.keys()
    assert {operation for rule in rules for wanted in rule.when.values() for operation in wanted} == COMPARISONS.keys()


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_rule_states_its_effect_source_and_repair(name: str) -> None:
    runtime = runtime_named(name)
    assert runtime.title and "/" in runtime.repository and runtime.version and runtime.proof
    for rule in runtime.rules:
        fields = {field for _, field, _, _ in string.Formatter().parse(rule.does) if field}
        assert fields <= FACTS.keys() | runtime.settings.keys(), rule
        assert rule.effect in EFFECTS and "." in rule.source and rule.does.endswith((".", "'", '"'))
        setting = rule.repair.removeprefix(SETTING)
        assert setting in (runtime.settings if rule.repair.startswith(SETTING) else repairs()), rule


def test_the_facts_of_an_adapter_are_the_closed_set() -> None:
    case = Adapter(name="a", format="peft", pairs={}, replaced={"lm_head.weight": None})  # type: ignore[dict-item]
    base = Base(tensors=frozenset({"lm_head.weight"}))
    assert facts_of_adapter(case, {}, None, base).keys() == OF_ADAPTER.keys()
    assert facts_of_base(case, base).keys() == OF_BASE.keys() == facts_of_base(case, None).keys()
    (facts,) = facts_of_changes(case, {}, base).values()
    assert facts.keys() == OF_CHANGE.keys() and facts["in_base"] and facts["repeats_base"] is False


@pytest.mark.parametrize(
    ("name", "found"), [("encoder.q", True), ("bert.encoder.q", True), ("q", False), ("a.bert.encoder.q", False)]
)
def test_a_bare_models_names_lack_a_part(name: str, found: bool) -> None:
    base = Base(tensors=frozenset({"encoder.q.weight"}))
    pair = LoraPair(a=np.ones((1, 2)), b=np.ones((2, 1)), scale=1.0)
    (facts,) = facts_of_changes(Adapter(name="a", format="peft", pairs={name: pair}), {}, base).values()
    assert facts["in_base"] is found


@pytest.mark.parametrize(
    ("wanted", "value", "holds"),
    [
        ({"is": 4}, 4, True),
        ({"is_not": 4}, 4, False),
        ({"in": ["a"]}, "a", True),
        ({"not_in": ["a"]}, "a", False),
        ({"above": 4}, 4, False),
        ({"above": 4, "up_to": 8}, 8, True),
        ({"above": "limit"}, 17, True),
        ({"above": "limit"}, 16, False),
        ({"above": "stated"}, 16, None),
        ({"lacks": "v"}, ("q", "k"), True),
        ({"matches": "e.*s$"}, "experts", True),
        ({"matches_not": "^x"}, "experts", True),
        ({"is": 4}, None, None),
        ({"is_not": 4}, None, None),
    ],
)
def test_a_condition(wanted: Any, value: Any, holds: bool | None) -> None:
    rule = RuntimeRule({"rank": wanted}, "refused", "It is.", "x.py", "merge")
    assert rule.holds({"rank": value}, {"limit": 16, "stated": None}) is holds


def test_one_false_condition_decides_beside_an_unknown_one() -> None:
    rule = RuntimeRule({"rank": {"is": 4}, "tied": {"is": True}}, "refused", "It is.", "x.py", "merge")
    assert rule.holds({"rank": 8, "tied": None}, {}) is False
    assert rule.holds({"rank": 4, "tied": None}, {}) is None


def test_a_setting_is_the_least_value_that_is_enough() -> None:
    vllm = runtime_named("vllm")
    facts = dict.fromkeys(FACTS) | {"format": "peft", "declared_rank": 33}
    refused, fits = (findings_of(vllm, facts, {}, settings, {}) for settings in ({}, {"max-lora-rank": 64}))
    assert [repair.text for repair in refused.repairs] == ["vllm serve --max-lora-rank 64"]
    assert refused.repairs[0].settings == {"max-lora-rank": 64} and not fits.findings
    assert "rank 33 is greater than max_lora_rank 16" in refused.findings[0].does


@pytest.mark.parametrize(
    ("key", "repairs"), [("q_proj.lora_A.default.weight", ["names-vllm"]), ("q_proj.lora_A.weight", [])]
)
def test_vllm_takes_no_keys_with_the_name_of_an_adapter(key: str, repairs: list[str]) -> None:
    changes = {"q": dict.fromkeys(FACTS) | {"part": "pair", "key": key, "in_base": True}}
    facts = dict.fromkeys(FACTS) | {"format": "peft", "declared_rank": 4}
    outcome = findings_of(runtime_named("vllm"), facts, changes, {}, {})
    assert [repair.name for repair in outcome.repairs] == repairs


def test_a_rule_that_needs_the_base_is_named_without_one() -> None:
    vllm = dataclasses.replace(runtime_named("vllm"), rules=runtime_named("vllm").rules[-1:])
    changes = {"q": dict.fromkeys(FACTS) | {"part": "pair"}, "head": dict.fromkeys(FACTS) | {"part": "whole"}}
    outcome = findings_of(vllm, dict.fromkeys(FACTS), changes, {}, {})
    assert outcome.unknown == ("in_base",) and not outcome.findings
