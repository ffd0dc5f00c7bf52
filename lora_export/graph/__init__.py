"""A plan over an ONNX graph.

`find_sites` finds and names the weights, `merge/` adds ΔW to them, `insert/` adds the adapter beside them. `onnx_file/`
reads and writes the file, `quantised/` reads and changes weights of few bits.
"""
