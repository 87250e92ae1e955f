"""The widgets in a real browser: `snapvideo explore` opened in JupyterLab and in Voila, every control moved by keyboard, patches pointed at with the mouse, pictures and sentences compared with the functions.

Chromium is taken from CHROMIUM, the PATH or Playwright's own; where there is none, the tests are skipped and say so. SCREENSHOTS=folder keeps pictures of the pages.
"""
import base64, io, os, re, shutil, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install "snapvideo-nb[dev]"')
from playwright.sync_api import Error, expect, sync_playwright
from PIL import Image

from snapvideo_nb.bench import FRAMES, SIZES, WIDTHS, AnatomyState, BenchState, ScalingState, anatomy, bench, load_counts, measured_rates, scaling
from snapvideo_nb.explore import RedundancyMaterial, RedundancyState, explore_clips, redundancy
from snapvideo_nb.player import PlayerState, export_player, film_of, load_record, player

expect.set_options(timeout=90e3)
PATIENCE = 90e3  # milliseconds: a loaded machine may be slow, a broken page never comes
FOREIGN = re.compile('jupyterlab-jupytext|cdn.jsdelivr.net')  # an extension of JupyterLab that Voila tries and cannot load, and icons that Voila asks a server for: not ours, and not missed
CHROMIUM = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as tool:
        try: found = tool.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-dev-shm-usage'])
        except Error as error: pytest.skip(f'no browser can be started ({str(error).splitlines()[0]}); install chromium or set CHROMIUM')
        yield found
        found.close()


@pytest.fixture(scope='module')
def record():
    return load_record('mini')


@pytest.fixture
def page(browser):
    "A tall page, so that every cell is drawn; an error of its console fails the test."
    page, wrong = browser.new_page(viewport=dict(width=1280, height=6000)), []
    page.set_default_timeout(PATIENCE)
    page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' and not FOREIGN.search(message.text + message.location['url']) else None)
    page.on('pageerror', lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert not wrong


def picture(page, name):
    if folder := os.environ.get('SCREENSHOTS'): page.screenshot(path=Path(folder)/f'{name}.png', full_page=True)


@pytest.fixture
def opened(tmp_path):
    "A function that runs `snapvideo explore` with more words, and returns the address of its page when it answers."
    servers = []
    def open_server(*words, path=''):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        folders = {name: str(tmp_path/name.lower()) for name in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')}
        servers.append(subprocess.Popen([Path(sys.executable).with_name('snapvideo'), 'explore', '--no-browser', '--port', str(port), '--folder', tmp_path/'explore', *words], cwd=tmp_path,
                                        env=os.environ | folders | dict(JUPYTER_TOKEN='test', OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True))
        address, until = f'http://127.0.0.1:{port}/{path}', time.time() + PATIENCE/1e3
        while True:
            assert servers[-1].poll() is None, servers[-1].stderr.read()
            assert time.time() < until, 'the server does not answer'
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api' if path else f'http://127.0.0.1:{port}/static/favicon.ico', timeout=5); return address
            except urllib.error.HTTPError: return address
            except OSError: time.sleep(.3)
    yield open_server
    for server in servers:
        os.killpg(server.pid, signal.SIGINT)
        time.sleep(.2)
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)


# What is pressed: (control, a key or 'press' and a button's number, the value that this must give). The controls stand in the order of their widget.

MOVES = dict(
    redundancy=[('clip', 'press 1', 'glider'), ('sigma', 'ArrowRight', 10**-.35), ('frames', 'ArrowLeft', 8), ('size', 'ArrowRight', 2), ('scaled', 'Space', False)],
    player=[('left', 'ArrowRight', 1), ('right', 'ArrowRight', 2), ('step', 'ArrowRight', 1), ('frame', 'End', 15), ('show', 'press 1', 'x')],
    bench=[('solver', 'press 2', 'churn'), ('steps', 'ArrowRight', 9), ('rho', 'ArrowLeft', 6.5), ('gamma', 'ArrowRight', .2)],
    anatomy=[('preset', 'press 1', 'fit-500m'), ('frame', 'ArrowRight', 1), ('row', 'ArrowRight', 2), ('column', 'End', 15), ('block', 'ArrowRight', 1), ('way', 'press 1', 'write'), ('patch', 'ArrowRight', (2, 2)),
             ('groups', 'ArrowRight', (1, 1)), ('latents', 'ArrowRight', 64)],
    scaling=[('frames', 'ArrowRight', 32), ('size', 'ArrowRight', 2), ('width', 'ArrowRight', 1.5), ('gpus', 'ArrowRight', 128), ('machine', 'press 1', None)])


@pytest.fixture(scope='module')
def functions(record):
    "Each picture as a function of what differs from its first state."
    counts, rates, tried = load_counts(), measured_rates(), [BenchState().key]
    MOVES['scaling'][-1] = ('machine', 'press 1', list(rates)[1])
    material, first, runs = RedundancyMaterial(explore_clips(), record['noise']), film_of(record['runs'][0]).final, record['runs']
    return dict(redundancy=lambda **state: redundancy(material, RedundancyState(**state)), player=lambda **state: player(runs, PlayerState(**state)),
                bench=lambda tried, **state: bench(BenchState(**state, tried=tried), record['strips']),
                anatomy=lambda **state: anatomy(AnatomyState(**state), counts, first), scaling=lambda **state: scaling(ScalingState(**state), counts, rates))


def drawn(shell):
    "The drawings of a widget on the page, as text."
    return shell.locator('.explore-stage img').evaluate_all('images => Promise.all(images.map(async image => (await fetch(image.src)).text()))')


def move_everything(page, functions):
    "Every control of every widget, by keyboard: the sentence and all drawings are the function's, in the elements that were there before."
    for widget, moves in MOVES.items():
        shell = page.locator('.explore-shell').nth(list(MOVES).index(widget))
        expect(shell.locator('.explore-said [role=status]')).not_to_be_empty()
        controls = shell.locator('.explore-controls > *')
        assert controls.count() == len(moves), f'{widget} has controls that are not moved here'
        shell.locator('.explore-stage img').evaluate_all('images => images.forEach(image => image.before = true)')
        state, tried = dict(sigma=10**-.4) if widget == 'redundancy' else {}, [BenchState().key]
        for place, (name, key, value) in enumerate(moves):
            control, (key, *which) = controls.nth(place), key.split()
            if which: control.locator('button').nth(int(which[0])).press('Space')
            else: control.locator('.noUi-handle, input').first.press(key)
            state[name] = value
            told = functions[widget](**state, **dict(tried=tuple(dict.fromkeys(tried))) if widget == 'bench' else {})
            if widget == 'bench': tried.append(BenchState(**state).key)
            expect(shell.locator('.explore-said [role=status]')).to_have_text(told.text)
            until = time.time() + 10
            while drawn(shell) != list(told.panels.values()) and time.time() < until: time.sleep(.1)
            assert drawn(shell) == list(told.panels.values()), f'{widget}: {name} = {value}'
        assert shell.locator('.explore-stage img').evaluate_all('images => images.every(image => image.before)'), f'{widget} exchanged its elements'
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts() == []


def point(page, functions):
    "The FIT anatomy after `move_everything`: the mouse over a patch names it, a click chooses it and moves the sliders; the keyboard goes on from there, and Tab does not stop on the picture."
    shell = page.locator('.explore-shell').nth(list(MOVES).index('anatomy'))
    image, controls, said = shell.locator('.explore-stage img').first, shell.locator('.explore-controls > *'), shell.locator('.explore-said [role=status]')
    state, places = {name: value for name, _, value in MOVES['anatomy']}, {name: place for place, (name, *_) in enumerate(MOVES['anatomy'])}
    _, rows, columns = AnatomyState(**state).network.grid
    def over(row, column):
        "The middle of a patch: the drawing is 420 units wide, its frame begins at (10, 30) and is 400 wide."
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        unit, height = box['width']/420, 400*AnatomyState(**state).network.padded[1]/AnatomyState(**state).network.padded[2]
        return box['x'] + unit*(10 + 400*(column + .5)/columns), box['y'] + unit*(30 + height*(row + .5)/rows)
    def shows(row, column):
        told = functions['anatomy'](**state | dict(row=row, column=column))
        expect(said).to_have_text(told.text)
        until = time.time() + 10
        while drawn(shell) != list(told.panels.values()) and time.time() < until: time.sleep(.1)
        assert drawn(shell) == list(told.panels.values()), f'patch {row}, {column}'
        for name, value in (('row', row), ('column', column)): expect(controls.nth(places[name]).locator('.widget-readout')).to_have_text(str(value))
    before = said.inner_text()
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows//3, columns//2)):
        page.mouse.move(*over(row, column))
        page.wait_for_function('([x, y, name]) => document.elementFromPoint(x, y).title.startsWith(name)', arg=[*over(row, column), f'row {row + 1}, column {column + 1}: group '])
        assert said.inner_text() == before                                                  # to look is not to choose
        page.mouse.click(*over(row, column))
        shows(row, column)
        before = said.inner_text()
    page.mouse.move(0, 0)
    controls.nth(places['row']).locator('.noUi-handle').press('ArrowRight')
    shows(rows//3 + 1, columns//2)
    controls.nth(len(places) - 1).locator('.noUi-handle').focus()
    for _ in range(4):
        page.keyboard.press('Tab')
        assert not page.evaluate('document.activeElement.closest(".explore-spots")')


def use_buttons(page):
    "The model at work behind buttons: a run of two steps joins the player, the bench shows clips that were made; a play button steps through the run."
    shell = page.locator('.explore-shell').nth(1)
    shell.get_by_role('button', name='a run of your own').press('Space')
    shell.locator('> *').nth(2).locator('.noUi-handle').first.press('Home')
    shell.get_by_role('button', name='record this run').press('Space')
    expect(shell.locator('.explore-said')).to_contain_text('Right: step 1 of 2,')
    said = shell.locator('.explore-said').inner_text()
    shell.locator('.widget-play button').first.press('Space')
    expect(shell.locator('.explore-said')).not_to_have_text(said)
    shell.locator('.widget-play button').first.press('Space')
    shell = page.locator('.explore-shell').nth(2)
    shell.locator('.explore-controls .noUi-handle').first.press('Home')
    shell.get_by_role('button', name='make the clips').press('Space')
    until = time.time() + PATIENCE/1e3
    while 'made: churn, 2 steps' not in drawn(shell)[3] and time.time() < until: time.sleep(.2)
    assert 'made: churn, 2 steps' in drawn(shell)[3]


def test_voila(opened, page, functions):
    "The page without code: everything moves, nothing is wider than a phone."
    page.goto(opened('--page'))
    expect(page.locator('.explore-shell')).to_have_count(5)
    move_everything(page, functions)
    picture(page, 'voila')
    point(page, functions)
    use_buttons(page)
    assert not page.locator('.highlight pre').count() and page.locator('details').count() == 5
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    picture(page, 'voila-phone')
    point(page, functions)


def test_jupyterlab(opened, page, functions):
    "The notebook, run from its menu."
    page.goto(opened(path='lab/tree/explore.ipynb?token=test'))
    page.get_by_text('| Idle').wait_for()  # the kernel is there
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.locator('.lm-Menu-item', has_text=re.compile('^Run All Cells')).click()
    expect(page.locator('.explore-shell')).to_have_count(5)
    move_everything(page, functions)
    point(page, functions)
    picture(page, 'jupyterlab')


def test_the_page_that_needs_no_kernel(page, tmp_path, record):
    "Opened from a file: step, frame and what is shown, by keyboard, and the canvas holds those pixels."
    page.goto(export_player(tmp_path/'player.html', record['runs'][:2]).as_uri())
    page.locator('#step').press('ArrowRight')
    page.locator('#frame').press('End')
    film = film_of(record['runs'][0])
    expect(page.locator('#text')).to_contain_text(f'Frame {len(film.final)}. Left: step 2 of {len(film.sigma)}')
    def canvas(): return np.asarray(Image.open(io.BytesIO(base64.b64decode(page.locator('canvas').first.evaluate('canvas => canvas.toDataURL()').split(',')[1]))).convert('RGB'))
    assert (canvas() == film.D[1, -1]).all()
    page.locator('#show').press('ArrowDown')
    page.wait_for_function('document.querySelector("#show").value == "x"')
    assert np.abs(canvas().astype(int) - film.x[1, -1]).max() <= 8
    page.locator('#show').press('ArrowDown')
    page.wait_for_function('document.querySelector("#show").value == "change"')
    assert np.abs(canvas() - (127.5 + 2*(film.D[1, -1].astype(float) - film.D[0, -1])).clip(0, 255)).max() <= 1 and canvas().std() > 3  # of the pictures that are shown, so between black and white
    page.locator('#playstep').press('Enter')
    expect(page.locator('#text')).to_contain_text('Left: step 4 of')
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    picture(page, 'player-phone')
