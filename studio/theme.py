"""The studio's looks: local fonts, ink and teal, the same restraint in light and dark."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

CSS_FILE = Path(__file__).resolve().parents[1] / "assets" / "css" / "studio.css"

TEAL = gr.themes.Color(
    name="studio-teal", c50="#effcf9", c100="#cdf5ec", c200="#9ceadb", c300="#63d6c4", c400="#31baa9", c500="#139e8f",
    c600="#0c8076", c700="#0e665f", c800="#10514d", c900="#123f3d", c950="#05282a",
)  # fmt: skip
INK = gr.themes.Color(
    name="studio-ink", c50="#f7f8f9", c100="#eef0f2", c200="#dfe3e7", c300="#c5ccd3", c400="#98a2ad", c500="#6b7682",
    c600="#4f5964", c700="#39424b", c800="#222a31", c900="#161c22", c950="#0e1317",
)  # fmt: skip

# Phones: an open sidebar covers the page, so it is closed at load and after a primary button. Elsewhere it takes room from the
# page without resizing the window, which is all that charts look at; so they are told.
ON_LOAD = """
() => {
  if (window.innerWidth < 768) {
    const close = (tries) => {
      const button = document.querySelector('.sidebar .toggle-button');
      const sidebar = document.querySelector('.sidebar');
      if (!button) { if (tries > 0) setTimeout(() => close(tries - 1), 100); return; }
      if (sidebar.classList.contains('open')) button.click();
    };
    close(50);
  }
  const follow = (tries) => {
    const pages = document.querySelector('#pages');
    if (!pages) { if (tries > 0) setTimeout(() => follow(tries - 1), 100); return; }
    let width = pages.clientWidth, waiting;
    new ResizeObserver(() => {
      if (pages.clientWidth === width) return;
      width = pages.clientWidth;
      clearTimeout(waiting);
      waiting = setTimeout(() => window.dispatchEvent(new Event('resize')), 150);
    }).observe(pages);
  };
  follow(50);
}
"""


def theme() -> gr.themes.Base:
    """The theme; the SemiBold files that gradio ships lack most letters, so headings use the Bold ones."""
    sans, mono = (
        gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)),
        gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)),
    )
    base = gr.themes.Base(
        primary_hue=TEAL,
        secondary_hue=TEAL,
        neutral_hue=INK,
        radius_size=gr.themes.sizes.radius_sm,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
        font=[sans, "ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=[mono, "ui-monospace", "monospace"],
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        background_fill_secondary_dark="*neutral_900",
        block_border_width="1px",
        block_border_color_dark="*neutral_800",
        border_color_primary_dark="*neutral_700",
        block_shadow="none",
        body_text_color_subdued="*neutral_600",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_400",
        block_title_text_size="*text_sm",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_large_padding="*spacing_md",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )
