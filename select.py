"""T3S, the selection: how every token's confidence moved up to the bottleneck, and which to train.

    python select.py --run=sft                          # rule t3s: tokens that rose leave the loss
    python select.py --run=sft --kind=force --tau=0.2   # diffusion: tokens that fell are masked
    python select.py --run=sft --rule=random            # a control: as many tokens, at random
    python select.py --run=sft --bottleneck=label_free  # where no answers are known
    python select.py --run=sft --rule=rrt               # no training: three models make a fourth

It reads runs/<run>/trajectory/, which train.py --record_every writes, and makes the folder
runs/<run>/selection/<name>/: mask.npy over the flat token index of the data, stats.json and
config.json. Then train.py --selection=runs/<run>/selection/<name> trains on it.

The paper (arXiv 2601.10348) in three lines, with the names that the code uses:

    c_t(theta) = log p_theta(y_t | y_<t, x)      confidence in response token t, nats
    theta_b    = argmin over recorded steps of train accuracy: the imitation bottleneck
    delta_t    = c_t(theta_b) - c_t(theta_0)     imitation anchors: delta > tau, they rose;
                                                 yet-to-learn tokens: delta < -tau, they fell
Shapes: n response tokens, one example after the other. Next: trajectory.py.
"""

import sys

if __name__ == "select":
    # Python has a module `select` of its own, and an importer of that name (torch, for instance)
    # means that one: find it on the rest of sys.path and stand aside. Interpreters that have it
    # built in never come here. Our own code loads this file with config.load_select().
    import importlib.machinery
    import importlib.util
    import os

    # the real one is no .py file; a folder with a select.py is a copy of this project
    elsewhere = [p for p in sys.path if not os.path.isfile(os.path.join(p, "select.py"))]
    spec = importlib.machinery.PathFinder.find_spec("select", elsewhere)
    if spec is None:
        raise ImportError(f"Python's own module select is not on sys.path; {__file__} is not it")
    sys.modules["select"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["select"])
else:
    # numpy may be the very importer that needs the real `select`, so it is not imported above
    import numpy as np

    from plumbing import selection
    from plumbing.config import InputError, command, require, whole_folder, write_json
    from plumbing.export import FORMATS, check_export, describe_labels, write_labels
    from plumbing.runs import TEMPLATE, load_trajectory, run_folder, run_keys, with_evaluations
    from plumbing.selection import bootstrap_bottleneck, smoothed

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path

# -------------------------------------------------------------------------------------------------
# 1. The bottleneck


def find_bottleneck(curve, smooth=0, what="train accuracy"):
    """{step: train accuracy} -> the step where it is lowest; ties go to the earliest.

    smooth  average with so many recorded neighbours on either side before comparing

    Raises InputError if no step lies below step 0: then there was no shock and is no bottleneck.
    """
    if 0 not in curve:
        raise InputError(
            "step 0 was not recorded, so no change of confidence is known; "
            "train with --record_every"
        )
    steps = sorted(curve)
    # an accuracy of few problems is noisy, and the lowest of noisy points is often mere bad luck
    values = smoothed([curve[step] for step in steps], smooth)
    lowest = int(values.argmin())
    # without a fall, theta_b would be theta_0 and every delta 0; written so that nan is refused too
    if not values[lowest] < values[0]:
        raise InputError(
            f"{what} never fell below the {values[0]:.3f} of step 0: there is no bottleneck "
            "(train longer or with a higher lr, or name a checkpoint with --bottleneck=STEP)"
        )
    return steps[lowest]


def falls(trajectory, response, response_spans):
    """How far the falling tokens have fallen: {step: (examples,) nats, summed over each response}.

    Per response token that is the label-free curve:

        D_s = mean over response tokens of min(0, c_t(theta_s) - c_t(theta_0))
    """
    # Not in the paper, which needs answers, a verifier and sampling to find its bottleneck. The
    # recorded confidences are there in any case; docs/LOG.md compares the two.
    start = confidence(trajectory, 0, response)
    fallen = {}
    for step in trajectory:
        change = confidence(trajectory, step, response) - start
        # min(0, .): a mean of all changes would hide the fall, since anchors rise by more than the
        # others fall. One sum per example, because examples are what the bootstrap draws
        fallen[step] = np.add.reduceat(np.minimum(0, change), response_spans[:, 0])
    return fallen


def find_label_free_bottleneck(curve, smooth=0):
    """{step: D_s} -> the step where it is lowest; ties go to the earliest.

    Raises InputError if nothing fell, or if the last recorded step is the lowest.
    """
    lowest = find_bottleneck(curve, smooth, "confidence")
    # some token loses in every training, so D always falls: only a curve that turns has passed one
    if lowest == max(curve):
        raise InputError(
            f"confidence was still falling at step {lowest}, the last one recorded: no bottleneck "
            f"was passed (train longer, or take this step with --bottleneck={lowest})"
        )
    return lowest


# -------------------------------------------------------------------------------------------------
# 2. The rule
#
# rule(moved, start, response_spans, rng) -> (n,) bool, True: the token leaves the loss (kind keep),
# or is always masked (kind force). Or (n,) floats: its weight in the loss, where 0 leaves.
#
#   moved           (n,) bool, what T3S takes: the imitation anchors (keep), the yet-to-learn tokens (force)
#   start           (n,) confidence at step 0, nats
#   response_spans  (examples, 2) first and last + 1 of each response, in these arrays
#   rng             numpy generator, seeded with --seed
#
# A control asks: is it these tokens, or would as many others do? So each but dft takes as many as
# T3S does (`moved.sum()`), and differs in nothing but the choice.
#
# A new rule is a function and its line in RULES, for both kinds of student: a weight of 0.3 on the
# anchors is `np.where(moved, 0.3, 1.0)`. What else a rule may ask for, by name after a *:
#
#   gain     (n,) what T3S ranks by: the rise of confidence (keep) or its fall (force), nats
#   low      (n,) confidence at the bottleneck, nats
#   entropy  (n,) of the student's distribution there, nats
#   ids      (n,) token ids


def t3s(moved, start, response_spans, rng):
    """Paper, 4.1: all imitation anchors leave the loss; all yet-to-learn tokens are masked."""
    # why the two groups apart: their gradients oppose each other, and the anchors' dominate early
    return moved


def random(moved, start, response_spans, rng):
    """Control: as many tokens of each example as T3S takes there."""
    # shuffled within the example, or a control would also change how much each example counts
    return np.concatenate([rng.permutation(moved[a:b]) for a, b in response_spans])


def random_file(moved, start, response_spans, rng):
    """Control: as many tokens of the whole file."""
    return rng.permutation(moved)


def static_high(moved, start, response_spans, rng):
    """Control: as many tokens, the most confident ones at step 0."""
    # if this did as well, pass 1 and its trajectory could be saved: one forward pass is enough
    return highest(start, moved.sum())


def static_low(moved, start, response_spans, rng):
    """Control: as many tokens, the least confident ones at step 0."""
    return highest(-start, moved.sum())


def matched_random(moved, start, response_spans, rng, *, ids):
    """Control: the same token identities as T3S takes, at other positions."""
    # anchors are often connectives: if this did as well, a list of words could replace the method
    chosen = np.zeros_like(moved)
    for token in np.unique(ids):
        places = np.flatnonzero(ids == token)
        chosen[places] = rng.permutation(moved[places])
    return chosen


def retrospective(moved, start, response_spans, rng, *, gain):
    """Control: as many tokens from the other end of T3S's ranking."""
    # ssToken keeps what rose: the same signal with the opposite sign
    return highest(-gain, moved.sum())


def loss_high(moved, start, response_spans, rng, *, low):
    """Control: as many tokens, those with the highest loss at the bottleneck."""
    return highest(-low, moved.sum())


def loss_low(moved, start, response_spans, rng, *, low):
    """Control: the lowest loss; as a keep rule, the highest losses are what is trained on."""
    return highest(low, moved.sum())


def entropy_high(moved, start, response_spans, rng, *, entropy):
    """Control: as many tokens, those where the student is most undecided at the bottleneck."""
    return highest(entropy, moved.sum())


def entropy_low(moved, start, response_spans, rng, *, entropy):
    """Control: the most decided; as a keep rule, the forking tokens are what is trained on."""
    return highest(-entropy, moved.sum())


def kinds(moved, start, response_spans, rng, *, gain, ids):
    """Not the paper's: of the tokens that moved, those of a kind that moves more than most.

    A kind is all positions of one token id. A mannerism ("Wait", " let", " me") is a surprise
    wherever it stands, so its kind rises; what the teacher knows and the student does not is a
    digit here and there, while most digits are no surprise: its kind hardly moves, and it stays.
    """
    _, kind = np.unique(ids, return_inverse=True)
    mean = np.bincount(kind, gain) / np.bincount(kind)
    return moved & (mean[kind] > gain.mean())


def kinds_random(moved, start, response_spans, rng, *, gain, ids):
    """Control: as many tokens of each example as `kinds` takes there."""
    taken = kinds(moved, start, response_spans, rng, gain=gain, ids=ids)
    return random(taken, start, response_spans, rng)


def kinds_low(moved, start, response_spans, rng, *, gain, ids):
    """Control: as many tokens as `kinds` takes, the least confident ones at step 0."""
    taken = kinds(moved, start, response_spans, rng, gain=gain, ids=ids)
    return highest(-start, taken.sum())


def dft(moved, start, response_spans, rng):
    """Control: weight = probability at step 0, after DFT (arXiv 2508.05629)."""
    # DFT's own weight follows the student as it learns; a mask on disk can only hold the start
    return np.exp(start).astype(np.float32)


RULES = {
    "t3s": t3s,
    "random": random,
    "random_file": random_file,
    "matched_random": matched_random,
    "static_high": static_high,
    "static_low": static_low,
    "retrospective": retrospective,
    "loss_high": loss_high,
    "loss_low": loss_low,
    "entropy_high": entropy_high,
    "entropy_low": entropy_low,
    "kinds": kinds,
    "kinds_random": kinds_random,
    "kinds_low": kinds_low,
    "dft": dft,
}


def choose(rule, kind, delta, start, response_spans, tau=0.0, seed=0, **recorded):
    """The selection: (n,) bool, what stays in the loss (keep) or is always masked (force); of a rule
    that gives weights (n,) float32, the weight of each token in the loss.

    delta     (n,) change of confidence from step 0 to the bottleneck, nats
    recorded  ids, entropy: what some rules ask for

    `all` selects every token; `inverse` the imitation anchors and only them. The others are RULES.
    """
    # tokens within tau either side belong to neither: they stay in the loss, and are not forced
    rose, fell = delta > tau, delta < -tau  # imitation anchors, yet-to-learn tokens
    # the paper's counter-test: a student trained on nothing but anchors collapses
    if rule == "inverse":
        return rose
    # as a keep rule this is pass 1 again, bit for bit: so a selection changes nothing else
    if rule == "all":
        return np.ones(len(delta), dtype=bool)
    if rule not in RULES:
        raise InputError(f"--rule={rule}: must be {', '.join([*RULES, 'inverse', 'all', 'rrt'])}")
    recorded |= {"gain": delta if kind == "keep" else -delta, "low": start + delta}
    # a rule is handed what its signature names and no more, so a new one changes no other
    more = {name: recorded[name] for name in asked_for(rule, recorded)}
    rng = np.random.default_rng(seed)
    moved = RULES[rule](rose if kind == "keep" else fell, start, response_spans, rng, **more)
    if np.issubdtype(moved.dtype, np.floating):
        if kind == "force":
            raise InputError(f"--rule={rule}: gives weights, which only --kind=keep can use")
        return moved.astype(np.float32)  # weights say what stays, so there is nothing to turn round
    if moved.dtype != bool or moved.shape != delta.shape:
        raise InputError(
            f"--rule={rule}: must return bool or floats, one per response token; "
            f"it returned {moved.dtype} of shape {moved.shape}"
        )
    # the one place that knows the polarity: what a rule takes leaves the loss (keep), or is masked
    return ~moved if kind == "keep" else moved


def asked_for(rule, recorded):
    """The names after the * of a rule. Raises InputError if one was not recorded."""
    parameters = inspect.signature(RULES[rule]).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in names:
        if name not in recorded:
            raise InputError(f"--rule={rule}: needs {name}, which this trajectory does not hold")
    return names


def highest(score, count):
    """(n,) -> (n,) bool, the `count` highest scores; ties go to the earliest."""
    chosen = np.zeros(len(score), dtype=bool)
    # stable, so that ties (sure tokens have exactly 0 nats) fall alike on every machine
    chosen[np.argsort(-score, kind="stable")[:count]] = True
    return chosen


def tau_of_share(delta, share, kind):
    """The tau >= 0 whose share of anchors (keep) or yet-to-learn tokens (force) is nearest."""
    size = np.sort(delta if kind == "keep" else -delta)[::-1]  # tokens with size > tau are taken
    # a larger share would need a tau below 0, hence anchors whose confidence fell
    reachable = float((size > 0).mean())
    if not 0 < share <= reachable:
        raise InputError(
            f"--share={share}: must be above 0 and at most {reachable:.4f}, the share of --tau=0"
        )
    place = min(len(size) - 1, round(share * len(size)))
    return float(max(0.0, size[place]))


# -------------------------------------------------------------------------------------------------
# 3. The command


@dataclass
class Config:
    run: str = ""  # the run whose trajectory decides: runs/<run>
    rule: str = "t3s"  # t3s, inverse, all, rrt (writes a model), or a control in RULES
    kind: str = "keep"  # keep: what stays in the loss; force: what is masked (diffusion only)
    tau: float = 0.0  # anchors have delta > tau, yet-to-learn tokens delta < -tau
    share: float = 0.0  # instead of tau: the share of anchors (keep) or yet-to-learn tokens (force)
    bottleneck: str = "accuracy"  # lowest train accuracy; or label_free; or a recorded step
    accuracy: str = "recorded"  # by train.py; eval: of eval.py's answers, to stored checkpoints
    smooth: int = 0  # average that curve with so many neighbours on either side first
    name: str = ""  # folder in runs/<run>/selection/; default: the rule (and the student)
    seed: int = 0  # of the random rules
    show: int = 2  # examples to print
    student: str = ""  # the model to train on the selection, if it is not the run's own
    data: str = ""  # its data folder, if it is not the run's own; the tokens must be the same
    export: str = ""  # labels: write the selection for other trainers too (plumbing/export.py)
    export_format: str = "jsonl"  # or parquet


def main(**given):
    """Write the selection (for rrt a model) and print what it is -> its folder.

    Raises InputError for keys, trajectories or data that cannot work; then nothing is written.
    """
    cfg, home, out = resolve(given)
    trained, trajectory = run_keys(home), load_trajectory(cfg.run)
    train_set, tokenizer = selection.load_inputs(cfg, trained, trajectory)
    if cfg.accuracy == "eval":
        trajectory = with_evaluations(cfg.run, trajectory, train_set)
    response = train_set.response_mask()
    response_spans = locate_responses(train_set)
    curves = bottleneck_curves(trajectory, response, response_spans, cfg.smooth)
    step = pick_bottleneck(cfg, curves)
    if cfg.rule == "rrt":  # it moves weights, not tokens: there is nothing to select
        return selection.write_rrt(home, trained, step, out)

    start = confidence(trajectory, 0, response)
    delta = confidence(trajectory, step, response) - start
    # tau is in nats and its effect differs from student to student; a share can be compared
    tau = tau_of_share(delta, cfg.share, cfg.kind) if cfg.share else cfg.tau
    ids = train_set.tokens[response]
    recorded = {"ids": ids}
    if "entropy" in trajectory[step]:
        recorded["entropy"] = trajectory[step]["entropy"][response]
    picked = choose(cfg.rule, cfg.kind, delta, start, response_spans, tau, cfg.seed, **recorded)
    if not picked.any():
        raise InputError(
            f"--rule={cfg.rule} --tau={tau:g} selects no token at all; nothing written"
        )
    # over all tokens of the data, prompts too (0), so that a batch can slice it with the same spans
    mask = np.zeros(len(train_set.tokens), dtype=picked.dtype)
    mask[response] = picked

    found = {"bottleneck_step": step, "tau": tau}
    tokens = selection.token_statistics(tokenizer, ids, delta, picked, tau, response_spans)
    stats = {**found, **curves, **tokens}
    origin = {"model": trained["model"], "sha256": train_set.sha256, "command": sys.argv}
    made = {**asdict(cfg), **found, **origin, "tokenizer_hash": tokenizer.hash}
    made |= {key: train_set.meta.get(key) for key in TEMPLATE}
    write(cfg, out, train_set, mask, stats, made)
    selection.report(cfg, stats, out)
    if cfg.export:
        describe_labels(out / f"labels.{cfg.export_format}", train_set, mask)
    selection.show_examples(cfg, train_set, tokenizer, response_spans, picked, delta)
    return out


def write(cfg, out, train_set, mask, stats, made):
    """Make the selection's folder. made: what it was made from and how."""
    # all files or none: a mask without its config.json could be trained on by mistake
    with whole_folder(out) as aside:
        np.save(aside / "mask.npy", mask)
        write_json(aside / "stats.json", stats)
        write_json(aside / "config.json", made)
        if cfg.export:
            write_labels(aside, train_set, mask, cfg.export_format)


def resolve(given):
    """The keys given -> Config, the folder of the run, the folder to write."""
    cfg = Config(**given)
    if not cfg.run:
        raise InputError("--run is missing (--help lists the keys)")
    require(cfg, kind=("keep", "force"), tau=(0, None), seed=(0, None), smooth=(0, None))
    require(cfg, rule=(*RULES, "inverse", "all", "rrt"))  # a typo costs nothing: nothing was read
    require(cfg, show=(0, None), export_format=FORMATS, accuracy=("recorded", "eval"))
    check_export(cfg)
    cfg.bottleneck = str(cfg.bottleneck)  # a notebook may well pass a number
    home = run_folder(cfg.run)
    name = cfg.name or cfg.rule + (f"-for-{Path(cfg.student).name}" if cfg.student else "")
    # it is joined to a path, and whatever lies there is replaced
    if Path(name).name != name or name == "..":
        raise InputError(f"--name={name}: must be a plain name, of a folder in {home}/selection")
    return cfg, home, home / "selection" / name


def locate_responses(train_set):
    """(examples, 2): first and last + 1 of each response, counting response tokens only."""
    last = np.cumsum(train_set.spans[:, 2] - train_set.spans[:, 1])
    return np.stack([np.r_[0, last[:-1]], last], axis=1)


def confidence(trajectory, step, response):
    """c_t(theta_step) of the response tokens: (n,) float64, nats."""
    # stored as float32, which is plenty; but sums over a whole file are taken of these
    return trajectory[step]["logprob"][response].astype(np.float64)


def bottleneck_curves(trajectory, response, response_spans, smooth):
    """Both curves for stats.json: values, the bottleneck that each has, and how certain it is.

    null where no accuracy was recorded (data without answers), or where there is no bottleneck.
    """
    # both, whichever was asked for: they are free once recorded, and their agreement is evidence
    accuracy = {step: float(t["accuracy"]) for step, t in trajectory.items()}
    bootstrap = None
    if np.isnan(list(accuracy.values())).any():
        accuracy = dict.fromkeys(accuracy)  # null: JSON has no nan
    else:
        # --record_problems grades some problems only
        graded = ~np.isnan([t["correct"] for t in trajectory.values()]).any(0)
        correct = {step: t["correct"][graded] for step, t in trajectory.items()}
        bootstrap = bootstrap_bottleneck(correct, smooth=smooth)
    fallen = falls(trajectory, response, response_spans)
    sizes = response_spans[:, 1] - response_spans[:, 0]
    label_free = {step: float(parts.sum() / sizes.sum()) for step, parts in fallen.items()}
    return {
        "accuracy": accuracy,
        "accuracy_bottleneck": or_none(find_bottleneck, accuracy, smooth) if bootstrap else None,
        "bottleneck_bootstrap": bootstrap,
        "label_free": label_free,
        "label_free_bottleneck": or_none(find_label_free_bottleneck, label_free, smooth),
        "label_free_bootstrap": bootstrap_bottleneck(fallen, sizes, smooth),
    }


def or_none(find, curve, smooth):
    """What `find` says of a curve, or None if there is no bottleneck."""
    try:  # an error only if this curve was asked for, and then pick_bottleneck raises it
        return find(curve, smooth)
    except InputError:
        return None


def pick_bottleneck(cfg, curves):
    """--bottleneck -> the step to compare with step 0."""
    if cfg.bottleneck == "label_free":
        return find_label_free_bottleneck(curves["label_free"], cfg.smooth)
    if cfg.bottleneck == "accuracy":
        if curves["bottleneck_bootstrap"] is None:
            raise InputError(
                f"run {cfg.run} recorded no accuracy (the data has no answers); "
                "use --bottleneck=label_free, or name a --bottleneck=STEP"
            )
        return find_bottleneck(curves["accuracy"], cfg.smooth)
    recorded = {str(step): step for step in curves["label_free"]}
    if cfg.bottleneck not in recorded:
        raise InputError(
            f"--bottleneck={cfg.bottleneck}: recorded were {', '.join(recorded)}; "
            "or use accuracy or label_free"
        )
    return recorded[cfg.bottleneck]


if __name__ == "__main__":
    command(main, Config)
