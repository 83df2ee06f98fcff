# %% [markdown]
# # T3S in a notebook
#
# The path of docs/WORKSHOP.md, to run from top to bottom: two and a half minutes of one idle core,
# most of them in four short trainings. The cells of this file are marked with `# %%`. VS Code shows
# them as a notebook by itself (Run Cell); for Jupyter, `pip install jupytext` and open this file "as
# a notebook", or make one with `jupytext --to notebook workshop/notebook.py`. As a plain program it
# runs too: `python workshop/notebook.py`.

# %%
SMALL = False  # True: few problems and few steps, a minute in all; the figures then mean little
ANSWERS = "workshop/solutions"  # workshop/exercises: your own, once they are written

# %%
import json
import os
import sys
from pathlib import Path

while not Path("select.py").is_file():  # a notebook begins in its own folder
    assert Path.cwd() != Path("/"), "open this notebook inside a clone of the project"
    os.chdir("..")
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "workshop")]

import check
import matplotlib.pyplot as plt
import numpy as np

import data
import toy
import train
from plumbing.config import load_select
from plumbing.runs import load_trajectory

select = load_select()  # never `import select`: Python has a module of that name


def answers(number):
    """The functions of an exercise, from ANSWERS."""
    return check.load(Path(ANSWERS) / check.EXERCISES[number].file)


# %% [markdown]
# ## 1. Find the shock
#
# A student of 115 thousand parameters does arithmetic step by step; a teacher who never slips opens
# every step with a word of its own. **Write down** before you run the cell: the loss at the end,
# relative to the start; the accuracy at the end; the lowest accuracy on the way.

# %%
home = "workshop-small" if SMALL else "workshop"
world = dict(teacher_problems=24, unseen_problems=8) if SMALL else {}
toy.main(seed=1, out=f"data/{home}", **world)
keys = dict(
    data=f"data/{home}/teacher",
    eval_data=f"data/{home}/unseen",
    steps=12 if SMALL else 36,
    batch_size=0,  # all examples in every step
    micro_batch_size=100,
    lr=1e-3 if SMALL else 4e-4,
    schedule="constant",
    record_every=6 if SMALL else 4,
    max_new_tokens=60,
    seed=1,
)


def trained(run, **given):
    """Train a run, or find it finished -> the lines of its log."""
    train.main(run=f"{home}/{run}", resume=True, **given)
    text = Path(f"runs/{home}/{run}/log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


lines = trained("sft", model="students/toy-1", **keys)

# %%
step, change, nll_change = answers(1).shock(lines)
print(f"bottleneck: step {step}; against step 0: accuracy {change:+.3f}, NLL {nll_change:+.3f} nats")


def curve(lines, key):
    """{step: value} of the recorded checkpoints."""
    return {line["step"]: line[key] for line in lines if line.get("event") == "record"}


def plot(curves, label):
    """Curves over steps, each {step: value}."""
    for name, values in curves.items():
        plt.plot(list(values), list(values.values()), marker="o", label=name)
    plt.xlabel("step")
    plt.ylabel(label)
    plt.legend()
    plt.show()


plot({key: curve(lines, key) for key in ("accuracy", "nll")}, "train accuracy; NLL, nats")

# %% [markdown]
# ## 2. Write a rule
#
# `delta` is how far the confidence in each token moved from step 0 to the bottleneck. T3S drops the
# tokens that rose; your rule drops half of them. **Write down**: which words will be the anchors?
# Will dropping half of them be half as good?

# %%
select.main(run=f"{home}/sft", show=2)
select.RULES["hardest_half"] = answers(2).hardest_half  # as if it stood in select.py
select.main(run=f"{home}/sft", rule="hardest_half", show=2)

# %%
curves = {"sft": curve(lines, "eval_accuracy")}
for rule in ("t3s", "hardest_half"):
    its_lines = trained(rule, selection=f"runs/{home}/sft/selection/{rule}")
    curves[rule] = curve(its_lines, "eval_accuracy")
plot(curves, "accuracy on unseen problems")

# %% [markdown]
# ## 3. Move the bottleneck
#
# **Write down**: does the share of anchors grow with the step that is taken for the bottleneck?

# %%
trajectory = load_trajectory(f"{home}/sft")
train_set = data.load(keys["data"])
response = train_set.response_mask()
move = answers(3).move
for other in sorted(trajectory)[1:]:
    share, overlap = move(trajectory, step, other, response, 0.0)
    print(f"step {other:2}: {share:.3f} are anchors, and {overlap:.3f} of those of step {step}")

# %% [markdown]
# ## 4. Derive the 1/t weight
#
# Three bits that are nearly always equal: a masked one is easy to guess as long as another is
# visible. **Write down**: which estimate varies more from draw to draw, one with levels from 0 to 1
# or one with levels from 0.3 to 1? Which of the two has the right mean?

# %%
rng = np.random.default_rng(0)
loss = answers(4).loss
p = np.full((2, 2, 2), 0.02)  # of every text of three bits
p[0, 0, 0] = p[1, 1, 1] = 0.44
print(f"-log p(000) / 3 = {-np.log(p[0, 0, 0]) / 3:.3f}")
for t_min in (0.0, 0.3):
    draws = []
    for _ in range(10_000):
        t = t_min + (1 - t_min) * (1 - rng.random((1, 1)))  # above 0
        hidden = rng.random((1, 3)) < t
        nll = np.array([[check.surprise(p, i, hidden[0]) for i in range(3)]])
        draws.append(loss(nll, hidden, t))
    error = np.std(draws) / np.sqrt(len(draws))
    print(f"levels from {t_min}: mean {np.mean(draws):.3f} ± {error:.3f}, largest {max(draws):.1f}")

# %% [markdown]
# ## 5. Let the diffusion student use its own confidence
#
# Every token is asked for once in each draw, from a random mask or from its complement. **Write
# down**: will the same words be anchors as before?

# %%
masked = dict(keys, lr=1e-4, steps=4 if SMALL else 24, record_problems=8 if SMALL else 100)
masked_lines = trained("masked", model="students/toy-diffusion-1", confidence_draws=4, **masked)
last = max(curve(masked_lines, "nll"))
select.main(run=f"{home}/masked", bottleneck=last, tau=1.0, show=2)

# %% [markdown]
# ## 6. Find the bottleneck without answers
#
# **Write down**: at which step is the curve lowest, compared with that of the accuracy?

# %%
steps = np.array(sorted(trajectory))
confidence = np.stack([select.confidence(trajectory, step, response) for step in steps])
fallen = answers(6).fall(confidence)
print("by accuracy:", step, " without answers:", answers(6).turn(steps, fallen))
plot({"D": dict(zip(steps, fallen, strict=True))}, "nats")

# %% [markdown]
# ## 7. The same loss on any number of processes
#
# The checker calls your function once per rank and says who would wait for ever. The project's own
# is `train_step` in train.py: five lines that hold on one laptop and on 64 GPUs.

# %%
for number in check.EXERCISES:
    print(number, check.EXERCISES[number].title, check.verdict(number, ANSWERS))
