"""The pictures behind the widgets: what a notebook does not hold (stale records, whole ranges, own models, the command)."""
import itertools, json, re, shutil, xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('ipywidgets', reason='the widgets need ipywidgets (development requirements)')
from snapvideo_nb import player
from snapvideo_nb.bench import AnatomyState, BenchState, ScalingState, SIZES, WIDTHS, anatomy, bench, load_counts, measured_rates, scaling
from snapvideo_nb.cli import main
from snapvideo_nb.explore import RedundancyMaterial, RedundancyState, explore_clips, redundancy
from snapvideo_nb.model import SnapVideo, weights_folder
from snapvideo_nb.outputs import model_digest
from snapvideo_nb.player import PlayerState, keep_record, load_record, record_path
from snapvideo_nb.runs import results_folder
from snapvideo_nb.widgets import explore_notebook

REMAKE = 'make it again with: snapvideo explore --record --force'


@pytest.fixture(scope='module')
def record():
    return load_record('mini')


def well_formed(view):
    "Every panel is an XML document without 'nan', and no wider than a phone's page can scale to legible letters; there is a sentence."
    assert view.text and view.panels
    for name, svg in view.panels.items():
        root = ET.fromstring(svg)
        assert root.tag.endswith('svg') and float(root.get('width')) <= 420, name
        assert not re.search(r'\bnan\b|\binf\b', svg.split('base64')[0]), name
    assert 'nan' not in view.text


def test_the_kept_record_is_of_the_weights_that_ship():
    kept = json.loads((results_folder('explore')/'mini.json').read_text())
    assert kept['protocol']['weights'] == model_digest(weights_folder('mini')), f'data/results/explore/mini.json shows other weights than those that ship: {REMAKE}'


def test_a_record_of_other_weights_is_not_shown(tmp_path, monkeypatch, record):
    "The same folder with one weight changed: not the package's record, not the cache's."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    model = SnapVideo.from_pretrained('mini')
    next(model.network.parameters()).data[0] += 1
    model.save_pretrained(tmp_path/'mini')
    with pytest.raises(FileNotFoundError, match='no record of these weights'): load_record(str(tmp_path/'mini'))


def test_a_damaged_record_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    path = record_path('mini', ['a cat'])
    path.parent.mkdir(parents=True)
    for text in ('', '{"runs": [{}]}', '[]'):
        path.write_text(text)
        with pytest.raises(ValueError, match='damaged record'): load_record('mini', ['a cat'])


def test_redundancy_over_its_range(record):
    material = RedundancyMaterial(explore_clips(), record['noise'])
    for clip, sigma, frames, size, scaled in itertools.product(material.clips, (10**-1.6, 1., 10**1.2), (1, 16), (1, 4), (False, True)):
        well_formed(redundancy(material, RedundancyState(clip, sigma, frames, size, scaled)))


def test_the_dot_is_where_the_numbers_say(record):
    "The drawn dots of the block average rise by exactly the factor T s^2 on a logarithmic axis of 7 decades."
    material = RedundancyMaterial(explore_clips(), record['noise'])
    dots = lambda **state: [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', redundancy(material, RedundancyState(sigma=1., scaled=False, **state)).panels['signal to noise'])]
    _, pixel, average = dots(frames=16, size=2)
    rho = material.blocks('rabbit', 16, 2).rho
    assert (pixel - average)/(210 - 30)*7 == pytest.approx(np.log10(64*rho), abs=.01)


def test_player_over_its_range(record):
    runs = record['runs']
    for left, right in itertools.product(range(len(runs)), repeat=2):
        for step, frame, show in ((0, 0, 'D'), (7, 5, 'x'), (99, 99, 'change')): well_formed(player.player(runs, PlayerState(left, right, step, frame, show)))


def test_bench_over_its_range(record):
    for solver, steps, rho, gamma in itertools.product(('euler', 'heun', 'churn', 'dpm++'), (2, 40), (1., 20.), (0., .4)): well_formed(bench(BenchState(solver, steps, rho, gamma), record['strips']))


def test_anatomy_over_its_range():
    counts = load_counts()
    for preset, patch, groups, latents in itertools.product(('mini', 'fit-500m'), (None, (2, 2), (9, 8)), (None, (1, 1), (2, 4)), (None, 64, 1024)):
        well_formed(anatomy(AnatomyState(preset, 15, 9, 15, 5, 'write', patch, groups, latents), counts))


def test_scaling_over_its_range():
    counts, rates = load_counts(), measured_rates()
    for size, width, gpus, machine in itertools.product(SIZES, WIDTHS, (1, 512), rates): well_formed(scaling(ScalingState(64, size, width, gpus, machine), counts, rates))


def test_the_counts_are_those_of_the_code():
    "Work and parameters that are stored for the pictures, counted again."
    from snapvideo_nb.bench import scaled_network
    from snapvideo_nb.scaling import parameter_count, work
    kept = load_counts()['widths']
    assert kept['0.5']['fit']['parameters'] == parameter_count(scaled_network('fit', .5))
    assert kept['1']['unet']['work']['16 1'] == sum(work(scaled_network('unet')).values())


def test_a_unet_has_no_latents_to_show(tmp_path):
    "A run of a network without latents plays all the same."
    tokenizer = SnapVideo.from_pretrained('mini').text.tokenizer_json
    run = player.record_run(SnapVideo.from_preset('unet-s', tokenizer_json=tokenizer), 'a frog', steps=2, guidance=0.)
    view = player.player([run, run], PlayerState())
    well_formed(view)
    assert 'latents, left' not in view.panels['change']


# The command

@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_export_writes_one_file(place, capsys):
    assert main(['explore', '--export', 'player.html']) == 0
    assert capsys.readouterr().out == 'player.html\n'
    page = Path('player.html').read_text()
    assert page.startswith('<!doctype html>') and not re.search(r'(src|href)="(?!data:)', page)
    assert main(['explore', '--export', 'player.html']) == 2 and 'exists' in capsys.readouterr().err
    assert main(['explore', '--export', 'player.html', '--force']) == 0


@pytest.mark.parametrize('words, says', [
    (['--model', 'nowhere'], 'nowhere'),
    (['--compare', 'nowhere'], 'nowhere'),
    (['--model', 'mini-up'], 'upsampler'),
    (['--port', '0'], '--port'),
    (['--captions', ''], 'caption'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else None)
def test_a_mistake_gets_one_line(words, says, place, capsys):
    assert main(['explore', *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith('snapvideo: ') and says in told[0]


def test_a_record_of_ones_own(place, capsys):
    "A tiny untrained model: its record is made once, kept under its digest, and found again."
    tokenizer = SnapVideo.from_pretrained('mini').text.tokenizer_json
    SnapVideo.from_preset('tiny', tokenizer_json=tokenizer).save_pretrained('mine')
    assert main(['explore', '--model', 'mine', '--captions', 'a cat', '--record']) == 0
    kept = Path(capsys.readouterr().out.strip())
    assert kept.is_relative_to(place/'cache') and [run.caption for run in load_record('mine', ['a cat'])['runs']] == ['a cat']*3
    assert main(['explore', '--model', 'mine', '--captions', 'a cat', '--record']) == 2 and 'exists' in capsys.readouterr().err


def test_the_page_calls_what_is_there():
    from snapvideo_nb import widgets
    for cell in explore_notebook('mini')['cells']:
        for name in re.findall(r'^(\w+_widget)', cell['source']) if cell['cell_type'] == 'code' else (): assert callable(getattr(widgets, name))
