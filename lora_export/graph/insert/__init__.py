"""Adapters beside the weights of a graph: as nodes, as optional inputs, or chosen for each row of a batch."""
