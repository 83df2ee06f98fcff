"""Small worlds for a laptop in which Imitation Shock, and T3S, really happen: exact answers, no
downloads.

    python toy.py --seed=1                    # data/toy-1/: an untrained student and jsonl files
    python toy.py --seed=1 --pretrain=true    # and pretrain that student: students/toy-1/
    python toy.py --seed=1 --diffusion=true   # and make a masked-diffusion student of it
    python toy.py --world=facts --seed=31     # the other world: data/facts-31/
    python toy.py --classes=demo/1/sft        # a run by class of token: confidence, errors, selections

A problem is a digit and four operations, from left to right, modulo 10: `3+5*2-7+4?`. Student and
teacher both write a step per operation, `3+5=8; 8*2=6; 6-7=9; 9+4=3; >3`, each in its own manner:

    pretrain.jsonl   the student's: now and then a familiar word before a step, and its weakness
    teacher.jsonl    the teacher's: always right, and before every step a word that the student
                     hardly knows
    unseen.jsonl     problems that occur in no other file, for eval.py

The worlds differ in the student's weakness:

    slips   one time in ten, the digit that it carries into a step is not the result of the step
            before. Its greedy answers are nearly perfect, only sampling slips: what it gains from
            any training is to become surer of what it knows.
    facts   24 of the 64 products of digits from 2 to 9 are unknown to it: in its pretraining data
            their results are random. Greedy answers do not help: the teacher knows something.
    weak    slips one time in three: for masked-diffusion students, which write the surest token
            first and so slip less often than they were taught to.

A student has an ability of its own; the teacher has something to teach, and a mannerism that is no
part of it. The checkpoint and its tokenizer.json are ordinary Hugging Face files: data.py,
train.py, select.py and eval.py treat them as they would treat Qwen3-8B. Next: own.py.
"""

import json
import random
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
import model
import train
from hf.tokenizer import BYTE_OF_CHAR, load_tokenizer
from plumbing.config import InputError, command, read_json, require, whole_folder, write_json
from plumbing.runs import run_folder, run_keys


@dataclass
class Config:
    world: str = "slips"  # slips, facts or weak: what the student is weak at
    seed: int = 1  # of the problems, the slips, the unknown products, the weights
    out: str = ""  # folder to write; default data/toy-<seed>, in other worlds data/<world>-<seed>
    pretrain: bool = False  # pretrain the student too, a minute or two on two CPU cores
    diffusion: bool = False  # make a masked-diffusion student of it, five minutes more
    pretrain_steps: int = 1200  # batches of 64 fresh problems
    diffusion_steps: int = 1600  # batches of 64 fresh problems
    teacher_problems: int = 200  # traces in teacher.jsonl
    unseen_problems: int = 300  # problems in unseen.jsonl
    classes: str = ""  # instead of all that: print a finished run by class of token


@dataclass(frozen=True)
class World:
    name: str  # of its folders, data/<name>-<seed> and students/<name>-<seed>
    slip_rate: float  # how often the student carries a random digit into a step
    unknown: int  # how many products of two digits from 2 to 9 the student does not know
    familiar_rate: float = 0.5  # of the student's steps open with one of its familiar words


WORLDS = {
    "slips": World("toy", slip_rate=0.1, unknown=0),
    "facts": World("facts", slip_rate=0.02, unknown=24),
    "weak": World("weak", slip_rate=0.35, unknown=0, familiar_rate=1.0),
}

OPERATORS = "+-*"
OPERATIONS = 4
FAMILIAR = ("so", "then", "thus", "now")  # the student's words
TEACHER = ("hence", "wait", "ok", "check")  # the teacher's: one before every step
TEACHER_RATE = 0.004  # of the student's steps open with one of those: next to unknown
BLOCK_LENGTH = 8  # tokens that the diffusion student writes together: about one step of a trace
INIT_STD = 0.06  # of the weights: at 0.02, made for wide models, copying is learned late or never
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|mask|>")  # the mask: for diffusion students
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# --------------------------------------------------------------------------------------------------
# Problems and traces


def make_problem(rng):
    """A problem as text, without the question mark: a digit and OPERATIONS times an operator and a
    digit."""
    problem = str(rng.randrange(10))
    for _ in range(OPERATIONS):
        problem += rng.choice(OPERATORS)
        problem += str(rng.randrange(10))
    return problem


def apply(operator, a, b):
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


def operations(problem):
    """The (operator, digit) pairs behind a problem's first digit."""
    pairs = zip(problem[1::2], problem[2::2], strict=True)
    return [(operator, int(digit)) for operator, digit in pairs]


def solve(problem):
    """The answer, a digit: operations from left to right, each result modulo 10."""
    value = int(problem[0])
    for operator, digit in operations(problem):
        value = apply(operator, value, digit)
    return value


def write_trace(problem, word, slip, compute=apply):
    """Steps and final answer.

    word(i)                 the word that opens step i, "" for none
    slip(value)             what is carried into a step where `value` would be right
    compute(operator, a, b) the result that is written

    After a slip the trace goes on from what was written.
    """
    value = int(problem[0])
    steps = []
    for i, (operator, digit) in enumerate(operations(problem)):
        opening = word(i)
        opening += " " if opening else ""
        value = slip(value)
        result = compute(operator, value, digit)
        steps.append(f"{opening}{value}{operator}{digit}={result}; ")
        value = result
    return "".join(steps) + f">{value}"


def student_trace(rng, problem, world=WORLDS["slips"], unknown=frozenset()):
    """What the student is pretrained on: its own words, slips, and guesses at unknown products.

    unknown: pairs of digits, as unknown_products returns them
    """
    words = []
    for _ in range(OPERATIONS):
        draw = rng.random()
        if draw < TEACHER_RATE:
            words.append(rng.choice(TEACHER))
        elif draw < TEACHER_RATE + world.familiar_rate:
            words.append(rng.choice(FAMILIAR))
        else:
            words.append("")

    def slip(value):
        return rng.randrange(10) if rng.random() < world.slip_rate else value

    def guess(operator, a, b):
        if operator == "*" and (a, b) in unknown:
            return rng.randrange(10)
        return apply(operator, a, b)

    return write_trace(problem, words.__getitem__, slip, guess)


def teacher_trace(rng, problem):
    """What the student is fine-tuned on: every step right, behind a word of the teacher's."""

    def word(i):
        chosen = rng.choice(TEACHER)
        rng.choice(TEACHER)  # drawn for nothing, as in the worlds that the figures come from
        return chosen

    return write_trace(problem, word, slip=lambda value: value)


def unknown_products(world, seed):
    """The pairs (a, b) of digits from 2 to 9 whose product a*b the student of this world does not
    know. 3*7 may be unknown while 7*3 is known: they are two facts."""
    pairs = [(a, b) for a in range(2, 10) for b in range(2, 10)]
    return frozenset(random.Random(f"{seed} unknown").sample(pairs, WORLDS[world].unknown))


# --------------------------------------------------------------------------------------------------
# The student


def vocabulary_and_merges():
    """One token per symbol: a digit, an operator, `; `, or a word with the blank behind it."""
    char_of_byte = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    blank = char_of_byte[ord(" ")]
    words = [word + blank for word in FAMILIAR + TEACHER] + [";" + blank]
    beginnings = [word[:n] for word in words for n in range(2, len(word) + 1)]
    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    merges = []
    # all bytes come first, so that any text can be encoded
    for token in [*(char_of_byte[byte] for byte in range(256)), *beginnings]:
        if token in vocabulary:
            continue
        vocabulary[token] = len(vocabulary)
        if len(token) > 1:
            merges.append([token[:-1], token[-1]])
    return vocabulary, merges


def tokenizer_json():
    """A byte-level BPE as the contents of a tokenizer.json.

    ignore_merges: a word of the vocabulary is one token although merging would begin check with the
    `he` of hence.
    """
    vocabulary, merges = vocabulary_and_merges()
    split = {
        "type": "Split",
        "pattern": {"Regex": "[a-z]+ ?|; ?|[\\s\\S]"},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    from_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocabulary,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "added_tokens": [special_token(i, name) for i, name in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "decoder": from_bytes,
        "model": bpe,
    }


def special_token(i, name):
    """An entry of tokenizer.json's added_tokens."""
    return {
        "id": i,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def write_student(out, seed):
    """An untrained Qwen3-like student of 115 thousand parameters as a Hugging Face folder."""
    tokenizer = tokenizer_json()
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "mask_token": SPECIAL[3],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": max(tokenizer["model"]["vocab"].values()) + 1,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "tokenizer.json", tokenizer)
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        write_json(folder / "config.json", config)
        student = model.Transformer(model.read_config(folder))
        model.save(student.init_weights(seed, std=INIT_STD), folder, out)


SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
)


def write_diffusion_student(student, out):
    """The same weights as a LLaDA2-like block-diffusion model without experts: as LLaDA2 was made
    from Ling.

    Attention is block-causal from now on and position i predicts its own token, so it has to be
    trained again.
    """
    raw = read_json(Path(student) / "config.json")
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        **{key: raw[key] for key in SHARED_KEYS},
        "use_qk_norm": True,
        "partial_rotary_factor": 1.0,
        "block_length": BLOCK_LENGTH,
        "mask_token_id": load_tokenizer(student).mask_token_id,
        # every layer is dense; the keys of the experts have to be there all the same
        "first_k_dense_replace": raw["num_hidden_layers"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": raw["intermediate_size"],
    }
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config)
        converted = model.Transformer(model.read_config(folder))
    converted.load_state_dict(model.load(student).state_dict())
    model.save(converted, student, out)


# --------------------------------------------------------------------------------------------------
# Classes of token: what the words, the carried digits and the results do in a run

STEP = re.compile(r"(?:(?P<word>[a-z]+) )?(?P<a>\d)(?P<operator>[+*-])(?P<b>\d)=(?P<result>\d); ")
CLASSES = (
    "teacher's word",
    "own word",
    "copied",  # the problem's digits and operators
    "carried",  # the digit that a step takes over from the step before
    "known result",
    "unknown result",
    "answer",
    "form",  # = ; > and the end
)


def token_classes(examples, tokenizer, unknown=frozenset()):
    """The class of every response token of a data.Data of traces, "" for prompts: (n_tokens,) str.

    A token that no trace has, or that stands where a trace has none, is of class "form".
    """
    classes = np.full(len(examples.tokens), "", dtype=object)
    for i, (_, begin, end) in enumerate(examples.spans):
        names = character_classes(tokenizer.decode(examples.response(i).tolist()), unknown)
        at = 0
        for token in range(begin, end):
            classes[token] = names[at] if at < len(names) else "form"
            at += len(tokenizer.decode([int(examples.tokens[token])]))
    return classes


def character_classes(trace, unknown=frozenset()):
    """The class of each character of a trace."""
    names = ["form"] * len(trace)
    for number, step in enumerate(STEP.finditer(trace)):
        product = (int(step["a"]), int(step["b"]))
        guessed = step["operator"] == "*" and product in unknown
        part_classes = {
            "word": "teacher's word" if step["word"] in TEACHER else "own word",
            "a": "carried" if number else "copied",
            "operator": "copied",
            "b": "copied",
            "result": "unknown result" if guessed else "known result",
        }
        for part, name in part_classes.items():
            for at in range(*step.span(part)):
                names[at] = name
    if final := re.search(r">(\d)", trace):
        names[final.start(1)] = "answer"
    return names


def first_error(problem, response, unknown=frozenset()):
    """The class of the first thing that is wrong in a response to `problem`, None for none.

    "form" is anything that is not a trace of this problem: another notation, too few steps, an end
    that is missing.
    """
    steps = list(STEP.finditer(response))
    asked = operations(problem)
    carried = int(problem[0])
    for number, (step, (operator, digit)) in enumerate(zip(steps, asked, strict=False)):
        if step.start() != (steps[number - 1].end() if number else 0):
            return "form"
        if (step["operator"], step["b"]) != (operator, str(digit)):
            return "copied"
        if int(step["a"]) != carried:
            return "carried" if number else "copied"
        carried = int(step["result"])
        if carried != apply(operator, int(step["a"]), digit):
            guessed = operator == "*" and (int(step["a"]), digit) in unknown
            return "unknown result" if guessed else "known result"
    rest = response[steps[-1].end() if steps else 0 :]
    if len(steps) != len(asked) or not re.fullmatch(r">\d", rest):
        return "form"
    return None if int(rest[1]) == carried else "answer"


def show_classes(run):
    """Print a run by class of token -> {"confidence": {step: {class: p}}, "kept", "errors": {...}}.

    Confidence is the mean probability that the student gives the teacher's tokens of a class, which
    is how often it would sample them; of recorded steps, over the training data. Kept is the share
    of a class's loss at step 0 that each selection of the run leaves to train on. Errors are the
    shares of answers whose first error is of a class, for each file of answers in the run's eval/.
    Raises InputError for a run whose data is not of a world that toy.py wrote.
    """
    folder = run_folder(run)
    home = Path(run_keys(folder)["data"])
    about = home.parent / "world.json"
    if not about.is_file():
        raise InputError(f"{run}: its data, {home}, is of no world ({about}: no such file)")
    unknown = frozenset(map(tuple, read_json(about)["unknown"]))
    examples = data.load(home)
    classes = token_classes(examples, load_tokenizer(home.parent / "untrained"), unknown)
    confidence = {}
    for path in sorted((folder / "trajectory").glob("[0-9]*.npz")):
        with np.load(path) as recorded:
            probability = np.exp(recorded["logprob"])
        means = {name: probability[classes == name].mean() for name in CLASSES if name in classes}
        confidence[int(path.stem)] = {name: float(mean) for name, mean in means.items()}
    print_table("mean probability of the teacher's tokens, by recorded step", confidence)
    kept = {}
    for path in sorted((folder / "selection").glob("*/mask.npy")):
        kept[path.parent.name] = loss_kept(np.load(path), folder, classes)
    print_table("share of the loss at step 0 that a selection keeps", kept)
    errors = {}
    for path in sorted((folder / "eval").glob("*.jsonl")):
        errors[path.stem] = error_shares(path, home.parent, unknown)
    print_table("share of all answers by their first error", errors)
    return {"confidence": confidence, "kept": kept, "errors": errors}


def loss_kept(mask, folder, classes):
    """{class: share of its NLL under theta_0 that stays in the loss}; mask (n_tokens,)."""
    with np.load(folder / "trajectory" / "000000.npz") as recorded:
        nll = -recorded["logprob"].astype(np.float64)
    found = {}
    for name in CLASSES:
        own = classes == name
        if own.any():
            found[name] = float((mask[own] * nll[own]).sum() / nll[own].sum())
    return found


def error_shares(path, world, unknown):
    """{class: share of the answers in eval.py's file `path` whose first error it is}."""
    name = path.stem.rpartition("-")[0] or path.stem  # unseen-000036: of data/<world>/unseen
    problems = {}
    for line in (world / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        problems[str(example["id"])] = example["prompt"].removesuffix("?")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = Counter(first_error(problems[row["id"]], row["response"], unknown) for row in rows)
    return {name: found[name] / len(rows) for name in CLASSES if name in found}


def print_table(title, columns):
    """columns: {head: {row: value}}; rows in the order of CLASSES."""
    if not columns:
        return
    print(title)
    width = max(len(str(head)) for head in columns) + 2
    print(f"{'':16}" + "".join(f"{head:>{width}}" for head in columns))
    for name in CLASSES:
        values = [column.get(name) for column in columns.values()]
        if any(value is not None for value in values):
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            print(f"{name:16}" + "".join(f"{cell:>{width}}" for cell in cells))


# --------------------------------------------------------------------------------------------------
# The command


def main(**given):
    """Write the world, tokenised for train.py and eval.py, and pretrain its students if asked to."""
    cfg = Config(**given)
    if cfg.classes:
        return show_classes(cfg.classes)
    require(
        cfg,
        world=tuple(WORLDS),
        teacher_problems=(1, None),
        unseen_problems=(1, None),
        pretrain_steps=(1, None),
        diffusion_steps=(1, None),
    )
    name = WORLDS[cfg.world].name
    out = Path(cfg.out or f"data/{name}-{cfg.seed}")
    student = f"students/{name}-{cfg.seed}"
    write_world(cfg, out)
    tokenizer = str(out / "untrained")
    for path in sorted(out.glob("*.jsonl")):
        folder = str(out / path.stem)
        data.main(source=str(path), tokenizer=tokenizer, out=folder, verifier="toy")
    if cfg.pretrain:
        examples = out / "pretrain"
        pretrain(cfg, tokenizer, examples, cfg.pretrain_steps, student, weight_decay=0.1)
    if cfg.diffusion:
        write_diffusion_student(student, out / "converted")
        examples = out / "pretrain-diffusion"
        diffusion_student = f"students/{name}-diffusion-{cfg.seed}"
        noise = dict(t_min=0.0, t_max=1.0)
        start = out / "converted"
        pretrain(cfg, start, examples, cfg.diffusion_steps, diffusion_student, **noise)


def write_world(cfg, out):
    """Write the untrained student and the jsonl files into the folder `out`, all functions of
    --world and --seed. Of the pretraining files only those that are needed.

    No unseen problem is in another file, written or not. The two pretraining files begin with the
    same problems.
    """
    sizes = {
        "pretrain": cfg.pretrain_steps * 64,
        "pretrain-diffusion": cfg.diffusion_steps * 64,
        "teacher": cfg.teacher_problems,
    }
    rngs = {}
    for name in (*sizes, "unseen"):
        purpose = name.partition("-")[0]  # pretrain-diffusion draws what pretrain draws
        rngs[name] = random.Random(f"{cfg.seed} {purpose}")
    problems = {name: [make_problem(rngs[name]) for _ in range(n)] for name, n in sizes.items()}
    seen = {problem for group in problems.values() for problem in group}
    problems["unseen"] = []
    while len(problems["unseen"]) < cfg.unseen_problems:
        problem = make_problem(rngs["unseen"])
        if problem not in seen:
            seen.add(problem)
            problems["unseen"].append(problem)

    unknown = unknown_products(cfg.world, cfg.seed)
    wanted = ["teacher", "unseen"]
    wanted += ["pretrain"] if cfg.pretrain else []
    wanted += ["pretrain-diffusion"] if cfg.diffusion else []
    about = {"world": cfg.world, "seed": cfg.seed, "unknown": sorted(unknown)}
    with whole_folder(out, "untrained") as folder:
        write_student(folder / "untrained", cfg.seed)
        write_json(folder / "world.json", about)
        for name in wanted:
            lines = []
            for i, problem in enumerate(problems[name]):
                if name.startswith("pretrain"):
                    trace = student_trace(rngs[name], problem, WORLDS[cfg.world], unknown)
                else:
                    trace = teacher_trace(rngs[name], problem)
                example = {
                    "id": i,
                    "prompt": f"{problem}?",
                    "response": trace,
                    "answer": solve(problem),
                }
                lines.append(json.dumps(example) + "\n")
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def pretrain(cfg, start, examples, steps, student, **keys):
    """Train the model `start` on the student's traces by train.py and keep only what comes out, in
    `student`."""
    run = f"pretrain-{Path(student).name}"
    train.main(
        run=run,
        model=str(start),
        data=str(examples),
        steps=steps,
        batch_size=64,
        micro_batch_size=64,
        lr=3e-3,
        warmup_steps=20,
        seed=cfg.seed,
        **keys,
    )
    last = Path("runs") / run / "checkpoints" / f"{steps:06d}"
    model.save(model.load(last), last, student)
    shutil.rmtree(Path("runs") / run)
    print(f"pretrained student: {student}")


if __name__ == "__main__":
    command(main, Config)
