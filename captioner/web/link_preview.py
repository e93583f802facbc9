"""The preview of a link to the page, in place of Gradio's own."""

from __future__ import annotations

import dataclasses
import html
import re

import gradio.routes
import jinja2

_TEMPLATE = "frontend/index.html"  # Gradio's page
_PREVIEW_TAG = re.compile(
    r'<meta\s+(?:property|name)="(?:og|twitter|description)[^"]*"\s+content="[^"]*"\s*/>'
)


@dataclasses.dataclass(frozen=True)
class LinkPreview:
    """A link to the page, as chats and social networks show it.

    Attributes:
        title: of the page.
        description: one sentence.
        picture: PNG.
    """

    title: str
    description: str
    picture: bytes

    def install(self) -> None:
        """Put the preview into the head of Gradio's page, which describes Gradio itself."""
        environment = gradio.routes.templates.env
        loader = environment.loader
        assert loader is not None
        source, _, _ = loader.get_source(environment, _TEMPLATE)
        source = _PREVIEW_TAG.sub("", source).replace("</head>", f"{self._tags()}</head>", 1)
        environment.loader = jinja2.ChoiceLoader([jinja2.DictLoader({_TEMPLATE: source}), loader])
        if environment.cache is not None:
            environment.cache.clear()

    def _tags(self) -> str:
        title, description = html.escape(self.title), html.escape(self.description)
        picture = "{{ config.root }}/preview.png"
        return (
            f'<meta name="description" content="{description}" />'
            '<meta property="og:type" content="website" />'
            f'<meta property="og:title" content="{title}" />'
            f'<meta property="og:description" content="{description}" />'
            '<meta property="og:url" content="{{ config.root }}" />'
            f'<meta property="og:image" content="{picture}" />'
            '<meta name="twitter:card" content="summary_large_image" />'
            f'<meta name="twitter:title" content="{title}" />'
            f'<meta name="twitter:description" content="{description}" />'
            f'<meta name="twitter:image" content="{picture}" />'
        )
