"""eval.py: graded answers, statistics, the command; and sample.py's ids against transformers."""

import functools
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import ask, files, lines
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import data
import eval as evaluation
import model
import sample
from hf import tokenizer as tokenizer_file
from plumbing.config import InputError, read_json
from verify import grade

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# The sampler: greedy ids against transformers

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0)  # fmt: skip
TWINS = {  # several ends of text, so that random weights reach one
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True, eos_token_id=[5, 6, 7, 8, 9])),
    "qwen2": ("qwen2", dict(tie_word_embeddings=False, eos_token_id=[7, 8, 9, 10])),
    "llama": ("llama", dict(tie_word_embeddings=False, eos_token_id=[3, 11, 20, 21, 22])),
}
LENGTHS = (5, 1, 17, 9, 3, 12, 2, 8)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """name -> (our model, transformers' model) of the same random weights."""

    @functools.cache
    def make(name):
        family, more = TWINS[name]
        torch.manual_seed(0)
        oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | more)).eval()
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        folder = tmp_path_factory.mktemp(name)
        oracle.save_pretrained(folder)
        return model.load(folder), oracle

    return make


def some_prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(30, 97, n).tolist() for n in lengths]


def without_end(ids, eos_ids):
    return list(itertools.takewhile(lambda i: i not in eos_ids, ids))


@pytest.mark.parametrize("name", TWINS)
def test_greedy_ids_equal_transformers(twin, name):
    """Uneven prompts: each alone, and as one batch padded on the left, as transformers wants it."""
    ours, oracle = twin(name)
    eos = ours.config.eos_token_ids
    prompts, new = some_prompts(), 24
    answers = ask(sample.sample, ours, prompts, new, temperature=0)  # ends with the model's own ids

    longest = max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    batch = oracle.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, longest:].tolist()
    for prompt, row, answer in zip(prompts, batch, answers, strict=True):
        alone = oracle.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=new,
                                do_sample=False)[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == without_end(alone, eos) == without_end(row, eos)
    ended = [len(answer) < new for answer in answers]
    assert any(ended) and len({len(answer) for answer in answers}) > 2  # rows left the batch at different times


def test_batch_size_and_order_change_no_answer(twin):
    ours, _ = twin("llama")
    prompts, eos = some_prompts(), ours.config.eos_token_ids
    names = [f"problem {i}" for i in range(len(prompts))]

    def answers(order, batch_size, temperature):
        found = ask(sample.sample, ours, [prompts[i] for i in order], 24, temperature, seed=4, eos_ids=eos,
                                  example_ids=[names[i] for i in order], batch_size=batch_size)  # fmt: skip
        return {names[i]: ids for i, ids in zip(order, found, strict=True)}

    for temperature in (0, 1.0):
        expected = answers(range(8), 1, temperature)
        assert len({tuple(ids) for ids in expected.values()}) > 4
        for batch_size in (2, 3, 8, 100):
            assert answers([5, 2, 7, 0, 1, 6, 3, 4], batch_size, temperature) == expected
    assert answers([6], 1, 1.0) == {names[6]: answers(range(8), 8, 1.0)[names[6]]}


def test_more_tokens_continue_the_same_answer(twin):
    ours, _ = twin("qwen3")
    short, long = (ask(sample.sample, ours, some_prompts(), n, 1.0, seed=1, eos_ids=()) for n in (6, 20))
    assert [ids[:6] for ids in long] == short and {len(ids) for ids in long} == {20}


def test_seeds_and_example_ids_change_the_answer(twin):
    ours, _ = twin("qwen3")
    prompts = [[40, 41]] * 2
    one, other = ask(sample.sample, ours, prompts, 12, 1.0, seed=1)
    assert one != other  # the same prompt, asked twice
    assert ask(sample.sample, ours, prompts, 12, 1.0, seed=2)[0] != one
    assert ask(sample.sample, ours, prompts[:1], 12, 1.0, seed=1, example_ids=[1]) == [other]


def test_the_end_is_not_part_of_the_answer(twin):
    ours, _ = twin("qwen3")
    free = ask(sample.sample, ours, some_prompts(), 20, temperature=0, eos_ids=())
    for n in (0, 3, 11):
        end = free[2][n]
        stopped = ask(sample.sample, ours, some_prompts(), 20, temperature=0, eos_ids=[end])
        assert stopped == [without_end(ids, [end]) for ids in free] and end not in sum(stopped, [])


def test_rows_that_pad_the_embedding_never_come_out(twin):
    ours, _ = twin("qwen3")
    for temperature in (0, 1.0, 50.0):
        ids = sum(ask(sample.sample, ours, some_prompts(), 30, temperature, vocab_size=60), [])
        assert max(ids) < 60
    assert max(sum(ask(sample.sample, ours, some_prompts(), 30, 50.0), [])) >= 60


def test_bad_prompts_and_bad_logits_are_refused(twin):
    ours, _ = twin("qwen3")
    for prompt in ([], [97], [-1], [5, 200]):
        with pytest.raises(InputError, match="prompt 1 is empty or has an id outside"):
            ask(sample.sample, ours, [[5], prompt], 4)
    for keys in (dict(temperature=-1), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1), dict(batch_size=0)):
        with pytest.raises(InputError, match=f"{list(keys)[0]} = .*out of range"):
            ask(sample.sample, ours, [[5]], 4, **keys)
    with pytest.raises(InputError, match="max_new_tokens = 0"):
        ask(sample.sample, ours, [[5]], 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        sample.next_token(logits, torch.full((2,), 0.5), temperature, 1.0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The sampler: probabilities against transformers' processors, by sweeping the uniforms


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.6, 0, 1.0), (2.5, 0, 1.0), (1.0, 1, 1.0), (1.0, 7, 1.0), (1.0, 10**6, 1.0), (1.0, 0, 0.9),
    (1.0, 0, 1e-6), (0.7, 20, 0.8), (1.5, 3, 0.5),
])  # fmt: skip
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    torch.manual_seed(2)
    logits = torch.randn(3, 50) * 3
    n = 20000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = torch.stack([
        torch.bincount(sample.next_token(row.expand(n, 50), u, temperature, top_p, top_k), minlength=50) / n
        for row in logits])  # fmt: skip
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(min(top_k, 50))(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    expected = torch.softmax(scores, -1)
    assert (drawn - expected).abs().max() < 2 / n
    assert (drawn[expected == 0] == 0).all()


def test_ids_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-200.0, 0.0, -200.0, 0.0, -200.0]])
    for u, expected in ((0.0, 1), (0.4999, 1), (0.5001, 3), (1 - 2**-53, 3)):
        assert sample.next_token(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0, 0).item() == expected


def test_top_p_where_the_1024_likeliest_do_not_hold_it():
    """next_token sorts the whole vocabulary only then; the other row of the batch must not notice."""
    logits = torch.stack([torch.zeros(5000), torch.linspace(0, -40, 5000)])
    kept = sample.least_likely(torch.softmax(logits, -1), 0.9, 0) <= torch.softmax(logits, -1)
    expected = [TopPLogitsWarper(0.9)(None, row[None]).isfinite().sum().item() for row in logits[1:]]
    assert kept[0].all() and kept[1].sum().item() == expected[0]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_mean_interval_is_1_96_standard_errors():
    values = [0.0, 1.0, 0.5, 1.0, 0.25]
    mean = sum(values) / 5
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5)
    assert evaluation.mean_interval(values) == pytest.approx((mean, 1.96 * error), abs=1e-12)
    mean, interval = evaluation.mean_interval([0.5])
    assert mean == 0.5 and math.isnan(interval)


def test_pass_at_k_against_all_subsets():
    for n in range(1, 7):
        for correct in range(n + 1):
            answers = [1] * correct + [0] * (n - correct)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(answers, k))
                expected = sum(any(s) for s in subsets) / len(subsets)
                assert evaluation.pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


def table(grades):
    """{problem: [is each of its answers right]} -> rows."""
    return [{"id": problem, "sample": s, "correct": bool(right), "truncated": s == 1, "extracted": "7" if s else None,
             "n_tokens": 10 * (s + 1)}
            for problem, several in grades.items() for s, right in enumerate(several)]  # fmt: skip


def test_the_problem_is_the_unit():
    rows = table({"a": [1, 1], "b": [0, 1], "c": [0, 0]})
    summary = evaluation.summarize(rows, seconds=1.234)
    mean, interval = evaluation.mean_interval([1.0, 0.5, 0.0])  # not over the six answers
    assert summary == {
        "accuracy": mean, "interval": interval, "pass_at_k": pytest.approx(2 / 3), "truncated": 0.5, "unparsed": 0.5,
        "mean_tokens": 15.0, "seconds": 1.23, "problems": 3, "samples": 2,
    }  # fmt: skip


def test_models_are_compared_problem_by_problem(capsys):
    first = table({"a": [1, 1], "b": [0, 1], "c": [0, 0]})
    second = table({"a": [1, 1], "b": [1, 1], "c": [0, 1]})
    evaluation.compare({"base": ({}, first), "t3s": ({}, second)})
    difference, interval = evaluation.mean_interval([0.0, 0.5, 0.5])
    assert capsys.readouterr().out == f"t3s - base: {difference:+.3f} ± {interval:.3f} (paired, 3 problems)\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_every_answer_and_a_summary_are_written(toy_runs, capsys):
    results = evaluation.main(run="sft", temperature=0.7)
    rows, summary = lines("runs/sft/eval/unseen-000004.jsonl"), read_json("runs/sft/eval/unseen-000004.json")
    problems = data.load("data/toy-1/unseen")
    assert results["sft"][1] == rows and len(rows) == 12 * 2  # two samples each, as the run recorded
    assert [(row["id"], row["sample"]) for row in rows] == [(e["id"], s) for e in problems.examples for s in (0, 1)]
    tokenizer = tokenizer_file.load_tokenizer(ROOT / "students/toy-1")
    for row, i in zip(rows, [i for i in range(12) for _ in range(2)], strict=True):
        assert row["answer"] == problems.examples[i]["answer"]
        assert row["extracted"] == (row["response"].rpartition(">")[2] or None)
        assert row["correct"] == (row["extracted"] == row["answer"])
        assert len(tokenizer.encode(row["response"])) == row["n_tokens"] <= 40
        assert row["truncated"] == (row["n_tokens"] == 40)
    expected = evaluation.summarize(rows, 0.0)
    settings = dict(samples=2, temperature=0.7, max_new_tokens=40, seed=3, top_p=1.0, top_k=0)
    more = dict(model="runs/sft/checkpoints/000004", data="data/toy-1/unseen", sha256=problems.sha256)
    assert {k: v for k, v in summary.items() if k in expected and k != "seconds"} == \
        {k: v for k, v in expected.items() if k != "seconds"}  # fmt: skip
    assert {k: summary[k] for k in (settings | more)} == settings | more
    assert 0.3 < summary["accuracy"] and f"{summary['accuracy']:.3f} ± " in capsys.readouterr().out


def test_base_and_runs_are_one_table_sampled_alike(toy_runs, capsys):
    results = evaluation.main(run="base,sft,t3s", limit=5, device="cpu")
    assert list(results) == ["base", "sft", "t3s"]
    assert results["base"][1] == results["sft"][1] == results["t3s"][1]  # the same weights, and sft's settings for all
    assert files("runs/sft/eval") == [
        "unseen-000000.json", "unseen-000000.jsonl", "unseen-000004.json", "unseen-000004.jsonl"]  # fmt: skip
    assert files("runs/t3s/eval") == ["unseen-000004.json", "unseen-000004.jsonl"]
    out = capsys.readouterr().out
    assert "sft - base: +0.000 ± 0.000 (paired, 5 problems)" in out and "t3s - base: +0.000" in out
    assert "denoising_steps" not in out  # an autoregressive model has none


def test_a_step_and_models_by_folder(toy_runs):
    evaluation.main(run="sft", step=2, samples=1, limit=2)
    evaluation.main(model=str(ROOT / "students/toy-1"), data="data/toy-1/unseen", limit=1, temperature=0,
                    max_new_tokens=40)  # fmt: skip
    assert files("runs/sft/eval") == ["unseen-000002.json", "unseen-000002.jsonl"]
    inside = "runs/t3s/selection/rrt"  # a model that lies in a run keeps its answers there: each run has its own
    shutil.copytree(ROOT / "students/toy-1", inside)
    evaluation.main(model=inside, data="data/toy-1/unseen", limit=1, max_new_tokens=9)
    assert len(lines(f"{inside}/eval/unseen.jsonl")) == 1
    [row] = lines("runs/toy-1/eval/unseen.jsonl")
    assert row["correct"]  # greedy: it knows how
    text = Path("runs/toy-1/eval/unseen.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["interval"] is None  # of one problem; NaN is no JSON


def test_answers_that_are_cut_off_are_counted(toy_runs):
    [(summary, rows)] = evaluation.main(run="t3s", limit=4).values()  # 9 tokens are too few
    assert summary["truncated"] == 1.0 and all(row["n_tokens"] == 9 and row["truncated"] for row in rows)
    assert summary["unparsed"] == 1.0 and summary["accuracy"] == 0.0


def test_from_the_shell(toy_runs):
    """Exit code 1 and one line for an error; 0 and a table otherwise."""
    def shell(*words):
        return subprocess.run([sys.executable, ROOT / "eval.py", *words], capture_output=True, text=True, timeout=120)

    wrong = shell("--run=sft", "--temprature=0")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr == "error: unknown key --temprature; did you mean --temperature? (--help lists the keys)\n"
    done = shell("--run=sft", "--limit=3", "--temperature=0", "--samples=1")
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and done.stdout.splitlines()[-1].startswith("sft  1.000 ± 0.000")


def test_a_write_that_fails_leaves_what_was_there(toy_runs, monkeypatch):
    evaluation.main(run="sft", limit=2)
    before = {path: Path("runs/sft/eval", path).read_bytes() for path in files("runs/sft/eval")}

    def disk_full(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plumbing.config.os.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        evaluation.main(run="sft", limit=3)
    assert {path: Path("runs/sft/eval", path).read_bytes() for path in files("runs/sft/eval")} == before


def test_gsm8k_lines_end_to_end(toy_runs):
    """GSM8K's own form, through data.py and a student that says #### at once, whatever it is asked."""
    questions = [("Ann has 3 eggs and buys 4. How many?", "She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7"),
                 ("A car costs $1,200. Two cost?", "2 * 1200 = 2400\n#### 2,400"),
                 ("It is 5 degrees and falls by 12.", "5 - 12 = -7\n#### -7")]  # fmt: skip
    Path("gsm8k.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in questions))
    student = ROOT / "students/toy-1"
    data.main(source="gsm8k.jsonl", tokenizer=str(student), out="gsm8k")
    problems = data.load("gsm8k")
    assert problems.meta["verifier"] == "gsm8k" and [e["answer"] for e in problems.examples] == ["7", "2400", "-7"]
    tokenizer = tokenizer_file.load_tokenizer(student)
    for i, (_, response) in enumerate(questions):  # the reference answers are right, swapped ones are not
        text = tokenizer.decode(problems.response(i), skip_special_tokens=True)
        assert text == response and grade(text, problems.examples[i]["answer"], "gsm8k")
        assert not grade(text, problems.examples[i - 1]["answer"], "gsm8k")
    [(summary, rows)] = evaluation.main(model=str(student), data="gsm8k", max_new_tokens=20, seed=1).values()
    assert summary["accuracy"] == 0.0 and summary["unparsed"] == 1.0 and len(rows) == 3  # the toy knows no eggs
