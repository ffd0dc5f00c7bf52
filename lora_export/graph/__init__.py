"""Executor 3: a plan over an ONNX graph. NumPy and onnx_ir; torch is never imported."""
