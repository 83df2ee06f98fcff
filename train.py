"""Fine-tune a student on a teacher's traces: one plain loop for both passes of T3S.

    python train.py --run=sft --model=M --data=D --record_every=2      # pass 1: plain SFT, recorded
    python select.py --run=sft --rule=t3s                              # bottleneck, delta, mask
    python train.py --run=t3s --selection=runs/sft/selection/t3s       # pass 2: the rest is pass 1's
    torchrun --nproc_per_node=8 -- train.py --run=...                  # the same, over 8 GPUs
    python train.py --run=t3s --online=true --model=M --data=D         # all three: online.py
    python train.py --run=sft --resume=true                            # continue: plumbing/resume.py
    python train.py --model=M --dry_run=true --gpus=8                  # memory: plumbing/memory.py

M is a Hugging Face folder or hub id, autoregressive or masked-diffusion; D a folder made by data.py.
Everything is written to runs/<run>/:

    config.json     the keys, the command, versions, hashes of all that is read
    log.jsonl       one line per update, and one per recorded checkpoint
    checkpoints/    ordinary Hugging Face folders: the bottleneck, the last, and --save_every
    trajectory/     at each recorded checkpoint: log-probability of every response token, the
                    sampled answers, train accuracy
    resume/         the newest resume states: --resume=true continues from them
    lock            held while a process trains this run

select.py adds selection/, eval.py adds eval/.

Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP all mean: save and stop, exit code 130 (1 under torchrun). Only a
second Ctrl-C stops at once.

theta_step is the student after `step` updates. Shapes: B rows, T tokens of a row.
Next: online.py.
"""

import math
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
import diffusion
import model
import online
from batches import micro_batches
from denoise import resolve_decoding
from diffusion import Corruption
from hf import families
from hf.families import at_revision, local_folder
from hf.tokenizer import Tokenizer, load_tokenizer
from plumbing import memory, parallel, resume, screen
from plumbing.config import (
    InputError,
    above,
    below,
    command,
    require,
    require_given,
)
from plumbing.parallel import Interrupt, all_reduce, gather, grad_norm, parallelize, stop
from plumbing.runs import (
    check_fits,
    check_tokenizer,
    checkpoint,
    load_selections,
    of_pass_1,
    read_keys,
    run_folder,
)
from sampling import Sampling, check_greedy, check_sampling, check_used
from trajectory import record


@dataclass
class Config(Sampling, Corruption):
    # what
    run: str = ""  # name of the run: its folder is runs/<run>
    model: str = ""  # the student, theta_0: a Hugging Face folder or hub id
    revision: str = ""  # of a hub id: the branch, tag or commit; or --model=org/name@revision
    data: str = ""  # training examples: a folder made by data.py
    selection: str = ""  # pass 2: a folder made by select.py (diffusion students: also two, keep,force)
    eval_data: str = ""  # a second folder made by data.py, on whose problems accuracy is recorded as well
    # T3S in one command (online.py)
    online: str = "false"  # true: pass 1 ends itself, pass 2 begins at theta_0; continue: where pass 1 stands
    watch: str = ""  # pass 1 ends behind the bottleneck of this curve: accuracy (--online's own), label_free
    watch_every: int = 5  # steps between two looks at it; without --online: --record_every
    probe: int = 0  # instead of --online: a pass 1 of so many steps, then pass 2 from theta_0
    rule: str = "t3s"  # what --online and --probe select by: a rule of select.py
    # optimisation
    steps: int = 50  # optimizer steps
    batch_size: int = 64  # examples in an optimizer step, over all processes; 0: all of them
    optimizer: str = "adamw"  # or sgd: plain, without momentum
    lr: float = 1e-5  # peak learning rate
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
    packing: bool = False  # several examples in a row, each sees only itself (autoregressive students)
    max_row_tokens: int = 0  # of a packed row; 0: as the longest example
    checkpoint_activations: bool = False  # less memory: keep each block's input only, recompute the rest
    dtype: str = "float32"  # of the computation: float32 or bfloat16; weights, optimizer stay float32
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    compile: bool = False  # torch.compile each block
    timeout: int = 600  # seconds that processes wait for one another before they give up
    # recording
    record_every: int = 0  # record every so many steps, and at step 0 and the end; 0: never
    record_problems: int = 0  # problems whose answers are sampled for an accuracy; 0: all, -1: none
    samples: int = 1  # answers sampled per problem for an accuracy
    sample_batch_size: int = 64  # answers written at the same time; changes memory and speed only
    save_every: int = 0  # keep a checkpoint every so many steps; the bottleneck and the last are kept anyway
    export_dtype: str = "float32"  # of checkpoints, or bfloat16: half the size, but lr 1e-5 is mostly rounded away
    # what if it stops
    resume: bool = False  # continue from the newest complete resume state; unset keys are the run's own
    allow_changes: bool = False  # resume although data, selection or keys have changed
    resume_every: int = 0  # a resume state (12 bytes a parameter) every so many steps, and at the end; -1: none
    keep_resume_states: int = 2  # so many resume states stay, the newest, also when the run is done
    lock: bool = True  # keep a second process out of the run; false where the file system cannot
    # without training
    dry_run: bool = False  # only print what memory it takes; needs the model's config.json only
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
    selected: np.ndarray | None  # (n_tokens,) bool or float32: what stays in the loss, its weight
    forced: np.ndarray | None  # (n_tokens,) bool: what a diffusion student's corruption always masks
    student: model.Transformer | None = None
    optimizer: torch.optim.Optimizer | None = None
    interrupt: Interrupt = field(default_factory=Interrupt)


# -------------------------------------------------------------------------------------------------
# The loop


def main(**given):
    """Train one run. The keys are Config's.

    Raises InputError for whatever cannot work, before anything is written; KeyboardInterrupt after
    everything was saved because a signal asked for it.
    """
    cfg = resolve(given)
    if cfg.dry_run:
        return memory.dry_run(cfg)
    if online.is_wanted(cfg) and not cfg.selection:  # a resumed run names its selection already
        cfg = replace(cfg, **online.pass_1(main, cfg))
    run = read_inputs(cfg)
    with resume.lock(run.folder, cfg.lock), run.interrupt:
        finished = train(run)
    if not finished:
        # an exit code that is not 0: `train.py && select.py` must not go on with half a run
        parallel.end_processes()
        raise KeyboardInterrupt
    if cfg.online != "false":
        online.show_costs(cfg)


def train(run):
    """The loop, from theta_0 or from where the run stopped -> did it reach its last step?"""
    cfg, folder = run.cfg, run.folder
    before = begin(run)
    step = first = before.step
    # (accuracy, step), the lowest so far. It decides only which checkpoint is kept, for RRT and
    # eval.py; select.py finds the bottleneck again, from trajectory/
    lowest = before.lowest
    student, optimizer = run.student, run.optimizer
    shown = screen.Progress(run, before)
    passed = False
    with resume.Log(folder) as log:
        while True:  # once for each theta_step
            asked = run.interrupt.asked_anywhere(run.device)
            last = asked or step >= cfg.steps
            record_pending = cfg.record_every and (last or due(cfg.record_every, step))
            if step == first and before.recorded:
                record_pending = False  # a resumed run does not record the same step twice

            # once in a while: a resume state, before anything that takes long
            if step > first and (last or state_due(cfg, step, record_pending)):
                save_state(run, step)

            # once in a while: record what theta_step thinks of every token, and how often it is right
            if record_pending and not asked:
                recorded = record(run, step)
                if recorded is None:
                    continue  # interrupted, and `asked` stays true: from the top, to save and stop
                record_pending = False
                log.write(recorded)
                shown.record(recorded)
                lowest = keep_lowest(run, recorded, lowest)

            # a pass 1 that watches for the bottleneck ends behind it
            if not last and online.is_over(run, step):
                last = passed = True
                save_state(run, step)

            # once in a while: a checkpoint. An interrupted run leaves one, too: --resume removes it
            if step and (last or due(cfg.save_every, step)):
                save_checkpoint(run, step)

            if last:
                break

            # theta_step -> theta_(step + 1). A signal that comes now waits until the update is made
            tick = time.time()
            lr = learning_rate(cfg, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            done = train_step(cfg, student, optimizer, micro_batches(run, step), step)
            seconds = time.time() - tick
            operations = done.pop("flops")  # the log has them as a share of what the GPU can do
            speed = memory.mfu(cfg, run.device, operations, seconds)
            log.write({**done, "lr": lr, "seconds": round(seconds, 4), **speed})
            shown.step(done, lr, seconds, speed)
            step += 1
    # an interrupted last recording is still pending: all updates are made, but select.py lacks a
    # record. So the run counts as unfinished, and --resume=true completes it
    finished = (passed or step >= cfg.steps) and not record_pending
    shown.end(step, finished)
    parallel.barrier()  # the first process to exit ends the others: not before all is written
    return finished


def due(every, step):
    """Is it time for what happens every so many steps? every = 0: never."""
    return every > 0 and step % every == 0


def keep_lowest(run, recorded, lowest):
    """Keep the checkpoint of the lowest accuracy so far, and no longer that of the lowest before.

    -> (accuracy, step), the lowest so far. Step 0 is no bottleneck: nothing was learned yet. Ties
    go to the earliest step, as in select.py.
    """
    accuracy, step = recorded["accuracy"], recorded["step"]
    if step == 0 or accuracy is None:
        return lowest
    if lowest is not None and accuracy >= lowest[0]:
        return lowest
    # the new one first: a kill in between leaves one checkpoint too many, not one too few
    save_checkpoint(run, step)
    resume.remove_checkpoint(run.cfg, run.folder, lowest)
    return (accuracy, step)


def state_due(cfg, step, record_pending):
    """Is it time for a resume state? A recording can take longer than all the updates before it."""
    return due(cfg.resume_every, step) or (cfg.resume_every > 0 and record_pending)


def save_state(run, step):
    """Write resume/<step>, unless it is there or none are wanted."""
    cfg = run.cfg
    if cfg.resume_every >= 0 and not resume.has(run.folder, step):
        resume.save(run.folder, run.student, run.optimizer, step, cfg.keep_resume_states)


def save_checkpoint(run, step):
    """Write checkpoints/<step>, unless it is there."""
    path = checkpoint(run.folder, step)
    if not parallel.exists(path):
        kind = getattr(torch, run.cfg.export_dtype)
        model.save(run.student, run.tokenizer, path, dtype=kind)


def begin(run):
    """Student and optimizer, and the run folder as it was at the step to start from -> resume.Start.

    A run that is resumed takes its weights from its newest state: theta_0 may be gone by then.
    """
    cfg, folder, device = run.cfg, run.folder, run.device

    # model.load knows no Config. It calls this before the student has memory, so that no process
    # ever holds the whole of it
    def shard(student):
        parallelize(cfg, student, device)

    # whatever can be refused is refused first: reading the weights can take minutes
    checked = resume.check(run)
    first = resume.newest(folder) if cfg.resume else 0
    if first > cfg.steps:
        stop(f"--steps={cfg.steps}: this run has made {first} updates already")
    if cfg.resume_every < 0 and not first and parallel.exists(folder / "config.json"):
        stop(
            f"{folder}: no resume state was kept (--resume_every=-1), so there is nothing to go on "
            "from; give --run another name, or delete the folder"
        )
    resume.clean(folder)
    if first:
        run.student = model.build(run.shape, device, shard=shard)
    else:
        run.student = model.load(run.source, device, shard=shard)
    run.optimizer = make_optimizer(cfg, run.student)
    # from here on the folder is written to: weights that cannot be read have left no trace
    before = resume.start(run, first, checked)
    if first:
        resume.load(folder, first, run.student, run.optimizer)
        if before.lowest and before.lowest[1] == first:
            # the log has this record, but the run may have been stopped before its checkpoint
            # was written; and it is not recorded again
            save_checkpoint(run, first)
    return before


def train_step(cfg, student, optimizer, batches, step):
    """One update -> its log line.

    loss = sum of weighted NLL / sum of counts over the whole step: all micro-batches, all processes.
    A mean of means would weigh the tokens of short examples more. backward() itself sums gradients
    over the processes; FSDP's division by their number is switched off in parallel.parallelize. So
    dividing by the global normaliser is all.

    If the loss or the gradient norm is not finite, every process stops with one message that names
    the examples at fault, before the weights are touched.
    """
    device = batches[0]["ids"].device
    # known before any forward pass: each micro-batch's loss is divided by the sum over all of them
    normaliser = all_reduce(sum(batch["count"] for batch in batches), device)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        positions, attention = batch["positions"], batch["attention"]
        nll = student(batch["ids"], batch["targets"], positions=positions, attention=attention)
        # the normaliser is 0 if no token is scored in the whole step: loss 0, gradient 0
        part = (nll * batch["weights"]).sum() / (normaliser or 1)  # nll (B, T)
        part.backward()
        losses.append(part.item())
    norm = grad_norm(student)
    # of all processes, as is the norm: so all of them take the same branch
    loss = all_reduce(math.fsum(losses), device)
    if not (math.isfinite(loss) and math.isfinite(norm.item())):
        stop(f"step {step + 1}: loss {loss}, gradient norm {norm.item()}{at_fault(batches, losses)}")
    if cfg.clip:
        # the norm is known, so it is not computed a second time
        torch.nn.utils.clip_grads_with_norm_(student.parameters(), cfg.clip, norm)
    optimizer.step()

    line = {"step": step + 1, "loss": loss, "grad_norm": norm.item()}
    line |= work_done(cfg, batches, device)
    if cfg.compile:
        # torch falls back to eager code without a word: the log shows from which step on
        line["compiled"] = parallel.compiled_blocks(student)
    return line


def at_fault(batches, losses):
    """The rest of the message about a step whose loss is not finite. Collective."""
    # a process knows the losses of its own micro-batches only
    mine = []
    for batch, loss in zip(batches, losses, strict=True):
        if not math.isfinite(loss):
            mine.append(batch["examples"].tolist())
    bad = [examples for part in gather(mine) for examples in part]
    where = f"; not finite in the micro-batch of examples {bad[0]}" if bad else ""
    return f"{where}; stopped, nothing saved"


def work_done(cfg, batches, device):
    """What a step computed, over all processes: tokens, operations, the share that was padding."""

    def total(values):
        return int(all_reduce(sum(values), device))

    line = {
        "tokens": total(batch["tokens"] for batch in batches),
        "supervised": total(int((batch["targets"] != -100).sum()) for batch in batches),
        "flops": total(batch["flops"] for batch in batches),
    }
    # positions of the forward passes, padding and all
    slots = total(batch.get("slots", 0) for batch in batches)
    if slots:  # diffusion batches do not count theirs
        line["padding"] = round(1 - line["tokens"] / slots, 4)
    if slots and cfg.packing:
        unpacked = total(batch.get("unpacked_slots", 0) for batch in batches)
        line["padding_unpacked"] = round(1 - line["tokens"] / unpacked, 4)
    return line


# -------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(cfg, student):
    """AdamW, or plain SGD to compare with; weight decay on matrices only."""
    # norms and biases are vectors; stacked experts have three dimensions
    matrices = [p for p in student.parameters() if p.dim() > 1]
    others = [p for p in student.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # AdamW moves every weight by about lr, however small its gradient is; SGD does not
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr)
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, fused=True)


def learning_rate(cfg, step):
    """Of the update from theta_step to theta_(step + 1): linear warm-up, then cosine or constant."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    # 0 at the first update after the warm-up; the last one is still made at more than 0
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


# -------------------------------------------------------------------------------------------------
# Keys and inputs


def resolve(given):
    """The keys that were given -> a complete Config.

    The others come from the run that is resumed or, with a selection, from pass 1; else they are
    the defaults. Raises InputError for a value that is out of range.
    """
    unknown = sorted(set(given) - {key.name for key in fields(Config)})
    if unknown:
        raise InputError(f"unknown key {unknown[0]}")
    if given.get("revision"):  # from here on it is a part of the name
        pinned = at_revision(given.get("model", ""), given["revision"])
        given = given | {"model": pinned, "revision": ""}
    # a resumed run is the run it was; pass 2 trains as pass 1 did, so only the selection differs
    inherited = {}
    folder = run_folder(given["run"]) if given.get("run") else None
    if folder and given.get("resume") and (folder / "config.json").is_file():
        inherited = read_keys(folder, Config)
    elif given.get("selection"):
        inherited = of_pass_1(given, Config)
    cfg = Config(**{**inherited, **given})

    cfg.online = str(cfg.online).lower()  # a notebook may well pass True
    check_greedy(given, cfg)
    require_given(cfg, *(("model",) if cfg.dry_run else ("run", "model", "data")))
    require(
        cfg,
        online=("false", "true", "continue"),
        watch=("", "accuracy", "label_free"),
        schedule=("cosine", "constant"),
        optimizer=("adamw", "sgd"),
        dtype=("float32", "bfloat16"),
        export_dtype=("float32", "bfloat16"),
        beta1=(0, below(1)),
        beta2=(0, below(1)),
        gpu_memory_gib=(above(0), None),
    )
    # as words, since fifteen lines of key=(1, None) would hide the few bounds that differ
    counts = "steps watch_every micro_batch_size samples max_new_tokens sample_batch_size keep_resume_states"
    require(cfg, **dict.fromkeys([*counts.split(), "timeout", "gpus"], (1, None)))
    require(cfg, record_problems=(-1, None), resume_every=(-1, None))
    never = "probe record_every save_every confidence_draws max_row_tokens"
    sizes = "batch_size lr warmup_steps weight_decay clip seed"
    require(cfg, **dict.fromkeys([*never.split(), *sizes.split()], (0, None)))  # 0: none, or all
    online.check_keys(cfg, given)
    return cfg


def read_inputs(cfg):
    """All that a run reads, except the weights, checked to belong together -> Run."""
    device = parallel.start_processes(cfg)
    # shape, tokenizer and data are small or mapped from disk; the weights come last, in `begin`
    source = local_folder(cfg.model)
    shape = families.read_config(source)
    tokenizer = load_tokenizer(source)
    diffusion.check_keys(shape, cfg)
    if shape.is_diffusion and cfg.packing:
        raise InputError(
            "--packing=true is for autoregressive students: "
            "a diffusion objective lays out its own rows"
        )
    train_set = load_data(cfg.data, tokenizer, shape)
    eval_set = load_data(cfg.eval_data, tokenizer, shape)
    masks = load_selections(cfg.selection, train_set, shape.is_diffusion)
    if shape.is_diffusion:
        diffusion.check_data(shape, train_set)
        diffusion.check_selection(cfg, masks["force"], masks["keep"])
    if cfg.record_every:
        check_recording(cfg, shape, train_set, eval_set)
    folder = run_folder(cfg.run)
    return Run(
        cfg,
        device,
        folder,
        source,
        shape,
        tokenizer,
        train_set,
        eval_set,
        selected=masks["keep"],
        forced=masks["force"],
    )


def check_recording(cfg, shape, train_set, eval_set):
    """Raises InputError, now and not at step 0, for sampling keys or problems that cannot work."""
    unanswered = any(example["answer"] is None for example in train_set.examples)
    if cfg.watch == "accuracy" and (unanswered or cfg.record_problems < 0):
        why = "not every example has an answer" if unanswered else "--record_problems=-1 asks for none"
        raise InputError(f"{cfg.data}: {why}, so no accuracy can be watched; use --watch=label_free")
    # problems of the training data may lack answers: then there is no accuracy, only c_t
    if eval_set and any(example["answer"] is None for example in eval_set.examples):
        raise InputError(
            f"{cfg.eval_data}: not every example has an answer, so there is no accuracy to record"
        )
    parts = [part for part in (train_set, eval_set) if part]
    prompts = [part.prompt(i).tolist() for part in parts for i in range(len(part))]
    if shape.is_diffusion:
        resolve_decoding(shape, prompts, cfg)
    else:
        check_used([shape], cfg)
        check_sampling(shape, prompts, cfg)


def load_data(folder, tokenizer, shape):
    """A data folder, checked to fit the student and its tokenizer; None for an empty name."""
    if not folder:
        return None
    loaded = data.load(folder)
    check_tokenizer(loaded, tokenizer)
    check_fits(shape, loaded)
    # no error: another template of the same tokenizer can be meant, but seldom is
    if loaded.meta.get("template_hash") not in (None, tokenizer.template_hash):
        screen.say(
            f"warning: {folder} was rendered by another chat template than the student's, "
            "which its checkpoints keep"
        )
    return loaded


if __name__ == "__main__":
    command(main, Config)
    parallel.end_processes()
