"People's own files: which content a run was made from, labels by name, rows that cannot be used."
import json
import re
import time
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from interference_nb import data, experiments
from interference_nb.adapters import MultilingualLM
from interference_nb.cli import main
from interference_nb.data import (NER_LABELS, NLI_LABELS, UPOS_LABELS, prepare_corpus,
                                  split_sentences, train_tokenizer)
from interference_nb.experiments import SCALES, Scale, plan, run
from interference_nb.files import InputError, read_jsonl
from interference_nb.finetune import FinetuneConfig, finetune
from interference_nb.folders import FolderSource
from interference_nb.gradient_probes import conflict
from interference_nb.pretrain import TrainConfig
from interference_nb.reproduce import STUDIES
from interference_nb.retrieval import parallel_lines, retrieval, sentence_vectors
from interference_nb.tasks import read_data
from interference_nb.tokenizers import UNK, WordTokenizer, load_tokenizer
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import ModelConfig

LINES = {'zh-yue': ['今日落雨。我唔去。', '佢話好。', '落完雨喇。我哋去啦。'],
         'sr-Latn': ['Ada čita knjigu. Pada kiša.', 'Selo je malo.', 'Voda je hladna. Ada peva.']}
TINY = ('toy --system joint --model.vocab-size 60 --model.dim 8 --model.n-layers 1 '
        '--model.ffn-dim 16 --model.n-heads 2 --train.steps 2 --train.batch-size 2 '
        "--train.seq-len 8 --train.warmup 1 --train.eval-every 2").split()


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(table, str): path.write_text(table, encoding='utf-8')
    else: pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table),
                         path)
    return path


def text_of(folder, times=30):
    "Two languages with hyphens, each split in a file of its own."
    for lang, lines in LINES.items():
        for split in ('train', 'validation', 'test'):
            write(folder/f'text/{lang}/{split}.parquet', [dict(text=l) for l in lines * times])
    return folder


def command(*words):
    "Run the program in this process; its status."
    try: main([str(w) for w in words])
    except SystemExit as e: return e.code or 0
    return 0


def pretrain(data, out, *more):
    return command('pretrain', *TINY, '--langs', 'zh-yue', 'sr-Latn', '--data', data, '--out', out,
                   *more)


def test_other_content_under_a_finished_run_is_refused_and_a_move_changes_nothing(tmp_path, capsys):
    "The content decides: not the folder's name, its place or a file's time."
    a, b = text_of(tmp_path/'a'/'data'), text_of(tmp_path/'b'/'data')
    assert pretrain(a, tmp_path/'out') == 0
    home = tmp_path/'out'/'joint-zh-yue+sr-Latn-0'
    record, told = (home/'record.jsonl').read_bytes(), capsys.readouterr().out.splitlines()[-1]
    start = read_jsonl(home/'record.jsonl')[0]
    files = {f'text/{l}/{s}.parquet' for l in LINES for s in ('train', 'validation', 'test')}
    assert set(start['inputs']) == files | {'vocabulary'}
    assert all(len(v) == 64 for v in start['inputs'].values())
    assert pretrain(b, tmp_path/'out') == 0                         # a copy elsewhere: the same
    (a).rename(tmp_path/'moved')
    assert pretrain(tmp_path/'moved', tmp_path/'out') == 0
    assert capsys.readouterr().out.splitlines()[-1] == told
    write(b/'text/sr-Latn/train.parquet', [dict(text='Sasvim drugi tekst. Zaista.')] * 90)
    for more in (), ('--train.steps', '2'):
        assert pretrain(b, tmp_path/'out', *more) == 2
        error = capsys.readouterr().err
        assert 'text/sr-Latn/train.parquet has other content' in error
        assert 'zh-yue/train' not in error
    assert command('probe', '--run', home, '--data', b, '--repeats', 1) == 2
    assert 'text/sr-Latn/train.parquet has other content' in capsys.readouterr().err
    (b/'text/sr-Latn/test.parquet').unlink()
    assert pretrain(b, tmp_path/'out') == 2
    assert 'text/sr-Latn/test.parquet is gone' in capsys.readouterr().err
    assert (home/'record.jsonl').read_bytes() == record             # nothing was lost
    write(b/'text/sr-Latn/train.parquet',
          pq.read_table(tmp_path/'moved/text/sr-Latn/train.parquet'))
    write(b/'text/sr-Latn/test.parquet', pq.read_table(tmp_path/'moved/text/sr-Latn/test.parquet'))
    assert pretrain(b, tmp_path/'out') == 0                         # put back, at another time


def test_a_record_of_an_older_version_is_accepted(tmp_path, capsys):
    "Without fingerprints, and with the folder's name in its config."
    folder = text_of(tmp_path/'data')
    assert pretrain(folder, tmp_path/'out') == 0
    path = tmp_path/'out'/'joint-zh-yue+sr-Latn-0'/'record.jsonl'
    rows = read_jsonl(path)
    del rows[0]['inputs']
    rows[0]['config']['run']['data'] = 'data'
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    before = path.read_bytes()
    assert pretrain(folder, tmp_path/'out') == 0 and path.read_bytes() == before


def class_label(column, names, rows, path):
    "Write rows as `datasets` does, with the names of their labels in the metadata."
    of = datasets.ClassLabel(names=names)
    kind = of if column == 'label' else [of]
    text = [datasets.Value('string')] if column != 'label' else datasets.Value('string')
    features = {c: kind if c == column else text for c in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, datasets.Features(features)).to_parquet(path)


@pytest.mark.parametrize('task, column, ours, names', [
    ('pos', 'upos', UPOS_LABELS, sorted(UPOS_LABELS)),
    ('ner', 'ner_tags', NER_LABELS, ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER', 'B-ORG', 'I-ORG']),
    ('nli', 'label', NLI_LABELS, ['contradiction', 'entailment', 'neutral'])])
def test_labels_are_mapped_by_name(tmp_path, task, column, ours, names):
    "Every label of ours, written by its place in another order, comes back as itself."
    text_of(tmp_path)
    if task == 'nli':
        rows = [dict(premise='a', hypothesis='b', label=names.index(l)) for l in ours]
        want = list(range(len(ours)))
    else:
        rows = [{'tokens': [l.lower() for l in ours], column: [names.index(l) for l in ours]}]
        want = [list(range(len(ours)))]
    class_label(column, names, rows, tmp_path/task/'zh-yue'/'train.parquet')
    source = FolderSource(tmp_path)
    assert [r[column] for r in source.examples(task, 'zh-yue', 'train')] == want
    write(tmp_path/task/'sr-Latn'/'train.jsonl', ''.join(json.dumps(
        r | {column: names[r[column]] if task == 'nli' else [names[i] for i in r[column]]}) + '\n'
        for r in rows))
    assert [r[column] for r in source.examples(task, 'sr-Latn', 'train')] == want
    more = [*names, 'B-SHIP']
    rows[0][column] = more.index('B-SHIP') if task == 'nli' else [more.index('B-SHIP')] * len(ours)
    class_label(column, more, rows, tmp_path/task/'zh-yue'/'train.parquet')
    with pytest.raises(InputError, match=f"{task}/zh-yue/train.parquet, row 1: label 'B-SHIP'"):
        source.examples(task, 'zh-yue', 'train')


TAGGED = dict(tokens=['Ada', 'ide'], ner_tags=[1, 0])
PAIR = dict(premise='a', hypothesis='b', label=0)
ASKED = dict(id='q', title='', context='Ada ide', question='ko', answers=dict(text=['Ada'],
                                                                          answer_start=[0]))


@pytest.mark.parametrize('task, good, bad, said', [
    ('ner', TAGGED, TAGGED | dict(tokens=None), "'tokens' holds None; wanted is a list of words"),
    ('ner', TAGGED, TAGGED | dict(ner_tags=[1]), '2 words with 1 labels'),
    ('nli', PAIR, PAIR | dict(premise=None), "'premise' holds None; wanted is a string"),
    ('qa', ASKED, ASKED | dict(context=None), "'context' holds None; wanted is a string"),
    ('qa', ASKED, ASKED | dict(answers=None), "'answers' holds None; wanted is {'text'")])
def test_one_bad_row_among_many_is_counted_and_named(tmp_path, capsys, task, good, bad, said):
    "The run goes on without it, and the count stands beside the rows; one of six stops it."
    text_of(tmp_path)
    rows = [good | dict(id=str(i)) if task == 'qa' else good for i in range(200)]
    place = tmp_path/task/'sr-Latn'
    write(place/'train.parquet', [*rows[:7], bad, *rows[7:]])
    write(place/'validation.parquet', rows[:5] + [bad])
    write(place/'test.parquet', rows[:5])
    source, tok = FolderSource(tmp_path), WordTokenizer(['Ada', 'ide', 'ko', 'a', 'b'])
    made = read_data(task, source, 'sr-Latn', 'train', tok, 16)
    error = capsys.readouterr().err
    assert len(made.rows) == 200 and made.notes == dict(left_out=1)
    assert f'{task}/sr-Latn/train.parquet, row 8: ' in error and said in error
    with pytest.raises(InputError) as e: read_data(task, source, 'sr-Latn', 'validation', tok, 16)
    assert f'{task}/sr-Latn/validation.parquet, row 6: ' in str(e.value) and said in str(e.value)
    assert '1 of 6 validation rows' in str(e.value) and '\n' not in str(e.value)


def test_a_word_of_conll_ends_at_a_blank_or_a_tab(tmp_path):
    "Numbers lost all behind a no-break space, silently; so would words with other odd blanks."
    text_of(tmp_path)
    words = ['10\u00a0000', '1\u202f5', 'a\u3000b', 'O\u2028x', 'n\x0bm']
    for end, between in (('train', ' '), ('validation', '\t'), ('test', '  ')):
        write(tmp_path/f'ner/sr-Latn/{end}.conll',
              ''.join(f'{w}{between}NN{between}{t}\n' for w, t in zip(words, 'O' * 5)) + '\n')
        assert FolderSource(tmp_path).examples('ner', 'sr-Latn', end) == [
            dict(tokens=words, ner_tags=[0] * 5)]


@pytest.mark.parametrize('task', ['ner', 'pos', 'qa', 'nli'])
def test_rows_are_set_aside_where_a_split_has_no_file(tmp_path, capsys, task):
    "As with text: a share of training, by content, no row in two splits; said, and counted."
    text_of(tmp_path/'data')
    some = dict(ner=lambda i: dict(tokens=['Ada', str(i)], ner_tags=[1, 0]),
                pos=lambda i: dict(tokens=['Ada', str(i)], upos=[10, 0]),
                qa=lambda i: ASKED | dict(id=str(i), context=f'Ada ide {i // 2}'),
                nli=lambda i: dict(premise=f'a {i // 2}', hypothesis=str(i), label=i % 3))[task]
    rows, place = [some(i) for i in range(800)], tmp_path/'data'/task/'sr-Latn'
    write(place/'train.parquet', rows)
    own = [*FolderSource(tmp_path/'data').set_aside(task, 'sr-Latn')]
    assert own == ['validation'] + ['test'] * (task != 'qa')    # validation is its test set
    def splits(folder=tmp_path/'data'):
        source = FolderSource(folder)
        found = {s: source.examples(task, 'sr-Latn', s) for s in ('train', *own)}
        assert {s: source.count(task, 'sr-Latn', s) for s in found} == {
            s: len(r) for s, r in found.items()}
        for s in found: assert source.place(task, 'sr-Latn', s, 3) == (
            f'{task}/sr-Latn/train.parquet, row {rows.index(found[s][3]) + 1}')
        return found
    first = splits()
    said = f'{task}/sr-Latn has no {" and no ".join(own)} file: 5% of the training rows'
    assert capsys.readouterr().err.count(said) == 1
    content = lambda rows: sorted(json.dumps(r, sort_keys=True) for r in rows)     # in any order
    assert content(sum(first.values(), [])) == content(rows)
    assert all(20 < len(first[s]) < 60 for s in own)            # 40, and three deviations
    if task in ('qa', 'nli'):                                   # two rows of one text
        text = dict(qa='context', nli='premise')[task]
        of = [{r[text] for r in part} for part in first.values()]
        assert sum(map(len, of)) == 400
    rows += [some(i) for i in range(800, 1000)]                 # it grows: none changes sides
    write(tmp_path/'grown'/task/'sr-Latn'/'train.jsonl',
          ''.join(json.dumps(r) + '\n' for r in rows))
    text_of(tmp_path/'grown')
    rows, grown = [some(i) for i in range(800)], FolderSource(tmp_path/'grown')
    for s in first: assert grown.examples(task, 'sr-Latn', s)[:len(first[s])] == first[s]
    write(place/'validation.parquet', rows[:3])                 # a file of its own is all of it
    assert len(FolderSource(tmp_path/'data').examples(task, 'sr-Latn', 'validation')) == 3


def test_rows_set_aside_are_enough_to_finetune(tmp_path):
    "A task with training rows only, which used to be refused because it has no validation file."
    text_of(tmp_path)
    for lang in LINES:
        write(tmp_path/'ner'/lang/'train.parquet',
              [dict(tokens=['Ada', str(i)], ner_tags=[1, 0]) for i in range(100)])
    scale = Scale(ModelConfig.toy(60, dim=8, n_layers=1, ffn_dim=16, n_heads=2),
                  TrainConfig.toy(steps=1, warmup=1, batch_size=2, seq_len=8, eval_every=1),
                  dict(ner=FinetuneConfig.toy(epochs=1, max_len=8)))
    spec, = plan(['joint'], tuple(LINES), 1, scale, str(tmp_path), tasks=('ner',))
    row = next(r for r in run(spec, tmp_path/'out') if r['kind'] == 'finetune')
    source, lang = FolderSource(tmp_path), row['train_lang']
    counts = {s: source.count('ner', lang, s) for s in ('validation', 'test')}
    assert set(row['scores']) == set(LINES) and all(counts.values())
    assert {s: row['notes'][f'{s}/{lang}'] for s in counts} == {
        s: dict(taken_from_training=n) for s, n in counts.items()}


@pytest.mark.parametrize('lang, split', [('sr-Latn', 'train'), ('zh-yue', 'validation'),
                                         ('zh-yue', 'test')])
@pytest.mark.parametrize('how', ['alone', 'side by side', 'by the command'])
def test_nothing_is_trained_before_all_rows_were_looked_at(tmp_path, monkeypatch, capsys, how, lang,
                                                           split):
    "Whichever language and split hold them: no step, no worker, no checkpoint, no record."
    text_of(tmp_path/'data')
    for l in LINES:
        for s in ('train', 'validation', 'test'):
            rows = [TAGGED | dict(tokens=['Ada', str(i)]) for i in range(30)]
            if (l, s) == (lang, split): rows[7] = TAGGED | dict(ner_tags=[1])
            write(tmp_path/f'data/ner/{l}/{s}.parquet', rows)
    scale = Scale(ModelConfig.toy(60, dim=8, n_layers=1, ffn_dim=16, n_heads=2),
                  TrainConfig.toy(steps=1, warmup=1, batch_size=2, seq_len=8, eval_every=1),
                  dict(ner=FinetuneConfig.toy(epochs=1, max_len=8)))
    out = tmp_path/'out'
    specs = plan(['joint', 'adpt'], tuple(LINES), 1, scale, str(tmp_path/'data'), tasks=('ner',))
    said = f'{split} rows of ner in {lang!r} cannot be used'
    if how == 'by the command':
        words = 'demo --systems joint --tasks ner --seeds 1 --steps 2 --vocab-size 60 --workers 1'
        assert command(*words.split(), '--data', tmp_path/'data', '--langs', *LINES,
                       '--out', out) != 0
        told = capsys.readouterr()
        found = [told.out + told.err]
    else:
        def never(*_): raise AssertionError('work has begun')
        monkeypatch.setattr(experiments, 'train', never)
        monkeypatch.setattr(experiments, 'worker_pool', never)
        if how == 'alone':
            with pytest.raises(InputError) as e: run(specs[0], out)
            found = [str(e.value)]
        else: found = [str(e) for _, e in experiments.run_all(specs, out, 2)]
        assert len(found) == 1 + (how != 'alone')
    assert all(said in f and f'ner/{lang}/{split}.parquet, row 8: 2 words with 1 labels' in f
               for f in found), found
    assert not [*out.rglob('record.jsonl')] + [*out.rglob('*.safetensors')]


def test_a_long_question_loses_its_end_and_is_counted(tmp_path, capsys):
    "65 pieces in 64: before, the whole run stopped, after pretraining."
    text_of(tmp_path)
    rows = [ASKED | dict(question='ko ' * n) for n in (65, 61, 60, 1)]
    write(tmp_path/'qa'/'sr-Latn'/'validation.parquet', rows)
    write(tmp_path/'qa'/'sr-Latn'/'train.parquet', rows)
    tok = WordTokenizer(['Ada', 'ide', 'ko'])
    made = read_data('qa', FolderSource(tmp_path), 'sr-Latn', 'test', tok, 64)
    assert made.notes == dict(questions_cut=3, validation_as_test=4)    # half of the room at most
    assert [len(f.ids) for f in made.features if f.row < 3] == [1 + 30 + 1 + 2 + 1] * 3
    assert [f.targets for f in made.features if f.row < 3] == [[32, 32]] * 3
    assert '3 of 4 questions are cut' in capsys.readouterr().err


def test_inputs_beyond_the_trained_positions_are_counted(tmp_path, capsys):
    "Finetuning at 16 after rows of 8: what is longer, borders included, meets initial vectors."
    text_of(tmp_path)
    rows = [dict(tokens=['Ada'] * n, ner_tags=[1] * n) for n in (6, 7, 12, 14, 15)]
    for split in ('train', 'validation', 'test'): write(tmp_path/f'ner/sr-Latn/{split}.parquet',
                                                        rows)
    tok = WordTokenizer(['Ada'])
    torch.manual_seed(0)
    cfg = ModelConfig.toy(tok.vocab_size, dim=8, n_layers=1, ffn_dim=16, n_heads=2)
    model = MultilingualLM(cfg, ('sr-Latn',), 'joint')
    tune = FinetuneConfig.toy(epochs=1, max_len=16, batch_size=4)
    r = finetune(model, tok, 'ner', FolderSource(tmp_path), 'sr-Latn', ['sr-Latn'], tune,
                 trained_len=8)
    # lengths with borders: 8, 9, 14, 16, and 15 words in two parts of 16 and 3
    want = dict(beyond_trained_positions=4)
    assert r['notes'] == {f'{s}/sr-Latn': want for s in ('train', 'validation', 'test')}
    assert '4 of 6 inputs are longer than the 8 positions' in capsys.readouterr().err
    r = finetune(model, tok, 'ner', FolderSource(tmp_path), 'sr-Latn', ['sr-Latn'], tune,
                 trained_len=16)
    assert r['notes'] == {}


def test_scales_of_text_finetune_no_position_that_pretraining_did_not_see():
    "Rows of 48 and finetuning at 64: 42% of German sentences were longer. Relative ones have none."
    scales = [SCALES['pocket'], SCALES['mini'], STUDIES['demo'].scale,
              STUDIES['demo-text'].scale]
    for scale in scales:
        longest = max(cfg.max_len for cfg in scale.finetune.values())
        assert longest <= scale.train.seq_len or scale.model.positions == 'relative', scale


DOCUMENTS = dict(zh=('今天下雨。', 400), ur=('یہ ایک جملہ ہے۔', 400), th=('ฉันไปตลาด ', 400),
                 my=('ဒါစာကြောင်း။', 50), hi=('यह एक है।', 50))


@pytest.mark.parametrize('lang', DOCUMENTS)
def test_one_line_of_many_sentences_counts_as_many(lang):
    "In scripts whose full stop needs no blank, and in one that has none."
    sentence, n = DOCUMENTS[lang]
    assert split_sentences(sentence * n) == [sentence.strip()] * n


def test_splitting_is_linear_in_runs_of_blanks():
    "100,000 blanks took more than a minute."
    began = time.perf_counter()
    for text in (' ' * 200_000, 'a' + ' \n ' * 100_000 + 'b', 'a.' + '\t' * 200_000,
                 '。' * 200_000):
        split_sentences(text)
    assert time.perf_counter() - began < 5


def test_a_language_of_long_lines_keeps_its_pieces(tmp_path, capsys):
    "Lines over 32,768 bytes were passed over unseen, and the language became <unk> altogether."
    chars = [chr(c) for c in range(0x4e00, 0x4e00 + 300)]
    rng = np.random.default_rng(0)
    for split in ('train', 'validation', 'test'):
        write(tmp_path/f'text/zh/{split}.parquet',
              [dict(text=''.join(rng.choice(chars, 20_000)))] * 2)
        write(tmp_path/f'text/en/{split}.parquet',
              [dict(text='The sea is cold. A bird sings.')] * 50)
    source = FolderSource(tmp_path)
    tok = train_tokenizer(source, ['en', 'zh'], 400, workers=1)
    ids = prepare_corpus(source, ['en', 'zh'], tok, tmp_path/'ids', workers=1)
    assert ids['zh']['test'].n_unknown == 0 and capsys.readouterr().err == ''
    blind = train_tokenizer(source, ['en'], 30, workers=1)
    ids = prepare_corpus(source, ['en', 'zh'], blind, tmp_path/'blind', workers=1)
    share = ids['zh']['train'].n_unknown / ids['zh']['train'].n_tokens
    assert share == float((np.asarray(ids['zh']['train'].ids) == UNK).mean()) > .2
    assert f'{share:.1%} of the train pieces of zh are <unk>' in capsys.readouterr().err


def test_damaged_ids_are_made_anew(tmp_path, capsys):
    "64 flipped bytes in a file of the right length passed."
    source = FolderSource(text_of(tmp_path))
    tok = WordTokenizer(['Ada', 'Voda'])
    first = prepare_corpus(source, ['sr-Latn'], tok, tmp_path/'ids', workers=1)
    good = np.array(first['sr-Latn']['train'].ids)
    path = next((tmp_path/'ids').rglob('train-*.ids'))
    damaged = bytearray(path.read_bytes())
    damaged[20:84] = bytes(b ^ 255 for b in damaged[20:84])
    path.write_bytes(damaged)
    again = prepare_corpus(source, ['sr-Latn'], tok, tmp_path/'ids', workers=1)
    assert np.array_equal(again['sr-Latn']['train'].ids, good)
    assert f'{path.name} is damaged and is made anew' in capsys.readouterr().err


def test_the_hub_has_any_language_and_names_its_labels(monkeypatch):
    "German is none of the paper's nine; its treebanks are looked up, and UPOS come from A to Z."
    names, asked = sorted(UPOS_LABELS), []

    def opened(repo, config, data_dir, commit, streaming, online):
        asked.append((repo, config or data_dir))
        if repo == data.HUB['text']: rows = [dict(id=str(i), text=f'Satz {i}.') for i in range(300)]
        elif repo == data.HUB['pos']: rows = [dict(tokens=['im', 'in', 'Haus'], upos=[
            names.index(u) for u in ('_', 'ADP', 'NOUN')])]
        else: rows = [dict(tokens=['Ada'], ner_tags=[1])]
        features = None if repo != data.HUB['pos'] else datasets.Features(dict(
            tokens=[datasets.Value('string')], upos=[datasets.ClassLabel(names=names)]))
        return dict(train=datasets.Dataset.from_list(rows, features))
    monkeypatch.setattr(data, '_open_hub', opened)
    monkeypatch.setattr(data, '_resolve_revision', lambda *args: ('c0ffee', True))
    monkeypatch.setattr(data, '_hub_folders', lambda repo, commit, prefix, online:
                        [d for d in ('de_gsd', 'de_hdt', 'fr_gsd') if d.startswith(prefix)])
    hub = data.HubSource()
    assert sum(len([*hub.text('de', s)]) for s in data.SPLITS) == 300
    want = dict(tokens=['in', 'Haus'], upos=[UPOS_LABELS.index('ADP'), UPOS_LABELS.index('NOUN')])
    assert hub.examples('pos', 'de', 'train') == [want] * 2     # two treebanks
    assert hub.examples('ner', 'de', 'train') == [dict(tokens=['Ada'], ner_tags=[1])]
    assert asked[0] == (data.HUB['text'], f'{data.WIKIPEDIA_DUMP}.de')
    assert data.check_languages(hub, ['de', 'zh-yue']) == ('de', 'zh-yue')
    with pytest.raises(InputError, match='no language code'): hub.text('../de')


def test_labels_edited_after_finetuning_are_noticed(tmp_path):
    "A finished run with a task: the files of its labels, of tested languages too, are in its rows."
    folder = text_of(tmp_path/'data')
    for lang in LINES:
        for split in ('train', 'validation', 'test'):
            write(folder/f'ner/{lang}/{split}.jsonl', (json.dumps(TAGGED) + '\n') * 4)
    scale = Scale(ModelConfig.toy(60, dim=8, n_layers=1, ffn_dim=16, n_heads=2),
                  TrainConfig.toy(steps=1, warmup=1, batch_size=2, seq_len=8, eval_every=1),
                  dict(ner=FinetuneConfig.toy(epochs=1, max_len=8)))
    spec, = plan(['joint'], tuple(LINES), 1, scale, str(folder), tasks=('ner',))
    rows = run(spec, tmp_path/'out')
    row = next(r for r in rows if r['kind'] == 'finetune' and r['train_lang'] == 'zh-yue')
    assert set(row['inputs']) == {f'ner/{l}/{s}.jsonl' for l in LINES
                                  for s in ('train', 'validation', 'test')}
    assert run(spec, tmp_path/'out') == read_jsonl(tmp_path/'out'/spec.name/'record.jsonl')
    write(folder/'ner/sr-Latn/test.jsonl', (json.dumps(TAGGED | dict(ner_tags=[3, 0])) + '\n') * 4)
    with pytest.raises(InputError, match='ner/sr-Latn/test.jsonl has other content'):
        run(spec, tmp_path/'out')
    assert run(replace(spec, tasks=()), tmp_path/'out')         # its text is the same


def test_rows_that_a_language_got_later_are_noticed(tmp_path):
    "A finished run that was not tested in a language does not pass for one that was."
    folder = text_of(tmp_path/'data')
    def label(lang):
        for split in ('train', 'validation', 'test'):
            write(folder/f'ner/{lang}/{split}.jsonl', (json.dumps(TAGGED) + '\n') * 4)
    label('zh-yue')
    scale = Scale(ModelConfig.toy(60, dim=8, n_layers=1, ffn_dim=16, n_heads=2),
                  TrainConfig.toy(steps=1, warmup=1, batch_size=2, seq_len=8, eval_every=1),
                  dict(ner=FinetuneConfig.toy(epochs=1, max_len=8)))
    spec, = plan(['joint'], tuple(LINES), 1, scale, str(folder), tasks=('ner',))
    rows = run(spec, tmp_path/'out')
    assert [r['kind'] for r in rows[-3:]] == ['finetune', 'no rows', 'done']
    assert run(spec, tmp_path/'out') == rows
    label('sr-Latn')
    with pytest.raises(InputError, match='tested in zh-yue; .* rows to test in zh-yue, sr-Latn'):
        run(spec, tmp_path/'out')
    assert run(replace(spec, tasks=()), tmp_path/'out') == rows         # its text is the same


def test_what_is_passed_over_is_said(tmp_path, capsys):
    "A folder in capitals, tasks of a language without text: nothing said that they go unused."
    text_of(tmp_path)
    assert command('data', 'check', tmp_path) == 0
    assert 'All of it can be used.' in capsys.readouterr().out
    write(tmp_path/'NER/zh-yue/train.jsonl', json.dumps(TAGGED) + '\n')
    write(tmp_path/'ner/zh/test.jsonl', json.dumps(TAGGED) + '\n')
    assert command('data', 'check', tmp_path) == 0
    said = capsys.readouterr().out
    assert 'Not read: NER' in said and 'All that is read can be used.' in said
    assert 'ner/zh: without text in zh, no model trained here knows it.' in said


def test_pairs_of_one_name_are_refused_before_any_step(tmp_path, capsys):
    "en with zh-yue and en-zh with yue shared a line of numbers: that of the later pair."
    langs = 'en', 'zh-yue', 'en-zh', 'yue'
    for lang in langs:
        for split in ('train', 'validation', 'test'):
            write(tmp_path/f'data/text/{lang}/{split}.txt', 'Ada čita knjigu. Pada kiša.\n' * 60)
    ask = 'pretrain', *TINY, '--data', tmp_path/'data', '--out', tmp_path/'out'
    said = 'en-zh with yue and en with zh-yue are both written en-zh-yue'
    assert command(*ask, '--probe-every', 2, '--langs', *langs) == 2
    assert said in capsys.readouterr().err and not (tmp_path/'out').exists()
    assert command(*ask, '--langs', *langs) == 0                # without a probe nothing is amiss
    home = tmp_path/'out'/f'joint-{"+".join(langs)}-0'
    assert command('probe', '--run', home, '--data', tmp_path/'data', '--repeats', 1) == 2
    assert said in capsys.readouterr().err and not (home/'probe').exists()
    assert command(*ask, '--probe-every', 2, '--langs', *langs[:3]) == 0


def test_figures_of_languages_with_hyphens():
    "Names of pairs were taken apart at every hyphen: too many values to unpack."
    import matplotlib
    matplotlib.use('agg')
    from interference_nb.figures import plot_conflict, plot_groups
    pairs = {'en-en': .5, 'en-zh-yue': -.25, 'zh-yue-zh-yue': .75}
    rows = [dict(kind='probe', step=k, cos={p: {'encoder': c, 'attention': c, 'all': c}
                                            for p, c in pairs.items()}) for k in range(4)]
    lines = plot_conflict({'en-zh-yue': [rows]}).axes[0].get_lines()
    assert {line.get_label(): line.get_ydata().tolist()[0] for line in lines[:2]} == {
        'en-zh-yue within': .625, 'en-zh-yue ': -.25}
    ax = plot_groups({'en-zh-yue': [rows]}, width=9).axes[0]
    assert [p.get_height() for p in ax.patches] == [-.25]
    found = conflict(rows)
    assert found['en-zh-yue']['corrected'] == pytest.approx(-.25 / (.5 * .75)**.5)


def test_pairs_as_they_come_in_tables_of_tabs(tmp_path, capsys):
    "A carriage return inside a field, a very long one, an empty line at the end; cut pairs count."
    text_of(tmp_path)
    long = 'ko ' * 50_000
    rows = ['sentence1\tsentence2\tgold_label', 'Ada ide\rkod\tAda\tneutral',
            f'{long}\tko\tneutral']
    for split in ('train', 'validation', 'test'):
        write(tmp_path/f'nli/sr-Latn/{split}.tsv', '\n'.join(rows) + '\n\n')
    made = read_data('nli', FolderSource(tmp_path), 'sr-Latn', 'test', WordTokenizer(['ko']), 16)
    assert [len(f.ids) for f in made.features] == [7, 16]
    assert made.notes == dict(pairs_cut=1)
    assert '1 of 2 pairs are cut at their end' in capsys.readouterr().err


def test_tags_that_are_lists_are_told_by_row(tmp_path):
    text_of(tmp_path)
    write(tmp_path/'ner/sr-Latn/test.jsonl', json.dumps(dict(tokens=['a', 'b'],
                                                             ner_tags=['O', ['X']])))
    with pytest.raises(InputError, match='rows of ner in .* cannot be used'):
        read_data('ner', FolderSource(tmp_path), 'sr-Latn', 'test', WordTokenizer(['a']), 16)


def test_a_table_damaged_inside_is_named(tmp_path):
    "Not as a disk that cannot be written to."
    text_of(tmp_path)
    path = tmp_path/'text/sr-Latn/train.parquet'
    pq.write_table(pa.table(dict(text=[f'Ada ide {i}.' for i in range(4000)])), path,
                   row_group_size=500, compression='none', use_dictionary=False)
    raw = bytearray(path.read_bytes())
    meta = pq.read_metadata(path)
    at = meta.row_group(6).column(0).data_page_offset
    raw[at:at + 40] = bytes([255]) * 40
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r'train.parquet cannot be read after row \d+'):
        list(FolderSource(tmp_path).text('sr-Latn'))


def test_a_bad_row_is_counted_once(tmp_path):
    "Where one file stands for all splits, its bad rows are those of the training split."
    write(tmp_path/'text/sr-Latn/train.jsonl', ''.join(
        json.dumps(dict(text=f'Ada ide {i}.' if i % 10 else None)) + '\n' for i in range(400)))
    source = FolderSource(tmp_path)
    for split in ('train', 'validation', 'test'): list(source.text('sr-Latn', split))
    assert {k[1]: len(v) for k, v in source.skipped.items()} == dict(train=40, validation=0, test=0)


def test_stand_ins_of_questions_are_noted(tmp_path):
    "Without a test file validation is the test set; without either, both come from training rows."
    text_of(tmp_path)
    rows = [ASKED | dict(context=f'Ada ide {i}') for i in range(60)]
    tok = WordTokenizer(['Ada', 'ide', 'ko'])
    write(tmp_path/'qa/sr-Latn/train.parquet', rows)
    def notes():
        source = FolderSource(tmp_path)
        return [read_data('qa', source, 'sr-Latn', s, tok, 64).notes
                for s in ('validation', 'test')]
    held_out, test = notes()
    assert held_out.keys() == {'taken_from_training'}
    assert test.keys() == {'taken_from_training', 'validation_as_test'}
    write(tmp_path/'qa/sr-Latn/validation.parquet', rows)
    held_out, test = notes()
    assert held_out.keys() == {'taken_from_training'} and test == dict(validation_as_test=60)


def test_lines_that_translate_each_other_in_any_form(tmp_path, capsys):
    "As JSON lines too, with a newline at the end; documents of other lengths are counted."
    for lang, second in (('zh-yue', 'c\nd'), ('sr-Latn', 'c')):
        write(tmp_path/f'text/{lang}/train.jsonl', ''.join(json.dumps(r) + '\n' for r in (
            dict(url='NTREX#1', text='a\nb\n'), dict(url='NTREX#2', text=second), dict(text='e'))))
    assert parallel_lines(FolderSource(tmp_path), ('zh-yue', 'sr-Latn')) == {
        'zh-yue': ['a', 'b'], 'sr-Latn': ['a', 'b']}
    assert '1 document with' in capsys.readouterr().err


def test_a_foreign_vocabulary_is_refused_for_what_it_is(tmp_path):
    import sentencepiece
    (tmp_path/'text').write_text('Ada ide kod kuće\n' * 50)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path/'text'), vocab_size=30,
                                             hard_vocab_limit=False,
                                             model_prefix=str(tmp_path/'m'), minloglevel=2)
    with pytest.raises(InputError, match='m.model: .*first ids are not'):
        load_tokenizer(tmp_path/'m.model')


def test_documents_that_cannot_be_paired_are_told(tmp_path, capsys):
    "Only in one language, or unreadable; two of one name are refused."
    def rows(*parts): return ''.join(json.dumps(r) + '\n' for r in parts)
    for lang, extra in (('zh-yue', dict(url='NTREX#2', text='c')),
                        ('sr-Latn', dict(url='NTREX#3', text=5))):
        write(tmp_path/f'text/{lang}/train.jsonl', rows(dict(url='NTREX#1', text='a'), extra))
    found = parallel_lines(FolderSource(tmp_path), ('zh-yue', 'sr-Latn'))
    assert found == {'zh-yue': ['a'], 'sr-Latn': ['a']}
    said = capsys.readouterr().err
    assert '1 document in one of the languages only' in said
    assert re.search('train.jsonl, line 2 is left out: .*text', said)
    write(tmp_path/'text/zh-yue/train.jsonl', rows(dict(url='a/NTREX#1', text='a'),
                                                   dict(url='b/NTREX#1', text='b')))
    with pytest.raises(InputError, match="line 2: two documents of zh-yue are called '1'"):
        parallel_lines(FolderSource(tmp_path), ('zh-yue', 'sr-Latn'))


def test_lines_to_retrieve_are_of_two_languages_and_whole(capsys):
    source = ToySource(n_train=60, n_dev=20)
    tok = toy_tokenizer(source, ('en', 'ar'))
    model = MultilingualLM(ModelConfig.toy(tok.vocab_size, max_len=8, dim=8, n_layers=1,
                                           ffn_dim=16), ('en', 'ar'), 'joint')
    for wrong, says in ((dict(n=0), 'n is 0'), (dict(langs=('en', 'en')), 'two languages')):
        with pytest.raises(InputError, match=says): retrieval(model, source, tok, **wrong)
    lines = list(source.text('en'))[:20]
    long = sum(len(tok.encode(line)) > 6 for line in lines)
    assert len(sentence_vectors(model, lines, tok, 'en')) == 20 and 0 < long < 20
    assert f'{long} of 20 sentences in en are longer than the 8 tokens' in capsys.readouterr().err


@pytest.mark.parametrize('wrong', [dict(seed=-1), dict(n_train=-1), dict(max_pieces=4),
                                   dict(n_eval=2.5), dict(sizes={'en': -5})])
def test_toy_languages_refuse_numbers_that_make_no_text(wrong):
    with pytest.raises(InputError, match=next(iter(wrong)).replace('sizes', 'sizes of en')):
        ToySource(**wrong)
