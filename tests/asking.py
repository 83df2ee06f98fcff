"""Calling sample.py in one line: the keys of Sampling and the other keywords side by side."""

from dataclasses import fields

import sample

KEYS = {field.name for field in fields(sample.Sampling)}


def ask(function, model, prompts, max_new_tokens, temperature=0.0, **keys):
    """function(model, prompts, Sampling(...), ...): greedy unless a temperature is given."""
    chosen = {key: value for key, value in keys.items() if key in KEYS}
    others = {key: value for key, value in keys.items() if key not in KEYS}
    sampling = sample.Sampling(max_new_tokens=max_new_tokens, temperature=temperature, **chosen)
    return function(model, prompts, sampling, **others)
