"""Why are anchors and the other tokens not learned together? Pass 1, looked into.

    python mechanism.py --run=sft                         # all: runs/sft/mechanism.json and .png
    python mechanism.py --run=sft --what=gradients,rrt    # only these

It reads a run's trajectory and its recorded checkpoints: train.py --record_every=4 --save_every=4.
Checkpoints are whole Hugging Face folders, those of a sharded run too, so one process reads them.
Autoregressive and diffusion students alike; report.py shows the curves.

    confidence      the share of tokens that a checkpoint is less sure of than theta_0 was
    gradients       anchors against the other tokens: ratio of norms, and cosine
    interventions   one update on one of the two alone: what does the other one's loss do?
    transfer        the same from theta_0 for several groups, cut by delta: a matrix
    rrt             accuracy along theta_0 + s (theta_f - theta_b); how much of theta_f - theta_b
                    takes back theta_b - theta_0

Two more experiments need training, a select.py and a train.py each:

    python select.py --run=sft --bottleneck=8 --name=t3s-8    # the bottleneck moved by hand
    python select.py --run=sft --tau=0.2 --name=t3s-0.2       # another threshold
    python train.py --run=t3s-8 --selection=runs/sft/selection/t3s-8

Shapes: B rows, T tokens of a row, k groups of tokens. Next: study.py.
"""

import math
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import torch

import eval as evaluation
import intervals
import model
import report
import train
from batches import micro_batches
from plumbing.config import (
    InputError,
    command,
    load_select,
    require,
    require_given,
    write_json,
)
from plumbing.runs import checkpoint, load_trajectory, read_keys, run_folder


@dataclass
class Config:
    run: str = ""  # the run to look into, with a trajectory and its checkpoints: runs/<run>
    what: str = ""  # confidence, gradients, interventions, transfer, rrt; default: all
    bottleneck: str = "accuracy"  # where delta is measured, as in select.py
    tau: float = 0.0  # anchors have delta > tau
    groups: int = 5  # of the transfer: so many, with equally many tokens
    updates: int = 4  # of the transfer, on each group
    draws: int = 4  # diffusion students: random masks of every example
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one


@dataclass
class Pass1:
    """A run, and how its response tokens moved."""

    run: train.Run
    trajectory: dict  # {step: arrays}, as load_trajectory reads it
    low: int  # the bottleneck's step
    delta: np.ndarray  # (n_tokens,) change of confidence up to it, nats; nan at prompts
    cfg: Config
    draws: int  # random masks of every example; 1 for an autoregressive student


# --------------------------------------------------------------------------------------------------
# 1. What is measured: pass1 -> what mechanism.json holds


def confidence(pass1):
    """The share of response tokens below their confidence at step 0, at each recorded step.

    The paper reports 68.5 % after 15 epochs.
    """
    response = pass1.run.train_set.response_mask()
    start = pass1.trajectory[0]["logprob"][response]
    below = []
    for recorded in pass1.trajectory.values():
        below.append(float((recorded["logprob"][response] < start).mean()))
    return {"steps": list(pass1.trajectory), "below_base": below}


def compare_gradients(pass1):
    """Anchors against the other tokens, at each recorded step.

    ratio          of the norms of their parts of SFT's gradient: which one decides the update
    ratio_a_token  of the gradients of their own mean losses: no credit for being many
    cosine         below 0 a small step on either one harms the other

    The paper gives a ratio of 17 early and 2 at the bottleneck, and -0.4 to -0.5 in the crash; the
    notes on it do not say which of the two ratios it is.
    """
    groups = anchors_and_others(pass1)
    anchors, others = (int(group.sum()) for group in groups)
    found = {"steps": list(pass1.trajectory), "ratio": [], "ratio_a_token": [], "cosine": []}
    for step in pass1.trajectory:
        load_step(pass1, step)
        ours, theirs = gradients(pass1, groups)
        norms = math.sqrt(dot(ours, ours)), math.sqrt(dot(theirs, theirs))
        found["ratio"].append(norms[0] / norms[1])
        found["ratio_a_token"].append(norms[0] / norms[1] * others / anchors)
        found["cosine"].append(dot(ours, theirs) / (norms[0] * norms[1]))
    return found


def interventions(pass1):
    """From each recorded step one update on one group alone: the change of both groups' mean loss.

    others_by_anchors: of the others', in nats a token, after an update on the anchors. Above 0 the
    anchors' update harms them. An update is the first one of the run's optimizer, made afresh.
    """
    groups = anchors_and_others(pass1)
    names = ("anchors", "others")
    found = {"steps": list(pass1.trajectory)}
    found |= {f"{of}_by_{by}": [] for by in names for of in names}
    for step in pass1.trajectory:
        load_step(pass1, step)
        changes = transfer(pass1, groups, updates=1)
        for by, row in zip(names, changes, strict=True):
            for of, change in zip(names, row, strict=True):
                found[f"{of}_by_{by}"].append(change)
    return found


def transfer_by_delta(pass1):
    """The loss-transfer matrix, from theta_0: groups of equally many tokens, lowest delta first.

    changes[i][j]: of group j's mean loss, nats a token, after --updates updates on group i alone.
    """
    response = np.flatnonzero(pass1.run.train_set.response_mask())
    order = response[np.argsort(pass1.delta[response], kind="stable")]
    groups = []
    for part in np.array_split(order, pass1.cfg.groups):
        groups.append(np.isin(np.arange(len(pass1.delta)), part))
    load_step(pass1, 0)
    changes = transfer(pass1, groups, pass1.cfg.updates)
    means = [float(pass1.delta[group].mean()) for group in groups]
    return {"updates": pass1.cfg.updates, "mean_delta": means, "changes": changes}


def rrt_path(pass1):
    """Accuracy of theta_0 + s (theta_f - theta_b); select.py --rule=rrt writes the one at s = 1.

    damage is theta_b - theta_0, recovery theta_f - theta_b. projection: how often recovery contains
    the damage (-1: it takes all of it back, and RRT goes as far again on the other side of
    theta_0); cosine: of the angle between them.
    """
    run, last = pass1.run, max(pass1.trajectory)
    if pass1.low == last:
        raise InputError(f"--what=rrt: the bottleneck, step {last}, is the last checkpoint")
    base, low, final = (weights(pass1, step) for step in (0, pass1.low, last))
    recovery = {name: final[name] - low[name] for name in base}
    damage = {name: low[name] - base[name] for name in base}
    along = dot(recovery.values(), damage.values())
    lengths = [dot(one.values(), one.values()) for one in (damage, recovery)]
    found = {"s": list(SCALES), "accuracy": [], "low": [], "high": []}
    for s in SCALES:
        run.student.load_state_dict({name: base[name] + s * recovery[name] for name in base})
        _, rows = evaluate(run)
        mean, ends = intervals.accuracy([[row["correct"]] for row in rows])
        for key, value in zip(("accuracy", "low", "high"), (mean, *ends), strict=True):
            found[key].append(value)
    found["projection"] = along / lengths[0]
    found["cosine"] = along / math.sqrt(lengths[0] * lengths[1])
    return found


SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MEASURES = {
    "confidence": confidence,
    "gradients": compare_gradients,
    "interventions": interventions,
    "transfer": transfer_by_delta,
    "rrt": rrt_path,
}

# --------------------------------------------------------------------------------------------------
# 2. The loss of a group of tokens, and its gradient


def anchors_and_others(pass1):
    """-> two (n_tokens,) bool arrays: delta > tau, and the rest of the response tokens."""
    response = pass1.run.train_set.response_mask()
    anchors = response & (pass1.delta > pass1.cfg.tau)
    if not anchors.any() or anchors[response].all():
        raise InputError(f"--tau={pass1.cfg.tau:g}: there are no anchors, or nothing but anchors")
    return [anchors, response & ~anchors]


def gradients(pass1, groups):
    """Each group's part of the gradient of SFT's loss -> k lists of tensors, one per parameter.

        g_A = d/dtheta  1/n  sum over t in A of  NLL_t,     n: all response tokens

    So the parts of all groups add up to the gradient of an SFT step, before clipping.
    """
    student = pass1.run.student
    parameters = list(student.parameters())
    found = [[torch.zeros_like(p) for p in parameters] for _ in groups]
    batches = batches_of(pass1, groups)
    n = sum(batch["count"] for batch, _ in batches)
    for batch, members in batches:
        nll = weighted_nll(student, batch)
        for own, sums in zip(members, found, strict=True):
            # zeros, not an error, for an expert that none of these tokens was sent to
            how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            parts = torch.autograd.grad((nll * own).sum() / n, parameters, **how)
            torch._foreach_add_(sums, parts)
    return found


def transfer(pass1, groups, updates):
    """(k, k) changes of the groups' mean losses (columns) by updates on one alone (rows), nats.

    From the weights that the student has, which it has again in the end.
    """
    run = pass1.run
    student = run.student
    batches = batches_of(pass1, groups)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    before = losses(student, batches)
    changes = []
    for i in range(len(groups)):
        own = [alone(batch, members[i]) for batch, members in batches]
        optimizer = train.make_optimizer(run.cfg, student)
        for update in range(updates):
            train.train_step(run.cfg, student, optimizer, own, update)
        changes.append((losses(student, batches) - before).tolist())
        student.load_state_dict(start)
    return changes


def alone(batch, own):
    """A batch of which one group is scored, for train.train_step; own (B, T) bool."""
    kept = batch["weights"] * own
    return {**batch, "weights": kept, "count": float(kept.sum(dtype=torch.float64))}


@torch.no_grad()
def losses(student, batches):
    """The mean NLL of each group: (k,) float64."""
    sums = counts = 0.0
    for batch, members in batches:
        nll = weighted_nll(student, batch).double()
        sums += (nll * members).sum((1, 2)).cpu().numpy()
        counts += (batch["weights"].double() * members).sum((1, 2)).cpu().numpy()
    return sums / counts


def weighted_nll(student, batch):
    """(B, T), as train.train_step sums it."""
    positions, attention = batch["positions"], batch["attention"]
    nll = student(batch["ids"], batch["targets"], positions=positions, attention=attention)
    return nll * batch["weights"]


def batches_of(pass1, groups):
    """All examples, once a draw -> [(batch, members)]; members (k, B, T): is it the group's token?

    groups: k arrays (n_tokens,) bool. A diffusion student's noise is the same for all groups. The
    pads that its answers end with, which are in no group, are scored in `batch` only.
    """
    run = pass1.run
    nothing = np.zeros(len(run.train_set.tokens), dtype=bool)
    found = []
    for draw in range(pass1.draws):
        cut = []
        for selected in (None, nothing, *groups):
            run.selected = selected
            cut.append(micro_batches(run, draw))
        for batch, pads, *parts in zip(*cut, strict=True):
            unscored = pads["targets"] == -100
            members = [(part["targets"] != -100) & unscored for part in parts]
            found.append((batch, torch.stack(members)))
    run.selected = None
    return found


def dot(a, b):
    """The inner product of two lists of tensors, summed in float64."""
    products = [(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]
    return float(sum(products))


# --------------------------------------------------------------------------------------------------
# 3. The command


def main(**given):
    """Measure, print, write runs/<run>/mechanism.json and .png -> what the first one holds.

    Raises InputError for a run without trajectory or bottleneck, and if a checkpoint is missing.
    """
    cfg = Config(**given)
    require_given(cfg, "run")
    require(cfg, tau=(0, None), groups=(2, None), updates=(1, None), draws=(1, None))
    wanted = [name for name in cfg.what.split(",") if name] or list(MEASURES)
    for name in wanted:
        if name not in MEASURES:
            raise InputError(f"--what={name}: must be of {', '.join(MEASURES)}")
    pass1 = read_run(cfg)
    found = {"bottleneck_step": pass1.low, "tau": cfg.tau}
    for name in wanted:
        found[name] = MEASURES[name](pass1)
        show(name, found[name])
    out = run_folder(cfg.run) / "mechanism.json"
    write_json(out, found)
    draw(found, out.with_suffix(".png"))
    print(f"{out} and {out.with_suffix('.png')}")
    return found


def read_run(cfg):
    """-> Pass1, all that is needed looked for before anything is computed."""
    folder = run_folder(cfg.run)
    trajectory = load_trajectory(cfg.run)
    missing = [step for step in trajectory if step and not checkpoint(folder, step).is_dir()]
    if missing:
        raise InputError(
            f"{folder / 'checkpoints'}: step {missing[0]} was recorded and its checkpoint not kept "
            "(train with --save_every equal to --record_every)"
        )
    # the whole training set at once, as it is now: what the run did differently does not matter
    plain = {"selection": "", "batch_size": 0, "device": cfg.device, "compile": False}
    run = train.read_inputs(replace(train.Config(**read_keys(folder, train.Config)), **plain))
    run.cfg.anchors = "unscored"  # of diffusion students: not in the group, and noise all the same
    low, delta = moved(cfg, run.train_set, trajectory)
    draws = cfg.draws if run.shape.is_diffusion else 1
    return Pass1(run, trajectory, low, delta, cfg, draws)


def moved(cfg, train_set, trajectory):
    """-> the bottleneck's step, delta (n_tokens,)"""
    select = load_select()
    if 0 not in trajectory or str(trajectory[0]["sha256"]) != train_set.sha256:
        raise InputError(f"run {cfg.run}: step 0 was not recorded, or its data has changed since")
    response, spans = train_set.response_mask(), select.locate_responses(train_set)
    curves = select.bottleneck_curves(trajectory, response, spans, smooth=0)
    low = select.pick_bottleneck(select.Config(run=cfg.run, bottleneck=cfg.bottleneck), curves)
    return low, trajectory[low]["logprob"] - trajectory[0]["logprob"]


def load_step(pass1, step):
    """Let pass1.run.student be theta_step."""
    run = pass1.run
    path = checkpoint(run.folder, step) if step else run.source
    run.student = model.load(path, run.device)


def weights(pass1, step):
    """theta_step as {name: tensor}."""
    load_step(pass1, step)
    return pass1.run.student.state_dict()


def evaluate(run):
    """Answers to the unseen problems, or to the training ones -> accuracy, graded rows."""
    problems = run.eval_set or run.train_set
    batch_size = run.cfg.sample_batch_size
    return evaluation.evaluate(
        run.student, run.tokenizer, problems, run.cfg, batch_size=batch_size
    )


# --------------------------------------------------------------------------------------------------
# 4. Text and picture


def show(name, found):
    """Print a measure: its curves side by side, a line per step (or s); then what is no curve."""
    print(f"\n{name}")
    matrix = found.get("changes", [])
    for mean, row in zip(found.get("mean_delta", []), matrix, strict=True):
        print(f"  updates on delta {mean:+9.4f}:" + "".join(f"{value:+9.4f}" for value in row))
    curves = {key: values for key, values in found.items() if isinstance(values, list)}
    if not matrix:
        print("".join(f"{key:>19}" for key in curves))
        for row in zip(*curves.values(), strict=True):
            print("".join(f"{value:19.4g}" for value in row))
    for key in found.keys() - curves.keys():
        print(f"  {key}: {found[key]:.4g}")


def draw(found, path):
    """A panel for each measure, side by side."""
    panels = [name for name in PANELS if name in found]
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), constrained_layout=True, squeeze=False
    )
    for name, axis in zip(panels, axes[0], strict=True):
        PANELS[name](axis, found[name])
    report.save(fig, path)


def lines(axis, x, found, names):
    """Curves of `found`: {key: label}."""
    for colour, (key, label) in zip(report.COLOURS, names.items(), strict=False):
        report.band(axis, x, np.array([found[key]]), colour, label)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.legend(frameon=False, fontsize=8)


def draw_confidence(axis, found):
    lines(axis, found["steps"], found, {"below_base": "below step 0's confidence"})
    axis.set(title="share of tokens", xlabel="step", ylim=(0, 1))


def draw_gradients(axis, found):
    lines(axis, found["steps"], found, {"ratio": "ratio of norms", "cosine": "cosine"})
    axis.set_yscale("symlog", linthresh=1)  # from a cosine of -1 to a ratio of hundreds
    axis.set(title="gradients, anchors against others", xlabel="step")


def draw_interventions(axis, found):
    names = {"others_by_anchors": "others, by anchors", "anchors_by_others": "anchors, by others"}
    lines(axis, found["steps"], found, names)
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.set(title="change of loss by one update", xlabel="step", ylabel="nats a token")


def draw_transfer(axis, found):
    changes = np.array(found["changes"])
    limit = np.abs(changes).max()
    norm = plt.matplotlib.colors.SymLogNorm(limit / 100, vmin=-limit, vmax=limit)
    axis.imshow(changes, cmap="PuOr", norm=norm)
    for (i, j), value in np.ndenumerate(changes):
        axis.text(j, i, f"{value:+.2g}", ha="center", va="center", fontsize=7)
    names = [f"{mean:+.2g}" for mean in found["mean_delta"]]
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    title = f"change of loss by {found['updates']} updates"
    axis.set(title=title, xlabel="of tokens with mean delta", ylabel="updates on those with")


def draw_rrt(axis, found):
    lines(axis, found["s"], found, {"accuracy": "accuracy"})
    axis.fill_between(found["s"], found["low"], found["high"], color=report.COLOURS[0], alpha=0.15)
    axis.axhline(found["accuracy"][0], color="grey", linestyle=":")
    axis.set(title="theta_0 + s (theta_f - theta_b)", xlabel="s", ylim=(0, 1))


PANELS = {
    "confidence": draw_confidence,
    "gradients": draw_gradients,
    "interventions": draw_interventions,
    "transfer": draw_transfer,
    "rrt": draw_rrt,
}

if __name__ == "__main__":
    command(main, Config)
