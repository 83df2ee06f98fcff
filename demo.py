"""Imitation Shock and T3S on the toy world: every command of the pipeline, over three students.

    make demo            # or: python demo.py

It prints the commands as it goes (anyone can type them), then a table and runs/demo/demo.png. Accuracies are on
problems that nobody was trained on, answers sampled at temperature 1. The students come with the repository, in
students/; `python toy.py --seed=1 --pretrain=true` makes the first of them again.
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
from config import command, load_select, write_json


@dataclass
class Config:
    seeds: str = "1,2,3"  # students and worlds; each has its folder students/toy-<seed>
    steps: int = 36  # optimizer steps of every run: equal budget
    lr: float = 4e-4  # constant; the batch is the whole training set
    record_every: int = 4  # steps between two recorded checkpoints


ROWS = ("base", "sft", "t3s", "inverse", "random", "rrt")


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
    cfg = Config(**given)
    started = time.time()
    shutil.rmtree("runs/demo", ignore_errors=True)
    table = {name: {"final": [], "lowest": []} for name in ROWS}
    seeds = cfg.seeds.split(",")
    for seed in seeds:
        cycle(cfg, seed, table)
    names = {name: [f"demo/{seed}/{name}" for seed in seeds] for name in ("sft", "t3s")}
    report.figure(names, names["sft"], "runs/demo/demo.png")
    run(report.main, "report.py", run=f"demo/{seeds[0]}/sft,demo/{seeds[0]}/t3s")
    rows = [{"name": name, **table[name]} for name in ROWS]
    write_json("runs/demo/table.json", {"rows": rows})
    show(rows, seeds)
    print(f"\nthe picture: runs/demo/demo.png; token by token: runs/demo/{seeds[0]}/sft/report.html "
          f"({time.time() - started:.0f} s in all)")  # fmt: skip


def cycle(cfg, seed, table):
    """Base, SFT, T3S and the controls for one student; adds to `table`."""
    home, world = f"demo/{seed}", f"data/toy-{seed}"
    run(toy.main, "toy.py", seed=int(seed), out=world)
    same = dict(model=f"students/toy-{seed}", data=f"{world}/teacher", eval_data=f"{world}/unseen", steps=cfg.steps,
                batch_size=0, micro_batch_size=100, lr=cfg.lr, schedule="constant", record_every=cfg.record_every,
                max_new_tokens=60, seed=int(seed))  # fmt: skip
    run(train.main, "train.py", run=f"{home}/sft", **same)
    sft = report.records(f"{home}/sft")["eval_accuracy"]
    note(table, "base", sft[:1])
    note(table, "sft", sft)
    for rule in ("t3s", "inverse", "random"):
        folder, output = run(load_select().main, "select.py", run=f"{home}/sft", rule=rule, seed=int(seed))
        if rule == "t3s":
            print(output, end="")
        run(train.main, "train.py", run=f"{home}/{rule}", selection=str(folder))
        note(table, rule, report.records(f"{home}/{rule}")["eval_accuracy"])
    folder, _ = run(load_select().main, "select.py", run=f"{home}/sft", rule="rrt")
    results, _ = run(evaluation.main, "eval.py", model=str(folder), data=same["eval_data"], max_new_tokens=60,
                     seed=int(seed))  # fmt: skip
    [(summary, _)] = results.values()
    note(table, "rrt", [summary["accuracy"]])


def note(table, name, accuracies):
    table[name]["final"].append(float(accuracies[-1]))
    table[name]["lowest"].append(float(min(accuracies)))
    print(f"  {name}: " + " ".join(f"{a:.2f}" for a in accuracies), flush=True)


def show(rows, seeds):
    print(f"\naccuracy on unseen problems, mean ± standard deviation over {len(seeds)} students")
    print(f"{'':9}{'final':>15}{'lowest recorded':>18}")
    for row in rows:
        spread = {key: np.std(row[key], ddof=min(1, len(seeds) - 1)) for key in ("final", "lowest")}
        cells = [f"{np.mean(row[key]):.2f} ± {spread[key]:.2f}" for key in spread]
        print(f"{row['name']:9}{cells[0]:>15}{cells[1]:>18}")


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))  # these matrices are too small for more
    command(main, Config)
