"""The site, as hooks of MkDocs (mkdocs.yml names this file): `make docs` builds it, nothing is run.

Pages are the notebooks with their stored results, without hidden cells and nbdev's directives; a page for each module from its docstrings; and the denoising
player of `snapvideo explore --export`, made from the recorded runs. Pictures leave the pages and become files, the same for styles that every notebook page
would repeat. Equations are set by the MathJax of jupyter-server-mathjax, which lies in the site: no page loads anything from elsewhere.
"""
import base64, hashlib, html, json, re, tempfile
from pathlib import Path

import jupyter_server_mathjax, mkdocs_jupyter, nbformat
from mkdocs.plugins import event_priority
from markdown.extensions.toc import nest_toc_tokens
from mkdocs.structure.files import File, Files
from mkdocs.structure.toc import get_toc

from readme import directives

ROOT = Path(__file__).resolve().parent.parent
MATHJAX = Path(jupyter_server_mathjax.__file__).parent/'static'
MATH = 'MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe'
STAGE = tempfile.TemporaryDirectory()  # notebooks as they are shown; gone when the process ends
PICTURE = re.compile(r'src="data:image/([\w+]+);base64,([\w+/=\s]+)"')
STYLE = '''
.jupyter-wrapper .jp-Notebook {padding: 0; margin: 0; overflow: visible}
.jupyter-wrapper .jp-Cell {padding: 0}
.jupyter-wrapper .jp-OutputArea-output {overflow-x: auto}
.jupyter-wrapper .jp-OutputArea-output pre {white-space: pre; overflow-x: auto}
.jupyter-wrapper img {max-width: 100%; height: auto}
.jupyter-wrapper table {display: block; overflow-x: auto}
.jupyter-wrapper .jp-RenderedHTMLCommon p, .jupyter-wrapper .jp-RenderedHTMLCommon li {font-size: .8rem; line-height: 1.6}
.jupyter-wrapper details {margin: .6em 0; padding: .2em .8em; border-left: 3px solid #56b4e9}
.doc-signature code {white-space: pre-wrap}
iframe.player {width: 100%; height: 46rem; border: 1px solid #ccc}
.MathJax_Display {overflow-x: auto; overflow-y: hidden; padding: .2em 0}
'''


def number(path): return path.stem.split('_')[0]

def module(nb):
    "The name of the module that a notebook exports, or None."
    found = re.search(r'^#\| *default_exp (\w+)', '\n'.join(cell.source for cell in nb.cells), re.M)
    return found and found[1]

def title(nb): return re.match(r'# (.+)', nb.cells[0].source)[1]

def shown(nb):
    "A notebook as a page shows it: no hidden cell, no directive, no empty result of a widget, with the player where the text announces it."
    nb.cells = [cell for cell in nb.cells if cell.cell_type != 'code' or not {'hide'} & directives(cell) and 'default_exp' not in ' '.join(directives(cell))]
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        if 'echo: false' in directives(cell): cell.metadata['tags'] = ['result-only']
        cell.source = re.sub(r'^\s*#\s*\|.*\n?', '', cell.source, flags=re.M)
        for output in cell.outputs: output.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
    for place, cell in enumerate(nb.cells):
        if cell.cell_type == 'markdown' and cell.source.startswith('## A page that needs no kernel'):
            nb.cells.insert(place + 1, nbformat.v4.new_markdown_cell('<iframe class="player" src="../player.html" title="The denoising player"></iframe>\n\n[The player on a page of its own](../player.html)'))
            break
    return nb


@event_priority(100)  # before mkdocs-jupyter looks at the files
def on_files(files, config):
    "All files of the site, and the order in which they are read."
    stage, kept = Path(STAGE.name), [file for file in files if file.src_dir != config.docs_dir]  # the theme's own
    def add(address, content=None, folder=ROOT, path=None):
        if content is None and not path: kept.append(File(address, str(folder), config.site_dir, config.use_directory_urls))
        else: kept.append(File.generated(config, address, content=content, abs_src_path=path and str(path)))
    notebooks = sorted((ROOT/'nbs').glob('[!_.]*.ipynb'))
    chapters, modules = [], []
    for path in [ROOT/'index.ipynb', *notebooks]:
        address = str(path.relative_to(ROOT))
        nb = nbformat.read(path, as_version=4)
        if path.parent != ROOT:
            chapters.append({f'{number(path)} {title(nb)}': address})
            if name := module(nb):
                modules.append({name: f'api/{name}.md'})
                add(f'api/{name}.md', content=f'# snapvideo_nb.{name}\n\nMade and explained in [{number(path)} {title(nb)}](../{address}).\n\n::: snapvideo_nb.{name}\n')
        (stage/address).parent.mkdir(exist_ok=True)
        nbformat.write(shown(nb), stage/address)
        add(address, folder=stage)
    add('CONTRIBUTING.md')
    add('LICENSE')
    add('player.html', content=player())
    add('assets/site.css', content=STYLE)
    add('assets/clipboard.js', path=Path(mkdocs_jupyter.__file__).parent/'templates/mkdocs_html/assets/clipboard.umd.js')
    for path in MATHJAX.rglob('*'):
        if path.is_file() and 'localization' not in path.parts: add(f'assets/mathjax/{path.relative_to(MATHJAX)}', path=path)
    config.nav = [{'Home': 'index.ipynb'}, {'Notebooks': chapters}, {'Reference': modules}, {'Contributing': 'CONTRIBUTING.md'}]
    return Files(kept)

def player():
    "The denoising player, with the recorded runs of the model that ships."
    from snapvideo_nb.player import load_record, player_page
    return player_page(load_record('mini')['runs'])


def contents(text):
    "A page whose headings have names of their own, and its table of contents."
    taken, tokens = set(), []
    def heading(found):
        name, words = found[2], html.unescape(re.sub('<[^>]+>', '', re.sub('<a class="anchor-link".*?</a>', '', found[3])))
        while name in taken: name += '-'
        taken.add(name)
        tokens.append(dict(level=int(found[1]), id=name, name=words.strip()))
        return found[0].replace(f'"{found[2]}"', f'"{name}"').replace(f'"#{found[2]}"', f'"#{name}"')
    return re.sub(r'<h([1-4])\b[^>]* ?id="([^"]*)"[^>]*>(.*?)</h\1>', heading, text, flags=re.S), get_toc(nest_toc_tokens(tokens))

def on_page_content(html, page, config, files):
    "Pictures and styles as files, links to pages, contents, equations."
    root, site = '../'*page.url.count('/'), Path(config.site_dir)
    if page.file.src_uri.endswith('.ipynb'): html, page.toc = contents(html)
    (site/'assets/pictures').mkdir(parents=True, exist_ok=True)
    styles = re.findall(r'<style[^>]*>(.*?)</style>', html, re.S)
    if styles: (site/'assets/notebook.css').write_text('\n'.join(styles))
    html = re.sub(r'<(script|style)\b.*?</\1>', '', html, flags=re.S)
    def picture(found):
        data = base64.b64decode(found[2])
        name = f'assets/pictures/{hashlib.sha256(data).hexdigest()[:16]}.{found[1].removesuffix("+xml")}'
        (site/name).write_bytes(data)
        return f'loading="lazy" src="{root}{name}"'
    html = PICTURE.sub(picture, html).replace('alt="No description has been provided for this image"', 'alt="the result of the code above"')
    html = re.sub(r'(href="(?!\w+:)[^"#]+)\.(?:ipynb|md)(?=["#])', r'\1.html', html)
    return html + (f'<script>window.MathJax = {json.dumps(SETTINGS)}</script><script defer src="{root}assets/mathjax/{MATH}"></script>' if '$' in html else '')

SETTINGS = dict(tex2jax=dict(inlineMath=[['$', '$']], displayMath=[['$$', '$$']], processEscapes=True, ignoreClass='md-header|highlight-ipynb|doc'), showMathMenu=False, messageStyle='none')
SETTINGS['HTML-CSS'] = dict(linebreaks=dict(automatic=True), availableFonts=[], preferredFont=None, webFont='STIX-Web', imageFont=None)
