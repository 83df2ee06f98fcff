"""Sample answers to the problems of a data folder, grade them, compare models.

    python eval.py --run=base,sft,t3s                       # last checkpoints; base: the model the runs started from
    python eval.py --run=sft --step=26 --samples=16         # one checkpoint, sixteen answers a problem
    python eval.py --model=FOLDER --data=FOLDER             # any Hugging Face folder or hub id

What is not given comes from the first run's config: the data and how to sample. Every answer goes with its grade to
runs/<run>/eval/<data>-<step>.jsonl, the summary to the .json beside it. Three parts below: the verifier (text -> right
or wrong), the sampler (prompts -> token ids), the command. Next: report.py.

Shapes: B answers written at the same time, T tokens of the longest prompt, V vocabulary.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from data import load as load_data
from hf.families import local_folder
from hf.tokenizer import load_tokenizer
from model import load
from plumbing.config import InputError, command, whole_file, write_json
from plumbing.parallel import gather, in_step, pick_device, rank, world_size
from plumbing.runs import find_checkpoint, run_folder, run_keys
from sample import Sampling, sample
from verify import extract, grade


@dataclass
class Config(Sampling):
    run: str = ""  # runs to evaluate, separated by commas; base: the model that the others started from
    model: str = ""  # other models to evaluate: Hugging Face folders or hub ids, separated by commas
    data: str = ""  # the problems: a folder made by data.py; default: the first run's eval_data, else its data
    step: int = -1  # checkpoint of each run; -1: the last one
    limit: int = 0  # take only the first so many problems; 0: all
    samples: int = 1  # answers per problem
    batch_size: int = 64  # answers written at the same time; changes memory and speed, not the answers
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = "float32"  # float32 or bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# The verifier: nothing is evaluated, no pattern can backtrack far, so a hostile text costs time linear in its length















# ---------------------------------------------------------------------------------------------------------------------
# The sampler






def evaluate(model, tokenizer, data, sampling, indices=None, samples=1, batch_size=64, progress=None):
    """Let the model answer problems of a data.Data, `samples` times each, and grade -> (accuracy, rows).

    sampling: a sample.Sampling. indices: which problems, default all. Accuracy is the mean over all answers.
    rows, samples of a problem side by side: {"id", "sample", "response", "extracted", "answer", "correct",
    "truncated", "n_tokens"}. Of several processes each writes its share of the answers, and all return all of them.
    Raises InputError for a problem without an answer.
    """
    indices = range(len(data)) if indices is None else [int(i) for i in indices]
    asked = [(i, s) for i in indices for s in range(samples)]
    if not asked:
        raise InputError("no problem, or no sample, to evaluate")
    for i in indices:
        if data.examples[i].get("answer") is None:
            raise InputError(f"example {data.examples[i]['id']} has no answer: accuracy needs one for every problem")
    mine = asked[rank() :: world_size()]
    with in_step(model):
        texts = sample(
            model, [data.prompt(i).tolist() for i, _ in mine], sampling, batch_size=batch_size,
            example_ids=[f"{data.examples[i]['id']} {s}" for i, s in mine],
            eos_ids={*model.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id},
            progress=progress and (lambda done: progress(min(done * world_size(), len(asked)))),
            vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
    rows, verifier = [], data.meta["verifier"]
    for (i, s), ids in zip(mine, texts, strict=True):
        response, answer = tokenizer.decode(ids), data.examples[i]["answer"]
        rows.append({
            "id": data.examples[i]["id"], "sample": s, "response": response, "extracted": extract(response, verifier),
            "answer": answer, "correct": grade(response, answer, verifier),
            "truncated": len(ids) == sampling.max_new_tokens, "n_tokens": len(ids),
        })  # fmt: skip
    parts = gather(rows)
    rows = [parts[n % len(parts)][n // len(parts)] for n in range(len(asked))]
    return float(np.mean([row["correct"] for row in rows])), rows


# ---------------------------------------------------------------------------------------------------------------------
# Statistics: the problem is the unit (arXiv 2411.00640), since answers to one problem are not independent


def by_problem(rows, key="correct"):
    """{problem id: mean of `key` over its samples}"""
    values = {}
    for row in rows:
        values.setdefault(row["id"], []).append(float(row[key]))
    return {problem: float(np.mean(v)) for problem, v in values.items()}


def mean_interval(values):
    """Mean and half the width of its 95 % interval: 1.96 standard errors; nan for one value.

    The normal approximation: too narrow for some dozens of problems, or if nearly all are right or nearly all wrong.
    """
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(1.96 * error)


def pass_at_k(n, correct, k):
    """Unbiased probability that one of k answers is right, given `correct` right of n >= k (arXiv 2107.03374)."""
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def summarize(rows, seconds):
    """What the table shows: accuracy with interval, pass@k for k = samples, rates and means over all answers."""
    accuracy, interval = mean_interval(list(by_problem(rows).values()))
    samples = 1 + max(row["sample"] for row in rows)
    passed = [pass_at_k(samples, round(mean * samples), samples) for mean in by_problem(rows).values()]
    return {
        "accuracy": accuracy, "interval": interval, "pass_at_k": float(np.mean(passed)),
        "truncated": float(np.mean([row["truncated"] for row in rows])),
        "unparsed": float(np.mean([row["extracted"] is None for row in rows])),
        "mean_tokens": float(np.mean([row["n_tokens"] for row in rows])), "seconds": round(seconds, 2),
        "problems": len(passed), "samples": samples,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Evaluate every run and model that was named and print the table -> {name: (summary, rows)}."""
    cfg, jobs = resolve(given)
    problems = load_data(cfg.data)
    indices = range(min(cfg.limit or len(problems), len(problems)))
    settings = {"samples": cfg.samples, **{f.name: getattr(cfg, f.name) for f in fields(Sampling)}}
    always = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    shown = [f"{k} {v}" for k, v in settings.items() if k in always or v != getattr(Config, k)]
    print(f"{cfg.data}: {len(indices)} problems, verifier {problems.meta['verifier']}, {', '.join(shown)}")
    device = pick_device(cfg.device)
    for _, folder, _ in jobs:  # all before the first one writes
        if load_tokenizer(folder).hash != problems.meta["tokenizer_hash"]:
            raise InputError(f"{cfg.data}: made with another tokenizer than {folder} has; run data.py with that folder")
    results = {}
    width = max(len(name) for name, _, _ in jobs)
    print(f"{'':{width}}  accuracy         pass@{cfg.samples:<3} truncated  unparsed   tokens  seconds")
    for name, folder, out in jobs:
        student, started = load(folder, device, getattr(torch, cfg.dtype)), time.time()
        progress = status(name, len(indices) * cfg.samples)
        _, rows = evaluate(student, load_tokenizer(folder), problems, cfg, indices, samples=cfg.samples,
                           batch_size=cfg.batch_size, progress=progress)  # fmt: skip
        summary = summarize(rows, time.time() - started)
        save(out, rows, {**summary, "model": str(folder), "data": cfg.data, "sha256": problems.sha256, **settings})
        results[name] = (summary, rows)
        s = summary
        print(f"{name:{width}}  {s['accuracy']:.3f} ± {s['interval']:.3f}  {s['pass_at_k']:8.3f}  {s['truncated']:9.3f}"
              f"  {s['unparsed']:8.3f}  {s['mean_tokens']:7.1f}  {s['seconds']:7.1f}")  # fmt: skip
    compare(results)
    return results


def resolve(given):
    """The keys given -> a complete Config and the jobs: (name in the table, model folder, jsonl file to write)."""
    asked = Config(**given)
    names = [name for name in asked.run.split(",") if name]
    runs = [name for name in names if name != "base"]
    models = [folder for folder in asked.model.split(",") if folder]
    if not names and not models:
        raise InputError("nothing to evaluate: give --run or --model (--help lists the keys)")
    if names and not runs:
        raise InputError("--run=base needs another run beside it: base is the model that run started from")
    trained = {name: run_keys(run_folder(name)) for name in runs}
    if "base" in names and len({str(config["model"]) for config in trained.values()}) > 1:
        raise InputError("--run: these runs started from different models, so there is no one base; use --model=FOLDER")
    first = trained[runs[0]] if runs else {}
    inherited = {f.name: first[f.name] for f in fields(Sampling) if f.name in first}
    if "samples" in first:
        inherited["samples"] = first["samples"]
    inherited["data"] = first.get("eval_data") or first.get("data", "")
    cfg = Config(**{**inherited, **given})
    if not cfg.data:
        raise InputError("--data is missing: a folder made by data.py (--help lists the keys)")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={cfg.dtype}: must be float32 or bfloat16")
    stem, jobs = Path(cfg.data).resolve().name, []
    for name in names:
        # the base is what every run was at step 0
        folder, step = (Path(first["model"]), 0) if name == "base" else find_checkpoint(name, trained[name], cfg.step)
        home = runs[0] if name == "base" else name
        jobs.append((name, folder, Path("runs") / home / "eval" / f"{stem}-{step:06d}.jsonl"))
    for folder in models:
        path, home = Path(folder).resolve(), Path("runs").resolve()  # RRT's models lie in their run: answers go there
        name = str(path.relative_to(home)) if path.is_relative_to(home) else path.name
        jobs.append((name, folder, Path("runs") / name / "eval" / f"{stem}.jsonl"))
    for name, _, out in jobs:
        if [job[2] for job in jobs].count(out) > 1 or [job[0] for job in jobs].count(name) > 1:
            raise InputError(f"{name} is named twice, its answers would go to {out} twice")
    return cfg, [(name, local_folder(str(folder)), out) for name, folder, out in jobs]




def save(out, rows, summary):
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # the interval of a single problem is nan, which JSON does not have
    write_json(out.with_suffix(".json"), {k: None if v != v else v for k, v in summary.items()})


def compare(results):
    """Print each model's difference from the first one, problem by problem: that cancels how hard the problems are."""
    (first, (_, rows)), *others = results.items()
    base = by_problem(rows)
    for name, (_, rows) in others:
        difference, interval = mean_interval([mean - base[problem] for problem, mean in by_problem(rows).items()])
        print(f"{name} - {first}: {difference:+.3f} ± {interval:.3f} (paired, {len(base)} problems)")


def status(name, total):
    """A line that is rewritten after every batch, on a terminal."""
    def show(done):
        print(f"\r\x1b[K{name}: {done}/{total} answers" if done < total else "\r\x1b[K", end="", flush=True)
    return show if sys.stdout.isatty() else None


if __name__ == "__main__":
    command(main, Config)
