"What a package index would hold can be built, read and used without the checkout."
import configparser, os, re, shutil, subprocess, sys, tarfile, zipfile
import pytest
from test_project import LEFT_OUT, ROOT

def build(kind, folder, out):
    "Let setuptools make an 'sdist' or a 'wheel' of a folder, as pip does; return its path."
    code = f'import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))'
    r = subprocess.run([sys.executable, '-c', code], cwd=folder, text=True, capture_output=True)
    assert r.returncode == 0, r.stderr
    return out / r.stdout.splitlines()[-1]

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel made from the unpacked sdist of a copy of the project."
    tmp = tmp_path_factory.mktemp('package')
    copy = shutil.copytree(ROOT, tmp/'copy', symlinks=True, ignore=lambda folder, names: {
        *LEFT_OUT(folder, names), *(n for n in ('records', 'runs', 'nbs') if n in names)})
    with tarfile.open(build('sdist', copy, tmp)) as f:      # Python 3.11.2 has no filters yet
        f.extractall(tmp/'source', **dict(filter='data') if hasattr(tarfile, 'data_filter') else {})
    source, = (tmp/'source').iterdir()
    return build('wheel', source, tmp)

def test_a_wheel_made_from_the_sdist_runs_the_demo(wheel, tmp_path):
    home, empty = tmp_path/'site', tmp_path/'empty'
    with zipfile.ZipFile(wheel) as f: f.extractall(home)
    empty.mkdir()
    code = 'from interference_nb import cli; print(cli.__file__); cli.main()'
    r = subprocess.run([sys.executable, '-c', code, 'demo', '--steps', '20', '--seeds', '1',
                        '--systems', 'joint', '--tasks', 'ner', '--out', 'out'], cwd=empty,
                       text=True, encoding='ascii', capture_output=True,
                       env=os.environ | {'PYTHONPATH': str(home), 'PYTHONIOENCODING': 'ascii'})
    assert r.returncode == 0, r.stderr              # such a terminal cannot show it all
    assert not (empty/'out/table.md').read_text('utf-8').isascii()
    assert r.stdout.startswith(str(home))           # not the checkout
    assert {'table.md', 'figure.svg'} <= {p.name for p in (empty/'out').iterdir()}

def test_metadata_tells_what_an_index_shows(wheel):
    with zipfile.ZipFile(wheel) as f:
        name, = (n for n in f.namelist() if n.endswith('METADATA'))
        about, _, readme = f.read(name).decode().partition('\n\n')
    assert 'License-Expression: Apache-2.0' in about and 'Project-URL: Documentation' in about
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    own = {k for k in settings['DEFAULT'] if k.endswith('_requirements')}
    assert {f'{k}_requirements' for k in re.findall('Provides-Extra: (.+)', about)} == own
    named = {k for p in (ROOT/'interference_nb').glob('*.py')        # by messages: pip install ...
             for k in re.findall(r"interference_nb\[(\w+)\]'|require_package\([^)]+, '(\w+)'\)",
                                 p.read_text(encoding='utf-8'))}
    named = {a or b for a, b in named}
    assert {'tensorboard', 'transformers'} <= named
    for p in (*(ROOT/'interference_nb').glob('*.py'), *(ROOT/'nbs').rglob('*.ipynb')):
        assert not re.search(r"(?<!')interference_nb\[", p.read_text(encoding='utf-8')), p  # zsh
    assert {f'{k}_requirements' for k in named} <= own
    links = re.findall(r'\]\(([^)\s]+)', readme)
    assert links and not [l for l in links if not l.startswith(('https://', '#'))]
    assert readme.startswith('# ')


def test_every_requirement_is_imported_and_every_import_is_required():
    "What the package needs, no more and no less; what only some commands need is an extra."
    import ast
    from pathlib import Path
    import interference_nb
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
    def names(key): return {re.split('[<>=]', w)[0].lower() for w in cfg['DEFAULT'][key].split()}
    found = set()
    for path in Path(interference_nb.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): found |= {a.name.split('.')[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split('.')[0])
    found = {m.lower() for m in found - {'interference_nb', *sys.stdlib_module_names}}
    extras = {'transformers', 'submitit', 'tokenizers', 'sacremoses'}
    assert names('requirements') - found <= {'tabulate'}          # pandas asks for it
    assert found - names('requirements') <= extras


def test_versions_are_bounded_on_both_sides():
    "What was tried, and no next major version: its interface changes. torch: its private names."
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    own = cfg['DEFAULT']
    named = {re.match(r'[\w-]+', w)[0].lower(): w for k in own if k.endswith('requirements')
             and k not in ('dev_requirements', 'test_requirements') for w in own[k].split()}
    for name in ('transformers', 'datasets', 'accelerate', 'tyro', 'peft'):
        assert '>=' in named[name] and '<' in named[name], named[name]
    assert all('=' in w for w in named.values()), named


def cells_of_05():
    "The code of 05 that runs everywhere."
    import nbformat
    from cells import skip_flags, why_skipped
    from nbdev.process import extract_directives
    cells = nbformat.read(ROOT/'nbs/05_meta_adapters.ipynb', as_version=4).cells
    flags = skip_flags()
    return [c for c in cells if c.cell_type == 'code' and not why_skipped(
        extract_directives(nbformat.from_dict(dict(c)), remove=False), flags)]

def test_05_looks_for_no_repository(tmp_path, monkeypatch):
    """Alone beside the installed package, as in Colab, it says what it does without.

    Its imports and the cells that read records are run; no other cell may name a path."""
    import ast
    (tmp_path/'empty').mkdir()
    monkeypatch.chdir(tmp_path/'empty')
    monkeypatch.setitem(sys.modules, 'fastcore.test', None)         # not what the package needs
    inside, space = ('Import', 'ImportFrom', 'FunctionDef', 'Try'), {}
    for cell in cells_of_05():
        kinds = {type(node).__name__ for node in ast.parse(cell.source).body}
        reads = 'record' in cell.source and '../' in cell.source
        if reads or 'bottom_line' in cell.source or kinds <= {*inside} and 'Import' in str(kinds):
            exec(cell.source, space)
        else: assert not re.search(r'\.\./|Path\(["\x27]|open\(["\x27]', cell.source), cell.source
    assert space['said'].startswith('No records here: they are in the repository')
    assert not space['record'].is_dir() and 'bottom_line' in space
    space['test_eq'](space['torch'].ones(2), [1., 1.])
    space['test_close'](1., 1 + 1e-6)
    for wrong in (lambda: space['test_eq']({'a': 1}, {'a': 2}), lambda: space['test_close'](1., 2)):
        with pytest.raises(AssertionError): wrong()

@pytest.mark.skipif('slow' not in os.environ.get('NBDEV_FLAGS', ''), reason='two minutes; slow')
def test_05_runs_alone(wheel, tmp_path, monkeypatch):
    "The whole of it, in an empty folder, with the wheel and without fastcore."
    import nbformat
    from nbclient import NotebookClient
    with zipfile.ZipFile(wheel) as f: f.extractall(tmp_path/'site')
    (tmp_path/'site/fastcore').mkdir()
    (tmp_path/'site/fastcore/__init__.py').write_text("raise ImportError('not here')")
    (tmp_path/'empty').mkdir()
    monkeypatch.setenv('PYTHONPATH', str(tmp_path/'site'))
    monkeypatch.setenv('NBDEV_FLAGS', '')
    nb = nbformat.v4.new_notebook(cells=[*cells_of_05(), nbformat.v4.new_code_cell(
        'import interference_nb; print(interference_nb.__file__)')])
    NotebookClient(nb, timeout=600, kernel_name='python3',
                   resources=dict(metadata=dict(path=str(tmp_path/'empty')))).execute()
    assert nb.cells[-1].outputs[0].text.startswith(str(tmp_path))
