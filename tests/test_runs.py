"""Full-scale runs: in a group of processes, from prepared text; what is prepared survives a kill,
knows its size beforehand and stays small in memory; each notebook of `runs/` shows real records."""
import json, multiprocessing, os, re, resource, shutil, signal
from dataclasses import replace
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from interference_nb import cli, data, reproduce
from interference_nb.folders import FolderSource
from interference_nb.data import (HubSource, check_room, disk_needed, prepare_corpus,
                                  train_tokenizer)
from interference_nb.tokenizers import WordTokenizer
from interference_nb.files import (InputError, JsonlLog, load_checkpoint, read_jsonl, run_lock,
                                   write_atomically)
from interference_nb.records import read_rows
from interference_nb.distributed import launch, rank_and_world_size
from interference_nb.experiments import (SCALES, Scale, load_run_data, plan, pretrain_all, ready,
                                         run, run_all, smoke_test_spec)
from interference_nb.finetune import FinetuneConfig
from interference_nb.pretrain import TrainConfig
from interference_nb.reproduce import (FAMILIES, STUDIES, family, family_page, records_of)
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import ModelConfig
from waiting import LIMIT

ROOT = Path(__file__).parent.parent
FULL_SCALE = sorted((ROOT/'nbs'/'runs').glob('*.ipynb'))

# one run in several processes

TINY = Scale(ModelConfig.toy(0, dim=8, n_layers=1, ffn_dim=16),
             TrainConfig.toy(steps=12, warmup=4, accumulate=2, lr=1e-3, eval_every=6,
                             checkpoint_every=6),
             dict.fromkeys(('ner', 'pos'), FinetuneConfig.toy(epochs=1, max_train=32, max_dev=16,
                                                              max_eval=16)))

def record(folder, spec): return read_jsonl(folder/spec.name/'record.jsonl')

def told(rows):
    "What a record says, without times and places."
    return [r['kind'] for r in rows], [r['ppl'] for r in rows if 'ppl' in r]

def own_rows(spec, folder):
    "Run, and note what each process got back."
    rows = run(spec, folder)
    (folder/f'rank{rank_and_world_size()[0]}').write_text(json.dumps(rows))

def test_two_processes_make_the_run_of_one(tmp_path):
    "The same record, the same weights to rounding; what is added later leaves them alone."
    spec, = plan(['adpt'], ('en', 'x3'), 1, TINY, tasks=('ner',))
    both, one = tmp_path/'both', tmp_path/'one'
    launch(own_rows, spec, both, processes=2)
    run(spec, one)
    assert told(record(both, spec))[0] == told(record(one, spec))[0]
    for a, b in zip(told(record(both, spec))[1], told(record(one, spec))[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    (a, about), (b, _) = (load_checkpoint(f/spec.name/'checkpoint.safetensors')
                          for f in (both, one))
    assert a.keys() == b.keys() and about['step'] == 12
    close = [torch.isclose(a[n].float(), b[n].float(), rtol=1e-3, atol=1e-4).float().mean()
             for n in a]
    assert min(close) > .95             # Adam's first steps follow signs, also of rounding
    returned = [json.loads((both/f'rank{r}').read_text()) for r in (0, 1)]
    assert returned == [json.loads(json.dumps(record(both, spec))), None]

    whole = (both/spec.name/'record.jsonl').read_bytes()            # complete: nothing is done
    launch(own_rows, spec, both, processes=2)
    assert (both/spec.name/'record.jsonl').read_bytes() == whole
    assert json.loads((both/'rank1').read_text()) is None

    (both/spec.name/'checkpoint.safetensors').unlink()              # trained again, alike: kept
    launch(own_rows, replace(spec, tasks=('ner', 'pos')), both, processes=2)
    before = [json.loads(line) for line in whole.splitlines()]
    after, kinds = record(both, spec), ('finetune',)
    held = [r for r in before if r['kind'] in kinds]
    assert [r for r in after if r['kind'] in kinds][:2] == held and len(held) == 2
    assert [r['task'] for r in after if r['kind'] in kinds] == ['ner', 'ner', 'pos', 'pos']

def everything(specs, folder):
    for _ in run_all(specs, folder, workers=1): pass

def test_a_group_pretrains_and_its_first_process_finetunes(tmp_path):
    "What `torchrun ... interference reproduce` does; a folder in use stops all processes at once."
    specs = [replace(s, tasks=('ner',)) for s in plan(['joint', 'ffn'], ('en', 'x3'), 1, TINY)]
    with run_lock(tmp_path/specs[0].name), pytest.raises(InputError, match='process . of 2 failed'):
        launch(everything, specs, tmp_path, processes=2)
    launch(everything, specs, tmp_path, processes=2)
    for spec in specs:
        kinds = [r['kind'] for r in record(tmp_path, spec)]
        assert kinds[-3:] == ['finetune', 'finetune', 'done'] and kinds.count('end') == 1

# preparing text

def folder_of(path, langs, documents, words=200):
    "A folder of text in the hub's schema."
    for lang in langs:
        for split, n in dict(train=documents, validation=20, test=20).items():
            place = path/'text'/lang/f'{split}.parquet'
            place.parent.mkdir(parents=True, exist_ok=True)
            rows = [dict(id=f'{i}', text=f'{lang} {i} ' + 'mama anauza maji leo ' * (words // 4))
                    for i in range(n)]
            pq.write_table(pa.Table.from_pylist(rows), place, row_group_size=100)
    return FolderSource(path)

class Dying(FolderSource):
    "Is killed while it gives a language's text."
    def text(self, lang, split='train'):
        for i, document in enumerate(super().text(lang, split)):
            if lang == 'sw' and split == 'train' and i == 150: os.kill(os.getpid(), signal.SIGKILL)
            yield document

def aside(f, *args):
    "Start a function in a process of its own."
    process = multiprocessing.get_context('fork').Process(target=f, args=args)
    process.start()
    return process

WORDS = WordTokenizer(['mama', 'anauza', 'maji', 'leo', 'en', 'sw', *map(str, range(300))])

def prepare(kind, path, tokenizer, folder):
    prepare_corpus(kind(path), ['en', 'sw'], tokenizer, folder, workers=1)

def test_a_kill_while_preparing_loses_the_file_in_work_only(tmp_path):
    source = folder_of(tmp_path/'text', ('en', 'sw'), 300, words=500)
    process = aside(prepare, Dying, source.path, WORDS, tmp_path/'ids')
    process.join(LIMIT)
    assert process.exitcode == -signal.SIGKILL
    times = {p: p.stat().st_mtime_ns for p in (tmp_path/'ids').rglob('*.ids')}
    assert len(times) == 3 and list((tmp_path/'ids').rglob('*.tmp'))      # English; a torn file
    left = sum(r['ids'] for r in disk_needed(source, ['en', 'sw'], tmp_path/'ids', WORDS))
    made = prepare_corpus(source, ['en', 'sw'], WORDS, tmp_path/'ids', workers=1)
    assert not list((tmp_path/'ids').rglob('*.tmp'))
    assert all(p.stat().st_mtime_ns == then for p, then in times.items())
    whole = prepare_corpus(source, ['en', 'sw'], WORDS, tmp_path/'whole', workers=1)
    for lang, splits in whole.items():
        for split, corpus in splits.items(): assert (corpus.ids == made[lang][split].ids).all()
    took = sum(2 * c.n_tokens for c in made['sw'].values())
    assert took == pytest.approx(left, rel=.05)         # and what was left to do was known

def test_two_that_prepare_the_same_do_it_once(tmp_path):
    source = folder_of(tmp_path/'text', ('en', 'sw'), 300)
    both = [aside(prepare, FolderSource, source.path, WORDS, tmp_path/'ids') for _ in range(2)]
    for process in both: process.join(LIMIT)
    assert [process.exitcode for process in both] == [0, 0]
    manifest = json.loads((tmp_path/'ids'/'manifest.json').read_text())
    assert len(manifest) == 6 == len(list((tmp_path/'ids').rglob('*.ids')))

def peaks(paths, tokenizer, pipe):
    "Prepare one text after another and tell the peak of resident memory after each, in MB."
    for path in paths:
        train_tokenizer(FolderSource(path), ['en'], 30, sample_sentences=100, workers=1)
        prepare_corpus(FolderSource(path), ['en'], tokenizer, path/'ids', workers=1)
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)

def test_memory_does_not_grow_with_the_corpus(tmp_path):
    "A process prepares a text, then one eight times as long: its peak of memory stays."
    sources = [folder_of(tmp_path/str(n), ('en',), n, words=1000) for n in (300, 2400)]
    ours, theirs = multiprocessing.Pipe()
    tokenizer = toy_tokenizer(ToySource(0), ('en',))
    fresh = multiprocessing.get_context('spawn')    # a fork would count what this process holds
    process = fresh.Process(target=peaks, args=([s.path for s in sources], tokenizer, theirs))
    process.start()
    process.join(LIMIT)
    before, after = ours.recv(), ours.recv()
    more = (sources[1].size('en') - sources[0].size('en')) / 1e6
    assert more > 5 and after - before < more / 4, (before, after, more)

def test_a_disk_too_small_is_told_before_it_starts(tmp_path, monkeypatch):
    source = folder_of(tmp_path/'text', ('en', 'sw'), 50)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(9, 9, 9))
    tokenizer = toy_tokenizer(ToySource(0), ('en',))
    with pytest.raises(InputError, match=r'text of en, sw takes about .* 9 bytes free\. Make room'):
        prepare_corpus(source, ['en', 'sw'], tokenizer, tmp_path/'ids')
    assert not (tmp_path/'ids').exists()
    spec, = plan(['joint'], ('en', 'sw'), 1, SCALES['pocket'], tmp_path/'text')
    with pytest.raises(InputError, match='the text of .* 9 bytes free'):
        load_run_data(spec, tmp_path/'runs')
    with pytest.raises(InputError, match='the checkpoint of joint-en.* 9 bytes free'):
        run(spec, tmp_path/'runs')

def test_the_hub_counts_its_copy_and_streaming_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(data, '_resolve_revision', lambda *a: ('c0ffee', True))
    monkeypatch.setattr(data, '_hub_size', lambda *a: (10**9, 3 * 10**9))
    row, = disk_needed(HubSource(), ['sw'], tmp_path)
    assert row['copy'] == 3 * 10**9 and 0 < row['ids'] < row['text'] == 10**9
    check_room([row], tmp_path)
    monkeypatch.setattr(data, '_hub_size', lambda *a: (10**15, 10**15))
    twice = disk_needed(HubSource(), ['sw'], tmp_path) * 2
    with pytest.raises(InputError, match='the text of sw takes'): check_room(twice, tmp_path)
    with pytest.raises(InputError, match='streaming=True'):
        prepare_corpus(HubSource(), ['sw'], toy_tokenizer(ToySource(0), ('en',)), tmp_path)

# the notebooks

def test_families_are_the_runs_that_the_tables_ask_for():
    every = sorted(s.name for s in family('all'))
    assert sorted(s.name for name in FAMILIES for s in family(name)) == every
    assert all(s.scale.train.accumulate == 4 and s.scale == STUDIES['paper'].scale
               for s in family('all'))

def test_small_is_the_same_run():
    for spec in family('all'):
        tiny = smoke_test_spec(spec)
        keep = ('system', 'langs', 'pair', 'seed', 'tasks', 'meta')
        assert all(getattr(tiny, k) == getattr(spec, k) for k in keep)
        assert bool(tiny.probe) == bool(spec.probe) and len(tiny.prune) == len(spec.prune)
        assert tiny.scale.train.accumulate == spec.scale.train.accumulate

def test_only_whole_models_are_ready(tmp_path, capsys):
    "A checkpoint is there long before the model; a record without one is left as it is."
    spec, other = plan(['joint'], ('en', 'x3'), 2, replace(TINY, train=replace(
        TINY.train, accumulate=1)), tasks=())
    run(spec, tmp_path)
    path = tmp_path/spec.name/'record.jsonl'
    whole = path.read_text()
    assert ready([spec, other], tmp_path) == [spec]
    assert capsys.readouterr().out == '1 of 2 models are there\n'
    path.write_text(''.join(l for l in whole.splitlines(True)
                            if json.loads(l)['kind'] not in ('end', 'done')))
    assert ready([spec, other], tmp_path) == []
    path.write_text(whole)
    (path.parent/'checkpoint.safetensors').unlink()
    assert ready([spec], tmp_path) == [] and path.read_text() == whole

def test_runs_are_named_as_they_come(tmp_path, capsys):
    specs = plan(['joint'], ('en', 'x3'), 2, replace(TINY, train=replace(
        TINY.train, accumulate=1, steps=2, warmup=1, eval_every=2)))
    pretrain_all(specs[:1], tmp_path, progress=False)
    pretrain_all(specs, tmp_path)
    said = capsys.readouterr().out
    assert '1 of 2: joint-en+x3-0, pretrained already\n2 of 2: joint-en+x3-1\n' in said

@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_shows_what_its_records_hold(name, tmp_path):
    "At full scale too, once there are records: here those of the toy scale stand in."
    page = family_page(name, ROOT/'records')
    there = records_of(name, ROOT/'records')
    assert ('**Not run at this scale.**' in page) == ('paper' not in there)
    if name == 'hub': return
    (tmp_path/'reproduce-paper').mkdir()
    for run_name in there['toy'][1]:
        own = re.sub(r'(fr|ru)600', r'\g<1>100000', run_name)
        rows = read_rows(ROOT/'records'/'reproduce-toy', run_name)
        log = JsonlLog(tmp_path/'reproduce-paper'/own/'record.jsonl')
        for row in [*rows[:-1], dict(kind='done', name=own)]: log.write(**row)
    page = family_page(name, tmp_path)
    n, made = len(family(name)), len(there['toy'][1])
    assert f'{made} of {n} runs are complete at the scale of the paper.' in page
    assert '**Not run' not in page and 'ppl' in page

def test_a_page_says_the_size_of_the_runs_that_its_records_hold():
    "Not of the scale's preset: a study may have been given fewer steps."
    folder, names = records_of('bilingual', ROOT/'records')['mini']
    steps, = {json.loads((folder/n/'record.jsonl').open().readline())['config']['run']['scale']
              ['train']['steps'] for n in names}
    page = family_page('bilingual', ROOT/'records')
    n = f'{len(names)} run{"s" * (len(names) > 1)}'
    assert f'Scale mini: {steps:,} steps' in page and f'{n}, 1 seed;' in page

def cells_of(path, kind):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == kind]

@pytest.mark.parametrize('path', FULL_SCALE, ids=lambda p: p.stem)
def test_full_scale_notebooks_show_what_they_promise(path):
    "A reader sees the full config, what it costs, a small run of it, a cell for the GPUs, results."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    shown = [''.join(o.get('text') or o['data'].get('text/markdown') or o['data']['text/plain'])
             for c in cells for o in c.get('outputs', [])]
    has = lambda what: any(re.search(what, s, re.S) for s in shown)
    assert has(r'TrainConfig\(steps=500000|PruneConfig\(|FinetuneConfig\(') and has(r'\bGB\b')
    assert has(r"^[{[(].*(\d\.\d|'train': \d)")           # numbers of the small run
    assert has(r'\*\*Not run at this scale\.\*\*|runs are complete at the scale of the paper')
    assert sum(c.startswith('#| gpu') for c in cells_of(path, 'code')) == 1

@pytest.mark.parametrize('path', FULL_SCALE[1:], ids=lambda p: p.stem)
def test_a_notebooks_command_makes_its_runs(path, tmp_path, monkeypatch):
    "The command is taken from the notebook, and so is the line that lists its runs."
    command, = re.findall(r'--no-python \\\s+interference (reproduce .*)',
                          '\n'.join(cells_of(path, 'markdown')))
    line, = re.findall('^specs = .*', '\n'.join(cells_of(path, 'code')), re.M)
    here, asked = dict(family=family, replace=replace), []
    exec(line, here)
    monkeypatch.setattr(cli, '_plan_of', lambda *_: '')
    monkeypatch.setattr(cli, 'check_specs', lambda *_: None)        # it would ask the hub
    monkeypatch.setattr(reproduce, 'write', lambda *_: [])
    monkeypatch.setattr(cli, 'write_index', lambda *_: '')
    monkeypatch.setattr(reproduce, 'run_missing', lambda specs, *_: asked.extend(specs) or {})
    cli.main([*command.split(), '--out', str(tmp_path)])
    name = lambda specs: sorted((s.name, json.dumps(s.config)) for s in specs)
    assert name(asked) == name(here['specs'])

def test_commands_for_several_processes_start_again_when_one_dies():
    found = 0
    for path in [ROOT/'README.md', *ROOT.glob('nbs/**/*.ipynb')]:
        text = path.read_text(encoding='utf-8')
        for line in (l for l in text.splitlines() if 'torchrun --' in l):
            assert '--max-restarts 3' in line, f'{path.name}: {line}'
            found += 1
    assert found > 8


def test_a_lock_clears_away_what_a_killed_write_left_and_nothing_else(tmp_path):
    "Not a user's own file of such a name, nor what another process is writing at this moment."
    for name in ('notes/thesis.chapter1.tmp', 'run/record.jsonl.0a1b2c3d.tmp'):
        (tmp_path/name).parent.mkdir()
        (tmp_path/name).write_text('mine')
    def slowly():
        yield b'one '
        with run_lock(tmp_path): pass
        yield b'two'
    write_atomically(tmp_path/'run/file', slowly())
    assert (tmp_path/'run/file').read_text() == 'one two'
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.tmp')]
    assert left == ['notes/thesis.chapter1.tmp']
