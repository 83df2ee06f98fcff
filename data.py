"""Text to token arrays: a file of examples becomes a flat token index, which everything else reads.

    python data.py --source=traces.jsonl --tokenizer=Qwen/Qwen3-0.6B --out=data/traces

A line of the source is {"id", "prompt" or "messages", "response", "answer"} (id and answer may be
left out), GSM8K's {"question", "answer" ending in "#### n"}, or one of the layouts in
docs/DATA.md. The folder it becomes:

    tokens.bin      uint32, all examples one after the other
    spans.npy       (n, 3) int64: start, prompt end, end of each example in tokens.bin
    examples.jsonl  id and answer of each example, in the same order
    meta.json       hashes of all that, of the tokenizer and the chat template, and what was counted

Every per-token array of this project (log-probabilities, masks) has the length of tokens.bin and
the same index: token 4711 is token 4711 everywhere.

Next: formats.py.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats import parse_columns, read_examples
from hf.families import at_revision, local_folder
from hf.template import cut, fixed_date, parse_kwargs, uncut
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError, command, read_json, require, whole_folder, write_json
from plumbing.tally import Tally, report
from verify import VERIFIERS, opens_thoughts, unmatchable

FILES = ("tokens.bin", "spans.npy", "examples.jsonl")


@dataclass
class Config:
    source: str = ""  # a file of examples: jsonl (also .gz), a JSON array, or parquet
    tokenizer: str = ""  # the student's Hugging Face folder or hub id
    revision: str = ""  # of a hub id: the branch, tag or commit
    out: str = ""  # the folder to write
    max_tokens: int = 0  # leave out (and count) examples with more tokens than this; 0: no limit
    verifier: str = "auto"  # how eval.py reads answers: boxed, gsm8k, integer, toy, or auto
    require_correct: bool = False  # leave out (and count) what does not end in its answer
    template: str = "auto"  # auto: the checkpoint's own; none: the text is rendered already
    template_kwargs: str = ""  # the template's variables: '{"enable_thinking": false}'
    date: str = ""  # what a template that writes today's date takes for today, YYYY-MM-DD
    thoughts: str = "template"  # a field of thoughts: the template writes it, or tags: <think>
    columns: str = ""  # columns to read, not guessed: prompt:question,thoughts:cot,response:output
    ignore: str = ""  # columns and keys of messages to leave out, though they mean something


# ------------------------------------------------------------------------------------------------
# A file of examples -> data folder


def main(**given):
    """Write the folder `out`, whole or not at all.

    Raises InputError with file and line of the first bad example.
    """
    cfg = Config(**given)
    check(cfg)
    cfg.tokenizer = at_revision(cfg.tokenizer, cfg.revision)
    tokenizer = load_tokenizer(local_folder(cfg.tokenizer))
    if tokenizer.end_of_turn_id is None:
        raise InputError(
            f"{cfg.tokenizer}: tokenizer_config.json names no eos_token, so no answer would end"
        )
    render = Renderer(cfg, tokenizer)
    with whole_folder(cfg.out, "meta.json") as out:
        meta, tally, unread = write_arrays(cfg, render, out)
        write_json(out / "meta.json", meta | hashes(out))
    report(cfg, render, load(cfg.out), tally, unread)


def check(cfg):
    for key in ("source", "tokenizer", "out"):
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")
    require(
        cfg,
        verifier=VERIFIERS,
        max_tokens=(0, None),
        template=("auto", "none"),
        thoughts=("template", "tags"),
    )
    if not Path(cfg.source).is_file():
        what = "a folder, not a jsonl file" if Path(cfg.source).is_dir() else "no such file"
        raise InputError(f"{cfg.source}: {what}")


def write_arrays(cfg, render, out):
    """tokens.bin, spans.npy and examples.jsonl of cfg.source into the folder `out`.

    -> meta.json's entries on them, the Tally, and the columns that were not read: {name: number}.
    """
    limits = Limits(cfg, render.tokenizer.folder)
    tally = Tally(cfg)
    spans = []
    unread = {}
    end = 0
    with (
        open(out / "tokens.bin", "wb") as tokens,
        open(out / "examples.jsonl", "w", encoding="utf-8") as examples,
    ):
        columns = parse_columns(cfg.columns)
        for example in read_examples(cfg.source, columns, cfg.ignore.split(","), unread):
            try:
                prompt, response = render(example)
                prompt_ids, response_ids = render.encode(prompt, response)
                too_long = limits.check(prompt_ids + response_ids)
                check_answer(example.answer, cfg.verifier)
            except InputError as error:
                raise InputError(f"{example.where}: {error}") from None
            if not tally.count(example, prompt, response, too_long):
                continue
            np.array(prompt_ids + response_ids, dtype="<u4").tofile(tokens)
            examples.write(json.dumps(line_of(example, prompt), ensure_ascii=False) + "\n")
            spans.append((end, end + len(prompt_ids), end + len(prompt_ids) + len(response_ids)))
            end = spans[-1][2]
    if not spans:
        why = f"{tally.counts['too_long']} longer than {cfg.max_tokens} tokens"
        why += f", {tally.counts['not_correct']} not correct" if cfg.require_correct else ""
        raise InputError(f"{cfg.source}: no usable example ({why})")
    np.save(out / "spans.npy", np.array(spans, dtype=np.int64))
    return describe(cfg, render, spans, tally), tally, unread


def line_of(example, prompt):
    """An example's line of examples.jsonl."""
    line = {"id": example.id, "answer": example.answer}
    if opens_thoughts(prompt):  # so an answer that is cut off is all thoughts
        line["thinking"] = True
    return line


def describe(cfg, render, spans, tally):
    """meta.json: what the arrays are made from, and how."""
    return {
        "n_examples": len(spans),
        "n_tokens": spans[-1][2],
        "too_long": tally.counts["too_long"],
        "max_tokens": cfg.max_tokens,
        "verifier": cfg.verifier,
        "source": str(cfg.source),
        "tokenizer": str(cfg.tokenizer),
        "tokenizer_hash": render.tokenizer.hash,
        **render.meta,
        "counts": dict(tally.counts),
        "command": sys.argv,
    }


def check_answer(answer, verifier):
    """Raise InputError for an answer that no response can match: accuracy would silently be 0."""
    why = answer is not None and unmatchable(answer, verifier)
    if why:
        raise InputError(f'"answer" {why}')


class Renderer:
    """Examples -> texts of prompt and response -> token ids.

    meta  the chat template and the variables that did it
    """

    def __init__(self, cfg, tokenizer):
        self.tokenizer = tokenizer
        self.has_template = cfg.template == "auto" and tokenizer.template is not None
        self.tags = cfg.thoughts == "tags"
        self.kwargs = parse_kwargs(cfg.template_kwargs)
        if (self.kwargs or cfg.date) and not self.has_template:
            raise InputError(
                "--template_kwargs and --date are for a chat template, and there is none"
            )
        try:
            self.date = {"strftime_now": fixed_date(cfg.date)}
        except ValueError:
            raise InputError(f"--date={cfg.date}: must be a day, such as 2026-11-25") from None
        self.meta = {
            "template_hash": tokenizer.template_hash if self.has_template else None,
            "template_kwargs": self.kwargs,
            "date": cfg.date,
        }

    def __call__(self, example):
        if self.has_template:
            variables = self.date | self.kwargs | example.variables
            return cut(self.tokenizer, example.messages, example.turn, variables, self.tags)
        return uncut(self.tokenizer, example.messages, example.turn, example.variables, self.tags)

    def encode(self, prompt, response):
        if self.has_template:
            prompt_ids = self.tokenizer.encode(prompt)
        else:
            prompt_ids = self.tokenizer.encode_bare(prompt)
        if not prompt_ids:
            raise InputError("the prompt has no token")
        return prompt_ids, self.tokenizer.encode_response(response)


class Limits:
    """What an example must fit into.

    That is --max_tokens, and the student's context and embedding where the folder has a
    config.json.
    """

    def __init__(self, cfg, folder):
        path = folder / "config.json"
        raw = read_json(path) if path.exists() else {}
        self.max_tokens = cfg.max_tokens
        self.context = raw.get("max_position_embeddings") or raw.get("max_sequence_length")
        self.vocab_size = raw.get("embedding_size") or raw.get("vocab_size")
        scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if (
            self.context
            and scaling.get("original_max_position_embeddings")
            and scaling.get("factor")
        ):
            stretched = int(scaling["factor"] * scaling["original_max_position_embeddings"])
            self.context = max(self.context, stretched)

    def check(self, ids):
        """Is this longer than --max_tokens?

        Raises InputError for what the student cannot read at all.
        """
        if self.max_tokens and len(ids) > self.max_tokens:
            return True
        if self.context and len(ids) > self.context:
            raise InputError(
                f"{len(ids)} tokens, more than the {self.context} that the student reads "
                f"(config.json); "
                f"--max_tokens={self.context} leaves such examples out"
            )
        if self.vocab_size and max(ids) >= self.vocab_size:
            raise InputError(
                f"token {max(ids)} is beyond the student's embedding of {self.vocab_size} rows: "
                "tokenizer and config.json do not belong together"
            )
        return False


# ------------------------------------------------------------------------------------------------
# Data folder -> arrays


def hashes(folder):
    """sha256 of the three files that make the data set."""
    return {f"sha256_{Path(name).stem}": sha256(folder / name) for name in FILES}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Data:
    folder: str
    tokens: np.ndarray  # (n_tokens,) uint32, on disk
    spans: np.ndarray  # (n, 3) int64: start, prompt end, end
    examples: list  # n dicts: id, answer
    meta: dict
    sha256: str  # the data set's identity: tokens, spans and tokenizer

    def __len__(self):
        return len(self.spans)

    def prompt(self, i):
        """Token ids of example i's prompt, uint32."""
        return self.tokens[self.spans[i, 0] : self.spans[i, 1]]

    def response(self, i):
        """Token ids of example i's response, the end of the turn included, uint32."""
        return self.tokens[self.spans[i, 1] : self.spans[i, 2]]

    def response_mask(self):
        """(n_tokens,) bool: which tokens belong to a response."""
        edges = np.zeros(len(self.tokens) + 1, dtype=np.int8)
        # prompts are not empty, so no two examples share an edge of one kind
        edges[self.spans[:, 1]] += 1
        edges[self.spans[:, 2]] -= 1
        return np.cumsum(edges[:-1], dtype=np.int8).astype(bool)


def load(folder):
    """A data folder, its hashes verified.

    Raises InputError if a file is missing or is not what meta.json says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; make it with python data.py --source=... --out={folder}"
        )
    meta = read_json(folder / "meta.json")
    if "tokenizer_hash" not in meta:
        raise InputError(f"{folder / 'meta.json'}: not written by data.py")
    try:
        for key, value in hashes(folder).items():
            if meta.get(key) != value:
                raise InputError(
                    f"{folder}: {key} is not what meta.json says: damaged or changed; run data.py "
                    f"again"
                )
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing; run data.py again") from None
    tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
    spans = np.load(folder / "spans.npy", allow_pickle=False)
    with open(folder / "examples.jsonl", encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    identity = meta["sha256_tokens"] + meta["sha256_spans"] + meta["tokenizer_hash"]
    return Data(
        folder=str(folder),
        tokens=tokens,
        spans=spans,
        examples=examples,
        meta=meta,
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
    )


def uniforms(seed, example_id, n):
    """The n uniforms in [0, 1) of an example; a longer n continues the same sequence."""
    key = hashlib.sha256(f"{seed} {example_id}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(n)


if __name__ == "__main__":
    command(main, Config)
