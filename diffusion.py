"""Masked diffusion: how text is corrupted for training (LLaDA, LLaDA2, T3S), and how a canvas of masks becomes text.

    python diffusion.py --model=GSAI-ML/LLaDA-8B-Instruct --prompt="Why is the sky blue?"    # watch it being written
    python train.py --run=sft --model=M ...; python eval.py --run=sft                        # as for any other student

A masked-diffusion model sees a text x_t in which some tokens are the mask M, and says at each of them which token stood
there: position i predicts token i itself, not the next one. train.py asks `corrupt_batch` for such texts, `confidence`
for the log-probability of every response token; eval.py lets `sample` write.

Shapes: B rows, T tokens of a row, V vocabulary, N masked positions of a batch. Next: eval.py.
"""

from dataclasses import dataclass

import numpy as np
import torch

from config import InputError
from data import uniforms

# ---------------------------------------------------------------------------------------------------------------------
# Corruption: which tokens of which example are masked, a pure function of (seed, step, example)

EPSILON = 1e-3  # LLaDA's smallest masking probability, so that 1 / p stays finite


@dataclass
class Rows:
    """Clean examples, laid out for an objective."""

    ids: np.ndarray  # (B, T) int64, x_0: the examples, and end-of-text up to T
    maskable: np.ndarray  # (B, T) bool: what the objective may mask
    forced: np.ndarray  # (B, T) bool: what T3S masks in any case
    u: np.ndarray  # (B, 1 + T) in [0, 1): of the noise level, and of each position
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
    t_min, t_max   range of the noise level; default: EPSILON to 1 for LLaDA, 0.3 to 0.8 for block
    complementary  each example twice, with a mask and with its complement in what may be masked (LLaDA2 report)

    -> {"examples", "ids" (B, T) int64, "targets" (B, T), -100 where not masked, "weights" (B, T) float32,
    "positions", "attention" (both for model.forward), "tokens", "count"}; loss of a step = sum of nll * weights /
    sum of count. No examples give one row without targets and count 0.
    Raises InputError for an unknown objective, one of the other family, or a t range outside 0..1.
    """
    objective = check_objective(config, objective, forced_weight, weighting, t_min, t_max)
    sizes = train_set.spans[examples, 2] - train_set.spans[examples, 0]
    if len(sizes) and sizes.max() > length:
        raise InputError(f"length {length} is less than the {sizes.max()} tokens of the longest example")
    ends = np.full_like(sizes, length) if objective == "llada" else padded(config, sizes)
    rows = lay_out(config, train_set, examples, ends, f"{seed} {step}", objective == "llada_pretrain", forced)
    if complementary:
        rows = Rows(**{key: np.repeat(value, 2, axis=0) for key, value in vars(rows).items()})
        rows.complement[1::2] = True
    t_min, t_max = (default if t < 0 else t for t, default in zip((t_min, t_max), T_RANGE[objective], strict=True))
    masked, p = add_noise(rows, t_min, t_max)
    inverse = np.where(rows.forced, 1.0, 1 / p) if forced_weight == "one" else np.broadcast_to(1 / p, masked.shape)
    batch = OBJECTIVES[objective](rows, masked, inverse, config, weighting)
    for key in ("ids", "targets", "weights", "positions", "attention"):
        if isinstance(batch.get(key), np.ndarray):
            batch[key] = torch.as_tensor(batch[key], device=device)
    batch["weights"] = batch["weights"].float()
    return {"examples": np.asarray(examples), "tokens": int(rows.real.sum()), **batch}


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


def llada_pretrain(rows, masked, inverse, config, weighting):
    """LLaDA's pre-training loss (arXiv 2502.09992, eq. 3; ML-GSAI/LLaDA, GUIDELINES.md):

        L = - 1 / (number of tokens)  sum over i of  1[x_t^i = M] / p  log p_theta(x_0^i | x_t)

    Prompt and response alike. Rows shorter than the longest are not padded with text: nothing sees what is behind them.
    """
    # 1. t ~ U(0, 1), p = (1 - eps) t + eps, each token masked with probability p: add_noise
    noisy = np.where(masked, config.mask_token_id, rows.ids)  # x_t
    # 2. a masked position predicts its own token
    targets = np.where(masked, rows.ids, -100)
    # 3. it weighs 1 / p; the normaliser counts all positions, masked or not
    return {"ids": noisy, "targets": targets, "weights": inverse, "count": float(rows.maskable.sum()),
            "positions": None, "attention": own_row(rows)}  # fmt: skip


def llada_sft(rows, masked, inverse, config, weighting):
    """LLaDA's fine-tuning loss (arXiv 2502.09992, eq. 5; GUIDELINES.md), with L'_b tokens in the answer of row b:

        L = - 1 / B  sum over b of  1 / L'_b  sum over i of  1[x_t^i = M] / p  log p_theta(x_0^i | prompt, x_t)

    Answers are padded with end-of-text to the length of the step, and these pads are answer: masked, seen, scored.
    """
    # 1. as in pre-training, but the prompt is never masked: rows.maskable
    noisy = np.where(masked, config.mask_token_id, rows.ids)  # x_t
    targets = np.where(masked, rows.ids, -100)
    # 2. the mean over each answer, pads included; then the mean over the rows
    answer = np.maximum(1, rows.maskable.sum(1, keepdims=True))  # (B, 1), L'
    return {"ids": noisy, "targets": targets, "weights": inverse / answer, "count": float((rows.real > 0).sum()),
            "positions": None, "attention": "full"}  # fmt: skip


def block_sft(rows, masked, inverse, config, weighting):
    """LLaDA2's block-diffusion fine-tuning loss, all blocks in one forward pass (dFactory, train_llada2_bd.py):

        L = - 1 / n  sum over i of  1[x_t^i = M]  log p_theta(x_0^i | x_t of the same block, x_0 of the blocks before)

    weighting mean: n is the number of masked tokens (as dFactory trains); 1/t: each term is divided by p, and n is the
    number of answer tokens, which for t from next to 0 to 1 is the report's bound on the negative log-likelihood.
    An example ends at the end of its last block: the pads up to there are answer, what lies behind is seen by nobody.
    """
    # 1. one t per example, answer tokens masked with probability t: add_noise
    noisy = np.where(masked, config.mask_token_id, rows.ids)  # x_t
    # 2. the model reads [x_t, x_0], at positions 0..T-1 twice
    ids, positions, attention = noisy_and_clean(noisy, rows.ids, config.block_length)  # (B, 2T)
    # 3. only x_t predicts, and only where it is masked
    targets = np.concatenate([np.where(masked, rows.ids, -100), np.full_like(noisy, -100)], axis=1)
    # 4. all masked tokens alike, or by their inverse probability
    weights = np.tile(inverse if weighting == "1/t" else np.ones(masked.shape), 2)
    count = float((rows.maskable if weighting == "1/t" else masked).sum())
    return {"ids": ids, "targets": targets, "weights": weights, "count": count,
            "positions": positions, "attention": attention}  # fmt: skip


OBJECTIVES = {"llada_pretrain": llada_pretrain, "llada": llada_sft, "block": block_sft}
T_RANGE = {"llada_pretrain": (EPSILON, 1.0), "llada": (EPSILON, 1.0), "block": (0.3, 0.8)}


def check_objective(config, objective, forced_weight="one", weighting="", t_min=-1.0, t_max=-1.0):
    """The objective's name, the family's own if none is given. Raises InputError for what does not go together."""
    if not config.is_diffusion:
        raise InputError(f"{config.model_type} is no masked-diffusion model: it has no diffusion objective")
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
    low, high = (default if t < 0 else t for t, default in zip((t_min, t_max), T_RANGE[objective], strict=True))
    if not 0 <= low <= high <= 1 or (low == 0 and (objective != "block" or weighting == "1/t")):
        raise InputError(f"--t_min={low} --t_max={high}: must be 0 < t_min <= t_max <= 1")
    return objective


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
    check_objective(config, "")
    sizes = train_set.spans[examples, 2] - train_set.spans[examples, 0]
    total = 0.0
    for k in range(max(1, draws)):
        rows = lay_out(config, train_set, examples, padded(config, sizes), f"{seed} draw {k}")
        rows.u[:, 0] = (k + rows.u[:, 0]) / draws if draws else 1.0
        masks = [add_noise(rows, 0.0, 1.0)[0]]
        if draws:
            masks.append(rows.maskable & ~masks[0])
        for masked in masks:
            noisy, positions, attention = np.where(masked, config.mask_token_id, rows.ids), None, own_row(rows)
            if config.attention == "block":
                noisy, positions, attention = noisy_and_clean(noisy, rows.ids, config.block_length)
            targets = np.full_like(noisy, -100)
            targets[:, : masked.shape[1]][masked] = rows.ids[masked]
            noisy, targets, positions, attention = (
                torch.as_tensor(a, device=device) if isinstance(a, np.ndarray) else a
                for a in (noisy, targets, positions, attention))  # fmt: skip
            total = total - model(noisy, targets, positions=positions, attention=attention).cpu().numpy()
    prompts = train_set.spans[examples, 1] - train_set.spans[examples, 0]
    return [row[a:b] / max(1, draws) for row, a, b in zip(total, prompts, sizes, strict=False)]
