"""toy.py: the world is a function of its seed, traces are as its docstring says, students are Hugging Face folders."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3ForCausalLM
from worlds import make_world

import data
import eval as evaluation
import model
import toy
import verify
from hf import tokenizer as tokenizer_file
from plumbing.config import InputError
from sample import Sampling

ROOT = Path(__file__).parent.parent
STUDENTS = sorted((ROOT / "students").glob("toy-[0-9]*"))


def problems(n, seed="problems"):
    rng = random.Random(seed)
    return [toy.make_problem(rng) for _ in range(n)]


def parse(trace):
    """A trace -> [(word or "", a, operator, b, result), ...], final answer. Every character has to be accounted for."""
    step = r"(?:([a-z]+) )?(\d)([+*-])(\d)=(\d); "
    assert re.fullmatch(rf"(?:{step})+>\d", trace), trace
    return [(w, int(a), o, int(b), int(c)) for w, a, o, b, c in re.findall(step, trace)], int(trace[-1])


def within(count, n, p):
    """Is a binomial count within four standard deviations?"""
    return abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


# ---------------------------------------------------------------------------------------------------------------------
# Problems and traces


def test_answers_are_what_python_computes():
    seen = set()
    for problem in problems(500):
        assert re.fullmatch(r"\d([+*-]\d){4}", problem)
        a, *rest = re.findall(r"\d|[+*-]", problem)
        nested = a
        for operator, digit in zip(rest[::2], rest[1::2], strict=True):
            nested = f"(({nested}) {operator} {digit}) % 10"
        assert toy.solve(problem) == eval(nested)
        seen.add(toy.solve(problem))
    assert seen == set(range(10))


def test_problems_are_drawn_evenly():
    drawn = problems(3000)
    for symbol in "0123456789":
        assert within(sum(p.count(symbol) for p in drawn), 15000, 0.1)
    for symbol in "+-*":
        assert within(sum(p.count(symbol) for p in drawn), 12000, 1 / 3)


def test_the_teacher_never_slips_and_always_has_a_word():
    rng, words = random.Random(1), []
    for problem in problems(500):
        steps, answer = parse(toy.teacher_trace(rng, problem))
        carried = int(problem[0])
        for (word, a, operator, b, result), asked in zip(steps, re.findall(r"([+*-])(\d)", problem), strict=True):
            assert (operator, str(b)) == asked and a == carried  # every step, in order, nothing else carried
            assert result == toy.apply(operator, a, b)
            words.append(word)
            carried = result
        assert answer == carried == toy.solve(problem)
    for word in toy.TEACHER:
        assert within(words.count(word), 2000, 1 / 4)


def test_the_student_slips_in_what_it_carries_and_has_its_own_words():
    rng, n, slips, words, right = random.Random(2), 0, 0, [], 0
    for problem in problems(3000):
        steps, answer = parse(toy.student_trace(rng, problem))
        carried = int(problem[0])
        for (word, a, operator, b, result), asked in zip(steps, re.findall(r"([+*-])(\d)", problem), strict=True):
            assert (operator, str(b)) == asked and result == toy.apply(operator, a, b)  # it computes faultlessly
            slips += a != carried
            words.append(word)
            carried, n = result, n + 1
        assert answer == carried
        right += answer == toy.solve(problem)
    assert within(slips, n, toy.WORLDS["slips"].slip_rate * 0.9)  # one in ten random digits is the right one
    assert within(sum(word in toy.FAMILIAR for word in words), n, toy.FAMILIAR_RATE)
    assert within(sum(word in toy.TEACHER for word in words), n, toy.TEACHER_RATE)
    for word in toy.FAMILIAR:
        assert within(words.count(word), n, toy.FAMILIAR_RATE / 4)
    assert 0.6 < right / 3000 < 0.8  # good, with something to learn


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer and the student


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder, seed=7, out="world", teacher=40, unseen=60, cut=None, students=()) / "world"


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_ids_equal_tokenizers_and_every_symbol_is_one(world):
    ours = tokenizer_file.load_tokenizer(world / "untrained")
    theirs = Tokenizer.from_file(str(world / "untrained/tokenizer.json"))
    symbols = [*"0123456789+-*=>?", "; ", *(word + " " for word in toy.FAMILIAR + toy.TEACHER), *toy.SPECIAL]
    assert all(len(ours.encode(symbol)) == 1 for symbol in symbols)
    rng = random.Random(0)
    texts = [toy.student_trace(rng, p) for p in problems(50)] + [toy.teacher_trace(rng, p) for p in problems(50)]
    texts += ["", " ", "wait", "waiting  ok ", "so;then ;", "Ünïcode \u00e9 \U0001f600 \n\t", "<|end|><|user|>5"]
    texts += ["".join(rng.choice(symbols + ["x", "é", " "]) for _ in range(30)) for _ in range(50)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    trace = toy.teacher_trace(rng, "3+5*2-7+4")
    assert len(ours.encode(trace)) == 4 * 7 + 2  # a word, five symbols and a semicolon a step; > and the answer


def test_the_chat_template_equals_transformers(world):
    ours, theirs = tokenizer_file.load_tokenizer(world / "untrained"), AutoTokenizer.from_pretrained(world / "untrained")
    ask = [{"role": "user", "content": "3+5?"}]
    done = [*ask, {"role": "assistant", "content": "3+5=8; >8"}]
    assert ours.apply_chat_template(ask, add_generation_prompt=True, tokenize=False) == "<|user|>3+5?<|assistant|>"
    for messages, prompt in ((ask, True), (done, False)):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    assert ours.end_of_turn_id == ours.eos_token_id == theirs.eos_token_id == 0
    assert ours.mask_token_id == theirs.mask_token_id == 3


@pytest.mark.parametrize("name", ["untrained", *(student.name for student in STUDENTS)])
def test_students_load_in_transformers_with_equal_logits(world, name):
    folder = world / name if name == "untrained" else ROOT / "students" / name
    ours, theirs = model.load(folder), Qwen3ForCausalLM.from_pretrained(folder).eval()
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() < 150_000
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, ours.config.vocab_size, (3, 50)))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4 * theirs(ids).logits.abs().max()


def test_three_students_are_shipped_and_know_their_world(world):
    """Same tokenizer as toy.py writes now; greedily they hardly err, so what T3S can teach them is not to slip."""
    assert [student.name for student in STUDENTS] == ["toy-1", "toy-2", "toy-3"]
    unseen = data.load(world / "unseen")
    untrained = tokenizer_file.load_tokenizer(world / "untrained")
    for folder in (ROOT / "students").iterdir():  # diffusion students too: one selects for the other
        assert tokenizer_file.load_tokenizer(folder).hash == untrained.hash
        assert (folder / "tokenizer.json").read_bytes() == (world / "untrained/tokenizer.json").read_bytes()
    for folder in STUDENTS:
        tokenizer = tokenizer_file.load_tokenizer(folder)
        assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000
        greedy, _ = evaluation.evaluate(model.load(folder), tokenizer, unseen, Sampling(temperature=0, max_new_tokens=60))
        sampled, rows = evaluation.evaluate(model.load(folder), tokenizer, unseen, Sampling(max_new_tokens=60), samples=3)
        assert greedy > 0.85 and 0.5 < sampled < greedy - 0.05
        words = [row["response"].split()[0] for row in rows]
        assert sum(word in toy.FAMILIAR for word in words) > 10 * sum(word in toy.TEACHER for word in words)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_world_is_a_function_of_its_seed(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.main(seed=7, out="same", teacher_problems=40, unseen_problems=60)
    toy.main(seed=8, out="other", teacher_problems=40, unseen_problems=60)
    for name in ("teacher.jsonl", "unseen.jsonl", "untrained/model.safetensors", "teacher/tokens.bin"):
        assert Path("same", name).read_bytes() == (world / name).read_bytes()
        assert Path("other", name).read_bytes() != (world / name).read_bytes()
    assert not Path("same/pretrain.jsonl").exists()  # only the students need it


def test_a_folder_that_holds_other_things_is_not_erased(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years")
    with pytest.raises(InputError, match="mine: holds other things"):
        toy.main(out="mine", teacher_problems=2, unseen_problems=2, pretrain_steps=1)
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    for _ in range(2):  # its own is replaced
        toy.main(out="world", teacher_problems=2, unseen_problems=2, pretrain_steps=1)


def test_unseen_problems_are_in_no_other_file(tmp_path):
    cfg = toy.Config(seed=3, pretrain=True, pretrain_steps=20, teacher_problems=100, unseen_problems=200)
    toy.write_world(cfg, tmp_path / "world")
    found = {name: jsonl(tmp_path / f"world/{name}.jsonl") for name in ("pretrain", "teacher", "unseen")}
    prompts = {name: {line["prompt"] for line in lines} for name, lines in found.items()}
    assert {name: len(lines) for name, lines in found.items()} == {"pretrain": 1280, "teacher": 100, "unseen": 200}
    assert len(prompts["unseen"]) == 200 and not prompts["unseen"] & (prompts["teacher"] | prompts["pretrain"])
    for name, lines in found.items():
        for line in lines:
            assert line["answer"] == toy.solve(line["prompt"].removesuffix("?"))
            assert name == "pretrain" or verify.grade(line["response"], line["answer"], "toy")


def test_the_data_folders_hold_the_traces(world):
    teacher, tokenizer = data.load(world / "teacher"), tokenizer_file.load_tokenizer(world / "untrained")
    lines = jsonl(world / "teacher.jsonl")
    assert teacher.meta["verifier"] == "toy" and len(teacher) == len(lines) == 40
    for i, line in enumerate(lines):
        assert tokenizer.decode(teacher.prompt(i)) == f"<|user|>{line['prompt']}<|assistant|>"
        assert tokenizer.decode(teacher.response(i)) == line["response"] + "<|end|>"


@pytest.mark.parametrize("keys", [dict(teacher_problems=0), dict(unseen_problems=-1), dict(pretrain_steps=0)])
def test_a_world_without_problems_is_refused(keys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="must be at least 1"):
        toy.main(**keys)
    assert not any(tmp_path.iterdir())


def test_pretraining_writes_a_student_and_cleans_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy.main(seed=4, pretrain=True, diffusion=True, pretrain_steps=2, diffusion_steps=2,
             teacher_problems=2, unseen_problems=2)  # fmt: skip
    trained, untrained = (model.load(f).state_dict() for f in ("students/toy-4", "data/toy-4/untrained"))
    assert trained.keys() == untrained.keys()
    assert any(not torch.equal(trained[name], untrained[name]) for name in trained)
    diffusion = model.load("students/toy-diffusion-4")
    assert diffusion.config.is_diffusion and diffusion.config.mask_token_id == 3
    hashes = {tokenizer_file.load_tokenizer(Path("students", name)).hash for name in ("toy-4", "toy-diffusion-4")}
    assert len(hashes) == 1  # so that the autoregressive one may select for it
    assert not any(Path("runs").iterdir())
    assert "pretrained student: students/toy-4" in capsys.readouterr().out
