"Exported models: equal scores, equal ids, the same bits back, and what is broken is named."
import json, random, shutil, unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch

transformers = pytest.importorskip('transformers')
import huggingface_hub

from interference_nb import export
from interference_nb.adapters import MultilingualLM
from interference_nb.tokenizers import Tokenizer, WordTokenizer
from interference_nb.files import InputError, require_package
from interference_nb.export import (ADAPTERS, OWN_TOKENIZER, WEIGHTS, export_hf, from_xlm,
                                    import_hf, one_language, push_to_hub, save_hf_tokenizer,
                                    to_xlm, with_adapters, xlm_shape)
from interference_nb.hub_models import open_masked_lm
from interference_nb.transformer import ModelConfig

LANGS = ('en', 'to')        # 'to' is also a method of modules
WORDS = WordTokenizer(f'w{i}' for i in range(25))
V = WORDS.vocab_size
SMALL = ModelConfig(V, dim=16, n_layers=2, n_heads=2, ffn_dim=32, max_len=12)
ODD = replace(SMALL, dim=20, n_heads=3, ffn_dim=90)     # like the paper's: 3 heads of 6 in 20


def build(variant='adpt', cfg=SMALL, seed=0, langs=LANGS):
    torch.manual_seed(seed)
    model = MultilingualLM(cfg, langs, variant).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .2)
    return model


@pytest.fixture(scope='module')
def adpt(tmp_path_factory):
    return export_hf(build(), WORDS, tmp_path_factory.mktemp('out') / 'adpt', commit='abc')


@pytest.fixture
def copy(adpt, tmp_path):
    return Path(shutil.copytree(adpt, tmp_path / 'copy'))


def same_bits(a, b):
    assert (a.cfg, a.langs, a.variant) == (b.cfg, b.langs, b.variant)
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y) and all(torch.equal(x[n], y[n]) for n in x)


def test_weights_come_back_bit_for_bit_from_any_shape():
    rng = random.Random(0)
    for seed in range(25):
        heads, width = rng.randint(1, 5), rng.randint(1, 9)
        cfg = replace(SMALL, dim=rng.randint(8, 40), n_heads=heads, head_dim=width,
                      n_layers=rng.choice((1, 2, 12)), ffn_dim=rng.randint(1, 150),
                      language_embeddings=rng.random() < .5)
        model = build('joint', cfg, seed, LANGS[:rng.randint(1, 2)])
        back = from_xlm(to_xlm(model), cfg, model.langs)
        assert {*back} == {*model.state_dict()}
        assert all(torch.equal(t, back[n]) for n, t in model.state_dict().items()), cfg


def test_heads_that_no_xlm_holds_are_refused():
    with pytest.raises(InputError, match='do not fit XLM'):
        xlm_shape(replace(SMALL, n_heads=200, head_dim=16))


@pytest.mark.parametrize('variant', ['joint', 'ffn', 'attn', 'adpt', 'share_adpt'])
@pytest.mark.parametrize('cfg', [SMALL, ODD, replace(ODD, language_embeddings=True)],
                         ids=['small', 'odd', 'vectors'])
def test_scores_are_equal_and_bits_come_back(variant, cfg, tmp_path):
    "At real tokens, with padding, in the language chosen."
    model, own = build(variant, cfg), variant in ('ffn', 'attn')
    out = export_hf(model, WORDS, tmp_path / 'x', 'to' if own else None)
    same_bits(import_hf(out)[0], one_language(model, 'to') if own else model)
    theirs, found = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == 'XLMWithLMHeadModel' and not any(found.values())
    tokens = torch.randint(5, V, (3, 12))
    pad = torch.arange(12) >= torch.tensor([[12], [7], [1]])
    tokens[pad] = 2
    more = dict(attention_mask=(~pad).long())
    if theirs.config.use_lang_emb:
        more['langs'] = torch.full_like(tokens, theirs.config.lang2id['to'])
    with torch.no_grad():
        wanted = model.scores(model(tokens, 'to', pad))
        if 'adpt' in variant:
            with with_adapters(theirs, out, 'to'): logits = theirs(tokens, **more).logits
            assert not torch.allclose(theirs(tokens, **more).logits[~pad], wanted[~pad], atol=1e-2)
        else: logits = theirs(tokens, **more).logits
    scale = max(1, wanted.abs().max().item())
    assert (logits - wanted)[~pad].abs().max() <= 1e-5 * scale


@pytest.mark.parametrize('name', ['config.json', WEIGHTS, ADAPTERS, 'tokenizer.json',
                                  OWN_TOKENIZER])
@pytest.mark.parametrize('damage', ['gone', 'empty', 'half'])
def test_a_folder_cut_short_is_refused(copy, name, damage):
    file = copy / name
    content = file.read_bytes()
    file.unlink()
    if damage != 'gone': file.write_bytes(content[:len(content) // 2] if damage == 'half' else b'')
    with pytest.raises(InputError, match=r'(?i)copy|write|name a folder|train one'): import_hf(copy)


@pytest.mark.parametrize('change, reason', [
    (lambda c: c.update(model_type='bert'), "kind 'bert'"),
    (lambda c: c.pop('interference_nb'), 'open_masked_lm'),
    (lambda c: c['interference_nb'].update(variant='share_adpt'), 'does not belong'),
    (lambda c: c['interference_nb'].update(variant='joint2'), 'unknown variant'),
    (lambda c: c['interference_nb'].update(langs=['en', 'fr']), 'does not belong'),
    (lambda c: c['interference_nb']['model'].update(dim=32), 'does not belong'),
    (lambda c: c['interference_nb']['model'].update(n_layers=3), 'does not belong'),
    (lambda c: c['interference_nb']['model'].update(vocab_size=99), 'does not belong'),
    (lambda c: c['interference_nb']['model'].update(fancy=1), 'fancy'),
    (lambda c: c['interference_nb']['model'].update(n_heads=0), 'n_heads is 0'),
    (lambda c: c['interference_nb']['model'].update(language_embeddings=True), 'two orders'),
    (lambda c: c['interference_nb'].pop('files'), 'another export'),
    (lambda c: c['interference_nb'].pop('langs'), 'langs')])
def test_another_architecture_is_refused(copy, change, reason):
    config = json.loads((copy / 'config.json').read_text())
    change(config)
    (copy / 'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match=reason): import_hf(copy)


@pytest.mark.parametrize('cfg, seed', [(replace(SMALL, dim=32), 0), (SMALL, 1)])
def test_another_models_files_are_refused(copy, cfg, seed, tmp_path):
    other = export_hf(build(cfg=cfg, seed=seed), WORDS, tmp_path / 'other')
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(copy)
    with pytest.raises(InputError, match='another model'), with_adapters(theirs, other, 'en'): pass
    shutil.copy(other / ADAPTERS, copy / ADAPTERS)
    with pytest.raises(InputError, match=ADAPTERS): import_hf(copy)
    with pytest.raises(InputError, match=ADAPTERS), with_adapters(theirs, copy, 'en'): pass
    shutil.copy(other / WEIGHTS, copy / WEIGHTS)
    with pytest.raises(InputError, match=WEIGHTS): import_hf(copy)


def test_languages_in_another_order_are_refused(tmp_path):
    out = export_hf(build('joint', replace(SMALL, language_embeddings=True)), WORDS, tmp_path / 'x')
    config = (out / 'config.json').read_text()
    about = json.loads(config)
    about['interference_nb']['langs'].reverse()
    (out / 'config.json').write_text(json.dumps(about))
    with pytest.raises(InputError, match='two orders'): import_hf(out)
    (out / 'config.json').write_text(config)
    same_bits(import_hf(out)[0], build('joint', replace(SMALL, language_embeddings=True)))


def test_adapters_leave_no_trace(adpt):
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(adpt)
    with pytest.raises(KeyError), with_adapters(theirs, adpt, 'en'): raise KeyError
    assert not any(m._forward_hooks for m in theirs.modules())
    with (pytest.raises(InputError, match='unknown language'),
          with_adapters(theirs, adpt, 'xx')): pass
    plain = build()
    for b in plain.blocks: b.attention_adapter = b.ffn_adapter = None
    tokens = torch.randint(5, V, (2, 9))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, plain.scores(plain(tokens)), atol=1e-4)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / 'x'
    for wrong, reason in (
            (lambda: export_hf(build('ffn'), WORDS, out), "lang='en'"),
            (lambda: export_hf(build('ffn'), WORDS, out, 'fr'), "unknown language 'fr'"),
            (lambda: export_hf(build(), WordTokenizer(['a']), out), 'has 6 subwords'),
            (lambda: export_hf(torch.nn.Linear(1, 1), WORDS, out), 'Linear is not our model')):
        with pytest.raises(InputError, match=reason): wrong()
    (tmp_path / 'full').mkdir(); (tmp_path / 'full' / 'mine.txt').write_text('keep me')
    for place, reason in (('full', 'not empty'), ('full/mine.txt', 'could not write .*mine.txt'),
                          ('full/mine.txt/x', 'could not write .*mine.txt/x')):
        with pytest.raises(InputError, match=reason): export_hf(build(), WORDS, tmp_path / place)
    def full_disk(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(export, 'save_hf_tokenizer', full_disk)
    with pytest.raises(InputError, match='No space left'): export_hf(build(), WORDS, out)
    assert [p.name for p in tmp_path.iterdir()] == ['full']


def test_an_export_that_is_there_already_is_left_alone(tmp_path):
    "And so can be pushed after a push that failed; others may read it as far as the umask lets."
    out = export_hf(build(), WORDS, tmp_path / 'x', commit='abc')
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert export_hf(build(), WORDS, out, commit='abc') == out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1
    for model, commit in ((build(seed=1), 'abc'), (build(), 'abd')):
        with pytest.raises(InputError, match='not empty'):
            export_hf(model, WORDS, out, commit=commit)
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_the_model_that_is_exported_is_left_as_it_was(tmp_path):
    model = build('attn', replace(SMALL, language_embeddings=True))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random_before = torch.get_rng_state()
    back, _ = import_hf(export_hf(model, WORDS, tmp_path / 'x', 'en'))
    assert torch.equal(random_before, torch.get_rng_state())
    with torch.no_grad():
        for p in back.parameters(): p.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
    rng = random.Random(0)
    alphabet = ('aeiouststr.,-é' + 'ะาก' + 'कतन\u093c\u094d'
                + 'ಕ\u0cc6\u0cc2\u0cd5\u0cca\u0ccb' + 'дяо')
    words = [''.join(rng.choices(alphabet, k=rng.randint(1, 7))) for _ in range(300)]
    text = [' '.join(rng.choices(words, k=8)) for _ in range(600)]
    tok = Tokenizer.train(text, 200, character_coverage=1., threads=1)
    folder = tmp_path_factory.mktemp('bpe')
    save_hf_tokenizer(tok, folder, 64)
    return tok, transformers.AutoTokenizer.from_pretrained(folder), text, alphabet


def test_subwords_have_the_same_ids(bpe):
    tok, hub, text, alphabet = bpe
    rng = random.Random(1)
    text = text[:200] + [''.join(rng.choices(alphabet + '  \t#日', k=rng.randint(0, 30)))
                         for _ in range(800)]
    text += ['a' * n for n in range(40)] + ['st' * n for n in range(20)]
    text += [unicodedata.normalize('NFC', t) for t in text[:100]]
    found = hub(text, add_special_tokens=False)['input_ids']
    assert [t for t, ids in zip(text, found) if ids != tok.encode(t)] == []
    assert hub('a b', 'c')['input_ids'] == [0, *tok.encode('a b'), 1, *tok.encode('c'), 1]
    assert set(hub('a')) == {'input_ids', 'attention_mask'}     # XLM would add token types


def test_words_have_the_same_ids(tmp_path):
    tok = WordTokenizer(['kato', '·ni', 'è', '.'])
    save_hf_tokenizer(tok, tmp_path, 8)
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for t in ('kato·ni .', '', ' ', '·ni', 'kato·', '··', 'kato\u00a0·ni\x1c.\u3000è\u0085.',
              'nobody'):
        assert hub(t, add_special_tokens=False)['input_ids'] == tok.encode(t), t


def test_only_bpe_is_exported(tmp_path):
    import io, sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['a b ab ba abc'] * 50), model_writer=model, model_type='unigram',
        vocab_size=10, hard_vocab_limit=False, bos_id=0, eos_id=1, pad_id=2, unk_id=3,
        control_symbols=['<mask>'], minloglevel=2)
    with pytest.raises(InputError, match='only BPE'):
        save_hf_tokenizer(Tokenizer(model.getvalue()), tmp_path, 8)


def test_only_whole_masked_models_are_probed(tmp_path, adpt):
    out = export_hf(build('joint'), WORDS, tmp_path / 'joint')
    model, tokenizer = open_masked_lm(out, LANGS)
    assert model.langs == LANGS and tokenizer.mask_token_id == 4
    with pytest.raises(InputError, match='cannot open'):
        open_masked_lm(tmp_path, LANGS, offline=True)
    with pytest.raises(InputError, match='import_hf'): open_masked_lm(adpt, LANGS)
    headless = transformers.AutoModel.from_pretrained(out)      # saves no bias of the scores
    headless.save_pretrained(out)
    with pytest.raises(InputError, match='pred_layer.proj.bias'): open_masked_lm(out, LANGS)


class StandIn:
    "As much of HfApi as is called; it remembers, and fails as it is told."
    def __init__(self, token=None): self.seen.append(token)
    def create_repo(self, repo_id, **kw):
        if self.error: raise self.error
        self.seen.append((repo_id, kw))
    def repo_info(self, repo_id): return SimpleNamespace(private=self.private)
    def upload_folder(self, **kw):
        self.seen.append(kw)
        return SimpleNamespace(commit_url='url')


@pytest.fixture
def api(monkeypatch):
    StandIn.seen, StandIn.error, StandIn.private = [], None, True
    monkeypatch.setattr(huggingface_hub, 'HfApi', StandIn)
    return StandIn


def test_push_uploads_the_export_and_no_more(copy, api):
    (copy / 'secret.txt').write_text('not yours')
    assert push_to_hub(copy, 'me/x', token='t') == 'url'
    token, (repo, how), upload = api.seen
    assert token == 't' and repo == 'me/x' and how['private'] is True
    assert 'secret.txt' not in upload['allow_patterns'] and upload['folder_path'] == str(copy)
    assert {p.name for p in copy.iterdir()} - {'secret.txt'} == {*upload['allow_patterns']}


def test_push_refuses(copy, api, monkeypatch):
    errors = huggingface_hub.errors
    refusal = errors.HfHubHTTPError('401 Unauthorized', response=SimpleNamespace(
        status_code=401, headers={}, request=None))
    for error, reason in ((errors.LocalTokenNotFoundError('x'), 'not logged in'),
                          (errors.HFValidationError('x'), 'no name for a model'),
                          (refusal, 'hf auth login')):
        api.error = error
        with pytest.raises(InputError, match=reason): push_to_hub(copy, 'me/x')
    api.error, api.private = None, False
    with pytest.raises(InputError, match='public'): push_to_hub(copy, 'me/x')
    (copy / WEIGHTS).write_bytes(b'')
    api.seen.clear()
    with pytest.raises(InputError, match=WEIGHTS): push_to_hub(copy, 'me/x', private=False)
    assert not api.seen
    with pytest.raises(InputError, match=r"install 'interference_nb\[transformers\]'"):
        require_package('no_such_package')


def test_a_hub_that_cannot_be_reached_is_named(adpt, monkeypatch):
    nowhere = partial(huggingface_hub.HfApi, endpoint='http://127.0.0.1:9')
    monkeypatch.setattr(huggingface_hub, 'HfApi', nowhere)
    with pytest.raises(InputError, match='me/x did not reach the hub.*Is it reachable'):
        push_to_hub(adpt, 'me/x', token='t')


def test_a_folder_saved_again_by_transformers_is_told_from_a_cut_one(adpt, tmp_path):
    transformers.AutoModelForMaskedLM.from_pretrained(adpt).save_pretrained(tmp_path/'again')
    with pytest.raises(InputError, match='saved again by transformers .*export_hf wrote'):
        import_hf(tmp_path/'again')


def test_the_card_says_how_special_tokens_in_a_text_are_read(adpt):
    "Transformers finds them in a text, as fill-mask needs; training did not."
    usual = transformers.AutoTokenizer.from_pretrained(adpt)
    assert usual('w1 <s> w2', add_special_tokens=False)['input_ids'] == [6, 0, 7]
    assert WORDS.encode('w1 <s> w2') == [6, 3, 7]
    assert '`<s>`' in (adpt/'README.md').read_text() and 'read them as text' in (
        adpt/'README.md').read_text()


def test_names_cannot_write_markdown(tmp_path):
    langs = ('en', '[x](y)|`*')
    out = export_hf(build('joint', langs=langs), WORDS, tmp_path/'x', commit='<b>\n# new')
    title, = [l for l in (out/'README.md').read_text().splitlines() if l.startswith('# ')]
    assert title == r'# A masked language model of en, \[x\](y)\|\`\*'
    assert r'- commit: \<b\> \# new' in (out/'README.md').read_text()


@pytest.mark.parametrize('change, said', [
    (lambda c: c['interference_nb'].update(langs='ensw'), "langs is 'ensw'"),
    (lambda c: c['interference_nb'].update(langs=[1]), 'langs is [1]'),
    (lambda c: c['interference_nb']['model'].update(n_layers=10**6), 'n_layers is 1000000'),
    (lambda c: c['interference_nb']['model'].update(vocab_size=-1), 'vocab_size is -1')])
def test_a_config_beyond_reason_is_refused_at_once(change, said, copy):
    config = json.loads((copy/'config.json').read_text())
    change(config)
    (copy/'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError) as e: import_hf(copy)
    assert said in str(e.value)


@pytest.mark.parametrize('cfg', [
    replace(SMALL, adapter_width=3), replace(SMALL, layers_without_adapters=(1,))], ids=str)
def test_adapters_of_another_width_or_in_fewer_layers(cfg, tmp_path):
    "They have the size asked for, are missing where they were left out, and come back the same."
    model = build(cfg=cfg)
    sizes = {n: tuple(t.shape) for n, t in model.state_dict().items() if '_adapter.en.down' in n}
    layers = {0} if cfg.layers_without_adapters else {0, 1}
    assert sizes == {f'blocks.{i}.{where}_adapter.en.down.weight': (cfg.adapter_width or 4, 16)
                     for i in layers for where in ('attention', 'ffn')}
    out = export_hf(model, WORDS, tmp_path/'x')
    same_bits(import_hf(out)[0], model)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out)
    tokens = torch.randint(5, V, (2, 12))
    with torch.no_grad(), with_adapters(theirs, out, 'to'):
        assert torch.allclose(theirs(tokens).logits, model.scores(model(tokens, 'to')), atol=1e-4)
    with pytest.raises(InputError, match='layers_without_adapters has 2'):
        replace(SMALL, layers_without_adapters=(2,))


def test_a_full_disk_stops_an_export_whole(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(export.os, 'replace', full)
    with pytest.raises(InputError, match='No space left on device.*Make room'):
        export_hf(build(), WORDS, tmp_path/'x')
    assert not list(tmp_path.iterdir())
