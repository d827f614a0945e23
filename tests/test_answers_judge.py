"""Typical wrong answers to the exercises of lessons 07 to 11, and what the feedback says about them."""

import math
import re

import pytest
import torch

from ragged import course
from ragged.course import exercises

LESSONS = {"07": 4, "08": 4, "09": 4, "10": 4, "11": 3}


@pytest.fixture(autouse=True)
def unkept(monkeypatch):
    monkeypatch.setenv("RAGGED_PROGRESS", "off")


# ---- 07 ----


def sign_test(lost, gained, sides=2, cap=True, rest=0):
    n, fewer = lost + gained, min(lost, gained)
    tail = sides * sum(math.comb(n, k) for k in range(fewer + 1 - rest)) / 2**n
    return min(1.0, tail) if cap else tail


def normal_test(lost, gained):
    return math.erfc(abs(lost - gained) / math.sqrt(2 * (lost + gained)))


def on_front(speed, share, beats=lambda a, b: a[0] >= b[0] and a[1] >= b[1] and a != b):
    every = [*zip(speed, share)]
    return [not any(beats(a, b) for a in every) for b in every]


def paired(first, second, sign=1, root=True, independent=False):
    first, second = (torch.tensor(x).double() for x in (first, second))
    change = sign * (second - first)
    n = len(change)
    error = change.std(unbiased=False) / (n**0.5 if root else 1)
    if independent:
        p, q = first.mean(), second.mean()
        error = ((p * (1 - p) + q * (1 - q)) / n).sqrt()
    return [float(change.mean() + s * 1.96 * error) for s in (0, -1, 1)]


def factors(counts, batch, full=False, each=False, ordered=sorted):
    def factor(order):
        parts = [order[i : i + batch] for i in range(0, len(order), batch)]
        rows = [(batch if full else len(part)) * max(part) for part in parts]
        if each:
            return sum(r / sum(part) for r, part in zip(rows, parts)) / len(parts)
        return sum(rows) / sum(order)

    return [factor(counts), factor(ordered(counts))]


def in_place(counts, batch):
    before = factors(counts, batch)[0]
    counts.sort()
    return [before, factors(counts, batch)[0]]


# ---- 08 ----


def count_standing(claims, share, turn=True, gain=True, strict=False):
    standing = 0
    for claimed, measured in claims:
        if turn and claimed < 1:
            claimed, measured = 1 / claimed, 1 / measured
        got, asked = (measured - 1, share * (claimed - 1)) if gain else (measured, share * claimed)
        standing += got > asked if strict else got >= asked
    return standing


def shares(wall, gpu, floor=min, fair=lambda w, g: 1 - g / w):
    return [((floor(wall) if floor else w) / w, fair(w, g)) for w, g in zip(wall, gpu)]


def settle(ratios, limit, alike, skip=True, turn=True):
    found = [r for r in ratios.values() if r == r or not skip]
    upheld = [(r < limit) == (alike if turn else False) for r in found]
    if not found:
        return "not tested here"
    return "upheld" if all(upheld) else "upheld at some batches only" if any(upheld) else "not upheld"


# ---- 09 ----


def seeded(dtype=torch.float64, rows=lambda shape: shape):
    def score(tokens, patches):
        generator = torch.Generator().manual_seed(7)
        return torch.rand(rows(tokens.shape[:2]), generator=generator, dtype=dtype).expand(tokens.shape[:2])

    return score


def spoils(tokens, patches):
    torch.manual_seed(3)
    return torch.rand(tokens.shape[:2], dtype=torch.float64)


def speedup(slow, fast, order=(0.5, 0.2, 0.8), how=None):
    slow, fast, at = (torch.tensor(x, dtype=torch.float64) for x in (slow, fast, order))
    return how(slow, fast, at) if how else (slow / fast).quantile(at)


def standard(tokens, patches, over=None, whole=False, safe=True, cut=True):
    norms = tokens.norm(dim=-1)
    real = (patches if over is None else over(patches)).float()
    sums = (lambda x: x.sum()) if whole else (lambda x: x.sum(1, keepdim=True))
    count = sums(real).clamp_min(1)
    apart = norms - sums(norms * real) / count
    spread = (sums(apart.square() * real) / count).sqrt()
    score = apart / (torch.where(spread > 1e-6, spread, math.inf) if safe else spread)
    return torch.where(patches, score, 0) if cut else score


def sound(stages, n, fused=True, first=True, memory=True):
    earlier = set(range(n))
    for ids in stages:
        kept = [i for i in ids if i >= 0 or not fused]
        at = ids[:1] == [0] if first else 0 in ids
        if not at or len(set(kept)) < len(kept) or not {i for i in kept if i >= 0} <= earlier:
            return False
        earlier = set(kept) if memory else earlier
    return True


# ---- 10 ----


def taught(keep, cut, swapped=False, query=True):
    everybody = torch.ones_like(keep)
    others = keep if (cut == "in front") != swapped else everybody
    return torch.stack([keep if query else others, others, others])


def share(step, steps, keep, curve=lambda x: (1 + math.cos(math.pi * x)) / 2, begin=1 / 30, end=1 / 3):
    along = min(1.0, max(0.0, (step / steps - begin) / (end - begin)))
    return keep + (1 - keep) * curve(along)


def mask(scores, keep, zero=lambda hard, soft: hard + (soft - soft.detach()), best=True):
    soft = scores.sigmoid()
    return zero(torch.zeros_like(soft).index_fill(0, scores.topk(keep, largest=best).indices, 1.0), soft)


# ---- 11 ----


def sees(parent, itself=True, up=True, turned=False):
    found = torch.eye(len(parent), dtype=torch.bool) & itself
    for node, above in enumerate(parent):
        if above >= 0:
            found[node, above] = True
            found[node] |= found[above] & up
    return found.T if turned else found


# ---- all of them ----

WRONG = [
    ("07/1", lambda a, b: sign_test(a, b, sides=1), "two lost, none gained.*expected 0.5, got 0.25"),
    ("07/1", lambda a, b: sign_test(a, b, cap=False), "nothing changed.*expected 1, got 2"),
    ("07/1", lambda a, b: sign_test(a, b, rest=1), "nothing changed.*expected 1, got 0"),
    ("07/1", normal_test, "nothing changed.*ZeroDivisionError"),
    ("07/2", lambda s, a: on_front(s, a, lambda x, y: x[0] > y[0] and x[1] > y[1]), "equally fast, one more accurate"),
    ("07/2", lambda s, a: [x == max(a) for x in a], "all stay"),
    ("07/2", lambda s, a: on_front([*s], a, lambda x, y: x[0] >= y[0] and x[1] > y[1]), "equally accurate, one faster"),
    ("07/3", lambda a, b: paired(a, b, sign=-1), "ten of a hundred lost"),
    ("07/3", lambda a, b: paired(a, b, root=False), "ten of a hundred lost.*places are difference, low, high"),
    ("07/3", lambda a, b: paired(a, b, independent=True), "nothing changed"),
    ("07/4", lambda c, b: factors(c, b, full=True), "a last batch of one"),
    ("07/4", lambda c, b: factors(c, b, each=True), "long and short|a last batch of one"),
    ("07/4", lambda c, b: factors(c, b, ordered=list), "long and short ones in turn"),
    ("07/4", in_place, "changed its argument counts"),
    ("08/1", lambda c, s: count_standing(c, s, turn=False), "claims below 1"),
    ("08/1", lambda c, s: count_standing(c, s, gain=False), "two gains, half is asked.*expected 1, got 2"),
    ("08/1", lambda c, s: count_standing(c, s, strict=True), "exactly half arrived"),
    ("08/2", lambda w, g: shares(w, g, floor=None), "three lengths.*Columns: the paper's share"),
    ("08/2", lambda w, g: shares(w, g, fair=lambda w, g: g / w), "three lengths"),
    ("08/2", lambda w, g: [*zip(*shares(w, g))], "three lengths.*expected the shape"),
    ("08/3", lambda s, f: sum(x / y for x, y in zip(s, f)) / len(s), "twice as fast here.*expected 1, got 1.25"),
    ("08/3", lambda s, f: sum(s) / sum(f), "one case takes a thousand times longer"),
    ("08/3", lambda s, f: float(torch.tensor([x / y for x, y in zip(s, f)]).median()), "twice as fast here, half"),
    ("08/4", lambda r, limit, a: settle(r, limit, a, skip=False), "a batch that nobody recorded|nothing recorded"),
    ("08/4", lambda r, limit, a: settle(r, limit, a, turn=False), "the two sides should be alike"),
    ("08/4", lambda r, limit, a: "upheld" if all(x >= limit for x in r.values()) else "not upheld", "one batch below"),
    ("09/1", lambda t, p: torch.rand(t.shape[:2]), "second call gave other scores"),
    ("09/1", spoils, "global random numbers"),
    ("09/1", seeded(rows=lambda shape: (1, shape[1])), "Two images got the same scores"),
    ("09/1", seeded(torch.float16), "There are ties"),
    ("09/1", lambda t, p: torch.zeros(t.shape[1]), "Expected a tensor of the shape .batch, n. = .3, 50., got .50"),
    ("09/2", lambda s, f: speedup(s, f, how=lambda s, f, at: s.quantile(at) / f.quantile(at)), "five quiet rounds"),
    ("09/2", lambda s, f: speedup(f, s), "a single round.*expected 2, got 0.5"),
    ("09/2", lambda s, f: speedup(s, f, (0.2, 0.5, 0.8)), "five quiet.*median, q20, q80"),
    ("09/3", lambda t, p: standard(t, p, torch.ones_like), "five patches"),
    ("09/3", lambda t, p: standard(t, p, lambda p: torch.arange(p.shape[1]).expand(p.shape) > 0), "half padding"),
    ("09/3", lambda t, p: standard(t, p, whole=True), "half padding"),
    ("09/3", lambda t, p: standard(t, p, safe=False), "a single one.*NaN"),
    ("09/3", lambda t, p: standard(t, p, cut=False), "five patches"),
    ("09/4", lambda s, n: sound(s, n, fused=False), "fused tokens are no patches"),
    ("09/4", lambda s, n: sound(s, n, first=False), "CLS does not stand first"),
    ("09/4", lambda s, n: sound(s, n, memory=False), "comes back after a cut"),
    ("10/1", lambda do, out: (do * out).sum(1, keepdim=True), "expected the shape .5,., got .5, 1"),
    ("10/1", lambda do, out: (do * out).sum(0), "expected the shape"),
    ("10/1", lambda do, out: (do * out).mean(1), "five queries, seven keys.*5 of 5 places differ"),
    ("10/2", lambda k, c: taught(k, c, swapped=True), "in front of an attention, three.*Rows: query, key, value"),
    ("10/2", lambda k, c: taught(k, c, query=False), "behind an attention, three of five stay"),
    ("10/2", lambda k, c: k.expand(3, -1), "behind an attention, three of five stay"),
    ("10/3", lambda i, n, k: share(i, n, k, lambda x: 1 - x), "share of 0.3.*places are steps"),
    ("10/3", lambda i, n, k: share(i, n, k, begin=0), "share of 0.3"),
    ("10/3", lambda i, n, k: share(i, n, k, lambda x: math.cos(math.pi * x)), "share of 0.3"),
    ("10/4", lambda s, k: mask(s, k, lambda hard, soft: hard), "gradient"),
    ("10/4", lambda s, k: mask(s, k, lambda hard, soft: soft), "exactly 0 or 1"),
    ("10/4", lambda s, k: mask(s, k, best=False), r"\['mask'\]"),
    ("10/4", lambda s, k: mask(s, k, lambda hard, soft: hard * soft / soft.detach()), r"\['gradient'\]|exactly"),
    ("11/1", lambda p, q: (p * q).sum(), "the same distribution"),
    ("11/1", lambda p, q: (p / q).clamp(max=1).mean(), "nothing in common|unfair one"),
    ("11/1", lambda p, q: torch.maximum(p, q).sum(), "nothing in common.*expected 0, got 2"),
    ("11/2", lambda parent: sees(parent, itself=False), "a root alone"),
    ("11/2", lambda parent: sees(parent, up=False), "a chain"),
    ("11/2", lambda parent: sees(parent, turned=True), "a chain.*Rows: who looks"),
    ("11/3", lambda step, tree, guess: (guess + tree) / step, "costs what a token costs.*expected 0.6, got 1.6"),
    ("11/3", lambda step, tree, guess: guess / step, "a tree costs more"),
    ("11/3", lambda step, tree, guess: (guess + tree - step) / tree, "a tree costs more"),
]


@pytest.mark.parametrize("name, yours, words", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_answer_is_told_what_is_wrong(name, yours, words, capsys):
    assert course.check(name, yours) is False
    said = capsys.readouterr().out
    assert re.search(words, said, re.DOTALL), said
    assert "Traceback" not in said


def test_the_same_functions_without_the_mistake_pass():
    right = {
        "07/1": sign_test, "07/2": on_front, "07/3": paired, "07/4": factors, "08/1": count_standing, "08/2": shares,
        "08/3": lambda s, f: math.prod(x / y for x, y in zip(s, f)) ** (1 / len(s)), "08/4": settle, "09/1": seeded(),
        "09/2": speedup, "09/3": standard, "09/4": sound, "10/1": lambda do, out: (do * out).sum(1), "10/2": taught,
        "10/3": share, "10/4": mask, "11/1": lambda p, q: torch.minimum(p, q).sum(), "11/2": sees,
        "11/3": lambda step, tree, guess: (guess + tree) / step - 1,
    }  # fmt: skip
    assert [*right] == [f"{lesson}/{i}" for lesson, n in LESSONS.items() for i in range(1, n + 1)]
    for name, answer in right.items():
        assert course.check(name, answer) is True, name


def test_three_wrong_answers_for_each_exercise_and_hints_that_do_not_solve_it(capsys):
    names = [name for name, *_ in WRONG]
    for name in set(names):
        assert names.count(name) >= 3, name
        hints = exercises.find(name).hints
        assert 2 <= len(hints) <= 5 and not any("return" in hint for hint in hints)


def test_the_schedule_asked_for_is_the_package_s():
    """The exercise takes the schedule without its rounding to a 196th."""
    from ragged.train.recipes import annealed

    assert course.check("10/3", annealed)


def test_what_pytorch_does_not_implement_is_no_stub(capsys):
    def of_whole_numbers(do, out):
        return (do * out).int().softmax(1)

    def stub(do, out):
        raise NotImplementedError("yours")

    assert course.check("10/1", of_whole_numbers) is False
    said = capsys.readouterr().out
    assert "stopped with NotImplementedError" in said and "softmax(1)" in said and "Not begun" not in said
    assert course.check("10/1", stub) is False and "Not begun" in capsys.readouterr().out
