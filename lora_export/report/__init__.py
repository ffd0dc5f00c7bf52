"""Reports of a plan, a merge and a verdict: terminal, JSON, JUnit XML, HTML, and GitHub's annotations and summary.

A report decides nothing: the verdict holds its own outcome. On a terminal, a verdict is one screen. Its files hold
every figure.
"""
