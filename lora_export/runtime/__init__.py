"""What runs a module or a file, and reports where it ran: PyTorch, onnxruntime, decoders with a cache."""
