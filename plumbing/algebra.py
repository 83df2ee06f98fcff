"""Are two formulas equal? math-verify decides, in a child process that can be killed.

    algebra("x^2-1", "(x-1)(x+1)")     True; None if math-verify is not installed (pip install math-verify)

No computer algebra system is safe from hostile input: the child has TIME_LIMIT for a pair and
MEMORY_LIMIT in all.
Next: plumbing/engine.py.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

from plumbing.config import InputError

TIME_LIMIT = 10  # seconds for a pair of answers, after which they count as different
MEMORY_LIMIT = 2 * 2**30  # bytes of the child
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


@functools.lru_cache(maxsize=10_000)
def algebra(found, answer):
    """Are two formulas equal? Asks math-verify: True, False, or None if it is not installed."""
    if not HAS_MATH_VERIFY:
        return None
    return CHILD.ask(found, answer)


class Child:
    """A process that compares formulas; it is killed, and replaced, when it takes too long.

    math-verify's own time limit is a signal, which cannot interrupt 9**9**9 (Math-Verify issue 65).
    """

    def __init__(self):
        self.process = None

    def start(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD_CODE],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if self.reply(60) != "ready":
            raise InputError(
                "math-verify is installed but does not start: try python -c 'import math_verify'"
            )

    def ask(self, found, answer):
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([found, answer]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # out of memory: what it was asked before was too much
            return False
        return self.reply(TIME_LIMIT) is True

    def reply(self, seconds):
        """The next line of the child; None if it dies or takes longer than this."""
        alarm = threading.Timer(seconds, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        if not line:
            self.process.wait()
            return None
        return json.loads(line)


# not as a script: its folder, whose files have names that are also other libraries', would come
# first on the path of math-verify's imports
ROOT = str(Path(__file__).parent.parent)
CHILD_CODE = (
    f"import sys; sys.path.insert(0, {ROOT!r}); "
    "from plumbing.algebra import compare_for_parent; compare_for_parent()"
)
CHILD = Child()


def compare_for_parent():
    """The child: pairs of answers from stdin, verdicts to stdout, a line of JSON each."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no reply
    from math_verify import LatexExtractionConfig, parse, verify

    # formulas only: math-verify's reader of plain expressions hands them to Python's eval
    reader = [LatexExtractionConfig()]
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        try:
            found, answer = json.loads(line)
            sides = [parse(f"${side}$", reader) for side in (answer, found)]
            verdict = all(sides) and bool(verify(*sides, float_rounding=12))
        except Exception:  # of a parser that somebody else wrote, on text that nobody checked
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)
