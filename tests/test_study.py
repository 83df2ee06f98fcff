"""study.py at a size that shows nothing but runs everything: every row, stopped and gone on with."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import demo
import study
import toy
from plumbing.config import load_select, parse, read_json
from plumbing.runs import run_keys

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A working folder with the shipped students, worlds of 24 traces and 12 unseen problems, and a
    plan of four steps with a learning rate so high that accuracy surely falls."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "students", "students")
    real = toy.main

    def small_world(**keys):
        return real(**{**keys, "teacher_problems": 24, "unseen_problems": 12, "pretrain_steps": 2})

    monkeypatch.setattr(toy, "main", small_world)
    monkeypatch.setattr(study, "SETTINGS", dict(steps=4, lr=3e-3, record_every=2, unseen_problems=12))
    monkeypatch.setattr(study, "LATER", 4)
    monkeypatch.setattr(study, "SGD_RATES", (0.01, 0.5))
    moved = {"t3s-8": dict(rule="t3s", bottleneck="2"), "t3s-36": dict(rule="t3s", bottleneck="4")}
    moved["t3s-label_free"] = dict(rule="t3s", bottleneck="2")
    longer = {"rrt-long": dict(steps=6, save_every=2), "rrt-decay": dict(weight_decay=1.0, save_every=2)}
    monkeypatch.setattr(study, "RECOVERIES", longer)
    monkeypatch.setattr(study, "SELECTIONS", study.SELECTIONS | moved)
    return tmp_path


def table():
    return json.loads(Path("runs/study/table.json").read_text(), parse_constant=pytest.fail)


def test_every_row_is_run_once_however_often_the_study_is_stopped(small, monkeypatch, capsys):
    calls = []
    real = study.measure

    def measure(row, student):
        calls.append((row, student.seed))
        if calls.count(("inverse", "2")) == 1 and row == "inverse":
            raise KeyboardInterrupt
        return real(row, student)

    monkeypatch.setattr(study, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        study.main(students="2")
    assert list(table()["done"]) == ["sft", "base", "base-greedy", "t3s", "mechanism", "random"]
    before = table()["done"]
    rows = study.main(students="2")
    stopped = study.ROWS.index("inverse")
    again = [*study.ROWS[: stopped + 1], *study.ROWS[stopped:]]
    assert calls == [(row, "2") for row in again]
    assert before.items() <= table()["done"].items() and table()["rows"] == rows
    study.main(students="2")
    assert len(calls) == len(study.ROWS) + 1  # nothing was left to run

    done = table()["done"]
    assert set(done) == {"base", *study.ROWS}
    assert all(0 <= a <= 1 for cells in done.values() for a in cells["2"]["accuracies"])
    untrained = ("base-greedy", "rrt", "mechanism", *study.RECOVERIES)
    assert all(len(done[row]["2"]["accuracies"]) == (row != "mechanism") for row in untrained)
    assert run_keys(Path("runs/study/2/rrt-long-sft"))["steps"] == 6
    assert run_keys(Path("runs/study/2/t3s-long"))["steps"] == 6
    # sft-long is the SFT that rrt-long took, recorded as that one was
    longer = ("sft-long", "t3s-long")
    assert [len(done[row]["2"]["accuracies"]) for row in longer] == [4, 3]
    runs = [row for row in study.ROWS if row not in untrained and row not in longer]
    for row in runs:
        assert len(done[row]["2"]["accuracies"]) == (3 if row == "sft" else 2), row
    keys = {row: run_keys(Path(f"runs/study/2/{row}")) for row in runs}
    rates = {row: (keys[row]["optimizer"], keys[row]["lr"]) for row in runs}
    assert rates["sft-sgd"] == rates["t3s-sgd"] != ("adamw", 3e-3)
    assert {rate for row, rate in rates.items() if not row.endswith("sgd")} == {("adamw", 3e-3)}
    assert keys["t3s-sgd"]["selection"] == keys["t3s"]["selection"]
    check_budgets()
    out = capsys.readouterr().out
    assert f"[2/{len(study.ROWS)}] base-greedy of student 2: " in out and "min left" in out
    for name in ("study.png", "gradients.png", "bottleneck.png"):
        assert Path("runs/study", name).read_bytes().startswith(b"\x89PNG")
    figures = Path("runs/study/figures.md").read_text()
    for name in ("t3s-sgd", "norm ratio at the bottleneck", "projection of the recovery"):
        assert name in figures


def check_budgets():
    """The controls keep as many tokens as t3s."""
    masks = {}
    for path in Path("runs/study/2/sft/selection").glob("*/mask.npy"):
        masks[path.parent.name] = np.load(path)
    kept = masks["t3s"].sum()
    for row in ("random", "static_low", "static_high", "entropy_high", "retrospective", "matched_random"):
        assert masks[row].sum() == kept, row
    assert masks["dft"].dtype == np.float32 and not (masks["inverse"] & masks["t3s"]).any()


def test_a_row_that_cannot_be_is_said_and_the_others_are_run(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "ROWS", ("sft", "t3s-8", "rrt"))
    monkeypatch.setattr(study, "SELECTIONS", {"t3s-8": dict(rule="t3s", bottleneck="3")})
    rows = study.main(students="2")
    assert [row["name"] for row in rows] == ["sft", "base", "rrt"]
    assert "t3s-8 of student 2: not measured: --bottleneck=3: recorded were 0, 2, 4" in capsys.readouterr().out


def test_a_row_counts_once_all_students_have_it():
    done = {}
    for seed, accuracies in (("1", [0.7, 0.3, 0.5]), ("2", [0.8, 0.6, 0.7])):
        study.note(done, "sft", seed, accuracies, 10.0)
    study.note(done, "t3s", "1", [0.7, 0.9], 4.0)
    assert study.rows_of(done, ["1", "2"]) == [
        {"name": "sft", "final": [0.5, 0.7], "lowest": [0.3, 0.6]},
        {"name": "base", "final": [0.7, 0.8], "lowest": [0.7, 0.8]},
    ]
    # t3s took 4 seconds; a row that was never run is taken for the median of those that were, 7
    assert study.remaining(done, [("t3s", "2"), ("dft", "1"), ("dft", "2")]) == pytest.approx(4 + 7 + 7)


def test_differences_are_paired_with_students_t(tmp_path, monkeypatch):
    """Against scipy.stats.t.interval on the differences 0.1, 0.2, 0.3: 0.2 and 0.248."""
    monkeypatch.chdir(tmp_path)
    rows = [("sft", [0.4, 0.5, 0.6]), ("t3s", [0.5, 0.7, 0.9])]
    study.write_figures([{"name": name, "final": values} for name, values in rows], {}, ["1", "2", "3"])
    lines = Path("runs/study/figures.md").read_text().splitlines()
    assert lines[2] == "| sft * | 0.40 | 0.50 | 0.60 | 0.50 |  |  | +0.200 ± 0.248 |"
    assert lines[3] == "| t3s | 0.50 | 0.70 | 0.90 | 0.70 | +0.200 ± 0.248 |  |  |"


def test_students_that_are_missing_are_pretrained(small):
    student = study.make_student("7")
    assert student.model == "students/toy-7" and Path("students/toy-7/model.safetensors").exists()
    assert student.same["eval_data"] == "data/toy-7/unseen" and student.same["lr"] == 3e-3
    assert read_json(Path("students/toy-7/config.json"))
    assert demo.SEEDS["slips"] == "1,2,3"  # which the study's students are not


# --------------------------------------------------------------------------------------------------
# docs/CLAIMS.md


def commands(text):
    """The commands in a page, as (file, words): after "python ", up to a backtick, # or line's end."""
    found = re.findall(r"\bpython (\w+)\.py\b((?: --\w+=[^\s`|]+)*)", text.replace("\\\n", " "))
    return [(file, words.split()) for file, words in found]


def test_every_command_of_the_claims_has_the_keys_that_its_file_knows():
    found = commands((ROOT / "docs/CLAIMS.md").read_text(encoding="utf-8"))
    assert len(found) >= 12
    for file, words in found:
        module = load_select() if file == "select" else importlib.import_module(file)
        parse(module.Config, words)


def test_every_claim_has_a_command_a_value_and_a_verdict():
    lines = (ROOT / "docs/CLAIMS.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if re.match(r"\| \d+ \|", line)]
    assert len(rows) >= 12
    for number, (_, claim, command, value, verdict) in enumerate(rows, 1):
        assert rows[number - 1][0] == f"| {number}" and claim and value, number
        assert verdict.split(":")[0].rstrip(" |") in ("holds", "does not hold", "in part", "not measurable here")
        assert commands(command) or verdict.startswith("not measurable here"), number
