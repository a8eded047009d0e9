"""The charts, as SVG that lives inside a page and takes its colours from the page's style sheet."""
