"""The project as pip installs it: a wheel, built and unpacked without a network, and run from an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from captioning import __version__
from captioning.io import DATA_SCRIPT, install_command, program
from captioning.runs.directories import reproducing_command

ROOT = Path(__file__).resolve().parent.parent


def by_name(lines: list[str]) -> dict[str, Requirement]:
    return {need.name.lower().replace("_", "-"): need for need in map(Requirement, lines)}


def pins(extra: str) -> dict[str, Requirement]:
    """What an extra's requirements file names."""
    text = (ROOT / f"requirements{extra and '-'}{extra}.txt").read_text("utf-8")
    return by_name([line.partition("  #")[0] for line in text.splitlines() if not line.startswith("#")])


TORCH, TORCHVISION = (str(pins("")[name].specifier).removeprefix("==") for name in ("torch", "torchvision"))


def test_ranges_have_bounds_that_hold_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    light, extras, everything = project["dependencies"], project["optional-dependencies"], pins("")
    assert by_name([*light, *extras["train"]]).keys() == everything.keys() and "torch" not in by_name(light)
    for extra, lines in {"": light, **extras}.items():
        pinned = everything if extra in ("", "train") else everything | pins(extra)
        assert extra in ("", "train") or pins(extra).keys() <= by_name(lines).keys()
        for name, need in by_name(lines).items():
            (pin,) = (Version(each.version) for each in pinned[name].specifier)
            assert pinned[name].marker == need.marker and need.specifier.contains(pin), f"{need}, but {pin} is pinned"
            assert {(each.operator, each.version) for each in need.specifier} >= {("<", str(pin.major + 1))}
            assert {each.operator for each in need.specifier} == {">=", "<"}, need


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the installed package, and below it `bin` with the commands."""
    folder = tmp_path_factory.mktemp("package")
    # Built from a copy, as `pip wheel` leaves its work in the folder that it builds.
    source, ignore = folder / "source", shutil.ignore_patterns("__pycache__")
    for name in ("captioning", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for pattern in ("*.py", "pyproject.toml", "README.md", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-index", "--no-deps"]
    subprocess.run([*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--no-compile", "--target", folder / "target", wheel], check=True)
    return folder / "target"


def run(installed: Path, place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an installed command, or Python with these words, in a folder."""
    command = [shutil.which(words[0], path=installed / "bin") or words[0], *words[1:]]
    if words[0].startswith("-"):
        command = [sys.executable, *words]
    environment = os.environ | {"PYTHONPATH": str(installed)} | environment
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, encoding="utf-8")


def test_every_file_of_the_package_is_in_the_wheel(installed: Path) -> None:
    ours = {path.relative_to(ROOT) for path in (ROOT / "captioning").rglob("*") if path.is_file()}
    there = {path.relative_to(installed) for path in (installed / "captioning").rglob("*")}
    ours |= {Path("captioning", "recipes", path.name) for path in (ROOT / "configs").iterdir()}
    assert {path for path in ours if path.suffix != ".pyc"} - there == set()


def test_commands_answer_before_pytorch_is_imported(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise SystemError('PyTorch was imported')")
    broken = os.pathsep.join([str(tmp_path / "broken"), str(installed)])
    for words in (["flickr-caption"], ["flickr-caption-data"], ["-m", "captioning"]):
        name = "python -m captioning" if words[0] == "-m" else words[0]
        done = run(installed, tmp_path, *words, "--help", PYTHONPATH=broken)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {name} [")
        done = run(installed, tmp_path, *words, "--decodr", "lstm", PYTHONPATH=broken)
        assert done.returncode == 2 and f"{name}: error: " in done.stderr and "Traceback" not in done.stderr
    done = run(installed, tmp_path, "flickr-caption", PYTHONPATH=broken)
    assert done.returncode == 0 and done.stdout.startswith("usage: flickr-caption PHOTO") and done.stderr == ""
    done = run(installed, tmp_path, "flickr-caption", "--version", PYTHONPATH=broken)
    assert done.stdout == f"flickr-caption {__version__}\n"
    done = run(installed, tmp_path, "flickr-caption", "--config", "own_photos", "--top_p", "1", PYTHONPATH=broken)
    assert "--top_p has no effect with --mode train" in done.stderr  # the recipe is found
    done = run(installed, tmp_path, "flickr-caption", "--config", "own_photo", PYTHONPATH=broken)
    assert done.returncode == 2 and "the name of a recipe: flickr30k_attention_cpu, " in done.stderr
    done = run(installed, tmp_path, "flickr-caption-data", "--dataset", "demo", "--verify-only", PYTHONPATH=broken)
    assert done.returncode == 1 and "`flickr-caption-data --dataset demo --data_dir data` gets" in done.stdout


def test_it_captions_with_the_included_captioner(installed: Path, tmp_path: Path, tiny: Path) -> None:
    photo = str(tiny / "Images" / "p03.jpg")
    done = run(installed, tmp_path, "flickr-caption", photo, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{photo}\ta ") and "Using flickr8k_attention" in done.stderr


@pytest.mark.parametrize(
    ("words", "module", "function", "images"),
    [
        ("a.jpg folder --json", "caption", "caption_images", ["a.jpg", "folder"]),
        ("- --quiet", "caption", "caption_images", ["-"]),
        ("--mode caption --images a.jpg", "caption", "caption_images", ["a.jpg"]),
        ("serve --port 7861", "serve", "serve_page", None),
    ],
)
def test_captions_and_the_page_start_without_pytorch(words, module, function, images):
    code = f"""
import sys, types
module = sys.modules["captioning.modes.{module}"] = types.ModuleType("{module}")
module.{function} = lambda settings: print(settings.images, "torch" in sys.modules) or 7
sys.argv[0] = "flickr-caption"
from captioning.__main__ import main
main()"""
    done = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, f"{images} False\n"), done.stderr


def test_a_light_installation_says_which_extra_trains(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-S", "-m", "captioning", "--dataset_type", "demo")  # -S: without site-packages
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "has no package torch. Training and" in done.stderr
    assert 'the extra `train`: python -m pip install "flickr-caption[train]"' in done.stderr


def test_messages_print_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--resume", "a run"]
    for started, train, data in (
        ("/usr/bin/flickr-caption", "flickr-caption", "flickr-caption-data"),
        ("flickr-caption.exe", "flickr-caption", "flickr-caption-data"),
        ("bin/flickr-caption-data", "flickr-caption", "flickr-caption-data"),
        ("python -m captioning", "python -m captioning", "python -m download_datasets"),
        ("-c", "python flickr_image_caption_with_pytorch_resnet_lstm.py", "python download_datasets.py"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert reproducing_command(words) == f"{train} --resume 'a run'" and program(DATA_SCRIPT) == data
    monkeypatch.setattr("captioning.io.__file__", "/site-packages/captioning/io.py")
    assert program() == "flickr-caption"
    assert install_command("hub") == 'python -m pip install "flickr-caption[hub]"'
    assert install_command() == 'python -m pip install "flickr-caption[train]"'


@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("flickr_image_caption_with_pytorch_resnet_lstm.py --dry_run", "torch"),
        ("flickr_image_caption_with_pytorch_resnet_lstm.py --encoder list", "torch"),
        ("flickr_image_caption_with_pytorch_resnet_lstm.py --config own_photos", "yaml"),
        ("download_datasets.py --dataset demo", "filelock"),
    ],
)
def test_a_python_without_the_packages_says_how_to_get_them(tmp_path, command, package):
    script, *flags = command.split()
    bare = [sys.executable, "-S", ROOT / script, *flags]  # -S: without site-packages
    ended = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and f"has no package {package}" in ended.stderr
    assert "python -m pip install -r requirements.txt" in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PyPI's PyTorch brings CUDA on Linux alone")
@pytest.mark.parametrize(("gpu", "reachable"), [(False, True), (False, False), (True, True)])
def test_setup_installs_cuda_only_where_there_is_a_gpu(tmp_path, gpu, reachable):
    shutil.copy(ROOT / "setup.sh", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    tools, pip_calls = tmp_path / "tools", tmp_path / "pip_calls"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "uname", "cat", "cksum", "rm", "awk", "sed", "grep"):
        (tools / name).symlink_to(str(shutil.which(name)))
    scripts = {
        "tools/df": "#!/bin/sh\nprintf 'head\\n- - - 99999999\\n'",
        ".venv/pyvenv.cfg": "",
        ".venv/bin/python": f"""#!/bin/sh
            case "$*" in
                *version_info*) echo 3.12 ;;
                *find_spec*) exit 1 ;;
                *"pip install"*) echo "$@" >>{pip_calls}; case "$*" in *--index-url*) exit {int(not reachable)} ;; esac ;;
            esac""",
    }
    for name, text in (scripts | ({"tools/nvidia-smi": "#!/bin/sh"} if gpu else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([tmp_path / "setup.sh"], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *torch, rest = pip_calls.read_text().splitlines()
    assert rest.endswith("-r requirements.txt")
    assert [line.partition("--index-url ")[2] for line in torch] == (
        [] if gpu else [f"https://download.pytorch.org/whl/cpu torch=={TORCH}+cpu torchvision=={TORCHVISION}+cpu"]
    )
    assert ("about 6.7 GB, with CUDA" if gpu else "about 1.9 GB") in done.stdout.splitlines()[0]
    assert ("installing PyPI's PyTorch with CUDA instead, about 6.7 GB" in done.stdout) == (not reachable)


def test_documents_name_the_pytorch_that_is_pinned() -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "README.md", ROOT / "docs" / "troubleshooting.md"))
    assert set(re.findall(r"\btorch(?:vision)?==[\d.]+", pages)) == {f"torch=={TORCH}", f"torchvision=={TORCHVISION}"}
