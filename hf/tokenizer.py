"""A checkpoint's tokenizer.json as a tiktoken Encoding with identical ids, and prompts by its chat
template.

    from hf.tokenizer import load_tokenizer
    tokenizer = load_tokenizer("students/toy-1")
    tokenizer.encode("3+5?")

How a byte-level BPE tokenizer works: added tokens ("<|im_end|>") are cut out first; a regular
expression splits the rest into pieces (words, numbers, blanks); the bytes of each piece are merged
pair by pair, in the order of the list of merges. tiktoken does the last two quickly, but it has
its own idea of merging (by tokens, where Hugging Face goes by pairs), so most of this file finds
out where the two agree, and refuses a file for which they do not.

Next: hf/tokenizer_files.py.
"""

import hashlib
import json
import re
import unicodedata
from itertools import groupby
from pathlib import Path

import regex
import tiktoken

from hf.template import compile_template, control_tokens, hash_of, read_template
from hf.tokenizer_files import read_added, read_names, read_spec
from plumbing.config import InputError

GPT2_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)


def byte_of_char():
    """GPT-2's spelling of bytes as printable characters, inverted: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelling = {chr(b): b for b in printable}
    spelling.update({chr(256 + i): b for i, b in enumerate(others)})
    return spelling


BYTE_OF_CHAR = byte_of_char()
CHARS = set(BYTE_OF_CHAR)
LONG_BLANK = re.compile(r"\s{10000}")
# blanks and letters as Rust's regex has them, which finds them around added tokens for Hugging Face
BLANKS = regex.compile(r"\p{White_Space}*")
BLANKS_BACKWARDS = regex.compile(r"(?r)\p{White_Space}*")
LETTER = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]", regex.V1)


def load_tokenizer(folder):
    """The tokenizer of a Hugging Face folder.

    Raises InputError for one that tiktoken cannot express exactly.
    """
    return Tokenizer(Path(folder))


class Tokenizer:
    """encode, decode and chat template of one checkpoint; ids are those of its tokenizer.json.

    folder            where it came from
    vocab_size        largest id + 1 (the model's embedding may have more rows)
    bos_token_id, eos_token_id, pad_token_id, mask_token_id   None where tokenizer_config.json
                                                              names none
    end_of_turn_id    what ends an answer: the token that the chat template writes there, else EOS
    special_ids       ids of the special tokens, a set
    hash              sha256 of everything that determines ids, whatever the file's formatting
    template_hash     sha256 of the chat template's text, None if there is none
    ends              texts of the tokens that end a turn
    control           texts of the tokens with which the template marks turns: not for texts of a
                      user

    Known limit, a handful of characters of the newest Unicode: Python's own NFC may not know them
    yet, and of several splits in a row (DeepSeek's) all but the last are found by Python's
    `regex`, which may know them too early.
    """

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        spec = read_spec(folder)
        try:
            self._read_splits(spec, path)
            self._read_vocabulary(spec["model"], path)
            self._read_added(read_added(folder, spec), spec["model"]["vocab"], path)
            put_in_front = _tokens_in_front(spec)
        except (AttributeError, KeyError, TypeError, ValueError, regex.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a byte-level BPE tokenizer.json ({error!r})") from None
        self.folder = folder
        self.vocab_size = max(self.bytes_of) + 1
        self.names = read_names(folder)
        id_of = spec["model"]["vocab"] | self.added
        self.bos_token_id = id_of.get(self.names.get("bos_token"))
        self.eos_token_id = id_of.get(self.names.get("eos_token"))
        self.pad_token_id = id_of.get(self.names.get("pad_token"))
        self.mask_token_id = id_of.get(self.names.get("mask_token"))
        # does tokenizer.json itself put BOS in front of a text, as Llama 3's does?
        self.adds_bos = self.bos_token_id is not None and self.names["bos_token"] in put_in_front
        self._read_template()

    # --------------------------------------------------------------------------------------------
    # Reading tokenizer.json

    def _read_splits(self, spec, path):
        """Normalizer and pre-tokenizer: NFC or nothing; regular expressions, digits, then bytes."""
        normalizers = _flatten(spec.get("normalizer"), "normalizers")
        for step in normalizers:
            if step["type"] != "NFC":
                raise InputError(f"{path}: normalizer {step['type']} is not supported, only NFC")
        steps = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
        if not steps or steps[-1]["type"] != "ByteLevel":
            raise InputError(
                f"{path}: the pre-tokenizer does not end in ByteLevel; only byte-level BPE is "
                f"supported"
            )
        self.nfc = bool(normalizers)
        self.splits = []
        for step in steps:
            kind = step["type"]
            if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
                pattern = step["pattern"]
                is_regex = "Regex" in pattern
                self.splits.append(pattern["Regex"] if is_regex else re.escape(pattern["String"]))
            elif kind == "Digits":
                self.splits.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
            elif kind == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space"):
                if step.get("use_regex", True):
                    self.splits.append(GPT2_SPLIT)
            else:
                raise InputError(f"{path}: pre-tokenizer {step} is not supported")
        for split in self.splits:
            # \h is a hexadecimal digit to Hugging Face and a blank to Python's regex
            if re.search(r"(?<!\\)(?:\\\\)*\\[hH]", split):
                raise InputError(f"{path}: the pattern {split!r} has a \\h; that is not supported")
        self.compiled = [regex.compile(split, regex.V1) for split in self.splits]
        for split in self.compiled:
            if split.fullmatch(""):
                raise InputError(
                    f"{path}: the pattern {split.pattern!r} also matches an empty text; "
                    "that is not supported"
                )

    def _read_vocabulary(self, bpe, path):
        """Ranks for tiktoken = the order of the merges, which need not be the order of the ids."""
        merges = _check_bpe(bpe, path)
        vocabulary = {}
        self.bytes_of = {}
        for token, i in bpe["vocab"].items():
            if CHARS.issuperset(token):
                self.bytes_of[i] = _spelt(token)
                vocabulary[_spelt(token)] = i
            else:
                self.bytes_of[i] = token.encode()
        # Hugging Face drops bytes that have no token
        self.missing = {b for b in range(256) if bytes([b]) not in vocabulary}
        if self.missing and bpe.get("unk_token") is not None:
            raise InputError(
                f"{path}: bytes without a token, for which unk_token stands, are not supported"
            )
        ignore_merges = bool(bpe.get("ignore_merges"))
        if ignore_merges and not self.missing and _all_splits_listed(merges):
            made = dict.fromkeys(map("".join, merges))
        else:
            made = _merge_order(merges)
        tokens = [bytes([b]) for b in range(256)]
        tokens += [_spelt(token) for token in made]  # in order of rank
        self.core = _encoding(tokens, self.splits)

        def parts(token):
            return [tokens[rank] for rank in self.core._encode_single_piece(token)]

        for left, right in merges:
            # this pair makes no token by our count, and yet tiktoken arrives at exactly this pair:
            # not expressible
            if left + right not in made and parts(_spelt(left + right)) == [
                _spelt(left),
                _spelt(right),
            ]:
                raise InputError(
                    f"{path}: the merge {(left, right)} is listed before those that make its two "
                    f"halves"
                )
        # Tokens that no merge makes come out only with ignore_merges, and only where they are a
        # whole piece. tiktoken would also merge into one if merging arrives at two parts of it;
        # from three parts on there is no such danger.
        orphans = vocabulary.keys() - set(tokens) if ignore_merges else set()
        self.orphans = {token: vocabulary[token] for token in sorted(orphans)}
        safe = [token for token in self.orphans if len(parts(token)) > 2]
        self.whole = _encoding(tokens + safe, self.splits) if safe else self.core
        self.by_piece = len(safe) < len(orphans)
        self.id_of_rank = [vocabulary.get(token, -1) for token in tokens + safe]
        self.hash = _sha256_json(bpe["vocab"], merges, ignore_merges, self.nfc, self.splits)

    def _read_added(self, tokens, vocab, path):
        """Added tokens are cut out first, the leftmost longest one; those marked normalized only
        after NFC.
        """
        self.added = {}
        self.raw = {}
        self.normalized = {}
        kinds = []
        last = len(vocab) - 1
        for token in tokens:
            name = token["content"]
            # Hugging Face goes by the order of the tokens, not by the id that is listed
            usual = vocab.get(name, self.added.get(name, last + 1))
            if not name or token["id"] != usual:
                raise InputError(
                    f"{path}: added token {name!r} has id {token['id']} and not {usual}"
                )
            self.added[name] = usual
            last = max(last, usual)
            blanks = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
            if token.get("normalized"):
                name = unicodedata.normalize("NFC", name) if self.nfc else name
                self.normalized[name] = (usual, blanks)
            else:
                self.raw[name] = (usual, blanks)
            flags = (bool(token.get("normalized")), bool(token.get("special")))
            kinds.append((usual, token["content"], *flags, *blanks))
        swallows = any(token.get("lstrip") or token.get("rstrip") for token in tokens)
        for name in self.added:
            # tokenizers itself panics where one token swallows another
            if swallows and name != name.strip():
                raise InputError(
                    f"{path}: added token {name!r} begins or ends in a blank, which others swallow "
                    "(lstrip, rstrip); that is not supported"
                )
        self.special_ids = {token["id"] for token in tokens if token.get("special")}
        self.bytes_of |= {i: name.encode() for name, i in self.added.items()}
        self.find_raw = _any_of(self.raw)
        self.find_normalized = _any_of(self.normalized)
        self.hash = _sha256_json(self.hash, sorted(kinds))

    # --------------------------------------------------------------------------------------------
    # Text -> ids -> text

    def encode(self, text):
        """Text -> ids; special and other added tokens in the text become their ids (no BOS is put
        in front).

        Raises InputError for a lone surrogate, which is no text.
        """
        ids = []
        for part, i in _cut_added(self.find_raw, self.raw, text):
            if i is not None:
                ids.append(i)
                continue
            for piece, i in _cut_added(
                self.find_normalized, self.normalized, self._normalize(part)
            ):
                ids += self._encode_bpe(piece) if i is None else [i]
        return ids

    def encode_ordinary(self, text):
        """Text -> ids, taking special tokens in it as plain text: for what a user typed."""
        return self._encode_bpe(self._normalize(text))

    def _normalize(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def _encode_bpe(self, text):
        """Ids of normalized text without added tokens: by tiktoken whole, or piece by piece where
        that differs.
        """
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"text with a lone surrogate cannot be encoded: {text[:40]!r}"
            ) from None
        pieces = [text]
        for split in self.compiled[:-1]:
            pieces = [piece for longer in pieces for piece, _ in _cut(split, longer)]
        # on a million blanks in a row tiktoken's engine overflows its stack
        if not (self.by_piece or self.missing.intersection(raw) or LONG_BLANK.search(text)):
            return [
                self.id_of_rank[rank]
                for piece in pieces
                for rank in self.whole.encode_ordinary(piece)
            ]
        for split in self.compiled[-1:]:
            pieces = [piece for longer in pieces for piece, _ in _cut(split, longer)]
        ids = []
        for piece in pieces:
            piece = piece.encode()
            if piece in self.orphans:
                ids.append(self.orphans[piece])
                continue
            piece = piece.translate(None, bytes(self.missing))
            if piece:
                ids += [self.id_of_rank[rank] for rank in self.core._encode_single_piece(piece)]
        return ids

    def decode(self, ids, skip_special_tokens=False):
        """Ids -> text. Broken UTF-8, and ids that the tokenizer does not have, become U+FFFD."""
        skip = self.special_ids if skip_special_tokens else ()
        unknown = "\ufffd".encode()
        parts = [self.bytes_of.get(int(i), unknown) for i in ids if int(i) not in skip]
        return b"".join(parts).decode("utf-8", errors="replace")

    # --------------------------------------------------------------------------------------------
    # Conversations -> ids

    def _read_template(self):
        try:
            self.template_source = read_template(self.folder)
            self.template_hash = hash_of(self.template_source)
            self.template = compile_template(self.template_source) if self.template_source else None
        except Exception as error:  # not found in the list, not UTF-8, not a text, not Jinja
            raise InputError(
                f"{self.folder}: the chat template cannot be read ({error!r})"
            ) from None
        # what the template writes behind an answer ends a turn, if that is a token of its own
        self.end_of_turn_id = self.eos_token_id
        probe = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "T3S-ANSWER"},
        ]
        text = self.apply_chat_template(probe, tokenize=False) if self.template else ""
        _, found, tail = text.rpartition("T3S-ANSWER")
        ids = self.encode(tail.lstrip()) if found else []
        if ids and ids[0] in self.added.values():
            self.end_of_turn_id = ids[0]
        self.control = control_tokens(self, text)
        self.control_ids = {self.added[name] for name in self.control}
        ends = {self.end_of_turn_id, self.eos_token_id} - {None}
        self.ends = [self.decode([i]) for i in sorted(ends)]

    def apply_chat_template(
        self, messages, add_generation_prompt=False, tokenize=True, **variables
    ):
        """messages [{"role", "content"}, ...] -> ids, or text if not tokenize, by the checkpoint's
        own template.

        Other variables, such as Qwen3's enable_thinking, go to the template as they are. Raises
        InputError if it fails, or if there is none.
        """
        if not self.template:
            raise InputError(f"{self.folder}: this tokenizer has no chat template")
        known = {"tools": None, "documents": None, **self.names, **variables}
        known["messages"] = messages
        known["add_generation_prompt"] = add_generation_prompt
        try:
            text = self.template.render(**known)
        except Exception as error:  # whatever the template does wrong
            raise InputError(f"{self.folder}: the chat template failed: {error}") from None
        return self.encode(text) if tokenize else text

    def spelling(self, i):
        """What id i is, as a text that errors can show; two tokenizers agree on it if these are equal."""
        if i not in self.bytes_of:
            return "no token"
        text = self.bytes_of[i].decode(errors="backslashreplace")
        if i in self.added.values():
            return f"the added token {text!r}"
        return repr(text)

    def merges_like(self, other):
        """Do the two split a text and merge its bytes in the same way? Their vocabularies may differ."""
        mine, theirs = ((t.nfc, t.splits, t.core._mergeable_ranks) for t in (self, other))
        return mine == theirs

    def encode_prompt(self, messages):
        """What the student reads before it answers: the template's text up to the answer, or the
        bare prompt.

        The template may rewrite earlier turns (Qwen3's takes the thoughts out of them). Returns
        ids.
        """
        if self.template:
            return self.apply_chat_template(messages, add_generation_prompt=True)
        if len(messages) != 1:
            raise InputError(
                f"{self.folder}: no chat template, so messages cannot be rendered; give a prompt"
            )
        return self.encode_bare(messages[0]["content"])

    def encode_bare(self, prompt):
        """A prompt that needs no template -> ids, with BOS in front if that is the tokenizer's
        way.
        """
        ids = self.encode(prompt)
        if self.adds_bos and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def encode_response(self, response):
        """What the student is to write: the response, verbatim, and the token that ends a turn.
        Returns ids.

        A response that ends its turn itself does not get a second end.
        """
        ids = self.encode(response)
        if self.end_of_turn_id is None or ids and ids[-1] in self.control_ids:
            return ids
        return ids + [self.end_of_turn_id]


# ------------------------------------------------------------------------------------------------
# Merging by pairs (Hugging Face) and by tokens (tiktoken)


def _merge_order(merges):
    """The tokens that merging can make, by rank: {token: (left, right)} in the order of the list
    of (left, right).

    Hugging Face merges two neighbours if they are a pair of the list, tiktoken if together they
    are a token with a rank. That is the same as long as each token with a rank comes out when its
    own bytes are merged, by the pair that is listed. Files list more than that: after `b c`, the
    pair `ab c` never meets, since its b is gone into bc.
    """
    made = {}
    rank = {}

    def meet(left, right):
        """Are left and right ever neighbours?

        Undo their merges, latest first: does a merge across come earlier?
        """
        before = len(rank)
        while True:
            if made.get(left + right) == (left, right) and rank[left + right] < before:
                return False
            if rank.get(left, -1) > rank.get(right, -1):
                before = rank[left]
                left = made[left][1]
            elif right in rank:
                before = rank[right] + 1  # of two equal merges the left one comes first
                right = made[right][0]
            else:
                return True

    for left, right in merges:
        ready = all(len(half) == 1 or half in made for half in (left, right))
        if ready and left + right not in made and meet(left, right):
            rank[left + right] = len(rank)
            made[left + right] = (left, right)
    return made


def _all_splits_listed(merges):
    """Is each token listed with all its splits into two tokens (files converted from tiktoken's,
    like Llama 3's)?

    Then merging by pairs is merging by tokens, whatever the order.
    """
    listed = set(merges)
    tokens = list(dict.fromkeys(map("".join, merges)))
    if [token for token, _ in groupby(merges, "".join)] != tokens:
        return False
    known = {*tokens, *BYTE_OF_CHAR}
    for token in tokens:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in known and right in known and (left, right) not in listed:
                return False
    return True


def _encoding(tokens, splits):
    """A tiktoken Encoding of tokens (bytes) in order of rank.

    tiktoken's own regex engine makes the last split: it is faster and has Hugging Face's Unicode.
    What no alternative of the pattern matches it would drop, where Hugging Face keeps it as a
    piece of its own: hence the last one here.
    """
    pattern = splits[-1] if splits else r"[\s\S]+"
    return tiktoken.Encoding(
        "t3s",
        pat_str=rf"{pattern}|(?:(?!{pattern})[\s\S])+",
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )


# ------------------------------------------------------------------------------------------------
# Parts of the files


def _check_bpe(bpe, path):
    """tokenizer.json's "model" -> its merges, a list of pairs.

    Raises InputError if it is not byte-level BPE.
    """
    beyond = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if bpe.get("type") != "BPE" or any(bpe.get(key) for key in beyond):
        raise InputError(
            f"{path}: only byte-level BPE is supported (no SentencePiece, no byte_fallback)"
        )
    if bpe.get("dropout"):
        raise InputError(f"{path}: BPE dropout is not supported")
    ids = list(bpe["vocab"].values())
    if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
        raise InputError(f"{path}: the vocabulary is empty, or has a negative id, or one id twice")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]]
    for pair in merges:
        if len(pair) != 2 or "".join(pair) not in bpe["vocab"]:
            raise InputError(f"{path}: the merge {pair} makes no token of the vocabulary")
    return merges


def _tokens_in_front(spec):
    """The tokens that tokenizer.json's post-processors put in front of a single text."""
    processors = _flatten(spec.get("post_processor"), "processors")
    first = [p["single"][0] for p in processors if p["type"] == "TemplateProcessing"]
    return [piece["SpecialToken"]["id"] for piece in first if piece.get("SpecialToken")]


def _flatten(step, key):
    """A step, or a Sequence of steps (of Sequences ...), as a plain list."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in _flatten(part, key)]


def _any_of(contents):
    """A pattern for the leftmost, then longest of these strings; None if there are none."""
    longest_first = sorted(contents, key=len, reverse=True)
    return regex.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _cut_added(pattern, tokens, text):
    """All of `text` in order, as (part, None) between added tokens and ("", id) for each of them.

    tokens: {name: (id, its flags)}. A token with lstrip or rstrip swallows the blanks on that
    side; one with single_word counts only where no letter or digit touches it.
    """
    at = 0
    for match in pattern.finditer(text) if pattern else ():
        i, flags = tokens[match[0]]
        start, end = match.span()
        touched = LETTER.search(text[max(0, start - 1) : start]) or LETTER.match(text, end)
        if touched and "single_word" in flags:
            continue
        if "lstrip" in flags:
            start = max(at, BLANKS_BACKWARDS.match(text, 0, start).start())
        if "rstrip" in flags:
            end = BLANKS.match(text, end).end()
        if start > at:
            yield text[at:start], None
        yield "", i
        at = end
    if at < len(text):
        yield text[at:], None


def _cut(pattern, text):
    """All of `text` in order, as (part, does the pattern match it); parts between two matches are
    kept.
    """
    at = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > at:
            yield text[at : match.start()], False
        if match.end() > match.start():
            yield match[0], True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def _spelt(token):
    """A token as tokenizer.json spells it -> its bytes."""
    return bytes([BYTE_OF_CHAR[char] for char in token])


def _sha256_json(*values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
