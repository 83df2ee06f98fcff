"""What train.py prints: the run, a status line that is rewritten in place, a line per record.

Only process 0 prints. A reader that has gone away (`| head`) does not stop the training.
Next: plumbing/rows.py.
"""

import os
import sys
import time
from dataclasses import asdict

import numpy as np

from batches import pack, padded_slots, sizes_of
from plumbing import memory
from plumbing.parallel import rank, world_size
from plumbing.runs import checkpoint

LITTLE = 0.1  # nats: tokens of so little loss have nothing to teach


def say(text, end="\n"):
    if rank():
        return
    try:
        print(text, end=end, flush=True)
    except OSError:
        # the reader is gone, and the training is worth more than its words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def rewrite(text):
    """On a terminal, in place of the status line; elsewhere a line."""
    say(f"\r\x1b[K{text}" if sys.stdout.isatty() else text)


def status(name, total, what="answers"):
    """A progress line that is rewritten after every answer, on a terminal."""

    def show(done):
        text = f"{name}: {done}/{total} {what}" if done < total else ""
        print(f"\r\x1b[K{text}", end="", flush=True)

    return show if sys.stdout.isatty() else None


def explain(accuracy, failed):
    """A sentence if a low accuracy is a matter of format rather than ability, else "".

    failed: what eval.rates returns. Worth reading before pass 1 is paid for.
    """
    causes = []
    if failed["thoughts_unclosed"] > 0.2:
        causes.append(f"{failed['thoughts_unclosed']:.0%} never ended their thoughts")
    if failed["truncated"] > 0.2:
        causes.append(f"{failed['truncated']:.0%} were cut off (raise --max_new_tokens)")
    if failed["unparsed"] > 0.2:
        causes.append(f"{failed['unparsed']:.0%} gave no answer that could be read (data.py --verifier)")
    if accuracy >= 0.5 or not causes:
        return ""
    return f"accuracy {accuracy:.3f}: of the answers {', '.join(causes)}: format, not only ability"


# -------------------------------------------------------------------------------------------------
# The run, once


def describe(run, before):
    """What is trained, on what, with which keys, and from where it is resumed."""
    cfg = run.cfg
    train_set = run.train_set
    parameters = sum(p.numel() for p in run.student.parameters())
    response = int((train_set.spans[:, 2] - train_set.spans[:, 1]).sum())
    a_step = min(cfg.batch_size or len(train_set), len(train_set))
    say(
        f"{cfg.run}: {parameters:,} parameters on {world_size()} x {run.device.type}, "
        f"{len(train_set)} examples, {a_step} of them a step, {response:,} response tokens"
    )
    anchors = f", the others are {cfg.anchors}" if run.shape.is_diffusion else ""
    masked = "are always masked"
    if cfg.forced_odds:
        masked = f"have {cfg.forced_odds:g} times the odds of being masked"
    for mask, what in ((run.selected, f"stay in the loss{anchors}"), (run.forced, masked)):
        if mask is not None:
            chosen = int((mask > 0).sum())
            if mask.dtype != bool:
                what += f", with weights that sum to {mask.sum(dtype=np.float64):,.1f}"
            say(f"selection {cfg.selection}: {chosen:,} tokens = {chosen / response:.1%} {what}")
    if cfg.packing:
        say(packing(run))
    if run.device.type == "cpu":
        needed = memory.on_cpu(run)
        if needed:
            say(needed)
    changed = []
    for key, value in asdict(cfg).items():
        default = type(cfg).__dataclass_fields__[key].default
        if value != default and key not in ("run", "selection"):
            changed.append(f"{key}={value}")
    say(" ".join(changed))
    if before.step:
        say(f"resumed at step {before.step} of {cfg.steps}")
    elif cfg.resume:
        say("no resume state yet: from the beginning")


def packing(run):
    """How much padding the rows hold, each example in its own and several in one."""
    sizes = sizes_of(run.train_set, np.arange(len(run.train_set)))
    rows = [sum(sizes[i] for i in row) for row in pack(sizes, run.cfg.max_row_tokens)]
    alone = padded_slots(sizes, run.cfg.micro_batch_size)
    packed = padded_slots(np.array(rows), run.cfg.micro_batch_size)
    return (
        f"packing: {len(sizes)} examples in {len(rows)} rows; "
        f"padding {1 - sizes.sum() / alone:.1%} of all positions without it, "
        f"{1 - sizes.sum() / packed:.1%} with it"
    )


# -------------------------------------------------------------------------------------------------
# While it runs


class Progress:
    """The status line, about twenty lines a run where there is no terminal, and a line a record."""

    def __init__(self, run, before):
        self.run = run
        self.cfg = run.cfg
        self.started = time.time()
        self.latest = before.latest  # (train accuracy, step) of the last record
        self.compiled = None  # blocks that ran compiled in the first step
        self.steps = []  # seconds of each update
        self.records = []  # and of each record
        describe(run, before)

    def step(self, done, lr, seconds, speed):
        """After an update. The first one is often slow (compiling, first use of memory)."""
        self.steps.append(seconds)
        if self.cfg.compile:
            self.watch_compiled(done)
        step = done["step"]
        terminal = sys.stdout.isatty()
        some = step % max(1, self.cfg.steps // 20) == 0
        if not (terminal or some or step == self.cfg.steps):
            return
        accuracy = "-"
        if self.latest:
            accuracy = "{:.3f} at step {}".format(*self.latest)
        parts = [
            f"step {step}/{self.cfg.steps}",
            f"loss {done['loss']:.4f}",
            f"accuracy {accuracy}",
            f"grad norm {done['grad_norm']:.2f}",
            f"lr {lr:.1e}",
            f"{done['tokens'] / max(seconds, 1e-9):,.0f} tokens/s",
        ]
        if "mfu" in speed:
            parts.append(f"mfu {speed['mfu']:.1%}")
        if self.cfg.packing:
            unpacked = done["padding_unpacked"]
            parts.append(f"padding {done['padding']:.0%} (unpacked {unpacked:.0%})")
        parts.append(f"{self.seconds_left(step):.0f} s left")
        text = " | ".join(parts)
        say(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n")

    def seconds_left(self, step):
        """Updates and records that are still to come, each at the pace of the latest ones."""
        # the first of either is slow: it stands for the others only while it is the only one
        pace = np.mean(self.steps[1:][-20:] or self.steps)
        left = (self.cfg.steps - step) * pace
        if self.records:
            every = self.cfg.record_every
            to_come = len(range(-(-(step) // every) * every, self.cfg.steps, every)) + 1
            left += to_come * self.records[-1]
        return left

    def watch_compiled(self, done):
        """Say how many blocks run compiled, and warn if that falls: torch says nothing."""
        now = done["compiled"]
        total = len(self.run.student.model.layers)
        if self.compiled is None:
            spent = self.run.student.compiler.seconds
            rewrite(f"compiled: {now} of {total} blocks, in {spent:.0f} s")
        if now < (total if self.compiled is None else self.compiled):
            rewrite(
                f"warning: from step {done['step']} on only {now} of {total} blocks run compiled, "
                "the others as plain PyTorch; TORCH_LOGS=recompiles tells why"
            )
        self.compiled = now

    def record(self, recorded):
        """A recorded checkpoint has a line of its own that stays."""
        self.records.append(recorded["seconds"])
        if recorded["accuracy"] is not None:
            self.latest = (recorded["accuracy"], recorded["step"])
        names = {
            "accuracy": "train accuracy",
            "eval_accuracy": "accuracy on eval_data",
            "nll": "NLL of a response token",
            "nll_kept": "kept",
            "nll_dropped": "dropped",
            "nll_forced": "forced",
            "nll_others": "others",
        }
        shown = []
        for key, name in names.items():
            if recorded.get(key) is not None:
                shown.append(f"{name} {recorded[key]:.3f}")
        seconds = f"{recorded['seconds']:.0f} s"
        rewrite(f"recorded step {recorded['step']} | {' | '.join(shown)} | {seconds}")
        kept = recorded.get("nll_kept", recorded["nll"])
        if recorded["step"] == 0 and kept < LITTLE:
            rewrite(
                f"warning: the tokens that stay in the loss have an NLL of only {kept:.3f} at step "
                "0: the student knows them already, and there is almost nothing to learn"
            )
        # a student that cannot be read has no accuracy to fall: better known before pass 1 than after
        if recorded["step"] == 0 and "answers" in recorded:
            why = explain(recorded["accuracy"], recorded["answers"])
            if why:
                rewrite(f"warning: {why}")

    def end(self, step, finished):
        """The last line: how far it came, and where its checkpoint is."""
        state = "done" if finished else f"stopped at step {step} of {self.cfg.steps}"
        saved = checkpoint(self.run.folder, step) if step else "none"
        lead = "\n" if sys.stdout.isatty() else ""
        seconds = time.time() - self.started
        say(f"{lead}{state}: {self.run.folder} ({seconds:.0f} s), last checkpoint: {saved}")
