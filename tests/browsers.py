"One headless Chromium for all the tests that need a browser. CHROME names another."
import os, shutil
import pytest

NAMES = os.environ.get('CHROME'), 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
CHROME = next((path for name in NAMES if name and (path := shutil.which(name))), None)
NEEDED = pytest.mark.skipif(not CHROME, reason='no Chromium found; name one in CHROME')

@pytest.fixture(scope='session')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        yield b
        b.close()
