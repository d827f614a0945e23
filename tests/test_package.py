"""The shape of the package: what it needs, what it must not need, and which file may import which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ragged

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "ragged").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Reading order. A file imports only from files to its left.
ORDER = (
    "registry commandline kernel_simple kernel launch copying layout packing tiles fused padded backends attention "
    "blocks checkpoints ranking selection pruners graph scenes data scene_pool loading model flops timing rounds "
    "runner pipelines suite_attention suite_pack suite_dispatch suite_model suite_checks accuracy suite_accuracy "
    "report bench beside claims style plots_call plots_model plots_pictures plots_launch plots_kernel "
    "plots_accuracy plots_pruning plots_paper plots notebook_output course notebook_tools site_page site "
    "token_training train "
).split()

MAX_FILE_LINES = 250
MAX_FUNCTION_LINES = 60


def parse(path):
    return ast.parse(path.read_text(), filename=str(path))


def imported_modules(tree):
    """Yield (line, dotted name) for every import anywhere in the file; relative ones are written out as ragged.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"ragged.{base}".rstrip(".")
            # `from ragged import data` names the file only in its list of names.
            names = [f"ragged.{alias.name}" for alias in node.names] if base == "ragged" else [base]
            yield from ((node.lineno, name) for name in names)


def requirement_lines(text):
    """The requirement of each line, without comments and spaces; `-e .` left out."""
    lines = (re.sub(r"\s+#.*|^#.*|\s", "", line) for line in text.splitlines())
    return sorted(line for line in lines if line and not line.startswith("-e"))


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


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


def test_imports_without_the_optional_packages():
    """A Mac has no triton, a bare install no plotly: the import must still work and say what is missing."""
    run_python(
        """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"plotly", "timm", "triton", "flash_attn", "ipywidgets", "IPython", "sklearn", "kaleido", "tqdm"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch, ragged

q = torch.randn(5, 2, 8)
cu = torch.tensor([0, 2, 5], dtype=torch.int32)
out = ragged.varlen_attention_ref(q, q, q, cu, cu, 3, 3)
assert out.shape == q.shape
for name in ("triton", "flash_attn"):
    assert ragged.BACKENDS[name].why_not("cpu", torch.float32, 8)
"""
    )


def test_the_import_pulls_in_nothing_heavy_but_torch():
    loaded = run_python("import sys, ragged; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert not {"plotly", "timm", "pandas", "sklearn", "ipywidgets", "matplotlib"} & set(loaded)


def test_plots_import_no_torch():
    path = ROOT / "ragged" / "plots.py"
    if not path.exists():
        pytest.skip("there is no ragged/plots.py")
    heavy = {"torch", "triton", "timm"}
    found = [(line, name) for line, name in imported_modules(parse(path)) if name.partition(".")[0] in heavy]
    assert not found, f"plots.py draws from tables alone, but imports {found}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_flow_one_way(path):
    if path.name == "__init__.py":
        pytest.skip("__init__.py gathers the public names from everywhere")
    assert path.stem in ORDER, f"{path.name} has no place in the reading order of tests/test_package.py"
    above = ORDER[: ORDER.index(path.stem)]
    for line, name in imported_modules(parse(path)):
        assert name != "ragged", f"{path.name}:{line} imports the whole package; import the file it needs"
        if name.startswith("ragged."):
            assert name.split(".")[1] in above, f"{path.name}:{line} imports {name}; above it stand only {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_and_functions_stay_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{path.name} has {lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        # A Triton kernel is one unbroken lesson; cutting it up would hide the loop it is about.
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        length = node.end_lineno - node.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {length} lines"
