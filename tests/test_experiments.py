"Runs where a notebook does not go: killed workers, locked folders, data without test sets."
import errno, multiprocessing, os, signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
import pytest
import torch
from interference_nb import experiments
from interference_nb.files import InputError, load_checkpoint, read_jsonl, run_lock
from interference_nb.experiments import (SCALES, RunSpec, Scale, cost, default_workers,
                                         finetuning_jobs, load_run_data, make_batches, on_cpu, plan,
                                         run, run_all)
from interference_nb.records import load
from interference_nb.finetune import FinetuneConfig
from interference_nb.gradient_probes import ProbeConfig, eulerian_pair_order
from interference_nb.pretrain import TrainConfig
from interference_nb.transformer import ModelConfig

TINY = Scale(ModelConfig.toy(0, dim=8, n_layers=1, ffn_dim=16), TrainConfig.toy(steps=20, warmup=2),
             {'ner': FinetuneConfig.toy(epochs=1, max_train=32, max_dev=16, max_eval=16)})

def specs(seeds): return plan(['joint'], ('en', 'x3'), seeds, TINY, tasks=('ner',))

def test_a_killed_worker_stops_no_other_run(tmp_path):
    "Nor its own: it is tried once more, alone."
    ending = run_all(specs(5), tmp_path, workers=2)
    first = next(ending)
    multiprocessing.active_children()[0].kill()
    ended = dict((s.name, rows) for s, rows in [first, *ending])
    assert len(ended) == 5 and all(rows[-1]['kind'] == 'done' for rows in ended.values())

def die_when_seed_is_one(spec, *_):
    "In place of `run`: it dies at each try."
    if spec.seed == 1: os.kill(os.getpid(), signal.SIGKILL)
    return [dict(kind='done')]

def test_a_run_that_is_killed_again_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, 'run', die_when_seed_is_one)
    ended = dict((s.seed, rows) for s, rows in run_all(specs(2), tmp_path, workers=1))
    assert isinstance(ended[1], BrokenProcessPool) and ended[0] == [dict(kind='done')]

def test_a_folder_is_worked_on_by_one(tmp_path):
    spec, = specs(1)
    with run_lock(tmp_path/spec.name):
        with pytest.raises(InputError, match='another process works on'): run(spec, tmp_path)
    run(spec, tmp_path)

def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')
    def flock(*_): raise OSError(errno.ENOSYS, 'Function not implemented')
    monkeypatch.setattr(fcntl, 'flock', flock)
    with run_lock(tmp_path/'run'): assert (tmp_path/'run').is_dir()

def where(): return os.getpid(), os.environ.get('CUDA_VISIBLE_DEVICES')

def keep_where(folder):
    (folder/f'{os.getpid()}').write_text('{} {!r}'.format(*where()))

def test_small_runs_leave_the_gpus_alone(tmp_path, monkeypatch):
    "They run without, and not in a process that may want to share them later."
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: False)
    assert on_cpu(where)[0] == os.getpid()
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
    pid, seen = on_cpu(where)
    assert pid != os.getpid() and seen == '' and where()[1] != ''
    assert on_cpu(keep_where, tmp_path, processes=2) is None    # as `launch`
    pids, seen = zip(*map(str.split, [p.read_text() for p in tmp_path.iterdir()]))
    assert len({*pids, str(os.getpid())}) == 3 and set(seen) == {"''"}

def test_no_checkpoint_repeats_the_pretraining_only(tmp_path):
    "What a committed record holds stays, where the weights come out the same."
    spec, = specs(1)
    home, before = tmp_path/spec.name, run(spec, tmp_path)
    (home/'checkpoint.safetensors').unlink()
    more = replace(spec, tasks=('ner', 'pos'), scale=replace(TINY, finetune=TINY.finetune | {
        'pos': TINY.finetune['ner']}))
    after = run(more, tmp_path)
    finetuned = [[r for r in rows if r['kind'] == 'finetune'] for rows in (before, after)]
    assert finetuned[1][:2] == finetuned[0] and len(finetuned[1]) == 4
    assert after == read_jsonl(home/'record.jsonl') and not (home/'record-before.jsonl').exists()

def test_half_done_additions_hide_nothing(tmp_path):
    spec, = specs(1)
    run(spec, tmp_path)
    whole, path = load(tmp_path, whole=False), tmp_path/spec.name/'record.jsonl'
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:-1]))
    assert load(tmp_path, whole=False).equals(whole) and not len(load(tmp_path))

class Rows:
    name = 'some data'
    def __init__(self, *splits): self.splits = splits
    def examples(self, task, lang, split):
        if split not in self.splits: raise InputError('no such rows')
        return [dict(context=f'{k}') for k in range(99)]
    def count(self, task, lang, split): return 99 * (split in self.splits)

def test_validation_stands_in_for_a_missing_test_set():
    "TyDiQA has none; NER needs one."
    spec, = plan(['joint'], ('en', 'x3'), 1, SCALES['toy'], tasks=('qa',))
    rows = Rows('train', 'validation')
    assert finetuning_jobs(spec, rows) == {('qa', l): ['en', 'x3'] for l in spec.langs}
    with pytest.raises(InputError, match='no ner rows to test on'):
        finetuning_jobs(replace(spec, tasks=('ner',)), rows)

def test_an_empty_development_set_is_named_before_any_work():
    spec, = plan(['joint'], ('en', 'x3'), 1, SCALES['toy'], tasks=('pos',))
    with pytest.raises(InputError, match="train on in 'en', but its development set is empty"):
        finetuning_jobs(spec, Rows('train', 'test'))

def test_text_without_a_test_split_is_named():
    spec, = specs(1)
    with pytest.raises(InputError, match="'x3' has no test text to measure perplexity on"):
        make_batches(spec, None, dict(en=dict(train=[], test=[]), x3=dict(train=[])))

@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='no choice of cores here')
def test_a_run_for_each_gpu_or_for_each_core_it_may_use(monkeypatch):
    "Kept to one core, as by a cluster's scheduler, a command runs one at a time."
    cores = os.sched_getaffinity(0)
    assert default_workers() == len(cores)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert default_workers() == 1
    finally: os.sched_setaffinity(0, cores)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert default_workers() == 4

def test_cost_counts_the_passes_of_the_meta_step():
    one, rests = (cost(RunSpec(s, ('en', 'fr'), ('en', 'fr'), 0, TINY, tasks=()))
                  for s in ('meta_adpt', 'meta_rest3'))
    assert (one, rests) == (6 * 20, 2.25 * 20)

@pytest.mark.parametrize('langs', [('en', 'fr'), ('en', 'fr', 'ar'), tuple('abcde')])
def test_cost_counts_the_gradients_of_a_probe(langs):
    "Each pair of languages, and each with itself, lies side by side in what a probe walks through."
    spec = RunSpec('joint', langs, langs, 0, TINY, tasks=(), probe=ProbeConfig(5, 3))
    walked = len(eulerian_pair_order(langs)) * 3 * (TINY.train.steps // 5)
    assert cost(spec) == cost(replace(spec, probe=None)) + walked
    assert walked >= 3 * (TINY.train.steps // 5) * len(langs) * (len(langs) + 1) / 2

def test_two_seeds_are_two_draws(text_folder, tmp_path):
    "On text, which has no seed: other weights, another order, another finetuning."
    tiny = replace(TINY, model=replace(TINY.model, vocab_size=300), train=replace(
        TINY.train, steps=2, warmup=1, rows='segments'))
    weights, losses = {}, {}
    for spec in plan(['scratch', 'joint'], ('en', 'sw'), 2, tiny, str(text_folder.path), ('ner',)):
        assert spec.train.seed == spec.seed
        rows = run(spec, tmp_path)
        found = load_checkpoint(tmp_path/spec.name/'checkpoint.safetensors')[0]
        weights[spec.system, spec.seed] = found['model.blocks.0.ffn.out.weight']
        for r in rows:
            if r['kind'] != 'finetune': continue
            assert r['finetune']['seed'] == r['protocol']['finetune']['seed'] == spec.seed
            losses[spec.system, spec.seed, r['train_lang']] = r['dev'][0]['loss']
    for system in ('scratch', 'joint'):
        assert not torch.allclose(weights[system, 0], weights[system, 1])
    spec = plan(['joint'], ('en', 'sw'), 2, tiny, str(text_folder.path), ())
    first = [make_batches(s, *load_run_data(s, tmp_path)[1:])[0] for s in spec]
    assert not torch.equal(*(f.streams['en'].batch(0).tokens for f in first))
    assert len(losses) == len(set(losses.values())) == 8
