"""Feedback that teaches: what an exercise asks is tried case by case, and the first case that fails is named.

The cases, an independent answer and the hints of every exercise lie in `answers/`, a file for each lesson. A check cell
is one line, `course.check("02/1", merge)`.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch

from . import marks
from .touched import NoTriton, plain


@dataclass(frozen=True)
class Exercise:
    """What is asked, in a form that can be tried.

    spec: another way to the answer, given the same arguments.  cases: what is special about a case, in words -> the
    arguments.  hints: from a question to the last step before the answer; never the answer.  needs: property in words
    -> function (answer, *arguments) -> whether it holds, for what no single right answer decides.  atol, rtol: as in
    `torch.allclose`.  show: function (answer, *arguments) -> what to print about a failing case.  run: function (yours,
    *arguments) -> answer, where more is needed than a call.  judge: function (answer, *arguments) -> what is wrong with
    it, in words, or None.  draw: function (answer, *arguments) -> a figure of the failing case, or of the last one,
    or None.
    """

    spec: Callable | None
    cases: Mapping[str, tuple]
    hints: tuple[str, ...] = ()
    needs: Mapping[str, Callable] = field(default_factory=dict)
    atol: float = 1e-5
    rtol: float = 1e-4
    show: Callable | None = None
    run: Callable | None = None
    judge: Callable | None = None
    draw: Callable | None = None


def find(name: str) -> Exercise:
    """The exercise "lesson/number", such as "02/1". ValueError for a name that there is not."""
    lesson, _, number = str(name).partition("/")
    try:
        known = import_module(f"{__package__}.answers.lesson_{lesson}").EXERCISES
    except ModuleNotFoundError:
        known = {}
    if number not in known:
        raise ValueError(f"exercise: expected a name such as '02/1', lesson and number, got {name!r}")
    return known[number]


def check_exercise(name: str, yours: Any, exercise: Exercise | None = None) -> bool:
    """Try `yours`, a function, on every case of an exercise; say what holds, or what the first failing case shows.

    name: "lesson/number"; what comes out is kept for `course.progress()`.  exercise: instead of the one of that name.
    Returns whether all is right. Nothing is raised: an answer that stops with an error is told where.
    """
    exercise = find(name) if exercise is None else exercise
    if not callable(yours):
        print(f"Expected a function, got {type(yours).__name__}.")
        marks.note(name, "exercise", False)
        return False
    passed, answer = 0, None
    _solved.discard(name)
    for words, arguments in exercise.cases.items():
        failed, answer = _try(exercise, yours, arguments)
        if failed is not None:
            if failed.startswith(_NOT_TRIED):
                print(f"{failed} {_hint_line(name) if exercise.hints else ''}".rstrip())
                return False
            marks.note(name, "exercise", False)
            print(f"Not yet: {words}. {failed}" if words else f"Not yet. {failed}")
            if passed:
                print(f"{passed} of {len(exercise.cases)} cases are right before this one.")
            if exercise.hints:
                print(_hint_line(name))
            _drawn(exercise, answer, arguments)
            return False
        passed += 1
    marks.note(name, "exercise", True)
    _solved.add(name)
    if passed == 1:
        print("Correct.")
    else:
        print(f"Correct, in all {passed} cases: {'; '.join(exercise.cases)}.")
    _drawn(exercise, answer, [*exercise.cases.values()][-1])
    return True


_NOT_TRIED = ("Not begun", "Not tried")
_solved: set[str] = set()  # in this session


def solved(*names: str) -> bool:
    """Whether the last check of each of these exercises, "lesson/number", was passed in this session."""
    for name in names:
        find(name)
    return _solved.issuperset(names)


def _drawn(exercise: Exercise, answer: Any, arguments: tuple) -> None:
    """Show the figure of a case, where the exercise has one and the answer got far enough to be drawn."""
    if exercise.draw is not None and answer is not None:
        figure = exercise.draw(answer, *copy.deepcopy(arguments))
        if figure is not None:
            figure.show()


def _hint_line(name: str) -> str:
    return f'course.hint("{name}") has hints, one at a time.'


def _try(exercise: Exercise, yours: Callable, arguments: tuple) -> tuple[str | None, Any]:
    """What is wrong with an answer on one case, in sentences, or None; and the answer, or None."""
    given = copy.deepcopy(arguments)
    try:
        answer = yours(*given) if exercise.run is None else exercise.run(yours, *given)
    except NoTriton as error:
        return f"Not tried: {error}.", None
    except Exception as error:  # a student's function may raise anything; it is told in one line
        if isinstance(error, NotImplementedError) and _of_a_stub(error):
            return _not_begun(error, yours), None
        return f"It stopped with {type(error).__name__}: {error}{_where(error, yours)}", None
    return _verdict(exercise, yours, answer, arguments, given), answer


def _of_a_stub(error: NotImplementedError) -> bool:
    """Whether a stub raised it. PyTorch raises it too, for dtypes that it does not handle, and then says why."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return not str(error) or (last.line or "").startswith("raise NotImplementedError")


def _not_begun(error: NotImplementedError, yours: Callable) -> str:
    raised = traceback.extract_tb(error.__traceback__)[-1].name
    other = raised != getattr(plain(yours), "__name__", raised)
    return f"Not begun: {f'{raised}, which it calls,' if other else 'the function'} still raises NotImplementedError."


def _verdict(exercise: Exercise, yours: Callable, answer: Any, arguments: tuple, given: tuple) -> str | None:
    names = [*inspect.signature(yours).parameters] if _has_signature(yours) else []
    for i, (before, after) in enumerate(zip(arguments, given)):
        if not _equal(before, after):
            return f"It changed its argument {names[i] if i < len(names) else i + 1}, which belongs to the caller."
    if answer is None:
        return "It returned None. Does every path end in a return?"
    for words, holds in exercise.needs.items():
        try:
            good = bool(holds(answer, *copy.deepcopy(arguments)))
        except Exception as error:
            return f"Expected: {words}. Looking for it failed with {type(error).__name__}: {error}"
        if not good:
            return f"Expected: {words}.{_shown(exercise, answer, arguments)}"
    if exercise.judge is not None and (said := exercise.judge(answer, *copy.deepcopy(arguments))):
        return said
    if exercise.spec is None:
        return None
    found = unlike(exercise.spec(*copy.deepcopy(arguments)), answer, exercise.atol, exercise.rtol)
    return None if found is None else f"{found}{_shown(exercise, answer, arguments)}"


def _shown(exercise: Exercise, answer: Any, arguments: tuple) -> str:
    if exercise.show is not None:
        try:
            return f"\n{exercise.show(answer, *copy.deepcopy(arguments))}"
        except Exception:  # an answer of a wrong kind cannot be shown; what is wrong with it stands there already
            return ""
    said = [text for text in map(_said, arguments) if text]
    return f"\nGiven: {', '.join(said)}" if len(said) == len(arguments) else ""


def _said(value: Any) -> str:
    """A small value in words; "" for one too large to be read."""
    text = repr(value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value)
    return text if len(text) <= 120 else ""


def _has_signature(function: Callable) -> bool:
    try:
        inspect.signature(function)
    except (TypeError, ValueError):
        return False
    return True


def _where(error: BaseException, yours: Callable) -> str:
    """The line of the answer's own code that raised."""
    file = getattr(getattr(plain(yours), "__code__", None), "co_filename", None)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", in its line {own[-1].line!r}" if own and own[-1].line else ""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b if isinstance(a, int | float | str | bool | dict | set | type(None)) else True


# ---- two values beside each other ----


def unlike(want: Any, got: Any, atol: float = 1e-5, rtol: float = 1e-4, name: str = "") -> str | None:
    """What makes `got` another answer than `want`, in one or two sentences, or None: tensors, arrays, numbers, bools,
    texts, and lists, tuples and dicts of them.  atol, rtol: as in `torch.allclose`.  name: what is compared."""
    called = f"{name}: " if name else ""
    if isinstance(want, dict):
        if not isinstance(got, dict) or set(got) != set(want):
            return f"{called}expected a dict with the keys {sorted(map(str, want))}, got {_kind(got)}."
        return next((said for key in want if (said := unlike(want[key], got[key], atol, rtol, f"[{key!r}]"))), None)
    if isinstance(want, str) or want is None:
        return None if want == got else f"{called}expected {want!r}, got {got!r}."
    if isinstance(want, list | tuple) and not _numbers(want):
        if not isinstance(got, list | tuple):
            return f"{called}expected {len(want)} values, got {_kind(got)}."
        if len(want) != len(got):
            return f"{called}expected {len(want)} values, got {len(got)}."
        parts = (unlike(a, b, atol, rtol, f"{name}[{i}]") for i, (a, b) in enumerate(zip(want, got)))
        return next((part for part in parts if part), None)
    try:
        a, b = (torch.as_tensor(x).detach().cpu() for x in (want, got))
    except (TypeError, ValueError, RuntimeError):
        return f"{called}expected {_kind(want)}, got {_kind(got)}."
    if a.shape != b.shape:
        return f"{called}expected the shape {tuple(a.shape)}, got {tuple(b.shape)}."
    if a.is_floating_point() != b.is_floating_point() or (a.dtype == torch.bool) != (b.dtype == torch.bool):
        return f"{called}expected {_plain(a)}, got {_plain(b)}."
    return _values(a.double(), b.double(), atol, rtol, called)


def _values(want: torch.Tensor, got: torch.Tensor, atol: float, rtol: float, called: str) -> str | None:
    bad = ~torch.isclose(got, want, rtol, atol)  # NaN fails, equal infinities pass
    if not bad.any():
        return None
    first = tuple(bad.nonzero()[0].tolist())
    expected = f"expected {want[first]:.6g}, got {got[first]:.6g}"
    if want.dim() == 0:
        return f"{called}{expected}."
    if got.isnan().any() and not want.isnan().any():
        called += f"{int(got.isnan().sum())} of {got.numel()} values are NaN. "
    rows = bad.reshape(bad.shape[0], -1).any(1).nonzero().flatten().tolist()
    which = "row" if want.dim() > 1 else "place"
    places = ", ".join(map(str, rows[:6])) + (", …" if len(rows) > 6 else "")
    return (f"{called}{len(rows)} of {len(bad)} {which}s differ ({which} {places}). "
            f"At [{', '.join(map(str, first))}]: {expected}.")  # fmt: skip


def _numbers(values: Any) -> bool:
    """Whether nested lists hold numbers only, in rows of one length: then they are compared as a tensor."""
    try:
        return torch.as_tensor(values).dtype is not None
    except (TypeError, ValueError, RuntimeError):
        return False


def _plain(x: torch.Tensor) -> str:
    kind = "bools" if x.dtype == torch.bool else "floats" if x.is_floating_point() else "whole numbers"
    return f"{kind} ({str(x.dtype).removeprefix('torch.')})"


def _kind(x: Any) -> str:
    return f"a tensor {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"{type(x).__name__} {str(x)[:60]}"


# ---- hints ----

_given: dict[str, int] = {}


def hint(name: str) -> None:
    """Print the next hint of the exercise "lesson/number"; after the last one, the first again."""
    hints = find(name).hints
    if not hints:
        print("This exercise has no hints.")
        return
    n = _given[name] = _given.get(name, 0) % len(hints) + 1
    print(f"Hint {n} of {len(hints)}: {hints[n - 1]}")
