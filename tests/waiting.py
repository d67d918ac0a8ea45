"How long tests wait for what must come: one generous limit, so that a slow machine fails none."
import os, time

LIMIT = float(os.environ.get('TEST_LIMIT', '600'))      # seconds; only what hangs takes as long

def wait_for(event, process=None, said=lambda: 'it did not come'):
    "Wait till `event()` is true; fail with `said()` if the process ends first, or at the limit."
    end = time.monotonic() + LIMIT
    while not event():
        assert (process is None or process.poll() is None) and time.monotonic() < end, said()
        time.sleep(.05)
