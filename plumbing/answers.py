"""The answers of an evaluation on disk: each as soon as it is finished, graded when all are.

    store = Store(out, identity, fresh)     store.kept: answers that are there already
    store.keep(answer)                      a line, flushed: a kill costs at most this one
    store.finish(rows, others, summary)     <out>.jsonl and <out>.json, atomically

An answer is {"id", "sample", "response", "truncated", "n_tokens"}. Next: plumbing/jobs.py.
"""

import hashlib
import json
import os

from hf.weights import fingerprint
from plumbing.config import whole_file, write_json
from plumbing.parallel import barrier, on_process_0, rank
from sampling import sampling_keys


class Store:
    """The answers of one job: what was finished earlier, and a place for each new one.

    A finished answer is appended to a file of its process in runs/<run>/eval-unfinished/, where a
    kill costs at most the line that was being written. `identity` says what the answers depend on;
    those of another identity are not ours to use.
    """

    def __init__(self, job, identity, fresh):
        self.out = job.out
        self.identity = identity
        self.folder = job.out.parent.with_name("eval-unfinished")
        self.file = None
        self.kept = on_process_0(lambda: {} if fresh else self.read())

    def read(self):
        """{(id, sample): answer} of all answers with this identity."""
        kept = {}
        for path in [self.out, *sorted(self.folder.glob(f"{self.identity}.*.jsonl"))]:
            lines = json_lines(path)
            if path == self.out:
                summary = json_lines(path.with_suffix(".json"), whole=True)
                if not summary or summary[0].get("identity") != self.identity:
                    continue
            for row in lines:
                keys = ("id", "sample", "response", "truncated", "n_tokens")
                if all(key in row for key in keys):
                    kept[row["id"], row["sample"]] = {key: row[key] for key in keys}
        return kept

    def keep(self, answer):
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.identity}.{rank()}.{os.getpid()}.jsonl"
            self.file = open(path, "a", encoding="utf-8")
        self.file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self.file.flush()

    def finish(self, rows, others, summary):
        """Write the answers and the summary; what was unfinished is done with. others: rows of
        earlier evaluations that were not asked for this time."""
        if self.file:
            self.file.close()
        barrier()
        if rank() == 0:
            save(self.out, [*rows, *others], {**summary, "identity": self.identity})
            for path in self.folder.glob(f"{self.identity}.*.jsonl"):
                path.unlink()
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()


def json_lines(path, whole=False):
    """The objects of a jsonl file, or the one of a json file; [] if there is no such file. What was
    being written when a process was killed is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in [text] if whole else text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def save(out, rows, summary):
    """Write the answers to `out`, a line each, and the summary to the .json beside it."""
    with whole_file(out) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # the interval of a single response is nan, which JSON does not have
    finite = {key: None if value != value else value for key, value in summary.items()}
    write_json(out.with_suffix(".json"), finite)


def name_of(data, question):
    """What an answer to this question is stored under: (id of the problem, number of the sample)."""
    return data.examples[question[0]]["id"], question[1]


def identity_of(cfg, job, problems, served):
    """What answers depend on, as text: the model's files, the prompts, how it is sampled."""
    parts = {"data": problems.sha256, "sampling": sampling_keys(cfg)}
    if served:
        parts |= {"server": served}
    else:
        # of what the files hold: a copy of them elsewhere is the same model, another training
        # that left a file of the same size is not
        parts |= {"weights": fingerprint(job.folder), "dtype": cfg.dtype}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
