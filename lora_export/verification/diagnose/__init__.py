"""Where a candidate that differs from the reference goes wrong, and why."""
