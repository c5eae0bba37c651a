"""Files outside docs/ that pages link to become part of the site, under their path in the
repository.

A page links to them as GitHub does, by a path relative to itself. The site has them one folder
nearer, because docs/ is its root.
"""

import pathlib

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
PUBLISHED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/*.py",
    "examples/paper/*.py",
    "examples/paper/*.md",
    "examples/paper/results/*",
    "keras_blur/genomes/*.json",
    "keras_blur/genomes/*.md",
    "tests/conformance/README.md",
    "tpu/*.md",
)


def on_files(files, config):
    for pattern in PUBLISHED:
        for path in sorted(ROOT.glob(pattern)):
            source = path.relative_to(ROOT).as_posix()
            files.append(File(source, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    if not page.file.abs_src_path.startswith(config.docs_dir):
        return markdown
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../", f"]({up}")
