"Longer videos: frames that stay, gradients that are right, plans that cover, bits that do not depend on company, rates that are told, clear errors."
import json, math, random
from pathlib import Path

import numpy as np, pytest, torch

from snapvideo_nb.extend import (Known, animate, at_rate, complete, continue_clip, fill_between, fitted, frame_change, long_video, sample_known, segment_seed, stages,
                                 upsample_windows, weight_for, windows)
from snapvideo_nb.guidance import Guidance, GuidedBatch
from snapvideo_nb.model import SnapVideo
from snapvideo_nb.sampling import sample, seeded_noise
from snapvideo_nb.solvers import SOLVERS, Denoise, State, noise_levels, solve
from snapvideo_nb.text import train_tokenizer
from snapvideo_nb.video import Clip, image_clip, to_tensor

CAPTIONS = ['a red apple moves left', 'a snail moves right', 'a red apple stays still']
HALF = torch.tensor([True, True, False, False])


@pytest.fixture(scope='module')
def model():
    "The tiny preset (four frames) with a self-conditioning gate that is open."
    torch.manual_seed(0)
    model = SnapVideo.from_preset('tiny', tokenizer_json=train_tokenizer(CAPTIONS, 300).to_json())
    with torch.no_grad(): model.network.gate.weight.normal_(0, .5)
    return model.eval()


@pytest.fixture(scope='module')
def clips(model): return torch.rand(3, *model.shape, generator=torch.Generator().manual_seed(1))*2 - 1


@pytest.fixture(scope='module')
def eleven(model): return long_video(model, CAPTIONS, [5, 6, 7], frames=11, steps=2, guidance=1.)


# Frames that are known

@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('weight', [0., 3.])
def test_known_frames_arrive(model, clips, solver, weight):
    made = sample_known(model, CAPTIONS, [1, 2, 3], clips, HALF, weight, steps=3, solver=solver)
    torch.testing.assert_close(made[:, :, HALF], clips[:, :, HALF], atol=1e-5, rtol=0)
    assert made.shape == clips.shape and not made.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('guidance', [0., Guidance(2., threshold=.9)], ids=['unguided', 'guided'])
def test_the_gradient_is_that_of_the_estimate_that_a_solver_hears(model, clips, guidance):
    "Against a finite difference along the correction, latents of an earlier evaluation included."
    batch, x = GuidedBatch(model, CAPTIONS[:1], guidance), seeded_noise([3], model.shape)
    state = State(None, batch(x, 2.)[1])
    told = {w: Known(clips[:1], HALF, model.framework.sigma_in, w)(batch)(x, 1., state)[0].double() for w in (0., 2.)}
    gradient = (told[0.] - told[2.])*model.framework.sigma_in
    assert not gradient[:, :, HALF].any() and gradient[:, :, ~HALF].any()
    missed = lambda x: (clips[:1] - batch(x, 1., state)[0])[:, :, HALF].double().square().sum()
    step = .02*gradient/gradient.norm()
    torch.testing.assert_close((missed(x + step) - missed(x - step))/.04, gradient.norm(), rtol=.02, atol=0)


def test_latents_go_on_without_a_graph(model, clips):
    denoised, latents = Known(clips[:1], HALF, 1., 2.)(GuidedBatch(model, CAPTIONS[:1], 1.))(seeded_noise([3], model.shape), 1.)
    assert not denoised.requires_grad and not latents.requires_grad and latents.shape[0] == 2


def test_guidance_brings_gaussian_frames_nearer_to_their_exact_conditional():
    "Two frames of correlation .9: x_b given x_a is N(.9 x_a, .19). Replacement alone is far off, a weight of 2 near; both as exact linear maps."
    S, sigma_in = torch.tensor([[1., .9], [.9, 1.]]).double(), 2.
    def denoiser(x, sigma, state): return sigma_in*torch.einsum('ts,bcshw->bcthw', S @ torch.linalg.inv(S + (sigma_in*sigma)**2*torch.eye(2)), x), None
    def law(weight):
        frames, noise = torch.zeros(3, 1, 2, 1, 1).double(), torch.zeros(3, 1, 2, 1, 1).double()
        frames[0, 0, 0], noise[1, 0, 0], noise[2, 0, 1] = 1, 1, 1
        known = Known(frames, torch.tensor([True, False]), sigma_in, weight)
        gain, *spread = (sigma_in*solve(Denoise(known(denoiser), sigma_in), 80*noise, noise_levels(48)))[:, 0, 1, 0, 0].tolist()
        return gain, sum(s*s for s in spread)
    (gain, variance), (gain_2, variance_2) = law(0.), law(2.)
    assert gain < .7 and variance > .4 and abs(gain_2 - .9) < .5*abs(gain - .9) and abs(variance_2 - .19) < .5*abs(variance - .19)


def test_known_says_what_does_not_fit(clips):
    with pytest.raises(ValueError, match='each of 4 frames'): Known(clips, torch.ones(3, dtype=torch.bool), 1.)
    for weight in (-1., float('nan'), float('inf')):
        with pytest.raises(ValueError, match='from 0 on'): Known(clips, HALF, 1., weight)


# Plans

def test_windows_cover_every_missing_frame_once_and_in_order():
    choose = random.Random(0)
    for _ in range(300):
        length = choose.randint(1, 8)
        known, overlap = [choose.random() < choose.random() for _ in range(choose.randint(1, 40))], choose.randrange(length)
        made = []
        for w in windows(known, length, overlap):
            assert 0 <= w.start <= w.first < w.stop <= min(w.start + length, len(known))
            if not any(known[w.first:]): assert w.first - w.start == min(overlap, w.first)
            made += [i for i in range(w.first, w.stop) if not known[i]]
        assert made == [i for i, k in enumerate(known) if not k]


def test_a_frame_between_known_ones_is_made_by_a_window_that_sees_both():
    "Whatever the overlap, as long as a window can hold both."
    for length in (4, 9, 16):
        for ratio in range(2, length):
            known = [i % ratio == 0 for i in range(12*ratio + 1)]
            for overlap in range(length):
                for start, first, stop in windows(known, length, overlap):
                    for i in range(first, stop): assert start <= i//ratio*ratio and -(-i//ratio)*ratio < start + length


def test_any_gap_that_fits_into_a_window_is_seen_with_both_its_ends():
    choose = random.Random(1)
    for _ in range(300):
        length = choose.randint(2, 9)
        known, overlap = [choose.random() < .3 for _ in range(40)], choose.randrange(length)
        for start, first, stop in windows(known, length, overlap):
            for i in (i for i in range(first, stop) if not known[i]):
                before, after = max((k for k in range(i) if known[k]), default=None), min((k for k in range(i, 40) if known[k]), default=None)
                if before is not None and after is not None and after - before < length: assert start <= before and after < start + length
                if before is None and after is not None and after < length: assert after < start + length


# Long videos

def test_a_long_video_begins_with_the_clip_of_sample(model, eleven):
    assert eleven.shape == (3, 3, 11, 9, 16) and eleven.abs().max() <= 1
    assert torch.equal(eleven[:, :, :4], sample(model, CAPTIONS, [5, 6, 7], steps=2, guidance=1.))
    assert torch.equal(long_video(model, CAPTIONS, [5, 6, 7], frames=3, steps=2, guidance=1.), eleven[:, :, :3])


def test_more_frames_leave_the_first_ones_alone(model, eleven):
    for frames in (5, 8): assert torch.equal(long_video(model, CAPTIONS, [5, 6, 7], frames=frames, steps=2, guidance=1.), eleven[:, :, :frames])


@pytest.mark.parametrize('rows', [[1], [2, 0], [2, 1, 0]], ids=str)
def test_a_clip_has_the_same_bits_in_any_company(model, eleven, rows):
    some = long_video(model, [CAPTIONS[i] for i in rows], [5 + i for i in rows], frames=11, steps=2, guidance=1.)
    assert torch.equal(some, eleven[rows])


def test_settings_of_each_clip_find_their_clip(model):
    each = dict(negative=['', CAPTIONS[0], ''], size=[(9, 16), (36, 64), (720, 1280)])
    three = long_video(model, CAPTIONS, frames=6, steps=1, guidance=1., **each)
    for i in range(3):
        assert torch.equal(long_video(model, CAPTIONS[i:i + 1], [i], frames=6, steps=1, guidance=1., **{k: v[i] for k, v in each.items()}), three[i:i + 1])
    torch.testing.assert_close(long_video(model, CAPTIONS, frames=6, steps=1, guidance=1., micro_batch=2, **each), three, atol=1e-3, rtol=0)


def test_every_window_has_noise_of_its_own(model):
    started = []
    long_video(model, CAPTIONS[:1], [9], frames=7, overlap=1, steps=1, weight=0., callback=lambda step, sigma, x, *_: started.append(x.clone()))
    seeds = [9, segment_seed(9, 0, 1)]
    assert len(started) == 2 and all(torch.equal(x, 80*seeded_noise([s], model.shape)) for x, s in zip(started, seeds))
    assert len({segment_seed(s, j, k) for s in (-1, 0, 1, 2**40) for j in range(3) for k in range(30)}) == 4*3*30


def test_each_rate_is_told_and_given_frames_come_back(model, eleven, monkeypatch):
    told, plain = [], SnapVideo.conditions
    monkeypatch.setattr(SnapVideo, 'conditions', lambda self, captions, fps=None, **more: told.append(float(fps[0])) or plain(self, captions, fps=fps, **more))
    refined = long_video(model, CAPTIONS, [5, 6, 7], frames=9, given=eleven[:, :, :3], rates=(2., 4., 8.), steps=1)
    assert sorted(set(told)) == [2., 4., 8.] and told == sorted(told)
    assert refined.shape[2] == 9 and torch.equal(refined[:, :, :3], eleven[:, :, :3])
    told.clear(); long_video(model, CAPTIONS[:1], frames=5, steps=1)
    assert set(told) == {8.}


def test_no_frame_between_rates_is_made_without_sight_of_the_next_known_one():
    for frames in range(2, 60):
        for rates in ((4., 8.), (2., 4., 8.), (1., 3.), (1., 7., 14.)):
            *_, last = plan = stages(frames, rates, length=16)
            assert plan[-1].stride == 1 and frames <= len(last.known) and all(stage.known[0] and stage.known[-1] for stage in plan[1:])
            assert all((len(low.known) - 1)*low.stride == (len(last.known) - 1) for low in plan)


def test_rates_that_are_not_exact_are_whole_multiples_still(model):
    assert [stage.stride for stage in stages(20, (8, 23.976))] == [3, 1] and [stage.stride for stage in stages(20, (29.97/9, 29.97/3, 29.97))] == [9, 3, 1]
    assert long_video(model, CAPTIONS[:1], frames=4, rates=(7.999, 24.), steps=1).shape[2] == 4


def test_what_a_low_rate_made_stays_at_the_higher_one(model):
    low = long_video(model, CAPTIONS[:1], [4], frames=4, rates=(4.,), steps=2)
    assert torch.equal(long_video(model, CAPTIONS[:1], [4], frames=7, rates=(4., 8.), steps=2)[:, :, ::2], low)


def test_completed_videos_keep_what_was_known(model):
    known = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 0, 0]).bool()
    frames = torch.rand(3, 3, 10, 9, 16, generator=torch.Generator().manual_seed(2))*2 - 1
    before = frames.clone()
    made = complete(model, CAPTIONS, frames, known, steps=1)
    assert torch.equal(made[:, :, known], frames[:, :, known]) and torch.equal(frames, before)
    assert torch.equal(complete(model, CAPTIONS, frames, known | True), frames)


# Wishes

def test_clips_continue_pictures_move_gaps_close(model, clips):
    pictures = [np.full((40, 30, 3), 10*i, np.uint8) for i in range(3)]
    moving = animate(model, CAPTIONS, pictures, steps=1)
    assert moving.shape == clips.shape and torch.equal(moving[:, :, :1], fitted(model, pictures))
    longer = continue_clip(model, CAPTIONS, clips, steps=1)
    assert longer.shape[2] == 7 and torch.equal(longer[:, :, :4], clips)
    assert continue_clip(model, CAPTIONS, clips, frames=12, overlap=2, steps=1).shape[2] == 12
    for factor in (2, 3):
        filled = fill_between(model, CAPTIONS, clips, factor=factor, steps=1)
        assert filled.shape[2] == 3*factor + 1 and torch.equal(filled[:, :, ::factor], clips)


def test_a_wide_overlap_does_not_hide_the_next_known_frame(model, clips):
    "Factor 3 in windows of 4: with any overlap each window holds two known frames."
    for overlap in range(4):
        seen = []
        filled = fill_between(model, CAPTIONS[:1], clips[:1], factor=3, overlap=overlap, steps=1, weight=0., callback=lambda *_: seen.append(1))
        assert torch.equal(filled[:, :, ::3], clips[:1]) and len(seen) == 3


def test_a_single_picture_pulls_harder_than_what_was_made_of_it(model):
    "A pair of weights: the first for the window with one known frame, the second for the next."
    picture, told = [np.full((9, 16, 3), 200, np.uint8)], dict(seeds=[3], steps=2)
    both = animate(model, CAPTIONS[:1], picture, frames=7, overlap=2, **told)
    assert torch.equal(both, animate(model, CAPTIONS[:1], picture, frames=7, overlap=2, weight=[8., 4.], **told))
    eight = animate(model, CAPTIONS[:1], picture, frames=7, overlap=2, weight=8., **told)
    assert torch.equal(both[:, :, :4], eight[:, :, :4]) and not torch.equal(both, eight)


def test_a_clip_is_taken_at_the_rate_that_it_goes_on_with(model):
    frames = np.random.default_rng(0).integers(0, 256, (12, 9, 16, 3), dtype=np.uint8)
    film, third = Clip(frames, fps=24.), to_tensor(frames[::3])[None]
    assert torch.equal(continue_clip(model, CAPTIONS[:1], [film], frames=6, steps=1)[:, :, :4], third)
    assert torch.equal(continue_clip(model, CAPTIONS[:1], [film], frames=14, rates=(24.,), steps=1)[:, :, :12], to_tensor(frames)[None])
    assert torch.equal(animate(model, CAPTIONS[:1], [image_clip(frames[0], 3)], steps=1)[:, :, :1], third[:, :, :1])
    for clip, rate, every in ((film, 16., 3), (Clip(frames[::3], fps=8.), None, 1)):
        made = fill_between(model, CAPTIONS[:1], [clip], rate=rate, steps=1)
        assert made.shape[2] == 7 and torch.equal(made[:, :, ::2], third)
    with pytest.raises(ValueError, match='24 frames per second is too slow for 30'): continue_clip(model, CAPTIONS[:1], [film], rates=(30.,), steps=1)


def test_a_filled_clip_is_told_its_own_rate(model, monkeypatch):
    told, plain = [], SnapVideo.conditions
    monkeypatch.setattr(SnapVideo, 'conditions', lambda self, captions, fps=None, **more: told.append(float(fps[0])) or plain(self, captions, fps=fps, **more))
    frames = np.zeros((3, 9, 16, 3), np.uint8)
    for clips, options, rate in (([Clip(frames, fps=6.)], {}, 12.), ([frames], {}, 8.), ([frames], dict(rate=5.), 5.)):
        told.clear(); fill_between(model, CAPTIONS[:1], clips, steps=1, **options)
        assert set(told) == {rate}


def test_moments_of_a_clip():
    clip = Clip(np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(3, -1), fps=30.)
    for fps in (1., 7.5, 8., 10., 29., 30.):
        taken = at_rate(clip, fps)[:, 0, 0, 0].astype(int)
        assert (np.abs(taken - np.arange(len(taken))*30/fps) < 1).all() and taken[-1] + 30/fps >= 100 - 1e-6 and len(set(taken)) == len(taken)


def test_given_frames_of_any_size_are_fitted(model):
    frames = np.random.default_rng(0).integers(0, 256, (5, 90, 170, 3), dtype=np.uint8)
    assert fitted(model, [frames]).shape == (1, 3, 5, 9, 16) and torch.equal(fitted(model, [Clip(frames, fps=8.)], 8.), fitted(model, [frames]))
    for wrong, words in (([frames, frames[:2]], 'same number'), ([frames/255.], 'uint8'), ([frames[..., 0]], 'uint8'), ([], 'at least one')):
        with pytest.raises(ValueError, match=words): fitted(model, wrong)


@pytest.mark.parametrize('wrong, words', [
    (dict(prompts='a snail'), 'at least one caption'), (dict(prompts=[]), 'at least one caption'), (dict(seeds=[1]), 'as many seeds'), (dict(overlap=4), 'overlap'), (dict(overlap=-1), 'overlap'),
    (dict(frames=0), 'nothing to make'), (dict(given=torch.zeros(3, 3, 9, 9, 16)), 'nothing to make'), (dict(given=torch.zeros(2, 3, 2, 9, 16)), 'shape'), (dict(given=torch.zeros(3, 3, 2, 18, 32)), 'shape'),
    (dict(rates=(8., 12.)), 'whole multiple'), (dict(rates=(8., 4.)), 'whole multiple'), (dict(rates=(8., 8.)), 'whole multiple'), (dict(rates=(0., 8.)), 'whole multiple'), (dict(steps=0), 'step'),
    (dict(rates=(float('nan'), 8.)), 'positive'), (dict(rates=(2., 8.)), 'no two known frames in a window of 4'),
    (dict(weight=-1.), 'weight'), (dict(weight=float('nan')), 'weight'), (dict(weight=(8., -1.)), 'weight'), (dict(weight=(1., 2., 3.)), 'weight'),
    (dict(given=torch.full((3, 3, 2, 9, 16), float('nan'))), 'from -1 to 1'), (dict(given=torch.full((3, 3, 2, 9, 16), 255.)), 'from -1 to 1'),
    (dict(given=torch.cat([torch.zeros(3, 3, 1, 9, 16), torch.full((3, 3, 1, 9, 16), float('inf'))], 2), rates=(4., 8.)), 'from -1 to 1'), (dict(micro_batch=0), 'micro-batch'), (dict(negative=['a', 'b']), 'negative')], ids=lambda v: str(list(v)[0]) if isinstance(v, dict) else '')
def test_errors_are_one_line(model, wrong, words):
    "Before anything is sampled, also where one window would do."
    for frames in {wrong.get('frames', 9), wrong.get('frames', 4)}:
        if frames == 4 and 'given' in wrong and wrong['given'].shape[2] >= 4: continue
        with pytest.raises(ValueError, match=words) as caught: long_video(model, **dict(prompts=CAPTIONS, steps=1) | wrong | dict(frames=frames), callback=lambda *_: pytest.fail('it began to sample'))
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('wrong, words', [(dict(known=[True]*3), 'each of 4 frames'), (dict(known=[[True]*4]), 'each of 4 frames'), (dict(weight=float('nan')), 'weight'), (dict(frames=torch.full((3, 3, 4, 9, 16), float('nan'))), 'from -1 to 1')],
                         ids=['short', 'nested', 'weight', 'nan'])
def test_completing_says_what_does_not_fit(model, clips, wrong, words):
    with pytest.raises(ValueError, match=words): complete(model, CAPTIONS, **dict(frames=clips, known=HALF, steps=1) | wrong, callback=lambda *_: pytest.fail('it began to sample'))


def test_what_is_not_known_may_be_anything(model, clips):
    "Also not a number."
    frames = torch.where(HALF[:, None, None], clips, math.nan)
    assert torch.equal(complete(model, CAPTIONS, frames, HALF, steps=1), complete(model, CAPTIONS, clips, HALF, steps=1))


def test_filling_needs_something_to_fill(model, clips):
    for wrong in (dict(factor=1), dict(factor=4), dict(clips=clips[:, :, :1])):
        with pytest.raises(ValueError): fill_between(model, CAPTIONS, **dict(clips=clips, steps=1) | wrong)


# Windows of an upsampler

def test_windows_of_an_upsampler():
    video, seen = torch.rand(2, 3, 13, 2, 3), []
    def twice(videos, prompts, seeds):
        seen.append((videos.clone(), prompts, seeds)); return videos.repeat_interleave(2, -1)
    for overlap in (0, 1, 3):
        seen.clear()
        torch.testing.assert_close(upsample_windows(twice, video, CAPTIONS[:2], [1, 2], 4, overlap), video.repeat_interleave(2, -1))
        assert all(v.shape[2] == 4 and p == CAPTIONS[:2] for v, p, _ in seen) and seen[0][2] == [1, 2] and len({s for _, _, pair in seen for s in pair}) == 2*len(seen)
    short = upsample_windows(twice, video[:, :, :2], CAPTIONS[:2], [1, 2], 4)
    assert torch.equal(short, video[:, :, :2].repeat_interleave(2, -1)) and torch.equal(seen[-1][0][:, :, 2], video[:, :, 1])
    with pytest.raises(ValueError, match='overlap'): upsample_windows(twice, video, CAPTIONS[:2], [1, 2], 4, 4)


def test_windows_fade_into_each_other():
    shades = iter((0., 1.))
    faded = upsample_windows(lambda v, p, s: v*0 + next(shades), torch.rand(1, 3, 6, 1, 1), ['a'], [0], 4, 2)
    torch.testing.assert_close(faded[0, 0, :, 0, 0], torch.tensor([0, 0, 1/3, 2/3, 1, 1]))


def test_frame_change_is_a_root_mean_square():
    video = torch.zeros(1, 3, 3, 2, 2); video[:, :, 1] = .5
    assert torch.equal(frame_change(video), torch.full((1, 2), .5))


# Records

@pytest.mark.parametrize('name', ['seams', 'weight'])
def test_a_record_says_of_which_weights_it_is(name):
    protocol = json.loads(Path(__file__).parent.parent.joinpath(f'data/results/extend/{name}.json').read_text())['protocol']
    assert len(bytes.fromhex(protocol['weights'])) == 8 and protocol.keys() >= {'model', 'seeds', 'steps', 'solver', 'torch', 'commit', 'seconds'}
