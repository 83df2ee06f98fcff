"""What several test files ask for: sample.py in one line, the keys of Sampling and the other keywords side by side;
the files of a folder, the objects of a jsonl file."""

import json
from dataclasses import fields
from pathlib import Path

from sampling import Sampling

KEYS = {field.name for field in fields(Sampling)}


def ask(function, model, prompts, max_new_tokens, temperature=0.0, **keys):
    """function(model, prompts, Sampling(...), ...): greedy unless a temperature is given."""
    chosen = {key: value for key, value in keys.items() if key in KEYS}
    others = {key: value for key, value in keys.items() if key not in KEYS}
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, **chosen)
    return function(model, prompts, sampling, **others)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
