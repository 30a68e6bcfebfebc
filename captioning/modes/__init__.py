"""One file per `--mode`. What captions photos is started from here, without PyTorch."""

from captioning.config.settings import Settings


def run_light_mode(settings: Settings) -> int:
    """Run one of `LIGHT_MODES`; return the exit code."""
    settings.set_log_level()
    if settings.mode == "caption":
        from captioning.modes.caption import caption_images

        return caption_images(settings)
    from captioning.modes.serve import serve_page

    return serve_page(settings)
