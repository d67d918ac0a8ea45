"""Measure the library against its peers in one run, in turns, and compare with the goals.

    python benchmarks/bench.py              15 minutes on 2 quiet cores (`make bench`)
    python benchmarks/bench.py --quick      tiny sizes, to see whether everything runs
    python benchmarks/bench.py --only step,meta

Every contestant waits in a process of its own and steps when it is its turn, so what disturbs the
machine for a while disturbs all of them. A ratio is taken within a round; the table gives the
median of the rounds (of memory, the ratio of the highest marks) and, in brackets, the lowest and
highest. All numbers go to benchmarks/MACHINE.json. What --only measures joins those that are there,
if commit, machine and packages are still the same.
"""
import argparse, functools, json, multiprocessing, os, re, statistics, sys, time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from job import Job, serve

HERE = Path(__file__).parent
THREADS = min(2, os.cpu_count() or 1)
PEERS = 'xlm', 'bert', 'xmod'

# One process imports everything once, from PYTHONPATH; contestants fork from it.
FORK = multiprocessing.get_context('forkserver')
FORK.set_forkserver_preload(['contestants'])

class Contestant:
    "A process that steps when told to."
    def __init__(self, job: Job):
        self.about = self.error = None
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(job, theirs))
        self.process.start(); theirs.close()

    def receive(self) -> dict | None:
        try: row = self.pipe.recv()
        except EOFError: row = dict(error='its process was killed; is the memory enough?')
        self.error = row.get('error')
        return None if self.error else row

    def turn(self, steps: int) -> dict | None:
        "Take so many steps; None once it has failed."
        if self.about is None and not self.error: self.about = self.receive()
        if self.error: return None
        self.pipe.send(steps)
        return self.receive()

    def close(self):
        self.pipe.close()
        self.process.terminate(); self.process.join()

def say(text: str):
    "Show where we are, on a terminal."
    if sys.stdout.isatty(): print(f'\r{text}', end='\033[K', flush=True)

def measure(section: dict, left: float) -> dict:
    "Let the contestants of a section step in turns, until its rounds or its seconds are over."
    start, rows = time.perf_counter(), {}
    contestants = {label: Contestant(job) for label, job in section['jobs'].items()}
    try:
        for r in range(-1, section['rounds']):              # round -1 warms up
            for label, c in contestants.items():
                spent = time.perf_counter() - start
                left_s = left + max(section['budget'] - spent, 0)
                say(f'{section["title"]}: round {max(r, 0) + 1} of {section["rounds"]}, {label}; '
                    f'at most {left_s / 60:.0f} min left')
                row = c.turn(section['steps'])
                if row and r >= 0: rows.setdefault(label, []).append(row)
            if r >= 0 and time.perf_counter() - start > section['budget']: break
    finally:
        for c in contestants.values(): c.close()
    say('')
    out = dict(title=section['title'], contestants={}, errors={})
    for label, c in contestants.items():
        if c.error:
            out['errors'][label] = c.error
            continue
        found = rows[label]
        out['contestants'][label] = dict(
            job=asdict(section['jobs'][label]), size=c.about['size'], work=c.about['work'],
            **{k: [round(row[k], 5) for row in found] for k in ('seconds', 'cpu', 'peak_mb')},
            tensors_mb=[c.about['tensors_mb']] * len(found), passes=found[-1]['passes'])
    return out | dict(wall_s=round(time.perf_counter() - start, 1))

def plan(quick: bool, about: dict) -> dict[str, dict]:
    "List what is measured: contestants, rounds, steps a turn and the most seconds it may take."
    tiny = dict(dim=32, n_layers=2, n_heads=3, ffn_dim=128, vocab_size=500, batch_size=2,
                seq_len=32, megabytes=.2) if quick else {}
    job = functools.partial(Job, threads=1 if quick else THREADS, **tiny)
    own = functools.partial(job, 'library')
    small = tiny or dict(dim=256, n_layers=4, n_heads=4, ffn_dim=1024, vocab_size=8000,
                         batch_size=4, seq_len=128)
    sections = {}
    def add(name, title, jobs, budget, rounds=7, steps=1):
        sections[name] = dict(title=title, jobs=jobs, budget=budget, steps=steps,
                              rounds=1 if quick else rounds)
    add('step', 'A pretraining step, peers in their default settings',
        dict(ours=job('ours'), bare=job('bare', keep=False), matmul=job('matmul'),
             **{p: job(p, keep=False) for p in PEERS}), 150)
    add('same', 'A pretraining step, all with the same allocator settings',
        dict(ours=job('ours'), bare=job('bare'), **{p: job(p) for p in PEERS}), 150)
    add('still', 'A pretraining step without dropout, same allocator settings',
        {n: job(n, dropout=0.) for n in ('ours', 'bare', *PEERS)}, 100, 5)
    meta = lambda *names: {n: own(meta=dict(estimator=n)) for n in names}
    add('meta', 'The meta step beside plain steps, two languages',
        dict(joint=own(variant='joint'), adapters=own(), recomputed=own(recompute=True),
             **meta('finite_difference', 'one_sided', 'first_order')), 180, 5)
    add('exact', 'The exact meta step', dict(adapters=own(), **meta('exact')), 60, 2)
    many = {}
    for n in (2, 4, 8):
        langs = tuple(f'l{i}' for i in range(n))
        one = functools.partial(Job, 'library', langs=langs, threads=1 if quick else THREADS)
        many |= {f'plain {n}': one(**small), f'meta {n}': one(meta={'beta': .1}, **small),
                 f'sampled {n}': one(meta={'sampled_languages': 1}, **small)}
    add('languages', 'More languages, at a quarter of the size', many, 80, 5)
    words = dict(vocab_size=500 if quick else 8000, threads=1)
    add('tokenise', 'Tokenising on one core',
        {n: replace(job(n), **words) for n in ('tokenise', 'tokenise_theirs')}, 30)
    add('load', 'Drawing batches on one core', dict(load=job('load', threads=1)), 15)
    add('prepare', 'Preparing data on one core, growing text',
        {f'{k}x': replace(job('prepare'), **words, megabytes=k * (.1 if quick else 6))
         for k in (1, 2, 4)}, 60, 2)
    if about['gpu'] and not quick: add_gpu(add, job, about)
    return sections

def add_gpu(add, job, about):
    "The same on a GPU: autocast, the paper's batch of 128 rows, compiled and not."
    precision = 'bfloat16' if about['bfloat16'] else 'float16'
    gpu = functools.partial(job, device='cuda', precision=precision, batch_size=128)
    add('gpu_step', 'A pretraining step on the GPU',
        dict(ours=gpu('ours'), compiled=gpu('ours', compiled=True), bare=gpu('bare'),
             matmul=gpu('matmul'), **{p: gpu(p) for p in PEERS}), 180, steps=10)
    add('gpu_meta', 'The meta step on the GPU, two languages',
        dict(adapters=gpu('library'), **{n: gpu('library', meta=dict(estimator=n)) for n in
                                         ('finite_difference', 'one_sided')}), 90, 5, 5)

def flops(job: dict) -> float:
    "Count the multiplications and additions of a step of ours: forward 1, backward 2."
    tokens, D = job['batch_size'] * job['seq_len'], job['dim']
    inner, ffn = D // job['n_heads'] * job['n_heads'], 2 * D * job['ffn_dim']
    layer = 4 * D * inner + ffn + 2 * job['seq_len'] * inner
    spared = .85 * ffn                      # of the last layer, which ends at the masked positions
    return 6 * tokens * (job['n_layers'] * layer - spared + .15 * D * job['vocab_size'])

class Results:
    "Ratios of what was measured; None where something is missing."
    def __init__(self, sections): self.sections = sections

    def rows(self, section, label):
        return self.sections.get(section, {}).get('contestants', {}).get(label)

    def ratio(self, section, a, b, what='seconds'):     # (median, lowest, highest)
        "Divide a by b round by round; of memory, the middle is highest by highest."
        a, b = self.rows(section, a), self.rows(section, b)
        if not (a and b): return None
        middle, low, high = spread([x / y for x, y in zip(a[what], b[what])])
        return max(a[what]) / max(b[what]) if what == 'peak_mb' else middle, low, high

    def rate(self, section, label):
        "Work a second: tokens, MB or floating-point operations."
        row = self.rows(section, label)
        return row and spread([row['work'] / s for s in row['seconds']])

    def peer(self, section, ours='ours'):
        "The fastest peer's time over ours; None unless all peers ran."
        rows = {p: self.rows(section, p) for p in PEERS}
        if not all(rows.values()): return None
        fastest = min(rows, key=lambda p: statistics.median(rows[p]['seconds']))
        return self.ratio(section, fastest, ours)

    def loader(self):
        "Tokens drawn a second over tokens trained a second."
        fed, eaten = self.rate('load', 'load'), self.rate('step', 'ours')
        return fed and eaten and (fed[0] / eaten[0], fed[1] / eaten[2], fed[2] / eaten[1])

    def use(self, section, label):
        "Share of the measured matrix rate that a step makes use of."
        row, matmul = self.rows(section, label), self.rows(section, 'matmul')
        if not (row and matmul): return None
        return spread([flops(row['job']) * m / (s * matmul['work'])
                       for s, m in zip(row['seconds'], matmul['seconds'])])

def spread(values): return statistics.median(values), min(values), max(values)

def table(sections: dict) -> list[dict]:
    "Lay what was measured beside the goals; `met` is None where there is no goal or no number."
    r, rows = Results(sections), []
    def row(what, measured, goal=None, least=True):
        met = None if goal is None or measured is None else \
            measured[0] >= goal if least else measured[0] <= goal
        rows.append(dict(what=what, measured=measured and [round(x, 4) for x in measured],
                         goal=goal, least=least, met=met))
    row('our step, tokens a second', r.rate('step', 'ours'))
    row('fastest peer, default settings / ours', r.peer('step'), 1.7)
    row('fastest peer, same allocator / ours', r.peer('same'), 1.7)
    row('fastest peer, no dropout, same allocator / ours', r.peer('still'))
    row('bare stack, same allocator / ours', r.ratio('same', 'bare', 'ours'), 1.)
    row('bare stack, no dropout, same allocator / ours', r.ratio('still', 'bare', 'ours'))
    row('bare stack, default allocator / ours', r.ratio('step', 'bare', 'ours'))
    row('share of the matrix rate that our step uses', r.use('step', 'ours'))
    row('adapters / joint step', r.ratio('meta', 'adapters', 'joint'))
    for n, goal in (('finite_difference', 5.3), ('one_sided', None), ('first_order', None),
                    ('exact', None)):
        label, section = f'meta step ({n.replace("_", " ")})', 'exact' if n == 'exact' else 'meta'
        row(f'{label} / adapters, time', r.ratio(section, n, 'adapters'), goal, False)
        row(f'{label} / adapters, memory', r.ratio(section, n, 'adapters', 'peak_mb'),
            goal and 1.2, False)
        row(f'{label} / adapters, live tensors', r.ratio(section, n, 'adapters', 'tensors_mb'))
    row('activations recomputed / adapters, time', r.ratio('meta', 'recomputed', 'adapters'))
    row('activations recomputed / adapters, memory',
        r.ratio('meta', 'recomputed', 'adapters', 'peak_mb'))
    for kind in ('plain', 'meta', 'sampled'):
        row(f'8 languages / 2, {kind} step', r.ratio('languages', f'{kind} 8', f'{kind} 2'))
    row('our tokenizer, MB a second on one core', r.rate('tokenise', 'tokenise'))
    row('tokenizers / our tokenizer, time', r.ratio('tokenise', 'tokenise_theirs', 'tokenise'))
    row('loader / what training eats, tokens a second', r.loader(), 20)
    row('data preparation, four times the text: memory',
        r.ratio('prepare', '4x', '1x', 'peak_mb'), 1.2, False)
    row('data preparation, four times the text: time', r.ratio('prepare', '4x', '1x'))
    if 'gpu_step' in sections:
        row('GPU: our compiled step, tokens a second', r.rate('gpu_step', 'compiled'))
        row('GPU: fastest peer / ours', r.peer('gpu_step'), 2.)
        row('GPU: fastest peer / ours compiled', r.peer('gpu_step', 'compiled'), 2.)
        row('GPU: ours / ours compiled', r.ratio('gpu_step', 'ours', 'compiled'))
        row('GPU: share of the matrix rate', r.use('gpu_step', 'ours'), .5)
        row('GPU: share of the matrix rate, compiled', r.use('gpu_step', 'compiled'), .5)
        row('GPU: meta step (finite difference) / adapters, time',
            r.ratio('gpu_meta', 'finite_difference', 'adapters'), 5.3, False)
        row('GPU: meta step (finite difference) / adapters, memory',
            r.ratio('gpu_meta', 'finite_difference', 'adapters', 'peak_mb'), 1.2, False)
    return rows

def verdict(row: dict) -> str:
    "Say 'met', or by how much not."
    if row['measured'] is None: return 'not measured'
    if row['goal'] is None: return ''
    if row['met']: return 'met'
    return f'not met: {row["measured"][0] / row["goal"] - 1:+.1%}'

def show(rows: list[dict]) -> str:
    "Set the table as text."
    lines = [f'{"":54}{"measured":>9}  {"(spread)":16}{"goal":>9}']
    for row in rows:
        middle, low, high = row['measured'] or 3 * [float('nan')]
        goal = '' if row['goal'] is None else f'{"≥" if row["least"] else "≤"} {row["goal"]:g}'
        lines.append(f'{row["what"]:54}{middle:9.2f}  {f"({low:.2f} to {high:.2f})":16}{goal:>9}'
                     f'  {verdict(row)}'.rstrip())
    return '\n'.join(lines)

def machine() -> dict:
    "Say where and with what this was measured."
    try: model = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    except (OSError, TypeError): model = 'unknown'
    packages = ('torch', 'transformers', 'tokenizers', 'sentencepiece', 'numpy')
    c = Contestant(Job('machine'))
    about = c.receive() or sys.exit(c.error)
    c.close()
    return about['size'] | dict(cpu=model, cores=os.cpu_count(), threads=THREADS,
                             versions={p: version(p) for p in packages})

def name(about: dict) -> str:
    "Name this kind of machine."
    if about['gpu']: return re.sub(r'[^a-z0-9]+', '-', about['gpu'].lower()).strip('-')
    cores, threads = about['cores'], about['threads']
    return f'cpu-{cores}-cores' + f'-{threads}-threads' * (threads != cores)

def differences(a: dict, b: dict) -> list[str]:
    "Name the conditions that two files do not have in common, dates aside."
    a, b = (dict(r['machine'], quick=r['quick'], text=r['text'], date=None) for r in (a, b))
    return [k for k in {**a, **b} if a.get(k) != b.get(k)]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='tiny sizes; numbers mean nothing')
    parser.add_argument('--only', default='', help='sections to measure anew, with commas between')
    parser.add_argument('--seconds', type=float, help='of each section, in place of its own')
    parser.add_argument('--out', type=Path, help='file to write; default: benchmarks/MACHINE.json')
    options = parser.parse_args()
    only = set(filter(None, options.only.split(',')))
    known = plan(options.quick, dict(gpu='any', bfloat16=True))     # before anything is started
    if unknown := only - known.keys():
        parser.error(f'unknown section {", ".join(unknown)}. There are: {", ".join(known)}.')
    path = str(HERE), os.getenv('PYTHONPATH')
    os.environ.update(OMP_NUM_THREADS=str(THREADS), PYTHONPATH=os.pathsep.join(filter(None, path)))
    start, about = time.perf_counter(), machine()
    text = "the user's folder" if os.environ.get('INTERFERENCE_DATA') else 'generated'
    result = dict(machine=about, quick=options.quick, seed=0, text=text, sections={}, table=[],
                  wall_s=0.)
    out = options.out or HERE/f'{"quick" if options.quick else name(about)}.json'
    todo = plan(options.quick, about)
    if only:
        if absent := only - todo.keys(): parser.error(f'no GPU here for {", ".join(absent)}.')
        todo = {n: s for n, s in todo.items() if n in only}
        if out.exists():
            now, result = result, json.loads(out.read_text())
            if other := differences(now, result):
                parser.error(f'{out} was measured under other conditions ({", ".join(other)}). '
                             'Name another file with --out, or measure all of it.')
    if options.seconds: todo = {n: s | dict(budget=options.seconds) for n, s in todo.items()}
    sections, before = result['sections'], result['wall_s']
    left = sum(s['budget'] for s in todo.values())
    for n, section in todo.items():
        left -= section['budget']
        if not sys.stdout.isatty(): print(section['title'], flush=True)
        sections[n] = measure(section, left)
        for label, error in sections[n]['errors'].items(): print(f'{n}: {label} failed: {error}')
        result |= dict(table=table(sections),
                       wall_s=round(before + time.perf_counter() - start, 1))
        out.write_text(json.dumps(result, indent=1) + '\n')
    print(show(result['table']), f'\n{result["wall_s"] / 60:.1f} minutes; written to {out.name}')

if __name__ == '__main__': main()
