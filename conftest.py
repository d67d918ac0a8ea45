"Notebooks are collected as tests by tests/notebook_cells.py; `pytester` is for the test of that."
import gc, os, signal

# before torch, and for every process that a test starts: other threads, other last bits
os.environ.setdefault('OMP_NUM_THREADS', '1')

# whatever started the tests (nohup, a shell's background) may ignore what they send themselves
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = ['notebook_cells', 'pytester', 'browsers', 'real_shaped']

def pytest_collection_finish():
    "Whatever imports have made stays: searches for garbage need not look through it each time."
    gc.collect()
    gc.freeze()
