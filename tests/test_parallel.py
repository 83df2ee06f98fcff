"""parallel.py: a run that is asked to stop saves and stops, whoever is asked, and continues bit for bit."""

import os
import signal
import threading
import time
from pathlib import Path

import faults
import pytest
import torch
from worlds import KEYS, inside, make_world

import data
import model
import train
import trajectory
from plumbing.parallel import Interrupt, Interrupted

TERM, USR1, HUP, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data, and a run that nobody disturbed."""
    folder = make_world(tmp_path_factory.mktemp("world"), students=("llada",))
    with inside(folder):
        train.main(run="whole", **KEYS)
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("data", "llada", "runs/whole"):
        (tmp_path / name).symlink_to(world / name)
    return tmp_path


# -------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize("part, nth, signals", [
    ("step", 4, [TERM]),
    ("step", 4, [TERM, TERM, TERM]),  # Slurm's own, and torchrun's, and the shell script's
    ("pass", 7, [USR1]),  # in the sweep of step 3: 5 passes a sweep
    ("evaluation", 3, [HUP, TERM]),  # while answers of step 3 are sampled
    ("state", 2, [TERM]),
    ("checkpoint", 1, [USR1, INT]),
])  # fmt: skip
def test_asked_to_stop_it_saves_and_continues_bit_for_bit(here, part, nth, signals):
    tick = time.time()
    keys = KEYS | dict(run="stopped")
    assert faults.kill_in(keys, part, nth, 0.01, signals, slower=0.2)
    assert time.time() - tick < 60
    assert list(Path("runs/stopped/resume").glob("[0-9]*"))
    train.main(run="stopped", resume=True)
    faults.same("whole", "stopped")


def test_a_recording_that_is_interrupted_keeps_what_it_has(here, monkeypatch):
    """Stopped while answers are sampled: neither the sweep nor the finished batches are done again."""
    evaluate = trajectory.evaluation.evaluate
    asked = []

    def counted(student, tokenizer, problems, cfg, indices, **more):
        asked.append(list(indices))
        if len(asked) == stop_at:
            os.kill(os.getpid(), TERM)
        return evaluate(student, tokenizer, problems, cfg, indices=indices, **more)

    monkeypatch.setattr(trajectory.evaluation, "evaluate", counted)
    stop_at = 3
    keys = KEYS | dict(run="cut", sample_batch_size=1, steps=2, record_every=2)
    with pytest.raises(KeyboardInterrupt):
        train.main(**keys)
    assert not Path("runs/cut/trajectory/000000.npz").exists()
    before, stop_at = [*asked], 0
    asked.clear()
    scored = []
    score = trajectory.score
    monkeypatch.setattr(trajectory, "score", lambda run, rows: scored.append(rows) or score(run, rows))
    train.main(run="cut", resume=True)
    assert asked[0] == before[2] and before[0] not in asked[:2] and before[1] not in asked[:2]
    assert len(scored) == 5  # those of step 2; the sweep of step 0 was finished
    train.main(**keys | dict(run="undisturbed"))
    faults.same("undisturbed", "cut")


def test_a_signal_in_the_last_recording_is_no_good_end(here, capsys):
    """All updates are made, and the record of the last step is missing: not done, and resume completes it."""
    score = trajectory.score
    passes = []

    def stopped(run, rows):
        passes.append(rows)
        if len(passes) == 7:  # 5 passes at step 0
            os.kill(os.getpid(), TERM)
        return score(run, rows)

    keys = KEYS | dict(run="cut", steps=2, record_every=2)
    trajectory.score = stopped
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(**keys)
    finally:
        trajectory.score = score
    assert "stopped at step 2 of 2" in capsys.readouterr().out
    assert not Path("runs/cut/trajectory/000002.npz").exists()
    train.main(run="cut", resume=True)
    assert Path("runs/cut/trajectory/000002.npz").exists()


def test_only_a_second_ctrl_c_aborts():
    with Interrupt() as interrupt:
        for number in (TERM, USR1, HUP, TERM, INT, INT):  # two at once are one press of the keys
            os.kill(os.getpid(), number)
            assert interrupt.asked()
        time.sleep(0.6)
        os.kill(os.getpid(), TERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), INT)


def test_the_handlers_from_before_come_back_and_an_ignored_signal_stays_ignored():
    before = {number: signal.getsignal(number) for number in Interrupt.SIGNALS}
    signal.signal(HUP, signal.SIG_IGN)  # as under nohup
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), HUP)
            assert not interrupt.asked()
    finally:
        signal.signal(HUP, before[HUP])
    assert {number: signal.getsignal(number) for number in Interrupt.SIGNALS} == before


def test_in_another_thread_signals_are_left_alone():
    found = []

    def enter():
        with Interrupt() as interrupt:
            found.append(interrupt.asked())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_forward_pass_hears(here):
    student = model.load("data/toy-1/untrained")
    interrupt = Interrupt()
    ids = torch.tensor(data.load("data/toy-1/teacher").tokens[:5].astype("int64"))[None]
    with interrupt.heard(student):
        student(ids)
        interrupt.signalled = True
        with pytest.raises(Interrupted):
            student(ids)
    student(ids)


# -------------------------------------------------------------------------------------------------
# Two processes


def test_two_processes_stop_and_continue_bit_for_bit(here):
    """SIGTERM to torchrun and to both workers, in a sweep. `python tests/faults.py --signals=true` tries all ways."""
    faults.stopped_by("all")
    faults.resumed_like_undisturbed(["all"])
