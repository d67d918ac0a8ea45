"""Formulas: each part of the method beside the same thing written out by hand, on few numbers."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from interference_nb.adapters import VARIANTS, Adapter, MultilingualLM
from interference_nb.data import Batch, train_tokenizer
from interference_nb.files import InputError
from interference_nb.finetune import FinetuneConfig, TaskModel, Trainer
from interference_nb.gradient_probes import (CombinedStep, GradientProbe, ProbeConfig, cosines,
                                             disattenuated_cosine, pcgrad)
from interference_nb.l0_pruning import (GateGroup, Gates, HardConcrete, PruneConfig, columns,
                                        gate_cosines, gate_groups, gated, learn_gates,
                                        partition_gates, prune_study)
from interference_nb.meta_adapters import exact, finite_difference, hypergradient
from interference_nb.pretrain import BatchSampler, JointStep, TrainConfig, make_adam, perplexity
from interference_nb.tasks import decode_span, task_spec
from interference_nb.transformer import ModelConfig
from test_oracles import LANGS, apart, descent, rows_of, stream, untrained

CFG = TrainConfig.toy(steps=6, seed=3, batch_size=4, seq_len=16, clip=1e9)


def model_of(variant='adpt', **kw):
    torch.manual_seed(0)
    return apart(MultilingualLM(ModelConfig.toy(60, **{**dict(dropout=0.), **kw}), LANGS, variant))


def feed_of(cfg, langs=LANGS): return BatchSampler({l: stream(l, cfg) for l in langs}, cfg)


# ---- data ----

class Alphabets:
    "Two languages without a common letter, one with twenty times the text."
    name, languages = 'made up', ('aa', 'bb')
    def revision(self): return {}

    def text(self, lang, split='train'):
        rng = np.random.default_rng([*lang.encode()])
        letters = list('abcdefgh' if lang == 'aa' else 'stuvwxyz')
        for _ in range(4000 if lang == 'aa' else 200):
            yield ' '.join(''.join(rng.choice(letters, 4)) for _ in range(4)) + '.'


def test_the_vocabulary_follows_the_language_distribution():
    "At T = 1 nearly all merges are the large language's, at a high temperature half of them."
    share = {}
    for T in (1., 1e9):
        tok = train_tokenizer(Alphabets(), ('aa', 'bb'), 400, temperature=T, workers=1)
        large, small = (len({i for d in Alphabets().text(lang) for i in tok.encode(d)})
                        for lang in ('aa', 'bb'))
        share[T] = small / (large + small)
    assert share[1.] < .2 and .4 < share[1e9] < .6


# ---- pretraining ----

def test_adam_by_hand():
    cfg = replace(CFG, betas=(.6, .7), lr=.1)
    p = torch.tensor([1., -2.], requires_grad=True)
    opt, x, m, v = make_adam([p], cfg), p.detach().numpy().copy(), 0., 0.
    for k, g in enumerate(np.array([[.3, -1.], [2., .5], [-.1, .1]], np.float32), 1):
        p.grad = torch.from_numpy(g.copy())
        opt.step()
        m, v = .6 * m + .4 * g, .7 * v + .3 * g * g
        x = x - .1 * m / (1 - .6**k) / (np.sqrt(v / (1 - .7**k)) + 1e-8)
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-5)


def test_a_step_follows_the_mean_of_its_batches():
    cfg = replace(CFG, accumulate=3)
    model, sampler = model_of().double(), feed_of(cfg)
    step, before = JointStep(model, cfg), [p.detach().clone() for p in model.parameters()]
    descent(step)
    batches = sampler.train(0)
    loss = sum(model.loss(b) for b in batches) / 3
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert float(step(0, sampler, .5)['loss']) == pytest.approx(loss.item())
    for p, old, g in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), old if g is None else old - .5 * g)


def test_perplexity_is_without_dropout_and_leaves_the_mode():
    model, whole = model_of(dropout=.5).train(), model_of(dropout=0.).eval()
    batches = [stream('aa').batch(k) for k in range(3)]
    assert perplexity(model, batches) == perplexity(whole, batches) and model.training
    batches[1] = Batch(batches[1].tokens, batches[1].positions[:2], batches[1].targets[:2], 'aa')
    nats = sum(F.cross_entropy(whole.scores(whole(b.tokens, 'aa')).flatten(0, 1)[b.positions],
                               b.targets, reduction='sum').item() for b in batches)
    assert math.log(perplexity(whole, batches)) == pytest.approx(
        nats / sum(len(b.targets) for b in batches), rel=1e-5)


def test_another_seed_draws_other_languages():
    orders = [feed_of(replace(CFG, steps=50, seed=s)).order.tolist() for s in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


# ---- adapters [paper Eq. 6-7; sec. 3.3] ----

def test_an_adapter_by_hand():
    torch.manual_seed(0)
    adapter, z = Adapter(4, 2).double(), torch.randn(3, 4).double()
    assert torch.equal(adapter(z), z)                           # the identity until trained
    adapter.up.weight.data = torch.randn(4, 2).double()
    h = z @ adapter.down.weight.T
    h = h * .5 * (1 + torch.erf(h / math.sqrt(2)))              # GELU
    torch.testing.assert_close(adapter(z), z + h @ adapter.up.weight.T)


OWN = dict(joint=(), ffn=('.ffn.',), attn=('.attention.',), share_adpt=(),
           adpt=('.attention_adapter.', '.ffn_adapter.'))


@pytest.mark.parametrize('variant', VARIANTS)
def test_theta_and_phi_divide_the_parameters(variant):
    model = model_of(variant)
    named = dict(model.named_parameters())
    parts = [model.theta, *model.phi.values()]
    assert sorted(n for part in parts for n in part) == sorted(named)
    assert len({p.data_ptr() for part in parts for p in part.values()}) == len(named)
    for lang, own in model.phi.items():
        assert bool(own) == bool(OWN[variant])
        assert all(f'.{lang}.' in n and any(o in n for o in OWN[variant]) for n in own)
    assert any('_adapter.' in n for n in named) == variant.endswith('adpt')
    if not OWN[variant]: return
    tokens = stream('aa').batch(0).tokens
    ways = [model(tokens, l) for l in LANGS]
    for p in model.phi['aa'].values(): p.data += .1
    again = [model(tokens, l) for l in LANGS]
    assert [torch.equal(a, b) for a, b in zip(ways, again)] == [False, True, True]


def test_a_language_added_like_another_goes_its_own_way():
    model = model_of()
    model.add_language('dd', like='aa')
    tokens = stream('aa').batch(0).tokens
    before = model(tokens, 'aa')
    assert torch.equal(model(tokens, 'dd'), before)
    for p in model.phi['dd'].values(): p.data += .1
    assert torch.equal(model(tokens, 'aa'), before) and not torch.equal(model(tokens, 'dd'), before)


# ---- gates [paper Eq. 1; Louizos et al. 2018] ----

def test_gates_multiply_their_own_columns():
    model = model_of('joint')
    group, = (g for g in columns(model, r'blocks.0.attention\.out\.weight$', 2))
    weight = model.blocks[0].attention.out.weight
    half = weight.shape[1] // 2
    with gated(model, {group: torch.tensor([.25, 2.])}):
        now = model.blocks[0].attention.out.weight
        assert torch.equal(now[:, :half], weight[:, :half] / 4)
        assert torch.equal(now[:, half:], weight[:, half:] * 2)
    assert model.blocks[0].attention.out.weight is weight


def test_only_shared_weights_are_gated():
    for variant in ('adpt', 'share_adpt'):
        names = {g.weight for g in columns(model_of(variant), r'weight$')}
        assert any('adapter' in n for n in names) == (variant == 'share_adpt')


def test_a_hard_concrete_gate_by_hand():
    a, u = torch.tensor(.7).double(), torch.tensor([.1, .5, .6, .9]).double()
    s = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + a) / .5))
    expected = (s * 1.2 - .1).clamp(0, 1)
    torch.testing.assert_close(HardConcrete(.5).sample(a, u), expected)


def gates_of(*values, sizes=(2, 2)):
    "Gates of two weights: of 4 x 2 and 8 x 2, a gate for each column."
    groups = [GateGroup(f'blocks.{i}.ffn.out.weight', 1, n, (4 * (i + 1), n))
              for i, n in enumerate(sizes)]
    return Gates(dict(zip(groups, torch.tensor(values).split(sizes), strict=True)))


def test_a_gate_counts_by_its_weights():
    gates = gates_of(1., -1., 1., 1.)
    p = HardConcrete().open_probability(torch.tensor([1., -1., 1., 1.]))
    assert gates.expected_open_fraction() == pytest.approx(float(
        p @ torch.tensor([4., 4., 8., 8.]) / 24))
    assert gates.kept_fraction() == pytest.approx(20 / 24)


def test_cosines_of_gates_by_hand():
    a, b = torch.tensor([1., 2., 4.]), torch.tensor([3., 1., 2.])
    found = gate_cosines([(a, b)])
    cos = lambda x, y: float(x @ y / x.norm() / y.norm())
    assert found['raw'] == pytest.approx(cos(a, b))
    assert found['centred'] == pytest.approx(cos(a - a.mean(), b - b.mean()))
    shuffled = [cos(a, b[list(p)]) for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1),
                                             (2, 1, 0))]
    assert found['permuted'] == pytest.approx(np.mean(shuffled))
    assert found['permuted_sd'] == pytest.approx(np.std(shuffled))


def test_gates_are_sorted_by_who_keeps_them():
    found = partition_gates(dict(aa=gates_of(1., 1., -1., -1.), bb=gates_of(1., -1., 1., -1.)))
    said = {kind: torch.cat([*own.values()]).int().tolist() for kind, own in found.items()}
    assert said == {'universal': [1, 0, 0, 0], 'only aa': [0, 1, 0, 0], 'only bb': [0, 0, 1, 0],
                    'unused': [0, 0, 0, 1]}


def test_each_pruning_has_its_own_batches_and_noise():
    "And a language under the others' gates is under theirs only."
    model, cfg, drawn = model_of('joint'), PruneConfig(steps=3, lr=1e-9, batch_size=4), {}
    kept = {}
    def loss(lang): return lambda k: (drawn.setdefault(lang, []).append(k),
                                      model.loss(stream(lang).batch(k)))[1]
    def get(lang, seed, learn):
        gates = learn()
        kept[lang, seed] = gates.flat()
        return gates
    worth = lambda lang: model.blocks[0].ffn.out.weight.abs().sum().item()
    study = prune_study(model, {l: loss(l) for l in LANGS[:2]}, worth, cfg, get=get)
    assert drawn == dict.fromkeys(LANGS[:2], list(range(6)))
    noise = {run: g - cfg.init for run, g in kept.items()}      # nothing is learned at that rate
    pairs = [(a, b) for a in noise for b in noise if a < b]
    assert len(pairs) == 6
    assert all(abs(F.cosine_similarity(noise[a], noise[b], 0)) < .3 for a, b in pairs)
    own, swapped = study['ppl']['own'], study['ppl']['swapped']
    assert swapped['aa'] == pytest.approx(own['bb']) and swapped['bb'] == pytest.approx(own['aa'])
    assert own['aa'] != own['bb']


def test_the_penalty_rises_over_its_warm_up():
    "Where the loss is flat, the first step's gradient is lambda / warm-up times that of the L0."
    model, groups = model_of('joint'), gate_groups(model_of('joint'), ('neurons',))
    flat = lambda k: 0 * model.loss(stream('aa').batch(0))
    found = {}
    for warmup in (1, 4):
        grads = []
        leaf = lambda opt: opt.param_groups[0]['params'][0]
        hook = register_optimizer_step_pre_hook(
            lambda opt, *_, grads=grads, leaf=leaf: grads.append(leaf(opt).grad.clone()))
        try: learn_gates(model, flat, groups, PruneConfig(steps=2, warmup=warmup, l0=.5))
        finally: hook.remove()
        found[warmup] = grads
    torch.testing.assert_close(found[4][0], found[1][0] / 4)


# ---- gradients of several languages ----

def test_cosines_of_gradients_by_hand():
    "Each pair of languages by independent gradients, whatever gradients came before."
    x = torch.tensor([1., 2., 3.], requires_grad=True)
    ways = dict(aa=torch.tensor([1., 0., 2.]), bb=torch.tensor([-1., 3., .5]),
                cc=torch.tensor([2., 1., 1.]))
    draw = lambda lang, turn: [lambda: (ways[lang] * x).sum() * (2 + turn)]
    found = cosines(dict(x=x), draw, list(ways), lambda name: ('all',))
    for a in ways:
        for b in ways:
            if f'{a}-{b}' in found:
                cos = float(ways[a] @ ways[b] / ways[a].norm() / ways[b].norm())
                assert found[f'{a}-{b}']['all'] == pytest.approx(cos, abs=1e-6)
    assert len(found) == 6


def test_noise_is_taken_out_of_a_cosine():
    "Two languages' true gradients under noise: what is corrected is nearer to their cosine."
    rng = np.random.default_rng(0)
    n = 200_000
    a = rng.normal(size=n)
    b = .5 * a + math.sqrt(.75) * rng.normal(size=n)
    noisy = lambda g, s: g + s * rng.normal(size=n)
    cos = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    within = cos(noisy(a, 1), noisy(a, 1)), cos(noisy(b, 2), noisy(b, 2))
    found = disattenuated_cosine(cos(noisy(a, 1), noisy(b, 2)), *within)
    assert found == pytest.approx(.5, abs=.03)


def test_pcgrad_goes_on_with_what_it_has_projected():
    "As Algorithm 1 of Yu et al. says, vector by vector, in the same order."
    G = np.array([[1., 0., .2], [-.8, .6, 0.], [-.3, -.9, .4]])
    order = np.random.default_rng(5)
    total = np.zeros(3)
    for i in range(3):
        g = G[i].copy()
        for j in order.permutation(3):
            if j != i and g @ G[j] < 0: g -= (g @ G[j]) / (G[j] @ G[j]) * G[j]
        total += g
    np.testing.assert_allclose(pcgrad(G @ G.T, np.random.default_rng(5)) @ G, total)


def test_a_combined_step_weighs_languages_as_sampling_does():
    "sum_i P_i grad L_i of the shared part, P_i grad L_i of each language's own."
    cfg = replace(CFG, temperature=1.)
    model = model_of().double()
    sizes = dict(zip(LANGS, (60, 30, 10)))
    sampler = BatchSampler({l: stream(l, cfg, n_sentences=sizes[l]) for l in LANGS}, cfg)
    loss = sum(sizes[l] / 100 * model.loss(sampler.batches_by_language(0)[l][0]) for l in LANGS)
    before = [p.detach().clone() for p in model.parameters()]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    step = CombinedStep(model, cfg, 'mean')
    descent(step)
    assert float(step(0, sampler, .5)['loss']) == pytest.approx(loss.item())
    for p, old, g in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), old - .5 * g)


def test_a_probe_looks_at_new_batches_that_training_does_not_see(monkeypatch):
    model, sampler, seen = model_of(), feed_of(CFG), []
    loss = model.loss
    model.loss = lambda batch: (seen.append(batch.tokens), loss(batch))[1]
    probe = GradientProbe(ProbeConfig(every=2, n_batches=2))
    for k in range(4): probe(k, model, sampler)
    assert len(probe.rows) == 2 and len(seen) > 20
    training = [sampler.streams[l].batch(k).tokens for l in LANGS for k in range(30)]
    flat = [tuple(t.flatten().tolist()) for t in (*seen, *training)]
    assert len(set(flat)) == len(flat)


# ---- the hypergradient's estimate [paper Eq. 8] ----

@pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
def test_a_finite_difference_is_the_product_whatever_the_gradients_size(scale):
    "L = theta^3 phi: d2L/dphi dtheta . v = 3 theta^2 v, at every length of v."
    theta, phi = torch.tensor([2., 1.]).double(), torch.tensor([1.5, .5]).double()
    for p in (theta, phi): p.requires_grad_()
    loss = lambda: torch.sum(theta**3 * phi)
    v = [scale * torch.tensor([.6, -.8]).double()]
    found, = finite_difference([loss], [theta], [phi], v, 1e-3)
    torch.testing.assert_close(found, 3 * theta.detach()**2 * v[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize('estimator', [exact, finite_difference])
def test_the_second_order_term_meets_the_dropout_of_the_inner_step(estimator):
    "Masks of the inner step are drawn once, those of the validation loss after them."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Dropout(.5),
                              torch.nn.Linear(32, 3)).double()
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    loss = lambda: F.cross_entropy(net(x), y)
    theta, phi = list(net[0].parameters()), list(net[3].parameters())
    torch.manual_seed(1)
    total = hypergradient(theta, phi, loss, [loss], .5, estimator, 1e-4).total
    torch.manual_seed(1)
    g = torch.autograd.grad(loss(), theta, create_graph=True)
    w, b = (p - .5 * d for p, d in zip(theta, g, strict=True))
    hidden = F.dropout(torch.tanh(F.linear(x, w, b)), .5)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(hidden, *phi), y), phi)
    for found, by_hand in zip(total, expected, strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-8)


# ---- finetuning and its answers ----

def test_what_is_tuned_and_how_fast():
    "All but other languages' modules; the rate falls evenly to zero over all steps."
    for frozen in (False, True):
        cfg = FinetuneConfig(epochs=2, batch_size=16, lr=1e-2, max_len=16, freeze_specific=frozen)
        run = Trainer(TaskModel(untrained(), task_spec('pos')), rows_of('aa', 'train'),
                      rows_of('aa', 'validation'), 'aa', cfg)
        before, rates = {n: p.detach().clone() for n, p in run.model.named_parameters()}, []
        run.optimizers['all'].register_step_pre_hook(
            lambda opt, *_, rates=rates: rates.append(opt.param_groups[0]['lr']))
        for _ in range(2): run.epoch()
        np.testing.assert_allclose(rates, 1e-2 * (1 - np.arange(len(rates)) / len(rates)))
        for n, p in run.model.named_parameters():
            lang = next((l for l in LANGS if f'.{l}.' in n), None)
            still = lang is not None and (lang != 'aa' or frozen)
            if not n.endswith('encoder.bias'):          # of the scores, which no task reads
                assert torch.equal(p, before[n]) == still, n


def test_a_span_does_not_end_before_it_starts():
    from interference_nb.tasks import Feature
    scores = torch.zeros(8, 2)
    scores[5, 0], scores[3, 1] = 9., 9.         # the best end stands before the best start
    scores[6, 1] = 5.
    offsets = [(10 * i, 10 * i + 8) for i in range(6)]
    feature = Feature([0] * 8, [0, 0], 0, list(range(2, 8)), offsets)
    score, start, end = decode_span(scores, feature, task_spec('qa'))
    assert (score, start, end) == (14., 30, 48)


def test_a_pair_is_judged_by_its_first_position():
    torch.manual_seed(0)
    head = task_spec('nli').head(8, task_spec('nli'))
    hidden = torch.randn(2, 5, 8)
    torch.testing.assert_close(head(hidden), hidden[:, 0] @ head.weight.T + head.bias)


def test_weights_of_two_gates_are_open_if_both_are():
    "Heads and values gate the same columns; rows and neurons cross."
    model = model_of('joint')
    def share(names, open_):
        groups = gate_groups(model, names)
        gates = Gates({g: torch.full((g.n,), 10. if open_(g) else -10.) for g in groups})
        return gates.kept_fraction(), gates.expected_open_fraction()
    closed = share(('heads', 'values'), lambda g: g.n != model.cfg.n_heads)
    assert closed == (0, pytest.approx(0, abs=1e-3))
    rng = torch.Generator().manual_seed(0)
    groups = gate_groups(model, ('neurons', 'rows'))
    gates = Gates({g: torch.randn(g.n, generator=rng) for g in groups})
    p, params = HardConcrete().open_probability, dict(model.named_parameters())
    kept, expected = ({n: torch.ones_like(params[n]) for n in {g.weight for g in groups}}
                      for _ in range(2))
    for g, a in gates.log_alpha.items():
        for i in range(g.n):
            part = [slice(None)] * 2
            part[g.dim] = slice(i * g.shape[g.dim] // g.n, (i + 1) * g.shape[g.dim] // g.n)
            kept[g.weight][tuple(part)] *= float(a[i] > 0)
            expected[g.weight][tuple(part)] *= p(a[i])
    for weights, found in ((kept, gates.kept_fraction()),
                           (expected, gates.expected_open_fraction())):
        assert found == pytest.approx(float(torch.cat([w.flatten() for w in weights.values()]
                                                      ).mean()), rel=1e-5)


def test_no_groups_are_refused():
    with pytest.raises(InputError, match='no groups. Use some of heads'): PruneConfig(groups=())
