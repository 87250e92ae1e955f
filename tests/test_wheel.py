"""The package as a stranger gets it: the wheel, in an empty environment, far from the repository."""
import os, subprocess, sys, venv, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.wheel


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from what a commit would hold: the files that git knows or does not ignore, copied, so that no build folder appears in the checkout."
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    for name in filter(None, run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=ROOT).split('\0')):
        if not (ROOT/name).is_file(): continue
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        (source/name).write_bytes((ROOT/name).read_bytes())
    run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', out, source)
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def elsewhere(wheel, tmp_path_factory):
    "An empty environment with the wheel and what it asks for, in the tested versions: its folder."
    folder = tmp_path_factory.mktemp('elsewhere')
    venv.create(folder/'venv', with_pip=True)
    pip = [folder/'venv/bin/python', '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet', '--constraint', ROOT/'constraints.txt']
    run(*pip, *os.environ.get('TORCH', 'torch').split())
    run(*pip, wheel)
    return folder


def test_the_wheel_holds_code_weights_and_results(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.name for path in (ROOT/'snapvideo_nb').glob('*.py')}
    assert modules <= {name.removeprefix('snapvideo_nb/') for name in names}
    assert {f'snapvideo_nb/weights/mini/{name}' for name in ('config.json', 'model.safetensors', 'tokenizer.json')} <= set(names)
    results = {path.relative_to(ROOT/'data').as_posix() for path in (ROOT/'data/results').rglob('*.json')}
    assert {f'snapvideo_nb/{name}' for name in results} <= set(names)
    assert any(name.endswith('LICENSE') for name in names)
    assert not [name for name in names if name.startswith(('tests', 'nbs', 'build'))]
    assert wheel.stat().st_size < 20e6


def test_it_samples_outside_the_repository(elsewhere):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'VIRTUAL_ENV'))} | {'XDG_CACHE_HOME': str(elsewhere/'cache')}
    printed = run(elsewhere/'venv/bin/snapvideo', 'sample', 'a red apple moving to the right', '--steps', 2, '--format', 'mp4', 'png', '--out', 'videos', cwd=elsewhere, env=environment)
    made = sorted(path.suffix for path in (elsewhere/'videos').iterdir())
    assert made == ['.mp4', '.png']
    for path in (elsewhere/'videos').iterdir(): assert path.name in printed and path.stat().st_size > 500
    assert 'mini' in run(elsewhere/'venv/bin/snapvideo', 'presets', cwd=elsewhere, env=environment)


def test_the_installed_versions_fit_together(elsewhere):
    run(elsewhere/'venv/bin/python', '-m', 'pip', 'check')
