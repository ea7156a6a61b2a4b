"""The metrics' names and what is good of each; light enough for --help to import."""

from __future__ import annotations

METRICS = ("clip-t", "clip-i", "dino", "kid", "fid")
PER_PICTURE = ("clip-t", "clip-i", "dino")  # each picture has a value by itself; KID and FID are of a whole set
TITLES = {"clip-t": "CLIP-T", "clip-i": "CLIP-I", "dino": "DINO", "kid": "KID", "fid": "FID"}
HIGHER_IS_BETTER = {"clip-t": True, "clip-i": True, "dino": True, "kid": False, "fid": False}
