"""The sampling keys, and the step from logits to a token that most of them are about.

    token = next_token(logits, u, Sampling(temperature=0.6, top_p=0.95))

train.py, eval.py, collect.py and sample.py inherit `Sampling`: a key is written once, and every
command has it, with the same default and the same line of --help.

Shapes: B rows, V vocabulary. Next: sample.py.
"""

from dataclasses import dataclass, fields

import torch

from plumbing.config import InputError, above, require


@dataclass
class Sampling:
    """How answers are sampled: the keys of every command that samples.

    A new key is a field here, its range in `check_ranges`, and the line where it acts: in
    `next_token` if it shapes a distribution, in denoise.py (and in MASKED_DIFFUSION) if it is
    about the order in which a masked-diffusion student writes.
    """

    # how answers are sampled
    temperature: float = 1.0  # 0: greedy, always the likeliest token
    top_p: float = 1.0  # nucleus sampling: the likeliest tokens that together have this probability
    top_k: int = 0  # sample among this many likeliest tokens; 0: no limit
    max_new_tokens: int = 1024  # length limit of an answer; one that reaches it counts as truncated
    seed: int = 0  # of whatever is random
    # how masked-diffusion students sample (autoregressive ones have no use for these)
    block_length: int = 0  # tokens written together; 0: LLaDA2's own, LLaDA min(32, max_new_tokens)
    denoising_steps: int = 0  # forward passes for max_new_tokens; 0: as many as tokens
    threshold: float = 0.0  # write all whose probability exceeds this; 0: LLaDA2 0.95, LLaDA none
    remasking: str = "low_confidence"  # order: low_confidence (surest first), random, left_to_right
    cfg_scale: float = 0.0  # classifier-free guidance, LLaDA only
    eos_rule: str = "free"  # ends: free, last (of their block), never (end-of-turn only)
    edit_threshold: float = -1.0  # LLaDA2.1: a token gives way to one of probability above this


MASKED_DIFFUSION = (
    "block_length",
    "denoising_steps",
    "threshold",
    "remasking",
    "cfg_scale",
    "eos_rule",
    "edit_threshold",
)


def sampling_keys(cfg):
    """{key: value} of the sampling keys alone, of any command's Config."""
    return {field.name: getattr(cfg, field.name) for field in fields(Sampling)}


def check_ranges(sampling):
    """Raise InputError for a value out of range, as far as that needs no model."""
    require(
        sampling,
        temperature=(0, None),
        top_p=(above(0), 1),
        top_k=(0, None),
        max_new_tokens=(1, None),
    )


def check_sampling(config, prompts, sampling):
    """Raise InputError for a value out of range, or a prompt that is empty or has a strange id."""
    check_ranges(sampling)
    for number, prompt in enumerate(prompts):
        if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(
                f"prompt {number} is empty or has an id outside the vocabulary of "
                f"{config.vocab_size}"
            )


def check_greedy(given, sampling):
    """Raise InputError if --top_p or --top_k was given although nothing is drawn. given: a dict."""
    for key in ("top_p", "top_k"):
        if sampling.temperature == 0 and given.get(key, getattr(Sampling, key)) != getattr(Sampling, key):
            raise InputError(
                f"--{key}={given[key]} has no effect at temperature 0, which always takes the "
                "likeliest token: give --temperature=1 as well, or another"
            )


def check_used(configs, sampling):
    """Raise InputError for a key of masked-diffusion students if all are autoregressive."""
    if any(config.is_diffusion for config in configs):
        return
    for key in MASKED_DIFFUSION:
        value = getattr(sampling, key)
        if value != getattr(Sampling, key):
            raise InputError(
                f"--{key}={value} is about masked-diffusion students, and {configs[0].model_type} "
                "is autoregressive"
            )


# --------------------------------------------------------------------------------------------------
# From logits to a token


def next_token(logits, u, sampling):
    """logits (B, V), uniforms u (B,) -> ids (B,): inverse CDF over ids in their order.

    Temperature 0: the likeliest.
    As in transformers: temperature, then top_k, then top_p of what is left (with the id that
    crosses it). In float32, with float64 logits in float64. Raises InputError for logits that are
    not finite.
    """
    if sampling.temperature == 0:
        best, token = logits.max(-1)
    else:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        p = torch.softmax(logits / sampling.temperature, -1)
        if sampling.top_k or sampling.top_p < 1:
            smallest = smallest_kept(p, sampling.top_p, sampling.top_k)
            p = p.masked_fill(p < smallest, 0)
        cdf = p.cumsum(-1, dtype=torch.float64)
        best = cdf[:, -1]
        # the first id whose cdf exceeds u: so its probability is not 0
        token = torch.searchsorted(cdf, (u * best)[:, None], right=True).squeeze(1)
    if not torch.isfinite(best).all():
        raise InputError("the model's logits are not finite, nothing can be sampled from it")
    return token


def smallest_kept(p, top_p, top_k):
    """The smallest probability that may still be sampled, (B, 1)."""
    likeliest = p.topk(min(top_k or 1024, p.shape[-1])).values  # falling
    # 1024 tokens rarely hold less than top_p; only then sort the whole vocabulary
    if not top_k and (likeliest.sum(-1) < top_p).any():
        likeliest = p.sort(descending=True).values
    mass = likeliest.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:] if top_k else 1.0
    beyond = mass - likeliest >= top_p * total
    return likeliest.masked_fill(beyond, torch.inf).amin(-1, keepdim=True)
