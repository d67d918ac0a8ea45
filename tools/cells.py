"""What the tools and the tests know about a notebook's cells."""
import ast, hashlib, os, re
from functools import cache
from pathlib import Path
from nbdev.config import get_config

PACKAGE = Path(__file__).parent.parent / 'interference_nb'
HEADING = re.compile(r'^(#{1,6})\s+(.*)$')
INSTALL = """#| hide
#| eval: false
# In Colab or Kaggle: fetch the package, its records and this folder (a minute); elsewhere nothing.
import importlib.util
if not importlib.util.find_spec('interference_nb'):
    !git clone -q --depth 1 https://github.com/interference-nb/interference-nb
    !pip install -q ./interference-nb fastcore
    %cd interference-nb/{folder}"""
FENCE = re.compile(r'^(:{3,}|`{3,}|~{3,})\s*(.*)$')

def skip_flags():
    "Return the flags of cells to leave out: `tst_flags`, less those named in the environment."
    return set(get_config().tst_flags.split()) - set(os.environ.get('NBDEV_FLAGS', '').split())

def why_skipped(directives, flags):
    "Return the directive for which nbdev_test skips a cell, or ''."
    if directives.get('eval:', [''])[0].lower() == 'false': return '#| eval: false'
    return ''.join(f'#| {flag}' for flag in sorted(flags & directives.keys())[:1])

def headings(text):
    "Yield (level, title) of the headings in a markdown cell, not of those inside boxes and code."
    depth, code = 0, ''
    for line in text.splitlines():
        fence = FENCE.match(line)
        if code: code = '' if line.strip() == code else code
        elif fence and fence[1][0] != ':': code = fence[1]
        elif fence: depth += 1 if fence[2] else -1
        elif depth == 0 and (m := HEADING.match(line)):
            title = re.sub(r'\s*\{[^{}]*\}\s*$', '', m[2])
            yield len(m[1]), re.sub(r'[`*]|\[([^]]*)\]\([^)]*\)', r'\1', title).strip()

def tests_something(source, directives):
    "Say whether a cell holds a test: an assert or a call of `test_...`, `raises`, `testing...`."
    if directives.keys() & {'export', 'exports', 'exporti'}: return False
    from IPython.core.inputtransformer2 import TransformerManager
    try: tree = ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError: return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert): return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if re.match(r'test_\w+$|(.*\.)?raises$|(torch|np|numpy)\.testing\.', name): return True
    return False

def code_of(source):
    "Return what a cell runs, without comments, directives and layout."
    from IPython.core.inputtransformer2 import TransformerManager
    try: return ast.unparse(ast.parse(TransformerManager().transform_cell(source)))
    except SyntaxError: return source

def stamps(cells, is_skipped):
    """Yield (cell, fingerprint) of code cells: of all code that ran up to there.

    A cell that is left out of ordinary runs is known by its own code alone."""
    so_far = hashlib.sha256()
    for cell in cells:
        if cell['cell_type'] != 'code': continue
        code = code_of(cell['source']).encode()
        if is_skipped(cell): yield cell, hashlib.sha256(code).hexdigest()[:12]
        else:
            so_far.update(code + b'\n')
            yield cell, so_far.hexdigest()[:12]

@cache
def drawing_functions():
    "Return the code of the package's functions that draw: {name: code}."
    trees = [ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'))
             for module in ('figures', 'drawings')]
    return {node.name: ast.unparse(node) for tree in trees for node in tree.body
            if isinstance(node, ast.FunctionDef)}

def drawn_by(cell):
    "Return a fingerprint of the package's drawing functions that a cell calls, or ''."
    called = sorted(set(re.findall(r'\w+', code_of(cell['source']))) & drawing_functions().keys())
    code = '\n'.join(drawing_functions()[name] for name in called)
    return hashlib.sha256(code.encode()).hexdigest()[:12] if called else ''
