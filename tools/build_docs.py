"""Build the site into _docs/ from the top-level _quarto.yml.

    python tools/build_docs.py               Quarto where it is installed, else smalldocs
    python tools/build_docs.py --smalldocs   always smalldocs: pure Python, no network

smalldocs reads the folder that Quarto would (_proc/, the notebooks as nbdev processed them). What
Quarto does and smalldocs does not is done here: output-file names, numbered figures, tables and
equations with references to them, mathematics and fonts without a network, search in a page opened
from disk.
"""
import ast, inspect, json, re, shutil, subprocess, sys, time
from functools import partial
from fastcore import docments
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

KINDS = {'fig': 'Figure', 'tbl': 'Table', 'eq': 'Equation'}
LABEL = r'(?:fig|tbl|eq)-[\w-]*\w'
CODE = r'<code>\1</code>'
TOC = r'(<a href="#([\w-]+)"[^>]*class="nav-link"[^>]*>)[^<]*\\[^<]*</a>'     # with TeX in it
METHOD = r'(<a href=")([\w./-]*)#(\w+\.[\w.]+)"'
KATEX = r'https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist'

join = lambda s: ''.join(s) if isinstance(s, list) else s

def needed_for_docs(cell):
    "Say whether an API block needs this cell run: what is exported, shown, or only imports."
    directives = cell.directives_
    if cell.cell_type != 'code' or directives.get('eval:', [''])[0].lower() == 'false': return False
    if directives.keys() & {'export', 'exports', 'exporti', 'exec_doc'}: return True
    body = [node for tree in cell.parsed_() or [] for node in getattr(tree, 'body', [tree])]
    shown = any(isinstance(n, ast.Expr) and ast.unparse(n).startswith('show_doc') for n in body)
    return shown or bool(body) and all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)

def signature(symbol, **kwargs):
    "Return a signature though it names types unknown here, as those inherited from torch may."
    try: return inspect.signature(symbol, **kwargs)
    except NameError: return inspect.signature(symbol, **kwargs | {'eval_str': False})

def process():
    "Let nbdev process the notebooks (directives, API blocks, links) into _proc/."
    # Of itself nbdev runs every cell that imports something somewhere, a whole demonstration
    # perhaps. In one process torch is imported once.
    processors._do_eval = needed_for_docs
    docments.signature = signature
    refresh_quarto_yml()                 # nbs/nbdev.yml: title, address and output folder
    _build_modidx()
    return proc_nbs(force=True, n_workers=0)

def rename(cache):
    "Give each notebook the name in its `output-file`, as Quarto does, and follow it in every link."
    names, config = {}, cache / '_quarto.yml'
    for p in sorted(cache.rglob('*.ipynb')):
        m = re.search(r'output-file: ([^\s"\\]+)\.html', p.read_text(encoding='utf-8'))
        if m and m[1] != p.stem: names[p.name] = f'{m[1]}.ipynb'
    follow = lambda m: m[1] + names.get(m[2], m[2])
    yml = re.sub(r'(\s|/)([\w-]+\.ipynb)', follow, config.read_text(encoding='utf-8'))
    config.unlink()                     # here it may still be a link to the file at the top
    config.write_text(yml, encoding='utf-8')
    for p in sorted(cache.rglob('*.ipynb')):
        text = re.sub(r'output-file: [^\s"\\]+\.html\\n', '', p.read_text(encoding='utf-8'))
        text = re.sub(r'((?:\]\(|href=\\?["\'])(?:[\w./-]*/)?)([\w-]+\.ipynb)', follow, text)
        p.write_text(text, encoding='utf-8')
        if p.name in names: p.rename(p.with_name(names[p.name]))

def outside_code(f, text, inside=lambda code: code):
    "Apply `f` to a markdown text but not to the code in it."
    parts = re.split(r'(?s)(```.*?```|`[^`\n]*`)', text)
    return ''.join(inside(part) if i % 2 else f(part) for i, part in enumerate(parts))

class Labels:
    "The labelled figures, tables and equations of a page, numbered in order."
    def __init__(self, sources):
        self.numbers = {}
        for label in re.findall(rf'(?:\{{#|#\|\s*label:\s*)({LABEL})', '\n'.join(sources)):
            kind = label.split('-')[0]
            self.numbers[label] = 1 + sum(other.startswith(f'{kind}-') for other in self.numbers)

    def name(self, label): return f'{KINDS[label.split("-")[0]]} {self.numbers[label]}'

    def refer(self, text, form='[{0}](#{1})'):
        "Put a name, and a link, for each `@label` that this page has."
        put = lambda m: form.format(self.name(m[1]), m[1]) if m[1] in self.numbers else m[0]
        return re.sub(rf'(?<![\w@])@({LABEL})', put, text)

    def markdown(self, text):
        "Number the equations and tables of a markdown cell, and resolve its references."
        equation = lambda m: (f'::: {{#{m[2]}}}\n$$\n{m[1].strip()} '
                              f'\\tag{{{self.numbers[m[2]]}}}\n$$\n:::')
        text = re.sub(rf'(?s)\$\$((?:(?!\$\$).)*)\$\$\s*\{{#({LABEL})\}}', equation, text)
        caption = lambda m: f': {self.name(m[2])}. {m[1]} {{#{m[2]}}}'
        text = re.sub(rf'(?m)^: (.*?)\s*\{{#({LABEL})\}}', caption, text)
        return outside_code(self.refer, text)

    def code(self, text):
        "Number the caption of a code cell's figure or table."
        m = re.search(rf'(?m)^#\|\s*label:\s*({LABEL})', text)
        if not m: return text
        text = re.sub(r'(?m)^(#\|\s*(?:fig|tbl)-cap:\s*["\']?)', rf'\g<1>{self.name(m[1])}. ', text)
        return re.sub(r'(?m)^#\|.*-cap:.*$', lambda c: self.refer(c[0], '{0}'), text)

def crossrefs(path, site, up):
    "Number what is labelled, resolve the references to it, make links to this site relative."
    nb = json.loads(path.read_text(encoding='utf-8'))
    labels = Labels(join(cell['source']) for cell in nb['cells'])
    unlink = partial(re.sub, r'\[(`[^`]+`)\]\([^)]*\)', r'\1')    # nbdev links names in code
    for cell in nb['cells']:
        change = labels.markdown if cell['cell_type'] == 'markdown' else labels.code
        cell['source'] = change(join(cell['source'])).replace(f'{site}/', up)
        for data in (o.get('data', {}) for o in cell.get('outputs', [])):
            if 'text/markdown' not in data: continue
            text = join(data['text/markdown']).replace(f'{site}/', up)
            data['text/markdown'] = outside_code(labels.refer, text, unlink)
    path.write_text(json.dumps(nb), encoding='utf-8')

def depth(path, root):
    "Return the way up from a page to the root of the site."
    return '../' * (len(path.relative_to(root).parts) - 1)

def toc_title(page, link):
    "Give a link of the table of contents the mathematics of its heading."
    heading = re.search(rf'(?s)<h\d[^>]*id="{link[2]}"[^>]*>(.*?)</h\d>', page)
    return link[1] + re.sub(r'<a .*?</a>', '', heading[1]) + '</a>' if heading else link[0]

def existing_anchor(pages, page, m):
    "Point nbdev's link to a method at its class, where the method has no block of its own."
    target = pages.get((page.parent / m[2]).resolve() if m[2] else page.resolve(), '')
    there = not target or f'id="{m[3]}"' in target or f'id="{m[3].split(".")[0]}"' not in target
    return m[0] if there else f'{m[1]}{m[2]}#{m[3].split(".")[0]}"'

def localise(out):
    "Let every page work with no network and from disk: mathematics, fonts, captions, search."
    for p in (out / 'site_libs').rglob('*.css'):
        css = re.sub(r'@import url\(https://fonts[^)]*\);?', '', p.read_text(encoding='utf-8'))
        p.write_text(css, encoding='utf-8')
    # search shows plain text: TeX commands would only be noise there
    search = out / 'search.json'
    index = re.sub(r'\\\\(?:[a-zA-Z]+|[^\w"\\])', ' ', search.read_text(encoding='utf-8'))
    search.write_text(index, encoding='utf-8')
    # a page opened from disk may not fetch; a script may be loaded all the same
    (out / 'search.js').write_text(
        f'window.fetch = async () => ({{json: async () => {index}}});\n', encoding='utf-8')
    script = ("<script>location.protocol == 'file:' && "
              "document.write('<script src=\"{0}search.js\"><\\/script>')</script>")
    # captions are set as plain text: give them their mathematics and code
    caption = lambda m: re.sub(r'\$([^$]+)\$', r'\\(\1\\)', re.sub(r'`([^`]+)`', CODE, m[0]))
    pages = {p.resolve(): p.read_text(encoding='utf-8') for p in out.rglob('*.html')}
    for p, page in pages.items():
        up = depth(p, out.resolve())
        page = re.sub(KATEX, f'{up}assets/katex', page)
        page = re.sub(r'(?s)<(figcaption|caption)[^>]*>.*?</\1>', caption, page)
        page = re.sub(METHOD, partial(existing_anchor, pages, p), page)
        page = re.sub(TOC, partial(toc_title, page), page)
        p.write_text(page.replace('</head>', script.format(up) + '</head>', 1), encoding='utf-8')

def render_small(cache, out):
    "Render _proc/ with smalldocs."
    cfg = get_config()
    rename(cache)
    site = f'{cfg.doc_host}{cfg.doc_baseurl}'
    for p in cache.rglob('*.ipynb'): crossrefs(p, site, depth(p, cache))
    subprocess.run(['smalldocs', 'render', str(cache)], check=True)
    shutil.copytree(cache / 'assets', out / 'assets', dirs_exist_ok=True)
    localise(out)

def main():
    start, cfg, cache = time.time(), get_config(), process()
    out = cache / cfg.doc_path.name
    if shutil.which('quarto') and '--smalldocs' not in sys.argv:
        subprocess.run(['quarto', 'render', '--no-cache'], cwd=cache, check=True)
    else: render_small(cache, out)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(out, cfg.doc_path)
    pages = len(list(cfg.doc_path.rglob('*.html')))
    print(f'{pages} pages in {cfg.doc_path.name}/, {time.time() - start:.0f} s')

if __name__ == '__main__': main()
