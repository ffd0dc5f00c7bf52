"""A program that makes a Llama of 138 million parameters, its graph with weights inside and beside, and an adapter."""

MAKE = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from lora_export.models.export import to_onnx
from lora_export.graph.onnx_file import writing
from lora_export.models.load import load_model
place = Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=512, tie_word_embeddings=True,
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(place / "model")
base = load_model(str(place / "model"))
graph = to_onnx(base.module, base.example_inputs(), axes=base.axes)
writing.MAX_INLINE_BYTES = 0
(place / "beside").mkdir()
writing.save_graph(graph.clone(), place / "beside", "model.onnx")
writing.MAX_INLINE_BYTES = 1 << 30
(place / "inside").mkdir()
writing.save_graph(graph, place / "inside", "model.onnx")
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
adapted.save_pretrained(place / "adapter")
"""
