"How long tests wait for what must come: one generous limit, so that a slow machine fails none."
import faulthandler, multiprocessing, os, time

LIMIT = float(os.environ.get('TEST_LIMIT', '600'))      # seconds; only what hangs takes as long

def wait_for(event, process=None, said=lambda: 'it did not come'):
    "Wait till `event()` is true; fail with `said()` if the process ends first, or at the limit."
    end = time.monotonic() + LIMIT
    while not event():
        assert (process is None or process.poll() is None) and time.monotonic() < end, said()
        time.sleep(.05)

def afresh(f, *args):
    """Call a module-level function in a new interpreter, one that may fork.

    pytest's own process has threads by now (xdist, a browser), and a fork copies the locks that
    they hold at that moment."""
    process = multiprocessing.get_context('spawn').Process(target=f, args=args)
    process.start()
    process.join(LIMIT)
    if process.exitcode is None: process.terminate()
    assert process.exitcode == 0, f'{f.__name__}: see standard error'

def stacks_if_late(seconds=LIMIT / 5):
    "Print this process's stacks and end it, if it has not called faulthandler's cancel by then."
    faulthandler.dump_traceback_later(seconds, exit=True)
