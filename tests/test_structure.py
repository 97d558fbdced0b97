"""Who may import whom, and how long files and functions may be."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_rite

PACKAGE = Path(lora_rite.__file__).parent
#: Each module (or package) imports those before it alone, also inside functions and by names in strings.
LAYERS = (
    "simple", "errors", "options", "optax", "algebra", "plan", "execute", "kernels", "optim", "rivals", "integrations",
    "inputs", "invariance", "run", "finetune", "bench", "study", "theory", "cli", "__main__",
    *("pairs", "optimizer", "hf", "callback", "lightning", "models"),  # the public paths of before
)  # fmt: skip
MOST_LINES, MOST_OF_A_FUNCTION = 400, 60


def modules(root):
    """Syntax trees by dotted name, packages by their own name."""
    paths = {".".join(p.relative_to(root).with_suffix("").parts): p for p in root.rglob("*.py")}
    return {name.removesuffix(".__init__"): ast.parse(p.read_text()) for name, p in paths.items() if name != "__init__"}


def imported(name, tree, known, is_package):
    """The modules of ours that a module imports, or names in strings."""
    found = []
    package = ("lora_rite." + name).split(".")[: None if is_package else -1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            found += [".".join([*start, *filter(None, [node.module]), a.name]) for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] * bool(re.fullmatch(r"lora_rite(\.\w+)*(:[\w.]+)?", node.value))
    ours = [re.split(r"[.:]", path)[1:] for path in found if re.match(r"lora_rite[.:]", path)]
    ours = [[lora_rite._HOME.get(parts[0], parts[0]), *parts[1:]] for parts in ours]
    prefixes = [[".".join(parts[:n]) for n in range(len(parts), 0, -1)] for parts in ours]
    return {next((prefix for prefix in of_one if prefix in known), None) for of_one in prefixes} - {None, name}


def imports(root):
    """(importer, imported) of all modules under ``root``."""
    trees = modules(root)
    is_package = lambda name: (root / name.replace(".", "/")).is_dir()
    return {(name, other) for name in trees for other in imported(name, trees[name], trees, is_package(name))}


def wrong(edges):
    """Imports against the order of the layers."""
    layer = lambda name: LAYERS.index(name.partition(".")[0])
    inside = lambda a, b: a.partition(".")[0] == b.partition(".")[0]
    return sorted(f"{a} imports {b}" for a, b in edges if not inside(a, b) and layer(a) <= layer(b))


def test_every_module_has_its_layer():
    assert {name.partition(".")[0] for name in modules(PACKAGE)} == set(LAYERS)


def test_no_module_imports_one_of_a_later_layer():
    assert wrong(imports(PACKAGE)) == []


def test_no_imports_go_in_circles():
    graph = {}
    for a, b in imports(PACKAGE):
        graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("algebra/linalg.py", "from ..plan import plan", "algebra.linalg imports plan.plan"),
        ("plan/__init__.py", "def f():\n    from ..pairs import find_pairs", "plan imports pairs"),
        ("execute/eager.py", "from .. import LoRARite as o", "execute.eager imports optim.optimizer"),
        ("inputs.py", "import lora_rite.bench.cases", "inputs imports bench"),
        ("rivals.py", "from lora_rite.finetune import train", "rivals imports finetune.train"),
        ("plan/names.py", "if True:\n    from .. import LoRARite", "plan.names imports optim.optimizer"),
        ("errors.py", 'KINDS = ["lora_rite.hf:LoRARiteFactory"]', "errors imports hf"),
        ("hf.py", "from .pairs import find_pairs\nimport torch", None),
    ],
)
def test_an_import_is_seen(name, text, expected, tmp_path):
    """However it is written."""
    for other in ("errors", "pairs", "plan/plan", "optim/optimizer", "bench", "hf", "finetune/train"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{other}.py").touch()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert wrong(imports(tmp_path)) == ([expected] if expected else [])


def too_long(path):
    """What of a file is longer than it may be: itself, or functions without their docstrings."""
    text = path.read_text(encoding="utf-8")
    found = [path.name] if len(text.splitlines()) > MOST_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            if node.end_lineno - node.lineno + 1 - len(docstring.splitlines()) > MOST_OF_A_FUNCTION:
                found.append(f"{path.name}: {node.name}")
    return found


def test_files_and_functions_are_short():
    assert [found for path in PACKAGE.rglob("*.py") for found in too_long(path)] == []


def test_what_is_long_is_seen(tmp_path):
    """A docstring does not count in a function, but in a file."""
    line, docstring = "    x = 1\n", '    """' + "text\n" * 100 + '"""\n'
    (tmp_path / "a.py").write_text("def f():\n" + docstring + line * 58 + "\ndef g():\n" + line * 60)
    (tmp_path / "b.py").write_text("\n" * 401)
    assert too_long(tmp_path / "a.py") == ["a.py: g"]
    assert too_long(tmp_path / "b.py") == ["b.py"]
