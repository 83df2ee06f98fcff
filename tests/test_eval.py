"""eval.py: graded answers, statistics, the command."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from asking import files, lines

import data
import eval as evaluation
from hf import tokenizer as tokenizer_file
from plumbing.config import read_json
from verify import grade

ROOT = Path(__file__).parent.parent


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
             "thoughts": "missing",
             "n_tokens": 10 * (s + 1)}
            for problem, several in grades.items() for s, right in enumerate(several)]  # fmt: skip


def test_the_problem_is_the_unit():
    rows = table({"a": [1, 1], "b": [0, 1], "c": [0, 0]})
    summary = evaluation.summarize(rows, seconds=1.234)
    mean, interval = evaluation.mean_interval([1.0, 0.5, 0.0])  # not over the six answers
    assert summary == {
        "accuracy": mean, "interval": interval, "pass_at_k": pytest.approx(2 / 3), "truncated": 0.5, "unparsed": 0.5,
        "undecided": 0.0, "thoughts_valid": 0.0, "thoughts_empty": 0.0, "thoughts_unclosed": 0.0,
        "thoughts_missing": 1.0,
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


def test_gsm8k_lines_end_to_end(toy_runs, capsys):
    """GSM8K's own form, through data.py and a student that says #### at once, whatever it is asked."""
    questions = [("Ann has 3 eggs and buys 4. How many?", "She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7"),
                 ("A car costs $1,200. Two cost?", "2 * 1200 = 2400\n#### 2,400"),
                 ("It is 5 degrees and falls by 12.", "5 - 12 = -7\n#### -7")]  # fmt: skip
    Path("gsm8k.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in questions))
    student = ROOT / "students/toy-1"
    data.main(source="gsm8k.jsonl", tokenizer=str(student), out="gsm8k")
    problems = data.load("gsm8k")
    assert problems.meta["verifier"] == "auto" and [e["answer"] for e in problems.examples] == ["7", "2400", "-7"]
    tokenizer = tokenizer_file.load_tokenizer(student)
    for i, (_, response) in enumerate(questions):  # the reference answers are right, swapped ones are not
        text = tokenizer.decode(problems.response(i), skip_special_tokens=True)
        assert text == response and grade(text, problems.examples[i]["answer"], "gsm8k")
        assert not grade(text, problems.examples[i - 1]["answer"], "gsm8k")
    [(summary, rows)] = evaluation.main(model=str(student), data="gsm8k", max_new_tokens=20, seed=1,
                                        verifier="gsm8k").values()  # fmt: skip
    assert "format, not only ability" in capsys.readouterr().out
    assert summary["accuracy"] == 0.0 and summary["unparsed"] == 1.0 and len(rows) == 3  # the toy knows no eggs
