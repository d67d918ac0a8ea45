"""Names that other packages do not promise to keep, each used in one place of ours.

When one is gone, the message says which package, at which version, and where we lean on it.
"""
import importlib
from importlib.metadata import version
import pytest

PRIVATE = [     # package; module and name; the one place that uses it
    ('nbdev', 'nbdev.doclinks', '_build_modidx', 'tools/build_docs.py, process'),
    ('nbdev', 'nbdev.processors', '_do_eval', 'tools/build_docs.py, process'),
    ('fastcore', 'fastcore.docments', 'signature', 'tools/build_docs.py, process'),
]

@pytest.mark.parametrize('package, module, name, used', PRIVATE)
def test_still_there(package, module, name, used):
    try: found = hasattr(importlib.import_module(module), name)
    except ImportError: found = False
    assert found, f'{package} {version(package)} no longer has {module}.{name}: see {used}'

def test_tests_of_a_group_meet_in_one_process(pytester):
    "pytest-xdist writes a name that pytest 9.2 no longer reads: fixtures were then made twice."
    pytester.makepyfile("""
        import os, pathlib, pytest
        pytestmark = pytest.mark.xdist_group('one')
        @pytest.mark.parametrize('i', range(6))
        def test_where(i): pathlib.Path(f'process{os.getpid()}').touch()
        """)
    pytester.runpytest_subprocess('-n', '2', '--dist', 'loadgroup').assert_outcomes(passed=6)
    assert len(list(pytester.path.glob('process*'))) == 1
