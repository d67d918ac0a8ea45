"""What is measured: our steps, a bare stack, the models of `transformers`, and work on text.

Every contestant has a process to itself, because the allocator's settings hold for a whole process.
It steps when told to and answers with seconds and megabytes.
"""
import resource, time
from dataclasses import replace
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (BertConfig, BertForMaskedLM, XLMConfig, XLMWithLMHeadModel, XmodConfig,
                          XmodForMaskedLM)
import text
from interference_nb.adapters import MultilingualLM
from interference_nb.data import Batch, Corpus, Stream, mask_tokens
from interference_nb.meta_adapters import MetaConfig, MetaStep
from interference_nb.planner import StepSpec, account
from interference_nb.pretrain import (BatchSampler, JointStep, TrainConfig, keep_memory,
                                      prepare_model, run_info)
from interference_nb.transformer import MaskedLM, ModelConfig
from job import Job

transformers.logging.set_verbosity_error()

def config(job: Job) -> ModelConfig:
    return ModelConfig(job.vocab_size, job.dim, job.n_layers, job.n_heads, None, job.ffn_dim,
                       job.seq_len, job.dropout, job.dropout)

def batches(job: Job, n: int = 4) -> list[Batch]:
    "Rows of random tokens, 15% of them hidden."
    out = []
    for k in range(n):
        rng = np.random.default_rng(k)
        ids = rng.integers(5, job.vocab_size, (job.batch_size, job.seq_len))
        hidden = mask_tokens(ids, rng, job.vocab_size, .15)
        out.append(Batch(*map(torch.from_numpy, hidden), job.langs[0]).to(job.device))
    return out

class BareStack(nn.Module):
    "The floor: embeddings, attention and feed-forward in a row, a loss at the masked positions."
    def __init__(self, job: Job):
        super().__init__()
        inner = job.n_heads * (job.dim // job.n_heads)
        self.heads, self.p = job.n_heads, job.dropout
        self.embed = nn.Embedding(job.vocab_size, job.dim)
        self.place = nn.Parameter(torch.randn(job.seq_len, job.dim) * job.dim ** -.5)
        nn.init.normal_(self.embed.weight, std=job.dim ** -.5)
        linear = lambda a, b: nn.ModuleList(nn.Linear(a, b) for _ in range(job.n_layers))
        norm = lambda n: nn.ModuleList(nn.LayerNorm(job.dim) for _ in range(n))
        self.qkv, self.out = linear(job.dim, 3 * inner), linear(inner, job.dim)
        self.up, self.down = linear(job.dim, job.ffn_dim), linear(job.ffn_dim, job.dim)
        self.first, self.norm1, self.norm2 = norm(1)[0], norm(job.n_layers), norm(job.n_layers)

    def loss(self, batch):
        B, T = batch.tokens.shape
        drop = lambda x: F.dropout(x, self.p) if self.p else x
        x = drop(self.first(self.embed(batch.tokens) + self.place))
        for qkv, out, up, down, norm1, norm2 in zip(self.qkv, self.out, self.up, self.down,
                                                    self.norm1, self.norm2):
            q, k, v = qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p)
            x = norm1(x + drop(out(a.transpose(1, 2).reshape(B, T, -1))))
            x = norm2(x + drop(down(F.gelu(up(x)))))
        masked = x.flatten(0, 1).index_select(0, batch.positions)
        return F.cross_entropy(F.linear(masked, self.embed.weight), batch.targets)

def ours(job):
    model = MaskedLM(config(job)).to(job.device)
    prepare_model(model, TrainConfig(compile=job.compiled))         # as `train` does
    return model, model.loss

def bare(job):
    model = BareStack(job)
    return model, model.loss

def peer(model, **inputs):
    "A model of `transformers`, used as documented: a label everywhere, -100 where none is hidden."
    def loss(batch):
        labels = torch.full_like(batch.tokens, -100)
        labels.view(-1)[batch.positions] = batch.targets
        return model(input_ids=batch.tokens, labels=labels, **inputs).loss
    return model, loss

def bert(job, config=BertConfig, model=BertForMaskedLM, **options):
    return peer(model(config(
        vocab_size=job.vocab_size, hidden_size=job.dim, num_hidden_layers=job.n_layers,
        num_attention_heads=job.peer_heads, intermediate_size=job.ffn_dim,
        hidden_dropout_prob=job.dropout, attention_probs_dropout_prob=job.dropout,
        max_position_embeddings=job.seq_len + 2, **options)))

def xmod(job):
    return bert(job, XmodConfig, XmodForMaskedLM, languages=list(job.langs),
                default_language=job.langs[0])

def xlm(job):       # its inner width is always 4 times its width
    return peer(XLMWithLMHeadModel(XLMConfig(
        vocab_size=job.vocab_size, emb_dim=job.dim, n_layers=job.n_layers, n_heads=job.peer_heads,
        dropout=job.dropout, attention_dropout=job.dropout, max_position_embeddings=job.seq_len,
        n_langs=len(job.langs))))

def masked_lm(make):
    "Turn a maker of (model, loss) into a maker of steps: forward, backward, Adam."
    def maker(job):
        model, loss = make(job)
        model.to(job.device).train()
        adam = torch.optim.Adam(model.parameters(), 1e-4, betas=(.9, .98), fused=True)
        data = batches(job)
        scaler = torch.amp.GradScaler(job.device, enabled=job.precision == 'float16')
        cast = torch.autocast(job.device, getattr(torch, job.precision),
                              enabled=job.precision != 'float32')
        def step(k):
            with cast: value = loss(data[k % len(data)])
            scaler.scale(value).backward()
            scaler.step(adam); scaler.update()
            adam.zero_grad(set_to_none=True)
        return step, sum(p.numel() for p in model.parameters())
    return maker

def library(job):
    "A step as `train` takes it, clipping and all, on random text: joint, or meta."
    cfg = TrainConfig(steps=1000, batch_size=job.batch_size, seq_len=job.seq_len,
                      precision=job.precision, activation_checkpointing=job.recompute)
    meta = MetaConfig(**job.meta) if job.meta else None
    def stream(i, lang):
        ids = np.random.default_rng(i).integers(5, job.vocab_size, 2**21)
        corpus = Corpus(ids.astype(np.uint16), lang, 'train', 1, 1)
        return Stream(corpus, job.batch_size, job.seq_len, 0, job.vocab_size)
    sampler = BatchSampler({l: stream(i, l) for i, l in enumerate(job.langs)}, cfg,
                           device=job.device)
    model = MultilingualLM(config(job), job.langs, job.variant).to(job.device).train()
    prepare_model(model, cfg)
    take = MetaStep(model, cfg, meta) if meta else JointStep(model, cfg)
    def step(k): take(k + 1, sampler, 1e-4)        # not step 0, where the meta step logs more
    step.passes = lambda: take.passes
    counted = StepSpec(config(job), replace(cfg, precision=job.precision),
                       'meta_adpt' if meta else job.variant, tuple(job.langs), meta, job.device)
    step.tensors_mb = account(counted).peak / 2**20
    return step, sum(p.numel() for p in model.parameters())

def matmul(job):
    "One large matrix product: the rate that the machine can reach."
    n = 8192 if job.device == 'cuda' else 1024
    a, b = (torch.randn(n, n, device=job.device, dtype=getattr(torch, job.precision))
            for _ in range(2))
    def step(k):
        for _ in range(8): a @ b
    step.work = 8 * 2 * n ** 3                  # floating-point operations
    return step, n * n

def machine(job):
    "Not a contestant: tells where this runs."
    gpu = torch.cuda.is_available()
    return None, run_info() | dict(gpu=torch.cuda.get_device_name() if gpu else None,
                                   bfloat16=gpu and torch.cuda.get_device_capability() >= (8, 0))

MAKERS = dict(machine=machine, ours=masked_lm(ours), bare=masked_lm(bare),
              bert=masked_lm(bert), xlm=masked_lm(xlm), xmod=masked_lm(xmod), library=library,
              matmul=matmul, **text.MAKERS)

def resident(peak=False) -> float:
    "Memory of this process in MB, now or at its highest since `forget_peak`."
    try:
        with open('/proc/self/status') as f: lines = dict(line.split(':', 1) for line in f)
        return int(lines['VmHWM' if peak else 'VmRSS'].split()[0]) / 1024
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def forget_peak():
    "Let the highest memory count from here on (Linux)."
    try:
        with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    except OSError: pass

def serve(job: Job, pipe):
    "Make the contestant, then answer each number of steps with what they took."
    try:
        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        if job.keep: keep_memory()
        on_gpu = job.device == 'cuda'
        before = resident()
        step, size = MAKERS[job.name](job)
        if job.name == 'prepare': before = resident()       # the vocabulary is there already
        passes, k = getattr(step, 'passes', lambda: 0), 0
        pipe.send(dict(size=size, work=getattr(step, 'work', job.batch_size * job.seq_len),
                       tensors_mb=getattr(step, 'tensors_mb', 0.)))
        while steps := pipe.recv():
            forget_peak()
            if on_gpu:
                step(k); k += 1                 # fills the cache, which is not measured
                torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
            done, cpu, start = passes(), time.process_time(), time.perf_counter()
            for _ in range(steps): step(k); k += 1
            if on_gpu: torch.cuda.synchronize()
            row = dict(seconds=(time.perf_counter() - start) / steps,
                       cpu=(time.process_time() - cpu) / steps, passes=(passes() - done) / steps)
            peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident(True) - before
            if on_gpu: torch.cuda.empty_cache()         # for who steps next
            pipe.send(row | dict(peak_mb=peak))
    except (EOFError, OSError): pass            # nobody asks any more
    except Exception as e: pipe.send(dict(error=f'{type(e).__name__}: {e}'))
