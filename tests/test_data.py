"""The made worlds stay what they are for ever, and a folder of files gives up nothing silently."""
import csv, pickle, warnings, zlib

import numpy as np
import pytest

from snapvideo_nb.data import (COLOURS, MINI_SUBJECTS, MOTIONS, SPEEDS, Emoji, Folder, Shapes, describe, held_out, open_data, travel)
from snapvideo_nb.video import save_image, write_video


def checksums(clips, numbers):
    return [zlib.crc32(clips[j].frames.tobytes() + clips[j].caption.encode()) for j in numbers]


def test_the_clips_that_models_were_trained_on_never_change():
    "A checksum of pixels and captions: when this fails, a trained model and its measured figures no longer belong to this data."
    assert checksums(Emoji(subjects=16, images=.1), (0, 1, 7, 1000, 123456)) == [161975391, 3677891639, 1141272675, 2050702736, 735163078]
    assert checksums(Emoji(), (0, 5)) == [1985974177, 1681293587]
    assert checksums(Emoji(8, 36, 64, split='held_out', seed=3, pairs='one or two', stride=(1, 2)), (0, 5)) == [96759796, 2484128113]
    assert checksums(Shapes(), (0, 5)) == [1841703681, 4242179910]


def test_clip_j_is_the_same_whoever_asks_and_in_whatever_order():
    one, other = Shapes(6, images=.2, pairs='one or two'), pickle.loads(pickle.dumps(Shapes(6, images=.2, pairs='one or two').program(9)))
    [one[j] for j in (3, 1, 2)]
    assert one.program(9) == other
    for i in range(6): assert np.array_equal(one.frame(9, i), Shapes(6, images=.2, pairs='one or two')[9].frames[i])


def test_held_out_pairs():
    emoji = Emoji(split='all')
    count = [sum(held_out(s, m) for m in MOTIONS) for s in emoji.subjects]
    assert len(emoji.subjects) == 187 and set(count) == {1, 2}
    for split in ('train', 'held_out'):
        for j in range(300):
            program = Shapes(split=split).program(j)
            assert held_out(program['subject'], program['motion']) == (split == 'held_out')


@pytest.mark.parametrize('motion', MOTIONS)
@pytest.mark.parametrize('speed', SPEEDS)
def test_every_motion_moves_as_it_says(motion, speed):
    x, y, scale = travel(motion, speed, np.linspace(-1, 1, 16), .3)
    for word, line, sign in (('left', x, -1), ('right', x, 1), ('up', y, -1), ('down', y, 1), ('in', np.log(scale), 1), ('out', np.log(scale), -1)):
        if word in motion.split(): assert (sign*np.diff(line) > 0).all()
    assert (motion == 'still') == (np.ptp(x) + np.ptp(y) + np.ptp(scale) == 0)


def test_boxes_hold_the_subject():
    for j in range(20):
        clip = Shapes(backgrounds=('plain',))[j]
        behind = np.array(COLOURS[clip.truth['colours'][0]])
        for frame, (x0, y0, x1, y1) in zip(clip.frames, clip.truth['boxes']):
            rows, columns = np.nonzero(np.abs(frame.astype(int) - behind).max(-1) > 20)
            if not len(rows): continue
            assert x0*32 - 1.5 <= columns.min() and columns.max() + 1 <= x1*32 + 1.5 and y0*18 - 1.5 <= rows.min() and rows.max() + 1 <= y1*18 + 1.5


def test_a_caption_names_what_the_program_does():
    for j in range(100):
        truth = Shapes(pairs='one or two', split='all').program(j)
        words = describe(truth)
        assert truth['subject'] in words and truth['subject'] in truth['caption'] and all(c in truth['caption'] for c in truth['colours'])


@pytest.mark.parametrize('options, line', [(dict(split='test'), "'test' is none of train"), (dict(motions=['fly']), "'fly' is none of left"),
                                           (dict(subjects=['unicorn']), "'unicorn'"), (dict(subjects=['red disc'], motions=['left'], split='held_out'), 'no .* pair'),
                                           (dict(wings=2), "no option 'wings'"), (dict(seed=-1), 'seed at least 0'), (dict(stride=0), 'at least 1'), (dict(images=2), 'from 0 to 1')])
def test_what_the_shapes_cannot_do(options, line):
    with pytest.raises(ValueError, match=line): open_data('shapes', **options)


def test_the_small_set_exists():
    assert len(MINI_SUBJECTS) == 16 and Emoji(subjects=16).subjects == list(MINI_SUBJECTS)
    with pytest.raises(ValueError, match='no emoji called'): Emoji(subjects=['a thing'])


@pytest.fixture
def folder(tmp_path):
    "Good and bad files, and a table that knows some of them."
    home, clips = tmp_path/'my [odd] clips', Shapes(50, 36, 64)
    (home/'more').mkdir(parents=True)
    for j in range(3): write_video(home/f'good{j}.mp4', clips[j].frames, 24)
    write_video(home/'test_short.mp4', clips[3].frames[:9], 24)
    write_video(home/'more'/'square.mp4', Shapes(20, 48, 48)[5].frames, 8)
    write_video(home/'unlisted.mp4', clips[4].frames[:16], 24)
    save_image(home/'still.png', clips[6].frames[0])
    (home/'broken.mp4').write_bytes((home/'good0.mp4').read_bytes()[:900])
    (home/'.hidden.mp4').write_bytes(b'')
    return home


def table(folder, rows):
    with open(folder/'metadata.csv', 'w', newline='') as file: csv.writer(file).writerows([('file_name', 'caption', 'n'), *((*row, 1) for row in rows)])


ROWS = [('good0.mp4', 'a red disc'), ('good1.mp4', ''), ('good2.mp4', 'two\nlines'), ('test_short.mp4', 'x'), ('more/square.mp4', 'sq'),
        ('broken.mp4', 'b'), ('still.png', 'a still'), ('gone.mp4', 'g')]


def test_every_file_that_is_not_used_is_named(folder):
    table(folder, ROWS)
    with pytest.warns(UserWarning) as caught: clips = Folder(folder, 16, 18, 32)
    assert [str(w.message) for w in caught if w.category is UserWarning] == clips.notes
    lines = [n.replace(str(folder), '.') for n in clips.notes]
    assert lines == ['./good1.mp4: no caption; used without', './test_short.mp4: too short, 9 of 16 frames; left out',
                     './more/square.mp4: 48x48 pixels; cropped to the shape of 18x32', './broken.mp4: not a video that can be read (InvalidDataError); left out',
                     './gone.mp4: no such file; left out', './unlisted.mp4: no row in the metadata; left out', '.: 11 clips from 5 of 9 files; 4 left out, 2 remarks on the others']
    assert clips.captions == ['a red disc']*3 + ['']*3 + ['two lines']*3 + ['sq', 'a still'] == [c.caption for c in clips]
    assert {c.frames.shape for c in clips} == {(16, 18, 32, 3)} and [c.fps for c in clips][-2:] == [8, float('inf')] and clips[9].size == (48, 48)


@pytest.mark.filterwarnings('ignore')
def test_a_folder_without_a_table(folder):
    clips = Folder(folder, 16, 18, 32)
    assert len(clips) == 12 and set(clips.captions) == {''} and 'no captions' in clips.notes[-2]


@pytest.mark.filterwarnings('ignore')
def test_strides_and_windows_follow_from_the_file_alone(folder):
    table(folder, ROWS)
    clips = Folder(folder, 16, 18, 32, stride=(1, 2, 3))
    assert {c.fps for c in clips} >= {24., 12.} and clips.items == Folder(folder, 16, 18, 32, stride=(1, 2, 3)).items
    for (k, start, stride), (other, following, _) in zip(clips.items, clips.items[1:]): assert k != other or following == start + 16*stride
    one = Folder(folder, 16, 18, 32, windows='one')
    assert [k for k, *_ in one.items] == [0, 1, 2, 4, 6] and any(start for _, start, _ in one.items)
    table(folder, ROWS[1:])
    assert one.items[1:] == [(k + 1, *rest) for k, *rest in Folder(folder, 16, 18, 32, windows='one').items]


@pytest.mark.filterwarnings('ignore')
def test_a_file_that_breaks_later_has_a_stand_in(folder):
    table(folder, ROWS)
    clips = Folder(folder, 16, 18, 32)
    (folder/'good0.mp4').write_bytes(b'no more')
    with pytest.warns(UserWarning, match='good0.mp4: .*; the next clip stands in'): assert clips[0].caption == clips[3].caption
    with pytest.raises(IndexError, match='no clip 11'): clips[11]
    assert len(pickle.loads(pickle.dumps(clips))[5].frames) == 16


@pytest.mark.filterwarnings('ignore')
def test_parquet_of_paths_and_of_bytes(folder, tmp_path):
    datasets = pytest.importorskip('datasets')
    files = [str(folder/'good0.mp4'), str(folder/'good1.mp4')]
    (tmp_path/'paths').mkdir(), (tmp_path/'bytes').mkdir()
    datasets.Dataset.from_dict(dict(video=files, caption=['a', 'b'])).to_parquet(tmp_path/'paths'/'x.parquet')
    datasets.Dataset.from_dict(dict(picture=[(folder/'still.png').read_bytes()]*2, label=[1, 0]), datasets.Features(
        picture=datasets.Value('binary'), label=datasets.ClassLabel(names=['cat', 'dog']))).to_parquet(tmp_path/'bytes'/'x.parquet')
    datasets.Dataset.from_dict(dict(video=files, text=['a', 'b'])).save_to_disk(tmp_path/'saved')
    assert Folder(tmp_path/'paths').captions == Folder(tmp_path/'saved').captions == list('aaabbb')
    pictures = Folder(tmp_path/'bytes', video='picture')
    assert pictures.captions == ['dog', 'cat'] == [c.caption for c in pictures] and pictures[0].fps == float('inf')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('options, line', [(dict(caption='words'), "no column 'words'"), (dict(windows='some'), "windows must be"), (dict(stride=0), 'at least 1'),
                                           (dict(video='caption'), 'no clip of 16 frames'), (dict(video='n'), "column 'n' holds no videos"), (dict(wings=2), "no option 'wings'")])
def test_what_a_folder_cannot_do(folder, options, line):
    table(folder, ROWS)
    with pytest.raises(ValueError, match=line) as caught: open_data(str(folder), **options)
    assert '\n' not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path):
    for name in ('nothing', './nothing', '/no/such/folder'):
        with pytest.raises(FileNotFoundError, match='no such folder, file or data set'): open_data(name)
    with pytest.raises(ValueError, match='no video, image, parquet or metadata file'): open_data(str(tmp_path))
    (tmp_path/'metadata.csv').write_text('name,words\na.mp4,b\n')
    with pytest.raises(ValueError, match='file_name'): open_data(str(tmp_path))


def test_a_film_behind_the_subject():
    film = Shapes(16, 18, 32, seed=5)
    clips = Shapes(backgrounds=('film',), film=[film[j] for j in range(4)], images=.3, subjects=['red disc'])
    for j in range(6):
        clip = clips[j]
        corners = clip.frames[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        behind = film[int(clip.truth['film']*4)].frames[np.arange(16) if clip.fps < float('inf') else np.zeros(16, int)][:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert 'film scene' in clip.caption and (corners == behind).all(-1).mean() > .4
        assert np.array_equal(clips.frame(j, 7), clip.frames[7])
    with pytest.raises(ValueError, match='a film background needs clips'): Shapes().clip(0, background='film')
    assert checksums(Shapes(film=film), (0, 5)) == [1841703681, 4242179910]
