"""Training data as users have it: folders, captions, data sets, decoding; one reader for all."""
