"""The data folder: pictures have credits, tables parse, results overwrite themselves, bad input is refused in words."""

import hashlib

import numpy as np
import pytest
import torch

from ragged import data

# ---- photographs ----


def test_photographs_and_their_attribution():
    images, records = data.photographs(64)
    assert images.shape == (len(records), 3, 64, 64) and images.dtype == torch.float32
    assert len(records) >= 6 and 0 <= images.min() and images.max() <= 1
    assert (images.flatten(1).std(1) > 0.05).all()
    for record in records:
        assert all(record[column] for column in ("name", "title", "author", "licence", "licence_url", "source"))
        assert record["licence"] in ("CC0 1.0", "CC BY 2.0", "public domain")


def test_every_photograph_is_listed_and_small():
    files = sorted((data.data_dir() / "images").glob("*.jpg"))
    assert [file.stem for file in files] == sorted(record["name"] for record in data.photographs(8)[1])
    assert max(file.stat().st_size for file in files) <= 200_000


def test_normalise():
    grey = torch.tensor(data.IMAGENET_MEAN).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert data.normalise(grey).abs().max() < 1e-6
    assert torch.allclose(
        data.normalise(torch.ones(3, 2, 2), (0, 0, 0), (2, 4, 8))[:, 0, 0], 1 / torch.tensor([2, 4, 8.0])
    )
    for wrong in (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, 3), np.zeros((3, 4, 4)), [0.5]):
        with pytest.raises(ValueError, match="images: expected floats"):
            data.normalise(wrong)
    with pytest.raises(ValueError, match="mean, std: expected three"):
        data.normalise(torch.zeros(3, 4, 4), (1, 2))


def test_the_folder_is_found_in_an_installed_package_and_missed_clearly(tmp_path, monkeypatch):
    monkeypatch.setattr(data.files, "__file__", str(tmp_path / "site" / "ragged" / "data" / "files.py"))
    with pytest.raises(FileNotFoundError, match="_data"):
        data.data_dir()
    (tmp_path / "site" / "data").mkdir(parents=True)  # somebody else's folder beside the package
    carried = tmp_path / "site" / "ragged" / "_data"
    (carried / "images").mkdir(parents=True)
    (carried / "images" / "attribution.csv").touch()
    assert data.data_dir() == carried.resolve()


# ---- lengths ----


def test_lengths():
    assert data.lengths("197", 3) == data.lengths(197, 3) == [197] * 3
    drawn = data.lengths("U(20,197)", 5000, seed=1)
    assert min(drawn) == 20 and max(drawn) == 197 and all(type(n) is int for n in drawn)
    assert drawn == data.lengths("U(20, 197)", 5000, seed=1) != data.lengths("U(20,197)", 5000, seed=2)


@pytest.mark.parametrize("spec", ["", "U(20)", "N(3,4)", "U(30,20)", "0", "-5", "19.7"])
def test_bad_lengths(spec):
    with pytest.raises(ValueError, match="lengths: expected"):
        data.lengths(spec, 4)


# ---- tables ----


def a_row(**changes):
    row = dict.fromkeys(data.RESULT_COLUMNS, "") | {"suite": "attention", "gpu": "NVIDIA H200", "metric": "gpu_us"}
    return row | {"batch": 32, "tokens": "197", "value": 4.1, "status": "ok"} | changes


@pytest.fixture
def empty_results(tmp_path, monkeypatch):
    monkeypatch.setattr(data.files, "data_dir", lambda: tmp_path)
    return tmp_path / "results"


def test_nothing_recorded_is_an_empty_frame(empty_results):
    frame = data.results("attention", "nvidia_h200")
    assert tuple(frame.columns) == data.RESULT_COLUMNS and frame.empty and frame.value.dtype == float


def test_results_round_trip_and_overwrite_their_own_rows_only(empty_results):
    first = [a_row(batch=16), a_row(batch=4, keep=0.5, q20=None), a_row(suite="pack", value=float("nan"))]
    paths = data.write_results(first, empty_results)
    assert paths == [empty_results / "nvidia_h200" / f"{suite}.csv" for suite in ("attention", "pack")]
    data.write_results([a_row(batch=16.0, value=9.25, version="2")], empty_results)
    frame = data.results("attention", "NVIDIA H200")
    assert (
        frame.batch.tolist() == [4, 16] and frame.value.tolist() == [4.1, 9.25] and frame.version.tolist() == ["", "2"]
    )
    assert frame.tokens.tolist() == ["197", "197"] and np.isnan(frame.q20).all() and frame.keep[0] == 0.5
    assert len(data.results()) == 3 and data.results(gpu="nvidia_t4").empty


def test_the_notes_are_a_table_of_predictions():
    notes = data.notes()
    assert len(notes) > 10 and notes["part"].nunique() >= 4
    assert (notes.map(str.strip) == notes).all(axis=None) and (notes != "").all(axis=None)
    assert set(notes["prediction"]) == {"held", "failed", "none"}
    assert ((notes["predicted"] == "–") == (notes["prediction"] == "none")).all()


def test_results_are_read_from_any_folder(empty_results, tmp_path):
    data.write_results([a_row()], tmp_path / "own")
    assert data.results(folder=tmp_path / "elsewhere").empty and data.results().empty
    assert len(data.results(a_row()["suite"], folder=tmp_path / "own")) == 1


def test_results_files_do_not_depend_on_the_order_of_writing(empty_results, tmp_path):
    rows = [a_row(batch=b, tokens=t, backend=name) for b in (1, 4, 16) for t in ("39", "197") for name in "ab"]
    (one,) = data.write_results(rows, tmp_path / "one")
    for row in reversed(rows):
        (two,) = data.write_results([row], tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert [file.name for file in two.parent.iterdir()] == ["attention.csv"]  # no drafts left behind


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"suite": "attention"}], "missing columns"),
        ([a_row(speed=3)], "unknown columns"),
        ([a_row(value="fast")], "'value' holds numbers"),
        ([a_row(gpu="")], "'gpu' needs a name"),
        ([a_row(suite="../x")], "'suite' needs a name"),
        ([a_row(), a_row(value=2)], "same key twice"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.write_results(rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_recorded_results_have_the_agreed_columns():
    assert tuple(data.results().columns) == data.RESULT_COLUMNS


def test_paper_tables_parse_alike():
    names = data.paper_tables()
    assert {"v1_attention_call", "v2_attention_call", "v1_peak_throughput", "v2_stages"} <= set(names)
    columns = set(data.paper(names[0]).columns)
    for name in names:
        frame = data.paper(name)
        assert set(frame.columns) == columns and frame.value.notna().all() and len(frame)
        assert (frame.version + "_" + frame.table).unique().tolist() == [name]
        assert frame.backend.isin(
            ["", "dense", "paper_padded", "flash_attn", "paper_triton", "nested", "library_varlen"]
        ).all()
        assert frame.bound.isin(["", "min", "max"]).all() and (frame.unit != "").all()


@pytest.mark.parametrize(
    "table, where, value",
    [
        ("v1_attention_call", "backend == 'flash_attn' and batch == 64 and tokens == 197", 0.113),
        ("v1_attention_call", "backend == 'paper_padded' and batch == 64 and tokens == 39", 7.020),
        ("v1_speedup_over_unpruned", "pruner == 'evit' and backend == 'paper_triton' and pruned == 0.9", 1.94),
        ("v1_peak_throughput", "model == 'deit_small' and backend == 'paper_triton'", 12999),
        ("v1_accuracy", "metric == 'top1' and pruned == 0.5", 78.7),
        ("v1_equivalence", "pruner == 'dynamicvit' and metric == 'max_abs_logit_diff'", 0.0063),
        ("v2_attention_call", "backend == 'paper_triton' and batch == 64 and tokens == 40", 0.028),
        ("v2_end_to_end_throughput", "backend == 'flash_attn' and batch == 1", 418),
        ("v2_stages", "backend == 'paper_triton' and metric == 'late_blocks_event_ms'", 2.07),
        ("v2_high_resolution_speedup", "tokens == 577", 2.51),
    ],
)
def test_paper_figures(table, where, value):
    (found,) = data.paper(table).query(where).value
    assert found == value


def test_unknown_paper_table():
    with pytest.raises(ValueError, match="v1_attention_call"):
        data.paper("nope")


# ---- checkpoints ----


def test_a_checkpoint_that_is_not_bundled_names_the_alternatives():
    with pytest.raises(FileNotFoundError, match='not bundled.*weights="random".*path'):
        data.checkpoint_path("no_such_network")


def test_bundled_checkpoints_are_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(data.files, "data_dir", lambda: tmp_path)
    file = tmp_path / "checkpoints" / "tiny.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match="no checksum"):
        data.checkpoint_path("tiny")
    digest = hashlib.sha256(b"weights").hexdigest()
    file.with_name(file.name + ".sha256").write_text(f"{digest}  {file.name}\n")
    assert data.checkpoint_path("tiny") == file
    file.write_bytes(b"other")
    with pytest.raises(ValueError, match="damaged"):
        data.checkpoint_path("tiny")
    with pytest.raises(ValueError, match="64 hex digits"):
        data.verify_sha256(file, "abc")


@pytest.mark.parametrize("name, folder", [
    ("NVIDIA H200", "nvidia_h200"), ("NVIDIA H100 80GB HBM3", "nvidia_h100"),
    ("NVIDIA H100 80GB HBM3 x2", "nvidia_h100_x2"),
    ("NVIDIA A100-SXM4-40GB", "nvidia_a100_sxm4_40gb"), ("NVIDIA H100 PCIe", "nvidia_h100_pcie"),
])  # fmt: skip
def test_a_gpu_has_one_folder_however_it_is_named(name, folder):
    assert data.slug(name) == folder == data.slug(folder)


def test_the_recorded_rows_are_found_by_the_names_in_them():
    for folder in (data.data_dir() / "results").iterdir():
        for path in folder.glob("*.csv") if folder.name != "speculation" else ():
            names = set(data.results(path.stem, folder.name)["gpu"])
            assert names and {data.slug(name) for name in names} == {folder.name}
