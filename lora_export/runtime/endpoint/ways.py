"""How a server gives the log-probabilities of tokens: three ways, of which the first that works is taken.

vLLM gives those of a prompt (`prompt_logprobs`), and takes token ids. Others repeat the prompt with them (`echo`). The
last way is to ask for the next token, prompt by prompt: every server with `logprobs` gives those of the likeliest.
"""

from __future__ import annotations

import functools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, TypeVar

from lora_export.errors import Different, RuntimeRefused, Undecided
from lora_export.models.model import Model
from lora_export.models.served_values import SCORES, DrawTexts, with_token_scores
from lora_export.runtime.endpoint.client import WEIGHTS_NOT_JUDGED, Number, RequestRefused, ServedModel
from lora_export.runtime.endpoint.texts import FEW_TOKENS, Texts

LIKELIEST = 5  # tokens that are requested: OpenAI's most
BEGINNING = 4  # tokens of a text before the first whose value is requested, where each takes a request
PROBES = 2  # texts by which `echo` is compared with generated tokens
# OpenAI's form for completions, and that for chats, which mlx_lm's server wants for both
FORMS_OF_REQUEST: tuple[Mapping[str, Any], ...] = (
    {"logprobs": LIKELIEST},
    {"logprobs": True, "top_logprobs": LIKELIEST},
)
NEAR_VALUE = 0.02  # of a log-probability, plus as much of its size: farther apart, two values are not of one position

Texted = Callable[[], Texts]
Found = TypeVar("Found")


class TokenWay(ABC):
    """One way. `first` is the first position of a text that has a value."""

    name: ClassVar[str]
    output: ClassVar[str] = SCORES
    is_costly: ClassVar[bool] = False  # a request for each token
    note: str

    @property
    @abstractmethod
    def first(self) -> int: ...

    @abstractmethod
    def values(self, ids: Sequence[int]) -> list[Number]:
        """The log-probability of each token from `first` on, given those before it."""

    @abstractmethod
    def draw(self, length: int, choose: random.Random) -> list[int] | None: ...

    def rows(self, texts: Sequence[Sequence[int]]) -> list[list[Number]]:
        return [self.values(ids) for ids in texts]

    def judged(self, model: Model, draw: DrawTexts, longest: int | None) -> Model:
        return with_token_scores(model, self.first, draw, longest, is_costly=self.is_costly)


class Completions(ServedModel):
    """The path /completions of a model."""

    def ask(self, prompt: Any, **more: Any) -> dict[str, Any]:
        """The first choice of the answer, with its `usage`. Raises RuntimeRefused where there is none."""
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": False, **more}
        answer = self.post("completions", body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self.wrong("`choices` is no list of one object")
        return {**choices[0], "usage": answer.get("usage")}

    def number(self, value: Any) -> Number:
        """A log-probability. Raises RuntimeRefused for what is none."""
        if isinstance(value, bool) or not isinstance(value, Decimal | int) or not math.isfinite(value):
            raise self.wrong(f"a log-probability is {value!r:.40}")
        if not -1e5 < value < 1e-3:
            raise self.wrong(f"a log-probability is {float(value):g}")
        return value

    def table(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(f"{what} is no object")
        return value


@dataclass(eq=False)
class PromptLogprobs(TokenWay):
    """vLLM's `prompt_logprobs`: token ids in, one request a text."""

    server: Completions
    name: ClassVar[str] = "prompt_logprobs"
    note: str = "token ids were sent, and each token's own log-probability was given"
    first: ClassVar[int] = 1

    @classmethod
    def found(cls, server: Completions, ids: Sequence[int]) -> PromptLogprobs | None:
        """This way, where the server has it."""
        choice, way = server.ask(list(ids), prompt_logprobs=1), cls(server)
        if choice.get("prompt_logprobs") is None:
            return None
        way.read(choice, ids)
        return way

    def values(self, ids: Sequence[int]) -> list[Number]:
        return self.read(self.server.ask(list(ids), prompt_logprobs=1), ids)

    def read(self, choice: dict[str, Any], ids: Sequence[int]) -> list[Number]:
        """The values in a choice. Raises Different where it has other tokens than were sent."""
        self.server.refuse_other_tokens(choice["usage"], len(ids))
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list):
            raise self.server.wrong("`prompt_logprobs` is no list")
        tables = [self.server.table(row, "an entry of `prompt_logprobs`") for row in rows[1:]]
        of_tokens = list(zip(map(str, ids[1:]), tables, strict=False))
        if len(rows) != len(ids) or any(token not in row for token, row in of_tokens):
            raise Different(f"the server gave log-probabilities of other tokens than were sent. {WEIGHTS_NOT_JUDGED}")
        own = [self.server.table(row[token], "a token's entry") for token, row in of_tokens]
        return [self.server.number(entry.get("logprob")) for entry in own]

    def draw(self, length: int, choose: random.Random) -> list[int] | None:  # noqa: ARG002
        return None


@dataclass(eq=False)
class Echo(TokenWay):
    """`echo` with `logprobs`: the text repeated, with the values of its tokens."""

    server: Completions
    texts: Texts
    hidden: int  # tokens at the beginning that are not repeated: llama.cpp leaves out that of a beginning
    name: ClassVar[str] = "echo"
    note: str = "texts were sent, of which the base's tokenizer makes the tokens that PyTorch ran on"

    @property
    def first(self) -> int:
        return 1 + self.hidden

    @classmethod
    def found(cls, server: Completions, texts: Texts, ids: Sequence[int]) -> Echo | None:
        """This way, where the server has it."""
        choice = server.ask(texts.text(ids), echo=True, logprobs=1)
        values = _token_logprobs(choice)
        if values is None or len(values) < len(ids) - 1:
            return None
        server.refuse_other_tokens(choice["usage"], len(ids))
        generated = _generated(choice)
        hidden = 0 if len(values) - generated >= len(ids) else 1
        return cls(server, texts, hidden) if hidden <= len(texts.begin) else None

    def values(self, ids: Sequence[int]) -> list[Number]:
        choice = self.server.ask(self.texts.text(ids), echo=True, logprobs=1)
        self.server.refuse_other_tokens(choice["usage"], len(ids))
        values = _token_logprobs(choice)
        count = len(ids) - self.hidden
        if values is None or len(values) - count not in (0, 1):
            raise Different(
                f"the server repeats other tokens than the base's tokenizer makes of the text. {WEIGHTS_NOT_JUDGED}"
            )
        return [self.server.number(value) for value in values[1:count]]

    def draw(self, length: int, choose: random.Random) -> list[int] | None:
        return self.texts.draw(length, choose)


@dataclass(eq=False)
class NextToken(TokenWay):
    """The likeliest next tokens, a request for each position. The tokens of a text are among them."""

    server: Completions
    texts: Texts
    form: Mapping[str, Any]  # how the likeliest are requested
    name: ClassVar[str] = "next tokens"
    note: str = (
        f"texts were sent, one for each token, and a token's log-probability was read among the {LIKELIEST} likeliest: "
        "less likely ones were not compared"
    )
    first: ClassVar[int] = BEGINNING
    is_costly: ClassVar[bool] = True

    @classmethod
    def found(cls, server: Completions, texts: Texts, ids: Sequence[int], form: Mapping[str, Any]) -> NextToken | None:
        """This way, where the server has it in this form."""
        way = cls(server, texts, form)
        return way if way._likeliest(ids) else None

    def values(self, ids: Sequence[int]) -> list[Number]:
        return [self.value_after(ids[:place], ids[place]) for place in range(self.first, len(ids))]

    def value_after(self, ids: Sequence[int], token: int) -> Number:
        """The log-probability of a token. Raises RuntimeRefused where it is not among the likeliest."""
        for likely, value in self._likeliest(ids):
            if likely == token:
                return self.server.number(value)
        raise RuntimeRefused(
            f"{self.server.client.address} gives no log-probability for a token that was among its {LIKELIEST} "
            "likeliest before"
        )

    def draw(self, length: int, choose: random.Random) -> list[int] | None:
        """A random beginning, continued by what the server itself finds likely."""
        ids = self.texts.draw(min(BEGINNING, length), choose)
        while len(ids) < length:
            following = list(self.following(ids))
            if not following:  # such as half of a letter
                ids = self.texts.draw(len(ids), choose)
                following = list(self.following(ids))
            if not following:
                raise self.server.wrong("it continues texts with no token that is text by itself")
            ids.append(choose.choice(following)[0])
        return ids

    def following(self, ids: Sequence[int]) -> Iterator[tuple[int, Number]]:
        """The likeliest tokens that a text can end with, and their values."""
        for token, value in self._likeliest(ids):
            if token is not None and self.texts.is_exact([*ids, token]):
                yield token, self.server.number(value)

    def _likeliest(self, ids: Sequence[int]) -> list[tuple[int | None, Any]]:
        """Tokens, None for one that is unknown, and their values. By their ids where the server gives these."""
        choice = self.server.ask(self.texts.text(ids), **self.form)
        self.server.refuse_other_tokens(choice["usage"], len(ids))
        entries = _top_logprobs(choice)
        return [
            (token if isinstance(token, int) else self.texts.after(ids, str(piece)), value)
            for token, piece, value in entries
        ]


def find_way(server: Completions, vocabulary: int, texts: Texted) -> TokenWay:
    """The first way that a server has. Raises Undecided where it gives no log-probabilities."""
    choose, refusals = random.Random(0), []

    def tried(find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except RequestRefused as refusal:  # it takes no token ids, or no such field
            refusals.append(str(refusal))
            return None

    few = min(vocabulary, FEW_TOKENS)
    if way := tried(lambda: PromptLogprobs.found(server, [choose.randrange(few) for _ in range(BEGINNING)])):
        return way
    refusals.clear()  # not those of token ids: texts are next
    of_base = texts()
    ids = of_base.draw(BEGINNING + 1, choose)
    echo = tried(lambda: Echo.found(server, of_base, ids))
    forms = iter(FORMS_OF_REQUEST)
    following = None
    while following is None and (form := next(forms, None)):
        following = tried(functools.partial(NextToken.found, server, of_base, ids, form))
    if following is None and echo is None:
        how = f" ({refusals[-1]})" if refusals else ": it ignores the field, as `transformers serve` does"
        raise Undecided(
            f"{server.client.address} gives no log-probabilities for `logprobs`, `echo` or `prompt_logprobs`{how}. "
            "Nothing can be compared"
        )
    if following is not None and echo is not None and (fault := _fault_of_echo(echo, following, choose)):
        following.note = f"{fault}, so `echo` was not used. {following.note}"
        return following
    found = echo or following
    assert found is not None
    return found


def _fault_of_echo(echo: Echo, following: NextToken, choose: random.Random) -> str:
    """What is wrong with the values of `echo`, by the server's own values of the next token; empty where nothing is.

    llama.cpp's server gives the values of the position after it, where no token of a beginning leads.
    """
    for _ in range(PROBES):
        ids = echo.texts.draw(BEGINNING + 1, choose)
        for token, value in following.following(ids):
            repeated = echo.values([*ids, token])[-1]
            if abs(float(repeated) - float(value)) > NEAR_VALUE * (1 + abs(float(value))):
                return (
                    f"the server gives {float(repeated):.4g} for a token by `echo` and {float(value):.4g} when it "
                    "generates it: the values of its `echo` are those of another position"
                )
            break
    return ""


# --- what a choice has ---


def _token_logprobs(choice: dict[str, Any]) -> list[Any] | None:
    found = choice.get("logprobs")
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    return values if isinstance(values, list) and values else None


def _generated(choice: dict[str, Any]) -> int:
    usage = choice["usage"]
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 1


def _top_logprobs(choice: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Id, text and log-probability of the likeliest first tokens, in the form of completions or in that of chats."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return []
    if isinstance(top := found.get("top_logprobs"), list) and top and isinstance(top[0], dict):
        return [(None, piece, value) for piece, value in top[0].items()]
    content = found.get("content")
    entry = content[0] if isinstance(content, list) and content else None
    listed = entry.get("top_logprobs") if isinstance(entry, dict) else None
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [(each.get("id"), each.get("token"), each.get("logprob")) for each in entries]
