"""The output embeddings of language models that are tied to the input embeddings: a file has no name for them.

In transformers 5.24.0 they are `lm_head`, but for the classes below. `tests/weights/test_tied_heads.py` derives these
again from the installed transformers.
"""

from __future__ import annotations

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_NAMES = """
BertLMHeadModel BigBirdForCausalLM BioGptForCausalLM BlipTextLMHeadModel BltForCausalLM CamembertForCausalLM
Data2VecTextForCausalLM ElectraForCausalLM ErnieForCausalLM FlaubertWithLMHeadModel GPTNeoXJapaneseForCausalLM
GitForCausalLM MegatronBertForCausalLM ModernBertDecoderForCausalLM ProphetNetForCausalLM RoCBertForCausalLM
RoFormerForCausalLM RobertaForCausalLM RobertaPreLayerNormForCausalLM RwkvForCausalLM TrOCRForCausalLM
WhisperForCausalLM XLMRobertaForCausalLM XLMRobertaXLForCausalLM XLMWithLMHeadModel XLNetLMHeadModel XmodForCausalLM
"""
WITH_OTHER_HEADS = frozenset(_NAMES.split())


def tied_head(architecture: str) -> str:
    """The name of the output embeddings of a class of language models; empty where it is not known."""
    is_usual = architecture.endswith(LANGUAGE_MODELS) and architecture not in WITH_OTHER_HEADS
    return "lm_head" if is_usual else ""
