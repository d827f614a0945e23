"""The files for the next maintainer say what is so: versions agree, commands and paths exist, CI runs .ci/run."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from test_package import PROJECT, ROOT

import ragged
from ragged.course import notebooks as notebook_tools

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def load(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_has_what_the_format_requires():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] in ("software", "dataset")
    for key in ("message", "title"):
        assert isinstance(CITATION[key], str) and CITATION[key].strip()
    entities = [CITATION["authors"], *(reference["authors"] for reference in CITATION["references"])]
    for authors in entities:
        assert authors and all("name" in a or {"family-names", "given-names"} <= set(a) for a in authors)
    for reference in CITATION["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    known = {
        "abstract", "authors", "cff-version", "date-released", "doi", "identifiers", "keywords", "license", "message",
        "preferred-citation", "references", "repository-code", "title", "type", "url", "version",
    }  # fmt: skip
    assert set(CITATION) <= known


def test_the_citation_agrees_with_the_package():
    assert CITATION["version"] == ragged.__version__ == PROJECT["version"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["repository-code"] == f"https://github.com/{notebook_tools.repository(ROOT)}"
    assert CITATION["references"][0]["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == ragged.__version__ and len(set(versions)) == len(versions)


def test_the_workflow_runs_the_same_script():
    workflow = load(".github/workflows/ci.yml")
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100, "it can be started"
    oldest = re.search(r"[\d.]+", PROJECT["requires-python"]).group()
    assert oldest in workflow["jobs"]["test"]["strategy"]["matrix"]["python"]


def test_pre_commit_lints_with_the_project_s_ruff():
    hooks = {hook["id"]: hook for repo in load(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert hooks["ruff"]["entry"].startswith("ruff check")
    (wanted,) = [line for line in PROJECT["optional-dependencies"]["test"] if line.startswith("ruff")]
    assert hooks["ruff"]["additional_dependencies"] == [wanted]
    for hook in hooks.values():
        assert all((ROOT / word).exists() for word in hook["entry"].split() if word.startswith("tests/"))


def test_commands_in_the_guide_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)", GUIDE, re.M)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), f"make {''.join(target)}"
    for module in set(re.findall(r"python -m (ragged\.\w+)", GUIDE)):
        assert importlib.util.find_spec(module), module
    suites = re.search(r"python -m ragged\.bench (dispatch .*)", GUIDE).group(1).split()
    from ragged.bench.__main__ import parser

    parser().parse_args(suites)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`?((?:ragged|tests|notebooks|data)/[\w/.]+\.\w+)", GUIDE))))
def test_paths_in_the_guide_exist(path):
    assert (ROOT / path).exists()


def test_the_readme_s_map_names_every_room():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## The house\n(.*?)^## ", text, re.M | re.S).group(1)
    rooms = [p for p in (ROOT / "ragged").iterdir() if not p.name.startswith("_")]
    names = {f"{p.name}/" if p.is_dir() else p.name for p in rooms if p.is_dir() or p.suffix == ".py"}
    assert set(re.findall(r"`(\w+(?:/|\.py))`", section)) - {"ragged/"} == names


@pytest.mark.parametrize("name", ["PRUNERS", "_ALL", "Backend", "LOOKS", "CORE", "MAY_USE", "View", "BACKENDS"])
def test_names_in_the_guide_exist(name):
    sources = [*Path(ROOT / "ragged").rglob("*.py"), ROOT / "tests" / "test_package.py"]
    assert f"`{name}`" in GUIDE
    assert any(re.search(rf"^(?:class )?{name}\b", path.read_text(encoding="utf-8"), re.M) for path in sources)


def test_the_code_in_the_readme_runs():
    import torch

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- ray -->\n```.*?```", "", text, flags=re.DOTALL)  # tests/test_predict.py runs that one
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    names, before = {}, torch.is_grad_enabled()
    try:
        for block in blocks:
            exec(block, names)
    finally:
        torch.set_grad_enabled(before)
