"""Streams on real shards: numbers counted over processes and workers, exact continuation, broken and hostile files, killed workers."""
import io, itertools, json, multiprocessing, os, pickle, signal, tarfile, threading, warnings
from collections import deque
from dataclasses import replace
from pathlib import Path

import datasets, numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from snapvideo_nb.data import Shapes
from snapvideo_nb.streams import Lane, ShardClips, Stream, TarShards, clip_file, open_shards, open_stream, share, tar_rows, write_shards
from snapvideo_nb.video import image_clip

SHAPE = (4, 8, 12)


class Plain:
    "Clips so plain that they cost nothing: each is its number as a caption and a shade."
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, j):
        clip = Shapes(*SHAPE)[0]
        return replace(clip, frames=np.full_like(clip.frames, j % 256), caption=str(j), truth=None)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    "42 clips in 7 shards."
    folder = tmp_path_factory.mktemp('shards')/'plain'
    write_shards(Plain(42), folder, per_shard=6, seed=3)
    return folder


def feed(stream, processes, steps, batch, workers=0, position=None):
    "The captions of every step as numbers [step, row], with the processes' notes put together: (numbers, states at every step, lines)."
    numbers, states, bad = [], [], []
    for parts in zip(*[list(stream.portions(rows, steps, batch, workers, position)) for rows in processes]):
        assert [len(part) for part, _ in parts] == [len(rows) for rows in processes]
        numbers.append([int(caption.split(':')[0]) for part, _ in parts for caption in part.captions])
        states.append({row: state for _, note in parts for row, state in note['position'].items()})
        bad += [line for _, note in parts for line in note['bad']]
    return np.array(numbers), states, bad


def tar(path, examples, cut=None):
    with tarfile.open(path, 'w') as archive:
        for key, fields in examples.items():
            for field, data in fields.items():
                member = tarfile.TarInfo(f'{key}.{field}')
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    if cut: path.write_bytes(path.read_bytes()[:cut])
    return path


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "The bytes of a good video, and of one that is too short."
    folder, clip = tmp_path_factory.mktemp('film'), Shapes(*SHAPE)[0]
    return clip_file(clip, folder), clip_file(replace(clip, frames=clip.frames[:2]), folder)


def halves(batch, world): return [range(rank*batch//world, (rank + 1)*batch//world) for rank in range(world)]


def test_every_clip_once_an_epoch_and_the_same_order_for_any_processes_and_workers(shards):
    stream, steps, batch = Stream(shards, *SHAPE), range(25), 4
    alone, states, bad = feed(stream, [range(batch)], steps, batch)
    epochs = np.array([[state[str(p)]['epoch'] for p in range(batch)] for state in states])
    assert not bad and epochs[-1].min() == 2
    for epoch in (0, 1): assert sorted(alone[epochs == epoch]) == list(range(42))
    assert [list(alone[epochs[:, p] == 0, p]) for p in range(batch)] != [list(alone[epochs[:, p] == 1, p]) for p in range(batch)]
    for world, workers in ((1, 1), (1, 2), (2, 1), (3, 0), (2, 2)):
        numbers, others, _ = feed(stream, halves(batch, world), steps, batch, workers)
        assert np.array_equal(numbers, alone) and others == states, (world, workers)
    assert not np.array_equal(feed(Stream(shards, *SHAPE, seed=1), [range(batch)], range(5), batch)[0], alone[:5])


@pytest.mark.parametrize('batch', [1, 4, 7, 16, 30])
def test_lanes_share_out_an_epoch_whatever_the_batch(shards, batch):
    clips, seen = ShardClips(open_shards(shards), SHAPE), []
    for lane in range(batch):
        found = ((int(clip.caption), state['epoch']) for clip, state, _ in Lane(clips, lane, batch))
        seen += [number for number, _ in itertools.takewhile(lambda item: item[1] == 0, found)]
    assert sorted(seen) == list(range(42))


def test_left_over_shards_are_shared_evenly():
    for total, lanes in itertools.product((5, 16, 37), (1, 3, 16, 40)):
        sizes = [sum(len(range(first, 60, step)) for _, first, step in share(list(range(total)), lane, lanes)) for lane in range(lanes)]
        assert sum(sizes) == 60*total and max(sizes) - min(sizes) <= 60


def test_it_goes_on_in_the_middle_of_an_epoch_on_other_processes_and_workers(shards):
    stream, batch = Stream(shards, *SHAPE), 4
    whole, states, _ = feed(stream, [range(batch)], range(25), batch)
    for stop, before, after in ((7, (1, 0), (2, 1)), (11, (2, 2), (1, 1)), (17, (1, 2), (3, 0))):
        first, seen, _ = feed(stream, halves(batch, before[0]), range(stop), batch, before[1])
        position = json.loads(json.dumps(seen[-1]))
        rest, then, _ = feed(Stream(str(shards), *SHAPE), halves(batch, after[0]), range(stop, 25), batch, after[1], position)
        assert np.array_equal(np.concatenate([first, rest]), whole) and then[-1] == states[-1]


def test_a_position_of_another_source_or_batch_is_refused(shards, tmp_path):
    stream = Stream(shards, *SHAPE)
    position = feed(stream, [range(6)], range(3), 6)[1][-1]
    with pytest.raises(ValueError, match='no row 6'): stream.portions(range(8), range(3, 6), 8, position=position)
    with pytest.raises(ValueError, match='say where the lanes stood'): stream.portions(range(6), range(3, 6), 6)
    write_shards(Plain(66), tmp_path/'other', per_shard=7)
    for workers in (0, 1):
        with pytest.raises(ValueError, match='which is not there in this source') as caught: next(Stream(tmp_path/'other', *SHAPE).portions(range(6), range(3, 6), 6, workers, position))
        assert '\n' not in str(caught.value)


def test_pixels_captions_and_sizes_survive_the_shards_and_stills_stay_stills(tmp_path):
    world = Shapes(8, 18, 32)
    clips = [replace(world[0], size=(360, 640)), image_clip(world[1].frames[0], 8, 'a still')]
    write_shards(clips, tmp_path/'two', seed=1)
    found = {part.captions[0]: part for part, _ in Stream(tmp_path/'two', 8, 18, 32).portions(range(1), range(2), 1)}
    film, still = found[clips[0].caption], found['a still']
    assert film.fps.item() == 8 and film.size.tolist() == [[360, 640]] and still.fps.item() == float('inf') and still.size.tolist() == [[18, 32]]
    pixels = (found['a still'].video[0].movedim(0, -1) + 1)*127.5
    assert np.array_equal(pixels.round().numpy().astype(np.uint8), clips[1].frames)
    assert np.abs((film.video[0].movedim(0, -1).numpy() + 1)*127.5 - clips[0].frames).mean() < 4


def test_strides_and_windows_change_with_the_epoch_alone(tmp_path):
    world = Shapes(16, 18, 32, motions=['right'])
    write_shards([world[0]], tmp_path/'one')
    stream = Stream(tmp_path/'one', 4, 18, 32, stride=(1, 2))
    run = lambda: [part for part, _ in stream.portions(range(1), range(12), 1)]
    one, two = run(), run()
    assert {part.fps.item() for part in one} == {8., 4.} and len({part.video.numpy().tobytes() for part in one}) > 4
    assert all((a.video == b.video).all() for a, b in zip(one, two))


def test_corrupt_short_and_missing_clips_are_skipped_and_named(tmp_path, film):
    good, short = film
    examples = {f'{j:02d}': dict(mp4=good, txt=str(j).encode()) for j in range(12)}
    examples['02'] |= dict(mp4=good[:200])
    examples['03'] |= dict(mp4=short)
    examples['05'] = dict(txt=b'5')
    examples['06'] |= dict(json=b'{"caption": "6"')
    examples['07'] |= dict(txt=b'\xff\xfe\xff')
    examples['08'] |= dict(mp4=b'')
    tar(tmp_path/'a.tar', examples)
    for workers in (0, 2):
        numbers, states, bad = feed(Stream(tmp_path/'a.tar', *SHAPE), [range(2)], range(3), 2, workers)
        assert sorted(numbers.ravel()) == [0, 1, 4, 9, 10, 11]
        assert sorted(line.split(':')[0] for line in bad) == [f'a.tar/0{j}' for j in (2, 3, 5, 6, 7, 8)] and not any('\n' in line for line in bad)
    assert any('too short, 2 of 4 frames' in line for line in bad)
    rest, _, _ = feed(Stream(tmp_path/'a.tar', *SHAPE), [range(2)], range(1, 3), 2, position=feed(Stream(tmp_path/'a.tar', *SHAPE), [range(2)], range(1), 2)[1][-1])
    assert sorted(rest.ravel().tolist() + [0, 1]) == [0, 1, 4, 9, 10, 11]


def test_rows_of_a_table_without_a_video_are_skipped_and_named(tmp_path, film):
    videos = [dict(bytes=film[0], path=None), dict(bytes=None, path=str(tmp_path/'gone.mp4')), None, dict(bytes=b'', path=''), dict(bytes=film[0], path='x.mp4')]
    pq.write_table(pa.table(dict(video=pa.array(videos, pa.struct(dict(bytes=pa.binary(), path=pa.string()))), caption=list('01234'))), tmp_path/'a.parquet')
    numbers, _, bad = feed(Stream(tmp_path, *SHAPE), [range(1)], range(2), 1)
    assert numbers.ravel().tolist() == [0, 4] and [line.split(':')[0] for line in bad] == ['a.parquet/1', 'a.parquet/2', 'a.parquet/3']
    assert 'no such file' in bad[0]


def test_damaged_and_missing_shards_are_named_and_the_others_go_on(tmp_path, film):
    examples = {f'{j:02d}': dict(mp4=film[0], txt=str(j).encode()) for j in range(6)}
    size = tar(tmp_path/'a.tar', examples).stat().st_size
    data = bytearray((tmp_path/'a.tar').read_bytes())
    tar(tmp_path/'b.tar', {f'1{key}': fields | dict(txt=b'1' + fields['txt']) for key, fields in examples.items()})
    (tmp_path/'cut.tar').write_bytes(data[:size//3])
    header = data.index(b'04.mp4')
    data[header:header + 40] = bytes(range(40))
    (tmp_path/'a.tar').write_bytes(data)
    with tarfile.open(tmp_path/'a.tar') as archive: assert len(archive.getnames()) == 8  # what tarfile makes of it, without a word
    stream = Stream(tmp_path, *SHAPE)
    numbers, states, bad = feed(stream, [range(1)], range(13), 1)
    assert {10, 11, 12, 13, 14, 15, 0, 1, 2, 3} <= set(numbers.ravel()) and not {4, 5} & set(numbers.ravel())
    assert any(line.startswith('a.tar/4: cannot be read from here on') for line in bad) and any(line.startswith('cut.tar/') for line in bad)
    (tmp_path/'b.tar').unlink()
    assert any('b.tar/0: cannot be read' in line for line in feed(stream, [range(1)], range(8), 1)[2])


def test_a_damaged_table_is_named_and_the_others_go_on(tmp_path):
    paths = write_shards(Plain(12), tmp_path/'s', per_shard=6)
    stream = Stream(tmp_path/'s', *SHAPE)
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    numbers, _, bad = feed(stream, [range(1)], range(12), 1)
    assert len(set(numbers.ravel())) == 6 and any(line.startswith(f'{paths[0].name}/0: cannot be read') for line in bad)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_source_without_a_usable_clip_ends_with_one_line(tmp_path, film, workers):
    tar(tmp_path/'a.tar', {f'{j:02d}': dict(mp4=b'no video') for j in range(8)})
    with pytest.raises(ValueError, match='no clip for row 0 of 2 in a whole epoch: 4 cannot be used, the last is a.tar/06') as caught:
        next(Stream(tmp_path, *SHAPE).portions(range(2), range(4), 2, workers))
    assert '\n' not in str(caught.value)
    tar(tmp_path/'a.tar', {f'{j:04d}': dict(txt=b'') for j in range(1500)} | {'z': dict(mp4=film[0])})
    with pytest.raises(ValueError, match='in 1000 examples'): next(Stream(tmp_path, *SHAPE).portions(range(1), range(4), 1, workers))


def test_a_killed_worker_ends_the_stream_at_once(shards):
    "The kill comes while the stream is being read: torch raises its error wherever the main thread is at that moment, and between two portions that would be here."
    others = set(multiprocessing.active_children())
    portions = Stream(shards, *SHAPE).portions(range(6), range(10**9), 6, workers=2)
    next(portions)
    worker = next(child for child in multiprocessing.active_children() if child not in others)
    threading.Timer(.5, os.kill, (worker.pid, signal.SIGKILL)).start()
    with pytest.raises(ChildProcessError, match='was killed') as caught: deque(portions, maxlen=0)
    assert '\n' not in str(caught.value)


class Crime:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('by', ['own reader', 'datasets'])
def test_a_hostile_pickle_in_an_archive_runs_no_code(tmp_path, film, by):
    "The second reader is that of archives on the hub: `datasets` decodes some members, and where it cannot the rest of the shard is lost, and named."
    crime = tmp_path/'crime'
    evil = pickle.dumps(Crime(crime))
    pickle.loads(evil)
    crime.rmdir()
    kinds = ('pkl', 'pickle', 'pyd', 'pth', 'pt', 'npy', 'npz') if by == 'own reader' else ('pkl', 'pickle', 'pyd', 'pt')
    path = tar(tmp_path/'a.tar', {f'{j:02d}': dict(mp4=film[0], txt=str(j).encode()) | {kind: evil for kind in kinds} for j in range(4)})
    source = path if by == 'own reader' else datasets.load_dataset('webdataset', data_files=dict(train=str(path)), split='train', streaming=True)
    assert sorted(feed(Stream(source, *SHAPE), [range(2)], range(2), 2, workers=1)[0].ravel()) == [0, 1, 2, 3]
    tar(tmp_path/'b.tar', {'00': dict(mp4=evil, txt=b'0'), '01': dict(mp4=film[0], txt=evil, json=evil)})
    with pytest.raises(ValueError): next(Stream(tmp_path/'b.tar', *SHAPE).portions(range(1), range(1), 1))
    for kind in ('pth', 'npy'):
        path = tar(tmp_path/f'{kind}.tar', {'00': dict(mp4=film[0], txt=b'0', **{kind: evil})})
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: next(Stream(datasets.load_dataset('webdataset', data_files=dict(train=str(path)), split='train', streaming=True), *SHAPE).portions(range(1), range(1), 1))
            except Exception: pass
    assert not crime.exists()


def test_a_hostile_pickle_in_a_table_runs_no_code(tmp_path, film):
    evil = pickle.dumps(Crime(tmp_path/'crime'))
    table = pa.table(dict(video=[evil, film[0]], caption=['0', '1'], extra=[evil, evil]))
    pq.write_table(table.replace_schema_metadata({b'huggingface': evil, b'pandas': evil, b'ARROW:extension:metadata': evil}), tmp_path/'a.parquet')
    try: assert feed(Stream(tmp_path, *SHAPE), [range(1)], range(1), 1)[0].tolist() == [[1]]
    except ValueError as error: assert 'cannot be streamed' in str(error)
    pq.write_table(table, tmp_path/'a.parquet')
    assert feed(Stream(tmp_path, *SHAPE), [range(1)], range(1), 1)[0].tolist() == [[1]]
    assert not (tmp_path/'crime').exists()


def test_any_table_of_datasets_can_be_a_stream(tmp_path, shards, film):
    table = datasets.load_dataset('parquet', data_files=dict(train=sorted(map(str, shards.glob('*.parquet')))), split='train', streaming=True)
    same = [feed(stream, [range(3)], range(8), 3, workers=1)[0] for stream in (Stream(table, *SHAPE), Stream(shards, *SHAPE))]
    assert np.array_equal(*same)
    (tmp_path/'clip.mp4').write_bytes(film[0])
    rows = lambda where: ({'file_name': f'file://{tmp_path}/clip.mp4', 'label': k} for k in where)
    features = datasets.Features(dict(file_name=datasets.Value('string'), label=datasets.ClassLabel(names=['cat', 'dog'])))
    table = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs=dict(where=[0, 1]))
    assert table.num_shards == 2 and Stream(table, *SHAPE).captions(5) == ['cat', 'dog']
    assert sorted(next(Stream(table, *SHAPE).portions(range(2), range(1), 2))[0].captions) == ['cat', 'dog']


def test_captions_and_columns(tmp_path, film):
    tar(tmp_path/'a.tar', {'00': {'left.mp4': film[0], 'right.mp4': film[1], 'json': json.dumps(dict(title='a title', words=['some  words', 'others'])).encode()}, '01': dict(mp4=film[0], txt=b'a video'), '02': dict(txt=b'no video')})
    stream = Stream(tmp_path, *SHAPE)
    assert stream.captions(9) == ['a title', 'a video'] and stream.captions(1) == ['a title']
    assert next(Stream(tmp_path, *SHAPE, caption='words').portions(range(1), range(1), 1))[0].captions == ['some words']
    with pytest.raises(ValueError, match='3 cannot be used'): next(Stream(tmp_path, *SHAPE, video='right.mp4').portions(range(1), range(1), 1))


def test_refusals_take_one_line(tmp_path, shards):
    (tmp_path/'empty').mkdir()
    for make, words in ((lambda: Stream(tmp_path/'nowhere'), 'no such folder of shards'), (lambda: Stream(tmp_path/'empty'), 'no .parquet or .tar shard'),
                        (lambda: Stream(shards, caption='words'), "no column 'words'"), (lambda: Stream(shards, video='film'), "no column 'film'"),
                        (lambda: Stream(shards, stride=0), 'at least 1'), (lambda: open_stream(shards, windows='all'), "no option 'windows'"),
                        (lambda: write_shards(Plain(4), shards), 'has files already'), (lambda: write_shards(Plain(4), tmp_path/'x', per_shard=0), 'at least 1')):
        with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as caught: make()
        assert words in str(caught.value) and '\n' not in str(caught.value)


def test_shards_are_written_whole_or_not_at_all(tmp_path):
    class Failing(Plain):
        def __getitem__(self, j):
            if j == 5: raise RuntimeError('the power went')
            return super().__getitem__(j)
    with pytest.raises(RuntimeError): write_shards(Failing(8), tmp_path/'s', per_shard=2)
    assert not list(tmp_path.iterdir())
    paths = write_shards(Plain(8), tmp_path/'s', per_shard=2)
    with pytest.raises(RuntimeError): write_shards(Failing(8), tmp_path/'s', per_shard=2, force=True)
    assert sorted(tmp_path.glob('s/*')) == paths and len(list(tmp_path.iterdir())) == 1
    (tmp_path/'s'/'notes.txt').touch()
    with pytest.raises(FileExistsError, match='notes.txt'): write_shards(Plain(4), tmp_path/'s', force=True)
    (tmp_path/'s'/'notes.txt').unlink()
    assert len(write_shards(Plain(4), tmp_path/'s', per_shard=2, force=True)) == len(list((tmp_path/'s').iterdir())) == 2


def test_a_tar_is_read_from_any_row_in_any_step(tmp_path):
    path = tar(tmp_path/'a.tar', {f'{j}': dict(txt=str(j).encode(), pkl=b'x') for j in range(10)})
    assert [int(row['txt']) for row in tar_rows(path, 3, 4)] == [3, 7] and 'pkl' not in next(tar_rows(path))
    assert TarShards([path]).names == ['a.tar']


def test_a_json_field_names_no_file_to_open(tmp_path, film):
    (tmp_path/'good.mp4').write_bytes(film[0])
    for value in (str(tmp_path/'good.mp4'), f'file://{tmp_path}/good.mp4'):
        tar(tmp_path/'a.tar', {'00': dict(txt=b'0', json=json.dumps({'mp4': value, 'video': value}).encode())})
        with pytest.raises(ValueError, match='no video in it'): next(Stream(tmp_path, *SHAPE).portions(range(1), range(1), 1))
