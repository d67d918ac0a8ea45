"""Build the site into _docs/ from the top-level _quarto.yml.

    python tools/build_docs.py               Quarto where it is installed, else smalldocs
    python tools/build_docs.py --smalldocs   always smalldocs: pure Python, no network

smalldocs reads the folder that Quarto would (_proc/, the notebooks as nbdev processed them). What
Quarto does and smalldocs does not is done here: output-file names, numbered figures and tables with
references to them, mathematics and fonts without a network, search in a page opened from disk,
names for what a screen reader meets. What both need is in pages.py.
"""
import ast, base64, gc, hashlib, inspect, json, re, shutil, struct, subprocess, sys, time
from functools import partial
from fastcore import docments
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from pages import Labels, outside_code, prepare

CODE = r'<code>\1</code>'
TOC = r'(<a href="#([\w-]+)"[^>]*class="nav-link"[^>]*>)[^<]*\\[^<]*</a>'     # with TeX in it
METHOD = r'(<a href=")([\w./-]*)#(\w+\.[\w.]+)"'
KATEX = r'https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist'

NUMBERED = r'\1<span class="number">\2</span> '
SOURCE = r'(href="[^"]*/(?:edit|blob)/[^/"]*/)nbs/([^"]*\.ipynb)"'
API_LINK = r'href="(\w+\.html)#(\w+)"'
NAMED = {'<nav class="navbar ': '<nav aria-label="Site" class="navbar ',
         '<nav class="quarto-secondary-nav"': '<nav aria-label="Here" class="quarto-secondary-nav"',
         '<nav id="quarto-sidebar"': '<nav aria-label="Pages" id="quarto-sidebar"',
         '<nav id="TOC"': '<nav aria-label="On this page" id="TOC"',
         '<nav class="page-navigation"': '<nav aria-label="Neighbours" class="page-navigation"'}

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
    names, original, config = {}, {}, cache / '_quarto.yml'
    for p in sorted(cache.rglob('*.ipynb')):
        m = re.search(r'output-file: ([^\s"\\]+)\.html', p.read_text(encoding='utf-8'))
        if m and m[1] != p.stem: names[p.name] = f'{m[1]}.ipynb'
    follow = lambda m: m[1] + names.get(m[2], m[2])
    yml = re.sub(r'(\s|/)([\w-]+\.ipynb)', follow, config.read_text(encoding='utf-8'))
    config.write_text(yml, encoding='utf-8')
    api = cache / 'api.qmd'
    api.write_text(re.sub(r'(\]\()([\w-]+\.ipynb)', follow, api.read_text(encoding='utf-8')),
                   encoding='utf-8')
    for p in sorted(cache.rglob('*.ipynb')):
        text = re.sub(r'output-file: [^\s"\\]+\.html\\n', '', p.read_text(encoding='utf-8'))
        text = re.sub(r'((?:\]\(|href=\\?["\'])(?:[\w./-]*/)?)([\w-]+\.ipynb)', follow, text)
        p.write_text(text, encoding='utf-8')
        if p.name not in names: continue
        new = p.rename(p.with_name(names[p.name]))
        original[new.relative_to(cache).as_posix()] = p.relative_to(cache).as_posix()
    return original

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

def needed(css, known):
    "Leave out of a stylesheet the rules for classes that no page has."
    end = len(css)
    def rules(i):                       # from i to the brace that closes the block: what to keep
        parts = []
        while i < end and css[i] != '}':
            if not (m := re.compile(r'[{;}]').search(css, i)): return ''.join(parts), end
            j = m.start()
            if css[j] != '{': parts.append(css[i:j + 1]); i = j + 1; continue
            head = css[i:j]
            if re.match(r'@(media|supports|layer)', head.strip()):
                inner, i = rules(j + 1)
                if inner: parts.append(f'{head}{{{inner}}}')
                continue
            depth, k = 1, j + 1
            while depth: depth += {'{': 1, '}': -1}.get(css[k], 0); k += 1
            uses = [s for s in head.split(',') if set(re.findall(r'\.([\w-]+)', s)) <= known]
            if uses or head[0] == '@' or '(' in head: parts.append(css[i:k])
            i = k
        return ''.join(parts), i + 1
    return rules(0)[0]

def slim(out):
    "Leave out of Bootstrap what the site does not use: three quarters."
    css = out / 'site_libs/themes/default.min.css'
    pages = [p.read_text(encoding='utf-8') for p in out.rglob('*.html')]
    known = {c for page in pages for m in re.findall(r'class="([^"]*)"', page) for c in m.split()}
    script = (out / 'site_libs/smalldocs.js').read_text(encoding='utf-8')
    known |= set(re.findall(r'[\w-]+', script)) | {'collapsing', 'show', 'collapsed', 'fade'}
    text = re.sub(r'/\*.*?\*/', '', css.read_text(encoding='utf-8'), flags=re.S)
    css.write_text(needed(text, known), encoding='utf-8')

def icons(out):
    "Keep of the icons' stylesheet those that the site shows: a hundredth."
    css = out / 'site_libs/bootstrap-icons/bootstrap-icons.min.css'
    sources = [*out.rglob('*.html'), *(out / 'site_libs').glob('smalldocs.*')]
    used = {n for p in sources for n in re.findall(r'\bbi-[\w-]+', p.read_text(encoding='utf-8'))}
    keep = lambda m: m[0] if m[1] in used else ''
    text = re.sub(r'\.(bi-[\w-]+)::before\{[^}]*\}', keep, css.read_text(encoding='utf-8'))
    css.write_text(text, encoding='utf-8')

def accessible(page):
    "Name what smalldocs leaves without a name, and call buttons what acts as buttons."
    for old, new in NAMED.items(): page = page.replace(old, new)
    page = re.sub(r'<span class="op">([^<]*)</span>', r'\1', page)      # as grey as comments
    page = re.sub(r'(<i class="bi[^"]*") role="img"', r'\1 aria-hidden="true"', page)
    button = r'\1 role="button" tabindex="0" '
    page = re.sub(r'(<div class="callout-header[^>]*) (?=data-bs-toggle)', button, page)
    page = re.sub(r'(<a [^>]*?) role="navigation"', button, page)
    page = re.sub(r'(sidebar-link[^>]*><span class="menu-text">)(\d\d[a-z]?) ', NUMBERED, page)
    return re.sub(r'<th([^>]*)></th>', r'<td\1></td>', page)

def frames(page):
    "Make the frames of each slider pictures, named by its label and value."
    def named(m):
        label, values = ' '.join(m[3].split()) or 'frame', iter(m[2].split('|'))
        svg = lambda s: (f'<img alt="{label} {next(values, "")}" src="data:image/svg+xml;base64,'
                         f'{base64.b64encode(s[0].encode()).decode()}">')
        body = re.sub(r'(?s)<svg(?! xmlns="[^"]*" class="drawing").*?</svg>', svg, m[0])
        return body.replace('<input type="range"', f'<input type="range" aria-label="{label}"', 1)
    box = r'(?s)(<div class="slider" data-values="([^"]*)"><label>([^<]*)).*?</div></div></div>'
    return re.sub(box, named, page)

def size(png):
    "Return how large a picture is to be seen: as large as it was drawn, however fine."
    at = png.find(b'pHYs', 0, 2000)       # behind the palette
    dpi = .0254 * struct.unpack('>I', png[at + 4:at + 8])[0] if at > 0 else 96
    w, h = (round(n * 96 / dpi) for n in struct.unpack('>II', png[16:24]))
    return f' width="{w}" height="{h}"'

def pictures(page, up, out):
    "Move pictures into files, which load when they come near."
    def move(m):
        kind, data = m[2], base64.b64decode(m[3])
        name = f'{hashlib.sha256(data).hexdigest()[:16]}.{kind.split("+")[0]}'
        (out / 'pictures').mkdir(exist_ok=True)
        (out / 'pictures' / name).write_bytes(data)
        seen = size(data) if kind == 'png' else ''
        return f'{m[1]}src="{up}pictures/{name}" loading="lazy"{seen}'
    return re.sub(r'(<img [^>]*?)src="data:image/([\w+]+);base64,([^"]*)"', move, page)

def api_link(pages, page, m):
    "Let a name in the API's index lead to its block, or to the page where it has none."
    target = pages.get((page.parent / m[1]).resolve(), '')
    return m[0] if f'id="{m[2]}"' in target else f'href="{m[1]}"'

def localise(out, original):
    "Let every page work with no network and from disk: mathematics, fonts, captions, search."
    for p in (out / 'site_libs').rglob('*.css'):
        css = re.sub(r'@import url\(https://fonts[^)]*\);?', '', p.read_text(encoding='utf-8'))
        p.write_text(css, encoding='utf-8')
    # search shows plain text: TeX commands would only be noise there
    search = out / 'search.json'
    index = re.sub(r'\\\\(?:[a-zA-Z]+|[^\w"\\])', ' ', search.read_text(encoding='utf-8'))
    search.write_text(index, encoding='utf-8')
    # a page opened from disk may not fetch: it loads a script in its place, once somebody searches
    (out / 'search.js').write_text(f'searchIndex({index});\n', encoding='utf-8')
    # captions are set as plain text: give them their mathematics and code
    caption = lambda m: re.sub(r'\$([^$]+)\$', r'\\(\1\\)', re.sub(r'`([^`]+)`', CODE, m[0]))
    pages = {p.resolve(): p.read_text(encoding='utf-8') for p in out.rglob('*.html')}
    for p, page in pages.items():
        up = depth(p, out.resolve())
        page = re.sub(KATEX, f'{up}assets/katex', page)
        page = re.sub(r'(?s)<(figcaption|caption)[^>]*>.*?</\1>', caption, page)
        page = re.sub(METHOD, partial(existing_anchor, pages, p), page)
        page = re.sub(TOC, partial(toc_title, page), page)
        page = pictures(frames(accessible(page)), up, out)
        source = lambda m: f'{m[1]}nbs/{original.get(m[2], m[2])}"'
        page = re.sub(SOURCE, source, page)
        page = page.replace('nbs/api.qmd"', 'tools/pages.py"')
        if p.name == 'api.html': page = re.sub(API_LINK, partial(api_link, pages, p), page)
        p.write_text(page, encoding='utf-8')
    icons(out)
    slim(out)

def render_small(cache, out):
    "Render _proc/ with smalldocs."
    cfg = get_config()
    original = rename(cache)
    site = f'{cfg.doc_host}{cfg.doc_baseurl}'
    for p in cache.rglob('*.ipynb'): crossrefs(p, site, depth(p, cache))
    subprocess.run(['smalldocs', 'render', str(cache)], check=True)
    shutil.copytree(cache / 'assets', out / 'assets', dirs_exist_ok=True)
    localise(out, original)

def main():
    start, cfg, cache = time.time(), get_config(), process()
    out = cache / cfg.doc_path.name
    quarto = shutil.which('quarto') and '--smalldocs' not in sys.argv
    prepare(cache, cfg, bool(quarto))
    if quarto:
        subprocess.run(['quarto', 'render', '--no-cache'], cwd=cache, check=True)
    else: render_small(cache, out)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(out, cfg.doc_path)
    pages = len(list(cfg.doc_path.rglob('*.html')))
    print(f'{pages} pages in {cfg.doc_path.name}/, {time.time() - start:.0f} s')
    print(f'Open {cfg.doc_path.name}/index.html')
    gc.freeze()     # each notebook's shell collects garbage when it ends: minutes, for a large heap

if __name__ == '__main__': main()
