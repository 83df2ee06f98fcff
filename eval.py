"""Sample answers to the problems of a data folder, grade them, compare models.

    python eval.py --run=base,sft,t3s                       # last checkpoints; base: the model the runs started from
    python eval.py --run=sft --step=26 --samples=16         # one checkpoint, sixteen answers a problem
    python eval.py --model=FOLDER --data=FOLDER             # any Hugging Face folder or hub id
    python eval.py --run=base,sft --likelihood=true         # of the given responses, instead of answers

Keys that are not given come from the first run's config: the data, and how to sample. Every answer
is written with its grade to runs/<run>/eval/<data>-<step>.jsonl, the summary to the .json beside it.

Here: evaluate (a model and problems -> graded answers), the statistics, the command. How an answer
is sampled is in sample.py, how it is graded in verify.py. Next: data.py.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

import likelihood
from data import load as load_data
from hf.families import at_revision, local_folder, read_config
from hf.tokenizer import load_tokenizer
from model import load
from plumbing.config import InputError, command, require, whole_file, write_json
from plumbing.parallel import gather, in_step, pick_device, pick_dtype, rank, world_size
from plumbing.runs import find_checkpoint, run_folder, run_keys
from sample import Sampling, check_used, sample
from verify import THOUGHTS, VERIFIERS, judge, opens_thoughts, unmatchable


@dataclass
class Config(Sampling):
    run: str = ""  # runs to evaluate, separated by commas; base: the model that the others started from
    model: str = ""  # other models to evaluate: Hugging Face folders or hub ids, separated by commas
    revision: str = ""  # of a hub id in --model: the branch, tag or commit
    data: str = ""  # the problems: a folder made by data.py; default: the first run's eval_data, else its data
    step: int = -1  # checkpoint of each run; -1: the last one
    limit: int = 0  # take only the first so many problems; 0: all
    samples: int = 1  # answers per problem
    batch_size: int = 64  # answers written at the same time; changes memory and speed, not the answers
    verifier: str = ""  # how answers are read (data.py --help lists the ways); default: as the data says
    likelihood: bool = False  # instead of sampling: log p of the data's own responses (likelihood.py)
    draws: int = 128  # of the bound of a masked-diffusion student, for each response
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 on a GPU, float32 elsewhere


# --------------------------------------------------------------------------------------------------
# A model and problems -> graded answers


def evaluate(
    model,
    tokenizer,
    data,
    sampling,
    indices=None,
    samples=1,
    batch_size=64,
    progress=None,
    verifier="",
):
    """Let the model answer problems of a data.Data, and grade the answers -> (accuracy, rows).

    sampling  a sample.Sampling
    indices   which problems; default: all
    samples   answers per problem
    progress  called with the number of answers that are written, of all processes together
    verifier  how answers are read; default: as the data says

    Accuracy is the mean over all answers. Rows are in the order of the problems, the samples of a
    problem side by side: {"id", "sample", "response", "extracted", "answer", "correct", "thoughts",
    "truncated", "n_tokens"}, and "undecided": True where only math-verify, which is not installed,
    could have told. Of several processes each writes its share of the answers, and all return all
    of them. Raises InputError for a problem without an answer that a response can match.
    """
    indices = range(len(data)) if indices is None else [int(i) for i in indices]
    asked = [(i, number) for i in indices for number in range(samples)]
    if not asked:
        raise InputError("no problem, or no sample, to evaluate")
    verifier = verifier or data.meta["verifier"]
    check_references(data, indices, verifier)

    def report(done):
        # the other processes are about as far as this one
        progress(min(done * world_size(), len(asked)))

    mine = asked[rank() :: world_size()]
    with in_step(model):  # a forward pass of a sharded model needs every process
        texts = sample(
            model,
            [data.prompt(i).tolist() for i, _ in mine],
            sampling,
            batch_size=batch_size,
            # the name decides what is drawn: it must not depend on how the work is shared
            example_ids=[f"{data.examples[i]['id']} {number}" for i, number in mine],
            # chat models are trained to end a turn, which is not always the end of the text
            eos_ids={
                *model.config.eos_token_ids,
                tokenizer.eos_token_id,
                tokenizer.end_of_turn_id,
            },
            progress=report if progress else None,
            vocab_size=tokenizer.vocab_size,
        )
    rows = []
    for (i, number), ids in zip(mine, texts, strict=True):
        response = tokenizer.decode(ids)
        answer = data.examples[i]["answer"]
        # some chat templates open the thoughts themselves: an answer may be cut off inside them
        thinking = opens_thoughts(tokenizer.decode(data.prompt(i)[-9:]))
        row = {"id": data.examples[i]["id"], "sample": number, "response": response}
        row["answer"] = answer
        row |= judge(response, answer, verifier, thinking)
        row["truncated"] = len(ids) == sampling.max_new_tokens
        row["n_tokens"] = len(ids)
        rows.append(row)
    # answer n was dealt to process n % P, as its n // P-th: back into the order of the problems
    parts = gather(rows)
    rows = [parts[n % len(parts)][n // len(parts)] for n in range(len(asked))]
    return float(np.mean([row["correct"] for row in rows])), rows


def check_references(data, indices, verifier):
    """Raises InputError for a problem whose answer no response could match."""
    for i in indices:
        name = data.examples[i]["id"]
        answer = data.examples[i].get("answer")
        if answer is None:
            raise InputError(f"example {name} has no answer: accuracy needs one for every problem")
        why = unmatchable(answer, verifier)
        if why:
            raise InputError(f"{data.folder}: the answer of example {name} {why}")


# --------------------------------------------------------------------------------------------------
# Statistics: the problem is the unit (arXiv 2411.00640), as answers to one problem are correlated


def by_problem(rows, key="correct"):
    """{problem id: mean of `key` over its samples}"""
    values = {}
    for row in rows:
        values.setdefault(row["id"], []).append(float(row[key]))
    return {problem: float(np.mean(several)) for problem, several in values.items()}


def mean_interval(values):
    """Mean and half the width of its 95 % interval: 1.96 standard errors; nan for one value.

    The normal approximation: too narrow for a few dozen problems, or if nearly all of them are
    right or nearly all wrong.
    """
    values = np.asarray(values, dtype=np.float64)
    error = math.nan
    if len(values) > 1:
        error = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(1.96 * error)


def pass_at_k(n, correct, k):
    """Unbiased probability that one of k answers is right, given `correct` right ones of n >= k
    (arXiv 2107.03374): 1 - C(n - correct, k) / C(n, k), as a product that cannot overflow."""
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def rates(rows):
    """What failed: shares of all answers that were truncated, unparsed, and whose thoughts were
    valid, empty, unclosed (never closed) or missing; undecided: only math-verify could have told."""
    shares = {
        "truncated": [row["truncated"] for row in rows],
        "unparsed": [row["extracted"] is None for row in rows],
        "undecided": [row.get("undecided", False) for row in rows],
    }
    for kind in THOUGHTS:
        shares[f"thoughts_{kind}"] = [row["thoughts"] == kind for row in rows]
    return {key: float(np.mean(values)) for key, values in shares.items()}


def explain(accuracy, failed):
    """A sentence if a low accuracy is a matter of format rather than ability, else "".

    failed: what `rates` returns. Worth reading before pass 1 is paid for.
    """
    causes = []
    if failed["thoughts_unclosed"] > 0.2:
        causes.append(f"{failed['thoughts_unclosed']:.0%} never ended their thoughts")
    if failed["truncated"] > 0.2:
        causes.append(f"{failed['truncated']:.0%} were cut off (raise --max_new_tokens)")
    if failed["unparsed"] > 0.2:
        causes.append(f"{failed['unparsed']:.0%} gave no answer that could be read (--verifier)")
    if accuracy >= 0.5 or not causes:
        return ""
    return f"accuracy {accuracy:.3f}: of the answers {', '.join(causes)}: format, not only ability"


def summarize(rows, seconds):
    """What the table shows: accuracy and its interval, pass@k for k = samples; rates and means are
    over all answers."""
    means = list(by_problem(rows).values())
    accuracy, interval = mean_interval(means)
    samples = 1 + max(row["sample"] for row in rows)
    passed = [pass_at_k(samples, round(mean * samples), samples) for mean in means]
    return {
        "accuracy": accuracy,
        "interval": interval,
        "pass_at_k": float(np.mean(passed)),
        **rates(rows),
        "mean_tokens": float(np.mean([row["n_tokens"] for row in rows])),
        "seconds": round(seconds, 2),
        "problems": len(passed),
        "samples": samples,
    }


# --------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Evaluate every run and model that was named and print the table -> {name: (summary, rows)}.

    Raises InputError for keys that do not fit together, and for a model whose tokenizer is not the
    one of the data, before anything is written.
    """
    cfg, jobs = resolve(given)
    problems = load_data(cfg.data)
    indices = range(min(cfg.limit or len(problems), len(problems)))
    if cfg.likelihood:
        return compare_likelihoods(cfg, jobs, problems, indices)
    settings = {"samples": cfg.samples}
    settings |= {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
    show_settings(cfg, settings, problems, len(indices))
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    check_tokenizers(cfg, jobs, problems)
    check_used([read_config(folder) for _, folder, _ in jobs], cfg)

    results = {}
    width = max(len(name) for name, _, _ in jobs)
    passed = f"pass@{cfg.samples:<3}"
    print(f"{'':{width}}  accuracy         {passed} truncated  unparsed   tokens  seconds")
    for name, folder, out in jobs:
        student = load(folder, device, dtype)
        started = time.time()
        _, rows = evaluate(
            student,
            load_tokenizer(folder),
            problems,
            cfg,
            indices,
            samples=cfg.samples,
            batch_size=cfg.batch_size,
            progress=status(name, len(indices) * cfg.samples),
            verifier=cfg.verifier,
        )
        summary = summarize(rows, time.time() - started)
        made = {"model": str(folder), "data": cfg.data, "sha256": problems.sha256}
        save(out, rows, {**summary, **made, **settings})
        results[name] = (summary, rows)
        print(f"{name:{width}}  {table_row(summary)}")
    for name, (summary, rows) in results.items():
        tell(name, summary, rows)
    compare(results)
    return results


def check_tokenizers(cfg, jobs, problems):
    """Raises InputError, before the first model writes, unless all have the tokenizer of the data."""
    for _, folder, _ in jobs:
        if load_tokenizer(folder).hash != problems.meta["tokenizer_hash"]:
            message = f"{cfg.data}: made with another tokenizer than {folder} has"
            raise InputError(f"{message}; run data.py with that folder")


def compare_likelihoods(cfg, jobs, problems, indices):
    """Print every model's log p of the responses -> {name: (summary, rows)}.

    Beside the answers' file, <data>-<step>-likelihood.jsonl has a line per response.
    """
    require(cfg, draws=(2, None))
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    check_tokenizers(cfg, jobs, problems)
    print(f"{cfg.data}: {len(indices)} responses; ≤ before a bound, of {cfg.draws} draws each")
    results = {}
    width = max(len(name) for name, _, _ in jobs)
    print(f"{'':{width}}  nats a token       log p of a response")
    for name, folder, out in jobs:
        student = load(folder, device, dtype)
        progress = likelihood.status(name, len(indices))
        found = likelihood.logprobs(
            student, problems, list(indices), cfg.draws, cfg.seed, cfg.batch_size, progress
        )
        rows = likelihood.rows_of(problems, indices, found)
        a_token = mean_interval([row["nats_per_token"] for row in rows])
        whole = mean_interval([row["logprob"] for row in rows])
        summary = {
            "nats_per_token": a_token[0],
            "interval": a_token[1],
            "logprob": whole[0],
            "logprob_interval": whole[1],
            "is_bound": student.config.is_diffusion,
            "draws": found.shape[1],
            "seed": cfg.seed,
            "model": str(folder),
            "data": cfg.data,
            "sha256": problems.sha256,
        }
        save(out.with_name(f"{out.stem}-likelihood.jsonl"), rows, summary)
        results[name] = (summary, rows)
        sign = "≤" if summary["is_bound"] else " "
        text = f"{a_token[0]:.4f} ± {a_token[1]:.4f}  {whole[0]:8.2f} ± {whole[1]:.2f}"
        print(f"{name:{width}} {sign}{text}")
    compare(results, "nats_per_token")
    return results


def resolve(given):
    """The keys given -> a complete Config, and the jobs: (name in the table, model folder, jsonl
    file to write)."""
    asked = Config(**given)
    names = [name for name in asked.run.split(",") if name]
    models = [folder for folder in asked.model.split(",") if folder]
    trained = trained_keys(names, models)
    first = next(iter(trained.values()), {})
    inherited = {field.name: first[field.name] for field in fields(Sampling) if field.name in first}
    if "samples" in first:
        inherited["samples"] = first["samples"]
    inherited["data"] = first.get("eval_data") or first.get("data", "")
    cfg = Config(**{**inherited, **given})
    if not cfg.data:
        raise InputError("--data is missing: a folder made by data.py (--help lists the keys)")
    if cfg.verifier and cfg.verifier not in VERIFIERS:
        raise InputError(f"--verifier={cfg.verifier}: must be one of {', '.join(VERIFIERS)}")

    stem = Path(cfg.data).resolve().name
    jobs = []
    for name in names:
        if name == "base":  # what every run was at step 0; its answers go to the first run
            home = next(iter(trained))
            folder = Path(first["model"])
            step = 0
        else:
            home = name
            folder, step = find_checkpoint(name, trained[name], cfg.step)
        jobs.append((name, folder, Path("runs") / home / "eval" / f"{stem}-{step:06d}.jsonl"))
    for folder in (at_revision(name, cfg.revision) for name in models):
        path = Path(folder).resolve()
        home = Path("runs").resolve()
        # models that lie in a run (as RRT's do) keep their answers there
        name = str(path.relative_to(home)) if path.is_relative_to(home) else path.name
        jobs.append((name, folder, Path("runs") / name / "eval" / f"{stem}.jsonl"))
    refuse_twins(jobs)
    return cfg, [(name, local_folder(str(folder)), out) for name, folder, out in jobs]


def trained_keys(names, models):
    """{run: the keys it was trained with} of the runs among the names.

    Raises InputError if nothing is named, or base without a run that tells which model it is.
    """
    if not names and not models:
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


def refuse_twins(jobs):
    """Raises InputError if two jobs have one name, or would write one file."""
    names = [name for name, _, _ in jobs]
    files = [out for _, _, out in jobs]
    for name, _, out in jobs:
        if names.count(name) > 1 or files.count(out) > 1:
            raise InputError(f"{name} is named twice, its answers would go to {out} twice")


def show_settings(cfg, settings, problems, n_problems):
    """Print what every model is asked, and how it is sampled."""
    always = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    shown = []
    for key, value in settings.items():
        # most keys concern diffusion students only: those that were left alone say nothing
        if key in always or value != getattr(Config, key):
            shown.append(f"{key} {value}")
    verifier = cfg.verifier or problems.meta["verifier"]
    print(f"{cfg.data}: {n_problems} problems, verifier {verifier}, {', '.join(shown)}")


def table_row(summary):
    cells = [
        f"{summary['accuracy']:.3f} ± {summary['interval']:.3f}",
        f"{summary['pass_at_k']:8.3f}",
        f"{summary['truncated']:9.3f}",
        f"{summary['unparsed']:8.3f}",
        f"{summary['mean_tokens']:7.1f}",
        f"{summary['seconds']:7.1f}",
    ]
    return "  ".join(cells)


def tell(name, summary, rows):
    """Print what a reader of the table must know of a model's answers, if there is anything."""
    why = explain(summary["accuracy"], summary)
    if why:
        print(f"{name}: {why}")
    if summary["thoughts_missing"] < 1:
        shares = ", ".join(f"{kind} {summary[f'thoughts_{kind}']:.3f}" for kind in THOUGHTS)
        print(f"{name}: thoughts {shares}")
    undecided = sum(row.get("undecided", False) for row in rows)
    if undecided:
        print(
            f"{name}: {undecided} answers are formulas that only math-verify can compare; "
            "they count as wrong: pip install math-verify"
        )


def save(out, rows, summary):
    """Write the answers to `out`, a line each, and the summary to the .json beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # the interval of a single problem is nan, which JSON does not have
    finite = {key: None if value != value else value for key, value in summary.items()}
    write_json(out.with_suffix(".json"), finite)


def compare(results, key="correct"):
    """Print how each model differs from the first one, problem by problem: that cancels how hard
    the problems are."""
    (first, (_, rows)), *others = results.items()
    base = by_problem(rows, key)
    for name, (_, rows) in others:
        differences = [mean - base[problem] for problem, mean in by_problem(rows, key).items()]
        difference, interval = mean_interval(differences)
        text = f"{difference:+.3f} ± {interval:.3f}"
        print(f"{name} - {first}: {text} (paired, {len(base)} problems)")


def status(name, total):
    """A progress line that is rewritten after every batch, on a terminal."""

    def show(done):
        text = f"{name}: {done}/{total} answers" if done < total else ""
        print(f"\r\x1b[K{text}", end="", flush=True)

    return show if sys.stdout.isatty() else None


if __name__ == "__main__":
    command(main, Config)
