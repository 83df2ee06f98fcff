"""The run folder: where things lie in it, and how they are read, checked and inherited.

    runs/sft/
      config.json                 the keys it was trained with, command line, versions
      log.jsonl                   one object per step
      checkpoints/000020/         an ordinary Hugging Face folder
      trajectory/000020.npz       log-probability of every response token, train accuracy
      selection/t3s/              mask.npy, stats.json, config.json
      eval/                       sampled answers with their grades
      resume/000020/              all that an update reads: plumbing/resume.py
      lock                        held while a process trains the run

No torch, because select.py and report.py read runs without a model. Next: plumbing/selection.py.
"""

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path, PurePath

import numpy as np

from hf.families import local_folder, read_config
from plumbing.config import InputError, read_json

# meta.json's keys for what rendered a data set's text; a selection carries them along
TEMPLATE = ("template_hash", "template_kwargs", "date")
# A diffusion student trained on an autoregressive student's selection (or the reverse) inherits
# only these keys: they describe the experiment. A learning rate that suits one kind of student
# says nothing about the other. Nor do temperature, top_p and top_k, which were found for answers
# written one token after the other, or for answers written in any order: give them again.
OF_THE_EXPERIMENT = (
    "data",
    "eval_data",
    "seed",
    "record_every",
    "save_every",
    "samples",
    "max_new_tokens",
)
NEVER_INHERITED = ("run", "selection", "online", "watch", "probe", "rule", "resume", "allow_changes", "dry_run")
OF_ONE_CALL = ("resume", "allow_changes", "dry_run")
RENAMED = {"keep_checkpoints": "keep_resume_states"}  # in the config.json of older runs


# -------------------------------------------------------------------------------------------------
# Names and keys


def run_folder(name):
    """The folder of a run, runs/<name>; the name a/b is fine.

    Raises InputError for a name that leads out of runs/.
    """
    path = PurePath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise InputError(
            f"--run={name}: must be the name of a folder in runs/, without .. or a leading /"
        )
    return Path("runs") / path


def run_keys(folder):
    """The keys that a run was trained with, from its config.json.

    Raises InputError if they are not there.
    """
    path = Path(folder) / "config.json"
    keys = read_json(path).get("config")
    if not isinstance(keys, dict):
        raise InputError(f'{path}: not a run\'s config.json, it has no "config"')
    return keys


def read_keys(folder, config_class):
    """run_keys, less those of a single call.

    Raises InputError for a key that `config_class` does not have.
    """
    found = {RENAMED.get(key, key): value for key, value in run_keys(folder).items()}
    unknown = sorted(set(found) - {field.name for field in fields(config_class)})
    if unknown:
        raise InputError(f"{folder / 'config.json'}: unknown key {unknown[0]}")
    return {key: value for key, value in found.items() if key not in OF_ONE_CALL}


def of_pass_1(given, config_class):
    """What pass 2 inherits from its selection's run -> keys; differences are printed.

    Of several selections the first one's run counts.
    A student of the same kind inherits every key but --run and --selection. A student of the
    other kind (a diffusion student, autoregressive selector) inherits OF_THE_EXPERIMENT.
    Raises InputError if the selection lies elsewhere or forces tokens of an autoregressive student.
    """
    folder, *others = (Path(name) for name in given["selection"].split(","))
    if folder.parent.name != "selection":
        raise InputError(
            f"--selection={folder}: must be a folder runs/<run>/selection/<name>, "
            "as select.py writes it"
        )
    pass1 = read_keys(folder.parent.parent, config_class)
    made = read_json(folder / "config.json")
    # a selection made with select.py --student=S --data=D is for S, not for the run's own model
    student = made.get("student") or pass1["model"]
    model = given.get("model", student)
    diffusion_before = read_config(local_folder(pass1["model"])).is_diffusion
    diffusion_now = read_config(local_folder(model)).is_diffusion
    kinds = [read_json(each / "config.json").get("kind") for each in (folder, *others)]
    if "force" in kinds and not diffusion_now:
        raise InputError(
            f"{given['selection']}: a force selection is for a diffusion student, "
            f"and {model} is autoregressive; name a diffusion student with --model"
        )

    inherited = {key: value for key, value in pass1.items() if key not in NEVER_INHERITED}
    same_kind = diffusion_before == diffusion_now and not made.get("student")
    if same_kind and not given.get("allow_changes"):
        check_weights(folder.parent.parent, model)
    if diffusion_before != diffusion_now:
        inherited = {key: pass1[key] for key in OF_THE_EXPERIMENT}
        names = {True: "a diffusion", False: "an autoregressive"}
        shown = [f"{key}={value}" for key, value in inherited.items() if key not in given]
        print(
            f"pass 1 trained {names[diffusion_before]} student, "
            f"this is {names[diffusion_now]} one; "
            f"inherited: {' '.join(shown)}; all other keys are the given ones or the defaults"
        )
    if made.get("student"):
        inherited |= {"model": student}
        print(f"selector transfer: tokens chosen by {pass1['model']}, student {model}")
    if made.get("data"):
        inherited |= {"data": made["data"]}
    for key, value in given.items():
        if key in inherited and inherited[key] != value:
            print(f"differs from pass 1: {key} = {value} (pass 1: {inherited[key]})")
    return inherited


def check_weights(run, model):
    """Raises InputError if `model` has other weights than run began with: its deltas are of those.

    Runs of older versions recorded none; then nothing is compared.
    """
    from hf.weights import fingerprint  # needs torch, which selecting and reporting do not

    before = read_json(run / "config.json").get("weights_sha256")
    now = fingerprint(local_folder(model))
    if before not in (None, now):
        raise InputError(
            f"--model={model}: not the weights that {run} began with and its selection was made on "
            f"(sha256 {before[:12]} there, {now[:12]} here); --allow_changes=true trains all the same"
        )


# -------------------------------------------------------------------------------------------------
# A student and its data


def check_tokenizer(data, tokenizer):
    """Raises InputError unless all tokens that occur in `data` are the same to `tokenizer`.

    Another tokenizer will do if it differs in tokens that do not occur (a sibling's renamed special
    token): it merges bytes in the same way, and each id that occurs is looked up in both. The one
    that the data was made with is found by meta.json.
    """
    if data.meta["tokenizer_hash"] == tokenizer.hash:
        return
    from hf.tokenizer import load_tokenizer

    again = f"run data.py again with --tokenizer={tokenizer.folder}"
    try:
        own = load_tokenizer(local_folder(data.meta["tokenizer"]))
        unchanged = own.hash == data.meta["tokenizer_hash"] and own.merges_like(tokenizer)
    except (InputError, KeyError):
        unchanged = False
    if not unchanged:
        raise InputError(f"{data.folder}: made with another tokenizer than the student's; {again}")
    for i in np.unique(data.tokens).tolist():
        one, other = own.spelling(i), tokenizer.spelling(i)
        if one != other:
            raise InputError(
                f"{data.folder}: made with another tokenizer than the student's: token {i} is {one} "
                f"there and {other} here; {again}"
            )


def check_fits(shape, data):
    """Raises InputError for an id without a row in the embedding, and for too long an example."""
    if data.tokens.max(initial=0) >= shape.vocab_size:
        at = int(np.argmax(data.tokens >= shape.vocab_size))
        row = int(np.searchsorted(data.spans[:, 2], at, side="right"))
        raise InputError(
            f"{data.folder}: example {data.examples[row]['id']} has the token {data.tokens[at]}, and "
            f"the student's embedding has {shape.vocab_size} rows (vocab_size of its config.json)"
        )
    sizes = data.spans[:, 2] - data.spans[:, 0]
    context = shape.max_position_embeddings  # 0: unknown
    if 0 < context < sizes.max(initial=0):
        raise InputError(
            f"{data.folder}: example {data.examples[int(sizes.argmax())]['id']} of {sizes.max()} "
            f"tokens is longer than the model's context of {context}; leave such out with "
            f"data.py --max_tokens={context}"
        )


# -------------------------------------------------------------------------------------------------
# What a run wrote


def checkpoint(folder, step):
    """Where theta_step lies."""
    return folder / "checkpoints" / f"{step:06d}"


def find_checkpoint(name, trained, step):
    """A checkpoint of run `name` -> its folder, its step.

    step -1 is the last one, step 0 the model that training started from; `trained` is run_keys.
    Raises InputError if it was not kept.
    """
    folder = run_folder(name) / "checkpoints"
    if step == 0:
        return Path(trained["model"]), 0
    kept = sorted(int(path.name) for path in folder.glob("[0-9]*"))
    if not kept or step not in [-1, *kept]:
        which = f" of step {step}" if step > 0 else ""
        have = ", ".join(map(str, kept)) or "none"
        raise InputError(f"{folder}: no checkpoint{which} (there: {have})")
    if step == -1:
        step = kept[-1]
    return folder / f"{step:06d}", step


def records(run):
    """What a run recorded, one value per recorded checkpoint -> {key: array}.

    The keys are step, nll (nats per response token), accuracy, and eval_accuracy.
    A key without values (eval_accuracy without --eval_data) is left out.
    Raises InputError if nothing was recorded.
    """
    path = run_folder(run) / "log.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no such file; is {run} the name of a run?")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"{path}: not JSON lines ({error})") from None
    lines = [line for line in lines if line.get("event") == "record"]
    if not lines:
        raise InputError(f"{path}: nothing was recorded; train with --record_every")
    keys = ("step", "nll", "accuracy", "eval_accuracy")
    present = [key for key in keys if lines[0].get(key) is not None]
    return {key: np.array([line[key] for line in lines], dtype=np.float64) for key in present}


def load_trajectory(run):
    """runs/<run>/trajectory/*.npz -> {step: arrays}; each array is read when it is asked for.

    logprob (n_tokens,) float32 nats, nan at prompts; entropy likewise (autoregressive students);
    correct (n_examples,), nan for problems that were not asked; accuracy; step; sha256;
    tokenizer_hash. Raises InputError if there are none, or if they describe different data.
    """
    folder = run_folder(run) / "trajectory"
    found = {}
    for path in sorted(folder.glob("[0-9]*.npz")):
        try:
            found[int(path.stem)] = np.load(path, allow_pickle=False)
            found[int(path.stem)]["accuracy"]
        except Exception as error:  # a damaged file raises a dozen kinds from zipfile and numpy
            raise InputError(f"{path}: not a complete trajectory file ({error})") from None
    if not found:
        raise InputError(f"{folder}: no trajectory; run train.py --run={run} with --record_every")
    if len({str(arrays["sha256"]) for arrays in found.values()}) > 1:
        raise InputError(f"{folder}: the files are not all about the same data")
    return found


SAMPLED_ALIKE = ("temperature", "top_p", "top_k", "max_new_tokens", "samples")


def with_evaluations(run, trajectory, train_set):
    """The trajectory, with accuracy and correct taken from eval.py's answers to the training problems.

    -> {step: arrays} of the steps that were recorded and evaluated. For runs whose checkpoints
    another engine has answered for: train.py --record_problems=-1 --save_every=N, then eval.py
    --run=RUN --step=N --data=DATA --server=URL for each, step 0 included. Raises InputError if
    fewer than two steps have an evaluation, if one leaves problems out, or if they were not sampled alike.
    """
    folder = run_folder(run) / "eval"
    ids = [example["id"] for example in train_set.examples]
    found = {}
    sampled = {}
    for path in sorted(folder.glob("*-[0-9]*.json")):
        match = re.search(r"-([0-9]{6})(?:-[a-z_]+=.*)?$", path.stem)
        summary = read_json(path)
        if not match or summary.get("sha256") != train_set.sha256:
            continue
        step = int(match[1])
        if step in found:
            raise InputError(f"{folder}: step {step} was evaluated more than once, as {path.name} too; keep one")
        right = {}
        for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            right.setdefault(row["id"], []).append(row["correct"])
        missing = [name for name in ids if name not in right]
        if missing:
            what = f"{len(missing)} problems of {train_set.folder} were not answered"
            raise InputError(f"{path}: {what}, {missing[0]} for one")
        found[step] = np.array([np.mean(right[name]) for name in ids], dtype=np.float32)
        sampled[step] = {key: summary[key] for key in SAMPLED_ALIKE if key in summary}
    steps = [step for step in found if step in trajectory]
    if 0 not in steps or len(steps) < 2:
        recorded = ", ".join(map(str, trajectory))
        raise InputError(
            f"{folder}: --accuracy=eval needs evaluations on {train_set.folder} of step 0 and of others that were "
            f"recorded ({recorded}); there are {', '.join(map(str, sorted(found))) or 'none'}"
        )
    for step in steps:
        for key in sampled[step].keys() & sampled[0].keys():  # a file of answers does not say how it was sampled
            if sampled[step][key] != sampled[0][key]:
                values = f"{key} {sampled[step][key]} and {sampled[0][key]}"
                raise InputError(f"{folder}: step {step} was not sampled as step 0 was: {values}")
    changed = {}
    for step in sorted(steps):
        arrays = {key: trajectory[step][key] for key in trajectory[step]}
        changed[step] = arrays | {"correct": found[step], "accuracy": np.float64(found[step].mean())}
    return changed


# -------------------------------------------------------------------------------------------------
# Selections


def load_selections(names, data, is_diffusion):
    """The folders in `names`, separated by commas -> {"keep": mask or None, "force": mask or None}.

    An autoregressive student takes one of kind keep; a diffusion student one of each kind at most.
    Raises InputError as load_mask does, and for two of one kind.
    """
    found = {"keep": None, "force": None}
    for name in filter(None, names.split(",")):
        kind = "keep"
        if is_diffusion:
            kind = read_json(Path(name) / "config.json").get("kind", "keep")
        if found.get(kind) is not None:
            raise InputError(f"--selection={names}: two of kind {kind}; a student takes one of each kind")
        found[kind] = load_mask(name, data, kind)
    return found


def load_mask(folder, data, kind="keep"):
    """A selection folder -> (n_tokens,) as stored: bool, or float32 >= 0, a weight in the loss.

    data  the data.Data to train on
    kind  "keep", or, for diffusion students only, "force"

    Raises InputError if the selection was made for other data, another tokenizer, under another
    chat template or for the other kind of student, if it is damaged, or if nothing is selected.
    """
    folder = Path(folder)
    made = read_json(folder / "config.json")
    if "model_type" in made:  # RRT writes a model where the other rules write a mask
        raise InputError(
            f"{folder}: a model folder, not a selection; go on from it with --model={folder}"
        )
    if made.get("tokenizer_hash") != data.meta["tokenizer_hash"]:
        raise InputError(
            f"{folder}: this selection was made with another tokenizer than {data.folder}"
        )
    for key in TEMPLATE:
        if made.get(key) != data.meta.get(key):
            raise InputError(
                f"{folder}: this selection was made under another chat template than {data.folder} "
                f"({key} {made.get(key)!r} there, {data.meta.get(key)!r} here); run select.py again"
            )
    if made.get("sha256") != data.sha256:
        raise InputError(
            f"{folder}: this selection was made for another data set than {data.folder}"
        )
    if made.get("kind") != kind or kind not in ("keep", "force"):
        student = "an autoregressive" if kind == "keep" else "a diffusion"
        raise InputError(
            f"{folder}: kind is {made.get('kind')}; {student} student needs select.py --kind={kind}"
        )
    try:
        mask = np.load(folder / "mask.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{folder / 'mask.npy'}: cannot be read ({error}); run select.py again"
        ) from None
    check_mask(folder, mask, data, kind)
    return mask


def check_mask(folder, mask, data, kind):
    """Raises InputError unless `mask` is a selection of data's response tokens."""
    response = data.response_mask()
    is_weight = mask.dtype == np.float32
    if (
        mask.shape != response.shape
        or not (is_weight or mask.dtype == bool)
        or mask[~response].any()
    ):
        raise InputError(
            f"{folder}: mask.npy is no mask of the response tokens of {data.folder}; "
            "run select.py again"
        )
    if is_weight and kind == "force":
        raise InputError(f"{folder}: mask.npy holds weights, and a force selection must be bool")
    if is_weight and not (np.isfinite(mask).all() and (mask >= 0).all()):
        raise InputError(f"{folder}: mask.npy holds weights that are negative or not finite")
    if not mask.any():
        raise InputError(f"{folder}: the selection is empty, there is nothing to train on")


def mask_hash(mask):
    """What a resumed run compares, to notice that its selection has changed."""
    stored = np.packbits(mask) if mask.dtype == bool else mask
    return hashlib.sha256(stored.tobytes()).hexdigest()
