"""Masked diffusion: how text is corrupted for training, and what a student is confident of.

A masked-diffusion model sees a text x_t in which some tokens are the mask M, and says at each mask
which token stood there: position i predicts token i itself, not the next one.

    batch = corrupt_batch(config, train_set, examples, Corruption(), seed=0, step=7, length=90)
    nll = student(batch["ids"], batch["targets"], positions=..., attention=...)   # train.py
    logp = confidence(student, train_set, examples)                               # trajectory.py

The objectives are LLaDA's and LLaDA2's. T3S changes the corruption in two ways: the tokens that
fell (yet-to-learn) are masked more often than the others, as in the paper; or those that rose (the
anchors) leave the loss, which is not in the paper.

Shapes: B rows, T tokens of a row. Arrays are numpy's until the model reads them. Next: two_copies.py.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

import two_copies
from data import uniforms
from plumbing.config import InputError, above, require

EPSILON = 1e-3  # LLaDA's smallest masking probability, so that 1 / p stays finite


@dataclass
class Corruption:
    # how masked-diffusion students are trained (autoregressive ones have no use for these)
    objective: str = ""  # llada, llada_pretrain or block; default: the family's fine-tuning loss
    weighting: str = ""  # of block: mean (default) or 1/t
    t_min: float = -1.0  # least noise level; -1: 0.001 for LLaDA, 0.3 for block
    t_max: float = -1.0  # greatest noise level; -1: 1 for LLaDA, 0.8 for block
    complementary: bool = False  # each example twice, with a mask and with its complement
    # what a selection does to a masked-diffusion student
    anchors: str = "visible"  # of kind keep, what is not kept: visible (never masked) or unscored
    forced_odds: float = 0.0  # of kind force: odds of being masked over the others'; 0: always
    forced_budget: str = "same"  # with forced_odds: same (the others are masked less) or more
    forced_below: float = 1.0  # nothing is forced in rows of this noise level and above
    forced_weight: str = "one"  # of a forced token under a 1/p loss: one or t


# --------------------------------------------------------------------------------------------------
# Corruption: which tokens of which example are masked, a pure function of (seed, step, example)


@dataclass
class Rows:
    """Clean examples, laid out for an objective."""

    ids: np.ndarray  # (B, T) int64, x_0: the examples, and end-of-text up to T
    maskable: np.ndarray  # (B, T) bool: what the objective may mask
    forced: np.ndarray  # (B, T) bool: what T3S masks in any case, or at higher odds
    weight: np.ndarray  # (B, T) how much a masked token counts: 1, or the selection's; 0 at prompts
    u: np.ndarray  # (B, 1 + T) uniforms: u[0] becomes the level t; i is masked where u[1 + i] < t
    complement: np.ndarray  # (B, 1) bool: the second one of a complementary pair
    lengths: np.ndarray  # (B,) tokens of each example
    ends: np.ndarray  # (B,) where the row ends; nothing sees what lies behind it


def corrupt_batch(
    config, train_set, examples, corruption, *, seed, step, length, forced=None, kept=None, device="cpu"
):
    """One micro-batch of a masked-diffusion objective, in five steps, for train.train_step.

    config, train_set  the student's families.Config and a data.Data
    examples       (n,) indices into it; none give one row without targets and count 0
    corruption     a Corruption: the objective and its noise
    seed, step     with the example's id they fix its noise, whatever else is in the batch
    length         tokens of the longest example of the whole optimizer step: what `llada` pads to
    forced         T3S (paper, 4.2): (n_tokens,) over the data set's tokens, select.py's kind force.
                   These tokens are always masked: the mask is the random one UNION forced
    kept           (n_tokens,) of kind keep. What is not kept, the anchors, leaves the loss and the
                   normaliser; corruption.anchors says whether it is still masked
                   Both are bool, or float32 >= 0: the weight of a token's loss when it is masked.
                   What is both forced and not kept is treated as not kept

    Returns a dict: "ids", "targets" (-100 where not masked), "weights" float32, all (B, T), or
    (B, 2T) for a block model; "positions" and "attention" for Transformer.forward; "count", this
    batch's part of the normaliser; "examples"; "tokens", "read" and "pairs" as `forward_cost` says.
    Raises InputError for keys that do not go together, as resolve_corruption says.
    """
    corruption = resolve_corruption(config, corruption)
    objective = corruption.objective

    # 1. x_0: the examples as rows of clean tokens, each row once or, for complementary pairs, twice
    # (only `llada` pads each row to the longest: its end-of-text pads are answer, and trained on)
    sizes = train_set.spans[examples, 2] - train_set.spans[examples, 0]
    if len(sizes) and sizes.max() > length:
        raise InputError(
            f"length {length} is less than the {sizes.max()} tokens of the longest example"
        )
    ends = np.full_like(sizes, length) if objective == "llada" else row_ends(config, sizes)
    prompt_too = objective == "llada_pretrain"
    rows = lay_out(config, train_set, examples, ends, f"{seed} {step}", prompt_too)
    apply_selection(rows, train_set.spans[examples], corruption, forced, kept)
    if corruption.complementary:
        rows = in_pairs(rows)

    # 2. the mask: a noise level t for each row, every token by chance t, UNION what is forced
    masked, p, level = add_noise(rows, corruption)

    # 3. inverse probability, by which LLaDA's losses weigh. The paper leaves open what it is for
    #    forced tokens. one: that of the token itself, so each counts 1 on average, as it does
    #    without T3S. t: that of its row, on average ln(1 / EPSILON) = 6.9 times as much
    inverse_p = 1 / p  # (B, T)
    if corruption.forced_weight == "t":
        inverse_p = np.where(rows.forced, 1 / level, inverse_p)

    # 4. what the model reads, x_t, and what it predicts: x_0 where x_t is masked (and scored)
    batch = hide(rows, masked, config, device, scored=masked & (rows.weight > 0))

    # 5. how much each prediction counts, and this batch's part of what the step divides its sum by:
    # counts are added up over all micro-batches first, so the loss does not depend on their cut
    weights, count = OBJECTIVES[objective](rows, masked, inverse_p, corruption.weighting)
    if config.attention == "block":
        weights = np.tile(weights, 2)  # the clean copy has no targets

    batch |= {"weights": weights.astype(np.float32), "count": count}
    batch |= {"examples": np.asarray(examples), "tokens": int(rows.lengths.sum())}
    return tensors(batch, device) | forward_cost(config, rows.ends)


def check_keys(config, keys):
    """Raise InputError for keys of train.Config that do not fit this student.

    Of a masked-diffusion student: as resolve_corruption. Of an autoregressive one: a key of
    Corruption that was changed, since it would have no effect.
    """
    if config.is_diffusion:
        resolve_corruption(config, keys)
        return
    for key, default in {**asdict(Corruption()), "confidence_draws": 0}.items():
        value = getattr(keys, key)
        # a run that ignored it would look like an experiment with this key, and be none
        if value != default:
            raise InputError(
                f"--{key}={value} is about masked-diffusion students, and {config.model_type} "
                "is autoregressive"
            )


def resolve_corruption(config, corruption):
    """A Corruption -> a new one, the family's own objective and noise levels filled in.

    corruption: a Corruption, or any object with its keys, such as train.Config. Raises InputError
    for a model that is no masked-diffusion model, an unknown objective or one of the other family,
    a range of noise levels outside 0..1, a key that would have no effect beside the others.
    """
    check_model(config)
    keys = Corruption(**{key: getattr(corruption, key) for key in asdict(Corruption())})
    # attention tells the families apart; a loss of one runs on the other too, but teaches it wrong
    keys.objective = keys.objective or {"full": "llada", "block": "block"}[config.attention]
    if keys.objective not in OBJECTIVES:
        raise InputError(f"--objective={keys.objective}: must be one of {', '.join(OBJECTIVES)}")
    if (keys.objective == "block") != (config.attention == "block"):
        raise InputError(
            f"--objective={keys.objective} is not for {config.model_type}, "
            f"which attends {config.attention}"
        )
    # dFactory trains in this band: where almost nothing or almost everything is masked, little is
    # learned. LLaDA's losses are bounds on the likelihood, which need every level
    low, high = (0.3, 0.8) if keys.objective == "block" else (EPSILON, 1.0)
    keys.t_min = low if keys.t_min == -1 else keys.t_min
    keys.t_max = high if keys.t_max == -1 else keys.t_max
    check_corruption(keys)
    return keys


def check_corruption(keys):
    """Raise InputError for keys of a resolved Corruption out of range, or without effect."""
    require(
        keys,
        anchors=("visible", "unscored"),
        forced_weight=("one", "t"),
        forced_budget=("same", "more"),
        forced_odds=(0, 1e6),
        forced_below=(above(0), 1),
    )
    weighting_fits = keys.weighting in ("mean", "1/t") and keys.objective == "block"
    if keys.weighting and not weighting_fits:
        raise InputError(
            f"--weighting={keys.weighting}: must be mean or 1/t, and only block objectives have it"
        )
    divides = keys.objective != "block" or keys.weighting == "1/t"  # by p, so p must not be 0
    in_order = 0 <= keys.t_min <= keys.t_max <= 1
    if not in_order or keys.t_max == 0 or (divides and keys.t_min == 0):
        raise InputError(
            f"--t_min={keys.t_min} --t_max={keys.t_max}: must be 0 < t_min <= t_max <= 1 "
            "(0 only without 1/t)"
        )
    if keys.forced_weight != "one" and not divides:
        raise InputError(
            f"--forced_weight={keys.forced_weight} has no effect: objective block with weighting "
            "mean counts all masked tokens alike (--weighting=1/t divides by the probability)"
        )
    if keys.forced_budget != "same" and not keys.forced_odds:
        raise InputError(
            f"--forced_budget={keys.forced_budget} has no effect without --forced_odds"
        )
    if 0 < keys.forced_odds < 1:  # yet-to-learn tokens would be masked less, the reverse of T3S
        raise InputError(
            f"--forced_odds={keys.forced_odds}: must be 0 (always masked) or at least 1"
        )
    if keys.forced_below <= keys.t_min:
        raise InputError(
            f"--forced_below={keys.forced_below}: no noise level lies below it "
            f"(t_min is {keys.t_min})"
        )


def check_selection(corruption, forced, kept):
    """Raise InputError for a key about a selection that is not there.

    corruption as given, not yet resolved; forced and kept as for corrupt_batch.
    """
    defaults = Corruption()
    about = {"anchors": kept}
    # forced_budget is not here: it needs forced_odds, as check_corruption says
    about |= dict.fromkeys(("forced_odds", "forced_below", "forced_weight"), forced)
    for key, mask in about.items():
        value = getattr(corruption, key)
        if mask is None and value != getattr(defaults, key):
            kind = "keep" if key == "anchors" else "force"
            raise InputError(f"--{key}={value} has no effect without a --selection of kind {kind}")


def check_data(config, train_set):
    """Raise InputError for an example longer than the model's context, or with a mask in it."""
    sizes = train_set.spans[:, 2] - train_set.spans[:, 0]
    context = config.max_position_embeddings  # 0: unknown
    if 0 < context < sizes.max(initial=0):
        example = train_set.examples[int(sizes.argmax())]["id"]
        raise InputError(
            f"{train_set.folder}: example {example} of {sizes.max()} tokens is longer than the "
            f"model's context of {context}; leave such out with data.py --max_tokens={context}"
        )
    # a mask in clean text cannot be told from noise, and as a target it would teach to write masks
    found = np.flatnonzero(train_set.tokens == config.mask_token_id)
    if len(found):
        row = int(np.searchsorted(train_set.spans[:, 2], found[0], side="right"))
        raise InputError(
            f"{train_set.folder}: token {found[0] - train_set.spans[row, 0]} of example "
            f"{train_set.examples[row]['id']} is the mask (id {config.mask_token_id}), which "
            "training text must not contain; take it out and run data.py again"
        )


def check_model(config):
    """Raise InputError unless this is a masked-diffusion model whose mask is one of its ids."""
    if not config.is_diffusion:
        raise InputError(f"{config.model_type} is no masked-diffusion model")
    if config.mask_token_id is None or not 0 <= config.mask_token_id < config.vocab_size:
        raise InputError(
            f"mask_token_id {config.mask_token_id} is not one of the model's "
            f"{config.vocab_size} ids"
        )


def row_ends(config, sizes):
    """Where a row ends: with its example, or with the last block that the example reaches into.

    sizes (n,) tokens of each example -> (n,).
    """
    if config.attention != "block":
        return sizes
    # at decoding time a block is always whole; the model learns to end by filling up its last one
    blocks = -(-sizes // config.block_length)
    return blocks * config.block_length


def lay_out(config, train_set, examples, ends, noise_key, prompt_too=False):
    """Examples -> Rows. What lies between the end of an example and `ends` is answer like the rest.

    noise_key, with the example's id, decides the row's uniforms; prompt_too: prompts are maskable.
    Rows are as long as the longest `ends`. Raises InputError as check_data does.
    """
    # pads are end-of-text, as in LLaDA's and LLaDA2's own data: so an answer learns where to stop
    pad_id = config.pad_token_id
    if pad_id is None:
        pad_id = min(config.eos_token_ids, default=None)
    if pad_id is None:
        raise InputError(
            "config.json names neither pad_token_id nor eos_token_id, so answers cannot be padded"
        )
    # without examples still one row: other processes wait for this one's part in every forward
    B = max(1, len(examples))
    shortest = config.block_length if config.attention == "block" else 1  # without examples
    T = int(ends.max(initial=shortest))
    rows = Rows(
        ids=np.full((B, T), pad_id, dtype=np.int64),
        maskable=np.zeros((B, T), dtype=bool),
        forced=np.zeros((B, T), dtype=bool),
        weight=np.zeros((B, T)),
        u=np.zeros((B, 1 + T)),
        complement=np.zeros((B, 1), dtype=bool),
        lengths=np.zeros(B, dtype=np.int64),
        ends=np.zeros(B, dtype=np.int64),
    )
    for row, example in enumerate(examples):
        start, prompt_end, end = train_set.spans[example]
        size = end - start
        first = 0 if prompt_too else prompt_end - start
        rows.lengths[row] = size
        rows.ends[row] = ends[row]
        rows.ids[row, :size] = train_set.tokens[start:end]
        rows.maskable[row, first : ends[row]] = True
        rows.weight[row, first : ends[row]] = 1.0
        # by the example's id, not its place: neither batch size nor GPU count changes its noise,
        # and the first uniforms of a stream do not depend on T, which the longest row decides
        rows.u[row] = uniforms(noise_key, train_set.examples[example]["id"], 1 + T)
    # looked for in these rows; check_data goes through all of the data, to name the example
    if (rows.ids == config.mask_token_id).any() or rows.lengths.max() > (
        config.max_position_embeddings or np.inf
    ):
        check_data(config, train_set)
    return rows


def apply_selection(rows, spans, corruption, forced, kept):
    """Lay the selections over the rows, in place. spans (n, 3) of the rows' examples."""
    for row, (start, prompt_end, end) in enumerate(spans):
        # responses only: pads, and prompts in pre-training, have no confidence to be selected by
        answer = slice(prompt_end - start, end - start)
        if kept is not None:
            rows.weight[row, answer] *= kept[prompt_end:end]
        if forced is not None:
            chosen = forced[prompt_end:end]
            rows.forced[row, answer] = chosen > 0
            rows.weight[row, answer] *= np.where(chosen > 0, chosen, 1.0)
    # visible: what is not scored is context, as for an autoregressive student, whose anchors stay
    # in the text. unscored: the model sees as much noise as without T3S, and only the loss changes
    if corruption.anchors == "visible":
        rows.maskable &= rows.weight > 0
    # to mask what does not count would only hide context
    rows.forced &= rows.weight > 0


def in_pairs(rows):
    """Every row twice, the second time with the complement of the first one's mask (LLaDA2 report).

    Forced tokens are masked in both.
    """
    # of a single row the visible tokens teach nothing; of a pair every token is a target once
    pairs = Rows(**{key: np.repeat(value, 2, axis=0) for key, value in vars(rows).items()})
    pairs.complement[1::2] = True  # u is the same in both rows, so the masks do not overlap
    return pairs


def add_noise(rows, corruption):
    """-> masked (B, T) bool, p (B, T) the probability of each token to be masked, level (B, 1).

    corruption: a resolved Corruption.
    """
    t_min, t_max = corruption.t_min, corruption.t_max
    # LLaDA's p = (1 - eps) t + eps is the case t_min = eps, t_max = 1
    t = t_min + (t_max - t_min) * rows.u[:, :1]  # (B, 1)
    # the second row of a pair masks what the first does not: 1 - t, which is 0 at t = 1
    level = np.where(rows.complement, np.maximum(1 - t, EPSILON), t)
    p = np.repeat(t, rows.ids.shape[1], axis=1)  # (B, T)
    # with odds a forced token is hidden more often, but at times it is context for the others
    if corruption.forced_odds:
        tilted = tilt(t, rows, corruption.forced_odds, corruption.forced_budget)
        p = np.where(t < corruption.forced_below, tilted, p)
    masked = ((rows.u[:, 1:] < p) ^ rows.complement) & rows.maskable
    p = np.where(rows.complement, np.maximum(1 - p, EPSILON), p)
    # the paper's union, after the complement is taken: else the second row would show what the
    # first one forces. forced_below spares the noisiest rows, where little is left to infer from
    if not corruption.forced_odds:
        always = rows.forced & (level < corruption.forced_below)
        masked |= always
        p[always] = 1.0  # that is their probability now, so 1 / p counts them once
    return masked, p, level


def tilt(t, rows, w, budget):
    """Masking probabilities (B, T): forced tokens have w times the odds p / (1 - p) of the others.

    budget same: as many tokens are masked on average as without forcing: with f the share of forced
    ones among what may be masked and q the probability of the others,

        f w q / (1 + (w - 1) q) + (1 - f) q = t

    w = 1 gives t to all. As w grows, forced tokens are masked first, and what the budget leaves
    over goes to the others. more: q = t, the forced ones on top; as w grows, the paper's union.
    """
    # odds, because w times a probability may exceed 1, and w times the odds never does
    q = t
    if budget == "same":
        forced = (rows.forced & rows.maskable).sum(1, keepdims=True)
        f = forced / np.maximum(1, rows.maskable.sum(1, keepdims=True))
        a = (1 - f) * (w - 1)
        b = 1 + (w - 1) * (f - t)
        root = np.sqrt(b * b + 4 * a * t)
        # the root of a q^2 + b q = t in 0..1, in the form that does not cancel. np.where computes
        # both forms everywhere: (b <= 0) keeps the one that is not taken from dividing by 0
        q = np.where(b > 0, 2 * t / (b + root + (b <= 0)), (root - b) / np.maximum(2 * a, EPSILON))
    of_forced = w * q / (1 + (w - 1) * q)
    return np.clip(np.where(rows.forced, of_forced, q), 1e-12, 1.0)  # 1 / p stays finite


# --------------------------------------------------------------------------------------------------
# What the model reads and predicts


def hide(rows, masked, config, device, scored=None):
    """Rows of which `masked` is hidden -> {"ids", "targets", "positions", "attention"}.

    Arrays still, but for the attention of a block model, which depends on the device. A full model
    reads x_t, (B, T); a block model x_t and x_0, (B, 2T), at positions 0..T-1 twice.
    Only masked positions of x_t (if given, only `scored` ones) have a target: their own token.
    """
    # no shift: position i predicts token i. What is visible needs no prediction, it can be copied
    noisy = np.where(masked, config.mask_token_id, rows.ids)  # x_t
    targets = np.where(masked if scored is None else scored, rows.ids, -100)
    if config.attention != "block":
        attention = padding_mask(rows)
        return {"ids": noisy, "targets": targets, "positions": None, "attention": attention}
    # the clean copy is only read: it sees itself, so to predict from it would be to copy
    targets = np.concatenate([targets, np.full_like(targets, -100)], axis=1)
    ids = np.concatenate([noisy, rows.ids], axis=1)
    T = noisy.shape[1]
    positions = np.tile(np.arange(T), 2)[None]
    attention = two_copies.attention(T, config.block_length, device)
    return {"ids": ids, "targets": targets, "positions": positions, "attention": attention}


def padding_mask(rows):
    """Attention of full models to rows that end at different places: (B, 1, 1, T) bool, or "full".

    A row sees all of itself and nothing behind its end.
    """
    # "full" where no mask is needed, for the faster kernel; also without examples, where a row that
    # sees nothing would have a softmax over nothing, nan
    seen = np.arange(rows.ids.shape[1]) < rows.ends[:, None]
    return "full" if seen.all() or not rows.ends.any() else seen[:, None, None]


def forward_cost(config, ends):
    """Rows that end at `ends` (B,) -> {"read": tokens through the net, "pairs": query and key}."""
    if config.attention != "block":
        return {"read": int(ends.sum()), "pairs": int((ends * ends).sum())}
    blocks = ends // config.block_length
    # two copies, and block k of either sees k blocks: twice 1 + 2 + ... + blocks
    seen_blocks = blocks * (blocks + 1)
    return {"read": 2 * int(ends.sum()), "pairs": config.block_length**2 * int(seen_blocks.sum())}


def tensors(batch, device):
    """The dict with its arrays as tensors on `device`; everything else as it is."""
    moved = {}
    for key, value in batch.items():
        # examples are read on this side only, by batches.py and train.py
        is_array = isinstance(value, np.ndarray) and key != "examples"
        moved[key] = torch.as_tensor(value, device=device) if is_array else value
    return moved


# --------------------------------------------------------------------------------------------------
# Objectives: (rows, masked, inverse_p, weighting) -> weights of the masked tokens, normaliser
#
# w_i is the weight of token i: 1 where nothing is selected, 0 for anchors that left the loss. The
# normaliser counts what is scored, so that a loss does not shrink with the selection.


def llada_pretrain(rows, masked, inverse_p, weighting):
    """LLaDA's pre-training loss (arXiv 2502.09992, eq. 3; ML-GSAI/LLaDA, GUIDELINES.md):

        L = - 1 / (sum of w_i)  sum over i of  w_i 1[x_t^i = M] / p  log p_theta(x_0^i | x_t)

    Prompt and response alike, and the normaliser counts all tokens, masked or not. Rows are not
    padded with text: nothing sees what is behind their end.
    """
    # LLaDA cuts one batch in a hundred to a random length, so that not all are 4096 tokens long;
    # examples here differ in length anyway. All tokens are counted, not the masked ones: 1 / p
    # makes up for the others, and a count that varies with the mask would bias the bound
    return inverse_p * rows.weight, float(rows.weight.sum())


def llada_sft(rows, masked, inverse_p, weighting):
    """LLaDA's fine-tuning loss (arXiv 2502.09992, eq. 5; GUIDELINES.md):

        L = - 1 / B  sum over b of  1 / L'_b  sum over i of
                w_i 1[x_t^i = M] / p  log p_theta(x_0^i | prompt, x_t)

    with L'_b the sum of w_i in the answer of row b, which without a selection is its length. The
    prompt is never masked. Answers are padded with end-of-text to the length of the step, and these
    pads are answer: masked, seen, scored. B counts the rows in which something is scored.
    """
    # divided row by row, so that every example counts alike, however long its answer is
    answer = rows.weight.sum(1, keepdims=True)  # (B, 1), L'
    # a row of anchors alone has nothing to say, and would pull the mean of the others down
    scored = answer > 0
    return inverse_p * rows.weight / np.where(scored, answer, 1.0), float(scored.sum())


def block_sft(rows, masked, inverse_p, weighting):
    """LLaDA2's block-diffusion fine-tuning loss, all blocks in one pass.

    dFactory, train_llada2_bd.py:

        L = - 1 / n  sum over i of
                w_i 1[x_t^i = M]  log p_theta(x_0^i | x_t of its block, x_0 of the blocks before)

    weighting mean: n is the sum of w_i of the masked tokens. 1/t: each term is
    divided by p, and n is the sum over all answer tokens; for t from next to 0 to 1 this is the
    report's bound on the negative log-likelihood. An example ends with its last block: the pads up
    to there are answer, what lies behind is seen by nothing (dFactory pads to 2048).
    """
    if weighting == "1/t":
        return inverse_p * rows.weight, float(rows.weight.sum())
    # as dFactory: a mean over what is masked; every prediction counts alike at every noise level
    return rows.weight, float(rows.weight[masked].sum())


OBJECTIVES = {"llada_pretrain": llada_pretrain, "llada": llada_sft, "block": block_sft}


# --------------------------------------------------------------------------------------------------
# Confidence: what a diffusion model itself thinks of every response token


@torch.no_grad()
def confidence(model, train_set, examples, draws=0, seed=0):
    """Log-probability of every response token -> a list of (response tokens,) float32 arrays.

    draws 0   one forward pass with the whole response masked (as d1 does, dllm-reasoning/d1): the
              least that a token can be known by. Block models see the blocks before a token's own
    draws K   the mean of K, each from a random mask and its complement in the response, so that
              every token is scored once in every draw; noise levels are stratified over 0..1: the
              k-th lies between k / K and (k + 1) / K

    The noise is a function of (seed, example, draw). No examples: as many forward passes, no
    arrays, so that a process without work still takes part.
    """
    config = model.config
    device = next(model.parameters()).device
    check_model(config)
    # every level, and no selection: a measure must not depend on how the student is trained
    plain = Corruption(t_min=0.0, t_max=1.0)
    spans = train_set.spans[examples]
    sizes = spans[:, 2] - spans[:, 0]
    prompts = spans[:, 1] - spans[:, 0]
    total = 0.0  # (B, T) negative log-likelihoods
    for k in range(max(1, draws)):
        # the key does not name the checkpoint: two of them are compared on the same masks, which
        # takes most of the noise out of delta
        rows = lay_out(config, train_set, examples, row_ends(config, sizes), f"{seed} draw {k}")
        # stratified: K levels spread evenly vary less than K drawn freely; 1.0 masks everything
        rows.u[:, 0] = (k + rows.u[:, 0]) / draws if draws else 1.0
        masked, _, _ = add_noise(rows, plain)
        # a mask alone leaves tokens without a score; with its complement each has one, and only one
        masks = [masked, rows.maskable & ~masked] if draws else [masked]
        for masked in masks:
            nll = model(**tensors(hide(rows, masked, config, device), device))
            total = total - nll.cpu().numpy()
    mean = total / max(1, draws)
    return [row[a:b] for row, a, b in zip(mean, prompts, sizes, strict=False)]
