"Finetuning on folders, real and faulty, and through kills: what a notebook cell cannot show."
import multiprocessing
import random
import re
import string
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import set_forkserver_preload

import pytest
import torch

from interference_nb.adapters import MultilingualLM
from interference_nb.data import train_tokenizer
from interference_nb.folders import FolderSource
from interference_nb.distributed import PRELOADED
from interference_nb.tokenizers import load_tokenizer
from interference_nb.files import InputError, load_checkpoint, run_lock
from interference_nb.finetune import FinetuneConfig, finetune, predict, score_by_rows, tune
from interference_nb.tasks import (TASKS, normalise_answer, read_data, score_qa, span_f1,
                                   total_score, word_f1)
from interference_nb.toy_languages import ToySource, toy_tokenizer
from interference_nb.transformer import ModelConfig

CFG = FinetuneConfig.toy(epochs=2, max_train=64, max_dev=32, max_eval=32)
ROW = dict(tokens=['Ada', 'met', 'Bo', '.'], ner_tags=[1, 0, 1, 0])


def toy_model(langs=('en', 'x3'), variant='adpt', **kw):
    "Make an untrained toy model with its source and tokenizer."
    source = ToySource(n_labelled=200, n_eval=50)
    tok = toy_tokenizer(source, langs)
    torch.manual_seed(0)
    cfg = replace(ModelConfig.toy(tok.vocab_size), **kw)
    return MultilingualLM(cfg, langs, variant), tok, source


SPLITS = ('train', 'validation', 'test')


def folder_of(path, rows, splits=SPLITS, task='ner'):
    "Write a folder with a line of text and the same rows of a task in each split."
    import pyarrow as pa
    import pyarrow.parquet as pq
    text, ints = pa.string(), pa.int64()
    answers = pa.struct([('text', pa.list_(text)), ('answer_start', pa.list_(ints))])
    types = dict(ner=[('tokens', pa.list_(text)), ('ner_tags', pa.list_(ints))],
                 nli=[('premise', text), ('hypothesis', text), ('label', ints)],
                 qa=[(c, text) for c in ('id', 'title', 'context', 'question')]
                 + [('answers', answers)])[task]
    for kind, table, names in (('text', pa.table({'text': ['Ada met Bo .']}), SPLITS),
                               (task, pa.Table.from_pylist(rows, pa.schema(types)), splits)):
        (path/kind/'en').mkdir(parents=True)
        for split in names: pq.write_table(table, path/kind/'en'/f'{split}.parquet')
    return FolderSource(path)


@pytest.mark.parametrize('task, rows, message', [
    ('pos', [ROW], 'no pos/en/test.parquet'),
    ('ner', [], "the test set of ner in 'en' is empty"),
    ('ner', [ROW | dict(ner_tags=[1, 0, 9, 0])], 'label 9 in a row of ner'),
    ('ner', [ROW | dict(ner_tags=[1, 0])], '4 words with 2 labels'),
    ('ner', [dict(tokens=[], ner_tags=[])], "the test set of ner in 'en' is empty")])
def test_faulty_folder(tmp_path, task, rows, message):
    model, tok, _ = toy_model()
    source = folder_of(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        finetune(model, tok, task, source, 'en', ['en'], CFG)


PAIR = dict(premise='Ada met Bo .', hypothesis='Ada met .', label=0)
ASKED = dict(id='q1', title='', context='Ada met Bo .', question='who met Bo ?',
             answers=dict(text=['Ada'], answer_start=[0]))


@pytest.mark.parametrize('task, row, message', [
    ('nli', PAIR | dict(label=-1), 'label -1 in a row of nli'),
    ('nli', PAIR | dict(label=3), 'label 3 in a row of nli, whose labels are 0 to 2'),
    ('nli', PAIR | dict(label=None), "column 'label' holds None"),
    ('qa', ASKED | dict(answers=dict(text=['Ada'], answer_start=[1])), "where 'da ' stands"),
    ('qa', ASKED | dict(answers=dict(text=['Ada'], answer_start=[-12])), 'at character -12'),
    ('qa', ASKED | dict(answers=dict(text=['Ada'], answer_start=[99])), "where '' stands"),
    ('qa', ASKED | dict(answers=dict(text=[''], answer_start=[0])), "the answer '' of question q1"),
    ('qa', ASKED | dict(answers=dict(text=[], answer_start=[])), 'q1 has 0 answers'),
    ('qa', ASKED | dict(answers=dict(text=['Ada'], answer_start=[])), '1 answers with 0 places')])
def test_faulty_pairs(tmp_path, task, row, message):
    model, tok, _ = toy_model()
    with pytest.raises(InputError, match=message):
        finetune(model, tok, task, folder_of(tmp_path, [row], task=task), 'en', ['en'], CFG)


def test_nli_has_training_pairs_in_english_only(tmp_path):
    "As XNLI: another language has validation and test sets, and cannot be trained on."
    model, tok, _ = toy_model()
    source = folder_of(tmp_path, [PAIR], task='nli')
    (tmp_path/'nli'/'x3').mkdir()
    for split in SPLITS[1:]:
        (tmp_path/'nli'/'x3'/f'{split}.parquet').symlink_to(tmp_path/'nli'/'en'/f'{split}.parquet')
    r = finetune(model, tok, 'nli', source, 'en', ['en', 'x3'], CFG)
    assert set(r['scores']['x3']) == {'accuracy'}
    with pytest.raises(InputError, match='no nli/x3/train.parquet.*There is nli train of: en'):
        finetune(model, tok, 'nli', source, 'x3', ['x3'], CFG)


def test_qa_without_a_test_set(tmp_path):
    "Validation is the test set; some training contexts choose the epoch, none of them trained on."
    _, tok, _ = toy_model()
    rows = [ASKED | dict(id=f'q{i}', context=f'Ada met Bo {i // 2}') for i in range(200)]
    source = folder_of(tmp_path, rows, splits=('train', 'validation'), task='qa')
    ids, contexts = ([{r[key] for r in read_data('qa', source, 'en', split, tok, 32).rows}
                      for split in SPLITS] for key in ('id', 'context'))
    assert len(ids[2]) == 200 and len(ids[0]) + len(ids[1]) == 200 and 4 < len(ids[1]) < 40
    assert not contexts[0] & contexts[1]
    with pytest.raises(InputError, match='no qa/x3/validation.parquet'):
        read_data('qa', source, 'x3', 'test', tok, 32)


@pytest.mark.parametrize('task', ['qa', 'nli'])
def test_short_pieces_of_two_texts(task):
    "Finetuning works, and batching changes no answer, where texts are cut."
    model, tok, source = toy_model()
    tuned, *_ = tune(model, tok, task, source, 'en', replace(CFG, max_len=16))
    data = read_data(task, source, 'en', 'test', tok, 16)
    assert (len(data.features) > len(data.rows)) == (task == 'qa')
    assert max(len(p.ids) for p in data.features) == 16
    answers = predict(tuned, data, 'en')
    assert answers == predict(tuned, data, 'en', size=1)
    if task == 'qa':
        for row, (a, b) in zip(data.rows, answers, strict=True):
            assert 0 <= a < b <= len(row['context']) and row['context'][a:b].strip()


def test_a_run_with_pairs(tmp_path):
    "From text to the numbers of a table."
    from interference_nb.experiments import SCALES, plan, run
    from interference_nb.records import load, summarise
    from interference_nb.pretrain import TrainConfig
    scale = replace(SCALES['toy'], train=TrainConfig.toy(steps=20, warmup=5, eval_every=20),
                    finetune=dict(qa=CFG, nli=CFG))
    run(plan(['joint'], ('en', 'x3'), 1, scale, tasks=('qa', 'nli'))[0], tmp_path)
    m = summarise(load(tmp_path)).loc['joint', 0]
    assert {'QA within', 'QA zero-shot', 'NLI within', 'NLI zero-shot'} < set(m.dropna().index)


def squad_normalise(s):
    "The normalisation of SQuAD v1.1's evaluate script, written anew from its description."
    s = re.sub('[' + re.escape(string.punctuation) + ']', '', s.lower())
    words = re.split(r'\b(?:a|an|the)\b', s)
    return ' '.join(' '.join(words).split())


def squad_f1(said, gold):
    said, gold = squad_normalise(said).split(), squad_normalise(gold).split()
    left, same = list(gold), 0
    for word in said:
        if word in left: left.remove(word); same += 1
    if not same: return 0.
    p, r = same / len(said), same / len(gold)
    return 100 * 2 * p * r / (p + r)


def test_squad_metrics_equal_a_reference():
    words = 'a an the The AN then x banana 1850 é e\u0301 ال కాదు İ ß « । ’ \u200b _'.split()
    rng, parts = random.Random(0), [*words, *string.punctuation, ' ', ' ', ' ', '\t', '\n', '\xa0']
    draw = lambda: ''.join(rng.choice(parts) for _ in range(rng.randint(0, 12)))
    for _ in range(5000):
        said, *gold = draw(), draw(), draw()
        assert normalise_answer(said) == squad_normalise(said)
        f1 = word_f1(normalise_answer(said), normalise_answer(gold[0]))
        assert f1 == pytest.approx(squad_f1(said, gold[0]))
        row = dict(context=said, gold=[(g, 0) for g in gold])
        assert total_score([score_qa(row, (0, len(said)), TASKS['qa'])]) == pytest.approx(dict(
            f1=max(squad_f1(said, g) for g in gold),
            exact=100 * max(squad_normalise(said) == squad_normalise(g) for g in gold)))


def test_folder_of_one_sentence(tmp_path):
    model, tok, _ = toy_model()
    r = finetune(model, tok, 'ner', folder_of(tmp_path, [ROW]), 'en', ['en'], CFG)
    assert set(r['scores']['en']) == {'f1', 'accuracy'} and len(r['dev']) == CFG.epochs


def test_long_sentences_are_answered_whole():
    model, tok, source = toy_model()
    tuned, *_ = tune(model, tok, 'ner', source, 'en', replace(CFG, max_len=6))
    data = read_data('ner', source, 'en', 'test', tok, 6)
    assert len(data.features) > len(data.rows)
    for row, tags in zip(data.rows, predict(tuned, data, 'en'), strict=True):
        assert len(tags) == len(row['tokens'])


@pytest.mark.parametrize('variant', ['joint', 'ffn', 'attn', 'share_adpt'])
def test_every_variant(variant):
    model, tok, source = toy_model(variant=variant)
    r = finetune(model, tok, 'pos', source, 'x3', ['x3', 'en'], CFG)
    assert r['scores']['x3']['accuracy'] > 20


def a_process(f, *args):
    "Start a function in a fresh process, as workers are."
    set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context('forkserver').Process(target=f, args=args)
    process.start()
    return process


def tuning(folder):
    torch.set_num_threads(1)
    model, tok, source = toy_model(dropout=.1)
    tune(model, tok, 'pos', source, 'en', replace(CFG, epochs=40), folder)


def test_killed_from_outside(tmp_path):
    torch.set_num_threads(1)
    child = a_process(tuning, tmp_path/'cut')
    last = tmp_path/'cut'/'last.safetensors'
    while not last.exists() and child.is_alive(): time.sleep(.01)
    child.kill()
    child.join()
    done = len(load_checkpoint(last)[1]['history'])
    assert 1 <= done < 40
    model, tok, source = toy_model(dropout=.1)
    again, whole = (tune(model, tok, 'pos', source, 'en', replace(CFG, epochs=40), f)
                    for f in (tmp_path/'cut', None))
    assert again[1:] == whole[1:]
    a, b = again[0].state_dict(), whole[0].state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


RATES = dict(batch_size=(16, 32), lr=(2e-3, 1e-2))


def timeless(result):
    "Leave out of a search's result what a clock has measured; counts become lists."
    own = dict(counts={l: c.tolist() for l, c in result['counts'].items()}, wall_s=0,
               trials=[t | dict(wall_s=0) for t in result['trials']])
    return result | own


@pytest.mark.parametrize('task', ['ner', 'nli'])
def test_search_side_by_side(tmp_path, task):
    "Two processes end as one does; what they leave in the folder is not done again."
    torch.set_num_threads(1)
    model, tok, source = toy_model(dropout=.1)
    look = lambda **kw: finetune(model, tok, task, source, 'en', ['en', 'x3'], CFG, RATES, **kw)
    alone = timeless(look())
    assert timeless(look(workers=2, folder=tmp_path)) == alone
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('*/*')}
    assert len(before) == 4 * 4         # a record, two checkpoints, a lock
    assert timeless(look(folder=tmp_path)) == alone
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob('*/*')}


def test_search_with_a_task_of_ones_own():
    model, tok, source = toy_model()
    spec = replace(TASKS['pos'], name='mine')
    r = finetune(model, tok, spec, source, 'en', ['en'], CFG, dict(freeze_specific=(False, True)))
    assert [t['freeze_specific'] for t in r['trials']] == [False, True]
    with pytest.raises(InputError, match='cannot send this search to other processes'):
        finetune(model, tok, spec, source, 'en', ['en'], CFG, RATES, workers=2)


def searching(folder):
    torch.set_num_threads(1)
    model, tok, source = toy_model(dropout=.1)
    finetune(model, tok, 'pos', source, 'en', ['en'], replace(CFG, epochs=12), RATES, folder, 2)


def test_search_killed_from_outside(tmp_path):
    "The processes end with their parent, and a second call ends as an undisturbed one."
    torch.set_num_threads(1)
    child = a_process(searching, tmp_path/'cut')
    while not [*tmp_path.glob('cut/*/last.safetensors')] and child.is_alive(): time.sleep(.01)
    child.kill()
    child.join()
    time.sleep(1)
    state = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.glob('cut/*/*')}
    then = state()
    time.sleep(1)
    assert then == state() and not all('"done"' in p.read_text()
                                       for p in tmp_path.glob('cut/*/record.jsonl'))
    model, tok, source = toy_model(dropout=.1)
    again, whole = (finetune(model, tok, 'pos', source, 'en', ['en'], replace(CFG, epochs=12),
                             RATES, folder) for folder in (tmp_path/'cut', None))
    assert timeless(again) == timeless(whole)


def test_cut_checkpoint(tmp_path):
    model, tok, source = toy_model()
    tune(model, tok, 'pos', source, 'en', CFG, tmp_path)
    last = tmp_path/'last.safetensors'
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(InputError, match='is not a whole checkpoint'):
        tune(model, tok, 'pos', source, 'en', CFG, tmp_path)


@pytest.mark.parametrize('task', ['qa', 'nli'])
def test_pairs_of_text(text_folder, task):
    "Windows lose no subword and no answer of a question; then the path, small and untrained."
    source = text_folder
    tok = train_tokenizer(source, ['en', 'sw', 'te'], 3000, sample_sentences=4000)
    if task == 'qa':
        for lang in ('en', 'sw', 'te'):
            data = read_data('qa', source, lang, 'test', tok, 128)
            kept, found, most = Counter(), Counter(), {}
            for p in data.features:
                row, shift = data.rows[p.row], p.positions[0]
                assert len(p.ids) <= 128 and len(p.positions) == len(p.offsets)
                assert p.ids[shift:shift + len(p.positions)] == [p.ids[i] for i in p.positions]
                kept[p.row] += 1
                most.setdefault(p.row, set()).update(p.offsets)
                if p.targets[0]:
                    text, start = row['gold'][0]
                    a, b = (p.offsets[t - shift][k] for k, t in enumerate(p.targets))
                    found[p.row] += 1
                    assert a <= start and b >= start + len(text.rstrip())   # the answer is in it,
                    inner = [p.offsets[t - shift] for t in p.targets]       # and no subword more
                    assert inner[0][1] > start and inner[1][0] < start + len(text)
            for r, row in enumerate(data.rows):
                ids, offsets = tok.encode_offsets(row['context'])
                assert ids == tok.encode(row['context']) and most[r] == set(offsets)
            assert max(kept.values()) > 4 and len(found) > .97 * len(data.rows)
    torch.manual_seed(0)
    model = MultilingualLM(ModelConfig.toy(tok.vocab_size, max_len=128), ('en', 'sw'), 'adpt')
    cfg = FinetuneConfig.toy(epochs=2, max_train=200, max_dev=50, max_eval=100, max_len=128)
    r = finetune(model, tok, task, source, 'en', ['en', 'sw'], cfg)
    assert set(r['scores']['sw']) == ({'f1', 'exact'} if task == 'qa' else {'accuracy'})
    assert r['dev'][1]['loss'] < r['dev'][0]['loss']
    if task == 'nli':
        with pytest.raises(InputError, match='There is nli train of: en'):
            finetune(model, tok, task, source, 'sw', ['sw'], cfg)


@pytest.mark.parametrize('task', ['ner', 'pos'])
def test_tags_of_text(text_folder, tmp_path, task):
    "Small and untrained: the path is tested, not the score."
    from seqeval.metrics import f1_score
    source = text_folder
    train_tokenizer(source, ['en', 'sw'], 2000, sample_sentences=4000).save(tmp_path/'tok')
    tok = load_tokenizer(tmp_path/'tok')
    torch.manual_seed(0)
    model = MultilingualLM(ModelConfig.toy(tok.vocab_size), ('en', 'sw'), 'adpt')
    cfg = FinetuneConfig.toy(epochs=2, max_train=400, max_dev=100, max_eval=200)
    r = finetune(model, tok, task, source, 'en', ['en', 'sw'], cfg)
    assert set(r['scores']) == {'en', 'sw'} and r['dev'][1]['loss'] < r['dev'][0]['loss']
    tuned, *_ = tune(model, tok, task, source, 'en', cfg)
    data = read_data(task, source, 'en', 'test', tok, 64, 200)
    gold = [[tuned.spec.labels[l] for l in row['labels']] for row in data.rows]
    said = predict(tuned, data, 'en')
    as_spans = lambda tags: tags if task == 'ner' else [['I-' + t for t in s] for s in tags]
    assert span_f1(gold, said) == pytest.approx(100 * f1_score(as_spans(gold), as_spans(said)))
    assert r['scores']['en']['f1'] == pytest.approx(span_f1(gold, said))


def test_a_finished_search_is_of_its_labels(tmp_path):
    "The same labels in another order are another task: a head learned for one is wrong for it."
    model, tok, source = toy_model()
    ner = TASKS['ner']
    ask = lambda task: finetune(model, tok, task, source, 'en', ['en'], CFG, folder=tmp_path)
    ask('ner')
    with pytest.raises(InputError, match='labels'): ask(replace(ner, labels=ner.labels[::-1]))


def test_one_process_at_a_time_tunes_in_a_folder(tmp_path):
    model, tok, source = toy_model()
    with run_lock(tmp_path/'trial'), pytest.raises(InputError, match='another process'):
        finetune(model, tok, 'ner', source, 'en', ['en'], CFG, folder=tmp_path)


def test_a_record_behind_its_checkpoint_is_refused(tmp_path):
    "Or an epoch's score would be read from another's row."
    model, tok, source = toy_model()
    ask = lambda: finetune(model, tok, 'ner', source, 'en', ['en'], CFG, folder=tmp_path)
    ask()
    path = tmp_path/'trial/record.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    for kept in (lines[:2], lines[:1], [lines[0], lines[2]]):
        path.write_text(''.join(kept))
        with pytest.raises(InputError, match='lacks epochs of its checkpoint'): ask()


def test_tuned_weights_that_are_gone_are_to_be_tuned_again(tmp_path):
    "Not pretrained again, as was said once."
    model, tok, source = toy_model()
    ask = lambda: finetune(model, tok, 'ner', source, 'en', ['en'], CFG, folder=tmp_path)
    ask()
    (tmp_path/'trial/best.safetensors').unlink()
    with pytest.raises(InputError, match='trial and finetune again'): ask()


def test_the_best_trials_notes_are_kept():
    model, tok, source = toy_model()
    ask = lambda cfg, grid=None: finetune(model, tok, 'pos', source, 'en', ['en'], cfg, grid,
                                          trained_len=10)
    sizes = (64, 4)                     # the second one cannot be the better
    found = ask(CFG, dict(max_train=sizes))
    scores = [max(e['accuracy'] for e in t['dev']) for t in found['trials']]
    notes = [ask(replace(CFG, max_train=n))['notes'] for n in sizes]
    assert scores[0] > scores[1] and notes[0] != notes[1] and found['notes'] == notes[0]


def test_more_labelled_rows_than_there_are(capsys):
    "A curve ends where the rows end, and says so."
    model, tok, source = toy_model()
    rows = [r['rows'] for r in score_by_rows(model, tok, 'pos', source, 'en', ['en'],
                                             replace(CFG, epochs=1), (20, 300, 1000))]
    assert rows == [20, 20, 200, 200] and 'fewer than 300' in capsys.readouterr().err
