"""What every command shares: `--key=value`, one-line errors, files that are whole or absent.

A command is a dataclass (its keys, their defaults, and a comment behind each: that is what --help prints)
and a `main(**given)` that takes the keys somebody gave. So a notebook calls `train.main(run="sft", model=M)`
and a shell calls `python train.py --run=sft --model=M`: the same thing.

Standard library only, because select.py imports it. Next: data.py.
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


class InputError(ValueError):
    """The user gave something that cannot work. The message is one line: what, where, and what to do."""


def parse(cls, argv=None):
    """`--key=value` words -> {key: typed value}, only the keys that were given.

    The type of a key is the annotation of its field in the dataclass `cls` (str, int, float, bool as true/false).
    Raises InputError for an unknown key (naming the nearest one) or a value of another type; --help prints and exits.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {}
    for word in sys.argv[1:] if argv is None else argv:
        if word in ("--help", "-h"):
            print(help_text(cls))
            raise SystemExit(0)
        match = re.fullmatch(r"--([A-Za-z_]\w*)=(.*)", word, re.DOTALL)
        if not match:
            raise InputError(f"cannot read {word!r}: every argument is --key=value (--help lists the keys)")
        key, text = match.groups()
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise InputError(f"unknown key --{key}{hint} (--help lists the keys)")
        given[key] = _typed(key, text, fields[key].type)
    return given


def _typed(key, text, kind):
    kind = kind if isinstance(kind, str) else kind.__name__
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        value = {"str": str, "int": int, "float": float}[kind](text)
        if kind == "float" and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        what = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}[kind]
        raise InputError(f"--{key}={text}: the value must be {what}") from None


def require(cfg, **allowed):
    """Raise InputError for a key whose value is not allowed.

        require(cfg, steps=(1, None), top_p=(above(0), 1), schedule=("cosine", "constant"))

    A pair is a range, both ends included, None for an open end; above(x) and below(x) leave the end itself out. A tuple
    of texts is a choice.
    """
    for key, rule in allowed.items():
        value = getattr(cfg, key)
        if any(isinstance(choice, str) for choice in rule):
            if value not in rule:
                raise InputError(f"--{key}={value}: must be {' or '.join(rule)}")
            continue
        least, most = rule
        bounds = []
        if least is not None:
            bounds.append((f"more than {least}", value > least) if isinstance(least, above)
                          else (f"at least {least}", value >= least))  # fmt: skip
        if most is not None:
            bounds.append((f"less than {most}", value < most) if isinstance(most, below)
                          else (f"at most {most}", value <= most))  # fmt: skip
        if not all(fine for _, fine in bounds):
            raise InputError(f"--{key}={value}: must be {' and '.join(text for text, _ in bounds)}")


class above(float):
    """A lower end of a range that is not part of it."""

    __str__ = float.__repr__


class below(float):
    """An upper end of a range that is not part of it."""


def help_text(cls):
    """The docstring of the command's file and one line a key, read from the dataclass's own source."""
    lines = []
    listed = set()
    # the command's own keys first, then those of the dataclasses it inherits from
    own = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    for line in "\n".join(map(inspect.getsource, own)).splitlines():
        match = re.match(r"    (\w+): \w+ = (.*?)(?:\s+# (.*))?$", line)
        if match and match[1] not in listed:
            listed.add(match[1])
            lines.append(f"  --{match[1]}={match[2]:<{max(1, 26 - len(match[1]))}} {match[3] or ''}".rstrip())
        elif line.strip().startswith("# "):
            lines.append(f"\n{line.strip()[2:]}")
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return f"{doc}\n\nKeys and defaults:\n" + "\n".join(lines)


def command(main, cls):
    """Run `main(**given)` for a shell: an InputError or a failing file becomes one line and exit code 1."""
    try:
        main(**parse(cls))
    except (InputError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # under torchrun process 0 has the same to say, and its end is then the end of this one
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def whole_file(path):
    """Yields a path beside `path` to write to; renamed to `path` only when the block ends well.

    Makes the folder that it goes to. Raises InputError if nothing can be written there.
    """
    path = Path(path)
    aside = _aside(path)
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())  # the data must reach the disk before the name does
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path, sign="*"):
    """The same for a folder. What stood at `path` before is replaced, and only once the new one is complete.

    sign: a file name, or pattern, by which a folder is known to be an older one of the kind that is written here. What
    is not empty and has no such file is somebody's: InputError.

    No system call that Python has swaps two folders, so there is a moment in which the old one is aside and the new
    one not yet in place. A process killed right then leaves the old one beside, as .<name>.<pid>.old; the next
    whole_folder(path) puts it back before it begins.
    """
    path = Path(path).resolve()  # of a link, replace what it leads to
    if path.exists() and (not path.is_dir() or Path.cwd().is_relative_to(path)):
        raise InputError(f"{path}: a folder will be written here, and it cannot replace what there is; name another")
    if path.is_dir() and any(path.iterdir()) and not any(path.glob(sign)):
        raise InputError(f"{path}: holds other things (no {sign}), which would be lost; name another folder")
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
    """Where this process writes what will be `path`: a hidden name in the same folder, which is made, and tried."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed process of the same number
        with open(aside, "wb"):
            pass
        aside.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return aside


def read_json(path):
    """A JSON file that holds an object -> dict. Raises InputError with the file's name if it is anything else."""
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
    """`value` as indented JSON, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")






def load_select():
    """Our select.py as a module called `t3s_select`.

    Never `import select`: that name is the standard library's, and which of the two files wins depends on how the
    interpreter was built. select.py's first lines tell the whole story.
    """
    if "t3s_select" not in sys.modules:
        spec = importlib.util.spec_from_file_location("t3s_select", Path(__file__).resolve().parent.parent / "select.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["t3s_select"] = module  # before exec: dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules["t3s_select"]
