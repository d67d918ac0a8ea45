"""Open every page of the built site in headless Chromium, with nothing outside within reach.

The site is built first if it is missing or older than what it is made of.
"""
import importlib.util, json, re, subprocess, sys, threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
import pytest
from filelock import FileLock
from browsers import NEEDED
from waiting import LIMIT

ROOT = Path(__file__).parent.parent
NBS, SITE = ROOT / 'nbs', ROOT / '_docs'
pytestmark = NEEDED

def notebooks():
    "Return the notebooks that become pages."
    hidden = lambda p: any(part[0] in '_.' for part in p.relative_to(NBS).parts)
    return sorted(p for p in NBS.rglob('*.ipynb') if not hidden(p))

def page_of(notebook):
    "Return the page that a notebook becomes: its path less the number."
    name = re.sub(r'^\d+[a-zA-Z0-9]*_', '', notebook.stem)
    return notebook.relative_to(NBS).with_name(f'{name}.html').as_posix()

PAGES = [page_of(p) for p in notebooks()] + ['api.html']
AXE = importlib.util.find_spec('axe_playwright_python')

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Build the site if need be, and serve it."
    sources = [*notebooks(), ROOT / '_quarto.yml', NBS / 'styles.css', NBS / 'assets/site.inc',
               ROOT / 'tools/build_docs.py', ROOT / 'tools/pages.py']
    newest, index = max(p.stat().st_mtime for p in sources), SITE / 'index.html'
    with FileLock(tmp_path_factory.getbasetemp().parent / 'site.lock'):  # pytest's workers share it
        if not index.exists() or index.stat().st_mtime < newest:
            r = subprocess.run([sys.executable, 'tools/build_docs.py'], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert r.returncode == 0, r.stdout[-5000:]
            assert r.stdout.endswith('Open _docs/index.html\n')
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture
def page(browser, site):
    "A tab that writes down in `page.faults` what goes wrong, and can reach nothing outside."
    tab = browser.new_page(viewport=dict(width=1280, height=900))
    tab.set_default_timeout(LIMIT * 1000)
    tab.faults = []
    def guard(route):
        url = route.request.url
        if url.startswith((site, 'data:', 'blob:', SITE.as_uri())): return route.continue_()
        tab.faults.append(f'outside request: {url}')
        return route.abort()
    tab.route('**/*', guard)
    tab.on('pageerror', lambda e: tab.faults.append(f'script error: {e}'))
    tab.on('console', lambda m: m.type == 'error' and tab.faults.append(f'console: {m.text}'))
    tab.on('response', lambda r: r.status >= 400 and tab.faults.append(f'{r.status}: {r.url}'))
    tab.bytes = 0
    def count(response):
        if 'woff' not in response.url: tab.bytes += int(response.headers.get('content-length', 0))
    tab.on('response', count)
    yield tab
    tab.close()

# Scripts have run at `load`, and drawn the formulas: laid out, these ask for their fonts.
SETTLED = '''async () => {
  document.body.getBoundingClientRect();
  await document.fonts.ready;
  await new Promise(requestAnimationFrame);
}'''

def visit(page, url):
    "Open a page and wait till it is drawn, but not till the network has been idle for a while."
    page.goto(url)
    page.evaluate(SETTLED)

@cache
def anchors(path):
    "Return the places in a page that a link can lead to."
    return set(re.findall(r'\b(?:id|name)="([^"]+)"', path.read_text(encoding='utf-8')))

def broken_links(hrefs, site):
    "Yield the links within the site that lead nowhere."
    for url in sorted(set(hrefs)):
        if not url.startswith(site): continue
        target, anchor = urldefrag(url)
        path = SITE / unquote(urlsplit(target).path).lstrip('/')
        if path.is_dir(): path /= 'index.html'
        if not path.is_file(): yield f'broken link: {url}'
        elif anchor and path.suffix == '.html' and unquote(anchor) not in anchors(path):
            yield f'broken anchor: {url}'

# Text as a reader sees it, without code and without what KaTeX drew.
TEXT = """() => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = [];
  while (walk.nextNode())
    if (!walk.currentNode.parentElement.closest('pre, code, script, style, svg, .katex'))
      seen.push(walk.currentNode.data);
  return seen.join('\\n');
}"""
UNRENDERED = {
    'raw TeX': r'\$\$|\\[a-zA-Z]{2,}|\\[()\[\]]|\$[^$\n]*[\\_^][^$\n]*\$',
    'unresolved reference': r'(?<![\w@])@(?:fig|tbl|eq|sec)-[\w-]+',
    'raw markup': r':{3,}|\{#[\w-]+\}|\{\.[\w-]+|`[^`\n]+`|\*\*\w|\]\([\w./#-]+\)',
}

# What was drawn of the maths, and how: roots have their sign, numbers stand clear of formulas.
BADLY_DRAWN = """() => {
  const box = e => e.getBoundingClientRect();
  const meet = (e, tag) => box(e).right > box(tag).left && box(e).top < box(tag).bottom - 2
    && box(e).bottom > box(tag).top + 2;
  const roots = [...document.querySelectorAll('.katex .sqrt svg')].filter(e => !e.clientHeight);
  const numbers = [...document.querySelectorAll('.katex-display .tag')].filter(tag =>
    [...tag.parentElement.children].some(e => e != tag && meet(e, tag)));
  const names = [...document.querySelectorAll('td code, th code')].filter(e =>
    /^\\w+$/.test(e.innerText.trim()) && e.getClientRects().length > 1);
  return [...roots.map(e => 'a root without its sign'),
          ...numbers.map(e => `number ${e.innerText} on its formula`),
          ...names.map(e => `a table breaks the name ${e.innerText}`)];
}"""

# What a page of this width has no excuse for; a tag that is none was text with a < in it.
ILL_FITTING = """() => [
  ...[...document.querySelectorAll('.katex-display')].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => `a formula wider than its column: ${e.innerText.slice(0, 60)}`),
  ...[...document.querySelectorAll('main tr')]
    .filter(r => r.cells.length > 7 && r.clientHeight > 160)
    .map(r => `a table squeezed to towers: ${r.innerText.slice(0, 60)}`),
  ...[...document.querySelectorAll('main *')].filter(e => e instanceof HTMLUnknownElement)
    .map(e => `no such tag: ${e.localName}`)]"""

# formulas have the colour of the text around them, code has its own, which one page shows
VIOLATIONS = """async ([tags, exclude]) =>
  (await axe.run({exclude: exclude}, {runOnly: tags, resultTypes: ['violations'],
                                      preload: false, selectors: false}))
  .violations.filter(v => ['serious', 'critical'].includes(v.impact))
  .map(v => `${v.id} (${v.nodes.length}): ${v.nodes[0].html.slice(0, 160)} `
            + v.nodes[0].failureSummary.slice(0, 200))"""
WCAG = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']

def violations(page, rules=WCAG, leave_out=('.katex', 'pre code')):
    "Return what axe-core finds serious or critical of WCAG 2.1 AA (nothing where it is absent)."
    if not AXE: return []
    page.add_script_tag(content=(Path(AXE.origin).parent / 'axe.min.js').read_text('utf-8'))
    return page.evaluate(VIOLATIONS, [rules, [[css] for css in leave_out]])

@pytest.mark.parametrize('name', PAGES)
def test_page(name, page, site):
    visit(page, site + name)
    page.faults += violations(page)
    page.locator('body').wait_for(state='attached')
    text = page.evaluate(TEXT)
    for fault, pattern in UNRENDERED.items():
        page.faults += [f'{fault}: {m[0]!r}' for m in re.finditer(pattern, text)]
    page.faults += [f'bad TeX: {t}' for t in page.locator('.katex-error').all_inner_texts()]
    hrefs = page.evaluate('() => [...document.links].map(a => a.href)')
    page.faults += broken_links(hrefs, site)
    images = 'imgs => imgs.filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 80))'
    page.faults += [f'broken image: {src}' for src in page.eval_on_selector_all('img', images)]
    page.faults += page.evaluate(BADLY_DRAWN) + page.evaluate(ILL_FITTING)
    page.set_viewport_size(dict(width=390, height=800))
    page.faults += page.evaluate(BADLY_DRAWN)
    width = page.evaluate('document.documentElement.scrollWidth')
    if width > 390: page.faults.append(f'{width} px wide on a telephone of 390')
    small = '''imgs => imgs.filter(i => i.getClientRects().length).map(i => [i.clientWidth /
      (i.getAttribute('width') || i.naturalWidth), i.alt.slice(0, 60)]).filter(x => x[0] < .7)'''
    page.faults += [f'too small to read on a telephone: {x}'
                    for x in page.eval_on_selector_all('main img', small)]
    unnamed = 'imgs => imgs.filter(i => !i.alt.trim()).map(i => i.src.slice(0, 80))'
    page.faults += [f'no alt text: {src}' for src in page.eval_on_selector_all('img', unnamed)]
    page.wait_for_load_state('networkidle')     # what asks late is asked, and counted, by then
    if page.bytes > 900_000: page.faults.append(f'{page.bytes / 1000:.0f} kB before fonts')
    assert not page.faults, '\n'.join(dict.fromkeys(page.faults))

def test_the_first_page_is_short(page, site):
    "A stranger meets question, figure, bottom line and doors within four screens, 600 words."
    visit(page, site + 'index.html')
    assert page.evaluate('document.documentElement.scrollHeight') <= 3500
    before, doors, _ = page.locator('main').inner_text().partition('Three doors')
    assert doors and len(before.split()) <= 600

def test_figures_side_by_side_are_stacked_on_a_telephone(page, site):
    for width, columns in ((1280, 2), (390, 1)):
        page.set_viewport_size(dict(width=width, height=900))
        visit(page, site + 'index.html')
        boxes = [i.bounding_box() for i in page.locator('.pair img').all()]
        assert len({round(box['x'] / 100) for box in boxes}) == columns
        assert all(box['width'] > 300 for box in boxes)         # as large as they were drawn

@pytest.mark.parametrize('name', ['index.html', 'meta_adapters.html', 'finetune.html'])
def test_colours_of_the_dark_mode(name, page, site):
    page.emulate_media(color_scheme='dark')
    visit(page, site + name)
    colours = 'e => getComputedStyle(e).backgroundColor.match(/[0-9]+/g).map(Number)'
    body = page.locator('body')
    assert sum(body.evaluate(colours)) < 150
    paper = '.slider svg, main img'                     # it is white, and takes the page's tone
    assert 'invert' in page.locator(paper).last.evaluate('e => getComputedStyle(e).filter')
    page.wait_for_timeout(100)
    assert not (found := violations(page, ['wcag2aa'], ('.katex',))), '\n'.join(found)
    page.locator('.quarto-color-scheme-toggle').click()
    page.wait_for_timeout(200)
    assert sum(body.evaluate(colours)) > 700
    page.reload()                                       # it remembers
    assert sum(body.evaluate(colours)) > 700

def test_sidebar_opens_at_the_page(page, site):
    visit(page, site + 'runs/finetuning.html')
    box = page.locator('#quarto-sidebar [aria-current=page]').bounding_box()
    assert box and 0 < box['y'] < 850
    numbers = page.locator('#quarto-sidebar .number').all_inner_texts()
    assert '05' in numbers and '18' in numbers

def test_mathematics_where_a_page_has_an_amd_loader(page, site):
    "Quarto puts require.js into pages with HTML outputs: KaTeX must not hand itself to that."
    page.add_init_script('window.define = Object.assign(() => 0, {amd: {}})')
    page.goto(site + 'figs/meta_step.html', wait_until='networkidle')
    formulas = page.locator('.math').count()
    assert formulas > 20
    assert page.locator('.math .katex').count() == formulas

def test_pages_lead_to_their_sources_and_to_places_that_run_them(site):
    for name in PAGES:
        text = (SITE / name).read_text(encoding='utf-8')
        edit = re.findall(r'href="[^"]*/(?:edit|blob)/main/([^"#]*)"[^>]*class="toc-action', text)
        assert edit and all((ROOT / p).is_file() for p in edit), (name, edit)
        if name == 'api.html': continue
        for path in re.findall(r'href="[^"]*(?:blob/main|labpath=)/?([^"]*\.ipynb)"', text)[:2]:
            assert (ROOT / path).is_file(), path
        assert int(re.search(r'(\d+) minutes? to read', text)[1]) <= 45, name

def test_a_signature_stands_once(site):
    "A short function shows its source alone; a long one its signature, and the source folded."
    text = (SITE / 'adapters.html').read_text(encoding='utf-8')
    assert len(re.findall(r'(?:class|def)</span> (?:<[^>]*>)?Adapter\b', text)) == 1
    for details in re.findall(r'(?s)<details( open="")? class="code-fold">(.*?)</details>', text):
        assert bool(details[0]) == (details[1].count('\n') <= 30)

def test_a_meta_step_in_the_hand_is_the_one_by_hand(page, site):
    "Dragged, by keys and by its sliders, the page computes what Python computes."
    from interference_nb.figures import meta_by_hand
    page.goto(site + 'figs/meta_step.html', wait_until='networkidle')
    box = page.locator('.meta-live')
    box.scroll_into_view_if_needed()
    def same():
        "Compare the page with Python where its controls are now; return these."
        at = {i.get_attribute('name'): float(i.input_value()) for i in box.locator('input').all()}
        hand, seen = meta_by_hand(**at), json.loads(box.get_attribute('data-values'))
        for name in ('theta', 'direct', 'second', 'difference'):
            assert seen[name] == pytest.approx(getattr(hand, name).tolist(), abs=1e-9), (name, at)
        return at
    first = same()
    for name, value in dict(beta='0.2', angle='45', eps='1.2', bend='0.5').items():
        box.locator(f'input[name={name}]').fill(value)
        assert same()[name] == float(value)
    handle = box.locator('g.angle')
    handle.press('ArrowRight')
    assert same()['angle'] == 50
    assert handle.get_attribute('aria-valuenow') == '50'
    for name in ('angle', 'beta'):
        at, place = same(), box.locator(f'g.{name} circle').first.bounding_box()
        x, y = place['x'] + place['width'] / 2, place['y'] + place['height'] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 40, y + (90 if name == 'angle' else 0), steps=4)
        page.mouse.up()
        assert same()[name] != at[name]
    assert same() != first and not page.faults

def test_sliding_figures_slide(page, site):
    names = [n for n in PAGES if 'type="range"' in (SITE / n).read_text(encoding='utf-8')]
    if not names: pytest.skip('no page has a sliding figure')
    for name in names:
        visit(page, site + name)
        page.faults += [f'{name}: {fault}' for fault in slide(page)]
    assert not page.faults, '\n'.join(page.faults)

def slide(page):
    "Move every slider on a page; yield those whose figure stays as it was."
    for i, slider in enumerate(page.locator('input[type=range]').all()):
        before, after = slider.evaluate("""async input => {
          const box = input.closest('.cell-output') || input.parentElement;
          const shown = () => [...box.querySelectorAll('svg, img')]
            .filter(e => e.getClientRects().length).map(e => e.outerHTML).join();
          const before = shown();
          input.value = input.value == input.max ? input.min : input.max;
          for (const kind of ['input', 'change'])
            input.dispatchEvent(new Event(kind, {bubbles: true}));
          for (let ms = 0; ms < 300 && shown() == before; ms += 10)
            await new Promise(r => setTimeout(r, 10));
          return [before, shown()];
        }""")
        if not before or before == after: yield f'slider {i} moved, its figure did not'

@pytest.mark.parametrize('where', ['served', 'from disk'])
def test_search_finds(where, page, site):
    page.goto((site if where == 'served' else SITE.as_uri() + '/') + 'index.html')
    box = page.locator('#quarto-header input[type=search], #quarto-header input').first
    box.fill('adapter')
    results = page.locator('a.search-result')
    results.first.wait_for()
    href = results.first.evaluate('a => a.href')
    path = SITE / unquote(urlsplit(href).path).replace(SITE.as_posix(), '').lstrip('/')
    assert path.is_file(), href
    assert not page.faults, '\n'.join(page.faults)
