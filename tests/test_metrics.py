"""What the metrics notebook cannot hold: other sizes and worlds, kept weights, wrong calls. Uses drawn shapes, so that it needs no files."""
import json

import pytest
import torch

from snapvideo_nb.data import Shapes
from snapvideo_nb.metrics import CaptionJudge, border_noise, name_background, score_captions, subject_mask, track, wilson
from snapvideo_nb.video import collate, to_tensor

NAMES = ['red disc', 'blue square', 'green triangle', 'yellow cross']


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp('judge')
    judge = CaptionJudge(NAMES, 8, 12, 20, folder=folder, scenes=Shapes, clips=300, motion_steps=200, subject_steps=40, shape_steps=10)
    judge.folder = folder
    return judge


@pytest.fixture(scope='module')
def batch():
    scenes = Shapes(8, 12, 20, split='all', seed=3, subjects=NAMES)
    return collate([scenes[j] for j in range(48)])


def test_far_above_chance_on_real_clips(judge, batch):
    scores = judge.accuracy(batch.video, batch.truths)
    assert scores['background']['accuracy'] == 1 and scores['motion']['accuracy'] > .7 and scores['subject']['accuracy'] > .7
    assert scores['background']['count'] == 48 and scores['speed']['count'] == sum(t['speed'] is not None for t in batch.truths)
    assert scores == json.loads(json.dumps(scores)) or json.dumps(scores)
    wrong = judge.accuracy(batch.video, batch.truths[7:] + batch.truths[:7])
    assert wrong['caption']['accuracy'] < .1 and wrong['motion']['accuracy'] < .4


def test_answers_depend_on_the_clip_alone(judge, batch):
    together = judge.say(batch.video)
    assert together[5:6] == judge.say(batch.video[5:6]) and together[::-1] == judge.say(batch.video.flip(0))


def test_weights_are_kept_and_whole(judge, batch):
    before = [p.name for p in judge.folder.iterdir()]
    again = CaptionJudge(NAMES, 8, 12, 20, folder=judge.folder, scenes=Shapes, clips=300, motion_steps=200, subject_steps=40, shape_steps=10)
    assert [p.name for p in judge.folder.iterdir()] == before and len(before) == 1 and before[0].endswith('.safetensors')
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), judge.state_dict().values()))
    assert again.say(batch.video[:4]) == judge.say(batch.video[:4])


def test_training_leaves_the_random_state_alone():
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0); CaptionJudge(NAMES[:2], 4, 12, 20, scenes=Shapes, clips=20, motion_steps=2, subject_steps=2, shape_steps=2)
    assert torch.rand(1).equal(expected)


def test_larger_clips_are_shrunk():
    large = CaptionJudge(NAMES[:2], 4, 72, 128, scenes=Shapes, clips=20, motion_steps=2, subject_steps=2, shape_steps=2)
    clips = [Shapes(4, 72, 128, split='all', seed=1, subjects=NAMES[:2])[j] for j in range(4)]
    assert large.accuracy(clips)['background']['accuracy'] == 1


def test_wrong_calls_are_one_line(judge, batch):
    first = batch.truths[0]
    for video, truths, says in ((batch.video[:, :, :4], batch.truths, 'reads clips of shape'), (batch.video[:2], batch.truths[:1], '2 clips, but 1 truths'),
                                (batch.video[:1], [first | dict(subject='dragon')], 'one moving subject'), (batch.video[:1], [first | dict(background='film')], 'one moving subject'),
                                (batch.video[:1], [first | dict(second=first)], 'one moving subject'), (batch.video[:1], [first | dict(motion=None, speed=None)], 'one moving subject')):
        with pytest.raises(ValueError, match=says) as error: judge.accuracy(video, truths)
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='is not a share'): wilson(3, 2)


@pytest.mark.parametrize('size', [(12, 20), (18, 32), (36, 64), (40, 24)])
def test_background_mask_and_track_at_any_size(size):
    scenes = Shapes(6, *size, split='all', seed=2, subjects=NAMES)
    clips = [scenes.clip(j, motion='right', speed='quickly') for j in range(6)]
    video = torch.stack([to_tensor(clip.frames) for clip in clips])
    named, _ = name_background(video)
    assert named == [tuple(clip.truth['colours']) for clip in clips]
    mask, x = subject_mask(video), track(video)[:, 0]
    assert mask.shape == (6, 6, *size) and 0 <= mask.min() and mask.max() <= 1
    assert (x[:, -1] > x[:, 0]).all() and border_noise(video).max() < .03


def test_nothing_in_the_frame_is_no_crash(judge):
    for video in (torch.zeros(1, 3, 8, 12, 20), torch.randn(1, 3, 8, 12, 20, generator=torch.Generator().manual_seed(0)), torch.full((1, 3, 8, 12, 20), 5.)):
        assert track(video).isfinite().all() and len(judge.say(video)) == 1


def test_intervals_and_counts():
    said = [dict(background=('red',), motion='still', speed=None, subject='a', shape='a')] * 3
    scores = score_captions(said, [said[0] | dict(subject=s) for s in 'aab'], 4)
    assert scores['subject'] == dict(right=2, count=3, accuracy=.6667, interval=[round(p, 4) for p in wilson(2, 3)], chance=.25)
    assert scores['speed']['count'] == 0 and scores['speed']['interval'] == [0, 1]
