"""Oracles: what the definition says must come out, re-enacted beside what the code does.

Each of these holds a fault away that once passed every other test: phi of the wrong language in the
validation losses, a zero-shot test through the wrong modules, an epoch chosen on the training set,
a perplexity of training text, a sampling temperature or a gradient clipping left out, a verdict
that ignores the sign of its statement, a development set read from the test split.
"""
import copy
import json
import math
from dataclasses import replace
from importlib import import_module

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from interference_nb.adapters import MultilingualLM, load_model
from interference_nb.data import Corpus, Stream, dev_batches
from interference_nb.tokenizers import BOS, EOS
from interference_nb.experiments import (SCALES, RunSpec, make_batches, open_run, run,
                                         smoke_test_spec)
from interference_nb.claims import Claim, holm, judge
from interference_nb.finetune import (FinetuneConfig, TaskModel, Trainer, evaluate,
                                      evaluate_languages, finetune, predict, tune)
from interference_nb.meta_adapters import MetaConfig, MetaStep
from interference_nb.pretrain import BatchSampler, JointStep, TrainConfig
from interference_nb.records import load, summarise
from interference_nb.reproduce import demo_claims
from interference_nb.tasks import TaskData, read_data, task_spec
from interference_nb.toy_languages import open_source, toy_tokenizer
from interference_nb.transformer import ModelConfig

LANGS = 'aa', 'bb', 'cc'
CFG = TrainConfig.toy(steps=3, seed=3, batch_size=4, seq_len=16, clip=1e9)


def apart(model, seed=0):
    "Give languages modules of their own that differ a lot: adapters start as the identity."
    rng = torch.Generator().manual_seed(seed)
    for own in model.phi.values():
        for p in own.values(): p.data = .4 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model


def text(lang, n_sentences=1, seed=0, n=2000):
    "Random text: ids that no language shares a distribution of."
    rng = np.random.default_rng([seed, *lang.encode()])
    ids = rng.choice(np.arange(5, 60), n, p=rng.dirichlet(np.full(55, .3)))
    return Corpus(ids.astype(np.uint16), lang, 'train', 1, n_sentences)


def stream(lang, cfg=CFG, seed=0, **kw):
    "A stream over random text."
    return Stream(text(lang, seed=seed, **kw), cfg.batch_size, cfg.seq_len, seed, 60, cfg.mask_prob)


class Watched:
    "A stream that keeps the batches it has given."
    def __init__(self, stream): self.stream, self.given = stream, []
    def __getattr__(self, name): return getattr(self.stream, name)

    def batch(self, i):
        self.given.append(self.stream.batch(i))
        return self.given[-1]


def descent(step, lr=1.):
    "Let a step go down its gradient: Adam's first step hides how long a gradient is."
    for name, opt in step.optimizers.items():
        step.optimizers[name] = torch.optim.SGD(opt.param_groups[0]['params'], lr)


class Alone:
    "The model of one language: shared parameters and phi of one, no routing at all."
    def __init__(self, cfg): self.model = MultilingualLM(cfg, ('one',), 'adpt').double()

    def loss(self, theta, phi, batch):
        "loss(theta, phi_j) of a batch of language j, a function of these two only."
        own = {n.replace(f'.{batch.lang}.', '.one.'): p for n, p in phi.items()}
        for name, p in (theta | own).items():
            module, _, leaf = name.rpartition('.')
            self.model.get_submodule(module)._parameters[leaf] = p     # also what is no leaf
        with sdpa_kernel(SDPBackend.MATH):      # the others have no second derivative
            return self.model.loss(replace(batch, lang='one'))


# ---- the meta step [paper Eq. 3-5, Algorithm 1] ----

@pytest.mark.parametrize('choices', [{}, dict(exclude_own_language=True),
                                     dict(phi_follows_training_gradient=True)], ids=str)
def test_meta_step_is_algorithm_1(choices):
    "Line 6: phi_i down the mean of L_val,j(theta', phi_j), each j with its own phi. Then line 7."
    torch.manual_seed(0)
    cfg = ModelConfig.toy(60, dropout=0.)
    model, alone = apart(MultilingualLM(cfg, LANGS, 'adpt').double()), Alone(cfg)
    beta, lr = .3, .5
    step = MetaStep(model, CFG, MetaConfig(beta=beta, estimator='exact', **choices))
    descent(step)
    sampler = BatchSampler({l: stream(l) for l in LANGS}, CFG)
    val = sampler.validation = {l: Watched(s) for l, s in sampler.validation.items()}
    i, (train,) = sampler.lang(0), sampler.train(0)
    leaf = lambda params: {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    theta, phi = leaf(model.theta), {l: leaf(own) for l, own in model.phi.items()}
    out = step(0, sampler, lr)

    # theta' = theta - beta dL_train(theta, phi_i) / dtheta, a function of phi_i too (Eq. 4)
    g = torch.autograd.grad(alone.loss(theta, phi[i], train), theta.values(), create_graph=True)
    moved = {n: p - beta * d for (n, p), d in zip(theta.items(), g, strict=True)}
    asked = [l for l in LANGS if l != i] if 'exclude_own_language' in choices else LANGS
    assert {l: len(s.given) for l, s in val.items()} == {l: int(l in asked) for l in LANGS}
    L_val = sum(alone.loss(moved, phi[j], val[j].given[0]) for j in asked) / len(asked)
    g = torch.autograd.grad(L_val, phi[i].values())
    new = {n: (p - lr * d).detach() for (n, p), d in zip(phi[i].items(), g, strict=True)}
    # line 7: theta down its training gradient at the new phi_i; phi_i down its own, if it follows
    new = leaf(new)
    L_train = alone.loss(theta, new, train)
    g, own = (torch.autograd.grad(L_train, x.values(), retain_graph=True) for x in (theta, new))
    rate = lr if 'phi_follows_training_gradient' in choices else 0.
    new = {n: (p - rate * d).detach() for (n, p), d in zip(new.items(), own, strict=True)}
    now = {n: (p - lr * d).detach() for (n, p), d in zip(theta.items(), g, strict=True)}

    assert float(out['val_loss']) == pytest.approx(L_val.item(), rel=1e-6)
    assert float(out['loss']) == pytest.approx(L_train.item(), rel=1e-6)
    for n, p in model.named_parameters():
        lang = next((l for l in LANGS if f'.{l}.' in n), None)
        expected = now[n] if lang is None else new[n] if lang == i else phi[lang][n].detach()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-8, atol=1e-10, msg=n)


def test_validation_batches_are_not_the_training_batches():
    "Both come from the training text, but no row of one meets the same hidden tokens in the other."
    sampler = BatchSampler({l: stream(l) for l in LANGS}, CFG)
    for l in LANGS:
        a, b = sampler.streams[l].batch(0), sampler.validation[l].batch(0)
        assert a.lang == b.lang == l and not torch.equal(restored(a), restored(b))


def test_after_the_shared_update_the_meta_step_takes_another_batch():
    "Shared first: theta has just followed its batch, on which an inner step would see nothing."
    model, seen = apart(MultilingualLM(ModelConfig.toy(60), LANGS, 'adpt')), []
    sampler = BatchSampler({l: stream(l) for l in LANGS}, CFG)
    meta = MetaConfig(order='shared first', estimator='first_order')
    step, loss = MetaStep(model, CFG, meta), model.loss
    model.loss = lambda batch: (seen.append(batch), loss(batch))[1]
    step(0, sampler, .1)
    shared, inner, *val = seen
    rows = [tuple(restored(b).flatten().tolist()) for b in seen]
    assert rows[0] == tuple(restored(sampler.train(0)[0]).flatten().tolist())
    assert inner.lang == shared.lang == sampler.lang(0) and [b.lang for b in val] == list(LANGS)
    assert len(set(rows)) == len(rows) == 5


# ---- gradients are clipped: the test that is meant for it ----

def gradients(loss, params):
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]


def clipped(grads, most):
    "Shorten gradients, all together, to a norm of at most `most`."
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert norm > 3 * most                      # else there is nothing to see
    return [g * (most / norm) for g in grads]


@pytest.mark.parametrize('meta', [None, MetaConfig(estimator='first_order', beta=1e-9)])
def test_pretraining_steps_clip(meta):
    "Under huge gradients a step moves all its parameters together by lr * clip, and no further."
    cfg, lr = replace(CFG, clip=.02), .5
    torch.manual_seed(0)
    model = apart(MultilingualLM(ModelConfig.toy(60, dropout=0.), LANGS, 'adpt').double())
    step = MetaStep(model, cfg, meta) if meta else JointStep(model, cfg)
    descent(step)
    sampler = BatchSampler({l: stream(l) for l in LANGS}, cfg)
    val = sampler.validation = {l: Watched(s) for l, s in sampler.validation.items()}
    own, (batch,), named = sampler.lang(0), sampler.train(0), dict(model.named_parameters())
    phi = [n for n in model.phi[own]] if meta else []
    before = {n: p.detach().clone() for n, p in named.items()}
    expected = dict(before)
    def move(names, loss):
        g = clipped(gradients(loss, [copied[n] for n in names]), cfg.clip)
        expected.update({n: expected[n] - lr * d for n, d in zip(names, g, strict=True)})
    copied = dict((twin := copy.deepcopy(model)).named_parameters())
    step(0, sampler, lr)
    if meta:                        # phi first, by the validation losses; beta leaves theta alone
        move(phi, sum(twin.loss(val[l].given[0]) for l in LANGS) / len(LANGS))
        twin.load_state_dict(expected)
    shared = [n for n in named if n in model.theta] if meta else list(named)
    move(shared, twin.loss(batch))
    for n, p in named.items():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-5, atol=1e-7, msg=n)


# ---- languages are drawn with P_i ~ L_i^(1/T) [paper sec. 3.2] ----

@pytest.mark.parametrize('T', [1., 5.])
@pytest.mark.parametrize('mixed', [False, True])
def test_languages_are_drawn_with_the_temperature(T, mixed):
    sizes, n = dict(aa=1000, bb=100, cc=10), 6000
    cfg = replace(CFG, steps=n // 3 if mixed else n, accumulate=3, temperature=T, mixed=mixed)
    sampler = BatchSampler({l: Stream(text(l, s), 4, 16, 0, 60) for l, s in sizes.items()}, cfg)
    if mixed:                       # what a batch holds, not what a table says
        few = range(60)
        drawn = [b.lang for k in few for b in sampler.train(k)]
        assert drawn == [sampler.langs[i] for i in sampler.order[few].flat]
    drawn = np.array(sampler.langs)[sampler.order].ravel()
    assert len(drawn) == n
    powers = {l: s ** (1 / T) for l, s in sizes.items()}
    for l in sizes:
        P = powers[l] / sum(powers.values())
        assert abs((drawn == l).mean() - P) < 4 * math.sqrt(P * (1 - P) / n), (T, l)


# ---- perplexity is of the test text ----

def restored(batch):
    "Put the hidden tokens of a batch back."
    tokens = batch.tokens.clone()
    tokens.view(-1)[batch.positions] = batch.targets
    return tokens


@pytest.mark.parametrize('validation', ['train', 'held-out'])
def test_reported_perplexity_is_of_the_test_text(tmp_path, validation):
    "Tokenise the test text by hand, mask it with the fixed masks, average over masked tokens."
    spec = smoke_test_spec(RunSpec('meta_adpt', ('en', 'x3'), ('en', 'x3'), 0, SCALES['toy'],
                                   tasks=(), meta=MetaConfig(estimator='first_order',
                                                             validation=validation)),
                           steps=2, data='toy')
    rows = run(spec, tmp_path)
    source = open_source('toy', seed=0)
    tokenizer = toy_tokenizer(source, spec.langs)
    model = load_model(tmp_path/spec.name/'checkpoint.safetensors', tokenizer)
    cfg, found = spec.train, {}
    for split in ('test', 'validation', 'train'):
        for lang in spec.langs:
            ids = [i for d in source.text(lang, split) for i in (BOS, *tokenizer.encode(d), EOS)]
            corpus = Corpus(np.array(ids, np.uint16), lang, split, 1, 1)
            total = count = 0
            for batch in dev_batches(corpus, 64, cfg.seq_len, tokenizer.vocab_size, cfg.mask_prob,
                                     n_batches=8):
                scores = model.scores(model(batch.tokens, lang))
                scores = scores.flatten(0, 1)[batch.positions]
                total += F.cross_entropy(scores, batch.targets, reduction='sum').item()
                count += len(batch.targets)
            found[split, lang] = math.exp(total / count)
    end = next(row for row in rows if row['kind'] == 'end')
    _, _, tokenizer, corpora, _ = open_run(tmp_path/spec.name, 'toy')
    sampler, _ = make_batches(spec, tokenizer, corpora)
    for lang in spec.langs:                         # nor does the meta step look at that text
        split = 'train' if validation == 'train' else 'validation'
        assert sampler.validation[lang].corpus is corpora[lang][split]
        assert end['ppl'][lang] == pytest.approx(found['test', lang], rel=1e-5)
        for other in ('validation', 'train'):       # else the test could not tell
            assert abs(found[other, lang] / found['test', lang] - 1) > 1e-4


# ---- finetuning: which rows, which epoch, whose modules [paper sec. 3.1, App. A] ----

WORDS = [w + s for w in 'ba da ga ka la ma na pa ra sa'.split() for s in ('', 'i', 'o')]


class Splits:
    "Sentences of random words, labelled by a rule of their language; each split is another draw."
    name, languages = 'made up', LANGS
    n = dict(train=96, validation=40, test=40)

    def __init__(self, **rows): self.rows = rows        # in place of a split's own

    def revision(self): return {}
    def set_aside(self, kind, lang): return ()
    def count(self, task, lang, split): return self.n[split]

    def examples(self, task, lang, split):
        if split in self.rows: return self.rows[split]
        rng = np.random.default_rng([*lang.encode()])
        rule = dict(zip(WORDS, rng.integers(0, 4, len(WORDS)).tolist()))
        rng = np.random.default_rng([*lang.encode(), *split.encode()])
        rows = rng.choice(WORDS, (self.n[split], 6)).tolist()
        return [dict(tokens=row, upos=[rule[w] for w in row]) for row in rows]


class Words:
    "An id for each word."
    vocab_size, fingerprint, bos, eos, pad = 60, 'words', 0, 1, 2
    def encode_words(self, words): return [5 + WORDS.index(w) for w in words], [*range(len(words))]


def untrained(langs=LANGS, seed=0):
    torch.manual_seed(seed)
    return apart(MultilingualLM(ModelConfig.toy(60, dropout=0.), langs, 'adpt'))


def rows_of(lang, split):
    spec = task_spec('pos')
    return TaskData(spec, Splits().examples('pos', lang, split), Words(), 16)


TUNE = FinetuneConfig(epochs=7, batch_size=16, lr=2e-3, max_len=16)


def test_best_epoch_is_the_development_sets():
    "Label the development set as the third epoch does: its best, while training goes on rising."
    def epochs(dev):                    # one training run, whatever its development set
        model = untrained()
        torch.manual_seed(TUNE.seed)
        run = Trainer(TaskModel(model, task_spec('pos')), rows_of('aa', 'train'), dev, 'aa', TUNE)
        for _ in range(TUNE.epochs):
            run.epoch()
            yield run.model
    dev, train, best = rows_of('aa', 'validation'), rows_of('aa', 'train'), 3
    models = [copy.deepcopy(m) for m in epochs(dev)]
    labels = [[m.spec.labels.index(t) for t in tags]
              for m in models[best - 1:best] for tags in predict(m, dev, 'aa')]
    rows = [dict(tokens=r['tokens'], upos=l) for r, l in zip(dev.rows, labels, strict=True)]
    dev = TaskData(dev.spec, rows, Words(), 16)
    scores = [evaluate(m, dev, 'aa')['f1'] for m in models]
    on_train = [evaluate(m, train, 'aa')['f1'] for m in models]
    assert scores[best - 1] == 100 > sorted(scores)[-2] and np.argmax(on_train) > best

    tuned, history, epoch = tune(untrained(), Words(), 'pos', Splits(validation=rows), 'aa', TUNE)
    assert [row['f1'] for row in history] == scores
    assert epoch == best
    kept = models[best - 1].state_dict()
    for n, t in tuned.state_dict().items(): assert torch.equal(t, kept[n]), n


def test_each_split_is_its_own():
    "The rows read for a split are the source's rows of that split, for each of the three."
    for split in ('train', 'validation', 'test'):
        data = read_data('pos', Splits(), 'bb', split, Words(), 16)
        rows = Splits().examples('pos', 'bb', split)
        assert [(r['tokens'], r['labels']) for r in data.rows] == [(r['tokens'], r['upos'])
                                                                   for r in rows]


def test_zero_shot_goes_through_the_languages_own_modules():
    "What is said of several languages is what is said of each, and what a model of only it says."
    model, *_ = tune(untrained(), Words(), 'pos', Splits(), 'aa', TUNE)
    tests = {l: rows_of(l, 'test') for l in LANGS}
    found = evaluate_languages(model, tests)
    for lang, data in tests.items():
        alone = TaskModel(untrained(('one',)), task_spec('pos'))
        own = {n.replace(f'.{lang}.', '.one.'): p for n, p in model.named_parameters()
               if not any(f'.{l}.' in n for l in LANGS if l != lang)}
        alone.load_state_dict({n: p.detach() for n, p in own.items()})
        scores = {l: evaluate(model, data, l) for l in LANGS}
        assert found['scores'][lang] == scores[lang] == evaluate(alone, data, 'one')
        assert len({s['accuracy'] for s in scores.values()}) == len(LANGS)  # routes differ
        assert predict(model, data, lang) == predict(alone, data, 'one')
        hits, total = found['counts'][lang].sum(0)
        assert 100 * hits / total == pytest.approx(scores[lang]['f1'])


def test_finetuning_reports_the_test_split_language_by_language():
    tuned, _, best = tune(untrained(), Words(), 'pos', Splits(), 'aa', TUNE)
    said = finetune(untrained(), Words(), 'pos', Splits(), 'aa', list(LANGS), TUNE)
    assert said['best_epoch'] == best
    for l in LANGS: assert said['scores'][l] == evaluate(tuned, rows_of(l, 'test'), l)


def test_a_search_compares_the_trials_best_epochs(monkeypatch):
    "Of each trial its best development score counts, of equals the first; that one is tested."
    dev = {1.: (20., 30.), 2.: (10., 90., 5.), 3.: (40., 50.), 4.: (90., 10.)}   # by rate: epochs
    def trained(model, tokenizer, spec, source, lang, cfg, *_):
        torch.manual_seed(int(cfg.lr))
        scores = dev[cfg.lr]
        rows = [dict(epoch=k, f1=f, accuracy=0.) for k, f in enumerate(scores, 1)]
        return SimpleNamespace(model=TaskModel(model, spec), history=rows,
                               best_epoch=lambda: int(np.argmax(scores)) + 1,
                               record=SimpleNamespace(rows=[dict(notes={})]))
    monkeypatch.setattr(import_module('interference_nb.finetune'), '_tune', trained)
    found = finetune(untrained(), Words(), 'pos', Splits(), 'aa', ['aa', 'bb'], TUNE,
                     dict(lr=tuple(dev)))
    assert found['finetune']['lr'] == 2. and found['best_epoch'] == 2
    tuned = trained(untrained(), None, task_spec('pos'), None, None, replace(TUNE, lr=2.)).model
    for l in ('aa', 'bb'): assert found['scores'][l] == evaluate(tuned, rows_of(l, 'test'), l)


def test_finetuning_clips():
    "With huge gradients every parameter moves by lr * clip together."
    cfg = replace(TUNE, clip=.01, lr=.5)
    run = Trainer(TaskModel(untrained(), task_spec('pos')), rows_of('aa', 'train'),
                 rows_of('aa', 'validation'), 'aa', cfg)
    groups = run.optimizers['all'].param_groups
    tuned = [p for g in groups for p in g['params']]
    run.optimizers['all'] = torch.optim.SGD([dict(params=g['params'], peak=.5) for g in groups])
    before, index = [p.detach().clone() for p in tuned], np.arange(16)
    batch = run.data.batch(index)
    grads = clipped(gradients(F.cross_entropy(run.model(batch, 'aa').flatten(0, 1),
                                              batch.targets.flatten()), tuned), cfg.clip)
    run.step(index, 1.)
    for p, old, g in zip(tuned, before, grads, strict=True):
        torch.testing.assert_close(p.detach(), old - .5 * g, rtol=1e-3, atol=1e-6)


# ---- verdicts ----

def made_up(differences):
    "Results of two systems over seeds, whose paired differences are given."
    lines = [(system, s, 10. + s + d * (system == 'other')) for s, d in enumerate(differences)
             for system in ('other', 'joint')]
    return pd.DataFrame(lines, columns=['system', 'seed', 'm']).set_index(['system', 'seed'])


TRUTH = [((1., 1.1, .9), +1, 'supported'), ((1., 1.1, .9), -1, 'contradicted'),
         ((-1., -1.1, -.9), +1, 'contradicted'), ((-1., -1.1, -.9), -1, 'supported'),
         ((1., -1.1, .1), +1, 'undecided'), ((1., -1.1, .1), -1, 'undecided'),
         ((1.,), +1, 'undecided')]


@pytest.mark.parametrize('differences, sign, verdict', TRUTH)
def test_verdicts_respect_the_sign(differences, sign, verdict):
    "More than zero speaks for 'more' and against 'less'; all signs turned, all verdicts turn."
    claim = Claim('', 'm', 'other', 'joint', sign)
    found, = judge(made_up(differences), [claim])['verdict']
    assert found == verdict
    opposite = {'supported': 'contradicted', 'contradicted': 'supported'}
    turned, = judge(made_up(differences), [replace(claim, sign=-sign)])['verdict']
    assert turned == opposite.get(verdict, verdict)
    mirrored, = judge(made_up([-d for d in differences]), [claim])['verdict']
    assert mirrored == opposite.get(verdict, verdict)


# By hand: mean 0.5, sd 0.1, se 0.058; t = (2 - 0.5) / 0.058 = 26 against 2.92 (2 degrees).
ALIKE = [((.5, .6, .4), 'supported'), ((-.5, -.6, -.4), 'supported'),
         ((3., 3.1, 2.9), 'contradicted'), ((-3., -3.1, -2.9), 'contradicted'),
         ((2., 2.1, 1.9), 'undecided'), ((9., -9., .1), 'undecided'), ((0.,), 'undecided'),
         # mean 1, sd 0.5, se 0.289: t = 3.46 > 2.92, though the 95% interval reaches 2.24
         ((.5, 1., 1.5), 'supported'),
         # mean 1, sd 0.6, se 0.346: t = 2.89 < 2.92
         ((.4, 1., 1.6), 'undecided')]


@pytest.mark.parametrize('differences, verdict', ALIKE)
def test_as_good_means_within_two_points_either_way(differences, verdict):
    "A difference that shows may still be small, and one that does not show may still be large."
    points = made_up(differences).rename(columns={'m': 'NER within'})
    found, = judge(points, [Claim('', 'NER within', 'other', 'joint', 0)])['verdict']
    assert found == verdict


EQUAL = [((.5, -.6, .4), 'NER within', 'equivalent'), ((.5, -.6, .4), 'cosine cross', 'undecided'),
         ((.5, -.6, .4), 'loss', 'undecided'), ((.005, -.006, .004), 'loss', 'equivalent'),
         ((5., -6., 4.), 'NER within', 'undecided'), ((.5,), 'NER within', 'undecided'),
         ((.5, .6, .4), 'NER within', 'supported')]         # small, but there


@pytest.mark.parametrize('differences, metric, verdict', EQUAL)
def test_no_difference_is_not_the_same_as_equal(differences, metric, verdict):
    "Two points of a score or 0.02 nats of a loss do not matter, and it takes a test to say so."
    numbers = made_up(differences).rename(columns={'m': metric})
    found, = judge(numbers, [Claim('', metric, 'other', 'joint', +1)])['verdict']
    assert found == verdict


def transfer(joint, scratch, better=(2., 2.1, 1.9)):
    "Zero-shot scores of joint, of random weights, and of a system better than joint."
    of = {'joint': joint, 'scratch': scratch,
          'adpt': [j + d for j, d in zip(joint, better, strict=True)]}
    lines = [(s, i, v) for s, values in of.items() for i, v in enumerate(values)]
    return pd.DataFrame(lines, columns=['system', 'seed', 'POS zero-shot']).set_index(
        ['system', 'seed'])


@pytest.mark.parametrize('joint, scratch, verdict', [
    ((38., 37., 40.), (20., 21., 22.), 'supported'),
    ((20., 22., 21.), (21., 20., 21.), 'no better than random weights'),
    ((20., 21., 22.), (30., 31., 32.5), 'no better than random weights'),   # below them
    ((38., 37., 40.), (), 'control not run'), ((38., 37., 40.), (20.,), 'undecided')])
def test_nothing_is_said_of_transfer_where_random_weights_do_as_well(joint, scratch, verdict):
    "The difference is the same in all cases; what decides is whether joint transfers at all."
    numbers = transfer(joint, scratch)
    about = [Claim('', 'POS zero-shot', 'adpt', 'joint', +1),
             Claim('', 'POS zero-shot', 'adpt', 'joint', -1)]
    turned = {'supported': 'contradicted'}
    assert list(judge(numbers, about)['verdict']) == [verdict, turned.get(verdict, verdict)]
    within = numbers.rename(columns=lambda c: 'POS within')
    found, = judge(within, [replace(about[0], metric='POS within')])['verdict']
    assert found == 'supported'                             # which needs no transfer


def test_statements_made_together_are_corrected_together():
    "Holm by its definition: reject in order, as long as p times the number of those left is small."
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(rng.integers(1, 8)) ** 3
        adjusted = holm(p)
        for level in (.01, .05, .2):
            rejected = set()
            for i in np.argsort(p):
                if p[i] * (len(p) - len(rejected)) >= level: break
                rejected.add(int(i))
            assert rejected == set(np.flatnonzero(adjusted < level))
    assert list(holm([.01, float('nan')])) == [.02, 1.]     # a statement that was not run counts


# ---- what a table says of records ----

def write_run(folder, langs, system, seed, ppl, f1):
    "Write a run's record by hand; f1: {(task, trained in, tested in): percent}."
    about = dict(system=system, langs=langs, pair=['en', 'fr'], seed=seed, max_sentences={},
                 format=2)
    rows = [dict(kind='start', config=dict(run=about), hardware='CPU'),
            dict(kind='eval', step=5, passes=10, ppl={l: 99. for l in langs}, loss=1.),
            dict(kind='end', step=10, passes=20, cpu_s=30., wall_s=70., ppl=ppl)]
    for task, train in dict.fromkeys(k[:2] for k in f1):
        scores = {l: dict(f1=f, accuracy=1.) for (*of, l), f in f1.items() if of == [task, train]}
        rows.append(dict(kind='finetune', task=task, train_lang=train, scores=scores, wall_s=1.))
    home = folder/f'{system}-{"+".join(langs)}-{seed}'
    home.mkdir()
    lines = [json.dumps(row) for row in (*rows, dict(kind='done'))]
    (home/'record.jsonl').write_text('\n'.join(lines) + '\n')


def test_equal_batches_are_claimed_of_two_languages_only(tmp_path):
    "At twice the steps each of three languages gets two thirds of mono's batches."
    said = []
    for langs in (['en', 'fr'], ['en', 'fr', 'sw']):
        home = tmp_path/str(len(langs))
        home.mkdir()
        write_run(home, langs, 'joint2x', 0, dict.fromkeys(langs, 8.), {})
        for l in langs: write_run(home, [l], 'mono', 0, {l: 4.}, {})
        numbers = summarise(load(home))
        said.append(['as many batches' in c.text for c in demo_claims(numbers)])
    assert sum(said[0]) == 1 and sum(said[1]) == 0 and len(said[0]) == len(said[1]) + 1


def test_a_table_averages_what_it_says(tmp_path):
    "Within: tested where trained; zero-shot: elsewhere; the loss is the mean log perplexity."
    f1 = {('ner', 'en', 'en'): 80., ('ner', 'en', 'fr'): 30., ('ner', 'fr', 'fr'): 60.,
          ('ner', 'fr', 'en'): 20., ('pos', 'en', 'en'): 90., ('pos', 'en', 'fr'): 50.}
    write_run(tmp_path, ['en', 'fr'], 'joint', 3, dict(en=8., fr=2.), f1)
    write_run(tmp_path, ['en'], 'mono', 3, dict(en=4.), {('ner', 'en', 'en'): 70.})
    write_run(tmp_path, ['fr'], 'mono', 3, dict(fr=16.), {('ner', 'fr', 'fr'): 40.})
    found = summarise(load(tmp_path))
    joint, mono = (found.loc[(system, 3)].dropna().to_dict() for system in ('joint', 'mono'))
    assert joint == pytest.approx({
        'NER within': 70., 'NER zero-shot': 25., 'POS within': 90., 'POS zero-shot': 50.,
        'ppl en': 8., 'ppl fr': 2., 'loss': math.log(4), 's/step': 3., 'passes/step': 2.})
    assert mono == pytest.approx({'NER within': 55., 'ppl en': 4., 'ppl fr': 16.,
                                  'loss': math.log(8), 's/step': 3., 'passes/step': 2.})
