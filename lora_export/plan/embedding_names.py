"""Which modules are tables of embeddings, by the last part of their names.

A file tells nn.Embedding from nn.Linear in no other way. The names are those of transformers 5.24.0:
`tests/plan/test_embedding_names.py` derives them again from the installed transformers.
"""

from __future__ import annotations

_NAMES = """
additional_embedding audio_bos_eos_token bias_values box_position_embeddings char_position_embeddings cls_embed
code_embedding codebook codec_embed codec_embedding col_position_embeddings column_embedder column_embeddings
denoising_class_embed dist_bin_pairwise_embed distance_embedding down_embed embed embed_audio_tokens embed_char
embed_global embed_in embed_positions embed_speaker embed_text_tokens embed_timestep embed_tokens
embed_tokens_per_layer embedding embeddings encoder_hash_tok_embedding entity_embeddings freq_emb
generation_embeddings global_relative_attention_bias h_position_embeddings hq_token input_embedding input_embeds_layer
iou_token label_embed label_embeddings lang_embeddings language_embedding language_id_embedding level_embed
mask_tokens ngram_embedding ngram_embeddings no_mask_embed not_a_point_embed num_speakers_embed obj_score_token
patterns pe_k point_embed pos_emb pos_embed position_embedding position_embedding_table position_embeddings
position_embeds_layer positions_embed presence_token prompt_ctx prompt_embedding pronunciation_embed queries_embedder
queries_features query_1024_resolution query_768_resolution query_embed query_feat query_position_embeddings
query_refpoint_embeddings recycle_disto reference_point_embed rel_attn_embed rel_embeddings rel_pos_emb
relative_attention_bias row_embedder row_embeddings row_position_embeddings scale segment_emb segment_embedding
shape_embed shared shift speaker_embedding speaker_id_embedding task_type_embeddings text_embed_tokens
text_position_embedding text_token_embedding tgt_embed tile_embedding tok_embeddings token_embedding
token_type_embeddings tokens_embed unit_embedding up_embed value_embeddings visual_embeddings_table
visual_position_embeddings visual_token_type_embeddings w w_position_embeddings weight_embedding word_embedding
word_embeddings wpe wte x_position_embeddings y_position_embeddings
"""
EMBEDDING_MODULES = frozenset(_NAMES.split())


def is_embedding(module: str) -> bool:
    """Whether a module of this name is a table of embeddings in transformers."""
    return module.rpartition(".")[2] in EMBEDDING_MODULES
