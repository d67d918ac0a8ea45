"What is made from the notebooks is in step with them, and the package starts light."
import base64, io, json, os, re, shutil, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest
from PIL import Image
from cells import INSTALL, stamps
from execute import stale
from pages import PAPER, Labels, elsewhere, equations, once

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns('.venv*', '.git', '_proc', '_docs', '__pycache__', '*.egg-info',
                                  '.*_cache')

# a path of the machine that ran it
LOCAL = r'(?<![\w.])/(home|root|Users|tmp|var|work|opt|mnt|srv)/\w'

@pytest.fixture(scope='module')
def notebooks():
    hidden = lambda p: any(part[0] in '_.' for part in p.relative_to(ROOT).parts)
    return sorted(p for p in ROOT.glob('nbs/**/*.ipynb') if not hidden(p))

@pytest.fixture
def copy(tmp_path):
    "A copy of the project, so that a failing check leaves nothing changed behind."
    def left_out(folder, names):        # the folder runs/, but not the notebooks of nbs/runs
        return LEFT_OUT(folder, names) | ({'runs'} if Path(folder) == ROOT else set())
    return Path(shutil.copytree(ROOT, tmp_path / 'copy', ignore=left_out, symlinks=True))

def differing(copy, pattern):
    "Name the files matching `pattern` that are not the same here and in the copy."
    names = {p.relative_to(top) for top in (ROOT, copy) for p in top.glob(pattern)}
    read = lambda path: path.read_bytes() if path.exists() else None
    return sorted(str(n) for n in names if read(ROOT / n) != read(copy / n))

def test_package_is_what_the_notebooks_export(copy):
    subprocess.run(['nbdev_export'], cwd=copy, check=True)
    assert not (out := differing(copy, 'interference_nb/*.py')), f'run nbdev_export: {out}'

def test_notebooks_are_clean(copy):
    subprocess.run(['nbdev_clean'], cwd=copy, check=True)
    assert not (out := differing(copy, 'nbs/**/*.ipynb')), f'run nbdev_clean: {out}'

def test_readme_is_what_the_landing_page_says():
    r = subprocess.run([sys.executable, 'tools/make_readme.py', '--check'], cwd=ROOT, text=True,
                       capture_output=True)
    assert r.returncode == 0, r.stdout + r.stderr

def test_the_bottom_line_is_what_the_records_say():
    "Computed anew, so that a change of the statistics shows on the landing page."
    from interference_nb.findings import bottom_line
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    for part in bottom_line(ROOT/'records').split('\n\n'): assert part in readme

def test_sidebar_lists_every_notebook(notebooks):
    config = (ROOT / '_quarto.yml').read_text(encoding='utf-8')
    listed = re.findall(r'(?m)^\s+- ([\w/-]+\.ipynb)$', config)
    assert sorted(listed) == sorted(p.relative_to(ROOT / 'nbs').as_posix() for p in notebooks)

def cells_of(path): return json.loads(path.read_text(encoding='utf-8'))['cells']

def answers_in(cells, chapter):
    "Return what stands under each heading '### 02.3 ... {#sec-02-3}': {3: (quoted, code)}."
    found, n = {}, None
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and n: found[n] = found[n][0], found[n][1] + source + '\n'
        if cell['cell_type'] == 'code': continue
        for part in re.split(r'(?m)^(?=#{2,3} )', source):
            head = re.match(rf'### {chapter}\.(\d+) .*\{{#sec-{chapter}-\1\}}\n', part)
            if part[:2] == '##': n = int(head[1]) if head else None
            if head: found[n] = ' '.join(re.findall(r'(?m)^> (.*)$', part)), ''
    return found

def test_exercises_have_solutions(notebooks):
    "Every exercise has an answer that quotes it and is computed by a cell that asserts it."
    faults, words = [], lambda s: set(re.findall(r'\w+', re.sub(r'\]\([^)]*\)', '', s)))
    for p in notebooks:
        text = '\n\n'.join(''.join(c['source']) for c in cells_of(p))
        link = re.search(r'Solutions: \[[^]]+\]\(([^)#]+)#sec-([\w-]+)\)', text)
        if not link and '## Exercises' in text: faults.append(f'{p.name}: no solutions')
        if not link: continue
        asked = re.findall(r'(?m)^\d+\. (.*)', text.partition('## Exercises')[2])
        cells = cells_of((p.parent / link[1]).resolve())
        if not any(f'{{#sec-{link[2]}}}' in ''.join(c['source']) for c in cells):
            faults.append(f'{p.name}: nothing at {link[1]}#sec-{link[2]}')
        answers = answers_in(cells, link[2])
        if [*answers] != [*range(1, len(asked) + 1)] or not asked:
            faults.append(f'{p.name}: {len(asked)} questions, answers {[*answers]}')
        for (n, (quoted, code)), question in zip(answers.items(), asked):
            if not quoted or words(quoted) - words(question): faults.append(f'{p.name}, {n}: quote')
            if not re.search(r'\bassert |\btest_(eq|close|fail)\(', code):
                faults.append(f'{p.name}, {n}: no test')
        shown = [c['id'] for c in cells if c['cell_type'] == 'code' and not re.search(
            r'(?m)^#\| (code-fold: true|hide$|echo: false)', ''.join(c['source']))]
        if shown: faults.append(f'{link[1]}: {", ".join(shown)} not folded')
    assert not faults, '\n'.join(faults)

def test_every_notebook_brings_the_package_to_a_machine_without_it(notebooks):
    "Colab opens a notebook alone: its first code cell fetches the rest, and goes to its folder."
    for p in notebooks:
        code = [''.join(c['source']) for c in cells_of(p) if c['cell_type'] == 'code']
        if not code or p.stem == 'index': continue
        assert code[0] == INSTALL.format(folder=p.parent.relative_to(ROOT).as_posix()), p.name

def test_glossary_is_linked_from_where_its_words_are_taught(notebooks):
    config = (ROOT / '_quarto.yml').read_text(encoding='utf-8')
    learn = re.search(r'- section: Learn\s+contents:((?:\s+- [\w/-]+\.ipynb)+)', config)[1]
    text = '\n'.join(''.join(c['source']) for name in re.findall(r'- (\S+)', learn)
                     for c in cells_of(ROOT / 'nbs' / name) if c['cell_type'] == 'markdown')
    terms = re.findall(r'<span id="([\w-]+)">', (ROOT / 'nbs/glossary.ipynb').read_text('utf-8')
                       .replace('\\"', '"'))
    assert len(terms) > 20
    assert not set(terms) ^ set(re.findall(r'glossary\.ipynb#([\w-]+)', text))

def headings_of(cells):
    "Yield the lines that are headings, but for those of boxes and of code."
    box = code = False
    for line in '\n'.join(''.join(c['source']) for c in cells[1:]
                          if c['cell_type'] == 'markdown').splitlines():
        if line.startswith('```'): code = not code
        elif line.startswith(':::'): box = line.strip() != ':::'
        elif re.match('#{1,4} ', line) and not box and not code: yield line

def test_sections_have_names_of_their_own_and_pages_end_with_a_summary(notebooks):
    "A link to a section survives its heading; refusals are folded away."
    faults = []
    for p in notebooks:
        cells, here = cells_of(p), p.relative_to(ROOT / 'nbs').as_posix()
        found = [*headings_of(cells)]
        names = [re.search(r'[{]#(sec-[\w-]+)[}]$', line) for line in found]
        faults += [f'{here}: {line} has no name' for line, m in zip(found, names) if not m]
        faults += [f'{here}: two are {name}' for name, n in Counter(
            m[1] for m in names if m).items() if n > 1]
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        if re.search(r'(?m)^(?<!collapse="true"[}]\n)## What it refuses', text):
            faults.append(f'{here}: refusals in the open')
        if here.startswith('solutions/') or p.stem in ('index', 'glossary', 'teach'): continue
        last = [line.split(' {')[0] for line in found if line.startswith('## ')]
        if '## Summary' not in last or {*last[last.index('## Summary') + 1:]} - {'## Exercises'}:
            faults.append(f'{here}: no summary at its end')
    assert not faults, '\n'.join(faults)

def test_saved_outputs_are_fit_to_publish(notebooks):
    "Every notebook holds its outputs, without errors, dead widgets or this machine's paths."
    faults = []
    for p in notebooks:
        nb, size = json.loads(p.read_text(encoding='utf-8')), p.stat().st_size
        outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
        if not outputs and p.stem != 'index': faults.append(f'{p.name}: no outputs saved')
        if size > 500_000: faults.append(f'{p.name}: {size / 1000:.0f} kB')
        if 'widgets' in nb['metadata']: faults.append(f'{p.name}: saved widget state')
        for o in outputs:
            text = json.dumps(o)
            if o['output_type'] == 'error': faults.append(f"{p.name}: saved error {o['ename']}")
            if 'widget-view' in text: faults.append(f'{p.name}: a widget')
            if re.search(LOCAL, text) or f'{ROOT}/' in text:
                faults.append(f'{p.name}: a local path')
    assert not faults, '\n'.join(dict.fromkeys(faults))

def pictures(notebooks):
    "Yield the notebook, the output and the image of each saved picture."
    for p in notebooks:
        for o in (o for c in cells_of(p) for o in c.get('outputs', [])):
            if data := o.get('data', {}).get('image/png'):
                yield p, o, Image.open(io.BytesIO(base64.b64decode(data)))

def test_saved_pictures_are_sharp(notebooks):
    "150 dots or more to each inch that a picture is shown at: text is read on paper and a phone."
    seen, faults = 0, []
    for p, o, image in pictures(notebooks):
        shown = o['metadata'].get('image/png', {}).get('width', image.width)    # of 96 an inch
        dots = min(image.info.get('dpi', (0, 0))[0], 96 * image.width / shown)
        seen += 1
        if dots < 149.5: faults.append(f'{p.name}: {dots:.0f} an inch; run tools/execute.py')
    assert seen > 50 and not faults, '\n'.join(dict.fromkeys(faults))

def test_saved_pictures_have_no_colours_by_default(notebooks):
    "Matplotlib's own blue, orange, green and red would stand for other things in each picture."
    defaults, faults = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)], set()
    for p, _, image in pictures(notebooks):
        colours, palette = image.getcolors(2**24), image.getpalette()
        for n, colour in colours:
            if palette: colour = palette[3 * colour:3 * colour + 3]
            near = min(max(abs(a - b) for a, b in zip(colour, d)) for d in defaults)
            if n > 100 and near < 3: faults.add(p.name)
    assert not faults, sorted(faults)

def test_saved_outputs_are_of_this_code(notebooks):
    "Each output bears the stamp of the code up to its cell (`tools/execute.py --stale` mends it)."
    faults = [f'{p.name}: {cell.id}, {said}' for p in notebooks for cell, said in stale(p)]
    assert not faults, '\n'.join(faults)

def test_a_changed_cell_makes_the_outputs_after_it_stale():
    code = lambda source, **kw: dict(cell_type='code', source=source, **kw)
    slow = lambda cell: 'slow' in cell['source']
    def of(*sources): return [s for _, s in stamps(map(code, sources), slow)]
    before = of('a = 1', '#| slow\nb = a', 'print(a)')
    assert of('a=1  # one', '#| slow\nb = a', 'print( a )') == before      # nothing else runs
    changed = of('a = 2', '#| slow\nb = a', 'print(a)')
    assert [x == y for x, y in zip(before, changed)] == [False, True, False]
    assert of('a = 1', '#| slow\nb = 2 * a', 'print(a)')[1:] != before[1:]
    assert of('a = 1', '#| slow\nb = 2 * a', 'print(a)')[2] == before[2]   # it was left out

def test_a_changed_plot_makes_its_pictures_stale(tmp_path, monkeypatch):
    "What a function of the package drew is stamped with that function's code."
    import cells, execute, nbformat
    cell = nbformat.v4.new_code_cell('plot_sizes(RECORDS)', metadata=dict(ran='', drew=''),
                                     outputs=[nbformat.v4.new_output('stream', text='drawn')])
    nb, path = nbformat.v4.new_notebook(cells=[cell]), tmp_path / 'a.ipynb'
    ((_, cell.metadata['ran']),) = stamps([cell], lambda c: False)
    cell.metadata['drew'] = execute.drawn_by(cell)
    nbformat.write(nb, path)
    assert cell.metadata['drew'] and not [*stale(path)]
    changed = cells.drawing_functions() | dict(plot_sizes='def plot_sizes(): ...')
    monkeypatch.setattr(cells, 'drawing_functions', lambda: changed)
    assert [said for _, said in stale(path)] == ['drawn anew']

def test_pandoc_reads_every_notebook(notebooks):
    "Quarto hands notebooks to pandoc, which refuses results with an empty count."
    for p in notebooks:
        outputs = [o for c in json.loads(p.read_text(encoding='utf-8'))['cells']
                   for o in c.get('outputs', [])]
        assert not any(o.get('execution_count', 1) is None for o in outputs), p.name
    if not (pandoc := shutil.which('pandoc')): pytest.skip('no pandoc found')
    for p in notebooks:
        r = subprocess.run([pandoc, '-f', 'ipynb', '-t', 'html', '--no-highlight', p],
                           capture_output=True, text=True)      # colours are not the question
        assert r.returncode == 0 and len(r.stdout) > 1000, f'{p.name}: {r.stderr[-500:]}'

def blocks_of(tree, found):
    "Count what pandoc made of a text: headings, items, tables, ..., and what nobody wrote."
    if isinstance(tree, list): return [blocks_of(part, found) for part in tree]
    if not isinstance(tree, dict): return
    kind, content = tree.get('t'), tree.get('c')
    found[kind] += 1
    if kind in ('BulletList', 'OrderedList'):
        found['item'] += len(content if kind == 'BulletList' else content[1])
    if kind == 'Cite':
        found['cited'] += not re.match('(fig|tbl|eq)-', content[0][0]['citationId'])
    blocks_of(list(tree.values()), found)

def test_pandoc_sees_the_blocks_that_our_builder_sees(notebooks):
    """Pandoc wants an empty line before a list or heading, and takes @, ^ and ~ for markup: with
    Quarto a page would look different where a text relies on less."""
    if not (pandoc := shutil.which('pandoc')): pytest.skip('no pandoc found')
    for p in notebooks:
        text = '\n\n'.join(''.join(c['source']) for c in cells_of(p)
                           if c['cell_type'] == 'markdown')
        r = subprocess.run([pandoc, '-f', 'markdown', '-t', 'json'], input=text,
                           capture_output=True, text=True, check=True)
        found, bare = Counter(), re.sub(r'(?ms)^ *```.*?^ *```$', '', text)
        blocks_of(json.loads(r.stdout)['blocks'], found)
        count = lambda pattern, text=bare: len(re.findall(pattern, text, re.M))
        written = dict(Header=count('^#{1,6} '), item=count(r'^ *(?:[-*]|\d+[.]) '),
                       Table=count(r'^[|][-:| ]+[|]$'), CodeBlock=count('^ *```', text) // 2,
                       DisplayMath=count(r'[$]{2}') // 2, Div=count('^:{3,} *[{]'),
                       cited=0, Superscript=0, Subscript=0, Strikeout=0)
        assert {kind: found[kind] for kind in written} == written, p.name

def test_equations_are_numbered_alike_for_both_builders(notebooks):
    "Quarto would count the equations of a page; they reach it with the paper's numbers."
    for p in notebooks:
        nb = json.loads(p.read_text(encoding='utf-8'))
        numbers = Labels(''.join(c['source']) for c in nb['cells']).numbers
        equations(nb)
        text = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
        labels = [label for label in numbers if label.startswith('eq-')]
        assert not re.search(r'[$]{2}\s*[{]#|@eq-', text), p.name
        assert [*re.findall(r'(?s)::: [{]#(eq-[\w-]+)[}]\n[$]{2}(?:(?![$]{2}).)*\\tag[{](\w+)[}]',
                            text)] == [(label, str(numbers[label])) for label in labels], p.name

def test_a_signature_goes_where_its_source_is_shown():
    "It goes for what the next cell defines, not for a neighbour whose cell is hidden."
    doc = lambda name, said='': dict(
        cell_type='code', source=f'#| echo: false\nshow_doc({name})', outputs=[dict(data={
            'text/markdown': f'### {name}\n\n```python\ndef {name}(\n    x:__main__.B=<function f '
                             f'at 0x7f01>\n)->None:\n```\n\n*Hide <mask>. {said}*'})])
    nb = dict(cells=[doc('hidden'), doc('shown'),
                     dict(cell_type='code', source='#| code-fold: show\ndef shown(x): pass'),
                     doc('Kind'), doc('Bare'), dict(cell_type='markdown', source='')])
    bare = nb['cells'][4]['outputs'][0]['data']
    bare['text/markdown'] = '```python\ndef Bare(\n    *args, **kwargs\n):\n```'
    once(nb)
    texts = [c['outputs'][0]['data']['text/markdown'] for c in nb['cells'] if 'outputs' in c]
    assert 'def hidden(\n    x:B=f\n)->None:' in texts[0] and 'def' not in texts[1]
    assert 'class Kind(\n    x:B=f\n):' in texts[2] and 'class Bare:' in texts[3]
    assert all('Hide &lt;mask>' in text for text in texts[:3])

def test_a_figure_of_another_page_has_its_number_there(tmp_path):
    there = [dict(cell_type='code', source=f'#| label: fig-{name}') for name in 'ab']
    (tmp_path / 'there.ipynb').write_text(json.dumps(dict(cells=there)))
    source = 'in [fig-b](there.ipynb#fig-b), [b](there.ipynb#fig-b)'
    cell = dict(cell_type='markdown', source=source)
    elsewhere(dict(cells=[cell]), tmp_path)
    assert cell['source'] == 'in [Figure 2](there.ipynb#fig-b), [b](there.ipynb#fig-b)'

def test_equations_have_the_papers_numbers(notebooks):
    "An equation that the text beside it calls Eq. n is printed as n; ours are M1, M2, ..."
    beside = r'Eq\. (\d)\][^$]{0,60}\$\$((?:(?!\$\$).)*)\$\$[ \t]*(?:\{#(eq-[\w-]+)\})?'
    found, ours = {}, []
    for p in notebooks:
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        sources = [''.join(c['source']) for c in cells]
        labels = Labels(sources).numbers
        for n, _, label in re.findall(f'(?s){beside}', '\n'.join(sources)):
            if label: found[label] = int(n)
        mine = [n for label, n in labels.items() if label[:3] == 'eq-' and label not in PAPER]
        assert mine == [f'M{i + 1}' for i in range(len(mine))], p.name
        ours += mine
        cited = re.findall(r'\[paper[^]]*?Eq\. (\d+)|\\tag\{(\w+)\}', '\n'.join(sources))
        assert all(1 <= int(a or b) <= 8 for a, b in cited), p.name
    assert ours and found.items() <= PAPER.items(), found
    assert {'eq-inner', 'eq-shared'} <= found.keys()

def test_bare_import_needs_torch_and_numpy_only():
    "The package and its components start light; what else they need waits until it is needed."
    lib = ROOT / 'interference_nb'
    drawing = ('records', 'claims', 'capacity', 'reproduce', 'findings', 'figures', 'drawings',
               'cli')
    modules = [p.stem for p in lib.glob('[!_]*.py') if p.stem not in drawing]
    code = f'''
import importlib, importlib.metadata, sys, time, torch, numpy
start, known = time.process_time(), set(sys.modules)
for name in {sorted(modules)}: importlib.import_module('interference_nb.' + name)
took = time.process_time() - start
tops = {{name.partition('.')[0] for name in set(sys.modules) - known}}
installed = importlib.metadata.packages_distributions()
ours = {{'interference_nb', 'torch', 'numpy'}}
print(took, *sorted(tops & installed.keys() - ours))
'''
    r = subprocess.run([sys.executable, '-c', code], cwd='/', text=True, capture_output=True,
                       env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    seconds, *extra = r.stdout.split()
    assert not extra, f'importing the components also imports {extra}'
    assert float(seconds) < 2, f'importing the components takes {seconds} s after torch'

def test_first_cell_holds_title_and_subtitle_only(notebooks):
    "nbdev makes front matter of the first cell: what else stood there would be missing."
    source = lambda p: ''.join(json.loads(p.read_text(encoding='utf-8'))['cells'][0]['source'])
    title = r'# [^\n]+\n+> [^\n]+\n*'
    assert not (out := [p.name for p in notebooks if not re.fullmatch(title, source(p))]), out

ONE_PAGE = sorted(p.name for p in (ROOT / 'records').iterdir() if (p / 'table.md').exists())

@pytest.mark.parametrize('name', ONE_PAGE)
def test_page_beside_records_is_what_they_say(name):
    from interference_nb.reproduce import causes_page, demo_page
    page = (ROOT / 'records' / name / 'table.md').read_text(encoding='utf-8')
    write = causes_page if name.startswith('causes') else demo_page
    assert page == write(ROOT / 'records' / name)

def test_tables_beside_records_are_what_they_say(tmp_path, monkeypatch):
    from interference_nb import figures
    from interference_nb.cli import main
    monkeypatch.setattr(figures, 'svg', lambda figure, _: figures.plt.close(figure) or '')
    folder, made = ROOT / 'records' / 'reproduce-toy', tmp_path / 'toy'
    made.mkdir()
    shutil.copy(folder / 'records.jsonl.xz', made)
    main(['reproduce', 'all', '--scale', 'toy', '--write-only', '--out', str(made)])
    pages = sorted(folder.glob('*.md'))
    assert len(pages) == 12
    assert not (out := [p.name for p in pages if (made / p.name).read_text() != p.read_text()]), out


@pytest.mark.skipif(not shutil.which('make'), reason='no make')
@pytest.mark.parametrize('user', ['0', '1000'])
def test_lab_starts_for_root_too_and_takes_options(user, tmp_path):
    "In a container everybody is root, whom JupyterLab refuses without a flag."
    (tmp_path/'id').write_text(f'#!/bin/sh\necho {user}\n')
    (tmp_path/'id').chmod(0o755)
    r = subprocess.run(['make', '-n', 'lab', 'ARGS=--port=1234'], cwd=ROOT, text=True, check=True,
                       capture_output=True, env=os.environ | dict(
                           PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'))
    line, = (l for l in r.stdout.splitlines() if 'jupyter lab' in l)
    assert line.endswith('--port=1234') and ('--allow-root' in line) == (user == '0')

def test_every_fault_of_the_mutants_can_be_put_in():
    subprocess.run([sys.executable, 'tests/mutants.py', '--check'], cwd=ROOT, check=True)

def test_what_building_leaves_is_ignored():
    ignored = (ROOT/'.gitignore').read_text(encoding='utf-8').split()
    assert {'build/', 'dist/'} <= {*ignored}

def test_workflows_may_do_no_more_than_they_must():
    "Rights job by job, no token left in a checkout, actions by commit; the Pythons that are run."
    import yaml
    for path in (ROOT/'.github/workflows').glob('*.y*ml'):
        flow = yaml.safe_load(path.read_text(encoding='utf-8'))
        assert flow['permissions'] == {}, path
        steps = [s for job in flow['jobs'].values() for s in job.get('steps', ())]
        assert all(job['permissions'] for job in flow['jobs'].values())
        for used in (s['uses'] for s in steps if 'uses' in s):
            assert re.fullmatch(r'[\w.-]+/[\w./-]+@[0-9a-f]{40}', used), used
        assert all(s['with']['persist-credentials'] is False for s in steps
                   if s.get('uses', '').startswith('actions/checkout'))
        deployed = [s['run'] for s in flow['jobs'].get('site', {}).get('steps', ()) if 'run' in s]
        assert deployed == ['make docs ARGS=--smalldocs']           # what the tests look at
        pythons = flow['jobs']['test']['strategy']['matrix']['python']
        assert pythons[0] == re.search(r'min_python = (\S+)',
                                       (ROOT/'settings.ini').read_text())[1] and len(pythons) > 2
