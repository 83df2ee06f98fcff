"""Sample answers to the problems of a data folder, grade them, compare models.

    python eval.py --run=base,sft,t3s                       # last checkpoints; base: the model the runs started from
    python eval.py --run=sft --step=26 --samples=16         # one checkpoint, sixteen answers a problem
    python eval.py --model=FOLDER --data=FOLDER             # any Hugging Face folder or hub id
    python eval.py --run=base,sft --likelihood=true         # of the given responses, instead of answers
    torchrun --nproc_per_node=8 -- eval.py --run=...        # eight processes share the answers
    python eval.py --run=sft --server=http://localhost:8000/v1          # an engine that serves this checkpoint
    python eval.py --data=FOLDER --samples_from=R1=r1.jsonl,Q=q.jsonl   # answers that an engine has written

Keys that are not given come from the first run's config: the data, how to sample, dtype. Every answer
is written with its grade to runs/<run>/eval/<data>-<step>.jsonl, the summary to the .json beside it;
an evaluation that samples otherwise writes a file of its own (...-seed=7.jsonl). Answers that are
there are not sampled again: after a kill the same command goes on, and --samples=16 after
--samples=4 samples twelve more. The table is in runs/<first run>/tables/<data>.csv and .json.

Here: evaluate (a model and problems -> graded answers), where answers come from, the command. How
an answer is sampled is in sample.py, how it is graded in verify.py, intervals are in intervals.py.
Next: likelihood.py.
"""

import hashlib
import time
from dataclasses import dataclass

import numpy as np
import torch

import intervals
import likelihood
from data import load as load_data
from hf.families import read_config
from hf.tokenizer import load_tokenizer
from model import load
from plumbing.answers import Store, identity_of, name_of, save
from plumbing.config import InputError, command
from plumbing.engine import Server
from plumbing.jobs import check_tokenizers, resolve
from plumbing.parallel import (
    gather,
    in_step,
    on_process_0,
    pick_device,
    rank,
    sharing_processes,
    world_size,
)
from plumbing.screen import say, status
from plumbing.served import ask_server, samples_of
from plumbing.table import show_results, show_settings
from quantities import value
from sample import ends_and_size, sample
from sampling import Sampling, check_used, sampling_keys
from verify import THOUGHTS, judge, opens_thoughts, unmatchable


@dataclass
class Config(Sampling):
    run: str = ""  # runs to evaluate, separated by commas; base: the model that the others started from
    model: str = ""  # other models to evaluate: Hugging Face folders or hub ids, separated by commas
    revision: str = ""  # of a hub id in --model: the branch, tag or commit
    data: str = ""  # the problems: a folder made by data.py; default: the first run's eval_data, else its data
    step: int = -1  # checkpoint of each run; -1: the last one
    limit: int = 0  # take only the first so many problems; 0: all
    samples: int = 1  # answers per problem
    verifier: str = ""  # how answers are read (data.py --help lists the ways); default: as the data says
    likelihood: bool = False  # instead of sampling: log p of the data's own responses (likelihood.py)
    draws: int = 128  # of the bound of a masked-diffusion student, for each response
    # how our own sampler works: answers do not depend on it as far as rounding allows, and in float32
    # on a CPU, 12 or more at a time, to the last bit (sample.Rows)
    batch_size: int = 64  # answers written at the same time; with --server: requests at the same time
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = ""  # float32 or bfloat16; default: the first run's, else bfloat16 on a GPU, float32 elsewhere
    fresh: bool = False  # sample again what was sampled already
    # answers of another engine
    samples_from: str = ""  # jsonl files of answers, separated by commas; NAME=FILE names the row of the table
    server: str = ""  # URL of an OpenAI-style server that answers for the one run or model, http://localhost:8000/v1
    served: str = ""  # the name of the model there; default: the only one that it serves
    timeout: float = 600.0  # seconds that the server may take for an answer
    retries: int = 8  # how often a request is tried again


# --------------------------------------------------------------------------------------------------
# A model and problems -> graded answers


def evaluate(
    model, tokenizer, data, sampling, indices=None, samples=1, batch_size=64,
    progress=None, verifier="", kept=None, keep=None,
):
    """Let the model answer problems of a data.Data, and grade the answers -> (accuracy, rows).

    sampling  a sampling.Sampling
    indices   which problems; default: all. samples: answers to each
    progress  called with the number of answers written by all processes together
    verifier  how answers are read; default: as the data says
    kept      {(id, sample): answer} that are there already, and are not sampled again
    keep      called with each new answer as soon as it is finished

    Accuracy is the mean over all answers. Rows are in the order of the problems, the samples of a
    problem side by side: {"id", "sample", "response", "extracted", "answer", "correct", "thoughts",
    "truncated", "n_tokens"}, and "undecided": True where only math-verify, which is not installed,
    could have told. Of several processes each writes its share of the answers, and all return all
    of them. Raises InputError as `questions` does.
    """
    asked = questions(data, indices, samples, verifier)
    # what a killed evaluation has left behind is not sampled again
    answers = dict(kept or {})
    missing = [question for question in asked if name_of(data, question) not in answers]
    # dealt in turn rather than cut in blocks: hard problems tend to lie side by side
    mine = missing[rank() :: world_size()]
    done = len(asked) - len(missing)

    def finished(number, ids):
        answer = as_answer(tokenizer, name_of(data, mine[number]), ids, sampling.max_new_tokens)
        written.append(answer)
        if keep:  # on disk at once: a kill loses only the answers that are being written
            keep(answer)
        if progress:  # the other processes are about as far as this one
            progress(min(done + len(written) * world_size(), len(asked)))

    written = []
    prompts = [data.prompt(i).tolist() for i, _ in mine]
    with in_step(model):  # a forward pass of a sharded model needs every process
        # the name decides what is drawn: it must not depend on how the work is shared
        names = [" ".join(map(str, name_of(data, question))) for question in mine]
        keys = {"example_ids": names, **ends_and_size(model, tokenizer)}
        sample(model, prompts, sampling, batch_size=batch_size, finished=finished, **keys)
    # every process returns all answers, so that all of them go on with the same accuracy
    for part in gather(written):
        answers |= {(answer["id"], answer["sample"]): answer for answer in part}
    rows = grade_all(tokenizer, data, asked, answers, verifier)
    return float(np.mean([row["correct"] for row in rows])), rows


def as_answer(tokenizer, name, ids, max_new_tokens):
    """Ids that were sampled for `name`, (id of the problem, number of the sample), as a dict."""
    answer = {"id": name[0], "sample": name[1], "response": tokenizer.decode(ids)}
    # an end of text does not count as an id, so an answer of full length has none
    answer["truncated"] = len(ids) == max_new_tokens
    answer["n_tokens"] = len(ids)
    return answer


def questions(data, indices, samples, verifier=""):
    """[(problem's index, number of the sample)]. Raises InputError if there is none, or for a problem
    whose answer no response could match."""
    indices = range(len(data)) if indices is None else [int(i) for i in indices]
    if not len(indices) or samples < 1:
        raise InputError("no problem, or no sample, to evaluate")
    for i in indices:
        name = data.examples[i]["id"]
        answer = data.examples[i].get("answer")
        # to leave such a problem out in silence would be an accuracy of other problems
        if answer is None:
            raise InputError(f"example {name} has no answer: accuracy needs one for every problem")
        # a reference that nothing can match counts every answer as wrong, the right ones too
        why = unmatchable(answer, verifier or data.meta["verifier"])
        if why:
            raise InputError(f"{data.folder}: the answer of example {name} {why}")
    return [(i, number) for i in indices for number in range(samples)]


def grade_all(tokenizer, data, asked, answers, verifier=""):
    """Rows with grades, in the order of the questions. Each process grades its share."""
    verifier = verifier or data.meta["verifier"]
    # another engine's chat template may open thoughts that our data's does not: its answers show it
    opened = tokenizer is None and any(
        "</think>" in a["response"].partition("<think>")[0] for a in answers.values()
    )
    mine = []
    # grading is shared as well: math-verify takes a second for some answers
    for question in asked[rank() :: world_size()]:
        example = data.examples[question[0]]
        given = answers[name_of(data, question)]
        thinking = opened or thinks(tokenizer, data, question[0])
        row = {"id": example["id"], "sample": question[1], "response": given["response"]}
        row["answer"] = example["answer"]
        row |= judge(given["response"], example["answer"], verifier, thinking)
        row["truncated"] = given["truncated"]
        row["n_tokens"] = given["n_tokens"]
        mine.append(row)
    # question n was dealt to process n % P, as its n // P-th
    parts = gather(mine)
    return [parts[n % len(parts)][n // len(parts)] for n in range(len(asked))]


def thinks(tokenizer, data, i):
    """Does the prompt of example i end in an open <think>, as some chat templates let it? Then an
    answer that was cut off is all thoughts. tokenizer: None if only data.py's note is at hand."""
    # data.py has noted it where it rendered the prompt itself
    if "thinking" in data.examples[i]:
        return data.examples[i]["thinking"]
    return tokenizer is not None and opens_thoughts(tokenizer.decode(data.prompt(i)[-9:]))


# --------------------------------------------------------------------------------------------------
# What failed, and how often


def rates(rows):
    """What failed: shares of all answers that were truncated, unparsed, and whose thoughts were
    valid, empty, unclosed (never closed) or missing; undecided: only math-verify could have told."""
    # they tell format from ability: a student of accuracy 0 whose answers are all cut off or unread
    # may well know how to solve the problems
    shares = {
        "truncated": [row["truncated"] for row in rows],
        "unparsed": [row["extracted"] is None for row in rows],
        "undecided": [row.get("undecided", False) for row in rows],
    }
    for kind in THOUGHTS:
        shares[f"thoughts_{kind}"] = [row["thoughts"] == kind for row in rows]
    return {key: float(np.mean(values)) for key, values in shares.items()}


def repeated(data, indices):
    """{id: the first id with the same prompt}, of problems that are in the data more than once."""
    # two ids of one problem are one problem to the intervals: its answers are no new evidence
    first = {}
    twins = {}
    for i in indices:
        name = data.examples[i]["id"]
        # ids, not text: what the model reads is what makes two problems the same
        prompt = hashlib.sha256(np.ascontiguousarray(data.prompt(i)).tobytes()).digest()
        if prompt in first:
            twins[name] = first[prompt]
        else:
            first[prompt] = name
    return twins


def summarize(rows, seconds, twins=None):
    """What the table shows. Rates and means are over all answers, intervals over problems."""
    right = list(intervals.grades_by_problem(rows, twins).values())
    mean, interval = intervals.accuracy(right)
    # a vote is for what an answer means: 0.5 and 1/2 vote for the same
    votes = {}
    for row in rows:
        name = (twins or {}).get(row["id"], row["id"])
        # an answer that could not be read has no vote, but is one of the samples
        meaning = None if row["extracted"] is None else value(row["extracted"])
        votes.setdefault(name, []).append((meaning, row["correct"]))
    # samples of another engine may come without a count of tokens
    counted = [row["n_tokens"] for row in rows if row["n_tokens"] is not None]
    return {
        "accuracy": mean,
        "interval": interval,
        "pass_at_k": intervals.pass_at_each_k(right),
        "cov_at_k": intervals.coverage(right),
        "maj_at_k": intervals.majority(votes.values()),
        **rates(rows),
        "mean_tokens": float(np.mean(counted)) if counted else None,
        "seconds": round(seconds, 2),
        "problems": len(right),
        # of samples from a file some problems may have more: pass@k needs k of every problem
        "samples": min(len(answers) for answers in right),
    }


# --------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Evaluate every run, model and file that was named and print the table -> {name: (summary, rows)}.

    Raises InputError for keys that do not fit together, for a model whose tokenizer is not the one
    of the data, and for answers to problems that the data does not have, before anything is written.
    """
    cfg, jobs = resolve(Config, given)
    problems = load_data(cfg.data)
    indices = range(min(cfg.limit or len(problems), len(problems)))
    if cfg.likelihood:
        return likelihood.compare_models(cfg, jobs, problems, indices)
    # all that can be refused is refused here, before a model is loaded or an hour is spent
    questions(problems, indices, cfg.samples, cfg.verifier)
    check_tokenizers(cfg, jobs, problems)
    # config.json alone: no weights are needed to know what kind of student it is
    configs = [read_config(job.folder) for job in jobs if job.folder]
    if configs:
        check_used(configs, cfg)
    # answers from files are read in whole, since an unknown id may be on the last line
    files = {
        job.name: samples_of(job, problems, indices, cfg, given) for job in jobs if job.samples
    }
    device = pick_device(cfg.device)
    with sharing_processes():
        twins = repeated(problems, indices)
        show_settings(cfg, problems, len(indices), twins)
        results = {}
        # one model in memory at a time
        for job in jobs:
            if job.samples:
                result = result_of_file(cfg, job, problems, files[job.name], twins)
            else:
                result = result_of_model(cfg, job, problems, indices, device, twins)
            results[job.name] = result
        if rank() == 0:
            show_results(cfg, jobs, results, twins)
    return results


def result_of_file(cfg, job, problems, answers, twins):
    """Grade the answers of another engine, and write them -> (summary, rows)."""
    started = time.time()
    asked = questions_in(problems, answers)
    # no model, hence no tokenizer: the text is all there is
    rows = grade_all(None, problems, asked, answers, cfg.verifier)
    summary = summary_of(cfg, job, problems, rows, time.time() - started, twins)
    on_process_0(lambda: save(job.out, rows, summary))
    return summary, rows


def result_of_model(cfg, job, problems, indices, device, twins):
    """Let a model answer, grade, and write -> (summary, rows)."""
    started = time.time()
    rows, others, store = answer(cfg, job, problems, indices, device)
    summary = summary_of(cfg, job, problems, rows, time.time() - started, twins)
    # last of all the summary: where it is, the evaluation is complete
    store.finish(rows, others, summary)
    return summary, rows


def answer(cfg, job, problems, indices, device):
    """Let a model, or the server for it, answer -> (rows, rows that were not asked for, Store)."""
    server = Server(cfg.server, cfg.timeout, cfg.retries) if cfg.server else None
    served = (cfg.served or server.only_model()) if server else ""
    # answers are taken over only if weights, data and sampling are those they were written with
    store = Store(job, identity_of(cfg, job, problems, served), cfg.fresh)
    tokenizer = load_tokenizer(job.folder) if job.folder else None
    asked = questions(problems, indices, cfg.samples, cfg.verifier)
    names = {name_of(problems, question) for question in asked}
    have = sum(name in names for name in store.kept)
    if have:
        say(
            f"{job.name}: {have} of {len(asked)} answers were there already (--fresh=true samples anew)"
        )
    # one process draws the line, about all of them
    progress = status(job.name, len(asked)) if rank() == 0 else None
    if have == len(asked):  # the model is not needed any more
        rows = grade_all(tokenizer, problems, asked, store.kept, cfg.verifier)
    elif server:
        answers = ask_server(cfg, server, served, problems, asked, job, store, progress)
        rows = grade_all(tokenizer, problems, asked, answers, cfg.verifier)
    else:
        _, rows = evaluate(
            load(job.folder, device, getattr(torch, cfg.dtype)),
            tokenizer,
            problems,
            cfg,
            indices,
            samples=cfg.samples,
            batch_size=cfg.batch_size,
            progress=progress,
            verifier=cfg.verifier,
            kept=store.kept,
            keep=store.keep,
        )
    # answers that this command did not ask for (--limit, fewer --samples) stay in the file
    left = {name: kept for name, kept in store.kept.items() if name not in names}
    others = grade_all(tokenizer, problems, questions_in(problems, left), left, cfg.verifier)
    return rows, others, store


def questions_in(problems, answers):
    """The questions that these answers {(id, sample): answer} are for, in the order of the problems."""
    index = {example["id"]: i for i, example in enumerate(problems.examples)}
    return sorted((index[name], number) for name, number in answers if name in index)


def summary_of(cfg, job, problems, rows, seconds, twins):
    # all that somebody needs to repeat this number, beside the number
    made = {"model": str(job.folder or job.name), "data": cfg.data, "sha256": problems.sha256}
    sampling = sampling_keys(cfg)
    # rounding is part of how an answer came about
    sampling["dtype"] = cfg.dtype
    if job.samples:
        sampling = {"samples_from": job.samples}  # how another engine has sampled is not known here
    return summarize(rows, seconds, twins) | made | sampling


if __name__ == "__main__":
    command(main, Config)
