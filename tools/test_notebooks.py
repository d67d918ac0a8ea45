"""Run every notebook once with nbdev_test; name notebook, heading and cell of what failed.

    python tools/test_notebooks.py [NOTEBOOK ...]

nbdev_test says which notebooks failed, and where in their code. Those are then collected by
pytest (tests/notebook_cells.py), which runs them in processes of their own and reports each testing
cell as a case named by its heading. A second, lucky run excuses nothing: nbdev_test's status stays.
"""
import re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

def notebook_failures(output):
    "Return the names in the list that nbdev_test ends with when notebooks failed."
    _, found, names = output.partition('Tests Failed On The Following Notebooks:')
    return re.findall(r'[\w.-]+\.ipynb', names) if found else []

def main(paths):
    failed = False
    for args in [['--path', p] for p in paths] or [[]]:
        command = ['nbdev_test', '--n_workers', '2', '--timing', *args]
        tests = subprocess.Popen(command, cwd=ROOT, text=True, encoding='utf-8', errors='replace',
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = ''
        for line in tests.stdout:           # shown as it comes
            print(line, end='', flush=True)
            output += line
        if not tests.wait(): continue
        failed, names = True, notebook_failures(output)
        again = [p for name in names for p in sorted((ROOT / 'nbs').rglob(name))]
        print('\nThe same notebooks by heading and cell:', flush=True)
        command = [sys.executable, '-m', 'pytest', *map(str, again or [ROOT / 'nbs'])]
        subprocess.run(command, cwd=ROOT)
    return int(failed)

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
