"""What JUnit XML may look like: the facts of junit-10.xsd, the schema of Jenkins' xUnit plugin, which pytest follows.

GitLab and GitHub's actions read the same elements and ask for less.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree


@dataclass(frozen=True)
class Kind:
    """What an element has to have, may have, and may hold."""

    needs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    holds: frozenset[str] = frozenset()
    text: bool = False


def _kind(needs: str = "", may: str = "", holds: str = "", *, text: bool = False) -> Kind:
    return Kind(*(frozenset(words.split()) for words in (needs, may, holds)), text=text)


OUTPUTS = "system-out system-err"
KINDS = {
    "testsuites": _kind(may="name time tests failures errors", holds="testsuite"),
    "testsuite": _kind(
        "name tests failures errors",
        "group time skipped timestamp hostname id package file log url",
        f"testsuite properties testcase {OUTPUTS}",
    ),
    "properties": _kind(holds="property"),
    "property": _kind("name value"),
    "testcase": _kind("name", "time classname group", f"skipped error failure {OUTPUTS}"),  # reruns are not ours
    **dict.fromkeys(("failure", "error", "skipped"), _kind(may="type message", text=True)),
    **dict.fromkeys(OUTPUTS.split(), _kind(text=True)),
}
SECONDS = re.compile(r"[0-9,]*(\.[0-9]*)?")


def faults(element: ElementTree.Element, place: str = "") -> list[str]:
    """Everything in a document that the schema does not allow, or that does not add up."""
    place = f"{place}/{element.tag}"
    kind = KINDS.get(element.tag)
    if kind is None:
        return [f"{place}: there is no such element"]
    found = [f"{place}: lacks {name}" for name in kind.needs - set(element.attrib)]
    found += [f"{place}: has {name}" for name in set(element.attrib) - kind.needs - kind.may]
    found += [f"{place}: holds {child.tag}" for child in element if child.tag not in kind.holds]
    words = [element.text, *(child.tail for child in element)]
    if not kind.text and "".join(word or "" for word in words).strip():
        found.append(f"{place}: holds text")
    if not SECONDS.fullmatch(element.get("time", "0")):
        found.append(f"{place}: time is {element.get('time')}")
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        if name in element.attrib and int(element.get(name, "")) != len(list(element.iter(tag))):
            found.append(f"{place}: {name} is {element.get(name)}")
    return found + [fault for child in element for fault in faults(child, place)]
