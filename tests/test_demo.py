"""demo.py at a size that shows nothing but runs everything: commands, tables, a second run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import demo
import toy
from plumbing.config import InputError, command
from plumbing.runs import run_keys

ROOT = Path(__file__).parent.parent
NAMES = ["base", "sft", "t3s", "inverse", "random", "rrt"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A working folder with the shipped students, where a world has 40 traces and 12 unseen
    problems, and pretraining takes two steps."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "students", "students")
    sizes = dict(teacher_problems=40, unseen_problems=12, pretrain_steps=2)
    real = toy.main
    monkeypatch.setattr(toy, "main", lambda **keys: real(**keys, **sizes))
    return tmp_path


# lr so high that accuracy surely falls: a bottleneck there must be
SMALL = dict(seeds="2", steps=4, lr=3e-3, record_every=2)


def recorded(run):
    lines = map(json.loads, Path("runs", run, "log.jsonl").read_text().splitlines())
    return [line["eval_accuracy"] for line in lines if line.get("event") == "record"]


def mask(run, name):
    return np.load(f"runs/{run}/selection/{name}/mask.npy")


def table_rows(home):
    """The rows of table.json, which has to be valid JSON: no nan."""
    table = json.loads(Path("runs", home, "table.json").read_text(), parse_constant=pytest.fail)
    assert list(table) == ["rows"]
    return table["rows"]


# --------------------------------------------------------------------------------------------------
# Each demo once


def test_the_table_is_what_was_recorded_and_a_second_demo_replaces_it(small, capsys):
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/left-over").write_text("from an earlier demo")
    demo.main(**SMALL)
    rows = {row["name"]: row for row in table_rows("demo")}
    assert list(rows) == NAMES
    for row in rows.values():
        assert set(row) == {"name", "final", "lowest"}
        for values in (row["final"], row["lowest"]):
            assert len(values) == 1 and isinstance(values[0], float)
            assert 0 <= values[0] <= 1 and (values[0] * 12) == pytest.approx(round(values[0] * 12))
    for name in ("sft", "t3s", "inverse", "random"):
        accuracies = recorded(f"demo/2/{name}")
        assert len(accuracies) == 3  # steps 0, 2, 4: equal budget
        assert rows[name]["final"] == [accuracies[-1]]
        assert rows[name]["lowest"] == [min(accuracies)]
    assert rows["base"]["final"] == rows["base"]["lowest"] == [recorded("demo/2/sft")[0]]
    evaluated = json.loads(Path("runs/demo/2/sft/selection/rrt/eval/unseen.json").read_text())
    assert rows["rrt"]["final"] == rows["rrt"]["lowest"] == [evaluated["accuracy"]]

    keep = {name: mask("demo/2/sft", name) for name in ("t3s", "inverse", "random")}
    assert keep["random"].sum() == keep["t3s"].sum()
    assert not (keep["inverse"] & keep["t3s"]).any()
    assert not Path("runs/demo/left-over").exists()
    assert Path("runs/demo/demo.png").read_bytes().startswith(b"\x89PNG")
    assert Path("runs/demo/2/sft/report.html").exists()
    check_output(capsys.readouterr().out, rows)


def check_output(out, rows):
    """Commands that anyone can type, in the order of the pipeline, and the table in words."""
    files = [line.split()[2] for line in out.splitlines() if line.startswith("$ python ")]
    passes = ["select.py", "train.py"] * 3
    assert files == ["toy.py", "train.py", *passes, "select.py", "eval.py", "report.py"]
    pass_2 = "$ python train.py --run=demo/2/t3s --selection=runs/demo/2/sft/selection/t3s\n"
    assert pass_2 in out
    assert "anchors (delta > 0)" in out  # what T3S chose, printed
    lines = out[out.index("accuracy on unseen problems") :].splitlines()
    for name, line in zip(NAMES, lines[2:], strict=False):
        final = f"{rows[name]['final'][0]:.2f}"
        lowest = f"{rows[name]['lowest'][0]:.2f}"
        assert line.split() == [name, final, "±", "0.00", lowest, "±", "0.00"]


def test_the_facts_world_has_controls_without_a_teacher(small):
    shutil.copytree("students/toy-2", "students/facts-2")
    rows = demo.main(**SMALL, world="facts", record_later=4)
    assert rows == table_rows("demo-facts")
    own = ["own-greedy", "own-correct"]
    chosen = ["t3s", "t3s-2.5", "static_low", "random"]
    assert [row["name"] for row in rows] == ["base", "base-greedy", "sft", *chosen, *own]
    keep = {name: mask("demo-facts/2/sft", name) for name in chosen}
    budget = keep["t3s-2.5"].sum()
    assert keep["static_low"].sum() == keep["random"].sum() == budget
    assert not (keep["t3s"] & ~keep["t3s-2.5"]).any()
    final = {row["name"]: row["final"] for row in rows}
    for name in chosen + own:
        assert len(recorded(f"demo-facts/2/{name}")) == 2  # steps 0 and 4
        assert final[name] == recorded(f"demo-facts/2/{name}")[-1:]
    for name in own:
        keys = run_keys(Path(f"runs/demo-facts/2/{name}"))
        assert keys["data"] == f"data/facts-2/{name}" and not keys["selection"]


def test_students_that_are_missing_are_pretrained_if_asked(small):
    cfg = demo.Config(world="facts", pretrain=True)
    assert demo.world(cfg, "5")[0] == "students/facts-5"
    weights = Path("students/facts-5/model.safetensors")
    made = weights.stat().st_mtime_ns
    demo.world(cfg, "5")
    assert weights.stat().st_mtime_ns == made  # only those


def test_diffusion_students_forced_or_kept_and_without_a_teacher(small):
    demo.main(**SMALL | dict(seeds="22"), student="diffusion")
    rows = table_rows("demo-diffusion")
    chosen = ["force", "force-random", "keep", "keep-unscored", "keep-random"]
    own = ["own-greedy", "own-correct"]
    assert [row["name"] for row in rows] == ["base", "sft", *chosen, *own]
    masks = {name: mask("demo-diffusion/22/sft", name) for name in chosen}
    lines = map(json.loads, Path("runs/demo-diffusion/22/sft/log.jsonl").read_text().splitlines())
    accuracy = {line["step"]: line["accuracy"] for line in lines if line.get("event") == "record"}
    del accuracy[0]  # the plan's bottleneck: the lowest after the start, below it or not
    made = json.loads(Path("runs/demo-diffusion/22/sft/selection/keep/config.json").read_text())
    assert made["bottleneck_step"] == min(accuracy, key=lambda step: (accuracy[step], step))
    assert masks["force-random"].sum() == masks["force"].sum()
    assert masks["keep-random"].sum() == masks["keep"].sum()
    assert (masks["keep-unscored"] == masks["keep"]).all()
    keys = {name: run_keys(Path(f"runs/demo-diffusion/22/{name}")) for name in ["sft", *chosen, *own]}
    assert keys["keep-unscored"]["anchors"] == "unscored" != keys["keep"]["anchors"]
    assert [given["confidence_draws"] for given in keys.values()] == [4] + [0] * 7
    for name in own:
        assert keys[name]["data"] == f"data/weak-22/{name}" and not keys[name]["selection"]
    for row in rows[1:]:
        accuracies = recorded(f"demo-diffusion/22/{row['name']}")
        assert row["final"] == [accuracies[-1]] and row["lowest"] == [min(accuracies)]
        assert len(accuracies) == (3 if row["name"] in demo.SHOWN_MASKED else 2)
    assert Path("runs/demo-diffusion/demo.png").exists()
    assert Path("runs/demo-diffusion/22/sft/report.html").exists()


# --------------------------------------------------------------------------------------------------
# The table


def test_mean_and_spread_over_students(capsys):
    demo.show([{"name": "t3s", "final": [0.8, 0.9, 0.7], "lowest": [0.6, 0.7, 0.5]}], ["1", "2", "3"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["t3s", "0.80", "±", "0.10", "0.60", "±", "0.10"]


def test_differences_are_paired_and_their_interval_is_students_t():
    """Against scipy.stats.t.interval on the differences 0.1, 0.2, 0.3: mean 0.2, SE 0.057735."""
    text = demo.difference([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])
    assert text == "+0.200 ± 0.248"
    assert demo.difference([0.5, 0.6], [0.4, 0.5]) == "+0.100 ± 0.000"  # not the students' spread


# --------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize("keys, message", [
    (dict(student="bert"), "must be autoregressive or diffusion"),
    (dict(world="moon"), "must be slips or facts or weak"),
    (dict(seeds="1,1"), "different whole numbers"),
    (SMALL | dict(seeds="99"), "toy-99"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(small, keys, message):
    with pytest.raises(InputError, match=message) as error:
        demo.main(**keys)
    assert "\n" not in str(error.value) and not Path("runs/demo/table.json").exists()


def test_from_a_shell_a_failed_step_shows_what_it_printed(small, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py", "--seeds=99", "--steps=2"])
    with pytest.raises(SystemExit) as stop:
        command(demo.main, demo.Config)
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
