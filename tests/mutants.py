"""Put faults into the modules that carry the science, one at a time, and see that a test notices.

    make mutants                        all of them; how long that takes stands in CONTRIBUTING.md
    make mutants ARGS='--only 05'       those whose notebook or description has this text
    make mutants ARGS=--check           only see that each edit still finds its text, in seconds

Each edit is made in a copy of the project, in the notebook and in the module that it exports, and
the tests that it names are run there. The checkout is never touched. pytest does not collect this
file: it is no part of `make test` and runs on demand.
"""
import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, thread
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORACLES, PROPERTIES = 'tests/test_oracles.py', 'tests/test_properties.py'
FORMULAS = 'tests/test_formulas.py'


@dataclass(frozen=True)
class Edit:
    "A fault: a text of an exported cell, what takes its place, and who should notice."
    notebook: str               # under nbs/, without its suffix
    old: str                    # stands once in the notebook's exported cells
    new: str
    breaks: str                 # what is wrong then
    tests: tuple[str, ...]      # files or pytest's node ids, the quickest first
    survives: str = ''          # why no test can notice; empty: one must

    @property
    def module(self): return f"interference_nb/{self.notebook.split('_', 1)[1]}.py"


def oracle(*names): return tuple(f'{ORACLES}::{n}' for n in names)

DATA = (PROPERTIES, FORMULAS, 'nbs/00_data.ipynb')
PRETRAIN = (PROPERTIES, FORMULAS, 'nbs/01a_pretrain.ipynb')
ADAPTERS = (FORMULAS, 'nbs/02_adapters.ipynb')
GATES = (f'{PROPERTIES}::test_gates_lie_between_closed_and_open', FORMULAS,
         'nbs/03_l0_pruning.ipynb')
PROBES = (FORMULAS, 'nbs/04_gradient_probes.ipynb')
META = oracle('test_meta_step_is_algorithm_1') + (FORMULAS, 'nbs/05_meta_adapters.ipynb')
FINETUNE = (FORMULAS, ORACLES, 'nbs/06_finetune.ipynb')
TASKS = (PROPERTIES, FORMULAS, 'nbs/06b_tasks.ipynb')


def prop(*names): return tuple(f'{PROPERTIES}::{n}' for n in names)


def report(*names): return tuple(f'tests/test_report.py::{n}' for n in names)


def runs(*names): return tuple(f'tests/test_runs.py::{n}' for n in names)


def hub_models(*names): return tuple(f'tests/test_hub_models.py::{n}' for n in names)


def planner(*names): return tuple(f'tests/test_planner.py::{n}' for n in names)


def own_ways(*names): return tuple(f'tests/test_own_ways.py::{n}' for n in names)


def experiments(*names): return tuple(f'tests/test_experiments.py::{n}' for n in names)

DEFINED = report('test_findings_are_what_their_definitions_say')
ORDERED = report('test_matrix_orders_pairs_as_the_generator_does')
DRAWN = report('test_every_batch_is_behind_one_gradient')
RUNS = report('test_a_run_of_ours_is_asked_about_text_it_did_not_just_see')
GATED = report('test_gates_are_learned_twice_with_noise_of_their_own')
XMOD = report('test_adapters_of_one_language_are_not_compared')


EDITS = (
    # ---- files, processes, plans, other people's models ----
    Edit('00b_files', 'if _hold(f): path.unlink', 'path.unlink',
         'a lock removes what another process is writing',
         runs('test_a_lock_clears_away_what_a_killed_write_left_and_nothing_else')),
    Edit('01b_distributed', '_wait_for_others(Path(home))', 'pass',
         'a process connects while another is forked',
         ('tests/test_processes.py::test_no_process_connects_before_all_are_forked',)),
    Edit('05a_hub_models', 'self._word(w, not k)', 'self._word(w)',
         'every word is cut as the first of its sentence',
         hub_models('test_words_are_cut_as_in_their_sentence')),
    Edit('05a_hub_models', 'if table.padding_idx is None', 'if True',
         'positions kept for padding are counted as room',
         hub_models('test_rows_are_no_longer_than_the_positions_of_a_model')),
    Edit('06c_retrieval', 'if part in found:', 'if False:',
         'of two documents of one name one is lost',
         ('tests/test_folders.py::test_documents_that_cannot_be_paired_are_told',)),
    Edit('07c_planner', 'max(hours / workers, longest)', 'hours / workers',
         'one run is shared by all workers', planner('test_one_run_is_not_shared_by_workers')),
    Edit('07c_planner', 'cost(replace(spec, probe=None))', 'cost(spec)',
         'probes count as work that took no time',
         planner('test_probes_do_not_make_a_machine_look_fast')),

    # ---- data ----
    Edit('00_data', 'p = (L / L.sum()) ** (1 / T)', 'p = (L / L.sum()) ** T',
         'the temperature the wrong way round', prop('test_temperature_flattens_the_sizes')),
    Edit('00_data', 'np.flatnonzero(word[flat])', 'np.arange(len(flat))',
         'borders and padding are hidden, too', prop('test_hiding_and_restoring_are_inverse')),
    Edit('00_data', 'np.where(u < .8, mask', 'np.where(u < .9, mask',
         '90 percent masks, no random tokens', DATA),
    Edit('00_data', 'M, replace=False', 'M, replace=True',
         'a token may be hidden twice', prop('test_hiding_and_restoring_are_inverse')),
    Edit('00_data', 'chance = words[rng.integers(0, len(words), M)]',
         'chance = rng.integers(0, vocab_size, M)', 'special tokens among the random ones',
         prop('test_hiding_and_restoring_are_inverse')),
    Edit('00_data', 'np.random.default_rng([1, *self._key, epoch])',
         'np.random.default_rng([1, *self._key])', 'every epoch in the same order', DATA),
    Edit('00_data', 'np.random.default_rng([2, *self._key, k])',
         'np.random.default_rng([2, *self._key])', 'every batch hides the same places', DATA),
    Edit('00_data', 'zlib.crc32(lang.encode()), zlib.crc32(name.encode())]',
         'zlib.crc32(lang.encode())]', 'streams of other names draw the same batches',
         oracle('test_validation_batches_are_not_the_training_batches')),
    Edit('00_data', 'np.asarray(corpus.ids)[:n * seq_len]',
         'np.asarray(corpus.ids)[-n * seq_len:]', 'windows leave the beginning of the text off',
         prop('test_an_epoch_meets_every_window_once')),
    Edit('00_data', "'test' if u < 2 * held_out", "'test' if u < held_out",
         'no document is kept for testing', DATA),
    Edit('00_data', "key = sample_key(seed, f'{i}')", 'key = i',
         'a capped corpus is its first documents, not a sample', DATA),
    Edit('00_data', 'for k in range(round(P[lang] * n))', 'for k in range(round(n / len(langs)))',
         'the vocabulary is learned without the language distribution', DATA),
    Edit('00_data', 'out.extend(tokenizer.encode(part)); out.append(EOS)',
         'out.extend(tokenizer.encode(part))', 'documents do not end',
         oracle('test_reported_perplexity_is_of_the_test_text')),
    Edit('00_data', 'np.random.default_rng([3, seed, i])', 'np.random.default_rng()',
         'held-out masks differ from one evaluation to the next',
         prop('test_held_out_batches_cover_the_text')),
    Edit('00_data', 'rows[np.linspace(0, len(rows) - 1, n).round().astype(int)]', 'rows[:n]',
         'perplexity of the beginning of the held-out text only', DATA),
    # ---- pretrain ----
    Edit('01a_pretrain', 'cfg.temperature if sampled else math.inf', 'math.inf',
         'batches that ignore the temperature',
         oracle('test_languages_are_drawn_with_the_temperature')),
    Edit('01a_pretrain', 'torch.nn.utils.clip_grad_norm_(params, self.cfg.clip)', 'pass',
         'no gradient clipping in pretraining', oracle('test_pretraining_steps_clip')),
    Edit('01a_pretrain', 'up = min((k + 1) / max(cfg.warmup, 1), 1.)', 'up = 1.', 'no warm-up',
         PRETRAIN),
    Edit('01a_pretrain', '(cfg.steps - k) / max(cfg.steps - cfg.warmup, 1)',
         '(cfg.steps - k) / cfg.steps', 'the linear schedule falls during the warm-up',
         prop('test_the_rate_peaks_once')),
    Edit('01a_pretrain', 'self.turn[own] = np.arange(own.sum())', 'self.turn[own] = 0',
         'a language sees its first batch again and again',
         prop('test_processes_share_a_step_and_languages_run_on')),
    Edit('01a_pretrain', 'range(turn * n + self.rank, turn * n + n, self.world)',
         'range(turn * n, turn * n + n, self.world)', 'all processes take the same batches',
         prop('test_shards_are_a_partition_for_any_number_of_processes')),
    Edit('01a_pretrain', "{l: s.independent_stream('fresh') for l, s in streams.items()}",
         'dict(streams)', 'validation batches are the training batches',
         oracle('test_validation_batches_are_not_the_training_batches')),
    Edit('01a_pretrain', 'with evaluating(model):', 'with contextlib.nullcontext():',
         'perplexity under dropout', PRETRAIN),
    Edit('01a_pretrain', 'self.model.loss(b) / len(batches)', 'self.model.loss(b)',
         'gradients of accumulated batches are added, not averaged', PRETRAIN),
    Edit('01a_pretrain', 'np.random.default_rng([cfg.seed, 7919])',
         'np.random.default_rng([7919])', 'languages come in the same order with every seed',
         PRETRAIN),
    Edit('01a_pretrain', 'dict(state=moments[name],', 'dict(state={},',
         "a resumed run forgets Adam's moments", PRETRAIN),
    Edit('01a_pretrain', 'lr=cfg.lr, betas=cfg.betas, eps', 'lr=cfg.lr, eps',
         "Adam's averaging rates are not the config's", PRETRAIN),
    Edit('01a_pretrain', 'float(total) / sum(len(b.targets) for b in batches)',
         'float(total) / sum(b.tokens.numel() for b in batches)',
         'perplexity per token, not per masked token',
         oracle('test_reported_perplexity_is_of_the_test_text')),
    # ---- adapters ----
    Edit('02_adapters', 'return self.up(h) + z', 'return self.up(h)', 'no residual', ADAPTERS),
    Edit('02_adapters', 'h = F.gelu(self.down(z))', 'h = self.down(z)', 'a linear adapter',
         ADAPTERS),
    Edit('02_adapters', 'nn.init.zeros_(self.up.weight)', 'pass',
         'an untrained adapter is not the identity', ADAPTERS),
    Edit('02_adapters', '{l: copy.deepcopy(new) for l in self.langs}',
         '{l: new for l in self.langs}', 'languages share their "own" modules', ADAPTERS),
    Edit('02_adapters', "if variant != 'share_adpt':", 'if True:',
         'shared adapters are not shared', ADAPTERS),
    Edit('02_adapters', 'self.named_parameters() if n not in specific}',
         'self.named_parameters()}', 'theta holds phi, too', ADAPTERS),
    Edit('02_adapters', "'attn': ('attention',)", "'attn': ('ffn',)",
         'attn gives feed-forward layers to the languages', ADAPTERS),
    Edit('02_adapters', 'new = copy.deepcopy(routes.pick(like))', 'new = routes.pick(like)',
         "a new language trains the other one's modules", ADAPTERS),
    # ---- l0_pruning ----
    Edit('03_l0_pruning', 'log_alpha - self.temperature * math.log(-self.low / self.high)',
         'log_alpha + self.temperature * math.log(-self.low / self.high)',
         'the expected L0 with the wrong sign', GATES[:1]),
    Edit('03_l0_pruning', '(torch.logit(u) + log_alpha) / self.temperature',
         'torch.logit(u) + log_alpha', 'a gate at temperature 1', GATES),
    Edit('03_l0_pruning', 'z.repeat_interleave(self.shape[self.dim] // self.n)',
         'z.repeat(self.shape[self.dim] // self.n)', "a head's gate on columns of other heads",
         GATES),
    Edit('03_l0_pruning', 'min(1., (k + 1) / max(cfg.warmup, 1)) * share', 'share',
         'the penalty does not rise slowly', GATES),
    Edit('03_l0_pruning', 'x.double() - x.double().mean() for x in pair',
         'x.double() for x in pair', 'centred cosines are not centred', GATES),
    Edit('03_l0_pruning', 'k[i] & (k.sum(0) == 1)', 'k[i]',
         "gates of one language only are all of that language's", GATES),
    Edit('03_l0_pruning', 'p.ndim == 2 and m not in own', 'p.ndim == 2',
         "gates on a language's own weights", GATES),
    Edit('03_l0_pruning', 's.size / total * (names.count', '1 / len(names) / s.n * (names.count',
         'a gate over many weights counts as one over few', GATES),
    Edit('03_l0_pruning', 'if len(ks) > 1]', 'if len(ks) > 9]',
         'weights of several gates are passed over', GATES),
    Edit('03_l0_pruning', 'for m, gs in gates.items() if m != l for g in gs',
         'for m, gs in gates.items() for g in gs', "a language's own gates among the others'",
         GATES),
    Edit('03_l0_pruning', 'losses[l](s * cfg.steps + k)', 'losses[l](k)',
         'two prunings of a language see the same batches', GATES),
    Edit('03_l0_pruning', 's * len(langs) + i, progress', 's, progress',
         "two languages' prunings share their noise", GATES),
    # ---- gradient_probes ----
    Edit('04_gradient_probes', 'cross / math.sqrt(within_a * within_b)',
         'cross / (within_a * within_b)', 'a cosine corrected twice', PROBES),
    Edit('04_gradient_probes', 'np.sqrt(sums[0, 0] * sums[1, 1])', 'sums[0, 0]',
         'a cosine divided by one norm', PROBES),
    Edit('04_gradient_probes', 'if j != i and dot < 0 and', 'if j != i and',
         'PCGrad projects gradients that agree',
         prop('test_projected_gradients_oppose_nobody_they_were_projected_from')),
    Edit('04_gradient_probes', 'dot = C[i] @ M[:, j]', 'dot = M[i, j]',
         'PCGrad projects the first gradient each time', PROBES),
    Edit('04_gradient_probes', '(1 - beta) * hat + beta * phi', 'beta * hat + (1 - beta) * phi',
         'the vaccine forgets what is usual',
         prop('test_a_vaccinated_gradient_has_the_expected_cosine')),
    Edit('04_gradient_probes', 'if phi < hat:', 'if phi < 0:',
         'the vaccine acts only on opposed gradients',
         prop('test_a_vaccinated_gradient_has_the_expected_cosine')),
    Edit('04_gradient_probes', '(k // self.cfg.every * self.turns + turn) * n', 'turn * n',
         'every probe looks at the same batches', PROBES),
    Edit('04_gradient_probes', 'new = two[turn % 2].zero_()', 'new = two[turn % 2]',
         "a gradient on top of the one before the last", PROBES),
    Edit('04_gradient_probes', "s.independent_stream('probe')", 's',
         'a probe of the training batches', PROBES),
    Edit('04_gradient_probes', '            g *= sampler.p[lang]\n', '',
         'combined gradients do not weigh languages as sampling does', PROBES),
    # ---- meta_adapters ----
    Edit('05_meta_adapters', 'self.losses(batches), self.losses(val), beta,',
         'self.losses(batches), self.losses(\n'
         '                [type(b)(**vars(b) | dict(lang=own[0])) for b in val]), beta,',
         "validation losses of all languages with the training language's phi", META[:1]),
    Edit('05_meta_adapters', 'with perturbed(theta, g, -beta):', 'with perturbed(theta, g, beta):',
         'the inner step goes uphill', META[:1]),
    Edit('05_meta_adapters', 'torch._foreach_mul(product, -beta)',
         'torch._foreach_mul(product, beta)', 'the second-order term with the wrong sign',
         META[:1]),
    Edit('05_meta_adapters', '(0.5 / h)', '(1 / h)', 'a finite difference twice as large', META),
    Edit('05_meta_adapters', 'eps / norm.clamp_min(torch.finfo(torch.float32).tiny)',
         'eps + 0 * norm', 'the length of the finite difference depends on the gradient', META),
    Edit('05_meta_adapters', 'with with_rng_state(noise):', 'with nullcontext():',
         'the finite difference has another dropout than the inner step', META),
    Edit('05_meta_adapters', "if self.meta.order == 'meta first':",
         "if self.meta.order != 'meta first':", 'lines 6 and 7 of Algorithm 1 swapped', META[:1]),
    Edit('05_meta_adapters', 'if l not in own]', 'if l in sampler.langs]',
         "the language's own validation loss is not left out", META[:1]),
    Edit('05_meta_adapters', 'torch._foreach_add(self.direct, self.second_order)',
         'self.direct', 'the second-order term is left out', META[:1]),
    Edit('05_meta_adapters', "return stream.independent_stream('second')", 'return stream',
         'shared first: the meta step sees the batch that theta has just followed',
         oracle('test_after_the_shared_update_the_meta_step_takes_another_batch')),
    Edit('05_meta_adapters', 'torch._foreach_mul(grads, 1 / len(losses))', 'grads',
         'gradients of several losses are added, not averaged',
         prop('test_a_mean_of_losses_has_the_mean_gradient')),
    Edit('05_meta_adapters', '[p for l in own for p in self.phi[l]], self.scale()',
         '[p for l in self.phi for p in self.phi[l]], self.scale()',
         "the meta step moves every language's phi", META[:1]),
    # ---- finetune and tasks ----
    Edit('06_finetune', 'scored = _scored(model, data, lang)',
         'scored = _scored(model, data, next(iter(tests)))',
         "a zero-shot test through another language's modules",
         oracle('test_zero_shot_goes_through_the_languages_own_modules')),
    Edit('06_finetune', 'scores = evaluate(self.model, self.dev, self.lang)',
         'scores = evaluate(self.model, self.data, self.lang)', 'the best epoch by training scores',
         oracle('test_best_epoch_is_the_development_sets')),
    Edit('06_finetune', "read('validation', cfg.max_dev)", "read('test', cfg.max_dev)",
         'a development set of test rows', oracle('test_best_epoch_is_the_development_sets')),
    Edit('06_finetune', "for p in g['params']], self.cfg.clip)", "for p in g['params']], 1e9)",
         'no gradient clipping in finetuning', oracle('test_finetuning_clips')),
    Edit('06_finetune', 'max(self.history, key=', 'min(self.history, key=',
         'the worst epoch is kept', oracle('test_best_epoch_is_the_development_sets')),
    Edit('06_finetune', 'if own != lang or cfg.freeze_specific',
         'if own == lang or cfg.freeze_specific',
         "the training language's own modules are not tuned", FINETUNE),
    Edit('06_finetune', '1 - (k + i / n) / cfg.epochs', '1', 'the rate does not fall', FINETUNE),
    Edit('06_finetune', 'if score > top:', 'if score < top or best is None:',
         'a search takes the worst trial',
         oracle('test_a_search_compares_the_trials_best_epochs')),
    Edit('06_finetune', "row['dev'][row['best_epoch'] - 1]", "row['dev'][-1]",
         'a search compares last epochs, not best ones',
         oracle('test_a_search_compares_the_trials_best_epochs')),
    Edit('06b_tasks', '[1 + f - start for f in first[a:b]]', '[f - start for f in first[a:b]]',
         "labels on the subword before a word's first", TASKS),
    Edit('06b_tasks', 'step = (room + 1) // 2', 'step = room', 'windows that do not overlap',
         prop('test_windows_cover_their_context')),
    Edit('06b_tasks', '.triu().tril(MAX_ANSWER - 1)', '.tril(MAX_ANSWER - 1)',
         'answers that end before they start', TASKS),
    Edit('06b_tasks', 'hidden[:, 0]', 'hidden[:, -1]', 'a pair judged by its last position', TASKS),
    Edit('06b_tasks', '2 * len(set(g) & set(p))', 'len(set(g) & set(p))', 'half the F1',
         prop('test_span_f1_is_seqevals')),
    Edit('06b_tasks', 'return 200 * same / (len(a) + len(b))', 'return 100 * same / len(a)',
         'precision in place of F1', prop('test_word_f1_is_a_symmetric_share')),
    # ---- experiments ----
    Edit('07_experiments', "dev_batches(corpora[l]['test'],", "dev_batches(corpora[l]['train'],",
         'perplexity of training text', oracle('test_reported_perplexity_is_of_the_test_text')),
    Edit('07e_claims', "'supported' if sign * d.delta > 0 else", "'supported' if d.delta > 0 else",
         'verdicts that ignore the sign', oracle('test_verdicts_respect_the_sign')),
    Edit('07e_claims', '(abs(d.delta) - margin) / d.se', '-abs(d.delta) / d.se',
         'what does not differ significantly is called alike',
         oracle('test_as_good_means_within_two_points_either_way')),
    Edit('07e_claims', 'd.low > margin or d.high < -margin', 'd.low > 0 or d.high < 0',
         'what differs significantly is called unlike, however little',
         oracle('test_as_good_means_within_two_points_either_way')),
    Edit('07e_claims', "return 'equivalent' if alike else 'undecided'", "return 'equivalent'",
         'what does not show is called equivalent',
         oracle('test_no_difference_is_not_the_same_as_equal')),
    Edit('07e_claims', 'not control.low > 0', 'not control.delta > 0',
         'joint above random weights by chance',
         oracle('test_nothing_is_said_of_transfer_where_random_weights_do_as_well')),
    Edit('07e_claims', 'np.arange(len(p), 0, -1)', 'np.arange(1, len(p) + 1)',
         'Holm the wrong way round',
         oracle('test_statements_made_together_are_corrected_together')),
    Edit('07e_claims', "a.align(b, join='inner')", "a.align(b, join='left', fill_value=0.)",
         'seeds that one of two systems lacks', prop('test_paired_is_scipys')),
    Edit('07e_claims', 'd.std(ddof=1)', 'd.std()', 'a standard error that is too small',
         prop('test_paired_is_scipys')),
    Edit('07e_claims', 'stdtrit(n - 1, .975) * se', 'stdtrit(n - 1, .95) * se',
         'a 90 percent interval', prop('test_paired_is_scipys')),
    Edit('07d_records', "scores['train'] == scores['test'], ' within'",
         "scores['train'] != scores['test'], ' within'", 'zero-shot scores called within-language',
         oracle('test_a_table_averages_what_it_says')),
    Edit('07d_records', "ends.assign(metric='loss', value=np.log(ends['value']))",
         "ends.assign(metric='loss')", 'a mean perplexity called loss',
         oracle('test_a_table_averages_what_it_says')),
    Edit('07d_records', "if start['hardware'].startswith('CPU')", "if not start['hardware']",
         'a shared machine counts the time of others',
         oracle('test_a_table_averages_what_it_says')),
    Edit('07_experiments', "f'{self.system}{meta}-{self.model}", "f'{self.system}-{self.model}",
         'runs with other meta steps share a folder',
         prop('test_what_differs_is_told_apart_by_name')),
    # ---- faults that a reader of the tests found no test to see ----
    Edit('00b_files', 't.clone() if own in memory else t', 't', 'tied weights cannot be kept',
         own_ways('test_tied_layers_are_kept_and_resumed')),
    Edit('01_transformer', 'p, multiple = self.p if self.training else 0., 8',
         'p, multiple = 0., 8', 'no dropout of attention', ('nbs/01_transformer.ipynb',)),
    Edit('01_transformer', 'x = self.norm1(x + dropout(h, self.p, self.training))',
         'x = self.norm1(x + h)', 'no dropout behind attention', ('nbs/01_transformer.ipynb',)),
    Edit('01_transformer', 'batch.targets) * batch.weight', 'batch.targets)',
         'batches count the same, however few of their tokens are hidden',
         own_ways('test_weights_of_padded_batches_count')),
    Edit('01a_pretrain', "down = min((cfg.steps - k) / max(cfg.steps - cfg.warmup, 1), 1.)",
         "down = min((cfg.steps - k) / max(cfg.steps - cfg.warmup, 1), 1.)**.5",
         'a linear rate that is not', prop('test_the_rate_peaks_once')),
    Edit('05_meta_adapters', 'np.random.set_state(numpy)', 'pass',
         "numpy's noise differs between the sides of the difference",
         own_ways('test_noise_of_any_library_is_drawn_again')),
    Edit('05_meta_adapters', "self.step('shared', params, grads, lr)",
         "self.step('shared', params, [*grads[:len(self.theta)], "
         "*(-g for g in grads[len(self.theta):])], lr)", 'phi goes up its training gradient',
         oracle('test_meta_step_is_algorithm_1')),
    Edit('06_finetune', 'encoder = [p for p in model.encoder.parameters() if p.requires_grad]',
         "encoder = [p for n, p in model.encoder.named_parameters() if p.requires_grad "
         "and 'embedding' not in n]", 'embeddings are not tuned',
         (f'{FORMULAS}::test_what_is_tuned_and_how_fast',)),
    Edit('06c_retrieval', '(accuracy_at_1(u, v) + accuracy_at_1(v, u)) / 2', 'accuracy_at_1(u, v)',
         'retrieval one way only', ('nbs/06c_retrieval.ipynb',)),
    Edit('07_experiments', 'SYSTEMS[self.system].steps, seed=self.seed)',
         'SYSTEMS[self.system].steps)', 'seeds of one text are one draw',
         experiments('test_two_seeds_are_two_draws')),
    Edit('07_experiments', 'cfg = replace(spec.scale.finetune[task], seed=spec.seed)',
         'cfg = spec.scale.finetune[task]', 'all finetuning has seed 0',
         experiments('test_two_seeds_are_two_draws')),
    Edit('07_experiments', "streams('validation') if meta and", "streams('test') if meta and",
         'the meta step is validated on the text that perplexity is reported of',
         oracle('test_reported_perplexity_is_of_the_test_text')),
    Edit('07_experiments', "s.mask_prob,\n                     'prune')", 's.mask_prob)',
         'gates are learned on the batches of training',
         ('tests/test_causes.py::test_gates_are_learned_on_batches_of_their_own',)),
    Edit('07f_findings', "p = holm([d.p for d in usable])", "p = [holm([d.p])[0] for d in usable]",
         'statements are not corrected together', ('nbs/07f_findings.ipynb',)),
    # ---- report ----
    Edit('04_gradient_probes', 'np.fill_diagonal(out, M[range(K), 0, range(K), 1])', 'pass',
         'report: a gradient meets itself, so the noise is not taken out', ORDERED),
    Edit('04_gradient_probes', 'return inner / np.sqrt(own[..., :, None] * own[..., None, :])',
         'return inner / np.maximum(own[..., :, None], own[..., None, :])',
         'report: a product over the longer gradient, which is no cosine', DEFINED),
    Edit('04_gradient_probes', 'stats.false_discovery_control(p[pairs]) < .05', 'p[pairs] < .05',
         'report: many comparisons, each at five in a hundred', DEFINED),
    Edit('04_gradient_probes', 'p = stats.t.cdf(mean', 'p = stats.norm.cdf(mean',
         'report: a normal law for a few rounds', DEFINED),
    Edit('04_gradient_probes', '_TOGETHER = 1.645 + .842', '_TOGETHER = 1.645',
         'report: batches needed at a power of one half', DEFINED),
    Edit('08c_report', 'first = (2 * r + half) * n', 'first = 2 * r * n',
         'report: both gradients of a language from the same batches', DRAWN),
    Edit('08c_report', 'first = (2 * r + half) * n', 'first = half * n',
         'report: every round looks at the same batches', DRAWN),
    Edit('08c_report', 'range(first + rank, first + n, world)', 'range(first, first + n, world)',
         'report: each process takes the same batches',
         report('test_two_processes_measure_what_one_does')),
    Edit('08c_report', 'with evaluating(subject.model), progress_bar(',
         'with nullcontext(), progress_bar(', 'report: dropout is on while gradients are compared',
         report('test_causal_loss_is_the_modules_own_and_counts_every_token_but_the_first')),
    Edit('08c_report', '/ cfg.batches / turns)', '/ cfg.batches)',
         'report: losses are added up over the turns',
         report('test_probing_leaves_the_model_alone_and_parts_change_nothing')),
    Edit('08c_report', 'far = 1 - np.nan_to_num(', 'far = 1 + np.nan_to_num(',
         'report: languages least alike are neighbours', ORDERED),
    Edit('08c_report', "linkage(apart, 'complete'), 2.5", "linkage(apart, 'single'), 2.5",
         'report: languages that conflict in one group',
         report('test_two_conflicts_in_two_layers_are_told_apart') + DEFINED),
    Edit('08c_report', "[k, i, j] * config['batches'])", '[k, i, j])',
         'report: rounds needed called batches', DEFINED),
    Edit('08c_report', 'x.mean() * subject.pieces[l]', 'x.mean() / subject.pieces[l]',
         'report: loss per character the wrong way round', DEFINED),
    Edit('08c_report', "if p['group'].startswith('layer'): layers", 'layers',
         'report: adapters are advised for kinds of parameters',
         report('test_injected_conflict_is_named_with_pair_and_layer')),
    Edit('08c_report', "independent_stream('report')", "independent_stream('train')",
         'report: a run is looked at on the batches that it has just seen', RUNS),
    Edit('08c_report', 'cfg.seed + s * len(langs) + i, progress)', 'cfg.seed + s, progress)',
         'report: prunings of two languages with the same noise', GATED),
    Edit('08c_report', "if 'adapter_modules' not in n}", '}',
         "report: X-MOD's own adapters are compared as if shared", XMOD),
)


@cache
def exported_cells(path):
    "Read the code of a notebook's exported cells."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    sources = (''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    return [s for s in sources if s.startswith('#| export')]


def check_fit(edit, folder):
    "Raise `ValueError` where an edit's text does not stand exactly once, or makes no code."
    path, module = folder/'nbs'/f'{edit.notebook}.ipynb', folder/edit.module
    found = [s for s in exported_cells(path) if edit.old in s]
    for where, n in ((path.name, sum(s.count(edit.old) for s in found)),
                     (module.name, module.read_text(encoding='utf-8').count(edit.old))):
        if n != 1: raise ValueError(f'{n} times in {where}: {edit.old!r} ({edit.breaks})')
    compile(found[0].replace(edit.old, edit.new), path.name, 'exec')


def apply(edit, folder):
    "Make an edit in a copy; return what takes it out again. Raises `ValueError` as `check_fit`."
    check_fit(edit, folder)
    path, module = folder/'nbs'/f'{edit.notebook}.ipynb', folder/edit.module
    kept = {p: p.read_text(encoding='utf-8') for p in (path, module)}
    notebook = json.loads(kept[path])
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if source in exported_cells(path):
            cell['source'] = source.replace(edit.old, edit.new).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + '\n',
                    encoding='utf-8')
    module.write_text(kept[module].replace(edit.old, edit.new), encoding='utf-8')
    return lambda: [p.write_text(text, encoding='utf-8') for p, text in kept.items()]


def copy_project(folder):
    "Copy what git tracks or would track, as it stands in the checkout."
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT/name).is_file():
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/name, folder/name, follow_symlinks=False)
    return folder


def pytest_there(folder, tests, log):
    "Run pytest in a copy, in a process that has torch and the rest imported, but none of ours."
    os.setsid()
    thread._threads_queues.clear()      # or what a test forks waits at its end for this very thread
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)       # one place to write at for both
    for fd in (1, 2): os.dup2(out, fd)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    os.environ |= dict(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1')
    code = pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '--tb=line', *tests])
    sys.stdout.flush()
    os._exit(code)


def run_tests(folder, tests, timeout):
    "Run tests in a copy; return whether they passed, and the first that failed or why none did."
    log = folder.parent/'log'
    process = multiprocessing.get_context('fork').Process(
        target=pytest_there, args=(folder, tests, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return False, f'no end after {timeout} s'
    out = log.read_text(errors='replace')
    if process.exitcode == 0: return True, ''
    failed = re.findall(r'^(?:FAILED|ERROR) ((?:tests|nbs)/.*?)(?: - .*)?$', out, re.M)
    line = re.search(r'/tests/test_\w+\.py:(\d+): ', out)
    if failed: return False, failed[0] + (f', line {line[1]}' if line else '')
    raise RuntimeError(f'pytest ended with {process.exitcode} on {" ".join(tests)}:\n{out}')


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='edits with this text in notebook, description')
    parser.add_argument('--check', action='store_true', help='only look whether edits can be made')
    parser.add_argument('--workers', type=int, default=2, help='copies to test side by side')
    parser.add_argument('--timeout', type=int, default=900, help='seconds for the tests of an edit')
    parser.add_argument('--no-baseline', action='store_true',
                        help='do not run the tests on the unedited project first')
    return parser.parse_args()


def check(edits):
    "Try every edit on the checkout's text; end with a list of those that cannot be made."
    wrong = []
    for edit in edits:
        try: check_fit(edit, ROOT)
        except (ValueError, SyntaxError, OSError) as e: wrong.append(str(e))
    if wrong: sys.exit('\n'.join(['These edits do not fit the project any more:', *wrong]))


def baseline(edits, copies, timeout):
    "Run all the tests that are named on the unedited project: else a failure would say nothing."
    tests = sorted({t for e in edits for t in e.tests})
    with ThreadPoolExecutor(len(copies)) as pool:
        parts = [tests[i::len(copies)] for i in range(len(copies))]
        jobs = [pool.submit(run_tests, *of, timeout) for of in zip(copies, parts) if of[1]]
        for copy, job in zip(copies, jobs):
            passed, why = job.result()
            if passed: continue
            said = (copy.parent/'log').read_text(errors='replace')[-3000:]
            sys.exit(f'Without any edit, a test fails already: {why}\n{said}')


def commit():
    "Name what is copied: the last commit, its date, and whether something is not committed."
    git = lambda *of: subprocess.run(['git', *of], cwd=ROOT, text=True, capture_output=True).stdout
    return (git('log', '-1', '--format=commit %h of %cs').strip()
            + ' with changes' * bool(git('status', '--porcelain')))


def summary(rows):
    "Count by module, for the table in CONTRIBUTING.md."
    print('\n| module | edits | noticed | survivors |\n| --- | ---: | ---: | --- |')
    modules = list(dict.fromkeys(e.module for e, *_ in rows))
    for module in [*modules, None]:
        own = [r for r in rows if module in (None, r[0].module)]
        left = [e for e, noticed, _ in own if not noticed]
        said = '; '.join(f'{e.breaks}: {e.survives or "NOT EXPLAINED"}' for e in left)
        name = f'`{Path(module).stem}`' if module else 'all'
        print(f'| {name} | {len(own)} | {len(own) - len(left)} | {said if module else len(left)} |')


def main():
    args, start, about = parse_arguments(), time.perf_counter(), commit()
    edits = [e for e in EDITS if args.only in e.notebook or args.only in e.breaks]
    if not edits: sys.exit(f'No edit has {args.only!r} in its notebook or description.')
    check(edits)
    print(f'{len(edits)} edits can be made', flush=True)
    if args.check: return
    import hypothesis, scipy.stats, torch._dynamo  # noqa: F401   once, before the forks
    with tempfile.TemporaryDirectory() as home:
        copies = [copy_project(Path(home)/f'copy{i}'/'project') for i in range(args.workers)]
        if not args.no_baseline:
            baseline(edits, copies, args.timeout * 2)
            seconds = time.perf_counter() - start
            print(f'their tests pass without them ({seconds:.0f} s)', flush=True)
        free, rows, began = SimpleQueue(), [], time.perf_counter()
        for copy in copies: free.put(copy)
        def trial(edit):
            folder = free.get()
            try:
                take_out = apply(edit, folder)
                passed, by = run_tests(folder, edit.tests, args.timeout)
                take_out()
            finally: free.put(folder)
            return edit, not passed, by
        with ThreadPoolExecutor(args.workers) as pool:
            jobs = [pool.submit(trial, e) for e in edits]
            for i, job in enumerate(as_completed(jobs), 1):
                try: edit, noticed, by = job.result()
                except Exception:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                rows.append((edit, noticed, by))
                left = (time.perf_counter() - began) / i * (len(edits) - i)
                print(f'{i:3}/{len(edits)} {left / 60:5.1f} min left  {edit.notebook}: '
                      f'{edit.breaks}: ' + (f'noticed by {by}' if noticed else 'SURVIVED'),
                      flush=True)
    rows.sort(key=lambda row: edits.index(row[0]))
    summary(rows)
    print(f'\n{about}, {time.perf_counter() - start:.0f} s in all')
    unexplained = [e for e, noticed, _ in rows if not noticed and not e.survives]
    sys.exit(bool(unexplained))


if __name__ == '__main__': main()
