"""What a runtime will refuse, drop or run at another strength. The rules are data: `runtimes/NAME.toml`, one a runtime.

A rule is a condition on facts, what the runtime does then, where that can be read again, and what repairs it.
"""
