"""Made-up text with the shape of real text: many words, few of them often; sentences with commas
and capitals, paragraphs, two scripts; and the four tasks in the hub's schemas, with long contexts.

Tests use it, for the real thing is seldom at hand: where INTERFERENCE_DATA names it, they use both.
"""
import os

import numpy as np
import pytest

SPLITS = dict(train=250, validation=50, test=50)
SYLLABLES = dict(en='ba ther ing on st re the an ment ly cro uni',
                 sw="ki m wa ng'o li za mbo sha ku ndi pe ya",
                 te='ప్ర తె లు గు క్ష మా ణ్య రా జ్ ఞా కి న్')


class Text:
    "One language: 900 words by Zipf's law, of classes by their ends; some are names."
    def __init__(self, lang, split):
        rng = np.random.default_rng([*lang.encode(), 1])
        parts = SYLLABLES[lang].split()
        self.words = list(dict.fromkeys(''.join(rng.choice(parts, rng.integers(1, 5)))
                                        for _ in range(2000)))[:900]
        p = 1 / np.arange(3, 3 + len(self.words))
        self.p = p / p.sum()
        self.rng = np.random.default_rng([*lang.encode(), *split.encode()])

    def sentence(self):
        "Words of a sentence, with the index of a name's first word and its length."
        n = int(self.rng.integers(4, 25))
        words = [self.words[i] for i in self.rng.choice(len(self.words), n, p=self.p)]
        at, size = int(self.rng.integers(0, n - 2)), int(self.rng.integers(1, 3))
        words[at:at + size] = [w.capitalize() for w in words[at:at + size]]
        return words[:at + 2] + [','] * (n > 12) + words[at + 2:] + ['.'], at, size

    def line(self): return ' '.join(self.sentence()[0]).replace(' ,', ',').replace(' .', '.')

    def document(self):
        return '\n'.join(' '.join(self.line() for _ in range(self.rng.integers(1, 6)))
                         for _ in range(self.rng.integers(1, 4)))

    def row(self, task, i):
        "A row in the hub's schema."
        words, at, size = self.sentence()
        kind = 1 + 2 * (len(words[at]) % 3)                     # PER, ORG or LOC
        if task == 'ner':
            tags = [0] * len(words)
            tags[at:at + size] = [kind] + [kind + 1] * (size - 1)
            return dict(tokens=words, ner_tags=tags)
        if task == 'pos':
            upos = [1 if w in ',.' else len(w) % 5 * 3 for w in words]      # 1: PUNCT
            return dict(tokens=words, upos=[u if u != 9 else 10 for u in upos])     # 9: no word
        if task == 'nli':
            label = i % 3
            said = (words[:-3], self.sentence()[0], ['no', *words])[label]
            return dict(premise=' '.join(words), hypothesis=' '.join(said), label=label)
        context = ' '.join(self.document() for _ in range(self.rng.integers(1, 5)))
        inner = [k for k, c in enumerate(context[:-1]) if c in ' \n']
        start = inner[int(self.rng.integers(len(inner)))] + 1
        text = ' '.join(context[start:].split(' ')[:1 + i % 4]).split('\n')[0]
        question = ' '.join(words[at:at + 5]) + '?'
        return dict(id=f'q{i}', title='', context=context, question=question,
                    answers=dict(text=[text], answer_start=[start]))


def write_folder(path, langs=tuple(SYLLABLES)):
    "Write text and all four tasks in some languages; NLI has training pairs in English only."
    import pyarrow as pa
    import pyarrow.parquet as pq
    from interference_nb.folders import FolderSource
    for lang in langs:
        for split, n in SPLITS.items():
            text = Text(lang, split)
            rows = dict(text=[dict(text=text.document()) for _ in range(n)])
            rows |= {t: [text.row(t, i) for i in range(n)] for t in ('ner', 'pos', 'qa', 'nli')}
            if split == 'train' and lang != 'en': del rows['nli']
            for kind, own in rows.items():
                (path/kind/lang).mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist(own), path/kind/lang/f'{split}.parquet')
    return FolderSource(path)


REAL = os.environ.get('INTERFERENCE_DATA')


@pytest.fixture(scope='session', params=['made up', *(['real'] if REAL else [])])
def text_folder(request, tmp_path_factory):
    "A folder of text and tasks in en, sw and te: made up, and the real one where it is named."
    from interference_nb.folders import FolderSource
    if request.param == 'real': return FolderSource(REAL)
    return write_folder(tmp_path_factory.mktemp('text'))
