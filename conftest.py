"Notebooks are collected as tests by tests/notebook_cells.py; `pytester` is for the test of that."
import os

# before torch, and for every process that a test starts: other threads, other last bits
os.environ.setdefault('OMP_NUM_THREADS', '1')

pytest_plugins = ['notebook_cells', 'pytester', 'browsers', 'real_shaped']
