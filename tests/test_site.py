"""The site: built from the notebooks as they are stored, every link of every page leads somewhere, nothing is loaded from elsewhere, and in a browser equations are set, clips move and the player scrubs."""
import functools, http.server, os, re, subprocess, sys, threading
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from PIL import Image

if missing := [name for name in ('mkdocs', 'material', 'mkdocs_jupyter', 'mkdocstrings', 'jupyter_server_mathjax') if find_spec(name) is None]:
    pytest.skip(f'{missing} not installed: pip install "snapvideo-nb[dev]"', allow_module_level=True)
from test_explore_browser import browser, picture

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.stem for path in (ROOT/'nbs').glob('[!_.]*.ipynb'))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the built site."
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--strict', '--site-dir', folder], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(NO_MKDOCS_2_WARNING='1', OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    "What a page links to, what it loads, and the names that can be linked to."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.names = [], [], {''}
        self.feed(path.read_text('utf-8'))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given.get('id'), given.get('name') if tag == 'a' else None}
        if tag == 'a' and 'href' in given: self.links.append(given['href'])
        if tag in ('img', 'script', 'iframe', 'video', 'source') and given.get('src'): self.loads.append(given['src'])
        if tag == 'link' and given.get('rel') in ('stylesheet', 'icon'): self.loads.append(given['href'])


@pytest.fixture(scope='module')
def pages(site):
    return {path: Page(path) for path in site.rglob('*.html') if 'assets' not in path.parts and path.name != '404.html'}


def test_there_is_a_page_for_every_notebook_and_module(site, pages):
    modules = {path.stem for path in (ROOT/'snapvideo_nb').glob('[!_]*.py')}
    assert {path.relative_to(site).as_posix() for path in pages} == {'index.html', 'CONTRIBUTING.html', 'player.html', *(f'nbs/{name}.html' for name in NOTEBOOKS), *(f'api/{name}.html' for name in modules)}


def test_every_link_leads_somewhere(site, pages):
    "Files and the places in them; addresses elsewhere are only held to be https."
    wrong = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            if re.match('https://|mailto:|data:', link): continue
            address, place = urldefrag(link.split('?')[0])
            target = (path.parent/unquote(address)).resolve() if address else path
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): wrong.append(f'{path.relative_to(site)}: {link}')
            elif place and target in pages and unquote(place) not in pages[target].names: wrong.append(f'{path.relative_to(site)}: no such place, {link}')
    assert not wrong, '\n'.join(wrong)


def test_nothing_is_loaded_from_elsewhere(pages):
    assert not [(path.name, load) for path, page in pages.items() for load in page.loads if '//' in load.removeprefix('data:')]


def test_stored_results_and_docstrings_are_there(site):
    "A clip that moves, a chapter without hidden cells and directives, a signature with shapes, words to search for."
    clips = [Image.open(path) for path in (site/'assets/pictures').glob('*.gif')]
    assert len(clips) > 50 and sum(clip.n_frames > 1 for clip in clips) > .9*len(clips)
    page = (site/'nbs/17d_widgets.html').read_text('utf-8')
    assert page.count('assets/pictures/') > 15 and '#| ' not in re.sub('<[^>]+>', '', page) and 'nbdev_export' not in page
    signature = re.sub('<[^>]+>', '', (site/'api/explore.html').read_text('utf-8'))
    assert re.search(r"block_average\(.*?Float\[Tensor, .*?3 t h w", signature)
    assert 'Averages over all frames' in (site/'search/search_index.json').read_text('utf-8')


@pytest.fixture(scope='module')
def address(site):
    "The site on a server."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture
def page(browser):
    "A page at the width of a desk whose console holds no error in the end."
    page, wrong = browser.new_page(viewport=dict(width=1280, height=900)), []
    page.set_default_timeout(90e3)
    spare = lambda message: re.search('about:blank|otf/MathJax_', message.text + message.location['url'])  # fonts that MathJax measures with, or names for its hidden MathML, and does without
    page.on('console', lambda message: wrong.append(f'{message.text} {message.location["url"]}') if message.type == 'error' and not spare(message) else None)
    page.on('pageerror', lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert not wrong


def test_equations_are_set(page, address):
    page.goto(f'{address}/nbs/02_diffusion.html')
    page.wait_for_function('window.MathJax && MathJax.Hub && MathJax.Hub.queue.pending === 0 && document.querySelectorAll(".MathJax").length > 150')
    assert page.locator('.MathJax_Error, .merror').all_inner_texts() == []
    assert '$' not in page.locator('.jp-MarkdownOutput').all_inner_texts()[3]
    page.locator('.MathJax_Display').nth(2).scroll_into_view_if_needed()
    picture(page, 'site-desk')


def test_pictures_can_be_seen(page, address):
    page.goto(f'{address}/nbs/17d_widgets.html')
    widths = page.locator('.jp-OutputArea img').evaluate_all("images => Promise.all(images.map(async image => { image.loading = 'eager'; await image.decode(); return image.clientWidth; }))")
    assert len(widths) > 15 and min(widths) > 100


def test_the_player_scrubs_inside_its_chapter(page, address):
    page.goto(f'{address}/nbs/17b_player.html')
    frame = page.frame_locator('iframe.player')
    frame.locator('#step').press('ArrowRight')
    frame.locator('#text').get_by_text('Left: step 2 of').wait_for()
    picture(page, 'site-player')


def test_a_search_finds_a_function(page, address):
    page.goto(f'{address}/index.html')
    page.locator('.md-search__input').fill('block_average')
    page.locator('.md-search-result__link[href*="explore"]').first.wait_for()


@pytest.mark.parametrize('name', ['index', 'nbs/02_diffusion', 'nbs/17d_widgets', 'api/fit', 'player'])
def test_a_page_fits_a_phone(page, address, name):
    page.set_viewport_size(dict(width=390, height=844))
    page.goto(f'{address}/{name}.html')
    page.wait_for_timeout(1500)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    picture(page, f'site-phone-{Path(name).name}')
