"""Exact resume: after a kill, a full disk or a dead node, `--resume=true` goes on as if nothing had happened.

    python train.py --run=sft --resume_every=10 ...      # a resume state every 10 steps, and at the end or on Ctrl-C
    python train.py --run=sft --resume=true              # go on from the newest complete one, with the run's own keys

    runs/sft/resume/000040/*.safetensors    parameters and AdamW's two moments after 40 updates, as processes held them
    runs/sft/resume/000040/manifest.json    size and sha256 of each of these files

torch.distributed.checkpoint writes and reads the tensors and cuts them anew for another number of processes; as
safetensors, so nothing is unpickled. A state is written aside, flushed, listed in its manifest and only then gets its
name; older ones go after that. Nothing random is stored: the order of examples, the noise and the sampling are pure
functions of (seed, step, example). What the log, trajectory/ and checkpoints/ hold beyond the state is forgotten and
done again, so that a resumed run is the uninterrupted one: bit for bit on as many CPU processes and threads.
Next: select.py.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from plumbing.config import InputError, read_json, whole_file, write_json
from plumbing.parallel import gather, on_process_0, rank, stop, world_size
from plumbing.runs import mask_hash

# keys that change no result (but rounding), so a resumed run may have others
FREE = {"resume_every", "keep_checkpoints", "micro_batch_size", "sample_batch_size", "device", "compile", "packing",
        "checkpoint_activations", "max_row_tokens", "timeout", "dry_run", "gpus", "gpu_memory_gib"}  # fmt: skip


@contextmanager
def lock(folder):
    """Nobody else trains in `folder` while this block runs. The kernel lets go of the lock when the process dies."""
    file = None

    def take():
        nonlocal file
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is training this run right now") from None

    try:
        on_process_0(take)
        yield
    finally:
        if file is not None:
            file.close()


# ---------------------------------------------------------------------------------------------------------------------
# A state: written, found, read


def tensors(student, optimizer):
    """{name: tensor} of all that an update reads and writes; AdamW's count of updates is the step itself."""
    found = {}
    for name, parameter in student.named_parameters():
        found[name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return found


def save(folder, student, optimizer, step, keep):
    """Write resume/<step>/; then forget all but the newest `keep` states. Every process must call this."""
    home = folder / "resume"
    aside, path = home / f".{step:06d}.tmp", home / f"{step:06d}"

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

    on_process_0(clear)
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    with one_line(f"{path}: cannot be written; the states before it are untouched"):
        dcp.save(tensors(student, optimizer), storage_writer=writer, no_dist=not dist.is_initialized())
    files = hashes(aside)
    on_process_0(complete)


def states(folder):
    """The folders in resume/, newest first."""
    return sorted((folder / "resume").glob("[0-9]*"), reverse=True)


def newest(folder):
    """The step of the newest complete state; 0 if there is no state, so that the run begins again.

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
    """What is wrong with a state, naming the file, or None: sizes and sha256 against its manifest."""
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
        if manifest["step"] == int(path.name) and all(len(pair) == 2 for pair in manifest["files"].values()):
            return manifest
    except InputError as error:
        return str(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    return f"{path / 'manifest.json'}: damaged"


def load(folder, step, student, optimizer):
    """Fill student and optimizer with the state of `step`, each process its own part."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            count = torch.tensor(float(step), device=p.device)
            optimizer.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    path = folder / "resume" / f"{step:06d}"
    with one_line(f"{path}: not a state of this student"):
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(tensors(student, optimizer), storage_reader=reader, no_dist=not dist.is_initialized())


@contextmanager
def one_line(message):
    """What torch.distributed.checkpoint reports from all processes, as one line from one of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is only one process is no news
            yield
    except CheckpointException as error:
        stop(f"{message} ({next(iter(error.failures.values()))[0]})")


def hashes(path):
    """{file: [bytes, sha256]} of a folder's safetensors; the processes share the work."""
    mine = {}
    for name in sorted(p.name for p in path.glob("*.safetensors"))[rank() :: world_size()]:
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
    """Remove a state so that what is half removed has no name."""
    if path.exists():
        gone = path.with_name(f".{path.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone)


# ---------------------------------------------------------------------------------------------------------------------
# The run around a state


def differences(before, now):
    """[(key, then, now)] of two config.json that would make the resumed run another run."""
    found = [(key, before["config"].get(key), value) for key, value in now["config"].items()
             if key not in FREE and before["config"].get(key) != value]  # fmt: skip
    for key, label in (("sha256", "the training data"), ("eval_sha256", "the data of eval_data"),
                       ("tokenizer_hash", "the tokenizer"), ("selection_sha256", "the selection's mask"),
                       ("model_sha256", "the student's config.json")):  # fmt: skip
        if before.get(key) != now.get(key):
            found.append((label, before.get(key), now.get(key)))
    if before["versions"]["torch"] != now["versions"]["torch"]:
        found.append(("torch", before["versions"]["torch"], now["versions"]["torch"]))
    return found


def rewind(cfg, folder, step, changed):
    """Take the run folder back to what it was when it had made `step` updates and recorded nothing at them yet.

    -> (lowest (accuracy, step) or None, last accuracy or None). Raises InputError if log.jsonl lacks a line.
    """
    log, kept = folder / "log.jsonl", []
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number == text.count("\n") + 1:
                break  # the kill came in the middle of this line
            raise InputError(f"{log}, line {number}: not JSON; the log is damaged") from None
        if entry["step"] < step or (entry["step"] == step and "event" not in entry):
            kept.append((line, entry))
    updates = [entry["step"] for _, entry in kept if "event" not in entry]
    if updates != list(range(1, step + 1)):
        missing = next(s for s in range(1, step + 2) if updates[s - 1 : s] != [s])
        raise InputError(f"{log}: the line of step {missing} is missing or there twice; the log is damaged")
    with whole_file(log) as aside:
        aside.write_text("".join(line + "\n" for line, _ in kept), encoding="utf-8")
    records = [(e["accuracy"], e["step"]) for _, e in kept if e.get("event") == "record" and e["accuracy"] is not None]
    lowest = min((r for r in records if r[1] > 0), default=None)  # of equals the earliest
    keep = {lowest[1]} if lowest else set()
    for path in (folder / "checkpoints").glob("[0-9]*"):
        at = int(path.name)
        if at > step or not (at in keep or at == cfg.steps or (cfg.save_every and at % cfg.save_every == 0)):
            shutil.rmtree(path)
    for path in (folder / "trajectory").glob("*"):
        at, partial = int(path.name.strip(".").partition(".")[0]), path.name.endswith(".logprob")
        if (at >= step and changed) or (at > step and not partial):
            path.unlink()
    for path in [p for where in (".", "checkpoints", "trajectory", "resume") for p in (folder / where).glob(".*")]:
        if not path.name.endswith(".logprob"):  # all others are what a kill left behind
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    damaged = [path for path in states(folder) if int(path.name) > step]  # or this run would go on from there
    for path in [*damaged, *states(folder)[len(damaged) + cfg.keep_checkpoints :]]:
        forget(path)
    return lowest, records[-1][0] if records else None


def start_run(run):
    """Write runs/<run>/config.json -> has anything changed since it was written?

    A run that is already there is never written over. With --resume=true it is gone on with, if keys, data, tokenizer
    and selection are what they were; with --allow_changes=true whatever they are, and config.json says so.
    """
    cfg, folder, sha256 = run.cfg, run.folder, hashlib.sha256
    git = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    keys = {k: v for k, v in asdict(cfg).items() if k not in ("resume", "allow_changes")}
    now = {
        "config": keys, "command": sys.argv, "git": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "sha256": run.train_set.sha256, "tokenizer_hash": run.tokenizer.hash,
        "eval_sha256": run.eval_set and run.eval_set.sha256,
        "selection_sha256": " ".join(mask_hash(m) for m in (run.selected, run.forced) if m is not None) or None,
        "model_sha256": sha256(json.dumps(run.shape.raw, sort_keys=True).encode()).hexdigest(),
    }  # fmt: skip

    def write():
        path = folder / "config.json"
        if not path.exists():
            (folder / "trajectory").mkdir(exist_ok=True)
            write_json(path, now)
            return False
        if not cfg.resume:
            raise InputError(f"{folder}: this run exists; --resume=true goes on with it, or give --run another name, "
                             "or delete the folder")  # fmt: skip
        before = read_json(path)
        changes = differences(before, now)
        if changes and not cfg.allow_changes:
            text = "; ".join(f"{key}: then {then}, now {value}" for key, then, value in changes)
            raise InputError(f"{folder}: not the run it was ({text}); --allow_changes=true goes on all the same")
        if commit != before.get("git"):
            print(f"the code is not the one that started this run: {before.get('git')}, now {commit}")
        history = [*before.get("resumed", []), {"command": sys.argv, "git": commit, "changes": changes}]
        write_json(path, {**now, "command": before["command"], "git": before.get("git"), "resumed": history})
        return bool(changes)

    return on_process_0(write)
