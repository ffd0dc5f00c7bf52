"""Generate texts with a decoder's graph under onnxruntime."""
