"""TorchScript files: check their code, and run them in a process of their own."""
