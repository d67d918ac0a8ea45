"Contestants that turn text into ids and ids into batches."
import functools, os, tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
import numpy as np
from tokenizers import Tokenizer as Theirs, models, pre_tokenizers, trainers
from interference_nb.data import Corpus, Source, Stream, prepare_corpus, split_sentences
from interference_nb.folders import FolderSource
from interference_nb.tokenizers import Tokenizer

SCRIPTS = 'aeioukmnptswlr', 'аеиоукмнптсвлр', 'अआइउएकमनपतसवलर'

@functools.cache
def lexicon(letters: str, n: int = 30_000) -> list[str]:
    "Make words of 1 to 4 syllables."
    rng = np.random.default_rng(len(letters))
    syllables = np.array([a + b for a in letters for b in letters])
    lengths = rng.integers(1, 5, n)
    drawn = iter(syllables[rng.integers(0, len(syllables), lengths.sum())].tolist())
    return [''.join(islice(drawn, k)) for k in lengths.tolist()]

def generated(seed: int = 0) -> Iterator[str]:
    "Endless documents in three alphabets, their words as frequent as Zipf has it."
    rng, words = np.random.default_rng(seed), [lexicon(letters) for letters in SCRIPTS]
    p = 1 / np.arange(2, len(words[0]) + 2)
    while True:
        drawn = rng.choice(len(p), (500, 80), p=p / p.sum()).tolist()
        for own, row in zip(cycle(words), drawn):
            yield '. '.join(' '.join(own[w] for w in row[j:j + 16]) for j in range(0, 80, 16))

def documents(megabytes: float) -> Iterator[str]:
    "Give so much text: from the folder that INTERFERENCE_DATA names, else generated."
    folder, size = os.environ.get('INTERFERENCE_DATA'), 0
    source = FolderSource(folder) if folder else None
    found = (d for l in source.languages for d in source.text(l)) if folder else generated()
    for document in found:
        yield document
        size += len(document.encode())
        if size >= megabytes * 1e6: return

class Text(Source):
    "So much text as a source."
    name, languages = 'benchmark', ('en',)
    def __init__(self, megabytes): self.megabytes = megabytes
    def text(self, lang, split='train'): return documents(self.megabytes)
    def revision(self): return {}

def vocabulary(job) -> bytes:
    sentences = (s for d in documents(job.megabytes) for s in split_sentences(d))
    return Tokenizer.train(islice(sentences, 20_000), job.vocab_size).model

def tokenizer(job) -> Tokenizer:
    "Train in another process, so that its memory is not counted."
    with ProcessPoolExecutor(1) as pool: return Tokenizer(pool.submit(vocabulary, job).result())

def tokenise(job):
    "Our tokenizer, document by document, as `prepare_corpus` calls it."
    tok, texts = tokenizer(job), list(documents(job.megabytes))
    def step(k): return sum(len(tok.encode(t)) for t in texts)
    step.work = sum(len(t.encode()) for t in texts) / 1e6        # MB
    return step, tok.vocab_size

def tokenise_theirs(job):
    "The BPE of `tokenizers`, in batches without offsets, which is its fastest way."
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'               # megabytes a second and core
    tok, texts = Theirs(models.BPE(unk_token='<unk>')), list(documents(job.megabytes))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    sentences = islice((s for t in texts for s in split_sentences(t)), 20_000)
    tok.train_from_iterator(sentences, trainers.BpeTrainer(
        vocab_size=job.vocab_size, special_tokens=['<unk>'], show_progress=False))
    def step(k): return sum(len(e.ids) for e in tok.encode_batch_fast(texts))
    step.work = sum(len(t.encode()) for t in texts) / 1e6
    return step, tok.get_vocab_size()

def load(job):
    "Draw and mask training batches of one language."
    ids = np.random.default_rng(0).integers(5, job.vocab_size, 20_000_000).astype(np.uint16)
    stream = Stream(Corpus(ids, 'en', 'train', 1, 1), job.batch_size, job.seq_len, 0,
                    job.vocab_size)
    n = max(1, 1024 // job.batch_size)
    def step(k):
        for i in range(n): stream.batch(k * n + i)
    step.work = n * job.batch_size * job.seq_len                 # tokens
    return step, len(ids)

def prepare(job):
    "Tokenise text that is read as it comes into a file of ids, in one process."
    tok = tokenizer(job)
    next(documents(1))              # makes the words
    def step(k):
        with tempfile.TemporaryDirectory() as folder:
            prepare_corpus(Text(job.megabytes), ('en',), tok, folder, workers=1, splits=('train',))
    step.work = job.megabytes
    return step, tok.vocab_size

MAKERS = dict(tokenise=tokenise, tokenise_theirs=tokenise_theirs, load=load, prepare=prepare)
