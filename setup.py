"""Packaging: every field comes from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser(delimiters=['='])
settings.read('settings.ini', encoding='utf-8')
field = settings['DEFAULT']
status = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}
pythons = [f'3.{minor}' for minor in range(int(field['min_python'].split('.')[1]), 14)]
readme = Path('README.md')

setup(
    name=field['lib_name'],
    version=field['version'],
    description=field['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else field['description'],
    long_description_content_type='text/markdown',
    author=field['author'],
    author_email=field['author_email'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=field['keywords'].split(),
    classifiers=[
        f"Development Status :: {field['status']} - {status[field['status']]}",
        f"Intended Audience :: {field['audience']}",
        f"Natural Language :: {field['language']}",
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        *(f'Programming Language :: Python :: {python}' for python in pythons)],
    python_requires='>=' + field['min_python'],
    install_requires=field['requirements'].split(),
    extras_require={'dev': field['dev_requirements'].split(), 'explore': field['explore_requirements'].split()},
    entry_points={'console_scripts': field['console_scripts'].split()},
    # The measured results live in data/ and travel inside the package, so that what plots them works without a checkout.
    packages=['snapvideo_nb', 'snapvideo_nb.results'],
    package_dir={'snapvideo_nb.results': 'data/results'},
    package_data={'snapvideo_nb': ['weights/**/*', '*.csv'], 'snapvideo_nb.results': ['**/*.json']},
    zip_safe=False,
)
