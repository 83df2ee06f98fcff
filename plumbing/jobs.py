"""The rows of eval.py's table: which models are asked, and where their answers go.

    cfg, jobs = resolve(Config, given)      the keys given, completed from the first run's; [Job, ...]

Raises InputError, before anything is sampled or written, for keys that do not fit together.
Next: plumbing/served.py.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from hf.families import at_revision, local_folder
from hf.tokenizer import load_tokenizer
from plumbing.answers import json_lines
from plumbing.config import InputError, above, require
from plumbing.parallel import pick_device, pick_dtype
from plumbing.runs import find_checkpoint, run_folder, run_keys
from sampling import Sampling, check_greedy, check_ranges
from verify import VERIFIERS


@dataclass
class Job:
    """A row of the table."""

    name: str
    folder: Path | None  # of the model; None if another engine has answered
    out: Path  # the answers, .jsonl
    samples: str = ""  # the file of another engine's answers


def resolve(Config, given):
    """The keys given -> a complete Config of eval.py, and the jobs."""
    asked = Config(**given)
    names = [name for name in asked.run.split(",") if name]
    models = [folder for folder in asked.model.split(",") if folder]
    files = [name for name in asked.samples_from.split(",") if name]
    trained = trained_keys(names, models, files)
    first = next(iter(trained.values()), {})
    keys = [field.name for field in fields(Sampling)] + ["samples", "dtype"]
    inherited = {key: first[key] for key in keys if key in first}
    inherited["data"] = first.get("eval_data") or first.get("data", "")
    cfg = Config(**{**inherited, **given})
    check_greedy(given, cfg)
    if not cfg.data:
        raise InputError("--data is missing: a folder made by data.py (--help lists the keys)")
    require(
        cfg,
        limit=(0, None),
        batch_size=(1, None),
        retries=(0, None),
        timeout=(above(0), None),
    )
    check_ranges(cfg)
    cfg.dtype = str(pick_dtype(cfg.dtype, pick_device(cfg.device))).removeprefix("torch.")
    if cfg.verifier and cfg.verifier not in VERIFIERS:
        raise InputError(f"--verifier={cfg.verifier}: must be one of {', '.join(VERIFIERS)}")
    jobs = jobs_of_runs(cfg, names, trained)
    elsewhere = bool(cfg.server or files)  # a model that another engine serves need not be here
    jobs += [job_of_model(cfg, at_revision(name, cfg.revision), elsewhere) for name in models]
    if cfg.server and (len(jobs) != 1 or files):
        raise InputError(
            "--server answers for one run or model at a time: give one --run or --model"
        )
    jobs = with_files(cfg, jobs, files)
    refuse_twins(jobs)
    return cfg, jobs


def trained_keys(names, models, files):
    """{run: the keys it was trained with} of the runs among the names.

    Raises InputError if nothing is named, or base without a run that tells which model it is.
    """
    if not names and not models and not files:
        raise InputError("nothing to evaluate: give --run or --model (--help lists the keys)")
    trained = {name: run_keys(run_folder(name)) for name in names if name != "base"}
    if "base" in names:
        bases = {str(keys["model"]) for keys in trained.values()}
        if not bases:
            message = "--run=base needs another run beside it"
            raise InputError(f"{message}: base is the model that run started from")
        if len(bases) > 1:
            message = "--run: these runs started from different models, so there is no one base"
            raise InputError(f"{message}; use --model=FOLDER")
    return trained


def jobs_of_runs(cfg, names, trained):
    stem = Path(cfg.data).resolve().name
    jobs = []
    for name in names:
        home = next(iter(trained)) if name == "base" else name
        if name == "base":  # what every run was at step 0; its answers go to the first run
            folder, step = Path(trained[home]["model"]), 0
        else:
            folder, step = find_checkpoint(name, trained[name], cfg.step)
        out = Path("runs") / home / "eval" / f"{stem}-{step:06d}.jsonl"
        jobs.append(Job(name, local_folder(str(folder)), free_name(cfg, out)))
    return jobs


def job_of_model(cfg, model, elsewhere):
    path = Path(model).resolve()
    home = Path("runs").resolve()
    # models that lie in a run (as RRT's do) keep their answers there
    name = str(path.relative_to(home)) if path.is_relative_to(home) else path.name
    out = Path("runs") / name / "eval" / f"{Path(cfg.data).resolve().name}.jsonl"
    out = free_name(cfg, out)
    if elsewhere and not path.is_dir():
        return Job(name, None, out)
    return Job(name, local_folder(model), out)


def free_name(cfg, out):
    """`out`, if no answers lie there that were sampled otherwise; else a name that says what is
    different now (...-seed=7.jsonl), so that no evaluation replaces another."""
    earlier = json_lines(out.with_suffix(".json"), whole=True)
    if not earlier:
        return out
    keys = [field.name for field in fields(Sampling)] + ["dtype"]
    changed = [key for key in keys if earlier[0].get(key, getattr(cfg, key)) != getattr(cfg, key)]
    return out.with_name(
        out.stem + "".join(f"-{key}={getattr(cfg, key)}" for key in changed) + ".jsonl"
    )


def with_files(cfg, jobs, files):
    """The jobs with the files of --samples_from: FILE belongs to the one run or model, if there is
    one; otherwise it is a row of its own, named by NAME=FILE or by the file."""
    if len(files) == 1 and len(jobs) == 1 and "=" not in files[0]:
        out = jobs[0].out
        earlier = json_lines(out.with_suffix(".json"), whole=True)
        if earlier and earlier[0].get("samples_from") != files[0]:
            out = out.with_name(f"{out.stem}-samples_from={Path(files[0]).stem}.jsonl")
        return [replace(jobs[0], samples=files[0], out=out)]
    stem = Path(cfg.data).resolve().name
    for text in files:
        name, _, file = text.rpartition("=")
        name = name or Path(file).stem
        jobs.append(Job(name, None, run_folder(name) / "eval" / f"{stem}.jsonl", file))
    if any(job.folder is None and not job.samples and not cfg.server for job in jobs):
        missing = next(job.name for job in jobs if job.folder is None and not job.samples)
        local_folder(missing)  # says what is wrong with it
    return jobs


def refuse_twins(jobs):
    """Raises InputError if two jobs have one name, or would write one file."""
    names = [job.name for job in jobs]
    files = [job.out for job in jobs]
    for job in jobs:
        if names.count(job.name) > 1 or files.count(job.out) > 1:
            raise InputError(f"{job.name} is named twice, its answers would go to {job.out} twice")


def check_tokenizers(cfg, jobs, problems):
    """Raises InputError, before the first model writes, unless all have the tokenizer of the data."""
    for job in jobs:
        if job.folder and load_tokenizer(job.folder).hash != problems.meta["tokenizer_hash"]:
            message = f"{cfg.data}: made with another tokenizer than {job.folder} has"
            raise InputError(f"{message}; run data.py with that folder")
