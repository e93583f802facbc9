"""The page: a photo in, its caption out, and word by word where the model looked."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from captioner.errors import report

try:
    # First: imports gradio, whatever proxies are set.
    from captioner import web as viewer  # noqa: I001
    import gradio as gr

    from captioner.inference.captioner import Captioner
    from captioner.web.link_preview import LinkPreview
    from captioner.web.server import CLEANUP_SECONDS, FILE_SECONDS, serve
except (Exception, KeyboardInterrupt) as error:
    sys.exit(report("app.py", error))


TITLE, SENTENCE = "Captions with attention", "See, word by word, where the model looked."


def build_demo(captioner: Captioner) -> gr.Blocks:
    """Return the page around a loaded captioner."""
    handlers = viewer.Handlers(captioner, viewer.example_photos())
    first = handlers.examples[0]

    def export(event: viewer.ExportRequest) -> str:
        data, name = handlers.export(event)
        return page.save(data, name).path

    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(CLEANUP_SECONDS, FILE_SECONDS)
    ) as demo:
        gr.Markdown(f"# {TITLE}\n{SENTENCE}", elem_id="title")
        page = viewer.AttentionViewer(viewer.View(first.caption, examples=handlers.examples))
        with gr.Accordion("How it works", open=False):
            checkpoint = captioner.checkpoint
            gr.Markdown(
                viewer.how_it_works(
                    checkpoint.model.config,
                    checkpoint.encoder,
                    has_confidence=checkpoint.confidence is not None,
                )
            )
        with gr.Accordion("Training data and limits", open=False, elem_id="card"):
            gr.Markdown(captioner.card)
        file = gr.File(visible=False)
        photo = viewer.PhotoInput(label="photo", visible=False)
        options, json = gr.JSON({}, label="options", visible=False), gr.JSON(visible=False)
        button = gr.Button(visible=False)

        # Two at once, because file I/O leaves a core idle.
        button.click(handlers.api, [photo, options], json, api_name="caption", concurrency_limit=2)
        # One at a time, in order, so an older answer never arrives after a newer one.
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        model |= {"api_visibility": "private", "show_progress": "hidden"}
        caption_event = page.caption(
            handlers.caption, None, page, api_name="page_caption", trigger_mode="multiple", **model
        )
        caption_event.failure(None, None, None, js=viewer.ON_REQUEST_FAILED, **model)
        page.explain(
            handlers.explain, None, page, api_name="page_explain", trigger_mode="multiple", **model
        )
        cover_event = page.cover(
            handlers.cover, None, page, api_name="page_cover", trigger_mode="multiple", **model
        )
        cover_event.failure(None, None, None, js=viewer.ON_COVER_FAILED, **model)
        export_event = page.export(export, None, file, api_name="page_export", **model)
        export_event.success(None, file, None, js=viewer.ON_EXPORTED, **model)
        export_event.failure(None, None, None, js=viewer.ON_EXPORT_FAILED, **model)
        steps_event = page.steps(
            handlers.steps, None, page, api_name="page_steps", trigger_mode="multiple", **model
        )
        steps_event.failure(None, None, None, js=viewer.ON_STEPS_FAILED, **model)
    return demo


def main(arguments: list[str] | None = None) -> int:
    """Load the checkpoint and serve the page."""
    parser = argparse.ArgumentParser(description="Caption photos in the browser.")
    parser.add_argument("--checkpoint", metavar="PATH|HUB_ID", help="default: the shipped one")
    parser.add_argument("--encoder-weights", metavar="FILE", help="weights of the encoder")
    parser.add_argument("--host", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, help="default: the first free port starting at 7860")
    parser.add_argument("--root-path", help="path on a proxy, such as /captions")
    options = parser.parse_args(arguments)
    try:
        captioner = Captioner.from_pretrained(
            options.checkpoint, encoder_weights=options.encoder_weights
        )
        serve(
            lambda: build_demo(captioner),
            options.host,
            options.port,
            options.root_path,
            preview=lambda: LinkPreview(TITLE, SENTENCE, viewer.preview_picture(captioner)),
        )
    except (Exception, KeyboardInterrupt) as error:
        return report("app.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
