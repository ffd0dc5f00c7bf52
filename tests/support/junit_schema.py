"""The rules of JUnit XML: those of junit-10.xsd, the schema of Jenkins' xUnit plugin, which pytest follows.

GitLab and GitHub's actions read the same elements and require less.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree


@dataclass(frozen=True)
class Kind:
    """The attributes and the contents of an element."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    children: frozenset[str] = frozenset()
    text: bool = False


def _kind(required: str = "", optional: str = "", children: str = "", *, text: bool = False) -> Kind:
    return Kind(*(frozenset(words.split()) for words in (required, optional, children)), text=text)


OUTPUTS = "system-out system-err"
KINDS = {
    "testsuites": _kind(optional="name time tests failures errors", children="testsuite"),
    "testsuite": _kind(
        "name tests failures errors",
        "group time skipped timestamp hostname id package file log url",
        f"testsuite properties testcase {OUTPUTS}",
    ),
    "properties": _kind(children="property"),
    "property": _kind("name value"),
    "testcase": _kind("name", "time classname group", f"skipped error failure {OUTPUTS}"),
    **dict.fromkeys(("failure", "error", "skipped"), _kind(optional="type message", text=True)),
    **dict.fromkeys(OUTPUTS.split(), _kind(text=True)),
}
SECONDS = re.compile(r"[0-9,]*(\.[0-9]*)?")


def faults(element: ElementTree.Element, path: str = "") -> list[str]:
    """Everything in a document that the schema forbids, and every wrong count."""
    path = f"{path}/{element.tag}"
    kind = KINDS.get(element.tag)
    if kind is None:
        return [f"{path}: there is no such element"]
    found = [f"{path}: lacks {name}" for name in kind.required - set(element.attrib)]
    found += [f"{path}: has {name}" for name in set(element.attrib) - kind.required - kind.optional]
    found += [f"{path}: holds {child.tag}" for child in element if child.tag not in kind.children]
    words = [element.text, *(child.tail for child in element)]
    if not kind.text and "".join(word or "" for word in words).strip():
        found.append(f"{path}: holds text")
    if not SECONDS.fullmatch(element.get("time", "0")):
        found.append(f"{path}: time is {element.get('time')}")
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        if name in element.attrib and int(element.get(name, "")) != len(list(element.iter(tag))):
            found.append(f"{path}: {name} is {element.get(name)}")
    return found + [fault for child in element for fault in faults(child, path)]
