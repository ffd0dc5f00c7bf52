"""The HTML report: it shows what the document contains, and a name in it stays text."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.report import plots
from lora_export.report.files import write_report
from lora_export.report.files.page import html_page
from lora_export.report.json_document import document_of_proof
from lora_export.runtime.runner import Placement
from lora_export.verification import against_checkpoint, parity
from lora_export.verification.parity import Verdict, judge
from lora_export.verification.proof import Proof
from support.verdicts import ABOUT, AS_DOCUMENT, DIFFERENT, LAYERS, NOTHING, ON_CPU, SAME, STRAYED, UNDECIDED, case


class Read(HTMLParser):
    """The elements of a page, and its visible text. Raises where an element is not closed."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.title = ""
        self.style = ""
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.seen))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.title += data if "svg" not in self.open else ""
        elif self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.seen.append(data)

    def of(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [
            a for name, a in self.elements if name == tag and set(css.split()) <= set((a.get("class") or "").split())
        ]


def read(verdict: Verdict, placement: Any = None, about: Any = ABOUT, diagnosis: Any = None) -> Read:
    return Read(html_page(document_of_proof(Proof(verdict, placement, about, diagnosis=diagnosis))))


# --- Verdicts ---


def test_page_has_verdict_figures_and_how_to_repeat_it() -> None:
    text = read(SAME, ON_CPU).text
    lead = "✓ same out/model.onnx computes the same as models/base with its adapter “english” attached."
    assert lead in text
    assert "1 × 2 outputs × cases compared 0.39 % largest error, relative to the adapter's effect" in text
    assert "× 2 PyTorch's own error, at most" in text and "142 of 142 compute nodes on CPUExecutionProvider" in text
    assert "0.25 PyTorch 0.125" in text and "-0.25 , not 0" in text.replace("-0.25,", "-0.25 ,")
    assert "adapter off the model without its adapters detected in 2 of 2 comparisons detected" in text
    assert "scale × 1.1 the model with every adapter scale × 1.1 detected in 2 of 2" in text
    assert "input ids changing it changes the candidate's outputs, as it changes those of PyTorch used" in text
    assert "lora-export verify model.onnx --report 'a name.html'" in text
    for fact in ("model.onnx.data", "cd" * 32, "ef" * 32, "12" * 32, "adapter, × 0.5", "2.13.0", "ids 2 x 300"):
        assert fact in text, fact
    assert "The layers were not compared in this run." in text
    assert "Why" not in text


def test_title_has_outcome_and_file_name() -> None:
    assert read(DIFFERENT).title == "different: model.onnx – lora-export verify"
    assert read(SAME, about={}).title == "same – lora-export verify"


def test_reason_is_shown_once_for_all_cases() -> None:
    page = read(judge([case(1.0, name="a"), case(1.0, name="b")]))
    assert "out/model.onnx does not compute the same as models/base" in page.text
    assert page.text.count("the error is 1, allowed is 0.25") == 1
    assert "logits in case a , and in 1 more" in page.text.replace("a,", "a ,")


def test_why_begins_with_the_diagnosis() -> None:
    page = read(DIFFERENT, diagnosis=AS_DOCUMENT)
    explanation = "The first module that differs is encoder.1. its adapter's scale, 2, is applied twice"
    assert f"Why {explanation} 3 of 3 modules were compared" in page.text
    assert page.text.index(explanation) < page.text.index("the error is 1, allowed is 0.25")
    assert page.text.count("is applied twice") == 1
    assert len(page.of("p", "first")) == 1


def test_diagnosis_of_same_is_beside_the_layers() -> None:
    text = read(SAME, diagnosis={"first": None, "why": "every module is within its limits", "layers": []}).text
    assert "Error per layer No compared module differs. every module is within its limits" in text


def test_layers_are_plotted_and_listed() -> None:
    page = read(DIFFERENT, diagnosis=AS_DOCUMENT)
    assert len(page.of("circle", "error")) == 2 * len(plots.WIDTHS), "null is no point"
    assert len(page.of("circle", "effect")) == len(plots.WIDTHS), "0 has no logarithm"
    assert "first to differ" in page.text and "3 layers in execution order" in page.text


def test_undecided_shows_what_would_decide_it() -> None:
    text = read(UNDECIDED).text
    assert "This check could not decide whether out/model.onnx computes the same as models/base" in text
    assert "What would decide it: an atol= below 64 with rtol=0, or no tolerance" in text
    assert "not in logits, case 2 x 300: off by 63.8 not detected" in text
    assert "nothing was compared" in read(NOTHING).text


def test_frozen_inputs_and_nodes_elsewhere_are_named() -> None:
    text = read(DIFFERENT, STRAYED).text
    assert (
        "input mask changing it changes the outputs of PyTorch and not the candidate's replaced by a constant" in text
    )
    assert "/layer.141/MatMul (MatMul) ran on CPUExecutionProvider" in text


def test_agreement_is_shown_for_class_scores_alone() -> None:
    assert "top-1 agreement" not in read(SAME).text, "no class leads by more than PyTorch's error"
    truth = np.eye(30)
    logits = parity.Case(
        "rows", "x [30]", *({"logits": x} for x in (truth, truth.astype(np.float32), truth.astype(np.float32))),
        base={"logits": -truth}, scaled={"logits": 2 * truth},
    )  # fmt: skip
    assert "100 % top-1 agreement, at least" in read(judge([logits])).text
    embeddings = dataclasses.replace(logits, **{run: {"embeds": getattr(logits, run)["logits"]} for run in RUNS})
    assert "top-1" not in read(judge([embeddings])).text


RUNS = ("reference", "deployed", "candidate", "base", "scaled")


def test_long_case_names_are_wrapped_in_their_column() -> None:
    """Case names of `--lora rows` are long: unbroken, they pushed the last column out of the page."""
    name = "mixed batches, batch 3 x sequence 16, adapters 1, 2, 0"
    page = read(judge([case(name=name)]))
    assert name in page.text and len(page.of("table", "cases")) == 1
    rules = dict(re.findall(r"\n\s*([^{}\n]*tbody th) \{ ([^}]*)\}", page.style.replace("; } ", "; }\n")))
    assert "overflow-wrap: anywhere" in rules["tbody th"]
    assert "max-width" in rules["table.cases tbody th"]
    assert "nowrap" not in rules["tbody th"] + rules["table.cases tbody th"]


@pytest.mark.parametrize("verdict", [SAME, DIFFERENT, UNDECIDED, NOTHING], ids=lambda verdict: str(verdict.outcome))
def test_page_loads_nothing_and_runs_nothing(verdict: Verdict) -> None:
    page = html_page(document_of_proof(Proof(verdict, ON_CPU, ABOUT, diagnosis=AS_DOCUMENT)))
    found = Read(page)
    assert {"script", "link", "img", "iframe", "object", "a", "form"}.isdisjoint(tag for tag, _ in found.elements)
    attributes = [(name, value or "") for _, attrs in found.elements for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    policy = next(meta for meta in found.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "max-width: 640px" in page


HOSTILE = "<script>alert(1)</script>\"' onload=x {{ 7*7 }} \x1b[2J\ud800"
SHOWN = "<script>alert(1)</script>\"' onload=x {{ 7*7 }} \\x1b[2J\\ud800"


def test_hostile_name_is_text_everywhere(tmp_path: Path) -> None:
    verdict = judge([case(1.0, name=HOSTILE, output=HOSTILE)], sensitivity=[parity.Sensitivity(HOSTILE, True, False)])
    about = {
        **ABOUT,
        "candidate": {"path": HOSTILE, "sha256": {HOSTILE: "0" * 64}},
        "model": {"source": HOSTILE, "sha256": HOSTILE},
        "adapters": [{"name": HOSTILE, "sha256": HOSTILE, "weight": 1.0}],
        "inputs": {HOSTILE: {HOSTILE: [1]}},
        "command": [HOSTILE],
        HOSTILE: HOSTILE,
    }
    placement = Placement("CPUExecutionProvider", {HOSTILE: ((HOSTILE, "MatMul"),)}, {"a": HOSTILE}, HOSTILE)
    diagnosis: Any = {"first": HOSTILE, "why": HOSTILE, "layers": [{**LAYERS[1], "name": HOSTILE}]}
    write_report(tmp_path / "page.html", Proof(verdict, placement, about, diagnosis=diagnosis))
    page = Read((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.text.count(SHOWN) > 15
    assert "49" not in page.text.split("Error per layer")[1].split("Could this")[0]


# --- Checkpoints ---


SUM = against_checkpoint.AuditedWeight(
    "layers.0.weight", against_checkpoint.Fate.CHANGED, parity.Outcome.SAME, elements=1200, error=0.25,
    controls={"english left out": True, "english × 1.1": False}, relative_change=0.125, retention=0.998, noise=0.0625,
    worst=parity.WorstElement((3, 14), 0.5, 0.4375),
)  # fmt: skip
WRONG = dataclasses.replace(
    SUM, name="layers.1.weight", outcome=parity.Outcome.DIFFERENT, why="it is the sum with english × 1.1", off=7,
    error=math.inf, retention=math.nan, worst=parity.WorstElement((0, 1), math.nan, -math.inf),
)  # fmt: skip
KEPT = against_checkpoint.AuditedWeight("norm.weight", against_checkpoint.Fate.KEPT, parity.Outcome.SAME, elements=40)


AUDITED = {**ABOUT, "candidate": "merged", "base": "base", "command": ["lora-export", "verify", "merged"]}


def audited(*weights: against_checkpoint.AuditedWeight, about: Any = AUDITED) -> Read:
    is_wrong = any(weight.outcome is parity.Outcome.DIFFERENT for weight in weights)
    outcome = parity.Outcome.DIFFERENT if is_wrong else parity.Outcome.SAME
    return Read(html_page(document_of_proof(against_checkpoint.Audit(outcome, weights, about=about))))


def test_audit_has_the_figures_of_every_weight() -> None:
    page = audited(SUM, KEPT)
    assert "Every weight of merged is the sum of base and its adapter “english”, to the last rounding." in page.text
    assert "2 of 2 tensors are as they should be" in page.text
    for figure in ("12 %", "100 % of a change was retained", "noise 0.0625", "at [3, 14]", "0.5, not 0.4375", "25 %"):
        assert figure in page.text, figure
    assert "detected in 0 of 1 weights not in layers.0.weight not detected" in page.text
    assert "as in the base 1 of 1" in page.text and "lora-export verify merged" in page.text
    assert len(page.of("path", "effect")) == len(page.of("path", "error")) == 2  # at two widths
    assert "first to differ" not in page.text


def test_audit_begins_with_what_is_wrong() -> None:
    page = audited(KEPT, SUM, WRONG)
    assert "Not every weight of merged" in page.text and "2 of 3 tensors" in page.text
    table = page.text.split("worst element")[1]
    assert table.index("layers. 1. weight") < table.index("layers. 0. weight")
    assert page.title == "different: merged – lora-export verify"
    assert "7 entries are off" in table and "× inf" in table and "at [0, 1] nan, not -inf" in table
    assert (
        "layers.1.weight is this sum not in layers.0.weight matches" in page.text
        and page.text.count("first to differ") == 2
    )


def test_hostile_name_is_text_in_an_audit_too() -> None:
    hostile = dataclasses.replace(WRONG, name=HOSTILE, why=HOSTILE, controls={HOSTILE: False})
    about = {
        "candidate": HOSTILE,
        "base": HOSTILE,
        "adapters": [{"name": HOSTILE, "sha256": HOSTILE}],
        HOSTILE: HOSTILE,
    }
    page = audited(hostile, about=about)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.text.count(SHOWN) > 8
