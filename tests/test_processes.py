"One, two and four processes, a full disk, workers left alone: what a notebook cell cannot show."
import errno, faulthandler, io, os, pickle, resource, shutil, signal, stat, subprocess, sys, time
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
import pytest
import torch
from interference_nb import distributed, planner, pretrain
from interference_nb.adapters import MultilingualLM
from interference_nb.data import Stream, dev_batches, prepare_corpus
from interference_nb.files import InputError, JsonlLog, load_checkpoint, read_jsonl, save_checkpoint
from interference_nb.distributed import (all_gather, first_process_first, in_subprocess, launch,
                                         mean_over_processes, process_group, rank_and_world_size,
                                         traffic, worker_pool)
from interference_nb.gradient_probes import CombinedStep, GradientProbe, ProbeConfig
from interference_nb.meta_adapters import ESTIMATORS, MetaConfig, MetaStep
from interference_nb.pretrain import BatchSampler, JointStep, TrainConfig, seed_step, train
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import MaskedLM, ModelConfig
from waiting import LIMIT, afresh, stacks_if_late, wait_for

pytestmark = pytest.mark.xdist_group('processes')       # or each of pytest's workers makes the runs
LANGS, STEPS = ('en', 'x3'), 3
CFG = TrainConfig.toy(steps=STEPS, accumulate=4, seed=3, eval_every=3, checkpoint_every=2)
MIXED = replace(CFG, mixed=True)
META = {name: MetaConfig(estimator=name) for name in ESTIMATORS}
META |= dict(mixed_meta=MetaConfig(), sampled=MetaConfig(sampled_languages=1, meta_every=2),
             released=MetaConfig.released(validation='train'))
KINDS = dict(joint=JointStep, mixed=JointStep, mixed_vectors=JointStep, pcgrad=CombinedStep,
             gradvac=lambda *a: CombinedStep(*a, 'gradvac'))
KINDS |= {name: lambda *a, meta=meta: MetaStep(*a, meta) for name, meta in META.items()}

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "Text of two toy languages."
    source = ToySource(seed=0, n_train=300, n_dev=50)
    tok = toy_tokenizer(source, LANGS)
    home = tmp_path_factory.mktemp('text')
    return tok.vocab_size, prepare_corpus(source, LANGS, tok, home, workers=1)

def start(toy, cfg, vectors=False):     # or a model whose languages have a vector each
    V, corpora = toy
    stream = lambda l: Stream(corpora[l]['train'], cfg.batch_size, cfg.seq_len, 0, V, cfg.mask_prob)
    torch.manual_seed(0)
    size = ModelConfig.toy(V, language_embeddings=vectors)
    model = MaskedLM(size, LANGS) if vectors else MultilingualLM(size, LANGS, 'adpt')
    return model, BatchSampler({l: stream(l) for l in LANGS}, cfg)

def plain_descent(step):
    "Put SGD in Adam's place: Adam's first steps follow signs, also those of rounding errors."
    for name, opt in step.optimizers.items():
        step.optimizers[name] = torch.optim.SGD(opt.param_groups[0]['params'])
    return step

def weights(model): return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

def some_steps(toy, kind):
    "Take steps of one kind; return the weights, the losses and the bytes of each step."
    cfg = MIXED if kind.startswith('mixed') else CFG
    model, sampler = start(toy, cfg, kind == 'mixed_vectors')
    step, losses, sent = plain_descent(KINDS[kind](model, cfg)), [], []
    for k in range(STEPS):
        seed_step(cfg.seed, k)
        traffic.calls = traffic.bytes = 0
        out = step(k, sampler, .1)
        sent.append((traffic.calls, traffic.bytes))
        losses.append(all_gather(torch.stack([torch.as_tensor(x) for x in out.values()])).mean(0))
    return weights(model), torch.cat(losses), sent

def probed(toy, folder):
    model, sampler = start(toy, CFG)
    probe = GradientProbe(ProbeConfig(n_batches=4), folder)
    probe(0, model, sampler)
    assert probe.passes == 4 * 4
    return torch.tensor([list(c.values()) for c in probe.rows[0]['cos'].values()]).flatten()

def trained(toy, folder, **kw):
    model, sampler = start(toy, CFG)
    V, corpora = toy
    dev = {l: dev_batches(corpora[l]['validation'], 32, 32, V) for l in LANGS}
    train(model, sampler, CFG, dev, plain_descent(JointStep(model, CFG)), folder=folder,
          callbacks=[GradientProbe(ProbeConfig(every=2, n_batches=4))], progress=False, **kw)
    return weights(model)

def everything(toy, home):
    "Run every kind of step; each process leaves what came out in a file of its own."
    stacks_if_late()                # the launcher then starts all anew
    rank, world = rank_and_world_size()
    out = {kind: some_steps(toy, kind) for kind in KINDS}
    out['probe'] = probed(toy, home/f'probe{world}')
    if world == 2:
        trained(toy, home/'moved', stop_at=2)               # goes on with four processes
        if rank == 0: shutil.copytree(home/'moved', home/'own0', dirs_exist_ok=True)
        with pytest.raises(InputError, match=r'different steps: \[2, 0\].*folder that all'):
            trained(toy, home/f'own{rank}')
    if world == 4: out['moved'] = trained(toy, home/'moved')
    out['whole'] = trained(toy, home/f'whole{world}')
    torch.save(out, home/f'{world}-{rank}.pt')
    faulthandler.cancel_dump_traceback_later()

def all_worlds(toy, home):
    for world in (1, 2, 4): launch(everything, toy, home, processes=world)

def forks_after_a_gpu_that_is_not_there(compiled):
    "What the compiler's tracing does, without its minutes: a gradient among fake tensors."
    from torch._subclasses.fake_tensor import FakeTensorMode
    if compiled:
        model = MaskedLM(ModelConfig.toy(60, dim=8, n_layers=1, ffn_dim=16))
        pretrain.prepare_model(model, TrainConfig.toy(compile=True))
        mode = FakeTensorMode()
    else: mode = planner.fake_tensors()
    def gradient(): torch.ones(2, requires_grad=True).sum().backward()
    with mode:
        torch.ones(2, device='cuda')
        gradient()
    if not (pid := os.fork()):
        try:
            gradient()
            os._exit(0)
        finally: os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is there')
@pytest.mark.parametrize('compiled', [True, False])
def test_processes_forked_after_the_compiler_or_a_plan_can_train(compiled):
    "PyTorch 2.15 built for CUDA counts the GPU that its tracing pretends, and refuses afterwards."
    afresh(forks_after_a_gpu_that_is_not_there, compiled)

def forks_and_connections(home):
    "Note when each process was forked, slowly, and when it went to connect."
    forked, connect = [], distributed.process_group
    os.register_at_fork(after_in_parent=lambda: time.sleep(.1),
                        after_in_child=lambda: forked.append(time.monotonic()))
    @contextmanager
    def noted():
        (home/os.environ['RANK']).write_text(f'{forked[-1]} {time.monotonic()}')
        with connect(): yield
    distributed.process_group = noted
    launch(rank_and_world_size, processes=4)

def test_no_process_connects_before_all_are_forked(tmp_path):
    """A launcher that answers one process while it forks another leaves it with a taken lock of the
    resolver, and the start hangs."""
    afresh(forks_and_connections, tmp_path)
    found = [map(float, (tmp_path/str(rank)).read_text().split()) for rank in range(4)]
    forked, connected = zip(*found, strict=True)
    assert max(forked) < min(connected)

@pytest.fixture(scope='module')
def runs(toy, tmp_path_factory):
    "What 1, 2 and 4 processes make of the same global batches: {world: [of rank 0, ...]}."
    home = tmp_path_factory.mktemp('runs')
    afresh(all_worlds, toy, home)
    load = lambda world: [torch.load(home/f'{world}-{rank}.pt', weights_only=True)
                          for rank in range(world)]
    return SimpleNamespace(home=home, of={world: load(world) for world in (1, 2, 4)})

@pytest.mark.parametrize('kind', KINDS)
def test_number_of_processes_changes_nothing(runs, kind):
    "The same global batches give the same losses and weights to rounding; all ranks end alike."
    (alone, losses, _), = (r[kind] for r in runs.of[1])
    for world in (2, 4):
        for rank in runs.of[world]:
            assert torch.equal(rank[kind][0], runs.of[world][0][kind][0])
            torch.testing.assert_close(rank[kind][0], alone, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank[kind][1], losses, rtol=1e-6, atol=1e-6, equal_nan=True)

def test_languages_met_on_some_ranks_only(toy):
    "What `mixed` went through above: a language that a rank has no batch of, but others have."
    _, sampler = start(toy, MIXED)
    sampler.world = 4
    for sampler.rank in range(4): assert len({b.lang for b in sampler.train(0)}) == 1
    assert sampler.langs_at(0) == LANGS

def test_probe_and_loop_agree_too(runs):
    "Cosines, weights and the record's losses, also of a run that went from two processes to four."
    (alone,) = runs.of[1]
    rows = lambda name: [r for r in read_jsonl(runs.home/name/'record.jsonl') if 'loss' in r]
    for world in (2, 4):
        for rank in runs.of[world]:
            torch.testing.assert_close(rank['probe'], alone['probe'], rtol=0, atol=2e-5)
            torch.testing.assert_close(rank['whole'], alone['whole'], rtol=1e-5, atol=1e-6)
        assert (runs.home/f'probe{world}'/'probe.jsonl').exists()
        for a, b in zip(rows('whole1'), rows(f'whole{world}'), strict=True):
            assert a['loss'] == pytest.approx(b['loss'], rel=1e-6) and a['passes'] == b['passes']
            sent = b['step'] * runs.of[world][0]['joint'][2][0][1]
            assert b['reduced_mb'] == pytest.approx(sent / 1e6)     # without the probe's messages
    torch.testing.assert_close(runs.of[4][0]['moved'], alone['whole'], rtol=1e-5, atol=1e-6)
    for a, b in zip(rows('moved'), rows('whole1'), strict=True):
        assert (a['step'], a['passes']) == (b['step'], b['passes'])
    places = [(r['kind'], r['world'], r['precision'])
              for r in read_jsonl(runs.home/'moved'/'record.jsonl') if 'world' in r]
    assert places == [('start', 2, 'float32'), ('resume', 4, 'float32')]

def test_bytes_reduced(runs, toy):
    "A step reduces each gradient that it needs once: one message here, as they fit one bucket."
    model, sampler = start(toy, CFG)
    size = lambda part: 4 * sum(p.numel() for p in part.values())
    theta, own = size(model.theta), size(model.phi['en'])
    both = len(start(toy, MIXED)[1].langs_at(0))            # languages of a mixed step
    # a meta step: g at theta, v and phi's at theta', the second-order term, theta's own update
    vectors = dict(start(toy, MIXED, vectors=True)[0].named_parameters())
    expected = dict(joint=[theta + own], mixed=[theta + both * own], mixed_vectors=[size(vectors)],
                    pcgrad=[2 * (theta + own)], gradvac=[2 * (theta + own)],
                    first_order=[theta, own, theta],
                    mixed_meta=[theta, theta + both * own, both * own, theta])
    for name in ('exact', 'finite_difference', 'one_sided'):
        expected[name] = [theta, theta + own, own, theta]
    for world in (2, 4):
        for rank in runs.of[world]:
            for kind, sizes in expected.items():
                assert rank[kind][2][0] == (len(sizes), sum(sizes)), kind
            assert rank['sampled'][2][1] == (1, theta)      # a step of rest
    assert not any(n for kind in KINDS for _, n in runs.of[1][0][kind][2])

def test_buckets(monkeypatch):
    "Small tensors share messages, in order; a large one goes alone and is not copied."
    sent = []
    monkeypatch.setattr(distributed, 'rank_and_world_size', lambda: (0, 2))
    monkeypatch.setattr(distributed.dist, 'get_backend', lambda: 'gloo')
    monkeypatch.setattr(distributed.dist, 'all_reduce', lambda t: sent.append(t.data_ptr()))
    tensors = [torch.full((n,), float(n)) for n in (3, 4, 20, 2)] + [torch.ones(4, 2).T]
    traffic.calls = traffic.bytes = 0
    mean_over_processes(tensors, bucket=40)
    assert (traffic.calls, traffic.bytes) == (3, 4 * 37) and sent[1] == tensors[2].data_ptr()
    for t, n in zip(tensors, (3, 4, 20, 2, 1)): assert (t == n / 2).all()

def test_what_does_not_divide_or_fit(toy, monkeypatch):
    "Batches that do not divide, more processes than GPUs: refused, with numbers that would do."
    monkeypatch.setattr(pretrain, 'rank_and_world_size', lambda: (0, 3))
    with pytest.raises(InputError, match='accumulate is 4: .* 3 processes. Start 1, 2, 4 of them'):
        start(toy, CFG)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(InputError, match='4 processes, but this machine has 2 GPUs. Start 2'):
        launch(print, processes=4)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    with pytest.raises(InputError, match='3 processes, but .* has 2 GPUs'), process_group():
        pass

def test_recomputing_needs_a_model_that_can():
    with pytest.raises(InputError, match='cannot recompute its activations'):
        pretrain.prepare_model(torch.nn.Linear(1, 1), replace(CFG, activation_checkpointing=True))

def test_compiled_blocks_change_rounding_only(toy, monkeypatch):
    "Weights keep their names; here without a C++ compiler. No block falls back, or it says so."
    compiled = replace(CFG, accumulate=1, steps=4, compile=True)
    usual = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda m: usual(m, backend='aot_eager'))
    def taken(cfg):
        model, sampler = start(toy, cfg)
        names = list(model.state_dict())
        pretrain.prepare_model(model, cfg)
        assert list(model.state_dict()) == names
        step = plain_descent(MetaStep(model, cfg))
        for k in range(4): step(k, sampler, .1)
        return weights(model)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters['frames']
    frames.clear()
    a = taken(compiled)
    assert 8 <= frames['ok'] == frames['total']     # torch makes 8 by default: some make more
    made, b = frames['total'], taken(replace(compiled, compile=False))
    assert made == frames['total']
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="no second derivative, which 'exact' needs"):
        MetaStep(start(toy, compiled)[0], compiled, META['exact'])
    with pytest.raises(InputError, match='no blocks to compile'):
        pretrain.prepare_model(torch.nn.Linear(1, 1), compiled)

def test_matrix_products_may_repeat_on_a_gpu():
    "CUDA reads this when it begins: deterministic operations warn at each product without it."
    assert os.environ['CUBLAS_WORKSPACE_CONFIG'] in (':4096:8', ':16:8')

def test_another_precision_is_refused(toy, tmp_path):
    "A run goes on in the precision that it had, whatever 'auto' means on the machine."
    trained(toy, tmp_path, stop_at=2)
    tensors, meta = load_checkpoint(tmp_path/'checkpoint.safetensors')
    save_checkpoint(tmp_path/'checkpoint.safetensors', tensors, meta | dict(precision='bfloat16'))
    with pytest.raises(InputError, match='made in bfloat16, .* on in float32. .*precision bfloat'):
        trained(toy, tmp_path)

def test_failure_of_a_process_is_told(tmp_path):
    "A process that dies is started again, one that fails is not: its message comes back."
    lives, answers = tmp_path/'lives', signal.getsignal(signal.SIGTERM)
    def fails():
        if rank_and_world_size()[0] == 0: return
        with open(lives, 'a') as f: f.write('.')
        if lives.stat().st_size == 1: os.kill(os.getpid(), signal.SIGKILL)
        raise OSError('no such file')
    with pytest.raises(InputError, match='process 1 of 2 failed: OSError: no such file'):
        launch(fails, processes=2)
    assert lives.read_text() == '..' and signal.getsignal(signal.SIGTERM) is answers
    def too_large():
        with open(tmp_path/f'life{rank_and_world_size()[0]}', 'a') as f: f.write('.')
        raise torch.OutOfMemoryError('out of memory')
    with pytest.raises(InputError, match='failed: OutOfMemoryError: out of memory'):
        launch(too_large, processes=2)
    assert (tmp_path/'life0').read_text() == '.'

def test_first_process_first(tmp_path):
    "The others wait for rank 0, and fail with it; ten times leave no more open than once."
    def ordered():
        rank = rank_and_world_size()[0]
        with first_process_first():
            if rank == 0: time.sleep(.5); (tmp_path/'made').touch()
            assert (tmp_path/'made').exists()
        with pytest.raises((OSError, InputError), match='no room'):
            with first_process_first():
                if rank == 0: raise OSError('no room')
        handles = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
        for _ in range(10):
            with first_process_first(): pass
        assert not handles or len(os.listdir('/proc/self/fd')) == handles
        (tmp_path/f'{rank}').touch()
    launch(ordered, processes=2)
    assert (tmp_path/'0').exists() and (tmp_path/'1').exists()

def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    "Where the system refuses to write, the checkpoint before stays whole and the message names it."
    path = tmp_path/'checkpoint.safetensors'
    save_checkpoint(path, {'w': torch.zeros(10)}, dict(step=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match='could not write .*safetensors .*Make room'):
            save_checkpoint(path, {'w': torch.ones(100_000)}, dict(step=2))
        with pytest.raises(InputError, match='could not write .*record.jsonl .*Make room'):
            JsonlLog(tmp_path/'log'/'record.jsonl').write('step', loss=[0.] * 9999)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tensors, meta = load_checkpoint(path)
    assert meta['step'] == 1 and not tensors['w'].any()
    assert [p.name for p in tmp_path.glob('c*')] == ['checkpoint.safetensors']  # and nothing else

def test_what_outlives_a_power_cut(tmp_path, monkeypatch):
    "Files are on the disk before they get their name; a folder, where the system can."
    usual, calls = os.fsync, []
    def only_files(handle):
        calls.append('fsync')
        if stat.S_ISDIR(os.fstat(handle).st_mode): raise OSError(errno.EINVAL, 'Invalid argument')
        usual(handle)
    def renamed(*names): calls.append('replace'); os.rename(*names)
    monkeypatch.setattr(os, 'fsync', only_files)
    monkeypatch.setattr(os, 'replace', renamed)
    JsonlLog(tmp_path/'record.jsonl')
    save_checkpoint(tmp_path/'checkpoint.safetensors', {'w': torch.zeros(1)}, dict(step=1))
    assert calls == ['fsync', 'replace', 'fsync'] * 2

def about_me(): return os.getpid(), torch.get_num_threads(), os.environ.get('CUDA_VISIBLE_DEVICES')

def test_what_a_worker_starts_with():
    "One thread, and an environment of its own."
    with worker_pool(2, CUDA_VISIBLE_DEVICES='') as pool:
        pid, threads, seen = pool.submit(about_me).result()
    assert pid != os.getpid() and threads == 1 and seen == '' != about_me()[2]

def test_a_subprocess_is_used_where_torch_has_cuda(monkeypatch):
    "By the build, not by the GPUs: autograd's threads make a later fork fail without any."
    for built in (False, True):
        monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda built=built: built)
        assert (in_subprocess(about_me)[0] != os.getpid()) == built

def test_a_full_disk_ends_all_processes(toy, tmp_path):
    "What stops the first process's checkpoint stops the others, with its message, at once."
    def full(*_): raise InputError('could not write: make room on the disk')
    def two():
        pretrain.save_checkpoint = full
        start = time.monotonic()
        try: trained(toy, tmp_path)
        except InputError as e: (tmp_path/f'{rank_and_world_size()[0]}').write_text(str(e))
        (tmp_path/f'took{rank_and_world_size()[0]}').write_text(str(time.monotonic() - start))
        raise OSError('no room')
    with pytest.raises(InputError, match='no room'): launch(two, processes=2)
    for rank, before in enumerate(('', 'the first process failed: ')):
        said = (tmp_path/str(rank)).read_text()
        assert said == f'{before}could not write: make room on the disk'
        assert float((tmp_path/f'took{rank}').read_text()) < LIMIT  # gloo waits for 1,800 s

MAIN = 'from interference_nb.cli import main; main()'

def test_workers_end_with_a_killed_command(tmp_path):
    "No worker goes on writing when its command is gone: the next one would meet it in the folder."
    args = ['demo', '--systems', 'joint', '--seeds', '2', '--steps', '20000', '--out', tmp_path]
    command = subprocess.Popen([sys.executable, '-c', MAIN, *args], stdout=subprocess.PIPE,
                               start_new_session=True)
    try:
        wait_for(lambda: any(tmp_path.glob('*/record.jsonl')), command)     # a worker writes
        command.kill()
        command.communicate(timeout=LIMIT)  # ends when nobody is left who could write to the pipe
    finally:
        with suppress(ProcessLookupError): os.killpg(command.pid, signal.SIGKILL)

def test_what_a_notebook_defines_is_sent_by_its_name():
    "A worker has no notebook: functions and classes of `__main__` are those of the package there."
    own = type('TrainConfig', (), dict(__module__='__main__', __qualname__='TrainConfig'))
    parcel = io.BytesIO()
    distributed._Sender(parcel).dump((own, [own], int))
    assert pickle.loads(parcel.getvalue()) == (TrainConfig, [TrainConfig], int)
    with pytest.raises(pickle.PicklingError):
        nobodys = type('Nobodys', (), dict(__module__='__main__', __qualname__='Nobodys'))
        distributed._Sender(parcel).dump(nobodys)

def test_a_function_of_a_notebook_runs_elsewhere_where_torch_has_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
    def fail(): raise AssertionError('called in this process')
    fail.__module__, fail.__qualname__ = '__main__', 'rank_and_world_size'
    assert in_subprocess(fail) == (0, 1)
