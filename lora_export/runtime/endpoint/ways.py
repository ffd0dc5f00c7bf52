"""How a server gives the log-probabilities of tokens: four ways, of which the first that works is taken.

vLLM gives those of a prompt (`prompt_logprobs`), and takes token ids. Others repeat the prompt with them (`echo`). The
third way is to ask for the next token, prompt by prompt: every server with `logprobs` gives those of the likeliest. A
server of chats alone gives those of its own replies.
"""

from __future__ import annotations

import functools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar, TypeVar

from lora_export.errors import Different, InputRefused, RuntimeRefused, Undecided
from lora_export.models.model import Model
from lora_export.models.served_values import SCORES, DrawTexts, with_token_scores
from lora_export.options.spelling import named
from lora_export.runtime.endpoint.client import WEIGHTS_NOT_JUDGED, Number, RequestRefused, ServedModel
from lora_export.runtime.endpoint.texts import FEW_TOKENS, Texts

LIKELIEST = 5  # tokens that are requested: OpenAI's most
BEGINNING = 4  # tokens of a text before the first whose value is requested, where each takes a request
TRIES_OF_CHATS = 200  # messages of which the chat template makes as many tokens as of the first
TRIES_OF_REPLIES = 10  # replies that are requested, until one is long enough and known token by token
LONGEST_PIECE = 256  # characters of a token that a server states
PROBES = 2  # texts by which `echo` is compared with generated tokens
# OpenAI's form for completions, and that for chats, which mlx_lm's server wants for both
FORMS_OF_REQUEST: tuple[Mapping[str, Any], ...] = (
    {"logprobs": LIKELIEST},
    {"logprobs": True, "top_logprobs": LIKELIEST},
)
NEAR_VALUE = 0.02  # of a log-probability, plus as much of its size: farther apart, two values are not of one position

NO_TEMPLATE = ". Chats were not tried: the base's tokenizer has no chat template"

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
    """The paths /completions and /chat/completions of a model."""

    def ask(self, prompt: Any, **more: Any) -> dict[str, Any]:
        """The continuation of a prompt by a token. Errors are those of `_choice`."""
        return self._choice("completions", {"prompt": prompt, "max_tokens": 1, **more})

    def reply(self, message: str, length: int) -> dict[str, Any]:
        """The reply to a user's message, in up to so many tokens. Errors are those of `_choice`."""
        messages = [{"role": "user", "content": message}]
        return self._choice("chat/completions", {"messages": messages, "max_tokens": length, **FORMS_OF_REQUEST[1]})

    def _choice(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of the answer, with its `usage`. Raises RuntimeRefused where there is none."""
        answer = self.post(path, {**body, "temperature": 0, "stream": False})
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
            (token if isinstance(token, int) else self.texts.after(ids, _text(piece)), value)
            for token, piece, value in entries
        ]


@dataclass(eq=False)
class ChatReply(TokenWay):
    """The reply to a message, its tokens one after another: each is likely after those before it."""

    server: Completions
    texts: Texts
    begun: int  # tokens that the chat template makes of each message, up to the reply
    name: ClassVar[str] = "chat"
    note: str = (
        "messages were sent, of which the base's chat template makes the tokens that PyTorch ran on. The tokens of the "
        "replies were compared, each given those before it"
    )
    is_costly: ClassVar[bool] = True
    _values: dict[tuple[int, ...], list[Number]] = field(default_factory=dict)  # of each conversation that was drawn

    @property
    def first(self) -> int:
        return self.begun

    @classmethod
    def found(cls, server: Completions, texts: Texts, choose: random.Random) -> ChatReply | None:
        """This way, where the server has it."""
        message = _message(texts, choose)
        conversation = texts.conversation(message)
        way = cls(server, texts, len(texts.ids_of_conversation(conversation)))
        return way if way._reply(message, conversation, 1) else None

    def values(self, ids: Sequence[int]) -> list[Number]:
        if tuple(ids) not in self._values:
            raise InputRefused(f"{named('inputs')}: the server takes messages alone, and no tokens of your own")
        return self._values[tuple(ids)]

    def draw(self, length: int, choose: random.Random) -> list[int]:
        """A conversation with the server's own reply, whose values are kept: it may say something else next time."""
        for _ in range(TRIES_OF_REPLIES):
            message, conversation = self._opening(choose)
            reply = self._reply(message, conversation, length - self.begun)
            known = [(token, self.server.number(value)) for token, value in reply if token is not None]
            if len(known) == len(reply) == length - self.begun:
                ids = [*self.texts.ids_of_conversation(conversation), *(token for token, _ in known)]
                self._values[tuple(ids)] = [value for _, value in known]
                return ids
        raise self.server.wrong("its replies end at once, or have tokens that are no text by themselves")

    def _opening(self, choose: random.Random) -> tuple[str, str]:
        """A message, and what the chat template makes of it: as many tokens as of others."""
        for _ in range(TRIES_OF_CHATS):
            message = _message(self.texts, choose)
            conversation = self.texts.conversation(message)
            if len(self.texts.ids_of_conversation(conversation)) == self.begun:
                return message, conversation
        raise InputRefused("the chat template makes another number of tokens of each message")

    def _reply(self, message: str, conversation: str, length: int) -> list[tuple[int | None, Any]]:
        """The tokens of a reply, None for one that is unknown, and their values; none where it has no values."""
        choice = self.server.reply(message, length)
        self.server.refuse_other_tokens(choice["usage"], self.begun, by="chat template")
        reply: list[tuple[int | None, Any]] = []
        before = self.texts.ids_of_conversation(conversation)
        is_read = True  # the text up to here: behind a token without a text, only an id is known
        for entry in _content(choice)[:length]:
            piece = _text(entry.get("token"))
            is_read, conversation = is_read and isinstance(entry.get("token"), str), conversation + piece
            after = self.texts.ids_of_conversation(conversation)
            stated = entry.get("id")
            token = stated if type(stated) is int and 0 <= stated < self.texts.vocabulary else None
            is_next = token is None and is_read and after[:-1] == before
            reply.append((after[-1] if is_next else token, entry.get("logprob")))
            before = after
        return reply


def _message(texts: Texts, choose: random.Random) -> str:
    return texts.text(texts.draw(len(texts.around) + BEGINNING, choose)).strip()


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
        if of_base.has_chat_template and (chat := tried(lambda: ChatReply.found(server, of_base, choose))):
            return chat
        raise Undecided(
            f"{server.client.address} gives no log-probabilities for `logprobs`, `echo` or `prompt_logprobs`{how}"
            f"{'' if of_base.has_chat_template else NO_TEMPLATE}. Nothing can be compared"
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
    listed = next((entry.get("top_logprobs") for entry in _content(choice)), None)
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [(each.get("id"), each.get("token"), each.get("logprob")) for each in entries]


def _text(piece: Any) -> str:
    """The text of a token; none where a server gives something else."""
    return piece[:LONGEST_PIECE] if isinstance(piece, str) else ""


def _content(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The generated tokens of a choice in the form of chats."""
    found = choice.get("logprobs")
    content = found.get("content") if isinstance(found, dict) else None
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
