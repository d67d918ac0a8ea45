"Several processes, a kill in the middle, a full disk: what a notebook cell cannot show."
import multiprocessing, os, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
from interference_nb.adapters import MultilingualLM
from interference_nb.data import InputError, Stream, prepare_corpus
from interference_nb.gradient_probes import CombinedStep, GradientProbe, ProbeConfig
from interference_nb.meta_adapters import MetaConfig, MetaStep
from interference_nb.pretrain import (Feed, JointStep, TrainConfig, load_checkpoint,
                                      read_record, save_checkpoint, seed_step)
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import ModelConfig

LANGS = ('en', 'x3')

def weights_after(folder, step_name, accumulate, steps=3):
    "Train a few steps and return the weights; for 'probe', don't, and return all cosines."
    torch.set_num_threads(1)
    source = ToySource(seed=0, n_train=300, n_dev=50)
    tok = toy_tokenizer(source, LANGS)
    corpora = prepare_corpus(source, LANGS, tok, folder, workers=1)
    cfg = TrainConfig.toy(steps=steps, accumulate=accumulate, clip=1e9)
    stream = lambda l: Stream(corpora[l]['train'], cfg.batch_size, cfg.seq_len, 0,
                              tok.vocab_size, cfg.mask_prob)
    feed = Feed({l: stream(l) for l in LANGS}, cfg)
    torch.manual_seed(0)
    variant = 'adpt' if step_name in ('meta', 'pcgrad') else 'joint'
    model = MultilingualLM(ModelConfig.toy(tok.vocab_size), LANGS, variant)
    if step_name == 'probe':
        probe = GradientProbe(ProbeConfig(n_batches=4), folder)
        probe(0, model, feed)
        assert probe.passes == 4 * 4 // feed.world
        assert (Path(folder)/'probe.jsonl').exists() == (feed.rank == 0)
        return torch.tensor([list(c.values()) for c in probe.rows[0]['cos'].values()]).flatten()
    step = {'joint': lambda: JointStep(model, cfg), 'pcgrad': lambda: CombinedStep(model, cfg),
            'meta': lambda: MetaStep(model, cfg, MetaConfig())}[step_name]()
    for k in range(steps):
        seed_step(cfg.seed, k)
        step(k, feed, 1e-3)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

def one_of_two(rank, folder, step_name, out):
    os.environ.update(MASTER_ADDR='127.0.0.1', RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    out.put((rank, weights_after(Path(folder)/str(rank), step_name, accumulate=1).numpy()))
    dist.barrier()
    dist.destroy_process_group()

@pytest.mark.parametrize('step_name', ['joint', 'meta', 'pcgrad', 'probe'])
def test_two_processes_agree(tmp_path, step_name):
    "Two processes end alike; but for the meta step, also like one that sees the batches of both."
    spawn = multiprocessing.get_context('spawn')
    out = spawn.Queue()
    both = [spawn.Process(target=one_of_two, args=(rank, str(tmp_path), step_name, out))
            for rank in range(2)]
    for p in both: p.start()
    weights = dict(out.get(timeout=120) for _ in both)
    for p in both: p.join(60); assert p.exitcode == 0
    assert (weights[0] == weights[1]).all()
    if step_name != 'meta':
        alone = weights_after(tmp_path/'alone', step_name, accumulate=2)
        close = torch.isclose(torch.from_numpy(weights[0]), alone, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > .99       # Adam's first steps follow signs, also of rounding

COMMAND = [sys.executable, '-c', 'from interference_nb.cli import main; main()',
           'pretrain', 'toy', '--system', 'meta_adpt', '--train.steps', '80',
           '--train.warmup', '10', '--train.eval-every', '40',
           '--train.checkpoint-every', '10', '--out']

def test_killed_run_ends_with_the_same_bits(tmp_path):
    "A process killed without warning, started again, ends like one that was left alone."
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    quiet = dict(env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([*COMMAND, tmp_path/'whole'], check=True, **quiet)
    victim = subprocess.Popen([*COMMAND, tmp_path/'cut'], **quiet)
    home = lambda name: tmp_path/name/'meta_adpt-en+x3-0'
    checkpoint = home('cut')/'checkpoint.safetensors'
    deadline = time.time() + 120
    while not checkpoint.exists() and time.time() < deadline: time.sleep(.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    at_kill = load_checkpoint(checkpoint)[1]['step']
    assert 0 < at_kill < 80, f'killed after step {at_kill}: too late to test anything'
    subprocess.run([*COMMAND, tmp_path/'cut'], check=True, **quiet)
    (a, _), (b, _) = (load_checkpoint(home(x)/'checkpoint.safetensors') for x in ('whole', 'cut'))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    whole, cut = (read_record(home(x)/'record.jsonl') for x in ('whole', 'cut'))
    ppl = lambda rows: [(r['step'], r['ppl']) for r in rows if r['kind'] == 'eval']
    assert ppl(whole) == ppl(cut)

def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    "Where the system refuses to write, the checkpoint before stays whole and the message names it."
    path = tmp_path/'checkpoint.safetensors'
    save_checkpoint(path, {'w': torch.zeros(10)}, dict(step=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match='could not write .*checkpoint before it is untouched'):
            save_checkpoint(path, {'w': torch.ones(100_000)}, dict(step=2))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tensors, meta = load_checkpoint(path)
    assert meta['step'] == 1 and not tensors['w'].any()
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.safetensors']   # and nothing else

def test_workers_end_with_a_killed_command(tmp_path):
    "No worker goes on writing when its command is gone: the next one would meet it in the folder."
    args = ['demo', '--systems', 'joint', '--seeds', '2', '--steps', '20000', '--out', tmp_path]
    command = subprocess.Popen([*COMMAND[:3], *args], stdout=subprocess.DEVNULL)
    grown = lambda: sum(p.stat().st_size for p in tmp_path.glob('*/record.jsonl'))
    deadline = time.time() + 120
    while grown() < 10_000 and time.time() < deadline: time.sleep(.1)
    command.kill()
    command.wait()
    time.sleep(3)
    size = grown()
    time.sleep(3)
    assert grown() == size
