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
    with tarfile.open(build('sdist', copy, tmp)) as f: f.extractall(tmp/'source', filter='data')
    source, = (tmp/'source').iterdir()
    return build('wheel', source, tmp)

def test_a_wheel_made_from_the_sdist_runs_the_demo(wheel, tmp_path):
    home, empty = tmp_path/'site', tmp_path/'empty'
    with zipfile.ZipFile(wheel) as f: f.extractall(home)
    empty.mkdir()
    code = 'from interference_nb import cli; print(cli.__file__); cli.main()'
    r = subprocess.run([sys.executable, '-c', code, 'demo', '--steps', '20', '--seeds', '1',
                        '--systems', 'joint', '--tasks', 'ner', '--out', 'out'], cwd=empty,
                       env=os.environ | {'PYTHONPATH': str(home)}, text=True, capture_output=True)
    assert r.returncode == 0, r.stderr
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
             for k in re.findall(r"interference_nb\[(\w+)\]'", p.read_text(encoding='utf-8'))}
    assert 'tensorboard' in named and {f'{k}_requirements' for k in named} <= own
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
