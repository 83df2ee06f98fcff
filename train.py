"""Fine-tune a student on a teacher's traces: one plain loop for both passes of T3S.

    python train.py --run=sft --model=M --data=D --record_every=2        # pass 1: plain SFT, and what every token did
    python select.py --run=sft --rule=t3s                                # bottleneck, delta, which tokens to keep
    python train.py --run=t3s --selection=runs/sft/selection/t3s         # pass 2: all else inherited from pass 1
    torchrun --nproc_per_node=8 -- train.py --run=...                    # the same commands, sharded over 8 GPUs
    python train.py --run=sft --resume=true                              # go on after whatever stopped it: resume.py
    python train.py --model=M --dry_run=true --gpus=8                    # what would it need? memory.py

M is a Hugging Face folder or hub id, autoregressive or masked-diffusion, D a folder made by data.py. Everything lands
in runs/<run>/: config.json, log.jsonl (a line per step), checkpoints/ (ordinary Hugging Face folders), trajectory/
(log-probability of every response token, and train accuracy, at each recorded checkpoint). Next: select.py.
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

import data
import diffusion
import model
from batches import micro_batches, pack, padded_slots
from diffusion import Corruption
from hf import families
from hf.families import local_folder
from hf.tokenizer import Tokenizer, load_tokenizer
from plumbing import memory, parallel, resume
from plumbing.config import InputError, command
from plumbing.parallel import (
    Interrupt,
    all_reduce,
    exists,
    gather,
    grad_norm,
    on_process_0,
    parallelize,
    rank,
    start_processes,
    stop,
    world_size,
)  # fmt: skip
from plumbing.resume import start_run
from plumbing.runs import checkpoint, load_selections, of_pass_1, read_keys, run_folder
from sample import Sampling, check_sampling, resolve_decoding
from trajectory import record


@dataclass
class Config(Sampling, Corruption):
    # what
    run: str = ""  # name of the run: its folder is runs/<run>
    model: str = ""  # the student, theta_0: a Hugging Face folder or hub id
    data: str = ""  # training examples: a folder made by data.py
    selection: str = ""  # pass 2: a folder made by select.py (for diffusion students also two: kind keep,kind force)
    eval_data: str = ""  # a second folder made by data.py, on whose problems accuracy is recorded as well
    # optimisation
    steps: int = 50  # optimizer steps
    batch_size: int = 64  # examples in an optimizer step, over all processes; 0: all of them
    lr: float = 1e-5  # peak learning rate of AdamW
    schedule: str = "cosine"  # after the warm-up: cosine (to 0) or constant
    warmup_steps: int = 0  # linear from 0
    weight_decay: float = 0.0  # on matrices; never on norms and biases
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 0  # order of the examples, noise, sampling
    confidence_draws: int = 0  # recorded confidence: the mean of so many random masks; 0: one, the whole response
    # memory and speed, not results
    micro_batch_size: int = 8  # rows in one forward pass of one process
    packing: bool = False  # several examples in a row, each attending to itself only (autoregressive students)
    max_row_tokens: int = 0  # of a packed row; 0: as the longest example
    checkpoint_activations: bool = False  # keep the input of each block only, compute the rest again: less memory
    dtype: str = "float32"  # of the computation: float32 or bfloat16; weights and optimizer state stay float32
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    compile: bool = False  # torch.compile each block
    timeout: int = 600  # seconds that processes wait for one another before they give up
    # recording
    record_every: int = 0  # record trajectory and accuracy every so many steps, and at 0 and the end; 0: never
    samples: int = 1  # answers sampled per problem for an accuracy
    sample_batch_size: int = 64  # answers written at the same time; changes memory and speed, not the answers
    save_every: int = 0  # keep a checkpoint every so many steps; the bottleneck and the last are kept in any case
    # what if it stops
    resume: bool = False  # go on from the newest complete resume state of this run; unset keys are the run's own
    allow_changes: bool = False  # resume although data, selection or keys have changed
    resume_every: int = 0  # write a resume state every so many steps; 0: only at the end or when interrupted
    keep_checkpoints: int = 2  # so many resume states are kept, the newest
    # without training
    dry_run: bool = False  # only print what memory it takes; needs config.json of the model, not its weights
    gpus: int = 1  # of the dry run: number of processes
    gpu_memory_gib: float = 80.0  # of the dry run: memory of each




@dataclass
class Run:
    """What every part of the loop works with."""

    cfg: Config
    device: torch.device
    folder: Path  # runs/<run>
    source: Path  # the Hugging Face folder of theta_0
    shape: families.Config
    tokenizer: Tokenizer
    train_set: data.Data
    eval_set: data.Data | None
    selected: np.ndarray | None  # (n_tokens,) bool or float32: what stays in the loss, or its weight
    forced: np.ndarray | None  # (n_tokens,) bool: what a diffusion student's corruption masks in any case
    student: model.Transformer | None = None
    optimizer: torch.optim.Optimizer | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def main(**given):
    """Train one run. Keys are Config's; raises InputError for whatever cannot work, before anything is written.

    Interrupted (Ctrl-C, SIGTERM) it saves, then raises KeyboardInterrupt.
    """
    cfg = resolve(given)
    if cfg.dry_run:
        return memory.dry_run(cfg)
    run = read_inputs(cfg)
    folder, device = run.folder, run.device
    # before the lock: weights that cannot be read must leave no folder behind
    student = run.student = model.load(run.source, device, shard=lambda m: parallelize(cfg, m, device))
    optimizer = run.optimizer = make_optimizer(cfg, student)
    with resume.lock(folder), Interrupt() as interrupt:
        changed = start_run(run)
        first = resume.newest(folder) if cfg.resume else 0
        lowest, accuracy = on_process_0(lambda: resume.rewind(cfg, folder, first, changed))
        if first:
            resume.load(folder, first, student, optimizer)
        describe(run, first)
        started = time.time()
        with open(folder / "log.jsonl" if rank() == 0 else os.devnull, "a", encoding="utf-8") as log:
            for step in range(first, cfg.steps + 1):  # theta_step: the student after so many updates
                asked = all_reduce(interrupt.asked, device) > 0
                last = asked or step == cfg.steps
                if step > first and (last or (cfg.resume_every and step % cfg.resume_every == 0)):
                    resume.save(folder, student, optimizer, step, cfg.keep_checkpoints)
                if cfg.record_every and not asked and (step % cfg.record_every == 0 or last):
                    recorded = record(run, step)
                    write_log(log, recorded)
                    show_recorded(recorded)
                    accuracy = recorded["accuracy"]
                    if step and accuracy is not None and (lowest is None or accuracy < lowest[0]):
                        model.save(student, run.source, checkpoint(folder, step))  # the bottleneck so far
                        if rank() == 0:
                            remove_checkpoint(cfg, folder, lowest)
                        lowest = (accuracy, step)
                keep = last or (cfg.save_every and step % cfg.save_every == 0)
                if step and keep and not exists(checkpoint(folder, step)):
                    model.save(student, run.source, checkpoint(folder, step))
                if last:
                    break

                tick = time.time()
                lr = learning_rate(cfg, step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                done = train_step(cfg, student, optimizer, micro_batches(run, step), step)
                seconds = time.time() - tick
                done.update(lr=lr, seconds=round(seconds, 4), **memory.mfu(cfg, device, done.pop("flops"), seconds))
                write_log(log, done)
                show(cfg, done, accuracy, (time.time() - started) / (step + 1 - first))
    if rank() == 0:
        state = f"stopped at step {step} of {cfg.steps}" if step < cfg.steps else "done"
        saved = checkpoint(folder, step) if step else "none"
        lead = "\n" if sys.stdout.isatty() else ""
        print(f"{lead}{state}: {folder} ({time.time() - started:.0f} s), last checkpoint: {saved}", flush=True)
    if step < cfg.steps:  # for a shell exit code 130: `train.py && select.py` must not go on with half a run
        parallel.end_processes()
        raise KeyboardInterrupt


def train_step(cfg, student, optimizer, batches, step):
    """One update: loss = sum of weighted NLL / sum of counts of the whole step, never a mean of means.

    Both sums run over all micro-batches and processes. Returns the log line. Stops every process with one message,
    before the weights are touched, if the loss or the gradient norm is not finite; it names the examples at fault.
    """
    device = batches[0]["ids"].device
    normaliser = all_reduce(sum(b["count"] for b in batches), device)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        nll = student(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
        loss = (nll * batch["weights"]).sum() / (normaliser or 1)  # no supervised token at all: loss 0, gradient 0
        loss.backward()
        losses.append(loss.item())
    norm = grad_norm(student)
    loss = all_reduce(math.fsum(losses), device)
    if not (math.isfinite(loss) and math.isfinite(norm.item())):
        bad = [b["examples"].tolist() for b, value in zip(batches, losses, strict=True) if not math.isfinite(value)]
        bad = [examples for part in gather(bad) for examples in part]
        where = f"; not finite in the micro-batch of examples {bad[0]}" if bad else ""
        stop(f"step {step + 1}: loss {loss}, gradient norm {norm.item()}{where}; stopped, nothing saved")
    if cfg.clip:
        torch.nn.utils.clip_grads_with_norm_(student.parameters(), cfg.clip, norm)
    optimizer.step()

    def total(key):
        return int(all_reduce(sum(b.get(key, 0) for b in batches), device))

    supervised = int(all_reduce(sum(int((b["targets"] != -100).sum()) for b in batches), device))
    line = {"step": step + 1, "loss": loss, "grad_norm": norm.item(), "tokens": total("tokens"),
            "supervised": supervised, "flops": total("flops")}  # fmt: skip
    if slots := total("slots"):  # the share of what was computed that is padding, and what it were without packing
        line["padding"] = round(1 - line["tokens"] / slots, 4)
        if cfg.packing:
            line["padding_unpacked"] = round(1 - line["tokens"] / total("unpacked_slots"), 4)
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(cfg, student):
    matrices = [p for p in student.parameters() if p.dim() > 1]
    others = [p for p in student.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


def learning_rate(cfg, step):
    """Of the update from `step` to `step` + 1."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# Keys, folders, screen


def resolve(given):
    """The keys given -> a complete Config. What is not given comes from the run that is resumed, or, with a selection,
    from pass 1; which of its keys is said here and printed."""
    unknown = sorted(set(given) - {f.name for f in fields(Config)})
    if unknown:
        raise InputError(f"unknown key {unknown[0]}")
    inherited = {}
    folder = run_folder(given["run"]) if given.get("run") else None
    if folder and given.get("resume") and (folder / "config.json").is_file():
        inherited = read_keys(folder, Config)
    elif given.get("selection"):
        inherited = of_pass_1(given, Config)
    cfg = Config(**{**inherited, **given})
    for key in ("model",) if cfg.dry_run else ("run", "model", "data"):
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")
    for key, allowed in (("schedule", ("cosine", "constant")), ("dtype", ("float32", "bfloat16"))):
        if getattr(cfg, key) not in allowed:
            raise InputError(f"--{key}={getattr(cfg, key)}: must be {' or '.join(allowed)}")
    at_least = dict.fromkeys(("steps", "micro_batch_size", "samples", "max_new_tokens", "sample_batch_size",
                              "keep_checkpoints", "timeout", "gpus"), 1)  # fmt: skip
    at_least |= dict.fromkeys(("batch_size", "lr", "warmup_steps", "weight_decay", "clip", "seed", "max_row_tokens",
                               "record_every", "save_every", "resume_every", "confidence_draws"), 0)  # fmt: skip
    for key, least in at_least.items():
        if getattr(cfg, key) < least:
            raise InputError(f"--{key}={getattr(cfg, key)}: must be at least {least}")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, key) < 1:
            raise InputError(f"--{key}={getattr(cfg, key)}: must be at least 0 and less than 1")
    if cfg.gpu_memory_gib <= 0:
        raise InputError(f"--gpu_memory_gib={cfg.gpu_memory_gib}: must be more than 0")
    return cfg






def read_inputs(cfg):
    """All that a run reads but the weights, checked to belong together."""
    device = start_processes(cfg)
    source = local_folder(cfg.model)
    shape, tokenizer = families.read_config(source), load_tokenizer(source)
    diffusion.check_keys(shape, cfg)
    if shape.is_diffusion and cfg.packing:
        raise InputError("--packing=true is for autoregressive students: a diffusion objective lays out its own rows")
    train_set, eval_set = load_data(cfg.data, tokenizer), load_data(cfg.eval_data, tokenizer)
    masks = load_selections(cfg.selection, train_set, shape.is_diffusion)
    if shape.is_diffusion:
        diffusion.check_data(shape, train_set)
        diffusion.check_selection(cfg, masks["force"], masks["keep"])
    if cfg.record_every:
        check_recording(cfg, shape, train_set, eval_set)
    return Run(cfg, device, run_folder(cfg.run), source, shape, tokenizer, train_set, eval_set,
               masks["keep"], masks["force"])  # fmt: skip


def check_recording(cfg, shape, train_set, eval_set):
    """Raises InputError, now and not at step 0, for sampling keys that cannot work, or not with these problems."""
    if eval_set and any(example["answer"] is None for example in eval_set.examples):
        raise InputError(f"{cfg.eval_data}: not every example has an answer, so there is no accuracy to record")
    parts = [part for part in (train_set, eval_set) if part]
    prompts = [part.prompt(i).tolist() for part in parts for i in range(len(part))]
    if shape.is_diffusion:
        resolve_decoding(shape, prompts, cfg)
    else:
        check_sampling(shape, prompts, cfg)


def load_data(folder, tokenizer):
    """A data folder, checked to be this tokenizer's; None for an empty name."""
    if not folder:
        return None
    loaded = data.load(folder)
    if loaded.meta["tokenizer_hash"] != tokenizer.hash:
        raise InputError(f"{folder}: made with another tokenizer than the student's; run data.py again with its folder")
    if loaded.meta.get("template_hash") not in (None, tokenizer.template_hash):
        print(f"warning: {folder} was rendered by another chat template than the student's, which its checkpoints keep")
    return loaded








def remove_checkpoint(cfg, folder, lowest):
    """Forget the former bottleneck, unless it is one of the checkpoints that --save_every keeps."""
    if lowest and not (cfg.save_every and lowest[1] % cfg.save_every == 0):
        shutil.rmtree(checkpoint(folder, lowest[1]))


def write_log(log, line):
    log.write(json.dumps(line) + "\n")
    log.flush()


def describe(run, first):
    if rank():
        return
    cfg, train_set = run.cfg, run.train_set
    parameters = sum(p.numel() for p in run.student.parameters())
    supervised = int((train_set.spans[:, 2] - train_set.spans[:, 1]).sum())
    a_step = min(cfg.batch_size or len(train_set), len(train_set))
    print(f"{cfg.run}: {parameters:,} parameters on {world_size()} x {run.device.type}, {len(train_set)} examples, "
          f"{a_step} of them a step, {supervised:,} response tokens")  # fmt: skip
    anchors = f", the others are {cfg.anchors}" if run.shape.is_diffusion else ""
    how = "are always masked" if not cfg.forced_odds else f"have {cfg.forced_odds:g} times the odds of being masked"
    for mask, what in ((run.selected, f"stay in the loss{anchors}"), (run.forced, how)):
        if mask is not None:
            chosen = int((mask > 0).sum())
            print(f"selection {cfg.selection}: {chosen:,} tokens = {chosen / supervised:.1%} {what}")
    if cfg.packing:
        size = train_set.spans[:, 2] - train_set.spans[:, 0]
        rows = [sum(size[i] for i in row) for row in pack(size, cfg.max_row_tokens)]
        slots = [padded_slots(np.array(rows_of), cfg.micro_batch_size) for rows_of in (size, rows)]
        print(f"packing: {len(train_set)} examples in {len(rows)} rows; padding {1 - size.sum() / slots[0]:.1%} of "
              f"all positions without it, {1 - size.sum() / slots[1]:.1%} with it")  # fmt: skip
    defaults = Config()
    changed = {k: v for k, v in asdict(cfg).items() if v != getattr(defaults, k) and k not in ("run", "selection")}
    print(" ".join(f"{k}={v}" for k, v in changed.items()))
    if cfg.resume:
        print(f"resumed at step {first} of {cfg.steps}" if first else "no resume state yet: from the beginning")


def show(cfg, done, accuracy, seconds_a_step):
    """The status line: rewritten in place on a terminal, otherwise about twenty lines a run."""
    terminal, step = sys.stdout.isatty(), done["step"]
    if rank() or (not terminal and step % max(1, cfg.steps // 20) and step != cfg.steps):
        return
    shown = "-" if accuracy is None else f"{accuracy:.3f}"
    text = (f"step {step}/{cfg.steps} | loss {done['loss']:.4f} | accuracy {shown}"
            f" | grad norm {done['grad_norm']:.2f} | lr {done['lr']:.1e}"
            f" | {done['tokens'] / max(done['seconds'], 1e-9):,.0f} tokens/s"
            + (f" | mfu {done['mfu']:.1%}" if "mfu" in done else "")
            + (f" | padding {done['padding']:.0%} (unpacked {done['padding_unpacked']:.0%})" if cfg.packing else "")
            + f" | {seconds_a_step * (cfg.steps - step):.0f} s left")  # fmt: skip
    print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)


def show_recorded(recorded):
    """A recorded checkpoint has a line of its own that stays."""
    names = {"accuracy": "train accuracy", "eval_accuracy": "accuracy on eval_data", "nll": "NLL of a response token"}
    shown = [f"{name} {recorded[key]:.3f}" for key, name in names.items() if recorded.get(key) is not None]
    if rank() == 0:
        lead = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{lead}recorded step {recorded['step']} | {' | '.join(shown)} | {recorded['seconds']:.0f} s", flush=True)




if __name__ == "__main__":
    command(main, Config)
    parallel.end_processes()
