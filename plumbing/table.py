"""eval.py's table: on the screen, as csv and as json, with what a reader must know beside it.

    show_settings(cfg, problems, n_problems, twins)     what every model is asked, before it is
    show_results(cfg, jobs, results, twins)             results: {name: (summary, graded rows)}

twins: {id: the id of an equal problem}. Next: plumbing/parallel.py.
"""

import csv
from dataclasses import fields
from pathlib import Path

import intervals
from plumbing.config import whole_file, write_json
from plumbing.screen import explain, say
from sampling import Sampling
from verify import THOUGHTS


def show_settings(cfg, problems, n_problems, twins):
    """Print what every model is asked, and how it is sampled."""
    always = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    shown = []
    for key in ("samples", *(field.name for field in fields(Sampling))):
        # most keys concern diffusion students only: those that were left alone say nothing
        if key in always or getattr(cfg, key) != getattr(type(cfg), key):
            shown.append(f"{key} {getattr(cfg, key)}")
    verifier = cfg.verifier or problems.meta["verifier"]
    say(f"{cfg.data}: {n_problems} problems, verifier {verifier}, {', '.join(shown)}")
    if twins:
        name, first = next(iter(twins.items()))
        say(
            f"{len(twins)} problems are there before under another id ({name} is {first}): counted as one each"
        )


def show_results(cfg, jobs, results, twins):
    """Print the table and what it does not show; write it as csv and json beside the first answers."""
    lines = table_of(results, twins)
    columns = [column for column in lines[0] if not column.startswith(("difference", "p_value"))]
    if all(line["missing"] == 1 for line in lines):  # no model thinks
        columns = [column for column in columns if column not in THOUGHTS]
    texts = [[cell(line[column]) for column in columns] for line in lines]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    for row in [[*columns], *texts]:
        first, *rest = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]))
    for name, (summary, rows) in results.items():
        tell(name, summary, rows)
    for line in lines[1:]:
        if "difference" in line and line["difference"] != "":
            low, high = line["difference_low"], line["difference_high"]
            print(
                f"{line['model']} - {lines[0]['model']}: {line['difference']:+.3f} [{low:+.3f}, {high:+.3f}], "
                f"p = {line['p_value']:.3g} (paired, {line['problems']} problems)"
            )
    out = jobs[0].out.parent.with_name("tables") / f"{Path(cfg.data).resolve().name}.json"
    write_json(
        out, {"rows": [{k: None if v == "" else v for k, v in line.items()} for line in lines]}
    )
    with (
        whole_file(out.with_suffix(".csv")) as aside,
        open(aside, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def table_of(results, twins):
    """A dict per model; difference and p-value compare with the first one, problem by problem."""
    most = min(summary["samples"] for summary, _ in results.values())
    lines = []
    (_, (_, base)), *_ = results.items()
    first = intervals.grades_by_problem(base, twins)
    for name, (summary, rows) in results.items():
        line = {"model": name, "accuracy": summary["accuracy"]}
        line["low"], line["high"] = summary["interval"]
        line |= {f"pass@{k}": summary["pass_at_k"][k] for k in shown_k(most)}
        line |= {"cov": summary["cov_at_k"], "maj": summary["maj_at_k"]}
        line |= {key: summary[key] for key in ("truncated", "unparsed")}
        line |= {kind: summary[f"thoughts_{kind}"] for kind in THOUGHTS}
        line |= {"tokens": summary["mean_tokens"] if summary["mean_tokens"] is not None else ""}
        line |= {key: summary[key] for key in ("seconds", "problems", "samples")}
        if len(results) > 1:
            line |= dict.fromkeys(
                ("difference", "difference_low", "difference_high", "p_value"), ""
            )
        if lines:
            second = intervals.grades_by_problem(rows, twins)
            shared = [problem for problem in first if problem in second]
            found = intervals.paired([first[p] for p in shared], [second[p] for p in shared])
            line["difference"], interval, line["p_value"] = found
            line["difference_low"], line["difference_high"] = interval
        lines.append(line)
    return lines


def shown_k(most):
    """1, 2, 4, ... and the largest: the summary has every k."""
    powers = [2**n for n in range(1, 20) if 2**n < most]
    return [*powers, most] if most > 1 else []


def cell(value):
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def tell(name, summary, rows):
    """Print what a reader of the table must know of a model's answers, if there is anything."""
    why = explain(summary["accuracy"], summary)
    if why:
        print(f"{name}: {why}")
    undecided = sum(row.get("undecided", False) for row in rows)
    if undecided:
        print(
            f"{name}: {undecided} answers are formulas that only math-verify can compare; "
            "they count as wrong: pip install math-verify"
        )
