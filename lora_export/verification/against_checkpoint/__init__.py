"""A merged checkpoint, judged weight by weight against W + s·BA in fp64. Needs neither a model nor PyTorch.

Every tensor of base, adapters and candidate is accounted for:

    kept      A tensor that no adapter changes has the bytes of the base. In a candidate of another dtype it has the
              numbers of the base, rounded once.
    replaced  A tensor that an adapter replaces, whole or in rows, has the values of the adapter, rounded once.
    changed   |M - V| <= half a step of the stored dtype + the error bound of a sum in fp32, for every entry of
              V = W + Σ s·BA (with DoRA: m/‖V‖·V). V is computed here, in fp64, with no code of the merge.
    calibrated  By its record, a weight has numbers that are not the nearest. Each is one of the two that can be stored
              on either side of V; one without a change is that of the base. With the calibration, almost no other
              choice brings the outputs nearer to those of V, and on held-out inputs they are no further than with the
              nearest numbers (`changed_weight.py`). Without it, a control has to fail by the numbers alone.
    quantised A weight that is still stored in the scheme of the base: see `kept_numbers.py`.
    controls  V without one adapter, with its scale x 1.1, and with its BA transposed must fail the same check.
              Otherwise the weight is undecided: the check could not detect such an error.
    layout    Whether BA or its transpose is added to a square matrix is decided here, again without the merge. Where
              nothing decides it, the weight is undecided, or different from both sums.

The error bound of a sum in fp32 is the usual one, about (rank + 4) · 2⁻²⁴ · |s| ‖b‖ ‖a‖ + 2⁻²² · |V| for an entry made
of the row b of B and the column a of A. The plan (which pair changes which weight) is made as for a merge.
"""

from lora_export.verification.against_checkpoint.audit_checkpoint import audit
from lora_export.verification.against_checkpoint.audit_gguf import audit_gguf
from lora_export.verification.against_checkpoint.changed_weight import CalibratedLayer
from lora_export.verification.against_checkpoint.result import Audit, AuditedWeight, Fate

__all__ = ["Audit", "AuditedWeight", "CalibratedLayer", "Fate", "audit", "audit_gguf"]
