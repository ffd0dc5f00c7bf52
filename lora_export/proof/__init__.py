"""A candidate proven against the PyTorch model with its adapters attached."""

from lora_export.evidence import Proof, bits_that_differ, prove_mixed
from lora_export.proof.flow import MIXED, prove, prove_rows
from lora_export.proof.questions import case_inputs
from lora_export.proof.sides import adapted

__all__ = ["MIXED", "Proof", "adapted", "bits_that_differ", "case_inputs", "prove", "prove_mixed", "prove_rows"]
