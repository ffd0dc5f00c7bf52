"""Servers on the loopback: a small Llama with PEFT's adapters, by each protocol, right and wrong; and hostile ones."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lora_export as le
from support.local_server import Silent, local_server
from support.peft_models import fill

WORDS = 60
TEMPLATE = "{{ bos_token }}{% for each in messages %} w2 {{ each.content }} w3{% endfor %} w4"
CHATS = "/v1/chat/completions"
READY = 900  # seconds
LOCK = threading.Lock()  # one run at a time: PyTorch's threads are few

Logits = Callable[[torch.Tensor], torch.Tensor]  # ids (1, n) -> (n, words)


def save_base(folder: Path, *, seed: int = 0, begins: bool = False, hidden: int = 32, template: str = TEMPLATE) -> Path:
    """A Llama of one layer, with a tokenizer of words; it begins each text with <s> if that is wanted."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        hidden_size=hidden, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=WORDS, initializer_range=0.2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, WORDS)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    made.chat_template = template or None
    made.save_pretrained(folder)
    return folder


def save_adapter(
    base: Path, folder: Path, *, seed: int = 1, alpha: int = 8, rank: int = 4, further: Sequence[str] = ()
) -> Path:
    """An adapter of PEFT with a B that is not zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "down_proj", *further])
    model = peft.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(base), config)
    fill(model, "lora_B", std=0.05)
    model.save_pretrained(folder)
    return folder


def with_peft(base: Path, adapter: Path | None = None, *, factor: float = 1.0, **options: Any) -> Logits:
    """What transformers computes, with an adapter attached by PEFT and its scale times a factor."""
    model = hf.AutoModelForCausalLM.from_pretrained(base, **options).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scaling = {name: scale * factor for name, scale in module.scaling.items()}
    return lambda ids: model(input_ids=ids).logits[0].float()


_with_peft_once = functools.lru_cache(maxsize=4)(with_peft)


class Folders(NamedTuple):
    """A base, and adapters: that which is judged, and another tenant's."""

    base: Path
    adapter: Path
    other: Path


@dataclass(eq=False, kw_only=True)
class Server:
    """What a server has beside its answers, and what it was sent."""

    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "a", "parent": "base"}, {"id": "base"}])
    paths: tuple[str, ...] = ("/v1/completions",)
    busy: int = 0  # requests that are refused with 429 first
    requests: list[dict[str, Any]] = field(default_factory=list)
    unknown: int = 0  # requests of paths that it does not have

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises ValueError for what the server does not take."""
        raise NotImplementedError


@dataclass(eq=False)
class Served(Server):
    """A model at a server, and what the server does wrong."""

    logits: Logits
    tokenizer: Any
    protocol: str = "prompt_logprobs"  # or "echo", "next tokens", "chat", "none"
    prompt: Callable[[list[int]], list[int]] = list  # what it reads in place of the tokens
    values: Callable[[list[float]], list[Any]] = list  # what it gives in place of the values
    counts: bool = True  # whether it states how many tokens it read
    shift: int = 0  # by how many positions its `echo` is off
    piece: Callable[[str], Any] = str  # what a chat's reply gives in place of a token's text

    def __post_init__(self) -> None:
        self.paths = (CHATS,) if self.protocol == "chat" else self.paths

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.protocol == "chat":
            return self.reply(body)
        sent = body["prompt"]
        takes_ids = self.protocol == "prompt_logprobs"
        if isinstance(sent, list) and not takes_ids:
            raise ValueError("prompt must be a text")
        given = sent if isinstance(sent, list) else self.tokenizer(sent)["input_ids"]
        ids = self.prompt(list(given))
        with LOCK, torch.no_grad():
            scores = self.logits(torch.tensor([ids])).log_softmax(-1)
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        if takes_ids and "prompt_logprobs" in body:
            own = self.values([float(scores[at, token]) for at, token in enumerate(ids[1:])])
            choice["prompt_logprobs"] = [None, *(_entry(*pair) for pair in zip(ids[1:], own, strict=False))]
        elif ("logprobs" in body and self.protocol == "next tokens") or (
            self.protocol == "echo" and "echo" not in body
        ):
            top = scores[-1].topk(body["logprobs"])
            values = self.values(top.values.tolist())
            words = [f" {self.tokenizer.decode([token])}" for token in top.indices.tolist()]
            choice["logprobs"] = {"token_logprobs": values[:1], "top_logprobs": [dict(zip(words, values, strict=True))]}
        elif self.protocol == "echo":
            at = [min(place + self.shift, len(ids) - 1) for place in range(len(ids) - 1)]
            own = self.values([float(scores[place, token]) for place, token in zip(at, ids[1:], strict=True)])
            own = own[1:] if ids[0] == 0 else own  # as llama.cpp leaves out the beginning
            choice["logprobs"] = {"token_logprobs": [None, *own, -1.0], "tokens": []}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1} if self.counts else None
        return {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """The likeliest reply to a chat, and its log-probabilities."""
        assert body["logprobs"] is True and body["temperature"] == 0
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        sent = self.prompt(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids, found = list(sent), []
        for _ in range(body["max_tokens"]):
            with LOCK, torch.no_grad():
                scores = self.logits(torch.tensor([ids]))[-1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            found.append(float(scores.max()))
        words = [f" {self.tokenizer.decode([token])}" for token in ids[len(sent) :]]
        pairs = zip(map(self.piece, words), self.values(found), strict=False)
        content = [{"token": piece, "logprob": value} for piece, value in pairs]
        choice = {"index": 0, "message": {"role": "assistant"}, "logprobs": {"content": content}}
        usage = {"prompt_tokens": len(sent)} if self.counts else None
        return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


def served(base: Path, adapter: Path | None, protocol: str = "prompt_logprobs", **wrong: Any) -> Served:
    """A right serving, unless something is wrong with it."""
    factor, options = wrong.pop("factor", 1.0), wrong.pop("options", {})
    logits = wrong.pop("logits", None) or _with_peft_once(base, adapter, factor=factor, **options)
    return Served(logits, hf.AutoTokenizer.from_pretrained(base), protocol, **wrong)


def _entry(token: int, value: Any) -> dict[str, Any]:
    return {str(token): {"logprob": value, "rank": 1, "decoded_token": f"w{token}"}}


@contextlib.contextmanager
def running(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server on the loopback that handles each request so."""

    class Handler(Silent, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            handle(self)

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers["Content-Length"]))  # unread, it would end the connection
            handle(self)

    with local_server(Handler) as address:
        yield f"{address}/v1"


@contextlib.contextmanager
def started(command: Sequence[str | Path], log: Path, ready: str = "v1/models", **environment: str) -> Iterator[str]:
    """The address of a real server, which gets its port as the last argument. It has some minutes to answer `ready`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + READY
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, command), str(port)], env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/{ready}", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"{address}/{ready.partition('/')[0]}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def serving(model: Server) -> Iterator[str]:
    """The address of a server of this model."""

    def handle(request: Any) -> None:
        if request.command == "GET":
            return reply(request, {"object": "list", "data": model.models})
        if request.path not in model.paths:
            model.unknown += 1
            return reply(request, {"detail": "Not Found"}, 404)
        body = json.loads(request.body)
        model.requests.append({**body, "key": request.headers.get("Authorization")})
        if model.busy:
            model.busy -= 1
            return reply(request, {"error": {"message": "busy"}}, 429)
        try:
            return reply(request, model.answer(body))
        except ValueError as error:
            return reply(request, {"error": {"message": str(error)}}, 400)

    with running(handle) as address:
        yield address


def verified(folders: Folders, model: Server, **options: Any) -> le.Verification:
    with serving(model) as address:
        return le.verify(address, folders.base, adapters=folders.adapter, **options)


def reply(request: BaseHTTPRequestHandler, content: Any, status: int = 200, **headers: str) -> None:
    """Answer with JSON, or with bytes."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(data)
