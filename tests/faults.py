"""Kill train.py with SIGKILL at random moments, go on with --resume=true, compare with a run that nobody disturbed.

    python tests/faults.py --kills=50 --seed=0       # one process; about a minute on two CPU cores
    python tests/faults.py --ranks=true              # two processes: one is killed, one is stopped; the other must end

A kill is aimed: it comes a random time after a chosen part of the program (a step, a state or checkpoint being written,
the recording sweep, an evaluation, the beginning of a resume) has been entered for the n-th time. A moment later the
run is resumed and aimed at again, until it has ended; then every file must be what the undisturbed run wrote.
tests/test_resume.py uses the same functions for a handful of kills.
"""

import json
import mmap
import os
import random
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

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
import trajectory  # noqa: E402
from hf import families  # noqa: E402
from plumbing import resume  # noqa: E402
from plumbing.config import command, write_json  # noqa: E402

PARTS = {"step": (train, "train_step"), "state": (resume, "save"), "checkpoint": (model, "save"),
         "sweep": (trajectory, "sweep"), "evaluation": (evaluation, "evaluate"),
         "rewind": (resume, "rewind")}  # fmt: skip
KEYS = dict(model="data/toy-1/untrained", data="data/toy-1/teacher", eval_data="data/toy-1/unseen", steps=9,
            batch_size=4, micro_batch_size=2, lr=1e-3, weight_decay=0.1, record_every=3, save_every=4, resume_every=2,
            max_new_tokens=8, device="cpu")  # fmt: skip

# One thread for all that is compared or forked here: sums over several threads are rounded otherwise than over one, and
# OpenMP's threads do not survive a fork.
torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------------------------
# A small world, with a diffusion student of each family


def make_world():
    """data/toy-1 with 9 examples of different lengths, and three students of other families, in the working folder."""
    toy.main(seed=1, teacher_problems=9, unseen_problems=3, pretrain_steps=1)
    path = Path("data/toy-1/teacher.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["response"] = line["response"][: 6 + 5 * i]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data.main(source=str(path), tokenizer="data/toy-1/untrained", out="data/toy-1/teacher", verifier="toy")
    write_students()


def write_students():
    """llada, llada2 and qwen3_moe beside data/toy-1, with its tokenizer."""
    V = families.read_config("data/toy-1/untrained").vocab_size
    ids = dict(mask_token_id=3, eos_token_id=0, pad_token_id=0)
    write_student("llada", dict(
        model_type="llada", vocab_size=V, d_model=32, mlp_hidden_size=48, n_layers=2, n_heads=4, n_kv_heads=4,
        rms_norm_eps=1e-5, rope_theta=1e4, max_sequence_length=256, **ids))  # fmt: skip
    write_student("llada2", dict(
        model_type="llada2_moe", vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, num_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, num_shared_experts=1,
        first_k_dense_replace=1, partial_rotary_factor=0.5, block_length=8, max_position_embeddings=256,
        **ids))  # fmt: skip
    write_student("qwen3_moe", dict(
        model_type="qwen3_moe", vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, num_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, eos_token_id=0,
        pad_token_id=0))  # fmt: skip


def write_student(name, raw):
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", raw)
        student = model.Transformer(families.read_config(folder)).init_weights(0, std=0.1)
    model.save(student, "data/toy-1/untrained", name)


# ---------------------------------------------------------------------------------------------------------------------
# A child that can be killed


def child(keys, beacon, output):
    """Fork a process that trains, and tells in `beacon` how often each part was entered -> its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        for i, (module, name) in enumerate(PARTS.values()):
            setattr(module, name, counted(getattr(module, name), beacon, i))
        train.main(**keys)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def counted(function, beacon, i):
    def call(*args, **given):
        beacon[i] += 1
        return function(*args, **given)
    return call


def kill_in(keys, part, nth, delay):
    """Train; kill -9 `delay` seconds after `part` was entered for the nth time -> was it killed before it ended?"""
    beacon, where = mmap.mmap(-1, len(PARTS)), list(PARTS).index(part)
    with tempfile.TemporaryFile("w+") as output:
        pid = child(keys, beacon, output)
        while beacon[where] < nth:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return ended(status, output)
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        return True if os.WIFSIGNALED(status) else ended(status, output)


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


def main(**given):
    cfg = Config(**given)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        quietly(make_world)
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


if __name__ == "__main__":
    command(main, Config)
