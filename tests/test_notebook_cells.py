"The collector of notebooks itself, on notebooks of a few cells."
import json, textwrap
from pathlib import Path
import pytest
import notebook_cells

@pytest.fixture
def collect(pytester):
    "Return a function that makes notebook nbs/nb.ipynb of `cells` and runs pytest on it."
    pytester.makefile('.ini', settings='''
        [DEFAULT]
        lib_name = thing
        tst_flags = slow gpu
        nbs_path = nbs''')
    pytester.makeini('[pytest]')
    def run(*cells, args=()):
        nb = dict(metadata={}, nbformat=4, nbformat_minor=5, cells=[])
        for i, source in enumerate(map(textwrap.dedent, cells)):
            kind = 'markdown' if source.startswith(('# ', '## ', ':::')) else 'code'
            cell = dict(cell_type=kind, id=f'c{i}', metadata={}, source=source)
            if kind == 'code': cell |= dict(outputs=[], execution_count=None)
            nb['cells'].append(cell)
        path = pytester.mkdir('nbs') / 'nb.ipynb'
        path.write_text(json.dumps(nb))
        return pytester.runpytest_inprocess('-p', 'notebook_cells', '-rA', 'nbs', *args)
    return run

def test_cases_are_named_by_heading_and_a_notebook_runs_once(collect):
    result = collect(
        '# Title', "from fastcore.test import test_eq; x = 1; print(x, file=open('ran', 'a'))",
        '## First `thing`', 'x += 1', 'assert x == 2', 'test_eq(x, 2)',
        '## Second {#sec-2}\n### deeper', "s = 'assert nothing'  # assert x",
        '::: {.callout-note}\n## Paper\ntext\n:::', 'test_eq(x + 1, 3)',
        '## Exported', '#| export\ndef f(): assert True')
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines_random([
        'PASSED nbs/nb.ipynb::First thing #1', 'PASSED nbs/nb.ipynb::First thing #2',
        'PASSED nbs/nb.ipynb::Second > deeper', 'PASSED nbs/nb.ipynb::runs from top to bottom',
        '*s  nbs/nb.ipynb*'])
    assert Path('nbs/ran').read_text() == '1\n'

def test_a_failure_points_at_its_cell(collect):
    result = collect('# Title', '## Good', 'assert True', '## Bad',
                     'x = 3\nassert x == 4, "x is off"', '## Later', 'assert True')
    result.assert_outcomes(passed=1, failed=1, skipped=2)
    result.stdout.fnmatch_lines([
        '*cell 4 (under “Bad”)*x is off*', '*1  x = 3', '*2  assert x == 4*', 'Traceback*',
        '*<ipython-input*line 2*', 'AssertionError: x is off'])
    result.stdout.fnmatch_lines(['FAILED nbs/nb.ipynb::Bad*'])
    result.stdout.fnmatch_lines(['SKIPPED*not reached: cell 4 failed'])

def test_a_cell_that_tests_nothing_fails_the_whole(collect):
    result = collect('# Title', '1 / 0', '## Later', 'assert True')
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(['*cell 1 (under “Title”): ZeroDivisionError*',
                                 'FAILED nbs/nb.ipynb::runs from top to bottom*'])

def test_a_case_chosen_alone_cannot_pass_unreached(collect):
    cells = '# Title', '1 / 0', '## Later', 'assert True'
    collect(*cells, args=['-k', 'Later']).assert_outcomes(failed=1, deselected=1)

def test_flagged_cells_are_skipped_unless_asked_for(collect, monkeypatch):
    monkeypatch.setenv('NBDEV_FLAGS', 'slow')
    result = collect('# Title', '## A', '#| slow\nassert True', '## B', '#| eval: false\nassert 0',
                     '## C', '#| gpu\nassert 0', '#| gpu\n1 / 0')
    result.assert_outcomes(passed=2, skipped=2)
    result.stdout.fnmatch_lines_random(['PASSED*::A', 'SKIPPED*#| eval: false', 'SKIPPED*#| gpu'])

def test_a_dead_process_is_a_failure(collect):
    result = collect('# Title', 'import os', '## Crash', 'os._exit(3)\nassert True')
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(['*the process ended with status 3*'])

def test_a_notebook_that_never_ends_is_stopped(collect, monkeypatch):
    monkeypatch.setattr(notebook_cells, 'TIMEOUT', 2)
    result = collect('# Title', 'import time', 'while True: time.sleep(.1)')
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(['*no end after 2 s*'])

def test_workers_of_xdist_are_refused(collect):
    "They would collect the cells, but know nothing of the notebooks' runs."
    result = collect('# Title', 'assert True', args=['-n', '2'])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(['*Leave out -n*'])

def test_nothing_runs_unless_selected(collect):
    collect('# Title', "print(1, file=open('ran', 'a'))", args=['-k', 'nothing so named'])
    assert not Path('nbs/ran').exists()
