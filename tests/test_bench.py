"""The profile of a training step, as far as a CPU can show it: what fits is found, what does not is said, and a record goes on where it stopped."""
import json, weakref

import pytest
import torch

import bench_step
from snapvideo_nb.model import PRESETS
from snapvideo_nb.speed import Machine


WAY = bench_step.asdict(bench_step.Way())


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A function that makes a bench of few rounds on this machine, whose roofs are given, whose memory is not measured, and that holds 4 clips at most, twice as many recomputed."
    built, said = [], []
    class Card(bench_step.Passes):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            built.append(weakref.ref(self))
        def compile(self): raise AssertionError('nothing compiles here')
        def train(self):
            held = [torch.ones(1)]
            built.append(weakref.ref(held[0]))
            if self.batch > (8 if self.network.recompute else 2 if not self.fused else 4): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')
            super().train()
    monkeypatch.setattr(bench_step, 'Passes', Card)
    monkeypatch.setattr(bench_step, 'measured_machine', lambda *_: Machine('', 1e11, 1e10))
    monkeypatch.setattr(bench_step, 'matrix_rate', lambda *_: 1e11)
    monkeypatch.setattr(bench_step, 'peak_bytes', lambda *_, **__: 10**9)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: make.alive.append(sum(ref() is not None for ref in built)))
    def make(**options): return bench_step.Bench('tiny', 'cpu', tmp_path/'step.json', **dict(rounds=2, warmup=1, say=said.append) | options)
    make.said, make.alive, make.path = said, [], tmp_path/'step.json'
    return make


def rows(record): return {str(bench_step.Way(**{key: row[key] for key in WAY})): row.get('why', 'ms' in row) for row in record['rows']}


def test_what_fits_is_measured_what_does_not_says_so_and_a_record_goes_on(small):
    stopped = small(minutes=60)
    stopped.roofs()
    stopped.search(bench_step.Way(), 1, up=True)
    small.said.clear()
    record = small(minutes=60).run(compile=False)
    assert record['rows'][:4] == stopped.record['rows'] and not any(line.startswith('bf16, fused attention, AdamW foreach') for line in small.said)
    usual = ', fused attention, AdamW foreach, '
    assert rows(record) == {f'bf16{usual}1 clip': True, f'bf16{usual}2 clips': True, f'bf16{usual}4 clips': True, f'bf16{usual}8 clips': 'out of memory', 'bf16, fused attention, AdamW fused, 4 clips': True,
                            f'bf16, recomputed{usual}4 clips': True, f'bf16, recomputed{usual}8 clips': True, f'bf16, recomputed{usual}16 clips': 'out of memory',
                            'bf16, plain attention, AdamW foreach, 4 clips': 'out of memory', 'bf16, plain attention, AdamW foreach, 2 clips': True, f'fp32{usual}4 clips': True}
    assert json.loads(small.path.read_text()) == record and not record['left_out']
    assert all(0 < row['low'] <= row['ms'] <= row['high'] and 0 < row['share'] for row in record['rows'] if 'ms' in row) and all(row['formula_bytes'] > 0 for row in record['rows'])
    fastest = record['fastest']
    assert set(fastest['phases']) == {'extra pass', 'forward and backward', 'optimizer'} and fastest['kernels']['kinds']['matrix products'] > 0 and fastest['parts']['read']['flops'] > 0
    assert 'Fastest' in bench_step.summary(record, small(minutes=60).best())
    assert len(small.alive) > 10 and not any(small.alive), 'memory cannot be given back while an exception holds it'
    with pytest.raises(ValueError, match='other conditions .rounds.'): small(rounds=3)
    small.path.write_text('[1, 2')
    with pytest.raises(ValueError, match='not a record'): small()


def test_rows_without_time_are_left_out_and_named(small):
    record = small(minutes=0).run(compile=False)
    assert not record['rows'] and 'bf16, fused attention, AdamW foreach, 1 clip' in record['left_out'] and len(record['left_out']) == 6
    assert bench_step.summary(record, None) == 'no row could be measured'


def test_a_failed_row_says_why_and_is_tried_again(small, monkeypatch):
    bench = small(minutes=60)
    bench.roofs()
    row = bench.row(bench_step.Way(compile=True))
    assert row['why'] == 'AssertionError: nothing compiles here' and not small().record['rows']
    wrapped = RuntimeError('the compiler failed')
    wrapped.__cause__ = torch.OutOfMemoryError('CUDA out of memory')
    assert bench_step.reason(wrapped) == 'out of memory' and bench_step.reason(RuntimeError('CUDA error: misaligned\nmore')) == 'RuntimeError: CUDA error: misaligned'


def test_recomputing_holds_less_by_the_formula():
    network = PRESETS['mini'].network
    usual, less = (bench_step.formula_bytes(network, bench_step.Way(recompute=recompute, batch=16), 32) for recompute in (False, True))
    assert .3 < less/usual < .7  # measured: 0.56 of the peak


@pytest.mark.parametrize('words, says', [(['--device', 'nowhere'], 'no such device'), (['--device', 'cuda:99'], 'finds no such GPU'), (['--device', 'cpu', '--rounds', '0'], 'at least 1')])
def test_a_mistake_gets_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop: bench_step.main(words)
    assert stop.value.code == 2 and says in capsys.readouterr().err and not list(tmp_path.iterdir())
