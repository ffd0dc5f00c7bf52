"""The chat template of a tokenizer: a program of its folder, run in a process of its own within memory and time.

The process is a copy of this one, on Linux: it has transformers loaded already, and one serves all conversations.
Elsewhere the template is run in this process, in jinja's sandbox, which bounds neither memory nor time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.errors import InputRefused, one_line
from lora_export.isolation.limits import CHAT_MEMORY, CHAT_SECONDS, MAX_CHAT
from lora_export.isolation.messages import write_message
from lora_export.isolation.process import IsolatedProcess, ProcessEnded, read_request

_processes: weakref.WeakKeyDictionary[Any, tuple[Any, IsolatedProcess]] = weakref.WeakKeyDictionary()


def chat_template_of(tokenizer: Any) -> Any:
    """The chat template of a tokenizer. Raises InputRefused where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise InputRefused(
            "the tokenizer has no chat template (chat_template.jinja beside the model), so that `messages` have no form"
        )
    return template


def render_chat(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    """What the chat template of a tokenizer makes of messages. `options` are those of `apply_chat_template`.

    Raises InputRefused without a template, for whatever the template raises, and where it takes more than CHAT_MEMORY
    or CHAT_SECONDS, or makes more than MAX_CHAT characters.
    """
    template = chat_template_of(tokenizer)
    if sys.platform != "linux":
        return _made(_rendered(tokenizer, messages, options))
    request = {"messages": json.loads(json.dumps(messages, default=_placeholder)), "options": options}
    try:
        answer, _ = _process_of(tokenizer, template).ask(request, {}, CHAT_SECONDS)
    except ProcessEnded as ended:
        _processes.pop(tokenizer, None)
        what = f"does not finish within {CHAT_SECONDS} seconds" if ended.too_slow else f"cannot be run: {ended}"
        raise InputRefused(f"the chat template {what}") from ended
    return _made(answer)


def _made(answer: Mapping[str, Any]) -> Any:
    if failure := answer.get("failed"):
        raise InputRefused(one_line(f"the chat template refuses the messages ({failure})"))
    return answer["made"]


def _process_of(tokenizer: Any, template: Any) -> IsolatedProcess:
    """The process that renders for a tokenizer, in this process and with this template."""
    state = (os.getpid(), template)
    known, process = _processes.get(tokenizer, (None, None))
    if process is None or known != state:
        process = IsolatedProcess.copy_of(functools.partial(_serve, tokenizer), memory=CHAT_MEMORY)
        _processes[tokenizer] = state, process
    return process


def _serve(tokenizer: Any, requests: io.BufferedIOBase, answers: io.BufferedIOBase) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the copy has none of the threads
    with contextlib.suppress(EOFError):
        while True:
            request, _ = read_request(requests)
            write_message(answers, _rendered(tokenizer, request["messages"], request["options"]), {})


def _rendered(tokenizer: Any, messages: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the template makes, as JSON has it, or how it failed."""
    try:
        made = tokenizer.apply_chat_template(messages, **options)
    except MemoryError:
        return {"failed": f"it needs more than {CHAT_MEMORY / 2**20:.0f} MiB of memory"}
    except BaseException as error:  # a template raises any type, and the tokenizer panics in Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"failed": str(error) or type(error).__name__}
    made = dict(made) if isinstance(made, Mapping) else made
    if max(map(len, made.values() if isinstance(made, dict) else [made])) > MAX_CHAT:
        return {"failed": f"it makes more than {MAX_CHAT:,} characters or tokens"}
    return {"made": made}


def _placeholder(value: Any) -> str:
    """What a template sees of a value that JSON does not have, as in transformers."""
    return f"<{type(value).__name__}>"
