"Finetuning on folders, real and faulty, and through kills: what a notebook cell cannot show."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from interference_nb.adapters import MultilingualLM
from interference_nb.data import FolderSource, InputError, load_tokenizer, train_tokenizer
from interference_nb.finetune import FinetuneConfig, finetune, predict, read_data, span_f1, tune
from interference_nb.pretrain import load_checkpoint
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import ModelConfig

CFG = FinetuneConfig.toy(epochs=2, max_train=64, max_dev=32, max_eval=32)
ROW = dict(tokens=['Ada', 'met', 'Bo', '.'], ner_tags=[1, 0, 1, 0])


def toy_model(langs=('en', 'x3'), variant='adpt', **kw):
    "Make an untrained toy model with its source and tokenizer."
    source = ToySource(n_labelled=200, n_eval=50)
    tok = toy_tokenizer(source, langs)
    torch.manual_seed(0)
    cfg = replace(ModelConfig.toy(tok.vocab_size), **kw)
    return MultilingualLM(cfg, langs, variant), tok, source


def folder_of(path, rows, splits=('train', 'validation', 'test')):
    "Write a folder with a line of text and the same NER rows in each split."
    import pyarrow as pa
    import pyarrow.parquet as pq
    types = [('tokens', pa.list_(pa.string())), ('ner_tags', pa.list_(pa.int64()))]
    for kind, table in (('text', pa.table({'text': ['Ada met Bo .']})),
                        ('ner', pa.Table.from_pylist(rows, pa.schema(types)))):
        (path/kind/'en').mkdir(parents=True)
        for split in splits: pq.write_table(table, path/kind/'en'/f'{split}.parquet')
    return FolderSource(path)


@pytest.mark.parametrize('task, rows, message', [
    ('pos', [ROW], 'no pos/en/test.parquet'),
    ('ner', [], "the test set of ner in 'en' is empty"),
    ('ner', [ROW | dict(ner_tags=[1, 0, 9, 0])], 'label 9 in a row of ner'),
    ('ner', [ROW | dict(ner_tags=[1, 0])], '4 words with 2 labels'),
    ('ner', [dict(tokens=[], ner_tags=[])], "the test set of ner in 'en' is empty")])
def test_faulty_folder(tmp_path, task, rows, message):
    model, tok, _ = toy_model()
    source = folder_of(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        finetune(model, tok, task, source, 'en', ['en'], CFG)


def test_folder_of_one_sentence(tmp_path):
    model, tok, _ = toy_model()
    r = finetune(model, tok, 'ner', folder_of(tmp_path, [ROW]), 'en', ['en'], CFG)
    assert set(r['scores']['en']) == {'f1', 'accuracy'} and len(r['dev']) == CFG.epochs


def test_long_sentences_are_answered_whole():
    model, tok, source = toy_model()
    tuned, *_ = tune(model, tok, 'ner', source, 'en', replace(CFG, max_len=6))
    data = read_data('ner', source, 'en', 'test', tok, 6)
    assert len(data.pieces) > len(data.rows)
    for row, tags in zip(data.rows, predict(tuned, data, 'en'), strict=True):
        assert len(tags) == len(row['tokens'])


@pytest.mark.parametrize('variant', ['joint', 'ffn', 'attn', 'share_adpt'])
def test_every_variant(variant):
    model, tok, source = toy_model(variant=variant)
    r = finetune(model, tok, 'pos', source, 'x3', ['x3', 'en'], CFG)
    assert r['scores']['x3']['accuracy'] > 20


CHILD = '''
import sys; sys.path.insert(0, sys.argv[2])
from test_finetune import CFG, replace, toy_model, tune
model, tok, source = toy_model(dropout=.1)
tune(model, tok, 'pos', source, 'en', replace(CFG, epochs=40), sys.argv[1])
'''


def test_killed_from_outside(tmp_path):
    here = os.path.dirname(__file__)
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path/'cut'), here])
    last = tmp_path/'cut'/'last.safetensors'
    while not last.exists() and child.poll() is None: time.sleep(.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = len(load_checkpoint(last)[1]['history'])
    assert 1 <= done < 40
    model, tok, source = toy_model(dropout=.1)
    again, whole = (tune(model, tok, 'pos', source, 'en', replace(CFG, epochs=40), f)
                    for f in (tmp_path/'cut', None))
    assert again[1:] == whole[1:]
    a, b = again[0].state_dict(), whole[0].state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_cut_checkpoint(tmp_path):
    model, tok, source = toy_model()
    tune(model, tok, 'pos', source, 'en', CFG, tmp_path)
    last = tmp_path/'last.safetensors'
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(InputError, match='is not a whole checkpoint'):
        tune(model, tok, 'pos', source, 'en', CFG, tmp_path)


def test_import_is_light():
    code = 'import sys, interference_nb.finetune; print(*sys.modules)'
    out = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert not {'seqeval', 'sklearn', 'safetensors', 'pyarrow', 'sentencepiece'} & set(out.split())


DATA = os.environ.get('INTERFERENCE_DATA')


@pytest.mark.skipif(not DATA, reason='needs WikiAnn: let INTERFERENCE_DATA name a folder with it')
@pytest.mark.parametrize('task', ['ner', 'pos'])
def test_real_data(tmp_path, task):
    "Small and untrained: the path is tested, not the score."
    from seqeval.metrics import f1_score
    source = FolderSource(DATA)
    train_tokenizer(source, ['en', 'sw'], 2000, sample_sentences=4000).save(tmp_path/'tok')
    tok = load_tokenizer(tmp_path/'tok')
    torch.manual_seed(0)
    model = MultilingualLM(ModelConfig.toy(tok.vocab_size), ('en', 'sw'), 'adpt')
    cfg = FinetuneConfig.toy(epochs=2, max_train=400, max_dev=100, max_eval=200)
    r = finetune(model, tok, task, source, 'en', ['en', 'sw'], cfg)
    assert set(r['scores']) == {'en', 'sw'} and r['dev'][1]['loss'] < r['dev'][0]['loss']
    tuned, *_ = tune(model, tok, task, source, 'en', cfg)
    data = read_data(task, source, 'en', 'test', tok, 64, 200)
    gold = [[tuned.spec.labels[l] for l in row['labels']] for row in data.rows]
    said = predict(tuned, data, 'en')
    as_spans = lambda tags: tags if task == 'ner' else [['I-' + t for t in s] for s in tags]
    assert span_f1(gold, said) == pytest.approx(100 * f1_score(as_spans(gold), as_spans(said)))
    assert r['scores']['en']['f1'] == pytest.approx(span_f1(gold, said))
