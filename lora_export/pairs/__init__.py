"""Changes of a weight that are no plain A and B.

`structured` and `computed` have A and B that are made when they are needed. The shape of those in `open_shape` is the
base's. `transforms` follow from the weight itself, by `stages`; `exact_transforms` computes them a second time, for a
proof.
"""
