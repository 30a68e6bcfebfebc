"""The command `flickr-caption`, and `python -m captioning`: photos to caption, `serve`, or the main script's flags."""

import runpy
import sys

from captioning import __version__
from captioning.io import SCRIPT, program

HELP = """\
usage: {0} PHOTO FOLDER 'more/*.png' ... [flags]    caption photos
       {0} serve [flags]                            the same on a page in the browser
       {0} --mode MODE [flags]                      train, test, tune or export
       {0} --version

  --model_path RUN        a model of yours instead of the included captioner
  --output captions.csv   write a table (or .jsonl) instead of printing
  --json                  print each word's probability, and where the model looked
  --num_captions N        print several captions of each photo
  --help                  explain all flags"""


def as_flags(words: list[str]) -> list[str]:
    """Return the main script's flags for a command line that may begin with photos or with `serve`."""
    if not words or (words[0].startswith("-") and words[0] != "-"):
        return words
    return ["--mode", "serve", *words[1:]] if words[0] == "serve" else ["--mode", "caption", "--images", *words]


def main() -> None:
    """Run the main script as if it had been started by its path, which answers flags before PyTorch is imported."""
    words = sys.argv[1:]
    if not words:
        print(HELP.format(program()))
    elif words == ["--version"]:
        print(f"flickr-caption {__version__}")
    else:
        sys.argv[1:] = as_flags(words)
        runpy.run_module(SCRIPT.removesuffix(".py"), run_name="__main__")


if __name__ == "__main__":
    sys.argv[0] = "python -m captioning"  # what was typed, for messages
    main()
