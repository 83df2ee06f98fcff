"""Other people's checkpoints: tokenizer, model families, weights."""
