"""`HubSource` against a stand-in for the hub on this machine: pinned commits, no remote code; then
the same with the stand-in gone, from the local copy. And a folder without test text."""
import hashlib, http.server, json, os, subprocess, sys, threading, urllib.parse
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from interference_nb import data
from interference_nb.data import HubSource
from interference_nb.experiments import Scale, plan, run
from interference_nb.files import InputError, read_jsonl
from interference_nb.pretrain import TrainConfig, cpu_has_bfloat16
from interference_nb.toy_languages import ToySource
from interference_nb.transformer import ModelConfig
from waiting import LIMIT

pytestmark = pytest.mark.xdist_group('hub')
MAIN, PARQUET = 'a' * 40, 'b' * 40
REVISIONS = {'main': MAIN, MAIN: MAIN, 'refs/convert/parquet': PARQUET, PARQUET: PARQUET}

@lru_cache(4)
def content_of(path):
    "What a file holds, and its name by content."
    content = path.read_bytes()
    return content, f'"{hashlib.sha1(content).hexdigest()}"'

class Hub(http.server.BaseHTTPRequestHandler):
    "The few answers that `datasets` and `huggingface_hub` need: repository, tree, paths, file."
    root, protocol_version, sent = None, 'HTTP/1.1', {}         # sent: bytes of each file
    def log_message(self, *args): pass

    def answer(self, code, body=b'', **headers):
        self.send_response(code)
        self.send_header('Content-Length', str(len(body)))
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def entry(self, base, path):
        size, kind = (0, 'directory') if path.is_dir() else (path.stat().st_size, 'file')
        name = path.relative_to(base).as_posix()
        return dict(type=kind, oid=hashlib.sha1(name.encode()).hexdigest(), size=size, path=name)

    def respond(self):
        sent = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        url = urllib.parse.urlparse(self.path)
        parts = [urllib.parse.unquote(p) for p in url.path.strip('/').split('/')]
        if parts[0] == 'api': parts = parts[1:]
        repo, what, rest = '/'.join(parts[1:3]), (parts[3:] or ['revision'])[0], parts[4:]
        commit = REVISIONS.get(rest[0] if rest else 'main')
        base, path = self.root / repo / str(commit), '/'.join(rest[1:])
        if what == 'resolve':
            if not (base / path).is_file():
                return self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
            content, tag = content_of(base / path)
            if 'Range' in self.headers and self.command == 'GET':
                first, last = self.headers['Range'].removeprefix('bytes=').split('-')
                part = content[int(first):int(last or len(content)) + 1]
                self.sent[path] = self.sent.get(path, 0) + len(part)
                span = f'bytes {first}-{int(first) + len(part) - 1}/{len(content)}'
                return self.answer(206, part, ETag=tag, X_Repo_Commit=commit, Content_Range=span)
            if self.command == 'GET': self.sent[path] = self.sent.get(path, 0) + len(content)
            return self.answer(200, content, ETag=tag, X_Repo_Commit=commit)
        if what == 'revision' and base.is_dir():
            about = dict(id=repo, sha=commit, siblings=[])
            return self.answer(200, json.dumps(about).encode())
        if what == 'tree' and (base / path).is_dir():
            deep = 'recursive=true' in url.query.lower()
            found = sorted((base / path).rglob('*') if deep else (base / path).iterdir())
            return self.answer(200, json.dumps([self.entry(base, f) for f in found]).encode())
        if what == 'paths-info':
            try: paths = json.loads(sent)['paths']
            except ValueError: paths = urllib.parse.parse_qs(sent.decode())['paths']
            found = [self.entry(base, base / p) for p in paths if (base / p).exists()]
            return self.answer(200, json.dumps(found).encode())
        self.answer(404, b'{}', X_Error_Code='EntryNotFound')
    do_GET = do_HEAD = do_POST = respond

def save(path, rows, group=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)

@contextmanager
def serving():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server
    finally: server.shutdown(); server.server_close()

def configs(*names, splits=('train',)):
    "The head of a card: where the files of each configuration are."
    lines = ['---', 'configs:']
    for name in names:
        lines += [f'- config_name: {name}', '  data_files:']
        lines += [f'  - {{split: {s}, path: {name}/{s}-*}}' for s in splits]
    return '\n'.join([*lines, '---', ''])

@pytest.fixture(scope='module')
def answers(tmp_path_factory):
    """What fresh processes get from a hub, and once it is gone; it has two data sets: Wikipedia,
    and treebanks whose main branch holds a loading script."""
    home = tmp_path_factory.mktemp('hub')
    Hub.root = home / 'repos'
    wikipedia = Hub.root / 'wikimedia/wikipedia' / MAIN
    save(wikipedia / '20231101.sw/train-00000-of-00001.parquet',
         [dict(id=str(i), url='', title='', text=f'Mtoto {i}.') for i in range(3000)])
    (wikipedia / 'README.md').write_text(CARD)
    treebanks = Hub.root / 'universal-dependencies/universal_dependencies'
    (treebanks / MAIN).mkdir(parents=True)
    (treebanks / MAIN / 'universal_dependencies.py').write_text('raise SystemExit("remote code")')
    for name in ('hi_hdtb/train', 'hi_hdtb/test', 'hi_pud/test'):
        save(treebanks / PARQUET / name / '0000.parquet',
             [dict(tokens=['a', 'b'], upos=[0, 13], misc=[''])])
    with serving() as server: online = ask(server, home, SIZES + CLIENT, '2')
    offline = ask(server, home, CLIENT + SIZES, '1')
    return SimpleNamespace(sizes=online[:4], online=online[4:], offline=offline[:6],
                           sizes_offline=offline[6:])

CARD = '''---
configs:
- config_name: 20231101.sw
  data_files:
  - split: train
    path: 20231101.sw/train-*
dataset_info:
- config_name: 20231101.sw
  features:
  - {name: id, dtype: string}
  - {name: url, dtype: string}
  - {name: title, dtype: string}
  - {name: text, dtype: string}
  splits:
  - {name: train, num_bytes: 100000, num_examples: 3000}
  download_size: 30000
  dataset_size: 100000
---
'''

CLIENT = '''
import sys
from interference_nb.data import HubSource, InputError, SPLITS
def tell(f):
    try: print(f())
    except InputError as e: print('InputError:', e)
for streaming in (False, True)[:int(sys.argv[1])]:
    hub = HubSource(streaming)
    tell(lambda: [hub.revision()['pos'], hub.revision()['text']])
    tell(lambda: [len(list(hub.text('sw', split))) for split in SPLITS])
    tell(lambda: [len(hub.examples('pos', 'hi', split)) for split in ('train', 'test')])
    tell(lambda: hub.examples('pos', 'hi', 'train'))
    tell(lambda: hub.examples('pos', 'hi', 'validation'))
    tell(lambda: hub.examples('nli', 'hi', 'test'))
'''

SIZES = '''
from interference_nb.data import HubSource, disk_needed
def tell(hub):
    row, = disk_needed(hub, ['sw'], 'ids')
    print(hub.size('sw'), hub.size('sw', 'test'), row['text'], row['ids'], row['copy'])
tell(HubSource(streaming=True))
tell(HubSource())
print(len(list(HubSource().text('sw'))) > 2000)
tell(HubSource())
'''

def ask(server, home, client, *words):
    "What a fresh process gets from the hub, line by line."
    address = f'http://127.0.0.1:{server.server_port}'
    patient = dict.fromkeys(('HF_HUB_DOWNLOAD_TIMEOUT', 'HF_HUB_ETAG_TIMEOUT'), str(int(LIMIT)))
    environment = os.environ | {'HF_HOME': str(home / 'home'), 'HF_ENDPOINT': address} | patient
    environment.pop('HF_HUB_OFFLINE', None)
    done = subprocess.run([sys.executable, '-c', client, *words], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

def test_hub_pins_commits_streams_and_falls_back_on_the_local_copy(answers):
    "Online, streaming, then with no hub; what was never fetched gives one sentence that helps."
    online, offline = answers.online, answers.offline
    assert online[:6] == online[6:]                 # with a local copy, and streaming
    assert online[0] == str([f'universal-dependencies/universal_dependencies@{PARQUET}',
                             f'wikimedia/wikipedia@{MAIN} 20231101 held-out 0.01'])
    assert sum(json.loads(online[1])) == 3000 and min(json.loads(online[1])) > 0
    assert online[2:4] == ['[1, 2]', "[{'tokens': ['a'], 'upos': [0]}]"]
    assert online[4].startswith("InputError: the hub has no pos validation rows of 'hi'. ")
    assert online[5].startswith('InputError: facebook/xnli (hi) could not be read from the hub: ')
    assert offline[:5] == online[:5]
    assert offline[5] == ('InputError: no network and no local copy of facebook/xnli (hi). '
                          'Go online once, or use --data FOLDER (parquet files) or --data toy.')

def test_what_the_card_says_is_known_before_anything_is_fetched(answers):
    "Bytes of the text, and of a copy: none where it is streamed, none once it is there."
    ids = round(98_000 * .65) + 2 * round(1000 * .65)
    text = '98000 1000 100000'
    streamed, before, read, after = answers.sizes
    assert streamed == f'{text} {ids} 0' and before == f'{text} {ids} 130000' and read == 'True'
    assert after.endswith(' 0') and answers.sizes_offline[3] == after

def test_rows_that_could_not_be_read_are_not_taken_for_none(monkeypatch):
    "A run would otherwise leave a language out for good."
    hub, of = HubSource(), ('ner', 'sw', 'train')
    monkeypatch.setattr(data, '_resolve_revision', lambda *_: ('unknown', True))
    def refuse(error):
        def opened(*_): raise error
        monkeypatch.setattr(data, '_open_hub', opened)
    refuse(ConnectionError('503'))
    with pytest.raises(InputError, match='could not be read from the hub: ConnectionError: 503'):
        hub.count(*of)
    refuse(ValueError("BuilderConfig 'sw' not found. Available: ['en']"))
    assert hub.count(*of) == 0
    monkeypatch.setattr(data, '_open_hub', lambda *_: {})
    assert hub.count(*of) == 0

def test_treebanks_that_could_not_be_looked_up_are_not_taken_for_none(monkeypatch, tmp_path):
    from huggingface_hub import HfApi, constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    folders = [SimpleNamespace(path=p) for p in ('pl_pdb', 'pl_lfg', 'de_gsd')]
    monkeypatch.setattr(HfApi, 'list_repo_tree', lambda *_, **__: iter(folders))
    look = lambda prefix, online=True: data._hub_folders('of/treebanks', MAIN, prefix, online)
    assert look('pl_') == ('pl_lfg', 'pl_pdb') and look('xx_') == ()
    with pytest.raises(InputError, match='no network'): look('pl_', False)
    (tmp_path/'datasets--of--treebanks/snapshots'/MAIN/'pl_pdb').mkdir(parents=True)
    assert look('pl_', False) == ('pl_pdb',)
    def refuse(*_, **__): raise ConnectionError('503')
    monkeypatch.setattr(HfApi, 'list_repo_tree', refuse)
    assert look('pl_') == ('pl_pdb',)
    with pytest.raises(InputError, match='ConnectionError: 503'): look('de_')

DEMO = '''
import sys
from interference_nb import cli, reproduce
from interference_nb.experiments import Scale
from interference_nb.finetune import FinetuneConfig
from interference_nb.pretrain import TrainConfig
from interference_nb.transformer import ModelConfig
tiny = Scale(ModelConfig.toy(60, dim=8, n_layers=1, ffn_dim=16),
             TrainConfig.toy(steps=4, warmup=2, batch_size=2, seq_len=16, eval_every=4),
             dict(ner=FinetuneConfig.toy(epochs=1)))
reproduce.STUDIES['demo-text'] = cli.replace(cli.STUDIES['demo-text'], scale=tiny)
cli.DEMO_MEGABYTES = .02
cli.main(['demo', '--data', 'hub', '--langs', 'en,sw', '--systems', 'joint', '--seeds', '1',
          '--tasks', 'ner', '--workers', '1', '--out', sys.argv[1]])
'''

def test_demo_streams_what_it_eats(tmp_path):
    "It says how much beforehand, asks for that part of the file, and copies none of it."
    Hub.root = tmp_path/'repos'
    toy, wikipedia = ToySource(0, n_train=1500), Hub.root/'wikimedia/wikipedia'/MAIN
    wikiann = Hub.root/'unimelb-nlp/wikiann'/MAIN
    for lang, spoken in (('en', 'en'), ('sw', 'x3')):
        # 60 MB: what is read ahead, 8 MB at a time, is two or three times that
        rows = [dict(id=os.urandom(20_000).hex(), url='', title='', text=t)
                for i, t in enumerate(toy.text(spoken))]
        save(wikipedia/f'20231101.{lang}/train-00000-of-00001.parquet', rows, 100)
        for split in ('train', 'validation', 'test'):
            save(wikiann/lang/f'{split}-00000-of-00001.parquet', toy.examples('ner', spoken, split))
    (wikipedia/'README.md').write_text(configs('20231101.en', '20231101.sw'))
    (wikiann/'README.md').write_text(configs('en', 'sw', splits=('train', 'validation', 'test')))
    Hub.sent.clear()
    with serving() as server: said = ask(server, tmp_path, DEMO, str(tmp_path/'demo'))
    assert said[0] == ('Streaming 0.02 MB of Wikipedia a language, enough for these models, and '
                       'the rows of the tasks. For more: --data hub:0.1.')
    rows = read_jsonl(tmp_path/'demo'/'joint-en+sw-0'/'record.jsonl')
    assert rows[0]['config']['run']['data'] == 'hub:0.02'
    assert {r['kind'] for r in rows} >= {'end', 'finetune'}
    assert rows[0]['precision'] == ('bfloat16' if cpu_has_bfloat16() else 'float32')
    for lang in ('en', 'sw'):
        path = f'20231101.{lang}/train-00000-of-00001.parquet'
        assert 0 < Hub.sent[path] < .6 * (wikipedia/path).stat().st_size
    assert not list((tmp_path/'home').rglob('*20231101*/**/*.arrow'))

def test_a_folder_without_test_text_trains(tmp_path, capsys):
    "A share of the training text is set aside, which is said once; perplexity is measured on it."
    for lang in ('en', 'x3'):
        (tmp_path/'data/text'/lang).mkdir(parents=True)
        documents = [dict(text=t) for t in ToySource(0, n_train=1500).text(lang)]
        pq.write_table(pa.Table.from_pylist(documents), tmp_path/f'data/text/{lang}/train.parquet')
    scale = Scale(ModelConfig.toy(60, dim=8, n_layers=1, ffn_dim=16),
                  TrainConfig.toy(steps=4, warmup=2, batch_size=2, seq_len=16, eval_every=4), {})
    spec, = plan(['joint'], ('en', 'x3'), 1, scale, str(tmp_path/'data'), tasks=())
    rows = run(spec, tmp_path)
    assert set(next(r['ppl'] for r in rows if r['kind'] == 'end')) == {'en', 'x3'}
    assert capsys.readouterr().err.count('text/en has no validation and no test file: 5%') == 1
