"From an empty folder to tables, figures and verdicts, through the command; and where that fails."
import csv
from dataclasses import replace
import numpy as np
import pytest
from interference_nb import reproduce
from interference_nb.cli import main
from interference_nb.data import InputError
from interference_nb.experiments import Scale, run_all
from interference_nb.finetune import FinetuneConfig
from interference_nb.gradient_probes import ProbeConfig
from interference_nb.l0_pruning import PruneConfig
from interference_nb.pretrain import TrainConfig
from interference_nb.reproduce import EXHIBITS, SETTINGS, choose, page, specs_of, verdicts_of
from interference_nb.toy_languages import open_source
from interference_nb.transformer import ModelConfig

MICRO = Scale(ModelConfig.toy(0, dim=8, n_layers=1, ffn_dim=16),
              TrainConfig.toy(steps=10, warmup=2, eval_every=2),
              {'ner': FinetuneConfig.toy('ner', epochs=1, max_train=32, max_dev=16, max_eval=40)})
TINY = replace(SETTINGS['toy'], scale=MICRO, data='toy', targets=('ar', 'sw'), tasks=('ner',),
               systems=('mono', 'joint'), seeds=1, probe=ProbeConfig(2, 1),
               prune=(PruneConfig(steps=4, warmup=1, batch_size=4),))

@pytest.fixture
def command(monkeypatch, capsys):
    "Run `interference reproduce` at a scale of nothing; give status and what it printed."
    monkeypatch.setitem(SETTINGS, 'toy', TINY)
    def run(*args):
        status = 0
        try: main(['reproduce', *map(str, args)])
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return run

def test_all_exhibits_from_an_empty_folder(command, tmp_path):
    "Every exhibit is written; the second time nothing runs and the same is written."
    out = tmp_path/'new'
    ask = ('all', '--out', out, '--workers', 2, '--targets', 'ar,sw', '--systems', 'mono,joint')
    status, said, err = command(*ask)
    assert status == 0, err
    for name in EXHIBITS: assert (out/f'{name}.md').exists(), name
    assert {p.name for p in out.glob('*.svg')} >= {'figure1.svg', 'figure2.svg', 'figure3.svg',
                                                   'figure4a-ar.svg', 'figure4b.svg'}
    with open(out/'table2.csv') as f: rows = list(csv.DictReader(f))
    assert {r['row'] for r in rows} == {'mono', 'joint'} and all(
        bool(r['mean']) == (r['state'] != 'no such cell') for r in rows)
    assert r'\begin{tabular}' in (out/'table2.tex').read_text()
    text = ' '.join(p.read_text() for p in out.glob('*.md'))
    assert 'nan' not in text and str(tmp_path) not in text
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob('*/record.jsonl')}
    pages = {p: p.read_bytes() for p in out.glob('*.md')}
    assert len(before) == 4
    assert command(*ask)[0] == 0
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}
    assert pages == {p: p.read_bytes() for p in pages}

def test_dry_run_writes_nothing(command, tmp_path):
    status, said, _ = command('table2', 'figure3', '--dry-run', '--out', tmp_path/'new')
    together = next(l for l in said.splitlines() if l.startswith('together'))
    assert status == 0 and together.split()[1:4] == ['4', '0', '4']
    assert not (tmp_path/'new').exists()

def test_a_failed_run_stops_no_other(command, tmp_path):
    "The rest is run and written, the cell says failed, the status is 2."
    (tmp_path/'mono-sw-of-en+sw-0').touch()             # in the way of the run's folder
    status, said, err = command('table2', '--out', tmp_path, '--workers', 2)
    assert status == 2 and '1 of 4 runs failed' in err and 'mono-sw-of-en+sw-0' in err
    table = (tmp_path/'table2.md').read_text()
    assert '| failed | failed |' in table
    assert (tmp_path/'joint-en+sw-0'/'sentences.safetensors').exists()

@pytest.mark.parametrize('args, message', [
    (['table9'], "unknown table or figure 'table9'"),
    (['table2', '--scale', 'mini'], "scale 'mini' has no data of its own"),
    (['table2', '--scale', 'huge'], "unknown scale 'huge'"),
    (['table2', '--systems', 'jiont'], "unknown system 'jiont'"),
    (['table2', '--targets', 'de'], "unknown target 'de'"),
    (['table2', '--tasks', 'nre'], "unknown task 'nre'"),
    (['table2', '--seeds', '0'], '0 seeds'),
    (['table2', '--engine', 'ray'], "unknown engine 'ray'"),
    (['table2', '--data', 'no-such-folder'], 'no-such-folder')])
def test_bad_input_is_one_line(command, tmp_path, args, message):
    status, _, err = command(*args, '--out', tmp_path)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1

def test_without_submitit_slurm_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'submitit', None)
    status, _, err = command('table2', '--engine', 'slurm', '--out', tmp_path)
    assert status == 2 and "pip install 'interference_nb[slurm]'" in err

def test_runs_through_submitit(tmp_path):
    "The same specs on another engine: jobs in processes that submitit starts."
    submitit = pytest.importorskip('submitit')
    setting = replace(TINY, targets=('sw',), systems=('joint',))
    source = open_source('toy')
    specs = specs_of(choose(['table2'], setting), setting, source)
    executor = submitit.AutoExecutor(tmp_path/'jobs', cluster='local')
    executor.update_parameters(timeout_min=2)
    (spec, rows), = run_all(specs, tmp_path, executor=executor)
    assert spec.name == 'joint-en+sw-0' and rows[-1]['kind'] == 'done'

def test_no_best_where_a_row_is_missing(tmp_path, monkeypatch):
    "Bold needs every other row of its column, and those that lose in seeds and sentences."
    setting = replace(TINY, systems=('mono', 'joint', 'ffn'), seeds=3)
    exhibit, = choose(['table2'], setting)
    level = {'mono': 70., 'joint': 60., 'ffn': 50.}
    def bold(rows):
        arranged = lambda v: {r: {s: {'NER within ar': v(r, s)} for s in range(3)} for r in rows}
        values = dict.fromkeys(exhibit.rows, {}) | arranged(lambda r, s: level[r] + s)
        resampled = arranged(lambda r, s: np.full(9, level[r]))
        monkeypatch.setattr(reproduce, 'values_of', lambda *_: values)
        monkeypatch.setattr(reproduce, 'resampled_of', lambda *_: resampled)
        return [r['row'] for r in reproduce.cells_of(exhibit, setting, open_source('toy'), tmp_path)
                if r['best']]
    assert bold(['mono', 'joint', 'ffn']) == ['mono']
    assert bold(['mono', 'joint']) == []

def test_languages_without_rows_are_no_data(tmp_path):
    "A source that lacks a language or a task leaves cells open, and no run asks for it."
    class Little:
        name, languages = 'little', ('en', 'ar', 'te')
        def count(self, task, lang, split):
            if (task, lang) == ('ner', 'te'): raise InputError('no rows')
            return 5
    setting = replace(TINY, targets=('ar', 'hi', 'te'), systems=('joint',))
    exhibits = choose(['table2', 'table4'], setting)
    specs = specs_of(exhibits, setting, Little())
    assert {s.name: s.tasks for s in specs} == {'joint-en+ar-0': ('ner',), 'joint-en+te-0': ()}
    rows = reproduce.cells_of(exhibits[0], setting, Little(), tmp_path)
    within = {r['column']: r['state'] for r in rows if r['block'] == 'NER within'}
    assert within == {'ar': 'not run', 'hi': 'no data', 'te': 'no data', 'mean': 'not run'}

def test_the_hub_model_stands_in_figure_1_of_the_paper_scale():
    figure = {name: choose(['figure1'], SETTINGS[name])[0] for name in ('toy', 'paper')}
    assert figure['toy'].rows == ('mono', 'joint')
    assert figure['paper'].rows == ('mono', 'joint', 'xlm')
    paper = SETTINGS['paper']
    names = {s.name for s in specs_of([figure['paper']], paper, open_source('toy:pairs'))}
    assert 'xlm-hi-of-en+hi-2' in names

def test_nothing_run_is_said_so(tmp_path):
    exhibit, = choose(['table2'], TINY)
    source = open_source('toy')
    rows = reproduce.cells_of(exhibit, TINY, source, tmp_path)
    found = verdicts_of({}, exhibit.claims)
    text = page(exhibit, TINY, rows, found, [], tmp_path, {'joint-en+ar-0'})
    assert 'not run' in text and 'None of them has been run.' in text
    assert {v['verdict'] for v in found} == {'not run'}

def test_resamples_agree_with_a_plain_loop():
    "F1 of resampled sentences, and the mean over languages, by hand."
    rng = np.random.default_rng(0)
    counts = [rng.integers(0, 5, (30, 2)) + [0, 5] for _ in range(2)]
    fast = reproduce.resample(counts, 'ner/en/ar', 20)
    for found, c in zip(fast, counts, strict=True):
        slow = [100 * sum(np.repeat(c[:, 0], w)) / sum(np.repeat(c[:, 1], w))
                for w in reproduce.draws(30, 'ner/en/ar', 20).astype(int)]
        np.testing.assert_allclose(found, slow, rtol=1e-5)

def test_each_paper_statement_has_a_place():
    "Every claim speaks of a column and of rows that its exhibit has."
    assert len(EXHIBITS) == 11
    for e in EXHIBITS.values():
        columns = {f'{b.title} {p}' for b in e.blocks for p in (*b.partners, 'mean')}
        for c in e.claims:
            assert {c.metric, c.against or c.metric} <= columns
            assert {c.system, c.baseline} <= set(e.rows)
