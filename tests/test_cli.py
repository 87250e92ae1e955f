"""The command `snapvideo` as a user meets it: what it makes, and what it says to mistakes.

A mistake gives one line on stderr that names what was wrong, exit code 2, no traceback, and leaves every folder as it was. Most tests call
`main` in this process, which is all that the installed command does; where the process itself matters, it is a real one."""
import hashlib, json, os, resource, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch

from snapvideo_nb import __version__
from snapvideo_nb.cli import main
from snapvideo_nb.extend import long_video
from snapvideo_nb.guidance import Guidance
from snapvideo_nb.model import SnapVideo
from snapvideo_nb.outputs import FORMATS, read_clip, read_metadata, write_file
from snapvideo_nb.sampling import sample as library_sample
from snapvideo_nb.text import train_tokenizer
from snapvideo_nb.training import recipe
from snapvideo_nb.video import read_video, to_frames, to_tensor, write_video

COMMAND = [sys.executable, '-c', 'import sys; from snapvideo_nb.cli import main; sys.exit(main())']
CAPTION = 'a red apple moving to the right'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "The smallest preset, untrained, saved like any other model."
    folder = tmp_path_factory.mktemp('models')/'tiny'
    tokenizer = train_tokenizer([CAPTION, 'a blue fish is still'], 300).to_json()
    torch.manual_seed(0)
    return SnapVideo.from_preset('tiny', tokenizer_json=tokenizer).save_pretrained(folder)


@pytest.fixture(scope='module')
def pair(model, tmp_path_factory):
    "The same model with an upsampler beside it, untrained too."
    folder = tmp_path_factory.mktemp('pair')/'tiny'
    shutil.copytree(model, folder)
    base = SnapVideo.from_pretrained(model)
    network = replace(base.config.network, height=18, width=32, group=(4, 6, 4), low_res=True)
    SnapVideo(replace(base.config, network=network, low_res=(9, 16), level=.1), base.text.tokenizer_json).save_pretrained(folder.with_name('tiny-up'))
    return folder


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

def test_sample_writes_videos_and_prints_where(model, folder, capsys):
    assert main(sample(model, '--seeds', '5-6', '--out', 'made', '--scale', 2)) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert list(map(str, printed)) == [f'made/a-red-apple-moving-to-the-right-seed{seed}.mp4' for seed in (5, 6)]
    assert sorted(printed) == sorted(Path('made').iterdir())
    assert read_video(printed[0]).frames.shape == (4, 18, 32, 3)


def test_the_same_seed_gives_the_same_file(model, folder):
    for out, seeds in (('one', '0'), ('two', '0'), ('three', '2,0-1')): assert main(sample(model, '--out', out, '--seeds', seeds)) == 0
    first, again, beside_others = (read_video(Path(out)/'a-red-apple-moving-to-the-right-seed0.mp4').frames for out in ('one', 'two', 'three'))
    assert np.array_equal(first, again) and np.array_equal(first, beside_others)


def test_captions_of_one_name_get_files_of_their_own(model, folder):
    assert main(['sample', 'a cat', 'A cat!', '--model', str(model), '--steps', '1', '--out', 'made']) == 0
    assert sorted(path.name for path in Path('made').glob('*.mp4')) == ['a-cat-2-seed0.mp4', 'a-cat-seed0.mp4']


def test_captions_from_a_file(model, folder, capsys):
    "One a line, beside those of the command line, each once."
    Path('prompts.txt').write_text('# two fish\n\na blue fish\na fish  \n', 'utf-8')
    assert main(['sample', 'a fish', '--file', 'prompts.txt', '--model', str(model), '--steps', '1', '--out', 'made']) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ['a-fish-seed0.mp4', 'a-blue-fish-seed0.mp4']


def test_unknown_words_are_named_and_sampling_goes_on(model, folder, capsys):
    assert main(['sample', 'a red zebra moving to the quay', '--model', str(model), '--steps', '1', '--out', 'made']) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if 'warning' in line]
    assert len(told) == 1 and "'zebra'" in told[0] and "'quay'" in told[0] and "'red'" not in told[0]
    assert len(list(Path('made').iterdir())) == 1


def test_formats_and_endings(model, folder, capsys):
    "Every format in a folder, each by its ending as a file; the WebP holds exactly what was sampled."
    assert main(sample(model, '--format', 'mp4', 'gif', 'webp', 'png', '--out', 'made', '--scale', 1)) == 0
    assert sorted(path.suffix for path in Path('made').iterdir()) == sorted(FORMATS)
    for ending in FORMATS: assert main(sample(model, '--out', f'one{ending}', '--scale', 1)) == 0
    exact = to_frames(library_sample(SnapVideo.from_pretrained(model), [CAPTION], [0], steps=2))[0]
    for path in ('one.webp', 'made/a-red-apple-moving-to-the-right-seed0.webp'): assert np.array_equal(read_clip(path).frames, exact)


def test_every_setting_reaches_the_video_and_the_file(model, folder):
    words = '--guidance 3 --oscillate 1 --steady 1 --interval 0.01 50 --threshold 0.9 --solver churn --fps 12 --frames 7 --overlap 2 --weight 1 --scale 1 --batch 2'.split()
    assert main(sample(model, *words, '--negative', 'a blue fish', '--out', 'one.webp')) == 0
    told = read_metadata('one.webp')
    expected = dict(caption=CAPTION, seed=0, steps=2, solver='churn', guidance=3., oscillate=1., steady=1, interval=[.01, 50.], threshold=.9, negative='a blue fish', fps=12., frames=7, overlap=2, weight=1.,
                    weights=hashlib.sha256(b''.join((model/name).read_bytes() for name in ('config.json', 'model.safetensors', 'tokenizer.json'))).hexdigest()[:16], scale=1)
    assert told['recipe'] == expected and told['made'] == dict(snapvideo=__version__, torch=torch.__version__, device='cpu', model=str(model), up='none', batch=2)
    guidance = Guidance(3., 1., 1, (.01, 50.), .9)
    direct = long_video(SnapVideo.from_pretrained(model), [CAPTION], [0], 7, rates=(12.,), overlap=2, weight=1., steps=2, guidance=guidance, negative='a blue fish', solver='churn', micro_batch=2)
    clip = read_clip('one.webp')
    assert np.array_equal(clip.frames, to_frames(direct)[0]) and clip.fps == 12


def test_a_grid_for_each_caption_or_of_all(model, folder, capsys):
    captions = ['a cat', 'a dog']
    words = ['sample', *captions, '--model', str(model), '--steps', '1', '--seeds', '0-2', '--grid', '--scale', '4']
    assert main([*words, '--out', 'made', '--format', 'webp', 'png']) == main([*words, '--out', 'all.webp']) == 0
    assert sorted(path.name for path in Path('made').iterdir()) == [f'{name}-seeds0-2{end}' for name in ('a-cat', 'a-dog') for end in ('.png', '.webp')]
    assert read_clip('made/a-cat-seeds0-2.webp').frames.shape == (4, 14 + 2*(14 + 36 + 2), 2*(64 + 2), 3)
    whole = read_clip('all.webp').frames
    assert whole.shape == (4, 2*(14 + 14 + 36 + 2), 3*(64 + 2), 3)
    exact = to_frames(library_sample(SnapVideo.from_pretrained(model), ['a dog'], [1], steps=1))[0].repeat(4, 1).repeat(4, 2)
    assert np.array_equal(whole[:, -38:-2, 66:130], exact)
    assert read_metadata('all.webp')['recipe']['captions'] == captions


def test_more_frames_a_clip_to_continue_and_a_picture(model, folder):
    given = np.random.default_rng(0).integers(0, 256, (2, 9, 16, 3), dtype=np.uint8)
    write_file('given.webp', given, 8., {})
    write_file('picture.png', given[1], 8., {})
    for words, first, frames in ((['--frames', 7], None, 7), (['--continue', 'given.webp'], given, 5), (['--image', 'picture.png'], given[1:], 4), (['--image', 'picture.png', '--frames', 6], given[1:], 6)):
        assert main(sample(model, *words, '--scale', 1, '--out', 'made.webp', '--force')) == 0
        made = read_clip('made.webp').frames
        assert len(made) == frames and (first is None or np.array_equal(made[:len(first)], first))
        assert main(['sample', '--again', 'made.webp', '--out', 'again.webp', '--force']) == 0
        assert np.array_equal(read_clip('again.webp').frames, made)


def test_a_video_through_several_rates(model, folder):
    "Given frames are taken at the last rate; --again goes through the same rates."
    given = np.random.default_rng(0).integers(0, 256, (9, 9, 16, 3), dtype=np.uint8)
    write_file('fast.webp', given, 24., dict(recipe=dict(fps=24.), made={}))
    assert main(sample(model, '--continue', 'fast.webp', '--frames', 7, '--rates', '4,8', '--weight', '8,2', '--scale', 1, '--out', 'one.webp')) == 0
    clip, recipe = read_clip('one.webp'), read_metadata('one.webp')['recipe']
    assert clip.fps == recipe['fps'] == 8 and recipe['rates'] == [4, 8] and recipe['weight'] == [8, 2] and np.array_equal(clip.frames[:3], given[::3])
    direct = long_video(SnapVideo.from_pretrained(model), [CAPTION], [0], 7, to_tensor(given[::3])[None], rates=(4., 8.), weight=(8., 2.), steps=2)
    assert np.array_equal(clip.frames, to_frames(direct)[0])
    assert main(['sample', '--again', 'one.webp', '--out', 'two.webp']) == 0
    assert np.array_equal(read_clip('two.webp').frames, clip.frames)


def test_a_clip_too_slow_to_continue(model, folder, capsys):
    write_file('slow.webp', np.zeros((4, 9, 16, 3), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None], 4., dict(recipe=dict(fps=4.), made={}))
    refused(capsys, folder, *sample(model, '--continue', 'slow.webp'), says=['4 frames per second is too slow for 8'])


def test_again_makes_the_same_frames_and_says_when_it_cannot(model, folder, capsys):
    shutil.copytree(model, 'copy')
    words = ['sample', CAPTION, '--model', 'copy', '--steps', '2', '--guidance', '2', '--interval', '0.1', 'inf', '--seeds', '7', '--out', 'one.webp']
    assert main(words) == main(['sample', '--again', 'one.webp', '--out', 'two.webp']) == 0
    assert capsys.readouterr().err.count('warning') == 0
    assert np.array_equal(read_clip('one.webp').frames, read_clip('two.webp').frames) and read_metadata('one.webp') == read_metadata('two.webp')
    assert main(['sample', '--again', 'one.webp', '--seeds', '8', '--out', 'other.webp']) == 0
    assert read_metadata('other.webp')['recipe'] == read_metadata('one.webp')['recipe'] | dict(seed=8)
    torch.manual_seed(1)
    SnapVideo.from_preset('tiny', tokenizer_json=Path('copy/tokenizer.json').read_text()).save_pretrained('copy', force=True)
    capsys.readouterr()
    assert main(['sample', '--again', 'one.webp', '--out', 'three.webp']) == 0
    told = capsys.readouterr().err
    assert 'copy has other contents now' in told and read_metadata('one.webp')['recipe']['weights'] in told
    assert not np.array_equal(read_clip('one.webp').frames, read_clip('three.webp').frames)


@pytest.mark.parametrize('recipe, says', [(dict(steps='many'), '--steps'), (dict(steps=0), '--steps'), (dict(spice=3), 'spice'), (dict(out='elsewhere', force=True), 'force, out'), (dict(interval=[1]), '--interval'), (dict(caption=''), 'caption is empty'),
                                          (dict(help=True), 'help'), (dict(seed=-1), 'seeds'), (dict(scale='x'), '--scale')], ids=str)
def test_a_file_that_says_nonsense(recipe, says, folder, capsys):
    write_file('x.gif', np.zeros((2, 9, 16, 3), np.uint8), 8., dict(recipe=dict(caption='--help', seed=0) | recipe, made=dict(model='nowhere')))
    refused(capsys, folder, 'sample', '--again', 'x.gif', says=[says])


def test_a_grid_made_again(model, folder):
    assert main(['sample', 'a cat', 'a dog', '--model', str(model), '--steps', '1', '--seeds', '3,5', '--grid', '--out', 'one.gif']) == 0
    assert main(['sample', '--again', 'one.gif', '--out', 'two.gif']) == 0
    assert Path('one.gif').read_bytes() == Path('two.gif').read_bytes()


def test_the_same_command_makes_only_what_is_missing(model, folder, capsys):
    words = sample(model, '--seeds', '0-2', '--out', 'made')
    assert main(words) == 0
    first, second, third = sorted(Path('made').iterdir())
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, third)}
    before = second.read_bytes()
    second.unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert sorted(map(Path, capsys.readouterr().out.splitlines())) == [first, second, third]
    assert second.read_bytes() == before and kept == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}


def test_force_overwrites(model, folder):
    assert main(sample(model, '--out', 'made')) == 0
    file, = Path('made').iterdir()
    before, file_time = file.read_bytes(), file.stat().st_mtime_ns
    assert main(sample(model, '--out', 'made', '--force')) == 0
    assert file.read_bytes() == before and file.stat().st_mtime_ns > file_time


def test_the_upsampler_beside_a_model_is_used(pair, folder):
    "NAME-up beside NAME, unless it is told not to; its file says so, and is made again with it."
    for words, width, steps in (([], 32, 3), (['--up', 'none'], 16, None), (['--up', str(pair) + '-up', '--frames', '6'], 32, 3)):
        assert main(sample(pair, *words, '--up-steps', 3, '--scale', 1, '--out', 'one.webp', '--force')) == 0
        told = read_metadata('one.webp')['recipe']
        assert read_clip('one.webp').frames.shape[2] == width and told.get('up_steps') == steps and ('up_weights' in told) == (width == 32)
        assert main(['sample', '--again', 'one.webp', '--out', 'two.webp', '--force']) == 0
        assert np.array_equal(read_clip('one.webp').frames, read_clip('two.webp').frames)


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


def test_lessons_belong_to_the_recipes_own_world(folder, monkeypatch):
    "On other data nothing is asked that its clips cannot answer, unless one says so."
    asked = []
    monkeypatch.setattr('snapvideo_nb.training.train', lambda config, team: asked.append(config) or Path(config.run))
    for words in ([], ['--data', 'mine'], ['--data', 'shapes', '--reading', '7', '--data-options', 'pairs', 'one or two'], ['--lesson', '0', '--data-options', 'subjects', '4'], ['--lesson-options', 'colours', "['white']"], ['--data', 'mine', '--lesson-noise', '2', '1']):
        assert main(['train', '--preset', 'mini', *words]) == 0
    mini = recipe('mini')
    assert asked[0] == mini and mini.reading and mini.lesson and mini.frozen_text
    assert [(c.reading, c.lesson, c.frozen_text) for c in asked[1:3]] == [(0, 0, False), (7, 0, False)]
    assert [c.data_options for c in asked[1:4]] == [{}, {'pairs': 'one or two'}, {'subjects': 4, 'images': .1}] and asked[3].lesson == 0
    assert asked[5].lesson == 0
    assert asked[4].lesson_options == mini.lesson_options | {'colours': ['white']}


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
    (['sample', 'a cat', '--seeds', 'x'], ['seeds are written like', "'x'"]),
    (['sample', 'a cat', '--seeds', '5-3'], ['5-3']),
    (['sample', 'a cat', '--seeds', '0-99999999'], ['more than a million']),
    (['sample', '--file', 'nowhere.txt'], ['nowhere.txt', 'no such file']),
    (['sample', 'a cat', '--out', 'cat.avi'], ['cat.avi', '.mp4']),
    (['sample', 'a cat', '--out', 'cat.mp4', '--seeds', '0-1'], ['cat.mp4', '2 videos', 'grid']),
    (['sample', 'a cat', '--out', 'cat.mp4', '--format', 'gif'], ['cat.mp4']),
    (['sample', 'a cat', '--format', 'avi'], ["'avi'", 'webp']),
    (['sample', 'a cat', '--solver', 'midpoint'], ['midpoint', 'heun']),
    (['sample', 'a cat', '--interval', '3', '1'], ['interval', 'low < high']),
    (['sample', 'a cat', '--interval', '3'], ['--interval']),
    (['sample', 'a cat', '--threshold', '2'], ['threshold', '2']),
    (['sample', 'a cat', '--oscillate', 'inf'], ['--oscillate']),
    (['sample', 'a cat', '--steady', '-1'], ['--steady']),
    (['sample', 'a cat', '--batch', '-1'], ['--batch']),
    (['sample', 'a cat', '--fps', '-8'], ['--fps']),
    (['sample', 'a cat', '--frames', '-1'], ['--frames']),
    (['sample', 'a cat', '--level', '-1'], ['--level']),
    (['sample', 'a cat', '--weight', '-1'], ['--weight']),
    (['sample', 'a cat', '--weight', 'inf'], ['--weight']),
    (['sample', 'a cat', '--weight', 'much'], ['--weight', "'much'"]),
    (['sample', 'a cat', '--weight', '1,2,3'], ['weight', '1.0, 2.0, 3.0']),
    (['sample', 'a cat', '--rates', '8,12'], ['frame rate', 'whole multiple']),
    (['sample', 'a cat', '--rates', '1,32'], ['no two known frames in a window of 16']),
    (['sample', 'a cat', '--rates', '4,,8'], ['--rates', "'4,,8'"]),
    (['sample', 'a cat', '--rates', '0,8'], ['frame rates are positive']),
    (['sample', 'a cat', '--rates', '4,8', '--fps', '12'], ['last of its rates', '12']),
    (['sample', 'a cat', '--overlap', '-1'], ['--overlap']),
    (['sample', 'a cat', '--overlap', '1.5'], ['--overlap']),
    (['sample', 'a cat', '--overlap', '16'], ['overlap', '15 frames', '16']),
    (['sample', 'a cat', '--up-steps', '0'], ['--up-steps']),
    (['sample', 'a cat', '--up', 'nowhere'], ['nowhere']),
    (['sample', 'a cat', '--continue', 'nowhere.mp4'], ['nowhere.mp4', 'no such file']),
    (['sample', 'a cat', '--image', 'a.png', '--continue', 'a.mp4'], ['--continue', '--image']),
    (['sample', '--again', 'nowhere.mp4'], ['nowhere.mp4', 'no such file']),
    (['sample', 'a cat', '--guidance', 'nan'], ['--guidance', 'nan']),
    (['sample', 'a cat', '--guidance', '-1'], ['--guidance', '-1']),
    (['sample', 'a cat', '--sed', '3'], ['--sed', '--seeds']),
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
    refused(capsys, folder, *sample(model, '--seeds', '0-2', '--out', 'made'), says=[taken, '--force'])


def test_a_file_of_other_settings_is_kept(model, folder, capsys):
    "The line says what is different."
    assert main(sample(model, '--out', 'made')) == 0
    capsys.readouterr()
    refused(capsys, folder, *sample(model, '--out', 'made', '--guidance', 2), says=['made/a-red-apple', 'guidance 0.0', '2.0', '--force'])


def test_files_that_cannot_be_begun_with(model, folder, capsys):
    Path('broken.webp').write_bytes(b'RIFF nothing')
    Path('empty.txt').write_text('# nothing\n')
    write_video('mute.mp4', np.zeros((2, 9, 16, 3), np.uint8), 8)
    refused(capsys, folder, *sample(model, '--continue', 'broken.webp'), says=['broken.webp', 'not a video'])
    refused(capsys, folder, *sample(model, '--image', 'empty.txt'), says=['empty.txt'])
    refused(capsys, folder, *sample(model, '--continue', 'mute.mp4', '--frames', 2), says=['2 frames'])
    refused(capsys, folder, 'sample', '--file', 'empty.txt', says=['empty.txt', 'no caption'])
    refused(capsys, folder, 'sample', '--again', 'mute.mp4', says=['mute.mp4', 'does not say how'])


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
    for part in ('--steps', 'default: 64', '--guidance', 'D_c', '--seeds', '0-63', '--force', '--again', '--continue', 'Frames per second'): assert part in help
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


def interrupt(words, folder, after):
    "Start a real process, send it what Ctrl-C sends when `after(folder)` holds; (exit code, what it said)."
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background is deaf to SIGINT, and so are its children
    with open(folder.parent/'said', 'w+') as said, subprocess.Popen([*COMMAND, *map(str, words)], cwd=folder, stderr=said, stdout=said, preexec_fn=listen) as process:
        deadline = time.monotonic() + 100
        while not after(folder) and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
        said.seek(0)
        return code, said.read()


@pytest.fixture
def place(tmp_path):
    (tmp_path/'place').mkdir()
    return tmp_path/'place'


def test_interrupted_before_anything_is_done(model, place):
    code, told = interrupt(sample(model, '--steps', 100000), place, lambda folder: 'steps/s' in (folder.parent/'said').read_text())
    assert code == 130 and told.endswith('snapvideo: interrupted: 0 of 1 clips are done, and the same command goes on\n') and 'Traceback' not in told
    assert list(place.iterdir()) == []


def test_interrupted_then_continued(model, place):
    "Finished clips stay, whole; the same command makes the others and touches no file that is there."
    words = sample(model, '--seeds', '0-39', '--steps', 20, '--out', 'made', '--scale', 1)
    code, told = interrupt(words, place, lambda folder: len(list((folder/'made').glob('*.mp4'))) >= 2)
    done = {path: path.stat().st_mtime_ns for path in (place/'made').iterdir()}
    assert code == 130 and 2 <= len(done) < 40 and f'{len(done)} of 40 clips are done' in told.splitlines()[-1]
    for path in done: read_metadata(path)
    assert run(*words, folder=place).returncode == 0
    assert len(list((place/'made').iterdir())) == 40 and done == {path: path.stat().st_mtime_ns for path in done}


def launch(words, folder, processes=2):
    "The command under torchrun, as its help says."
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', '-m', 'snapvideo_nb.cli', '--', *map(str, words)],
                          cwd=folder, capture_output=True, text=True, timeout=150, env=os.environ | dict(OMP_NUM_THREADS='1'))


def test_two_processes_share_the_videos(model, tmp_path):
    "Each is written once, the same as by one process; a grid is put together by whoever comes last; what is there is not made again."
    words = sample(model, '--seeds', '0-5', '--format', 'webp', '--scale', 1)
    assert main([*words, '--out', str(tmp_path/'alone')]) == 0
    done = launch([*words, '--out', 'shared'], tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) == len(set(printed)) == 6
    for path in (tmp_path/'alone').iterdir(): assert np.array_equal(read_clip(path).frames, read_clip(tmp_path/'shared'/path.name).frames)
    grid = launch([*words[:-2], '--grid', '--out', 'grids'], tmp_path)
    assert grid.returncode == 0, grid.stderr
    assert [path.name for path in (tmp_path/'grids').iterdir()] == ['a-red-apple-moving-to-the-right-seeds0-5.webp']


def test_a_process_that_dies_leaves_its_videos_for_the_next_call(model, tmp_path):
    "Two processes without a launcher, one of which is killed at once; then one alone makes the rest."
    words = [*COMMAND, *sample(model, '--seeds', '0-5', '--out', 'made')]
    two = [subprocess.Popen(words, cwd=tmp_path, env=os.environ | dict(RANK=str(rank), WORLD_SIZE='2'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for rank in range(2)]
    two[1].kill()
    assert two[0].wait(100) == 0 and two[1].wait(100) != 0
    seeds = lambda: sorted(int(path.stem[-1]) for path in (tmp_path/'made').iterdir())
    assert seeds() == [0, 2, 4]
    assert subprocess.run(words, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=100).returncode == 0
    assert seeds() == [0, 1, 2, 3, 4, 5]


# evaluate

def evaluated(model, folder, *more):
    "The record of an evaluation of the tiny model on shapes, with a network of random weights."
    words = ['evaluate', '--model', str(model), '--real', 'shapes', '--count', '4', '--steps', '1', '--networks', 'random', '--anyway', '--kept', str(folder/'kept'), '--out', str(folder/'record.json'), *more]
    assert main(words) == 0
    return json.loads((folder/'record.json').read_text('utf-8'))


def test_evaluate_prints_a_table_and_stores_the_protocol(model, folder, capsys):
    record = evaluated(model, folder)
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ['figure', 'made', 'real', 'of'] and 'TOO FEW' in said[1] and said[-1] == str(folder/'record.json')
    protocol, found = record['protocol'], record['distances']['random']
    assert protocol['command'].startswith('snapvideo evaluate') and '--anyway' in protocol['command'] and protocol['recipe']['steps'] == 1
    assert (protocol['real'], protocol['real_clips'], protocol['made_clips'], protocol['frames'], protocol['size']) == ('shapes', 8, 4, 4, [9, 16])
    assert (found['count'], found['extractor']['network']) == (4, 'random thin FrameNet') and found['frechet']['floor']['deviation'] > 0 and 'captions' not in record


def test_evaluate_goes_on_where_it_was_stopped(model, folder, monkeypatch):
    "Broken off after two clips; the same command makes the other two, and then the whole costs nothing."
    from snapvideo_nb import distances
    made, real = [], distances.in_batches
    def stops(wishes, *more):
        for k, found in enumerate(real(wishes, *more)):
            if k == 2: raise KeyboardInterrupt
            yield found
    def counts(wishes, *more):
        for found in real(wishes, *more): made.append(found); yield found
    monkeypatch.setattr(distances, 'in_batches', stops)
    words = ['evaluate', '--model', str(model), '--real', 'shapes', '--count', '4', '--steps', '1', '--networks', 'random', '--anyway', '--kept', str(folder/'kept'), '--out', str(folder/'record.json')]
    assert main(words) == 130 and len(list((folder/'kept/clips').iterdir())) == 2 and not (folder/'record.json').exists()
    monkeypatch.setattr(distances, 'in_batches', counts)
    record = evaluated(model, folder)
    assert len(made) == 2
    monkeypatch.setattr(distances.Extractor, '__call__', lambda *_: pytest.fail('features computed again'))
    again = evaluated(model, folder, '--force')
    assert len(made) == 2 and again['distances'] == record['distances'] and again['temporal'] == record['temporal']


def test_evaluate_compares_folders(folder, capsys):
    for name, count, value in (('a', 6, 30), ('b', 3, 200)):
        (folder/name).mkdir()
        for j in range(count): write_video(folder/name/f'{j}.mp4', np.random.default_rng([value, j]).integers(0, value, (5, 16, 24, 3), dtype=np.uint8))
    words = ['evaluate', '--made', 'b', '--real', 'a', '--networks', 'random', '--kept', 'kept', '--out', 'r.json']
    refused(capsys, folder, *words, says=['3 clips are too few'])
    assert main([*words, '--anyway']) == 0
    record = json.loads((folder/'r.json').read_text())
    assert (record['protocol']['frames'], record['protocol']['size'], record['protocol']['pixels']) == (5, [16, 24], 'video files, as decoded')
    assert record['distances']['random']['frechet']['value']['mean'] > record['distances']['random']['frechet']['floor']['mean'] and record['temporal']['made']['change'] > record['temporal']['real']['change']
    capsys.readouterr()
    refused(capsys, folder, *words, '--anyway', says=['r.json exists'])


@pytest.mark.parametrize('words, says', [
    (['--networks', 'vgg'], ['--networks', 'vgg']), (['--precision', 'int8'], ['fp32 or bf16']), (['--count', '1'], ['--count']), (['--draws', '1'], ['--draws']),
    (['--made', 'clips'], ['--real']), (['--count', '100'], ['100 clips are too few', '256']), (['--model', 'nothing'], ['nothing']), (['--real', 'nowhere'], ['nowhere']), (['--solver', 'rk4'], ['--solver'])])
def test_evaluate_refuses_in_one_line(model, folder, capsys, words, says):
    given = [] if '--model' in words or '--made' in words else ['--model', str(model)]
    refused(capsys, folder, 'evaluate', *given, *words, '--kept', 'kept', says=says)
