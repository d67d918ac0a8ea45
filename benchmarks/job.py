"What a contestant is asked to do. Nothing heavy is imported: only contestants need torch."
from dataclasses import dataclass, field

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
    keep: bool = True           # whether the allocator keeps freed blocks, as `train` sets it
    threads: int = 2
    device: str = 'cpu'
    precision: str = 'float32'  # 'bfloat16', 'float16': autocast
    compiled: bool = False
    langs: tuple[str, ...] = ('en', 'sw')
    variant: str = 'adpt'       # of the library's own steps
    meta: dict = field(default_factory=dict)    # settings of a meta step; none: a plain one
    recompute: bool = False     # activation checkpointing
    megabytes: float = 4        # of text

    @property
    def peer_heads(self) -> int:
        "The peers want heads that divide the width: 8 of 64 for 512, not 12 of 42."
        return max(h for h in range(1, self.n_heads + 1) if self.dim % h == 0)

def serve(job: Job, pipe):
    "Be a contestant, in the process made for it."
    from contestants import serve
    serve(job, pipe)
