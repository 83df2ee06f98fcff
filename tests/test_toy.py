"""toy.py: a world is a function of its seed, traces are as its docstring says, students are Hugging
Face folders."""

import hashlib
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
from worlds import inside, make_world

import data
import eval as evaluation
import model
import toy
import train
import verify
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError, load_select, read_json
from sampling import Sampling

ROOT = Path(__file__).parent.parent
STUDENTS = sorted((ROOT / "students").glob("toy-[0-9]*"))
SMALL = dict(teacher_problems=50, unseen_problems=40, pretrain_steps=5, diffusion_steps=7)
PRETRAINED = dict(seed=5, pretrain=True, diffusion=True, **SMALL)


def problems(n, seed="problems"):
    rng = random.Random(seed)
    return [toy.make_problem(rng) for _ in range(n)]


def parse(trace):
    """A trace -> [(word or "", a, operator, b, result), ...], final answer. Every character has to
    be accounted for."""
    step = r"(?:([a-z]+) )?(\d)([+*-])(\d)=(\d); "
    assert re.fullmatch(rf"(?:{step})+>\d", trace), trace
    steps = [(w, int(a), o, int(b), int(c)) for w, a, o, b, c in re.findall(step, trace)]
    return steps, int(trace[-1])


def asked(problem):
    """[(operator, digit as text), ...] behind a problem's first digit."""
    return re.findall(r"([+*-])(\d)", problem)


def within(count, n, p):
    """Is a binomial count within four standard deviations?"""
    return abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


# --------------------------------------------------------------------------------------------------
# Problems and traces


def test_answers_are_what_python_computes():
    seen = set()
    for problem in problems(500):
        assert re.fullmatch(r"\d([+*-]\d){4}", problem)
        nested = problem[0]
        for operator, digit in asked(problem):
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
    rng = random.Random(1)
    words = []
    for problem in problems(500):
        steps, answer = parse(toy.teacher_trace(rng, problem))
        carried = int(problem[0])
        for (word, a, operator, b, result), step in zip(steps, asked(problem), strict=True):
            # every step, in order, nothing else carried
            assert (operator, str(b)) == step and a == carried
            assert result == toy.apply(operator, a, b)
            words.append(word)
            carried = result
        assert answer == carried == toy.solve(problem)
    for word in toy.TEACHER:
        assert within(words.count(word), 2000, 1 / 4)


def test_the_student_slips_in_what_it_carries_and_has_its_own_words():
    rng = random.Random(2)
    slips = []
    words = []
    right = 0
    for problem in problems(3000):
        steps, answer = parse(toy.student_trace(rng, problem))
        carried = int(problem[0])
        for (word, a, operator, b, result), step in zip(steps, asked(problem), strict=True):
            assert (operator, str(b)) == step
            assert result == toy.apply(operator, a, b)  # it computes faultlessly
            slips.append(a != carried)
            words.append(word)
            carried = result
        assert answer == carried
        right += answer == toy.solve(problem)
    n = len(words)
    # one in ten random digits is the right one
    assert within(sum(slips), n, toy.WORLDS["slips"].slip_rate * 0.9)
    assert within(sum(word in toy.FAMILIAR for word in words), n, toy.WORLDS["slips"].familiar_rate)
    assert within(sum(word in toy.TEACHER for word in words), n, toy.TEACHER_RATE)
    for word in toy.FAMILIAR:
        assert within(words.count(word), n, toy.WORLDS["slips"].familiar_rate / 4)
    assert 0.6 < right / 3000 < 0.8  # good, with something to learn


def test_in_the_facts_world_24_products_are_guessed_and_all_else_is_computed():
    unknown = toy.unknown_products("facts", 3)
    assert len(unknown) == 24 and all(2 <= a <= 9 and 2 <= b <= 9 for a, b in unknown)
    assert unknown != toy.unknown_products("facts", 4)
    assert not toy.unknown_products("slips", 3)
    rng = random.Random(5)
    guesses = []
    for problem in problems(5000):
        steps, _ = parse(toy.student_trace(rng, problem, toy.WORLDS["facts"], unknown=unknown))
        for _, a, operator, b, result in steps:
            if operator == "*" and (a, b) in unknown:
                guesses.append(result == toy.apply(operator, a, b))
            else:
                assert result == toy.apply(operator, a, b)
    assert len(guesses) > 500 and within(sum(guesses), len(guesses), 0.1)


# --------------------------------------------------------------------------------------------------
# Classes of token


def test_every_character_of_a_trace_has_the_class_that_it_should():
    trace = "hence 3*7=1; so 1+4=5; >5"
    found = toy.character_classes(trace, unknown={(3, 7)})
    marked = {
        "teacher's word": "hence",
        "own word": "so",
        "copied": "3*7+4",
        "carried": "1",
        "unknown result": "1",
        "known result": "5",
        "answer": "5",
    }
    for name, text in marked.items():
        assert "".join(c for c, of in zip(trace, found, strict=True) if of == name) == text
    assert toy.character_classes(trace)[10] == "known result"  # the same product, known


def test_the_first_error_of_an_answer_is_found():
    ask = "3*7+4"
    assert toy.first_error(ask, "3*7=1; 1+4=5; >5") is None
    assert toy.first_error(ask, "ok 3*7=1; wait 1+4=5; >5") is None
    assert toy.first_error(ask, "3*7=2; 2+4=6; >6") == "known result"
    assert toy.first_error(ask, "3*7=2; 2+4=6; >6", unknown={(3, 7)}) == "unknown result"
    assert toy.first_error(ask, "3*7=1; 2+4=6; >6") == "carried"
    assert toy.first_error(ask, "4*7=8; 8+4=2; >2") == "copied"
    assert toy.first_error(ask, "3*7=1; 1+5=6; >6") == "copied"
    assert toy.first_error(ask, "3*7=1; 1+4=5; >4") == "answer"
    for malformed in ("", "3*7=1; 1+4=5", "3*7=1; >1", "3*7=1; ; 1+4=5; >5", "3*7=1; 1+4=5; >5>5"):
        assert toy.first_error(ask, malformed) == "form"


def test_a_run_by_class_of_token(tmp_path, capsys):
    """Its confidences are the recorded ones, counted token by token; its errors add up."""
    make_world(tmp_path, seed=3, world="facts", teacher=6, unseen=5, cut=None, students=())
    with inside(tmp_path):
        keys = dict(steps=2, batch_size=0, lr=1e-3, record_every=1, max_new_tokens=40)
        student = str(STUDENTS[0])
        train.main(run="sft", model=student, data="data/facts-3/teacher", device="cpu", **keys)
        evaluation.main(run="sft", data="data/facts-3/unseen", device="cpu")
        load_select().main(run="sft", bottleneck="2", show=0)
        mask = np.load("runs/sft/selection/t3s/mask.npy")
        with np.load("runs/sft/trajectory/000000.npz") as recorded:
            start = recorded["logprob"]
        capsys.readouterr()
        found = toy.main(classes="sft")
        printed = capsys.readouterr().out
        unknown = set(map(tuple, read_json("data/facts-3/world.json")["unknown"]))
        examples = data.load("data/facts-3/teacher")
        with np.load("runs/sft/trajectory/000001.npz") as recorded:
            logprob = recorded["logprob"]
        answers = jsonl(Path("runs/sft/eval/unseen-000002.jsonl"))
    assert unknown == toy.unknown_products("facts", 3)
    assert list(found["confidence"]) == [0, 1, 2]
    # a teacher's step is word a operator b = result ; and the trace ends in > answer <|end|>
    of = {name: [] for name in ("teacher's word", "carried", "unknown result", "answer")}
    tokenizer = load_tokenizer(STUDENTS[0])
    for i, (_, begin, end) in enumerate(examples.spans):
        steps, _ = parse(tokenizer.decode(examples.response(i)[:-1]))
        for number, (_, a, operator, b, _) in enumerate(steps):
            at = begin + 7 * number
            of["teacher's word"].append(at)
            if number:
                of["carried"].append(at + 1)
            if operator == "*" and (a, b) in unknown:
                of["unknown result"].append(at + 5)
        of["answer"].append(end - 2)
    for name, places in of.items():
        if places:
            expected = np.exp(logprob[places]).mean()
            assert found["confidence"][1][name] == pytest.approx(expected, rel=1e-5)
            left = sum(start[i] for i in places if mask[i]) / sum(start[places])
            assert found["kept"]["t3s"][name] == pytest.approx(left, rel=1e-4, abs=1e-6)
    assert of["teacher's word"] and "teacher's word" in printed
    wrong = sum(found["errors"]["unseen-000002"].values())
    first_errors = [row for row in answers if not row["correct"]]
    assert wrong >= len(first_errors) / len(answers)  # a wrong step may end in the right digit


# --------------------------------------------------------------------------------------------------
# The tokenizer and the student


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = dict(teacher=40, unseen=60, cut=None, students=())
    return make_world(folder, seed=7, out="world", **sizes) / "world"


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_ids_equal_tokenizers_and_every_symbol_is_one(world):
    ours = load_tokenizer(world / "untrained")
    theirs = Tokenizer.from_file(str(world / "untrained/tokenizer.json"))
    words = [word + " " for word in toy.FAMILIAR + toy.TEACHER]
    symbols = [*"0123456789+-*=>?", "; ", *words, *toy.SPECIAL]
    assert all(len(ours.encode(symbol)) == 1 for symbol in symbols)
    rng = random.Random(0)
    texts = [toy.student_trace(rng, p) for p in problems(50)]
    texts += [toy.teacher_trace(rng, p) for p in problems(50)]
    texts += ["", " ", "wait", "waiting  ok ", "so;then ;", "<|end|><|user|>5"]
    texts += ["Ünïcode \u00e9 \U0001f600 \n\t"]
    pieces = [*symbols, "x", "é", " "]
    texts += ["".join(rng.choice(pieces) for _ in range(30)) for _ in range(50)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    trace = toy.teacher_trace(rng, "3+5*2-7+4")
    # a step is a word, five symbols and a semicolon; then > and the answer
    assert len(ours.encode(trace)) == 4 * 7 + 2


def test_the_chat_template_equals_transformers(world):
    ours = load_tokenizer(world / "untrained")
    theirs = AutoTokenizer.from_pretrained(world / "untrained")
    ask = [{"role": "user", "content": "3+5?"}]
    done = [*ask, {"role": "assistant", "content": "3+5=8; >8"}]
    text = ours.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>3+5?<|assistant|>"
    for messages, prompt in ((ask, True), (done, False)):
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=True, return_dict=False
        )
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    assert ours.end_of_turn_id == ours.eos_token_id == theirs.eos_token_id == 0
    assert ours.mask_token_id == theirs.mask_token_id == 3


@pytest.mark.parametrize("name", ["untrained", *(student.name for student in STUDENTS)])
def test_students_load_in_transformers_with_equal_logits(world, name):
    folder = world / name if name == "untrained" else ROOT / "students" / name
    ours = model.load(folder)
    theirs = Qwen3ForCausalLM.from_pretrained(folder).eval()
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() < 150_000
    ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, (3, 50))
    ids = torch.from_numpy(ids)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_three_students_are_shipped_and_know_their_world(world):
    """The tokenizer that toy.py writes now; greedily they hardly err, so in this world there is
    little to teach them but not to slip."""
    assert [student.name for student in STUDENTS] == ["toy-1", "toy-2", "toy-3"]
    unseen = data.load(world / "unseen")
    untrained = world / "untrained"
    for folder in (ROOT / "students").iterdir():  # diffusion students too: one selects for the other
        assert load_tokenizer(folder).hash == load_tokenizer(untrained).hash
        written = (untrained / "tokenizer.json").read_bytes()
        assert (folder / "tokenizer.json").read_bytes() == written
    for folder in STUDENTS:
        student = (model.load(folder), load_tokenizer(folder), unseen)
        assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000
        at_zero = Sampling(temperature=0, max_new_tokens=60)
        greedy, _ = evaluation.evaluate(*student, at_zero)
        sampled, rows = evaluation.evaluate(*student, Sampling(max_new_tokens=60), samples=3)
        assert greedy > 0.85 and 0.5 < sampled < greedy - 0.05
        words = [row["response"].split()[0] for row in rows]
        own = sum(word in toy.FAMILIAR for word in words)
        assert own > 10 * sum(word in toy.TEACHER for word in words)


# --------------------------------------------------------------------------------------------------
# The command


def test_the_world_is_a_function_of_its_seed(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.main(seed=7, out="same", teacher_problems=40, unseen_problems=60)
    toy.main(seed=8, out="other", teacher_problems=40, unseen_problems=60)
    arrays = ("untrained/model.safetensors", "teacher/tokens.bin")
    for name in ("teacher.jsonl", "unseen.jsonl", *arrays):
        assert Path("same", name).read_bytes() == (world / name).read_bytes()
        assert Path("other", name).read_bytes() != (world / name).read_bytes()
    assert not Path("same/pretrain.jsonl").exists()  # only the students need it


@pytest.mark.parametrize("keys, name, sha256", [
    (dict(), "teacher", "6685e03269b4534d185cf13c9f64fe21e1bcef0b0c90cb2411d0395e7f3361f2"),
    (dict(), "unseen", "9d9bdd528b78fdc74a1e04c16df40b02a9ebe57acab3cc2b56e9f9d1b88d88f4"),
    (PRETRAINED, "pretrain", "ec4e936db86e186ded7c5fc8123698f802c5a3b40d2c638acace14b796117e84"),
])  # fmt: skip
def test_the_slips_world_is_the_one_that_published_figures_come_from(keys, name, sha256, tmp_path):
    toy.write_world(toy.Config(**keys), tmp_path / "world")
    written = (tmp_path / f"world/{name}.jsonl").read_bytes()
    assert hashlib.sha256(written).hexdigest() == sha256


def test_a_folder_that_holds_other_things_is_not_erased(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years")
    sizes = dict(teacher_problems=2, unseen_problems=2, pretrain_steps=1)
    with pytest.raises(InputError, match="mine: holds other things"):
        toy.main(out="mine", **sizes)
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    for _ in range(2):  # its own is replaced
        toy.main(out="world", **sizes)


@pytest.mark.parametrize("name", ["slips", "facts"])
def test_unseen_problems_are_in_no_other_file(name, tmp_path):
    sizes = dict(pretrain_steps=20, teacher_problems=100, unseen_problems=200)
    toy.write_world(toy.Config(world=name, seed=3, pretrain=True, **sizes), tmp_path / "world")
    files = ("pretrain", "teacher", "unseen")
    found = {file: jsonl(tmp_path / f"world/{file}.jsonl") for file in files}
    prompts = {file: {line["prompt"] for line in lines} for file, lines in found.items()}
    assert [len(lines) for lines in found.values()] == [1280, 100, 200]
    assert len(prompts["unseen"]) == 200
    assert not prompts["unseen"] & (prompts["teacher"] | prompts["pretrain"])
    for file, lines in found.items():
        for line in lines:
            assert line["answer"] == toy.solve(line["prompt"].removesuffix("?"))
            right = verify.grade(line["response"], line["answer"], "toy")
            assert right or file == "pretrain"


def test_the_data_folders_hold_the_traces(world):
    teacher = data.load(world / "teacher")
    tokenizer = load_tokenizer(world / "untrained")
    lines = jsonl(world / "teacher.jsonl")
    assert teacher.meta["verifier"] == "toy" and len(teacher) == len(lines) == 40
    for i, line in enumerate(lines):
        assert tokenizer.decode(teacher.prompt(i)) == f"<|user|>{line['prompt']}<|assistant|>"
        assert tokenizer.decode(teacher.response(i)) == line["response"] + "<|end|>"


def test_pretraining_writes_a_student_and_cleans_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    steps = dict(pretrain_steps=2, diffusion_steps=2)
    both = dict(pretrain=True, diffusion=True)
    toy.main(seed=4, teacher_problems=2, unseen_problems=2, **steps, **both)
    trained = model.load("students/toy-4").state_dict()
    untrained = model.load("data/toy-4/untrained").state_dict()
    assert trained.keys() == untrained.keys()
    assert any(not torch.equal(trained[name], untrained[name]) for name in trained)
    diffusion = model.load("students/toy-diffusion-4")
    assert diffusion.config.is_diffusion and diffusion.config.mask_token_id == 3
    names = ("toy-4", "toy-diffusion-4")
    hashes = {load_tokenizer(Path("students", name)).hash for name in names}
    assert len(hashes) == 1  # so that the autoregressive one may select for it
    assert not any(Path("runs").iterdir())
    assert "pretrained student: students/toy-4" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize("keys, message", [
    (dict(teacher_problems=0), "must be at least 1"),
    (dict(unseen_problems=-1), "must be at least 1"),
    (dict(pretrain_steps=0), "must be at least 1"),
    (dict(world="flat"), "--world=flat: must be slips or facts"),
    (dict(classes="nowhere"), "nowhere"),
])  # fmt: skip
def test_what_cannot_be_a_world_is_refused(keys, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        toy.main(**keys)
    assert not any(tmp_path.iterdir())
