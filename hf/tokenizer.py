"""A checkpoint's tokenizer.json as a tiktoken Encoding with identical ids, and its chat template."""

import hashlib
import json
import re
import unicodedata
from datetime import datetime
from itertools import groupby
from pathlib import Path

import regex
import tiktoken

from plumbing.config import InputError, read_json

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_of_char():
    """GPT-2's spelling of bytes as printable characters, inverted: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = byte_of_char()
CHARS = set(BYTE_OF_CHAR)
LONG_BLANK = re.compile(r"\s{10000}")


def load_tokenizer(folder):
    """The tokenizer of a Hugging Face folder. Raises InputError for one that tiktoken cannot express exactly."""
    return Tokenizer(Path(folder))


class Tokenizer:
    """encode, decode and chat template of one checkpoint; ids are those of its tokenizer.json.

    folder                                           where it came from
    vocab_size                                       largest id + 1 (the model's embedding may have more rows)
    bos_token_id, eos_token_id, pad_token_id, mask_token_id   None where tokenizer_config.json names none
    end_of_turn_id                                   what ends an answer: the chat template's choice, else EOS
    special_ids                                      ids of the special tokens, a set
    hash                                             sha256 of all that determines ids, whatever the file's formatting

    Known limit, a handful of characters of the newest Unicode: Python's own NFC may not know them yet, and of several
    splits in a row (DeepSeek's) all but the last are found by Python's `regex`, which may know them too early.
    """

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        spec = read_json(path)
        try:
            self._read_splits(spec, path)
            self._read_vocabulary(spec["model"], path)
            self._read_added(spec.get("added_tokens") or [], spec["model"]["vocab"], path)
            processors = _flatten(spec.get("post_processor"), "processors")
            first = [p["single"][0].get("SpecialToken") for p in processors if p["type"] == "TemplateProcessing"]
        except (AttributeError, KeyError, TypeError, ValueError, regex.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a byte-level BPE tokenizer.json ({error!r})") from None
        self.vocab_size = max(self.bytes_of) + 1
        self.folder = folder
        self.names = _named_tokens(folder / "special_tokens_map.json") | _named_tokens(folder / "tokenizer_config.json")
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.mask_token_id = (
            self.added.get(name, spec["model"]["vocab"].get(name))
            for name in map(self.names.get, ("bos_token", "eos_token", "pad_token", "mask_token")))  # fmt: skip
        # does tokenizer.json itself put BOS in front of a text, as Llama 3's does?
        self.adds_bos = self.bos_token_id is not None and any(s and s["id"] == self.names["bos_token"] for s in first)
        self._read_template()

    def _read_splits(self, spec, path):
        """Normalizer and pre-tokenizer: NFC or nothing; regular expressions, digits, then bytes."""
        normalizers = _flatten(spec.get("normalizer"), "normalizers")
        if other := [n["type"] for n in normalizers if n["type"] != "NFC"]:
            raise InputError(f"{path}: normalizer {other[0]} is not supported, only NFC")
        steps = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
        if not steps or steps[-1]["type"] != "ByteLevel":
            raise InputError(f"{path}: the pre-tokenizer does not end in ByteLevel; only byte-level BPE is supported")
        self.nfc, self.splits = bool(normalizers), []
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
        if hexadecimal := [split for split in self.splits if re.search(r"(?<!\\)(?:\\\\)*\\[hH]", split)]:
            # a hexadecimal digit to Hugging Face, a blank to Python's regex
            raise InputError(f"{path}: the pattern {hexadecimal[0]!r} has a \\h; that is not supported")
        self.compiled = [regex.compile(split, regex.V1) for split in self.splits]
        if empty := [split.pattern for split in self.compiled if split.fullmatch("")]:
            raise InputError(f"{path}: the pattern {empty[0]!r} also matches an empty text; that is not supported")

    def _read_vocabulary(self, bpe, path):
        """Ranks for tiktoken = the order of the merges, which need not be the order of the ids."""
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or bpe.get("continuing_subword_prefix") or bpe.get(
            "end_of_word_suffix"):  # fmt: skip
            raise InputError(f"{path}: only byte-level BPE is supported (no SentencePiece, no byte_fallback)")
        if bpe.get("dropout"):
            raise InputError(f"{path}: BPE dropout is not supported")
        ids = list(bpe["vocab"].values())
        if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
            raise InputError(f"{path}: the vocabulary is empty, or has a negative id, or one id twice")
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]]
        if bad := [pair for pair in merges if len(pair) != 2 or "".join(pair) not in bpe["vocab"]]:
            raise InputError(f"{path}: the merge {bad[0]} makes no token of the vocabulary")
        vocabulary = {_spelt(token): i for token, i in bpe["vocab"].items() if CHARS.issuperset(token)}
        self.bytes_of = {i: token.encode() for token, i in bpe["vocab"].items()} | {i: t for t, i in vocabulary.items()}
        self.missing = {b for b in range(256) if bytes([b]) not in vocabulary}  # Hugging Face drops such bytes
        if self.missing and bpe.get("unk_token") is not None:
            raise InputError(f"{path}: bytes without a token, for which unk_token stands, are not supported")
        if bpe.get("ignore_merges") and not self.missing and _all_splits_listed(merges):
            made = dict.fromkeys(map("".join, merges))
        else:
            made = _merge_order(merges)
        tokens = [bytes([b]) for b in range(256)] + [_spelt(token) for token in made]  # in order of rank
        self.core = _encoding(tokens, self.splits)

        def parts(token):
            return [tokens[rank] for rank in self.core._encode_single_piece(token)]

        for pair in merges:
            if "".join(pair) not in made and parts(_spelt("".join(pair))) == [_spelt(half) for half in pair]:
                raise InputError(f"{path}: the merge {pair} is listed before those that make its two halves")
        # Tokens that no merge makes come out only with ignore_merges, and only where they are a whole piece. tiktoken
        # would also merge into one if merging arrives at two parts of it; from three parts on there is no such danger.
        orphans = vocabulary.keys() - set(tokens) if bpe.get("ignore_merges") else set()
        self.orphans = {token: vocabulary[token] for token in sorted(orphans)}
        safe = [token for token in self.orphans if len(parts(token)) > 2]
        self.whole = _encoding(tokens + safe, self.splits) if safe else self.core
        self.by_piece = len(safe) < len(orphans)
        self.id_of_rank = [vocabulary.get(token, -1) for token in tokens + safe]
        self.hash = _sha256_json(bpe["vocab"], merges, bool(bpe.get("ignore_merges")), self.nfc, self.splits)

    def _read_added(self, tokens, vocab, path):
        """Added tokens are cut out first, the leftmost longest one; those marked normalized only after NFC."""
        self.added, raw, normalized, last = {}, {}, {}, len(vocab) - 1
        for token in tokens:
            name = token["content"]
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise InputError(f"{path}: added token {name!r}: lstrip, rstrip and single_word are not supported")
            usual = vocab.get(name, self.added.get(name, last + 1))  # what Hugging Face goes by, not by the listed id
            if not name or token["id"] != usual:
                raise InputError(f"{path}: added token {name!r} has id {token['id']} and not {usual}")
            self.added[name], last = usual, max(last, usual)
            if token.get("normalized"):
                normalized[unicodedata.normalize("NFC", name) if self.nfc else name] = usual
            else:
                raw[name] = usual
        self.special_ids = {t["id"] for t in tokens if t.get("special")}
        self.bytes_of |= {i: name.encode() for name, i in self.added.items()}
        self.cuts = [(_any_of(raw), raw), (_any_of(normalized), normalized)]
        kinds = sorted((t["id"], t["content"], bool(t.get("normalized")), bool(t.get("special"))) for t in tokens)
        self.hash = _sha256_json(self.hash, kinds)

    def encode(self, text):
        """Text -> ids; special and other added tokens in the text become their ids (no BOS is put in front).

        Raises InputError for a lone surrogate, which is no text.
        """
        ids, ((raw, id_of_raw), (normalized, id_of_normalized)) = [], self.cuts
        for part, is_added in _cut(raw, text):
            if is_added:
                ids.append(id_of_raw[part])
                continue
            for piece, is_added in _cut(normalized, unicodedata.normalize("NFC", part) if self.nfc else part):
                ids += [id_of_normalized[piece]] if is_added else self._encode_bpe(piece)
        return ids

    def encode_ordinary(self, text):
        """Text -> ids, taking special tokens in it as plain text: for what a user typed."""
        return self._encode_bpe(unicodedata.normalize("NFC", text) if self.nfc else text)

    def _encode_bpe(self, text):
        """Ids of normalized text without added tokens: by tiktoken as a whole, or piece by piece where that differs."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raise InputError(f"text with a lone surrogate cannot be encoded: {text[:40]!r}") from None
        pieces = [text]
        for split in self.compiled[:-1]:
            pieces = [piece for longer in pieces for piece, _ in _cut(split, longer)]
        # on a million blanks in a row tiktoken's engine overflows its stack
        if not (self.by_piece or self.missing.intersection(raw) or LONG_BLANK.search(text)):
            return [self.id_of_rank[rank] for piece in pieces for rank in self.whole.encode_ordinary(piece)]
        for split in self.compiled[-1:]:
            pieces = [piece for longer in pieces for piece, _ in _cut(split, longer)]
        ids = []
        for piece in (piece.encode() for piece in pieces):
            if piece in self.orphans:
                ids.append(self.orphans[piece])
            elif piece := piece.translate(None, bytes(self.missing)):
                ids += [self.id_of_rank[rank] for rank in self.core._encode_single_piece(piece)]
        return ids

    def decode(self, ids, skip_special_tokens=False):
        """Ids -> text. Broken UTF-8, and ids that the tokenizer does not have, become U+FFFD."""
        skip = self.special_ids if skip_special_tokens else ()
        parts = [self.bytes_of.get(int(i), "\ufffd".encode()) for i in ids if int(i) not in skip]
        return b"".join(parts).decode("utf-8", errors="replace")

    # -- chat template

    def _read_template(self):
        """tokenizer_config.json's template (or, of several, the one called default), or chat_template.jinja."""
        config, beside = self.folder / "tokenizer_config.json", self.folder / "chat_template.jinja"
        template = read_json(config).get("chat_template") if config.exists() else None
        try:
            if isinstance(template, list):
                template = {each["name"]: each["template"] for each in template}["default"]
            if beside.exists():
                template = beside.read_text(encoding="utf-8")
            self.template = _compile_template(template) if template else None
        except Exception as error:  # not found in the list, not UTF-8, not a text, not Jinja
            raise InputError(f"{self.folder}: the chat template cannot be read ({error!r})") from None
        self.end_of_turn_id = self.eos_token_id
        if self.template:  # what it writes behind an answer, if that is a token of its own
            turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "T3S-ANSWER"}]
            _, found, tail = self.apply_chat_template(turn, tokenize=False).rpartition("T3S-ANSWER")
            ids = self.encode(tail.lstrip()) if found else []
            if ids and ids[0] in self.added.values():
                self.end_of_turn_id = ids[0]

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, **variables):
        """messages [{"role", "content"}, ...] -> ids, or text if not tokenize, by the checkpoint's own template.

        The template is downloaded code: it runs in jinja2's immutable sandbox. Other variables, such as Qwen3's
        enable_thinking, go to it as they are. Raises InputError if it fails, or if there is none.
        """
        if not self.template:
            raise InputError(f"{self.folder}: this tokenizer has no chat template")
        known = {"tools": None, "documents": None, **self.names, **variables}
        try:
            text = self.template.render(messages=messages, add_generation_prompt=add_generation_prompt, **known)
        except Exception as error:  # whatever the template does wrong
            raise InputError(f"{self.folder}: the chat template failed: {error}") from None
        return self.encode(text) if tokenize else text

    def encode_prompt(self, messages):
        """What the student reads before it answers: the template's text up to the answer, or the bare prompt.

        The template may rewrite earlier turns (Qwen3's takes the thoughts out of them). Returns ids.
        """
        if self.template:
            return self.apply_chat_template(messages, add_generation_prompt=True)
        if len(messages) != 1:
            raise InputError(f"{self.folder}: no chat template, so messages cannot be rendered; give a prompt")
        return [self.bos_token_id] * self.adds_bos + self.encode(messages[0]["content"])

    def encode_response(self, response):
        """What the student is to write: the response, letter by letter, and the token that ends a turn. Returns ids."""
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


def _encoding(tokens, splits):
    """tiktoken's, of tokens (bytes) in order of rank. Its own regex engine (faster, and HF's Unicode) makes the last
    split; what no alternative matches it would drop, where Hugging Face keeps it as a piece of its own."""
    pattern = splits[-1] if splits else r"[\s\S]+"
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("t3s", pat_str=rf"{pattern}|(?:(?!{pattern})[\s\S])+", mergeable_ranks=ranks,
                             special_tokens={})  # fmt: skip


def _spelt(token):
    """A token as tokenizer.json spells it -> its bytes."""
    return bytes([BYTE_OF_CHAR[char] for char in token])


def _merge_order(merges):
    """The tokens that merging can make, by rank: {token: (left, right)} in the order of the list of (left, right).

    Hugging Face merges two neighbours if they are a pair of the list, tiktoken if together they are a token with a
    rank. That is the same as long as each token with a rank comes out when its own bytes are merged, by the pair that
    is listed. Files list more than that: after `b c`, the pair `ab c` never meets, since its b is gone into bc.
    """
    made, rank = {}, {}

    def meet(left, right):
        """Are left and right ever neighbours? Undo their merges, latest first: does a merge across come earlier?"""
        before = len(rank)
        while True:
            if made.get(left + right) == (left, right) and rank[left + right] < before:
                return False
            if rank.get(left, -1) > rank.get(right, -1):
                before, left = rank[left], made[left][1]
            elif right in rank:
                before, right = rank[right] + 1, made[right][0]  # of two equal merges the left one comes first
            else:
                return True

    for left, right in merges:
        ready = all(len(half) == 1 or half in made for half in (left, right))
        if ready and left + right not in made and meet(left, right):
            rank[left + right] = len(rank)
            made[left + right] = (left, right)
    return made


def _all_splits_listed(merges):
    """Is each token listed with all its splits into two tokens (files converted from tiktoken's, like Llama 3's)?

    Then merging by pairs is merging by tokens, whatever the order.
    """
    listed, tokens = set(merges), list(dict.fromkeys(map("".join, merges)))
    known = {*tokens, *BYTE_OF_CHAR}
    in_order = [token for token, _ in groupby(merges, "".join)] == tokens
    return in_order and all(
        (token[:i], token[i:]) in listed for token in tokens for i in range(1, len(token))
        if token[:i] in known and token[i:] in known)  # fmt: skip


def _sha256_json(*values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _named_tokens(path):
    """{"eos_token": "...", ...} of special_tokens_map.json or tokenizer_config.json, if it exists."""
    found = read_json(path) if path.exists() else {}
    for key, value in found.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, dict | str) and not isinstance(text, str):
            raise InputError(f'{path}: {key} is neither a text nor an object with a "content" that is one')
    return {key: value["content"] if isinstance(value, dict) else value for key, value in found.items()
            if key.endswith("_token") and isinstance(value, dict | str)}  # fmt: skip


def _compile_template(source):
    """A chat template in the same surroundings as transformers gives it."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])  # fmt: skip
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=fail, strftime_now=lambda form: datetime.now().strftime(form))
    # {% generation %} marks the assistant's words for training masks; what belongs to it is written as it stands
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    return environment.from_string(source)
