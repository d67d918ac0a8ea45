"""Whatever cannot be used ends in one line and status 2: no traceback, and no half file.

A case is (name, words of the command, words that the message must hold, in any order); `{tmp}`
stands for the folder that the list's `build` filled, `{out}` for a new one. The lists are beside
this file."""
import importlib

import pytest

from interference_nb.cli import main

LISTS = [m for name in ('bad_data', 'bad_options') if importlib.util.find_spec(name)
         for m in [importlib.import_module(name)]]
CASES = [pytest.param(m.__name__, words, said, id=name) for m in LISTS for name, words,
         said in m.CASES]


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    made = {m.__name__: tmp_path_factory.mktemp(m.__name__) for m in LISTS}
    for m in LISTS:
        if hasattr(m, 'build'): m.build(made[m.__name__])
    return made


def test_there_are_enough_cases():
    assert len({c.id for c in CASES}) == len(CASES) >= 80 * len(LISTS)


@pytest.mark.parametrize('where, words, said', CASES)
def test_bad_input_is_told_in_a_line(where, words, said, folders, tmp_path, capsys):
    before = {*folders[where].rglob('*')}
    out = tmp_path/'out'
    words = [w.replace('{tmp}', str(folders[where])).replace('{out}', str(out)) for w in words]
    with pytest.raises(SystemExit) as stop: main(words)
    told = capsys.readouterr()
    assert stop.value.code == 2, told
    assert 'Traceback' not in told.err and told.err.splitlines()[-1].startswith('interference: ')
    missing = [w for w in said.split()
               if w not in told.out + told.err] if isinstance(said, str) else [
        w for w in said if w not in told.out + told.err]
    assert not missing, told.out + told.err
    made = [p for p in out.rglob('*') if p.is_file() and p.name != 'lock']
    assert not [p for p in made if p.suffix == '.tmp' or not p.is_relative_to(out/'data')]
    assert {*folders[where].rglob('*')} == before
