"""The house rules, checked on the source itself: sizes, a mirrored test for each file, plain rooms without jax, forbidden things."""

import ast
import builtins
import dis
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxinfer", "pallas_kernels", "checkpoints")
KERNELS = ("tpu.py", "gpu.py")
PLAIN = (
    "jaxinfer", "jaxinfer.__main__", "jaxinfer.config", "jaxinfer.errors", "jaxinfer.grammar", "jaxinfer.request", "jaxinfer.batch",
    "jaxinfer.cache.pages", "jaxinfer.cache.prefix", "jaxinfer.engine.grammar_compile", "jaxinfer.engine.grammar_trial",
    "jaxinfer.engine.policies", "jaxinfer.engine.line", "jaxinfer.engine.sequence", "jaxinfer.engine.scheduler", "jaxinfer.tokenizer",
    "jaxinfer.selftest.device", "jaxinfer.selftest.machine", "jaxinfer.selftest.mutations",
)  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "marshal", "torch", "transformers", "shelve"}
FORBIDDEN_NODES = {"eval()", "exec()", "compile()", "__import__()", "Global", "Assert"}
READS_ENVIRONMENT = {"jaxinfer/config.py", "jaxinfer/devices.py", "jaxinfer/commands/doctor.py"}  # the others look at XLA's and JAX's own
WITHOUT_SOURCE = {  # every backend; the committed weights; the whole sampler
    "tests/pallas_kernels/test_contract.py", "tests/checkpoints/test_files.py", "tests/jaxinfer/test_sampling_statistics.py",
}  # fmt: skip
OTHER_INTERPRETERS = {"jaxinfer/bench/peer_hf.py"}  # run by an interpreter that has torch


def sources() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if "_demo" not in file.parts)


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def trees() -> tuple[tuple[str, tuple[ast.AST, ...]], ...]:
    return tuple((name(file), tuple(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))) for file in sources())


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for file, inside in trees():
        yield from ((file, node) for node in inside if isinstance(node, kinds))


def complexity(function: ast.AST) -> int:
    branches = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case)
    inside = list(ast.walk(function))
    return 1 + sum(isinstance(node, branches) for node in inside) + sum(len(n.values) - 1 for n in inside if isinstance(n, ast.BoolOp))


def decorators(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def test_files_are_small() -> None:
    limits = {name(file): 500 if file.name in KERNELS else 400 for file in sources()}
    long = {file: lines for file, limit in limits.items() if (lines := (ROOT / file).read_text().count("\n")) > limit}
    assert not long


def test_functions_are_small() -> None:
    found = {}
    for file, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        lines, arguments = node.end_lineno - node.lineno + 1, [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([a for a in arguments if a.arg not in ("self", "cls")])
        longest, most = 150 if file.endswith(KERNELS) else 60, 10 if file.startswith("pallas_kernels") else 8
        if lines > longest or count > most or complexity(node) > 15:
            found[f"{file}:{node.name}"] = (lines, count, complexity(node))
    assert not found, "lines, arguments, complexity"


def test_classes_are_small() -> None:
    found = {}
    for file, node in nodes(ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        public = [n for n in methods if not n.name.startswith("_") and "property" not in [ast.unparse(d) for d in n.decorator_list]]
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        if len(public) > 12 or ("dataclass" in str(decorators(node)) and len(fields) > 15):
            found[f"{file}:{node.name}"] = (len(public), len(fields))
    assert not found, "public methods, fields"


def test_every_source_has_its_test() -> None:
    missing = []
    for file in sources():
        mirror = ROOT / "tests" / file.relative_to(ROOT).parent / f"test_{file.name}"
        if file.name != "__init__.py" and not mirror.is_file():
            missing.append(mirror.relative_to(ROOT).as_posix())
    assert not missing


def test_every_test_has_its_source() -> None:
    mirrored = (p for package in PACKAGES for p in (ROOT / "tests" / package).rglob("test_*.py"))
    orphans = [name(p) for p in mirrored if not (ROOT / p.relative_to(ROOT / "tests").parent / p.name.removeprefix("test_")).is_file()]
    assert set(orphans) <= WITHOUT_SOURCE


def test_package_files_are_empty() -> None:
    tops = {"jaxinfer/__init__.py", "pallas_kernels/__init__.py"}
    inits = [file for file in sources() if file.name == "__init__.py" and name(file) not in tops]
    assert [name(file) for file in inits if file.read_text().strip() and not file.read_text().lstrip().startswith('"""')] == []


def test_nothing_forbidden_is_imported_or_called() -> None:
    found = []
    for file, node in nodes(ast.Import, ast.ImportFrom, ast.Call, ast.Global, ast.Assert):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.Call):
            names = {f"{ast.unparse(node.func)}()"}
        else:
            names = {type(node).__name__}
        if (bad := names & (FORBIDDEN_IMPORTS | FORBIDDEN_NODES)) and file not in OTHER_INTERPRETERS:
            found.append(f"{file}: {sorted(bad)}")
    assert not found


def code_of(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from code_of(part)


def undefined(source: str) -> set[str]:
    """Global names that code reads and no line of its module makes."""
    whole = compile(source, "module", "exec", dont_inherit=True)
    steps = [step for code in code_of(whole) for step in dis.get_instructions(code)]
    made = {step.argval for step in steps if step.opname in ("STORE_NAME", "STORE_GLOBAL")}
    read = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return read - made - set(dir(builtins)) - {"__file__", "__name__", "__doc__", "__annotations__", "__module__", "__qualname__"}


def test_every_name_is_defined() -> None:
    """What the linters would say, if shapes in annotations did not look like names to them."""
    assert undefined("from x import y\ndef f():\n    return y + z\n") == {"z"}
    assert not {name(file): found for file in sources() if (found := undefined(file.read_text(encoding="utf-8")))}


def test_the_environment_is_read_in_one_place() -> None:
    reads = {file for file, node in nodes(ast.Attribute) if ast.unparse(node) in ("os.environ", "os.environb", "os.getenv")}
    reads |= {file for file, node in nodes(ast.ImportFrom) if "environ" in ast.unparse(node) or "getenv" in ast.unparse(node)}
    assert {file for file in reads if file.startswith(("jaxinfer/", "pallas_kernels/"))} <= READS_ENVIRONMENT | OTHER_INTERPRETERS


def test_plain_rooms_do_not_reach_jax() -> None:
    """In one fresh process: import-linter does not see what a package's __init__ pulls in."""
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module({room!r})\nif 'jax' in sys.modules or 'flax' in sys.modules: sys.exit({room!r})\n" for room in PLAIN
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_speaks_of_one_machine() -> None:
    """No absolute path of somebody's machine in sources, documents or scripts (tests plant some)."""
    suffixes = {".py", ".md", ".toml", ".yaml", ".ipynb", ".html"}
    folders = [ROOT / folder for folder in (*PACKAGES, "notebooks")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in suffixes]
    files += [file for file in ROOT.iterdir() if file.suffix in suffixes] + [ROOT / ".ci" / "run"]
    pattern = re.compile(r"(?<![\w.])/(?:work|root)/\w")
    assert [name(file) for file in files if pattern.search(file.read_text(encoding="utf-8"))] == []


def test_readme_commands_stand_in_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m jaxinfer.serve\n" in readme
    assert 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/pytest\n' in readme


@pytest.mark.parametrize("document", ["README", "ARCHITECTURE", "CONTRIBUTING", "DECISIONS", "LOG", "CHANGELOG"])
def test_documents_exist(document: str) -> None:
    assert (ROOT / f"{document}.md").stat().st_size > 500
