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
import re
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import diffusion
from config import InputError, command, run_folder, run_keys, whole_file, write_json
from data import load as load_data
from data import load_tokenizer, uniforms
from model import Cache, check_sampling, load, local_folder, next_token
from parallel import gather, in_step, pick_device, rank, world_size


@dataclass
class Config:
    run: str = ""  # runs to evaluate, separated by commas; base: the model that the others started from
    model: str = ""  # other models to evaluate: Hugging Face folders or hub ids, separated by commas
    data: str = ""  # the problems: a folder made by data.py; default: the first run's eval_data, else its data
    step: int = -1  # checkpoint of each run; -1: the last one
    limit: int = 0  # take only the first so many problems; 0: all
    # sampling: with --run, what is not given is what the first run recorded its accuracy with
    samples: int = 1  # answers per problem
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: int = 0  # sample among so many likeliest tokens; 0: no limit
    max_new_tokens: int = 1024  # length limit of an answer; one that reaches it counts as truncated
    seed: int = 0  # of the sampling
    batch_size: int = 64  # answers written at the same time; changes memory and speed, not the answers
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = "float32"  # float32 or bfloat16
    # sampling from masked-diffusion students only: diffusion.py
    block_length: int = 0  # tokens written together, from left to right; 0: LLaDA2's own; LLaDA min(32, max_new_tokens)
    denoising_steps: int = 0  # forward passes for max_new_tokens; 0: as many as tokens
    threshold: float = 0.0  # write all tokens surer than this at once, at least one; 0: LLaDA2 0.95, LLaDA none
    remasking: str = "low_confidence"  # which tokens wait: low_confidence or random
    cfg_scale: float = 0.0  # classifier-free guidance, LLaDA only
    eos_rule: str = "free"  # end-of-text: free: like any token; last: after all others of its block; never: not at all
    edit_threshold: float = -1.0  # LLaDA2.1: replace written tokens if surer than this of another; -1: never


# ---------------------------------------------------------------------------------------------------------------------
# The verifier: nothing is evaluated, no pattern can backtrack far, so a hostile text costs time linear in its length

VERIFIERS = ("boxed", "gsm8k", "integer", "toy", "auto")
LONGEST = 1000  # characters of an answer; a longer one is no answer (and Python's int() refuses 4300 digits)
NOISE = re.compile(r"\\[!,;:]|\\(?:left|right)(?![a-z])|\\?[$%]|\^ ?\{?\\circ ?\}?|°")
WORDS = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox)\{([^{}]*)\}(\^\{?[0-9]\}?)?")  # \text{cm}^2
FRACTION = r"([0-9]*) ?\\frac ?\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}"
DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
# In running text 5-3 is no -3, the 2 of x2 or cm^2 no number of its own, and .5 is one but ...5 is not. Powers are
# taken along, so that nobody who writes 10^3 is taken to have said 10.
IN_TEXT = re.compile(
    r"(?<!\^)(?<!\^\{)(?<!\^-)(?<!\^\{-)(?:(?<![\w)}])-|(?<![A-Za-z0-9_]))"
    rf"(?:{FRACTION}|{DECIMAL}(?:[eE][-+]?[0-9]+)?(?:/[0-9]+)?)" r"(?:\^\{?-?\w+\}?)?", re.ASCII)  # fmt: skip
# 1e3 is 1000; an exponent has three digits at most here, since 1e999999999 would fill the memory
ALONE = re.compile(rf"([-+]?)(?:{FRACTION}|({DECIMAL}(?:[eE][-+]?[0-9]{{1,3}})?)(?:/([0-9]+))?)\.?\s*([A-Za-z. ]*)")
BRACES = re.compile(r"\\\\(?!boxed)|(\\boxed\s*\{)|\\[{}]|[{}]")  # an escaped brace is no brace


def extract(text, verifier):
    r"""The answer that a response ends in, as it stands there; None: it gives none ("unparsed").

    boxed    the last \boxed{...} whose braces are balanced
    gsm8k    what follows the last ####
    integer  the last number
    toy      the last number behind a >
    auto     boxed if there is a \boxed, else gsm8k if there is a ####, else integer

    Only what follows the last </think> counts, if there is one; thoughts that never end give no answer.
    Raises InputError for another verifier.
    """
    _, thought, text = text.rpartition("</think>")
    if not thought and "<think>" in text:
        text = ""
    if verifier == "auto":
        verifier = "boxed" if "\\boxed" in text else "gsm8k" if "####" in text else "integer"
    if verifier == "boxed":
        found = last_boxed(text)
    elif verifier == "gsm8k":
        found = text.rpartition("####")[2].strip().partition("\n")[0] if "####" in text else None
    elif verifier == "integer":
        found = last_match(IN_TEXT, plain(text))
    elif verifier == "toy":
        found = last_match(re.compile(r"(?<=>) *-?[0-9]+"), text)
    else:
        raise InputError(f"unknown verifier {verifier!r}: must be one of {', '.join(VERIFIERS)}")
    return found.strip() if found and found.strip() and len(found) <= LONGEST else None


def grade(text, answer, verifier):
    """Is the answer that `text` ends in the right one? Numbers are compared exactly, all else letter by letter."""
    found = extract(text, verifier)
    return found is not None and value(found) == value(str(answer))


def value(answer):
    r"""What an answer means: a Fraction if it is a number (1{,}000.0, 1\frac{1}{2}, 018, $18 dollars, x = 3), else its
    letters without spaces. A percent sign is dropped like any unit: 50% is 50, never 1/2."""
    text = re.sub(r"^[A-Za-z] ?= ?", "", plain(answer).strip(" *\n"))  # **18**
    for reading in (WORDS.sub("", text), WORDS.sub(r"\1", text)):  # 18 \text{ dollars} or \text{18 dollars}
        number = ALONE.fullmatch(reading.strip())
        # 18 dollars is 18, but 18x and 2 pi are no numbers
        if not number or any(len(word) == 1 or word == "pi" for word in number[7].split()):
            continue
        sign, whole, top, bottom, decimal, divisor, _ = number.groups()
        try:
            if top:
                size = int(whole or 0) + Fraction(int(top), int(bottom))
            else:
                size = Fraction(decimal.replace(",", "")) / int(divisor or 1)
            return -size if sign == "-" else size
        except (ValueError, ZeroDivisionError):
            pass
    return re.sub(r"\s", "", WORDS.sub(r"\1\2", text))


def plain(text):
    r"""Without what LaTeX and money put around numbers: 1{,}000\,\$ -> 1,000, \dfrac12 -> \frac{1}{2}."""
    text = NOISE.sub("", text.replace("\u2212", "-").replace("{,}", ",").replace("\\ ", " "))
    return re.sub(r"\\frac ?([0-9])([0-9])", r"\\frac{\1}{\2}", re.sub(r"\\[dt]frac", r"\\frac", text))


def last_match(pattern, text):
    last = None
    for match in pattern.finditer(text):
        last = match
    return last and last[0]


def last_boxed(text):
    opened, last = [], None  # opened: of every open brace, where the inside of its \boxed begins, or None
    for brace in BRACES.finditer(text):
        if brace[1] or brace[0] == "{":
            opened.append(brace.end() if brace[1] else None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, brace.start()
    return last and text[last[0] : last[1]]


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


def sample(
    model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=0, example_ids=None,
    eos_ids=None, vocab_size=None, batch_size=64, progress=None, **decoding,
):  # fmt: skip
    """Continue each prompt (a list of ids) -> a list of ids for each, up to and without an end-of-text id (eos_ids;
    default: the model's own).

    An answer of max_new_tokens ids was cut off. Ids from vocab_size on (rows that pad the embedding) never come out.
    What is drawn for a prompt is a pure function of (seed, its example id, position), so an answer depends on no other
    prompt, on no batch and on no order, as far as the model's logits do not: these differ by rounding (1e-6 or so)
    with the shape of a batch, which can turn a near tie. `progress` is called with the number of finished answers.
    decoding: diffusion.generate's keywords; an autoregressive model has no use for them.
    """
    check_sampling(model.config, prompts, max_new_tokens, temperature, top_p, top_k)
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: out of range (python eval.py --help says what it means)")
    eos_ids = set(model.config.eos_token_ids if eos_ids is None else eos_ids)

    def choose(logits, u):  # (B, V), (B,) -> (B,)
        return next_token(logits[:, :vocab_size], u, temperature, top_p, top_k)

    example_ids = range(len(prompts)) if example_ids is None else example_ids
    answers = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: if memory is short, say so now
    for i in range(0, len(order), batch_size):
        batch = order[i : i + batch_size]
        asked, ids = [prompts[j] for j in batch], [example_ids[j] for j in batch]
        if model.config.is_diffusion:
            texts = diffusion.sample(
                model, asked, max_new_tokens, seed=seed, example_ids=ids, temperature=temperature, top_p=top_p,
                top_k=top_k, eos_ids=eos_ids, vocab_size=vocab_size, **decoding)  # fmt: skip
        else:
            u = np.stack([uniforms(seed, name, max_new_tokens) for name in ids])
            texts = write(model, asked, u, choose, eos_ids)
        for j, text in zip(batch, texts, strict=True):
            answers[j] = text
        if progress:
            progress(i + len(batch))
    return answers


@torch.no_grad()
def write(model, prompts, u, choose, eos_ids):
    """One batch of answers, autoregressively. u (B, max_new_tokens): a uniform for every token; -> lists of ids.

    Prompts are padded on the right and each row has its own positions. What padding left in the cache lies at later
    positions than a row has reached, and is overwritten before the row gets there.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), lengths.max(), dtype=torch.int64)  # (B, T)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    positions, u = lengths[:, None].to(device), torch.from_numpy(u).to(device)
    cache = Cache(model.config, len(prompts), ids.shape[1] + u.shape[1])
    parts, end = [], 0
    while end < len(prompts):  # prompts of about the same length together: less padding to compute
        start = end
        while end < len(prompts) and lengths[end] >= 0.8 * lengths[start]:
            end += 1
        cache.rows, last = slice(start, end), positions[start:end, 0] - 1
        parts.append(model(ids[start:end, : lengths[start:end].max()].to(device), cache=cache, rows=last))
    logits, cache.rows = torch.cat(parts), slice(None)  # (B, 1, V): of the last token of each prompt

    answers = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # whose answer each row of the batch is
    finished = set()
    for n in range(u.shape[1]):
        token = choose(logits[:, 0], u[:, n])  # (B,)
        for i, one in zip(rows, token.tolist(), strict=True):
            if one in eos_ids:
                finished.add(i)
            elif i not in finished:
                answers[i].append(one)
        left = [row for row, i in enumerate(rows) if i not in finished]
        if not left or n + 1 == u.shape[1]:
            break
        if len(left) <= len(rows) / 2:  # leave the finished rows behind; not one by one, each time copies the cache
            rows, index = [rows[row] for row in left], torch.tensor(left, device=device)
            cache.keep_rows(index)
            token, positions, u = token[index], positions[index], u[index]
        logits = model(token[:, None], positions=positions + n, cache=cache)
    return answers


def evaluate(model, tokenizer, data, indices=None, samples=1, progress=None, **sampling):
    """Let the model answer problems of a data.Data, `samples` times each, and grade -> (accuracy, rows).

    indices: which problems, default all. sampling: the keywords of `sample`. Accuracy is the mean over all answers.
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
            model, [data.prompt(i).tolist() for i, _ in mine],
            example_ids=[f"{data.examples[i]['id']} {s}" for i, s in mine],
            eos_ids={*model.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id},
            progress=progress and (lambda done: progress(min(done * world_size(), len(asked)))),
            vocab_size=tokenizer.vocab_size, **sampling,
        )  # fmt: skip
    rows, verifier = [], data.meta["verifier"]
    for (i, s), ids in zip(mine, texts, strict=True):
        response, answer = tokenizer.decode(ids), data.examples[i]["answer"]
        rows.append({
            "id": data.examples[i]["id"], "sample": s, "response": response, "extracted": extract(response, verifier),
            "answer": answer, "correct": grade(response, answer, verifier),
            "truncated": len(ids) == sampling["max_new_tokens"], "n_tokens": len(ids),
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
    settings = {k: getattr(cfg, k) for k in SAMPLING}
    shown = [f"{k} {v}" for k, v in settings.items() if k not in DECODING or v != getattr(Config, k)]
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
        _, rows = evaluate(student, load_tokenizer(folder), problems, indices, progress=progress,
                           batch_size=cfg.batch_size, **settings)  # fmt: skip
        summary = summarize(rows, time.time() - started)
        save(out, rows, {**summary, "model": str(folder), "data": cfg.data, "sha256": problems.sha256, **settings})
        results[name] = (summary, rows)
        s = summary
        print(f"{name:{width}}  {s['accuracy']:.3f} ± {s['interval']:.3f}  {s['pass_at_k']:8.3f}  {s['truncated']:9.3f}"
              f"  {s['unparsed']:8.3f}  {s['mean_tokens']:7.1f}  {s['seconds']:7.1f}")  # fmt: skip
    compare(results)
    return results


DECODING = ("block_length", "denoising_steps", "threshold", "remasking", "cfg_scale", "eos_rule", "edit_threshold")
SAMPLING = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed", *DECODING)


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
    inherited = {key: first[key] for key in SAMPLING if key in first}
    inherited["data"] = first.get("eval_data") or first.get("data", "")
    cfg = Config(**{**inherited, **given})
    if not cfg.data:
        raise InputError("--data is missing: a folder made by data.py (--help lists the keys)")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={cfg.dtype}: must be float32 or bfloat16")
    stem, jobs = Path(cfg.data).resolve().name, []
    for name in names:
        # the base is what every run was at step 0
        folder, step = (Path(first["model"]), 0) if name == "base" else checkpoint(name, trained[name], cfg.step)
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


def checkpoint(name, trained, step):
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
