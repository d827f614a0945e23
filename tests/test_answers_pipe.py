"""Typical wrong answers to the exercises of lessons 04 to 06, and what the feedback says about them."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from answer_cases import said

from ragged.course import exercises


@pytest.fixture(autouse=True)
def unkept(monkeypatch):
    monkeypatch.setenv("RAGGED_PROGRESS", "off")


def zeros_like_scatter(order, stays):
    return torch.zeros_like(stays).scatter(1, order, stays)


def threshold(norms, tau, over=1, first=True, strict=False, keepdim=True):
    mean = norms[:, over:].mean(1, keepdim=True) if keepdim else norms[:, over:].mean()
    keep = norms > tau * mean if strict else norms >= tau * mean
    keep[:, 0] |= first
    return keep


def top_p(scores, p, after=False, places=True, total=None):
    ranked, order = scores.sort(1, descending=True)
    reached = ranked.cumsum(1) - (0 if after else ranked)
    stays = reached < p * (scores.sum(1, keepdim=True) if total is None else total)
    return zeros_like_scatter(order, stays) if places else stays


def evit(keep, cuts, up=True, fused=1, stop=True):
    rows, found = 197, []
    for _ in range(cuts):
        stay = math.ceil(keep * (rows - 1)) if up else int(keep * (rows - 1))
        if stay < rows - 1 or not stop:
            rows = 1 + stay + fused
        found.append(rows)
    return found


def ats_score(q, k, v, scale=True, dim=0, norm=lambda v: v.flatten(1).norm(dim=1), reduce=torch.sum):
    scores = torch.einsum("hd,nhd->nh", q[0], k) * (q.shape[-1] ** -0.5 if scale else 1)
    return reduce(scores.softmax(dim), 1) * norm(v)


def fused(tokens, attention, keep, normalise=False, of="dropped"):
    weights = torch.where(keep if of == "kept" else ~keep, attention, 0)
    return (weights / weights.sum() if normalise else weights) @ tokens


def owners(cu, rows, right=True, nobody=True):
    row = torch.arange(rows)
    image = torch.searchsorted(cu[1:], row, right=right)
    return torch.where(row < cu[-1], image, -1) if nobody else image


def means(tokens, cu, weighted=False, clamp=True, divide=True):
    batch = len(cu) - 1
    image = torch.searchsorted(cu[1:], torch.arange(len(tokens)), right=True)
    if weighted:
        onto = F.one_hot(image, batch + 1)[:, :batch].float()
        return onto.T @ tokens / cu.diff().clamp(min=1)[:, None]
    sums = tokens.new_zeros(batch + 1, tokens.shape[1]).index_add_(0, image, tokens)[:batch]
    return sums / (cu.diff().clamp(min=1) if clamp else cu.diff())[:, None] if divide else sums


def repack(tokens, ids, cu, keep, total, offset=1, new_ids=False, old=False):
    place = keep.cumsum(0)
    slot = torch.where(keep, place - offset, total)
    out, out_ids = tokens.new_zeros(total + 1, 2), ids.new_zeros(total + 1)
    out[slot], out_ids[slot] = tokens, (torch.arange(len(ids)) if new_ids else ids)
    return out[:total], out_ids[:total], cu if old else F.pad(place, (1, 0))[cu].int()


def corners(cu, wide, cls=1, swapped=False, pixels=16):
    row = torch.arange(int(cu[-1]))
    image = torch.searchsorted(cu[1:], row, right=True)
    patch = row - cu[image] - cls
    at = pixels * torch.stack((patch // wide[image], patch % wide[image]))
    return torch.cat((image[None], torch.where(patch < 0, -1, at.flip(0) if swapped else at))).T


def may_see(cu_q, cu_k, keys=None, right=True):
    keys = cu_k if keys is None else cu_q
    q, k = (torch.searchsorted(cu[1:], torch.arange(int(n[-1])), right=right) for cu, n in ((cu_q, cu_q), (keys, cu_k)))
    return q[:, None] == k


def tax(ns, pairs=lambda ns: len(ns) * max(ns) ** 2 / sum(n * n for n in ns), rows=lambda n: len(n) * max(n) / sum(n)):
    return rows(ns), pairs(ns)


def even(host, pruned, fixed, image, ratio, gain=1.1, add=False, all_of_it=False, none=0):
    both = (lambda h, w: h + w) if add else max
    for b in range(1, 1025):
        work = (fixed + b * image) / ratio if all_of_it else fixed + b * image / ratio
        if both(host, fixed + b * image) >= gain * both(pruned, work):
            return b
    return none


def rows_of(lengths, groups, order=sorted, equal=False):
    ns = order(lengths)
    best = [0] + [math.inf] * len(ns)
    if equal:
        size = -(-len(ns) // groups)
        return sum(max(ns[i : i + size]) * len(ns[i : i + size]) for i in range(0, len(ns), size))
    for _ in range(groups):
        best = [0] + [min(best[i] + (j - i) * max(ns[i:j]) for i in range(j)) for j in range(1, len(ns) + 1)]
    return best[-1]


def shared(rates, workers):
    """In proportion to how slow a stage is, rounded."""
    slow = sum(1 / r for r in rates)
    return min(max(1, round(workers / (r * slow))) * r for r in rates)


def left_over(rates, workers):
    """What remains goes to the first stage."""
    split = [workers // len(rates)] * len(rates)
    split[0] += workers % len(rates)
    return min(n * r for n, r in zip(split, rates))


def efficiency(step, mb, gb_s, hidden, gpus, rounds=2, parts=True, unit=1e3, clamp=True):
    wait = rounds * unit * mb / gb_s * ((gpus - 1) / gpus if parts else gpus - 1) - hidden
    return step / (step + (max(0, wait) if clamp else wait))


RIGHT = {
    "04/1": threshold, "04/2": top_p, "04/3": evit, "04/4": ats_score, "04/5": fused, "05/1": owners, "05/2": means,
    "05/3": repack, "05/4": corners, "05/5": may_see, "06/1": tax, "06/2": even, "06/3": rows_of, "06/5": efficiency,
}  # fmt: skip
WRONG = [  # exercise, what is wrong, what is said
    ("04/1", dict(over=0), "a loud CLS"), ("04/1", dict(strict=True), "exactly at the mean"),
    ("04/1", dict(first=False), "a quiet CLS"), ("04/1", dict(keepdim=False), "different loudness"),
    ("04/2", dict(after=True), "half of 10"), ("04/2", dict(places=False), "half of 10"),
    ("04/2", dict(total=10.0), "reached exactly"),
    ("04/3", dict(up=False), "three cuts to 70 %"),
    ("04/3", dict(fused=0), "one cut to a half. .*expected 100, got 99"),
    ("04/3", dict(stop=False), "keep = 1.0 drops nothing"),
    ("04/4", dict(scale=False), "three tokens"), ("04/4", dict(dim=1), "three tokens"),
    ("04/4", dict(reduce=torch.mean), "seven tokens, three heads"),
    ("04/4", dict(norm=lambda v: v.norm(dim=-1).sum(1)), "seven tokens, three heads"),
    ("04/5", dict(normalise=True), "three of five tokens stay"), ("04/5", dict(of="kept"), "three of five tokens stay"),
    ("05/1", dict(right=False), "images of 3 and 2 rows"), ("05/1", dict(nobody=False), "past the last offset"),
    ("05/2", dict(weighted=True), "NaN behind the last offset"),
    ("05/2", dict(clamp=False), "an empty image gets zeros"),
    ("05/2", dict(divide=False), "images of 2 and 3 rows"),
    ("05/3", dict(new_ids=True), r"three images lose some rows\. \[1\]: .*\[1\] ids"),
    ("05/3", dict(old=True), r"\[2\]: .*\[2\] cu_seqlens"), ("05/3", dict(offset=0), "three images lose some rows"),
    ("05/4", dict(cls=0), "2 x 3 patches"), ("05/4", dict(swapped=True), "2 x 3 patches"),
    ("05/4", dict(pixels=1), "2 x 3 patches"),
    ("05/5", dict(keys="of the queries"), "fewer queries than keys"), ("05/5", dict(right=False), "two images"),
    ("06/1", dict(pairs=lambda n: (len(n) * max(n) / sum(n)) ** 2), "lengths 5, 2 and 1"),
    ("06/1", dict(rows=lambda n: sum(n) / (len(n) * max(n))), "lengths 5, 2 and 1"),
    ("06/1", dict(pairs=lambda n: max(n) ** 2 / sum(x * x for x in n)), "equal lengths pay nothing"),
    ("06/2", dict(add=True), "the host is slow in both"), ("06/2", dict(all_of_it=True), "captured, the host is quick"),
    ("06/2", dict(none=1025), "ratio is below the gain"),
    ("06/3", dict(order=list), "the list is not sorted"), ("06/3", dict(equal=True), "nine lengths|equal shares"),
    ("06/3", dict(order=lambda ns: sorted(set(ns))), "equal images need one group"),
    ("06/5", dict(rounds=1), "two GPUs, nothing hidden"), ("06/5", dict(parts=False), "two GPUs|four GPUs"),
    ("06/5", dict(unit=1.0), "two GPUs, nothing hidden"), ("06/5", dict(clamp=False), "all of it hidden"),
]  # fmt: skip
OTHERS = [
    ("04/5", lambda tokens, attention, keep: tokens[~keep].mean(0), "three of five tokens stay"),
    ("05/1", lambda cu, rows: torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff()), "past the last offset"),
    ("05/5", lambda cu_q, cu_k: torch.ones(int(cu_q[-1]), int(cu_k[-1]), dtype=torch.bool), "two images"),
    ("05/5", lambda cu_q, cu_k: torch.block_diag(*(torch.ones(a, b) for a, b in zip(cu_q.diff(), cu_k.diff()))),
     "expected bools"),
    ("06/4", shared, r"stages|workers"), ("06/4", left_over, "two stages, seven|three stages"),
    ("06/4", lambda rates, workers: int(workers / sum(1 / r for r in rates)), "two stages"),
]  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_without_its_mistake_every_one_of_them_is_right(name, capsys):
    good, text = said(capsys, name, RIGHT[name])
    assert good and "Correct, in all" in text, text


@pytest.mark.parametrize("name, mistake, words", WRONG, ids=[f"{n}-{next(iter(m))}" for n, m, _ in WRONG])
def test_a_mistake_is_named_by_the_case_it_fails(name, mistake, words, capsys):
    good, text = said(capsys, name, lambda *given: RIGHT[name](*given, **mistake))
    assert not good and text.startswith("Not yet") and re.search(words, text, re.DOTALL), text


@pytest.mark.parametrize("name, yours, words", OTHERS)
def test_another_way_to_be_wrong(name, yours, words, capsys):
    good, text = said(capsys, name, yours)
    assert not good and text.startswith("Not yet") and re.search(words, text), text


def test_every_exercise_has_hints_cases_and_three_wrong_answers():
    for lesson in ("04", "05", "06"):
        for number in range(1, 6):
            name = f"{lesson}/{number}"
            exercise = exercises.find(name)
            assert len(exercise.hints) >= 3 and len(exercise.cases) >= 3
            assert len([n for n, *_ in (*WRONG, *OTHERS) if n == name]) >= 3, name
