"Notebooks are collected as tests by tests/notebook_cells.py; `pytester` is for the test of that."
pytest_plugins = ['notebook_cells', 'pytester', 'browsers']
