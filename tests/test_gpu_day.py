"""`make gpu`: what it does, in which order, and that its minutes are kept."""
import subprocess, sys, time
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
import gpu

def option(command, name): return command[command.index(name) + 1]

def test_the_most_deciding_comes_first_and_a_rehearsal_is_a_hundredth():
    todo, short = gpu.parts('d', 'o'), gpu.parts('d', 'o', rehearse=True, card=False)
    studies = [p.command for p in todo if 'demo' in p.command]
    assert [option(c, '--langs') for c in studies] == ['en'] * 3
    assert [c[c.index('--langs') + 2] for c in studies] == ['fr', 'fr', 'ar']
    assert all('scratch' in c for c in studies)             # the control is in every one
    assert option(studies[0], '--out') == option(studies[1], '--out')       # and goes on there
    assert todo[0].name.startswith('tests') and todo[-2].name.startswith('the benchmark')
    assert all('demo' in p.command for p in short)          # nothing that wants a card
    for long, brief in zip(studies, (p.command for p in short), strict=True):
        assert int(option(long, '--steps')) == 100 * int(option(brief, '--steps'))

def test_minutes_are_kept_and_the_rest_goes_on():
    sleep = lambda s: [sys.executable, '-c', f'import time; time.sleep({s})']
    start = time.monotonic()
    said = gpu.work([gpu.Part('slow', .5, sleep(600)), gpu.Part('wrong', .9, [
        sys.executable, '-c', 'raise SystemExit(3)']), gpu.Part('late', .001, sleep(0))], 10)
    assert said['slow'].startswith('stopped') and said['wrong'] == 'failed, status 3'
    assert said['late'].startswith('not reached') and time.monotonic() - start < 60

def test_without_a_card_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(SystemExit) as e: gpu.main(['--data', '.'])
    assert e.value.code == 2 and '--rehearse' in capsys.readouterr().err


@pytest.mark.parametrize('data', ['', 'nowhere'])
def test_without_data_nothing_begins(data, capsys):
    with pytest.raises(SystemExit) as e: gpu.main(['--data', data, '--rehearse'])
    assert e.value.code == 2 and 'no folder' in capsys.readouterr().err

def test_the_tests_that_it_names_are_there():
    "A handful: each of them plans in a process of its own where torch has CUDA."
    words = gpu.parts('d', 'o')[0].command[4:]
    found = subprocess.run([sys.executable, '-m', 'pytest', '--collect-only', '-q', *words],
                           cwd=gpu.ROOT, capture_output=True, text=True).stdout
    assert 3 <= found.count('account_on_a_gpu') <= 6 and found.count('gpu_replays') == 2, found
