"""RoPE in checkpoints whose context was stretched after pre-training: the frequencies that they use.

`rope_scaling` (or `rope_parameters`) of config.json names the method; hf/families.py has checked it.
Each follows transformers' modeling_rope_utils.py. Next: hf/weights.py.
"""

import math

import torch


def stretched(freq, config):
    """freq (D_rotated / 2,), what theta alone gives -> the frequencies used, and a factor on cos, sin."""
    scaling = config.rope_scaling
    if scaling is None:
        return freq, 1.0
    # the length of context in pre-training
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if scaling["rope_type"] == "linear":  # as if every position were divided by `factor`
        return freq / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return llama3(freq, scaling, trained), 1.0
    return yarn(freq, scaling, trained, config.rope_theta)


def llama3(freq, scaling, trained):
    """Llama 3.1's: low frequencies are divided by `factor`, high ones kept, a ramp in between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = trained * freq / (2 * math.pi)  # full turns within the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (keep + (1 - keep) / scaling["factor"])


def yarn(freq, scaling, trained, theta):
    """YaRN (arXiv 2309.00071), static: the ramp runs over the number of the pair."""
    dim = 2 * len(freq)
    factor = scaling["factor"]

    def pair_with_turns(turns):
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(weight=1.0):  # sharper attention for the longer context: the paper's sqrt(1/t)
        if factor <= 1:
            return 1.0
        return 0.1 * weight * math.log(factor) + 1.0

    low = pair_with_turns(scaling.get("beta_fast") or 32)
    high = pair_with_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=freq.device)
    span = (high - low) or 0.001
    slow = ((pairs / 2 - low) / span).clamp(0, 1)
    scale = scaling.get("attention_factor")
    if scale is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        scale = mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    if scale is None:
        scale = mscale()
    return freq * (1 - slow + slow / factor), scale
