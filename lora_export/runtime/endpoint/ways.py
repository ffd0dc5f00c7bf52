"""How a server gives the log-probabilities of tokens: three ways, of which the first that works is taken.

vLLM gives those of a prompt (`prompt_logprobs`), and takes token ids. Others repeat the prompt with them (`echo`). The
last way is to ask for the next token, prompt by prompt: every server with `logprobs` gives those of the likeliest.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from lora_export.errors import Different, InputRefused, RuntimeRefused, Undecided
from lora_export.models.processors import open_tokenizer, refusing_failures
from lora_export.runtime.endpoint.client import Client, RequestRefused

TRIES = 2000  # draws of a token, or of a text
MORE = 8  # tokens that are drawn beyond those needed: the tokenizer joins some


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a tokenizer of transformers."""

    tokenizer: Any
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> Texts:
        """Those of a model's folder. Raises InputRefused where it has no tokenizer."""
        tokenizer = open_tokenizer(folder, needed=True)
        return cls(tokenizer, len(tokenizer))

    @cached_property
    def begin(self) -> list[int]:
        """The tokens that the tokenizer puts before each text, such as that of its beginning."""
        empty = self.ids("")
        return [token for token in empty[:1] if token == self.tokenizer.bos_token_id]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer adds at its beginning."""
        with refusing_failures("the tokenizer fails on a text"):
            return list(map(int, self.tokenizer(text, verbose=False)["input_ids"]))

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without those that the tokenizer adds."""
        with refusing_failures("the tokenizer fails on its tokens"):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def is_exact(self, ids: Sequence[int]) -> bool:
        """Whether the tokens are those of their text."""
        return self.ids(self.text(ids)) == list(ids)

    def after(self, ids: Sequence[int], piece: str) -> int | None:
        """The one token that a piece of text adds to tokens, which it must leave as they are; None for any other."""
        if not piece or not piece.isprintable() or "\ufffd" in piece:
            return None
        longer = self.ids(self.text(ids) + piece)
        return longer[-1] if longer[:-1] == list(ids) and self.text(longer) == self.text(ids) + piece else None

    def draw(self, length: int, choose: random.Random) -> list[int]:
        """So many tokens of a text, at random. Raises InputRefused where the tokenizer's texts lose some."""
        for _ in range(TRIES):
            drawn = [self._word(choose) for _ in range(length + MORE)]
            ids = self.ids(self.text([*self.begin, *drawn]))[:length]
            if len(ids) == length and self.is_exact(ids):
                return ids
        raise InputRefused(
            f"the tokenizer makes no text of {length} tokens that it reads as the same tokens again, so that a server "
            "that takes texts alone cannot be compared"
        )

    def _word(self, choose: random.Random) -> int:
        """A token whose text is printable: the bytes of a letter in several tokens have none by themselves."""
        for _ in range(TRIES):
            token = choose.randrange(self.vocabulary)
            text = self.text([token])
            if text and text.isprintable() and "\ufffd" not in text:
                return token
        raise InputRefused("the tokenizer has hardly a token that is text by itself")


LIKELIEST = 5  # tokens that are requested: OpenAI's most
BEGINNING = 4  # tokens of a text before the first whose value is requested, where each takes a request
FEW_TOKENS = 256  # of a vocabulary, of which the first are in every tokenizer
PROBES = 2  # texts by which `echo` is compared with generated tokens
# OpenAI's form for completions, and that for chats, which mlx_lm's server wants for both
FORMS_OF_REQUEST: tuple[Mapping[str, Any], ...] = (
    {"logprobs": LIKELIEST},
    {"logprobs": True, "top_logprobs": LIKELIEST},
)
WEIGHTS_NOT_JUDGED = "Its weights were not judged"
NEAR_VALUE = 0.02  # of a log-probability, plus as much of its size: farther apart, two values are not of one position

LogProbability = Decimal | int
Texted = Callable[[], Texts]
Found = TypeVar("Found")


class Way(Protocol):
    """One way. `first` is the first position of a text that has a value."""

    @property
    def name(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def note(self) -> str: ...  # what was sent, and what was not compared

    def values(self, ids: Sequence[int]) -> list[LogProbability]:
        """The log-probability of each token from `first` on, given those before it."""

    def draw(self, length: int, choose: random.Random) -> list[int] | None:
        """The tokens of an input; None where any will do."""


@dataclass(eq=False)
class Completions:
    """The path /completions of a server, and the model that is requested."""

    client: Client
    model: str
    answered_as: set[str] = field(default_factory=set)  # the models that answered, as the server states

    def ask(self, prompt: Any, **more: Any) -> dict[str, Any]:
        """The first choice of the answer, with its `usage`. Raises RuntimeRefused where there is none."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": False, **more}
        answer = self.client.post("completions", body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self.wrong("`choices` is no list of one object")
        if isinstance(model := answer.get("model"), str):
            self.answered_as.add(model)
        return {**choices[0], "usage": answer.get("usage")}

    def wrong(self, what: str) -> RuntimeRefused:
        """The error for an answer that is not what the protocol allows."""
        return RuntimeRefused(f"{self.client.address} answered with JSON that is no completion: {what}")

    def number(self, value: Any) -> LogProbability:
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

    def refuse_other_tokens(self, choice: dict[str, Any], ids: Sequence[int]) -> None:
        """Raise Different where the server counts other tokens in a text than the base's tokenizer makes of it."""
        usage = choice["usage"]
        found = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(found, int) and found != len(ids):
            how = "adds tokens, such as that of a beginning (BOS) or of a chat" if found > len(ids) else "drops tokens"
            raise Different(
                f"the server counts {found} tokens in a text of which the base's tokenizer makes {len(ids)}: it {how}, "
                f"or has another tokenizer. {WEIGHTS_NOT_JUDGED}"
            )


@dataclass(eq=False)
class PromptLogprobs:
    """vLLM's `prompt_logprobs`: token ids in, one request a text."""

    server: Completions
    name: ClassVar[str] = "prompt_logprobs"
    note: str = "token ids were sent, and each token's own log-probability was given"
    first: int = 1

    @classmethod
    def found(cls, server: Completions, ids: Sequence[int]) -> PromptLogprobs | None:
        """This way, where the server has it."""
        choice, way = server.ask(list(ids), prompt_logprobs=1), cls(server)
        if choice.get("prompt_logprobs") is None:
            return None
        way.read(choice, ids)
        return way

    def values(self, ids: Sequence[int]) -> list[LogProbability]:
        return self.read(self.server.ask(list(ids), prompt_logprobs=1), ids)

    def read(self, choice: dict[str, Any], ids: Sequence[int]) -> list[LogProbability]:
        """The values in a choice. Raises Different where it has other tokens than were sent."""
        self.server.refuse_other_tokens(choice, ids)
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
class Echo:
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
        server.refuse_other_tokens(choice, ids)
        generated = _generated(choice)
        hidden = 0 if len(values) - generated >= len(ids) else 1
        return cls(server, texts, hidden) if hidden <= len(texts.begin) else None

    def values(self, ids: Sequence[int]) -> list[LogProbability]:
        choice = self.server.ask(self.texts.text(ids), echo=True, logprobs=1)
        self.server.refuse_other_tokens(choice, ids)
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
class NextToken:
    """The likeliest next tokens, a request for each position. The tokens of a text are among them."""

    server: Completions
    texts: Texts
    form: Mapping[str, Any]  # how the likeliest are requested
    name: ClassVar[str] = "next tokens"
    note: str = (
        f"texts were sent, one for each token, and a token's log-probability was read among the {LIKELIEST} likeliest: "
        "less likely ones were not compared"
    )
    first: int = BEGINNING

    @classmethod
    def found(cls, server: Completions, texts: Texts, ids: Sequence[int], form: Mapping[str, Any]) -> NextToken | None:
        """This way, where the server has it in this form."""
        way = cls(server, texts, form)
        return way if way._likeliest(ids) else None

    def values(self, ids: Sequence[int]) -> list[LogProbability]:
        return [self.value_after(ids[:place], ids[place]) for place in range(self.first, len(ids))]

    def value_after(self, ids: Sequence[int], token: int) -> LogProbability:
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

    def following(self, ids: Sequence[int]) -> Iterator[tuple[int, LogProbability]]:
        """The likeliest tokens that a text can end with, and their values."""
        for token, value in self._likeliest(ids):
            if token is not None and self.texts.is_exact([*ids, token]):
                yield token, self.server.number(value)

    def _likeliest(self, ids: Sequence[int]) -> list[tuple[int | None, Any]]:
        """Tokens, None for one that is unknown, and their values. By their ids where the server gives these."""
        choice = self.server.ask(self.texts.text(ids), **self.form)
        self.server.refuse_other_tokens(choice, ids)
        entries = _top_logprobs(choice)
        return [
            (token if isinstance(token, int) else self.texts.after(ids, str(piece)), value)
            for token, piece, value in entries
        ]


def find_way(server: Completions, vocabulary: int, texts: Texted) -> Way:
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
