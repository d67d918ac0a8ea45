"""Collect notebooks as tests: one case for each cell that tests something, named by its heading.

    pytest nbs/05_meta_adapters.ipynb               one notebook
    pytest nbs -k 'finite and difference'           cells under a heading that says so

A notebook is run once, from top to bottom, in a fresh process of its own, and only if one of its
cases was selected: one after the other beside the tests in `tests/`, two side by side after them.
The cells that nbdev_test skips are skipped; NBDEV_FLAGS=slow runs those marked `#| slow`. The last
case of a notebook, "runs from top to bottom", stands for the cells that test nothing.
"""
import json, os, signal, subprocess, sys, tempfile, threading, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from nbdev.process import NBProcessor
from cells import headings, skip_flags, tests_something, why_skipped

RUNNER = Path(__file__).parent.parent / 'tools' / 'run_cells.py'
SIDE_BY_SIDE = min(2, os.cpu_count() or 1)
TIMEOUT = int(os.environ.get('NOTEBOOK_TIMEOUT', '900'))      # seconds a notebook may take
WHOLE = 'runs from top to bottom'

def pytest_configure(config):
    if hasattr(config, 'workerinput') or not config.getoption('numprocesses', None): return
    found = [p for arg in map(Path, config.args) for p in [arg, *arg.rglob('*.ipynb')]]
    if any(p.suffix == '.ipynb' for p in found):
        raise pytest.UsageError('notebooks run side by side by themselves. Leave out -n, or name '
                                'tests/ only.')

def pytest_collect_file(file_path, parent):
    inside = file_path.relative_to(parent.config.rootpath).parts
    if file_path.suffix == '.ipynb' and not any(part[0] in '_.' for part in inside):
        return Notebook.from_parent(parent, path=file_path)

class Notebook(pytest.File):
    "A notebook: its cases, and its one run."
    process = failed = None

    def collect(self):
        "Make a case of each cell that tests something, and one of the whole."
        flags, trail, seen = skip_flags(), {}, Counter()
        self.cells = NBProcessor(self.path, rm_directives=False).nb.cells
        cases = []
        for i, cell in enumerate(self.cells):
            if cell.cell_type == 'markdown':
                for level, title in headings(cell.source):
                    trail = {k: v for k, v in trail.items() if k < level} | {level: title}
            cell.place = ' > '.join(t for k, t in trail.items() if k > 1 or len(trail) == 1)
            if cell.cell_type == 'code' and tests_something(cell.source, cell.directives_):
                cases.append((cell.place or 'top', i, why_skipped(cell.directives_, flags)))
        total = Counter(place for place, *_ in cases)
        for place, i, skip in cases:
            seen[place] += 1
            name = f'{place} #{seen[place]}' if total[place] > 1 else place
            yield Cell.from_parent(self, name=name.replace('::', ':'), index=i, skip=skip)
        yield Cell.from_parent(self, name=WHOLE, index=None, skip='')

    def run(self):
        "Run the notebook in a process of its own; leave in `self` what became of each cell."
        with tempfile.TemporaryDirectory() as tmp:
            report, log = Path(tmp, 'report'), Path(tmp, 'log')
            start = time.perf_counter()
            with open(log, 'wb') as out:
                self.process = subprocess.Popen(
                    [sys.executable, RUNNER, self.path, report], cwd=self.config.rootpath,
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
                try: self.process.wait(TIMEOUT)
                except subprocess.TimeoutExpired: self.stop()
            self.seconds = time.perf_counter() - start
            lines = report.read_text().splitlines() if report.exists() else []
            said = log.read_text(errors='replace')[-3000:]
        rows = [json.loads(line) for line in lines]
        self.results, last = {row['cell']: row for row in rows}, rows[-1] if rows else {}
        if last.get('status') == 'end': return
        if last.get('status') != 'failed':      # the process died, or was stopped
            late, code = self.seconds >= TIMEOUT, self.process.returncode
            error = f'no end after {TIMEOUT} s' if late else f'the process ended with status {code}'
            last = dict(cell=last.get('cell'), error=error, traceback=said)
        self.failed = last

    def stop(self):
        "End the notebook's process and all it started."
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

class CellFailed(Exception): "A cell raised, or its process died."

class Cell(pytest.Item):
    "One case: a cell that tests something, or (without an index) the notebook as a whole."
    def __init__(self, *, index, skip, **kwargs):
        super().__init__(**kwargs)
        self.index, self.skip = index, skip
        if skip: self.add_marker(pytest.mark.skip(reason=skip))

    def runtest(self):
        runs = self.config.stash[RUNS]
        runs.wait_for(self.parent)
        failed = self.parent.failed
        if not failed: return
        at = failed['cell']
        if at == self.index: raise CellFailed(failed)
        passed = self.parent.results.get(self.index, {}).get('status') == 'passed'
        if self.index is None:
            # cells that are cases of their own report for themselves
            if at not in runs.selected(self.parent): raise CellFailed(failed)
            pytest.skip(f'cell {at} failed')
        if passed: return
        if runs.selected(self.parent) & {at, None}: pytest.skip(f'not reached: cell {at} failed')
        raise CellFailed(failed)

    def repr_failure(self, excinfo, style=None):
        if not isinstance(excinfo.value, CellFailed): return super().repr_failure(excinfo, style)
        failed, path = excinfo.value.args[0], self.path.relative_to(self.config.rootpath)
        if failed['cell'] is None: return f"{path}: {failed['error']}\n\n{failed['traceback']}"
        cell = self.parent.cells[failed['cell']]
        source = '\n'.join(f'{i:>4}  {line}' for i, line in enumerate(cell.source.splitlines(), 1))
        head = f"{path}, cell {failed['cell']} (under “{cell.place}”): {failed['error']}"
        return '\n\n'.join([head, source, failed['traceback']])

    def reportinfo(self): return self.path, self.index, f'{self.path.stem}: {self.name}'

class Runs:
    "The notebooks to run, on one core less while other tests run beside them."
    def __init__(self, items):
        self.items = [i for i in items if isinstance(i, Cell) and not i.skip]
        self.others = len(items) > sum(isinstance(i, Cell) for i in items)
        self.cores = threading.Semaphore(max(1, SIDE_BY_SIDE - self.others))
        self.pool, self.futures = None, {}

    def selected(self, notebook): return {i.index for i in self.items if i.parent is notebook}

    def start(self):
        self.pool = ThreadPoolExecutor(SIDE_BY_SIDE)
        notebooks = dict.fromkeys(i.parent for i in self.items)
        self.futures = {nb: self.pool.submit(self.run, nb) for nb in notebooks}

    def run(self, notebook):
        with self.cores: notebook.run()

    def wait_for(self, notebook):
        if self.others: self.cores.release()
        self.others = False
        self.futures[notebook].result()

    def stop(self):
        if self.pool is None: return
        self.pool.shutdown(wait=False, cancel_futures=True)
        for nb in self.futures: nb.stop()

RUNS = pytest.StashKey[Runs]()

def pytest_collection_modifyitems(items): items.sort(key=lambda i: isinstance(i, Cell))

def pytest_runtestloop(session):
    runs = session.config.stash[RUNS] = Runs(session.items)
    if not session.config.option.collectonly: runs.start()

def pytest_sessionfinish(session):
    if runs := session.config.stash.get(RUNS, None): runs.stop()

def pytest_terminal_summary(terminalreporter, config):
    runs = config.stash.get(RUNS, None)
    done = [nb for nb in (runs.futures if runs else ()) if hasattr(nb, 'seconds')]
    if not done: return
    terminalreporter.section('notebooks')
    for nb in done:
        times = {i: r.get('seconds', 0) for i, r in nb.results.items()}
        slow = max(times, key=times.get, default=None)
        line = f'{nb.seconds:6.1f} s  {nb.path.relative_to(config.rootpath)}'
        if slow is not None: line += f'   slowest: cell {slow}, {times[slow]:.1f} s'
        terminalreporter.write_line(line)
