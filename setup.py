"All settings are in settings.ini; edit there, not here."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {extra: cfg[f'{extra}_requirements'].split()
          for extra in ('test', 'dev', 'transformers', 'slurm')}
extras['dev'] += extras['test'] + extras['transformers']    # dev is all that a contributor needs
lib, lines = cfg['lib_name'], cfg['console_scripts'].strip().splitlines()

setup(
    name=lib, version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'],
    url=cfg['git_url'], license='Apache-2.0',
    long_description=Path('README.md').read_text(encoding='utf-8'),
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
