"""Networks: a timm backbone at a width, the slim net inside its host, and carving it out."""
