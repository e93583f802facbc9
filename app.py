"""The page: a photo in, its caption out, and word by word where the model looked."""

from __future__ import annotations

import argparse
import sys

import gradio as gr

from captioner.config import DecodingOptions
from captioner.errors import CaptionerError
from captioner.overlay import render
from captioner.predictor import Captioner
from captioner.serving import LAUNCH
from captioner.viewer import (
    Answers,
    AttentionViewer,
    PhotoInput,
    View,
    controls,
    example_photos,
    how_it_works,
    setting_values,
    told,
)

_SAVE = """(file) => {
    const link = Object.assign(document.createElement("a"), { href: file.url });
    link.download = file.orig_name;
    link.click();
    document.querySelector("#viewer .taken").textContent = "Saved.";
}"""


def build_demo(captioner: Captioner) -> gr.Blocks:
    """Return the page around a loaded captioner."""
    examples = example_photos()
    answers = Answers(captioner, list(examples))
    answers.warm_up()

    @told
    def take(view: View, event: gr.EventData) -> str:
        data = render(view.photo, view.caption, event.format, event.beam)
        return viewer.save(data, f"caption.{event.format}")

    with gr.Blocks(title="Captions with attention", analytics_enabled=False) as demo:
        gr.Markdown("# Captions with attention\nSee, word by word, where the model looked.")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="bring"):
                photo = PhotoInput(
                    label="Photo", sources=["upload", "webcam", "clipboard"], height=240
                )
                shelf = gr.Dataset(
                    label="Examples",
                    components=[photo],
                    samples=[[path] for path in examples],
                    type="index",
                    elem_id="examples",
                )
            with gr.Column(elem_id="look"):
                viewer = AttentionViewer(elem_id="viewer")
            with gr.Column(elem_id="tools"):
                text = gr.Textbox(
                    label="Your own words",
                    info="A beginning to write on from, or a whole caption to be read.",
                    placeholder="a woman",
                    max_length=500,
                )
                with gr.Row():
                    write = gr.Button("Write on from here", size="md", min_width=120)
                    read = gr.Button("Read it as it is", size="md", min_width=120)
                with gr.Accordion("Settings", open=False):
                    settings = controls()
                    report = gr.Button("As the original report: greedy, no bans", size="sm")
                    default = gr.Button("Back to the defaults", size="sm")
        spec = captioner.checkpoint
        with gr.Accordion("How it works", open=False):
            gr.Markdown(how_it_works(spec.model.config, spec.encoder))
        with gr.Accordion("What it was trained on, and what it is bad at", open=False):
            gr.Markdown(captioner.card)
        file = gr.File(visible=False)
        button, json = gr.Button(visible=False), gr.JSON(visible=False)

        # One photo at a time: an answer to an older photo never comes after that to a newer one.
        model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        newest = {"trigger_mode": "always_last", **model}
        photo.upload(answers.caption, [photo, *settings], viewer, **newest)
        photo.clear(lambda: None, None, viewer, queue=False, api_visibility="private")
        shelf.click(answers.example, [shelf, *settings], [photo, viewer], **newest)
        viewer.steer(answers.steer, [photo, *settings], viewer, **model)
        gr.on(
            [write.click, text.submit], answers.write_on, [photo, text, *settings], viewer, **model
        )
        read.click(answers.read, [photo, text], viewer, **model)
        for setting in settings:
            changed = setting.release if isinstance(setting, gr.Slider) else setting.input
            changed(answers.caption, [photo, *settings], viewer, **newest)
        for preset, options in ((report, DecodingOptions.report()), (default, DecodingOptions())):
            preset.click(
                lambda values=setting_values(options): values, None, settings, api_visibility="private"
            ).then(answers.caption, [photo, *settings], viewer, **newest)
        viewer.take(take, viewer, file, **model).success(None, file, None, js=_SAVE)
        button.click(answers.api, photo, json, api_name="caption", **model | {"api_visibility": "public"})
    return demo


def main(arguments: list[str] | None = None) -> int:
    """Load the checkpoint and serve the page."""
    parser = argparse.ArgumentParser(description="Caption photos in the browser.")
    parser.add_argument(
        "--checkpoint", metavar="PATH|HUB_ID", help="a checkpoint; default: the shipped one"
    )
    parser.add_argument("--encoder-weights", metavar="FILE", help="the encoder's weights")
    parser.add_argument("--host", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = parser.parse_args(arguments)
    try:
        captioner = Captioner.load(options.checkpoint, options.encoder_weights)
    except CaptionerError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    demo = build_demo(captioner).queue(max_size=20)
    try:
        demo.launch(server_name=options.host, server_port=options.port, **LAUNCH)
    except OSError:
        place = f"port {options.port}" if options.port else "every port from 7860 to 7959"
        print(f"app.py: {place} is taken, choose another --port", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
