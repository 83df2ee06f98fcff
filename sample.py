"""From a prompt to an answer, for both kinds of student.

    python sample.py --model=M --prompt="Why is the sky blue?"
    python sample.py --model=M --chat=true                    # several turns, until Ctrl-D
    python sample.py --model=M --prompt="The capital of ░░░ is Paris."  # diffusion: fill gaps

M is a Hugging Face folder or hub id. On a terminal the answer appears while it is being written;
into a file or a pipe goes the answer alone.

An autoregressive student writes one token after the other, which is here; how a masked-diffusion
student fills a canvas of masks is in denoise.py. `sample` serves both; eval.py, collect.py and
train.py call it. What the keys of `Sampling` do to a distribution is in sampling.py.

Shapes: B rows, T tokens of a row, V vocabulary. Next: denoise.py.
"""

import itertools
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import uniforms
from denoise import fill_gaps, generate, resolve_decoding, until_end, write_in_blocks
from hf.families import at_revision, local_folder, read_config
from hf.tokenizer import load_tokenizer
from model import Cache, load, whole_tiles
from plumbing.config import InputError, command
from plumbing.parallel import pick_device, pick_dtype
from sampling import Sampling, check_greedy, check_sampling, check_used, next_token


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
    model, prompts, sampling, *, example_ids=None, eos_ids=None, vocab_size=None,
    batch_size=64, progress=None, finished=None,
):
    """Answer each prompt (a list of ids) -> ids for each, up to and without an end-of-text id.

    sampling     a Sampling; an answer of sampling.max_new_tokens ids was cut off
    example_ids  names of the prompts; default 0, 1, ... What is drawn for a prompt is a pure
                 function of (seed, its name, position), so an answer depends on no other prompt,
                 batch or order. (With the shape of a batch logits differ by rounding, 1e-6 or so,
                 which can turn a near tie; not where Rows says so.)
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
    # longest first: if memory is too short, it shows at once
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [None] * len(prompts)
    done = 0

    # in the caller's order again, although answers end in any order
    def keep(number, ids):
        nonlocal done
        done += 1
        answers[order[number]] = ids
        if finished:
            finished(order[number], ids)
        if progress:
            progress(done)

    write = write_in_blocks if model.config.is_diffusion else write_left_to_right
    write(
        model,
        [prompts[i] for i in order],
        sampling,
        example_ids=[example_ids[i] for i in order],
        eos_ids=set(model.config.eos_token_ids if eos_ids is None else eos_ids),
        vocab_size=vocab_size,
        rows=batch_size,
        finished=keep,
    )
    return answers


def ends_and_size(student, tokenizer):
    """Ids that end an answer, and how many ids the tokenizer knows: keywords of `sample`."""
    # chat models are trained to end a turn, which is not always the end of the text
    eos_ids = {*student.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id}
    return {"eos_ids": eos_ids - {None}, "vocab_size": tokenizer.vocab_size}


# --------------------------------------------------------------------------------------------------
# Autoregressive students: one token after the other


@torch.no_grad()
def write_left_to_right(
    model, prompts, sampling, *, example_ids, eos_ids, vocab_size=None,
    rows=None, finished=None, heard=None,
):
    """Answers, lists of ids, `rows` of them at a time. Other arguments as in `sample`.

    Continuous batching (Orca, OSDI 2022): a finished answer makes room for the next prompt, so no
    row waits for the longest answer of its batch.

    heard: called with every new token's prompt and id, while the answer is being written.
    """
    answers = [[] for _ in prompts]
    if not prompts:
        return answers
    waiting = list(range(len(prompts)))
    rows = rows or len(prompts)
    batch = Rows(model, prompts, answers, sampling, rows)
    while waiting or batch.slots:
        room = rows - len(batch.slots)
        # prompts are read several at once, which costs less than one by one; but rows that wait for
        # company write nothing meanwhile, so an eighth of the batch is enough
        if waiting and (not batch.slots or room >= max(1, rows // 8)):
            new, waiting = waiting[:room], waiting[room:]
            batch.read(new, [example_ids[i] for i in new])
        token = next_token(batch.logits[:, 0, :vocab_size], batch.uniforms(), sampling)  # (B,)
        done = []
        for row, one in enumerate(token.tolist()):
            i = batch.slots[row]
            if one not in eos_ids:  # the end is no part of the answer
                answers[i].append(one)
                if heard:
                    heard(i, one)
            if one in eos_ids or len(answers[i]) == sampling.max_new_tokens:
                done.append(row)
        for row in reversed(done):  # from the last on, so that the row that moves is not finished
            i = batch.remove(row, token)
            if finished:
                finished(i, answers[i])
        if batch.slots:
            batch.step(token)
    return answers


class Rows:
    """The answers that are being written: the first rows of a cache, without a gap.

    slots   whose answer each row is, numbers of prompts
    logits  (B, 1, V) behind the last token of each row

    With WHOLE rows or more a dense student's answers in float32 on a CPU depend on no other row to
    the last bit: the kernels then compute each row alike, whatever its neighbours. So fewer answers
    are written beside empty rows, keys are seen in whole tiles, and prompts of different numbers of
    tiles are read apart. That was found by trying (docs/LOG.md), and is no promise of any kernel.
    """

    WHOLE = 12

    def __init__(self, model, prompts, answers, sampling, rows):
        self.model = model
        self.prompts = prompts
        self.answers = answers
        self.seed = sampling.seed
        n = sampling.max_new_tokens
        self.device = next(model.parameters()).device
        self.least = self.WHOLE if rows >= self.WHOLE and self.device.type == "cpu" else 1
        rows = max(self.least, min(rows, len(prompts)))
        # allocated once at its largest: growing it would copy it for every token
        self.cache = Cache(model.config, rows, whole_tiles(max(map(len, prompts)) + n))
        # float64: a uniform is compared with sums of up to 150,000 probabilities
        self.u = torch.zeros(rows, n, dtype=torch.float64, device=self.device)
        self.slots = []
        self.logits = None

    def read(self, new, example_ids):
        """Give the prompts `new` the rows behind the others'."""
        some = [self.prompts[i] for i in new]
        logits = read_prompts(self.model, some, self.cache, first=len(self.slots))
        self.logits = torch.cat([self.logits, logits]) if self.slots else logits
        for i, name in zip(new, example_ids, strict=True):
            # all uniforms that the answer can need: they depend on no other answer
            self.u[len(self.slots)] = torch.from_numpy(uniforms(self.seed, name, self.u.shape[1]))
            self.slots.append(i)

    def uniforms(self):
        """For the next token of each row, (B,)."""
        written = [len(self.answers[i]) for i in self.slots]
        at = torch.tensor(written, device=self.device)
        return self.u[torch.arange(len(written), device=self.device), at]

    def remove(self, row, token):
        """Drop a row -> its prompt's number. The last one moves there, its part of `token` too."""
        i = self.slots[row]
        last = len(self.slots) - 1
        self.slots[row] = self.slots[last]
        self.slots.pop()
        # no gap is left, so that the model reads the first rows and never a list of them
        # only this one row is copied, whatever the batch
        for part in (self.u, token, *self.cache.k, *self.cache.v):
            part[row] = part[last]
        return i

    def step(self, token):
        """Let the model read each row's new token, the first of `token` -> new logits."""
        # it lies behind the prompt and all tokens before it
        at = [len(self.prompts[i]) + len(self.answers[i]) - 1 for i in self.slots]
        written = len(at)
        empty = max(0, self.least - written)
        at = torch.tensor(at + [0] * empty, device=self.device)
        token = F.pad(token[:written], (0, empty))
        self.cache.rows = slice(0, len(at))
        logits = self.model(token[:, None], positions=at[:, None], cache=self.cache)
        self.logits = logits[:written]


def read_prompts(model, prompts, cache, first=0):
    """Fill the cache, from row `first` on, with the prompts -> logits behind each prompt's last
    token, (B, 1, V).

    Prompts are padded on the right and each row has its own positions. What padding, or an earlier
    answer, left in the cache lies at later positions than its row has reached, and is overwritten
    before the row gets there.
    """
    device = next(model.parameters()).device
    parts = []
    # the caller sorted them by length, so those of equally many tiles are neighbours
    for width, some in itertools.groupby(prompts, key=lambda prompt: whole_tiles(len(prompt))):
        some = list(some)
        ids = torch.zeros(len(some), width, dtype=torch.int64)  # (B, T)
        for row, prompt in zip(ids, some, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        cache.rows = slice(first, first + len(some))
        first += len(some)
        # logits of one position only: those of a whole prompt would be its length times as large;
        # four times that one, since the head computes fewer rows than four in another way
        last = torch.tensor([[len(prompt) - 1] * 4 for prompt in some], device=device)
        parts.append(model(ids.to(device), cache=cache, logits_at=last)[:, :1])
    return torch.cat(parts)


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
    check_greedy(given, cfg)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    folder = local_folder(at_revision(cfg.model, cfg.revision))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    # without a template a second turn cannot be told from the first
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
        # gaps are filled in the text itself, which is no turn of a conversation
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
    prompt = tokenizer.encode_prompt(turns)  # all turns anew: a template may change earlier ones
    known = ends_and_size(student, tokenizer)
    terminal = sys.stdout.isatty()
    if student.config.is_diffusion and terminal:
        answer = draw(student, tokenizer, prompt, cfg, known)
    elif terminal:
        answer = stream(student, tokenizer, prompt, cfg, known)
    else:
        [answer] = sample(student, [prompt], cfg, example_ids=[0], **known)
    text = tokenizer.decode(answer)
    if not terminal:  # a terminal has seen it already
        print(text, flush=True)
    return text


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
        # decoded from the start, since the rest of a character may come with the next token
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
    # the alternate screen: what was on the terminal before is not overwritten
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


PLAIN, GREEN, GREY = 0, 32, 90  # a terminal's codes (SGR)


def paint(tokenizer, ids, new, mask_id):
    """The canvas as text: a shade for every mask, and what is new in green."""
    colours = torch.where(ids == mask_id, GREY, torch.where(new, GREEN, PLAIN)).tolist()
    parts = []
    # runs of one colour together: a character may be cut over two tokens
    pairs = zip(colours, ids.tolist(), strict=True)
    for colour, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        run = [token for _, token in run]
        text = "░" * len(run) if colour == GREY else printable(tokenizer.decode(run))
        parts.append(f"\x1b[{colour}m{text}\x1b[0m")
    return "".join(parts)


def printable(text):
    """What a model writes must not steer the terminal: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


if __name__ == "__main__":
    command(main, Config)
