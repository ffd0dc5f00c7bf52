"""What the tests of llama.cpp and its script share. The script runs in another environment, without pytest."""

import os

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", "")  # of an environment that has llama.cpp: make test-llama-cpp
TOKENS = [5, 17, 3, 44, 7, 61, 8, 33, 19, 2, 50, 12, 40, 9, 27, 1]
