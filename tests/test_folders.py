"People's own files: which content a run was made from, labels by name, rows that cannot be used."
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from interference_nb.cli import main
from interference_nb.data import NER_LABELS, NLI_LABELS, UPOS_LABELS
from interference_nb.files import InputError, read_jsonl
from interference_nb.folders import FolderSource

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
    data = text_of(tmp_path/'data')
    assert pretrain(data, tmp_path/'out') == 0
    path = tmp_path/'out'/'joint-zh-yue+sr-Latn-0'/'record.jsonl'
    rows = read_jsonl(path)
    del rows[0]['inputs']
    rows[0]['config']['run']['data'] = 'data'
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    before = path.read_bytes()
    assert pretrain(data, tmp_path/'out') == 0 and path.read_bytes() == before


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
