"""Speed and memory against transformers and against the plain way, as ratios measured side by side in one run.

    python tests/bench.py                                                   # random weights of SmolLM2-135M's shape
    python tests/bench.py --what=train,generate --model=M --data=gsm8k_train.jsonl
    python tests/bench.py --what=loss                                       # one section: parity, train, generate, loss, moe

One function a section; each returns lines of the table that is printed at the end. A ratio is "how many times better
than the other side" (faster, or smaller). The two sides take turns, step by step, and a ratio is the median of the
ratios of neighbours: so other work on the machine slows both alike. Peaks of memory are those of a process that does
one side and nothing else. Figures that were kept, with the machine they came from: docs/LOG.md.
"""

import dataclasses
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the method shelf lies one folder up

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

import batches as batching  # noqa: E402
import data  # noqa: E402
import diffusion  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import trajectory  # noqa: E402
import verify  # noqa: E402
from hf import families  # noqa: E402
from hf import tokenizer as tokenizer_file  # noqa: E402
from plumbing import resume  # noqa: E402
from plumbing.config import InputError, command, write_json  # noqa: E402
from plumbing.parallel import parallelize  # noqa: E402


@dataclass
class Config:
    what: str = "parity,train,generate,loss,moe,compile,packing,recording,checkpoint,masked,blocks,threshold"  # parts
    model: str = ""  # a Hugging Face folder or hub id; default: random weights of SmolLM2-135M's shape
    data: str = ""  # a jsonl file for data.py, with --model; default: random ids, as many as GSM8K's lines have
    threads: int = 2  # of the CPU
    steps: int = 20  # train: optimizer steps
    batch_size: int = 4  # train: examples a step, in micro-batches of half as many
    repeats: int = 5  # generate, loss, moe: how often each side takes its turn
    new_tokens: int = 64  # generate: length of every answer


def main(**given):
    """Run the sections, print the table -> its lines, dicts: section, what, ours, other, ratio, wanted."""
    cfg = Config(**given)
    names = cfg.what.split(",")
    for name in names:
        if name not in SECTIONS:
            raise InputError(f"--what={name}: must be among {', '.join(SECTIONS)}")
    if cfg.data and not cfg.model:
        raise InputError("--data needs --model, whose tokenizer makes tokens of it")
    torch.set_num_threads(cfg.threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {cfg.threads} threads, torch {torch.__version__}, "
          f"load average before the start {os.getloadavg()[0]:.1f}")  # fmt: skip
    lines = []
    with tempfile.TemporaryDirectory() as home:
        folder = families.local_folder(cfg.model) if cfg.model else random_student(Path(home) / "student")
        examples = real_examples(cfg, folder, home) if cfg.data else random_examples(folder)
        for name in names:
            started = time.time()
            lines += [{"section": name, **line} for line in SECTIONS[name](cfg, folder, examples)]
            print(f"{name}: {time.time() - started:.0f} s", flush=True)
    print(f"\n{'':55}{'ours':>12}{'other':>12}{'ratio':>8}  wanted")
    for line in lines:
        ours, other = ("-" if line[key] is None else f"{line[key]:{'d' if isinstance(line[key], int) else '.4g'}}"
                       for key in ("ours", "other"))  # fmt: skip
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
        print(f"{line['section'] + ': ' + line['what']:55}{ours:>12}{other:>12}{ratio:>8}  {line['wanted']}".rstrip())
    return lines


def line(what, ours, other, ratio=None, wanted=""):
    """One line of the table; `wanted` is what the project promises, if it promises anything."""
    return {"what": what, "ours": ours, "other": other, "ratio": ratio, "wanted": wanted}


# ---------------------------------------------------------------------------------------------------------------------
# Students and examples


def random_student(folder):
    """A Hugging Face folder with SmolLM2-135M's shape and random weights."""
    folder.mkdir()
    write_json(folder / "config.json", dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=49152, hidden_size=576,
        intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        hidden_act="silu", rms_norm_eps=1e-5, rope_theta=100000, max_position_embeddings=8192,
        tie_word_embeddings=True, torch_dtype="float32"))  # fmt: skip
    student = model.Transformer(families.read_config(folder)).init_weights(seed=0)
    save_file(student.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_examples(folder, n=256):
    """Random ids; the lengths of prompts and responses are spread like those of GSM8K under SmolLM2's tokenizer."""
    rng = np.random.default_rng(0)
    prompts = np.exp(rng.normal(4.48, 0.23, n)).astype(np.int64)  # on average 90 tokens
    ends = np.cumsum(prompts + np.exp(rng.normal(4.75, 0.42, n)).astype(np.int64))  # and 126
    starts = np.concatenate(([0], ends[:-1]))
    tokens = rng.integers(0, families.read_config(folder).vocab_size, ends[-1]).astype(np.uint32)
    names = [{"id": str(i), "answer": None} for i in range(n)]
    return data.Data("random", tokens, np.stack([starts, starts + prompts, ends], 1), names, {}, "")


def real_examples(cfg, folder, home, n=256):
    """The first n lines of --data, through data.py."""
    source, out = Path(home) / "first.jsonl", Path(home) / "data"
    with open(cfg.data, "rb") as lines:
        source.write_bytes(b"".join(text for _, text in zip(range(n), lines, strict=False)))
    data.main(source=str(source), tokenizer=str(folder), out=str(out))
    return data.load(out)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def taking_turns(repeats, ours, other):
    """Call both in turn, once for nothing, then `repeats` times -> median seconds of each, median of other / ours."""
    seconds = []
    for _ in range(repeats + 1):
        pair = []
        for function in (ours, other):
            tick = time.perf_counter()
            function()
            pair.append(time.perf_counter() - tick)
        seconds.append(pair)
    return medians(seconds[1:])


def medians(seconds):
    """[(ours, other), ...] -> median of ours, of other, and of other / ours."""
    return (*(statistics.median(side) for side in zip(*seconds, strict=True)),
            statistics.median(other / ours for ours, other in seconds))  # fmt: skip


def alone(function, *args):
    """function(*args) in a fresh process, so that what it measures of its memory is its own.

    Raises InputError if the process is killed, as it is where memory runs out.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *args).result()
        except BrokenProcessPool:
            raise InputError(f"the process that measured {function.__name__} was killed: too little memory?") from None


def peak_memory():
    """The most bytes of real memory that this process has had."""
    try:  # Linux: ru_maxrss would be that of the process which started this one, if that was larger
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def free_memory():
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# parity: the same numbers as transformers and tokenizers, without which no ratio means anything


def parity_section(cfg, folder, examples, batch=4):
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(batching.collate(examples, range(batch))[0])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, other = model.load(folder)(ids), theirs(ids).logits
    lines = [line(f"largest difference of {ours.numel()} logits", (ours - other).abs().max().item(), None,
                  wanted="< 1e-4")]  # fmt: skip
    if cfg.data:
        from tokenizers import Tokenizer

        ours, other = tokenizer_file.load_tokenizer(folder), Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        texts = []
        for number, text in enumerate(Path(cfg.data).read_bytes().splitlines(), 1):
            _, messages, response, *_ = data.read_example(text, f"{cfg.data}, line {number}")
            texts += [*(message["content"] for message in messages), response]
        same = sum(ours.encode(t) == other.encode(t, add_special_tokens=False).ids for t in texts)
        lines.append(line("texts with the ids of tokenizers", same, len(texts), wanted="all"))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# train: train.py's step against transformers' Trainer. Same weights, micro-batches, AdamW, schedule, clipping; float32


def train_section(cfg, folder, examples):
    run = training(cfg, folder, examples, cfg.steps)
    ours, losses, seconds = our_steps(run), [], []
    tick = time.perf_counter()

    def our_turn():  # the Trainer calls this when it has done a step, whatever belongs to it included
        nonlocal tick
        theirs = time.perf_counter() - tick
        tick = time.perf_counter()
        losses.append(next(ours))
        seconds.append((time.perf_counter() - tick, theirs))
        tick = time.perf_counter()

    their_losses = trainer_steps(run, our_turn)
    tokens = sum(count for _, count in losses[1:])  # the first step warms up
    total = np.array(seconds[1:]).sum(0)
    difference = max(abs(a - b) for (a, _), b in zip(losses, their_losses, strict=True))
    peak = {side: alone(peak_of_training, side, cfg, folder, examples) / 1e9 for side in ("ours", "trainer")}
    return [
        line(f"tokens/s, against transformers' Trainer, {cfg.steps} steps", tokens / total[0], tokens / total[1],
             medians(seconds[1:])[2], ">= 1.0"),
        line("peak memory of the process, GB", peak["ours"], peak["trainer"], peak["trainer"] / peak["ours"]),
        line("largest difference of the losses", difference, None, wanted="< 1e-4"),
    ]  # fmt: skip


def training(cfg, folder, examples, steps):
    """A train.Run without a folder; what bench.py's keys do not say is train.py's default."""
    keys = train.Config(steps=steps, batch_size=cfg.batch_size, micro_batch_size=max(1, cfg.batch_size // 2))
    return train.Run(keys, torch.device("cpu"), None, folder, families.read_config(folder), None, examples, None, None)


def our_steps(run):
    """A generator: every next() does one update as train.py does it -> (loss, tokens)."""
    run.student = model.load(run.source)
    run.optimizer = train.make_optimizer(run.cfg, run.student)
    for step in range(run.cfg.steps):
        for group in run.optimizer.param_groups:
            group["lr"] = train.learning_rate(run.cfg, step)
        done = train.train_step(run.cfg, run.student, run.optimizer, train.micro_batches(run, step), step)
        yield done["loss"], done["tokens"]


def trainer_steps(run, after_step):
    """The same updates by transformers' Trainer -> their losses. after_step is called when a step is done.

    It gets its micro-batches ready-made, and without an attention mask: padding lies on the right, where causal
    attention never looks, and without a mask its attention is faster. It logs and saves nothing.
    """
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class AfterStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            after_step()

    class WithLosses(Trainer):  # what it logs is rounded
        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    losses, batches, cfg = [], [], run.cfg
    for step in range(cfg.steps):
        examples = batching.step_examples(len(run.train_set), cfg.batch_size, step, cfg.seed)
        for rows in batching.shares(run, examples):
            ids, targets, _ = batching.collate(run.train_set, [i for row in rows for i in row])
            labels = F.pad(torch.from_numpy(targets), (1, 0), value=-100)[:, :-1]  # it shifts them itself
            batches.append({"input_ids": torch.from_numpy(ids), "labels": labels})
    a_step = len(batches) // cfg.steps
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=cfg.steps, per_device_train_batch_size=1, gradient_accumulation_steps=a_step,
            optim="adamw_torch_fused", learning_rate=cfg.lr, adam_beta1=cfg.beta1, adam_beta2=cfg.beta2,
            weight_decay=cfg.weight_decay, max_grad_norm=cfg.clip, lr_scheduler_type=cfg.schedule,
            train_sampling_strategy="sequential", use_cpu=True, save_strategy="no", logging_strategy="no",
            report_to=[], disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        student = AutoModelForCausalLM.from_pretrained(run.source, dtype=torch.float32)
        WithLosses(student, arguments, train_dataset=batches, data_collator=lambda one: one[0],
                   callbacks=[AfterStep()]).train()  # fmt: skip
    return [sum(loss.item() for loss in losses[i : i + a_step]) for i in range(0, len(losses), a_step)]


def peak_of_training(side, cfg, folder, examples):
    """Peak memory of a process that does three steps of one side."""
    torch.set_num_threads(cfg.threads)
    run = training(cfg, folder, examples, min(3, cfg.steps))
    if side == "ours":
        list(our_steps(run))
    else:
        trainer_steps(run, lambda: None)
    return peak_memory()


# ---------------------------------------------------------------------------------------------------------------------
# generate: eval.py's greedy answers against transformers.generate


def generate_section(cfg, folder, examples, batch=16):
    from transformers import AutoModelForCausalLM

    prompts = [examples.prompt(i).tolist() for i in range(batch)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    student, theirs = model.load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers, ends, own = {}, [], student.config.eos_token_ids

    def ours():
        answers["ours"] = sample.sample(student, prompts, sample.Sampling(max_new_tokens=cfg.new_tokens, temperature=0), batch_size=batch,
                                            eos_ids=ends)  # fmt: skip

    def other():
        theirs.generation_config.eos_token_id = ends or None
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=cfg.new_tokens, do_sample=False, pad_token_id=0)
        answers["other"] = out[:, longest:].tolist()

    lines = []
    for ends in [[], own] if own else [[]]:  # every answer as long as allowed; then as long as it wants to be
        seconds = taking_turns(cfg.repeats, ours, other)
        written = sum(map(len, answers["ours"]))
        same = sum(b[: len(a)] == a and (len(a) == len(b) or b[len(a)] in ends)
                   for a, b in zip(answers["ours"], answers["other"], strict=True))  # fmt: skip
        lines += [
            line(f"tokens/s, {batch} answers {'up to their EOS' if ends else f'of {cfg.new_tokens} tokens'}",
                 written / seconds[0], written / seconds[1], seconds[2], ">= 1.2"),
            line("of these, same ids as transformers.generate", same, batch, wanted="all"),
        ]  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# loss: model(ids, targets=...) against cross-entropy of all logits, on a model that is nothing but embedding and head


def loss_section(cfg, folder, examples, vocabulary=151936, width=512, rows=8192):
    lines, sizes = [], (rows // 4, rows // 2, rows)
    fitting = [n for n in sizes if free_memory() is None or 1.2 * 3 * 4 * n * vocabulary < free_memory()]
    ours = alone(peaks_of_loss, "ours", cfg.threads, vocabulary, width, sizes)
    other = alone(peaks_of_loss, "all rows", cfg.threads, vocabulary, width, fitting)
    for n in sizes:
        if n not in fitting:  # logits, their log-softmax, its gradient
            print(f"loss: cross-entropy of all {n} rows needs {3 * 4 * n * vocabulary / 1e9:.0f} GB, more than is free")
        theirs = other[n] / 1e9 if n in fitting else None
        lines.append(line(f"extra memory, {n} rows, V {vocabulary}, GB", ours[n] / 1e9, theirs,
                          theirs and theirs * 1e9 / ours[n]))  # fmt: skip
    n = rows // 8
    for share in (1.0, 0.5):
        student, ids, targets = head_only(vocabulary, width, n, share)
        seconds = taking_turns(cfg.repeats, lambda: our_loss(student, ids, targets),  # noqa: B023
                               lambda: plain_loss(student, ids, targets))  # noqa: B023  # fmt: skip
        lines.append(line(f"seconds, {n} rows, {share:.0%} of them scored", *seconds))
    return lines


def head_only(vocabulary, width, rows, share=1.0):
    """A Transformer without layers, ids and targets (rows / 64, 64) of which `share` are scored."""
    config = families.Config("llama", vocabulary, width, width, 0, 1, 1, width, 1e-5, 1e4, tie_word_embeddings=True)
    student = model.Transformer(config).init_weights(seed=0)
    ids = torch.randint(vocabulary, (rows // 64, 64), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(1, dims=1)
    targets[:, : round(64 * (1 - share))] = -100
    return student, ids, targets


def our_loss(student, ids, targets):
    student.zero_grad(set_to_none=False)
    student(ids, targets=targets).sum().backward()


def plain_loss(student, ids, targets):
    student.zero_grad(set_to_none=False)
    F.cross_entropy(student(ids).flatten(0, 1), targets.flatten(), reduction="sum").backward()


def peaks_of_loss(side, threads, vocabulary, width, sizes):
    """{rows: bytes that a forward and backward pass adds to a process with the model and its gradients}, rows rising.

    The peak is that of the process so far: a size that needs less than the one before it would show the same.
    """
    torch.set_num_threads(threads)
    student, ids, targets = head_only(vocabulary, width, max(sizes))
    step, found = our_loss if side == "ours" else plain_loss, {}
    step(student, ids[:1], targets[:1])  # whatever is made once
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_memory()
    for rows in sizes:
        step(student, ids[: rows // 64], targets[: rows // 64])
        found[rows] = peak_memory() - before
    return found


# ---------------------------------------------------------------------------------------------------------------------
# moe: experts as grouped matrix products against a loop over the experts, which have a module each


def moe_section(cfg, folder, examples, experts=256, width=1024, expert_width=256, rows=(32, 1024)):
    config = families.Config(
        "llada2_moe", 1, width, width, 1, 1, 1, width, 1e-6, 1e4, num_experts=experts, num_experts_per_tok=8,
        moe_intermediate_size=expert_width, sigmoid_router=True, n_group=8, topk_group=4,
    )  # fmt: skip
    grouped = model.MoE(config)
    loop = nn.ModuleList(model.MLP(config, expert_width) for _ in range(experts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in grouped.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)
        for e, one in enumerate(loop):
            for name, parameter in one.named_parameters():
                parameter.copy_(getattr(grouped.experts, name.removesuffix(".weight"))[e])
    lines = []
    for n in rows:
        x = torch.randn(n, width, generator=generator)
        difference = (grouped(x) - loop_over_experts(grouped.gate, loop, x)).abs().max().item()
        with torch.no_grad():
            seconds = taking_turns(cfg.repeats, lambda: grouped(x), lambda: loop_over_experts(grouped.gate, loop, x))  # noqa: B023
        lines.append(line(f"seconds, {n} rows, {experts} experts, forward", *seconds))
    seconds = taking_turns(cfg.repeats, lambda: grouped(x).sum().backward(),
                           lambda: loop_over_experts(grouped.gate, loop, x).sum().backward())  # fmt: skip
    lines.append(line(f"seconds, {n} rows, {experts} experts, and backward", *seconds))
    lines.append(line("largest difference of the outputs", difference, None, wanted="< 1e-4"))
    return lines


def loop_over_experts(gate, experts, x):
    """x (N, C) -> (N, C), one expert after the other, as most published code does it."""
    weights, chosen = gate(x)  # (N, k)
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        if len(rows):
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# compile, packing, recording, checkpoint: what train.py's keys cost or save, against train.py without them


def small(cfg, folder, examples, n, **keys):
    """A train.Run with a student and an optimizer on the first n examples, all of them a step, two rows a pass."""
    spans, names = examples.spans[:n], examples.examples[:n]
    few = dataclasses.replace(examples, tokens=examples.tokens[: spans[-1, 2]], spans=spans, examples=names)
    run = training(dataclasses.replace(cfg, batch_size=n), folder, few, 1)
    run.cfg = dataclasses.replace(run.cfg, micro_batch_size=2, **keys)
    run.student = model.load(folder, shard=lambda student: parallelize(run.cfg, student, run.device))
    run.optimizer = train.make_optimizer(run.cfg, run.student)
    return run


def update(run):
    return train.train_step(run.cfg, run.student, run.optimizer, train.micro_batches(run, 0), 0)


def compile_section(cfg, folder, examples):
    if not shutil.which("g++"):
        print("compile: left out, torch.compile needs a C++ compiler and there is no g++ here")
        return []
    compiled, eager = (small(cfg, folder, examples, 8, compile=on) for on in (True, False))
    seconds = taking_turns(cfg.repeats, lambda: update(compiled), lambda: update(eager))
    return [line("seconds a step, blocks compiled, against eager", *seconds)]


def packing_section(cfg, folder, examples):
    packed, padded = (small(cfg, folder, examples, 32, packing=on) for on in (True, False))
    done = [update(run) for run in (packed, padded)]
    seconds = taking_turns(cfg.repeats, lambda: update(packed), lambda: update(padded))
    return [
        line("seconds a step, packed, against padded", *seconds),
        line("share of padding, packed, against padded", done[0]["padding"], done[1]["padding"]),
        line("difference of the first loss", abs(done[0]["loss"] - done[1]["loss"]), None, wanted="< 1e-5"),
    ]


def recording_section(cfg, folder, examples):
    """A recorded checkpoint without sampled answers: one forward pass over the data, against an epoch of training."""
    run = small(cfg, folder, examples, 16)
    with tempfile.TemporaryDirectory() as home:

        def record():
            with torch.no_grad():
                trajectory.sweep(run, Path(home) / "logprob", 0)
            (Path(home) / "logprob").unlink()

        sweep, epoch, ratio = taking_turns(cfg.repeats, record, lambda: update(run))
    return [line("seconds of a sweep, against an epoch of training", sweep, epoch, ratio, ">= 2.5")]


def checkpoint_section(cfg, folder, examples):
    """The resume state of torch.distributed.checkpoint with its hashes, against torch.save of the same tensors."""
    run = small(cfg, folder, examples, 2)
    update(run)
    with tempfile.TemporaryDirectory() as home:

        def plain():
            with open(Path(home) / "plain.pt", "wb") as file:
                torch.save(resume.tensors(run.student, run.optimizer), file)
                file.flush()
                os.fsync(file.fileno())

        seconds = taking_turns(2, lambda: resume.save(Path(home), run.student, run.optimizer, 1, 1), plain)
    return [line("seconds to write a resume state, against torch.save", *seconds)]


# ---------------------------------------------------------------------------------------------------------------------
# masked, blocks, threshold: diffusion.py's loss, cache and parallel decoding


STUDENT, PROBLEMS = "students/toy-diffusion-1", "data/toy-1/unseen"


def diffusion_student(attention, vocabulary=4096, width=256, layers=4):
    """Random weights; attention full (LLaDA) or block (LLaDA2's blocks of 32, without experts)."""
    config = families.Config(
        {"full": "llada", "block": "llada2_moe"}[attention], vocabulary, width, 2 * width, layers, 4, 4, width // 4,
        1e-6, 1e4, attention=attention, pad_token_id=0, eos_token_ids=[0], mask_token_id=1,
    )  # fmt: skip
    return model.Transformer(config).init_weights(seed=0, std=0.1).eval()


def masked_section(cfg, folder, examples, rows=4, length=256, vocabulary=126464):
    """LLaDA's fine-tuning step: logits at masked positions only, against logits at all, as other trainers make them."""
    student, batch = masked_step(rows, length, vocabulary)
    share = float((batch["targets"] != -100).float().mean())
    peak = {side: alone(peak_of_masked, side, cfg.threads, rows, length, vocabulary) / 1e9
            for side in ("ours", "all rows")}  # fmt: skip
    seconds = taking_turns(cfg.repeats, lambda: masked_loss(student, batch), lambda: all_rows_loss(student, batch))
    difference = abs(masked_loss(student, batch) / all_rows_loss(student, batch) - 1)
    what = f"LLaDA step, {rows} x {length}, {share:.0%} masked"
    return [
        line(f"extra memory of a {what}, GB", peak["ours"], peak["all rows"], peak["all rows"] / peak["ours"]),
        line(f"seconds of a {what}", *seconds),
        line("relative difference of the losses", difference, None, wanted="< 1e-5"),
    ]


def masked_step(rows, length, vocabulary):
    """A small body under a head of (by default) LLaDA's vocabulary, and a micro-batch of random ids."""
    student = diffusion_student("full", vocabulary, width=512)
    ends = np.arange(1, rows + 1) * length
    spans = np.stack([ends - length, ends - length + length // 4, ends], 1)
    tokens = np.random.default_rng(0).integers(2, vocabulary, rows * length).astype(np.uint32)
    examples = data.Data("random", tokens, spans, [{"id": str(i)} for i in range(rows)], {}, "")
    loss = diffusion.Corruption()
    batch = diffusion.corrupt_batch(student.config, examples, range(rows), loss, seed=0, step=0, length=length)
    return student, batch


def masked_loss(student, batch):
    student.zero_grad()
    loss = (student(batch["ids"], targets=batch["targets"]) * batch["weights"]).sum() / batch["count"]
    loss.backward()
    return loss.item()


def all_rows_loss(student, batch):
    student.zero_grad()
    nll = F.cross_entropy(student(batch["ids"]).transpose(1, 2), batch["targets"], reduction="none")
    loss = (nll * batch["weights"]).sum() / batch["count"]
    loss.backward()
    return loss.item()


def peak_of_masked(side, threads, rows, length, vocabulary):
    torch.set_num_threads(threads)
    student, batch = masked_step(rows, length, vocabulary)
    few = {**batch, **{key: batch[key][:, :16] for key in ("ids", "targets", "weights")}}
    step = masked_loss if side == "ours" else all_rows_loss
    step(student, few)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_memory()
    step(student, batch)
    return peak_memory() - before


def blocks_section(cfg, folder, examples, prompt=64, new_tokens=512):
    """LLaDA2's decoding with a cache of the finished blocks, against reading the whole text in every pass."""
    student, answers = diffusion_student("block"), {}
    ids = [np.random.default_rng(0).integers(2, 4096, prompt).tolist()]

    def decode(use_cache):
        answers[use_cache] = sample.write_in_blocks(student, ids, sample.Sampling(max_new_tokens=new_tokens, temperature=0), use_cache=use_cache, eos_ids=())[0]

    seconds = taking_turns(-(-cfg.repeats // 2), lambda: decode(True), lambda: decode(False))
    same = sum(a == b for a, b in zip(answers[True], answers[False], strict=True))
    return [
        line(f"seconds for {new_tokens} tokens, with a cache, against none", *seconds, ">= 3"),
        line("tokens that are the same", same, new_tokens, wanted="all"),
    ]


def threshold_section(cfg, folder, examples, student=STUDENT, problems=PROBLEMS, thresholds=(0.95, 0.9, 0.8, 0.6, 0.4)):
    """Tokens per denoising pass, and what they cost in accuracy, against one token per pass."""
    if not (Path(student).is_dir() and Path(problems).is_dir()):
        print(f"threshold: left out, it needs {student} and {problems} (python toy.py --seed=1)")
        return []
    tokenizer, unseen, student = tokenizer_file.load_tokenizer(Path(student)), data.load(problems), model.load(student)
    one, lines = decode_all(student, tokenizer, unseen, 1.0), []
    for threshold in thresholds:
        speed, accuracy = decode_all(student, tokenizer, unseen, threshold)
        lines.append(line(f"tokens a pass, threshold {threshold}, against one", speed, one[0], speed / one[0]))
        lines.append(line(f"accuracy at temperature 0, {len(unseen)} problems", accuracy, one[1]))
    return lines


def decode_all(student, tokenizer, problems, threshold, new_tokens=48):
    """-> (tokens per denoising pass, accuracy). A pass counts for every answer into which it wrote."""
    prompts, written, passes = [problems.prompt(i).tolist() for i in range(len(problems))], 0, 0
    ends = {*student.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id}
    for canvas, new in sample.generate(student, prompts, sample.Sampling(max_new_tokens=new_tokens, temperature=0, threshold=threshold), eos_ids=ends,
                                          vocab_size=tokenizer.vocab_size):  # fmt: skip
        written, passes, last = written + int(new.sum()), passes + int(new.any(1).sum()), canvas
    answers = [sample.until_end(row[len(prompt) : len(prompt) + new_tokens], ends)
               for row, prompt in zip(last.tolist(), prompts, strict=True)]  # fmt: skip
    right = [verify.grade(tokenizer.decode(answer), example["answer"], problems.meta["verifier"])
             for answer, example in zip(answers, problems.examples, strict=True)]  # fmt: skip
    return written / passes, float(np.mean(right))


SECTIONS = {"parity": parity_section, "train": train_section, "generate": generate_section,
            "loss": loss_section, "moe": moe_section, "compile": compile_section, "packing": packing_section,
            "recording": recording_section, "checkpoint": checkpoint_section,
            "masked": masked_section, "blocks": blocks_section, "threshold": threshold_section}  # fmt: skip

if __name__ == "__main__":
    command(main, Config)
