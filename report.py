"""The pictures of a cycle: what accuracy, loss and every token's confidence did, in one page.

    python report.py --run=sft,t3s                       # runs/sft/report.html and .png
    python report.py --run=sft --selection=t3s,random    # two selections side by side

The first run is pass 1: its trajectory and its selections are shown token by token. The page is one
HTML file that asks the network for nothing: open it, mail it, project it. Its code is
plumbing/page.html, its numbers are packed here. Next: hf/tokenizer.py.
"""

import base64
import itertools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np

import data
from hf.families import local_folder
from hf.tokenizer import load_tokenizer
from intervals import few, wilson
from plumbing.config import InputError, command, load_select, read_json, require, whole_file
from plumbing.runs import load_mask, load_trajectory, records, run_folder, run_keys
from plumbing.selection import token_texts


@dataclass
class Config:
    run: str = ""  # runs to show, separated by commas; the first one is pass 1
    selection: str = "t3s"  # of pass 1: runs/<run>/selection/<selection>; two are side by side
    out: str = ""  # the HTML file, with a PNG beside it; default runs/<first run>/report.html
    examples: int = 200  # how many of the examples are shown token by token


# told apart by the colour-blind too (Okabe and Ito)
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PAGE = Path(__file__).parent / "plumbing" / "page.html"
MOST_BYTES = 19_000_000  # of a page: it is to be mailed
LOWEST, HIGHEST = 1e-3, 50.0  # nats: what is drawn on the logarithmic scale of delta


# -------------------------------------------------------------------------------------------------
# Curves


def bifurcation(run, selection=None):
    """Mean confidence of anchors and of yet-to-learn tokens, relative to step 0.

    selection  the folder whose bottleneck counts; without one the lowest train accuracy decides
    -> recorded steps, anchors, yet-to-learn (a list of nats each), the bottleneck's step

    Anchors are the tokens with delta > 0.
    """
    select = load_select()
    trajectory = load_trajectory(run)
    if selection is not None:
        low = read_json(selection / "config.json")["bottleneck_step"]
    else:
        accuracy = {step: float(t["accuracy"]) for step, t in trajectory.items()}
        low = select.find_bottleneck(accuracy)
    start = trajectory[0]["logprob"]
    delta = trajectory[low]["logprob"] - start  # nan at prompts, where no comparison is true
    anchors = []
    yet_to_learn = []
    for recorded in trajectory.values():
        change = recorded["logprob"] - start
        anchors.append(float(change[delta > 0].mean()))
        yet_to_learn.append(float(change[delta < 0].mean()))
    return list(trajectory), anchors, yet_to_learn, low


def curves(run):
    """What a run recorded, with 95 % intervals: {steps, accuracy, nll, problems}.

    accuracy and nll are lists of (value, low, high). Wilson's interval over the problems for an
    accuracy; for the loss, the spread between examples, as a ratio of sums. accuracy is None for
    data without answers.
    """
    curve = records(run)
    keys = run_keys(run_folder(run))
    unseen = "eval_accuracy" in curve
    shown = curve.get("eval_accuracy", curve.get("accuracy"))
    problems = len(data.load(keys["eval_data"] if unseen else keys["data"]))
    accuracy = None
    if shown is not None:
        shares = [float(p) for p in shown]
        accuracy = [(p, *wilson(p, problems)) for p in shares]
    spread = loss_spread(run, keys["data"])
    nll = []
    for step, value in zip(curve["step"], curve["nll"], strict=True):
        value = float(value)
        half = spread.get(int(step), 0.0)
        nll.append((value, value - half, value + half))
    steps = [int(step) for step in curve["step"]]
    lists = {"steps": steps, "accuracy": accuracy, "nll": nll}
    return {**lists, "problems": "unseen" if unseen else "train"}


def loss_spread(run, folder):
    """{step: half a 95 % interval of the mean NLL}, from how much examples differ."""
    train_set = data.load(folder)
    found = {}
    for step, recorded in load_trajectory(run).items():
        if str(recorded["sha256"]) != train_set.sha256:
            continue
        logprob = recorded["logprob"]
        parts = [logprob[a:b] for _, a, b in train_set.spans]
        sums = np.array([-part.sum(dtype=np.float64) for part in parts])
        sizes = train_set.spans[:, 2] - train_set.spans[:, 1]
        mean = sums.sum() / sizes.sum()
        rest = sums - mean * sizes  # what an example has above its share
        n = len(rest)
        variance = (rest**2).sum() * n / max(1, n - 1)
        error = np.sqrt(variance) / sizes.sum()
        found[step] = float(1.96 * error)
    return found


def histogram(delta, picked, bins=25):
    """How delta is distributed, on a logarithmic scale either side of 0.

    delta, picked  (n,) of the response tokens
    -> edges (nats; the bin around 0 in the middle), tokens in each bin, and how many are picked
    """
    above = np.geomspace(LOWEST, HIGHEST, bins)
    edges = np.r_[-above[::-1], above]
    within = np.clip(delta, -HIGHEST, HIGHEST)
    counts = np.histogram(within, edges)[0]
    chosen = np.histogram(within[picked > 0], edges)[0]
    return {"edges": edges.tolist(), "tokens": counts.tolist(), "picked": chosen.tolist()}


# -------------------------------------------------------------------------------------------------
# The PNG


def figure(groups, first, path, selection=None):
    """Draw accuracy, loss and bifurcation as a PNG.

    groups     {name: [runs]}: a curve each; several runs (seeds) give a mean and a band from the
               lowest to the highest
    first      [runs] of pass 1, for the bifurcation
    selection  the folder whose bottleneck is marked; its curves and deltas are a second row
    """
    rows = 1 if selection is None else 2
    size = (13, 3.8 * rows)
    fig, axes = plt.subplots(rows, 3, figsize=size, constrained_layout=True, squeeze=False)
    lows = draw_runs(axes[0], groups, first, selection)
    if selection is not None:
        draw_selection(axes[1], read_json(selection / "stats.json"))
    for axis in axes.flat:
        if axis in axes[0]:
            for i, step in enumerate(lows):
                label = None if i else "bottleneck of pass 1"
                axis.axvline(step, color="grey", linewidth=0.8, linestyle=":", label=label)
        axis.legend(frameon=False, fontsize=8)
    save(fig, path)


def save(fig, path):
    """Write a picture as PNG, atomically; without the two sides of each frame that hold no scale."""
    for axis in fig.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as aside:
        fig.savefig(aside, dpi=130, format="png")
    plt.close(fig)


def draw_runs(axes, groups, first, selection):
    """The first row -> the bottleneck's step of each run of pass 1."""
    colours = itertools.cycle(COLOURS)
    found = {name: [records(run) for run in runs] for name, runs in groups.items()}
    unseen = all("eval_accuracy" in curve for curves in found.values() for curve in curves)
    shown = "eval_accuracy" if unseen else "accuracy"
    for name, recorded in found.items():
        colour = next(colours)
        steps = recorded[0]["step"]
        for axis, key in zip(axes, (shown, "nll"), strict=False):
            if key in recorded[0]:
                values = np.stack([curve[key] for curve in recorded])
                band(axis, steps, values, colour, name)
    problems = "unseen" if shown == "eval_accuracy" else "train"
    axes[0].set(title=f"accuracy on {problems} problems", xlabel="step", ylim=(0, 1))
    axes[1].set(title="loss: NLL of all the teacher's tokens", xlabel="step")
    axes[1].set(ylabel="nats", ylim=(0, None))

    found = [bifurcation(run, selection) for run in first]
    steps, anchors, yet_to_learn, lows = zip(*found, strict=True)
    band(axes[2], steps[0], np.stack(anchors), COLOURS[3], "anchors (rose)")
    band(axes[2], steps[0], np.stack(yet_to_learn), COLOURS[2], "yet-to-learn (fell)")
    axes[2].axhline(0, color="grey", linewidth=0.8)
    axes[2].set(title="confidence in pass 1, relative to step 0", xlabel="step", ylabel="nats")
    axes[2].set_yscale("symlog", linthresh=0.01)  # yet-to-learn fall little, anchors rise a lot
    return sorted(set(lows))


def draw_selection(axes, stats):
    """The second row: both curves that a bottleneck is read from, and what tau would select."""
    for axis, key, name in (
        (axes[0], "accuracy", "train accuracy"),
        (axes[1], "label_free", "label-free curve D, nats"),
    ):
        points = stats.get(key, {})
        values = list(points.values())
        if values and None not in values:
            steps = [int(step) for step in points]
            band(axis, steps, np.array([values]), COLOURS[1], name)
        found = stats.get(f"{key}_bottleneck")
        if found is not None:
            axis.axvline(found, color="grey", linestyle="--", label=f"its bottleneck: {found}")
        axis.set(title=f"{name} in pass 1", xlabel="step")
    taus = [row["tau"] for row in stats["tau_sweep"]]
    for key, colour in (("anchors", COLOURS[3]), ("yet_to_learn", COLOURS[2])):
        shares = [row[key] for row in stats["tau_sweep"]]
        band(axes[2], taus, np.array([shares]), colour, key.replace("_", "-"))
    axes[2].set(title="share of tokens beyond tau", xlabel="tau, nats", ylim=(0, 1))
    axes[2].set_xscale("symlog", linthresh=0.01)
    axes[2].set_xlim(0, None)


def draw_probes(curve, levels, path, pilot="t3s"):
    """How little SFT does the selection need? A PNG.

    curve   {steps of the probe: [final accuracy of each student]}
    levels  {row: [the same]}, drawn as lines: base, sft, and others
    pilot   the one of them that is selected at the bottleneck of a whole pilot
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    x = list(curve)
    values = np.array(list(curve.values())).T  # (students, probes)
    axes[0].plot(x, values.T, color="grey", linewidth=0.6, alpha=0.5)
    axes[0].plot(x, values.mean(0), ".-", color=COLOURS[0], label=f"selected by a probe ({len(values)})")
    for colour, (row, accuracies) in zip(COLOURS[1:], levels.items(), strict=False):
        axes[0].axhline(np.mean(accuracies), color=colour, linestyle="--", linewidth=1, label=row)
    axes[0].set(title="final accuracy", ylim=(0, 1))
    for place, (colour, row) in enumerate(zip(COLOURS, (pilot, "sft"), strict=False)):
        if row in levels:
            found = [few(values[:, i] - levels[row]) for i in range(len(x))]
            mean, half = zip(*found, strict=True)
            shifted = np.array(x) * 1.03**place  # or the two would hide each other
            axes[1].errorbar(shifted, mean, half, fmt=".-", color=colour, capsize=2, label=f"minus {row}")
    axes[1].axhline(0, color="grey", linewidth=0.8)
    axes[1].set(title="paired difference, 95 % interval")
    for axis in axes:
        axis.set(xlabel="steps of the probe", xscale="log", xticks=x, xticklabels=x)
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
    save(fig, path)


def band(axis, x, values, colour, label):
    """values (runs, len(x)): their mean, and from the lowest to the highest."""
    axis.plot(x, values.mean(0), color=colour, label=label, marker=".", markersize=4)
    if len(values) > 1:
        low, high = values.min(0), values.max(0)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


# -------------------------------------------------------------------------------------------------
# The tokens, packed: one number per token and recorded step


def pack(array):
    """An array as text that a page can hold: base64 of zlib."""
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()


def quantise(values, bits):
    """nats -> int16 or int8 on a logarithmic scale, exact at 0; page.html reverses it.

    16 bits keep four digits, 8 bits about one and a half: enough for a colour.
    """
    most = 2 ** (bits - 1) - 1
    size = np.minimum(np.abs(values), HIGHEST)
    scale = np.log1p(size / LOWEST) / np.log1p(HIGHEST / LOWEST)
    return (np.sign(values) * np.rint(scale * most)).astype(f"<i{bits // 8}")


def pack_tokens(train_set, tokenizer, trajectory, masks, shown, low, most_cells=16_000_000):
    """Everything of the token view: see `unpack` in page.html.

    masks  {name: (n_tokens,) bool or float32}; shown: how many examples; low: the bottleneck
    More cells (tokens x steps) than most_cells: 8 bits instead of 16, then fewer steps.
    """
    spans = train_set.spans[:shown]
    places = np.concatenate([np.arange(a, b) for _, a, b in spans])
    steps = list(trajectory)
    bits = 16 if len(places) * len(steps) * 2 <= most_cells else 8
    steps = thinned(steps, max(3, most_cells * 8 // bits // len(places)), low)
    texts = []
    for i in range(len(spans)):
        texts += token_texts(tokenizer, train_set.response(i))
    pieces, which = np.unique(np.array(texts, dtype=object), return_inverse=True)
    start = trajectory[0]["logprob"][places]
    deltas = [trajectory[step]["logprob"][places] - start for step in steps]
    return {
        "bits": bits,
        "steps": steps,
        "dropped_steps": len(trajectory) - len(steps),
        "lowest": LOWEST,
        "highest": HIGHEST,
        "pieces": pieces.tolist(),
        "which": pack(which.astype("<u4")),
        "start": pack(quantise(start, 16)),
        "delta": [pack(quantise(delta, bits)) for delta in deltas],
        "picked": {name: pack(mask[places].astype("<f4")) for name, mask in masks.items()},
        "examples": [
            {
                "id": str(train_set.examples[i]["id"]),
                "prompt": tokenizer.decode(train_set.prompt(i)),
                "tokens": int(span[2] - span[1]),
            }
            for i, span in enumerate(spans)
        ],
    }


def thinned(steps, most, low):
    """At most `most` of the steps, evenly; the first, the last and `low` are among them."""
    if len(steps) <= most:
        return steps
    places = np.linspace(0, len(steps) - 1, most - 1).round().astype(int)
    return sorted({low, *(steps[i] for i in places)})


# -------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Write the report -> its path. Raises InputError for a run without trajectory or selection."""
    cfg = Config(**given)
    require(cfg, examples=(1, None))
    runs = [run for run in cfg.run.split(",") if run]
    if not runs:
        raise InputError("--run is missing (--help lists the keys)")
    home = [run_folder(run) for run in runs][0]
    names = [name for name in cfg.selection.split(",") if name]
    selections = {name: find_selection(home, name, runs[0]) for name in names[:2]}
    if not selections or len(names) > 2:
        raise InputError(f"--selection={cfg.selection}: name one selection, or two: t3s,random")
    out = Path(cfg.out or home / "report.html")
    png = out.with_suffix(".png")
    if png == out:
        raise InputError(f"--out={out}: names the HTML file; the PNG goes beside it")

    trained = run_keys(home)
    train_set = data.load(trained["data"])
    tokenizer = load_tokenizer(local_folder(trained["model"]))
    made = {name: read_json(folder / "config.json") for name, folder in selections.items()}
    masks = {name: load_mask(selections[name], train_set, made[name]["kind"]) for name in made}
    low = made[names[0]]["bottleneck_step"]
    trajectory = own_steps(runs[0], train_set, low, home)
    content = summary(runs, selections, made, train_set, trajectory, masks)
    figure({run: [run] for run in runs}, runs[:1], png, selections[names[0]])
    with whole_file(out) as aside:
        cells = 16_000_000
        while True:
            tokens = pack_tokens(train_set, tokenizer, trajectory, masks, cfg.examples, low, cells)
            page = fill_page({**content, "tokens": tokens})
            if len(page) <= MOST_BYTES or len(tokens["steps"]) <= 3:
                break
            cells = cells * 2 // 3
        aside.write_bytes(page)
    print(f"{out} ({len(page) / 1e6:.1f} MB) and {png}")
    return out


def find_selection(home, name, run):
    folder = home / "selection" / name
    if not (folder / "mask.npy").exists():
        raise InputError(
            f"{folder}: no such selection; run select.py --run={run} first, or name --selection="
        )
    return folder


def own_steps(run, train_set, low, home):
    """The recorded steps that are about train_set. Raises InputError if 0 or `low` is not there."""
    recorded = load_trajectory(run)
    found = {s: t for s, t in recorded.items() if str(t["sha256"]) == train_set.sha256}
    if not {0, low} <= found.keys():
        raise InputError(
            f"{home / 'trajectory'}: steps 0 and {low} of {train_set.folder} are not both there; "
            f"run select.py --run={run} again"
        )
    return found


def summary(runs, selections, made, train_set, trajectory, masks):
    """What the page says above the tokens."""
    name = next(iter(selections))
    stats = read_json(selections[name] / "stats.json")
    response = train_set.response_mask()
    low = made[name]["bottleneck_step"]
    change = trajectory[low]["logprob"][response] - trajectory[0]["logprob"][response]
    steps, anchors, yet_to_learn, _ = bifurcation(runs[0], selections[name])
    keys = ("rule", "kind", "tau", "bottleneck_step")
    looked_into = run_folder(runs[0]) / "mechanism.json"  # if mechanism.py has been run
    return {
        "mechanism": read_json(looked_into) if looked_into.exists() else {},
        "runs": {run: curves(run) for run in runs},
        "bottleneck": low,
        "selections": {n: {key: made[n].get(key) for key in keys} for n in selections},
        "stats": stats,
        "bifurcation": {"steps": steps, "anchors": anchors, "yet_to_learn": yet_to_learn},
        "histogram": histogram(change, masks[name][response]),
    }


def fill_page(content):
    """The page with its numbers in it, as bytes. They are base64: no text of theirs can be HTML."""
    text = json.dumps(content, ensure_ascii=False).encode()
    packed = base64.b64encode(zlib.compress(text, 6))
    template = PAGE.read_bytes()
    return template.replace(b"@@CONTENT@@", packed)


if __name__ == "__main__":
    command(main, Config)
