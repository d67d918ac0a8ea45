"The hypergradient outside the notebook: a model of somebody else's, several processes, a GPU."
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from interference_nb.adapters import MultilingualLM
from interference_nb.data import Corpus, Stream
from interference_nb.distributed import launch, mean_over_processes, rank_and_world_size
from interference_nb.files import InputError
from interference_nb.meta_adapters import (ESTIMATORS, Estimator, MetaConfig, MetaStep, exact,
                                           finite_difference, hypergradient, mean_gradient,
                                           one_sided, perturbed)
from interference_nb.pretrain import BatchSampler, TrainConfig, seed_step
from interference_nb.transformer import ModelConfig


def flat(tensors): return torch.cat([t.reshape(-1) for t in tensors])


def test_hugging_face_model_with_dropout():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    size = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**size, intermediate_size=32))
    mine = {n for n, _ in bert.named_parameters() if n.endswith('bias') or 'LayerNorm' in n}
    theta = [p for n, p in bert.named_parameters() if n not in mine]
    phi = [p for n, p in bert.named_parameters() if n in mine]
    losses = [lambda b=b: bert(input_ids=b, labels=b).loss for b in torch.randint(50, (3, 4, 10))]
    before, found = [p.detach().clone() for p in bert.parameters()], {}
    for estimator in (exact, finite_difference):
        torch.manual_seed(1)
        h = hypergradient(theta, phi, losses[0], losses[1:], 0.5, estimator, eps=1e-3)
        found[estimator] = flat(h.total)
    difference = found[exact] - found[finite_difference]
    assert difference.norm() < 1e-3 * found[exact].norm()
    assert all(torch.equal(p, q) for p, q in zip(bert.parameters(), before))


def little():
    "A small model and, for each of two processes, its losses."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    net = net.double()
    data = [[(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(3)]
            for _ in range(2)]
    losses = [[lambda d=d: nn.functional.cross_entropy(net(d[0]), d[1]) for d in own]
              for own in data]
    phi = list(net[2].parameters())
    theta = [p for p in net.parameters() if all(p is not q for q in phi)]
    return theta, phi, losses


def moved_gradients(train_losses, theta, phi, v, steps):
    "The gradients by phi at theta + step * v: our own, to build estimators from."
    for step in steps:
        with perturbed(theta, v, step): yield flat(mean_gradient(train_losses, phi)[1])


def like(phi, vector):
    return [x.view_as(p) for x, p in zip(vector.split([p.numel() for p in phi]), phi, strict=True)]


def five_points(train_losses, theta, phi, v, eps):
    "The central difference whose error falls with the fourth power of its length."
    h = eps / flat(v).norm().item()
    a, b, c, d = moved_gradients(train_losses, theta, phi, v, (-2 * h, -h, h, 2 * h))
    return like(phi, (a - 8 * b + 8 * c - d) / (12 * h))


def from_here(train_losses, theta, phi, v, eps, here):
    h = eps / flat(v).norm().item()
    there, = moved_gradients(train_losses, theta, phi, v, [h])
    return like(phi, (there - flat(here)) / h)


def test_an_estimator_of_ones_own():
    theta, phi, (losses, _) = little()
    eps, received = .1, []
    def find(estimator):
        return hypergradient(theta, phi, losses[0], losses[1:], .5, estimator, eps)
    truth, own = flat(find(exact).second_order), find(Estimator(five_points, passes=4))
    error = lambda h: (flat(h.second_order) - truth).norm()
    assert error(own) < error(find(finite_difference)) / 20
    assert own.passes == 1 + 4 + 2
    reusing = find(Estimator(from_here, passes=1, reuses_gradient=True))
    torch.testing.assert_close(flat(reusing.total), flat(find(one_sided).total))

    def told(train_losses, theta, phi, v, eps):
        received.append(v)
        return [torch.ones_like(p) for p in phi]
    blind = find(Estimator(told, passes=0, needs_v=False))
    assert received == [[]] and blind.passes == 1 + 2
    assert torch.equal(flat(blind.second_order), torch.full_like(truth, -.5))
    assert torch.equal(flat(blind.direct), flat(own.direct))


def test_an_estimator_of_ones_own_trains(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, 'own', Estimator(five_points, passes=4))
    found, passes = steps(CFG, meta := MetaConfig(estimator='own'))
    assert passes == meta.passes(len(LANGS)) * CFG.accumulate * CFG.steps
    truth, _ = steps(CFG, MetaConfig(estimator='exact'))
    blind, _ = steps(CFG, MetaConfig(estimator='first_order'))
    assert (found - truth).norm() < (blind - truth).norm() / 100
    monkeypatch.setitem(ESTIMATORS, 'own', replace(ESTIMATORS['own'], differentiates_twice=True))
    model, *_ = little_run(CFG, MetaConfig())
    with pytest.raises(InputError, match="no second derivative, which 'own' needs"):
        MetaStep(model, replace(CFG, compile=True), meta)


@pytest.mark.parametrize('off', [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_switched_off(off):
    "Every term would be zero."
    theta, phi, (losses, _) = little()
    with off(), pytest.raises(InputError, match='Gradients are switched off'):
        hypergradient(theta, phi, losses[0], losses[1:], .5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('autocast', [False, True])
def test_gpu_replays_its_noise(autocast):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(.5), nn.Linear(64, 3)).cuda()
    x, y = torch.randn(32, 4, device='cuda'), torch.randint(3, (32,), device='cuda')
    loss = lambda: nn.functional.cross_entropy(net(x), y)
    theta, phi, found = list(net[0].parameters()), list(net[3].parameters()), {}
    before = [p.detach().clone() for p in theta]
    for estimator in (exact, finite_difference):
        torch.manual_seed(1)
        with torch.autocast('cuda', dtype=torch.float16, enabled=autocast):
            found[estimator] = flat(hypergradient(theta, phi, loss, [loss], 0.5, estimator).total)
    assert (found[exact] - found[finite_difference]).norm() < 1e-2 * found[exact].norm()
    assert all(torch.equal(p, q) for p, q in zip(theta, before))


LANGS = 'en', 'x3', 'fr'
CFG = TrainConfig.toy(steps=4, accumulate=2, seed=3, clip=1e9)
SETTINGS = {'sampled': (CFG, MetaConfig(sampled_languages=1)),
            'every other step': (replace(CFG, steps=6, language_order='round_robin'),
                                 MetaConfig(meta_every=2)),
            'mixed': (replace(CFG, mixed=True),
                      MetaConfig(sampled_languages=2, estimator='one_sided')),
            'mixed, shared first': (replace(CFG, mixed=True),
                                    MetaConfig.released(validation='train'))}


def little_run(cfg, meta, device='cpu'):
    "A small model and random text in three languages; plain descent."
    corpus = lambda i: Corpus(np.random.default_rng(i).integers(5, 100, 9999).astype(np.uint16),
                              LANGS[i], 'train', 1, 1)
    stream = lambda i: Stream(corpus(i), cfg.batch_size, cfg.seq_len, 0, 100, cfg.mask_prob)
    torch.manual_seed(0)
    with torch.device(device): model = MultilingualLM(ModelConfig.toy(100), LANGS, 'adpt')
    step = MetaStep(model, cfg, meta)
    for name, opt in step.optimizers.items():
        step.optimizers[name] = torch.optim.SGD(opt.param_groups[0]['params'])
    streams = {l: stream(i) for i, l in enumerate(LANGS)}
    return model, step, BatchSampler(streams, cfg, device=device)


def steps(cfg, meta):
    "Take some steps; return weights and passes."
    model, step, sampler = little_run(cfg, meta)
    for k in range(cfg.steps):
        seed_step(cfg.seed, k)
        step(k, sampler, .1)
    return flat(model.parameters()).detach(), step.passes


def overflow():
    "Take a step in which the last process overflows; tell whether weights moved, and the scale."
    model, step, sampler = little_run(CFG, MetaConfig())
    step.amp.name, step.amp.scaler = 'float16', torch.amp.GradScaler('cpu', init_scale=256.)
    loss, before = model.loss, flat(model.parameters()).detach()
    rank, world = rank_and_world_size()
    if rank == world - 1: model.loss = lambda batch: loss(batch) * 1e38
    step(1, sampler, .1)
    return not torch.equal(flat(model.parameters()), before), step.amp.scaler.get_scale()


def both_terms(estimator):
    "Differentiate the little problem: this process's losses, or alone those of both."
    rank, world = rank_and_world_size()
    theta, phi, losses = little()
    mine = [losses[rank]] if world == 2 else losses
    train, val = [own[0] for own in mine], [f for own in mine for f in own[1:]]
    h = hypergradient(theta, phi, train, val, 0.5, estimator, 1e-4, mean_over_processes)
    return flat(h.direct), flat(h.second_order)


def everything(home):
    "Take all settings' steps; each process leaves a file."
    out = {name: steps(*of) for name, of in SETTINGS.items()} | {'overflow': overflow()}
    out |= {name: both_terms(f) for name, f in ESTIMATORS.items()}
    torch.save(out, home / '{}-{}.pt'.format(*rank_and_world_size()))


def test_settings_mean_the_same_in_two_processes(tmp_path):
    everything(tmp_path)
    launch(everything, tmp_path, processes=2)
    alone, a, b = (torch.load(tmp_path / f'{n}.pt', weights_only=True)
                   for n in ('0-1', '0-2', '1-2'))
    for name, (cfg, meta) in SETTINGS.items():
        assert torch.equal(a[name][0], b[name][0])
        torch.testing.assert_close(a[name][0], alone[name][0], rtol=1e-5, atol=1e-6)
        count = meta.passes(len(LANGS)) * cfg.accumulate * cfg.steps
        assert alone[name][1] == a[name][1] + b[name][1] == count
    for name in ESTIMATORS:
        for found in (a, b):
            torch.testing.assert_close(found[name], alone[name], rtol=1e-6, atol=1e-9)
    assert alone['overflow'] == a['overflow'] == b['overflow'] == (False, 64.)  # both updates


def test_second_streams_are_made_once():
    "A stream shuffles its whole text when it begins: not at every step."
    _, step, sampler = little_run(CFG, MetaConfig(order='shared first'))
    sampler.streams = {l: Counted(s) for l, s in sampler.streams.items()}
    for k in range(CFG.steps): step(k, sampler, .1)
    trained = set(map(sampler.lang, range(CFG.steps)))
    assert sum(s.forks for s in sampler.streams.values()) == len(trained)


@pytest.mark.parametrize('order', ['round_robin', 'sampled'])
@pytest.mark.parametrize('every', [1, 2, 3, 6])
def test_every_language_has_its_meta_steps_and_logs(every, order):
    "In turn, each third step of three languages is the same one's: the others never moved."
    cfg = replace(CFG, steps=60, accumulate=1, language_order=order)
    model, step, sampler = little_run(cfg, MetaConfig(meta_every=every, log_every=2))
    moved, logged = {l: [] for l in LANGS}, {l: 0 for l in LANGS}
    for k in range(cfg.steps):
        lang = sampler.lang(k)
        before = [p.detach().clone() for p in step.phi[lang]]
        logged[lang] += 'ratio' in step(k, sampler, .1)
        moved[lang].append(not all(map(torch.equal, before, step.phi[lang])))
    for lang, own in moved.items():
        assert own == [n % every == 0 for n in range(len(own))]
        assert logged[lang] == -(-sum(own) // 2)


@pytest.mark.parametrize('choices', [{}, dict(meta_every=3), dict(sampled_languages=2),
                                     dict(exclude_own_language=True)])
def test_validation_batches_are_drawn_ahead(choices):
    "As on a GPU: only the first ones while a step waits, and none that no step asks for."
    cfg = replace(CFG, steps=9)
    _, step, sampler = little_run(cfg, MetaConfig(**choices))
    due = [(l, i) for k in range(cfg.steps) if step.moves_phi(k, sampler)
           for l in step.val_langs(sampler, k) for i in sampler.shard_indices(k)]
    drawn = []
    sampler.validation = {l: Watched(s, drawn) for l, s in sampler.validation.items()}
    with ThreadPoolExecutor(1) as sampler._ahead:
        for k in range(cfg.steps): step(k, sampler, .1)
    assert [which for which, _ in drawn] == due
    waited = sum(thread is threading.current_thread() for _, thread in drawn)
    assert waited == len(step.val_langs(sampler, 0)) * cfg.accumulate


class Watched:
    "A stream that notes which batch was drawn, and by which thread."
    def __init__(self, stream, drawn): self.stream, self.drawn = stream, drawn
    def __getattr__(self, name): return getattr(self.stream, name)

    def batch(self, i):
        self.drawn.append(((self.corpus.lang, i), threading.current_thread()))
        return self.stream.batch(i)


class Counted:
    "A stream that counts its forks."
    def __init__(self, stream): self.stream, self.forks = stream, 0
    def __getattr__(self, name): return getattr(self.stream, name)

    def independent_stream(self, name):
        self.forks += 1
        return self.stream.independent_stream(name)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_a_step_waits_for_no_number(name):
    "The device without numbers cannot give one: a step goes through if it never asks."
    cfg = replace(CFG, language_order='round_robin')
    _, step, sampler = little_run(cfg, MetaConfig(estimator=name), 'meta')
    assert step(3, sampler, .1)['loss'].is_meta                     # a language's second step
    with pytest.raises(RuntimeError): step(0, sampler, .1)         # the ratio is measured here


def normed():
    "A model with BatchNorm: theta, phi, two losses, and the module."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(),
                              torch.nn.Linear(4, 1))
    data = torch.randn(2, 8, 3)
    losses = [lambda x=x: net(x).square().mean() for x in data]
    return [*net[0].parameters(), *net[1].parameters()], [*net[3].parameters()], losses, net


@pytest.mark.parametrize('name', ESTIMATORS)
def test_running_statistics_are_put_back(name):
    "Five passes, at theta, theta' and moved theta, leave BatchNorm's averages as they were."
    theta, phi, losses, net = normed()
    before = {n: b.clone() for n, b in net.named_buffers()}
    hypergradient(theta, phi, losses[0], losses[1], .1, ESTIMATORS[name])
    assert not torch.equal(net[1].running_mean, before['1.running_mean'])       # the fault
    for n, b in net.named_buffers(): b.copy_(before[n])
    own = list(net.buffers())
    hypergradient(theta, phi, losses[0], losses[1], .1, ESTIMATORS[name], buffers=own)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    def stops(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        hypergradient(theta, phi, losses[0], [losses[1], stops], .1, buffers=own)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_a_probe_leaves_running_statistics_alone():
    from types import SimpleNamespace
    from interference_nb.gradient_probes import GradientProbe, ProbeConfig
    theta, _, losses, net = normed()
    net.theta, net.loss = {f'w{i}': p for i, p in enumerate(theta)}, lambda batch: losses[batch]()
    stream = SimpleNamespace(batch=lambda i: SimpleNamespace(to=lambda device: i % 2),
                             independent_stream=lambda name: stream)
    sampler = SimpleNamespace(langs=('a', 'b'), streams=dict(a=stream, b=stream), rank=0, world=1,
                              weighed=lambda batches, at: batches, device='cpu',
                              cfg=SimpleNamespace(seed=0, precision='float32'))
    before = [b.clone() for b in net.buffers()]
    probe = GradientProbe(ProbeConfig(every=1, n_batches=2))
    probe(0, net, sampler)
    assert len(probe.rows) == 1 and all(map(torch.equal, net.buffers(), before))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused_where_a_difference_is_taken(dtype):
    def leaves(): return [torch.ones(3, dtype=dtype, requires_grad=True) for _ in range(2)]
    theta, phi = leaves()
    loss = lambda: (theta * phi).square().sum().float()
    for name in ('finite_difference', 'one_sided'):
        with pytest.raises(InputError, match='stored in b?float16, whose rounding.*exact'):
            hypergradient([theta], [phi], loss, loss, .1, ESTIMATORS[name])
    for name in ('exact', 'first_order'):
        h = hypergradient([theta], [phi], loss, loss, .1, ESTIMATORS[name])
        # by hand: theta' = 1 - .1 * 2, V = 3 theta'^2, direct 2 theta'^2, second -.1 * 4 * 2 theta'
        assert h.val_loss == pytest.approx(1.92, rel=.02)
        total = 1.28 - .64 * (name == 'exact')
        assert h.total[0].float().tolist() == pytest.approx([total] * 3, rel=.03)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_sparse_gradients_are_refused(name):
    table, phi = torch.nn.Embedding(5, 2, sparse=True), torch.ones(2, requires_grad=True)
    loss = lambda: (table(torch.tensor([1, 2])) * phi).square().sum()
    with pytest.raises(InputError, match='sparse=False'):
        hypergradient([table.weight], [phi], loss, loss, .1, ESTIMATORS[name])


def test_a_kink_costs_no_more_than_the_derivative_moves():
    """Huber's second derivative jumps where the difference steps over it: up to that, and no more.

    A difference is the mean of the mixed derivative over its segment, so its error is at most how
    far that derivative moves in there; `exact` on one step shows how far off it is."""
    from torch.nn.functional import huber_loss
    phi = torch.tensor(1.5, requires_grad=True)
    def term(name, eps, gap):           # the kink lies `gap` beyond theta
        theta = torch.tensor(2., requires_grad=True)
        y = (theta * phi - 1 + gap * phi).item()
        loss = lambda: huber_loss(theta * phi, torch.tensor(y))
        here = dict(here=[torch.autograd.grad(loss(), phi)[0]]) if name == 'one_sided' else {}
        return ESTIMATORS[name]([loss], [theta], [phi], [torch.tensor(1.)], eps, **here)[0].item()
    for name in ('finite_difference', 'one_sided'):
        for gap in (.001, .004, .02):
            exact, found = term('exact', 1e-2, gap), term(name, 1e-2, gap)
            beyond = term('exact', 1e-2, -1e-4)             # the derivative past the kink
            moves = abs(beyond - exact) + .1                # and along the curve before it
            error = abs(found - exact)
            assert error <= moves
            if gap > 1e-2: assert error < .02 * abs(exact)  # no kink within reach
            if gap == .001: assert error > .2 * abs(exact)  # and one just ahead
