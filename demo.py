"""Imitation Shock and T3S on the toy world: every command of the pipeline, over several students.

    make demo                               # or: python demo.py
    python demo.py --world=facts            # a teacher who knows something, and all the controls
    python demo.py --student=diffusion      # masked-diffusion students (in the world of weak ones):
                                            # tokens forced, and tokens out of the loss

It prints each command, so that anyone can type them, then a table and runs/<demo>/demo.png.
Accuracies are on problems that occur in no training file, answers sampled at temperature 1. The
students come with the repository, in students/; toy.py with --pretrain=true makes each of them
again, and --pretrain=true here those that are missing.

Next: real.py.
"""

import contextlib
import io
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import eval as evaluation
import intervals
import own
import report
import toy
import train
from plumbing.config import InputError, command, load_select, require, write_json
from plumbing.runs import records


@dataclass
class Config:
    world: str = ""  # slips, facts or weak: what the students are weak at (toy.py); default below
    student: str = "autoregressive"  # or diffusion
    seeds: str = ""  # students and worlds; default: those in students/
    steps: int = 0  # optimizer steps of every run: equal budget; 0: 36, in the facts world 48
    lr: float = 0.0  # constant; the batch is the whole training set; 0: 4e-4, diffusion 1e-4
    record_every: int = 0  # steps between two recorded checkpoints; 0: 4, diffusion 9
    record_later: int = 0  # the same for all runs but the first of a student; 0: as record_every
    unseen_problems: int = 300  # problems that accuracy is measured on
    pretrain: bool = False  # pretrain the students that are not in students/, minutes each
    own: bool = False  # also train on the student's own answers (the facts world always does)


DEFAULTS = {
    "autoregressive": dict(world="slips", lr=4e-4, record_every=4),
    "diffusion": dict(world="weak", lr=1e-4, record_every=9),
}
# weak: the shocked ones of the five whose table is in docs/LOG.md
SEEDS = {"slips": "1,2,3", "facts": "31,32,33", "weak": "22,23"}
STEPS = {"slips": 36, "facts": 48, "weak": 36}

# What is trained on which tokens: row of the table -> keys of select.py. In the facts world the
# controls keep as many tokens as the row that they are to be compared with, t3s-2.5.
SELECTIONS = {
    "slips": {
        "t3s": dict(rule="t3s"),
        "inverse": dict(rule="inverse"),
        "random": dict(rule="random"),
    },
    "facts": {
        "t3s": dict(rule="t3s"),
        "t3s-2.5": dict(rule="t3s", tau=2.5),
        "static_low": dict(rule="static_low", tau=2.5),
        "random": dict(rule="random", tau=2.5),
    },
}
SELECTIONS["weak"] = SELECTIONS["slips"]
# ... of a diffusion student: row -> keys of select.py, and those of train.py beside --selection.
# Each random row takes as many tokens of every example as the row above it.
MASKED_SELECTIONS = {
    "force": (dict(kind="force", rule="t3s"), {}),
    "force-random": (dict(kind="force", rule="random"), {}),
    "keep": (dict(kind="keep", rule="t3s", tau=1.0), {}),
    "keep-unscored": (dict(kind="keep", rule="t3s", tau=1.0), dict(anchors="unscored")),
    "keep-random": (dict(kind="keep", rule="random", tau=1.0), {}),
}
SHOWN_MASKED = ("sft", "force", "keep")  # in the picture; of the others only the end is recorded
# ... and the controls without a teacher: row of the table -> keys of own.py
OWN_ANSWERS = {
    "own-greedy": dict(temperature=0.0),
    "own-correct": dict(samples=8, correct=True),
}


def main(**given):
    """Run everything, print the table -> its rows, as in runs/<demo>/table.json.

    A row is {"name", "final", "lowest"}: accuracies on unseen problems, one per student, after the
    last step and the lowest of all recorded ones.
    """
    cfg = Config(**given)
    started = time.time()
    seeds = check(cfg)
    is_ar = cfg.student == "autoregressive"
    home = "demo" if is_ar else "demo-diffusion"
    home += "" if cfg.world == DEFAULTS[cfg.student]["world"] else f"-{cfg.world}"
    shutil.rmtree(f"runs/{home}", ignore_errors=True)
    table = {}  # {row: {"final", "lowest": an accuracy per seed}}
    for seed in seeds:
        cycle = ar_cycle if is_ar else diffusion_cycle
        cycle(cfg, f"{home}/{seed}", seed, table)
        rows = [{"name": name, **row} for name, row in table.items()]
        # after every student, so that a long demo that is stopped leaves what it has
        write_json(f"runs/{home}/table.json", {"rows": rows})
    shown = ("sft", "t3s", "t3s-2.5") if cfg.world == "facts" else ("sft", "t3s")
    shown = shown if is_ar else SHOWN_MASKED
    names = {name: [f"{home}/{seed}/{name}" for seed in seeds] for name in shown}
    if not cfg.record_later:  # curves of equal length
        report.figure(names, names["sft"], f"runs/{home}/demo.png")
    first = ",".join(runs[0] for runs in names.values())
    run(report.main, "report.py", run=first, selection="t3s" if is_ar else "keep")
    show(rows, seeds)
    print(f"\nthe picture: runs/{home}/demo.png; "
          f"token by token: runs/{home}/{seeds[0]}/sft/report.html "
          f"({time.time() - started:.0f} s in all)")
    return rows


def check(cfg):
    """Fill in the defaults that depend on student and world -> the seeds. Raises InputError."""
    require(cfg, student=tuple(DEFAULTS))
    for key, value in DEFAULTS[cfg.student].items():
        setattr(cfg, key, getattr(cfg, key) or value)
    require(
        cfg,
        world=tuple(toy.WORLDS),
        steps=(0, None),
        record_every=(1, None),
        record_later=(0, None),
        unseen_problems=(1, None),
    )
    cfg.seeds = cfg.seeds or SEEDS[cfg.world]
    cfg.steps = cfg.steps or STEPS[cfg.world]
    seeds = cfg.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        message = "must be different whole numbers separated by commas, like 1,2,3"
        raise InputError(f"--seeds={cfg.seeds}: {message}")
    return seeds


# --------------------------------------------------------------------------------------------------
# One student


def ar_cycle(cfg, home, seed, table):
    """Base, SFT, T3S and the controls for one autoregressive student; adds to `table`."""
    student, same = world(cfg, seed)
    later = dict(record_every=cfg.record_later or cfg.record_every)
    sft = trained(f"{home}/sft", model=student, **same)
    note(table, "base", sft[:1])
    if cfg.world == "facts":
        note(table, "base-greedy", [evaluated(student, same, temperature=0.0)])
    note(table, "sft", sft)
    for name, keys in SELECTIONS[cfg.world].items():
        folder, output = select(run=f"{home}/sft", seed=int(seed), **named(name, keys))
        if name == "t3s":
            print(output, end="")
        keys = later if cfg.record_later else {}  # all that is not given is inherited from pass 1
        note(table, name, trained(f"{home}/{name}", selection=str(folder), **keys))
    if cfg.world != "facts":
        folder, _ = select(run=f"{home}/sft", rule="rrt")
        note(table, "rrt", [evaluated(folder, same)])
    if cfg.own or cfg.world == "facts":
        for name, keys in OWN_ANSWERS.items():
            answers = own_answers(student, same, name, **keys)
            keys = {**same, **later, "data": answers}
            note(table, name, trained(f"{home}/{name}", model=student, **keys))


def diffusion_cycle(cfg, home, seed, table):
    """The same for a diffusion student, which chooses by its own confidence: what fell is forced
    (the paper's form), or what rose leaves the loss, masked no more or masked but not scored."""
    _, same = world(cfg, seed)
    student = f"students/{toy.WORLDS[cfg.world].name}-diffusion-{seed}"
    at_the_end = dict(record_every=cfg.record_later or cfg.steps)
    # a mask and its complement, twice: confidence in a token depends on what else is hidden
    sft = trained(f"{home}/sft", model=student, confidence_draws=4, **same)
    note(table, "base", sft[:1])
    note(table, "sft", sft)
    # the lowest after step 0, also where it is no lower than there: not every student is shocked
    lowest = lowest_after_the_start(f"{home}/sft")
    for name, (keys, more) in MASKED_SELECTIONS.items():
        keys = dict(keys, bottleneck=lowest, seed=int(seed), show=0, name=name)
        folder, output = select(run=f"{home}/sft", **keys)
        print(output.splitlines()[-1])
        if cfg.record_later or name not in SHOWN_MASKED:
            more = more | at_the_end
        # all that is not given is inherited from pass 1; only that one is selected from
        more = more | dict(confidence_draws=0)
        note(table, name, trained(f"{home}/{name}", selection=str(folder), **more))
    for name, keys in OWN_ANSWERS.items():
        answers = own_answers(student, same, name, **keys)
        keys = {**same, **at_the_end, "data": answers}
        note(table, name, trained(f"{home}/{name}", model=student, **keys))


def named(name, keys):
    """The keys of a selection whose folder bears the row's name."""
    return keys if name == keys["rule"] else dict(keys, name=name)


# --------------------------------------------------------------------------------------------------
# The commands


def run(main, file, **keys):
    """Print the command, run it, capture its output -> (result, output)."""
    announce(file, keys)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            return main(**keys), output.getvalue()
    except BaseException:
        print(output.getvalue(), file=sys.stderr)
        raise


def announce(file, keys):
    """Print the command as anyone can type it."""
    words = [f"--{key}={value}" for key, value in keys.items()]
    print(f"$ python {file} {' '.join(words)}", flush=True)


def world(cfg, seed):
    """Write the world of a seed -> its student, and the keys that all its runs have in common."""
    name = f"{toy.WORLDS[cfg.world].name}-{seed}"
    student = f"students/{name}"
    keys = dict(seed=int(seed), out=f"data/{name}")
    if cfg.world != toy.Config.world:
        keys["world"] = cfg.world
    if cfg.unseen_problems != Config.unseen_problems:
        keys["unseen_problems"] = cfg.unseen_problems
    if cfg.student == "diffusion":
        masked = student.replace(f"-{seed}", f"-diffusion-{seed}")
        if cfg.pretrain and not Path(masked).is_dir():
            keys |= dict(pretrain=True, diffusion=True)
    elif cfg.pretrain and not Path(student).is_dir():
        keys["pretrain"] = True
    run(toy.main, "toy.py", **keys)
    same = dict(
        data=f"data/{name}/teacher",
        eval_data=f"data/{name}/unseen",
        steps=cfg.steps,
        batch_size=0,
        micro_batch_size=100,
        lr=cfg.lr,
        schedule="constant",
        record_every=cfg.record_every,
        max_new_tokens=60,
        seed=int(seed),
    )
    return student, same


def trained(name, **keys):
    """Train a run -> its recorded accuracies on unseen problems."""
    run(train.main, "train.py", run=name, **keys)
    return records(name)["eval_accuracy"]


def lowest_after_the_start(name):
    """The recorded step of lowest train accuracy, step 0 left out; ties go to the earliest."""
    found = records(name)
    return int(found["step"][1:][found["accuracy"][1:].argmin()])


def select(**keys):
    """-> (folder of the selection, what select.py printed)"""
    return run(load_select().main, "select.py", **keys)


def evaluated(model, same, **keys):
    """The accuracy of a model folder on the unseen problems."""
    sampling = dict(max_new_tokens=same["max_new_tokens"], seed=same["seed"], **keys)
    results, _ = run(
        evaluation.main, "eval.py", model=str(model), data=same["eval_data"], **sampling
    )
    [(summary, _)] = results.values()
    return summary["accuracy"]


def own_answers(student, same, name, **keys):
    """Let the student answer the teacher's problems -> the data folder of its answers."""
    folder = str(Path(same["data"]).with_name(name))
    sampling = dict(max_new_tokens=same["max_new_tokens"], seed=same["seed"], **keys)
    file = f"{folder}.jsonl"
    run(own.main, "own.py", model=student, data=same["data"], out=file, **sampling)
    rendered = dict(template="none", verifier="toy")
    run(data.main, "data.py", source=file, tokenizer=student, out=folder, **rendered)
    return folder


# --------------------------------------------------------------------------------------------------
# The table


def note(table, name, accuracies):
    """Add a student's accuracies to a row, and print them."""
    row = table.setdefault(name, {"final": [], "lowest": []})
    row["final"].append(float(accuracies[-1]))
    row["lowest"].append(float(min(accuracies)))
    print(f"  {name}: " + " ".join(f"{a:.2f}" for a in accuracies), flush=True)


def show(rows, seeds):
    """Print the rows: mean and standard deviation over students, and each row against SFT."""
    print(f"\naccuracy on unseen problems, mean ± standard deviation over {len(seeds)} students")
    print(f"{'':12}{'final':>15}{'lowest recorded':>18}")
    for row in rows:
        cells = []
        for key in ("final", "lowest"):
            spread = np.std(row[key], ddof=min(1, len(seeds) - 1))
            cells.append(f"{np.mean(row[key]):.2f} ± {spread:.2f}")
        print(f"{row['name']:12}{cells[0]:>15}{cells[1]:>18}")
    if len(seeds) > 1 and {"base", "sft"} <= {row["name"] for row in rows}:
        differences(rows)


def differences(rows):
    """Print each row against SFT and the base, paired."""
    final = {row["name"]: row["final"] for row in rows}
    print("\ndifference of the final accuracies, the same students, with a 95 % interval")
    print(f"{'':12}{'to SFT':>18}{'to the base':>18}")
    for name in final:
        cells = [difference(final[name], final[other]) for other in ("sft", "base")]
        print(f"{name:12}{cells[0]:>18}{cells[1]:>18}")


def difference(accuracies, others):
    """Mean difference over students and its 95 % interval, as text."""
    mean, half = intervals.few(np.subtract(accuracies, others))
    return f"{mean:+.3f} ± {half:.3f}"


if __name__ == "__main__":
    # these matrices are too small for more threads
    torch.set_num_threads(min(2, torch.get_num_threads()))
    command(main, Config)
