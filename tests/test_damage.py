"""Damaged records and checkpoints, signals, code that is not in a repository of its own."""

import json, os, shutil, signal, subprocess, sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from importlib.util import find_spec
from types import SimpleNamespace
import pytest
import torch
from interference_nb import experiments, pretrain
from interference_nb.adapters import MultilingualLM, load_model
from interference_nb.data import Stream, dev_batches, prepare_corpus, same_revision
from interference_nb.distributed import StopSignals
from interference_nb.experiments import Scale, cached_tokenizer, plan, run, run_all, vocabulary
from interference_nb.files import (
    InputError,
    load_checkpoint,
    read_jsonl,
    save_checkpoint,
    weights_hash,
)
from interference_nb.finetune import FinetuneConfig
from interference_nb.folders import FolderSource
from interference_nb.pretrain import (
    BatchSampler,
    TensorBoard,
    TrainConfig,
    code_version,
    same_config,
    train,
)
from interference_nb.records import load
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import MaskedLM, ModelConfig
from waiting import LIMIT, wait_for

LANGS = ('en', 'x3')
TINY = Scale(
    ModelConfig.toy(0, dim=8, n_layers=1, ffn_dim=16),
    TrainConfig.toy(steps=6, warmup=2),
    {'ner': FinetuneConfig.toy(epochs=1, max_train=16, max_dev=16, max_eval=16)},
)
CFG = TrainConfig.toy(steps=6, warmup=2, batch_size=4, eval_every=6, checkpoint_every=3)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    source = ToySource(seed=0, n_train=200, n_dev=40)
    tok = toy_tokenizer(source, LANGS)
    return tok.vocab_size, prepare_corpus(
        source, LANGS, tok, tmp_path_factory.mktemp('text'), workers=1
    )


def trained(toy, folder, cfg=CFG, **kw):
    "Train a tiny model; return the rows of its record."
    V, corpora = toy
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig.toy(V, dim=8, n_layers=1, ffn_dim=16), LANGS)
    streams = {
        l: Stream(corpora[l]['train'], cfg.batch_size, cfg.seq_len, 0, V, cfg.mask_prob)
        for l in LANGS
    }
    dev = {l: dev_batches(corpora[l]['validation'], 8, 32, V, n_batches=1) for l in LANGS}
    return train(model, BatchSampler(streams, cfg), cfg, dev, folder=folder, progress=False, **kw)


@pytest.fixture(scope='module')
def half(toy, tmp_path_factory):
    "A run that was stopped at step 3 of 6."
    home = tmp_path_factory.mktemp('half')
    trained(toy, home, stop_at=3)
    return home


CHECKPOINTS = {  # what is done to tensors and header; what the message names
    'missing tensor': (lambda t, m: t.pop('model.bias'), 'tensors cannot be'),
    'missing tensor, older header': (
        lambda t, m: (t.pop('model.bias'), m.pop('tensors')),
        'model.bias is missing',
    ),
    'extra tensor': (
        lambda t, m: (t.update(x=torch.ones(1)), m.pop('tensors')),
        'x is [1], should be absent',
    ),
    'misshaped': (
        lambda t, m: t.update({'model.bias': torch.ones(3)}),
        'model.bias is [3], should be',
    ),
    'one moment gone': (
        lambda t, m: (t.pop('optim.all.0.exp_avg'), m.pop('tensors')),
        'lacks a moment',
    ),
    'misshaped moment': (
        lambda t, m: t.update({'optim.all.0.exp_avg': torch.ones(3)}),
        'exp_avg is [3]',
    ),
    'moments of one parameter gone': (
        lambda t, m: [t.pop(n) for n in [*t] if n.startswith('optim.all.0.')],
        'tensors cannot be',
    ),
    'no such parameter': (
        lambda t, m: (t.update({'optim.all.999.step': torch.ones(())}), m.pop('tensors')),
        'belongs to no parameter',
    ),
    'no such optimiser': (
        lambda t, m: (t.update({'optim.x.0.step': torch.ones(())}), m.pop('tensors')),
        'belongs to no parameter',
    ),
    'step beyond the end': (lambda t, m: m.update(step=10**6), 'its step cannot be 1000000'),
    'step below zero': (lambda t, m: m.update(step=-1), 'its step cannot be -1'),
    'step of a moment': (
        lambda t, m: t.update({'optim.all.0.step': torch.tensor(1e6)}),
        'its step cannot be 3',
    ),
    'step as text': (lambda t, m: m.update(step='3'), "its step cannot be '3'"),
    'no step': (lambda t, m: m.pop('step'), 'its step cannot be None'),
    'no config': (lambda t, m: m.pop('config'), 'its config cannot be None'),
    'config as a list': (lambda t, m: m.update(config=[1]), 'its config cannot be [1]'),
    'scaler as a number': (lambda t, m: m.update(scaler=3), 'its scaler cannot be 3'),
    'seconds as text': (lambda t, m: m.update(wall_s='x'), "its wall_s cannot be 'x'"),
    'settled as a number': (lambda t, m: m.update(settled=1), 'its settled cannot be 1'),
}


@pytest.mark.parametrize('case', CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused_and_stays(case, toy, half, tmp_path):
    harm, said = CHECKPOINTS[case]
    shutil.copytree(half, tmp_path / 'run')
    path = tmp_path / 'run' / 'checkpoint.safetensors'
    tensors, meta = load_checkpoint(path)
    harm(tensors, meta)
    save_checkpoint(path, tensors, meta)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(InputError) as e:
        trained(toy, tmp_path / 'run')
    assert said in str(e.value) and str(path) in str(e.value) and 'delete it' in str(e.value)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_whole_checkpoint_of_an_older_version_goes_on(toy, half, tmp_path):
    shutil.copytree(half, tmp_path / 'run')
    path = tmp_path / 'run' / 'checkpoint.safetensors'
    tensors, meta = load_checkpoint(path)
    save_checkpoint(
        path, tensors, {k: v for k, v in meta.items() if k not in ('tensors', 'settled')}
    )
    assert trained(toy, tmp_path / 'run')[-1]['step'] == 6


def test_a_lost_terminal_loses_no_step(toy, tmp_path):
    "SIGHUP is answered as SIGTERM is; a command under nohup does not hear it."

    def hang_up(k, *_):
        signal.raise_signal(signal.SIGHUP) if k == 1 else None

    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(SystemExit) as e:
        trained(toy, tmp_path, callbacks=[hang_up])
    assert e.value.code == 128 + signal.SIGHUP and signal.getsignal(signal.SIGHUP) is before
    assert load_checkpoint(tmp_path / 'checkpoint.safetensors')[1]['step'] == 2
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(True) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.number
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_are_told(toy, half, tmp_path, monkeypatch, capsys):
    shutil.copytree(half, tmp_path / 'run')
    now = torch.get_num_threads()
    monkeypatch.setattr(torch, 'get_num_threads', lambda: now + 1)
    rows = trained(toy, tmp_path / 'run')
    assert f'{now} threads until now, {now + 1} from here on' in capsys.readouterr().err
    assert [r['threads'] for r in rows if 'threads' in r] == [now, now + 1]


def specs(seeds):
    return plan(['joint'], LANGS, seeds, TINY, tasks=('ner',))


RECORDS = {
    'garbage': b'garbage\n',
    'a number': b'5\n',
    'no kind': b'{"a": 1}\n',
    'no text': b'\xff\xfe\n',
}


@pytest.mark.parametrize('where', [0, 2, -1])
@pytest.mark.parametrize('case', RECORDS)
def test_one_damaged_record_stops_that_run_only(case, where, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    a, b = specs(2)
    path = tmp_path / a.name / 'record.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    at = where if where >= 0 else len(lines)
    lines.insert(at, RECORDS[case])
    path.write_bytes(b''.join(lines))
    ended = dict(((s.name, rows) for s, rows in run_all([a, b], tmp_path, workers=1)))
    assert isinstance(ended[a.name], InputError) and ended[b.name][-1]['kind'] == 'done'
    assert f'{path}, line {at + 1} is no row of a record' in str(ended[a.name])
    assert path.read_bytes() == b''.join(lines)  # nothing was rewritten
    capsys.readouterr()
    table = load(tmp_path)
    assert set(table['run']) == {b.name}
    assert f'left out: {path}, line {at + 1}' in capsys.readouterr().err


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Two finished runs."
    home = tmp_path_factory.mktemp('finished')
    for spec in specs(2):
        run(spec, home)
    return home


@pytest.mark.parametrize(
    'first',
    [
        {'kind': 'start'},
        {'kind': 'start', 'config': 3},
        {'kind': 'eval', 'step': 1},
        {'kind': 'start', 'config': {'run': [1]}},
    ],
    ids=str,
)
def test_a_record_without_its_config_is_named(first, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    a, b = specs(2)
    path = tmp_path / a.name / 'record.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join([json.dumps(first) + '\n', *lines[1:]]))
    ended = dict(((s.name, rows) for s, rows in run_all([a, b], tmp_path, workers=1)))
    assert str(path) in str(ended[a.name]) and 'first row' in str(ended[a.name])
    assert set(load(tmp_path)['run']) == {b.name} and 'left out' in capsys.readouterr().err


def copied_package(home):
    "Put a package into a folder, as pip would."
    shutil.copytree(
        Path(pretrain.__file__).parent, home / 'interference_nb', ignore=lambda *_: ['__pycache__']
    )
    return home / 'interference_nb'


def repository(home):
    "Make a user's own repository, with one commit."
    home.mkdir()
    git = lambda *args: subprocess.run(
        ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c', '-C', home, *args],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    git('init', '-q')
    (home / 'mine.txt').write_text('mine')
    (home / '.gitignore').write_text('venv\n')
    git('add', '.')
    git('commit', '-qm', 'mine')
    return git


def test_a_users_own_commit_is_not_ours(tmp_path, monkeypatch):
    "Only a repository that holds the package at its top names it; GIT_DIR does not lead elsewhere."
    from interference_nb import __version__

    git = repository(tmp_path / 'theirs')
    for place in ('venv', '.'):  # ignored, and at the top but not theirs either
        package = copied_package(tmp_path / 'theirs' / place)
        assert code_version(package) == f'v{__version__}'
    git('add', '-f', 'interference_nb')
    git('commit', '-qm', 'ours')
    head = git('rev-parse', '--short=12', 'HEAD')
    assert code_version(package) == head
    (package / 'cli.py').write_text('')
    assert code_version(package) == f'{head} with changes'
    alone = copied_package(tmp_path / 'alone')
    monkeypatch.setenv('GIT_DIR', str(tmp_path / 'theirs' / '.git'))
    assert (
        code_version(alone) == f'v{__version__}' and code_version(package) == f'{head} with changes'
    )
    monkeypatch.setenv('PATH', str(tmp_path))  # no git at all
    assert code_version(package) == f'v{__version__}'


def test_versions_are_recorded(half):
    import datasets, numpy, sentencepiece

    start = read_jsonl(half / 'record.jsonl')[0]
    assert start['torch'] == torch.__version__ and start['commit'] and start['threads']
    assert start['versions'] == {
        m.__name__: m.__version__ for m in (numpy, sentencepiece, datasets)
    }


def test_ctrl_c_ends_a_demo_in_one_line(tmp_path):
    "Workers are ended by their command, and say nothing of their own."
    args = [
        'demo',
        '--systems',
        'joint',
        '--seeds',
        '4',
        '--steps',
        '20000',
        '--workers',
        '2',
        '--out',
        tmp_path,
    ]
    command = subprocess.Popen(
        [sys.executable, '-m', 'interference_nb', *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: any(tmp_path.glob('*/record.jsonl')), command, command.stderr.read)
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, said = command.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
    assert (command.returncode, said) == (
        130,
        'interference: stopped. The same command resumes from the last checkpoint.\n',
    )


def test_a_demo_that_is_told_to_end_saves_its_runs(tmp_path):
    "SIGTERM to the command alone, long before the first checkpoint is due."
    args = 'demo --systems joint --seeds 2 --steps 20000 --workers 2 --quiet --out'.split()
    command = subprocess.Popen([sys.executable, '-m', 'interference_nb', *args, tmp_path],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    begun = lambda: [p for p in tmp_path.glob('*/record.jsonl')
                     if '"kind": "step"' in p.read_text()]
    try:
        wait_for(lambda: len(begun()) == 2, command, command.stderr.read)
        command.terminate()
        command.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError): os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == 143
    assert len(list(tmp_path.glob('*/checkpoint.safetensors'))) == 2


def test_a_model_trained_without_a_word_about_it_is_loaded(toy, tmp_path):
    V, corpora = toy
    model = MultilingualLM(ModelConfig.toy(V, dim=8, n_layers=1, ffn_dim=16), LANGS, 'adpt')
    streams = {
        l: Stream(corpora[l]['train'], CFG.batch_size, CFG.seq_len, 0, V, CFG.mask_prob)
        for l in LANGS
    }
    dev = {l: dev_batches(corpora[l]['validation'], 8, 32, V, n_batches=1) for l in LANGS}
    train(model, BatchSampler(streams, CFG), CFG, dev, folder=tmp_path, progress=False)
    back = load_model(tmp_path / 'checkpoint.safetensors')
    assert back.variant == 'adpt' and weights_hash(back) == weights_hash(model)


def test_numbers_go_to_tensorboard(toy, tmp_path):
    found = []
    writer = SimpleNamespace(add_scalar=lambda *row: found.append(row))
    rows = trained(toy, tmp_path, callbacks=[TensorBoard(tmp_path, writer)])
    assert [(name, k) for name, _, k in found] == [('loss', k) for k in range(1, 7)]
    mean = sum(v for _, v, _ in found[3:]) / 3  # those after the row of step 3
    assert next(r for r in reversed(rows) if r['kind'] == 'eval')['loss'] == pytest.approx(mean)
    if not find_spec('tensorboard'):
        with pytest.raises(InputError, match='tensorboard'):
            TensorBoard(tmp_path)


def test_a_damaged_vocabulary_says_what_to_delete(tmp_path):
    "The remedy is the run's, not that of a script that saves tokenizers."
    folder = folder_of_text(tmp_path / 'mine')
    scale = replace(TINY, model=replace(TINY.model, vocab_size=60))
    langs = ('en', 'de')
    spec = replace(specs(1)[0], langs=langs, pair=langs, data=str(folder), scale=scale)
    _, _, made = vocabulary(spec, tmp_path)
    (path,) = (tmp_path / 'data').rglob('tokenizer-*')
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf'{path.name} is damaged. Delete it and run the same'):
        vocabulary(spec, tmp_path)
    path.unlink()
    assert vocabulary(spec, tmp_path)[2].fingerprint == made.fingerprint


def folder_of_text(home):
    for lang in ('en', 'de'):
        (home / 'text' / lang).mkdir(parents=True)
        lines = [f'the {lang} dog{i} sees {i} cats by the house.' for i in range(300)]
        (home / 'text' / lang / 'train.txt').write_text('\n'.join(lines) + '\n')
    return home


def test_labelled_rows_do_not_stop_a_pretraining(tmp_path, monkeypatch):
    "It reads text only; a run was to be deleted because rows had been added beside its text."
    folder, langs = folder_of_text(tmp_path / 'mine'), ('en', 'de')
    scale = replace(TINY, model=replace(TINY.model, vocab_size=60),
                    train=replace(TINY.train, checkpoint_every=2))
    spec = replace(specs(1)[0], langs=langs, pair=langs, data=str(folder), scale=scale, tasks=())

    def killed(*args, **kw):
        train(*args, stop_at=4, **kw)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiments, 'train', killed)
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path)
    (folder / 'ner' / 'en').mkdir(parents=True)
    (folder / 'ner' / 'en' / 'train.conll').write_text('Ada B-PER\n\n' * 9)
    at = tmp_path / spec.name / 'checkpoint.safetensors'
    tensors, meta = load_checkpoint(at)         # as older versions wrote it
    meta['config']['revision']['ner/de'] = 'gone since'
    save_checkpoint(at, tensors, meta)
    rows = run(spec, tmp_path)
    assert rows[-1]['kind'] == 'done' and any(r.get('step') == 4 for r in rows)
    assert sum(r['kind'] == 'resume' for r in rows) == 1
    assert len([*(tmp_path / 'data').rglob('tokenizer-*')]) == 1


def test_a_commit_that_cannot_be_looked_up_is_taken_on_trust(tmp_path):
    "And nothing else of a revision: not another share of the text, nor more of it."
    folder = FolderSource(folder_of_text(tmp_path / 'mine'))
    known = {'text': 'wiki@c0ffee 2023 held-out 0.01', 'ner': 'wikiann@beef'}
    folder.revision = lambda: known
    make = lambda: cached_tokenizer(folder, ('en', 'de'), 60, 5.0, {}, tmp_path / 'x')
    first = make().fingerprint
    folder.revision = lambda: {'text': 'wiki@unknown 2023 held-out 0.01', 'ner': 'wikiann@unknown'}
    assert make().fingerprint == first and len([*tmp_path.glob('tokenizer-*')]) == 1
    folder.revision = lambda: known | {'ner': 'wikiann@new'}
    assert make().fingerprint == first and len([*tmp_path.glob('tokenizer-*')]) == 1
    for other in ('wiki@unknown 2023 held-out 0.2', 'wiki@fe 2023 held-out 0.01'):
        assert not same_revision({'text': known['text']}, {'text': other})
        folder.revision = lambda other=other: {'text': other}
        make()
    assert len([*tmp_path.glob('tokenizer-*')]) == 3
    then = dict(revision={'text': known['text']}, train=dict(lr=1.0))
    same_config(dict(revision={'text': 'wiki@unknown 2023 held-out 0.01'}, train=dict(lr=1.0)),
                then, 'x')
    with pytest.raises(InputError, match="held-out 0.2' here"):
        same_config(dict(revision={'text': 'wiki@unknown 2023 held-out 0.2'}), then, 'x')


def test_text_that_cannot_be_read_is_not_a_full_disk(tmp_path):
    source = FolderSource(folder_of_text(tmp_path / 'mine'))

    def text(lang, split='train'):
        yield 'one line .'
        raise ConnectionError('Server disconnected')

    source.text = text
    tok = toy_tokenizer(ToySource(seed=0), ('en',))
    with pytest.raises(InputError, match=r"could not read the text of 'en' \(Server disconnected"):
        prepare_corpus(source, ['en'], tok, tmp_path / 'ids', workers=1)


def test_a_mask_of_minus_infinity_is_no_broken_weight(toy, tmp_path):
    V, corpora = toy
    model = MaskedLM(ModelConfig.toy(V, dim=8, n_layers=1, ffn_dim=16), LANGS)
    model.register_buffer('causal', torch.full((4, 4), -torch.inf).triu(1))
    streams = {l: Stream(corpora[l]['train'], 4, CFG.seq_len, 0, V) for l in LANGS}
    train(model, BatchSampler(streams, CFG), CFG, {}, folder=tmp_path, progress=False)
    assert load_checkpoint(tmp_path / 'checkpoint.safetensors')[1]['step'] == CFG.steps
    model.causal[0, 0] = torch.nan
    with pytest.raises(InputError, match='a weight is not finite'):
        train(model, BatchSampler(streams, CFG), CFG, {}, progress=False)


def test_a_wrapped_models_checkpoint_is_not_opened_as_ours(tmp_path):
    save_checkpoint(tmp_path / 'x', {}, dict(config=dict(model=dict(kind='Bert'), langs=['en'])))
    with pytest.raises(InputError, match='of another kind, or of a newer version.*AnyModel'):
        load_model(tmp_path / 'x')
