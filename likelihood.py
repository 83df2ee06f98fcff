"""How likely does a student find given responses? For `python eval.py --likelihood=true`.

An autoregressive student gives log p(response | prompt) exactly, in one forward pass. A
masked-diffusion student gives a lower bound (arXiv 2502.09992, eq. 6; ML-GSAI/LLaDA,
get_log_likelihood.py), with x_t the response x_0 of L tokens in which k of them are masked:

    log p(x_0 | prompt)  >=  E over k = 1..L and which k  of
                                 L / k  sum over masked i of  log p(x_0^i | prompt, x_t)

estimated by draws, each with an exact number of masks; the numbers k are stratified over the draws.
A block model's response is the product of its blocks, each given those before it: the bound is the
sum of the blocks' bounds, all in one pass, and the pads that fill the last block are part of it.

Shapes: B examples, T tokens of a row. Next: data.py, as from eval.py.
"""

import math

import numpy as np
import torch

from batches import collate
from diffusion import check_model, hide, lay_out, row_ends, tensors
from intervals import by_problem, mean_interval
from model import load
from plumbing.answers import save
from plumbing.config import InputError, require
from plumbing.jobs import check_tokenizers
from plumbing.parallel import pick_device, pick_dtype
from plumbing.screen import status


def logprobs(model, data, indices, draws=128, seed=0, batch_size=64, progress=None):
    """log p(response | prompt) of examples of a data.Data -> (n, draws) float64, in nats.

    One column, the exact value, for an autoregressive student; else the draws of the lower bound,
    whose mean estimates it. They are a function of (seed, example, draw). progress: called with the
    number of finished examples.
    """
    estimate = bound if model.config.is_diffusion else exact
    indices = np.asarray(indices, dtype=np.int64)
    found = []
    for start in range(0, len(indices), batch_size):
        some = indices[start : start + batch_size]
        found.append(estimate(model, data, some, draws, seed))
        if progress:
            progress(start + len(some))
    return np.concatenate(found)


@torch.no_grad()
def exact(model, data, examples, draws, seed):
    """Of an autoregressive student -> (n, 1)."""
    device = next(model.parameters()).device
    ids, targets, _ = collate(data, examples)
    ids = torch.from_numpy(ids).to(device)
    targets = torch.from_numpy(targets).to(device)
    nll = model(ids, targets).double()  # (B, T)
    return -nll.sum(1, keepdim=True).cpu().numpy()


@torch.no_grad()
def bound(model, data, examples, draws, seed):
    """Of a masked-diffusion student -> (n, draws)."""
    config = model.config
    check_model(config)
    device = next(model.parameters()).device
    sizes = data.spans[examples, 2] - data.spans[examples, 0]
    ends = row_ends(config, sizes)
    offset = lay_out(config, data, examples, ends, f"{seed} counts").u  # (B, 1 + T), one a part
    found = np.zeros((len(examples), draws))
    for draw in range(draws):
        rows = lay_out(config, data, examples, ends, f"{seed} likelihood {draw}")
        T = rows.ids.shape[1]
        length = config.block_length if config.attention == "block" else T
        part = np.arange(T) // length  # which block a position belongs to
        # stratified: over the draws, the level goes once around 0..1
        level = (offset + draw / draws) % 1
        masked, factor = mask_counts(rows, part, level)
        batch = tensors(hide(rows, masked, config, device), device)
        nll = model(**batch)[:, :T]
        nll = nll.double().cpu().numpy()
        found[:, draw] = -(nll * factor).sum(1)
    return found


def mask_counts(rows, part, level):
    """Mask k of the L answer tokens of each part of each row.

    -> masked (B, T) bool, factor L / k (B, T)
    part (T,) numbers the parts; level (B, parts or more) in [0, 1): k = 1 + floor(L * level).
    """
    masked = np.zeros(rows.ids.shape, dtype=bool)
    factor = np.zeros(rows.ids.shape)
    for row, answer in enumerate(rows.maskable):
        for number in np.unique(part[answer]):
            at = np.flatnonzero(answer & (part == number))
            L = len(at)
            k = 1 + int(L * level[row, number])
            order = np.argsort(rows.u[row, 1 + at], kind="stable")  # random
            chosen = at[order[:k]]
            masked[row, chosen] = True
            factor[row, chosen] = L / k
    return masked, factor


def rows_of(data, indices, found):
    """What is written of each example: log p in nats, half its 95 % interval, tokens, nats a token.

    The draws are stratified, so 1.96 standard errors are rather too wide; an exact value has 0.
    """
    rows = []
    for i, draws in zip(indices, found, strict=True):
        error = 0.0
        if len(draws) > 1:
            error = draws.std(ddof=1) / math.sqrt(len(draws))
        _, prompt_end, end = data.spans[i]
        tokens = int(end - prompt_end)
        mean = float(draws.mean())
        row = {
            "id": data.examples[i]["id"],
            "logprob": mean,
            "interval": float(1.96 * error),
            "tokens": tokens,
            "nats_per_token": -mean / tokens,
        }
        rows.append(row)
    return rows


def compare_models(cfg, jobs, problems, indices):
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
        progress = status(job.name, len(indices), "responses")
        found = logprobs(
            student, problems, list(indices), cfg.draws, cfg.seed, cfg.batch_size, progress
        )
        rows = rows_of(problems, indices, found)
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


def compare(results, key):
    """Print how each model's `key` differs from the first one's, problem by problem."""
    (first, (_, rows)), *others = results.items()
    base = by_problem(rows, key)
    for name, (_, rows) in others:
        differences = [mean - base[problem] for problem, mean in by_problem(rows, key).items()]
        difference, interval = mean_interval(differences)
        text = f"{difference:+.3f} ± {interval:.3f}"
        print(f"{name} - {first}: {text} (paired, {len(base)} problems)")
