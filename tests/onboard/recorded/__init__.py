"""What boards and trtexec show, in the shapes that public logs and kernel drivers have.

No board of ours wrote these: shapes, names and units are theirs, the numbers are made up and fit together.
"""
