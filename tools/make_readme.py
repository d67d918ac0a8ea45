"""Make README.md from nbs/index.ipynb, as GitHub shows it: no Quarto needed.

    python tools/make_readme.py            write README.md, and its pictures into nbs/assets/readme/
    python tools/make_readme.py --check    say whether they are in step, change nothing

Boxes become quotations, hidden cells are left out, links to notebooks lead into nbs/.
"""
import base64, re, sys
from nbdev.config import get_config
from nbdev.process import NBProcessor
from build_docs import Labels, join, outside_code

PICTURES = {'image/svg+xml': 'svg', 'image/png': 'png'}
MADE = '<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit there, not here. -->\n'

def boxes(text):
    "Turn `::: {.callout-note}` boxes into quotations, and drop other `:::` lines."
    lines, inside = [], []
    for line in text.splitlines():
        if m := re.match(r':{3,}\s*(.*)', line):
            if m[1]: inside.append('callout' in m[1])
            elif inside: inside.pop()
        elif any(inside):
            line = re.sub(r'^#+\s+(.*)$', r'**\1**\n>', line)
            lines.append(f'> {line}'.rstrip())
        else: lines.append(line)
    return '\n'.join(lines)

def links(text):
    "Let links to notebooks and assets lead there from the top folder; drop attributes and labels."
    text = re.sub(r'(\]\()(?!\w+:|#|/)([^)\s]+)', r'\1nbs/\2', text)
    text = re.sub(r'(<(?:img|a)[^>]*(?:src|href)=")(?!\w+:|#|/)', r'\1nbs/', text)
    text = re.sub(r'\$\$\s*\{#[^}]*\}', '$$', text)
    return re.sub(r'(?<=[\w).?!])[ ]*\{[#.][^{}$]*\}', '', text)

def markdown(text, labels):
    "Return a piece of the notebook's prose as GitHub reads it."
    return outside_code(lambda t: links(labels.refer(t, '{0}')), boxes(text)).strip()

def outputs(cell, i, labels, pictures):
    "Yield what a cell shows: prose, text and pictures (their bytes go into `pictures`)."
    for n, o in enumerate(cell.get('outputs', [])):
        data = {k: join(v) for k, v in o.get('data', {}).items()}
        kind = next((k for k in PICTURES if k in data), None)
        if 'text' in o: yield f"```text\n{join(o['text']).rstrip()}\n```"
        elif 'text/markdown' in data: yield markdown(data['text/markdown'], labels)
        elif kind:
            name = f'nbs/assets/readme/figure-{i}-{n}.{PICTURES[kind]}'
            svg = kind == 'image/svg+xml'
            pictures[name] = data[kind].encode() if svg else base64.b64decode(data[kind])
            caption = labels.refer(cell.caption, '{0}').replace('"', '&quot;')
            yield f'![{caption}]({name})' + (f'\n\n*{caption}*' if caption else '')
        elif 'text/html' in data: continue          # GitHub would strip most of it
        elif 'text/plain' in data: yield f"```text\n{data['text/plain'].rstrip()}\n```"

def make(path):
    "Return the text of the README and its pictures, by file name."
    nb = NBProcessor(path, rm_directives=False).nb
    labels, parts, pictures = Labels(c.source for c in nb.cells), [MADE], {}
    for i, cell in enumerate(nb.cells):
        directives = {k.rstrip(':'): ' '.join(v) for k, v in cell.directives_.items()}
        off = lambda key, d=directives: d.get(key, '').lower() == 'false'
        if cell.cell_type == 'markdown': parts.append(markdown(cell.source, labels))
        if cell.cell_type != 'code' or off('include'): continue
        if directives.keys() & {'hide', 'export', 'exporti', 'default_exp'}: continue
        cell.caption = directives.get('fig-cap', '').strip('"\'')
        code = re.sub(r'(?m)^#\|.*\n?', '', cell.source).strip()
        if code and not off('echo') and 'hide_input' not in directives:
            parts.append(f'```python\n{code}\n```')
        if not off('output') and 'hide_output' not in directives:
            parts += outputs(cell, i, labels, pictures)
    return '\n\n'.join(part for part in parts if part) + '\n', pictures

def main():
    cfg = get_config()
    top, folder = cfg.config_path, cfg.nbs_path / 'assets' / 'readme'
    text, files = make(cfg.nbs_path / 'index.ipynb')
    files['README.md'] = text.encode()
    read = lambda name: (top / name).read_bytes() if (top / name).exists() else None
    stale = [name for name, content in files.items() if read(name) != content]
    extra = [p for p in folder.glob('figure-*') if p.relative_to(top).as_posix() not in files]
    if '--check' in sys.argv:
        if bad := [*stale, *map(str, extra)]: sys.exit(f'run python tools/make_readme.py: {bad}')
        return print('README.md is in step with nbs/index.ipynb')
    for p in extra: p.unlink()
    for name in stale:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(files[name])
    print('README.md:', f'{len(stale)} of {len(files)} files changed')

if __name__ == '__main__': main()
