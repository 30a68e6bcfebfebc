"""The documentation names what there is: commands that the parsers take, flags, files, links, and the table of flags.

python -m tests.test_docs     # write docs/flags.md anew
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed.run

import download_datasets
import experiment_utils
from captioning.__main__ import as_flags
from captioning.config.flags import FLAGS, GROUPS, MODES, Flag
from captioning.config.settings import default_text, parse_flags
from captioning.io import DATA_SCRIPT, SCRIPT

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_COMMANDS = {"architecture.md", "data_licences.md", "log.md", "python.md"}  # test_python.py runs the last
PARSERS = {
    SCRIPT: parse_flags,
    **dict.fromkeys(("captioning", "flickr-caption"), lambda words: parse_flags(as_flags(words))),
    **dict.fromkeys((DATA_SCRIPT, "flickr-caption-data"), download_datasets.get_parser().parse_args),
    **dict.fromkeys(("experiment_utils.py", "experiment_utils"), experiment_utils.get_parser().parse_args),
}
OTHERS = {"curl", "find", "hf", "ip", "nvidia-smi", "source", "./setup.sh", "unshare", "-c", "pip", "venv"}
FOREIGN = "index-url local_addr logdir max_restarts rdzv_endpoint shutdown-timeout"  # flags of other programs

FLAGS_PAGE = f"""# All flags of `{SCRIPT}`

`python -m tests.test_docs` writes this page from the table in `captioning/config/flags.py`, and a test
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
    default = "" if flag.switch or flag.default is None else f"`{default_text(flag.default)}`"
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


def parts(page: Path) -> tuple[str, str]:
    """The blocks of shell of a page, and what is outside of all blocks."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in blocks} <= {"bash", "csv", "json", "nginx", "python"}
    return "".join(block for kind, block in blocks if kind == "bash"), re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page: in blocks, in sentences, and in a table whose head has their beginning."""
    shell, prose = parts(page)
    named = dict(re.findall(r'^([A-Z]+)="(.*?)"', shell, re.MULTILINE))
    lines = shell.splitlines() + re.findall(r"`((?:python|torchrun|flickr-|\$[A-Z])[^`]*\s[^`]*)`", prose)
    for table in re.findall(rf"`python {SCRIPT} \.\.\.` \|\n((?:\|.*\n)+)", prose):
        lines += [f"python {SCRIPT} {flags}" for flags in re.findall(r"^\|[^|]*\| `([^`]*)`", table, re.MULTILINE)]
    for line in lines:
        for _ in named:  # a name may stand for one that stands for another
            line = re.sub(r"\$([A-Z]+)", lambda name: named.get(name[1], name[0]), line)
        if not re.match(r"[A-Z]+=", line) and not line.endswith(" ..."):
            yield from filter(None, (shlex.split(part, comments=True) for part in re.split(r" (?:&&|\|) ", line)))


def check(command: list[str]) -> None:
    """Parse a command as its program does; fail where it refuses, or where nothing here knows the program."""
    program, *words = command
    if program == "torchrun":
        launch = torch.distributed.run.get_args_parser().parse_args(words)
        check([launch.training_script, *launch.training_script_args])
    elif program in ("python", "-m"):
        check(words)
    elif program in PARSERS and words[:2] != ["--encoder", "list"]:  # test_timm_encoders.py runs it
        try:
            PARSERS[program](words)
        except SystemExit:
            pytest.fail(f"refused: {shlex.join(command)}")
    elif program not in PARSERS:
        script = re.fullmatch(r"(benchmarks|tests)[/.]\w+(\.py)?", program)  # they exist, says another test
        assert script or program in OTHERS, f"unknown to this test: {shlex.join(command)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")  # what parsing reads
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "run_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = list(commands(page))
    assert bool(found) != (page.name in WITHOUT_COMMANDS)
    for command in found:
        check(command)


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", text)
    targets = [(page.parent / file if file else page, anchor) for file, anchor in links]
    assert [file for file, anchor in targets if not file.exists() or (anchor and anchor not in anchors(file))] == []
    named = re.findall(r"\b((?:captioning|tests|benchmarks|configs|docs)/[\w/]+\.(?:py|md|yaml|html|jpg))\b", text)
    assert page.name == "CHANGELOG.md" or [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_named_exist(page: Path) -> None:
    """Outside of code blocks, whose commands another test parses. The log names removed flags."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "setup.sh"]
    ours = {flag for path in scripts for flag in re.findall(r"""["' ]--([a-z][\w-]*)["')]""", path.read_text("utf-8"))}
    named = set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", parts(page)[1]))
    assert page.name == "log.md" or named <= ours.union(FLAGS, FOREIGN.split())


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(flags_page(), "utf-8")
