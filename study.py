"""The study behind docs/CLAIMS.md: T3S and every control, over five students that nobody chose.

    make study                             # or: python study.py; 40 to 60 minutes on two CPU cores
    python study.py --students=21,22       # fewer students
    python study.py --what=probes          # how little SFT does the selection need? ten others

Its plan, written before its first run, is in docs/LOG.md. A row is measured on all students before
the next row begins. What is finished is in runs/study/table.json at once and is never run again:
after Ctrl-C, or a kill, the same command goes on. Students that are missing are pretrained.

    runs/study/21/<row>/     the runs of student 21, made by the commands that are printed
    runs/study/table.json    accuracies on unseen problems, in the end and at their lowest
    runs/study/figures.md    the tables behind docs/CLAIMS.md, with paired intervals of 95 %
    runs/study/*.png         accuracy and loss; gradients; where the bottleneck is put

The probes' are in runs/probes/, with probes.png in place of these pictures.

Next: report.py.
"""

import json
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch

import demo
import mechanism
import report
from plumbing.config import InputError, command, read_json, require, whole_file, write_json
from plumbing.runs import records, run_folder


@dataclass
class Config:
    what: str = "claims"  # or probes: T3S by a pilot's bottleneck, and by probes of few steps
    students: str = ""  # seeds of toy.py, in the world of slips; default: those of the plan


# --------------------------------------------------------------------------------------------------
# The plan

SETTINGS = dict(steps=36, lr=4e-4, record_every=4, unseen_problems=400)
LATER = 12  # steps between two recordings of all rows but sft

# row -> keys of select.py
SELECTIONS = {
    "t3s": dict(rule="t3s"),
    "random": dict(rule="random"),
    "inverse": dict(rule="inverse"),
    "static_low": dict(rule="static_low"),
    "static_high": dict(rule="static_high"),
    "entropy_high": dict(rule="entropy_high"),
    "t3s-label_free": dict(rule="t3s", bottleneck="label_free"),
    "t3s-8": dict(rule="t3s", bottleneck="8"),
    "t3s-36": dict(rule="t3s", bottleneck="36"),
    "retrospective": dict(rule="retrospective"),
    "matched_random": dict(rule="matched_random"),
    "dft": dict(rule="dft"),
}
# does RRT need a longer recovery, or weight decay? row -> keys of train.py, for an SFT of its own
RECOVERIES = {
    "rrt-long": dict(steps=108, record_every=6, save_every=6),
    "rrt-decay": dict(weight_decay=1.0, save_every=4),
}
# everything, in the order in which it is run; base is step 0 of sft
ROWS = (
    *("sft", "base-greedy", "t3s"),
    "mechanism",
    *("random", "inverse", "own-greedy", "static_low", "own-correct", "static_high"),
    *("rrt", "entropy_high", "t3s-label_free", "t3s-8", "t3s-36"),
    *("retrospective", "matched_random", "dft"),
    *("sft-sgd", "t3s-sgd"),
    *RECOVERIES,
    *("sft-long", "t3s-long"),
)
# a row for each probe: train.py --probe, which selects after so many steps and needs no answers
PROBES = (1, 2, 4, 8, 12, 16)
PROBE_ROWS = ("sft", "t3s", "t3s-label_free", "t3s-36", *(f"probe-{steps}" for steps in PROBES))
STUDENTS = {"claims": "21,22,23,24,25", "probes": "41,42,43,44,45,46,47,48,49,50"}
PRIMARY = ("sft", "base", "random", "static_low", "own-greedy")  # t3s minus these
SGD_RATES = (0.1, 0.3, 1.0, 3.0)  # chosen from on student 1, which the study does not count


# --------------------------------------------------------------------------------------------------
# One row of one student


@dataclass
class Student:
    seed: str
    model: str  # the folder of theta_0
    same: dict  # keys of train.py that all its runs share
    home: str = "study"  # of its runs

    def run(self, row):
        return f"{self.home}/{self.seed}/{row}"


def make_student(seed, home="study"):
    """Write a student's world, and pretrain it if it is not there -> Student."""
    cfg = demo.Config(seeds=seed, pretrain=True, **SETTINGS)
    demo.check(cfg)
    folder, same = demo.world(cfg, seed)
    return Student(seed, folder, {**same, "sample_batch_size": cfg.unseen_problems}, home)


def measure(row, student):
    """Run a row on a student -> its accuracies on unseen problems, one per recorded step."""
    same = student.same
    if row == "sft":
        return trained(student, row, model=student.model, save_every=same["record_every"], **same)
    if row == "base-greedy":
        return [demo.evaluated(student.model, same, temperature=0.0)]
    if row == "rrt":
        folder, _ = demo.select(run=student.run("sft"), rule="rrt")
        return [demo.evaluated(folder, same)]
    if row == "mechanism":
        demo.run(mechanism.main, "mechanism.py", run=student.run("sft"))
        return []
    if row in RECOVERIES:
        return recovered(row, student)
    if row == "sft-long":  # the one that rrt-long recovers with
        return recovery("rrt-long", student)
    later = dict(record_every=LATER, save_every=0)
    if row.startswith("probe-"):
        keys = dict(probe=int(row.removeprefix("probe-")))
        return trained(student, row, model=student.model, **{**same, **later, **keys})
    if row in demo.OWN_ANSWERS:
        answers = demo.own_answers(student.model, same, row, **demo.OWN_ANSWERS[row])
        return trained(student, row, model=student.model, **{**same, **later, "data": answers})
    if row == "sft-sgd":
        keys = dict(optimizer="sgd", lr=sgd_rate())
        return trained(student, row, model=student.model, **{**same, **later, **keys})
    selection = run_folder(student.run("sft")) / "selection" / "t3s"
    if row == "t3s-sgd":  # all else equal: the tokens that t3s drops
        keys = dict(optimizer="sgd", lr=sgd_rate())
        return trained(student, row, selection=str(selection), **{**later, **keys})
    if row == "t3s-long":
        keys = dict(steps=RECOVERIES["rrt-long"]["steps"])
        return trained(student, row, selection=str(selection), **{**later, **keys})
    keys = dict(SELECTIONS[row], run=student.run("sft"), seed=int(student.seed), show=0)
    selection, _ = demo.select(**demo.named(row, keys))
    return trained(student, row, selection=str(selection), **later)


def recovered(row, student):
    """RRT from an SFT with keys of its own -> its accuracy at s = 1."""
    recovery(row, student)
    run = student.run(f"{row}-sft")
    found, _ = demo.run(mechanism.main, "mechanism.py", run=run, what="rrt")
    return [found["rrt"]["accuracy"][found["rrt"]["s"].index(1.0)]]


def recovery(row, student):
    """The SFT that a row of RECOVERIES takes -> its accuracies."""
    keys = {**student.same, **RECOVERIES[row]}
    return trained(student, f"{row}-sft", model=student.model, **keys)


def trained(student, row, **keys):
    """As demo.trained; a run that was killed goes on."""
    return demo.trained(student.run(row), resume=True, **keys).tolist()


def sgd_rate():
    """The learning rate with which SFT of the demo's student 1 ends at the lowest loss."""
    losses = {}
    for rate in SGD_RATES:
        name = f"study/sgd-rate/{rate}"
        log = run_folder(name) / "log.jsonl"
        if not log.exists() or last_loss(log)[0] < SETTINGS["steps"]:
            student = make_student("1")
            keys = dict(record_every=0, optimizer="sgd", lr=rate, resume=True)
            same = {**student.same, **keys}
            demo.run(demo.train.main, "train.py", run=name, model=student.model, **same)
        losses[rate] = last_loss(log)[1]
    return min(losses, key=losses.get)


def last_loss(log):
    """-> the last step of a log.jsonl, its loss."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return steps[-1] if steps else (0, None)


# --------------------------------------------------------------------------------------------------
# All of them


def main(**given):
    """Run what is missing, write tables and pictures -> the rows, as in table.json."""
    cfg = Config(**given)
    require(cfg, what=tuple(STUDENTS))
    seeds = demo.check(demo.Config(seeds=cfg.students or STUDENTS[cfg.what]))
    name, rows_wanted = ("study", ROWS) if cfg.what == "claims" else ("probes", PROBE_ROWS)
    home = run_folder(name)
    done = read_json(home / "table.json")["done"] if (home / "table.json").exists() else {}
    students = {}
    planned = [(row, seed) for row in rows_wanted for seed in seeds]
    missing = [(row, seed) for row, seed in planned if seed not in done.get(row, {})]
    for i, (row, seed) in enumerate(missing):
        if seed not in students:
            students[seed] = make_student(seed, name)
        tick = time.time()
        try:
            accuracies = measure(row, students[seed])
        except InputError as error:  # a student may have no bottleneck; the others go on
            print(f"  {row} of student {seed}: not measured: {error}")
            continue
        seconds = round(time.time() - tick, 1)
        note(done, row, seed, accuracies, seconds)
        rows = rows_of(done, seeds)
        write_json(home / "table.json", {"done": done, "rows": rows})
        write_figures(rows, done, seeds, name)  # now, since a long study is often stopped
        left = remaining(done, missing[i + 1 :])
        shown = " ".join(f"{a:.2f}" for a in accuracies)
        at = f"[{i + 1}/{len(missing)}] {row} of student {seed}"
        print(f"  {at}: {shown} ({seconds:.0f} s; about {left / 60:.0f} min left)", flush=True)
    rows = rows_of(done, seeds)
    demo.show(rows, seeds)
    if cfg.what == "claims":
        draw(done, seeds)
    else:
        draw_probes(done, seeds, home / "probes.png")
    print(f"\n{home / 'figures.md'}, {home / 'table.json'} and {home}/*.png")
    return rows


def note(done, row, seed, accuracies, seconds):
    done.setdefault(row, {})[seed] = {"accuracies": accuracies, "seconds": seconds}
    if row == "sft":
        done.setdefault("base", {})[seed] = {"accuracies": accuracies[:1], "seconds": 0.0}


def remaining(done, missing):
    """Seconds: what a row took so far, or, of rows to come, what the others took."""
    took = {row: np.mean([one["seconds"] for one in cells.values()]) for row, cells in done.items()}
    typical = float(np.median([seconds for row, seconds in took.items() if row != "base"]))
    return sum(took.get(row, typical) for row, _ in missing)


def rows_of(done, seeds):
    """The rows that all students have: [{"name", "final", "lowest"}], as demo.py's tables."""
    rows = []
    for name, cells in done.items():
        if name != "mechanism" and all(seed in cells for seed in seeds):
            curves = [cells[seed]["accuracies"] for seed in seeds]
            final = [curve[-1] for curve in curves]
            rows.append({"name": name, "final": final, "lowest": [min(curve) for curve in curves]})
    return rows


# --------------------------------------------------------------------------------------------------
# Tables


def write_figures(rows, done, seeds, home="study"):
    """runs/<home>/figures.md: the rows, * where t3s minus it is primary, and what pass 1 shows."""
    final = {row["name"]: row["final"] for row in rows}
    lines = ["| row | " + " | ".join(seeds) + " | mean | minus sft | minus base | t3s minus it |"]
    lines.append("|---" * (len(seeds) + 5) + "|")
    for name, values in final.items():
        cells = [f"{value:.2f}" for value in [*values, np.mean(values)]]
        pairs = [(values, "sft"), (values, "base")]
        cells += [minus(ours, final.get(other)) for ours, other in pairs]
        cells.append(minus(final.get("t3s"), values))
        star = " *" if name in PRIMARY else ""
        lines.append(f"| {name}{star} | " + " | ".join(cells) + " |")
    lines += ["", "| figure | " + " | ".join(seeds) + " | mean ± 95 % |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    looked = [look(f"{home}/{seed}") if seed in done.get("sft", {}) else {} for seed in seeds]
    for name in max(looked, key=len):
        values = [found[name] for found in looked if name in found]
        cells = [f"{found[name]:.3g}" if name in found else "-" for found in looked]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {minus(values, 0.0)} |")
    path = run_folder(home) / "figures.md"
    with whole_file(path) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def minus(values, others):
    """Mean paired difference and its interval, as text; "" where one of the two is missing."""
    if values is None or others is None or len(values) < 2 or values is others:
        return ""
    return demo.difference(values, others)


def look(home):
    """What a student's pass 1 shows, apart from the rows: {figure: number}."""
    run = run_folder(f"{home}/sft")
    curve = records(f"{home}/sft")
    accuracy, steps = curve["eval_accuracy"], curve["step"].tolist()
    found = {
        "lowest accuracy of SFT minus base": accuracy.min() - accuracy[0],
        "step of the lowest accuracy": steps[accuracy.argmin()],
        "recordings at which the loss rose": int((np.diff(curve["nll"]) > 0).sum()),
    }
    if (run / "selection/t3s/stats.json").exists():
        stats = read_json(run / "selection/t3s/stats.json")
        found["bottleneck by train accuracy, step"] = stats["bottleneck_step"]
        if stats["label_free_bottleneck"] is not None:
            found["label-free bottleneck, step"] = stats["label_free_bottleneck"]
        found["share of anchors"] = stats["anchors"]
        found["share of yet-to-learn tokens"] = stats["yet_to_learn"]
        _, anchors, fell, low = report.bifurcation(f"{home}/sft", run / "selection/t3s")
        at = steps.index(low)
        found["anchors at the bottleneck, nats"] = anchors[at]
        found["yet-to-learn at the bottleneck, 0.001 nats"] = 1000 * fell[at]
        found["yet-to-learn at the end, 0.001 nats"] = 1000 * fell[-1]
    if (run / "mechanism.json").exists():
        found |= look_at_mechanism(read_json(run / "mechanism.json"))
    for row in RECOVERIES:
        path = run_folder(f"{home}/{row}-sft") / "mechanism.json"
        if path.exists():
            found |= look_at_rrt(read_json(path)["rrt"], f"{row}: ")
    return {name: float(value) for name, value in found.items()}


def look_at_mechanism(found):
    gradients = found["gradients"]
    steps = gradients["steps"]
    low = steps.index(found["bottleneck_step"])
    crash = slice(1, low + 1)  # the recordings after step 0, up to the bottleneck
    harm = found["interventions"]["others_by_anchors"]
    back = found["interventions"]["anchors_by_others"]
    changes = found["transfer"]["changes"]
    return {
        "below their base confidence at the bottleneck": found["confidence"]["below_base"][low],
        "below their base confidence at the end": found["confidence"]["below_base"][-1],
        "norm ratio at step 0": gradients["ratio"][0],
        "norm ratio, first recording after it": gradients["ratio"][1],
        "norm ratio at the bottleneck": gradients["ratio"][low],
        "lowest cosine in the crash": min(gradients["cosine"][crash]),
        "mean cosine in the crash": np.mean(gradients["cosine"][crash]),
        "others by an update on anchors, in the crash, 0.001 nats": 1000 * np.mean(harm[crash]),
        "anchors by an update on others, in the crash, 0.001 nats": 1000 * np.mean(back[crash]),
        "lowest group by updates on the highest, 0.001 nats": 1000 * changes[-1][0],
        "highest group by updates on the lowest, 0.001 nats": 1000 * changes[0][-1],
        **look_at_rrt(found["rrt"]),
    }


def look_at_rrt(found, before=""):
    accuracy = found["accuracy"]
    return {
        f"{before}RRT at its best s minus base": max(accuracy[1:]) - accuracy[0],
        f"{before}RRT at s = 1 minus base": accuracy[found["s"].index(1.0)] - accuracy[0],
        f"{before}projection of the recovery on the damage": found["projection"],
        f"{before}cosine of recovery and damage": found["cosine"],
    }


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(done, seeds):
    """Accuracy and loss with the spread over students; gradients; where the bottleneck is put."""
    home = run_folder("study")
    shown = [row for row in ("sft", "t3s", "random", "own-greedy") if row in done]
    complete = [row for row in shown if all(seed in done[row] for seed in seeds)]
    groups = {row: [f"study/{seed}/{row}" for seed in seeds] for row in complete}
    if "sft" in groups:
        report.figure(groups, groups["sft"], home / "study.png")
    made = [run_folder(f"study/{seed}/sft") / "mechanism.json" for seed in seeds]
    if all(path.exists() for path in made):
        draw_gradients([read_json(path)["gradients"] for path in made], home / "gradients.png")
    if all(seed in done.get("t3s-36", {}) for seed in seeds):
        draw_bottlenecks(done, seeds, home / "bottleneck.png")


def draw_gradients(found, path):
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axis, key in zip(axes, ("ratio", "cosine"), strict=True):
        values = np.array([one[key] for one in found])
        report.band(axis, found[0]["steps"], values, report.COLOURS[0], f"{len(values)} students")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=f"gradients of anchors and others: {key}", xlabel="step of pass 1")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_yscale("log")
    report.save(fig, path)


def draw_probes(done, seeds, path):
    """Final accuracy against the length of the probe, beside SFT, the base and T3S by the pilot."""

    def ends(row):
        return [done[row][seed]["accuracies"][-1] for seed in seeds if seed in done.get(row, {})]

    pilot = ("base", "sft", "t3s", "t3s-label_free")
    levels = {row: ends(row) for row in pilot if len(ends(row)) == len(seeds)}
    curve = {steps: ends(f"probe-{steps}") for steps in PROBES}
    curve[SETTINGS["steps"]] = ends("t3s-36")
    whole = {steps: values for steps, values in curve.items() if len(values) == len(seeds)}
    if whole:
        report.draw_probes(whole, levels, path)


def draw_bottlenecks(done, seeds, path):
    """Each student's final accuracy against the step that it was selected at."""
    fig, axis = plt.subplots(figsize=(5, 3.6), constrained_layout=True)
    rows = [row for row, keys in SELECTIONS.items() if keys["rule"] == "t3s" and row in done]
    for colour, seed in zip(report.COLOURS, seeds, strict=False):
        points = []
        for row in rows:
            folder = run_folder(f"study/{seed}/sft") / "selection" / row
            if seed in done[row]:
                step = read_json(folder / "config.json")["bottleneck_step"]
                points.append((step, done[row][seed]["accuracies"][-1]))
        axis.plot(*zip(*sorted(points), strict=True), ".-", color=colour, label=f"student {seed}")
    axis.set(title="final accuracy of T3S", ylim=(0, 1))
    axis.set_xlabel("step that the bottleneck is put at")
    axis.legend(frameon=False, fontsize=8)
    report.save(fig, path)


if __name__ == "__main__":
    # these matrices are too small for more threads
    torch.set_num_threads(min(2, torch.get_num_threads()))
    command(main, Config)
