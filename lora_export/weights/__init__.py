"""Executor 1: a plan over a checkpoint on disk. NumPy; torch only where CUDA was asked for."""
