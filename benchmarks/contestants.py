"""One contestant of the benchmark, in a process of its own: told to step, it answers with seconds.

    python benchmarks/contestants.py '{"name": "ours", ...}'      then a number of steps on a line

Every contestant has a process to itself because the allocator's settings hold for a whole process.
"""
import ctypes, json, os, resource, sys, time
from dataclasses import dataclass, field, replace
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from interference_nb.data import Batch, Corpus, Stream, mask_tokens
from interference_nb.transformer import MaskedLM, ModelConfig

@dataclass(frozen=True)
class Job:
    "Say who steps, on what."
    name: str                   # a key of MAKERS
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 12
    ffn_dim: int = 2048
    vocab_size: int = 32_000
    batch_size: int = 8         # rows
    seq_len: int = 256          # tokens in a row
    dropout: float = .1         # everywhere that a contestant has dropout
    keep: bool = True           # whether the allocator keeps freed blocks
    threads: int = 2
    device: str = 'cpu'
    precision: str = 'float32'  # 'bfloat16', 'float16': autocast
    compiled: bool = False
    langs: tuple[str, ...] = ('en', 'sw')
    variant: str = 'adpt'       # of the library's own steps
    meta: dict = field(default_factory=dict)    # settings of a meta step

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(self.vocab_size, self.dim, self.n_layers, self.n_heads, None, self.ffn_dim,
                           self.seq_len, self.dropout, self.dropout)

    @property
    def peer_heads(self) -> int:
        "The peers want heads that divide the width: 8 of 64 for 512, not 12 of 42."
        return max(h for h in range(1, self.n_heads + 1) if self.dim % h == 0)

def keep_memory():
    "Have glibc keep freed blocks: by default a large one goes back to the system at every step."
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    try: libc = ctypes.CDLL('libc.so.6')
    except OSError: return
    libc.mallopt(M_MMAP_MAX, 0)                 # large blocks from the heap, not from mmap
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)   # and the heap's end stays ours

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
    model = MaskedLM(job.config)
    if job.compiled: [block.compile() for block in model.blocks]
    return model, model.loss

def bare(job):
    model = BareStack(job)
    return model, model.loss

def peer(model, **inputs):
    "A model of `transformers`, used as its documentation says: labels everywhere, -100 if not hidden."
    def loss(batch):
        labels = torch.full_like(batch.tokens, -100)
        labels.view(-1)[batch.positions] = batch.targets
        return model(input_ids=batch.tokens, labels=labels, **inputs).loss
    return model, loss

def bert(job, prefix='Bert', **options):
    import transformers
    config = getattr(transformers, f'{prefix}Config')(
        vocab_size=job.vocab_size, hidden_size=job.dim, num_hidden_layers=job.n_layers,
        num_attention_heads=job.peer_heads, intermediate_size=job.ffn_dim,
        hidden_dropout_prob=job.dropout, attention_probs_dropout_prob=job.dropout,
        max_position_embeddings=job.seq_len + 2, **options)
    return peer(getattr(transformers, f'{prefix}ForMaskedLM')(config))

def xmod(job):
    return bert(job, 'Xmod', languages=list(job.langs), default_language=job.langs[0])

def xlm(job):
    from transformers import XLMConfig, XLMWithLMHeadModel
    if job.ffn_dim != 4 * job.dim: raise SystemExit("XLM's inner width is 4 times its width.")
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
    "A step of the library as `train` takes it, on random text: joint, or meta where `job.meta` says so."
    from interference_nb.adapters import MultilingualLM
    from interference_nb.meta_adapters import MetaConfig, MetaStep
    from interference_nb.pretrain import Feed, JointStep, TrainConfig
    cfg = TrainConfig(steps=1000, batch_size=job.batch_size, seq_len=job.seq_len,
                      precision=job.precision)
    def stream(i, lang):
        ids = np.random.default_rng(i).integers(5, job.vocab_size, 64 * job.batch_size * job.seq_len)
        corpus = Corpus(ids.astype(np.uint16), lang, 'train', 1, 1)
        return Stream(corpus, job.batch_size, job.seq_len, 0, job.vocab_size)
    feed = Feed({l: stream(i, l) for i, l in enumerate(job.langs)}, cfg, device=job.device)
    model = MultilingualLM(job.config, job.langs, job.variant).to(job.device).train()
    take = MetaStep(model, cfg, MetaConfig(**job.meta)) if job.meta else JointStep(model, cfg)
    def step(k): take(k + 1, feed, 1e-4)        # not step 0, where the meta step logs more
    step.passes = lambda: take.passes
    return step, sum(p.numel() for p in model.parameters())

MAKERS = dict(ours=masked_lm(ours), bare=masked_lm(bare), bert=masked_lm(bert), xlm=masked_lm(xlm),
              xmod=masked_lm(xmod), library=library)

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

def main(job: Job):
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    if job.keep: keep_memory()
    on_gpu = job.device == 'cuda'
    before = resident()
    step, parameters = MAKERS[job.name](job)
    answer = lambda **row: print(json.dumps(row), flush=True)
    answer(parameters=parameters)
    k = 0
    for line in sys.stdin:
        steps, seconds, passes = int(line), [], getattr(step, 'passes', lambda: 0)
        if on_gpu: torch.cuda.reset_peak_memory_stats()
        forget_peak()
        done = passes()
        for _ in range(steps):
            start = time.perf_counter(); step(k)
            if on_gpu: torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start); k += 1
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident(peak=True) - before
        answer(seconds=seconds, cpu=time.process_time(), peak_mb=peak, passes=(passes() - done) / steps)

if __name__ == '__main__':
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    job = Job(**json.loads(sys.argv[1]))
    main(replace(job, langs=tuple(job.langs)))
