"""Why anchors and the other tokens are not learned together: their gradients, pass 1 looked into.

    python mechanism.py --run=sft                             # all of it: runs/sft/mechanism.json
    python mechanism.py --run=sft --what=gradients            # only this

It reads a run's trajectory and its recorded checkpoints: train.py --record_every=4 --save_every=4.
Checkpoints are whole Hugging Face folders, those of a sharded run too, so one process reads them.
Autoregressive and diffusion students alike; report.py shows the curves.

    confidence     the share of tokens that a checkpoint is less sure of than theta_0 was
    gradients      anchors against the other tokens: ratio of norms, and cosine

Two more experiments need training, a select.py and a train.py each:

    python select.py --run=sft --bottleneck=8 --name=t3s-8    # the bottleneck moved by hand
    python select.py --run=sft --tau=0.2 --name=t3s-0.2       # another threshold
    python train.py --run=t3s-8 --selection=runs/sft/selection/t3s-8

Shapes: B rows, T tokens of a row, k groups of tokens. Next: report.py.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

import model
import train
from batches import micro_batches
from plumbing.config import InputError, command, load_select, require, require_given, write_json
from plumbing.runs import checkpoint, load_trajectory, read_keys, run_folder


@dataclass
class Config:
    run: str = ""  # the run to look into, with a trajectory and its checkpoints: runs/<run>
    what: str = ""  # confidence, gradients; several with commas; default: all
    bottleneck: str = "accuracy"  # where delta is measured, as in select.py
    tau: float = 0.0  # anchors have delta > tau
    draws: int = 4  # diffusion students: random masks of every example
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one


@dataclass
class Pass1:
    """A run, and how its response tokens moved."""

    run: train.Run
    trajectory: dict  # {step: arrays}, as load_trajectory reads it
    low: int  # the bottleneck's step
    delta: np.ndarray  # (n_tokens,) change of confidence up to it, nats; nan at prompts
    tau: float
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


MEASURES = {"confidence": confidence, "gradients": compare_gradients}

# --------------------------------------------------------------------------------------------------
# 2. The loss of a group of tokens, and its gradient


def anchors_and_others(pass1):
    """-> two (n_tokens,) bool arrays: delta > tau, and the rest of the response tokens."""
    response = pass1.run.train_set.response_mask()
    anchors = response & (pass1.delta > pass1.tau)
    if not anchors.any() or anchors[response].all():
        raise InputError(f"--tau={pass1.tau:g}: one of the two groups, anchors and others, is empty")
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
    """Measure, print, write runs/<run>/mechanism.json -> what it holds.

    Raises InputError for a run without trajectory or bottleneck, and if a checkpoint is missing.
    """
    cfg = Config(**given)
    require_given(cfg, "run")
    require(cfg, tau=(0, None), draws=(1, None))
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
    print(out)
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
    run.cfg.anchors = "unscored"  # of diffusion students: a group is scored, the others are noise too
    low, delta = moved(cfg, run.train_set, trajectory)
    draws = cfg.draws if run.shape.is_diffusion else 1
    return Pass1(run, trajectory, low, delta, cfg.tau, draws)


def moved(cfg, train_set, trajectory):
    """-> the bottleneck's step, delta (n_tokens,)"""
    select = load_select()
    if 0 not in trajectory or str(trajectory[0]["sha256"]) != train_set.sha256:
        raise InputError(f"run {cfg.run}: step 0 was not recorded, or on other data than there is now")
    response, spans = train_set.response_mask(), select.response_spans(train_set)
    curves = select.bottleneck_curves(trajectory, response, spans, smooth=0)
    low = select.pick_bottleneck(select.Config(run=cfg.run, bottleneck=cfg.bottleneck), curves)
    return low, trajectory[low]["logprob"] - trajectory[0]["logprob"]


def load_step(pass1, step):
    """Let pass1.run.student be theta_step."""
    run = pass1.run
    path = checkpoint(run.folder, step) if step else run.source
    run.student = model.load(path, run.device)


def show(name, found):
    """Print the curves of a measure: a line per recorded step."""
    print(name)
    print("".join(f"{key:>15}" for key in found))
    for row in zip(*found.values(), strict=True):
        print("".join(f"{value:15d}" if isinstance(value, int) else f"{value:15.3f}" for value in row))


if __name__ == "__main__":
    command(main, Config)
