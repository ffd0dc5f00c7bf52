"""A served model as a runner: token ids in, and log-probabilities or a vector out, by the protocol of OpenAI."""
