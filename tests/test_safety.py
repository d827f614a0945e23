"""Trust: files carry data and never programs, hashes are looked at first, the network is used only when asked for, and
the command lines say what is wrong in a sentence."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pruner_cases import DEPTH, DIM
from safetensors.torch import save_file

import ragged
from ragged import data, loading
from ragged.bench import __main__ as bench
from ragged.bench import commandline

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1200  # for a program to end; far beyond what any needs
SOURCES = sorted((ROOT / "ragged").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb"))
PROGRAMS = [path for path in SOURCES if re.search(r"^if __name__ == .__main__.:", path.read_text("utf-8"), re.M)]

# ---- what the sources do not contain ----

BARRED_IMPORTS = {
    "cloudpickle", "dill", "ftplib", "http", "httpx", "huggingface_hub", "joblib", "marshal", "pickle", "requests",
    "shelve", "socket", "urllib", "yaml",
}  # fmt: skip
BARRED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.hub.load",
    "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file", "pandas.read_pickle", "pd.read_pickle",
    "runpy.run_path", "builtins.eval", "builtins.exec",
}  # fmt: skip


def dangers(source, own_text=False):
    """Yield (line, what) for everything in a piece of Python that runs what a file says, or reaches for the network.

    own_text: what is written out in the same piece may be run, as where a lesson makes a program for its reader to see.
    """
    tree = ast.parse(source)
    texts = (ast.JoinedStr, ast.Constant)
    assigned = (node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, texts))
    written = {ast.unparse(target) for node in assigned for target in node.targets}
    froms = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "builtins")
    imported = {alias.asname or alias.name for node in froms for alias in node.names}  # not Python's own any more
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = "" if isinstance(node, ast.Import) else "." * node.level + (node.module or "") + "."
            names = {base + alias.name for alias in node.names}
            barred = {name for name in names if name.split(".")[0] in BARRED_IMPORTS}
            yield from ((node.lineno, name) for name in barred if not name.startswith("urllib.parse"))
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in BARRED_CALLS - imported and not (own_text and node.args and ast.unparse(node.args[0]) in written):
            yield node.lineno, name
        if name in ("torch.load", "torch.serialization.load") and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{name} with pickles"
        if keywords.get("shell", "False") != "False":
            yield node.lineno, f"{name} through a shell"
        if keywords.get("trust_remote_code", "False") != "False":
            yield node.lineno, f"{name} with code of strangers"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=careful)",
        "import pickle",
        "from urllib.request import urlopen",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "eval(cell)",
        "from builtins import exec\nexec(cell)",
        "source = open(path).read()\nexec(source)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert list(dangers(source)) and list(dangers(source, own_text=True))


def test_only_a_lesson_may_run_what_it_wrote_itself():
    lesson = "source = f'y = x * {2}'\nexec(source, names)"
    assert list(dangers(lesson)) and not list(dangers(lesson, own_text=True))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_runs_what_a_file_says(path):
    """The toy compiler of lesson 03 compiles what it wrote itself, as a cell of a lesson may."""
    toy = path == ROOT / "ragged" / "course" / "toy.py"
    assert not list(dangers(path.read_text(encoding="utf-8"), own_text=toy))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_notebook_runs_what_a_file_says(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            lines = ["pass" if re.match(r"\s*[%!]", line) else line for line in "".join(cell["source"]).splitlines()]
            lines = [line.rstrip().removesuffix("?") for line in lines]
            try:
                found = list(dangers("\n".join(lines), own_text=True))
            except SyntaxError:  # an indented magic line
                found = [word for word in ("pickle", "eval(", "exec(", "torch.load") if word in "\n".join(lines)]
            assert not found, f"{path.name}, {cell.get('id')}: {found}"


def test_pretrained_weights_are_asked_of_timm_in_one_place():
    asking = [
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "pretrained" and ast.unparse(node.value) == "True"
    ]
    assert asking == ["loading.py"]


# ---- files that would like to be run ----


class Intruder:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def hostile_files(folder, mark):
    """Paths of files that make `mark` when they are unpickled, in every format that torch has had."""
    state = {"model": {"head.weight": torch.zeros(2, 2), "more": Intruder(mark)}}
    torch.save(state, folder / "new_format.pth")
    torch.save(state, folder / "old_format.pth", _use_new_zipfile_serialization=False)
    torch.save(state, folder / "other_suffix.bin")
    for name in ("bare.pkl", "disguised.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Intruder(mark)))
    torch.jit.script(torch.nn.ReLU()).save(str(folder / "program.pt"))
    mark.unlink(missing_ok=True)  # pickling opens nothing, but let there be no doubt
    return sorted(path for path in folder.iterdir())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Detected pickle protocol:UserWarning")
def test_pickles_are_refused_and_not_run(tmp_path):
    (tmp_path / "files").mkdir()
    mark = tmp_path / "the intruder was here"
    readers = {
        "load_state": loading.load_state,
        "load_deit": lambda path: ragged.load_deit("deit_tiny", weights=path),
        "dynamicvit": lambda path: ragged.PRUNERS["dynamicvit"](keep=0.5, at=(1,), predictors=path).bind(DIM, DEPTH),
    }
    files = hostile_files(tmp_path / "files", mark)
    assert len(files) == 6
    torch.load(tmp_path / "files" / "new_format.pth", weights_only=False)  # the danger is real
    assert mark.exists()
    mark.unlink()
    for path in files:
        for name, read in readers.items():
            with pytest.raises(ValueError, match=re.escape(path.name)):
                read(path)
            assert not mark.exists(), f"{name} ran {path.name}"


def test_a_table_is_only_text(tmp_path, monkeypatch):
    """Cells that spreadsheets, formatters or templates would evaluate come back as they are."""
    cells = ["=1+1", "{0.__class__}", "{{7*7}}", "__import__('os')", "%(gpu)s"]
    row = dict.fromkeys(data.RESULT_COLUMNS, "") | {"suite": "attention", "metric": "host_us", "gpu": "cpu", "value": 1}
    data.write_results([row | {"backend": cell, "status": cell} for cell in cells], tmp_path / "results")
    monkeypatch.setattr(data.files, "data_dir", lambda: tmp_path)
    frame = data.results("attention")
    assert sorted(frame["backend"]) == sorted(frame["status"]) == sorted(cells)


def test_rows_stay_in_their_folder(tmp_path):
    row = dict.fromkeys(data.RESULT_COLUMNS, "") | {"suite": "attention", "metric": "m", "gpu": "../../outside"}
    (path,) = data.write_results([row], tmp_path / "results")
    assert path.resolve().is_relative_to((tmp_path / "results").resolve())
    with pytest.raises(ValueError, match="suite"):
        data.write_results([row | {"suite": "../outside"}], tmp_path / "results")


# ---- hashes first ----


@pytest.fixture
def unread(monkeypatch):
    """Reading a checkpoint fails the test."""
    import safetensors.torch

    for module, name in ((safetensors.torch, "load_file"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("read before its hash was looked at"))


def damaged(path):
    """A checkpoint, and beside it the hash of what it was before one of its bits was turned over."""
    save_file({"head.weight": torch.zeros(10, 192)}, str(path))
    content = bytearray(path.read_bytes())
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_checkpoint_is_not_read(tmp_path, unread, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    path = damaged(tmp_path / "checkpoints" / "deit_tiny_digits.safetensors")
    monkeypatch.setattr(data.files, "data_dir", lambda: tmp_path)
    uses = [
        lambda: loading.load_state(path),
        lambda: ragged.load_deit("deit_tiny", weights="digits"),
        lambda: ragged.load_deit("deit_tiny", weights=path),
        lambda: ragged.load_deit("deit_tiny", weights=path, sha256="0" * 64),
        lambda: ragged.PRUNERS["dynamicvit"](keep=0.5, at=(1,), predictors=path).bind(DIM, DEPTH),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="damaged or another file"):
            use()


# ---- no network ----

OFFLINE = """
import sys

used, started = [], []

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        used.append((event, str(arguments[-1] if event == "socket.connect" else arguments[0])))
        raise OSError("there is no network here")
    if event == "subprocess.Popen":
        started.append(str(arguments[0]).rpartition("/")[2])

sys.addaudithook(watch)
"""

WHOLE_TOUR = """
from pathlib import Path
import torch
import ragged
from ragged import course, data, plots
from ragged.bench import __main__ as bench

here = course.setup(quiet=True)
print(course.backends_table(here))
images, _ = data.photographs()
try:
    vit = ragged.load_deit("deit_tiny", weights="digits")
except FileNotFoundError:
    vit = ragged.load_deit("deit_tiny", weights="random", num_classes=10)
images = data.normalise(torch.cat((images[:1], data.digit_scenes(1, "test").images)))
knobs = {name: {"samples": 20} if name == "ats" else {"keep": 0.5} for name in ragged.PRUNERS}
for name, knob in knobs.items():
    logits = ragged.RaggedViT(vit, ragged.PRUNERS[name](at=(3,), **knob))(images)
    assert logits.shape == (2, 10), logits.shape
data.results("attention"), [data.paper(name) for name in data.paper_tables()]
out = str(Path.cwd() / "rows")
assert bench.main(["pack", "--quick", "--device", "cpu", "--batch", "1", "--repeats", "1", "--out", out]) == 0
assert bench.main(["report", "--out", out]) == 0
assert not used, used
ours, theirs = {"git", "nvidia-smi"}, {"ldconfig", "gcc", "cc", "ptxas"}  # these of PyTorch and Triton
assert set(started) <= ours | theirs, started

import time
time.sleep = lambda seconds: None  # between the tries of the client
try:
    ragged.load_deit("deit_tiny", weights="imagenet")
except ConnectionError as error:
    assert "random" in str(error)
else:
    raise SystemExit("pretrained weights without a network?")
assert used, "nobody even asked for the pretrained weights"
print("nothing else asked for the network")
"""


def test_the_network_is_used_only_when_pretrained_weights_are_asked_for(tmp_path):
    """Loading, every pruner, the tables, the bench and its report under a hook that sees every connection and every
    program started. An empty cache, so that the last step has nothing to fall back on."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", OFFLINE + WHOLE_TOUR]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "nothing else asked for the network" in result.stdout


# ---- command lines ----


def said(capsys, *arguments):
    """What `python -m ragged.bench ...` prints as an error, after making sure that it is one sentence and code 2."""
    code = commandline.run(lambda: bench.main(arguments), "python -m ragged.bench")
    error = capsys.readouterr().err.strip()
    assert code == 2 and "Traceback" not in error
    (line,) = (line for line in error.splitlines() if "error: " in line)
    return line.partition("error: ")[2]


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "run_suite", lambda *a: pytest.fail("measured before the folder was looked at"))
    assert str(tmp_path / "file") in said(capsys, "pack", "--quick", "--out", str(tmp_path / "file" / "rows"))
    line = ("pack", "report", "--quick", "--markdown", str(tmp_path / "file" / "report.md"))
    assert str(tmp_path / "file") in said(capsys, *line)


def test_a_folder_without_permission_is_named(tmp_path, capsys, monkeypatch):
    def locked(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp123")

    monkeypatch.setattr(commandline.tempfile, "TemporaryFile", locked)
    assert said(capsys, "pack", "--out", str(tmp_path)) == f"{tmp_path}: Permission denied"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(tmp_path, capsys):
    assert "no CUDA device" in said(capsys, "attention", "--device", "cuda", "--out", str(tmp_path))


def test_an_unknown_model_is_refused(tmp_path, capsys):
    message = said(capsys, "model", "--quick", "--model", "deit_tiny", "deit_huge", "--out", str(tmp_path / "rows"))
    assert "deit_huge" in message and "deit_small" in message and not (tmp_path / "rows").exists()


def good_table():
    row = dict.fromkeys(data.RESULT_COLUMNS, "") | {"suite": "pack", "metric": "m", "gpu": "cpu"}
    text = io.StringIO()
    text.write(",".join(data.RESULT_COLUMNS) + "\n" + ",".join(row.values()) + "\n")
    return text.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rows of a machine without a GPU are damaged here")
@pytest.mark.parametrize(
    "content",
    [b"a,b\n1,2\n", b"", good_table().encode()[:-8], good_table().encode() + b"x," * 40 + b"\n", b"\xff\xfe\x00\x01"],
    ids=["other_columns", "empty", "cut_off", "too_many_cells", "binary"],
)
def test_a_damaged_table_is_named(content, tmp_path, capsys):
    path = tmp_path / "cpu" / "pack.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    assert str(path) in said(capsys, "report", "--out", str(tmp_path))
    quick = ["pack", "--quick", "--batch", "1", "--repeats", "1", "--device", "cpu"]
    assert str(path) in said(capsys, *quick, "--out", str(tmp_path))
    assert path.read_bytes() == content  # left as it was found


def test_a_table_of_no_rows_is_no_obstacle(tmp_path, capsys):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "attention.csv").write_text(",".join(data.RESULT_COLUMNS) + "\n")
    assert bench.main(["report", "--out", str(tmp_path)]) == 0 and "arXiv 2604.15408" in capsys.readouterr().out


def test_files_to_write_are_looked_at_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run_suite", lambda *a: pytest.fail("measured before the files were looked at"))
    assert "is a folder" in said(capsys, "pack", "report", "--quick", "--markdown", str(tmp_path))
    missing = str(tmp_path / "missing.md")
    assert missing in said(capsys, "pack", "report", "--quick", "--readme", missing)


def test_a_readme_without_its_marks_is_refused(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# Something else\n")
    message = said(capsys, "report", "--out", str(tmp_path), "--readme", str(tmp_path / "README.md"))
    assert str(tmp_path / "README.md") in message


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert "'pandas'" in said(capsys, "report")


def test_ctrl_c_and_errors_of_our_own(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    assert commandline.run(stopped, "program") == 130
    assert capsys.readouterr().err.strip() == "program: stopped"
    with pytest.raises(ZeroDivisionError):  # nothing a user could mend: the traceback is what a developer needs
        commandline.run(lambda: 1 // 0, "program")
    monkeypatch.setenv("RAGGED_TRACEBACK", "1")
    with pytest.raises(OSError):
        commandline.run(lambda: open("/no/such/file", encoding="utf-8"), "program")


def run_program(module, *arguments, **environment):
    command = [sys.executable, "-m", f"ragged.{module}", *arguments]
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace", "timeout": SECONDS}
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, **options)


IN_A_ROW = """
import contextlib, io, json, runpy, sys, traceback

told = []
for program, *arguments in json.loads(sys.argv[1]):
    sys.argv[1:], code, said = arguments, 0, io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module(f"ragged.{program}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = "a traceback"
    told.append((code, said.getvalue()))
print(json.dumps(told))
"""


def run_in_a_row(programs, folder):
    """(exit code, what it said on stderr) of each `python -m ragged.PROGRAM ARGUMENTS`, in one process: importing
    PyTorch is what takes the time."""
    command = [sys.executable, "-W", "ignore", "-c", IN_A_ROW, json.dumps(programs)]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def program_of(path):
    """What stands after `python -m ragged.`"""
    return ".".join(path.relative_to(ROOT / "ragged").with_suffix("").parts).removesuffix(".__main__")


def test_every_program_explains_itself(tmp_path):
    names = [program_of(path) for path in PROGRAMS]
    assert {"bench", "train", "course.site"} <= set(names)
    asked = [[name, option] for name in names for option in ("--help", "--no-such-option")]
    for (name, option), (code, error) in zip(asked, run_in_a_row(asked, tmp_path)):
        assert code in (0, None) if option == "--help" else code == 2, f"{name} {option}: {code}, {error}"
        assert "Traceback" not in error and ("error:" in error) == (code == 2)
    assert not list(tmp_path.iterdir())


def test_programs_say_it_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    asked = [
        ["bench", "nonsense"],
        ["bench", "pack", "--batch", "0"],
        ["bench", "pack", "--repeats", "none"],
        ["bench", "pack", "--out", "file/rows"],
        ["train", "deit_tiny", "--device", "cpu", "--out", "file/rows"],
        ["train", "deit_tiny", "--device", "cpu", "--out", "empty", "--steps", "0"],
        ["train", "deit_huge"],
        ["train", "deit_tiny", "--stage", "dynamicvit", "--device", "cpu", "--out", "empty"],
    ]
    for option in ("--fresh 0", "--pool 0", "--batch 0", "--held-out 0", "--keep 5", "--lr -1", "--lr nan"):
        asked.append(["train", "deit_tiny", "--device", "cpu", "--out", "empty", *option.split()])
    if not torch.cuda.is_available():
        asked += [["bench", "pack", "--device", "cuda", "--out", "empty"]]
        asked += [["train", "deit_tiny", "--device", "cuda", "--out", "empty"]]
    for arguments, (code, error) in zip(asked, run_in_a_row(asked, tmp_path)):
        what = f"{arguments}: {code}, {error[-500:]}"
        assert code in (1, 2) and "Traceback" not in error, what
        assert 0 < len(error.strip().splitlines()[-1]) < 400, what
    assert not list((tmp_path / "empty").iterdir())


def test_the_report_prints_on_consoles_of_few_letters():
    """Windows redirects into its own alphabet, which has no Δ."""
    result = run_program("bench", "report", PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert "max |? logit|" in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="a pipe of a POSIX shell")
def test_a_reader_may_stop_early():
    reading = subprocess.Popen(
        [sys.executable, "-m", "ragged.bench", "report"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    reading.stdout.close()  # `... | head` does so as soon as it has its lines
    errors = reading.stderr.read()
    reading.stderr.close()
    assert reading.wait(SECONDS) == 1 and not errors.strip()
