"""Images: where they come from, in which order, and how one becomes two views."""
