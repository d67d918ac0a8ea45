"A run is killed, stopped, restarted: it ends as an uncut run does, bit for bit."
import os, random, signal, subprocess, sys, time, traceback
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from interference_nb import files, pretrain
from interference_nb.adapters import MultilingualLM
from interference_nb.data import Stream, dev_batches, prepare_corpus
from interference_nb.distributed import process_group, launch, rank_and_world_size
from interference_nb.pretrain import BatchSampler, TrainConfig, train
from interference_nb.files import InputError, JsonlLog, load_checkpoint, read_jsonl
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import ModelConfig
from waiting import LIMIT, wait_for

LANGS, EVERY = ('en', 'x3'), 5
CFG = TrainConfig.toy(steps=260, batch_size=2, seq_len=16, warmup=10, accumulate=2,
                      checkpoint_every=EVERY, eval_every=40)
SHORT = replace(CFG, steps=60)

def calm(*_): "Disturb nothing."

def run(home, folder, callback=calm, cfg=CFG):
    "Train a small model, with dropout, on the text in `home`."
    torch.set_num_threads(1)
    source = ToySource(seed=0, n_train=200, n_dev=20)
    tok = toy_tokenizer(source, LANGS)
    corpora = prepare_corpus(source, LANGS, tok, home, workers=1)
    V = tok.vocab_size
    stream = lambda l: Stream(corpora[l]['train'], cfg.batch_size, cfg.seq_len, 0, V, cfg.mask_prob)
    dev = {l: dev_batches(corpora[l]['validation'], 32, 16, V) for l in LANGS}
    torch.manual_seed(0)
    model = MultilingualLM(ModelConfig.toy(V, dim=16, n_layers=1, dropout=.1), LANGS, 'adpt')
    train(model, BatchSampler({l: stream(l) for l in LANGS}, cfg), cfg, dev, callbacks=[callback],
          folder=folder, progress=False)

def forked(*args, before=calm) -> int:  # process id
    "Run in a child, which starts with all that this process has imported."
    if pid := os.fork(): return pid
    try:
        before()
        run(*args)
        os._exit(0)
    except SystemExit as e: os._exit(e.code)
    except KeyboardInterrupt: os._exit(77)
    except BaseException: traceback.print_exc()
    finally: os._exit(1)

def left(folder):
    "What a run leaves: tensors, meta and rows, without what clocks and resumptions say."
    apart = {'wall_s', 'cpu_s', 'tokens_per_s', 'date'}
    clean = lambda row: {k: v for k, v in row.items() if k not in apart}
    tensors, meta = load_checkpoint(folder/'checkpoint.safetensors')
    rows = [r for r in read_jsonl(folder/'record.jsonl') if r['kind'] != 'resume']
    return tensors, clean(meta), [clean(r) for r in rows]

def assert_same(a, b):
    (a, *rest), (b, *others) = left(a), left(b)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert rest == others

def step_of(folder) -> int:
    "Step of the checkpoint, which must be whole; 0: there is none."
    path = folder/'checkpoint.safetensors'
    return load_checkpoint(path)[1]['step'] if path.exists() else 0

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Text, and in `whole` the run that nothing disturbed."
    home = tmp_path_factory.mktemp('elastic')
    run(home, home/'whole')
    run(home, home/'short', calm, SHORT)
    return home

def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)

def half_a_file(path, content):
    content = content if isinstance(content, bytes) else b''.join(content)
    with open(f'{path}.01234567.tmp', 'wb') as f: f.write(content[:len(content) // 2])
    die()

def half_a_line(record, kind, **row):
    with open(record.path, 'a') as f: f.write('{"kind": "st')
    die()

def at_call(module, name, death, n):
    "Put `death` in the place of a function's n-th call."
    usual, calls = getattr(module, name), iter(range(n))
    def f(*args, **kw): return (usual if next(calls, None) is not None else death)(*args, **kw)
    return lambda: setattr(module, name, f)

def moments(rng):
    "Ten moments of a checkpoint: before, while and after each of its files is written and named."
    def renamed(*args): os.rename(*args); die()
    for n in (rng.randrange(4), rng.randrange(4)):
        yield at_call(files, 'write_atomically', half_a_file, 1 + n)     # call 0 is the log's
        yield at_call(files.os, 'fsync', die, rng.randrange(9))
        yield at_call(files.os, 'replace', die, 1 + n)
        yield at_call(files.os, 'replace', renamed, 1 + n)
        yield at_call(JsonlLog, 'write', half_a_line, 1 + n)

def test_killed_at_twenty_moments(home):
    "kill -9, ten times at any moment and ten times while something is written; nothing is lost."
    rng, cut, known = random.Random(0), home/'cut', 0
    plans = [*moments(rng), *[None] * 10]
    rng.shuffle(plans)
    for plan in plans:
        r, w = os.pipe()
        tell = lambda k, *_, w=w: os.write(w, k.to_bytes(2))
        pid = forked(home, cut, tell, before=plan or calm)
        os.close(w)
        steps = []
        if plan is None:                # let it take some steps, and a little more
            steps += [os.read(r, 2) for _ in range(rng.randrange(1, 3 * EVERY))]
            time.sleep(rng.random() * .01)
            os.kill(pid, signal.SIGKILL)
        steps += iter(lambda r=r: os.read(r, 2), b'')
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, 'it ended before it was killed'
        os.close(r)
        steps = [int.from_bytes(s) for s in steps]
        assert steps == list(range(known, known + len(steps)))      # it went on where it was cut
        known, before = step_of(cut), known
        done = before + len(steps)
        assert known % EVERY == 0 and done - EVERY <= known <= done
    assert os.waitpid(forked(home, cut), 0)[1] == 0
    assert_same(cut, home/'whole')

def test_cut_after_the_last_checkpoint(home):
    "With all steps taken, a restart writes what is missing, in each process; so does a new start."
    cfg = replace(CFG, steps=10)
    two = lambda f, name: launch(f, home, home/name, calm, cfg, processes=2)
    kinds = lambda name: [r['kind'] for r in read_jsonl(home/name/'record.jsonl')]
    two(run, 'ended'), two(killed_at_the_end, 'unended')
    assert_same(home/'unended', home/'ended')
    two(run, 'ended')
    assert_same(home/'unended', home/'ended')
    (home/'ended'/'record.jsonl').unlink()
    run(home, home/'ended', calm, cfg)
    assert kinds('ended') == ['start', 'eval', 'end']

def killed_at_the_end(*args):
    "Kill rank 0 before the record's `end`, in the first life."
    if rank_and_world_size()[0] == 0 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        pretrain._RunLog.end = die
    run(*args)

def test_a_run_begun_anew_says_where_it_ran(tmp_path, monkeypatch):
    "What left no checkpoint leaves nothing in the record either."
    def on(hardware, callback=calm):
        monkeypatch.setattr(pretrain, 'run_info', lambda: dict(hardware=hardware))
        run(tmp_path, tmp_path/'run', callback, replace(CFG, steps=6))
    def break_off(k, *_):
        if k == 3: raise KeyError
    with pytest.raises(KeyError): on('old', break_off)
    on('new')
    rows = read_jsonl(tmp_path/'run'/'record.jsonl')
    assert [r['hardware'] for r in rows if r['kind'] == 'start'] == ['new']
    assert [r['kind'] for r in rows].count('eval') == 2

def test_weights_that_are_gone_do_not_take_results_with_them(tmp_path):
    "Pretraining anew keeps what was finetuned, or refuses: rows that training did not make stay."
    from interference_nb import cli, experiments    # not above: torchrun's processes import this
    from interference_nb.finetune import FinetuneConfig
    cfg = TrainConfig.toy(steps=6, warmup=2, eval_every=3)
    scale = experiments.Scale(ModelConfig.toy(0, dim=8, n_layers=1, ffn_dim=16), cfg, {
        'ner': FinetuneConfig.toy(epochs=1, max_train=32, max_dev=16, max_eval=16)})
    spec, = experiments.plan(['joint'], LANGS, 1, scale, tasks=('ner',))
    rows, home = experiments.run(spec, tmp_path), tmp_path/spec.name
    (home/'checkpoint.safetensors').unlink()
    with pytest.raises(InputError, match='has rows of finetune.* Put checkpoint.safetensors back'):
        run(tmp_path, home, cfg=cfg)
    assert read_jsonl(home/'record.jsonl') == rows
    cli.pretrain(cli.PretrainConfig(model=scale.model, train=cfg, langs=LANGS, out=tmp_path))
    assert (home/'checkpoint.safetensors').exists()
    kinds = [[r for r in all_rows if r['kind'] == 'finetune']
             for all_rows in (rows, read_jsonl(home/'record.jsonl'))]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 2

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGUSR1, 138),
                                          (signal.SIGINT, 77)])
def test_stop_signals_write_a_checkpoint(home, number, code):
    "The step is finished, a checkpoint written, the exit status says why; then it goes on exactly."
    folder = home/number.name
    raising = lambda k, *_: signal.raise_signal(number) if k == 12 else None
    status = os.waitpid(forked(home, folder, raising, SHORT), 0)[1]
    assert os.waitstatus_to_exitcode(status) == code and step_of(folder) == 13
    assert os.waitpid(forked(home, folder, calm, SHORT), 0)[1] == 0
    assert_same(folder, home/'short')

def test_second_signal_acts_at_once(home, tmp_path):
    "Who asks again, a second later, does not wait for a step that hangs."
    def hang(k, *_):
        os.write(w, b'.')
        while True: time.sleep(.01)
    r, w = os.pipe()
    pid = forked(home, tmp_path, hang)
    os.close(w)                         # a child that dies closes the other end: no wait for ever
    assert os.read(r, 1)
    os.kill(pid, signal.SIGTERM)
    time.sleep(1.2)
    os.kill(pid, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM and not step_of(tmp_path)

def test_torchrun_restarts_and_stops(home):
    "torchrun starts a killed rank again and hands a stop signal on; nothing shows in the end."
    two = lambda name: launch(run, home, home/name, calm, SHORT, processes=2)
    folder = home/'torchrun'
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
                '--max-restarts=3', __file__, home, folder]
    env = os.environ | {'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
    with open(home/'log', 'w') as log:
        command = subprocess.Popen(torchrun, env=env, stdout=log, stderr=log)
    wait_for((folder/'late').exists, command, (home/'log').read_text)
    command.send_signal(signal.SIGTERM)
    command.wait(LIMIT)
    assert (folder/'killed').exists()
    assert [(folder/f'exit{rank}').read_text() for rank in (0, 1)] == ['143', '143']
    assert 40 < step_of(folder) < SHORT.steps and step_of(folder) % EVERY
    two('torchrun'), two('two')
    assert_same(folder, home/'two')
    launch(killed_while_saving, home, home/'saving', processes=2)
    assert (home/'again').exists()
    assert_same(home/'saving', home/'two')

def killed_while_saving(home, folder):
    "Kill rank 0 in the middle of its third checkpoint, in the first life."
    if rank_and_world_size()[0] == 0:
        if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
            at_call(files, 'write_atomically', half_a_file, 3)()
        else:
            assert step_of(folder) == 2 * EVERY
            (home/'again').touch()
    run(home, folder, cfg=SHORT)

def disturbed(k, model, sampler, out):
    "Kill rank 1 in the first life of this run; in the second, grow slow."
    folder = Path(sys.argv[2])
    if k == 17 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and sampler.rank == 1:
        (folder/'killed').touch()
        die()
    if k == 40: (folder/'late').touch()
    if k >= 40: time.sleep(.3)

if __name__ == '__main__':
    with process_group():
        try: run(Path(sys.argv[1]), Path(sys.argv[2]), disturbed, SHORT)
        except SystemExit as e:
            (Path(sys.argv[2])/f'exit{rank_and_world_size()[0]}').write_text(str(e.code))
            raise
