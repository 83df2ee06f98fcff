"""plumbing/screen.py: the time that is left, and a reader that has gone away."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from worlds import KEYS

import train
from plumbing import screen

ROOT = Path(__file__).parent.parent
WORLD = dict(students=())


def progress(steps, records, **keys):
    shown = object.__new__(screen.Progress)
    shown.cfg = SimpleNamespace(**dict(steps=10, record_every=4) | keys)
    shown.steps = steps
    shown.records = records
    return shown


def test_the_time_left_counts_updates_and_records_apart_and_the_slow_first_ones_not():
    """At step 5 of 10: five updates of 2 s, and records at 8 and at the end, 7 s each."""
    shown = progress([60.0, 2.0, 2.0, 2.0, 2.0], [100.0, 7.0])
    assert shown.seconds_left(5) == pytest.approx(5 * 2 + 2 * 7)
    assert progress([60.0], [], record_every=0).seconds_left(1) == 9 * 60  # nothing better is known
    assert progress([60.0, 1.0], [], record_every=0).seconds_left(2) == 8
    # the record of step 4 comes after its update, that of step 10 at the end
    assert progress([3.0] * 4, [7.0]).seconds_left(4) == pytest.approx(6 * 3 + 3 * 7)


def test_a_reader_that_goes_away_does_not_stop_the_training(here):
    """`python train.py ... | head -1`, in a terminal that was closed, and so on."""
    words = [f"--{key}={value}" for key, value in KEYS.items()]
    program = [sys.executable, str(ROOT / "train.py"), "--run=piped", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=120) == 0 and said == "", said
    assert Path("runs/piped/checkpoints/000009").is_dir()


def test_the_status_line_says_of_which_step_the_accuracy_is(capsys):
    """Of the last record, which a resumed run takes from the log; "-" before there is one."""
    shown = progress([1.0], [], packing=False, compile=False)
    shown.latest = None
    done = {"step": 10, "loss": 0.5, "grad_norm": 1.0, "tokens": 7}
    shown.step(done, 1e-5, 1.0, {})
    assert "| accuracy - |" in capsys.readouterr().out
    shown.record({"step": 4, "accuracy": 0.25, "nll": 1.0, "seconds": 1.0})
    shown.step(done, 1e-5, 1.0, {})
    assert "| accuracy 0.250 at step 4 |" in capsys.readouterr().out


def test_a_student_whose_answers_cannot_be_read_is_said_at_step_0(here, capsys):
    """An untrained student writes noise up to the limit: format, before pass 1 is paid for. And said once."""
    train.main(run="noise", **KEYS | dict(steps=3, eval_data=""))
    lines = capsys.readouterr().out.splitlines()
    at = [i for i, line in enumerate(lines) if "were cut off (raise --max_new_tokens)" in line]
    assert len(at) == 1 and lines[at[0]].startswith("warning: accuracy 0.")
    assert lines[at[0] - 1].startswith("recorded step 0") and "format, not only ability" in lines[at[0]]
