"""Tokenizers, chat templates and data folders for the tests: made here, small, and read by both sides."""

import json
import sys
from pathlib import Path

import tokenizers

import data
from hf import tokenizer as tokenizer_file
from plumbing.config import write_json

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


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates: those of the families, in our words

QWEN3 = """
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content %}
        {%- if m.reasoning_content %}{% set thought = m.reasoning_content.strip('\\n') %}{% endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}{%- endif %}
        {{- answer }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
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


def messages_of(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# Data folders

GOOD = {"id": "a", "prompt": "1+1?", "response": "2", "answer": 2}


def in_an_empty_folder(tmp_path, monkeypatch):
    """Go there, with a Qwen3-like tokenizer in student/."""
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


def without(*keys, **more):
    return {k: v for k, v in GOOD.items() if k not in keys} | more


def talk(*roles, **more):
    return without("prompt", "response", messages=[{"role": role, "content": role} for role in roles], **more)
