"""The pages of docs/: their python blocks run; links, pictures, commands and public names exist."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import matplotlib
import pytest
from marks import slow_but

import keras_blur
from keras_blur import cli
from keras_blur.cli.flags import Flags

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
OTHERS = ["README.md", "CONTRIBUTING.md", "tpu/*.md", "examples/paper/RESULTS.md", "keras_blur/genomes/*.md"]
ALL = [*PAGES, *(path for pattern in OTHERS for path in sorted(ROOT.glob(pattern)))]
NOT_RUN = r"<!-- not run: [^\n]+ -->\n"  # before a block, with the reason
FILES = (
    r"(?<![\w/-])((?:keras_blur|tests|examples|benchmarks|tpu|docs)/[\w./-]+\.(?:py|md|json|txt|sh|png)|\.ci/run|setup\.cfg)"
)
PLACEHOLDER = r"\bNAME\.py$|X\.Y\.Z|^docs/over_versions\.png$"  # stands for a file, or is written at a release
PACKAGES = ("genomes", "layers", "learners", "meta", "bilevel", "tasks", "report")


def name_of(path):
    return str(path.relative_to(ROOT))


def python_blocks(text):
    text = re.sub(NOT_RUN + r"```python\n.*?\n```", "", text, flags=re.S)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


WITH_CODE = {name_of(path): path for path in PAGES if python_blocks(path.read_text())}
QUICK = ["docs/getting_started.md", "docs/guides/use_a_genome.md"]


@pytest.mark.parametrize("name", slow_but(QUICK, WITH_CODE))
def test_python_blocks_run_in_order(name, tmp_path, monkeypatch):
    path = WITH_CODE[name]
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict = {"__name__": f"page_{path.stem}"}
    for block in python_blocks(path.read_text()):
        exec(compile(block, name_of(path), "exec"), names)


def test_pages_with_code_are_found():
    assert {"getting_started", "use_a_genome", "convert", "train_a_genome", "compare", "extend"} <= {
        path.stem for path in WITH_CODE.values()
    }


def anchors(path):
    """The anchors of a page's headings, as mkdocs makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_and_pictures_exist(path):
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S))
    for link in found:
        assert not link.startswith("http"), link
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.is_file() or (there.is_dir() and path not in PAGES), link  # GitHub shows a folder, the site does not
        if there.suffix == ".png":
            assert there.stat().st_size > 1000
        if anchor:
            assert anchor in anchors(there), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in PAGES:
        assert re.search(rf"(: |- ){re.escape(str(path.relative_to(DOCS)))}$", navigation, re.M), path


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_api_reference(package):
    module = importlib.import_module(f"keras_blur.{package}")
    text = (DOCS / "api" / f"{package}.md").read_text()
    shown = set(re.findall(rf"^::: keras_blur\.{package}\.(\w+)$", text, re.M))
    public = getattr(module, "__all__", None)
    if public is None:  # genomes: what is defined there
        public = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    assert shown == {name for name in public if not name.startswith("_")}


def test_every_name_of_the_package_is_in_the_api_reference():
    index = (DOCS / "api" / "index.md").read_text()
    text = (DOCS / "api" / "keras_blur.md").read_text()
    for name in keras_blur.__all__:
        if name in PACKAGES:
            assert f"[`keras_blur.{name}`]({name}.md)" in index
        else:
            assert re.search(rf"^::: keras_blur\.{name}$|`keras_blur\.{name}`", text, re.M), name


def commands(text, program):
    """Commands of a program in code blocks and in inline code, without what stands before them."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [*lines, *(code.replace("\n", " ") for code in inline)]:
        found = re.match(rf"(?:until )?(?:\w+=\S+ )*(?:\S+/bin/)?{program} (.*)", line)
        if found:
            yield found[1]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_commands_of_the_command_line_have_their_flags(path):
    for text in commands(path.read_text(), "keras-blur"):
        command, *arguments = shlex.split(text, comments=True)
        if command in ("COMMAND", "--help", "--version"):
            continue
        assert command in cli.COMMANDS, text
        flags = Flags()
        importlib.import_module(f"keras_blur.cli.{command.replace('-', '_')}").define_flags(flags)
        for argument in arguments:
            if argument.startswith("--") and argument != "--help":
                flag = argument[2:].partition("=")[0]
                assert flag in flags.values() or isinstance(flags.values().get(flag.removeprefix("no")), bool), text


DEFINED = r"""(?:flags\.(?:DEFINE_)?(\w+)\(\s*|add_argument\((?:"-\w", )?)["'](?:--)?(\w+)["']"""


def flags_of(script):
    """The flags of a script, of the modules of its folder and of the commands that it imports: the
    name of each, and the kind that defines it."""
    text = script.read_text()
    commands = ROOT / "keras_blur" / "cli"
    names = [(script.parent, name) for name in re.findall(r"^(?:from|import) (\w+)", text, re.M)]
    for name in re.findall(r"^from keras_blur\.cli import (\w+)", text, re.M):
        names += [(commands, name), (commands, "common")]
    paths = [folder / f"{name}.py" for folder, name in names]
    sources = [text, *(path.read_text() for path in paths if path.is_file())]
    return {name: kind for source in sources for kind, name in re.findall(DEFINED, source)}


def defines(script, flag):
    """Whether a script has a flag; `noNAME` is one of a boolean flag alone."""
    found = flags_of(script)
    return flag in found or found.get(flag.removeprefix("no")) in ("boolean", "bool", "switch")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_python_commands_have_their_file_and_flags(path):
    for text in commands(path.read_text(), "python"):
        if text.startswith(("-m ", "-c ", "...")) or "NAME.py" in text:
            continue
        script, *arguments = shlex.split(text, comments=True)
        assert (ROOT / script).is_file(), text
        for argument in arguments:
            if argument.startswith("--"):
                flag = argument[2:].partition("=")[0]
                assert defines(ROOT / script, flag), (text, flag)


def test_flags_are_seen(tmp_path):
    script = tmp_path / "script.py"
    script.write_text('flags.DEFINE_boolean("quick", False, "")\nflags.DEFINE_string("json", None, "")\nx = {"seed": 1}\n')
    asked = ("quick", "noquick", "json", "nojson", "seed")
    assert [flag for flag in asked if defines(script, flag)] == ["quick", "noquick", "json"]
    assert defines(ROOT / "tpu" / "train.py", "data_dir")
    assert defines(ROOT / "tpu" / "verify.py", "noexecute")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_that_a_page_names_exist(path):
    for file in re.findall(FILES, path.read_text()):
        assert (ROOT / file).exists() or re.search(PLACEHOLDER, file), file


def test_the_site_builds_and_asks_no_other_host(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.glob("**/*.html"):
        assert not re.search(r"""<(?:script|img|link|iframe)[^>]+(?:src|href)=["'](?:https?:)?//""", page.read_text()), page
    theory = (tmp_path / "theory.html").read_text()
    assert theory.count("<math") > 30  # no formula is left as LaTeX
    assert not re.search(r"\\(?:tag|leftarrow|sum)|\$", theory.partition("<article")[2])
