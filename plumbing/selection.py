"""Around a selection: what it is made from, how certain its bottleneck is, tables, colours.

select.py writes the dicts made here to stats.json and prints the text. Shapes: n response tokens,
one example after the other. No torch at the top. Next: plumbing/export.py.
"""

import codecs
import itertools
import os
import sys
from collections import Counter

import numpy as np

from hf.families import local_folder
from plumbing.config import InputError

# -------------------------------------------------------------------------------------------------
# What it is made from


def load_inputs(cfg, trained, trajectory):
    """The data to select from, checked to be what the run recorded, and its tokenizer.

    cfg: select.py's Config; trained: run_keys. With --student or --data the selection is for
    another model: its tokenizer must give the same tokens, or InputError names the first example
    that differs.
    """
    import data
    from hf.tokenizer import load_tokenizer

    if 0 not in trajectory:
        raise InputError(f"run {cfg.run}: step 0 was not recorded; train with --record_every")
    train_set = data.load(trained["data"])
    if str(trajectory[0]["sha256"]) != train_set.sha256:
        raise InputError(
            f"{trained['data']}: not the data that run {cfg.run} recorded; it has changed since"
        )
    tokenizer = load_tokenizer(local_folder(cfg.student or trained["model"]))
    if cfg.data:
        own, train_set = train_set, data.load(cfg.data)
        check_same_tokens(own, train_set)
    if cfg.student and tokenizer.hash != train_set.meta["tokenizer_hash"]:
        raise InputError(
            f"--student={cfg.student}: has another tokenizer than {train_set.folder}; make its "
            f"data with data.py --tokenizer={cfg.student} and name that folder with --data"
        )
    return train_set, tokenizer


def check_same_tokens(own, other):
    """Raises InputError unless two data folders hold the same tokens, prompts and responses."""
    if len(own) != len(other):
        raise InputError(f"{other.folder}: has {len(other)} examples, and {own.folder} {len(own)}")
    for i, example in enumerate(other.examples):
        for part in ("prompt", "response"):
            here = getattr(own, part)(i)
            there = getattr(other, part)(i)
            if not np.array_equal(here, there):
                raise InputError(
                    f"{other.folder}: the {part} of example {example['id']} has other tokens than "
                    f"in {own.folder}; a selection can only be moved between models whose "
                    "tokenizers and chat templates give the same tokens"
                )


def write_rrt(home, trained, step, out):
    """Write the model theta_0 + (theta_f - theta_b) from the checkpoints of a run -> its folder."""
    from hf.rrt import recover_residual  # needs torch, which selecting does not

    low = home / "checkpoints" / f"{step:06d}"
    kept = sorted((home / "checkpoints").glob("[0-9]*"))
    if low not in kept:
        raise InputError(f"{low}: this checkpoint was not kept; rrt needs it (use --save_every)")
    recover_residual(local_folder(trained["model"]), low, kept[-1], out)
    print(f"{out}: theta_0 + (theta_{int(kept[-1].name)} - theta_{step}), a model folder")
    return out


# -------------------------------------------------------------------------------------------------
# Curves over recorded steps


def smoothed(curves, neighbours):
    """(..., steps) -> the same, every step but the first averaged with its neighbours."""
    curves = np.asarray(curves, dtype=np.float64)
    result = curves.copy()
    # step 0 is the level to fall below: averaging it with the fall would hide the fall
    for i in range(1, curves.shape[-1]):
        first = max(1, i - neighbours)
        result[..., i] = curves[..., first : i + neighbours + 1].mean(-1)
    return result


def bootstrap_bottleneck(parts, sizes=None, smooth=0, draws=1000):
    """How certain is the lowest point? -> {step: share of resamplings in which it is the lowest}.

    parts  {step: (examples,)} what each example adds to the curve sum(parts) / sum(sizes)
    sizes  (examples,); default 1 each

    Examples are drawn with replacement; ties go to the earliest step, as in find_bottleneck.
    """
    steps = sorted(parts)
    table = np.stack([parts[step] for step in steps], axis=1)  # (examples, steps)
    n = len(table)
    if sizes is None:
        sizes = np.ones(n)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, examples): how often each
    curves = drawn @ table / (drawn @ sizes)[:, None]
    lowest = Counter(smoothed(curves, smooth).argmin(1).tolist())
    return {steps[i]: times / draws for i, times in sorted(lowest.items())}


# -------------------------------------------------------------------------------------------------
# Tokens


def token_statistics(tokenizer, ids, delta, picked, tau, response_spans):
    """Counts, shares and token tables for stats.json.

    ids, delta, picked  (n,) of every response token; picked may be weights
    response_spans      (examples, 2) first and last + 1 of each example's response
    """
    anchors = delta > tau
    yet_to_learn = delta < -tau
    chosen = picked > 0
    weights = None  # least, mean and greatest, of a selection that is no mask
    if picked.dtype != bool:
        weights = [float(picked.min()), float(picked.mean()), float(picked.max())]
    return {
        "response_tokens": len(picked),
        "selected": int(chosen.sum()),
        "share": float(chosen.mean()),
        "weights": weights,
        "anchors": float(anchors.mean()),
        "yet_to_learn": float(yet_to_learn.mean()),
        "examples_without_any": int((np.add.reduceat(chosen, response_spans[:, 0]) == 0).sum()),
        "tau_sweep": tau_sweep(delta),
        "anchor_tokens": token_table(tokenizer, ids, delta, anchors),
        "yet_to_learn_tokens": token_table(tokenizer, ids, delta, yet_to_learn),
    }


def token_table(tokenizer, ids, delta, group, top=15):
    """The most frequent tokens of a group, as in the paper's word clouds.

    group  (n,) bool
    -> [{token, id, count: times in the group, seen: times in all, mean_delta: over all of them}]
    """
    seen = Counter(ids.tolist())
    rows = []
    for token, count in Counter(ids[group].tolist()).most_common(top):
        row = {"token": tokenizer.decode([token]), "id": token, "count": count}
        rows.append({**row, "seen": seen[token], "mean_delta": float(delta[ids == token].mean())})
    return rows


def tau_sweep(delta):
    """Share of anchors and of yet-to-learn tokens at each tau; needs no forward pass."""
    rows = []
    for tau in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0):
        anchors = float((delta > tau).mean())
        yet_to_learn = float((delta < -tau).mean())
        rows.append({"tau": tau, "anchors": anchors, "yet_to_learn": yet_to_learn})
    return rows


# -------------------------------------------------------------------------------------------------
# The screen


def report(cfg, stats, out):
    """Print which bottleneck, how many tokens, which ones. cfg: select.py's Config."""
    print_curve("train accuracy", stats["accuracy"], stats["bottleneck_bootstrap"])
    label_free = stats["label_free"], stats["label_free_bootstrap"]
    print_curve("label-free curve D (nats)", *label_free, form=".4f")
    found = {key: stats[f"{key}_bottleneck"] for key in ("accuracy", "label_free")}
    by = f"by {cfg.bottleneck}" if cfg.bottleneck in found else "as asked for"
    names = {key: "none" if step is None else f"step {step}" for key, step in found.items()}
    shown = ", ".join(f"by {key}: {name}" for key, name in names.items())
    print(f"bottleneck: step {stats['bottleneck_step']}, {by} ({shown})")
    print(
        f"anchors (delta > {stats['tau']:g}): {stats['anchors']:.1%}, "
        f"yet-to-learn (delta < -{stats['tau']:g}): {stats['yet_to_learn']:.1%} "
        f"of {stats['response_tokens']:,} response tokens"
    )
    for key in ("anchor_tokens", "yet_to_learn_tokens"):
        words = [f"{row['token']!r} {row['count']}/{row['seen']}" for row in stats[key][:8]]
        print(f"most frequent {key.replace('_', ' ')}: {', '.join(words)}")
    what = "stay in the loss" if cfg.kind == "keep" else "are always masked"
    if stats["weights"]:
        least, mean, most = stats["weights"]
        what += f", with weights from {least:.2f} to {most:.2f}, {mean:.2f} on average"
    print(
        f"{out}: {stats['selected']:,} tokens = {stats['share']:.1%} {what}; "
        f"examples without any: {stats['examples_without_any']}"
    )


def print_curve(name, values, bootstrap, form=".3f"):
    """One line: the values, and where the lowest lies when the examples are resampled."""
    if bootstrap is None:
        print(f"{name}: no accuracy was recorded (none was asked for, or the data has no answers)")
        return
    shown = ", ".join(f"{value:{form}} (step {step})" for step, value in values.items())
    likeliest = sorted(bootstrap.items(), key=lambda item: -item[1])[:3]
    certain = ", ".join(f"{share:.0%} (step {step})" for step, share in likeliest)
    print(f"{name}: {shown}; among resampled examples the lowest in {certain}")


def token_texts(tokenizer, ids):
    """One text per token. A character cut over several tokens belongs to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    unknown = "\ufffd".encode()
    texts = [decoder.decode(tokenizer.bytes_of.get(int(i), unknown)) for i in ids]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


# nats from which each shade begins, and 256-colour backgrounds: blue rose, orange fell. The ink on
# them is set too, so that they can be read on a dark and on a light terminal
SHADES = (0.01, 0.05, 0.2, 0.5, 2.0)
ROSE = (195, 153, 117, 75, 39)
FELL = (230, 223, 222, 215, 208)


def show_examples(cfg, train_set, tokenizer, response_spans, picked, delta):
    """Print the first cfg.show responses. response_spans (examples, 2), as for a rule of select.py."""
    if cfg.show:
        print(explain_colours(cfg.kind))
    for i in range(min(cfg.show, len(train_set))):
        a, b = response_spans[i]
        text = paint(tokenizer, train_set.response(i), picked[a:b] > 0, delta[a:b], cfg.kind)
        print(f"example {train_set.examples[i]['id']}:\n{text}\n")


def paint(tokenizer, ids, picked, delta, kind="keep"):
    """An example's text for the screen: shades by delta, and what the selection does to each token.

    ids, picked, delta  (n,) of the response. On a terminal a token that leaves the loss is struck
    through (keep), one that is always masked is underlined (force). Where colours are not
    wanted, tokens that are not picked stand in ⟦⟧.
    """
    texts = token_texts(tokenizer, ids)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if colour:
        styles = [style(p, d, kind) for p, d in zip(picked, delta, strict=True)]
    else:
        styles = ["" if p else "out" for p in picked]
    parts = []
    # tokens of one style together: a code per token would only fill the screen
    for look, group in itertools.groupby(zip(styles, texts, strict=True), key=lambda pair: pair[0]):
        text = "".join(text for _, text in group)
        if not look:
            parts.append(text)
        else:
            parts.append(f"\x1b[{look}m{text}\x1b[0m" if colour else f"⟦{text}⟧")
    return "".join(parts)


def style(picked, delta, kind):
    """The terminal's codes (SGR) of a token; "" for plain text."""
    codes = []
    level = sum(abs(delta) >= least for least in SHADES)
    if kind == "keep" and not picked:
        codes.append("9")
    if kind == "keep" and not picked and not level:
        codes.append("38;5;242")
    if level:
        codes.append("38;5;16")
    if kind == "force" and picked:
        codes += ["1", "4"]
    if level:
        codes.append(f"48;5;{(ROSE if delta > 0 else FELL)[level - 1]}")
    return ";".join(codes)


def explain_colours(kind):
    """One line, where there are colours to explain; "" elsewhere."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return ""
    mark = {"keep": "struck through: not in the loss", "force": "underlined: always masked"}[kind]
    rose, fell = (
        f"\x1b[38;5;16;48;5;{ROSE[2]}mrose\x1b[0m",
        f"\x1b[38;5;16;48;5;{FELL[3]}mfell\x1b[0m",
    )
    return f"confidence {rose} or {fell} up to the bottleneck; {mark}"
