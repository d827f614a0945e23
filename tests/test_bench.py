"""The bench: what it writes, what it leaves alone, and that trouble becomes a row."""

import csv
from pathlib import Path

import pytest
import torch

from ragged import data, loading
from ragged.backends import BACKENDS
from ragged.bench import __main__ as bench
from ragged.bench import flops, networks, pipelines, runner
from ragged.bench.rounds import Subject, measure
from ragged.bench.suites.attention import Inputs
from ragged.bench.suites.model import model
from ragged.packing import Selection
from ragged.pruners import PRUNERS

ON_CPU = ["--quick", "--repeats", "1", "--device", "cpu"]
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="writes rows of a machine without a GPU")


def rows(out, suite):
    (path,) = out.glob(f"*/{suite}.csv")
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        assert tuple(table.fieldnames) == data.RESULT_COLUMNS
        return list(table)


@pytest.fixture(scope="module")
def attention_rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert bench.main(["attention", *ON_CPU, "--batch", "2", "--out", str(out)]) == 0
    return out, rows(out, "attention")


@cpu_only
def test_every_provider_has_a_row_and_every_blank_a_reason(attention_rows):
    _, found = attention_rows
    names = {row["backend"] for row in found}
    assert {"triton", "flash_attn", "torch_varlen", "nested", "sdpa_padded", "dense", "paper_triton"} <= names
    assert {row["mode"] for row in found} == {"eager", "graph"}
    assert {row["tokens"] for row in found} == {"39", "U(20,197)"}
    for row in found:
        assert (row["value"] != "") == (row["status"] == "ok"), row
    assert not any(row["status"].startswith("wrong") for row in found)
    assert all(row["unit"] == ("1" if row["metric"] == "syncs" else "us") for row in found)


@cpu_only
def test_host_and_wall_are_measured_without_a_gpu_and_gpu_time_is_not_invented(attention_rows):
    _, found = attention_rows
    mine = {r["metric"]: r for r in found if r["backend"] == "sdpa_padded" and r["mode"] == "eager"}
    assert float(mine["host_us"]["value"]) > 1 and float(mine["wall_us"]["value"]) > 1
    assert float(mine["wall_us"]["q20"]) <= float(mine["wall_us"]["value"]) <= float(mine["wall_us"]["q80"])
    assert mine["gpu_us"]["value"] == "" and "no CUDA" in mine["gpu_us"]["status"]
    assert mine["wall_us"]["gpu"] == "cpu" and mine["wall_us"]["torch"] == torch.__version__


@cpu_only
def test_what_is_recorded_is_not_measured_again_unless_asked(attention_rows, monkeypatch):
    out, before = attention_rows
    arguments = ["attention", *ON_CPU, "--batch", "2", "--out", str(out)]
    built = []
    monkeypatch.setattr(
        runner, "measure", lambda subjects, *options: built.extend(subjects) or measure(subjects, 1, 100)
    )
    bench.main(arguments)
    assert not built and rows(out, "attention") == before
    bench.main([*arguments, "--redo"])
    assert built


@cpu_only
def test_nothing_starts_after_the_time_is_up(tmp_path, capsys):
    bench.main(["attention", *ON_CPU, "--budget", "-1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    assert "time is up" in capsys.readouterr().err


@cpu_only
@pytest.mark.parametrize("suite", ["dispatch", "memory"])
def test_suites_that_need_a_gpu_say_so(suite, tmp_path):
    bench.main([suite, *ON_CPU, "--out", str(tmp_path)])
    assert all(row["status"] for row in rows(tmp_path, suite))


@cpu_only
def test_pack_runs_everywhere(tmp_path):
    bench.main(["pack", *ON_CPU, "--batch", "2", "--out", str(tmp_path)])
    eager = [r for r in rows(tmp_path, "pack") if r["mode"] == "eager" and r["metric"] == "wall_us"]
    assert {r["backend"] for r in eager if r["status"] == "ok" and r["tokens"] == "99"} == {
        "triton", "triton:counts_known", "triton:index", "mask_indexing", "python_loop", "gather",
    }  # fmt: skip


def small_bench(monkeypatch, dtype=torch.float32):
    """A workbench with a network of two seconds less: width 64, six blocks, 17 tokens."""
    import timm

    def load(name, weights, img_size):
        torch.manual_seed(0)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 1, "num_classes": 10}
        return timm.models.vision_transformer.VisionTransformer(**shape).eval()

    monkeypatch.setattr(networks, "load_deit", load)
    networks.network.cache_clear()
    try:
        return pipelines.Workbench("small", 3, dtype, "cpu", 32)
    finally:
        networks.network.cache_clear()


def test_a_pipeline_is_checked_timed_and_described(monkeypatch):
    made = small_bench(monkeypatch)
    make = lambda: PRUNERS["threshold_l2"](keep=0.5, at=(3,), where="after")  # noqa: E731
    pipeline = pipelines.Pipeline(lambda: made, make, "sdpa_padded", "eager")
    subject = pipeline.build()
    measure([subject], 2, 100)
    assert subject.error is None and len(subject.times["wall_us"]) >= 2
    values = pipeline.values(subject)
    assert values["kept_tokens"] == 9 and values["capacity_waste"] == 0 and 1 < values["flops_ratio"] < 2


def test_a_wrong_output_is_found(monkeypatch):
    made = small_bench(monkeypatch)
    right = BACKENDS["sdpa_padded"]
    model = made.model(PRUNERS["ats"](samples=8, at=(3,), where="after"), right.name)
    made.check(model, model)
    with pytest.raises(runner.Wrong, match="root mean square"):
        made.check(model, lambda images: model(images) + 0.1)


def test_what_is_compiled_shares_its_pieces(monkeypatch):
    made = small_bench(monkeypatch)
    pruner = PRUNERS["evit"](keep=0.5, at=(3,), where="after")
    model = made.model(pruner, "sdpa_padded", compiled=True)
    assert (model.pruner, model.backend) == (pruner, "sdpa_padded")
    assert model._run is made.compiled._run and made.model(pruner, "reference")._run is not model._run


def test_another_selection_needs_another_answer(monkeypatch):
    made = small_bench(monkeypatch)
    pruner = PRUNERS["evit"](keep=0.5, at=(3,), where="after")
    model = made.model(pruner, "sdpa_padded")
    logits, taken = pipelines.noted_pass(model, made.images[0])
    assert torch.equal(logits, model(made.images[0]))
    (selection,) = taken
    first, _ = made.expected(pruner, taken)
    assert made.expected(pruner, list(taken))[0] is first
    moved = Selection(selection.index.flip(1).roll(1, 1), selection.counts, selection.blend)
    assert made.expected(pruner, [moved])[0] is not first


def test_a_failing_call_drops_out_of_the_rounds_alone():
    def breaks():
        raise RuntimeError("first line\nsecond line")

    good, bad = Subject([lambda: None], clocks=("wall_us",)), Subject([breaks], clocks=("wall_us",))
    measure([good, bad], 2, 10)
    assert good.error is None and good.times["wall_us"]
    assert runner.reason(bad.error) == "RuntimeError: first line"
    assert runner.reason(runner.Wrong("off by 1")) == "wrong: off by 1"


def test_disturbed_times_are_read_again_and_the_calmer_ones_kept(monkeypatch):
    readings = {"calm": [[1.0] * 4], "once": [[1.0, 1.0, 9.0, 9.0], [2.0] * 4], "always": [[1.0, 9.0]] * 9,
                "calmer": [[1.0, 9.0], [1.0, 8.0], [1.0, 5.0], [1.0, 7.0]]}  # fmt: skip
    subjects = {name: Subject([lambda: None], clocks=("wall_us",)) for name in readings}
    for name, subject in subjects.items():
        monkeypatch.setattr(subject, "warm_up", lambda: None)
        scripted = iter(readings[name])
        monkeypatch.setattr(subject, "sample", lambda _, s=subject, i=scripted: s.times.update(wall_us=next(i)))
    measure(list(subjects.values()), 1, 10)
    found = {name: subject.times["wall_us"] for name, subject in subjects.items()}
    assert found == {"calm": [1.0] * 4, "once": [2.0] * 4, "always": [1.0, 9.0], "calmer": [1.0, 5.0]}
    assert [name for name, subject in subjects.items() if subject.disturbed()] == ["always", "calmer"]
    assert all(subject.error is None and subject.clocks == ("wall_us",) for subject in subjects.values())


def test_a_case_is_written_with_its_failures(tmp_path):
    def broken():
        raise runner.Skip("not here")

    columns = {"suite": "attention", "model": "m", "pruner": "none", "batch": 2, "tokens": "4", "dtype": "float32"}
    candidates = [
        runner.Candidate(
            {"backend": "a", "mode": "eager"}, lambda: Subject([lambda: None]), ("wall_us", "images_per_s")
        ),
        runner.Candidate({"backend": "b", "mode": "eager"}, broken, ("wall_us",)),
    ]
    runner.Recorder(tmp_path, 2, 10).run(runner.Case(columns, candidates))
    found = {(r["backend"], r["metric"]): r for r in rows(tmp_path, "attention")}
    assert found["a", "wall_us"]["status"] == "ok" and float(found["a", "images_per_s"]["value"]) > 0
    assert found["b", "wall_us"]["status"] == "not here" and found["b", "wall_us"]["value"] == ""


def test_what_only_building_tells_stands_in_the_row_and_the_case_stays_as_it_was(tmp_path):
    found = {}

    def build():
        found["keep"] = 0.25
        return Subject([], clocks=(), found={"top1": 0.5})

    def broken():
        found["keep"] = 0.75
        raise runner.Skip("not here")

    shared = {"suite": "accuracy", "model": "m", "pruner": "ats", "batch": 2, "tokens": "4", "dtype": "float32"}
    columns = [{"backend": name, "mode": "eager", "keep": None} for name in "ab"]
    candidates = [runner.Candidate(columns[0], build, ("top1",), found_columns=lambda: dict(found))]
    (row,) = runner.Recorder(tmp_path, 1, 10).run(runner.Case(shared, candidates))
    assert (row["keep"], row["value"], row["status"]) == (0.25, 0.5, "ok")
    candidates = [runner.Candidate(columns[1], broken, ("top1",), found_columns=lambda: dict(found))]
    (row,) = runner.Recorder(tmp_path, 1, 10).run(runner.Case(shared, candidates))
    assert (row["keep"], row["value"], row["status"]) == (0.75, None, "not here")
    assert columns == [{"backend": name, "mode": "eager", "keep": None} for name in "ab"]


def test_a_noted_pruner_selects_as_the_one_it_asks(monkeypatch):
    made = small_bench(monkeypatch)
    for pruner in (PRUNERS["evit"](keep=0.5, at=(1, 3)), PRUNERS["ats"](samples=8, at=(3,)), None):
        model = made.model(pruner, "sdpa_padded")
        selecting = None if pruner is None else pruner.select
        logits, taken = pipelines.noted_pass(model, made.images[0])
        assert torch.equal(logits, model(made.images[0])) and len(taken) == len(pruner.at if pruner else ())
        assert pruner is None or (model.pruner is pruner and pruner.select == selecting)


def test_attention_outputs_are_held_against_the_reference():
    x = Inputs("U(3,9)", 3, torch.float32, "cpu")
    x.check(x.truth.float())
    with pytest.raises(runner.Wrong, match="relative error"):
        x.check(x.truth.float() * 1.01)
    with pytest.raises(runner.Wrong):
        x.check(torch.full_like(x.truth.float(), float("nan")))


def test_flops_of_the_paper_s_single_cut():
    vit = loading.load_deit("deit_base")
    assert flops.forward_flops(vit) == pytest.approx(35.1e9, rel=0.01)  # 17.6 GMACs, as usually stated

    class Stage:
        block, where, counts = 3, "after", [99, 99]

    assert flops.forward_flops(vit, batch=2) / flops.forward_flops(vit, [Stage]) == pytest.approx(1.507, abs=0.002)
    for stage in ("before", "inside", "after"):
        Stage.where = stage
        assert flops.forward_flops(vit, [Stage]) < flops.forward_flops(vit, batch=2)


def test_the_report_shows_the_paper_beside_what_is_there(tmp_path, capsys, attention_rows):
    out, _ = attention_rows
    bench.main(["report", "--out", str(out), "--markdown", str(tmp_path / "report.md")])
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "report.md").read_text().strip()
    assert "v1, A100" in text and " 3,380 |" in text
    assert text.count("\n## ") == 6
    bench.main(["report", "--out", str(tmp_path / "empty")])
    text = capsys.readouterr().out
    assert " v1, A100 |" in text and " NVIDIA H200 |" in text
    for gpu in ("NVIDIA H200", "NVIDIA H100"):  # beside one another where both have what the report asks for
        rows = data.results(gpu=gpu)
        asked = (rows["suite"] == "attention") | ((rows["suite"] == "model") & (rows["batch"] >= 64))
        assert (f" {gpu} |" in text) == asked.any(), gpu


def test_pruners_and_backends_can_be_chosen():
    asked = runner.Options("cpu", quick=True, pruners=("evit", "ats"), backends=("triton",))
    (case,) = runner.chosen(model(asked), asked)
    there = {(c.columns["pruner"], c.columns["backend"]) for c in case.candidates}
    assert there == {("none", "unpruned"), ("none", "timm"), ("none", "triton"), ("evit", "triton"), ("ats", "triton")}
    assert {c.columns["tokens"] for c in case.candidates if c.columns["pruner"] == "ats"} == {"published", "one cut"}
    with pytest.raises(ValueError, match="--pruner: expected .*evit.*, got evitt"):
        runner.chosen(model(asked), runner.Options("cpu", pruners=("evit", "evitt")))


def test_timm_s_own_model_stands_beside_ours():
    bench = pipelines.Workbench("deit_tiny", 1, torch.float32, "cpu")
    pipeline = pipelines.TimmPipeline(lambda: bench, "eager")
    subject = pipeline.build()
    torch.testing.assert_close(subject.calls[0](), bench.model(None, "sdpa_padded")(bench.images[0]))
    assert pipeline.values(subject) == {"kept_tokens": 197, "capacity_waste": 0.0, "flops_ratio": 1.0}
    with pytest.raises(runner.Skip, match="CUDA"):
        pipelines.TimmPipeline(lambda: bench, "compile+graph").build()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "suite", ["dispatch", "attention", "backward", "pack", "model", "sparsity", "memory", "equivalence"]
)
def test_quick_suites_on_a_gpu(suite, tmp_path):
    bench.main([suite, "--quick", "--repeats", "1", "--out", str(tmp_path)])
    found = rows(tmp_path, suite)
    ours = [r for r in found if r["backend"] == "triton" and r["metric"] != "images_per_s"]
    assert ours and all(r["status"] == "ok" for r in ours if r["mode"] == "eager")
    assert not [r for r in found if r["status"].startswith("wrong")]


def test_the_readme_shows_the_recorded_rows():
    from ragged.bench.report import BEGIN, END, summary

    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == summary()
