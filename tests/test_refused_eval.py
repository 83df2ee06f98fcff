"""eval.py refuses what cannot work with one line, before it writes anything."""

import shutil
from pathlib import Path

import pytest
from asking import files

import data
import eval as evaluation
from plumbing.config import InputError, read_json, write_json

ROOT = Path(__file__).parent.parent


def with_another_tokenizer(folder):
    """A copy of student 1 in which one special token has another name."""
    shutil.copytree(ROOT / "students/toy-1", folder)
    spec = read_json(folder / "tokenizer.json")
    spec["added_tokens"][3]["content"] = "<|other|>"
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {("<|other|>" if k == "<|mask|>" else k): v for k, v in vocab.items()}
    write_json(folder / "tokenizer.json", spec)
    return folder


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(), "nothing to evaluate"),
        (dict(run="nobody"), "runs/nobody/config.json: no such file"),
        (dict(run="base"), "--run=base needs another run"),
        (dict(run="sft", step=3), "no checkpoint of step 3 (there: 2, 4)"),
        (dict(run="sft,sft"), "sft is named twice"),
        (dict(run="sft", data="data/nothing"), "data/nothing: no such folder"),
        (dict(run="sft", dtype="int8"), "--dtype=int8"),
        (dict(run="../sft"), "--run=../sft: must be the name of a folder in runs/"),
        (dict(run="sft", device="foo"), "--device=foo: not on this machine"),
        (dict(run="sft", samples=0), "no problem, or no sample"),
        (dict(run="sft", limit=-20), "--limit=-20: must be at least 0"),
        (dict(run="sft", verifier="sympy"), "--verifier=sympy: must be one of boxed"),
        (dict(run="sft,t3s", server="http://localhost:1/v1"), "one run or model at a time"),
        (dict(run="sft", server="localhost"), "must be a URL such as"),
        (dict(run="sft", samples_from="nothing.jsonl"), "nothing.jsonl: cannot be read"),
        (dict(run="sft", temperature=-1.0), "temperature"),
        (dict(run="sft,t3s", data="no-answers"), "has no answer"),
        (dict(run="sft", model="other"), "made with another tokenizer than other has"),
        (dict(model="missing", data="data/toy-1/unseen"), "missing"),
        (dict(model="other"), "--data is missing"),
    ],
)
def test_what_cannot_work_is_one_line_and_writes_nothing(toy_runs, keys, message):
    with_another_tokenizer(toy_runs / "other")
    if keys.get("data") == "no-answers":
        Path("plain.jsonl").write_text('{"prompt": "1+1?", "response": "2"}\n')
        data.main(source="plain.jsonl", tokenizer=str(ROOT / "students/toy-1"), out="no-answers")
    before = files("runs")
    with pytest.raises(InputError) as error:
        evaluation.main(**keys)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert files("runs") == before
