"""A served model as a runner, and which of a server's models is meant."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IDS
from lora_export.models.model import Model
from lora_export.models.served_values import TextVector
from lora_export.options.spelling import named
from lora_export.runtime.endpoint.client import Client, Number, RequestRefused, ServedModel, Way, key_of
from lora_export.runtime.endpoint.texts import Texts
from lora_export.runtime.endpoint.vectors import find_vectors
from lora_export.runtime.endpoint.ways import Completions, find_way
from lora_export.runtime.runner import Arrays, PlainRunner

OTHERS_SHOWN = 8  # models of a server that a message names
STATED_FACTS = ("id", "parent", "root", "owned_by", "max_model_len")  # of a model in a server's list
IN_BINARY = 12  # decimals from which a number is one in binary, and not rounded to decimals


@dataclass(eq=False)
class EndpointRunner(PlainRunner):
    """A model of a server. Runs `input_ids`, and gives the values of its way."""

    way: Way
    server: ServedModel
    entry: Mapping[str, Any]  # the model in the server's list; empty where it is not there
    others: Sequence[str]  # the other models there
    longest: int | None = None  # tokens of a text, beside one that follows; None where the server does not state it
    axes: Mapping[str, tuple[int | None, ...]] = field(default_factory=lambda: {IDS: (None, None)})
    names_known: bool = True
    decimals: int = 0  # the most that a number of the server has had

    def run(self, inputs: Arrays) -> Arrays:
        """Errors are those of the way."""
        rows = self.way.rows(inputs[IDS].tolist())
        self.decimals = max([self.decimals, *(_decimals(value) for row in rows for value in row)])
        return {self.way.output: np.array([[float(value) for value in row] for row in rows], np.float32)}

    def judged(self, model: Model) -> Model:
        """The model with the outputs that the server gives. Errors are those of the way."""
        return self.way.judged(model, self.draw, self.longest)

    def draw(self, batch: int, length: int, seed: int) -> list[list[int]] | None:
        """The tokens of an input; None where any will do."""
        choose = random.Random(seed)
        rows = [self.way.draw(length, choose) for _ in range(batch)]
        return [row for row in rows if row is not None] or None

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        """How it was requested, and what the server states of itself."""
        entry, address = self.entry, self.server.client.address
        listed = ", ".join(f"{name} {entry[name]}" for name in ("parent", "root") if entry.get(name))
        notes = [
            f"{address}: {self.server.model} ({listed or 'the server states no more of it'})",
            f"by `{self.way.name}`: {self.way.note}",
        ]
        if not entry:
            notes.append(f"{address} does not list {self.server.model} among its models")
        if others := [name for name in self.others[:OTHERS_SHOWN] if name != entry.get("parent")]:
            notes.append(f"not compared: {', '.join(others)}, which the server lists, too ({named('other')})")
        if strange := self.server.answered_as - {self.server.model}:
            notes.append(f"the server states that {', '.join(sorted(strange))} answered")
        return notes

    @property
    def facts(self) -> dict[str, Any]:
        """What a report has of the server."""
        client = self.server.client
        stated = {name: str(self.entry[name]) for name in STATED_FACTS if self.entry.get(name) is not None}
        facts = {"model": self.server.model, "listed": stated, "server": client.server, "by": self.way.name}
        return {**facts, "requests": client.requests, "decimals": min(self.decimals, IN_BINARY)}


def _decimals(value: Number) -> int:
    exponent = value.normalize().as_tuple().exponent if isinstance(value, Decimal) else 0
    return max(0, -int(exponent))


def open_endpoint(
    address: str,
    served_name: str | None,
    adapters: Sequence[str],
    folder: Path,
    vocabulary: int,
    seconds: float,
    vector: TextVector | None = None,
) -> EndpointRunner:
    """A runner of the model that is meant: the one of this name, or of the only adapter's, or the only one there.

    `folder` has the base's tokenizer, `vocabulary` is its number of tokens. `vector` is what the model has for a text;
    without it, log-probabilities of tokens are compared. Raises InputRefused where it is not clear which model is
    meant, Undecided where the server does not give what is compared, and as `Client.post`.
    """
    client = Client(address, seconds, key_of(address))
    models = _models(client, is_needed=served_name is None)
    model = served_name or _only(models, adapters, address)
    way: Way
    if vector is None:
        server: ServedModel = (completions := Completions(client, model))
        way = find_way(completions, vocabulary, lambda: Texts.of(folder))
    else:
        server = ServedModel(client, model)
        way = find_vectors(server, vector, vocabulary, lambda: Texts.of(folder))
    by_id = {entry["id"]: entry for entry in models}
    entry = by_id.pop(model, {})
    lengths = [each.get("max_model_len") for each in (entry, by_id.get(str(entry.get("parent")), {}))]
    longest = next((length - 1 for length in lengths if isinstance(length, int) and length > 1), None)
    return EndpointRunner(way, server, entry, list(by_id), longest)


def _models(client: Client, *, is_needed: bool) -> list[dict[str, Any]]:
    """The server's list of models. Raises InputRefused where it has none and one is needed."""
    try:
        found = client.get("models").get("data")
    except RequestRefused as refusal:
        if is_needed:
            hint = f"CANDIDATE ends with the version, such as https://host/v1; {named('served_name')} names a model"
            raise InputRefused(f"{refusal}. {hint}") from None
        return []
    entries = found if isinstance(found, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _only(models: Sequence[Mapping[str, Any]], adapters: Sequence[str], address: str) -> str:
    """The model that is meant where none is named."""
    names = [str(entry["id"]) for entry in models]
    if len(adapters) == 1 and adapters[0] in names:
        return adapters[0]
    if not adapters:
        names = [str(entry["id"]) for entry in models if not entry.get("parent")]
    if len(names) == 1:
        return names[0]
    listed = ", ".join(names[:OTHERS_SHOWN]) or "none"
    raise InputRefused(f"{address} lists {listed}: say which model is judged, by {named('served_name')}")
