"What a user may legitimately do otherwise: frozen, tied and shared weights, another optimiser."
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from interference_nb.adapters import MultilingualLM, load_model
from interference_nb.data import Corpus, Stream, dev_batches
from interference_nb.files import InputError
from interference_nb.gradient_probes import CombinedStep, GradientProbe, ProbeConfig, cosines
from interference_nb.l0_pruning import PruneConfig, gate_groups, learn_gates
from interference_nb.meta_adapters import MetaStep, exact, finite_difference, hypergradient
from interference_nb.pretrain import BatchSampler, JointStep, TrainConfig, perplexity, train
from interference_nb.transformer import MaskedLM, ModelConfig

LANGS = 'aa', 'bb'
CFG = TrainConfig.toy(steps=6, warmup=2, batch_size=4, seq_len=16, eval_every=6, checkpoint_every=3)

def stream(lang, cfg=CFG):
    ids = np.random.default_rng([*lang.encode()]).integers(5, 60, 2000).astype(np.uint16)
    return Stream(Corpus(ids, lang, 'train', 1, 1), cfg.batch_size, cfg.seq_len, 0, 60,
                  cfg.mask_prob)

def sampler(cfg=CFG): return BatchSampler({l: stream(l, cfg) for l in LANGS}, cfg)

def model(variant='adpt', **kw):
    torch.manual_seed(0)
    return MultilingualLM(ModelConfig.toy(60, dim=16, n_layers=2, ffn_dim=32, **kw), LANGS, variant)

def go(m, step=None, folder=None, cfg=CFG, **kw):
    dev = {l: dev_batches(stream(l).corpus, 4, 16, 60, .25, n_batches=1) for l in LANGS}
    return train(m, sampler(cfg), cfg, dev, step, folder=folder, progress=False, **kw)

@pytest.mark.parametrize('change', [dict(steps=50), dict(seed=5), dict(clip=1e-9)])
@pytest.mark.parametrize('who', ['sampler', 'step'])
def test_a_run_has_one_config(who, change, tmp_path):
    "Or the record would name settings that were not used; beyond its steps a sampler has nothing."
    m, other = model(), replace(CFG, **change)
    given = dict(sampler=sampler(other if who == 'sampler' else CFG),
                 step=JointStep(m, other if who == 'step' else CFG))
    with pytest.raises(InputError, match=f'the {who} was made with another config.*{[*change][0]}'):
        train(m, given['sampler'], CFG, {}, given['step'], folder=tmp_path, progress=False)
    assert not [*tmp_path.iterdir()]
    often = replace(CFG, eval_every=2, checkpoint_every=1)          # these change no weight
    train(m, sampler(often), CFG, {}, progress=False)

def test_one_rate_for_all_groups():
    class Own(JointStep):
        def update(self, name, lr, average=True):
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
    for kind in (JointStep, Own):
        m = model()
        step, params = kind(m, CFG), list(m.parameters())
        step.optimizers['all'] = torch.optim.Adam([dict(params=params[:1], lr=1e-5),
                                                   dict(params=params[1:], lr=1e-2)])
        if kind is Own:
            go(m, step)
            assert [g['lr'] for g in step.optimizers['all'].param_groups] == [1e-5, 1e-2]
        else:
            with pytest.raises(InputError, match='learning rates of their own'): go(m, step)

@pytest.mark.parametrize('make', [JointStep, MetaStep, lambda m, c: CombinedStep(m, c, 'mean')])
def test_a_frozen_weight_stays(make):
    cfg, m = replace(CFG, weight_decay=.1), model()
    m.embedding.weight.requires_grad_(False)
    for p in m.phi['bb'].values(): p.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    if make is MetaStep:
        with pytest.raises(InputError, match='no parameters of its own for bb'):
            go(m, make(m, cfg), cfg=cfg)
        for p in m.phi['bb'].values(): p.requires_grad_(True)
    go(m, make(m, cfg), cfg=cfg)
    moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    frozen = {n for n, p in m.named_parameters() if not p.requires_grad}
    assert 'embedding.weight' in frozen and not moved & frozen
    assert any('.aa.' in n for n in moved)

@pytest.mark.parametrize('make', [MetaStep, lambda m, c: CombinedStep(m, c, 'mean')])
def test_a_language_does_not_share_its_own(make):
    m = model()
    for routes in m.routed().values(): routes['bb'] = routes['aa']
    with pytest.raises(InputError, match='aa and bb share a parameter'): make(m, CFG)
    go(m)                                       # the plain step trains it on both

def test_tied_layers_are_kept_and_resumed(tmp_path):
    "As in ALBERT: one layer, used twice."
    def tied():
        m = model('joint')
        m.blocks[1] = m.blocks[0]
        return m
    whole, m, n = tied(), tied(), tied()
    go(whole)
    go(m, folder=tmp_path, stop_at=3)
    go(n, folder=tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), n.parameters(), strict=True))
    tokens = torch.randint(5, 60, (2, 8))
    again = load_model(tmp_path/'checkpoint.safetensors')
    torch.testing.assert_close(again(tokens, 'aa'), whole.eval()(tokens, 'aa'))

@pytest.mark.skipif(not hasattr(torch.optim, 'Adafactor'), reason='torch has no Adafactor')
def test_factored_moments_are_resumed(tmp_path):
    "Adafactor keeps a row and a column of a matrix, and a vector of a vector."
    def adafactor(m):
        step = JointStep(m, CFG)
        step.optimizers['all'] = torch.optim.Adafactor(m.parameters(), lr=CFG.lr)
        return step
    whole, m, n = model(), model(), model()
    go(whole, adafactor(whole))
    go(m, adafactor(m), tmp_path, stop_at=3)
    go(n, adafactor(n), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), n.parameters(), strict=True))

@pytest.mark.parametrize('draw', [lambda n: torch.rand(n) < .5,
                                  lambda n: torch.tensor(np.random.rand(n) < .5),
                                  lambda n: torch.tensor([random.random() < .5 for _ in range(n)])])
def test_noise_of_any_library_is_drawn_again(draw):
    "The second-order term is a difference of two gradients: of the same noise, or it is noise."
    torch.manual_seed(0)
    a, b, x = nn.Linear(6, 6).double(), nn.Linear(6, 6).double(), torch.randn(9, 6).double()
    def loss(): return (b(torch.tanh(a(x) * draw(6))) - 1).square().mean()
    def term(estimator):
        for seed in (torch.manual_seed, np.random.seed, random.seed): seed(3)
        h = hypergradient(list(a.parameters()), list(b.parameters()), loss, loss, .5, estimator)
        return torch.cat([t.flatten() for t in h.second_order])
    want, got = term(exact), term(finite_difference)
    assert want.norm() > 1e-3 and (got - want).norm() < 1e-3 * want.norm()
    after = [np.random.rand(), random.random()]     # as if the term had not been computed
    term(replace(exact, passes=0, product=lambda train, theta, phi, v, eps: [
        torch.zeros_like(p) for p in phi]))
    assert after == [np.random.rand(), random.random()]

def test_weights_of_padded_batches_count():
    m, batch = model(), stream('aa').batch(0)
    one, three = (m.loss(replace(batch, weight=w)) for w in (1., 3.))
    torch.testing.assert_close(three, 3 * one)

class Padded:
    "A stream whose rows end in padding, with few hidden tokens in every other batch."
    def __init__(self, of): self.of, self.corpus = of, of.corpus
    def independent_stream(self, name): return Padded(self.of.independent_stream(name))
    def batch(self, i):
        b = self.of.batch(i)
        few = slice(None) if i % 2 else slice(2)
        pad = torch.zeros_like(b.tokens, dtype=torch.bool)
        return replace(b, pad=pad, positions=b.positions[few], targets=b.targets[few])

def test_a_probe_weighs_tokens_not_batches():
    cfg = replace(CFG, seq_len=64)
    streams = {l: Padded(stream(l, cfg)) for l in LANGS}
    own, m = BatchSampler(streams, cfg), model(max_len=64)
    probe = GradientProbe(ProbeConfig(every=1, n_batches=2))
    probe(0, m, own)
    def draw(lang, turn):                       # one loss over all hidden tokens of the batches
        batches = [probe.streams[lang].batch(i) for i in (2 * turn, 2 * turn + 1)]
        n = sum(len(b.targets) for b in batches)
        return [lambda: sum(m.loss(b) * len(b.targets) for b in batches) / n]
    want = cosines(m.theta, draw, LANGS)
    for pair, row in probe.rows[0]['cos'].items():
        assert row['all'] == pytest.approx(want[pair]['all'], abs=2e-5)

def test_gates_after_training_with_activation_checkpointing():
    m, found = model('joint'), []
    for flag in (False, True):
        m.activation_checkpointing = flag
        cfg = PruneConfig.toy(steps=3)
        found.append(learn_gates(m, lambda k: m.loss(stream('aa').batch(k)),
                                 gate_groups(m, cfg.groups), cfg).flat())
    torch.testing.assert_close(*found)

def test_small_slips_are_understood_or_named():
    assert MultilingualLM(ModelConfig.toy(60, dim=8), 'en').langs == ('en',)
    assert MaskedLM(ModelConfig.toy(60, dim=8), 'en').langs == ('en',)
    with pytest.raises(InputError, match='no held-out text'): perplexity(model(), [])
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16)])
    with pytest.raises(InputError, match='torch.float32, and some weights are torch.bfloat16'):
        cosines(dict(net.named_parameters()), lambda lang, turn: [], LANGS)
