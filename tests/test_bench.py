"The benchmark runs, keeps every repeat, and says 'met' from the numbers alone."
import json, subprocess, sys
from pathlib import Path
import pytest

FOLDER = Path(__file__).parents[1]/'benchmarks'

@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench
    return bench

def measured(**seconds):
    "Sections with one contestant after the other, as `measure` gives them."
    row = lambda s: dict(seconds=s, peak_mb=[100 * x for x in s], tensors_mb=s, work=10, job={})
    return dict(contestants={n: row(s) for n, s in seconds.items()}, errors={})

def test_verdicts(bench):
    sections = dict(step=measured(ours=[1., 2., 1.], xlm=[1.8, 3.2, 1.9], bert=[3., 3., 3.]),
                    meta=measured(adapters=[1., 1.], finite_difference=[6., 6.]),
                    load=measured(load=[.01, .02]))
    rows = {row['what']: row for row in bench.table(sections)}
    peer = rows['fastest peer, default settings / ours']
    assert peer['measured'] == [1.8, 1.6, 1.9] and peer['met'] and bench.verdict(peer) == 'met'
    meta = rows['meta step (finite difference) / adapters, time']
    assert meta['measured'][0] == 6 and meta['met'] is False
    assert bench.verdict(meta) == f'not met: {6 / 5.3 - 1:+.0%}'
    assert rows['loader / what training eats, tokens a second']['met']
    missing = rows['bare stack, same allocator / ours']
    assert missing['measured'] is missing['met'] is None
    assert bench.verdict(missing) == 'not measured'
    assert 'not met' in bench.show(list(rows.values()))

def test_quick_run(bench, tmp_path):
    out = tmp_path/'quick.json'
    command = [sys.executable, FOLDER/'bench.py', '--quick', '--only', 'step,meta', '--out', out]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert 'fastest peer, default settings / ours' in run.stdout and 'failed' not in run.stdout
    result = json.loads(out.read_text())
    about = {'commit', 'hardware', 'cpu', 'cores', 'threads', 'versions', 'date'}
    assert about <= set(result['machine'])
    assert set(result['sections']) == {'step', 'meta'}
    for section in result['sections'].values():
        for row in section['contestants'].values():
            assert len(row['seconds']) == len(row['peak_mb']) == 1 and row['seconds'][0] > 0
    passes = {n: row['passes'] for n, row in result['sections']['meta']['contestants'].items()}
    assert passes['adapters'] == 1 and passes['first_order'] < passes['finite_difference']
    assert result['table'] == json.loads(json.dumps(bench.table(result['sections'])))

def test_unknown_section():
    run = subprocess.run([sys.executable, FOLDER/'bench.py', '--quick', '--only', 'nothing'],
                         capture_output=True, text=True)
    assert run.returncode == 2 and 'unknown section nothing' in run.stderr

def test_committed_numbers(bench):
    paths = [p for p in FOLDER.glob('*.json') if p.stem != 'quick']
    assert paths
    for result in (json.loads(p.read_text()) for p in paths):
        assert result['table'] == json.loads(json.dumps(bench.table(result['sections'])))
        assert not result['quick']
