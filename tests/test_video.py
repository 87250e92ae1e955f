"""Reading, writing and resizing, beyond what the notebook shows: containers, far windows, uneven and turned recordings, damaged files."""
import os, subprocess, sys, threading
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from snapvideo_nb.video import Clip, contact_sheet, probe, read_video, resize, save_image, whole_file, write_video

COUNT, BITS = 160, 8


@pytest.fixture(scope='module')
def counted(tmp_path_factory):
    "A video whose every frame shows its own number in binary, as bars."
    frames = np.zeros((COUNT, 36, 64, 3), np.uint8)
    for i in range(COUNT):
        for bit in range(BITS): frames[i, 4:20, 4 + 6*bit:8 + 6*bit] = 255*((i >> bit) & 1)
    return write_video(tmp_path_factory.mktemp('counted')/'counted.mp4', frames, 24)


def numbers(clip):
    return [sum(int(frame[12, 6 + 6*bit, 0] > 127) << bit for bit in range(BITS)) for frame in clip.frames]


def convert(old, new, *options, before=()):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), '-loglevel', 'error', '-y', *before, '-i', str(old), *options, str(new)], check=True)
    return new


@pytest.mark.parametrize('suffix, codec', [('mp4', 'libx264'), ('mkv', 'libx264'), ('avi', 'mpeg4'), ('webm', 'libvpx')])
def test_any_window_of_any_container(counted, tmp_path, suffix, codec):
    path = convert(counted, tmp_path/f'a.{suffix}', '-c:v', codec, '-g', '20', '-b:v', '2M')
    assert probe(path) == (COUNT, 24., (36, 64))
    for start, stride in ((0, 1), (7, 3), (101, 2), (COUNT - 8, 1)):
        clip = read_video(path, 8, start, stride)
        assert numbers(clip) == [start + stride*k for k in range(8)] and clip.fps == 24/stride


def test_an_uneven_recording_plays_evenly(counted, tmp_path):
    path = convert(counted, tmp_path/'a.mp4', '-vf', "select='not(eq(mod(n,7),3))'", '-fps_mode', 'vfr')
    count, rate, _ = probe(path)
    whole = read_video(path, count)
    shown, true = np.array(numbers(whole)), np.arange(count)*24/rate
    assert np.abs(shown - true).max() <= 2 and numbers(read_video(path, 16, count - 16)) == list(shown[-16:])


def test_a_phone_held_upright(counted, tmp_path):
    turned = convert(counted, tmp_path/'a.mp4', '-c', 'copy', before=('-display_rotation', '90'))
    assert probe(turned)[2] == (64, 36)
    assert np.array_equal(read_video(turned, 3).frames, np.rot90(read_video(counted, 3).frames, 1, (1, 2)))


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'bmp'])
def test_images_have_infinite_rate(tmp_path, suffix):
    picture = np.full((20, 30, 3), 200, np.uint8)
    Image.fromarray(picture).save(tmp_path/f'a.{suffix}')
    assert probe(tmp_path/f'a.{suffix}') == (1, float('inf'), (20, 30))
    clip = read_video((tmp_path/f'a.{suffix}').read_bytes())
    assert clip.fps == float('inf') and np.abs(clip.frames[0].astype(int) - picture).max() < 4


@pytest.mark.parametrize('content', [b'', b'hello', b'\x89PNG\r\n\x1a\n', bytes(range(256))*40], ids=['empty', 'text', 'half a PNG', 'noise'])
def test_what_is_no_video_is_named(tmp_path, content):
    path = tmp_path/'a.mp4'
    path.write_bytes(content)
    for read in (probe, read_video):
        with pytest.raises(ValueError, match='a.mp4: not a video') as caught: read(path)
        assert '\n' not in str(caught.value)


def test_a_cut_file_and_a_missing_one(counted, tmp_path):
    (tmp_path/'half.mp4').write_bytes(counted.read_bytes()[:2000])
    with pytest.raises(ValueError, match='half.mp4'): read_video(tmp_path/'half.mp4')
    with pytest.raises(FileNotFoundError, match='gone.mp4: no such file'): read_video(tmp_path/'gone.mp4')
    with pytest.raises(ValueError, match='too short, 4 of 5 frames from frame 156'): read_video(counted, 5, COUNT - 4)


def test_odd_sizes_stay_what_they_are(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3, 17, 31, 3), np.uint8)
    assert read_video(write_video(tmp_path/'a.mp4', frames, 7.5)).frames.shape == frames.shape
    assert read_video(tmp_path/'a.mp4').fps == 7.5


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    path = save_image(tmp_path/'a.png', np.zeros((4, 4, 3), np.uint8))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match='a.png'): save_image(path, np.ones((4, 4, 3), np.uint8))
    with pytest.raises(RuntimeError), whole_file(path, force=True) as new:
        Path(new).write_bytes(b'half')
        raise RuntimeError
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.png']


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path/'a.bin'
    path.write_bytes(b'old')
    code = ('import os, sys\nfrom snapvideo_nb.video import whole_file\n'
            'with whole_file(sys.argv[1], force=True) as new:\n    new.write_bytes(b"half")\n    os._exit(9)')
    done = subprocess.run([sys.executable, '-c', code, str(path)], env=os.environ | {'PYTHONPATH': str(Path(__file__).parent.parent)})
    assert done.returncode == 9 and path.read_bytes() == b'old'


@pytest.mark.parametrize('h, w', [(36, 64), (37, 61), (9, 200), (5, 7)])
def test_resize_keeps_a_constant_and_the_mean(h, w):
    assert (resize(np.full((2, h, w, 3), 77, np.uint8), 18, 32) == 77).all()
    frame = np.random.default_rng(0).integers(0, 255, (h, w, 3), np.uint8)
    scale = min(h/18, w/32)
    inside = frame[round((h - 18*scale)/2):, round((w - 32*scale)/2):][:round(18*scale), :round(32*scale)]
    assert abs(resize(frame, 18, 32).mean() - inside.mean()) < 8


def test_resize_is_the_mean_of_blocks_when_they_fit():
    frame = np.random.default_rng(0).integers(0, 255, (36, 64, 3), np.uint8)
    assert np.array_equal(resize(frame, 9, 16), frame.reshape(9, 4, 16, 4, 3).mean((1, 3)).round().astype(np.uint8))


def test_clips_say_what_they_want():
    for wrong in (np.zeros((2, 3, 4, 3)), np.zeros((3, 4, 3), np.uint8), np.zeros((0, 3, 4, 3), np.uint8), 'frames'):
        with pytest.raises(ValueError, match='uint8 frames of shape'): Clip(wrong)
    with pytest.raises(ValueError, match='positive'): Clip(np.zeros((2, 3, 4, 3), np.uint8), fps=0)


def test_a_sheet_has_a_row_for_each_clip():
    videos = [np.full((n, 6, 8, 3), 9*n, np.uint8) for n in (1, 5, 9)]
    sheet = contact_sheet(videos, columns=4)
    assert sheet.shape == (3*8 - 2, 4*10 - 2, 3) and [sheet[8*k, 0, 0] for k in range(3)] == [9, 45, 81]
