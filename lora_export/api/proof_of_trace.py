"""The proof of a file that was traced, whose model may compute long texts in another way than the trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

from lora_export.callbacks import OnMessage
from lora_export.errors import Different
from lora_export.models.model import Model
from lora_export.models.traced_lengths import longest_traced, passes_traced_lengths
from lora_export.provenance import LONGEST_KEY
from lora_export.verification.proof import Proof

Proofs = TypeVar("Proofs")


def prove_trace(
    model: Model,
    prove: Callable[[], Proofs] | None,
    state: Callable[[Mapping[str, str]], None],
    on_message: OnMessage,
) -> Proofs | None:
    """What `prove` returns, of a trace of a model (`with_traced_lengths`); None where no proof was requested.

    A file that follows the model up to a length alone, or whose longer texts take too long to be tried, gets this
    length as a property, by `state`, and is proven up to it. Raises what `prove` raises.
    """
    longest = longest_traced(model)
    if prove and (passes_traced_lengths(model) or not longest):
        try:
            return prove()
        except Different as error:
            if not isinstance(error.proof, Proof) or not error.proof.differs_only_beyond(longest, model.axes):
                raise
    if longest:
        state({LONGEST_KEY: json.dumps(longest)})
        sizes = " and ".join(f"{size:,} in {symbol}" for symbol, size in longest.items())
        on_message(
            f"note: the file is for sizes of up to {sizes}: {type(model.module).__name__} computes larger ones in "
            "another way"
        )
    return prove() if prove else None
