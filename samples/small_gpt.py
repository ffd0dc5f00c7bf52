"""A small GPT, from nothing to generated text: trained from scratch, adapted by LoRA, merged, exported, run.

    python samples/small_gpt.py [FOLDER]  # a new folder

The base learns code: Python's standard library, without comments and docstrings. LoRA adapts it to the docstrings,
which are English. The merged model is exported with its key/value cache and generates through onnxruntime. Exits with
a code other than 0 where the adapter does not predict English better than the base.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import docstrings
import lora_export as le
from lora_export.options.train import TrainingSettings
from lora_export.training.batches import ArrayData
from lora_export.training.checkpoint import TrainingHistory
from lora_export.training.loop import fit
from new_folder import new_folder

PACKAGES = [name for name in docstrings.PACKAGES if name != "encodings"]  # which is tables, not code
TOKENS, CONTEXT = 1024, 64  # in the vocabulary, and in a row
END, PADDING = "<end>", "<pad>"
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
FROM_SCRATCH = TrainingSettings(epochs=1, learning_rate=4e-3, batch_size=32, seed=0, schedule="cosine")
ADAPTING = {"rank": 16, "target": "all-linear", "epochs": 3, "batch_size": 16, "learning_rate": 4e-3}
PROMPTS = ("if self._", "Return the ")
NEW_TOKENS = 24

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Result:
    """What the sample made and measured."""

    history: TrainingHistory  # of the base
    loss: float  # on held-out docstrings, in nats for a token
    loss_without: float  # with the adapter off
    texts: dict[str, list[str]]  # "base" and "adapted" -> the continuation of each prompt


class Bare(ast.NodeTransformer):
    """Removes docstrings. Comments are not in a tree."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


def sources() -> Iterator[str]:
    """The code of each file, in one style."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for path in sorted((stdlib / package).rglob("*.py")):
            if code := ast.unparse(Bare().visit(ast.parse(path.read_bytes()))):
                yield code


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, whose frequent sequences become tokens."""
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator(texts, vocab_size=TOKENS, special_tokens=[END, PADDING], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, eos_token=END, pad_token=PADDING)


def train_from_scratch(folder: Path) -> TrainingHistory:
    """Train all weights of a new model on code, and save it with its tokenizer."""
    texts = list(sources())
    tokenizer = make_tokenizer(texts)
    ids = [token for text in tokenizer(texts)["input_ids"] for token in (*text, tokenizer.eos_token_id)]
    rows = torch.tensor(ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)]).view(-1, CONTEXT + 1)
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=TOKENS, max_position_embeddings=4 * CONTEXT, **SIZES, **special)
    model = LlamaForCausalLM(config)
    console.print(f"{len(ids):,} tokens of code, {model.num_parameters():,} parameters")
    history = fit(model, ArrayData({"input_ids": rows[:, :-1]}, rows[:, 1:].contiguous()), FROM_SCRATCH)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return history


def main(folder: Path) -> Result:
    folder.mkdir(parents=True)
    base, adapter = folder / "base", folder / "adapter"
    console.print("[bold]1. Train from scratch, on code[/bold]")
    history = train_from_scratch(base)
    console.print(str(history))

    console.print("\n[bold]2. Adapt by LoRA, to English[/bold]")
    data = folder / "docstrings.jsonl"
    docstrings.write(data)
    task = {"task": "language-modelling", "packing": True, "max_length": CONTEXT}
    scores = le.train(base, data, adapter, **task, **ADAPTING, on_message=console.print).scores
    for name in ("adapter", "adapter_off"):
        console.print(f"held-out docstrings, {name}: {scores[name]}")

    console.print("\n[bold]3. Merge, and export with the cache[/bold]")
    le.merge(base, adapter, folder / "merged")
    texts = {}
    for name, model in (("base", base), ("adapted", folder / "merged")):
        exported = le.export_onnx(model, folder / f"{name}.onnx", with_cache=True)
        console.print(f"{exported.output}: {exported.proof.verdict.outcome}")
        made = le.generate(exported.output, PROMPTS, max_new_tokens=NEW_TOKENS)
        texts[name] = [one.text for one in made]

    console.print("\n[bold]4. Generate through onnxruntime[/bold]")
    for name, lines in texts.items():
        for prompt, line in zip(PROMPTS, lines, strict=True):
            console.print(f"{name:8}{prompt!r} -> {line!r}", markup=False)
    return Result(history, scores["adapter"].loss, scores["adapter_off"].loss, texts)


if __name__ == "__main__":
    result = main(new_folder("gpt-output"))
    sys.exit(result.loss >= result.loss_without)
