"""The command line: words that lead to commands, mistyped ones, options old and new."""
import io, os, re, shlex, shutil, subprocess, sys
from dataclasses import replace
import pytest
from interference_nb import __version__, cli, reproduce, tasks
from interference_nb.cli import (Command, DemoConfig, Group, _next_step, command_tree, main,
                                 option_names, upgrade_options)
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
    (['plan', 'toy', '--meta.eps', -1], 'eps is -1'), (['qqqq'], 'Use one of demo'),
    (['report', '--langs', 'en', 'x3', 'model', '--rounds', 3], 'Name it before the options'),
    (['reproduce', '--tasks', 'ner', 'table2'], 'before the options')], ids=str)
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


def test_figures_open_no_window(monkeypatch):
    "The program draws into files, whatever the environment says; a caller's own backend stays."
    monkeypatch.setenv('MPLBACKEND', 'TkAgg')
    for args, backend in ((['--version'], 'TkAgg'), (None, 'agg')):
        monkeypatch.setattr(sys, 'argv', ['interference', '--version'])
        with pytest.raises(SystemExit): main(args)
        assert os.environ['MPLBACKEND'] == backend


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


@pytest.mark.parametrize('args, said', [
    (['demo'], "'toy', 'toy:pairs', 'hub', 'hub:8' (the first 8 MB of text a language, streamed), "
               'or a folder of your files (see: data check) (default: toy)'),
    (['reproduce'], 'all, or monolingual, bilingual, variants, meta-adapters')], ids=str)
def test_help_lists_what_an_option_takes(args, said, capsys):
    "A comment above a field and one behind it: the program shows the latter only."
    status, out, err = command(capsys, *args, '--help')
    assert status == 0 and said in ' '.join(re.sub('[│╭╮╰╯─]', ' ', out).split())


def test_every_command_reads_its_own_options(capsys):
    "Each has a help page with all of its options."
    for words, found in leaves(command_tree()):
        assert isinstance(found, Command)
        if words[1:2] in (('pocket',), ('mini',)): continue     # as toy, with other numbers
        status, out, err = command(capsys, *words, '--help')
        assert status == 0, err
        names = {n for n in option_names(found.options)} - {
            '--run', '--folder', '--exhibits', '--first', '--second', '--model'}
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


@pytest.mark.parametrize('encoding, shown', [('utf-8', "'B-船'"), ('cp1252', r"'B-\u8239'"),
                                             ('ascii', r"'B-\u8239'")])
def test_a_terminal_is_told_what_it_can_show(encoding, shown, tmp_path, capsys, monkeypatch):
    "People's words in their own script ended in UnicodeEncodeError, with status 1."
    for split in ('train', 'validation', 'test'):
        (tmp_path/'text/zh').mkdir(parents=True, exist_ok=True)
        (tmp_path/f'text/zh/{split}.txt').write_text('今天下雨。\n', encoding='utf-8')
    (tmp_path/'ner/zh').mkdir(parents=True)
    (tmp_path/'ner/zh/train.bio').write_text('今 B-船\n\n', encoding='utf-8')
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding=encoding))
    with pytest.raises(SystemExit) as stop: main(['data', 'check', str(tmp_path)])
    sys.stdout.flush()
    assert stop.value.code == 2 and shown in raw.getvalue().decode(encoding)


def test_a_cosine_beyond_one_is_a_dash():
    "Where noise dominates, dividing by it says nothing: .3 / sqrt(.1 * .4) is 1.5."
    pairs = {'en-en': (.1, .5), 'en-x3': (.3, -.2), 'x3-x3': (.4, .5)}
    rows = [dict(kind='probe', step=k, cos={p: dict(zip(('all', 'layer 0'), c, strict=True))
                                            for p, c in pairs.items()}) for k in range(3)]
    table = cli.probe_table(rows).set_index('gradients of')
    assert table.loc['all', 'en-x3 corrected'] == '–'
    assert table.loc['layer 0', 'en-x3 corrected'] == '-0.40'
    assert table.loc['layer 0', 'en-x3 below zero'] == '100%'
    rows = [r | dict(cos=r['cos'] | {'en-en': {'all': -.1, 'layer 0': .5}}) for r in rows]
    assert cli.probe_table(rows).set_index('gradients of').loc['all', 'en-x3 corrected'] == '–'


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
    assert re.search(r'train\.lr +settings +0\.01 +0\.02\n', out), out
    ends = [next(r for r in read_jsonl(runs[x]/'record.jsonl') if r['kind'] == 'end') for x in 'ad']
    a, d = (end['ppl']['en'] for end in ends)
    assert re.search(rf'ppl en +{a:.2f} +{d:.2f} +{re.escape(f"{d - a:+.2f}")}\n', out), out
    path, text = runs['b']/'record.jsonl', (runs['b']/'record.jsonl').read_text()
    path.write_text(text.replace('"inputs": {', '"inputs": {"text/en/train.parquet": "ab", ', 1))
    assert 'text/en/train.parquet' in ask('a', 'b')[1]
    status, _, err = command(capsys, 'pretrain', 'toy', '--train.steps', 3, '--train.warmup', 1,
                             '--langs', 'en', 'fr', '--system', 'meta_adpt', '--out', tmp_path/'e')
    assert status == 0, err
    runs['e'] = next((tmp_path/'e').glob('meta*'))
    out = ask('a', 'e')[1]          # long names of settings whole; what one of them lacks is a dash
    assert 'meta.phi_follows_training_gradient' in out and 'nan' not in out
    assert re.search(r'ppl x3 +[\d.]+ +– +–\n', out), out


@pytest.fixture(scope='module')
def tagger(tmp_path_factory):
    "A run of two toy languages, finetuned on tags."
    home = tmp_path_factory.mktemp('tagger')
    main(['pretrain', 'toy', '--train.steps', '4', '--model.dim', '16', '--system', 'adpt',
          '--out', str(home)])
    run = next(home.glob('adpt*'))
    for task in ('ner', 'pos'):
        main(['finetune', 'toy', task, '--run', str(run), '--finetune.epochs', '2',
              '--finetune.max-train', '60', '--finetune.max-dev', '20',
              '--finetune.max-eval', '30'])
    return run


@pytest.mark.parametrize('task', ['ner', 'pos'])
def test_labelled_rows_are_predicted_and_scored_by_type(task, tagger, capsys):
    "The file holds what the record's score was counted on."
    status, out, err = command(capsys, 'predict', '--run', tagger, '--task', task, '--lang', 'x3')
    assert status == 0, err
    record = read_jsonl(tagger/f'finetune-{task}-en'/'record.jsonl')[-1]
    text = (tagger/f'finetune-{task}-en'/'predictions-x3.tsv').read_text()
    sentences = [[line.split('\t') for line in s.split('\n')] for s in text.strip().split('\n\n')]
    assert len(sentences) == 30
    right = [said == true for s in sentences for _, said, true in s]
    assert 100 * sum(right) / len(right) == pytest.approx(record['scores']['x3']['accuracy'])
    gold, said = ([[w[k] for w in s] for s in sentences] for k in (2, 1))
    assert tasks.span_f1(gold, said) == pytest.approx(record['scores']['x3']['f1'])
    for kind, s in tasks.scores_by_type(gold, said).items():
        numbers = ' +'.join([kind, *(f'{s[k]:.1f}' for k in ('precision', 'recall', 'f1'))])
        assert re.search(rf"^ *{numbers} +{s['n']}$", out, re.M), out


def test_scores_in_other_languages_are_kept(tagger, tmp_path, capsys):
    "Finetuning again for one test language adds to the record of the others."
    shutil.copytree(tagger, tmp_path/tagger.name)
    shutil.copytree(tagger.parent/'data', tmp_path/'data')
    run = tmp_path/tagger.name
    status, _, err = command(capsys, 'finetune', 'toy', 'pos', '--run', run, '--test-langs', 'x3',
                             '--finetune.epochs', 2, '--finetune.max-train', 60,
                             '--finetune.max-dev', 20, '--finetune.max-eval', 30)
    assert status == 0, err
    now, before = (read_jsonl(home/'finetune-pos-en'/'record.jsonl')[0]['scores']
                   for home in (run, tagger))
    assert now == before and set(now) == {'en', 'x3'}

def test_a_run_is_found_from_inside(tagger, tmp_path, capsys, monkeypatch):
    "Its text lies beside it, whatever the name that it is called by."
    shutil.copytree(tagger, tmp_path/tagger.name)
    shutil.copytree(tagger.parent/'data', tmp_path/'data')
    monkeypatch.chdir(tmp_path/tagger.name)
    status, _, err = command(capsys, 'probe', '--run', '.', '--repeats', 1)
    assert status == 0 and not (tmp_path/tagger.name/'data').exists(), err

def test_the_next_step_can_be_pasted(tmp_path):
    "Folders with blanks; a study without a model of two languages."
    cfg, out = DemoConfig(data='my data'), tmp_path/'my runs'
    for name in ('mono-en-of-en+x3-0', 'scratch-en+x3-0'):
        (out/name).mkdir(parents=True)
        (out/name/'checkpoint.safetensors').touch()
    assert '--systems mono joint' in _next_step(cfg, out)
    (out/'adpt-en+x3-0').mkdir()
    (out/'adpt-en+x3-0'/'checkpoint.safetensors').touch()
    *_, data, _, run = shlex.split(_next_step(cfg, out))
    assert (data, run) == ('my data', str(out/'adpt-en+x3-0'))

def test_a_stop_promises_what_the_command_can_do(capsys, monkeypatch):
    def stop(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr('interference_nb.cli.open_run', stop)
    for words, more in ((['probe'], ''), (['finetune', 'toy', 'ner'],
                                          ' The same command resumes from the last checkpoint.')):
        status, _, err = command(capsys, *words)
        assert (status, err) == (130, f'interference: stopped.{more}\n')

def test_tables_of_gates_fit_a_terminal(tagger, capsys):
    "One of them was 130 columns wide."
    status, out, err = command(capsys, 'prune', '--run', tagger, '--prune.steps', 2,
                               '--prune.warmup', 1, '--prune.batch-size', 2)
    assert status == 0, err
    tables = [l for l in out.splitlines() if '  ' in l.strip()]
    assert len(tables) > 6 and max(map(len, tables)) <= 80


def test_a_full_disk_keeps_the_record_that_was_there(tagger, tmp_path, capsys):
    "Gates and finetuning are recorded anew, by a file that is whole; it was emptied first."
    import resource
    run = shutil.copytree(tagger, tmp_path/tagger.name)
    shutil.copytree(tagger.parent/'data', tmp_path/'data')
    gates = 'prune', '--run', run, '--prune.warmup', 1, '--prune.batch-size', 2, '--prune.steps'
    assert command(capsys, *gates, 2)[0] == 0
    path, limits = run/'prune'/'record.jsonl', resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    assert read_jsonl(path)[0]['config']['steps'] == 2
    sizes = [p.stat().st_size for p in run.glob('prune/*.safetensors')]
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) + 200, limits[1]))
    try: status, _, err = command(capsys, *gates, 3)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and f'could not write {path}' in err and path.read_bytes() == before


def test_when_all_runs_fail_their_reason_is_told(tmp_path, capsys, monkeypatch):
    "Before, the last word was that there is nothing to show."
    monkeypatch.setattr(reproduce, 'run_all', lambda specs, *_: ((s, ValueError('no luck'))
                                                                 for s in specs))
    status, _, err = command(capsys, 'demo', '--systems', 'joint', '--seeds', 1, '--out', tmp_path)
    assert status == 2 and '1 of 1 runs failed' in err and 'joint-en+x3-0: no luck' in err


def test_a_demo_cuts_a_language_short(tmp_path, capsys, monkeypatch):
    "In every run, mono of the other language included: they share the vocabulary of the cut text."
    asked = []
    monkeypatch.setattr(reproduce, 'run_all', lambda specs, *_: asked.extend(specs) or (
        (s, ValueError('no luck')) for s in specs))
    status, _, err = command(capsys, 'demo', '--systems', 'mono', 'joint', '--seeds', 1,
                             '--max-sentences', 'x3', 90, '--out', tmp_path)
    assert sorted(s.name for s in asked) == ['joint-en+x390-0', 'mono-en-of-en+x390-0',
                                             'mono-x390-of-en+x390-0'], err
    status, _, err = command(capsys, 'demo', '--max-sentences', 'fr', 90, '--out', tmp_path)
    assert status == 2 and 'fr' in err and len(asked) == 3


def test_text_to_tag_is_read_by_the_line(tagger, tmp_path, capsys):
    "A mark at its beginning is no word; only a line's end ends a sentence."
    (tmp_path/'t.txt').write_bytes('\ufeffka mi\u2028to\x85na\r\nmi\n'.encode())
    status, _, err = command(capsys, 'predict', '--run', tagger, '--text', tmp_path/'t.txt',
                             '--out', tmp_path/'x.tsv')
    assert status == 0, err
    found = (tmp_path/'x.tsv').read_text(encoding='utf-8').rstrip('\n').split('\n\n')
    assert [[w.split('\t')[0] for w in s.split('\n')] for s in found] == [
        ['ka', 'mi', 'to', 'na'], ['mi']]
    for path, said in ((tmp_path, 'Is a directory'), (tmp_path/'none', 'No such file')):
        status, _, err = command(capsys, 'predict', '--run', tagger, '--text', path)
        assert status == 2 and f'{path} cannot be read ({said}' in err


def test_a_text_is_not_tagged_over(tmp_path, capsys):
    "The sentences were replaced by their tags."
    (tmp_path/'t.txt').write_text('ka mi\n')
    (tmp_path/'other').symlink_to(tmp_path/'t.txt')
    for out in 't.txt', 'other':
        status, _, err = command(capsys, 'predict', '--run', tmp_path/'none', '--text',
                                 tmp_path/'t.txt', '--out', tmp_path/out)
        assert status == 2 and 'is the text itself' in err
    assert (tmp_path/'t.txt').read_text() == 'ka mi\n'


def test_scores_by_type_by_hand():
    "Two people, one of them found, one false place; a word in three as a verb."
    gold, said = [['B-PER', 'I-PER', 'O', 'B-PER']], [['B-PER', 'I-PER', 'B-LOC', 'O']]
    assert tasks.scores_by_type(gold, said) == {
        'LOC': dict(precision=0., recall=0., f1=0., n=0),
        'PER': dict(precision=100., recall=50., f1=200 / 3, n=2)}
    assert tasks.scores_by_type([['NOUN', 'VERB', 'NOUN']], [['NOUN', 'NOUN', 'VERB']]) == {
        'NOUN': dict(precision=50., recall=50., f1=50., n=2),
        'VERB': dict(precision=0., recall=0., f1=0., n=1)}


def test_unlabelled_text_is_tagged(tagger, tmp_path, capsys):
    "Every word once, in order; a sentence longer than the model's rows, too."
    words = 'kato mira ' * 60
    (tmp_path/'mine.txt').write_text(f'ka  mi\n\n{words}\n')
    status, out, err = command(capsys, 'predict', '--run', tagger, '--text', tmp_path/'mine.txt',
                               '--out', tmp_path/'x.tsv')
    assert status == 0, err
    first, second = (tmp_path/'x.tsv').read_text().rstrip('\n').split('\n\n')
    assert [line.split('\t')[0] for line in first.split('\n')] == ['ka', 'mi']
    assert [line.split('\t')[0] for line in second.split('\n')] == words.split()
    known = {f'{p}-{k}' for p in 'BI' for k in ('PER', 'ORG', 'LOC')} | {'O'}
    assert {line.split('\t')[1] for line in second.split('\n')} <= known


def test_finetuning_stops_when_nothing_gets_better(tagger, tmp_path, capsys):
    "With a rate of 0 no epoch is better than the first: patience 2 ends it after the third."
    args = ('--finetune.epochs', 9, '--finetune.lr', 0, '--finetune.head-lr', 0,
            '--finetune.patience', 2)
    few = '--finetune.max-train', 20, '--finetune.max-dev', 20, '--finetune.max-eval', 20
    run = shutil.copytree(tagger, tmp_path/tagger.name, ignore=shutil.ignore_patterns('finetune*'))
    shutil.copytree(tagger.parent/'data', tmp_path/'data')
    status, out, err = command(capsys, 'finetune', 'toy', 'ner', '--run', run, *args, *few)
    assert status == 0, err
    assert out.endswith(f"Record: {run/'finetune-ner-en'/'record.jsonl'}\n")
    row = read_jsonl(run/'finetune-ner-en'/'record.jsonl')[-1]
    assert (row['best_epoch'], len(row['dev'])) == (1, 3)
