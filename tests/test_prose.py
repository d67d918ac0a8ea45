"Sizes typed into prose are those of the configs that they describe."
import json, re
from pathlib import Path
import pytest
from interference_nb.capacity import Sweep
from interference_nb.gradient_probes import ProbeConfig
from interference_nb.pretrain import TrainConfig
from interference_nb.records import read_runs
from interference_nb.transformer import ModelConfig

NBS = Path(__file__).parent.parent / 'nbs'
WORDS = dict(zip(('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten',
                  'eleven', 'twelve', 'thirteen'), range(1, 14), strict=True))
NUMBER = rf'(\d[\d,]*k?|{"|".join(WORDS)})'
PAPER, SWEEP = ModelConfig.paper(), Sweep().scale(32, 1)
HEAD = PAPER.head_width
FILLED = PAPER.n_heads * HEAD
ROWS = ProbeConfig.paper().n_batches * TrainConfig.paper().batch_size

def causes():
    "Return the model of the study of causes on real text, as its records have it."
    models = (run.rows[0]['config']['model']
              for run in read_runs(NBS.parent / 'records/causes-text').values())
    sizes = {(m['n_layers'], m['dim']) for m in models}
    assert len(sizes) == 1
    return sizes.pop()

SAID = [        # notebook, what it says (# for each number), the numbers
    ('01_transformer', 'with # layers, # heads, embeddings of # and a feed-forward layer of #',
     (PAPER.n_layers, PAPER.n_heads, PAPER.dim, PAPER.ffn_dim)),
    ('01_transformer', 'over # subwords', (PAPER.vocab_size,)),
    ('01_transformer', '# heads of equal width cannot share # dimensions',
     (PAPER.n_heads, PAPER.dim)),
    ('01_transformer', 'We keep # heads and round their width down to #: attention then works in # '
     'of # dimensions', (PAPER.n_heads, HEAD, FILLED, PAPER.dim)),
    ('01_transformer', "# heads of # replace the paper's", (PAPER.n_heads, HEAD)),
    ('05b_export', "The paper's # heads in # are # wide each and fill only #",
     (PAPER.n_heads, PAPER.dim, HEAD, FILLED)),
    ('05b_export', 'holds # heads of #,', (PAPER.n_heads, HEAD)),
    ('06a_pretrained_xlm', "The paper's own models have # layers, # wide, # pieces",
     (PAPER.n_layers, PAPER.dim, PAPER.vocab_size)),
    ('07_experiments', 'The paper learns a vocabulary of # pieces', (PAPER.vocab_size,)),
    ('07c_planner', "The paper's head is # wide", (HEAD,)),
    ('07c_planner', 'a score for each of # subwords', (PAPER.vocab_size,)),
    ('04_gradient_probes', 'every # steps, each gradient accumulated over # sentences',
     (ProbeConfig.paper().every, ROWS)),
    ('04_gradient_probes', "The paper's probe, every # steps", (ProbeConfig.paper().every,)),
    ('07a_reproduce', 'compares gradients every # steps, each over # rows',
     (ProbeConfig.paper().every, ROWS)),
    ('07g_capacity', 'between sizes: # layers, # heads, a feed-forward part # times as wide',
     (SWEEP.model.n_layers, SWEEP.model.n_heads, SWEEP.model.ffn_dim // SWEEP.model.dim)),
    ('08a_causes', 'on Wikipedia text: # layers of width #', causes()),
    ('08a_causes', 'real text takes # layers', causes()[:1]),
]

def prose(name):
    "Return a notebook's markdown on one line."
    cells = json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    text = ' '.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return ' '.join(text.split())

def number(text):
    text = text.lower()
    thousands = 1000 if text.endswith('k') else 1
    return WORDS.get(text) or int(text.rstrip('k').replace(',', '')) * thousands

@pytest.mark.parametrize(('name', 'said', 'true'), SAID, ids=[f'{n}: {s[:40]}' for n, s, _ in SAID])
def test_a_size_in_prose_is_that_of_the_config(name, said, true):
    pattern = NUMBER.join(map(re.escape, said.split('#')))
    found = re.findall(pattern, prose(name), re.I)
    assert found, f'{name} no longer says: {said}'
    for numbers in found:
        numbers = (numbers,) if isinstance(numbers, str) else numbers
        assert tuple(map(number, numbers)) == true

def test_no_new_size_of_the_paper_stands_in_prose_unchecked():
    "Layers, heads, width and pieces of the paper's model are typed nowhere but in those sentences."
    sizes = {HEAD, PAPER.dim, PAPER.vocab_size, FILLED}
    unit = rf'{NUMBER} (?:wide|dimensions|pieces|subwords)\b'
    checked = [(n, NUMBER.join(map(re.escape, s.split('#')))) for n, s, _ in SAID]
    for path in sorted(NBS.glob('*.ipynb')):
        text = prose(path.stem)
        for name, pattern in checked:
            if name == path.stem: text = re.sub(pattern, ' ', text, flags=re.I)
        typed = [m[0] for m in re.finditer(unit, text, re.I) if number(m[1]) in sizes]
        assert not typed, f'{path.stem} says {typed}: add its sentence to SAID'
