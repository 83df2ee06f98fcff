"""Answers of another engine to the problems of a data folder: from a server, or from its files.

    ask_server(cfg, server, served, problems, asked, job, store, progress)
    samples_of(job, problems, indices, cfg, told)

Both return {(id, sample): answer}. How requests and files look is in plumbing/engine.py.
Next: plumbing/table.py.
"""

from pathlib import Path

from formats import read_examples
from plumbing.answers import name_of
from plumbing.config import InputError
from plumbing.engine import ask_all, read_samples, seed_of
from plumbing.parallel import rank


def ask_server(cfg, server, served, problems, asked, job, store, progress):
    """Let the server answer what is not there yet -> {(id, sample): answer}.

    A checkpoint of ours is sent the prompt's token ids (/completions): what it was trained on, whatever
    the server makes of chat templates. A model that is known by its name only may have another
    tokenizer: it is sent the messages (/chat/completions), from the file the data was made from.
    """
    if job.folder:
        path = "completions"
        prompts = {i: {"prompt": problems.prompt(i).tolist()} for i in {i for i, _ in asked}}
    else:
        path = "chat/completions"
        prompts = messages_of(problems, {i for i, _ in asked})
    answers = dict(store.kept)
    bodies = {}
    for question in asked:
        name = name_of(problems, question)
        if name in answers:
            continue
        body = {"model": served, "max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
        body |= {"top_p": cfg.top_p, "seed": seed_of(cfg.seed, f"{name[0]} {name[1]}")}
        if cfg.top_k:
            body["top_k"] = cfg.top_k  # vLLM and SGLang know it, OpenAI does not
        bodies[name] = body | prompts[question[0]]

    def finished(name, found):
        answers[name] = {"id": name[0], "sample": name[1], **found[0]}
        store.keep(answers[name])
        if progress:
            progress(sum(name_of(problems, question) in answers for question in asked))

    ask_all(server, path, bodies, cfg.batch_size, finished)
    return answers


def messages_of(problems, indices):
    """{index: {"messages": [...]}}, read from the file that the data folder was made from."""
    source = problems.meta.get("source", "")
    if not Path(source).is_file():
        raise InputError(
            f"{problems.folder}: made from {source}, which is needed for the messages and is not there"
        )
    wanted = {problems.examples[i]["id"]: i for i in indices}
    found = {}
    for example in read_examples(source):
        if example.id in wanted:
            found[wanted[example.id]] = {"messages": example.messages}
    for i in indices:
        if i not in found:
            raise InputError(
                f"{source}: has no line with the id {problems.examples[i]['id']}; not what the data is of"
            )
    return found


def samples_of(job, problems, indices, cfg, told):
    """The answers of a file to these problems -> {(id, sample): answer}.

    Their samples are numbered anew, 0, 1, ...: as many for each problem as --samples says, or as the
    problem with the fewest has.
    """
    known = {example["id"] for example in problems.examples}
    several = {problems.examples[i]["id"]: [] for i in indices}
    for answer in sorted(read_samples(job.samples, known), key=lambda answer: answer["sample"]):
        if answer["id"] in several:
            several[answer["id"]].append(answer)
    fewest, name = min((len(answers), name) for name, answers in several.items())
    most = max(map(len, several.values()))
    without = sum(not answers for answers in several.values())
    if without:
        raise InputError(
            f"{job.samples}: {without} of {len(several)} problems have no answer, {name} for one"
        )
    if "samples" in told and cfg.samples > fewest:
        raise InputError(
            f"--samples={cfg.samples}: problem {name} has only {fewest} in {job.samples}"
        )
    n = cfg.samples if "samples" in told else fewest
    if most > n and rank() == 0:
        print(
            f"{job.samples}: {fewest} to {most} samples a problem; the first {n} of each are used"
        )
    return {(name, k): answers[k] for name, answers in several.items() for k in range(n)}
