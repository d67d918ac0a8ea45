"Models of the hub under finetuning: several processes, and kin of XLM."
import json
from dataclasses import replace
import pytest
import torch

transformers = pytest.importorskip('transformers')
pytest.importorskip('sacremoses')

from interference_nb import experiments
from interference_nb.experiments import SCALES, RunSpec, System, for_tasks, run
from interference_nb.records import load, summarise
from interference_nb.finetune import FinetuneConfig, finetune
from interference_nb.hub_models import HubEncoder, HubTokenizer, open_encoder
from interference_nb.toy_languages import ToySource

CFG = FinetuneConfig.toy(epochs=2, max_train=64, max_dev=32, max_eval=32)
LANGS = ('en', 'x3')


@pytest.fixture(scope='module')
def source(): return ToySource(n_labelled=200, n_eval=50)


@pytest.fixture(scope='module')
def xlm(tmp_path_factory, source):
    "Write an XLM of letters, without merges, with language embeddings."
    home = tmp_path_factory.mktemp('xlm')
    letters = sorted({c for l in LANGS for p in source.speakers[l].pieces() for c in p} | {'.'})
    special = ['<s>', '</s>', '<pad>', '<unk>', *(f'<special{i}>' for i in range(10))]
    ids = {p: i for i, p in enumerate([*special, *letters, *(c + '</w>' for c in letters)])}
    (home/'vocab.json').write_text(json.dumps(ids), encoding='utf-8')
    (home/'merges.txt').write_text('', encoding='utf-8')
    torch.manual_seed(0)
    transformers.XLMModel(transformers.XLMConfig(
        vocab_size=len(ids), emb_dim=16, n_layers=1, n_heads=2, n_langs=2,
        lang2id=dict(en=0, x3=1))).save_pretrained(home)
    return home


def test_search_side_by_side(xlm, source):
    torch.set_num_threads(1)
    model, tok = open_encoder(xlm)
    one, two = (finetune(model, tok, 'ner', source, 'en', LANGS, CFG, dict(lr=(1e-3, 4e-3)),
                       workers=n) for n in (1, 2))
    assert (one['scores'], one['dev'], one['finetune']) == (two['scores'], two['dev'],
                                                           two['finetune'])


def test_it_is_a_system(xlm, tmp_path, monkeypatch):
    "Figure 1's third bar: a run without pretraining, held like any other."
    monkeypatch.setitem(experiments.SYSTEMS, 'xlm', System(mono=True, hub=dict(name=str(xlm))))
    brief = dict(epochs=1, max_train=64, max_dev=32, max_eval=32)
    scale = replace(SCALES['toy'], finetune=for_tasks(FinetuneConfig.toy, **brief))
    spec = RunSpec('xlm', ('x3',), ('x3',), 0, scale, 'toy', ('ner',))
    rows = run(spec, tmp_path)
    assert [r['kind'] for r in rows] == ['start', 'finetune', 'done']
    scores = load(tmp_path)[['system', 'train', 'test']].itertuples(index=False, name=None)
    assert set(scores) == {('xlm', 'x3', 'x3')}
    assert run(spec, tmp_path) == rows
    assert 'NER within' in summarise(load(tmp_path))


def test_vocabulary_has_a_fingerprint(xlm, tmp_path):
    tok, again = (open_encoder(xlm)[1] for _ in range(2))
    assert tok.fingerprint == again.fingerprint
    (xlm/'merges.txt').write_text('e n</w>\n', encoding='utf-8')
    assert open_encoder(xlm)[1].fingerprint != tok.fingerprint
    (xlm/'merges.txt').write_text('', encoding='utf-8')


@pytest.mark.parametrize('kind', ['bert', 'xlm-roberta'])
def test_kin(kind, source):
    "Models with a fast tokenizer, whose special tokens are elsewhere."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    pieces = dict.fromkeys(p for l in LANGS for p in source.speakers[l].pieces())
    special = dict(cls='[CLS]', sep='[SEP]', unk='[UNK]', pad='[PAD]')
    ids = {p: i for i, p in enumerate([*pieces, *special.values()])}
    words = Tokenizer(models.WordLevel(ids, '[UNK]'))
    words.normalizer = normalizers.Replace('·', ' ·')
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = HubTokenizer(transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=62,
        **{f'{k}_token': t for k, t in special.items()}))
    torch.manual_seed(0)
    size = dict(vocab_size=len(ids), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=64 + len(ids),
                pad_token_id=ids['[PAD]'])
    make = dict(bert=lambda: transformers.BertModel(transformers.BertConfig(**size)),
                **{'xlm-roberta': lambda: transformers.XLMRobertaModel(
                    transformers.XLMRobertaConfig(**size))})
    model = HubEncoder(make[kind](), tok)
    assert model.cfg.max_len == 62 and model.langs == ()
    context = next(source.text('en')).split('\n')[0]
    assert tok.encode(context) == tok.hub.convert_tokens_to_ids(tok.hub.tokenize(context))
    for task in ('pos', 'qa'):
        assert set(finetune(model, tok, task, source, 'en', LANGS, CFG)['scores']) == set(LANGS)
