"""Run notebooks in a live kernel and save their outputs.

    python tools/execute.py [NOTEBOOK ...]     default: every notebook under nbs/

    python tools/execute.py --stale            those whose outputs are older than their code

Cells that nbdev_test skips (`#| eval: false`, and the flags in `tst_flags`) are not run and keep
the outputs they have; `NBDEV_FLAGS="slow gpu"` runs the cells with these flags too. A notebook that
fails is left as it was.

Each cell with outputs keeps a stamp of the code that made them (`ran` in its metadata): of its own
and of all cells before it. Where functions of the package draw for it, `drew` is a stamp of these.
A test compares the stamps with the code.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')       # small models: more threads stand in the way
os.environ['MATPLOTLIBRC'] = os.path.join(os.path.dirname(__file__), 'matplotlibrc')

import base64, io, re, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives
from cells import drawn_by, skip_flags, stamps, why_skipped

ANSI = re.compile(r'\x1b\[[0-9;]*m')
WIDGET = 'application/vnd.jupyter.widget-view+json'

def skipped(cell, flags):
    "Say whether nbdev_test would skip this code cell."
    return why_skipped(extract_directives(nbformat.from_dict(dict(cell)), remove=False), flags)

class Client(NotebookClient):
    "A notebook client that leaves out the cells it is told to."
    leave_out = frozenset()
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.id in self.leave_out: return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)

def merge_streams(outputs):
    "Join neighbouring pieces of one stream: a kernel cuts printed text wherever its clock falls."
    merged = []
    for o in outputs:
        last = merged[-1] if merged else {}
        if o.output_type == 'stream' and last.get('name') == o.name: last.text += o.text
        else: merged.append(o)
    return merged

def without_counts(outputs):
    "Say `display_data` of results: nbdev_clean empties their counts, which pandoc then refuses."
    for o in outputs:
        if o['output_type'] != 'execute_result': continue
        o['output_type'] = 'display_data'
        o.pop('execution_count', None)
    return outputs

def small_pictures(outputs):
    "Save each picture in 256 colours, and say at which size it is meant to be seen."
    from PIL import Image
    for o in outputs:
        if 'image/png' not in (data := o.get('data', {})): continue
        image = Image.open(io.BytesIO(base64.b64decode(data['image/png'])))
        dpi = image.info.get('dpi', (96, 96))
        out = io.BytesIO()
        paper = Image.new('RGBA', image.size, 'white')
        flat = Image.alpha_composite(paper, image.convert('RGBA')).convert('RGB')
        flat.quantize(256, dither=0).save(out, 'png', optimize=True, dpi=dpi)
        data['image/png'] = base64.b64encode(out.getvalue()).decode()
        width, height = (round(n * 96 / d) for n, d in zip(image.size, dpi, strict=True))
        o.setdefault('metadata', {})['image/png'] = dict(width=width, height=height)
    return outputs

def never_run(cell):
    "Say whether ordinary runs leave this code cell out, whatever flags are set now."
    return skipped(cell, set(get_config().tst_flags.split()))

def stale(path):
    "Yield cells whose outputs no stamp (None) or another code's stamp vouches for, and that stamp."
    for cell, stamp in stamps(nbformat.read(path, as_version=4).cells, never_run):
        if not cell.outputs: continue
        if (said := cell.metadata.get('ran')) != stamp: yield cell, said
        elif cell.metadata.get('drew', drawn := drawn_by(cell)) != drawn: yield cell, 'drawn anew'

def faults(nb):
    "Name what a saved notebook must not hold: this machine's paths, and widgets (dead on a page)."
    here = [str(Path.cwd()), str(Path.home()) + os.sep]
    for i, cell in enumerate(nb.cells):
        for o in cell.get('outputs', []):
            if any(path in str(o) for path in here): yield f'cell {i}: an absolute path in it'
            if WIDGET in o.get('data', {}): yield f'cell {i}: a widget; mark it `#| eval: false`'

def finished(outputs):
    "Make what a cell has put out fit to be saved."
    return small_pictures(without_counts(merge_streams(outputs)))

def run(path, flags, timeout=1200):
    "Run the notebook at `path`, save it, and return what is wrong with its outputs."
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == 'code']
    keep = {c.id: c.get('outputs', []) for c in code if skipped(c, flags)}
    client = Client(nb, timeout=timeout, kernel_name='python3', store_widget_state=False,
                    record_timing=False, extra_arguments=['--log-level=ERROR'],
                    resources={'metadata': {'path': str(path.parent)}})
    client.leave_out = frozenset(keep)
    client.execute()
    for c, stamp in stamps(nb.cells, never_run):
        c.outputs = keep[c.id] if c.id in keep else finished(c.outputs)
        if c.id not in keep: c.metadata.update(ran=stamp, drew=drawn_by(c))
        if not c.outputs: c.metadata.pop('ran', None)
        if not c.outputs or not c.metadata.get('drew'): c.metadata.pop('drew', None)
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)
    return sorted(set(faults(nb)))

def main():
    paths = [Path(p) for p in sys.argv[1:] if p != '--stale'] or sorted(nbglob(as_path=True))
    if '--stale' in sys.argv: paths = [p for p in paths if any(True for _ in stale(p))]
    flags, failed = skip_flags(), False
    for path in paths:
        start = time.time()
        try: found = run(path, flags)
        except CellExecutionError as e: found = ['failed, not saved', ANSI.sub('', str(e))]
        size = path.stat().st_size / 1000
        print(f'{path.name}: {time.time() - start:.1f} s, {size:.0f} kB', *found, sep='\n  ')
        failed |= bool(found)
    sys.exit(failed)

if __name__ == '__main__': main()
