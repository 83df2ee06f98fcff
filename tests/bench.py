"""Speed and memory against transformers and against the plain way, as ratios from one run.

    python tests/bench.py                 # random weights of SmolLM2-135M's shape
    python tests/bench.py --what=loss     # one section; --help lists them
    python tests/bench.py --what=train,generate --model=M --data=gsm8k_train.jsonl

One function a section; each returns lines of the table that is printed at the end. A ratio is "how
many times better than the other side" (faster, or smaller). The two sides take turns, step by step,
and a ratio is the median of the ratios of neighbours: so other work on the machine slows both
alike. Peaks of memory are those of a process that does one side and nothing else. Figures that were
kept, with the machine they came from: docs/LOG.md.

Here: the command, and what is compared with transformers. The rest of the sections: bench_parts.py
(loss, experts, keys of train.py), bench_diffusion.py, bench_gpu.py. How it is measured: measure.py.
"""

import os
import platform
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bench_diffusion
import bench_gpu
import bench_parts
import numpy as np
import torch
import torch.nn.functional as F
from measure import (
    Ratio,
    alone,
    line,
    medians,
    peak_memory,
    random_examples,
    random_student,
    real_examples,
    taking_turns,
    training,
)

import batches as batching
import model
import sample
import train
from formats import read_examples
from hf import families
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError, command


@dataclass
class Config:
    what: str = ""  # sections, separated by commas; default: all but gpu, which is for a machine with one
    model: str = ""  # a Hugging Face folder or hub id; default: random weights of SmolLM2-135M's shape
    data: str = ""  # a jsonl file for data.py, with --model; default: random ids, lengths as GSM8K's
    threads: int = 2  # of the CPU
    steps: int = 20  # train: optimizer steps
    batch_size: int = 4  # train: examples a step, in micro-batches of half as many
    repeats: int = 5  # all sections but train: how often each side takes its turn
    new_tokens: int = 64  # generate: length of every answer


def main(**given):
    """Run the sections, print the table -> its lines, dicts: section, what, ours, other, ratio,
    wanted."""
    cfg = Config(**given)
    names = cfg.what.split(",") if cfg.what else [name for name in SECTIONS if name != "gpu"]
    for name in names:
        if name not in SECTIONS:
            raise InputError(f"--what={name}: must be among {', '.join(SECTIONS)}")
    if cfg.data and not cfg.model:
        raise InputError("--data needs --model, whose tokenizer makes tokens of it")
    torch.set_num_threads(cfg.threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {cfg.threads} threads, "
          f"torch {torch.__version__}, load average before the start {os.getloadavg()[0]:.1f}")
    lines = []
    with tempfile.TemporaryDirectory() as home:
        if cfg.model:
            folder = families.local_folder(cfg.model)
        else:
            folder = random_student(Path(home) / "student")
        examples = real_examples(cfg, folder, home) if cfg.data else random_examples(folder)
        for name in names:
            started = time.time()
            lines += [{"section": name, **row} for row in SECTIONS[name](cfg, folder, examples)]
            print(f"{name}: {time.time() - started:.0f} s", flush=True)
    print_table(lines)
    return lines


def print_table(lines):
    print(f"\n{'':55}{'ours':>12}{'other':>12}{'ratio':>8}  wanted")
    for row in lines:
        what = f"{row['section']}: {row['what']}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        if isinstance(row["ratio"], Ratio):
            ratio += f" ({row['ratio'].low:.2f} to {row['ratio'].high:.2f})"
        figures = f"{figure(row['ours']):>12}{figure(row['other']):>12}{ratio:>22}"
        print(f"{what:55}{figures}  {row['wanted']}".rstrip())


def figure(value):
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


# --------------------------------------------------------------------------------------------------
# parity: the same numbers as transformers and tokenizers, without which no ratio means anything


def parity_section(cfg, folder, examples, batch=4):
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(batching.collate(examples, range(batch))[0])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model.load(folder)(ids)
        other = theirs(ids).logits
    difference = (ours - other).abs().max().item()
    what = f"largest difference of {ours.numel()} logits"
    lines = [line(what, difference, None, wanted="< 1e-4")]
    if cfg.data:
        lines.append(same_texts(cfg, folder))
    return lines


def same_texts(cfg, folder):
    """How many texts of --data have the ids that tokenizers gives them."""
    from tokenizers import Tokenizer

    ours = load_tokenizer(folder)
    theirs = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    texts = []
    for example in read_examples(cfg.data):
        texts += [message["content"] for message in (*example.messages, example.turn)]
    same = 0
    for text in texts:
        same += ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    return line("texts with the ids of tokenizers", same, len(texts), wanted="all")


# --------------------------------------------------------------------------------------------------
# train: train.py's step against transformers' Trainer. Same weights, micro-batches, AdamW,
# schedule, clipping; float32


def train_section(cfg, folder, examples):
    lines = []
    for name, trl in (("transformers' Trainer", False), ("TRL's SFTTrainer", True)):
        lines += train_lines(cfg, folder, examples, name, trl)
    return lines


def train_lines(cfg, folder, examples, name, trl):
    run = training(cfg, folder, examples, cfg.steps)
    ours = our_steps(run)
    losses = []
    seconds = []
    tick = time.perf_counter()

    def our_turn():
        # the Trainer calls this when it has done a step, with all that belongs to it
        nonlocal tick
        theirs = time.perf_counter() - tick
        tick = time.perf_counter()
        losses.append(next(ours))
        seconds.append((time.perf_counter() - tick, theirs))
        tick = time.perf_counter()

    their_losses = trainer_steps(run, our_turn, trl=trl)
    tokens = sum(count for _, count in losses[1:])  # the first step warms up
    our_seconds, their_seconds = np.array(seconds[1:]).sum(0)
    speeds = (tokens / our_seconds, tokens / their_seconds, medians(seconds[1:])[2])
    gaps = [abs(own - other) for (own, _), other in zip(losses, their_losses, strict=True)]
    peaks = []
    for side in ("ours", "TRL" if trl else "Trainer"):
        peaks.append(alone(peak_of_training, side, cfg, folder, examples) / 1e9)
    what = f"tokens/s, against {name}, {cfg.steps} steps"
    return [
        line(what, *speeds, ">= 1.25"),
        line("peak memory of the process, GB", *peaks, peaks[1] / peaks[0]),
        line("largest difference of the losses", max(gaps), None, wanted="< 1e-4"),
    ]


def our_steps(run):
    """A generator: every next() does one update as train.py does it -> (loss, tokens)."""
    run.student = model.load(run.source)
    run.optimizer = train.make_optimizer(run.cfg, run.student)
    for step in range(run.cfg.steps):
        for group in run.optimizer.param_groups:
            group["lr"] = train.learning_rate(run.cfg, step)
        batches = train.micro_batches(run, step)
        done = train.train_step(run.cfg, run.student, run.optimizer, batches, step)
        yield done["loss"], done["tokens"]


def trainer_steps(run, after_step, bf16=False, trl=False):
    """The same updates by transformers' Trainer, or TRL's SFTTrainer, which computes the loss in
    chunks -> their losses. after_step() is called when a step is done. bf16: with autocast.

    It gets its micro-batches ready-made, and without an attention mask: padding lies on the right,
    where causal attention never looks, and without a mask its attention is faster. It logs and
    saves nothing.
    """
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    batches = trainer_batches(run)
    a_step = len(batches) // run.cfg.steps
    kind, settings, keys, more = Trainer, TrainingArguments, {}, {}
    if trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        kind, settings = SFTTrainer, SFTConfig
        keys = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        more = {"processing_class": bare_tokenizer()}
        for batch in batches:  # it wants these or a mask; padding lies on the right
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        rows = [{key: value.tolist() for key, value in batch.items()} for batch in batches]
        batches = Dataset.from_list(rows).with_format("torch")  # it takes no list
    losses = []

    class AfterStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            after_step()

    class WithLosses(kind):  # what it logs is rounded
        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    cfg = run.cfg
    with tempfile.TemporaryDirectory() as out:
        arguments = settings(
            out,
            max_steps=cfg.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=a_step,
            optim="adamw_torch_fused",
            learning_rate=cfg.lr,
            adam_beta1=cfg.beta1,
            adam_beta2=cfg.beta2,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.clip,
            lr_scheduler_type=cfg.schedule,
            train_sampling_strategy="sequential",
            use_cpu=run.device.type == "cpu",
            bf16=bf16,
            gradient_checkpointing=cfg.checkpoint_activations,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            **keys,
        )
        trainer = WithLosses(
            AutoModelForCausalLM.from_pretrained(run.source, dtype=torch.float32),
            arguments,
            train_dataset=batches,
            data_collator=lambda one: one[0],
            callbacks=[AfterStep()],
            **more,
        )
        trainer.train()
    steps = [losses[i : i + a_step] for i in range(0, len(losses), a_step)]
    return [sum(loss.item() for loss in step) for step in steps]


def bare_tokenizer():
    """SFTTrainer asks for one, although its batches are made already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", pad_token="<end>")


def trainer_batches(run):
    """The micro-batches of all steps as transformers' models take them."""
    batches = []
    for step in range(run.cfg.steps):
        size = run.cfg.batch_size
        examples = batching.step_examples(len(run.train_set), size, step, run.cfg.seed)
        for rows in batching.shares(run, examples):
            packed = [i for row in rows for i in row]
            ids, targets, _ = batching.collate(run.train_set, packed)
            # these models shift the labels themselves
            labels = F.pad(torch.from_numpy(targets), (1, 0), value=-100)[:, :-1]
            batches.append({"input_ids": torch.from_numpy(ids), "labels": labels})
    return batches


def peak_of_training(side, cfg, folder, examples):
    """Peak memory of a process that does three steps of one side."""
    torch.set_num_threads(cfg.threads)
    run = training(cfg, folder, examples, min(3, cfg.steps))
    if side == "ours":
        list(our_steps(run))
    else:
        trainer_steps(run, lambda: None, trl=side == "TRL")
    return peak_memory()


# --------------------------------------------------------------------------------------------------
# generate, decode, batching: eval.py's greedy answers against transformers.generate


class Decoders:
    """A student and transformers' own, and what each answered last; both greedy."""

    def __init__(self, folder, rows, new_tokens, static=False):
        from transformers import AutoModelForCausalLM

        self.student = model.load(folder)
        self.theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.rows = rows  # answers that are written at the same time
        self.sampling = sample.Sampling(max_new_tokens=new_tokens, temperature=0)
        self.keys = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        if static:
            self.keys["cache_implementation"] = "static"

    def ours(self, prompts, ends):
        self.own = sample.sample(
            self.student, prompts, self.sampling, batch_size=self.rows, eos_ids=ends
        )

    def other(self, prompts, ends):
        self.theirs.generation_config.eos_token_id = sorted(ends) or None
        self.padded = []
        for start in range(0, len(prompts), self.rows):
            batch = prompts[start : start + self.rows]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            lengths = torch.tensor([len(prompt) for prompt in batch])
            mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
            out = self.theirs.generate(ids, attention_mask=mask, **self.keys)
            self.padded += out[:, longest:].tolist()

    def continuous(self, prompts, ends):
        """transformers' own continuous batching."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        longest = max(map(len, prompts)) + self.sampling.max_new_tokens
        room = ContinuousBatchingConfig(
            num_blocks=self.rows * -(-longest // 256),  # each 256 tokens; else all free memory
            max_batch_tokens=self.rows * 32,
            max_requests_per_batch=self.rows,
        )
        settings = GenerationConfig(eos_token_id=sorted(ends) or None, **self.keys)
        out = self.theirs.generate_batch(prompts, settings, room)
        self.padded = [out[f"req_{i}"].generated_tokens for i in range(len(prompts))]

    def lines(self, repeats, prompts, ends, what, wanted, other=None):
        """Two lines of the table: tokens a second, and how many answers have the same ids."""
        ours, other = partial(self.ours, prompts, ends), partial(other or self.other, prompts, ends)
        seconds = taking_turns(repeats, ours, other)
        written = sum(map(len, self.own))
        pairs = zip(self.own, self.padded, strict=True)
        same = sum(same_answer(own, padded, ends) for own, padded in pairs)
        speeds = (written / seconds[0], written / seconds[1], seconds[2])
        ids = "of these, same ids as transformers'"
        return [line(what, *speeds, wanted), line(ids, same, len(prompts), wanted="all")]


def same_answer(ours, padded, ends):
    """Is `padded` our answer, and then nothing or an end of text?"""
    rest = padded[len(ours) :]
    return padded[: len(ours)] == ours and (not rest or rest[0] in ends)


def generate_section(cfg, folder, examples, batch=16):
    """Prompts of the data; every answer as long as allowed, then as long as it wants to be."""
    prompts = [examples.prompt(i).tolist() for i in range(batch)]
    decoders = Decoders(folder, batch, cfg.new_tokens)
    own_ends = decoders.student.config.eos_token_ids
    lines = []
    for ends in [[], own_ends] if own_ends else [[]]:
        length = "up to their EOS" if ends else f"of {cfg.new_tokens} tokens"
        what = f"tokens/s, {batch} answers {length}"
        lines += decoders.lines(cfg.repeats, prompts, ends, what, ">= 1.2")
    return lines


def decode_section(cfg, folder, examples, batches=(1, 16, 64), prompt=8):
    """Steps of decoding alone: prompts of a few tokens, and answers of equal length."""
    decoders = Decoders(folder, max(batches), cfg.new_tokens, static=True)
    lines = []
    for batch in batches:
        prompts = [examples.tokens[i * prompt :][:prompt].tolist() for i in range(batch)]
        what = f"tokens/s, {batch} answers at a time, against a static cache"
        lines += decoders.lines(cfg.repeats, prompts, [], what, ">= 1.3")
    return lines


def batching_section(cfg, folder, examples, answers=64, rows=16, every=32):
    """Answers that end at different times: every 32nd id of the vocabulary ends one, so that about
    as many tokens are written until then, and lengths are spread geometrically.

    Both write `rows` at a time. Here a finished answer makes room for the next; the batches of
    transformers.generate wait for their longest. Its generate_batch makes room too.
    Prompts are the beginnings of the data's, 4 to 32 tokens.
    """
    with tempfile.TemporaryDirectory() as home:
        if not cfg.model:
            folder = random_student(Path(home) / "student", scale=3)
        decoders = Decoders(folder, rows, 2 * cfg.new_tokens)
        ends = set(range(0, decoders.student.config.vocab_size, every))
        prompts = [examples.prompt(i)[: 4 + i * 5 % 29].tolist() for i in range(answers)]
        what = f"tokens/s, {answers} unequal answers, {rows} at a time, against"
        lines = decoders.lines(cfg.repeats, prompts, ends, f"{what} generate", ">= 2")
        lengths = sorted(map(len, decoders.own))
        middle, longest = lengths[len(lengths) // 2], lengths[-1]
        lines.append(line("length of these answers: median, longest", middle, longest))
        lines += decoders.lines(
            1, prompts, ends, f"{what} generate_batch", ">= 2", decoders.continuous
        )
        return lines


SECTIONS = {
    "parity": parity_section,
    "train": train_section,
    "generate": generate_section,
    "decode": decode_section,
    "batching": batching_section,
    "loss": bench_parts.loss_section,
    "moe": bench_parts.moe_section,
    "compile": bench_parts.compile_section,
    "packing": bench_parts.packing_section,
    "recording": bench_parts.recording_section,
    "checkpoint": bench_parts.checkpoint_section,
    "masked": bench_diffusion.masked_section,
    "blocks": bench_diffusion.blocks_section,
    "threshold": bench_diffusion.threshold_section,
    "gpu": bench_gpu.gpu_section,
}

if __name__ == "__main__":
    command(main, Config)
