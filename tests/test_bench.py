"The benchmark runs, keeps every repeat, and says 'met' from the numbers alone."
import json, subprocess, sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
import pytest
from waiting import LIMIT

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
    sections = dict(step=measured(ours=[1., 2., 1.], xlm=[1.8, 3.2, 1.9], bert=[3., 3., 3.],
                                  xmod=[3., 4., 5.]),
                    same=measured(ours=[1.], xlm=[2.], bert=[2.]),
                    meta=measured(adapters=[1., 1.], finite_difference=[6., 5.302]),
                    load=measured(load=[.01, .02]))
    memory = sections['meta']['contestants']
    memory['adapters']['peak_mb'], memory['finite_difference']['peak_mb'] = [90, 100], [120, 120.5]
    rows = {row['what']: row for row in bench.table(sections)}
    peer = rows['fastest peer, default settings / ours']
    assert peer['measured'] == [1.8, 1.6, 1.9] and peer['met'] and bench.verdict(peer) == 'met'
    meta = rows['meta step (finite difference) / adapters, time']
    assert meta['measured'] == [5.651, 5.302, 6] and meta['met'] is False
    assert bench.verdict(meta) == 'not met: +6.6%'
    peak = rows['meta step (finite difference) / adapters, memory']
    assert peak['measured'] == [1.205, 1.205, 1.3333] and bench.verdict(peak) == 'not met: +0.4%'
    assert rows['loader / what training eats, tokens a second']['met']
    for what in ('bare stack, same allocator / ours', 'fastest peer, same allocator / ours'):
        missing = rows[what]        # one of the peers is: who knows which would be the fastest
        assert missing['measured'] is missing['met'] is None
        assert bench.verdict(missing) == 'not measured'
    assert 'not met' in bench.show(list(rows.values()))

BENCH = """
import sys
_, folder, out, *sections = sys.argv
sys.path.insert(0, folder)
import bench
for section in sections:
    sys.argv[1:] = ['--quick', '--out', out, '--only', section]
    bench.main()
"""

def test_quick_run(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path/'quick.json'                         # the second section joins the first
    run = subprocess.run([sys.executable, '-c', BENCH, FOLDER, out, 'meta', 'step'],
                         capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('fastest peer, default settings / ours') == 2
    assert 'failed' not in run.stdout
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
    assert result['wall_s'] > sum(s['wall_s'] for s in result['sections'].values())
    result['machine'] |= dict(commit='another', date='another')
    out.write_text(json.dumps(result))
    monkeypatch.setattr(bench, 'machine', lambda: result['machine'] | dict(commit='mine'))
    status, said = refused(bench, monkeypatch, capsys, '--out', out, '--only', 'step')
    assert status == 2 and 'other conditions (commit)' in said
    assert json.loads(out.read_text()) == result        # as it was

def test_gpu_plan(bench):
    plan = bench.plan(False, dict(gpu='x', bfloat16=False))
    jobs = {**plan['gpu_step']['jobs'], **plan['gpu_meta']['jobs']}
    assert {(j.device, j.precision, j.batch_size) for j in jobs.values()} == {
        ('cuda', 'float16', 128)}
    assert set(bench.PEERS) < set(jobs) and jobs['compiled'].compiled
    assert not any(n.startswith('gpu') for n in bench.plan(False, dict(gpu=None)))
    sections = {n: measured(**{label: [1.] for label in plan[n]['jobs']})
                for n in ('gpu_step', 'gpu_meta')}
    for n in sections:
        for label, row in sections[n]['contestants'].items():
            row['job'] = asdict(plan[n]['jobs'][label])
    rows = [row for row in bench.table(sections) if row['what'].startswith('GPU')]
    assert rows and all(row['measured'] for row in rows)

def test_files_are_named_by_what_they_measure(bench):
    files = [bench.name(dict(gpu=gpu, cores=cores, threads=2)) for gpu, cores in
             ((None, 2), (None, 16), ('NVIDIA H100 80GB', 16))]
    assert files == ['cpu-2-cores', 'cpu-16-cores-2-threads', 'nvidia-h100-80gb']

def refused(bench, monkeypatch, capsys, *args):
    "Status and message of a command that starts no contestant."
    monkeypatch.setattr(bench, 'Contestant', lambda job: pytest.fail('started'))
    for name in ('OMP_NUM_THREADS', 'PYTHONPATH'): monkeypatch.setenv(name, '')    # it sets them
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--quick', *map(str, args)])
    with pytest.raises(SystemExit) as stop: bench.main()
    return stop.value.code, capsys.readouterr().err

def test_unknown_section(bench, monkeypatch, capsys):
    status, said = refused(bench, monkeypatch, capsys, '--only', 'nothing')
    assert status == 2 and 'unknown section nothing' in said

def test_committed_numbers(bench):
    paths = [p for p in FOLDER.glob('*.json') if p.stem != 'quick']
    assert paths
    for result in (json.loads(p.read_text()) for p in paths):
        assert result['table'] == json.loads(json.dumps(bench.table(result['sections'])))
        assert not result['quick']

def test_matrix_costs_two_gradients_a_language(bench):
    import matrix
    told = []
    job = matrix.replace(matrix.MODEL, **matrix.TINY, langs=('a', 'b', 'c'))
    matrix.cost(job, 2, SimpleNamespace(send=told.append))
    row, = told
    assert row['passes'] == 6 and row['pairs'] == 3 and len(row['seconds']) == 2
    assert row['disk_bytes'] == 6 * row['gradient_bytes'] > 0 <= row['grown_bytes']
    kept = json.loads(next((FOLDER/'matrix').glob('*.json')).read_text())
    assert [r['languages'] for r in kept['rows']] == [2, 5, 10, 20] and not kept['quick']
    assert all(r['passes'] == 2 * r['languages'] for r in kept['rows'])
