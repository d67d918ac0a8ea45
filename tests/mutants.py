"""Put faults into the modules that carry the science, one at a time, and see that a test notices.

    make mutants                        all of them; how long that takes stands in CONTRIBUTING.md
    make mutants ARGS='--only 05'       those whose notebook or description has this text
    make mutants ARGS=--check           only see that each edit still finds its text, in seconds

Each edit is made in a copy of the project, in the notebook and in the module that it exports, and
the tests that it names are run there. The checkout is never touched. pytest does not collect this
file: it is no part of `make test` and runs on demand.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
ORACLES, PROPERTIES = 'tests/test_oracles.py', 'tests/test_properties.py'


@dataclass(frozen=True)
class Edit:
    "A fault: a text of an exported cell, what takes its place, and who should notice."
    notebook: str               # under nbs/, without its suffix
    old: str                    # stands once in the notebook's exported cells
    new: str
    breaks: str                 # what is wrong then
    tests: tuple[str, ...]      # files or pytest's node ids, the quickest first
    survives: str = ''          # why no test can notice; empty: one must

    @property
    def module(self): return f"interference_nb/{self.notebook.split('_', 1)[1]}.py"


def oracle(*names): return tuple(f'{ORACLES}::{n}' for n in names)


EDITS = (
    # the faults that once passed every test
    Edit('05_meta_adapters', 'self.losses(batches), self.losses(val), beta,',
         'self.losses(batches), self.losses(\n'
         '                [type(b)(**vars(b) | dict(lang=own[0])) for b in val]), beta,',
         "validation losses of all languages with the training language's phi",
         oracle('test_meta_step_is_algorithm_1')),
    Edit('06_finetune', 'answers = predict(model, data, lang)\n        scores[lang]',
         'answers = predict(model, data, next(iter(tests)))\n        scores[lang]',
         "a zero-shot test through another language's modules",
         oracle('test_zero_shot_goes_through_the_languages_own_modules')),
    Edit('06_finetune', 'scores = evaluate(self.model, self.dev, self.lang)',
         'scores = evaluate(self.model, self.data, self.lang)', 'the best epoch by training scores',
         oracle('test_best_epoch_is_the_development_sets')),
    Edit('06_finetune', "read('validation', cfg.max_dev)", "read('test', cfg.max_dev)",
         'a development set of test rows', oracle('test_best_epoch_is_the_development_sets')),
    Edit('07_experiments', "dev_batches(corpora[l]['test'],", "dev_batches(corpora[l]['train'],",
         'perplexity of training text', oracle('test_reported_perplexity_is_of_the_test_text')),
    Edit('01a_pretrain', 'sampling_probabilities(sizes, cfg.temperature)',
         'sampling_probabilities(sizes)', 'batches that ignore the temperature',
         oracle('test_languages_are_drawn_with_the_temperature')),
    Edit('01a_pretrain', 'torch.nn.utils.clip_grad_norm_(params, self.cfg.clip)', 'pass',
         'no gradient clipping in pretraining', oracle('test_pretraining_steps_clip')),
    Edit('06_finetune', "for p in g['params']], self.cfg.clip)", "for p in g['params']], 1e9)",
         'no gradient clipping in finetuning', oracle('test_finetuning_clips')),
    Edit('07_experiments', 'sorted(c.sign * x for x in p.interval)', 'p.interval',
         'verdicts that ignore the sign', oracle('test_verdicts_respect_the_sign')),
)


def apply(edit, folder):
    "Make an edit in a copy; raises `ValueError` where its text does not stand exactly once."
    path = folder/'nbs'/f'{edit.notebook}.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    cells = [c for c in notebook['cells'] if c['cell_type'] == 'code'
             and ''.join(c['source']).startswith('#| export')]
    sources = [''.join(c['source']) for c in cells]
    module = folder/edit.module
    code = module.read_text(encoding='utf-8')
    for where, n in ((path.name, sum(s.count(edit.old) for s in sources)),
                     (module.name, code.count(edit.old))):
        if n != 1: raise ValueError(f'{n} times in {where}: {edit.old!r} ({edit.breaks})')
    for cell, source in zip(cells, sources, strict=True):
        cell['source'] = source.replace(edit.old, edit.new).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + '\n',
                    encoding='utf-8')
    module.write_text(code.replace(edit.old, edit.new), encoding='utf-8')
    compile(module.read_text(encoding='utf-8'), edit.module, 'exec')


def copy_project(folder):
    "Copy what git tracks or would track, as it stands in the checkout."
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT/name).is_file():
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/name, folder/name, follow_symlinks=False)
    return folder


def restore(edit, folder):
    "Take an edit out of a copy."
    for name in (f'nbs/{edit.notebook}.ipynb', edit.module): shutil.copy2(ROOT/name, folder/name)


def run_tests(folder, tests, timeout):
    "Run tests in a copy; return whether they passed, and the first that failed or why none did."
    environment = os.environ | dict(PYTHONPATH=str(folder), OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '--tb=line',
               *tests]
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        try: out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False, f'no end after {timeout} s'
    if process.returncode == 0: return True, ''
    failed = [line.split()[1] for line in out.splitlines() if line.startswith(('FAILED', 'ERROR'))]
    line = re.search(r'/tests/test_\w+\.py:(\d+): ', out)
    if failed: return False, failed[0] + (f', line {line[1]}' if line else '')
    raise RuntimeError(f'pytest ended with {process.returncode} on {" ".join(tests)}:\n{out}')


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='edits with this text in notebook, description')
    parser.add_argument('--check', action='store_true', help='only look whether edits can be made')
    parser.add_argument('--workers', type=int, default=2, help='copies to test side by side')
    parser.add_argument('--timeout', type=int, default=900, help='seconds for the tests of an edit')
    parser.add_argument('--no-baseline', action='store_true',
                        help='do not run the tests on the unedited project first')
    return parser.parse_args()


def check(edits, folder):
    "Make every edit once; end with a list of those that cannot be made."
    wrong = []
    for edit in edits:
        try: apply(edit, folder)
        except (ValueError, SyntaxError, OSError) as e: wrong.append(str(e))
        else: restore(edit, folder)
    if wrong: sys.exit('\n'.join(['These edits do not fit the project any more:', *wrong]))


def baseline(edits, copies, timeout):
    "Run all the tests that are named on the unedited project: else a failure would say nothing."
    tests = sorted({t for e in edits for t in e.tests})
    with ThreadPoolExecutor(len(copies)) as pool:
        parts = [tests[i::len(copies)] for i in range(len(copies))]
        jobs = [pool.submit(run_tests, *of, timeout) for of in zip(copies, parts) if of[1]]
        for passed, why in (job.result() for job in jobs):
            if not passed: sys.exit(f'Without any edit, a test fails already: {why}')


def summary(rows):
    "Count by module, for the table in CONTRIBUTING.md."
    print('\n| module | edits | noticed | survivors |\n| --- | ---: | ---: | --- |')
    modules = list(dict.fromkeys(e.module for e, *_ in rows))
    for module in [*modules, None]:
        own = [r for r in rows if module in (None, r[0].module)]
        left = [e for e, noticed, _ in own if not noticed]
        said = '; '.join(f'{e.breaks}: {e.survives or "NOT EXPLAINED"}' for e in left)
        name = f'`{Path(module).stem}`' if module else 'all'
        print(f'| {name} | {len(own)} | {len(own) - len(left)} | {said if module else len(left)} |')
    commit, date = (subprocess.run(['git', *of], cwd=ROOT, text=True, capture_output=True).stdout
                    .strip() for of in (('rev-parse', '--short=12', 'HEAD'),
                                        ('log', '-1', '--format=%cs')))
    print(f'\nCommit {commit} of {date}')


def main():
    args, start = parse_arguments(), time.perf_counter()
    edits = [e for e in EDITS if args.only in e.notebook or args.only in e.breaks]
    if not edits: sys.exit(f'No edit has {args.only!r} in its notebook or description.')
    with tempfile.TemporaryDirectory() as home:
        copies = [copy_project(Path(home)/f'copy{i}'/'project') for i in range(args.workers)]
        check(edits, copies[0])
        print(f'{len(edits)} edits can be made', flush=True)
        if args.check: return
        if not args.no_baseline:
            baseline(edits, copies, args.timeout * 2)
            seconds = time.perf_counter() - start
            print(f'their tests pass without them ({seconds:.0f} s)', flush=True)
        free, rows, began = SimpleQueue(), [], time.perf_counter()
        for copy in copies: free.put(copy)
        def trial(edit):
            folder = free.get()
            try:
                apply(edit, folder)
                passed, by = run_tests(folder, edit.tests, args.timeout)
                restore(edit, folder)
            finally: free.put(folder)
            return edit, not passed, by
        with ThreadPoolExecutor(args.workers) as pool:
            jobs = [pool.submit(trial, e) for e in edits]
            for i, job in enumerate(as_completed(jobs), 1):
                edit, noticed, by = job.result()
                rows.append((edit, noticed, by))
                left = (time.perf_counter() - began) / i * (len(edits) - i)
                print(f'{i:3}/{len(edits)} {left / 60:5.1f} min left  {edit.notebook}: '
                      f'{edit.breaks}: ' + (f'noticed by {by}' if noticed else 'SURVIVED'),
                      flush=True)
    rows.sort(key=lambda row: edits.index(row[0]))
    summary(rows)
    print(f'{time.perf_counter() - start:.0f} s in all')
    unexplained = [e for e, noticed, _ in rows if not noticed and not e.survives]
    sys.exit(bool(unexplained))


if __name__ == '__main__': main()
