"""What long commands say while they run; what 80 columns or an old encoding can show of a page."""
import io, json, sys, time
from dataclasses import replace
from pathlib import Path
import pytest
from interference_nb import reproduce
from interference_nb.experiments import SCALES, cost, plan
from interference_nb.reproduce import DEMO, STUDIES, Progress, for_terminal, run_missing, say

ROOT = Path(__file__).parents[1]

def demo_run(folder, *rows):
    "A run of the demo, and a record of it with these rows."
    spec, = plan(['joint'], ('en', 'x3'), 1, SCALES['toy'])
    (folder/spec.name).mkdir(exist_ok=True)
    (folder/spec.name/'record.jsonl').write_text(
        ''.join(json.dumps(dict(kind=k, **row)) + '\n' for k, row in rows))
    return spec

def test_work_moves_with_every_step_of_a_run(tmp_path):
    at = lambda *rows: Progress([demo_run(tmp_path, *rows)], tmp_path).done()
    spec = demo_run(tmp_path)
    training, start = cost(replace(spec, tasks=())), ('start', {})
    assert training == 1000 and at() == 0 and at(start) == 0
    assert at(start, ('step', dict(step=50))) == pytest.approx(50)
    assert at(start, ('step', dict(step=50)), ('eval', dict(step=500))) == pytest.approx(500)
    tuned = [('finetune', dict(task=t, train_lang='en')) for t in ('ner', 'pos')]
    half = at(start, ('end', dict(step=1000)), *tuned)
    assert half == pytest.approx(1000 + (cost(spec) - 1000) / 2)        # two of four

def test_time_left_is_never_a_question_mark(tmp_path, monkeypatch):
    spec = demo_run(tmp_path, ('start', {}))
    progress, clock = Progress([spec], tmp_path), time.monotonic()
    assert 'measuring the time left' in progress.line()
    demo_run(tmp_path, ('start', {}), ('eval', dict(step=500, ppl=dict(en=9.))))
    progress.start = clock - 100
    left = 100 * (cost(spec) - 500) / 500
    assert f'about {left / 60:.0f} min left' in progress.line()
    assert 'en ppl 9.0' in progress.line() and '?' not in progress.line()
    resumed = Progress([spec], tmp_path)            # what was there before says nothing of speed
    assert 'measuring' in resumed.line() and not resumed.line().startswith('  0%')

@pytest.mark.parametrize('quiet', [False, True])
def test_a_log_file_is_not_redrawn(tmp_path, monkeypatch, capsys, quiet):
    spec = demo_run(tmp_path)
    monkeypatch.setattr(reproduce, 'run_all', lambda *_: iter([(spec, ValueError('no luck'))]))
    assert list(run_missing([spec], tmp_path, 1, quiet=quiet)) == [spec.name]
    out = capsys.readouterr().out
    assert '\r' not in out and '\x1b' not in out
    assert out == '' if quiet else out.count('\n') == 1 and 'no luck' in out

@pytest.mark.parametrize('terminal', [False, True])
def test_a_bar_redraws_on_a_terminal_only(monkeypatch, capsys, terminal):
    "pretrain, prune, probe and report: in a log file a plain line now and then, or none at all."
    from interference_nb import pretrain
    def shown(every):
        monkeypatch.setattr(pretrain, 'LOG_EVERY', every)
        monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
        with pretrain.progress_bar(4, 0, True) as bar:
            for _ in range(4):
                bar.set_postfix_str('en ppl 9.0', refresh=False)
                bar.update(1)
        return capsys.readouterr().out
    if terminal:
        assert '\r' in shown(60.)
        return
    assert shown(60.) == ''                          # over before the first line is due
    lines = shown(0.).split('\n')
    assert len(lines) == 6 and lines[-1] == '' and '\r' not in ''.join(lines)
    assert lines[0].startswith('25% |') and '1/4 steps' in lines[0] and 'en ppl 9.0' in lines[0]
    assert lines[4].startswith('100%')

def test_a_page_fits_eighty_columns_and_loses_nothing():
    page = (ROOT/'records/demo-toy/table.md').read_text(encoding='utf-8')
    text = for_terminal(page, 80)
    assert max(map(len, text.splitlines())) <= 80 < max(map(len, page.splitlines()))
    cells = {c.strip() for line in page.splitlines() if line.startswith('|')
             for c in line.strip('|').split('|') if not set(c) <= set(':- |')}
    assert cells and not (lost := {c for c in cells if c not in text}), lost
    words = [w for line in page.splitlines() if not line.startswith('|') for w in line.split()]
    assert not [w for w in words if w not in text]

def test_an_old_terminal_gets_what_it_can_show(monkeypatch):
    for encoding, shown in (('cp1252', '-1.5 ±0.3 λ'), ('ascii', '-1.5 +-0.3'), ('utf-8', '−1.5')):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding=encoding))
        say('−1.5 ±0.3 λ')
        sys.stdout.flush()
        assert raw.getvalue().decode(encoding).startswith(shown.replace(' λ', ' lambda'))
        monkeypatch.undo()

def test_the_demo_has_the_control_and_equal_batches():
    "Random weights, and mono against joint with as many batches of each language."
    runs = DEMO.runs(DEMO, STUDIES['demo'])
    steps = {s.system: s.train.steps for s in runs}
    assert steps['scratch'] == 0 and steps['joint2x'] == 2 * steps['mono']
    assert {s.scale.train.language_order for s in runs} == {'round_robin'}
