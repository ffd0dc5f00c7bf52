"""Merge LoRA adapters or keep them as graph nodes, export, and prove that nothing was lost."""

__version__ = "0.1.0"
