"""A served model as a runner: token ids in, log-probabilities of these tokens out, by OpenAI's completions protocol."""
