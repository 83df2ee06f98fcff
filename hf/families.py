"""Model families: config.json in its dialects -> one dataclass, and the names of a family's tensors.

    config = read_config("Qwen3-0.6B/")     # a folder; local_folder("Qwen/Qwen3-0.6B") finds one
    disk_pieces(config, "model.layers.0.self_attn.q_proj.weight")

A key of config.json that would change the logits is either computed, as transformers does, or
refused: a checkpoint that looks right and computes something else is the worst student. No torch
here, since report.py and select.py need only the shapes. Next: hf/rope.py.
"""

import os
from dataclasses import dataclass, field, fields
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
    head_dim: int  # in Qwen3 it is not hidden_size / num_attention_heads
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None  # of a stretched context: hf/rope.py
    max_position_embeddings: int = 0
    partial_rotary_factor: float = 1.0  # LLaDA2 and Ling rotate the first half of every head only
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over D on queries and keys, before RoPE
    attention: str = "causal"  # or "full" (LLaDA-8B), or "block": causal over blocks (LLaDA2)
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
    sigmoid_router: bool = False  # LLaDA2 and Ling; Qwen3-MoE's is a softmax
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    # of other layers, which are not read: they predict tokens further ahead (Ling)
    num_nextn_predict_layers: int = 0
    raw: dict = field(default_factory=dict, repr=False)  # config.json as it was, for `save`

    @property
    def is_diffusion(self):
        return self.attention != "causal"


# What transformers 5 assumes where config.json is silent
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 4},
}
# LLaDA2 in dFactory's training format, whose only difference is the stacked experts
ALIASES = {"llada2_moe_veomni": "llada2_moe"}
# of each kind of stretched RoPE: the keys that it cannot do without
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def read_config(folder):
    """`folder`/config.json -> Config.

    Raises InputError for a family or a feature that model.py does not compute, a key that is
    missing or of the wrong type, and a folder that holds an adapter instead of a model.
    """
    path = Path(folder) / "config.json"
    if (Path(folder) / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: a LoRA adapter (adapter_config.json), not a whole model; merge it into its "
            "base first (peft: merge_and_unload(), then save_pretrained)"
        )
    raw = read_json(path)
    family = ALIASES.get(raw.get("model_type"), raw.get("model_type"))
    if not isinstance(family, str) or family not in READERS:
        known = ", ".join(READERS)
        raise InputError(f"{path}: model_type {family!r} is not supported (supported: {known})")
    try:
        config = READERS[family](raw, family)
        config.raw = raw
        config.eos_token_ids = _ends(folder, raw)
        if config.is_diffusion and not config.eos_token_ids:
            # LLaDA2's config.json names its end of text as padding only
            config.eos_token_ids = _as_list(config.pad_token_id)
        _check_values(config)
        _check_features(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except KeyError as missing:
        raise InputError(f"{path}: the key {missing} is missing") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: a value of the wrong type ({error})") from None
    return config


# ------------------------------------------------------------------------------------------------
# The dialects


def _read_llama_like(raw, family):
    """Llama, Qwen2, Qwen3, Qwen3-MoE: the families that transformers has."""
    default = DEFAULTS[family]
    bias = _flag(raw, "attention_bias")
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads", default["num_key_value_heads"])
    head_dim = raw.get("head_dim") or default.get("head_dim") or raw["hidden_size"] // heads
    longest = raw.get("max_position_embeddings", default["max_position_embeddings"])
    config = Config(
        model_type=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        **_read_rope(raw),
        max_position_embeddings=longest,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        # Qwen2's biases are not for config.json to decide
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        mlp_bias=family == "llama" and _flag(raw, "mlp_bias"),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        **_special_tokens(raw),
    )
    if family == "qwen3_moe":
        _read_qwen3_experts(raw, config)
    return config


def _read_qwen3_experts(raw, config):
    _read_expert_sizes(raw, config)
    dense = raw.get("mlp_only_layers") or []
    step = raw.get("decoder_sparse_step", 1)
    layers = range(config.num_hidden_layers)
    config.moe_layers = frozenset(i for i in layers if i not in dense and (i + 1) % step == 0)
    config.norm_topk_prob = _flag(raw, "norm_topk_prob")


def _read_expert_sizes(raw, config):
    config.num_experts = raw.get("num_experts") or raw["num_local_experts"]
    config.num_experts_per_tok = raw["num_experts_per_tok"]
    config.moe_intermediate_size = raw["moe_intermediate_size"]


def _read_bailing_like(raw, family):
    """LLaDA2 and its causal sibling Ling-2 (inclusionAI's modeling files, in no release of transformers).

    Where the published versions of their configuration class disagree on a default, the key is
    required.
    """
    heads = raw["num_attention_heads"]
    config = Config(
        model_type=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw["num_key_value_heads"] or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw["rms_norm_eps"],
        **_read_rope(raw, whole_heads=False),
        max_position_embeddings=raw.get("max_position_embeddings", 16384),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=_flag(raw, "use_qkv_bias"),
        o_bias=_flag(raw, "use_bias"),
        qk_norm=_flag(raw, "use_qk_norm", True),
        **_special_tokens(raw),
        sigmoid_router=True,
    )
    first = raw.get("first_k_dense_replace", 0)
    config.moe_layers = frozenset(range(first, config.num_hidden_layers))
    if config.moe_layers:
        _read_expert_sizes(raw, config)
        config.num_shared_experts = raw.get("num_shared_experts") or 0
        config.n_group = raw["n_group"]
        config.topk_group = raw["topk_group"]
        config.routed_scaling_factor = raw["routed_scaling_factor"]
    if family == "bailing_moe_v2":
        config.num_nextn_predict_layers = raw.get("num_nextn_predict_layers") or 0
        return config
    config.attention = "block"
    config.block_length = raw.get("block_length", 32)
    if config.mask_token_id is None:
        config.mask_token_id = 156895  # <|mask|>; the released config.json does not say it
    return config


def _read_llada(raw, family):
    """LLaDA-8B: OLMo's keys."""
    heads = raw["n_heads"]
    bias = _flag(raw, "include_bias")
    return Config(
        model_type=family,
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
        tie_word_embeddings=_flag(raw, "weight_tying"),
        qkv_bias=bias or _flag(raw, "include_qkv_bias"),
        o_bias=bias,
        mlp_bias=bias,
        attention="full",
        **_special_tokens(raw) | {"mask_token_id": raw["mask_token_id"]},
    )


# A new family needs: its reader here, from the keys of its config.json; in NAMES below the tensors
# that it calls otherwise; in DEFAULTS what its configuration class assumes. Go through every key of
# that class: one that changes the logits is computed in model.py or refused in _check_features.
# Then put it beside transformers in the lists of tests/test_families.py (VALUES: its keys).
READERS = {
    "llama": _read_llama_like,
    "qwen2": _read_llama_like,
    "qwen3": _read_llama_like,
    "qwen3_moe": _read_llama_like,
    "llada": _read_llada,
    "llada2_moe": _read_bailing_like,
    "bailing_moe_v2": _read_bailing_like,
}


def _read_rope(raw, whole_heads=True):
    """-> Config's rope_theta, rope_scaling, partial_rotary_factor.

    The hub's rope_theta + rope_scaling (older files say "type") or transformers 5's
    rope_parameters. Beside each other, rope_scaling wins, as in transformers; then nothing of
    rope_parameters counts, not even its theta.
    """
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError("a RoPE of its own for each kind of layer is not supported")
    default = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} if whole_heads else {}
    known = default | raw | rope
    partial = known["partial_rotary_factor"]
    if whole_heads and partial not in (1, None):
        # transformers ignores the key in these families, which is not what the file means
        raise InputError(f"partial_rotary_factor {partial}: {raw['model_type']} rotates whole heads")
    found = {
        "rope_theta": float(known["rope_theta"]),
        "partial_rotary_factor": 1.0 if whole_heads else float(partial),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found
    scaling = {key: rope[key] for key in rope if key not in ("type", *found)}
    scaling["rope_type"] = kind
    # a few files keep it outside of rope_scaling; that one wins in transformers
    if raw.get("original_max_position_embeddings"):
        scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    _check_rope(scaling)
    return found | {"rope_scaling": scaling}


def _check_rope(rope):
    kind = rope["rope_type"]
    if kind not in ROPE_KEYS:
        known = ", ".join(ROPE_KEYS)
        raise InputError(f"rope scaling {kind!r} is not supported (supported: {known})")
    for key in ROPE_KEYS[kind]:
        if rope.get(key) is None:
            raise InputError(f"rope scaling {kind!r} needs the key {key!r}")
    for key, value in rope.items():
        if isinstance(value, str) and key != "rope_type":
            raise InputError(f"rope scaling: {key} is {value!r}: a value of the wrong type")


def _special_tokens(raw):
    keys = ("bos_token_id", "pad_token_id", "mask_token_id")
    return {key: raw.get(key) for key in keys}


def _ends(folder, raw):
    """Ids of all tokens that end a text: chat models list more in generation_config.json."""
    generation = Path(folder) / "generation_config.json"
    more = read_json(generation).get("eos_token_id") if generation.exists() else None
    return sorted({*_as_list(raw.get("eos_token_id")), *_as_list(more)})


def _as_list(value):
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _flag(raw, key, default=False):
    """A boolean; "false" as a text would be true."""
    value = raw.get(key)
    if value is None:
        return default
    if value not in (True, False):
        raise InputError(f"{key} is {value!r}: a value of the wrong type")
    return bool(value)


# ------------------------------------------------------------------------------------------------
# Checks


def _check_values(config):
    for entry in fields(Config):
        value = getattr(config, entry.name)
        number = entry.type in (int, float)
        if number and (isinstance(value, bool) or not isinstance(value, entry.type | int)):
            raise InputError(f"{entry.name} is {value!r}: a value of the wrong type")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip
    for key in sizes:
        if key == "intermediate_size" and len(config.moe_layers) == config.num_hidden_layers:
            continue  # no layer is dense
        if getattr(config, key) < 1:
            raise InputError(f"{key} is {getattr(config, key)}; must be at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    rotated = int(config.head_dim * config.partial_rotary_factor)
    if rotated % 2 or rotated > config.head_dim:
        raise InputError(f"{rotated} of {config.head_dim} dimensions of a head cannot be rotated")
    mask = config.mask_token_id
    if mask is not None and not 0 <= mask < config.vocab_size:
        raise InputError(f"mask_token_id {mask} is not one of {config.vocab_size} ids")


def _check_features(config):
    """What would change the logits, or what the tensors mean, and is not computed."""
    raw = config.raw
    if raw.get("quantization_config"):
        kind = dict(raw["quantization_config"]).get("quant_method", "some other way")
        raise InputError(
            f"quantization_config: the weights are quantized ({kind}); take the checkpoint that "
            "is not"
        )
    act = raw.get("hidden_act", raw.get("activation_type", "silu"))
    if act not in ("silu", "swish"):  # two names of one function
        raise InputError(f"activation {act!r} is not supported, only silu")
    # hub files of Qwen2.5 carry a sliding_window that is not in use
    if raw.get("use_sliding_window") and raw.get("sliding_window", 4096):
        raise InputError("use_sliding_window is not supported")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or []):
        raise InputError("layer_types other than full_attention are not supported")
    # factors of other families (Granite's, Cohere's, Gemma 2's): no family here computes any
    for key in sorted(filter(_is_multiplier, raw)):
        value = raw[key]
        off = value is None or value is False
        # 1 changes nothing, except as the factor that stands for 1 / sqrt(head_dim)
        one = value == 1 and value is not True and key != "attention_multiplier"
        if not (off or one):
            raise InputError(f"{key} {value!r} is not supported")
    # what LLaDA's and Ling's code could do, and their checkpoints do not
    off = ("alibi", "attention_layer_norm", "clip_qkv", "input_emb_norm", "scale_logits",
           "multi_query_attention", "norm_head")  # fmt: skip
    for key in off:
        if raw.get(key):
            raise InputError(f"{key} is not supported")
    only = {
        "rope": True,
        "layer_norm_type": "rms",
        "block_type": "llama",
        "score_function": "sigmoid",
    }
    if config.attention == "causal":
        only["is_causal"] = True
    if config.sigmoid_router:
        only["norm_topk_prob"] = True
    for key, value in only.items():
        if raw.get(key, value) != value:
            raise InputError(f"{key} {raw[key]!r} is not supported, only {value!r}")


def _is_multiplier(key):
    ends = ("_multiplier", "_multipliers", "_scaling", "_softcapping", "logit_scale")
    return key.endswith(ends) and key != "rope_scaling"


# ------------------------------------------------------------------------------------------------
# Names and places of the tensors on disk

LLADA_NAMES = {  # ours -> LLaDA-8B's, which are OLMo's
    "lm_head": "model.transformer.ff_out",  # the name of the MLP's last matrix too
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",  # the branch under the SiLU
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
BAILING_NAMES = {
    "model.embed_tokens": "model.word_embeddings",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "self_attn.o_proj": "attention.dense",
}
NAMES = {"llada": LLADA_NAMES, "llada2_moe": BAILING_NAMES, "bailing_moe_v2": BAILING_NAMES}


def disk_pieces(config, name):
    """Where our parameter `name` lies on disk: [(tensor on disk, its rows, index into ours), ...].

    Most are one whole tensor of the same name: rows and index None. LLaDA2 and Ling keep q, k, v as
    the rows of one tensor; experts, which we stack, are a tensor each. Both directions, `load` and
    `save`, go through this one function.
    """
    if ".mlp.experts." in name:
        prefix, matrix = name.split(".experts.")
        experts = range(config.num_experts)
        return [(f"{prefix}.experts.{e}.{matrix}.weight", None, e) for e in experts]
    names = NAMES.get(config.model_type, {})
    kind = name.split(".")[-2]
    if names is BAILING_NAMES and kind in ("q_proj", "k_proj", "v_proj"):
        prefix, rest = name.split(".self_attn.")
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        rows = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
        leaf = rest.split(".")[1]  # weight or bias
        return [(f"{prefix}.attention.query_key_value.{leaf}", rows[rest[0]], None)]
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return [(name, None, None)]


def stacked_experts(disk_name):
    """The name under which dFactory's training format keeps all experts of one expert's tensor."""
    prefix, _, rest = disk_name.partition(".experts.")
    return f"{prefix}.experts.{rest.split('.')[1]}" if rest else None


# ------------------------------------------------------------------------------------------------
# The folder


def local_folder(name, weights=True):
    """A folder as it is; anything else is a hub repository, org/name or org/name@revision.

    It is fetched into the hub's cache, or found there: *.json, *.safetensors and tokenizer files, no
    code and no pickles; without `weights` only what read_config reads. HF_HUB_OFFLINE=1 is honoured.
    Raises InputError with the hub's own advice (no such name, no access to a gated model, offline).
    """
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json"]
    if weights:
        patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    repository, _, revision = str(name).partition("@")
    pinned = {"revision": revision} if revision else {}
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, **pinned))
    except Exception as error:  # the hub's many errors: what they have in common is their advice
        advice = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name}: neither a folder nor a hub repository within reach ({advice})"
        ) from None


def at_revision(name, revision):
    """The keys --model and --revision as one name, which local_folder takes."""
    if not revision:
        return name
    if os.path.isdir(name) or "@" in str(name):
        raise InputError(f"--revision={revision}: is for a hub id without one, and not for {name}")
    return f"{name}@{revision}"
