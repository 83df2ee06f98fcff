"""own.py: the student's own answers become training data, prompts unchanged."""

import json
from pathlib import Path

import pytest

import data
import own
import toy
import verify
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError

STUDENT = Path(__file__).parent.parent / "students" / "toy-1"
WORLD = dict(teacher=12, cut=None, students=())
ASK = dict(model=str(STUDENT), data="data/toy-1/teacher", max_new_tokens=60, device="cpu")


def prompts(folder):
    loaded = data.load(folder)
    return {e["id"]: loaded.prompt(i).tolist() for i, e in enumerate(loaded.examples)}


def test_greedy_answers_replace_the_responses_and_nothing_else(here, capsys):
    lines = own.main(**ASK, temperature=0.0, out="own.jsonl")
    assert lines == [json.loads(line) for line in Path("own.jsonl").read_text().splitlines()]
    assert "own.jsonl: 12 of 12 problems" in capsys.readouterr().out
    data.main(source="own.jsonl", tokenizer=str(STUDENT), template="none", out="own")
    assert prompts("own") == prompts("data/toy-1/teacher")
    tokenizer = load_tokenizer(STUDENT)
    made = data.load("own")
    for i, line in enumerate(lines):
        problem = line["prompt"].removeprefix("<|user|>").removesuffix("?<|assistant|>")
        assert line["answer"] == str(toy.solve(problem))
        assert tokenizer.decode(made.response(i)) == line["response"] + "<|end|>"
        assert not any(word in line["response"] for word in toy.TEACHER)  # its own manner
    # the same command in another batch size writes the same answers
    assert own.main(**ASK, temperature=0.0, out="again.jsonl", batch_size=5) == lines


def test_correct_answers_only_and_one_of_each_problem(here):
    lines = own.main(**ASK, samples=6, correct=True, out="own.jsonl")
    ids = [line["id"] for line in lines]
    assert len(set(ids)) == len(ids) >= 10
    assert all(verify.grade(line["response"], line["answer"], "toy") for line in lines)
    # all answers: some are wrong, and what is kept is one of those that were sampled
    all_lines = own.main(**ASK, samples=6, out="all.jsonl")
    right = [verify.grade(line["response"], line["answer"], "toy") for line in all_lines]
    assert len(all_lines) == 12 and not all(right)


def test_the_kept_answer_is_drawn_among_those_that_are_fit():
    cfg = own.Config(correct=True)
    chosen = []
    for problem in range(300):
        rows = []
        for number, (correct, truncated) in enumerate([(0, 0), (1, 0), (1, 1), (1, 0)]):
            row = {"id": str(problem), "sample": number, "correct": correct, "truncated": truncated}
            rows.append(row)
        chosen.append(own.keep_one(rows, cfg)["sample"])
    assert set(chosen) == {1, 3} and 110 < chosen.count(1) < 190
    assert own.keep_one(rows[:1], cfg) is None
    assert own.keep_one(rows[2:3], own.Config()) is None  # cut off, though right


def test_a_diffusion_student_answers_too(here):
    student = str(STUDENT.with_name("toy-diffusion-1"))
    keys = ASK | dict(model=student, temperature=0.0)
    lines = own.main(**keys, correct=True, out="own.jsonl")
    assert len(lines) >= 10
    assert all(verify.grade(line["response"], line["answer"], "toy") for line in lines)


@pytest.mark.parametrize("keys, message", [
    (dict(model=""), "--model is missing"),
    (dict(data=""), "--data is missing"),
    (dict(out=""), "--out is missing"),
    (dict(samples=0), "--samples=0: must be at least 1"),
    (dict(max_new_tokens=3), "none of its 12 answers is complete"),
    (dict(dtype="float16"), "must be float32 or bfloat16"),
    (dict(model="other"), "made with another tokenizer than other has; run data.py"),
])  # fmt: skip
def test_what_cannot_work_is_refused(here, keys, message):
    (here / "other").mkdir()
    for path in STUDENT.iterdir():
        text = path.read_bytes()
        (here / "other" / path.name).write_bytes(text.replace(b"<|mask|>", b"<|hide|>"))
    with pytest.raises(InputError, match=message):
        own.main(**{**ASK, "out": "own.jsonl", **keys})
    assert not Path("own.jsonl").exists()
