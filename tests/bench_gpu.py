"""bench.py --what=gpu: what a GPU does with this code, in one command without downloads.

    python tests/bench.py --what=gpu       # meant for one card of 80 GB, under ten minutes

First the tests marked `cuda` (tests/test_cuda.py). Then training steps of models with random
weights in the shapes of Qwen3 and of a LLaDA2 with fewer layers: tokens/s, MFU and the peak of the
memory beside what `train.py --dry_run=true` says; rows of 4k and 16k tokens, packed; compiled and
not. Then transformers' Trainer on the same batches, and the sampler at batch 1 and 64.

Without a GPU the same functions run at toy size on the CPU: that they run is all it shows. As the
ratio, lines of memory have dry run / measured: below 1, the dry run promised too little.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import ROOT, line

import data
import model
import sample
import train
from hf import families, weights
from plumbing import memory, parallel
from plumbing.config import write_json

QWEN3 = dict(
    model_type="qwen3",
    architectures=["Qwen3ForCausalLM"],
    vocab_size=151936,
    num_key_value_heads=8,
    head_dim=128,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
    eos_token_id=151645,
    torch_dtype="bfloat16",
)
LLADA2 = dict(
    model_type="llada2_moe",
    vocab_size=157184,
    hidden_size=2048,
    intermediate_size=5120,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=6e5,
    max_position_embeddings=32768,
    partial_rotary_factor=0.5,
    routed_scaling_factor=2.5,
    num_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    num_shared_experts=1,
    moe_intermediate_size=512,
    first_k_dense_replace=1,
    block_length=32,
    mask_token_id=156895,
    eos_token_id=156892,
    pad_token_id=156892,
)


def qwen3(hidden, intermediate, layers, heads):
    return QWEN3 | dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


@dataclass
class Sizes:
    shapes: dict  # name -> config.json
    compared: str  # the shape that transformers' Trainer and the sampler take
    lengths: tuple  # tokens of a packed row
    new_tokens: int  # of an answer
    batches: tuple = (1, 64)  # answers written together
    steps: int = 3  # timed, after two that warm up
    dtype: str = "bfloat16"


REAL = Sizes(
    shapes={
        "Qwen3-0.6B": qwen3(1024, 3072, 28, 16),
        "Qwen3-1.7B": qwen3(2048, 6144, 28, 16),
        "Qwen3-4B": qwen3(2560, 9728, 36, 32),
        "LLaDA2, 4 layers": LLADA2,
    },
    compared="Qwen3-0.6B",
    lengths=(4096, 16384),
    new_tokens=256,
)
TINY = dict(vocab_size=300, head_dim=16, num_key_value_heads=2, eos_token_id=0)
TOY = Sizes(
    shapes={
        "Qwen3, toy": qwen3(32, 48, 2, 4) | TINY,
        "LLaDA2, toy": LLADA2
        | TINY
        | dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=16,
            block_length=8,
            mask_token_id=1,
            pad_token_id=0,
        ),
    },
    compared="Qwen3, toy",
    lengths=(64,),
    new_tokens=8,
    batches=(1, 4),
    steps=1,
)


def gpu_section(cfg, folder, examples, sizes=None):
    """All parts -> lines. Neither --model nor --data is used."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    sizes = sizes or (REAL if on_gpu else TOY)
    if on_gpu:
        print(f"gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    else:
        print("gpu: there is none here; every part at toy size on the CPU, its figures mean nothing")
    lines = [marked_tests()] if on_gpu else []
    for name, raw in sizes.shapes.items():
        for length in sizes.lengths:
            for compiled in (False, True) if on_gpu else (False,):
                lines += or_too_large(training_lines, name, raw, length, compiled, sizes, device)
    raw = sizes.shapes[sizes.compared]
    lines += trainer_lines(sizes.compared, raw, sizes, device)
    lines += sampler_lines(sizes.compared, raw, sizes, device)
    return lines


def marked_tests():
    """Run the tests marked `cuda` in a process of their own."""
    words = ["-m", "pytest", "-q", "-m", "cuda", str(ROOT / "tests")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "nothing printed"
    print(f"gpu: tests marked cuda: {last}")
    if done.returncode:
        print(done.stdout[-3000:])
    return line(f"tests marked cuda ({last})", done.returncode, 0, wanted="exit code 0")


def or_too_large(function, name, *args):
    """Its lines; one that says so where the model does not fit."""
    try:
        return function(name, *args)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        raw, length, compiled = args[:3]
        return [line(f"{name}, {length} tokens{on(compiled)}: out of memory", None, None)]


def on(compiled):
    return ", compiled" if compiled else ""


# --------------------------------------------------------------------------------------------------
# Training steps


def training_lines(name, raw, length, compiled, sizes, device):
    """tokens/s, MFU and memory of train.py's step on one packed row of `length` tokens."""
    run = random_run(raw, length, compiled, sizes, device)
    try:
        for step in range(2):
            one_step(run, step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(device)
        tick = time.perf_counter()
        done = [one_step(run, 2 + step) for step in range(sizes.steps)]
        wait(device)
        seconds = time.perf_counter() - tick
    finally:
        parallel.end_processes()
    tokens = sum(step["tokens"] for step in done)
    flops = sum(step["flops"] for step in done)
    share = memory.mfu(run.cfg, device, flops, seconds).get("mfu")
    what = f"{name}, {length} tokens{on(compiled)}"
    lines = [line(f"{what}: tokens/s", tokens / seconds, None)]
    lines.append(line(f"{what}: MFU", share, None, wanted=">= 0.4"))
    fixed, per_row, _ = memory.plan(run.cfg, run.shape, length)
    planned = sum(fixed.values()) + per_row["all"]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        lines.append(line(f"{what}: peak GB, and of the dry run", peak / 1e9, planned / 1e9,
                          planned / peak))
    else:
        lines.append(line(f"{what}: GB of the dry run", None, planned / 1e9))
    return lines


def random_run(raw, length, compiled, sizes, device, packing=True):
    """A train.Run with random weights and random examples that fill one row a step."""
    shape = config_of(raw)
    diffusion = shape.is_diffusion
    cfg = train.Config(
        steps=2 + sizes.steps,
        batch_size=1 if diffusion else 4,
        micro_batch_size=1,
        packing=packing and not diffusion,
        max_row_tokens=length if packing and not diffusion else 0,
        checkpoint_activations=True,
        dtype=sizes.dtype,
        compile=compiled,
        device=str(device),
    )
    parallel.start_processes(cfg)

    def shard(student):
        parallel.parallelize(cfg, student, device)

    student = model.build(shape, device, shard=shard)
    initialise(student)
    run = train.Run(
        cfg=cfg,
        device=device,
        folder=None,
        source=None,
        shape=shape,
        tokenizer=None,
        train_set=random_rows(shape, length, 1 if diffusion else 4),
        eval_set=None,
        selected=None,
        forced=None,
        student=student,
    )
    run.optimizer = train.make_optimizer(cfg, student)
    return run


def config_of(raw):
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", raw)
        return families.read_config(folder)


def initialise(student):
    """Small random matrices, norms of 1, no biases."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, buffer in student.named_buffers():
            if name.endswith("bias"):
                buffer.zero_()


def random_rows(shape, length, parts):
    """A data.Data of `parts` examples that fill one row of `length` tokens, a quarter of each the
    prompt."""
    size = length // parts
    starts = np.arange(parts) * size
    spans = np.stack([starts, starts + size // 4, starts + size], 1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 300, parts * size)  # any ids will do: the work is the same
    names = [{"id": str(i), "answer": None} for i in range(parts)]
    return data.Data("random", tokens.astype(np.uint32), spans, names, {}, "")


def one_step(run, step):
    """One update -> train.py's line of the log."""
    batches = train.micro_batches(run, step)
    return train.train_step(run.cfg, run.student, run.optimizer, batches, step)


def wait(device):
    """CUDA works behind Python's back: a time is right only once it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------
# Beside transformers' Trainer, and the sampler


def trainer_lines(name, raw, sizes, device):
    """The same unpacked micro-batches, in turn, from the same weights."""
    import bench

    length = sizes.lengths[0]
    run = random_run(raw, length, False, sizes, device, packing=False)
    try:
        with tempfile.TemporaryDirectory() as home:
            run.source = saved(run.student, raw, Path(home))
            losses = []
            seconds = []
            ticks = [time.perf_counter()]

            def our_turn():
                wait(device)
                theirs = time.perf_counter() - ticks[-1]
                tick = time.perf_counter()
                losses.append(one_step(run, len(losses)))
                wait(device)
                seconds.append((time.perf_counter() - tick, theirs))
                ticks.append(time.perf_counter())

            theirs = bench.trainer_steps(run, our_turn, bf16=sizes.dtype == "bfloat16")
    finally:
        parallel.end_processes()
    ours, other, ratio = bench.medians(seconds[1:])
    tokens = losses[-1]["tokens"]
    gap = max(abs(own["loss"] - loss) for own, loss in zip(losses, theirs, strict=True))
    what = f"{name}, {length} tokens, against transformers' Trainer"
    return [
        line(f"{what}: tokens/s", tokens / ours, tokens / other, ratio, ">= 1.25"),
        line(f"{what}: largest difference of the losses", gap, None, wanted="< 0.02"),
    ]


def saved(student, raw, folder):
    """The weights as a Hugging Face folder that transformers loads."""
    write_json(folder / "config.json", raw)
    weights.save(student, folder, folder / "student")
    return folder / "student"


def sampler_lines(name, raw, sizes, device):
    """Greedy answers of one length, tokens/s."""
    dtype = getattr(torch, sizes.dtype)
    student = model.build(config_of(raw), device, dtype)
    initialise(student)
    prompts = np.random.default_rng(0).integers(2, 300, (max(sizes.batches), 64)).tolist()
    sampling = sample.Sampling(max_new_tokens=sizes.new_tokens, temperature=0)
    lines = []
    for batch in sizes.batches:
        for _ in range(2):  # the first one warms up
            wait(device)
            tick = time.perf_counter()
            answers = sample.sample(
                student, prompts[:batch], sampling, batch_size=batch, eos_ids=()
            )
            wait(device)
            seconds = time.perf_counter() - tick
        written = sum(map(len, answers))
        what = f"{name}: sampled tokens/s, batch {batch}"
        lines.append(line(what, written / seconds, None))
    return lines
