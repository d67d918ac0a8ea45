"All settings are in settings.ini; edit there, not here."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {key.removesuffix('_requirements'): cfg[key].split()
          for key in cfg if key.endswith('_requirements')}
for extra in ('test', 'transformers', 'peft'): extras['dev'] += extras[extra]  # contributors
site, code = cfg['doc_host'] + cfg['doc_baseurl'], cfg['git_url']

# On a package index a link that is relative to this folder would lead nowhere.
readme = Path('README.md').read_text(encoding='utf-8')
readme = re.sub(r'<!--.*?-->\s*', '', readme, count=1, flags=re.S)
readme = re.sub(r'(!\[[^]]*\]\()(?!\w+:)', rf'\g<1>{code}/raw/{cfg["branch"]}/', readme)
readme = re.sub(r'(?<!!)(\[[^]]*\]\()(?!\w+:|#)', rf'\g<1>{code}/blob/{cfg["branch"]}/', readme)
lib, lines = cfg['lib_name'], cfg['console_scripts'].strip().splitlines()

setup(
    name=lib, version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'],
    url=code,
    project_urls={'Documentation': site, 'Source': code, 'Issues': f'{code}/issues',
                  'Changelog': f'{code}/blob/{cfg["branch"]}/CHANGELOG.md',
                  'Paper': 'https://aclanthology.org/2020.emnlp-main.359'},
    long_description=readme,
    long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, f'{lib}.*']),
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': [line.strip() for line in lines],
                  'nbdev': [f'{lib}={lib}._modidx:d']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3'],
)
