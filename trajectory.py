"""The trajectory (paper, section 2): what theta_step thinks of every response token.

train.py calls `record` at every recorded checkpoint. It sweeps over all training examples, forward
only, a third of the work of an epoch: c_t = log p(y_t | y_<t, x) is a property of (checkpoint,
data), not of training batches. Then it samples answers, for the train accuracy whose minimum is the
bottleneck.

    runs/<run>/trajectory/000020.npz           c_t of every token; select.py reads it
    runs/<run>/trajectory/000020.jsonl         the sampled answers with their grades
    runs/<run>/trajectory/000020.eval.jsonl    those to the problems of --eval_data

Shapes: B rows, T tokens of a row. Next: train.py.
"""

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import diffusion
import eval as evaluation
import intervals
from batches import flat, next_token_batch, shares
from plumbing import resume
from plumbing.config import InputError, read_json, whole_file
from plumbing.parallel import Interrupted, eager, gather, on_process_0, rank, world_size


@torch.no_grad()
def record(run, step):
    """Write trajectory/<step>.npz and the sampled answers -> the log line.

    c_t is recorded for all response tokens, whatever is selected; of a diffusion student it is
    diffusion.confidence. The accuracies are those of sampled answers, graded by eval.py; None if an
    example has no answer to compare with (name the bottleneck yourself: select.py
    --bottleneck=STEP).

    Returns None if the run was asked to stop meanwhile: what was swept and sampled is kept, and
    --resume=true continues there.
    """
    if step == 0:
        known = step_0_of_pass_1(run)
        if known:
            return known
    tick = time.time()
    home = run.folder / "trajectory"
    partial = home / f".{step:06d}.logprob"
    line = {"step": step, "event": "record"}
    try:
        with run.interrupt.heard(run.student):
            line["nll"] = sweep(run, partial, step)
            rows = answers(run, step, run.train_set, home / f"{step:06d}.jsonl")
            line["accuracy"] = accuracy_of(rows)
            if run.eval_set is not None:
                eval_rows = answers(run, step, run.eval_set, home / f"{step:06d}.eval.jsonl")
                line["eval_accuracy"] = accuracy_of(eval_rows)
    except Interrupted:
        return None
    if rows is not None:
        line["answers"] = evaluation.rates(rows)
    line |= on_process_0(lambda: write_record(run, step, partial, line["accuracy"], rows))
    return {**line, "seconds": round(time.time() - tick, 4)}


def write_record(run, step, partial, accuracy, rows):
    """A sweep and its answers -> trajectory/<step>.npz; returns nll_apart for the log."""
    home = partial.parent
    by_id = {} if rows is None else intervals.by_problem(rows)
    names = [example["id"] for example in run.train_set.examples]
    correct = np.array([by_id.get(name, np.nan) for name in names], dtype=np.float32)
    logprob, *more = stored_planes(run, partial)
    with whole_file(home / f"{step:06d}.npz") as aside, open(aside, "wb") as file:
        np.savez(
            file,
            logprob=logprob,
            correct=correct,  # (n_examples,), nan for problems that were not asked
            accuracy=np.nan if accuracy is None else accuracy,
            step=step,
            sha256=run.train_set.sha256,
            tokenizer_hash=run.tokenizer.hash,
            **({"entropy": more[0]} if more else {}),
        )
    apart = nll_apart(run, logprob)
    # only now: a process killed before this line continues from the partial files
    for left in home.glob(f".{step:06d}.*"):
        left.unlink()
    return apart


# -------------------------------------------------------------------------------------------------
# The sweep


def sweep(run, partial, step):
    """Fill the file `partial` with c_t -> mean NLL of a response token.

    partial: (n_tokens,) float32, nan at prompts; of an autoregressive student another (n_tokens,)
    follows, the entropy of its distribution there, which the same forward pass gives. Nothing is
    held longer than a forward pass, so the data may be as large as the disk. An interrupted sweep
    continues with the passes it lacks, the same ones as before: every value is what it would have
    been.
    """
    spans = run.train_set.spans
    done = on_process_0(lambda: begin(run, partial))  # (n,) bool
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
                for example, values in (pair for part in parts for pair in part):
                    # c_t last: where it stands, everything does
                    for plane in reversed(range(len(values))):
                        file.seek(4 * (plane * len(run.train_set.tokens) + spans[example, 1]))
                        file.write(values[plane].astype("<f4").tobytes())

    def finish():
        stored = stored_planes(run, partial)[0]
        total = math.fsum(float(stored[a:b].sum(dtype=np.float64)) for _, a, b in spans)
        if not math.isfinite(total):
            partial.unlink()
            raise InputError(
                f"step {step}: a response token has probability 0 or nan under the student; "
                "nothing written"
            )
        return -total / int((spans[:, 2] - spans[:, 1]).sum())

    return on_process_0(finish)


def begin(run, partial):
    """Make the file that a sweep fills, unless it is there -> which examples are done, (n,) bool."""
    n = planes(run) * len(run.train_set.tokens)
    if not partial.exists() or partial.stat().st_size != 4 * n:
        with whole_file(partial) as aside, open(aside, "wb") as file:
            # written, not seeked over: a full disk is noticed here, not in the middle of the sweep
            for i in range(0, n, 2**20):
                file.write(np.full(min(2**20, n - i), np.nan, dtype="<f4").tobytes())
    stored = stored_planes(run, partial)[0]
    return np.array([np.isfinite(stored[a:b]).all() for _, a, b in run.train_set.spans])


def planes(run):
    """How many numbers are recorded of a token: c_t, and the entropy of an autoregressive student."""
    return 1 if run.shape.is_diffusion else 2


def stored_planes(run, partial):
    """The file of a sweep as arrays, each (n_tokens,) float32."""
    return np.memmap(partial, dtype="<f4", mode="r").reshape(planes(run), -1)


def score(run, rows):
    """What is recorded of each example in `rows`: yields (example, (planes, n) float32)."""
    if run.shape.is_diffusion:
        examples = flat(rows)
        keys = {"draws": run.cfg.confidence_draws, "seed": run.cfg.seed}
        found = diffusion.confidence(run.student, run.train_set, examples, **keys)
        yield from ((int(i), logprob[None]) for i, logprob in zip(examples, found, strict=True))
        return
    batch = next_token_batch(run, rows)
    positions, attention = batch["positions"], batch["attention"]
    how = {"positions": positions, "attention": attention, "entropy": True}
    nll, entropy = run.student(batch["ids"], batch["targets"], **how)
    values = torch.stack([-nll, entropy]).cpu().numpy()  # (2, B, T): position i predicts i + 1
    for row, packed in enumerate(rows):
        at = 0
        for example in packed:
            start, prompt_end, end = run.train_set.spans[example]
            yield example, values[:, row, at + prompt_end - start - 1 : at + end - start - 1]
            at += end - start


def nll_apart(run, logprob):
    """Mean NLL of the selected tokens and of the others, for the log; {} if there are no others.

    Under T3S the mean over all tokens rises while the loss falls: the dropped ones are not trained.
    """
    response = run.train_set.response_mask()
    found = {}
    kinds = (("nll_kept", "nll_dropped", run.selected), ("nll_forced", "nll_others", run.forced))
    for ours, theirs, mask in kinds:
        if mask is None:
            continue
        chosen = response & (mask > 0)
        others = response & ~chosen
        if chosen.any() and others.any():
            for name, part in ((ours, chosen), (theirs, others)):
                found[name] = -float(np.mean(logprob[part], dtype=np.float64))
    return found


# -------------------------------------------------------------------------------------------------
# The answers


def answers(run, step, problems, path):
    """Sample and grade answers to --record_problems of `problems` -> rows as of eval.evaluate.

    None if a problem has no answer to compare with, or none is asked for. The rows are written to
    `path`; batches that an interrupted recording has finished are not sampled again.
    """
    cfg = run.cfg
    if cfg.record_problems < 0 or any(one["answer"] is None for one in problems.examples):
        return None
    partial = path.with_name(f".{path.stem}.answers")
    asked = chosen_problems(cfg, problems)
    known = on_process_0(lambda: read_rows(partial))
    known = {(row["id"], row["sample"]): row for row in known}
    show = None if rank() else evaluation.status(f"recording step {step}", len(asked) * cfg.samples)
    for some in in_batches(cfg, problems, asked):
        ids = [problems.examples[i]["id"] for i in some]
        missing = [i for i, name in zip(some, ids, strict=True) if (name, 0) not in known]
        if missing:
            rows = sample_some(run, problems, missing)
            known.update({(row["id"], row["sample"]): row for row in rows})
            on_process_0(lambda: write_rows(partial, known.values()))
        if show:
            show(len(known))
    order = [(problems.examples[i]["id"], n) for i in asked for n in range(cfg.samples)]
    rows = [known[key] for key in order]
    on_process_0(lambda: write_rows(path, rows))
    return rows


def sample_some(run, problems, indices):
    """One batch of answers on every process -> rows."""
    cfg = run.cfg
    with eager():  # or the blocks would not stay compiled
        _, rows = evaluation.evaluate(
            run.student,
            run.tokenizer,
            problems,
            cfg,
            indices=indices,
            samples=cfg.samples,
            batch_size=cfg.sample_batch_size,
        )
    return rows


def chosen_problems(cfg, problems):
    """--record_problems of them, the same in every recording; all if it is 0."""
    n = len(problems)
    if not 0 < cfg.record_problems < n:
        return list(range(n))
    chosen = np.random.default_rng([cfg.seed, n]).permutation(n)[: cfg.record_problems]
    return sorted(chosen.tolist())


# A finished answer makes room for the next one only among those that are asked for together: the
# more, the less a batch waits for its longest answer; but a kill loses what was not yet finished
FILLINGS = 4


def in_batches(cfg, problems, indices):
    """Problems -> lists of them whose answers fill the batch of each process FILLINGS times, longest
    prompts first."""
    order = sorted(indices, key=lambda i: -len(problems.prompt(i)))
    size = max(1, FILLINGS * cfg.sample_batch_size * world_size() // cfg.samples)
    return [order[i : i + size] for i in range(0, len(order), size)]


def accuracy_of(rows):
    """The mean over all answers; None without any."""
    return None if rows is None else float(np.mean([row["correct"] for row in rows]))


def read_rows(path):
    """The rows that an interrupted recording has left."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path, rows):
    with whole_file(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# -------------------------------------------------------------------------------------------------
# Step 0 of another run


def step_0_of_pass_1(run):
    """The log line of pass 1's step 0, its files copied; None if this run would record another.

    theta_0 is the same model for pass 1, pass 2 and the controls of one selection. If weights,
    data, sampling and torch are the same too, so is all that is recorded of it.
    """
    if not run.cfg.selection:
        return None
    pass_1 = Path(run.cfg.selection.split(",")[0]).parent.parent
    name = "trajectory/000000"

    def take():
        try:
            before = read_json(pass_1 / "config.json")
            text = (pass_1 / "log.jsonl").read_text(encoding="utf-8")
            first = json.loads(text.partition("\n")[0])
            of_training = set(diffusion.Corruption.__dataclass_fields__)
            now = read_json(run.folder / "config.json")
            defaults = resume.defaults_of(run.cfg)
            if not resume.records_alike(before, now, defaults, of_training):
                return None
            logprob = np.load(pass_1 / f"{name}.npz")["logprob"]
        except (InputError, OSError, ValueError, KeyError):
            return None
        if first.get("event") != "record" or first["step"] != 0:
            return None
        for path in pass_1.glob(f"{name}.*"):
            with whole_file(run.folder / "trajectory" / path.name) as aside:
                shutil.copyfile(path, aside)
        print(f"step 0 was recorded by {pass_1}: the same student, data and sampling")
        for key in [key for key in first if key.startswith("nll_")]:
            del first[key]  # of another selection
        return {**first, **nll_apart(run, logprob), "seconds": 0.0}

    return on_process_0(take)
