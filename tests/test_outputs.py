"Wishes, files and what files say about themselves, on real parts: the smallest model, untrained, and every format."
import json, math, random, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from snapvideo_nb.extend import long_video
from snapvideo_nb.model import SnapVideo
from snapvideo_nb.outputs import FORMATS, FirstStage, Job, Order, Parts, Producer, Wish, changed, compose, describe, durations, grid, in_batches, model_digest, parse_seeds, plan, processes, read_clip, read_metadata, spell_seeds, strip, wanted, write_file
from snapvideo_nb.sampling import sample
from snapvideo_nb.text import train_tokenizer

SETTINGS = dict(steps=2, guidance=0., solver='heun')
ABOUT = dict(recipe=dict(caption='ein Frosch, grün \u2192 "rechts" \U0001F438', seed=2**40, fps=8.), made=dict(note='x'*5000))


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "The smallest preset beside an upsampler of its clips, both untrained."
    folder = tmp_path_factory.mktemp('models')/'tiny'
    torch.manual_seed(0)
    base = SnapVideo.from_preset('tiny', tokenizer_json=train_tokenizer(['a cat', 'a dog is still'], 300).to_json())
    base.save_pretrained(folder)
    network = replace(base.config.network, height=18, width=32, group=(4, 6, 4), low_res=True)
    SnapVideo(replace(base.config, network=network, low_res=(9, 16), level=.1), base.text.tokenizer_json).save_pretrained(folder.with_name('tiny-up'))
    return folder


@pytest.fixture
def clip():
    "A clip with a frame that repeats, of an odd size."
    frames = np.random.default_rng(0).integers(0, 256, (6, 9, 15, 3), dtype=np.uint8)
    frames[3] = frames[2]
    return frames


# Seeds and names

def test_seeds_come_back_as_they_were():
    order = random.Random(0)
    for _ in range(200):
        seeds = order.sample(range(30), order.randint(1, 30))
        assert parse_seeds(spell_seeds(seeds)) == seeds
    assert spell_seeds(range(10**5)) == '0-99999' and parse_seeds('9'*18) == [10**18 - 1]


def test_every_file_of_a_plan_is_another():
    captions = ['a cat', 'A cat!', 'a cat 2', 'a-cat', '?', '!', 'very '*50 + 'long', 'very '*50 + 'old', 'ein Frosch, grün', '青蛙']
    files = [file for order in plan(captions, [0, 1], 'out', ['mp4', '.PNG', 'mp4']) for file in order.files]
    assert len(files) == len(set(files)) == 40 and all(file.parent == Path('out') and len(file.name) < 100 for file in files)


def test_a_folder_may_have_a_point_in_its_name(tmp_path):
    assert plan(['a cat'], [0], tmp_path/'v1.2')[0].files == (tmp_path/'v1.2/a-cat-seed0.mp4',)
    (tmp_path/'x.gif').mkdir()
    assert plan(['a cat'], [0], tmp_path/'x.gif')[0].files[0].parent == tmp_path/'x.gif'


# Files

@pytest.mark.parametrize('fps', [8., 24., 29.97])
@pytest.mark.parametrize('ending', FORMATS[:3])
def test_a_clip_comes_back_with_its_time_and_its_words(ending, fps, clip, tmp_path):
    about = ABOUT | dict(recipe=ABOUT['recipe'] | dict(fps=fps))
    path = write_file(tmp_path/f'deep/er/clip{ending}', clip, fps, about)
    back = read_clip(path)
    assert read_metadata(path) == about and back.frames.shape == clip.shape and back.fps == pytest.approx(fps, rel=.001)
    error = np.sqrt(np.mean((back.frames.astype(float) - clip)**2))
    assert error == 0 if ending == '.webp' else error < 30
    assert np.array_equal(back.frames[3], back.frames[2]) or ending == '.mp4'
    assert list(path.parent.iterdir()) == [path]


def test_a_picture_comes_back(tmp_path, clip):
    path = write_file(tmp_path/'sheet.png', clip[0], 8., ABOUT)
    assert read_metadata(path) == ABOUT and np.array_equal(read_clip(path).frames, clip[:1]) and read_clip(path).fps == math.inf


def test_files_of_others_are_read_by_their_clock(tmp_path, clip):
    Image.fromarray(clip[0]).save(tmp_path/'a.gif', save_all=True, append_images=[Image.fromarray(frame) for frame in clip[1:3]], duration=[100, 300, 100])
    assert read_clip(tmp_path/'a.gif').fps == 10 and len(read_clip(tmp_path/'a.gif').frames) == 5
    for fps in (8, 12, 24, 25):
        write_file(tmp_path/'b.gif', np.random.default_rng(1).integers(0, 256, (24, 9, 15, 3), dtype=np.uint8), fps, {}, force=True)
        assert read_clip(tmp_path/'b.gif').fps == pytest.approx(fps, rel=.01) and len(read_clip(tmp_path/'b.gif').frames) == 24


def test_moments_are_never_more_than_half_a_unit_off():
    for fps in (7, 8, 23.976, 24, 30, 60):
        ends = np.cumsum(durations(1000, fps, 10))
        assert np.abs(ends - np.arange(1, 1001)*1000/fps).max() <= 5 + 1e-6


@pytest.mark.parametrize('ending', FORMATS)
@pytest.mark.parametrize('harm', [lambda data: b'', lambda data: data[:len(data)//3], lambda data: b'nothing' + data], ids=['empty', 'cut', 'shifted'])
def test_a_damaged_file_gets_one_line(ending, harm, tmp_path, clip):
    path = write_file(tmp_path/f'x{ending}', clip[0] if ending == '.png' else clip, 8., ABOUT)
    path.write_bytes(harm(path.read_bytes()))
    try: assert read_metadata(path) == ABOUT  # a file that is cut may still hold its words
    except ValueError as error: assert str(error) == f'{path}: does not say how it was made'
    for read in (read_metadata, read_clip):
        with pytest.raises(FileNotFoundError, match='no such file'): read(tmp_path/f'nowhere{ending}')


@pytest.mark.parametrize('text', ['', 'null', '[]', '{}', '{"recipe": 1, "made": 2}', '[' * 100000, 'a nice picture'], ids=range(7))
def test_comments_of_others_are_no_recipe(text, tmp_path, clip):
    Image.fromarray(clip[0]).save(tmp_path/'x.gif', comment=text.encode())
    with pytest.raises(ValueError, match='does not say how it was made'): read_metadata(tmp_path/'x.gif')
    with pytest.raises(FileExistsError, match='does not say how it was made'): wanted(tmp_path/'x.gif', {})
    assert wanted(tmp_path/'x.gif', {}, force=True)


def test_nothing_half_written(tmp_path, clip):
    write_file(tmp_path/'x.gif', clip, 8., ABOUT)
    before = (tmp_path/'x.gif').read_bytes()
    with pytest.raises(FileExistsError): write_file(tmp_path/'x.gif', clip, 8., ABOUT)
    with pytest.raises(Exception): write_file(tmp_path/'x.gif', clip[..., :2], 8., ABOUT, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ['x.gif'] and (tmp_path/'x.gif').read_bytes() == before


# Pictures

def test_a_grid_shows_every_clip_where_it_belongs():
    clips = {f'seed {i}': np.full((2, 5, 70, 3), 10*i, np.uint8) for i in range(3)}
    whole = grid([('title', dict(list(clips.items())[:2])), ('', dict(list(clips.items())[2:]))])
    assert whole.shape == (2, 14 + 2*(14 + 5 + 2), 2*72, 3)
    places = {(28, 0): 0, (28, 72): 10, (49, 0): 20, (49, 72): 255}
    for (y, x), value in places.items(): assert (whole[:, y:y + 5, x:x + 70] == value).all()


def test_words_fit_their_strip():
    for width in (8, 40, 64, 300): assert strip('a very long caption '*10, width).shape == (14, width, 3)
    assert (strip('', 50) == 255).all() and (strip('x', 50) < 255).any()


def test_a_grid_of_many_is_not_wider_than_a_screen_unless_labels_need_it():
    small = np.zeros((1, 9, 16, 3), np.uint8)
    for side, width in ((2, 256), (20, 80), (40, 64)):
        wishes = tuple(Wish('a', i) for i in range(side**2))
        assert compose(Order(wishes, (), True), [small]*len(wishes), '.mp4').shape[2] == side*(width + 2)


# The producer

def counted(producer, captions=('a cat',), seeds=(3,), batch=1):
    "The videos, and the number of steps that were announced."
    ticks = []
    return producer(list(captions), list(seeds), batch, ticks.append), sum(ticks)


def test_it_makes_what_sample_makes(model):
    expected = sample(SnapVideo.from_pretrained(model), ['a cat', 'a dog'], [3, 4], steps=2, guidance=2., negative='a dog', fps=12., solver='churn')
    producer = Producer(SETTINGS | dict(guidance=2., negative='a dog', fps=12., solver='churn'), model)
    assert torch.equal(counted(producer, ['a cat', 'a dog'], [3, 4])[0], expected)
    assert torch.equal(counted(producer, ['a dog'], [4])[0], expected[1:])


def test_the_bar_is_told_the_right_number_of_steps(model, tmp_path, clip):
    write_file(tmp_path/'given.webp', clip, 8., {})
    for options in (dict(), dict(settings=dict(frames=11)), dict(clip=tmp_path/'given.webp'), dict(image=tmp_path/'given.webp'), dict(clip=tmp_path/'given.webp', settings=dict(frames=12)),
                    dict(settings=dict(frames=11, rates=[2., 4., 8.])), dict(clip=tmp_path/'given.webp', settings=dict(frames=12, rates=[4., 8.])), dict(up='auto', settings=dict(up_steps=3)), dict(up='auto', settings=dict(frames=11, up_steps=3))):
        producer = Producer(SETTINGS | options.pop('settings', {}), model, **options)
        videos, steps = counted(producer)
        assert steps == producer.ticks() and videos.shape[2] == producer.first.frames


def test_the_upsampler_gets_the_recipe(model):
    up = Producer(SETTINGS | dict(up_steps=3), model, up='auto')
    assert up.recipe['level'] == .1 and up.recipe['up_steps'] == 3 and up.made['up'] == f'{model}-up'
    assert 'up_steps' not in Producer(SETTINGS | dict(up_steps=3), model, up='none').recipe
    two = counted(up, ['a cat', 'a dog'], [3, 4])[0]
    assert two.shape[2:] == (4, 18, 32) and torch.equal(counted(up, ['a dog'], [4])[0], two[1:])
    assert not torch.equal(counted(Producer(SETTINGS | dict(up_steps=3, level=.5), model, up='auto'))[0], two[:1])


def test_what_is_no_pair_is_refused_before_it_samples(model):
    with pytest.raises(ValueError, match='is an upsampler'): Producer(SETTINGS, f'{model}-up')
    with pytest.raises(ValueError, match='does not enlarge clips of 4x9x16'): Producer(SETTINGS, model, up=str(model))


def test_a_recipe_is_json_and_makes_the_same_video(model, tmp_path):
    settings = SETTINGS | dict(guidance=3., oscillate=1., interval=[.1, 'inf'], threshold=.9)
    producer = Producer(settings, model)
    order = plan(['a cat'], [5], tmp_path)[0]
    told = json.loads(json.dumps(describe(order, producer), allow_nan=False))
    recipe = {name: value for name, value in told['recipe'].items() if name not in ('caption', 'seed', 'scale', 'weights')}
    assert torch.equal(counted(Producer(recipe, told['made']['model']))[0], counted(producer)[0])
    assert changed(told, describe(order, Producer(recipe, model))) == []


def test_a_change_of_the_weights_changes_the_recipe(model, tmp_path):
    shutil.copytree(model, tmp_path/'model')
    order, before = plan(['a cat'], [5], tmp_path)[0], Producer(SETTINGS, tmp_path/'model')
    other = SnapVideo.from_pretrained(model)
    with torch.no_grad(): next(other.network.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path/'model', force=True)
    lines = changed(describe(order, before), describe(order, Producer(SETTINGS, tmp_path/'model')))
    assert len(lines) == 1 and 'model has other contents now' in lines[0]


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_every_file_of_a_model_counts(model, tmp_path, name):
    shutil.copytree(model, tmp_path/'model')
    before = model_digest(tmp_path/'model')
    assert before == model_digest(model) == Producer(SETTINGS, model).recipe['weights']
    (tmp_path/'model'/name).write_bytes((tmp_path/'model'/name).read_bytes() + b' ')
    assert model_digest(tmp_path/'model') != before


def test_an_upsampler_that_is_gone_or_changed_is_named(model, tmp_path):
    for folder in (model, model.with_name('tiny-up')): shutil.copytree(folder, tmp_path/folder.name)
    told = lambda **more: describe(plan(['a cat'], [5], tmp_path)[0], Producer(SETTINGS, tmp_path/'tiny', **more))
    before = told(up='auto')
    assert changed(before, told(up=before['made']['up'])) == []
    assert changed(before, told()) == ['made with an upsampler that is not here now: other frames']
    other = SnapVideo.from_pretrained(tmp_path/'tiny-up')
    with torch.no_grad(): next(other.network.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path/'tiny-up', force=True)
    line, = changed(before, told(up='auto'))
    assert line.startswith(f'{tmp_path}/tiny-up has other contents now')


def test_defaults_are_spelt_out_in_the_recipe(model, tmp_path, clip):
    write_file(tmp_path/'given.webp', clip, 8., {})
    assert Producer(dict(steps=2, guidance=0.), model).recipe | dict(weights='') == dict(steps=2, guidance=0., solver='heun', fps=8., weights='', frames=4, overlap=1, weight=4.)
    assert Producer(SETTINGS, model, image=tmp_path/'given.webp').recipe['weight'] == [8, 4] and Producer(SETTINGS, model, clip=tmp_path/'given.webp').recipe['frames'] == 9
    assert Producer(SETTINGS | dict(oscillate=1.), model).recipe['steady'] == 0


def test_overlap_and_weight_reach_the_video(model):
    for more in (dict(overlap=2), dict(overlap=0), dict(weight=1.)):
        producer = Producer(SETTINGS | dict(frames=7) | more, model)
        videos, steps = counted(producer)
        assert steps == producer.ticks() and torch.equal(videos, long_video(SnapVideo.from_pretrained(model), ['a cat'], [3], 7, steps=2, **more))
    with pytest.raises(ValueError, match='an overlap lies between 0 and 3'): Producer(SETTINGS | dict(overlap=4), model)
    with pytest.raises(ValueError, match='a weight of reconstruction guidance'): Producer(SETTINGS | dict(weight=[1, 2, 3]), model)


def test_rates_reach_the_video_and_its_recipe(model, tmp_path):
    producer = Producer(SETTINGS | dict(frames=7, rates=[6, 12]), model)
    assert producer.fps == producer.recipe['fps'] == 12 and producer.recipe['rates'] == [6, 12]
    assert torch.equal(counted(producer)[0], long_video(SnapVideo.from_pretrained(model), ['a cat'], [3], 7, rates=(6., 12.), steps=2))
    for more, words in ((dict(rates=[6, 12], fps=8.), 'the last of its rates, 12'), (dict(rates=[8, 12]), 'whole multiple'), (dict(rates=[2, 8]), 'no two known frames')):
        with pytest.raises(ValueError, match=words): Producer(SETTINGS | more, model)


def test_a_given_clip_is_taken_at_the_rate_of_the_video(model, tmp_path, clip):
    write_file(tmp_path/'fast.webp', np.concatenate([clip]*2), 24., dict(recipe=dict(fps=24.), made={}))
    producer = Producer(SETTINGS, model, clip=tmp_path/'fast.webp')
    assert producer.first.given.shape[2] == 4 and producer.first.frames == 7
    assert Producer(SETTINGS | dict(fps=24.), model, clip=tmp_path/'fast.webp').first.given.shape[2] == 12
    with pytest.raises(ValueError, match='24 frames per second is too slow for 48'): Producer(SETTINGS | dict(fps=48.), model, clip=tmp_path/'fast.webp')


# The job

def job(model, out, captions=('a cat',), seeds=range(5), formats=('webp',), settings={}, wrap=None, grid=False, **options):
    producer = Producer(SETTINGS | settings, model)
    if wrap: producer.first.__class__ = type('Wrapped', (FirstStage,), dict(__call__=wrap(FirstStage.__call__)))
    return Job(plan(list(captions), list(seeds), out, formats, grid), producer, scale=1, **options)


def stop_after(calls, error):
    "Makes a producer's first stage raise in a later call."
    def wrap(base):
        left = [calls]
        def inner(self, *args):
            if not left[0]: raise error
            left[0] -= 1
            return base(self, *args)
        return inner
    return wrap


def test_every_number_of_processes_and_clips_at_a_time_makes_each_file_once(model, tmp_path):
    alone = {path.name: read_clip(path).frames for path in job(model, tmp_path/'alone').run()}
    for world in (2, 3, 7):
        made = [[path.name for path in job(model, tmp_path/str(world), share=(rank, world)).run()] for rank in range(world)]
        assert sorted(sum(made, [])) == sorted(alone)
    for path in (tmp_path/'3').iterdir(): assert np.array_equal(read_clip(path).frames, alone[path.name])
    assert len(list(job(model, tmp_path/'many', batch=2).run())) == len(list(job(model, tmp_path/'all', batch=0).run())) == 5
    assert read_metadata(tmp_path/'all/a-cat-seed0.webp')['made']['batch'] == 5


def test_only_the_missing_format_is_written(model, tmp_path):
    list(job(model, tmp_path, seeds=[0], formats=['mp4']).run())
    before = (tmp_path/'a-cat-seed0.mp4').stat().st_mtime_ns
    assert len(list(job(model, tmp_path, seeds=[0], formats=['mp4', 'png', 'gif']).run())) == 3
    assert (tmp_path/'a-cat-seed0.mp4').stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 3


def test_stopped_anywhere_it_goes_on_to_the_same_files(model, tmp_path):
    list(job(model, tmp_path/'whole').run())
    for calls in (0, 2, 1):
        with pytest.raises(KeyboardInterrupt, match='of 5 clips are done, and the same command goes on'): list(job(model, tmp_path/'parts', wrap=stop_after(calls, KeyboardInterrupt())).run())
    assert len(list((tmp_path/'parts').iterdir())) == 3
    last = job(model, tmp_path/'parts')
    assert len(last.missing) == 2 and len(list(last.run())) == 5
    for path in (tmp_path/'whole').iterdir(): assert path.read_bytes() == (tmp_path/'parts'/path.name).read_bytes()


def test_a_stopped_grid_keeps_its_clips_and_cleans_up(model, tmp_path):
    whole, = job(model, tmp_path/'whole', grid=True).run()
    with pytest.raises(KeyboardInterrupt): list(job(model, tmp_path/'parts', grid=True, wrap=stop_after(3, KeyboardInterrupt())).run())
    assert [path.name[0] for path in (tmp_path/'parts').iterdir()] == ['.']
    assert len(job(model, tmp_path/'parts', grid=True, settings=dict(steps=3)).missing) == 5  # what another recipe left is not taken
    rest = job(model, tmp_path/'parts', grid=True)
    assert len(rest.missing) == 2
    again, = rest.run()
    assert again.read_bytes() == whole.read_bytes() and [path.name for path in again.parent.iterdir()] == [whole.name]
    assert job(model, tmp_path/'parts', grid=True).missing == []


def test_a_grid_that_only_has_to_be_put_together(model, tmp_path):
    "All its clips are there, as when a process died between the last clip and the grid."
    first = job(model, tmp_path, grid=True)
    order, = first.todo
    for wish, frames, _ in in_batches(list(order.wishes), first.producer): Parts(order, first.producer).keep(wish, frames)
    rest = job(model, tmp_path, grid=True)
    assert rest.missing == [] and list(rest.run()) == list(order.files) and len(list(tmp_path.iterdir())) == 1


def test_memory_that_runs_out_halves_the_batch_and_other_errors_do_not(model, tmp_path):
    asked = []
    def narrow(base):
        def inner(self, captions, seeds, batch, tick):
            asked.append(len(seeds))
            if len(seeds) > 2: raise RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.')
            return base(self, captions, seeds, batch, tick)
        return inner
    assert len(list(job(model, tmp_path, batch=0, wrap=narrow).run())) == 5 and asked == [5, 2, 2, 1]
    with pytest.raises(ValueError, match='out of memory with 4 clips at a time: choose a smaller --batch'): list(job(model, tmp_path/'b', batch=4, wrap=narrow).run())
    with pytest.raises(RuntimeError, match='a fault'): list(job(model, tmp_path/'c', batch=0, wrap=stop_after(0, RuntimeError('a fault'))).run())
    with pytest.raises(FloatingPointError): list(job(model, tmp_path/'d', wrap=stop_after(2, FloatingPointError('diverged'))).run())
    assert len(list((tmp_path/'d').iterdir())) == 2


def test_a_job_of_other_settings_does_not_begin(model, tmp_path):
    list(job(model, tmp_path, seeds=[4]).run())
    with pytest.raises(FileExistsError, match='seed4.webp exists, made with steps 2 and not 3'): job(model, tmp_path, settings=dict(steps=3))
    assert len(list(job(model, tmp_path, settings=dict(steps=3), force=True).run())) == 5
    assert {read_metadata(path)['recipe']['steps'] for path in tmp_path.iterdir()} == {3}


def test_a_launcher_says_who_is_who(monkeypatch):
    monkeypatch.setenv('RANK', '2')
    monkeypatch.setenv('WORLD_SIZE', '5')
    assert processes() == (2, 5)
