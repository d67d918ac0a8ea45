__version__ = "0.2.0"

from .data import Batch
from .files import InputError
from .toy_languages import ToySource, open_source, toy_tokenizer
from .transformer import MaskedLM, ModelConfig
from .pretrain import BatchSampler, JointStep, TrainConfig, perplexity, train
from .adapters import Adapter, MultilingualLM, load_model, save_model
from .l0_pruning import Gates, PruneConfig, gated, learn_gates, prune_study
from .gradient_probes import CombinedStep, GradientProbe, ProbeConfig, cosines
from .meta_adapters import MetaConfig, MetaStep, exact, finite_difference, first_order, hypergradient
from .hub_models import AnyModel, hf_loss
from .finetune import FinetuneConfig, finetune
from .experiments import SCALES, SYSTEMS, RunSpec, plan, run, run_all

__all__ = [
    'Batch', 'InputError', 'ToySource', 'open_source', 'toy_tokenizer', 'MaskedLM', 'ModelConfig',
    'BatchSampler', 'JointStep', 'TrainConfig', 'perplexity', 'train', 'Adapter', 'MultilingualLM', 'load_model',
    'save_model', 'MetaConfig', 'MetaStep', 'exact', 'finite_difference', 'first_order', 'hypergradient',
    'Gates', 'PruneConfig', 'gated', 'learn_gates', 'prune_study', 'CombinedStep', 'GradientProbe',
    'ProbeConfig', 'cosines', 'AnyModel', 'hf_loss', 'FinetuneConfig', 'finetune', 'SCALES', 'SYSTEMS', 'RunSpec', 'plan', 'run', 'run_all',
]
