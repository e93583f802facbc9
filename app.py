"""The page: a photo in, its caption out, and word by word where the model looked."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from captioner import viewer  # isort: skip -- before gradio, which looks for a cache
import gradio as gr

from captioner.config import DecodingOptions
from captioner.errors import CaptionerError
from captioner.overlay import render
from captioner.predictor import Captioner
from captioner.serving import serve


def build_demo(captioner: Captioner) -> gr.Blocks:
    """Return the page around a loaded captioner."""
    examples = viewer.example_photos()
    answers = viewer.Answers(captioner, list(examples))

    @viewer.told
    def take(shown: viewer.View, event: gr.EventData) -> str:
        data = render(shown.photo, shown.caption, event.format, event.beam)
        return attention.save(data, f"caption.{event.format}")

    name = "Captions with attention"
    with gr.Blocks(title=name, analytics_enabled=False) as demo:
        gr.Markdown(f"# {name}\nSee, word by word, where the model looked.")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="bring"):
                photo = viewer.PhotoInput(
                    label="Photo", sources=["upload", "webcam", "clipboard"], height=240
                )
                shelf = viewer.example_shelf(photo, list(examples))
            with gr.Column(elem_id="look"):
                attention = viewer.AttentionViewer()
            with gr.Column(elem_id="tools"):
                text = gr.Textbox(
                    label="Your own words",
                    info="A beginning to write on from, or a whole caption to be read.",
                    placeholder="a woman",
                    max_length=500,
                )
                with gr.Row():
                    write = gr.Button("Write on from here", size="sm", min_width=120)
                    read = gr.Button("Read it as it is", size="sm", min_width=120)
                with gr.Accordion("Settings", open=False):
                    settings = viewer.controls()
                    report = gr.Button("As the original report: greedy, no bans", size="sm")
                    default = gr.Button("Back to the defaults", size="sm")
        with gr.Accordion("How it works", open=False):
            checkpoint = captioner.checkpoint
            gr.Markdown(viewer.how_it_works(checkpoint.model.config, checkpoint.encoder))
        with gr.Accordion("What it was trained on, and what it is bad at", open=False):
            gr.Markdown(captioner.card)
        file = gr.File(visible=False)
        button, json = gr.Button(visible=False), gr.JSON(visible=False)

        # Two at once: unpacking and packing leave a core free.
        button.click(answers.api, photo, json, api_name="caption", concurrency_limit=2)
        # One at a time: what answers an older photo never comes after what answers a newer one.
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        model["api_visibility"] = "private"
        newest = {"trigger_mode": "always_last", "show_progress_on": attention, **model}
        brought = [photo, *settings]
        upload = photo.upload(answers.brought, brought, [photo, attention], **newest)
        upload.failure(lambda: (None, None), None, [photo, attention], **model)
        photo.clear(lambda: None, None, attention, **model)
        shelf.click(answers.example, [shelf, *settings], [photo, attention], **newest)
        # `input` is the keyboard's and the mouse's, `release` that of a slider's number and reset.
        # `change` would also fire when the settings are unfolded.
        chosen = [each.input for each in settings]
        chosen += [each.release for each in settings if isinstance(each, gr.Slider)]
        gr.on(chosen, answers.caption, brought, attention, **newest)
        for preset, options in ((report, DecodingOptions.report()), (default, DecodingOptions())):
            values = viewer.setting_values(options)
            preset.click(lambda values=values: values, None, settings, **model).then(
                answers.caption, brought, attention, **newest
            )
        attention.steer(answers.steer, brought, attention, **model)
        typed = [photo, text, *settings]
        gr.on([write.click, text.submit], answers.write_on, typed, attention, **model)
        read.click(answers.read, [photo, text], attention, **model)
        taken = attention.take(take, attention, file, **model)
        taken.success(None, file, None, js=viewer.SAVE_FILE, **model)
        taken.failure(None, None, None, js=viewer.FORGET_FILE, **model)
        demo.load(None, None, None, js=viewer.name_examples(examples.values()))
    return demo


def main(arguments: list[str] | None = None) -> int:
    """Load the checkpoint and serve the page."""
    parser = argparse.ArgumentParser(description="Caption photos in the browser.")
    parser.add_argument("--checkpoint", metavar="PATH|HUB_ID", help="default: the shipped one")
    parser.add_argument("--encoder-weights", metavar="FILE", help="the encoder's weights")
    parser.add_argument("--host", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = parser.parse_args(arguments)
    try:
        captioner = Captioner.load(options.checkpoint, options.encoder_weights)
        serve(lambda: build_demo(captioner), options.host, options.port)
    except CaptionerError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
