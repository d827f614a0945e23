"""The shape of the package: what it declares to need, and which file may import which."""

import ast
import re
import sys
from pathlib import Path

import pytest

import ragged

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ragged"
FILES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# From the ground up: a file of the core imports only what stands to its left.
CORE = (
    "checks data tiles launch kernels gradients backends attention rows packing support loading rules pruners blocks "
    "graph model"
).split()
WINGS = ("data", "bench", "plots", "course", "train", "predict", "speculation")
FOLDERS = ("kernels", "rows", "support", "blocks", "graph")  # of the core
# What a wing may import beside itself and the core. `data` stands under the core: of it it takes the checks alone.
MAY_USE = {"data": (), "plots": ("data",), "bench": ("data",), "course": ("data", "plots", "bench"),
           "train": ("data", "bench"), "predict": ("data", "bench"), "speculation": ("data", "bench")}  # fmt: skip
# A program that nothing imports may name what stands above its wing: here a suite, which the wing that it times brings.
PROGRAMS = {"bench/__main__.py": ("speculation",)}

MAX_CORE_FILES = 13
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def parse(path):
    return ast.parse(path.read_text(), filename=str(path))


def imported_modules(path):
    """Yield (line, dotted name) of everything of ragged's, or of others, that the file imports anywhere. Relative names
    are written out; `from . import x` names x."""
    package = ("ragged", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            folder = PACKAGE.joinpath(*base.split(".")[1:])
            inside = [a.name for a in node.names if (folder / f"{a.name}.py").is_file() or (folder / a.name).is_dir()]
            is_package = base.split(".")[0] == "ragged" and folder.is_dir()
            names = [f"{base}.{name}" for name in inside] if is_package and inside else [base]
            yield from ((node.lineno, name) for name in names)


def requirement_lines(text):
    """The requirement of each line, without comments and spaces; `-e .` left out."""
    lines = (re.sub(r"\s+#.*|^#.*|\s", "", line) for line in text.splitlines())
    return sorted(line for line in lines if line and not line.startswith("-e"))


def test_the_version_is_the_distribution_s():
    assert ragged.__version__ == PROJECT["version"]


def test_requirements_txt_repeats_pyproject():
    extras = PROJECT["optional-dependencies"]
    (dev,) = extras["dev"]
    chosen = re.search(r"\[(.+)\]", dev).group(1).split(",")
    declared = PROJECT["dependencies"] + [line for extra in chosen for line in extras[extra]]
    assert requirement_lines((ROOT / "requirements.txt").read_text()) == requirement_lines("\n".join(declared))


def test_no_requirement_has_a_cap_or_a_pin():
    for line in requirement_lines((ROOT / "requirements.txt").read_text()):
        versions = line.split(";")[0]
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", versions), f"{line}: a lower bound only, please"


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def test_the_core_is_small():
    core = sorted(path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    assert core == sorted(set(CORE) - {*WINGS, *FOLDERS}) and len(core) <= MAX_CORE_FILES
    folders = sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__")
    assert folders == sorted([*WINGS, *FOLDERS])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_flow_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if path == PACKAGE / "__init__.py":
        pytest.skip("it gathers the public names from everywhere")
    if room in WINGS:
        may = {room, *MAY_USE[room], *(CORE if room != "data" else ["checks"]), *PROGRAMS.get(name_of(path), ())}
    else:
        may = set(CORE[: CORE.index(room) + (room in FOLDERS)])
    for line, name in imported_modules(path):
        assert name != "ragged", f"{name_of(path)}:{line} imports the whole package; import the file it needs"
        if name.startswith("ragged."):
            assert name.split(".")[1] in may, f"{name_of(path)}:{line} imports {name}; it may use {sorted(may)}"


def test_nothing_imports_a_program():
    programs = {f"ragged.{name.removesuffix('.py').replace('/', '.')}" for name in PROGRAMS}
    assert not {name for path in FILES for _, name in imported_modules(path)} & programs


def test_the_check_of_imports_sees_every_file():
    """A walk that misses a folder, or misreads two dots, would pass whatever stands there."""
    assert len(FILES) > 40 and {path.parent.name for path in FILES} >= {*WINGS, "ragged", "suites", "site"}
    found = {name for _, name in imported_modules(PACKAGE / "bench" / "suites" / "attention.py")}
    assert {"ragged.data", "ragged.attention", "ragged.bench.runner", "torch"} <= found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{name_of(path)} has {lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        # A Triton kernel is one unbroken lesson; cutting it up would hide the loop it is about.
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        length = node.end_lineno - node.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"
