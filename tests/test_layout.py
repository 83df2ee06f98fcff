"""The shelves of the repository: who may import whom; no circles."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHELVES = ("hf", "plumbing")
NEVER_FROM_A_SHELF = {"train", "select", "eval", "demo"}


def modules():
    """{name: its file} of everything but the tests."""
    found = {}
    for folder in ("", *SHELVES):
        for path in sorted((ROOT / folder).glob("*.py")):
            name = f"{folder}.{path.stem}" if folder else path.stem
            found[name] = path
    return found


def imports(path, known):
    """The repository's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(known)


def test_no_import_leads_from_a_shelf_up_to_a_command():
    known = modules()
    for name, path in known.items():
        if name.startswith(SHELVES):
            assert not imports(path, known) & NEVER_FROM_A_SHELF, name


def test_the_checkpoint_shelf_needs_keys_and_nothing_else_of_the_plumbing():
    known = modules()
    for name, path in known.items():
        if name.startswith("hf"):
            others = {one for one in imports(path, known) if not one.startswith("hf")}
            assert others <= {"plumbing", "plumbing.config"}, name


def test_no_circle_of_imports():
    known = modules()
    needs = {name: imports(path, known) - {name} for name, path in known.items()}
    while needs:
        ready = [name for name, others in needs.items() if not others & set(needs)]
        assert ready, f"a circle among {sorted(needs)}"
        for name in ready:
            del needs[name]


def test_a_circle_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from b import c\n")
    assert imports(tmp_path / "a.py", {"a": 0, "b": 0}) == {"b"}


def test_the_next_lines_are_one_path_from_select_to_the_end():
    files = {str(path.relative_to(ROOT)): path for path in modules().values()}
    path, at = [], "select.py"
    while at:
        assert at in files and at not in path, f"{path[-1:]} leads to {at}"
        path.append(at)
        found = re.search(r"Next:\s+([\w/]+\.py)", files[at].read_text(encoding="utf-8"))
        at = found and found[1]
    assert path[-1] == "plumbing/memory.py"
    assert set(files) - set(path) == {f"{shelf}/__init__.py" for shelf in SHELVES}
