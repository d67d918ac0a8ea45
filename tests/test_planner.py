"The account of memory against two allocators, plans that do not fit, and the commands."
import json, os, subprocess, sys
from contextlib import redirect_stderr
from dataclasses import replace
from types import SimpleNamespace
import pytest
import torch
from interference_nb import planner
from interference_nb.cli import main
from interference_nb.distributed import launch, rank_and_world_size
from interference_nb.experiments import SCALES, SYSTEMS, RunSpec, cost, on_cpu
from interference_nb.files import InputError, read_jsonl
from interference_nb.meta_adapters import MetaConfig
from interference_nb.planner import PURPOSES, StepSpec, account, measured_peak, plan_run
from interference_nb.pretrain import TrainConfig
from interference_nb.transformer import ModelConfig
from waiting import LIMIT

MODEL = ModelConfig.mini(500, dim=48, n_layers=2, n_heads=4, ffn_dim=160, max_len=64)
TRAIN = TrainConfig.mini(batch_size=6, seq_len=48, accumulate=2)
VARIANTS = 'joint', 'ffn', 'attn', 'adpt', 'share_adpt'
TRAINED = [s for s in SYSTEMS if not SYSTEMS[s].hub and s not in ('joint2x', 'joint6x', 'scratch')]
TOY = RunSpec('joint', ('en', 'x3'), ('en', 'x3'), 0, SCALES['toy'])
PAPERS = pytest.mark.xdist_group('paper')       # one process makes the account of its step once
PAPER = RunSpec('meta_adpt', ('en', 'fr'), ('en', 'fr'), 0, SCALES['paper'], 'hub')


@pytest.mark.parametrize('system, again', [(s, False) for s in TRAINED] + [
    (s, True) for s in (*VARIANTS, 'meta_adpt', 'meta_one_sided', 'meta_exact')])
def test_account_is_what_the_allocator_gave(system, again):
    "Every variant and every estimator, activations kept or computed again."
    langs = ('en',) if SYSTEMS[system].mono else ('en', 'fr')
    step = StepSpec(MODEL, replace(TRAIN, activation_checkpointing=again), system, langs)
    assert account(step).peak == pytest.approx(measured_peak(step), rel=.02)


def test_three_languages():
    step = StepSpec(MODEL, TRAIN, 'meta_adpt', ('en', 'hi', 'mr'))
    assert account(step).peak == pytest.approx(measured_peak(step), rel=.02)


@pytest.mark.parametrize('meta', [
    MetaConfig.released(estimator='finite_difference'),
    MetaConfig(phi_follows_training_gradient=True),
    MetaConfig(order='shared first'), MetaConfig(exclude_own_language=True),
    MetaConfig(validation='held-out')], ids=lambda m: f'{m.order}-{m.validation}')
def test_settings_of_the_meta_step(meta):
    step = StepSpec(MODEL, TRAIN, 'meta_adpt', meta=meta)
    assert account(step).peak == pytest.approx(measured_peak(step), rel=.02)


@pytest.mark.parametrize('change', [
    dict(isolate_documents=True), dict(dropout=0., attention_dropout=0.),
    dict(language_embeddings=True),
    dict(positions='relative', isolate_documents=True)], ids=lambda c: next(iter(c)))
def test_other_models(change):
    "Masks, the CPU's fused attention (which drops nothing), a vector for each language."
    model = replace(MODEL, **change)
    for cfg in (TRAIN, replace(TRAIN, mixed=True)):
        step = StepSpec(model, cfg, 'adpt')
        assert account(step).peak == pytest.approx(measured_peak(step), rel=.02)


def test_the_account_can_fail(monkeypatch):
    "A ledger that overlooks the feed-forward layers is found out."
    enter = planner.Ledger.enter
    def forgetful(self, t, kind, func=''):
        if t.shape[-1:] == (MODEL.ffn_dim,): return 0
        return enter(self, t, kind, func)
    monkeypatch.setattr(planner.Ledger, 'enter', forgetful)
    step = StepSpec(MODEL, TRAIN)
    assert planner._count_memory(step, True).peak < .95 * measured_peak(step)


def test_parts_are_named():
    "Parameters, moments and copies have the sizes that arithmetic gives them."
    found = {s: account(StepSpec(MODEL, TRAIN, s)) for s in ('joint', 'joint_all', 'meta_adpt')}
    for m in found.values():
        assert m.peak == sum(getattr(m, k) for k in PURPOSES)
        assert m.optimiser == pytest.approx(2 * m.parameters, rel=.01)
    assert found['joint_all'].copies >= 2 * found['joint'].parameters   # a gradient a language


@pytest.mark.parametrize('processes', [2, 4])
def test_traffic_is_what_processes_reduce(processes):
    "Each needed gradient once; the languages that a step did not see send nothing."
    cfg = replace(TRAIN, accumulate=4)
    one = account(StepSpec(MODEL, cfg))
    assert account(StepSpec(MODEL, cfg, processes=processes)).reduced == one.parameters
    adpt = account(StepSpec(MODEL, cfg, 'adpt', processes=processes))
    specific = (adpt.parameters - one.parameters) // 2
    assert adpt.reduced == one.parameters + specific
    assert one.reduced == 0
    with pytest.raises(InputError, match='accumulate is 4'):
        account(StepSpec(MODEL, cfg, processes=3))


@PAPERS
def test_a_gpu_of_32_gb_holds_every_variant():
    "128 rows of 256 tokens in mixed precision, as in the paper; the exact step does not fit."
    for system in ('ffn', 'adpt', 'meta_adpt'):
        assert plan_run(replace(PAPER, system=system), 4, 0).check().memory.peak < 31e9
    with pytest.raises(InputError, match='activation_checkpointing'):
        plan_run(replace(PAPER, system='meta_exact'), 4, 0, strict=True)


def test_private_parts_of_torch():
    "PyTorch promises neither to anybody; a plan cannot be made with a version that moved them."
    moved = f'torch {torch.__version__} has moved what the planner takes from its private parts: '
    try:
        with planner.fake_tensors():
            a = torch.zeros(1000)
            assert a.untyped_storage().nbytes() == 4000 and 'Fake' in type(a).__name__, moved
    except (ImportError, AttributeError) as e: pytest.fail(f'{moved}fake tensors ({e})')
    try:
        with planner.fake_processes(4):
            assert planner.dist.get_world_size() == 4, moved
            planner.dist.all_reduce(torch.ones(3))
    except (ImportError, AttributeError, RuntimeError, ValueError) as e:
        pytest.fail(f'{moved}the group that sends nothing ({e})')
    assert not planner.dist.is_initialized()
    with planner.fake_tensors():                    # a storage is one object as long as it lives
        a = torch.zeros(10)
        assert a.untyped_storage() is a.view(2, 5).untyped_storage(), f'{moved}storages'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('precision', ['float32', 'float16'])
@pytest.mark.parametrize('system', ['joint', 'ffn', 'adpt', 'meta_adpt', 'meta_exact'])
@pytest.mark.parametrize('again', [False, True], ids=['', 'checkpointing'])
def test_account_on_a_gpu(system, precision, again):
    model = ModelConfig.paper(8000, n_layers=3)
    cfg = TrainConfig.paper(accumulate=1, batch_size=16, precision=precision,
                            activation_checkpointing=again)
    step = StepSpec(model, cfg, system, device='cuda')
    assert measured_peak(step) == pytest.approx(account(step).peak, rel=.05)


def measured_elsewhere(*_): return os.getpid(), 'there'


def test_a_plan_leaves_the_gpus_to_the_processes_that_follow(monkeypatch):
    "As in the full-scale notebooks: who has used CUDA can start no processes that share it."
    def woken(*_): pytest.fail('CUDA was woken')
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
    said = SimpleNamespace(stdout='32000000000 A GPU\n')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, '_lazy_init', woken)
    monkeypatch.setattr(planner.subprocess, 'run', lambda *_, **kw: said)
    planner.gpu.cache_clear()
    planner._cached_account.cache_clear()
    plan = plan_run(TOY, seconds=0)
    planner.gpu.cache_clear()
    assert (plan.where, plan.room) == ('A GPU', 31e9) and plan.memory.peak > 1e6
    monkeypatch.setattr(planner, 'measured_step', measured_elsewhere)
    assert plan_run(TOY, seconds=1).step_s != os.getpid()


def backward_in(folder):
    "Leave this process's number, after a backward pass, for the other processes."
    torch.ones(2, requires_grad=True).sum().backward()
    (folder/f'{os.getpid()}').touch()


def test_a_plan_on_a_cuda_build_without_gpus_leaves_this_process_alone(monkeypatch, tmp_path):
    "As plain pip installs it on Linux: a backward pass here would let no process be forked later."
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
    backward_in(tmp_path)                       # learned already: a fork could not learn any more
    on_cpu(backward_in, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    planner._cached_account.cache_clear()
    monkeypatch.setattr(planner, '_count_memory', measured_elsewhere)
    assert account(StepSpec(MODEL, TRAIN))[0] != os.getpid()
    planner._cached_account.cache_clear()


@PAPERS
def test_more_processes_than_gpus(monkeypatch):
    "A plan of this machine says so; one of the paper's, made where no GPU is, does not."
    assert not plan_run(PAPER, 4, 0).problems()
    monkeypatch.setattr(planner, 'device', lambda: 'cuda')
    monkeypatch.setattr(planner, 'gpu', lambda: ('A GPU', 32 * 10**9))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert 'but this machine has 1 GPU.' in plan_run(PAPER, 4, 0).problems()[0]
    assert not plan_run(PAPER, 1, 0).problems()


def test_a_family_is_planned_as_a_whole(monkeypatch):
    "All of its runs count; a step that several systems take is measured once, for each."
    measured = []
    def step(spec, *_): return measured.append(spec.system) or (3600., 'by a sundial')
    monkeypatch.setattr(planner, 'measured_step', step)
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: False)     # the sundial stays here
    systems = [replace(TOY, system=s, seed=n) for s in ('joint', 'joint2x', 'adpt') for n in (0, 1)]
    said = planner.plan_family(systems, 1, seconds=1, folder='nowhere').splitlines()
    runs = {l.split()[0]: l.split() for l in said if l.split()[0] in ('joint2x', 'all')}
    steps = SCALES['toy'].train.steps
    assert measured == ['joint', 'adpt']
    assert [runs[k][1:3] for k in runs] == [['2', f'{4 * steps:,}'], ['6', f'{8 * steps:,}']]
    assert runs['all'][4] == f'{8 * steps:,.1f}' and 'hours: by a sundial' in said
    after = planner.plan_finetuning(systems, 2, seconds=1, folder='nowhere').splitlines()
    work = sum(cost(s) - cost(replace(s, tasks=())) for s in systems)
    assert [l for l in after if l.startswith('all')][0].split()[2:5] == [
        f'{work:,.0f}', f'{work:,.1f}', f'{work / 2:,.1f}']


def test_steps_that_read_every_language_count_each():
    plan = lambda system: plan_run(replace(TOY, system=system), seconds=0)
    assert plan('pcgrad').batch_tokens == len(TOY.langs) * plan('joint').batch_tokens > 0


@pytest.mark.parametrize('specs', [[], [replace(TOY, tasks=())], [replace(TOY, system='xlm')]])
def test_a_plan_of_no_finetuning_is_refused(specs):
    with pytest.raises(InputError, match='nothing to plan.*Add a system'):
        planner.plan_finetuning(specs, folder='nowhere')


def test_toy_plan_needs_no_gpu_and_little(tmp_path):
    plan = plan_run(TOY, seconds=.2, folder=tmp_path/'not'/'there')
    assert 0 < plan.hours < 1 and not plan.problems()
    assert 'timed for 0.2 s' in str(plan) and not (tmp_path/'not').exists()


def test_rows_are_scaled_where_time_or_memory_is_short(monkeypatch):
    "A step that takes too long is timed with fewer rows, and the plan says so."
    scale = replace(SCALES['toy'], train=replace(SCALES['toy'].train, batch_size=64, accumulate=8))
    spec = replace(TOY, scale=scale)
    rows = []
    def steps(step, *_):
        rows.append((step.train.batch_size, step.train.accumulate))
        return .1 * step.train.batch_size * step.train.accumulate
    monkeypatch.setattr(planner, 'time_steps', steps)
    seconds, how = planner.measured_step(spec, 2, 10)
    assert seconds == pytest.approx(.1 * 64 * 4) and f'a step of {rows[-1][0]} rows' in how
    assert planner.measured_step(spec, 2, 1e6)[1].startswith('the real step')
    assert rows[-1] == (64, 4)
    monkeypatch.setattr(planner, 'memory_of', lambda on, n: (1e6, 'a thimble'))
    assert 'scaled' in planner.measured_step(spec, 2, 1e6)[1]


def test_text_is_counted_where_it_is_and_estimated_where_it_is_not(tmp_path):
    from interference_nb.experiments import load_run_data
    spec = replace(TOY, max_sentences={'x3': 500})
    load_run_data(spec, tmp_path)
    ids = sum(p.stat().st_size for p in tmp_path.glob('data/*/*/*.ids'))
    assert plan_run(spec, seconds=0, folder=tmp_path).text.ids == ids
    assert plan_run(spec, seconds=0, folder=tmp_path/'else').text.ids == 0      # toy text is small


def command(capsys, *args):
    "Run a command; give status, output, errors."
    status = 0
    try: main([str(a) for a in args])
    except SystemExit as e: status = e.code or 0
    return status, *capsys.readouterr()


@PAPERS
def test_plan_command(capsys, tmp_path):
    status, out, err = command(capsys, 'plan', 'paper', '--system', 'meta_adpt', '--langs', 'en,fr',
                               '--processes', 4, '--seconds', 0, '--out', tmp_path)
    assert status == 0 and 'meta_adpt-en+fr-0, 4 processes' in out, err
    assert all(w in out for w in ('500,000', '65,536,000,000 tokens', 'not measured', 'checkpoint'))


@pytest.mark.parametrize('small', ['memory', 'disk', 'processes'])
def test_plan_of_a_machine_too_small(small, capsys, tmp_path, monkeypatch):
    "One line, the remedy, another status than 0; nothing is measured first."
    if small == 'memory': monkeypatch.setattr(planner, 'memory_of', lambda *_: (1e9, 'this toy'))
    else: monkeypatch.setattr(planner, 'memory_of', lambda *_: (1e12, 'this giant'))
    if small == 'disk': monkeypatch.setattr(planner, 'free_space', lambda _: 1e6)
    monkeypatch.setattr(planner, 'measured_step', lambda *_: pytest.fail('measured'))
    status, out, err = command(capsys, 'plan', 'paper', '--processes', 3 if small == 'processes'
                               else 4, '--out', tmp_path)
    assert (status, out, len(err.splitlines())) == (2, '', 1)
    assert dict(memory='activation_checkpointing', disk='Make room', processes='4')[small] in err


def test_export_command(capsys, tmp_path, monkeypatch):
    "What a run trained, for transformers; whole, and only where nothing lies."
    transformers = pytest.importorskip('transformers')
    run, out = tmp_path/'joint-en+x3-0', tmp_path/'hf'
    status, _, err = command(capsys, 'pretrain', 'toy', '--langs', 'en,x3', '--train.steps', 2,
                             '--train.warmup', 1, '--out', tmp_path)
    assert status == 0, err
    status, said, err = command(capsys, 'export', run, out)
    assert status == 0 and str(out) in said, err
    transformers.AutoModelForMaskedLM.from_pretrained(out)
    capsys.readouterr()                                 # it draws a bar
    about = json.loads((out/'config.json').read_text())
    assert 'joint-en+x3-0' in json.dumps(about)
    status, said, err = command(capsys, 'export', run, out)     # as after a failed upload
    assert status == 0 and str(out) in said, err
    (out/'config.json').write_text('{}')
    status, _, err = command(capsys, 'export', run, out)
    assert (status, len(err.splitlines())) == (2, 1) and 'not empty' in err
    status, _, err = command(capsys, 'export', run, tmp_path/'one', '--lang', 'tlh')
    assert (status, len(err.splitlines())) == (2, 1) and 'tlh' in err
    status, _, err = command(capsys, 'export', tmp_path/'none', tmp_path/'two')
    assert (status, len(err.splitlines())) == (2, 1) and 'no run' in err
    pushed = []
    from interference_nb import export
    monkeypatch.setattr(export, 'push_to_hub', lambda *a, **kw: pushed.append((a, kw)) or 'there')
    status, said, err = command(capsys, 'export', run, tmp_path/'up', '--push', 'me/mine')
    assert status == 0 and 'there' in said and pushed == [((tmp_path/'up', 'me/mine'),
                                                           dict(private=True))], err


PROGRAM = [sys.executable, '-c', 'from interference_nb.cli import main; main()']


def test_pretrain_by_torchrun(tmp_path):
    "Two processes train one run, and one of them prints."
    torchrun = '-m torch.distributed.run --standalone --nproc-per-node 2 --no-python'.split()
    args = ('pretrain toy --langs en,x3 --train.steps 4 --train.warmup 1 --train.accumulate 2 '
            f'--out {tmp_path}').split()
    done = subprocess.run([sys.executable, *torchrun, *PROGRAM, *args], capture_output=True,
                          text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('record and checkpoint in') == 1 == done.stdout.count('tokens/s')
    rows = read_jsonl(tmp_path/'joint-en+x3-0'/'record.jsonl')
    end = next(r for r in rows if r['kind'] == 'end')
    assert (rows[0]['world'], end['step'], end['reduced_mb'] > 0) == (2, 4, True)


def test_help_may_be_cut_short():
    "As by `head`: no message, and the status of a closed pipe."
    with subprocess.Popen([*PROGRAM, 'plan', 'paper', '--help'], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b'')


def test_one_process_for_what_one_process_does(tmp_path):
    "In a group, such as torchrun starts."
    def planned():
        with open(tmp_path/f'{rank_and_world_size()[0]}', 'w') as f, redirect_stderr(f):
            with pytest.raises(SystemExit, match='2'): main(['plan', 'toy', '--out', str(tmp_path)])
    launch(planned, processes=2)
    for rank in '01': assert 'Start it without torchrun' in (tmp_path/rank).read_text()


@PAPERS
def test_a_laptop_plans_for_the_gpus_of_the_paper(capsys, tmp_path, monkeypatch):
    "Its own memory is too small, its network is off: a plan all the same, without hours."
    own = planner.memory_of
    monkeypatch.setattr(planner, 'memory_of',
                        lambda on, n: (8e9 / n, 'a laptop') if on == 'cpu' else own(on, n))
    monkeypatch.setattr(planner, 'device', lambda: 'cpu')
    monkeypatch.setattr(planner, 'measured_step', lambda *_: pytest.fail('measured'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    status, out, err = command(capsys, 'plan', 'paper', '--system', 'meta_adpt', '--langs', 'en',
                               'sw', '--data', 'hub', '--processes', 4, '--out', tmp_path)
    assert status == 0 and 'not measured (more than the memory of this machine)' in out, err
    assert 'a V100 of 32 GB; there is no GPU here' in out


def test_text_of_another_vocabulary_is_not_there_yet(tmp_path):
    "What lies in the folder counts only if this run will read it."
    from interference_nb.data import prepare_corpus
    from interference_nb.tokenizers import WordTokenizer
    from interference_nb.experiments import load_run_data, vocabulary
    source, place, tokenizer = vocabulary(TOY, tmp_path)
    prepare_corpus(source, TOY.pair, WordTokenizer(['a', 'b']), place)
    assert planner.text_size(TOY, tmp_path).held == 0
    load_run_data(TOY, tmp_path)
    own = {e for e in place.glob('*/*.ids')}
    assert len(own) == 12
    assert 0 < planner.text_size(TOY, tmp_path).held < sum(e.stat().st_size for e in own)


def test_a_plan_that_knows_no_size_still_counts_what_it_does(tmp_path):
    plan = replace(plan_run(TOY, seconds=0, folder=tmp_path), text=planner.TextSize(None, 0., 5e9))
    assert plan.disk == plan.checkpoint
    assert replace(plan, free=plan.checkpoint - 1).problems()


def test_one_run_is_not_shared_by_workers(tmp_path):
    "Nor are there plans of no runs."
    long = replace(TOY, tasks=(), scale=replace(TOY.scale, train=replace(TOY.train, steps=10**7)))
    header, lines, _ = planner.plan_missing({'one': [long]}, tmp_path, 8)
    one = dict(zip(header, lines[0]))
    assert one['by 8 workers'] == one['hours'] != '0.0'
    with pytest.raises(InputError, match='no runs'): planner.plan_missing({}, tmp_path)


def test_probes_do_not_make_a_machine_look_fast():
    "The time of a record leaves probes out; so does the work that it is divided by."
    from interference_nb.gradient_probes import ProbeConfig
    plain = replace(TOY, tasks=())
    rows = [dict(kind='start', hardware=planner.run_info()['hardware']),
            dict(kind='end', wall_s=30.)]
    pace = [planner._pace([(s, rows)]) for s in (plain, replace(plain, probe=ProbeConfig()))]
    assert pace[0] == pace[1] == pytest.approx(30 / plain.train.steps)
