"""Measure what the report's matrix of K languages costs: passes, seconds, memory and disk a round.

    python benchmarks/matrix.py             3 minutes on a quiet core
    python benchmarks/matrix.py --quick     a tiny model, to see whether it runs

Each K has a process to itself, for its peak of memory. The page on speed (nbs/08b_speed.ipynb)
reads benchmarks/matrix/MACHINE.json.
"""
import argparse, json, os, resource, sys, tempfile, time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

HERE, COUNTS = Path(__file__).parent, (2, 5, 10, 20)
sys.path.insert(0, str(HERE))
from bench import FORK, machine, name
from job import Job

MODEL = Job('ours', dim=256, n_layers=4, n_heads=4, ffn_dim=1024, vocab_size=8000, batch_size=4,
            seq_len=128, dropout=0., threads=1)
TINY = dict(dim=32, n_layers=2, ffn_dim=64, vocab_size=300, batch_size=2, seq_len=16)

def peak() -> int: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def cost(job: Job, rounds: int, pipe):
    "Measure rounds of a matrix, in a process of its own."
    import torch
    from contestants import batches, config
    from interference_nb.adapters import MultilingualLM
    from interference_nb.pretrain import keep_memory
    from interference_nb.report import ReportConfig, Subject, measure
    torch.set_num_threads(1)
    keep_memory()
    model, drawn, langs = MultilingualLM(config(job), job.langs, 'joint'), batches(job), job.langs
    class Rows:
        "A language's batches: random tokens, and a count of how many were taken."
        taken = 0
        def __init__(self, lang): self.lang = lang
        def batch(self, k):
            Rows.taken += 1
            return replace(drawn[k % 4], lang=self.lang)
    subject = Subject('random', model, model.theta, {l: Rows(l) for l in langs},
                      dict.fromkeys(langs, 1.), 'masked')
    cfg, seconds, before = ReportConfig(rounds=3, batches=2), [], peak()
    with tempfile.TemporaryDirectory() as folder:
        measure(subject, cfg, folder)                               # warms up
        for r in range(4, 4 + rounds):                              # goes on, by a round each time
            Rows.taken, start = 0, (time.perf_counter(), time.process_time())
            measure(subject, replace(cfg, rounds=r), folder)
            seconds.append([time.perf_counter() - start[0], time.process_time() - start[1]])
    flat = 4 * subject.size
    pipe.send(dict(languages=len(langs), pairs=len(langs) * (len(langs) - 1) // 2,
                   passes=Rows.taken, seconds=seconds, gradient_bytes=flat,
                   grown_bytes=peak() - before, disk_bytes=2 * len(langs) * flat))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='a tiny model; numbers mean nothing')
    parser.add_argument('--out', type=Path, help='file to write; default: matrix/MACHINE.json')
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(
        filter(None, (str(HERE), os.getenv('PYTHONPATH')))))
    about, rows = machine() | dict(threads=1), []
    job = replace(MODEL, **TINY) if options.quick else MODEL
    for K in COUNTS:
        ours, theirs = FORK.Pipe()
        of_K = replace(job, langs=tuple(f'l{i}' for i in range(K)))
        process = FORK.Process(target=cost, args=(of_K, 1 if options.quick else 3, theirs))
        process.start()
        theirs.close()
        try: rows.append(ours.recv())
        except EOFError: sys.exit(f'{K} languages: the process was killed. Is the memory enough?')
        process.join()
        wall, cpu = map(median, zip(*rows[-1]['seconds'], strict=True))
        print(f'{K:2} languages: {rows[-1]["passes"]} passes, {wall:.2f} s a round '
              f'({cpu:.2f} of the processor), {rows[-1]["grown_bytes"] / 1e6:.0f} MB', flush=True)
    out = options.out or HERE/'matrix'/f'{name(about | dict(threads=about["cores"]))}.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(dict(machine=about, quick=options.quick, model=asdict(job),
                                   rows=rows), indent=1) + '\n')

if __name__ == '__main__': main()
