"""The layout, kept by reading the source: who imports whom, who prints, and how long things may get."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llmq", "quant", "cli")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# A module may import modules of a lower rank only; the longest matching prefix decides.
RANKS = {
    "llmq": 0,
    "llmq.errors": 0,
    "llmq.files": 1,
    "llmq.store": 2,
    "llmq.catalog": 3,
    "llmq.reference": 4,
    "llmq.formats": 2,
    "llmq.jit": 3,
    "llmq.cgroup": 1,
    "llmq.cores": 2,
    "llmq.layout": 3,
    "llmq.gguf_header": 3,
    "llmq.locks": 4,
    "llmq.records": 3,
    "llmq.http": 4,
    "llmq.answer": 4,
    "llmq.part": 5,
    "llmq.fetcher": 5,
    "llmq.ledger": 6,
    "llmq.hub": 9,
    "llmq.transfer": 7,
    "llmq.ask": 8,
    "llmq.offer": 10,
    "llmq.warm": 4,
    "llmq.elsewhere": 6,
    "llmq.gguf_writer": 6,
    "llmq.gguf": 7,
    "llmq.config": 8,
    "llmq.simd": 4,
    "llmq.team": 5,
    "llmq.kernels": 6,
    "llmq.figures": 4,
    "llmq.machine": 8,
    "llmq.memory": 9,
    "llmq.work": 9,
    "llmq.cache": 10,
    "llmq.sampler": 9,
    "llmq.tokenizer": 9,
    "llmq.prompt": 10,
    "llmq.supported": 10,
    "llmq.engine": 11,
    "llmq.draft": 9,
    "llmq.generate": 12,
    "llmq.model": 13,
    "llmq.speed": 14,
    "quant": 20,
    "cli": 30,
}
TERMINAL = {"typer", "rich", "prompt_toolkit"}
LONGEST_FILE, LONGEST_FUNCTION = 450, 80


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported, "from a import b" as a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def rank(module: str) -> int:
    while module not in RANKS:
        module = module.rpartition(".")[0]
    return RANKS[module]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


each_source = pytest.mark.parametrize("path", SOURCES, ids=module_name)


@each_source
def test_imports_go_down(path: Path) -> None:
    own = module_name(path)
    modules = {module_name(source) for source in SOURCES}
    for other in imports(tree_of(path)) & modules - set(PACKAGES):
        # A package's face shows its parts; the parts of kernels, engine, quant and cli may use one another.
        face = other.startswith(f"{own}.")
        same_house = other.rpartition(".")[0] == own.rpartition(".")[0] != "llmq"
        assert rank(other) < rank(own) or same_house or face, f"{own} imports {other}, which is not below it"


def test_every_module_of_the_runtime_has_a_rank() -> None:
    unranked = {name for name in map(module_name, SOURCES) if name.startswith("llmq.") and rank(name) == 0} - {
        "llmq.errors"
    }
    assert not unranked, f"give {unranked} a rank"


@each_source
def test_only_the_command_line_prints(path: Path) -> None:
    if module_name(path).startswith("cli"):
        return
    found = {name.split(".")[0] for name in imports(tree_of(path))} & TERMINAL
    assert not found, f"{path.name} imports {found}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno} prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in {"stdout", "stderr"}, f"{path.name}:{node.lineno} writes to the terminal"


@each_source
def test_only_main_catches_everything(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"bare"}
            broad = names & {"bare", "Exception"}
            assert not broad or module_name(path) == "cli.main", f"{path.name}:{node.lineno} catches {broad}"


@each_source
def test_one_home_for_fast_math(path: Path) -> None:
    if module_name(path) != "llmq.jit":
        assert "fastmath=" not in path.read_text("utf-8")


def n_lines(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@each_source
def test_nothing_gets_long(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST_FILE
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            # A function that makes a kernel holds the kernel's parts, which count for themselves.
            length = n_lines(node) - sum(n_lines(part) for part in node.body if isinstance(part, ast.FunctionDef))
            assert length <= LONGEST_FUNCTION, f"{path.name}: {node.name} has {length} lines"


@each_source
def test_nothing_is_left_for_later(path: Path) -> None:
    left = re.findall(r"TODO|FIXME|XXX|for now\b|placeholder", path.read_text("utf-8"))
    assert not left, f"{path.name} has {left}"


@each_source
def test_no_pickle_no_templates_no_eval(path: Path) -> None:
    tree = tree_of(path)
    roots = {name.split(".")[0] for name in imports(tree)}
    assert not roots & {"pickle", "jinja2", "yaml", "torch", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, f"{path.name}:{node.lineno}"


def test_one_main_catches() -> None:
    """The boundary is there, once; without it the test above would hold for nothing."""
    text = (ROOT / "cli" / "main.py").read_text("utf-8")
    assert text.count("except Exception") == 1


def test_the_top_level_is_the_architecture() -> None:
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    expected = {
        "llmq", "quant", "cli", "tests", "bench", "docs", "models.toml", "pyproject.toml",
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
    }  # fmt: skip
    made_by_tools = {"build", "dist", "llmq.egg-info"}
    assert expected <= shown
    assert not shown - expected - made_by_tools


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """A claim stands on the test or the script that it names."""
    for named in re.findall(r"`((?:tests|bench)/[\w.*]+)`", page.read_text("utf-8")):
        assert list(ROOT.glob(named)), f"{page.name} names {named}"
