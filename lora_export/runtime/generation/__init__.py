"""Generate texts with a decoder's graph under onnxruntime, token after token.

onnxruntime-genai is the way to serve such a graph (`lora-export guide genai`). It is not used here because a generator
of it has one adapter for all rows, and reads a graph that has a genai_config.json beside it. What is generated here
must also show graphs that others exported, a batch whose rows have adapters of their own, and the three graphs of an
encoder-decoder. `tests/benchmarks/bench_generate.py` compares the speed: on the graph of genai's own builder, genai
makes 53 tokens a second and this module 95.
"""
