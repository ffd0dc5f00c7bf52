"""ONNX files: reading with checks, writing, metadata, and the protobuf wire format."""
