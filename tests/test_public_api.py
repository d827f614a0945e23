"""What a user can call says what it takes: type hints everywhere, and docstrings that name every argument."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import ragged

# The library: every file that is there, but for the programs built on it (benchmark suites, figures, the makers of site
# and checkpoints) and for the kernels, which need Triton.
PACKAGE = Path(ragged.__file__).parent
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py"))
PROGRAMS = ("bench", "plots", "course", "train", "kernels")
OF_PROGRAMS = ("bench.flops", "bench.timing", "course.lesson")
LIBRARY = [n for n in MODULES if n in OF_PROGRAMS or n.split(".")[0] not in PROGRAMS and not n.endswith("__init__")]
# What lessons and users call by name; the rest is documented where its file begins.
DOCUMENTED = (
    "attention packing pruners graph.batch graph.lists loading model data.files data.images data.checkpoints "
    "data.tables data.scenes bench.flops bench.timing course.lesson predict.reading predict.classify"
).split()
TRIVIAL = {"self", "cls"}


def public(module):
    """(name, function) of everything public that the module itself defines: functions, methods, constructors."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            for key, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                written_here = inspect.isfunction(function) and function.__code__.co_filename == module.__file__
                if written_here and (key in ("__init__", "__call__") or not key.startswith("_")):
                    yield f"{name}.{key}", inspect.unwrap(function)
        elif inspect.isfunction(inspect.unwrap(thing)):
            yield name, inspect.unwrap(thing)


def everything(modules):
    found = []
    for name in modules:
        module = importlib.import_module(f"ragged.{name}")
        found += [pytest.param(module, key, f, id=f"{name}.{key}") for key, f in public(module)]
    return found


def unhinted(function):
    signature = inspect.signature(function)
    names = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in TRIVIAL]
    returns = signature.return_annotation is signature.empty and function.__name__ != "__init__"
    return names + ["the result"] * returns


def undocumented(module, key, function):
    """Parameters that the docstring does not mention. A constructor's and a call's stand in the class's docstring; an
    overriding method may leave it to the one it overrides."""
    owner = getattr(module, key.partition(".")[0])
    doc = inspect.getdoc(getattr(owner, key.partition(".")[2], owner)) if "." in key else inspect.getdoc(function)
    if function.__name__ in ("__init__", "__call__", "forward"):
        doc = f"{inspect.getdoc(owner)}\n{doc if function.__name__ == 'forward' else ''}"
        bases = [inspect.getdoc(base) or "" for base in owner.__mro__[1:] if base.__module__.startswith("ragged")]
        doc = "\n".join([doc, *bases])
    if not doc:
        return ["everything"]
    return [p for p in inspect.signature(function).parameters if p not in TRIVIAL and not re.search(rf"\b{p}\b", doc)]


@pytest.mark.parametrize("module, key, function", everything(LIBRARY))
def test_type_hints(module, key, function):
    assert not unhinted(function), f"{module.__name__}.{key} has no type for {', '.join(unhinted(function))}"


@pytest.mark.parametrize("module, key, function", everything(DOCUMENTED))
def test_docstrings_name_every_argument(module, key, function):
    missing = undocumented(module, key, function)
    assert not missing, f"the docstring of {module.__name__}.{key} does not say what {', '.join(missing)} is"


@pytest.mark.parametrize("module, key, function", everything(sorted(set(LIBRARY) - set(DOCUMENTED))))
def test_the_rest_has_docstrings(module, key, function):
    owner = getattr(module, key.partition(".")[0])
    assert inspect.getdoc(function) or function.__name__.startswith("__") and inspect.getdoc(owner)


@pytest.mark.parametrize("name", ragged.__all__)
def test_public_names_have_more_than_a_line(name):
    thing = getattr(ragged, name)
    if not callable(thing):
        pytest.skip("a registry")
    assert len(inspect.getdoc(thing).splitlines()) > 1


@pytest.mark.parametrize("name", ["varlen_attention", "pack", "load_deit"])
def test_entry_points_give_shapes_and_errors(name):
    doc = inspect.getdoc(getattr(ragged, name))
    assert "Raises" in doc and ("(" in doc or "pixels" in doc) and re.search("float|bool|int", doc)


@pytest.mark.parametrize("name", ragged.PRUNERS)
def test_pruners_name_their_source(name):
    assert re.search(r"Source: (arXiv \d{4}\.\d{5}|none, a control)", ragged.PRUNERS[name].__doc__)


def test_every_module_says_what_it_is():
    assert {*DOCUMENTED} <= {*LIBRARY} and {"bench.suites.attention", "course.site.page", "__init__"} <= {*MODULES}
    for name in MODULES:
        path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name} begins without a docstring"


def test_the_check_can_fail():
    def lacking(x, scale: float = 1.0):
        """Scales."""

    module = type("module", (), {"lacking": lacking, "__name__": "made_up"})
    assert unhinted(lacking) == ["x", "the result"] and undocumented(module, "lacking", lacking) == ["x", "scale"]
