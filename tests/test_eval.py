"""eval.py: graded answers, statistics, the command."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from asking import files, lines
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import intervals
from hf import tokenizer as tokenizer_file
from plumbing.config import InputError, read_json, write_json
from plumbing.jobs import resolve
from plumbing.runs import with_evaluations
from plumbing.table import explain, table_of
from verify import grade

ROOT = Path(__file__).parent.parent


# --------------------------------------------------------------------------------------------------
# Statistics


def table(grades):
    """{problem: [is each of its answers right]} -> rows."""
    rows = []
    for problem, several in grades.items():
        for number, right in enumerate(several):
            row = {"id": problem, "sample": number, "correct": bool(right), "thoughts": "missing"}
            row["truncated"] = number == 1
            row["extracted"] = "7" if number else None
            row["n_tokens"] = 10 * (number + 1)
            rows.append(row)
    return rows


def test_the_problem_is_the_unit_of_the_summary():
    summary = evaluation.summarize(table({"a": [1, 1], "b": [0, 1], "c": [0, 0]}), seconds=1.234)
    mean, interval = intervals.accuracy([[1, 1], [0, 1], [0, 0]])
    assert summary == {
        "accuracy": mean,
        "interval": interval,
        "pass_at_k": {1: 0.5, 2: pytest.approx(2 / 3)},
        "cov_at_k": pytest.approx(2 / 3),
        "maj_at_k": pytest.approx(2 / 3),  # the second answer of each has the only vote
        "truncated": 0.5,
        "unparsed": 0.5,
        "undecided": 0.0,
        "thoughts_valid": 0.0,
        "thoughts_empty": 0.0,
        "thoughts_unclosed": 0.0,
        "thoughts_missing": 1.0,
        "mean_tokens": 15.0,
        "seconds": 1.23,
        "problems": 3,
        "samples": 2,
    }


def test_a_problem_under_two_ids_is_one_problem():
    rows = table({"a": [1, 1], "b": [0, 1], "again": [1, 1]})
    summary = evaluation.summarize(rows, 0.0, twins={"again": "a"})
    assert summary["problems"] == 2
    assert summary["accuracy"] == pytest.approx(0.75)


def test_models_are_compared_problem_by_problem():
    first = table({"a": [1, 1], "b": [0, 1], "c": [0, 0]})
    second = table({"a": [1, 1], "b": [1, 1], "c": [0, 1]})
    results = {name: (evaluation.summarize(rows, 0.0), rows) for name, rows in (("base", first), ("t3s", second))}
    base, t3s = table_of(results, {})
    found = intervals.paired([[1, 1], [0, 1], [0, 0]], [[1, 1], [1, 1], [0, 1]])
    assert (t3s["difference"], (t3s["difference_low"], t3s["difference_high"]), t3s["p_value"]) == found
    assert base["difference"] == ""


@pytest.mark.parametrize(
    "failed, says",
    [
        (dict(unparsed=0.9), "90% gave no answer that could be read"),
        (dict(truncated=0.5, thoughts_unclosed=0.5), "50% never ended their thoughts, 50% were cut off"),
        (dict(), ""),
    ],
)
def test_an_accuracy_of_0_is_explained_where_the_format_is_to_blame(failed, says):
    keys = ("unparsed", "truncated", "thoughts_unclosed")
    found = explain(0.0, dict.fromkeys(keys, 0.0) | failed)
    assert says in found and bool(says) == bool(found)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_every_answer_and_a_summary_are_written(toy_runs, capsys):
    results = evaluation.main(run="sft", temperature=0.7)
    stem = "runs/sft/eval/unseen-000004"
    rows, summary = lines(f"{stem}.jsonl"), read_json(f"{stem}.json")
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
    expected = json.loads(json.dumps(evaluation.summarize(rows, 0.0)))
    settings = dict(samples=2, temperature=0.7, max_new_tokens=40, seed=3, top_p=1.0, top_k=0)
    more = dict(model="runs/sft/checkpoints/000004", data="data/toy-1/unseen", sha256=problems.sha256)
    assert {k: v for k, v in summary.items() if k in expected and k != "seconds"} == \
        {k: v for k, v in expected.items() if k != "seconds"}  # fmt: skip
    assert {k: summary[k] for k in (settings | more)} == settings | more
    assert 0.3 < summary["accuracy"] and f"{summary['accuracy']:.3f}  " in capsys.readouterr().out


def test_base_and_runs_are_one_table_sampled_alike(toy_runs, capsys):
    results = evaluation.main(run="base,sft,t3s", limit=5, device="cpu")
    assert list(results) == ["base", "sft", "t3s"]
    assert results["base"][1] == results["sft"][1] == results["t3s"][1]  # the same weights, and sft's settings for all
    assert files("runs/sft/eval") == [
        "unseen-000000.json", "unseen-000000.jsonl", "unseen-000004.json", "unseen-000004.jsonl"]  # fmt: skip
    assert files("runs/t3s/eval") == ["unseen-000004.json", "unseen-000004.jsonl"]
    out = capsys.readouterr().out
    assert "sft - base: +0.000 [-0.280, +0.280], p = 1 (paired, 5 problems)" in out and "t3s - base: +0.000" in out
    with open("runs/sft/tables/unseen.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["model"] for line in written] == ["base", "sft", "t3s"] and written[1]["p_value"] == "1.0"
    assert [line["model"] for line in read_json("runs/sft/tables/unseen.json")["rows"]] == ["base", "sft", "t3s"]
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
    assert json.loads(text, parse_constant=pytest.fail)["interval"] == pytest.approx([0.2065, 1], abs=1e-3)


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
    assert "\x1b" not in done.stdout and done.stdout.splitlines()[-1].startswith("sft       1.000  0.439  1.000")


def test_a_write_that_fails_leaves_what_was_there(toy_runs, monkeypatch):
    evaluation.main(run="sft", limit=2)
    before = {path: Path("runs/sft/eval", path).read_bytes() for path in files("runs/sft/eval")}

    def disk_full(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plumbing.config.os.fsync", disk_full)
    with pytest.raises(InputError, match="No space left"):
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


# --------------------------------------------------------------------------------------------------
# Again, after a kill, on several processes


def test_another_seed_does_not_replace_the_answers_of_the_first(toy_runs):
    first = evaluation.main(run="sft", limit=3)["sft"][1]
    second = evaluation.main(run="sft", limit=3, seed=8)["sft"][1]
    assert first != second
    assert lines("runs/sft/eval/unseen-000004.jsonl") == first
    assert lines("runs/sft/eval/unseen-000004-seed=8.jsonl") == second


def test_the_dtype_is_the_runs(toy_runs):
    config = read_json("runs/sft/config.json")
    write_json("runs/sft/config.json", {"config": config["config"] | {"dtype": "bfloat16"}})
    assert resolve(evaluation.Config, {"run": "sft"})[0].dtype == "bfloat16"
    assert resolve(evaluation.Config, {"run": "sft", "dtype": "float32"})[0].dtype == "float32"


def test_more_samples_are_added_to_those_that_are_there(toy_runs, capsys):
    one = evaluation.main(run="sft", limit=4, samples=1)["sft"][1]
    capsys.readouterr()
    three = evaluation.main(run="sft", limit=4, samples=3)["sft"][1]
    assert "4 of 12 answers were there already" in capsys.readouterr().out
    assert [row for row in three if row["sample"] == 0] == one
    anew = evaluation.main(run="sft", limit=4, samples=3, fresh=True)["sft"][1]
    assert anew == three
    evaluation.main(run="sft", limit=1, samples=1)  # a smaller evaluation takes nothing away
    key = lambda row: (row["id"], row["sample"])  # noqa: E731
    assert sorted(lines("runs/sft/eval/unseen-000004.jsonl"), key=key) == sorted(three, key=key)


def test_other_weights_are_sampled_anew_and_a_copy_of_the_same_is_not(toy_runs, capsys):
    evaluation.main(run="sft", limit=2)
    weights = Path("runs/sft/checkpoints/000004/model.safetensors")
    os.utime(weights, ns=(1, 1))  # as a copy of the folder would be
    capsys.readouterr()
    evaluation.main(run="sft", limit=2)
    assert "4 of 4 answers were there already" in capsys.readouterr().out
    tensors = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    before = weights.stat()
    save_file(tensors, weights, metadata={"format": "pt"})  # a file of the same name and size, and of the same time
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    evaluation.main(run="sft", limit=2)
    assert "there already" not in capsys.readouterr().out


KILLED = """
import os, sys
import eval as evaluation
keep = evaluation.Store.keep
def keep_some(store, answer, count=[0]):
    keep(store, answer)
    count[0] += 1
    if count[0] == 7:
        store.file.write('{"id": "half a li')
        store.file.flush()
        os.kill(os.getpid(), 9)
evaluation.Store.keep = keep_some
evaluation.main(run="sft", batch_size=4)
"""


def test_a_killed_evaluation_goes_on_to_the_same_answers(toy_runs, capsys, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, timeout=200)
    assert killed.returncode == -9 and len(files("runs/sft/eval-unfinished")) == 1
    asked = []
    original = evaluation.sample
    monkeypatch.setattr(evaluation, "sample", lambda m, p, *a, **k: asked.extend(p) or original(m, p, *a, **k))
    resumed = evaluation.main(run="sft", batch_size=5)["sft"][1]
    assert len(asked) == 24 - 7
    assert "7 of 24 answers were there already" in capsys.readouterr().out
    assert not Path("runs/sft/eval-unfinished").exists()
    assert evaluation.main(run="sft", fresh=True)["sft"][1] == resumed


def test_processes_share_the_answers(toy_runs):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", ROOT / "eval.py"]
    words = [sys.executable, *words, "--run=sft", "--limit=5"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\nsft ") == 1
    shared = lines("runs/sft/eval/unseen-000004.jsonl")
    assert evaluation.main(run="sft", limit=5, fresh=True)["sft"][1] == shared


# --------------------------------------------------------------------------------------------------
# select.py --accuracy=eval


def test_the_bottleneck_is_taken_from_evaluations_of_stored_checkpoints(toy_runs):
    train_set = data.load("data/toy-1/teacher")
    trajectory = {s: {"accuracy": np.nan, "correct": np.nan, "logprob": s} for s in (0, 2, 4, 6)}
    with pytest.raises(InputError, match="needs evaluations on data/toy-1/teacher of step 0"):
        with_evaluations("sft", trajectory, train_set)
    for step in (0, 2):
        rows = evaluation.main(run="sft", step=step, data="data/toy-1/teacher")["sft"][1]
    evaluation.main(run="sft", step=4)  # on other problems
    write(rows, wrong=rows[0]["id"])
    evaluation.main(run="sft", step=4, data="data/toy-1/teacher", samples_from="wrong.jsonl")
    found = with_evaluations("sft", trajectory, train_set)
    assert list(found) == [0, 2, 4]
    assert found[4]["accuracy"] == pytest.approx(found[0]["accuracy"] - found[0]["correct"][0] / 3)
    assert found[4]["correct"][0] == 0 and found[4]["logprob"] == 4


def write(rows, wrong):
    with open("wrong.jsonl", "w") as file:
        for row in rows:
            response = ">x" if row["id"] == wrong else row["response"]
            file.write(json.dumps({"id": row["id"], "sample": row["sample"], "response": response}) + "\n")


def test_evaluations_that_do_not_belong_together_are_refused(toy_runs):
    train_set = data.load("data/toy-1/teacher")
    trajectory = {s: {"accuracy": np.nan, "correct": np.nan, "logprob": s} for s in (0, 2)}
    evaluation.main(run="sft", step=0, data="data/toy-1/teacher")
    evaluation.main(run="sft", step=2, data="data/toy-1/teacher", samples=1, limit=2)
    with pytest.raises(InputError, match="1 problems of data/toy-1/teacher were not answered"):
        with_evaluations("sft", trajectory, train_set)
    evaluation.main(run="sft", step=2, data="data/toy-1/teacher", samples=1)
    with pytest.raises(InputError, match="step 2 was not sampled as step 0 was"):
        with_evaluations("sft", trajectory, train_set)
