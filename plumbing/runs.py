"""The run folder: where things lie in it, how they are read, checked and inherited. No torch."""

import json
from dataclasses import fields
from pathlib import Path, PurePath

import numpy as np

from hf.families import local_folder, read_config
from plumbing.config import InputError, read_json

# with a student of the other kind (autoregressive, diffusion) than pass 1's, no other key of pass 1 is inherited
OF_THE_EXPERIMENT = ("data", "eval_data", "seed", "record_every", "save_every", "samples", "max_new_tokens")
NEVER_INHERITED = ("run", "selection", "resume", "allow_changes", "dry_run")


def run_folder(name):
    """The folder of a run, runs/<name>. Raises InputError for a name that leads to another place; a/b is fine."""
    path = PurePath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise InputError(f"--run={name}: must be the name of a folder in runs/, without .. and not from / on")
    return Path("runs") / path


def run_keys(folder):
    """The keys that a run was trained with, from its folder's config.json. Raises InputError if they are not there."""
    path = Path(folder) / "config.json"
    keys = read_json(path).get("config")
    if not isinstance(keys, dict):
        raise InputError(f"{path}: not a run's config.json, it has no \"config\"")
    return keys


def read_keys(folder, config_class):
    """The keys of a run, from its config.json. Raises InputError for one that `config_class` does not have."""
    found = run_keys(folder)
    unknown = sorted(set(found) - {f.name for f in fields(config_class)})
    if unknown:
        raise InputError(f"{folder / 'config.json'}: unknown key {unknown[0]}")
    return {key: value for key, value in found.items() if key not in ("resume", "allow_changes", "dry_run")}


def of_pass_1(given, config_class):
    """What pass 2 takes over from the run its selection came from.

    A student of the same kind: every key but --run and --selection; those given differently are printed. A student of
    the other kind (a diffusion student trained with an autoregressive selector's choice): only what describes the
    experiment, since a learning rate or a number of steps that suit the one say nothing about the other; --model must
    then be given.
    """
    folder = Path(given["selection"])
    if folder.parent.name != "selection":
        raise InputError(f"--selection={folder}: must be a folder runs/<run>/selection/<name>, as select.py writes it")
    pass1 = read_keys(folder.parent.parent, config_class)
    kind = read_json(folder / "config.json").get("kind")
    inherited = {key: value for key, value in pass1.items() if key not in NEVER_INHERITED}
    other = given.get("model", pass1["model"])
    is_diffusion = [read_config(local_folder(m)).is_diffusion for m in (pass1["model"], other)]
    if kind == "force" and not is_diffusion[1]:
        raise InputError(f"{given['selection']}: a force selection is for a diffusion student, and {other} is "
                         "autoregressive; name one with --model")  # fmt: skip
    if is_diffusion[0] != is_diffusion[1]:
        inherited = {key: pass1[key] for key in OF_THE_EXPERIMENT}
        names = ("a diffusion", "an autoregressive") if is_diffusion[0] else ("an autoregressive", "a diffusion")
        shown = " ".join(f"{key}={value}" for key, value in inherited.items() if key not in given)
        print(f"pass 1 was {names[0]} student's, this is {names[1]} one; inherited: {shown}; all else is as given or "
              "by default")  # fmt: skip
    for key, value in given.items():
        if key in inherited and inherited[key] != value:
            print(f"differs from pass 1: {key} = {value} (pass 1: {inherited[key]})")
    return inherited


def checkpoint(folder, step):
    return folder / "checkpoints" / f"{step:06d}"


def find_checkpoint(name, trained, step):
    """The folder and the step of a run's checkpoint; step -1 is the last, 0 the model it started from."""
    folder = Path("runs") / name / "checkpoints"
    steps = sorted(int(path.name) for path in folder.glob("[0-9]*"))
    if step == 0:
        return Path(trained["model"]), 0
    if not steps or step not in [-1, *steps]:
        have = ", ".join(map(str, steps)) or "none"
        raise InputError(f"{folder}: no checkpoint{f' of step {step}' if step > 0 else ''} (there: {have})")
    step = steps[-1] if step == -1 else step
    return folder / f"{step:06d}", step


def records(run):
    """What a run recorded: {"step", "nll", "accuracy", "eval_accuracy"} -> arrays over its recorded checkpoints.

    eval_accuracy (on unseen problems) is left out if there was none. Raises InputError if nothing was recorded.
    """
    path = Path("runs") / run / "log.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no such file; is {run} the name of a run?")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"{path}: not JSON lines ({error})") from None
    lines = [line for line in lines if line.get("event") == "record"]
    if not lines:
        raise InputError(f"{path}: nothing was recorded; train with --record_every")
    keys = [key for key in ("step", "nll", "accuracy", "eval_accuracy") if lines[0].get(key) is not None]
    return {key: np.array([line[key] for line in lines], dtype=np.float64) for key in keys}


def load_trajectory(run):
    """runs/<run>/trajectory/*.npz -> {step: arrays}; an array is read from disk when it is asked for by its name.

    logprob (n_tokens,) float32, nan at prompts; correct (n_examples,); accuracy; step; sha256; tokenizer_hash.
    Raises InputError if there are none, or if they are not all about the same data.
    """
    folder = run_folder(run) / "trajectory"
    found = {}
    for path in sorted(folder.glob("[0-9]*.npz")):
        try:
            found[int(path.stem)] = np.load(path, allow_pickle=False)
            found[int(path.stem)]["accuracy"]
        except Exception as error:  # zipfile and numpy raise a dozen kinds
            raise InputError(f"{path}: not a complete trajectory file ({error})") from None
    if not found:
        raise InputError(f"{folder}: no trajectory; run train.py --run={run} with --record_every")
    if len({str(t["sha256"]) for t in found.values()}) > 1:
        raise InputError(f"{folder}: the files are not all about the same data")
    return found


def load_mask(folder, data, kind="keep"):
    """(n_tokens,) bool from a selection folder, for train.py.

    Raises InputError if the mask was made for another data set, another tokenizer or the other kind of student, if it
    is damaged, or if nothing is selected: no training can happen on a mask that does not belong to its tokens.
    """
    folder = Path(folder)
    made = read_json(folder / "config.json")
    if "model_type" in made:  # RRT's
        raise InputError(f"{folder}: a model folder, not a selection; go on from it with --model={folder}")
    if made.get("tokenizer_hash") != data.meta["tokenizer_hash"]:
        raise InputError(f"{folder}: this selection was made with another tokenizer than {data.folder}")
    if made.get("sha256") != data.sha256:
        raise InputError(f"{folder}: this selection was made for another data set than {data.folder}")
    if made.get("kind") != kind:
        student = "an autoregressive" if kind == "keep" else "a diffusion"
        raise InputError(f"{folder}: kind is {made.get('kind')}; {student} student needs select.py --kind={kind}")
    try:
        mask = np.load(folder / "mask.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder / 'mask.npy'}: cannot be read ({error}); run select.py again") from None
    response = data.response_mask()
    if mask.dtype != bool or mask.shape != response.shape or (mask & ~response).any():
        raise InputError(f"{folder}: mask.npy is no mask of the response tokens of {data.folder}; run select.py again")
    if not mask.any():
        raise InputError(f"{folder}: the selection is empty, there is nothing to train on")
    return mask


# with a student of the other kind (autoregressive, diffusion) than pass 1's, no other key of pass 1 is inherited
