"""Text to token arrays: the checkpoint's tokenizer (through tiktoken), its chat template, and a flat token index.

    python data.py --source=traces.jsonl --tokenizer=Qwen/Qwen3-0.6B --out=data/traces

A line of the source is {"id", "prompt" or "messages", "response", "answer"} (id and answer may be left out), or GSM8K's
{"question", "answer" ending in "#### n"}. The folder it becomes:

    tokens.bin      uint32, all examples one after the other
    spans.npy       (n, 3) int64: start, prompt end, end of each example in tokens.bin
    examples.jsonl  id and answer of each example, in the same order
    meta.json       hashes of all that, of the tokenizer, and what was counted

Every per-token array of this project (log-probabilities, masks) has the length of tokens.bin and the same index.
Next: model.py.
"""

import hashlib
import json
import re
import sys
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import regex
import tiktoken

from config import InputError, command, read_json, whole_folder, write_json


@dataclass
class Config:
    source: str = ""  # a jsonl file of examples
    tokenizer: str = ""  # the student's Hugging Face folder or hub id
    out: str = ""  # the folder to write
    max_tokens: int = 0  # leave out (and count) examples with more tokens than this; 0: no limit
    verifier: str = "auto"  # how eval.py reads answers: boxed, gsm8k, integer, toy, or auto


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer: tokenizer.json's byte-level BPE as a tiktoken Encoding, with identical ids

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_of_char():
    """GPT-2's spelling of bytes as printable characters, inverted: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = byte_of_char()
LONG_BLANK = re.compile(r"\s{10000}")


def load_tokenizer(folder):
    """The tokenizer of a Hugging Face folder. Raises InputError for one that tiktoken cannot express exactly."""
    return Tokenizer(Path(folder))


class Tokenizer:
    """encode, decode and chat template of one checkpoint; ids are those of its tokenizer.json.

    folder                                           where it came from
    vocab_size                                       largest id + 1 (the model's embedding may have more rows)
    bos_token_id, eos_token_id, pad_token_id, mask_token_id   None where tokenizer_config.json names none
    special_ids                                      ids of the special tokens, a set
    hash                                             sha256 of all that determines ids, whatever the file's formatting
    """

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        spec = read_json(path)
        try:
            self._read_splits(spec, path)
            self._read_vocabulary(spec["model"], path)
            self._read_added(spec.get("added_tokens") or [], path)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a byte-level BPE tokenizer.json ({error!r})") from None
        self.folder = folder
        named = {**_named_tokens(folder, "special_tokens_map.json"), **_named_tokens(folder, "tokenizer_config.json")}
        self.names = {key: named.get(key) for key in ("bos_token", "eos_token", "pad_token", "mask_token")}
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.mask_token_id = (
            self.added.get(name) for name in self.names.values())  # fmt: skip
        self.vocab_size = max(self.bytes_of) + 1
        parts = [spec["model"][k] for k in ("vocab", "merges")] + [spec["model"].get("ignore_merges", False)]
        parts += [spec.get("added_tokens"), spec.get("normalizer"), spec.get("pre_tokenizer")]
        self.hash = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        self.adds_bos = _adds_bos(spec.get("post_processor"), self.names["bos_token"])
        self._read_template()

    def _read_splits(self, spec, path):
        """Normalizer and pre-tokenizer: NFC or nothing; regular expressions, digits, then bytes."""
        normalizers = _flatten(spec.get("normalizer"), "normalizers")
        if any(n["type"] != "NFC" for n in normalizers):
            raise InputError(f"{path}: normalizer {normalizers[0]['type']} is not supported, only NFC")
        self.nfc, self.splits = bool(normalizers), []
        steps = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
        if not steps or steps[-1]["type"] != "ByteLevel":
            raise InputError(f"{path}: the pre-tokenizer does not end in ByteLevel; only byte-level BPE is supported")
        for step in steps:
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
                pattern = step["pattern"]
                self.splits.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
            elif step["type"] == "Digits":
                self.splits.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
            elif step["type"] == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space"):
                self.splits += [GPT2_SPLIT] if step.get("use_regex", True) else []
            else:
                raise InputError(f"{path}: pre-tokenizer {step} is not supported")

    def _read_vocabulary(self, bpe, path):
        """Ranks for tiktoken = the order of the merges, which need not be the order of the ids."""
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or bpe.get("continuing_subword_prefix") or bpe.get(
            "end_of_word_suffix"):  # fmt: skip
            raise InputError(f"{path}: only byte-level BPE is supported (no SentencePiece, no byte_fallback)")
        if bpe.get("dropout"):
            raise InputError(f"{path}: BPE dropout is not supported")
        vocabulary = {bytes(BYTE_OF_CHAR[c] for c in token): i for token, i in bpe["vocab"].items()
                      if all(c in BYTE_OF_CHAR for c in token)}  # fmt: skip
        ranks = {bytes([b]): b for b in range(256)}  # a byte without an id is dropped after encoding, as HF drops it
        for merge in bpe["merges"]:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            merged = bytes(BYTE_OF_CHAR[c] for c in "".join(pair))
            if merged not in vocabulary:
                raise InputError(f"{path}: the merge {pair} makes a token that is not in the vocabulary")
            ranks.setdefault(merged, len(ranks))
        self.id_of_rank = [vocabulary.get(token, -1) for token in ranks]
        self.bytes_of = {i: token for token, i in vocabulary.items()}
        # Tokens that no merge makes come out only where they are a whole piece, and only with ignore_merges. tiktoken
        # would also merge into them, so they stay out of the ranks.
        orphans = {token: i for token, i in vocabulary.items() if token not in ranks}
        self.whole_pieces = orphans if bpe.get("ignore_merges") else {}
        pattern = self.splits[0] if len(self.splits) == 1 else r"[\s\S]+"
        # tiktoken drops what no alternative matches, Hugging Face keeps it as a piece of its own
        pattern = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
        self.core = tiktoken.Encoding("t3s", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.compiled = [regex.compile(split) for split in self.splits]

    def _read_added(self, tokens, path):
        """Added tokens are cut out first, the leftmost longest one; those marked normalized only after NFC."""
        for token in tokens:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                name = token["content"]
                raise InputError(f"{path}: added token {name!r}: lstrip, rstrip and single_word are not supported")
        self.added = {t["content"]: t["id"] for t in tokens}
        self.special_ids = {t["id"] for t in tokens if t.get("special")}
        self.bytes_of |= {t["id"]: t["content"].encode() for t in tokens}
        self.cut_raw = _any_of(t["content"] for t in tokens if not t.get("normalized"))
        self.cut_normalized = _any_of(t["content"] for t in tokens if t.get("normalized"))

    def encode(self, text):
        """Text -> ids; special and other added tokens in the text become their ids (no BOS is put in front)."""
        ids = []
        for part, is_added in _cut(self.cut_raw, text):
            if is_added:
                ids.append(self.added[part])
                continue
            for piece, is_added in _cut(self.cut_normalized, unicodedata.normalize("NFC", part) if self.nfc else part):
                ids += [self.added[piece]] if is_added else self._encode_bpe(piece)
        return ids

    def encode_ordinary(self, text):
        """Text -> ids, taking special tokens in it as plain text: for what a user typed."""
        return self._encode_bpe(unicodedata.normalize("NFC", text) if self.nfc else text)

    def _encode_bpe(self, text):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"text with a lone surrogate cannot be encoded: {text[:40]!r}") from None
        # tiktoken's own regex engine is faster, but overflows its stack on a million spaces in a row
        if len(self.splits) == 1 and not self.whole_pieces and not LONG_BLANK.search(text):
            return [i for rank in self.core.encode_ordinary(text) if (i := self.id_of_rank[rank]) >= 0]
        pieces = [text] if text else []
        for split in self.compiled:
            pieces = [piece for longer in pieces for piece, _ in _cut(split, longer)]
        ids = []
        for piece in (p.encode() for p in pieces):
            if piece in self.whole_pieces:
                ids.append(self.whole_pieces[piece])
            else:
                ranks = self.core._encode_single_piece(piece)
                ids += [i for rank in ranks if (i := self.id_of_rank[rank]) >= 0]
        return ids

    def decode(self, ids, skip_special_tokens=False):
        """Ids -> text. Broken UTF-8, and ids that the tokenizer does not have, become U+FFFD."""
        skip = self.special_ids if skip_special_tokens else ()
        parts = [self.bytes_of.get(int(i), "\ufffd".encode()) for i in ids if int(i) not in skip]
        return b"".join(parts).decode("utf-8", errors="replace")

    # -- chat template

    def _read_template(self):
        config = self.folder / "tokenizer_config.json"
        template = read_json(config).get("chat_template") if config.exists() else None
        if isinstance(template, list):
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if (self.folder / "chat_template.jinja").exists():
            template = (self.folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.template = _compile_template(template) if template else None
        # What the template writes behind an answer; its first special token ends the turn, otherwise EOS does.
        self.end_of_turn_id = self.eos_token_id
        if self.template:
            turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "T3S-ANSWER"}]
            tail = self.encode(self.apply_chat_template(turn, tokenize=False).rpartition("T3S-ANSWER")[2])
            self.end_of_turn_id = next((i for i in tail if i in self.special_ids), self.eos_token_id)

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, **variables):
        """messages [{"role", "content"}, ...] -> ids, or text if not tokenize, by the checkpoint's own template.

        The template is downloaded code: it runs in jinja2's immutable sandbox. Raises InputError if it fails, or if
        there is none.
        """
        if not self.template:
            raise InputError(f"{self.folder}: this tokenizer has no chat template")
        names = {key: value or "" for key, value in self.names.items()}
        try:
            text = self.template.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                        **{**names, **variables})  # fmt: skip
        except Exception as error:  # whatever the template does wrong
            raise InputError(f"{self.folder}: the chat template failed: {error}") from None
        return self.encode(text) if tokenize else text

    def encode_prompt(self, messages):
        """What the student reads before it answers: the template's text up to the answer, or the bare prompt."""
        if self.template:
            return self.apply_chat_template(messages, add_generation_prompt=True)
        if len(messages) != 1:
            raise InputError(f"{self.folder}: no chat template, so messages cannot be rendered; give a prompt")
        return [self.bos_token_id] * self.adds_bos + self.encode(messages[0]["content"])

    def encode_response(self, response):
        """What the student is to write: the response and the token that ends a turn."""
        return self.encode(response) + ([] if self.end_of_turn_id is None else [self.end_of_turn_id])


def _flatten(step, key):
    if step is None:
        return []
    return [s for inner in step[key] for s in _flatten(inner, key)] if step["type"] == "Sequence" else [step]


def _any_of(contents):
    """A pattern for the leftmost, then longest of these strings; None if there are none."""
    longest_first = sorted(contents, key=len, reverse=True)
    return regex.compile("|".join(re.escape(c) for c in longest_first)) if longest_first else None


def _cut(pattern, text):
    """All of `text` in order, as (part, does the pattern match it); parts between two matches are kept."""
    at = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > at:
            yield text[at : match.start()], False
        if match.end() > match.start():
            yield match[0], True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def _named_tokens(folder, file):
    path = folder / file
    found = read_json(path) if path.exists() else {}
    return {key: value["content"] if isinstance(value, dict) else value for key, value in found.items()
            if key.endswith("_token") and isinstance(value, dict | str)}  # fmt: skip


def _adds_bos(post_processor, bos):
    """Does tokenizer.json itself put BOS in front of a text (Llama 3 does)?"""
    first = [s["single"][0] for s in _flatten(post_processor, "processors") if s["type"] == "TemplateProcessing"]
    return bool(bos and first and first[0].get("SpecialToken", {}).get("id") == bos)


def _compile_template(source):
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])  # fmt: skip
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=fail, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(source)


# ---------------------------------------------------------------------------------------------------------------------
# jsonl -> data folder


def read_example(line, where):
    """One line -> (id or None, messages of the prompt, response, answer or None, is it GSM8K's form)."""
    try:
        example = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(example, dict):
        raise InputError(f"{where}: not an object but {type(example).__name__}")
    gsm8k = "question" in example and "response" not in example
    if gsm8k:
        solution = example.get("answer")
        if not isinstance(solution, str) or "####" not in solution:
            raise InputError(f'{where}: "answer" must be a text that ends in #### and the number')
        example = {"id": example.get("id"), "prompt": example["question"], "response": solution,
                   "answer": solution.rpartition("####")[2].strip().replace(",", "")}  # fmt: skip
    kinds_of = {"prompt": str, "response": str, "messages": list, "id": str | int, "answer": str | int | float}
    for key, kinds in kinds_of.items():
        if example.get(key) is not None and not isinstance(example[key], kinds):
            raise InputError(f'{where}: "{key}" is of type {type(example[key]).__name__}')
    messages, response = example.get("messages"), example.get("response")
    if (messages is None) == (example.get("prompt") is None):
        raise InputError(f'{where}: needs either "prompt" or "messages"')
    messages = [{"role": "user", "content": example["prompt"]}] if messages is None else list(messages)
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f'{where}: "messages" must be objects with "role" and "content"')
    if response is None and messages and messages[-1]["role"] == "assistant":  # the last turn is what to learn
        response = messages.pop()["content"]
    if not response or not messages:
        raise InputError(f'{where}: no {"prompt" if response else "response"}')
    answer = example.get("answer")
    return example.get("id"), messages, response, None if answer is None else str(answer), gsm8k


def main(**given):
    """Write the folder `out`, whole or not at all. Raises InputError with file and line of the first bad example."""
    from model import local_folder  # here, so that reading a data folder needs no torch

    cfg = Config(**given)
    for key in ("source", "tokenizer", "out"):
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")
    if cfg.verifier not in ("auto", "boxed", "gsm8k", "integer", "toy"):
        raise InputError(f"--verifier={cfg.verifier}: must be auto, boxed, gsm8k, integer or toy")
    if not Path(cfg.source).is_file():
        raise InputError(f"{cfg.source}: no such file")
    tokenizer = load_tokenizer(local_folder(cfg.tokenizer))
    spans, seen, sizes, too_long, all_gsm8k, end = [], {}, [], 0, True, 0
    with whole_folder(cfg.out) as out:
        with (open(cfg.source, "rb") as source, open(out / "tokens.bin", "wb") as tokens,
              open(out / "examples.jsonl", "w", encoding="utf-8") as examples):  # fmt: skip
            for number, line in enumerate(source, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                if not line.strip():
                    continue
                where = f"{cfg.source}, line {number}"
                name, messages, response, answer, gsm8k = read_example(line, where)
                name = str(number) if name is None else str(name)
                if name in seen:
                    raise InputError(f"{where}: id {name!r} was in line {seen[name]} already")
                seen[name], all_gsm8k = number, all_gsm8k and gsm8k
                try:
                    prompt, reply = tokenizer.encode_prompt(messages), tokenizer.encode_response(response)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
                if not prompt or not reply:
                    raise InputError(f"{where}: no token in the {'response' if prompt else 'prompt'}")
                if cfg.max_tokens and len(prompt) + len(reply) > cfg.max_tokens:
                    too_long += 1
                    continue
                np.array(prompt + reply, dtype="<u4").tofile(tokens)
                examples.write(json.dumps({"id": name, "answer": answer}, ensure_ascii=False) + "\n")
                spans.append((end, end + len(prompt), end + len(prompt) + len(reply)))
                end = spans[-1][2]
                sizes.append(len(prompt) + len(reply))
        if not spans:
            raise InputError(f"{cfg.source}: no usable example ({too_long} longer than {cfg.max_tokens} tokens)")
        spans = np.array(spans, dtype=np.int64)
        np.save(out / "spans.npy", spans)
        verifier = "gsm8k" if cfg.verifier == "auto" and all_gsm8k else cfg.verifier
        meta = {"n_examples": len(spans), "n_tokens": int(end), "too_long": too_long, "max_tokens": cfg.max_tokens,
                "verifier": verifier, "source": str(cfg.source), "tokenizer_hash": tokenizer.hash,
                "command": sys.argv, **_hashes(out)}  # fmt: skip
        write_json(out / "meta.json", meta)
    response_tokens = int((spans[:, 2] - spans[:, 1]).sum())
    print(f"{cfg.out}: {len(spans)} examples, {end:,} tokens, {response_tokens:,} of them in responses, longest "
          f"{max(sizes)}; left out as longer than {cfg.max_tokens or 'any limit'}: {too_long}")  # fmt: skip
    made = load(cfg.out)
    first = f"{tokenizer.decode(made.prompt(0))}|{tokenizer.decode(made.response(0))}"
    print(f"the first one, with | where the response begins:\n{first}")


def _hashes(folder):
    """sha256 of the three files that make the data set."""
    names = ("tokens.bin", "spans.npy", "examples.jsonl")
    return {f"sha256_{Path(name).stem}": _sha256(folder / name) for name in names}


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Data folder -> batches


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
        edges[self.spans[:, 1]] += 1  # prompts are not empty, so no two examples share an edge of one kind
        edges[self.spans[:, 2]] -= 1
        return np.cumsum(edges[:-1], dtype=np.int8).astype(bool)


def load(folder):
    """A data folder, its hashes verified. Raises InputError if a file is missing or is not what meta.json says."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it with python data.py --source=... --out={folder}")
    meta = read_json(folder / "meta.json")
    try:
        for key, value in _hashes(folder).items():
            if meta.get(key) != value:
                raise InputError(f"{folder}: {key} is not what meta.json says: damaged or changed; run data.py again")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing; run data.py again") from None
    tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
    spans = np.load(folder / "spans.npy", allow_pickle=False)
    with open(folder / "examples.jsonl", encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    identity = meta["sha256_tokens"] + meta["sha256_spans"] + meta["tokenizer_hash"]
    return Data(str(folder), tokens, spans, examples, meta, hashlib.sha256(identity.encode()).hexdigest())


def step_examples(n, batch_size, step, seed):
    """Which of n examples make optimizer step `step` (from 0): a pure function of its arguments.

    Every epoch is a permutation of its own; a step may lie across two. batch_size 0, or n or more: all, every step.
    """
    if batch_size <= 0 or batch_size >= n:
        return np.arange(n)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return order[places - epochs[0] * n]


def uniforms(seed, example_id, n):
    """The n uniforms in [0, 1) of an example; a longer n continues the same sequence."""
    key = hashlib.sha256(f"{seed} {example_id}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(n)


def collate(data, indices, mask=None):
    """Examples -> ids and targets, (B, T) int64 each, padded on the right with id 0 and target -100.

    targets[:, i] is token i + 1 where that belongs to a response (and `mask`, bool (n_tokens,), keeps it), else -100.
    No examples give one row without targets, so that a process without work can still take part.
    """
    spans = data.spans[indices]
    length = int((spans[:, 2] - spans[:, 0]).max(initial=1))
    ids = np.zeros((max(1, len(spans)), length), dtype=np.int64)
    targets = np.full_like(ids, -100)
    for row, (start, prompt_end, end) in enumerate(spans):
        ids[row, : end - start] = data.tokens[start:end]
        response = ids[row, prompt_end - start : end - start]
        kept = response if mask is None else np.where(mask[prompt_end:end], response, -100)
        targets[row, prompt_end - start - 1 : end - start - 1] = kept
    return ids, targets


if __name__ == "__main__":
    command(main, Config)
