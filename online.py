"""T3S in one command: a pass 1 that ends once the bottleneck has passed, selection, pass 2.

    python train.py --run=t3s --online=true --model=M --data=D        # pass 2 from theta_0
    python train.py --run=t3s --online=continue --model=M --data=D    # from where pass 1 stands
    python train.py --run=t3s --online=true --watch=label_free ...    # without a single answer
    python train.py --run=t3s --probe=4 --model=M --data=D            # four steps, no bottleneck
    python train.py --run=kinds --probe=4 --rule=kinds ...            # by another rule of select.py

The paper's pass 1 is a whole run, of which two checkpoints are used: theta_0 and the bottleneck.
Here it is a pilot, the run <run>-pilot, that looks at one curve every --watch_every steps:

    accuracy     of answers sampled to --record_problems of the training problems
    label_free   D_s = mean of min(0, c_t(theta_s) - c_t(theta_0)), from the sweep alone (select.py)

It ends where `passed_bottleneck` finds a lowest look behind it. select.py selects there, and the run
itself begins: at theta_0, or, with --online=continue, with the pilot's weights and optimizer at the
step where that ended. A probe is a pilot that looks at nothing and ends at a step fixed before.

After a kill the same command with --resume=true goes on, in whichever stage it was; what is
finished is not done again. Next: batches.py.
"""

import json
from dataclasses import asdict

import numpy as np

import data
from hf.families import local_folder, read_config
from plumbing import parallel, resume
from plumbing.config import InputError, load_select, read_json
from plumbing.parallel import on_process_0, stop
from plumbing.runs import load_trajectory, run_folder
from plumbing.screen import say

# -------------------------------------------------------------------------------------------------
# 1. The rule

LOOKS = 2  # a single look above the lowest is often noise
ERRORS = 2.0  # standard errors of a paired difference


def passed_bottleneck(watched):
    """{step: (n,) of each problem or example} -> the step of the bottleneck, once it has passed.

    None as long as it may still be to come. It has passed if the lowest look lies below step 0, and
    the last LOOKS looks lie above the lowest one, each by more than ERRORS standard errors, paired
    over the n problems. Ties go to the earliest step, as in select.py.
    """
    # tests/false_alarms.py measures how often this stops too early, and how late it stops
    steps = sorted(watched)
    lowest = min(steps, key=lambda step: watched[step].mean())
    later = [step for step in steps if step > lowest][-LOOKS:]
    # the same problems at each step: that some are harder than others is not in these differences
    rises = [watched[step] - watched[lowest] for step in (steps[0], *later)]
    clear = [rise.mean() > ERRORS * rise.std(ddof=1) / len(rise) ** 0.5 for rise in rises]
    return lowest if len(later) == LOOKS and all(clear) else None


def curve(run, watch, train_set):
    """What a run has recorded of the curve `watch` -> {step: (n,) of each problem or example}."""
    trajectory = load_trajectory(run)
    if watch == "accuracy":
        correct = {step: arrays["correct"] for step, arrays in trajectory.items()}
        # nan: problems that were not asked (--record_problems)
        return {step: grades[~np.isnan(grades)] for step, grades in correct.items()}
    select = load_select()
    # nats a response rather than a token: the examples are what the error is taken over
    response_spans = select.locate_responses(train_set)
    return select.falls(trajectory, train_set.response_mask(), response_spans)


def is_over(run, step):
    """Does this pass 1 end at `step`, since what --watch names has passed its bottleneck? Collective.

    Asked after the look at `step`. The answer follows from trajectory/ alone, so a pilot that was
    killed between its last look and its end gives the same one.
    """
    cfg = run.cfg
    looked = cfg.record_every and step % cfg.record_every == 0
    if not cfg.watch or cfg.selection or not looked:
        return False
    lowest = on_process_0(lambda: passed_bottleneck(curve(cfg.run, cfg.watch, run.train_set)))
    if lowest is not None:
        say(f"the bottleneck by {cfg.watch} was step {lowest}: pass 1 ends at step {step}")
    return lowest is not None


# -------------------------------------------------------------------------------------------------
# 2. The stages


def is_wanted(cfg):
    """Is this T3S from the traces on, pass 1 and selection included?"""
    return cfg.online != "false" or cfg.probe > 0


def check_keys(cfg, given):
    """Raises InputError for keys of train.py that do not go together."""
    if cfg.online != "false" and cfg.probe:
        raise InputError("--online and --probe: two ways to make a selection; choose one")
    if is_wanted(cfg) and given.get("selection") and {"online", "probe"} & set(given):
        raise InputError("--online and --probe make their own selection; leave --selection out")
    if cfg.rule != "t3s" and not is_wanted(cfg):
        raise InputError(f"--rule={cfg.rule}: for --online and --probe; otherwise it is select.py's")
    # an ordinary run has no use for select.py, so it is not loaded for one
    if is_wanted(cfg) and cfg.rule not in load_select().RULES:
        raise InputError(f"--rule={cfg.rule}: must be {', '.join(load_select().RULES)}")
    if cfg.online == "continue" and cfg.resume_every < 0:
        raise InputError("--online=continue needs a resume state, and --resume_every=-1 keeps none")
    if cfg.watch and not is_wanted(cfg) and not cfg.selection and not cfg.record_every:
        raise InputError(f"--watch={cfg.watch}: looks at what is recorded; give --record_every too")


def pass_1(train, cfg):
    """Pilot or probe, and the selection -> the keys of train.py that pass 2 has beside cfg's.

    train  train.main, which imports this file and so hands itself over

    Each part is made once: when it is there already, it is taken as it is. Raises InputError if the
    pilot reached its last step and no bottleneck has passed; the pilot stays, as an ordinary run.
    """
    parallel.start_processes(cfg)  # or each process would look on its own disk only
    resume.refuse_existing(cfg, run_folder(cfg.run))  # before the pilot's steps, not after them
    keys, bottleneck = probe(cfg) if cfg.probe else pilot(cfg)
    home = run_folder(keys["run"])
    folder = home / "selection" / cfg.rule
    if not parallel.exists(folder / "mask.npy"):
        try_rule(cfg)
        # an ordinary run: one that was killed is resumed
        train(**{**asdict(cfg), **keys, "probe": 0, "online": "false", "rule": "t3s", "resume": True})
        if keys["watch"]:
            check_passed(keys)
        select_tokens(cfg, keys["run"], bottleneck)
    if cfg.online != "continue":
        return {"selection": str(folder)}
    step = resume.newest(home)
    if step >= cfg.steps:
        stop(
            f"{home}: the bottleneck had passed only at the last step, {step}, so --online=continue "
            "has no step left to train; give more --steps and another --run, or --online=true"
        )
    with resume.lock(run_folder(cfg.run), cfg.lock):
        resume.fork(home, run_folder(cfg.run), step)
    return {"selection": str(folder), "resume": True}


def kind_of_selection(cfg):
    """An autoregressive student drops its anchors from the loss; a diffusion student's corruption
    always masks the yet-to-learn tokens."""
    return "force" if read_config(local_folder(cfg.model)).is_diffusion else "keep"


def try_rule(cfg):
    """Raises InputError for a rule that cannot select for this student, on two tokens: before pass 1."""
    kind = kind_of_selection(cfg)
    recorded = {"ids": np.array([0, 1])}
    if kind == "keep":  # of a diffusion student no entropy is recorded
        recorded["entropy"] = np.ones(2)
    delta = np.array([1.0, -1.0])
    load_select().choose(cfg.rule, kind, delta, -np.ones(2), np.array([[0, 2]]), **recorded)


def select_tokens(cfg, run, bottleneck):
    """select.py for the student of cfg, on the trajectory of `run`."""
    kind = kind_of_selection(cfg)
    made = {"run": run, "rule": cfg.rule, "kind": kind, "bottleneck": bottleneck, "show": 0}

    def choose():
        load_select().main(**made)

    on_process_0(choose)


def pilot(cfg):
    """The keys of the pilot where they differ from those of the run, and select.py's --bottleneck."""
    watch = cfg.watch or "accuracy"
    keys = {"run": f"{cfg.run}-pilot", "watch": watch, "record_every": cfg.watch_every}
    # what is watched and nothing else
    keys |= {"eval_data": "", "save_every": 0}
    if watch == "label_free":
        keys["record_problems"] = -1
    return keys, watch


def probe(cfg):
    """The same of a probe: --probe steps of SFT, two sweeps, no answers.

    Nothing is sampled, so no accuracy shows where the bottleneck is: the last step stands for it.
    """
    keys = {"run": f"{cfg.run}-probe", "watch": "", "steps": cfg.probe, "schedule": "constant"}
    # recorded at theta_0 and at the end
    keys |= {"record_every": cfg.probe, "record_problems": -1, "eval_data": "", "save_every": 0}
    return keys, str(cfg.probe)


def check_passed(keys):
    """Raises InputError if the pilot's bottleneck has not passed by its last step. Collective."""
    home = run_folder(keys["run"])

    def why():
        made = read_json(home / "config.json")["config"]
        watched = curve(keys["run"], keys["watch"], data.load(made["data"]))
        if passed_bottleneck(watched) is not None:
            return ""
        lowest = min(watched, key=lambda step: watched[step].mean())
        return (
            f"{home}: no bottleneck by {keys['watch']} has passed in {made['steps']} steps (the lowest "
            f"look was step {lowest}), so nothing is selected; the pilot stays as an ordinary run: "
            f"train longer, or name a step: select.py --run={keys['run']} --bottleneck=STEP"
        )

    problem = on_process_0(why)
    if problem:
        stop(problem)


# -------------------------------------------------------------------------------------------------
# 3. What it cost

KINDS = ("trained", "scored", "sampled")  # tokens: in updates, in sweeps, of answers


def cost(run, first=0):
    """What a run took after step `first` -> {"updates", "looks", "copied", and tokens of each KIND}."""
    home = run_folder(run)
    keys = read_json(home / "config.json")["config"]
    lines = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "event" not in line and line["step"] > first]
    recorded = [line for line in lines if "event" in line]
    # a step 0 that was copied from pass 1 has taken 0 seconds, and no token
    looks = [line for line in recorded if line["seconds"] > 0]
    sweep = len(data.load(keys["data"]).tokens) * max(1, keys["confidence_draws"])
    sampled = 0
    for line in looks:
        for path in (home / "trajectory").glob(f"{line['step']:06d}.*jsonl"):
            answers = path.read_text(encoding="utf-8").splitlines()
            sampled += sum(json.loads(answer)["n_tokens"] for answer in answers)
    trained = sum(line["tokens"] for line in updates)
    counts = {"updates": len(updates), "looks": len(looks), "copied": len(recorded) - len(looks)}
    return {**counts, "trained": trained, "scored": sweep * len(looks), "sampled": sampled}


def whole(part, steps, every):
    """`part`, what `cost` found, as if the run had made all its steps -> tokens of each of KINDS.

    every  steps between two looks, besides those at step 0 and at the end
    """
    looks = -(-steps // every) + 1 - part["copied"] if every else 0
    pace = {"trained": steps / max(1, part["updates"])}
    pace["scored"] = pace["sampled"] = looks / max(1, part["looks"])
    return {kind: round(part[kind] * pace[kind]) for kind in KINDS}


def costs(cfg):
    """-> {"online", "offline": tokens of each of KINDS} of a finished run with --online.

    Offline, by the same keys: the pilot to the last of --steps, the selection, a pass 2 of all
    --steps from theta_0. Estimated from what an update and a look of the online run took.
    """
    first = cost(f"{cfg.run}-pilot")
    second = cost(cfg.run, first["updates"] if cfg.online == "continue" else 0)
    pilot_whole = whole(first, cfg.steps, cfg.watch_every)
    second_whole = whole(second, cfg.steps, cfg.record_every)
    return {
        "online": {kind: first[kind] + second[kind] for kind in KINDS},
        "offline": {kind: pilot_whole[kind] + second_whole[kind] for kind in KINDS},
    }


def show_costs(cfg):
    """Print what the command took, against the offline pipeline with the same keys."""
    found = on_process_0(lambda: costs(cfg))
    say(f"{'tokens':20}{'trained':>14}{'scored':>14}{'sampled':>14}{'sum':>14}")
    names = {"online": "this command", "offline": "the same offline"}
    for key, name in names.items():
        tokens = [*found[key].values(), sum(found[key].values())]
        say(f"{name:20}" + "".join(f"{number:>14,}" for number in tokens))
