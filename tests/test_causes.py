"The study of causes on real text, where a folder of it is at hand: the path, not the findings."
import os
import pytest
from interference_nb.causes import Study, causes_page, load_causes, plan_causes
from interference_nb.experiments import Scale, run
from interference_nb.finetune import FinetuneConfig
from interference_nb.gradient_probes import ProbeConfig
from interference_nb.l0_pruning import PruneConfig
from interference_nb.pretrain import TrainConfig
from interference_nb.transformer import ModelConfig

DATA = os.environ.get('INTERFERENCE_DATA')

@pytest.mark.skipif(not DATA, reason='needs text: let INTERFERENCE_DATA name a folder with it')
def test_study_on_real_text(tmp_path):
    "From parquet files to a page: two languages, two layers, forty steps."
    scale = Scale(ModelConfig.toy(600), TrainConfig.toy(steps=40, warmup=10, eval_every=40),
                  FinetuneConfig.toy())
    study = Study(scale, ProbeConfig(n_batches=1),
                  (PruneConfig(groups=('heads', 'rows'), steps=10, warmup=2, batch_size=8),))
    spec, = plan_causes([('en', 'sw')], 1, study, DATA)
    rows = run(spec, tmp_path)
    sites = next(r for r in rows if r['kind'] == 'gates')['sites']
    assert {(s['dim'], s['n']) for s in sites} >= {(1, 2), (0, 128)}       # heads, and rows
    assert 'cosine cross' in load_causes(tmp_path)['en-sw'][0]
    assert '| en-sw |' in causes_page(tmp_path) and DATA not in causes_page(tmp_path)
