"""README.md from index.ipynb: run as a script it writes, the tests compare.

Pictures stored in the notebook become files under data/readme/, because a page that shows README.md shows no embedded ones.
Cells marked `#| hide` are left out; `#| echo: false` leaves out the code and keeps the result.
"""
import base64, re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 'data/readme'


def directives(cell):
    return {line.strip().lstrip('#| ').strip() for line in cell.source.splitlines() if re.match(r'\s*#\s*\|', line)}


def render(notebook=ROOT/'index.ipynb'):
    "All files made from `notebook`, README.md and its pictures: relative path -> bytes."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != 'code' or 'hide' not in directives(cell)]
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.source = '' if 'echo: false' in directives(cell) else re.sub(r'^\s*#\s*\|.*\n?', '', cell.source, flags=re.M)
    files = {}

    def picture(kind, data):
        name = f"{PICTURES}/{len(files) + 1}.{kind}"
        files[name] = data
        return name

    for cell in nb.cells:
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'image/png' in data:
                name = picture('png', base64.b64decode(data.pop('image/png')))
                data['text/markdown'] = f'![]({name})'
            elif 'text/html' in data:
                html = re.sub(r'\s+', ' ', re.sub(r' style="[^"]*"', '', data['text/html']))
                data['text/html'] = re.sub(r'data:image/(\w+);base64,([\w+/=\s]+)', lambda m: picture(m[1], base64.b64decode(m[2])), html)
    text, _ = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(nb)
    text = re.sub(r'```(?:python)?\n\s*```\n', '', text)
    text = re.sub(r'\n{3,}', '\n\n', text).strip()
    files['README.md'] = f'<!-- Made from index.ipynb by `make readme`: edit the notebook. -->\n\n{text}\n'.encode()
    return files


def write():
    "Write what `render` gives, and delete pictures that are no longer shown."
    files = render()
    for old in (ROOT/PICTURES).glob('*'):
        if f'{PICTURES}/{old.name}' not in files: old.unlink()
    for name, content in files.items():
        path = ROOT/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(path.relative_to(ROOT), f'{len(content) / 1024:.0f} KB')


if __name__ == '__main__': write()
