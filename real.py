"""Imitation Shock and T3S on a real pretrained student: every command, with controls, on a laptop.

    make real                           # or: python real.py; SmolLM2-135M-Instruct from the hub
    python real.py --model=FOLDER       # any Hugging Face folder
    python real.py --seeds=1,2,3        # three trainings instead of one

Real are the weights, the tokenizer, the language and the task: reasoning-gym's chain_sum, sums of
three digits. Made are the teacher's traces, right answers in the manner of DeepSeek-R1 ("Okay, so I
need to ... Wait, let me double-check that"), and a few minutes of training before it all, in which
the student learns to answer such sums briefly: zero-shot, a model of this size cannot.

A row of the table is printed as its commands. What is finished is in runs/real/table.json and is
not run again: after Ctrl-C, or a kill, the same command goes on.

Next: mechanism.py.
"""

import json
import random
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import data
import demo
import eval as evaluation
import own
import report
import train
from plumbing.config import InputError, command, load_select, read_json, require, write_json
from plumbing.runs import run_folder


@dataclass
class Config:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a Hugging Face folder or hub id
    seeds: str = "1"  # of the trainings, separated by commas: order of the traces, teacher's words
    dtype: str = "bfloat16"  # of the computation; float32 takes twice as long on many CPUs
    terse_steps: int = 20  # of the training before it all; more of them: a stronger student
    steps: int = 12  # of every other run
    lr: float = 1e-4  # constant
    record_every: int = 2  # steps between two recorded checkpoints of sft and t3s
    traces: int = 128  # of the teacher
    unseen_problems: int = 200  # that the final accuracy is measured on
    record_problems: int = 64  # problems whose answers give the train accuracy


# row -> keys of select.py; both thresholds were fixed before the first run (docs/LOG.md)
SELECTIONS = {
    "t3s": dict(rule="t3s"),
    "t3s-1": dict(rule="t3s", tau=1.0),
    "random": dict(rule="random"),
    "inverse": dict(rule="inverse"),
}
OWN_ANSWERS = {"own-greedy": dict(temperature=0.0), "own-correct": dict(samples=4, correct=True)}
ROWS = ("base", "sft", *SELECTIONS, *OWN_ANSWERS)


def main(**given):
    """Run what is missing, print the table, draw the picture -> the rows, as in table.json."""
    cfg = Config(**given)
    seeds = check(cfg)
    home = run_folder("real")
    table = home / "table.json"
    # what all rows have in common; more seeds can be added later
    common = {key: value for key, value in vars(cfg).items() if key != "seeds"}
    if table.exists() and read_json(table)["config"] != common:
        raise InputError(f"{table}: made with other keys; give those, or move {home} away")
    done = read_json(table)["done"] if table.exists() else {}
    tick = time.time()
    base = student(cfg)
    print(f"theta_0: {base} ({time.time() - tick:.0f} s)", flush=True)
    for seed in seeds:
        for row in ROWS:
            if seed in done.setdefault(row, {}):
                continue
            tick = time.time()
            accuracy = measure(cfg, row, seed, base)
            done[row][seed] = {"accuracy": accuracy, "seconds": round(time.time() - tick)}
            write_json(table, {"config": common, "done": done})
            print(f"  {row} of seed {seed}: {accuracy:.3f} ({done[row][seed]['seconds']} s)", flush=True)
    names = {row: [f"real/{seed}/{row}" for seed in seeds] for row in ("sft", "t3s")}
    report.figure(names, names["sft"], home / "real.png")
    compare(cfg, seeds)
    rows = [{"name": row, "final": [done[row][seed]["accuracy"] for seed in seeds]} for row in ROWS]
    if len(seeds) > 1:
        demo.differences(rows)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(f"\nthe picture: {home / 'real.png'} (memory of this process: {peak:.1f} GiB at most)")
    return rows


def check(cfg):
    """-> the seeds. Raises InputError."""
    require(
        cfg,
        terse_steps=(1, None),
        steps=(1, None),
        record_every=(1, None),
        traces=(1, None),
        unseen_problems=(1, None),
        record_problems=(1, None),
    )
    return demo.check(demo.Config(seeds=cfg.seeds))


# --------------------------------------------------------------------------------------------------
# The task


def problems(n):
    """n different problems -> [(question, answer, the two steps of its solution)]

    Raises InputError where reasoning-gym is missing.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        message = "real.py takes its task from reasoning-gym: pip install reasoning-gym"
        raise InputError(f"{message} ({error})") from error
    keys = dict(min_terms=3, max_terms=3, min_digits=1, max_digits=1, seed=7, size=2 * n)
    found = {}
    for entry in reasoning_gym.create_dataset("chain_sum", **keys):
        found[entry["question"]] = (entry["question"], entry["answer"], solve(entry["question"]))
    assert len(found) >= n, "too few different problems"
    return list(found.values())[:n]


def solve(question):
    """From left to right: "... 3 - 7 + 2 =" -> ["3 - 7 = -4", "-4 + 2 = -2"]"""
    words = re.findall(r"[+-]|\d+", question.split(":")[-1])
    value = int(words[0])
    steps = []
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        result = value + int(sign + number)
        steps.append(f"{value} {sign} {number} = {result}")
        value = result
    return steps


def terse(answer, steps, rng):
    return f"{steps[0]}, {steps[1]}. The answer is {answer}."


def teacher(answer, steps, rng):
    """The same two steps, never wrong, thinking aloud in the manner of DeepSeek-R1."""
    first, second = steps
    parts = [
        (
            "Okay, so I need to figure this out. ",
            "Okay, let me think about this step by step. ",
            "Hmm, let's see. ",
            "Alright, so this is a sum of three numbers. ",
            "Okay, so let me work through this carefully. ",
        ),
        ("First, ", "So first, ", "Let me start from the left: ", "Starting with the first part, "),
        (first,),
        (
            ". ",
            ". Wait, let me double-check that. Yes, that's right. ",
            ". Hmm, that seems right. ",
            f". Let me verify: {first}, yes. ",
            ", okay. ",
        ),
        ("Then, ", "Now, ", "Next, I take that result: ", "So now ", "And after that, "),
        (second,),
        (
            ". ",
            ". Wait, is that correct? Yes, it is. ",
            f". Let me check again: {second}. ",
            ". Hmm, okay. ",
            ". That makes sense. ",
        ),
        (
            f"So the answer is {answer}.",
            f"Therefore, the final answer should be {answer}.",
            f"So I think the answer is {answer}.",
            f"Putting it all together, the answer is {answer}.",
        ),
    ]
    return "".join(map(rng.choice, parts))


def folder(cfg, name, chosen, manner, seed=0):
    """Write problems and responses as jsonl, tokenise them by data.py -> the data folder."""
    out = Path("data/real") / name
    source = out.with_suffix(".jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines = []
    for i, (question, answer, steps) in enumerate(chosen):
        response = manner(answer, steps, rng)
        example = {"id": str(i), "prompt": question, "response": response, "answer": answer}
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


def parts(cfg):
    """The problems of the student's training before it all, of the teacher, and the unseen ones."""
    sizes = (480, cfg.traces, cfg.unseen_problems)
    found = problems(sum(sizes))
    random.Random(0).shuffle(found)
    first, last = sizes[0], sizes[0] + sizes[1]
    return found[:first], found[first:last], found[last:]


def student(cfg):
    """Teach the pretrained model to answer sums briefly -> the folder of theta_0."""
    brief, _, unseen = parts(cfg)
    folder(cfg, "unseen", unseen, terse)
    run(
        train.main,
        "train.py",
        run="real/student",
        model=cfg.model,
        data=folder(cfg, "terse", brief, terse),
        steps=cfg.terse_steps,
        batch_size=32,
        micro_batch_size=32,
        lr=2e-4,
        warmup_steps=3,
        dtype=cfg.dtype,
        resume=True,
    )
    return str(run_folder("real/student") / "checkpoints" / f"{cfg.terse_steps:06d}")


def measure(cfg, row, seed, base):
    """Train a row -> the accuracy of its last checkpoint on the unseen problems."""
    sampling = sampling_keys(seed)
    name = f"real/{seed}/{row}"
    if row in SELECTIONS:
        keys = dict(SELECTIONS[row], run=f"real/{seed}/sft", name=row, seed=int(seed), show=3)
        chosen = run(load_select().main, "select.py", **keys)
        more = {} if row == "t3s" else dict(record_every=0)
        run(train.main, "train.py", run=name, selection=str(chosen), resume=True, **more)
    elif row != "base":
        if row == "sft":
            _, chosen, _ = parts(cfg)
            traces = folder(cfg, f"teacher-{seed}", chosen, teacher, int(seed))
        else:
            traces = own_answers(cfg, row, seed, base, sampling)
        keys = dict(
            data=traces,
            eval_data="data/real/unseen",
            steps=cfg.steps,
            batch_size=32,
            micro_batch_size=32,
            lr=cfg.lr,
            schedule="constant",
            dtype=cfg.dtype,
            record_every=cfg.record_every if row == "sft" else 0,
            record_problems=cfg.record_problems,
            **sampling,
        )
        run(train.main, "train.py", run=name, model=base, resume=True, **keys)
    which = dict(model=base) if row == "base" else dict(run=name)
    [(summary, _)] = evaluated(cfg, seed, **which).values()
    return summary["accuracy"]


def sampling_keys(seed):
    return dict(max_new_tokens=100, seed=int(seed))


def evaluated(cfg, seed, **which):
    """eval.py on the unseen problems; answers that are there already are used again."""
    keys = dict(data="data/real/unseen", dtype=cfg.dtype, **sampling_keys(seed))
    return run(evaluation.main, "eval.py", **which, **keys)


def own_answers(cfg, row, seed, base, sampling):
    """Let the student answer the teacher's problems -> the data folder of its answers."""
    out = f"data/real/{row}-{seed}"
    problems = f"data/real/teacher-{seed}"
    keys = dict(model=base, data=problems, out=f"{out}.jsonl", dtype=cfg.dtype)
    run(own.main, "own.py", **keys, **sampling, **OWN_ANSWERS[row])
    keys = dict(source=f"{out}.jsonl", tokenizer=base, out=out, template="none")
    run(data.main, "data.py", verifier="integer", **keys)
    return out


def compare(cfg, seeds):
    """eval.py's table of each seed, with intervals paired by problem; all answers are there."""
    for seed in seeds:
        runs = ",".join(["base", *(f"real/{seed}/{row}" for row in ROWS[1:])])
        evaluated(cfg, seed, run=runs)


if __name__ == "__main__":
    command(main, Config)
