"""One model of a server: requests to it, and what each answer has to state."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from lora_export.errors import Different, RuntimeRefused
from lora_export.models.model import Model
from lora_export.models.served_values import DrawTexts
from lora_export.runtime.endpoint.client import Client

WEIGHTS_NOT_JUDGED = "Its weights were not judged"

Number = Decimal | int


class Way(Protocol):
    """How a server gives what is compared: its values of some texts, each a list of token ids."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> str: ...  # of the model, and of PyTorch's
    @property
    def note(self) -> str: ...  # what was sent, and what was not compared

    def rows(self, texts: Sequence[Sequence[int]]) -> list[list[Number]]:
        """The values of each text."""

    def draw(self, length: int, choose: random.Random) -> list[int] | None:
        """The tokens of an input; None where any will do."""

    def judged(self, model: Model, draw: DrawTexts, longest: int | None) -> Model:
        """The model whose output has these values."""


@dataclass(eq=False)
class ServedModel:
    """The model of this name at a server. `client` counts the requests."""

    client: Client
    model: str
    answered_as: set[str] = field(default_factory=set)  # the models that answered, as the server states

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of a path. Errors are those of `Client.post`."""
        answer = self.client.post(path, {"model": self.model, **body})
        if isinstance(model := answer.get("model"), str):
            self.answered_as.add(model)
        return answer

    def wrong(self, what: str) -> RuntimeRefused:
        """The error for an answer that is not what the protocol allows."""
        return RuntimeRefused(f"{self.client.address} answered with JSON of another form: {what}")

    def refuse_other_tokens(self, usage: Any, count: int) -> None:
        """Raise Different where the server counts other tokens than were sent, or than the base's tokenizer makes."""
        found = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(found, int) and found != count:
            how = "adds tokens, such as that of a beginning (BOS) or of a chat" if found > count else "drops tokens"
            raise Different(
                f"the server counts {found} tokens in a text of which the base's tokenizer makes {count}: it {how}, "
                f"or has another tokenizer. {WEIGHTS_NOT_JUDGED}"
            )
