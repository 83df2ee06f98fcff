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

from data import uniforms
from plumbing.config import InputError

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
    lengths: np.ndarray  # (B,) tokens of each example


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
    "positions", "attention" (both for model.forward), "tokens", "read" and "pairs" (see `forward_cost`), "count"}; loss of a
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
    read, pairs = forward_cost(config, ends)
    return {"examples": np.asarray(examples), "tokens": int(rows.lengths.sum()), "read": read, "pairs": pairs, **batch}


def forward_cost(config, ends):
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
        rows.lengths[row] = end - start
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
            "count": float((rows.lengths > 0).sum())}  # fmt: skip


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
        return {"ids": noisy, "targets": targets, "positions": None, "attention": padding_mask(rows)}
    ids, positions, attention = noisy_and_clean(noisy, rows.ids, config.block_length)
    targets = np.concatenate([targets, np.full_like(targets, -100)], axis=1)
    return {"ids": ids, "targets": targets, "positions": positions, "attention": attention}


def tensors(batch, device):
    """Its arrays as tensors on `device`; all else as it is."""
    return {k: torch.as_tensor(v, device=device) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def padding_mask(rows):
    """Attention of full models to rows of different lengths: all keys but the padding, (B, 1, 1, T) bool."""
    seen = np.arange(rows.ids.shape[1]) < rows.lengths[:, None]
    return "full" if seen.all() or not rows.lengths.any() else seen[:, None, None]


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
























# ---------------------------------------------------------------------------------------------------------------------
# The command: watch an answer being written






