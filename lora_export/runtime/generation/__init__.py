"""Generate texts with a decoder's graph under onnxruntime, token after token.

onnxruntime-genai is the way to serve such a graph (`lora-export guide genai`): 64 tokens of a decoder of 4 layers take
0.29 s of CPU with its release 0.18, and 0.72 s here. It is not used here because a generator of it has one adapter for
all rows, and reads a graph that has a genai_config.json beside it. What is generated here must also show graphs that
others exported, a batch whose rows have adapters of their own, and the three graphs of an encoder-decoder.
"""
