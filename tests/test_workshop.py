"""The workshop: its solutions pass, typical mistakes do not, and no message gives a solution away."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "workshop"))

import check  # noqa: E402

SOLUTIONS = ROOT / "workshop/solutions"
NUMBERS = sorted(check.EXERCISES)

# exercise, mistake, what the solution says, what the mistaken answer says instead, part of the verdict
MISTAKES = [
    (1, "the highest accuracy", "min(recorded", "max(recorded", "the step: yours is 16, expected 8"),
    (1, "ties to the latest", "min(recorded", "min(reversed(recorded)", "the step: yours is 6, expected 2"),
    (1, "on unseen problems", '[step]["acc', '[step]["eval_acc', "the step: yours is 16, expected 8"),
    (1, "a fall above 0", "low[\"accuracy\"] - start[\"accuracy\"]", "start[\"accuracy\"] - low[\"accuracy\"]",
     "yours is 0.3, expected -0.3"),
    (1, "updates too", 'if line.get("event") == "record":', "if True:", "KeyError: 'accuracy' (1_shock.py, line "),
    (2, "the easiest half", "argsort(start", "argsort(-start", "what leaves the loss: at ["),
    (2, "rounded down", "(len(anchors) + 1) // 2", "len(anchors) // 2", "yours is 0, expected 1"),
    (2, "rounded to even", "(len(anchors) + 1) // 2", "round(len(anchors) / 2)", "yours is 0, expected 1"),
    (2, "ties to the latest", "order[:half]", "np.lexsort((-anchors, start[anchors]))[:half]", " differ)"),
    (2, "what stays", "return chosen", "return ~chosen", "(32 of 32 differ)"),
    (2, "not only anchors", "flatnonzero(moved[a:b])", "arange(b - a)", "yours is 1, expected 0"),
    (2, "of the whole file", "in response_spans", "in [(0, len(moved))]", " differ)"),
    (2, "as weights", "return chosen", "return chosen * 1.0", "yours has dtype float64, expected bool"),
    (3, "fell instead of rose", "> tau", "< -tau", "the share: yours is "),
    (3, "tau itself", "> tau", ">= tau", "the share: yours is "),
    (3, "prompts too", "delta[response]", "delta", "the share: yours is "),
    (3, "without a start", ' - trajectory[0]["logprob"]', "", "the share: yours is 0, expected "),
    (3, "the other overlap", "now[before]", "before[now]", "the overlap: yours is "),
    (4, "t instead of 1/t", "nll / t", "nll * t", "texts of 1 tokens: the mean of all draws"),
    (4, "no weight", "nll / t", "nll", "texts of 1 tokens: the mean of all draws"),
    (4, "1 / (1 - t)", "/ t)", "/ (1 - t))", "texts of 1 tokens: the mean of all draws"),
    (4, "over masked tokens", "np.mean(masked * nll / t)", "(masked * nll / t).sum() / max(1, masked.sum())",
     "texts of 2 tokens: the mean of all draws"),
    (4, "visible ones too", "masked * nll", "nll", "texts of 1 tokens: the mean of all draws"),
    (4, "a sum", "np.mean(", "np.sum(", "texts of 2 tokens: the mean of all draws"),
    (4, "one per token", "np.mean(masked * nll / t)", "masked * nll / t",
     "yours has shape (1, 1), expected one number"),
    (5, "the other sign", "return total / len(levels)", "return -total / len(levels)", "log-probabilities: at [0, "),
    (5, "one mask only", " - score(rest)", "", "the log-probabilities: at [0, "),
    (5, "prompts too", "hidden = response & (", "hidden = (", "the log-probabilities: at [0, "),
    (5, "prompts in the rest", "rest = response & ~hidden", "rest = ~hidden", "at [0, 0] yours is "),
    (5, "a sum of draws", "total / len(levels)", "total", "the log-probabilities: at [0, "),
    (5, "all hidden", "score(hidden) - score(rest)", "score(response)", "the log-probabilities: at [0, "),
    (5, "the transposed mask", "score(hidden)", "score(hidden.T)", "score was given shape (40, 2), expected (2, 40)"),
    (6, "a mean of all", "np.minimum(0, change)", "change", "the curve: at [1] yours is "),
    (6, "the risers", "np.minimum(0, change)", "np.maximum(0, change)", "the curve: at [1] yours is "),
    (6, "over fallers only", "np.minimum(0, change).mean(1)", "np.ma.masked_greater(change, 0).mean(1).filled(0)",
     "the curve: at [1] yours is "),
    (6, "from step to step", "confidence - confidence[0]", "np.diff(confidence, axis=0, prepend=confidence[:1])",
     "the curve: at [2] yours is "),
    (6, "one per token", ".mean(1)", ".mean(0)", "the curve: yours has shape (12,), expected (5,)"),
    (6, "the highest", "argmin", "argmax", "a curve that turns: yours is None, expected 8"),
    (6, "the place", "else steps[lowest]", "else lowest", "a curve that turns: yours is 2, expected 8"),
    (6, "ties to the latest", "int(np.argmin(curve))", "len(curve) - 1 - int(np.argmin(curve[::-1]))",
     "two equally low points: yours is 6, expected 2"),
    (6, "the end taken", "nothing_fell or still_falling", "nothing_fell", "still falls: yours is 8, expected None"),
    (6, "zeros taken", "nothing_fell or still_falling", "still_falling", "a curve of zeros: yours is 0, expected None"),
    (7, "a rank's own mean", "total / count", "total / sum(w.sum() for _, w in batches)", "on rank 0: yours is "),
    (7, "its own count", "count = all_reduce(sum(weights.sum() for _, weights in batches))",
     "count = sum(weights.sum() for _, weights in batches)", "on rank 0: yours is "),
    (7, "tokens, not weights", "sum(weights.sum() for", "sum(weights.size for", "on rank 0: yours is "),
    (7, "in the loop", "all_reduce(sum(weights.sum() for _, weights in batches))",
     "sum(all_reduce(weights.sum()) for _, weights in batches)",
     "1 of 2 wait for ever in all-reduce number 3, which the others never enter"),
    (7, "leaves early", "    # after", "    if not batches:\n        return 0.0\n    # after",
     "2 of 3 wait for ever in all-reduce number 1"),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_passes(number):
    assert check.verdict(number, SOLUTIONS) == "passed"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_untouched_exercise_is_called_unwritten(number):
    path = ROOT / "workshop/exercises" / check.EXERCISES[number].file
    # a participant's own clone has other files there, and may run these tests
    if "raise NotImplementedError" in path.read_text(encoding="utf-8"):
        assert check.verdict(number, path.parent) == f"nothing written yet in {path.name}"


@pytest.mark.parametrize("number, mistake, right, wrong, said", MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_a_typical_mistake_is_shown_and_the_solution_is_not(tmp_path, number, mistake, right, wrong, said):
    name = check.EXERCISES[number].file
    solution = (SOLUTIONS / name).read_text(encoding="utf-8")
    assert right in solution
    (tmp_path / name).write_text(solution.replace(right, wrong), encoding="utf-8")
    verdict = check.verdict(number, tmp_path)
    assert said in verdict and "\n" not in verdict and len(verdict) < 200
    code = [line.strip() for line in solution.split('"""')[2].splitlines() if line.strip()]
    assert not any(line in verdict for line in code)
    assert not any(word in verdict for word in ("np.", "min(", "argmin", "where", "minimum", "1 / t", "sum("))


def test_every_exercise_has_three_mistakes():
    for number in NUMBERS:
        assert sum(mistake[0] == number for mistake in MISTAKES) >= 3


@pytest.mark.parametrize(
    "body, said",
    [
        ("    return None", "a log: yours returned None, expected 3 values"),
        ("    return 'a', 'b', 'c'", "a log: the step: yours is 'a', expected 8"),
        ("    return [1, 2], 0, 0", "a log: the step: yours has shape (2,), expected ()"),
        ("    return 1 / 0", "ZeroDivisionError: division by zero (1_shock.py, line 2)"),
        ("    import json\n    json.loads('')", "(1_shock.py, line 3)"),
        ("    exit()", "SystemExit: None (1_shock.py, line 2)"),
        ("    return (", "SyntaxError: '(' was never closed (1_shock.py, line 2)"),
        ("    lines.clear()", "a log: yours returned None, expected 3 values"),
    ],
)
def test_whatever_a_participant_writes_ends_in_one_line(tmp_path, body, said):
    (tmp_path / "1_shock.py").write_text(f"def shock(lines):\n{body}\n")
    verdict = check.verdict(1, tmp_path)
    assert said in verdict and "\n" not in verdict


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("value", ["None", "'a'", "[[1], [1, 2]]", "object()", "1j", "batches"])
def test_whatever_an_answer_returns_the_verdict_is_one_line(tmp_path, number, value):
    name = check.EXERCISES[number].file
    unwritten = (ROOT / "workshop/exercises" / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(unwritten.replace("raise NotImplementedError", f"return {value}"), encoding="utf-8")
    verdict = check.verdict(number, tmp_path)
    assert "\n" not in verdict and verdict != "passed" and len(verdict) < 200


def test_a_function_of_another_name_is_missed(tmp_path):
    (tmp_path / "1_shock.py").write_text("def chock(lines): pass\n")
    assert check.verdict(1, tmp_path) == "1_shock.py has no function shock"


def test_the_command_says_passed_and_its_exit_code_too():
    command = [sys.executable, ROOT / "workshop/check.py"]
    done = subprocess.run([*command, "1", SOLUTIONS], capture_output=True, text=True)
    assert done.stdout == "1 find the shock: passed\n" and done.returncode == 0
    assert subprocess.run([*command, "99"], capture_output=True).returncode == 2


def test_an_answer_that_passed_is_shown_at_work_on_the_recorded_run(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / check.RUN
    (folder / "trajectory").mkdir(parents=True)
    confidence = {0: [-1.0, -1.0, -1.0], 2: [-0.5, -0.9, -3.0], 4: [-0.2, -0.8, -2.0]}
    lines = []
    for step, accuracy in {0: 0.7, 2: 0.2, 4: 0.4}.items():
        logprob = np.array([np.nan, *confidence[step]], dtype=np.float32)
        np.savez(folder / f"trajectory/{step:06d}.npz", logprob=logprob, accuracy=accuracy, sha256="")
        recorded = {"step": step, "event": "record", "accuracy": accuracy, "nll": -np.nanmean(logprob).item()}
        lines.append(json.dumps(recorded) + "\n")
    (folder / "log.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    said = []
    for number in (1, 3, 6):
        assert check.main([str(number), str(SOLUTIONS)]) == 0
        passed, where, *found = capsys.readouterr().out.splitlines()
        assert passed.endswith(": passed") and where == "  in runs/workshop/sft, recorded up to step 4:"
        said += found
    assert said == [
        "  bottleneck: step 2; accuracy -0.500, NLL +0.467 nats",
        "  step  2: 0.667 are anchors, and 1.000 of those of step 2",
        "  step  4: 0.667 are anchors, and 1.000 of those of step 2",
        "  0: 0.0000, 2: -0.6667, 4: -0.3333",
        "  the lowest: step 2",
    ]


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    for path in ROOT.iterdir():
        if path.name not in ("runs", "data"):
            (tmp_path / path.name).symlink_to(path)
    text = (ROOT / "workshop/notebook.py").read_text(encoding="utf-8")
    assert "\nSMALL = False" in text
    (tmp_path / "small.py").write_text(text.replace("\nSMALL = False", "\nSMALL = True"), encoding="utf-8")
    env = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "small.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # its last cell checks the answers that it has used
    last = [f"{number} {check.EXERCISES[number].title} passed" for number in NUMBERS]
    assert done.stdout.splitlines()[-len(last) :] == last
