"""Adapters beside the weights of a graph: as nodes, as optional inputs, or selected per batch row."""
