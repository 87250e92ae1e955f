"""The command `snapvideo` as a user meets it: what it makes, and what it says to mistakes.

A mistake gives one line on stderr that names what was wrong, exit code 2, no traceback, and leaves every folder as it was. Most tests call
`main` in this process, which is all that the installed command does; where the process itself matters, it is a real one."""
import json, os, resource, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch

from snapvideo_nb.cli import main
from snapvideo_nb.model import SnapVideo
from snapvideo_nb.text import train_tokenizer
from snapvideo_nb.video import read_video, write_video

COMMAND = [sys.executable, '-c', 'import sys; from snapvideo_nb.cli import main; sys.exit(main())']
CAPTION = 'a red apple moving to the right'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "The smallest preset, untrained, saved like any other model."
    folder = tmp_path_factory.mktemp('models')/'tiny'
    tokenizer = train_tokenizer([CAPTION, 'a blue fish is still'], 300).to_json()
    torch.manual_seed(0)
    return SnapVideo.from_preset('tiny', tokenizer_json=tokenizer).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder to work in."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    "Every file below a folder with its bytes, every folder with None."
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob('*'))}


def refused(capsys, folder, *words, says):
    "The command is refused with one line that holds every string of `says`, and nothing in the folder has changed."
    before = contents(folder)
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.err.count('\n') == 1 and printed.err.startswith('snapvideo: ') and printed.out == ''
    for part in says: assert str(part) in printed.err
    assert contents(folder) == before
    return printed.err


def sample(model, *words): return ['sample', CAPTION, '--model', str(model), '--steps', '2', *map(str, words)]


# What it makes

def test_sample_writes_videos_and_a_sheet_and_prints_where(model, folder, capsys):
    assert main(sample(model, '--count', 2, '--seed', 5, '--out', 'made', '--scale', 2)) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(map(str, printed)) == [f'made/a-red-apple-moving-to-the-right-seed5{end}' for end in ('-sheet.png', '.mp4')] + ['made/a-red-apple-moving-to-the-right-seed6.mp4']
    assert sorted(printed) == sorted(Path('made').iterdir())
    assert read_video(printed[0]).frames.shape == (4, 18, 32, 3)


def test_the_same_seed_gives_the_same_file(model, folder):
    for out, more in (('one', []), ('two', []), ('three', ['--count', 3])): assert main(sample(model, '--out', out, *more)) == 0
    first, again, beside_others = (read_video(Path(out)/'a-red-apple-moving-to-the-right-seed0.mp4').frames for out in ('one', 'two', 'three'))
    assert np.array_equal(first, again) and np.array_equal(first, beside_others)


def test_captions_of_one_name_get_files_of_their_own(model, folder):
    assert main(['sample', 'a cat', 'A cat!', '--model', str(model), '--steps', '1', '--out', 'made']) == 0
    assert sorted(path.name for path in Path('made').glob('*.mp4')) == ['a-cat-2-seed0.mp4', 'a-cat-seed0.mp4']


def test_unknown_words_are_named_and_sampling_goes_on(model, folder, capsys):
    assert main(['sample', 'a red zebra moving to the quay', '--model', str(model), '--steps', '1', '--out', 'made']) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if 'warning' in line]
    assert len(told) == 1 and "'zebra'" in told[0] and "'quay'" in told[0] and "'red'" not in told[0]
    assert len(list(Path('made').iterdir())) == 2


def test_force_overwrites(model, folder):
    assert main(sample(model, '--out', 'made')) == main(sample(model, '--out', 'made', '--force')) == 0
    assert len(list(Path('made').iterdir())) == 2


def test_presets_lists_every_preset_and_shows_one(capsys):
    from snapvideo_nb.model import PRESETS
    assert main(['presets']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert main(['presets', 'tiny']) == 0
    assert json.loads(capsys.readouterr().out)['network']['frames'] == PRESETS['tiny'].network.frames


def test_train_then_train_again_then_sample(folder, capsys):
    words = ['train', '--preset', 'tiny', '--data', 'shapes', '--run', 'run', '--batch', '2', '--workers', '0', '--sample-every', '100', '--checkpoint-every', '2']
    assert main([*words, '--steps', '2']) == main([*words, '--steps', '4']) == 0
    assert json.loads(Path('run/log.jsonl').read_text().splitlines()[-1])['step'] == 4
    assert main(['sample', 'a circle', '--model', 'run/model', '--steps', '1', '--out', 'made']) == 0


def test_fine_tuning_takes_the_models_own_recipe_and_a_folder_of_its_own(folder, capsys):
    "Also from a folder of your own with fewer clips than a sheet of samples shows."
    small = ['--workers', '0', '--sample-every', '0', '--steps', '1']
    assert main(['train', '--preset', 'tiny', '--data', 'shapes', '--run', 'first', '--batch', '3', '--lr', '0.004', *small]) == 0
    Path('mine').mkdir()
    for name in 'ab': write_video(Path('mine', f'{name}.mp4'), np.full((8, 18, 32, 3), 90, np.uint8), 8)
    Path('mine/metadata.csv').write_text('file_name,caption\na.mp4,a grey wall\nb.mp4,a wall\n')
    before = contents(folder/'first')
    assert main(['train', '--init-from', 'first/model', '--data', 'mine', *small]) == 0
    assert 'runs/first-tuned' in capsys.readouterr().err and contents(folder/'first') == before
    told = json.loads(Path('runs/first-tuned/config.json').read_text())
    assert (told['preset'], told['batch'], told['lr'], told['data'], told['init_from']) == ('tiny', 3, .004, 'mine', 'first/model')
    assert main(['train', '--init_from', 'mini', '--preset', 'tiny', '--steps', '0']) == 2


def test_data_show_writes_a_sheet_and_prints_captions(folder, capsys):
    assert main(['data', 'show', 'shapes', '--count', '3', '--frames', '4', '--height', '18', '--width', '32', '--out', 'made']) == 0
    *captions, sheet = capsys.readouterr().out.splitlines()
    assert len(captions) == 3 and Path(sheet).read_bytes()[:4] == b'\x89PNG'


# Mistakes

@pytest.mark.parametrize('words, says', [
    (['smaple'], ['smaple', 'sample']),
    (['data', 'emojis'], ['data emoji']),
    (['sample'], ['no caption']),
    (['sample', ''], ['caption is empty']),
    (['sample', '  '], ['caption is empty']),
    (['sample', 'a cat', '--steps', '0'], ['--steps', '0']),
    (['sample', 'a cat', '--steps', '-3'], ['--steps', '-3']),
    (['sample', 'a cat', '--steps', 'many'], ['--steps', 'many']),
    (['sample', 'a cat', '--count', '0'], ['--count']),
    (['sample', 'a cat', '--guidance', 'nan'], ['--guidance', 'nan']),
    (['sample', 'a cat', '--guidance', '-1'], ['--guidance', '-1']),
    (['sample', 'a cat', '--sed', '3'], ['--sed', '--seed']),
    (['sample', 'a cat', '--model', 'nowhere'], ['nowhere']),
    (['sample', 'a cat', '--device', 'abacus'], ['abacus']),
    (['presets', 'huge'], ['huge', 'mini']),
    (['train', '--preset', 'huge'], ['huge', 'mini']),
    (['train', '--data', 'nowhere'], ['nowhere']),
    (['train', '--steps', '0'], ['steps']),
    (['train', '--batch', '0'], ['batch']),
    (['train', '--init-from', 'nowhere', '--data', 'shapes'], ['nowhere']),
    (['train', '--init-from', 'nowhere', '--preset', 'tiny', '--data', 'shapes'], ['nowhere']),
    (['train', '--preset', 'tiny', '--data', 'shapes', '--device', 'abacus'], ['--device abacus']),
    (['train', '--preset', 'tiny', '--data', 'shapes', '--label-dropout', '2'], ['label_dropout', 'from 0 to 1']),
    (['train', '--preset', 'tiny', '--data', 'shapes', '--seed', '-1'], ['seed', 'at least 0']),
    (['data', 'show', 'nowhere'], ['nowhere']),
    (['data', 'show', 'shapes', '--frames', '0'], ['--frames']),
    (['data', 'measure', 'nowhere'], ['nowhere']),
    (['data', 'measure', 'shapes', '--level', '2'], ['--level', '2']),
    (['data', 'measure', 'shapes', '--count', '3'], ['8', '3']),
    (['data', 'emoji'], ['--out']),
    (['data', 'emoji', '--out', 'new', '--packages', '7'], ['7']),
    (['data', 'emoji', '--out', 'new', '--size', '0'], ['--size']),
    (['data', 'film', '--out', 'new', '--width', '0'], ['--width']),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else None)
def test_a_mistake_gets_one_line(words, says, folder, capsys): refused(capsys, folder, *words, says=says)


def test_an_output_that_exists_is_kept(model, folder, capsys):
    taken = Path('made/a-red-apple-moving-to-the-right-seed1.mp4')
    taken.parent.mkdir()
    taken.write_text('mine')
    refused(capsys, folder, *sample(model, '--count', 3, '--out', 'made'), says=[taken, '--force'])


def test_an_output_folder_that_is_a_file(model, folder, capsys):
    Path('made').write_text('mine')
    refused(capsys, folder, *sample(model, '--out', 'made'), says=['made'])


def test_a_folder_with_files_is_not_filled(folder, capsys):
    Path('mine').mkdir()
    Path('mine/ant.webp').write_text('mine')
    for name in ('emoji', 'film'): refused(capsys, folder, 'data', name, '--out', 'mine', says=['mine', 'not empty'])


@pytest.fixture
def damaged(model, folder):
    shutil.copytree(model, 'damaged')
    return Path('damaged')


def test_a_model_without_weights(damaged, folder, capsys):
    (damaged/'model.safetensors').unlink()
    refused(capsys, folder, *sample(damaged), says=['damaged', 'model.safetensors'])


@pytest.mark.parametrize('harm', [lambda data: data[:len(data) // 2], lambda data: b'', lambda data: os.urandom(1000), lambda data: b'\xff' * 8 + data[8:]],
                         ids=['cut short', 'empty', 'random bytes', 'impossible header'])
def test_weights_that_are_damaged(damaged, folder, capsys, harm):
    weights = damaged/'model.safetensors'
    weights.write_bytes(harm(weights.read_bytes()))
    refused(capsys, folder, *sample(damaged), says=['damaged'])


@pytest.mark.parametrize('text', ['', '{', '[]', '{"version": 9}', '{"version": 1, "kind": "fit", "network": {"frames": "many"}}'])
def test_a_configuration_that_is_damaged(damaged, folder, capsys, text):
    (damaged/'config.json').write_text(text)
    refused(capsys, folder, *sample(damaged), says=['damaged'])


def test_weights_of_another_shape(damaged, folder, capsys):
    config = json.loads((damaged/'config.json').read_text())
    config['network']['latent_width'] *= 2
    (damaged/'config.json').write_text(json.dumps(config))
    refused(capsys, folder, *sample(damaged), says=['damaged'])


def test_a_tokenizer_that_is_damaged(damaged, folder, capsys):
    (damaged/'tokenizer.json').write_text('{"version": 1}')
    refused(capsys, folder, *sample(damaged), says=['damaged'])


def test_a_run_continued_with_another_configuration(folder, capsys):
    words = ['train', '--preset', 'tiny', '--data', 'shapes', '--run', 'run', '--steps', '1', '--workers', '0', '--batch']
    assert main([*words, '2']) == 0
    capsys.readouterr()
    refused(capsys, folder, *words, '3', says=['batch', '2', '3'])


def test_a_run_whose_checkpoint_is_damaged(folder, capsys):
    words = ['train', '--preset', 'tiny', '--data', 'shapes', '--run', 'run', '--batch', '2', '--workers', '0', '--steps']
    assert main([*words, '1']) == 0
    capsys.readouterr()
    for file in Path('run/checkpoints').glob('*/*.safetensors'): file.write_bytes(b'nothing')
    refused(capsys, folder, *words, '2', says=['run/checkpoints', 'damaged'])


def test_files_that_are_no_videos_are_named(folder, capsys):
    "A broken file among good ones is named and left out; a folder with nothing else is refused."
    Path('clips').mkdir()
    Path('clips/broken.mp4').write_bytes(b'not a video')
    assert 'broken.mp4' in refused_lines(capsys, folder, 'data', 'show', 'clips', '--frames', 4)
    write_video('clips/good.mp4', np.zeros((8, 18, 32, 3), np.uint8), 8)
    assert main(['data', 'show', 'clips', '--frames', '4', '--out', 'made']) == 0
    assert 'broken.mp4' in capsys.readouterr().err


def refused_lines(capsys, folder, *words):
    "Like `refused`, for a command that warns before it gives up: all it said, of which the last line is the reason."
    before = contents(folder)
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert all(line.startswith('snapvideo: ') for line in told.splitlines()) and contents(folder) == before
    return told


def test_debug_shows_the_traceback(folder, capsys):
    assert main(['sample', 'a cat', '--steps', '0', '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err


# The process itself

def run(*words, folder, **options):
    return subprocess.run([*COMMAND, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120, **options)


def test_help_is_there_at_once(tmp_path):
    "In processor time, which does not depend on what else the machine does."
    for words in ([], ['--help'], ['sample', '--help'], ['data', '--help'], ['presets', '--help']):
        before = sum(os.times()[2:4])
        done = run(*words, folder=tmp_path)
        assert done.returncode == 0 and 'usage: snapvideo' in done.stdout and done.stderr == ''
        assert sum(os.times()[2:4]) - before < 2, words


def test_help_says_defaults_and_conventions(tmp_path):
    help = run('sample', '--help', folder=tmp_path).stdout
    for part in ('--steps', 'default: 64', '--guidance', 'D_c', '--seed', '--force'): assert part in help
    help = ' '.join(run('train', '--help', folder=tmp_path).stdout.replace('│', ' ').split())
    for part in ('--preset', '--init-from', '--steps', '--lr', 'default: mini'): assert part in help


def test_a_mistake_in_a_real_process(tmp_path):
    done = run('sample', 'a cat', '--steps', 0, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, '', 'snapvideo: --steps must be at least 1, not 0\n')


def test_no_space_leaves_nothing_half_written(model, tmp_path):
    "Files are limited to 4 kB, as on a full disk: the video does not fit."
    done = run(*sample(model, '--out', 'made', '--scale', 16), folder=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('snapvideo: ')
    assert [path for path in (tmp_path/'made').iterdir() if path.stat().st_size] == []


def test_nobody_reads_on(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, 'presets', 'tiny'], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, '')


def test_interrupted(model, tmp_path):
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background is deaf to SIGINT, and so are its children
    with subprocess.Popen([*COMMAND, *sample(model, '--steps', 100000)], cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        while 'denoising' not in process.stderr.read(400): assert process.poll() is None  # 400: the bar stands and moves
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130 and told.endswith('snapvideo: interrupted\n') and 'Traceback' not in told
    assert list(tmp_path.iterdir()) == []
