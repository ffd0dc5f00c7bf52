"""HTML: one page that explains itself, opened from a disk or an artefact. It has no script and loads nothing.

The page is made from the JSON document and from nothing else. Names in it come from files of unknown origin:
everything is escaped, and the page forbids itself to load or to run anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from lora_export.errors import one_line
from lora_export.extras import optional_package
from lora_export.report.html_context import (
    adapters_of,
    candidate_name,
    checkpoint_context,
    facts,
    files,
    inline,
    times,
    verdict_context,
    with_adapters,
)
from lora_export.report.json_document import AnyProof, document_of_proof
from lora_export.verification.parity import percent

SUFFIX = ".html"
PURPOSE = "to read"
MARKS = {"same": "✓", "different": "✕", "undecided": "?"}


def require_jinja2() -> Any:
    """The package jinja2. Raises EnvironmentLacking where it is missing."""
    return optional_package("jinja2", "an HTML report needs", "report")


require = require_jinja2


def of_proof(proof: AnyProof) -> str:
    """The verdict as an HTML page that needs no other file."""
    return html_page(document_of_proof(proof))


def html_page(document: Mapping[str, Any]) -> str:
    """A verdict's document, or that of a checkpoint's audit, as an HTML page that needs no other file."""
    is_checkpoint = "weights" in document
    context = checkpoint_context(document) if is_checkpoint else verdict_context(document)
    about = document["about"]
    return render(
        "checkpoint.html.j2" if is_checkpoint else "verdict.html.j2",
        document=document,
        about=about,
        mark=MARKS[document["outcome"]],
        candidate_name=candidate_name(about),
        with_adapters=with_adapters(adapters_of(about)),
        files=files(about),
        facts=facts(about),
        **context,
    )


def of_error(error: Mapping[str, Any], seconds: float) -> str:  # noqa: ARG001 - the page shows no duration
    """An error that ended the command, as an HTML page that needs no other file."""
    return render("error.html.j2", document={**error, "outcome": "error"}, candidate_name="")


def render(template: str, **values: Any) -> str:
    """A page by its template. Raises EnvironmentLacking without jinja2."""
    jinja2 = require_jinja2()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_export", "report/templates"),
        autoescape=True,
        finalize=_escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    page: str = environment.get_template(template).render(**values)
    return page


def _escaped(value: Any) -> Any:
    """Control characters, and surrogates that UTF-8 cannot hold, as escapes."""
    return one_line(value) if type(value) is str else value


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _exact(place: Mapping[str, Any], name: str) -> str:
    """A value with all of its digits. JSON has no NaN and no infinity: their names are beside them, as texts."""
    value = place[name]
    return str(place[f"{name}_text"]) if value is None else f"{value:.9g}"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else percent(fraction)


FILTERS: dict[str, Callable[..., str]] = {
    "exact": _exact,
    "figure": _figure,
    "times": times,
    "percent": _percent,
    "inline": inline,
    "command_line": shlex.join,
}
