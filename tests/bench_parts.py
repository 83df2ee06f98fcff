"""Sections of bench.py on single parts: the loss, experts, and what keys of train.py cost or save.

Each takes bench.py's Config, the student's folder and the examples, and returns lines of its table.
The keyword arguments are the sizes; tests make them small. Next: bench_diffusion.py.
"""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import alone, free_memory, line, peak_memory, small, taking_turns, update
from torch import nn

import model
import trajectory
from hf import families
from plumbing import resume

# --------------------------------------------------------------------------------------------------
# loss: model(ids, targets=...) against cross-entropy of all logits, on a model that is nothing but
# embedding and head


def loss_section(cfg, folder, examples, vocabulary=151936, width=512, rows=8192):
    sizes = (rows // 4, rows // 2, rows)
    lines = memory_of_loss(cfg, vocabulary, width, sizes)
    n = rows // 8
    for share in (1.0, 0.5):
        student, ids, targets = head_only(vocabulary, width, n, share)
        seconds = taking_turns(
            cfg.repeats,
            partial(our_loss, student, ids, targets),
            partial(plain_loss, student, ids, targets),
        )
        lines.append(line(f"seconds, {n} rows, {share:.0%} of them scored", *seconds, ">= 1.0" if share == 1 else ""))
    return lines


def memory_of_loss(cfg, vocabulary, width, sizes):
    """What each size adds to a process, against all logits where those fit into memory."""
    free = free_memory()
    needed = {n: 3 * 4 * n * vocabulary for n in sizes}  # logits, their log-softmax, its gradient
    fitting = [n for n in sizes if free is None or 1.2 * needed[n] < free]
    ours = alone(peaks_of_loss, "ours", cfg.threads, vocabulary, width, sizes)
    other = alone(peaks_of_loss, "all rows", cfg.threads, vocabulary, width, fitting)
    lines = []
    for n in sizes:
        what = f"extra memory, {n} rows, V {vocabulary}, GB"
        if n in fitting:
            lines.append(line(what, ours[n] / 1e9, other[n] / 1e9, other[n] / ours[n]))
        else:
            print(f"loss: cross-entropy of all {n} rows needs {needed[n] / 1e9:.0f} GB, "
                  "more than is free")
            lines.append(line(what, ours[n] / 1e9, None))
    return lines


def head_only(vocabulary, width, rows, share=1.0):
    """A Transformer without layers, ids and targets (rows / 64, 64) of which `share` are scored."""
    config = families.Config(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=True,
    )
    student = model.Transformer(config).init_weights(seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows // 64, 64), generator=generator)
    targets = ids.roll(1, dims=1)
    targets[:, : round(64 * (1 - share))] = -100
    return student, ids, targets


def our_loss(student, ids, targets):
    student.zero_grad(set_to_none=False)
    student(ids, targets=targets).sum().backward()


def plain_loss(student, ids, targets):
    student.zero_grad(set_to_none=False)
    logits = student(ids).flatten(0, 1)
    F.cross_entropy(logits, targets.flatten(), reduction="sum").backward()


def peaks_of_loss(side, threads, vocabulary, width, sizes):
    """{rows: bytes that a forward and backward pass adds to a process with the model and its
    gradients}, rows rising.

    The peak is that of the process so far: a size that needs less than the one before it would show
    the same.
    """
    torch.set_num_threads(threads)
    student, ids, targets = head_only(vocabulary, width, max(sizes))
    step = our_loss if side == "ours" else plain_loss
    step(student, ids[:1], targets[:1])  # whatever is made once
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_memory()
    found = {}
    for rows in sizes:
        step(student, ids[: rows // 64], targets[: rows // 64])
        found[rows] = peak_memory() - before
    return found


# --------------------------------------------------------------------------------------------------
# moe: experts as grouped matrix products against a loop over the experts, which have a module each


def moe_section(
    cfg, folder, examples, experts=256, width=1024, expert_width=256, rows=(32, 1024)
):
    grouped, loop = both_mixtures(experts, width, expert_width)
    generator = torch.Generator().manual_seed(1)

    def as_loop(x):
        return loop_over_experts(grouped.gate, loop, x)

    def and_backward(layer, x):
        layer(x).sum().backward()

    lines = []
    difference = 0.0
    for n in rows:
        x = torch.randn(n, width, generator=generator)
        difference = max(difference, (grouped(x) - as_loop(x)).abs().max().item())
        with torch.no_grad():
            seconds = taking_turns(cfg.repeats, partial(grouped, x), partial(as_loop, x))
        lines.append(line(f"seconds, {n} rows, {experts} experts, forward", *seconds))
    backward = partial(and_backward, grouped, x), partial(and_backward, as_loop, x)
    seconds = taking_turns(cfg.repeats, *backward)
    lines.append(line(f"seconds, {n} rows, {experts} experts, and backward", *seconds))
    lines.append(line("largest difference of the outputs", difference, None, wanted="< 1e-4"))
    return lines


def both_mixtures(experts, width, expert_width):
    """The same random weights as model.MoE, and as a list of one MLP an expert."""
    config = families.Config(
        model_type="llada2_moe",
        vocab_size=1,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=expert_width,
        sigmoid_router=True,
        n_group=8,
        topk_group=4,
    )
    grouped = model.MoE(config)
    loop = nn.ModuleList(model.MLP(config, expert_width) for _ in range(experts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in grouped.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)
        for e, one in enumerate(loop):
            for name, parameter in one.named_parameters():
                stacked = getattr(grouped.experts, name.removesuffix(".weight"))
                parameter.copy_(stacked[e])
    return grouped, loop


def loop_over_experts(gate, experts, x):
    """x (N, C) -> (N, C), one expert after the other, as most published code does it."""
    weights, chosen = gate(x)  # (N, k)
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        if len(rows):
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
    return out


# --------------------------------------------------------------------------------------------------
# compile, packing, recording, checkpoint: what train.py's keys cost or save, against train.py
# without them


def compile_section(cfg, folder, examples):
    if not shutil.which("g++"):
        print("compile: left out, torch.compile needs a C++ compiler and there is no g++ here")
        return []
    compiled = small(cfg, folder, examples, 8, compile=True)
    eager = small(cfg, folder, examples, 8)
    seconds = taking_turns(cfg.repeats, partial(update, compiled), partial(update, eager))
    return [line("seconds a step, blocks compiled, against eager", *seconds)]


def packing_section(cfg, folder, examples):
    packed = small(cfg, folder, examples, 32, packing=True)
    padded = small(cfg, folder, examples, 32)
    ours = update(packed)
    other = update(padded)
    seconds = taking_turns(cfg.repeats, partial(update, packed), partial(update, padded))
    what = "share of padding, packed, against padded"
    difference = abs(ours["loss"] - other["loss"])
    return [
        line("seconds a step, packed, against padded", *seconds),
        line(what, ours["padding"], other["padding"]),
        line("difference of the first loss", difference, None, wanted="< 1e-5"),
    ]


def recording_section(cfg, folder, examples):
    """A recorded checkpoint without sampled answers: one forward pass over the data, against an
    epoch of training."""
    run = small(cfg, folder, examples, 16)
    with tempfile.TemporaryDirectory() as home:

        def record():
            with torch.no_grad():
                trajectory.sweep(run, Path(home) / "logprob", 0)
            (Path(home) / "logprob").unlink()

        seconds = taking_turns(cfg.repeats, record, partial(update, run))
    return [line("seconds of a sweep, against an epoch of training", *seconds, ">= 2.5")]


def checkpoint_section(cfg, folder, examples):
    """The resume state of torch.distributed.checkpoint with its hashes, against torch.save of the
    same tensors."""
    run = small(cfg, folder, examples, 2)
    update(run)
    with tempfile.TemporaryDirectory() as home:

        def ours():
            resume.save(Path(home), run.student, run.optimizer, 1, 1)

        def plain():
            with open(Path(home) / "plain.pt", "wb") as file:
                torch.save(resume.tensors(run.student, run.optimizer), file)
                file.flush()
                os.fsync(file.fileno())

        seconds = taking_turns(2, ours, plain)
    return [line("seconds to write a resume state, against torch.save", *seconds)]
