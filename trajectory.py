"""The trajectory (paper, section 2): what theta_step thinks of every response token, and how often it is right.

train.py calls `record` at every recorded checkpoint. It makes a sweep of its own over the training examples, forward
only, a third of the work of an epoch: c_t = log p(y_t | y_<t, x) is a property of (checkpoint, data), not of training
batches. runs/<run>/trajectory/<step>.npz is what select.py reads. Next: select.py.
"""

import math
import time

import numpy as np
import torch
import torch.distributed as dist

import diffusion
import eval as evaluation
from batches import next_token_batch, shares
from plumbing.config import InputError, whole_file
from plumbing.parallel import gather, on_process_0, rank, world_size


@torch.no_grad()
def record(run, step):
    """Write trajectory/<step>.npz and return the log line.

    A sweep of its own over all training examples, whatever is selected: c_t = log p(y_t | y_<t, x) is a property of
    (checkpoint, data), not of batches; of a diffusion student it is diffusion.confidence. Train accuracy is that of
    sampled answers, graded by eval.py; None if an example has no answer to compare with (then name the bottleneck
    yourself: select.py --bottleneck=STEP).
    """
    cfg, train_set, tick = run.cfg, run.train_set, time.time()
    partial = run.folder / "trajectory" / f".{step:06d}.logprob"
    nll = sweep(run, partial, step)
    settings = {"samples": cfg.samples, "batch_size": cfg.sample_batch_size}
    accuracy, correct = None, np.full(len(train_set), np.nan, dtype=np.float32)
    if all(example["answer"] is not None for example in train_set.examples):
        settings["progress"] = progress(cfg, step, train_set)
        accuracy, rows = evaluation.evaluate(run.student, run.tokenizer, train_set, cfg, **settings)
        correct = np.array([r["correct"] for r in rows], dtype=np.float32).reshape(len(train_set), -1).mean(1)
    line = {"step": step, "event": "record", "nll": nll, "accuracy": accuracy}
    if run.eval_set is not None:
        settings["progress"] = progress(cfg, step, run.eval_set)
        line["eval_accuracy"], _ = evaluation.evaluate(run.student, run.tokenizer, run.eval_set, cfg, **settings)

    def write():
        path = partial.with_name(f"{step:06d}.npz")
        logprob = np.memmap(partial, dtype="<f4", mode="r")
        with whole_file(path) as aside, open(aside, "wb") as file:
            np.savez(file, logprob=logprob, correct=correct, accuracy=np.nan if accuracy is None else accuracy,
                     step=step, sha256=train_set.sha256, tokenizer_hash=run.tokenizer.hash)  # fmt: skip
        partial.unlink()

    on_process_0(write)
    return {**line, "seconds": round(time.time() - tick, 4)}


def sweep(run, partial, step):
    """Fill the file `partial`, (n_tokens,) float32, with log-probabilities, nan at prompts -> mean NLL of a response.

    Nothing is held for longer than a forward pass, so the data may be as large as the disk. A sweep that was
    interrupted goes on with the passes it lacks, the same ones as before: every value is what it would have been.
    """
    spans = run.train_set.spans

    def begin():
        if not partial.exists() or partial.stat().st_size != 4 * len(run.train_set.tokens):
            with whole_file(partial) as aside, open(aside, "wb") as file:
                for i in range(0, len(run.train_set.tokens), 2**20):  # real blocks, so a full disk is noticed here
                    file.write(np.full(min(2**20, len(run.train_set.tokens) - i), np.nan, dtype="<f4").tobytes())
        stored = np.memmap(partial, dtype="<f4", mode="r")
        return np.array([np.isfinite(stored[a:b]).all() for _, a, b in spans])

    done = on_process_0(begin)  # (n,) bool
    for rows in shares(run, np.arange(len(spans))):
        missing = any(not done[i] for row in rows for i in row)
        if not any(gather(missing)):
            continue
        parts = [None] * world_size()
        scored = list(score(run, rows))  # (example, (response tokens,) float32)
        if dist.is_initialized():
            dist.gather_object(scored, parts if rank() == 0 else None)
        else:
            parts = [scored]
        if rank() == 0:
            with open(partial, "rb+") as file:
                for example, logprob in (pair for part in parts for pair in part):
                    file.seek(4 * spans[example, 1])
                    file.write(logprob.astype("<f4").tobytes())

    def finish():
        stored = np.memmap(partial, dtype="<f4", mode="r")
        total = math.fsum(float(stored[a:b].sum(dtype=np.float64)) for _, a, b in spans)
        if not math.isfinite(total):
            partial.unlink()
            raise InputError(f"step {step}: a response token has probability 0 or nan under the student; "
                             "nothing written")  # fmt: skip
        return -total / int((spans[:, 2] - spans[:, 1]).sum())

    return on_process_0(finish)


def score(run, rows):
    """Log-probability of the response tokens of each example in `rows`: yields (example, (n,) float32)."""
    examples = np.array([i for row in rows for i in row], dtype=np.int64)
    if run.shape.is_diffusion:
        cfg = run.cfg
        found = diffusion.confidence(run.student, run.train_set, examples, draws=cfg.confidence_draws, seed=cfg.seed)
        yield from zip(examples.tolist(), found, strict=True)
        return
    batch = next_token_batch(run, rows)
    nll = run.student(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
    nll = nll.cpu().numpy()  # (B, T): position i predicts token i + 1
    for row, packed in enumerate(rows):
        at = 0
        for example in packed:
            start, prompt_end, end = run.train_set.spans[example]
            yield example, -nll[row, at + prompt_end - start - 1 : at + end - start - 1]
            at += end - start


def progress(cfg, step, problems):
    """For evaluation.evaluate: how many answers are written, on a terminal; with a real student that takes minutes."""
    return None if rank() else evaluation.status(f"recording step {step}", len(problems) * cfg.samples)
