"""Model families: config.json in its dialects -> one dataclass, and what each family calls its tensors. No torch."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from plumbing.config import InputError, read_json


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
# Names and places of the tensors on disk


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

# ---------------------------------------------------------------------------------------------------------------------
# The folder


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
