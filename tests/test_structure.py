"""Who may import whom, and how long the code of the step may be."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_rite

PACKAGE = Path(lora_rite.__file__).parent
#: Each module (or package) imports those before it alone, also inside functions and by names in strings.
LAYERS = (
    "simple", "algebra", "errors", "plan", "execute", "kernels", "names", "output", "options", "optax", "inputs",
    "modes", "pairs", "optim", "optimizer", "layers", "rivals", "hf", "callback", "lightning", "invariance", "models",
    "bench", "bench_view", "bench_host", "finetune", "theory", "cli",
)  # fmt: skip
#: Imports that would close a circle within a package.
CIRCLES = {
    ("finetune.compare", "finetune.check"): "compare --check shows what check finds out about a study of compare",
    ("finetune.untrusted", "finetune.compare"): "a string names the classes that a recipe is read into",
}
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
    edges = imports(PACKAGE)
    assert set(CIRCLES) <= edges, "an exception that is none any more"
    graph = {}
    for a, b in edges - set(CIRCLES):
        graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("algebra/linalg.py", "from ..errors import warn", "algebra.linalg imports errors"),
        ("plan/__init__.py", "def f():\n    from ..pairs import find_pairs", "plan imports pairs"),
        ("execute/eager.py", "from .. import optimizer as o", "execute.eager imports optimizer"),
        ("inputs.py", "import lora_rite.bench", "inputs imports bench"),
        ("bench.py", "from lora_rite.finetune import train", "bench imports finetune.train"),
        ("names.py", "if True:\n    from . import LoRARite", "names imports optimizer"),
        ("errors.py", 'KINDS = ["lora_rite.hf:LoRARiteFactory"]', "errors imports hf"),
        ("hf.py", "from .pairs import find_pairs\nimport torch", None),
    ],
)
def test_an_import_is_seen(name, text, expected, tmp_path):
    """However it is written."""
    for other in ("errors", "pairs", "optimizer", "bench", "hf", "finetune/train"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / f"{other}.py").touch()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert wrong(imports(tmp_path)) == ([expected] if expected else [])


@pytest.mark.parametrize("package", ["algebra", "plan", "execute", "kernels"])
def test_the_code_of_the_step_is_short(package):
    """Functions without their docstrings."""
    for path in (PACKAGE / package).rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= MOST_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
                assert lines <= MOST_OF_A_FUNCTION, f"{path}: {node.name}"
