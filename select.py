"""T3S, the selection: what every token's confidence did from the start to the bottleneck, and so which tokens to train.

    python select.py --run=sft                          # rule t3s: the tokens whose confidence rose leave the loss
    python select.py --run=sft --kind=force --tau=0.2   # for a diffusion student: those that fell are always masked
    python select.py --run=sft --rule=random            # a control: as many tokens of each example, drawn at random
    python select.py --run=sft --rule=rrt               # no training at all: theta_0 + (theta_final - theta_bottleneck)

It reads runs/<run>/trajectory/ (train.py with --record_every) and writes runs/<run>/selection/<name>/: mask.npy, bool
over the flat token index of the data folder, with config.json and stats.json. Next: train.py --selection=..., eval.py.

    c_t(theta) = log p_theta(y_t | y_<t, x)                theta_b = argmin over checkpoints of train accuracy
    delta_t    = c_t(theta_b) - c_t(theta_0)               (arXiv 2601.10348)
"""

import sys

if __name__ == "select":
    # Python's own module `select` has this file's name. Somebody, torch for instance, wants that one: hand it over.
    # (Where it is built into the interpreter, it is found first and this never runs. Our code uses load_select().)
    import importlib.machinery
    import importlib.util
    import os

    # Python's is no .py file; another copy of this folder on the path has one too, and would send us back here
    elsewhere = [p for p in sys.path if not os.path.isfile(os.path.join(p, "select.py"))]
    spec = importlib.machinery.PathFinder.find_spec("select", elsewhere)
    if spec is None:
        raise ImportError(f"Python's own module select is not on sys.path; {__file__} is not it")
    sys.modules["select"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["select"])
else:
    import numpy as np  # not for the importer above: numpy may be on its way to needing the real one

    from plumbing.config import InputError, command, whole_folder, write_json
    from plumbing.runs import load_trajectory, run_folder, run_keys

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Config:
    run: str = ""  # the run whose trajectory decides: runs/<run>
    rule: str = "t3s"  # t3s, inverse, all, random, random_file, static_high, static_low, or rrt (writes a model)
    kind: str = "keep"  # keep: mask.npy says what stays in the loss (AR); force: what is always masked (diffusion)
    tau: float = 0.0  # anchors have delta > tau, yet-to-learn tokens delta < -tau
    share: float = 0.0  # instead of tau: the share of response tokens to be anchors (keep) or yet-to-learn (force)
    bottleneck: int = -1  # the checkpoint to compare with step 0; -1: the one with the lowest train accuracy
    name: str = ""  # folder in runs/<run>/selection/; default: the rule
    seed: int = 0  # of the random rules
    show: int = 2  # examples to print


# ---------------------------------------------------------------------------------------------------------------------
# The method


def find_bottleneck(accuracy):
    """{step: train accuracy} -> the step with the lowest; of equals the earliest.

    Raises InputError if step 0 was not recorded, or if nothing fell below it: then no checkpoint is a bottleneck.
    """
    if 0 not in accuracy:
        raise InputError("step 0 was not recorded, so no change of confidence is known; train with --record_every")
    lowest = min(sorted(accuracy), key=accuracy.get)
    if not accuracy[lowest] < accuracy[0]:
        raise InputError(f"train accuracy never fell below the {accuracy[0]:.3f} of step 0: there is no bottleneck "
                         "(train longer or with a higher lr, or name a checkpoint with --bottleneck=STEP)")  # fmt: skip
    return lowest


def choose(rule, kind, delta, start, spans, tau=0.0, seed=0):
    """The mask: bool, one per response token.

    delta  (n,) change of confidence of every response token, in the order of the data; nats
    start  (n,) its confidence at step 0, log-probability
    spans  (examples, 2) first and last + 1 of each example's response in those arrays

    t3s          keep: all but the anchors {delta > tau}; force: the yet-to-learn tokens {delta < -tau}  (paper, 4.1)
    inverse      keep or force the anchors only. As a keep rule it has the sign of ssToken's retrospective excess
    all          every response token
    random       as many as t3s takes in each example, drawn at random; random_file: as many as in all of the file
    static_high  as t3s would, had the most confident tokens at step 0 been its choice; static_low: the least confident
    """
    anchors, falling = delta > tau, delta < -tau
    chosen = anchors if kind == "keep" else falling  # what leaves the loss, or is always masked
    rng = np.random.default_rng(seed)
    if rule == "inverse":
        return anchors
    if rule == "all":
        return np.ones(len(delta), dtype=bool)
    if rule == "random":
        chosen = np.concatenate([rng.permutation(chosen[a:b]) for a, b in spans])
    elif rule == "random_file":
        chosen = rng.permutation(chosen)
    elif rule in ("static_high", "static_low"):
        order = np.argsort(-start if rule == "static_high" else start, kind="stable")
        chosen = np.isin(np.arange(len(start)), order[: chosen.sum()])
    elif rule != "t3s":
        raise InputError(f"--rule={rule}: must be t3s, inverse, all, random, random_file, static_high, static_low, rrt")
    return ~chosen if kind == "keep" else chosen


def tau_of_share(delta, share, kind):
    """The tau >= 0 at which the share of anchors (keep) or yet-to-learn tokens (force) comes nearest to `share`."""
    size = np.sort(delta if kind == "keep" else -delta)[::-1]  # tokens with size > tau are chosen
    reachable = float((size > 0).mean())
    if not 0 < share <= reachable:
        raise InputError(f"--share={share}: must be above 0 and at most {reachable:.4f}, the share of --tau=0")
    return float(max(0.0, size[min(len(size) - 1, round(share * len(size)))]))


def recover_residual(base, bottleneck, final, out):
    """RRT, Recovering Residual Transfer: theta_0 + (theta_f - theta_b), the updates after the bottleneck only.

    Four Hugging Face folders, the last one written. In float32, one shard of `final` in memory at a time.
    """
    import shutil

    from hf.weights import open_weights, weight_files, write_weights

    files = [weight_files(folder) for folder in (base, bottleneck, final)]
    with whole_folder(out) as aside:
        for shard in sorted(set(files[2].values())):
            tensors = {}
            for name in (n for n, path in files[2].items() if path == shard):
                if not all(name in f for f in files):
                    raise InputError(f"{base} or {bottleneck}: the tensor {name} of {final} is missing")
                start, low, end = (open_weights(f[name]).get_tensor(name).float() for f in files)
                tensors[name] = start + (end - low)
            write_weights(tensors, aside / shard.name)
        for path in Path(final).iterdir():
            if path.suffix != ".safetensors":
                shutil.copyfile(path, aside / path.name)


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories and masks on disk






# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def bootstrap_bottleneck(correct, draws=1000):
    """How sure is the argmin? {step: correct (examples,)} -> {step: share of resamplings in which it is lowest}."""
    steps = sorted(correct)
    table = np.stack([correct[s] for s in steps])  # (steps, examples)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(table.shape[1], np.full(table.shape[1], 1 / table.shape[1]), size=draws)
    lowest = (weights @ table.T).argmin(1)  # ties: the earliest, as in find_bottleneck
    return {steps[i]: n / draws for i, n in sorted(Counter(lowest.tolist()).items())}


def token_table(ids, delta, chosen, top=15):
    """The most frequent chosen tokens -> [(id, times chosen, times seen, mean delta)]: the paper's word clouds."""
    seen, times = Counter(ids.tolist()), Counter(ids[chosen].tolist())
    return [(i, n, seen[i], float(delta[ids == i].mean())) for i, n in times.most_common(top)]


def tau_sweep(delta):
    """Share of anchors and of yet-to-learn tokens at each tau; needs no forward pass."""
    taus = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
    return [{"tau": t, "anchors": float((delta > t).mean()), "yet_to_learn": float((delta < -t).mean())} for t in taus]


def statistics(trajectory, tokenizer, ids, delta, picked, tau, spans):
    """What stats.json says of a selection. ids, delta, picked: (n,), of every response token; spans as in choose.

    accuracy and bottleneck_bootstrap are null where none was recorded (data without answers).
    """
    anchors, falling = delta > tau, delta < -tau
    accuracy = {s: None if np.isnan(t["accuracy"]) else float(t["accuracy"]) for s, t in trajectory.items()}
    stats = {
        "response_tokens": len(picked), "selected": int(picked.sum()), "share": float(picked.mean()),
        "anchors": float(anchors.mean()), "yet_to_learn": float(falling.mean()), "accuracy": accuracy,
        "examples_without_any": int((np.add.reduceat(picked, spans[:, 0]) == 0).sum()),
        "bottleneck_bootstrap": None if None in accuracy.values() else bootstrap_bottleneck(
            {s: t["correct"] for s, t in trajectory.items()}),
        "tau_sweep": tau_sweep(delta),
    }  # fmt: skip
    for key, chosen in (("anchor_tokens", anchors), ("yet_to_learn_tokens", falling)):
        stats[key] = [{"token": tokenizer.decode([i]), "id": i, "count": n, "seen": seen, "mean_delta": mean}
                      for i, n, seen, mean in token_table(ids, delta, chosen)]  # fmt: skip
    return stats


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Write the selection (or, for rrt, the model) and print what it is -> its folder."""
    import data
    from hf.families import local_folder
    from hf.tokenizer import load_tokenizer

    cfg, home, out = resolve(given)
    trained = run_keys(home)
    trajectory = load_trajectory(cfg.run)
    step = pick_bottleneck(cfg, trajectory)
    if cfg.rule == "rrt":
        checkpoints = sorted((home / "checkpoints").glob("[0-9]*"))
        low = home / "checkpoints" / f"{step:06d}"
        if low not in checkpoints:
            raise InputError(f"{low}: this checkpoint was not kept; rrt needs it (train with --save_every)")
        recover_residual(local_folder(trained["model"]), low, checkpoints[-1], out)
        print(f"{out}: theta_0 + (theta_{int(checkpoints[-1].name)} - theta_{step}), a model folder")
        return out

    train_set = data.load(trained["data"])
    if str(trajectory[0]["sha256"]) != train_set.sha256:
        raise InputError(f"{trained['data']}: not the data that run {cfg.run} recorded; it has changed since")
    tokenizer = load_tokenizer(local_folder(trained["model"]))
    response = train_set.response_mask()
    start = trajectory[0]["logprob"][response].astype(np.float64)
    delta = trajectory[step]["logprob"][response].astype(np.float64) - start  # (n response tokens,)
    last = np.cumsum(train_set.spans[:, 2] - train_set.spans[:, 1])
    spans = np.stack([np.r_[0, last[:-1]], last], axis=1)
    tau = tau_of_share(delta, cfg.share, cfg.kind) if cfg.share else cfg.tau
    picked = choose(cfg.rule, cfg.kind, delta, start, spans, tau, cfg.seed)
    if not picked.any():
        raise InputError(f"--rule={cfg.rule} --tau={tau:g} selects no token at all; nothing written")
    mask = np.zeros(len(train_set.tokens), dtype=bool)
    mask[response] = picked

    stats = {"bottleneck_step": step, "tau": tau, **statistics(
        trajectory, tokenizer, train_set.tokens[response], delta, picked, tau, spans)}  # fmt: skip
    with whole_folder(out) as aside:
        np.save(aside / "mask.npy", mask)
        write_json(aside / "stats.json", stats)
        write_json(aside / "config.json", {
            **asdict(cfg), "tau": tau, "bottleneck_step": step, "model": trained["model"],
            "sha256": train_set.sha256, "tokenizer_hash": tokenizer.hash, "command": sys.argv,
        })  # fmt: skip
    report(cfg, stats, out)
    for i in range(min(cfg.show, len(train_set))):
        a, b = spans[i]
        print(f"\nexample {train_set.examples[i]['id']}:\n{paint(tokenizer, train_set.response(i), picked[a:b])}")
    return out


def resolve(given):
    """The keys given -> Config, the folder of the run, the folder to write."""
    cfg = Config(**given)
    if not cfg.run:
        raise InputError("--run is missing (--help lists the keys)")
    if cfg.kind not in ("keep", "force"):
        raise InputError(f"--kind={cfg.kind}: must be keep or force")
    if cfg.tau < 0:
        raise InputError(f"--tau={cfg.tau}: must not be negative")
    if cfg.seed < 0:
        raise InputError(f"--seed={cfg.seed}: must not be negative")
    name, home = cfg.name or cfg.rule, run_folder(cfg.run)
    if Path(name).name != name or name == "..":
        raise InputError(f"--name={name}: must be a plain name, of a folder in {home / 'selection'}")
    return cfg, home, home / "selection" / name


def pick_bottleneck(cfg, trajectory):
    if cfg.bottleneck >= 0:
        if cfg.bottleneck not in trajectory or 0 not in trajectory:
            raise InputError(f"--bottleneck={cfg.bottleneck}: recorded were {', '.join(map(str, trajectory))}")
        return cfg.bottleneck
    accuracy = {s: float(t["accuracy"]) for s, t in trajectory.items()}
    if any(np.isnan(a) for a in accuracy.values()):
        raise InputError(f"run {cfg.run} recorded no accuracy (the data has no answers); name a --bottleneck=STEP")
    return find_bottleneck(accuracy)


def report(cfg, stats, out):
    step, accuracy, sure = stats["bottleneck_step"], stats["accuracy"], stats["bottleneck_bootstrap"]
    if sure is None:
        print(f"bottleneck: step {step}, as asked for; no accuracy was recorded (the data has no answers)")
    else:
        print("train accuracy: " + ", ".join(f"{a:.3f} (step {s})" for s, a in accuracy.items()))
        print(f"bottleneck: step {step}; among resampled examples the lowest in "
              + ", ".join(f"{p:.0%} (step {s})" for s, p in sorted(sure.items(), key=lambda x: -x[1])[:3]))  # fmt: skip
    print(f"anchors (delta > {stats['tau']:g}): {stats['anchors']:.1%}, yet-to-learn (delta < -{stats['tau']:g}): "
          f"{stats['yet_to_learn']:.1%} of {stats['response_tokens']:,} response tokens")  # fmt: skip
    for key in ("anchor_tokens", "yet_to_learn_tokens"):
        words = ", ".join(f"{t['token']!r} {t['count']}/{t['seen']}" for t in stats[key][:8])
        print(f"most frequent {key.replace('_', ' ')}: {words}")
    what = "stay in the loss" if cfg.kind == "keep" else "are always masked"
    print(f"{out}: {stats['selected']:,} tokens = {stats['share']:.1%} {what}"
          f"; examples without any: {stats['examples_without_any']}")  # fmt: skip


def paint(tokenizer, ids, picked):
    """Text with the picked tokens green and the others grey; where colour is not wanted the others in ⟦brackets⟧."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    parts, at = [], 0
    while at < len(ids):  # runs of equal fate together: a character may be cut over two tokens
        end = at + 1
        while end < len(ids) and picked[end] == picked[at]:
            end += 1
        text = tokenizer.decode(ids[at:end])
        if colour:
            parts.append(f"\x1b[{'32' if picked[at] else '90'}m{text}\x1b[0m")
        else:
            parts.append(text if picked[at] else f"⟦{text}⟧")
        at = end
    return "".join(parts)


if __name__ == "__main__":
    command(main, Config)
