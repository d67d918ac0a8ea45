"Two folders as newcomers have them, from the first look to the demo, by the public commands."
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from interference_nb.cli import main
from interference_nb.files import read_jsonl

SPLITS = dict(train=60, validation=12, test=12)
SMALL = ('--model.vocab-size 300 --model.dim 16 --model.n-layers 1 --model.ffn-dim 16 '
         '--model.n-heads 2 --train.steps 3 --train.batch-size 2 --train.seq-len 16 '
         '--train.warmup 1 --train.eval-every 3').split()


def words(lang, letters):
    "900 words of a made-up language."
    rng = np.random.default_rng([*lang.encode()])
    return [''.join(rng.choice(list(letters), rng.integers(2, 6))) for _ in range(900)]


def sentences(lang, letters, split, n):
    "Words, and the name in each."
    rng, known = np.random.default_rng([*lang.encode(), len(split)]), words(lang, letters)
    for _ in range(n):
        found = [known[i] for i in rng.integers(0, 900, rng.integers(4, 12))]
        yield found, ['B-PER' if w in known[:90] else 'O' for w in found]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str): path.write_text(content, encoding='utf-8')
    else: pq.write_table(pa.table(dict(text=content)), path)


def shards_and_lines(folder):
    "Scripts without spaces: text in two shards, several sentences a line; JSON lines."
    for lang, letters in dict(zh=''.join(map(chr, range(0x4e00, 0x4f00))),
                              ja='あいうえおかきくけこ山川田').items():
        for split, n in SPLITS.items():
            rows = [''.join(w) + '。' for w, _ in sentences(lang, letters, split, 12 * n)]
            documents = [''.join(rows[i:i + 6]) for i in range(0, len(rows), 6)]
            half = len(documents) // 2
            for k, part in enumerate((documents[:half], documents[half:])):
                write(folder/f'text/{lang}/{split}-{k:05}-of-00002.parquet', part)
            write(folder/f'ner/{lang}/{split}.jsonl', ''.join(
                json.dumps(dict(tokens=w, ner_tags=t), ensure_ascii=False) + '\n'
                for w, t in sentences(lang, letters, split, n)))
    return 'zh', 'ja'


def conll_and_text(folder):
    "Hyphens in the languages' codes: a sentence a line, CoNLL; the held-out split is called dev."
    for lang, letters in {'sr-Latn': 'aeioučšžrtnv', 'pt-br': 'aeiouãçrstlm'}.items():
        for split, n in SPLITS.items():
            name = dict(validation='dev').get(split, split)
            write(folder/f'text/{lang}/{name}.txt', ''.join(
                ' '.join(w) + '.\n' for w, _ in sentences(lang, letters, split, 12 * n)))
            write(folder/f'ner/{lang}/{name}.conll', ''.join(
                ''.join(f'{a}\t{b}\n' for a, b in zip(w, t, strict=True)) + '\n'
                for w, t in sentences(lang, letters, split, n)))
    return 'sr-Latn', 'pt-br'


@pytest.mark.parametrize('made', [shards_and_lines, conll_and_text])
def test_from_a_folder_to_the_demo(made, tmp_path, capsys):
    data, out = tmp_path/'data', tmp_path/'out'
    a, b = made(data)
    main(['data', 'check', str(data), '--vocab-size', '300'])
    said = capsys.readouterr().out
    assert 'All of it can be used.' in said and 'Not read' not in said
    assert {a, b, '720'} <= set(said.split())                   # sentences of training, not lines
    where = ['--data', str(data), '--out', str(out), '--langs', a, b]
    main(['pretrain', 'toy', *SMALL, *where])
    home = out/f'joint-{a}+{b}-0'
    start = read_jsonl(home/'record.jsonl')[0]
    assert start['config']['sentences'] == {a: 720, b: 720}
    assert all(s['unknown'] < .02 for of in start['text'].values() for s in of.values())
    main(['finetune', 'toy', 'ner', '--data', str(data), '--run', str(home), '--train-lang', b,
          '--finetune.epochs', '1', '--finetune.max-len', '16'])
    row, = read_jsonl(home/f'finetune-ner-{b}'/'record.jsonl')
    assert set(row['scores']) == {a, b} and row['notes'] == {} and len(row['inputs']) == 6
    capsys.readouterr()
    main(['probe', '--data', str(data), '--run', str(home), '--repeats', '2', '--batches', '2'])
    said = capsys.readouterr().out
    header = ' '.join(l for l in said.splitlines() if 'gradients of' in l)     # it is in parts
    assert f'{a}-{b} corrected' in header and f'{a}-{a} corrected' not in header
    main(['demo', '--data', str(data), '--langs', a, b, '--systems', 'joint', '--tasks', 'ner',
          '--seeds', '1', '--steps', '2', '--workers', '1', '--out', str(tmp_path/'demo'),
          '--vocab-size', '600'])
    rows = read_jsonl(tmp_path/'demo'/f'joint-{a}+{b}-0'/'record.jsonl')
    tested = {(r['train_lang'], *r['scores']) for r in rows if r['kind'] == 'finetune'}
    assert tested == {(a, a, b), (b, a, b)}
    assert (tmp_path/'demo'/'table.md').exists()
