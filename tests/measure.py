"""How bench.py measures: two sides in turn, memory in a process of its own, students and examples.

Next: bench.py.
"""

import dataclasses
import multiprocessing
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the method shelf lies one folder up

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from hf import families  # noqa: E402
from plumbing.config import InputError, write_json  # noqa: E402
from plumbing.parallel import parallelize  # noqa: E402


def line(what, ours, other, ratio=None, wanted=""):
    """One line of the table; `wanted` is what the project promises, if it promises anything."""
    return {"what": what, "ours": ours, "other": other, "ratio": ratio, "wanted": wanted}


# --------------------------------------------------------------------------------------------------
# Time and memory


def taking_turns(repeats, ours, other):
    """Call both in turn, once to warm up, then `repeats` times.

    Returns the median seconds of each, and the median of other / ours: what else runs on the
    machine slows two neighbouring turns alike.
    """
    seconds = []
    for _ in range(repeats + 1):
        pair = []
        for function in (ours, other):
            tick = time.perf_counter()
            function()
            pair.append(time.perf_counter() - tick)
        seconds.append(pair)
    return medians(seconds[1:])


class Ratio(float):
    """A median of ratios that knows the least and the largest of them."""

    def __new__(cls, ratios):
        self = super().__new__(cls, statistics.median(ratios))
        self.low, self.high = min(ratios), max(ratios)
        return self


def medians(seconds):
    """[(ours, other), ...] -> median of ours, of other, and the Ratio of other / ours."""
    ours = statistics.median(pair[0] for pair in seconds)
    others = statistics.median(pair[1] for pair in seconds)
    return ours, others, Ratio([other / own for own, other in seconds])


def alone(function, *args):
    """function(*args) in a fresh process, so that what it measures of its memory is its own.

    Raises InputError if the process is killed, as happens where memory runs out.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *args).result()
        except BrokenProcessPool:
            message = f"the process that measured {function.__name__} was killed"
            raise InputError(f"{message}: too little memory?") from None


def peak_memory():
    """The most bytes of real memory that this process has had."""
    try:
        # Linux. ru_maxrss would be that of the process which started this one, if that was larger
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def free_memory():
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        status = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+)", status)[1]) * 1024
    except OSError:
        return None


# --------------------------------------------------------------------------------------------------
# Students and examples


def random_student(folder, scale=1):
    """A Hugging Face folder with SmolLM2-135M's shape and random weights.

    At their usual size each greedy answer repeats one token. With the blocks' matrices three times
    as large it does not.
    """
    folder.mkdir()
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=100000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        torch_dtype="float32",
    )
    write_json(folder / "config.json", config)
    student = model.Transformer(families.read_config(folder)).init_weights(seed=0)
    for block in student.model.layers:
        for weight in block.parameters():
            if weight.dim() == 2:
                weight.data *= scale
    save_file(student.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_examples(folder, n=256):
    """Random ids; the lengths of prompts and responses are spread like those of GSM8K under
    SmolLM2's tokenizer."""
    rng = np.random.default_rng(0)
    prompts = np.exp(rng.normal(4.48, 0.23, n)).astype(np.int64)  # on average 90 tokens
    responses = np.exp(rng.normal(4.75, 0.42, n)).astype(np.int64)  # and 126
    ends = np.cumsum(prompts + responses)
    starts = np.concatenate(([0], ends[:-1]))
    vocabulary = families.read_config(folder).vocab_size
    tokens = rng.integers(0, vocabulary, ends[-1]).astype(np.uint32)
    spans = np.stack([starts, starts + prompts, ends], 1)
    names = [{"id": str(i), "answer": None} for i in range(n)]
    return data.Data("random", tokens, spans, names, {}, "")


def real_examples(cfg, folder, home, n=256):
    """The first n lines of --data, through data.py."""
    source = Path(home) / "first.jsonl"
    out = Path(home) / "data"
    with open(cfg.data, "rb") as lines:
        source.write_bytes(b"".join(text for _, text in zip(range(n), lines, strict=False)))
    data.main(source=str(source), tokenizer=str(folder), out=str(out))
    return data.load(out)


# --------------------------------------------------------------------------------------------------
# train.py's own step, without its command


def training(cfg, folder, examples, steps):
    """A train.Run without a folder; what bench.py's keys do not say is train.py's default."""
    keys = train.Config(
        steps=steps,
        batch_size=cfg.batch_size,
        micro_batch_size=max(1, cfg.batch_size // 2),
    )
    return train.Run(
        cfg=keys,
        device=torch.device("cpu"),
        folder=None,
        source=folder,
        shape=families.read_config(folder),
        tokenizer=None,
        train_set=examples,
        eval_set=None,
        selected=None,
        forced=None,
    )


def small(cfg, folder, examples, n, **keys):
    """A train.Run with a student and an optimizer on the first n examples, all of them a step, two
    rows a pass."""
    spans = examples.spans[:n]
    few = dataclasses.replace(
        examples,
        tokens=examples.tokens[: spans[-1, 2]],
        spans=spans,
        examples=examples.examples[:n],
    )
    run = training(dataclasses.replace(cfg, batch_size=n), folder, few, 1)
    run.cfg = dataclasses.replace(run.cfg, micro_batch_size=2, **keys)

    def shard(student):
        return parallelize(run.cfg, student, run.device)

    run.student = model.load(folder, shard=shard)
    run.optimizer = train.make_optimizer(run.cfg, run.student)
    return run


def update(run):
    """One optimizer step -> train.py's line of the log."""
    batches = train.micro_batches(run, 0)
    return train.train_step(run.cfg, run.student, run.optimizer, batches, 0)
