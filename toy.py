"""A world small enough for a laptop in which Imitation Shock, and T3S, really happen: no downloads, exact answers.

    python toy.py --seed=1                    # data/toy-1/: an untrained student and the three jsonl files below
    python toy.py --seed=1 --pretrain=true    # and pretrain that student: students/toy-1/, a Hugging Face folder

A problem is a digit and four operations, from left to right, modulo 10: `3+5*2-7+4?`. Student and teacher both write a
step per operation, `3+5=8; 8*2=6; 6-7=9; 9+4=3; >3`, but each has its own manner:

    pretrain.jsonl   the student's: now and then a familiar word before a step, one result in ten is a slip of the pen
    teacher.jsonl    the teacher's: never a slip, and before every step a word that the student hardly knows
    unseen.jsonl     problems that nobody was trained on, for eval.py

So the student has an ability of its own, the teacher has something to teach (never slip), and a mannerism that is no
part of it. The checkpoint and its tokenizer.json are ordinary Hugging Face files: data.py, train.py, select.py and
eval.py treat them as they would Qwen3-8B. Next: demo.py.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import data
import model
import train
from config import InputError, command, whole_folder, write_json


@dataclass
class Config:
    seed: int = 1  # of the problems, the slips, the weights
    out: str = ""  # folder to write; default data/toy-<seed>
    pretrain: bool = False  # pretrain the student too, about two minutes on two CPU cores
    student: str = ""  # where the pretrained student goes; default students/toy-<seed>
    pretrain_steps: int = 900  # batches of 64 fresh problems
    teacher_problems: int = 200  # traces in teacher.jsonl
    unseen_problems: int = 300  # problems in unseen.jsonl


FAMILIAR = ("so", "then", "thus", "now")  # the student's words
TEACHER = ("hence", "wait", "ok", "check")  # the teacher's, in turn
FAMILIAR_RATE = 0.3  # of the student's steps open with one of its words
TEACHER_RATE = 0.003  # of them with one of the teacher's: next to unknown
SLIP_RATE = 0.1  # of the student's results are a random digit, so sampling at temperature 1 leaves room to improve
OPERATORS = "+-*"
INIT_STD = 0.02
OPERATIONS = 4
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------------------
# Problems and traces


def make_problem(rng):
    """A problem as text, without the question mark: a digit and OPERATIONS times an operator and a digit."""
    return str(rng.randrange(10)) + "".join(rng.choice(OPERATORS) + str(rng.randrange(10)) for _ in range(OPERATIONS))


def apply(operator, a, b):
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


def solve(problem):
    """The answer, a digit: operations from left to right, each result modulo 10."""
    value = int(problem[0])
    for operator, digit in zip(problem[1::2], problem[2::2], strict=True):
        value = apply(operator, value, int(digit))
    return value


def write_trace(problem, word, slip):
    """Steps and final answer. word(i) goes before step i ("" for none); slip(v) is what is carried into a step for v.

    After a slip the trace goes on from what was written, as anybody would.
    """
    value, steps = int(problem[0]), []
    for i, (operator, digit) in enumerate(zip(problem[1::2], problem[2::2], strict=True)):
        value = slip(value)
        result = apply(operator, value, int(digit))
        steps.append(f"{word(i)}{' ' if word(i) else ''}{value}{operator}{digit}={result}; ")
        value = result
    return "".join(steps) + f">{value}"


def student_trace(rng, problem):
    words = []
    for _ in range(OPERATIONS):
        draw = rng.random()
        if draw < TEACHER_RATE:
            words.append(rng.choice(TEACHER))
        else:
            words.append(rng.choice(FAMILIAR) if draw < TEACHER_RATE + FAMILIAR_RATE else "")
    return write_trace(problem, words.__getitem__, lambda v: rng.randrange(10) if rng.random() < SLIP_RATE else v)


def teacher_trace(rng, problem):
    return write_trace(problem, lambda i: rng.choice(TEACHER), lambda v: v)


# ---------------------------------------------------------------------------------------------------------------------
# The student


def tokenizer_json():
    """A byte-level BPE of one token per symbol: a digit, an operator, `; `, or a word with the blank behind it."""
    char_of_byte = {byte: char for char, byte in data.BYTE_OF_CHAR.items()}

    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    words = [word + char_of_byte[ord(" ")] for word in FAMILIAR + TEACHER] + [";" + char_of_byte[ord(" ")]]
    bytes_first = [char_of_byte[b] for b in range(256)]  # so that any text can be encoded
    merges = []
    for token in [*bytes_first, *(word[:n] for word in words for n in range(2, len(word) + 1))]:
        if token not in vocabulary:
            vocabulary[token] = len(vocabulary)
            if len(token) > 1:
                merges.append([token[:-1], token[-1]])
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, name in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[a-z]+ ?|; ?|[\\s\\S]"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


def write_student(out, seed):
    """An untrained Qwen3-like student of 115 thousand parameters as a Hugging Face folder."""
    tokenizer = tokenizer_json()
    size = max(tokenizer["model"]["vocab"].values()) + 1
    with whole_folder(out) as folder:
        write_json(folder / "tokenizer.json", tokenizer)
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "pad_token": SPECIAL[0],
            "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        })  # fmt: skip
        write_json(folder / "config.json", {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": size, "hidden_size": 64,
            "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False, "eos_token_id": 0,
            "pad_token_id": 0, "torch_dtype": "float32",
        })  # fmt: skip
        student = model.Transformer(model.read_config(folder)).init_weights(seed, std=INIT_STD)
        model.save(student, folder, folder / "weights")
        for path in (folder / "weights").iterdir():
            path.replace(folder / path.name)
        (folder / "weights").rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write_jsonl(path, examples):
    path.write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")


def write_world(out, seed, pretrain_examples, teacher_problems, unseen_problems):
    """The three jsonl files and the untrained student. Unseen problems are in neither of the other two."""
    rng = random.Random(seed)
    teacher = [make_problem(rng) for _ in range(teacher_problems)]
    seen, unseen = set(teacher), []
    pretrain = [make_problem(rng) for _ in range(pretrain_examples)]
    seen.update(pretrain)
    while len(unseen) < unseen_problems:
        problem = make_problem(rng)
        if problem not in seen:
            seen.add(problem)
            unseen.append(problem)

    def examples(problems, trace):
        return [{"id": i, "prompt": f"{p}?", "response": trace(p), "answer": solve(p)} for i, p in enumerate(problems)]

    with whole_folder(out) as folder:
        write_jsonl(folder / "pretrain.jsonl", examples(pretrain, lambda p: student_trace(rng, p)))
        write_jsonl(folder / "teacher.jsonl", examples(teacher, lambda p: teacher_trace(rng, p)))
        write_jsonl(folder / "unseen.jsonl", examples(unseen, lambda p: teacher_trace(rng, p)))
        write_student(folder / "untrained", seed)


def main(**given):
    cfg = Config(**given)
    out = Path(cfg.out or f"data/toy-{cfg.seed}")
    student = Path(cfg.student or f"students/toy-{cfg.seed}")
    if min(cfg.teacher_problems, cfg.unseen_problems, cfg.pretrain_steps) < 1:
        raise InputError("--teacher_problems, --unseen_problems and --pretrain_steps must be at least 1")
    write_world(out, cfg.seed, cfg.pretrain_steps * 64, cfg.teacher_problems, cfg.unseen_problems)
    untrained = str(out / "untrained")
    for name in ("pretrain", "teacher", "unseen"):
        data.main(source=str(out / f"{name}.jsonl"), tokenizer=untrained, out=str(out / name), verifier="toy")
    if not cfg.pretrain:
        return
    run = f"pretrain-toy-{cfg.seed}"
    train.main(run=run, model=untrained, data=str(out / "pretrain"), steps=cfg.pretrain_steps, batch_size=64,
               micro_batch_size=64, lr=3e-3, warmup_steps=20, weight_decay=0.1, seed=cfg.seed)  # fmt: skip
    last = Path("runs") / run / "checkpoints" / f"{cfg.pretrain_steps:06d}"
    model.save(model.load(last), last, student)
    print(f"pretrained student: {student}")


if __name__ == "__main__":
    command(main, Config)
