"""Where a candidate that differs goes wrong, and why."""
