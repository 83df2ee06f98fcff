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

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf.families import local_folder, read_config
from hf.weights import load_weights, save

__all__ = ["Transformer", "load", "read_config", "save"]

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: config.json in its dialects -> one dataclass














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

    def forward(self, ids, targets=None, *, positions=None, attention=None, cache=None, logits_at=None):
        """ids (B, T) int64 -> logits (B, T, V), or with `targets` the negative log-likelihood (B, T) in float32.

        targets    (B, T): position i is scored on targets[:, i] (an autoregressive caller shifts, a diffusion caller
                   does not); where it is -100 the result is 0 and no logits are computed.
        positions  (B, T): for RoPE and the cache; default 0..T-1.
        attention  "causal", "full", "block", or bool (broadcastable to B, 1, T, S), True = may be seen, or a BlockMask
                   of flex_attention; default: the family's own.
        cache      a Cache: keys and values are written at `positions`, and older ones are seen.
        logits_at  (B,) or (B, R): return logits (B, 1 or R, V) of these positions of each sequence only.
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
        if logits_at is not None:
            x = x[torch.arange(B, device=x.device)[:, None], logits_at.view(B, -1)]  # (B, 1 or R, C)
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








# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

















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




