"""Run a notebook as nbdev_test does and report every cell, for the tests.

    python tools/run_cells.py NOTEBOOK REPORT

REPORT gets a line of JSON as each cell starts and ends, so it tells where a process died, too.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')       # before torch: small models, neighbours at work
os.environ['IN_TEST'] = '1'                         # as nbdev_test tells fastcore

import json, sys, time, traceback
from pathlib import Path
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from cells import skip_flags, why_skipped

def trace(error):
    "Return the error's traceback from the cell on, without the machinery that ran the cell."
    tb = error.__traceback__
    while tb and not tb.tb_frame.f_code.co_filename.startswith('<ipython-input'): tb = tb.tb_next
    return ''.join(traceback.format_exception(type(error), error, tb))

def main(path, report):
    path = Path(path).absolute()
    sys.path.insert(0, str(get_config().config_path))
    head = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    skip_all = str(getattr(head, 'frontmatter_', {}).get('skip_exec', '')).lower() == 'true'
    cells, flags = NBProcessor(path).nb.cells, skip_flags()
    os.chdir(path.parent)
    shell = CaptureShell(path)
    with open(report, 'w', encoding='utf-8', buffering=1) as out:
        say = lambda **kw: print(json.dumps(kw), file=out)
        for i, cell in enumerate(cells):
            if cell.cell_type != 'code' or skip_all or 'nbdev_export(' in cell.source: continue
            if why_skipped(cell.directives_, flags): continue
            say(cell=i, status='started')
            start = time.perf_counter()
            shell.cell(cell)
            seconds = time.perf_counter() - start
            if e := shell.exc:
                return say(cell=i, status='failed', error=repr(e), traceback=trace(e))
            say(cell=i, status='passed', seconds=seconds)
        say(cell=len(cells), status='end')

if __name__ == '__main__': main(*sys.argv[1:])
