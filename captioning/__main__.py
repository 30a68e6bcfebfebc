"""The main script as pip installs it: `flickr-caption`, and `python -m captioning`."""

import runpy
import sys


def main() -> None:
    """Run the main script as if it had been started by its path, which answers flags before PyTorch is imported."""
    runpy.run_module("flickr_image_caption_with_pytorch_resnet_lstm", run_name="__main__")


if __name__ == "__main__":
    sys.argv[0] = "python -m captioning"  # what was typed, for messages
    main()
