"""The charts, as SVG that lives inside a page and takes its colors from the page's style sheet."""
