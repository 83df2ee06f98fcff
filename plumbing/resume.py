"""Exact resume: after a kill, a full disk or a dead node, --resume=true continues as if undisturbed.

    python train.py --run=sft --resume_every=10 ...   # a state every 10 steps, before recording, at the end
    python train.py --run=sft --resume=true           # continue from the newest complete state

    runs/sft/resume/000040/*.safetensors    parameters and AdamW's two moments after 40 updates
    runs/sft/resume/000040/manifest.json    size and sha256 of each of these files

torch.distributed.checkpoint writes the tensors as the processes held them and cuts them anew for
another number of processes; as safetensors, so nothing is unpickled. A state is written aside,
flushed, listed in its manifest, and only then gets its name; older states go after that. Nothing
random is stored: the order of examples, the noise and the sampling are pure functions of (seed,
step, example). Whatever log, trajectory/ and checkpoints/ hold beyond the state is removed and done
again, so the resumed run is the uninterrupted one: bit for bit on as many CPU processes and threads.
Next: plumbing/memory.py.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from hf.weights import fingerprint
from plumbing.config import InputError, read_json, whole_file, whole_folder, write_json
from plumbing.parallel import gather, on_process_0, rank, reshard, stop, world_size
from plumbing.runs import checkpoint, mask_hash

# keys that change no result, except by rounding: a resumed run may have others
FREE = {
    "resume_every",
    "keep_resume_states",
    "micro_batch_size",
    "sample_batch_size",
    "device",
    "compile",
    "packing",
    "checkpoint_activations",
    "max_row_tokens",
    "timeout",
    "lock",
    "dry_run",
    "gpus",
    "gpu_memory_gib",
}
# keys of the updates only: what was recorded at a checkpoint before stays true when they change
OF_UPDATES = {
    "steps",
    "batch_size",
    "optimizer",
    "lr",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "beta1",
    "beta2",
    "clip",
    "record_every",
    "save_every",
    "online",
    "watch",
    "watch_every",
    "probe",
    "rule",
}


@dataclass
class Start:
    """What a run begins with: nothing, or what it had at its newest state."""

    step: int = 0  # updates that were made
    lowest: tuple | None = None  # (train accuracy, step), the lowest recorded after step 0
    latest: tuple | None = None  # (train accuracy, step), the last one recorded
    recorded: bool = False  # was this step recorded already?


# -------------------------------------------------------------------------------------------------
# One process a run


@contextmanager
def lock(folder, wanted=True):
    """No other process trains in `folder` while this block runs.

    The kernel drops the lock when the process dies. If the block fails before anything was written,
    the folder is removed again. wanted = False: no lock, for file systems that have none.
    Raises InputError if another process holds the lock, or the file system has no locks.
    """
    file = None

    def take():
        nonlocal file
        folder.mkdir(parents=True, exist_ok=True)
        if not wanted:
            return
        file = open(folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is training this run right now"
            ) from None
        except OSError as error:  # no flock: some network and cluster file systems
            raise InputError(
                f"{folder}: this file system cannot lock ({error.strerror}); --lock=false trains "
                "without, if nothing else trains this run"
            ) from None

    def leave():
        if file is not None:
            file.close()
        left = {path.name for path in folder.iterdir()} if folder.is_dir() else None
        if left is not None and left <= {"lock"}:
            (folder / "lock").unlink(missing_ok=True)
            os.removedirs(folder)

    try:
        on_process_0(take)
        yield
    finally:
        if rank() == 0:
            leave()


# -------------------------------------------------------------------------------------------------
# A state: written, found, read


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's; plain SGD keeps nothing


def tensors(student, optimizer):
    """{name: tensor} of all that an update reads and writes, and the student's buffers.

    AdamW's count of updates is the step itself.
    """
    found = dict(student.named_buffers())
    for name, parameter in student.named_parameters():
        found[name] = parameter.detach()
        for moment in MOMENTS if isinstance(optimizer, torch.optim.AdamW) else ():
            found[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return found


FILE_BYTES = 2**28  # about how much of a process's share goes into one file


def files_of(state):
    """{name: number of its file, from 1}. While the writer writes a file it holds it twice more."""
    numbers = {}
    number, size = 1, 0
    for name, tensor in state.items():
        if size >= FILE_BYTES * world_size():
            number, size = number + 1, 0
        numbers[name] = number
        size += tensor.numel() * tensor.element_size()
    return numbers


def save(folder, student, optimizer, step, keep):
    """Write resume/<step>/; then remove all but the newest `keep` states. Collective.

    Raises InputError, and leaves nothing behind, if it cannot be written.
    """
    home = folder / "resume"
    aside = home / f".{step:06d}.tmp"
    path = home / f"{step:06d}"

    def clear():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def complete():
        write_json(aside / "manifest.json", {"step": step, "files": files})
        flush_folder(aside)
        forget(path)
        os.rename(aside, path)
        flush_folder(home)
        for old in states(folder)[keep:]:
            forget(old)

    reshard(student)  # the optimizer's state is that of the shards
    try:
        on_process_0(clear)
        state = tensors(student, optimizer)
        writer = HuggingFaceStorageWriter(str(aside), files_of(state), save_distributed=True)
        alone = not dist.is_initialized()
        with one_line(f"{path}: cannot be written; the states before it are untouched"):
            dcp.save(state, storage_writer=writer, no_dist=alone)
        files = hashes(aside)
        on_process_0(complete)
    finally:
        if rank() == 0:  # half a state is of no use, and its room may be what the disk lacks
            shutil.rmtree(aside, ignore_errors=True)


def states(folder):
    """The folders in resume/, newest first."""
    return sorted((folder / "resume").glob("[0-9]*"), reverse=True)


def has(folder, step):
    """Is there a state of this step? Collective."""
    return on_process_0((folder / "resume" / f"{step:06d}").exists)


def newest(folder):
    """The step of the newest complete state; 0 if there is none, so that the run begins again.

    Names every damaged file. Raises InputError if there are states and all of them are damaged.
    """
    found = on_process_0(lambda: [str(path) for path in states(folder)])
    for path in map(Path, found):
        problem = damage(path)
        if problem is None:
            return int(path.name)
        if rank() == 0:
            print(f"{problem}; looking for an older state")
    if found:
        stop(f"{folder / 'resume'}: every state is damaged; delete that folder to begin again at step 0")
    return 0


def damage(path):
    """What is wrong with a state, naming the file, or None: size and sha256 against its manifest."""
    manifest = on_process_0(lambda: read_manifest(path))
    if isinstance(manifest, str):
        return manifest
    found = hashes(path)
    for name, (size, sha256) in manifest["files"].items():
        if name not in found:
            return f"{path / name}: missing"
        if found[name][0] != size:
            return f"{path / name}: damaged ({found[name][0]} bytes, not {size})"
        if found[name][1] != sha256:
            return f"{path / name}: damaged (its sha256 is not the manifest's)"
    return None


def read_manifest(path):
    """The manifest, or what is wrong with it as text."""
    try:
        manifest = read_json(path / "manifest.json")
        pairs = all(len(pair) == 2 for pair in manifest["files"].values())
        if manifest["step"] == int(path.name) and pairs:
            return manifest
    except InputError as error:
        return str(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    return f"{path / 'manifest.json'}: damaged"


def load(folder, step, student, optimizer):
    """Fill student and optimizer with the state of `step`, each process its own part."""
    for p in student.parameters() if isinstance(optimizer, torch.optim.AdamW) else ():
        moments = {moment: torch.zeros_like(p) for moment in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    path = folder / "resume" / f"{step:06d}"
    reader = HuggingFaceStorageReader(str(path))
    alone = not dist.is_initialized()
    with one_line(f"{path}: not a state of this student"):
        dcp.load(tensors(student, optimizer), storage_reader=reader, no_dist=alone)


@contextmanager
def one_line(message):
    """What torch.distributed.checkpoint reports from all processes, as one line from one of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when there is only one process
            yield
    except CheckpointException as error:
        stop(f"{message} ({next(iter(error.failures.values()))[0]})")


def hashes(path):
    """{file: [bytes, sha256]} of a folder's safetensors; the processes share the work."""
    mine = {}
    names = sorted(file.name for file in path.glob("*.safetensors"))
    for name in names[rank() :: world_size()]:
        with open(path / name, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            mine[name] = [file.tell(), digest.hexdigest()]
    return {name: pair for part in gather(mine) for name, pair in part.items()}


def flush_folder(path):
    """A new name is on the disk only when its folder is."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def forget(path):
    """Remove a state. Renamed before it is deleted: a half-deleted state is never found."""
    if path.exists():
        gone = path.with_name(f".{path.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone)


def fork(source, folder, step):
    """Let the run `folder` begin where the run `source` stands: its state after `step` updates, and
    the log of these. What was recorded on the way stays with `source`. Collective.

    config.json is not written yet: a run that was killed in here is forked again.
    """

    def copy():
        lines = [line for line, entry in read_log(source / "log.jsonl", step) if "event" not in entry]
        with whole_file(folder / "log.jsonl") as aside:
            aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        here = f"resume/{step:06d}"
        with whole_folder(folder / here, sign="manifest.json") as aside:
            shutil.copytree(source / here, aside, dirs_exist_ok=True)

    on_process_0(copy)


# -------------------------------------------------------------------------------------------------
# The log


class Log:
    """log.jsonl, one line per update and per record; only process 0 writes.

    Raises InputError for a line that cannot be written, such as on a full disk.
    """

    def __init__(self, folder):
        self.path = folder / "log.jsonl"
        self.file = None

    def __enter__(self):
        if rank() == 0:
            self.file = open(self.path, "a", encoding="utf-8")
        return self

    def write(self, line):
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); make room, then --resume=true"
            ) from None

    def __exit__(self, *error):
        if self.file is not None:
            try:
                self.file.close()
            except OSError:
                pass  # the line that could not be written was reported


# -------------------------------------------------------------------------------------------------
# The run folder around a state


def start(run, step, checked):
    """Write config.json, and take the folder back to `step` -> Start. Collective.

    checked: what `check` said of this run.
    """
    now, changes = checked
    write_config(run, now, changes)
    stale = any(key not in OF_UPDATES for key, _, _ in changes)

    def back():
        lowest, latest = rewind(run.cfg, run.folder, step, stale)
        return lowest, latest, recorded_at(run.folder, step)

    lowest, latest, recorded = on_process_0(back)
    return Start(step, lowest, latest, recorded)


def clean(folder):
    """Remove what a killed process left half-written, before anything new needs the room.

    Only what has this program's own names for that: other dotfiles are the user's, or the file
    system's. What an interrupted recording has left (PARTIAL) is continued, so it stays.
    """

    def remove():
        for name in (".", "checkpoints", "trajectory", "resume"):
            for path in (folder / name).glob(".*"):
                if HALF_WRITTEN.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    on_process_0(remove)


# .000040.tmp and .000040.old of a state; .<name>.<process id>.tmp and .old of plumbing/config.py
HALF_WRITTEN = re.compile(r"\..*\d\.(tmp|old)")
PARTIAL = (".logprob", ".answers")  # a recording that was interrupted: continued, not begun again
OF_A_STEP = re.compile(r"\.?(\d+)\..+")  # in trajectory/: what was recorded at a step


def rewind(cfg, folder, step, stale=False):
    """Take the run folder back to when the run had made `step` updates.

    stale: what was recorded at `step` is no longer true, because the keys have changed.
    Returns the lowest (accuracy, step) and the last one, each None if there is none.
    Raises InputError if log.jsonl lacks a line.
    """
    log = folder / "log.jsonl"
    kept = read_log(log, step)
    here = folder / "trajectory" / f"{step:06d}.npz"
    if stale or not here.exists():
        kept = [(line, e) for line, e in kept if "event" not in e or e["step"] < step]
    with whole_file(log) as aside:
        text = "".join(line + "\n" for line, _ in kept)
        aside.write_text(text, encoding="utf-8")

    records = []
    for _, entry in kept:
        if entry.get("event") == "record" and entry["accuracy"] is not None:
            records.append((entry["accuracy"], entry["step"]))
    after_0 = [(accuracy, at) for accuracy, at in records if at > 0]
    lowest = min(after_0, default=None)  # ties go to the earliest
    recorded = any(e["step"] == step for _, e in kept if "event" in e)

    for path in (folder / "checkpoints").glob("[0-9]*"):
        if not is_kept(cfg, folder, int(path.name), step, lowest):
            shutil.rmtree(path)
    for path in (folder / "trajectory").glob("*"):
        named = OF_A_STEP.fullmatch(path.name)
        if not named:
            continue  # the user's
        at = int(named[1])
        beyond = at > step and path.suffix not in PARTIAL
        unfinished = at == step and not recorded and path.suffix not in PARTIAL
        if beyond or unfinished or (stale and at >= step):
            path.unlink()
    damaged = [path for path in states(folder) if int(path.name) > step]
    for path in [*damaged, *states(folder)[len(damaged) + cfg.keep_resume_states :]]:
        forget(path)  # or a later resume would start from a damaged one
    return lowest, records[-1] if records else None


def read_log(log, step):
    """The lines of log.jsonl up to `step`: [(line, what it says)]; InputError if one is missing."""
    kept = []
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number == text.count("\n") + 1:
                break  # the kill came in the middle of this line
            raise InputError(f"{log}, line {number}: not JSON; the log is damaged") from None
        if entry["step"] <= step:
            kept.append((line, entry))
    updates = [entry["step"] for _, entry in kept if "event" not in entry]
    if updates != list(range(1, step + 1)):
        missing = next(s for s in range(1, step + 2) if updates[s - 1 : s] != [s])
        raise InputError(
            f"{log}: the line of step {missing} is missing or there twice; the log is damaged"
        )
    return kept


def recorded_at(folder, step):
    """Does the log say that this step was recorded?"""
    return any(e["step"] == step for _, e in read_log(folder / "log.jsonl", step) if "event" in e)


def is_kept(cfg, folder, at, step, lowest):
    """Does a run that is taken back to `step` keep the checkpoint of step `at`?"""
    if at > step:
        return False
    asked_for = cfg.save_every and at % cfg.save_every == 0
    return bool(asked_for or at in ends(folder) or (lowest and at == lowest[1]))


def ends(folder):
    """The last step that was asked for, and those asked for before it was changed."""
    made = read_json(folder / "config.json")
    found = {made["config"]["steps"]}
    for once in made.get("resumed", []):
        found |= {then for key, then, _ in once["changes"] if key == "steps"}
    return found


def remove_checkpoint(cfg, folder, lowest):
    """Remove the former bottleneck's checkpoint, unless it is kept for another reason."""

    def remove():
        if not is_kept(cfg, folder, lowest[1], lowest[1], None):
            shutil.rmtree(checkpoint(folder, lowest[1]), ignore_errors=True)

    if lowest:
        on_process_0(remove)


# -------------------------------------------------------------------------------------------------
# config.json


def refuse_existing(cfg, folder):
    """Raises InputError if the run exists and is not to be resumed. Collective."""
    if not cfg.resume and on_process_0((folder / "config.json").exists):
        stop(
            f"{folder}: this run exists; --resume=true goes on with it, "
            "or give --run another name, or delete the folder"
        )


def check(run):
    """May this run begin, or go on? -> what config.json is to say, the changes since it was written.

    Asked before minutes go into reading weights; nothing is written or removed. The changes are
    [(key, then, now)]. An existing run is never overwritten: --resume=true continues it if keys,
    data, tokenizer and selection are unchanged; --allow_changes=true whatever they are, and
    config.json says so. Raises InputError otherwise. Collective.
    """
    cfg = run.cfg
    refuse_existing(cfg, run.folder)
    now = describe(run)

    def compare():
        path = run.folder / "config.json"
        if not path.exists():
            return []
        changes = differences(read_json(path), now, defaults_of(cfg))
        if changes and not cfg.allow_changes:
            text = "; ".join(f"{key}: then {then}, now {value}" for key, then, value in changes)
            raise InputError(
                f"{run.folder}: not the run it was ({text}); --allow_changes=true goes on all the same"
            )
        return changes

    return now, on_process_0(compare)


def write_config(run, now, changes):
    """Write runs/<run>/config.json, or add to it that the run was resumed. Collective."""
    path = run.folder / "config.json"
    if run.cfg.record_every and not on_process_0(path.exists):
        # by these a later run of the same student knows that it need not record step 0 again
        now["weights"] = hashes(run.source)

    def write():
        if not path.exists():
            (run.folder / "trajectory").mkdir(exist_ok=True)
            write_json(path, now)
            return
        before = read_json(path)
        if now["git"] != before.get("git"):
            print(
                f"the code is not the one that started this run: {before.get('git')}, "
                f"now {now['git']}"
            )
        once = {"command": sys.argv, "git": now["git"], "changes": changes}
        first = {key: before[key] for key in ("command", "git", "weights") if key in before}
        write_json(path, {**now, **first, "resumed": [*before.get("resumed", []), once]})

    on_process_0(write)


def describe(run):
    """What config.json says of a run: its keys, the command, versions, hashes of all it reads."""
    keys = {k: v for k, v in asdict(run.cfg).items() if k not in ("resume", "allow_changes")}
    shape = json.dumps(run.shape.raw, sort_keys=True)
    masks = [mask for mask in (run.selected, run.forced) if mask is not None]
    return {
        "config": keys,
        "command": sys.argv,
        "git": git_state(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "sha256": run.train_set.sha256,
        "tokenizer_hash": run.tokenizer.hash,
        "eval_sha256": run.eval_set and run.eval_set.sha256,
        "selection_sha256": " ".join(mask_hash(mask) for mask in masks) or None,
        "model_sha256": hashlib.sha256(shape.encode()).hexdigest(),
        "weights_sha256": on_process_0(lambda: weights_hash(run.source)),
    }


def weights_hash(source):
    """The fingerprint of theta_0; None if its weights are gone: a resumed run does without them."""
    try:
        return fingerprint(source)
    except InputError:
        return None


def git_state():
    """The commit this code is from, or "" without git."""
    root = Path(__file__).parent.parent
    words = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


HASHED = {
    "sha256": "the training data",
    "eval_sha256": "the data of eval_data",
    "tokenizer_hash": "the tokenizer",
    "selection_sha256": "the selection's mask",
    "model_sha256": "the student's config.json",
    "weights_sha256": "the student's weights",
}


def defaults_of(cfg):
    """{key: default} of a Config."""
    return {key.name: key.default for key in fields(cfg)}


def differences(before, now, defaults):
    """[(key, then, now)] of two config.json that would make the resumed run another run.

    A key that the older one lacks is new in the code; then its default was in force.
    """
    found = []
    for key, value in now["config"].items():
        then = before["config"].get(key, defaults[key])
        if key not in FREE and then != value:
            found.append((key, then, value))
    for key, label in HASHED.items():
        if key == "weights_sha256" and None in (before.get(key), now.get(key)):
            continue  # a run of an older version, or one whose theta_0 is gone
        if before.get(key) != now.get(key):
            found.append((label, before.get(key), now.get(key)))
    if before["versions"]["torch"] != now["versions"]["torch"]:
        found.append(("torch", before["versions"]["torch"], now["versions"]["torch"]))
    return found


def records_alike(before, now, defaults, of_training):
    """Would two runs record the same of theta_0? Names and paths may differ, contents may not.

    defaults: defaults_of their Config. of_training: more keys that have no effect on what is recorded.
    """
    if before.get("weights") is None or before["weights"] != now.get("weights"):
        return False
    free = OF_UPDATES | {"run", "model", "data", "eval_data", "selection", "the selection's mask"}
    return all(key in free | of_training for key, _, _ in differences(before, now, defaults))
