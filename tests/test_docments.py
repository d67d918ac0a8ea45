"""Every public function and method has a docstring, and a comment behind each parameter.

Public is what a module exports without a leading underscore, and the methods of such classes.
A method that a base class documents may leave both to it, except `forward`: of that, PyTorch says
nothing.
"""
import ast, importlib, pkgutil
import pytest
import interference_nb

MODULES = [m.name for m in pkgutil.iter_modules(interference_nb.__path__) if m.name[0] != '_']


def functions(body, prefix=''):
    "Yield public functions and methods, constructors among them, by their qualified names."
    for node in body:
        public = not getattr(node, 'name', '_').startswith('_')
        if isinstance(node, ast.ClassDef) and public:
            yield from functions(node.body, f'{prefix}{node.name}.')
        if isinstance(node, ast.FunctionDef) and (public or prefix and node.name == '__init__'):
            yield prefix + node.name, node


def missing(source, exported, inherits=lambda name: False):
    "Return {function: what it lacks}: 'docstring', or the names of parameters."
    lines, found = source.splitlines(), {}
    for name, f in functions(ast.parse(source).body):
        if name.split('.')[0] not in exported or inherits(name): continue
        lacks = [] if ast.get_docstring(f) or f.name == '__init__' else ['docstring']
        for p in f.args.posonlyargs + f.args.args + f.args.kwonlyargs:
            commented = '#' in lines[p.end_lineno - 1][p.end_col_offset:]
            if p.arg not in ('self', 'cls') and not commented: lacks.append(p.arg)
        if lacks: found[name] = lacks
    return found


def inherits(module, name):
    "Say whether a method's documentation is that of a base class."
    *owner, method = name.split('.')
    if not owner or method in ('forward', '__init__'): return False
    bases = getattr(module, owner[0]).__mro__[1:]
    return any(getattr(vars(base).get(method), '__doc__', None) for base in bases)


@pytest.mark.parametrize('name', MODULES)
def test_everything_public_is_documented(name):
    module = importlib.import_module(f'interference_nb.{name}')
    with open(module.__file__, encoding='utf-8') as f: source = f.read()
    assert not missing(source, module.__all__, lambda f: inherits(module, f))


def test_what_is_missing_is_named():
    source = '''
class Box:
    def __init__(self, size): ...
    def fill(self, what,    # to put into it
             times): "Fill it."
    def _lock(self, key): ...
def open_box(box: 'Box',    # any
             *, slowly=False,       # a choice
             ): "Open a box."
def undocumented(): ...
def not_exported(x): ...
'''
    assert missing(source, ['Box', 'open_box', 'undocumented']) == {
        'Box.__init__': ['size'], 'Box.fill': ['times'], 'undocumented': ['docstring']}
