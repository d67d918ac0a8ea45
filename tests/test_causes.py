"The study of causes where a notebook does not go: other groups, one layer, three languages, text."
from dataclasses import replace
import pytest
import torch
from interference_nb.reproduce import (CAUSES, STUDIES, causes_page, numbers_of_causes,
                                       numbers_of_study)
from interference_nb.files import InputError
from interference_nb.experiments import Scale, make_batches, open_run, plan, prune_model, run
from interference_nb.gradient_probes import ProbeConfig
from interference_nb.l0_pruning import Gates, PruneConfig
from interference_nb.pretrain import TrainConfig
from interference_nb.transformer import ModelConfig

SHORT = PruneConfig(groups=('heads', 'rows'), steps=6, warmup=2, batch_size=4)

def small(**size):
    return Scale(ModelConfig.toy(600, **size), TrainConfig.toy(steps=30, warmup=10, eval_every=30))

def test_study_of_heads_and_rows(tmp_path): study_of_heads_and_rows(tmp_path, 'toy')

def test_study_of_text(tmp_path, text_folder):
    study_of_heads_and_rows(tmp_path, str(text_folder.path))

def study_of_heads_and_rows(tmp_path, data):
    "From text to a page: one layer, gates on heads and rows; what cannot be measured is left out."
    study = replace(STUDIES['causes-toy'], scale=small(n_layers=1), seeds=1, data=data,
                    probe=ProbeConfig(n_batches=1), prune=(SHORT,), pairs=(('en', 'sw'),))
    spec, = CAUSES.runs(CAUSES, study)
    rows = run(spec, tmp_path)
    sites = next(r for r in rows if r['kind'] == 'gates')['sites']
    assert {(s['dim'], s['n']) for s in sites} >= {(1, 2), (0, 128)}       # heads, and rows
    assert 'cosine cross' in numbers_of_causes(tmp_path).loc['en-sw', 0].dropna()
    page = causes_page(tmp_path)
    assert '| en-sw ' in page and 'nan' not in page and str(tmp_path) not in page

def test_three_languages_give_three_pairs(tmp_path):
    spec, = plan(['joint'], ('en', 'fr', 'ar'), 1, small(), tasks=())
    run(spec, tmp_path)
    spec, _, tokenizer, corpora, model = open_run(tmp_path/spec.name, 'toy')
    study = prune_model(model, *make_batches(spec, tokenizer, corpora), replace(SHORT, seeds=3),
                        tmp_path/'gates')
    within = numbers_of_study(study, 0)['gates raw within (λ=1)']
    assert list(within.index) == [('en-fr', 0), ('en-ar', 0), ('fr-ar', 0)]
    assert within.nunique() == 3            # each of its own two languages, not of all

def test_gates_are_learned_on_batches_of_their_own(tmp_path):
    "Not on those that the model was trained on, whatever their size."
    spec, = plan(['joint'], ('en', 'fr'), 1, small(), tasks=())
    run(spec, tmp_path)
    spec, _, tokenizer, corpora, model = open_run(tmp_path/spec.name, 'toy')
    (feed, dev), seen, loss = make_batches(spec, tokenizer, corpora), set(), model.loss
    def watched(batch):
        seen.add((batch.lang, tuple(batch.tokens.flatten().tolist())))
        return loss(batch)
    model.loss = watched
    prune_model(model, feed, {l: dev[l][:1] for l in dev},
                replace(SHORT, batch_size=spec.train.batch_size), tmp_path/'gates')
    trained = {(l, tuple(s.batch(k).tokens.flatten().tolist()))
               for l, s in feed.streams.items() for k in range(4 * SHORT.steps)}
    assert len(seen) > 2 * SHORT.steps and not trained & seen

def test_gates_belong_to_their_weights(tmp_path):
    "Gates in a folder are learned anew when the weights or the settings are others."
    spec, = plan(['joint'], ('en', 'fr'), 1, small(), tasks=())
    run(spec, tmp_path)
    spec, _, tokenizer, corpora, model = open_run(tmp_path/spec.name, 'toy')
    feed, dev = make_batches(spec, tokenizer, corpora)
    path = tmp_path/'gates'/'en-0.safetensors'
    def learned():
        prune_model(model, feed, dev, SHORT, tmp_path/'gates')
        return path.stat().st_mtime_ns, Gates.load(path).flat()
    first, again = learned(), learned()
    assert first[0] == again[0]
    with torch.no_grad(): model.blocks[0].ffn.out.weight.mul_(2)
    other = learned()
    assert other[0] != first[0] and not torch.equal(other[1], first[1])

def test_unfinished_run_is_not_opened(tmp_path):
    spec, = plan(['joint'], ('en', 'fr'), 1, small(), tasks=())
    run(spec, tmp_path)
    path = tmp_path/spec.name/'record.jsonl'
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(InputError, match='is at step 30 of its pretraining'):
        open_run(tmp_path/spec.name, 'toy')

def test_toy_scale_is_the_demos():
    "The study and the demo train the same joint models."
    spec, = CAUSES.runs(CAUSES, replace(STUDIES['causes-toy'], seeds=1, prune=(),
                                        pairs=(('en', 'x3'),)))
    joint, = plan(['joint'], ('en', 'x3'), 1, STUDIES['demo'].scale, tasks=())
    assert replace(spec, probe=None) == joint
