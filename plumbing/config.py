"""What every command shares: `--key=value`, checks of keys, one-line errors, atomic file writes.

A command is a dataclass (its keys, their defaults and a comment behind each: what --help prints)
and a `main(**given)` that takes only the keys that were given. A notebook calls
`train.main(run="sft", model=M)`, a shell `python train.py --run=sft --model=M`: the same thing.

Standard library only, because select.py imports it. Next: plumbing/runs.py.
"""

import dataclasses
import difflib
import glob
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class InputError(ValueError):
    """The user gave something that cannot work.

    The message is one line: what, where, and what to do.
    """


# -------------------------------------------------------------------------------------------------
# Keys


def parse(cls, argv=None):
    """`--key=value` words -> {key: typed value}, only the keys that were given.

    The type of a key is the annotation of its field in the dataclass `cls`: str, int, float, or
    bool, written true or false. --help prints and exits. Raises InputError for an unknown key
    (naming the nearest one) and for a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {}
    for word in sys.argv[1:] if argv is None else argv:
        if word in ("--help", "-h"):
            print(help_text(cls))
            raise SystemExit(0)
        match = re.fullmatch(r"--([A-Za-z_]\w*)=(.*)", word, re.DOTALL)
        if not match:
            raise InputError(
                f"cannot read {word!r}: every argument is --key=value (--help lists the keys)"
            )
        key, text = match.groups()
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise InputError(f"unknown key --{key}{hint} (--help lists the keys)")
        given[key] = _typed(key, text, fields[key].type)
    return given


def _typed(key, text, kind):
    if not isinstance(kind, str):  # a text under `from __future__ import annotations`
        kind = kind.__name__
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        value = {"str": str, "int": int, "float": float}[kind](text)
        if kind == "float" and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        names = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}
        raise InputError(f"--{key}={text}: the value must be {names[kind]}") from None


class above(NamedTuple):
    """A lower end that is not itself allowed: top_p=(above(0), 1)."""

    end: float


class below(NamedTuple):
    """An upper end that is not itself allowed: beta1=(0, below(1))."""

    end: float


def require(cfg, **allowed):
    """Raise InputError for the first key of `cfg` whose value is not allowed.

        require(cfg, steps=(1, None), top_p=(above(0), 1), schedule=("cosine", "constant"))

    A tuple of texts is a choice. Any other pair is a range: both ends are allowed themselves, and
    None leaves an end open.
    """
    for key, rule in allowed.items():
        value = getattr(cfg, key)
        if isinstance(rule[0], str):
            fine = value in rule
            wanted = " or ".join(rule)
        else:
            fine, wanted = in_range(value, *rule)
        if not fine:
            raise InputError(f"--{key}={value}: must be {wanted}")


def in_range(value, least, most):
    """-> does `value` lie between the two ends? and the range in words."""
    ends = []
    if isinstance(least, above):
        ends.append((value > least.end, f"more than {least.end}"))
    elif least is not None:
        ends.append((value >= least, f"at least {least}"))
    if isinstance(most, below):
        ends.append((value < most.end, f"less than {most.end}"))
    elif most is not None:
        ends.append((value <= most, f"at most {most}"))
    return all(fine for fine, _ in ends), " and ".join(words for _, words in ends)


def require_given(cfg, *keys):
    """Raise InputError for the first of these keys that has no value."""
    for key in keys:
        if not getattr(cfg, key):
            raise InputError(f"--{key} is missing (--help lists the keys)")


def help_text(cls):
    """The docstring of the command's file and a line per key, read from the dataclass's source."""
    # the command's own keys first, then those of the dataclasses it inherits from
    classes = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    source = "\n".join(inspect.getsource(one) for one in classes)
    lines = []
    listed = set()
    for line in source.splitlines():
        match = re.match(r"    (\w+): \w+ = (.*?)(?:\s+# (.*))?$", line)
        if match and match[1] not in listed:
            key, default, meaning = match.groups(default="")
            listed.add(key)
            width = max(1, 26 - len(key))
            lines.append(f"  --{key}={default:<{width}} {meaning}".rstrip())
        elif line.strip().startswith("# "):
            lines.append(f"\n{line.strip()[2:]}")
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return f"{doc}\n\nKeys and defaults:\n" + "\n".join(lines)


def command(main, cls):
    """Run `main(**given)` for a shell; InputError or a failing file: one line, exit code 1.

    Ctrl-C exits with 130, and a reader that has gone away (`| head`) with 141 and without a word,
    as with any command.
    """
    try:
        main(**parse(cls))
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (InputError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            # under torchrun process 0 says the same, and when it ends torchrun ends this one
            time.sleep(10)
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        if "RANK" in os.environ:
            # All is written and said, and torch's process groups can hang when the interpreter
            # cleans up after an interrupt, until torchrun kills this process
            sys.stdout.flush()
            os._exit(130)
        raise SystemExit(130) from None


# -------------------------------------------------------------------------------------------------
# Atomic writes: a reader, and a resumed run, find all of a file or none of it


@contextmanager
def whole_file(path):
    """Yields a path beside `path` to write to; renamed to `path` only when the block ends well.

    Makes the folder if needed. Raises InputError if nothing can be written there.
    """
    path = Path(path)
    aside = _aside(path)
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())  # the data must reach the disk before the name does
        os.replace(aside, path)
    except OSError as error:
        if error.filename is not None:
            raise
        # a full disk is noticed in the middle of a file, and the error does not say of which
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path, sign="*"):
    """The same for a folder, which replaces the one at `path` once it is complete.

    sign  a file name or pattern that marks an older folder of the kind written here. A folder that
          is not empty and has no such file belongs to the user: InputError

    Python has no system call that swaps two folders, so for a moment the old one is aside and the
    new one not yet in place. A process killed right then leaves the old one as .<name>.<pid>.old;
    the next whole_folder(path) puts it back first.
    """
    path = Path(path).resolve()  # a link is followed: what it leads to is replaced
    if path.exists() and (not path.is_dir() or Path.cwd().is_relative_to(path)):
        raise InputError(
            f"{path}: a folder will be written here, and it cannot replace what there is; "
            "name another"
        )
    if path.is_dir() and any(path.iterdir()) and not any(path.glob(sign)):
        raise InputError(
            f"{path}: holds other things (no {sign}), which would be lost; name another folder"
        )
    aside = _aside(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if path.exists():
            shutil.rmtree(left)
        else:
            os.rename(left, path)
    aside.mkdir()
    try:
        yield aside
        for file in filter(Path.is_file, aside.rglob("*")):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if path.exists():
            old = aside.with_suffix(".old")
            os.rename(path, old)
            os.rename(aside, path)
            shutil.rmtree(old)
        else:
            os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(path):
    """Where this process writes what will become `path`: a hidden name in the same folder.

    Makes the folder and checks that it can be written to.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed process of the same pid
        with open(aside, "wb"):
            pass
        aside.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return aside


def read_json(path):
    """A JSON file that holds an object -> dict. Raises InputError, with its name, for any other."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object but {type(value).__name__}")
    return value


def write_json(path, value):
    """`value` as indented JSON, written atomically."""
    with whole_file(path) as aside:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        aside.write_text(text + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------
# select.py


def load_select():
    """Our select.py as a module called `t3s_select`.

    Never `import select`: that name is the standard library's, and which of the two files wins
    depends on how the interpreter was built. select.py's first lines tell the whole story.
    """
    if "t3s_select" not in sys.modules:
        path = Path(__file__).resolve().parent.parent / "select.py"
        spec = importlib.util.spec_from_file_location("t3s_select", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["t3s_select"] = module  # before exec: dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules["t3s_select"]
