"""Imitation Shock and T3S on the toy world: every command of the pipeline, over three students.

    make demo                               # or: python demo.py
    python demo.py --student=diffusion      # the same for masked-diffusion students, over tau: half an hour

It prints the commands as it goes (anyone can type them), then a table and runs/demo/demo.png. Accuracies are on
problems that nobody was trained on, answers sampled at temperature 1. The students come with the repository, in
students/; `python toy.py --seed=1 --pretrain=true --diffusion=true` makes the first two of them again. The diffusion
students' tokens are chosen by the autoregressive student of the same world (paper, 3.3), and once by themselves.
"""

import contextlib
import io
import shutil
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import eval as evaluation
import report
import toy
import train
from plumbing.config import InputError, command, load_select, write_json
from plumbing.runs import records


@dataclass
class Config:
    student: str = "autoregressive"  # or diffusion
    seeds: str = "1,2,3"  # students and worlds; each has its folder students/toy-<seed>
    steps: int = 36  # optimizer steps of every run: equal budget
    lr: float = 4e-4  # constant; the batch is the whole training set
    record_every: int = 4  # steps between two recorded checkpoints


TAUS = (0.0, 0.01, 0.05, 0.2)  # of the diffusion student's force sets


def run(main, file, **keys):
    """Say what is run as the command that it is, run it, and keep its output for who wants it -> (result, output)."""
    print(f"$ python {file} " + " ".join(f"--{key}={value}" for key, value in keys.items()), flush=True)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            return main(**keys), output.getvalue()
    except BaseException:
        print(output.getvalue(), file=sys.stderr)
        raise


def main(**given):
    cfg, started = Config(**given), time.time()
    if cfg.student not in ("autoregressive", "diffusion"):
        raise InputError(f"--student={cfg.student}: must be autoregressive or diffusion")
    ar, seeds = cfg.student == "autoregressive", cfg.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds={cfg.seeds}: must be different whole numbers separated by commas, like 1,2,3")
    home, shown = ("demo", ("sft", "t3s")) if ar else ("demo-diffusion", ("sft", "t3s-0.0", "t3s-0.01"))
    shutil.rmtree(f"runs/{home}", ignore_errors=True)
    table = {}  # {row: {"final", "lowest": an accuracy per seed}}
    for seed in seeds:
        (cycle if ar else diffusion_cycle)(cfg, f"{home}/{seed}", seed, table)
    names = {name: [f"{home}/{seed}/{name}" for seed in seeds] for name in shown}
    report.figure(names, names["sft"], f"runs/{home}/demo.png")
    run(report.main, "report.py", run=",".join(runs[0] for runs in names.values()),
        selection="t3s" if ar else "self-0.01")  # fmt: skip
    rows = [{"name": name, **row} for name, row in table.items()]
    write_json(f"runs/{home}/table.json", {"rows": rows})
    show(rows, seeds)
    print(f"\nthe picture: runs/{home}/demo.png; token by token: runs/{home}/{seeds[0]}/sft/report.html "
          f"({time.time() - started:.0f} s in all)")  # fmt: skip


def cycle(cfg, home, seed, table):
    """Base, SFT, T3S and the controls for one student; adds to `table`."""
    same = world(cfg, seed)
    sft = trained(f"{home}/sft", model=f"students/toy-{seed}", **same)
    note(table, "base", sft[:1])
    note(table, "sft", sft)
    for rule in ("t3s", "inverse", "random"):
        folder, output = run(load_select().main, "select.py", run=f"{home}/sft", rule=rule, seed=int(seed))
        if rule == "t3s":
            print(output, end="")
        note(table, rule, trained(f"{home}/{rule}", selection=str(folder)))
    folder, _ = run(load_select().main, "select.py", run=f"{home}/sft", rule="rrt")
    results, _ = run(evaluation.main, "eval.py", model=str(folder), data=same["eval_data"], max_new_tokens=60,
                     seed=int(seed))  # fmt: skip
    [(summary, _)] = results.values()
    note(table, "rrt", [summary["accuracy"]])


def diffusion_cycle(cfg, home, seed, table):
    """The same for a diffusion student: force sets over tau by the autoregressive selector, and one by itself."""
    same = world(cfg, seed)
    student = dict(model=f"students/toy-diffusion-{seed}", **same)
    trained(f"{home}/selector", model=f"students/toy-{seed}", **same)
    sft = trained(f"{home}/sft", **student)
    note(table, "base", sft[:1])
    note(table, "sft", sft)
    chosen = [(f"t3s-{tau}", f"{home}/selector", dict(rule="t3s", tau=tau)) for tau in TAUS]
    chosen += [(f"{rule}-0.01", f"{home}/selector", dict(rule=rule, tau=0.01)) for rule in ("random", "inverse")]
    chosen += [("self-0.01", f"{home}/sft", dict(rule="t3s", tau=0.01))]
    for name, selector, keys in chosen:
        folder, output = run(load_select().main, "select.py", run=selector, kind="force", seed=int(seed), show=0,
                             name=name, **keys)  # fmt: skip
        print(output.splitlines()[-1])
        note(table, name, trained(f"{home}/{name}", selection=str(folder), **student))


def world(cfg, seed):
    """Write the world of a seed -> what all its runs have in common."""
    out = f"data/toy-{seed}"
    run(toy.main, "toy.py", seed=int(seed), out=out)
    return dict(data=f"{out}/teacher", eval_data=f"{out}/unseen", steps=cfg.steps, batch_size=0, micro_batch_size=100,
                lr=cfg.lr, schedule="constant", record_every=cfg.record_every, max_new_tokens=60,
                seed=int(seed))  # fmt: skip


def trained(name, **keys):
    """Train a run -> its recorded accuracies on unseen problems."""
    run(train.main, "train.py", run=name, **keys)
    return records(name)["eval_accuracy"]


def note(table, name, accuracies):
    row = table.setdefault(name, {"final": [], "lowest": []})
    row["final"].append(float(accuracies[-1]))
    row["lowest"].append(float(min(accuracies)))
    print(f"  {name}: " + " ".join(f"{a:.2f}" for a in accuracies), flush=True)


def show(rows, seeds):
    print(f"\naccuracy on unseen problems, mean ± standard deviation over {len(seeds)} students")
    print(f"{'':12}{'final':>15}{'lowest recorded':>18}")
    for row in rows:
        spread = {key: np.std(row[key], ddof=min(1, len(seeds) - 1)) for key in ("final", "lowest")}
        cells = [f"{np.mean(row[key]):.2f} ± {spread[key]:.2f}" for key in spread]
        print(f"{row['name']:12}{cells[0]:>15}{cells[1]:>18}")


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))  # these matrices are too small for more
    command(main, Config)
