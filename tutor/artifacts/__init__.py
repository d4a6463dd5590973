"""Stage folders on disk: whole or absent, each with a manifest of what made it and what is in it.

In: a build folder, the key fields of a result, a block that writes files. Out: folders that a kill never leaves half
written (stage_folder.py, disk.py), their manifests (manifest.py), one writer at a time (lock.py), the path of
everything below the build folder (layout.py), hashes that are computed once (hashing.py), and the code and packages
that a result depends on (provenance.py, source.py). Knows no stage's content, no recipe and no model.
"""
