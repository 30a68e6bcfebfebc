"""The documentation names what there is: flags, commands, files, and a table of flags made from the program's own.

python -m tests.test_docs     # write docs/flags.md anew
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioning.flags import FLAGS, GONE, GROUPS, MODES, Flag
from captioning.io import SCRIPT
from captioning.settings import parse_flags, shown

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {  # flags of other programs that the pages name
    "torchrun": "nproc_per_node nnodes max_restarts rdzv_backend rdzv_endpoint rdzv_id shutdown-timeout standalone "
    "local_addr master_addr",
    "unshare": "map-root-user net",
    "curl": "data-binary",
    "pip": "index-url",
    "tensorboard": "logdir",
    "git": "diff-filter stat",
}  # fmt: skip

FLAGS_PAGE = f"""# All flags of `{SCRIPT}`

`python -m tests.test_docs` writes this page from the table in `captioning/flags.py`, and a test
compares the two. `--help` prints the same. In a `--config` file each flag is a line, such as
`epochs: 15`.

**Modes** are those that read a flag: a flag that is given with another mode is an error. **With a
checkpoint** says what `--model_path` does to a flag. A `fixed` one comes from the checkpoint, and
another value is an error. A `kept` one comes from the checkpoint unless it is given. For a `train`
one the same holds in training alone. **With `--resume`** only the flags marked `yes` may be given,
since an interrupted run keeps its original settings.
"""


def flag_row(flag: Flag) -> str:
    """One line of the page."""
    value = (
        "" if flag.switch else " " + (flag.metavar or "\\|".join(flag.choices) or flag.name.rpartition("_")[2].upper())
    )
    default = "" if flag.switch or flag.default is None else f"`{shown(flag.default)}`"
    modes = "all" if flag.modes == MODES else ", ".join(flag.modes)
    notes = [flag.help.replace("|", "\\|").replace("<", "&lt;"), *([f"Needs `--{flag.needs}`."] if flag.needs else [])]
    cells = [f"`--{flag.name}{value}{' ...' if flag.many else ''}`", default, ". ".join(notes), modes, flag.checkpoint]
    return "| " + " | ".join([*cells, "yes" if flag.resume else ""]) + " |"


def flags_page() -> str:
    """The content of docs/flags.md."""
    head = "| flag | default | what it does | modes | with a checkpoint | with `--resume` |\n|---|---|---|---|---|---|"
    tables = ["\n".join([f"## {title}", "", head, *map(flag_row, flags)]) for title, flags in GROUPS.items()]
    return "\n\n".join([FLAGS_PAGE.rstrip(), *tables]) + "\n"


def test_the_page_of_flags_is_the_programs_table() -> None:
    written = (ROOT / "docs" / "flags.md").read_text("utf-8")
    assert written == flags_page(), "write it anew: python -m tests.test_docs"


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", page.read_text("utf-8"))
    targets = [(page.parent / file if file else page, anchor) for file, anchor in links]
    assert [
        target for target in targets if not target[0].exists() or (target[1] and target[1] not in anchors(target[0]))
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    """Those of the repository's own folders."""
    named = re.findall(
        r"\b((?:captioning|tests|benchmarks|configs|docs)/[\w/]+\.(?:py|md|yaml|html|jpg))\b", page.read_text("utf-8")
    )
    assert sorted({name for name in named if not (ROOT / name).exists()}) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_named_exist(page: Path) -> None:
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "setup.sh"]
    ours = {flag for path in scripts for flag in re.findall(r"""["' ]--([a-z][\w-]*)["')]""", path.read_text("utf-8"))}
    known = ours.union(FLAGS, GONE, *map(str.split, FOREIGN.values()))
    assert set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", page.read_text("utf-8"))) - known == set()


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each command of the main script in the code blocks of a page, $NAMES being what it says."""
    text = page.read_text("utf-8")
    named = dict(re.findall(r'^([A-Z]+)="(.*?)"', text, re.MULTILINE))
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        block = block.replace("\\\n", " ")
        for _ in named:  # a name may stand for one that stands for another
            block = re.sub(r"\$([A-Z]+)", lambda name: named.get(name[1], name[0]), block)
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if SCRIPT in words and "..." not in line:
                yield words[words.index(SCRIPT) + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser and the rules on flags that go together; what reads a run or a file that is not here is left out."""
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        file = Path(words[words.index("--config") + 1]) if "--config" in words else None
        if "--resume" not in words and (file is None or file.is_file()):
            parse_flags(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_wraps_at_100_characters(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 100 and not line.startswith(("|", "    ", "!["))]
    assert long == []


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(flags_page(), "utf-8")
