"From an empty folder to tables, figures and verdicts, through the command; and where that fails."
import csv, errno, json, re, shutil
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from interference_nb import capacity, cli, files, planner, records, reproduce
from interference_nb.cli import main
from interference_nb.files import InputError
from interference_nb.records import load
from interference_nb.experiments import RunSpec, Scale, _parameters, run_all, with_vocabulary
from interference_nb.finetune import FinetuneConfig
from interference_nb.gradient_probes import ProbeConfig
from interference_nb.l0_pruning import PruneConfig
from interference_nb.pretrain import TrainConfig
from interference_nb.claims import draws, resample
from interference_nb.findings import treatment_table
from interference_nb.reproduce import (EXHIBITS, STUDIES, choose, gather, page_of_cells,
                                       specs_of)
from interference_nb.toy_languages import open_source
from interference_nb.transformer import ModelConfig

MICRO = Scale(ModelConfig.toy(0, dim=8, n_layers=1, ffn_dim=16),
              TrainConfig.toy(steps=10, warmup=2, eval_every=2),
              {'ner': FinetuneConfig.toy('ner', epochs=1, max_train=32, max_dev=16, max_eval=40)})
TINY = replace(STUDIES['toy'], scale=MICRO, data='toy', targets=('ar', 'sw'), tasks=('ner',),
               systems=('mono', 'joint'), seeds=1, probe=ProbeConfig(2, 1),
               prune=(PruneConfig(steps=4, warmup=1, batch_size=4),))

@pytest.mark.parametrize('systems', [['mono'], ['adpt', 'share_adpt']])
def test_exhibits_without_a_row_that_was_asked_for(systems, command, tmp_path):
    "Their pages say so, and the others are written."
    status, out, err = command('all', '--write-only', '--systems', *systems, '--out', tmp_path)
    assert status == 0, out + err
    pages = {p.stem: p.read_text() for p in tmp_path.glob('*.md')}
    assert {*EXHIBITS, 'index'} == {*pages}
    assert 'Nothing that was asked for belongs to it.' in pages['table4']
    assert 'Nothing that was asked for' not in pages['table2'] and 'not run' in pages['table2']

@pytest.fixture
def command(monkeypatch, capsys):
    "Run `interference reproduce` at a scale of nothing; give status and what it printed."
    monkeypatch.setitem(STUDIES, 'toy', TINY)
    def run(*args):
        status = 0
        try: main(['reproduce', *map(str, args)])
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return run

def cells_in(page): return re.sub(' +', ' ', page.read_text())     # whatever their width

def test_all_exhibits_from_an_empty_folder(command, tmp_path):
    "Every exhibit is written; the second time nothing runs and the same is written."
    out = tmp_path/'new'
    ask = ('all', '--out', out, '--workers', 2, '--targets', 'ar,sw', '--systems', 'mono,joint')
    status, said, err = command(*ask)
    assert status == 0, err
    for name in EXHIBITS: assert (out/f'{name}.md').exists(), name
    assert {p.name for p in out.glob('*.svg')} >= {'figure1.svg', 'figure2.svg', 'figure3.svg',
                                                   'figure4a-ar-l1.svg', 'figure4b-ar-l1.svg'}
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
    table = cells_in(tmp_path/'table2.md')
    assert '| failed | failed |' in table
    assert (tmp_path/'joint-en+sw-0'/'sentences.safetensors').exists()

@pytest.mark.parametrize('args, message', [
    (['table9'], "unknown table or figure 'table9'"),
    (['table2', '--scale', 'mini'], "scale 'mini' has no data of its own"),
    (['table2', '--scale', 'huge'], "unknown scale 'huge'"),
    (['table2', '--systems', 'jiont'], "unknown system 'jiont'"),
    (['table2', '--targets', 'de'], "unknown language 'de'"),
    (['table2', '--family', 'bilingul'], "unknown family 'bilingul'"),
    (['table2', '--tasks', 'nre'], "unknown task 'nre'"),
    (['table2', '--seeds', '0'], '0 seeds'),
    (['table2', '--steps', '0'], 'steps is 0'),
    (['table2', '--workers', '0'], '0 workers'),
    (['table2', '--workers', '-1'], '-1 workers'),
    (['table2', '--engine', 'ray'], "unknown engine 'ray'"),
    (['table2', '--data', 'no-such-folder'], 'no-such-folder')])
def test_bad_input_is_one_line(command, tmp_path, args, message):
    status, _, err = command(*args, '--out', tmp_path)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1

def test_write_only_shows_what_is_there(command, tmp_path):
    "A part of a study is written as such, nothing is run; other settings are refused."
    ask = 'table2', '--out', tmp_path, '--systems', 'joint'
    assert command(*ask)[0] == 0
    status, _, err = command('all', '--seeds', 3, '--write-only', '--out', tmp_path)
    assert status == 0, err
    assert {p.parent.name for p in tmp_path.glob('*/record.jsonl')} == {'joint-en+ar-0',
                                                                         'joint-en+sw-0'}
    table = cells_in(tmp_path/'table2.md')
    assert '(1 of 3)' in table and '| mono | not run | not run |' in table and 'nan' not in table
    assert '10 steps of' in table and '2 of 12 runs are complete' in table
    before = {p: p.read_bytes() for p in tmp_path.glob('*.md')}
    status, _, err = command(*ask, '--write-only', '--steps', 8)
    assert status == 2 and 'was made for 10' in err
    assert before == {p: p.read_bytes() for p in before}

def test_a_record_of_other_settings_stops_no_other(command, tmp_path):
    "Its run fails, none of its numbers is shown; where no record fits, nothing is begun."
    ask = 'table2', '--out', tmp_path, '--systems', 'joint', '--workers', 1
    assert command(*ask, '--targets', 'sw', '--steps', 8)[0] == 0
    status, _, err = command(*ask)
    assert status == 2 and 'was made for 8 s' in err and not (tmp_path/'joint-en+ar-0').exists()
    assert command(*ask, '--targets', 'ar')[0] == 0
    status, said, err = command(*ask)
    assert status == 2 and '1 of 2 runs failed' in err and 'hold other settings' in said
    with open(tmp_path/'table2.csv') as f: rows = list(csv.DictReader(f))
    assert {r['state'] for r in rows if r['column'] == 'sw'} == {'failed'}
    assert '1 of 2 runs are complete' in (tmp_path/'table2.md').read_text()

def test_early_losses_are_weighted_by_steps(tmp_path):
    "Rows of both kinds count, by the steps that each covers; the pair's second language is held."
    def record(lang, *losses):
        about = dict(system='joint', seed=0, langs=['en', lang], pair=['en', lang],
                     max_sentences={})
        rows = [dict(kind=k, step=s, passes=s, loss=l, ppl={'en': 9., lang: 8.})
                for k, s, l in zip(('eval', 'step', 'eval', 'eval'), (0, 3, 4, 20), losses,
                                   strict=True)]
        del rows[0]['loss']
        return [dict(kind='start', hardware='CPU', config=dict(run=about)), *rows]
    for lang, losses in (('ar', (9., 4., 8., 1.)), ('fr', (9., 4., 4., 1.))):
        home = tmp_path/f'joint-en+{lang}-0'
        home.mkdir()
        rows = [*record(lang, *losses), dict(kind='done', name=home.name)]
        (home/'record.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    found = reproduce.loss_over_time(load(tmp_path)).loc['joint', 0]
    assert (found['training loss en+ar'], found['training loss en+fr']) == (5., 4.)
    assert {k for k in found.index if k.startswith('loss')} == {
        f'loss {l} {when}' for l in ('ar', 'fr') for when in ('early', 'halfway', 'end')}

def cells_of(e, values, resampled):
    "Cells of which one column has made-up scores: {row: {seed: score}}, and resampled ones."
    cells = reproduce.cells_of(e)
    for row, seeds in values.items():
        for seed, value in seeds.items():
            at = cells.index[(cells['block'] == 'NER within') & (cells['column'] == 'ar')
                             & (cells['row'] == row) & (cells['seed'] == seed)][0]
            cells.loc[at, 'value'] = value
            if row in resampled: cells.at[at, 'resampled'] = np.full(9, resampled[row])
    return reproduce.summarise_cells(e, cells)

def test_no_bold_beside_half_a_row_or_untested(tmp_path):
    "A row with some of its seeds keeps its column open; a column without counts says so."
    study = replace(TINY, systems=('mono', 'joint'), seeds=3)
    e = gather(*choose(['table2'], study), study, open_source('toy'), tmp_path)
    def cells(seeds, counts=True):
        values = {'mono': {s: 70. + s for s in range(3)},
                  'joint': {s: 60. + s for s in range(seeds)}}
        return cells_of(e, values, {'mono': 70., 'joint': 60.} if counts else {})
    bold = lambda rows: list(rows['row'][rows['best']])
    assert bold(cells(3)) == ['mono'] and bold(cells(2)) == [] and bold(cells(3, False)) == []
    assert reproduce.untested(cells(3)) == ''
    assert 'NER within: ar.' in reproduce.untested(cells(3, False))

def test_disk_counts_the_trials_of_the_runs_at_work():
    "Twelve bytes a parameter stay, sixteen a trial pass; toy data keeps no trials."
    grid = {'ner': {'lr': (1., 2.), 'batch_size': (1, 2, 3)}}
    spec = replace(RunSpec('joint', ('en', 'ar'), ('en', 'ar'), 0, replace(MICRO, search=grid)),
                   tasks=('ner',))
    n = _parameters(with_vocabulary(spec), 2, 'joint')
    assert planner.disk([spec] * 3, 2) == 3 * 12 * n
    text = replace(spec, data='text')
    assert planner.disk([text] * 3, 2) == 3 * 12 * n + 2 * 6 * 16 * n
    assert planner.disk([replace(text, system='xlm')], 2) == 0

def test_without_submitit_slurm_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'submitit', None)
    status, _, err = command('table2', '--engine', 'slurm', '--out', tmp_path)
    assert status == 2 and "pip install 'interference_nb[slurm]'" in err

def test_settings_of_jobs_are_numbers_or_refused(tmp_path, monkeypatch):
    pytest.importorskip('submitit')
    srun = tmp_path/'srun'
    srun.write_text('#!/bin/sh\n')
    srun.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    asked = lambda **slurm: cli._executor_of(
        cli.ReproduceConfig(exhibits=('table2',), engine='slurm', slurm=slurm), tmp_path)
    made = asked(timeout_min='600', cpus_per_task='4', slurm_partition='long')._executor.parameters
    assert (made['time'], made['cpus_per_task'], made['partition']) == (600, 4, 'long')
    for wrong in (dict(timeout_min='long'), dict(timeout='600')):
        with pytest.raises(InputError, match='--slurm: .*such as timeout_min 600'): asked(**wrong)

def test_runs_through_submitit(tmp_path):
    "The same specs on another engine: jobs in processes that submitit starts."
    submitit = pytest.importorskip('submitit')
    study = replace(TINY, targets=('sw',), systems=('joint',))
    source = open_source('toy')
    specs = specs_of(choose(['table2'], study), study, source)
    executor = submitit.AutoExecutor(tmp_path/'jobs', cluster='local')
    executor.update_parameters(timeout_min=2)
    (spec, rows), = run_all(specs, tmp_path, executor=executor)
    assert spec.name == 'joint-en+sw-0' and rows[-1]['kind'] == 'done'

def test_no_best_where_a_row_is_missing(tmp_path):
    "Bold needs every other row of its column, and those that lose in seeds and sentences."
    study = replace(TINY, systems=('mono', 'joint', 'ffn'), seeds=3)
    e = gather(*choose(['table2'], study), study, open_source('toy'), tmp_path)
    level = {'mono': 70., 'joint': 60., 'ffn': 50.}
    def bold(rows):
        found = cells_of(e, {r: {s: level[r] + s for s in range(3)} for r in rows}, level)
        return list(found['row'][found['best']])
    assert bold(['mono', 'joint', 'ffn']) == ['mono']
    assert bold(['mono', 'joint']) == []

def test_languages_without_rows_are_no_data(tmp_path):
    "A source that lacks a language or a task leaves cells open, and no run asks for it."
    class Little:
        name, languages = 'little', ('en', 'ar', 'te')
        def count(self, task, lang, split):
            return 5 * ((task, lang) != ('ner', 'te'))
    study = replace(TINY, targets=('ar', 'hi', 'te'), systems=('joint',))
    exhibits = choose(['table2', 'table4'], study)
    specs = specs_of(exhibits, study, Little())
    assert {s.name: s.tasks for s in specs} == {'joint-en+ar-0': ('ner',), 'joint-en+te-0': ()}
    e = gather(exhibits[0], study, Little(), tmp_path)
    rows = reproduce.summarise_cells(e, reproduce.cells_of(e))
    within = dict(rows[rows['block'] == 'NER within'][['column', 'state']].itertuples(index=False))
    assert within == {'ar': 'not run', 'hi': 'no data', 'te': 'no data', 'mean': 'not run'}

def test_the_hub_model_stands_in_figure_1_of_the_paper_scale():
    figure = {name: choose(['figure1'], STUDIES[name])[0] for name in ('toy', 'paper')}
    assert figure['toy'].rows == ('mono', 'joint')
    assert figure['paper'].rows == ('mono', 'joint', 'xlm')
    paper = STUDIES['paper']
    names = {s.name for s in specs_of([figure['paper']], paper, open_source('toy:pairs'))}
    assert 'xlm-hi-of-en+hi-2' in names

def test_nothing_run_is_said_so(tmp_path):
    exhibit, = choose(['table2'], TINY)
    e = gather(exhibit, TINY, open_source('toy'), tmp_path)
    text = '\n'.join(page_of_cells(e, [])[0])
    assert 'not run' in text and 'None of them has been run.' in text
    assert set(reproduce.judged(e)['verdict']) == {'not run'}

def test_pages_parse_each_record_once_and_are_written_whole(command, tmp_path, monkeypatch):
    """Writing all pages parses a file once, however many pages show its run; packed studies too.

    On a full disk each page, table and figure that was there stays as it was."""
    ask = 'table2', 'figure3', '--out', tmp_path, '--workers', 2
    assert command(*ask)[0] == 0
    parsed, read = [], records.read_jsonl
    monkeypatch.setattr(records, 'read_jsonl', lambda path: parsed.append(path) or read(path))
    records.parse.cache_clear()
    records.table_of.cache_clear()
    assert command('all', '--out', tmp_path, '--write-only')[0] == 0
    logs = [p for p in tmp_path.glob('*/*.jsonl')]
    assert sorted(parsed) == sorted(p.resolve() for p in logs) and len(logs) == 5
    pages = {p: p.read_bytes() for p in tmp_path.glob('*.*')}
    records.pack(tmp_path)
    assert not list(tmp_path.glob('*/record.jsonl'))
    assert command('all', '--out', tmp_path, '--write-only')[0] == 0
    assert pages == {p: p.read_bytes() for p in pages} and len(parsed) == 5
    shown = [p for p in pages if p.name != records.PACKED]
    assert {p.suffix for p in shown} == {'.md', '.csv', '.tex', '.svg'}
    for p in shown: p.write_text('old')
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(files.os, 'fsync', full)
        status, _, err = command('all', '--out', tmp_path, '--write-only')
    assert status == 2 and 'Make room on the disk' in err and 'Traceback' not in err
    assert {p.read_text() for p in shown} == {'old'} and not [*tmp_path.rglob('*.tmp')]
    assert command(*ask)[0] == 0                        # going on unpacks, and runs nothing again
    assert sorted(tmp_path.glob('*/*.jsonl')) == sorted(logs)

def test_resamples_agree_with_a_plain_loop():
    "F1 of resampled sentences, and the mean over languages, by hand."
    rng = np.random.default_rng(0)
    counts = [rng.integers(0, 5, (30, 2)) + [0, 5] for _ in range(2)]
    fast = resample(counts, 'ner/en/ar', 20)
    for found, c in zip(fast, counts, strict=True):
        slow = [100 * sum(np.repeat(c[:, 0], w)) / sum(np.repeat(c[:, 1], w))
                for w in draws(30, 'ner/en/ar', 20).astype(int)]
        np.testing.assert_allclose(found, slow, rtol=1e-5)

def test_each_paper_statement_has_a_place():
    "Every claim speaks of a column and of rows that its exhibit has."
    assert len(EXHIBITS) == 11
    for e in EXHIBITS.values():
        columns = {f'{g.title} {p}' for g in e.groups for p in (*g.partners, 'mean')}
        for c in e.claims:
            assert {c.metric, c.against or c.metric} <= columns
            assert {c.system, c.baseline} <= set(e.rows)


RECORDS = Path(__file__).parent.parent / 'records'

def test_a_sweep_refuses_records_of_other_settings():
    "Or a page would pass them off as what was asked for."
    sweep = capacity.Sweep(treatments=())
    assert not capacity.missing(sweep, RECORDS/'capacity-toy')
    for change, said in ((dict(steps=8000), '4000 steps, not 8000'),
                         (dict(data='toy:pairs'), "data = 'toy' there")):
        with pytest.raises(InputError, match=said):
            capacity.missing(replace(sweep, **change), RECORDS/'capacity-toy')
    with pytest.raises(SystemExit):
        main(['capacity', '--write-only', '--steps', '8000', '--out', str(RECORDS/'capacity-toy')])

def test_treatments_are_compared_with_joint_seed_by_seed():
    "What seeds have in common cancels; a cell without both is not counted."
    rows = [(8, p, system, seed, b, seed + of[system] + (b < 20) * 9)
            for p in ('x3', 'ar') for seed in range(3) for b in (10, 20)
            for of in ({'joint': 0., 'adpt': -.1 - seed / 100, 'share_adpt': .01 * (-1) ** seed},)
            for system in of if (p, system) != ('ar', 'share_adpt')]
    gaps = pd.DataFrame(rows, columns=['width', 'partner', 'system', 'seed', 'batches', 'nats'])
    found = capacity.against_joint(gaps).set_index(['system', 'partner'])
    assert found.loc[('adpt', 'x3'), 'nats'] == pytest.approx(-.11)
    assert sorted(found.index) == [('adpt', 'ar'), ('adpt', 'x3'), ('share_adpt', 'x3')]
    assert (found['seeds'] == 3).all()
    assert capacity.treatment_line(gaps) == (
        '`adpt` lowers held-out loss against joint in 2 of 2 cells, raises it in 0; in 0 nothing '
        'is decided (-0.110 to -0.110 nats). `share_adpt` lowers held-out loss against joint in 0 '
        'of 1 cells, raises it in 0; in 1 nothing is decided (+0.003 to +0.003 nats). '
        'Exploratory: 95% intervals, not corrected for the number of cells.')
    assert not capacity.treatment_line(gaps[gaps['system'] == 'joint'])

def test_a_page_is_of_its_own_sweep_whatever_else_a_folder_holds(tmp_path):
    "Another sweep's mono made three of a pair, which then left every table."
    shutil.copytree(RECORDS/'capacity-toy/width-16', tmp_path/'width-16')
    records.unpack(tmp_path/'width-16')
    sweep = capacity.Sweep(widths=(16,))
    page = capacity.sweep_page(tmp_path, sweep)
    assert page.count('not run') == 0
    for lang in ('en', 'x3'):
        shutil.copytree(tmp_path/f'width-16/mono-{lang}-of-en+x3+ar-0',
                        tmp_path/f'width-16/mono-{lang}-of-en+x3-0')
    shutil.copytree(tmp_path/'width-16', tmp_path/'width-24')
    assert capacity.sweep_page(tmp_path, sweep) == page

@pytest.mark.parametrize('system', ['pcgrad', 'joint_all', 'joint2x', 'scratch', 'joint', 'jiont'])
def test_a_sweep_takes_systems_of_joints_steps_only(system):
    "Some read each language in a step, others train longer: batches were counted as joint's."
    with pytest.raises(InputError, match=f"'{system}' is no system that takes joint's steps"):
        capacity.Sweep(treatments=('adpt', system))

@pytest.mark.parametrize('data, said', [('toy:bgi', "no data source 'toy:bgi'"),
                                        ('toys', 'the sweep is on toy languages')])
def test_a_sweep_of_other_data_is_refused_before_any_run(data, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('toys').mkdir()
    with pytest.raises(SystemExit): main(['capacity', '--data', data])
    assert said in capsys.readouterr().err and not Path('runs').exists()

def test_one_system_alone_is_drawn():
    "Also where it is the one whose passes say nothing of the others'."
    from interference_nb import figures
    figure = figures.plot_convergence(RECORDS/'meta-cost-toy', systems=('meta_adpt',))
    assert 0 < figure.axes[0].get_xlim()[1] < 2000

def test_a_summary_draws_the_tasks_that_were_run(tmp_path):
    from interference_nb import figures
    table = load(RECORDS/'demo-toy')
    figure = figures.plot_summary(table[table['task'] != 'ner'])
    said = ' '.join(ax.get_ylabel() + ax.get_xlabel() + ax.get_title() for ax in figure.axes)
    assert 'POS' in said and 'NER' not in said

def test_a_kill_while_packing_hides_nothing(tmp_path, monkeypatch):
    "A folder that is half removed came before what is packed of it, for good."
    shutil.copytree(RECORDS/'causes-toy', tmp_path/'study')
    records.unpack(tmp_path/'study')
    before = len(load(tmp_path/'study'))
    def killed(home):
        (home/'probe.jsonl').unlink()
        raise KeyboardInterrupt
    monkeypatch.setattr(records.shutil, 'rmtree', killed)
    with pytest.raises(KeyboardInterrupt): records.pack(tmp_path/'study')
    monkeypatch.undo()
    assert len(load(tmp_path/'study')) == before

def test_treatments_of_nothing_are_an_empty_table(tmp_path):
    assert not len(treatment_table(tmp_path))

def test_a_copy_beside_the_widths_of_a_sweep_is_left_out(tmp_path, capsys):
    for name in ('width-16', 'width-16-old', 'width-new'):
        shutil.copytree(RECORDS/'capacity-toy/width-16', tmp_path/name)
    assert [w for w, _ in capacity.widths_in(tmp_path)] == [16]
    assert capsys.readouterr().err.count('is left out: its name is not that of a width') == 2
    losses = capacity.sweep_losses(tmp_path)
    assert not losses.duplicated(['width', 'model', 'system', 'lang', 'seed', 'batches']).any()

def test_a_pair_of_unfinished_runs_hides_no_other(tmp_path):
    "Gates of the pairs that are complete are drawn."
    shutil.copytree(RECORDS/'reproduce-toy', tmp_path/'toy')
    records.unpack(tmp_path/'toy')
    for seed in range(STUDIES['toy'].seeds):
        path = tmp_path/f'toy/joint-en+ar-{seed}/record.jsonl'
        path.write_text(''.join(path.read_text().splitlines(keepends=True)[:-2]))
    study = STUDIES['toy']
    e = gather(EXHIBITS['figure4'], study, open_source(study.data), tmp_path/'toy')
    from interference_nb import figures
    drawn = reproduce.draw_gates(e, figures)
    assert any('-fr-' in name for name in drawn) and not any('-ar-' in name for name in drawn)

def test_what_has_nothing_to_measure_is_said():
    spec = RunSpec('xlm', ('en',), ('en',), 0, MICRO)
    config = dict(run=json.loads(json.dumps(spec.config)))
    assert 'nothing to measure' in reproduce.one_line(spec, [
        dict(kind='start', config=config, hardware='CPU'), dict(kind='done', name=spec.name)])
    assert records.describe(RECORDS/'capacity-toy') == 'No run is complete.'

def test_a_study_names_its_first_and_last_day(tmp_path):
    for name, day in (('a-0', '2026-02-28'), ('b-0', '2026-03-04'), ('c-0', '2026-03-01')):
        (tmp_path/name).mkdir()
        start = dict(kind='start', config=dict(run=dict(seed=0)), date=f'{day}T09:00:00',
                     hardware='CPU', torch='2.13.0', commit='abc', time=0)
        rows = [start, dict(kind='done', name=name)]
        (tmp_path/name/'record.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert records.describe(tmp_path).endswith('commit abc, 2026-02-28 to 2026-03-04.')
    assert records.describe(tmp_path, ['c-0']).endswith('commit abc, 2026-03-01.')

def test_another_runs_damaged_record_stops_no_clock(tmp_path):
    "Progress reads the newest record that can be read."
    for name, text in (('a', '{"kind": "eval", "step": 7, "ppl": {"en": 2.0}}\n'), ('b', 'x\ny\n')):
        (tmp_path/name).mkdir()
        (tmp_path/name/'record.jsonl').write_text(text)
    assert reproduce.latest(tmp_path) == 'a step 7: en ppl 2.0'

def test_unpacking_keeps_what_is_newer(tmp_path):
    "A run's own folder comes before what is packed of it."
    shutil.copytree(RECORDS/'causes-toy', tmp_path/'study')
    packed = (tmp_path/'study'/records.PACKED).read_bytes()
    records.unpack(tmp_path/'study')
    path = tmp_path/'study/joint-en+fr-0/record.jsonl'
    newer = path.read_text() + '{"kind": "gates"}\n'
    path.write_text(newer)
    (tmp_path/'study'/records.PACKED).write_bytes(packed)
    records.unpack(tmp_path/'study')
    assert path.read_text() == newer and not (tmp_path/'study'/records.PACKED).exists()

def test_fewer_steps_bring_their_warm_up():
    train = reproduce.with_steps(STUDIES['demo'], 50).scale.train
    assert (train.steps, train.warmup, train.eval_every) == (50, 50, 5)

def test_two_records_without_numbers_are_not_the_same():
    config = dict(run=RunSpec('joint', ('en', 'x3'), ('en', 'x3'), 0, MICRO).config)
    start = dict(kind='start', config=config, inputs={}, hardware='CPU')
    assert 'no numbers' in records.compare([start], [start])[2]
