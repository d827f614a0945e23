"""The command line of the bench in a user's hands: options that mean nothing together, missing packages, exit codes,
failed rows, and two recordings into one folder."""

import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from ragged import data
from ragged.bench import __main__ as bench
from ragged.bench import commandline, options, runner
from ragged.bench.rounds import Subject
from ragged.data import tables

ROOT = Path(__file__).resolve().parents[1]


def said(capsys, *arguments):
    """The sentence of `python -m ragged.bench ...`, refused with code 2."""
    code = commandline.run(lambda: bench.main([str(a) for a in arguments]), "python -m ragged.bench")
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error, error
    return error.partition("error: ")[2].strip()


# ---- options ----

MEANINGLESS = {
    "pack --imagenet DIR": "--imagenet: is for the suite accuracy",
    "accuracy --weights FILE": "--weights: is for --imagenet",
    "accuracy --predictors FILE": "--predictors: is for --imagenet",
    "accuracy --workers 2": "--workers: is for --imagenet",
    "accuracy --class-map FILE": "--class-map: is for --imagenet",
    f"accuracy --sha256 {'0' * 64}": "--sha256: is for --imagenet",
    "accuracy --imagenet DIR --sha256 0": "--sha256: is the hash of a checkpoint file",
    "accuracy --imagenet DIR --predictors-sha256 0": "--predictors-sha256: is the hash of --predictors FILE",
    "accuracy --imagenet DIR --quick": "--quick: has no effect with --imagenet",
    "accuracy --imagenet DIR --budget 5": "--budget: has no effect with --imagenet",
    "accuracy --imagenet DIR --repeats 5": "--repeats: has no effect with --imagenet",
    "accuracy --imagenet DIR --model deit_tiny deit_small": "--model: expected one with --imagenet",
    "accuracy --imagenet DIR --batch 1 2": "--batch: expected one with --imagenet",
    "pack --readme README.md": "--readme: is for the report",
    "pack --markdown out.md": "--markdown: is for the report",
    "report --redo": "--redo: has no effect on the report",
    "report --model deit_tiny": "--model: has no effect on the report",
    "report --budget 5": "--budget: has no effect on the report",
    "report --device cpu": "--device: has no effect on the report",
    "attention --model deit_tiny": "--model: has no effect here; the suites that take it are model",
    "dispatch --batch 4": "--batch: has no effect here",
    "pack --pruner evit": "--pruner: has no effect here; the suites that take it are model, sparsity",
    "dispatch --backend triton": "--backend: has no effect here; the suites that take it are model, sparsity",
    "pack --budget nan": "--budget: expected seconds, got nan",
}


@pytest.mark.parametrize("line", MEANINGLESS)
def test_options_without_effect_are_refused(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "Recorder", lambda *a: pytest.fail("began to measure"))
    assert said(capsys, *line.split(), "--out", tmp_path / "rows").startswith(MEANINGLESS[line])
    assert not (tmp_path / "rows").exists()


def test_options_that_belong_together_are_taken():
    for line in ("pack report --markdown x.md", "report --quick", "pack accuracy --imagenet DIR --quick --workers 2",
                 "accuracy --imagenet DIR --weights a.pth --sha256 0 --model deit_tiny --redo"):  # fmt: skip
        options.effects(bench.parser().parse_args(line.split()))


# ---- packages ----


@pytest.mark.parametrize(
    "line, module, named",
    [
        ("pack accuracy --quick", "sklearn", "accuracy needs the package 'scikit-learn'"),
        ("model sparsity --quick", "timm", "model and sparsity needs the package 'timm'"),
        ("pack report --quick", "pandas", "report needs the package 'pandas'"),
        ("accuracy --imagenet DIR", "torchvision", "accuracy needs the package 'torchvision'"),
    ],
)
def test_a_missing_package_is_said_before_anything_runs(line, module, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(bench, "Recorder", lambda *a: pytest.fail("began to measure"))
    message = said(capsys, *line.split(), "--out", tmp_path)
    assert named in message and f"pip install {named.split(chr(39))[1]}" in message


def test_the_bench_starts_without_the_packages_of_its_suites():
    """Or nobody could be told which one is missing."""
    hidden = "timm torchvision pandas sklearn tqdm".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); from ragged.bench import __main__ as bench; "
    code += "sys.exit(bench.commandline.run(lambda: bench.main(['model', 'accuracy', '--quick']), 'bench'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "'timm'" in result.stderr and "'scikit-learn'" in result.stderr


# ---- failures ----


def case(build):
    columns = {"suite": "pack", "model": "m", "pruner": "none", "batch": 2, "tokens": "4", "dtype": "float32"}
    return runner.Case(columns, [runner.Candidate({"backend": "a", "mode": "eager"}, build, ("wall_us",))])


def raising(error):
    def build():
        raise error

    return build


def status(folder):
    (row,) = data.read_csv(next(folder.glob("*/pack.csv")))
    return row["status"]


@pytest.mark.parametrize(
    "error, again, code",
    [
        (ModuleNotFoundError("No module named 'sklearn'"), True, 4),
        (FileNotFoundError("no such checkpoint: x"), True, 4),
        (runner.Wrong("off by one"), True, 4),
        (RuntimeError("out of luck"), True, 0),
        (torch.OutOfMemoryError("out of memory"), True, 0),
        (runner.Skip("the flash-attn package is not installed"), True, 0),
        (runner.Skip("needs equal counts"), False, 0),
        (NotImplementedError("capture: ats decides too often"), False, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_failed_rows_are_tried_again_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys, error, again, code):
    monkeypatch.setitem(bench.SUITES, "pack", lambda wanted: [case(raising(error))])
    line = ["pack", "--quick", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert bench.main(line) == code
    first = status(tmp_path)
    assert first != "ok" and (code == 0 or f"failed 1 times: {first}" in capsys.readouterr().err)
    monkeypatch.setitem(bench.SUITES, "pack", lambda wanted: [case(lambda: Subject([lambda: None]))])
    assert bench.main(line) == 0
    assert status(tmp_path) == ("ok" if again else first)


def test_what_broke_the_gpu_is_not_tried_again_unasked():
    assert not runner.worth_another_try("AcceleratorError: CUDA error: an illegal memory access was encountered")
    assert not runner.worth_another_try("no CUDA device, nothing to read") and not runner.worth_another_try("ok")


def test_the_help_explains_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        bench.parser().parse_args(["--help"])
    text = capsys.readouterr().out.partition("exit codes:")[2]
    assert [int(code) for code in re.findall(r"(?:^|[;:])?\s(\d+)\s", text)] == [0, 1, 2, 3, 4, 130]


# ---- two at once ----


def write_many(folder, name, started):
    started.wait()
    for n in range(20):
        row = dict.fromkeys(data.RESULT_COLUMNS, "") | {"suite": "pack", "gpu": "cpu", "metric": "host_us"}
        data.write_results([row | {"backend": name, "batch": n, "value": n}], folder)


def test_two_recordings_into_one_folder_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(2)
    both = [context.Process(target=write_many, args=(tmp_path, name, started)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    rows = data.read_csv(tmp_path / "cpu" / "pack.csv")
    assert len(rows) == 40 and [process.exitcode for process in both] == [0, 0]


def test_a_lock_that_is_never_given_up_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LOCK_SECONDS", 0)
    row = dict.fromkeys(data.RESULT_COLUMNS, "") | {"suite": "pack", "gpu": "cpu", "metric": "host_us"}
    with FileLock(tmp_path / ".lock"), pytest.raises(OSError, match="another process holds"):
        data.write_results([row], tmp_path)
    assert data.write_results([row], tmp_path)
