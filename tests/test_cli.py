"""The command line: words that lead to commands, mistyped ones, options old and new."""
import os, re, subprocess, sys
from dataclasses import replace
import pytest
from interference_nb import __version__, cli
from interference_nb.cli import Command, Group, command_tree, main, option_names, upgrade_options
from interference_nb.experiments import SYSTEMS
from interference_nb.files import read_jsonl
from interference_nb.meta_adapters import MetaConfig


def command(capsys, *args):
    "Run a command; return status, output, errors."
    status = 0
    try: main([str(a) for a in args])
    except SystemExit as e: status = e.code or 0
    return status, *capsys.readouterr()


def leaves(group, words=()):
    "List the commands of a group with their words."
    for word, found in group.words.items():
        if isinstance(found, Group): yield from leaves(found, (*words, word))
        else: yield (*words, word), found


@pytest.mark.parametrize('args, meant', [
    (['pretain', 'toy'], 'pretrain'), (['finetune', 'toy', 'nerr', '--run', 'x'], 'ner'),
    (['demo', '--stps', 3], '--steps'), (['plan', 'toy', '--secnds=3'], '--seconds'),
    (['pretrain', 'toy', '--train.step', 3], '--train.steps'), (['data', 'prepear'], 'prepare')],
    ids=str)
def test_a_mistyped_word_gets_the_nearest(args, meant, capsys):
    status, out, err = command(capsys, *args)
    assert (status, out, len(err.splitlines())) == (2, '', 1)
    assert err.rstrip().endswith(f'Did you mean {meant}?')


@pytest.mark.parametrize('args, said', [
    ([], 'Use one of demo'), (['pretrain'], 'Use one of toy'),
    (['pretrain', '--langs', 'en'], 'Use one of toy'), (['export'], 'Missing'),
    (['pretrain', 'toy', '--train.steps', 'abc'], "'abc'"),
    (['plan', 'toy', '--meta.eps', -1], 'eps is -1'), (['qqqq'], 'Use one of demo')], ids=str)
def test_what_cannot_be_read_is_told_in_a_line(args, said, capsys):
    status, out, err = command(capsys, *args)
    assert (status, out, len(err.splitlines())) == (2, '', 1) and said in err
    assert not re.search('[│╭╰─]|---', err) and 'helptext' not in err


def test_a_terminal_without_boxes_is_told_the_same():
    done = subprocess.run([sys.executable, '-m', 'interference_nb', 'pretrain', 'toy',
                           '--train.steps', 'abc'], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONIOENCODING='ascii', LC_ALL='C'))
    said = "Error parsing --train.steps: invalid literal for int() with base 10: 'abc'"
    assert done.stderr == f'interference: {said}. See interference pretrain toy --help.\n'


def test_version_by_either_name(capsys):
    assert command(capsys, '--version') == (0, f'interference {__version__}\n', '')
    done = subprocess.run([sys.executable, '-m', 'interference_nb', '--version'],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f'interference {__version__}\n'), done.stderr


def test_every_word_has_a_description(capsys):
    def groups(group, words=()):
        yield words, group
        for word, found in group.words.items():
            if isinstance(found, Group): yield from groups(found, (*words, word))
    for words, group in groups(command_tree()):
        status, out, err = command(capsys, *words, '--help')
        assert status == 0 and err == '' and group.help in out
        for word in group.words:
            assert re.search(rf'^  {word} +\w', out, re.M), f'{" ".join(words)}: {word}'


def test_every_command_reads_its_own_options(capsys):
    "Each has a help page with all of its options."
    for words, found in leaves(command_tree()):
        assert isinstance(found, Command)
        if words[1:2] in (('pocket',), ('mini',)): continue     # as toy, with other numbers
        status, out, err = command(capsys, *words, '--help')
        assert status == 0, err
        names = {n for n in option_names(found.options)} - {
            '--run', '--folder', '--exhibits', '--first', '--second'}
        assert not [n for n in names if n not in out], words


@pytest.mark.parametrize('old, new', [
    (['--meta.rest', '3'], ['--meta.meta-every', '4']),
    (['--meta.rest=0'], ['--meta.meta-every', '1']),
    (['--meta.others_only'], ['--meta.exclude-own-language']),
    (['--meta.no-also-direct', '--seeds', '3'],
     ['--meta.no-phi-follows-training-gradient', '--seeds', '3']),
    (['--model.documents-apart'], ['--model.isolate-documents'])], ids=str)
def test_an_old_spelling_is_read_and_told(old, new, capsys):
    assert upgrade_options(old) == new
    assert old[0].split('=')[0] in capsys.readouterr().err
    assert upgrade_options(new) == new and capsys.readouterr().err == ''


def test_old_spellings_lead_to_options_that_are_there():
    known = set(option_names(replace(command_tree().words['pretrain'].words['toy'].options,
                                     meta=MetaConfig())))
    assert {new for new, _ in cli.OLD_OPTIONS.values()} <= known
    assert not set(cli.OLD_OPTIONS) & known


def asked(capsys, monkeypatch, *args):
    "Return the run that a pretraining command asks for."
    specs = []
    monkeypatch.setattr(cli, 'run', lambda spec, *_, **__: specs.append(spec))
    status, _, err = command(capsys, 'pretrain', 'toy', *args)
    assert status == 0, err
    return specs[0]


@pytest.mark.parametrize('system', ['meta_rest3', 'meta_one_sided', 'meta_adpt'])
def test_a_field_of_the_meta_step_changes_alone(system, capsys, monkeypatch, tmp_path):
    "The system keeps what it is, and the run does not go by the plain system's name."
    plain = asked(capsys, monkeypatch, '--system', system, '--out', tmp_path)
    other = asked(capsys, monkeypatch, '--system', system, '--meta.eps', 1e-3, '--out', tmp_path)
    assert plain.meta is None
    assert other.meta == replace(SYSTEMS[system].meta, eps=1e-3)
    back = asked(capsys, monkeypatch, '--system', system, '--meta.meta-every', 1, '--out', tmp_path)
    assert (back.meta or SYSTEMS[system].meta).meta_every == 1
    assert other.name != plain.name


def test_a_system_without_a_meta_step_has_none_to_change(capsys, tmp_path):
    status, _, err = command(capsys, 'pretrain', 'toy', '--meta.eps', 1e-3, '--out', tmp_path)
    assert (status, len(err.splitlines())) == (2, 1) and 'joint has no meta step' in err


@pytest.mark.parametrize('rows', ['documents', 'segments'])
def test_text_is_prepared_by_the_line_or_by_the_document(rows, tmp_path, capsys):
    status, out, err = command(capsys, 'data', 'prepare', '--langs', 'en', '--max-sentences', 'en',
                               60, '--rows', rows, '--out', tmp_path)
    assert status == 0, err
    assert re.search(r'^en: train [\d,]+ tokens in 60 sentences', out, re.M)
    manifest, = tmp_path.rglob('manifest*')
    assert ('segments' in manifest.read_text()) == (rows == 'segments')


def test_two_runs_are_compared(tmp_path, capsys):
    "The same run, another seed, another rate; what the records name of data and code."
    for name, seed, *more in (('a', 0), ('b', 0), ('c', 1), ('d', 0, '--train.lr', '.02')):
        args = ['--train.steps', 3, '--train.warmup', 1, '--model.dim', 8, '--train.seed', seed]
        status, _, err = command(capsys, 'pretrain', 'toy', '--out', tmp_path/name, *args, *more)
        assert status == 0, err
    runs = {name: next((tmp_path/name).glob('joint*')) for name in 'abcd'}
    ask = lambda x, y: command(capsys, 'compare', runs[x], runs[y])
    status, out, err = ask('a', 'b')
    assert (status, err, out.splitlines()[-1]) == (0, '', 'The numbers are the same.')
    assert 'Only the seed differs' in ask('a', 'c')[1]
    out = ask('a', 'd')[1]
    assert 'They were made by other settings: train.lr' in out
    assert max(map(len, out.splitlines())) <= 100
    assert re.search(r'settings +train\.lr +0\.01 +0\.02\n', out), out
    ends = [next(r for r in read_jsonl(runs[x]/'record.jsonl') if r['kind'] == 'end') for x in 'ad']
    a, d = (end['ppl']['en'] for end in ends)
    assert re.search(rf'ppl en +{a:.2f} +{d:.2f} +{re.escape(f"{d - a:+.2f}")}\n', out), out
    path, text = runs['b']/'record.jsonl', (runs['b']/'record.jsonl').read_text()
    path.write_text(text.replace('"inputs": {', '"inputs": {"text/en/train.parquet": "ab", ', 1))
    assert 'text/en/train.parquet' in ask('a', 'b')[1]
