"""What `make test` looks at first: everything that is made from the notebooks is up to date, and the notebooks are clean."""
import filecmp, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

import readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [ROOT/'index.ipynb', *sorted((ROOT/'nbs').glob('[!_.]*.ipynb'))]
each_notebook = pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
PRIVATE = re.compile(r'(?<![\w.~}-])/(?:home|root|Users|work)/[\w.-]+')


def nbdev(command, *arguments, folder):
    done = subprocess.run([sys.executable, '-c', f'from nbdev.cli import {command}; {command}()', *arguments],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "What nbdev reads, copied: it may write there, the checkout stays as it is."
    folder = tmp_path_factory.mktemp('copy')
    shutil.copy(ROOT/'settings.ini', folder)
    shutil.copy(ROOT/'index.ipynb', folder)
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=lambda _, names: [n for n in names if not n.endswith('.ipynb')])
    return folder


def test_the_package_is_what_the_notebooks_export(copy):
    nbdev('nbdev_export', folder=copy)
    made, kept = ({path.relative_to(folder): path for path in (folder/'snapvideo_nb').glob('*.py')} for folder in (copy, ROOT))
    assert made.keys() == kept.keys(), 'snapvideo_nb/ has other modules than the notebooks: run `make sync`'
    stale = [str(name) for name in made if not filecmp.cmp(made[name], kept[name], shallow=False)]
    assert not stale, f'{stale} differ from what the notebooks export: edit the notebook, then run `make sync`'


def test_the_notebooks_are_clean(copy):
    nbdev('nbdev_clean', '--fname', '.', folder=copy)
    unclean = [path.stem for path in NOTEBOOKS if (copy/path.relative_to(ROOT)).read_text() != path.read_text()]
    assert not unclean, f'{unclean} hold execution counts or metadata: run `make sync`'


def test_every_notebook_is_tested():
    "`nbdev_test --path .` finds what is listed here (with `recursive = False` in settings.ini it would only find the index)."
    from nbdev.doclinks import nbglob
    assert {Path(path).resolve() for path in nbglob(ROOT)} == set(NOTEBOOKS)


def test_the_readme_is_made_from_the_index():
    made = readme.render()
    kept = {'README.md', *(str(path.relative_to(ROOT)) for path in (ROOT/readme.PICTURES).glob('*'))}
    assert made.keys() == kept, 'the pictures of README.md are out of date: run `make readme`'
    stale = [name for name, content in made.items() if (ROOT/name).read_bytes() != content]
    assert not stale, f'{stale} differ from index.ipynb: run `make readme`'


@each_notebook
def test_the_stored_results_hold_no_error(notebook):
    for number, cell in enumerate(json.loads(notebook.read_text())['cells']):
        for output in cell.get('outputs', []):
            assert output['output_type'] != 'error', f'cell {number}: {output["ename"]}: {output["evalue"]}'


@each_notebook
def test_a_notebook_reads_without_a_kernel(notebook):
    "Under 2 MB with its stored results, and the first cell is a title with its one-line summary."
    cells = json.loads(notebook.read_text())['cells']
    assert re.match(r'# .+\n+> .+', ''.join(cells[0]['source'])), 'the first cell holds "# Title", then "> summary"'
    assert notebook.stat().st_size < 2e6


def test_a_module_imports_only_modules_of_earlier_notebooks():
    module = {path: re.search(r'^#\| *default_exp (\w+)', path.read_text().replace('"', '\n'), re.M) for path in NOTEBOOKS}
    order = [match[1] for match in module.values() if match]
    for position, name in enumerate(order):
        imported = re.findall(r'^from \.(\w+) import', (ROOT/'snapvideo_nb'/f'{name}.py').read_text(), re.M)
        assert set(imported) <= set(order[:position]), f'{name} imports {set(imported) - set(order[:position])}'


def test_nothing_names_a_folder_of_the_machine_it_was_made_on():
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    found = []
    for name in filter(None, tracked):
        try: text = (ROOT/name).read_text(encoding='utf-8')
        except (UnicodeDecodeError, FileNotFoundError): continue
        found += [f'{name}: {match[0]}' for match in PRIVATE.finditer(text)]
    assert not found, '\n'.join(found)
