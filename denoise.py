"""How a masked-diffusion student answers: a canvas of masks, filled block by block.

    for canvas, new in generate(model, [prompt], Sampling(max_new_tokens=64)):   # every forward pass
        ...

Blocks are written from left to right, the positions of a block in any order, several in one forward
pass. `write_in_blocks` is the part of sample.sample that serves such students, `fill_gaps` fills
masks inside of a text.

Shapes: B rows, T tokens of a row, V vocabulary, b rows whose answer is unfinished, N positions
asked about. Next: verify.py.
"""

import functools
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from data import uniforms
from diffusion import check_model
from model import Cache, attention_mask
from plumbing.config import InputError, require
from plumbing.parallel import rank
from sampling import Sampling, check_sampling, next_token, sampling_keys

# --------------------------------------------------------------------------------------------------
# What is asked for, checked and complete


@dataclass
class Decoding(Sampling):
    """Sampling, with everything that was left to the model filled in."""

    eos_ids: list = field(default_factory=list)  # ids that end an answer
    vocab_size: int = 0  # ids from here on never come out; neither does the mask
    schedule: list = field(default_factory=list)  # tokens that each pass of a block writes at least


MAX_POST_STEPS = 16  # passes in which a block without masks may still be edited (LLaDA2.1)


def resolve_decoding(config, prompts, sampling, eos_ids=None, vocab_size=None, answer=True):
    """A Sampling -> a complete Decoding. answer False: only masks in the prompts are filled.

    Raises InputError: a value out of range, a prompt that is empty, has an id outside the
    vocabulary or leaves no room in the model's context, a block length that does not divide, fewer
    steps than blocks, a mask id outside the vocabulary, LLaDA's keys for a block model.
    """
    check_model(config)
    check_sampling(config, prompts, sampling)
    is_block_model = config.attention == "block"
    rule = Decoding(**sampling_keys(sampling))
    # LLaDA2 was trained on one block length, LLaDA on none: its public default is 32
    if not rule.block_length:
        default = config.block_length if is_block_model else min(32, rule.max_new_tokens)
        rule.block_length = default
    require(
        rule,
        block_length=(1, None),
        threshold=(0, 1),
        denoising_steps=(0, None),
        cfg_scale=(0, None),
        remasking=("low_confidence", "random", "left_to_right"),
        eos_rule=("free", "last", "never"),
        edit_threshold=(None, 1),
    )
    check_together(config, rule)
    check_room(config, prompts, rule.max_new_tokens if answer else 0)

    # a tokenizer may lack an end-of-turn
    eos_ids = config.eos_token_ids if eos_ids is None else eos_ids
    rule.eos_ids = [i for i in eos_ids if i is not None]
    rule.vocab_size = vocab_size or config.vocab_size
    if is_block_model and rule.remasking == "low_confidence":
        rule.threshold = rule.threshold or 0.95
    # passes are shared out evenly over the blocks, and tokens over the passes of a block
    blocks = -(-rule.max_new_tokens // rule.block_length)
    steps = rule.denoising_steps or blocks * rule.block_length
    if steps < blocks or steps % blocks:
        raise InputError(
            f"--denoising_steps={steps}: must be a multiple of the {blocks} blocks of the answer"
        )
    passes = steps // blocks
    base, more = divmod(rule.block_length, passes)
    # LLaDA: the first `more` passes of a block write one token more than the others
    counts = [base + 1] * more + [base] * (passes - more)
    rule.schedule = [count for count in counts if count]
    return rule


def check_together(config, rule):
    """Raise InputError for keys that exclude each other, or that this model does not have."""
    is_block_model = config.attention == "block"
    if is_block_model and rule.block_length != config.block_length:
        warn(
            f"--block_length={rule.block_length}, but this model was trained for "
            f"{config.block_length}"
        )
    if is_block_model and rule.cfg_scale:
        raise InputError(f"--cfg_scale={rule.cfg_scale}: only for LLaDA, not for block models")
    about_confidence = {"threshold": rule.threshold > 0, "eos_rule": rule.eos_rule == "last"}
    for key, is_set in about_confidence.items():
        if is_set and rule.remasking != "low_confidence":
            raise InputError(
                f"--{key}={getattr(rule, key)} and --remasking={rule.remasking} exclude each "
                "other: in that order confidence plays no part"
            )
    if not is_block_model and rule.max_new_tokens % rule.block_length:
        raise InputError(
            f"--block_length={rule.block_length} does not divide "
            f"--max_new_tokens={rule.max_new_tokens}"
        )


def check_room(config, prompts, max_new_tokens):
    """Raise InputError for a prompt that leaves no room for the answer in the model's context."""
    # beyond its context a model answers too, and badly: rotary embeddings know no end
    context = config.max_position_embeddings  # 0: unknown
    for number, prompt in enumerate(prompts):
        if 0 < context < len(prompt) + max_new_tokens:
            raise InputError(
                f"prompt {number} of {len(prompt)} tokens and --max_new_tokens={max_new_tokens} "
                f"are longer than the model's context of {context}"
            )


def end_of_text(config, eos_ids):
    """Which of the ids that end an answer is end-of-text, and not the end of a turn -> a list.

    It is the one with which LLaDA's and LLaDA2's answers are padded. An answer must still be able
    to end when end-of-text is forbidden (LLaDA's logits_eos_inf), by its end-of-turn.
    """
    # the ids have no names here: padding is what tells them apart
    if config.pad_token_id in eos_ids:
        return [config.pad_token_id]
    own = [i for i in config.eos_token_ids if i in eos_ids]
    return [min(own)] if own else list(eos_ids)


@functools.cache
def warn(text):
    """Say once, and not on standard output, that something asked for is unusual."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Prompts in, answers out


def write_in_blocks(
    model, prompts, sampling, *, example_ids=None, eos_ids=None, rows=None, finished=None, **keys
):
    """Answers, lists of ids, `rows` of them at a time. Other arguments as in `sample.sample`, and
    those of `generate`."""
    eos_ids = model.config.eos_token_ids if eos_ids is None else eos_ids
    example_ids = list(range(len(prompts)) if example_ids is None else example_ids)
    rows = rows or len(prompts) or 1
    answers = []
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        keys |= {"example_ids": example_ids[start : start + rows], "eos_ids": eos_ids}
        # only the last canvas counts: what came before it is for those who watch
        *_, (canvas, _) = generate(model, batch, sampling, **keys)
        for row, prompt in zip(canvas.tolist(), batch, strict=True):
            written = row[len(prompt) : len(prompt) + sampling.max_new_tokens]
            answers.append(until_end(written, eos_ids))
            if finished:
                finished(len(answers) - 1, answers[-1])
    return answers


def until_end(ids, eos_ids):
    """The ids before the first end-of-text."""
    return ids[: next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))]


def fill_gaps(model, texts, sampling, *, example_ids=None, eos_ids=None, vocab_size=None):
    """Infilling: texts (lists of ids) with masks in them -> the same texts, the masks filled.

    Arguments as in `sample`; sampling.max_new_tokens has no effect: texts grow no longer.
    """
    ids = None
    keys = {"example_ids": example_ids, "eos_ids": eos_ids, "vocab_size": vocab_size}
    for canvas, _ in generate(model, texts, sampling, answer=False, **keys):
        ids = canvas
    if ids is None:  # no masks at all
        return [list(text) for text in texts]
    return [row[: len(text)] for row, text in zip(ids.tolist(), texts, strict=True)]


# --------------------------------------------------------------------------------------------------
# The canvas, block after block


@dataclass
class Canvas:
    """Prompts and the masks in and behind them."""

    ids: torch.Tensor  # (B, T) int64
    holes: torch.Tensor  # (B, T) bool: masks at the start, which are to be filled
    lengths: torch.Tensor  # (B,) tokens of each prompt
    starts: torch.Tensor  # (B,) where the first block with a hole begins
    ends: torch.Tensor  # (B,) where the row ends; nothing sees what lies behind


def lay_canvas(config, prompts, rule, device, answer=True):
    """Prompts (lists of ids) -> Canvas, with masks behind each if there is to be an answer.

    LLaDA's blocks are counted from the first mask on, LLaDA2's from position 0, so that the first
    one may begin inside the prompt; its last block is always whole.
    """
    block = rule.block_length
    room = rule.max_new_tokens if answer else 0
    sizes = [len(prompt) for prompt in prompts]
    mask_id = config.mask_token_id
    first = [list(p).index(mask_id) if mask_id in p else len(p) for p in prompts]
    lengths = torch.tensor(sizes, device=device)
    starts = torch.tensor(first, device=device)
    ends = lengths + room
    if config.attention == "block":
        starts = starts // block * block
        ends = -(-ends // block) * block
    # the longest row decides the width; shorter ones stop being read where they end
    blocks = -(-(ends - starts) // block)
    T = int((starts + blocks * block).max())

    behind = mask_id
    if not answer:  # a block that reaches behind its text ends with end-of-text, as in training
        behind = min(end_of_text(config, rule.eos_ids), default=0)
    ids = torch.full((len(prompts), T), behind, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    # padding behind a short row holds masks too, and is nobody's to fill
    within = torch.arange(T, device=device) < ends[:, None]
    return Canvas(ids, (ids == mask_id) & within, lengths, starts, ends)


@torch.no_grad()
def generate(
    model, prompts, sampling, *, example_ids=None, eos_ids=None, vocab_size=None,
    use_cache=True, answer=True,
):
    """Fill the masks in each prompt (a list of ids) and a canvas of masks behind it.

    Yields canvas (B, T) int64 after every forward pass: prompt, answer so far, masks up to the
    longest row; and new (B, T) bool: written in this pass. Arguments as in `sample`; answer False:
    only the prompts' own masks.

    LLaDA (full attention; ML-GSAI/LLaDA, generate.py): the answer is cut into blocks; a pass reads
    the whole canvas and proposes a token for every mask of the block; those with the highest
    confidence stay, by a fixed schedule or, with a threshold, all that exceed it (Fast-dLLM).
    LLaDA2: the blocks are those of the model, counted from position 0; a pass reads the block and a
    cache of those before it. A row ends with the block in which an end-of-text token is found.
    """
    config = model.config
    rule = resolve_decoding(config, prompts, sampling, eos_ids, vocab_size, answer)
    if not prompts:
        return
    example_ids = list(range(len(prompts)) if example_ids is None else example_ids)
    block = rule.block_length
    device = next(model.parameters()).device
    canvas = lay_canvas(config, prompts, rule, device, answer)
    # with full attention all keys change with every token that is written: nothing can be kept
    cached = use_cache and config.attention == "block"
    cache = cache_before(model, canvas, block) if cached else None
    rows = (canvas.starts < canvas.ends).nonzero().squeeze(1)  # which are not finished
    if cache and len(rows) < len(prompts):
        cache.keep_rows(rows)
    number = 0  # which block of theirs
    while len(rows):
        # rows are at their own places: prompts differ in length
        first = canvas.starts[rows] + number * block  # (b,)
        span = first[:, None] + torch.arange(block, device=device)  # (b, block)
        noise_keys = [(f"{rule.seed} {number}", example_ids[row]) for row in rows.tolist()]
        for written in denoise(model, canvas, rows, span, rule, noise_keys, cache):
            new = torch.zeros_like(canvas.holes)
            new[rows[:, None], span] = written
            # a copy: the next pass writes into the canvas
            yield canvas.ids.clone(), new
        left = unfinished_rows(canvas, rows, span, rule)  # (b,) bool
        if cache and left.any():
            cache_block(model, canvas, rows, span, block, left, cache)
        rows = rows[left]
        number += 1


def unfinished_rows(canvas, rows, span, rule):
    """After a block: whose answer neither ended in it nor has come to the row's end, (b,) bool."""
    ids = canvas.ids[rows[:, None], span]
    is_answer = span >= canvas.lengths[rows, None]  # an end in the prompt ends nothing
    ended = is_in(ids, rule.eos_ids) & is_answer
    return ~ended.any(1) & (span[:, -1] + 1 < canvas.ends[rows])


def cache_before(model, canvas, block):
    """A Cache of what lies before the first block with a mask in it."""
    cache = Cache(model.config, *canvas.ids.shape)
    if canvas.starts.max() > 0:
        # behind a shorter prompt this writes masks, overwritten before anything sees them
        before = canvas.ids[:, : canvas.starts.max()]
        at = torch.arange(before.shape[1], device=before.device)[None]
        sight = block_sight(model.config, at, block)
        model(before, cache=cache, attention=sight, logits_at=torch.zeros_like(canvas.lengths))
    return cache


def cache_block(model, canvas, rows, span, block, left, cache):
    """Put a finished block into the cache, of those rows that are left, and drop the others."""
    if not left.all():
        cache.keep_rows(left)  # what is finished need not be read any more
    # keys and values made while there were masks are not those of the text: once more
    ids = canvas.ids[rows[left, None], span[left]]
    at_first = torch.zeros_like(rows[left])
    sight = block_sight(model.config, span[left], block)
    model(ids, positions=span[left], cache=cache, attention=sight, logits_at=at_first)


# --------------------------------------------------------------------------------------------------
# One block


def denoise(model, canvas, rows, span, rule, noise_keys, cache):
    """Fill one block of the rows in place; yields (b, block) bool, what every forward pass wrote.

    rows (b,) of the canvas and span (b, block): where their block lies. With an edit threshold,
    written tokens are replaced as well, also for some passes after the last mask is gone
    (LLaDA2.1), until nothing changes.
    """
    answer = canvas.holes[rows[:, None], span]  # (b, block): what may be written at all
    editing = rule.edit_threshold >= 0
    # a row has settled when a pass without masks changed nothing; post: passes without masks
    settled = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    post = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    # the schedule fills the block; only editing goes on after that
    for step in range(len(rule.schedule) + MAX_POST_STEPS * editing):
        ids = canvas.ids[rows[:, None], span]  # (b, block)
        masked = answer & (ids == model.config.mask_token_id)
        unfinished = masked.any(1)
        if editing:
            post += ~unfinished
            unfinished |= ~settled & (post <= MAX_POST_STEPS) & answer.any(1)
        if not unfinished.any():
            return
        # what is written stays, unless it may be edited: the prompt never is
        asked = (answer if editing else masked) & unfinished[:, None]
        logits = predict(model, canvas, rows, span, rule, cache)  # (b, block, V)
        u = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        if rule.temperature or rule.remasking == "random":  # else nothing is drawn
            u, shuffled = draws(noise_keys, step, span)  # (b, block) each
        token, sure = propose(logits[asked], u[asked], rule, model.config)  # (N,) each
        tokens = ids.masked_scatter(asked, token)
        order = p = torch.zeros_like(u).masked_scatter(asked, sure)  # (b, block)
        # the order decides which proposals stay; those that do not are proposed anew
        if rule.remasking == "random":
            order = shuffled
        elif rule.remasking == "left_to_right":
            order = -span.double()
        count = rule.schedule[min(step, len(rule.schedule) - 1)]
        written = commit(order, masked, count, rule.threshold)
        if editing:
            edited = asked & ~masked & (tokens != ids) & (p > rule.edit_threshold)
            settled = ~masked.any(1) & ~edited.any(1)
            written |= edited
        canvas.ids[rows[:, None], span] = torch.where(written, tokens, ids)
        yield written


def draws(noise_keys, step, span):
    """Uniforms of each position of the block, (b, block) each: for its token, for an order."""
    # a function of (seed, example id, block, pass, position), so batches do not matter. One uniform
    # a token, inverted through the distribution: LLaDA's float64 argmax of exp(logits) /
    # (-ln u)^temperature draws from the same one, with a vocabulary of uniforms for every token
    n = span.shape[1]
    u = np.stack([uniforms(f"{key} {step}", example, 2 * n) for key, example in noise_keys])
    return torch.from_numpy(u).to(span.device).chunk(2, dim=1)


def predict(model, canvas, rows, span, rule, cache):
    """Logits at the positions `span` of the rows, (b, block, V)."""
    config = model.config
    if cache is not None:  # the block alone: what is before it lies in the cache
        sight = block_sight(config, span, rule.block_length)
        return model(canvas.ids[rows[:, None], span], positions=span, cache=cache, attention=sight)
    at = torch.arange(canvas.ids.shape[1], device=rows.device)
    if config.attention == "block":  # nothing behind the block is seen, so nothing is read
        end = span.max() + 1
        sight = block_sight(config, at[None, :end], rule.block_length)
        return model(canvas.ids[rows, :end], attention=sight, logits_at=span)
    ids = canvas.ids[rows]
    seen = (at < canvas.ends[rows, None])[:, None, None]  # (b, 1, 1, T): no padding
    if not rule.cfg_scale:
        return model(ids, attention="full" if seen.all() else seen, logits_at=span)
    # classifier-free guidance: away from what the model would write without the prompt
    # prompt blanked out: one batch of twice the rows, since two passes cost more
    blank = torch.where(at < canvas.lengths[rows, None], config.mask_token_id, ids)
    seen = seen.repeat(2, 1, 1, 1)
    both = model(torch.cat([ids, blank]), attention=seen, logits_at=span.repeat(2, 1))
    conditional, unconditional = both.chunk(2)
    return unconditional + (rule.cfg_scale + 1) * (conditional - unconditional)


def block_sight(config, positions, block):
    """Attention of queries at `positions` (B, T) to all keys up to the last, by blocks."""
    if block == config.block_length:
        return None  # the model does that by itself
    keys = torch.arange(int(positions.max()) + 1, device=positions.device)[None]
    return attention_mask("block", positions, keys, block)


def propose(logits, u, rule, config):
    """logits (N, V), uniforms (N,) -> a token for each position and its confidence, (N,) each.

    As in LLaDA's code, confidence is the probability in the softmax of the raw logits among all
    ids, although the mask and what only pads the vocabulary cannot be proposed. (LLaDA2's own
    takes, at temperatures above 0, that after temperature, top_k and top_p.) eos_rule never:
    end-of-text is not among them (its logits_eos_inf). last: what ends an answer may be proposed, but leaves
    the softmax of the confidence, in which the others share its part, and has confidence 0
    (confidence_eos_eot_inf, as it was meant: LLaDA#137).
    """
    logits = logits.double()  # as LLaDA's code: in float32 near ties would turn
    # LLaDA answers a block's last positions with end-of-text early on, being trained on padding:
    # that is what both rules are against
    if rule.eos_rule == "never":
        never = end_of_text(config, rule.eos_ids)
        logits[:, [i for i in never if i < logits.shape[1]]] = -torch.inf
    rest = logits
    if rule.eos_rule == "last":
        ends = [i for i in rule.eos_ids if i < logits.shape[1]]
        rest = logits.clone()
        rest[:, ends] = -torch.inf
    logp = rest.log_softmax(-1)
    # after the softmax: LLaDA's confidence counts what cannot be proposed
    logits[:, config.mask_token_id] = -torch.inf
    logits[:, rule.vocab_size :] = -torch.inf
    token = next_token(logits, u, rule)
    return token, logp.gather(1, token[:, None]).squeeze(1).exp()


def commit(order, masked, count, threshold):
    """Which masked positions are written now, (b, block) bool.

    The `count` highest in `order`, or, where more exceed the threshold, all of these. Ties go to
    the leftmost. (LLaDA2's >; Fast-dLLM's >= differs at exactly the threshold.)
    """
    order = order.masked_fill(~masked, -torch.inf)
    # ranks rather than topk: with ties topk may take any of them
    best_first = order.argsort(dim=-1, descending=True, stable=True)
    rank = best_first.argsort(dim=-1)
    chosen = masked & (rank < count)
    if threshold:
        chosen |= masked & (order > threshold)
    return chosen


def is_in(ids, some):
    """ids, any shape -> bool of the same shape: is it one of `some`?"""
    return torch.isin(ids, torch.tensor(sorted(some), dtype=ids.dtype, device=ids.device))
