"""From a prompt to an answer, for both kinds of student.

    python sample.py --model=M --prompt="Why is the sky blue?"
    python sample.py --model=M --chat=true                    # several turns, until Ctrl-D
    python sample.py --model=M --prompt="The capital of ░░░ is Paris."  # diffusion: fill gaps

M is a Hugging Face folder or hub id. On a terminal the answer appears while it is being written;
into a file or a pipe goes the answer alone.

An autoregressive student writes one token after the other. A masked-diffusion student fills a
canvas of masks, block by block from left to right, the positions of a block in any order. `sample`
serves both; eval.py and train.py call it.

Shapes: B rows, T tokens of a row, V vocabulary, b rows whose answer is unfinished, N positions
asked about. Next: verify.py.
"""

import functools
import sys
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from data import uniforms
from diffusion import check_model
from hf.families import at_revision, local_folder, read_config
from hf.tokenizer import load_tokenizer
from model import Cache, attention_mask, load
from plumbing.config import InputError, above, command, require
from plumbing.parallel import pick_device, pick_dtype, rank


@dataclass
class Sampling:
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


@dataclass
class Config(Sampling):
    model: str = ""  # the student: a Hugging Face folder or hub id
    revision: str = ""  # of a hub id: the branch, tag or commit
    prompt: str = ""  # what it is asked; with mask words in it: a text whose gaps are filled
    mask_word: str = "░"  # each stands for one token to be filled in
    chat: bool = False  # ask again and again; every turn sees those before it
    temperature: float = 0.0  # 0: greedy, always the likeliest token
    max_new_tokens: int = 128  # length limit of an answer
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 on a GPU, float32 elsewhere


# --------------------------------------------------------------------------------------------------
# Prompts in, answers out


def sample(
    model,
    prompts,
    sampling,
    *,
    example_ids=None,
    eos_ids=None,
    vocab_size=None,
    batch_size=64,
    progress=None,
    finished=None,
):
    """Answer each prompt (a list of ids) -> ids for each, up to and without an end-of-text id.

    sampling     a Sampling; an answer of sampling.max_new_tokens ids was cut off
    example_ids  names of the prompts; default 0, 1, ... What is drawn for a prompt is a pure
                 function of (seed, its name, position), so an answer depends on no other prompt,
                 batch or order. (Logits differ by rounding, 1e-6 or so, with the shape of a batch,
                 which can turn a near tie.)
    eos_ids      ids that end an answer; default: the model's own
    vocab_size   ids from here on (rows that pad the embedding) never come out
    progress     called with the number of finished answers
    finished     called with each answer as soon as it is: the number of its prompt, its ids

    Raises InputError for a value out of range, or a prompt the model cannot read.
    """
    check_sampling(model.config, prompts, sampling)
    if batch_size < 1:
        raise InputError(f"--batch_size={batch_size}: must be at least 1")
    example_ids = range(len(prompts)) if example_ids is None else example_ids
    eos_ids = set(model.config.eos_token_ids if eos_ids is None else eos_ids)
    answers = [None] * len(prompts)
    # longest first: if memory is too short, it shows at once
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done = 0

    def keep(number, ids):
        nonlocal done
        done += 1
        answers[order[number]] = ids
        if finished:
            finished(order[number], ids)
        if progress:
            progress(done)

    known = {"eos_ids": eos_ids, "vocab_size": vocab_size}
    names = [example_ids[i] for i in order]
    prompts = [prompts[i] for i in order]
    if not model.config.is_diffusion:
        known |= {"rows": batch_size, "finished": keep}
        write_left_to_right(model, prompts, sampling, example_ids=names, **known)
        return answers
    for start in range(0, len(order), batch_size):
        batch = slice(start, start + batch_size)
        texts = write_in_blocks(model, prompts[batch], sampling, example_ids=names[batch], **known)
        for number, text in enumerate(texts, start):
            keep(number, text)
    return answers


def until_end(ids, eos_ids):
    """The ids before the first end-of-text."""
    return ids[: next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))]


# --------------------------------------------------------------------------------------------------
# From logits to a token


def check_sampling(config, prompts, sampling):
    """Raise InputError for a value out of range, or a prompt that is empty or has a strange id."""
    require(
        sampling,
        temperature=(0, None),
        top_p=(above(0), 1),
        top_k=(0, None),
        max_new_tokens=(1, None),
    )
    for number, prompt in enumerate(prompts):
        if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(
                f"prompt {number} is empty or has an id outside the vocabulary of "
                f"{config.vocab_size}"
            )


MASKED_DIFFUSION = (
    "block_length",
    "denoising_steps",
    "threshold",
    "remasking",
    "cfg_scale",
    "eos_rule",
    "edit_threshold",
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


def next_token(logits, u, temperature, top_p, top_k):
    """logits (B, V), uniforms u (B,) -> ids (B,): inverse CDF over ids in their order.

    Temperature 0: the likeliest.
    As in transformers: temperature, then top_k, then top_p of what is left (with the id that
    crosses it). In float32, with float64 logits in float64. Raises InputError for logits that are
    not finite.
    """
    if temperature == 0:
        best, token = logits.max(-1)
    else:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        p = torch.softmax(logits / temperature, -1)
        if top_k or top_p < 1:
            p = p.masked_fill(p < least_likely(p, top_p, top_k), 0)
        cdf = p.cumsum(-1, dtype=torch.float64)
        best = cdf[:, -1]
        # the first id whose cdf exceeds u: so its probability is not 0
        token = torch.searchsorted(cdf, (u * best)[:, None], right=True).squeeze(1)
    if not torch.isfinite(best).all():
        raise InputError("the model's logits are not finite, nothing can be sampled from it")
    return token


def least_likely(p, top_p, top_k):
    """The smallest probability that may still be sampled, (B, 1)."""
    likeliest = p.topk(min(top_k or 1024, p.shape[-1])).values  # falling
    # 1024 tokens rarely hold less than top_p; only then sort the whole vocabulary
    if not top_k and (likeliest.sum(-1) < top_p).any():
        likeliest = p.sort(descending=True).values
    mass = likeliest.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:] if top_k else 1.0
    beyond = mass - likeliest >= top_p * total
    return likeliest.masked_fill(beyond, torch.inf).amin(-1, keepdim=True)


# --------------------------------------------------------------------------------------------------
# Autoregressive students: one token after the other


@torch.no_grad()
def write_left_to_right(
    model, prompts, sampling, *, example_ids, eos_ids, vocab_size=None, heard=None, rows=None, finished=None
):
    """Answers, lists of ids, `rows` of them at a time. Other arguments as in `sample`.

    Continuous batching (Orca, OSDI 2022): a finished answer makes room for the next prompt, so no
    row waits for the longest answer of its batch. The rows being written are the first of the
    cache; the last of them moves to where one has finished, and only that row is copied.

    heard: called with every new token's prompt and id, while the answer is being written.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    answers = [[] for _ in prompts]
    waiting = list(range(len(prompts)))
    rows = min(rows or len(prompts), len(prompts))
    if not rows:
        return answers
    slots = []  # whose answer each row of the cache is
    n = sampling.max_new_tokens
    cache = Cache(model.config, rows, max(map(len, prompts)) + n)
    u = torch.zeros(rows, n, dtype=torch.float64, device=device)
    logits = None  # (B, 1, V) behind the last token of each row
    while waiting or slots:
        room = rows - len(slots)
        # prompts are read several at once, which costs less than one by one
        if waiting and (not slots or room >= max(1, rows // 8)):
            new, waiting = waiting[:room], waiting[room:]
            read = read_prompts(model, [prompts[i] for i in new], cache, first=len(slots))
            logits = torch.cat([logits, read]) if slots else read
            for i in new:
                u[len(slots)] = torch.from_numpy(uniforms(sampling.seed, example_ids[i], n))
                slots.append(i)
        count = torch.tensor([len(answers[i]) for i in slots], device=device)  # tokens so far
        token = next_token(
            logits[:, 0, :vocab_size],
            u[torch.arange(len(slots), device=device), count],
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
        )
        done = []
        for row, one in enumerate(token.tolist()):
            i = slots[row]
            if one not in eos_ids:
                answers[i].append(one)
                if heard:
                    heard(i, one)
            if one in eos_ids or len(answers[i]) == n:
                done.append(row)
        for row in reversed(done):  # from the last on, so that the row that moves is not finished
            i = slots[row]
            last = len(slots) - 1
            slots[row] = slots[last]
            slots.pop()
            for part in (u, token, *cache.k, *cache.v):
                part[row] = part[last]
            if finished:
                finished(i, answers[i])
        if slots:
            cache.rows = slice(0, len(slots))
            # the token to be read lies behind the prompt and all tokens before it
            at = torch.tensor([len(prompts[i]) + len(answers[i]) - 1 for i in slots], device=device)
            logits = model(token[: len(slots), None], positions=at[:, None], cache=cache)
    return answers


def read_prompts(model, prompts, cache, first=0):
    """Fill the cache, from row `first` on, with the prompts -> logits behind each prompt's last
    token, (B, 1, V).

    Prompts are padded on the right and each row has its own positions. What padding, or an earlier
    answer, left in the cache lies at later positions than its row has reached, and is overwritten
    before the row gets there.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), lengths.max(), dtype=torch.int64)  # (B, T)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    parts = []
    end = 0
    while end < len(prompts):  # prompts of about the same length together: less padding to compute
        start = end
        while end < len(prompts) and lengths[end] >= 0.8 * lengths[start]:
            end += 1
        cache.rows = slice(first + start, first + end)
        part = ids[start:end, : lengths[start:end].max()].to(device)
        parts.append(model(part, cache=cache, logits_at=lengths[start:end].to(device) - 1))
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# Masked-diffusion students: a canvas of masks, filled block by block from left to right


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
    rule = Decoding(**{f.name: getattr(sampling, f.name) for f in fields(Sampling)})
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

    eos_ids = config.eos_token_ids if eos_ids is None else eos_ids
    rule.eos_ids = [i for i in eos_ids if i is not None]
    rule.vocab_size = vocab_size or config.vocab_size
    if is_block_model and rule.remasking == "low_confidence":
        rule.threshold = rule.threshold or 0.95
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
    if config.pad_token_id in eos_ids:
        return [config.pad_token_id]
    own = [i for i in config.eos_token_ids if i in eos_ids]
    return [min(own)] if own else list(eos_ids)


@functools.cache
def warn(text):
    """Say once, and not on standard output, that something asked for is unusual."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr)


def write_in_blocks(
    model, prompts, sampling, *, example_ids=None, eos_ids=None, vocab_size=None, use_cache=True
):
    """One batch of answers, lists of ids. Arguments as in `sample`."""
    if not prompts:
        return []
    eos_ids = model.config.eos_token_ids if eos_ids is None else eos_ids
    steps = generate(
        model,
        prompts,
        sampling,
        example_ids=example_ids,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        use_cache=use_cache,
    )
    *_, (canvas, _) = steps
    return [
        until_end(row[len(prompt) : len(prompt) + sampling.max_new_tokens], eos_ids)
        for row, prompt in zip(canvas.tolist(), prompts, strict=True)
    ]


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
    blocks = -(-(ends - starts) // block)
    T = int((starts + blocks * block).max())

    behind = mask_id
    if not answer:  # a block that reaches behind its text ends with end-of-text, as in training
        behind = min(end_of_text(config, rule.eos_ids), default=0)
    ids = torch.full((len(prompts), T), behind, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    within = torch.arange(T, device=device) < ends[:, None]
    return Canvas(ids, (ids == mask_id) & within, lengths, starts, ends)


@torch.no_grad()
def generate(
    model,
    prompts,
    sampling,
    *,
    example_ids=None,
    eos_ids=None,
    vocab_size=None,
    use_cache=True,
    answer=True,
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
    cached = use_cache and config.attention == "block"
    cache = cache_before(model, canvas, block) if cached else None
    rows = (canvas.starts < canvas.ends).nonzero().squeeze(1)  # which are not finished
    if cache and len(rows) < len(prompts):
        cache.keep_rows(rows)
    number = 0  # which block of theirs
    while len(rows):
        first = canvas.starts[rows] + number * block  # (b,)
        span = first[:, None] + torch.arange(block, device=device)  # (b, block)
        noise_keys = [(f"{rule.seed} {number}", example_ids[row]) for row in rows.tolist()]
        for written in denoise(model, canvas, rows, span, rule, noise_keys, cache):
            new = torch.zeros_like(canvas.holes)
            new[rows[:, None], span] = written
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
        cache.keep_rows(left)
    # keys and values made while there were masks are not those of the text: once more
    ids = canvas.ids[rows[left, None], span[left]]
    at_first = torch.zeros_like(rows[left])
    sight = block_sight(model.config, span[left], block)
    model(ids, positions=span[left], cache=cache, attention=sight, logits_at=at_first)


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
    for step in range(len(rule.schedule) + MAX_POST_STEPS * editing):
        ids = canvas.ids[rows[:, None], span]  # (b, block)
        masked = answer & (ids == model.config.mask_token_id)
        unfinished = masked.any(1)
        if editing:
            post += ~unfinished
            unfinished |= ~settled & (post <= MAX_POST_STEPS) & answer.any(1)
        if not unfinished.any():
            return
        asked = (answer if editing else masked) & unfinished[:, None]
        logits = predict(model, canvas, rows, span, rule, cache)  # (b, block, V)
        u = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        if rule.temperature or rule.remasking == "random":  # else nothing is drawn
            u, shuffled = draws(noise_keys, step, span)  # (b, block) each
        token, sure = propose(logits[asked], u[asked], rule, model.config)  # (N,) each
        tokens = ids.masked_scatter(asked, token)
        order = p = torch.zeros_like(u).masked_scatter(asked, sure)  # (b, block)
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
    if cache is not None:
        sight = block_sight(config, span, rule.block_length)
        return model(canvas.ids[rows[:, None], span], positions=span, cache=cache, attention=sight)
    at = torch.arange(canvas.ids.shape[1], device=rows.device)
    if config.attention == "block":
        end = span.max() + 1
        sight = block_sight(config, at[None, :end], rule.block_length)
        return model(canvas.ids[rows, :end], attention=sight, logits_at=span)
    ids = canvas.ids[rows]
    seen = (at < canvas.ends[rows, None])[:, None, None]  # (b, 1, 1, T): no padding
    if not rule.cfg_scale:
        return model(ids, attention="full" if seen.all() else seen, logits_at=span)
    # classifier-free guidance: away from what the model would write without the prompt
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
    if rule.eos_rule == "never":
        never = end_of_text(config, rule.eos_ids)
        logits[:, [i for i in never if i < logits.shape[1]]] = -torch.inf
    rest = logits
    if rule.eos_rule == "last":
        ends = [i for i in rule.eos_ids if i < logits.shape[1]]
        rest = logits.clone()
        rest[:, ends] = -torch.inf
    logp = rest.log_softmax(-1)
    logits[:, config.mask_token_id] = -torch.inf
    logits[:, rule.vocab_size :] = -torch.inf
    token = next_token(logits, u, rule.temperature, rule.top_p, rule.top_k)
    return token, logp.gather(1, token[:, None]).squeeze(1).exp()


def commit(order, masked, count, threshold):
    """Which masked positions are written now, (b, block) bool.

    The `count` highest in `order`, or, where more exceed the threshold, all of these. Ties go to
    the leftmost. (LLaDA2's >; Fast-dLLM's >= differs at exactly the threshold.)
    """
    order = order.masked_fill(~masked, -torch.inf)
    best_first = order.argsort(dim=-1, descending=True, stable=True)
    rank = best_first.argsort(dim=-1)
    chosen = masked & (rank < count)
    if threshold:
        chosen |= masked & (order > threshold)
    return chosen


def is_in(ids, some):
    """ids, any shape -> bool of the same shape: is it one of `some`?"""
    return torch.isin(ids, torch.tensor(sorted(some), dtype=ids.dtype, device=ids.device))


# --------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Answer one prompt -> the answer's text. With --chat=true, turn by turn until the input ends.

    Raises InputError for whatever cannot work, before weights are read where that can be known.
    """
    cfg = Config(**given)
    if not cfg.model:
        raise InputError("--model is missing (--help lists the keys)")
    if not cfg.prompt and not cfg.chat:
        raise InputError(
            "--prompt is missing (--help lists the keys); "
            "--chat=true asks for one turn after the other"
        )
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    folder = local_folder(at_revision(cfg.model, cfg.revision))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if cfg.chat and not tokenizer.template:
        raise InputError(
            f"{folder}: no chat template, so there is no --chat=true; ask with --prompt"
        )
    check_used([config], cfg)
    if config.is_diffusion:
        resolve_decoding(config, [], cfg)
    else:
        check_sampling(config, [], cfg)

    student = load(folder, device, dtype)
    answer = ""
    turns = []
    for question in questions(cfg):
        if cfg.mask_word and cfg.mask_word in question:
            answer = fill_in(student, tokenizer, question, cfg)
            continue
        turns.append({"role": "user", "content": question})
        answer = speak(student, tokenizer, turns, cfg)
        turns.append({"role": "assistant", "content": answer})
    return answer


def questions(cfg):
    """--prompt, if given; then, in a chat, the lines of standard input until it ends."""
    if cfg.prompt:
        yield cfg.prompt
    while cfg.chat:
        try:
            line = next_line()
        except EOFError:
            return
        if line.strip():
            yield line


def next_line():
    """A line of standard input. Who types it is shown a "> ", which must not get into a pipe."""
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input("> ")  # with the arrow keys, where Python has readline
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def speak(student, tokenizer, turns, cfg):
    """Answer the last of the turns -> its text; a terminal shows it while it is being written."""
    prompt = tokenizer.encode_prompt(turns)
    known = ends_and_size(student, tokenizer)
    terminal = sys.stdout.isatty()
    if student.config.is_diffusion and terminal:
        answer = draw(student, tokenizer, prompt, cfg, known)
    elif terminal:
        answer = stream(student, tokenizer, prompt, cfg, known)
    else:
        [answer] = sample(student, [prompt], cfg, example_ids=[0], **known)
    text = tokenizer.decode(answer)
    if not terminal:
        print(text, flush=True)
    return text


def ends_and_size(student, tokenizer):
    """Ids that end an answer, and how many ids the tokenizer knows: keywords of `sample`."""
    eos_ids = {*student.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id}
    return {"eos_ids": eos_ids - {None}, "vocab_size": tokenizer.vocab_size}


def fill_in(student, tokenizer, text, cfg):
    """Fill the gaps of a text, each mask word one token; show it as `speak` does -> the text.

    The text is read as it is, without the chat template, special tokens in it are what they are
    called. Raises InputError for an autoregressive student, which cannot look ahead.
    """
    config = student.config
    if not config.is_diffusion:
        raise InputError(
            f"--prompt has a {cfg.mask_word} in it, and {config.model_type} is autoregressive: "
            "only masked-diffusion students fill gaps (--mask_word= takes it for text)"
        )
    ids = [tokenizer.bos_token_id] * tokenizer.adds_bos
    for number, part in enumerate(text.split(cfg.mask_word)):
        ids += [config.mask_token_id] * (number > 0) + tokenizer.encode(part)
    known = ends_and_size(student, tokenizer)
    if sys.stdout.isatty():
        filled = draw(student, tokenizer, ids, cfg, known, answer=False)
    else:
        [filled] = fill_gaps(student, [ids], cfg, **known)
    text = tokenizer.decode(filled[tokenizer.adds_bos :])
    if not sys.stdout.isatty():
        print(text, flush=True)
    return text


def stream(student, tokenizer, prompt, cfg, known):
    """Print an autoregressive answer token by token -> its ids."""
    ids, shown = [], ""

    def show(row, token):
        nonlocal shown
        ids.append(token)
        # the rest of a character may come with the next token
        text = tokenizer.decode(ids).rstrip("\ufffd")
        print(printable(text[len(shown) :]), end="", flush=True)
        shown = text

    [answer] = write_left_to_right(student, [prompt], cfg, example_ids=[0], heard=show, **known)
    print(printable(tokenizer.decode(answer)[len(shown) :]))
    return answer


def draw(student, tokenizer, prompt, cfg, known, answer=True):
    """Draw the canvas after every forward pass, on a screen of its own -> the answer's ids.

    answer False: of a text whose gaps are filled, the text's ids.
    """
    shown = len(prompt) if answer else 0  # from here on
    mask_id = student.config.mask_token_id
    passes = written = 0
    print("\x1b[?1049h", end="")
    try:
        for canvas, new in generate(student, [prompt], cfg, answer=answer, **known):
            passes += 1
            written += int(new.sum())
            text = paint(tokenizer, canvas[0, shown:], new[0, shown:], mask_id)
            print(f"\x1b[H\x1b[Jpass {passes}, {written} tokens\n\n{text}", flush=True)
    finally:
        print("\x1b[?1049l", end="")  # back to the ordinary screen
    ids = canvas[0].tolist()
    if answer:
        ids = until_end(ids[shown : shown + cfg.max_new_tokens], known["eos_ids"])
        written = len(ids)
    else:
        ids = ids[: len(prompt)]
    print(printable(tokenizer.decode(ids)))
    print(f"({written} tokens, {passes} forward passes)", flush=True)
    return ids


def paint(tokenizer, ids, new, mask_id):
    """The canvas as text: a shade for every mask, and what is new in green."""
    kind = torch.where(ids == mask_id, 2, new.long()).tolist()
    parts = []
    at = 0
    while at < len(ids):  # runs of equal kind together: a character may be cut over two tokens
        end = at + 1
        while end < len(ids) and kind[end] == kind[at]:
            end += 1
        text = "░" * (end - at) if kind[at] == 2 else printable(tokenizer.decode(ids[at:end]))
        parts.append(f"\x1b[{(0, 32, 90)[kind[at]]}m{text}\x1b[0m")
        at = end
    return "".join(parts)


def printable(text):
    """What a model writes must not steer the terminal: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


if __name__ == "__main__":
    command(main, Config)
