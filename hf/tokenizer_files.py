"""The files of a tokenizer -> one object in tokenizer.json's form.

tokenizer.json holds everything in most folders, but not in all. Older ones have vocab.json and
merges.txt instead, from which a class in transformers builds the rest. And tokens may be declared
elsewhere: in tokenizer_config.json (added_tokens_decoder, or as the pad_token ...),
added_tokens.json, special_tokens_map.json. transformers adds them to the vocabulary; so does this
file, or it names the token that does not fit.

Next: hf/template.py.
"""

from plumbing.config import InputError, read_json

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# the names of single tokens in the order in which transformers gives ids to those that have none
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")


def read_spec(folder):
    """A folder's tokenizer.json, or what it would be.

    Raises InputError if there is neither that nor a vocabulary.
    """
    path = folder / "tokenizer.json"
    if path.exists() or not (folder / "vocab.json").exists():
        return read_json(path)
    kind = _config(folder).get("tokenizer_class")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(_config(folder).get("add_prefix_space")),
    }
    if kind in QWEN2_CLASSES:
        split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"}
        normalizer = {"type": "NFC"}
        steps = [split, byte_level | {"use_regex": False}]
    elif kind in GPT2_CLASSES:
        normalizer = None
        steps = [byte_level | {"use_regex": True}]
    else:
        known = ", ".join((*QWEN2_CLASSES, *GPT2_CLASSES))
        raise InputError(
            f"{path}: no such file, and vocab.json is read only for a tokenizer_class of {known}, "
            f"not {kind}; save the folder with transformers' save_pretrained, which "
            f"writes tokenizer.json"
        )
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {
            "type": "BPE",
            "vocab": read_json(folder / "vocab.json"),
            "merges": _read_merges(folder),
        },
    }


def _read_merges(folder):
    path = folder / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, and vocab.json needs it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None
    return [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]


def read_added(folder, spec):
    """All added tokens, [{"id", "content", flags}, ...]: tokenizer.json's, then those declared in
    other files.

    Raises InputError for a token that is declared with an id that another one has, or with two ids.
    """
    tokens = [dict(token) for token in spec.get("added_tokens") or []]
    vocab = spec["model"]["vocab"]
    by_name = {token["content"]: token for token in tokens}
    name_of = {i: name for name, i in vocab.items()} | {
        token["id"]: token["content"] for token in tokens
    }
    for i, declared in sorted(_declared_with_ids(folder).items()):
        name = declared["content"]
        usual = by_name[name]["id"] if name in by_name else vocab.get(name, i)
        if usual != i or name_of.setdefault(i, name) != name:
            there = f", where it has {usual}" if usual != i else ""
            raise InputError(
                f"{folder}: token {name!r} is declared with id {i}, which is {name_of.get(i)!r} in "
                f"tokenizer.json{there}"
            )
        if name not in by_name:
            by_name[name] = {}
            tokens.append(by_name[name])
        by_name[name].update(declared)
    last = max([*vocab.values(), *(token["id"] for token in tokens)], default=-1)
    for name in _declared_by_name(folder):
        if name not in by_name and name not in vocab:
            last += 1
            by_name[name] = {"id": last, "content": name, "special": True}
            tokens.append(by_name[name])
    return tokens


def _declared_with_ids(folder):
    """{id: {"id", "content", flags}} of added_tokens_decoder and added_tokens.json; the former's
    flags win.
    """
    found = {}
    path = folder / "added_tokens.json"
    for name, i in (read_json(path) if path.exists() else {}).items():
        if not isinstance(i, int):
            raise InputError(f"{path}: {name!r} has no whole number for an id")
        found[i] = {"id": i, "content": name}
    for key, token in (_config(folder).get("added_tokens_decoder") or {}).items():
        where = folder / "tokenizer_config.json"
        if (
            not key.isdecimal()
            or not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
        ):
            raise InputError(
                f"{where}: added_tokens_decoder has {key}: {token}, not an id and a token"
            )
        flags = {flag: bool(token.get(flag)) for flag in FLAGS}
        found[int(key)] = {"id": int(key), "content": token["content"]} | flags
    return found


def _declared_by_name(folder):
    """The texts of pad_token, mask_token ... and of the lists of special tokens."""
    names = read_names(folder)
    yield from (names[key] for key in NAMED if key in names)
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        found = read_json(path) if path.exists() else {}
        for key in LISTED:
            listed = found.get(key) or []
            for token in listed.values() if isinstance(listed, dict) else listed:
                yield token["content"] if isinstance(token, dict) else token


def read_names(folder):
    """{"eos_token": "...", ...} of special_tokens_map.json and tokenizer_config.json; the latter
    wins.
    """
    named = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        for key, value in (read_json(path) if path.exists() else {}).items():
            if not key.endswith("_token") or not isinstance(value, dict | str):
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise InputError(
                    f'{path}: {key} is neither a text nor an object with a "content" that is one'
                )
            named[key] = text
    return named


def _config(folder):
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}
