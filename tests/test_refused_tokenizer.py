"""hf/tokenizer.py: what cannot be expressed exactly, and templates that misbehave, are refused in one line."""

import json

import pytest
from text_world import BARE, BYTE_LEVEL, BYTES, added, both, chat_tokenizer, messages_of, spec, split

from hf import tokenizer as tokenizer_file
from plumbing.config import InputError, write_json


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
    (changed(added_tokens=[added(257, "<s>", rstrip=True), added(258, "\n\n")]),
     r"added token '\n\n' begins or ends in a blank, which others swallow"),
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


@pytest.mark.parametrize("token", [{"a": 1}, {"content": [1]}])
def test_a_named_token_that_is_no_text(tmp_path, token):
    write_json(tmp_path / "tokenizer.json", spec([*BYTES]))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": token})
    with pytest.raises(InputError, match="tokenizer_config.json: bos_token is neither a text nor an object with"):
        tokenizer_file.load_tokenizer(tmp_path)


def test_lone_surrogates_are_refused(tmp_path):
    ours, _ = both(tmp_path, spec(BYTES, normalizer={"type": "NFC"}))
    for encode in (ours.encode, ours.encode_ordinary):
        with pytest.raises(InputError, match="lone surrogate"):
            encode("half a \ud83d smile")


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates

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


@pytest.mark.parametrize("template", [listed for listed in (
    [{"name": "rag", "template": "x"}], [{"template": "x"}], ["x"], 3, {"default": "x"}, "{% for %}")])  # fmt: skip
def test_templates_that_cannot_be_read(tmp_path, template):
    with pytest.raises(InputError, match="the chat template cannot be read"):
        chat_tokenizer(tmp_path, template)


# ---------------------------------------------------------------------------------------------------------------------


def test_without_a_template_only_a_bare_prompt_can_be_encoded(tmp_path):
    ours, _ = both(tmp_path, spec(BYTES))
    with pytest.raises(InputError, match="no chat template, so messages cannot be rendered"):
        ours.encode_prompt(messages_of([("system", "be"), ("user", "hi")]))
    with pytest.raises(InputError, match="this tokenizer has no chat template"):
        ours.apply_chat_template(messages_of([("user", "hi")]))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and vocabularies outside of tokenizer.json


def decoder(**tokens):
    """tokenizer_config.json's added_tokens_decoder of {name: id}."""
    return {"added_tokens_decoder": {str(i): {"content": name, "special": True} for name, i in tokens.items()}}


@pytest.mark.parametrize("files, says", [
    ({"tokenizer_config.json": decoder(new=300)}, "added token 'new' has id 300 and not 257"),  # transformers: 257
    ({"tokenizer_config.json": decoder(new=256)}, "token 'new' is declared with id 256, which is '<s>'"),
    ({"tokenizer_config.json": decoder(new=97)}, "token 'new' is declared with id 97, which is 'a' in"),
    ({"added_tokens.json": {"<s>": 257}}, "token '<s>' is declared with id 257, which is None in tokenizer.json, where "
                                          "it has 256"),
    ({"added_tokens.json": {"new": 400}}, "added token 'new' has id 400 and not 257"),
    ({"added_tokens.json": {"x": "257"}}, "added_tokens.json: 'x' has no whole number for an id"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"257": "x"}}}, "added_tokens_decoder has 257: x"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"y": {"content": "x"}}}}, "added_tokens_decoder has y"),
])  # fmt: skip
def test_a_token_declared_elsewhere_that_does_not_fit_is_named(tmp_path, files, says):
    write_json(tmp_path / "tokenizer.json", spec(BYTES, tokens=[added(256, "<s>")]))
    for name, content in files.items():
        write_json(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        tokenizer_file.load_tokenizer(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config, merges, says", [
    ({}, "", "vocab.json is read only for a tokenizer_class of Qwen2Tokenizer"),
    ({"tokenizer_class": "LlamaTokenizer"}, "", "not LlamaTokenizer; save the folder with transformers'"),
    ({"tokenizer_class": "Qwen2Tokenizer"}, None, "merges.txt: no such file, and vocab.json needs it"),
    ({"tokenizer_class": "Qwen2Tokenizer"}, b"\xff", "merges.txt: not UTF-8"),
    ({"tokenizer_class": "Qwen2Tokenizer"}, "a b c", "the merge ('a', 'b', 'c') makes no token"),
    ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "", "pre-tokenizer {'type': 'ByteLevel'"),
])  # fmt: skip
def test_a_vocabulary_whose_class_is_not_known_is_refused(tmp_path, config, merges, says):
    write_json(tmp_path / "vocab.json", {token: i for i, token in enumerate(BYTES)})
    write_json(tmp_path / "tokenizer_config.json", config)
    if merges is not None:
        (tmp_path / "merges.txt").write_bytes(merges if isinstance(merges, bytes) else merges.encode())
    with pytest.raises(InputError) as error:
        tokenizer_file.load_tokenizer(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)
