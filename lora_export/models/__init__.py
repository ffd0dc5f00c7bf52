"""What MODEL names, as a PyTorch module with example inputs; and its export to ONNX, TorchScript and .pt2."""
