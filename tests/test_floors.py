"""The house stands: imports run one way, no circles, no hidden imports, no file or function grows past its size."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "relora"
GROUND = {"errors", "draws"}
"""May be imported by all."""
MAY_IMPORT = {
    "config": set(),
    "device": set(),
    "data": set(),
    "model": set(),
    "lowrank": set(),
    "report": set(),
    "measure": {"data", "model", "lowrank", "report", "device"},
    "train": {"lowrank", "measure", "report", "device"},
    "recipes": {"config", "device", "data", "model", "lowrank", "report", "measure", "train"},
    "cli": {"config", "recipes", "data", "report"},
    "__init__": {"lowrank", "recipes", "train"},
}
DANGEROUS = {"pickle", "eval", "exec", "system", "extractall", "load_state_dict_from_url"}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def wing(module: str) -> str:
    """`relora.train.loop` -> `train`; `relora` -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """(imported module of ours, line); `from relora.a import b` counts as relora.a."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "relora":
            found.append((node.module, node.lineno))
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "relora"]
    return found


def test_imports_run_one_way() -> None:
    for path in files():
        here = wing(module_of(path))
        for module, line in imports(ast.parse(path.read_text())):
            there = wing(module)
            allowed = there == here or there in GROUND or there in MAY_IMPORT.get(here, set())
            assert allowed, f"{path}:{line}: {here} must not import {there}"


def test_no_circles() -> None:
    known = {module_of(path) for path in files()}
    graph = {
        module_of(path): {m for m, _ in imports(ast.parse(path.read_text())) if m in known and m != module_of(path)}
        for path in files()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_our_own_package_is_imported_at_the_top() -> None:
    """But for the command line, whose verbs load torch only when they run."""
    for path in files():
        if path.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert not imports(node), f"{path}:{node.lineno}: {node.name} hides an import of our own package"


def test_sizes() -> None:
    for path in files():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 70, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_nothing_is_unpickled_or_run_by_a_shell() -> None:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert "pickle" not in names, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                is_model_eval = isinstance(node.func, ast.Attribute) and name == "eval" and not node.args
                assert name not in DANGEROUS or is_model_eval, f"{path}:{node.lineno}: {name}"
                owner = ast.unparse(node.func)
                assert owner not in ("torch.load", "torch.save", "yaml.load"), f"{path}:{node.lineno}: {owner}"
                flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert flags.get("shell") is not True, f"{path}:{node.lineno}: shell=True"
                assert flags.get("trust_remote_code") is not True, f"{path}:{node.lineno}: trust_remote_code=True"
