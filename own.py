"""A student's own answers as training data: the controls without a teacher.

    python own.py --model=M --data=data/traces --temperature=0 --out=own-greedy.jsonl
    python own.py --model=M --data=data/traces --samples=8 --correct=true --out=own-correct.jsonl
    python data.py --source=own-greedy.jsonl --tokenizer=M --template=none --out=data/own-greedy

If training on these gains as much as training on the teacher's traces, it is not the teacher that
the student learns from: it becomes surer of what it knew. The first command needs nothing but the
prompts; the second also needs answers to grade with (rejection sampling).

They answer the prompts of a data folder. The lines they write hold the prompt as the student read
it, chat template included, hence --template=none. Any student will do, autoregressive or diffusion.
An answer that was cut off at --max_new_tokens is never kept: data.py would end it as if it had been
complete. Next: demo.py.
"""

import json
from dataclasses import dataclass

import data
import eval as evaluation
from hf.families import at_revision, local_folder
from hf.tokenizer import load_tokenizer
from model import load
from plumbing.config import InputError, command, require, whole_file
from plumbing.parallel import pick_device, pick_dtype
from sampling import Sampling, check_greedy


@dataclass
class Config(Sampling):
    model: str = ""  # the student: a Hugging Face folder or hub id
    revision: str = ""  # of a hub id: the branch, tag or commit
    data: str = ""  # the problems: a folder made by data.py
    out: str = ""  # the jsonl file to write
    samples: int = 1  # answers per problem, of which one is kept
    correct: bool = False  # keep right answers only; a problem without one is left out
    batch_size: int = 64  # answers written at the same time: memory and speed, not the answers
    device: str = ""  # cpu, cuda, ...; default: cuda if there is one
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 on a GPU, float32 elsewhere


def main(**given):
    """Answer the problems, keep one answer each, write the jsonl file -> its lines as dicts.

    Raises InputError for missing keys, for a data folder of another tokenizer, and if no answer is
    left to keep.
    """
    cfg = Config(**given)
    for key in ("model", "data", "out"):
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")
    require(cfg, samples=(1, None), batch_size=(1, None))
    check_greedy(given, cfg)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    folder = local_folder(at_revision(cfg.model, cfg.revision))
    tokenizer = load_tokenizer(folder)
    problems = data.load(cfg.data)
    if tokenizer.hash != problems.meta["tokenizer_hash"]:
        message = f"{cfg.data}: made with another tokenizer than {cfg.model} has"
        raise InputError(f"{message}; run data.py with that folder")
    prompts = [prompt_text(tokenizer, problems, i) for i in range(len(problems))]
    student = load(folder, device, dtype)
    _, rows = evaluation.evaluate(
        student,
        tokenizer,
        problems,
        cfg,
        samples=cfg.samples,
        batch_size=cfg.batch_size,
    )

    lines = []
    for i, (example, prompt) in enumerate(zip(problems.examples, prompts, strict=True)):
        row = keep_one(rows[i * cfg.samples : (i + 1) * cfg.samples], cfg)
        if row is not None:
            line = {"id": example["id"], "prompt": prompt, "response": row["response"]}
            lines.append({**line, "answer": example["answer"]})
    if not lines:
        kind = "right and complete" if cfg.correct else "complete"
        message = f"--model={cfg.model}: none of its {len(rows)} answers is {kind}"
        raise InputError(f"{message}; raise --samples or --max_new_tokens")
    with whole_file(cfg.out) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    right = sum(row["correct"] for row in rows) / len(rows)
    print(f"{cfg.out}: {len(lines)} of {len(problems)} problems, {right:.1%} of all answers right")
    return lines


def keep_one(rows, cfg):
    """Of the answers to one problem, the one to train on; None if none will do.

    It is drawn at random, as the paper draws one of the teacher's correct traces: the first or the
    shortest would be a preference of its own. The draw is a function of (seed, id).
    """
    fit = [row for row in rows if not row["truncated"] and (row["correct"] or not cfg.correct)]
    if not fit:
        return None
    [u] = data.uniforms(cfg.seed, f"own {rows[0]['id']}", 1)
    return fit[int(u * len(fit))]


def prompt_text(tokenizer, problems, i):
    """The prompt of problem i as text, special tokens included.

    Raises InputError if the text does not lead back to the tokens.
    """
    ids = problems.prompt(i).tolist()
    text = tokenizer.decode(ids)
    if tokenizer.encode_bare(text) != ids:
        name = problems.examples[i]["id"]
        raise InputError(f"{problems.folder}: example {name}: the text of its prompt has other tokens")
    return text


if __name__ == "__main__":
    command(main, Config)
