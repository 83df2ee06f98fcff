"""Kill train.py with SIGKILL at random moments, go on with --resume=true, compare with a run that nobody disturbed.

    python tests/faults.py --kills=50 --seed=0       # one process; about a minute on two CPU cores
    python tests/faults.py --ranks=true              # two processes: one is killed, one is stopped; the other must end
    python tests/faults.py --signals=true            # two processes are asked to stop, in every way a scheduler has

A kill is aimed: it comes a random time after a chosen part of the program (a step, a state or checkpoint being written,
the recording sweep, an evaluation, the beginning of a resume) has been entered for the n-th time. A moment later the
run is resumed and aimed at again, until it has ended; then every file must be what the undisturbed run wrote.
tests/test_resume.py uses the same functions for a handful of kills.
"""

import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from worlds import KEYS, make_world  # noqa: E402

import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
import trajectory  # noqa: E402
from plumbing import resume  # noqa: E402
from plumbing.config import command  # noqa: E402

PARTS = {"step": (train, "train_step"), "state": (resume, "save"), "checkpoint": (model, "save"),
         "sweep": (trajectory, "sweep"), "pass": (trajectory, "score"),
         "evaluation": (evaluation, "evaluate"),
         "rewind": (resume, "rewind")}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A child that can be killed


def child(keys, beacon, output, slow_part="", slower=0):
    """Fork a process that trains, and tells in `beacon` how often each part was entered -> its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        for i, (module, name) in enumerate(PARTS.values()):
            slow = slower if list(PARTS)[i] == slow_part else 0
            setattr(module, name, counted(getattr(module, name), beacon, i, slow))
        train.main(**keys)
        code = 0
    except KeyboardInterrupt:
        code = 130  # as plumbing.config.command has it
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def counted(function, beacon, i, slower=0):
    def call(*args, **given):
        beacon[i] += 1
        time.sleep(slower)
        return function(*args, **given)
    return call


def kill_in(keys, part, nth, delay, signals=(signal.SIGKILL,), slower=0):
    """Train; kill `delay` seconds after `part` was entered for the nth time -> was it stopped before it ended?

    signals   sent one after the other; kill -9 by default
    slower    every call of `part` takes so many seconds more
    """
    beacon, where = mmap.mmap(-1, len(PARTS)), list(PARTS).index(part)
    with tempfile.TemporaryFile("w+") as output:
        pid = child(keys, beacon, output, part, slower)
        while beacon[where] < nth:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return ended(status, output)
            time.sleep(0.0005)
        time.sleep(delay)
        for number in signals:
            os.kill(pid, number)
            time.sleep(0.02)
        status = os.waitpid(pid, 0)[1]
        stopped = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 130
        return True if stopped else ended(status, output)


def ended(status, output):
    if status:
        output.seek(0)
        raise AssertionError(f"the run failed:\n{output.read()}")
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Two runs, file by file


def same(run, other):
    """Assert that two runs wrote the same, bit for bit but for the seconds it took; nothing half-written is left."""
    a, b = Path("runs") / run, Path("runs") / other
    for folder in (a, b):
        hidden = [str(p) for p in folder.rglob(".*")]
        assert not hidden, f"left behind: {hidden}"
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (a, b)]
    assert names[0] == names[1], f"files differ: {set(names[0]) ^ set(names[1])}"
    logs = [[{**json.loads(line), "seconds": 0} for line in (f / "log.jsonl").read_text().splitlines()] for f in (a, b)]
    assert logs[0] == logs[1]
    for name in names[0]:
        if name.endswith(".npz"):
            with np.load(a / name) as x, np.load(b / name) as y:
                assert all(x[k].tobytes() == y[k].tobytes() for k in x), name
        elif name.endswith(".safetensors"):  # parameters and optimizer state; the header's order means nothing
            x, y = load_file(a / name), load_file(b / name)
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


# ---------------------------------------------------------------------------------------------------------------------
# The script


@dataclass
class Config:
    kills: int = 50  # at least so many SIGKILLs
    seed: int = 0  # of where they strike
    model: str = "data/toy-1/untrained"  # or llada, llada2, qwen3_moe
    ranks: bool = False  # instead: two processes, of which one dies, then one hangs
    signals: bool = False  # instead: two processes that are asked to save and stop


def main(**given):
    cfg = Config(**given)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        quietly(make_world)
        if cfg.signals:
            ways_to_stop(cfg)
        else:
            (two_processes if cfg.ranks else many_kills)(cfg)
        os.chdir("/")


def quietly(function):
    """In a child, so that this process stays fit for forking."""
    pid = os.fork()
    if not pid:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            function()
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def many_kills(cfg):
    rng, keys = random.Random(cfg.seed), KEYS | dict(model=cfg.model)
    assert not kill_in(keys | dict(run="whole"), "step", 10**6, 0)
    struck, runs = dict.fromkeys(PARTS, 0), 0
    while sum(struck.values()) < cfg.kills:
        run, runs = f"killed-{runs}", runs + 1
        for _ in range(6):
            part = rng.choice([p for p in PARTS if struck[p] == min(struck.values())])
            if not kill_in(keys | dict(run=run, resume=True), part, rng.randint(1, 3), rng.random() ** 3 * 0.05):
                break
            struck[part] += 1
        kill_in(keys | dict(run=run, resume=True), "step", 10**6, 0)
        same("whole", run)
        print(f"run {runs}: the same as the undisturbed one; kills so far: {sum(struck.values())}", flush=True)
    print(f"{sum(struck.values())} kills in {runs} runs, aimed at "
          + ", ".join(f"{part} {n}" for part, n in struck.items()) + ": all files identical")  # fmt: skip


def two_processes(cfg):
    """One of two processes is killed, then one is stopped: how long until everything has ended, and does it resume?"""
    keys = KEYS | dict(model=cfg.model, steps=400, record_every=0, save_every=0, resume_every=5, timeout=10)
    words = [f"--{key}={value}" for key, value in keys.items()]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
               str(ROOT / "train.py"), *words]  # fmt: skip
    for number in (signal.SIGKILL, signal.SIGSTOP):
        run = f"dies-{number.name}"
        with open(f"{run}.txt", "w") as output:
            process = subprocess.Popen([*program, f"--run={run}"], stdout=output, stderr=output,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
            while not list(Path(f"runs/{run}/resume").glob("[0-9]*")):
                assert process.poll() is None, Path(f"{run}.txt").read_text()
                time.sleep(0.05)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            tick = time.time()
            os.kill(int(workers[-1]), number)
            code = process.wait(timeout=120)
        print(f"{number.name} to one of two: exit code {code} after {time.time() - tick:.1f} s", flush=True)
        assert code != 0
        kill_in(keys | dict(run=run, resume=True, steps=12, allow_changes=True), "step", 10**6, 0)
        print(f"resumed on one process: {Path(f'runs/{run}/log.jsonl').read_text().count('loss')} steps in the log")


# -------------------------------------------------------------------------------------------------
# Two processes that are asked to save and stop

SLOW = """
import json, sys, time
from pathlib import Path

root, runs, delay = sys.argv[1:]
sys.argv[1:] = []
sys.path.insert(0, root)
import train, trajectory
from plumbing import config, parallel

score = trajectory.score

def slow(run, rows):
    (Path("entered") / f"{run.cfg.run}-{time.time_ns()}").touch()
    time.sleep(float(delay))
    return score(run, rows)

def main():
    for keys in json.loads(runs):
        train.main(**keys)

trajectory.score = slow
config.command(main, train.Config)
parallel.end_processes()
"""
WAYS = {  # who gets which signals; of torchrun, that is the agent
    "torchrun": [("agent", signal.SIGTERM)],
    "ctrl-c": [("agent", signal.SIGINT)],
    "workers": [("both", signal.SIGTERM)],
    "one": [("second", signal.SIGUSR1)],
    "all": [("both", signal.SIGTERM), ("agent", signal.SIGTERM)],
    "hangup": [("agent", signal.SIGHUP), ("both", signal.SIGHUP), ("both", signal.SIGTERM)],
    "orphaned": [("agent", signal.SIGKILL)],
}
IN_RECORDING = KEYS | dict(steps=4, resume_every=0, save_every=0)


def ways_to_stop(cfg):
    """Each way: saved within seconds, and resumed bit for bit."""
    for way in WAYS:
        code, seconds = stopped_by(way)
        print(f"{way}: all ended after {seconds:.1f} s, exit code {code} of torchrun", flush=True)
    resumed_like_undisturbed(list(WAYS))
    print(f"{len(WAYS)} ways, all resumed bit for bit")


def slowly(runs, delay):
    """Two processes train these runs, one after the other; each pass of a sweep takes `delay` s longer."""
    Path("slow.py").write_text(SLOW)
    Path("entered").mkdir(exist_ok=True)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["--", "slow.py", str(ROOT), json.dumps(runs), str(delay)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open("output.txt", "w") as output:
        return subprocess.Popen([*program, *words], stdout=output, stderr=output, env=env)


def stopped_by(way):
    """Train the run `way`; in the sweep of step 3 send its signals -> torchrun's exit code, seconds until all ended."""
    process = slowly([IN_RECORDING | dict(run=way)], 0.3)
    while len(list(Path("entered").glob(f"{way}-*"))) < 7:  # 3 passes of each process at step 0, then step 3
        assert process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    workers = [int(word) for word in children.split()]
    who = {"agent": [process.pid], "both": workers, "second": workers[1:]}
    tick = time.time()
    for name, number in WAYS[way]:
        for pid in who[name]:
            os.kill(pid, number)
    code = process.wait(timeout=60)
    while any(map(alive, workers)):
        assert time.time() - tick < 30, Path("output.txt").read_text()
        time.sleep(0.05)
    assert code != 0
    assert list(Path(f"runs/{way}/resume").glob("[0-9]*")), Path("output.txt").read_text()
    return code, time.time() - tick


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def resumed_like_undisturbed(ways):
    runs = [IN_RECORDING | dict(run="whole-2"), *(dict(run=way, resume=True) for way in ways)]
    assert slowly(runs, 0).wait(timeout=300) == 0, Path("output.txt").read_text()
    for way in ways:
        shutil.rmtree(f"runs/{way}/resume/000003")  # which it wrote because it was asked to stop
        same("whole-2", way)


if __name__ == "__main__":
    command(main, Config)
