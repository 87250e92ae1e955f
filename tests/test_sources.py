"""The committed sets are whole and agree with their tables; the builders work on packages made here, without a download."""
import csv, io, json, os, tarfile, zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from snapvideo_nb import sources
from snapvideo_nb.data import data_folder
from snapvideo_nb.sources import build_emoji, build_film, fetch, film_frames, film_shots, find_cuts, frame_change
from snapvideo_nb.video import read_video, write_video

results = Path(__file__).parent.parent/'data/results/sources'


def test_the_emoji_set_is_whole():
    folder = data_folder('emoji')
    table = json.loads((folder/'subjects.json').read_text('utf-8'))
    slugs = [row['slug'] for row in table]
    assert len(table) >= 180 and slugs == sorted(set(slugs)) and len({row['hexcode'] for row in table}) == len(table)
    assert all(set(row) == {'name', 'slug', 'hexcode', 'package', 'loop_seconds'} and row['loop_seconds'] > .5 for row in table)
    assert {p.name for p in folder.iterdir()} == {f'{s}.webp' for s in slugs} | {'subjects.json', 'LICENSE.txt', 'NOTICE.txt'}
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 10e6
    for row in table:
        image = Image.open(folder/f'{row["slug"]}.webp')
        assert (image.size, image.n_frames, image.mode) == ((72, 72), 16, 'RGBA')


def test_sprites_move_and_have_transparent_corners():
    for slug in ('penguin', 'horse', 'tornado', 'octopus'):
        image, frames = Image.open(data_folder('emoji')/f'{slug}.webp'), []
        for k in range(16): image.seek(k); frames.append(np.asarray(image.convert('RGBA'), float))
        alpha = np.stack(frames)[..., 3]
        assert alpha.max() == 255 and alpha[:, 0, 0].max() == 0, slug
        assert np.abs(np.diff(alpha, axis=0)).mean() > .1, slug


def test_the_film_set_is_whole():
    folder = data_folder('film')
    with open(folder/'metadata.csv', newline='', encoding='utf-8') as file: rows = list(csv.DictReader(file))
    assert len(rows) >= 100 and len({r['caption'] for r in rows}) == len(rows)
    assert {p.name for p in folder.iterdir()} == {r['file_name'] for r in rows} | {'metadata.csv', 'NOTICE.txt'}
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 10e6
    assert [(r['caption'], int(r['start_frame']), int(r['frames'])) for r in rows] == [(s['caption'], s['start_frame'], s['frames']) for s in film_shots()]
    assert all(int(r['frames']) >= 32 and float(r['fps']) == 24 and len(r['caption'].split()) >= 5 for r in rows)
    for r in rows[::6]:
        clip = read_video(folder/r['file_name'])
        assert clip.frames.shape == (int(r['frames']), 36, 64, 3) and clip.fps == 24
    notice = (folder/'NOTICE.txt').read_text()
    assert 'Blender Foundation' in notice and 'www.bigbuckbunny.org' in notice and 'creativecommons.org/licenses/by/3.0' in notice


def test_no_shot_holds_a_cut_and_none_overlap():
    shots = film_shots()
    assert all(a['start_frame'] + a['frames'] <= b['start_frame'] for a, b in zip(shots, shots[1:]))
    cuts = json.loads((results/'film_cuts_by_hand.json').read_text())['result']['cuts']
    assert len(cuts) == len(set(cuts)) == 126
    assert [c for c in cuts for s in shots if s['start_frame'] < c < s['start_frame'] + s['frames']] == []


def test_the_committed_clips_hold_no_cut_of_their_own():
    folder = data_folder('film')
    for k in range(0, len(film_shots()), 8):
        assert find_cuts(frame_change(read_video(folder/f'shot-{k:03d}.mp4').frames)) == [], k


@pytest.mark.parametrize('change, cuts', [([], []), ([0], []), ([0, 0, 0], []), ([0, 1, 1, 50, 1, 1, 1], [3]), ([0, 1, 1, 50, 1, 1], []), ([0, 1, 1, 50, 50, 1, 1, 1], []),
                                          ([0, 1, 1, 50, 1, 50, 1, 1, 1], []), ([0, 1, 1, 50, 1, 1, 1, 60, 1, 1, 1], [3, 7])])
def test_what_counts_as_a_cut(change, cuts):
    assert find_cuts(change) == cuts


@pytest.fixture
def package(tmp_path, monkeypatch):
    def pack(name, files):
        monkeypatch.setitem(sources.SOURCES, name, replace(sources.SOURCES[name], sha256=''))
        with tarfile.open(tmp_path/sources.SOURCES[name].file, 'w:gz') as archive:
            for path, data in files.items():
                info = tarfile.TarInfo(path); info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return tmp_path
    return pack


def moving(frames=20):
    images = [Image.new('RGBA', (64, 64)) for _ in range(frames)]
    for i, image in enumerate(images): image.paste((30, 90, 200, 255), (10 + i, 20, 20 + i, 40))
    data = io.BytesIO()
    images[0].save(data, 'webp', save_all=True, append_images=images[1:], duration=50, loop=0, lossless=True)
    return data.getvalue()


def test_an_emoji_set_from_packages(package):
    still = io.BytesIO(); Image.new('RGBA', (64, 64), 'red').save(still, 'webp')
    package('emoji names', {'package/en/compact.json': json.dumps([dict(hexcode=h, label=n) for h, n in (('1F422', 'turtle'), ('1F44B-FE0F', 'waving hand'), ('1F680', 'rocket'))]).encode()})
    package('emoji 1', {'package/assets/1f44b-fe0f.webp': moving(), 'package/assets/1f44b-1f3fb.webp': moving(), 'package/assets/1f680.webp': still.getvalue(), 'package/assets/ffff.webp': moving()})
    folder = package('emoji 3', {'package/assets/1f422.webp': moving(30), 'package/assets/1f44b.webp': moving()})
    rows = build_emoji(folder/'out', folder, size=24, frames=8, packages=(3, 1))
    assert [(r['slug'], r['package'], r['loop_seconds']) for r in rows] == [('turtle', 3, 1.5), ('waving-hand', 1, 1.)]
    assert rows == json.loads((folder/'out/subjects.json').read_text())
    assert {p.name for p in (folder/'out').iterdir()} == {'turtle.webp', 'waving-hand.webp', 'subjects.json', 'LICENSE.txt', 'NOTICE.txt'}
    with pytest.raises(FileExistsError, match='holds a set already'): build_emoji(folder/'out', folder)
    with pytest.raises(ValueError, match='numbered 1 to 4'): build_emoji(folder/'new', folder, packages=(1, 7))
    assert not (folder/'new').exists()


@pytest.mark.parametrize('height, width', [(36, 64), (18, 32), (72, 128)])
def test_a_film_set_from_a_package(package, tmp_path, monkeypatch, height, width):
    brightness = np.arange(80)*3
    write_video(tmp_path/'bbb.mp4', np.uint8(brightness)[:, None, None, None] + np.zeros((1, 72, 128, 3), np.uint8))
    with zipfile.ZipFile(inner := io.BytesIO(), 'w') as archive: archive.write(tmp_path/'bbb.mp4', 'moviepy_10_minutes/resources/bbb.mp4')
    folder = package('film', {'moviepy-2.2.1/docs/moviepy_10_minutes.zip': inner.getvalue()})
    assert len(list(film_frames(height, width, folder, 10, 25))) == 15
    monkeypatch.setattr(sources, 'film_shots', lambda: [dict(start_frame=5, frames=32, caption='it gets lighter'), dict(start_frame=40, frames=36, caption='it gets lighter, still')])
    rows = build_film(folder/'out', folder, height, width)
    assert [(r['file_name'], r['start_frame'], r['frames']) for r in rows] == [('shot-000.mp4', 5, 32), ('shot-001.mp4', 40, 36)]
    for r in rows:
        frames = read_video(folder/'out'/r['file_name']).frames
        assert frames.shape == (r['frames'], height, width, 3)
        assert np.abs(frames.mean((1, 2, 3)) - brightness[r['start_frame']:][:r['frames']]).max() < 4
    with pytest.raises(FileExistsError, match='holds a set already'): build_film(folder/'out', folder)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(FileNotFoundError, match='no npm here to fetch @lobehub/fluent-emoji-anim-2@1.0.0: install npm, or put the file there'): fetch('emoji 2', tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_fails_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path/'npm'; npm.write_text('#!/bin/sh\necho "no such package" >&2\nexit 1\n'); npm.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}/bin:/usr/bin')
    with pytest.raises(FileNotFoundError, match='failed: no such package'): fetch('emoji names', tmp_path/'new')


def test_another_file_is_refused(tmp_path):
    (tmp_path/sources.SOURCES['film'].file).write_bytes(b'something else')
    with pytest.raises(ValueError, match='is not the pinned moviepy==2.2.1'): fetch('film', tmp_path)
