"""What is shipped: the wheel and the sdist hold what they must, and the package starts fast and with little.

The test marked `slow` starts from empty environments, which downloads PyTorch; it runs for the interpreters named in
RAGGED_PYTHONS, such as "python3.10 python3.13".
"""

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINUX_ONLY = {"triton", "flash-attn"}  # there are no wheels of these for macOS and Windows
DATA_KINDS = {".csv", ".gz", ".jpg", ".json", ".md", ".npz", ".png", ".safetensors", ".sha256"}
IMPORT_SECONDS = 1.0  # CPU time after torch, which every user of the package has loaded anyway
PYTHONS = os.environ.get("RAGGED_PYTHONS", "").split()

HIDE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = set({names!r})
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
HEAVY = ("triton", "timm", "plotly", "flash_attn", "pandas", "ipywidgets", "IPython", "sklearn", "tqdm",
         "kaleido")  # fmt: skip


def run_python(code, folder, python=sys.executable, **environment):
    """Run a piece of Python in a folder that has nothing to do with the checkout; returns what it printed."""
    command = [str(python), "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


# ---- archives ----


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(wheel, sdist) of this checkout, made as pip would, only without a fresh environment for the builder."""
    sdist = pytest.importorskip("hatchling.builders.sdist").SdistBuilder
    wheel = pytest.importorskip("hatchling.builders.wheel").WheelBuilder
    folder = str(tmp_path_factory.mktemp("dist"))
    return tuple(
        Path(next(builder(str(ROOT)).build(directory=folder, versions=["standard"]))) for builder in (wheel, sdist)
    )


def data_files():
    found = (path for path in (ROOT / "data").rglob("*") if path.is_file())
    return {path.relative_to(ROOT / "data").as_posix() for path in found}


def test_the_wheel_holds_the_package_and_its_data(archives):
    names = set(zipfile.ZipFile(archives[0]).namelist())
    info = f"ragged_vit-{PROJECT['version']}.dist-info"
    files = (path for path in (ROOT / "ragged").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    modules = {path.relative_to(ROOT).as_posix() for path in files}
    data = {f"ragged/_data/{name}" for name in data_files()}
    others = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == modules | data | others
    for needed in ("images/attribution.csv", "images/cat.jpg", "paper/v1_attention_call.csv", "README.md"):
        assert f"ragged/_data/{needed}" in names
    assert [name for name in names if re.fullmatch(r"ragged/_data/results/nvidia_h200/\w+\.csv", name)]


def test_the_data_are_of_known_kinds_and_checkpoints_have_their_hashes():
    """What somebody's training or editor left there would travel with the wheel."""
    names = data_files()
    assert not [name for name in names if Path(name).suffix not in DATA_KINDS]
    for name in names:
        if name.endswith((".safetensors", ".npz")):
            assert f"{name}.sha256" in names


def test_the_metadata_are_those_of_pyproject(archives):
    with zipfile.ZipFile(archives[0]) as file:
        metadata = email.message_from_bytes(file.read(f"ragged_vit-{PROJECT['version']}.dist-info/METADATA"))
        tags = email.message_from_bytes(file.read(f"ragged_vit-{PROJECT['version']}.dist-info/WHEEL")).get_all("Tag")
    assert metadata["Name"] == PROJECT["name"] and metadata["Requires-Python"] == PROJECT["requires-python"]
    plain = [name for name in metadata.get_all("Requires-Dist") if "extra ==" not in name]
    assert sorted(map(normal, plain)) == sorted(map(normal, PROJECT["dependencies"]))
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert tags == ["py3-none-any"]  # one wheel for every system


def normal(requirement):
    return re.sub(r"\s|'|\"", "", requirement)


def test_the_sdist_holds_what_the_repository_does(archives):
    top = f"ragged_vit-{PROJECT['version']}"
    with tarfile.open(archives[1]) as file:
        names = {name.removeprefix(f"{top}/") for name in file.getnames()}
    tops = {name.partition("/")[0] for name in names}
    assert {"ragged", "data", "notebooks", "tests", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= tops
    assert {f"data/{name}" for name in data_files()} <= names
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout to compare with")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    missing = {name for name in listed.splitlines() if not name.startswith(".") and (ROOT / name).exists()} - names
    assert not missing, f"in the repository, not in the sdist: {sorted(missing)}"
    hidden = {name for name in tops if name.startswith(".")} - {".gitignore"}
    assert not hidden, f"no business of a sdist: {hidden}"


def test_the_wheel_of_the_sdist_is_the_wheel(archives, tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    with tarfile.open(archives[1]) as file:
        file.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = tmp_path.iterdir()
    wheel = next(WheelBuilder(str(folder)).build(directory=str(tmp_path / "dist"), versions=["standard"]))
    first, second = (zipfile.ZipFile(path) for path in (archives[0], wheel))
    assert sorted(first.namelist()) == sorted(second.namelist())
    for name in first.namelist():
        assert first.read(name) == second.read(name) or name.endswith("RECORD"), name


ALONE = """
import ragged
from pathlib import Path
from ragged import data
assert Path(ragged.__file__).resolve().is_relative_to(Path({where!r})), ragged.__file__
assert data.data_dir() == Path(ragged.__file__).resolve().parent / "_data"
assert len(data.results("attention", "NVIDIA H200")) and all(len(data.paper(name)) for name in data.paper_tables())
images, records = data.photographs(32)
assert len(images) == len(records) >= 6
model = ragged.RaggedViT(ragged.load_deit("deit_tiny"), ragged.PRUNERS["evit"](keep=0.5, at=(3,)))
assert model(images.new_zeros(2, 3, 224, 224)).shape == (2, 1000)
print("fine")
"""


def test_pip_installs_it_into_a_folder(archives, installed, tmp_path):
    """The wheel's files and no others, with the metadata of this version; and they are enough to use it."""
    left_out = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}  # what pip writes
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    for name in zipfile.ZipFile(archives[0]).namelist():
        if Path(name).name not in left_out:
            assert (installed / name).read_bytes() == zipfile.ZipFile(archives[0]).read(name), name
            files.remove(name)
    assert not [name for name in files if Path(name).name not in left_out and Path(name).suffix != ".pyc"]
    code = ALONE.format(where=str(installed.resolve()))
    code += "from importlib.metadata import version; print(version('ragged-vit'))"
    assert run_python(code, tmp_path, PYTHONPATH=str(installed)).split() == ["fine", PROJECT["version"]]


# ---- start: one process with everything there, and one where the optional packages are missing ----

START = """
import json, sys, time, torch
start, before = time.process_time(), {*sys.modules}
import ragged
print(json.dumps([time.process_time() - start, *{name.partition(".")[0] for name in {*sys.modules} - before}]))
"""
USES = {
    "timm": "ragged.load_deit('deit_tiny')",
    "plotly": "from ragged import plots; plots.batch_lengths([3, 5])",
    "pandas": "from ragged import data; data.results('attention')",
    "pandas, for a report": "from ragged.bench.__main__ import main; main(['report'])",
    "scikit-learn": "from ragged import data; data.digit_scenes(1, 'test')[0]",
    "IPython": "from ragged import course; course.slider(str, [1, 2])",
    "not installed; try pip install 'ragged-vit[": "import ragged.course.site.__main__",
}
ASKED = """
uses, backends = json.loads(sys.argv[1])
told = {}
for name, use in uses.items():
    try:
        exec(use)
    except (ImportError, SystemExit) as error:
        told[name] = str(error)
q, cu = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
for name in backends:
    try:
        ragged.varlen_attention(q, q, q, cu, cu, 3, 3, backend=name)
    except ValueError as error:
        told[name] = [ragged.BACKENDS[name].why_not("cuda", torch.float16, 64), str(error)]
assert torch.allclose(ragged.varlen_attention(q, q, q, cu, cu, 3, 3).double(),
                      ragged.varlen_attention_ref(q, q, q, cu, cu, 3, 3), atol=1e-6)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Without the optional packages, as on a Mac or after a bare install: what START and ASKED print."""
    asked = json.dumps([USES, ["triton", "flash_attn"]])
    command = [sys.executable, "-c", HIDE.format(names=HEAVY) + START + ASKED, asked]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    folder = tmp_path_factory.mktemp("bare")
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_a_light_start(seconds, *loaded):
    assert seconds <= IMPORT_SECONDS, f"import ragged took {seconds} s of CPU time after torch"
    assert "ragged" in loaded and not {*HEAVY, "matplotlib"} & {*loaded}


def test_the_import_is_fast_and_pulls_in_nothing_heavy_but_torch(tmp_path):
    assert_a_light_start(*json.loads(run_python(START, tmp_path, PYTHONPATH=str(ROOT))))


def test_it_is_imported_without_the_optional_packages(bare):
    assert_a_light_start(*bare[0])


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_named_when_it_is_needed(package, bare):
    assert package.partition(",")[0] in bare[1][package]


@pytest.mark.parametrize("package", ["triton", "flash_attn"])
def test_a_backend_without_its_package_says_so(package, bare):
    on_a_gpu, here = bare[1][package]
    assert "not installed" in on_a_gpu and package.replace("_", "-") in on_a_gpu.lower()
    assert package in here and "Use backend=" in here


# ---- other systems ----


def all_requirements():
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    lines += (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(" #")[0] for line in lines if line.strip() and line[0] not in "#-"]


def test_linux_only_packages_carry_a_marker():
    requirements = pytest.importorskip("packaging.requirements")
    found = {}
    for line in all_requirements():
        requirement = requirements.Requirement(line)
        for system in ("linux", "darwin", "win32"):
            wanted = requirement.marker is None or requirement.marker.evaluate({"sys_platform": system, "extra": ""})
            found.setdefault(requirement.name, {}).setdefault(system, set()).add(wanted)
    assert LINUX_ONLY <= set(found)
    for name, systems in found.items():
        elsewhere = {name not in LINUX_ONLY}
        assert systems == {"linux": {True}, "darwin": elsewhere, "win32": elsewhere}, name


def test_text_files_are_read_as_utf_8_everywhere():
    """Windows would take its own alphabet, and the tables and the README hold µ and Δ."""
    files = sorted((ROOT / "ragged").rglob("*.py"))
    assert {"ragged", "data", "suites", "site"} <= {path.parent.name for path in files}
    for path in files:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
            if name not in ("open", "read_text", "write_text", "fdopen") or owner in ("os", "Image", "webbrowser"):
                continue
            modes = [a.value for a in call.args if isinstance(a, ast.Constant)] + [
                k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)
            ]
            binary = any(isinstance(mode, str) and re.fullmatch("[rwxa](b[+]?|[+]b)", mode) for mode in modes)
            named = any(keyword.arg == "encoding" for keyword in call.keywords)
            assert named or binary, f"{path.name}:{call.lineno} {ast.unparse(call)[:80]} names no encoding"


# ---- with pip ----


@pytest.mark.slow
@pytest.mark.parametrize("bounds", ["newest", "oldest"])
@pytest.mark.parametrize("python", PYTHONS or [None])
def test_an_empty_environment(python, bounds, tmp_path):
    """`pip install .` from nothing, with the newest packages there are, and with the oldest that are allowed."""
    if python is None:
        pytest.skip("downloads PyTorch: name interpreters in RAGGED_PYTHONS")
    if bounds == "oldest" and "(3, 10)" not in run_python("import sys; print(sys.version_info[:2])", tmp_path, python):
        pytest.skip("the oldest packages have no wheels for newer Pythons")
    venv = tmp_path / "venv"
    try:
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
        fill_and_try(venv, bounds, tmp_path)
    finally:
        shutil.rmtree(venv, ignore_errors=True)  # gigabytes


def fill_and_try(venv, bounds, folder):
    inside = next(path for path in venv.glob("*/python*") if path.stem == "python")
    constraints = folder / "constraints.txt"
    lowest = [re.sub(">=", "==", line.partition(";")[0]) for line in PROJECT["dependencies"]]
    constraints.write_text("\n".join(lowest if bounds == "oldest" else []), encoding="utf-8")
    command = [str(inside), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    code = "import sys; from ragged.bench.runner import machine; print(sys.version, machine())"
    listed = run_python(code, folder, inside)
    print(bounds, listed)
    assert run_python(ALONE.format(where=str(venv.resolve())), folder, inside).strip() == "fine"
    assert_a_light_start(*json.loads(run_python(START, folder, inside)))
    code = "import sys; from ragged.bench.__main__ import main; sys.exit(main(['report']))"
    assert "v1, A100" in run_python(code, folder, inside)
