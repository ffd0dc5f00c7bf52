"""Programs of torch.export that were changed to do harm, and how `verify` refuses them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fuzz.targets import run
from support import FACTORIES
from support.handmade import Payload
from support.programs import graph_of, rewritten

Change = Callable[[dict[str, Any]], object]


def payload(place: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Payload(place / "payload-ran"), file)
    return file.getvalue()


def refused(path: Path, *, of: str = "worded") -> str:
    """The message with which verify refuses a file as candidate and as model.

    Checks that no payload ran, that stdout is empty, and that no file is left behind.
    """
    before = sorted(path.parent.rglob("*"))
    model = f"{FACTORIES}:{of}"
    messages = []
    for arguments in ((path, "--model", model), (path, "--model", path)):
        code, output, message = run("verify", *arguments)
        assert (code, output) == (3, ""), message
        assert message.startswith("Error: ") and len(message) < 2000 and "Traceback" not in message
        messages.append(message)
    assert sorted(path.parent.rglob("*")) == before
    assert not (path.parent / "payload-ran").exists()
    return messages[-1]


def changed(good: Path, to: Path, change: Change) -> Path:
    """The file with another graph."""
    name, graph = graph_of(good)
    change(graph)
    return rewritten(good, to / "evil.pt2", {name: json.dumps(graph).encode()})


def nodes(graph: dict[str, Any]) -> list[dict[str, Any]]:
    return graph["graph_module"]["graph"]["nodes"]  # type: ignore[no-any-return]


def spoiled(*path: Any, value: Any) -> Change:
    """A change that sets the value at a path in the graph's JSON."""

    def change(graph: dict[str, Any]) -> None:
        container: Any = graph
        for step in path[:-1]:
            container = container[step]
        container[path[-1]] = value

    return change
