"""Training on real processes that are killed, stopped, starved of disk and lied to: what is left must be what an undisturbed run would have left.

`make test` kills five times, `make soak` fifty (KILLS=50)."""
import json, os, pickle, random, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snapvideo_nb import training
from snapvideo_nb.data import Shapes
from snapvideo_nb.model import PRESETS, SnapVideo
from snapvideo_nb.runs import Lines, read_log, seal
from snapvideo_nb.text import train_tokenizer
from snapvideo_nb.training import averaged_model, read_config, recipe, train

KILLS = int(os.environ.get('KILLS', 5))
STEPS = 12*KILLS
SHORT = dict(preset='tiny', data='shapes', steps=STEPS, batch=4, warmup=2, precision='fp32', workers=0, log_every=3, checkpoint_every=4, sample_every=0)


def command(run, processes=1, **changes):
    "The words of a run in a process of its own, or in several."
    options = SHORT | dict(run=run, device='cpu') | changes
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, '-m', 'snapvideo_nb.cli', *['--'][:processes - 1], 'train', *words]


def start(run, processes=1, limit=None, **changes):
    "Begin it; `limit`: the largest file that it may write, in bytes."
    def limited(): resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(command(run, processes, **changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'),
                            start_new_session=True, preexec_fn=limited if limit else None)


def finish(process):
    "Its exit code, and what it said on stderr in lines of its own."
    _, said = process.communicate(timeout=120)
    return process.returncode, [line for line in said.replace('\r', '\n').splitlines() if line.startswith('snapvideo:')]


def until(happened, process, seconds=60):
    "Wait for something, as long as a process lives; whether it happened."
    end = time.time() + seconds
    while process.poll() is None and time.time() < end:
        if happened(): return True
        time.sleep(.001)
    return False


def logged(run): return max([0, *(row['step'] for row in Lines(run/'log.jsonl').read())])
def begun(run): return {path.name for path in (run/'checkpoints').glob('*.tmp')}


def kept(run):
    "All that a finished run leaves, but for seconds."
    log = [{key: value for key, value in row.items() if key != 'seconds'} for row in read_log(run)]
    tensors = {}
    for shard in sorted((run/'checkpoints'/f'step-{STEPS:08d}').glob('*.safetensors')): tensors |= load_file(shard)
    return log, tensors, (run/'model'/'model.safetensors').read_bytes()


def assert_same(run, undisturbed):
    (log, tensors, model), (log_, tensors_, model_) = kept(run), undisturbed
    assert log == log_ and tensors.keys() == tensors_.keys()
    assert all(torch.equal(value, tensors_[name]) for name, value in tensors.items()) and model == model_


@pytest.fixture(autouse=True)
def one_thread():
    "As many threads here as in the processes: sums over other numbers of threads differ in their last bits."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp('undisturbed')/'run'
    assert finish(start(run))[0] == 0
    return kept(run)


def test_killed_at_any_moment(tmp_path, undisturbed):
    run, chance, lives = tmp_path/'run', random.Random(0), 0
    for life in range(KILLS):
        process, before = start(run), logged(run) if run.exists() else 0
        if life % 2: happened = until(lambda: begun(run), process)  # while it saves
        else:
            happened = until(lambda: run.exists() and logged(run) > before, process)
            time.sleep(.15*chance.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        lives += happened
        if process.returncode == 0: break
    assert finish(start(run))[0] == 0
    assert lives >= min(KILLS, 4)
    assert_same(run, undisturbed)


@pytest.mark.parametrize('request_', [signal.SIGTERM, signal.SIGINT], ids=['sigterm', 'ctrl-c'])
def test_asked_to_stop(request_, tmp_path, undisturbed):
    process = start(tmp_path/'run')
    assert until(lambda: (tmp_path/'run'/'log.jsonl').exists(), process)
    os.killpg(process.pid, request_)
    code, said = finish(process)
    assert code == 75 and len(said) == 1 and 'everything is saved' in said[0]
    steps = int(said[0].split('after step ')[1].split(',')[0])
    assert (tmp_path/'run'/'checkpoints'/'latest').read_text() == f'step-{steps:08d}' and 3 <= steps < STEPS
    assert finish(start(tmp_path/'run')) == (0, [])
    assert_same(tmp_path/'run', undisturbed)


def test_two_processes_are_asked_to_stop(tmp_path):
    "The launcher passes the signal on, and the state of the last step is saved."
    run = tmp_path/'run'
    process = start(run, processes=2, steps=100_000)
    assert until(lambda: run.exists() and logged(run) >= 3, process)
    os.kill(process.pid, signal.SIGTERM)
    code, said = finish(process)
    assert code and sum('everything is saved' in line for line in said) == 1
    steps = int(next(line for line in said if 'after step' in line).split('after step ')[1].split(',')[0])
    assert (run/'checkpoints'/'latest').read_text() == f'step-{steps:08d}'


def test_one_then_two_then_one(tmp_path, undisturbed):
    run = tmp_path/'run'
    process = start(run)
    assert until(lambda: run.exists() and logged(run) >= 12, process)
    os.killpg(process.pid, signal.SIGKILL); process.communicate()
    process = start(run, processes=2)
    assert until(lambda: logged(run) >= 36, process)
    os.killpg(process.pid, signal.SIGKILL); process.communicate()
    for name in subprocess.run(['pgrep', '-f', str(run)], capture_output=True, text=True).stdout.split(): os.kill(int(name), signal.SIGKILL)
    assert finish(start(run)) == (0, [])
    pairs = list(zip(kept(run)[0], undisturbed[0]))
    assert len(pairs) == STEPS//3 and max(abs(a['loss'] - b['loss']) for a, b in pairs) <= 1e-5
    assert [a['by_noise'].keys() for a, _ in pairs] == [b['by_noise'].keys() for _, b in pairs]  # the same noise levels


def test_a_full_disk_costs_nothing_but_the_checkpoint(tmp_path, undisturbed):
    run = tmp_path/'run'
    process = start(run)
    assert until(lambda: (run/'checkpoints'/'step-00000012').exists(), process)
    os.killpg(process.pid, signal.SIGKILL); process.communicate()
    before = {path.name for path in (run/'checkpoints').glob('step-*') if not path.suffix}
    code, said = finish(start(run, limit=200_000, steps=STEPS - 20))
    assert code == 2 and 'could not be written' in said[-1] and 'training goes on' in said[0]
    assert {path.name for path in (run/'checkpoints').iterdir()} == before | {'latest'}
    shutil.rmtree(run/'model', ignore_errors=True)
    finish(start(run))
    assert logged(run) == STEPS


@pytest.mark.parametrize('harm', ['truncated', 'one bit', 'missing', 'state'])
def test_a_damaged_checkpoint_is_passed_over(harm, tmp_path, undisturbed):
    run = tmp_path/'run'
    with pytest.raises(Crash): train(config(run), watch=enough(21))
    newest = sorted(path for path in (run/'checkpoints').glob('step-*') if not path.suffix)[-1]
    shard = next(newest.glob('*.safetensors'))
    data = bytearray(shard.read_bytes())
    if harm == 'truncated': shard.write_bytes(data[:len(data)//2])
    if harm == 'one bit': data[len(data)//2] ^= 4; shard.write_bytes(data)
    if harm == 'missing': shard.unlink()
    if harm == 'state': (newest/'state.json').write_text('{}')
    with pytest.warns(UserWarning, match='the checkpoint before it is used'): train(read_config(run))
    assert_same(run, undisturbed)


class Crash(Exception): pass


def enough(steps):
    "A watch that ends a run in this process after some steps, as a crash would."
    def watch(step, average):
        if step == steps: raise Crash
    return watch


def config(run, **changes): return recipe(**SHORT | dict(run=str(run)) | changes)


def spoiled(monkeypatch, steps, value):
    "Losses that are `value` at some steps."
    usual = training.training_loss
    def spoil(model, batch, config, step, rows=None):
        loss, sigma = usual(model, batch, config, step, rows)
        return (loss*value if step in steps else loss), sigma
    monkeypatch.setattr(training, 'training_loss', spoil)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e4], ids=['nan', 'inf', 'explodes'])
def test_a_bad_step_is_refused_and_written_down(value, tmp_path, monkeypatch):
    spoiled(monkeypatch, {30, 31}, value)
    run = train(config(tmp_path/'run', steps=40))
    assert [row['step'] for row in Lines(run/'skipped.jsonl').read()] == [31, 32] and read_log(run)[-1]['refused'] == 2
    assert len(list((run/'refused').glob('*.safetensors'))) == 2
    assert all(p.isfinite().all() for p in averaged_model(run).parameters())
    assert max(row['loss'] for row in read_log(run)) < 10


def test_too_many_bad_steps_end_the_run(tmp_path, monkeypatch):
    spoiled(monkeypatch, range(10, 100), float('nan'))
    with pytest.raises(FloatingPointError, match='4 steps in a row were refused, up to step 14'): train(config(tmp_path/'run', patience=4))
    assert all(p.isfinite().all() for p in averaged_model(tmp_path/'run').parameters())
    monkeypatch.undo()
    assert logged(train(config(tmp_path/'run', patience=4))) == STEPS


class Torn(Shapes):
    "Clips of which two cannot be read."
    def __len__(self): return 12
    def __getitem__(self, i):
        if i in (3, 7): raise ValueError(f'clip-{i}.mp4: not a video that can be read')
        return super().__getitem__(i)


@pytest.mark.parametrize('workers', [0, 2])
def test_clips_that_cannot_be_read_are_named(workers, tmp_path):
    run = train(config(tmp_path/'run', steps=9, workers=workers), Torn(4, 9, 16))
    named = [row['clip'] for row in Lines(run/'skipped.jsonl').read()]
    assert {name.split(':')[0] for name in named} == {'clip-3.mp4', 'clip-7.mp4'} and len(named) >= 6  # three epochs


def test_a_killed_worker_ends_the_run_clearly(tmp_path, undisturbed):
    process = start(tmp_path/'run', workers=1)
    assert until(lambda: (tmp_path/'run'/'log.jsonl').exists(), process)
    worker = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(worker[-1]), signal.SIGKILL)
    code, said = finish(process)
    assert code == 75 and len(said) == 1 and 'the same command continues' in said[0]
    assert finish(start(tmp_path/'run', workers=1)) == (0, [])
    assert_same(tmp_path/'run', undisturbed)


def test_a_folder_has_one_writer(tmp_path):
    process = start(tmp_path/'run', steps=100_000)
    assert until(lambda: (tmp_path/'run'/'log.jsonl').exists(), process)
    code, said = finish(start(tmp_path/'run', steps=100_000))
    assert code == 2 and len(said) == 1 and f'another process trains here (process {process.pid}' in said[0]
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL); process.communicate()


class Hostile:
    def __reduce__(self): return os.system, (f'touch {os.environ["SNAPVIDEO_TRAP"]}',)


@pytest.mark.parametrize('victim', ['shard', 'state.json', 'tokenizer.json', '.metadata', 'config.json', 'log.jsonl', 'latest'])
def test_a_hostile_file_runs_no_code(victim, tmp_path, monkeypatch):
    monkeypatch.setenv('SNAPVIDEO_TRAP', str(tmp_path/'sprung'))
    run = tmp_path/'run'
    train(config(run, steps=8))
    folder = run/'checkpoints'/'step-00000008'
    path = dict(shard=next(folder.glob('*.safetensors')), latest=run/'checkpoints'/'latest').get(victim, (run if victim in ('config.json', 'log.jsonl') else folder)/victim)
    state = json.loads((folder/'state.json').read_text())['state']
    path.write_bytes(pickle.dumps(Hostile()))
    if victim in ('shard', 'tokenizer.json', '.metadata'):
        (folder/'state.json').unlink()
        seal(folder, state)  # a digest that fits
    for attempt in (lambda: averaged_model(run), lambda: train(config(run, steps=9))):
        try: attempt()
        except (ValueError, OSError) as error: assert str(error)
    assert not (tmp_path/'sprung').exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path/'sprung').exists()  # the trap works


def test_lamb_is_the_published_one():
    published = pytest.importorskip('torch_optimizer').Lamb
    torch.manual_seed(0)
    shapes = [(7, 5), (5,), (3, 2, 4)]
    ours, theirs = ([torch.nn.Parameter(scale*w) for w, scale in zip(first, (1., .01, 0.))] for first in [[torch.randn(shape) for shape in shapes]]*2)
    one, two = training.Lamb(ours, .01, (.9, .99), 1e-8, .02), published(theirs, .01, (.9, .99), 1e-8, .02)
    for _ in range(30):
        for a, b in zip(ours, theirs): a.grad = torch.randn(a.shape); b.grad = a.grad.clone()
        one.step(); two.step()
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_stream_is_continued_where_it_was(tmp_path):
    from snapvideo_nb.streams import open_stream, write_shards
    write_shards([Shapes(4, 9, 16)[i] for i in range(37)], tmp_path/'shards', per_shard=5)
    options = dict(data=str(tmp_path/'shards'), data_options=dict(streaming=True), steps=20)
    whole = train(config(tmp_path/'whole', **options))
    with pytest.raises(Crash): train(config(tmp_path/'parts', **options), watch=enough(11))
    parts = train(config(tmp_path/'parts', **options | dict(workers=2)))
    one, two = ([{k: v for k, v in row.items() if k != 'seconds'} for row in read_log(run)] for run in (whole, parts))
    assert one == two and (whole/'model'/'model.safetensors').read_bytes() == (parts/'model'/'model.safetensors').read_bytes()


@pytest.mark.parametrize('preset', ('small', 'small-up'))
def test_recipes_for_a_gpu_run_in_miniature(preset, tmp_path):
    "The recipe as it is, but for the device, its number of steps and clips, and a first stage that nobody trained."
    changes = dict(run=tmp_path/'run', device='cpu', steps=2, batch=2, workers=0, warmup=1, compile=False, sample_every=0, fused_attention=False)
    if preset == 'small-up':
        SnapVideo.from_preset('small', tokenizer_json=train_tokenizer(['a frog moves left'], 300).to_json()).save_pretrained(tmp_path/'first')
        changes |= dict(first_stage=str(tmp_path/'first'))
    model = SnapVideo.from_pretrained(train(recipe(preset, **changes | dict(run=str(tmp_path/'run'))))/'model')
    assert model.config.network == PRESETS[preset].network and read_log(tmp_path/'run')[-1]['clips'] == 4
    assert sum(p.numel() for p in model.parameters())*2 < 25e6
