"""demo.py at a size that shows nothing but runs everything: its commands, the form of the table, a second run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import demo
import toy
from plumbing.config import InputError, command

ROOT = Path(__file__).parent.parent
NAMES = ["base", "sft", "t3s", "inverse", "random", "rrt"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A working folder with the shipped students, where a world has 40 traces and 12 unseen problems."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "students", "students")
    real = toy.main
    monkeypatch.setattr(toy, "main", lambda **keys: real(**keys, teacher_problems=40, unseen_problems=12))
    return tmp_path


# lr so high that accuracy surely falls: a bottleneck there must be
SMALL = dict(seeds="2", steps=4, lr=3e-3, record_every=2)


def recorded(run):
    lines = [json.loads(line) for line in Path("runs", run, "log.jsonl").read_text().splitlines()]
    return [line["eval_accuracy"] for line in lines if line.get("event") == "record"]


def test_the_table_is_what_was_recorded_and_a_second_demo_replaces_it(small, capsys):
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/left-over").write_text("from an earlier demo")
    demo.main(**SMALL)
    table = json.loads(Path("runs/demo/table.json").read_text(), parse_constant=pytest.fail)
    assert list(table) == ["rows"] and [row["name"] for row in table["rows"]] == NAMES
    assert all(set(row) == {"name", "final", "lowest"} for row in table["rows"])
    rows = {row["name"]: row for row in table["rows"]}
    for row in rows.values():
        for values in (row["final"], row["lowest"]):
            assert len(values) == 1 and isinstance(values[0], float)
            assert 0 <= values[0] <= 1 and (values[0] * 12) == pytest.approx(round(values[0] * 12))
    for name in ("sft", "t3s", "inverse", "random"):
        accuracies = recorded(f"demo/2/{name}")
        assert len(accuracies) == 3  # steps 0, 2, 4: equal budget
        assert rows[name] == {"name": name, "final": [accuracies[-1]], "lowest": [min(accuracies)]}
    assert rows["base"]["final"] == rows["base"]["lowest"] == [recorded("demo/2/sft")[0]]
    evaluated = json.loads(Path("runs/demo/2/sft/selection/rrt/eval/unseen.json").read_text())
    assert rows["rrt"]["final"] == rows["rrt"]["lowest"] == [evaluated["accuracy"]]

    keep = {name: np.load(f"runs/demo/2/sft/selection/{name}/mask.npy") for name in ("t3s", "inverse", "random")}
    assert keep["random"].sum() == keep["t3s"].sum() and not (keep["inverse"] & keep["t3s"]).any()
    assert not Path("runs/demo/left-over").exists()
    assert Path("runs/demo/demo.png").read_bytes().startswith(b"\x89PNG")
    assert Path("runs/demo/2/sft/report.html").exists()
    check_output(capsys.readouterr().out, rows)


def test_diffusion_students_over_tau(small, monkeypatch):
    monkeypatch.setattr(demo, "TAUS", (0.0, 0.01))
    demo.main(**SMALL, student="diffusion")
    rows = json.loads(Path("runs/demo-diffusion/table.json").read_text())["rows"]
    names = ["t3s-0.0", "t3s-0.01", "random-0.01", "inverse-0.01", "self-0.01"]
    assert [row["name"] for row in rows] == ["base", "sft", *names]
    by = {"self-0.01": "sft"}
    mask = {n: np.load(f"runs/demo-diffusion/2/{by.get(n, 'selector')}/selection/{n}/mask.npy") for n in names}
    assert mask["t3s-0.01"].sum() < mask["t3s-0.0"].sum() and not (mask["t3s-0.01"] & ~mask["t3s-0.0"]).any()
    assert mask["random-0.01"].sum() == mask["t3s-0.01"].sum() and not (mask["inverse-0.01"] & mask["t3s-0.0"]).any()
    for row in rows[1:]:
        accuracies = recorded(f"demo-diffusion/2/{row['name']}")
        assert row["final"] == [accuracies[-1]] and row["lowest"] == [min(accuracies)]
    assert Path("runs/demo-diffusion/demo.png").exists() and Path("runs/demo-diffusion/2/sft/report.html").exists()


def check_output(out, rows):
    """Commands that anyone can type, in the order of the pipeline, and the table in words."""
    files = [line.split()[2] for line in out.splitlines() if line.startswith("$ python ")]
    assert files == ["toy.py", "train.py", *["select.py", "train.py"] * 3, "select.py", "eval.py", "report.py"]
    assert "$ python train.py --run=demo/2/t3s --selection=runs/demo/2/sft/selection/t3s\n" in out
    assert "anchors (delta > 0)" in out  # what T3S chose, printed
    lines = out[out.index("accuracy on unseen problems") :].splitlines()
    for name, line in zip(NAMES, lines[2:], strict=False):
        final, lowest = rows[name]["final"][0], rows[name]["lowest"][0]
        assert line.split() == [name, f"{final:.2f}", "±", "0.00", f"{lowest:.2f}", "±", "0.00"]


def test_mean_and_spread_over_students(capsys):
    demo.show([{"name": "t3s", "final": [0.8, 0.9, 0.7], "lowest": [0.6, 0.7, 0.5]}], ["1", "2", "3"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["t3s", "0.80", "±", "0.10", "0.60", "±", "0.10"]


@pytest.mark.parametrize("keys, message", [
    (dict(student="bert"), "must be autoregressive or diffusion"),
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
