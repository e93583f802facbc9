"""How the page is served: what ``launch`` gets."""

from __future__ import annotations

from typing import Any

import gradio as gr

# The default theme's soft text is 1.91 to 1 on white; these reach 4.5 to 1 in light and dark.
_THEME = gr.themes.Default().set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)

# Wide: photo and tools beside the viewer. Narrow: photo, viewer, tools; the examples as a strip.
_STYLE = """
#page { display: grid; gap: var(--layout-gap); }
#page { grid-template: "bring look" auto "tools look" 1fr / 2fr 5fr; }
#bring { grid-area: bring } #look { grid-area: look } #tools { grid-area: tools }
#page > * { min-width: 0 !important }
/* An answer mostly comes before the fading has begun. */
#look .pending { transition: opacity 0.2s 0.4s; }
@media (max-width: 760px) {
    #page { grid-template: "bring" auto "look" auto "tools" auto / 100%; }
    #examples .gallery { flex-wrap: nowrap; overflow-x: auto; }
    #examples .gallery-item { flex: none; }
}
"""

# A visitor's runs are not kept in the browser, nor shown on a monitoring page.
LAUNCH: dict[str, Any] = {
    "theme": _THEME,
    "css": _STYLE,
    "footer_links": ["api"],
    "max_file_size": "10mb",
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    # A session holds its last answer, and every request over HTTP is one of its own: gradio would
    # keep 10,000 of them. Nothing here needs what a session knew.
    "state_session_capacity": 64,
}
