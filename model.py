"""The network: one transformer for Qwen2, Qwen2.5, Qwen3, Qwen3-MoE, Llama 3 and SmolLM2, and for
the masked-diffusion models LLaDA-8B and LLaDA2, which are without a causal mask.

    import model
    student = model.load("Qwen/Qwen3-0.6B")   # or a local folder; config.json names the family
    logits = student(ids)                     # (B, T) -> (B, T, V)
    nll = student(ids, targets=targets)       # (B, T) -> (B, T), without ever holding all logits
    model.save(student, "tokenizer/folder", "out")

The module tree has the parameter names of Hugging Face's Llama, so most checkpoints load without any
conversion; hf/families.py knows the dialects of config.json and the families that name or cut their
tensors differently, hf/weights.py reads and writes the files.

Shapes: B batch, T tokens, S cached tokens, C hidden_size, H query heads, K key/value heads,
D head_dim, F MLP width, V vocabulary, E experts, k experts of a token, N rows of a flattened batch.
Next: diffusion.py.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf.families import local_folder, read_config
from hf.rope import stretched
from hf.weights import load_weights, save

__all__ = ["Transformer", "load", "read_config", "save"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # float32 statistics, cast back, then the weight: the order these models were trained in
        y = x.float()
        square = y.pow(2).mean(-1, keepdim=True)  # unlike LayerNorm it subtracts no mean
        y = y * torch.rsqrt(square + self.eps)
        return self.weight * y.to(x.dtype)


# ------------------------------------------------------------------------------------------------
# Positions: rotary embeddings (RoPE, arXiv 2104.09864)


def rope_frequencies(config, device=None):
    """Frequency of each rotated pair, (D_rotated / 2,) float32, and the factor on cos and sin."""
    dim = int(config.head_dim * config.partial_rotary_factor)  # D_rotated
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / config.rope_theta ** (pairs / dim)  # from a turn in 6 tokens to one in 6 theta
    return stretched(freq, config)


def rotate(x, cos, sin):
    """RoPE on the first D_rotated dims of x (B, heads, T, D): pairs (i, i + half), in float32."""
    dim = cos.shape[-1]
    y = x[..., :dim].float()  # bfloat16 angles would blur positions a few hundred tokens away
    first, second = y.chunk(2, dim=-1)  # halves, not neighbours: Hugging Face's order of rows
    turned = torch.cat((-second, first), dim=-1)
    y = (y * cos + turned * sin).to(x.dtype)
    if dim == x.shape[-1]:
        return y
    return torch.cat((y, x[..., dim:]), dim=-1)  # LLaDA2 rotates a part of each head only


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """x (B, T, C) -> x @ weight.T + bias, (B, T, N).

    When several sequences are decoded on a CPU the product is turned round, weight @ x.T: with the
    long side first it is faster, the head 1.9 to 2.9 times (docs/LOG.md). Small ones gain nothing.
    """
    decoding = x.shape[1] == 1 < x.shape[0] and not torch.is_grad_enabled()
    if not decoding or x.device.type != "cpu" or weight.numel() < 2**18:
        return F.linear(x, weight, bias)
    y = (weight @ x[:, 0].T).T[:, None]  # not copied: the next product wants it this way round
    return y if bias is None else y + bias


# ------------------------------------------------------------------------------------------------
# Attention


def attention_mask(pattern, queries, keys, block_length):
    """May a query see a key? Positions queries (B, T), keys (B or 1, S) -> bool (B, 1, T, S)."""
    if pattern == "full":
        return None  # every key: no mask is needed
    queries = queries[:, None, :, None]  # (B, 1, T, 1)
    keys = keys[:, None, None, :]  # (B or 1, 1, 1, S)
    if pattern == "block":  # the grid of blocks starts at position 0 of the sequence
        queries, keys = queries // block_length, keys // block_length
    return keys <= queries


TILE = 16  # positions; a CPU's kernels work on multiples of it


def whole_tiles(length):
    return -(-length // TILE) * TILE


class Cache:
    """Keys and values of up to `length` positions: 2 * layers * B * K * length * D numbers.

    model(ids, positions=p, cache=cache) writes at the positions p and attends to what the family's
    pattern allows. So right-padded prompts need no mask: what padding wrote at later positions is
    overwritten before anything may see it.
    """

    def __init__(self, config, batch, length):
        self.batch, self.length = batch, length
        # filled by the first keys: only they know the dtype and device, which may be autocast's
        self.k = [None] * config.num_hidden_layers
        self.v = [None] * config.num_hidden_layers
        # of the forward pass under way; Transformer.forward sets them
        self.positions, self.end = None, 0
        # the rows of the batch that a forward pass is about; the caller may set it
        self.rows = slice(None)

    def update(self, layer, k, v):
        """Write k, v (B, K, T, D) at self.positions -> all keys and values so far, (B, K, S, D)."""
        if self.k[layer] is None:
            shape = (self.batch, k.shape[1], self.length, k.shape[3])
            self.k[layer] = k.new_zeros(shape)
            self.v[layer] = v.new_zeros(shape)
        keys = self.k[layer][self.rows]  # views: what is written is in the cache itself
        values = self.v[layer][self.rows]
        # each sequence has its own positions (scatter_ would be a hundred times slower in bfloat16)
        row = torch.arange(len(k), device=k.device)[:, None]
        keys.transpose(1, 2)[row, self.positions] = k.transpose(1, 2)
        values.transpose(1, 2)[row, self.positions] = v.transpose(1, 2)
        return keys[:, :, : self.end], values[:, :, : self.end]  # no work on what is still empty

    def keep_rows(self, rows):
        """Drop every sequence of the batch but `rows` (n,), as others have ended."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]


@functools.cache
def flex():
    """Attention that computes only the blocks that a BlockMask lists."""
    from torch.nn.attention.flex_attention import flex_attention

    # uncompiled it computes all T x T scores, which only a test on a CPU can afford
    return torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention


class Attention(nn.Module):
    """Grouped-query attention: each key/value head serves H / K query heads."""

    def __init__(self, config, layer):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = D
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=config.o_bias)  # H * D need not be C (Qwen3)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, causal, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if self.qk_norm:  # over D, before RoPE: bounds the scores, whatever the weights grow to
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(k.transpose(1, 2), cos, sin)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        y = self.attend(q, k, v, mask, causal)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, mask, causal):
        """softmax(q k^T / sqrt(D) + mask) v by the kernel that suits the mask."""
        B, H, T, D = q.shape
        K = k.shape[1]
        if callable(mask):
            return mask(q, k, v)
        if mask is not None and not isinstance(mask, torch.Tensor):  # a BlockMask
            return flex()(q, k, v, block_mask=mask, enable_gqa=H != K)
        kernel = F.scaled_dot_product_attention
        if T > 1:
            return kernel(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)
        # decoding: the heads of a group pose as its tokens, so that no key or value is copied
        group = q.reshape(B, K, H // K, D)  # query head h belongs to key head h // (H / K)
        return kernel(group, k, v, attn_mask=mask).reshape(B, H, T, D)


# ------------------------------------------------------------------------------------------------
# MLP and mixture of experts


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config, width):
        super().__init__()
        C, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = Linear(C, width, bias=bias)
        self.up_proj = Linear(C, width, bias=bias)
        self.down_proj = Linear(width, C, bias=bias)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x))  # (B, T, F): lets through, or not, what up_proj found
        return self.down_proj(gate * self.up_proj(x))


class Router(nn.Module):
    """Which experts a token visits: (N, C) -> their weights and numbers, both (N, k). In float32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.sigmoid_router:
            # balances the load: it steers which experts are chosen, never their weight, and is a
            # buffer because no gradient reaches it
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("expert_bias", bias)

    def forward(self, x):
        # the meta device, on which plumbing/memory.py runs this, has no autocast
        device = "cpu" if x.is_meta else x.device.type
        # a rounding error here is no small error: it sends a token to another expert
        with torch.autocast(device, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (N, E)
        return self.by_sigmoid(logits) if self.config.sigmoid_router else self.by_softmax(logits)

    def by_softmax(self, logits):
        """Qwen3-MoE: the k most probable experts."""
        c = self.config
        weights, experts = logits.softmax(-1).topk(c.num_experts_per_tok, dim=-1)  # (N, k)
        if c.norm_topk_prob:  # the experts that were not chosen leave no gap
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts

    def by_sigmoid(self, logits):
        """LLaDA2: the best groups of experts first, then the best experts in them (DeepSeek-V3's)."""
        c = self.config
        scores = logits.sigmoid()  # (N, E): each expert is judged alone, they do not compete
        choice = scores + self.expert_bias
        choice = choice.unflatten(1, (c.n_group, -1))  # (N, groups, E / groups)
        group = choice.topk(2, dim=-1).values.sum(-1)  # a group is worth its two best experts
        best = group.topk(c.topk_group, dim=-1).indices  # (N, topk_group)
        closed = torch.ones_like(group, dtype=torch.bool)
        closed.scatter_(1, best, False)
        choice = choice.masked_fill(closed[..., None], -torch.inf)
        experts = choice.flatten(1).topk(c.num_experts_per_tok, dim=-1).indices  # (N, k)
        weights = scores.gather(1, experts)  # without the bias
        if c.num_experts_per_tok > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts


def grouped_linear(x, weight, ends):
    """x (N, C) sorted by expert, weight (E, F, C), ends (E,) int32: where each ends -> (N, F)."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)  # F.grouped_mm takes no float64
    if torch.compiler.is_compiling():
        kinds = (torch.bfloat16,)  # all that torch.compile has a kernel for
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if hasattr(F, "grouped_mm") and x.dtype in kinds and aligned:  # torch >= 2.10
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.tensor_split(ends[:-1].long().cpu())  # tensor_split wants its ends on the CPU
    pairs = zip(parts, weight, strict=True)  # an expert without rows gets an empty part
    return torch.cat([rows @ w.T for rows, w in pairs])


class Experts(nn.Module):
    """All experts' SwiGLU weights, stacked: three grouped products instead of 3 * E small ones."""

    def __init__(self, config):
        super().__init__()
        E, C, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, width, C))
        self.up_proj = nn.Parameter(torch.empty(E, width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))

    def forward(self, x, ends):
        gate = grouped_linear(x, self.gate_proj, ends)
        up = grouped_linear(x, self.up_proj, ends)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends)


class MoE(nn.Module):
    """Every token visits k of E experts and, in LLaDA2, the shared expert as well."""

    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = MLP(config, width)

    def forward(self, x):
        rows = x.flatten(0, -2)  # (N, C)
        weights, experts = self.gate(rows)  # (N, k) each
        k = experts.shape[1]
        # sort the N * k pairs of a row and an expert by expert: each expert's rows lie together
        numbers, order = experts.flatten().sort(stable=True)
        every = torch.arange(len(self.experts.gate_proj), device=x.device)
        ends = torch.searchsorted(numbers, every, right=True, out_int32=True)  # (E,)
        pairs = self.experts(rows[order // k], ends)  # (N * k, C)
        # undo the sorting, then sum: adding rows where they belong needs atomics on a GPU, and the
        # order of rounding would be random
        pairs = torch.empty_like(pairs).index_copy(0, order, pairs)
        pairs = pairs.unflatten(0, (-1, k))  # (N, k, C)
        out = (pairs * weights[..., None].to(x.dtype)).sum(1).view_as(x)
        if self.shared_experts is not None:  # knowledge that every token needs
            out = out + self.shared_experts(x)
        return out


# ------------------------------------------------------------------------------------------------
# The whole


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added to the residual stream."""

    checkpoint_activations = False  # True: keep only the block's input, recompute the rest backward

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = layer in config.moe_layers  # LLaDA2's first layer is dense
        self.mlp = MoE(config) if sparse else MLP(config, config.intermediate_size)

    def forward(self, *inputs):
        # inside the block, not around it, so that torch.compile and FSDP see it as part of the block
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return self.compute(*inputs)

    def compute(self, x, cos, sin, mask, causal, cache):
        y = self.input_layernorm(x)
        x = x + self.self_attn(y, cos, sin, mask, causal, cache)
        y = self.post_attention_layernorm(x)
        return x + self.mlp(y)


class LinearNLL(torch.autograd.Function):
    """-log softmax(hidden @ weight.T)[target]: (N, C), (V, C), (N,) -> (N,) in float32.

    The logits are made `chunk` rows at a time, and again in the backward pass, which begins with
    the last chunk: only that one is kept, so the extra memory is a few chunks, whatever N is. Up to
    FEW chunks are all kept, which saves one matrix product of four.
    """

    FEW = 4

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_sum = torch.empty_like(nll)
        kept = []
        few = len(hidden) <= LinearNLL.FEW * chunk
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = F.linear(hidden[rows], weight).float()
            own = logits.gather(1, targets[rows, None])
            log_sum[rows] = logits.logsumexp(-1)  # float32: bfloat16 has 3 digits
            nll[rows] = log_sum[rows] - own.squeeze(1)
            kept = [*kept, logits] if few else [logits]
        ctx.save_for_backward(hidden, weight, targets, log_sum, *kept)
        ctx.chunk = chunk
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nll):
        hidden, weight, targets, log_sum, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        for i in reversed(range(0, len(hidden), ctx.chunk)):
            rows = slice(i, i + ctx.chunk)
            logits = kept.pop() if kept else F.linear(hidden[rows], weight).float()
            # d nll / d logits = softmax - one-hot(target); each pass over V columns costs
            grad = (logits - log_sum[rows, None]).exp_()
            del logits  # let go of this chunk before the next one is made
            every = torch.arange(len(grad), device=grad.device)
            grad[every, targets[rows]] -= 1
            grad = grad.mul_(grad_nll[rows, None]).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])  # in place: no list of chunks to join
            if grad_weight is None:
                grad_weight = (grad.T @ hidden[rows]).float()  # the chunks are summed in float32
            elif grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[rows])
            else:
                grad_weight += grad.T @ hidden[rows]
        if grad_weight is None:  # no rows: a gradient of zero, not none at all, for the optimizer
            return grad_hidden, torch.zeros_like(weight), None, None
        return grad_hidden, grad_weight.to(weight.dtype), None, None


@torch.no_grad()
def nll_and_entropy(hidden, weight, targets, chunk):
    """LinearNLL's values, and from the same logits the entropy of each row: two (N,) float32, nats.

    For recording only, without a gradient: entropy beside log-probability costs no second pass.
    """
    nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(nll)
    for i in range(0, len(hidden), chunk):
        rows = slice(i, i + chunk)
        logits = F.linear(hidden[rows], weight).float()
        total = logits.logsumexp(-1)
        nll[rows] = total - logits.gather(1, targets[rows, None]).squeeze(1)
        entropy[rows] = total - (logits.softmax(-1) * logits).sum(-1)  # -sum p log p
    return nll, entropy


class Body(nn.Module):
    """All but the head: a module only because names in checkpoints begin with "model."."""

    def __init__(self, config):
        super().__init__()
        # as in the public code, the embedding of padding is not trained (that of LLaDA-8B is)
        pad = config.pad_token_id
        is_trained = pad is None or config.model_type == "llada" or not 0 <= pad < config.vocab_size
        padding = None if is_trained else pad
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The student. config: hf.families.Config; parameters are created, not initialised."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tie_word_embeddings:  # tied: no second module that sharding could tear apart
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def init_weights(self, seed, std=0.02):
        """Matrices from N(0, std), norms 1, biases 0: a pure function of `seed`. Returns self."""
        generator = torch.Generator().manual_seed(seed)  # its own: the global one may have moved
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        return self

    def forward(
        self,
        ids,
        targets=None,
        *,
        positions=None,
        attention=None,
        cache=None,
        logits_at=None,
        entropy=False,
    ):
        """ids (B, T) int64 -> logits (B, T, V), or with `targets` the NLL (B, T) in float32.

        targets    (B, T): position i is scored on targets[:, i] (an autoregressive caller shifts, a
                   diffusion caller does not). Where it is -100 the NLL is 0 and no logits are made.
        positions  (B, T), for RoPE and the cache; default 0 .. T - 1.
        attention  "causal", "full", "block", a bool mask that broadcasts to (B, 1, T, S), True
                   where a key is seen, flex_attention's BlockMask, or a function of q, k, v
                   that does it all; default: the family's own.
        cache      a Cache: keys and values are written at `positions`, and earlier ones are seen.
        logits_at  (B,) or (B, R): only the logits of these positions, (B, 1 or R, V).
        entropy    with targets: -> (NLL, entropy of the distribution in nats), both (B, T), without
                   a gradient.
        """
        B, T = ids.shape
        if positions is None:
            positions = torch.arange(T, device=ids.device)[None]
        mask, causal = self.who_sees_whom(B, T, positions, attention, cache)
        freq, scale = rope_frequencies(self.config, ids.device)
        angles = positions[..., None].float() * freq  # (B or 1, T, D_rotated / 2)
        angles = angles[:, None].repeat(1, 1, 1, 2)  # for both members of a pair, and all heads
        cos, sin = angles.cos() * scale, angles.sin() * scale  # once for all layers

        x = self.model.embed_tokens(ids)  # (B, T, C)
        for block in self.model.layers:
            x = block(x, cos, sin, mask, causal, cache)
        if logits_at is not None:  # before the head: its V columns are what costs
            every = torch.arange(B, device=x.device)
            x = x[every[:, None], logits_at.view(B, -1)]  # (B, 1 or R, C)
        x = self.model.norm(x)  # the residual stream itself was never normalised

        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight  # (V, C)
        if targets is None:
            return linear(x, head)
        scored = targets != -100
        at = scored.nonzero(as_tuple=True)  # the N scored positions; once, since a GPU waits here
        chunk = max(1, 2**26 // self.config.vocab_size)  # 64 M logits are 256 MiB in float32
        empty = torch.zeros(B, T, device=x.device)
        if entropy:
            found = nll_and_entropy(x[at], head, targets[at], chunk)
            return tuple(empty.masked_scatter(scored, values) for values in found)
        nll = LinearNLL.apply(x[at], head, targets[at], chunk)  # (N,)
        return empty.masked_scatter(scored, nll)

    def who_sees_whom(self, B, T, positions, attention, cache):
        """-> (mask or None, use the kernel's causal mask?). Tells the cache where to write."""
        keys = positions
        pattern = self.config.attention if attention is None else attention
        if cache is not None:
            cache.positions = positions.expand(B, T)
            cache.end = int(positions.max()) + 1  # the one number that the CPU needs to know
            if pattern == "causal":  # whole tiles, so that a row is summed in one order, whatever
                cache.end = min(whole_tiles(cache.end), cache.length)  # the others' lengths are
            keys = torch.arange(cache.end, device=positions.device)[None]
        if not isinstance(pattern, str):  # the caller's own mask
            return pattern, False
        if pattern == "causal" and cache is None:
            return None, True  # the index order is the order of positions
        return attention_mask(pattern, positions, keys, self.config.block_length), False


def load(path_or_repo_id, device="cpu", dtype=torch.float32, shard=None):
    """A Hugging Face folder or hub id -> Transformer in eval mode, its parameters of `dtype`.

    shard: is called with the model while it has no memory yet, to cut it over processes (FSDP).
    Raises InputError: no such folder or repository, a family or feature that is not supported, a
    missing, truncated or misshapen tensor.
    """
    folder = local_folder(path_or_repo_id)
    model = build(read_config(folder), device, dtype, shard)
    load_weights(model, folder)
    return model


def build(config, device="cpu", dtype=torch.float32, shard=None):
    """Transformer in eval mode with memory for its weights, which hold no values yet."""
    with torch.device("meta"):  # shapes only: memory is taken once, where it is needed
        model = Transformer(config)
    for module in model.modules():
        # parameters only: the router's bias is a buffer and stays float32
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to(dtype)))
    if shard is not None:
        shard(model)
    return model.to_empty(device=device).eval()  # with FSDP each process takes memory for its part
