"""The live layer of the figures: the cells for ipywidgets, which no saved notebook has run.

Each is run here with a stand-in that calls its plot at three values of every control; one is run
in JupyterLab, where a browser moves its slider.
"""
import json, os, socket, subprocess, sys, urllib.error, urllib.request
from pathlib import Path
import matplotlib
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from interference_nb import figures
from browsers import NEEDED
from waiting import LIMIT, wait_for

ROOT = Path(__file__).parent.parent
NAME = '25_meta_step.ipynb'
FIGS = sorted((ROOT / 'nbs' / 'figs').glob('[0-9]*.ipynb'))

def settings(control):
    "Return the value ipywidgets starts at, and up to three that the control can be moved to."
    if isinstance(control, bool): return control, [control, not control]
    if isinstance(control, tuple):
        low, high, step = control
        middle = low + round((high - low) / 2 / step) * step
        return middle, [low, middle, high]
    values = list(control)
    return values[0], values[:3]

@pytest.mark.parametrize('path', FIGS, ids=lambda p: p.stem)
def test_live_cells_follow_their_controls(path, monkeypatch):
    matplotlib.use('Agg')
    found = []
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(figures, 'live', lambda plot, **controls: found.append((plot, controls)))
    monkeypatch.setattr(figures, 'slider', lambda *args, **kw: None)
    monkeypatch.setattr(figures, 'shapes', lambda fig: [object()])         # tested in the notebook
    names = {'__name__': 'notebook'}
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or 'shapes(' in source: continue
        exec(compile(TransformerManager().transform_cell(source), path.name, 'exec'), names)
    monkeypatch.undo()
    assert found, 'no live cell'
    monkeypatch.chdir(path.parent)
    for plot, controls in found:
        start = {name: settings(control)[0] for name, control in controls.items()}
        for name, control in controls.items():
            pictures = [figures.shapes(plot(**start | {name: v})) for v in settings(control)[1]]
            assert all(a != b for a, b in zip(pictures, pictures[1:])), f'{name} changes nothing'

@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a copy of a figure's notebook (less the frames of its sliders), without news."
    pytest.importorskip('jupyterlab')
    (tmp_path / 'nbs' / 'figs').mkdir(parents=True)
    nb = json.loads((FIGS[0].parent / NAME).read_text(encoding='utf-8'))
    slow = lambda cell: any(f in ''.join(cell['source']) for f in ('slider(', 'shapes('))
    nb['cells'] = [c | dict(outputs=[]) if c['cell_type'] == 'code' else c
                   for c in nb['cells'] if not slow(c)]
    (tmp_path / 'nbs' / 'figs' / NAME).write_text(json.dumps(nb))
    for name, setting in {'notebook-extension/tracker': {'windowingMode': 'none'},
                          'apputils-extension/notification': {'fetchNews': 'false'}}.items():
        file = tmp_path / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(setting))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    env = os.environ | {'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'} | {
        f'JUPYTER_{k}_DIR': str(tmp_path / k.lower()) for k in ('CONFIG', 'RUNTIME')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root',
               f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=',
               f'--ServerApp.root_dir={tmp_path / "nbs"}',
               f'--LabApp.user_settings_dir={tmp_path / "settings"}',
               f'--LabApp.workspaces_dir={tmp_path / "workspaces"}']
    with open(tmp_path / 'log', 'wb') as log:
        server = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log,
                                  stderr=subprocess.STDOUT)
    try:
        url = f'http://127.0.0.1:{port}'
        def answers():
            try: urllib.request.urlopen(f'{url}/api').close()
            except (urllib.error.URLError, ConnectionError): return False
            return True
        wait_for(answers, server, lambda: (tmp_path / 'log').read_text()[-3000:])
        yield url
    finally:
        server.terminate()                                  # it ends its kernels, too
        try: server.wait(LIMIT)
        except subprocess.TimeoutExpired: server.kill()

@NEEDED
def test_a_slider_moves_its_picture_in_jupyterlab(lab, browser):
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.set_default_timeout(LIMIT * 1000)
    page.goto(f'{lab}/lab/tree/figs/{NAME}')
    page.get_by_text('(ipykernel) | Idle').wait_for()       # before that it asks for a kernel
    page.get_by_text('Run', exact=True).first.click()
    page.get_by_text('Run All Cells', exact=True).click()
    picture = page.locator('.widget-interact img')
    picture.first.wait_for()
    before = picture.first.get_attribute('src')
    page.locator('.widget-interact .noUi-handle').first.focus()
    for _ in range(4): page.keyboard.press('ArrowRight')
    changed = "src => document.querySelector('.widget-interact img')?.src != src"
    page.wait_for_function(changed, arg=before)
    assert picture.count() == 1                             # drawn anew, not once more
    page.close()
