"""real.py with a student that knows nothing and a task made here: its commands, rows and resumption."""

import json
import random
import sys
import types
from pathlib import Path

import pytest
from safetensors.torch import save_file
from text_world import ID, QWEN3, chat_tokenizer
from worlds import SHAPE

import data
import model
import real
from hf import families
from plumbing.config import InputError, load_select, write_json
from plumbing.runs import run_keys
from verify import grade

QUICK = dict(
    model="student",
    dtype="float32",
    terse_steps=2,
    steps=2,
    lr=1e-3,
    record_every=1,
    traces=8,
    unseen_problems=6,
    record_problems=4,
)


def create_dataset(name, min_terms, max_terms, min_digits, max_digits, seed, size):
    """Entries as reasoning-gym's chain_sum has them."""
    assert (name, min_terms, max_terms, min_digits, max_digits) == ("chain_sum", 3, 3, 1, 1)
    rng = random.Random(seed)
    for _ in range(size):
        words = f"{rng.randrange(10)} {rng.choice('+-')} {rng.randrange(10)} {rng.choice('+-')} {rng.randrange(10)}"
        question = f"State the final answer to the following arithmetic problem: {words} ="
        yield {"question": question, "answer": str(eval(words))}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A working folder with a tiny student, and the generator in reasoning-gym's place."""
    monkeypatch.chdir(tmp_path)
    ends = dict(eos_token_id=ID["<|im_end|>"], pad_token_id=0)
    shape = SHAPE | dict(max_position_embeddings=600)
    chat_tokenizer(Path("student"), QWEN3)
    config = dict(model_type="qwen3", vocab_size=256 + len(ID), tie_word_embeddings=True, **ends, **shape)
    write_json(Path("student/config.json"), config)
    weights = model.Transformer(families.read_config("student")).init_weights(0)
    save_file(weights.state_dict(), "student/model.safetensors", metadata={"format": "pt"})
    module = types.ModuleType("reasoning_gym")
    module.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    # a student that is never right has no bottleneck of its own
    monkeypatch.setattr(load_select(), "find_bottleneck", lambda *args, **keys: 1)
    return tmp_path


def test_traces_are_right_and_differ_in_manner_alone(small):
    found = real.problems(100)
    assert len({question for question, _, _ in found}) == 100
    rng = random.Random(0)
    for question, answer, steps in found:
        first, second = steps
        assert first.startswith(question.split(":")[1].strip().rsplit(" ", 3)[0])
        assert second.split(" = ")[1] == answer
        brief, long = real.terse(answer, steps, rng), real.teacher(answer, steps, rng)
        for text in (brief, long):
            assert grade(text, answer, "integer") and first in text and second in text
    said = {real.teacher(answer, steps, rng) for _ in range(20)}
    assert len(said) > 15  # the last problem's, in other words each time


def test_no_unseen_problem_is_trained_on(small):
    brief, taught, unseen = real.parts(real.Config(**QUICK))
    assert [len(part) for part in (brief, taught, unseen)] == [480, 8, 6]
    assert len({question for part in (brief, taught, unseen) for question, _, _ in part}) == 494


def test_every_row_is_run_once_however_often_it_is_stopped(small, monkeypatch, capsys):
    calls = []
    measure = real.measure

    def counted(cfg, row, seed, base):
        calls.append(row)
        if row == "random" and calls.count(row) == 1:
            raise KeyboardInterrupt
        return measure(cfg, row, seed, base)

    def own_answers(cfg, row, seed, base, sampling):  # a student that knows nothing never ends
        return f"data/real/teacher-{seed}"

    monkeypatch.setattr(real, "measure", counted)
    monkeypatch.setattr(real, "own_answers", own_answers)
    with pytest.raises(KeyboardInterrupt):
        real.main(**QUICK)
    assert list(table()["done"])[:4] == ["base", "sft", "t3s", "t3s-1"]
    rows = real.main(**QUICK)
    assert [row["name"] for row in rows] == list(real.ROWS)
    assert sorted(calls) == sorted([*real.ROWS, "random"])
    out = capsys.readouterr().out
    assert "$ python eval.py --run=base,real/1/sft,real/1/t3s,real/1/t3s-1," in out
    assert Path("runs/real/real.png").read_bytes().startswith(b"\x89PNG")
    base = "runs/real/student/checkpoints/000002"
    for row in real.ROWS[1:]:
        keys = run_keys(Path(f"runs/real/1/{row}"))
        assert keys["model"] == base and keys["steps"] == 2 and keys["dtype"] == "float32"
        assert keys["record_every"] == (row in ("sft", "t3s"))
    with pytest.raises(InputError, match=r"table\.json: made with other keys"):
        real.main(**QUICK | dict(steps=3))


def table():
    return json.loads(Path("runs/real/table.json").read_text())


def test_own_answers_are_the_students(small, monkeypatch):
    """Greedy and right ones, made and tokenised by the commands that are printed."""
    cfg = real.Config(**QUICK)
    seen = []
    monkeypatch.setattr(real.own, "main", lambda **keys: seen.append(keys))
    monkeypatch.setattr(data, "main", lambda **keys: seen.append(keys))
    for row in real.OWN_ANSWERS:
        real.own_answers(cfg, row, "1", "student", dict(max_new_tokens=100, seed=1))
    greedy, _, correct, made = seen
    assert greedy["temperature"] == 0 and "correct" not in greedy
    assert correct["correct"] and correct["samples"] == 4
    assert made["source"] == correct["out"] and made["template"] == "none"


def test_without_reasoning_gym(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        real.main(**QUICK)
