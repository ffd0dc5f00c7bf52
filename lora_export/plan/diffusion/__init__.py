"""Adapters for the models of a diffusion pipeline: their components, and the families of pipelines."""
