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

import csv
import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import intervals
import likelihood
from data import load as load_data
from formats import read_examples
from hf.families import at_revision, local_folder, read_config
from hf.tokenizer import load_tokenizer
from model import load
from plumbing.config import InputError, above, command, require, whole_file, write_json
from plumbing.engine import Server, ask_all, read_samples, seed_of
from plumbing.parallel import (
    barrier,
    end_processes,
    gather,
    in_step,
    on_process_0,
    pick_device,
    pick_dtype,
    rank,
    world_size,
)
from plumbing.runs import find_checkpoint, run_folder, run_keys
from sample import Sampling, check_used, sample
from verify import THOUGHTS, VERIFIERS, judge, opens_thoughts, unmatchable, value


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
    # how our own sampler works; answers do not depend on it, in bfloat16 as far as rounding allows
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


@dataclass
class Job:
    """A row of the table."""

    name: str
    folder: Path | None  # of the model; None if another engine has answered
    out: Path  # the answers, .jsonl
    samples: str = ""  # the file of another engine's answers


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
    kept=None,
    keep=None,
):
    """Let the model answer problems of a data.Data, and grade the answers -> (accuracy, rows).

    sampling  a sample.Sampling
    indices   which problems; default: all
    samples   answers per problem
    progress  called with the number of answers that are written, of all processes together
    verifier  how answers are read; default: as the data says
    kept      {(id, sample): answer} that are there already, and are not sampled again
    keep      called with each new answer as soon as it is finished

    Accuracy is the mean over all answers. Rows are in the order of the problems, the samples of a
    problem side by side: {"id", "sample", "response", "extracted", "answer", "correct", "thoughts",
    "truncated", "n_tokens"}, and "undecided": True where only math-verify, which is not installed,
    could have told. Of several processes each writes its share of the answers, and all return all
    of them. Raises InputError for a problem without an answer that a response can match.
    """
    asked = questions(data, indices, samples, verifier)
    answers = dict(kept or {})
    missing = [question for question in asked if name_of(data, question) not in answers]
    mine = missing[rank() :: world_size()]
    done = len(asked) - len(missing)

    def finished(number, ids):
        answer = {"id": data.examples[mine[number][0]]["id"], "sample": mine[number][1]}
        answer["response"] = tokenizer.decode(ids)
        answer["truncated"] = len(ids) == sampling.max_new_tokens
        answer["n_tokens"] = len(ids)
        written.append(answer)
        if keep:
            keep(answer)
        if progress:  # the other processes are about as far as this one
            progress(min(done + len(written) * world_size(), len(asked)))

    written = []
    with in_step(model):  # a forward pass of a sharded model needs every process
        sample(
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
            vocab_size=tokenizer.vocab_size,
            finished=finished,
        )
    for part in gather(written):
        answers |= {(answer["id"], answer["sample"]): answer for answer in part}
    rows = grade_all(tokenizer, data, asked, answers, verifier)
    return float(np.mean([row["correct"] for row in rows])), rows


def questions(data, indices, samples, verifier=""):
    """[(problem's index, number of the sample)]. Raises InputError if there is none, or for a problem
    whose answer no response could match."""
    indices = range(len(data)) if indices is None else [int(i) for i in indices]
    if not len(indices) or samples < 1:
        raise InputError("no problem, or no sample, to evaluate")
    for i in indices:
        name = data.examples[i]["id"]
        answer = data.examples[i].get("answer")
        if answer is None:
            raise InputError(f"example {name} has no answer: accuracy needs one for every problem")
        why = unmatchable(answer, verifier or data.meta["verifier"])
        if why:
            raise InputError(f"{data.folder}: the answer of example {name} {why}")
    return [(i, number) for i in indices for number in range(samples)]


def name_of(data, question):
    """What an answer to this question is stored under: (id of the problem, number of the sample)."""
    return data.examples[question[0]]["id"], question[1]


def grade_all(tokenizer, data, asked, answers, verifier=""):
    """Rows with grades, in the order of the questions. Each process grades its share."""
    verifier = verifier or data.meta["verifier"]
    # another engine's chat template may open thoughts that our data's does not: its answers show it
    opened = tokenizer is None and any("</think>" in a["response"].partition("<think>")[0] for a in answers.values())
    mine = []
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
    if "thinking" in data.examples[i]:
        return data.examples[i]["thinking"]
    return tokenizer is not None and opens_thoughts(tokenizer.decode(data.prompt(i)[-9:]))


# --------------------------------------------------------------------------------------------------
# What failed, and how often


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


def by_problem(rows, key="correct"):
    """{problem id: mean of `key` over its samples}"""
    values = {}
    for row in rows:
        values.setdefault(row["id"], []).append(float(row[key]))
    return {problem: float(np.mean(several)) for problem, several in values.items()}


def grades_by_problem(rows, twins=None):
    """{problem id: is each of its answers right}. twins: {id: the id of an equal problem}, whose
    answers count as answers to one problem."""
    right = {}
    for row in rows:
        name = (twins or {}).get(row["id"], row["id"])
        right.setdefault(name, []).append(bool(row["correct"]))
    return right


def repeated(data, indices):
    """{id: the first id with the same prompt}, of problems that are in the data more than once."""
    first = {}
    twins = {}
    for i in indices:
        name = data.examples[i]["id"]
        prompt = hashlib.sha256(np.ascontiguousarray(data.prompt(i)).tobytes()).digest()
        if prompt in first:
            twins[name] = first[prompt]
        else:
            first[prompt] = name
    return twins


def summarize(rows, seconds, twins=None):
    """What the table shows. Rates and means are over all answers, intervals over problems."""
    right = list(grades_by_problem(rows, twins).values())
    mean, interval = intervals.accuracy(right)
    votes = {}
    for row in rows:
        name = (twins or {}).get(row["id"], row["id"])
        meaning = None if row["extracted"] is None else value(row["extracted"])
        votes.setdefault(name, []).append((meaning, row["correct"]))
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
        "samples": min(len(answers) for answers in right),
    }


# --------------------------------------------------------------------------------------------------
# Answers on disk


class Store:
    """The answers of one job: what was finished earlier, and a place for each new one.

    A finished answer is appended to a file of its process in runs/<run>/eval-unfinished/, where a
    kill costs at most the line that was being written. `identity` says what the answers depend on;
    those of another identity are not ours to use.
    """

    def __init__(self, job, identity, fresh):
        self.out = job.out
        self.identity = identity
        self.folder = job.out.parent.with_name("eval-unfinished")
        self.file = None
        self.kept = on_process_0(lambda: {} if fresh else self.read())

    def read(self):
        """{(id, sample): answer} of all answers with this identity."""
        kept = {}
        for path in [self.out, *sorted(self.folder.glob(f"{self.identity}.*.jsonl"))]:
            lines = json_lines(path)
            if path == self.out:
                summary = json_lines(path.with_suffix(".json"), whole=True)
                if not summary or summary[0].get("identity") != self.identity:
                    continue
            for row in lines:
                keys = ("id", "sample", "response", "truncated", "n_tokens")
                if all(key in row for key in keys):
                    kept[row["id"], row["sample"]] = {key: row[key] for key in keys}
        return kept

    def keep(self, answer):
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.identity}.{rank()}.{os.getpid()}.jsonl"
            self.file = open(path, "a", encoding="utf-8")
        self.file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self.file.flush()

    def finish(self, rows, others, summary):
        """Write the answers and the summary; what was unfinished is done with. others: rows of
        earlier evaluations that were not asked for this time."""
        if self.file:
            self.file.close()
        barrier()
        if rank() == 0:
            save(self.out, [*rows, *others], {**summary, "identity": self.identity})
            for path in self.folder.glob(f"{self.identity}.*.jsonl"):
                path.unlink()
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()


def json_lines(path, whole=False):
    """The objects of a jsonl file, or the one of a json file; [] if there is no such file. What was
    being written when a process was killed is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in [text] if whole else text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def save(out, rows, summary):
    """Write the answers to `out`, a line each, and the summary to the .json beside it."""
    with whole_file(out) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # the interval of a single response is nan, which JSON does not have
    finite = {key: None if value != value else value for key, value in summary.items()}
    write_json(out.with_suffix(".json"), finite)


def identity_of(cfg, job, problems, served):
    """What answers depend on, as text: the model's files, the prompts, how it is sampled."""
    sampling = {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
    parts = {"data": problems.sha256, "sampling": sampling}
    if served:
        parts |= {"server": served}
    else:
        # files of other sizes or times are other weights; reading them all would take minutes
        weights = sorted(Path(job.folder).glob("*.safetensors"))
        parts["weights"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
        parts["dtype"] = cfg.dtype
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Answers of another engine


def ask_server(cfg, server, served, problems, asked, job, store, progress):
    """Let the server answer what is not there yet -> {(id, sample): answer}.

    A checkpoint of ours is sent the prompt's token ids (/completions): what it was trained on, whatever
    the server makes of chat templates. A model that is known by its name only may have another
    tokenizer: it is sent the messages (/chat/completions), from the file the data was made from.
    """
    if job.folder:
        path = "completions"
        prompts = {i: {"prompt": problems.prompt(i).tolist()} for i in {i for i, _ in asked}}
    else:
        path = "chat/completions"
        prompts = messages_of(problems, {i for i, _ in asked})
    answers = dict(store.kept)
    bodies = {}
    for question in asked:
        name = name_of(problems, question)
        if name in answers:
            continue
        body = {"model": served, "max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
        body |= {"top_p": cfg.top_p, "seed": seed_of(cfg.seed, f"{name[0]} {name[1]}")}
        if cfg.top_k:
            body["top_k"] = cfg.top_k  # vLLM and SGLang know it, OpenAI does not
        bodies[name] = body | prompts[question[0]]

    def finished(name, found):
        answers[name] = {"id": name[0], "sample": name[1], **found[0]}
        store.keep(answers[name])
        if progress:
            progress(sum(name_of(problems, question) in answers for question in asked))

    ask_all(server, path, bodies, cfg.batch_size, finished)
    return answers


def messages_of(problems, indices):
    """{index: {"messages": [...]}}, read from the file that the data folder was made from."""
    source = problems.meta.get("source", "")
    if not Path(source).is_file():
        raise InputError(f"{problems.folder}: made from {source}, which is needed for the messages and is not there")
    wanted = {problems.examples[i]["id"]: i for i in indices}
    found = {}
    for example in read_examples(source):
        if example.id in wanted:
            found[wanted[example.id]] = {"messages": example.messages}
    for i in indices:
        if i not in found:
            raise InputError(f"{source}: has no line with the id {problems.examples[i]['id']}; not what the data is of")
    return found


def samples_of(job, problems, indices, cfg, told):
    """The answers of a file to these problems -> {(id, sample): answer}.

    Their samples are numbered anew, 0, 1, ...: as many for each problem as --samples says, or as the
    problem with the fewest has.
    """
    known = {example["id"] for example in problems.examples}
    several = {problems.examples[i]["id"]: [] for i in indices}
    for answer in sorted(read_samples(job.samples, known), key=lambda answer: answer["sample"]):
        if answer["id"] in several:
            several[answer["id"]].append(answer)
    fewest, name = min((len(answers), name) for name, answers in several.items())
    most = max(map(len, several.values()))
    without = sum(not answers for answers in several.values())
    if without:
        raise InputError(f"{job.samples}: {without} of {len(several)} problems have no answer, {name} for one")
    if "samples" in told and cfg.samples > fewest:
        raise InputError(f"--samples={cfg.samples}: problem {name} has only {fewest} in {job.samples}")
    n = cfg.samples if "samples" in told else fewest
    if most > n and rank() == 0:
        print(f"{job.samples}: {fewest} to {most} samples a problem; the first {n} of each are used")
    return {(name, k): answers[k] for name, answers in several.items() for k in range(n)}


# --------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Evaluate every run, model and file that was named and print the table -> {name: (summary, rows)}.

    Raises InputError for keys that do not fit together, for a model whose tokenizer is not the one
    of the data, and for answers to problems that the data does not have, before anything is written.
    """
    cfg, jobs = resolve(given)
    problems = load_data(cfg.data)
    indices = range(min(cfg.limit or len(problems), len(problems)))
    if cfg.likelihood:
        return compare_likelihoods(cfg, jobs, problems, indices)
    questions(problems, indices, cfg.samples, cfg.verifier)
    check_tokenizers(cfg, jobs, problems)
    configs = [read_config(job.folder) for job in jobs if job.folder]
    if configs:
        check_used(configs, cfg)
    files = {job.name: samples_of(job, problems, indices, cfg, given) for job in jobs if job.samples}
    device = pick_device(cfg.device)
    with sharing_processes():
        twins = repeated(problems, indices)
        show_settings(cfg, problems, len(indices), twins)
        results = {}
        for job in jobs:
            started = time.time()
            if job.samples:
                rows = grade_all(None, problems, questions_in(problems, files[job.name]), files[job.name], cfg.verifier)
                summary = summary_of(cfg, job, problems, rows, time.time() - started, twins)
                on_process_0(lambda job=job, rows=rows, summary=summary: save(job.out, rows, summary))
            else:
                rows, others, store = answer(cfg, job, problems, indices, device)
                summary = summary_of(cfg, job, problems, rows, time.time() - started, twins)
                store.finish(rows, others, summary)
            results[job.name] = (summary, rows)
        if rank() == 0:
            show_results(cfg, jobs, results, twins)
    return results


def check_tokenizers(cfg, jobs, problems):
    """Raises InputError, before the first model writes, unless all have the tokenizer of the data."""
    for job in jobs:
        if job.folder and load_tokenizer(job.folder).hash != problems.meta["tokenizer_hash"]:
            message = f"{cfg.data}: made with another tokenizer than {job.folder} has"
            raise InputError(f"{message}; run data.py with that folder")


def compare_likelihoods(cfg, jobs, problems, indices):
    """Print every model's log p of the responses -> {name: (summary, rows)}.

    Beside the answers' file, <data>-<step>-likelihood.jsonl has a line per response.
    """
    require(cfg, draws=(2, None))
    if cfg.server or cfg.samples_from:
        raise InputError("--likelihood needs the model itself, not --server or --samples_from")
    device = pick_device(cfg.device)
    check_tokenizers(cfg, jobs, problems)
    print(f"{cfg.data}: {len(indices)} responses; ≤ before a bound, of {cfg.draws} draws each")
    results = {}
    width = max(len(job.name) for job in jobs)
    print(f"{'':{width}}  nats a token       log p of a response")
    for job in jobs:
        student = load(job.folder, device, pick_dtype(cfg.dtype, device))
        progress = likelihood.status(job.name, len(indices))
        found = likelihood.logprobs(
            student, problems, list(indices), cfg.draws, cfg.seed, cfg.batch_size, progress
        )
        rows = likelihood.rows_of(problems, indices, found)
        a_token = intervals.mean_interval([row["nats_per_token"] for row in rows])
        whole = intervals.mean_interval([row["logprob"] for row in rows])
        summary = {
            "nats_per_token": a_token[0],
            "interval": a_token[1],
            "logprob": whole[0],
            "logprob_interval": whole[1],
            "is_bound": student.config.is_diffusion,
            "draws": found.shape[1],
            "seed": cfg.seed,
            "model": str(job.folder),
            "data": cfg.data,
            "sha256": problems.sha256,
        }
        save(job.out.with_name(f"{job.out.stem}-likelihood.jsonl"), rows, summary)
        results[job.name] = (summary, rows)
        sign = "≤" if summary["is_bound"] else " "
        text = f"{a_token[0]:.4f} ± {a_token[1]:.4f}  {whole[0]:8.2f} ± {whole[1]:.2f}"
        print(f"{job.name:{width}} {sign}{text}")
    compare(results, "nats_per_token")
    return results


@contextmanager
def sharing_processes():
    """Under torchrun the processes share the answers; each has a whole model of its own."""
    begun = "RANK" in os.environ and not dist.is_initialized()
    if begun:
        # they only exchange texts at the end; the first to finish waits for the longest answer
        dist.init_process_group("gloo", timeout=timedelta(days=2))
    yield
    if begun:
        end_processes()


def answer(cfg, job, problems, indices, device):
    """Let a model, or the server for it, answer -> (rows, rows that were not asked for, Store)."""
    server = Server(cfg.server, cfg.timeout, cfg.retries) if cfg.server else None
    served = (cfg.served or server.only_model()) if server else ""
    store = Store(job, identity_of(cfg, job, problems, served), cfg.fresh)
    tokenizer = load_tokenizer(job.folder) if job.folder else None
    asked = questions(problems, indices, cfg.samples, cfg.verifier)
    names = {name_of(problems, question) for question in asked}
    have = sum(name in names for name in store.kept)
    if have:
        say(f"{job.name}: {have} of {len(asked)} answers were there already (--fresh=true samples anew)")
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
    left = {name: kept for name, kept in store.kept.items() if name not in names}
    others = grade_all(tokenizer, problems, questions_in(problems, left), left, cfg.verifier)
    return rows, others, store


def questions_in(problems, answers):
    """The questions that these answers {(id, sample): answer} are for, in the order of the problems."""
    index = {example["id"]: i for i, example in enumerate(problems.examples)}
    return sorted((index[name], number) for name, number in answers if name in index)


def resolve(given):
    """The keys given -> a complete Config, and the jobs."""
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
    if not cfg.data:
        raise InputError("--data is missing: a folder made by data.py (--help lists the keys)")
    require(
        cfg,
        limit=(0, None),
        batch_size=(1, None),
        retries=(0, None),
        timeout=(above(0), None),
        temperature=(0, None),
        top_p=(above(0), 1),
        top_k=(0, None),
        max_new_tokens=(1, None),
    )
    cfg.dtype = str(pick_dtype(cfg.dtype, pick_device(cfg.device))).removeprefix("torch.")
    if cfg.verifier and cfg.verifier not in VERIFIERS:
        raise InputError(f"--verifier={cfg.verifier}: must be one of {', '.join(VERIFIERS)}")
    jobs = jobs_of_runs(cfg, names, trained)
    elsewhere = bool(cfg.server or files)  # a model that another engine serves need not be here
    jobs += [job_of_model(cfg, at_revision(name, cfg.revision), elsewhere) for name in models]
    if cfg.server and (len(jobs) != 1 or files):
        raise InputError("--server answers for one run or model at a time: give one --run or --model")
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
    return out.with_name(out.stem + "".join(f"-{key}={getattr(cfg, key)}" for key in changed) + ".jsonl")


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


# --------------------------------------------------------------------------------------------------
# The table


def say(text):
    if rank() == 0:
        print(text)


def show_settings(cfg, problems, n_problems, twins):
    """Print what every model is asked, and how it is sampled."""
    always = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    shown = []
    for key in ("samples", *(field.name for field in fields(Sampling))):
        # most keys concern diffusion students only: those that were left alone say nothing
        if key in always or getattr(cfg, key) != getattr(Config, key):
            shown.append(f"{key} {getattr(cfg, key)}")
    verifier = cfg.verifier or problems.meta["verifier"]
    say(f"{cfg.data}: {n_problems} problems, verifier {verifier}, {', '.join(shown)}")
    if twins:
        name, first = next(iter(twins.items()))
        say(f"{len(twins)} problems are there before under another id ({name} is {first}): counted as one each")


def summary_of(cfg, job, problems, rows, seconds, twins):
    made = {"model": str(job.folder or job.name), "data": cfg.data, "sha256": problems.sha256}
    sampling = {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
    sampling["dtype"] = cfg.dtype
    if job.samples:
        sampling = {"samples_from": job.samples}  # how another engine has sampled is not known here
    return summarize(rows, seconds, twins) | made | sampling


def show_results(cfg, jobs, results, twins):
    """Print the table and what it does not show; write it as csv and json beside the first answers."""
    lines = table_of(results, twins)
    columns = [column for column in lines[0] if not column.startswith(("difference", "p_value"))]
    if all(line["missing"] == 1 for line in lines):  # no model thinks
        columns = [column for column in columns if column not in THOUGHTS]
    texts = [[cell(line[column]) for column in columns] for line in lines]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    for row in [[*columns], *texts]:
        first, *rest = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]))
    for name, (summary, rows) in results.items():
        tell(name, summary, rows)
    for line in lines[1:]:
        if "difference" in line and line["difference"] != "":
            low, high = line["difference_low"], line["difference_high"]
            print(
                f"{line['model']} - {lines[0]['model']}: {line['difference']:+.3f} [{low:+.3f}, {high:+.3f}], "
                f"p = {line['p_value']:.3g} (paired, {line['problems']} problems)"
            )
    out = jobs[0].out.parent.with_name("tables") / f"{Path(cfg.data).resolve().name}.json"
    write_json(out, {"rows": [{k: None if v == "" else v for k, v in line.items()} for line in lines]})
    with whole_file(out.with_suffix(".csv")) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def table_of(results, twins):
    """A dict per model; difference and p-value compare with the first one, problem by problem."""
    most = min(summary["samples"] for summary, _ in results.values())
    lines = []
    (_, (_, base)), *_ = results.items()
    first = grades_by_problem(base, twins)
    for name, (summary, rows) in results.items():
        line = {"model": name, "accuracy": summary["accuracy"]}
        line["low"], line["high"] = summary["interval"]
        line |= {f"pass@{k}": summary["pass_at_k"][k] for k in shown_k(most)}
        line |= {"cov": summary["cov_at_k"], "maj": summary["maj_at_k"]}
        line |= {key: summary[key] for key in ("truncated", "unparsed")}
        line |= {kind: summary[f"thoughts_{kind}"] for kind in THOUGHTS}
        line |= {"tokens": summary["mean_tokens"] if summary["mean_tokens"] is not None else ""}
        line |= {key: summary[key] for key in ("seconds", "problems", "samples")}
        if len(results) > 1:
            line |= dict.fromkeys(("difference", "difference_low", "difference_high", "p_value"), "")
        if lines:
            second = grades_by_problem(rows, twins)
            shared = [problem for problem in first if problem in second]
            found = intervals.paired([first[p] for p in shared], [second[p] for p in shared])
            line["difference"], (line["difference_low"], line["difference_high"]), line["p_value"] = found
        lines.append(line)
    return lines


def compare(results, key):
    """Print how each model's `key` differs from the first one's, problem by problem."""
    (first, (_, rows)), *others = results.items()
    base = by_problem(rows, key)
    for name, (_, rows) in others:
        differences = [mean - base[problem] for problem, mean in by_problem(rows, key).items()]
        difference, interval = intervals.mean_interval(differences)
        text = f"{difference:+.3f} ± {interval:.3f}"
        print(f"{name} - {first}: {text} (paired, {len(base)} problems)")


def shown_k(most):
    """1, 2, 4, ... and the largest: the summary has every k."""
    powers = [2**n for n in range(1, 20) if 2**n < most]
    return [*powers, most] if most > 1 else []


def cell(value):
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def tell(name, summary, rows):
    """Print what a reader of the table must know of a model's answers, if there is anything."""
    why = explain(summary["accuracy"], summary)
    if why:
        print(f"{name}: {why}")
    undecided = sum(row.get("undecided", False) for row in rows)
    if undecided:
        print(
            f"{name}: {undecided} answers are formulas that only math-verify can compare; "
            "they count as wrong: pip install math-verify"
        )


def status(name, total):
    """A progress line that is rewritten after every answer, on a terminal."""

    def show(done):
        text = f"{name}: {done}/{total} answers" if done < total else ""
        print(f"\r\x1b[K{text}", end="", flush=True)

    return show if sys.stdout.isatty() else None


if __name__ == "__main__":
    command(main, Config)
