"""The ablations: every condition of every study runs, records are read back and not made twice, and verdicts say what the figures say."""
import json, math
from dataclasses import asdict

import pytest, torch

from snapvideo_nb import ablations, theory
from snapvideo_nb.ablations import CLAIMS, CPU_PART, SETTINGS, STUDIES, Claim, Member, members, read_records, run, summary, verdict
from snapvideo_nb.cli import main
from snapvideo_nb.data import Emoji
from snapvideo_nb.diffusion import NoiseDistribution, ScaledEDM, input_scale
from snapvideo_nb.metrics import CaptionJudge
from snapvideo_nb.scaling import build
from snapvideo_nb.solvers import noise_levels
from snapvideo_nb.video import collate

ALL = [(study, name) for study, conditions in STUDIES.items() for name in conditions]


def member(folder, study='diffusion', name='v-unit', setting='shapes', **more):
    return Member(study, name, 0, setting, folder/'out', folder/'runs', **more)


@pytest.mark.parametrize('study, name', ALL, ids='/'.join)
def test_every_condition_trains_samples_and_leaves_a_record(study, name, tmp_path):
    path = tmp_path/'out'/'pace-shapes.json'
    path.parent.mkdir()
    path.write_text(json.dumps(dict(pace={preset: .5 for preset in ('unet-s', 'fit-m', 'unet-m')})))
    one = member(tmp_path, study, name, dry=True)
    record = run(one)
    assert json.loads(one.path.read_text()) == record and record['condition'] == name and not record['gate']
    assert set(record['denoising']) == {f'{level:g}' for level in ablations.EFFECTIVE} and math.isfinite(sum(record['denoising'].values()))
    assert record['protocol']['config']['seed'] == 0 and record['protocol']['counts']['samples'] == 8


@pytest.mark.parametrize('study, name', ALL, ids='/'.join)
def test_every_condition_is_a_network_at_the_gpu_s_size(study, name):
    if name.startswith('measured') or name.endswith('-time'): return
    large = Member(study, name, setting='small')
    assert large.config.device == 'cuda' and large.config.batch == 64
    with torch.device('meta'): build(large.model_config.network)
    scale, c = large.condition.scale, large.model_config.network
    assert large.model_config.framework.sigma_in == (1. if scale in ('edm', 'shifted') else scale*input_scale(c.frames, c.width))


def test_the_reduced_setting_runs_from_end_to_end(tmp_path):
    record = run(member(tmp_path, 'diffusion', 'i', 'reduced', dry=True))
    assert record['protocol']['model']['sigma_in'] == 1. and record['protocol']['model']['sigma_data'] == .5 and not record['gate']


def test_a_lost_record_is_made_again_from_the_finished_training(tmp_path):
    first = run(member(tmp_path))
    member(tmp_path).path.unlink()
    again = run(member(tmp_path))
    assert {k: first[k] for k in ('samples', 'denoising', 'first_step', 'seconds')} == {k: again[k] for k in ('samples', 'denoising', 'first_step', 'seconds')}
    assert read_records(tmp_path/'out', 'shapes') == {'diffusion/v-unit': {0: again}}


def test_one_seed_means_one_beginning(tmp_path):
    one, two = member(tmp_path, name='v'), member(tmp_path, name='i')
    for m in (one, two): m.start()
    weights = [ablations.SnapVideo.from_pretrained(m.folder/'start').state_dict() for m in (one, two)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert {k for k, v in asdict(one.config).items() if v != asdict(two.config)[k]} == {'run', 'init_from'}
    other = Member('diffusion', 'v', 1, 'shapes', tmp_path/'out', tmp_path/'runs')
    assert other.config.seed == other.config.data_options['seed'] == 1


@pytest.mark.parametrize('setting, claims', [('reduced', 15), ('reduced-high', 24)])
def test_the_cpu_part_is_what_the_verdicts_need(setting, claims):
    asked = members(setting=setting)
    assert [m.seed for m in asked] == sorted(m.seed for m in asked) and len(asked) == 3*sum(map(len, CPU_PART[setting].values()))
    here = {f'{m.study}/{m.name}' for m in asked}
    assert sum({c.worse, c.better} <= here for c in CLAIMS) == claims


@pytest.mark.parametrize('frames, gates, expected', [([(4., 2.), (4.1, 2.1), (3.9, 1.9)], True, 'reproduced'), ([(2., 4.), (2.1, 4.1), (1.9, 3.9)], True, 'contradicted'),
                                                     ([(4., 2.), (2., 4.), (3., 3.1)], True, 'not visible at this size'), ([(4., 2.), (4.1, 2.1), (3.9, 1.9)], False, 'below the gate'),
                                                     ([(4., 2.), (4.1, 2.1)], True, 'too few seeds'), ([], True, 'not run')])
def test_verdicts(frames, gates, expected):
    records = {key: {s: dict(samples=dict(frames=pair[i]), gate=gates) for s, pair in enumerate(frames)} for i, key in enumerate(('a/worse', 'a/better'))}
    assert verdict(Claim('', 'a/worse', 'a/better', 'frames', 'FID 2 to 1'), records)['verdict'] == expected
    assert verdict(Claim('', 'a/worse', 'a/better', 'frames'), records)['verdict'] == {'reproduced': 'seen', 'contradicted': 'the opposite is seen'}.get(expected, expected)  # not the paper's claim
    assert len(summary(records)) == 3


def test_the_learner_learns_the_best_denoiser_and_no_more():
    modes = theory.Modes(torch.tensor([100., 1., .01]).double(), torch.ones(3).double())
    learner = theory.Learner(modes, theory.Curriculum(ScaledEDM(1., 4.), NoiseDistribution(-1.2, 1.2)))
    for sigma in (.1, .3, 1.):
        least, errors = theory.denoising_error(modes, theory.best_gain(modes, 4.), sigma, 4.), [theory.denoising_error(modes, learner(t), sigma, 4.) for t in (0., 10., 1e5)]
        assert errors[0] > errors[1] > errors[2] >= least and errors[2] < 1.02*least
    best = theory.best_gain(modes, 4.)
    assert theory.sampling_error(modes, best, noise_levels(128), 4.) < theory.sampling_error(modes, best, noise_levels(8), 4.)


@pytest.mark.parametrize('words, says', [(['everything'], 'unknown study'), (['diffusion', '--conditions', 'vi'], 'unknown condition'), (['--conditions', 'v'], 'conditions belong to a study'), (['--preset', 'huge'], '--preset must be one of'),
                                         (['diffusion', '--seeds', 'x'], 'seed'), (['pace', '--preset', 'huge'], '--preset must be one of'), (['diffusion', '--device', 'nowhere'], '--device nowhere'),
                                         (['architecture', '--conditions', 'unet-s-time', '--seeds', '0'], 'snapvideo ablate pace'), (['diffusion', '--preset', 'film', '--conditions', 'iv', '--device', 'cpu'], 'needs stills')])
def test_a_mistake_gets_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, 'judge_of', lambda *_: None)
    assert main(['ablate', *words]) == 2
    said = capsys.readouterr()
    assert says in said.err.strip().splitlines()[-1] and not said.out


def test_samples_are_compared_by_what_a_judge_sees():
    "Real clips against real ones and against noise; the judge is the one that the metrics notebook keeps."
    judge, world = CaptionJudge(folder='data/results/metrics'), Emoji(subjects=16, seed=5)
    clips = [world[i] for i in range(48)]
    video, truths = collate(clips).video, [clip.truth for clip in clips]
    near, far = ablations.compare(video[:24], video[24:], truths[:24], judge), ablations.compare(torch.randn(video[:24].shape, generator=torch.Generator().manual_seed(0)), video[24:], truths[:24], judge)
    assert near['frames'] < far['frames'] and near['tracks'] < far['tracks'] and near['judged']['subject']['right'] >= 22 > far['judged']['subject']['right']


def test_the_command_lists_and_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['ablate', 'design', '--preset', 'small', '--list']) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3*len(STUDIES['design'])
    assert main(['ablate', 'diffusion', '--preset', 'shapes', '--conditions', 'ii', '--seeds', '0', '--out', 'kept', '--runs', 'made']) == 0
    assert 'diffusion/ii' in capsys.readouterr().out and (tmp_path/'kept/diffusion/shapes/ii-seed0.json').exists()
    assert main(['ablate', 'diffusion', '--preset', 'shapes', '--conditions', 'ii', '--seeds', '0', '--out', 'kept', '--runs', 'made']) == 0
    assert 'has a record' in capsys.readouterr().err
    assert main(['ablate', 'diffusion', '--conditions', 'ii', '--seeds', '0', '--dry']) == 0
    assert not (tmp_path/'data').exists() and not (tmp_path/'runs').exists()
