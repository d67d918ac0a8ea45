"""What to do with eight minutes of a card, the most deciding first: `make gpu DATA=folder`.

    python tools/gpu.py --data FOLDER [--minutes 8] [--out runs/gpu] [--rehearse]

The tests that skip without a GPU; the mini scale of English and French; the benchmark's GPU part;
English and Arabic. Each part ends when its time is up: a run leaves a checkpoint, and the same
command goes on from it. Where nothing can be installed, this file runs with what is there.
`--rehearse`: a hundredth of the steps, on any device.
"""
import argparse, os, signal, subprocess, sys, time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

class Part(NamedTuple):
    "A command and its share of the time."
    name: str
    share: float  # of the minutes; what is left over goes to those after it
    command: list[str]

def parts(data, out, rehearse: bool = False, card: bool = True) -> list[Part]:
    "List what to do, in order; without a card only what a rehearsal can show."
    from interference_nb.experiments import SCALES
    steps = SCALES['mini'].train.steps // (100 if rehearse else 1)
    def study(other, *systems):
        name = Path(out)/f'mini-en-{other}'
        return [sys.executable, '-m', 'interference_nb', 'demo', '--scale', 'mini', '--data',
                str(data), '--langs', 'en', other, '--seeds', '1', '--steps', str(steps), '--tasks',
                'ner', 'pos', '--out', str(name), '--systems', *systems]
    tests = [sys.executable, '-m', 'pytest', '-q', 'tests/test_meta_adapters.py',
             'tests/test_planner.py', '-k', 'gpu_replays or (account_on_a_gpu and float32 and '
             '(joint or meta_adpt or meta_exact))']
    bench = [sys.executable, 'benchmarks/bench.py', '--only', 'gpu_step,gpu_meta', '--seconds',
             '50']
    control, whole = ('scratch', 'joint'), ('scratch', 'joint', 'mono', 'joint2x')
    return ([Part('tests on a GPU', .15, tests)] * card
            + [Part('en-fr, joint and random weights', .2, study('fr', *control)),
               Part('en-fr, mono and equal batches', .4, study('fr', *whole))]
            + [Part('the benchmark on a GPU', .8, bench)] * card
            + [Part('en-ar, the same', 1., study('ar', *whole))])

def work(todo: list[Part], seconds: float) -> dict[str, str]:  # {part: how it ended}
    "Do the parts one after another; stop each when its share of what is left is used up."
    end, said = time.monotonic() + seconds, {}
    for part in todo:
        limit = (end - time.monotonic()) * part.share
        if limit < 1:
            said[part.name] = 'not reached; the same command goes on'
            continue
        print(f'\n== {part.name}: at most {limit:.0f} s', flush=True)
        child = subprocess.Popen(part.command, cwd=ROOT, start_new_session=True)
        try:
            status = child.wait(limit)
            said[part.name] = f'failed, status {status}' if status else 'done'
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)        # its checkpoint is what it goes on from
            try: child.wait(15)
            except subprocess.TimeoutExpired: os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            said[part.name] = 'stopped in time; the same command goes on'
    return said

def main(args=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help='folder of text and tasks with en, fr, ar')
    parser.add_argument('--minutes', type=float, default=8.)
    parser.add_argument('--out', type=Path, default=Path('runs/gpu'))
    parser.add_argument('--rehearse', action='store_true', help='a hundredth of the steps')
    options = parser.parse_args(args)
    import torch
    card = torch.cuda.is_available()
    if not card and not options.rehearse:
        parser.error('no GPU here. Use --rehearse for a hundredth of the steps on the CPU.')
    if not options.data or not Path(options.data).is_dir():
        parser.error(f'no folder {options.data!r}. Name one with --data.')
    out = options.out if not options.rehearse else Path(f'{options.out}-rehearsal')
    todo = parts(Path(options.data).resolve(), out.resolve(), options.rehearse, card)
    said = work(todo, 60 * options.minutes)
    print('\n' + '\n'.join(f'{name}: {how}' for name, how in said.items()))
    return any(how.startswith('failed') for how in said.values())

if __name__ == '__main__': sys.exit(main())
