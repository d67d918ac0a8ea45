"Data that cannot be used, each with the command that meets it and words of its message."
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

TEXT = [dict(text='Ada čita knjigu. Pada kiša.')] * 9
NER = dict(tokens=['Ada', 'čita'], ner_tags=[1, 0])
POS = dict(tokens=['Ada', 'čita'], upos=[10, 16])
NLI = dict(premise='Pada kiša.', hypothesis='Nije suvo.', label=0)
QA = dict(id='q7', title='', context='Ada čita.', question='Ko?',
          answers=dict(text=['Ada'], answer_start=[0]))
ANSWERS = pa.struct([('text', pa.list_(pa.string())), ('answer_start', pa.list_(pa.int64()))])


def lines(*rows): return ''.join(json.dumps(r) + '\n' for r in rows)


def squad(**asked):
    return json.dumps(dict(data=[dict(title='',
                                      paragraphs=[dict(context='Ada čita.', qas=[asked])])]))


def words(upos, n=10):
    fields = ['1', 'Ada', '_', upos, '_', '_', '0', '_', '_', '_']
    return '\t'.join(fields[:n]) + '\n\n'


def named(column, names, row): return dict(names=names, column=column, row=row)


# what is wrong: {file beside sound text in 'aa': content}, words of the message
FILES = {
    'text without its column': ({'text/bb/train.parquet': [dict(body='a')]},
                                'no column text; it has body'),
    'text of bytes': ({'text/bb/train.parquet': [dict(text=b'abc')]},
                      "text/bb row 1 holds bytes b'abc'"),
    'text of numbers': ({'text/bb/train.parquet': [dict(text=7)]}, "text/bb row 1 'text' holds 7"),
    'text of lists': ({'text/bb/train.parquet': [dict(text=['a', 'b'])]},
                      "row 1 'text' holds ['a', 'b']"),
    'text of nulls': ({'text/bb/train.jsonl': lines(dict(text=None))}, "line 1 'text' holds None"),
    'text of half characters': ({'text/bb/train.jsonl': '{"text": "a\\ud800"}\n'},
                                "line 1 'text' holds"),
    'text of blanks': ({'text/bb/train.jsonl': lines(dict(text='  '))}, 'line 1 no text'),
    'empty text file': ({'text/bb/train.txt': ''}, 'bb has no train text'),
    'text of one line': ({'text/bb/train.txt': 'Ada čita.\n'}, 'bb has no validation text'),
    'text in gzip': ({'text/bb/train.txt.gz': b'x', 'text/bb/test.txt': 'a\n'},
                     'text/bb has no train file there is test.txt, train.txt.gz'),
    'text in capitals': ({'text/bb/Train.TXT': 'a\n'}, 'text/bb no train file Train.TXT'),
    'a language that is no code': ({'text/b b/train.txt': 'a\n', 'text/b b/test.txt': 'a\n'},
                                   "text/b b is not read 'b b' is no language code"),
    'text that is no parquet': ({'text/bb/train.parquet': b'PAR1'},
                                'train.parquet is no parquet file'),
    'parquet of no bytes': ({'text/bb/train.parquet': b''}, 'train.parquet is no parquet file'),
    'text that is no UTF-8': ({'text/bb/train.txt': b'ab\ncd\xff\n'},
                              'no UTF-8 text byte 0xff UTF-8'),
    'text in UTF-16': ({'text/bb/train.txt': 'abc'.encode('utf-16')}, 'no UTF-8 text'),
    'lines that are no JSON': ({'text/bb/train.jsonl': 'once upon\n'}, 'line 1 is no JSON object'),
    'lines of numbers': ({'text/bb/train.jsonl': '5\n'}, 'line 1 5 is no object'),
    'lines without the column': ({'text/bb/train.jsonl': lines(dict(body='a'))},
                                 "'text' is missing"),
    'JSON of neither kind': ({'text/bb/train.json': '"abc"'}, 'neither a list of rows'),
    'lines nested without end': ({'text/bb/train.jsonl': '[' * 100_000},
                                 'line 1 is no JSON object'),
    'JSON nested without end': ({'text/bb/train.json': '[' * 100_000}, 'train.json is no JSON'),
    'cut JSON': ({'text/bb/train.json': '[{"text": "a"}, {"te'}, 'train.json is no JSON'),
    'a shard that lacks others': ({'text/bb/train-00000-of-00003.parquet': TEXT},
                                  '1 of the 3 shards'),
    'shards of two sizes': ({'text/bb/train-00000-of-00002.parquet': TEXT,
                             'text/bb/train-00001-of-00003.parquet': TEXT},
                             'several files Keep one'),
    'two files of a split': ({'text/bb/train.txt': 'a\n', 'text/bb/train.jsonl': lines(*TEXT)},
                             'several files of the train split train.jsonl train.txt Keep one'),
    'two names of a split': ({'text/bb/train.txt': 'a\n', 'text/bb/dev.txt': 'b\n',
                              'text/bb/valid.txt': 'c\n'}, 'several files validation Keep one'),
    'a saved data set without its data': ({'text/bb/train/state.json': '{}'},
                                          'no data set by save_to_disk'),
    'words that are null': ({'ner/aa/train.jsonl': lines(NER | dict(tokens=None))},
                            "'tokens' holds None"),
    'words in a string': ({'ner/aa/train.jsonl': lines(NER | dict(tokens='Ada čita'))},
                          "'tokens' holds 'Ada čita' a list of words"),
    'a null word': ({'ner/aa/train.jsonl': lines(NER | dict(tokens=['Ada', None]))},
                    "['Ada', None]"),
    'words of numbers': ({'ner/aa/train.jsonl': lines(NER | dict(tokens=[1, 2]))},
                         "'tokens' holds [1, 2]"),
    'words of bytes': ({'ner/aa/train.parquet': [NER | dict(tokens=[b'a', b'b'])]},
                       "holds [b'a', b'b']"),
    'no words column': ({'ner/aa/train.parquet': [dict(words=['a'], ner_tags=[0])]},
                        'no column tokens'),
    'tags that are null': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=None))},
                           "'ner_tags' holds None"),
    'a null tag': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=[1, None]))},
                   "holds [1, None]"),
    'a tag too few': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=[1]))},
                      '2 words with 1 labels'),
    'a tag of 99': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=[1, 99]))}, 'label 99 0 to 6'),
    'a tag below 0': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=[1, -1]))}, 'label -1'),
    'tags of truth values': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=[True, False]))},
                             "'ner_tags' holds [True, False]"),
    'tags of fractions': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=[.5, 1.]))},
                          'holds [0.5, 1.0]'),
    'a tag that nobody knows': ({'ner/aa/train.jsonl': lines(NER | dict(ner_tags=['B-SHIP', 'O']))},
                                "line 1 label 'B-SHIP' B-PER TaskSpec"),
    'tags named otherwise': ({'ner/aa/train.parquet': named('ner_tags', ['O', 'B-SHIP'], NER)},
                             "ner/aa/train.parquet row 1 label 'B-SHIP'"),
    'CoNLL with a tag that nobody knows': ({'ner/aa/train.conll': 'Ada B-SHIP\n\n'},
                                           "line 1 'B-SHIP'"),
    'CoNLL of one column': ({'ner/aa/train.conll': 'Ada O\nčita\n\n'},
                            'line 1 line 2 has one column'),
    'CoNLL in Latin-1': ({'ner/aa/train.bio': b'Bj\xf6rn B-PER\n'}, 'no UTF-8 text byte 0xf6'),
    'NER as CoNLL-U': ({'ner/aa/train.conllu': words('NOUN')},
                       'ner/aa has no rows that can be read Not read ner/aa/train.conllu'),
    'no rows to choose an epoch by': ({'ner/aa/train.conll': 'Ada B-PER\n\n' * 3},
                                      'add a validation file'),
    'a UPOS of 18': ({'pos/aa/train.jsonl': lines(POS | dict(upos=[10, 18]))}, 'label 18 0 to 17'),
    'tags of another treebank': ({'pos/aa/train.jsonl': lines(POS | dict(upos=['NN', 'VB']))},
                                 "label 'NN'"),
    'UPOS in one string': ({'pos/aa/train.jsonl': lines(POS | dict(upos='NOUN VERB'))},
                           "'NOUN VERB'"),
    'CoNLL-U of nine columns': ({'pos/aa/train.conllu': words('NOUN', 9)},
                                'line 1 has 9 columns, not 10'),
    'CoNLL-U with other tags': ({'pos/aa/x-ud-train.conllu': words('Nomen')},
                                "line 1 label 'Nomen' NOUN"),
    'UPOS named otherwise': ({'pos/aa/train.parquet': named('upos', ['N', 'V'],
                                                            POS | dict(upos=[0, 1]))},
                             "row 1 label 'N'"),
    'a pair without a premise': ({'nli/aa/dev.jsonl': lines(NLI | dict(premise=None))},
                                 "'premise' holds None"),
    'a pair of numbers': ({'nli/aa/dev.jsonl': lines(NLI | dict(hypothesis=3))},
                          "'hypothesis' holds 3"),
    'a pair in all languages': ({'nli/aa/dev.jsonl': lines(
        NLI | dict(premise=dict(aa='x', fr='y')))},
                                "'premise' holds {'aa': 'x', 'fr': 'y'} a string"),
    'a label of 3': ({'nli/aa/dev.jsonl': lines(NLI | dict(label=3))}, 'label 3 0 to 2'),
    'no label': ({'nli/aa/dev.parquet': [NLI | dict(label=-1)]}, 'label -1'),
    'a label that is null': ({'nli/aa/dev.jsonl': lines(NLI | dict(label=None))},
                             "'label' holds None"),
    'a label that nobody knows': ({'nli/aa/dev.jsonl': lines(NLI | dict(label='maybe'))},
                                  "label 'maybe'"),
    'a label of a list': ({'nli/aa/dev.jsonl': lines(NLI | dict(label=[0]))}, "'label' holds [0]"),
    'no column of labels': ({'nli/aa/dev.parquet': [dict(premise='a', hypothesis='b')]},
                            'no column label'),
    'pairs without a header': ({'nli/aa/dev.tsv': 'neutral\ta\tb\n'},
                               'columns neutral, a, b sentence1'),
    'pairs of two columns': ({'nli/aa/dev.tsv': 'gold_label\tsentence1\tsentence2\nneutral\ta\n'},
                             'line 2 2 columns, not 3'),
    'pairs that were never labelled': ({'nli/aa/dev.tsv':
                                        'gold_label\tsentence1\tsentence2\n-\ta\tb\n'},
                                       'line 2: the pair has no gold label'),
    'labels named otherwise': ({'nli/aa/dev.parquet': named('label', ['yes', 'no'], NLI)},
                               "label 'yes'"),
    'answers that are null': ({'qa/aa/train.jsonl': lines(QA | dict(answers=None))},
                              "'answers' holds None"),
    'answers as a list of structs': (
        {'qa/aa/train.jsonl': lines(QA | dict(answers=[dict(text='Ada', answer_start=0)]))},
        "'answers' holds [{ {'text': [strings], 'answer_start'"),
    'no answer': ({'qa/aa/train.jsonl': lines(QA | dict(answers=dict(text=[], answer_start=[])))},
                  'q7 has 0 answers'),
    'an answer elsewhere': ({'qa/aa/train.jsonl': lines(QA | dict(answers=dict(
        text=['Ada'], answer_start=[3])))}, "'Ada' of question q7 character 3"),
    'an answer before its text': ({'qa/aa/train.jsonl': lines(QA | dict(answers=dict(
        text=['Ada'], answer_start=[-9])))}, 'character -9'),
    'places as text': ({'qa/aa/train.jsonl': lines(QA | dict(answers=dict(
        text=['Ada'], answer_start=['0'])))}, "'answers' holds 'answer_start': [whole numbers]"),
    'more answers than places': ({'qa/aa/train.jsonl': lines(QA | dict(answers=dict(
        text=['Ada', 'čita'], answer_start=[0])))}, '2 answers with 1 places'),
    'a context that is null': ({'qa/aa/train.jsonl': lines(QA | dict(context=None))},
                               "'context' holds None"),
    'a question of a list': ({'qa/aa/train.jsonl': lines(QA | dict(question=['Ko?']))},
                             "'question' holds"),
    'SQuAD without paragraphs': ({'qa/aa/train.json': '{"data": [{"title": "t"}]}'},
                                 'not laid out as SQuAD'),
    'SQuAD without a place': ({'qa/aa/train.json': squad(id='q7', question='Ko?',
                                                         answers=[dict(text='Ada')])},
                              "not laid out as SQuAD 'answer_start'"),
    'SQuAD 2 without an answer': ({'qa/aa/train.json': squad(id='q7', question='Ko?', answers=[])},
                                  'q7 has 0 answers'),
    'SQuAD that is cut': ({'qa/aa/train.json': squad(id='q7', question='Ko?', answers=[])[:40]},
                          'is no JSON'),
}

SMALL = ('--model.dim 8 --model.n-layers 1 --model.ffn-dim 16 --model.n-heads 2 --train.steps 2 '
         '--train.batch-size 2 --train.seq-len 8 --train.warmup 1 --model.vocab-size')
PRETRAIN = f'pretrain toy {SMALL} 40 --data {{tmp}}/sound --out {{out}}'
PREPARE = 'data prepare --data {tmp}/sound --out {out}'
OPTIONS = [
    ('no such folder', 'data check {tmp}/none', 'no text/<language>/train.parquet'),
    ('an empty folder', 'data check {tmp}/empty', 'no text/<language>/train.parquet'),
    ('a file for a folder', 'data check {tmp}/sound/text/aa/train.jsonl', 'no text/<language>'),
    ('only files that nobody reads', 'data check {tmp}/csv',
     'no text/<language> text/aa/train.csv'),
    ('a name of no data', 'data statistics --data toyy', "no data source 'toyy'"),
    ('a language that is not there', f'{PREPARE} --langs aa zz', "unknown language 'zz' has: aa"),
    ('a language twice', f'{PREPARE} --langs aa aa', "'aa' comes twice"),
    ('no language', f'{PREPARE} --langs ,', 'no language given'),
    *((f'a language called {lang!r}', f'{PRETRAIN} --langs aa,{lang}',
       'is no language code letters')
      for lang in ('../x', 'a/b', '.', '<i>', 'a|b', 'aa-', '-', 'a' * 33, 'ä+b', 'a\\b', '中')),
    ('a cap of no language here', f'{PREPARE} --langs aa --max-sentences AA 50',
     "max_sentences has 'AA' aa"),
    ('a cap that leads elsewhere', f'{PREPARE} --langs aa --max-sentences /../../../x 7',
     "'/../../../x'"),
    ('a cap of nothing', f'{PREPARE} --langs aa --max-sentences aa 0',
     '0 sentences of aa are no text'),
    ('a cap below 0', f'{PRETRAIN} --langs aa --max-sentences aa -3', '-3 sentences of aa'),
    ('a cap of another, counted',
     'data statistics --data {tmp}/sound --langs aa --max-sentences bb 5',
     "max_sentences has 'bb'"),
    *((f'a vocabulary of {n}', f'{PREPARE} --langs aa --vocab-size {n}', 'vocab_size')
      for n in (-5, 0, 5, 70_000, 10**12)),
    ('a vocabulary too large for its text', f'{PREPARE} --langs aa --vocab-size 9000',
     '9000 is too large'),
    ('a vocabulary smaller than the letters', f'{PREPARE} --langs aa --vocab-size 8',
     'less than this text'),
    *((f'a temperature of {t}',
       f'data statistics --data {{tmp}}/sound --langs aa bb --temperature {t}',
       'temperature') for t in ('0', '-1', 'nan', '1e-9')),
    ('rows of words', f'{PREPARE} --langs aa --rows words', "unknown rows 'words'"),
    ('a vocabulary that is not there', 'data check {tmp}/sound --vocabulary {tmp}/none',
     'no tokenizer'),
    ('a vocabulary that is text',
     'data check {tmp}/sound --vocabulary {tmp}/sound/text/aa/train.jsonl',
     'no whole tokenizer'),
    ('text shorter than a row', f'{PRETRAIN} --langs aa'.replace('seq-len 8', 'seq-len 4096')
     + ' --model.max-len 4096', 'shorter than a sequence'),
]

CASES = [(name, ['data', 'check', f'{{tmp}}/{i}'], said) for i, (name, (_, said)) in
         enumerate(FILES.items())] + [(name, command.split(), said) for name, command,
                                      said in OPTIONS]


def write(path, content):
    "Write rows as parquet, with names of labels if there are any, and all else as it is."
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        of, column = datasets.ClassLabel(names=content['names']), content['column']
        row = content['row']
        text = datasets.Value('string')
        kind = (of, text) if column == 'label' else ([of], [text])
        features = {c: kind[c != column] for c in row}
        if column == 'ner_tags': row = row | {column: [1] * len(row[column])}
        datasets.Dataset.from_list([row], datasets.Features(features)).to_parquet(path)
    elif isinstance(content, list): pq.write_table(pa.Table.from_pylist(content), path)
    elif isinstance(content, bytes): path.write_bytes(content)
    else: path.write_text(content, encoding='utf-8')


def build(tmp):
    "Make all folders, once."
    for i, (files, _) in enumerate(FILES.values()):
        sound = {f'text/aa/{s}.jsonl': lines(*TEXT) for s in ('train', 'validation', 'test')}
        for name, content in (sound | files).items(): write(tmp/str(i)/name, content)
    (tmp/'empty').mkdir()
    write(tmp/'csv/text/aa/train.csv', 'text\na\n')
    for split in ('train', 'validation', 'test'):
        write(tmp/f'sound/text/aa/{split}.jsonl', lines(*TEXT))
        write(tmp/f'sound/text/bb/{split}.jsonl', lines(*TEXT, *TEXT))
