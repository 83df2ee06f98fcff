"""What does it take? The memory of a training run, from config.json alone; and MFU while it runs.

    python train.py --model=FOLDER --dry_run=true --gpus=8 --dtype=bfloat16 --max_row_tokens=16384
    python train.py --model=FOLDER --dry_run=true --data=D --gpu_memory_gib=141

FOLDER needs a config.json and no weights; of a hub id only that is fetched. The length of a row is
--max_row_tokens, or that of the longest example of --data. Shapes are the model's own: it is built,
and one of its blocks is run, on the meta device, where tensors have shapes and no memory, and what
autograd keeps is counted. Not counted: CUDA's context, NCCL's buffers and what the allocator loses
to fragmentation; a tenth of the memory is left for them. docs/SCALE.md has the figures for real
models. This is the end of the reading order.
"""

import math
import os
from dataclasses import replace

import torch
import torch.nn.functional as F

import data
import model
from hf.families import local_folder, read_config
from plumbing.config import InputError
from plumbing.parallel import world_size

GIB = 2**30
# dense bfloat16 peaks of the makers' data sheets, by the exact name that the driver gives;
# for any other name there is no MFU
PEAK = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


def mfu(cfg, device, flops, seconds):
    """{"mfu": share of the GPUs' peak that the model's own operations took}; {} where the peak is not known."""
    peak = PEAK.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if cfg.dtype != "bfloat16" or not peak or not flops:
        return {}
    return {"mfu": round(flops / seconds / (peak * world_size()), 4)}


def flops(student, tokens, scored, pairs):
    """Floating-point operations of a training step, as MFU counts them (arXiv 2204.02311, appendix B).

    tokens: positions that go through the blocks. scored: positions that go through the head.
    pairs: of a query and a key that it sees. A weight costs 6 a position (forward 2, backward 4), a
    pair 12 * H * D a layer. What activation checkpointing computes again does not count.
    """
    c = student.config
    weights = 0
    for name, parameter in student.model.layers.named_parameters():
        if parameter.dim() > 1:
            visited = c.num_experts_per_tok / c.num_experts if ".experts." in name else 1
            weights += parameter.numel() * visited
    head = c.vocab_size * c.hidden_size
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    return 6 * (weights * int(tokens) + head * int(scored)) + attention * int(pairs)


def dry_run(cfg):
    """Print the plan of a run -> its figures, {name: bytes per process}.

    "fits" is the largest micro_batch_size. Raises InputError if the length of a row is not known.
    """
    shape = read_config(local_folder(cfg.model, weights=False))
    length = cfg.max_row_tokens
    if not length and cfg.data:
        length = longest(data.load(cfg.data))
    if not length:
        raise InputError(
            "how long is a row? --max_row_tokens=N, or --data to take its longest example"
        )
    fixed, per_row, student = plan(cfg, shape, length)
    room = 0.9 * cfg.gpu_memory_gib * GIB - sum(fixed.values())
    fits = max(0, math.floor(room / per_row["all"]))
    parameters = sum(p.numel() for p in student.parameters())
    print(
        f"{cfg.model}: {shape.model_type}, {parameters:,} parameters, {shape.num_hidden_layers} "
        f"blocks; {cfg.dtype} on {cfg.gpus} x {cfg.gpu_memory_gib:g} GiB, rows of {length:,} tokens"
    )
    for name, size in fixed.items():
        show(size, name)
    kept = "its input only" if cfg.checkpoint_activations else "all that its backward pass needs"
    show(per_row["block"], "activations of one block, of each row")
    show(per_row["saved"], f"of these kept until its backward pass: {kept}")
    show(per_row["all"], "activations of each row, all blocks")
    total = sum(fixed.values()) + cfg.micro_batch_size * per_row["all"]
    show(
        total,
        f"in all with --micro_batch_size={cfg.micro_batch_size}; 90 % of the memory hold "
        f"{fits} rows = {fits * length:,} tokens in a pass",
    )
    answers = cache_of_answers(cfg, shape)
    show(
        answers,
        "instead of activations while accuracy is sampled: keys and values of "
        f"--sample_batch_size={cfg.sample_batch_size} answers of {cfg.max_new_tokens:,} tokens",
    )
    figures = {"parameters": parameters, "total": total, "fits": fits, "answers": answers}
    return {**fixed, **per_row, **figures}


def show(size, what):
    print(f"{size / GIB:10.3f} GiB  {what}")


def cache_of_answers(cfg, shape):
    """Bytes of keys and values of a full batch of answers."""
    a_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    tokens = cfg.sample_batch_size * cfg.max_new_tokens
    return a_token * tokens * bytes_of(cfg.dtype)


def bytes_of(dtype):
    return torch.finfo(getattr(torch, dtype)).bits // 8

def longest(train_set):
    """Tokens of the longest example."""
    return int((train_set.spans[:, 2] - train_set.spans[:, 0]).max())


def on_cpu(run):
    """What a run takes on this machine, as a line to print before it begins; "" if it is little.

    With a warning if that is more than is free: the kernel would kill the process in the middle.
    """
    cfg = replace(run.cfg, gpus=world_size())
    length = max(longest(run.train_set), cfg.max_row_tokens if cfg.packing else 0)
    fixed, per_row, _ = plan(cfg, run.shape, length)
    state = sum(fixed.values())
    batch = cfg.micro_batch_size * per_row["all"]
    if state + batch < GIB / 10:
        return ""
    text = (
        f"memory: about {state / GIB:.2f} GiB for weights, gradients and the optimizer, "
        f"{batch / GIB:.2f} GiB for a micro-batch of {cfg.micro_batch_size} x {length:,} tokens"
    )
    free = available()
    if free and state + batch > free:
        fits = max(1, int((free - state) / per_row["all"]))
        text += (
            f"\nwarning: more than the {free / GIB:.1f} GiB that are free; "
            f"try --micro_batch_size={fits}, --checkpoint_activations=true or --dtype=bfloat16"
        )
    return text


def available():
    """Bytes of memory that are free for one process, 0 where that is not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
    except OSError:
        return 0
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(lines["MemAvailable"].split()[0]) * 1024 // on_this_node


def plan(cfg, shape, length):
    """What a process holds -> fixed, per_row, student.

    fixed    {name: bytes} whatever the batch
    per_row  {name: bytes} of each row of `length` tokens
    student  the model, on the meta device
    """
    with torch.device("meta"):
        student = model.Transformer(shape)
    size = bytes_of(cfg.dtype)
    # FSDP2 cuts the first dimension in equal parts, rounded up
    shards = sum(-(-len(p) // cfg.gpus) * p.numel() // len(p) for p in student.parameters())
    fixed = {
        "weights: float32, sharded": 4 * shards,
        "gradients: float32, sharded": 4 * shards,
    }
    if cfg.optimizer == "adamw":
        fixed["AdamW's two moments: float32, sharded"] = 8 * shards
    blocks = [sum(p.numel() for p in block.parameters()) for block in student.model.layers]
    rest = sum(p.numel() for p in student.parameters()) - sum(blocks)
    if cfg.gpus > 1 or cfg.dtype != "float32":  # else train.py does without FSDP
        two = f"two blocks gathered in {cfg.dtype}, the gradients of one, and these in float32 to be reduced"
        fixed[two] = max(blocks) * (3 * size + 4)
        ends = f"embedding, norm and head gathered in {cfg.dtype} for the whole step, and their gradients"
        fixed[ends] = rest * (2 * size + 4)

    # a block objective reads [x_t, x_0]; complementary masks make two rows of each example
    copies = 2 if shape.attention == "block" else 1
    if cfg.complementary and shape.is_diffusion:
        copies *= 2
    tokens = length * copies
    head = shape.vocab_size * shape.hidden_size
    # in chunks of so many rows, as in Transformer.forward; few of them are all kept, as in LinearNLL
    chunk = max(1, 2**26 // shape.vocab_size)
    rows = cfg.micro_batch_size * tokens
    kept = rows if rows <= model.LinearNLL.FEW * chunk else chunk
    logits = "logits of scored rows that are kept, of a chunk more, and the head's gradient, float32"
    fixed[logits] = 4 * (kept + min(rows, chunk)) * shape.vocab_size + 4 * head

    kinds = [kept_by(shape, layer, tokens, cfg.dtype) for layer in range(shape.num_hidden_layers)]
    stream = tokens * shape.hidden_size * size
    saved = [stream] * len(kinds) if cfg.checkpoint_activations else kinds
    # with checkpointing one block at a time is computed again, and its activations come on top
    again = max(kinds) if cfg.checkpoint_activations else 0
    whole = sum(saved) + again + 4 * stream
    return fixed, {"block": max(kinds), "saved": max(saved), "all": whole}, student

# (the config, is it a mixture of experts, tokens, dtype) -> bytes: blocks of a kind are alike
KEPT = {}


def kept_by(shape, layer, tokens, dtype):
    """Bytes that autograd keeps of one block between its forward and backward pass.

    Counted by running it on the meta device, without torch.compile, which keeps less. Weights,
    RoPE's tables and masks are not the block's own.
    """
    key = (str(shape), layer in shape.moe_layers, tokens, dtype)
    if key in KEPT:
        return KEPT[key]
    kind = getattr(torch, dtype)
    with torch.device("meta"):
        block = model.Block(shape, layer).to(kind)
        x = torch.empty(1, tokens, shape.hidden_size, dtype=kind, requires_grad=True)
        cos, sin = torch.empty(2, 1, 1, tokens, int(shape.head_dim * shape.partial_rotary_factor))
    shared = (cos, sin, *block.parameters(), *block.buffers())
    others = {t.untyped_storage()._cdata for t in shared}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # views of one storage count once
        return tensor

    attend = F.scaled_dot_product_attention
    grouped = model.grouped_linear
    F.scaled_dot_product_attention = flash
    model.grouped_linear = experts
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block.compute(x, cos, sin, None, False, None)
    finally:
        F.scaled_dot_product_attention = attend
        model.grouped_linear = grouped
    own = [t for storage, t in kept.items() if storage not in others]
    KEPT[key] = sum(t.untyped_storage().nbytes() for t in own)
    return KEPT[key]


class Keep(torch.autograd.Function):
    """Stands in for a kernel that the meta device lacks: `out`, and the other tensors are kept."""

    @staticmethod
    def forward(ctx, out, *kept):
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError  # nothing is trained here


def flash(q, k, v, **given):
    """A fused attention kernel keeps queries, keys, values, its output and a log-sum-exp per query."""
    out = torch.empty_like(q)
    return Keep.apply(out, q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))


def experts(x, weight, ends):
    """A grouped matrix product keeps its inputs."""
    return Keep.apply(x.new_empty(len(x), weight.shape[1]), x, weight, ends)
