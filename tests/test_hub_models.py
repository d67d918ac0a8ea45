"Other people's models: tiny random ones of three families, through the loop and its instruments."
import copy, re
import pytest
import torch

transformers = pytest.importorskip('transformers')

from interference_nb.data import Stream, prepare_corpus
from interference_nb.tokenizers import BOS, EOS, MASK, PAD
from interference_nb.distributed import launch, mean_over_processes
from interference_nb.files import InputError, read_jsonl
from interference_nb.hub_models import (AnyModel, CausalStream, HubEncoder, HubTokenizer,
                                        TextStream, hf_loss, requirements)
from interference_nb.gradient_probes import CombinedStep, GradientProbe, ProbeConfig
from interference_nb.l0_pruning import PruneConfig, columns, gated, learn_gates, rows
from interference_nb.meta_adapters import MetaStep, exact, finite_difference, hypergradient
from interference_nb.pretrain import BatchSampler, JointStep, TrainConfig, train
from interference_nb.toy_languages import ToySource, toy_tokenizer

LANGS = ('en', 'ar')
T = 24


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "The package's own streams: what `hf_loss` reads need not come from a Hugging Face tokenizer."
    source = ToySource(n_train=300, n_dev=40)
    tok = toy_tokenizer(source, LANGS)
    corpora = prepare_corpus(source, LANGS, tok, tmp_path_factory.mktemp('toy'))
    streams = {l: Stream(corpora[l]['train'], 8, T, 0, tok.vocab_size, .25) for l in LANGS}
    return streams, tok.vocab_size


def adapter_of(name):
    found = re.search(r'\.adapter_modules\.(\w+)\.', name)
    return found and found[1]


def build(kind, vocab_size, dropout=.1, langs=LANGS, **kw):
    "A tiny random model of one family."
    torch.manual_seed(0)
    if kind == 'xlm':
        return AnyModel(transformers.XLMWithLMHeadModel(transformers.XLMConfig(
            vocab_size=vocab_size, emb_dim=16, n_layers=2, n_heads=2, dropout=dropout,
            attention_dropout=dropout, max_position_embeddings=T + 3, n_langs=2, bos_index=BOS,
            eos_index=EOS, pad_index=PAD, mask_index=MASK, pad_token_id=PAD,
            lang2id={'en': 0, 'ar': 1}, id2lang={0: 'en', 1: 'ar'})), hf_loss, langs)
    size = dict(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=T + PAD + 1, pad_token_id=PAD,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **kw)
    if kind == 'bert':
        module = transformers.BertForMaskedLM(transformers.BertConfig(**size))
        return AnyModel(module, hf_loss, langs)
    config = transformers.XmodConfig(**{**dict(languages=langs, default_language='en'), **size})
    return AnyModel(transformers.XmodForMaskedLM(config), hf_loss, langs, adapter_of)


def flat(tensors): return torch.cat([t.detach().reshape(-1) for t in tensors])


def settings(steps=6, **kw):
    return TrainConfig.toy(**{**dict(steps=steps, batch_size=8, seq_len=T, eval_every=steps,
                                     checkpoint_every=steps), **kw})


def run(model, streams, cfg, step=None, **kw):
    return train(model, BatchSampler(streams, cfg), cfg, {}, step=step and step(model, cfg),
                 progress=False, **kw)


@pytest.mark.parametrize('kind', ['bert', 'xmod', 'xlm'])
def test_loss_is_the_modules_own_and_the_model_meets_what_is_asked(data, kind):
    streams, V = data
    model = build(kind, V, dropout=0.)
    batch = streams['ar'].batch(0)
    labels = torch.full_like(batch.tokens, -100)
    labels.view(-1)[batch.positions] = batch.targets
    more = {'bert': {}, 'xmod': dict(lang_ids=torch.ones(8, dtype=torch.long)),
            'xlm': dict(langs=torch.ones_like(batch.tokens))}[kind]
    torch.testing.assert_close(model.loss(batch),
                               model.module(input_ids=batch.tokens, labels=labels, **more).loss)
    found = requirements(model, {l: s.batch(0) for l, s in streams.items()})
    assert set(found.values()) <= {'yes', 'nothing belongs to a language'}
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize('kind, step', [('bert', JointStep), ('xmod', MetaStep)])
def test_probe_leaves_training_bit_identical(data, kind, step):
    streams, V = data
    def end(callbacks):
        model = build(kind, V)
        run(model, streams, settings(), step, callbacks=callbacks)
        return flat(model.parameters())
    probe = GradientProbe(ProbeConfig(every=2, n_batches=2))
    assert torch.equal(end([]), end([probe])) and len(probe.rows) == 3
    assert {'all', 'encoder', 'layer 1', 'ffn'} <= probe.rows[0]['cos']['en-ar'].keys()


@pytest.mark.parametrize('kind', ['bert', 'xmod'])
def test_gates_leave_no_trace(data, kind):
    streams, V = data
    model = build(kind, V)
    bits = copy.deepcopy(model.module.state_dict())
    trace = lambda: [(n, id(p), p.requires_grad, id(p.grad))
                     for n, p in model.named_parameters(remove_duplicate=False)]
    before, rng = trace(), torch.get_rng_state()
    groups = [*columns(model, r'attention\.output\.dense\.weight$', 2),
             *columns(model, r'layer\.\d+\.output\.dense\.weight$'), *rows(model, 'embeddings')]
    assert not any('adapter' in s.weight for s in rows(model, ''))      # a language's own
    gates = learn_gates(model, lambda k: model.loss(streams['en'].batch(k)), groups,
                        PruneConfig(steps=3, warmup=1))
    with pytest.raises(ZeroDivisionError), gated(model, gates.fixed()):
        assert 1 / 0
    assert trace() == before and model.training and torch.equal(torch.get_rng_state(), rng)
    assert list(model.module.state_dict()) == list(bits)
    assert all(torch.equal(t, bits[n]) for n, t in model.module.state_dict().items())


@pytest.mark.parametrize('dtype, eps, bound', [(torch.float64, 1e-4, 1e-5),
                                               (torch.float32, 1e-2, 1e-2)])
def test_hypergradient_of_xmod_exact_is_finite_difference(data, dtype, eps, bound):
    streams, V = data
    model = build('xmod', V, initializer_range=.1).to(dtype)
    theta, phi = list(model.theta.values()), list(model.phi['en'].values())
    before, found = flat(model.parameters()), []
    loss = lambda lang, k: lambda: model.loss(streams[lang].batch(k))
    for estimator in (exact, finite_difference):
        torch.manual_seed(1)
        val = [loss(l, 1) for l in LANGS]
        h = hypergradient(theta, phi, loss('en', 0), val, .1, estimator, eps)
        found.append(flat(h.second_order))
    assert (found[0] - found[1]).norm() < bound * found[0].norm() and found[0].norm() > 0
    assert torch.equal(flat(model.parameters()), before)


def test_idle_adapters_stay_where_they_are(data):
    streams, V = data
    model = build('xmod', V)
    cfg = settings()
    step, sampler = JointStep(model, cfg), BatchSampler(streams, cfg)
    k = next(k for k in range(1, 6) if sampler.lang(k) != sampler.lang(0))
    idle = sampler.lang(0)                  # has momentum from step 0
    step(0, sampler, 1e-2)
    before = flat(model.phi[idle].values())
    step(k, sampler, 1e-2)
    assert torch.equal(flat(model.phi[idle].values()), before)


@pytest.mark.parametrize('step', [JointStep, MetaStep, CombinedStep])
def test_killed_and_resumed_is_the_same_run(data, step, tmp_path):
    "Tied weights are in the checkpoint once, and the model's description fits its own."
    streams, V = data
    cfg = settings(checkpoint_every=3)
    def end(folder, *stops):
        for stop in (*stops, None):
            model = build('xmod', V)
            run(model, streams, cfg, step, folder=folder, stop_at=stop)
        return flat(model.parameters())
    assert torch.equal(end(tmp_path / 'a'), end(tmp_path / 'b', 3))
    start = read_jsonl(tmp_path / 'a' / 'record.jsonl')[0]
    assert start['config']['model']['kind'] == 'XmodForMaskedLM'


def hub_like(text):
    "A word tokenizer of the Hugging Face kind, its special ids in other places than ours."
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = dict.fromkeys(w for sentences in text.values() for s in sentences for w in s.split())
    ids = {w: i for i, w in enumerate(['<pad>', '<unk>', *words, '<s>', '</s>', '<mask>'])}
    tok = Tokenizer(models.WordLevel(ids, '<unk>'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token='<pad>', unk_token='<unk>', bos_token='<s>',
        eos_token='</s>', mask_token='<mask>')


def test_two_of_three_languages_of_a_model_with_regional_codes():
    source, codes = ToySource(n_train=50, n_dev=10), ('en_XX', 'ar_AR')
    text = {c: list(source.text(c[:2])) for c in codes}
    tok = hub_like(text)
    streams = {c: TextStream(tok, text[c], c, 8, T) for c in codes}
    torch.manual_seed(0)
    module = transformers.XmodForMaskedLM(transformers.XmodConfig(
        vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=T + 2, pad_token_id=tok.pad_token_id,
        languages=['sw_KE', *codes], default_language='sw_KE'))
    with pytest.raises(InputError, match='sw_KE.*freeze'):
        AnyModel(module, hf_loss, codes, adapter_of)
    for n, p in module.named_parameters(): p.requires_grad_(adapter_of(n) in (None, *codes))
    model = AnyModel(module, hf_loss, codes, adapter_of)
    names = {*model.theta, *(n for own in model.phi.values() for n in own)}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, streams, settings(4), MetaStep)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= names and any('ar_AR' in n for n in moved)
    # a batch may say 'en' where the model says 'en_XX'
    short = TextStream(tok, text['en_XX'], 'en', 8, T).batch(0)
    full = streams['en_XX'].batch(0)
    short.tokens, short.positions, short.targets, short.pad = (
        full.tokens, full.positions, full.targets, full.pad)
    module.eval()
    assert torch.equal(hf_loss(module, short), hf_loss(module, full))


def accumulated_gradient():
    "Compare a step's gradient over short and long sentences with its definition."
    sentences = ['a b', 'a c b a d c a b d c', 'b', 'c a d b a c d', 'd c', 'a a b b c c d d a b c']
    tok = hub_like(dict(en=sentences))
    cfg = settings(1, batch_size=1, accumulate=4)
    stream = TextStream(tok, sentences, 'en', 1, T, mask_prob=.5)
    model = build('bert', len(tok), dropout=0., langs=('en',))
    step, sampler = JointStep(model, cfg), BatchSampler(dict(en=stream), cfg)
    step.backward(sampler.train(0))
    mean_over_processes([p.grad for p in model.parameters() if p.grad is not None])
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    batches, total = [stream.batch(k) for k in range(4)], 0
    for b in batches:                                       # all of them, whatever this process had
        logits = model.module(input_ids=b.tokens, attention_mask=(~b.pad).long()).logits
        total = total - logits.flatten(0, 1).log_softmax(-1)[b.positions, b.targets].sum()
    assert len({len(b.targets) for b in batches}) > 1
    (total / sum(len(b.targets) for b in batches)).backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(flat(found), flat(wanted), rtol=1e-4, atol=1e-6)


def test_every_hidden_token_counts_the_same():
    "However many are hidden in its batch, and whichever process has that batch."
    accumulated_gradient()
    launch(accumulated_gradient, processes=2)


def test_refuses_in_words():
    source = ToySource(n_train=20, n_dev=5)
    text = {l: list(source.text(l)) for l in LANGS}
    tok = hub_like(text)
    batch = TextStream(tok, text['en'], 'en', 4, T).batch(0)
    bert, xmod = build('bert', len(tok)), build('xmod', len(tok))
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer)
    bits = bert.state_dict()
    for wrong, says in (
            (lambda: TextStream(plain, text['en'], 'en', 4, T), 'no mask or no padding token'),
            (lambda: TextStream(tok, [], 'en', 4, T), 'no text'),
            (lambda: TextStream(tok, 'one string', 'en', 4, T), 'one string.*splitlines'),
            (lambda: AnyModel(bert.module, hf_loss, LANGS, adapter_of), "belongs to 'en'"),
            (lambda: AnyModel(bert.module, hf_loss, ()), 'at least one'),
            (lambda: AnyModel(bert.module, hf_loss, ('ar',)).loss(batch), "batch in 'en'"),
            (lambda: AnyModel(bert.module, lambda m, b: b, LANGS).loss(batch), 'loss is a Batch'),
            (lambda: build('bert', 20).loss(batch), 'tokenizer'),
            (lambda: hf_loss(bert.module.bert, batch), 'AutoModelForMaskedLM'),
            (lambda: xmod.load_state_dict(bits), 'another model'),
            (lambda: build('bert', 20).load_state_dict(bits), 'another model .*size mismatch'),
            (lambda: MetaStep(bert, settings()), 'no language-specific')):
        with pytest.raises(InputError, match=says): wrong()
    with torch.autocast('cpu', dtype=torch.bfloat16), pytest.raises(InputError, match='float32'):
        xmod.loss(batch)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert bert.loss(batch).isfinite()


def test_a_frozen_encoder_is_refused_where_shared_weights_move_or_are_compared(data):
    "Adapters on a frozen model train by the plain step, and by no other."
    streams, vocab_size = data
    model, cfg = build('xmod', vocab_size), settings()
    for p in model.theta.values(): p.requires_grad_(False)
    sampler, probe = BatchSampler(streams, cfg), GradientProbe(ProbeConfig(every=1, n_batches=1))
    for wrong in (lambda: MetaStep(model, cfg), lambda: CombinedStep(model, cfg, 'pcgrad'),
                  lambda: train(model, sampler, cfg, {}, callbacks=[probe])):
        with pytest.raises(InputError, match='shared'): wrong()
    before = flat(model.phi['ar'].values())
    train(model, sampler, cfg, {})
    assert not torch.equal(flat(model.phi['ar'].values()), before)


def test_tied_weights_are_saved_once_and_come_back():
    bert = build('bert', 30)
    state = {n: t.clone() for n, t in bert.state_dict().items()}
    assert len({t.data_ptr() for t in bert.state_dict().values()}) == len(state)
    with torch.no_grad():
        for p in bert.parameters(): p.add_(1)
    bert.load_state_dict(state)
    assert all(torch.equal(t, state[n]) for n, t in bert.state_dict().items())
    assert bert.module.cls.predictions.decoder.weight is bert.module.get_input_embeddings().weight


def byte_level(lines, size=300):
    "A tokenizer like RoBERTa's: the blank before a word belongs to it."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=size, special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token='<pad>', unk_token='<unk>', cls_token='<s>',
        sep_token='</s>', mask_token='<mask>')


def test_words_are_cut_as_in_their_sentence():
    "Byte-level pieces hold the blank before a word; a word alone is another one."
    lines = ['the old king reigns in the castle', 'kings of old reign the old way']
    hub = byte_level(lines, 320)
    tok = HubTokenizer(hub)
    for line in lines:
        ids = hub(line, add_special_tokens=False)['input_ids']
        assert tok.encode(line) == ids == tok.encode_words(line.split())[0]
        places = [line[a:b] for a, b in tok.encode_offsets(line)[1]]
        assert ''.join(places) == line.replace(' ', '')


def test_a_padded_vocabulary_is_taken_and_another_one_refused(capsys):
    tok = HubTokenizer(byte_level(['the old king']))
    def encoder(size): return HubEncoder(transformers.BertModel(transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, pad_token_id=1)), tok)
    assert encoder(tok.vocab_size + 5).cfg.vocab_size == tok.vocab_size
    assert 'has 5 embeddings that its tokenizer does not use' in capsys.readouterr().err
    for size in (tok.vocab_size - 1, tok.vocab_size + 65):
        with pytest.raises(InputError, match='the vocabulary has'): encoder(size)


def test_rows_are_no_longer_than_the_positions_of_a_model():
    "RoBERTa keeps the first positions for padding."
    hub = byte_level(['the old king'])
    config = transformers.RobertaConfig(
        vocab_size=len(hub), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=34, pad_token_id=1)
    encoder = HubEncoder(transformers.RobertaModel(config), HubTokenizer(hub))
    assert encoder.cfg.max_len == 32
    encoder(torch.full((1, 32), 5), 'en')
    model = AnyModel(transformers.RobertaForMaskedLM(config), hf_loss, ('en',))
    long = TextStream(hub, ['the old king ' * 20], 'en', 1, 60).batch(0)
    with pytest.raises(InputError, match='the model has places for 32'): model.loss(long)


def test_sentences_without_anything_to_predict_are_left_out(capsys):
    source = ToySource(n_train=20, n_dev=5)
    tok = hub_like({'en': list(source.text('en'))})
    bare = tok('the', add_special_tokens=False)['input_ids']
    assert len(bare) == 1                                       # this kind adds no borders
    stream = CausalStream(tok, ['the', 'the old king'], 'en', 4, T)
    assert len(stream.rows) == 1 and "1 of 2 sentences in 'en'" in capsys.readouterr().err
    assert (stream.batch(0).tokens.shape[1]) == 3
    with pytest.raises(InputError, match="no sentence in 'en' has a token to predict"):
        CausalStream(tok, ['the', ''], 'en', 4, T)
    with pytest.raises(InputError, match='seed is -1'):
        CausalStream(tok, ['the old king'], 'en', 4, T, seed=-1)
