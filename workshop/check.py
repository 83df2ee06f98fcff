"""Says whether an exercise of docs/WORKSHOP.md is done, and if not, where yours differs.

    python workshop/check.py 3                        # one exercise
    python workshop/check.py                          # all of them, a line each
    python workshop/check.py 3 workshop/solutions     # answers from another folder

Your answers are the functions in workshop/exercises/. Each is called with small data made here, and
compared with the project's own code or with brute force; nothing is trained and nothing is written.
Of one exercise that passed it also shows what your function finds in runs/workshop/sft, if that run
was made. The exit code is 0 if all that was asked for passed.

Shapes: n response tokens, B rows, T tokens of a row. To read next: the exercises themselves.
"""

import copy
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the method shelf lies one folder up

import numpy as np

from plumbing.config import InputError, load_select
from plumbing.runs import load_trajectory

select = load_select()
RUN = "workshop/sft"  # the run of exercise 1


class Wrong(Exception):
    """One line about how an answer differs. It shows values and never code."""


# -------------------------------------------------------------------------------------------------
# Calling an answer, and comparing what it gives


class Answer:
    """A participant's file: answer.f(...) calls its function f, and what f raises becomes Wrong."""

    def __init__(self, path):
        self.path = path
        self.module = None  # for __getattr__, should loading fail
        self.module = self.guarded(load, path)

    def __getattr__(self, name):
        if not hasattr(self.module, name):
            raise Wrong(f"{self.path.name} has no function {name}")
        # copies: an answer that changes its inputs in place must not change what it is checked with
        return lambda *given: self.guarded(getattr(self.module, name), *copy.deepcopy(given))

    def guarded(self, function, *given):
        try:
            return function(*given)
        except NotImplementedError:
            raise Wrong(f"nothing written yet in {self.path.name}") from None
        except Wrong:
            raise
        # SystemExit: an exit() in the file is a mistake of it, not an end of the check
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())
            raise Wrong(f"{type(error).__name__}: {said} ({self.place(error)})") from None

    def place(self, error):
        """File and line of the participant's last word before the error."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self.path)]
        # a file with a syntax error never ran, and the error itself names the line
        line = lines[-1] if lines else getattr(error, "lineno", None)
        return f"{self.path.name}, line {line}" if line else self.path.name


def load(path):
    """A file as a module. Only the file that an exercise is answered in is ever loaded."""
    spec = importlib.util.spec_from_file_location(f"answer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(what, yours, expected, tolerance=1e-9):
    """Raises Wrong, which shows both, unless `yours` is `expected`: arrays, numbers or None."""
    if expected is None or yours is None:
        if yours is not expected:
            raise Wrong(f"{what}: yours is {shown(yours)}, expected {shown(expected)}")
        return
    expected = np.asarray(expected)
    try:
        given = np.asarray(yours)
        numbers = given.astype(np.float64)
    except Exception:  # whatever it is, it is no array: numpy and torch raise half a dozen kinds
        raise Wrong(f"{what}: yours is {shown(yours)}, expected {shown(expected)}") from None
    if given.shape != expected.shape:
        raise Wrong(f"{what}: yours has shape {given.shape}, expected {expected.shape}")
    # a rule that returns 0.0 and 1.0 means weights by it, which is something else than a mask
    if (given.dtype == bool) != (expected.dtype == bool):
        raise Wrong(f"{what}: yours has dtype {given.dtype}, expected {expected.dtype}")
    # written so that nan differs too
    apart = ~(np.abs(numbers - expected) <= tolerance)
    if not apart.any():
        return
    if not expected.ndim:
        raise Wrong(f"{what}: yours is {shown(given)}, expected {shown(expected)}")
    # the first place only: all of them would be the solution, written as numbers
    first = tuple(int(i) for i in np.argwhere(apart)[0])
    difference = f"yours is {shown(given[first])}, expected {shown(expected[first])}"
    count = f"{int(apart.sum())} of {apart.size} differ"
    raise Wrong(f"{what}: at {list(first)} {difference} ({count})")


def shown(value):
    """A value in a few characters."""
    if value is None or isinstance(value, str):
        return repr(value)[:60]
    try:
        return f"{np.asarray(value).item():.6g}"
    except Exception:  # an array, or something stranger
        return " ".join(repr(value).split())[:60]


# -------------------------------------------------------------------------------------------------
# 1. Find the shock


def check_shock(answer):
    """Logs with a clear low, with two equal lows, and with another low on unseen problems."""
    curves = {
        "a log": {0: 0.70, 4: 0.72, 8: 0.40, 12: 0.55, 16: 0.80},
        "a log with two equal lows": {0: 0.70, 2: 0.30, 4: 0.50, 6: 0.30, 8: 0.45},
        "a log that begins high": {0: 0.9, 5: 0.6, 10: 0.2, 15: 0.1, 20: 0.3},
    }
    for what, accuracy in curves.items():
        nll = {step: 1.5 / (1 + step) for step in accuracy}
        low = select.find_bottleneck(accuracy)
        step, change, nll_change = several(what, answer.shock(make_log(accuracy, nll)), 3)
        same(f"{what}: the step", step, low)
        same(f"{what}: the change of accuracy", change, accuracy[low] - accuracy[0])
        same(f"{what}: the change of the NLL", nll_change, nll[low] - nll[0])


def show_shock(answer):
    text = Path(f"runs/{RUN}/log.jsonl").read_text(encoding="utf-8")
    step, change, nll_change = answer.shock([json.loads(line) for line in text.splitlines()])
    print(f"  bottleneck: step {step}; accuracy {change:+.3f}, NLL {nll_change:+.3f} nats")


def make_log(accuracy, nll):
    """Curves -> lines as in log.jsonl: updates, and now and then a recorded checkpoint."""
    lines = []
    for step in range(max(accuracy) + 1):
        if step:
            lines.append({"step": step, "loss": 2.0 / step, "grad_norm": 1.0, "lr": 4e-4})
        if step in accuracy:
            # lowest where train accuracy is highest: so a curve that is mistaken for it shows
            unseen = 1 - accuracy[step]
            recorded = {"accuracy": accuracy[step], "eval_accuracy": unseen, "nll": nll[step]}
            lines.append({"step": step, "event": "record", **recorded})
    return lines


def several(what, given, count):
    """A tuple of `count` values, or Wrong."""
    try:
        values = tuple(given)
    except TypeError:
        values = None
    if values is None or len(values) != count:
        raise Wrong(f"{what}: yours returned {shown(given)}, expected {count} values")
    return values


# -------------------------------------------------------------------------------------------------
# 2. Write a rule


def check_rule(answer):
    """Responses with 5, 0, 1 and 6 anchors, and ties; expected by sorting, example by example."""
    rng = np.random.default_rng(2)
    response_spans = np.array([[0, 9], [9, 13], [13, 20], [20, 32]])
    moved = np.zeros(32, dtype=bool)
    moved[[0, 2, 3, 6, 8, 15, 20, 21, 22, 25, 27, 30]] = True
    start = -rng.exponential(size=32)
    start[[0, 2, 3, 6, 8]] = [-1.0, -2.0, -1.0, -1.0, -0.5]  # equal ones where the half ends
    expected = np.zeros(32, dtype=bool)
    for a, b in response_spans:
        anchors = sorted((start[i], i) for i in range(a, b) if moved[i])
        leave = anchors[: -(-len(anchors) // 2)]
        expected[[i for _, i in leave]] = True
    given = answer.hardest_half(moved, start, response_spans, rng)
    same("what leaves the loss", given, expected)


# -------------------------------------------------------------------------------------------------
# 3. Move the bottleneck


def check_bottleneck(answer):
    """A small trajectory in steps of 1/8 nat, so that some changes are exactly tau."""
    rng = np.random.default_rng(3)
    response = np.tile([False] * 3 + [True] * 7, 4)
    trajectory = {}
    for step in (0, 2, 4, 6):
        logprob = -rng.integers(0, 17, len(response)).astype(np.float32) / 8
        logprob[~response] = np.nan
        trajectory[step] = {"logprob": logprob, "accuracy": 0.5}
    start = select.confidence(trajectory, 0, response)
    for step, other, tau in ((4, 2, 0.0), (4, 6, 0.25), (6, 2, 1.0), (4, 4, 0.0)):
        anchors = {}
        for at in (step, other):
            delta = select.confidence(trajectory, at, response) - start
            # the project's own rule: what it does not keep is an anchor
            anchors[at] = ~select.choose("t3s", "keep", delta, start, None, tau)
        what = f"step {step} to step {other}, tau {tau}"
        share, overlap = several(what, answer.move(trajectory, step, other, response, tau), 2)
        same(f"{what}: the share", share, anchors[other].mean())
        both = anchors[step] & anchors[other]
        same(f"{what}: the overlap", overlap, both.sum() / anchors[step].sum())


def show_bottleneck(answer):
    trajectory, response = recorded_run()
    low = select.find_bottleneck({step: float(t["accuracy"]) for step, t in trajectory.items()})
    for other in sorted(trajectory)[1:]:
        share, overlap = answer.move(trajectory, low, other, response, 0.0)
        kept = f"{overlap:.3f} of those of step {low}"
        print(f"  step {other:2}: {share:.3f} are anchors, and {kept}")


def recorded_run():
    """-> {step: {"logprob", "accuracy"}}, response (n_tokens,) bool"""
    trajectory = {}
    for step, stored in load_trajectory(RUN).items():
        # arrays, since what np.load has opened cannot be copied
        trajectory[step] = {key: stored[key] for key in ("logprob", "accuracy")}
    return trajectory, ~np.isnan(trajectory[0]["logprob"])


# -------------------------------------------------------------------------------------------------
# 4. Derive the 1/t weight


def check_weight(answer):
    """Texts of 1 to 3 tokens whose joint distribution is known: every mask, every level.

    The mean over all levels of the mean over all masks must be -log p(text) / T. The levels are an
    integral over a polynomial in t, which a few points of Gauss and Legendre give exactly.
    """
    points, shares = np.polynomial.legendre.leggauss(8)
    rng = np.random.default_rng(4)
    for T in (1, 2, 3):
        p = rng.dirichlet(np.ones(2**T)).reshape((2,) * T)  # of every text of T bits
        mean = 0.0
        for hidden in range(2**T):
            masked = np.array([[bool(hidden >> i & 1) for i in range(T)]])
            nll = np.array([[surprise(p, i, masked[0]) for i in range(T)]])
            for t, share in zip((points + 1) / 2, shares / 2, strict=True):
                chance = t ** masked.sum() * (1 - t) ** (~masked).sum()
                # nll at visible positions too: they are easy to know, and must not count
                mean += share * chance * one_number(answer.loss(nll, masked, np.array([[t]])))
        what = f"texts of {T} tokens: the mean of all draws, against -log p(text) / {T}"
        same(what, mean, -np.log(p[(0,) * T]) / T, tolerance=1e-6)
    check_rows(answer, rng)


def one_number(given):
    """A float, or Wrong."""
    try:
        array = np.asarray(given, dtype=np.float64)
    except Exception:  # as in `same`
        array = None
    if given is None or array is None:
        raise Wrong(f"yours returned {shown(given)}, expected one number")
    if array.ndim:
        raise Wrong(f"yours has shape {array.shape}, expected one number")
    return float(array)


def surprise(p, i, masked):
    """-log p(token i is 0 | the visible tokens are 0), nats. The text in question is all zeros."""
    T = p.ndim
    visible = tuple(slice(None) if masked[j] or j == i else 0 for j in range(T))
    of_i = tuple(0 if j == i else part for j, part in enumerate(visible))
    return -np.log(p[of_i].sum() / p[visible].sum())


def check_rows(answer, rng):
    """Two rows at different levels are worth the mean of each alone."""
    nll = rng.exponential(size=(2, 5))
    masked = np.array([[1, 0, 0, 0, 1], [1, 1, 1, 1, 0]]) > 0
    t = np.array([[0.3], [0.8]])
    alone = [one_number(answer.loss(nll[[i]], masked[[i]], t[[i]])) for i in (0, 1)]
    same("two rows, against the mean of each alone", answer.loss(nll, masked, t), np.mean(alone))


# -------------------------------------------------------------------------------------------------
# 5. Its own confidence


def check_confidence(answer):
    """A shipped diffusion student reads two traces; expected by diffusion.confidence."""
    import torch  # the other exercises are checked without it, in a second

    import diffusion
    import model
    from hf.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    folder = ROOT / "students/toy-diffusion-1"
    student, tokenizer = model.load(folder), load_tokenizer(folder)
    # five blocks of eight tokens, so that no padding is hidden with the response
    parts = [
        ("<|user|>3+5*2-7+4?<|assistant|>", "hence 3+5=8; 8*2=6; 6-7=9; 9+4=3; >3<|end|>"),
        ("<|user|>8-9+1-4-3?<|assistant|>", "check 8-9=9; 9+1=0; 0-4=6; 6-3=3; >3<|end|>"),
    ]
    texts = Texts([[tokenizer.encode(part) for part in pair] for pair in parts])
    B, T, K = 2, 40, 3
    every = np.arange(B)
    rows = diffusion.lay_out(student.config, texts, every, np.full(B, T), "0 draw 0")
    response = rows.maskable

    @torch.no_grad()
    def score(masked):
        hidden = np.asarray(masked, dtype=bool)
        if hidden.shape != (B, T):
            raise Wrong(f"score was given shape {hidden.shape}, expected {(B, T)}")
        read = diffusion.hide(rows, hidden, student.config, "cpu")
        return student(**diffusion.tensors(read, "cpu"))[:, :T].numpy().astype(np.float64)

    u = [
        diffusion.lay_out(student.config, texts, every, np.full(B, T), f"0 draw {k}").u
        for k in range(K)
    ]
    levels = np.array([(k + u[k][:, 0]) / K for k in range(K)])  # stratified, as diffusion.py's
    given = answer.own_confidence(score, response, levels[..., None], np.array(u)[:, :, 1:])
    expected = np.zeros((B, T))
    for row, known in enumerate(diffusion.confidence(student, texts, every, draws=K, seed=0)):
        expected[row, response[row]] = known
    same("the log-probabilities", given, expected, tolerance=1e-4)


class Texts:
    """Pairs (prompt, response) of token ids as a data.Data, as far as diffusion.py reads one."""

    def __init__(self, pairs):
        edges = np.cumsum([0] + [len(part) for pair in pairs for part in pair])
        self.tokens = np.array([token for pair in pairs for part in pair for token in part])
        self.spans = np.stack([edges[0:-1:2], edges[1::2], edges[2::2]], axis=1)
        self.examples = [{"id": str(i)} for i in range(len(pairs))]


# -------------------------------------------------------------------------------------------------
# 6. Find the bottleneck without answers


def check_label_free(answer):
    """Anchors that rise by more than the others fall; curves that turn, that do not, that tie."""
    rng = np.random.default_rng(6)
    confidence = -rng.exponential(size=(5, 12))
    confidence[1:, :4] = confidence[0, :4] + [[1], [2], [3], [3]]
    n = confidence.shape[1]
    whole = np.array([[0, n]])
    recorded = {step: {"logprob": row} for step, row in enumerate(confidence)}
    fallen = select.falls(recorded, np.ones(n, dtype=bool), whole)
    expected = np.array([fallen[step].sum() / n for step in recorded])
    same("the curve", answer.fall(confidence), expected)
    cases = {
        "a curve that turns": ([0, 4, 8, 12], [0.0, -0.2, -0.5, -0.3], 8),
        "two equally low points": ([0, 2, 4, 6, 8], [0.0, -0.4, -0.1, -0.4, -0.2], 2),
        "a curve that still falls": ([0, 4, 8], [0.0, -0.1, -0.3], None),
        "a curve of zeros": ([0, 4, 8], [0.0, 0.0, 0.0], None),
    }
    for what, (steps, curve, expected) in cases.items():
        same(what, answer.turn(np.array(steps), np.array(curve)), expected)


def show_label_free(answer):
    trajectory, response = recorded_run()
    steps = np.array(sorted(trajectory))
    curve = answer.fall(np.stack([select.confidence(trajectory, s, response) for s in steps]))
    points = zip(steps, curve, strict=True)
    print("  " + ", ".join(f"{step}: {value:.4f}" for step, value in points))
    print(f"  the lowest: step {answer.turn(steps, curve)}")


# -------------------------------------------------------------------------------------------------
# 7. The same loss on any number of processes


def check_ranks(answer):
    """The same examples, cut in different ways over one, two and three ranks."""
    rng = np.random.default_rng(7)

    def batch(B, T):
        return rng.exponential(size=(B, T)), rng.choice([0.0, 0.3, 1.0], size=(B, T))

    a, b, c = batch(2, 5), batch(1, 9), batch(3, 2)
    nll, weights = (np.concatenate([part[i].ravel() for part in (a, b, c)]) for i in (0, 1))
    expected = (nll * weights).sum() / weights.sum()
    cuts = {
        "one rank": [[a, b, c]],
        "two ranks, two micro-batches and one": [[a, b], [c]],
        "three ranks, one of them without any": [[a], [], [b, c]],
    }
    for what, ranks in cuts.items():
        for rank, given in enumerate(on_ranks(what, answer.step_loss, ranks)):
            same(f"{what}: the loss on rank {rank}", given, expected)


class Waits(BaseException):
    """A rank has entered an all-reduce whose sum is not known yet. No answer should catch it."""


def on_ranks(what, step_loss, ranks):
    """step_loss on every rank -> what each returned. Raises Wrong where real ranks would hang.

    No processes: the ranks run one after the other, each until it needs a sum that is not known.
    Then all begin again, with one sum more.
    """
    sums = []
    while True:
        entered = []  # what each waiting rank gives to the next all-reduce
        results = []
        for batches in ranks:
            known = iter(sums)

            def all_reduce(number, known=known, entered=entered):
                for total in known:
                    return total
                entered.append(float(number))
                raise Waits

            try:
                results.append(step_loss(batches, all_reduce))
            except Waits:
                continue
        if not entered:
            return results
        if results:
            raise Wrong(
                f"{what}: {len(entered)} of {len(ranks)} wait for ever in all-reduce number "
                f"{len(sums) + 1}, which the others never enter"
            )
        sums.append(sum(entered))


# -------------------------------------------------------------------------------------------------
# The command


@dataclass
class Exercise:
    title: str
    file: str  # in workshop/exercises and workshop/solutions
    check: Callable  # Answer -> None, or raises Wrong
    show: Callable | None = None  # prints what an answer that passed finds in the run


EXERCISES = {
    1: Exercise("find the shock", "1_shock.py", check_shock, show_shock),
    2: Exercise("write a rule", "2_rule.py", check_rule),
    3: Exercise("move the bottleneck", "3_bottleneck.py", check_bottleneck, show_bottleneck),
    4: Exercise("derive the 1/t weight", "4_weight.py", check_weight),
    5: Exercise("its own confidence", "5_confidence.py", check_confidence),
    6: Exercise("without answers", "6_label_free.py", check_label_free, show_label_free),
    7: Exercise("the same loss on any number of processes", "7_ranks.py", check_ranks),
}


def verdict(number, folder):
    """Is this exercise answered in `folder`? -> "passed", or one line that says what differs."""
    exercise = EXERCISES[number]
    path = Path(folder).resolve() / exercise.file
    if not path.is_file():
        return f"there is no file {path.name} in {folder}"
    try:
        exercise.check(Answer(path))
    except Wrong as difference:
        return str(difference)
    return "passed"


def show(number, folder):
    """Print what the answer finds in the run of exercise 1; nothing if there is no such run."""
    exercise = EXERCISES[number]
    if not exercise.show or not Path(f"runs/{RUN}/log.jsonl").is_file():
        return
    try:
        # a run that still trains has its shock before it
        print(f"  in runs/{RUN}, recorded up to step {max(load_trajectory(RUN))}:")
        exercise.show(Answer(Path(folder).resolve() / exercise.file))
    except (Wrong, InputError) as error:
        print(f"  {error}")


def main(words):
    """The words of the command line -> exit code."""
    numbers = [word for word in words if word.isdecimal()]
    folders = [word for word in words if not word.isdecimal()]
    if any(int(number) not in EXERCISES for number in numbers) or len(folders) > 1:
        print(f"python workshop/check.py [1 to {len(EXERCISES)}] [folder]", file=sys.stderr)
        return 2
    folder = folders[0] if folders else ROOT / "workshop/exercises"
    said = []
    for number in [int(number) for number in numbers] or EXERCISES:
        said.append(verdict(number, folder))
        print(f"{number} {EXERCISES[number].title}: {said[-1]}", flush=True)
        if numbers and said[-1] == "passed":
            show(number, folder)
    return 0 if set(said) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
