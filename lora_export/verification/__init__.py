"""The verdict: whether a candidate computes what it should.

    proof.py              what a proof is, and the flow of every proof: run, judge, diagnose
    against_pytorch.py    references: a PyTorch model with its adapters attached
    prepared_pytorch.py   that model, run for one candidate
    against_graph.py      references: the graph that the candidate was made from
    proof_session.py      what proofs of several adapters on one base share
    row_proofs.py         proofs of graphs whose rows choose their adapters
    pair_controls.py      single pairs of the adapters, switched off
    candidate_outputs.py  runs of the candidate
    compare_outputs.py    what the outputs of two runs have in common
    companion_files.py    the files beside the weights
    judged_files.py       what a loader reads of a folder
    parity/               arrays in, verdict out
    module_copies.py      copies of a module that share or convert its tensors; a module widened to fp64 in place
    inputs/               the inputs of a proof
    references/           what computes the outputs that a candidate should have
    diagnose/             the first module that differs, and why
    against_checkpoint/   a merged checkpoint, by W + s·BA

`against_checkpoint` is a flow of its own. It runs nothing: it has no inputs, no provider and no outputs, and it
compares stored weights with exact sums, so that none of the steps of `prove` applies to it.
"""
