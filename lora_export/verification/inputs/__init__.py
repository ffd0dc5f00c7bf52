"""The inputs on which a candidate and its references are run."""
