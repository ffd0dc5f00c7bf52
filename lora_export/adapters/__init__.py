"""Adapters from adapters: several combined into one, and one of another rank."""
