"""A world small enough for a laptop in which Imitation Shock, and T3S, really happen: no downloads, exact answers.

    python toy.py --seed=1                    # data/toy-1/: an untrained student and the three jsonl files below
    python toy.py --seed=1 --pretrain=true    # and pretrain that student: students/toy-1/, a Hugging Face folder
    python toy.py --seed=1 --diffusion=true   # a masked-diffusion student made of it: students/toy-diffusion-1/

A problem is a digit and four operations, from left to right, modulo 10: `3+5*2-7+4?`. Student and teacher both write a
step per operation, `3+5=8; 8*2=6; 6-7=9; 9+4=3; >3`, but each has its own manner:

    pretrain.jsonl   the student's: now and then a familiar word before a step, and one time in ten a slip: the digit
                     that it carries into a step is not the result of the step before
    teacher.jsonl    the teacher's: never a slip, and before every step a word that the student hardly knows
    unseen.jsonl     problems that nobody was trained on, for eval.py

So the student has an ability of its own, the teacher has something to teach (never slip), and a mannerism that is no
part of it. The checkpoint and its tokenizer.json are ordinary Hugging Face files: data.py, train.py, select.py and
eval.py treat them as they would Qwen3-8B. Next: demo.py.
"""

import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import data
import model
import train
from hf.tokenizer import BYTE_OF_CHAR, load_tokenizer
from plumbing.config import InputError, command, read_json, whole_folder, write_json


@dataclass
class Config:
    seed: int = 1  # of the problems, the slips, the weights
    out: str = ""  # folder to write; default data/toy-<seed>
    pretrain: bool = False  # pretrain the student too, a minute or two on two CPU cores
    diffusion: bool = False  # turn the pretrained student into a masked-diffusion one, five minutes more
    pretrain_steps: int = 1200  # batches of 64 fresh problems
    diffusion_steps: int = 1600  # batches of 64 fresh problems
    teacher_problems: int = 200  # traces in teacher.jsonl
    unseen_problems: int = 300  # problems in unseen.jsonl


OPERATORS = "+-*"
OPERATIONS = 4
FAMILIAR = ("so", "then", "thus", "now")  # the student's words
FAMILIAR_RATE = 0.5  # of the student's steps open with one of them
TEACHER = ("hence", "wait", "ok", "check")  # the teacher's: one before every step
TEACHER_RATE = 0.004  # of the student's steps open with one of those: next to unknown
SLIP_RATE = 0.1  # how often the student carries a random digit into a step, so that it has something to learn
BLOCK_LENGTH = 8  # tokens that the diffusion student writes together: about one step of a trace
INIT_STD = 0.06  # of the weights: at 0.02, made for wide models, copying is learned late or never
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|mask|>")  # the mask is for diffusion students
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
    """A byte-level BPE of one token per symbol: a digit, an operator, `; `, or a word with the blank behind it.

    ignore_merges: a word of the vocabulary is one token although merging would begin check with the `he` of hence.
    """
    char_of_byte = {byte: char for char, byte in BYTE_OF_CHAR.items()}

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
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


def write_student(out, seed):
    """An untrained Qwen3-like student of 115 thousand parameters as a Hugging Face folder."""
    tokenizer = tokenizer_json()
    size = max(tokenizer["model"]["vocab"].values()) + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "tokenizer.json", tokenizer)
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "pad_token": SPECIAL[0],
            "mask_token": SPECIAL[3], "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        })  # fmt: skip
        write_json(folder / "config.json", {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": size, "hidden_size": 64,
            "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False, "eos_token_id": 0,
            "pad_token_id": 0, "torch_dtype": "float32",
        })  # fmt: skip
        model.save(model.Transformer(model.read_config(folder)).init_weights(seed, std=INIT_STD), folder, out)


def write_diffusion_student(student, out):
    """The same weights as a LLaDA2-like block-diffusion model without experts: how LLaDA2 was made of Ling.

    Attention is block-causal from now on and position i predicts its own token, so it has to be trained again.
    """
    raw = read_json(Path(student) / "config.json")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
              "tie_word_embeddings", "eos_token_id", "pad_token_id", "torch_dtype")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", {
            "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", **{key: raw[key] for key in shared},
            "use_qk_norm": True, "partial_rotary_factor": 1.0, "block_length": BLOCK_LENGTH,
            "mask_token_id": load_tokenizer(student).mask_token_id,
            "first_k_dense_replace": raw["num_hidden_layers"], "num_experts": 2, "num_experts_per_tok": 1,
            "moe_intermediate_size": raw["intermediate_size"],
        })  # fmt: skip
        converted = model.Transformer(model.read_config(folder))
    converted.load_state_dict(model.load(student).state_dict())
    model.save(converted, student, out)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write_world(cfg, out):
    """The untrained student and the jsonl files, of pretraining only those that are needed. All functions of the seed.

    Unseen problems are in no other file, be it written or not; the two pretraining files begin with the same problems.
    """
    sizes = {"pretrain": cfg.pretrain_steps * 64, "pretrain-diffusion": cfg.diffusion_steps * 64,
             "teacher": cfg.teacher_problems}  # fmt: skip
    rng = {name: random.Random(f"{cfg.seed} {name.partition('-')[0]}") for name in (*sizes, "unseen")}
    problems = {name: [make_problem(rng[name]) for _ in range(size)] for name, size in sizes.items()}
    seen, problems["unseen"] = {p for group in problems.values() for p in group}, []
    while len(problems["unseen"]) < cfg.unseen_problems:
        problem = make_problem(rng["unseen"])
        if problem not in seen:
            seen.add(problem)
            problems["unseen"].append(problem)
    wanted = ["pretrain"] * cfg.pretrain + ["pretrain-diffusion"] * cfg.diffusion + ["teacher", "unseen"]
    with whole_folder(out, "untrained") as folder:
        write_student(folder / "untrained", cfg.seed)
        for name in wanted:
            trace = student_trace if name.startswith("pretrain") else teacher_trace
            lines = [{"id": i, "prompt": f"{p}?", "response": trace(rng[name], p), "answer": solve(p)}
                     for i, p in enumerate(problems[name])]  # fmt: skip
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main(**given):
    """Write the world, tokenised for train.py and eval.py, and pretrain its students if asked to."""
    cfg = Config(**given)
    out, student = Path(cfg.out or f"data/toy-{cfg.seed}"), f"students/toy-{cfg.seed}"
    for key in ("teacher_problems", "unseen_problems", "pretrain_steps", "diffusion_steps"):
        if getattr(cfg, key) < 1:
            raise InputError(f"--{key}={getattr(cfg, key)}: must be at least 1")
    write_world(cfg, out)
    for path in sorted(out.glob("*.jsonl")):
        data.main(source=str(path), tokenizer=str(out / "untrained"), out=str(out / path.stem), verifier="toy")
    if cfg.pretrain:
        pretrain(cfg, out / "untrained", out / "pretrain", cfg.pretrain_steps, student, weight_decay=0.1)
    if cfg.diffusion:
        write_diffusion_student(student, out / "converted")
        pretrain(cfg, out / "converted", out / "pretrain-diffusion", cfg.diffusion_steps,
                 f"students/toy-diffusion-{cfg.seed}", t_min=0.0, t_max=1.0)  # fmt: skip


def pretrain(cfg, start, examples, steps, student, **keys):
    """Train the model `start` on the student's traces by train.py and keep only what comes out, in `student`."""
    run = f"pretrain-{Path(student).name}"
    train.main(run=run, model=str(start), data=str(examples), steps=steps, batch_size=64, micro_batch_size=64, lr=3e-3,
               warmup_steps=20, seed=cfg.seed, **keys)  # fmt: skip
    last = Path("runs") / run / "checkpoints" / f"{steps:06d}"
    model.save(model.load(last), last, student)
    shutil.rmtree(Path("runs") / run)
    print(f"pretrained student: {student}")


if __name__ == "__main__":
    command(main, Config)
