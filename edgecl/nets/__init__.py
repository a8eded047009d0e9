"""Networks: a timm backbone at a width, the slim net inside its host, and carving it out."""

import warnings

with warnings.catch_warnings():
    # timm scripts two functions while it is imported, which newer torch calls deprecated: not the user's business.
    warnings.simplefilter("ignore", FutureWarning)
    import timm  # noqa: F401
