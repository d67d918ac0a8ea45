"""What both builders of the site read: notebooks in _proc/, with what no notebook holds itself.

Numbers in the sidebar and of equations (the paper's keep theirs), minutes to read, links to run the
page, descriptions of pictures, signatures that stand once, and an index of the API.
"""
import ast, html, importlib, json, re
from functools import partial
from pathlib import Path
from cells import headings

KINDS = {'fig': 'Figure', 'tbl': 'Table', 'eq': 'Equation'}
PAPER = {'eq-l0': 1, 'eq-bilevel': 2, 'eq-inner': 3, 'eq-hyper': 4, 'eq-shared': 5, 'eq-fd': 8}
LABEL = r'(?:fig|tbl|eq)-[\w-]*\w'
EQUATION = r'eq-[\w-]*\w'

WORDS, LINES = 200, 25          # prose words and code lines read in a minute
NUMBER = re.compile(r'(\d+[a-z]?)_')
LONG = 30                       # lines of source that are shown at once
SIGNATURE = re.compile(r'(?s)```python\n.*?\n```\n*')
MODULE = r'\b(?:__main__|interference_nb\.\w+|collections\.abc|pathlib|pandas)\.(?=[A-Z])'
join = lambda s: ''.join(s) if isinstance(s, list) else s
text_of = lambda cell: join(cell['source'])

def hidden(source):
    "Say whether a code cell is not shown on its page."
    return bool(re.search(r'(?m)^#\|\s*(hide\b|export\b|exporti\b|default_exp|hide_input|'
                          r'(echo|include):\s*false)', source))

def minutes(nb):
    "Return how long a page takes to read: its prose, and the code that it shows."
    words = lines = 0
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            text = re.sub(r'(?s)<details.*?</details>|\$\$.*?\$\$|```.*?```', ' ', text_of(cell))
            words += len(re.findall(r'\w[\w\'-]*', re.sub(r'\]\([^)]*\)|\{[^}]*\}', ' ', text)))
        elif cell['cell_type'] == 'code' and not hidden(text_of(cell)):
            if re.search(r'(?m)^#\| code-fold: true', text_of(cell)): continue
            lines += sum(1 for l in text_of(cell).splitlines() if l.strip() and l[:2] != '#|')
    return max(1, round(words / WORDS + lines / LINES))

def places(cfg, name):
    "Return links to run a notebook elsewhere: {where: address}."
    at = f'{cfg.user}/{cfg.repo}'
    colab = f'https://colab.research.google.com/github/{at}/blob/{cfg.branch}/nbs/{name}'
    binder = f'https://mybinder.org/v2/gh/{at}/{cfg.branch}?labpath=nbs/{name}'
    return {'Open in Colab': colab, 'Run on Binder': binder}

def info(cfg, name, nb):
    "Return the line under a page's title."
    links = ' · '.join(f'[{where}]({url})' for where, url in places(cfg, name).items())
    n = minutes(nb)
    return f'::: {{.page-info}}\n{n} minute{"s" * (n > 1)} to read · {links}\n:::'

def descriptions():
    "Return what each plot of the package says that it draws: {name: first line}."
    found = {}
    for path in (Path(__file__).parent.parent / 'interference_nb').glob('[!_]*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith('plot_'): continue
            said = (ast.get_docstring(node) or '').splitlines()
            if said: found[node.name] = re.sub(r'\s*\[[^]]*\]\.?$', '', said[0]).rstrip('.')
    return found

def plain(text):
    "Return a caption without its markup, fit for an attribute."
    text = re.sub(r'\]\([^)]*\)|\{#[^}]*\}|@\w+-[\w-]+', '', text).replace('"', "'")
    return ' '.join(re.sub(r'[\[\]`*$\\{}]', '', text).split()).strip(" '")

def alternative(cell, trail, plots):
    "Describe a cell's picture in words: its caption, else what its plot draws, else its heading."
    source = text_of(cell)
    caption = re.search(r'(?m)^#\|\s*fig-cap:\s*(.*)$', source)
    drawn = [plots[name] for name in re.findall(r'\bplot_\w+', source) if name in plots]
    words = [plain(caption[1])] if caption else list(dict.fromkeys(drawn))
    return '. '.join(words) or f'Figure: {plain(trail)}'

def outside_code(f, text, inside=lambda code: code):
    "Apply `f` to a markdown text but not to the code in it."
    parts = re.split(r'(?s)(```.*?```|`[^`\n]*`)', text)
    return ''.join(inside(part) if i % 2 else f(part) for i, part in enumerate(parts))

class Labels:
    "The labelled figures, tables and equations of a page in order; the paper's keep its numbers."
    def __init__(self, sources):
        self.numbers = {}
        for label in re.findall(rf'(?:\{{#|#\|\s*label:\s*)({LABEL})', '\n'.join(sources)):
            kind, known = label.split('-')[0], self.numbers
            n = 1 + sum(other.startswith(f'{kind}-') for other in known if other not in PAPER)
            known[label] = PAPER.get(label, f'M{n}' if kind == 'eq' else n)

    def name(self, label): return f'{KINDS[label.split("-")[0]]} {self.numbers[label]}'

    def refer(self, text, form='[{0}](#{1})', kinds=LABEL):
        "Put a name, and a link, for each `@label` that this page has."
        put = lambda m: form.format(self.name(m[1]), m[1]) if m[1] in self.numbers else m[0]
        return re.sub(rf'(?<![\w@])@({kinds})', put, text)

    def equations(self, text):
        "Number the equations of a markdown text, and resolve the references to them."
        equation = lambda m: (f'::: {{#{m[2]}}}\n$$\n{m[1].strip()} '
                              f'\\tag{{{self.numbers[m[2]]}}}\n$$\n:::')
        text = re.sub(rf'(?s)\$\$((?:(?!\$\$).)*)\$\$\s*\{{#({EQUATION})\}}', equation, text)
        return outside_code(partial(self.refer, kinds=EQUATION), text)

    def markdown(self, text):
        "Number the tables of a markdown cell, and resolve its references."
        caption = lambda m: f': {self.name(m[2])}. {m[1]} {{#{m[2]}}}'
        text = re.sub(rf'(?m)^: (.*?)\s*\{{#({LABEL})\}}', caption, text)
        return outside_code(self.refer, text)

    def code(self, text):
        "Number the caption of a code cell's figure or table."
        m = re.search(rf'(?m)^#\|\s*label:\s*({LABEL})', text)
        if not m: return text
        text = re.sub(r'(?m)^(#\|\s*(?:fig|tbl)-cap:\s*["\']?)', rf'\g<1>{self.name(m[1])}. ', text)
        return re.sub(r'(?m)^#\|.*-cap:.*$', lambda c: self.refer(c[0], '{0}'), text)

def equations(nb):
    "Number a notebook's equations as the paper does: Quarto would count them on each page."
    labels = Labels(map(text_of, nb['cells']))
    refer = partial(outside_code, partial(labels.refer, kinds=EQUATION))
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': cell['source'] = labels.equations(text_of(cell))
        for data in (o.get('data', {}) for o in cell.get('outputs', [])):
            if 'text/markdown' in data: data['text/markdown'] = refer(join(data['text/markdown']))

def elsewhere(nb, folder):
    "Put a figure's name where a link to another page has its label."
    def name(m):
        cells = json.loads((folder / m[2]).read_text(encoding='utf-8'))['cells']
        return f'[{Labels(map(text_of, cells)).name(m[1])}]({m[2]}#{m[1]})'
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = re.sub(rf'\[({LABEL})\]\(([^)#]+)#\1\)', name, text_of(cell))

def describe(nb, plots):
    "Give each picture of a page words for those who do not see it."
    trail = ''
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            trail = [trail, *(title for _, title in headings(text_of(cell)))][-1]
        data = [o.get('data', {}) for o in cell.get('outputs', [])]
        shown = any('image/png' in d for d in data) or any(     # drawings name themselves
            'aria-label' not in join(d.get('image/svg+xml', 'aria-label')) for d in data)
        if shown and not re.search(r'(?m)^#\|\s*fig-alt:', text_of(cell)):
            cell['source'] = f'#| fig-alt: "{alternative(cell, trail, plots)}"\n{text_of(cell)}'

def tidy(text):
    "Write a signature as its source does: a class is one, a type has its name alone."
    text = re.sub(MODULE, '', re.sub(r'<function (\w+) at 0x\w+>', r'\1', text))
    text = re.sub(r'(?s)(```python\n)def ([A-Z]\w*\(.*?\n\))(?:->None)?:', r'\1class \2:', text)
    return re.sub(r'(class \w+)\(\n    \*args, \*\*kwargs\n\):', r'\1:', text)

def once(nb):
    "Show a signature once: in the source where that is short, else above it, the source folded."
    blocks = []                         # the documentation since the last cell, and its names
    for cell in nb['cells']:
        source = text_of(cell)
        if 'show_doc(' in source and '#| echo: false' in source:
            shown = [o['data'] for o in cell.get('outputs', []) if 'text/markdown' in o['data']]
            for data in shown:          # <mask> in a docstring is no tag
                said = join(data['text/markdown'])
                said = outside_code(lambda t: re.sub(r'<(?=\w)', '&lt;', t), said)
                data['text/markdown'] = SIGNATURE.sub(lambda m: tidy(m[0]), said)
            blocks += [(name, data) for name in re.findall(r'show_doc\(([\w.]+)', source)
                       for data in shown]
            continue
        if '#| code-fold: show' in source:
            if source.count('\n') > LONG:
                cell['source'] = source.replace('#| code-fold: show', '#| code-fold: true')
            else:
                for name, data in blocks:       # a cell that is not shown may be documented here
                    if re.search(rf'(?m)^\s*(?:def|class) {name.split(".")[-1]}\b', source):
                        data['text/markdown'] = SIGNATURE.sub('', data['text/markdown'], 1)
        blocks = []

def number(cache):
    "Put a notebook's number before its title in the sidebar."
    config, titles = cache / '_quarto.yml', {}
    for p in cache.rglob('*.ipynb'):
        front = text_of(json.loads(p.read_text(encoding='utf-8'))['cells'][0])
        m = re.search(r'(?m)^title: (.*)$', front)
        if m and (n := NUMBER.match(p.name)):
            titles[p.relative_to(cache).as_posix()] = f'{n[1]} {m[1].strip(chr(39) + chr(34))}'
    def entry(m):
        if m[2] not in titles: return m[0]
        return f'{m[1]}- text: {json.dumps(titles[m[2]], ensure_ascii=False)}\n{m[1]}  href: {m[2]}'
    text = re.sub(r'(?m)^( +)- ([\w/-]+\.ipynb)$', entry, config.read_text(encoding='utf-8'))
    config.unlink()                     # here it may still be a link to the file at the top
    config.write_text(text, encoding='utf-8')

def heads(source, exported):
    "Yield (name, docstring, signature with its comments) of what a module exports."
    lines = source.splitlines()
    def head(node):
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        body = node.body[0]
        end = body.lineno - 1 if body.lineno > node.lineno else node.lineno
        return '\n'.join(lines[start - 1:end]).rstrip()
    for node in ast.parse(source).body:
        if getattr(node, 'name', None) not in exported: continue
        text = head(node)
        if isinstance(node, ast.ClassDef):
            fields = [i for i in node.body if isinstance(i, ast.AnnAssign)]
            parts = [lines[i.lineno - 1:i.end_lineno] for i in fields]
            parts += [head(i).splitlines() for i in node.body if isinstance(i, ast.FunctionDef)
                      and (i.name[0] != '_' or i.name in ('__init__', '__call__'))]
            text += ''.join('\n' + line for part in parts for line in part)
        yield node.name, ast.get_docstring(node) or '', text

def entry(module, name, doc, text):
    "Return a name's place in the index: what it does, and its signature, folded."
    said = re.sub(r'\[@eq-[\w-]+; ', '[', ' '.join(doc.split('\n\n')[0].split()))
    said = re.sub(r'\s*\[?@eq-[\w-]+\]?', '', said)
    said = re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(said))
    return (f'```{{=html}}\n<p class="api" id="{module}.{name}">'
            f'<a href="{module}.html#{name.lower()}"><code>{name}</code></a> '
            f'{said or "Used as it stands."}</p>\n'
            f'<details class="api"><summary>signature of {name}</summary>\n'
            f'<pre>{html.escape(text)}</pre></details>\n'.replace('\n\n', '\n') + '```\n')

def api(cache, lib='interference_nb'):
    "Write the index of the API, by name and by module, into `cache`."
    root, names, parts = Path(__file__).parent.parent / lib, [], []
    pages = {re.sub(r'^\d+[a-z]?_', '', p.stem): p.name for p in cache.glob('*.ipynb')}
    for path in sorted(p for p in root.glob('[!_]*.py') if p.stem in pages):
        module, source = path.stem, path.read_text(encoding='utf-8')
        exported = importlib.import_module(f'{lib}.{module}').__all__
        parts.append(f'## {module} {{#{module}}}\n\nMade in [{pages[module]}]({pages[module]}).\n')
        for found in heads(source, exported):
            names.append((found[0].lower(), f'<a href="#{module}.{found[0]}">{found[0]}</a>'))
            parts.append(entry(module, *found))
    top = ('---\ntitle: API by module and name\ntoc-depth: 2\n'
           'description: What each module exports, with the meaning of every parameter\n---\n\n'
           '## All names {#all-names}\n\n<p class="api-names">'
           f'{" ".join(link for _, link in sorted(names))}</p>\n\n')
    (cache / 'api.qmd').write_text(top + '\n'.join(parts), encoding='utf-8')

def raw_html(nb):
    "Hand HTML outputs on as raw blocks: for others, Quarto adds require.js from a CDN to the page."
    for data in (o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', [])):
        if 'text/html' in data and 'text/markdown' not in data:
            data['text/markdown'] = f'\n```{{=html}}\n{join(data.pop("text/html"))}\n```\n'

def prepare(cache, cfg, quarto=False):
    "Make the pages in `cache` ready for a builder."
    plots = descriptions()
    number(cache)
    for p in sorted(cache.rglob('*.ipynb')):
        nb, name = json.loads(p.read_text(encoding='utf-8')), p.relative_to(cache).as_posix()
        once(nb)
        equations(nb)
        elsewhere(nb, p.parent)
        describe(nb, plots)
        if quarto: raw_html(nb)
        nb['cells'].insert(1, dict(cell_type='markdown', metadata={}, source=info(cfg, name, nb)))
        p.write_text(json.dumps(nb), encoding='utf-8')
    api(cache)
