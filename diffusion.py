"""Masked diffusion: how text is corrupted for training (LLaDA, LLaDA2, T3S), and how a canvas of masks becomes text.

    python diffusion.py --model=GSAI-ML/LLaDA-8B-Instruct --prompt="Why is the sky blue?"    # watch it being written
    python train.py --run=sft --model=M ...; python eval.py --run=sft                        # as for any other student

A masked-diffusion model sees a text x_t in which some tokens are the mask M, and says at each of them which token stood
there: position i predicts token i itself, not the next one. train.py asks `corrupt_batch` for such texts, `confidence`
for the log-probability of every response token; eval.py lets `sample` write.

Shapes: B rows, T tokens of a row, V vocabulary, N masked positions of a batch. Next: eval.py.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from config import InputError, command
from data import load_tokenizer, uniforms
from model import Cache, check_sampling, load, local_folder, next_token, read_config
from parallel import pick_device


@dataclass
class Config:
    model: str = ""  # a masked-diffusion model: a Hugging Face folder or hub id
    prompt: str = ""  # what it is asked
    max_new_tokens: int = 128  # length of the canvas behind the prompt
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    top_k: int = 0  # sample among so many likeliest tokens; 0: no limit
    block_length: int = 0  # tokens written together, from left to right; 0: LLaDA2's own; LLaDA min(32, max_new_tokens)
    denoising_steps: int = 0  # forward passes for max_new_tokens; 0: as many as tokens
    threshold: float = 0.0  # write all tokens surer than this at once, at least one; 0: LLaDA2 0.95, LLaDA none
    remasking: str = "low_confidence"  # which tokens wait: low_confidence or random
    cfg_scale: float = 0.0  # classifier-free guidance, LLaDA only
    eos_rule: str = "free"  # end-of-text: free: like any token; last: after all others of its block; never: not at all
    edit_threshold: float = -1.0  # LLaDA2.1: replace written tokens if surer than this of another; -1: never
    seed: int = 0  # of the sampling
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = "float32"  # float32 or bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Corruption: which tokens of which example are masked, a pure function of (seed, step, example)

EPSILON = 1e-3  # LLaDA's smallest masking probability, so that 1 / p stays finite


@dataclass
class Rows:
    """Clean examples, laid out for an objective."""

    ids: np.ndarray  # (B, T) int64, x_0: the examples, and end-of-text up to T
    maskable: np.ndarray  # (B, T) bool: what the objective may mask
    forced: np.ndarray  # (B, T) bool: what T3S masks in any case
    u: np.ndarray  # (B, 1 + T) uniforms: u[0] becomes the noise level t; position i is masked where u[1 + i] < t
    complement: np.ndarray  # (B, 1) bool: the second one of a complementary pair
    real: np.ndarray  # (B,) tokens of each example


def corrupt_batch(
    config, train_set, examples, *, objective="", seed, step, length, forced=None, forced_weight="one", weighting="",
    t_min=-1.0, t_max=-1.0, complementary=False, device="cpu",
):  # fmt: skip
    """One micro-batch of a masked-diffusion objective, for train.train_step.

    config, train_set  the student's model.Config and a data.Data, of which `examples` (indices) are taken
    objective      llada_pretrain, llada or block (the functions below); default: the fine-tuning loss of the family
    seed, step     with the example's id they fix its noise, whatever else is in the batch
    length         tokens of the longest example of the whole optimizer step: what `llada` pads to
    forced         T3S: (n_tokens,) bool over the data set's tokens, select.py --kind=force. The corruption is the
                   random mask UNION forced: these are masked always, and all that is masked is to be reconstructed
    forced_weight  of a forced token where the loss weighs by 1 / p, which the paper leaves open. "one": it is masked
                   with probability 1, so its inverse probability is 1: as in the loss without T3S every answer token
                   counts 1 on average. "t": 1 / p of its row like any masked token, on average ln(1 / EPSILON) = 6.9
    weighting      of `block`: mean (default) or 1/t
    t_min, t_max   range of the noise level; -1: EPSILON to 1 for LLaDA, 0.3 to 0.8 for block
    complementary  each example twice, with a mask and with its complement in what may be masked (LLaDA2 report). Forced
                   tokens are masked in both rows, hence seen twice

    -> {"examples", "ids" (B, T) int64, "targets" (B, T), -100 where not masked, "weights" (B, T) float32,
    "positions", "attention" (both for model.forward), "tokens", "read" and "pairs" (see `work`), "count"}; loss of a
    step = sum of nll * weights / sum of count. No examples give one row without targets and count 0.
    Raises InputError for an unknown objective, one of the other family, or a t range outside 0..1.
    """
    objective, t_min, t_max = check_objective(config, objective, forced_weight, weighting, t_min, t_max)
    sizes = train_set.spans[examples, 2] - train_set.spans[examples, 0]
    if len(sizes) and sizes.max() > length:
        raise InputError(f"length {length} is less than the {sizes.max()} tokens of the longest example")
    ends = np.full_like(sizes, length) if objective == "llada" else padded(config, sizes)
    rows = lay_out(config, train_set, examples, ends, f"{seed} {step}", objective == "llada_pretrain", forced)
    if complementary:
        ends = np.repeat(ends, 2)
        rows = Rows(**{key: np.repeat(value, 2, axis=0) for key, value in vars(rows).items()})
        rows.complement[1::2] = True
    masked, p = add_noise(rows, t_min, t_max)
    inverse_p = np.where(rows.forced, 1.0, 1 / p) if forced_weight == "one" else np.broadcast_to(1 / p, masked.shape)
    more = {"weighting": weighting} if objective == "block" else {}
    batch = tensors(OBJECTIVES[objective](rows, masked, inverse_p, config, **more), device)
    batch["weights"] = batch["weights"].float()
    read, pairs = work(config, ends)
    return {"examples": np.asarray(examples), "tokens": int(rows.real.sum()), "read": read, "pairs": pairs, **batch}


def work(config, ends):
    """Rows that end at `ends` -> tokens that go through the blocks, and pairs of a query and a key that it sees.

    A full model's row sees all of itself; a block model reads it twice, and block k of either copy sees k blocks.
    """
    if config.attention == "block":
        blocks = ends // config.block_length
        return 2 * int(ends.sum()), config.block_length**2 * int((blocks * (blocks + 1)).sum())
    return int(ends.sum()), int((ends * ends).sum())


def padded(config, sizes):
    """Where a row ends: with its example, or, for block models, with the last block that the example reaches into."""
    return -(-sizes // config.block_length) * config.block_length if config.attention == "block" else sizes


def lay_out(config, train_set, examples, ends, key, prompt_too=False, forced=None):
    """Examples -> Rows. What lies between the end of an example and `ends` is answer like the rest of it."""
    pad_id = config.pad_token_id if config.pad_token_id is not None else min(config.eos_token_ids, default=None)
    if pad_id is None:
        raise InputError("config.json names neither pad_token_id nor eos_token_id, so answers cannot be padded")
    B, T = max(1, len(examples)), int(ends.max(initial=config.block_length))
    rows = Rows(np.full((B, T), pad_id, dtype=np.int64), np.zeros((B, T), dtype=bool), np.zeros((B, T), dtype=bool),
                np.zeros((B, 1 + T)), np.zeros((B, 1), dtype=bool), np.zeros(B, dtype=np.int64))  # fmt: skip
    for row, example in enumerate(examples):
        start, prompt_end, end = train_set.spans[example]
        rows.real[row] = end - start
        rows.ids[row, : end - start] = train_set.tokens[start:end]
        rows.maskable[row, 0 if prompt_too else prompt_end - start : ends[row]] = True
        rows.u[row] = uniforms(key, train_set.examples[example]["id"], 1 + T)
        if forced is not None:
            rows.forced[row, : end - start] = forced[start:end]
    return rows


def add_noise(rows, t_min, t_max):
    """-> masked (B, T) bool, p (B, 1): the probability with which the row's tokens are masked.

    Of a complementary pair the second row masks what the first does not, so its p is 1 - t.
    """
    t = t_min + (t_max - t_min) * rows.u[:, :1]  # LLaDA's (1 - eps) t + eps is t_min = eps, t_max = 1
    random = (rows.u[:, 1:] < t) ^ rows.complement
    p = np.where(rows.complement, np.maximum(1 - t, EPSILON), t)
    return (random & rows.maskable) | rows.forced, p


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: `masked` -> what the model reads, predicts, and how much it counts


def llada_pretrain(rows, masked, inverse_p, config):
    """LLaDA's pre-training loss (arXiv 2502.09992, eq. 3; ML-GSAI/LLaDA, GUIDELINES.md):

        L = - 1 / (number of tokens)  sum over i of  1[x_t^i = M] / p  log p_theta(x_0^i | x_t)

    Prompt and response alike. Rows shorter than the longest are not padded with text: nothing sees what is behind them.
    (LLaDA cut one batch in a hundred to a random length, so that not all were 4096 tokens long; examples here differ.)
    """
    # 1. t ~ U(0, 1), p = (1 - eps) t + eps, each token masked with probability p: add_noise
    # 2. the model reads x_t, and a masked position predicts its own token: hide
    # 3. it weighs 1 / p; the normaliser counts all positions, masked or not
    return {**hide(rows, masked, config), "weights": inverse_p, "count": float(rows.maskable.sum())}


def llada_sft(rows, masked, inverse_p, config):
    """LLaDA's fine-tuning loss (arXiv 2502.09992, eq. 5; GUIDELINES.md), with L'_b tokens in the answer of row b:

        L = - 1 / B  sum over b of  1 / L'_b  sum over i of  1[x_t^i = M] / p  log p_theta(x_0^i | prompt, x_t)

    Answers are padded with end-of-text to the length of the step, and these pads are answer: masked, seen, scored.
    """
    # 1. as in pre-training, but the prompt is never masked: rows.maskable
    # 2. the mean over each answer, pads included; then the mean over the rows
    answer = np.maximum(1, rows.maskable.sum(1, keepdims=True))  # (B, 1), L'
    return {**hide(rows, masked, config), "attention": "full", "weights": inverse_p / answer,
            "count": float((rows.real > 0).sum())}  # fmt: skip


def block_sft(rows, masked, inverse_p, config, weighting):
    """LLaDA2's block-diffusion fine-tuning loss, all blocks in one forward pass (dFactory, train_llada2_bd.py):

        L = - 1 / n  sum over i of  1[x_t^i = M]  log p_theta(x_0^i | x_t of the same block, x_0 of the blocks before)

    weighting mean: n is the number of masked tokens (as dFactory trains); 1/t: each term is divided by p, and n is the
    number of answer tokens, which for t from next to 0 to 1 is the report's bound on the negative log-likelihood.
    An example ends at the end of its last block: the pads up to there are answer, what lies behind is seen by nobody
    (dFactory pads to 2048).
    """
    # 1. one t per example, answer tokens masked with probability t: add_noise
    # 2. the model reads [x_t, x_0], and only x_t predicts, only where it is masked: hide
    # 3. all masked tokens alike, or by their inverse probability
    weights = np.tile(inverse_p if weighting == "1/t" else np.ones(masked.shape), 2)
    count = float((rows.maskable if weighting == "1/t" else masked).sum())
    return {**hide(rows, masked, config), "weights": weights, "count": count}


OBJECTIVES = {"llada_pretrain": llada_pretrain, "llada": llada_sft, "block": block_sft}
T_RANGE = {"llada_pretrain": (EPSILON, 1.0), "llada": (EPSILON, 1.0), "block": (0.3, 0.8)}


def check_objective(config, objective="", forced_weight="one", weighting="", t_min=-1.0, t_max=-1.0):
    """-> (objective, t_min, t_max), the family's own where "" and -1 are given.

    Raises InputError for what does not go together.
    """
    if not config.is_diffusion:
        raise InputError(f"{config.model_type} is no masked-diffusion model")
    objective = objective or {"full": "llada", "block": "block"}[config.attention]
    if objective not in OBJECTIVES:
        raise InputError(f"--objective={objective}: must be one of {', '.join(OBJECTIVES)}")
    if (objective == "block") != (config.attention == "block"):
        raise InputError(f"--objective={objective} is not for {config.model_type}, which attends {config.attention}")
    if config.mask_token_id is None or not 0 <= config.mask_token_id < config.vocab_size:
        raise InputError(f"mask_token_id {config.mask_token_id} is not one of the model's {config.vocab_size} ids")
    if forced_weight not in ("one", "t"):
        raise InputError(f"--forced_weight={forced_weight}: must be one or t")
    if weighting not in ("", "mean", "1/t") or (weighting and objective != "block"):
        raise InputError(f"--weighting={weighting}: must be mean or 1/t, and only block objectives have it")
    low, high = (default if t == -1 else t for t, default in zip((t_min, t_max), T_RANGE[objective], strict=True))
    if not 0 <= low <= high <= 1 or high == 0 or (low == 0 and (objective != "block" or weighting == "1/t")):
        raise InputError(f"--t_min={low} --t_max={high}: must be 0 < t_min <= t_max <= 1 (0 only without 1/t)")
    return objective, low, high


def hide(rows, masked, config):
    """Rows of which `masked` is hidden, as the model reads them -> {"ids", "targets", "positions", "attention"}.

    A full model reads x_t, (B, T); a block model x_t and x_0, (B, 2T), at positions 0..T-1 twice. Only the masked
    positions of x_t have a target, which is their own token.
    """
    noisy = np.where(masked, config.mask_token_id, rows.ids)  # x_t
    targets = np.where(masked, rows.ids, -100)
    if config.attention != "block":
        return {"ids": noisy, "targets": targets, "positions": None, "attention": own_row(rows)}
    ids, positions, attention = noisy_and_clean(noisy, rows.ids, config.block_length)
    targets = np.concatenate([targets, np.full_like(targets, -100)], axis=1)
    return {"ids": ids, "targets": targets, "positions": positions, "attention": attention}


def tensors(batch, device):
    """Its arrays as tensors on `device`; all else as it is."""
    return {k: torch.as_tensor(v, device=device) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def own_row(rows):
    """Attention of full models to rows of different lengths: all keys but the padding, (B, 1, 1, T) bool."""
    seen = np.arange(rows.ids.shape[1]) < rows.real[:, None]
    return "full" if seen.all() or not rows.real.any() else seen[:, None, None]


def noisy_and_clean(noisy, clean, block):
    """Two (B, T) copies of a text -> ids (B, 2T), positions (1, 2T), and who sees whom, (1, 1, 2T, 2T) bool.

    Noisy sees noisy of its own block and clean of the blocks before; clean sees clean up to its own block. So every
    block is predicted as at decoding time, from finished blocks and itself, and no answer leaks into its own block.
    """
    T = noisy.shape[1]
    number, is_noisy = np.tile(np.arange(T) // block, 2), np.arange(2 * T) < T
    q, k = number[:, None], number[None]
    q_noisy, k_noisy = is_noisy[:, None], is_noisy[None]
    sees = (q_noisy & k_noisy & (k == q)) | (q_noisy & ~k_noisy & (k < q)) | (~q_noisy & ~k_noisy & (k <= q))
    return np.concatenate([noisy, clean], axis=1), np.tile(np.arange(T), 2)[None], sees[None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Confidence: what a diffusion model itself thinks of every response token


@torch.no_grad()
def confidence(model, train_set, examples, draws=0, seed=0):
    """Log-probability of every response token -> a list of (response tokens,) float32 arrays, one per example.

    draws 0   one forward pass with the whole response masked (as d1 does, dllm-reasoning/d1): the least that a token
              can be known by. Block models see, as at decoding time, the blocks before a token's own
    draws K   the mean of K, each from a random mask and its complement in the response, so that every token is scored
              once in every draw; noise levels stratified over 0..1 (the k-th lies between k / K and (k + 1) / K)

    The noise is a function of (seed, example, draw) and not of the checkpoint: two checkpoints are compared on the same
    masks, which takes most of the noise out of their difference. No examples: as many forward passes, no arrays.
    """
    config, device = model.config, next(model.parameters()).device
    check_objective(config)
    sizes = train_set.spans[examples, 2] - train_set.spans[examples, 0]
    total = 0.0
    for k in range(max(1, draws)):
        rows = lay_out(config, train_set, examples, padded(config, sizes), f"{seed} draw {k}")
        rows.u[:, 0] = (k + rows.u[:, 0]) / draws if draws else 1.0
        masks = [add_noise(rows, 0.0, 1.0)[0]]
        if draws:
            masks.append(rows.maskable & ~masks[0])
        for masked in masks:
            total = total - model(**tensors(hide(rows, masked, config), device)).cpu().numpy()
    prompts = train_set.spans[examples, 1] - train_set.spans[examples, 0]
    return [row[a:b] / max(1, draws) for row, a, b in zip(total, prompts, sizes, strict=False)]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: a canvas of masks, filled block by block from left to right, in any order within a block


@dataclass
class Decoding(Config):
    """The command's keys, and what a tokenizer and a model say of their ids."""

    eos_ids: tuple | None = None  # ids that end an answer; default: the model's own
    vocab_size: int | None = None  # ids from here on never come out; the mask never does


MAX_POST_STEPS = 16  # passes in which a block without masks may still be edited (LLaDA2.1)


def check_decoding(config, prompts, keys):
    """Keys -> a complete Decoding and its schedule: how many tokens each forward pass of a block writes at least.

    Raises InputError: a value out of range, a prompt that is empty, has an id that the model has not or leaves no room
    in the model's context, a block length that does not divide, fewer steps than blocks, a mask id outside the
    vocabulary, LLaDA's keys for a block model.
    """
    check_objective(config)
    rule, blockwise = Decoding(**keys), config.attention == "block"
    check_sampling(config, prompts, rule.max_new_tokens, rule.temperature, rule.top_p, rule.top_k)
    rule.eos_ids = [i for i in (config.eos_token_ids if rule.eos_ids is None else rule.eos_ids) if i is not None]
    rule.vocab_size = rule.vocab_size or config.vocab_size
    rule.block_length = rule.block_length or (config.block_length if blockwise else min(32, rule.max_new_tokens))
    for key, fine in (
        ("block_length", rule.block_length > 0), ("threshold", 0 <= rule.threshold <= 1),
        ("denoising_steps", rule.denoising_steps >= 0), ("cfg_scale", rule.cfg_scale >= 0),
        ("remasking", rule.remasking in ("low_confidence", "random")),
        ("eos_rule", rule.eos_rule in ("free", "last", "never")), ("edit_threshold", rule.edit_threshold <= 1),
    ):  # fmt: skip
        if not fine:
            raise InputError(f"{key} = {getattr(rule, key)}: out of range (python eval.py --help says what it means)")
    if blockwise and rule.block_length != config.block_length:
        raise InputError(f"block_length = {rule.block_length}: this model was trained for {config.block_length}")
    if blockwise and rule.cfg_scale:
        raise InputError(f"cfg_scale = {rule.cfg_scale}: only for LLaDA, not for block models")
    if rule.remasking == "random" and rule.threshold:
        raise InputError("threshold and remasking = random exclude each other: a random order has no confidence")
    if not blockwise and rule.max_new_tokens % rule.block_length:
        raise InputError(f"block_length = {rule.block_length} does not divide max_new_tokens = {rule.max_new_tokens}")
    for number, prompt in enumerate(prompts):
        if 0 < config.max_position_embeddings < len(prompt) + rule.max_new_tokens:
            raise InputError(f"prompt {number} of {len(prompt)} tokens and max_new_tokens = {rule.max_new_tokens} are "
                             f"longer than the model's context of {config.max_position_embeddings}")  # fmt: skip
    blocks = -(-rule.max_new_tokens // rule.block_length)
    steps = rule.denoising_steps or blocks * rule.block_length
    if steps < blocks or steps % blocks:
        raise InputError(f"denoising_steps = {steps}: must be a multiple of the {blocks} blocks of the answer")
    if blockwise and rule.remasking == "low_confidence":
        rule.threshold = rule.threshold or 0.95
    base, more = divmod(rule.block_length, steps // blocks)
    return rule, [n for n in [base + 1] * more + [base] * (steps // blocks - more) if n]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, example_ids=None, use_cache=True, **keys):
    """Fill a canvas of masks behind each prompt (a list of ids); yields after every forward pass

        canvas (B, T) int64: prompt, answer so far, masks up to the longest row   new (B, T) bool: written in this pass

    LLaDA (full attention; ML-GSAI/LLaDA, generate.py): the answer is cut into blocks; a pass reads the whole canvas and
    proposes a token for every mask of the block; those with the highest confidence stay, by a fixed schedule or, with
    a threshold, all that exceed it (Fast-dLLM). LLaDA2: the blocks are those of the model, counted from position 0; a
    pass reads the block and a cache of those before it. keys: those of Decoding.

    Confidence is the probability of the proposed token in the softmax of the raw logits, over the whole vocabulary, as
    in LLaDA's code. (LLaDA2's own takes, at temperatures above 0, that after temperature, top_k and top_p.) A row ends
    with the block in which an end-of-text token is found; its later masks are never looked at. What is drawn is a
    function of (seed, example id, block, pass, position): one uniform a token, inverted through the distribution.
    (LLaDA's float64 argmax of exp(logits) / (-ln u)^temperature draws from the same one, with a vocabulary of uniforms
    for every token.)
    """
    config, device = model.config, next(model.parameters()).device
    rule, schedule = check_decoding(config, prompts, {"max_new_tokens": max_new_tokens, **keys})
    example_ids, block = list(range(len(prompts)) if example_ids is None else example_ids), rule.block_length
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    starts = lengths // block * block if config.attention == "block" else lengths  # of each row's first block
    ends = starts + -(-(lengths + max_new_tokens - starts) // block) * block  # of its last one
    canvas = torch.full((len(prompts), int(ends.max())), config.mask_token_id, device=device)
    for row, prompt in zip(canvas, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)

    cache = None
    if use_cache and config.attention == "block":
        cache = Cache(config, len(prompts), canvas.shape[1])
        if starts.max() > 0:  # shorter prompts write masks behind them: overwritten before they are seen
            model(canvas[:, : starts.max()], cache=cache, rows=torch.zeros_like(lengths))
    rows, number = torch.arange(len(prompts), device=device), 0  # whose answers are not finished; which block of theirs
    while len(rows):
        span = (starts[rows] + number * block)[:, None] + torch.arange(block, device=device)  # (b, block)
        noise_keys = [(f"{rule.seed} {number}", example_ids[row]) for row in rows.tolist()]
        for written in denoise(model, canvas, rows, span, lengths, ends, rule, schedule, noise_keys, cache):
            new = torch.zeros_like(canvas, dtype=torch.bool)
            new[rows[:, None], span] = written
            yield canvas.clone(), new
        ids = canvas[rows[:, None], span]
        eos = torch.isin(ids, torch.tensor(sorted(rule.eos_ids), device=device)) & (span >= lengths[rows, None])
        left = ~eos.any(1) & (span[:, -1] + 1 < ends[rows])
        if cache is not None and left.any():
            if not left.all():
                cache.keep_rows(left)
            # keys and values made while there were masks are not those of the text: once more, without masks
            model(ids[left], positions=span[left], cache=cache, rows=torch.zeros_like(rows[left]))
        rows, number = rows[left], number + 1


def denoise(model, canvas, rows, span, lengths, ends, rule, schedule, noise_keys, cache):
    """Fill one block of the rows in place; yields what was written after every forward pass, (b, block) bool.

    rows (b,) of the canvas and span (b, block): where their block lies. With an edit threshold, written tokens are
    replaced as well, also for some passes after the last mask is gone (LLaDA2.1), until nothing changes.
    """
    answer = span >= lengths[rows, None]  # the first block may begin in the prompt
    editing = rule.edit_threshold >= 0
    settled = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)  # a pass without masks changed nothing
    post = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)  # passes without masks
    for step in range(len(schedule) + MAX_POST_STEPS * editing):
        ids = canvas[rows[:, None], span]  # (b, block)
        masked = answer & (ids == model.config.mask_token_id)
        unfinished = masked.any(1)
        if editing:
            post += ~unfinished
            unfinished |= ~settled & (post <= MAX_POST_STEPS)
        if not unfinished.any():
            return
        asked = (answer if editing else masked) & unfinished[:, None]
        logits = predict(model, canvas, rows, span, lengths, ends, rule.cfg_scale, cache)  # (b, block, V)
        u, shuffle = draws(noise_keys, step, span) if rule.temperature or rule.remasking == "random" else (None, None)
        token, sure = propose(logits[asked], u if u is None else u[asked], rule, model.config)  # (N,) each
        tokens = ids.masked_scatter(asked, token)
        p = torch.zeros_like(ids, dtype=torch.float64).masked_scatter(asked, sure)  # (b, block)
        order = shuffle if rule.remasking == "random" else p
        if rule.eos_rule == "last":
            order = order - torch.isin(tokens, torch.tensor(sorted(rule.eos_ids), device=rows.device)).double()
        written = commit(order, masked, schedule[min(step, len(schedule) - 1)], rule.threshold)
        if editing:
            edited = asked & ~masked & (tokens != ids) & (p > rule.edit_threshold)
            settled = ~masked.any(1) & ~edited.any(1)
            written |= edited
        canvas[rows[:, None], span] = torch.where(written, tokens, ids)
        yield written


def draws(noise_keys, step, span):
    """Two uniforms for each position of the block, (b, block) each: for its token, and for a random order."""
    n = span.shape[1]
    u = np.stack([uniforms(f"{key} {step}", example, 2 * n) for key, example in noise_keys])
    return torch.from_numpy(u).to(span.device).chunk(2, dim=1)


def predict(model, canvas, rows, span, lengths, ends, cfg_scale, cache):
    """Logits at the positions `span` of the rows, (b, block, V)."""
    if cache is not None:
        return model(canvas[rows[:, None], span], positions=span, cache=cache)
    if model.config.attention == "block":
        return model(canvas[rows, : span.max() + 1], rows=span)
    ids, at = canvas[rows], torch.arange(canvas.shape[1], device=rows.device)
    seen = (at < ends[rows, None])[:, None, None]  # (b, 1, 1, T): no padding
    if not cfg_scale:
        return model(ids, attention="full" if seen.all() else seen, rows=span)
    # classifier-free guidance: away from what the model would write without the prompt
    blank = torch.where(at < lengths[rows, None], model.config.mask_token_id, ids)
    both = model(torch.cat([ids, blank]), attention=seen.repeat(2, 1, 1, 1), rows=span.repeat(2, 1))
    conditional, free = both.chunk(2)
    return free + (cfg_scale + 1) * (conditional - free)


def propose(logits, u, rule, config):
    """logits (N, V), uniforms (N,) -> a token for each position, and its probability, both (N,); all in float64.

    As in LLaDA's code, the probability is that among all ids (but not end-of-text where it may never be written: its
    logits_eos_inf), although the mask and what only pads the vocabulary cannot be proposed.
    """
    logits = logits.double()
    if rule.eos_rule == "never":
        logits[:, [i for i in rule.eos_ids if i < logits.shape[1]]] = -torch.inf
    logp = logits.log_softmax(-1)
    logits[:, config.mask_token_id] = logits[:, rule.vocab_size :] = -torch.inf
    token = next_token(logits, u, rule.temperature, rule.top_p, rule.top_k)
    return token, logp.gather(1, token[:, None]).squeeze(1).exp()


def commit(order, masked, count, threshold):
    """Which masked positions are written now, (b, block): the `count` highest in `order`; if more exceed the threshold,
    all of these. Of equals the leftmost. (LLaDA2's >; Fast-dLLM's >= differs at exactly the threshold only.)"""
    rank = order.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    chosen = masked & (rank < count)
    return chosen | (masked & (order > threshold)) if threshold else chosen


def sample(model, prompts, max_new_tokens, *, eos_ids=None, **keys):
    """Answers to one batch of prompts -> a list of ids for each, up to and without an end-of-text id; see generate."""
    eos_ids = model.config.eos_token_ids if eos_ids is None else eos_ids
    for step in generate(model, prompts, max_new_tokens, eos_ids=eos_ids, **keys):
        canvas = step[0]
    return [until_end(row[len(prompt) : len(prompt) + max_new_tokens], eos_ids)
            for row, prompt in zip(canvas.tolist(), prompts, strict=True)]  # fmt: skip


def until_end(ids, eos_ids):
    """The ids before the first end-of-text."""
    return ids[: next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))]


# ---------------------------------------------------------------------------------------------------------------------
# The command: watch an answer being written


def main(**given):
    """Answer one prompt, drawing the canvas after every forward pass -> the answer's text."""
    cfg = Config(**given)
    if not cfg.model or not cfg.prompt:
        raise InputError(f"--{'prompt' if cfg.model else 'model'} is missing (--help lists the keys)")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={cfg.dtype}: must be float32 or bfloat16")
    folder = local_folder(cfg.model)
    check_objective(read_config(folder))
    device = pick_device(cfg.device)
    tokenizer, student = load_tokenizer(folder), load(folder, device, getattr(torch, cfg.dtype))
    prompt = tokenizer.encode_prompt([{"role": "user", "content": cfg.prompt}])
    keys = {k: v for k, v in vars(cfg).items() if k not in ("model", "prompt", "device", "dtype", "max_new_tokens")}
    eos_ids = {*student.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id} - {None}
    steps = generate(student, [prompt], cfg.max_new_tokens, eos_ids=eos_ids, vocab_size=tokenizer.vocab_size, **keys)
    terminal, passes, written = sys.stdout.isatty(), 0, 0
    print("\x1b[?1049h" * terminal, end="")  # a screen of its own: the answer stays on the ordinary one
    try:
        for canvas, new in steps:
            passes, written = passes + 1, written + int(new.sum())
            mask_id, lead = student.config.mask_token_id, f"pass {passes}, {written} tokens"
            text = paint(tokenizer, canvas[0, len(prompt) :], new[0, len(prompt) :], mask_id, terminal)
            print(f"\x1b[H\x1b[J{lead}\n\n{text}" if terminal else f"{lead}: {text!r}", flush=True)
    finally:
        print("\x1b[?1049l" * terminal, end="")
    answer = until_end(canvas[0, len(prompt) : len(prompt) + cfg.max_new_tokens].tolist(), eos_ids)
    print(f"{printable(tokenizer.decode(answer))}\n({len(answer)} tokens, {passes} forward passes)")
    return tokenizer.decode(answer)


def paint(tokenizer, ids, new, mask_id, colour):
    """The canvas as text: a shade for every mask and, in colour, what is new in green."""
    parts, at, kind = [], 0, torch.where(ids == mask_id, 2, new.long()).tolist()
    while at < len(ids):  # runs of equal kind together: a character may be cut over two tokens
        end = at + 1
        while end < len(ids) and kind[end] == kind[at]:
            end += 1
        text = "░" * (end - at) if kind[at] == 2 else printable(tokenizer.decode(ids[at:end]))
        parts.append(f"\x1b[{(0, 32, 90)[kind[at]]}m{text}\x1b[0m" if colour else text)
        at = end
    return "".join(parts)


def printable(text):
    """What a model writes must not steer the terminal: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


if __name__ == "__main__":
    command(main, Config)
