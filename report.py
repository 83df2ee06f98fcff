"""Pictures of a cycle: what accuracy, loss and every token's confidence did, from the files in the run folders.

    python report.py --run=sft,t3s        # -> runs/sft/report.html and runs/sft/report.png

The first run is pass 1: its trajectory and its selection are shown token by token. One HTML file without scripts or
outside references, to be opened, mailed or projected. Next: diffusion.py.
"""

import base64
import html
import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np

import data
from hf.families import local_folder
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError, command, load_select, read_json, whole_file
from plumbing.runs import load_mask, load_trajectory, records, run_folder, run_keys


@dataclass
class Config:
    run: str = ""  # runs to show, separated by commas; the first one is pass 1, whose trajectory is shown
    selection: str = "t3s"  # which of its selections: runs/<run>/selection/<selection>
    out: str = ""  # the HTML file, with a PNG beside it; default runs/<first run>/report.html
    examples: int = 20  # how many of the examples are shown token by token


COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind too


# ---------------------------------------------------------------------------------------------------------------------
# Curves




def bifurcation(run, selection=None):
    """Mean confidence of anchors and of yet-to-learn tokens at each recorded checkpoint, relative to step 0.

    -> steps (n,), anchors (n,), yet-to-learn (n,), nats; the bottleneck's step. Anchors are the tokens with delta > 0.
    selection: the folder whose bottleneck counts; without one the lowest train accuracy decides.
    """
    select = load_select()
    trajectory = load_trajectory(run)
    if selection is not None:
        low = read_json(selection / "config.json")["bottleneck_step"]
    else:
        low = select.find_bottleneck({step: float(t["accuracy"]) for step, t in trajectory.items()})
    start = trajectory[0]["logprob"]
    delta = trajectory[low]["logprob"] - start  # nan at prompts, and comparisons with nan are false
    change = {step: t["logprob"] - start for step, t in trajectory.items()}
    return (list(change), [float(c[delta > 0].mean()) for c in change.values()],
            [float(c[delta < 0].mean()) for c in change.values()], low)  # fmt: skip


def figure(groups, first, path, selection=None):
    """Draw accuracy, loss and bifurcation as a PNG.

    groups  {name: [runs]}: a curve each; of several runs (seeds) the mean, and a band from the lowest to the highest
    first   [runs] of pass 1, for the bifurcation
    """
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    both = [bifurcation(run, selection) for run in first]
    for (name, runs), colour in zip(groups.items(), itertools.cycle(COLOURS), strict=False):
        curves = [records(run) for run in runs]
        steps = curves[0]["step"]
        shown = "eval_accuracy" if "eval_accuracy" in curves[0] else "accuracy"
        for axis, key in ((axes[0], shown), (axes[1], "nll")):
            if key in curves[0]:
                band(axis, steps, np.stack([curve[key] for curve in curves]), colour, name)
    problems = "unseen" if shown == "eval_accuracy" else "train"
    axes[0].set(title=f"accuracy on {problems} problems", xlabel="step", ylim=(0, 1))
    axes[1].set(title="loss: NLL of all the teacher's tokens", xlabel="step", ylabel="nats", ylim=(0, None))
    steps = both[0][0]
    for index, name, colour in ((1, "anchors (rose)", COLOURS[3]), (2, "yet-to-learn (fell)", COLOURS[2])):
        band(axes[2], steps, np.stack([b[index] for b in both]), colour, name)
    axes[2].axhline(0, color="grey", linewidth=0.8)
    axes[2].set(title="confidence in pass 1, relative to step 0", xlabel="step", ylabel="nats")
    axes[2].set_yscale("symlog", linthresh=0.01)  # yet-to-learn tokens fall little, anchors rise a lot
    for axis in axes:
        for i, step in enumerate(sorted({b[3] for b in both})):
            label = None if i else "bottleneck of pass 1"
            axis.axvline(step, color="grey", linewidth=0.8, linestyle=":", label=label)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as aside:
        fig.savefig(aside, dpi=130, format="png")
    plt.close(fig)


def band(axis, x, values, colour, label):
    """values (runs, len(x))."""
    axis.plot(x, values.mean(0), color=colour, label=label, marker=".", markersize=4)
    if len(values) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


# ---------------------------------------------------------------------------------------------------------------------
# The token view

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}img{max-width:100%}table{border-collapse:collapse}
td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
pre{white-space:pre-wrap;font:14px/1.7 ui-monospace,monospace;border-left:3px solid #ddd;padding-left:.8em}
.q{color:#777}.side{display:flex;flex-wrap:wrap;gap:0 4em}.keep{text-decoration:line-through}
.force{text-decoration:underline 2px}"""


def colour_of(delta):
    """Blue where confidence rose, red where it fell; white at 0, full at 2 nats."""
    depth = round(200 * min(1.0, abs(delta) / 2) ** 0.5)
    return f"rgb({255 - depth},{255 - depth // 2},255)" if delta > 0 else f"rgb(255,{255 - depth},{255 - depth})"


def token_view(train_set, tokenizer, trajectory, low, mask, kind, i):
    """Example i as HTML: every response token on its colour; marked what the mask takes from the loss, or forces."""
    a, b, c = train_set.spans[i]
    start, bottom = trajectory[0]["logprob"], trajectory[low]["logprob"]
    pieces = [f'<span class="q">{html.escape(tokenizer.decode(train_set.prompt(i)))}</span>']
    for t in range(b, c):
        delta = float(bottom[t] - start[t])
        name = html.escape(tokenizer.decode([train_set.tokens[t]]))
        hint = f"p {math.exp(start[t]):.3f} at step 0, {math.exp(bottom[t]):.3f} at step {low}; delta {delta:+.3f}"
        mark = f' class="{kind}"' if mask[t] == (kind == "force") else ""
        pieces.append(f'<span{mark} style="background:{colour_of(delta)}" title="{hint}">{name}</span>')
    return f"<h3>example {html.escape(str(train_set.examples[i]['id']))}</h3><pre>{''.join(pieces)}</pre>"


def token_table(title, tokens):
    cells = "".join(f"<tr><td><code>{html.escape(repr(t['token']))}</code></td><td>{t['count']}</td>"
                    f"<td>{t['seen']}</td><td>{t['mean_delta']:+.3f}</td></tr>" for t in tokens)  # fmt: skip
    return (f"<div><h2>{title}</h2><table><tr><th>token</th><th>times</th><th>of</th>"
            f"<th>mean delta of all</th></tr>{cells}</table></div>")  # fmt: skip


def accuracy_table(runs):
    """Accuracy and loss of each run at step 0, at its lowest accuracy and at the end."""
    rows = []
    for run in runs:
        curve = records(run)
        accuracy = curve.get("eval_accuracy", curve.get("accuracy"))
        if accuracy is None:  # data without answers
            continue
        lowest = int(accuracy.argmin())
        cells = "".join(f"<td>{accuracy[i]:.1%}</td><td>{curve['nll'][i]:.3f}</td>" for i in (0, lowest, -1))
        rows.append(f"<tr><td>{html.escape(run)}</td>{cells}<td>{curve['step'][lowest]:.0f}</td></tr>")
    head = "".join(f"<th>{when}</th><th>loss</th>" for when in ("at step 0", "at its lowest", "at the end"))
    return f"<table><tr><th>accuracy</th>{head}<th>lowest at step</th></tr>{''.join(rows)}</table>" if rows else ""


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Write the report -> its path. Raises InputError for a run without trajectory or selection."""
    cfg = Config(**given)
    runs = [run for run in cfg.run.split(",") if run]
    if not runs:
        raise InputError("--run is missing (--help lists the keys)")
    home, *_ = map(run_folder, runs)
    selection = home / "selection" / cfg.selection
    if not (selection / "mask.npy").exists():
        raise InputError(f"{selection}: no such selection; run select.py --run={runs[0]} first, or name --selection=")
    out = Path(cfg.out or home / "report.html")
    png = out.with_suffix(".png")
    if png == out:
        raise InputError(f"--out={out}: names the HTML file; the PNG goes beside it")
    trained, chosen = run_keys(home), read_json(selection / "config.json")
    stats, low, kind = read_json(selection / "stats.json"), chosen["bottleneck_step"], chosen["kind"]
    train_set = data.load(trained["data"])
    mask = load_mask(selection, train_set, kind)
    tokenizer = load_tokenizer(local_folder(trained["model"]))
    trajectory = {step: {"logprob": t["logprob"]} for step, t in load_trajectory(runs[0]).items()
                  if step in (0, low) and str(t["sha256"]) == train_set.sha256}  # fmt: skip
    if not {0, low} <= trajectory.keys():
        raise InputError(f"{home / 'trajectory'}: steps 0 and {low} of {trained['data']} are not both there; "
                         f"run select.py --run={runs[0]} again")  # fmt: skip

    figure({run: [run] for run in runs}, runs[:1], png, selection)
    image = base64.b64encode(png.read_bytes()).decode()
    what, mark = {"keep": ("stay in the loss", "Struck through: left out of the loss"),
                  "force": ("are always masked", "Underlined: always masked")}[kind]  # fmt: skip
    page = io.StringIO()
    page.write(f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(runs[0])}</title>"
               f"<style>{STYLE}</style><h1>T3S: {html.escape(', '.join(runs))}</h1>"
               f"<p>Bottleneck at step {low}. Of {stats['response_tokens']:,} response tokens {stats['share']:.1%} "
               f"{what} (rule {html.escape(chosen['rule'])}, tau {chosen['tau']:g}).</p>"
               f'<img alt="accuracy, loss and confidence per step" src="data:image/png;base64,{image}">'
               f"{accuracy_table(runs)}<p>Delta: a token's log-probability at step {low} less that at step 0, in nats. "
               f"Anchors rose by more than {chosen['tau']:g}, yet-to-learn tokens fell by more than that.</p>"
               f"<div class=side>"
               f"{token_table('Most frequent anchors', stats['anchor_tokens'])}"
               f"{token_table('Most frequent yet-to-learn tokens', stats['yet_to_learn_tokens'])}</div>"
               f"<h2>Token by token</h2><p>Blue: confidence rose from step 0 to step {low}; red: it fell. {mark}. "
               f"Hover for the numbers.</p>")  # fmt: skip
    for i in range(min(cfg.examples, len(train_set))):
        page.write(token_view(train_set, tokenizer, trajectory, low, mask, kind, i))
    with whole_file(out) as aside:
        aside.write_text(page.getvalue(), encoding="utf-8")
    print(f"{out} and {png}")
    return out


if __name__ == "__main__":
    command(main, Config)
