"""A document as it is published: with the repository's address and the names of packages, where a clone has paths."""

from __future__ import annotations

import re

REPOSITORY = "OWNER/lora-export"  # how the documents of the repository name it
# What is true in a clone alone -> what is published in its place
FOR_A_CLONE = {
    "These commands run in a clone of the repository.\n": "",
    "Install from a clone, with Python 3.11 or newer:": "Install it with Python 3.11 or newer. "
    f"`make` needs a clone of [the repository](https://github.com/{REPOSITORY}):",
}


def published(text: str, owner: str, tree: str = "") -> str:
    """A Markdown text for those who have no clone.

    Args:
        text: A tracked file's.
        owner: Who publishes it: `OWNER` of https://github.com/OWNER/lora-export.
        tree: The address of the repository's files, to which links lead that are relative. Without it they stay so.
    """
    for in_clone, elsewhere in FOR_A_CLONE.items():
        text = text.replace(in_clone, elsewhere)
    text = text.replace(REPOSITORY, f"{owner}/lora-export")
    text = re.sub(r"(pip install|uvx --from) '\./core(?=['\[])", r"\1 'lora-export-core", text)
    text = re.sub(r"pip install '\.(?=\[)", "pip install 'lora-export", text)
    text = re.sub(r"pip install \./core(?![\w/])", "pip install lora-export-core", text)
    text = re.sub(r"pip install \.( *)(?= #|$)", r"pip install lora-export\1", text, flags=re.M)
    return re.sub(r"(?<=\]\()(?![a-z]+:|#)", tree and f"{tree}/", text)


def repository(owner: str) -> str:
    """The address of the repository."""
    return f"https://github.com/{REPOSITORY}".replace("OWNER", owner)
