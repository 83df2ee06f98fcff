"""online.py: keys that do not go together and data that cannot be watched are refused before anything is written."""

import json
from pathlib import Path

import pytest
from test_train import SHORT, WORLD

import data
import train
from plumbing.config import InputError

assert WORLD  # the world of test_train.py, which conftest.py makes for this file as well


def test_keys_that_do_not_go_together_are_refused_before_anything_is_written(here):
    for keys, message in ((dict(online=True, probe=2), "choose one"),
                          (dict(rule="kinds"), "--rule=kinds: for --online and --probe"),
                          (dict(probe=2, rule="kind"), "--rule=kind: must be t3s, random, "),
                          (dict(online="maybe"), "--online=maybe: must be false or true or continue"),
                          (dict(online="continue", resume_every=-1), "--resume_every=-1 keeps none"),
                          (dict(watch="accuracy"), "give --record_every too"),
                          (dict(online=True, record_problems=-1), "asks for none, .* use --watch=label_free"),
                          (dict(online=True, watch="loss"), "--watch=loss: must be")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            train.main(run="bad", **SHORT | keys)
    assert not Path("runs").exists()


def test_without_answers_an_accuracy_cannot_be_watched(here):
    lines = [json.loads(line) for line in Path("data/toy-1/teacher.jsonl").read_text().splitlines()]
    Path("some.jsonl").write_text("".join(json.dumps({**line, "answer": None}) + "\n" for line in lines))
    data.main(source="some.jsonl", tokenizer="data/toy-1/untrained", out="some", verifier="toy")
    with pytest.raises(InputError, match="not every example has an answer, .* use --watch=label_free"):
        train.main(run="bad", online=True, **SHORT | dict(data="some"))
