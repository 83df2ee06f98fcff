"""real.py with a student that knows nothing and a task made here: its commands, rows and resumption."""

import json
import os
import random
import subprocess
import sys
import time
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
from plumbing.parallel import Interrupt
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


ANIMALS = {"ant": 6, "bee": 6, "bird": 2, "cat": 4, "crab": 10, "deer": 4}
ANIMALS |= {"dog": 4, "duck": 2, "human": 2, "leech": 0, "shrimp": 10, "snake": 0, "spider": 8}


def create_dataset(name, seed, size, **keys):
    """Entries as reasoning-gym's chain_sum and leg_counting have them."""
    rng = random.Random(seed)
    for _ in range(size):
        if name == "chain_sum":
            assert keys == dict(min_terms=3, max_terms=3, min_digits=1, max_digits=1)
            words = f"{rng.randrange(10)} {rng.choice('+-')} {rng.randrange(10)} {rng.choice('+-')} {rng.randrange(10)}"
            question = f"State the final answer to the following arithmetic problem: {words} ="
            yield {"question": question, "answer": str(eval(words)), "metadata": {}}
        else:
            assert keys == dict(min_animals=2, max_animals=2, min_instances=1, max_instances=9)
            animals = {animal: rng.randint(1, 9) for animal in rng.sample(list(ANIMALS), 2)}
            names = ", ".join(f"{n} {animal}{'s' if n > 1 else ''}" for animal, n in animals.items())
            total = sum(n * ANIMALS[animal] for animal, n in animals.items())
            yield {"question": f"How many legs: {names}?\n", "answer": str(total), "metadata": {"animals": animals}}


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
    legs = types.ModuleType("reasoning_gym.arithmetic.leg_counting")
    legs.ANIMALS = ANIMALS
    monkeypatch.setitem(sys.modules, legs.__name__, legs)
    monkeypatch.setattr(real, "run_apart", real.run)
    # a student that is never right has no bottleneck of its own
    monkeypatch.setattr(load_select(), "find_bottleneck", lambda *args, **keys: 1)
    return tmp_path


@pytest.mark.parametrize("task", real.TASKS)
def test_traces_are_right_and_differ_in_manner_alone(small, task):
    found = real.problems(task, 100)
    assert len({problem.question for problem in found}) == 100
    rng = random.Random(0)
    for problem in found:
        assert problem.steps[-1].split(" = ")[1] == problem.answer
        brief, long = real.terse(problem, rng), real.teacher(problem, rng)
        for text in (brief, long):
            assert grade(text, problem.answer, "integer") and "{" not in text
            assert all(step in text for step in problem.steps)
    said = {real.teacher(found[0], rng) for _ in range(20)}
    assert len(said) > 15  # the same problem's, in other words each time


def test_steps_of_a_solution(small):
    entry = dict(question="State: 3 - 7 + 2 =")
    assert real.solve_sum(entry) == ["3 - 7 = -4", "-4 + 2 = -2"]
    entry = dict(metadata=dict(animals=dict(ant=2, crab=1)))
    steps = ["2 ants have 2 * 6 = 12 legs", "1 crab has 1 * 10 = 10 legs", "12 + 10 = 22"]
    assert real.solve_legs(entry) == steps


@pytest.mark.parametrize("task", real.TASKS)
def test_no_unseen_problem_is_trained_on(small, task):
    brief, taught, unseen = real.parts(real.Config(**QUICK, task=task))
    assert [len(part) for part in (brief, taught, unseen)] == [480, 8, 6]
    assert len({problem.question for part in (brief, taught, unseen) for problem in part}) == 494


def test_half_of_the_animals_are_the_teachers_alone(small):
    cfg = real.Config(**QUICK | dict(traces=60, unseen_problems=60))
    brief, taught, unseen = real.parts(cfg)
    rare = ("bee", "cat", "deer", "duck", "leech", "snake")  # every second one of the alphabet
    for part, some in ((brief, False), (taught, True), (unseen, True)):
        met = {name for problem in part for name in rare if f" {name}" in problem.question}
        assert met == (set(rare) if some else set())
    # the teacher's and the unseen problems are of one kind: either may be of well-known animals alone
    assert any(problem.known for problem in taught) and any(problem.known for problem in unseen)


def test_every_row_is_run_once_however_often_it_is_stopped(small, monkeypatch, capsys):
    calls = []
    measure = real.measure
    rows_run = real.all_rows(real.Config(**QUICK))
    keys = QUICK | dict(rows=",".join(rows_run))

    def counted(cfg, row, seed, base, done):
        calls.append(row)
        if row == "random" and calls.count(row) == 1:
            raise KeyboardInterrupt
        return measure(cfg, row, seed, base, done)

    def own_answers(cfg, row, seed, base):  # a student that knows nothing never ends
        return f"data/real/leg_counting/teacher-{seed}"

    monkeypatch.setattr(real, "measure", counted)
    monkeypatch.setattr(real, "own_answers", own_answers)
    with pytest.raises(KeyboardInterrupt):
        real.main(**keys)
    assert list(table()["done"])[:4] == ["base", "sft", "t3s", "kinds"]
    # a row that was stopped in the middle is no row yet
    Path("runs/real/leg_counting/1/random").mkdir()
    capsys.readouterr()
    real.main(**QUICK | dict(rows="base,sft"))
    out = capsys.readouterr().out
    assert "leg_counting/1/kinds" in out and "leg_counting/1/random" not in out
    Path("runs/real/leg_counting/1/random").rmdir()
    rows = real.main(**keys)
    assert [row["name"] for row in rows] == rows_run
    assert sorted(calls) == sorted([*rows_run, "random"])
    out = capsys.readouterr().out
    home = "real/leg_counting/1"
    assert f"$ python eval.py --run=base,{home}/sft,{home}/t3s,{home}/kinds," in out
    assert Path("runs/real/leg_counting/real.png").read_bytes().startswith(b"\x89PNG")
    assert Path("runs/real/leg_counting/probes.png").read_bytes().startswith(b"\x89PNG")
    # the bottleneck is step 1 here, with answers, without, and by the first probe
    accuracies = {row: cells["1"]["accuracy"] for row, cells in table()["done"].items()}
    twins = ("kinds-label_free", "probe-1")
    for row in twins:
        assert f"{row}: the tokens of kinds, which is trained already" in out
        assert accuracies[row] == accuracies["kinds"] and not Path(f"runs/real/leg_counting/1/{row}").exists()
    base = "runs/real/leg_counting/student/checkpoints/000002"
    for row in set(rows_run) - {"base", *twins}:
        keys = run_keys(Path(f"runs/real/leg_counting/1/{row}"))
        assert not Path(f"runs/real/leg_counting/1/{row}/resume").exists()
        assert keys["model"] == base and keys["steps"] == 2 and keys["dtype"] == "float32"
        assert keys["record_every"] == (row == "sft")
    with pytest.raises(InputError, match=r"table\.json: made with other keys"):
        real.main(**QUICK | dict(steps=3))
    with pytest.raises(InputError, match=r"--rows=base,t3s: must be base,sft and any of t3s, kinds, "):
        real.main(**QUICK | dict(rows="base,t3s"))


def table():
    return json.loads(Path("runs/real/leg_counting/table.json").read_text())


def test_own_answers_are_the_students(small, monkeypatch):
    """Greedy and right ones, made and tokenised by the commands that are printed."""
    cfg = real.Config(**QUICK)
    seen = []
    monkeypatch.setattr(real.own, "main", lambda **keys: seen.append(keys))
    monkeypatch.setattr(data, "main", lambda **keys: seen.append(keys))
    for row in real.OWN_ANSWERS:
        real.own_answers(cfg, row, "1", "student")
    greedy, _, correct, made = seen
    assert greedy["temperature"] == 0 and "correct" not in greedy
    assert correct["correct"] and correct["samples"] == 4
    assert made["source"] == correct["out"] and made["template"] == "none"


def test_a_process_of_its_own():
    """Gives the result back, and what went wrong in one line, also where it was killed."""
    assert real.run_apart(os.getpid, "train.py") != os.getpid()
    with pytest.raises(InputError, match="--tokenizer is missing"):
        real.run_apart(data.main, "data.py", source="x.jsonl")
    with pytest.raises(InputError, match=r"train\.py: its process was killed"):
        real.run_apart(os._exit, "train.py", status=9)


def saves_when_asked(path):
    """As train.py does it."""
    with Interrupt() as interrupt:
        Path(path).write_text("running")
        while not interrupt.asked():
            time.sleep(0.1)
    Path(path).write_text("saved")


def test_sigterm_reaches_the_process_that_trains(tmp_path):
    state = tmp_path / "state"
    call = f"real.run_apart(test_real.saves_when_asked, 'train.py', path={str(state)!r})"
    setup = "import signal, real, test_real; signal.signal(signal.SIGTERM, real.stop)"
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen([sys.executable, "-c", f"{setup}; {call}"], env=os.environ | {"PYTHONPATH": path})
    try:
        while not state.exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert state.read_text() == "saved"


def test_without_reasoning_gym(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        real.main(**QUICK)
