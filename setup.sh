#!/usr/bin/env bash
# Installs what the project needs into .venv, beside this script. Runs on Linux and macOS (bash 3.2 and newer).
# What it does in plain pip:  python3 -m venv .venv && .venv/bin/pip install -r requirements.txt
# On Linux without an NVIDIA GPU, PyTorch comes from its own index, without CUDA.
set -euo pipefail

usage() {
    cat <<'END'
usage: ./setup.sh [demo|test] [--python PATH] [--again]

  ./setup.sh          install the packages of requirements.txt into .venv
  ./setup.sh demo     install, caption photographs, draw a small data set, train on it, test, and say what to run next
  ./setup.sh test     install requirements-dev.txt too (with the page's packages), then run ruff, mypy and pytest

  --python PATH       the Python to build .venv with, 3.11 or newer (also: the variable PYTHON)
  --again             demo: train again, even where a finished demo run lies already
  -h, --help          this text

All of it can be run again: what is there already is used.
END
}

TRAINER=flickr_image_caption_with_pytorch_resnet_lstm.py
CPU_INDEX=https://download.pytorch.org/whl/cpu
DEMO_RUNS=saved_models/demo/efficientnet_lite0_attention

# The demo's commands, to be changed to taste.
draw_demo_data() {
    run download_datasets.py --dataset demo
}
train_demo() {
    run "$TRAINER" --dataset_type demo --encoder efficientnet_lite0 --decoder attention \
        --epochs 20 --batch_size 64 --learning_rate 0.002 \
        --embed_size 256 --hidden_size 256 --num_layers 1 --attention_dim 256 --freq_threshold 1 \
        --use_scheduler --scheduler_type one_cycle --warmup_epochs 2 \
        --save_attention_viz --advanced_attention_viz
}
test_demo() { # the run's directory
    run "$TRAINER" --mode test --model_path "$1"
}

# Photographs that a package on PyPI brings along: the astronaut is in the public domain, the photographer and the cat
# are CC0. The captioner comes with the project.
caption_photos() {
    local photos=.venv/photos
    if ! [ -d "$photos/skimage/data" ] && ! pip_install --no-deps --target "$photos" scikit-image==0.26.0; then
        say "note: pip could not install scikit-image, whose photographs come first in the demo (see .venv/pip.log)"
        return
    fi
    run "$TRAINER" --mode caption --save_attention_viz --images "$photos"/skimage/data/{astronaut,camera,chelsea}.png
}

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

pip_install() {
    PIP_USER=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input "$@" \
        >.venv/pip.log 2>&1 </dev/null
}

# Runs a Python script of the project, and shows the command as one would type it.
run() {
    printf '\n$ .venv/bin/python'
    printf ' %s' "$@"
    printf '\n'
    .venv/bin/python "$@"
}

# "3.12" for an interpreter that runs (a pyenv shim may be there and not run), else nothing.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

new_enough() { # 3.12
    [ "${1%%.*}" -gt 3 ] || { [ "${1%%.*}" -eq 3 ] && [ "${1#*.}" -ge 11 ]; }
}

# Sets `python` to the interpreter that .venv is to be built with.
find_python() {
    local candidate version too_old=''
    if [ -n "$wanted_python" ]; then
        version=$(version_of "$wanted_python")
        [ -n "$version" ] || fail "$wanted_python is not a Python that runs; name one that is 3.11 or newer"
        new_enough "$version" || fail "$wanted_python is Python $version; 3.11 or newer is needed"
        python=$wanted_python
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        version=$(version_of "$candidate")
        [ -n "$version" ] || continue
        if new_enough "$version"; then
            python=$candidate
            return
        fi
        too_old=" (python3 is $version)"
    done
    fail "no Python 3.11 or newer found$too_old; install one, or name it: ./setup.sh --python PATH"
}

make_venv() {
    local version
    if [ -e .venv ] && [ ! -f .venv/pyvenv.cfg ] && [ -n "$(ls -A .venv)" ]; then
        fail "$PWD/.venv is there but is no virtual environment; move it out of the way"
    fi
    if [ -f .venv/pyvenv.cfg ]; then
        version=$(version_of .venv/bin/python)
        if [ -n "$version" ]; then
            new_enough "$version" || fail ".venv is Python $version; remove it (rm -r .venv) and start again"
            if [ "$python_typed" = yes ]; then
                say "Using the .venv that is there (Python $version); to build it with another Python, rm -r .venv first."
            fi
            # An interrupted build, or uv's, has no pip yet.
            if .venv/bin/python -m pip --version >/dev/null 2>&1 ||
                .venv/bin/python -m ensurepip >/dev/null 2>&1; then
                return
            fi
            say ".venv has no pip that works; building it again."
        else
            say ".venv is broken (its Python does not run any more); building it again."
        fi
    fi
    find_python
    version=$(version_of "$python")
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$python lacks the venv module; on Debian and Ubuntu: sudo apt-get install python$version-venv"
    require_disk_space
    say "Building .venv with $python (Python $version)."
    "$python" -m venv --clear .venv || fail "$python could not build .venv; what it said stands above"
}

require_disk_space() {
    local need=3 free_kb
    if [ "$cuda" = yes ]; then need=8; fi
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $((need * 1024 * 1024)) ] ||
        fail "$((free_kb / 1024 / 1024)) GB are free in $PWD; installing needs $need GB"
}

# From PyTorch's own index alone: nobody else's versions end in +cpu.
install_cpu_torch() {
    # shellcheck disable=SC2046 # two words
    pip_install --no-deps --timeout 5 --retries 0 --index-url "$CPU_INDEX" \
        $(sed -nE 's/^(torch(vision)?==[0-9.]+).*/\1+cpu/p' requirements.txt)
}

checksum() { cat requirements*.txt | cksum; } # they include one another

# Installs a requirements file unless the stamp in .venv says that this was done with these very files.
install() { # requirements file
    local file=$1 stamp=.venv/installed-$1 log=.venv/pip.log sum size='about 1.9 GB'
    sum=$(checksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ]; then return; fi
    rm -f .venv/installed-* # so that an interrupted install is done again
    if .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
        say "Installing what has changed in $file ..."
    else
        require_disk_space
        if [ "$cuda" = yes ]; then size='about 6.7 GB, with CUDA'; fi
        say "Installing the packages of $file ($size, once; this takes minutes) ..."
        if [ "$(uname -s)" = Linux ] && [ "$cuda" = no ] && ! install_cpu_torch; then
            cuda=yes
            say "$CPU_INDEX cannot be used: installing PyPI's PyTorch with CUDA instead, about 6.7 GB in all."
            require_disk_space
        fi
    fi
    if ! pip_install -r "$file"; then
        cat "$log" >&2
        if grep -q 'No matching distribution' "$log"; then
            say "hint: no network, or a package is not made for Python $(version_of .venv/bin/python); to try another: rm -r .venv; ./setup.sh --python PATH" >&2
        fi
        say "error: pip could not install $file; what it said stands above and in .venv/pip.log. Run ./setup.sh again to go on." >&2
        exit 1
    fi
    checksum >.venv/installed-requirements.txt # requirements-dev.txt includes it
    printf '%s\n' "$sum" >"$stamp"
}

# Prints the newest finished demo run's directory, or nothing.
newest_demo_run() {
    local summary newest=''
    for summary in "$DEMO_RUNS"/*/run_summary.txt; do
        [ -f "$summary" ] && [ -f "${summary%/*}/best.pt" ] || continue
        if [ -z "$newest" ] || [ "$summary" -nt "$newest" ]; then newest=$summary; fi
    done
    if [ -n "$newest" ]; then printf '%s\n' "${newest%/*}"; fi
}

demo() {
    local run_directory
    caption_photos
    draw_demo_data
    run_directory=$(newest_demo_run)
    if [ -n "$run_directory" ] && [ "$again" = no ]; then
        printf '\n%s\n' "Using the demo run that is there; ./setup.sh demo --again trains another."
    else
        train_demo
        run_directory=$(newest_demo_run)
        [ -n "$run_directory" ] || { say "error: training left no finished run in $DEMO_RUNS" >&2; exit 1; }
    fi
    test_demo "$run_directory"
    cat <<END

What next

  Captions of photographs are at the top; where the captioner looked: captions_viz/
  (it learned from Flickr8k, which has people and dogs, and takes a cat for a dog)
  Your own photos:      python $TRAINER --mode caption --images PHOTO.jpg

  Where it all lies:    $run_directory
  Attention pictures:   $run_directory/*attention_viz_sample_*.png
  Scores and captions:  $run_directory/test_metrics.json, test_captions_*.json
  The drawn images:     data/demo

  The same on photographs, Flickr8k (about 1.1 GB to download):
    source .venv/bin/activate
    python download_datasets.py --dataset flickr8k
    python $TRAINER --config configs/flickr8k_attention_cpu.yaml
END
}

checks() {
    local failed=''
    say "ruff check ." && .venv/bin/python -m ruff check . || failed="$failed ruff"
    say "mypy" && .venv/bin/python -m mypy || failed="$failed mypy"
    say "pytest -n 2" && OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal --durations=10 || failed="$failed pytest"
    if [ -n "$failed" ]; then
        say "error: failed:$failed" >&2
        exit 1
    fi
}

task=install
again=no
wanted_python=${PYTHON:-}
python_typed=no
python=
cuda=no
if [ "$(uname -s)" = Linux ] && command -v nvidia-smi >/dev/null; then cuda=yes; fi
while [ $# -gt 0 ]; do
    case $1 in
        demo | test)
            if [ "$task" != install ]; then usage >&2; exit 2; fi
            task=$1
            ;;
        --python=?*) wanted_python=${1#--python=} python_typed=yes ;;
        --python)
            if [ -z "${2:-}" ]; then usage >&2; fail "--python wants the path of a Python"; fi
            wanted_python=$2 python_typed=yes
            shift
            ;;
        --again) again=yes ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown word: $1" ;;
    esac
    shift
done
if [ "$again" = yes ] && [ "$task" != demo ]; then usage >&2; fail "--again goes with demo"; fi
case $wanted_python in
    /*) ;;
    */*) wanted_python=$PWD/$wanted_python ;; # relative to where the user stands, not to this script
esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

make_venv
install requirements.txt
case $task in
    install)
        say "Everything is installed. Now: source .venv/bin/activate, or ./setup.sh demo"
        ;;
    demo) demo ;;
    test)
        install requirements-dev.txt
        checks
        ;;
esac
