"""Properties: what must hold of every input, with the inputs drawn by hypothesis."""
import math
import os
import warnings
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from interference_nb.data import (TASK_COLUMNS, Corpus, Stream, cap_sentences, check_code,
                                  dev_batches, explain_row, map_labels, mask_tokens, parallel_map,
                                  sampling_probabilities, split_of, split_sentences)
from interference_nb.files import InputError
from interference_nb.tokenizers import (LONGEST, MASK, SPECIALS, UNK, Tokenizer, _short_lines)
from interference_nb.experiments import SCALES, SYSTEMS, RunSpec
from interference_nb.claims import paired
from interference_nb.tasks import (TASKS, TaskData, count_spans, cut_between_words, span_f1,
                                   task_spec,
                                   windows, word_f1)
from interference_nb.gradient_probes import (eulerian_pair_order, gram, pcgrad, split_pairs,
                                             vaccine)
from interference_nb.l0_pruning import HardConcrete
from interference_nb.meta_adapters import MetaConfig, mean_gradient, perturbed
from interference_nb.pretrain import BatchSampler, TrainConfig, learning_rate

settings.register_profile('project', deadline=None, max_examples=60, derandomize=True,
                          database=None)
settings.load_profile('project')

small = st.integers(1, 40)


def corpus(n, lang='aa', seed=0):
    "n tokens that are all different from their neighbours, so that a window names its place."
    ids = np.arange(5, 5 + n) if n < 60_000 else np.random.default_rng(seed).integers(5, 999, n)
    return Corpus(ids.astype(np.uint16), lang, 'train', 1, 1)


def restored(batch):
    "Put the hidden tokens of a batch back."
    tokens = batch.tokens.clone()
    tokens.view(-1)[batch.positions] = batch.targets
    return tokens


# ---- text ----

@given(rows=st.lists(st.lists(st.integers(0, 30), min_size=6, max_size=6), min_size=1, max_size=9),
       p=st.floats(.01, 1), seed=st.integers(0, 99))
def test_hiding_and_restoring_are_inverse(rows, p, seed):
    ids = np.array(rows)
    real = int((ids > MASK).sum())
    assume(real)
    tokens, positions, targets = mask_tokens(ids, np.random.default_rng(seed), 31, p)
    assert np.array_equal(ids, np.array(rows))                  # the text itself is left alone
    assert len(set(positions.tolist())) == len(positions) == max(1, round(p * real))
    assert (targets > MASK).all()                               # no border is hidden, no padding
    hidden = tokens.reshape(-1)[positions]
    assert ((hidden == MASK) | (hidden >= len(SPECIALS))).all() and (hidden < 31).all()
    tokens.reshape(-1)[positions] = targets
    assert np.array_equal(tokens, ids)


@given(n=st.integers(1, 400), T=st.integers(1, 20), B=st.integers(1, 9), seed=st.integers(0, 9))
def test_an_epoch_meets_every_window_once(n, T, B, seed):
    assume(n >= T)
    stream = Stream(corpus(n), B, T, seed, 6000)
    assert stream.n_rows == n // T
    seen = []
    for k in range(math.ceil(2 * stream.n_rows / B)):
        batch = stream.batch(k)
        tokens = restored(batch)
        assert tokens.shape == (B, T)
        seen += tokens.tolist()
    rows = [list(range(5 + i * T, 5 + (i + 1) * T)) for i in range(n // T)]
    for epoch in (seen[:len(rows)], seen[len(rows):2 * len(rows)]):
        assert sorted(epoch) == rows


@given(n=st.integers(1, 300), T=st.integers(1, 12), B=st.integers(1, 9))
def test_held_out_batches_cover_the_text(n, T, B):
    assume(n >= T)
    once, again = (dev_batches(corpus(n), B, T, 6000) for _ in range(2))
    rows = []
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.positions, b.positions)
        rows += restored(a).tolist()
    assert rows == [list(range(5 + i * T, 5 + (i + 1) * T)) for i in range(n // T)]


def test_masks_and_orders_are_drawn_anew():
    "Each batch hides other places, the same rows hide others an epoch later, in another order."
    stream = Stream(corpus(960), 4, 24, 0, 6000)                # ten batches an epoch
    batches = [stream.batch(k) for k in range(20)]
    assert len({tuple(b.positions.tolist()) for b in batches}) == 20
    rows, hidden = [], [{}, {}]
    for k, b in enumerate(batches):
        tokens = restored(b)
        rows += tokens[:, 0].tolist()
        hidden[k // 10] |= {int(t[0]): tuple(((x != t).nonzero()).flatten().tolist())
                            for t, x in zip(tokens, b.tokens, strict=True)}
    assert sorted(rows[:40]) == sorted(rows[40:]) and rows[:40] != rows[40:] != sorted(rows[40:])
    assert sum(hidden[0][r] == hidden[1][r] for r in rows[:40]) < 10


def test_of_ten_hidden_tokens_eight_are_masks_one_is_random_one_stays():
    ids = np.full((100, 200), 7)
    tokens, positions, _ = mask_tokens(ids, np.random.default_rng(0), 50_007, .5)
    found, n = tokens.reshape(-1)[positions], 10_000
    kinds = found == MASK, found == 7, (found > MASK) & (found != 7)
    for share, kind in zip((.8, .1, .1), kinds, strict=True):
        assert abs(kind.mean() - share) < 4 * math.sqrt(share * (1 - share) / n)


@given(n_rows=st.integers(3, 200), n_batches=st.integers(1, 9), B=st.integers(2, 9))
def test_a_sample_of_held_out_text_is_spread_over_all_of_it(n_rows, n_batches, B):
    rows = [t[0] // 3 for b in dev_batches(corpus(3 * n_rows), B, 3, 6000, .01, n_batches)
            for t in restored(b).tolist()]
    assert len(rows) == min(n_rows, n_batches * B)
    assert rows[0] == 5 // 3 and rows[-1] == (5 + 3 * (n_rows - 1)) // 3
    steps = np.diff(rows)
    assert steps.max() - steps.min() <= 1


letters = st.text('ab .!?\n।', max_size=40)


@given(letters)
def test_sentences_lose_nothing_but_blanks(text):
    found = split_sentences(text)
    assert ''.join(''.join(found).split()) == ''.join(text.split())
    assert all(s.strip() for s in found)
    assert split_sentences('\n'.join(found)) == found


@given(st.lists(st.text('ab.\n ', min_size=1, max_size=30), max_size=12), st.integers(1, 20),
       st.integers(0, 5))
def test_a_cap_is_met_and_keeps_the_order(documents, cap, seed):
    total = sum(len(split_sentences(d)) for d in documents)
    kept = list(cap_sentences(documents, cap, seed))
    assert sum(len(split_sentences(d)) for d in kept) == min(cap, total)
    places, at = [], 0
    for d in kept:                              # each begins as a document after the last one's
        fits = [i for i in range(at, len(documents)) if split_sentences(documents[i])[
            :len(split_sentences(d))] == split_sentences(d)]
        assert fits
        places.append(fits[0])
        at = fits[0] + 1
    assert sorted(places) == places


@given(st.dictionaries(st.text('abc', min_size=1, max_size=3), st.integers(1, 10**9), min_size=1,
                       max_size=6), st.floats(.5, 50))
def test_temperature_flattens_the_sizes(sizes, T):
    P = sampling_probabilities(sizes, T)
    assert sum(P.values()) == pytest.approx(1)
    for a in sizes:
        for b in sizes:                         # the definition, as a ratio
            assert P[a] / P[b] == pytest.approx((sizes[a] / sizes[b]) ** (1 / T), rel=1e-9)


@given(st.integers(0, 10**9), st.floats(0, .2), st.floats(0, .2))
def test_growing_the_held_out_part_moves_no_text_into_training(i, a, b):
    a, b = sorted((a, b))
    if split_of(str(i), a) != 'train': assert split_of(str(i), b) != 'train'


def test_a_cap_is_a_sample_and_another_seed_another_one():
    documents = [f'{i}.' for i in range(200)]
    a, b = ([int(d[:-1]) for d in cap_sentences(documents, 50, seed)] for seed in (0, 1))
    assert a != b
    for drawn in (a, b): assert abs(np.mean(drawn) - 99.5) < 4 * 200 / math.sqrt(12 * 50)


def square(x): return x * x


@pytest.mark.parametrize('n', [0, 1, 2, 7])
@pytest.mark.parametrize('workers', [1, 2, 3])
def test_workers_keep_the_order(n, workers):
    assert list(parallel_map(square, range(n), workers)) == [i * i for i in range(n)]


# ---- who takes which batch ----

@cache
def sampler(accumulate, mixed=False, steps=12):
    cfg = TrainConfig.toy(steps=steps, accumulate=accumulate, batch_size=2, seq_len=8, mixed=mixed)
    return BatchSampler({l: Stream(corpus(200, l), 2, 8, 0, 6000) for l in ('aa', 'bb')}, cfg)


@given(a=st.integers(1, 6), b=st.integers(1, 6), turns=st.integers(1, 5))
def test_shards_are_a_partition_for_any_number_of_processes(a, b, turns):
    "No batch is taken twice and none left out, by whichever number divides a step."
    dealer, world = sampler(a * b), b
    one, shards = {}, []
    for t in range(turns): one[t] = set(dealer.shard_indices(t))
    assert sorted(i for own in one.values() for i in own) == list(range(turns * a * b))
    for t in range(turns):
        for rank in range(world):
            dealer.rank, dealer.world = rank, world
            shards += dealer.shard_indices(t)
            assert len(dealer.shard_indices(t)) == a and set(dealer.shard_indices(t)) <= one[t]
        dealer.rank, dealer.world = 0, 1
    assert sorted(shards) == list(range(turns * a * b))


@pytest.mark.parametrize('mixed', [False, True])
def test_processes_share_a_step_and_languages_run_on(mixed):
    "Two processes take together what one takes alone; each language's batches come in order."
    dealer, seen = sampler(2, mixed), {'aa': [], 'bb': []}
    key = lambda b: (b.lang, tuple(b.tokens.flatten().tolist()))
    for k in range(dealer.cfg.steps):
        dealer.rank, dealer.world = 0, 1
        alone = [key(b) for b in dealer.train(k)]
        parts = []
        for dealer.rank in (0, 1):
            dealer.world = 2
            parts += [key(b) for b in dealer.train(k)]
        dealer.rank, dealer.world = 0, 1
        assert sorted(parts) == sorted(alone)
        for lang, tokens in alone: seen[lang].append((lang, tokens))
    for lang, batches in seen.items():
        stream = Stream(corpus(200, lang), 2, 8, 0, 6000)
        assert batches == [key(stream.batch(i)) for i in range(len(batches))]


@given(st.integers(1, 500), st.integers(0, 100), st.sampled_from(('inverse_sqrt', 'linear',
                                                                  'constant')))
def test_the_rate_peaks_once(steps, warmup, schedule):
    assume(warmup < steps)
    cfg = TrainConfig.toy(steps=steps, warmup=warmup, schedule=schedule, lr=.1)
    rates = [learning_rate(k, cfg) for k in range(steps)]
    assert all(0 < r <= .1 for r in rates) and max(rates) == pytest.approx(.1)
    top = rates.index(max(rates))
    assert rates[:warmup] == pytest.approx([.1 * (k + 1) / warmup for k in range(warmup)])
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[:top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    share = dict(linear=lambda k: (steps - k) / (steps - warmup), constant=lambda k: 1.,
                 inverse_sqrt=lambda k: min(1., (max(warmup, 1) / (k + 1))**.5))[schedule]
    assert rates[warmup:] == pytest.approx([.1 * share(k) for k in range(warmup, steps)])


# ---- inputs of a task ----

@given(n=st.integers(0, 200), room=small)
def test_windows_cover_their_context(n, room):
    found = windows(n, room)
    assert all(0 <= a <= b <= n and b - a <= room for a, b in found)
    assert {i for a, b in found for i in range(a, b)} == set(range(n))
    for (a, b), (c, d) in pairwise(found):      # half of a window is in the next one
        assert a < c and b <= d and (d == n or b - c >= room // 2)
    if n <= room: assert found == [(0, n)]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), room=st.integers(1, 12))
def test_cuts_cover_their_sentence(lengths, room):
    first, n = np.cumsum([0, *lengths])[:-1].tolist(), sum(lengths)
    found = list(cut_between_words(first, n, room))
    assert [w for a, b, *_ in found for w in range(a, b)] == list(range(len(lengths)))
    for a, b, start, end in found:
        assert start == first[a] and end - start <= room
        size = sum(lengths[a:b])
        assert end - start == min(size, room) and (size <= room or b == a + 1)
    for a, b, *_ in found[:-1]:                 # one more word would not have fitted
        assert sum(lengths[a:b + 1]) > room


class Pieces:
    "Words of a given number of pieces: 'w3' has three."
    bos, eos, pad = 0, 1, 2
    def encode_words(self, words):
        sizes = [int(w[1:]) for w in words]
        return [5] * sum(sizes), np.cumsum([0, *sizes])[:-1].tolist()


@given(rows=st.lists(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1,
                              max_size=20), min_size=1, max_size=6), room=st.integers(1, 9))
def test_every_word_is_asked_once(rows, room):
    "Whatever a sentence is cut into, each of its words has its label in one place."
    data = TaskData(task_spec('ner'), [dict(tokens=[f'w{n}' for n, _ in r],
                                            ner_tags=[l for _, l in r]) for r in rows], Pieces(),
                    room + 2)
    asked = [[] for _ in rows]
    for p in data.features:
        assert len(p.ids) == len(p.targets) <= room + 2
        assert [i for i, t in enumerate(p.targets) if t != -100] == p.positions
        asked[p.row] += [p.targets[i] for i in p.positions]
    assert asked == [[l for _, l in r] for r in rows]


@given(n=st.integers(1, 60), size=st.integers(1, 12), seed=st.none() | st.integers(0, 9))
def test_an_order_takes_every_piece_once(n, size, seed):
    rows = [dict(tokens=[f'w{1 + i % 3}'], ner_tags=[0]) for i in range(n)]
    data = TaskData(task_spec('ner'), rows, Pieces(), 9)
    rng = None if seed is None else np.random.default_rng(seed)
    batches = data.order(size, rng)
    assert sorted(i for b in batches for i in b) == list(range(len(data.features)))
    assert all(0 < len(b) <= size for b in batches)


tags = st.sampled_from(('O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC'))


@given(st.lists(st.tuples(tags, tags), min_size=1, max_size=25))
def test_span_f1_is_seqevals(pairs):
    from seqeval.metrics import f1_score
    gold, said = ([p[i] for p in pairs] for i in (0, 1))
    hits, total = count_spans(gold, said)
    if total:
        assert 100 * hits / total == pytest.approx(span_f1([gold], [said]))
        assert span_f1([gold], [said]) == pytest.approx(100 * f1_score([gold], [said]))


words = st.lists(st.sampled_from('a b c d'.split()), max_size=6).map(' '.join)


@given(words, words)
def test_word_f1_is_a_symmetric_share(a, b):
    assert word_f1(a, b) == word_f1(b, a) and 0 <= word_f1(a, b) <= 100
    if a: assert (word_f1(a, b) == 100) == (sorted(a.split()) == sorted(b.split()))


# ---- gradients and gates ----

@given(st.integers(1, 9))
def test_a_walk_sets_every_pair_side_by_side(K):
    langs = [f'l{i}' for i in range(K)]
    met = [frozenset(p) for p in pairwise(eulerian_pair_order(langs))]
    wanted = {frozenset(p) for p in combinations_with_replacement(langs, 2)}
    assert set(met) == wanted and len(met) <= len(wanted) + K // 2


matrices = st.integers(2, 5).flatmap(lambda K: st.tuples(st.just(K), st.integers(0, 10**6)))


@given(matrices)
def test_projected_gradients_oppose_nobody_they_were_projected_from(drawn):
    "Of two gradients: orthogonal where they opposed; g and its parts are unchanged where not."
    K, seed = drawn
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(2, 6))
    w = pcgrad(G @ G.T, np.random.default_rng(0))
    a, b = G
    if a @ b >= 0: assert w == pytest.approx([1, 1])
    else:
        parts = a - (a @ b) / (b @ b) * b, b - (a @ b) / (a @ a) * a
        assert w @ G == pytest.approx(sum(parts))
        assert parts[0] @ b == pytest.approx(0, abs=1e-9) == parts[1] @ a
    more = rng.normal(size=(K, 8))
    assert pcgrad(np.abs(more @ more.T), rng) == pytest.approx(np.ones(K))  # nothing opposes


@given(matrices)
def test_a_vaccinated_gradient_has_the_expected_cosine(drawn):
    _, seed = drawn
    rng = np.random.default_rng(seed)
    G, target = rng.normal(size=(2, 6)), np.full((2, 2), rng.uniform(-.9, .9))
    M, hat = G @ G.T, target[0, 1]
    phi = M[0, 1] / math.sqrt(M[0, 0] * M[1, 1])
    w = vaccine(M, target, np.random.default_rng(0), beta=.25)
    assert target[0, 1] == pytest.approx(.75 * hat + .25 * phi) == target[1, 0]
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    c = w - 1                                   # what each gained of the other's gradient
    if phi >= hat: assert c == pytest.approx([0, 0])
    else:
        assert cos(G[0] + c[1] * G[1], G[1]) == pytest.approx(hat)
        assert cos(G[1] + c[0] * G[0], G[0]) == pytest.approx(hat)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 99))
def test_gram_is_the_product_of_rows(sizes, K, seed):
    G = torch.from_numpy(np.random.default_rng(seed).normal(size=(K, sum(sizes))))
    found = gram(G, sizes)
    for part, own in zip(G.split(sizes, 1), found, strict=True):
        torch.testing.assert_close(own, part @ part.T)


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=20), st.integers(0, 99))
def test_gates_lie_between_closed_and_open(log_alpha, seed):
    "Where noise is drawn they lie in [0, 1]; as many are above 0 as the expectation says."
    gate, a = HardConcrete(), torch.tensor(log_alpha, dtype=torch.float64)
    u = torch.rand(4000, len(a), generator=torch.Generator().manual_seed(seed)).double()
    z = gate.sample(a, u.clamp(1e-6, 1 - 1e-6))
    assert 0 <= z.min() and z.max() <= 1
    p = gate.open_probability(a)
    assert ((z > 0).double().mean(0) - p).abs().max() < 4.5 * .5 / math.sqrt(4000)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(-3, 3), st.integers(0, 99))
def test_moved_parameters_come_back_bit_by_bit(sizes, step, seed):
    torch.manual_seed(seed)
    theta = [torch.randn(n, requires_grad=True) for n in sizes]
    by, kept = [torch.randn(n) for n in sizes], [p.detach().clone() for p in theta]
    with pytest.raises(KeyError), perturbed(theta, by, step):
        for p, d, old in zip(theta, by, kept, strict=True):
            torch.testing.assert_close(p.detach(), old + step * d)
        raise KeyError
    for p, old in zip(theta, kept, strict=True): assert torch.equal(p, old)


@given(st.integers(1, 5), st.integers(0, 99))
def test_a_mean_of_losses_has_the_mean_gradient(n, seed):
    torch.manual_seed(seed)
    x, ways = torch.randn(3, requires_grad=True), torch.randn(n, 3)
    losses = [lambda w=w: (w * x).sin().sum() for w in ways]
    value, (g,) = mean_gradient(losses, [x])
    whole = sum(f() for f in losses) / n
    torch.testing.assert_close(value, whole.detach())
    torch.testing.assert_close(g, torch.autograd.grad(whole, x)[0])


# ---- runs and statistics ----

langs = st.sampled_from(('en', 'fr', 'ar', 'x3'))
pairs_of = st.lists(langs, min_size=1, max_size=3, unique=True).map(tuple)
metas = st.none() | st.builds(
    MetaConfig, beta=st.sampled_from((None, .1, .2)), eps=st.sampled_from((1e-2, 1e-3)),
    estimator=st.sampled_from(('exact', 'finite_difference')),
    validation=st.sampled_from(('train', 'held-out')))


TRAINED = sorted(s for s in SYSTEMS if not SYSTEMS[s].hub)

@st.composite
def run_specs(draw, systems=TRAINED):
    pair = draw(pairs_of)
    own = draw(st.sampled_from([pair, *((l,) for l in pair)]))
    system = draw(st.sampled_from(systems))
    caps = draw(st.dictionaries(st.sampled_from(pair), st.sampled_from((30, 300))))
    meta = draw(metas) if SYSTEMS[system].meta else None
    return RunSpec(system, own, pair, draw(st.integers(0, 12)), SCALES['toy'], max_sentences=caps,
                   meta=meta)


@pytest.mark.parametrize('field', ('system', 'langs', 'pair', 'seed', 'max_sentences', 'meta'))
@given(st.data())
def test_what_differs_is_told_apart_by_name(field, data):
    "Two runs of one experiment share a folder only if they train the same system on the same text."
    systems = [s for s in TRAINED if SYSTEMS[s].meta or field != 'meta']
    a, b = (data.draw(run_specs(systems)) for _ in range(2))
    try: b = replace(a, **{field: getattr(b, field)})
    except InputError: assume(False)                # caps of a language that is not there
    assume(not (a.meta or b.meta) or (SYSTEMS[a.system].meta and SYSTEMS[b.system].meta))
    settled = lambda s: replace(s, meta=s.meta or SYSTEMS[s.system].meta)
    used = lambda s: {l: n for l, n in s.max_sentences.items() if l in s.pair}
    same = replace(settled(a), max_sentences=used(a)) == replace(settled(b), max_sentences=used(b))
    assert (a.name == b.name) == same, (a.name, b.name)


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=2, max_size=12))
def test_paired_is_scipys(values):
    from scipy.stats import ttest_rel
    a, b = (np.round([v[i] for v in values], 3) for i in (0, 1))
    assume(np.std(a - b) > 1e-6)
    lines = [('one', 99, 1e9), *reversed([('one', s, x) for s, x in enumerate(a)]),
             *(('other', s, x) for s, x in enumerate(b))]       # seed 99 is nobody's pair
    numbers = pd.DataFrame(lines, columns=['system', 'seed', 'm']).set_index(['system', 'seed'])
    found, theirs = paired(numbers, 'm', 'one', 'other'), ttest_rel(a, b)
    interval = theirs.confidence_interval(.95)
    assert found.n == len(values) and found.delta == pytest.approx((a - b).mean())
    assert found.delta / found.se == pytest.approx(theirs.statistic)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low > 0 or found.high < 0) == (theirs.pvalue < .05)


# ---- what people's files may hold; INTERFERENCE_EXAMPLES=10 draws ten times as many examples ----

MORE = float(os.environ.get('INTERFERENCE_EXAMPLES', '1'))
def anything(n): return settings(max_examples=int(n * MORE))


anytext = st.text(max_size=60) | st.text(
    '。！？۔؟।॥။ก\u200b\u200c\u200d\u2028\r\t\x00\x1f .\n中문😀a', max_size=60)


@anything(400)
@given(anytext)
def test_sentences_of_any_script_lose_nothing_but_blanks(text):
    found = split_sentences(text)
    assert ''.join(''.join(found).split()) == ''.join(text.split())
    assert all(s.strip() for s in found) and not any('\n' in s for s in found)
    assert split_sentences('\n'.join(found)) == [s.strip() for s in found]


@cache
def bpe():
    return Tokenizer.train(['ab ba. 中文。 กขค 😀 x\u200dy', 'ab c'] * 30, 40)


@anything(300)
@given(anytext, st.lists(st.text(max_size=8), max_size=6))
def test_any_text_becomes_ids_with_its_places(text, words):
    tok = bpe()
    ids = tok.encode(text)
    assert all(i == UNK or i > MASK for i in ids)                   # text makes no special id
    again, offsets = tok.encode_offsets(text)
    assert again == ids and all(0 <= a <= b <= len(text) for a, b in offsets)
    assert [a for a, _ in offsets] == sorted(a for a, _ in offsets)
    flat, first = tok.encode_words(words)
    assert len(first) == len(words) and first == sorted(set(first)) and (not words or first[0] == 0)
    assert not words or len(flat) > first[-1]


jsonish = st.recursive(st.none() | st.booleans() | st.integers(-3, 20) | st.floats(allow_nan=False)
                       | st.text(max_size=5) | st.binary(max_size=3),
                       lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(
                           ['text', 'answer_start', 'tokens', 'a']), x, max_size=3), max_leaves=6)
COLUMNS = sorted({c for columns in TASK_COLUMNS.values() for c in columns} | {'text'})


@anything(400)
@given(st.dictionaries(st.sampled_from(COLUMNS), jsonish, max_size=6),
       st.sampled_from(['text', *TASK_COLUMNS]))
def test_any_row_is_used_or_explained_in_a_line(row, kind):
    why = explain_row(kind, row)
    if why: assert '\n' not in why and len(why) < 300
    elif kind == 'text': assert isinstance(row['text'], str)
    else:
        spec = TASKS[kind]
        try: clean = spec.clean(map_labels(kind, row, 'row 1', spec.labels), spec)
        except InputError as e: assert '\n' not in str(e)
        else: spec.encode([clean], spec, bpe(),
                          16)                 # whatever is left can be encoded


tags = st.lists(st.sampled_from(['O', 'B', 'I', 'B-A', 'I-A', 'B-A-x', 'I-A-x', 'E-A', 'S-B',
                                 'I-B']),
                min_size=1, max_size=9)


@anything(300)
@given(st.lists(st.tuples(tags, tags), min_size=1, max_size=4))
def test_tags_of_any_shape_score_as_seqeval_scores_them(pairs):
    from seqeval.metrics import f1_score
    gold, said = zip(*((g[:len(p)], p[:len(g)]) for g, p in pairs), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        want = 100 * f1_score([*gold], [*said], zero_division=0)
    assert math.isclose(span_f1([*gold], [*said]), want, abs_tol=1e-9)


@anything(200)
@given(st.lists(st.text('ab ', max_size=6) | st.text('中。', max_size=6), max_size=5),
       st.integers(20, 90))
def test_no_line_is_too_long_and_none_is_lost(lines, times):
    lines = [line * (times * 50) for line in lines]
    parts = list(_short_lines(lines))
    assert all(len(p.encode()) <= LONGEST for p in parts)
    assert ''.join(''.join(parts).split()) == ''.join(''.join(lines).split())


@anything(200)
@given(rows=st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=40), min_size=1, max_size=5),
       room=st.integers(3, 30))
def test_rows_of_any_length_keep_every_label(rows, room):
    spec, tok = TASKS['ner'], bpe()
    rows = [dict(tokens=['ab'] * len(r), ner_tags=r) for r in rows]
    data = TaskData(spec, rows, tok, room)
    assert len(data.lengths) == 0 or data.lengths.max() <= room
    found = [[] for _ in rows]
    for f in data.features: found[f.row] += [f.targets[i] for i in f.positions]
    assert found == [r['ner_tags'] for r in rows]


@anything(200)
@given(code=st.text(max_size=12) | st.from_regex('[a-z]{2,3}([-_][A-Za-z0-9]{2,4})?',
                                                 fullmatch=True))
def test_a_language_code_is_a_plain_part_of_a_path(code):
    try: check_code(code)
    except InputError: return
    assert Path(code).name == code == Path('x', code).name and not set(code) & set('/\\|<>+. \n')
    assert split_pairs([f'{code}-{code}', f'{code}-en', 'en-en'])[f'{code}-en'] == (code, 'en')
