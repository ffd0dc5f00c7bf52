"""Small models with tied embeddings, and adapters that PEFT trained on one of the two tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel

WORDS, WIDTH = 23, 8
ONE_LAYER = {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {
    "d_model": WIDTH,
    **{
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 12}.items()
    },
}
SIZES = {
    "LlamaForCausalLM": ONE_LAYER,
    "GPTNeoXForCausalLM": ONE_LAYER,
    "PhiForCausalLM": ONE_LAYER,
    "BartForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "M2M100ForConditionalGeneration": BART,
    "BertForMaskedLM": ONE_LAYER,
    "GPT2LMHeadModel": {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "T5ForConditionalGeneration": {"d_model": WIDTH, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2},
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}


@dataclass(frozen=True, eq=False)
class TiedModel:
    """A model, its folder, and what it computes with an adapter of PEFT."""

    model: PreTrainedModel
    base: Path

    def adapter(self, folder: Path, *targets: str, **options: Any) -> Path:
        """A folder with an adapter as after training: no value is zero."""
        self.trained(*targets, **options).save_pretrained(folder)
        return folder

    def trained(self, *targets: str, seed: int = 0, **options: Any) -> peft.PeftModel:
        """PEFT's model with an adapter on these modules."""
        torch.manual_seed(seed)
        config = peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": list(targets)} | options))
        model = peft.get_peft_model(copy.deepcopy(self.model), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                    parameter.normal_()
        return model.eval()

    def outputs(self, model: Any) -> torch.Tensor:
        """The logits of a model."""
        ids = torch.arange(WORDS).reshape(1, -1)
        more = {"decoder_input_ids": ids} if self.model.config.is_encoder_decoder else {}
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=ids, **more).logits
        return logits

    def reloaded(self, folder: Path) -> PreTrainedModel:
        """The model that transformers loads. Every tensor has its place there."""
        model, found = type(self.model).from_pretrained(folder, output_loading_info=True)
        assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model


def tied_model(folder: Path, architecture: str = "LlamaForCausalLM", *, tied: bool = True, **sizes: int) -> TiedModel:
    """A model with tied embeddings, saved in a folder; or one with a head of its own."""
    torch.manual_seed(1)
    cls = getattr(transformers, architecture)
    config = cls.config_class(vocab_size=WORDS, tie_word_embeddings=tied, **SIZES[architecture] | sizes, **TOKENS)
    model = cls(config).eval()
    model.save_pretrained(folder)
    return TiedModel(model, folder)


def untied_llama(folder: Path) -> TiedModel:
    """A Llama with a head of its own. Tests that have this one share its graph."""
    return tied_model(folder, tied=False, hidden_size=32, num_attention_heads=4)
