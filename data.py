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
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf.families import local_folder
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError, command, read_json, whole_folder, write_json
from verify import VERIFIERS


@dataclass
class Config:
    source: str = ""  # a jsonl file of examples
    tokenizer: str = ""  # the student's Hugging Face folder or hub id
    out: str = ""  # the folder to write
    max_tokens: int = 0  # leave out (and count) examples with more tokens than this; 0: no limit
    verifier: str = "auto"  # how eval.py reads answers: boxed, gsm8k, integer, toy, or auto


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer: tokenizer.json's byte-level BPE as a tiktoken Encoding, with identical ids































# ---------------------------------------------------------------------------------------------------------------------
# jsonl -> data folder


def read_examples(path):
    """A jsonl file, one example after the other: where it stands ("file, line n"), then what read_example returns.

    Raises InputError with file and line for an id that has been there (that of a line without one is its number).
    """
    seen = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()  # a byte order mark
            if not line:
                continue
            where = f"{path}, line {number}"
            name, *rest = read_example(line, where)
            name = str(number) if name is None else str(name)
            if name in seen:
                raise InputError(f"{where}: the id {name!r} was in line {seen[name]} already")
            seen[name] = number
            yield where, name, *rest


def read_example(line, where):
    """One line (bytes) -> (id or None, messages of the prompt, response, answer or None, is it GSM8K's form).

    The response is "response", or the last of the "messages" if that is the assistant's. Raises InputError, its
    message beginning with `where`, for anything that is not exactly one prompt and one response.
    """
    try:
        example = json.loads(line.decode("utf-8"), parse_constant=float)
        json.dumps(example, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error})") from None
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half of a character, a lone surrogate ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(example, dict):
        raise InputError(f"{where}: not an object but {type(example).__name__}")
    gsm8k = "question" in example and "response" not in example
    kinds = {"question": str} if gsm8k else {"prompt": str, "response": str, "messages": list}
    for key, kind in {**kinds, "id": str | int, "answer": str | int | float}.items():
        value = example.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InputError(f'{where}: "{key}" is of type {type(value).__name__}')
    answer = None if example.get("answer") is None else str(example["answer"])
    if gsm8k:
        response, (_, mark, answer) = answer, (answer or "").rpartition("####")
        messages, answer = [{"role": "user", "content": example["question"]}], answer.strip().replace(",", "")
        if not mark or not answer:
            raise InputError(f'{where}: "answer" must end in #### and the number')
    else:
        messages, response = read_messages(example, where), example.get("response")
        if response is None and messages[-1]["role"] == "assistant":  # the last turn is what to learn
            response = messages.pop()["content"]
    if not messages or not (messages[-1]["content"] or "").strip():
        raise InputError(f"{where}: no prompt, or an empty one")
    if messages[-1]["role"] == "assistant":
        raise InputError(f'{where}: "messages" must end before the response, with a turn that is not the assistant\'s')
    if not (response or "").strip():
        raise InputError(f"{where}: no response, or an empty one")
    return example.get("id"), messages, response, answer, gsm8k


def read_messages(example, where):
    """The "messages" of an example, or its "prompt" as one: a new list of {"role", "content", ...}, not empty."""
    prompt, messages = example.get("prompt"), example.get("messages")
    if (messages is None) == (prompt is None):
        raise InputError(f'{where}: needs either "prompt" or "messages"')
    messages = [{"role": "user", "content": prompt}] if messages is None else list(messages)
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f'{where}: "messages" must be objects with "role" and "content", both texts')
    if not messages:
        raise InputError(f'{where}: "messages" is empty')
    return messages


def main(**given):
    """Write the folder `out`, whole or not at all. Raises InputError with file and line of the first bad example."""
    cfg = Config(**given)
    for key in ("source", "tokenizer", "out"):
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")
    if cfg.verifier not in VERIFIERS:
        raise InputError(f"--verifier={cfg.verifier}: must be one of {', '.join(VERIFIERS)}")
    if cfg.max_tokens < 0:
        raise InputError(f"--max_tokens={cfg.max_tokens}: must not be negative")
    if not Path(cfg.source).is_file():
        what = "a folder, not a jsonl file" if Path(cfg.source).is_dir() else "no such file"
        raise InputError(f"{cfg.source}: {what}")
    tokenizer = load_tokenizer(local_folder(cfg.tokenizer))
    if tokenizer.end_of_turn_id is None:
        raise InputError(f"{cfg.tokenizer}: tokenizer_config.json names no eos_token, so no answer would ever end")
    with whole_folder(cfg.out, "meta.json") as out:
        meta = write_arrays(cfg, tokenizer, out)
        write_json(out / "meta.json", meta | _hashes(out))
    made = load(cfg.out)
    sizes = made.spans[:, 2] - made.spans[:, 0]
    print(f"{cfg.out}: {len(made)} examples, {len(made.tokens):,} tokens, {made.response_mask().sum():,} of them in "
          f"responses, longest example {sizes.max()}; left out as longer than {cfg.max_tokens or 'any limit'}: "
          f"{meta['too_long']}")  # fmt: skip
    print("the first one, with | where the response begins:")
    print(f"{tokenizer.decode(made.prompt(0)[-300:])}|{tokenizer.decode(made.response(0)[:300])}")


def write_arrays(cfg, tokenizer, out):
    """tokens.bin, spans.npy and examples.jsonl of cfg.source into the folder `out` -> meta.json's entries on them."""
    spans, too_long, all_gsm8k, end = [], 0, True, 0
    with open(out / "tokens.bin", "wb") as tokens, open(out / "examples.jsonl", "w", encoding="utf-8") as examples:
        for where, name, messages, response, answer, gsm8k in read_examples(cfg.source):
            try:
                prompt, reply = tokenizer.encode_prompt(messages), tokenizer.encode_response(response)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            if not prompt:
                raise InputError(f"{where}: the prompt has no token")
            if response.lstrip().startswith("<think>") and tokenizer.decode(prompt[-9:]).rstrip().endswith("<think>"):
                raise InputError(f"{where}: the chat template has opened <think> already; take it off the response")
            all_gsm8k = all_gsm8k and gsm8k
            if cfg.max_tokens and len(prompt) + len(reply) > cfg.max_tokens:
                too_long += 1
                continue
            np.array(prompt + reply, dtype="<u4").tofile(tokens)
            examples.write(json.dumps({"id": name, "answer": answer}, ensure_ascii=False) + "\n")
            spans.append((end, end + len(prompt), end + len(prompt) + len(reply)))
            end = spans[-1][2]
    if not spans:
        raise InputError(f"{cfg.source}: no usable example ({too_long} longer than {cfg.max_tokens} tokens)")
    np.save(out / "spans.npy", np.array(spans, dtype=np.int64))
    return {"n_examples": len(spans), "n_tokens": end, "too_long": too_long, "max_tokens": cfg.max_tokens,
            "verifier": "gsm8k" if cfg.verifier == "auto" and all_gsm8k else cfg.verifier,
            "source": str(cfg.source), "tokenizer_hash": tokenizer.hash, "command": sys.argv}  # fmt: skip


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
    if "tokenizer_hash" not in meta:
        raise InputError(f"{folder / 'meta.json'}: not written by data.py")
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




def uniforms(seed, example_id, n):
    """The n uniforms in [0, 1) of an example; a longer n continues the same sequence."""
    key = hashlib.sha256(f"{seed} {example_id}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(n)




if __name__ == "__main__":
    command(main, Config)
