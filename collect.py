"""Collect a teacher's traces: k sampled answers a prompt, graded, and one right one drawn for each.

    python collect.py --source=prompts.jsonl --out=traces.jsonl --server=http://localhost:8000/v1 --samples=16
    python collect.py --source=prompts.jsonl --out=traces.jsonl --samples_from=R1=r1.jsonl,Qwen=qwen.jsonl
    python collect.py --source=prompts.jsonl --out=traces.jsonl --model=FOLDER --samples=16
    python data.py --source=traces.jsonl --tokenizer=STUDENT --out=data/traces

A line of the source is {"id", "prompt" or "messages", "answer"}, or GSM8K's {"question", "answer"}. As in
the paper, a prompt without any right answer is dropped, and of several right ones one is drawn at
random. Several teachers give equally many traces, as far as they can, mixed at random: a mixture has
as many traces, and so as many training steps, as a single teacher would give.

What a server or a model has answered is in <out>.samples.jsonl as soon as it is finished: the same
command goes on after a kill. What was dropped, and why, is printed and in <out>.report.json.
Next: toy.py.
"""

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from formats import read_rows
from hf.families import local_folder
from hf.tokenizer import load_tokenizer
from model import load
from plumbing.config import InputError, above, command, read_json, require, whole_file, write_json
from plumbing.engine import Server, ask_all, read_samples, seed_of
from plumbing.parallel import pick_device, pick_dtype
from sample import ends_and_size, sample
from sampling import Sampling, check_greedy, check_ranges, sampling_keys
from verify import VERIFIERS, judge, opens_thoughts, unmatchable


@dataclass
class Config(Sampling):
    source: str = ""  # a jsonl file of prompts with answers
    out: str = ""  # the jsonl file of traces to write
    samples: int = 16  # answers per prompt, of a server or a model
    verifier: str = "auto"  # how answers are read: boxed, gsm8k, integer, toy, or auto
    temperature: float = 0.6  # as in the paper
    max_new_tokens: int = 16384  # length limit of an answer; one that reaches it is never drawn
    seed: int = 0  # of the sampling, and of the draw
    # the teacher: one of these
    samples_from: str = ""  # jsonl files of answers, separated by commas; NAME=FILE names a teacher
    server: str = ""  # URL of an OpenAI-style server, http://localhost:8000/v1
    served: str = ""  # the name of the model there; default: the only one that it serves
    model: str = ""  # a Hugging Face folder or hub id, for our own sampler
    timeout: float = 600.0  # seconds that the server may take for an answer
    retries: int = 8  # how often a request is tried again
    batch_size: int = 64  # answers written, or requests under way, at the same time
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = ""  # of our own sampler; default: bfloat16 on a GPU, float32 elsewhere


@dataclass
class Prompt:
    id: str
    messages: list
    answer: str


# --------------------------------------------------------------------------------------------------
# The draw


def draw(prompts, right, seed):
    """One right trace for each prompt that has any -> {prompt id: (teacher, trace)}.

    right: {teacher: {prompt id: [traces]}}. The prompts are gone through in random order, and the
    teacher that has given the fewest traces so far goes first, ties at random.
    """
    rng = random.Random(f"draw {seed}")
    order = [prompt.id for prompt in prompts]
    rng.shuffle(order)
    given = Counter(dict.fromkeys(right, 0))
    drawn = {}
    for name in order:
        able = [teacher for teacher in right if right[teacher].get(name)]
        if not able:
            continue
        rng.shuffle(able)
        teacher = min(able, key=given.__getitem__)
        given[teacher] += 1
        drawn[name] = teacher, rng.choice(right[teacher][name])
    return drawn


def grade_teacher(prompts, answers, verifier):
    """One teacher's answers -> ({prompt id: [right, whole traces]}, {prompt id: Counter of verdicts}).

    A verdict is right, wrong, truncated, unparsed, unclosed (thoughts that never end) or undecided
    (only math-verify, which is not installed, could tell).
    """
    references = {prompt.id: prompt.answer for prompt in prompts}
    # a chat template that opens the thoughts itself leaves only their end in the answers
    opened = any("</think>" in a["response"].partition("<think>")[0] for a in answers)
    right = {}
    verdicts = {name: Counter() for name in references}
    for answer in answers:
        name = answer["id"]
        verdict = judge(answer["response"], references[name], verifier, opened)
        kind = "wrong"
        if answer["truncated"]:
            kind = "truncated"
        elif verdict["thoughts"] == "unclosed":
            kind = "unclosed"
        elif verdict["extracted"] is None:
            kind = "unparsed"
        elif verdict.get("undecided"):
            kind = "undecided"
        elif verdict["correct"]:
            kind = "right"
            trace = answer["response"]
            if opened and "<think>" not in trace:
                trace = "<think>\n" + trace
            right.setdefault(name, []).append(trace)
        verdicts[name][kind] += 1
    return right, verdicts


# --------------------------------------------------------------------------------------------------
# Prompts in, traces out


def read_prompts(path, verifier):
    """[Prompt]. Raises InputError with file and line for a prompt without an answer that a response
    could match."""
    prompts = []
    seen = {}
    for number, where, row in read_rows(path):
        name = str(row.get("id", number))
        if name in seen:
            raise InputError(f"{where}: the id {name!r} was in line {seen[name]} already")
        seen[name] = number
        messages = row.get("messages")
        if messages is None:
            text = row.get("prompt", row.get("question", row.get("problem")))
            if not isinstance(text, str) or not text.strip():
                raise InputError(f'{where}: no "prompt", "messages" or "question"')
            messages = [{"role": "user", "content": text}]
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]  # the answer of somebody else
        if not messages:
            raise InputError(f'{where}: "messages" is empty')
        answer = row.get("answer")
        if answer is None:
            raise InputError(f'{where}: no "answer", so no trace could be graded')
        if "question" in row and "####" in str(answer):
            answer = answer.rpartition("####")[2].strip().replace(",", "")
        why = unmatchable(answer, verifier)
        if why:
            raise InputError(f'{where}: "answer" {why}')
        prompts.append(Prompt(name, messages, str(answer)))
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def main(**given):
    """Write the traces and the report -> {prompt id: (teacher, trace)}."""
    cfg = Config(**given)
    check(cfg, given)
    prompts = read_prompts(cfg.source, cfg.verifier)
    known = {prompt.id for prompt in prompts}
    files = teachers(cfg)
    if not files:
        path = Path(f"{cfg.out}.samples.jsonl")
        ask_teacher(cfg, prompts, path)
        files = {cfg.served or Path(cfg.model or cfg.server).name: path}
    right = {}
    verdicts = {}
    for teacher, path in files.items():
        right[teacher], verdicts[teacher] = grade_teacher(
            prompts, read_samples(path, known), cfg.verifier
        )
    drawn = draw(prompts, right, cfg.seed)
    made = report(prompts, verdicts, drawn)
    for line in made["lines"]:
        print(line)
    if not drawn:
        raise InputError(f"{cfg.out}: no prompt has a right trace, nothing written")
    with whole_file(cfg.out) as aside, open(aside, "w", encoding="utf-8") as file:
        for prompt in prompts:
            if prompt.id in drawn:
                teacher, trace = drawn[prompt.id]
                row = {"id": prompt.id, "messages": prompt.messages, "response": trace}
                row |= {"answer": prompt.answer, "teacher": teacher}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(f"{cfg.out}.report.json", made | {"config": asdict(cfg)})
    print(f"{cfg.out}: {len(drawn)} traces")
    return drawn


def check(cfg, given):
    for key in ("source", "out"):
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")
    if sum(bool(key) for key in (cfg.samples_from, cfg.server, cfg.model)) != 1:
        raise InputError("the teacher: give one of --samples_from, --server and --model")
    require(
        cfg,
        verifier=VERIFIERS,
        samples=(1, None),
        batch_size=(1, None),
        retries=(0, None),
        timeout=(above(0), None),
    )
    check_ranges(cfg)
    check_greedy(given, cfg)


def teachers(cfg):
    """--samples_from -> {teacher: file}."""
    files = {}
    for text in cfg.samples_from.split(",") if cfg.samples_from else ():
        name, _, path = text.rpartition("=")
        name = name or Path(path).stem
        if name in files:
            raise InputError(
                f"--samples_from: {name} is named twice; name the teachers with NAME=FILE"
            )
        files[name] = path
    return files


def ask_teacher(cfg, prompts, path):
    """Let a server or our own sampler answer, --samples times each, into the file `path`.

    Answers that are in the file are not asked for again; it is refused if it was sampled otherwise.
    """
    settings = sampling_keys(cfg) | {"teacher": cfg.model or f"{cfg.server} {cfg.served}"}
    note = path.with_suffix(".json")
    if path.exists() and note.exists() and read_json(note) != settings:
        raise InputError(
            f"{path}: was sampled with other keys ({note}); name another --out, or remove it"
        )
    lines = []
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.split("\n")[:-1] if line]  # the last may have been cut off
    with whole_file(path) as aside:
        aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    write_json(note, settings)
    done = {(row["id"], row["sample"]) for row in map(json.loads, lines)}
    asked = [
        (prompt, k) for prompt in prompts for k in range(cfg.samples) if (prompt.id, k) not in done
    ]
    if done:
        print(f"{path}: {len(done)} answers were there already, {len(asked)} are missing")
    with open(path, "a", encoding="utf-8") as file:

        def keep(answer):
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()

        if asked and cfg.server:
            ask_server(cfg, asked, keep)
        elif asked:
            ask_model(cfg, asked, keep)


def ask_server(cfg, asked, keep):
    server = Server(cfg.server, cfg.timeout, cfg.retries)
    served = cfg.served or server.only_model()
    bodies = {}
    for prompt, k in asked:
        body = {"model": served, "messages": prompt.messages, "max_tokens": cfg.max_new_tokens}
        body |= {"temperature": cfg.temperature, "top_p": cfg.top_p}
        body["seed"] = seed_of(cfg.seed, f"{prompt.id} {k}")
        if cfg.top_k:
            body["top_k"] = cfg.top_k
        bodies[prompt.id, k] = body

    def finished(key, answers):
        keep({"id": key[0], "sample": key[1], **answers[0]})

    ask_all(server, "chat/completions", bodies, cfg.batch_size, finished)


def ask_model(cfg, asked, keep):
    folder = local_folder(cfg.model)
    tokenizer = load_tokenizer(folder)
    device = pick_device(cfg.device)
    teacher = load(folder, device, pick_dtype(cfg.dtype, device))
    ids = [tokenizer.encode_prompt(prompt.messages) for prompt, _ in asked]

    def finished(number, answer):
        prompt, k = asked[number]
        text = tokenizer.decode(answer)
        # the trace begins where the thoughts do
        if opens_thoughts(tokenizer.decode(ids[number][-9:])):
            text = "<think>\n" + text
        row = {"id": prompt.id, "sample": k, "response": text}
        keep(row | {"truncated": len(answer) == cfg.max_new_tokens, "n_tokens": len(answer)})

    sample(
        teacher,
        ids,
        cfg,
        example_ids=[f"{prompt.id} {k}" for prompt, k in asked],
        batch_size=cfg.batch_size,
        finished=finished,
        **ends_and_size(teacher, tokenizer),
    )


def report(prompts, verdicts, drawn):
    """What became of every prompt and answer: {"teachers", "dropped", "lines" to print}."""
    made = {"teachers": {}, "dropped": {}}
    lines = []
    for teacher, of_prompt in verdicts.items():
        total = sum(of_prompt.values(), Counter())
        used = sum(name == teacher for name, _ in drawn.values())
        made["teachers"][teacher] = {"answers": dict(total), "traces": used}
        shares = ", ".join(f"{kind} {n}" for kind, n in total.most_common())
        lines.append(f"{teacher}: {total.total()} answers ({shares}); traces drawn: {used}")
    for prompt in prompts:
        if prompt.id not in drawn:
            found = sum((of_prompt[prompt.id] for of_prompt in verdicts.values()), Counter())
            made["dropped"][prompt.id] = dict(found) or {"no answer": 1}
    reasons = Counter(max(found, key=found.get) for found in made["dropped"].values())
    why = ", ".join(f"{n} mostly {kind}" for kind, n in reasons.most_common())
    dropped = f"dropped, as no answer was right: {len(made['dropped'])}" + (why and f" ({why})")
    lines.append(f"prompts: {len(prompts)}; {dropped}")
    made["lines"] = lines
    return made


if __name__ == "__main__":
    command(main, Config)
