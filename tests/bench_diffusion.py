"""Sections of bench.py on masked diffusion: the loss, the cache, parallel decoding.

Each takes bench.py's Config, the student's folder and the examples (of which it needs neither), and
returns lines of its table. The keyword arguments are the sizes; tests make them small.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import alone, line, peak_memory, taking_turns

import data
import denoise
import diffusion
import model
import verify
from hf import families
from hf.tokenizer import load_tokenizer
from sampling import Sampling

STUDENT = "students/toy-diffusion-1"
PROBLEMS = "data/toy-1/unseen"


def diffusion_student(model_type, attention, vocabulary=4096, width=256, layers=4):
    """Random weights; attention full (LLaDA) or block (LLaDA2's blocks of 32, without experts)."""
    config = families.Config(
        model_type=model_type,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        attention=attention,
        pad_token_id=0,
        eos_token_ids=[0],
        mask_token_id=1,
    )
    return model.Transformer(config).init_weights(seed=0, std=0.1).eval()


# --------------------------------------------------------------------------------------------------
# masked: LLaDA's fine-tuning step, logits at masked positions only, against logits at all, as other
# trainers make them


def masked_section(cfg, folder, examples, rows=4, length=256, vocabulary=126464):
    student, batch = masked_step(rows, length, vocabulary)
    share = float((batch["targets"] != -100).float().mean())
    peaks = []
    for side in ("ours", "all rows"):
        peaks.append(alone(peak_of_masked, side, cfg.threads, rows, length, vocabulary) / 1e9)
    both = partial(masked_loss, student, batch), partial(all_rows_loss, student, batch)
    seconds = taking_turns(cfg.repeats, *both)
    difference = abs(masked_loss(student, batch) / all_rows_loss(student, batch) - 1)
    what = f"LLaDA step, {rows} x {length}, {share:.0%} masked"
    return [
        line(f"extra memory of a {what}, GB", *peaks, peaks[1] / peaks[0]),
        line(f"seconds of a {what}", *seconds),
        line("relative difference of the losses", difference, None, wanted="< 1e-5"),
    ]


def masked_step(rows, length, vocabulary):
    """A small body under a head of (by default) LLaDA's vocabulary, and a micro-batch of random
    ids."""
    student = diffusion_student("llada", "full", vocabulary, width=512)
    ends = np.arange(1, rows + 1) * length
    starts = ends - length
    spans = np.stack([starts, starts + length // 4, ends], 1)
    tokens = np.random.default_rng(0).integers(2, vocabulary, rows * length).astype(np.uint32)
    names = [{"id": str(i)} for i in range(rows)]
    examples = data.Data("random", tokens, spans, names, {}, "")
    batch = diffusion.corrupt_batch(
        student.config,
        examples,
        range(rows),
        diffusion.Corruption(),
        seed=0,
        step=0,
        length=length,
    )
    return student, batch


def masked_loss(student, batch):
    student.zero_grad()
    nll = student(batch["ids"], targets=batch["targets"])
    loss = (nll * batch["weights"]).sum() / batch["count"]
    loss.backward()
    return loss.item()


def all_rows_loss(student, batch):
    student.zero_grad()
    logits = student(batch["ids"]).transpose(1, 2)
    nll = F.cross_entropy(logits, batch["targets"], reduction="none")
    loss = (nll * batch["weights"]).sum() / batch["count"]
    loss.backward()
    return loss.item()


def peak_of_masked(side, threads, rows, length, vocabulary):
    """Bytes that a step of one side adds to a process with the model and its gradients."""
    torch.set_num_threads(threads)
    student, batch = masked_step(rows, length, vocabulary)
    short = {key: batch[key][:, :16] for key in ("ids", "targets", "weights")}
    step = masked_loss if side == "ours" else all_rows_loss
    step(student, {**batch, **short})  # whatever is made once
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_memory()
    step(student, batch)
    return peak_memory() - before


# --------------------------------------------------------------------------------------------------
# blocks: LLaDA2's decoding with a cache of the finished blocks, against reading the whole text in
# every pass


def blocks_section(cfg, folder, examples, prompt=64, new_tokens=512):
    student = diffusion_student("llada2_moe", "block")
    prompts = [np.random.default_rng(0).integers(2, 4096, prompt).tolist()]
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
    answers = {}

    def decode(use_cache):
        steps = denoise.generate(student, prompts, sampling, use_cache=use_cache, eos_ids=())
        *_, (canvas, _) = steps
        answers[use_cache] = canvas[0, prompt : prompt + new_tokens].tolist()

    repeats = -(-cfg.repeats // 2)
    seconds = taking_turns(repeats, partial(decode, True), partial(decode, False))
    same = sum(a == b for a, b in zip(answers[True], answers[False], strict=True))
    what = f"seconds for {new_tokens} tokens, with a cache, against none"
    return [
        line(what, *seconds, ">= 3"),
        line("tokens that are the same", same, new_tokens, wanted="all"),
    ]


# --------------------------------------------------------------------------------------------------
# threshold: tokens per denoising pass, and what they cost in accuracy, against one token per pass


def threshold_section(
    cfg,
    folder,
    examples,
    student=STUDENT,
    problems=PROBLEMS,
    thresholds=(0.95, 0.9, 0.8, 0.6, 0.4),
):
    if not (Path(student).is_dir() and Path(problems).is_dir()):
        print(f"threshold: left out, it needs {student} and {problems} (python toy.py --seed=1)")
        return []
    tokenizer = load_tokenizer(Path(student))
    unseen = data.load(problems)
    student = model.load(student)
    one_speed, one_accuracy = decode_all(student, tokenizer, unseen, 1.0)
    lines = []
    for threshold in thresholds:
        speed, accuracy = decode_all(student, tokenizer, unseen, threshold)
        what = f"tokens a pass, threshold {threshold}, against one"
        lines.append(line(what, speed, one_speed, speed / one_speed))
        what = f"accuracy at temperature 0, {len(unseen)} problems"
        lines.append(line(what, accuracy, one_accuracy))
    return lines


def decode_all(student, tokenizer, problems, threshold, new_tokens=48):
    """-> (tokens per denoising pass, accuracy). A pass counts for every answer into which it
    wrote."""
    prompts = [problems.prompt(i).tolist() for i in range(len(problems))]
    ends = {*student.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id}
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0, threshold=threshold)
    written = 0
    passes = 0
    steps = denoise.generate(
        student, prompts, sampling, eos_ids=ends, vocab_size=tokenizer.vocab_size
    )
    for canvas, new in steps:
        written += int(new.sum())
        passes += int(new.any(1).sum())
        last = canvas
    right = []
    for row, prompt, example in zip(last.tolist(), prompts, problems.examples, strict=True):
        answer = denoise.until_end(row[len(prompt) : len(prompt) + new_tokens], ends)
        text = tokenizer.decode(answer)
        right.append(verify.grade(text, example["answer"], problems.meta["verifier"]))
    return written / passes, float(np.mean(right))
