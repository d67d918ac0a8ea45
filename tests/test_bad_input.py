"""Whatever cannot be used ends in one line and status 2: no traceback, and no half file.

A case is (name, words of the command, words that the message must hold, in any order, files to
write first). `{tmp}` stands for the folder that the list's `build` filled, or else that of the
files; `{out}` for a new one, `{run}` for a finished run of toy languages."""
import importlib
from pathlib import Path

import pytest

from interference_nb.cli import main
from interference_nb.experiments import Scale, plan, run
from interference_nb.pretrain import TrainConfig
from interference_nb.transformer import ModelConfig

LISTS = {m: importlib.import_module(m) for m in ('bad_data', 'bad_options')}
CASES = [pytest.param(m, words, said, *(files or [{}]), id=f'{m[4:]}: {name}')
         for m, found in LISTS.items() for name, words, said, *files in found.CASES]


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    "What a list's `build` made: {list: folder}."
    made = {m: tmp_path_factory.mktemp(m) for m, found in LISTS.items() if hasattr(found, 'build')}
    for m, folder in made.items(): LISTS[m].build(folder)
    return made


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    "A finished run of toy languages."
    home = tmp_path_factory.mktemp('finished')
    scale = Scale(ModelConfig.toy(0, dim=8, n_layers=1, ffn_dim=16),
                  TrainConfig.toy(steps=2, warmup=1))
    spec, = plan(['adpt'], ('en', 'x3'), 1, scale, tasks=())
    run(spec, home)
    return home/spec.name


def tree(*folders):
    "Return every file under some folders with its content."
    return {p: p.read_bytes() for f in folders for p in Path(f).rglob('*') if p.is_file()}


def test_there_are_enough_cases():
    assert len({c.id for c in CASES}) == len(CASES) >= 150
    for m, found in LISTS.items(): assert len(found.CASES) >= 80, m


@pytest.mark.parametrize('where, words, said, files', CASES)
def test_bad_input_is_told_in_a_line(where, words, said, files, folders, finished, tmp_path,
                                     monkeypatch, capsys):
    for name, content in files.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(content.encode())
    monkeypatch.chdir(tmp_path)
    out, home = tmp_path/'out', folders.get(where, tmp_path)
    before = tree(tmp_path, home, finished)
    for word, place in (('{tmp}', home), ('{out}', out), ('{run}', finished)):
        words = [w.replace(word, str(place)) for w in words]
    with pytest.raises(SystemExit) as stop: main(words)
    told = capsys.readouterr()
    assert stop.value.code == 2, told
    assert 'Traceback' not in told.err and told.err.splitlines()[-1].startswith('interference: ')
    missing = [w for w in (said.split() if isinstance(said, str) else said)
               if w not in told.out + told.err]
    assert not missing, told.out + told.err
    after = tree(tmp_path, home, finished)
    assert {p: after.get(p) for p in before} == before      # nothing is changed
    begun = (out/'data').exists()                           # the text had to be read to know
    assert begun or 'record and checkpoint in' not in told.out
    made = [p for p in after.keys() - before.keys() if not (begun and p.name == 'lock')]
    assert not [p for p in made if p.suffix == '.tmp' or not p.is_relative_to(out/'data')]
