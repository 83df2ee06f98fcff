"""One transformer for Qwen2, Qwen2.5, Qwen3, Qwen3-MoE, Llama 3 and SmolLM2, and, without the causal mask, for the
masked-diffusion models LLaDA-8B and LLaDA2. It reads and writes Hugging Face folders; nothing is converted.

    import model
    student = model.load("Qwen/Qwen3-0.6B")            # or a local folder; config.json says which family it is
    logits = student(ids)                              # (B, T) -> (B, T, V)
    nll = student(ids, targets=targets)                # (B, T) -> (B, T), the logits exist only in small pieces
    model.save(student, "path/to/its/tokenizer", "out")

The module tree below carries the names of Hugging Face's Llama; `disk_pieces` is the one place that knows how LLaDA,
LLaDA2 and the mixture-of-experts checkpoints spell or cut the same tensors.

Shapes: B batch, T tokens, S cached tokens, C hidden_size, H query heads, K key/value heads, D head_dim, F MLP width,
V vocabulary, E experts, N rows of a flattened batch. Next: train.py.
"""

import functools
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from config import InputError, read_json, whole_folder, write_json

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: config.json in its dialects -> one dataclass


@dataclass
class Config:
    model_type: str
    vocab_size: int  # rows of the embedding; a tokenizer may use fewer
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # Qwen3: not hidden_size / num_attention_heads
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None
    max_position_embeddings: int = 0
    partial_rotary_factor: float = 1.0  # LLaDA2 rotates the first half of every head only
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over D on queries and keys, before RoPE
    attention: str = "causal"  # or "full" (LLaDA-8B), or "block": causal over blocks, full inside one (LLaDA2)
    block_length: int = 32
    bos_token_id: int | None = None
    eos_token_ids: list = field(default_factory=list)
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    # mixture of experts
    moe_layers: frozenset = frozenset()
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    sigmoid_router: bool = False  # LLaDA2; Qwen3-MoE's is a softmax
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    raw: dict = field(default_factory=dict, repr=False)  # config.json as it was, for `save`

    @property
    def is_diffusion(self):
        return self.attention != "causal"


FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "llada", "llada2_moe")
ROPE_KEYS = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}  # each scaling's own


def read_config(folder):
    """`folder`/config.json -> Config. Raises InputError for a family or a feature that this file does not compute."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{path}: model_type {family!r} is not supported (supported: {', '.join(FAMILIES)})")
    try:
        config = _read_llada(raw) if family == "llada" else _read_llama_like(raw, family)
    except KeyError as missing:
        raise InputError(f"{path}: the key {missing} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: a value of the wrong type ({error})") from None
    for key, kind in Config.__annotations__.items():
        value = getattr(config, key)
        if kind in (int, float) and not isinstance(value, (int, float)):
            raise InputError(f"{path}: {key} is {value!r}: a value of the wrong type")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim"):  # fmt: skip
        if getattr(config, key) < 1:
            raise InputError(f"{path}: {key} is {getattr(config, key)}; must be at least 1")
    config.raw = raw
    generation = Path(folder) / "generation_config.json"  # chat models list more ends there than in config.json
    more = read_json(generation).get("eos_token_id") if generation.exists() else None
    config.eos_token_ids = sorted({*_as_list(raw.get("eos_token_id")), *_as_list(more)})
    act = raw.get("hidden_act", raw.get("activation_type", "silu"))
    if act != "silu":
        raise InputError(f"{path}: activation {act!r} is not supported, only silu")
    # hub files of Qwen2.5 carry a sliding_window with use_sliding_window false: the window is then not in use
    if raw.get("use_sliding_window") and raw.get("sliding_window"):
        raise InputError(f"{path}: use_sliding_window is not supported")
    # LLaDA's code has these options, its checkpoints do not use them
    for key in ("alibi", "attention_layer_norm", "clip_qkv", "input_emb_norm", "scale_logits", "multi_query_attention"):
        if raw.get(key):
            raise InputError(f"{path}: {key} is not supported")
    known = {"rope": True, "layer_norm_type": "rms", "block_type": "llama", "score_function": "sigmoid"}
    for key, only in known.items():
        if raw.get(key, only) != only:
            raise InputError(f"{path}: {key} {raw[key]!r} is not supported, only {only!r}")
    if config.is_diffusion and not config.eos_token_ids:  # LLaDA2's config.json names its end of text as padding only
        config.eos_token_ids = _as_list(config.pad_token_id)
    if config.mask_token_id is not None and not 0 <= config.mask_token_id < config.vocab_size:
        raise InputError(f"{path}: mask_token_id {config.mask_token_id} is not one of {config.vocab_size} ids")
    if config.rope_scaling is not None:
        rope_type = config.rope_scaling["rope_type"]
        if rope_type not in ROPE_KEYS:
            raise InputError(f"{path}: rope scaling {rope_type!r} is not supported (supported: {', '.join(ROPE_KEYS)})")
        for key in ROPE_KEYS[rope_type]:
            if config.rope_scaling.get(key) is None:
                raise InputError(f"{path}: rope scaling {rope_type!r} needs the key {key!r}")
    return config


def _as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_llama_like(raw, family):
    # Two dialects: the hub's rope_theta + rope_scaling (older files say "type"), transformers 5's rope_parameters.
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    heads = raw["num_attention_heads"]
    bias = bool(raw.get("attention_bias", False))
    config = Config(
        model_type=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads),
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        max_position_embeddings=raw.get("max_position_embeddings", 0),
        partial_rotary_factor=float(rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        bos_token_id=raw.get("bos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        mask_token_id=raw.get("mask_token_id"),
    )
    layers = range(config.num_hidden_layers)
    if family == "qwen3_moe":
        config.num_experts = raw.get("num_experts") or raw["num_local_experts"]
        dense, step = raw.get("mlp_only_layers") or [], raw.get("decoder_sparse_step", 1)
        config.moe_layers = frozenset(i for i in layers if i not in dense and (i + 1) % step == 0)
        config.norm_topk_prob = bool(raw.get("norm_topk_prob", False))
    if family == "llada2_moe":
        config.attention, config.sigmoid_router = "block", True
        config.block_length = raw.get("block_length", 32)
        config.qk_norm = bool(raw.get("use_qk_norm", True))
        config.qkv_bias, config.o_bias = bool(raw.get("use_qkv_bias", False)), bool(raw.get("use_bias", False))
        if config.mask_token_id is None:
            config.mask_token_id = 156895  # <|mask|>; the released config.json does not say it
        config.num_experts = raw["num_experts"]
        config.moe_layers = frozenset(i for i in layers if i >= raw.get("first_k_dense_replace", 0))
        config.num_shared_experts = raw.get("num_shared_experts") or 0
        config.n_group, config.topk_group = raw.get("n_group") or 1, raw.get("topk_group") or 1
        config.routed_scaling_factor = float(raw.get("routed_scaling_factor", 1.0))
    if config.num_experts:
        config.num_experts_per_tok = raw["num_experts_per_tok"]
        config.moe_intermediate_size = raw["moe_intermediate_size"]
    return config


def _read_llada(raw):
    heads = raw["n_heads"]
    return Config(
        model_type="llada",
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw["mlp_hidden_size"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("n_kv_heads") or heads,
        head_dim=raw["d_model"] // heads,
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=float(raw["rope_theta"]),
        max_position_embeddings=raw["max_sequence_length"],
        tie_word_embeddings=bool(raw.get("weight_tying", False)),
        qkv_bias=bool(raw.get("include_bias") or raw.get("include_qkv_bias")),
        o_bias=bool(raw.get("include_bias")),
        mlp_bias=bool(raw.get("include_bias")),
        attention="full",
        bos_token_id=raw.get("bos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        mask_token_id=raw["mask_token_id"],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The network, from leaf to root


class RMSNorm(nn.Module):
    """Statistics in float32, cast back, then the weight: the order in which every one of these checkpoints was made."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_frequencies(config, device=None):
    """Angular frequency of each rotated pair, (D_rotated / 2,) in float32, and the factor on cos and sin.

    llama3: Llama 3.1's low frequencies divided by `factor`, a ramp between. yarn: arXiv 2309.00071, static as in
    transformers. Both follow transformers' modeling_rope_utils.py.
    """
    dim = int(config.head_dim * config.partial_rotary_factor)
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / config.rope_theta ** (pairs / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq, 1.0
    factor = scaling["factor"]
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = trained * freq / (2 * math.pi)  # full turns within the context the model was trained on
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return freq * (keep + (1 - keep) / factor), 1.0

    def pair_with_turns(turns):
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    def mscale(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = pair_with_turns(scaling.get("beta_fast") or 32), pair_with_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = ((pairs / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
    scale = scaling.get("attention_factor")
    if scale is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        scale = mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return freq * (1 - slow + slow / factor), mscale() if scale is None else scale


def rotate(x, cos, sin):
    """RoPE on the first cos.shape[-1] dims of x (B, heads, T, D): half-split pairs (i, i + D/2), in float32."""
    dim = cos.shape[-1]
    y = x[..., :dim].float()
    half = torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), dim=-1)
    y = (y * cos + half * sin).to(x.dtype)
    return y if dim == x.shape[-1] else torch.cat((y, x[..., dim:]), dim=-1)


def attention_mask(pattern, queries, keys, block_length):
    """Which key may a query see? Positions queries (B, T), keys (B or 1, S) -> bool (B, 1, T, S); None: all may."""
    if pattern == "full":
        return None
    queries, keys = queries[:, None, :, None], keys[:, None, None, :]
    if pattern == "block":  # blocks are counted from position 0 of the sequence
        queries, keys = queries // block_length, keys // block_length
    return keys <= queries


class Cache:
    """Keys and values of up to `length` positions for every layer, 2 * layers * B * K * length * D numbers.

    model(ids, positions=p, cache=cache) writes the rows at p and attends to what the family's pattern allows, so
    right-padded prompts need no mask: what padding wrote at later positions is overwritten before anything sees it.
    """

    def __init__(self, config, batch, length):
        self.batch, self.length = batch, length
        self.k = [None] * config.num_hidden_layers  # made by the first keys: their dtype and device may be autocast's
        self.v = [None] * config.num_hidden_layers
        self.positions, self.end = None, 0  # of the forward pass under way; set by Transformer.forward
        self.rows = slice(None)  # which sequences a forward pass is about; to be set by the caller

    def update(self, layer, k, v):
        """Write k, v (B, K, T, D) at self.positions; -> all keys and values up to self.end, (B, K, S, D)."""
        if self.k[layer] is None:
            shape = (self.batch, k.shape[1], self.length, k.shape[3])
            self.k[layer], self.v[layer] = k.new_zeros(shape), v.new_zeros(shape)
        index = self.positions[:, None, :, None].expand_as(k)
        keys, values = self.k[layer][self.rows], self.v[layer][self.rows]  # views
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def keep_rows(self, rows):
        """Drop every sequence of the batch but `rows` (n,)."""
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]


@functools.cache
def flex():
    """Attention that computes only the blocks a BlockMask lists. Eager, it would make all T x T scores: so compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x, cos, sin, mask, causal, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        H, K = q.shape[1], k.shape[1]
        if mask is not None and not isinstance(mask, torch.Tensor):  # a BlockMask
            y = flex()(q, k, v, block_mask=mask, enable_gqa=H != K)
        elif T == 1:  # one query: let the H/K heads of a group be its "tokens", so no key or value is copied
            y = F.scaled_dot_product_attention(q.view(B, K, H // K, -1), k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)
        return self.o_proj(y.reshape(B, H, T, -1).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """(N, C) -> the weights and numbers of each row's experts, both (N, k). Always in float32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.sigmoid_router:  # balances the load; it steers which experts are chosen, never their weight
            self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x):
        c = self.config
        # the meta device, on which memory.py runs this, has no autocast
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (N, E)
        if not c.sigmoid_router:
            weights, experts = logits.softmax(-1).topk(c.num_experts_per_tok, dim=-1)
            return weights / weights.sum(-1, keepdim=True) if c.norm_topk_prob else weights, experts
        scores = logits.sigmoid()
        choice = (scores + self.expert_bias).view(len(x), c.n_group, -1)  # (N, groups, E / groups)
        group = choice.topk(2, dim=-1).values.sum(-1)  # a group is worth its two best experts
        best = group.topk(c.topk_group, dim=-1).indices
        allowed = torch.zeros_like(group, dtype=torch.bool).scatter_(1, best, True)
        choice = choice.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        experts = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, experts)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor, experts


def grouped_linear(x, weight, ends):
    """Rows x (N, C) sorted by expert, weight (E, F, C), ends (E,) int32: where each expert's rows end -> (N, F)."""
    # torch.compile knows bfloat16 only, nothing knows float64, and every row must begin at a multiple of 16 bytes
    kinds = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.float32, torch.bfloat16, torch.float16)
    fits = x.dtype in kinds and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if hasattr(F, "grouped_mm") and fits:  # torch >= 2.10
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return torch.cat([rows @ w.T for rows, w in zip(x.tensor_split(ends[:-1].long().cpu()), weight, strict=True)])


class Experts(nn.Module):
    """All experts' SwiGLU weights, stacked, so that a layer is three grouped matrix products."""

    def __init__(self, config):
        super().__init__()
        E, C, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, width, C))
        self.up_proj = nn.Parameter(torch.empty(E, width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))

    def forward(self, x, ends):
        hidden = F.silu(grouped_linear(x, self.gate_proj, ends)) * grouped_linear(x, self.up_proj, ends)
        return grouped_linear(hidden, self.down_proj, ends)


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = MLP(config, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, x):
        rows = x.flatten(0, -2)  # (N, C)
        weights, experts = self.gate(rows)  # (N, k) each
        numbers, order = experts.flatten().sort(stable=True)  # row-expert pairs, sorted by expert
        all_experts = torch.arange(len(self.experts.gate_proj), device=x.device)
        ends = torch.searchsorted(numbers, all_experts, right=True, out_int32=True)
        out = self.experts(rows[order // experts.shape[1]], ends)  # (N * k, C)
        # back into the order of the rows; adding them up where they lie would be atomic, and so random, on a GPU
        out = torch.empty_like(out).index_copy(0, order, out).view(*experts.shape, -1)  # (N, k, C)
        out = (out * weights[..., None].to(x.dtype)).sum(1).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class Block(nn.Module):
    checkpoint_activations = False  # True: keep a block's input only, and compute the rest again on the way back

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if layer in config.moe_layers else MLP(config, config.intermediate_size)

    def forward(self, x, cos, sin, mask, causal, cache):
        # in here, not around the block: so it lies within what torch.compile and FSDP see as one block
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, mask, causal, cache, use_reentrant=False)
        return self.compute(x, cos, sin, mask, causal, cache)

    def compute(self, x, cos, sin, mask, causal, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LinearNLL(torch.autograd.Function):
    """-log softmax(hidden @ weight.T)[target] for each row: (N, C), (V, C), (N,) -> (N,) in float32.

    The logits are made `chunk` rows at a time, and again in the backward pass; only the last chunk's are kept, since
    it comes first on the way back. So the extra memory is a few chunks of logits, however many rows there are.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        logits = None
        for i in range(0, len(hidden), chunk):
            logits = F.linear(hidden[i : i + chunk], weight).float()
            own = logits.gather(1, targets[i : i + chunk, None])
            nll[i : i + chunk] = logits.logsumexp(-1) - own.squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, logits)
        ctx.chunk = chunk
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nll):
        hidden, weight, targets, logits = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for i in reversed(range(0, len(hidden), ctx.chunk)):
            rows = slice(i, i + ctx.chunk)
            if logits is None:
                logits = F.linear(hidden[rows], weight).float()
            grad = logits.softmax(-1)  # d nll / d logits = softmax - one-hot(target)
            logits = None
            grad[torch.arange(len(grad), device=grad.device), targets[rows]] -= 1
            grad = grad.mul_(grad_nll[rows, None]).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is None:
                grad_weight = (grad.T @ hidden[rows]).float()  # summed in float32 over the chunks
            else:
                grad_weight += grad.T @ hidden[rows]
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tie_word_embeddings:  # tied: no second module, hence nothing that sharding could tear apart
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def init_weights(self, seed, std=0.02):
        """Matrices from N(0, 0.02), norms 1, biases 0: a pure function of `seed`. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        return self

    def flops(self, tokens, scored, pairs):
        """Floating-point operations of a training step: 6 for every weight that multiplies a token (forward 2, back 4).

        tokens go through the blocks, `scored` positions through the head, and `pairs` of a query and a key that it
        sees, 12 * H * D each and layer, are attention's two products. Of the experts those count that a token visits.
        What activation checkpointing computes again is no progress and does not count (arXiv 2204.02311, appendix B).
        """
        c, weights = self.config, 0
        for name, parameter in self.model.layers.named_parameters():
            if parameter.dim() > 1:
                weights += parameter.numel() * (c.num_experts_per_tok / c.num_experts if ".experts." in name else 1)
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        return 6 * (weights * int(tokens) + c.vocab_size * c.hidden_size * int(scored)) + attention * int(pairs)

    def forward(self, ids, targets=None, *, positions=None, attention=None, cache=None, rows=None):
        """ids (B, T) int64 -> logits (B, T, V), or with `targets` the negative log-likelihood (B, T) in float32.

        targets    (B, T): position i is scored on targets[:, i] (an autoregressive caller shifts, a diffusion caller
                   does not); where it is -100 the result is 0 and no logits are computed.
        positions  (B, T): for RoPE and the cache; default 0..T-1.
        attention  "causal", "full", "block", or bool (broadcastable to B, 1, T, S), True = may be seen, or a BlockMask
                   of flex_attention; default: the family's own.
        cache      a Cache: keys and values are written at `positions`, and older ones are seen.
        rows       (B,) or (B, R): return logits (B, 1 or R, V) of these positions of each sequence only.
        """
        B, T = ids.shape
        attention = self.config.attention if attention is None else attention
        if positions is None:
            positions = torch.arange(T, device=ids.device)[None]
        keys = positions
        if cache is not None:
            positions = positions.expand(B, T)
            cache.positions, cache.end = positions, int(positions.max()) + 1
            keys = torch.arange(cache.end, device=ids.device)[None]
        mask, causal = attention, False
        if isinstance(attention, str):
            causal = attention == "causal" and cache is None  # the index order is the order of positions
            mask = None if causal else attention_mask(attention, positions, keys, self.config.block_length)
        x = self.model.embed_tokens(ids)  # (B, T, C)
        freq, scale = rope_frequencies(self.config, ids.device)
        angles = (positions[..., None].float() * freq)[:, None].repeat(1, 1, 1, 2)  # (B or 1, 1, T, D_rotated)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        for block in self.model.layers:
            x = block(x, cos, sin, mask, causal, cache)
        if rows is not None:
            x = x[torch.arange(B, device=x.device)[:, None], rows.view(B, -1)]  # (B, 1 or R, C)
        x = self.model.norm(x)
        head = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        if targets is None:
            return F.linear(x, head)
        scored = (targets != -100).flatten().nonzero().squeeze(1)  # (N,)
        chunk = max(1, 2**26 // self.config.vocab_size)  # 64 M logits: 256 MiB in float32
        nll = LinearNLL.apply(x.flatten(0, 1)[scored], head, targets.flatten()[scored], chunk)
        return torch.zeros(B, T, device=x.device).masked_scatter(targets != -100, nll)


# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token: for the samplers of eval.py and diffusion.py


def check_sampling(config, prompts, max_new_tokens, temperature, top_p, top_k):
    """Raises InputError for a value out of range, and for a prompt that is empty or has an id the model has not."""
    for key, given, fine in (
        ("temperature", temperature, temperature >= 0), ("top_p", top_p, 0 < top_p <= 1), ("top_k", top_k, top_k >= 0),
        ("max_new_tokens", max_new_tokens, max_new_tokens > 0),
    ):  # fmt: skip
        if not fine:
            raise InputError(f"{key} = {given}: out of range (python eval.py --help says what it means)")
    for number, prompt in enumerate(prompts):
        if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(f"prompt {number} is empty or has an id outside the vocabulary of {config.vocab_size}")


def next_token(logits, u, temperature, top_p, top_k):
    """logits (B, V), uniforms u (B,) -> ids (B,): inverse CDF over ids in their order; temperature 0: the likeliest.

    As in transformers: temperature, then top_k, then top_p of what is left (with the id that crosses it). In float32,
    with float64 logits in float64. Raises InputError for logits that are not finite.
    """
    if temperature == 0:
        best, token = logits.max(-1)
    else:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        p = torch.softmax(logits / temperature, -1)
        if top_k or top_p < 1:
            p = p.masked_fill(p < least_likely(p, top_p, top_k), 0)
        cdf = p.cumsum(-1, dtype=torch.float64)
        best = cdf[:, -1]
        # the first id whose cdf exceeds u: so its probability is not 0
        token = torch.searchsorted(cdf, (u * best)[:, None], right=True).squeeze(1)
    if not torch.isfinite(best).all():
        raise InputError("the model's logits are not finite, nothing can be sampled from it")
    return token


def least_likely(p, top_p, top_k):
    """The smallest probability that may still be sampled, (B, 1)."""
    likeliest = p.topk(min(top_k or 1024, p.shape[-1])).values  # falling
    if not top_k and (likeliest.sum(-1) < top_p).any():  # rarely do so few not hold top_p: only then sort all of them
        likeliest = p.sort(descending=True).values
    mass = likeliest.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:] if top_k else 1.0
    return likeliest.masked_fill(mass - likeliest >= top_p * total, torch.inf).amin(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

LLADA_NAMES = {  # ours -> LLaDA-8B's (OLMo style): note ff_proj, the branch under the SiLU, and the two ff_out
    "lm_head": "model.transformer.ff_out",
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
LLADA2_NAMES = {
    "model.embed_tokens": "model.word_embeddings",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "self_attn.o_proj": "attention.dense",
}


def disk_pieces(config, name):
    """Where our parameter `name` lies on disk: a list of (tensor on disk, its rows, index into our parameter).

    Most are one whole tensor of the same name: rows and index None. LLaDA2 keeps q, k, v as the rows of one tensor;
    experts, which we stack, are a tensor each. Both directions, `load` and `save`, go through this one function.
    """
    if ".mlp.experts." in name:
        prefix, matrix = name.split(".experts.")
        return [(f"{prefix}.experts.{e}.{matrix}.weight", None, e) for e in range(config.num_experts)]
    if config.model_type == "llada2_moe" and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
        prefix, rest = name.split(".self_attn.")
        q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        rows = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}[rest[0]]
        return [(f"{prefix}.attention.query_key_value.{rest.split('.')[1]}", rows, None)]
    names = {"llada": LLADA_NAMES, "llada2_moe": LLADA2_NAMES}.get(config.model_type, {})
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return [(name, None, None)]


def local_folder(path_or_repo_id, weights=True):
    """A folder as it is; anything else is a repository on the Hugging Face hub, fetched into (or found in) its cache.

    Only *.json, *.safetensors and tokenizer files are fetched: no code, no pickles; without `weights` only what
    read_config reads. HF_HUB_OFFLINE=1 is honoured.
    """
    if os.path.isdir(path_or_repo_id):
        return Path(path_or_repo_id)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
        patterns = patterns if weights else ["config.json", "generation_config.json"]
        return Path(snapshot_download(str(path_or_repo_id), allow_patterns=patterns))
    except Exception as error:  # the hub's many errors (no such name, offline, no access) mean one thing here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path_or_repo_id}: neither a folder nor a hub repository within reach ({reason})") from None


def weight_files(folder):
    """{tensor name: path of the safetensors file that holds it}, from the index or the single file."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InputError(f"{folder}: no model.safetensors and no index of shards (pickles are not read)")
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise InputError(f"{index}: no weight_map")
    for name, shard in found.items():
        # a downloaded index must not open files outside its folder
        if not isinstance(shard, str) or PurePath(shard).name != shard or "\\" in shard or shard in (".", ".."):
            raise InputError(f"{index}: {name} lies in {shard!r}, which is not a plain file name")
        if not (folder / shard).exists():
            raise InputError(f"{folder / shard}: missing, but model.safetensors.index.json names it")
    return {name: folder / shard for name, shard in found.items()}


def open_weights(path):
    """safe_open, with a one-line error when the file is truncated or not safetensors at all."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); download or write it again") from None


def write_weights(tensors, path):
    """{name: tensor} -> a safetensors file. A full disk is an InputError, like anything that the user can put right."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None


def local_rows(parameter):
    """The part of a parameter that this process holds, and its first and last row: all of it unless FSDP cut it."""
    if not isinstance(parameter, DTensor):
        return parameter, 0, len(parameter)
    local, mesh = parameter.to_local(), parameter.device_mesh
    first = min(mesh.get_local_rank() * -(-len(parameter) // mesh.size()), len(parameter))  # FSDP2 cuts like chunk()
    return local, first, first + len(local)


@torch.no_grad()
def load_weights(model, folder):
    """Fill `model` from the folder's safetensors, one tensor in memory at a time, cast to the parameters' dtype.
    A sharded model reads its own rows only.

    Raises InputError for a missing tensor, a wrong shape, or one the model has no place for (except the lm_head
    that some tied checkpoints store all the same, and RoPE tables of old ones).
    """
    config, files = model.config, weight_files(folder)
    handles, used = {}, set()
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        local, first, last = local_rows(parameter)
        for disk_name, rows, index in disk_pieces(config, name):
            if disk_name not in files:
                raise InputError(f"{folder}: the tensor {disk_name} is missing ({config.model_type} needs it)")
            path = files[disk_name]
            if path not in handles:
                handles[path] = open_weights(path)
            try:
                stored = handles[path].get_slice(disk_name)
            except SafetensorError as error:
                raise InputError(f"{path}: the tensor {disk_name} is not in it ({error})") from None
            if stored.get_dtype() not in ("F64", "F32", "BF16", "F16"):
                raise InputError(f"{path}: {disk_name} is {stored.get_dtype()}; only float weights are read")
            used.add(disk_name)
            expected = list(parameter.shape if index is None else parameter.shape[1:])
            if rows is not None:  # a part of a fused tensor
                expected[0] = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
            if stored.get_shape() != expected:
                raise InputError(f"{path}: {disk_name} has shape {stored.get_shape()}, config.json asks for {expected}")
            if index is None and last > first:
                offset = rows.start if rows else 0
                local.copy_(stored[offset + first : offset + last])
            elif index is not None and first <= index < last:
                local[index - first].copy_(stored[:])
    known = ("rotary_emb.inv_freq", *(("lm_head.weight", "ff_out.weight") if config.tie_word_embeddings else ()))
    extra = sorted(name for name in files if name not in used and not name.endswith(known))
    if extra:
        raise InputError(f"{folder}: a {config.model_type} model has no place for {extra[0]} ({len(extra)} such)")


def load(path_or_repo_id, device="cpu", dtype=torch.float32, shard=None):
    """A checkpoint of any family in FAMILIES -> Transformer in eval mode, parameters of `dtype` on `device`.

    shard: called with the model while it has no memory yet, to cut it over processes (train.py's FSDP).
    Raises InputError: no such folder or repository, unknown model_type, a missing, truncated or misshapen tensor.
    """
    folder = local_folder(path_or_repo_id)
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: memory is taken once, where it is needed
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to(dtype)))  # parameters only: the router's bias stays float32
    if shard is not None:
        shard(model)
    model = model.to_empty(device=device)
    load_weights(model, folder)
    return model.eval()


TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template*", "generation_config.json")  # fmt: skip


@torch.no_grad()
def save(model, tokenizer_or_source_folder, out_folder, max_shard_bytes=5 * 10**9):
    """Write an ordinary Hugging Face folder: config.json, safetensors under the family's own names, tokenizer files.

    The dtype is the parameters'. Training keeps float32, and so do its checkpoints: at a learning rate of 1e-5 most
    updates are smaller than bfloat16's spacing, and differences of checkpoints (RRT) would be rounding noise.
    A sharded model is gathered one parameter at a time: then every process must call this, and process 0 writes.
    """
    source = local_folder(getattr(tokenizer_or_source_folder, "folder", tokenizer_or_source_folder))
    config = model.config
    writes = not (dist.is_initialized() and dist.get_rank())
    stored = [*model.named_parameters(), *model.named_buffers()]
    plan = {}  # tensor on disk -> how many of our parameters it is made of, and its bytes
    for name, parameter in stored:
        pieces = disk_pieces(config, name)
        for disk_name, _, _ in pieces:
            count, size = plan.get(disk_name, (0, 0))
            plan[disk_name] = count + 1, size + parameter.nbytes // len(pieces)
    shards, size = [[]], 0
    for disk_name, (_, more) in plan.items():
        if size and size + more > max_shard_bytes:
            shards.append([])
            size = 0
        size += more
        shards[-1].append(disk_name)
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]  # fmt: skip
    file_of = {disk_name: file for file, names in zip(files, shards, strict=True) for disk_name in names}

    with whole_folder(out_folder, "*.safetensors") if writes else nullcontext() as out:
        parts, ready = {}, {file: {} for file in files}
        for name, parameter in stored:
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            for disk_name, _, index in disk_pieces(config, name) if writes else []:
                parts.setdefault(disk_name, []).append((tensor if index is None else tensor[index]).cpu())
                if len(parts[disk_name]) < plan[disk_name][0]:
                    continue
                file, pieces = file_of[disk_name], parts.pop(disk_name)  # q, k, v come in the order of their rows
                ready[file][disk_name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
                if len(ready[file]) == len(shards[files.index(file)]):
                    write_weights(ready.pop(file), out / file)
        if writes:
            if len(files) > 1:
                index = {"metadata": {"total_size": sum(size for _, size in plan.values())}, "weight_map": file_of}
                write_json(out / "model.safetensors.index.json", index)
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            raw = {k: v for k, v in config.raw.items() if k not in ("torch_dtype", "dtype")}
            write_json(out / "config.json", {**raw, "dtype" if "rope_parameters" in raw else "torch_dtype": dtype})
            for pattern in TOKENIZER_FILES:
                for path in source.glob(pattern):
                    if path.is_file():
                        shutil.copyfile(path, out / path.name)
    if dist.is_initialized():
        dist.barrier()
