"""Each command as one Python function: arguments in, a frozen result out.

Nothing here prints, reads a command line or ends the process. `lora_export` offers these functions under their names:
`merge`, `export_onnx`, `export_torchscript`, `verify`, `train`, `convert`, `inspect`.
"""
