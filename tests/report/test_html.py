"""The page: it says what the document says, to a person; nothing in a name gets out of its place."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export import report
from lora_export.errors import EnvironmentLacking
from lora_export.report import drawing, html
from lora_export.verification import against_checkpoint, parity
from lora_export.verification.parity import Verdict, judge
from support.verdicts import ABOUT, DIAGNOSIS, DIFFERENT, LAYERS, NOTHING, SAME, STRAYED, UNDECIDED, Placed, case


class Read(HTMLParser):
    """A page's elements and what a reader sees. Raises for one that is not closed."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
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
        if self.open and self.open[-1] not in ("style", "title"):
            self.seen.append(data)

    def of(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [
            a for name, a in self.elements if name == tag and set(css.split()) <= set((a.get("class") or "").split())
        ]


def read(verdict: Verdict, placement: Any = None, about: Any = ABOUT, diagnosis: Any = None) -> Read:
    return Read(report.page(report.document(verdict, placement, about, diagnosis)))


def test_the_page_tells_the_verdict_its_figures_and_how_to_run_it_again() -> None:
    text = read(SAME, Placed()).text
    assert "✓ same model.onnx computes what models/base computes with its adapter english attached." in text
    assert "1 × 2 outputs × cases compared 0.39 % of what the adapter does is error, at most" in text
    assert "× 2 PyTorch's own error, at most" in text and "142 of 142 compute nodes on CPUExecutionProvider" in text
    assert "0.25 PyTorch 0.125" in text and "-0.25 , not 0" in text.replace("-0.25,", "-0.25 ,")
    assert "told from the candidate in 2 of 2 comparisons" in text
    assert "lora-export verify model.onnx --report 'a name.html'" in text
    for fact in ("model.onnx.data", "cd" * 32, "ef" * 32, "12" * 32, "adapter, × 0.5", "2.13.0", "ids 2 x 300"):
        assert fact in text, fact
    assert "It was not traced from layer to layer in this run." in text
    assert "Why" not in text


def test_a_difference_is_told_once_for_all_cases_and_drawn_layer_by_layer() -> None:
    there = read(judge([case(1.0, name="a"), case(1.0, name="b")]), diagnosis=DIAGNOSIS)
    assert "model.onnx does not compute what models/base computes" in there.text
    assert there.text.count("the error is 1, allowed is 0.25") == 1
    assert "logits in case a , and as much in 1 more" in there.text.replace("a,", "a ,")
    assert "The first module that differs is encoder.1" in there.text and "as a scale would" in there.text
    assert len(there.of("circle", "error")) == 2 * len(drawing.WIDTHS), "null is no point"
    assert len(there.of("circle", "effect")) == len(drawing.WIDTHS), "0 has no logarithm"
    assert "first to differ" in there.text


def test_what_would_decide_it_is_told() -> None:
    text = read(UNDECIDED).text
    assert "this check could not have told" in text
    assert "What would decide it: an --atol below 64 with --rtol 0, or the gates alone" in text
    assert "no power" in text and "not in logits, case 2 x 300" in text
    assert "nothing was compared" in read(NOTHING).text


def test_inputs_that_were_folded_away_and_nodes_that_strayed_are_named() -> None:
    text = read(DIFFERENT, STRAYED).text
    assert "input mask another draw of it changes PyTorch and not the candidate folded away" in text
    assert "/layer.3/MatMul (MatMul) ran on CPUExecutionProvider" in text


@pytest.mark.parametrize("verdict", [SAME, DIFFERENT, UNDECIDED, NOTHING], ids=lambda verdict: str(verdict.outcome))
def test_the_page_needs_nothing_and_runs_nothing(verdict: Verdict) -> None:
    there = read(verdict, Placed(), diagnosis=DIAGNOSIS)
    assert {"script", "link", "img", "iframe", "object", "a", "form"}.isdisjoint(tag for tag, _ in there.elements)
    attributes = [(name, value or "") for _, attrs in there.elements for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    policy = next(meta for meta in there.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    page = report.page(report.document(verdict, Placed(), ABOUT, DIAGNOSIS))
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "max-width: 640px" in page


HOSTILE = "<script>alert(1)</script>\"' onload=x {{ 7*7 }} \x1b[2J\ud800"
SHOWN = "<script>alert(1)</script>\"' onload=x {{ 7*7 }} \\x1b[2J\\ud800"


def test_a_hostile_name_is_text_wherever_it_stands(tmp_path: Path) -> None:
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
    placement = Placed(HOSTILE, {HOSTILE: ((HOSTILE, "MatMul"),)}, 1, ((HOSTILE, HOSTILE, HOSTILE),), {"a": HOSTILE})
    diagnosis = {"first": HOSTILE, "why": HOSTILE, "layers": [{**LAYERS[1], "name": HOSTILE}]}
    report.write(tmp_path / "page.html", verdict, placement=placement, about=about, diagnosis=diagnosis)
    there = Read((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in there.elements}
    assert not [name for _, attrs in there.elements for name in attrs if name.startswith("on")]
    assert there.text.count(SHOWN) > 15
    assert "49" not in there.text.split("Error per layer")[1].split("Could this")[0]


SUM = against_checkpoint.AuditedWeight(
    "layers.0.weight", against_checkpoint.Fate.CHANGED, parity.Outcome.SAME, elements=1200, error=0.25,
    controls={"english left out": True, "english x 1.1": False}, relative_change=0.125, retention=0.998, noise=0.0625,
    worst=parity.WorstElement((3, 14), 0.5, 0.4375),
)  # fmt: skip
WRONG = dataclasses.replace(
    SUM, name="layers.1.weight", outcome=parity.Outcome.DIFFERENT, why="it is the sum with english x 1.1", off=7,
    error=math.inf, retention=math.nan,
)  # fmt: skip
KEPT = against_checkpoint.AuditedWeight("norm.weight", against_checkpoint.Fate.KEPT, parity.Outcome.SAME, elements=40)


AUDITED = {**ABOUT, "candidate": "merged", "base": "base", "command": ["lora-export", "verify", "merged"]}


def weighed(*weights: against_checkpoint.AuditedWeight, about: Any = AUDITED) -> Read:
    wrong = any(there.outcome is parity.Outcome.DIFFERENT for there in weights)
    found = against_checkpoint.Audit(parity.Outcome.DIFFERENT if wrong else parity.Outcome.SAME, weights)
    return Read(report.page(report.document(found, about=about)))


def test_the_page_of_an_audit_tells_every_weight_its_figures() -> None:
    there = weighed(SUM, KEPT)
    assert "Every weight of merged" in there.text and "base and its adapter english" in there.text
    assert "2 of 2 tensors are what they should be" in there.text
    for figure in ("12 %", "100 % of a change arrived", "noise 0.0625", "at [3, 14]", "0.5, not 0.4375", "25 %"):
        assert figure in there.text, figure
    assert "told from the candidate in 0 of 1 weights not in layers.0.weight no power" in there.text
    assert "kept as the base has them 1 of 1" in there.text and "lora-export verify merged" in there.text
    assert len(there.of("path", "effect")) == len(there.of("path", "error")) == 2  # at two widths
    assert "first to differ" not in there.text


def test_the_page_of_an_audit_begins_with_what_is_wrong() -> None:
    there = weighed(KEPT, SUM, WRONG)
    assert "Not every weight of merged" in there.text and "2 of 3 tensors" in there.text
    table = there.text.split("worst element")[1]
    assert table.index("layers. 1. weight") < table.index("layers. 0. weight")
    assert "7 entries are off" in table and "× inf" in table
    assert (
        "it is this sum in layers.1.weight not in layers.0.weight fits" in there.text
        and there.text.count("first to differ") == 2
    )


def test_a_hostile_name_is_text_in_an_audit_too() -> None:
    hostile = dataclasses.replace(WRONG, name=HOSTILE, why=HOSTILE, controls={HOSTILE: False})
    about = {
        "candidate": HOSTILE,
        "base": HOSTILE,
        "adapters": [{"name": HOSTILE, "sha256": HOSTILE}],
        HOSTILE: HOSTILE,
    }
    there = weighed(hostile, about=about)
    assert "script" not in {tag for tag, _ in there.elements}
    assert not [name for _, attrs in there.elements for name in attrs if name.startswith("on")]
    assert there.text.count(SHOWN) > 8


def test_without_jinja2_html_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(html.importlib, "import_module", missing)
    with pytest.raises(EnvironmentLacking, match=r"pip install 'lora-export\[report\]'"):
        report.check_path(tmp_path / "page.html")
    report.check_path(tmp_path / "page.json")


# The drawings


def counted(*numbers: float) -> dict[str, Any]:
    return report.as_dict(parity.histogram(np.array(numbers)))


def test_a_histogram_counts_by_powers_of_two() -> None:
    there = parity.histogram(np.array([0.0, 1.0, 1.99, -2.0, 0.25, 0.0]))
    assert (there.first, there.counts, there.zeros) == (-2, (1, 0, 2, 1), 2)
    assert parity.histogram(np.zeros(3)) == parity.Histogram(0, (), 3)
    assert parity.histogram(np.array([5e-324])).first == -1074


def heights(path: str) -> list[float]:
    """How far each step of an area stands over its bottom, from left to right."""
    bottom = float(path.split(" ")[1].split("V")[0])
    return [round(bottom - float(there), 1) for there in re.findall(r"V([\d.]+)H", path)]


def test_areas_are_as_high_as_their_shares() -> None:
    wide, _ = drawing.histogram(
        [("effect", "e", [counted(1, 1, 1, 2)]), ("error", "o", [counted(0.25), counted(0.25, 0, 0)])], limit=0.5
    )
    effect, error = (heights(series.path) for series in wide.series)
    tallest = 136.0
    assert effect == [tallest, pytest.approx(tallest / 3, abs=0.1)]
    assert error == [pytest.approx(tallest * (2 / 4) / (3 / 4), abs=0.1)], "half of its numbers; zeros count, too"
    assert wide.mark is not None and wide.x_ticks and not wide.cut


def test_numbers_next_to_nothing_do_not_squeeze_the_others() -> None:
    series = ("error", "o", [counted(1e-300, *[1e-3] * 200, *[1e-2] * 200)])
    wide, narrow = drawing.histogram([series], limit=None)
    assert wide.cut and {tick.label for tick in wide.x_ticks} <= {"10⁻³", "10⁻²", "10⁻¹"}
    for there in (wide, narrow):
        places = [float(x) for x in re.findall(r"H([\d.]+)", there.series[0].path)]
        assert min(places) > there.left and max(places) < there.width


def test_there_is_no_drawing_of_nothing() -> None:
    assert drawing.histogram([("error", "o", [counted(0, 0)])], limit=None) == []
    assert drawing.layers([], None) == []
    assert drawing.layers([{"name": "a", "error": 0.0, "deployed_error": None, "effect": None}], None) == []


def test_layers_lie_on_a_logarithmic_axis() -> None:
    wide = drawing.layers(LAYERS, "encoder.1")[0]
    by_key = {series.key: series for series in wide.series}
    (x0, low, first), (x1, high, _) = by_key["error"].points
    decade = (wide.bottom - 18) / 6  # from 1e-7 to 0.1
    assert low - high == pytest.approx(5 * decade, abs=0.2)
    assert first == "encoder.0: 1e-07, the candidate's error"
    assert wide.mark is not None and wide.mark.at == x1 > x0
    assert [tick.label for tick in wide.x_ticks] == ["1", "2", "3"]
    assert math.isclose(by_key["effect"].points[0][0], x1)


def test_a_thousand_layers_have_few_labels() -> None:
    many = [
        {"name": str(n), "error": 1e-7 * 2.0 ** (n % 50), "deployed_error": 1e-7, "effect": 1.0} for n in range(1000)
    ]
    for there in drawing.layers(many, None):
        assert len(there.x_ticks) <= drawing.TICKS[there.size] and len(there.y_ticks) <= 8
        assert there.mark is None
