"""What the site has beside the pages of docs/.

Files outside docs/ that pages link to are under their path in the repository. A page links to them
as GitHub does, by a path relative to itself. The site has them one folder nearer, because docs/ is
its root.

Notebooks become pages with the outputs that they hold; nothing is executed. A page links to the
notebook, which GitHub shows, and the site to the page.

The card of a genome has the genome's name in its heading. The page of an experiment has a heading
and its picture. Every picture links to its file, as on GitHub: on a phone it opens at its full
size.

Formulas are LaTeX between dollars or in a fence `math`, as GitHub shows them. Here they become
MathML, which browsers show without a script or a font from elsewhere.
"""

import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

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
    for path in sorted(ROOT.glob("docs/tutorials/*.ipynb")):
        body, resources = MarkdownExporter().from_filename(str(path), {"unique_key": path.stem})
        body += f"\nThis page is a notebook: [download it]({path.name}).\n"
        contents = {f"{path.stem}.md": body, **resources["outputs"]}
        for name, content in contents.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    source = page.file.abs_src_path
    if source and not source.startswith(config.docs_dir):
        markdown = re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
        if page.file.src_uri.startswith("keras_blur/genomes/"):
            return markdown.replace("# ", f"# {page.file.name}: ", 1)
        if page.file.src_uri.startswith("examples/paper/results/"):
            title = page.file.name.replace("_", " ").replace("sgd", "SGD")
            return f"# {title[0].upper()}{title[1:]}\n\n{markdown}\n![{title}]({page.file.name}.png)\n"
        return markdown
    markdown = markdown.replace("```python notest", "```python")  # a mark for the tests
    up = "../" * page.file.src_uri.count("/")
    markdown = _with_formulas(markdown) if "```math" in markdown else markdown
    markdown = markdown.replace(f"]({up}../", f"]({up}")
    return re.sub(r"(\]\((?:\.\./)*tutorials/\w+)\.ipynb\)", r"\1.md)", markdown)


def _with_formulas(markdown):
    """A page whose formulas are MathML. A number in `\\tag` stands at the right."""

    def block(found):
        formula, tag, number = found.group(1).partition(r"\tag{")
        number = f"<span>({number.rpartition('}')[0]})</span>" if tag else ""
        return f'<div class="formula">{convert(formula, display="block")}{number}</div>'

    markdown = re.sub(r"^```math\n(.*?)^```$", block, markdown, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)  # code stays as it is
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"\$([^$]+)\$", lambda found: f"<span>{convert(found.group(1))}</span>", parts[place])
    return "".join(parts)


def on_page_content(html, **kwargs):
    return re.sub(r'(?<!">)(<img [^>]*src="([^"]+\.png)"[^>]*>)', r'<a href="\2">\1</a>', html)
