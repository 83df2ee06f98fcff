"""Fine-tune a student on a teacher's traces: one plain loop for both passes of T3S.

    python train.py --run=sft --model=M --data=D --record_every=2        # pass 1: plain SFT, and what every token did
    python select.py --run=sft --rule=t3s                                # bottleneck, delta, which tokens to keep
    python train.py --run=t3s --selection=runs/sft/selection/t3s         # pass 2: all else inherited from pass 1
    torchrun --nproc_per_node=8 -- train.py --run=...                    # the same commands, sharded over 8 GPUs

M is a Hugging Face folder or hub id, D a folder made by data.py. Everything lands in runs/<run>/: config.json,
log.jsonl (a line per step), checkpoints/ (ordinary Hugging Face folders), trajectory/ (log-probability of every
response token, and train accuracy, at each recorded checkpoint). Next: select.py.
"""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import data
import eval as evaluation
import model
from config import InputError, command, load_select, read_json, whole_file, write_json


@dataclass
class Config:
    # what
    run: str = ""  # name of the run: its folder is runs/<run>
    model: str = ""  # the student, theta_0: a Hugging Face folder or hub id
    data: str = ""  # training examples: a folder made by data.py
    selection: str = ""  # pass 2: a folder made by select.py; unset keys are inherited from the run it came from
    eval_data: str = ""  # a second folder made by data.py, on whose problems accuracy is recorded as well
    # optimisation
    steps: int = 50  # optimizer steps
    batch_size: int = 64  # examples in an optimizer step, over all processes; 0: all of them
    micro_batch_size: int = 8  # examples in one forward pass of one process; changes memory and speed, not results
    lr: float = 1e-5  # peak learning rate of AdamW
    schedule: str = "cosine"  # after the warm-up: cosine (to 0) or constant
    warmup_steps: int = 0  # linear from 0
    weight_decay: float = 0.0  # on matrices; never on norms and biases
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    dtype: str = "float32"  # of the computation: float32 or bfloat16; weights and optimizer state stay float32
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    compile: bool = False  # torch.compile each block
    seed: int = 0  # order of the examples, noise, sampling
    # recording
    record_every: int = 0  # record trajectory and accuracy every so many steps, and at 0 and the end; 0: never
    samples: int = 1  # answers sampled per problem for an accuracy
    temperature: float = 1.0  # of those answers
    top_p: float = 1.0  # of those answers
    top_k: int = 0  # of those answers; 0: no limit
    max_new_tokens: int = 1024  # length limit of those answers
    save_every: int = 0  # keep a checkpoint every so many steps; the bottleneck and the last are kept in any case


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def main(**given):
    """Train one run. Keys are Config's; raises InputError for whatever cannot work, before anything is written."""
    cfg = resolve(given)
    rank, world, device = start_processes(cfg)
    source = model.local_folder(cfg.model)
    if model.read_config(source).is_diffusion:
        raise InputError(f"{source}: masked-diffusion students cannot be trained yet")
    tokenizer = data.load_tokenizer(source)
    train_set, eval_set = load_data(cfg.data, tokenizer), load_data(cfg.eval_data, tokenizer)
    keep = load_select().load_mask(cfg.selection, train_set) if cfg.selection else None  # (n_tokens,) bool
    folder = start_run(cfg, rank, device, tokenizer, train_set)
    student = model.load(source, device, shard=lambda m: parallelize(cfg, m, world, device))
    optimizer = make_optimizer(cfg, student)
    if rank == 0:
        describe(cfg, student, train_set, keep, device, world)

    lowest, accuracy, started = None, None, time.time()
    log_path = folder / "log.jsonl" if rank == 0 else os.devnull
    with Interrupt() as interrupt, open(log_path, "a", encoding="utf-8") as log:
        for step in range(cfg.steps + 1):
            stop = all_reduce(interrupt.asked, device) > 0
            last = stop or step == cfg.steps
            if cfg.record_every and not stop and (step % cfg.record_every == 0 or last):
                recorded = record(cfg, student, tokenizer, train_set, eval_set, folder, step)
                write_log(log, recorded)
                accuracy = recorded["accuracy"]
                if step and accuracy is not None and (lowest is None or accuracy < lowest[0]):
                    model.save(student, source, checkpoint(folder, step))  # the bottleneck so far
                    if rank == 0:
                        remove_checkpoint(cfg, folder, lowest)
                    lowest = (accuracy, step)
            if last or (cfg.save_every and step and step % cfg.save_every == 0):
                if step and not checkpoint(folder, step).exists():
                    model.save(student, source, checkpoint(folder, step))
            if last:
                break

            tick = time.time()
            lr = learning_rate(cfg, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batches = micro_batches(cfg, train_set, keep, step, rank, world, device)
            done = train_step(cfg, student, optimizer, batches, step)
            done.update(lr=lr, seconds=round(time.time() - tick, 4))
            write_log(log, done)
            if rank == 0:
                show(cfg, done, accuracy, started)
    if rank == 0:
        state = f"stopped at step {step} of {cfg.steps}" if step < cfg.steps else "done"
        saved = checkpoint(folder, step) if step else "none"
        lead = "\n" if sys.stdout.isatty() else ""
        print(f"{lead}{state}: {folder} ({time.time() - started:.0f} s), last checkpoint: {saved}")


def micro_batches(cfg, train_set, keep, step, rank, world, device):
    """This process's share of optimizer step `step`, cut into forward passes of examples of similar length.

    Which examples make the step is a pure function of (cfg.seed, step), whatever the number of processes. Every
    process gets the same number of micro-batches (an empty one counts 0), since every forward pass is collective.
    A micro-batch is a dict:

    examples   (n,) which ones, for messages               tokens  int, those of its examples
    ids        (B, T) int64                                 count   float, its part of the step's normaliser
    targets    (B, T) int64, -100 where nothing is scored   weights (B, T) float32 on the NLL; None: all 1
    positions, attention   as Transformer.forward takes them; None: its defaults
    """
    chosen = data.step_examples(len(train_set), cfg.batch_size, step, cfg.seed)
    length = train_set.spans[chosen, 2] - train_set.spans[chosen, 0]
    chosen = chosen[np.argsort(-length, kind="stable")]
    most, mine = -(-len(chosen) // world), chosen[rank::world]
    batches = []
    for i in range(0, most, cfg.micro_batch_size):
        examples = mine[i : i + cfg.micro_batch_size]
        ids, targets = data.collate(train_set, examples, keep)  # (B, T) each
        batches.append({
            "examples": examples,
            "ids": torch.as_tensor(ids, device=device),
            "targets": torch.as_tensor(targets, device=device),
            "weights": None, "positions": None, "attention": None,
            "tokens": int((train_set.spans[examples, 2] - train_set.spans[examples, 0]).sum()),
            "count": float((targets != -100).sum()),
        })  # fmt: skip
    return batches


def train_step(cfg, student, optimizer, batches, step):
    """One update: loss = sum of weighted NLL / sum of counts of the whole step, never a mean of means.

    Both sums run over all micro-batches and processes. Returns the log line. Raises InputError, before the weights
    are touched, if the loss or the gradient norm is not finite; the message names the examples at fault.
    """
    device = batches[0]["ids"].device
    normaliser = all_reduce(sum(b["count"] for b in batches), device)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        nll = student(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
        weighted = nll if batch["weights"] is None else nll * batch["weights"]  # (B, T)
        loss = weighted.sum() / (normaliser or 1)  # no supervised token at all: loss 0, gradient 0
        loss.backward()
        losses.append(loss.item())
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss, grad_norm = all_reduce(math.fsum(losses), device), norm.item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        bad = [b["examples"].tolist() for b, value in zip(batches, losses, strict=True) if not math.isfinite(value)]
        where = f"; not finite in the micro-batch of examples {bad[0]}" if bad else ""
        raise InputError(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}{where}; stopped, nothing saved")
    if cfg.clip:
        torch.nn.utils.clip_grads_with_norm_(student.parameters(), cfg.clip, norm)
    optimizer.step()
    tokens = all_reduce(sum(b["tokens"] for b in batches), device)
    supervised = all_reduce(sum(int((b["targets"] != -100).sum()) for b in batches), device)
    return {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "tokens": int(tokens),
            "supervised": int(supervised)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start_processes(cfg):
    """torchrun's processes, or just this one -> (rank, number of processes, device)."""
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        elif cfg.dtype != "float32":  # FSDP gives us mixed precision too, and wants a group, be it of one
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)


def parallelize(cfg, student, world, device):
    """Compile each block, then cut it over the processes with FSDP2, then the rest (embedding, norm, head) as one.

    Float32 shards and optimizer state; blocks compute in cfg.dtype. One float32 process needs none of it.
    """
    if cfg.compile:
        for block in student.model.layers:
            block.compile()  # before fully_shard, whose hooks would break the graph; parameter names stay
    if world == 1 and cfg.dtype == "float32":
        return
    mesh = init_device_mesh(device.type, (world,))
    # cast_forward_inputs would round RoPE's cos and sin to bfloat16
    policy = MixedPrecisionPolicy(getattr(torch, cfg.dtype), torch.float32, cast_forward_inputs=False)
    for part in [*student.model.layers, student]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for module in student.modules():
        if isinstance(module, FSDPModule):  # plain sums: train_step has divided by the global token count already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def all_reduce(number, device):
    """The sum of a number over all processes, in float64."""
    if not dist.is_initialized():
        return float(number)
    total = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


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
# The trajectory (paper section 2): what theta_step thinks of every response token, and how often it is right


@torch.no_grad()
def record(cfg, student, tokenizer, train_set, eval_set, folder, step):
    """Write trajectory/<step>.npz and return the log line.

    A sweep of its own over all training examples, whatever is selected: c_t = log p(y_t | y_<t, x) is a property of
    (checkpoint, data), not of batches. Train accuracy is that of sampled answers, graded by eval.py; None if an
    example has no answer to compare with (then name the bottleneck yourself: select.py --bottleneck=STEP).
    """
    tick, device = time.time(), next(student.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    logprob = torch.zeros(len(train_set.tokens))  # each process fills in its examples
    order = np.argsort(train_set.spans[:, 0] - train_set.spans[:, 2], kind="stable")  # longest first
    for i in range(0, -(-len(order) // world), cfg.micro_batch_size):
        examples = order[rank::world][i : i + cfg.micro_batch_size]
        ids, targets = (torch.as_tensor(a, device=device) for a in data.collate(train_set, examples))
        nll = student(ids, targets=targets).cpu()
        for row, (start, prompt_end, end) in zip(nll, train_set.spans[examples], strict=False):
            logprob[prompt_end:end] = -row[prompt_end - start - 1 : end - start - 1]  # position i predicts token i + 1
    if world > 1:
        total = logprob.to(device)
        dist.all_reduce(total)  # exact: every other process holds a 0
        logprob = total.cpu()
    response = train_set.response_mask()
    logprob = np.where(response, logprob.numpy(), np.float32(np.nan))
    nll = -float(logprob[response].mean(dtype=np.float64))
    if not math.isfinite(nll):
        raise InputError(f"step {step}: a response token has probability 0 or nan under the student; nothing written")
    keys = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    sampling = {key: getattr(cfg, key) for key in keys}
    accuracy, correct = None, np.full(len(train_set), np.nan, dtype=np.float32)
    if all(example["answer"] is not None for example in train_set.examples):
        accuracy, rows = evaluation.evaluate(student, tokenizer, train_set, **sampling)
        correct = np.array([r["correct"] for r in rows], dtype=np.float32).reshape(len(train_set), -1).mean(1)
    line = {"step": step, "event": "record", "nll": nll, "accuracy": accuracy}
    if eval_set is not None:
        line["eval_accuracy"], _ = evaluation.evaluate(student, tokenizer, eval_set, **sampling)
    if rank == 0:
        path = folder / "trajectory" / f"{step:06d}.npz"
        with whole_file(path) as aside, open(aside, "wb") as file:
            np.savez(file, logprob=logprob, correct=correct, accuracy=np.nan if accuracy is None else accuracy,
                     step=step, sha256=train_set.sha256, tokenizer_hash=tokenizer.hash)  # fmt: skip
    return {**line, "seconds": round(time.time() - tick, 4)}


# ---------------------------------------------------------------------------------------------------------------------
# Keys, folders, screen


def resolve(given):
    """The keys given -> a complete, checked Config; with a selection, what is not given is pass 1's."""
    inherited = {}
    if given.get("selection"):
        pass1 = Path(given["selection"]).parent.parent / "config.json"
        inherited = {k: v for k, v in read_json(pass1)["config"].items() if k not in ("run", "selection")}
    known = {f.name for f in fields(Config)}
    unknown = sorted((set(given) | set(inherited)) - known)
    if unknown:
        raise InputError(f"unknown key {unknown[0]}")
    cfg = Config(**{**inherited, **given})
    for key, value in given.items():
        if key in inherited and inherited[key] != value:
            print(f"differs from pass 1: {key} = {value} (pass 1: {inherited[key]})")
    for key in ("run", "model", "data"):
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")
    for key, allowed in (("schedule", ("cosine", "constant")), ("dtype", ("float32", "bfloat16"))):
        if getattr(cfg, key) not in allowed:
            raise InputError(f"--{key}={getattr(cfg, key)}: must be {' or '.join(allowed)}")
    for key in ("steps", "micro_batch_size", "samples", "max_new_tokens"):
        if getattr(cfg, key) < 1:
            raise InputError(f"--{key}={getattr(cfg, key)}: must be at least 1")
    return cfg


def load_data(folder, tokenizer):
    """A data folder, checked to be this tokenizer's; None for an empty name."""
    if not folder:
        return None
    loaded = data.load(folder)
    if loaded.meta["tokenizer_hash"] != tokenizer.hash:
        raise InputError(f"{folder}: made with another tokenizer than the student's; run data.py again with its folder")
    return loaded


def start_run(cfg, rank, device, tokenizer, train_set):
    """Make runs/<run>/ with its config.json; a run that is already there is never written over."""
    folder = Path("runs") / cfg.run
    if all_reduce((folder / "config.json").exists(), device):
        raise InputError(f"{folder}: this run exists; give --run another name, or delete the folder")
    if rank:
        return folder
    (folder / "trajectory").mkdir(parents=True, exist_ok=True)
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(folder / "config.json", {
        "config": asdict(cfg), "command": sys.argv, "versions": versions, "git": commit,
        "sha256": train_set.sha256, "tokenizer_hash": tokenizer.hash,
    })  # fmt: skip
    return folder


def checkpoint(folder, step):
    return folder / "checkpoints" / f"{step:06d}"


def remove_checkpoint(cfg, folder, lowest):
    """Forget the former bottleneck, unless it is one of the checkpoints that --save_every keeps."""
    if lowest and not (cfg.save_every and lowest[1] % cfg.save_every == 0):
        shutil.rmtree(checkpoint(folder, lowest[1]))


def write_log(log, line):
    log.write(json.dumps(line) + "\n")
    log.flush()


def describe(cfg, student, train_set, keep, device, world):
    parameters = sum(p.numel() for p in student.parameters())
    supervised = int((train_set.spans[:, 2] - train_set.spans[:, 1]).sum())
    a_step = min(cfg.batch_size or len(train_set), len(train_set))
    print(f"{cfg.run}: {parameters:,} parameters on {world} x {device.type}, {len(train_set)} examples, {a_step} of "
          f"them a step, {supervised:,} response tokens")  # fmt: skip
    if keep is not None:
        print(f"selection {cfg.selection}: {keep.sum():,} tokens = {keep.sum() / supervised:.1%} stay in the loss")
    defaults = Config()
    changed = {k: v for k, v in asdict(cfg).items() if v != getattr(defaults, k) and k not in ("run", "selection")}
    print(" ".join(f"{k}={v}" for k, v in changed.items()))


def show(cfg, done, accuracy, started):
    """The status line: rewritten in place on a terminal, otherwise about twenty lines a run."""
    terminal, step = sys.stdout.isatty(), done["step"]
    if not terminal and step % max(1, cfg.steps // 20) and step != cfg.steps:
        return
    left = (time.time() - started) / step * (cfg.steps - step)
    shown = "-" if accuracy is None else f"{accuracy:.3f}"
    text = (f"step {step}/{cfg.steps} | loss {done['loss']:.4f} | accuracy {shown}"
            f" | grad norm {done['grad_norm']:.2f} | lr {done['lr']:.1e}"
            f" | {done['tokens'] / max(done['seconds'], 1e-9):,.0f} tokens/s | {left:.0f} s left")  # fmt: skip
    print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)


class Interrupt:
    """Ctrl-C (or SIGTERM) lets the step finish; then the loop saves and stops. A second one stops at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():  # signals belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    command(main, Config)
