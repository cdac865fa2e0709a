"""The house stands: imports run one way, no circles, no hidden imports, no file or function grows past its size."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "relora"
GROUND = {"errors", "files", "messages", "seeding"}
"""May be imported by all."""
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "messages": set(),
    "seeding": set(),
    "files": set(),
    "config": set(),
    "device": set(),
    "distributed": {"lowrank"},
    "processes": set(),
    "data": {"model"},
    "model": {"lowrank"},
    "lowrank": set(),
    "report": set(),
    "measure": {"distributed", "model"},
    "runs": {"config"},
    "train": {"device", "distributed", "lowrank", "measure", "report"},
    "adapters": {"lowrank", "model", "report", "runs"},
    "inference": {"adapters", "data", "device", "measure", "model", "runs"},
    "evaluation": {"data", "device", "distributed", "inference", "measure", "model", "report", "runs"},
    "recipes": {
        *("adapters", "config", "data", "device", "distributed", "evaluation", "inference", "lowrank", "measure"),
        *("model", "report", "runs", "train"),
    },
    "export": {"data", "lowrank", "model", "recipes", "runs", "train"},
    "planning": {
        "config",
        "data",
        "device",
        "distributed",
        "lowrank",
        "measure",
        "model",
        "processes",
        "recipes",
        "train",
    },
    "experiments": {
        *("config", "data", "device", "evaluation", "lowrank", "measure", "planning", "processes", "recipes"),
        *("report", "runs", "train"),
    },
    "cli": {
        *("adapters", "config", "data", "distributed", "evaluation", "experiments", "export", "inference"),
        *("planning", "recipes", "report"),
    },
    "__main__": {"cli"},
    "__init__": {"adapters", "lowrank", "recipes", "train"},
}
"""Wing -> the wings that it may import beside the ground; CONTRIBUTING.md has the same table with what each is."""
UNPICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
RUNNING = {
    *("eval", "exec", "compile", "__import__", "importlib.import_module", "yaml.load", "yaml.full_load"),
    *("yaml.unsafe_load", "yaml.load_all", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.Loader"),
    *("os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.posix_spawn"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.distributed.checkpoint"),
}
UNPACKING = {"extractall", "unpack_archive", "load_state_dict_from_url"}
"""Methods, whatever they are methods of."""
SWITCHES = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}
LISTED = {"subprocess": "relora.runs.environment", "importlib.import_module": "relora"}
"""What one module of ours may use: to ask git for the revision, by a list of words; to import from a fixed table."""


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


def test_every_wing_is_named_here_and_for_contributors() -> None:
    wings = {wing(module_of(path)) for path in files()}
    assert wings == MAY_IMPORT.keys()
    table = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text()
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    named = {row[1].strip(): set(re.findall(r"`(\w+)`", row[3])) for row in rows if len(row) == 5}
    for name in wings - GROUND - {"__init__", "__main__"}:
        assert named.get(f"`{name}`") == MAY_IMPORT[name], name


def test_every_package_says_what_it_is() -> None:
    for path in SOURCE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


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
        if wing(module_of(path)) == "cli":
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


def names_what_runs(node: ast.AST, module: str) -> str | None:
    """Why a node has no place in the package: it unpickles, runs text or a shell, or imports what data names."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        wholes = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        parts = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for name in (*wholes, *parts):
            if name.split(".")[0] in UNPICKLING or (name in {*RUNNING, *LISTED} and LISTED.get(name) != module):
                return name
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        name = ast.unparse(node)  # also where it is only handed on
        if name in RUNNING and LISTED.get(name) != module:
            return name
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        given = {keyword.arg: getattr(keyword.value, "value", keyword.value) for keyword in node.keywords}
        for switch, safe in SWITCHES.items():
            if switch in given and given[switch] is not safe and isinstance(given[switch], bool):
                return f"{switch}={given[switch]}"
        if name in UNPACKING or (ast.unparse(node.func) == "np.load" and given.get("allow_pickle") is not False):
            return name
    return None


def test_nothing_is_unpickled_or_run_by_a_shell() -> None:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            found = names_what_runs(node, module_of(path))
            assert found is None, f"{path}:{getattr(node, 'lineno', '?')}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os, dill.settings",
        "from torch import load",
        "from os import system as run",
        "read = torch.load",
        "torch.load(file, weights_only=True)",
        "torch.save(model, file)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval(text)",
        "map(exec, texts)",
        "compile(text, '', 'exec')",
        "os.system(text)",
        "os.popen(text)",
        "import subprocess",
        "subprocess.run(text, shell=True)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(file)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "importlib.import_module(name)",
        "__import__(name)",
        "from importlib import import_module",
    ],
)
def test_what_runs_is_seen(source: str) -> None:
    assert any(names_what_runs(node, "relora.data.readers") for node in ast.walk(ast.parse(source)))


def test_what_only_looks_like_it_is_left_alone() -> None:
    source = """
model.eval(); re.compile("x"); np.load(file, allow_pickle=False); from_pretrained(name, trust_remote_code=trusted)
"""
    assert not any(names_what_runs(node, "relora.data.readers") for node in ast.walk(ast.parse(source)))
