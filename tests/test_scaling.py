"""What the scaling notebooks cannot hold: passes computed twice, runs that stop and go on, processes that end early."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from snapvideo_nb import blocks, learning, speed
from snapvideo_nb.cli import main, print_table
from snapvideo_nb.model import PRESETS
from snapvideo_nb.scaling import Ledger, build, example, kept_bytes, ledger, total
from snapvideo_nb.training import recipe, train
from snapvideo_nb.unet import UNetConfig

NOTEBOOKS = Path(__file__).parents[1]/'nbs'
RESULTS = NOTEBOOKS.parent/'data'/'results'/'scaling'
FIT = replace(PRESETS['tiny'].network, blocks=2, dropout=.2)
UNET = UNetConfig(frames=4, height=8, width=16, base=16, multipliers=(1, 2), res_blocks=1, attention=(8,), head=8, condition_width=32, text_width=32, groups=4, dropout=.2)


def gradients(network, inputs, recompute: bool):
    torch.manual_seed(1)
    network.recompute = recompute
    network.zero_grad()
    network(*inputs)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('config', [FIT, UNET], ids=['fit', 'unet'])
def test_recomputing_gives_the_same_gradients_and_keeps_less(config):
    torch.manual_seed(0)
    network, inputs = build(config).train(), example(config, 2, 8)
    for p in network.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.1)
    usual, again = gradients(network, inputs, False), gradients(network, inputs, True)
    assert usual.keys() == again.keys() and all(torch.equal(usual[name], again[name]) for name in usual)
    assert sum(g.abs().sum() for g in usual.values()) > 0


def test_a_recomputed_run_is_the_same_run(tmp_path):
    runs = [train(recipe('tiny', run=str(tmp_path/str(recompute)), data='shapes', steps=2, batch=4, sample_every=0, workers=0, fused_attention=False, recompute=recompute)) for recompute in (False, True)]
    one, two = ((run/'model'/'model.safetensors').read_bytes() for run in runs)
    assert one == two


def test_plain_attention_ends_with_its_block_also_after_an_error():
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    with pytest.raises(KeyError):
        with blocks.plain_attention():
            assert allowed()
            raise KeyError
    assert not allowed() and torch.backends.cuda.flash_sdp_enabled()


def test_a_ledger_leaves_no_hook_behind():
    network, inputs = build(FIT), example(FIT, 1, 8)
    with Ledger(network) as book, torch.no_grad(): network(*inputs)
    with Ledger(network) as again, torch.no_grad(): network(*inputs)
    assert [op.module for op in book.ops] == [op.module for op in again.ops]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_stopwatch_counts_what_the_ledger_counts():
    passes = speed.Passes(FIT, 2, 'fp32', text_tokens=8)
    with speed.Stopwatch(passes.network) as watch: passes.evaluate()
    counted = total(ledger(FIT, 2, precision='fp32', text_tokens=8))
    assert 0 < counted - total(watch.ops) < .2*counted  # all but what was prepared before


def test_memory_of_a_network_that_cannot_be_made_is_told():
    with pytest.raises(ChildProcessError, match='ended early'): speed.peak_bytes(replace(FIT, latents=3))


def study(folder, steps):
    config = learning.study_config('tiny', 0, .01, steps, folder/'runs', data='shapes', data_options={}, workers=0, batch=4, precision='fp32', checkpoint_every=2)
    return learning.learn(config, folder/'out', learning.Probe('tiny', count=8))


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    whole = study(tmp_path/'whole', 6)
    study(tmp_path/'parts', 2)
    parts = study(tmp_path/'parts', 6)
    assert parts['curve']['6'] == whole['curve']['6'] and set(parts['curve']) == {'2', '6'}
    assert json.loads((tmp_path/'parts'/'out'/'tiny-lr0.01-seed0.json').read_text()) == parts
    assert study(tmp_path/'parts', 6) == parts


def test_the_examination_is_the_same_for_all_and_unlike_training(tmp_path):
    one, two = learning.Probe('fit-m', count=8), learning.Probe('unet-m', count=8)
    assert torch.equal(one.batches[0].video, two.batches[0].video) and torch.equal(one.noise[0], two.noise[0])
    assert one.batches[0].captions != learning.Probe('fit-m', count=8, seed=0).batches[0].captions


@pytest.mark.parametrize('words, says', [(['--presets', 'huge'], 'unknown preset'), (['--precision', 'fp8'], 'fp32, tf32 or bf16'), (['--rounds', '0'], '--rounds must be at least 1'),
                                         (['--study', 'sleeping'], '--study must be learning'), (['--longer', '0'], '--longer must be positive'), (['--device', 'nowhere'], '--device nowhere')])
def test_a_mistake_gets_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['scale', *words]) == 2
    said = capsys.readouterr()
    assert says in said.err and not said.out and not list(tmp_path.iterdir())


def test_a_table_is_drawn_in_a_terminal_and_plain_in_a_pipe(monkeypatch, capsys):
    rows = [['preset', 'ms'], ['mini', '20']]
    print_table(rows)
    assert capsys.readouterr().out == 'preset  ms\nmini    20\n'
    monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    print_table(rows)
    drawn = capsys.readouterr().out
    assert all(cell in drawn for row in rows for cell in row) and '─' in drawn


def test_the_backward_pass_has_the_arithmetic_of_the_forward_pass():
    passes, seen = speed.Passes(FIT, 2, 'fp32', text_tokens=8), []
    assert torch.backends.cudnn.allow_tf32  # torch's default, which fp32 must not use
    passes.network.head[1].weight.register_hook(lambda gradient: seen.append(torch.backends.cudnn.allow_tf32))
    passes.train()
    assert seen == [False] and torch.backends.cudnn.allow_tf32


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match='NVIDIA'), speed.arithmetic('tf32', 'cpu'): pass


def test_a_batch_gets_the_extra_pass_as_nearly_nine_times_in_ten_as_it_can():
    assert [round(speed.Passes(FIT, batch, text_tokens=8).share, 3) for batch in (1, 4, 16)] == [1, 1, .875]
    assert speed.Passes(UNET, 4, text_tokens=8).share == 0


class Full:
    "Passes on a GPU that is full from `most` clips on."
    optimizer = torch.optim.SGD([torch.zeros(1)])

    def __init__(self, most): self.most, self.tried = most, []

    def resize(self, batch): self.batch = batch

    def train(self):
        self.tried.append(self.batch)
        if self.batch > self.most: raise torch.OutOfMemoryError('full')


@pytest.mark.parametrize('most, batch', [(0, 0), (1, 1), (6, 4), (64, 16)])
def test_the_largest_batch_is_found_by_trying(most, batch):
    assert speed.fitting_batch(Full(most), 'train', limit=16) == batch


def test_networks_are_measured_compiled(monkeypatch):
    passes, compiler = speed.Passes(FIT, 2, 'fp32', text_tokens=8), torch.compile
    usual = passes.evaluate()
    monkeypatch.setattr(torch, 'compile', lambda network, **options: compiler(network, backend='eager', **options))
    passes.compile()
    torch.testing.assert_close(passes.evaluate(), usual, atol=1e-5, rtol=1e-4)
    assert passes.forward is not passes.network
    passes.resize(1)
    assert passes.forward is passes.network


def prose(name):
    "The words of a notebook."
    cells = json.loads((NOTEBOOKS/f'{name}.ipynb').read_text())['cells']
    return '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')


def record(name): return json.loads((RESULTS/f'{name}.json').read_text())


def test_quoted_figures_are_those_of_the_records():
    text, rows = prose('14b_speed'), record('unet-284m-unet-85m-fit-500m-2-threads-of-amd-epyc-bf16')['rows']
    evaluation, training = (rows['unet-284m'][what]['ms']/rows['fit-500m'][what]['ms'] for what in ('evaluate', 'train'))
    assert f'the U-Net takes {evaluation:.2f} times as long for one evaluation and {training:.2f} times as long in training' in text
    for name, label in (('unet-85m', 'U-Net 85M'), ('unet-284m', 'U-Net 284M'), ('fit-500m', 'FIT 500M')):
        line = next(line for line in text.splitlines() if line.startswith(f'| {label} |'))
        assert line.endswith(f"| {rows[name]['train']['ms']/1e3:.1f} | {rows[name]['evaluate']['ms']/1e3:.2f} |")
    mini = record('unet-mini-mini-2-threads-of-amd-epyc-bf16-plain-attention')['rows']['mini']
    assert f"{mini['train']['share']:.0%}".replace('%', ' %') in text
    peers = [row['ratio'] for size in ('tiny', '85', '284') for name, row in record(f'peers-unet-{size}')['rows'].items() if row['ratio'] != 1 and not name.startswith(' ')]
    assert f'Ours is {min(peers):.1f} to {max(peers):.1f} times as fast' in text
    rin = [row['forward']['ratio'] for row in record('peers-rin')['rows'] if row['network'] == 'RIN']
    assert f'is {rin[0]:.2f}, {rin[1]:.1f} and {rin[2]:.1f} times as fast' in text
