"""The layout's rules, read from the code: who may import whom, and who may import torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hypershard"
LAYERS = {
    "errors": 1, "units": 1, "log": 1,
    "storage": 2, "s3": 2, "remote_files": 2,
    "catalog": 3,
    "config": 4,
    "models": 5,
    "distributed": 6,
    "data": 7, "parallel": 7, "adapters": 7, "optim": 7, "checkpoint": 7, "metrics": 7,
    "train": 8, "plan": 8, "report": 8, "launch": 8,
    "dry_run": 9,
    "cli": 10,
}  # fmt: skip
HEAVY = {
    "torch",
    "boto3",
    "botocore",
    "awscrt",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "tensorboard",
    "rich",
    "pyarrow",
    "s3fs",
    "fsspec",
    "huggingface_hub",
    "zstandard",
    "jinja2",
    "matplotlib",
    "datasets",
}
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def package_of(path: Path) -> list[str]:
    return ["hypershard", *path.relative_to(SOURCE).parent.parts]


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Absolute module names imported by a file, and whether at module level."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in tree.body:  # `if TYPE_CHECKING:` blocks import nothing at run time
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path)[: len(package_of(path)) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
            found += [(name, id(node) in top) for name in names]
    return found


def test_the_walk_sees_the_code() -> None:
    assert len(FILES) > 50
    assert sum(len(imports_of(path)) for path in FILES) > 200


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    here = part_of(path)
    if here == "__init__":
        return
    for name, _ in imports_of(path):
        parts = name.split(".")
        if parts[0] != "hypershard" or len(parts) == 1:
            continue
        there = parts[1]
        if there in LAYERS and there != here:
            assert LAYERS[there] < LAYERS[here] or LAYERS[here] == 1, f"{here} imports {there}"


def test_no_cycles_between_modules() -> None:
    names = {path: ".".join([*package_of(path), *([] if path.stem == "__init__" else [path.stem])]) for path in FILES}
    known = set(names.values())
    graph = {
        names[path]: {name for name, top in imports_of(path) if top and name in known and name != names[path]}
        for path in FILES
    }
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, f"cycle: {' -> '.join([*trail, node])}"
        if node not in done:
            for other in graph[node]:
                visit(other, (*trail, node))
            done.add(node)

    for node in graph:
        visit(node, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_below_row_six_nothing_imports_heavy_libraries_at_module_level(path: Path) -> None:
    """Only `*_modules.py`, which are imported inside functions, may; the command line may not either."""
    here = part_of(path)
    light = here in {"cli", "report", "__init__"} or LAYERS.get(here, 9) < 6
    if not light or path.stem.endswith("_modules"):
        return
    heavy = {name.split(".")[0] for name, top in imports_of(path) if top} & HEAVY
    assert not heavy, f"{path.name} imports {heavy} at module level"


def test_modules_files_are_imported_inside_functions_only() -> None:
    """Or by one another."""
    for path in FILES:
        if path.stem.endswith("_modules"):
            continue
        for name, top in imports_of(path):
            assert not (top and name.startswith("hypershard.") and name.endswith("_modules")), path


def test_only_one_file_reads_rank_variables() -> None:
    readers = [
        path.relative_to(SOURCE).as_posix()
        for path in FILES
        if any(f'environment["{name}"]' in path.read_text() for name in ("RANK", "SLURM_PROCID"))
        or 'os.environ["RANK"]' in path.read_text()
    ]
    assert readers == ["distributed/env.py"]


def test_sizes_stay_readable() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= (120 if path.parent.name == "train" else 60), f"{path.name}: {node.name}"
    assert (SOURCE / "train" / "loop.py").read_text().count("\n") <= 110, "the page"


def test_defaults_are_written_once() -> None:
    """No function repeats a setting's default: parameters named like a setting have none (trap: default drift)."""
    from hypershard.config.schema import SETTINGS

    for path in FILES:
        if part_of(path) in ("config", "data"):  # prepare() is a library call of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                pairs = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
                positional = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                pairs += list(zip(positional, node.args.defaults, strict=True))
                named = [a.arg for a, default in pairs if a.arg in SETTINGS and default is not None]
                assert not named, f"{path.name}: {node.name} gives {named} a default of its own"
