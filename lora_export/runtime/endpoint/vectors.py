"""One vector for each text: an embedding (/v1/embeddings), or the values of labels (/classify).

OpenAI's protocol has embeddings. vLLM and SGLang have labels in the same form: `data` with an entry for each text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from lora_export.errors import Undecided, count
from lora_export.models.model import Model
from lora_export.models.served_values import (
    SHORTEST,
    TEXT_EMBEDDING,
    UNIT_TEXT_EMBEDDING,
    DrawTexts,
    TextVector,
    with_text_vector,
)
from lora_export.runtime.endpoint.client import Number, RequestRefused, ServedModel
from lora_export.runtime.endpoint.texts import FEW_TOKENS, Texts

TEXTS_AT_ONCE = 32  # texts of a request: text-embeddings-inference takes no more, by default
LARGEST = 3e38  # number of fp32, nearly
NEAR_LENGTH = 1e-3  # from 1, of a vector that a server divided by its length
# Of an embedding, the path and its key in an entry; of labels, those of SGLang and of vLLM
VECTOR_PATHS: Mapping[bool, Sequence[tuple[str, str]]] = {
    True: (("embeddings", "embedding"),),
    False: (("classify", "probs"), ("../classify", "probs")),
}
MORE_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "embedding": {"encoding_format": "float"},
    "probs": {},
}  # what else a request has


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors of a model at a path. Takes token ids, or the `texts` of a tokenizer."""

    server: ServedModel
    vector: TextVector
    path: str
    key: str
    width: int = 0
    texts: Texts | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def output(self) -> str:
        return self.vector.output

    @property
    def note(self) -> str:
        what = "token ids were sent" if self.texts is None else "texts were sent, as the base's tokenizer reads them"
        unit = "; each vector has the length 1 there: directions were compared"
        return f"{what}, up to {TEXTS_AT_ONCE} a request{unit if self.vector is UNIT_TEXT_EMBEDDING else ''}"

    def rows(self, texts: Sequence[Sequence[int]]) -> list[list[Number]]:
        """Raises RuntimeRefused for an answer without a vector of numbers for each text."""
        parts = (texts[first : first + TEXTS_AT_ONCE] for first in range(0, len(texts), TEXTS_AT_ONCE))
        return [row for some in parts for row in self._answered(some)]

    def _answered(self, texts: Sequence[Sequence[int]]) -> list[list[Number]]:
        sent = [list(ids) if self.texts is None else self.texts.text(ids) for ids in texts]
        answer = self.server.post(self.path, {"input": sent, **MORE_FIELDS[self.key]})
        self.server.refuse_other_tokens(answer.get("usage"), sum(map(len, texts)))
        listed = answer.get("data")
        entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        places = [one.get("index", place) for place, one in enumerate(entries)]
        if not all(type(place) is int for place in places) or sorted(places) != list(range(len(texts))):
            found, wanted = count(len(entries), "entry", "entries"), count(len(texts), "text")
            raise self.server.wrong(f"`data` has {found} for {wanted}, or not one for each")
        by_index = {place: one.get(self.key) for place, one in zip(places, entries, strict=True)}
        rows = [self._numbers(by_index[place]) for place in range(len(texts))]
        if len({len(row) for row in rows}) > 1 or (self.width and len(rows[0]) != self.width):
            raise self.server.wrong(f"`{self.key}` has {len(rows[0])} numbers, and others elsewhere")
        return rows

    def _numbers(self, value: Any) -> list[Number]:
        is_list = isinstance(value, list) and value
        if not is_list or any(isinstance(one, bool) or not isinstance(one, Decimal | int) for one in value):
            raise self.server.wrong(f"`{self.key}` is no list of numbers")
        if any(abs(one) > LARGEST for one in value):
            raise self.server.wrong(f"`{self.key}` has a number that fp32 cannot hold")
        return list(value)

    def draw(self, length: int, choose: random.Random) -> list[int] | None:
        return None if self.texts is None else self.texts.draw(length, choose)

    def judged(self, model: Model, draw: DrawTexts, longest: int | None) -> Model:
        return with_text_vector(model, self.vector, self.width, draw, longest)


def find_vectors(server: ServedModel, vector: TextVector, vocabulary: int, texts: Callable[[], Texts]) -> Vectors:
    """The first path that has vectors, of token ids or else of texts. Raises Undecided where none has."""
    choose, refusals = random.Random(0), []
    few = min(vocabulary, FEW_TOKENS)
    for of_texts in (lambda: None, texts):
        for path, key in VECTOR_PATHS[vector is TEXT_EMBEDDING]:
            way = Vectors(server, vector, path, key, texts=of_texts())
            length = SHORTEST + len(way.texts.around) if way.texts else SHORTEST
            ids = way.draw(length, choose) or [choose.randrange(few) for _ in range(length)]
            try:
                (row,) = way.rows([ids])
            except RequestRefused as refusal:  # it has no such path, or takes no token ids
                refusals.append(str(refusal))
                continue
            is_unit = vector is TEXT_EMBEDDING and abs(math.hypot(*map(float, row)) - 1) < NEAR_LENGTH
            return replace(way, width=len(row), vector=UNIT_TEXT_EMBEDDING if is_unit else vector)
    raise Undecided(f"{server.client.address} gives no {VECTOR_PATHS[vector is TEXT_EMBEDDING][0][0]}: {refusals[-1]}")
