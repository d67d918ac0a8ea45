"""Other people's probes beside ours: PCGrad and GradVac on published problems, per-sample gradients
by torch.func, gates against the best of all subsets, `peft`'s adapters under our steps."""
import copy, itertools, json, re
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from interference_nb.gradient_probes import (GradientProbe, ProbeConfig, gram, halves,
                                             inner_products, pcgrad, vaccine)
from interference_nb.l0_pruning import PruneConfig, columns, gated, learn_gates
from interference_nb.meta_adapters import MetaConfig, MetaStep
from interference_nb.pretrain import BatchSampler, JointStep, TrainConfig, train
from interference_nb.toy_languages import ToySource


@pytest.fixture(autouse=True, scope='module')
def no_accelerator_left():
    "What a Trainer sets up for its process would keep later tests from starting others."
    yield
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)


def test_pcgrad_on_the_published_toy_problem():
    """Yu et al. (2020), Figure 1: L1 = 20 log |a/2 + tanh b| and L2 = 25 log |a/2 - tanh b + 2|.

    At (0, 1/2) the gradients conflict; each loses what opposes the other, and the two are added."""
    x = torch.tensor([0., .5], dtype=torch.float64, requires_grad=True)
    u, v, slope = np.tanh(.5), 2 - np.tanh(.5), 1 / np.cosh(.5)**2
    first = 20 * torch.log((x[0] / 2 + torch.tanh(x[1])).abs())
    second = 25 * torch.log((x[0] / 2 - torch.tanh(x[1]) + 2).abs())
    G = torch.stack([torch.autograd.grad(f, x)[0] for f in (first, second)])
    g1, g2 = np.array([10 / u, 20 * slope / u]), np.array([12.5 / v, -25 * slope / v])
    np.testing.assert_allclose(G, [g1, g2], rtol=1e-12)
    assert g1 @ g2 < 0
    p1, p2 = g1 - g1 @ g2 / (g2 @ g2) * g2, g2 - g2 @ g1 / (g1 @ g1) * g1
    assert abs(p1 @ g2) < 1e-9 > abs(p2 @ g1)
    ours = pcgrad((G @ G.T).numpy(), np.random.default_rng(0)) @ G.numpy()
    np.testing.assert_allclose(ours, p1 + p2, rtol=1e-12)


def test_gradvac_turns_a_gradient_to_the_expected_cosine():
    """Wang et al. (2021), Algorithm 1, at cosine -1/2 where 1/2 is expected: by the formula the
    weight is |g1| (.5 sqrt(.75) + .5 sqrt(.75)) / (|g2| sqrt(.75)) = |g1| / |g2|."""
    g1, g2 = np.array([2., 0]), 3 * np.array([-.5, .75**.5])
    G = np.stack([g1, g2])
    target = np.full((2, 2), .5)
    weights = vaccine(G @ G.T, target, np.random.default_rng(0))
    np.testing.assert_allclose(weights, [1 + 3 / 2, 1 + 2 / 3])
    turned = g1 + 2 / 3 * g2
    assert turned @ g2 / np.linalg.norm(turned) / np.linalg.norm(g2) == pytest.approx(.5)
    np.testing.assert_allclose(target[0, 1], .99 * .5 + .01 * -.5)


def test_cosines_are_those_of_per_sample_gradients():
    "A batch's gradient is the mean of its rows' gradients, which torch.func takes one by one."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    params = dict(net.named_parameters())
    data = {(l, h): (torch.randn(5, 6).double(), torch.randint(4, (5,)))
            for l in ('en', 'fr', 'ar') for h in (0, 1)}
    def loss(p, x, y): return nn.functional.cross_entropy(functional_call(net, p, (x,)), y)
    rows = []
    for x, y in data.values():
        each = vmap(grad(loss), (None, 0, 0))(params, x[:, None], y[:, None])
        rows.append(torch.cat([g.mean(0).flatten() for g in each.values()]))
    inner, cosine = halves(gram(torch.stack(rows), [len(rows[0])])[0].detach().numpy())
    draw = lambda lang, half: [lambda: loss(params, *data[lang, half])]
    found = inner_products(params, draw, ('en', 'fr', 'ar'))['all']
    for a, b in zip(halves(found), (inner, cosine)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_gates_find_the_best_of_all_subsets():
    "Eight groups, 256 subsets: what is kept is what a search finds, at the same price of a group."
    torch.manual_seed(0)
    layer = nn.Linear(8, 1, bias=False)
    layer.weight.data = torch.tensor([[2., -1.5, 1.2, .9, .15, -.1, .05, 0.]])
    x = torch.randn(4096, 8)
    with torch.no_grad(): y = layer(x)
    groups, l0 = columns(layer, 'weight'), 2.
    loss = lambda: (layer(x) - y).square().mean()
    cost = {}
    for kept in itertools.product((0., 1.), repeat=8):
        with torch.no_grad(), gated(layer, {groups[0]: torch.tensor(kept)}):
            cost[kept] = loss().item() + l0 * sum(kept) / 8
    best = min(cost, key=cost.get)
    assert best == (1., 1., 1., 1., 0., 0., 0., 0.)
    cfg = PruneConfig(steps=500, warmup=50, l0=l0)
    gates = learn_gates(layer, lambda k: loss(), groups, cfg)
    assert tuple((gates.flat() > 0).float().tolist()) == best


def recipe(function):
    "Run the block of the page on hub models that defines a function; return it."
    page = json.loads((Path(__file__).parents[1]/'nbs'/'05a_hub_models.ipynb').read_text('utf-8'))
    text = '\n'.join(''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'markdown')
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    block = next(b for b in blocks if re.search(rf'(def|class) {function}\b', b))
    names = {}
    exec(block, names)
    return names[function]


@pytest.mark.parametrize(('kind', 'targets'), [('bert', ['query', 'value']), ('gpt2', ['c_attn'])])
@pytest.mark.parametrize('step', [JointStep, MetaStep])
def test_lora_of_peft_is_phi(kind, targets, step, tmp_path):
    "Each language's matrices move, the idle ones do not; what is saved opens without us, the same."
    peft = pytest.importorskip('peft')
    pytest.importorskip('transformers')
    from test_report import write_model
    from interference_nb.hub_models import LOSSES, hf_loss, open_language_model
    langs, source = ('en', 'ar'), ToySource(n_train=200)
    folder = write_model(tmp_path, kind, langs, source)
    opened, tokenizer, stream = open_language_model(folder, langs)
    model = recipe('lora_model')(opened.module, langs, targets, 4)
    streams = {l: stream(tokenizer, list(source.text(l)), l, 8, 24) for l in langs}
    assert stream is LOSSES[dict(bert='masked', gpt2='causal')[kind]][1]
    names = {n for own in (model.theta, *model.phi.values()) for n in own}
    assert names == {n for n, _ in model.named_parameters()} and all(model.phi.values())
    model.loss(streams['en'].batch(0)).backward()
    assert all(p.grad is None for p in model.phi['ar'].values())
    model.zero_grad(set_to_none=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    cfg = TrainConfig.toy(steps=4, warmup=1, eval_every=4)
    train(model, BatchSampler(streams, cfg), cfg, {}, step=step(model, cfg), progress=False)
    moved = lambda params: any(not torch.equal(p, before[n]) for n, p in params.items())
    assert moved(model.theta) and all(moved(own) for own in model.phi.values())
    model.module.save_pretrained(tmp_path/'lora')
    base = copy.deepcopy(model.module).unload()
    for l in langs:
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'lora'/l).eval()
        batch = streams[l].batch(9)
        model.eval()
        with torch.no_grad(): assert torch.equal(hf_loss(again, batch), model.loss(batch))


def test_probe_leaves_a_trainer_bit_identical(tmp_path):
    "Eight steps of `transformers.Trainer` with dropout, with and without the probe."
    transformers = pytest.importorskip('transformers')
    from test_report import write_model
    from interference_nb.hub_models import TextStream, open_language_model
    langs, source = ('en', 'ar'), ToySource(n_train=200)
    folder = write_model(tmp_path/'model', 'bert', langs, source)
    def end(probe):
        opened, tok, _ = open_language_model(folder, langs)
        streams = {l: TextStream(tok, list(source.text(l)), l, 8, 24) for l in langs}
        sampler = BatchSampler(streams, TrainConfig.toy(steps=8))
        rows = [dict(input_ids=torch.tensor(tok(t)['input_ids']))
                for t in itertools.islice(source.text('en'), 64)]
        args = transformers.TrainingArguments(
            output_dir=tmp_path/'out', max_steps=8, per_device_train_batch_size=8, report_to=[],
            save_strategy='no', use_cpu=True, disable_tqdm=True, seed=0)
        transformers.Trainer(
            opened.module, args, train_dataset=rows,
            data_collator=transformers.DataCollatorForLanguageModeling(tok),
            callbacks=[recipe('ProbeCallback')(probe, sampler)] if probe else []).train()
        return dict(opened.module.named_parameters())
    probe = GradientProbe(ProbeConfig(every=2, n_batches=2))
    plain, probed = end(None), end(probe)
    assert all(torch.equal(p, probed[n]) for n, p in plain.items())
    assert [r['step'] for r in probe.rows] == [2, 4, 6, 8]


def halved(name):
    "A split that any model has: its first layer is English's own, its second Arabic's."
    found = re.search(r'\.(?:layer|h)\.(\d)\.', name)
    return found and ('en', 'ar')[int(found[1])]


@pytest.mark.parametrize('kind', ['bert', 'gpt2'])
def test_a_trainer_takes_the_meta_step(kind, tmp_path):
    "Losses and weights are those of our loop on the same batches, also after a checkpoint."
    transformers = pytest.importorskip('transformers', '5.6',
                                       reason='the Trainer of older ones differs in the 5th digit')
    from test_report import write_model
    from interference_nb.hub_models import AnyModel, hf_loss, open_language_model
    langs, source, steps = ('en', 'ar'), ToySource(n_train=200), 6
    still = dict(bert=dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0),
                 gpt2=dict(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0))[kind]
    folder = write_model(tmp_path/'model', kind, langs, source, **still)
    # with a larger eps a gradient that is rounding alone does not become a whole step
    cfg = TrainConfig.toy(steps=steps, warmup=1, lr=1e-3, schedule='constant', adam_eps=1e-4,
                          eval_every=steps)
    meta = MetaConfig(meta_every=2, log_every=1)
    def parts():
        opened, tok, stream = open_language_model(folder, langs)
        streams = {l: stream(tok, list(source.text(l)), l, 8, 24) for l in langs}
        return AnyModel(opened.module, hf_loss, langs, halved), BatchSampler(streams, cfg)
    def trainer(**more):
        model, sampler = parts()
        args = transformers.TrainingArguments(
            output_dir=tmp_path/'out', max_steps=steps, max_grad_norm=0, learning_rate=cfg.lr,
            lr_scheduler_type='constant', adam_beta2=cfg.betas[1], adam_epsilon=cfg.adam_eps,
            report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2, logging_steps=1, **more)
        return recipe('MetaTrainer')(model, args, cfg, sampler, meta)

    with pytest.raises(ValueError, match='precision in cfg'): trainer(bf16=True)
    ours, sampler = parts()
    rows = []
    keep = lambda k, model, sampler, out: rows.append({n: float(x) for n, x in out.items()})
    train(ours, sampler, cfg, {}, step=MetaStep(ours, cfg, meta), callbacks=[keep], progress=False)
    theirs = trainer()
    begin = {n: p.detach().clone() for n, p in theirs.algorithm.model.named_parameters()}
    theirs.train()
    assert [set(r) for r in rows] == [{'loss', 'val_loss', 'ratio'}, {'loss'}] * (steps // 2)
    for a, b in zip(rows, theirs.rows, strict=True): assert a == pytest.approx(b, rel=1e-6)
    logged = [r['loss'] for r in theirs.state.log_history if 'loss' in r]
    assert logged == pytest.approx([r['loss'] for r in rows], abs=1e-3)
    weights = dict(ours.named_parameters())
    for n, p in theirs.algorithm.model.named_parameters():
        torch.testing.assert_close(p, weights[n], rtol=1e-5, atol=1e-7)
        assert not torch.equal(p, begin[n]), n
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path/'out'/'checkpoint-2'))
    assert resumed.rows == theirs.rows[2:]
    for n, p in resumed.algorithm.model.named_parameters():
        torch.testing.assert_close(p, weights[n], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('config', ['seq_bn', 'seq_bn_inv'])
@pytest.mark.parametrize(('kind', 'step'), [('bert', JointStep), ('gpt2', MetaStep)])
def test_bottleneck_of_adapters_is_phi(kind, step, config, tmp_path):
    "The same for the library `adapters`: each language's own move, and open without us."
    adapters = pytest.importorskip('adapters')
    import transformers
    from test_report import write_model
    from interference_nb.hub_models import LOSSES, hf_loss, open_language_model
    langs, source = ('en', 'ar'), ToySource(n_train=200)
    loss = dict(bert='masked', gpt2='causal')[kind]
    folder = write_model(tmp_path/'model', kind, langs, source)
    opened, tokenizer, stream = open_language_model(folder, langs)
    model = recipe('bottleneck_model')(opened.module, langs, config)
    streams = {l: stream(tokenizer, list(source.text(l)), l, 8, 24) for l in langs}
    names = {n for own in (model.theta, *model.phi.values()) for n in own}
    assert names == {n for n, _ in model.named_parameters()}
    assert not any('adapter' in n for n in model.theta)
    assert any('invertible' in n for n in model.phi['ar']) == (config == 'seq_bn_inv')
    model.loss(streams['en'].batch(0)).backward()
    assert all(p.grad is None for p in model.phi['ar'].values())
    assert all(p.grad is not None for p in model.phi['en'].values())
    model.zero_grad(set_to_none=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    cfg = TrainConfig.toy(steps=4, warmup=1, eval_every=4)
    train(model, BatchSampler(streams, cfg), cfg, {}, step=step(model, cfg), progress=False)
    moved = lambda params: any(not torch.equal(p, before[n]) for n, p in params.items())
    assert moved(model.theta) and all(moved(own) for own in model.phi.values())
    plain = dict(with_head=False, use_safetensors=True)
    model.module.save_pretrained(tmp_path/'base')
    for l in langs: model.module.save_adapter(tmp_path/l, l, **plain)
    for l in langs:
        again = getattr(transformers, LOSSES[loss][0]).from_pretrained(tmp_path/'base').eval()
        adapters.init(again)
        again.set_active_adapters(again.load_adapter(str(tmp_path/l), **plain))
        batch = streams[l].batch(9)
        model.eval()
        with torch.no_grad(): assert torch.equal(hf_loss(again, batch), model.loss(batch))
